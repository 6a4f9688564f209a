"""The processes of a run ("hosts"): how they find each other, and how they agree.

One process needs nothing here, and every function then does nothing or says so. Several are joined by
`jax.distributed`, which finds them, in this order, by

1. BVL_COORDINATOR=host:port, BVL_NUM_PROCESSES and BVL_PROCESS_ID (the last two may be Slurm's, as below);
2. Slurm, where `srun` started several tasks: the first node of the step is the coordinator, on a port made from the
   job's number; every process has all devices of its node, or, of several on a node, those of its place there;
3. BVL_DISTRIBUTED=auto: what JAX finds by itself (Cloud TPU, Open MPI). On Cloud TPU this is needed, since no
   variable there says how many hosts were started.

What hosts tell each other goes through the key-value store of `jax.distributed`, which needs no device and no
compiled program, and in which a host that waits is ended where the one it waits for has died.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import socket
from collections.abc import Callable, Mapping
from typing import Any

import jax

from bvl.errors import ConfigError, UserError

COORDINATOR, NUM_PROCESSES, PROCESS_ID = "BVL_COORDINATOR", "BVL_NUM_PROCESSES", "BVL_PROCESS_ID"
DISTRIBUTED = "BVL_DISTRIBUTED"
# The first host may train a tokenizer or index millions of records while the others wait. Were it to die, they would
# know by its missing heartbeats.
WAIT_S = 6 * 3600.0
# Hosts of a cluster may start minutes apart, for example while one still fetches its image.
START_WITHIN_S = 1800
# Every host counts its messages alike, since all run the same program.
_NUMBERS = itertools.count()
_stage: Callable[[str], contextlib.AbstractContextManager] = contextlib.nullcontext


def arguments(environment: Mapping[str, str] = os.environ) -> dict[str, Any] | None:
    """Arguments for `jax.distributed.initialize` as the environment has them, None for a process on its own.

    Raises ConfigError where variables are missing or contradict each other.
    """
    slurm_tasks = environment.get("SLURM_STEP_NUM_TASKS", "1")
    in_slurm = slurm_tasks.isdigit() and int(slurm_tasks) > 1 and "SLURM_PROCID" in environment
    if COORDINATOR in environment or PROCESS_ID in environment or NUM_PROCESSES in environment:
        slurm = {NUM_PROCESSES: slurm_tasks, PROCESS_ID: environment.get("SLURM_PROCID")} if in_slurm else {}
        values = {
            name: environment.get(name, slurm.get(name)) for name in (COORDINATOR, NUM_PROCESSES, PROCESS_ID)
        }
        if missing := [name for name, value in values.items() if value is None]:
            raise ConfigError(
                f"{', '.join(missing)} must be set too: each process needs {COORDINATOR}=host:port, {NUM_PROCESSES} and "
                f"{PROCESS_ID} (from 0)"
            )
        numbers = {}
        for name in (NUM_PROCESSES, PROCESS_ID):
            if not values[name].isdigit():
                raise ConfigError(f"{name}={values[name]!r}: give a whole number")
            numbers[name] = int(values[name])
        if not re.fullmatch(r".+:\d+", values[COORDINATOR]):
            raise ConfigError(
                f"{COORDINATOR}={values[COORDINATOR]!r}: give host:port, for example node1:12345"
            )
        if not numbers[PROCESS_ID] < numbers[NUM_PROCESSES]:
            raise ConfigError(
                f"{PROCESS_ID}={numbers[PROCESS_ID]}: with {NUM_PROCESSES}={numbers[NUM_PROCESSES]} processes are "
                f"numbered 0 to {numbers[NUM_PROCESSES] - 1}"
            )
        if numbers[NUM_PROCESSES] == 1:
            return None
        return {
            "coordinator_address": values[COORDINATOR],
            "num_processes": numbers[NUM_PROCESSES],
            "process_id": numbers[PROCESS_ID],
            "cluster_detection_method": "deactivate",
            **(_slurm_devices(environment) if in_slurm else {}),
        }
    if in_slurm:
        # A port of the dynamic range that another job of the same node hardly has.
        port = 49152 + int(environment["SLURM_JOB_ID"]) % 16384
        return {
            "coordinator_address": f"{first_node(environment['SLURM_STEP_NODELIST'])}:{port}",
            "num_processes": int(slurm_tasks),
            "process_id": int(environment["SLURM_PROCID"]),
            "cluster_detection_method": "deactivate",
            **_slurm_devices(environment),
        }
    if DISTRIBUTED in environment:
        if environment[DISTRIBUTED] != "auto":
            raise ConfigError(f"{DISTRIBUTED}={environment[DISTRIBUTED]!r}: the only value is auto")
        return {}
    return None


def _slurm_devices(environment: Mapping[str, str]) -> dict[str, Any]:
    """Tasks that share a node share its devices, one each; a task with a node of its own has all."""
    # For example "1(x4)" or "2,1".
    on_a_node = [
        int(n) for n in re.findall(r"(?<![x\d])\d+", environment.get("SLURM_STEP_TASKS_PER_NODE", "1"))
    ]
    if max(on_a_node, default=1) == 1 or environment.get("JAX_PLATFORMS") == "cpu":
        return {}
    return {"local_device_ids": [int(environment["SLURM_LOCALID"])]}


def first_node(nodes: str) -> str:
    """The first name of a Slurm list of nodes such as "gpu[003-007,012],login1"."""
    name, bracket, rest = re.match(r"([^,\[]+)(\[?)(.*)", nodes).groups()
    return name + re.match(r"\d+", rest).group() if bracket else name


def initialise(*, timeout_s: float = 100.0) -> None:
    """Join the other processes, where the environment names any; call it before anything computes.

    timeout_s: a host that gives no sign of life for so long counts as dead, and ends the others (bvl/train/peers.py).
    Raises ConfigError as `arguments` does, and UserError where the others do not come.
    """
    if jax.distributed.is_initialized():
        return
    found = arguments()
    if found is None:
        return
    # It would take SIGTERM for itself.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        # JAX aborts the process without a name, so that it should be the second to notice.
        jax.distributed.initialize(
            **found,
            heartbeat_timeout_seconds=round(2 * timeout_s) + 10,
            initialization_timeout=START_WITHIN_S,
        )
    except Exception as error:
        where = found.get("coordinator_address", "the hosts that JAX found")
        raise UserError(f"the processes of this run did not find each other at {where}: {error}") from error


def index() -> int:
    """The number of this process, from 0."""
    return jax.process_index() if jax.distributed.is_initialized() else 0


def count() -> int:
    return jax.process_count() if jax.distributed.is_initialized() else 1


def is_first() -> bool:
    """Whether this process writes what all share."""
    return index() == 0


def describe() -> str:
    """This process, as a message names it."""
    return f"host {index()} of {count()} ({socket.gethostname()}, process {os.getpid()})"


def client() -> Any:
    """The key-value store of `jax.distributed`, where it was initialised."""
    # JAX has no public name for it; orbax reaches it in the same way.
    from jax._src import distributed

    return distributed.global_state.client


def name_waits(stage: Callable[[str], contextlib.AbstractContextManager]) -> None:
    """Wait for other hosts within `stage("barrier: ...")` from now on, for a watchdog to name."""
    global _stage
    _stage = stage


def broadcast(value: Any = None) -> Any:
    """What the first host gives, on every host: anything that JSON can hold."""
    if count() == 1:
        return value
    key = f"bvl/broadcast/{next(_NUMBERS)}"
    if is_first():
        client().key_value_set(key, json.dumps(value))
        return value
    with _stage("barrier: what host 0 says"):
        return json.loads(client().blocking_key_value_get(key, int(WAIT_S * 1000)))


def gather(value: Any) -> list[Any]:
    """What every host gives, in their order, on every host: anything that JSON can hold."""
    if count() == 1:
        return [value]
    number = next(_NUMBERS)
    client().key_value_set(f"bvl/gather/{number}/{index()}", json.dumps(value))
    wait, values = int(WAIT_S * 1000), []
    for host in range(count()):
        with _stage(f"barrier: what host {host} says"):
            values.append(json.loads(client().blocking_key_value_get(f"bvl/gather/{number}/{host}", wait)))
    return values


def barrier(name: str) -> None:
    """Until every host is here."""
    if count() > 1:
        with _stage(f"barrier: {name}"):
            client().wait_at_barrier(f"bvl/{name}/{next(_NUMBERS)}", int(WAIT_S * 1000))


def on_first(function: Callable[[], Any]) -> None:
    """Run `function` on the first host while the others wait; an error there is raised by all."""
    if not is_first():
        if (problem := broadcast()) is not None:
            raise UserError(f"host 0: {problem}")
        return
    try:
        function()
    except Exception as error:
        broadcast(str(error) or type(error).__name__)
        raise
    broadcast(None)
