"""Checks of a kind on a base model that loses heads and neurons; authors of kinds run them too."""

import copy
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.testing import assert_close

from prunepeft.candidates import make_space
from prunepeft.errors import ConfigError
from prunepeft.kinds import count_params, make_kind, n_params, seeded
from prunepeft.sites import find_sites
from prunepeft.space import Placement, Site, Slot
from prunepeft.structured import Cut, Masks, apply_cut, find_groups
from prunepeft.supernet import attach, detach, placement_of, slot_layers, slot_parameters
from prunepeft.supernet.cutting import cut_layer
from prunepeft.supernet.layer import UnionLayer


@dataclass(frozen=True)
class CutContract:
    """Checks that a cut changes no output, with modules of one kind or of several.

    Each check works on its own copy of the model and raises AssertionError where a kind fails.
    `run()` does all of them; `checks()` names them for a parametrised test.

    Attributes:
        kinds: Registered names.
        model: A plain model in eval mode with known heads and neurons; it is left as it is.
        inputs: Keyword arguments of its forward pass.
        size: Size of every module (1 for kinds without a size).
        options: Kind -> its options.
        roles: Kind -> groups of roles, for the whole model; the kind's own if not given.
        atol: Largest difference of outputs in float32.

    Example:
        >>> CutContract(("lora",), model, inputs).run()  # doctest: +SKIP
    """

    kinds: tuple[str, ...]
    model: nn.Module
    inputs: Mapping[str, Tensor]
    size: int = 4
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    roles: Mapping[str, tuple[tuple[str, ...], ...]] = field(default_factory=dict)
    atol: float = 1e-5

    @classmethod
    def checks(cls) -> tuple[str, ...]:
        """Names of all checks, in the order of the file."""
        return tuple(n.removeprefix("check_") for n in vars(cls) if n.startswith("check_"))

    def run(self, *names: str) -> None:
        """Run the checks of these names; without names, all."""
        for name in names or self.checks():
            getattr(self, f"check_{name}")()

    # --- one layer after the other ---------------------------------------------------------

    def check_layers_lose_outputs(self) -> None:
        self._check_layers("out")

    def check_layers_lose_inputs(self) -> None:
        self._check_layers("in")

    # --- the whole model -------------------------------------------------------------------

    def check_masked_is_cut(self) -> None:
        for what in (("heads",), ("neurons",), ("heads", "neurons")):
            net, expected = self._cut_net(what)
            assert_close(self._output(net), expected, rtol=0, atol=self.atol)
            self._assert_counts(net)

    def check_layer_without_neurons(self) -> None:
        net, expected = self._cut_net(("neurons",), empty=True)
        assert_close(self._output(net), expected, rtol=0, atol=self.atol)
        self._assert_counts(net)

    def check_saved_and_loaded(self) -> None:
        net, _ = self._cut_net(("heads", "neurons"), empty=True)
        expected = self._output(net)
        with tempfile.TemporaryDirectory() as folder:
            net.save_pretrained(folder)
            loaded = PeftModel.from_pretrained(detach(net), folder).eval()
        assert_close(self._output(loaded), expected, rtol=0, atol=1e-6)

    def check_trains_on(self) -> None:
        net, _ = self._cut_net(("heads", "neurons"))
        with torch.enable_grad():
            _logits(net(**self.inputs)).square().mean().backward()
        found = {n: p.grad for ps in slot_parameters(net).values() for n, p in ps.items()}
        assert all(g is not None and g.isfinite().all() for g in found.values())

    def check_same_again(self) -> None:
        first, second = (self._cut_net(("heads", "neurons"))[0].state_dict() for _ in range(2))
        assert_close(first, second, rtol=0, atol=0)

    # --- tools -----------------------------------------------------------------------------

    def _check_layers(self, side: str) -> None:
        """Cut every second feature of each layer of the first block that carries a module."""
        placement = self._everywhere()
        if not len(placement):  # kinds of norms and of attentions
            return
        net = self._net(placement)
        for path in dict.fromkeys(slot.sites[0].path for slot in placement):
            layer = net.base_model.model.get_submodule(path)
            site = next(iter(layer.branches["default"].values())).site
            draw = seeded(0, path)
            x = torch.randn(2, 3, site.d_in, generator=draw)
            source = torch.randn(2, 3, site.d_out, generator=draw)
            keep = torch.arange(0, site.d_in if side == "in" else site.d_out, 2)
            rows, cols = (None, keep) if side == "in" else (keep, None)
            if cols is not None:
                x = x * torch.zeros(site.d_in).index_fill(0, cols, 1.0)
            expected = _layer_output(layer, x, source)
            if not self._can_be_cut(layer, side):
                self._refuses(net, path, layer, rows, cols)
                assert_close(_layer_output(layer, x, source), expected, rtol=0, atol=0)
                continue
            cut_layer(net, path, layer, rows, cols)
            after = net.base_model.model.get_submodule(path)
            found = _layer_output(after, x if cols is None else x[..., cols], source)
            expected = expected if rows is None else expected[..., rows]
            assert_close(found, expected, rtol=0, atol=self.atol)
        self._assert_counts(net)

    def _can_be_cut(self, layer: UnionLayer, side: str) -> bool:
        branches = layer.branches["default"].values()
        return all(
            b.kind.mergeable or b.kind.feature_axes(b.site, side) is not None for b in branches
        )

    def _refuses(self, net: PeftModel, path: str, layer: UnionLayer, *kept: Tensor | None) -> None:
        message = ""
        try:
            cut_layer(net, path, layer, *kept)
        except ConfigError as error:
            message = str(error)
        assert any(kind in message for kind in self.kinds), f"{path} cannot be cut; got {message!r}"

    def _everywhere(self) -> Placement:
        """A module of every kind on each linear layer of the first blocks that can carry it."""
        sites = [s for s in find_sites(self.model) if s.layer == 0 and s.role != "norm"]
        slots = [
            Slot((site,), kind, (self._size(kind),), self._pairs(kind))
            for kind in self.kinds
            for site in sites
            if self._made(kind).fits(site) and self._acts_at_layer(kind, site)
        ]
        return Placement({slot: slot.sizes[-1] for slot in slots})

    def _acts_at_layer(self, kind: str, site: Site) -> bool:
        return "attention" not in self._made(kind).stages(site)

    def _usual(self) -> Placement:
        return make_space(
            find_sites(self.model),
            self.kinds,
            sizes={k: self.size for k in self.kinds if self._made(k).sized},
            options=self.options,
            roles=self.roles,
        ).full()

    def _made(self, kind: str) -> Any:
        return make_kind(kind, self.options.get(kind, {}))

    def _size(self, kind: str) -> int:
        return self.size if self._made(kind).sized else 1

    def _pairs(self, kind: str) -> tuple[tuple[str, Any], ...]:
        return tuple(sorted(self.options.get(kind, {}).items()))

    def _net(self, placement: Placement) -> PeftModel:
        net = attach(copy.deepcopy(self.model), placement, seed=0).eval()
        for parameters in slot_parameters(net).values():
            for name, parameter in parameters.items():
                noise = torch.randn(parameter.shape, generator=seeded(0, name))
                parameter.data += 0.1 * noise.to(parameter)
        return net

    def _cut_net(self, what: tuple[str, ...], *, empty: bool = False) -> tuple[PeftModel, Tensor]:
        """The cut model with perturbed modules, and what it gave while masks hid the same."""
        groups = find_groups(self.model)
        keep = {
            g.id: tuple(range(1, g.n_units)) if g.what == "heads" else tuple(range(0, g.n_units, 2))
            for g in groups
            if g.what in what
        }
        if empty:
            keep[next(g.id for g in groups if g.what == "neurons")] = ()
        cut = Cut(keep, {g.id: g.n_units for g in groups if g.id in keep})
        net = self._net(self._usual())
        masks = Masks(net, groups)
        masks.show(cut)
        expected = self._output(net)
        masks.remove()
        apply_cut(net, groups, cut)
        return net, expected

    def _output(self, net: nn.Module) -> Tensor:
        with torch.no_grad():
            return _logits(net(**self.inputs))

    def _assert_counts(self, net: PeftModel) -> None:
        placement = placement_of(net)
        counted = {k: sum(p.numel() for p in ps.values()) for k, ps in slot_parameters(net).items()}
        assert counted == {s.id: n_params(s, size) for s, size in placement.sizes.items()}
        assert sum(p.numel() for p in net.parameters() if p.requires_grad) == count_params(
            placement
        )
        for slot_id, layers in slot_layers(net).items():
            branches = [layer.branches["default"][kind] for layer, kind in layers]
            slot = next(s for s in placement if s.id == slot_id)
            assert tuple(b.site for b in branches) == slot.sites
            assert all(b.slot_id == slot_id for b in branches)


def _layer_output(layer: nn.Module, x: Tensor, source: Tensor) -> Tensor:
    if getattr(layer, "tap", None) is not None:
        layer.tap.value = source
    with torch.no_grad():
        return layer(x)


def _logits(output: Any) -> Tensor:
    return output.logits if hasattr(output, "logits") else output.last_hidden_state
