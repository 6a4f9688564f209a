"""The tiny captioner, untrained, with all that describes and finds regions."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from tiny_model import tiny_components

from bvl.api import Model
from bvl.data.pipeline import Pipeline, training_texts
from bvl.data.sources import RecordSet
from bvl.data.text import Tokenizer
from bvl.mesh import unbox
from bvl.models.region_decoder import RegionDecoderConfig
from bvl.models.region_encoder import RegionEncoderConfig
from bvl.models.vit import ViTConfig
from bvl.runs import Encoder, build_model
from bvl.tasks.detection import Detection
from bvl.tasks.grounding import Grounding
from bvl.tasks.region_caption import RegionCaption


@functools.cache
def region_model() -> Model:
    """One model for all tests, so that its programs are compiled once."""
    base = tiny_components(captions=True)
    config = dataclasses.replace(
        base.config,
        model=dataclasses.replace(
            base.config.model,
            image=ViTConfig("XXS/8", pool="mean", width=16, depth=1, num_heads=2),
            region_encoder=RegionEncoderConfig(width=16, output_size=2, num_heads=2),
            region_decoder=RegionDecoderConfig(width=16, depth=1, num_heads=2, pixel_width=8),
        ),
        tasks={
            **base.config.tasks,
            "region_caption": RegionCaption(),
            "grounding": Grounding(),
            "detection": Detection(),
        },
    )
    model = build_model(config, base.tokenizer)
    tokens = jnp.zeros((1, base.tokenizer.context_length), jnp.int32)
    images = jnp.zeros((1, 32, 32, 3), jnp.float32)
    shapes = unbox(jax.eval_shape(model.init, jax.random.key(0), images, tokens, tokens == 0)["params"])
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda s: jnp.asarray(rng.normal(0, 0.3, s.shape), s.dtype), shapes)
    encoder = Encoder(model, config.data.preprocess, base.encoder.mesh)
    params = {"model": params, "heads": {}}
    return Model(dataclasses.replace(base, model=model, params=params, config=config, encoder=encoder))


def first_batch(config):
    """(tokenizer trained on the config's texts, first batch of its tasks)."""
    sets = [RecordSet(source) for source in config.data.sources()]
    texts = training_texts(sets, config.data.controls, config.data.regions)
    tokenizer = Tokenizer.train(texts, config.data.tokenizer)
    pipeline = Pipeline(
        config.data, sets=sets, keys_of_tasks={name: task.fields() for name, task in config.tasks.items()},
        tokenizer=tokenizer, classes=(), batch_size=config.batch_size, seed=0,
    )  # fmt: skip
    ((batch, _),) = pipeline.batches(start=0, stop=1)
    return tokenizer, batch
