"""Metrics against numbers worked by hand and against scikit-learn."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from sklearn import metrics as sk

from prunepeft.errors import ConfigError, StateError, UnknownNameError
from prunepeft.metrics import (
    METRICS,
    check_metric,
    classification_metrics,
    correlation,
    language_model_metrics,
    regression_metrics,
)
from prunepeft.tasks import TASKS


def one_hot(predicted, n_classes):
    return np.eye(n_classes)[predicted]


def test_two_classes_by_hand():
    # tp 2, fp 1, fn 1, tn 1
    labels = np.array([1, 1, 1, 0, 0])
    result = classification_metrics(one_hot([1, 1, 0, 1, 0], 2), labels)
    assert result["accuracy"] == pytest.approx(3 / 5)
    assert result["f1"] == pytest.approx(2 * 2 / (2 * 2 + 1 + 1))
    assert result["f1_macro"] == pytest.approx((2 / 3 + 1 / 2) / 2)
    assert result["matthews_correlation"] == pytest.approx((2 * 1 - 1 * 1) / 6)


def test_more_classes_have_no_plain_f1():
    result = classification_metrics(one_hot([0, 1, 2], 3), np.array([0, 1, 2]))
    assert result == {"accuracy": 1.0, "f1_macro": 1.0, "matthews_correlation": 1.0}


@pytest.mark.parametrize("predicted", [0, 1])
def test_constant_predictions_give_zero_not_nan(predicted):
    result = classification_metrics(one_hot([predicted] * 4, 2), np.array([0, 0, 1, 1]))
    assert result["matthews_correlation"] == 0.0
    assert result["accuracy"] == 0.5


@pytest.mark.filterwarnings("ignore:A single label was found")
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=40))
def test_classification_agrees_with_scikit_learn(pairs):
    labels, predicted = (np.array(side) for side in zip(*pairs, strict=True))
    ours = classification_metrics(one_hot(predicted, 4), labels)
    assert ours["accuracy"] == pytest.approx(sk.accuracy_score(labels, predicted))
    macro = sk.f1_score(labels, predicted, average="macro", zero_division=0)
    assert ours["f1_macro"] == pytest.approx(macro)
    assert ours["matthews_correlation"] == pytest.approx(sk.matthews_corrcoef(labels, predicted))


def test_regression_by_hand():
    result = regression_metrics(np.array([[1.0], [2.0], [4.0]]), np.array([1.0, 3.0, 2.0]))
    # centred: (-4/3, -1/3, 5/3) and (-1, 1, 0); ranks (1, 2, 3) and (1, 3, 2)
    assert result["pearson"] == pytest.approx(1 / math.sqrt(42 / 9 * 2))
    assert result["spearman"] == pytest.approx(0.5)
    assert result["mse"] == pytest.approx((0 + 1 + 4) / 3)


def test_regression_agrees_with_scipy_with_ties():
    x = np.array([1.0, 1.0, 2.0, 5.0, 3.0])
    y = np.array([0.0, 1.0, 1.0, 2.0, 2.0])
    result = regression_metrics(x, y)
    assert result["pearson"] == pytest.approx(stats.pearsonr(x, y).statistic)
    assert result["spearman"] == pytest.approx(stats.spearmanr(x, y).statistic)


def test_constant_regression_is_zero_not_nan():
    result = regression_metrics(np.full(3, 0.1), np.array([1.0, 2.0, 3.0]))
    assert result["pearson"] == result["spearman"] == 0.0


def test_correlation_of_tiny_and_huge_numbers():
    y = np.array([1.0, 2.0, 3.0])
    assert correlation(1e-200 * y, y) == pytest.approx(1.0)
    assert correlation(1e200 * y, -y) == pytest.approx(-1.0)


def test_perplexity_weighs_tokens_not_rows():
    # 3 tokens with loss 1 and 1 token with loss 5: (3 + 5) / 4 = 2
    result = language_model_metrics(np.array([[3.0, 3.0], [5.0, 1.0]]))
    assert result["loss"] == pytest.approx(2.0)
    assert result["perplexity"] == pytest.approx(math.exp(2.0))


def test_perplexity_stays_finite():
    assert math.isfinite(language_model_metrics(np.array([[1e9, 1.0]]))["perplexity"])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize(
    "call",
    [
        lambda v: classification_metrics(np.array([[v, 0.0]]), np.array([0])),
        lambda v: regression_metrics(np.array([v, 0.0]), np.array([0.0, 1.0])),
        lambda v: language_model_metrics(np.array([[v, 1.0]])),
    ],
)
def test_predictions_that_are_not_finite_are_reported(call, bad):
    with pytest.raises(StateError, match=r"training diverged. Lower the learning rate"):
        call(bad)


def test_no_tokens_to_judge_on():
    with pytest.raises(StateError, match="no token"):
        language_model_metrics(np.zeros((2, 2)))


def test_directions():
    lower = {name for name, metric in METRICS if not metric.greater_is_better}
    assert lower == {"mse", "perplexity"}


def test_every_task_has_its_default_metric():
    for name, task in TASKS:
        assert name in check_metric(task.default_metric, name).tasks


def test_unknown_metric_suggests():
    with pytest.raises(UnknownNameError, match="did you mean 'accuracy'"):
        check_metric("acuracy", "seq-cls")


def test_metric_of_another_task():
    with pytest.raises(ConfigError, match=r"task regression, not to seq-cls; .*accuracy"):
        check_metric("pearson", "seq-cls")


def test_f1_needs_two_classes():
    assert check_metric("f1", "seq-cls", 2).greater_is_better
    with pytest.raises(ConfigError, match="for 2 classes and the data has 3; use f1_macro"):
        check_metric("f1", "seq-cls", 3)
