"""What the configs of towers share: shapes by name, sizes given beside a name, and their checks."""

from __future__ import annotations

import difflib
from collections.abc import Collection

from bvl.errors import ConfigError

# (width, depth, num_heads, mlp_hidden)
Sizes = tuple[int, int, int, int]


def nearest_variant(name: str, known: Collection[str]) -> str:
    """The known name most like `name`, whatever the case of letters."""
    by_lower = {variant.lower(): variant for variant in known}
    return by_lower[difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=0.0)[0]]


def check_variant(tower: str, name: str, known: Collection[str]) -> None:
    """Raise ConfigError, with the nearest name, for a variant of the `tower` (image, text) that is not known."""
    if name not in known:
        raise ConfigError(
            f"{tower} variant {name!r}: choose one of {', '.join(known)}; nearest is {nearest_variant(name, known)!r}"
        )


def override_sizes(table: Sizes, given: tuple[int | None, int | None, int | None, int | None]) -> Sizes:
    """(width, depth, num_heads, mlp_hidden) of a table's row with what is given, not None, in its place.

    A width of its own scales the MLP with it, unless that is given too.
    """
    width, depth, num_heads, hidden = (t if g is None else g for t, g in zip(table, given, strict=True))
    return width, depth, num_heads, hidden if given[3] is not None or width == table[0] else 4 * width


def check_sizes(tower: str, sizes: Sizes) -> None:
    """Raise ConfigError for (width, depth, num_heads, mlp_hidden) that no transformer can have."""
    width, _, num_heads, _ = sizes
    if min(sizes) < 1:
        raise ConfigError(f"{tower} width, depth, num_heads, mlp_hidden {sizes}: must be at least 1")
    if width % num_heads:
        raise ConfigError(f"{tower} width {width} is not divisible by num_heads {num_heads}")
