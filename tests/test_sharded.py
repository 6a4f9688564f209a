"""Runs tests/sharded in a process of its own, since the number of devices is fixed once JAX has started."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def test_on_eight_devices():
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "tests/sharded", "-p", "no:cacheprovider"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        pytest.fail(f"tests/sharded failed:\n{done.stdout}\n{done.stderr}", pytrace=False)
    assert "passed" in done.stdout and "skipped" not in done.stdout, done.stdout
