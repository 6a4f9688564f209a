"""Training of 2 processes with 4 devices each against 1 process with 8: the same loss, gradient and curve?

    python tools/check_hosts.py

Both run the model of tests/sharded/test_equal_steps.py on a mesh (2, 2, 2), over loopback on CPU. Printed are the
largest relative differences: of the loss and of any gradient (largest difference over largest value of the array) at
the parameters that a run on one device had after 1, 10 and 50 steps, in float32; and of 50 steps of training, free to
part, in float64.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TESTS = [str(ROOT / "tests"), str(ROOT / "tests" / "sharded")]
MESH = (2, 2, 2)


def work(reference_file: str, out: str) -> None:
    """One of the processes: writes what the mesh gives at the parameters of the reference, which the first run makes."""
    from bvl import hosts

    hosts.initialise()
    import jax

    jax.config.update("jax_platforms", "cpu")
    import test_equal_steps as steps

    file = Path(reference_file)
    if not file.is_file():
        file.write_bytes(pickle.dumps(steps.curve(None)[1]))
    reference = pickle.loads(file.read_bytes())
    found = {"curve": steps.curve(MESH), "evaluated": steps.evaluate(MESH, reference)[0]}
    if hosts.is_first():
        Path(out).write_bytes(pickle.dumps(found))
    hosts.barrier("written")


def start(processes: int, devices: int, *words: str) -> None:
    """Run `work` in so many processes; raises CalledProcessError where one fails."""
    sys.path[:0] = TESTS
    from two_processes import free_port

    port, running = free_port(), []
    for number in range(processes):
        environment = os.environ | {
            "BVL_COORDINATOR": f"127.0.0.1:{port}",
            "BVL_NUM_PROCESSES": str(processes),
            "BVL_PROCESS_ID": str(number),
            "JAX_NUM_CPU_DEVICES": str(devices),
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
            "PYTHONPATH": os.pathsep.join([str(ROOT), *TESTS]),
        }
        running.append(subprocess.Popen([sys.executable, __file__, *words], env=environment))
    for process in running:
        if process.wait():
            raise subprocess.CalledProcessError(process.returncode, process.args)


def difference(a: object, b: object, least: float = 0.0) -> float:
    """Largest of max |a - b| / max |b| over the arrays of two trees; smaller arrays than `least` are measured by it."""
    import jax
    import numpy as np

    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return max(float(np.abs(x - y).max() / max(np.abs(y).max(), least)) for x, y in pairs)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        reference, one, two = (str(Path(folder) / name) for name in ("reference", "one", "two"))
        start(1, 8, reference, one)
        start(2, 4, reference, two)
        # Written by this script a moment ago.
        expected, found = (pickle.loads(Path(file).read_bytes()) for file in (one, two))
    import jax
    import numpy as np

    print("| 2 x 4 against 1 x 8, mesh (2, 2, 2) | largest relative difference |\n|---|---|")
    for step, (loss, gradients) in expected["evaluated"].items():
        other_loss, other_gradients = found["evaluated"][step]
        largest = max(np.abs(x).max() for x in jax.tree.leaves(gradients))
        print(f"| loss at step {step} | {difference(other_loss, loss):.1e} |")
        # The softmax does not see a bias of keys: its gradient is rounding alone.
        print(f"| gradients at step {step} | {difference(other_gradients, gradients, 1e-2 * largest):.1e} |")
    losses, params = expected["curve"]
    other_losses, other_params = found["curve"]
    print(f"| losses of 50 steps, float64 | {np.max(np.abs(other_losses / losses - 1)):.1e} |")
    print(f"| parameters after 50 steps, float64 | {difference(other_params[50], params[50], 1e-3):.1e} |")


if __name__ == "__main__":
    if len(sys.argv) == 3:
        work(*sys.argv[1:])
    else:
        main()
