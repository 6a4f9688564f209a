"""Checkpoints on disk: orbax, asynchronous, atomic. A step's folder appears under its name only when complete.

Items of a checkpoint: `params`, `ema` (only where there is one), `rest` (optimiser, extra state, step), `sums`
(metrics not logged yet) and `metrics` (of an evaluation). Parameters stand alone, so that a reader needs no optimiser to load them.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

from bvl.errors import CheckpointError, ConfigError

logger = logging.getLogger(__name__)

ITEMS = ("params", "ema", "rest", "sums")


class Checkpoints:
    """The checkpoints of one run folder.

    tokenizer: hash of the tokenizer whose ids the parameters mean. It is saved with them, and a checkpoint that
    was saved with another is an error.
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
        # Compression costs several times the save's own processor time and saves little on float32 weights.
        handlers = {name: ocp.PyTreeCheckpointHandler(use_compression=False) for name in ITEMS}
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
                # Else a save that fails at its start leaves threads behind that wait 20 minutes for folders.
                async_options=ocp.AsyncOptions(create_directories_asynchronously=False),
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

    def restore(
        self, step: int, abstract: dict[str, Any], *, optional: dict[str, jax.sharding.Sharding] | None = None
    ) -> dict[str, Any]:
        """Items of a step, in the shapes and shardings of `abstract` (trees of ShapeDtypeStruct).

        optional: items taken as they are, with this sharding for all their arrays, where the step has them.
        Raises CheckpointError, with the names of the first arrays that differ where it is the shapes.
        """
        where = f"checkpoint {self.folder / str(step)}"
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
        """The newest checkpoint that can be read; damaged ones are renamed, not deleted. None if there is none."""
        damaged = []
        for step in reversed(self.steps()):
            try:
                items = self.restore(step, abstract, optional=optional)
            except CheckpointError as error:
                damaged.append((step, error))
                continue
            for bad, error in damaged:
                aside = _unused(self.folder.parent / "damaged" / str(bad))
                aside.parent.mkdir(exist_ok=True)
                (self.folder / str(bad)).rename(aside)
                logger.warning("%s; it was moved to %s and step %d is used", error, aside, step)
            if damaged:
                self._manager.reload()
            return step, items
        if damaged:
            raise damaged[0][1]
        return None

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
        return CheckpointError(
            f"the checkpoint of step {self._saving} could not be saved under {self.folder}: {_short(error)}. Free space or check the folder's "
            f"permissions, then run the same command again; it goes on from "
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
