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
import numpy as np
import optax
from jax.sharding import Mesh

from bvl import hosts
from bvl.checkpoint import Checkpoints
from bvl.config import Config
from bvl.data.batch import Need, needs_of
from bvl.data.pipeline import Pipeline, label_names, training_texts
from bvl.data.sources import RecordSet
from bvl.data.text import Tokenizer
from bvl.errors import CheckpointError, ConfigError, DataError
from bvl.mesh import place, replicated, shardings_of, unbox
from bvl.runs import (
    Components,
    RunFolder,
    build_model,
    load_components,
    write_atomic,
)
from bvl.tasks.base import ModelInfo
from bvl.train.guard import Guard
from bvl.train.initial import Start, initial_params, warn_of_untrained
from bvl.train.lora import Adapter
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


def prepare_data(config: Config, run: RunFolder, start: Start | None) -> Data:
    """Open the sources, settle tokenizer and classes, and keep both in the run folder."""
    sources = config.data.sources()
    sets = [RecordSet(source) for source in sources]
    options = config.data.tokenizer
    needs = {name: needs_of(task.fields()) for name, task in config.tasks.items()}
    all_needs = frozenset().union(*needs.values())
    regions = config.data.regions if all_needs & {Need.REGIONS, Need.PHRASES} else None
    # The first host settles the tokenizer; all read what it has written.
    hosts.on_first(lambda: _settle_tokenizer(config, run, start, sets, needs, regions))
    tokenizer = Tokenizer.of(run.tokenizer, options).with_tokens(config.data.controls.tokens())
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
    hosts.on_first(lambda: _keep_classes(run, classes))
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


def _keep_classes(run: RunFolder, classes: tuple[str, ...]) -> None:
    if run.classes.is_file() and tuple(json.loads(run.classes.read_text())) != classes:
        raise DataError(
            f"{run.path}: the labels of the training records are not those the run was started with ({run.classes})"
        )
    write_atomic(run.classes, json.dumps(list(classes)) + "\n")


def _settle_tokenizer(
    config: Config,
    run: RunFolder,
    start: Start | None,
    sets: list[RecordSet],
    needs: dict[str, frozenset[Need]],
    regions: Any,
) -> None:
    """Write the run's tokenizer.json, unless it is there.

    The order: the run's own tokenizer -> the one of resume_from -> the one of init_from -> the config's file
    -> trained on the texts.
    """
    if run.tokenizer.is_file():
        return
    options, all_needs = config.data.tokenizer, frozenset().union(*needs.values())
    if config.resume_from is not None:
        continued = RunFolder(config.resume_from).tokenizer
        if not continued.is_file():
            raise CheckpointError(f"resume_from={config.resume_from}: no run folder, {continued} is missing")
        tokenizer = Tokenizer.of(continued, options)
    elif start is not None and start.tokenizer is not None and (start.fixed or options.path is None):
        tokenizer = start.tokenizer.with_context(options.context_length)
        if options.path is not None:
            # The file may be the one that the other run added its controls to.
            controls = start.sources[start.tokenizer_of].config.data.controls.tokens()
            given = Tokenizer.of(options.path, options).with_tokens(controls)
            if given.hash != tokenizer.hash:
                raise CheckpointError(
                    f"data.tokenizer.path={options.path} is another tokenizer than that of "
                    f"init_from={start.tokenizer_of}: token ids would mean other words; leave the path out"
                )
    elif options.path is not None:
        tokenizer = Tokenizer.of(options.path, options)
    elif any(text.strip() for text in training_texts(sets, regions=regions)):
        tokenizer = Tokenizer.train(training_texts(sets, config.data.controls, regions), options)
    elif all_needs & {Need.TEXT, Need.REGIONS, Need.PHRASES}:
        for record_set in sets:
            record_set.usable(needs)  # says which fields there are instead
        raise DataError("no training record has a text, and a task reads texts")
    else:
        # The text tower and the run folder need some tokenizer.
        tokenizer = Tokenizer.without_words(options.context_length)
    temporary = run.tokenizer.with_name("tokenizer.json.tmp")
    tokenizer.with_tokens(config.data.controls.tokens()).save(temporary)
    temporary.replace(run.tokenizer)


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
            config.model.image_width,
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
        adapter=Adapter.of(config.optim),
        guard=Guard.of(config.survive),
    )


