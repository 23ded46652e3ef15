"""AutoPEFT on mock objectives: the layer space, the transform, the loop, and what it finds."""

import itertools
import json
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from prunepeft.budget import Fidelity
from prunepeft.config import load_config
from prunepeft.errors import BudgetError, ConfigError, MissingExtraError
from prunepeft.evaluate import Tried
from prunepeft.kinds import cost, count_params, slot_kind
from prunepeft.pareto import front, hypervolume
from prunepeft.space import Placement, SearchSpace, Site, Slot
from prunepeft.strategies import AutoPeft, Problem, RandomSearch, bayesian
from prunepeft.strategies.bayesian import climb
from prunepeft.strategies.copula import Copula
from prunepeft.strategies.layer_space import LayerSpace, widened
from prunepeft.strategies.make import make_strategy

KINDS = ("serial_adapter", "parallel_adapter", "prefix")
NO_LIMIT = 10**12
needs_botorch = pytest.mark.skipif(
    bayesian.find_spec("botorch") is None, reason="botorch is not installed"
)
FEW_DRAWS = bayesian.NUTS | {"warmup_steps": 16, "num_samples": 8, "max_tree_depth": 3}
needs_nuts = pytest.mark.skipif(
    any(bayesian.find_spec(name) is None for name in bayesian.NEEDS["nuts"][0]),
    reason="botorch, jax or numpyro is not installed",
)


def make_space(n_layers=6, size=8, d=64, kinds=KINDS) -> SearchSpace:
    """One slot of each kind in each layer, of the shapes of a BERT encoder."""
    slots = []
    for layer in range(n_layers):
        where = ("encoder", layer, n_layers)
        v = Site(f"l.{layer}.v", *where, "attention", "v", d, d)
        down = Site(f"l.{layer}.down", *where, "ffn", "down", 4 * d, d, f"l.{layer}.up")
        for kind in kinds:
            slots.append(Slot((v if kind in ("prefix", "ia3") else down,), kind, (size,)))
    return SearchSpace(tuple(slots))


class MockEvaluator:
    """Two layers count, and sizes that saturate; costs are real."""

    def __init__(self, fails=(), important=(2, 5)) -> None:
        self.fails, self.important = set(fails), important
        self.calls: list[str] = []

    def trial(self, placement, *, name, fidelity, seed) -> Tried:
        self.calls.append(placement.digest)
        if len(self.calls) in self.fails:
            return Tried(error="StateError: the training loss became nan", steps=10)
        return Tried({"accuracy": self.metric(placement)}, key=name, seconds=1.0, steps=10)

    def metric(self, placement: Placement) -> float:
        layers = {slot.layer for slot in placement}
        sizes = {slot.kind: n for slot, n in placement.sizes.items()}
        a, b = self.important
        value = 1.0 * (a in layers) + 0.7 * (b in layers)
        value += 0.3 * (1 - math.exp(-sizes.get("serial_adapter", 0) / 6))
        return 0.3 * (value + 0.1 * (1 - math.exp(-sizes.get("prefix", 0) / 4)))


def make_problem(space=None, limit=None, evaluator=None, unit="parameters", seed=0) -> Problem:
    space = make_space() if space is None else space
    limit = cost(space.full(), unit) // 2 if limit is None else limit
    evaluator = evaluator or MockEvaluator()
    problem = Problem(space, limit, unit, evaluator, 1000, Fidelity(), seed)
    return replace(problem, metric="accuracy", batch_size=10)


def layer_space(space: SearchSpace, limit: int = NO_LIMIT, unit="parameters") -> LayerSpace:
    return LayerSpace.of(widened(space, limit, unit), limit, unit)


def two_stacks() -> SearchSpace:
    """A decoder with cross-attention beside an encoder, as in T5."""
    slots = []
    for stack in ("encoder", "decoder"):
        for layer in range(2):
            for block in ("attention", "cross_attention")[: 1 + (stack == "decoder")]:
                site = Site(f"{stack}.{layer}.{block}.q", stack, layer, 2, block, "q", 8, 8)
                slots.append(Slot((site,), "lora", (4,)))
        site = Site(f"{stack}.1.down", stack, 1, 2, "ffn", "down", 16, 8, f"{stack}.1.up")
        slots.append(Slot((site,), "serial_adapter", (2,)))
    return SearchSpace(tuple(slots))


