"""Format `peft`: a plain LoRA, DoRA or IA3 checkpoint where one says it all, else the union."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from peft import IA3Config, LoraConfig, PeftConfig
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from prunepeft.state import write_json, write_tensors
from prunepeft.structured.opening import CUT_KEY
from prunepeft.supernet.export.engines import Facts, write_serving
from prunepeft.supernet.export.layers import completed_sites, in_every_layer, is_complete
from prunepeft.supernet.export.request import Request, Written
from prunepeft.supernet.export.source import CONFIG_FILE, KEY, WEIGHTS_FILE, Module, SavedAdapter
from prunepeft.supernet.layer import PREFIX
from prunepeft.supernet.tuner import UnionConfig

LOW_RANK = (("lora",), ("dora",))
_LORA_NAMES = {"A": "lora_A.weight", "B": "lora_B.weight", "magnitude": "lora_magnitude_vector"}


def write_peft(request: Request, folder: Path) -> Written:
    """Write the checkpoint; plain peft loads it unless several kinds are left."""
    adapter = request.adapter
    if adapter.kinds in LOW_RANK:
        form, config = adapter.kinds[0], lora_config(adapter, request.skeleton)
        tensors = {
            f"{KEY}{m.site.path}.{_LORA_NAMES[name]}": tensor
            for m in adapter.modules
            for name, tensor in m.tensors.items()
        }
    elif adapter.kinds == ("ia3",) and not _blurred(adapter):
        form, config = "ia3", _ia3_config(adapter, request.skeleton)
        tensors = {f"{KEY}{m.site.path}.ia3_l": _ia3_tensor(m) for m in adapter.modules}
    else:
        form, config, tensors = "union", _union_config(adapter), _union_tensors(adapter)
    tensors |= {KEY + name: tensor for name, tensor in adapter.head.items()}
    write_checkpoint(folder, config, tensors, adapter.auto_mapping)
    write_serving(folder, _facts(request, form, config))
    loader = {
        "union": "loads with peft after `import prunepeft`",
        "ia3": "loads with peft alone (IA3Config)",
    }.get(form, "loads with peft alone (LoraConfig)")
    return Written([loader])


def write_checkpoint(
    folder: Path,
    config: PeftConfig,
    tensors: dict[str, Tensor],
    auto_mapping: dict[str, str] | None = None,
) -> None:
    """Write the two files of a peft checkpoint."""
    data = {k: sorted(v) if isinstance(v, set) else v for k, v in config.to_dict().items()}
    data["auto_mapping"] = auto_mapping
    write_json(folder / CONFIG_FILE, data)
    write_tensors(folder / WEIGHTS_FILE, tensors, {"format": "pt"})


def lora_config(adapter: SavedAdapter, skeleton: nn.Module | None = None) -> LoraConfig:
    """The LoraConfig of a lora-only or dora-only adapter, with the exact scaling of every module.

    peft scales by alpha / r, so alpha = scaling * size. r is the largest rank, which engines
    compare with their limit. Keys are anchored: peft matches `(.*\\.)?(key)$`.
    """
    largest = max(adapter.modules, key=lambda m: m.size)
    alpha = _alpha(largest)
    named = {f"^{re.escape(m.site.path)}": m for m in adapter.modules}
    targets = sorted(m.site.path for m in adapter.modules)
    return LoraConfig(
        r=largest.size,
        lora_alpha=alpha,
        lora_dropout=max(m.kind.dropout for m in adapter.modules),
        rank_pattern={k: m.size for k, m in named.items() if m.size != largest.size},
        alpha_pattern={k: _alpha(m) for k, m in named.items() if _alpha(m) != alpha},
        target_modules=targets,
        exclude_modules=_also_matched(targets, skeleton) or None,
        fan_in_fan_out=is_transposed(targets, skeleton),
        use_dora=adapter.kinds == ("dora",),
        modules_to_save=list(adapter.modules_to_save) or None,
        **_origin(adapter),
    )


def is_transposed(paths: Iterable[str], skeleton: nn.Module | None) -> bool:
    """Whether the layers store (in, out) weights, which peft otherwise finds out with a warning."""
    return skeleton is not None and all(
        isinstance(skeleton.get_submodule(path), Conv1D) for path in paths
    )


def _origin(adapter: SavedAdapter) -> dict[str, Any]:
    return {
        "task_type": adapter.task_type,
        "base_model_name_or_path": adapter.base_name,
        "revision": adapter.revision,
        "inference_mode": True,
    }


def _alpha(module: Module) -> float:
    """Numerator of the scaling, whole if it is whole: some engines read an integer."""
    alpha = round(module.scaling * module.size, 9)
    return int(alpha) if alpha == int(alpha) else module.scaling * module.size


def _also_matched(targets: list[str], skeleton: nn.Module | None) -> list[str]:
    """Layers of the base model whose path ends with a target, which peft would adapt as well."""
    if skeleton is None:
        return []
    ends = tuple(f".{t}" for t in targets)
    return sorted(n for n, _ in skeleton.named_modules() if n.endswith(ends) and n not in targets)


def _blurred(adapter: SavedAdapter) -> bool:
    """Whether peft, which compares plain ends of text, would mistake one path for another."""
    inputs = tuple(m.site.path for m in adapter.modules if "input" in m.kind.stages(m.site))
    others = (m.site.path for m in adapter.modules if "input" not in m.kind.stages(m.site))
    return any(path.endswith(inputs) for path in others)


def _ia3_config(adapter: SavedAdapter, skeleton: nn.Module | None) -> IA3Config:
    targets = [m.site.path for m in adapter.modules]
    return IA3Config(
        target_modules=targets,
        exclude_modules=_also_matched(targets, skeleton) or None,
        fan_in_fan_out=is_transposed(targets, skeleton),
        feedforward_modules=[
            m.site.path for m in adapter.modules if "input" in m.kind.stages(m.site)
        ],
        modules_to_save=list(adapter.modules_to_save) or None,
        **_origin(adapter),
    )


def _ia3_tensor(module: Module) -> Tensor:
    shape = (1, -1) if "input" in module.kind.stages(module.site) else (-1, 1)
    return module.tensors["l"].reshape(shape)


def _union_config(adapter: SavedAdapter) -> UnionConfig:
    return UnionConfig(
        placement=adapter.placement.to_dict(),
        init_seed=adapter.init_seed,
        base_digest=adapter.base_digest,
        modules_to_save=list(adapter.modules_to_save) or None,
        **_origin(adapter),
    )


def _union_tensors(adapter: SavedAdapter) -> dict[str, Tensor]:
    return {
        f"{KEY}{m.site.path}.{PREFIX}{m.kind.name}_{name}": tensor
        for m in adapter.modules
        for name, tensor in m.tensors.items()
    }


def _facts(request: Request, form: str, config: PeftConfig) -> Facts:
    adapter = request.adapter
    paths = {m.site.path for m in adapter.modules}
    sites = completed_sites(adapter, request.skeleton) if form == "lora" else None
    return Facts(
        form=form,
        r=getattr(config, "r", 0),
        alpha=getattr(config, "lora_alpha", 0),
        ranks=tuple(m.size for m in adapter.modules),
        scalings=tuple(m.scaling for m in adapter.modules),
        targets=tuple(sorted({p.rpartition(".")[2] for p in paths})),
        every_layer=sites is not None and in_every_layer(paths, sites),
        whole_groups=sites is not None and is_complete(paths, sites),
        has_head=bool(adapter.head),
        generates=generates(adapter),
        base=request.base.name or "BASE",
        path=str(request.output),
        is_stock=is_stock(request.skeleton),
    )


def is_stock(skeleton: nn.Module | None) -> bool:
    """Whether stock classes can open the base model: its layers have no widths of their own."""
    return not hasattr(getattr(skeleton, "config", None), CUT_KEY)


def generates(adapter: SavedAdapter) -> bool:
    """Whether the base model writes text, as the engines expect."""
    if adapter.task_type is not None:
        return adapter.task_type == "CAUSAL_LM"
    sites = [m.site for m in adapter.modules]
    return all(s.stack == "decoder" and s.block != "cross_attention" for s in sites)
