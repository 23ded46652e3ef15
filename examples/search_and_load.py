"""Search, then load what was found with peft.

python examples/search_and_load.py MODEL DATA OUTPUT [BUDGET]

DATA is any file `prunepeft search` reads, with a text and a label of two or more classes.
"""

import sys
from typing import Any

from peft import PeftModel
from transformers import AutoModelForSequenceClassification

import prunepeft


def main(model: str, data: str, output: str, budget: str = "1%", **settings: Any) -> PeftModel:
    result = prunepeft.search(model, data, budget=budget, output=output, **settings)
    print(f"kept {', '.join(result.placement.ids)}; metric {result.metric:.4f}")
    n_labels = len(result.report["task"]["labels"])
    base = AutoModelForSequenceClassification.from_pretrained(model, num_labels=n_labels)
    return PeftModel.from_pretrained(base, str(result.adapter)).eval()


if __name__ == "__main__":
    main(*sys.argv[1:])
