"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864), and the ways in which it is stretched to longer texts."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from bvl.errors import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How the angles of a rotary embedding are made smaller, so that a model reads longer texts than it was trained on.

    kind: "linear" divides all by `factor` (Chen et al. 2023, arXiv:2306.15595). "llama3" divides those of channels that
      turn fewer than `low_freq_factor` times in `original_context` tokens, leaves those that turn more than
      `high_freq_factor` times, and goes over smoothly between (Llama 3.1).
    The last three are read by "llama3" alone.
    """

    kind: Literal["linear", "llama3"] = "linear"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context: int = 8192

    def __post_init__(self):
        if self.factor < 1:
            raise ConfigError(f"rope_scaling factor={self.factor}: must be at least 1")
        if not 0 < self.low_freq_factor < self.high_freq_factor:
            raise ConfigError(
                f"rope_scaling low_freq_factor={self.low_freq_factor}, high_freq_factor={self.high_freq_factor}: the "
                "first must be above 0 and below the second"
            )
        if self.original_context < 1:
            raise ConfigError(f"rope_scaling original_context={self.original_context}: must be at least 1")

    def scaled(self, frequency: Float[np.ndarray, " c"]) -> Float[np.ndarray, " c"]:
        """The angles that channels turn a token, from those without scaling."""
        slow = frequency / np.float32(self.factor)
        if self.kind == "linear":
            return slow
        turns = self.original_context * frequency / (2 * math.pi)
        share = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        share = np.clip(share, 0.0, 1.0).astype(np.float32)
        return (1 - share) * slow + share * frequency


def frequencies(
    channels: int, theta: float, scaling: RopeScaling | None = None
) -> Float[np.ndarray, " half"]:
    """Angle that each of half the channels of a head turns a token: theta^(-2i / channels), scaled."""
    exponent = np.arange(0, channels, 2, dtype=np.float32) / np.float32(channels)
    frequency = (1.0 / np.float32(theta) ** exponent).astype(np.float32)
    return frequency if scaling is None else scaling.scaled(frequency)


def rotate(
    x: Float[Array, "*rows l h c"],
    positions: Int[Array, "*rows l"],
    theta: float,
    scaling: RopeScaling | None = None,
) -> Float[Array, "*rows l h c"]:
    """Queries or keys of heads, turned by their positions (section 3.2 of the paper).

    Channel i of the first half and channel i of the second half are one pair (the order of Llama and Qwen2), turned by
    position * frequencies[i].
    """
    half = x.shape[-1] // 2
    angle = positions[..., None, None].astype(jnp.float32) * frequencies(x.shape[-1], theta, scaling)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    a, b = x[..., :half].astype(jnp.float32), x[..., half:].astype(jnp.float32)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
