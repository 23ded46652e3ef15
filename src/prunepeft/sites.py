"""Find the layers of a transformer that can carry modules: linear and normalisation layers."""

import logging
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import takewhile
from typing import NamedTuple

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from prunepeft.errors import SiteError
from prunepeft.families import FAMILIES, Stack, guess_role
from prunepeft.quantized import is_quantized
from prunepeft.space import Site

logger = logging.getLogger(__name__)

_SOURCE_ROLES = {"o": ("fused_qkv",), "down": ("up", "fused_gate_up")}


class _Blocks(NamedTuple):
    path: str
    modules: Sequence[nn.Module]
    stack: Stack


def find_sites(model: nn.Module) -> tuple[Site, ...]:
    """Find every linear and normalisation layer of every repeated block, in the order of the model.

    The names of known families are looked up in `FAMILIES`. For any other model the lists of equal
    blocks are taken, roles come from names that say so, and a warning shows what was found.
    Embeddings, poolers, task heads and layers without any feature are never sites. No weight is
    read, so a model on the meta device will do.

    Raises:
        SiteError: if no repeated block holds a linear layer, or the model carries adapters already.
    """
    for path, _ in model.named_modules():
        if path.endswith(".base_layer"):
            raise SiteError(
                f"{path} belongs to an adapter that is attached already; sites are those of a "
                "plain model. Detach or merge the adapter first."
            )
    found = _known_blocks(model)
    repeated = _repeated_blocks(model)
    if found:
        taken = tuple(f"{b.path}." for b in found)
        unused = [b.path for b in repeated if not f"{b.path}.".startswith(taken)]
        if unused:
            logger.warning("these repeated blocks carry no sites: %s", ", ".join(unused))
    sites, guessed = _read_sites(found or repeated)
    if not sites:
        raise SiteError(_nothing_found(model))
    if guessed:
        logger.warning(
            "%s has layers of no known family; roles guessed from their names:\n%s",
            type(model).__name__,
            describe_sites(guessed),
        )
    return sites


def find_layers(model: nn.Module) -> dict[str, tuple[str, int]]:
    """Path of every block that `find_sites` looks into -> (stack, number of the layer in it).

    Unlike there, the model may carry adapters.
    """
    done = Counter[str]()
    layers: dict[str, tuple[str, int]] = {}
    for blocks in _known_blocks(model) or _repeated_blocks(model):
        stack = blocks.stack.stack
        for index in range(len(blocks.modules)):
            layers[f"{blocks.path}.{index}".lstrip(".")] = (stack, done[stack])
            done[stack] += 1
    return layers


