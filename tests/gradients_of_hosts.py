"""Loss and gradient of a run's checkpoint on the next batch, by any number of processes and devices.

python gradients_of_hosts.py CONFIG RUN STEP OUT.npz MESH: restores the checkpoint of STEP onto the mesh, for example
2,2,2, and writes the loss, every gradient, and the numbers of the batch's records.
"""

import sys
from pathlib import Path

import jax
import numpy as np

from bvl import hosts

hosts.initialise()

from bvl.checkpoint import Checkpoints  # noqa: E402
from bvl.config import load_config  # noqa: E402
from bvl.mesh import make_mesh, share_of_host, to_global, whole  # noqa: E402
from bvl.runs import RunFolder  # noqa: E402
from bvl.train.parameters import named_leaves  # noqa: E402
from bvl.train.setup import build_program, checkpoint_items, plan_state, prepare_data  # noqa: E402


def main(config_file: str, folder: str, step: int, out: str, shape: str) -> None:
    run = RunFolder(folder)
    config = load_config(config_file, [f"workdir={folder}", f"mesh.shape=[{shape}]"])
    mesh = make_mesh(config.mesh)
    data = prepare_data(config, run, None)
    program = build_program(config, data, {}, mesh)
    plan = plan_state(config, program)
    checkpoints = Checkpoints(run.checkpoints, read_only=True, tokenizer=data.tokenizer.hash)
    items = {"params": checkpoint_items(plan.target, {})["params"]}
    params = checkpoints.restore(step, items)["params"]
    extra = plan.fresh(jax.random.key(config.seed)).extra
    host, num_hosts = share_of_host(mesh, hosts.index())
    batch, _ = next(data.pipeline.batches(start=step, stop=step + 1, host=host, num_hosts=num_hosts))
    batch = to_global(batch, mesh)
    rng = jax.random.fold_in(jax.random.key(config.seed), step)

    def loss(params, extra, batch):
        return program.loss(params, extra, {}, program.prepare(batch, rng), rng, step)[0]

    shardings = plan.shardings.params
    gradient = jax.jit(jax.value_and_grad(loss), out_shardings=(None, shardings))
    value, grads = gradient(params, extra, batch)
    arrays = {name: whole(leaf) for name, leaf in named_leaves(grads).items()}
    arrays |= {"loss": whole(value), "record": whole(batch["record"]), "row": whole(batch["row"])}
    if hosts.is_first():
        np.savez(out, **arrays)
    hosts.barrier("written")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), str(Path(sys.argv[4])), sys.argv[5])
