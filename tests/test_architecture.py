"""Laws of the source itself: imports go one way, Ray stays at the edges, and scripts in sweeps/ hold no logic."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "perturbray"

# What stands later in a chain may import what stands earlier, never the other way round.
CHAINS = (
    (
        "errors",
        "registry",
        "data",
        "embeddings",
        "models",
        "training",
        "trial",
        "search",
        "validation",
        "course",
        "engine",
        "tuning",
        "running",
    ),
    ("tuning", "cli"),
    ("errors", "trial", "search", "sweep", "plan", "engine", "tuning", "cli"),
    ("errors", "space", "proposals", "search"),
    ("training", "counterfactual", "cli"),
    ("errors", "prediction", "metrics", "sweep"),
    ("errors", "results", "watch", "cli"),
    ("errors", "results", "recorder", "engine"),
    ("events", "recorder", "engine"),
    ("errors", "synthetic", "engine"),
    ("errors", "space", "models"),
    ("errors", "clusterfile", "cli"),
    ("errors", "placement", "nodes", "cluster", "engine"),
    ("trial", "process", "engine"),
)
STRANGERS = {  # beside the chains: what a part must not know at all
    "metrics": {"models", "data", "training", "trial", "engine", "cli"},
    "results": {"models", "data", "training", "trial", "sweep", "engine", "cli", "torch", "ray"},
    "watch": {"models", "data", "training", "metrics", "trial", "sweep", "engine", "events", "torch", "ray"},
    "recorder": {"models", "data", "training", "metrics", "engine", "torch", "ray"},
    "synthetic": {"models", "data", "training", "metrics", "results", "torch", "ray"},
    "prediction": {"models", "data", "training", "torch", "ray", "anndata"},
    "cluster": {"models", "data", "training"},
    "clusterfile": {"models", "data", "training", "metrics", "results", "trial", "sweep", "engine", "cluster", "torch"},
    "nodes": {"models", "data", "training"},
    "placement": {"models", "data", "training", "ray"},
}
RAY_MODULES = {
    "engine",
    "cluster",
    "data.blocks",
    "data.prepare",
    "data.windows",
    "metrics.pool",
    "embeddings.run",
    "nodes",
    "memory",
    "process",
    "curves",
    "tuning",
    "clusterfile.launcher",  # asks Ray's launcher what it says of a cluster file
}
SLOW_TO_IMPORT = ("torch", "ray", "anndata", "pandas", "scipy", "matplotlib", "pyarrow", "h5py", "numba")


def imports(source: str, *, module: str, is_package: bool = False) -> set[str]:
    """Dotted names that a module imports anywhere in it, absolute; own modules without the package's name in front.

    ``from perturbray.data import blocks`` gives both ``data`` and ``data.blocks``: the syntax does not say which it is.
    """
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            origin = node.module or ""
            if node.level:
                here = f"{PACKAGE}.{module}".split(".")
                here = here[: len(here) - node.level + is_package]
                origin = ".".join([*here, *filter(None, [origin])])
            found |= {origin} | {f"{origin}.{alias.name}" for alias in node.names}
    return {name.removeprefix(f"{PACKAGE}.") for name in found} - {PACKAGE}


def forbidden(part: str) -> set[str]:
    """What a part of the package must not import."""
    later = {name for chain in CHAINS if part in chain for name in chain[chain.index(part) + 1 :]}
    return later | STRANGERS.get(part, set())


def breaches(module: str, names: set[str]) -> set[str]:
    part = module.split(".")[0]
    return {name for name in names if name.split(".")[0] in forbidden(part)}


def ray_breaches(module: str, names: set[str]) -> set[str]:
    return set() if module in RAY_MODULES else {name for name in names if name.split(".")[0] == "ray"}


def sources() -> dict[str, tuple[str, set[str]]]:
    """Source and imports of every module by its dotted name without the package's; __init__ of the package is ''."""
    found = {}
    for path in sorted((ROOT / PACKAGE).rglob("*.py")):
        parts = path.relative_to(ROOT / PACKAGE).with_suffix("").parts
        is_package = parts[-1] == "__init__"
        module = ".".join(parts[:-1] if is_package else parts)
        text = path.read_text(encoding="utf-8")
        found[module] = text, imports(text, module=module, is_package=is_package)
    return found


@pytest.fixture(scope="module")
def modules():
    found = sources()
    assert len(found) > 25, "the laws would hold of an empty folder"
    assert {"errors", "data.dataset", "models.base", "metrics.scores", "results.table"} <= set(found)
    return found


def test_imports_go_one_way(modules):
    assert sum(len(names) for _, names in modules.values()) > 100
    broken = {module: found for module, (_, names) in modules.items() if module and (found := breaches(module, names))}
    assert not broken


