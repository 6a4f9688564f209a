"""Kubernetes: a JobSet of one indexed Job, whose pods are the hosts of a run.

Index 0 is the coordinator, under the name that the JobSet's headless service gives it. A pod that ends with 143
(asked to stop, everything saved) is started again and does not count as failed; one that ends with 1 or 2 (a problem
that its message explains) fails the JobSet; any other end (killed, evicted, out of memory) starts all pods again, as
often as `restarts` says. So does 75, with which the other hosts end where one, or its node, vanishes without a word.
"""

from __future__ import annotations

import dataclasses
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from bvl.errors import UserError
from bvl.hosts import COORDINATOR, NUM_PROCESSES, PROCESS_ID
from bvl.launch.job import Job, base_name, require
from bvl.train.survive import EXIT_TERMINATED

PORT = 51234
# Of a pod's name, <JobSet>-host-0-<index>, which may have 63 characters; a random end is added to it.
LONGEST_NAME = 40
INDEX = "metadata.annotations['batch.kubernetes.io/job-completion-index']"


@dataclasses.dataclass(frozen=True)
class Options:
    """accelerator: its label in GKE; one that begins with "tpu" needs a topology too. devices_per_host: GPUs or TPU
    chips of a pod. volume: CLAIM:PATH, a persistent volume claim that all pods can write, mounted at PATH.
    directory: where the command runs. restarts: of all pods, after a crash or a lost node. grace: seconds that a pod
    gets to save in when Kubernetes ends it."""

    hosts: int = 1
    devices_per_host: int | None = None
    image: str | None = None
    accelerator: str | None = None
    topology: str | None = None
    namespace: str | None = None
    volume: str | None = None
    directory: str | None = None
    cpus_per_task: int | None = None
    memory: str | None = None
    restarts: int = 3
    grace: int = 120
    name: str | None = None

    def __post_init__(self):
        if not self.image:
            raise UserError("--on gke needs --image: a container image in which bvl is installed")
        if self.topology and not self.is_tpu:
            raise UserError(
                f"--topology {self.topology}: goes with --accelerator tpu-..., for example tpu-v5-lite-podslice"
            )
        if self.is_tpu and not self.topology:
            raise UserError(f"--accelerator {self.accelerator}: needs --topology too, for example 2x4")
        if self.accelerator and self.devices_per_host is None:
            raise UserError(
                f"--accelerator {self.accelerator}: say with --devices-per-host how many a host has"
            )
        if self.devices_per_host and not self.accelerator:
            raise UserError("--devices-per-host: say of which --accelerator")
        if self.volume and not re.fullmatch(r"[^:]+:/.+", self.volume):
            raise UserError(f"--volume {self.volume}: give CLAIM:PATH, for example shared-disk:/data")

    @property
    def is_tpu(self) -> bool:
        return bool(self.accelerator) and self.accelerator.startswith("tpu")

    @property
    def num_devices(self) -> int | None:
        # A chip of some TPUs is two devices.
        known = self.devices_per_host is not None and not self.is_tpu
        return self.hosts * self.devices_per_host if known else None


def jobset(job: Job, options: Options, name: str) -> dict[str, Any]:
    """The JobSet of one run, as a tree for YAML."""
    # Exclusive: the hosts of a TPU slice are the nodes of one pool.
    exclusive = {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"}
    metadata = {
        "name": name,
        **({"namespace": options.namespace} if options.namespace else {}),
        **({"annotations": exclusive} if options.is_tpu else {}),
    }
    exit_codes = {"containerName": "bvl", "operator": "In"}
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": metadata,
        "spec": {
            "network": {"enableDNSHostnames": True, "subdomain": name},
            "failurePolicy": {
                "maxRestarts": options.restarts,
                "rules": [
                    {"name": "problem", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}
                ],
            },
            "replicatedJobs": [
                {
                    "name": "host",
                    "replicas": 1,
                    "template": {
                        "spec": {
                            "completionMode": "Indexed",
                            "completions": options.hosts,
                            "parallelism": options.hosts,
                            # One host cannot come back into a run that goes on: all start again.
                            "backoffLimit": 0,
                            "podFailurePolicy": {
                                "rules": [
                                    {
                                        "action": "Ignore",
                                        "onExitCodes": {**exit_codes, "values": [EXIT_TERMINATED]},
                                    },
                                    # Not EXIT_PEER_LOST: the run itself has no problem.
                                    {"action": "FailJob", "onExitCodes": {**exit_codes, "values": [1, 2]}},
                                ]
                            },
                            "template": {"spec": _pod(job, options, name)},
                        }
                    },
                }
            ],
        },
    }


