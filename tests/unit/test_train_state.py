"""Training state: stop, save, load in fresh objects, go on: bit-equal to not stopping."""

import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR, ReduceLROnPlateau

from prunepeft.errors import CheckpointError, DiskError, StateError
from prunepeft.state import write_tensors
from prunepeft.training.train_state import (
    load_train_state,
    rng_state,
    save_train_state,
    set_rng_state,
)
from tests.disk_faults import failing_call


def adafactor(parameters):
    optimization = pytest.importorskip("transformers.optimization")
    return optimization.Adafactor(parameters, lr=1e-2, relative_step=False, beta1=0.9)


def grouped(parameters):
    first, *rest = parameters
    return torch.optim.AdamW([{"params": [first], "lr": 0.1}, {"params": rest}], lr=0.01)


OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=False),
    "adamw foreach": lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=True),
    "adamw fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    "adamw amsgrad": lambda p: torch.optim.AdamW(p, lr=torch.tensor(1e-2), amsgrad=True),
    "adamw groups": grouped,
    "sgd momentum": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, nesterov=True),
    "adafactor": adafactor,
}
SCHEDULERS = {
    "linear": lambda o: LambdaLR(o, lambda step: 1 - step / 20),
    "one cycle": lambda o: OneCycleLR(o, max_lr=0.05, total_steps=20),
    "none": lambda o: None,
}


class Loop:
    """A small training run that uses every source of randomness."""

    def __init__(self, optimizer, scheduler="linear", dtype=torch.float32, seed=0):
        for seed_one in (torch.manual_seed, random.seed, np.random.seed):
            seed_one(seed)
        self.model = nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.3), nn.Linear(16, 2)).to(dtype)
        self.dtype = dtype
        self.optimizer = OPTIMIZERS[optimizer](list(self.model.parameters()))
        self.scheduler = SCHEDULERS[scheduler](self.optimizer)

    def run(self, steps):
        for _ in range(steps):
            x = torch.randn(4, 8) * random.gauss(1, 0.1) + np.random.randn()
            self.model(x.to(self.dtype)).pow(2).mean().backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            if self.scheduler is not None:
                self.scheduler.step()
        return self

    def save(self, path, **options):
        state = dict(self.model.named_parameters())
        objects = {"optimizer": self.optimizer, "scheduler": self.scheduler}
        save_train_state(path, tensors=state, step=5, epoch=0.5, **objects, **options)

    def load(self, path):
        state = load_train_state(path, optimizer=self.optimizer, scheduler=self.scheduler)
        self.model.load_state_dict(state.tensors)
        return state


@pytest.fixture
def path(tmp_path):
    return tmp_path / "state" / "train.safetensors"


PAIRS = [(o, s) for o in OPTIMIZERS for s in SCHEDULERS if (o, s) != ("adafactor", "one cycle")]


@pytest.mark.parametrize(("optimizer", "scheduler"), PAIRS)
def test_going_on_equals_not_stopping(path, optimizer, scheduler):
    loop = Loop(optimizer, scheduler).run(5)
    loop.save(path, extra={"order": [3, 1, 2], "best": float("inf"), "pair": (1, "a")})
    loop.run(5)
    again = Loop(optimizer, scheduler, seed=99)
    state = again.load(path)
    assert (state.step, state.epoch) == (5, 0.5)
    assert state.extra == {"order": [3, 1, 2], "best": float("inf"), "pair": (1, "a")}
    again.run(5)
    for (name, one), two in zip(
        loop.model.named_parameters(), again.model.parameters(), strict=True
    ):
        assert torch.equal(one, two), name
    if loop.scheduler is not None:
        assert loop.scheduler.get_last_lr() == again.scheduler.get_last_lr()


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor", "sgd momentum"])
def test_half_precision_weights_keep_the_precision_of_the_state(path, optimizer):
    loop = Loop(optimizer, dtype=torch.bfloat16).run(5)
    loop.save(path)
    before = [dict(loop.optimizer.state[p]) for p in loop.model.parameters()]
    again = Loop(optimizer, dtype=torch.bfloat16, seed=9)
    again.load(path)
    for one, parameter in zip(before, again.model.parameters(), strict=True):
        two = again.optimizer.state[parameter]
        assert set(one) == set(two)
        for name, value in one.items():
            if isinstance(value, torch.Tensor):
                assert two[name].dtype == value.dtype, name
                assert torch.equal(two[name], value), name
            else:
                assert two[name] == value, name


