"""Random regularisation, each example's mask drawn from a key of its own.

A mask depends on nothing but (seed, step, row, place in the model): it is the same for any number of devices and
hosts, for a batch split into microbatches, and when features are computed a second time.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from bvl.errors import ConfigError

# One random key an example while training; None in evaluation, where nothing is dropped.
RowKeys = Key[Array, " b"]


def fold(keys: RowKeys | None, place: int | Int[Array, ""]) -> RowKeys | None:
    """Keys for one place of the model, such as a block, so that no two places draw the same mask."""
    return None if keys is None else jax.vmap(jax.random.fold_in, (0, None))(keys, place)


def keys_of_parts(keys: RowKeys | None, count: int) -> RowKeys | None:
    """[b] keys -> [b * count]: each of an example's `count` parts, such as its texts, has its own."""
    if keys is None:
        return None
    each = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)), (0, None))
    return each(keys, jnp.arange(count)).reshape(-1)


def dropout(x: Float[Array, "b ..."], rate: float, keys: RowKeys | None) -> Float[Array, "b ..."]:
    """Zero each element with probability `rate`, scale the others by 1 / (1 - rate)
    (Srivastava et al. 2014, JMLR 15). Without keys or at rate 0: x itself."""
    if keys is None or rate == 0.0:
        return x
    kept = jax.vmap(lambda key: jax.random.bernoulli(key, 1.0 - rate, x.shape[1:]))(keys)
    return jnp.where(kept, x / (1.0 - rate), 0.0).astype(x.dtype)


def drop_path(
    branch: Float[Array, "b ..."], rate: float | Float[Array, ""], keys: RowKeys | None
) -> Float[Array, "b ..."]:
    """Stochastic depth (Huang et al. 2016, arXiv:1603.09382): zero a residual branch of a whole example with
    probability `rate`, scale it by 1 / (1 - rate) otherwise. Without keys: the branch itself."""
    if keys is None:
        return branch
    keep = 1.0 - jnp.asarray(rate, jnp.float32)
    kept = jax.vmap(lambda key: jax.random.bernoulli(key, keep))(keys) / keep
    return branch * kept.astype(branch.dtype).reshape(-1, *[1] * (branch.ndim - 1))


def random_subset(keys: RowKeys, size: int, count: int) -> Int[Array, "b count"]:
    """For each example `count` different indices below `size`, in rising order."""
    order = jax.vmap(lambda key: jax.random.permutation(key, size))(keys)
    return jnp.sort(order[:, :count], axis=1)


def check_rates(where: str, **rates: float) -> None:
    """Raise ConfigError for a rate outside [0, 1)."""
    for name, rate in rates.items():
        if not 0.0 <= rate < 1.0:
            raise ConfigError(f"{where} {name}={rate}: must lie in [0, 1)")
