"""Checkpoints on disk: orbax, asynchronous, atomic. A step's folder appears under its name only when complete.

Items of a checkpoint: `params`, `ema` (only where there is one), `rest` (optimiser, extra state, step), `sums`
(metrics not logged yet) and `metrics` (of an evaluation). Parameters stand alone, so that a reader needs no optimiser to load them.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

from bvl.errors import CheckpointError

logger = logging.getLogger(__name__)

ITEMS = ("params", "ema", "rest", "sums")


class Checkpoints:
    """The checkpoints of one run folder."""

    def __init__(
        self,
        folder: Path,
        *,
        keep: int = 2,
        best: str | None = None,
        best_mode: str = "max",
        read_only: bool = False,
    ):
        self.folder = folder.absolute()
        preserve: list[Any] = [policies.LatestN(keep)]
        if best is not None:
            # The policy keeps the largest value.
            sign = 1.0 if best_mode == "max" else -1.0

            def value(metrics: dict[str, float] | None) -> float:
                return sign * metrics[best] if metrics and best in metrics else float("-inf")

            preserve.append(policies.BestN(get_metric_fn=value, n=1))
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policies.AnyPreservationPolicy(preserve),
            step_prefix=None,
            create=not read_only,
            read_only=read_only,
            # Left-overs of a killed save are never complete.
            cleanup_tmp_directories=not read_only,
        )
        # Compression costs several times the save's own processor time and saves little on float32 weights.
        handlers = {name: ocp.PyTreeCheckpointHandler(use_compression=False) for name in ITEMS}
        self._manager = ocp.CheckpointManager(self.folder, options=options, item_handlers=handlers)

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, ascending."""
        return sorted(self._manager.all_steps())

    def latest(self) -> int | None:
        steps = self.steps()
        return steps[-1] if steps else None

    def save(self, step: int, items: dict[str, Any], metrics: dict[str, float] | None = None) -> None:
        """Start saving in the background; raises CheckpointError if this or the last save failed."""
        args = {name: ocp.args.PyTreeSave(tree) for name, tree in items.items()}
        try:
            self._manager.save(step, args=ocp.args.Composite(**args), metrics=metrics, force=True)
        except (OSError, ValueError, RuntimeError) as error:
            raise self._failed(step, error) from error

    def wait(self) -> None:
        """Until the save under way is on disk; raises CheckpointError if it failed."""
        try:
            self._manager.wait_until_finished()
        except (OSError, ValueError, RuntimeError) as error:
            raise self._failed(None, error) from error

    def restore(
        self, step: int, abstract: dict[str, Any], *, optional: dict[str, jax.sharding.Sharding] | None = None
    ) -> dict[str, Any]:
        """Items of a step, in the shapes and shardings of `abstract` (trees of ShapeDtypeStruct).

        optional: items taken as they are, with this sharding for all their arrays, where the step has them.
        """
        try:
            abstract = dict(abstract)
            for name, sharding in (optional or {}).items():
                if (tree := self.describe(step, name)) is not None:
                    abstract[name] = jax.tree.map(
                        lambda a, s=sharding: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), tree
                    )
            return self._restore(step, abstract)
        except Exception as error:  # a damaged file surfaces as many types
            raise CheckpointError(
                f"checkpoint {self.folder / str(step)} cannot be read: {_short(error)}. If another one is good, "
                f"move this folder away and run the command again"
            ) from error

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
                aside = self.folder.parent / "damaged" / str(bad)
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
        self._manager.close()

    def _failed(self, step: int | None, error: Exception) -> CheckpointError:
        what = f"the checkpoint of step {step}" if step is not None else "the last checkpoint"
        good = self.latest()
        return CheckpointError(
            f"{what} could not be saved under {self.folder}: {_short(error)}. Free space or check the folder's "
            f"permissions, then run the same command again; it goes on from "
            f"{'step ' + str(good) if good is not None else 'the start, no checkpoint is complete yet'}"
        )


def _short(error: Exception) -> str:
    text = str(error) or type(error).__name__
    return " ".join(text.split())[:400]
