"""LoRAPrune's watcher: schedule, exact counts, monotone masks, smoothing, resume, clean end."""

import copy
import itertools
import json
import math

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from prunepeft.errors import ConfigError, StateError
from prunepeft.schedules import held_cubic
from prunepeft.structured import Masks, apply_cut, find_groups, n_removed, removed_params
from prunepeft.structured.base_criteria import LoraGuided, Magnitude, Salience, Taylor
from prunepeft.structured.groups import Group, Part
from prunepeft.structured.lora_prune import GradualPruner, cut_of
from prunepeft.structured.scoring import Scorer
from prunepeft.supernet.layer import UnionLayer
from tests.lora_nets import lora_net, train
from tests.tiny_models import TINY, tiny_inputs

MODELS = ("llama", "bert", "gpt2", "t5")


def masks_of(pruner: GradualPruner) -> dict[str, Tensor]:
    return {i: pruner._masks[i].detach().clone() for i in pruner._masks}


def run(name: str, pruner: GradualPruner, net, steps: int = 20, after=lambda step: None):
    pruner.attach(net)
    pruner.start(steps)
    for _ in train(name, net, range(steps), after):
        pruner.step()
    return pruner.stop()


class Fixed(Scorer):
    """Scores that a test sets."""

    values: dict[str, Tensor]

    def scores(self) -> dict[str, Tensor]:
        return {i: v.clone() for i, v in self.values.items()}


@pytest.fixture
def fixed(monkeypatch):
    monkeypatch.setattr("prunepeft.structured.lora_prune.Scorer", Fixed)


# --- schedule ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("step", "ratio"),
    [
        (100, 0.0),
        (110, 0.018517),
        (200, 0.165039),
        (300, 0.289062),
        (500, 0.4375),
        (700, 0.492188),
        (890, 0.499999),
        (900, 0.5),
        (1000, 0.5),
    ],
)
def test_worked_schedule(step, ratio):
    assert 0.5 * held_cubic(step / 1000) == pytest.approx(ratio, abs=6e-7)


def big_group(n: int) -> Group:
    return Group("decoder.0.attention", "heads", "decoder", 0, "attention", n, 1, 1,
                 (Part("o", "in", ((0, 1),)),))  # fmt: skip


