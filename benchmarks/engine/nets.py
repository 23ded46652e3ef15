"""Models of random weights and rows of random tokens for the engine's benchmarks."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification

from prunepeft.candidates import LORA_ALL_ROLES, make_space
from prunepeft.config import TrainSettings
from prunepeft.prefix.reuse import PrefixReuse
from prunepeft.progress import SilentProgress
from prunepeft.sites import find_sites
from prunepeft.space import Placement
from prunepeft.supernet import attach
from prunepeft.tasks import Collator
from prunepeft.training import Phases

MINILM = {"hidden_size": 384, "intermediate_size": 1536, "num_attention_heads": 12}
VOCABULARY, RANK = 1000, 8
HEADS = ["classifier", "bert.pooler"]


def make_model(layers: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> nn.Module:
    """A classifier in the shape of MiniLM; the same weights every time."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "bert", vocab_size=VOCABULARY, num_hidden_layers=layers, num_labels=2, **MINILM
    )
    model = AutoModelForSequenceClassification.from_config(config, dtype=dtype)
    for name in HEADS:
        model.get_submodule(name).float()
    return model.to(device)


def plain_lora(model: nn.Module) -> PeftModel:
    """LoRA of peft on all linear layers of the blocks."""
    targets = [site.path for site in find_sites(model) if site.role != "norm"]
    config = LoraConfig(
        task_type="SEQ_CLS",
        r=RANK,
        lora_alpha=2 * RANK,
        target_modules=targets,
        modules_to_save=["classifier", "pooler"],
    )
    return get_peft_model(model, config)


def lora_placement(model: nn.Module, lowest: int = 0) -> Placement:
    """The same as a placement of ours, in the layers from `lowest` on."""
    sites = [site for site in find_sites(model) if site.layer >= lowest]
    options = {"lora": {"alpha": 2.0 * RANK}}
    roles = {"lora": LORA_ALL_ROLES}
    return make_space(sites, ("lora",), sizes={"lora": RANK}, options=options, roles=roles).full()


def union(model: nn.Module, placement: Placement) -> PeftModel:
    """Our modules on the model."""
    return attach(model, placement, modules_to_save=HEADS, task_type="SEQ_CLS")


def make_rows(n: int, tokens: int) -> Dataset:
    """Rows of one length, of random tokens."""
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(5, VOCABULARY, (n, tokens), generator=draw).tolist()
    labels = [i % 2 for i in range(n)]
    mask = [[1] * tokens] * n
    columns = {"input_ids": ids, "attention_mask": mask, "labels": labels, "length": [tokens] * n}
    return Dataset.from_dict(columns)


def make_phases(
    rows: Dataset, batch: int, bf16: bool, place: Path | None = None, device: str = "cpu"
) -> Phases:
    """How ours trains on these rows; with a place for files, frozen layers are reused."""
    return Phases(
        train=rows,
        validation=rows.select(range(2)),
        collator=Collator(0),
        compute=lambda predictions, labels: {},
        preprocess_logits=None,
        settings=TrainSettings(batch_size=batch),
        device=device,
        bf16=bf16,
        progress=SilentProgress(),
        prefix=PrefixReuse(4 * 10**9, place) if place else None,
    )


def bare_loop(
    net: nn.Module, rows: Dataset, batches: Sequence[list[int]], bf16: bool
) -> Callable[[], None]:
    """An epoch as one writes it by hand: loader, forward, backward, clipping, AdamW, schedule."""
    trained = [p for p in net.parameters() if p.requires_grad]
    device = trained[0].device
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)

    def autocast() -> AbstractContextManager[Any]:
        return torch.autocast(device.type, torch.bfloat16, enabled=bf16)

    def epoch() -> None:
        net.train()
        loader = torch.utils.data.DataLoader(
            rows, batch_sampler=list(batches), collate_fn=Collator(0)
        )
        for batch in loader:
            moved = {name: tensor.to(device) for name, tensor in batch.items()}
            with autocast():
                loss = net(**moved).loss
            loss.backward()
            nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()

    return epoch
