"""Image classification: pixel values by hand, batches, models that fit and models that do not."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoImageProcessor, DeiTConfig, DeiTForImageClassificationWithTeacher

from prunepeft.data import load_data
from prunepeft.errors import ConfigError, DataError
from prunepeft.tasks import TASKS
from tests.image_files import PROCESSOR, bars, save_npz, save_png, save_vision_model
from tests.tiny_models import IMAGE, TINY
from tests.tiny_tokenizer import save_tiny_model

CLS = TASKS.get("image-cls")
AS_THEY_ARE = {"do_resize": False}


@pytest.fixture
def splits(tmp_path):
    return load_data(save_npz(tmp_path / "d", train=bars(6), validation=bars(4)))


def reader(folder, processor=None, **config):
    return CLS.load_processor(save_vision_model(folder, "vit", processor, **config))


# --- pixel values ---------------------------------------------------------------------------


def test_values_by_hand(tmp_path):
    image = np.array([[[0], [255]], [[51], [102]]], dtype=np.uint8)
    grey = {"image_mean": [0.5], "image_std": [0.25]}
    ours = reader(tmp_path, AS_THEY_ARE | grey, num_channels=1)
    values = ours.values(torch.from_numpy(ours.shape(image).copy())[None])
    expected = torch.tensor([[[[-2.0, 2.0], [-1.2, -0.4]]]])
    torch.testing.assert_close(values, expected)
    plain = reader(tmp_path, AS_THEY_ARE | {"do_rescale": False, "do_normalize": False})
    assert plain.values(torch.full((1, 3, 1, 1), 7, dtype=torch.uint8)).unique().tolist() == [7.0]


def test_resizing_and_cropping_by_hand(tmp_path):
    """Bilinear from 2 to 4 pixels mixes neighbours 3 to 1; the crop takes the middle."""
    row = np.array([[[0], [100]]] * 2, dtype=np.uint8)
    one = {"image_mean": [0.5], "image_std": [0.5], "resample": 2}
    wide = reader(tmp_path, one | {"size": {"height": 4, "width": 4}}, num_channels=1)
    assert wide.shape(row).tolist() == [[[0, 25, 75, 100]] * 4]
    middle = {"do_center_crop": True, "crop_size": {"height": 2, "width": 2}}
    cropped = reader(tmp_path, one | middle | {"size": {"height": 4, "width": 4}}, num_channels=1)
    assert cropped.shape(row).tolist() == [[[25, 75]] * 2]


@pytest.mark.parametrize(
    "processor",
    [
        {},
        {"image_processor_type": "DeiTImageProcessor", "size": 12, "crop_size": 8},
        {"feature_extractor_type": "ViTFeatureExtractor", "image_processor_type": None, "size": 8},
        {"image_processor_type": "ConvNextImageProcessor", "size": {"shortest_edge": 8}},
        {"image_processor_type": "BitImageProcessor", "size": {"shortest_edge": 9}}
        | {"do_center_crop": True, "crop_size": 8},
    ],
    ids=["vit", "deit", "old", "convnext", "dinov2"],
)
def test_both_halves_are_the_image_processor_of_transformers(tmp_path, processor):
    ours = reader(tmp_path, {k: v for k, v in processor.items() if v is not None})
    if processor.get("image_processor_type", "") is None:
        data = {k: v for k, v in (PROCESSOR | processor).items() if v is not None}
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(data))
        ours = CLS.load_processor(str(tmp_path))
    image = np.random.default_rng(1).integers(0, 256, (13, 17, 3), dtype=np.uint8)
    theirs = AutoImageProcessor.from_pretrained(tmp_path, backend="pil")(
        images=image, return_tensors="pt"
    )["pixel_values"]
    mine = ours.values(torch.from_numpy(ours.shape(image).copy())[None])
    assert mine.shape == (1, 3, IMAGE, IMAGE)
    torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-5)


# --- rows and batches -----------------------------------------------------------------------


def test_rows_and_batches(tmp_path, splits):
    ours = reader(tmp_path)
    rows = CLS.encode(splits.train, splits, ours)
    assert rows.column_names == ["pixels", "height", "labels", "length"]
    assert set(rows["length"]) == {1}
    batch = CLS.collator(ours)(rows.to_list())
    assert {name: (t.shape, t.dtype) for name, t in batch.items()} == {
        "pixel_values": ((6, 3, IMAGE, IMAGE), torch.float32),
        "labels": ((6,), torch.int64),
    }
    image = torch.from_numpy(bars(6)["images"][2]).float()
    expected = ((image / 255 - 0.5) / 0.25).expand(3, -1, -1)  # grey is repeated
    torch.testing.assert_close(batch["pixel_values"][2], expected)
    assert batch["labels"].tolist() == [0, 1] * 3


def test_wrong_rows(tmp_path, splits):
    ours = reader(tmp_path / "m", AS_THEY_ARE)
    with pytest.raises(ConfigError, match=r"train.max_length is 64, but images have no length"):
        CLS.encode(splits.train, splits, ours, 64)
    for number, size in enumerate((8, 8, 9, 8) * 2):
        save_png(tmp_path / "p" / "ab"[number % 2] / f"{number}.png", np.zeros((size, 8), np.uint8))
    mixed = load_data(str(tmp_path / "p"))
    with pytest.raises(DataError, match=r"is (8|9) x 8 pixels and 3 channels, the first [89] x 8"):
        CLS.encode(mixed.train, mixed, ours)
    broken = Path(mixed.train["image"][0])
    broken.write_bytes(broken.read_bytes()[:45])
    with pytest.raises(DataError, match=f"image 1 of 6: the image {broken} cannot be read"):
        CLS.encode(mixed.train, mixed, ours)


# --- models ---------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["vit", "deit"])
def test_a_classifier_for_the_classes_of_the_data(tmp_path, splits, family):
    path = save_vision_model(tmp_path / "m", family)  # of three classes
    model, empty = CLS.load_model(path, splits, seed=3), CLS.make_empty_model(path, splits)
    assert CLS.head_modules(model) == ["classifier"]
    assert model.config.id2label == {0: "0", 1: "1"}
    shapes = [{n: p.shape for n, p in m.named_parameters()} for m in (model, empty)]
    assert shapes[0] == shapes[1]
    assert CLS.count_tokens(model.config, None) == 5
    ours = CLS.load_processor(path)
    out = model(**CLS.collator(ours)(CLS.encode(splits.train, splits, ours).to_list()))
    assert out.logits.shape == (6, 2)
    assert torch.isfinite(out.loss)


def test_a_distilled_model_becomes_one_that_can_be_trained(tmp_path, splits):
    path = save_vision_model(tmp_path, "deit")
    config = DeiTConfig(**TINY["deit"]().config.to_dict())
    DeiTForImageClassificationWithTeacher(config).save_pretrained(path)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == [
        "DeiTForImageClassificationWithTeacher"
    ]
    assert type(CLS.load_model(path, splits)).__name__ == "DeiTForImageClassification"
    assert type(CLS.make_empty_model(path, splits)).__name__ == "DeiTForImageClassification"


WRONG_MODELS = {
    "size": ({"processor": AS_THEY_ARE | {"size": None}, "image_size": 12}, "8 x 8 pixels"),
    "channels": ({"num_channels": 4}, "reads 4 channels; images have 1 or 3"),
    "mean": ({"num_channels": 1}, "normalises 3 channels, but the model reads 1"),
    "twice": (
        {"processor": {"image_processor_type": "EfficientNetImageProcessor"}},
        r"\(EfficientNetImageProcessor\w*\) does more than resize",
    ),
}


@pytest.mark.parametrize(("options", "message"), WRONG_MODELS.values(), ids=WRONG_MODELS)
def test_models_that_do_not_fit(tmp_path, splits, options, message):
    path = save_vision_model(tmp_path / "m", **options)
    with pytest.raises(ConfigError, match=message):
        CLS.make_empty_model(path, splits)


def test_models_that_are_none(tmp_path, splits):
    bert = str(save_tiny_model(tmp_path / "bert", "bert"))
    with pytest.raises(ConfigError, match="type 'bert', which has no image classifier"):
        CLS.make_empty_model(bert, splits)
    path = save_vision_model(tmp_path / "m")
    (tmp_path / "m" / "preprocessor_config.json").unlink()
    with pytest.raises(ConfigError, match=r"the image processor of model .* could not be loaded"):
        CLS.make_empty_model(path, splits)
