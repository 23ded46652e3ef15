"""What recording all six criteria adds to a training step, paired step by step in one process.

    python -m benchmarks.engine.recorder --model FOLDER

The supernet of the default space is on the model; batches are 16 rows of 64 random tokens. In each
pair the same batch goes through a plain step and through a recorded one, in random order; with
`output_every` steps to a cycle, a pair is one cycle long. Times are processor seconds of this
process, so other work on the machine hardly counts. The ratio is the median over the pairs.
"""

import argparse
import random
import statistics
import time
from pathlib import Path

import torch
from transformers import AutoModelForSequenceClassification

from benchmarks.harness import commit, machine
from prunepeft.candidates import make_space
from prunepeft.criteria import CRITERIA, PAPER_CRITERIA
from prunepeft.criteria.record import Recorder
from prunepeft.sites import count_base_params, find_sites
from prunepeft.state import write_json
from prunepeft.supernet import attach

ROWS, TOKENS, EVERY = 16, 64, 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--pairs", type=int, default=25)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(args.model)
    budget = count_base_params(model) // 100
    space = make_space(find_sites(model), target_params=4 * budget)
    net = attach(model, space.full(), modules_to_save=["classifier"], task_type="SEQ_CLS").train()
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=1e-4)
    needs = frozenset().union(*(CRITERIA.get(c).needs for c in PAPER_CRITERIA))

    def step(recorder: Recorder | None, batch: dict[str, torch.Tensor]) -> None:
        net(**batch).loss.backward()
        if recorder is not None:
            recorder.step()
        optimizer.step()
        optimizer.zero_grad()

    def cycle(record: bool, batches: list[dict[str, torch.Tensor]]) -> float:
        recorder = Recorder.for_net(net, needs, EVERY) if record else None
        if recorder is None:
            began = time.process_time()
            for batch in batches:
                step(None, batch)
            return time.process_time() - began
        with recorder:
            step(recorder, batches[0])  # buffers are made in the first step, once a round
            recorder.reset()
            began = time.process_time()
            for batch in batches:
                step(recorder, batch)
            return time.process_time() - began

    def make_batches() -> list[dict[str, torch.Tensor]]:
        size = model.config.vocab_size
        return [
            {
                "input_ids": torch.randint(5, size, (ROWS, TOKENS)),
                "attention_mask": torch.ones(ROWS, TOKENS, dtype=torch.long),
                "labels": torch.randint(0, 2, (ROWS,)),
            }
            for _ in range(EVERY)
        ]

    cycle(True, make_batches()), cycle(False, make_batches())
    pairs = []
    for _ in range(args.pairs):
        batches, times = make_batches(), {}
        for record in random.sample([True, False], 2):
            times[record] = cycle(record, batches)
        pairs.append((times[False], times[True]))
    ratios = sorted(recorded / plain for plain, recorded in pairs)
    result = {
        "commit": commit(),
        "machine": machine(),
        "slots": len(space),
        "rows": ROWS,
        "tokens": TOKENS,
        "pairs": len(pairs),
        "steps_per_pair": EVERY,
        "plain_seconds_per_step": statistics.median(p for p, _ in pairs) / EVERY,
        "ratio_median": statistics.median(ratios),
        "ratio_quartiles": statistics.quantiles(ratios, n=4),
        "ratio_of_sums": sum(r for _, r in pairs) / sum(p for p, _ in pairs),
    }
    write_json(Path(__file__).parent / "results" / f"recorder-{args.threads}-threads.json", result)
    print(result)


if __name__ == "__main__":
    main()
