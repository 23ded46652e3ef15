"""Client of `kill_driver.py`: whole command lines of the tiny run, killed and broken at will."""

import json
import os
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from tests.disk_faults import leftovers
from tests.tiny_tokenizer import save_tiny_model

ROOT = Path(__file__).parents[2]
N_TRAIN, N_VALIDATION, EPOCHS, ROUNDS = 16, 8, 2, 2
SETTINGS = (
    f"train.epochs={EPOCHS}",
    "train.batch_size=8",
    "train.lr=0.003",
    "metric=mse",
    f"search.rounds={ROUNDS}",
    "search.warmup_rows=8",
    "search.warmup_epochs=1",
    "search.warmup_turns=2",
    "search.criteria=snip,minimum_weight,activation",
)
# One phase is an epoch: of a warm-up run, of a round, or of the training.
PHASE = "prunepeft.training.phases:Phases._run"


def count(call: str = PHASE, match: str = "") -> dict[str, Any]:
    """A fault that only counts the calls of a function."""
    return {"call": call, "match": match, "do": "count"}


@dataclass(frozen=True)
class Attempt:
    """How one process ended: exit code, minus a signal, or "stopped"."""

    code: int | str
    out: str
    err: str
    seconds: float
    calls: Counter[str]
    pid: int

    @property
    def phases(self) -> int:
        """Epochs that were begun."""
        return self.calls[PHASE]


class ForkServer:
    """Runs command lines in children of one warm process.

    Args:
        work: For the model, the data and what the children print.
    """

    def __init__(self, work: Path) -> None:
        self.work = work
        self.model, self.data = make_inputs(work / "inputs")
        env = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}"}
        env |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("kill_driver.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=env,
        )

    def __enter__(self) -> Self:
        assert self._process.stdout.readline() == "ready\n"
        return self

    def __exit__(self, *error: object) -> None:
        self._process.stdin.close()
        self._process.wait(timeout=20)
        self._process.stdout.close()

    def arguments(
        self, output: Path | str, *settings: str, inputs: tuple[Path, Path] | None = None
    ) -> list[str]:
        """The command line of the tiny search; `inputs` are another model and other data."""
        model, data = inputs or (self.model, self.data)
        flags = {"model": model, "data": data, "budget": "20%", "output": output}
        named = [part for name, value in flags.items() for part in (f"--{name}", str(value))]
        return ["search", *named, "--device", "cpu", *SETTINGS, *settings]

    def search(
        self,
        output: Path | str,
        *settings: str,
        faults: tuple[dict[str, Any], ...] = (),
        strike: tuple[float, int] | None = None,
        env: dict[str, str | None] | None = None,
        inputs: tuple[Path, Path] | None = None,
    ) -> Attempt:
        """Run the tiny search in a child.

        Args:
            output: The run folder.
            settings: Further `key=value`; the last one wins.
            faults: See `kill_driver.py`.
            strike: Seconds, and the signal to send then.
            env: Variables to set, or with None to unset.
            inputs: Another model and other data.
        """
        return self._ask(
            args=self.arguments(output, *settings, inputs=inputs),
            faults=[count(), *faults],
            strike=strike,
            env=env or {},
        )

    def wait(self, attempt: Attempt) -> Attempt:
        """Wait for a stopped child that has been told to go on."""
        return self._ask(wait=attempt.pid)

    def _ask(self, **request: Any) -> Attempt:
        files = {name: self.work / f"{name}.txt" for name in ("stdout", "stderr", "calls")}
        if "wait" not in request:
            for file in files.values():
                file.unlink(missing_ok=True)  # a stopped child keeps its own
        request |= {name: str(file) for name, file in files.items()}
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer = json.loads(self._process.stdout.readline())
        text = {name: file.read_text() if file.exists() else "" for name, file in files.items()}
        calls = Counter(text["calls"].split())
        return Attempt(out=text["stdout"], err=text["stderr"], calls=calls, **answer)


def make_inputs(folder: Path, dropout: float = 0.1) -> tuple[Path, Path]:
    """A tiny encoder, and a regression task that it can learn."""
    model, data = save_tiny_model(folder / "model"), folder / "data"
    config = json.loads((model / "config.json").read_text())
    config |= {"hidden_dropout_prob": dropout}
    (model / "config.json").write_text(json.dumps(config))
    data.mkdir()
    rows = [
        {"text": " ".join(f"w{(7 * i + j * j) % 40}" for j in range(3 + i % 4)), "label": i % 5 / 4}
        for i in range(N_TRAIN + N_VALIDATION)
    ]
    for name, part in (("train", rows[:N_TRAIN]), ("validation", rows[N_TRAIN:])):
        (data / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    return model, data


RESULTS = (
    "best/arch.json",
    "best/strategy.json",
    "best/adapter/adapter_model.safetensors",
    "best/adapter/adapter_config.json",
)


def results_of(run: Path) -> dict[str, bytes]:
    """The files that must not depend on what happened on the way."""
    return {name: (run / name).read_bytes() for name in RESULTS}


def untidy(run: Path) -> list[str]:
    """What an interrupted writer or training left behind."""
    states = [p for p in (run / "state").iterdir() if p.name != "manifest.json"]
    lock = [p for p in (run / ".lock",) if p.exists()]
    return sorted(str(p.relative_to(run)) for p in (*leftovers(run), *states, *lock))
