"""BIPEFT: worked numbers, gates of ranks on real small models, who learns when, pruning."""

import itertools
import json
from collections import Counter
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close
from transformers import T5Config, T5ForConditionalGeneration

from prunepeft.budget import Budget, Fidelity
from prunepeft.candidates import make_space
from prunepeft.config import RunConfig
from prunepeft.config.names import expand_presets
from prunepeft.errors import BudgetError, ConfigError, StateError
from prunepeft.evaluate import Watched
from prunepeft.kinds import cost, seeded, slot_cost
from prunepeft.sites import count_base_params, find_sites
from prunepeft.strategies import Bipeft, Problem
from prunepeft.strategies import bipeft_rules as rules
from prunepeft.strategies.bipeft_gates import ModuleGates
from prunepeft.strategies.bipeft_search import BipeftSearch
from prunepeft.strategies.bipeft_state import Pruning
from prunepeft.strategies.make import make_strategy
from prunepeft.supernet import attach, shrink_slot, slot_layers, slot_parameters, trainable_state
from tests.tiny_models import TINY, tiny_inputs

RANKED = ("lora", "dora", "alore", "serial_adapter", "parallel_adapter", "low_rank_adapter")


def double(values) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


# --- worked numbers ------------------------------------------------------------------------


def test_when_selections_agree() -> None:
    now, other = double([1, 0, 0, 1]), double([1, 0, 1, 0])
    assert rules.is_settled([now] * 4 + [other], now, 0.85, 5)  # 0.9
    assert not rules.is_settled([now] * 3 + [other] * 2, now, 0.85, 5)  # 0.8
    assert not rules.is_settled([now] * 4, now, 0.0, 5)
    assert rules.is_settled([other] * 9 + [now] * 5, now, 0.99, 5)


def test_expected_costs_by_hand() -> None:
    logits, costs = double([[0, 0, 1]]), double([[2048, 8192, 16384]])
    share = torch.softmax(logits, -1)
    assert share[0].tolist() == pytest.approx([0.212, 0.212, 0.576], abs=5e-4)
    free, held = torch.tensor([-1]), torch.tensor([1])
    assert rules.expected_costs(logits, costs, free).item() == pytest.approx(11_609, abs=1)
    there = rules.expected_costs(logits, costs, free, double([0.6]))
    assert there.item() == pytest.approx(6_966, abs=1)
    assert rules.expected_costs(logits, costs, held).item() == 8192


def pruning(costs, budget: int, **given) -> Pruning:
    settings = {"fires": 2, "begin": 0, "threshold": 0.85, "window": 5, "decay": 0.85} | given
    return Pruning(double(costs), budget, **settings)


def test_sensitivity_is_smoothed() -> None:
    rule = pruning([[1.0]], 1)
    state = rule.first(0)
    for value in (1, 2, 3):
        state = rule.judged(state, double([value]))
    assert state.sensitivity.item() == pytest.approx(0.813375)


def test_importance_by_hand() -> None:
    weights = [double([1, -2]), double([[2, 0], [0, 0]])]
    structure = [double([2, 1]), double([[1, 0], [0, 0]])]
    s_w, s_a, c = 5 / 6, 4 / 6, (0 + 1) / 2
    expected = {
        "mixed": s_w + c * s_a,
        "weights": s_w,
        "structure": s_a,
        "sum": s_w + s_a,
        "agreed": c * (s_w + s_a),
    }
    assert set(expected) == set(rules.CRITERIA)
    for name, value in expected.items():
        assert rules.importance(weights, structure, 6, name).item() == pytest.approx(value)
    none = [torch.zeros(2), torch.zeros(2, 2)]
    assert rules.importance(none, structure, 6).item() == 0
    tiny = [1e-25 * p.float() for p in weights]
    assert rules.importance(tiny, tiny, 6).item() == pytest.approx(2e-25 * s_w)


def test_the_least_sensitive_go_in_order() -> None:
    e, n, kept = double([4, 1, 3, 2]), double([1, 5, 1, 3]), torch.tensor([True] * 4)
    assert rules.removals(e, n, kept, 8) == [1, 3]
    assert rules.removals(e, n, kept, 1) == [1]  # costs more, goes anyway
    assert rules.removals(e, n, kept, 100) == [1, 3, 2]  # the last stays
    assert rules.removals(e, n, kept, 0) == []
    assert rules.removals(e, n, torch.tensor([True, False, False, False]), 9) == []


