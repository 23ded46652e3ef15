"""Bayesian optimisation of two objectives, over the layer space: surrogate, acquisition, search.

BoTorch is imported when it is needed; it comes with an extra. All numbers are float64, and the
state of the global random generator stays as it was.
"""

import contextlib
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from prunepeft.errors import MissingExtraError
from prunepeft.pareto import Point, front
from prunepeft.strategies.choices import Vector
from prunepeft.strategies.copula import Copula
from prunepeft.strategies.layer_space import LayerSpace

logger = logging.getLogger(__name__)

NEEDS = {
    "map-saas": (("botorch",), "bo"),
    "nuts": (("botorch", "jax", "numpyro"), "nuts"),
    "gp": (("botorch",), "bo"),
}
TRIES = 2  # fits before random proposals
N_SAMPLES = 64  # Monte Carlo samples of the acquisition
N_STARTS = 10
MAX_EVALUATIONS = 2000  # of the acquisition, for one proposal
NUTS = {"warmup_steps": 128, "num_samples": 64, "thinning": 4, "max_tree_depth": 6}


def require(surrogate: str) -> None:
    """Raise MissingExtraError if the packages of a surrogate are not installed."""
    modules, extra = NEEDS[surrogate]
    missing = [name for name in modules if find_spec(name) is None]
    if missing:
        raise MissingExtraError(
            f"method autopeft with black_box.surrogate={surrogate} needs {', '.join(missing)}, "
            f'which is not installed. Install it: pip install "prunepeft[{extra}]".'
        )


def fit(surrogate: str, codes: Tensor, values: Tensor, seed: int) -> Any:
    """A Gaussian process of one objective, with its hyper-parameters fitted.

    - `map-saas`: four models, each with a sparsity of its own drawn from the prior of SAAS, at the
      most probable hyper-parameters; averaged.
    - `nuts`: 16 draws of the hyper-parameters of SAAS by Hamiltonian Monte Carlo.
    - `gp`: one Matern-5/2 kernel with the same length scale for all variables.

    Args:
        surrogate: One of `NEEDS`.
        codes: (N, D) in [0, 1].
        values: (N,), about standard normal.
        seed: Of everything random.
    """
    from botorch.fit import fit_fully_bayesian_model_nuts, fit_gpytorch_mll
    from botorch.models import SingleTaskGP
    from botorch.models.fully_bayesian import SaasFullyBayesianSingleTaskGP
    from botorch.models.map_saas import EnsembleMapSaasSingleTaskGP
    from gpytorch.kernels import MaternKernel, ScaleKernel
    from gpytorch.mlls import ExactMarginalLogLikelihood

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        data = (codes.double(), values.double().unsqueeze(-1))
        if surrogate == "nuts":
            model = SaasFullyBayesianSingleTaskGP(*data, outcome_transform=None)
            with _double_in_jax():
                fit_fully_bayesian_model_nuts(
                    model, disable_progbar=True, seed=seed % 2**31, **NUTS
                )
            return model
        if surrogate == "map-saas":
            model = EnsembleMapSaasSingleTaskGP(*data, outcome_transform=None)
        else:
            kernel = ScaleKernel(MaternKernel(nu=2.5))
            model = SingleTaskGP(*data, covar_module=kernel, outcome_transform=None)
        fit_gpytorch_mll(ExactMarginalLogLikelihood(model.likelihood, model))
        return model


@contextlib.contextmanager
def _double_in_jax() -> Iterator[None]:
    """JAX computes in float64 inside, where it rounds to float32 by default."""
    import jax

    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", True)
    try:
        yield
    finally:
        jax.config.update("jax_enable_x64", before)


def acquisition(
    model: Any,
    codes: Tensor,
    objective: Callable[[Tensor, Tensor], Tensor],
    reference: Tensor,
    seed: int,
) -> Any:
    """Log of the noisy expected hypervolume improvement, of points (B, 1, D) -> (B,).

    Args:
        model: Of the metric.
        codes: Points that were observed, (N, D).
        objective: Samples of the metric (..., Q, 1) and points X (..., Q, D) -> (..., Q, 2).
        reference: (2,).
        seed: Of the Monte Carlo samples.
    References:
        Daulton et al., 2021, arXiv 2105.08195; in logarithms: Ament et al., 2023, arXiv 2310.20708.
    """
    from botorch.acquisition.multi_objective.logei import qLogNoisyExpectedHypervolumeImprovement
    from botorch.acquisition.multi_objective.objective import GenericMCMultiOutputObjective
    from botorch.sampling import SobolQMCNormalSampler

    return qLogNoisyExpectedHypervolumeImprovement(
        model=model,
        ref_point=reference,
        X_baseline=codes,
        sampler=SobolQMCNormalSampler(torch.Size([N_SAMPLES]), seed=seed),
        objective=GenericMCMultiOutputObjective(objective),
        prune_baseline=True,
        cache_root=False,
    )


