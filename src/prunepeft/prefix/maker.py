"""How the states of rows at the end of a frozen prefix are made, and whether they may be used."""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
import torch.distributed as dist
from datasets import Dataset
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from prunepeft.errors import StateError
from prunepeft.prefix.player import FrozenStack, PrefixPlayer
from prunepeft.prefix.states import KeptStates, tokens_of
from prunepeft.processes import on_main, own_part, share
from prunepeft.state import canonical_json, map_tensor, mapped_file
from prunepeft.supernet import base_of
from prunepeft.supernet.base_digest import tensors_digest

Collator = Callable[[list[dict]], Mapping[str, Tensor]]
# Largest difference of an output, over its largest value: rounding, not another function.
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-4}
HALF_TOLERANCE = 5e-2
_digests = WeakTensorKeyDictionary()  # tensor -> (state it was in, digest)


class StateMaker:
    """Makes states of rows with one model. Use it without gradients, dropout off.

    Args:
        net: The model with modules on it.
        prefix: What is frozen in it.
        collator: Rows to a batch.
        device: Where the model is.
    """

    def __init__(
        self,
        net: nn.Module,
        prefix: tuple[FrozenStack, ...],
        collator: Collator,
        device: torch.device,
    ) -> None:
        self.net, self.prefix = net, prefix
        self.player = PrefixPlayer(net, prefix)
        self.collator, self.device = collator, device
        self._like: dict[str, Tensor] = {}  # stack -> states of one row

    def objection(self, rows: Dataset) -> str | None:
        """Why states cannot stand in for the frozen blocks; None if they can.

        The shortest and the longest row go through the model together, once as they are and once
        with states that were made of each alone.
        """
        try:
            return self._objection(rows)
        except (StateError, AttributeError, LookupError, TypeError, ValueError) as error:
            return f"its layers do not hand on hidden states one to the other ({error})"

    def _objection(self, rows: Dataset) -> str | None:
        if any(getattr(m, "layerdrop", 0) > 0 for m in self.net.modules()):
            return "whole layers drop out at random in this model"
        lengths = list(rows["length"])
        by_length = sorted(range(len(rows)), key=lambda i: lengths[i])
        pair = rows.select(list(dict.fromkeys((by_length[0], by_length[-1]))))
        batch = self._batch(pair, range(len(pair)))
        if not self.player.is_independent(batch):
            return "something that is trained acts before them"
        alone = [self.player.take(self._batch(pair, [i])) for i in range(len(pair))]
        self._like = alone[0]
        sizes = self.tokens(pair)
        if any(t.shape[1] != n for s, n in zip(alone, sizes, strict=True) for t in s.values()):
            return "they do not see one token for each token of a row"
        kept = KeptStates(
            {s: t.new_empty(sum(sizes), t.shape[2], device="cpu") for s, t in alone[0].items()},
            [0, *accumulate(sizes)],
        )
        for number, states in enumerate(alone):
            kept.write(number, states, 0)
        given = kept.read(range(len(pair)), tokens_of(batch))
        with self.player.play({s: t.to(self.device) for s, t in given.items()}):
            found = self.net(**batch)
        wanted = self.net(**batch)
        return "the model reads more than their output" if differs(found, wanted, batch) else None

    def tokens(self, rows: Dataset) -> list[int]:
        """States of each row."""
        if "input_ids" in rows.column_names:
            return list(rows["length"])
        return [next(iter(self._like.values())).shape[1]] * len(rows)

    def n_bytes(self, rows: Dataset) -> int:
        """Bytes of the states of these rows. Ask for objections first."""
        return sum(self.tokens(rows)) * sum(t[0, 0].nbytes for t in self._like.values())

    def make(
        self,
        rows: Dataset,
        batches: Sequence[Sequence[int]],
        folder: Path,
        on_batch: Callable[[], None] = lambda: None,
    ) -> KeptStates:
        """States of all rows, in files without a name. All processes of one host share the work.

        Args:
            rows: Encoded rows.
            batches: Numbers of the rows that go through the model together.
            folder: Where the files are.
            on_batch: Called after each batch.
        Raises:
            DiskError: if there is no room.
        """
        sizes = self.tokens(rows)
        stacks = {
            stack: _allocated(folder, (sum(sizes), like.shape[2]), like.dtype)
            for stack, like in self._like.items()
        }
        kept = KeptStates(stacks, [0, *accumulate(sizes)])
        for number in range(_rank(), -(-len(batches) // _world()) * _world(), _world()):
            # As many passes on every process: a base model that is cut over them needs all.
            batch = batches[min(number, len(batches) - 1)]
            states = self.player.take(self._batch(rows, batch))
            for place, row in enumerate(batch):
                kept.write(row, states, place)
            on_batch()
        share(None)  # none goes on before all have written
        return kept

    def key(self, rows: Dataset, batches: Sequence[Sequence[int]]) -> str:
        """Digest of all that the states depend on: rows, frozen weights, and how they are run."""
        together = [list(batch) for batch in batches]
        how: list[Any] = [together, torch.is_autocast_enabled(self.device.type), str(self.device)]
        how += [[s.stack, len(s.paths)] for s in self.prefix]
        frozen = sorted(self._frozen_tensors())
        return hashlib.sha256(canonical_json([how, rows_digest(rows), frozen])).hexdigest()

    def _batch(self, rows: Dataset, numbers: Sequence[int]) -> dict[str, Tensor]:
        made = self.collator(rows.__getitems__(list(numbers)))
        return {name: tensor.to(self.device) for name, tensor in made.items()}

    def _frozen_tensors(self) -> Iterator[tuple[str, str]]:
        """Name and digest of every frozen tensor outside the blocks above the prefix."""
        base = base_of(self.net)
        below = tuple(f"{path}." for stack in self.prefix for path in stack.paths)
        lists = {path.rpartition(".")[0] for stack in self.prefix for path in stack.paths}
        for name, tensor in [*base.named_parameters(), *base.named_buffers()]:
            in_block = any(name.startswith(f"{place}.") for place in lists)
            if not tensor.requires_grad and (not in_block or name.startswith(below)):
                yield name, _digest(tensor)


def differs(found: Mapping[str, Any], wanted: Mapping[str, Any], batch: Mapping[str, Any]) -> bool:
    """Whether two outputs for a batch differ by more than rounding, padding left out."""
    for name in ("loss", "logits"):
        pair = [output.get(name) for output in (found, wanted)]
        if not all(isinstance(value, Tensor) for value in pair):
            continue
        mask = batch.get("attention_mask")
        if mask is not None and pair[0].ndim == 3 and pair[0].shape[:2] == mask.shape:
            pair = [value[mask.bool()] for value in pair]
        tolerance = TOLERANCE.get(pair[1].dtype, HALF_TOLERANCE)
        if torch.is_autocast_enabled(pair[1].device.type):
            tolerance = HALF_TOLERANCE
        a, b = (value.float() for value in pair)
        if not bool((a - b).abs().max() <= tolerance * max(1.0, float(b.abs().max()))):
            return True
    return False


def rows_digest(rows: Dataset) -> str:
    """SHA-256 of what the model reads of encoded rows."""
    table = rows.with_format("arrow")[:]
    read = [n for n in sorted(table.column_names) if n not in ("labels", "length")]
    hasher = hashlib.sha256()

    class _Sink:
        closed = False

        def write(self, data: Any) -> int:
            hasher.update(data)
            return len(data)

        def flush(self) -> None: ...

    chosen = table.select(read).combine_chunks().replace_schema_metadata(None)
    with pa.ipc.new_stream(pa.PythonFile(_Sink(), mode="w"), chosen.schema) as stream:
        stream.write_table(chosen)
    return hasher.hexdigest()


def _digest(tensor: Tensor) -> str:
    """SHA-256 of what is here of a tensor, computed again only when it was changed."""
    state = (own_part(tensor).data_ptr(), tensor._version)
    found = _digests.get(tensor)
    if found is None or found[0] != state:
        found = (state, tensors_digest({"": own_part(tensor)}))
        _digests[tensor] = found
    return found[1]


def _allocated(folder: Path, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """A tensor on the disk that all processes share; the file has no name any more."""
    n_bytes = torch.Size(shape).numel() * dtype.itemsize
    path = on_main(lambda: mapped_file(folder, n_bytes))
    tensor = map_tensor(path, shape, dtype)
    share(None)  # none goes on before all have mapped it
    on_main(path.unlink)
    return tensor


def _rank() -> int:
    return dist.get_rank() if _world() > 1 else 0


def _world() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
