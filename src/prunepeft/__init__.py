"""prunepeft: find out which PEFT modules a task needs under a budget, and train only those.

`import prunepeft` is light: names load their modules on first use. It also makes the tuner known
to peft, so that `PeftModel.from_pretrained` opens checkpoints of this package.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from prunepeft import _plugin
from prunepeft._version import __version__

if TYPE_CHECKING:
    from prunepeft.budget import Budget
    from prunepeft.callback import PruneCallback
    from prunepeft.candidates import make_space, place
    from prunepeft.criteria import CRITERIA
    from prunepeft.errors import PrunePeftError
    from prunepeft.kinds import KINDS
    from prunepeft.library import prune_base, search
    from prunepeft.sites import find_sites
    from prunepeft.space import Placement, SearchSpace, Site, Slot
    from prunepeft.sparse_tuning import IstCallback, IstSettings
    from prunepeft.strategies import METHODS
    from prunepeft.structured.opening import load_base, load_cut
    from prunepeft.supernet.attach import attach, detach, placement_of
    from prunepeft.supernet.export import export_adapter
    from prunepeft.supernet.tuner import UnionConfig

_WHERE = {
    "search": "prunepeft.library",
    "prune_base": "prunepeft.library",
    "find_sites": "prunepeft.sites",
    "make_space": "prunepeft.candidates",
    "place": "prunepeft.candidates",
    "attach": "prunepeft.supernet.attach",
    "detach": "prunepeft.supernet.attach",
    "placement_of": "prunepeft.supernet.attach",
    "export_adapter": "prunepeft.supernet.export",
    "load_base": "prunepeft.structured.opening",
    "load_cut": "prunepeft.structured.opening",
    "Budget": "prunepeft.budget",
    "Placement": "prunepeft.space",
    "SearchSpace": "prunepeft.space",
    "Site": "prunepeft.space",
    "Slot": "prunepeft.space",
    "UnionConfig": "prunepeft.supernet.tuner",
    "PruneCallback": "prunepeft.callback",
    "IstCallback": "prunepeft.sparse_tuning",
    "IstSettings": "prunepeft.sparse_tuning",
    "PrunePeftError": "prunepeft.errors",
    "KINDS": "prunepeft.kinds",
    "CRITERIA": "prunepeft.criteria",
    "METHODS": "prunepeft.strategies",
}

__all__ = [
    "search",
    "prune_base",
    "find_sites",
    "make_space",
    "place",
    "attach",
    "detach",
    "placement_of",
    "export_adapter",
    "load_base",
    "load_cut",
    "Budget",
    "Placement",
    "SearchSpace",
    "Site",
    "Slot",
    "UnionConfig",
    "PruneCallback",
    "IstCallback",
    "IstSettings",
    "PrunePeftError",
    "KINDS",
    "CRITERIA",
    "METHODS",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'prunepeft' has no attribute {name!r}")
    module, _, inner = _WHERE[name].partition(":")
    value = getattr(import_module(module), inner or name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


_plugin.install()
