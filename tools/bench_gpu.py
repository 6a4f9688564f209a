"""How well an accelerator is used: a bf16 ViT-L/14 CLIP step of bvl, beside open_clip with torch.compile.

    python tools/bench_gpu.py --peer-python path/to/peer/bin/python
    python tools/bench_gpu.py --small          # in miniature, on a CPU; chosen by itself where there is no accelerator

It prints, each part measured in a process of its own, one after the other:

- the card's rate: products of square bf16 matrices, the best of several sizes, in FLOP/s;
- bvl: the step of `bvl train` (uint8 images to AdamW update; bf16 towers, f32 parameters, softmax loss, pairs on the
  device). Achieved FLOP/s are the step's matrix products and convolutions, counted in its trace without
  rematerialisation (bvl/train/flops.py), over its median time; the goal is half of the card's rate;
- the peer: open_clip's model of the same name and batch, forward and backward by `torch.compile` under bf16 autocast,
  ClipLoss, fused AdamW where there is one. Images lie on the device, already normalised. bvl and the peer take
  turns for `--rounds`; the goal is 1.2 times its examples a second;
- the largest batch, by doubling, whose compiled program fits into the device's memory by the compiler's own account
  (`memory_analysis`; nothing is run), with the memory-bounded loss and with its naive twin: of the loss and its
  gradient alone, of the whole step, and of the step in microbatches of `--micro`;
- the share of the time that a step waits for data: phantoms through the real input pipeline, on this machine's cores.

The peer's Python needs torch, open_clip and bvl; a part that cannot run says why, and the others go on.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from clip_step import IMAGE_SIZE, MODELS, make_clip_step, vocabulary

GOAL_SHARE, GOAL_RATIO = 0.5, 1.2


def device(args: argparse.Namespace) -> dict[str, Any]:
    """What JAX runs on here."""
    import jax

    found = jax.devices()[0]
    stats = found.memory_stats() or {}
    return {"platform": found.platform, "kind": found.device_kind, "memory": stats.get("bytes_limit")}


def rate(args: argparse.Namespace) -> dict[str, Any]:
    """FLOP/s of bf16 matrix products."""
    import jax
    import jax.numpy as jnp

    turns, best = 16, {}
    for size in (256, 512, 1024) if args.small else (4096, 8192, 16384):
        x, w = (jax.random.normal(jax.random.key(i), (size, size), jnp.bfloat16) for i in range(2))
        w = w / size**0.5

        @jax.jit
        def products(x, w):
            return jax.lax.fori_loop(0, turns, lambda _, x: x @ w, x)

        products(x, w).block_until_ready()
        seconds = []
        for _ in range(5):
            start = time.perf_counter()
            products(x, w).block_until_ready()
            seconds.append(time.perf_counter() - start)
        best[size] = turns * 2 * size**3 / min(seconds)
    return {"flops_per_s": max(best.values()), "by_size": best}


def bvl(args: argparse.Namespace) -> dict[str, Any]:
    """Seconds of bvl's steps, and the floating-point operations of one."""
    import jax

    from bvl.train.environment import keep_freed_memory
    from bvl.train.flops import count_flops

    keep_freed_memory()
    made = make_clip_step(args.model, args.batch, dtype="bfloat16", remat=args.remat, scan=args.scan)
    plain = made
    if args.remat != "none":
        plain = make_clip_step(args.model, args.batch, dtype="bfloat16", scan=args.scan, abstract=True)
    flops = count_flops(plain.step.trace(plain.state, {}, plain.batch).jaxpr)
    params = sum(x.size for x in jax.tree.leaves(made.state.params))
    state, seconds = made.state, []
    for _ in range(args.steps + 2):
        start = time.perf_counter()
        state, metrics = jax.block_until_ready(made.step(state, {}, made.batch))
        seconds.append(time.perf_counter() - start)
    return {"all_s": seconds[2:], "first_s": seconds[0], "flops": flops, "params": params,
            "loss": float(metrics["step"]["loss"][0]),
            "memory": (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")}  # fmt: skip


def peer(args: argparse.Namespace) -> dict[str, Any]:
    """Seconds of open_clip's steps."""
    from bvl.convert.peers import import_peer

    torch = import_peer("torch", what="the peer")
    open_clip = import_peer("open_clip", what="the peer")
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    on = "cuda" if torch.cuda.is_available() else "cpu"
    if args.model == "miniature":
        image, text = (MODELS["miniature"][key] for key in ("image", "text"))
        vocab_size, context_length = vocabulary(args.model)
        model = open_clip.CLIP(
            embed_dim=MODELS["miniature"]["embed_dim"],
            vision_cfg=dict(
                layers=image["depth"], width=image["width"], patch_size=32, image_size=IMAGE_SIZE,
                head_width=image["width"] // image["num_heads"],
            ),
            text_cfg=dict(
                context_length=context_length, vocab_size=vocab_size, width=text["width"],
                heads=text["num_heads"], layers=text["depth"],
            ),
        )  # fmt: skip
    else:
        model = open_clip.create_model(args.model, pretrained=None)
    model = model.train().to(on)
    params = sum(p.numel() for p in model.parameters())
    loss = open_clip.ClipLoss()
    fused = {"fused": True} if on == "cuda" else {}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.1, **fused)
    vocab_size, context_length = model.vocab_size, model.context_length
    images = torch.randn(args.batch, 3, IMAGE_SIZE, IMAGE_SIZE, device=on)
    tokens = torch.randint(1, vocab_size - 2, (args.batch, context_length), device=on)
    tokens[:, -1] = vocab_size - 1
    encode = torch.compile(model) if args.compile else model
    wait = torch.cuda.synchronize if on == "cuda" else lambda: None
    seconds = []
    for _ in range(args.steps + 3):
        start = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(on, dtype=torch.bfloat16):
            value = loss(*encode(images, tokens)[:3])
        value.backward()
        optimizer.step()
        wait()
        seconds.append(time.perf_counter() - start)
    return {"all_s": seconds[3:], "first_s": seconds[0], "params": params, "loss": float(value.detach()),
            "memory": torch.cuda.max_memory_allocated() if on == "cuda" else None}  # fmt: skip


def needed_bytes(compiled: Any) -> int:
    """Memory of a compiled program: arguments, results and everything in between."""
    memory = compiled.memory_analysis()
    own_results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return memory.argument_size_in_bytes + own_results + memory.temp_size_in_bytes


def largest(args: argparse.Namespace) -> dict[str, Any]:
    """Largest batch that fits, by what is compiled and by the loss."""
    import dataclasses

    import jax
    import jax.numpy as jnp

    from bvl.losses.contrastive import naive_softmax_loss, softmax_loss
    from bvl.tasks.base import LossOutput
    from bvl.tasks.contrastive import Contrastive

    limit = args.memory * 1e9

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Naive(Contrastive):
        """With the whole matrix of logits."""

        def loss(self, ctx):
            image, text = ctx.features["image"].embed, ctx.features["text"].embed
            return LossOutput(naive_softmax_loss(image, text, scale=ctx.scale))

    def alone(batch, loss):
        x = jax.ShapeDtypeStruct((batch, MODELS[args.model]["embed_dim"]), jnp.float32)
        function = {"bounded": softmax_loss, "naive": naive_softmax_loss}[loss]
        call = lambda image, text, scale: function(image, text, scale=scale)  # noqa: E731
        grad = jax.jit(jax.value_and_grad(call, argnums=(0, 1, 2)))
        return grad.lower(x, x, jax.ShapeDtypeStruct((), jnp.float32)).compile()

    def step(batch, loss, accumulate=1):
        task = {"bounded": Contrastive, "naive": Naive}[loss](targets="diagonal")
        return make_clip_step(
            args.model, batch, dtype="bfloat16", remat=args.remat, scan=True, abstract=True,
            accumulate=accumulate, tasks={"contrastive": task},
        ).compiled()  # fmt: skip

    kinds = {
        "loss and gradient alone": (alone, 1024),
        "step": (step, args.micro),
        f"step in microbatches of {args.micro}": (
            lambda batch, loss: step(batch, loss, batch // args.micro),
            2 * args.micro,
        ),
    }
    found: dict[str, Any] = {}
    for kind, (make, first) in kinds.items():
        for loss in ("bounded", "naive"):
            batch, fits = first, None
            # 2^24 pairs are as many as anyone trains with.
            while batch <= 2**24 and (need := compiled_bytes(make, batch, loss)) <= limit:
                fits, batch = (batch, need), batch * args.growth
            found.setdefault(kind, {})[loss] = fits
    return {"limit": limit, "largest": found}


def compiled_bytes(make: Any, batch: int, loss: str) -> float:
    """Bytes of a program, infinite where the compiler itself finds that it cannot fit."""
    import jax

    try:
        return needed_bytes(make(batch, loss))
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return float("inf")


def data(args: argparse.Namespace) -> dict[str, Any]:
    """Share of the time between steps that goes by in waiting for the input pipeline."""
    import jax

    from bvl.data.phantoms import Phantoms
    from bvl.data.pipeline import DataConfig, Pipeline, training_texts
    from bvl.data.sources import RecordSet, Source
    from bvl.data.text import Tokenizer, TokenizerConfig
    from bvl.data.transforms import Preprocess
    from bvl.mesh import to_global

    made = make_clip_step(args.model, args.batch, dtype="bfloat16", remat=args.remat, scan=args.scan)
    phantoms = Phantoms(num_patients=max(args.batch, 64), image_size=IMAGE_SIZE)
    config = DataConfig(
        train=(Source(phantoms=phantoms, split=None, cache=True),),
        preprocess=Preprocess(image_size=IMAGE_SIZE),
        tokenizer=TokenizerConfig(vocab_size=1000, context_length=vocabulary(args.model)[1]),
    )
    sets = [RecordSet(source) for source in config.sources()]
    pipeline = Pipeline(
        config,
        sets=sets,
        keys_of_tasks={name: task.fields() for name, task in made.program.tasks.items()},
        tokenizer=Tokenizer.train(training_texts(sets), config.tokenizer),
        classes=(),
        batch_size=args.batch,
        seed=0,
    )
    warm_up = 3
    batches = pipeline.batches(start=0, stop=warm_up + args.steps)
    state, metrics, waited, total = made.state, None, 0.0, 0.0
    for number in range(warm_up + args.steps):
        start = time.perf_counter()
        batch, _ = next(batches)
        got = time.perf_counter()
        before = metrics
        state, metrics = made.step(state, {}, to_global(batch, made.program.mesh))
        # One step runs while the next batch is fetched, as in `bvl train`.
        jax.block_until_ready(before)
        if number >= warm_up:
            waited, total = waited + got - start, total + time.perf_counter() - start
    return {"share": waited / total, "s_per_step": total / args.steps}


PARTS = {"device": device, "rate": rate, "bvl": bvl, "peer": peer, "largest": largest, "data": data}


def run(part: str, args: argparse.Namespace) -> dict[str, Any] | None:
    """A part in a process of its own; None where it could not run, and stderr says why."""
    python = args.peer_python if part == "peer" else sys.executable
    options = [
        x
        for name in ("model", "batch", "steps", "remat", "micro", "memory", "growth")
        if getattr(args, name) is not None
        for x in (f"--{name}", str(getattr(args, name)))
    ]
    options += ["--small"] * bool(args.small) + ["--scan"] * args.scan + ["--no-compile"] * (not args.compile)
    command = [python, str(Path(__file__).resolve()), "--part", part, *options]
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True)
    lines = done.stdout.strip().splitlines()
    print(f"{part}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
    if done.returncode or not lines:
        print(f"{part} could not run:\n{done.stderr[-2000:]}", file=sys.stderr, flush=True)
        return None
    return json.loads(lines[-1])


def report(args: argparse.Namespace, parts: dict[str, Any]) -> None:
    """The table of everything that was measured."""
    card = parts["rate"] and parts["rate"]["flops_per_s"]
    ours, theirs = ([s for r in parts[side] if r for s in r["all_s"]] for side in ("bvl", "peer"))
    print(f"\n{args.model}, batch {args.batch}, bf16, remat={args.remat}, {parts['device']['kind']}\n")
    print("| what | measured | goal |\n|---|---|---|")
    if card:
        print(f"| bf16 matrix products | {card / 1e12:.3g} TFLOP/s | |")
    if ours:
        seconds, flops = statistics.median(ours), parts["bvl"][0]["flops"]
        print(
            f"| bvl | {seconds:.4f} s/step, {args.batch / seconds:.1f} examples/s, {flops / seconds / 1e12:.3g} TFLOP/s | |"
        )
        if card:
            print(f"| bvl's share of the card's rate | {flops / seconds / card:.3f} | {GOAL_SHARE} |")
    if theirs:
        seconds = statistics.median(theirs)
        compiled = "torch.compile" if args.compile else "not compiled"
        print(f"| open_clip ({compiled}) | {seconds:.4f} s/step, {args.batch / seconds:.1f} examples/s | |")
    if ours and theirs:
        ratio = statistics.median(theirs) / statistics.median(ours)
        print(f"| bvl / open_clip, examples/s | {ratio:.2f} | {GOAL_RATIO} |")
        sizes = [next(r["params"] for r in parts[side] if r) for side in ("bvl", "peer")]
        if sizes[0] != sizes[1]:
            print(f"| parameters differ | {sizes[0]:,} and {sizes[1]:,} | |")
    for side in ("bvl", "peer"):
        peaks = [r["memory"] for r in parts[side] if r and r["memory"]]
        if peaks:
            print(f"| peak device memory, {side} | {max(peaks) / 1e9:.1f} GB | |")
    if parts["largest"]:
        limit = parts["largest"]["limit"] / 1e9
        for kind, found in parts["largest"]["largest"].items():
            for loss, fits in found.items():
                text = "not even the first" if fits is None else f"{fits[0]:,} ({fits[1] / 1e9:.2f} GB)"
                print(f"| largest batch in {limit:.3g} GB, {kind}, {loss} loss | {text} | |")
    if parts["data"]:
        wait, seconds = parts["data"]["share"], parts["data"]["s_per_step"]
        print(f"| waiting for data | {wait:.1%} of {seconds:.4f} s/step | |")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--small", action="store_true", help="the model in miniature, short runs")
    parser.add_argument("--model", choices=MODELS, help="default ViT-L-14, with --small miniature")
    parser.add_argument("--batch", type=int, help="default 256, with --small 16")
    parser.add_argument("--steps", type=int, help="timed steps a round; default 20, with --small 5")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--micro", type=int, help="rows of a microbatch; default 64, with --small 8")
    parser.add_argument("--memory", type=float, help="GB, default: the device's; with --small 0.5")
    parser.add_argument("--growth", type=int, help="factor from batch to batch; default 2, with --small 8")
    parser.add_argument("--remat", choices=("none", "full", "dots"), default="none")
    parser.add_argument("--scan", action="store_true", help="blocks in a scan, which compiles faster")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True, help="of the peer")
    parser.add_argument("--peer-python", default=sys.executable)
    parser.add_argument("--part", choices=PARTS, help="measure this here and print one JSON line")
    args = parser.parse_args()
    if args.part:
        print(json.dumps(PARTS[args.part](args)))
        return

    found = run("device", args)
    if found is None:
        raise SystemExit("JAX has no device")
    if found["platform"] == "cpu" and not args.small:
        print("no accelerator here: in miniature, and nothing below says how fast bvl is", file=sys.stderr)
        args.small = True
    defaults = dict(
        model="ViT-L-14", batch=256, steps=20, micro=64, growth=2, memory=(found["memory"] or 16e9) / 1e9
    )
    if args.small:
        defaults = dict(model="miniature", batch=16, steps=5, micro=8, growth=8, memory=0.5)
    for name, value in defaults.items():
        setattr(args, name, value if getattr(args, name) is None else getattr(args, name))
    parts: dict[str, Any] = {"device": found, "rate": run("rate", args), "bvl": [], "peer": []}
    for _ in range(args.rounds):
        for side in ("bvl", "peer"):
            parts[side].append(run(side, args))
    parts |= {part: run(part, args) for part in ("largest", "data")}
    report(args, parts)


if __name__ == "__main__":
    main()
