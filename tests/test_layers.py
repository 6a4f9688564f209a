"""Imports run one way, and importing does nothing."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "bvl"

# Lower layers know nothing of higher ones. Modules of one row may know each other, except where SEPARATE.
LAYERS = [
    ("errors",),
    ("config", "mesh", "hosts"),
    ("data", "metrics", "losses", "models"),
    ("assembly",),
    ("decode", "convert"),
    ("checkpoint", "checksums"),
    ("runs",),
    ("tasks",),
    ("evals",),
    ("train",),
    ("conversion",),
    ("api",),
    ("report", "launch", "cli"),
]
SEPARATE = {"data", "metrics", "losses", "models"}
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}


def imported(tree: ast.AST, package: str) -> set[str]:
    """Full names of what a file imports, also inside functions."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parents, *filter(None, [base])])
            names |= {base} if base != "bvl" else {f"bvl.{alias.name}" for alias in node.names}
    return names


def modules():
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        package = ".".join(parts[:-1])
        yield path, parts[1], imported(ast.parse(path.read_text(encoding="utf-8")), package)


def violations(name: str, imports: set[str]) -> list[str]:
    found = []
    for target in imports:
        parts = target.split(".")
        if parts[0] != "bvl" or len(parts) < 2 or parts[1] == name or parts[1] == "__version__":
            continue
        above = LEVEL[parts[1]] > LEVEL[name]
        if above or {name, parts[1]} <= SEPARATE:
            found.append(f"{name} imports {target}")
    return found


def test_every_module_has_a_layer():
    unknown = {name for _, name, _ in modules()} - LEVEL.keys() - {"__init__"}
    assert not unknown, f"say in tests/test_layers.py where {unknown} belongs"


def test_imports_run_one_way():
    found = [
        f"{path.relative_to(PACKAGE)}: {text}"
        for path, name, imports in modules()
        if name != "__init__"
        for text in violations(name, imports)
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "name, source, wrong",
    [
        ("models", "from bvl.losses import ring", True),
        ("evals", "def f():\n    from bvl.train.loop import train", True),
        ("runs", "from . import api", True),
        ("data", "from bvl import cli", True),
        ("train", "import bvl.evals.base", False),
        ("losses", "from bvl.mesh import make_mesh\nfrom bvl.losses.ring import blocked_loop", False),
    ],
)
def test_the_check_itself(name, source, wrong):
    assert bool(violations(name, imported(ast.parse(source), "bvl"))) == wrong


def test_data_does_not_import_jax():
    """Worker processes would each start a JAX of their own."""
    found = [
        f"{path.relative_to(PACKAGE)} imports {target}"
        for path, name, imports in modules()
        if name == "data"
        for target in imports
        if target.split(".")[0] in ("jax", "flax", "optax", "orbax")
        or target.startswith(("bvl.mesh", "bvl.config"))
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "code",
    [
        "import bvl, bvl.cli; assert 'jax' not in sys.modules",
        # Importing must not start a backend: a later choice of devices would come too late.
        "import bvl.cli, bvl.data.pipeline, bvl.api, bvl.train.loop\n"
        "from jax._src import xla_bridge; assert not xla_bridge.backends_are_initialized()",
    ],
)
def test_importing_does_nothing(code):
    done = subprocess.run([sys.executable, "-c", f"import sys\n{code}"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
