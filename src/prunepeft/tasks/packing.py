"""Rows of a step packed into few long ones, so that hardly any token is padding."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from prunepeft.errors import ConfigError
from prunepeft.tasks.base import IGNORED

Collate = Callable[[Sequence[dict[str, Any]]], Mapping[str, Tensor]]
TOLERANCE, HALF_TOLERANCE = 1e-4, 2e-2  # of the loss, relative: rounding
ROWS_CHECKED = 3


@dataclass(frozen=True)
class PackingCollator:
    """Puts several rows of a language model behind each other, each with positions from 0.

    transformers takes positions that start again for the beginning of another sequence, if there is
    no attention mask: rows do not see each other. The rows of a step stay the same, and so does its
    loss but for rounding. First fit, the longest row first.

    Args:
        pad_token_id: Fills what is left of a pack, a sequence of its own without labels.
        width: Tokens of a pack, at most; no row is longer.
    """

    pad_token_id: int
    width: int

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """Make a batch: `input_ids`, `position_ids` and `labels`, (packs, tokens) int64."""
        packs = first_fit([len(row["input_ids"]) for row in rows], self.width)
        ids, positions, labels = [], [], []
        for pack in packs:
            parts = [rows[place] for place in pack]
            ids.append([token for row in parts for token in row["input_ids"]])
            positions.append([p for row in parts for p in range(len(row["input_ids"]))])
            # The first token of a row would be predicted from the row before.
            labels.append([label for row in parts for label in [IGNORED, *row["labels"][1:]]])
        longest = max(map(len, ids))
        for pack_ids, pack_positions, pack_labels in zip(ids, positions, labels, strict=True):
            left = longest - len(pack_ids)
            pack_ids += [self.pad_token_id] * left
            pack_positions += range(left)
            pack_labels += [IGNORED] * left
        batch = {"input_ids": ids, "position_ids": positions, "labels": labels}
        return {name: torch.tensor(values) for name, values in batch.items()}


def first_fit(lengths: Sequence[int], width: int) -> list[list[int]]:
    """Places of rows, pack by pack: the longest first, each into the first pack with room.

    Example:
        >>> first_fit([3, 6, 5, 2], 8)
        [[1, 3], [2, 0]]
    """
    packs: list[list[int]] = []
    room: list[int] = []
    for place in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        fitting = (n for n, left in enumerate(room) if lengths[place] <= left)
        number = next(fitting, len(packs))
        if number == len(packs):
            packs.append([])
            room.append(max(width, lengths[place]))
        packs[number].append(place)
        room[number] -= lengths[place]
    return packs


@torch.no_grad()
def check_packing(
    model: nn.Module, collator: Collate, packer: Collate, rows: Sequence[dict[str, Any]]
) -> None:
    """Check that a model keeps packed rows apart, and numbers their tokens from 0.

    Args:
        model: In evaluation mode.
        collator: Rows to a padded batch.
        packer: Rows to packs.
        rows: The shortest ones; if two of them do not fit into a pack, nothing is ever packed.
    Raises:
        ConfigError: if the loss is another one, or a row sees the row before it.
    """
    refused = "train.packing=true, but this model does not keep packed rows apart"
    advice = "Set train.packing=false."
    first, second = (dict(row) for row in (rows[0], rows[min(1, len(rows) - 1)]))
    pair = packer([first, second])
    try:
        losses = [float(model(**batch).loss) for batch in (collator(rows), packer(rows))]
        before = model(**pair).logits
    except TypeError as error:
        raise ConfigError(f"{refused} ({error}). {advice}") from error
    tolerance = TOLERANCE if before.dtype == torch.float32 else HALF_TOLERANCE
    if abs(losses[0] - losses[1]) > tolerance * max(1.0, abs(losses[0])):
        raise ConfigError(
            f"{refused}: the loss of {len(rows)} rows is {losses[0]:.4f}, packed "
            f"{losses[1]:.4f}. {advice}"
        )
    n = max(len(row["input_ids"]) for row in (first, second))  # the longer one comes first
    if len(pair["input_ids"]) == 1 and n < pair["input_ids"].shape[1]:
        other = dict(pair, input_ids=pair["input_ids"].clone())
        other["input_ids"][:, :n] = other["input_ids"][:, :n].flip(1).roll(1, 1)
        if not torch.equal(model(**other).logits[:, n:], before[:, n:]):
            raise ConfigError(f"{refused}: a row sees the row before it. {advice}")
