"""S-MaM: scores and rounds by hand, invariance, the start that changes nothing, budgets, replay."""

import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing import assert_close

from prunepeft.budget import Fidelity
from prunepeft.candidates import make_space
from prunepeft.config import RunConfig
from prunepeft.errors import BudgetError, ConfigError, StateError, UnknownNameError
from prunepeft.evaluate import Watched
from prunepeft.kinds import cost, seeded, slot_cost
from prunepeft.sites import find_sites
from prunepeft.strategies import Problem, SMam
from prunepeft.strategies.first_order import FirstOrder
from prunepeft.strategies.make import make_strategy
from prunepeft.strategies.s_mam import choose_sizes
from prunepeft.supernet import attach, detach, slot_layers, slot_parameters, trainable_state
from tests.tiny_models import TINY, tiny_inputs

SIZES = {"lora": 4, "serial_adapter": 4, "parallel_adapter": 4, "dora": 4, "prefix": 4}


def make_net(name: str = "bert", kinds=("lora", "serial_adapter", "bitfit"), *, noise=0.2):
    model = TINY[name]()
    sizes = {k: n for k, n in SIZES.items() if k in kinds}
    net = attach(model, make_space(find_sites(model), list(kinds), sizes=sizes).full())
    for slot_id, parameters in slot_parameters(net).items():
        for path, p in parameters.items():
            p.data += noise * torch.randn(p.shape, generator=seeded(1, slot_id, path))
    return net


def loss_of(net, batch) -> Tensor:
    return net(**batch).logits.float().square().sum() / 10


def score(net, *, steps: int = 1, pieces=(0,), **given) -> dict[str, Tensor]:
    """Scores without any learning: the weights stay."""
    watcher = FirstOrder(**({"balanced": False} | given))
    watcher.attach(net)
    watcher.start(steps)
    watcher.mark()
    for _ in range(steps):
        for seed in pieces:
            loss_of(net, tiny_inputs("bert", net, seed=seed)).backward()
        watcher.step()
        net.zero_grad()
    return watcher.stop()


# --- scores --------------------------------------------------------------------------------


def test_scores_by_hand() -> None:
    net = make_net(kinds=("lora", "bitfit", "prefix"))
    found = {how: score(net, aggregate=how) for how in ("mean", "sum", "signed")}
    loss_of(net, tiny_inputs("bert", net, seed=0)).backward()
    for slot_id, layers in slot_layers(net).items():
        terms = []
        for layer, kind in layers:
            params = layer.params("default", kind)
            if kind == "lora":
                both = {n: (p * p.grad).detach() for n, p in params.items()}
                terms.append(torch.cat([both["A"], both["B"].T], 1))  # (r, d_in + d_out)
            elif kind == "prefix":
                terms += [(p * p.grad).detach() for p in params.values()]  # (r, d_kv) each
            else:
                terms.append((params["db"] * params["db"].grad).detach()[None])
        terms = torch.cat(terms, 1)
        halved = 2 if "lora" in slot_id else 1
        assert_close(found["sum"][slot_id], terms.abs().sum(1), rtol=1e-5, atol=1e-9)
        assert_close(found["mean"][slot_id], terms.abs().mean(1), rtol=1e-5, atol=1e-9)
        signed = terms.sum(1).abs() / halved
        assert_close(found["signed"][slot_id], signed, rtol=1e-3, atol=1e-7)


