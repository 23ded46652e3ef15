"""Scores of heads, neurons, modules and ranks: worked by hand, and on real small models."""

import itertools
import math
from collections.abc import Callable, Sequence

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from torch.testing import assert_close

from prunepeft.candidates import make_space
from prunepeft.errors import StateError, UnknownNameError
from prunepeft.kinds import seeded
from prunepeft.sites import find_sites
from prunepeft.structured import find_groups
from prunepeft.structured.importance import LateMean, rank_importance, relative_change
from prunepeft.structured.light_peft import EarlyScores
from prunepeft.supernet import attach, placement_of, slot_layers, slot_parameters
from tests.one_layer import make_layer, own_params
from tests.tiny_models import TINY, tiny_inputs

Batch = dict[str, Tensor]
FRESH = ("lora", "serial_adapter")


def put(name: str, kinds: Sequence[str] = FRESH, size: int = 3) -> tuple[PeftModel, EarlyScores]:
    """A small model with modules of random values, training, and scores of all its parts."""
    model = TINY[name]()
    groups = find_groups(model)
    sizes = {kind: size for kind in kinds if kind not in ("ia3", "bitfit")}
    net = attach(model, make_space(find_sites(model), list(kinds), sizes=sizes).full())
    for slot_id, parameters in slot_parameters(net).items():
        for path, p in parameters.items():
            p.data += 0.2 * torch.randn(p.shape, generator=seeded(1, slot_id, path))
    return net.train(), EarlyScores(groups)


def loss_of(net: PeftModel, batch: Batch) -> Tensor:
    """A sum over rows, so that the gradients of micro-batches add up."""
    logits = net(**batch).logits
    if logits.ndim > 2 and "decoder_input_ids" not in batch:
        logits = logits * batch["attention_mask"][..., None]
    return logits.float().square().sum() / 10


def watch(
    net: PeftModel,
    scores: EarlyScores,
    steps: Sequence[Sequence[Batch]],
    loss_of: Callable[[PeftModel, Batch], Tensor] = loss_of,
    lr: float = 1e-3,
) -> dict[str, Tensor]:
    """Train for some steps of some micro-batches each."""
    scores.attach(net)
    optimizer = torch.optim.AdamW(
        [p for p in net.parameters() if p.requires_grad], lr, weight_decay=0.0
    )
    scores.start(len(steps))
    for pieces in steps:
        for batch in pieces:
            loss_of(net, batch).backward()
        scores.step()
        optimizer.step()
        optimizer.zero_grad()
    return scores.stop()


def rows(batch: Batch, start: int, end: int) -> Batch:
    return {name: tensor[start:end] for name, tensor in batch.items()}


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name in one:
        assert_close(one[name], other[name], rtol=1e-4, atol=1e-6, msg=name)


# --- worked by hand ------------------------------------------------------------------------


def hand_case(alpha: float = 2.0):
    """W = I, A = I, B = diag(1, 2), one token (1, 2), and s = alpha / 2."""
    params = {"A": torch.eye(2), "B": torch.diag(torch.tensor([1.0, 2.0]))}
    layer = make_layer(
        "lora", size=2, bias=False, weight=torch.eye(2), params=params, alpha=alpha
    ).train()
    return layer, torch.tensor([[[1.0, 2.0]]]).double()


@pytest.mark.parametrize(("how", "scores"), [("mean", [1, 4]), ("sum", [2, 8]), ("abs", [2, 8])])
def test_rank_score_by_hand(how: str, scores: list[float]) -> None:
    layer, x = hand_case()
    (layer(x) * torch.tensor([1.0, -1.0])).sum().backward()
    a, b = own_params(layer).values()
    assert_close(b.grad, torch.tensor([[1.0, 2.0], [-1.0, -2.0]]).double())
    assert_close(a.grad, torch.tensor([[1.0, 2.0], [-2.0, -4.0]]).double())
    found = rank_importance([(a, a.grad, 0), (b, b.grad, 1)], how)
    assert found.tolist() == scores


def test_only_abs_does_not_cancel() -> None:
    side = (torch.ones(1, 2), torch.tensor([[3.0, -3.0]]), 0)
    assert [rank_importance([side], how).item() for how in ("mean", "sum", "abs")] == [0, 0, 6]
    with pytest.raises(UnknownNameError, match="mean, sum, abs"):
        rank_importance([side], "first_order")


def test_only_mean_favours_narrow_layers() -> None:
    wide = [(torch.ones(1, 8), torch.full((1, 8), 0.5), 0)]
    narrow = [(torch.ones(1, 2), torch.full((1, 2), 2.0), 0)]
    assert rank_importance(wide, "sum") == rank_importance(narrow, "sum") == 4
    assert rank_importance(wide, "mean") < rank_importance(narrow, "mean")


def ratio_at(layer, x: Tensor, valid: Tensor | None = None) -> float:
    seen = []
    layer.observer = lambda branch, delta, base: seen.append(relative_change(delta, base, valid))
    layer(x)
    ((total, count),) = seen
    return (total / count).item()


