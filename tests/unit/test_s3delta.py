"""S3Delta: worked numbers, exact gradients, gates on real small models, budgets, replay."""

import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from prunepeft.budget import Fidelity
from prunepeft.candidates import make_space
from prunepeft.config import RunConfig
from prunepeft.criteria.select import prune_to, removal_order
from prunepeft.errors import BudgetError, ConfigError, StateError, UnknownNameError
from prunepeft.evaluate import Watched
from prunepeft.kinds import cost, seeded, slot_cost
from prunepeft.sites import find_sites
from prunepeft.strategies import Problem, S3Delta
from prunepeft.strategies.gate_search import GateSearch
from prunepeft.strategies.make import make_strategy
from prunepeft.strategies.shifted_sigmoid import concrete, gate_probabilities, shift
from prunepeft.supernet import attach, gate_slots, slot_layers, slot_parameters, trainable_state
from tests.tiny_models import TINY, tiny_inputs

COSTS = torch.tensor([10.0, 10.0, 20.0, 40.0], dtype=torch.float64)
LOGITS = torch.tensor([2.0, 0.0, 1.0, -1.0], dtype=torch.float64)
G = torch.tensor([-1.0, 0.2, 0.5, 0.1], dtype=torch.float64)
EVERY_STAGE = ("lora", "serial_adapter", "parallel_adapter", "ia3", "bitfit", "lnfit", "prefix")


def random_case(seed: int, n: int, share: float) -> tuple[Tensor, Tensor, float]:
    draw = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(n, generator=draw, dtype=torch.float64)
    costs = torch.randint(1, 1000, (n,), generator=draw).double()
    return logits, costs, share * float(costs.sum())


# --- the shifted sigmoid -------------------------------------------------------------------


def test_shift_and_probabilities_by_hand() -> None:
    equal = gate_probabilities(torch.zeros(4, dtype=torch.float64), COSTS, 20)
    assert_close(equal, torch.full_like(equal, 0.25))
    assert shift(LOGITS, COSTS, 20).item() == pytest.approx(1.38197, abs=1e-5)
    p = gate_probabilities(LOGITS, COSTS, 20)
    assert p.tolist() == pytest.approx([0.6498, 0.2007, 0.4057, 0.0846], abs=5e-5)
    order = removal_order(dict(zip("0123", (1 - p).tolist(), strict=True)), "0123")
    costs = dict(zip("0123", COSTS.int().tolist(), strict=True))
    assert order == ["3", "1", "2", "0"]
    assert sorted(set("0123") - set(prune_to(costs, order, 20))) == ["0", "1"]


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 999),
    n=st.integers(1, 40),
    share=st.floats(1e-4, 0.9999),
    beta=st.sampled_from([0.2, 1.0, 5.0]),
    gradient=st.sampled_from(["implicit", "detach"]),
)
def test_expected_cost_is_the_budget_whatever_the_logits(seed, n, share, beta, gradient) -> None:
    logits, costs, budget = random_case(seed, n, share)
    p = gate_probabilities(logits, costs, budget, beta, gradient)
    assert float((costs * p).sum()) == pytest.approx(budget, rel=1e-9)
    assert_close(gate_probabilities(logits + 7, costs, budget, beta), p, rtol=1e-9, atol=1e-12)
    if 2 * budget < float(costs.sum()):
        assert (gate_probabilities(logits, costs, 2 * budget, beta) > p).all()


def test_budget_limits() -> None:
    nearly = gate_probabilities(LOGITS, COSTS, 80 - 1e-9)
    assert_close(nearly, torch.ones(4, dtype=torch.float64), rtol=0, atol=1e-6)
    for budget in (0, 80, 100):
        with pytest.raises(BudgetError, match="keep all modules"):
            shift(LOGITS, COSTS, budget)
    with pytest.raises(UnknownNameError, match="did you mean 'implicit'"):
        gate_probabilities(LOGITS, COSTS, 20, gradient="implict")


