"""A vision model from folder and images to adapter, report and exports."""

import re
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch.testing import assert_close
from transformers import AutoModelForImageClassification, DeiTForImageClassificationWithTeacher

import prunepeft
from prunepeft import run
from prunepeft.config import load_config
from prunepeft.errors import ConfigError
from prunepeft.result import Result
from tests.image_files import bars, save_classes, save_npz, save_vision_model
from tests.tiny_models import IMAGE, TINY

QUICK = {
    "device": "cpu",
    "train": {"epochs": 2, "lr": 5e-3, "batch_size": 8},
    "search": {"rounds": 1, "warmup": False},
}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Result:
    """LoRA on a ViT of three classes, for class folders of two."""
    place = tmp_path_factory.mktemp("images")
    data = save_classes(place / "d", 60)
    model = save_vision_model(place / "m")
    return prunepeft.search(
        model,
        data,
        budget="400",
        kinds=["lora"],
        baseline="lora",
        output=str(place / "run"),
        **QUICK,
    )


def logits(model: torch.nn.Module) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(4, 3, IMAGE, IMAGE, generator=generator)
    with torch.no_grad():
        return model.eval()(pixel_values=images).logits


def card_code(result: Result) -> str:
    card = (result.path / "README.md").read_text()
    assert "pipeline_tag: image-classification" in card
    code = re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]
    return code.replace('"best/adapter"', repr(str(result.adapter)))


def test_search_learns_the_images(found: Result) -> None:
    assert found.report["task"]["labels"] == ["lying", "upright"]
    assert found.metric == found.report["metric"]["reloaded"] == 1.0
    assert found.report["placement"]["n_params"] <= 400
    assert len(found.report["baselines"]) == 1
    assert (found.path / "report" / "report.html").is_file()


def test_the_adapter_is_measured_again(found: Result, tmp_path: Path) -> None:
    assert run.evaluate(found.path)["metrics"]["accuracy"] == 1.0
    names = ("upright", "lying")
    turned = run.evaluate(found.path, save_classes(tmp_path / "t", 10, names[::-1]))
    assert turned["metrics"]["accuracy"] == 0.0


def test_check_says_what_would_run(found: Result) -> None:
    plan = run.check(load_config(found.path / "config.yaml"))
    assert plan["task"] == {"name": "image-cls", "metric": "accuracy"}
    assert plan["head"] == {"classifier": 2 * 16 + 2}


def test_the_card_and_every_export_give_the_same_model(found: Result) -> None:
    names: dict = {}
    exec(card_code(found), names)
    expected = logits(names["model"])
    assert names["processor"].size.height == IMAGE
    base = AutoModelForImageClassification.from_pretrained(
        found.report["model"]["name"], num_labels=2, ignore_mismatched_sizes=True
    )
    merged = AutoModelForImageClassification.from_pretrained(found.export("merged"))
    assert merged.config.id2label == {0: "lying", 1: "upright"}
    assert_close(logits(merged), expected, rtol=0, atol=1e-5)
    assert (found.path / "exports" / "merged" / "preprocessor_config.json").is_file()
    plain = PeftModel.from_pretrained(base, found.export("peft"))
    assert_close(logits(plain), expected, rtol=0, atol=1e-5)
    for form in ("axolotl", "trl"):
        with pytest.raises(ConfigError, match=f"{form} trains language models"):
            found.export(form)


def test_a_distilled_deit_on_arrays_with_adapters(tmp_path: Path) -> None:
    model = save_vision_model(tmp_path / "m", "deit")
    DeiTForImageClassificationWithTeacher(TINY["deit"]().config).save_pretrained(model)
    data = save_npz(tmp_path / "d", train=bars(24, 12), validation=bars(8, 12))
    kinds = ["lora", "serial_adapter", "ia3"]
    result = prunepeft.search(
        model, data, budget="6 modules", kinds=kinds, output=str(tmp_path / "run"), **QUICK
    )
    assert len(result.placement) <= 6
    names: dict = {}
    exec(card_code(result), names)
    assert type(names["base"]).__name__ == "DeiTForImageClassification"
    union = PeftModel.from_pretrained(
        names["base"].from_pretrained(model, num_labels=2), result.export()
    )
    assert_close(logits(union), logits(names["model"]), rtol=0, atol=1e-6)


def test_a_length_is_refused(tmp_path: Path) -> None:
    model, data = save_vision_model(tmp_path / "m"), save_npz(tmp_path / "d", train=bars())
    given = {"model": model, "data": f"{data}/train.npz", "budget": "5%", "train.max_length": 8}
    with pytest.raises(ConfigError, match="images have no length in tokens"):
        run.check(load_config(None, (), given))
