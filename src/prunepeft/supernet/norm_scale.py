"""How a normalisation layer stores its scale: as its weight, or as the weight's distance from 1."""

import torch
from torch import Tensor, nn

from prunepeft.errors import ConfigError


def scale_offset(norm: nn.Module) -> float:
    """Return the c of a normalisation layer whose scale is c + weight: 1 in gemma, 0 in most.

    It is found by running the layer with the weights zero and one, so that no class has to be
    known by name.

    Raises:
        ConfigError: if the scale is neither weight nor 1 + weight.
    """
    own = dict(norm.named_parameters(recurse=False))
    probe = torch.linspace(-1, 1, norm.weight.numel(), device=norm.weight.device)[None]

    def run(scale: float) -> Tensor:
        values = {k: torch.zeros_like(p, dtype=torch.float32) for k, p in own.items()}
        values["weight"] += scale
        return torch.func.functional_call(norm, values, (probe,))

    with torch.no_grad():
        at_zero, at_one = run(0.0), run(1.0)
    for offset in (0.0, 1.0):
        if torch.allclose(at_zero, offset * (at_one - at_zero), rtol=0, atol=1e-5):
            return offset
    raise ConfigError(
        f"{type(norm).__name__} scales by neither its weight nor 1 + weight, so nothing can be "
        "merged into it; keep the adapter as it is, or leave this layer without a module."
    )
