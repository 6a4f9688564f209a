"""Models and training steps of the benchmarks: bvl's step of `bvl train` over random pairs that are already on the device."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

CLIP_IMAGE = dict(pool="cls", pre_norm=True, patch_bias=False)
# open_clip's name: options of the model; vocabulary and context are as in open_clip's model of that name.
MODELS: dict[str, dict[str, Any]] = {
    "ViT-B-32": dict(
        image=dict(variant="B/32", **CLIP_IMAGE), text=dict(width=512, depth=12, num_heads=8), embed_dim=512
    ),
    "ViT-B-16": dict(
        image=dict(variant="B/16", **CLIP_IMAGE), text=dict(width=512, depth=12, num_heads=8), embed_dim=512
    ),
    "ViT-L-14": dict(
        image=dict(variant="L/14", **CLIP_IMAGE), text=dict(width=768, depth=12, num_heads=12), embed_dim=768
    ),
    "ViT-S-32": dict(
        image=dict(variant="S/32", **CLIP_IMAGE), text=dict(width=384, depth=12, num_heads=6), embed_dim=384
    ),
    "RN50": dict(
        image=dict(variant="RN50"),
        text=dict(width=512, depth=12, num_heads=8),
        embed_dim=1024,
        image_projection="linear_bias",
    ),
    "ViT-B-16-SigLIP": dict(
        image=dict(variant="B/16", pool="map", norm_epsilon=1e-6),
        text=dict(
            width=768,
            depth=12,
            num_heads=12,
            causal=False,
            pool="last",
            attend_padding=True,
            norm_epsilon=1e-6,
        ),
        embed_dim=768,
        image_projection="none",
        text_projection="linear_bias",
        init_bias=-10.0,
    ),
    # Of no one but these benchmarks: ViT-L-14 in miniature, for machines without an accelerator.
    "miniature": dict(
        image=dict(variant="S/32", width=128, depth=2, num_heads=2, mlp_hidden=512, **CLIP_IMAGE),
        text=dict(width=128, depth=2, num_heads=2),
        embed_dim=128,
    ),
}
IMAGE_SIZE = 224


def vocabulary(name: str) -> tuple[int, int]:
    """(vocabulary size, context length) of a model."""
    return (32000, 64) if "SigLIP" in name else (49408, 77)


@dataclasses.dataclass(frozen=True)
class ClipStep:
    """`step(state, {}, batch)` -> (state, metrics) of a program; `batch` is random pairs, on the device."""

    program: Any
    optimizer: Any
    state: Any
    step: Any
    batch: Any

    def compiled(self) -> Any:
        return self.step.lower(self.state, {}, self.batch).compile()


def make_clip_step(
    name: str,
    batch_size: int,
    *,
    dtype: str = "float32",
    remat: str = "none",
    scan: bool = False,
    accumulate: int = 1,
    optim: dict[str, Any] | None = None,
    tasks: dict[str, Any] | None = None,
    abstract: bool = False,
) -> ClipStep:
    """The step of a model of MODELS, by default with AdamW (rate 1e-4, weight decay 0.1, no clipping).

    remat, scan: of both towers' blocks. optim: options of OptimConfig. abstract: shapes in the place of arrays, to
    compile and not to run.
    """
    import jax
    import jax.numpy as jnp
    import numpy as np

    from bvl.data.transforms import Preprocess
    from bvl.mesh import batch_sharding, init_sharded, make_mesh, shardings_of, to_global, unbox
    from bvl.models.resnet import ResNetConfig
    from bvl.models.text import TextConfig
    from bvl.models.vit import ViTConfig
    from bvl.models.vlm import DualEncoder, DualEncoderConfig
    from bvl.tasks.base import ModelInfo
    from bvl.tasks.contrastive import Contrastive
    from bvl.train.optim import OptimConfig, make_optimizer
    from bvl.train.program import Program
    from bvl.train.step import make_train_step

    options = dict(MODELS[name])
    image, text = options.pop("image"), options.pop("text") | dict(remat=remat, scan=scan)
    if name.startswith("RN"):
        config = DualEncoderConfig(image=ResNetConfig(**image), text=TextConfig(**text), **options)
    else:
        image |= dict(remat=remat, scan=scan)
        config = DualEncoderConfig(image=ViTConfig(**image), text=TextConfig(**text), **options)
    mesh = make_mesh()
    vocab_size, context_length = vocabulary(name)
    end_id = vocab_size - 1
    size = (IMAGE_SIZE, IMAGE_SIZE)
    program = Program(
        model=DualEncoder(config, size, vocab_size, context_length, end_id, dtype=jnp.dtype(dtype)),
        preprocess=Preprocess(image_size=IMAGE_SIZE),
        tasks=tasks or {"contrastive": Contrastive(targets="diagonal")},
        info=ModelInfo(config.image.output_width, config.text.width, config.embed_dim, ()),
        mesh=mesh,
        seed=0,
        ema_decay=0.0,
        frozen={},
    )
    default = dict(lr=1e-4, weight_decay=0.1, schedule="constant", warmup_steps=0, clip_norm=None)
    optim_config = OptimConfig(accumulate=accumulate, **(default if optim is None else optim))
    key = jax.random.key(0)
    optimizer = make_optimizer(optim_config, 1000, unbox(jax.eval_shape(program.init_params, key)))
    init = functools.partial(program.init_state, optimizer=optimizer)
    if abstract:
        boxed = jax.eval_shape(init, key)
        shardings = shardings_of(boxed, mesh)
        state = unbox(boxed)
    else:
        state, shardings = init_sharded(init, mesh, key)
    step = make_train_step(program, optimizer, shardings)

    tokens = (batch_size, 1, context_length)
    shapes = {
        "image": ((batch_size, *size, 3), np.uint8),
        "image_valid": ((batch_size,), bool),
        "text": (tokens, np.int32),
        "text_mask": (tokens, bool),
        "text_valid": ((batch_size, 1), bool),
    }
    if abstract:
        batch = {key: jax.ShapeDtypeStruct(*of, sharding=batch_sharding(mesh)) for key, of in shapes.items()}
    else:
        rng = np.random.default_rng(0)
        batch = {key: np.ones(*of) for key, of in shapes.items() if key.endswith(("valid", "mask"))}
        batch["image"] = rng.integers(0, 256, shapes["image"][0], np.uint8)
        batch["text"] = rng.integers(1, end_id - 1, tokens, np.int32)
        batch["text"][:, :, -1] = end_id
        batch = to_global(batch, mesh)
    return ClipStep(program, optimizer, state, step, batch)
