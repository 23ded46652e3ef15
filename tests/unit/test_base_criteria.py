"""Criteria of the base model: worked numbers, the dense form, pooling, what is left alone."""

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from prunepeft.errors import ConfigError, UnknownNameError
from prunepeft.kinds import make_kind
from prunepeft.space import Site
from prunepeft.structured import Group, Masks, Part, base_layers
from prunepeft.structured.base_criteria import (
    BASE_CRITERIA,
    LoraGuided,
    Magnitude,
    Random,
    Salience,
    Taylor,
    Wanda,
    make_base_criterion,
)
from prunepeft.structured.base_layers import BaseLayer
from prunepeft.structured.scoring import Scorer, unit_sums, unit_vector
from prunepeft.supernet.layer import Branch, UnionLayer
from tests.lora_nets import backward, lora_net
from tests.one_layer import make_layer, own_params

MODELS = ("llama", "bert", "gpt2", "t5")
HAND = {"A": [[1.0, 2.0]], "B": [[0.5], [-1.0]], "gA": [[0.1, 0.0]], "gB": [[0.2], [0.0]]}


def hand_layer() -> BaseLayer:
    """W = I, r = 1, s = 2."""
    params = {k: torch.tensor(HAND[k]) for k in "AB"}
    union = make_layer("lora", weight=torch.eye(2), params=params, bias=False, alpha=2.0)
    for name, parameter in own_params(union).items():
        parameter.grad = torch.tensor(HAND[f"g{name}"]).double()
    return BaseLayer("layer.0.x", union)


def scores(net, groups, criterion, name, **kwargs) -> dict[str, Tensor]:
    scorer = Scorer(net.base_model.model, groups, criterion, net=net)
    scorer.start()
    backward(name, net, **kwargs)
    found = scorer.scores()
    scorer.stop()
    return found


def dense(layer: BaseLayer, criterion: LoraGuided) -> Tensor:
    """The surrogate as the paper writes it."""
    a, b, ga, gb = layer.lora()
    s = layer.branch.scaling if criterion.scaled else 1.0
    surrogate = gb @ a + b @ ga - criterion.eta * gb @ ga
    product = surrogate * (layer.union.frozen_weight() + s * b @ a)
    return product.square() if criterion.squared else product.abs()


# --- LoRA-guided ---------------------------------------------------------------------------------


def test_surrogate_is_the_change_of_the_update_in_one_step():
    layer = hand_layer()
    a, b, ga, gb = layer.lora()
    change = b @ a - (b - gb) @ (a - ga)
    ones = UnionLayer(nn.Linear(2, 2, bias=False))
    ones.base_layer.weight.data = 1.0 - layer.branch.scaling * (b @ a).float()  # effective weight 1
    layer.union.base_layer.weight.data = ones.base_layer.weight.data.double()
    assert_close(
        layer.sums("out", lambda rows: change[rows].abs()),
        LoraGuided(eta=1.0).features(layer, "out"),
    )


@pytest.mark.parametrize(
    ("squared", "out", "in_"),
    [(False, [1.26, 0.2], [0.66, 0.8]), (True, [0.8516, 0.04], [0.2516, 0.64])],
)
def test_hand_example(squared, out, in_):
    criterion = LoraGuided(squared=squared, eta=1.0)
    assert criterion.features(hand_layer(), "out").tolist() == pytest.approx(out)
    assert criterion.features(hand_layer(), "in").tolist() == pytest.approx(in_)


def test_hand_example_as_unit_vectors():
    criterion, layer = LoraGuided(eta=1.0), hand_layer()
    rows, columns = (unit_vector(criterion.features(layer, side)) for side in ("out", "in"))
    assert rows.tolist() == pytest.approx([0.987636, 0.156768], abs=1e-6)
    assert columns.tolist() == pytest.approx([0.636383, 0.771373], abs=1e-6)
    assert (rows + columns).tolist() == pytest.approx([1.624018, 0.928141], abs=2e-6)


