"""The training step: blind to tasks, each view encoded once, a function of (seed, step)."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tasks_for_tests import MOMENTUM, BatchNormTower, Centre, Shifted
from tiny_run import assert_same_trees, fast_compilation, once, tiny_config  # noqa: F401

from bvl.data.phantoms import FINDINGS
from bvl.data.pipeline import Pipeline, training_texts
from bvl.data.sources import RecordSet
from bvl.data.text import Tokenizer
from bvl.errors import ConfigError
from bvl.mesh import MeshConfig, init_sharded, make_mesh, to_global, unbox
from bvl.models.vlm import DualEncoder
from bvl.runs import build_model
from bvl.tasks.base import Head, ModelInfo, View
from bvl.tasks.classify import Classify
from bvl.tasks.contrastive import Contrastive
from bvl.tasks.mlm import MaskedLanguageModel
from bvl.train.optim import OptimConfig, make_optimizer
from bvl.train.parameters import group_of, parameter_name
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


def make_program(
    tasks, *, mesh=None, seed=0, ema_decay=0.0, frozen=None, group_norms=False, image=None, text=None
):
    """`image`, `text`: changes of the towers' options; `image` may also be another tower."""
    config = tiny_config(tasks=tasks)
    towers = {
        "image": dataclasses.replace(config.model.image, **image)
        if isinstance(image, dict)
        else image or config.model.image,
        "text": dataclasses.replace(config.model.text, **(text or {})),
    }
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, **towers))
    tokenizer = data()[0]
    model = build_model(config, tokenizer)
    return Program(
        model=model,
        preprocess=config.data.preprocess,
        tasks=tasks,
        info=ModelInfo(
            config.model.image.output_width,
            config.model.text.width,
            config.model.embed_dim,
            CLASSES,
            vocab_size=tokenizer.vocab_size,
            mask_id=tokenizer.mask_id,
            special_ids=tokenizer.special_ids,
        ),
        mesh=mesh or one_device(),
        seed=seed,
        ema_decay=ema_decay,
        frozen=frozen or {},
        group_norms=group_norms,
    )


def build(program, optim=SGD, init_seed=0):
    """(state, jitted step, optimizer) of a program."""
    key = jax.random.key(init_seed)
    # A mesh does not tell its devices.
    parts = program, optim, [device.id for device in program.mesh.devices.flat]
    optimizer = once(
        "optimizer",
        parts,
        lambda: make_optimizer(optim, 100, unbox(jax.eval_shape(program.init_params, key))),
    )
    state, shardings = init_sharded(
        functools.partial(program.init_state, optimizer=optimizer), program.mesh, key
    )
    step = once("step", parts, lambda: make_train_step(program, optimizer, shardings))
    return state, step, optimizer


def fresh(program, seed=0):
    """Parameters before the first step."""
    return unbox(jax.jit(program.init_params)(jax.random.key(seed)))


def start(program, **options):
    """(state, step function over numpy batches) of a program."""
    state, compiled, _ = build(program, **options)
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
    """All three tasks, an average of the parameters: (state after three steps, metrics, state after two)."""
    state, step = start(make_program(TASKS, ema_decay=0.15))
    metrics, states = [], []
    for batch in data()[1]:
        state, m = step(state, batch)
        metrics.append(jax.tree.map(np.asarray, m))
        states.append(jax.tree.map(np.array, state))
    return states[-1], metrics, states[-2]


def image_embeddings(program, params, batch):
    """Of the batch, by the model with these parameters, as in evaluation."""
    views = {"image": View("image")}
    encode = jax.jit(lambda p: program.encode(program.model, program.preprocess, p, batch, views)[0])
    return encode(params)["image"].embed


def test_a_view_of_what_no_tower_gives():
    View("image", frozenset({"levels", "tokens"}))
    with pytest.raises(ConfigError, match="'mlm/text' needs levels; text towers give embed, pooled, tokens"):
        View("text", frozenset({"levels"}), input="mlm/text")


