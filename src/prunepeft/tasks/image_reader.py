"""From images to pixel values, by the rules of a model's image processor."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.image_processing_utils import BaseImageProcessor

from prunepeft.errors import ConfigError
from prunepeft.tasks.loading import load_config, load_image_processor

CHANNELS = (1, 3)
PROBE = (48, 64)  # height and width of the image a processor is tried with
SAME = 1e-3  # of a standard deviation; one step of 255 is some ten times as much


@dataclass(frozen=True)
class ImageReader:
    """The two halves of an image processor: shape once, in uint8, and numbers per batch, in torch.

    Rows so take a quarter of the memory of float32 and are resized only once.

    Args:
        processor: Resizes and crops.
        channels: Of the model, 1 or 3.
        factor: What pixels are multiplied with, usually 1 / 255.
        mean: Subtracted after that, one per channel or one for all.
        std: Divided by at last, as `mean`.
    """

    processor: BaseImageProcessor
    channels: int
    factor: float
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def shape(self, image: np.ndarray) -> np.ndarray:
        """Resize and crop one image, uint8 (H, W, C) -> uint8 (C, H', W')."""
        return np.asarray(self._process(image, do_rescale=False, do_normalize=False))

    def values(self, pixels: Tensor) -> Tensor:
        """(pixels * factor - mean) / std, uint8 (B, C, H, W) -> float32 (B, C, H, W)."""
        mean, std = (torch.tensor(v).view(1, -1, 1, 1) for v in (self.mean, self.std))
        return (pixels.float() * self.factor - mean) / std

    def is_faithful(self) -> bool:
        """Whether the two halves together are the whole processor, tried on one random image."""
        size = (*PROBE, self.channels)
        image = np.random.default_rng(0).integers(0, 256, size, dtype=np.uint8)
        whole, shaped = np.asarray(self._process(image)), self.shape(image)
        if shaped.dtype != np.uint8 or whole.shape != shaped.shape:
            return False
        ours = self.values(torch.from_numpy(shaped.copy())[None])[0].numpy()
        return bool(np.allclose(ours, whole, rtol=0, atol=SAME))

    def _process(self, image: np.ndarray, **options: Any) -> Any:
        batch = self.processor(
            images=[image], do_convert_rgb=False, input_data_format="channels_last", **options
        )
        return batch["pixel_values"][0]


def load_image_reader(path: str, *, trust_remote_code: bool = False) -> ImageReader:
    """Read the image processor of a model folder.

    Raises:
        ConfigError: if there is none, it does not fit the model, or it does more than resize, crop,
            rescale and normalise.
    """
    config = load_config(path, trust_remote_code=trust_remote_code)
    channels = getattr(vision_config(config), "num_channels", 3)
    if channels not in CHANNELS:
        raise ConfigError(f"model {path!r} reads {channels} channels; images have 1 or 3.")
    processor = load_image_processor(path, trust_remote_code=trust_remote_code)
    normalises = bool(processor.do_normalize)
    reader = ImageReader(
        processor,
        channels,
        factor=float(processor.rescale_factor) if processor.do_rescale else 1.0,
        mean=_per_channel(processor.image_mean) if normalises else (0.0,),
        std=_per_channel(processor.image_std) if normalises else (1.0,),
    )
    if any(len(v) not in (1, channels) for v in (reader.mean, reader.std)):
        raise ConfigError(
            f"the image processor of model {path!r} normalises {len(reader.mean)} channels, but "
            f"the model reads {channels}; correct preprocessor_config.json."
        )
    if not reader.is_faithful():
        raise ConfigError(
            f"the image processor of model {path!r} ({type(processor).__name__}) does more than "
            "resize, crop, rescale and normalise, which is all that is known here. Choose another "
            "model."
        )
    return reader


def vision_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """The part of a config that says how images are read."""
    return getattr(config, "vision_config", None) or config


def _per_channel(value: float | Sequence[float]) -> tuple[float, ...]:
    return tuple(map(float, value)) if isinstance(value, Sequence) else (float(value),)