def test_dimensions_that_stand_still_are_held_first() -> None:
    moving = double([[0.1, 0, 0.2], [0.1, 0, 0.4], [0.1, 0, 0.6]])
    still = double([[0.0, 3, 0]] * 3)
    history = torch.stack([moving, still, moving], 1)  # (T, N, C)
    assert rules.instability(history)[1] == 0
    free, kept = torch.full((3,), -1), torch.tensor([True] * 3)
    assert rules.newly_frozen(history, free, kept, 3).tolist() == [-1, 1, -1]
    assert rules.newly_frozen(history, free, kept, 1).tolist() == [2, 1, 2]
    gone = torch.tensor([True, False, True])
    assert rules.newly_frozen(history, free, gone, 2).tolist() == [2, -1, -1]
    few = history.clone()
    few[:, :, 2] = -torch.inf  # no such candidate
    assert rules.instability(few).isfinite().all()
    # index 0 that stays is agreement; with the cosine of indices it would be none
    low = double([[[1.0, 0.0]], [[2.0, 0.0]]])
    assert rules.newly_frozen(low, torch.tensor([-1]), torch.tensor([True]), 1).tolist() == [0]


def test_samples_are_one_hot_with_the_gradient_of_the_softmax() -> None:
    logits = double([[0.0, 1.0, -torch.inf], [2.0, 0.0, 0.0]]).requires_grad_()
    noise = rules.gumbel((2, 3), torch.Generator().manual_seed(0))
    sample = rules.one_hot_sample(logits, noise, 2.0)
    assert_close(sample.detach(), sample.detach().round(), rtol=0, atol=1e-12)
    weight = double([[1.0, 3.0, 7.0], [2.0, -1.0, 0.5]])
    (found,) = torch.autograd.grad((sample * weight).sum(), logits)
    soft = torch.softmax((logits + noise) / 2.0, -1)
    (wanted,) = torch.autograd.grad((soft * weight).sum(), logits)
    assert_close(found, wanted)
    assert found.isfinite().all()
    draws = rules.gumbel((20_000, 2), torch.Generator().manual_seed(1))
    share = rules.one_hot_sample(double([0.0, 1.0]), draws, 0.5)[:, 1].mean()
    assert share.item() == pytest.approx(torch.sigmoid(torch.tensor(1.0)).item(), abs=0.01)


# --- the paper's spaces --------------------------------------------------------------------


def t5_large(n_layers: int) -> T5ForConditionalGeneration:
    """Of full width, without weights."""
    width = {"d_model": 1024, "d_kv": 64, "d_ff": 4096, "num_heads": 16, "vocab_size": 32_128}
    with torch.device("meta"):
        config = T5Config(num_layers=n_layers, num_decoder_layers=n_layers, **width)
        return T5ForConditionalGeneration(config)


def test_budgets_of_the_paper_are_per_ten_thousand() -> None:
    one, two = (count_base_params(t5_large(n)) for n in (1, 2))
    n_base = one + 23 * (two - one)
    assert n_base == 737_668_096
    written = {410_400: 5.563, 102_600: 1.391, 25_700: 0.348, 12_825: 0.174, 6_412: 0.087}
    for count, tenthousandths in written.items():
        assert 1e4 * count / n_base == pytest.approx(tenthousandths, abs=6e-4)
    assert Budget.parse("0.0139%").limit(n_base) == pytest.approx(102_600, rel=1e-3)
    # Those of S3Delta, which has the same unit.
    assert Budget.parse("0.01389%").limit(n_base) == 102_462
    assert Budget.parse("0.00348%").limit(n_base) == pytest.approx(25_671, abs=1)


