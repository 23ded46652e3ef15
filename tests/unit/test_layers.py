"""Rules about the source that a reader relies on, checked on its syntax trees."""

import ast
import doctest
import importlib
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "src" / "prunepeft"
MAX_FILE, MAX_FUNCTION = 300, 40

# Lowest first; a module imports from its own layer and below.
LAYERS = (
    ("errors", "_version", "interrupts", "progress"),
    ("registry", "docstrings", "state", "memory", "processes"),
    ("space", "budget", "schedules", "config", "metrics", "pareto"),
    ("kinds", "sites", "families", "quantized"),
    ("candidates",),
    ("supernet", "sparse_tuning", "criteria", "sharding"),
    ("structured", "supernet.export", "compression"),
    ("tasks", "data", "probes", "evaluate"),
    ("batches",),
    ("prefix", "training"),
    ("backends", "callback"),
    ("strategies",),
    ("report", "architecture", "base_plan", "plan"),
    ("estimates",),
    ("engine", "result", "shrinking", "replica", "places", "run", "shipping", "library"),
    ("compare",),
    ("cli", "testing", "_plugin", "__main__", "__init__"),
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}

# "path" or "path::function" -> why it may be longer. Keep it short.
ALLOWED_LONG: dict[str, str] = {
    "cli/options.py::add_run_command": "holds the one signature that three commands share",
    "cli/compare.py::compare": "is a signature too: flags of a run and of a comparison",
    "cli/options.py::command": "is that signature: every flag with its help",
}

# Modules that must import in no time, and what makes an import slow.
LIGHT = (
    "errors",
    "interrupts",
    "progress",
    "registry",
    "space",
    "budget",
    "schedules",
    "config",
    "cli",
    "_version",
)
HEAVY = {"torch", "transformers", "peft", "matplotlib", "datasets", "sklearn", "scipy", "ray"}
EXTRAS = {"bitsandbytes", "botorch", "gpytorch", "jax", "numpyro", "ray"}

FILES = sorted(SOURCE.rglob("*.py"))
TREES = {path: ast.parse(path.read_text("utf-8")) for path in FILES}
NAMES = {path: path.relative_to(SOURCE).as_posix() for path in FILES}


def layer_name(path):
    return layer_of(path.relative_to(SOURCE).with_suffix("").parts)


def layer_of(parts):
    """The layer of a module: of its subpackage where that has one of its own."""
    inner = ".".join(parts[:2])
    return inner if inner in LEVEL else parts[0]


def imports(tree):
    """Imported module names with their line."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import"
            if node.module == "prunepeft":
                yield from ((f"prunepeft.{alias.name}", node.lineno) for alias in node.names)
            else:
                yield node.module, node.lineno


def calls(tree):
    """Names of called functions with their line.

    Printing to a stream handed in is fine, and so is reading arrays without pickle.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            keywords = {k.arg: ast.unparse(k.value) for k in node.keywords}
            if "file" not in keywords and keywords.get("allow_pickle") != "False":
                yield ast.unparse(node.func), node.lineno


def has_example(tree):
    with_docs = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = (node for node in ast.walk(tree) if isinstance(node, with_docs))
    return any(">>> " in (ast.get_docstring(node) or "") for node in nodes)


def length(function):
    """Lines of a function without its docstring."""
    lines = function.end_lineno - function.lineno + 1
    first = function.body[0]
    if ast.get_docstring(function) is not None:
        lines -= first.end_lineno - first.lineno + 1
    return lines


@pytest.mark.parametrize("path", FILES, ids=NAMES.get)
def test_imports_point_downwards(path):
    name = layer_name(path)
    assert name in LEVEL, f"{NAMES[path]} is in no layer; add {name!r} to LAYERS"
    for module, line in imports(TREES[path]):
        parts = module.split(".")
        if parts[0] != "prunepeft" or len(parts) == 1:
            continue
        target = layer_of(parts[1:])
        target = target if target in LEVEL else "__init__"
        where = f"{NAMES[path]}:{line} imports {module}"
        assert LEVEL[target] <= LEVEL[name], f"{where}, which is in a higher layer"


@pytest.mark.parametrize("path", FILES, ids=NAMES.get)
def test_files_and_functions_are_short(path):
    n_lines = len(path.read_text("utf-8").splitlines())
    too_long = {NAMES[path]: n_lines} if n_lines > MAX_FILE else {}
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and length(node) > MAX_FUNCTION:
            too_long[f"{NAMES[path]}::{node.name}"] = length(node)
    assert not {k: v for k, v in too_long.items() if k not in ALLOWED_LONG}


def test_exceptions_are_still_needed():
    places = set(NAMES.values())
    for place, reason in ALLOWED_LONG.items():
        assert place.partition("::")[0] in places
        assert reason


@pytest.mark.parametrize("path", FILES, ids=NAMES.get)
def test_no_pickle_no_eval_no_print(path):
    modules = {module.split(".")[0] for module, _ in imports(TREES[path])}
    assert not modules & {"pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
    banned = {"torch.load", "torch.save", "eval", "exec", "np.load"}
    if layer_name(path) not in ("cli", "__main__"):
        banned.add("print")
    found = [f"{name} in line {line}" for name, line in calls(TREES[path]) if name in banned]
    assert not found


def test_no_file_is_a_drawer():
    stems = {path.stem for path in FILES}
    assert not stems & {"utils", "util", "helpers", "common", "misc"}


def top_level_imports(tree):
    """What importing the module imports: not what functions or type checkers do."""
    for node in tree.body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield from (module for module, _ in imports(ast.Module([node], [])))


@pytest.mark.parametrize("path", [p for p in FILES if layer_name(p) in LIGHT], ids=NAMES.get)
def test_light_modules_import_nothing_heavy(path):
    for module in top_level_imports(TREES[path]):
        first, *rest = module.split(".")
        assert first not in HEAVY
        if first == "prunepeft" and rest and rest[0] in LEVEL:
            assert rest[0] in LIGHT, f"{NAMES[path]} imports {module} at its top"


@pytest.mark.parametrize("path", FILES, ids=NAMES.get)
def test_packages_of_extras_are_imported_where_they_are_used(path):
    found = {module.split(".")[0] for module in top_level_imports(TREES[path])}
    assert not found & EXTRAS


@pytest.mark.parametrize("path", [p for p in FILES if has_example(TREES[p])], ids=NAMES.get)
def test_examples_in_docstrings_run(path):
    parts = path.relative_to(SOURCE.parent).with_suffix("").parts
    module = importlib.import_module(".".join(parts).removesuffix(".__init__"))
    assert doctest.testmod(module).failed == 0
