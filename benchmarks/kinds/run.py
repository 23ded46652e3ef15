"""Forward and backward of every kind against LoRA of rank 8 on the same layers, paired in one run.

    python -m benchmarks.kinds.run

Two transformer blocks of random weights: as in BERT-base and as in a 1B LLaMA with grouped queries.
The kind sits on every linear layer that it fits, LoRA on the same ones. One pair is a pass of each
over the same input, in random order. Times are processor seconds of this process with one thread.
Operations are those of matrix products in both passes, as torch counts them.
"""

import argparse
import random
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModel, PreTrainedModel

from benchmarks.harness import commit, machine
from prunepeft.kinds import KINDS, make_kind
from prunepeft.sites import find_sites
from prunepeft.space import Placement, Site, Slot
from prunepeft.state import write_json
from prunepeft.supernet import attach

SIZE = 8
TINY = {"vocab_size": 64, "num_hidden_layers": 2}
SHAPES: dict[str, tuple[str, dict[str, Any], int, int]] = {
    "bert-base": ("bert", {}, 16, 64),
    "llama-1b": (
        "llama",
        {
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
        },
        2,
        128,
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--only", nargs="*", default=[], help="kinds; all when not given")
    args = parser.parse_args()
    torch.set_num_threads(1)
    for shape in SHAPES:
        for kind in args.only or KINDS.names():
            sites = [s for s in find_sites(_model(shape)) if make_kind(kind).fits(s)]
            if kind != "lora" and sites:  # llama has no biases for bitfit
                result = measure(shape, kind, sites, args.pairs, torch.device(args.device))
                name = f"{shape}-{kind}-{args.device}.json"
                write_json(Path(__file__).parent / "results" / name, result)
                print(shape, kind, {k: result[k] for k in ("time_ratio", "operations_ratio")})


def measure(
    shape: str, kind: str, sites: list[Site], pairs: int, device: torch.device
) -> dict[str, Any]:
    """Ratios of this kind to LoRA on these sites of one shape; norms carry no LoRA."""
    homes = {kind: sites, "lora": [s for s in sites if s.role != "norm"]}
    homes["lora"] = homes["lora"] or [s for s in find_sites(_model(shape)) if s.role != "norm"]
    nets = {name: _net(shape, name, homes[name], device) for name in ("lora", kind)}
    rows, tokens = SHAPES[shape][2:]
    x = torch.randint(0, 64, (rows, tokens), device=device)
    operations = {name: _operations(net, x) for name, net in nets.items()}
    found: list[dict[str, float]] = []
    for _ in range(pairs):
        order = random.sample(list(nets), 2)
        found.append({name: _timed(nets[name], x) for name in order})
    ratios = sorted(times[kind] / times["lora"] for times in found)
    return {
        "commit": commit(),
        "machine": machine(),
        "device": str(device),
        "shape": shape,
        "kind": kind,
        "rows": rows,
        "tokens": tokens,
        "layers": len(sites),
        "lora_seconds": statistics.median(times["lora"] for times in found),
        "time_ratio": statistics.median(ratios),
        "time_quartiles": statistics.quantiles(ratios, n=4),
        "operations_ratio": operations[kind] / operations["lora"],
    }


def _model(shape: str) -> PreTrainedModel:
    family, settings, *_ = SHAPES[shape]
    torch.manual_seed(0)
    return AutoModel.from_config(AutoConfig.for_model(family, **(TINY | settings)))


def _net(shape: str, kind: str, sites: list[Site], device: torch.device) -> torch.nn.Module:
    size = SIZE if KINDS.get(kind).sized else 1
    placement = Placement({Slot((site,), kind, (size,)): size for site in sites})
    return attach(_model(shape), placement).to(device).train()


def _pass(net: torch.nn.Module, x: torch.Tensor) -> None:
    net(input_ids=x).last_hidden_state.square().mean().backward()
    net.zero_grad()


def _operations(net: torch.nn.Module, x: torch.Tensor) -> int:
    with FlopCounterMode(display=False) as counter:
        _pass(net, x)
    return counter.get_total_flops()


def _timed(net: torch.nn.Module, x: torch.Tensor) -> float:
    if x.is_cuda:
        torch.cuda.synchronize()
        began = time.perf_counter()
        _pass(net, x)
        torch.cuda.synchronize()
        return time.perf_counter() - began
    began = time.process_time()
    _pass(net, x)
    return time.process_time() - began


if __name__ == "__main__":
    main()