def test_inventory_of_the_paper() -> None:
    sites = [s for s in find_sites(t5_large(1)) if s.block != "cross_attention" or s.role == "norm"]
    kinds = [k for k in expand_presets(["bipeft-s1"]) if k != "bitfit"]  # t5 has no bias
    roles = {"lora": tuple((r,) for r in ("q", "k", "v", "o", "up", "down"))}
    sizes = {"lora": 8, "low_rank_adapter": 8}
    space = make_space(sites, kinds, sizes=sizes, roles=roles)
    found = Counter((s.kind, slot_cost(s, s.sizes[-1], "parameters")) for s in space)
    lora = {("lora", 16_384): 8, ("lora", 40_960): 4}
    assert found == lora | {("low_rank_adapter", 17_952): 4, ("lnfit", 1024): 5}
    assert 24 * (8 + 4 + 4) == 384
    # A bias for every layer and norm, the scales, and both for the two norms after the last layer.
    assert 24 * (len(sites) + 5) + 4 == 532
    biases = 48 * (4 * 1024 + 4096 + 1024) + (5 * 24 + 2) * 1024
    scales = (5 * 24 + 2) * 1024
    for rank, total in ((8, 9_493_504), (1, 1_881_088)):  # of BIPEFT, and of S3Delta's space "M"
        matrices = sum(slot_cost(s, rank, "parameters") for s in space if s.kind != "lnfit")
        assert 24 * matrices + biases + scales == total
    kinds = expand_presets(["bipeft-s2"])
    space = make_space(sites, kinds, sizes=dict.fromkeys(kinds, 8))
    found = Counter((s.kind, slot_cost(s, s.sizes[-1], "parameters")) for s in space)
    adapters = {("serial_adapter", 17_416): 2, ("parallel_adapter", 17_416): 2}
    assert found == adapters | {("prefix", 16_384): 2}


# --- gates on real small models ------------------------------------------------------------


def make_net(kinds=("lora", "bitfit"), size: int = 4, *, noise: float = 0.2):
    model = TINY["bert"]()
    space = make_space(
        find_sites(model), list(kinds), sizes={k: size for k in kinds if k != "bitfit"}
    )
    net = attach(model, space.full()).eval()
    for slot_id, parameters in slot_parameters(net).items():
        for path, p in parameters.items():
            p.data += noise * torch.randn(p.shape, generator=seeded(1, slot_id, path))
    return net, space


def loss_of(net, seed: int = 0) -> Tensor:
    return net(**tiny_inputs("bert", net, seed=seed)).logits.float().square().mean()


@pytest.mark.parametrize("kind", [*RANKED, "prefix"])
def test_a_gated_module_is_the_one_cut_to_its_first_ranks(kind: str) -> None:
    for size in (1, 2, 4):
        (gated, _), (cut, _) = make_net([kind]), make_net([kind])
        for slot_id, layers in slot_layers(gated).items():
            ModuleGates(layers, ranked=True).set(1.0, size)
            shrink_slot(cut, slot_id, torch.arange(size))
        batch = tiny_inputs("bert", gated)
        with torch.no_grad():
            assert_close(gated(**batch).logits, cut(**batch).logits, rtol=1e-5, atol=1e-6)


def difference(net, gate, index: int) -> float:
    """Slope of the loss by one gate, from steps of it to either side."""
    sides = []
    with torch.no_grad():
        for step in (1e-2, -2e-2, 1e-2):
            gate.view(-1)[index] += step
            sides.append(loss_of(net).item())
    return (sides[0] - sides[1]) / 2e-2


# Not DoRA: its norm has no gradient by design.
@pytest.mark.parametrize("kind", [k for k in RANKED if k != "dora"])
def test_gates_have_the_gradient_of_the_function_also_where_they_are_zero(kind: str) -> None:
    net, _ = make_net([kind])
    gates = [ModuleGates(layers, ranked=True) for layers in slot_layers(net).values()][1]
    for there in (1.0, 0.0):
        gates.set(there, 2)
        loss_of(net).backward()
        slope, ranks = gates.slopes(gates.take_gradients())
        assert slope.item() == pytest.approx(difference(net, gates.presence, 0), rel=3e-2, abs=2e-4)
        for i in (0, 3):
            found = difference(net, gates.ranks, i)
            assert ranks[i].item() == pytest.approx(found, rel=3e-2, abs=2e-4)
        assert bool(ranks[2:].any()) == bool(there)  # ranks that are not shown tell what they would
        net.zero_grad()