def test_module_score_by_hand() -> None:
    layer, x = hand_case()
    one = ratio_at(layer, x)
    assert one == pytest.approx(math.sqrt(17 / 5), abs=1e-6) == pytest.approx(1.843909, abs=1e-6)
    tripled, _ = hand_case(alpha=6.0)
    assert ratio_at(tripled, x) == pytest.approx(3 * one)
    padded = torch.cat([x, torch.tensor([[[50.0, -3.0]]])], 1)
    assert ratio_at(layer, padded, torch.tensor([[True, False]])) == pytest.approx(one)
    dead = torch.cat([x, torch.zeros(1, 1, 2)], 1)  # z = 0 has no ratio
    assert ratio_at(layer, dead) == pytest.approx(one)
    own_params(layer)["B"].data.zero_()
    assert ratio_at(layer, x) == 0


def late_mean(values: Sequence[float]) -> float:
    late = LateMean(len(values))
    for value in values:
        late.add(torch.tensor(value))
    return late.mean().item()


@pytest.mark.parametrize(
    ("values", "mean"),
    [
        ([10, 10, 2, 4], 3),
        ([9.0, 2.0, 4.0], 3),
        ([7.0], 7),
        ([10.0, 10.0, math.nan, 4.0], 4),  # as zero it would give 2
        ([10.0, 10.0, math.inf, 4.0], 4),
        ([1.0, math.nan], 0),
    ],
)
def test_mean_of_the_second_half(values: list[float], mean: float) -> None:
    assert late_mean(values) == mean


def test_no_step_in_the_second_half_is_an_error() -> None:
    late = LateMean(4)
    late.add(torch.tensor(1.0))
    with pytest.raises(StateError, match="from step 3 on"):
        late.mean()


def test_l1_moves_every_mask_by_the_learning_rate() -> None:
    net, scores = put("bert")
    batch = tiny_inputs("bert", net)
    found = watch(net, scores, [[batch]], lambda n, b: 0 * n(**b).logits.sum(), lr=3e-4)
    masks = torch.cat([t for name, t in found.items() if name.startswith("mask.")])
    assert len(masks) == 2 * (4 + 32)
    assert_close(masks, torch.full_like(masks, 0.9997), rtol=0, atol=1e-6)


def test_l1_reaches_only_the_masks() -> None:
    found = []
    for l1 in (0.0, 10.0):
        net, scores = put("bert")
        scores = EarlyScores(scores.groups, l1=l1)
        found.append(watch(net, scores, [[tiny_inputs("bert", net)]], lr=0.0))
    assert_same(*found)


# --- real models ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", tuple(TINY))
def test_every_family_is_scored(name: str) -> None:
    net, scores = put(name)
    scores = EarlyScores(scores.groups, l1=0.0)
    found = watch(net, scores, [[tiny_inputs(name, net)]] * 2)
    slots = placement_of(net).ids
    assert set(found) == {f"mask.{g.id}" for g in scores.groups} | {
        f"{what}.{i}" for i in slots for what in ("module", "rank")
    }
    for group in scores.groups:
        mask = found[f"mask.{group.id}"]
        assert mask.shape == (group.n_units,)
        assert (mask - 1).abs().max() > 1e-4, group.id
    for slot_id in slots:
        assert found[f"module.{slot_id}"] > 1e-3, slot_id
        assert found[f"rank.{slot_id}"].shape == (3,)
        assert found[f"rank.{slot_id}"].isfinite().all()
        if slot_id.endswith("lora"):  # at the one token that is read, a ReLU may give nothing
            assert (found[f"rank.{slot_id}"] > 0).any(), slot_id


def test_module_score_equals_the_formula_at_lora_and_adapter() -> None:
    net, _ = put("bert")
    batch = tiny_inputs("bert", net)
    valid = batch["attention_mask"].bool()
    expected: dict[str, list[Tensor]] = {}
    for slot_id, pairs in slot_layers(net).items():
        for layer, kind in pairs:

            def record(module, args, output, slot_id=slot_id, kind=kind):
                p, (x,) = module.params("default", kind), args
                branch = module.branches["default"][kind]
                z = module.base_layer(x)
                if kind == "serial_adapter" and "lora" in module.branches["default"]:
                    lora = module.params("default", "lora")
                    s = module.branches["default"]["lora"].scaling
                    z = z + s * x @ lora["A"].T @ lora["B"].T
                if kind == "lora":
                    a = branch.scaling * x @ p["A"].T @ p["B"].T
                else:
                    a = branch.kind.delta(p, x, z, branch.scaling, module)
                expected.setdefault(slot_id, []).append((a.norm(dim=-1) / z.norm(dim=-1))[valid])

            layer.register_forward_hook(record)
    found = watch(net, EarlyScores(), [[batch]])
    assert len(expected) == len(placement_of(net))
    for slot_id, ratios in expected.items():
        assert_close(found[f"module.{slot_id}"], torch.cat(ratios).mean().detach())


