"""Names that can be checked before anything heavy is imported.

The registries are the truth; a test holds these tuples to them. Names that other packages
register are found through their entry points, without loading the packages.
"""

from collections.abc import Mapping
from importlib.metadata import entry_points

from prunepeft.errors import UnknownNameError
from prunepeft.registry import unknown_name

KIND_NAMES = ("lora", "dora", "ia3", "serial_adapter", "parallel_adapter")
PAPER_CRITERION_NAMES = (
    "minimum_weight",
    "zeros",
    "threshold",
    "activation",
    "snip",
    "gradient",
)
CRITERION_NAMES = (*PAPER_CRITERION_NAMES, "snip_mean", "gradient_mean", "threshold_relative")
METHOD_NAMES = ("prunepeft",)
TASK_NAMES = ("seq-cls", "regression", "causal-lm", "image-cls")
# Label -> names built in and entry point group of further ones.
_KNOWN: Mapping[str, tuple[tuple[str, ...], str]] = {
    "kind": (KIND_NAMES, "prunepeft.kinds"),
    "criterion": (CRITERION_NAMES, "prunepeft.criteria"),
    "method": (METHOD_NAMES, "prunepeft.methods"),
    "task": (TASK_NAMES, "prunepeft.tasks"),
}


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
