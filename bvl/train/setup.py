"""What happens before the first step: data read, tokenizer ready, the state restored or made."""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
import tokenizers
from jax.sharding import Mesh

from bvl.checkpoint import Checkpoints, check_same_shapes
from bvl.config import Config
from bvl.data.batch import Need, needs_of
from bvl.data.pipeline import Pipeline, label_names, training_texts
from bvl.data.sources import RecordSet
from bvl.data.text import END, PAD, START, UNKNOWN, Tokenizer, TokenizerConfig
from bvl.errors import CheckpointError, ConfigError, DataError
from bvl.mesh import replicated, shardings_of, unbox
from bvl.models.grid import resize_positions
from bvl.runs import (
    Components,
    RunFolder,
    build_model,
    check_vocabulary,
    load_components,
    write_atomic,
)
from bvl.tasks.base import ModelInfo
from bvl.train.optim import make_optimizer
from bvl.train.program import Program, TrainState

logger = logging.getLogger(__name__)

# Texts whose length is counted before training; more than this would delay the first step.
COUNTED_TEXTS = 200_000


@dataclasses.dataclass
class Data:
    """What was read and made before the first step."""

    pipeline: Pipeline
    tokenizer: Tokenizer
    classes: tuple[str, ...]
    licences: dict[str, dict[str, int]]


def prepare_data(config: Config, run: RunFolder, start_from: Components | None) -> Data:
    """Open the sources, settle tokenizer and classes, and keep both in the run folder."""
    sources = config.data.sources()
    sets = [RecordSet(source) for source in sources]
    # The order: the run's own tokenizer -> the one of resume_from -> the one of init_from -> the config's file
    # -> trained on the texts.
    options = config.data.tokenizer
    needs = {name: needs_of(task.fields()) for name, task in config.tasks.items()}
    all_needs = frozenset().union(*needs.values())
    regions = config.data.regions if all_needs & {Need.REGIONS, Need.PHRASES} else None
    if run.tokenizer.is_file():
        tokenizer = Tokenizer.load(run.tokenizer, options.context_length)
    elif config.resume_from is not None:
        continued = RunFolder(config.resume_from).tokenizer
        if not continued.is_file():
            raise CheckpointError(f"resume_from={config.resume_from}: no run folder, {continued} is missing")
        tokenizer = Tokenizer.load(continued, options.context_length)
    elif start_from is not None:
        tokenizer = start_from.tokenizer
        if options.path is not None:
            given = Tokenizer.load(options.path, options.context_length, options.lowercase)
            # The file may be the one that the other run added its controls to.
            given = given.with_tokens(start_from.config.data.controls.tokens())
            check_vocabulary(start_from.params["model"], given, f"data.tokenizer.path={options.path}")
            if given.hash != tokenizer.hash:
                raise CheckpointError(
                    f"data.tokenizer.path={options.path} is another tokenizer than that of "
                    f"init_from={config.init_from}: token ids would mean other words; leave the path out"
                )
            tokenizer = given
        tokenizer.context_length = options.context_length
    elif options.path is not None:
        tokenizer = Tokenizer.load(options.path, options.context_length, options.lowercase)
    else:
        if any(text.strip() for text in training_texts(sets, regions=regions)):
            tokenizer = Tokenizer.train(training_texts(sets, config.data.controls, regions), options)
        elif all_needs & {Need.TEXT, Need.REGIONS, Need.PHRASES}:
            for record_set in sets:
                record_set.usable(needs)  # says which fields there are instead
            raise DataError("no training record has a text, and a task reads texts")
        else:
            tokenizer = _special_tokens_only(options)
    tokenizer = tokenizer.with_tokens(config.data.controls.tokens())
    if not run.tokenizer.is_file():
        temporary = run.tokenizer.with_name("tokenizer.json.tmp")
        tokenizer.save(temporary)
        temporary.replace(run.tokenizer)
    texts = [text for text, _ in zip(training_texts(sets), range(COUNTED_TEXTS), strict=False)]
    cut = tokenizer.count_truncated(texts)
    logger.info(
        "text: vocabulary of %d; %d of %d training texts are longer than the context of %d and are cut%s",
        tokenizer.vocab_size,
        cut,
        len(texts),
        tokenizer.context_length,
        " (data.tokenizer.context_length)" if cut else "",
    )
    if regions is not None:
        shown = regions.tokenizer(tokenizer)
        described = list(dict.fromkeys(text for s in sets for text in s.region_texts(regions)))
        cut = shown.count_truncated(described)
        logger.info(
            "regions: %d of %d texts and phrases are longer than the context of %d and are cut%s",
            cut,
            len(described),
            shown.context_length,
            " (data.regions.context_length)" if cut else "",
        )
    classes = config.data.classes if config.data.classes is not None else label_names(sets)
    if run.classes.is_file() and tuple(json.loads(run.classes.read_text())) != classes:
        raise DataError(
            f"{run.path}: the labels of the training records are not those the run was started with ({run.classes})"
        )
    write_atomic(run.classes, json.dumps(list(classes)) + "\n")
    pipeline = Pipeline(
        config.data,
        sets=sets,
        keys_of_tasks={name: task.fields() for name, task in config.tasks.items()},
        tokenizer=tokenizer,
        classes=classes,
        batch_size=config.batch_size,
        seed=config.seed,
    )
    return Data(pipeline, tokenizer, classes, {s.name: s.licences() for s in sets})


