"""What becomes of the frozen base model, checked before any weight is read: cut, or quantised."""

import copy
import logging
from collections.abc import Mapping, Sequence

from torch import nn
from transformers import PreTrainedModel

from prunepeft.config import RunConfig
from prunepeft.errors import ConfigError
from prunepeft.quantized import Storage, asked, require, stored
from prunepeft.sites import find_sites
from prunepeft.space import Site
from prunepeft.strategies import METHODS
from prunepeft.strategies.light_peft import THIRD
from prunepeft.structured.cut import Cut, check_ratio, n_removed
from prunepeft.structured.groups import Group, find_groups
from prunepeft.structured.surgery import apply_cut
from prunepeft.structured.widths import express

logger = logging.getLogger(__name__)


def plan_groups(config: RunConfig, model: nn.Module, *, cuts_base: bool) -> tuple[Group, ...]:
    """Groups of the base model that the run may cut; empty if it stays whole.

    Args:
        config: The settings.
        model: The base model without weights.
        cuts_base: Whether the method cuts the base by itself.
    Raises:
        ConfigError: if a ratio cannot be had, or the result could not be opened as asked for.
        SiteError: if nothing of the model is known to come apart.
    """
    if config.arch is not None or not (config.base_ratio or cuts_base):
        return ()
    if config.quantize != "none" or stored(model.config) is not None:
        raise ConfigError(
            f"the base model {config.model!r} is quantised, and its layers cannot be cut. Cut the "
            "full precision model first (prune-base without quantize), and quantise what is left: "
            "search with model=RUN/base and quantize=8bit or 4bit."
        )
    groups = find_groups(model)
    ratios = asked_ratios(config)
    if not config.base.heads:
        groups = tuple(g for g in groups if g.what != "heads")
    for what in dict.fromkeys(g.what for g in groups):
        if ratios[what] is not None:
            check_ratio(groups, what, ratios[what])
    return _stock_groups(config, model, groups, ratios) if config.base.stock else groups


def plan_storage(
    config: RunConfig,
    model: PreTrainedModel,
    head: Sequence[str],
) -> Storage | None:
    """How the base model is quantised in the run; None if it is not.

    Args:
        config: The settings.
        model: The base model without weights.
        head: Names of its modules that are trained in full.
    Raises:
        ConfigError: if the model is quantised on disk already, or the method needs plain weights.
        MissingExtraError: if bitsandbytes is not installed.
    """
    storage = stored(model.config)
    if config.quantize != "none":
        if storage is not None:
            raise ConfigError(
                f"quantize is {config.quantize}, but the base model {config.model!r} is held in "
                f"{storage.in_words}. Leave quantize out to use it so, or give the full precision "
                "model it was made from."
            )
        storage = asked(config.quantize, model, head)
    if storage is None:
        return None
    require(storage)
    method = METHODS.get(config.method)
    if method.reads_gradients and config.arch is None:
        raise ConfigError(
            f"method {method.name} needs gradients of the frozen weights, which a quantised base "
            "model does not have. Use another method, for example eva, or leave quantize out."
        )
    return storage


def asked_ratios(config: RunConfig) -> dict[str, float | None]:
    """The share of heads and of neurons that the settings ask for; None: a third, about."""
    own, ratio = config.light_peft, config.base_ratio or None
    asked = {"heads": own.head_ratio, "neurons": own.neuron_ratio}
    return {what: ratio if given is None else given for what, given in asked.items()}


def narrowed_sites(
    model: nn.Module, groups: Sequence[Group], ratios: Mapping[str, float]
) -> tuple[Site, ...]:
    """Sites of the base model as wide as they will be after the cut; the model stays as it is."""
    narrow = copy.deepcopy(model)
    apply_cut(narrow, groups, _first_units(groups, ratios))
    return find_sites(narrow)


def _stock_groups(
    config: RunConfig,
    model: nn.Module,
    groups: tuple[Group, ...],
    ratios: Mapping[str, float | None],
) -> tuple[Group, ...]:
    """The groups whose cut the stock config of the model can say."""
    left = groups
    for what in dict.fromkeys(g.what for g in groups):
        own = [g for g in groups if g.what == what]
        ratio = THIRD if ratios[what] is None else ratios[what]
        if not ratio or _can_say(model, groups, {what: ratio}):
            continue
        n = own[0].n_units
        sayable = [k / n for k in range(1, n) if _can_say(model, groups, {what: k / n})]
        is_asked = what == "neurons" or config.light_peft.head_ratio is not None
        if sayable or is_asked:
            raise ConfigError(_unsayable(model, what, ratio, sayable))
        left = tuple(g for g in left if g.what != what)
        logger.warning(
            "heads stay: the config of a stock %s cannot say fewer heads. base.stock=false cuts "
            "them too, for prunepeft.load_base.",
            type(model).__name__,
        )
    return left


def _unsayable(model: nn.Module, what: str, ratio: float, sayable: Sequence[float]) -> str:
    text = f"the config of a stock {type(model).__name__} cannot say that {ratio:.3g} of the {what}"
    text += " are gone"
    if sayable:
        nearest = sorted(sayable, key=lambda r: abs(r - ratio))[:3]
        text += f"; it can say {', '.join(f'{r:.4g}' for r in sorted(nearest))}"
    more = ", or keep all heads with base.heads=false" if what == "heads" else ""
    return f"{text}. Add base.stock=false, and open the result with prunepeft.load_base{more}."


def _can_say(model: nn.Module, groups: Sequence[Group], ratios: Mapping[str, float]) -> bool:
    return express(copy.deepcopy(model.config), groups, _first_units(groups, ratios))


def _first_units(groups: Sequence[Group], ratios: Mapping[str, float]) -> Cut:
    """A cut of these shares, whichever units they are."""
    kept = {
        g.id: tuple(range(g.n_units - min(n_removed(ratios[g.what], g.n_units), g.n_units - 1)))
        for g in groups
        if ratios.get(g.what)
    }
    return Cut(kept, {g.id: g.n_units for g in groups if g.id in kept})
