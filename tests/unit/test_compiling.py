"""torch.compile as an option: the same training, one compilation a placement, recording at ease."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

import prunepeft
from prunepeft.criteria.record import Recorder
from prunepeft.errors import ConfigError
from prunepeft.supernet import remove_slots, trainable_state
from prunepeft.supernet.compiling import check_backend, compiled
from prunepeft.training import make_optimizer, make_scheduler
from tests.tiny_tokenizer import save_tiny_model
from tests.unit.test_training import make_net, make_phases, make_rows


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[torch.fx.GraphModule]:
    """Graphs that were compiled, by a backend that runs them as they are."""
    made: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, inputs: list) -> Callable:
        made.append(graph)
        return graph.forward

    monkeypatch.setitem(torch._dynamo.backends.registry._COMPILER_FNS, "keep", keep)
    monkeypatch.setitem(torch._dynamo.backends.registry._BACKENDS, "keep", None)
    yield made
    torch.compiler.reset()


def trained(net, phases, *, backend: str | None = None, record: bool = False):
    """Losses of two epochs, the weights, and what was recorded."""
    optimizer = make_optimizer(net, phases.settings, 1e-2)
    scheduler = make_scheduler(optimizer, phases.settings, 8)
    phases.settings = phases.settings.model_copy(update={"compile": backend})
    recorder = Recorder.for_net(net).__enter__() if record else None
    with phases.compiling(net, 1000):
        losses = [
            phases.run(net, phases.train, optimizer, scheduler, epoch, recorder).loss
            for epoch in range(2)
        ]
        losses.append(phases.evaluate(net)["loss"])
    found = None
    if recorder is not None:
        recorder.__exit__(None, None, None)
        found = recorder.read()
    return losses, trainable_state(net), found


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_a_compiled_training_is_the_same_and_compiles_once(name: str, graphs) -> None:
    rows = make_rows(name, n=32, length=None)
    plain = trained(make_net(name), make_phases(rows))
    found = trained(make_net(name), make_phases(rows), backend="keep")
    assert found[0] == pytest.approx(plain[0], abs=1e-5)
    assert_close(found[1], plain[1], rtol=0, atol=1e-5)
    assert 1 <= len(graphs) <= 4  # training and evaluation, of any width


def test_after_pruning_a_model_is_compiled_anew(graphs) -> None:
    net = make_net("bert")
    phases = make_phases(make_rows("bert", n=16))
    trained(net, phases, backend="keep")
    first = len(graphs)
    slots = [i for i in prunepeft.placement_of(net).ids if ".0." in i]
    for slot_id in slots[:3]:
        remove_slots(net, [slot_id])
        before = len(graphs)
        trained(net, phases, backend="keep")
        assert 1 <= len(graphs) - before <= first
    assert "forward" not in net.get_base_model().__dict__


def test_what_is_recorded_is_the_same(graphs) -> None:
    rows = make_rows("bert", n=40)
    plain = trained(make_net("bert"), make_phases(rows), record=True)[2]
    found = trained(make_net("bert"), make_phases(rows), backend="keep", record=True)[2]
    assert_close(found.output_abs_mean, plain.output_abs_mean, rtol=1e-4, atol=1e-7)
    assert_close(found.abs_grad_mean, plain.abs_grad_mean, rtol=1e-3, atol=1e-7)
    assert found.output_abs_mean.all()
    assert (
        1 <= len(graphs) <= 4
    )  # no breaks where outputs are looked at: those steps are not compiled


def test_an_own_forward_comes_back() -> None:
    net = make_net("bert")
    base = net.get_base_model()
    own = base.forward
    base.forward = own
    with pytest.raises(ZeroDivisionError), compiled(net, "eager"):
        raise ZeroDivisionError
    assert base.__dict__["forward"] is own


def test_short_trainings_are_not_compiled(graphs) -> None:
    net, phases = make_net("bert"), make_phases(make_rows("bert"), compile="keep")
    with phases.compiling(net, 99):
        assert "forward" not in net.get_base_model().__dict__
    with phases.compiling(net, 100):
        assert "forward" in net.get_base_model().__dict__
    assert not graphs


def test_an_unknown_backend_is_refused(tmp_path: Path) -> None:
    check_backend("inductor")
    data = tmp_path / "rows.jsonl"
    lines = [json.dumps({"text": f"w{i} w{i % 3}", "label": i % 2}) for i in range(40)]
    data.write_text("\n".join(lines))
    model = str(save_tiny_model(tmp_path / "bert", "bert", head="base"))
    train, output = {"compile": "inducter"}, str(tmp_path / "run")
    with pytest.raises(ConfigError, match=r"no backend of torch\.compile; use one of .*inductor"):
        prunepeft.search(model, str(data), budget="900", train=train, output=output, device="cpu")