def _pod(job: Job, options: Options, name: str) -> dict[str, Any]:
    # The workers that read data hand over batches in shared memory, of which a pod has 64 MB otherwise.
    volumes = [{"name": "shm", "emptyDir": {"medium": "Memory"}}]
    mounts = [{"name": "shm", "mountPath": "/dev/shm"}]
    if options.volume:
        claim, _, path = options.volume.partition(":")
        volumes.append({"name": "shared", "persistentVolumeClaim": {"claimName": claim}})
        mounts.append({"name": "shared", "mountPath": path})
    environment = []
    if options.hosts > 1:
        environment = [
            {"name": COORDINATOR, "value": f"{name}-host-0-0.{name}:{PORT}"},
            {"name": NUM_PROCESSES, "value": str(options.hosts)},
            {"name": PROCESS_ID, "valueFrom": {"fieldRef": {"fieldPath": INDEX}}},
        ]
    resources = _resources(options)
    container = {
        "name": "bvl",
        "image": options.image,
        "command": job.elsewhere,
        **({"workingDir": options.directory} if options.directory else {}),
        **({"env": environment, "ports": [{"containerPort": PORT}]} if environment else {}),
        **({"resources": resources} if resources else {}),
        "volumeMounts": mounts,
    }
    selector = {}
    if options.is_tpu:
        selector = {
            "cloud.google.com/gke-tpu-accelerator": options.accelerator,
            "cloud.google.com/gke-tpu-topology": options.topology,
        }
    elif options.accelerator:
        selector = {"cloud.google.com/gke-accelerator": options.accelerator}
    return {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": options.grace,
        **({"nodeSelector": selector} if selector else {}),
        "containers": [container],
        "volumes": volumes,
    }


def _resources(options: Options) -> dict[str, Any]:
    requests = {}
    if options.cpus_per_task:
        requests["cpu"] = options.cpus_per_task
    if options.memory:
        requests["memory"] = options.memory
    limits = {}
    if options.devices_per_host:
        limits["google.com/tpu" if options.is_tpu else "nvidia.com/gpu"] = options.devices_per_host
    return {
        kind: values for kind, values in (("requests", {**requests, **limits}), ("limits", limits)) if values
    }


def manifest(jobs: Sequence[Job], options: Options) -> str:
    """The YAML of all jobs."""
    import yaml

    base = _kubernetes_name(options.name or base_name(jobs))
    names = [f"{base}-{i}" for i in range(len(jobs))] if jobs[0].name else [base]
    trees = [jobset(job, options, name) for job, name in zip(jobs, names, strict=True)]
    return yaml.safe_dump_all(trees, sort_keys=False, width=1000)


def launch(jobs: Sequence[Job], options: Options, *, dry_run: bool = False) -> int:
    """Hand the JobSets to the cluster, or print them; returns the exit code of kubectl."""
    text = manifest(jobs, options)
    if not options.volume:
        print("bvl launch: without --volume CLAIM:PATH the run folder is lost with its pods", file=sys.stderr)
    if dry_run:
        print(text, end="")
        return 0
    require("kubectl", "Kubernetes")
    code = subprocess.run(["kubectl", "apply", "-f", "-"], input=text, text=True).returncode
    if code == 0:
        space = f" -n {shlex.quote(options.namespace)}" if options.namespace else ""
        print(f"started {len(jobs)} JobSet(s); see: kubectl get jobsets,pods{space}")
    return code


def _kubernetes_name(text: str) -> str:
    """A name as Kubernetes takes it: small letters, digits and "-", beginning with a letter."""
    name = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:LONGEST_NAME].strip("-")
    return name if name[:1].isalpha() else f"bvl-{name}".strip("-")
