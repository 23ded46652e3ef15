"""Criterion `ist`: layers are turned down while a supernet trains as ever."""

import pytest
import torch
from peft import PeftModel

from prunepeft import attach, find_sites, make_space
from prunepeft.criteria import PAPER_CRITERIA, score_units
from prunepeft.criteria.base import NEEDS
from prunepeft.criteria.record import Recorder
from prunepeft.errors import ConfigError, StateError
from prunepeft.kinds import seeded
from prunepeft.sparse_tuning import IstSettings, LayerTrials, peft_layers
from prunepeft.supernet import slot_parameters, trainable_state
from tests.lora_nets import batch_of
from tests.tiny_models import TINY
from tests.watched_toy import Toy


def deep(name: str, scale: float = 0.2) -> PeftModel:
    """Four layers with modules, of which those of layer 2 do five times as much."""
    base = TINY[name](num_hidden_layers=4)
    kinds = ("lora", "serial_adapter")
    net = attach(base, make_space(find_sites(base), kinds, target_params=4000).full())
    with torch.no_grad():
        for path, parameter in net.named_parameters():
            if parameter.requires_grad:
                parameter += 0.3 * torch.randn(parameter.shape, generator=seeded(2, path))
                if ".2." not in path:
                    parameter *= scale
    return net.train()


def own_words(net: PeftModel, name: str) -> dict[str, torch.Tensor]:
    """A batch with the labels that the model gives with all its modules."""
    batch = batch_of(name, net, 0)
    with torch.no_grad():
        batch["labels"] = net.eval()(**batch).logits.argmax(-1)
    net.train()
    return batch


def trained(net: PeftModel, needs: frozenset[str], steps: int = 8) -> Recorder:
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=1e-3)
    torch.manual_seed(3)  # dropout
    with Recorder.for_net(net, needs) as recorder:
        for number in range(steps):
            net(**batch_of("llama", net, number)).loss.backward()
            recorder.step()
            optimizer.step()
            optimizer.zero_grad()
    return recorder


@pytest.mark.parametrize("accumulation", [1, 2])
def test_modules_of_the_layer_that_matters_are_worth_most(accumulation: int) -> None:
    net = deep("llama")
    batch = own_words(net, "llama")
    settings = IstSettings(score_lr=100.0, beta=0.0, every=1, reward="relative")
    units = {i: list(ps.values()) for i, ps in slot_parameters(net).items()}
    recorder = Recorder(units, (), {"suppression"}, trials=LayerTrials(net, settings))
    with recorder:
        for _ in range(30):
            for _ in range(accumulation):
                net(**batch).loss.backward()
            recorder.step()
    found = score_units(recorder.read(), ["ist"])["ist"]
    assert {i for i in found if found[i] == max(found.values())} == {i for i in found if ".2." in i}
    assert all(0 < value < 1 for value in found.values())
    assert len(set(found.values())) == 4  # one number a layer


def test_training_goes_on_as_if_nobody_had_asked() -> None:
    plain, asked = deep("llama"), deep("llama")
    trained(plain, NEEDS - {"suppression"})
    recorder = trained(asked, NEEDS)
    before, after = trainable_state(plain), trainable_state(asked)
    assert all(torch.equal(before[n], after[n]) for n in before)
    assert len(set(recorder.read().layer_importance.tolist())) > 1
    assert not asked._forward_pre_hooks
    scores = score_units(recorder.read(), [*PAPER_CRITERIA, "ist"])
    assert score_units(trained(deep("llama"), NEEDS).read(), list(scores)) == scores


def test_trials_come_in_the_first_two_steps_and_then_in_every_fourth(monkeypatch) -> None:
    net = deep("llama")
    due = []
    monkeypatch.setattr(LayerTrials, "_judge", lambda self: due.append(self.sampler.step))
    trained(net, frozenset({"suppression"}), 10)
    assert due == [0, 1, 5, 9]


def test_a_repeated_pass_starts_without_opinion() -> None:
    net = deep("llama")
    trials = LayerTrials(net, IstSettings(every=1, reward="relative"))
    units = {i: list(ps.values()) for i, ps in slot_parameters(net).items()}
    trials.start()
    net(**own_words(net, "llama"))
    trials.step()
    first = trials.importance(units)
    assert len(set(first.tolist())) > 1
    trials.reset()
    assert set(trials.importance(units).tolist()) == {0.5}
    trials.step()
    assert torch.equal(trials.importance(units), first)
    trials.stop()
    trials.stop()


def test_a_unit_of_no_layer_has_no_opinion() -> None:
    trials = LayerTrials(deep("bert"))
    stray = torch.nn.Parameter(torch.ones(2))
    own = peft_layers(trials.model)[0].parameters[0]
    assert trials.importance({"stray": [stray], "own": [own]}).tolist() == [0.5, 0.5]


def test_what_cannot_be_judged_is_refused() -> None:
    toy = Toy()
    with pytest.raises(ConfigError, match=r"Recorder\.for_net"):
        Recorder(toy.units, toy.layers, {"suppression"})
    net = deep("llama")
    with Recorder.for_net(net, {"suppression"}) as recorder:
        with pytest.raises(StateError, match="no batch was seen before this optimiser step"):
            recorder.step()
        batch = batch_of("llama", net, 0)
        del batch["labels"]
        net(**batch)
        with pytest.raises(ConfigError, match="returned none"):
            recorder.step()
    assert net.training
