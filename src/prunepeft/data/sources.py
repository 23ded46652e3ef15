"""Turn what the user names into tables, one per split: a file, a glob, a folder or a hub id."""

import difflib
import glob
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from prunepeft.data.formats import FORMATS, read_file
from prunepeft.data.image_folder import read_image_folder
from prunepeft.data.splits import SPLIT_NAMES
from prunepeft.data.table import Table
from prunepeft.docstrings import make_docstrings
from prunepeft.errors import DataError

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+)?")
BUILT_IN = "docstrings"
FORMS = (
    "Allowed are a file (jsonl, json, csv, tsv, parquet, txt, npz), a glob, a folder with train "
    "and validation files, a folder with a folder of images per class, 'docstrings' (built in), or "
    "a hub id owner/name or owner/name:config."
)


def read_source(source: str, *, offline: bool = False) -> tuple[dict[str, Table], list[str]]:
    """Read every split of a source.

    Returns:
        Tables by split name ("train" always, "validation" and "test" if there), and notes.

    Raises:
        DataError: if the source is not found or cannot be read.
    """
    if not source.strip() or "\0" in source:
        raise DataError(f"the data source is {source!r}. {FORMS}")
    if source == BUILT_IN:
        return _read_docstrings()
    try:
        path = Path(source).expanduser()
        if path.is_dir():
            return _read_folder(path)
        if path.exists():
            return {"train": read_file(path)}, []
    except (OSError, RuntimeError) as error:
        raise DataError(f"{source[:200]} cannot be looked up ({error}). {FORMS}") from error
    if any(mark in source for mark in "*?["):
        return _read_glob(str(path)), []
    if HUB_ID.fullmatch(source) and path.suffix not in FORMATS and not path.parent.is_dir():
        return _read_hub(source, offline)
    raise DataError(f"{source}: no such file or folder.{_closest(path)} {FORMS}")


def _closest(path: Path) -> str:
    names = [BUILT_IN]
    if path.parent.is_dir():
        names += sorted(item.name for item in path.parent.iterdir())
    elif path.parent != Path():
        return f" The folder {path.parent} does not exist either."
    close = difflib.get_close_matches(path.name, names, n=1)
    return f" Did you mean {close[0]!r}?" if close else ""


def _split_of(path: Path) -> str | None:
    """Split that a file name stands for: its first word, so that `train-00000-of-2` counts."""
    return SPLIT_NAMES.get(re.split(r"[-_.\d]", path.stem.lower(), maxsplit=1)[0])


def _read_folder(folder: Path) -> tuple[dict[str, Table], list[str]]:
    try:
        files = sorted(item for item in folder.iterdir() if item.is_file())
    except PermissionError as error:
        raise DataError(
            f"{folder} cannot be listed: no permission. Change its rights and try again."
        ) from error
    named = [(file, _split_of(file)) for file in files if file.suffix.lower() in FORMATS]
    splits = _group([(file, split) for file, split in named if split])
    if not splits and (images := read_image_folder(folder)):
        return images
    if "train" not in splits:
        found = ", ".join(file.name for file in files[:8]) or "no files"
        raise DataError(
            f"{folder} is a folder without a train split (found: {found}). Name the files "
            f"train, validation and test with one of the endings {', '.join(FORMATS)}, or "
            f"give one file; images go into one folder per class."
        )
    tables = {
        split: _join([read_file(file) for file in members]) for split, members in splits.items()
    }
    return tables, []


def _read_glob(pattern: str) -> dict[str, Table]:
    files = [
        Path(name) for name in sorted(glob.glob(pattern, recursive=True)) if Path(name).is_file()
    ]
    if not files:
        raise DataError(
            f"no file matches {pattern!r}; check the pattern (quote it on the command line)."
        )
    named = [(file, _split_of(file)) for file in files]
    known = [file for file, split in named if split]
    if not known:
        return {"train": _join([read_file(file) for file in files])}
    if len(known) < len(files):
        odd = next(file for file, split in named if not split)
        raise DataError(
            f"{pattern!r} matches files of named splits ({known[0].name}) and others ({odd.name}); "
            "narrow the pattern to one sort."
        )
    splits = _group([(file, split) for file, split in named if split])
    if "train" not in splits:
        raise DataError(
            f"{pattern!r} matches no train file, only {', '.join(sorted(splits))}; widen the "
            f"pattern."
        )
    return {
        split: _join([read_file(file) for file in members]) for split, members in splits.items()
    }


