"""The training step: blind to tasks, each view encoded once, a function of (seed, step)."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tasks_for_tests import MOMENTUM, Centre
from tiny_run import assert_same_trees, fast_compilation, tiny_config  # noqa: F401

from bvl.data.phantoms import FINDINGS
from bvl.data.pipeline import Pipeline, training_texts
from bvl.data.sources import RecordSet
from bvl.data.text import Tokenizer
from bvl.errors import ConfigError
from bvl.mesh import MeshConfig, init_sharded, make_mesh, to_global, unbox
from bvl.models.vlm import DualEncoder
from bvl.runs import build_model
from bvl.tasks.base import ModelInfo, View
from bvl.tasks.classify import Classify
from bvl.tasks.contrastive import Contrastive
from bvl.train.optim import OptimConfig, make_optimizer
from bvl.train.step import Program, make_train_step

pytestmark = pytest.mark.usefixtures("fast_compilation")

CLASSES = tuple(sorted({name for names in FINDINGS.values() for name in names}))
TASKS = {
    "pairs": Contrastive(),
    "labels": Classify(multi_label=True, weight=0.5),
    "centre": Centre(weight=2.0, noise=0.1),
}
SGD = OptimConfig(name="sgd", lr=0.1, schedule="constant", warmup_steps=0, weight_decay=0.0, clip_norm=None)


@functools.cache
def data():
    config = tiny_config(tasks=TASKS)
    sets = [RecordSet(source) for source in config.data.sources()]
    tokenizer = Tokenizer.train(training_texts(sets), config.data.tokenizer)
    pipeline = Pipeline(
        config.data,
        sets=sets,
        keys_of_tasks={name: task.fields() for name, task in TASKS.items()},
        tokenizer=tokenizer,
        classes=CLASSES,
        batch_size=config.batch_size,
        seed=0,
    )
    return tokenizer, [batch for batch, _ in pipeline.batches(start=0, stop=3)]


@functools.cache
def one_device():
    return make_mesh(MeshConfig(), devices=jax.devices()[:1])


def make_program(tasks, *, mesh=None, seed=0, ema_decay=0.0, frozen=None):
    config = tiny_config(tasks=tasks)
    model = build_model(config, data()[0])
    return Program(
        model=model,
        preprocess=config.data.preprocess,
        tasks=tasks,
        info=ModelInfo(config.model.image.sizes[0], config.model.text.width, config.model.embed_dim, CLASSES),
        mesh=mesh or one_device(),
        seed=seed,
        ema_decay=ema_decay,
        frozen=frozen or {},
    )


def start(program, optim=SGD, init_seed=0):
    """(state, step function over numpy batches) of a program."""
    key = jax.random.key(init_seed)
    optimizer = make_optimizer(optim, 100, unbox(jax.eval_shape(program.init_params, key)))
    state, shardings = init_sharded(
        functools.partial(program.init_state, optimizer=optimizer), program.mesh, key
    )
    compiled = make_train_step(program, optimizer, shardings)
    return state, lambda state, batch, frozen={}: compiled(state, frozen, to_global(batch, program.mesh))  # noqa: B006


def run(program, batches, **options):
    state, step = start(program, **options)
    metrics = []
    for batch in batches:
        state, m = step(state, batch)
        metrics.append(jax.tree.map(np.asarray, m))
    return jax.tree.map(np.asarray, state), metrics


@functools.cache
def three_steps():
    """All three tasks, an average of the parameters, three steps."""
    return run(make_program(TASKS, ema_decay=0.15), data()[1])


def test_the_step_is_blind_to_tasks():
    state, metrics = three_steps()
    assert int(state.step) == 3
    assert set(state.params["heads"]) == {"labels", "centre"}
    for name in TASKS:
        total, count = metrics[0]["tasks"][name]["loss"]
        assert np.isfinite(total) and count > 0
    assert state.extra["pairs"] is None and state.extra["labels"] is None


def test_weights_of_the_tasks():
    """The total is the weighted sum of the losses, and so is the gradient."""
    _, metrics = three_steps()
    for m in metrics:
        losses = {name: m["tasks"][name]["loss"][0] / m["tasks"][name]["loss"][1] for name in TASKS}
        expected = losses["pairs"] + 0.5 * losses["labels"] + 2.0 * losses["centre"]
        np.testing.assert_allclose(m["step"]["loss"], [expected, 1.0], rtol=1e-5)

    def gradient(weight):
        program = make_program({"labels": Classify(multi_label=True, weight=weight)})
        params = unbox(program.init_params(jax.random.key(0)))
        loss = lambda p: program.loss(p, {"labels": None}, {}, data()[1][0], jax.random.key(0), 0)[0]  # noqa: E731
        return jax.jit(jax.grad(loss))(params)

    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-7),
                 gradient(3.0), jax.tree.map(lambda g: 3.0 * g, gradient(1.0)))  # fmt: skip


def test_extra_state_and_after_update():
    """`extra` goes from step to step; `after_update` sees the parameters after the update."""
    state, _ = three_steps()
    extra = state.extra["centre"]
    assert int(extra["updates"]) == 3
    assert extra["log_scale"] == state.params["model"]["log_scale"]
    before, _ = run(make_program(TASKS, ema_decay=0.15), data()[1][:2])
    program = make_program(TASKS)
    features, _ = program.encode(
        program.model, program.preprocess, before.params["model"], data()[1][2], {"image": View("image")}
    )
    expected = MOMENTUM * before.extra["centre"]["mean"] + (1 - MOMENTUM) * features["image"].embed.mean(0)
    np.testing.assert_allclose(extra["mean"], expected, rtol=1e-4, atol=1e-6)


def test_moving_average_of_the_parameters():
    """decay = min(ema_decay, (1 + t) / (10 + t)): 0.1 at the first step, here 0.15 at the second."""
    program = make_program({"labels": TASKS["labels"]}, ema_decay=0.15)
    state, step = start(program)
    first = jax.tree.map(np.asarray, state.params)
    assert_same_trees(jax.tree.map(np.asarray, state.ema), first)
    expected = first
    for decay, batch in zip((0.1, 0.15), data()[1][:2], strict=True):
        state, _ = step(state, batch)
        expected = jax.tree.map(lambda e, p, d=decay: d * e + (1 - d) * np.asarray(p), expected, state.params)
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7), state.ema, expected)
    assert (
        make_program(TASKS).ema_decay == 0 and start(make_program({"labels": TASKS["labels"]}))[0].ema is None
    )


def test_every_view_is_encoded_once(monkeypatch):
    """Three tasks read images, one of them texts and a teacher's images: three encodings, of the union of needs."""
    calls = []
    for kind in ("image", "text"):
        method = getattr(DualEncoder, f"encode_{kind}")

        def counted(self, *args, method=method, kind=kind):
            calls.append((kind, [need for need in args if isinstance(need, frozenset)]))
            return method(self, *args)

        monkeypatch.setattr(DualEncoder, f"encode_{kind}", counted)
    tasks = TASKS | {"centre": Centre(teacher="teacher")}
    plain = make_program(tasks)
    program = make_program(tasks, frozen={"teacher": (plain.model, plain.preprocess)})
    params = jax.eval_shape(lambda k: unbox(plain.init_params(k)), jax.random.key(0))
    extra = {name: task.init_extra(program.info) for name, task in tasks.items()}
    calls.clear()
    jax.eval_shape(
        program.loss, params, extra, {"teacher": params["model"]}, data()[1][0], jax.random.key(0), 0
    )
    assert sorted(calls, key=str) == sorted(
        [
            ("image", [frozenset({"embed", "pooled", "tokens"})]),
            ("text", [frozenset({"embed"})]),
            ("image", [frozenset({"embed"})]),
        ],
        key=str,
    )


