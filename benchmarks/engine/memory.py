"""Peak memory of a supernet step against plain peft LoRA of the supernet's largest rank.

    python -m benchmarks.engine.memory LAYERS ROWS TOKENS supernet|peft

prints one line of JSON: the growth of the resident set of a process of its own, over what it holds
before there is a model.
"""

import json
import os
import subprocess
import sys

import torch

from benchmarks.engine.nets import RANK, VOCABULARY, make_model, plain_lora, union
from benchmarks.structured.memory import peak, reset, warm_up
from prunepeft.candidates import make_space
from prunepeft.criteria import PAPER_CRITERIA, needs_of
from prunepeft.criteria.record import Recorder
from prunepeft.sites import find_sites

STEPS = 4


def measure(layers: int, rows: int, tokens: int) -> dict[str, float]:
    """Peak bytes of both, and their ratio."""
    found = {what: _apart(layers, rows, tokens, what) for what in ("peft", "supernet")}
    return found | {"ratio": found["supernet"]["peak"] / found["peft"]["peak"]}


def main() -> None:
    layers, rows, tokens = map(int, sys.argv[1:4])
    torch.set_num_threads(1)
    device = torch.device("cpu")
    warm_up(device)
    before = reset(device)
    model = make_model(layers)
    if sys.argv[4] == "peft":
        net, recorder = plain_lora(model), None
    else:
        sizes = {"lora": RANK, "serial_adapter": RANK}
        net = union(model, make_space(find_sites(model), tuple(sizes), sizes=sizes).full())
        recorder = Recorder.for_net(net, needs_of(PAPER_CRITERIA)).__enter__()
    trained = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    ids = torch.randint(5, VOCABULARY, (rows, tokens))
    batch = {"input_ids": ids, "labels": torch.zeros(rows, dtype=torch.long)}
    net.train()
    reset(device)
    for _ in range(STEPS):
        net(**batch).loss.backward()
        if recorder is not None:
            recorder.step()
        optimizer.step()
        optimizer.zero_grad()
    count = sum(p.numel() for p in trained)
    print(json.dumps({"peak": peak(device) - before, "trainable": count}))


def _apart(layers: int, rows: int, tokens: int, what: str) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.engine.memory", *map(str, (layers, rows, tokens))]
    # Large blocks go back to the system at once, so that the peak is that of live tensors.
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "131072", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, what], env=env, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} {what} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    main()