@pytest.mark.parametrize(
    ("gradient", "expected"),
    [
        ("implicit", [-0.2146, 0.0412, 0.1480, 0.0254]),
        ("detach", [-0.1600, 0.0797, 0.1922, 0.0307]),
    ],
)
def test_gradients_by_hand(gradient: str, expected: list[float]) -> None:
    a = LOGITS.clone().requires_grad_()
    (found,) = torch.autograd.grad(gate_probabilities(a, COSTS, 20, gradient=gradient), a, G)
    assert found.tolist() == pytest.approx(expected, abs=5e-5)


def test_detached_gradient_of_p_by_hand() -> None:
    p = gate_probabilities(LOGITS, COSTS, 20)
    slope = G - (G * p).sum() / p.sum()
    assert slope.tolist() == pytest.approx([-0.7029, 0.4971, 0.7971, 0.3971], abs=5e-5)
    assert float((p * slope).sum()) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("beta", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("seed", range(3))
def test_implicit_gradient_is_that_of_the_function(seed: int, beta: float) -> None:
    logits, costs, budget = random_case(seed, 7, 0.3)
    a = logits.requires_grad_()
    assert torch.autograd.gradcheck(lambda a: gate_probabilities(a, costs, budget, beta), a)
    spent = (costs * gate_probabilities(a, costs, budget, beta)).sum()
    assert torch.autograd.grad(spent, a)[0].abs().max() < 1e-9 * budget


def test_concrete_gates_by_hand() -> None:
    p = torch.full((3,), 0.6498, dtype=torch.float64)
    u = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    assert concrete(p, u).tolist() == pytest.approx([0.1709, 0.6498, 0.9435], abs=5e-5)
    grid = (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000
    share = (concrete(p[:1].expand(10_000), grid) > 0.5).double().mean()
    assert share.item() == pytest.approx(0.6498, abs=1e-4)
    edges = concrete(p[:1].expand(2), torch.tensor([0.0, 1.0], dtype=torch.float64))
    assert edges.isfinite().all()


# --- gates on real small models ------------------------------------------------------------


def make_net(name: str, kinds=EVERY_STAGE):
    """All stages, with modules of random values."""
    model = TINY[name]()
    sizes = {k: 2 for k in ("lora", "serial_adapter", "parallel_adapter", "prefix") if k in kinds}
    space = make_space(find_sites(model), list(kinds), sizes=sizes)
    net = attach(model, space.full())
    for slot_id, parameters in slot_parameters(net).items():
        for path, p in parameters.items():
            p.data += 0.2 * torch.randn(p.shape, generator=seeded(1, slot_id, path))
    return net, {s.id: slot_cost(s, s.sizes[-1], "parameters") for s in space}


def watcher_of(costs: dict[str, int], **given) -> GateSearch:
    return GateSearch(costs, sum(costs.values()) // 2, seed=3, **given)


def gates_of(net) -> list[Tensor]:
    return [
        layers[0][0].branches["default"][layers[0][1]].gate for layers in slot_layers(net).values()
    ]


def loss_of(net, batch) -> Tensor:
    out = net(**batch).logits
    return out.float().square().mean()


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "t5", "vit"])
def test_every_gate_gets_its_gradient_and_does_nothing_at_one(name: str) -> None:
    kinds = [k for k in EVERY_STAGE if not (name in ("llama", "t5") and k == "bitfit")]
    kinds = [k for k in kinds if not (name == "t5" and k == "prefix")]
    net, costs = make_net(name, kinds)
    net.eval()
    batch = tiny_inputs(name, net)
    with torch.no_grad():
        plain = net(**batch).logits
    search = watcher_of(costs)
    search.attach(net)
    gates = gates_of(net)
    with torch.no_grad():
        for gate in gates:
            gate.fill_(1.0)
    loss = loss_of(net, batch)
    assert_close(net(**batch).logits, plain, rtol=0, atol=1e-6)
    slopes = torch.autograd.grad(loss, gates)
    for i in range(0, len(gates), 7):  # and it is the right one
        with torch.no_grad():
            sides = []
            for value in (1.01, 0.99):
                gates[i].fill_(value)
                sides.append(loss_of(net, batch))
            gates[i].fill_(1.0)
        found = (sides[0] - sides[1]) / 0.02
        assert_close(slopes[i], found, rtol=2e-2, atol=2e-4)
    n_zero = sum(slope == 0 for slope in slopes)
    assert n_zero == 0
    search.abandon()
    assert all(gate == 1.0 and not isinstance(gate, Tensor) for gate in gates_of(net))
    assert_close(net(**batch).logits, plain, rtol=0, atol=0)


def train(net, search, batches, rates=1e-2, repeat_from=None):
    """Steps of micro-batches; the pass may be begun again, as after lack of memory."""
    search.attach(net)
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], rates)
    search.start(len(batches))
    search.mark()
    if repeat_from is not None:
        for pieces in batches[:repeat_from]:
            for batch in pieces:
                loss_of(net, batch).backward()
            search.step()
            net.zero_grad()
        search.reset()
    trail = []
    for pieces in batches:
        before = trainable_state(net)
        logits = search._state.logits
        for batch in pieces:
            loss_of(net, batch).backward()
        search.step()
        optimizer.step()
        optimizer.zero_grad()
        after = trainable_state(net)
        own = [n for n in after if "search_gates" not in n]
        trail.append(
            (
                any(not torch.equal(before[n], after[n]) for n in own),
                not torch.equal(logits, search._state.logits),
            )
        )
    return trail, search.stop()


