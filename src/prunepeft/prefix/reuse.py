"""Prefix reuse: frozen blocks run once per row, and their output serves all later steps.

Blocks below the lowest module never change. Their output for every row is computed once, without
dropout, kept on the disk, and played back in all steps and epochs of a training, and in the next
trainings on the same rows with the same frozen blocks.
"""

import contextlib
import logging
import os
import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset
from torch import nn

from prunepeft.errors import DiskError
from prunepeft.memory import is_out_of_memory
from prunepeft.prefix.maker import StateMaker
from prunepeft.prefix.player import frozen_prefix
from prunepeft.prefix.states import KeptStates, RowStates
from prunepeft.processes import share
from prunepeft.sites import find_layers
from prunepeft.sparse_tuning.layers import evaluating
from prunepeft.state import disk_free
from prunepeft.supernet import base_of

if TYPE_CHECKING:
    from prunepeft.training import Phases

logger = logging.getLogger(__name__)


class PrefixReuse:
    """The states that a process keeps, and the training that uses them.

    Args:
        limit: Bytes on the disk; 0 switches it off.
        folder: Where the files are; they have no name and are gone with the process.
    """

    def __init__(self, limit: int, folder: Path) -> None:
        self.limit, self.folder = limit, folder
        self._kept: OrderedDict[str, tuple[KeptStates, int]] = OrderedDict()
        self._now: dict[int, RowStates] = {}
        self._seconds = 0.0

    def of(self, rows: Any) -> RowStates | None:
        """States of these rows, while a training uses them."""
        return self._now.get(id(rows))

    @property
    def is_used(self) -> bool:
        """Whether a training uses states now."""
        return bool(self._now)

    def take_seconds(self) -> float:
        """Time that was spent on states since the last call."""
        spent, self._seconds = self._seconds, 0.0
        return spent

    @contextlib.contextmanager
    def over(
        self, net: nn.Module, phases: "Phases", rows: Dataset, epochs: int, name: str
    ) -> Iterator[None]:
        """Use states in the phases inside, where that pays.

        It pays for rows that are seen more than once: in several epochs, or in later trainings on
        the whole training split. Beside that the decision depends on the model and on room on the
        disk, so that a run that is resumed decides alike.

        Args:
            net: The model with modules on it.
            phases: How to train and evaluate.
            rows: Encoded rows to train on.
            epochs: Passes over them.
            name: For the progress line.
        """
        began = time.perf_counter()
        try:
            if self.limit and (epochs > 1 or rows is phases.train):
                self._begin(net, phases, rows, epochs, name)
            self._seconds += time.perf_counter() - began
            yield
        finally:
            self._now, self._seconds = {}, 0.0

    def _begin(
        self, net: nn.Module, phases: "Phases", rows: Dataset, epochs: int, name: str
    ) -> None:
        prefix = frozen_prefix(net)
        if not prefix or not _is_one_host():
            return
        device = phases.arguments(0).device
        if not (getattr(base_of(net), "is_quantized", False) or phases.sharded):
            net.to(device)
        with evaluating(net), torch.autocast(device.type, torch.bfloat16, enabled=phases.bf16):
            maker = StateMaker(net, prefix, phases.collator, device)
            try:
                total = self._keep(maker, phases, rows, name)
            except DiskError as error:
                self._now = {}
                logger.warning("%s: all layers run in every step: %s", name, error)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error) or torch.distributed.is_initialized():
                    raise  # other processes would wait for this one
                self._now = {}
                logger.warning("%s: all layers run in every step, for lack of memory", name)
        if self.of(rows) is not None:
            n_frozen, n_layers = sum(len(s.paths) for s in prefix), len(find_layers(base_of(net)))
            phases.progress.finish(describe(n_frozen, n_layers, total, epochs))

    def _keep(self, maker: StateMaker, phases: "Phases", rows: Dataset, name: str) -> int:
        """States of the rows and of the validation rows, as far as there is room; their bytes."""
        if reason := share(maker.objection(rows)):
            logger.info("%s: all layers run in every step, for %s", name, reason)
            return 0
        total = 0
        tokens = maker.tokens(rows)
        by_length = sorted(range(len(rows)), key=lambda i: (-tokens[i], i))
        size = phases.micro_batch
        together = [by_length[i : i + size] for i in range(0, len(rows), size)]
        # Rows of validation go together as in an evaluation without states, to the same numbers.
        judged = phases.judged_batches(phases.validation)
        for part, batches in ((rows, together), (phases.validation, judged)):
            kept = self._states(maker, part, batches, total, phases, name)
            if kept is None:
                break
            self._now[id(part)] = RowStates(maker.player, kept)
            total += maker.n_bytes(part)
        return total

    def _states(
        self,
        maker: StateMaker,
        rows: Dataset,
        batches: Sequence[Sequence[int]],
        used: int,
        phases: "Phases",
        name: str,
    ) -> KeptStates | None:
        """States of these rows, of an earlier training or made now; None without room for them."""
        key, n_bytes = maker.key(rows, batches), maker.n_bytes(rows)
        if key not in self._kept:
            if not self._make_room(used, n_bytes, f"{name}, {len(rows)} rows"):
                return None
            phases.progress.start(f"{name}, frozen layers", len(batches))
            kept = maker.make(rows, batches, self.folder, phases.progress.advance)
            self._kept[key] = (kept, n_bytes)
        self._kept.move_to_end(key)
        return self._kept[key][0]

    def _make_room(self, used: int, n_bytes: int, name: str) -> bool:
        """Whether so many bytes fit beside those in use; states of earlier trainings may go."""
        room = self.limit - used
        if n_bytes <= room:
            while self._kept and sum(n for _, n in self._kept.values()) + n_bytes > self.limit:
                self._kept.popitem(last=False)
            room = min(room, disk_free(self.folder) // 2)  # the rest is for the run
        room = share(room)
        if n_bytes > room:
            logger.warning(
                "%s: frozen layers run every time: their output would take %.2f GB, and there is "
                "room for %.2f GB (train.prefix_cache_gb, and half of what is free on the disk)",
                name,
                n_bytes / 1e9,
                room / 1e9,
            )
        return n_bytes <= room


def describe(n_frozen: int, n_layers: int, n_bytes: int, epochs: int) -> str:
    """One line on what is kept and what it saves.

    A layer costs as much backward as forward, so a step takes n + n - L with L of n layers frozen,
    and 2 (n - L) with their output at hand.

    Example:
        >>> describe(3, 6, 12_000_000, 3)
        'output of 3 of 6 layers kept (12 MB), saves about 22% of the operations'
    """
    text = f"output of {n_frozen} of {n_layers} layers kept ({n_bytes / 1e6:,.0f} MB)"
    if epochs == 1:
        return f"{text} for this and later trainings"
    share = (epochs - 1) * n_frozen / (epochs * (2 * n_layers - n_frozen))
    return f"{text}, saves about {share:.0%} of the operations"


def _is_one_host() -> bool:
    """Whether all processes can map the same file."""
    world = os.environ.get("WORLD_SIZE", "1")
    return os.environ.get("LOCAL_WORLD_SIZE", world) == world
