"""Evaluators for tests of backends, which worker processes can build: pure Python, and they die."""

import os
import signal
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

from prunepeft import errors
from prunepeft.evaluate import Tried
from prunepeft.space import Placement, SearchSpace, Site, Slot

SITES = [
    Site(f"l.{i}.{r}", "encoder", i, 3, "attention", r, 16, 16) for i in range(3) for r in "qv"
]
SPACE = SearchSpace(tuple(Slot((site,), "lora", (1, 2, 4)) for site in SITES))


@dataclass
class FakeEvaluator:
    """A metric made from the sizes alone, with a journal in memory.

    Args:
        log: A line `PID digest` for every training.
        faults: Total size of a placement -> what happens to it: `fails`, or an error's name, or
            `dies` (always), `dies once`, `slow`.
    """

    log: Path
    faults: dict[int, str] = field(default_factory=dict)
    kept: dict[str, Tried] = field(default_factory=dict)

    def trial(self, placement, *, name, fidelity, seed) -> Tried:
        if (found := self.find_trial(placement, fidelity=fidelity, seed=seed)) is not None:
            return found
        total = sum(placement.sizes.values())
        fault = self.faults.get(total, "")
        with self.log.open("a") as file:
            file.write(f"{os.getpid()} {placement.digest}\n")
        once = self.log.with_name(f"died-{total}")
        if fault == "dies" or (fault == "dies once" and not once.exists()):
            once.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if fault == "slow":
            time.sleep(0.5)
        key = f"{placement.digest}-{fidelity.data}-{seed}"
        if fault == "fails":
            tried = Tried(error="StateError: the loss became nan", key=key, steps=3)
        elif hasattr(errors, fault):
            raise getattr(errors, fault)(f"a bad row in {name}")
        elif fault == "OSError":
            raise OSError(28, "No space left on device")
        else:
            metric = {"accuracy": total / 7 + seed % 5}
            tried = Tried(metric, key=key, loss=0.1 / total, seconds=1.0, steps=3, rows=9)
        return self.keep_trial(placement, tried, fidelity=fidelity, seed=seed)

    def find_trial(self, placement, *, fidelity, seed) -> Tried | None:
        return self.kept.get(f"{placement.digest}-{fidelity.data}-{seed}")

    def keep_trial(self, placement, tried, *, fidelity, seed) -> Tried:
        key = f"{placement.digest}-{fidelity.data}-{seed}"
        self.kept[key] = replace(tried, key=key)
        return self.kept[key]


def cannot_build() -> FakeEvaluator:
    raise errors.DataError("the data has changed; run again.")


def dies_at_birth() -> FakeEvaluator:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def placements(n: int) -> list[Placement]:
    """Placements of total size 1 to n, for n up to 24."""
    found = []
    for total in range(1, n + 1):
        sizes, left = {}, total
        for slot in SPACE:
            if left:
                sizes[slot] = max(s for s in slot.sizes if s <= left)
                left -= sizes[slot]
        found.append(Placement(sizes))
    return found
