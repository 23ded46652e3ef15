"""Pruned base models on disk: stock classes and our loader open them with the same function."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification

import prunepeft
from prunepeft.errors import CheckpointError, ConfigError, StateError
from prunepeft.report import format_inspect, inspect_path
from prunepeft.state import verify_folder
from prunepeft.structured.cut import Cut
from prunepeft.structured.groups import find_groups
from prunepeft.structured.opening import CUT_KEY, empty_model
from prunepeft.structured.saving import save_base
from prunepeft.structured.scatter import scatter_adapter
from prunepeft.structured.surgery import apply_cut
from prunepeft.supernet.base_digest import BASE_KEY, base_digest, content_digest
from prunepeft.tasks.loading import load_config, load_pretrained, make_empty
from tests.tiny_models import HEAD_CLASSES, TINY, tiny_inputs
from tests.tiny_tokenizer import tiny_tokenizer

# name -> (head, what a stock config can say)
STOCK = {
    "bert": ("seq-cls", ("neurons",)),
    "vit": ("image-cls", ("neurons",)),
    "gpt2": ("causal-lm", ("neurons",)),
    "opt": ("causal-lm", ("neurons",)),
    "llama": ("causal-lm", ("heads", "neurons")),
    "mistral": ("causal-lm", ("heads", "neurons")),
    "qwen2": ("causal-lm", ("heads", "neurons")),
    "qwen3": ("causal-lm", ("heads", "neurons")),
    "t5": ("seq2seq", ("heads", "neurons")),
}


def even_cut(groups, what):
    """The same number of units of every group, at different places."""
    keep = {}
    for i, group in enumerate(g for g in groups if g.what in what):
        n = group.n_units // 2 + (group.n_units > 4)
        start = i % 2
        keep[group.id] = tuple(range(group.n_units))[start::2][:n]
    sizes = {}
    for group in groups:
        if group.id in keep:
            sizes.setdefault(group.what, []).append(len(keep[group.id]))
    n_of = {what: min(found) for what, found in sizes.items()}
    what_of = {g.id: g.what for g in groups}
    keep = {name: units[: n_of[what_of[name]]] for name, units in keep.items()}
    return Cut(keep, {g.id: g.n_units for g in groups if g.id in keep})


def uneven_cut(groups, what=("heads", "neurons")):
    """One unit less in every further group, a layer of neurons with few left."""
    keep = {}
    for i, group in enumerate(g for g in groups if g.what in what):
        n = max(1, group.n_units - 1 - i)
        keep[group.id] = tuple(range(group.n_units - n, group.n_units))
    return Cut(keep, {g.id: g.n_units for g in groups if g.id in keep})


def cut_model(name, cutter, head=None, **options):
    """(model, groups, cut) of a tiny model that was cut in memory."""
    model = TINY[name](head, **options)
    groups = find_groups(model)
    cut = cutter(groups)
    apply_cut(model, groups, cut)
    return model, groups, cut


def save(folder, name="bert", cutter=uneven_cut, head=None, **options):
    model, groups, cut = cut_model(name, cutter, head, **options)
    save_base(model, folder, groups=groups, cut=cut)
    return model, cut


def output(model, inputs):
    with torch.no_grad():
        return model(**inputs)[0]


def edit_config(folder, change):
    file = folder / "config.json"
    data = json.loads(file.read_text())
    change(data)
    file.write_text(json.dumps(data))


@pytest.mark.parametrize("name", STOCK)
def test_a_stock_class_opens_an_even_cut_with_the_same_function(tmp_path, name):
    head, what = STOCK[name]
    model, cut = save(tmp_path / "base", name, lambda groups: even_cut(groups, what), head)
    assert cut.keep
    data = json.loads((tmp_path / "base" / "config.json").read_text())
    assert CUT_KEY not in data
    loaded, info = HEAD_CLASSES[head].from_pretrained(tmp_path / "base", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    inputs = tiny_inputs(name, model)
    torch.testing.assert_close(output(loaded, inputs), output(model, inputs), atol=1e-6, rtol=0)
    assert base_digest(loaded) == base_digest(model) == content_digest(loaded)
    assert AutoModel.from_pretrained(tmp_path / "base") is not None


@pytest.mark.parametrize("name", ["bert", "vit", "gpt2", "opt", "llama", "qwen3", "t5"])
def test_widths_of_their_own_open_with_our_loader_and_fail_with_a_stock_class(tmp_path, name):
    head = STOCK[name][0]
    model, _ = save(tmp_path / "base", name, uneven_cut, head)
    assert CUT_KEY in json.loads((tmp_path / "base" / "config.json").read_text())
    with pytest.raises(RuntimeError, match="mismatch"):
        HEAD_CLASSES[head].from_pretrained(tmp_path / "base")
    loaded = prunepeft.load_base(tmp_path / "base", verify=True)
    assert type(loaded) is type(model)
    inputs = tiny_inputs(name, model)
    torch.testing.assert_close(output(loaded, inputs), output(model, inputs), atol=1e-6, rtol=0)
    assert find_groups(loaded) == find_groups(model)
    again = tmp_path / "again"
    loaded.save_pretrained(again)  # the entries of the config survive transformers
    torch.testing.assert_close(
        output(prunepeft.load_base(again, verify=True), inputs), output(model, inputs)
    )


def test_heads_of_every_layer_alike_are_more_than_a_bert_config_can_say(tmp_path):
    model, _ = save(tmp_path / "base", "bert", lambda groups: even_cut(groups, ("heads",)))
    with pytest.raises(RuntimeError, match="mismatch"):
        AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    inputs = tiny_inputs("bert", model)
    loaded = prunepeft.load_base(tmp_path / "base")
    torch.testing.assert_close(output(loaded, inputs), output(model, inputs), atol=1e-6, rtol=0)


@pytest.mark.parametrize("cutter", [uneven_cut, lambda groups: even_cut(groups, ("neurons",))])
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_tasks_open_it_with_a_new_head_and_without_weights(tmp_path, name, cutter):
    model, _ = save(tmp_path / "base", name, cutter)
    place = str(tmp_path / "base")
    config = load_config(place, num_labels=5)
    loaded = load_pretrained(
        AutoModelForSequenceClassification, place, config, dtype="float32", seed=0
    )
    assert loaded.config.num_labels == 5
    assert content_digest(loaded) == base_digest(model)  # the head does not count
    empty = make_empty(AutoModelForSequenceClassification, place, config)
    assert all(p.is_meta for p in empty.parameters())
    assert prunepeft.find_sites(empty) == prunepeft.find_sites(loaded)
    assert type(empty) is type(loaded)


def test_tied_embeddings_stay_tied(tmp_path):
    model, _ = save(tmp_path / "base", "llama", uneven_cut, tie_word_embeddings=True)
    loaded = prunepeft.load_base(tmp_path / "base")
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    inputs = tiny_inputs("llama", model)
    torch.testing.assert_close(output(loaded, inputs), output(model, inputs), atol=1e-6, rtol=0)


def test_the_folder_is_whole_and_holds_the_tokenizer(tmp_path):
    model, groups, cut = cut_model("bert", uneven_cut)
    folder = tmp_path / "base"
    tokenizer = tiny_tokenizer("bert")
    digest = save_base(model, folder, groups=groups, cut=cut, processor=tokenizer)
    verify_folder(folder)
    assert {"cut.json", "config.json", "model.safetensors", "tokenizer.json"} <= {
        p.name for p in folder.iterdir()
    }
    assert Cut.from_dict(json.loads((folder / "cut.json").read_text())) == cut
    assert save_base(model, folder, groups=groups, cut=cut) == digest
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("precious")
    with pytest.raises(ConfigError, match="holds no pruned base"):
        save_base(model, tmp_path / "other", groups=groups, cut=cut)


def test_what_cannot_be_saved_is_refused(tmp_path):
    model, groups, cut = cut_model("bert", uneven_cut)
    smaller = Cut({k: v[1:] or v for k, v in cut.keep.items()}, cut.n_units)
    with pytest.raises(StateError, match="does not have the shapes"):
        save_base(model, tmp_path / "a", groups=groups, cut=smaller)
    net = prunepeft.attach(model, lora_on(model))
    with pytest.raises(StateError, match="carries an adapter"):
        save_base(net.base_model.model, tmp_path / "a", groups=groups, cut=cut)
    assert not (tmp_path / "a").exists()


def test_verify_sees_a_changed_weight(tmp_path):
    model, groups, cut = cut_model("bert", uneven_cut)
    save_base(model, tmp_path / "base", groups=groups, cut=cut)
    with torch.no_grad():
        model.bert.embeddings.word_embeddings.weight[3, 3] += 1e-3
    model.save_pretrained(tmp_path / "base")
    prunepeft.load_base(tmp_path / "base")
    with pytest.raises(CheckpointError, match="not those that were saved"):
        prunepeft.load_base(tmp_path / "base", verify=True)
    TINY["bert"]().save_pretrained(tmp_path / "plain")
    prunepeft.load_base(tmp_path / "plain")
    with pytest.raises(CheckpointError, match="no pruned base"):
        prunepeft.load_base(tmp_path / "plain", verify=True)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("cut", "not a mapping"),
        ({"format_version": 1}, "not a mapping"),
        ({"format_version": 9, "units": {}}, "format 9"),
        ({"format_version": 1, "units": {"encoder.0.ffn": [10**12, 10**13]}}, "32 neurons"),
        ({"format_version": 1, "units": {"encoder.0.ffn": [-1, 32]}}, r"kept < of"),
        ({"format_version": 1, "units": {"encoder.0.ffn": [True, 32]}}, r"kept < of"),
        ({"format_version": 1, "units": {"encoder.0.attention": [0, 4]}}, "4 heads"),
        ({"format_version": 1, "units": {"encoder.7.ffn": [3, 32]}}, "no group 'encoder.7.ffn'"),
        ({"format_version": 1, "units": {"__class__": [3, 32]}}, "no group '__class__'"),
    ],
)
def test_hostile_widths_are_refused(tmp_path, entry, message):
    save(tmp_path / "base")
    edit_config(tmp_path / "base", lambda data: data.update({CUT_KEY: entry}))
    with pytest.raises(CheckpointError, match=message):
        prunepeft.load_base(tmp_path / "base")
    config = AutoConfig.from_pretrained(tmp_path / "base")
    with pytest.raises(CheckpointError, match=message):
        empty_model(AutoModel, config)


def test_widths_that_are_not_those_of_the_weights_are_refused(tmp_path):
    save(tmp_path / "base")
    edit_config(tmp_path / "base", lambda d: d[CUT_KEY]["units"].update({"encoder.0.ffn": [3, 32]}))
    with pytest.raises(CheckpointError, match="do not fit its config"):
        prunepeft.load_base(tmp_path / "base")


def test_a_damaged_digest_or_file_is_refused(tmp_path):
    save(tmp_path / "base")
    weights = tmp_path / "base" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-7])
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        prunepeft.load_base(tmp_path / "base")
    edit_config(tmp_path / "base", lambda data: data[BASE_KEY].update(digest="../../etc"))
    with pytest.raises(CheckpointError, match="without a SHA-256"):
        prunepeft.load_base(tmp_path / "base")
    with pytest.raises(ConfigError, match="no model that can be opened"):
        prunepeft.load_base(tmp_path / "nowhere")


# --- adapters ----------------------------------------------------------------------------------


def lora_on(model, kinds=("lora",)):
    sites = prunepeft.find_sites(model)
    return prunepeft.make_space(
        sites, kinds, sizes={k: 4 for k in kinds if k in ("lora", "dora")}
    ).full()


def trained(model, kinds=("lora",), seed=1):
    """The model with modules of random values."""
    net = prunepeft.attach(model, lora_on(model, kinds), modules_to_save=None)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return net.eval()


@pytest.mark.parametrize("name", ["bert", "llama", "t5"])
def test_an_adapter_on_the_reloaded_base_and_on_a_fresh_cut_is_the_same(tmp_path, name):
    model, cut = save(tmp_path / "base", name, uneven_cut)
    net = trained(model)
    net.save_pretrained(tmp_path / "adapter")
    inputs = tiny_inputs(name, model)
    expected = output(net, inputs)
    data = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert data["base_digest"] == base_digest(model)
    shown = inspect_path(tmp_path / "adapter")
    assert shown["base_digest"] == base_digest(model)
    assert base_digest(model)[:12] in format_inspect(shown)
    base = prunepeft.load_base(tmp_path / "base")
    loaded = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    torch.testing.assert_close(output(loaded, inputs), expected, atol=1e-6, rtol=0)
    full = prunepeft.load_cut(TINY[name](), cut)
    exact = PeftModel.from_pretrained(full, tmp_path / "adapter").eval()
    torch.testing.assert_close(output(exact, inputs), expected, atol=1e-6, rtol=0)
    from_file = prunepeft.load_cut(TINY[name](), tmp_path / "base")
    assert base_digest(from_file) == base_digest(model)


def test_an_adapter_belongs_to_its_base(tmp_path):
    keep = {"encoder.0.ffn": tuple(range(8)), "encoder.1.ffn": tuple(range(8))}
    cut = Cut(keep, dict.fromkeys(keep, 32))
    other = Cut({k: tuple(range(8, 16)) for k in keep}, cut.n_units)  # equal shapes
    model, _ = save(tmp_path / "base", "bert", lambda groups: cut)
    trained(model, ("lora",)).save_pretrained(tmp_path / "adapter")
    plain = TINY["bert"]()
    queries = prunepeft.make_space(
        prunepeft.find_sites(plain), ("lora",), sizes={"lora": 2}, roles={"lora": [["q"]]}
    ).full()
    prunepeft.attach(TINY["bert"](), queries).save_pretrained(tmp_path / "plain")
    assert "base_digest" not in json.loads((tmp_path / "plain/adapter_config.json").read_text())
    pruned_otherwise = prunepeft.load_cut(TINY["bert"](), other)
    with pytest.raises(CheckpointError, match=r"pruned base .* but this BertFor.* pruned base"):
        PeftModel.from_pretrained(pruned_otherwise, tmp_path / "adapter")
    with pytest.raises(CheckpointError, match=r"but this BertFor.* an unpruned base"):
        PeftModel.from_pretrained(plain, tmp_path / "adapter")
    with pytest.raises(CheckpointError, match="made on an unpruned base"):
        PeftModel.from_pretrained(prunepeft.load_base(tmp_path / "base"), tmp_path / "plain")
    PeftModel.from_pretrained(plain, tmp_path / "plain")
    edited = tmp_path / "adapter" / "adapter_config.json"
    edited.write_text(json.dumps(json.loads(edited.read_text()) | {"base_digest": "x"}))
    with pytest.raises(CheckpointError, match="not a SHA-256"):
        PeftModel.from_pretrained(prunepeft.load_base(tmp_path / "base"), tmp_path / "adapter")


def test_a_config_of_the_users_own_takes_the_digest_of_the_base(tmp_path):
    model, _ = save(tmp_path / "base")
    config = prunepeft.UnionConfig(placement=lora_on(model).to_dict())
    net = get_peft_model(model, config)
    assert net.peft_config["default"].base_digest == base_digest(model)


@pytest.mark.parametrize("cutter", [uneven_cut, lambda groups: even_cut(groups, ("neurons",))])
def test_exports_of_an_adapter_on_a_pruned_base(tmp_path, cutter):
    base = tmp_path / "base"
    model, groups, cut = cut_model("llama", cutter)
    save_base(model, base, groups=groups, cut=cut, processor=tiny_tokenizer("causal"))
    model = prunepeft.load_base(base)
    net = trained(model)
    net.save_pretrained(tmp_path / "adapter")
    inputs = tiny_inputs("llama", model)
    expected = output(net, inputs)
    report = prunepeft.export_adapter(tmp_path / "adapter", tmp_path / "merged", "merged")
    assert report["max_difference"] < 1e-5
    merged = prunepeft.load_base(tmp_path / "merged", verify=True)
    torch.testing.assert_close(output(merged, inputs), expected, atol=1e-5, rtol=0)
    assert base_digest(merged) != base_digest(model)
    report = prunepeft.export_adapter(tmp_path / "adapter", tmp_path / "peft", "peft")
    assert report["base_digest"] == base_digest(model)
    plain = PeftModel.from_pretrained(prunepeft.load_base(base), tmp_path / "peft").eval()
    torch.testing.assert_close(output(plain, inputs), expected, atol=1e-6, rtol=0)
    prunepeft.export_adapter(tmp_path / "adapter", tmp_path / "serve", "serve")
    engines = json.loads((tmp_path / "serve" / "serving.json").read_text())
    opens = cutter is not uneven_cut
    assert (engines["vllm"]["status"] != "no") == opens
    with pytest.raises(CheckpointError, match="an unpruned base"):
        prunepeft.export_adapter(
            tmp_path / "adapter", tmp_path / "wrong", "merged", base=TINY["llama"]()
        )


@pytest.mark.parametrize("kind", ["lora", "ia3", "bitfit"])
@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_full_model_mode_changes_nothing_at_what_was_taken_out(tmp_path, name, kind):
    full = TINY[name]()
    groups = find_groups(full)
    model, cut = save(tmp_path / "base", name, uneven_cut)
    trained(model, (kind,)).save_pretrained(tmp_path / "adapter")
    placement = scatter_adapter(tmp_path / "adapter", cut, groups, tmp_path / "full")
    assert {s.d_out for slot in placement for s in slot.sites} == {
        s.d_out for slot in lora_on(full, (kind,)) for s in slot.sites
    }
    before = {n: p.detach().clone() for n, p in full.named_parameters()}
    wide = PeftModel.from_pretrained(full, tmp_path / "full").merge_and_unload()
    small = prunepeft.load_cut(TINY[name](), cut)
    cut_before = {n: p.detach().clone() for n, p in small.named_parameters()}
    narrow = PeftModel.from_pretrained(small, tmp_path / "adapter").merge_and_unload()
    updates = {n: p.detach() - before[n] for n, p in wide.named_parameters()}
    holder = TINY[name]()
    with torch.no_grad():
        for parameter, update in zip(holder.parameters(), updates.values(), strict=True):
            parameter.copy_(update)
    total = {n: u.abs().sum() for n, u in updates.items()}
    apply_cut(holder, groups, cut)
    changed = 0
    for n, parameter in narrow.named_parameters():
        update = parameter.detach() - cut_before[n]
        left = holder.get_parameter(n)
        torch.testing.assert_close(left.detach(), update, atol=1e-6, rtol=0)
        torch.testing.assert_close(left.abs().sum(), total[n], atol=1e-5, rtol=1e-5)
        changed += bool(update.any())
    assert changed


def test_full_model_mode_needs_tensors_of_features(tmp_path):
    groups = find_groups(TINY["bert"]())
    model, cut = save(tmp_path / "base")
    net = trained(model, ("lora",))
    net.save_pretrained(tmp_path / "adapter")
    other = even_cut(groups, ("heads", "neurons"))
    with pytest.raises(CheckpointError, match="adapter of another base"):
        scatter_adapter(tmp_path / "adapter", other, groups, tmp_path / "full")
    for kind in ("dora", "ssl"):
        base = prunepeft.load_base(tmp_path / "base")
        trained(base, (kind,)).save_pretrained(tmp_path / kind)
        with pytest.raises(ConfigError, match=f"{kind} on .* cannot be put on the unpruned base"):
            scatter_adapter(tmp_path / kind, cut, groups, tmp_path / "full")
    assert not (tmp_path / "full").exists()
    with pytest.raises(ConfigError, match="in use"):
        scatter_adapter(tmp_path / "adapter", cut, groups, tmp_path / "base")


@pytest.mark.slow
@pytest.mark.parametrize("name", STOCK)
def test_stock_transformers_alone_opens_it(tmp_path, name):
    head, what = STOCK[name]
    model, _ = save(tmp_path / "base", name, lambda groups: even_cut(groups, what), head)
    inputs = tiny_inputs(name, model)
    from safetensors.torch import load_file, save_file

    save_file(inputs, tmp_path / "inputs.safetensors")
    code = f"""
import sys
sys.modules["prunepeft"] = None  # cannot be imported
import torch
from safetensors.torch import load_file, save_file
from transformers import {HEAD_CLASSES[head].__name__} as Auto
model = Auto.from_pretrained({str(tmp_path / "base")!r}).eval()
with torch.no_grad():
    out = model(**load_file({str(tmp_path / "inputs.safetensors")!r}))[0]
save_file({{"out": out.contiguous()}}, {str(tmp_path / "out.safetensors")!r})
"""
    clean = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    subprocess.run([sys.executable, "-c", code], check=True, env=clean, cwd=Path(tmp_path))
    found = load_file(tmp_path / "out.safetensors")["out"]
    torch.testing.assert_close(found, output(model, inputs), atol=1e-6, rtol=0)
