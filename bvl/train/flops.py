"""How many floating-point operations a traced program does."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from jax.extend import core


def count_flops(jaxpr: core.ClosedJaxpr | core.Jaxpr) -> int:
    """Floating-point operations of the matrix products and convolutions of a program, over all devices.

    A multiplication and an addition are two. Work that rematerialisation does again counts; elementwise work does
    not. Every turn of a scan counts, which is why XLA's own count is not used: it takes a loop's body once, and so
    one layer for a stack of them. Of a loop whose length is not known, one turn counts; of branches, the longest.
    """
    jaxpr = jaxpr.jaxpr if isinstance(jaxpr, core.ClosedJaxpr) else jaxpr
    return sum(_flops(eqn) for eqn in jaxpr.eqns)


def _flops(eqn: core.JaxprEqn) -> int:
    name, params = eqn.primitive.name, eqn.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        lhs = eqn.invars[0].aval.shape
        return 2 * eqn.outvars[0].aval.size * math.prod(lhs[axis] for axis in contracted)
    if name == "conv_general_dilated":
        # rhs_spec: output features, input features of one group, then the window.
        _, features, *window = params["dimension_numbers"].rhs_spec
        rhs = eqn.invars[1].aval.shape
        products = eqn.outvars[0].aval.size * rhs[features] * math.prod(rhs[axis] for axis in window)
        # The gradient of a strided convolution reads an image with zeros in between, which cost nothing that matters.
        return 2 * products // math.prod(params["lhs_dilation"])
    inner = [count_flops(jaxpr) for jaxpr in _inner(params)]
    if name == "cond":
        return max(inner)
    if name == "scan":
        return params["length"] * sum(inner)
    if name == "shard_map":
        # Shapes inside are those of one device.
        return math.prod(params["mesh"].shape[axis] for axis in params["newly_manual_axes"]) * sum(inner)
    return sum(inner)


def _inner(params: dict[str, Any]) -> Iterator[core.ClosedJaxpr | core.Jaxpr]:
    for value in params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if isinstance(item, core.ClosedJaxpr | core.Jaxpr):
                yield item
