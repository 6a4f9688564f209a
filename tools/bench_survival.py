"""What surviving costs: asynchronous checkpoints, and the loop's logging, metrics and watchdog, as shares of a step.

    python tools/bench_survival.py checkpoints --model ViT-B-16 --batch 8 --every 20 --rounds 2
    python tools/bench_survival.py loop --model miniature --batch 64 --steps 50 --rounds 6

Blocks of steps with and without take turns in one process, so that a change in the machine's load meets both; the
median of the ratios counts. Processor time is given beside wall time: where other programs compete for the cores it
is the one to trust. Steps are those of `bvl train`, over one random batch that is already on the device.

checkpoints: every second block of `--every` steps begins with a save of parameters and optimiser state.
loop: every second block runs in the training loop, with rows, norms by group, watchdog, signals and checks, and the
others in a bare loop without norms.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from clip_step import MODELS, make_clip_step


def timed(block: Callable[[], Any]) -> tuple[float, float]:
    """(seconds of wall, seconds of processor) of a block."""
    wall, processor = time.perf_counter(), time.process_time()
    block()
    return time.perf_counter() - wall, time.process_time() - processor


def interleaved(
    without: Callable[[], Any], extra: Callable[[], Any], rounds: int
) -> tuple[list[tuple[float, float]], list[tuple[float, float]]]:
    """Times of both blocks, whose order is turned round every time."""
    plain, more = [], []
    for number in range(rounds):
        for block, times in ((without, plain), (extra, more))[:: 1 if number % 2 else -1]:
            times.append(timed(block))
            print(json.dumps({block.__name__: [round(t, 3) for t in times[-1]]}), flush=True)
    return plain, more


def shares(plain: list[tuple[float, float]], more: list[tuple[float, float]]) -> dict[str, float]:
    """Median over rounds of what the second blocks took longer, of the first ones' time."""
    ratios = [[b / a - 1 for a, b in zip(x, y, strict=True)] for x, y in zip(plain, more, strict=True)]
    return {
        "wall_share": statistics.median(r[0] for r in ratios),
        "processor_share": statistics.median(r[1] for r in ratios),
        "more_processor_s": statistics.median(y[1] - x[1] for x, y in zip(plain, more, strict=True)),
    }


def measure_checkpoints(name: str, batch: int, every: int, rounds: int, compression: bool) -> dict[str, Any]:
    import jax

    from bvl.checkpoint import Checkpoints
    from bvl.train.setup import checkpoint_items

    made = make_clip_step(name, batch)
    box = [made.step(made.state, {}, made.batch)[0]]
    blocked, saved = [], []

    def steps() -> None:
        for _ in range(every):
            box[0], _ = made.step(box[0], {}, made.batch)
        jax.block_until_ready(box[0])

    with tempfile.TemporaryDirectory() as folder:
        checkpoints = Checkpoints(Path(folder) / "checkpoints", compression=compression)

        def saving() -> None:
            start = time.perf_counter()
            checkpoints.save(len(saved) + 1, checkpoint_items(box[0], {}))
            blocked.append(time.perf_counter() - start)
            saved.append(1)
            steps()

        def with_save() -> None:
            # The next save would wait for this one, so that its end belongs to this block.
            saving()
            checkpoints.wait()

        try:
            plain, more = interleaved(steps, with_save, rounds)
            size = sum(p.stat().st_size for p in Path(folder).rglob("*") if p.is_file()) / len(
                checkpoints.steps()
            )
        finally:
            checkpoints.close()
    wall, processor = (statistics.median(times) / every for times in zip(*plain, strict=True))
    return shares(plain, more) | {
        "step_s": wall,
        "step_processor_s": processor,
        "blocked_s": statistics.median(blocked),
        "checkpoint_gb": size / 1e9,
    }


