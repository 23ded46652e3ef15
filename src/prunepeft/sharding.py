"""The frozen base model cut over the processes of torchrun, so that each holds a part of it.

PyTorch's fully sharded data parallel (FSDP2) gathers the weights of a block right before the block
runs, forward and backward, and lets go of them behind it. What trains (modules and task head) stays
whole on every process: it is small, it may be put on, pruned and taken off at any time, and its
gradients are averaged here.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import PreTrainedConfig, TrainingArguments

from prunepeft.config import RunConfig
from prunepeft.errors import ConfigError
from prunepeft.processes import n_processes
from prunepeft.sites import find_layers

BUCKET = 8_000_000  # numbers that are averaged in one call


class ShardedArguments(TrainingArguments):
    """Arguments of a Trainer that leaves the model where it is."""

    place_model_on_device = False


def check_shard(config: RunConfig, model: PreTrainedConfig, *, needs_whole_base: bool) -> None:
    """Raise ConfigError if the base model is to be cut over processes and cannot be.

    Args:
        config: The settings.
        model: Config of the base model.
        needs_whole_base: Of the method, see `Strategy`.
    """
    if not config.shard:
        return
    if n_processes() == 1:
        raise ConfigError(
            "shard=true cuts the base model over the processes of torchrun, and here is one; start "
            "several (torchrun --nproc-per-node 2 -m prunepeft ...), or leave shard out."
        )
    if needs_whole_base and config.arch is None:
        raise ConfigError(
            f"method {config.method} works on the weights of the base model itself, of which every "
            "process has a part with shard=true; leave shard out, or use another method, such as "
            "prunepeft."
        )
    if config.quantize != "none" or getattr(model, "quantization_config", None) is not None:
        raise ConfigError(
            "shard=true cuts weights in full or half precision, and this model is quantised; give "
            "the model it was made of without quantize, or leave shard out."
        )


def shard_base(model: nn.Module, head: Sequence[str], device: str) -> None:
    """Cut a model over all processes, in place and for good; each keeps its part on its device.

    A block (see `find_layers`) is gathered at a time, and all outside the blocks together. What is
    cut is frozen. The head stays whole, and so do numbers and tensors that blocks share.

    Args:
        model: The base model on the CPU, without modules, the same on every process.
        head: Names of the modules that are trained in full.
        device: `cpu` or `cuda`.
    Raises:
        ConfigError: if there is one process, or this PyTorch cannot do it.
    """
    fully_shard, mesh = _fsdp(device)
    paths = sorted(find_layers(model), key=lambda path: -path.count("."))
    whole = set(_whole(model, paths, head))
    for parameter in model.parameters():
        if parameter in whole:
            parameter.data = parameter.data.to(device)
        else:
            parameter.requires_grad_(False)
            parameter.data = parameter.data.contiguous()
    for module in (*map(model.get_submodule, paths), model):
        plain = type(module)
        fully_shard(module, mesh=mesh, reshard_after_forward=True, ignored_params=whole)
        new = type(module)  # a subclass; adapters and messages go on naming the model's own class
        new.__name__, new.__qualname__ = plain.__name__, plain.__qualname__
        new.__module__ = plain.__module__


def leave_as_is(accelerator: Any) -> None:
    """Let an accelerator prepare mixed precision and nothing else: it would copy the whole model.

    Args:
        accelerator: Of accelerate; changed in place.
    """
    prepare = accelerator.prepare_model

    def prepare_model(model: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        return prepare(model, device_placement=False, evaluation_mode=True)

    accelerator.prepare_model = prepare_model


@torch.no_grad()
def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replace gradients by their mean over all processes, as data parallel does.

    A process on which a parameter took no part counts as zero. A gradient that no process has
    stays None.

    Args:
        parameters: In the same order on every process; those that are frozen are passed over.
    """
    for bucket in _buckets(p for p in parameters if p.requires_grad):
        _average(bucket)


def _fsdp(device: str) -> tuple[Any, Any]:
    """The function that cuts, and the processes it cuts over."""
    if not (dist.is_available() and dist.is_initialized()):
        raise ConfigError(
            "shard=true needs several processes, and this one belongs to no group; start with "
            "torchrun (torchrun --nproc-per-node 2 -m prunepeft ...), or leave shard out."
        )
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 7):
        raise ConfigError(
            f"shard=true needs PyTorch 2.7 or newer, and this is {torch.__version__}; install a "
            "newer one, or leave shard out."
        )
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    return fully_shard, init_device_mesh(device, (dist.get_world_size(),))


def _whole(model: nn.Module, paths: Sequence[str], head: Sequence[str]) -> Iterator[nn.Parameter]:
    """What is not cut: the head, scalars and what is empty, and tensors of several units."""
    units: dict[nn.Parameter, set[str]] = defaultdict(set)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        units[parameter].add(next((path for path in paths if name.startswith(f"{path}.")), ""))
    yield from (p for p, of in units.items() if len(of) > 1 or not p.ndim or not p.numel())
    for name, module in model.named_modules():
        if head and name.endswith(tuple(head)):  # as peft finds the modules that it is to train
            yield from module.parameters()


def _buckets(parameters: Iterable[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """The parameters in lists of one type and of about `BUCKET` numbers."""
    bucket: list[nn.Parameter] = []
    size = 0
    for parameter in parameters:
        if bucket and (size >= BUCKET or parameter.dtype != bucket[0].dtype):
            yield bucket
            bucket, size = [], 0
        bucket.append(parameter)
        size += parameter.numel()
    if bucket:
        yield bucket


def _average(bucket: list[nn.Parameter]) -> None:
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in bucket]
    has = grads[0].new_tensor([p.grad is not None for p in bucket])
    total = torch.cat([*(grad.flatten() for grad in grads), has])
    dist.all_reduce(total)
    total /= dist.get_world_size()
    *means, anywhere = total.split([*(p.numel() for p in bucket), len(bucket)])
    # Only where a gradient is missing here is it worth waiting for the device.
    exists = anywhere.tolist() if any(p.grad is None for p in bucket) else [1.0] * len(bucket)
    for parameter, grad, mean, there in zip(bucket, grads, means, exists, strict=True):
        if there:
            parameter.grad = grad.copy_(mean.view_as(grad))
