"""Convolution over images, with a formulation for CPU and one for accelerators.

Images are [b, h, w, c] and kernels [kh, kw, c_in / groups, c_out] ("HWIO"; torch stores the same numbers as OIHW).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from bvl.mesh import constrain_rows
from bvl.models.layers import zeros_init

Implementation = Literal["auto", "lax", "matmul"]


def convolve(
    x: Float[Array, "b h w i"],
    kernel: Float[Array, "kh kw i/g o"],
    *,
    stride: int = 1,
    groups: int = 1,
    implementation: Implementation = "auto",
) -> Float[Array, "b h/s w/s o"]:
    """Convolve with (k - 1) / 2 zeros around the image, so that stride 1 keeps the size (k odd).

    implementation: "lax" is XLA's convolution; "matmul" writes 1x1 kernels, depthwise kernels and the kernel
    gradient as matrix products or sums of shifted images; "auto" takes "matmul" on CPU.
    """
    if implementation == "auto":
        implementation = "matmul" if jax.default_backend() == "cpu" else "lax"
    function = {"lax": _convolve_lax, "matmul": _convolve_matmul}[implementation]
    return function(x, kernel, stride=stride, groups=groups)


def _convolve_lax(x: jax.Array, kernel: jax.Array, *, stride: int, groups: int) -> jax.Array:
    pads = [((size - 1) // 2, (size - 1) // 2) for size in kernel.shape[:2]]
    return lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        pads,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )


def _convolve_matmul(x: jax.Array, kernel: jax.Array, *, stride: int, groups: int) -> jax.Array:
    channels, features = x.shape[-1], kernel.shape[-1]
    if kernel.shape[:2] == (1, 1) and groups == 1:
        x = x[:, ::stride, ::stride]
        return jnp.dot(x.reshape(-1, channels), kernel[0, 0]).reshape(*x.shape[:3], features)
    if groups == channels == features:
        taps = kernel.reshape(-1, channels)
        return sum(view * tap for view, tap in zip(_views(x, kernel.shape[:2], stride), taps, strict=True))
    if groups > 1:
        return _convolve_lax(x, kernel, stride=stride, groups=groups)
    return _convolve_patch_gradient(x, kernel, stride)


def _views(x: jax.Array, size: tuple[int, int], stride: int) -> list[jax.Array]:
    """What each tap of the kernel sees: kh x kw shifted images [b, h/s, w/s, c]."""
    rows, cols = -(-x.shape[1] // stride), -(-x.shape[2] // stride)
    x = jnp.pad(x, ((0, 0), *(((k - 1) // 2, (k - 1) // 2) for k in size), (0, 0)))
    last = ((rows - 1) * stride + 1, (cols - 1) * stride + 1)
    return [
        x[:, i : i + last[0] : stride, j : j + last[1] : stride]
        for i in range(size[0])
        for j in range(size[1])
    ]


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _convolve_patch_gradient(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    """XLA's convolution with a kernel gradient of its own: on CPU, XLA's is up to five times slower."""
    return _convolve_lax(x, kernel, stride=stride, groups=1)


def _patch_forward(x, kernel, stride):
    return _convolve_patch_gradient(x, kernel, stride), (x, kernel)


def _patch_backward(stride, residuals, gradient):
    x, kernel = residuals
    (dx,) = jax.vjp(lambda x: _convolve_lax(x, kernel, stride=stride, groups=1), x)[1](gradient)

    # Image by image, so that the patches stay in the cache.
    def add(total, row):
        patches = jnp.concatenate(_views(row[0][None], kernel.shape[:2], stride), axis=-1)
        patches = patches.reshape(-1, patches.shape[-1])
        flat = row[1].reshape(-1, kernel.shape[-1])
        return total + jnp.dot(patches.T, flat, preferred_element_type=jnp.float32), None

    total = jnp.zeros((kernel[..., 0].size, kernel.shape[-1]), jnp.float32)
    total, _ = lax.scan(add, total, (x, gradient))
    return dx, total.reshape(kernel.shape).astype(kernel.dtype)


_convolve_patch_gradient.defvjp(_patch_forward, _patch_backward)


def he_init(*names: str | None) -> Callable[..., Any]:
    """Kernel initialiser keeping the variance of gradients through ReLU (He et al. 2015, eq. 14), with axis names."""
    return nn.with_partitioning(nn.initializers.variance_scaling(2.0, "fan_out", "normal"), names)


class Conv(nn.Module):
    """Convolution that keeps (stride 1) or divides the size of the image; the kernel is stored as HWIO.

    `names` are the logical names of the kernel's input and output channels.
    """

    features: int
    kernel_size: int = 3
    stride: int = 1
    groups: int = 1
    use_bias: bool = False
    names: tuple[str | None, str | None] = (None, "embed")
    implementation: Implementation = "auto"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w i"]) -> Float[Array, "b h/s w/s o"]:
        shape = (self.kernel_size, self.kernel_size, x.shape[-1] // self.groups, self.features)
        kernel = self.param("kernel", he_init(None, None, *self.names), shape)
        y = convolve(
            constrain_rows(x.astype(self.dtype)),
            kernel.astype(self.dtype),
            stride=self.stride,
            groups=self.groups,
            implementation=self.implementation,
        )
        if self.use_bias:
            y += self.param("bias", zeros_init(self.names[1]), (self.features,)).astype(self.dtype)
        return constrain_rows(y)
