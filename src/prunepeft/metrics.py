"""Quality measures: which way is better, for which tasks, and how they are computed."""

import math
from dataclasses import dataclass

import numpy as np

from prunepeft.errors import ConfigError, StateError
from prunepeft.registry import Registry


@dataclass(frozen=True)
class Metric:
    """A measure of quality on held-out rows.

    Args:
        name: Key in what a task computes.
        greater_is_better: Direction.
        tasks: Names of the tasks that compute it.
    """

    name: str
    greater_is_better: bool
    tasks: tuple[str, ...]


CLASSIFICATION = ("seq-cls", "image-cls")  # tasks with classes
METRICS: Registry[Metric] = Registry("metric")
for _metric in (
    Metric("accuracy", True, CLASSIFICATION),
    Metric("f1_macro", True, CLASSIFICATION),
    Metric("f1", True, CLASSIFICATION),
    Metric("matthews_correlation", True, CLASSIFICATION),
    Metric("pearson", True, ("regression",)),
    Metric("spearman", True, ("regression",)),
    Metric("mse", False, ("regression",)),
    Metric("perplexity", False, ("causal-lm",)),
):
    METRICS.register(_metric.name, _metric)

MAX_EXPONENT = 700.0  # exp of more overflows a double, and infinity is no JSON


def check_metric(name: str, task: str, n_labels: int | None = None) -> Metric:
    """Return a metric that a task computes.

    Args:
        name: Name of the metric.
        task: Name of the task.
        n_labels: Number of classes, if known.

    Raises:
        UnknownNameError: if there is no such metric.
        ConfigError: if the task does not compute it.
    """
    metric = METRICS.get(name)
    if task not in metric.tasks:
        allowed = ", ".join(known for known, item in METRICS if task in item.tasks)
        raise ConfigError(
            f"metric {name!r} belongs to task {', '.join(metric.tasks)}, not to {task}; "
            f"for {task} choose one of {allowed}."
        )
    if name == "f1" and n_labels not in (None, 2):
        raise ConfigError(
            f"metric 'f1' is for 2 classes and the data has {n_labels}; use f1_macro or accuracy."
        )
    return metric


def check_finite(values: np.ndarray) -> None:
    """Raise StateError if a prediction is not a finite number: training went astray."""
    bad = int(np.count_nonzero(~np.isfinite(values)))
    if bad:
        raise StateError(
            f"{bad} of {values.size} predictions are not finite numbers: training diverged. "
            "Lower the learning rate, or use precision fp32."
        )


def count_confusion(predicted: np.ndarray, labels: np.ndarray, n_classes: int) -> np.ndarray:
    """Count rows by true class (axis 0) and predicted class (axis 1), (C, C)."""
    index = labels.astype(np.int64) * n_classes + predicted.astype(np.int64)
    return np.bincount(index, minlength=n_classes**2).reshape(n_classes, n_classes)


def classification_metrics(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Compute accuracy, macro F1, Matthews correlation, and for two classes F1 of class 1.

    F1 of class c is 2 tp / (2 tp + fp + fn), averaged over the classes that occur or are predicted.
    Matthews correlation over C classes is cov(t, p) / sqrt(cov(t, t) cov(p, p)), and 0 if a side
    is constant.

    Args:
        logits: Scores, (N, C).
        labels: Class numbers, (N,).

    Raises:
        StateError: if a score is not finite.

    References:
        Gorodkin, Comparing two K-category assignments by a K-category correlation coefficient,
        2004. Differs from released code: none.
    """
    check_finite(logits)
    counts = count_confusion(logits.argmax(axis=-1), labels, logits.shape[-1]).astype(np.float64)
    n, hits = counts.sum(), np.diag(counts)
    true, predicted = counts.sum(axis=1), counts.sum(axis=0)
    occurs = true + predicted > 0
    f1 = 2 * hits[occurs] / (true + predicted)[occurs]
    covariance = hits.sum() * n - true @ predicted
    spread = math.sqrt((n**2 - true @ true) * (n**2 - predicted @ predicted))
    result = {
        "accuracy": float(hits.sum() / n),
        "f1_macro": float(f1.mean()),
        "matthews_correlation": float(covariance / spread) if spread else 0.0,
    }
    if len(true) == 2:
        both = true[1] + predicted[1]
        result["f1"] = float(2 * hits[1] / both) if both else 0.0
    return result


def correlation(x: np.ndarray, y: np.ndarray) -> float:
    """Pearson correlation of two vectors, (N,) each; 0 if one of them is constant.

    Example:
        >>> correlation(np.array([1.0, 2.0, 3.0]), np.array([2.0, 4.0, 6.0]))
        1.0
    """
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return 0.0
    x, y = x - x.mean(), y - y.mean()
    x, y = x / np.abs(x).max(), y / np.abs(y).max()  # so that squares of tiny numbers do not vanish
    return float(np.clip(x @ y / math.sqrt((x @ x) * (y @ y)), -1.0, 1.0))


def regression_metrics(predictions: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Compute Pearson and Spearman correlation and the mean squared error.

    Args:
        predictions: Predicted values, (N,) or (N, 1).
        labels: True values, (N,).

    Raises:
        StateError: if a prediction is not finite.
    """
    from scipy.stats import rankdata

    check_finite(predictions)
    x = predictions.reshape(len(labels)).astype(np.float64)
    y = labels.reshape(-1).astype(np.float64)
    return {
        "pearson": correlation(x, y),
        "spearman": correlation(rankdata(x), rankdata(y)),
        "mse": float(np.mean((x - y) ** 2)),
    }


def language_model_metrics(sums: np.ndarray) -> dict[str, float]:
    """Compute loss per token and perplexity = exp(loss).

    Args:
        sums: Sum of the negative log-likelihoods and number of tokens of each row, (N, 2).

    Raises:
        StateError: if a sum is not finite or no token counts.
    """
    check_finite(sums)
    total, n_tokens = sums.astype(np.float64).sum(axis=0)
    if n_tokens == 0:
        raise StateError("no token to judge the model on; check that rows have a completion.")
    loss = float(total / n_tokens)
    return {"perplexity": math.exp(min(loss, MAX_EXPONENT)), "loss": loss}
