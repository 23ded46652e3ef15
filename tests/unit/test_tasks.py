"""Tasks: heads, label masks, packing, batches, metrics hooks, and every wrong model folder."""

import json
import logging

import pytest
import torch

from prunepeft.data.columns import TASK_NAMES
from prunepeft.errors import CheckpointError, ConfigError
from prunepeft.tasks import TASKS
from prunepeft.tasks.loading import find_max_positions
from tests.tiny_models import make_tiny
from tests.tiny_tokenizer import make_splits, save_tiny_model, tiny_tokenizer

CLS, REG, LM = (TASKS.get(name) for name in ("seq-cls", "regression", "causal-lm"))
EOS, USER, ASSISTANT = 2, 4, 5


@pytest.fixture(scope="module")
def pair():
    return make_splits(
        "seq-cls", ("no", "so", "yes"), text=["w1 w2", "w3"], text_pair=["w4", "w5"], label=[0, 2]
    )


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Model folders by family, made when first asked for."""
    root, made = tmp_path_factory.mktemp("models"), {}

    def get(family, **options):
        key = family + "".join(f"-{value}" for value in options.values())
        if key not in made:
            made[key] = str(save_tiny_model(root / key, family, **options))
        return made[key]

    return get


def test_the_names_are_those_that_data_guesses():
    assert TASKS.names() == TASK_NAMES


# --- models ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "head"),
    [
        ("bert", ["bert.pooler", "classifier"]),
        ("roberta", ["classifier"]),
        ("deberta_v2", ["pooler", "classifier"]),
        ("distilbert", ["pre_classifier", "classifier"]),
        ("gpt2", ["score"]),
        ("llama", ["score"]),
    ],
)
def test_a_classifier_for_every_family(folders, pair, family, head):
    path = folders(family, head="base" if family == "bert" else None)
    state = torch.get_rng_state()
    model = CLS.load_model(path, pair, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert CLS.head_modules(model) == head
    assert model.config.id2label == {0: "no", 1: "so", 2: "yes"}
    assert model.config.pad_token_id == CLS.load_processor(path).pad_token_id
    empty = CLS.make_empty_model(path, pair)
    assert {p.device.type for p in empty.parameters()} == {"meta"}
    shapes = [{n: p.shape for n, p in m.named_parameters()} for m in (model, empty)]
    assert shapes[0] == shapes[1]
    encoded = CLS.encode(pair.train, pair, CLS.load_processor(path))
    out = model(**CLS.collator(CLS.load_processor(path))(encoded.to_list()))
    assert out.logits.shape == (2, 3)
    assert torch.isfinite(out.loss)


def test_the_head_depends_on_the_seed_alone(folders, pair):
    path = folders("bert", head="base")
    torch.manual_seed(1)
    one = CLS.load_model(path, pair, seed=1).state_dict()
    torch.manual_seed(2)
    same, other = (CLS.load_model(path, pair, seed=seed).state_dict() for seed in (1, 2))
    assert all(torch.equal(one[name], same[name]) for name in one)
    changed = [name for name in one if not torch.equal(one[name], other[name])]
    assert changed == ["classifier.weight"]


def test_a_head_for_another_number_of_classes_is_replaced(folders, pair):
    model = CLS.load_model(folders("bert"), pair)
    assert model.classifier.weight.shape[0] == 3


def test_regression_has_one_output(folders):
    splits = make_splits("regression", text=["w1", "w2 w3"], label=[0.5, 2.0])
    path = folders("bert", head="base")
    model, tokenizer = REG.load_model(path, splits), REG.load_processor(path)
    batch = REG.collator(tokenizer)(REG.encode(splits.train, splits, tokenizer).to_list())
    assert batch["labels"].dtype == torch.float32
    out = model(**batch)
    expected = ((out.logits.squeeze(1) - torch.tensor([0.5, 2.0])) ** 2).mean()
    assert torch.allclose(out.loss, expected)
    metrics = REG.compute(out.logits.detach().numpy(), batch["labels"].numpy())
    assert metrics["mse"] == pytest.approx(out.loss.item(), rel=1e-5)


def test_dtype(folders, pair):
    assert CLS.load_model(folders("bert"), pair, dtype="bfloat16").dtype == torch.bfloat16
    with pytest.raises(ConfigError, match="dtype is 'int8'; allowed are float32"):
        CLS.load_model(folders("bert"), pair, dtype="int8")


def test_loading_says_nothing_and_puts_the_log_level_back(folders, pair, capfd):
    level = logging.getLogger("transformers").level
    CLS.load_model(folders("bert", head="base"), pair)
    assert capfd.readouterr() == ("", "")
    assert logging.getLogger("transformers").level == level


# --- wrong models ---------------------------------------------------------------------------


def test_paths_that_are_no_model(tmp_path, pair):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("x")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "config.json").write_text("{")
    (tmp_path / "typeless").mkdir()
    (tmp_path / "typeless" / "config.json").write_text("{}")
    wrong = {
        "missing": "does not exist; give a folder with config.json",
        "adapter": "holds an adapter, not a model; give the base model",
        "other": r"is not a model folder: it has no config.json \(found: notes.txt\)",
        "other/notes.txt": "is a file; give the folder",
        "bad": "the config of model .* could not be loaded",
        "typeless": "the config of model .* could not be loaded",
    }
    for name, message in wrong.items():
        for load in (CLS.make_empty_model, CLS.load_model):
            with pytest.raises(ConfigError, match=message):
                load(str(tmp_path / name), pair)


@pytest.mark.parametrize("path", ["", "  ", "a\0b", "a b/c", "../up/there"])
def test_names_that_are_no_model(pair, path):
    with pytest.raises(ConfigError, match="hub id such as owner/name"):
        CLS.load_model(path, pair)


def test_a_hub_model_that_is_not_cached(pair):
    with pytest.raises(ConfigError, match=r"'nobody/nothing' could not be loaded .*local cache"):
        CLS.make_empty_model("nobody/nothing", pair)


def test_folders_without_or_with_damaged_weights(tmp_path, pair):
    folder = save_tiny_model(tmp_path / "m", "bert")
    weights = folder / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match=r"weights of model .* are damaged"):
        CLS.load_model(str(folder), pair)
    weights.unlink()
    with pytest.raises(ConfigError, match=r"the weights of model .* could not be loaded"):
        CLS.load_model(str(folder), pair)


def test_weights_of_another_shape_or_family(tmp_path, pair):
    folder = save_tiny_model(tmp_path / "m", "bert")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 48}))
    with pytest.raises(ConfigError, match=r"do not fit its config.json \(the shape of .* differs"):
        CLS.load_model(str(folder), pair)
    make_tiny("llama").save_pretrained(tmp_path / "other")
    (folder / "config.json").write_text((tmp_path / "other" / "config.json").read_text())
    with pytest.raises(ConfigError, match=r"do not fit its config.json \(\d+ of \d+ tensors"):
        CLS.load_model(str(folder), pair)


def test_models_that_cannot_do_the_task(folders, pair):
    text = make_splits("causal-lm", text=["w1"])
    with pytest.raises(ConfigError, match=r"\(type 'bert'\) is an encoder, .*needs a decoder"):
        LM.make_empty_model(folders("bert"), text)
    with pytest.raises(ConfigError, match=r"\(type 't5'\) is an encoder-decoder"):
        LM.make_empty_model(folders("t5"), text)
    with pytest.raises(ConfigError, match="type 'vit', which has no sequence classifier"):
        CLS.make_empty_model(folders("vit"), pair)
    with pytest.raises(ConfigError, match="needs classes"):
        CLS.make_empty_model(folders("bert"), text)


def test_code_that_comes_with_a_model_does_not_run(tmp_path, pair):
    folder = save_tiny_model(tmp_path / "m", "bert")
    config = json.loads((folder / "config.json").read_text())
    own = {"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig"}}
    (folder / "config.json").write_text(json.dumps(config | own))
    (folder / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(ConfigError, match=r"brings its own Python code.*trust_remote_code"):
        CLS.make_empty_model(str(folder), pair)
    assert not (tmp_path / "ran").exists()


def test_a_folder_without_a_tokenizer_or_with_another(tmp_path):
    make_tiny("bert").save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="comes without a tokenizer"):
        CLS.load_processor(str(tmp_path))
    make_tiny("bert", vocab_size=40).save_pretrained(tmp_path)
    tiny_tokenizer("bert").save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="up to number 63, but the model knows only 40"):
        CLS.load_processor(str(tmp_path))


def test_token_types_only_for_models_that_have_them(folders):
    assert "token_type_ids" in CLS.load_processor(folders("bert"))("w1")
    for family in ("distilbert", "deberta_v2"):
        assert "token_type_ids" not in CLS.load_processor(folders(family))("w1")


# --- tokenizers and lengths -----------------------------------------------------------------


def test_decoders_get_a_pad_token(folders):
    tokenizer = LM.load_processor(folders("gpt2"))
    assert tokenizer.pad_token == "</s>"
    assert tokenizer.padding_side == "right"
    assert tokenizer.model_max_length == 32


def test_position_limits():
    assert find_max_positions(make_tiny("roberta").config) == 33
    assert find_max_positions(make_tiny("gpt2").config) == 32
    assert find_max_positions(make_tiny("t5").config) is None


def test_max_length(folders, pair):
    tokenizer = CLS.load_processor(folders("bert"))
    long = make_splits("seq-cls", ("a", "b"), text=["w1 " * 99], label=[1])
    assert CLS.encode(long.train, long, tokenizer)["length"] == [32]
    assert CLS.encode(long.train, long, tokenizer, 10)["length"] == [10]
    for wrong in (0, 4, 33):
        with pytest.raises(ConfigError, match=f"max_length is {wrong}; .* allow 5 to 32 tokens"):
            CLS.encode(long.train, long, tokenizer, wrong)


@pytest.mark.parametrize("family", ["t5", "opt", "qwen2"])
def test_other_families_load(folders, family):
    splits = make_splits("seq-cls", ("a", "b"), text=["w1", "w2"], label=[0, 1])
    model = CLS.load_model(folders(family), splits)
    assert len(CLS.head_modules(model)) == 1
