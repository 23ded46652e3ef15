"""A supernet step on a large decoder against plain peft LoRA of the supernet's largest rank.

    python -m benchmarks.gpu.large --results FOLDER
    python -m benchmarks.gpu.large --only 8bit 4bit compiled --results FOLDER

Random weights in the shape of a LLaMA of 1 and of 7 billion parameters, bfloat16, gradient
checkpointing for the larger. Each case in a process of its own: seconds a step (median), and the
peak of allocated memory. `supernet` holds LoRA and a serial adapter wherever they go and records
all six criteria; `peft` is LoRA of peft of the same rank on all linear layers; `pruned` is the
supernet without the lower half of the layers and a third of the modules of the rest. `8bit`, `4bit`
and `compiled` are the supernet on a quantised base, and compiled.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.harness import commit, machine
from prunepeft.candidates import make_space
from prunepeft.criteria import PAPER_CRITERIA, needs_of
from prunepeft.criteria.record import Recorder
from prunepeft.sites import find_sites
from prunepeft.state import write_json
from prunepeft.supernet import attach
from prunepeft.supernet.compiling import compiled

RANK, STEPS = 16, 6
SHAPES: dict[str, dict[str, Any]] = {
    "llama-1b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "num_hidden_layers": 16,
        "vocab_size": 32000,
    },
    "llama-7b": {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "vocab_size": 32000,
    },
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_attention_heads": 4,
        "num_hidden_layers": 4,
        "vocab_size": 100,
    },
}
SIZES = {"llama-1b": (8, 512), "llama-7b": (4, 512), "tiny": (2, 16)}
NETS = ("peft", "supernet", "pruned")
EXTRAS = ("8bit", "4bit", "compiled")


def make_model(shape: str, device: str, bits: str = "") -> nn.Module:
    """Random weights, quantised if asked for."""
    torch.manual_seed(0)
    config = AutoConfig.for_model("llama", use_cache=False, **SHAPES[shape])
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return quantised(model, bits) if bits else model


def quantised(model: nn.Module, bits: str) -> nn.Module:
    """The same with the linear layers of the blocks in 8 or 4 bits of bitsandbytes."""
    import bitsandbytes as bnb

    for path in [site.path for site in find_sites(model) if site.role != "norm"]:
        parent, _, name = path.rpartition(".")
        old = model.get_submodule(path)
        shape = (old.in_features, old.out_features)
        if bits == "8bit":
            new = bnb.nn.Linear8bitLt(*shape, bias=False, has_fp16_weights=False)
            new.weight = bnb.nn.Int8Params(old.weight.data.cpu(), requires_grad=False)
        else:
            new = bnb.nn.Linear4bit(*shape, bias=False, compute_dtype=torch.bfloat16)
            new.weight = bnb.nn.Params4bit(old.weight.data.cpu(), requires_grad=False)
        setattr(model.get_submodule(parent), name, new.to(old.weight.device))
    return model


def make_net(model: nn.Module, what: str) -> nn.Module:
    """Modules on the model."""
    sites = find_sites(model)
    if what == "peft":
        targets = [site.path for site in sites if site.role != "norm"]
        return get_peft_model(model, LoraConfig(r=RANK, lora_alpha=RANK, target_modules=targets))
    sizes = {"lora": RANK, "serial_adapter": RANK}
    full = make_space(sites, tuple(sizes), sizes=sizes).full()
    if what == "pruned":
        n = model.config.num_hidden_layers
        low = [slot.id for slot in full if slot.layer < n // 2]
        upper = full.without(low)
        full = upper.without(list(upper.ids)[::3])
    return attach(model, full)


def measure(shape: str, what: str, device: str) -> dict[str, Any]:
    """Seconds a step and peak bytes, in this process."""
    bits = what if what in ("8bit", "4bit") else ""
    net = make_net(make_model(shape, device, bits), "supernet" if what in EXTRAS else what).train()
    if shape == "llama-7b":
        net.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    rows, tokens = SIZES[shape]
    ids = torch.randint(0, SHAPES[shape]["vocab_size"], (rows, tokens), device=device)
    trained = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    recorder = None
    if what in ("supernet", *EXTRAS):
        recorder = Recorder.for_net(net, needs_of(PAPER_CRITERIA)).__enter__()
    times: list[float] = []

    def steps() -> None:
        for _ in range(STEPS * (4 if what == "compiled" else 1)):
            synchronize(device)
            began = time.perf_counter()
            with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
                loss = net(input_ids=ids, labels=ids).loss
            loss.backward()
            if recorder is not None:
                recorder.step()
            optimizer.step()
            optimizer.zero_grad()
            synchronize(device)
            times.append(time.perf_counter() - began)

    if what == "compiled":
        with compiled(net, "inductor" if device == "cuda" else "eager"):
            steps()
    else:
        steps()
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else 0
    return {
        "seconds": statistics.median(times[len(times) // 2 :]),
        "peak": peak,
        "trainable": sum(p.numel() for p in trained),
        "weights": sum(p.nbytes for p in net.parameters() if not p.requires_grad),
    }


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def apart(shape: str, what: str, device: str) -> dict[str, Any]:
    """`measure` in a process of its own, or why it failed."""
    command = [sys.executable, "-m", "benchmarks.gpu.large", "--case", shape, what]
    done = subprocess.run([*command, "--device", device], capture_output=True, text=True)
    if done.returncode:
        return {"error": done.stderr.strip().splitlines()[-1][:500]}
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda", choices=("cpu", "cuda"))
    parser.add_argument("--only", nargs="*", default=list(NETS), choices=(*NETS, *EXTRAS))
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--case", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case:
        print(json.dumps(measure(*args.case, args.device)))
        return
    shapes = ("tiny",) if args.device == "cpu" else ("llama-7b", "llama-1b")
    for shape in shapes:
        for what in args.only:
            found = apart(shape, what, args.device)
            print(shape, what, found, flush=True)
            rows, tokens = SIZES[shape]
            record = {"commit": commit(), "machine": machine(), "shape": shape, "net": what}
            name = torch.cuda.get_device_name() if args.device == "cuda" else "cpu"
            record |= {"device": name, "rows": rows, "tokens": tokens, "rank": RANK} | found
            write_json(args.results / f"large-{shape}-{what}-{args.device}.json", record)


if __name__ == "__main__":
    main()