def _special_tokens_only(options: TokenizerConfig) -> Tokenizer:
    """For a run whose tasks and records know no text: the text tower and the run folder need some tokenizer."""
    vocab = {token: i for i, token in enumerate((PAD, UNKNOWN, START, END))}
    model = tokenizers.Tokenizer(tokenizers.models.WordPiece(vocab, unk_token=UNKNOWN))
    model.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    return Tokenizer(model, options.context_length)


def place_suites(config: Config) -> dict[str, Any]:
    """The evaluation suites; where data.root took the place of phantoms, theirs make no sense."""
    if config.data.root is None:
        return config.eval.suites
    placed = {name: suite.at_root(config.data.root) for name, suite in config.eval.suites.items()}
    if any(source.phantoms for source in config.data.sources()):
        return placed
    for name in [n for n, suite in placed.items() if suite.reads_phantoms()]:
        logger.warning("suite %s reads phantoms and was left out, since data.root takes their place", name)
        del placed[name]
    return placed


def named_metrics(config: Config) -> dict[str, str]:
    """Option -> the evaluation metric that it names, where it names one."""
    options = {"checkpoint.best": config.checkpoint.best, "eval.stop_metric": config.eval.stop_metric}
    return {option: metric for option, metric in options.items() if metric is not None}


def check_suites(config: Config, suites: dict[str, Any]) -> None:
    """Fail now, not after hours, for what an evaluation could not use."""
    for option, metric in named_metrics(config).items():
        if not any(metric.startswith(f"{name}/") for name in suites):
            raise ConfigError(
                f"{option}={metric!r} is no metric of an evaluation suite; suites are: {', '.join(suites) or 'none'}"
            )
    if config.eval.stop_metric is not None and not config.eval.every:
        raise ConfigError(
            "eval.stop_metric needs evaluations during training: set eval.every to the steps between them"
        )
    for name, suite in suites.items():
        task = getattr(suite, "task", None)
        if task is not None and task not in config.tasks:
            raise ConfigError(
                f"eval.suites.{name} reads the task {task!r}; tasks are {', '.join(config.tasks)}"
            )
        suite.check_config(config)
        suite.check()


def load_frozen(config: Config, tokenizer: Tokenizer) -> dict[str, Components]:
    """The models of the config's `frozen`; raises ConfigError where one reads another vocabulary than this run."""
    frozen = {name: load_components(spec) for name, spec in config.frozen.items()}
    reads_text = {
        view.encoder for task in config.tasks.values() for view in task.views() if view.kind == "text"
    }
    for name, components in frozen.items():
        # Controls come after all words, and stand in no text that a frozen tower reads.
        theirs = components.tokenizer.with_tokens(config.data.controls.tokens())
        if name in reads_text and theirs.hash != tokenizer.hash:
            raise ConfigError(
                f"frozen {name!r} reads another vocabulary than this run: set data.tokenizer.path to "
                f"{config.frozen[name]}/tokenizer.json"
            )
    return frozen