@pytest.mark.parametrize("chunk", [1, 40, 2**20])
@pytest.mark.parametrize("squared", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
def test_row_blocks_equal_the_dense_form(monkeypatch, chunk, squared, scaled):
    monkeypatch.setattr(base_layers, "CHUNK", chunk)
    union = make_layer("lora", 13, 9, size=3)
    for i, parameter in enumerate(own_params(union).values()):
        draw = torch.Generator().manual_seed(i)
        parameter.data = torch.randn(parameter.shape, generator=draw, dtype=torch.float64)
        parameter.grad = torch.randn(parameter.shape, generator=draw, dtype=torch.float64)
    layer, criterion = BaseLayer("x", union), LoraGuided(squared=squared, eta=0.7, scaled=scaled)
    entries = dense(layer, criterion)
    assert_close(criterion.features(layer, "out"), entries.sum(1), rtol=1e-10, atol=0)
    assert_close(criterion.features(layer, "in"), entries.sum(0), rtol=1e-10, atol=0)


@pytest.mark.parametrize("name", MODELS)
def test_base_weights_get_no_gradient(name):
    net, groups = lora_net(name)
    before = {n: p.clone() for n, p in net.named_parameters() if "union_" not in n}
    found = scores(net, groups, LoraGuided(), name)
    assert {g.id: (g.n_units,) for g in groups} == {i: tuple(s.shape) for i, s in found.items()}
    assert all(torch.isfinite(s).all() and s.max() > 0 for s in found.values())
    after = {n: p for n, p in net.named_parameters() if "union_" not in n}
    assert all(p.grad is None and torch.equal(p, before[n]) for n, p in after.items())


def test_at_first_values_the_ranking_follows_the_true_gradient():
    net, groups = lora_net("bert", zero_b=True, rank=4)
    neurons = [g for g in groups if g.what == "neurons"]
    ours, true = (scores(net, neurons, c, "bert") for c in (LoraGuided(), Taylor()))
    for group in neurons:
        ranks = torch.stack([s[group.id].argsort().argsort().float() for s in (ours, true)])
        assert torch.corrcoef(ranks)[0, 1] > 0.3


@pytest.mark.parametrize("name", MODELS)
def test_without_a_cross_term_the_scale_of_the_loss_does_not_matter(name):
    for squared in (False, True):
        net, groups = lora_net(name)
        criterion = LoraGuided(squared=squared)
        small, large = (scores(net, groups, criterion, name, scale=c) for c in (1.0, 1e3))
        for group in groups:
            assert_close(small[group.id], large[group.id], rtol=1e-4, atol=1e-5)
    net, groups = lora_net(name)
    small, large = (scores(net, groups, LoraGuided(eta=1.0), name, scale=c) for c in (1.0, 1e4))
    assert any(not torch.allclose(small[g.id], large[g.id], rtol=1e-2) for g in groups)


def test_with_identity_as_a_it_is_the_true_gradient():
    """r = d_in, A = I, B = 0, s = 1: then gA = 0 and gB is the gradient of W."""
    net, groups = lora_net("gpt2", zero_b=True, rank=16)
    neurons = [g for g in groups if g.what == "neurons"]
    ups = [p.path for g in neurons for p in g.parts if p.side == "out"]
    neurons = [Group(**{**vars(g), "parts": g.parts[:1]}) for g in neurons]
    for path in ups:
        layer = net.base_model.model.get_submodule(path)
        layer.branches["default"]["lora"].scaling = 1.0
        layer.params("default", "lora")["A"].data = torch.eye(16)
    for squared in (False, True):
        ours = scores(net, neurons, LoraGuided(squared=squared), "gpt2")
        true = scores(net, neurons, Taylor(squared=squared), "gpt2")
        for group in neurons:
            assert_close(ours[group.id], true[group.id], rtol=1e-5, atol=1e-6)


def test_layers_without_lora_have_no_say_and_one_must():
    net, groups = lora_net("llama", roles=("v", "down"))
    one = [g for g in groups if g.what == "heads"][:1]
    found = scores(net, one, LoraGuided(), "llama")[one[0].id]
    value = [p for p in one[0].parts if p.path.endswith("v_proj")]
    alone = scores(net, [Group(**{**vars(one[0]), "parts": tuple(value)})], LoraGuided(), "llama")
    assert_close(found, alone[one[0].id])
    net, groups = lora_net("llama", roles=("q", "k", "v", "o"))
    with pytest.raises(ConfigError, match=r"decoder\.0\.ffn.*carries LoRA.*gate_proj.*down_proj"):
        Scorer(net.base_model.model, groups, LoraGuided())


# --- pooling -------------------------------------------------------------------------------------


def test_a_query_group_owns_its_heads_and_a_fused_layer_counts_as_its_parts():
    values = torch.arange(12.0)
    part = Part("x", "out", ((0, 2), (4, 1), (6, 3)))
    sums = [v.tolist() for v in unit_sums(values, part, 2)]
    assert sums == [[1.0, 5.0], [4.0, 5.0], [21.0, 30.0]]


def test_a_fused_layer_scores_as_its_parts_do():
    net, groups = lora_net("gpt2")
    group = groups[0]
    path = group.parts[0].path
    weight = net.base_model.model.get_submodule(path).frozen_weight()
    found = scores(net, [group], Magnitude(), "gpt2")[group.id]
    layer = BaseLayer(path, net.base_model.model.get_submodule(path))
    assert layer.shape == tuple(weight.shape)
    rows = layer.effective_weight()(slice(None)).abs().sum(1)
    expected = sum(unit_vector(r.reshape(4, -1).sum(1)) for r in rows.detach().chunk(3))
    writer = BaseLayer("o", net.base_model.model.get_submodule(group.parts[1].path))
    columns = writer.effective_weight()(slice(None)).abs().sum(0).detach()
    expected = expected + unit_vector(columns.reshape(4, -1).sum(1))
    assert_close(found, expected)


def test_a_layer_of_zeros_has_no_say_and_a_tiny_one_a_full_say():
    assert unit_vector(torch.zeros(3)).tolist() == [0.0, 0.0, 0.0]
    tiny = unit_vector(torch.tensor([3e-30, 4e-30]))
    assert tiny.tolist() == pytest.approx([0.6, 0.8])


# --- the rivals ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_taylor_is_weight_times_gradient_and_leaves_nothing_behind(name):
    net, groups = lora_net(name)
    found = scores(net, groups, Taylor(), name)
    assert not any(p.requires_grad or p.grad is not None for p in base_weights(net))
    twin, _ = lora_net(name)
    for weight in base_weights(twin):
        weight.requires_grad_(True)
    backward(name, twin)
    part = groups[-1].parts[-1]
    layer = BaseLayer(part.path, twin.base_model.model.get_submodule(part.path))
    grad = layer.weight.grad.T if layer.union.is_transposed else layer.weight.grad
    product = (grad * layer.effective_weight()(slice(None))).abs().detach()
    one = [Group(**{**vars(groups[-1]), "parts": (part,)})]
    alone = scores(net, one, Taylor(), name)[one[0].id]
    assert_close(alone, unit_vector(unit_sums(product.sum(0), part, one[0].n_units)[0]))
    assert all(s.max() > 0 for s in found.values())


def base_weights(net) -> list[nn.Parameter]:
    return [p for n, p in net.named_parameters() if "union_" not in n]


class OneWriter(nn.Module):
    """y = W h with a mask before W; what is called with the batch."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.writer = nn.Linear(*weight.shape[::-1], bias=False)
        self.writer.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, h: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.writer(h)


WRITER = Group("decoder.0.ffn", "neurons", "decoder", 0, "ffn", 2, 1, 2,
               (Part("writer", "in", ((0, 1),)),))  # fmt: skip


@pytest.mark.parametrize("shown", [1.0, 0.25, 0.0])
def test_salience_hand_example(shown):
    """h = [[1, -2], [3, 0.5]], gradient [[0.1, 0], [-0.2, 0.4]]: 1.2 and 1.0, over 2 tokens each.

    A padded third token counts for nothing, and the mask neither.
    """
    net = OneWriter(torch.eye(2))
    masks = Masks(net, [WRITER])
    masks[WRITER.id].data.fill_(shown)
    scorer = Scorer(net, [WRITER], Salience())
    scorer.start()
    h = torch.tensor([[[1.0, -2.0], [3.0, 0.5], [9.0, 9.0]]])
    y = net(h, attention_mask=torch.tensor([[1, 1, 0]]))
    y_grad = torch.tensor([[[0.1, 0.0], [-0.2, 0.4], [7.0, 7.0]]])
    (net(h, attention_mask=torch.zeros(1, 3)) * 0 + y).backward(y_grad)
    layer = scorer._layers["writer"]
    # The second pass saw no token.
    assert Salience().features(layer, "in").tolist() == pytest.approx([1.2 / 4, 1.0 / 4])
    assert scorer.scores()[WRITER.id].tolist() == pytest.approx(
        unit_vector(torch.tensor([1.2, 1.0])).tolist()
    )
    scorer.stop()
    assert not layer.inputs
    masks.remove()
    assert not net.writer._forward_pre_hooks
    assert not net._forward_pre_hooks


def test_wanda_hand_example():
    """|W| ||x_j||: x columns (3, 4 in two tokens) -> 5 and 2; padding counts for nothing."""
    net = OneWriter(torch.tensor([[1.0, -2.0], [0.5, 3.0]]))
    scorer = Scorer(net, [WRITER], Wanda())
    scorer.start()
    x = torch.tensor([[[3.0, 0.0], [-4.0, 2.0], [50.0, 50.0]]])
    net(x, attention_mask=torch.tensor([[1, 1, 0]]))
    assert Wanda().features(scorer._layers["writer"], "in").tolist() == [1.5 * 5, 5 * 2]
    assert Wanda().features(scorer._layers["writer"], "out").tolist() == [9.0, 8.5]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("criterion", [Wanda(), Salience()], ids=lambda c: c.name)
def test_padding_does_not_change_what_is_seen(name, criterion):
    net, groups = lora_net(name)
    scorer = Scorer(net.base_model.model, groups, criterion, net=net)
    scorer.start()
    ids = torch.randint(3, 60, (2, 5), generator=torch.Generator().manual_seed(3))
    labels = torch.tensor([0, 1]) if name == "bert" else ids
    net(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels).loss.backward()
    short = scorer.scores()
    scorer.clear()
    net.zero_grad()
    pad = torch.zeros(2, 3, dtype=torch.long)
    labels = labels if name == "bert" else torch.cat([ids, pad - 100], 1)
    mask = torch.cat([torch.ones_like(ids), pad], 1)
    net(input_ids=torch.cat([ids, pad], 1), attention_mask=mask, labels=labels).loss.backward()
    long = scorer.scores()
    for group in groups:
        assert_close(short[group.id], long[group.id], rtol=1e-4, atol=1e-5)
    scorer.stop()


@pytest.mark.parametrize("name", BASE_CRITERIA.names())
def test_micro_batches_do_not_change_the_scores(name):
    criterion = make_base_criterion(name)
    net, groups = lora_net("llama")
    ids = torch.randint(3, 60, (4, 5), generator=torch.Generator().manual_seed(2))
    scorer = Scorer(net.base_model.model, groups, criterion, net=net)
    scorer.start()
    found = []
    for pieces in (1, 4):
        net.zero_grad()
        for piece in ids.chunk(pieces):
            (net(input_ids=piece, labels=piece).loss / pieces).backward()
        found.append(scorer.scores())
        scorer.clear()
    for group in groups:
        assert_close(found[0][group.id], found[1][group.id], rtol=1e-4, atol=1e-5)
    scorer.stop()


@pytest.mark.parametrize("name", BASE_CRITERIA.names())
@pytest.mark.parametrize("model", MODELS)
def test_every_criterion_scores_every_model_in_half_precision(name, model):
    net, groups = lora_net(model, dtype=torch.bfloat16)
    found = scores(net, groups, make_base_criterion(name), model)
    for group in groups:
        score = found[group.id]
        assert score.shape == (group.n_units,)
        assert score.dtype == torch.float32
        assert torch.isfinite(score).all()
        assert score.min() >= 0 < score.max()


def test_gradient_checkpointing_changes_nothing():
    found = []
    for checkpointing in (False, True):
        net, groups = lora_net("llama")
        if checkpointing:
            net.gradient_checkpointing_enable({"use_reentrant": False})
        found.append([scores(net, groups, c, "llama") for c in (Salience(), Wanda())])
    for one, other in zip(*found, strict=True):
        for group_id in one:
            assert_close(one[group_id], other[group_id], rtol=1e-4, atol=1e-6)


def test_evaluation_is_not_seen():
    net, groups = lora_net("bert")
    scorer = Scorer(net.base_model.model, groups, Wanda(), net=net)
    scorer.start()
    net.eval()
    backward("bert", net)
    assert not any(layer.inputs for layer in scorer._layers.values())
    scorer.stop()


def test_random_depends_on_its_seed_alone():
    net, groups = lora_net("bert")
    first = scores(net, groups, Random(), "bert")
    again = scores(net, groups, Random(), "bert", seed=5)
    other = scores(net, groups, Random(seed=1), "bert")
    assert all(torch.equal(first[i], again[i]) for i in first)
    assert not any(torch.equal(first[i], other[i]) for i in first)


# --- refusals ------------------------------------------------------------------------------------


def test_unknown_names_and_options_are_refused():
    assert make_base_criterion("lora", {"eta": 1.0}) == LoraGuided(eta=1.0)
    with pytest.raises(UnknownNameError, match="did you mean 'wanda'"):
        make_base_criterion("wnda")
    with pytest.raises(UnknownNameError, match="did you mean 'eta'"):
        make_base_criterion("lora", {"etta": 1.0})
    for bad in ({"eta": -1.0}, {"eta": True}, {"squared": 1}, {"scaled": None}):
        with pytest.raises(ConfigError, match=r"lora\."):
            make_base_criterion("lora", bad)


def test_a_quantised_base_has_no_true_gradient():
    net, groups = lora_net("bert")
    path = groups[0].parts[0].path
    base = net.base_model.model.get_submodule(path).base_layer
    base.weight = nn.Parameter(torch.ones(16, 16, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ConfigError, match=r"taylor.*quantised"):
        Scorer(net.base_model.model, groups[:1], Taylor())


def test_a_branch_without_lora_is_no_lora():
    site = Site("x", "encoder", 0, 1, "ffn", "up", 4, 4)
    union = UnionLayer(nn.Linear(4, 4))
    kind = make_kind("ia3")
    union.add("default", Branch("slot", kind, site, 1, kind.scaling(1)), 0)
    layer = BaseLayer("x", union)
    assert layer.branch is None
    assert_close(layer.effective_weight()(slice(None)), union.base_layer.weight.detach())