def climb(
    value: Callable[[list[Vector]], list[float]],
    starts: Sequence[Vector],
    neighbours: Callable[[Vector], list[Vector]],
    most: int = MAX_EVALUATIONS,
) -> Vector:
    """The best point that steepest ascent finds from several starts, which climb side by side.

    No point is evaluated twice, and at most about `most` are.

    Args:
        value: Of several points at once.
        starts: At least one.
        neighbours: Points one step away that may be taken.
        most: Evaluations at which it stops.
    """
    values: dict[Vector, float] = {}

    def evaluate(points: Sequence[Vector]) -> None:
        new = [p for p in dict.fromkeys(points) if p not in values]
        new = new[: max(0, most - len(values))]
        values.update(zip(new, value(new), strict=True) if new else ())

    evaluate(starts)
    climbing = [p for p in dict.fromkeys(starts) if p in values]
    while climbing and len(values) < most:
        around = {p: neighbours(p) for p in climbing}
        evaluate([q for near in around.values() for q in near])
        ends = []
        for point, near in around.items():
            best = max((q for q in near if q in values), key=values.__getitem__, default=point)
            ends += [best] if values[best] > values[point] else []
        climbing = list(dict.fromkeys(ends))
    return max(values, key=values.__getitem__)


def suggest(
    space: LayerSpace,
    observed: Mapping[Vector, Point],
    known: set[Vector],
    reference: Point,
    n: int,
    surrogate: str,
    generator: torch.Generator,
) -> list[Vector]:
    """Up to `n` new points, chosen one after the other; random ones if no surrogate can be fitted.

    The cost of a point is known, so only the metric has a surrogate.

    Args:
        space: The points.
        observed: Trials that did not fail -> (-cost in percent of the limit, metric); both are
            better when larger. At least two.
        known: Points that may not be proposed.
        reference: Of the hypervolume, on the scale of `observed`.
        n: Proposals.
        surrogate: One of `NEEDS`.
        generator: Of everything random.
    """
    from botorch.exceptions.errors import BotorchError, ModelFittingError

    failures = (RuntimeError, ValueError, ArithmeticError, BotorchError, ModelFittingError)
    for _ in range(TRIES):
        seed = int(torch.randint(2**31, (), generator=generator))
        state = generator.get_state()
        try:
            with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
                warnings.simplefilter("ignore")  # about jitter and line searches
                torch.manual_seed(seed)
                return _suggest(space, observed, known, reference, n, surrogate, generator, seed)
        except failures as error:
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            generator.set_state(state)
    logger.warning("no surrogate for %d trials (%s); proposing at random", len(observed), reason)
    return space.draw_new(n, known, generator)


def _suggest(
    space: LayerSpace,
    observed: Mapping[Vector, Point],
    known: set[Vector],
    reference: Point,
    n: int,
    surrogate: str,
    generator: torch.Generator,
    seed: int,
) -> list[Vector]:
    points, codes = list(observed), space.codes(list(observed))
    columns = torch.tensor(list(observed.values()), dtype=torch.float64).T
    of_cost, of_metric = Copula(columns[0]), Copula(columns[1])
    model = fit(surrogate, codes, of_metric(columns[1]), seed)

    at = columns.new_tensor(reference)
    at = torch.stack([of_cost(at[0]), of_metric(at[1])])
    gain = acquisition(model, codes, _with_cost(space, of_cost), at, seed)
    best = [points[i] for i in front(list(observed.values()))]
    chosen: list[Vector] = []
    for _ in range(n):
        taken = known | set(chosen)
        starts = _starts(space, best, taken, generator)
        if not starts:
            break
        if chosen:
            gain.set_X_pending(space.codes(chosen))

        def value(vectors: list[Vector]) -> list[float]:
            with torch.no_grad():
                parts = space.codes(vectors).unsqueeze(1).split(256)
                return torch.cat([gain(part) for part in parts]).tolist()

        def free(vector: Vector, taken: set[Vector] = taken) -> list[Vector]:
            return [v for v in space.neighbours(vector) if v not in taken]

        chosen.append(climb(value, starts, free))
    return chosen


def _with_cost(space: LayerSpace, of_cost: Copula) -> Callable[[Tensor, Tensor], Tensor]:
    """Both objectives from samples of the metric; see `acquisition`."""

    def objective(samples: Tensor, X: Tensor) -> Tensor:
        cost = of_cost(percent(space.costs_of(X), space.limit)).unsqueeze(-1)  # (..., Q, 1)
        while cost.ndim < samples.ndim - 1:  # the members of an ensemble come before Q
            cost = cost.unsqueeze(-3)
        return torch.cat([cost.expand_as(samples), samples], dim=-1)

    return objective


def _starts(
    space: LayerSpace, best: Sequence[Vector], taken: set[Vector], generator: torch.Generator
) -> list[Vector]:
    """Neighbours of points of the front, each point as likely; random points where these lack."""
    found: list[Vector] = []
    for _ in range(N_STARTS):
        point = best[int(torch.randint(len(best), (), generator=generator))]
        near = [v for v in space.neighbours(point) if v not in taken and v not in found]
        if near:
            found.append(near[int(torch.randint(len(near), (), generator=generator))])
    return found + space.draw_new(N_STARTS - len(found), taken | set(found), generator)


def percent(cost: Any, limit: int) -> Any:
    """The first objective: how much of the limit is used, in percent, with a minus."""
    return -100 * cost / limit
