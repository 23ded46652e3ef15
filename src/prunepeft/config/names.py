"""Names that can be checked before anything heavy is imported.

The registries are the truth; a test holds these tuples to them. Names that other packages
register are found through their entry points, without loading the packages.
"""

from collections.abc import Mapping
from importlib.metadata import entry_points

from prunepeft.errors import UnknownNameError
from prunepeft.registry import unknown_name

KIND_NAMES = (
    "lora",
    "dora",
    "ia3",
    "serial_adapter",
    "parallel_adapter",
    "low_rank_adapter",
    "ether",
    "ether_plus",
    "ssl",
    "ssb",
    "alore",
    "loretta_adp",
    "loretta_rep",
    "prefix",
    "bitfit",
    "lnfit",
)
# Unions of the literature, written as one name among the kinds.
KIND_PRESETS = {
    "mam": ("prefix", "parallel_adapter"),  # He et al., 2021, arXiv 2110.04366
    "unipelt": ("lora", "prefix", "serial_adapter"),  # Mao et al., 2021, arXiv 2110.07577
    # Chang et al., 2024, arXiv 2410.09079: its two search spaces
    "bipeft-s1": ("lora", "low_rank_adapter", "bitfit", "lnfit"),
    "bipeft-s2": ("serial_adapter", "parallel_adapter", "prefix"),
}
PAPER_CRITERION_NAMES = (
    "minimum_weight",
    "zeros",
    "threshold",
    "activation",
    "snip",
    "gradient",
)
CRITERION_NAMES = (
    *PAPER_CRITERION_NAMES,
    "snip_mean",
    "gradient_mean",
    "threshold_relative",
    "ist",
)
METHOD_NAMES = (
    "prunepeft",
    "light-peft",
    "autopeft",
    "smam",
    "s3delta",
    "bipeft",
    "random",
    "asha",
    "evolution",
    "eva",
    "gora",
    "fisher",
    "lora_drop",
    "kappatune",
    "adalora",
)
# How the frozen model is made smaller: trained masks, or criteria on a gradual schedule.
BASE_METHOD_NAMES = (
    "light-peft",
    "loraprune",
    "magnitude",
    "wanda",
    "taylor",
    "salience",
    "random",
)
TASK_NAMES = ("seq-cls", "regression", "causal-lm", "image-cls")
# Label -> names built in and entry point group of further ones.
_KNOWN: Mapping[str, tuple[tuple[str, ...], str]] = {
    "kind": (KIND_NAMES, "prunepeft.kinds"),
    "criterion": (CRITERION_NAMES, "prunepeft.criteria"),
    "method": (METHOD_NAMES, "prunepeft.methods"),
    "base method": (BASE_METHOD_NAMES, "prunepeft.base_criteria"),
    "task": (TASK_NAMES, "prunepeft.tasks"),
}


def expand_presets(kinds: object) -> object:
    """Replace presets in a list of kinds by what they stand for; anything else stays.

    Example:
        >>> expand_presets(["mam", "ia3"])
        ['prefix', 'parallel_adapter', 'ia3']
    """
    if not isinstance(kinds, list):
        return kinds
    expanded = [KIND_PRESETS.get(k, (k,)) if isinstance(k, str) else (k,) for k in kinds]
    return [kind for group in expanded for kind in group]


def check_name(label: str, name: str) -> str:
    """Return `name` if it is built in or announced by another package.

    Raises:
        UnknownNameError: naming the closest known one.
    Example:
        >>> check_name("kind", "dora")
        'dora'
    """
    known, group = _KNOWN[label]
    if name not in known:
        known += tuple(point.name for point in entry_points(group=group))
    if name not in known:
        raise UnknownNameError(unknown_name(label, name, known))
    return name
