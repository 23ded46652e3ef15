"""Small images on disk and tiny vision models to read them."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from tests.tiny_models import IMAGE, make_tiny

PROCESSOR = {
    "image_processor_type": "ViTImageProcessor",
    "do_resize": True,
    "size": {"height": IMAGE, "width": IMAGE},
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.25, 0.25, 0.25],
}


def bars(n: int = 20, size: int = IMAGE, channels: int = 0) -> dict[str, np.ndarray]:
    """Noise with a bright bar: upright in class 0, lying in class 1.

    Args:
        n: Images.
        size: Height and width.
        channels: 0 for images of shape (N, H, W).
    """
    shape = (n, size, size, channels) if channels else (n, size, size)
    images = np.random.default_rng(0).integers(0, 60, shape, dtype=np.uint8)
    labels = np.arange(n) % 2
    images[labels == 0, :, size // 2] += 190
    images[labels == 1, size // 2] += 190
    return {"images": images, "labels": labels}


def save_npz(folder: Path, **parts: dict[str, Any]) -> str:
    """Write one `<split>.npz` per keyword; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, arrays in parts.items():
        np.savez(folder / f"{split}.npz", **arrays)
    return str(folder)


def save_png(path: Path, image: np.ndarray) -> str:
    """Write one image file, (H, W) or (H, W, 3)."""
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path)
    return str(path)


def save_classes(folder: Path, n: int = 20, names: tuple[str, str] = ("upright", "lying")) -> str:
    """Write `folder/<class>/<number>.png`."""
    arrays = bars(n)
    for number, (image, label) in enumerate(zip(arrays["images"], arrays["labels"], strict=True)):
        save_png(folder / names[label] / f"{number}.png", image)
    return str(folder)


def save_vision_model(
    folder: Path, family: str = "vit", processor: dict[str, Any] | None = None, **overrides: Any
) -> str:
    """Write a random two-layer model and its image processor; returns the folder.

    Args:
        folder: Made if it does not exist.
        family: A key of `tests.tiny_models.TINY`.
        processor: Fields of `preprocessor_config.json` beside `PROCESSOR`.
        overrides: Fields of the model's config.
    """
    make_tiny(family, **overrides).save_pretrained(folder)
    text = json.dumps(PROCESSOR | (processor or {}))
    (folder / "preprocessor_config.json").write_text(text)
    return str(folder)