# --- sizes and counts ---------------------------------------------------------------------------


def test_sizes_are_halved_down_to_one():
    space = widened(make_space(2, 768, 768), NO_LIMIT, "parameters")
    assert space.slots[0].sizes == (1, 3, 6, 12, 24, 48, 96, 192, 384, 768)


def test_sizes_double_while_one_module_fits_and_is_no_wider_than_the_layer():
    space = make_space(2, 8, 64, ("serial_adapter",))
    sizes = {
        limit: widened(space, limit, "parameters").slots[0].sizes
        for limit in (NO_LIMIT, 2 * 64 * 32 + 32 + 64, 2 * 64 * 32 + 32 + 63, 10)
    }
    assert list(sizes.values()) == [
        (1, 2, 4, 8, 16, 32, 64),
        (1, 2, 4, 8, 16, 32),
        (1, 2, 4, 8, 16),
        (1, 2, 4, 8),
    ]
    assert widened(space, 32, "rank").slots[0].sizes[-1] == 32
    assert widened(space, 32, "modules").slots[0].sizes == (1, 2, 4, 8)


@pytest.mark.parametrize("options", [{}, {"alpha": 16.0}, {"rslora": True}], ids=str)
def test_larger_sizes_do_not_change_the_scaling(options):
    (slot,) = make_space(1, 8, 64, ("lora",)).slots
    slot = replace(slot, options=tuple(options.items()))
    (wide,) = widened(SearchSpace((slot,)), NO_LIMIT, "parameters").slots
    assert wide.sizes[-1] > 8
    assert slot_kind(wide).scaling(wide.sizes[-1]) == pytest.approx(slot_kind(slot).scaling(8))


def test_given_sizes_stay_and_kinds_without_a_size_are_on_or_off():
    space = SearchSpace(tuple(replace(s, sizes=(3, 5)) for s in make_space(2).slots))
    assert widened(space, NO_LIMIT, "parameters") == space
    ia3 = make_space(2, 1, 64, ("ia3",))
    assert widened(ia3, NO_LIMIT, "parameters") == ia3
    assert layer_space(ia3).n_choices == (2, 2, 2)
    slots = space.slots
    uneven = SearchSpace((replace(slots[0], sizes=(2,)), *slots[1:]))
    with pytest.raises(ConfigError, match=r"no size is allowed in all.*sizes.serial_adapter"):
        widened(uneven, NO_LIMIT, "parameters")


# layers, serial adapter, parallel adapter, prefix -> parameters without biases, share of BERT-base
TABLE = [
    (12, 6, 0, 3, 165_888, 0.1515),
    (3, 0, 24, 1, 115_200, 0.1052),
    (1, 0, 0, 1, 1_536, 0.0014),
    (12, 768, 768, 768, 42_467_328, 38.79),
]


@pytest.mark.parametrize(("layers", "serial", "parallel", "prefix", "n", "percent"), TABLE)
def test_counts_of_bert_base_differ_by_the_biases_alone(
    layers, serial, parallel, prefix, n, percent
):
    space = layer_space(make_space(12, 768, 768))
    wanted = (serial, parallel, prefix)
    choices = [sizes.index(w) + 1 if w else 0 for sizes, w in zip(space.sizes, wanted, strict=True)]
    vector = (1,) * layers + (0,) * (12 - layers) + tuple(choices)
    biases = layers * sum(width + 768 for width in (serial, parallel) if width)
    assert layers * 2 * 768 * sum(wanted) == n
    assert round(100 * n / 109_482_240, len(str(percent).partition(".")[2])) == percent
    assert space.cost(vector) == count_params(space.decode(vector)) == n + biases


# --- vectors ------------------------------------------------------------------------------------