def test_a_head_of_several_inputs():
    """Of any type, such as the tokens that a decoder reads."""

    class Decoder(nn.Module):
        @nn.compact
        def __call__(self, tokens, image):
            return nn.Embed(7, 4)(tokens).sum(1) + nn.Dense(4)(image)

    params = Head(Decoder(), (jax.ShapeDtypeStruct((3,), jnp.int32), (5,))).init(jax.random.key(0))
    assert jax.tree.map(jnp.shape, params) == {
        "Embed_0": {"embedding": (7, 4)}, "Dense_0": {"kernel": (5, 4), "bias": (4,)}
    }  # fmt: skip


def test_the_step_is_blind_to_tasks():
    state, metrics, _ = three_steps()
    assert int(state.step) == 3
    assert set(state.params["heads"]) == {"labels", "centre"}
    for name in TASKS:
        total, count = metrics[0]["tasks"][name]["loss"]
        assert np.isfinite(total) and count > 0
    assert state.extra["pairs"] is None and state.extra["labels"] is None


def test_weights_of_the_tasks():
    """The total is the weighted sum of the losses, and so is the gradient."""
    _, metrics, _ = three_steps()
    for m in metrics:
        losses = {name: m["tasks"][name]["loss"][0] / m["tasks"][name]["loss"][1] for name in TASKS}
        expected = losses["pairs"] + 0.5 * losses["labels"] + 2.0 * losses["centre"]
        np.testing.assert_allclose(m["step"]["loss"], [expected, 1.0], rtol=1e-5)

    def gradient(weight):
        program = make_program({"labels": Classify(multi_label=True, weight=weight)})
        params = fresh(program)
        loss = lambda p: program.loss(p, {"labels": None}, {}, data()[1][0], jax.random.key(0), 0)[0]  # noqa: E731
        return jax.jit(jax.grad(loss))(params)

    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-7),
                 gradient(3.0), jax.tree.map(lambda g: 3.0 * g, gradient(1.0)))  # fmt: skip


def test_extra_state_and_after_update():
    """`extra` goes from step to step; `after_update` sees the parameters after the update."""
    state, _, before = three_steps()
    extra = state.extra["centre"]
    assert int(extra["updates"]) == 3
    assert extra["log_scale"] == state.params["model"]["log_scale"]
    program = make_program(TASKS)
    embed = image_embeddings(program, before.params["model"], data()[1][2])
    expected = MOMENTUM * before.extra["centre"]["mean"] + (1 - MOMENTUM) * embed.mean(0)
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
    params = fresh(program)
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
    teacher = jax.tree.map(np.asarray, fresh(plain, 5))["model"]
    program = make_program(
        {"centre": Centre(teacher="teacher")}, frozen={"teacher": (plain.model, plain.preprocess)}
    )
    batch = data()[1][0]
    params = fresh(program)
    extra = {"centre": program.tasks["centre"].init_extra(program.info)}

    def loss(params, teacher):
        return program.loss(params, extra, {"teacher": teacher}, batch, jax.random.key(0), 0)[0]

    value, (own, others) = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(params, teacher)
    assert not any(jnp.any(g) for g in jax.tree.leaves(others))
    assert any(jnp.any(g) for g in jax.tree.leaves(own["model"]["image"]))

    image, there = (image_embeddings(program, p, batch) for p in (params["model"], teacher))
    head = params["heads"]["centre"]["project"]
    expected = jnp.square(image @ head["kernel"] + head["bias"]).sum(-1) + jnp.square(image - there).sum(-1)
    np.testing.assert_allclose(value, expected.mean(), rtol=1e-4)

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
    expected = jax.tree.map(lambda p, g: p - 0.1 * np.asarray(g), before, grads)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), state.params, expected)
    np.testing.assert_allclose(metrics["step"]["grad_norm"], [optax.tree.norm(grads), 1.0], rtol=1e-4)


def named(tree):
    return {parameter_name(path): np.asarray(x) for path, x in jax.tree_util.tree_leaves_with_path(tree)}


