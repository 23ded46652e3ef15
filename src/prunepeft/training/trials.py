"""Finished calls of an evaluator: named by all they depend on, kept, and found again."""

from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from typing import Any

from torch import Tensor

from prunepeft.errors import StateError
from prunepeft.evaluate import Tried
from prunepeft.processes import on_main, share
from prunepeft.space import Placement
from prunepeft.state import Journal
from prunepeft.training.trial_cache import TrialCache

FOUND = "found."  # what a watcher found, beside the weights


class Trials:
    """The journal of a run, shared by its processes.

    Args:
        journal: Where finished calls are kept.
        context: What every call depends on (model, data, settings).
        writes: Whether this process writes (the main one does).
        cache: Trials that runs share; None: this run alone.
    """

    def __init__(
        self,
        journal: Journal,
        context: Mapping[str, Any],
        *,
        writes: bool,
        cache: TrialCache | None = None,
    ) -> None:
        self.journal = journal
        self.context = dict(context)
        self.writes = writes
        self.cache = cache
        self._held: dict[str, dict[str, Tensor]] = {}

    def call(self, what: str, placement: Placement, **more: Any) -> dict[str, Any]:
        """Everything the result of a call depends on."""
        return {"what": what, "placement": placement.digest, "context": dict(self.context), **more}

    def base_is(self, **change: str | None) -> None:
        """Later calls depend on what was done to the base model."""
        if any(change.values()):
            self.context["base"] = [*self.context.get("base", ()), change]

    def find(self, key: str) -> dict[str, Any] | None:
        """The result kept under a key, None if there is none."""
        return on_main(lambda: self.journal.get(key))

    def find_trial(self, key: str, call: Mapping[str, Any]) -> dict[str, Any] | None:
        """The same for a trial; one that another run shares is kept here as well."""

        def find() -> dict[str, Any] | None:
            found = self.journal.get(key)
            if found is None and self.cache is not None:
                found = self.cache.get(key)
                if found is not None and self.writes:
                    self.journal.put(key, call, found)
            return found

        return on_main(find)

    def keep_trial(self, key: str, call: Mapping[str, Any], result: Tried) -> Tried:
        """The same as `keep` for a trial, which is shared as well."""
        if self.cache is not None and self.writes:
            self.cache.put(key, asdict(result))
        return self.keep(key, call, result)

    def keep(
        self,
        key: str,
        call: Mapping[str, Any],
        result: Any,
        tensors: dict[str, Tensor] | None = None,
    ) -> Any:
        """Keep a result, and return it as the main process has it.

        Processes other than the main one hold the weights they may need later.
        """
        if self.writes:
            plain = asdict(result) if is_dataclass(result) else result
            self.journal.put(key, call, plain, tensors=tensors)
        else:
            self._held[key] = tensors or {}
        return share(result)

    def weights(self, key: str) -> dict[str, Tensor]:
        """Weights kept under a key, by parameter name."""
        return {n: t for n, t in self._tensors(key).items() if not n.startswith(FOUND)}

    def found(self, key: str) -> dict[str, Tensor]:
        """What a watcher found in the run of this key, as the main process has it."""
        tensors = on_main(lambda: self._tensors(key))
        return {n.removeprefix(FOUND): t for n, t in tensors.items() if n.startswith(FOUND)}

    def _tensors(self, key: str) -> dict[str, Tensor]:
        tensors = self._held.get(key) or self.journal.get_tensors(key)
        if tensors is None:
            raise StateError(
                f"the weights of run {key} are gone from {self.journal.folder}; run again."
            )
        return tensors