def test_the_paper_space_has_as_many_vectors_as_it_says():
    space = layer_space(make_space(12, 768, 768))
    assert math.prod(space.n_choices) == 2**12 * 11**3 == 5_451_776
    assert space.names[0] == "encoder.0"
    assert space.names[-3:] == KINDS
    inner = (1, 0) * 6 + (4, 5, 6)
    assert len(space.neighbours(inner)) == 12 + 3 * 10


def test_a_vector_needs_a_layer_and_a_kind_and_every_one_that_has_survives_the_way_back():
    space = layer_space(make_space(3, 768, 768))
    vectors = itertools.product(*(range(n) for n in space.n_choices))
    valid = [v for v in vectors if space.is_valid(v)]
    assert len(valid) == (2**3 - 1) * (11**3 - 1) == 9_310
    assert (2**12 - 1) * (11**3 - 1) == 5_446_350  # of the paper's twelve layers
    assert all(space.encode(space.decode(v)) == v for v in valid)


@pytest.mark.parametrize("limit", [NO_LIMIT, 12_000, 900, 128])
def test_vectors_placements_and_codes_agree(limit):
    space = layer_space(make_space(4), limit)
    draw = torch.Generator().manual_seed(0)
    vectors = [space.draw(draw) for _ in range(100)]
    codes = space.codes(vectors)
    assert codes.dtype == torch.float64
    assert 0 <= codes.min() <= codes.max() <= 1
    assert space.costs_of(codes.unsqueeze(1)).squeeze(1).tolist() == list(map(space.cost, vectors))
    for vector in vectors:
        placement = space.decode(vector)
        assert space.is_valid(vector)
        assert space.encode(placement) == vector
        assert 0 < cost(placement, "parameters") == space.cost(vector) <= limit
        assert len({(s.layer, s.kind) for s in placement}) == len(placement)
        assert len({(s.kind, n) for s, n in placement.sizes.items()}) == len(placement.kinds)


@settings(max_examples=30, deadline=None)
@given(share=st.floats(0.02, 1.2), two=st.booleans(), seed=st.integers(0, 10**6))
def test_neighbours_differ_in_one_variable_and_are_valid(share, two, seed):
    base = two_stacks() if two else make_space(4)
    limit = max(200, int(cost(base.full(), "parameters") * share))
    space = layer_space(base, limit)
    vector = space.draw(torch.Generator().manual_seed(seed))
    near = space.neighbours(vector)
    assert len(set(near)) == len(near)
    for other in near:
        assert space.is_valid(other)
        assert sum(a != b for a, b in zip(vector, other, strict=True)) == 1


def test_two_stacks_have_switches_of_their_own_and_no_two_vectors_are_equal():
    space = layer_space(two_stacks())
    assert space.names == (
        "decoder.0", "decoder.1", "encoder.0", "encoder.1", "lora", "serial_adapter",
    )  # fmt: skip
    assert space.n_choices == (2, 2, 2, 2, 5, 5)  # lora 1..8, adapters 1..8
    every = list(vectors_of(space))
    assert len({space.decode(v).digest for v in every}) == len(every)
    assert not space.is_valid((1, 0, 1, 0, 0, 3))  # no adapter there
    assert not space.is_valid((1, 1, 0, 0, 0, 3))  # nothing in decoder.0
    assert space.is_valid((0, 1, 0, 0, 0, 3))
    assert not space.is_valid((0,) * 6)
    assert len(space.decode((0, 1, 0, 0, 2, 0))) == 2  # self- and cross-attention


def vectors_of(space: LayerSpace):
    ranges = (range(n) for n in space.n_choices)
    grid = torch.cartesian_prod(*(torch.tensor(list(r)) for r in ranges)).tolist()
    return (tuple(v) for v in grid if space.is_valid(tuple(v)))


def test_a_placement_of_several_sizes_has_no_vector():
    space = layer_space(make_space(2))
    whole = space.decode((1, 1, 2, 0, 0)).sizes
    first, second = whole
    with pytest.raises(ConfigError, match="the same for all layers"):
        space.encode(Placement({first: whole[first], second: 2 * whole[second]}))