@pytest.mark.parametrize("name", ["bert", "llama", "vit"])
def test_the_cut_of_a_step_does_not_matter(name: str) -> None:
    found = []
    for cuts in ((0, 4), (0, 2, 4), (0, 3, 4)):
        net, scores = put(name)
        batch = tiny_inputs(name, net, batch=4)
        if name != "vit":
            batch["attention_mask"][0, 2:] = 0  # pieces with unlike numbers of tokens
        pieces = [rows(batch, a, b) for a, b in itertools.pairwise(cuts)]
        found.append(watch(net, scores, [pieces] * 3))
    assert_same(found[0], found[1])
    assert_same(found[0], found[2])


def test_padding_does_not_matter() -> None:
    found = []
    for extra in (0, 5):
        net, scores = put("bert")
        batch = tiny_inputs("bert", net)
        wide = {n: torch.nn.functional.pad(t, (0, extra)) for n, t in batch.items()}
        found.append(watch(net, scores, [[wide]] * 2))
    assert_same(*found)


@pytest.mark.parametrize("name", ["bert", "gpt2"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_counts_once(name: str, reentrant: bool) -> None:
    found = []
    for repeat in (False, True):
        net, scores = put(name, ("lora", "serial_adapter", "prefix"))
        if repeat:
            base = net.base_model.model
            base.enable_input_require_grads()
            base.gradient_checkpointing_enable({"use_reentrant": reentrant})
        found.append(watch(net, scores, [[tiny_inputs(name, net)]] * 2))
    assert_same(*found)


def test_half_precision_scores_alike() -> None:
    def half(net: PeftModel, batch: Batch) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return loss_of(net, batch)

    net, scores = put("bert")
    whole = watch(net, scores, [[tiny_inputs("bert", net)]])
    net, scores = put("bert")
    rounded = watch(net, scores, [[tiny_inputs("bert", net)]], half)
    for name in whole:
        assert rounded[name].dtype == torch.float32
        if name.startswith("module."):
            assert_close(rounded[name], whole[name], rtol=0.03, atol=0)


def test_kinds_without_ranks_and_prefixes() -> None:
    net, _ = put("bert", ("ia3", "prefix", "lora", "bitfit"))
    found = watch(net, EarlyScores(), [[tiny_inputs("bert", net)]])
    for slot in placement_of(net):
        assert found[f"module.{slot.id}"] > 0
        assert (f"rank.{slot.id}" in found) == (slot.kind in ("prefix", "lora"))


def test_a_module_that_saw_no_token_scores_zero() -> None:
    net, scores = put("bert")
    batch = tiny_inputs("bert", net)
    batch["attention_mask"].zero_()
    found = watch(net, scores, [[batch]] * 2)
    assert all(t == 0 for name, t in found.items() if name.startswith("module."))


def test_an_epoch_that_is_run_again_counts_once() -> None:
    net, scores = put("bert")
    batch = tiny_inputs("bert", net)
    once = watch(net, scores, [[batch]] * 2, lr=0.0)
    scores.attach(net)
    scores.start(2)
    loss_of(net, batch).backward()
    scores.step()
    scores.mark()
    loss_of(net, rows(batch, 0, 1)).backward()
    scores.step()
    loss_of(net, rows(batch, 1, 2)).backward()  # memory runs out before the step
    scores.reset()
    net.zero_grad()
    loss_of(net, batch).backward()
    scores.step()
    assert_same(once, scores.stop())


def test_nothing_is_left_on_the_model() -> None:
    net, scores = put("bert")
    before = set(net.state_dict())
    batch = tiny_inputs("bert", net)
    logits = net(**batch).logits
    scores.attach(net)
    with pytest.raises(StateError, match="already"):
        scores.attach(net)
    with pytest.raises(StateError, match="another recorder"):
        EarlyScores().attach(net)
    scores.abandon()
    found = watch(net, scores, [[batch]], lr=0.0)
    assert len(found) > len(placement_of(net))
    assert set(net.state_dict()) == before
    assert not net._forward_pre_hooks
    assert all(layer.observer is None for pairs in slot_layers(net).values() for layer, _ in pairs)
    assert torch.equal(net(**batch).logits, logits)


def test_base_alone_and_modules_alone() -> None:
    net, scores = put("bert")
    batch = tiny_inputs("bert", net)
    base = watch(net, EarlyScores(scores.groups, modules=False, ranks=False), [[batch]])
    assert set(base) == {f"mask.{g.id}" for g in scores.groups}
    modules = watch(net, EarlyScores(ranks=False), [[batch]])
    assert set(modules) == {f"module.{i}" for i in placement_of(net).ids}


def test_evaluation_is_not_watched() -> None:
    net, _ = put("bert")
    scores = EarlyScores()
    scores.attach(net)
    scores.start(1)
    net.eval()(**tiny_inputs("bert", net))
    assert scores._tokens is None
    scores.abandon()
