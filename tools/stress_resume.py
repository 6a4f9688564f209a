"""End a training run many times at random moments, resume it each time, and compare its end with an uninterrupted run.

    python tools/stress_resume.py --kills 20 --terms 20 --seed 0

One run is killed (SIGKILL) so often, another asked to stop (SIGTERM and SIGUSR1 in turn). Prints a line for every end
and the verdicts; exits 1 if parameters, optimiser, average, metric sums or metrics.jsonl (but time/) differ in one bit.
"""

import argparse
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

STEPS_FOR_EACH = 30


def end_often(runner, workdir: str, numbers: list[int], random_numbers: random.Random) -> None:
    """End the run by these signals: while it trains, while it saves, and anywhere from its start on."""
    for count, number in enumerate(numbers, 1):
        started = time.monotonic()
        if count % 4 == 0:
            where = "anywhere"
            ended = runner.kill_after(workdir, random_numbers.uniform(0.5, 12.0), number)
        elif count % 4 == 2:
            where, delay = "in a save", random_numbers.uniform(0.0, 0.03)
            ended = runner.kill_when(workdir, lambda: runner.saving(workdir), delay=delay, number=number)
        else:
            where, delay = "in training", random_numbers.uniform(0.0, 0.2)
            enough = runner.logged() + random_numbers.randint(0, 4)
            ended = runner.kill_when(
                workdir, lambda n=enough: runner.logged() >= n, delay=delay, number=number
            )
        if not ended:
            print(f"{signal.Signals(number).name} {count}: the run was complete before", flush=True)
            return
        left = [p.name for p in (runner.folder / workdir / "checkpoints").glob("*tmp*")]
        print(
            f"{signal.Signals(number).name} {count} {where}, after {time.monotonic() - started:.2f} s: checkpoints "
            f"{runner.steps(workdir)}, {runner.rows(workdir)} rows"
            + (f", half written {', '.join(left)}" if left else ""),
            flush=True,
        )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], epilog="example:\n  python tools/stress_resume.py --kills 20 --terms 20",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--kills", type=int, default=20, help="how often to kill (default 20)")
    parser.add_argument("--terms", type=int, default=20, help="how often to ask to stop (default 20)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default 0)")
    args = parser.parse_args()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from kill_and_resume import Runner, assert_same_runs

    with tempfile.TemporaryDirectory() as folder:
        steps = STEPS_FOR_EACH * max(args.kills, args.terms, 1)
        runner = Runner(Path(folder), steps=steps)
        if runner.run(*runner.train("whole"), timeout=3600) != 0:
            print(runner.log())
            return 1
        print(f"uninterrupted run: {steps} steps, checkpoints {runner.steps('whole')}", flush=True)
        asks = [(signal.SIGTERM, signal.SIGUSR1)[i % 2] for i in range(args.terms)]
        same = True
        for workdir, numbers in (("killed", [signal.SIGKILL] * args.kills), ("asked", asks)):
            end_often(runner, workdir, numbers, random.Random(args.seed))
            if runner.run(*runner.train(workdir), timeout=3600) != 0:
                print(runner.log())
                return 1
            try:
                assert_same_runs(runner.folder / workdir, runner.folder / "whole")
                print(f"{workdir}: equal bit for bit", flush=True)
            except AssertionError as error:
                print(f"{workdir}: DIFFERENT: {error}", flush=True)
                same = False
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
