"""Peak memory of a training step and of inference in this process, as one line of JSON.

    python -m benchmarks.structured.memory SHAPE VARIANT DEVICE

On a CPU the peak is the growth of the resident set over what the process holds before there is a
model (Linux only); on a GPU it is what torch has allocated at most. `counted` are the bytes of the
tensors that must be there: weights, in training also what autograd keeps for the backward pass,
gradients and optimiser states.
"""

import ctypes
import gc
import json
import sys
from pathlib import Path

import torch
from peft import PeftModel
from torch import Tensor

from benchmarks.structured.shapes import (
    SHAPES,
    TINY,
    VARIANTS,
    VOCABULARY,
    infer,
    make_net,
    make_optimizer,
    train_step,
)

STEPS = 3


def main() -> None:
    name, variant, kind = sys.argv[1:]
    torch.set_num_threads(1)
    shape, device = SHAPES.get(name, TINY), torch.device(kind)
    size = shape.sizes[kind]
    warm_up(device)
    before = reset(device)
    net, _ = make_net(shape, VARIANTS[variant], device)
    batch = torch.randint(0, VOCABULARY, (size.rows, size.tokens), device=device)
    found = {}
    reset(device)
    for _ in range(STEPS):
        infer(net.eval(), batch[:1])
    weights = sum(p.nbytes for p in net.parameters()) + sum(b.nbytes for b in net.buffers())
    found["infer"] = {"peak": peak(device) - before, "counted": weights}
    optimizer = make_optimizer(net.train())
    reset(device)
    for _ in range(STEPS):
        train_step(net, optimizer, batch)
    top = peak(device) - before
    trained = sum(p.nbytes for p in net.parameters() if p.requires_grad)
    counted = weights + 3 * trained + saved_bytes(net, optimizer, batch)
    found["train"] = {"peak": top, "counted": counted}
    print(json.dumps(found))


def saved_bytes(net: PeftModel, optimizer: torch.optim.Optimizer, x: Tensor) -> int:
    """Bytes that autograd keeps from the forward to the backward pass, weights left out."""
    weights = {p.untyped_storage().data_ptr() for p in net.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        train_step(net, optimizer, x)
    return sum(kept.values())


def warm_up(device: torch.device) -> None:
    """What the first operations load is no part of a model."""
    x = torch.randn(64, 64, device=device, requires_grad=True)
    (x @ x).square().mean().backward()


def reset(device: torch.device) -> int:
    """Start a new peak; returns the bytes held now."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again at VmRSS
    return _status("VmRSS")


def peak(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated() if device.type == "cuda" else _status("VmHWM")


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


if __name__ == "__main__":
    main()