def test_the_same_state_gives_the_same_bytes(path, tmp_path):
    loop = Loop("adamw").run(2)
    loop.save(path)
    loop.save(tmp_path / "b")
    assert path.read_bytes() == (tmp_path / "b").read_bytes()


def test_a_plateau_schedule_and_its_infinity(path):
    parameter = nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    scheduler = ReduceLROnPlateau(optimizer)
    save_train_state(path, tensors={}, optimizer=optimizer, scheduler=scheduler, step=0, epoch=0)
    scheduler.step(1.0)
    load_train_state(path, optimizer=optimizer, scheduler=scheduler)
    assert scheduler.best == float("inf")


def test_random_states_round_trip():
    random.gauss(0, 1)
    np.random.randn()  # both now hold a second value
    saved = rng_state()
    draws = (
        torch.rand(3).tolist(),
        random.gauss(0, 1),
        random.random(),
        np.random.randn(3).tolist(),
    )
    set_rng_state(*saved)
    assert draws == (
        torch.rand(3).tolist(),
        random.gauss(0, 1),
        random.random(),
        np.random.randn(3).tolist(),
    )


def test_random_states_may_stay(path):
    Loop("adamw").save(path)
    torch.manual_seed(3)
    load_train_state(path, restore_random=False)
    one = torch.rand(1)
    torch.manual_seed(3)
    assert torch.equal(one, torch.rand(1))


def test_names_that_look_alike(path):
    tensors = {"a/b": torch.zeros(1), "a": torch.ones(1)}
    extra = {"x": {"1": torch.tensor(1), 1: torch.tensor(2)}, "x/1": torch.tensor(3)}
    save_train_state(
        path, tensors=tensors, optimizer=None, scheduler=None, step=0, epoch=0, extra=extra
    )
    state = load_train_state(path)
    assert state.tensors == tensors
    assert state.extra == extra


def test_what_cannot_be_saved(path):
    with pytest.raises(StateError, match="holds a function at extra/f"):
        Loop("adamw").save(path, extra={"f": lambda: 0})
    with pytest.raises(StateError, match=r"the key \(1, 2\)"):
        Loop("adamw").save(path, extra={(1, 2): 0})
    assert not path.exists()


def test_a_full_disk_keeps_the_old_state(path):
    loop = Loop("adamw").run(1)
    loop.save(path)
    whole = path.read_bytes()
    loop.run(1)
    for number in (1, 2, 3):
        with failing_call(number), pytest.raises(DiskError, match="No space left"):
            loop.save(path)
        assert path.read_bytes() == whole


def test_damage_is_noticed_before_anything_is_restored(path):
    Loop("adamw").run(1).save(path)
    whole = path.read_bytes()
    again = Loop("adamw", seed=1)
    for place in range(0, len(whole), len(whole) // 40):
        for data in (
            whole[:place],
            whole[:place] + bytes([whole[place] ^ 16]) + whole[place + 1 :],
        ):
            path.write_bytes(data)
            with pytest.raises(CheckpointError, match=r"train\.safetensors"):
                again.load(path)
    assert len(again.optimizer.state) == 0


def test_another_optimiser_or_model_does_not_fit(path):
    Loop("adamw").run(1).save(path)
    with pytest.raises(CheckpointError, match="its optimizer is AdamW, not SGD"):
        Loop("sgd momentum").load(path)
    with pytest.raises(CheckpointError, match="its scheduler is LambdaLR, not OneCycleLR"):
        Loop("adamw", "one cycle").load(path)
    for model in (nn.Linear(8, 16), nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 2))):
        with pytest.raises(CheckpointError, match="does not fit this training loop"):
            load_train_state(path, optimizer=torch.optim.AdamW(model.parameters()))


def test_another_kind_of_file(path):
    write_tensors(path, {"x": torch.ones(1)})
    with pytest.raises(CheckpointError, match="is no training state"):
        load_train_state(path)
