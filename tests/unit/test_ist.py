"""IST without a training: the worked numbers, the draws, the groups of layers, suppression."""

from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from scipy.stats import chisquare
from torch import nn
from torch.testing import assert_close

from prunepeft import attach, find_sites, make_space
from prunepeft.config import load_config
from prunepeft.config.methods import IstSection
from prunepeft.errors import CheckpointError, ConfigError, UnknownNameError
from prunepeft.kinds import seeded
from prunepeft.sites import find_layers
from prunepeft.sparse_tuning import (
    IstSettings,
    LayerSampler,
    SparseTuning,
    layer_importance,
    peft_layers,
    suppressed,
    update_scores,
)
from prunepeft.sparse_tuning.ist import draw, draw_different, n_of
from prunepeft.sparse_tuning.layers import evaluating, release_state, train_only
from tests.lora_nets import batch_of
from tests.tiny_models import TINY, tiny_inputs

KINDS = ("lora", "dora", "serial_adapter", "parallel_adapter", "ia3", "prefix")
TUNERS = {
    "lora": LoraConfig(target_modules=["query", "value"], init_lora_weights=False),
    "dora": LoraConfig(target_modules=["query"], use_dora=True, init_lora_weights=False),
    "ia3": IA3Config(
        target_modules=["query", "output.dense"], feedforward_modules=["output.dense"]
    ),
}


def union(name: str = "bert", kinds: tuple[str, ...] = KINDS) -> PeftModel:
    base = TINY[name]()
    return shaken(attach(base, make_space(find_sites(base), kinds, target_params=2000).full()))


def foreign(tuner: str) -> PeftModel:
    return shaken(get_peft_model(TINY["bert"](), TUNERS[tuner]))


def shaken(net: PeftModel) -> PeftModel:
    with torch.no_grad():
        for path, parameter in net.named_parameters():
            if parameter.requires_grad:
                parameter += 0.3 * torch.randn(parameter.shape, generator=seeded(2, path))
    return net.eval()


def every_module(net: PeftModel) -> list[nn.Module]:
    return [module for layer in peft_layers(net) for module in layer.modules]


# ---- settings ----------------------------------------------------------------------------------


def test_the_configuration_has_the_same_settings_and_defaults() -> None:
    assert IstSection().model_dump(exclude={"enabled"}) == asdict(IstSettings())


@pytest.mark.parametrize(
    "wrong",
    [
        {"layers": 0},
        {"suppressed": 1.5},
        {"beta": 1.0},
        {"every": 0},
        {"trials": 0},
        {"score_lr": 0.0},
        {"score_lr": float("nan")},
    ],
)
def test_wrong_settings(wrong) -> None:
    with pytest.raises(ConfigError, match=f"ist.{next(iter(wrong))}"):
        IstSettings(**wrong)


def test_an_unknown_choice_is_told_the_known_ones() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'uniform'"):
        IstSettings(sampling="unifrom")


def test_the_switch_and_the_section() -> None:
    base = {"model": "m", "data": "d", "budget": "1%"}
    assert not load_config(None, (), base).ist.enabled
    for overrides in (["ist=on", "ist.beta=0"], ["ist.beta=0", "ist=true"]):
        ist = load_config(None, overrides, base).ist
        assert (ist.enabled, ist.beta) == (True, 0.0)
    assert load_config(None, (), base | {"ist": True}).ist.enabled
    assert not load_config(None, ["ist=on", "ist=off"], base).ist.enabled
    with pytest.raises(ConfigError, match=r"ist\.\* is read with ist=on alone"):
        load_config(None, ["ist.beta=0"], base)
    with pytest.raises(ConfigError, match=r"ist\.enabled got 'perhaps'"):
        load_config(None, ["ist=perhaps"], base)