def build_program(config: Config, data: Data, frozen: dict[str, Components], mesh: Mesh) -> Program:
    """What the training step is made of, apart from arrays."""
    return Program(
        model=build_model(config, data.tokenizer),
        preprocess=config.data.preprocess,
        tasks=config.tasks,
        info=ModelInfo(
            config.model.image.output_width,
            config.model.text_width,
            config.model.embed_dim,
            data.classes,
            vocab_size=data.tokenizer.vocab_size,
            mask_id=data.tokenizer.mask_id,
            special_ids=data.tokenizer.special_ids,
            dtype=jnp.dtype(config.precision),
        ),
        mesh=mesh,
        seed=config.seed,
        ema_decay=config.optim.ema_decay,
        frozen={name: (c.model, c.preprocess) for name, c in frozen.items()},
        group_norms=config.log.norms,
    )


@dataclasses.dataclass
class Plan:
    """How a state is made and placed, before any of its arrays exists.

    init: key -> a fresh state, boxed. target: its shapes and types, unboxed, with their shardings.
    """

    init: Callable[[jax.Array], Any]
    optimizer: optax.GradientTransformation
    shardings: Any
    target: Any


def plan_state(config: Config, program: Program) -> Plan:
    """Shapes first, shardings second; arrays come last, in `first_state`."""
    key = jax.random.key(config.seed)
    optimizer = make_optimizer(config.optim, config.steps, unbox(jax.eval_shape(program.init_params, key)))
    init = functools.partial(program.init_state, optimizer=optimizer)
    boxed = jax.eval_shape(init, key)
    shardings = shardings_of(boxed, program.mesh)
    target = jax.tree.map(
        lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), unbox(boxed), shardings
    )
    return Plan(init, optimizer, shardings, target)


def checkpoint_items(state: TrainState, sums: dict[str, Any]) -> dict[str, Any]:
    """The items of a checkpoint. `sums`: metrics since the last logged row, so that a resume logs the same means."""
    items = {
        "params": state.params,
        "rest": {"step": state.step, "opt_state": state.opt_state, "extra": state.extra},
    }
    if state.ema is not None:
        items["ema"] = state.ema
    return items | ({"sums": sums} if sums else {})


def _restore(items: dict[str, Any]) -> tuple[TrainState, dict[str, Any]]:
    rest = items["rest"]
    state = TrainState(rest["step"], items["params"], rest["opt_state"], items.get("ema"), rest["extra"])
    return state, items.get("sums", {})


def _at_image_size(start_from: Components, config: Config) -> Any:
    """The model's parameters of another run, with the image positions resampled to this run's grid."""
    params = start_from.params["model"]
    grids = [_grid(c) for c in (start_from.config, config)]
    is_positions = lambda path: path[-1].key == "positions"  # noqa: E731
    found = [p for p, _ in jax.tree_util.tree_leaves_with_path(params["image"]) if is_positions(p)]
    if grids[0] == grids[1] or not found:
        return params
    logger.info("image positions resampled from a grid of %s to %s", *grids)
    image = jax.tree_util.tree_map_with_path(
        lambda path, x: resize_positions(x, *grids) if is_positions(path) else x, params["image"]
    )
    return {**params, "image": image}


def _with_own_parts(given: Any, fresh: Any) -> Any:
    """The given parameters without a text tower or other part that this model has not; with parts that only it has."""
    own = ("decoder", "region_encoder", "region_decoder")
    kept = {name: value for name, value in given.items() if name in fresh or name not in ("text", *own)}
    for name in own:
        if name in fresh and name not in given:
            logger.info("the %s starts from fresh parameters", name.replace("_", " "))
            kept[name] = fresh[name]
    return kept