def measure_loop(
    name: str, batch: int, steps: int, rounds: int, log_every: int, norms: bool
) -> dict[str, Any]:
    import jax
    import numpy as np

    from bvl.config import Config, LogConfig
    from bvl.runs import RunFolder
    from bvl.train.early_stop import EarlyStop
    from bvl.train.evaluation import EvalFiles
    from bvl.train.loop import _Loop
    from bvl.train.optim import OptimConfig
    from bvl.train.profile import StepTrace
    from bvl.train.step import make_train_step
    from bvl.train.timing import CountedStep
    from bvl.train.watchdog import Watchdog

    made = make_clip_step(name, batch)
    shardings = jax.tree.map(lambda x: x.sharding, made.state)
    program = dataclasses.replace(made.program, group_norms=norms)
    logged = CountedStep(make_train_step(program, made.optimizer, shardings))
    ids = {"source": np.zeros(batch, np.int32), "record": np.zeros(batch, np.int32)}
    given = {**made.batch, **ids}
    pipeline = SimpleNamespace(
        num_records=1000, sets=[], batches=lambda start, stop, **_: ((given, []) for _ in range(start, stop))
    )
    checkpoints = SimpleNamespace(
        check=lambda: True, wait=lambda: None, save=lambda *_: None, latest=lambda: None, steps=lambda: [0]
    )
    box = [made.state]

    def step_fn(step: Any, state: Any, batch: Any) -> Any:
        box[0], metrics = step(state, {}, {k: v for k, v in batch.items() if k not in ids})
        return box[0], metrics

    def bare() -> None:
        for _ in range(steps):
            step_fn(made.step, box[0], given)
        jax.block_until_ready(box[0])

    with tempfile.TemporaryDirectory() as folder:
        run = RunFolder(folder)

        def in_loop() -> None:
            watchdog = Watchdog(600.0)
            end = int(box[0].step) + steps
            config = Config(
                model=None,
                data=SimpleNamespace(max_bad_fraction=0.01),
                tasks={},
                optim=OptimConfig(schedule="constant", warmup_steps=0),
                steps=end,
                batch_size=batch,
                log=LogConfig(every=log_every),
            )
            loop = _Loop(
                config=config,
                run=run,
                data=SimpleNamespace(pipeline=pipeline),
                checkpoints=checkpoints,
                step_fn=functools.partial(step_fn, logged),
                flops=lambda: logged.flops,
                evaluate=lambda *_: {},
                eval_files=EvalFiles(run),
                early_stop=EarlyStop(config.eval),
                trace=StepTrace(None, run.path / "profile", last_step=end),
                share=(0, 1),
                num_devices=1,
                adapter=None,
                watchdog=watchdog,
            )
            loop.run_to_end(box[0], {})
            watchdog.close()

        bare(), in_loop()
        plain, more = interleaved(bare, in_loop, rounds)
    wall, processor = (statistics.median(times) / steps for times in zip(*plain, strict=True))
    return shares(plain, more) | {"step_s": wall, "step_processor_s": processor}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], epilog="\n".join(__doc__.split("\n")[2:4]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("what", choices=("checkpoints", "loop"))
    parser.add_argument("--model", choices=sorted(MODELS), default="miniature")
    parser.add_argument("--batch", type=int, default=16, help="pairs (default 16)")
    parser.add_argument("--every", type=int, default=20, help="steps between checkpoints (default 20)")
    parser.add_argument("--steps", type=int, default=50, help="steps of a block of `loop` (default 50)")
    parser.add_argument("--log-every", type=int, default=10, help="steps between rows (default 10)")
    parser.add_argument("--rounds", type=int, default=4, help="pairs of blocks (default 4)")
    parser.add_argument("--no-norms", action="store_true", help="log no norms by group (log.norms=false)")
    parser.add_argument("--compression", action="store_true", help="compress checkpoints")
    args = parser.parse_args()
    from bvl.train.environment import enable_compilation_cache, keep_freed_memory

    keep_freed_memory()
    enable_compilation_cache()
    if args.what == "checkpoints":
        found = measure_checkpoints(args.model, args.batch, args.every, args.rounds, args.compression)
    else:
        found = measure_loop(
            args.model, args.batch, args.steps, args.rounds, args.log_every, not args.no_norms
        )
    print(json.dumps({"model": args.model, "batch": args.batch} | {k: round(v, 4) for k, v in found.items()}))


if __name__ == "__main__":
    main()
