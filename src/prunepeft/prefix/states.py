"""Hidden states of rows at the end of the frozen prefix, and batches that carry them."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from prunepeft.prefix.player import PrefixPlayer

KEY = "prefix_states."  # and the name of the stack: in a batch, beside the model's inputs
_ROW = "row"


@dataclass(frozen=True, eq=False)
class KeptStates:
    """Hidden states of all rows of a data set.

    Attributes:
        stacks: Stack -> states of all tokens that are not padding, row after row, (tokens, width).
        starts: First token of every row, and one more: (rows + 1,).
    """

    stacks: Mapping[str, Tensor]
    starts: Sequence[int]

    def write(self, row: int, states: Mapping[str, Tensor], place: int) -> None:
        """Keep the states of a row that was in this place of a batch, (rows, tokens, width)."""
        begin, end = self.starts[row], self.starts[row + 1]
        for stack, state in states.items():
            self.stacks[stack][begin:end] = state[place, : end - begin].to("cpu")

    def read(self, rows: Sequence[int], width: int | None = None) -> dict[str, Tensor]:
        """States of some rows by stack, padded with zeros on the right: (rows, tokens, width).

        Args:
            rows: Their numbers.
            width: Tokens of the batch; default: those of the longest of the rows.
        """
        spans = [(self.starts[row], self.starts[row + 1]) for row in rows]
        tokens = width or max(end - begin for begin, end in spans)
        found = {}
        for stack, states in self.stacks.items():
            found[stack] = states.new_zeros(len(rows), tokens, states.shape[1])
            for padded, (begin, end) in zip(found[stack], spans, strict=True):
                padded[: end - begin] = states[begin:end]
        return found


@dataclass(frozen=True, eq=False)
class RowStates:
    """The states of a data set for one model.

    Attributes:
        player: Plays them back.
        kept: The states.
    """

    player: PrefixPlayer
    kept: KeptStates

    def collator(self, collator: Callable[[list[dict]], Mapping[str, Tensor]]) -> Any:
        """From rows with a number (`NumberedRows`) to a batch with their states in it."""

        def collate(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
            batch = dict(collator(rows))
            states = self.kept.read([row[_ROW] for row in rows], tokens_of(batch))
            return batch | {KEY + stack: state for stack, state in states.items()}

        return collate


class NumberedRows:
    """Rows that know their number in the data set, which stays under them."""

    def __init__(self, rows: Any) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
        rows = self.rows.__getitems__(indices)
        return [row | {_ROW: i} for row, i in zip(rows, indices, strict=True)]


def tokens_of(batch: Mapping[str, Tensor]) -> int | None:
    """Tokens of a batch of text, None for images."""
    return batch["input_ids"].shape[1] if "input_ids" in batch else None


def split_states(batch: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What the model takes of a batch, and the states in it by stack."""
    own = {name: value for name, value in batch.items() if not name.startswith(KEY)}
    return own, {n.removeprefix(KEY): v for n, v in batch.items() if n.startswith(KEY)}


def skipping(states: RowStates | None, given: Mapping[str, Tensor]) -> AbstractContextManager:
    """Lets a forward pass skip the frozen blocks where the batch carries states."""
    return nullcontext() if states is None or not given else states.player.play(given)
