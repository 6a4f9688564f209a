"""Checkpoints on disk: orbax, asynchronous, atomic. A step's folder appears under its name only when complete.

Items of a checkpoint: `params`, `ema` (only where there is one), `rest` (optimiser, extra state, step), `sums`
(metrics not logged yet), `guard` (what steps count as bad, where that is watched) and `metrics` (of an evaluation).
Parameters stand alone, so that a reader needs no optimiser to load them. `checksums.json` beside them holds size and
CRC-32 of every file, since orbax notices no changed byte of an array; checkpoints without it are taken as they are.

Of several hosts the first one chooses the checkpoint, checks it and moves damaged ones; what all must do alike is
agreed by `bvl.hosts`.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import shutil
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

from bvl import hosts
from bvl.checksums import CHECKSUMS, checksums, wrong_files
from bvl.errors import CheckpointError, ConfigError

logger = logging.getLogger(__name__)

ITEMS = ("params", "ema", "rest", "sums", "guard")


class Checkpoints:
    """The checkpoints of one run folder.

    tokenizer: hash of the tokenizer whose ids the parameters mean. It is saved with them, and a checkpoint that
    was saved with another is an error.
    compression: smaller files for several times the save's own processor time; float32 weights hardly shrink.
    """

    def __init__(
        self,
        folder: Path,
        *,
        keep: int = 2,
        best: str | None = None,
        best_mode: str = "max",
        read_only: bool = False,
        tokenizer: str | None = None,
        compression: bool = False,
    ):
        if keep < 1:
            raise ConfigError(f"checkpoint.keep={keep}: must be at least 1, or nothing could be resumed")
        self.folder = folder.absolute()
        self._tokenizer = tokenizer
        self._saving: int | None = None
        preserve: list[Any] = [policies.LatestN(keep)]
        value: Callable[[dict[str, float] | None], float] | None = None
        if best is not None:
            # The policy keeps the largest value.
            sign = 1.0 if best_mode == "max" else -1.0

            def value(metrics: dict[str, float] | None) -> float:
                return sign * metrics[best] if metrics and best in metrics else float("-inf")

            preserve.append(policies.BestN(get_metric_fn=value, n=1, keep_checkpoints_without_metrics=False))
        handlers = {name: ocp.PyTreeCheckpointHandler(use_compression=compression) for name in ITEMS}
        with _quiet():
            options = ocp.CheckpointManagerOptions(
                # Without it orbax writes no metrics; what is kept is the policy's to say.
                best_fn=value,
                preservation_policy=policies.AnyPreservationPolicy(preserve),
                step_prefix=None,
                create=not read_only,
                read_only=read_only,
                # Left-overs of a killed save are never complete.
                cleanup_tmp_directories=not read_only,
                async_options=ocp.AsyncOptions(
                    # Else a save that fails at its start leaves threads behind that wait 20 minutes for folders.
                    create_directories_asynchronously=False,
                    # Before the folder gets its name: a complete checkpoint has its checksums.
                    post_finalization_callback=self._write_checksums,
                ),
            )
            self._manager = ocp.CheckpointManager(self.folder, options=options, item_handlers=handlers)

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints on disk, ascending."""
        # The manager's own list counts a save that failed, and leaves out what that save was to replace.
        return complete_steps(self.folder)

    def latest(self) -> int | None:
        steps = self.steps()
        return steps[-1] if steps else None

    def save(self, step: int, items: dict[str, Any], metrics: dict[str, float] | None = None) -> None:
        """Start saving in the background; raises CheckpointError if this or the last save failed."""
        # One save at a time is orbax's rule too; waiting here names the step that failed.
        self.wait()
        self._check_writable(step)
        args = {name: ocp.args.PyTreeSave(tree) for name, tree in items.items()}
        self._saving = step
        try:
            with _quiet():
                self._manager.save(
                    step,
                    args=ocp.args.Composite(**args),
                    metrics=metrics,
                    custom_metadata={"tokenizer": self._tokenizer},
                    force=True,
                )
        except (OSError, ValueError, RuntimeError) as error:
            raise self._failed(error) from error

    def wait(self) -> None:
        """Until the save under way is on disk; raises CheckpointError if it failed."""
        try:
            self._manager.wait_until_finished()
        except (OSError, ValueError, RuntimeError) as error:
            raise self._failed(error) from error
        self._saving = None

    def check(self) -> bool:
        """Whether no save is under way; raises CheckpointError if one has failed by now. Does not wait.

        Of several hosts none asks: whether a save failed is told to all by the next one.
        """
        if self._saving is not None and hosts.count() == 1 and not self._manager.is_saving_in_progress():
            self.wait()
        return self._saving is None

    def _check_writable(self, step: int) -> None:
        """Several hosts wait for each other in a save: one that cannot begin must be seen by all beforehand."""
        if hosts.count() == 1:
            return
        problem = None
        if hosts.is_first():
            probe = self.folder / ".writable"
            try:
                probe.write_bytes(bytes(4096))
                probe.unlink()
            except OSError as error:
                problem = str(error)
        problem = hosts.broadcast(problem)
        if problem is not None:
            self._saving = step
            raise self._failed(OSError(problem))

    def _write_checksums(self) -> None:
        """Called in the background, by the first host, once the files of a save are written."""
        # The folder has its temporary name; left-overs of other saves were cleared away at the start.
        folder = max(self.folder.glob(f"{self._saving}.*tmp*"), key=lambda p: p.stat().st_mtime)
        (folder / CHECKSUMS).write_text(json.dumps(checksums(folder)))

    def verify(self, step: int, items: Collection[str] | None = None) -> None:
        """Raise CheckpointError if files of a step (of these items, by default of all) are not those that were saved."""
        folder = self.folder / str(step)
        file = folder / CHECKSUMS
        if not file.is_file():
            return
        try:
            saved = json.loads(file.read_text())
            if items is not None:
                saved = {name: sums for name, sums in saved.items() if name.split("/")[0] in items}
            wrong = wrong_files(folder, saved)
        except (OSError, ValueError, AttributeError) as error:
            raise CheckpointError(f"checkpoint {folder} cannot be read: {_short(error)}") from error
        if wrong:
            raise CheckpointError(f"checkpoint {folder} is damaged: {'; '.join(wrong[:3])}")

    def restore(
        self,
        step: int,
        abstract: dict[str, Any],
        *,
        optional: dict[str, jax.sharding.Sharding] | None = None,
        verify: bool = True,
    ) -> dict[str, Any]:
        """Items of a step, in the shapes and shardings of `abstract` (trees of ShapeDtypeStruct).

        optional: items taken as they are, with this sharding for all their arrays, where the step has them.
        verify: compare the files with their checksums (of several hosts, the first one does).
        Raises CheckpointError, with the names of the first arrays that differ where it is the shapes, and JAX's own
        error where the devices are out of memory.
        """
        where = f"checkpoint {self.folder / str(step)}"
        if verify and hosts.is_first():
            self.verify(step, {*abstract, *(optional or {})})
        try:
            self._check_tokenizer(step, where)
            abstract = dict(abstract)
            for name, sharding in (optional or {}).items():
                if (tree := self.describe(step, name)) is not None:
                    abstract[name] = jax.tree.map(
                        lambda a, s=sharding: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), tree
                    )
            check_same_shapes(abstract, {name: self.describe(step, name) for name in abstract}, where)
            return self._restore(step, abstract)
        except CheckpointError:
            raise
        except Exception as error:  # a damaged file surfaces as many types
            if isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(error):
                # The devices are too small; nothing is wrong with the files.
                raise
            raise CheckpointError(f"{where} cannot be read: {_short(error)}") from error

    def _check_tokenizer(self, step: int, where: str) -> None:
        file = self.folder / str(step) / "_CHECKPOINT_METADATA"
        saved = (json.loads(file.read_text()).get("custom_metadata") or {}).get("tokenizer")
        if None not in (saved, self._tokenizer) and saved != self._tokenizer:
            raise CheckpointError(
                f"{where} was made with another tokenizer: token ids mean other words; use the tokenizer.json "
                f"that was saved with it"
            )

    def _restore(self, step: int, abstract: dict[str, Any]) -> dict[str, Any]:
        args = {
            name: ocp.args.PyTreeRestore(
                item=tree, restore_args=ocp.checkpoint_utils.construct_restore_args(tree)
            )
            for name, tree in abstract.items()
        }
        restored = self._manager.restore(step, args=ocp.args.Composite(**args))
        return {name: restored[name] for name in abstract}

    def restore_latest(
        self, abstract: dict[str, Any], *, optional: dict[str, jax.sharding.Sharding] | None = None
    ) -> tuple[int, dict[str, Any]] | None:
        """The newest checkpoint that can be read; damaged ones are renamed, not deleted. None if there is none.

        All hosts get the same step: the first one chooses, and one that any host cannot read counts as damaged.
        """
        damaged: list[tuple[int, str]] = []
        for step in hosts.broadcast(self.steps()[::-1]):
            items, problem = self._try(step, abstract, optional)
            if problem is None:
                self._set_aside(damaged, step)
                return step, items
            damaged.append((step, problem))
        if damaged:
            raise CheckpointError(damaged[0][1])
        return None

    def _try(
        self, step: int, abstract: dict[str, Any], optional: dict[str, jax.sharding.Sharding] | None
    ) -> tuple[dict[str, Any], str | None]:
        """(items, None), or what is wrong with the step."""
        problem = None
        if hosts.is_first():
            try:
                self.verify(step)
            except CheckpointError as error:
                problem = str(error)
        if (problem := hosts.broadcast(problem)) is not None:
            return {}, problem
        items: dict[str, Any] = {}
        try:
            items = self.restore(step, abstract, optional=optional, verify=False)
        except CheckpointError as error:
            problem = str(error)
        return items, next((p for p in hosts.gather(problem) if p is not None), None)

    def _set_aside(self, damaged: list[tuple[int, str]], used: int) -> None:
        """Move damaged checkpoints out of the way, so that their steps can be saved again."""
        if not damaged:
            return
        if hosts.is_first():
            for step, problem in damaged:
                aside = _unused(self.folder.parent / "damaged" / str(step))
                aside.parent.mkdir(exist_ok=True)
                (self.folder / str(step)).rename(aside)
                logger.warning("%s; it was moved to %s and step %d is used", problem, aside, used)
        hosts.barrier("damaged checkpoints are moved")
        self._manager.reload()

    def describe(self, step: int, item: str) -> Any:
        """Tree of shapes and types of an item, read without its arrays. None if the step has no such item."""
        if not (self.folder / str(step) / item).is_dir():
            return None
        handler = ocp.PyTreeCheckpointHandler()
        tree = handler.metadata(self.folder / str(step) / item).tree
        return jax.tree.map(lambda m: jax.ShapeDtypeStruct(m.shape, m.dtype), tree)

    def best(self, name: str, mode: str = "max") -> int | None:
        """The step whose saved metric `name` is best, None if no checkpoint has it."""
        values = {step: self.metrics(step).get(name) for step in self.steps()}
        known = {step: value for step, value in values.items() if value is not None}
        pick: Callable[..., int] = max if mode == "max" else min
        return pick(known, key=known.get) if known else None

    def metrics(self, step: int) -> dict[str, float]:
        file = self.folder / str(step) / "metrics" / "metrics"
        return json.loads(file.read_text()) if file.is_file() else {}

    def close(self) -> None:
        """Wait for a save under way; that it failed is logged, so that no other error is hidden by it."""
        try:
            self.wait()
        except CheckpointError as error:
            logger.error("%s", error)
        self._manager.close()

    def _failed(self, error: Exception) -> CheckpointError:
        good = self.latest()
        failed, self._saving = self._saving, None
        if hosts.is_first():
            # On a full disk a half-written folder would take the space of the next try.
            for folder in self.folder.glob(f"{failed}.*tmp*"):
                shutil.rmtree(folder, ignore_errors=True)
        return CheckpointError(
            f"the checkpoint of step {failed} could not be saved under {self.folder}: {_short(error)}. Free space or "
            f"check the folder's permissions; the same command goes on from "
            f"{'step ' + str(good) if good is not None else 'the start, no checkpoint is complete yet'}"
        )


