"""A task of the kind that a method brings: a head, state that is no parameter, work after the update, a teacher."""

import dataclasses

import jax
import jax.numpy as jnp

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
        return {"project": Head(Dense(info.embed_dim, names=("embed", None)), (info.embed_dim,))}

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