def test_a_prefix_that_is_not_shown_tells_what_it_would_do() -> None:
    net, _ = make_net(["prefix"])
    gates = [ModuleGates(layers, ranked=True) for layers in slot_layers(net).values()][1]
    for there in (1.0, 0.0):
        gates.set(there, 2)
        loss_of(net).backward()
        slope, ranks = gates.slopes(gates.take_gradients())
        base = loss_of(net).item()
        with torch.no_grad():
            gates.presence[3 if there else slice(2)] += 1e-2  # gates are over zero
        found = (loss_of(net).item() - base) / 1e-2
        wanted = ranks[3] if there else slope
        assert wanted.item() == pytest.approx(found, rel=0.1, abs=2e-5)
        assert wanted.item() != 0
        net.zero_grad()


def test_the_gradient_of_a_gate_counts_a_product_once() -> None:
    net, _ = make_net(["lora"])
    layers, *_ = slot_layers(net).values()
    gates = ModuleGates(layers, ranked=True)
    loss_of(net).backward()
    _, ranks = gates.slopes(gates.take_gradients())
    through_a = sum(
        (layer.params("default", k)["A"] * layer.params("default", k)["A"].grad).sum(1)
        for layer, k in layers
    )
    assert_close(ranks, through_a.detach(), rtol=1e-4, atol=1e-7)
    gates.leave()
    layer, kind = layers[0]
    assert layer.branches["default"][kind].gate == 1.0
    assert layer.branches["default"][kind].ranks is None


def watcher_of(space, **given) -> BipeftSearch:
    sizes = {s.id: [1, 2, 4] if s.kind != "bitfit" else [1] for s in space}
    costs = {s.id: [slot_cost(s, n, "parameters") for n in sizes[s.id]] for s in space}
    budget = sum(c[-1] for c in costs.values()) // 3
    return BipeftSearch(costs, sizes, budget, **({"seed": 3, "window": 2} | given))


def train(net, search, steps: int, *, repeat_from: int | None = None):
    """Train; what changed in each step, and the states. The pass may be begun again."""
    search.attach(net)
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], 1e-2)
    search.start(steps)
    search.mark()
    if repeat_from is not None:
        for step in range(repeat_from):
            loss_of(net, step).backward()
            search.step()
            net.zero_grad()
        search.reset()
    states = [search._state]
    changed = []
    for step in range(steps):
        before = trainable_state(net)
        for piece in (0, 1):
            loss_of(net, 2 * step + piece).backward()
        search.step()
        optimizer.step()
        optimizer.zero_grad()
        after = trainable_state(net)
        moved = {n for n in after if "bipeft" not in n and not torch.equal(before[n], after[n])}
        changed.append(moved)
        states.append(search._state)
    return changed, states, search.stop()


def test_who_learns_in_which_step() -> None:
    net, space = make_net()
    search = watcher_of(space, prune_steps=1, begin=0.99)
    changed, states, _ = train(net, search, 8)
    assert [search.stage(s) for s in range(8)] == [
        "weights",
        "presence",
        "weights",
        "dimension",
    ] * 2
    for step, (old, new) in enumerate(itertools.pairwise(states)):
        stage = search.stage(step)
        assert bool(changed[step]) == (stage == "weights")
        assert torch.equal(old.presence, new.presence) == (stage != "presence")
        assert torch.equal(old.dimension, new.dimension) == (stage != "dimension")
    assert not any("bipeft" in name for name in trainable_state(net))


def test_products_are_of_the_weights_before_the_update() -> None:
    net, space = make_net()
    search = watcher_of(space)
    search.attach(net)
    search.start(4)
    loss_of(net).backward()
    sizes = [n[k] for n, k in zip(search._numel, search._shown.tolist(), strict=True)]
    wanted = [
        [(p * p.grad).detach() / n for p in ps]
        for ps, n in zip(search._parameters, sizes, strict=True)
    ]
    search.step()
    assert_close(list(search._state.products), wanted, rtol=0, atol=0)
    net.zero_grad()
    loss_of(net, 1).backward()
    search.step()  # on the other rows; nothing of the first step is left in it
    assert (search._state.sensitivity != 0).any()
    assert all(p.grad is None for p in net.parameters())
    search.abandon()