# Tables with a row for each id of the vocabulary or each position, which is told by its number alone.
_TABLES = (("text", "token_embed"), ("decoder", "token_embed"), ("decoder", "head"), ("decoder", "positions"))


def _with_own_rows(given: Any, fresh: Any, mesh: Mesh) -> Any:
    """The given parameters with as many ids and decoder positions as this model has, the added ones fresh.

    Controls that the other run had not stand at the vocabulary's end and make the prefix longer; with fewer controls
    the last positions are left out. Tables that differ in more stay as they are.
    """
    out = dict(given)
    for part, name in _TABLES:
        if not all(name in params.get(part, {}) for params in (given, fresh)):
            continue
        old, new = given[part][name], fresh[part][name]
        added = len(new) - len(old)
        if old.shape[1:] != new.shape[1:] or not added or (added < 0 and name != "positions"):
            continue
        if added > 0:
            logger.info("%s/%s: %d fresh rows behind %d", part, name, added, len(old))
            table = jnp.concatenate([jax.device_put(old, replicated(mesh)), new[len(old) :]])
        else:
            logger.info("%s/%s: the first %d of %d rows", part, name, len(new), len(old))
            table = old[: len(new)]
        out[part] = {**out[part], name: table}
    return out


def _grid(config: Config) -> tuple[int, int]:
    """Rows and columns of the image tower's last feature map, which its positions are made for."""
    return config.model.image.grid(config.data.preprocess.height_width)


def first_state(
    config: Config,
    checkpoints: Checkpoints,
    plan: Plan,
    start_from: Components | None,
    tokenizer: Tokenizer,
    mesh: Mesh,
) -> tuple[TrainState, dict[str, Any]]:
    """(state, metric sums) where a run starts, in this order of precedence:

    1. its own newest checkpoint that can be read: everything, step included;
    2. `resume_from`: the newest checkpoint of another run, everything, step included;
    3. `init_from`: the parameters of another run, at step 0 with a fresh optimiser;
    4. fresh parameters from the seed.
    """
    items = checkpoint_items(plan.target, {})
    restored = checkpoints.restore_latest(items, optional={"sums": replicated(mesh)})
    if restored is not None:
        logger.info("resuming from step %d", restored[0])
        return _restore(restored[1])
    if config.resume_from is not None:
        folder = RunFolder(config.resume_from).checkpoints
        if not folder.is_dir():
            raise CheckpointError(f"resume_from={config.resume_from}: no checkpoints there")
        other = Checkpoints(folder, read_only=True, tokenizer=tokenizer.hash)
        try:
            step = other.latest()
            if step is None:
                raise CheckpointError(f"resume_from={config.resume_from}: no complete checkpoint there")
            if step >= config.steps:
                raise ConfigError(
                    f"resume_from={config.resume_from} stands at step {step}: steps={config.steps} leaves nothing to train"
                )
            logger.info("continuing %s from step %d", config.resume_from, step)
            return _restore(other.restore(step, items, optional={"sums": replicated(mesh)}))
        finally:
            other.close()
    fresh = jax.jit(lambda key: unbox(plan.init(key)), out_shardings=plan.shardings)
    state = fresh(jax.random.key(config.seed))
    if start_from is None:
        return state, {}
    own = state.params["model"]
    model_params = _with_own_rows(_with_own_parts(_at_image_size(start_from, config), own), own, mesh)
    check_same_shapes(plan.target.params["model"], model_params, f"init_from={config.init_from}")
    logger.info("parameters from %s, step %d", config.init_from, start_from.step)
    params = {**state.params, "model": jax.device_put(model_params, plan.shardings.params["model"])}
    ema = jax.tree.map(lambda x: x.copy(), params) if state.ema is not None else None
    # Some optimisers keep parameters of their own, which must be these too.
    opt_state = jax.jit(plan.optimizer.init, out_shardings=plan.shardings.opt_state)(params)
    return state.replace(params=params, opt_state=opt_state, ema=ema), {}
