"""The training step: encode every view once, run the tasks, update. It knows no task by name."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from einops import rearrange
from jax.sharding import Mesh

from bvl.data.transforms import Preprocess
from bvl.errors import ConfigError
from bvl.mesh import batch_sharding, replicated
from bvl.models.vlm import DualEncoder, normalize_image
from bvl.tasks.base import Context, Features, ModelInfo, Task
from bvl.train.optim import init_optimizer


@flax.struct.dataclass
class TrainState:
    """`params` = {"model": ..., "heads": {task: {name: ...}}}; `ema` like params or None; `extra` by task."""

    step: jax.Array
    params: Any
    opt_state: Any
    ema: Any
    extra: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Program:
    """Everything the step is made of, apart from arrays.

    frozen: name -> (model, preprocess) of encoders that are only read.
    """

    model: DualEncoder
    preprocess: Preprocess
    tasks: dict[str, Task]
    info: ModelInfo
    mesh: Mesh
    seed: int
    ema_decay: float
    frozen: dict[str, tuple[DualEncoder, Preprocess]]

    def init_params(self, key: jax.Array) -> Any:
        """Fresh parameters, boxed with their logical axis names."""
        height, width = self.preprocess.height_width
        tokens = jnp.zeros((1, self.model.context_length), jnp.int32)
        image = jnp.zeros((1, height, width, 3), jnp.float32)
        model = self.model.init(jax.random.fold_in(key, 0), image, tokens, tokens == 0)["params"]
        heads: dict[str, Any] = {}
        for i, (name, task) in enumerate(self.tasks.items()):
            for j, (head_name, head) in enumerate(task.heads(self.info).items()):
                head_key = jax.random.fold_in(jax.random.fold_in(key, 1 + i), j)
                variables = head.module.init(head_key, jnp.zeros((1, *head.input_shape), jnp.float32))
                heads.setdefault(name, {})[head_name] = variables["params"]
        return {"model": model, "heads": heads}

    def init_state(self, key: jax.Array, optimizer: optax.GradientTransformation) -> TrainState:
        """A fresh state, boxed; give it to `bvl.mesh.init_sharded`."""
        params = self.init_params(key)
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            params=params,
            opt_state=init_optimizer(optimizer, params),
            # A copy: donated buffers may not be shared.
            ema=jax.tree.map(jnp.copy, params) if self.ema_decay else None,
            extra={name: task.init_extra(self.info) for name, task in self.tasks.items()},
        )

    def views(self) -> dict[str, dict[str, frozenset[str]]]:
        """encoder -> kind -> union of the tasks' needs."""
        union: dict[str, dict[str, frozenset[str]]] = {}
        for task in self.tasks.values():
            for view in task.views():
                if view.encoder != "model" and view.encoder not in self.frozen:
                    raise ConfigError(
                        f"a task reads the frozen encoder {view.encoder!r}: name it in the config's frozen"
                    )
                kinds = union.setdefault(view.encoder, {})
                kinds[view.kind] = kinds.get(view.kind, frozenset()) | view.need
        return union

    def encode(
        self,
        model: DualEncoder,
        preprocess: Preprocess,
        params: Any,
        batch: dict[str, jax.Array],
        kinds: dict[str, frozenset[str]],
    ) -> dict[str, Features]:
        """kind -> features of the batch; texts are flattened to [B * K, T]."""
        out: dict[str, Features] = {}
        if "image" in kinds:
            image = normalize_image(batch["image"], preprocess.mean, preprocess.std, model.dtype)
            out["image"] = model.apply({"params": params}, image, kinds["image"], method="encode_image")
        if "text" in kinds:
            tokens = rearrange(batch["text"], "b k t -> (b k) t")
            mask = rearrange(batch["text_mask"], "b k t -> (b k) t")
            out["text"] = model.apply({"params": params}, tokens, mask, kinds["text"], method="encode_text")
        return out

    def loss(self, params: Any, extra: dict[str, Any], frozen_params: dict[str, Any], batch, rng, step):
        """(weighted sum of the tasks' losses, (metrics, new extra))."""
        views = self.views()
        features = self.encode(self.model, self.preprocess, params["model"], batch, views.get("model", {}))
        frozen = {
            name: jax.lax.stop_gradient(self.encode(*self.frozen[name], frozen_params[name], batch, kinds))
            for name, kinds in views.items()
            if name != "model"
        }
        scale, bias = self.model.apply({"params": params["model"]}, method="logit_scale_and_bias")
        total, metrics, new_extra = jnp.zeros(()), {}, {}
        for i, (name, task) in enumerate(self.tasks.items()):
            heads = {
                head_name: functools.partial(head.module.apply, {"params": params["heads"][name][head_name]})
                for head_name, head in task.heads(self.info).items()
            }
            output = task.loss(
                Context(
                    features=features,
                    frozen=frozen,
                    heads=heads,
                    scale=scale,
                    bias=bias,
                    token_embed=params["model"]["text"]["token_embed"],
                    batch=batch,
                    extra=extra[name],
                    rng=jax.random.fold_in(rng, i),
                    step=step,
                    mesh=self.mesh,
                    info=self.info,
                )
            )
            total += task.weight * output.loss
            new_extra[name] = extra[name] if output.extra is None else output.extra
            metrics[name] = {
                key: jnp.stack(jnp.broadcast_arrays(*map(jnp.float32, pair)))
                for key, pair in output.metrics.items()
            }
        return total, (metrics, new_extra)


def make_train_step(
    program: Program, optimizer: optax.GradientTransformation, state_shardings: Any
) -> Callable[..., tuple[TrainState, dict[str, Any]]]:
    """The compiled step(state, frozen_params, batch) -> (state, metrics); the state's memory is reused.

    Metrics are arrays [total, count]: {"tasks": {task: {name: ...}}, "step": {"loss", "grad_norm"}}. The random key is a function of (seed, step).
    """

    def step(state: TrainState, frozen_params: dict[str, Any], batch: dict[str, jax.Array]):
        rng = jax.random.fold_in(jax.random.key(program.seed), state.step)
        grad = jax.value_and_grad(program.loss, has_aux=True)
        (loss, (metrics, extra)), grads = grad(
            state.params, state.extra, frozen_params, batch, rng, state.step
        )
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        extra = {name: task.after_update(extra[name], params) for name, task in program.tasks.items()}
        ema = state.ema
        if program.ema_decay:
            t = state.step.astype(jnp.float32)
            decay = jnp.minimum(program.ema_decay, (1.0 + t) / (10.0 + t))
            ema = jax.tree.map(lambda e, p: decay * e + (1.0 - decay) * p, ema, params)
        one = jnp.ones(())
        totals = {"loss": jnp.stack([loss, one]), "grad_norm": jnp.stack([optax.tree.norm(grads), one])}
        return TrainState(state.step + 1, params, opt_state, ema, extra), {"tasks": metrics, "step": totals}

    mesh = program.mesh
    return jax.jit(
        step,
        in_shardings=(state_shardings, None, batch_sharding(mesh)),
        out_shardings=(state_shardings, replicated(mesh)),
        donate_argnums=0,
    )
