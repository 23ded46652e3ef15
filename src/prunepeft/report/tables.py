"""The tables of a report: functions from what was recorded to rows."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prunepeft.report.base_table import base_table
from prunepeft.report.grid import Module, modules_of, plain, split_id
from prunepeft.report.record import Evidence, History, Result, parse
from prunepeft.report.render import Column, Table, Value, show, to_text

OURS = "this run"


def make_tables(evidence: Evidence) -> list[Table]:
    """Every table there is evidence for."""
    tables = [cost_table(evidence.result), kept_table(modules_of(evidence))]
    if evidence.result.base is not None:
        tables.append(base_table(evidence.result.base))
    if evidence.history and evidence.history.rounds:
        tables += [rounds_table(evidence.history), drop_table(evidence.history)]
    if evidence.history and evidence.history.trials:
        tables.append(trials_table(evidence.history, metric_name(evidence.result)))
    if evidence.result.train.curve:
        tables.append(curve_table(evidence.result))
    return tables


def cost_table(result: Result) -> Table:
    """This run beside its baselines: quality, everything it took, and time and size as ratios."""
    metric, base = metric_name(result), result.baselines[0] if result.baselines else None
    columns = (
        Column("model"),
        Column(metric, "score"),
        Column("parameters", "int"),
        Column("search", "seconds"),
        Column("training", "seconds"),
        Column("search / training", "ratio"),
        Column("steps", "int"),
        Column("peak memory", "bytes"),
        Column("time / baseline", "ratio"),
        Column("parameters / baseline", "ratio"),
    )
    rows = tuple(
        (*row, ratio(_total(row[3], row[4]), base.seconds), ratio(row[2], base.n_params))
        if base
        else (*row, None, None)
        for row in _cost_rows(result)
    )
    note = direction(result)
    if base:
        note += f" Ratios are to {plain(base.name)}; time is search plus training."
    if result.head_params:
        note += f" The task head ({result.head_params:,} parameters) is not counted."
    return Table("cost", "Result and cost", columns, rows, note)


def _cost_rows(result: Result) -> list[tuple[Any, ...]]:
    search, train = result.search, result.train
    own = (
        f"{OURS} ({plain(result.method)})" if result.method else OURS,
        result.metric.value,
        result.placement.n_params,
        search.seconds,
        train.seconds,
        ratio(search.seconds, train.seconds),
        _total(search.steps, train.steps),
        _largest(search.peak_memory_bytes, train.peak_memory_bytes),
    )
    others = (
        (b.name, b.metric.value, b.n_params, None, b.seconds, None, b.steps, b.peak_memory_bytes)
        for b in result.baselines
    )
    return [own, *others]


def direction(result: Result) -> str:
    """Which way the metric is better, in words."""
    better = "higher" if result.task.greater_is_better else "lower"
    return f"{metric_name(result)}: {better} is better."


def metric_name(result: Result) -> str:
    """Name of the metric the run was judged by."""
    return plain(result.metric.name or result.task.metric or "metric")


def kept_table(modules: Sequence[Module]) -> Table:
    """The modules that were kept, in model order."""
    columns = (
        Column("slot"),
        Column("stack"),
        Column("layer", "int"),
        Column("place"),
        Column("kind"),
        Column("size", "int"),
        Column("parameters", "int"),
        Column("module paths"),
    )
    rows = tuple(
        (m.id, *m.row, " ".join(m.column[:2]), m.kind, m.size, m.n_params, ", ".join(m.paths))
        for m in modules
    )
    return Table("kept_modules", "Kept modules", columns, rows, "Size: rank or bottleneck width.")


def drop_table(history: History) -> Table:
    """What was removed, first removal first, with the evidence of that round."""
    criteria = sorted({name for r in history.rounds for name in r.saliency})
    columns = (
        Column("order", "int"),
        Column("round", "int"),
        Column("slot"),
        Column("kind"),
        Column("partition"),
        Column("removal probability", "score"),
        *(Column(f"{plain(name)} saliency", "significant") for name in criteria),
    )
    rows: list[tuple[Value, ...]] = []
    for entry in history.rounds:
        for slot_id in entry.removed:
            scores = [entry.saliency.get(name, {}).get(slot_id) for name in criteria]
            kind = split_id(slot_id)[1][2]
            partition = history.partitions.get(slot_id)
            chance = entry.probability.get(slot_id)
            rows.append((len(rows) + 1, entry.round, slot_id, kind, partition, chance, *scores))
    note = "A low saliency means little is lost; a high removal probability means: goes first."
    return Table("dropped_modules", "Drop list", columns, tuple(rows), note)


def rounds_table(history: History) -> Table:
    """What each round cost and removed."""
    columns = (
        Column("round", "int"),
        Column("cost before", "int"),
        Column("cost after", "int"),
        Column("modules removed", "int"),
        Column("steps", "int"),
        Column("rows seen", "int"),
        Column("seconds", "seconds"),
    )
    rows = tuple(
        (r.round, r.cost_before, r.cost_after, len(r.removed), r.steps, r.rows, r.seconds)
        for r in history.rounds
    )
    return Table("rounds", "Rounds", columns, rows, "Cost in the unit of the budget.")


def trials_table(history: History, metric: str) -> Table:
    """Every placement that was tried in a short training."""
    forms = {"number": "int", "stage": "int", "placement": "text", "cost": "int", "status": "text"}
    forms |= {"metric": "score", "steps": "int", "seconds": "seconds"}
    columns = tuple(Column(metric if k == "metric" else k, form) for k, form in forms.items())
    rows = tuple(tuple(trial.get(key) for key in forms) for trial in history.trials)
    note = "Cost in the unit of the budget. Metrics of different stages do not compare."
    return Table("trials", "Trials", columns, rows, note)


def curve_table(result: Result) -> Table:
    """Every number of every epoch, this run and the baselines."""
    curves = [(OURS, result.train.curve)] + [(b.name, b.curve) for b in result.baselines]
    points = [point for _, curve in curves for point in curve]
    keys = [k for k in dict.fromkeys(key for p in points for key in p) if k != "epoch"]
    numbers = (Column(plain(key), "score") for key in keys)
    columns = (Column("model"), Column("epoch", "plain"), *numbers)
    rows = tuple(
        (name, number(p.get("epoch")), *(number(p.get(k)) for k in keys))
        for name, curve in curves
        for p in curve
    )
    return Table("learning_curves", "Learning curves", columns, rows)


def compact_summary(result: Mapping[str, Any], run: Path | str | None = None) -> str:
    """What the command line prints when a run ends.

    Args:
        result: Content of result.json.
        run: The run folder, to print where the files are.
    Raises:
        CheckpointError: if the result does not have the form of result.json.
    """
    record = parse(Result, result, "result")
    table = cost_table(record)
    wanted = ("model", metric_name(record), "parameters", "search", "training", "peak memory")
    lines = [to_text(table.select(*wanted)), "", direction(record)]
    if verdict := compare(record):
        lines.append(verdict)
    lines += [budget_sentence(record), *_kept_lines(record)]
    if run is not None:
        lines += ["", f"adapter   {run}/best/adapter", f"report    {run}/report/report.html"]
        lines += [f"card      {run}/README.md", f"share it  prunepeft export {run} --format peft"]
    return "\n".join(lines)


def compare(result: Result) -> str:
    """One sentence: this run against the best baseline; empty if there is nothing to compare."""
    sign = 1 if result.task.greater_is_better else -1
    scored = [b for b in result.baselines if _finite(b.metric.value)]
    if not scored or not _finite(result.metric.value):
        return ""
    best = max(scored, key=lambda b: sign * (b.metric.value or 0.0))
    gap = (result.metric.value or 0.0) - (best.metric.value or 0.0)
    verdict = "equal to" if abs(gap) < 5e-5 else "better than" if sign * gap > 0 else "worse than"
    own = f"{metric_name(result)} {show(result.metric.value, 'score')}"
    return (
        f"{own} is {verdict} {plain(best.name)} "
        f"({show(best.metric.value, 'score')}, difference {gap:+.4f}; one seed)."
    )


def budget_sentence(result: Result) -> str:
    """How much of the budget was used, in words."""
    budget = result.budget
    names = {"parameters": "trainable parameters", "rank": "summed rank"}
    unit = names.get(budget.unit, budget.unit)
    if not budget.limit or budget.realised is None:
        return f"Budget: {plain(budget.text)}." if budget.text else "No budget was recorded."
    is_short = budget.text.endswith(("%", "k", "M", "B"))
    given = f"{plain(budget.text)} = " if is_short else ""
    limit = f"Budget {given}{budget.limit:,.0f} {plain(unit)}"
    return f"{limit}: {budget.realised:,.0f} used ({budget.realised / budget.limit:.1%})."


def kinds_in_words(modules: Sequence[Any]) -> list[str]:
    """Kept modules by kind, e.g. `5 lora (sizes 4-8)`.

    Args:
        modules: Anything with `kind` and `size`.
    """
    sizes: dict[str, list[int]] = {}
    for module in modules:
        sizes.setdefault(module.kind, []).append(module.size)
    return [
        f"{len(found)} {plain(kind)} (size {span(found)})" for kind, found in sorted(sizes.items())
    ]


def size_counts(modules: Sequence[Any]) -> dict[str, dict[int, int]]:
    """How often each size occurs, by kind."""
    counts: dict[str, Counter[int]] = {}
    for module in modules:
        counts.setdefault(module.kind, Counter())[module.size] += 1
    return {kind: dict(sorted(found.items())) for kind, found in sorted(counts.items())}


def span(values: Sequence[int]) -> str:
    """`8` or `4-16`."""
    low, high = min(values), max(values)
    return str(low) if low == high else f"{low}-{high}"


def ratio(part: float | None, whole: float | None) -> float | None:
    """part / whole where both are known."""
    return part / whole if part is not None and whole else None


def number(value: object) -> float | int | None:
    """The value if it is a finite number, else None."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return value if is_number and math.isfinite(value) else None


def _kept_lines(result: Result) -> list[str]:
    kept, total = result.placement.n_modules, result.space.n_slots
    if kept is None:
        return []
    of = f" of {total}" if total else ""
    words = ", ".join(kinds_in_words(result.placement.modules) or result.placement.kinds)
    return [f"Kept {kept}{of} modules" + (f": {words}." if words else ".")]


def _finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _total(*values: float | None) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) if known else None


def _largest(*values: float | None) -> float | None:
    return max((value for value in values if value is not None), default=None)
