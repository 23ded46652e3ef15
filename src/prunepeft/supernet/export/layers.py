"""Which layers an engine expects together: one type over all layers, and q/k/v, gate/up."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import replace

from torch import nn

from prunepeft.errors import SiteError
from prunepeft.sites import find_sites
from prunepeft.space import Site
from prunepeft.supernet.export.source import SavedAdapter

GROUPS = (frozenset({"q", "k", "v"}), frozenset({"gate", "up"}))
MAX_LAYERS = 4096


def layer_type(path: str) -> str:
    """The path with the index of the repeated block left open.

    Example:
        >>> layer_type("model.layers.3.self_attn.q_proj")
        'model.layers.*.self_attn.q_proj'
    """
    return re.sub(r"(^|\.)\d+(?=\.)", r"\1*", path, count=1)


def completed_sites(adapter: SavedAdapter, skeleton: nn.Module | None) -> list[Site] | None:
    """All sites of every type that occurs, and of the types computed together with it.

    Returns:
        Sites in the order of the model; None if the base model is needed to tell.
    """
    kept = list({m.site.path: m.site for m in adapter.modules}.values())
    if skeleton is not None:
        try:
            return _from_model(kept, find_sites(skeleton))
        except SiteError:
            pass
    return _from_kept(kept)


def in_every_layer(paths: Iterable[str], sites: Sequence[Site]) -> bool:
    """Whether every type of layer among the paths is among them in all layers."""
    paths = set(paths)
    types = {layer_type(path) for path in paths}
    return all(s.path in paths for s in sites if layer_type(s.path) in types)


def is_complete(paths: Iterable[str], sites: Sequence[Site]) -> bool:
    """Whether no group of layers computed together is adapted only in part."""
    paths = set(paths)
    for site in sites:
        if site.path in paths:
            friends = {s.path for s in sites if _group(s) == _group(site) is not None}
            if not friends <= paths:
                return False
    return True


def _from_model(kept: Sequence[Site], sites: Sequence[Site]) -> list[Site] | None:
    known = {s.path for s in sites}
    if any(s.path not in known for s in kept):
        return None
    types = {layer_type(s.path) for s in kept}
    groups = {_group(s, layer_type(s.path)) for s in kept} - {None}
    return [
        s for s in sites if layer_type(s.path) in types or _group(s, layer_type(s.path)) in groups
    ]


def _from_kept(kept: Sequence[Site]) -> list[Site] | None:
    """The same from the adapter alone; only if its layers are numbered as their sites are."""
    roles: dict[object, set[str]] = {}
    for site in kept:
        if (group := _group(site, layer_type(site.path))) is not None:
            roles.setdefault(group, set()).add(site.role)
        number = re.search(r"(?:^|\.)(\d+)(?=\.)", site.path)
        if number is None or int(number[1]) != site.layer or site.n_layers > MAX_LAYERS:
            return None
    if any(group[1] != frozenset(found) for group, found in roles.items()):
        return None
    sites = {}
    for site in kept:
        pattern = layer_type(site.path)
        for layer in range(site.n_layers):
            path = pattern.replace("*", str(layer), 1)
            sites[path] = replace(site, path=path, layer=layer, source="")
    return sorted(sites.values(), key=lambda s: (s.stack, s.layer))


def _group(site: Site, path: str | None = None) -> tuple[str, frozenset[str]] | None:
    """Where the site's group is and its roles; None for layers that stand alone."""
    parent = (path or site.path).rpartition(".")[0]
    return next(((parent, roles) for roles in GROUPS if site.role in roles), None)
