"""bvl plan."""

from __future__ import annotations

import argparse

from bvl.cli.options import add_verb, positive


def add_plan(verbs) -> None:
    """Add the verb that says what a config needs."""
    plan = add_verb(verbs, "plan", _plan, "say what a config needs of memory, work and transfers, before the first step",
                    "bvl plan configs/clip.py --devices 64 --memory 80GB")  # fmt: skip
    plan.add_argument("config", help="path/to/config.py, or path/to/config.py:ARG")
    plan.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="for example model.image.remat=full mesh.shape=1,64,1",
    )
    plan.add_argument(
        "--devices", type=positive, help="devices of all hosts together (default: those there are)"
    )
    plan.add_argument("--memory", metavar="SIZE", help="memory of one device, for example 80GB or 16GiB")
    plan.add_argument(
        "--peak-flops", type=float, metavar="X", help="FLOP/s of one device at best, for example 989e12"
    )
    plan.add_argument(
        "--no-compile",
        action="store_true",
        help="leave out what the compiler says, which can take minutes",
    )


def _plan(args: argparse.Namespace) -> int:
    import jax

    # Before anything starts JAX: the devices are only compiled for.
    if args.devices is not None:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", args.devices)
    if not args.no_compile and jax.default_backend() == "cpu":
        # The program never runs; memory and transfers are the same, and compiling takes a fraction of the time.
        jax.config.update("jax_disable_most_optimizations", True)
    from bvl.config import load_config
    from bvl.train.plan import parse_memory, plan_table

    memory = None if args.memory is None else parse_memory(args.memory)
    config = load_config(args.config, args.overrides)
    table = plan_table(
        config,
        num_devices=args.devices,
        memory=memory,
        peak_flops=args.peak_flops,
        compiled=not args.no_compile,
    )
    print(table, end="")
    return 0
