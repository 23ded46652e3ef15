"""The base model compiled for one training, as an option."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from prunepeft.errors import ConfigError
from prunepeft.supernet.attach import base_of
from prunepeft.supernet.layer import UnionLayer


@contextlib.contextmanager
def compiled(net: nn.Module, backend: str) -> Iterator[None]:
    """The forward pass of the base model goes through torch.compile inside, as ever afterwards.

    Each placement is another model, so what was compiled for the last one is dropped first: torch
    would give up after a few. Forward passes in which outputs are looked at run uncompiled, since
    what a recorder adds up is no part of a graph.

    Args:
        net: The model with modules on it.
        backend: Of torch.compile, e.g. `inductor`.
    """
    base = base_of(net)
    before = base.__dict__.get("forward")
    torch.compiler.reset()
    plain = base.forward
    graph = torch.compile(plain, backend=backend, dynamic=True)
    layers = [m for m in base.modules() if isinstance(m, UnionLayer)]

    def forward(*args: Any, **kwargs: Any) -> Any:
        is_watched = any(layer.observer is not None for layer in layers)
        return (plain if is_watched else graph)(*args, **kwargs)

    base.forward = forward
    try:
        yield
    finally:
        del base.forward
        if before is not None:
            base.forward = before


def check_backend(name: str) -> None:
    """Raise ConfigError if torch.compile has no backend of this name."""
    known = torch.compiler.list_backends(exclude_tags=None)
    if name not in known:
        raise ConfigError(
            f"train.compile is {name!r}, no backend of torch.compile; use one of "
            f"{', '.join(known)}, or leave it out."
        )
