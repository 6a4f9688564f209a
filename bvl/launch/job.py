"""What is to be started: a config with its values, or a sweep of them, checked before anything starts."""

from __future__ import annotations

import dataclasses
import itertools
import re
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import PurePosixPath

from jax.sharding import AbstractMesh

from bvl.config import Config, content_hash, load_config
from bvl.errors import ConfigError, UserError
from bvl.mesh import AXES, check_batch_size, check_hosts, mesh_shape

# File systems take 255 bytes.
LONGEST_NAME = 150


@dataclasses.dataclass(frozen=True)
class Job:
    """One run. `words` follow `bvl` on the command line; `name` tells it from the others of a sweep ("" = no sweep)."""

    words: tuple[str, ...]
    workdir: str
    name: str = ""

    @property
    def here(self) -> list[str]:
        """The command where this very Python can be used: on this machine, or on one that shares its files."""
        return [sys.executable, "-m", "bvl.cli", *self.words]

    @property
    def elsewhere(self) -> list[str]:
        """The command where bvl is installed in another place."""
        return ["bvl", *self.words]

    @property
    def logs(self) -> str:
        """The folder of the hosts' logs."""
        return f"{self.workdir}/logs"


def jobs_of(
    config: str,
    overrides: Sequence[str] = (),
    sweeps: Sequence[str] = (),
    *,
    force: bool = False,
    hosts: int | None = None,
    num_devices: int | None = None,
) -> list[Job]:
    """The run of a config, or those of a sweep, each with a run folder of its own below that of the config.

    config: path/to/config.py, or path/to/config.py:ARG.
    sweeps: "key=value1,value2", of which every combination is one run.
    force: start in run folders of another config.
    hosts, num_devices: of each run, as far as they are known here.
    Raises ConfigError for values that the config does not take, or that so many hosts and devices do not.
    """
    axes = [_parse_sweep(text) for text in sweeps]
    keys = [key for key, _ in axes]
    for key in keys:
        if keys.count(key) > 1:
            raise ConfigError(f"--sweep {key}: given twice; write all its values into one")
        if any(text.partition("=")[0].strip() == key for text in overrides):
            raise ConfigError(
                f"{key} has one value on the command line and several in --sweep; leave one out"
            )
    flags = ("--force",) if force else ()
    jobs: list[Job] = []
    for values in itertools.product(*(values for _, values in axes)):
        swept = [f"{key}={value}" for key, value in zip(keys, values, strict=True)]
        try:
            loaded = load_config(config, [*overrides, *swept])
        except ConfigError as error:
            several = [text for text in overrides if len(_split(text)) > 1]
            hint = f" (several values to be swept are written --sweep {several[0]})" if several else ""
            raise ConfigError(f"{error}{hint}") from None
        workdir = _check(loaded, hosts, num_devices)
        kept = [text for text in overrides if text.partition("=")[0].strip() != "workdir"]
        name = _unused(_file_name(swept), {job.name for job in jobs}) if swept else ""
        path = str(PurePosixPath(workdir) / name)
        jobs.append(Job(("train", config, *kept, *swept, f"workdir={path}", *flags), path, name))
    return jobs


def base_name(jobs: Sequence[Job]) -> str:
    """A name for all runs together: that of the run folder, or of the folder of the sweep."""
    path = PurePosixPath(jobs[0].workdir)
    return (path.parent if jobs[0].name else path).name or "bvl"


def base_folder(jobs: Sequence[Job]) -> str:
    """The run folder, or the folder of the sweep."""
    path = PurePosixPath(jobs[0].workdir)
    return str(path.parent if jobs[0].name else path)


def require(program: str, what: str) -> str:
    """The path of a program; raises UserError saying `what` it belongs to."""
    found = shutil.which(program)
    if found is None:
        raise UserError(
            f"{program} is not on the PATH: it belongs to {what}. Run this command where it is, or add --dry-run to "
            f"see what would be started"
        )
    return found


def change_folder(folder: str) -> str:
    """The shell's command to go to a folder, in which a leading ~ stays the home of whoever runs it."""
    home, rest = ("~/", folder[2:]) if folder.startswith("~/") else ("", folder)
    return f"cd {home}{shlex.quote(rest) if rest else ''}"


def _check(config: Config, hosts: int | None, num_devices: int | None) -> str:
    """What can be known before a run waits in a queue; returns its run folder."""
    if config.workdir is None:
        raise ConfigError("no run folder: add workdir=DIR, for example workdir=runs/my_run")
    if hosts is not None:
        check_hosts(config.mesh, hosts)
    if num_devices is not None:
        mesh = AbstractMesh(mesh_shape(config.mesh, num_devices), AXES)
        check_batch_size(config.batch_size, mesh)
    return config.workdir


def _parse_sweep(text: str) -> tuple[str, list[str]]:
    key, separator, values = text.partition("=")
    key = key.strip()
    found = [value.strip() for value in _split(values)]
    if not separator or not key or not all(found):
        raise ConfigError(f"--sweep {text}: give a key and its values, for example optim.lr=1e-3,3e-4")
    if key == "workdir":
        raise ConfigError("--sweep workdir: each run of a sweep gets a folder of its own below workdir=DIR")
    for value in found:
        if found.count(value) > 1:
            raise ConfigError(f"--sweep {text}: {value} is there twice")
    return key, found


def _split(text: str) -> list[str]:
    """Split at commas, but not inside of brackets and quotes: "(8,1),(4,2)" are two values."""
    parts, depth, quote = [""], 0, ""
    for character in text:
        if quote:
            quote = "" if character == quote else quote
        elif character in "'\"":
            quote = character
        elif character in "([{":
            depth += 1
        elif character in ")]}":
            depth -= 1
        if character == "," and depth == 0 and not quote:
            parts.append("")
        else:
            parts[-1] += character
    return parts


def _file_name(swept: Sequence[str]) -> str:
    # No comma between them: init_from could not name such a folder.
    name = "__".join(re.sub(r"[^\w.=+-]+", "_", text, flags=re.ASCII) for text in swept)
    return name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 13]}_{content_hash(list(swept))}"


def _unused(name: str, taken: set[str]) -> str:
    return next(n for i in itertools.count(1) if (n := name if i == 1 else f"{name}_{i}") not in taken)
