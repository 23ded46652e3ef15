"""What is in a run, an adapter or a placement, told from headers and JSON alone.

Everything read here is untrusted: whatever is broken raises one of our errors.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prunepeft.errors import CheckpointError, ConfigError
from prunepeft.report.adapter_file import (
    LoraSettings,
    head_params,
    lora_modules,
    read_header,
    read_lora_settings,
    union_modules,
)
from prunepeft.report.grid import Grid, Module, make_grid, placed_modules, plain
from prunepeft.report.record import parse_placement, read_json, read_placement
from prunepeft.report.render import show
from prunepeft.report.serving import lora_verdicts, union_verdicts
from prunepeft.report.tables import kinds_in_words, size_counts
from prunepeft.space import Placement

_MAX_WIDTH = 14


def inspect_path(path: str | Path) -> dict[str, Any]:
    """Describe a run folder, an adapter folder or an arch.json. JSON-able; loads no tensor.

    Args:
        path: The folder or file.
    Returns:
        `path`, `type` (run, adapter or placement), `peft_type`, `base_model`, `base_digest` (of the
        pruned base it was made on, else empty), `kinds` (number of modules of each), `n_modules`,
        `ranks` (kind -> size -> count), `layers`, `columns`, `bytes_on_disk`, `trainable_params`,
        `head_params` and `serving`.
    Raises:
        ConfigError: if there is nothing to describe at the path.
        CheckpointError: if a file is damaged or hostile.
    """
    path = Path(path)
    if path.is_file():
        return _describe(path, "placement", **_placement_facts(path))
    if not path.is_dir():
        raise ConfigError(f"there is nothing at {path}; give a run, an adapter or an arch.json.")
    if (path / "adapter_config.json").is_file():
        return _describe(path, "adapter", **_adapter_facts(path))
    best = path / "best"
    if (best / "adapter" / "adapter_config.json").is_file():
        return _describe(path, "run", **_adapter_facts(best / "adapter"))
    if (best / "arch.json").is_file():
        return _describe(path, "run", **_placement_facts(best / "arch.json"))
    raise ConfigError(
        f"{path} is neither a run with best/, nor an adapter with adapter_config.json. If it is a "
        "run that was interrupted, run the same command again to finish it."
    )


def format_inspect(found: Mapping[str, Any]) -> str:
    """What `inspect_path` found, as text for a terminal, with a map of the modules."""
    kinds = {kind: _sizes_in_words(sizes) for kind, sizes in found["ranks"].items()}
    lines = [
        f"{found['type']}  {plain(found['path'], 200)}",
        f"  type       {plain(found['peft_type'] or 'placement only, no weights')}",
        f"  base       {plain(found['base_model'] or 'not recorded', 120)}",
        *([f"  pruned to  {plain(found['base_digest'][:12])}"] if found["base_digest"] else []),
        f"  modules    {found['n_modules']} ({', '.join(found['words']) or 'none'})",
        *(f"  sizes      {plain(kind)}: {words}" for kind, words in kinds.items()),
        f"  trainable  {_count(found['trainable_params'])}"
        + (f", and {found['head_params']:,} in the head" if found["head_params"] else ""),
        f"  on disk    {show(found['bytes_on_disk'], 'bytes')}",
        "",
        *_text_map(found),
        "",
        "who can serve it",
        *(f"  {v['engine']:<20} {v['verdict']:<17} {v['reason']}" for v in found["serving"]),
    ]
    return "\n".join(line.rstrip() for line in lines)


def _describe(
    path: Path,
    what: str,
    *,
    modules: Sequence[Module],
    placement: Placement | None,
    serving: list[dict[str, str]],
    peft_type: str = "",
    base_model: str = "",
    base_digest: str = "",
    n_bytes: int | None = None,
    n_params: int | None = None,
    n_head: int | None = None,
) -> dict[str, Any]:
    grid = make_grid(modules, placement)
    return {
        "path": str(path),
        "type": what,
        "peft_type": peft_type,
        "base_model": base_model,
        "base_digest": base_digest,
        "n_modules": len(modules),
        "words": kinds_in_words(modules),
        "kinds": {kind: sum(c.values()) for kind, c in size_counts(modules).items()},
        "ranks": {k: {str(s): n for s, n in c.items()} for k, c in size_counts(modules).items()},
        "columns": [list(column) for column in grid.columns],
        "layers": _layers(grid, modules),
        "bytes_on_disk": n_bytes,
        "trainable_params": n_params,
        "head_params": n_head,
        "serving": serving,
    }


def _placement_facts(path: Path) -> dict[str, Any]:
    placement = read_placement(path)
    if placement is None:
        raise ConfigError(f"there is nothing at {path}; give a run, an adapter or an arch.json.")
    modules = placed_modules(placement)
    serving = union_verdicts({module.kind for module in modules}, trained=False)
    return {"modules": modules, "placement": placement, "serving": serving}


def _adapter_facts(folder: Path) -> dict[str, Any]:
    config = read_json(folder / "adapter_config.json")
    if not isinstance(config, Mapping):
        raise CheckpointError(f"{folder / 'adapter_config.json'} must hold a mapping; restore it.")
    kind, base = config.get("peft_type"), config.get("base_model_name_or_path")
    weights = folder / "adapter_model.safetensors"
    if kind not in ("PRUNEPEFT", "LORA"):
        raise CheckpointError(
            f"{folder} holds an adapter of type {plain(kind)!r}; PRUNEPEFT and LORA can be "
            "inspected. Use peft's own tools for other types."
        )
    shapes = read_header(weights)
    placement = None
    if kind == "PRUNEPEFT":
        source = folder / "adapter_config.json"
        placement = parse_placement(config.get("placement"), source)
        modules = union_modules(placement, shapes, weights)
        serving = union_verdicts({module.kind for module in modules}, trained=True)
    else:
        settings: LoraSettings = read_lora_settings(config, folder / "adapter_config.json")
        modules = lora_modules(shapes, settings, weights)
        serving = lora_verdicts(modules, settings)
    return {
        "modules": modules,
        "placement": placement,
        "serving": serving,
        "peft_type": kind,
        "base_model": base if isinstance(base, str) else "",
        "base_digest": digest if isinstance(digest := config.get("base_digest"), str) else "",
        "n_bytes": sum(f.stat().st_size for f in folder.iterdir() if f.is_file()),
        "n_params": sum(module.n_params or 0 for module in modules),
        "n_head": head_params(shapes),
    }


def _layers(grid: Grid, modules: Sequence[Module]) -> list[dict[str, Any]]:
    return [
        {
            "stack": row[0],
            "layer": row[1],
            "modules": [
                {
                    "id": m.id,
                    "kind": m.kind,
                    "size": m.size,
                    "n_params": m.n_params,
                    "column": grid.columns.index(m.column) if m.column in grid.columns else None,
                }
                for m in modules
                if m.row == row
            ],
        }
        for row in grid.rows
    ]


def _text_map(found: Mapping[str, Any]) -> list[str]:
    """Layers as lines, places as columns, sizes in the cells."""
    columns = found["columns"]
    if not columns:
        return ["no modules"]
    heads = [[plain(part, _MAX_WIDTH) for part in column] for column in columns]
    widths = [max(len(part) for part in head) for head in heads]
    names = [f"{plain(entry['stack'], 12)} {entry['layer']}" for entry in found["layers"]]
    margin = max(len(name) for name in [*names, "layer"])
    lines = []
    for i, label in enumerate(("", "", "layer")):
        parts = (head[i].ljust(width) for head, width in zip(heads, widths, strict=True))
        lines.append(f"  {label:<{margin}}  " + "  ".join(parts))
    for name, entry in zip(names, found["layers"], strict=True):
        cells = ["."] * len(columns)
        for module in entry["modules"]:
            if module["column"] is not None:
                cells[module["column"]] = str(module["size"])
        shown = (cell.ljust(width) for cell, width in zip(cells, widths, strict=True))
        lines.append(f"  {name:<{margin}}  " + "  ".join(shown))
    return lines


def _sizes_in_words(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{plain(size)} ({count}×)" for size, count in counts.items())


def _count(value: int | None) -> str:
    return "not known without weights" if value is None else f"{value:,} parameters"
