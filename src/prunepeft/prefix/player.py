"""The frozen prefix of a model: blocks below the lowest module, whose output never changes.

Their output can be kept from one forward pass and played back in others, in which these blocks then
do not run. Masks, positions and the like are still computed by the model itself.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from prunepeft.errors import StateError
from prunepeft.processes import is_cut
from prunepeft.sites import find_layers
from prunepeft.supernet import base_of


@dataclass(frozen=True)
class FrozenStack:
    """The frozen blocks at the start of one stack.

    Attributes:
        stack: `encoder` or `decoder`.
        paths: Of its frozen blocks in the base model, in order; at least one.
        n_blocks: Blocks of the whole stack.
    """

    stack: str
    paths: tuple[str, ...]
    n_blocks: int


class _Enough(Exception):
    """The last frozen block has run; the rest of the forward pass is not needed."""


def frozen_prefix(net: nn.Module) -> tuple[FrozenStack, ...]:
    """Blocks that come before everything that is trained, in the order in which they run.

    A decoder runs after the encoder, so its blocks count only if no block of the encoder is
    trained. Empty if the first block holds a module, or something trainable.
    """
    base = base_of(net)
    stacks: dict[str, list[str]] = {}
    for path, (stack, _) in find_layers(base).items():
        stacks.setdefault(stack, []).append(path)
    found = []
    for stack in sorted(stacks, key=lambda s: s == "decoder"):
        paths = stacks[stack]
        frozen = [_is_frozen(base.get_submodule(path)) for path in paths]
        n = frozen.index(False) if False in frozen else len(paths)
        if n:
            found.append(FrozenStack(stack, tuple(paths[:n]), len(paths)))
        if n < len(paths):
            break
    return tuple(found)


class PrefixPlayer:
    """Takes the output of the frozen prefix from one forward pass and gives it to others.

    A block may return more than its hidden states, which later blocks read (T5's first block makes
    the position bias of all). If so, and if there are later blocks, the first block of the stack
    goes on running for that.

    Args:
        net: The model with modules on it.
        prefix: What `frozen_prefix` found in it.
    """

    def __init__(self, net: nn.Module, prefix: tuple[FrozenStack, ...]) -> None:
        self.net, self.prefix = net, prefix
        base = base_of(net)
        # What is cut over processes has to be put together and apart until the very end.
        self._stops = not any(is_cut(p) for p in base.parameters())
        self._blocks = {s.stack: [base.get_submodule(p) for p in s.paths] for s in prefix}
        # Whether each further output is a tensor; None: a block returns its hidden states alone.
        self._extras: dict[str, tuple[bool, ...] | None] = {}

    def take(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Hidden states behind the last frozen block of each stack, (rows, tokens, width).

        Runs no block above the prefix, unless the base model is cut over processes. The caller
        decides on mode, gradients and autocast.
        """
        taken: dict[str, Tensor] = {}
        handles = []
        for stack, blocks in self._blocks.items():
            is_last = stack == self.prefix[-1].stack

            def keep(module, args, output, stack=stack, is_last=is_last) -> None:
                is_tuple = isinstance(output, tuple | list)
                more = [isinstance(extra, Tensor) for extra in output[1:]] if is_tuple else ()
                self._extras[stack] = tuple(more) if is_tuple else None
                taken[stack] = output[0] if is_tuple else output
                if not isinstance(taken[stack], Tensor) or taken[stack].ndim != 3:
                    raise StateError(f"a block returns a {type(taken[stack]).__name__}")
                if is_last and self._stops:
                    raise _Enough

            handles.append(blocks[-1].register_forward_hook(keep))
        try:
            with contextlib.suppress(_Enough):
                self.net(**batch)
        finally:
            for handle in handles:
                handle.remove()
        if len(taken) < len(self._blocks):
            missing = ", ".join(sorted(self._blocks.keys() - taken.keys()))
            raise StateError(f"the last frozen block of the {missing} was not called as a module")
        return taken

    @contextlib.contextmanager
    def play(self, states: Mapping[str, Tensor]) -> Iterator[None]:
        """Let the frozen blocks return these hidden states, as `take` gave them for these rows."""
        before: list[tuple[nn.Module, Any]] = []
        try:
            for part in self.prefix:
                form = _Form(self._extras[part.stack], states[part.stack])
                has_later = len(part.paths) < part.n_blocks
                for number, block in enumerate(self._blocks[part.stack]):
                    before.append((block, block.__dict__.get("forward")))
                    runs = number == 0 and has_later and form.needs_first
                    block.forward = form.first(block.forward) if runs else form.skip
            yield
        finally:
            for block, forward in before:
                if forward is None:
                    del block.forward
                else:
                    block.forward = forward

    def is_independent(self, batch: Mapping[str, Any]) -> bool:
        """Whether no trained parameter has a part in the output of the prefix."""
        with torch.enable_grad():
            states = self.take(batch)
        return not any(_reaches_parameters(state) for state in states.values())


class _Form:
    """What skipped blocks of a stack return.

    Args:
        extras: Whether each thing that a block returned beside its hidden states is a tensor; None:
            it returned these alone.
        state: The hidden states to return.
    """

    def __init__(self, extras: tuple[bool, ...] | None, state: Tensor) -> None:
        self.extras: tuple[Any, ...] | None = None if extras is None else (None,) * len(extras)
        self.state = state
        self.needs_first = any(extras or ())

    def skip(self, *args: Any, **kwargs: Any) -> Any:
        """In the place of a block's forward."""
        return self.state if self.extras is None else (self.state, *self.extras)

    def first(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """The same for the first block, which runs for what it returns beside."""

        def run(*args: Any, **kwargs: Any) -> Any:
            with torch.no_grad():
                self.extras = tuple(forward(*args, **kwargs)[1:])
            return self.skip()

        return run


def _is_frozen(block: nn.Module) -> bool:
    trained = any(p.requires_grad for p in block.parameters())
    return not trained and not any(isinstance(m, BaseTunerLayer) for m in block.modules())


def _reaches_parameters(tensor: Tensor) -> bool:
    """Whether a gradient of the tensor would flow into a parameter."""
    seen, left = set(), [tensor.grad_fn]
    while left:
        node = left.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if isinstance(getattr(node, "variable", None), nn.Parameter):
            return True
        left += [source for source, _ in node.next_functions]
    return False