def test_draws_use_every_variable_alike_and_find_a_small_space_whole():
    space = layer_space(make_space(4))
    draw = torch.Generator().manual_seed(0)
    codes = space.codes([space.draw(draw) for _ in range(600)])
    assert (codes[:, :4].mean(0) - 0.5).abs().max() < 0.1
    tight = layer_space(make_space(3, 1, 16), 100)
    every = set(vectors_of(tight))
    found = tight.draw_new(10 * len(every), set(), draw)
    assert set(found) == every
    assert len(found) == len(every)
    assert tight.draw_new(1, every, draw) == []


# --- transform and local search -----------------------------------------------------------------


def test_ranks_in_the_middle_of_their_step():
    values = torch.tensor([0.70, 0.80, 0.90, 0.85])
    copula = Copula(values)
    expected = torch.tensor([-1.150, -0.319, 1.150, 0.319], dtype=torch.float64)
    assert_close(copula(values), expected, atol=1e-3, rtol=0)
    equal = Copula(torch.tensor([1.0, 2.0, 2.0, 3.0]))(torch.tensor([1.0, 2.0, 3.0]))
    assert_close(equal, torch.tensor([-1.150, 0.0, 1.150]).double(), atol=1e-3, rtol=0)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(-50, 0), st.integers(0, 30)), min_size=1, max_size=30))
def test_the_transform_keeps_order_and_front_and_reference(points):
    columns = [torch.tensor([float(p[i]) for p in points]) for i in (0, 1)]
    mapped = [Copula(column)(column) for column in columns]
    for before, after in zip(columns, mapped, strict=True):
        assert after.isfinite().all()
        assert after.dtype == torch.float64
        assert torch.equal(before[:, None] < before, after[:, None] < after)
    assert front(list(zip(*(m.tolist() for m in mapped), strict=True))) == front(points)
    lowest = columns[1].min()
    assert Copula(columns[1])(lowest - 0.5) < mapped[1].min()


def test_ascent_takes_the_best_neighbour_until_there_is_none():
    tops = {(7,): 1.0, (20,): 2.0}
    seen: list[tuple[int]] = []

    def value(points):
        seen.extend(points)
        return [max(h - abs(p[0] - t[0]) / 10 for t, h in tops.items()) for p in points]

    def near(p):
        return [(q,) for q in (p[0] - 1, p[0] + 1) if 0 <= q < 30 and q != 20]

    assert climb(value, [(2,)], near) == (7,)
    assert climb(value, [(2,), (25,)], near) == (21,)  # 20 may not be taken
    seen.clear()
    assert climb(value, [(2,), (25,)], near, most=5) in {(3,), (24,)}
    assert len(set(seen)) == len(seen) <= 5


# --- the loop -----------------------------------------------------------------------------------

FEW = {"n_trials": 11, "initial": 5, "batch": 3, "surrogate": "gp"}


@pytest.fixture(scope="module")
def whole():
    """A search with two failed trials, one of them random, and its problem."""
    problem = make_problem(make_space(4), evaluator=MockEvaluator(fails=(2, 7)), seed=3)
    before = torch.random.get_rng_state()
    result = AutoPeft(**FEW).search(problem)
    assert torch.equal(torch.random.get_rng_state(), before)
    return problem, result


@needs_botorch
def test_exactly_the_trials_asked_for_none_twice_none_over_the_budget(whole):
    problem, result = whole
    trials = result.history["trials"]
    assert len(problem.evaluator.calls) == len(trials) == result.runs == 11
    assert len(set(problem.evaluator.calls)) == 11
    assert all(0 < t["cost"] <= problem.limit for t in trials)
    assert [t["number"] for t in trials if t["status"] == "failed"] == [2, 7]
    best = max((t for t in trials if t["metric"] is not None), key=lambda t: t["metric"])
    assert result.placement.digest == best["placement"]


@needs_botorch
def test_vectors_are_those_of_the_placements_that_were_trained(whole):
    problem, result = whole
    space = layer_space(problem.space, problem.limit)
    history = json.loads(json.dumps(result.history))
    assert history == result.history
    assert history["variables"] == list(space.names)
    for trial, vector in zip(history["trials"], history["vectors"], strict=True):
        assert space.decode(tuple(vector)).digest == trial["placement"]
    slots = Placement.from_dict(history["space"]).sizes
    by_id = {s.id: s for s in slots}
    again = Placement({by_id[i]: n for i, n in history["trials"][0]["sizes"].items()})
    assert again.digest == history["trials"][0]["placement"]


