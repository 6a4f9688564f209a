"""A model with random weights, small enough for any test, put together by hand."""

import jax
import jax.numpy as jnp
import numpy as np

from bvl.config import Config
from bvl.data.controls import Controls
from bvl.data.phantoms import Phantoms
from bvl.data.pipeline import DataConfig, training_texts
from bvl.data.sources import RecordSet, Source
from bvl.data.text import Tokenizer, TokenizerConfig
from bvl.data.transforms import Preprocess
from bvl.mesh import MeshConfig, make_mesh, unbox
from bvl.models.decoder import DecoderConfig
from bvl.models.text import TextConfig
from bvl.models.vit import ViTConfig
from bvl.models.vlm import DualEncoderConfig
from bvl.runs import Components, Encoder, build_model
from bvl.tasks.caption import Caption
from bvl.tasks.classify import Classify
from bvl.tasks.contrastive import Contrastive

PHANTOMS = Phantoms(num_patients=40, image_size=32)
CONTROLS = Controls(sections=("caption", "impression"), lengths=12, quality=3, prompt="view", prompt_tokens=6)


def tiny_components(
    *,
    classes: tuple[str, ...] = (),
    multi_label: bool = False,
    captions: bool = False,
    contrastive: bool = True,
    image_dropout: float = 0.2,
) -> Components:
    """A dual encoder of one layer a tower at 32 px; with `classes`, a head of a task "classify" too.

    captions: a decoder of one layer with a task "caption" and controls of section, length, quality and prompt.
    """
    tasks = {"contrastive": Contrastive()} if contrastive else {}
    if captions:
        tasks["caption"] = Caption(image_dropout=image_dropout)
    if classes:
        tasks["classify"] = Classify(multi_label=multi_label)
    source = Source(phantoms=PHANTOMS)
    if captions:
        source = Source(phantoms=PHANTOMS, text={"caption": 0.5, "impression": 0.5})
    config = Config(
        model=DualEncoderConfig(
            image=ViTConfig("XXS/16", pool="mean", width=16, depth=1, num_heads=2),
            text=TextConfig(width=16, depth=1, num_heads=2),
            decoder=DecoderConfig(width=16, depth=1, num_heads=2) if captions else None,
            embed_dim=8,
        ),
        data=DataConfig(
            train=(source,),
            controls=CONTROLS if captions else Controls(),
            preprocess=Preprocess(image_size=32),
            tokenizer=TokenizerConfig(vocab_size=300, context_length=16),
        ),
        tasks=tasks,
        optim=None,
        steps=1,
        batch_size=8,
    )
    tokenizer = Tokenizer.train(training_texts([RecordSet(source)]), config.data.tokenizer)
    tokenizer = tokenizer.with_tokens(config.data.controls.tokens())
    model = build_model(config, tokenizer)
    tokens = jnp.zeros((1, tokenizer.context_length), jnp.int32)
    images = jnp.zeros((1, 32, 32, 3), jnp.float32)
    # Only the shapes are taken from the model: compiling its initialisers would take longer than all the rest.
    shapes = unbox(jax.eval_shape(model.init, jax.random.key(0), images, tokens, tokens == 0)["params"])
    rng = np.random.default_rng(0)
    values = jax.tree.map(lambda s: jnp.asarray(rng.normal(0, 0.3, s.shape), s.dtype), shapes)
    params = {"model": {**values, "log_scale": jnp.asarray(2.5, jnp.float32)}, "heads": {}}
    if classes:
        kernel = jnp.asarray(rng.normal(size=(16, len(classes))), jnp.float32)
        params["heads"] = {"classify": {"linear": {"kernel": kernel, "bias": jnp.zeros(len(classes))}}}
    mesh = make_mesh(MeshConfig(), devices=jax.local_devices()[:1])
    preprocess = config.data.preprocess
    encoder = Encoder(model, preprocess, mesh)
    return Components(model, params, tokenizer, preprocess, config, classes, encoder, step=7)
