"""Formats `axolotl` and `trl`: settings to train the same placement from scratch elsewhere."""

import pprint
from pathlib import Path
from typing import Any

import yaml

from prunepeft.errors import ConfigError
from prunepeft.state import write_json, write_text
from prunepeft.supernet.export.base_model import classifies_images
from prunepeft.supernet.export.peft_form import LOW_RANK, lora_config
from prunepeft.supernet.export.request import Request, Written

PLACEMENT_FILE = "placement.json"
_AXOLOTL_HEAD = (
    "# The LoRA placement that was found, for training from scratch: merge it into your config.\n"
    "# lora_rank_pattern and lora_alpha_pattern need a recent axolotl; check that it knows them.\n"
)
_AXOLOTL_OTHER = """# This placement is not plain LoRA

axolotl makes its adapters itself and knows LoRA only. Train this placement with a trainer that
takes a peft model or config, for example that of transformers or TRL:

{code}"""
_UNION = """{indent}import json
{indent}from pathlib import Path

{indent}from prunepeft import UnionConfig

{indent}placement = json.loads(Path("placement.json").read_text(encoding="utf-8"))
{indent}peft_config = UnionConfig(
{indent}    placement=placement,
{indent}    task_type={task_type!r},
{indent}    modules_to_save={head!r},
{indent})
"""
_TRL = """# The placement that was found, for training from scratch with TRL:
# trainer = SFTTrainer(model={base!r}, train_dataset=..., peft_config=peft_config)

"""


def write_axolotl(request: Request, folder: Path) -> Written:
    """Write `axolotl.yaml` for LoRA and DoRA; for other kinds a README that says what to do.

    Raises:
        ConfigError: if the base model reads images.
    """
    _refuse_images(request, "axolotl")
    if request.adapter.kinds not in LOW_RANK:
        write_text(folder / "README.md", _AXOLOTL_OTHER.format(code=_union(request, "    ")))
        write_json(folder / PLACEMENT_FILE, request.adapter.placement.to_dict())
        kinds = ", ".join(request.adapter.kinds)
        return Written([f"axolotl has no {kinds}; README.md says how to train this placement"])
    config = lora_config(request.adapter, request.skeleton)
    data: dict[str, Any] = {
        "base_model": request.base.name or "BASE",
        "adapter": "lora",
        "lora_r": config.r,
        "lora_alpha": config.lora_alpha,
        "lora_dropout": config.lora_dropout,
        "lora_target_modules": sorted(config.target_modules),
        "lora_rank_pattern": config.rank_pattern,
        "lora_alpha_pattern": config.alpha_pattern,
        "lora_modules_to_save": config.modules_to_save,
        "peft_use_dora": config.use_dora,
    }
    data = {k: v for k, v in data.items() if v not in ({}, None, False)}
    text = yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=1000)
    write_text(folder / "axolotl.yaml", _AXOLOTL_HEAD + text)
    return Written(["axolotl.yaml holds the placement only; add data and training settings"])


def write_trl(request: Request, folder: Path) -> Written:
    """Write `trl_config.py` with the `peft_config`; for several kinds also `placement.json`.

    Raises:
        ConfigError: if the base model reads images.
    """
    _refuse_images(request, "trl")
    head = _TRL.format(base=request.base.name or "BASE")
    if request.adapter.kinds not in LOW_RANK:
        write_text(folder / "trl_config.py", head + _union(request, ""))
        write_json(folder / PLACEMENT_FILE, request.adapter.placement.to_dict())
        return Written(["trl_config.py needs prunepeft and placement.json beside it"])
    config = lora_config(request.adapter, request.skeleton)
    fields = {
        "r": config.r,
        "lora_alpha": config.lora_alpha,
        "lora_dropout": config.lora_dropout,
        "target_modules": sorted(config.target_modules),
        "rank_pattern": config.rank_pattern,
        "alpha_pattern": config.alpha_pattern,
        "use_dora": config.use_dora,
        "modules_to_save": config.modules_to_save,
        "task_type": request.adapter.task_type,
    }
    values = pprint.pformat(fields, sort_dicts=False, width=96)
    code = f"from peft import LoraConfig\n\npeft_config = LoraConfig(**{values})\n"
    write_text(folder / "trl_config.py", head + code)
    return Written(["trl_config.py needs peft alone"])


def _refuse_images(request: Request, tool: str) -> None:
    if classifies_images(request.adapter):
        raise ConfigError(
            f"{tool} trains language models, and this adapter is for an image classifier; use the "
            "format peft or merged."
        )


def _union(request: Request, indent: str) -> str:
    adapter = request.adapter
    return _UNION.format(
        indent=indent, task_type=adapter.task_type, head=list(adapter.modules_to_save) or None
    )