def test_the_switch_in_a_file(tmp_path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("model: m\ndata: d\nbudget: 1%\nist: on\n")
    ist = load_config(file, ["ist.every=5"]).ist
    assert (ist.enabled, ist.every) == (True, 5)


# ---- scores ------------------------------------------------------------------------------------


def test_one_update_by_hand() -> None:
    sets, losses = [(0, 1), (2, 3), (0, 2)], [1.0, 1.2, 0.9]
    new = update_scores(torch.zeros(4, dtype=torch.float64), sets, losses)
    assert_close(new, torch.tensor([0.1434, 0.0233, -0.0233, -0.1434]).double(), rtol=0, atol=5e-5)
    assert float(new.sum()) == pytest.approx(0, abs=1e-12)


def test_trials_of_equal_losses_teach_nothing() -> None:
    scores = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)
    assert_close(update_scores(scores, [(0,), (1,), (2,)], [2.0] * 3), scores, rtol=0, atol=0)


def test_layers_outside_a_set_are_not_changed_by_it() -> None:
    new = update_scores(torch.zeros(4).double(), [(0,), (1,)], [0.1, 0.9])
    assert new[0] > 0 > new[1]
    assert new[2:].tolist() == [0, 0]


def test_large_losses_need_relative_rewards() -> None:
    zero, sets, losses = torch.zeros(2).double(), [(0,), (1,)], [800.0, 801.0]
    assert update_scores(zero, sets, losses).tolist() == [0, 0]
    relative = update_scores(zero, sets, losses, reward="relative")
    assert_close(relative, update_scores(zero, sets, [0.0, 1.0]), rtol=0, atol=0)


def test_losses_that_are_not_finite_earn_nothing() -> None:
    zero, sets = torch.zeros(3).double(), [(0,), (1,)]
    assert_close(
        update_scores(zero, sets, [1.0, float("nan")]), update_scores(zero, sets, [1.0, 1e9])
    )
    for reward in ("exp", "relative"):
        new = update_scores(zero, sets, [float("inf"), float("nan")], reward=reward)
        assert new.tolist() == [0, 0, 0]


def test_a_bandit_learns_which_layers_matter() -> None:
    sampler, noise = LayerSampler(8, IstSettings(every=1)), seeded(0, "noise")
    sampler.step = 1
    for _ in range(300):
        sets = sampler.trials()
        spread = 0.01 * torch.randn(3, generator=noise)
        harm = [0.05 * sum(i < 4 for i in chosen) for chosen in sets]
        sampler.update(sets, [0.5 + h + float(e) for h, e in zip(harm, spread, strict=True)])
        sampler.choose()
    needed, needless = sampler.dispensability[:4], sampler.dispensability[4:]
    assert float(needed.mean()) == pytest.approx(-2.2, abs=0.7)
    assert float(needless.mean()) == pytest.approx(2.2, abs=0.7)
    weights = torch.sigmoid(-sampler.dispensability)
    assert weights[:4].min() > 0.7 > 0.3 > weights[4:].max()


# ---- draws -------------------------------------------------------------------------------------


def test_layers_are_drawn_with_their_weights() -> None:
    weights = torch.sigmoid(-torch.tensor([-2.0, -0.5, 0.0, 0.5, 2.0], dtype=torch.float64))
    generator = seeded(0)
    seen = torch.zeros(5)
    for _ in range(10_000):
        (one,) = draw(weights, 1, generator)
        seen[one] += 1
    expected = 10_000 * weights / weights.sum()
    assert chisquare(seen.numpy(), expected.numpy()).pvalue > 0.001


@pytest.mark.parametrize("sampling", ["importance", "uniform"])
def test_the_sampler_prefers_important_layers_unless_uniform(sampling) -> None:
    sampler = LayerSampler(4, IstSettings(sampling=sampling))
    sampler.dispensability = torch.tensor([-8.0, 8.0, 8.0, 8.0], dtype=torch.float64)
    share = sum(sampler.choose() == (0,) for _ in range(400)) / 400
    assert share == pytest.approx(1.0 if sampling == "importance" else 0.25, abs=0.07)
    sampler.step = 10
    assert sampler.is_due == (sampling == "importance")