def assert_close(actual, expected, tolerance=1e-5):
    """max |a - b| <= tolerance * max |b| of every array: the same sums in another order, in float32."""
    largest = max(np.abs(b).max() for b in expected.values())
    for name, b in expected.items():
        # Biases of keys have no gradient but rounding; arrays that are all but zero are measured by the largest.
        error = np.abs(actual[name] - b).max() / max(np.abs(b).max(), 1e-2 * largest)
        assert error <= tolerance, f"{name}: {error:.2e}"


FREEZE_TEXT = dataclasses.replace(SGD, name="adam", lr=1e-3, freeze=("^model/text/",))


def test_a_frozen_tower_costs_no_gradient_and_no_state():
    """It also draws no dropout: its features are those of an evaluation."""
    program = make_program({"pairs": TASKS["pairs"]}, text={"dropout": 0.5}, ema_decay=0.5)
    flops = {}
    for optim in (dataclasses.replace(FREEZE_TEXT, freeze=()), FREEZE_TEXT):
        state, compiled, optimizer = build(program, optim)
        batch = to_global(data()[1][0], program.mesh)
        flops[optim.freeze] = compiled.lower(state, {}, batch).compile().cost_analysis()["flops"]
        shapes = named(state.params)
        kept = sum(x.size for x in jax.tree.leaves(state.opt_state) if x.ndim)
        trained = sum(x.size for name, x in shapes.items() if optimizer.trains(name) and x.ndim)
        assert kept == 2 * trained
    frozen = {name: x for name, x in shapes.items() if name.startswith("model/text/")}
    # The backward pass is two thirds of a tower's work, and here the text tower's is most of all.
    assert flops[FREEZE_TEXT.freeze] < 0.6 * flops[()]

    def loss(program, **options):
        run = lambda p: program.loss(p, {"pairs": None}, {}, data()[1][0], jax.random.key(0), 0, **options)  # noqa: E731
        return jax.jit(run)(state.params)[0]

    plain = make_program({"pairs": TASKS["pairs"]})
    np.testing.assert_array_equal(loss(program, trains=optimizer.trains), loss(plain))

    for _ in range(2):
        state, metrics = compiled(state, {}, batch)
    after, average = named(state.params), named(state.ema)
    for name, x in frozen.items():
        np.testing.assert_array_equal(after[name], x, err_msg=name)
        np.testing.assert_array_equal(average[name], x, err_msg=name)
    assert np.abs(after["model/text_projection/kernel"] - shapes["model/text_projection/kernel"]).max() > 0


# A rate at which rounding of the parameters says little about the gradients read off their change.
LARGE = 100.0
MICROBATCHED = {
    "labels": Classify(multi_label=True, weight=0.5, class_weights={CLASSES[0]: 3.0}, label_smoothing=0.1),
    "one": Classify(class_weights={CLASSES[1]: 2.0}),
    "mlm": MaskedLanguageModel(),
}


def with_gaps(batch):
    """Rows 0 and 4, of four microbatches the whole first one, have no labels; row 3 has no image."""
    label_valid, image_valid = batch["label_valid"].copy(), batch["image_valid"].copy()
    label_valid[[0, 4]], image_valid[3] = False, False
    labels = batch["labels"].copy()
    labels[5:] = np.eye(len(CLASSES))[[0, 1, 2]]
    return batch | {
        "label_valid": label_valid,
        "image_valid": image_valid,
        "labels": labels.astype(np.float32),
    }