def complete_steps(folder: Path) -> list[int]:
    """Steps of the complete checkpoints in a folder that may not exist, ascending."""
    if not folder.is_dir():
        return []
    return sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit() and p.is_dir())


def check_same_shapes(wanted: Any, found: Any, where: str) -> None:
    """Raise CheckpointError naming the first arrays whose presence or shape differs."""
    here, there = _shapes(wanted), _shapes(found)
    different = [n for n in sorted(here.keys() | there.keys()) if here.get(n) != there.get(n)]
    if different:
        lines = [
            f"  {n}: there {there.get(n, 'absent')}, here {here.get(n, 'absent')}" for n in different[:8]
        ]
        raise CheckpointError(
            f"{where}: {len(different)} arrays differ from those of this config:\n" + "\n".join(lines)
        )


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    """Shape by name. A tree that was read holds dicts where named tuples were saved, so key types do not count."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): tuple(x.shape) for path, x in leaves}


def _unused(path: Path) -> Path:
    """`path`, or with the first of .1, .2 ... that does not exist."""
    return next(
        p for n in itertools.count() if not (p := path.with_name(path.name + f".{n}" * (n > 0))).exists()
    )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """orbax warns about options that are meant as they are (a read-only manager, a save without metrics)."""
    absl = logging.getLogger("absl")
    level = absl.level
    absl.setLevel(logging.ERROR)
    try:
        yield
    finally:
        absl.setLevel(level)


def _short(error: Exception) -> str:
    text = str(error) or type(error).__name__
    return " ".join(text.split())[:400]
