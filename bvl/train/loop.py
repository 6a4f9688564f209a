"""The one training loop. Tasks, losses, models and sources vary; this file does not."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import functools
import logging
import math
from collections.abc import Callable
from typing import Any

import jax

from bvl import hosts
from bvl.checkpoint import Checkpoints
from bvl.config import Config
from bvl.errors import ConfigError, RunFolderError
from bvl.mesh import check_batch_size, check_hosts, make_mesh, place, replicated, share_of_host, to_global
from bvl.runs import Components, Encoder, RunFolder
from bvl.train.bad_records import BadRecords
from bvl.train.bad_steps import StepReader
from bvl.train.early_stop import EarlyStop, early_stop_at
from bvl.train.environment import enable_compilation_cache, note_start
from bvl.train.evaluation import EvalFiles, evaluate_state
from bvl.train.initial import open_start, settled_config, with_tokenizer_options
from bvl.train.lora import Adapter
from bvl.train.metrics_log import MetricsLog, ProgressLines
from bvl.train.optim import make_schedule
from bvl.train.parameters import named_leaves
from bvl.train.peers import Peers
from bvl.train.plan import explain_out_of_memory
from bvl.train.profile import StepTrace
from bvl.train.program import TrainState
from bvl.train.saving import DISK_FULL, Saver
from bvl.train.setup import (
    Data,
    build_program,
    check_suites,
    checkpoint_items,
    first_state,
    load_frozen,
    named_metrics,
    place_suites,
    plan_state,
    prepare_data,
)
from bvl.train.step import check_accumulation, make_train_step
from bvl.train.survive import exit_on_signals, stop_on_signals
from bvl.train.timing import CountedStep, Timing
from bvl.train.wandb_log import WandbLog, import_wandb
from bvl.train.watchdog import Watchdog

logger = logging.getLogger(__name__)

# Name of the evaluation of what training starts from.
BEFORE = "before"


def train(config: Config, *, force: bool = False) -> int:
    """Train to `config.steps` or go on where the run folder stands; returns the exit code (0 = complete, others as in
    bvl/train/survive.py).

    Raises a UserError for anything the user can mend.
    """
    if config.workdir is None:
        raise ConfigError("no run folder: add workdir=DIR, for example workdir=runs/my_run")
    if not config.tasks:
        raise ConfigError("tasks is empty: name at least one, for example {'contrastive': Contrastive()}")
    run, survive = RunFolder(config.workdir), config.survive
    watchdog = Watchdog(survive.watchdog_s, survive.watchdog_stop_s)
    hosts.name_waits(watchdog.stage)
    peers = Peers(survive.host_timeout_s)
    try:
        with exit_on_signals(), run.lock(), explain_out_of_memory(config):
            return _train(config, run, force, watchdog)
    except BaseException as error:
        peers.failed(error)
        if isinstance(error, OSError) and error.errno in DISK_FULL:
            raise RunFolderError(
                f"workdir {run.path} cannot be written: {error}; free space, then run the same command again"
            ) from error
        raise
    finally:
        hosts.name_waits(contextlib.nullcontext)
        watchdog.close()
        peers.close()


def _train(config: Config, run: RunFolder, force: bool, watchdog: Watchdog) -> int:
    watchdog.enter("setup")
    enable_compilation_cache()
    check_hosts(config.mesh, hosts.count())
    mesh = make_mesh(config.mesh)
    check_batch_size(config.batch_size, mesh)
    share, num_shares = share_of_host(mesh, hosts.index())
    check_accumulation(config.optim.accumulate, config.tasks, config.batch_size, mesh)
    if config.log.wandb is not None:
        import_wandb()  # only to fail now where there is none
    trace = StepTrace(config.log.profile_steps, run.path / "profile", last_step=config.steps)
    # Not where the run has a checkpoint of its own: it goes on although the other folders may be gone.
    start = open_start(config) if not run.has_checkpoint() else None
    config = with_tokenizer_options(config, start, settled_config(config, run))
    run.claim(config, force=force)
    for task in config.tasks.values():
        task.check(config.model)
    data = prepare_data(config, run, start)
    for line in data.pipeline.summary():
        logger.info(line)
    if hosts.count() > 1:
        rows = config.batch_size // num_shares
        first = share * rows
        logging.getLogger("bvl.hosts").info(
            "%s: %d of %d devices, rows %d to %d of each batch of %d",
            hosts.describe(),
            jax.local_device_count(),
            jax.device_count(),
            first,
            first + rows - 1,
            config.batch_size,
        )
    suites = place_suites(config)
    check_suites(config, suites)

    frozen = load_frozen(config, data.tokenizer)
    program = build_program(config, data, frozen, mesh)
    plan = plan_state(config, program)
    options = config.checkpoint
    checkpoints = Checkpoints(
        run.checkpoints,
        keep=options.keep,
        best=options.best,
        best_mode=options.best_mode,
        tokenizer=data.tokenizer.hash,
        compression=options.compression,
    )
    try:
        state, sums = first_state(config, checkpoints, plan, start, data.tokenizer, mesh, run)
        run.keep_config(config)
        sizes = {name: x.size for name, x in named_leaves(state.params).items()}
        num_trained = sum(size for name, size in sizes.items() if plan.optimizer.trains(name))
        logger.info(
            "%.2fM parameters, %.2fM of them trained, on %d device(s), mesh %s",
            sum(sizes.values()) / 1e6,
            num_trained / 1e6,
            mesh.size,
            dict(mesh.shape),
        )
        step = int(state.step)
        early_stop = early_stop_at(config.eval, run.metrics, step)
        if hosts.broadcast(step >= config.steps or early_stop.reached):
            logger.info("complete: %s stands at step %d of %d", run.path, step, config.steps)
            if step < config.steps:
                logger.info("stopped early: %s", early_stop)
            return 0
        note_start(run, step, data.licences)
        components = Components(
            model=program.model,
            params=None,
            tokenizer=data.tokenizer,
            preprocess=config.data.preprocess,
            config=config,
            classes=data.classes,
            encoder=Encoder(program.model, config.data.preprocess, mesh),
        )
        frozen_params = {n: place(c.params["model"], replicated(mesh)) for n, c in frozen.items()}
        eval_files = EvalFiles(run)
        step_fn = CountedStep(make_train_step(program, plan.optimizer, plan.shardings))
        loop = _Loop(
            config=config,
            run=run,
            data=data,
            checkpoints=checkpoints,
            step_fn=lambda state, batch: step_fn(state, frozen_params, to_global(batch, mesh)),
            flops=lambda: step_fn.flops,
            evaluate=functools.partial(
                evaluate_state, eval_files, config, suites, components, program.adapter
            ),
            eval_files=eval_files,
            early_stop=early_stop,
            trace=trace,
            share=(share, num_shares),
            num_devices=mesh.size,
            adapter=program.adapter,
            watchdog=watchdog,
        )
        if config.eval.before and step == 0:
            with watchdog.stage("eval"):
                loop.evaluate(state, step, name=BEFORE)
            logger.info("what training starts from was evaluated: %s", run.evals / f"{BEFORE}.json")
        return loop.run_to_end(state, sums)
    finally:
        watchdog.enter("checkpoint")
        checkpoints.close()


@dataclasses.dataclass
class _Loop:
    config: Config
    run: RunFolder
    data: Data
    checkpoints: Checkpoints
    step_fn: Callable[[TrainState, dict[str, Any]], tuple[TrainState, Any]]
    flops: Callable[[], int | None]
    evaluate: Callable[..., dict[str, float]]
    eval_files: EvalFiles
    early_stop: EarlyStop
    trace: StepTrace
    share: tuple[int, int]
    num_devices: int
    adapter: Adapter | None
    watchdog: Watchdog

    def run_to_end(self, state: TrainState, sums: Any) -> int:
        """Step, log, evaluate, save; returns the exit code."""
        config, start = self.config, int(state.step)
        schedule = make_schedule(config.optim, config.steps)
        pipeline, enter = self.data.pipeline, self.watchdog.enter
        evaluated = False
        reader = self._reader()
        batches = pipeline.batches(
            start=start, stop=config.steps, host=self.share[0], num_hosts=self.share[1]
        )
        with contextlib.ExitStack() as stack:
            log, bad, progress, timing = self._open(stack, start)
            saver = Saver(
                self.checkpoints,
                max_failures=config.checkpoint.max_failures,
                flush=lambda: (log.flush(), bad.flush()),
            )
            stop = stack.enter_context(stop_on_signals())
            for step in range(start + 1, config.steps + 1):
                enter("data")
                with self.trace.step(step):
                    with timing.part("data"):
                        batch, unreadable = next(batches)
                    bad.add(step, unreadable)
                    enter("step")
                    state, metrics = self.step_fn(state, stop.in_batch(batch))
                with timing.part("other"):
                    self.trace.stop_after(step, metrics)
                metrics = reader.take(step, metrics, batch)
                sums = metrics if not sums else _add(sums, metrics)
                saver.check()
                timing.step()
                progress.advance(step)

                last = step == config.steps
                evaluating = last or _due(step, config.eval.every)
                scores = None
                if evaluating or _due(step, config.log.every):
                    # Parameters that are no numbers may not take the place of the last evaluation.
                    reader.read()
                    values = _means(jax.device_get(sums)) | {"lr": float(schedule(step - 1))}
                    values |= timing.row(self.flops())
                    progress.row(step, values)
                    if evaluating:
                        enter("eval")
                        scores = self.evaluate(state, step)
                        values |= {f"eval/{name}": value for name, value in scores.items()}
                    enter("log")
                    log.write(step, values)
                    sums = {}
                    timing.reset()
                if evaluating:
                    if not evaluated:
                        self._check_named(scores, step, state, sums)
                        evaluated = True
                    self.early_stop.add(step, scores)
                    last = last or hosts.broadcast(self.early_stop.reached)
                candidate = bool(scores) and config.checkpoint.best is not None
                exit_code = stop.agreed(reader.told_to_stop)
                if last or exit_code or candidate or _due(step, config.checkpoint.every):
                    enter("step")
                    reader.read()
                    enter("checkpoint")
                    with timing.part("other"):
                        save = saver.finish if last or exit_code else saver.save
                        save(step, checkpoint_items(state, sums, self.adapter), scores)
                if last:
                    break
                if exit_code:
                    logger.warning(
                        "stopped at step %d of %d; the same command goes on here", step, config.steps
                    )
                    return exit_code
        if self.early_stop.reached:
            logger.info("stopped early at step %d of %d: %s", step, config.steps, self.early_stop)
        logger.info("complete: %s", self.run.path)
        problem = hosts.broadcast(self.eval_files.retry())
        if problem is not None:
            raise RunFolderError(
                f"training is complete and saved, but not written are {problem}. What is there is of an earlier step; "
                f"the last scores stand in {self.run.metrics}. Free space and evaluate again with `bvl eval`"
            )
        return 0

    def _reader(self) -> StepReader:
        sets = self.data.pipeline.sets

        def describe(source: int, record: int) -> dict[str, str]:
            return {"source": sets[source].name, "id": sets[source].describe(record)["id"]}

        return StepReader(
            self.run,
            self.config,
            share=self.share[0],
            describe=describe,
            last_good=self.checkpoints.latest,
        )

    def _open(
        self, stack: contextlib.ExitStack, start: int
    ) -> tuple[MetricsLog, BadRecords, ProgressLines, Timing]:
        """What the loop writes to, closed with the stack."""
        config = self.config
        stack.callback(self.trace.close)
        self.trace.note_start(start)
        bad = BadRecords(
            self.run,
            num_records=self.data.pipeline.num_records,
            max_fraction=config.data.max_bad_fraction,
            resume_step=start,
        )
        stack.callback(bad.close)
        wandb = None
        if config.log.wandb is not None and hosts.is_first():
            wandb = WandbLog(self.run, config)
        log = MetricsLog(self.run.metrics, resume_step=start, tensorboard=config.log.tensorboard, wandb=wandb)
        stack.callback(log.close)
        peak = config.log.peak_flops
        timing = Timing(
            batch_size=config.batch_size, peak_flops=None if peak is None else peak * self.num_devices
        )
        stack.callback(timing.close)
        progress = ProgressLines(start, config.steps)
        stack.callback(progress.close)
        return log, bad, progress, timing

    def _check_named(self, scores: dict[str, float], step: int, state: TrainState, sums: Any) -> None:
        """Raise ConfigError if checkpoint.best or eval.stop_metric is no metric that the evaluation gave."""
        missing = [(option, m) for option, m in named_metrics(self.config).items() if m not in scores]
        if not missing:
            return
        # One more checkpoint could push the best out; where there is none, the work would be lost.
        if not hosts.broadcast(self.checkpoints.steps()):
            self.checkpoints.save(step, checkpoint_items(state, sums, self.adapter), scores)
            self.checkpoints.wait()
        option, metric = missing[0]
        near = difflib.get_close_matches(metric, scores, n=1, cutoff=0.0)
        raise ConfigError(
            f"{option}={metric!r} is no metric of the evaluation at step {step}"
            + (f"; nearest is {near[0]!r}" if near else "")
            + f" (metrics: {', '.join(sorted(scores)) or 'none'})"
        )


@jax.jit
def _add(a: Any, b: Any) -> Any:
    """Sums by name. Sums from a checkpoint may lack names that this start logs, or have others."""
    if not isinstance(a, dict):
        return a + b
    both = {name: _add(a[name], b[name]) for name in a if name in b}
    return {**a, **b, **both}


def _due(step: int, every: int) -> bool:
    return bool(every) and step % every == 0


def _means(sums: Any) -> dict[str, float]:
    """Flat metrics of a logged row: "loss/total", "loss/<task>", "<task>/<name>", and the step's others by their names."""
    pairs = {"loss/total": sums["step"]["loss"]}
    pairs |= {name: pair for name, pair in sums["step"].items() if name != "loss"}
    for task, metrics in sums["tasks"].items():
        for name, pair in metrics.items():
            pairs[f"loss/{task}" if name == "loss" else f"{task}/{name}"] = pair
    # Steps that were skipped are counted; of everything else the mean over steps counts.
    counted = {name: float(pairs.pop(name)[0]) for name in ("skipped",) if name in pairs}
    means = {
        name: float(total) / float(count) if count else math.nan for name, (total, count) in pairs.items()
    }
    return means | counted
