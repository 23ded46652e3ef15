"""The PEFT modules of a model layer by layer: turned down for a trial, frozen for a step."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from prunepeft.errors import ConfigError
from prunepeft.sites import find_layers
from prunepeft.supernet import base_of
from prunepeft.supernet.layer import UnionLayer


@dataclass(frozen=True, eq=False)
class PeftLayer:
    """One transformer layer that carries PEFT modules.

    Attributes:
        name: `<stack>.<number>`, e.g. `decoder.3`.
        modules: The layers of peft in it.
        parameters: What trains in those, without the layers they wrap.
    """

    name: str
    modules: tuple[nn.Module, ...]
    parameters: tuple[nn.Parameter, ...]


def peft_layers(model: nn.Module) -> tuple[PeftLayer, ...]:
    """Transformer layers with trainable PEFT modules, in the order of the model.

    Heads, norms and biases that a user trains beside the modules belong to no layer, and neither
    do tensors that several layers share.

    Args:
        model: A peft model of any tuner whose modules sit on layers of the base model, or a model
            with such modules in it.
    Raises:
        ConfigError: if no layer carries any.
    """
    base = base_of(model)
    names = {path: f"{stack}.{number}" for path, (stack, number) in find_layers(base).items()}
    modules: dict[str, list[nn.Module]] = {}
    parameters: dict[str, dict[int, nn.Parameter]] = {}
    n_owners: dict[int, int] = {}
    for path, module in base.named_modules():
        name = next((n for p, n in names.items() if path.startswith(f"{p}.")), None)
        if name is None or not isinstance(module, BaseTunerLayer) or ".base_layer" in path:
            continue
        modules.setdefault(name, []).append(module)
        own = parameters.setdefault(name, {})
        for inner, parameter in module.named_parameters():
            if (
                parameter.requires_grad
                and not inner.startswith("base_layer.")
                and (id(parameter) not in own)
            ):
                own[id(parameter)] = parameter
                n_owners[id(parameter)] = n_owners.get(id(parameter), 0) + 1
    found = []
    for name, own in parameters.items():
        kept = tuple(p for i, p in own.items() if n_owners[i] == 1)
        if kept:
            found.append(PeftLayer(name, tuple(modules[name]), kept))
    if not found:
        raise ConfigError(
            "IST trains some layers at a time, but no transformer layer of this model carries "
            "trainable modules of its own; attach LoRA, adapters or another kind of module that "
            "sits in the layers (prompt and prefix tuning of peft do not)."
        )
    return tuple(found)


@contextlib.contextmanager
def suppressed(modules: Sequence[nn.Module], beta: float) -> Iterator[None]:
    """Turn modules down to `beta` of what they contribute; as before afterwards, come what may.

    A union layer has gates. Any other layer y = f(x) around a frozen y0 = f0(x) gives
    y0 + beta (y - y0), which for LoRA is its scale times beta, and for beta = 0 the frozen layer,
    for DoRA and IA3 too.
    """
    with contextlib.ExitStack() as stack:
        for module in modules:
            how = _gated if isinstance(module, UnionLayer) else _blended
            stack.enter_context(how(module, beta))
        yield


@contextlib.contextmanager
def _gated(layer: UnionLayer, beta: float) -> Iterator[None]:
    branches = [b for by_kind in layer.branches.values() for b in by_kind.values()]
    gates = [branch.gate for branch in branches]
    try:
        for branch in branches:
            branch.gate = branch.gate * beta
        yield
    finally:
        for branch, gate in zip(branches, gates, strict=True):
            branch.gate = gate


@contextlib.contextmanager
def _blended(layer: nn.Module, beta: float) -> Iterator[None]:
    def blend(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Tensor:
        if not isinstance(output, Tensor):
            raise ConfigError(
                f"IST cannot turn down a {type(module).__name__}, whose output is a "
                f"{type(output).__name__} and no tensor; use modules on linear layers."
            )
        plain = module.base_layer(*args, **kwargs)
        return plain + beta * (output - plain)

    handle = layer.register_forward_hook(blend, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """No dropout and no gradients; each module's mode is as before afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def train_only(layers: Sequence[PeftLayer], active: Sequence[int]) -> None:
    """Freeze the modules of all layers but the active ones, and clear their gradients.

    Optimisers pass over a parameter without a gradient: no decay, and no step on old momentum.
    """
    for number, layer in enumerate(layers):
        for parameter in layer.parameters:
            parameter.requires_grad_(number in active)
            if number not in active:
                parameter.grad = None


def release_state(
    optimizer: torch.optim.Optimizer,
    layers: Sequence[PeftLayer],
    active: Sequence[int],
    how: str,
) -> None:
    """Take the optimiser's state of layers that do not train off the device.

    Args:
        optimizer: Of torch, or one that accelerate wrapped.
        layers: All layers.
        active: Numbers of those that train; their state comes back to where they are.
        how: `offload` to the host, `drop`, or `keep`.
    """
    inner = getattr(optimizer, "optimizer", optimizer)
    for number, layer in enumerate(layers):
        for parameter in layer.parameters:
            if how == "keep" or parameter not in inner.state:
                continue
            if how == "drop" and number not in active:
                del inner.state[parameter]
            elif how == "offload":
                state = inner.state[parameter]
                device = parameter.device if number in active else torch.device("cpu")
                for name, value in state.items():
                    if isinstance(value, Tensor) and value.ndim:  # a lone number stays
                        state[name] = value.to(device)