def test_sensitivity_counts_what_each_of_the_two_steps_showed() -> None:
    """A step of the dimensions draws them, and the step of the weights before has the best."""
    net, space = make_net()
    search = watcher_of(space, criterion="weights", decay=0.0, begin=0.99)
    search.attach(net)
    search.start(4)
    for step in range(4):
        loss_of(net, step).backward()
        if step == 2:
            best = search._shown
            sizes = [n[k] for n, k in zip(search._numel, best.tolist(), strict=True)]
            wanted = [
                sum((p * p.grad).abs().sum().item() for p in ps) / n
                for ps, n in zip(search._parameters, sizes, strict=True)
            ]
        drawn = search._shown
        search.step()
        net.zero_grad()
    assert not torch.equal(best, drawn)
    assert_close(search._state.sensitivity, torch.tensor(wanted).double())
    search.abandon()


def test_presence_is_drawn_in_steps_of_the_dimensions_too() -> None:
    net, space = make_net()
    search = watcher_of(space, prune_steps=1, begin=0.99)
    search.attach(net)
    search.start(8)
    hidden = Counter()
    for step in range(8):
        gates = [
            layer.branches["default"][kind].gate
            for layers in slot_layers(net).values()
            for layer, kind in layers
        ]
        hidden[search.stage(step)] += sum(not bool(gate) for gate in gates)
        loss_of(net, step).backward()
        search.step()
        net.zero_grad()
    assert search._state.kept.all()
    search.abandon()
    assert min(hidden[stage] for stage in ("weights", "presence", "dimension")) > 0


def test_multipliers_that_change_nothing_have_no_product() -> None:
    """The loss would not change without them, whatever their gradient."""
    kinds = ("ia3", "lnfit", "ssl", "ssb")
    model = TINY["bert"]()
    space = make_space(find_sites(model), list(kinds))
    costs = {s.id: [slot_cost(s, 1, "parameters")] for s in space}
    for noise in (0.0, 0.1):
        net = attach(TINY["bert"](), space.full()).eval()
        for slot_id, parameters in slot_parameters(net).items():
            for path, p in parameters.items():
                p.data += noise * torch.randn(p.shape, generator=seeded(1, slot_id, path))
        search = BipeftSearch(costs, {i: [1] for i in costs}, 10, seed=3)
        search.attach(net)
        search.start(4)
        loss_of(net).backward()
        search.step()
        found = [sum(t.abs().sum().item() for t in ts) for ts in search._state.products]
        assert any(found) == bool(noise)
        search.abandon()


def test_without_dimensions_only_presence_is_searched() -> None:
    net, space = make_net(["bitfit"])
    search = watcher_of(space)
    train(net, search, 2)
    assert [search.stage(s) for s in range(4)] == ["weights", "presence"] * 2


def test_one_step_alone_trains_both() -> None:
    net, space = make_net()
    changed, states, found = train(net, watcher_of(space), 1)
    assert changed[0]
    assert not torch.equal(states[0].presence, states[1].presence)
    assert found["sensitivity"].any()


def test_a_pass_begun_again_finds_the_same() -> None:
    found = []
    for repeat_from in (None, 3):
        net, space = make_net()
        search = watcher_of(space, threshold=0.0)
        found.append(train(net, search, 12, repeat_from=repeat_from)[2])
    for name, tensor in found[0].items():
        assert torch.equal(tensor, found[1][name]), name
    assert len(found[0]["fires"])


def test_what_was_removed_is_hidden_and_untrained_and_the_others_are_still_judged() -> None:
    net, space = make_net(["lora", "bitfit", "prefix"])
    own = {id(p): i for i, ps in enumerate(slot_parameters(net).values()) for p in ps.values()}
    slot_of = {name: own[id(p)] for name, p in net.named_parameters() if id(p) in own}
    search = watcher_of(space, prune_steps=3, threshold=0.0, begin=0.0)
    changed, states, found = train(net, search, 16)
    fires, last = found["fires"], states[-1]
    assert 0 < len(fires) <= 3
    assert (fires[:, 2] <= fires[:, 1]).all()
    largest = max(max(c) for c in search.config["costs"].values())
    assert fires[-1, 2] - largest < search.config["budget"] < fires[0, 1]
    assert 0 < (last.removed > 0).sum() < len(space)
    for moved, old, new in zip(changed, states, states[1:], strict=False):
        gone = ~old.kept
        assert torch.equal(new.removed[gone], old.removed[gone])
        assert not {slot_of[name] for name in moved} & set(gone.nonzero()[:, 0].tolist())
        shown, _ = search._sampled(old, old.presence, old.dimension)
        assert not shown[gone].any()
    before = states[-3].sensitivity
    assert (last.sensitivity != before)[last.kept].any()
    assert torch.equal(last.sensitivity[~last.kept], before[~last.kept])


