"""Everything that can be wrong with a comparison, said before anything is trained."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prunepeft.compare.comparison import Cell
from prunepeft.compare.settings import (
    PLAIN,
    changed_settings,
    is_black_box,
    reads,
    reads_strategy,
)
from prunepeft.config import RunConfig
from prunepeft.config.fields import LAST_SEED
from prunepeft.errors import ConfigError, UnknownNameError
from prunepeft.registry import unknown_name
from prunepeft.run import IGNORED_ON_RESUME
from prunepeft.state import RunFolder, read_json
from prunepeft.strategies import METHODS

COSTS = ("own", "equal", "both")
SETTINGS, COMPARISON = "settings.json", "compare.json"
_MAY_DIFFER = ("method", "seed", "baseline", *IGNORED_ON_RESUME)


def default_reference(methods: Sequence[str]) -> str:
    """prunepeft, else the first method that searches, else the first."""
    searching = [m for m in methods if m not in PLAIN]
    return "prunepeft" if "prunepeft" in methods else next(iter([*searching, *methods]), "")


def check_choice(methods: Sequence[str], seeds: Sequence[int], cost: str, reference: str) -> None:
    """Raise an error for methods, seeds, a cost or a reference that cannot be."""
    known = (*METHODS.names(), *PLAIN)
    for method in methods:
        if method not in known:
            raise UnknownNameError(unknown_name("method", method, known))
    if len(set(methods)) < 2 or len(set(methods)) < len(methods):
        raise ConfigError(
            f"methods are {', '.join(methods) or 'none'}; give two at least, each once, such as "
            "--methods prunepeft,random,lora-all."
        )
    if not seeds or len(set(seeds)) < len(seeds) or min(seeds) < 0 or max(seeds) > LAST_SEED:
        raise ConfigError(
            f"seeds are {', '.join(map(str, seeds)) or 'none'}; give whole numbers from 0 to "
            f"{LAST_SEED}, each once, such as --seeds 0,1,2."
        )
    if cost not in COSTS:
        raise ConfigError(f"cost is {cost!r}; use one of {', '.join(COSTS)}.")
    if reference not in methods:
        raise ConfigError(
            f"the reference {reference} is not among the methods ({', '.join(methods)}); add it to "
            "--methods or give one of them as --reference."
        )


def check_settings(config: RunConfig, methods: Sequence[str]) -> None:
    """Raise ConfigError for settings that no method reads, and for those of a single run."""
    if config.arch is not None or config.budget is None:
        raise ConfigError(
            "a comparison searches under a budget: give budget, for example 1%, and leave arch out."
        )
    if config.base_ratio and (plain := [m for m in methods if m in PLAIN]):
        raise ConfigError(
            f"base_ratio={config.base_ratio:g} cuts the base model, which a search then fits, and "
            f"{plain[0]} is plain LoRA fitted to the whole one. Run prune-base first and compare "
            f"on its base/, or leave {' and '.join(plain)} out."
        )
    if config.backend != "serial" and not any(is_black_box(method) for method in methods):
        raise ConfigError(
            f"backend={config.backend} runs trials side by side, and none of the methods "
            f"{', '.join(methods)} has any; leave it out, or add a black-box method such as random."
        )
    if config.strategy is not None and not any(reads_strategy(method) for method in methods):
        raise ConfigError(
            f"strategy={config.strategy} is read by none of the methods {', '.join(methods)}; "
            "leave it out."
        )
    for section, name in changed_settings(config):
        if not any(name in reads(method).get(section, ()) for method in methods):
            raise ConfigError(
                f"{section}.{name} is read by none of the methods {', '.join(methods)}; leave it "
                "out."
            )


def check_folder(output: Path, *, only_page: bool = False) -> None:
    """Raise ConfigError if the folder holds anything but a comparison, or one with its own runs."""
    if output.exists() and not output.is_dir():
        raise ConfigError(f"{output} is a file; give another --output.")
    names = {p.name for p in output.iterdir()} if output.is_dir() else set()
    if names - {".lock"} and not names & {SETTINGS, COMPARISON}:
        raise ConfigError(
            f"{output} is not empty and holds no comparison (it has {min(names)!r}); use an "
            "--output folder that is new or empty. Nothing was changed."
        )
    if only_page and SETTINGS in names:
        raise ConfigError(
            f"{output} holds a comparison with runs of its own, whose page would be lost; give "
            "another --output. Nothing was changed."
        )


def check_place(
    config: RunConfig, output: Path, reference: str, resume: str, overwrite: bool
) -> None:
    """Raise ConfigError if the folder holds other things, or a comparison with other settings."""
    check_folder(output)
    file = output / SETTINGS
    if not file.is_file() or overwrite:
        return
    if resume == "never":
        raise ConfigError(
            f"{output} holds a comparison already and resume is 'never'; use another --output, or "
            "--resume auto to go on."
        )
    before = {k: v for k, v in read_json(file).items() if k not in _MAY_DIFFER}
    before, now = _flat(before), _flat(settings_of(config, reference))
    names = [k for k in sorted({*before, *now}) if before.get(k) != now.get(k)]
    if names:
        listed = "; ".join(f"{k}: {before.get(k)!r} -> {now.get(k)!r}" for k in names[:10])
        raise ConfigError(
            f"{output} holds a comparison with other settings: {listed}. Use another --output for "
            "the new settings, or --overwrite to run everything again."
        )


def settings_of(config: RunConfig, reference: str) -> dict[str, Any]:
    """What all runs of a comparison share; methods and seeds may be added later."""
    shared = {k: v for k, v in config.to_dict().items() if k not in _MAY_DIFFER}
    return shared | {"reference": reference}


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= (
            _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
        )
    return flat


def check_same(runs: Sequence[RunFolder]) -> None:
    """Raise ConfigError unless all runs have one task, metric, budget, model and data."""
    seen: dict[str, tuple[Any, Path]] = {}
    for run in runs:
        result = read_json(run.result_file)
        facts = {
            "the task": result["task"]["name"],
            "the metric": result["metric"]["name"],
            "the budget": f"{result['budget']['limit']} {result['budget']['unit']}",
            "the size of the base model": result["model"]["n_params"],
            f"the data at seed {result['seed']}": result["data"]["fingerprint"],
            "training rows": result["task"]["n_train"],
            "validation rows": result["task"]["n_validation"],
            "batch_size": run.read_config()["train"]["batch_size"],
        }
        for name, value in facts.items():
            first, place = seen.setdefault(name, (value, run.path))
            if value != first:
                raise ConfigError(
                    f"{name} of {run.path} is {value}, that of {place} {first}; only runs of one "
                    "task under one budget compare. Leave one of them out."
                )


def check_once(cells: Sequence[Cell], reference: str) -> None:
    """Raise ConfigError unless there are two methods, and each seed of a method once."""
    methods = list(dict.fromkeys(cell.method for cell in cells))
    if len(methods) < 2 or reference not in methods:
        raise ConfigError(
            f"the {len(cells)} runs are of {', '.join(methods)}; give runs of two methods at "
            f"least, and as --reference one of them (got {reference or 'none'})."
        )
    places: dict[tuple[str, int], str] = {}
    for cell in cells:
        if (key := (cell.method, cell.seed)) in places:
            raise ConfigError(
                f"{places[key]} and {cell.run} are both of method {cell.method} with seed "
                f"{cell.seed}; give each seed of a method once."
            )
        places[key] = cell.run
