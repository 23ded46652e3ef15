"""Prune inside your own transformers Trainer.

python examples/prune_callback.py MODEL DATA OUTPUT [BUDGET]

MODEL is a BERT-like encoder; DATA has one JSON object a line with `text` and a whole `label`.
"""

import json
import sys
from pathlib import Path

from datasets import Dataset
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
)

import prunepeft


def main(model: str, data: str, output: str, budget: str = "1%") -> prunepeft.Placement:
    rows = [json.loads(line) for line in Path(data).read_text(encoding="utf-8").splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(model)
    encoded = [tokenizer(r["text"], truncation=True) | {"labels": r["label"]} for r in rows]

    n_labels = len({row["label"] for row in rows})
    base = AutoModelForSequenceClassification.from_pretrained(model, num_labels=n_labels)
    space = prunepeft.make_space(prunepeft.find_sites(base), ("lora", "serial_adapter"))
    net = prunepeft.attach(base, space.full(), modules_to_save=["classifier"], task_type="SEQ_CLS")

    callback = prunepeft.PruneCallback(budget, rounds=3, start=0.1, end=0.5)
    Trainer(
        model=net,
        args=TrainingArguments(output, learning_rate=5e-4, save_strategy="no", report_to="none"),
        train_dataset=Dataset.from_list(encoded),
        data_collator=DataCollatorWithPadding(tokenizer),
        callbacks=[callback],
    ).train()
    net.save_pretrained(output)
    print(f"kept {', '.join(callback.placement.ids)}")
    return callback.placement


if __name__ == "__main__":
    main(*sys.argv[1:])
