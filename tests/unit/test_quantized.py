"""Quantised bases: what is seen in them, read from them and refused on them."""

import json
import logging
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.testing import assert_close
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    GPTQConfig,
)

from prunepeft import quantized
from prunepeft.candidates import make_space
from prunepeft.errors import ConfigError, MissingExtraError, SiteError
from prunepeft.kinds import KINDS, seeded
from prunepeft.quantized import (
    Storage,
    asked,
    dense_weight,
    is_quantized,
    is_readable,
    require,
    stay_trainable,
    stored,
)
from prunepeft.sites import count_base_params, find_sites
from prunepeft.strategies.adalora import MaskedRanks
from prunepeft.structured.cut import Cut
from prunepeft.structured.groups import find_groups
from prunepeft.structured.surgery import apply_cut
from prunepeft.supernet import attach, detach, slot_parameters
from prunepeft.supernet.export import export_adapter
from prunepeft.tasks import TASKS, open_quantized
from prunepeft.tasks.quantized_opening import Opening, make_opening
from prunepeft.training.trial_cache import TrialCache
from tests.quantized_models import (
    HEADS,
    WORDS,
    make_quantized,
    quantized_layers,
    save_quantized,
)
from tests.tiny_models import HEAD_CLASSES, TINY, make_tiny, tiny_inputs
from tests.tiny_tokenizer import make_splits, save_tiny_model, tiny_tokenizer

CLS = TASKS.get("seq-cls")
WITH_BIASES = ("bert", "gpt2")


# --- without any package that quantises ----------------------------------------------------


