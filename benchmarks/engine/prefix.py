"""A step with the output of frozen layers at hand, for every lowest layer with modules."""

import statistics
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.engine.nets import lora_placement, make_model, make_phases, make_rows, union
from benchmarks.engine.step import paired, summary
from prunepeft.prefix.states import skipping
from prunepeft.supernet import detach
from prunepeft.training import make_optimizer, make_scheduler


def measure(
    case: dict[str, Any], rows: int, steps: int, pairs: int, device: str = "cpu"
) -> dict[str, Any]:
    """For every layer but the first: how much faster a step is, and what operations predict."""
    bf16, steps = case["precision"] == "bf16", case.get("steps", steps)
    data = make_rows(rows * steps, case["tokens"])
    found = {}
    for lowest in case.get("lowest", range(1, case["layers"])):
        with ExitStack() as held:
            place = Path(held.enter_context(tempfile.TemporaryDirectory()))
            whole = _Training(case["layers"], 0, bf16, data, rows, None, device)
            upper = _Training(case["layers"], lowest, bf16, data, rows, place, device)
            held.enter_context(upper.phases.reusing(upper.net, data, 2, "bench"))
            if upper.phases.prefix.of(data) is None:
                raise RuntimeError("the output of the frozen layers is not kept")
            times = paired({"whole": whole.epoch, "upper": upper.epoch}, pairs, device)
            operations = {k: t.operations() for k, t in (("whole", whole), ("upper", upper))}
            detach(upper.net)
        predicted = operations["whole"] / operations["upper"]
        ratio = summary([t["whole"] / t["upper"] for t in times])
        found[str(lowest)] = {
            "seconds": {k: statistics.median(t[k] for t in times) / steps for k in times[0]},
            "speedup": ratio["median"],
            "speedup_quartiles": ratio["quartiles"],
            "operations": operations,
            "predicted": predicted,
            "reached": ratio["median"] / predicted,
        }
        print(
            case, lowest, {k: found[str(lowest)][k] for k in ("speedup", "predicted")}, flush=True
        )
    return {"lowest": found}


class _Training:
    """LoRA in the layers from `lowest` on."""

    def __init__(
        self,
        layers: int,
        lowest: int,
        bf16: bool,
        data: Any,
        rows: int,
        place: Path | None,
        device: str,
    ) -> None:
        self.device = device
        model = make_model(layers, torch.bfloat16 if bf16 else torch.float32, device)
        self.net = union(model, lora_placement(model, lowest))
        self.phases, self.data = make_phases(data, rows, bf16, place, device), data
        settings = self.phases.settings
        self.optimizer = make_optimizer(self.net, settings, 1e-4)
        self.scheduler = make_scheduler(self.optimizer, settings, 10**6)

    def epoch(self) -> None:
        self.phases.run(self.net, self.data, self.optimizer, self.scheduler, 0)

    def operations(self) -> int:
        """Of matrix products in a step; fused attention on a CPU would not be counted."""
        model = self.net.base_model.model
        before = model.config._attn_implementation
        model.set_attn_implementation("eager")
        numbers = list(range(min(16, len(self.data))))
        made = self.phases.collator(self.data.__getitems__(numbers))
        batch = {name: tensor.to(self.device) for name, tensor in made.items()}
        states = self.phases.prefix.of(self.data) if self.phases.prefix else None
        kept = states.kept.read(numbers) if states else {}
        given = {stack: state.to(self.device) for stack, state in kept.items()}
        bf16 = torch.autocast(self.device, torch.bfloat16, enabled=self.phases.bf16)
        with FlopCounterMode(display=False) as counter:
            with skipping(states, given), bf16:
                loss = self.net(**batch).loss
            loss.backward()
        model.set_attn_implementation(before)
        self.net.zero_grad()
        return counter.get_total_flops()
