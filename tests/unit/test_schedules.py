import pytest
from hypothesis import given
from hypothesis import strategies as st

from prunepeft.errors import ConfigError
from prunepeft.schedules import cubic, held_cubic, linear

SCHEDULES = (linear, cubic, held_cubic)
progress = st.floats(0.0, 1.0)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_hits_both_ends(schedule):
    assert schedule(0) == 0.0
    assert schedule(1) == 1.0


@pytest.mark.parametrize("schedule", SCHEDULES)
@given(a=progress, b=progress)
def test_is_monotone_and_bounded(schedule, a, b):
    low, high = sorted((a, b))
    assert 0.0 <= schedule(low) <= schedule(high) <= 1.0


@given(p=progress)
def test_cubic_is_never_behind_linear(p):
    assert cubic(p) >= linear(p) - 1e-12


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("bad", [-0.01, 1.01, float("nan"), float("inf"), "0.5", True, None])
def test_refuses_what_is_not_a_progress(schedule, bad):
    with pytest.raises(ConfigError, match=r"progress must be a number in \[0, 1\]"):
        schedule(bad)


@pytest.mark.parametrize(("warmup", "cooldown"), [(0.5, 0.5), (-0.1, 0.1), (0.1, float("nan"))])
def test_refuses_a_warmup_and_cooldown_that_leave_no_step(warmup, cooldown):
    with pytest.raises(ConfigError, match="warmup and cooldown"):
        held_cubic(0.5, warmup, cooldown)
