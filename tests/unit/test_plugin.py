"""Whoever has imported prunepeft and peft, in any order, can load checkpoints of the tuner."""

import os
import subprocess
import sys

import pytest

import prunepeft

KNOWN = "print('PRUNEPEFT' in peft.PEFT_TYPE_TO_CONFIG_MAPPING)"


def run(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": "src"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.slow
@pytest.mark.parametrize(
    "imports",
    [
        "import prunepeft, peft",
        "import peft, prunepeft",
        "from prunepeft.supernet.layer import UnionLayer; import peft",
    ],
)
def test_peft_knows_the_tuner(imports: str) -> None:
    assert run(f"{imports}\n{KNOWN}\nprint(type(peft.__loader__).__name__)").split() == [
        "True",
        "SourceFileLoader",
    ]


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = "import sys, prunepeft as p; p.Budget; p.Placement; print('torch' in sys.modules)"
    assert run(code) == "False"


def test_looking_peft_up_does_not_import_it() -> None:
    code = (
        "import sys, prunepeft, importlib.util\n"
        "spec = importlib.util.find_spec('peft')\n"
        "print(spec.name, 'peft' in sys.modules, 'torch' in sys.modules)"
    )
    assert run(code) == "peft False False"


@pytest.mark.parametrize("name", prunepeft.__all__)
def test_every_public_name_is_there(name: str) -> None:
    assert getattr(prunepeft, name) is not None
    assert name in dir(prunepeft)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'sreach'"):
        _ = prunepeft.sreach


def test_about_twenty_names() -> None:
    assert len(prunepeft.__all__) <= 25
