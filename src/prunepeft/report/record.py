"""The files of a run folder as typed, checked data. Reads JSON only: never a model, never torch."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from prunepeft import state
from prunepeft.errors import CheckpointError, ConfigError, StateError
from prunepeft.space import Placement

MAX_BYTES = 256 * 2**20
MAX_CONFIG_CHARS = 100_000
_Model = TypeVar("_Model", bound=BaseModel)


class _Section(BaseModel):
    """A part of a file. Unknown keys are left alone and null means absent."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, data: Any) -> Any:
        if isinstance(data, Mapping):
            return {key: value for key, value in data.items() if value is not None}
        return data


class TaskInfo(_Section):
    name: str = ""
    metric: str = ""
    greater_is_better: bool = True
    n_train: int | None = None
    n_validation: int | None = None
    labels: list[Any] = []


class QuantizationInfo(_Section):
    words: str = ""
    settings: dict[str, bool | str | list[str]] = {}
    head: list[str] = []


class ModelInfo(_Section):
    name: str = ""
    family: str = ""
    n_params: int | None = None
    quantization: QuantizationInfo | None = None


class DataInfo(_Section):
    source: str = ""
    fingerprint: str = ""


class BudgetInfo(_Section):
    text: str = ""
    unit: str = "parameters"
    limit: float | None = None
    realised: float | None = None


class SpaceInfo(_Section):
    n_slots: int | None = None
    n_params: int | None = None
    kinds: list[str] = []


class ModuleInfo(_Section):
    id: str
    kind: str
    size: int
    n_params: int | None = None
    paths: list[str] = []


class PlacementInfo(_Section):
    digest: str = ""
    n_modules: int | None = None
    n_params: int | None = None
    kinds: list[str] = []
    modules: list[ModuleInfo] = []


class MetricInfo(_Section):
    name: str = ""
    value: float | None = None
    all: dict[str, Any] = {}
    best_epoch: int | None = None
    reloaded: float | None = None


class SearchInfo(_Section):
    seconds: float | None = None
    steps: int | None = None
    rounds: int | None = None
    runs: int | None = None
    peak_memory_bytes: float | None = None


class TrainInfo(_Section):
    seconds: float | None = None
    steps: int | None = None
    epochs: float | None = None
    peak_memory_bytes: float | None = None
    curve: list[dict[str, Any]] = []


class BaselineInfo(TrainInfo):
    name: str
    n_params: int | None = None
    rank: int | None = None
    metric: MetricInfo = MetricInfo()


class UnitsInfo(_Section):
    before: int = 0
    kept: int = 0
    layers: dict[str, tuple[int, int]] = {}


class BaseInfo(_Section):
    method: str = ""
    stock: bool = True
    n_params_before: int | None = None
    n_params: int | None = None
    heads: UnitsInfo = UnitsInfo()
    neurons: UnitsInfo = UnitsInfo()


class Result(_Section):
    """result.json: what came out."""

    schema_version: int = 1
    prunepeft_version: str = ""
    command: str = ""
    created: str = ""
    method: str = ""
    seed: int | None = None
    task: TaskInfo = TaskInfo()
    model: ModelInfo = ModelInfo()
    data: DataInfo = DataInfo()
    budget: BudgetInfo = BudgetInfo()
    space: SpaceInfo = SpaceInfo()
    placement: PlacementInfo = PlacementInfo()
    base: BaseInfo | None = None
    head_params: int | None = None
    metric: MetricInfo = MetricInfo()
    search: SearchInfo = SearchInfo()
    train: TrainInfo = TrainInfo()
    baselines: list[BaselineInfo] = []
    environment: dict[str, Any] = {}


class Turn(_Section):
    turn: int = 1
    criterion: str
    removed: list[str] = []


class WarmUp(_Section):
    turns: list[Turn] = []
    tendency: dict[str, dict[str, float]] = {}
    runs: int | None = None
    runs_unshared: int | None = None


class Round(_Section):
    round: int
    cost_before: float | None = None
    cost_after: float | None = None
    saliency: dict[str, dict[str, float | None]] = {}
    probability: dict[str, float | None] = {}
    removed: list[str] = []
    seconds: float | None = None
    steps: int | None = None
    rows: int | None = None


