"""Options and fixtures of all tests."""

import os
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
SHARDED = TESTS / "sharded"
# Those that take longest begin first, so that no worker of `pytest -n` is left with one at the end.
LONGEST = (
    "test_sharded.py",
    "test_mechanisms.py",
    "test_loop.py",
    "test_hosts.py",
    "test_step.py",
    "test_end_to_end.py",
    "test_system_configs.py",
)


def pytest_addoption(parser):
    parser.addoption("--update-golden", action="store_true", help="write tests/golden anew")


def pytest_configure(config):
    # Before any test imports JAX, for the workers of xdist and the commands that tests start too: tiny programs gain
    # nothing from optimisation, and where programs are kept, all are.
    os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    # XLA's older emitters, in one piece, compile such programs in half the time.
    os.environ.setdefault(
        "XLA_FLAGS", "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
    )
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    # xdist would begin with the files that have the most tests.
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


def pytest_ignore_collect(collection_path, config):
    # They need a process of their own with 8 devices, which test_sharded.py starts.
    if collection_path == SHARDED:
        asked = [Path(arg.partition("::")[0]).resolve() for arg in config.args]
        if not any(path == SHARDED or SHARDED in path.parents for path in asked):
            return True
    return None


@pytest.fixture
def golden(request):
    """Compare a text with tests/golden/<name>; `pytest --update-golden` writes it instead."""

    def compare(name: str, text: str) -> None:
        path = TESTS / "golden" / name
        if request.config.getoption("--update-golden"):
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, encoding="utf-8")
        assert path.is_file(), f"{path} is missing: run pytest --update-golden and look at what it writes"
        assert text == path.read_text(encoding="utf-8"), (
            f"{path} differs; if the change is meant, run pytest --update-golden"
        )

    return compare
