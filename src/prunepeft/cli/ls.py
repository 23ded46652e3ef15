"""`prunepeft ls`: what can be chosen."""

from collections.abc import Callable
from enum import StrEnum
from typing import Annotated, Any

import typer

from prunepeft.cli.exits import guarded
from prunepeft.cli.options import Debug, Json, make_output
from prunepeft.errors import ConfigError, SiteError
from prunepeft.registry import Registry

Rows = list[dict[str, Any]]
SIZE_SHOWN = 8


class What(StrEnum):
    """Lists that can be shown."""

    KINDS = "kinds"
    CRITERIA = "criteria"
    METHODS = "methods"
    METRICS = "metrics"
    TASKS = "tasks"


def add(app: typer.Typer) -> None:
    """Add the command."""
    app.command("ls", epilog="Example: prunepeft ls kinds")(guarded("ls", ls))


def ls(
    what: Annotated[What, typer.Argument(help="What to list.")],
    model: Annotated[
        str | None,
        typer.Option(help="Model folder or hub id: count the parameters of every kind for it."),
    ] = None,
    json_out: Json = False,
    debug: Debug = False,
) -> None:
    """List kinds, criteria, methods, metrics or tasks."""
    output = make_output(json_out)
    if model is not None and what is not What.KINDS:
        raise ConfigError(f"--model goes with `ls kinds`, not with `ls {what}`; leave it out.")
    with output.work():
        rows = _kinds(model) if what is What.KINDS else _ROWS[what]()
    if not output.document(rows):
        header = list(rows[0])
        output.table("", header, [[row[key] for key in header] for row in rows])


def _kinds(model: str | None) -> Rows:
    from prunepeft.kinds import KINDS

    counts = _counts(model) if model is not None else {}
    return [
        {
            "name": name,
            "mergeable": kind.mergeable,
            "servable": kind.servable,
            "shrinkable": bool(kind.shrink_axes),
            "default roles": ["+".join(group) for group in kind.roles],
            "parameters per site": kind.formula,
            **({counts["title"]: counts[name]} if counts else {}),
            "what": _first_line(kind),
        }
        for name, kind in KINDS
    ]


def _counts(model: str) -> dict[str, Any]:
    """Parameters of every kind at its default roles, or None where it does not fit the model."""
    from transformers import AutoModel

    from prunepeft.candidates import make_space
    from prunepeft.kinds import KINDS, count_params
    from prunepeft.sites import find_sites
    from prunepeft.tasks.loading import load_config, make_empty

    sites = find_sites(make_empty(AutoModel, model, load_config(model)))
    found: dict[str, Any] = {"title": f"parameters, R={SIZE_SHOWN}"}
    for name, kind in KINDS:
        try:
            space = make_space(sites, (name,), sizes={name: SIZE_SHOWN} if kind.sized else None)
            found[name] = count_params(space.full())
        except SiteError:
            found[name] = None
    return found


def _criteria() -> Rows:
    from prunepeft.criteria import CRITERIA

    return [
        {"name": name, "needs": sorted(criterion.needs), "what": _first_line(type(criterion))}
        for name, criterion in CRITERIA
    ]


def _methods() -> Rows:
    from prunepeft.strategies import METHODS

    return _plain(METHODS)


def _metrics() -> Rows:
    from prunepeft.metrics import METRICS

    return [
        {"name": name, "better": "higher" if metric.greater_is_better else "lower"}
        for name, metric in METRICS
    ]


def _tasks() -> Rows:
    from prunepeft.tasks import TASKS

    return _plain(TASKS, metric="default_metric")


def _plain(registry: Registry[Any], **columns: str) -> Rows:
    return [
        {
            "name": name,
            **{title: getattr(item, attribute) for title, attribute in columns.items()},
            "what": _first_line(item if isinstance(item, type) else type(item)),
        }
        for name, item in registry
    ]


def _first_line(item: type) -> str:
    return (item.__doc__ or "").strip().partition("\n")[0]


_ROWS: dict[What, Callable[[], Rows]] = {
    What.CRITERIA: _criteria,
    What.METHODS: _methods,
    What.METRICS: _metrics,
    What.TASKS: _tasks,
}