def _group(named: list[tuple[Path, str]]) -> dict[str, list[Path]]:
    groups: dict[str, list[Path]] = {}
    for split in ("train", "validation", "test"):
        members = [file for file, name in named if name == split]
        if members:
            groups[split] = members
    for split, members in groups.items():
        endings = {file.suffix.lower() for file in members}
        words = {re.split(r"[-_.\d]", file.stem.lower(), maxsplit=1)[0] for file in members}
        if len(endings) > 1 or len(words) > 1:
            names = ", ".join(file.name for file in members[:4])
            raise DataError(
                f"several files could be the {split} split ({names}); keep one sort, or name "
                f"one file."
            )
    return groups


def _join(tables: list[Table]) -> Table:
    first = tables[0]
    for table in tables[1:]:
        if set(table.columns) != set(first.columns):
            raise DataError(
                f"{table.places[0][0]} has columns {', '.join(table.columns)}, but "
                f"{first.places[0][0]} has "
                f"{', '.join(first.columns)}; files of one split must have the same columns."
            )
    rows = [row for table in tables for row in table.rows]
    places = [place for table in tables for place in table.places]
    return replace(first, rows=rows, places=places)


def _read_docstrings() -> tuple[dict[str, Table], list[str]]:
    data = make_docstrings()
    tables = {}
    for split in ("train", "validation"):
        rows = data[split]
        tables[split] = Table(
            rows, [(f"{BUILT_IN} {split}", "row", i) for i in range(1, len(rows) + 1)]
        )
    return tables, []


@contextmanager
def _hub_offline(offline: bool) -> Iterator[None]:
    """Switch the hub libraries offline: they read the environment only once, at import."""
    import datasets
    import huggingface_hub.constants as hub

    before = datasets.config.HF_HUB_OFFLINE, hub.HF_HUB_OFFLINE
    if offline:
        datasets.config.HF_HUB_OFFLINE = hub.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE, hub.HF_HUB_OFFLINE = before


def _read_hub(source: str, offline: bool) -> tuple[dict[str, Table], list[str]]:
    import datasets

    name, _, config = source.partition(":")
    try:
        with _hub_offline(offline):
            loaded = datasets.load_dataset(name, config or None)
            is_off = datasets.config.HF_HUB_OFFLINE
    except (
        OSError,
        ValueError,
        RuntimeError,
        LookupError,
        ImportError,
        datasets.exceptions.DatasetsError,
    ) as error:
        reason = " ".join(str(error).split())[:300]
        raise DataError(
            f"the hub data set {source!r} could not be loaded ({reason}). Check the name "
            f"and, as owner/name:config, "
            "the configuration; without a network (or with HF_HUB_OFFLINE=1) only data sets "
            "in the local "
            "cache work: load it once online, or pass a local file or folder."
        ) from error
    if not isinstance(loaded, datasets.DatasetDict) or "train" not in loaded:
        raise DataError(
            f"the hub data set {source!r} has no train split (found: {', '.join(loaded)})."
        )
    notes = [f"{source} came from the local cache"] if is_off else []
    tables: dict[str, Table] = {}
    for split, dataset in loaded.items():
        role = SPLIT_NAMES.get(str(split).lower())
        if role and role not in tables and len(dataset):
            tables[role] = _hub_table(dataset, f"{source} {split}")
        else:
            notes.append(f"split {split!r} of {source} is not used")
    return tables, notes


def _hub_table(dataset: object, place: str) -> Table:
    import datasets

    assert isinstance(dataset, datasets.Dataset)
    names = None
    for column in ("label", "labels"):
        feature = dataset.features.get(column)
        if isinstance(feature, datasets.ClassLabel):
            names = tuple(feature.names)
    for column, feature in dataset.features.items():
        if isinstance(feature, datasets.Image):
            dataset = dataset.cast_column(column, datasets.Image(decode=False))
    rows = dataset.to_list()
    return Table(
        rows, [(place, "row", number) for number in range(1, len(rows) + 1)], label_names=names
    )