def batches_of(net, steps: int = 4):
    return [[tiny_inputs("bert", net, seed=2 * s + k) for k in (0, 1)] for s in range(steps)]


@pytest.mark.parametrize("update", ["alternate", "joint"])
def test_who_learns_in_which_step(update: str) -> None:
    net, costs = make_net("bert", ("lora",))
    trail, found = train(net, watcher_of(costs, update=update), batches_of(net))
    joint = [(True, True)] * 4
    assert trail == (joint if update == "joint" else [(True, False), (False, True)] * 2)
    n = torch.tensor([float(c) for c in costs.values()], dtype=torch.float64)
    spent = (n * found["probability"]).sum().item()
    assert spent == pytest.approx(sum(costs.values()) // 2, rel=1e-9)
    assert not any("search_gates" in name for name in trainable_state(net))


def test_one_step_alone_is_joint() -> None:
    net, costs = make_net("bert", ("lora",))
    trail, _ = train(net, watcher_of(costs), batches_of(net, 1))
    assert trail == [(True, True)]


def test_a_pass_begun_again_finds_the_same() -> None:
    runs = []
    for repeat_from in (None, 3):
        net, costs = make_net("bert", ("lora", "serial_adapter"))
        runs.append(train(net, watcher_of(costs), batches_of(net), repeat_from=repeat_from)[1])
    for name in ("logit", "probability"):
        assert torch.equal(runs[0][name], runs[1][name])
    assert runs[0]["logit"].abs().sum() > 0


def test_noise_depends_on_seed_and_step_alone() -> None:
    net, costs = make_net("bert", ("lora",))
    seen = []
    for seed in (3, 3, 4):
        search = GateSearch(costs, sum(costs.values()) // 2, seed=seed)
        torch.rand(5)
        search.attach(net)
        seen.append(torch.stack(gates_of(net)).detach())
        search.abandon()
    assert torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[0], seen[2])


def test_gates_refuse_what_does_not_fit() -> None:
    net, costs = make_net("bert", ("lora",))
    search = watcher_of(costs)
    search.attach(net)
    with pytest.raises(StateError, match="on a model already"):
        search.attach(net)
    search.abandon()
    search.abandon()
    costs.popitem()
    with pytest.raises(StateError, match="one for each"):
        watcher_of(costs).attach(net)


def test_merging_and_removing_know_tensor_gates() -> None:
    net, costs = make_net("bert", ("lora",))
    search = watcher_of(costs)
    search.attach(net)
    with pytest.raises(StateError, match="gated module cannot be merged"):
        net.merge_adapter()
    search.abandon()
    gate_slots(net, dict.fromkeys(costs, 1.0))
    net.merge_adapter()


# --- the strategy --------------------------------------------------------------------------


class MockEvaluator:
    """Probabilities from useful slots and noise; calls are kept."""

    def __init__(self) -> None:
        self.calls: list[dict] = []

    def watch(self, placement, watcher, **given):
        self.calls.append({"ids": placement.ids, "config": watcher.config} | given)
        draw = seeded(given["seed"], placement.digest)
        logits = torch.randn(len(placement), generator=draw, dtype=torch.float64)
        c = watcher.config
        found = {"logit": logits, "probability": watcher._probabilities(logits)}
        assert list(c["costs"]) == list(placement.ids)
        return Watched(found, key="k", seconds=1.0, steps=8, rows=5)


BERT_SITES = find_sites(TINY["bert"]())


def make_problem(limit: int, unit: str = "parameters", kinds=("lora", "bitfit"), seed=0) -> Problem:
    space = make_space(BERT_SITES, list(kinds), sizes={"lora": 4})
    return Problem(space, limit, unit, MockEvaluator(), 100, Fidelity(), seed)


@settings(max_examples=60, deadline=None)
@given(
    share=st.floats(0.001, 1.1),
    unit=st.sampled_from(["parameters", "modules", "rank"]),
    seed=st.integers(0, 50),
)
def test_budget_is_never_exceeded_and_no_removed_module_would_fit(share, unit, seed) -> None:
    total = cost(make_problem(1).space.full(), unit)
    problem = make_problem(int(total * share), unit, seed=seed)
    costs = problem.slot_costs()
    if min(costs.values()) > problem.limit:
        with pytest.raises(BudgetError, match="smallest module"):
            S3Delta().search(problem)
        return
    found = S3Delta().search(problem)
    spent = problem.cost(found.placement)
    assert 0 < spent <= problem.limit
    gone = set(costs) - set(found.placement.ids)
    assert all(spent + costs[i] > problem.limit for i in gone)
    json.dumps(found.history)
    again = S3Delta().search(replace(problem, evaluator=MockEvaluator()))
    assert again.placement == found.placement
    assert again.history == found.history


def test_nothing_is_trained_if_all_fit() -> None:
    problem = make_problem(10**9)
    found = S3Delta().search(problem)
    assert found.placement == problem.space.full()
    assert problem.evaluator.calls == []


def test_modules_over_the_budget_take_no_part() -> None:
    problem = make_problem(150)
    result = S3Delta().search(problem)
    (call,) = problem.evaluator.calls
    large = {i for i, n in problem.slot_costs().items() if n > 150}
    assert (
        large
        == set(result.history["too_large"])
        == set(problem.space.full().ids) - set(call["ids"])
    )
    assert large <= set(result.history["rounds"][0]["removed"])


def test_settings_reach_the_watcher_and_wrong_ones_are_refused() -> None:
    config = RunConfig(
        model="m", data="d", budget="1%", method="s3delta",
        s3delta={"update": "joint", "gradient": "detach", "logit_lr": 0.05, "beta": 2},
    )  # fmt: skip
    strategy = make_strategy(config)
    assert strategy == S3Delta("joint", "detach", 0.05, 2.0, 2.0)
    problem = make_problem(1000)
    strategy.search(problem)
    told = problem.evaluator.calls[0]["config"]
    assert (told["update"], told["gradient"], told["lr"]) == ("joint", "detach", 0.05)
    for wrong in ({"update": "both"}, {"gradient": "exact"}, {"beta": 0.0}, {"logit_lr": -1.0}):
        with pytest.raises(ConfigError, match=f"s3delta.{next(iter(wrong))}"):
            S3Delta(**wrong)
