"""Image classification."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from datasets import Dataset, Features, Value
from torch import Tensor
from transformers import AutoModelForImageClassification, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES

from prunepeft.data import Splits
from prunepeft.data.images import decode_image
from prunepeft.errors import ConfigError, DataError
from prunepeft.metrics import classification_metrics
from prunepeft.tasks.base import Task, has_own_class
from prunepeft.tasks.classify import class_options, find_head, first_output
from prunepeft.tasks.image_reader import ImageReader, load_image_reader, vision_config

DEFAULT_TOKENS = 197  # 14 x 14 patches and the class token
FEATURES = Features(
    {
        "pixels": Value("large_binary"),
        "height": Value("int64"),
        "labels": Value("int64"),
        "length": Value("int64"),
    }
)


@dataclass(frozen=True)
class ImageCollator:
    """Stacks images of one size and turns their pixels into the model's numbers.

    Args:
        reader: Of the model.
    """

    reader: ImageReader

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """Make a batch: pixel_values (B, C, H, W) float32, labels (B,) int64."""
        pixels = np.stack(
            [
                np.frombuffer(row["pixels"], np.uint8).reshape(
                    self.reader.channels, row["height"], -1
                )
                for row in rows
            ]
        )
        labels = torch.tensor([row["labels"] for row in rows])
        return {"pixel_values": self.reader.values(torch.from_numpy(pixels)), "labels": labels}


class ImageClassification(Task):
    """One class for an image."""

    name: ClassVar[str] = "image-cls"
    peft_task_type: ClassVar[str | None] = None
    default_metric: ClassVar[str] = "accuracy"

    def auto_class(self) -> Any:
        """The transformers Auto class of the model."""
        return AutoModelForImageClassification

    def check_config(self, config: PreTrainedConfig, path: str) -> None:
        """Raise ConfigError if transformers has no image classifier for this model type."""
        known = config.model_type in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES
        if not known and not has_own_class(config, "AutoModelForImageClassification"):
            raise ConfigError(
                f"model {path!r} is of type {config.model_type!r}, which has no image classifier; "
                "choose a vision model such as ViT, DeiT or DINOv2."
            )

    def config_options(self, splits: Splits) -> dict[str, Any]:
        """Number and names of the classes."""
        # Without a name of its own class a model takes the first of its type, which can be trained.
        return class_options(splits, self.name) | {"architectures": []}

    def make_empty_model(
        self, path: str, splits: Splits, *, trust_remote_code: bool = False
    ) -> PreTrainedModel:
        """See `Task.make_empty_model`; the first image has gone through the model.

        Raises:
            ConfigError: also if the model does not take images as its image processor makes them.
        """
        model = super().make_empty_model(path, splits, trust_remote_code=trust_remote_code)
        reader = self.load_processor(path, trust_remote_code=trust_remote_code)
        row = self.encode(splits.train.select([0]), splits, reader)[0]
        pixels = self.collator(reader)([row])["pixel_values"].to("meta")
        try:
            model(pixel_values=pixels)
        except ValueError as error:
            raise ConfigError(
                f"model {path!r} does not take images of {_size(tuple(pixels.shape[1:]))} "
                f"({' '.join(str(error).split())}). Let its image processor resize "
                "(preprocessor_config.json), or give images of the right size."
            ) from error
        return model

    def load_processor(self, path: str, *, trust_remote_code: bool = False) -> ImageReader:
        """Load what turns images into the model's pixel values; see `load_image_reader`."""
        return load_image_reader(path, trust_remote_code=trust_remote_code)

    def encode(
        self,
        dataset: Dataset,
        splits: Splits,
        processor: ImageReader,
        max_length: int | None = None,
    ) -> Dataset:
        """Decode, resize and crop images into `pixels` (bytes of uint8, (C, H, W)) and `height`.

        Raises:
            ConfigError: if a length is asked for.
            DataError: if an image is damaged, or images come out in different sizes.
        """
        _refuse_length(max_length)
        labels = list(dataset[splits.columns["label"]])
        images: list[np.ndarray] = []
        for number, value in enumerate(dataset[splits.columns["image"]], 1):
            where = f"image {number} of {len(labels)}"
            images.append(processor.shape(decode_image(value, processor.channels, where)))
            if images[-1].shape != images[0].shape:
                raise DataError(
                    f"{where} is {_size(images[-1].shape)}, the first {_size(images[0].shape)}, "
                    "and the model's image processor does not bring them to one size. Resize the "
                    "images, or set do_resize and size in preprocessor_config.json."
                )
        columns = {
            "pixels": [image.tobytes() for image in images],
            "height": [image.shape[1] for image in images],
            "labels": labels,
            "length": [1] * len(images),
        }
        return Dataset.from_dict(columns, features=FEATURES)

    def collator(self, processor: ImageReader) -> ImageCollator:
        """Make the function from rows to a batch."""
        return ImageCollator(processor)

    def count_tokens(self, config: PreTrainedConfig, max_length: int | None) -> int:
        """Patches of an image and a class token, as the config says.

        Raises:
            ConfigError: if a length is asked for.
        """
        _refuse_length(max_length)
        vision = vision_config(config)
        size, patch = (getattr(vision, name, None) for name in ("image_size", "patch_size"))
        if not isinstance(size, int) or not isinstance(patch, int) or not patch:
            return DEFAULT_TOKENS
        return (size // patch) ** 2 + 1

    def head_modules(self, model: PreTrainedModel) -> list[str]:
        """The classifier, and a pooler in front of it."""
        return find_head(model)

    def preprocess_logits(self, logits: Any, labels: Tensor) -> Tensor:
        """The logits alone, (B, C), without hidden states some models add."""
        return first_output(logits)

    def compute(self, predictions: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        """Accuracy, macro F1, Matthews correlation, and F1 for two classes."""
        return classification_metrics(np.asarray(predictions), np.asarray(labels))


def _refuse_length(max_length: int | None) -> None:
    if max_length is not None:
        raise ConfigError(
            f"train.max_length is {max_length}, but images have no length in tokens; leave it out."
        )


def _size(shape: tuple[int, ...]) -> str:
    channels, height, width = shape
    return f"{height} x {width} pixels and {channels} channel{'s' if channels > 1 else ''}"