def test_sets_of_trials_differ_even_where_one_is_all_but_certain() -> None:
    weights = torch.tensor([1.0, 1.0, 1e-300, 1e-300], dtype=torch.float64)
    sets = draw_different(weights, 2, 3, seeded(0))
    assert len(set(sets)) == 3
    assert sets[0] == (0, 1)
    assert len(draw_different(torch.ones(2), 1, 3, seeded(0))) == 2


@pytest.mark.parametrize("n_layers", [1, 2, 3])
def test_few_layers_do(n_layers) -> None:
    sampler = LayerSampler(n_layers, IstSettings(every=1))
    for _ in range(5):
        if sampler.is_due:
            sets = sampler.trials()
            assert len(set(sets)) == len(sets) == min(3, n_layers)
            sampler.update(sets, [1.0 + k for k in range(len(sets))])
        assert len(sampler.choose()) == 1
    assert torch.isfinite(sampler.dispensability).all()


def test_shares_of_layers() -> None:
    assert (n_of(0.25, 32), n_of(0.5, 32), n_of(0.29, 100), n_of(1, 7)) == (8, 16, 29, 7)


def test_scores_are_due_every_tenth_step_but_not_at_the_first() -> None:
    sampler = LayerSampler(4, IstSettings())
    due = []
    for step in range(31):
        due += [step] if sampler.is_due else []
        sampler.choose()
    assert due == [10, 20, 30]


def test_probe_batches_pass_through_all_rows_in_a_new_order_each_time() -> None:
    sampler = LayerSampler(4, IstSettings(probe_rows=3, every=2))
    batches = []
    for step in range(2, 18, 2):
        sampler.step = step
        batches.append(sampler.probe_rows(12))
    for some in (batches[:4], batches[4:]):
        assert sorted(row for batch in some for row in batch) == list(range(12))
    assert batches[:4] != batches[4:]
    assert len(sampler.probe_rows(2)) == 2


def test_a_sampler_goes_on_from_its_state() -> None:
    settings = IstSettings(every=2)

    def advance(sampler: LayerSampler, steps: int) -> list[tuple[int, ...]]:
        chosen = []
        for _ in range(steps):
            if sampler.is_due:
                sets = sampler.trials()
                sampler.update(sets, [1 + 0.1 * sum(s) for s in sets])
            chosen.append(sampler.choose())
        return chosen

    whole, first, second = (LayerSampler(6, settings, seed=3) for _ in range(3))
    expected = advance(whole, 12)
    begun = advance(first, 5)
    second.load_state_dict(first.state_dict())
    assert begun + advance(second, 7) == expected
    assert second.state_dict() == whole.state_dict()
    assert advance(LayerSampler(6, settings, seed=4), 12) != expected
    with pytest.raises(CheckpointError, match="scores of 6 layers, this model has modules in 5"):
        LayerSampler(5, settings).load_state_dict(first.state_dict())


# ---- layers of a model -------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(TINY))
def test_layers_are_those_of_the_sites(name) -> None:
    model = TINY[name]()
    layers = find_layers(model)
    for site in find_sites(model):
        (path,) = (p for p in layers if site.path.startswith(f"{p}."))
        assert layers[path] == (site.stack, site.layer)


@pytest.mark.parametrize("name", ["bert", "llama", "t5"])
def test_all_modules_of_a_union_are_in_a_layer(name) -> None:
    net = union(name, ("lora", "serial_adapter"))
    layers = peft_layers(net)
    stacks = (
        ("encoder", "decoder") if name == "t5" else ("encoder" if name == "bert" else "decoder",)
    )
    assert [layer.name for layer in layers] == [f"{s}.{i}" for s in stacks for i in range(2)]
    grouped = [id(p) for layer in layers for p in layer.parameters]
    assert sorted(grouped) == sorted(id(p) for p in net.parameters() if p.requires_grad)


