"""PrunePEFT's search as its authors ran it, on public libraries: what ours is measured against.

Every criterion has a warm-up of its own. The model is loaded again for every training. Gradients
are copied to the host in every step and kept, outputs of all modules are kept by hooks, and rows
are padded to a fixed length. In each layer: LoRA of rank 32 on query and value as one module, and
an adapter of width 128 after the feed-forward.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoTokenizer

from benchmarks.search_cost.plain import encoded, load
from prunepeft.data import Splits, subset

RANK, WIDTH, RATE = 32, 128, 1e-3
Module = tuple[int, str]  # layer, and `lora` or `adapter`


class Adapter(nn.Module):
    """A bottleneck after a layer."""

    def __init__(self, layer: nn.Module, width: int) -> None:
        super().__init__()
        self.layer = layer
        self.down = nn.Linear(width, WIDTH)
        self.up = nn.Linear(WIDTH, width)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        return y + self.up(torch.relu(self.down(y.float()))).to(y.dtype)


class Reference:
    """The search on one task.

    Args:
        model: Folder of the base model.
        splits: The data.
        seed: Of rows and first values.
        suite: Settings.
    """

    def __init__(self, model: str, splits: Splits, seed: int, suite: dict[str, Any]) -> None:
        self.model, self.splits, self.seed, self.suite = model, splits, seed, suite
        self.own = suite["reference"]
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        rows = encoded(splits.train, splits, self.tokenizer, self.own["max_length"])
        self.rows = rows
        self.few = subset(rows, self.own["rows_of_warmup"], seed, "labels")
        layers = load(model, len(splits.labels), False).config.num_hidden_layers
        self.every: list[Module] = [(i, k) for i in range(layers) for k in ("lora", "adapter")]
        self.steps = 0

    def search(self, keep: int) -> dict[str, Any]:
        """Warm-ups, then rounds until `keep` modules are left."""
        began = time.process_time()
        chosen = {name: self._warm_up(name) for name in CRITERIA}
        warmed = time.process_time() - began
        left = list(self.every)
        per_round = -(-(len(left) - keep) // self.own["rounds"])
        for _ in range(self.own["rounds"]):
            # What a round keeps takes gigabytes; it must be gone before the next begins.
            order = self._order(self._train(left, self.rows, 1), left, chosen)
            left = [m for m in left if m not in order[: min(per_round, len(left) - keep)]]
        return {
            "seconds": time.process_time() - began,
            "seconds_of_warmup": warmed,
            "steps": self.steps,
            "kept": [f"{layer}.{kind}" for layer, kind in left],
        }

    def _warm_up(self, criterion: str) -> list[Module]:
        """What this criterion alone removes."""
        left, gone = list(self.every), []
        for _ in range(self.own["turns"]):
            record = self._train(left, self.few, self.own["epochs_of_warmup"])
            scores = CRITERIA[criterion](record)
            worst = min(left, key=lambda m: scores[m])
            left.remove(worst)
            gone.append(worst)
        return gone

    def _order(
        self, record: "Record", left: Sequence[Module], chosen: dict[str, list[Module]]
    ) -> list[Module]:
        """Modules, the first to go first: ranks of the criteria that remove such modules."""
        total = dict.fromkeys(left, 0.0)
        for name, gone in chosen.items():
            scores = CRITERIA[name](record)
            for rank, module in enumerate(sorted(left, key=lambda m: scores[m])):
                total[module] += rank * (1 + sum(module[1] == kind for _, kind in gone))
        return sorted(left, key=lambda m: total[m])

    def _train(self, modules: Sequence[Module], rows: Dataset, epochs: int) -> "Record":
        """Load the model, put these modules on, train, and keep everything."""
        torch.manual_seed(self.seed)
        bf16 = self.suite["precision"] == "bf16"
        base = load(self.model, len(self.splits.labels), bf16)
        blocks = base.base_model.encoder.layer
        for parameter in base.parameters():
            parameter.requires_grad_(False)
        parts: dict[Module, list[nn.Module]] = {}
        for layer, _ in (m for m in modules if m[1] == "adapter"):
            output = blocks[layer].output
            output.dense = Adapter(output.dense, base.config.hidden_size)
            parts[layer, "adapter"] = [output.dense]
        layers = [layer for layer, kind in modules if kind == "lora"]
        net: nn.Module = base
        if layers:
            paths = [
                f"base_model.encoder.layer.{i}.attention.self.{n}".replace(
                    "base_model", base.base_model_prefix
                )
                for i in layers
                for n in ("query", "value")
            ]
            config = LoraConfig(r=RANK, lora_alpha=RANK, lora_dropout=0.1, target_modules=paths)
            net = get_peft_model(base, config)
            for i in layers:
                own = blocks[i].attention.self
                parts[i, "lora"] = [own.query, own.value]
        for module in [m for ms in parts.values() for m in ms] + [base.classifier]:
            for name, parameter in module.named_parameters():
                frozen = ".layer" in f".{name}" or "base_layer" in name
                parameter.requires_grad_(not frozen)
        return self._run(net, parts, rows, epochs, bf16)

    def _run(
        self,
        net: nn.Module,
        parts: dict[Module, list[nn.Module]],
        rows: Dataset,
        epochs: int,
        bf16: bool,
    ) -> "Record":
        trained = [p for p in net.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=RATE)
        record = Record(parts)
        for _ in range(epochs):
            record.forget()
            for batch in self._batches(rows):
                with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                    loss = net(**batch).loss
                loss.backward()
                record.keep_gradients()
                optimizer.step()
                optimizer.zero_grad()
                self.steps += 1
        record.close()
        return record

    def _batches(self, rows: Dataset) -> list[dict[str, Tensor]]:
        size, found = self.suite["batch_size"], []
        order = torch.randperm(len(rows)).tolist()
        for start in range(0, len(order), size):
            part = rows[order[start : start + size]]
            labels = torch.tensor(part.pop("labels"))
            padded = self.tokenizer.pad(
                part, padding="max_length", max_length=self.own["max_length"], return_tensors="pt"
            )
            found.append({**padded, "labels": labels})
        return found


class Record:
    """Gradients of every step on the host, and outputs of all modules."""

    def __init__(self, parts: dict[Module, list[nn.Module]]) -> None:
        self.weights = {
            module: [p for part in ps for p in part.parameters() if p.requires_grad]
            for module, ps in parts.items()
        }
        self.gradients: dict[Module, list[list[np.ndarray]]] = {}
        self.outputs: dict[Module, list[Tensor]] = {}
        self._hooks = [
            part.register_forward_hook(
                lambda m, a, y, key=module: self.outputs.setdefault(key, []).append(y.detach())
            )
            for module, ps in parts.items()
            for part in ps
        ]

    def forget(self) -> None:
        self.gradients, self.outputs = {}, {}

    def keep_gradients(self) -> None:
        for module, weights in self.weights.items():
            copies = [w.grad.cpu().numpy().copy() for w in weights]
            self.gradients.setdefault(module, []).append(copies)

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def sums(self, module: Module) -> list[np.ndarray]:
        return [sum(steps) for steps in zip(*self.gradients[module], strict=True)]


def _per_module(score: Callable[[Record, Module], float]) -> Callable[[Record], dict]:
    return lambda record: {module: score(record, module) for module in record.weights}


def _values(record: Record, module: Module) -> np.ndarray:
    return np.concatenate([w.detach().numpy().ravel() for w in record.weights[module]])


def _sums(record: Record, module: Module) -> np.ndarray:
    return np.concatenate([g.ravel() for g in record.sums(module)])


CRITERIA: dict[str, Callable[[Record], dict[Module, float]]] = {
    "minimum_weight": _per_module(lambda r, m: float(np.mean(_values(r, m) ** 2))),
    "zeros": _per_module(lambda r, m: 1 - float(np.mean(_values(r, m) == 0))),
    "threshold": _per_module(lambda r, m: 1 - float(np.mean(np.abs(_values(r, m)) < 1e-6))),
    "activation": _per_module(
        lambda r, m: float(np.mean([y.float().abs().mean().item() for y in r.outputs[m]]))
    ),
    "snip": _per_module(lambda r, m: float(np.mean(np.abs(_values(r, m) * _sums(r, m))))),
    "gradient": _per_module(lambda r, m: float(np.mean(np.abs(_sums(r, m))))),
}
