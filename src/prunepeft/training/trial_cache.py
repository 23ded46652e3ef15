"""Finished trials that several runs share, so that none trains the same placement again."""

import hashlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from prunepeft.state import Journal, call_key
from prunepeft.supernet.base_digest import tensors_digest

logger = logging.getLogger(__name__)


@dataclass
class TrialCache:
    """A journal beside the runs. Several may read and write it at a time: entries appear whole.

    An entry is named by the trial's own key (placement, data, seed, fidelity and all settings), the
    content of the base model, the device and the versions. Trials that failed are not shared, since
    memory that ran out says nothing about another machine.

    Args:
        folder: Where entries are kept; made when the first one is written.
        model: The base model, without modules.
        device: `cpu` or `cuda`.
    """

    folder: Path
    model: nn.Module
    device: str
    _base: dict[str, Any] = field(default_factory=dict)

    def get(self, key: str) -> dict[str, Any] | None:
        """The result of a trial, as some run left it."""
        found = Journal(self.folder).get(call_key(self._call(key)))
        if found is not None:
            logger.info("trial %s was found in %s", key, self.folder)
        return found

    def put(self, key: str, result: Mapping[str, Any]) -> None:
        """Share the result of a trial."""
        if result["error"]:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        call = self._call(key)
        Journal(self.folder).put(call_key(call), call, result)

    def _call(self, key: str) -> dict[str, Any]:
        self.read_base()
        versions = {"torch": torch.__version__, "transformers": transformers.__version__}
        return {"trial": key, **self._base, "device": self.device, **versions}

    def read_base(self) -> None:
        """Find out what the base model holds, if that is not known yet."""
        if not self._base:
            config = getattr(self.model, "config", None)
            settings = {} if config is None else config.to_dict()
            settings = {k: v for k, v in settings.items() if not k.startswith("_name")}
            text = repr(sorted(settings.items(), key=lambda item: item[0]))
            self._base = {
                "weights": tensors_digest(self.model.state_dict()),
                "config": hashlib.sha256(text.encode()).hexdigest(),
            }
