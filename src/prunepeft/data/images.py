"""Image values: a path or the bytes of an image file, checked, hashed and decoded."""

import hashlib
import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from prunepeft.data.table import Table
from prunepeft.errors import DataError, MissingExtraError

if TYPE_CHECKING:
    from PIL.Image import Image

ImageValue = str | bytes  # path of an image file, or its content
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".pgm", ".ppm")
_FORMATS = ("PNG", "JPEG", "BMP", "GIF", "WEBP", "TIFF", "PPM")
_DEEP = ("I", "F")  # Pillow's modes of more than 8 bits a channel start so


def read_images(table: Table, column: str) -> list[ImageValue]:
    """Values of an image column, all paths or all bytes; every header has been read.

    A relative path counts from the folder of the file it stands in. {"bytes", "path"}, the form of
    the `datasets` library, is one of the two.

    Raises:
        DataError: with the place of the first value that is no image.
        MissingExtraError: if Pillow is not installed.
    """
    values = []
    for index, row in enumerate(table.rows):
        where = f"{table.where(index)}, column {column!r}"
        value = _find_value(row[column], Path(table.places[index][0]).parent, where)
        with open_image(value, where) as image:
            _check_mode(image, where)
        values.append(value)
    if len({type(value) for value in values}) > 1:
        values = [read_bytes(value) for value in values]
    return values


def _find_value(value: Any, folder: Path, where: str) -> ImageValue:
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes) and value:
        return value
    if not isinstance(value, str) or not value.strip() or "\0" in value:
        what = "no value" if value is None else f"{value!r:.60}"
        raise DataError(
            f"{where}: the path or the bytes of an image file are needed, received {what}. Fix the "
            "row or name another column."
        )
    path = (folder / Path(value).expanduser()).absolute()
    if not path.is_file():
        raise DataError(f"{where}: there is no image file {path}. Correct the path.")
    return str(path)


def read_bytes(value: ImageValue) -> bytes:
    """The content of the image file."""
    return Path(value).read_bytes() if isinstance(value, str) else value


def hash_image(value: ImageValue) -> str:
    """SHA-256 of the content of the image file."""
    return hashlib.sha256(read_bytes(value)).hexdigest()


def open_image(value: ImageValue, where: str) -> "Image":
    """Open an image file and read its header; `where` names it in messages."""
    Image, errors = _pillow()
    try:
        return Image.open(
            value if isinstance(value, str) else io.BytesIO(value), formats=list(_FORMATS)
        )
    except errors as error:
        raise _unreadable(value, where, error) from error


def decode_image(value: ImageValue, channels: int, where: str) -> np.ndarray:
    """Decode an image file, turned as its EXIF data says.

    Args:
        value: Path or bytes.
        channels: 1 converts colours to grey (0.299 R + 0.587 G + 0.114 B), 3 repeats grey;
            transparency is dropped.
        where: Names the image in messages.

    Returns:
        uint8, (H, W, channels).
    """
    from PIL import ImageOps

    with open_image(value, where) as image:
        _check_mode(image, where)
        try:
            turned = ImageOps.exif_transpose(image).convert("L" if channels == 1 else "RGB")
        except _pillow()[1] as error:
            raise _unreadable(value, where, error) from error
    return np.asarray(turned).reshape(turned.height, turned.width, channels)


def _pillow() -> tuple[Any, tuple[type[Exception], ...]]:
    """Pillow, and what it raises for files that it cannot read."""
    try:
        from PIL import Image
    except ImportError as error:
        raise MissingExtraError(
            "images need Pillow, which is not installed. Install it: pip install "
            "'prunepeft[vision]'."
        ) from error
    return Image, (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError)


def _check_mode(image: "Image", where: str) -> None:
    if image.mode.startswith(_DEEP):
        raise DataError(
            f"{where}: the image has more than 8 bits a channel (mode {image.mode}); save it "
            "with 8."
        )


def _unreadable(value: ImageValue, where: str, error: Exception) -> DataError:
    file = f" {value}" if isinstance(value, str) else ""
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    return DataError(
        f"{where}: the image{file} cannot be read ({reason}); allowed are whole files of "
        f"{', '.join(_FORMATS)}. Save it again or remove the row."
    )