def test_the_first_module_removed_does_not_stop_the_rest() -> None:
    rule = pruning([[1.0]] * 4, 2, fires=1, window=1)
    state = rule.first(0)
    values = double([0.0, 1.0, 2.0, 3.0])
    for step in range(1, 12, 2):
        state = rule.judged(replace(state, step=step), values)
    assert state.removed.tolist() == [1, 2, 0, 0]
    later = rule.judged(replace(state, step=13), values)
    assert (later.sensitivity > state.sensitivity).tolist() == [False, False, True, True]


def test_noise_does_not_hide_the_modules_that_matter() -> None:
    found = []
    for seed in range(10):
        draw = torch.Generator().manual_seed(seed)
        matters = torch.randperm(20, generator=draw)[:4]
        rule = pruning([[1.0]] * 20, 5, fires=20, threshold=0.5)
        state = rule.first(seed)
        for step in range(1, 120, 2):
            value = torch.rand(20, generator=draw, dtype=torch.float64)
            value[matters] += 1.0
            shown = torch.rand(20, generator=draw) < 0.5  # no gradient where drawn absent
            state = rule.judged(replace(state, step=step), value * shown)
        assert len(state.fires) <= 20
        spent = [fire[1] for fire in state.fires]
        assert spent[10:] == sorted(spent[10:], reverse=True)
        best = state.sensitivity.where(state.kept, -1.0).topk(5).indices
        found.append(set(matters.tolist()) <= set(best.tolist()))
    assert sum(found) >= 8


def test_every_tensor_of_every_kind_has_a_gradient_after_two_steps() -> None:
    net, space = make_net([*RANKED, "bitfit"], noise=0.0)
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], 1e-2)
    seen: set[int] = set()
    for step in range(3):
        loss_of(net, step).backward()
        seen |= {id(p) for p in net.parameters() if p.grad is not None and p.grad.any()}
        optimizer.step()
        optimizer.zero_grad()
    parameters = slot_parameters(net)
    assert len(parameters) == len(space)
    assert all(id(p) in seen for each in parameters.values() for p in each.values())


def test_gates_refuse_what_does_not_fit() -> None:
    net, space = make_net()
    search = watcher_of(space)
    search.attach(net)
    with pytest.raises(StateError, match="on a model already"):
        search.attach(net)
    with pytest.raises(StateError, match="gated module cannot be merged"):
        net.merge_adapter()
    search.abandon()
    search.abandon()
    other, _ = make_net(["lora"])
    with pytest.raises(StateError, match="one for each"):
        search.attach(other)


# --- the strategy --------------------------------------------------------------------------


class MockEvaluator:
    """What a watcher could find, from noise; calls are kept."""

    def __init__(self) -> None:
        self.calls: list[dict] = []

    def watch(self, placement, watcher, **given):
        c = watcher.config
        self.calls.append({"placement": placement, "config": c} | given)
        assert list(c["costs"]) == list(c["dimensions"]) == list(placement.ids)
        draw = seeded(given["seed"], placement.digest)
        n, counts = len(placement), [len(d) for d in c["dimensions"].values()]
        order = torch.randperm(n, generator=draw) - n // 2
        found = {
            "sensitivity": torch.randn(n, generator=draw),
            "presence": torch.rand(n, generator=draw),
            "dimension": torch.tensor([int(torch.randint(k, (), generator=draw)) for k in counts]),
            "removed": order.clamp(min=0),
            "fires": double([[9.0, 5.0, 4.0, 1.0, 0.0]]),
        }
        return Watched(found, key="k", seconds=1.0, steps=8, rows=5)


BERT_SITES = find_sites(TINY["bert"]())
KINDS = ("lora", "bitfit", "loretta_adp", "prefix")


