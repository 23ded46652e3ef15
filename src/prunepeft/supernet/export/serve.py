"""Format `serve`: one LoRA that every engine applies rightly, because nothing in it varies.

Ranks are padded with zeros to one r, alpha = r so that every scale rule gives 1, and the scaling
is folded into B. Types of layer that occur are there in all layers, pruned ones as zeros.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from peft import LoraConfig
from torch import Tensor, nn

from prunepeft.errors import CheckpointError, ConfigError
from prunepeft.space import Site
from prunepeft.state import write_tensors
from prunepeft.supernet.export.engines import RANKS, Facts, write_serving
from prunepeft.supernet.export.layers import completed_sites
from prunepeft.supernet.export.peft_form import (
    generates,
    is_stock,
    is_transposed,
    write_checkpoint,
)
from prunepeft.supernet.export.request import Request, Written
from prunepeft.supernet.export.source import KEY, SavedAdapter

HEAD_FILE = "head/head.safetensors"  # in a folder: some engines read every weight file beside it


def write_serve(request: Request, folder: Path) -> Written:
    """Write the padded LoRA, the head as a file of its own, and `serving.json`.

    Raises:
        ConfigError: if other kinds than lora are left, a rank is above what engines take, or the
            base model is needed and was not found.
    """
    adapter = request.adapter
    rank = _common_rank(adapter)
    sites = completed_sites(adapter, request.skeleton)
    if sites is None:
        raise ConfigError(
            "the format serve needs the shapes of all layers, which this adapter alone does not "
            "tell, and its base model was not found; pass base= with the model or its folder."
        )
    tensors = padded_tensors(adapter, sites, rank, _dtype(request.dtype))
    paths, names = [s.path for s in sites], _module_names(request.skeleton, sites)
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=target_names(paths, names),
        fan_in_fan_out=is_transposed(paths, request.skeleton),
        task_type=adapter.task_type if generates(adapter) else None,
        base_model_name_or_path=adapter.base_name,
        revision=adapter.revision,
        inference_mode=True,
    )
    write_checkpoint(folder, config, tensors, adapter.auto_mapping)
    notes = [_size_note(tensors, adapter, len(sites), rank)]
    if adapter.head:
        (folder / HEAD_FILE).parent.mkdir()
        write_tensors(folder / HEAD_FILE, adapter.head, {"format": "pt"})
        notes.append(f"the task head is not part of the adapter; it is in {HEAD_FILE}")
    write_serving(folder, _facts(request, sites, rank))
    return Written(notes)


def padded_tensors(
    adapter: SavedAdapter, sites: Sequence[Site], rank: int, dtype: torch.dtype
) -> dict[str, Tensor]:
    """A (rank, d_in) and s * B (d_out, rank) of every site; zeros where there is no module.

    Raises:
        CheckpointError: if B has become zero or infinite everywhere in this dtype.
    """
    tensors = {}
    modules = {m.site.path: m for m in adapter.modules}
    for site in sites:
        a = torch.zeros(rank, site.d_in)
        b = torch.zeros(site.d_out, rank)
        if (module := modules.get(site.path)) is not None:
            a[: module.size] = module.tensors["A"]
            b[:, : module.size] = module.tensors["B"] * module.scaling
        tensors[f"{KEY}{site.path}.lora_A.weight"] = a.to(dtype)
        tensors[f"{KEY}{site.path}.lora_B.weight"] = b.to(dtype)
    updates = [t for name, t in tensors.items() if name.endswith("lora_B.weight")]
    if not all(torch.isfinite(t).all() for t in updates):
        raise CheckpointError(f"scaled B overflows in {dtype}; export with dtype='bfloat16'.")
    if not any(torch.any(t) for t in updates):
        raise CheckpointError(f"scaled B is all zeros in {dtype}; export with dtype='float32'.")
    return tensors


def target_names(paths: Sequence[str], names: Iterable[str]) -> list[str]:
    """The shortest ends of the paths that match no other module of the base model.

    Args:
        paths: Layers to match.
        names: All module names of the base model.

    Example:
        >>> target_names(["h.0.mlp.down"], ["h.0.mlp.down", "h.0.attn.up"])
        ['down']
        >>> target_names(["h.0.mlp.out"], ["h.0.mlp.out", "h.0.attn.out"])
        ['mlp.out']
    """
    in_model = Counter(end for name in set(names) for end in _ends(name))
    wanted = Counter(end for path in paths for end in _ends(path))
    chosen = {
        next((end for end in _ends(path) if in_model[end] == wanted[end]), path) for path in paths
    }
    return sorted(chosen)


def _ends(path: str) -> Iterator[str]:
    """Every end of a path at a dot, the shortest first."""
    parts = path.split(".")
    return (".".join(parts[-n:]) for n in range(1, len(parts) + 1))


def _common_rank(adapter: SavedAdapter) -> int:
    others = [k for k in adapter.kinds if k != "lora"]
    if others:
        raise ConfigError(
            f"the format serve holds LoRA only, but this adapter has {', '.join(others)}; export "
            "with the format merged (lora, dora and ia3 can be merged), or search with "
            "--kinds lora."
        )
    largest = max(m.size for m in adapter.modules)
    rank = next((r for r in RANKS if r >= largest), None)
    if rank is None:
        raise ConfigError(
            f"rank {largest} is above what serving engines take ({RANKS[-1]}); export with the "
            "format merged."
        )
    return rank


def _dtype(name: str | None) -> torch.dtype:
    return getattr(torch, name or "bfloat16")


def _module_names(skeleton: nn.Module | None, sites: Sequence[Site]) -> list[str]:
    if skeleton is None:
        return [s.path for s in sites]
    return [name for name, _ in skeleton.named_modules()]


def _size_note(tensors: dict[str, Tensor], adapter: SavedAdapter, n_sites: int, rank: int) -> str:
    n_kept = len(adapter.modules)
    size = sum(t.nbytes for t in tensors.values())
    own = sum(t.numel() for m in adapter.modules for t in m.tensors.values())
    share = sum(t.numel() for t in tensors.values()) / own
    return (
        f"padded to rank {rank} on {n_sites} layers ({n_kept} hold a module): {size} bytes, "
        f"{share:.1f} times the numbers of the adapter; pruned layers save no time in an engine, "
        "dropped types of layer do"
    )


def _facts(request: Request, sites: Sequence[Site], rank: int) -> Facts:
    return Facts(
        form="serve",
        r=rank,
        alpha=rank,
        ranks=(rank,) * len(sites),
        scalings=(1.0,) * len(sites),
        targets=tuple(sorted({s.path.rpartition(".")[2] for s in sites})),
        every_layer=True,
        whole_groups=True,
        has_head=bool(request.adapter.head),
        generates=generates(request.adapter),
        base=request.base.name or "BASE",
        path=str(request.output),
        is_stock=is_stock(request.skeleton),
    )
