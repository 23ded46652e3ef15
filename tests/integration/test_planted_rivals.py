"""Where half of the modules cannot matter, S-MaM, S3Delta and BIPEFT keep the others."""

from pathlib import Path
from typing import Any

import pytest

from prunepeft.budget import Fidelity
from prunepeft.strategies import Bipeft, Problem, S3Delta, SearchResult, SMam, Strategy
from prunepeft.training.brief import train_briefly
from tests.integration.test_planted import TWO_PER_LAYER, make_world

METHODS = {
    "smam": (SMam(rounds=2), 2, 1e-2),
    "s3delta": (S3Delta(), 8, 3e-3),
    "bipeft": (Bipeft(), 8, 3e-3),
}


def n_useless_kept(name: str, seed: int, folder: Path, unit: str) -> tuple[int, int]:
    """Kept modules that cannot matter, and how many are kept; half of all would be chance."""
    method, epochs, lr = METHODS[name]
    evaluator, space, dead = make_world(seed, folder, TWO_PER_LAYER, search_lr=lr)
    problem = Problem(space, 1, unit, evaluator, 96, Fidelity(1.0, epochs), seed)
    limit = problem.cost(space.full().without(dead))
    problem = Problem(space, limit, unit, evaluator, 96, Fidelity(1.0, epochs), seed)
    placement = method.search(problem).placement
    assert problem.cost(placement) <= limit
    return len(set(placement.ids) & dead), len(placement)


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_useful_modules_are_found_in_most_seeds(name: str, tmp_path: Path) -> None:
    found = [n_useless_kept(name, seed, tmp_path / str(seed), "modules") for seed in range(10)]
    assert sum(useless < n / 2 for useless, n in found) >= 8
    assert sum(useless for useless, _ in found) <= 0.25 * sum(n for _, n in found)


@pytest.mark.parametrize("name", ["smam", pytest.param("bipeft", marks=pytest.mark.slow)])
def test_ranks_of_useful_modules_stay_under_a_budget_in_parameters(
    name: str, tmp_path: Path
) -> None:
    assert n_useless_kept(name, 0, tmp_path, "parameters")[0] == 0


def stopping(patch: pytest.MonkeyPatch, after: int) -> None:
    """Stop when one more training than this begins."""
    left = iter(range(after))

    def watched(*args: Any) -> Any:
        if next(left, None) is None:
            raise KeyboardInterrupt
        return train_briefly(*args)

    patch.setattr("prunepeft.training.evaluator.train_briefly", watched)


@pytest.mark.parametrize("method", [SMam(rounds=2), S3Delta(), Bipeft()], ids=lambda m: m.name)
def test_a_search_that_was_stopped_goes_on_to_the_same_result(
    method: Strategy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def search(folder: str, after: int) -> SearchResult:
        evaluator, space, _ = make_world(0, tmp_path / folder, TWO_PER_LAYER)
        stopping(monkeypatch, after)
        problem = Problem(space, len(space) // 2, "modules", evaluator, 96, Fidelity(), 0)
        return method.search(problem)

    n = getattr(method, "rounds", 1)
    whole = search("whole", n)
    with pytest.raises(KeyboardInterrupt):
        search("stopped", n - 1)
    again = search("stopped", 1)  # the others are found in the journal
    assert again.placement == whole.placement
    assert without_seconds(again.history) == without_seconds(whole.history)


def without_seconds(history: dict[str, Any]) -> dict[str, Any]:
    rounds = [{k: v for k, v in r.items() if k != "seconds"} for r in history["rounds"]]
    return history | {"rounds": rounds}
