"""Parameters of another model for this run's image size, vocabulary and context."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float

from bvl.config import Config
from bvl.mesh import place, replicated
from bvl.models.grid import resize_positions
from bvl.models.vit import ViTConfig

# Tables whose rows are told by their number alone; what is added to a vocabulary stands at its end.
_ROWS = re.compile(r"model/(text|decoder)/token_embed$|model/decoder/head$")
_POSITIONS = re.compile(r"model/(text|decoder)/positions$")


def stretched_positions(table: Float[Array, "n d"], rows: int, keep: int) -> Float[Array, "m d"]:
    """A table of text positions for a longer context: the first `keep` rows stay, the others are stretched.

    Row p from `keep` on is the linear interpolation of the old table at keep + (p - keep) * (n - keep) / (m - keep);
    behind the last old row its last slope goes on (Long-CLIP: Zhang et al. 2024, arXiv:2403.15378, section 3.1; 77 rows
    to 248 there, 20 kept).
    """
    old = len(table)
    at = keep + jnp.arange(rows - keep) * ((old - keep) / (rows - keep))
    below = jnp.clip(jnp.floor(at).astype(jnp.int32), 0, old - 2)
    share = (at - below)[:, None].astype(table.dtype)
    return jnp.concatenate([table[:keep], table[below] * (1 - share) + table[below + 1] * share])


def fitted(
    name: str, value: Any, fresh: Any, there: Config, here: Config, mesh: Mesh, note: Callable[[str], None]
) -> Any:
    """A parameter of another model for this one's image size, vocabulary and context; `note` is told what was done."""
    if name.startswith("model/image/") and name.endswith("/positions"):
        grids = [_position_grid(c) for c in (there, here)]
        if grids[0] != grids[1]:
            note(f"{name}: resampled from a grid of {grids[0]} to {grids[1]}")
            # As the other model itself reads images of this size.
            how = (
                there.model.image.position_resize if isinstance(there.model.image, ViTConfig) else "antialias"
            )
            value = resize_positions(jnp.asarray(value), *grids, how=how)
        return value
    if value.shape[1:] != fresh.shape[1:] or len(value.shape) != 2:
        return value
    rows = len(fresh)
    if _ROWS.search(name) and len(value) < rows:
        note(f"{name}: {rows - len(value)} fresh rows behind {len(value)}")
        return _grown(value, fresh, mesh)
    if not _POSITIONS.search(name) or rows == len(value):
        return value
    # Controls stand in front of a decoder's text, and positions are counted from the first of them: what they add is
    # no longer text.
    slots = here.data.controls.num_slots - there.data.controls.num_slots if "decoder" in name else 0
    stretched = rows - max(slots, 0)
    if stretched > len(value) and _longer_text(name, there, here):
        keep = min(here.init_kept_positions, len(value) // 2)
        note(f"{name}: the first {keep} of {len(value)} rows kept, the others stretched to {stretched} rows")
        value = stretched_positions(jnp.asarray(value), stretched, keep)
    if rows > len(value):
        note(f"{name}: {rows - len(value)} fresh rows behind {len(value)}")
        return _grown(value, fresh, mesh)
    if rows < len(value):
        note(f"{name}: the first {rows} of {len(value)} rows")
    return value[:rows]


def _position_grid(config: Config) -> tuple[int, int]:
    image, size = config.model.image, config.data.preprocess.height_width
    return image.position_grid(size) if isinstance(image, ViTConfig) else image.grid(size)


def _longer_text(name: str, there: Config, here: Config) -> bool:
    """Whether more positions are wanted for longer texts, or only for more controls."""
    return "decoder" not in name or here.data.tokenizer.context_length > there.data.tokenizer.context_length


def _grown(value: Any, fresh: Any, mesh: Mesh) -> Any:
    return jnp.concatenate([place(value, replicated(mesh)), fresh[len(value) :]])
