"""Templates, and the HTML page of a report."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2

from prunepeft.report.grid import modules_of, plain
from prunepeft.report.plots import Picture
from prunepeft.report.record import Evidence
from prunepeft.report.render import Table, escape_markdown, show
from prunepeft.report.tables import budget_sentence, compare, metric_name, ratio

_ENVIRONMENT = jinja2.Environment(
    loader=jinja2.PackageLoader("prunepeft.report"),
    autoescape=jinja2.select_autoescape(enabled_extensions=("html.jinja",)),
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)
_ENVIRONMENT.filters |= {"md": escape_markdown, "show": show, "plain": plain}


def render(template: str, **values: Any) -> str:
    """Fill one of the package's templates; HTML ones escape every value."""
    return _ENVIRONMENT.get_template(template).render(**values)


def make_page(
    evidence: Evidence, tables: Sequence[Table], pictures: Sequence[Picture], loading: str
) -> str:
    """Write the report as one HTML page that needs nothing else.

    Args:
        evidence: The run.
        tables: What `make_tables` returned.
        pictures: What `make_pictures` returned.
        loading: Python lines that load the adapter.
    """
    return render(
        "report.html.jinja",
        evidence=evidence,
        result=evidence.result,
        history=evidence.history,
        metric=metric_name(evidence.result),
        tiles=make_tiles(evidence),
        verdict=compare(evidence.result),
        budget=budget_sentence(evidence.result),
        tables={table.name: table for table in tables},
        pictures={picture.name: picture for picture in pictures},
        data=_flat(evidence.data),
        environment=_flat(evidence.result.environment),
        loading=loading,
    )


def make_tiles(evidence: Evidence) -> list[tuple[str, str, str]]:
    """The key numbers: label, value, and a line below."""
    result = evidence.result
    placement, total = result.placement, result.space.n_slots
    kept = placement.n_modules if placement.n_modules is not None else len(modules_of(evidence))
    share = ratio(placement.n_params, result.model.n_params)
    tiles = [
        (f"validation {metric_name(result)}", show(result.metric.value, "score"), _rows(evidence)),
        (
            "trainable parameters",
            show(placement.n_params, "int"),
            f"{share:.2%} of the base model" if share is not None else "",
        ),
        ("modules kept", str(kept), f"of {total} candidates" if total else ""),
    ]
    part = ratio(result.search.seconds, result.train.seconds)
    if part is not None and result.search.seconds:
        time = show(result.search.seconds, "seconds")
        tiles.append(("search time", time, f"{part:.2f} of the training time"))
    return tiles


def _rows(evidence: Evidence) -> str:
    n_rows = evidence.result.task.n_validation
    return f"on {n_rows:,} rows" if n_rows else ""


def _flat(data: Mapping[str, Any], prefix: str = "", depth: int = 0) -> list[tuple[str, str]]:
    """Nested settings as dotted names and one-line values."""
    rows: list[tuple[str, str]] = []
    for key, value in data.items():
        name = plain(f"{prefix}{key}", 80)
        if isinstance(value, Mapping) and value and depth < 3:
            rows += _flat(value, f"{name}.", depth + 1)
        elif isinstance(value, str):
            rows.append((name, plain(value, 400)))
        else:
            rows.append((name, plain(json.dumps(value, ensure_ascii=False, default=str), 400)))
    return rows[:200]