def test_what_trains_beside_the_modules_is_left_alone() -> None:
    config = LoraConfig(target_modules=["query"], modules_to_save=["classifier"], bias="lora_only")
    net = get_peft_model(TINY["bert"](), config)
    norm = net.base_model.model.bert.encoder.layer[0].output.LayerNorm.weight
    norm.requires_grad_(True)
    grouped = {id(p) for layer in peft_layers(net) for p in layer.parameters}
    names = {n for n, p in net.named_parameters() if p.requires_grad and id(p) not in grouped}
    assert {n.rpartition(".")[2] for n in names} == {"weight", "bias"}
    assert sum("classifier" in n for n in names) == 2
    assert sum("query.base_layer.bias" in n for n in names) == 2
    train_only(peft_layers(net), (1,))
    assert norm.requires_grad
    assert {n for n, p in net.named_parameters() if p.requires_grad} >= names


def test_a_model_without_modules_in_its_layers_is_refused() -> None:
    config = PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=2)
    for net in (TINY["bert"](), get_peft_model(TINY["bert"](), config)):
        with pytest.raises(ConfigError, match="no transformer layer of this model carries"):
            peft_layers(net)


# ---- suppression -------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [union, *(lambda t=t: foreign(t) for t in TUNERS)])
def test_suppression_is_between_without_and_with(make) -> None:
    net = make()
    inputs = tiny_inputs("bert", net)
    with torch.no_grad():
        full = net(**inputs).logits
        with net.disable_adapter():
            without = net(**inputs).logits
        with suppressed(every_module(net), 0.0):
            assert_close(net(**inputs).logits, without, rtol=0, atol=1e-6)
        with suppressed(every_module(net), 1.0):
            assert_close(net(**inputs).logits, full, rtol=0, atol=1e-6)
        with suppressed(every_module(net), 0.25):
            part = net(**inputs).logits
        assert not torch.allclose(part, full, atol=1e-3)
        assert not torch.allclose(part, without, atol=1e-3)
        assert_close(net(**inputs).logits, full, rtol=0, atol=0)


def test_a_suppressed_lora_has_beta_times_its_scale() -> None:
    nets = [foreign("lora"), union("bert", ("lora",))]
    inputs = tiny_inputs("bert", nets[0])
    for net in nets:
        layer = peft_layers(net)[1]
        with torch.no_grad(), suppressed(layer.modules, 0.25):
            found = net(**inputs).logits
        with torch.no_grad():
            for name, parameter in net.named_parameters():
                if "layer.1." in name and "lora_B" in name:
                    parameter *= 0.25
            assert_close(found, net(**inputs).logits, rtol=0, atol=1e-6)


@pytest.mark.parametrize("make", [union, lambda: foreign("lora")])
def test_an_error_in_a_forward_pass_leaves_everything_as_it_was(make) -> None:
    net = make()
    inputs = tiny_inputs("bert", net)
    net.train()
    net.base_model.model.bert.pooler.eval()
    modes = {name: module.training for name, module in net.named_modules()}
    with torch.no_grad():
        full = net(**inputs).logits
    hook = net.base_model.model.classifier.register_forward_pre_hook(lambda *_: 1 / 0)
    with (
        pytest.raises(ZeroDivisionError),
        evaluating(net),
        suppressed(every_module(net), 0.0),
    ):
        net(**inputs)
    hook.remove()
    assert torch.is_grad_enabled()
    assert {name: module.training for name, module in net.named_modules()} == modes
    with torch.no_grad():
        assert_close(net(**inputs).logits, full, rtol=0, atol=0)