class Writer(torch.nn.Module):
    """Stands in for a peft model with one writer."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.o = torch.nn.Linear(n, 2)
        self.base_model = torch.nn.Module()
        self.base_model.__dict__["model"] = self


def test_first_head_goes_when_the_schedule_covers_a_whole_one(fixed):
    group = big_group(32)
    pruner = GradualPruner((group,), {"heads": 0.5}, Magnitude())
    pruner.attach(Writer(32))
    pruner.start(1000)
    pruner._scorer.values = {group.id: torch.arange(32.0)}
    gone = {}
    for t in range(1, 1001):
        pruner.step()
        gone[t] = 32 - int(masks_of(pruner)[group.id].sum())
        assert gone[t] >= gone.get(t - 1, 0)
    assert (gone[119], gone[120]) == (0, 1)
    refreshed = [t for t in range(110, 900, 10)]
    assert [gone[t] for t in refreshed] == [
        math.floor(16 * held_cubic(t / 1000)) for t in refreshed
    ]
    # One short before the target is met exactly, where the released code ends.
    assert (gone[890], gone[899], gone[900], gone[1000]) == (15, 15, 16, 16)
    found = pruner.stop()
    assert found["mask.decoder.0.attention"].tolist() == [0.0] * 16 + [1.0] * 16
    assert int(found["steps"]) == 1000
    assert int(found["refreshes"]) == 80


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_masks_are_monotone_and_end_at_the_exact_target(name, scope):
    net, groups = lora_net(name)
    seen: list[dict[str, Tensor]] = []
    ratios = {"heads": 0.5, "neurons": 0.4}
    pruner = GradualPruner(
        groups, ratios, every=1, scope={"heads": scope, "neurons": scope}, criterion=LoraGuided()
    )
    found = run(name, pruner, net, 12, lambda _: seen.append(masks_of(pruner)))
    for one, other in itertools.pairwise(seen):
        assert all((other[i] <= one[i]).all() for i in one)
    assert len({int(sum(m.sum() for m in masks.values())) for masks in seen}) > 3
    for what, ratio in ratios.items():
        own = [found[f"mask.{g.id}"] for g in groups if g.what == what]
        parts = own if scope == "layer" else [torch.cat(own)]
        assert [int((1 - m).sum()) for m in parts] == [n_removed(ratio, len(m)) for m in parts]
        assert what == "neurons" or all(m.any() for m in own)
    for group in groups:
        assert torch.equal(found[f"mask.{group.id}"], seen[-1][group.id])
        if scope == "layer":  # the units of least moving average are gone
            ema, mask = found[f"ema.{group.id}"], found[f"mask.{group.id}"]
            assert ema.shape == mask.shape


def test_tied_scores_do_not_bring_a_masked_unit_back(fixed):
    group = big_group(4)
    pruner = GradualPruner((group,), {"heads": 0.5}, Magnitude(), every=1)
    pruner.attach(Writer(4))
    pruner.start(10)
    pruner._scorer.values = {group.id: torch.tensor([1.0, 1.0, 1.0, 0.0])}
    for _ in range(5):
        pruner.step()
    assert masks_of(pruner)[group.id].tolist() == [1, 1, 1, 0]
    pruner._scorer.values = {group.id: torch.tensor([0.0, 0.0, 0.0, 9.0])}
    for _ in range(5):
        pruner.step()
    assert masks_of(pruner)[group.id].tolist() == [0, 1, 1, 0]


# --- moving average ------------------------------------------------------------------------------


def test_moving_average_and_scores_that_are_not_finite(fixed):
    groups = (
        big_group(2),
        Group(**{**vars(big_group(2)), "id": "decoder.1.attention", "layer": 1}),
    )
    pruner = GradualPruner(groups, {"heads": 0.5}, Magnitude())
    pruner.attach(Writer(2))
    pruner.start(100)
    first, second = (g.id for g in groups)
    hand = torch.tensor([1.624018, 0.928141])
    pruner._scorer.values = {first: hand, second: hand}
    pruner.step()
    assert pruner._state.ema[first].tolist() == pytest.approx([0.162402, 0.092814], abs=1e-6)
    for bad in (math.nan, math.inf):
        pruner._scorer.values = {first: hand, second: torch.tensor([bad, 1.0])}
        pruner.step()
    assert pruner._state.ema[first].tolist() == pytest.approx((0.271 * hand).tolist(), abs=1e-6)
    found = pruner.stop()
    assert found[f"ema.{second}"].tolist() == pytest.approx([0.162402, 0.092814], abs=1e-6)
    assert (int(found[f"skipped.{first}"]), int(found[f"skipped.{second}"])) == (0, 2)
    assert found[f"mask.{second}"].tolist() == [1, 0]


def test_one_shot_masks_nothing_until_the_end():
    net, groups = lora_net("bert")
    seen: list[Tensor] = []
    pruner = GradualPruner(groups, every=1, one_shot=True)
    found = run("bert", pruner, net, 6, lambda _: seen.extend(masks_of(pruner).values()))
    assert min(m.min() for m in seen) == 1.0
    for group in groups:
        ema, mask = found[f"ema.{group.id}"], found[f"mask.{group.id}"]
        assert int(mask.sum()) == group.n_units - n_removed(0.5, group.n_units)
        assert ema[mask == 0].max() <= ema[mask == 1].min()


# --- state ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_resume_gives_the_same_masks(name):
    def fresh():
        net, groups = lora_net(name)
        return net, GradualPruner(groups, every=2)

    net, pruner = fresh()
    straight = run(name, pruner, net)
    net, pruner = fresh()
    pruner.attach(net)
    pruner.start(20)
    for _ in train(name, net, range(9)):
        pruner.step()
    saved = pruner.state_dict()
    weights = {n: p.detach().clone() for n, p in net.named_parameters() if p.requires_grad}
    pruner.stop()

    net, pruner = fresh()
    with torch.no_grad():
        for n, p in net.named_parameters():
            if n in weights:
                p.copy_(weights[n])
    pruner.attach(net)
    pruner.start(20)
    pruner.load_state_dict(saved)
    for _ in train(name, net, range(9, 20)):
        pruner.step()
    resumed = pruner.stop()
    assert straight.keys() == resumed.keys()
    for key, tensor in straight.items():
        assert_close(resumed[key], tensor, rtol=0, atol=0)


def test_reset_goes_back_to_the_mark():
    net, groups = lora_net("bert")
    pruner = GradualPruner(groups, every=1)
    pruner.attach(net)
    pruner.start(10)
    for step in train("bert", net, range(8)):
        if step == 4:
            pruner.mark()
            before, masks = pruner.state_dict(), masks_of(pruner)
        pruner.step()
    assert any(not torch.equal(masks[i], m) for i, m in masks_of(pruner).items())
    pruner.reset()
    assert all(torch.equal(masks[i], m) for i, m in masks_of(pruner).items())
    after = pruner.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert before.keys() == after.keys()


def test_a_state_of_other_groups_is_refused():
    net, groups = lora_net("bert")
    pruner = GradualPruner(groups)
    pruner.attach(net)
    saved = pruner.state_dict()
    other = GradualPruner(groups, {"heads": 0.5})
    other.attach(net)
    with pytest.raises(StateError, match="saved state is of 4 groups, this pruner has 2"):
        other.load_state_dict(saved)


# --- the model -----------------------------------------------------------------------------------


@pytest.mark.parametrize("criterion", [LoraGuided(), Taylor(), Salience()], ids=lambda c: c.name)
def test_the_base_stays_as_it_was(criterion):
    net, groups = lora_net("llama")
    base = {n: p.detach().clone() for n, p in net.named_parameters() if "union_" not in n}
    trained = [n for n, p in net.named_parameters() if p.requires_grad]
    no_gradient = []

    def look(step):
        own = dict(net.named_parameters())
        no_gradient.append(all(own[n].grad is None for n in base))

    run("llama", GradualPruner(groups, criterion=criterion, every=2), net, 6, look)
    assert all(no_gradient)
    for name, parameter in net.named_parameters():
        assert name not in base or torch.equal(parameter, base[name])
    assert [n for n, p in net.named_parameters() if p.requires_grad] == trained
    hooks = [m for m in net.modules() if m._forward_pre_hooks or m._forward_hooks]
    assert not hooks


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("what", ["heads", "neurons", "both"])
def test_masked_model_equals_the_cut_and_merged_one(name, what):
    net, groups = lora_net(name)
    ratios = {k: 0.5 for k in ("heads", "neurons") if what in (k, "both")}
    cut = cut_of(run(name, GradualPruner(groups, ratios, every=1), net, 6), groups)
    assert removed_params(groups, cut) > 0
    net.eval()
    inputs = tiny_inputs(name, net.base_model.model)
    masks = Masks(net, groups)
    masks.show(cut)
    with torch.no_grad():
        masked = net(**inputs).logits
        masks.remove()
        assert not torch.allclose(net(**inputs).logits, masked, atol=1e-4)
        merged = copy.deepcopy(net).merge_and_unload()
        before = sum(p.numel() for p in merged.parameters())
        apply_cut(merged, groups, cut)
        assert before - sum(p.numel() for p in merged.parameters()) == removed_params(groups, cut)
        assert_close(merged(**inputs).logits, masked, rtol=1e-5, atol=1e-5)
        apply_cut(net, groups, cut)  # LoRA is cut with its layers
        assert_close(net(**inputs).logits, masked, rtol=1e-5, atol=1e-5)
        assert_close(net.merge_and_unload()(**inputs).logits, masked, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "bert", "gpt2"])
def test_faint_neurons_are_found(name):
    """Half of the neurons read and write a hundredth of the rest; LoRA starts at zero."""
    model = TINY[name]()
    groups = [g for g in find_groups(model) if g.what == "neurons"]
    faint = torch.arange(32) % 2 == 0
    with torch.no_grad():
        for part in (p for g in groups for p in g.parts):
            layer = UnionLayer(model.get_submodule(part.path))
            weight = layer.frozen_weight()
            (weight if part.side == "out" else weight.T)[faint] *= 0.01
    net, _ = lora_net(name, model=model, zero_b=True)
    found = run(name, GradualPruner(groups, {"neurons": 0.5}, every=1), net, 10)
    for group in groups:
        assert torch.equal(found[f"mask.{group.id}"] == 0, faint)


# --- settings ------------------------------------------------------------------------------------


def test_config_is_complete_json():
    groups = find_groups(TINY["bert"]())
    config = GradualPruner(groups).config
    assert json.loads(json.dumps(config)) == config
    others = [
        GradualPruner(groups, {"heads": 0.25, "neurons": 0.5}),
        GradualPruner(groups, criterion=LoraGuided(eta=1.0)),
        GradualPruner(groups, criterion=Magnitude()),
        GradualPruner(groups, every=5),
        GradualPruner(groups, decay=0.5),
        GradualPruner(groups, warmup=0.2),
        GradualPruner(groups, cooldown=0.0),
        GradualPruner(groups, scope={"neurons": "global"}),
        GradualPruner(find_groups(TINY["bert"](num_hidden_layers=3)), skip_layers="paper"),
        GradualPruner(groups, one_shot=True),
        GradualPruner(groups[:2]),
    ]
    keys = {json.dumps(p.config, sort_keys=True) for p in others} | {json.dumps(config)}
    assert len(keys) == len(others) + 1
    same = GradualPruner(groups, {"neurons": 0.5, "heads": 0.5}, scope={"heads": "layer"})
    assert same.config == config


@pytest.mark.parametrize(("layers", "kept_whole"), [(2, {1}), (10, {0, 9}), (32, {0, 1, 2, 31})])
def test_layers_the_paper_leaves_alone(layers, kept_whole):
    with torch.device("meta"):
        groups = find_groups(TINY["llama"](num_hidden_layers=layers))
    pruner = GradualPruner(groups, skip_layers="paper")
    assert {g.layer for g in groups} - {g.layer for g in pruner.pruned} == kept_whole
    assert len(GradualPruner(groups).pruned) == 2 * layers


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ratios": {"head": 0.5}}, "head"),
        ({"ratios": {"heads": 1.0}}, r"\[0, 1\)"),
        ({"ratios": {"heads": 0.01}}, "none of the 4 heads"),
        ({"ratios": {"heads": 0.0}}, "nothing would be pruned"),
        ({"scope": {"heads": "stack"}}, "stack"),
        ({"skip_layers": "first"}, "none, paper"),
        ({"every": 0}, "every must be"),
        ({"decay": 1.0}, "decay must be"),
        ({"warmup": 0.6, "cooldown": 0.4}, "warmup and cooldown"),
    ],
)
def test_settings_that_are_not_allowed(settings, message):
    with pytest.raises(ConfigError, match=message):
        GradualPruner(find_groups(TINY["bert"]()), **settings)


def test_grouped_queries_go_together():
    groups = find_groups(TINY["llama"]())
    assert {g.n_units for g in groups if g.what == "heads"} == {2}
    with pytest.raises(ConfigError, match="share"):
        GradualPruner(groups, {"heads": 0.25})


def test_calls_out_of_order_are_refused():
    net, groups = lora_net("bert")
    pruner = GradualPruner(groups)
    with pytest.raises(StateError, match="attach"):
        pruner.step()
    pruner.attach(net)
    with pytest.raises(StateError, match="start"):
        pruner.step()
    with pytest.raises(ConfigError, match="steps must be"):
        pruner.start(0)
    pruner.start(5)
    with pytest.raises(StateError, match="no step was scored"):
        pruner.stop()
    pruner.abandon()
    assert not any(module._forward_pre_hooks for module in net.modules())