@needs_botorch
def test_the_trace_is_the_hypervolume_below_a_reference_of_the_first_trials(whole):
    problem, result = whole
    history = result.history
    points = [
        (-100 * t["cost"] / problem.limit, t["metric"])
        for t in history["trials"]
        if t["metric"] is not None
    ]
    trace, (x, y) = history["hypervolume"], history["reference"]
    assert x == -110
    assert y < min(points[i][1] for i in front(points[:4]))
    assert trace == sorted(trace)
    assert trace[0] > 0
    assert trace[-1] == pytest.approx(hypervolume(points, (x, y)))


@needs_botorch
def test_the_run_of_the_paper_has_its_numbers_of_trials(monkeypatch):
    """200 trials: 100 random ones, then 25 batches of 4."""
    seen = []

    def suggest(space, observed, known, reference, n, surrogate, generator):
        seen.append((len(observed), n, surrogate))
        return space.draw_new(n, known, generator)

    monkeypatch.setattr(bayesian, "suggest", suggest)
    monkeypatch.setattr(bayesian, "require", lambda surrogate: None)
    problem = make_problem(make_space(12, 768, 768))
    AutoPeft(n_trials=200, initial=100, surrogate="nuts").search(problem)
    assert len(problem.evaluator.calls) == len(set(problem.evaluator.calls)) == 200
    assert seen == [(n, 4, "nuts") for n in range(100, 200, 4)]


class Stopped(Exception):
    pass


@needs_botorch
@pytest.mark.parametrize("killed", [3, 8])
def test_a_search_that_was_killed_goes_on_to_the_same_end(whole, killed):
    journal: dict[str, Tried] = {}
    done = MockEvaluator(fails=(2, 7))

    class Kept(MockEvaluator):
        def trial(self, placement, **kwargs):
            if placement.digest not in journal:
                if len(journal) == self.until:
                    raise Stopped
                journal[placement.digest] = done.trial(placement, **kwargs)
            return journal[placement.digest]

    evaluator = Kept()
    problem = make_problem(make_space(4), evaluator=evaluator, seed=3)
    evaluator.until = killed
    with pytest.raises(Stopped):
        AutoPeft(**FEW).search(problem)
    evaluator.until = 99
    resumed = AutoPeft(**FEW).search(problem)
    assert len(done.calls) == 11
    assert [t["placement"] for t in resumed.history["trials"]] == whole[0].evaluator.calls
    assert resumed.placement == whole[1].placement


@needs_botorch
def test_a_surrogate_that_cannot_be_fitted_ends_nothing(monkeypatch, caplog):
    seeds = []

    from botorch.exceptions.errors import ModelFittingError

    def fail(surrogate, codes, values, seed):
        seeds.append(seed)
        raise ModelFittingError("not positive definite")

    monkeypatch.setattr(bayesian, "fit", fail)
    result = AutoPeft(**FEW).search(make_problem())
    assert len(result.history["trials"]) == 11
    assert len(seeds) == 4  # two batches, two tries each, with other seeds
    assert len(set(seeds)) == 4
    assert "not positive definite" in caplog.text
    assert "proposing at random" in caplog.text


@needs_botorch
def test_a_fit_that_fails_once_is_tried_again(monkeypatch, caplog):
    tries = []

    def suggest(*args):
        tries.append(args)
        if len(tries) == 1:
            raise ValueError("nan")
        return ["chosen"]

    monkeypatch.setattr(bayesian, "_suggest", suggest)
    draw = torch.Generator().manual_seed(0)
    space = layer_space(make_space(2))
    assert bayesian.suggest(space, {}, set(), (0, 0), 1, "gp", draw) == ["chosen"]
    assert not caplog.records


