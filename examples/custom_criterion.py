"""A criterion of your own, checked and used in your own training loop.

python examples/custom_criterion.py MODEL

MODEL is any encoder or decoder that AutoModelForSequenceClassification opens.
"""

import sys
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import prunepeft
from prunepeft.criteria import Criterion, Record, score_units
from prunepeft.criteria.record import Recorder
from prunepeft.testing import CriterionContract

TEXTS = ["the film was a joy", "a waste of two hours", "I laughed all the way", "dull and long"]
LABELS = torch.tensor([1, 0, 1, 0])


@dataclass(frozen=True)
class OutputPerWeight(Criterion):
    """Contribution for its price: mean(|output|) / number of weights."""

    name: ClassVar[str] = "output_per_weight"
    needs: ClassVar[frozenset[str]] = frozenset({"outputs", "weights"})

    def saliency(self, record: Record) -> Tensor:
        n_weights = [sum(w.numel() for w in unit) for unit in record.weights]
        return record.output_abs_mean / torch.tensor(n_weights)


def main(model: str, steps: int = 4) -> dict[str, float]:
    criterion = OutputPerWeight()
    CriterionContract(criterion).run()
    prunepeft.CRITERIA.register(criterion.name, criterion)

    base = AutoModelForSequenceClassification.from_pretrained(model, num_labels=2)
    batch = AutoTokenizer.from_pretrained(model)(TEXTS, padding=True, return_tensors="pt")
    net = prunepeft.attach(base, prunepeft.make_space(prunepeft.find_sites(base)).full()).train()
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=5e-4)
    with Recorder.for_net(net, criterion.needs, output_every=1) as recorder:
        for _ in range(steps):
            optimizer.zero_grad()
            net(**batch, labels=LABELS).loss.backward()
            recorder.step()  # between backward and the optimiser's step
            optimizer.step()
        scores = score_units(recorder.read(), [criterion.name])[criterion.name]
    for slot_id, score in sorted(scores.items(), key=lambda item: item[1]):
        print(f"{score:.3g}  {slot_id}")
    return scores


if __name__ == "__main__":
    main(*sys.argv[1:])
