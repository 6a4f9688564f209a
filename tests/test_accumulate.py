"""Two-pass accumulation: tasks that compare rows get the gradient of the whole batch from microbatches."""

import dataclasses
import functools
import logging

import jax
import numpy as np
import pytest
from tasks_for_tests import Centre
from test_step import (
    LARGE,
    SGD,
    TASKS,
    assert_close,
    build,
    data,
    fast_compilation,  # noqa: F401
    fresh,
    make_program,
    named,
    one_device,
    with_gaps,
)

from bvl.errors import ConfigError
from bvl.mesh import to_global
from bvl.tasks.classify import Classify
from bvl.tasks.contrastive import Contrastive
from bvl.tasks.mosaic import Mosaic
from bvl.train.lora import Adapter, LoraConfig
from bvl.train.program import Program
from bvl.train.step import check_accumulation

pytestmark = pytest.mark.usefixtures("fast_compilation")

DROPOUT = dict(image={"dropout": 0.3, "drop_path": 0.3}, text={"dropout": 0.3, "causal": False})
MIXED = {
    "pairs": Contrastive(weight=0.7, label_smoothing=0.1),
    "centre": Centre(weight=2.0, noise=0.1, teacher="teacher"),
    "mosaic": Mosaic(grids=(2,)),
    "labels": Classify(multi_label=True, weight=0.5),
}


def one_step(program, accumulate, *, batch=None, frozen=None, **optim):
    """(gradient, metrics, state) of a step."""
    optim = dataclasses.replace(SGD, lr=LARGE, accumulate=accumulate, **optim)
    state, step, _ = build(program, optim)
    before = named(state.params)
    batch = with_gaps(data()[1][0]) if batch is None else batch
    state, metrics = step(state, frozen or {}, to_global(batch, program.mesh))
    gradient = {name: (before[name] - x) / LARGE for name, x in named(state.params).items()}
    return gradient, named(metrics), jax.tree.map(np.asarray, state)


def assert_same_step(parts, whole):
    assert_close(parts[0], whole[0])
    for name, value in whole[1].items():
        np.testing.assert_allclose(parts[1][name], value, rtol=1e-5, atol=1e-6, err_msg=name)


@functools.cache
def sigmoid_step(accumulate):
    """Two texts an image, compared in groups by a sigmoid; low-rank factors; the text tower is frozen."""
    lora = LoraConfig(rank=2, alpha=6.0)
    program = make_program({"pairs": Contrastive(loss_type="sigmoid", groups=2)}, image=DROPOUT["image"])
    config = dataclasses.replace(program.model.config, init_bias=-3.0, init_temperature=0.1)
    program = dataclasses.replace(
        program,
        model=program.model.clone(config=config),
        adapter=Adapter.of(dataclasses.replace(SGD, lora=lora)),
    )
    batch = data()[1][0]
    batch = batch | {
        key: np.concatenate([batch[key], np.roll(batch[key], 1, axis=0)], axis=1)
        for key in ("text", "text_mask", "text_valid", "text_id")
    }
    return one_step(program, accumulate, batch=batch, lora=lora, freeze=("model/text/",))


def test_a_mixed_program():
    """Tasks of both kinds, one with state and a teacher, one with images made of several rows, in both towers dropout."""
    teacher = make_program({"labels": MIXED["labels"]})
    frozen = {"teacher": fresh(teacher, 5)["model"]}
    program = make_program(MIXED, frozen={"teacher": (teacher.model, teacher.preprocess)}, **DROPOUT)
    whole, parts = (one_step(program, count, frozen=frozen) for count in (1, 4))
    assert_same_step(parts, whole)
    extra = [state.extra["centre"] for _, _, state in (parts, whole)]
    np.testing.assert_allclose(extra[0]["mean"], extra[1]["mean"], rtol=1e-5, atol=1e-6)
    assert int(extra[0]["updates"]) == int(extra[1]["updates"]) == 1


def test_sigmoid_in_groups_with_two_texts_low_rank_factors_and_a_frozen_tower():
    whole, parts = sigmoid_step(1), sigmoid_step(2)
    assert_same_step(parts, whole)
    learned = {name for name, x in whole[0].items() if x.any()}
    assert "model/logit_bias" in learned and any(name.startswith("lora/model/image/") for name in learned)
    assert not any("model/text/" in name for name in learned)


def test_masks_must_be_the_same_in_both_passes(monkeypatch):
    """Others in the second pass are seen in the gradient."""
    features = Program.features

    def other_masks(self, params, frozen, batch, rng, *, tasks, **options):
        # The second pass is of all tasks.
        rng = jax.random.split(rng)[0] if tasks is None else rng
        return features(self, params, frozen, batch, rng, tasks=tasks, **options)

    monkeypatch.setattr(Program, "features", other_masks)
    with pytest.raises(AssertionError, match="model/"):
        assert_close(sigmoid_step(4)[0], sigmoid_step(1)[0], 1e-3)


def test_what_is_kept_of_all_rows(caplog):
    with caplog.at_level(logging.WARNING):
        check_accumulation(2, {"pairs": TASKS["pairs"], "labels": TASKS["labels"]}, 8, one_device())
        assert not caplog.records
        check_accumulation(2, {"mosaic": Mosaic()}, 8, one_device())
    assert (
        "task 'mosaic' (Mosaic) compares rows by more than a vector each: patch_embed of all 8 rows"
        in caplog.text
    )
    with pytest.raises(ConfigError, match="batch_size=8 cannot be split into optim.accumulate=3"):
        check_accumulation(3, {}, 8, one_device())
