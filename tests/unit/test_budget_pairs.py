"""500 random pairs of a model and a budget: the limit is never exceeded and never left unused."""

import random

import pytest
import torch

from prunepeft.budget import UNITS, Budget, Fidelity
from prunepeft.candidates import make_space
from prunepeft.criteria import PAPER_CRITERIA
from prunepeft.errors import SiteError
from prunepeft.evaluate import Scored
from prunepeft.kinds import KINDS, cost
from prunepeft.sites import count_base_params, find_sites
from prunepeft.space import Placement, SearchSpace
from prunepeft.strategies import HybridPruning, Problem
from tests.tiny_models import TINY

FAMILIES = ("bert", "gpt2", "llama", "qwen2", "opt", "t5", "vit", "deberta_v2", "distilbert")
DEPTHS = {"gpt2": "n_layer", "t5": "num_layers", "distilbert": "n_layers"}
MODES = ("hybrid", "hybrid", "hybrid", "no_partitions", "random", "single:snip", "single:zeros")
PAIRS_PER_MODEL = 20


class RandomSaliency:
    """Scores without any training, with ties."""

    def score(self, placement: Placement, criteria, *, seed, **kwargs) -> Scored:
        draw = random.Random(f"{placement.digest}{seed}")
        return Scored(
            {c: {i: round(draw.random(), 1) for i in placement.ids} for c in criteria}, key="run"
        )


def make_models() -> list[tuple[str, int]]:
    draw = random.Random(0)
    depths = [(name, depth) for name in FAMILIES for depth in draw.sample(range(1, 8), 3)]
    return depths[:25]


def random_space(sites, draw: random.Random) -> SearchSpace:
    """Some kinds of random sizes on the default roles, without those the model has no place for."""
    for _ in range(20):
        kinds = tuple(draw.sample(sorted(KINDS.names()), draw.randint(1, 4)))
        sizes = {k: draw.choice((1, 2, 3, 5, 8, 16)) for k in kinds if KINDS.get(k).sized}
        try:
            return make_space(sites, kinds, sizes=sizes)
        except SiteError:
            continue
    raise AssertionError("no kind fits this model")


def random_problem(sites, n_base: int, draw: random.Random) -> Problem:
    space = random_space(sites, draw)
    unit = draw.choice(UNITS)
    problem = Problem(space, 0, unit, RandomSaliency(), 200, Fidelity(), draw.randrange(10**6))
    smallest, full = min(problem.slot_costs().values()), problem.cost(space.full())
    limit = draw.randint(smallest, max(smallest, round(1.1 * full)))
    if unit == "parameters" and limit <= n_base and draw.random() < 0.5:  # as a share, in words
        limit = max(smallest, Budget.parse(f"{100 * limit / n_base:.9f}%").limit(n_base))
    return Problem(space, limit, unit, RandomSaliency(), 200, Fidelity(), problem.seed)


def random_strategy(draw: random.Random) -> HybridPruning:
    return HybridPruning(
        mode=draw.choice(MODES),
        rounds=draw.randint(1, 5),
        per_round=draw.choice((None, None, 1, 2, 7)),
        warmup=draw.random() < 0.5,
        criteria=tuple(draw.sample(PAPER_CRITERIA, draw.randint(1, 6))),
        paper_exact=draw.random() < 0.3,
        reinit=draw.choice(("reset", "keep", "init")),
    )


@pytest.mark.parametrize(("family", "depth"), make_models())
def test_the_budget_is_kept_and_used(family: str, depth: int) -> None:
    with torch.device("meta"):
        model = TINY[family](**{DEPTHS.get(family, "num_hidden_layers"): depth})
    sites, n_base = find_sites(model), count_base_params(model)
    draw = random.Random(f"{family}{depth}")
    for _ in range(PAIRS_PER_MODEL):
        problem, strategy = random_problem(sites, n_base, draw), random_strategy(draw)
        found = strategy.search(problem).placement
        realised = cost(found, problem.unit)
        case = f"{strategy} {problem.unit} {problem.limit} {problem.space.full().kinds}"
        assert 0 < realised <= problem.limit, case
        removed = [c for i, c in problem.slot_costs().items() if i not in found.ids]
        room = problem.limit - realised
        assert all(c > room for c in removed), case
        assert set(found) <= set(problem.space), case


def test_there_are_500_pairs() -> None:
    assert len(make_models()) * PAIRS_PER_MODEL == 500
