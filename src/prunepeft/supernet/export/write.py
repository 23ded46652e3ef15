"""`export_adapter` and `export_run`: choose the format, write the folder whole, report."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from prunepeft.errors import ConfigError, StateError
from prunepeft.registry import Registry
from prunepeft.state import RunFolder, read_json, write_folder, write_json
from prunepeft.supernet.export.base_model import Base, check_fit, make_skeleton
from prunepeft.supernet.export.merged import write_merged
from prunepeft.supernet.export.peft_form import write_peft
from prunepeft.supernet.export.request import Request, Written
from prunepeft.supernet.export.serve import write_serve
from prunepeft.supernet.export.snippets import write_axolotl, write_trl
from prunepeft.supernet.export.source import read_adapter

REPORT_FILE = "export.json"
DTYPES = ("float32", "bfloat16", "float16")

FORMATS: Registry[Callable[[Request, Path], Written]] = Registry("format")
FORMATS.register("peft", write_peft)
FORMATS.register("serve", write_serve)
FORMATS.register("merged", write_merged)
FORMATS.register("axolotl", write_axolotl)
FORMATS.register("trl", write_trl)


def export_adapter(
    adapter: Path | str,
    output: Path | str,
    format: str,
    *,
    base: nn.Module | Path | str | None = None,
    dtype: str | None = None,
    labels: tuple[str, ...] = (),
) -> dict[str, Any]:
    """Write a saved adapter in the form another tool reads.

    Args:
        adapter: Folder with `adapter_config.json` and `adapter_model.safetensors`.
        output: Folder to make; an earlier export there is replaced.
        format: `peft`, `serve`, `merged`, `axolotl` or `trl`.
        base: The base model, or its folder or hub id, if not the one the adapter names.
        dtype: `float32`, `bfloat16` or `float16`, for `serve` (default bfloat16) and `merged`
            (default: that of the base model).
        labels: Names of the classes, for the merged model's config.
    Returns:
        `format`, `path`, `files`, `n_modules`, `bytes` and `notes`; `base_digest` if the adapter
        was made on a pruned base.
    Raises:
        UnknownNameError: if the format is unknown.
        ConfigError: if the format cannot hold this adapter, or the output is in use.
        CheckpointError: if the adapter is damaged or does not fit the base model.
    """
    writer = FORMATS.get(format)
    adapter, output = Path(adapter), Path(output)
    if dtype is not None and (dtype not in DTYPES or format not in ("serve", "merged")):
        raise ConfigError(
            f"dtype {dtype!r} is not allowed with the format {format}; use one of "
            f"{', '.join(DTYPES)} with serve or merged, and none otherwise."
        )
    _check_output(output, adapter)
    saved = read_adapter(adapter)
    if isinstance(base, Path | str):
        known = Base(str(base), labels=labels)
    else:
        known = Base(saved.base_name, saved.revision, base, labels)
    request = Request(saved, known, make_skeleton(saved, known), output, dtype)
    fit = check_fit(saved, request.skeleton)
    report: dict[str, Any] = {}

    def fill(folder: Path) -> None:
        written = writer(request, folder)
        report.update(_report(request, folder, format, [fit, *written.notes]))
        report.update(written.extra)
        if saved.base_digest is not None:
            report["base_digest"] = saved.base_digest
        write_json(folder / REPORT_FILE, report)

    write_folder(output, fill)
    return report


def export_run(
    run: Path | str,
    format: str,
    output: Path | str | None = None,
    *,
    base: nn.Module | Path | str | None = None,
    dtype: str | None = None,
) -> dict[str, Any]:
    """Write the adapter of a finished run to `RUN/exports/<format>`; see `export_adapter`.

    Raises:
        StateError: if the run has no adapter yet.
    """
    FORMATS.get(format)
    folder = RunFolder(run)
    if not folder.adapter_dir.is_dir():
        raise StateError(
            f"{folder.path} has no adapter in best/adapter, so the run is not finished; go on with "
            "it by running the same command again."
        )
    if base is None and folder.base_dir.is_dir():
        base = str(folder.base_dir)
    if base is None and read_adapter(folder.adapter_dir).base_name is None:
        model = folder.read_config().get("model") if folder.is_run else None
        base = model if isinstance(model, str) else None
    target = Path(output) if output is not None else folder.exports_dir / format
    return export_adapter(
        folder.adapter_dir, target, format, base=base, dtype=dtype, labels=_labels(folder)
    )


def _report(request: Request, folder: Path, format: str, notes: list[str]) -> dict[str, Any]:
    files = sorted(f for f in folder.rglob("*") if f.is_file())
    return {
        "format": format,
        "path": str(request.output),
        "files": [f.relative_to(folder).as_posix() for f in files],
        "n_modules": len(request.adapter.placement),
        "bytes": sum(f.stat().st_size for f in files),
        "notes": notes,
    }


def _labels(folder: RunFolder) -> tuple[str, ...]:
    if not folder.result_file.is_file():
        return ()
    result = read_json(folder.result_file)
    task = result.get("task") if isinstance(result, dict) else None
    labels = task.get("labels") if isinstance(task, dict) else None
    return tuple(str(label) for label in labels) if isinstance(labels, list) else ()


def _check_output(output: Path, adapter: Path) -> None:
    """Refuse folders that hold anything but an earlier export: it would be replaced."""
    here, source = output.resolve(), adapter.resolve()
    if here == source or here in source.parents or source in here.parents:
        raise ConfigError(
            f"the output {output} overlaps the adapter {adapter}; choose another folder."
        )
    if output.exists() and not output.is_dir():
        raise ConfigError(f"the output {output} is a file; give the name of a folder.")
    if output.is_dir() and any(output.iterdir()) and not (output / REPORT_FILE).is_file():
        raise ConfigError(
            f"the output {output} is not empty and holds no earlier export; choose a new folder. "
            "Nothing was changed."
        )
