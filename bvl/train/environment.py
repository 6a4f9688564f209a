"""What a run stands on: package versions, devices, source revision; and the compilation cache."""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import jax

from bvl import hosts
from bvl.runs import RunFolder, write_atomic

# Options of mallopt(3).
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8

PACKAGES = (
    "bvl",
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "grain",
    "tokenizers",
    "pillow",
    "numpy",
)


def describe_environment(licences: dict[str, dict[str, int]]) -> dict[str, Any]:
    """Versions, devices, XLA's flags, revision, and the licences of every source with their counts."""
    return {
        "packages": {name: _version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "hosts": hosts.count(),
        "devices": [f"{d.platform}:{d.device_kind}" for d in jax.devices()],
        # What they say of determinism decides whether another run can repeat this one bit for bit.
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "revision": _revision(),
        "licences": licences,
    }


def enable_compilation_cache() -> None:
    """Keep compiled programs between runs, unless JAX_COMPILATION_CACHE_DIR names another place.

    May be called again, and does nothing where no folder for it can be written.
    """
    if jax.config.jax_compilation_cache_dir is not None:
        return
    try:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bvl" / "xla"
        cache.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # a home that is read-only, or none at all
        return
    if os.access(cache, os.W_OK):
        jax.config.update("jax_compilation_cache_dir", str(cache))


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _revision() -> str | None:
    folder = Path(__file__).resolve().parent
    try:
        out = subprocess.run(
            ["git", "-C", str(folder), "describe", "--always", "--dirty"],
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return out.stdout.strip() or None


def keep_freed_memory() -> None:
    """Let this process keep the memory it frees, where it computes on CPU and runs on glibc.

    XLA on CPU takes its scratch memory anew for every step. By default glibc hands freed blocks of that size back
    to the kernel, which must then zero every page again: a quarter of a small model's step. Call it before the
    first computation, since threads that exist keep their own heaps.
    """
    accelerator = any(importlib.util.find_spec(name) for name in ("jax_plugins", "libtpu"))
    if accelerator and os.environ.get("JAX_PLATFORMS") != "cpu":
        return
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):
        return
    for option, value in ((_M_ARENA_MAX, 1), (_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, 2**31 - 1)):
        libc.mallopt(option, value)


def note_start(run: RunFolder, step: int, licences: dict[str, dict[str, int]]) -> None:
    """Add this start to the list in env.json."""
    starts = json.loads(run.env.read_text()) if run.env.is_file() else []
    # Run folders of older versions hold the last start alone.
    starts = starts if isinstance(starts, list) else [starts]
    starts.append({"from_step": step, **describe_environment(licences)})
    write_atomic(run.env, json.dumps(starts, indent=2) + "\n")