def test_signed_sums_of_the_two_factors_are_equal() -> None:
    net = make_net(kinds=("lora",))
    loss_of(net, tiny_inputs("bert", net)).backward()
    for layers in slot_layers(net).values():
        for layer, kind in layers:
            a, b = layer.params("default", kind).values()
            one, other = (a * a.grad).sum(1), (b * b.grad).sum(0)
            assert_close(one, other, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("aggregate", ["mean", "sum", "signed"])
def test_rescaled_factors_have_the_same_scores(aggregate: str) -> None:
    plain, scaled = make_net(kinds=("lora",)), make_net(kinds=("lora",))
    with torch.no_grad():
        for parameters in slot_parameters(scaled).values():
            for name, p in parameters.items():
                p.mul_(8.0 if name.endswith("A") else 1 / 8)
    found = score(plain, aggregate=aggregate), score(scaled, aggregate=aggregate)
    for slot_id in found[0]:
        assert_close(found[0][slot_id], found[1][slot_id], rtol=1e-4, atol=1e-6)


def test_first_order_ranks_small_weights_as_removing_them_does() -> None:
    draw = torch.Generator().manual_seed(0)
    w = nn.Parameter(0.01 * torch.randn(6, generator=draw, dtype=torch.float64))
    x = torch.randn(20, 6, generator=draw, dtype=torch.float64)
    y = x @ torch.randn(6, generator=draw, dtype=torch.float64)

    def loss(values: Tensor) -> Tensor:
        return (x @ values - y).square().mean()

    loss(w).backward()
    change = []
    for i in range(6):
        without = w.detach().clone()
        without[i] = 0
        change.append(abs(float(loss(without) - loss(w.detach()))))
    guess = (w * w.grad).abs().detach()
    assert guess.argsort().tolist() == torch.tensor(change).argsort().tolist()


def test_gradients_are_summed_before_the_absolute_value_and_steps_averaged() -> None:
    net = make_net()
    pieces = score(net, pieces=(0, 1))
    whole = FirstOrder(balanced=False)
    whole.attach(net)
    sum(loss_of(net, tiny_inputs("bert", net, seed=s)) for s in (0, 1)).backward()
    whole.step()
    once = whole.stop()
    net.zero_grad()
    twice = score(net, steps=2, pieces=(0, 1))
    for slot_id in once:
        assert_close(pieces[slot_id], once[slot_id], rtol=1e-4, atol=1e-8)
        assert_close(twice[slot_id], once[slot_id], rtol=1e-4, atol=1e-8)


def test_units_of_every_kind() -> None:
    net = make_net(kinds=("lora", "serial_adapter", "bitfit", "ia3"))
    found, whole = score(net), score(net, whole=True)
    for slot_id in found:
        assert len(found[slot_id]) == (1 if slot_id.endswith(("bitfit", "ia3")) else 4)
        assert len(whole[slot_id]) == 1
        assert found[slot_id].min() >= 0


def test_fresh_modules_whose_kind_is_neutral_elsewhere_score_nothing() -> None:
    net = make_net(kinds=("dora", "ia3", "lnfit", "ssl", "ssb", "bitfit"), noise=0.0)
    for found in score(net, whole=True).values():
        assert not found.any()


@pytest.mark.parametrize("kind", ["ia3", "lnfit", "ssl", "ssb", "bitfit"])
def test_scores_say_what_removing_the_module_changes(kind: str) -> None:
    net = make_net(kinds=(kind,), noise=1e-3)
    found = score(net, aggregate="signed")
    batch = tiny_inputs("bert", net, seed=0)
    net.double()

    def loss() -> Tensor:
        return net(**batch).logits.square().sum() / 10

    changes = {}
    with torch.no_grad():
        before = loss()
        for slot_id, layers in slot_layers(net).items():
            for gate in (0.0, 1.0):
                if gate:
                    changes[slot_id] = (loss() - before).abs()[None].float()
                for layer, name in layers:
                    layer.branches["default"][name].gate = gate
    largest = max(float(change) for change in changes.values())
    assert largest > 1e-6
    for slot_id, change in changes.items():
        assert_close(found[slot_id], change, rtol=0.1, atol=0.02 * largest)


def test_only_the_last_epoch_counts_and_one_begun_again_counts_once() -> None:
    net = make_net()
    plain = score(net)
    watcher = FirstOrder(balanced=False)
    watcher.attach(net)
    watcher.start(2)
    for seed, begin in ((5, watcher.mark), (6, watcher.mark), (0, watcher.reset)):
        begin()
        loss_of(net, tiny_inputs("bert", net, seed=seed)).backward()
        watcher.step()
        net.zero_grad()
    found = watcher.stop()
    for slot_id in plain:
        assert torch.equal(found[slot_id], plain[slot_id])


# --- the balanced start --------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "t5", "vit"])
def test_a_balanced_start_changes_nothing_and_leaves_no_factor_zero(name: str) -> None:
    kinds = ["lora", "dora", "serial_adapter", "parallel_adapter", "ia3"]
    net = make_net(name, kinds, noise=0.0).train()
    net.eval()
    batch = tiny_inputs(name, net)
    with net.disable_adapter(), torch.no_grad():
        base = net(**batch).logits
    watcher = FirstOrder(seed=2)
    frozen = [n for n, p in net.named_parameters() if not p.requires_grad]
    trained = set(trainable_state(net))
    watcher.attach(net)
    assert set(trainable_state(net)) == trained
    out = net(**batch).logits
    assert_close(out, base, rtol=1e-5, atol=1e-5)
    out.float().square().sum().backward()
    for slot_id, parameters in slot_parameters(net).items():
        for path, p in parameters.items():
            if slot_id.endswith(("lora", "adapter")) and p.ndim > 1:
                assert p.any(), path
                assert p.grad.any(), path
    watcher.step()
    assert all(s.min() > 0 for i, s in watcher.stop().items() if i.endswith("lora"))
    assert [n for n, p in net.named_parameters() if not p.requires_grad] == frozen
    with torch.no_grad():
        assert not torch.allclose(net(**batch).logits, base, atol=1e-4)


def test_from_a_zero_factor_its_partner_scores_nothing() -> None:
    net = make_net(kinds=("lora",), noise=0.0)
    assert all(not s.any() for s in score(net).values())
    assert all(s.min() > 0 for s in score(net, balanced=True).values())


def test_balanced_values_depend_on_the_seed_alone() -> None:
    states = []
    for seed in (0, 0, 1):
        net = make_net(kinds=("lora",), noise=0.0)
        torch.rand(3)
        watcher = FirstOrder(seed=seed)
        watcher.attach(net)
        states.append(trainable_state(net))
        watcher.abandon()
        watcher.abandon()
        base = {n: p.clone() for n, p in TINY["bert"]().named_parameters()}
        again = detach(net)
        assert all(torch.equal(p, base[n]) for n, p in again.named_parameters())
    assert all(torch.equal(states[0][n], states[1][n]) for n in states[0])
    assert any(not torch.equal(states[0][n], states[2][n]) for n in states[0])


def test_misuse_is_refused() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'mean'"):
        FirstOrder(aggregate="means")
    net = make_net()
    watcher = FirstOrder()
    watcher.attach(net)
    with pytest.raises(StateError, match="recorded already"):
        watcher.attach(net)
    with pytest.raises(StateError, match="no optimiser step"):
        watcher.stop()
    assert all(
        layer.branches["default"][kind].origin is None
        for layers in slot_layers(net).values()
        for layer, kind in layers
    )


# --- rounds --------------------------------------------------------------------------------


def per_unit(**each: int):
    return lambda slot_id, n: n * each[slot_id]


def test_sizes_by_hand() -> None:
    scores = {"a": [4.0, 1.0, 2.0], "b": [3.0, 0.5], "c": [2.5]}
    each = per_unit(a=2, b=3, c=5)
    assert choose_sizes(scores, each, 17) == {"a": 3, "b": 2, "c": 1}
    assert choose_sizes(scores, each, 14) == {"a": 3, "b": 1, "c": 1}
    # 0.5, 1 and 2 go (9 left too many by one), then 2.5; afterwards 2 and 1 fit again.
    assert choose_sizes(scores, each, 9) == {"a": 3, "b": 1}
    assert choose_sizes(scores, each, 2) == {"a": 1}
    with pytest.raises(BudgetError, match="not even with one rank"):
        choose_sizes(scores, each, 1)


class MockEvaluator:
    """Scores are a function of everything that defines a run; calls are kept."""

    def __init__(self) -> None:
        self.calls: list[dict] = []

    def watch(self, placement, watcher, **given):
        self.calls.append({"placement": placement, "config": watcher.config} | given)
        found = {}
        for slot, size in placement.sizes.items():
            is_one = watcher.config["whole"] or slot.kind == "bitfit"
            draw = seeded(given["seed"], slot.id, placement.digest)
            found[slot.id] = torch.rand(1 if is_one else size, generator=draw)
        return Watched(found, key="k", seconds=1.0, steps=8, rows=5)


BERT_SITES = find_sites(TINY["bert"]())


def make_problem(limit: int, unit: str = "parameters", seed: int = 0) -> Problem:
    kinds = ("lora", "serial_adapter", "bitfit")
    space = make_space(BERT_SITES, list(kinds), sizes={k: 4 for k in kinds[:2]})
    return Problem(space, limit, unit, MockEvaluator(), 100, Fidelity(), seed)


@settings(max_examples=60, deadline=None)
@given(
    share=st.one_of(st.floats(0.001, 0.02), st.floats(0.001, 1.1)),
    unit=st.sampled_from(["parameters", "modules", "rank"]),
    rounds=st.integers(1, 6),
    schedule=st.sampled_from(["linear", "geometric"]),
    seed=st.integers(0, 50),
)
def test_budget_schedule_and_nesting(share, unit, rounds, schedule, seed) -> None:
    total = cost(make_problem(1).space.full(), unit)
    problem = make_problem(int(total * share), unit, seed)
    strategy = SMam(rounds=rounds, schedule=schedule)
    one = {s: s.sizes[-1] if unit == "modules" or s.kind == "bitfit" else 1 for s in problem.space}
    least = {s.id: slot_cost(s, n, unit) for s, n in one.items()}
    if min(least.values()) > problem.limit:
        with pytest.raises(BudgetError, match="smallest unit of a module"):
            strategy.search(problem)
        assert problem.evaluator.calls == []
        return
    found = strategy.search(problem)
    assert found.history["too_large"] == [i for i, n in least.items() if n > problem.limit]
    total -= cost(problem.space.full(), unit) - cost(
        problem.space.full().without(set(found.history["too_large"])), unit
    )
    assert 0 < problem.cost(found.placement) <= problem.limit
    sizes = {s.id: n for s, n in problem.space.full().sizes.items()}
    for entry in found.history["rounds"]:
        target = strategy.target(entry["round"], total, problem.limit)
        assert entry["cost_after"] <= target < entry["cost_before"]
        assert all(n <= sizes[i] for i, n in entry["sizes"].items())
        for slot in problem.space:  # nothing that went in this round would fit
            had, has = sizes.get(slot.id, 0), entry["sizes"].get(slot.id, 0)
            step = had if unit == "modules" or slot.kind == "bitfit" else 1
            if has < had:
                held = slot_cost(slot, has, unit) if has else 0
                more = slot_cost(slot, has + step, unit) - held
                assert entry["cost_after"] + more > target
        sizes = entry["sizes"]
    assert {s.id: n for s, n in found.placement.sizes.items()} == sizes
    json.dumps(found.history)
    again = strategy.search(replace(problem, evaluator=MockEvaluator()))
    assert (again.placement, again.history) == (found.placement, found.history)


def test_a_budget_of_one_rank_is_met() -> None:
    """At its largest size no module fits, and a module whose one rank does not fit is left out."""
    space = make_space(BERT_SITES, ["lora", "serial_adapter"], sizes={"lora": 4})
    one = min(slot_cost(s, 1, "parameters") for s in space)
    problem = replace(make_problem(one), space=space)
    assert min(problem.slot_costs().values()) > one
    found = SMam(rounds=3).search(problem)
    assert problem.cost(found.placement) == one
    assert any("adapter" in i for i in found.history["too_large"])


def test_every_round_starts_afresh_and_sees_what_is_left() -> None:
    total = cost(make_problem(1).space.full(), "parameters")
    problem = make_problem(total // 4)
    result = SMam(rounds=4).search(problem)
    calls = problem.evaluator.calls
    assert len(calls) == len(result.history["rounds"]) == result.runs == 4
    assert len({c["init_seed"] for c in calls}) == len({c["seed"] for c in calls}) == 4
    assert len({c["config"]["seed"] for c in calls}) == 4
    costs = [problem.cost(c["placement"]) for c in calls]
    assert costs == [r["cost_before"] for r in result.history["rounds"]]
    targets = [total - (total - problem.limit) * j // 4 for j in (1, 2, 3)]
    largest = max(slot_cost(s, 1, "parameters") for s in problem.space)
    assert all(t - largest < c <= t for c, t in zip(costs[1:], targets, strict=True))


def test_modules_are_the_units_of_a_budget_in_modules() -> None:
    problem = make_problem(5, "modules")
    placement = SMam(rounds=2).search(problem).placement
    assert len(placement) == 5
    assert all(n == slot.sizes[-1] for slot, n in placement.sizes.items())
    assert all(c["config"]["whole"] for c in problem.evaluator.calls)


def test_nothing_is_trained_if_all_fit() -> None:
    problem = make_problem(10**9)
    assert SMam().search(problem).placement == problem.space.full()
    assert problem.evaluator.calls == []


def test_settings() -> None:
    given = {"rounds": 7, "schedule": "geometric", "aggregate": "signed", "balanced": False}
    config = RunConfig(model="m", data="d", budget="1%", method="smam", smam=given)
    assert make_strategy(config) == SMam(**given)
    for wrong in ({"rounds": 0}, {"schedule": "cubic"}, {"aggregate": "max"}):
        with pytest.raises(ConfigError, match=f"smam.{next(iter(wrong))}"):
            SMam(**wrong)
