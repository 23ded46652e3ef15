"""Time and memory of a training step with sparse tuning against training all layers.

    python -m benchmarks.sparse_tuning.cost
    python -m benchmarks.sparse_tuning.cost --device cuda

A decoder of the shape of a LLaMA of a billion parameters with random weights and LoRA of rank 32 on
query, key, value, up and down. Time: cycles of ten steps, in which the trials come once, as a pair
in one process in random order; processor seconds, on a GPU wall seconds. Memory: the peak of ten
steps after ten others, so that every layer has been trained, each in a process of its own (on a CPU
the growth of the resident set over what is held before there is a model).
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.harness import commit, machine
from benchmarks.structured.memory import peak, reset, warm_up
from benchmarks.structured.shapes import SHAPES, VOCABULARY, Size
from benchmarks.structured.speed import timed
from prunepeft.candidates import make_space
from prunepeft.sites import find_sites
from prunepeft.sparse_tuning import IstSettings, SparseTuning
from prunepeft.state import write_json
from prunepeft.supernet import attach

HERE = Path(__file__).parent
SHAPE, RANK, CYCLE = SHAPES["llama-1b"], 32, 10
SIZES = {"cpu": Size(8, 2, 64), "cuda": Size(16, 8, 512)}
MEMORY_SIZES = {"cpu": Size(8, 2, 256), "cuda": Size(16, 8, 512)}
ROLES = tuple((role,) for role in ("q", "k", "v", "up", "down"))
VARIANTS: dict[str, IstSettings | None] = {
    "all": None,
    "ist": IstSettings(probe_rows=2),
    "ist-drop": IstSettings(probe_rows=2, optimizer_state="drop"),
    "ist-offload": IstSettings(probe_rows=2, optimizer_state="offload"),
    "rst": IstSettings(sampling="uniform"),
}


class Job:
    """The model, one optimiser, and a step."""

    def __init__(self, net: PeftModel, settings: IstSettings | None, size: Size) -> None:
        self.net = net
        device = next(net.parameters()).device
        draw = torch.Generator().manual_seed(0)
        rows = torch.randint(0, VOCABULARY, (64, size.tokens), generator=draw)
        self.batch = self._collate(list(rows[: size.rows].to(device)))
        trained = [p for p in net.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-4)
        self.tuning = settings and SparseTuning(net, settings, 0, rows, self._collate)

    def step(self) -> None:
        """One optimiser step."""
        if self.tuning:
            self.tuning.begin_step(self.optimizer)
        device = self.batch["input_ids"].device.type
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            loss = self.net(**self.batch).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def cycle(self) -> None:
        """As many steps as lie between two updates of the scores."""
        for _ in range(CYCLE):
            self.step()
        if self.tuning:
            self.tuning.restore()

    @staticmethod
    def _collate(rows: list[Tensor]) -> dict[str, Tensor]:
        ids = torch.stack(rows)
        return {"input_ids": ids, "labels": ids}


def make_net(device: torch.device) -> PeftModel:
    """Random weights; the same every time."""
    torch.manual_seed(0)
    layers = SIZES[device.type].layers
    config = AutoConfig.for_model(
        SHAPE.family, vocab_size=VOCABULARY, num_hidden_layers=layers, **SHAPE.config
    )
    config.use_cache = False
    half = device.type == "cuda"
    with torch.device(device):
        dtype = torch.bfloat16 if half else torch.float32
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    space = make_space(find_sites(model), ("lora",), sizes={"lora": RANK}, roles={"lora": ROLES})
    return attach(model, space.full()).train()


def measure_time(pairs: int, device: torch.device) -> dict[str, Any]:
    """Seconds a step of every variant over those of training all layers, on one model."""
    net, size = make_net(device), SIZES[device.type]
    jobs = {name: Job(net, settings, size) for name, settings in VARIANTS.items()}
    cycles: dict[str, Callable[[], None]] = {name: job.cycle for name, job in jobs.items()}
    for cycle in cycles.values():
        cycle()
    times: list[dict[str, float]] = []
    for number in range(pairs):
        order = random.sample(list(cycles), len(cycles))
        times.append({name: timed(cycles[name], 1, device) / CYCLE for name in order})
        print(number, {k: round(v, 3) for k, v in times[-1].items()}, flush=True)
    found = {}
    for name in VARIANTS:
        ratios = [t[name] / t["all"] for t in times]
        found[name] = {
            "seconds": statistics.median(t[name] for t in times),
            "ratio": statistics.median(ratios),
            "ratio_quartiles": statistics.quantiles(ratios, n=4),
        }
    return found


def measure_memory(name: str, device: torch.device) -> dict[str, int]:
    """Peak bytes, and numbers that the optimiser holds on the device, in this process."""
    warm_up(device)
    before = reset(device)
    job = Job(make_net(device), VARIANTS[name], MEMORY_SIZES[device.type])
    job.cycle()
    reset(device)
    gradients = 0
    for _ in range(CYCLE):
        job.step()
        gradients = max(gradients, sum(p.numel() for p in job.net.parameters() if p.requires_grad))
    top = peak(device) - before
    moments = [
        t.numel()
        for state in job.optimizer.state.values()
        for t in state.values()
        if t.ndim and t.device.type == device.type
    ]
    weights = sum(p.nbytes for p in job.net.parameters())
    return {"peak": top, "weights": weights, "moments": sum(moments), "gradients": gradients}


def measured_apart(name: str, device: str) -> dict[str, int]:
    """`measure_memory` in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.sparse_tuning.cost", "--memory", name]
    # Large blocks go back to the system at once, so that the peak is that of live tensors.
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "131072", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, "--device", device], env=env, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--results", type=Path, default=HERE / "results", help="where files go")
    parser.add_argument("--memory", choices=VARIANTS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    device = torch.device(args.device)
    if args.memory:
        print(json.dumps(measure_memory(args.memory, device)))
        return
    memory = {name: measured_apart(name, args.device) for name in VARIANTS}
    print({name: f"{found['peak'] / 2**20:,.0f} MiB" for name, found in memory.items()}, flush=True)
    time = measure_time(args.pairs, device)
    size = SIZES[device.type]
    result = {
        "commit": commit(),
        "machine": machine(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "layers": size.layers,
        "rows": size.rows,
        "tokens": size.tokens,
        "memory_tokens": MEMORY_SIZES[device.type].tokens,
        "rank": RANK,
        "pairs": args.pairs,
        "variants": {name: time[name] | {"memory": memory[name]} for name in VARIANTS},
    }
    write_json(args.results / f"cost-{args.device}.json", result)


if __name__ == "__main__":
    main()