def test_a_text_is_not_encoded_where_no_task_reads_it():
    program = make_program({"labels": TASKS["labels"]})
    assert program.views() == {"model": {"image": View("image", frozenset({"pooled"}))}}
    params = unbox(program.init_params(jax.random.key(0)))
    batch = {k: v for k, v in data()[1][0].items() if not k.startswith("text")}
    loss = lambda p: program.loss(p, {"labels": None}, {}, batch, jax.random.key(0), 0)[0]  # noqa: E731
    grads = jax.jit(jax.grad(loss))(params)
    assert not any(jnp.any(g) for g in jax.tree.leaves(grads["model"]["text"]))


def test_the_step_is_a_function_of_seed_and_step():
    """Noise differs from step to step and from seed to seed, and not from run to run."""
    noise = lambda metrics: [float(m["tasks"]["centre"]["noise"][0]) for m in metrics]  # noqa: E731
    tasks = {"centre": TASKS["centre"]}
    same = [data()[1][0]] * 2
    state, first = run(make_program(tasks), same)
    state_again, again = run(make_program(tasks), same)
    assert_same_trees(state_again, state)
    assert noise(first) == noise(again) and len(set(noise(first))) == 2
    assert not set(noise(first)) & set(noise(run(make_program(tasks, seed=1), same)[1]))
    # The second step alone, from where the first ended.
    state, step = start(make_program(tasks))
    state, _ = step(dataclasses.replace(state, step=state.step + 1), data()[1][0])
    assert noise([jax.tree.map(np.asarray, _)]) == noise(first)[1:]