def make_problem(limit: int, unit: str = "parameters", seed: int = 0, sizes=None) -> Problem:
    space = make_space(BERT_SITES, list(KINDS), sizes={"lora": 8, "prefix": [2, 6]} | (sizes or {}))
    return Problem(space, limit, unit, MockEvaluator(), 100, Fidelity(), seed)


@settings(max_examples=60, deadline=None)
@given(
    share=st.floats(0.0005, 1.1),
    unit=st.sampled_from(["parameters", "modules", "rank"]),
    seed=st.integers(0, 50),
)
def test_budget_is_never_exceeded_and_sizes_are_candidates(share, unit, seed) -> None:
    total = cost(make_problem(1).space.full(), unit)
    problem = make_problem(int(total * share), unit, seed)
    candidates = Bipeft().candidates(problem)
    if not candidates:
        with pytest.raises(BudgetError, match="smallest module"):
            Bipeft().search(problem)
        return
    found = Bipeft().search(problem)
    assert 0 < problem.cost(found.placement) <= problem.limit
    assert all(n in candidates[s] for s, n in found.placement.sizes.items())
    json.dumps(found.history)
    again = Bipeft().search(replace(problem, evaluator=MockEvaluator()))
    assert (again.placement, again.history) == (found.placement, found.history)


def test_candidate_dimensions() -> None:
    def of(problem: Problem, strategy: Bipeft) -> dict[str, list[int]]:
        return {s.kind: sizes for s, sizes in strategy.candidates(problem).items()}

    everything = make_problem(10**9)
    found = {"lora": [1, 2, 4, 8], "bitfit": [1], "loretta_adp": [8], "prefix": [2, 6]}
    assert of(everything, Bipeft()) == found
    one = {"lora": [8], "bitfit": [1], "loretta_adp": [8], "prefix": [6]}
    assert of(everything, Bipeft(dimensions=1)) == one
    assert of(make_problem(99, "modules"), Bipeft()) == one
    assert of(everything, Bipeft(dimensions=2))["lora"] == [4, 8]
    given_sizes = make_problem(10**9, sizes={"lora": [1, 4, 8]})
    assert of(given_sizes, Bipeft())["lora"] == [1, 4, 8]
    small = of(make_problem(5, "rank"), Bipeft())
    assert small == {"lora": [1, 2, 4], "bitfit": [1], "prefix": [2]}


def test_removed_modules_return_only_to_fill_the_budget() -> None:
    problem = make_problem(7, "modules")
    result = Bipeft().search(problem)
    (call,) = problem.evaluator.calls
    n = len(call["placement"])
    assert result.runs == 1
    assert len(result.placement) == 7
    order = torch.randperm(n, generator=seeded(call["seed"], call["placement"].digest)) - n // 2
    standing = {i for i, o in zip(call["placement"].ids, order.tolist(), strict=True) if o <= 0}
    assert set(result.placement.ids) <= standing


def test_nothing_is_trained_if_all_fit() -> None:
    problem = make_problem(10**9)
    assert Bipeft().search(problem).placement == problem.space.full()
    assert problem.evaluator.calls == []


def test_settings_reach_the_watcher_and_wrong_ones_are_refused() -> None:
    own = {
        "arch_lr": 0.02, "prune_steps": 7, "threshold": 0.5, "begin": 0.1, "tau_first": 3.0,
        "tau_last": 0.5, "criterion": "agreed", "window": 3, "decay": 0.5, "dimensions": 2,
        "l1": 0.1,
    }  # fmt: skip
    strategy = make_strategy(
        RunConfig(model="m", data="d", budget="1%", method="bipeft", bipeft=own)
    )
    assert strategy == Bipeft(**own)
    problem = make_problem(2000)
    strategy.search(problem)
    told = problem.evaluator.calls[0]["config"]
    assert told["tau"] == [3.0, 0.5]
    same = set(own) - {"tau_first", "tau_last", "dimensions"}
    assert {k: told[k] for k in same} == {k: own[k] for k in same}
    wrong = (
        {"criterion": "max"},
        {"arch_lr": 0.0},
        {"threshold": 2.0},
        {"window": 0},
        {"l1": -1.0},
    )
    for values in wrong:
        with pytest.raises(ConfigError, match=f"bipeft.{next(iter(values))}"):
            Bipeft(**values)