@needs_botorch
def test_if_nearly_all_first_trials_fail_more_random_ones_follow():
    evaluator = MockEvaluator(fails=range(1, 6))
    settings_ = {**FEW, "n_trials": 8, "initial": 4}
    result = AutoPeft(**settings_).search(make_problem(evaluator=evaluator))
    assert [t["status"] for t in result.history["trials"]] == ["failed"] * 5 + ["ok"] * 3
    assert result.history["reference"][1] < result.history["trials"][5]["metric"]


@needs_botorch
def test_a_space_that_is_used_up_ends_the_search():
    problem = make_problem(make_space(2, 1, 16, ("serial_adapter",)), 2 * 16 + 1 + 16)
    result = AutoPeft(n_trials=10, initial=2, surrogate="gp").search(problem)
    assert sorted(result.history["vectors"]) == [[0, 1, 1], [1, 0, 1]]


@needs_botorch
def test_a_budget_above_all_sizes_tries_nothing():
    problem = make_problem(limit=10**9)
    result = AutoPeft().search(problem)
    assert problem.evaluator.calls == []
    assert {*result.placement.sizes.values()} == {64}


@needs_botorch
@pytest.mark.parametrize("unit", ["modules", "rank"])
def test_other_budgets_and_a_metric_that_falls(unit):
    problem = replace(make_problem(make_space(4), 6, unit=unit), greater_is_better=False)
    result = AutoPeft(n_trials=8, initial=4, surrogate="gp").search(problem)
    trials = result.history["trials"]
    assert len(trials) == 8
    assert all(t["cost"] <= 6 for t in trials)
    best = trials[result.history["best"] - 1]
    assert best["metric"] == min(t["metric"] for t in trials)
    assert result.history["hypervolume"] == sorted(result.history["hypervolume"])


# --- what it finds ------------------------------------------------------------------------------


def volume(result, limit: int) -> float:
    points = [(-100 * t["cost"] / limit, t["metric"]) for t in result.history["trials"]]
    return hypervolume(points, (-110, 0))


@needs_botorch
@pytest.mark.slow
@pytest.mark.parametrize("surrogate", ["gp", "map-saas"])
def test_it_beats_random_search_in_hypervolume(surrogate):
    wins = [0, 0]
    for seed in range(10):
        problem = make_problem(seed=seed)
        wide = replace(problem, space=widened(problem.space, problem.limit, problem.unit))
        found = AutoPeft(n_trials=21, surrogate=surrogate).search(problem)
        uniform = AutoPeft(n_trials=21, initial=21).search(problem)
        filled = RandomSearch(n_trials=21).search(wide)
        mine, *others = (volume(r, problem.limit) for r in (found, uniform, filled))
        wins = [w + (mine > other) for w, other in zip(wins, others, strict=True)]
    assert min(wins) >= 8


@needs_botorch
@pytest.mark.parametrize("seed", range(2))
def test_the_sparse_prior_finds_the_layers_that_count(seed):
    space = layer_space(make_space(8))
    draw = torch.Generator().manual_seed(seed)
    vectors = space.draw_new(40, set(), draw)
    metric = torch.tensor([MockEvaluator().metric(space.decode(v)) for v in vectors])
    before = torch.random.get_rng_state()
    model = bayesian.fit("map-saas", space.codes(vectors), Copula(metric)(metric), seed)
    assert torch.equal(torch.random.get_rng_state(), before)
    lengths = model.covar_module.base_kernel.lengthscale.detach()  # (taus, 1, D)
    assert lengths.dtype == torch.float64
    median = lengths.squeeze(1).median(0).values
    assert set(median.topk(2, largest=False).indices.tolist()) == {2, 5}


