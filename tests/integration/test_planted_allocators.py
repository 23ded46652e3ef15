"""Where half of the layers cannot matter, methods that see the task give them few ranks or none."""

from pathlib import Path

import pytest

from prunepeft.budget import Fidelity
from prunepeft.space import Placement, SearchSpace
from prunepeft.strategies import AdaLora, Allocator, Fisher, GoRa, LoraDrop, Problem
from tests.integration.test_planted import make_world

METHODS = (GoRa(min_factor=0), Fisher(), LoraDrop(), AdaLora())


def useless_share(method: Allocator, seed: int, folder: Path) -> float:
    """Share of the budget that goes to modules which cannot matter; half would be chance."""
    evaluator, space, dead = make_world(seed, folder)
    space = SearchSpace(tuple(s for s in space if s.kind == "lora"))
    epochs = 8 if method.name == "adalora" else 2
    limit = Problem(space, 1, "parameters", evaluator, 96, Fidelity(), seed).cost(space.full()) // 2
    fidelity = Fidelity(1.0, epochs)
    problem = Problem(space, limit, "parameters", evaluator, 96, fidelity, seed, batch_size=12)
    placement = method.search(problem).placement
    spent = problem.cost(placement)
    assert 0.9 * limit < spent <= limit
    return (
        sum(problem.cost(Placement({s: n})) for s, n in placement.sizes.items() if s.id in dead)
        / spent
    )


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
def test_layers_that_cannot_matter_get_little(method: Allocator, tmp_path: Path) -> None:
    found = [useless_share(method, seed, tmp_path / str(seed)) for seed in (0, 1)]
    assert sum(found) / len(found) < (0.5 if method.name == "adalora" else 0.2), found