def test_microbatches_add_up_to_the_batch():
    """Values and gradients, with unequal counts, an empty microbatch and dropout in both towers."""
    program = make_program(
        MICROBATCHED, image={"dropout": 0.3, "drop_path": 0.3}, text={"dropout": 0.3, "causal": False}
    )
    batch = with_gaps(data()[1][0])
    results = {}
    for accumulate in (1, 4):
        state, step = start(program, optim=dataclasses.replace(SGD, lr=LARGE, accumulate=accumulate))
        before = named(state.params)
        state, metrics = step(state, batch)
        gradient = {name: (before[name] - x) / LARGE for name, x in named(state.params).items()}
        results[accumulate] = gradient, named(metrics), int(state.step)
    assert_close(results[4][0], results[1][0])
    for name, value in results[1][1].items():
        np.testing.assert_allclose(results[4][1][name], value, rtol=1e-5, err_msg=name)
    assert results[4][2] == results[1][2] == 1
    without = jax.jit(
        lambda p: program.loss(
            p, dict.fromkeys(MICROBATCHED), {}, program.prepare(batch, jax.random.key(0)), jax.random.key(0), 0,
            trains=lambda name: False,
        )[0]
    )(state.params)  # fmt: skip
    assert abs(without - results[1][1]["step/loss"][0]) > 1e-3, "dropout does something"


def test_batches_that_cannot_be_split():
    state, step = start(
        make_program({"labels": TASKS["labels"]}), optim=dataclasses.replace(SGD, accumulate=3)
    )
    with pytest.raises(ConfigError, match="batch_size=8 cannot be split into optim.accumulate=3"):
        step(state, data()[1][0])


def test_masks_belong_to_rows():
    """Rows in another order have the same masks; another step has others; each text of an image has its own, and so
    has each input of a row."""
    program = make_program({"pairs": TASKS["pairs"]}, image={"dropout": 0.3}, text={"dropout": 0.3})
    params = fresh(program)["model"]
    batch = {key: value[:3] for key, value in data()[1][0].items()}
    batch |= {key: np.repeat(batch[key], 2, axis=1) for key in ("text", "text_mask")}
    batch["twin"] = batch["image"]
    views = program.views()["model"] | {"twin": View("image", input="twin")}

    @jax.jit
    def encode(batch, rng):
        keys = program.row_keys(batch, rng)
        features, _ = program.encode(
            program.model,
            program.preprocess,
            params,
            batch,
            views,
            keys={"image": keys, "text": keys},
        )
        return features["image"].embed, features["text"].embed, features["twin"].embed

    image, text, twin = encode(batch, jax.random.key(0))
    assert np.abs(twin - image).max() > 1e-2
    backward = {key: value[::-1] for key, value in batch.items()}
    image_again, text_again, _ = encode(backward, jax.random.key(0))
    np.testing.assert_allclose(image_again[::-1], image, atol=1e-6)
    np.testing.assert_allclose(text_again.reshape(3, 2, -1)[::-1].reshape(text.shape), text, atol=1e-6)
    assert np.abs(encode(batch, jax.random.key(1))[0] - image).max() > 1e-2
    assert np.abs(text[::2] - text[1::2]).max() > 1e-2
    # Without keys nothing is dropped.
    plain = jax.jit(
        lambda p: program.encode(program.model, program.preprocess, p, batch, program.views()["model"])[0]
    )(params)
    np.testing.assert_allclose(plain["text"].embed[::2], plain["text"].embed[1::2], atol=1e-6)


def test_a_task_may_prepare_inputs_of_its_own():
    """They are encoded beside the batch's own, drawn by row, and other tasks see them."""
    program = make_program({"shifted": Shifted(), "labels": TASKS["labels"]})
    assert set(program.views()["model"]) == {"shifted/image", "image"}
    _, metrics = run(program, data()[1][:1])
    batch = program.prepare(data()[1][0], jax.random.fold_in(jax.random.key(0), 0))
    np.testing.assert_allclose(
        metrics[0]["tasks"]["shifted"]["shift"][0], batch["shifted/shift"].sum(), rtol=1e-6
    )
    assert len(np.unique(batch["shifted/shift"])) == 8
    half = program.prepare(
        {k: v[4:] for k, v in data()[1][0].items()}, jax.random.fold_in(jax.random.key(0), 0)
    )
    np.testing.assert_array_equal(half["shifted/shift"], batch["shifted/shift"][4:])
    with pytest.raises(ConfigError, match="'b' makes the batch key 'shifted/shift', which is there already"):
        make_program({"a": Shifted(), "b": Shifted()}).prepare(data()[1][0], jax.random.key(0))


