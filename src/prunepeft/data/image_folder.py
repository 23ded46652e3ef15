"""Images in one folder per class, as the `datasets` library's imagefolder lays them out."""

from pathlib import Path

from prunepeft.data.images import SUFFIXES
from prunepeft.data.splits import SPLIT_NAMES
from prunepeft.data.table import Table
from prunepeft.errors import DataError

Classes = dict[str, list[Path]]  # class name -> its image files


def read_image_folder(folder: Path) -> tuple[dict[str, Table], list[str]] | None:
    """Read `folder/class/image` or `folder/split/class/image`; None if it is neither.

    Returns:
        Tables by split with `image` (path) and `label` (name of the class folder), and notes.

    Raises:
        DataError: if two folders are one split, there is none to train on, or one cannot be listed.
    """
    found: dict[str, Classes] = {}
    for child in _folders(folder):
        split = SPLIT_NAMES.get(child.name.lower())
        classes = _find_classes(child) if split else {}
        if split in found and classes:
            raise DataError(
                f"several folders of {folder} could be the {split} split; keep one of them."
            )
        if split and classes:
            found[split] = classes
    if not found:
        found = {"train": classes} if (classes := _find_classes(folder)) else {}
    if found and "train" not in found:
        raise DataError(
            f"{folder} has images for {', '.join(found)} but none to train on; put them into "
            "train/<class>/."
        )
    tables = {split: _make_table(folder, classes) for split, classes in found.items()}
    return (tables, _note_others(found)) if tables else None


def _folders(folder: Path) -> list[Path]:
    return [item for item in _items(folder) if item.is_dir() and not item.name.startswith(".")]


def _items(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError as error:
        raise DataError(
            f"{folder} cannot be listed ({error.strerror}); change its rights and try again."
        ) from error


def _find_classes(folder: Path) -> Classes:
    classes = {
        child.name: [item for item in _items(child) if item.suffix.lower() in SUFFIXES]
        for child in _folders(folder)
    }
    return {name: files for name, files in classes.items() if files}


def _make_table(folder: Path, classes: Classes) -> Table:
    rows = [
        {"image": str(file.absolute()), "label": name}
        for name, files in classes.items()
        for file in files
    ]
    return Table(rows, [(str(folder), "image", number) for number in range(1, len(rows) + 1)])


def _note_others(found: dict[str, Classes]) -> list[str]:
    """Files in the class folders that are left out."""
    used = [files for classes in found.values() for files in classes.values()]
    others = sum(
        item.is_file() and not item.name.startswith(".")
        for files in used
        for item in _items(files[0].parent)
    ) - sum(map(len, used))
    return [f"{others} files of the class folders are no images and are left out"] if others else []