class History(_Section):
    """history.json: the evidence of the search."""

    space: dict[str, Any] = {}
    partitions: dict[str, str] = {}
    warmup: WarmUp | None = None
    strategy: dict[str, list[str]] = {}
    rounds: list[Round] = []
    trials: list[dict[str, Any]] = []


@dataclass(frozen=True)
class Evidence:
    """Everything a report may say.

    Attributes:
        run: The run folder.
        result: What came out.
        kept: The placement of best/arch.json, if it is there.
        space: The supernet of the search, if the history holds it.
        history: The search's evidence; None for methods without a search.
        config: Text of config.yaml, or empty.
        data: Content of data.json, or empty.
        adapter_type: `peft_type` of the trained adapter, or empty.
        base_class: Class of the base model, where peft has no task type for it.
    """

    run: Path
    result: Result
    kept: Placement | None = None
    space: Placement | None = None
    history: History | None = None
    config: str = ""
    data: Mapping[str, Any] = field(default_factory=dict)
    adapter_type: str = ""
    base_class: str = ""


def read_evidence(run: Path) -> Evidence:
    """Read the JSON files of a run folder.

    Raises:
        StateError: if there is no result yet.
        CheckpointError: if a file is damaged.
    """
    if not (run / "result.json").is_file():
        raise StateError(
            f"{run} holds no result.json, so there is nothing to report yet. Give the folder of a "
            "finished run, or run the same search or train command again: it resumes and finishes."
        )
    file = run / "history.json"
    history = parse(History, read_json(file), file) if file.is_file() else None
    adapter = _read_mapping(run / "best" / "adapter" / "adapter_config.json")
    mapping = adapter.get("auto_mapping")
    return Evidence(
        run=run,
        result=parse(Result, read_json(run / "result.json"), run / "result.json"),
        kept=read_placement(run / "best" / "arch.json"),
        space=parse_placement(history.space, file) if history and history.space else None,
        history=history,
        config=_read_config(run / "config.yaml"),
        data=_read_mapping(run / "data.json"),
        adapter_type=_name(adapter.get("peft_type")),
        base_class=_name(mapping.get("base_model_class")) if isinstance(mapping, Mapping) else "",
    )


def read_json(path: Path) -> Any:
    """Parse a JSON file. Raises CheckpointError if it is missing, too large or not JSON."""
    if path.is_file() and path.stat().st_size > MAX_BYTES:
        raise CheckpointError(
            f"{path} is larger than {MAX_BYTES} bytes, so prunepeft did not write it. Restore it "
            "from a copy, or run the command that wrote it again."
        )
    return state.read_json(path)


def parse(cls: type[_Model], data: Any, source: Path | str) -> _Model:
    """Check data against a model. Raises CheckpointError that names the file and the bad key."""
    try:
        return cls.model_validate(data)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"])[:120] or "the top level"
        raise CheckpointError(
            f"{source}: {where}: {first['msg']}. The file is damaged or was written by another "
            "program; run the command that wrote it again."
        ) from error


def read_placement(path: Path) -> Placement | None:
    """The placement of an arch.json; None if there is no such file."""
    return parse_placement(read_json(path), path) if path.is_file() else None


def parse_placement(data: Any, source: Path | str) -> Placement:
    """Read a placement strictly. Raises CheckpointError that names the file."""
    try:
        return Placement.from_dict(data)
    except (ConfigError, TypeError) as error:
        raise CheckpointError(f"{source} does not hold a valid placement: {error}") from error


def _read_config(path: Path) -> str:
    if not path.is_file():
        return ""
    text = path.read_bytes()[: 4 * MAX_CONFIG_CHARS].decode("utf-8", errors="replace")
    return text if len(text) <= MAX_CONFIG_CHARS else text[:MAX_CONFIG_CHARS] + "\n# (cut here)"


def _read_mapping(path: Path) -> Mapping[str, Any]:
    data = read_json(path) if path.is_file() else {}
    return data if isinstance(data, Mapping) else {}


def _name(value: Any) -> str:
    """A name that can stand in code, or empty."""
    return value if isinstance(value, str) and value.isascii() and value.isidentifier() else ""
