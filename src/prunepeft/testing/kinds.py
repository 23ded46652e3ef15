"""Checks that every kind must pass on every model; the author of a new kind runs them too."""

import copy
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.testing import assert_close

from prunepeft.errors import ConfigError
from prunepeft.kinds import count_params, make_kind, n_params, seeded
from prunepeft.sites import find_sites
from prunepeft.space import Placement, Site, Slot
from prunepeft.supernet import (
    attach,
    detach,
    gate_slots,
    placement_of,
    remove_slots,
    shrink_slot,
    slot_layers,
    slot_parameters,
)
from prunepeft.testing.host import double_host


@dataclass(frozen=True)
class KindContract:
    """Checks of one kind on one model, with a module on every site that can carry it.

    Each check works on its own copy of the model and raises AssertionError where the kind fails.
    `run()` does all of them; `checks()` names them for a parametrised test.

    Attributes:
        kind: Registered name.
        model: A model in eval mode; it is left as it is.
        inputs: Keyword arguments of its forward pass.
        size: Size of every module (1 for kinds without a size).
        options: Options of the kind.
        starts_as_identity: Whether a fresh module changes nothing.
        constants: Tensors whose gradient leaves out a term on purpose; no finite differences there.
        atol: Largest difference of merged and shrunk outputs in float32.

    Example:
        >>> KindContract("lora", model, inputs).run()  # doctest: +SKIP
    """

    kind: str
    model: nn.Module
    inputs: Mapping[str, Tensor]
    size: int = 4
    options: Mapping[str, Any] = field(default_factory=dict)
    starts_as_identity: bool = True
    constants: tuple[str, ...] = ()
    atol: float = 1e-5

    @classmethod
    def checks(cls) -> tuple[str, ...]:
        """Names of all checks, in the order of the file."""
        return tuple(n.removeprefix("check_") for n in vars(cls) if n.startswith("check_"))

    def run(self, *names: str) -> None:
        """Run the checks of these names; without names, all."""
        for name in names or self.checks():
            getattr(self, f"check_{name}")()

    # --- values ----------------------------------------------------------------------------

    def check_identity_at_start(self) -> None:
        base = self._base()
        expected = self._output(base)
        found = self._output(self._attached(base))
        same = torch.allclose(found, expected, rtol=0, atol=1e-6)
        assert same == self.starts_as_identity, f"a fresh {self.kind} is identity: {same}"

    def check_perturbed_changes_output(self) -> None:
        base = self._base()
        expected = self._output(base)
        change = (self._output(self._perturbed(base)) - expected).abs().max()
        assert change > 1e-5 * expected.abs().max(), f"{self.kind} changes only {change:.1e}"

    def check_closed_form_count(self) -> None:
        self._assert_counts(self._attached())

    def check_same_seed_same_values(self) -> None:
        first, second = (slot_parameters(self._attached()) for _ in range(2))
        assert_close(first, second, rtol=0, atol=0)

    def check_gradient_of_delta(self) -> None:
        slot = next(iter(self._placement()))
        site, kind = slot.sites[0], make_kind(self.kind, self.options)
        draw = seeded(0, "gradient")
        stages = kind.stages(site)
        host, x, y = double_host(site, draw)
        fresh = kind.init(kind.shapes(site, slot.sizes[-1]), host, draw)
        noise = {k: torch.randn(v.shape, generator=draw) for k, v in fresh.items()}
        params = {k: (v + 0.3 * noise[k]).double() for k, v in fresh.items()}
        free = [k for k in params if k not in self.constants]

        def delta(*values: Tensor) -> Tensor:
            now = params | dict(zip(free, values[:-2], strict=True))
            scaling = kind.scaling(slot.sizes[-1])
            found = [
                kind.delta(now, values[-2], values[-2 if s == "input" else -1], scaling, host, s)
                for s in stages
            ]
            return torch.cat([f.flatten() for f in found])

        leaves = [t.requires_grad_() for t in (*(params[k] for k in free), x, y)]
        assert torch.autograd.gradcheck(delta, leaves)

    # --- structure -------------------------------------------------------------------------

    def check_removal_restores_the_model(self) -> None:
        base = self._base()
        before, layers = copy.deepcopy(base.state_dict()), _layer_types(base)
        trainable = [n for n, p in base.named_parameters() if p.requires_grad]
        expected = self._output(base)
        restored = detach(self._perturbed(base))
        assert restored is base
        assert _layer_types(base) == layers
        assert [n for n, p in base.named_parameters() if p.requires_grad] == trainable
        assert_close(base.state_dict(), before, rtol=0, atol=0)
        assert_close(self._output(base), expected, rtol=0, atol=0)
        assert not any(m._forward_pre_hooks or m._forward_hooks for m in base.modules())

    def check_gate_zero_is_removed(self) -> None:
        gated, removed = self._perturbed(), self._perturbed()
        some = placement_of(gated).ids[::2]
        gate_slots(gated, dict.fromkeys(some, 0.0))
        remove_slots(removed, some)
        assert not set(some) & set(slot_parameters(removed))
        assert_close(self._output(gated), self._output(removed), rtol=0, atol=1e-6)

    def check_removed_is_absent(self) -> None:
        removed = self._perturbed()
        some = placement_of(removed).ids[::2]
        remove_slots(removed, some)
        absent = self._perturbed(placement=self._placement().without(some))
        assert_close(self._output(removed), self._output(absent), rtol=0, atol=0)
        remove_slots(removed, placement_of(removed).ids)
        assert_close(self._output(removed), self._output(self._base()), rtol=0, atol=0)

    def check_shrinking_is_masking(self) -> None:
        kind = make_kind(self.kind, self.options)
        cut, masked = self._perturbed(), self._perturbed()
        slot_id = placement_of(cut).ids[-1]
        if not kind.shrink_axes:
            self._refuses(lambda: shrink_slot(cut, slot_id, torch.tensor([0])))
            return
        keep = torch.arange(0, self.size, 2)
        gone = torch.tensor([i for i in range(self.size) if i not in keep])
        shrink_slot(cut, slot_id, keep)
        for layer, name in slot_layers(masked)[slot_id]:
            if "attention" in kind.stages(layer.branches["default"][name].site):
                # A token of zeros still takes attention away from the others.
                mask = torch.ones(self.size).index_fill(0, gone, 0.0)
                layer.branches["default"][name].gate = mask
                continue
            for tensor, parameter in layer.params("default", name).items():
                for axis in kind.rank_axes(tensor, parameter):
                    parameter.data.index_fill_(axis, gone, 0.0)
        self._close(self._output(cut), self._output(masked))
        self._assert_counts(cut)

    def check_save_and_load(self) -> None:
        net = self._perturbed()
        remove_slots(net, placement_of(net).ids[:1])
        if make_kind(self.kind, self.options).shrink_axes:
            shrink_slot(net, placement_of(net).ids[0], torch.arange(1, self.size))
        with tempfile.TemporaryDirectory() as folder:
            net.save_pretrained(folder)
            loaded = PeftModel.from_pretrained(self._base(), folder).eval()
        assert placement_of(loaded) == placement_of(net)
        assert_close(self._output(loaded), self._output(net), rtol=0, atol=0)

    def check_merging(self) -> None:
        base = self._base()
        before = copy.deepcopy(base.state_dict())
        net = self._perturbed(base)
        expected = self._output(net)
        if not make_kind(self.kind, self.options).mergeable:
            self._refuses(net.merge_adapter)
            assert_close(self._output(net), expected, rtol=0, atol=0)
            return
        net.merge_adapter()
        self._close(self._output(net), expected)
        net.unmerge_adapter()
        assert_close(self._output(net), expected, rtol=0, atol=0)
        self._close(self._output(copy.deepcopy(net).merge_and_unload()), expected)
        assert_close(detach(net).state_dict(), before, rtol=0, atol=0)

    # --- precision and memory --------------------------------------------------------------

    def check_bfloat16(self) -> None:
        base = self._base().to(torch.bfloat16)
        inputs = _cast(self.inputs, torch.bfloat16)
        expected = self._output(base, inputs)
        net = self._attached(base)
        if self.starts_as_identity:
            assert_close(self._output(net, inputs), expected, rtol=0, atol=0)
        _perturb(net)
        output = _logits(net(**inputs))
        assert output.isfinite().all()
        output.float().square().mean().backward()
        gradients = [p.grad for ps in slot_parameters(net).values() for p in ps.values()]
        assert all(g is not None and g.isfinite().all() for g in gradients)

    def check_gradient_checkpointing(self) -> None:
        plain, saving = self._perturbed(), self._perturbed()
        saving.gradient_checkpointing_enable({"use_reentrant": False})
        expected, found = self._gradients(plain), self._gradients(saving)
        assert any(g.abs().max() > 0 for g in expected.values())
        assert_close(found, expected, rtol=1e-4, atol=1e-6)

    # --- tools -----------------------------------------------------------------------------

    def _base(self) -> nn.Module:
        return copy.deepcopy(self.model).eval()

    def _placement(self) -> Placement:
        """One slot for every role of a feed-forward, one tied over all sites of every attention."""
        made = make_kind(self.kind, self.options)
        size = self.size if made.sized else 1
        homes: dict[tuple[Any, ...], list[Site]] = {}
        for site in find_sites(self.model):
            if made.fits(site):
                own = (site.role,) if site.block == "ffn" else ()
                homes.setdefault((site.stack, site.layer, site.block, *own), []).append(site)
        options = tuple(sorted(self.options.items()))
        slots = [Slot(tuple(sites), self.kind, (size,), options) for sites in homes.values()]
        return Placement(dict.fromkeys(slots, size))

    def _attached(
        self, base: nn.Module | None = None, placement: Placement | None = None
    ) -> PeftModel:
        base = self._base() if base is None else base
        return attach(base, placement or self._placement(), seed=0).eval()

    def _perturbed(
        self, base: nn.Module | None = None, placement: Placement | None = None
    ) -> PeftModel:
        net = self._attached(base, placement)
        _perturb(net)
        return net

    def _output(self, net: nn.Module, inputs: Mapping[str, Tensor] | None = None) -> Tensor:
        with torch.no_grad():
            return _logits(net(**(self.inputs if inputs is None else inputs)))

    def _gradients(self, net: PeftModel) -> dict[str, Tensor]:
        net.train()
        torch.manual_seed(0)  # both models draw the same dropout masks
        _logits(net(**self.inputs)).square().mean().backward()
        found = {n: p for ps in slot_parameters(net).values() for n, p in ps.items()}
        assert all(p.grad is not None for p in found.values())
        return {n: p.grad for n, p in found.items()}

    def _assert_counts(self, net: PeftModel) -> None:
        placement = placement_of(net)
        counted = {k: sum(p.numel() for p in ps.values()) for k, ps in slot_parameters(net).items()}
        assert counted == {s.id: n_params(s, size) for s, size in placement.sizes.items()}
        trainable = sum(p.numel() for p in net.parameters() if p.requires_grad)
        assert trainable == count_params(placement)

    def _refuses(self, call: Callable[[], object]) -> None:
        message = ""
        try:
            call()
        except ConfigError as error:
            message = str(error)
        assert self.kind in message, f"{self.kind} cannot do this and must say so; got {message!r}"

    def _close(self, found: Tensor, expected: Tensor) -> None:
        assert_close(found, expected, rtol=0, atol=self.atol)


def _logits(output: Any) -> Tensor:
    return output.logits if hasattr(output, "logits") else output.last_hidden_state


def _perturb(net: PeftModel) -> None:
    """Add noise that depends on a tensor's name alone, so that equal tensors stay equal."""
    for parameters in slot_parameters(net).values():
        for name, parameter in parameters.items():
            noise = torch.randn(parameter.shape, generator=seeded(0, name))
            parameter.data += 0.1 * noise.to(parameter)


def _layer_types(model: nn.Module) -> dict[str, type]:
    return {name: type(module) for name, module in model.named_modules()}


def _cast(inputs: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}
