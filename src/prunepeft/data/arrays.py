"""Images and labels from the arrays of an .npz file."""

import io
import zipfile
import zlib
from typing import Any

import numpy as np

from prunepeft.data.table import Table
from prunepeft.errors import DataError

ARRAYS = ("images", "labels")
NETPBM = {1: b"P5", 3: b"P6"}  # channels -> magic number of a binary PGM or PPM file
_READ_ERRORS = (
    ValueError,
    OSError,
    EOFError,
    LookupError,
    RuntimeError,
    SyntaxError,
    zipfile.BadZipFile,
    zlib.error,
)


def parse_npz(data: bytes, place: str) -> Table:
    """Rows with `image` (a PGM or PPM file as bytes) and `label` from two arrays.

    Args:
        data: The file. `images` is uint8, (N, H, W), (N, H, W, 1) or (N, H, W, 3); `labels` whole
            numbers, (N,).
        place: Names the file in messages.

    Raises:
        DataError: if an array is missing, or of another type or shape.
    """
    images, labels = _read_arrays(data, place)
    _check_images(images, place)
    _check_labels(labels, len(images), place)
    rows = [
        {"image": to_netpbm(image), "label": label}
        for image, label in zip(images, labels.tolist(), strict=True)
    ]
    return Table(rows, [(place, "row", number) for number in range(1, len(rows) + 1)])


def to_netpbm(image: np.ndarray) -> bytes:
    """An image as the bytes of a PGM or PPM file, which any reader of images knows.

    Args:
        image: uint8, (H, W), (H, W, 1) or (H, W, 3).

    Example:
        >>> to_netpbm(np.array([[65, 66, 67]], dtype=np.uint8))
        b'P5 3 1 255\\nABC'
    """
    channels = image.shape[2] if image.ndim == 3 else 1
    return b"%s %d %d 255\n" % (NETPBM[channels], *image.shape[1::-1]) + image.tobytes()


def _read_arrays(data: bytes, place: str) -> list[np.ndarray]:
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as file:
            missing = [name for name in ARRAYS if name not in file.files]
            if not missing:
                return [file[name] for name in ARRAYS]
            found = ", ".join(file.files) or "none"
    except (*_READ_ERRORS, AttributeError, TypeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(
            f"{place}: not a readable .npz file of plain arrays ({reason}). Write it again with "
            "numpy.savez(file, images=..., labels=...)."
        ) from error
    raise DataError(
        f"{place}: there is no array {missing[0]!r} (arrays: {found}); images (uint8) and labels "
        "(whole numbers) are needed. Save them under these names."
    )


def _check_images(images: np.ndarray, place: str) -> None:
    if images.dtype != np.uint8:
        raise DataError(
            f"{place}: images are {images.dtype}; allowed is uint8, from 0 to 255. Scale and "
            "convert them."
        )
    channels: Any = images.shape[3] if images.ndim == 4 else 1
    if images.ndim not in (3, 4) or channels not in NETPBM or 0 in images.shape[1:]:
        raise DataError(
            f"{place}: images have the shape {images.shape}; allowed are (N, H, W) and "
            "(N, H, W, C) with 1 or 3 channels, last. Transpose or convert them."
        )


def _check_labels(labels: np.ndarray, n_images: int, place: str) -> None:
    if not np.issubdtype(labels.dtype, np.integer):
        raise DataError(
            f"{place}: labels are {labels.dtype}; allowed are whole numbers from 0. Number the "
            "classes."
        )
    if labels.shape != (n_images,):
        raise DataError(
            f"{place}: labels have the shape {labels.shape}, but there are {n_images} images; "
            f"one label per image is needed, shape ({n_images},)."
        )