def test_trials_restore_the_model_when_the_loss_is_missing_or_raises() -> None:
    net = foreign("lora").train()
    rows = [{"input_ids": torch.tensor([3, 4, 5])}] * 4
    stack = lambda rs: {"input_ids": torch.stack([r["input_ids"] for r in rs])}  # noqa: E731
    tuning = SparseTuning(net, IstSettings(every=1), 0, rows, stack)
    tuning.begin_step(SimpleNamespace(state={}))
    with pytest.raises(ConfigError, match="judges layers by the loss"):
        tuning.begin_step(SimpleNamespace(state={}))
    assert net.training
    assert not any(module._forward_hooks for module in every_module(net))


# ---- frozen layers -----------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["keep", "drop"])
def test_layers_that_do_not_train_do_not_move_and_drop_frees_their_state(how) -> None:
    net = union("llama", ("lora", "serial_adapter")).train()
    layers = peft_layers(net)
    trained = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.1, weight_decay=0.1)

    def step(active: tuple[int, ...]) -> None:
        train_only(layers, active)
        release_state(optimizer, layers, active, how)
        net(**batch_of("llama", net, 0)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step((0, 1))
    before = [[p.detach().clone() for p in layer.parameters] for layer in layers]
    step((1,))
    assert all(map(torch.equal, before[0], layers[0].parameters))
    assert not any(map(torch.equal, before[1], layers[1].parameters))
    held = sum(t.numel() for s in optimizer.state.values() for t in s.values() if t.ndim)
    count = [sum(p.numel() for p in layer.parameters) for layer in layers]
    assert held == 2 * (sum(count) if how == "keep" else count[1])
    step((0,))
    assert not any(map(torch.equal, before[0], layers[0].parameters))


def test_only_active_layers_have_gradients() -> None:
    net = union("t5", ("lora",)).train()
    layers = peft_layers(net)
    train_only(layers, (1, 3))
    net(**batch_of("t5", net, 0)).loss.backward()
    for number, layer in enumerate(layers):
        assert all((p.grad is not None) == (number in (1, 3)) for p in layer.parameters)
    train_only(layers, (0,))
    assert all(p.grad is None for layer in layers[1:] for p in layer.parameters)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a second device")
def test_offloaded_state_is_on_the_host_and_comes_back() -> None:
    parameter = nn.Parameter(torch.ones(3, device="cuda"))
    optimizer = torch.optim.AdamW([parameter])
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    layers = (SimpleNamespace(parameters=(parameter,)),)
    release_state(optimizer, layers, (), "offload")
    assert optimizer.state[parameter]["exp_avg"].device.type == "cpu"
    release_state(optimizer, layers, (0,), "offload")
    assert optimizer.state[parameter]["exp_avg"].device == parameter.device


# ---- scores without training -------------------------------------------------------------------


def test_importance_of_layers_finds_the_one_that_matters() -> None:
    net = deep("llama")
    batch = batch_of("llama", net, 0)
    layers = peft_layers(net)
    with torch.no_grad():
        batch["labels"] = net(**batch).logits.argmax(-1)  # what the modules as they are would say
    scores = layer_importance(net, [batch] * 40, IstSettings(score_lr=100.0, beta=0.0))
    assert set(scores) == {layer.name for layer in layers}
    harm = {}
    for layer in layers:
        with torch.no_grad(), suppressed(layer.modules, 0.0):
            harm[layer.name] = float(net(**batch).loss)
    assert max(scores, key=scores.get) == max(harm, key=harm.get)
    again = layer_importance(net, [batch] * 40, IstSettings(score_lr=100.0, beta=0.0))
    assert again == scores
    assert not net.training


def deep(name: str) -> PeftModel:
    base = TINY[name](num_hidden_layers=4)
    net = attach(base, make_space(find_sites(base), ("lora",), sizes={"lora": 4}).full())
    with torch.no_grad():
        for path, parameter in shaken(net).named_parameters():
            if parameter.requires_grad and ".2." not in path:
                parameter *= 0.2
    return net