def describe_sites(sites: Sequence[Site]) -> str:
    """Return an aligned text table of sites, one row per name with the layers that have it."""
    rows: dict[tuple[str, ...], list[int]] = {}
    for s in sites:
        path = re.sub(r"(^|\.)\d+(?=\.)", r"\1*", s.path, count=1)
        key = (s.stack, s.block, s.role, str(s.d_in), str(s.d_out), path)
        rows.setdefault(key, []).append(s.layer)
    table = [("stack", "block", "role", "d_in", "d_out", "path", "layers")]
    table += [(*key, _ranges(layers)) for key, layers in rows.items()]
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    lines = ("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) for row in table)
    return "\n".join(line.rstrip() for line in lines)


def count_base_params(model: nn.Module) -> int:
    """Count the parameters of the base model, which a budget in percent refers to.

    A new task head is left out (it is counted apart); the output embeddings of a language model
    belong to the base. Shared tensors count once; quantised weights count as what they stand for.
    """
    parts: list[nn.Module] = [model]
    if isinstance(model, PreTrainedModel):
        output = model.get_output_embeddings()
        parts = [model.base_model] + ([output] if output is not None else [])
    sizes: dict[int, int] = {}
    for module in (m for part in parts for m in part.modules()):
        dims = linear_dims(module)
        own = dict(module.named_parameters(recurse=False))
        if dims and is_quantized(module):
            own.pop("weight", None)
            sizes[id(module)] = dims[0] * dims[1]
        sizes |= {id(p): p.numel() for p in own.values()}
    return sum(sizes.values())


def linear_dims(module: nn.Module) -> tuple[int, int] | None:
    """Return (d_in, d_out) of a linear layer, quantised or transposed ones too; None for others."""
    if isinstance(module, Conv1D):
        return int(module.weight.shape[0]), int(module.weight.shape[1])
    # Its forward is never called: the attention around it reads the weight directly.
    if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return None
    dims = getattr(module, "in_features", None), getattr(module, "out_features", None)
    return dims if all(isinstance(d, int) for d in dims) else None


def norm_width(module: nn.Module) -> int | None:
    """Return the width of a layer norm or RMS norm with a trained scale; None for others."""
    weight = getattr(module, "weight", None)
    if not re.search(r"(layer|rms)_?norm$", type(module).__name__, re.IGNORECASE):
        return None
    return len(weight) if isinstance(weight, nn.Parameter) and weight.ndim == 1 else None


def layer_dims(module: nn.Module) -> tuple[int, int] | None:
    """Return (d_in, d_out) of a layer that can be a site; None for others."""
    width = norm_width(module)
    return (width, width) if width else linear_dims(module)


def _known_blocks(model: nn.Module) -> list[_Blocks]:
    """Block lists whose closest enclosing pretrained model is of a known family."""
    owners: dict[str, str] = {}
    found: list[_Blocks] = []
    for path, module in model.named_modules():
        owners[path] = _model_type(module) or owners.get(path.rpartition(".")[0], "")
        if not isinstance(module, nn.ModuleList):
            continue
        for stack in FAMILIES.get(owners[path], ()):
            if f".{path}".endswith(f".{stack.layers}"):
                found.append(_Blocks(path, list(module), stack))
    return found


def _model_type(module: nn.Module) -> str:
    return str(getattr(getattr(module, "config", None), "model_type", "") or "")


def _repeated_blocks(model: nn.Module) -> list[_Blocks]:
    """Outermost lists of at least two blocks of one class that hold linear layers."""
    found: list[_Blocks] = []
    for path, module in model.named_modules():
        if not isinstance(module, nn.ModuleList | nn.Sequential) or len(module) < 2:
            continue
        inside = any(path.startswith(b.path + ".") for b in found)
        same = len({type(child) for child in module}) == 1
        if inside or not same or linear_dims(module[0]):
            continue
        if any(linear_dims(m) for m in module.modules()):
            causal = "CausalLM" in type(model).__name__ or "LMHead" in type(model).__name__
            decoder = "decoder" in path.lower() or (causal and "encoder" not in path.lower())
            stack = Stack("decoder" if decoder else "encoder", path, {})
            found.append(_Blocks(path, list(module), stack))
    return found


def _read_sites(found: Sequence[_Blocks]) -> tuple[tuple[Site, ...], list[Site]]:
    """All sites, and those of them whose role had to be guessed."""
    totals = Counter[str]()
    for blocks in found:
        totals[blocks.stack.stack] += len(blocks.modules)
    done = Counter[str]()
    sites: list[Site] = []
    guessed: list[Site] = []
    for blocks in found:
        stack = blocks.stack
        for index, module in enumerate(blocks.modules):
            base = Site("", stack.stack, done[stack.stack], totals[stack.stack], "", "", 0, 0)
            prefix = f"{blocks.path}.{index}".lstrip(".")
            layer = _with_sources(list(_layer_sites(module, prefix, base, stack)), stack)
            sites += layer
            guessed += [s for s in layer if s.path[len(prefix) + 1 :] not in stack.names]
            done[stack.stack] += 1
    return tuple(sites), guessed


def _layer_sites(module: nn.Module, prefix: str, base: Site, stack: Stack) -> Iterator[Site]:
    for name, child in module.named_modules():
        dims = layer_dims(child)
        if dims and all(dims):
            block, role = stack.names.get(name) or guess_role(name)
            yield replace(
                base,
                path=f"{prefix}.{name}",
                block=block,
                role="norm" if norm_width(child) else role,
                d_in=dims[0],
                d_out=dims[1],
                has_bias=isinstance(getattr(child, "bias", None), Tensor),
            )


def _with_sources(layer: list[Site], stack: Stack) -> list[Site]:
    """Fill in `source`: the closest layer that reads the sub-layer's input."""
    result: list[Site] = []
    for site in layer:
        wanted = _SOURCE_ROLES.get(site.role, ())
        if site.role == "o":
            own = stack.attention_source if site.block == "attention" else "q"
            wanted = (own, *wanted)
        near = [s.path for s in layer if s.block == site.block and s.role in wanted]
        source = max(near, key=lambda path: _n_shared(path, site.path), default="")
        result.append(replace(site, source=source))
    return result


def _n_shared(path: str, other: str) -> int:
    pairs = zip(path.split("."), other.split("."), strict=False)
    return len(list(takewhile(lambda pair: pair[0] == pair[1], pairs)))


def _nothing_found(model: nn.Module) -> str:
    n_linear = sum(linear_dims(m) is not None for m in model.modules())
    return (
        f"{type(model).__name__} (model type {_model_type(model) or 'none'!r}, {n_linear} linear "
        "layers) has no list of repeated blocks with linear layers in them; modules go into an "
        "nn.ModuleList of at least two equal transformer blocks. Pass a whole transformer."
    )


def _ranges(numbers: Sequence[int]) -> str:
    """Write layer numbers compactly: [0, 1, 2, 5] -> '0-2,5'."""
    parts: list[list[int]] = []
    for n in sorted(set(numbers)):
        if parts and n == parts[-1][-1] + 1:
            parts[-1][1:] = [n]
        else:
            parts.append([n])
    return ",".join("-".join(map(str, p)) for p in parts)