def test_only_the_marked_modules_import_ray(modules):
    broken = {module: found for module, (_, names) in modules.items() if (found := ray_breaches(module, names))}
    assert not broken


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("data.splits", "from perturbray.models.base import Model"),
        ("data.splits", "from perturbray import models"),
        ("data.splits", "from ..models import base"),
        ("models.cpa", "def build():\n    from perturbray.training import fit"),
        ("metrics.scores", "import perturbray.data.dataset"),
        ("results.plots", "import torch.nn as nn"),
        ("results", "from ray import tune"),
        ("trial", "from perturbray.sweep import Sweep"),
        ("engine", "from perturbray.cli import main"),
    ],
)
def test_an_import_against_the_order_is_found(module, source):
    assert breaches(module, imports(source, module=module, is_package=module == "results"))


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("models.base", "from perturbray.data.vocabulary import Vocabulary"),
        ("engine", "from perturbray.results.table import write\nimport ray"),
        ("sweep", "from perturbray.metrics.metric import Metric\nfrom .trial import Trial"),
    ],
)
def test_an_import_along_the_order_is_allowed(module, source):
    names = imports(source, module=module)
    assert names
    assert not breaches(module, names) | ray_breaches(module, names)


def test_ray_in_an_unmarked_module_is_found_wherever_it_stands():
    assert ray_breaches("training.fit", imports("def report():\n    from ray import tune", module="training.fit"))
    assert ray_breaches("models.base", imports("import ray.data", module="models.base"))
    assert not ray_breaches("training.fit", imports("import array\nfrom raylib import x", module="training.fit"))


def test_every_module_opens_with_what_it_is_about(modules):
    assert not [
        module for module, (text, _) in modules.items() if text.strip() and not ast.get_docstring(ast.parse(text))
    ]


def test_importing_the_package_imports_nothing_slow():
    code = (
        f"import sys, {PACKAGE}; print(*[name for name in {SLOW_TO_IMPORT} if name in sys.modules], {PACKAGE}.__file__)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert run.stdout.split() == [str(ROOT / PACKAGE / "__init__.py")]


def logic(source: str) -> list[str]:
    """What a script of sweeps/ holds beside a docstring, imports, constants, functions returning a Sweep, and main."""
    tree = ast.parse(source)
    found = [] if ast.get_docstring(tree) else ["no docstring with the question that the sweep answers"]
    for node in tree.body[1:] if ast.get_docstring(tree) else tree.body:
        if isinstance(node, ast.FunctionDef):
            returns = ast.unparse(node.returns) if node.returns else ""
            if returns.split(".")[-1].strip("'\"") != "Sweep":
                found.append(f"line {node.lineno}: {node.name} does not say that it returns a Sweep")
            busy = ast.For, ast.While, ast.Try, ast.With, ast.ClassDef, ast.Lambda
            found += [
                f"line {n.lineno}: {type(n).__name__} in {node.name}" for n in ast.walk(node) if isinstance(n, busy)
            ]
        elif isinstance(node, ast.If):
            if ast.unparse(node.test) != "__name__ == '__main__'" or "main(" not in ast.unparse(node.body[-1]):
                found.append(f"line {node.lineno}: an if that is not the call of main")
        elif isinstance(node, ast.Assign):
            if not all(isinstance(target, ast.Name) and target.id.isupper() for target in node.targets):
                found.append(f"line {node.lineno}: an assignment that is not a constant")
        elif not isinstance(node, ast.Import | ast.ImportFrom):
            found.append(f"line {node.lineno}: {type(node).__name__}")
    return found


def test_scripts_say_what_is_run_and_nothing_else():
    broken = {path.name: found for path in (ROOT / "sweeps").glob("*.py") if (found := logic(path.read_text()))}
    assert not broken


SCRIPT = '''"""Does it matter?"""

import perturbray as pr

LEVELS = (0.0, 0.1)


def imbalance(dataset: pr.DatasetSpec) -> pr.Sweep:
    """All of them."""
    return pr.Sweep(name="imbalance", trials=[pr.Trial(dataset=dataset, level=level) for level in LEVELS])


if __name__ == "__main__":
    pr.main(imbalance)
'''


def test_a_script_as_it_should_be_has_no_logic():
    assert logic(SCRIPT) == []


@pytest.mark.parametrize(
    ("right", "wrong", "message"),
    [
        ('"""Does it matter?"""', "", "docstring"),
        (" -> pr.Sweep", "", "returns a Sweep"),
        ('    """All of them."""', "    for level in LEVELS:\n        print(level)", "For in imbalance"),
        ("LEVELS = (0.0, 0.1)", "print('hello')", "Expr"),
        ("pr.main(imbalance)", "imbalance(None)", "call of main"),
    ],
)
def test_logic_in_a_script_is_found(right, wrong, message):
    (found,) = logic(SCRIPT.replace(right, wrong))
    assert message in found