@needs_nuts
@pytest.mark.slow
def test_the_prior_of_the_paper_is_sampled_in_double_precision_the_same_for_one_seed(monkeypatch):
    import botorch.fit
    import jax

    seen, sample = [], botorch.fit.fit_fully_bayesian_model_nuts

    def looked_at(*args, **kwargs):
        seen.append(jax.numpy.zeros(1).dtype)
        sample(*args, **kwargs)

    monkeypatch.setattr(botorch.fit, "fit_fully_bayesian_model_nuts", looked_at)
    monkeypatch.setattr(bayesian, "NUTS", FEW_DRAWS)
    space = layer_space(make_space(4))
    draw = torch.Generator().manual_seed(0)
    vectors = space.draw_new(16, set(), draw)
    metric = torch.tensor([MockEvaluator().metric(space.decode(v)) for v in vectors])
    before = torch.random.get_rng_state()
    codes = space.codes(vectors)
    models = [bayesian.fit("nuts", codes, Copula(metric)(metric), seed) for seed in (3, 3, 4)]
    assert torch.equal(torch.random.get_rng_state(), before)
    assert [str(dtype) for dtype in seen] == ["float64"] * 3
    assert not jax.config.jax_enable_x64
    found = [model.posterior(codes).mean for model in models]
    assert found[0].shape == (2, 16, 1)  # one of four samples is kept
    assert found[0].dtype == torch.float64
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


@needs_nuts
@pytest.mark.slow
def test_a_search_with_the_prior_of_the_paper(monkeypatch):
    monkeypatch.setattr(bayesian, "NUTS", FEW_DRAWS)
    result = AutoPeft(n_trials=6, initial=5, surrogate="nuts").search(make_problem(make_space(3)))
    assert len(result.history["trials"]) == 6


@needs_botorch
def test_a_search_with_the_sparse_prior():
    result = AutoPeft(n_trials=6, initial=4, batch=2).search(make_problem(make_space(3)))
    again = AutoPeft(n_trials=6, initial=4, batch=2).search(make_problem(make_space(3)))
    assert len(result.history["trials"]) == 6
    assert result.history == again.history


# --- settings -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("surrogate", "missing", "line"),
    [
        ("map-saas", "botorch", r'pip install "prunepeft\[bo\]"'),
        ("gp", "botorch", r'pip install "prunepeft\[bo\]"'),
        ("nuts", "numpyro", r'pip install "prunepeft\[nuts\]"'),
    ],
)
def test_what_is_missing_is_named_before_any_training(monkeypatch, surrogate, missing, line):
    monkeypatch.setattr(bayesian, "find_spec", lambda name: None if name == missing else object())
    problem = make_problem()
    with pytest.raises(MissingExtraError, match=f"{missing}.*{line}"):
        AutoPeft(surrogate=surrogate).search(problem)
    assert problem.evaluator.calls == []


@needs_botorch
def test_a_budget_below_one_layer_is_refused():
    sites = [Site(f"l.0.{r}", "encoder", 0, 1, "attention", r, 16, 16) for r in "qv"]
    space = SearchSpace(tuple(Slot((s,), "lora", (4,)) for s in sites))
    AutoPeft().check(make_problem(space, 64))
    with pytest.raises(BudgetError, match="costs 64 parameters, but the budget allows 63"):
        AutoPeft().check(make_problem(space, 63))
    with pytest.raises(BudgetError, match="smallest module"):
        AutoPeft().check(make_problem(space, 31))


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"batch": 0}, "black_box.batch must be 1"),
        ({"initial": 1}, "black_box.initial must be 2"),
        ({"initial": 28}, "more than the 27 of the search"),
        ({"surrogate": "saas"}, "unknown; use map-saas, nuts, gp"),
    ],
)
def test_wrong_settings(wrong, match):
    with pytest.raises(ConfigError, match=match):
        AutoPeft(**wrong)


def test_settings_reach_the_method_and_the_paper_is_within_reach():
    given = {"model": "m", "data": "d", "budget": "1%", "method": "autopeft"}
    paper = ("black_box.n_trials=200", "black_box.initial=100", "black_box.surrogate=nuts")
    config = load_config(None, paper, given)
    assert make_strategy(config) == AutoPeft(n_trials=200, initial=100, batch=4, surrogate="nuts")
    plain = make_strategy(load_config(None, (), given))
    assert (plain, plain.n_initial) == (AutoPeft(), 9)
    with pytest.raises(ConfigError, match=r"does not read black_box.eta"):
        make_strategy(load_config(None, ("black_box.eta=4",), given))
    with pytest.raises(ConfigError, match=r"does not read black_box.batch"):
        make_strategy(load_config(None, ("black_box.batch=2",), given | {"method": "random"}))
