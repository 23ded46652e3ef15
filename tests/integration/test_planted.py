"""Planted redundancy: where half of the modules cannot matter, pruning takes those and no others.

Sub-layers of a small classifier are cut off (attention answers zero, a feed-forward hands on its
input), so modules on them get no gradient and never change the model.
"""

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import nn

from prunepeft.budget import Fidelity
from prunepeft.candidates import make_space
from prunepeft.config import TrainSettings
from prunepeft.evaluate import Target
from prunepeft.progress import SilentProgress
from prunepeft.sites import find_sites
from prunepeft.space import SearchSpace
from prunepeft.state import Journal
from prunepeft.strategies import HybridPruning, Problem, SearchResult
from prunepeft.tasks import Collator
from prunepeft.training import Phases, TrainerEvaluator
from tests.tiny_models import TINY

LAYERS, SEEDS = 4, (0, 1, 2)
TWO_PER_LAYER = {"lora": (("q", "v"),)}  # with the serial adapter
# The smallest weights are those of the widest layers, whatever the module is good for.
ALL_BUT_SIZE = ("zeros", "threshold", "activation", "snip", "gradient")


def make_rows(seed: int, n: int = 96) -> Dataset:
    """Of two words, which one comes; the rest is noise."""
    draw = random.Random(seed)
    labels = [draw.randrange(2) for _ in range(n)]
    ids = [[1, 10 + label, *(draw.randrange(20, 60) for _ in range(4))] for label in labels]
    columns = {"input_ids": ids, "labels": labels, "length": [6] * n}
    return Dataset.from_dict(columns | {"attention_mask": [[1] * 6] * n})


def cut_off(model: nn.Module, block: str, layer: int) -> None:
    """Make a sub-layer ignore everything on it."""
    parts = model.bert.encoder.layer[layer]
    if block == "attention":
        parts.attention.self.register_forward_hook(
            lambda module, args, out: (torch.zeros_like(out[0]), *out[1:])
        )
    else:
        parts.output.register_forward_hook(lambda module, args, out: args[1])


def make_world(
    seed: int, folder: Path, roles: dict[str, Any] | None = None, *, search_lr: float = 1e-2
) -> tuple[TrainerEvaluator, SearchSpace, set[str]]:
    """A classifier with half of its sub-layers cut off, and the slots that are redundant."""
    model = TINY["bert"](n_labels=2, num_hidden_layers=LAYERS, seed=seed)
    sizes = {"lora": 4, "serial_adapter": 4}
    space = make_space(find_sites(model), sizes=sizes, roles=roles)
    draw = random.Random(seed)
    layers = {b: draw.sample(range(LAYERS), LAYERS // 2) for b in ("attention", "ffn")}
    for block, chosen in layers.items():
        for layer in chosen:
            cut_off(model, block, layer)
    dead = {s.id for s in space if s.layer in layers[s.sites[0].block]}
    assert len(space) == 2 * len(dead)
    rows = make_rows(seed)
    phases = Phases(
        train=rows,
        validation=rows,
        collator=Collator(0),
        compute=lambda found, labels: {"accuracy": float((found.argmax(-1) == labels).mean())},
        preprocess_logits=None,
        settings=TrainSettings(epochs=2, lr=1e-2, batch_size=12),
        device="cpu",
        bf16=False,
        progress=SilentProgress(),
    )
    target = Target("accuracy", True, ["classifier"], "SEQ_CLS", True, search_lr, {"seed": seed})
    journal = Journal(folder / "trials")
    return TrainerEvaluator(model, phases, target, journal, folder / "state"), space, dead


World = tuple[int, TrainerEvaluator, SearchSpace, set[str]]


@pytest.fixture(scope="module", params=SEEDS)
def world(request, tmp_path_factory) -> World:
    """Two modules in every layer."""
    folder = tmp_path_factory.mktemp("planted")
    return request.param, *make_world(request.param, folder, TWO_PER_LAYER)


@pytest.fixture(scope="module", params=SEEDS)
def wide_world(request, tmp_path_factory) -> World:
    """Every candidate of the default space."""
    return request.param, *make_world(request.param, tmp_path_factory.mktemp("planted"))


def prune(world: World, **settings: Any) -> SearchResult:
    """Half of the modules may stay."""
    seed, evaluator, space, _ = world
    given = {"rounds": 2, "warmup_rows": 24, "warmup_epochs": 2, "warmup_turns": 2} | settings
    problem = Problem(space, len(space) // 2, "modules", evaluator, 96, Fidelity(), seed)
    return HybridPruning(**given).search(problem)


def n_useful_removed(result: SearchResult, world: World) -> list[int]:
    """How many useful modules went in each round; as many go as are redundant."""
    rounds = [set(r["removed"]) for r in result.history["rounds"]]
    assert sum(len(removed) for removed in rounds) == len(world[-1])
    return [len(removed - world[-1]) for removed in rounds]


@pytest.mark.parametrize(
    "settings", [{}, {"warmup": False}, {"reinit": "keep"}, {"mode": "no_partitions"}], ids=str
)
def test_hybrid_pruning_removes_the_redundant_modules_first(world, settings):
    wrong = n_useful_removed(prune(world, **settings), world)
    assert wrong[0] == 0
    assert wrong[1] <= (0 if settings.get("mode") or settings.get("reinit") else 1)


def test_hybrid_pruning_in_the_default_space(wide_world):
    wrong = n_useful_removed(prune(wide_world, criteria=ALL_BUT_SIZE), wide_world)
    assert wrong[0] == 0
    assert wrong[1] <= 1


@pytest.mark.parametrize(
    "criterion", ["snip", "gradient", "activation", "snip_mean", "gradient_mean"]
)
def test_gradient_and_activation_criteria_remove_the_redundant_half(wide_world, criterion):
    result = prune(wide_world, mode=f"single:{criterion}", rounds=1)
    dead = wide_world[-1]
    assert n_useful_removed(result, wide_world) == [0]
    first = result.history["rounds"][0]["saliency"][criterion]
    assert max(first[i] for i in dead) < min(v for i, v in first.items() if i not in dead)


def test_random_pruning_removes_useful_modules(wide_world):
    seed, evaluator, space, dead = wide_world
    wrong = []
    for extra in range(10):
        problem = Problem(space, len(dead), "modules", evaluator, 96, Fidelity(), 10 * seed + extra)
        wrong += n_useful_removed(HybridPruning(mode="random").search(problem), wide_world)
    assert min(wrong) > 1
    assert 0.3 < sum(wrong) / (10 * len(dead)) < 0.7


def test_what_hybrid_pruning_keeps_learns_and_the_redundant_half_does_not(world):
    seed, evaluator, space, dead = world
    full = space.full()
    useful = evaluator.train(full.without(dead), name="useful", seed=seed)
    useless = evaluator.train(full.without(set(full.ids) - dead), name="useless", seed=seed)
    assert useful.n_params == useless.n_params
    assert useful.curve[-1]["train_loss"] < useless.curve[-1]["train_loss"]
