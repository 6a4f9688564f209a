"""Bad steps, told inside the compiled step: no finite loss or gradient, or a spike. What they did is undone there."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from bvl.config import SurviveConfig

# Good steps before which there is no spike, and over about how many the running means go.
FIRST, OVER = 20, 100
WATCHED = ("loss", "grad_norm")


@dataclasses.dataclass(frozen=True)
class Guard:
    """Judges a step by its loss and gradient norm.

    spike_factor: a value above this factor times its running mean over good steps is a spike; None = no such check.
    """

    spike_factor: float | None

    @classmethod
    def of(cls, config: SurviveConfig) -> Guard | None:
        """None where a bad step ends the run and spikes are not asked for: then the loop alone sees to it."""
        if config.bad_steps == "stop" and config.spike_factor is None:
            return None
        return cls(config.spike_factor)

    def init(self) -> dict[str, jax.Array]:
        """Nothing seen yet. All zero, which the start without a saved state relies on."""
        means = {name: jnp.zeros(()) for name in WATCHED}
        return {**means, "good": jnp.zeros((), jnp.int32), "in_row": jnp.zeros((), jnp.int32)}

    def judge(
        self, state: dict[str, jax.Array], loss: jax.Array, grad_norm: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array], dict[str, jax.Array]]:
        """(is the step bad, the next state, a report for the loop).

        The report has the watched values, their means before the step under "mean_<name>", "bad" and "in_row", the
        bad steps in a row up to this one.
        """
        values = {"loss": loss.astype(jnp.float32), "grad_norm": grad_norm.astype(jnp.float32)}
        bad = jnp.zeros((), bool)
        for name, value in values.items():
            bad |= ~jnp.isfinite(value)
            if self.spike_factor is not None:
                mean = state[name]
                # A loss may be negative, and then no factor says what is too much.
                bad |= (state["good"] >= FIRST) & (mean > 0) & (value > self.spike_factor * mean)
        rate = 1.0 / jnp.minimum(state["good"] + 1, OVER)
        after = {
            name: jnp.where(bad, state[name], state[name] + rate * (value - state[name]))
            for name, value in values.items()
        }
        after["good"] = state["good"] + jnp.where(bad, 0, 1)
        after["in_row"] = jnp.where(bad, state["in_row"] + 1, 0)
        means = {f"mean_{name}": state[name] for name in WATCHED}
        return bad, after, {**values, **means, "bad": bad, "in_row": after["in_row"]}

    def apply(
        self, before: Any, after: Any, metrics: dict[str, Any], loss: jax.Array, grad_norm: jax.Array
    ) -> tuple[Any, dict[str, Any]]:
        """The state after a step, and its metrics: of a bad step the state `before` but for the step counter, metrics
        that count for nothing, and [1, 1] under "skipped"."""
        bad, seen, report = self.judge(before.guard, loss, grad_norm)
        choose = lambda old, new: jnp.where(bad, old, new)  # noqa: E731
        state = jax.tree.map(choose, before.replace(step=after.step, guard=None), after.replace(guard=None))
        metrics = jax.tree.map(lambda x: jnp.where(bad, jnp.zeros_like(x), x), metrics)
        metrics["step"]["skipped"] = jnp.stack([bad.astype(jnp.float32), jnp.ones(())])
        return state.replace(guard=seen), {**metrics, "guard": report}
