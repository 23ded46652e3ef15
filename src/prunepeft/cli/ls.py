"""`prunepeft ls`: what can be chosen."""

from collections.abc import Callable
from enum import StrEnum
from typing import Annotated, Any

import typer

from prunepeft.cli.exits import guarded
from prunepeft.cli.options import Debug, Json, make_output
from prunepeft.registry import Registry

Rows = list[dict[str, Any]]


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
    json_out: Json = False,
    debug: Debug = False,
) -> None:
    """List kinds, criteria, methods, metrics or tasks."""
    output = make_output(json_out)
    with output.work():
        rows = _ROWS[what]()
    if not output.document(rows):
        header = list(rows[0])
        output.table("", header, [[row[key] for key in header] for row in rows])


def _kinds() -> Rows:
    from prunepeft.kinds import KINDS

    return [
        {
            "name": name,
            "mergeable": kind.mergeable,
            "servable": kind.servable,
            "has sizes": kind.sized,
            "default roles": ["+".join(group) for group in kind.roles],
            "what": _first_line(kind),
        }
        for name, kind in KINDS
    ]


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
    What.KINDS: _kinds,
    What.CRITERIA: _criteria,
    What.METHODS: _methods,
    What.METRICS: _metrics,
    What.TASKS: _tasks,
}
