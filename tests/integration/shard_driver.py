"""What every process of the sharding tests does.

python -m torch.distributed.run --nproc_per_node 2 shard_driver.py JOB FOLDER
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft import PeftModel
from torch import nn
from torch.testing import assert_close

import prunepeft
from prunepeft import run
from prunepeft.config import load_config
from prunepeft.engine import Engine
from prunepeft.plan import make_plan
from prunepeft.processes import is_cut, join, own_part, whole
from prunepeft.sharding import average_gradients, shard_base
from prunepeft.state import RunFolder
from prunepeft.supernet import remove_slots, trainable_state
from prunepeft.tasks.classify import find_head
from tests.integration.parallel_driver import one_epoch
from tests.tiny_models import TINY, tiny_inputs

CLASSIFIERS = ("seq-cls", "image-cls")
KINDS = ("lora", "dora", "serial_adapter")


def families(folder: Path) -> None:
    """Every family: attach, train a step, prune and detach, with parts as with the whole."""
    join("cpu")
    missing_gradients()
    for name in TINY:
        model, twin = TINY[name](), TINY[name]()
        head = find_head(model) if "Classification" in type(model).__name__ else []
        shard_base(model, head, "cpu")
        check_parts(model, twin, head)
        space = prunepeft.make_space(
            prunepeft.find_sites(twin), KINDS, sizes=dict.fromkeys(KINDS, 2)
        )
        for slots in (space.full(), space.full().without([s.id for s in space.slots[::2]])):
            net, alike = (attached(m, slots, head) for m in (model, twin))
            rows = tiny_inputs(name, twin)
            step(net, {k: v[dist.get_rank()][None] for k, v in rows.items()})
            average_gradients(net.parameters())
            for row in range(2):
                step(alike, {k: v[row][None] for k, v in rows.items()}, share=0.5)
            same_gradients(net, alike)
            for each in (net, alike):
                remove_slots(each, [s.id for s in list(slots)[1:]])
                each.zero_grad()
                each.eval()
            with torch.no_grad():
                assert_close(net(**rows).logits, alike(**rows).logits, rtol=0, atol=1e-6)
            model, twin = prunepeft.detach(net), prunepeft.detach(alike)
            check_parts(model, twin, head)


def attached(model: nn.Module, placement: Any, head: list[str]) -> PeftModel:
    net = prunepeft.attach(model, placement, seed=1, modules_to_save=head or None)
    for parameter in (
        p for n, p in net.named_parameters() if n.endswith(("_B.default", "_up.default"))
    ):
        nn.init.constant_(parameter, 0.1)
    return net.train()


def step(net: PeftModel, rows: dict[str, Any], share: float = 1.0) -> None:
    (share * net(**rows).logits.float().square().mean()).backward()


def same_gradients(net: PeftModel, alike: PeftModel) -> None:
    found, wanted = (
        {n: p.grad for n, p in m.named_parameters() if p.requires_grad} for m in (net, alike)
    )
    assert found.keys() == wanted.keys()
    assert not any(is_cut(p) for p in net.parameters() if p.requires_grad)
    for name, grad in wanted.items():
        assert (grad is None) == (found[name] is None), name
        if grad is not None:
            assert_close(found[name], grad, rtol=1e-5, atol=1e-6, msg=name)


def check_parts(model: nn.Module, twin: nn.Module, head: list[str]) -> None:
    """The processes hold the twin between them, half each, and the head both."""
    trained = {p for name in head for p in model.get_submodule(name).parameters()}
    assert {p for p in model.parameters() if p.requires_grad} == trained
    assert not any(is_cut(p) for p in trained)
    held = sum(own_part(p).numel() for p in model.parameters())
    total, n_head = sum(p.numel() for p in twin.parameters()), sum(p.numel() for p in trained)
    assert abs(held - (total + n_head) / 2) < 0.05 * total
    both = torch.tensor(held)
    dist.all_reduce(both)
    assert int(both) == total + n_head
    wanted = dict(twin.named_parameters())
    found = dict(model.named_parameters())
    assert found.keys() == wanted.keys()
    for name, parameter in found.items():
        assert torch.equal(whole(parameter), wanted[name]), name
    for (path, module), other in zip(model.named_modules(), twin.modules(), strict=True):
        names = [(type(m).__module__, type(m).__name__) for m in (module, other)]
        assert names[0] == names[1], path


def missing_gradients() -> None:
    """Gradients that some processes lack count as zero; those that all lack stay away."""
    rank = dist.get_rank()
    ones = [
        nn.Parameter(torch.ones(2, 3)),
        nn.Parameter(torch.ones(4)),
        nn.Parameter(torch.ones(1)),
    ]
    wide = nn.Parameter(torch.ones(2, dtype=torch.float64))
    frozen = nn.Parameter(torch.ones(2), requires_grad=False)
    ones[0].grad = torch.full((2, 3), 1.0 + rank)
    if rank == 1:
        ones[1].grad = torch.arange(4.0)
    wide.grad = torch.tensor([1.0, 1e-12 * rank], dtype=torch.float64)
    average_gradients([*ones, frozen, wide])
    assert torch.equal(ones[0].grad, torch.full((2, 3), 1.5))
    assert torch.equal(ones[1].grad, torch.arange(4.0) / 2)
    assert ones[2].grad is None
    assert frozen.grad is None
    assert torch.equal(wide.grad, torch.tensor([1.0, 5e-13], dtype=torch.float64))


def epochs(folder: Path) -> None:
    """An epoch of gradient descent for each of the settings that the test left."""
    join("cpu")
    found = {
        name: one_epoch(given["model"], given["data"], folder, given["settings"])
        for name, given in json.loads((folder / "epochs.json").read_text("utf-8")).items()
    }
    torch.save(found, folder / f"rank{dist.get_rank()}.pt")
    frozen_layers(json.loads((folder / "frozen.json").read_text("utf-8")))


def searches(folder: Path) -> None:
    """One search after another, with the settings that the test left."""
    for settings in json.loads((folder / "settings.json").read_text("utf-8")):
        run.search(load_config(None, (), settings))


def frozen_layers(settings: dict[str, Any]) -> None:
    """Output of frozen layers that is kept gives what running them gives."""
    plan = make_plan(load_config(None, (), settings))
    engine = Engine(plan, RunFolder(Path(settings["output"])), is_main=dist.get_rank() == 0)
    high = plan.space.full().without(
        [s.id for s in plan.space.slots if any(site.layer == 0 for site in s.sites)]
    )
    before = {n: whole(p).clone() for n, p in engine.model.named_parameters()}
    states = []
    for phases_prefix in (engine.phases.prefix, None):
        engine.phases.prefix = phases_prefix
        net = engine.evaluator.attach(high, 1)
        trained = [p for p in net.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(trained, lr=0.1)
        scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
        rows = engine.phases.train
        with engine.phases.reusing(net, rows, 2, "test"):
            if phases_prefix is not None:
                assert phases_prefix.of(rows) is not None
            engine.phases.run(net, rows, optimizer, scheduler, 5)
            engine.phases.evaluate(net)
        states.append(trainable_state(net))
        prunepeft.detach(net)
    assert_close(states[0], states[1], rtol=0, atol=1e-5)
    for name, parameter in engine.model.named_parameters():
        assert torch.equal(whole(parameter), before[name]), name


def on_devices(folder: Path) -> None:
    """A search on several GPUs; each holds its part of the base model and no more."""
    join("cuda")
    settings = json.loads((folder / "settings.json").read_text("utf-8"))[0]
    run.search(load_config(None, (), settings))
    plan = make_plan(load_config(None, (), settings))
    before = torch.cuda.memory_allocated()
    engine = Engine(plan, RunFolder(folder / "again"), is_main=False)
    n_bytes = sum(p.numel() * p.element_size() for p in engine.model.parameters())
    held = torch.cuda.memory_allocated() - before
    assert held < 0.5 * n_bytes + 5e5, (held, n_bytes)
    assert all(p.device.type == "cuda" for p in engine.model.parameters())


JOBS = {
    "FAMILIES": families,
    "EPOCHS": epochs,
    "SEARCH": searches,
    "GPU": on_devices,
}

if __name__ == "__main__":
    JOBS[sys.argv[1]](Path(sys.argv[2]))
