"""Time and memory of a pruned base with LoRA against the whole base with LoRA.

    python -m benchmarks.structured.speed
    python -m benchmarks.structured.speed --device cuda

Both models take the same step in one process, as a pair in random order. Times are processor
seconds of this process with one thread, on a GPU wall seconds. The prediction is the ratio of the
operations of matrix products that the two models do in that step, attention scores included, as
torch counts them with plain attention.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.harness import commit, machine
from benchmarks.structured.shapes import (
    SHAPES,
    TINY,
    VARIANTS,
    VOCABULARY,
    infer,
    make_net,
    make_optimizer,
    train_step,
    variants_of,
)
from prunepeft.state import write_json

HERE = Path(__file__).parent
LEAST_SECONDS = 0.2  # a shorter step is repeated within a pair


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--only", nargs="*", default=[], choices=(*SHAPES, "tiny"))
    parser.add_argument("--results", type=Path, default=HERE / "results", help="where files go")
    args = parser.parse_args()
    torch.set_num_threads(1)
    device = torch.device(args.device)
    for name in args.only or [n for n, s in SHAPES.items() if args.device in s.sizes]:
        dense = measure_memory(name, "dense", args.device)
        for variant in variants_of(SHAPES.get(name, TINY)):
            result = measure(name, variant, args.pairs, device)
            cut = measure_memory(name, variant, args.device)
            result["memory"] = compare_memory(dense, cut)
            write_json(args.results / f"{name}-{variant}-{args.device}.json", result)
            print(name, variant, {k: round(result[k]["reached"], 3) for k in ("train", "infer")})


def measure(name: str, variant: str, pairs: int, device: torch.device) -> dict[str, Any]:
    """Speed-up of one variant of one shape over the whole model, and what the operations say."""
    shape = SHAPES.get(name, TINY)
    size = shape.sizes[device.type]
    made = {v: make_net(shape, VARIANTS[v], device) for v in ("dense", variant)}
    nets = {key: net for key, (net, _) in made.items()}
    batch = torch.randint(0, VOCABULARY, (size.rows, size.tokens), device=device)
    train, latency = {}, {}
    for key, net in nets.items():
        train[key] = partial(train_step, net.train(), make_optimizer(net), batch)
        latency[key] = partial(infer, net, batch[:1])
    record = {
        "commit": commit(),
        "machine": machine(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "shape": name,
        "variant": variant,
        "dtype": str(shape.dtype).removeprefix("torch."),
        "layers": size.layers,
        "rows": size.rows,
        "tokens": size.tokens,
        "pairs": pairs,
        "units": {key: units for key, (_, units) in made.items()},
        "base_params": {key: count_base(net) for key, net in nets.items()},
        "train": compare(train, nets, pairs, device),
    }
    for net in nets.values():
        net.eval()
    return record | {"infer": compare(latency, nets, pairs, device)}


def compare(
    steps: dict[str, Callable[[], None]],
    nets: dict[str, PeftModel],
    pairs: int,
    device: torch.device,
) -> dict[str, Any]:
    """Times of both steps, pair by pair, over what their operations predict."""
    operations = {key: count_operations(step, nets[key]) for key, step in steps.items()}
    for step in steps.values():
        timed(step, 1, device)
    first = max(timed(steps["dense"], 1, device), 1e-6)
    repeats = max(1, round(LEAST_SECONDS / first))
    found = []
    for _ in range(pairs):
        order = random.sample(list(steps), 2)
        found.append({key: timed(steps[key], repeats, device) / repeats for key in order})
    other = next(key for key in steps if key != "dense")
    ratios = [times["dense"] / times[other] for times in found]
    predicted = operations["dense"] / operations[other]
    return {
        "seconds": {key: statistics.median(times[key] for times in found) for key in steps},
        "repeats": repeats,
        "speedup": statistics.median(ratios),
        "speedup_quartiles": statistics.quantiles(ratios, n=4),
        "operations": operations,
        "predicted": predicted,
        "reached": statistics.median(ratios) / predicted,
    }


def count_operations(step: Callable[[], None], net: PeftModel) -> int:
    """Operations of matrix products in a step; fused attention on a CPU would not be counted."""
    model = net.base_model.model
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter:
        step()
    model.set_attn_implementation(before)
    return counter.get_total_flops()


def timed(step: Callable[[], None], repeats: int, device: torch.device) -> float:
    """Seconds of so many steps."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(repeats):
            step()
        torch.cuda.synchronize()
        return time.perf_counter() - began
    began = time.process_time()
    for _ in range(repeats):
        step()
    return time.process_time() - began


def count_base(net: PeftModel) -> int:
    """Parameters of the frozen model."""
    return sum(p.numel() for p in net.parameters() if not p.requires_grad)


def measure_memory(name: str, variant: str, device: str) -> dict[str, dict[str, int]]:
    """Peak and counted bytes, in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.structured.memory", name, variant, device]
    # Large blocks go back to the system at once, so that the peak is that of live tensors.
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "131072", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def compare_memory(dense: dict[str, Any], pruned: dict[str, Any]) -> dict[str, Any]:
    """Peak of the pruned over that of the whole model, and what the tensors' bytes predict."""
    return {
        step: {
            "dense": dense[step],
            "pruned": pruned[step],
            "ratio": pruned[step]["peak"] / dense[step]["peak"],
            "predicted": pruned[step]["counted"] / dense[step]["counted"],
        }
        for step in ("train", "infer")
    }


if __name__ == "__main__":
    main()
