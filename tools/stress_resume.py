"""Kill a training run many times at random moments, resume it each time, and compare its end with an uninterrupted run.

    python tools/stress_resume.py --kills 20 --seed 0

Prints a line for every kill and the verdict; exits 1 if parameters, optimiser, average, metric sums or metrics.jsonl
(but time/) differ in one bit.
"""

import argparse
import os
import random
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], epilog="example:\n  python tools/stress_resume.py --kills 20",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--kills", type=int, default=20, help="how often to kill (default 20)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default 0)")
    args = parser.parse_args()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from kill_and_resume import Runner, assert_same_runs

    with tempfile.TemporaryDirectory() as folder:
        runner = Runner(Path(folder), steps=30 * args.kills)
        if runner.run(*runner.train("whole"), timeout=3600) != 0:
            print(runner.log())
            return 1
        print(f"uninterrupted run: {30 * args.kills} steps, checkpoints {runner.steps('whole')}", flush=True)
        random_numbers = random.Random(args.seed)
        for kill in range(1, args.kills + 1):
            started = time.monotonic()
            if kill % 4 == 0:
                where, killed = "anywhere", runner.kill_after("killed", random_numbers.uniform(0.5, 8.0))
            elif kill % 4 == 2:
                delay = random_numbers.uniform(0.0, 0.03)
                where, killed = (
                    "in a save",
                    runner.kill_when("killed", lambda: runner.saving("killed"), delay=delay),
                )
            else:
                delay, more = random_numbers.uniform(0.0, 0.2), random_numbers.randint(0, 7)
                enough = runner.logged() + more
                where = "in training"
                killed = runner.kill_when("killed", lambda n=enough: runner.logged() >= n, delay=delay)
            if not killed:
                print(f"kill {kill}: the run was complete before")
                break
            left = [p.name for p in (runner.folder / "killed" / "checkpoints").glob("*tmp*")]
            print(
                f"kill {kill} {where}, after {time.monotonic() - started:.2f} s: checkpoints {runner.steps('killed')}, "
                f"{runner.rows('killed')} rows" + (f", half written {', '.join(left)}" if left else ""),
                flush=True,
            )
        if runner.run(*runner.train("killed"), timeout=3600) != 0:
            print(runner.log())
            return 1
        try:
            assert_same_runs(runner.folder / "killed", runner.folder / "whole")
        except AssertionError as error:
            print(f"DIFFERENT: {error}")
            return 1
    print("equal bit for bit")
    return 0


if __name__ == "__main__":
    sys.exit(main())
