"""When the ranking of a round has settled, and that the round ends there."""

import json
import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import spearmanr

import prunepeft
from prunepeft.batches import n_steps
from prunepeft.criteria.settling import Settling, agreement, rank_correlation
from prunepeft.criteria.watch import SaliencyWatcher
from prunepeft.errors import ConfigError
from prunepeft.supernet import trainable_state
from prunepeft.training import make_optimizer, make_scheduler
from tests.tiny_tokenizer import save_tiny_model
from tests.unit.test_training import make_net, make_phases, make_rows

VALUES = st.lists(st.integers(-5, 5), min_size=3, max_size=20)


@given(VALUES, st.randoms(use_true_random=False))
def test_correlation_is_spearmans(values, random) -> None:
    other = [random.randint(-5, 5) for _ in values]
    found = rank_correlation(values, other)
    if len(set(values)) > 1 and len(set(other)) > 1:
        assert found == pytest.approx(spearmanr(values, other).statistic, abs=1e-9)
    else:
        assert found == float(len(set(values)) == len(set(other)) == 1)
    assert rank_correlation(values, values) == 1.0
    assert -1 <= found <= 1


def ranking(*values: float) -> dict[str, dict[str, float]]:
    return {"snip": dict(zip("abcd", values, strict=True))}


def test_a_ranking_is_compared_with_that_at_half_the_steps() -> None:
    settling = Settling(0.99, 160)
    assert [n for n in range(1, 41) if settling.is_due(n)] == [10, 20, 30, 40]
    assert not settling.add(ranking(1, 2, 3, 4))
    assert not settling.add(ranking(1, 2, 3, 4))  # too early
    assert not settling.add(ranking(1, 2, 3, 4))
    assert settling.add(ranking(2, 3, 4, 5))
    assert not settling.add(ranking(4, 3, 2, 1))  # check 5 against check 2
    assert not settling.add(ranking(4, 3, 2, 1))  # 6 against 3
    assert not settling.add(ranking(4, 3, 2, 1))  # 7 against 3
    assert not settling.add(ranking(4, 3, 2, 1))  # 8 against 4
    assert not settling.add(ranking(4, 3, 2, 1))  # 9 against 4
    assert settling.add(ranking(4, 3, 2, 1))  # 10 against 5


def test_the_median_of_the_criteria_counts() -> None:
    noise = {"threshold": {"a": 3, "b": 1, "c": 2, "d": 0}}
    good = {"snip": {"a": 0, "b": 1, "c": 2, "d": 3}, "gradient": {"a": 0, "b": 1, "c": 2, "d": 3}}
    turned = {"threshold": {"a": 0, "b": 2, "c": 1, "d": 3}}
    assert agreement(good | noise, good | turned) == 1.0
    assert agreement(noise, turned) == -1.0


def test_without_a_threshold_nothing_is_looked_at() -> None:
    assert not any(Settling(None, 100).is_due(n) for n in range(1, 101))
    for wrong in (0.0, 1.1, -1.0):
        with pytest.raises(ConfigError, match=r"settle is a rank correlation in \(0, 1\]"):
            Settling(wrong, 10)


def trained(settle: float | None, epochs: int = 1, n: int = 400) -> tuple[list[int], dict, dict]:
    """Steps of each epoch, what was found, and the weights at the end."""
    phases = make_phases(make_rows(n=n), lr=1e-3)
    net = make_net()
    watcher = SaliencyWatcher(("snip", "minimum_weight"), settle, epochs)
    watcher.attach(net)
    optimizer = make_optimizer(net, phases.settings, 1e-3)
    total = n_steps(n, 8) * epochs
    scheduler = make_scheduler(optimizer, phases.settings, total)
    watcher.start(total)
    steps = []
    for epoch in range(epochs):
        watcher.mark()
        steps.append(phases.run(net, phases.train, optimizer, scheduler, epoch, watcher).steps)
    watcher.stop()
    return steps, watcher.saliency, trainable_state(net)


def test_a_settled_round_ends_early_and_at_the_same_place_again() -> None:
    whole, everything, _ = trained(None)
    assert whole == [50]
    short, found, weights = trained(0.5)
    assert 12 <= short[0] < 50
    assert found.keys() == everything.keys()
    again = trained(0.5)
    assert again[:2] == (short, found)
    assert all((again[2][name] == tensor).all() for name, tensor in weights.items())


def test_only_the_last_epoch_may_end_early() -> None:
    steps, _, _ = trained(0.5, epochs=2, n=200)
    assert steps[0] == 25
    assert steps[1] < 25


def test_a_ranking_that_never_settles_takes_all_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = random.Random(0)
    monkeypatch.setattr(
        "prunepeft.criteria.watch.score_units",
        lambda record, names: {"snip": {u: draw.random() for u in record.units}},
    )
    assert trained(0.99)[0] == [50]


def test_settling_goes_through_a_search(tmp_path: Path) -> None:
    texts = [f"w{i % 11} w{(i * 5) % 17} w{20 + i % 2}" for i in range(400)]
    rows = [{"text": text, "label": i % 2} for i, text in enumerate(texts)]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = save_tiny_model(tmp_path / "bert", "bert", head="base")
    fixed = {"rounds": 1, "fidelity": 1.0, "criteria": ["minimum_weight"], "mode": "no_partitions"}
    steps = {}
    for settle in (None, 0.3):
        result = prunepeft.search(
            str(model),
            str(data),
            budget="1200",
            train={"epochs": 1, "batch_size": 8},
            search=fixed | {"settle": settle},
            output=str(tmp_path / f"run-{settle}"),
            device="cpu",
        )
        steps[settle] = result.report["search"]["steps"]
    assert steps[0.3] < steps[None] == 360 // 8
