"""Makes the tuner known to peft without importing peft.

If peft is loaded already, the tuner is registered at once; else as soon as somebody imports peft.
"""

import importlib
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType


def install() -> None:
    """Register with peft now or when it is imported. Calling it again changes nothing."""
    if "peft" in sys.modules:
        _register()
    elif not any(isinstance(finder, _PeftWatcher) for finder in sys.meta_path):
        sys.meta_path.insert(0, _PeftWatcher())


def _register() -> None:
    # The tuner registers itself when its module runs. If that import is what brought peft in,
    # it is still going on and must not be entered a second time.
    if "prunepeft.supernet" not in sys.modules:
        importlib.import_module("prunepeft.supernet.tuner")


class _PeftWatcher(importlib.abc.MetaPathFinder):
    """Finds peft through the other finders, once, and wraps its loader."""

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None,
        target: ModuleType | None = None,
    ) -> importlib.machinery.ModuleSpec | None:
        """The spec of peft with a loader that registers the tuner; None for other modules."""
        if fullname != "peft":
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        specs = (finder.find_spec(fullname, path, target) for finder in others)
        spec = next((spec for spec in specs if spec is not None), None)
        if spec is not None and spec.loader is not None:
            spec.loader = _RegisteringLoader(spec.loader)
        return spec


class _RegisteringLoader(importlib.abc.Loader):
    """Behaves like the loader it wraps and registers the tuner after the module has run."""

    def __init__(self, wrapped: importlib.abc.Loader) -> None:
        self._wrapped = wrapped

    def __getattr__(self, name: str) -> object:
        return getattr(self._wrapped, name)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        """As the wrapped loader does."""
        return self._wrapped.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """Run peft, give it its own loader back, then register."""
        self._wrapped.exec_module(module)
        if module.__spec__ is not None:
            module.__spec__.loader = self._wrapped
        module.__loader__ = self._wrapped
        sys.meta_path[:] = [f for f in sys.meta_path if not isinstance(f, _PeftWatcher)]
        _register()
