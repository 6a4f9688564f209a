"""Peak memory of a contrastive step at several microbatches against one batch, and how far the gradients differ.

    python tools/bench_accumulation.py --model ViT-S-32 --batch 64 --microbatches 1 8

Every number of microbatches runs in a fresh process. "temporaries" is what the compiler says that the compiled step
needs beside its arguments and results (`memory_analysis`); "peak of the process" is the largest resident memory
while the step runs, less what was resident before it (the arguments are; Linux). The
gradient is read off one step of plain SGD with a rate so high that the parameters before it do not matter to rounding;
its difference from the first row's is max |a - b| / max |b| of the worst array (arrays that are all but zero are
measured by a hundredth of the largest of all), and of all arrays together in the Euclidean norm.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from clip_step import MODELS, make_clip_step

RATE = 1e4


def resident_bytes() -> int:
    """Memory of this process that is in RAM now."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise SystemExit("/proc/self/status has no VmRSS")


class Peak:
    """The largest resident memory while the block runs, looked at every 5 ms."""

    def __enter__(self) -> Peak:
        self.start = self.largest = resident_bytes()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._done.wait(0.005):
            self.largest = max(self.largest, resident_bytes())

    def __exit__(self, *_: Any) -> None:
        self._done.set()
        self._thread.join()


def measure(args: argparse.Namespace, accumulate: int, gradient: Path) -> dict[str, Any]:
    """Memory and time of a step in this process; its gradient goes to a file."""
    import jax
    import numpy as np

    from bvl.train.parameters import named_leaves

    sgd = dict(name="sgd", lr=RATE, schedule="constant", warmup_steps=0, weight_decay=0.0, clip_norm=None)
    made = make_clip_step(
        args.model, args.batch, accumulate=accumulate, optim=sgd, remat=args.remat, scan=args.remat != "none"
    )
    compiled = made.compiled()
    memory = compiled.memory_analysis()
    before = {name: np.asarray(x).copy() for name, x in named_leaves(made.state.params).items()}
    with Peak() as peak:
        start = time.perf_counter()
        state, metrics = jax.block_until_ready(compiled(made.state, {}, made.batch))
        seconds = time.perf_counter() - start
    after = named_leaves(state.params)
    np.savez(gradient, **{name: (x - np.asarray(after[name])) / RATE for name, x in before.items()})
    return {
        "microbatches": accumulate,
        "temp_bytes": memory.temp_size_in_bytes,
        "argument_bytes": memory.argument_size_in_bytes,
        "peak_bytes": peak.largest - peak.start,
        "seconds": seconds,
        "loss": float(metrics["step"]["loss"][0]),
        "params": sum(x.size for x in before.values()),
    }


def differences(a: Path, b: Path) -> tuple[float, float]:
    """(of the worst array, of all together) between two gradients."""
    import numpy as np

    first, second = np.load(a), np.load(b)
    largest = max(np.abs(first[name]).max() for name in first.files)
    worst, error, total = 0.0, 0.0, 0.0
    for name in first.files:
        x, y = first[name].astype(np.float64), second[name].astype(np.float64)
        worst = max(worst, np.abs(x - y).max() / max(np.abs(x).max(), 1e-2 * largest))
        error, total = error + np.square(x - y).sum(), total + np.square(x).sum()
    return worst, (error / total) ** 0.5


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=MODELS, default="ViT-S-32")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--microbatches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--remat", choices=("none", "full", "dots"), default="none")
    parser.add_argument("--worker", type=int, help="measure this many here and print one JSON line")
    parser.add_argument("--gradient", type=Path, help="of a worker: the file for the gradient")
    args = parser.parse_args()
    if args.batch < 1 or min(args.microbatches) < 1:
        parser.error("--batch and --microbatches must be at least 1")
    if args.worker is not None:
        print(json.dumps(measure(args, args.worker, args.gradient)))
        return

    print(
        "| microbatches | temporaries MB | peak of the process MB | s/step | loss | gradient: worst array | all arrays |"
    )
    print("|---|---|---|---|---|---|---|", flush=True)
    options = ["--model", args.model, "--batch", str(args.batch), "--remat", args.remat]
    with tempfile.TemporaryDirectory() as folder:
        first = None
        for count in args.microbatches:
            gradient = Path(folder) / f"{count}.npz"
            command = [sys.executable, str(Path(__file__).resolve()), *options]
            command += ["--worker", str(count), "--gradient", str(gradient)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
            if done.returncode:
                raise SystemExit(f"{' '.join(command)} ended with code {done.returncode}")
            result = json.loads(done.stdout.strip().splitlines()[-1])
            first = first or gradient
            worst, whole = differences(first, gradient)
            print(
                f"| {count} | {result['temp_bytes'] / 1e6:,.0f} | {result['peak_bytes'] / 1e6:,.0f} "
                f"| {result['seconds']:.2f} | {result['loss']:.6f} | {worst:.1e} | {whole:.1e} |",
                flush=True,
            )
        print(
            f"\n{args.model}, {result['params']:,} parameters, {args.batch} pairs, float32, remat={args.remat}; arguments "
            f"(state and batch) {result['argument_bytes'] / 1e6:,.0f} MB; gradients against {args.microbatches[0]} "
            "microbatch(es)"
        )


if __name__ == "__main__":
    main()
