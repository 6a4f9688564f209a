"""A config's training step without its data: the shapes of the batch and of the program, from options alone."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import jax
import jax.numpy as jnp

from bvl.assembly import build_model
from bvl.config import Config
from bvl.data.text import Tokenizer
from bvl.errors import ConfigError
from bvl.runs import RunFolder
from bvl.train.setup import build_program

# Where nobody has said how many classes there are: heads of them weigh little.
ASSUMED_CLASSES = 100


@dataclasses.dataclass(frozen=True)
class TokenizerSizes:
    """What a program needs of a tokenizer that is yet to be trained; the vocabulary may come out smaller."""

    vocab_size: int
    context_length: int
    pad_id: int = 0
    end_id: int = 3
    mask_id: int = 4
    special_ids: tuple[int, ...] = (0, 1, 2, 3, 4)


@dataclasses.dataclass(frozen=True)
class AbstractData:
    """In the place of `bvl.train.setup.Data`. assumed: lines that say what was not known."""

    tokenizer: Any
    classes: tuple[str, ...]
    assumed: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Encoder:
    """In the place of a frozen model's `Components`."""

    model: Any
    preprocess: Any


def abstract_data(config: Config) -> AbstractData:
    """What can be said of tokenizer and classes: from the run folder, else from the options."""
    options, assumed = config.data.tokenizer, []
    run = None if config.workdir is None else RunFolder(config.workdir)
    if run is not None and run.tokenizer.is_file():
        tokenizer = Tokenizer.of(run.tokenizer, options)
    elif options.path is not None:
        tokenizer = Tokenizer.of(options.path, options).with_tokens(config.data.controls.tokens())
    else:
        size = options.vocab_size + len(config.data.controls.tokens())
        tokenizer = TokenizerSizes(size, options.context_length)
        assumed.append(f"the vocabulary has {size} entries, which is the most that data.tokenizer allows")
    classes = config.data.classes
    if classes is None and run is not None and run.classes.is_file():
        classes = tuple(json.loads(run.classes.read_text()))
    if classes is None:
        classes = tuple(map(str, range(ASSUMED_CLASSES)))
        if "labels" in batch_keys(config):
            assumed.append(f"there are {len(classes)} classes; data.classes or a run folder would tell")
    if config.init_from is not None:
        assumed.append("models of init_from fit this config; they were not opened")
    return AbstractData(tokenizer, classes, tuple(assumed))


def abstract_program(config: Config, data: AbstractData, mesh: Any) -> Any:
    """The program of a config. Frozen models are taken for copies of the run's own, since they are not opened."""
    for task in config.tasks.values():
        task.check(config.model)
    own = Encoder(build_model(config, data.tokenizer), config.data.preprocess)
    return build_program(config, data, dict.fromkeys(config.frozen, own), mesh)


def batch_keys(config: Config) -> frozenset[str]:
    """The keys that the tasks of a config read."""
    return frozenset().union(*(task.fields() for task in config.tasks.values()))


def abstract_batch(config: Config, data: AbstractData, rows: int) -> dict[str, jax.ShapeDtypeStruct]:
    """The batch of `rows` rows that the pipeline would build; bvl/data/batch.py says what the keys are."""
    options, regions = config.data, config.data.regions
    height_width = options.preprocess.height_width
    shapes: dict[str, tuple[tuple[int, ...], Any]] = {
        **dict.fromkeys(("row", "record", "source"), ((), jnp.int32)),
        "valid": ((), bool),
        "image": ((*height_width, 3), jnp.uint8),
        "image_valid": ((), bool),
        "image_box": ((4,), jnp.float32),
        "labels": ((len(data.classes),), jnp.float32),
        "label_valid": ((len(data.classes),), bool),
    }
    keys, tokens = batch_keys(config), data.tokenizer.context_length
    k, p = options.texts_per_image, options.controls.num_slots
    shapes |= {
        "text": ((k, tokens), jnp.int32),
        "text_mask": ((k, tokens), bool),
        "text_valid": ((k,), bool),
        "text_id": ((k,), jnp.uint32),
        "prompt": ((k, p), jnp.int32),
        "prompt_mask": ((k, p), bool),
    }
    if any(key.startswith(("region_", "object_", "phrase")) for key in keys):
        grid, shown = regions.grid(height_width), min(tokens, regions.context_length or tokens)
        r, m, n = regions.max_regions, regions.max_objects, regions.max_phrases
        shapes |= {
            "region_valid": ((r,), bool),
            "region_kind": ((r,), jnp.int8),
            "region_box": ((r, 4), jnp.float32),
            "region_point": ((r, 2), jnp.float32),
            "region_mask": ((r, *grid), bool),
            "region_text": ((r, shown), jnp.int32),
            "region_text_mask": ((r, shown), bool),
            "region_prompt": ((r, p), jnp.int32),
            "region_prompt_mask": ((r, p), bool),
            "object_box": ((m, 4), jnp.float32),
            "object_valid": ((m,), bool),
            "object_mask": ((m, *grid), bool),
            "object_mask_valid": ((m,), bool),
            "object_known": ((), bool),
            "phrase": ((n, shown), jnp.int32),
            "phrase_mask": ((n, shown), bool),
            "phrase_valid": ((n,), bool),
            "phrase_id": ((n,), jnp.uint32),
            "phrase_present": ((n,), bool),
            "phrase_known": ((n,), bool),
            "phrase_object": ((n, m), bool),
            "phrase_mark": ((n,), jnp.int32),
            "phrase_pixels": ((n, *grid), bool),
            "phrase_pixels_valid": ((n,), bool),
        }
    wanted = keys | {"row", "record", "source", "valid"}
    if unknown := wanted - shapes.keys():
        raise ConfigError(f"no shape is known for the batch keys {', '.join(sorted(unknown))}")
    return {key: jax.ShapeDtypeStruct((rows, *shapes[key][0]), shapes[key][1]) for key in sorted(wanted)}
