"""Tasks of the kind that a method brings (a head, state that is no parameter, work after the update, a teacher,
inputs of its own), and a tower with a batch norm."""

import dataclasses
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from bvl.models.features import ImageFeatures
from bvl.models.layers import Dense
from bvl.tasks.base import Context, Head, LossOutput, ModelInfo, Task, View

MOMENTUM = 0.9


@dataclasses.dataclass(frozen=True, kw_only=True)
class Centre(Task):
    """Pulls projected embeddings to their moving mean; `extra` also counts updates and keeps a copy of log_scale.

    teacher: name of a frozen encoder whose embeddings are matched too.
    """

    teacher: str | None = None
    noise: float = 0.0

    def fields(self) -> frozenset[str]:
        return frozenset({"image", "image_valid"})

    def views(self) -> tuple[View, ...]:
        teacher = (View("image", frozenset({"embed"}), self.teacher),) if self.teacher else ()
        return View("image", frozenset({"embed", "tokens"})), *teacher

    def heads(self, info: ModelInfo) -> dict[str, Head]:
        return {"project": Head(Dense(info.embed_dim, names=("embed", None)), ((info.embed_dim,),))}

    def init_extra(self, info: ModelInfo):
        return {
            "mean": jnp.zeros(info.embed_dim),
            "updates": jnp.zeros((), jnp.int32),
            "log_scale": jnp.zeros(()),
        }

    def loss(self, ctx: Context) -> LossOutput:
        embed = ctx.features["image"].embed
        assert ctx.features["image"].tokens is not None
        noise = self.noise * jax.random.normal(ctx.rng, embed.shape)
        distance = jnp.square(ctx.heads["project"](embed) + noise - ctx.extra["mean"]).sum(-1)
        if self.teacher:
            distance += jnp.square(embed - ctx.frozen[self.teacher]["image"].embed).sum(-1)
        count = jnp.float32(len(embed))
        mean = jax.lax.stop_gradient(embed.mean(0))
        extra = ctx.extra | {"mean": MOMENTUM * ctx.extra["mean"] + (1 - MOMENTUM) * mean}
        return LossOutput(
            distance.mean(), {"loss": (distance.sum(), count), "noise": (noise.sum(), count)}, extra
        )

    def after_update(self, extra, params):
        return extra | {"updates": extra["updates"] + 1, "log_scale": params["model"]["log_scale"]}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shifted(Task):
    """Pulls the embeddings of randomly brightened images to zero; each row has a shift of its own."""

    per_example: ClassVar[bool] = True

    def fields(self) -> frozenset[str]:
        return frozenset({"image", "image_valid"})

    def views(self) -> tuple[View, ...]:
        return (View("image", input="shifted/image"),)

    def prepare(self, batch, keys, info):
        shift = jax.vmap(jax.random.uniform)(keys)
        return {"shifted/shift": shift, "shifted/image": batch["image"] + shift[:, None, None, None]}

    def count(self, batch, info):
        return jnp.float32(len(batch["image"]))

    def loss(self, ctx: Context) -> LossOutput:
        squares, count = (
            jnp.square(ctx.features["shifted/image"].embed).sum(-1),
            self.count(ctx.batch, ctx.info),
        )
        return LossOutput(
            squares.mean(),
            {"loss": (squares.sum(), count), "shift": (ctx.batch["shifted/shift"].sum(), count)},
        )


@dataclasses.dataclass(frozen=True)
class BatchNormTower:
    """The smallest image tower with running statistics: the mean colour, normalised over the batch."""

    output_width: ClassVar[int] = 3

    def make(self, *, image_size, dtype):
        return MeanColour()


class MeanColour(nn.Module):
    @nn.compact
    def __call__(self, image, *, keys=None, levels=False, patches=False):
        pooled = image.mean((1, 2))
        mean = self.param("running_mean", nn.initializers.zeros, (3,))
        var = self.param("running_var", nn.initializers.ones, (3,))
        if keys is not None:
            old = mean, var
            mean, var = pooled.mean(0), pooled.var(0)
            for name, before, new in zip(("mean", "var"), old, (mean, var), strict=True):
                self.sow("statistics", f"running_{name}", 0.9 * before + 0.1 * new, reduce_fn=lambda _, x: x)
        pooled = (pooled - mean) * jax.lax.rsqrt(var + 1e-5) * self.param("scale", nn.initializers.ones, (3,))
        return ImageFeatures(pooled=pooled, tokens=pooled[:, None], grid=(1, 1))