class Codes(nn.Module):
    """A linear layer whose weight nobody can read, with gradients for its input."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.scale = float(linear.weight.detach().abs().max()) / 127
        codes = (linear.weight.detach() / self.scale).round().to(torch.int8)
        self.weight = nn.Parameter(codes, requires_grad=False)
        self.bias = linear.bias

    def forward(self, x):
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.scale, self.bias)


def with_codes():
    model = TINY["bert"]().requires_grad_(False)
    for layer in model.bert.encoder.layer:
        layer.output.dense = Codes(layer.output.dense)
    return model


def placement(model, *kinds, role="down"):
    sites = [s for s in find_sites(model) if s.role == role]
    return make_space(sites, kinds, roles={kind: ((role,),) for kind in kinds}, sizes={}).full()


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ({"load_in_8bit": True, "quant_method": "bitsandbytes"}, ("bitsandbytes", 8)),
        ({"load_in_4bit": True}, ("bitsandbytes", 4)),
        (BitsAndBytesConfig(load_in_4bit=True), ("bitsandbytes", 4)),
        (GPTQConfig(bits=3), ("gptq", 3)),
        ({"quant_method": "awq", "bits": 4}, ("awq", 4)),
        ({"quant_method": "hqq", "nbits": 2}, ("hqq", 2)),
        (
            {"quant_method": "torchao", "quant_type": {"default": {"_type": "Int8WeightOnly"}}},
            ("torchao", 8),
        ),
        ({"quant_method": "fp8"}, ("fp8", None)),
    ],
)
def test_a_config_says_how_the_model_is_held(entry, expected):
    found = stored(SimpleNamespace(quantization_config=entry))
    assert (found.method, found.bits) == expected
    assert found.method in found.in_words
    assert "on disk" in found.in_words
    assert stored(SimpleNamespace()) is stored(SimpleNamespace(quantization_config=None)) is None


def test_absence_of_the_package_is_one_error_with_the_install_line(monkeypatch):
    monkeypatch.setattr(quantized, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r'pip install "prunepeft\[quant\]"'):
        require(Storage("bitsandbytes", 4))
    require(Storage("gptq", 4))


def test_layers_are_told_apart_by_their_weight():
    plain = nn.Linear(4, 6)
    eighth = nn.Linear(4, 6)
    eighth.weight = nn.Parameter(eighth.weight.to(torch.float8_e4m3fn), requires_grad=False)
    empty = nn.Module()
    empty.in_features, empty.out_features = 4, 6
    assert [is_quantized(m) for m in (plain, plain.half(), Codes(plain), eighth, empty)] == [
        False,
        False,
        True,
        True,
        True,
    ]
    assert [is_readable(m) for m in (plain, eighth, empty)] == [True, False, False]
    assert_close(dense_weight(plain), plain.weight.data)
    with pytest.raises(ConfigError, match="weight of a Codes is quantised in a way that cannot"):
        dense_weight(Codes(plain))


def test_modules_train_around_an_opaque_layer_and_leave_it_alone():
    model = with_codes()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    inputs = tiny_inputs("bert", model)
    expected = model(**inputs).logits
    net = attach(model, placement(model, "lora", "ia3", "ssb", "serial_adapter"), seed=1)
    assert_close(net(**inputs).logits, expected)
    net(**inputs).logits.square().sum().backward()
    grads = [p.grad for params in slot_parameters(net).values() for p in params.values()]
    assert sum(float(g.abs().sum()) > 0 for g in grads) > len(grads) / 2
    base = detach(net)
    assert_close(dict(base.state_dict()), before, rtol=0, atol=0)


def test_dora_asks_for_a_weight_that_can_be_read():
    model = with_codes()
    with pytest.raises(SiteError, match=r"'dora' needs the frozen weight .*Codes whose codes"):
        attach(model, placement(model, "dora"))
    assert not any(name.endswith("base_layer") for name, _ in model.named_modules())
    attach(model, placement(model, "dora", role="up"))


def test_nothing_is_merged_into_codes():
    model = with_codes()
    net = attach(model, placement(model, "lora"))
    for merge in (net.merge_adapter, net.merge_and_unload):
        with pytest.raises(ConfigError, match="quantised; merging would round"):
            merge()
    assert net.base_model.model.bert.encoder.layer[0].output.dense.base_layer.weight.dtype is (
        torch.int8
    )


def test_a_method_that_cannot_be_trained_through_is_refused():
    model = TINY["bert"]()
    method = SimpleNamespace(quant_method="torchao")
    model.hf_quantizer = SimpleNamespace(is_trainable=False, quantization_config=method)
    with pytest.raises(ConfigError, match="quantised by torchao in a way that transformers cannot"):
        Opening([], {}).settle(model, 0, "some/model")


def test_a_head_that_cannot_be_read_back_is_refused():
    model = TINY["bert"]()
    model.classifier = Codes(model.classifier)
    model.hf_quantizer = SimpleNamespace(is_trainable=True)
    with pytest.raises(ConfigError, match=r"head of model 'some/model' is quantised too \(classif"):
        Opening(["classifier"], {}).settle(model, 0, "some/model")


def test_adalora_is_refused_where_peft_has_no_task_type():
    model = TINY["vit"]()
    model.is_quantized = True
    passes = SimpleNamespace(model=model, task_type=None, seed=0)
    with pytest.raises(ConfigError, match="adalora cannot train on this quantised model"):
        MaskedRanks([], first=4, target=2).measure(passes)
    assert not hasattr(model, "peft_config")


def test_open_quantized_refuses_plain_models_and_unknown_heads(tmp_path):
    place = str(save_tiny_model(tmp_path / "bert"))
    opened = partial(open_quantized, AutoModelForSequenceClassification)
    with pytest.raises(ConfigError, match="is not quantised on disk"):
        opened(place)
    config = json.loads((tmp_path / "bert" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (tmp_path / "bert" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="'score', which BertForSequenceClassification has not"):
        opened(place, ["score"])


def test_head_and_output_embeddings_stay_plain():
    bert, llama = TINY["bert"](), TINY["llama"]()
    held = asked("8bit", bert, HEADS["bert"])
    assert (held.method, held.bits, held.in_words) == ("bitsandbytes", 8, "8 bits (bitsandbytes)")
    assert held.settings == {
        "load_in_8bit": True,
        "llm_int8_skip_modules": ["bert.pooler", "classifier"],
    }
    held = asked("4bit", llama, ())
    assert held.arguments("bfloat16") == {
        "load_in_4bit": True,
        "llm_int8_skip_modules": ["lm_head"],
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": "bfloat16",
    }


def test_layers_are_kept_from_packing_their_weights():
    layer = nn.Linear(2, 2)
    layer.support_avx512bf16_for_cpu = True
    stay_trainable(nn.Sequential(layer))
    assert layer.support_avx512bf16_for_cpu is False
    assert not hasattr(nn.Linear(2, 2), "support_avx512bf16_for_cpu")


# --- with bitsandbytes ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def bnb():
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    return pytest.importorskip("bitsandbytes", reason='needs pip install "prunepeft[quant]"')


@pytest.fixture(scope="module")
def pairs(bnb, tmp_path_factory):
    """(family, word) -> a quantised model, and the plain one that it stands for."""
    place = tmp_path_factory.mktemp("quantised")
    return {
        (family, word): make_quantized(family, word, place / f"{family}-{word}")
        for family in HEADS
        for word in WORDS
    }


ALL = [(family, word) for family in HEADS for word in WORDS]
of_pairs = pytest.mark.parametrize(("family", "word"), ALL, ids=["-".join(pair) for pair in ALL])


def full(model, *kinds):
    sizes = {kind: 2 for kind in kinds if KINDS.get(kind).sized}
    return make_space(find_sites(model), kinds, sizes=sizes).full()


def passed(model, inputs, *kinds, training=True, **options):
    """Output and gradients of the model with perturbed modules on, and the types these train in."""
    net = attach(model, full(model, *kinds), seed=1, **options).train(training)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=seeded(0, name))
                parameter += 0.1 * noise.to(parameter)
    logits = net(**inputs).logits
    logits.float().square().sum().backward()
    found = {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}
    types = {p.dtype for p in net.parameters() if p.requires_grad}
    detach(net).eval()
    return logits.detach(), found, types


@pytest.mark.parametrize(
    ("family", "word", "kind"),
    [
        (family, word, kind)
        for family, word in ALL
        for kind in KINDS.names()
        if kind != "bitfit" or family in WITH_BIASES
    ],
)
def test_a_module_on_codes_is_the_module_on_what_they_stand_for(pairs, family, word, kind):
    """Outputs and gradients, of every kind; in training 8-bit layers compute in plain numbers."""
    model, plain = pairs[family, word]
    inputs = tiny_inputs(family, model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    (logits, grads, types), (expected, wanted, _) = (
        passed(m, inputs, kind) for m in (model, plain)
    )
    assert_close(logits, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
    assert grads.keys() == wanted.keys()
    largest = max(float(g.abs().max()) for g in wanted.values())
    assert_close(grads, wanted, rtol=1e-3, atol=1e-5 * largest)
    assert types == {torch.float32}
    assert_close(dict(model.state_dict()), before, rtol=0, atol=0)


@of_pairs
def test_counts_and_sites_are_those_of_the_plain_model(pairs, family, word):
    model, plain = pairs[family, word]
    n_coded = sum(
        layer.in_features * layer.out_features for layer in quantized_layers(model).values()
    )
    assert n_coded > count_base_params(plain) / 2
    assert count_base_params(model) == count_base_params(plain)
    assert find_sites(model) == find_sites(plain)


@pytest.mark.parametrize("word", WORDS)
def test_training_goes_on_after_an_evaluation(pairs, word):
    """On processors with AVX-512 BF16 layers in 4 bits would pack their weights in between."""
    model, _ = pairs["llama", word]
    inputs = tiny_inputs("llama", model)
    _, before, _ = passed(model, inputs, "lora", "dora")
    with torch.no_grad():
        model.eval()(**inputs)
    _, after, _ = passed(model, inputs, "lora", "dora")
    assert_close(after, before, rtol=0, atol=0)


@pytest.mark.parametrize("word", WORDS)
def test_gradient_checkpointing_gives_the_same_gradients(pairs, word):
    model, _ = pairs["bert", word]
    inputs = tiny_inputs("bert", model)
    _, expected, _ = passed(model, inputs, "lora", "ether_plus")
    model.gradient_checkpointing_enable({"use_reentrant": False})
    try:
        _, found, _ = passed(model, inputs, "lora", "ether_plus")
    finally:
        model.gradient_checkpointing_disable()
    assert_close(found, expected)


@pytest.mark.parametrize("word", WORDS)
def test_half_precision_trains_modules_in_full(bnb, word, tmp_path):
    model, _ = make_quantized("bert", word, tmp_path, compute="bfloat16")
    inputs = tiny_inputs("bert", model)
    with torch.autocast("cpu", torch.bfloat16):
        logits, grads, types = passed(model, inputs, "lora", "dora", modules_to_save=["classifier"])
    assert logits.isfinite().all()
    assert types == {torch.float32}
    assert sum(float(g.abs().sum()) > 0 for g in grads.values()) > len(grads) / 2


@pytest.mark.parametrize("word", WORDS)
def test_an_adapter_is_loaded_on_the_same_base(pairs, word, tmp_path):
    model, plain = pairs["bert", word]
    inputs = tiny_inputs("bert", model)
    net = attach(model, full(model, "lora", "dora", "ia3"), modules_to_save=["classifier"])
    with torch.no_grad():
        for parameter in (p for p in net.parameters() if p.requires_grad):
            parameter += 0.1
        expected = net.eval()(**inputs).logits
    net.save_pretrained(tmp_path)
    detach(net)
    loaded = PeftModel.from_pretrained(model, tmp_path).eval()
    assert_close(loaded(**inputs).logits, expected, rtol=0, atol=0)
    assert {p.dtype for n, p in loaded.named_parameters() if ".union_" in n} == {torch.float32}
    detach(loaded)
    elsewhere = PeftModel.from_pretrained(plain, tmp_path).eval()
    assert_close(elsewhere(**inputs).logits, expected, rtol=0.05, atol=0.05)
    detach(elsewhere)


@pytest.mark.parametrize("word", WORDS)
def test_plain_lora_of_peft_is_the_same_function(pairs, word, tmp_path):
    model, _ = pairs["llama", word]
    inputs = tiny_inputs("llama", model)
    net = attach(model, full(model, "lora"), task_type="CAUSAL_LM").eval()
    with torch.no_grad():
        for parameter in (p for p in net.parameters() if p.requires_grad):
            parameter += 0.05
        expected = net(**inputs).logits
    net.save_pretrained(tmp_path / "union")
    detach(net)
    export_adapter(tmp_path / "union", tmp_path / "peft", "peft", base=TINY["llama"]())
    loaded = PeftModel.from_pretrained(model, tmp_path / "peft").eval()
    assert isinstance(loaded.peft_config["default"], LoraConfig)
    with torch.no_grad():
        assert_close(loaded(**inputs).logits, expected, rtol=1e-5, atol=1e-6)
    loaded.unload()


@pytest.mark.parametrize("word", WORDS)
def test_merging_and_cutting_end_in_an_error_and_change_nothing(pairs, word, tmp_path):
    model, _ = pairs["bert", word]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    net = attach(model, full(model, "lora"))
    with torch.no_grad():
        for parameter in (p for p in net.parameters() if p.requires_grad):
            parameter += 0.1
    with pytest.raises(ConfigError, match="quantised; merging"):
        net.merge_and_unload()
    net.save_pretrained(tmp_path / "adapter")
    detach(net)
    with pytest.raises(
        ConfigError, match=r"quantised; merging .* full precision model it was made"
    ):
        export_adapter(tmp_path / "adapter", tmp_path / "merged", "merged", base=model)
    groups = find_groups(model)
    cut = Cut({g.id: (0, 1) for g in groups}, {g.id: g.n_units for g in groups})
    with pytest.raises(ConfigError, match="quantised, load it in bfloat16 or float32"):
        apply_cut(model, groups, cut)
    assert_close(dict(model.state_dict()), before, rtol=0, atol=0)


# --- opened as a task does -----------------------------------------------------------------


def rows(n_labels):
    labels = tuple("abcdef"[:n_labels])
    return make_splits("seq-cls", labels, text=["w1 w2", "w3"], label=[0, 1])


def opened(path, n_labels=2, word=None, **options):
    if word is None:
        return CLS.load_model(str(path), rows(n_labels), **options)
    empty = CLS.make_empty_model(str(path), rows(n_labels))
    held = asked(word, empty, CLS.head_modules(empty))
    return CLS.load_model(str(path), rows(n_labels), storage=held, **options)


def head_linears(model):
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and f"{name}.".startswith(tuple(f"{h}." for h in CLS.head_modules(model)))
    }


@pytest.mark.parametrize("family", ["bert", "roberta", "llama", "gpt2", "deberta_v2", "distilbert"])
@pytest.mark.parametrize("word", WORDS)
def test_a_task_quantises_all_but_its_head(bnb, family, word, tmp_path):
    save_tiny_model(tmp_path, family, head="base")
    plain, model, again = opened(tmp_path), *(opened(tmp_path, word=word) for _ in range(2))
    codes = quantized_layers(model)
    blocks = {s.path for s in find_sites(plain) if s.role != "norm"}
    assert blocks <= codes.keys()
    assert not head_linears(model).keys() & codes.keys()
    for name, layer in head_linears(model).items():  # the same fresh values as without codes
        assert_close(layer.weight, plain.get_submodule(name).weight, rtol=0, atol=0)
        assert layer.weight.requires_grad
    assert_close(dict(model.state_dict()), dict(again.state_dict()), rtol=0, atol=0)
    inputs = tiny_inputs(family, plain)
    assert_close(model(**inputs).logits, plain(**inputs).logits, rtol=0.5, atol=0.5)


@pytest.mark.parametrize("saved", ["base", "seq-cls"])
@pytest.mark.parametrize("n_labels", [2, 5])
@pytest.mark.parametrize("family", ["bert", "electra"])
@pytest.mark.parametrize("word", WORDS)
def test_a_model_quantised_on_disk_gets_a_head_that_trains(
    bnb, word, family, n_labels, saved, tmp_path
):
    """Read back where the checkpoint holds codes that fit, else drawn from the seed."""
    source = tmp_path / "plain"
    make_tiny(family, saved, n_labels=2).save_pretrained(source)
    place = save_quantized(tmp_path / word, HEAD_CLASSES[saved], source, word)
    tiny_tokenizer().save_pretrained(place)
    model, again, other = (opened(place, n_labels, seed=seed) for seed in (3, 3, 4))
    trained = make_tiny(family, saved, n_labels=2)
    assert quantized_layers(model)
    for name, layer in head_linears(model).items():
        assert not is_quantized(layer)
        assert layer.weight.requires_grad
        assert layer.weight.isfinite().all()
        assert 1e-4 < float(layer.weight.detach().abs().mean()) < 1
        assert_close(layer.weight, again.get_submodule(name).weight, rtol=0, atol=0)
        known = dict(trained.named_modules()).get(
            name.removeprefix("bert.") if saved == "base" else name
        )
        if known is None or known.weight.shape != layer.weight.shape:
            assert not torch.equal(layer.weight, other.get_submodule(name).weight)
        else:
            assert_close(layer.weight, known.weight, rtol=0.2, atol=0.1)
    inputs = tiny_inputs(family, model)
    logits = model(**inputs).logits
    assert logits.shape == (2, n_labels)
    assert logits.isfinite().all()
    given = open_quantized(
        AutoModelForSequenceClassification,
        str(place),
        CLS.head_modules(model),
        seed=3,
        device="cpu",
        num_labels=n_labels,
    )
    assert_close(given(**inputs).logits, logits, rtol=0, atol=0)


@pytest.mark.parametrize("word", WORDS)
def test_a_language_model_quantised_on_disk_is_opened_as_it_is(bnb, word, tmp_path):
    save_tiny_model(tmp_path / "plain", "llama")
    place = save_quantized(tmp_path / word, AutoModelForCausalLM, tmp_path / "plain", word)
    tiny_tokenizer("causal").save_pretrained(place)
    task = TASKS.get("causal-lm")
    model = task.load_model(str(place), make_splits("causal-lm", text=["w1 w2"]))
    stock = AutoModelForCausalLM.from_pretrained(place)
    inputs = tiny_inputs("llama", model)
    stay_trainable(stock)
    assert quantized_layers(model).keys() == quantized_layers(stock).keys()
    assert_close(model(**inputs).logits, stock(**inputs).logits, rtol=0, atol=0)


@pytest.mark.parametrize("word", WORDS)
def test_several_files_hold_the_codes_as_well_as_one(bnb, word, tmp_path):
    make_tiny("bert", "seq-cls", n_labels=2).save_pretrained(tmp_path / "plain")
    source = (AutoModelForSequenceClassification, tmp_path / "plain", word)
    one = save_quantized(tmp_path / "one", *source)
    save_quantized(tmp_path / "many", *source, max_shard_size="8KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 1
    for place in (one, tmp_path / "many"):
        tiny_tokenizer().save_pretrained(place)
    first, second = opened(one), opened(tmp_path / "many")
    assert_close(dict(second.state_dict()), dict(first.state_dict()), rtol=0, atol=0)


def test_the_first_forward_pass_changes_no_bias(bnb, tmp_path):
    """4-bit layers would round them to the format they compute in."""
    save_tiny_model(tmp_path, "bert", head="base")
    empty = CLS.make_empty_model(str(tmp_path), rows(2))
    held = asked("4bit", empty, CLS.head_modules(empty))
    opening = make_opening(held, empty.config, empty, [], str(tmp_path), "cpu", "bfloat16")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path, **opening.options)
    model = opening.settle(model, 0, "")
    before = {n: layer.bias.clone() for n, layer in quantized_layers(model).items()}
    model(**tiny_inputs("bert", model))
    after = {n: layer.bias for n, layer in quantized_layers(model).items()}
    assert_close(after, before, rtol=0, atol=0, check_dtype=False)


@pytest.mark.parametrize("word", WORDS)
def test_shared_trials_know_the_codes(bnb, word, tmp_path):
    save_tiny_model(tmp_path / "model", "bert", head="base")
    model, plain = opened(tmp_path / "model", word=word), opened(tmp_path / "model")
    key = TrialCache(tmp_path, model, "cpu")._call("x")
    model(**tiny_inputs("bert", model))
    assert TrialCache(tmp_path, model, "cpu")._call("x") == key
    assert TrialCache(tmp_path, plain, "cpu")._call("x") != key


# --- with torchao --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["lora", "dora", "ssb"])
def test_modules_train_on_weights_of_torchao(kind):
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    model = TINY["llama"]().requires_grad_(False)
    plain = TINY["llama"]().requires_grad_(False)
    quantization.quantize_(model.model, quantization.Int8WeightOnlyConfig(version=2))
    for name, layer in quantized_layers(model).items():
        plain.get_submodule(name).weight.data = dense_weight(layer)
    assert len(quantized_layers(model)) == 14
    assert count_base_params(model) == count_base_params(plain)
    inputs = tiny_inputs("llama", model)
    (logits, grads, _), (expected, wanted, _) = (passed(m, inputs, kind) for m in (model, plain))
    assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    largest = max(float(g.abs().max()) for g in wanted.values())
    assert_close(grads, wanted, rtol=1e-3, atol=1e-4 * largest)
    with pytest.raises(ConfigError, match="quantised; merging"):
        attach(model, full(model, "lora")).merge_and_unload()


def test_peft_alone_is_not_disturbed():
    """Its own tuners go on merging into plain layers."""
    net = get_peft_model(TINY["llama"](), LoraConfig(target_modules=["q_proj"]))
    assert not quantized_layers(net.merge_and_unload())
