"""RunConfig: every setting of a run, with its default, its limits and one line of help."""

from typing import Any, Literal

from pydantic import Field, model_validator

from prunepeft.budget import Budget
from prunepeft.config.fields import (
    Count,
    Kinds,
    Method,
    Options,
    Roles,
    Seed,
    Share,
    Sizes,
    TaskName,
    Text,
)
from prunepeft.config.methods import (
    AllocateSettings,
    BipeftSettings,
    BlackBoxSettings,
    IstSection,
    LightPeftSettings,
    S3DeltaSettings,
    SMamSettings,
)
from prunepeft.config.sections import BaseSettings, SearchSettings, Section, TrainSettings, about
from prunepeft.errors import ConfigError

# Settings of `base` that say how to find what goes; method light-peft finds it in its own training.
BASE_TRAINING = ("method", "epochs", "fidelity", "rank", "every")


class RunConfig(Section):
    """Every setting of a run."""

    model: Text = Field(description="folder or hub id of the base model")
    data: Text = Field(
        description="jsonl, csv, tsv, parquet, npz, folder of splits or images, or hub id"
    )
    budget: str | None = about(None, "0.5%, 120k, 1.2M, '12 modules' or rank:64")
    task: TaskName | None = about(
        None, "seq-cls, regression, causal-lm or image-cls; null: from the data"
    )
    columns: dict[str, Text] | None = about(None, "role -> column, e.g. {text: sentence}")
    metric: Text | None = about(None, "what decides; null: the task's default")
    validation_fraction: Share = about(
        0.1, "split off the training rows if the data has no validation split", gt=0
    )
    method: Method = about("prunepeft", "how to search")
    kinds: Kinds = about(["lora", "serial_adapter"], "kinds of module to choose from")
    space: Literal["default", "paper"] = about("default", "sizes scaled to the budget, or fixed")
    sizes: Sizes = about({}, "allowed sizes per kind, e.g. {lora: [4, 8]}")
    options: Options = about({}, "options per kind, e.g. {lora: {rslora: true}}")
    roles: Roles = about({}, "where a kind goes; + ties roles, e.g. {lora: q+v}")
    output: Text | None = about(None, "run folder; null: runs/<data>-<method>-<seed>")
    seed: Seed = about(0, "fixes splits, initial values and the order of rows")
    device: Literal["auto", "cpu", "cuda"] = about("auto", "where to compute")
    precision: Literal["auto", "fp32", "bf16"] = about(
        "auto", "number format of the base model; auto: bf16 where the device is fast in it"
    )
    quantize: Literal["none", "8bit", "4bit"] = about(
        "none", "hold the frozen base model in 8 or 4 bits, by bitsandbytes"
    )
    shard: bool = about(
        False, "cut the frozen model over the processes of torchrun, if it is too large for one"
    )
    baseline: Literal["none", "lora", "lora-all"] = about(
        "none", "also train plain LoRA at equal budget: on query and value, or on all linears"
    )
    arch: Text | None = about(None, "arch.json to train instead of searching")
    strategy: Text | None = about(None, "strategy.json to use instead of a warm-up")
    base_ratio: Share = about(
        0.0, "share of the frozen model's attention heads and feed-forward neurons to remove"
    )
    backend: Literal["serial", "process", "ray"] = about(
        "serial", "where black-box trials run: in turn, in processes, or on Ray; same results"
    )
    workers: Count | None = about(None, "trials at a time of backend process or ray; null: 2")
    ray_address: Text | None = about(None, "Ray cluster to join; null: a local one")
    cache: Text | None = about(None, "folder in which runs share finished trials")
    offline: bool = about(False, "never ask the network")
    trust_remote_code: bool = Field(
        False, description="run code that comes with the model (command line only)", exclude=True
    )
    train: TrainSettings = Field(default_factory=TrainSettings)
    search: SearchSettings = Field(default_factory=SearchSettings)
    base: BaseSettings = Field(default_factory=BaseSettings)
    light_peft: LightPeftSettings = Field(default_factory=LightPeftSettings)
    black_box: BlackBoxSettings = Field(default_factory=BlackBoxSettings)
    smam: SMamSettings = Field(default_factory=SMamSettings)
    s3delta: S3DeltaSettings = Field(default_factory=S3DeltaSettings)
    bipeft: BipeftSettings = Field(default_factory=BipeftSettings)
    allocate: AllocateSettings = Field(default_factory=AllocateSettings)
    ist: IstSection = Field(default_factory=IstSection)

    @model_validator(mode="after")
    def _check(self) -> "RunConfig":
        if self.budget is None and self.arch is None and not self.base_ratio:
            raise ConfigError(
                "budget is missing; give for example budget=1% (or arch=arch.json; prune-base "
                "takes ratio=0.3 instead)"
            )
        self._check_sections()
        self._check_backend()
        if self.shard and self.base_ratio:
            raise ConfigError(
                f"base_ratio={self.base_ratio:g} takes heads and neurons out of whole weights, and "
                "with shard=true every process has a part of them; run prune-base first, without "
                "shard, and search on its folder base/, or leave shard out"
            )
        if self.base_ratio and self.arch is not None:
            raise ConfigError(
                "arch.json fits the base model it was made on, so base_ratio cannot cut that "
                "here; run prune-base first and search on its base/, or leave base_ratio out"
            )
        if self.base.scope == "global" and self.base.stock:
            raise ConfigError(
                "base.scope=global gives every layer a width of its own, which stock transformers "
                "cannot open; add base.stock=false, or leave base.scope=layer"
            )
        if self.budget is not None:
            Budget.parse(self.budget)
        for name in ("sizes", "options", "roles"):
            unused = sorted(set(getattr(self, name)) - set(self.kinds))
            if unused and self.arch is None:
                raise ConfigError(
                    f"{name} names {', '.join(unused)}, which is not among kinds "
                    f"({', '.join(self.kinds)}); add it to kinds or drop it from {name}"
                )
        return self

    def _check_sections(self) -> None:
        """Refuse settings of the base, of Light-PEFT or of IST that nothing reads."""
        if not self.ist.enabled and self.ist != IstSection():
            raise ConfigError("ist.* is read with ist=on alone; add ist=on, or leave it out")
        own, base = LightPeftSettings(), BaseSettings()
        if self.method == "light-peft":
            changed = [n for n in BASE_TRAINING if getattr(self.base, n) != getattr(base, n)]
            if changed:
                raise ConfigError(
                    f"method light-peft cuts the base in its own training, so base.{changed[0]} "
                    "says nothing; leave it out (search.epochs and search.fidelity say how long "
                    "that training is)"
                )
        elif self.light_peft != own:
            raise ConfigError(
                "light_peft.* is read by method=light-peft alone; leave it out, or give "
                "method=light-peft"
            )

    def _check_backend(self) -> None:
        """Refuse settings that the backend does not read."""
        if self.workers is not None and self.backend == "serial":
            raise ConfigError(
                "workers says how many trials run at a time, and backend serial runs one; give "
                "backend=process or ray, or leave workers out"
            )
        if self.ray_address is not None and self.backend != "ray":
            raise ConfigError(
                f"ray_address is read by backend=ray alone, and backend is {self.backend}; give "
                "backend=ray, or leave ray_address out"
            )

    def to_dict(self) -> dict[str, Any]:
        """All settings as plain JSON types; `trust_remote_code` is never written to a file."""
        return self.model_dump(mode="json")