@dataclasses.dataclass
class Plan:
    """How a state is made and placed, before any of its arrays exists.

    init: key -> a fresh state, boxed. target: its shapes and types, unboxed, with their shardings.
    adapter: as in the program.
    """

    init: Callable[[jax.Array], Any]
    optimizer: optax.GradientTransformation
    shardings: Any
    target: Any
    adapter: Adapter | None = None

    @functools.cached_property
    def fresh(self) -> Callable[[jax.Array], TrainState]:
        """`init`, compiled, with every array born where it belongs."""
        return jax.jit(lambda key: unbox(self.init(key)), out_shardings=self.shardings)


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
    return Plan(init, optimizer, shardings, target, program.adapter)


def checkpoint_items(
    state: TrainState, sums: dict[str, Any], adapter: Adapter | None = None
) -> dict[str, Any]:
    """The items of a checkpoint. `sums`: metrics since the last logged row, so that a resume logs the same means.

    With low-rank factors the parameters are merged, and what was merged goes to the rest.
    """
    params, ema = state.params, state.ema
    rest = {"step": state.step, "opt_state": state.opt_state, "extra": state.extra}
    if adapter is not None:
        params, ema, rest["lora"] = adapter.saved(params, ema)
    items = {"params": params, "rest": rest}
    if ema is not None:
        items["ema"] = ema
    if state.guard is not None:
        items["guard"] = state.guard
    return items | ({"sums": sums} if sums else {})


def _restore(items: dict[str, Any], plan: Plan) -> tuple[TrainState, dict[str, Any]]:
    rest, params, ema = items["rest"], items["params"], items.get("ema")
    if plan.adapter is not None:
        params, ema = plan.adapter.restored(params, ema, rest["lora"])
    guard = plan.target.guard
    if guard is not None:
        # It may have been switched on since.
        new = lambda s: jax.device_put(np.zeros(s.shape, s.dtype), s.sharding)  # noqa: E731
        guard = items.get("guard") or jax.tree.map(new, guard)
    state = TrainState(rest["step"], params, rest["opt_state"], ema, rest["extra"], guard)
    return state, items.get("sums", {})


def first_state(
    config: Config,
    checkpoints: Checkpoints,
    plan: Plan,
    start: Start | None,
    tokenizer: Tokenizer,
    mesh: Mesh,
    run: RunFolder,
) -> tuple[TrainState, dict[str, Any]]:
    """(state, metric sums) where a run starts, in this order of precedence:

    1. its own newest checkpoint that can be read: everything, step included;
    2. `resume_from`: the newest checkpoint of another run, everything, step included;
    3. `init_from`: parameters of other models, at step 0 with a fresh optimiser;
    4. fresh parameters from the seed.
    """
    items = checkpoint_items(plan.target, {}, plan.adapter)
    optional = {"sums": replicated(mesh)}
    if items.pop("guard", None) is not None:
        optional["guard"] = replicated(mesh)
    restored = checkpoints.restore_latest(items, optional=optional)
    if restored is not None:
        logger.info("resuming from step %d", restored[0])
        return _restore(restored[1], plan)
    if config.resume_from is not None:
        folder = RunFolder(config.resume_from).checkpoints
        if not folder.is_dir():
            raise CheckpointError(f"resume_from={config.resume_from}: no checkpoints there")
        other = Checkpoints(folder, read_only=True, tokenizer=tokenizer.hash)
        try:
            step = hosts.broadcast(other.latest())
            if step is None:
                raise CheckpointError(f"resume_from={config.resume_from}: no complete checkpoint there")
            if step >= config.steps:
                raise ConfigError(
                    f"resume_from={config.resume_from} stands at step {step}: steps={config.steps} leaves nothing to train"
                )
            logger.info("continuing %s from step %d", config.resume_from, step)
            return _restore(other.restore(step, items, optional=optional), plan)
        finally:
            other.close()
    state = plan.fresh(jax.random.key(config.seed))
    if start is None:
        return state, {}
    plain = {name: state.params[name] for name in ("model", "heads")}
    plain, diff = initial_params(start, config, plain, mesh)
    for line in diff.lines():
        logger.info("init: %s", line)
    warn_of_untrained(diff, plan.optimizer.trains)
    diff.write(run.path)
    params = place({**state.params, **plain}, plan.shardings.params)
    ema = jax.tree.map(lambda x: x.copy(), params) if state.ema is not None else None
    # Some optimisers keep parameters of their own, which must be these too.
    opt_state = jax.jit(plan.optimizer.init, out_shardings=plan.shardings.opt_state)(params)
    return state.replace(params=params, opt_state=opt_state, ema=ema), {}
