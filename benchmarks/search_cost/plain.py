"""Plain LoRA of peft in the transformers Trainer, as its documents show it."""

import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
)

from prunepeft.data import Splits
from prunepeft.metrics import classification_metrics

LINEAR = ("query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense")


def encoded(rows: Dataset, splits: Splits, tokenizer: Any, max_length: int) -> Dataset:
    """Rows as tokens, cut at `max_length`."""
    roles = ("text", "text_pair") if "text_pair" in splits.columns else ("text",)
    texts = [list(rows[splits.columns[role]]) for role in roles]
    tokens = tokenizer(*texts, truncation=True, max_length=max_length)
    return Dataset.from_dict({**tokens, "labels": list(rows[splits.columns["label"]])})


def load(model: str, n_labels: int, bf16: bool) -> PreTrainedModel:
    """The base model with a fresh head."""
    dtype = torch.bfloat16 if bf16 else torch.float32
    found = AutoModelForSequenceClassification.from_pretrained(
        model, num_labels=n_labels, dtype=dtype
    )
    for part in (found.classifier, found.base_model.pooler):
        part.float()
    return found


def train(
    model: str, splits: Splits, metric: str, rank: int, seed: int, lr: float, suite: dict[str, Any]
) -> dict[str, Any]:
    """All epochs, judged after each; seconds are those of the Trainer, with the judging."""
    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(model)
    bf16 = suite["precision"] == "bf16"
    base = load(model, len(splits.labels), bf16)
    paths = [n for n, m in base.named_modules() if n.endswith(LINEAR) and ".layer." in n]
    config = LoraConfig(
        task_type="SEQ_CLS",
        r=rank,
        lora_alpha=2 * rank,
        target_modules=paths,
        modules_to_save=["classifier", "pooler"],
    )
    net = get_peft_model(base, config)
    data = [
        encoded(rows, splits, tokenizer, suite["max_length"])
        for rows in (splits.train, splits.validation)
    ]
    with TemporaryDirectory() as place:
        args = TrainingArguments(
            output_dir=str(Path(place)),
            num_train_epochs=suite["epochs"],
            per_device_train_batch_size=suite["batch_size"],
            per_device_eval_batch_size=suite["eval_batch_size"],
            learning_rate=lr,
            weight_decay=0.01,
            warmup_steps=0.06,
            bf16=bf16,
            use_cpu=True,
            seed=seed,
            eval_strategy="epoch",
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        trainer = Trainer(
            model=net,
            args=args,
            train_dataset=data[0],
            eval_dataset=data[1],
            data_collator=DataCollatorWithPadding(tokenizer),
            compute_metrics=lambda p: classification_metrics(
                np.asarray(p.predictions), p.label_ids
            ),
        )
        began = time.process_time()
        trainer.train()
        seconds = time.process_time() - began
    curve = [e[f"eval_{metric}"] for e in trainer.state.log_history if f"eval_{metric}" in e]
    modules = sum(p.numel() for n, p in net.named_parameters() if "lora_" in n)
    return {"metric": max(curve), "curve": curve, "seconds": seconds, "n_params": modules}
