"""Seconds a training step of bvl and of open_clip, side by side: the same shapes, batch, optimiser and machine.

    python tools/bench_train.py --peer-python path/to/peer/bin/python --peer-script path/to/bench_open_clip.py \\
        --model ViT-B-32 --batch 16 --steps 5 --rounds 3

A quick look at a small model: `--model ViT-S-32 --batch 4 --steps 2 --rounds 1`. bvl alone, as one JSON line:

    python tools/bench_train.py --worker --model ViT-B-32 --batch 16 --steps 5

The sides take turns, each round in a fresh process, so that a change in the machine's load meets both. A step is
the encoders forward and backward, the softmax contrastive loss and the AdamW update (learning rate 1e-4, weight
decay 0.1, no clipping), in float32; for bvl it is the very step of `bvl train`, which also normalises the uint8
images and takes the gradient's norm. Neither side reads data. One step (and bvl's compilation) comes before the
timed ones. Measure on an idle machine: where other programs compete for the cores, torch's spinning threads lose far
more than bvl, and the ratio means nothing.

The peer's script is called with MODEL BATCH STEPS by a Python that has torch and open_clip; its last line of output
must be JSON with `all_s` (seconds of every step), `params` and `threads`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from clip_step import MODELS, make_clip_step


def measure_bvl(name: str, batch_size: int, steps: int) -> dict[str, Any]:
    """Times of bvl's training step in this process, in the keys of the peer's line."""
    import jax
    import numpy as np

    from bvl.train.environment import enable_compilation_cache, keep_freed_memory

    # Both as `bvl train` does, before anything is computed.
    keep_freed_memory()
    enable_compilation_cache()
    made = make_clip_step(name, batch_size)
    state, step, batch = made.state, made.step, made.batch
    seconds = []
    for _ in range(1 + steps):
        start = time.perf_counter()
        state, metrics = step(state, {}, batch)
        jax.block_until_ready((state, metrics))
        seconds.append(time.perf_counter() - start)
    loss = float(metrics["step"]["loss"][0])
    if not np.isfinite(loss):
        raise SystemExit(f"the loss after {1 + steps} steps is {loss}: these times mean nothing")
    return {
        "model": name,
        "batch": batch_size,
        "threads": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "params": sum(
            x.size
            for path, x in jax.tree_util.tree_leaves_with_path(state.params)
            if "running_" not in jax.tree_util.keystr(path)
        ),
        "device": jax.devices()[0].device_kind,
        "first_step_s": seconds[0],
        "median_s": statistics.median(seconds[1:]),
        "all_s": sorted(seconds[1:]),
    }


def run_json(command: list[str]) -> dict[str, Any]:
    """The last line that a command prints, as JSON; stops with its output where it fails."""
    done = subprocess.run(command, capture_output=True, text=True)
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        raise SystemExit(f"{' '.join(command)}\nended with code {done.returncode}:\n{done.stderr[-3000:]}")
    return json.loads(lines[-1])


def table(rounds: dict[str, list[dict[str, Any]]]) -> str:
    """A markdown table over all rounds; the first side named is what the others are compared with."""
    seconds = {side: [s for r in results for s in r["all_s"]] for side, results in rounds.items()}
    medians = {side: statistics.median(s) for side, s in seconds.items()}
    base = next(iter(medians))
    lines = [
        f"| | median s/step | min s/step | steps | medians of rounds | parameters | time / {base} |",
        "|---|---|---|---|---|---|---|",
    ]
    for side, results in rounds.items():
        by_round = " ".join(f"{statistics.median(r['all_s']):.3f}" for r in results)
        lines.append(
            f"| {side} | {medians[side]:.3f} | {min(seconds[side]):.3f} | {len(seconds[side])} | {by_round} "
            f"| {results[0]['params']:,} | {medians[side] / medians[base]:.3f} |"
        )
    return "\n".join(lines)


def load_average() -> str:
    return "/".join(f"{x:.1f}" for x in os.getloadavg()) if hasattr(os, "getloadavg") else "unknown"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=MODELS, default="ViT-B-32")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=5, help="timed steps a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peer-python", default=sys.executable, help="a Python with torch and open_clip")
    parser.add_argument("--peer-script", type=Path, help="the peer's side; without it bvl runs alone")
    parser.add_argument(
        "--host", action=argparse.BooleanOptionalAction, default=True, help="print cores, threads and load"
    )
    parser.add_argument("--worker", action="store_true", help="measure bvl here and print one JSON line")
    args = parser.parse_args()
    if args.batch < 1 or args.steps < 1 or args.rounds < 1:
        parser.error("--batch, --steps and --rounds must be at least 1")
    if args.worker:
        print(json.dumps(measure_bvl(args.model, args.batch, args.steps)))
        return

    numbers = [args.model, str(args.batch), str(args.steps)]
    options = [x for pair in zip(("--model", "--batch", "--steps"), numbers, strict=True) for x in pair]
    commands = {"bvl": [sys.executable, str(Path(__file__).resolve()), "--worker", *options]}
    if args.peer_script is not None:
        commands = {"open_clip": [args.peer_python, str(args.peer_script), *numbers], **commands}
    before = load_average()
    if hasattr(os, "getloadavg") and os.getloadavg()[0] > 0.5:
        print(f"warning: the load average is {before}; other programs distort the ratio", file=sys.stderr)
    rounds: dict[str, list[dict[str, Any]]] = {side: [] for side in commands}
    for number in range(args.rounds):
        for side, command in commands.items():
            result = run_json(command)
            rounds[side].append(result)
            median = statistics.median(result["all_s"])
            print(f"round {number + 1}: {side} {median:.3f} s/step", file=sys.stderr, flush=True)
    print(f"{args.model}, batch {args.batch}, float32\n\n{table(rounds)}")
    if args.host:
        threads = ", ".join(f"{side} {results[0]['threads']}" for side, results in rounds.items())
        print(
            f"\nhost: {os.cpu_count()} cores; threads: {threads}; device: {rounds['bvl'][0]['device']}; "
            f"load average (1/5/15 min) before {before}, after {load_average()}"
        )


if __name__ == "__main__":
    main()