def test_two_tasks_of_one_kind_have_their_own_noise():
    tasks = {"a": Centre(noise=0.1), "b": Centre(noise=0.1)}
    _, metrics = run(make_program(tasks), data()[1][:1])
    assert metrics[0]["tasks"]["a"]["noise"][0] != metrics[0]["tasks"]["b"]["noise"][0]


def test_a_frozen_encoder_is_read_only():
    """Its features are those of its own parameters; it gets no gradient and does not change."""
    plain = make_program({"labels": TASKS["labels"]})
    teacher = jax.tree.map(np.asarray, unbox(plain.init_params(jax.random.key(5))))["model"]
    program = make_program(
        {"centre": Centre(teacher="teacher")}, frozen={"teacher": (plain.model, plain.preprocess)}
    )
    batch = data()[1][0]
    params = unbox(program.init_params(jax.random.key(0)))
    extra = {"centre": program.tasks["centre"].init_extra(program.info)}

    def loss(params, teacher):
        return program.loss(params, extra, {"teacher": teacher}, batch, jax.random.key(0), 0)[0]

    own, others = jax.jit(jax.grad(loss, argnums=(0, 1)))(params, teacher)
    assert not any(jnp.any(g) for g in jax.tree.leaves(others))
    assert any(jnp.any(g) for g in jax.tree.leaves(own["model"]["image"]))

    def embed(params):
        views = {"image": View("image")}
        return program.encode(program.model, program.preprocess, params, batch, views)[0]["image"].embed

    image, there = embed(params["model"]), embed(teacher)
    head = params["heads"]["centre"]["project"]
    expected = jnp.square(image @ head["kernel"] + head["bias"]).sum(-1) + jnp.square(image - there).sum(-1)
    np.testing.assert_allclose(loss(params, teacher), expected.mean(), rtol=1e-4)

    state, step = start(program)
    kept = jax.tree.map(jnp.asarray, teacher)
    for _ in range(2):
        state, _ = step(state, batch, {"teacher": kept})
    assert_same_trees(jax.tree.map(np.asarray, kept), teacher)


def test_a_frozen_encoder_that_is_not_named():
    with pytest.raises(ConfigError, match="frozen encoder 'teacher'.*config's frozen"):
        make_program({"centre": Centre(teacher="teacher")}).views()


def test_sgd_moves_by_the_gradient():
    """The update uses the gradient of the weighted sum, in the same step."""
    program = make_program({"labels": TASKS["labels"]})
    state, step = start(program)
    before = jax.tree.map(np.asarray, state.params)
    loss = lambda p: program.loss(p, {"labels": None}, {}, data()[1][0], jax.random.key(0), 0)[0]  # noqa: E731
    grads = jax.jit(jax.grad(loss))(before)
    state, metrics = step(state, data()[1][0])
    expected = jax.tree.map(lambda p, g: p - 0.1 * g, before, grads)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), state.params, expected)
    np.testing.assert_allclose(metrics["step"]["grad_norm"], [optax.tree.norm(grads), 1.0], rtol=1e-4)
