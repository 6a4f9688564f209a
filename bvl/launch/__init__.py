"""Starting runs: on this machine, under Slurm, on a Cloud TPU, in Kubernetes. One file a target.

A target has its options (`Options`, a frozen dataclass, which also says how many `hosts` and, where that is known,
`num_devices` a run gets) and `launch(jobs, options, dry_run=...)`, which returns the exit code. What is started is
always `bvl train`; targets differ in how the processes of a run find each other (bvl/hosts.py reads it), and in who
starts a run again that was asked to stop and has saved everything, or that has lost a host (exit codes:
bvl/train/survive.py).
"""