@pytest.mark.parametrize("accumulate", (1, 2))
def test_statistics_of_batch_norms(accumulate):
    """Moved by the step and not by the optimiser; averaged with the parameters; with microbatches their mean."""
    tower = BatchNormTower()
    program = make_program({"labels": TASKS["labels"]}, image=tower, ema_decay=0.5)
    optim = dataclasses.replace(SGD, name="adamw", weight_decay=0.5, accumulate=accumulate)
    state, step = start(program, optim=optim)
    assert not any("running" in name for name in named(jax.tree.map(np.asarray, state.opt_state)))
    state, _ = step(state, data()[1][0])
    pixels = np.asarray(data()[1][0]["image"], np.float64) / 255.0
    scaled = ((pixels - program.preprocess.mean) / program.preprocess.std).mean((1, 2))
    parts = [scaled[i::accumulate] for i in range(accumulate)]
    expected = {
        "mean": 0.9 * 0.0 + 0.1 * np.mean([part.mean(0) for part in parts], axis=0),
        "var": 0.9 * 1.0 + 0.1 * np.mean([part.var(0) for part in parts], axis=0),
    }
    for name, value in expected.items():
        np.testing.assert_allclose(state.params["model"]["image"][f"running_{name}"], value, rtol=1e-4)
        start_value = np.float32(name == "var")
        average = 0.1 * start_value + 0.9 * value
        np.testing.assert_allclose(state.ema["model"]["image"][f"running_{name}"], average, rtol=1e-4)


def test_norms_by_group():
    program = make_program(TASKS, group_norms=True)
    state, step = start(program, optim=dataclasses.replace(SGD, freeze=("^model/text/",)))
    before = named(state.params)
    state, metrics = step(state, data()[1][0])
    norms = {name: float(total) for name, (total, count) in metrics["step"].items() if count == 1}
    groups = {"image", "projections", "logits", "heads/labels", "heads/centre"}
    assert set(norms) == {"loss", "grad_norm"} | {
        f"{k}_norm/{g}" for k in ("grad", "update", "param") for g in groups
    }
    after = named(state.params)
    for group in groups:
        names = [name for name in after if group_of(name) == group]
        length = lambda tree: np.sqrt(sum(np.square(tree[name]).sum() for name in names))  # noqa: B023, E731
        np.testing.assert_allclose(norms[f"param_norm/{group}"], length(after), rtol=1e-4)
        np.testing.assert_allclose(
            norms[f"update_norm/{group}"], SGD.lr * norms[f"grad_norm/{group}"], rtol=1e-4
        )
        change = length({name: after[name] - before[name] for name in names})
        np.testing.assert_allclose(change, norms[f"update_norm/{group}"], rtol=1e-2, atol=1e-6)
    total = np.sqrt(sum(norms[f"grad_norm/{group}"] ** 2 for group in groups))
    np.testing.assert_allclose(norms["grad_norm"], total, rtol=1e-4)


def test_a_schedule_free_average_is_what_is_evaluated():
    """`ema` holds the optimiser's average x = (y - (1 - b1) z) / b1 and not the parameters y of the gradient."""
    program = make_program({"labels": TASKS["labels"]})
    optim = dataclasses.replace(SGD, name="contrib.schedule_free_adamw", lr=1e-2, freeze=("^model/text/",))
    state, compiled, optimizer = build(program, optim)
    assert_same_trees(jax.tree.map(np.asarray, state.ema), jax.tree.map(np.asarray, state.params))
    for batch in data()[1][:2]:
        state, _ = compiled(state, {}, to_global(batch, program.mesh))
    average, params = named(state.ema), named(state.params)
    assert_close(average, named(optimizer.eval_params(state.opt_state, state.params)))
    name = "model/image/patch_embed/kernel"
    assert np.abs(average[name] - params[name]).max() > 1e-4
    np.testing.assert_array_equal(average["model/text/token_embed"], params["model/text/token_embed"])
