"""Seconds to write captions with bvl and with transformers, side by side: same sizes, batch, search and machine.

    python tools/bench_decode.py --peer-python path/to/peer/bin/python

bvl alone, and only what a word matches: `--only greedy`. A quick look: `--batches 1 --rounds 1`.

Both sides write 30 tokens, in float32 and without an early end, with a decoder of 6 layers of width 512, 8 heads and
8192 tokens over the 197 tokens of a ViT-S/16 at 224 pixels; weights are random. "decode" starts from the image
tower's tokens: their projection to the decoder's width, keys and values, the prefill, and every step of the search.
"caption" starts from normalised images. "guided" is bvl's decode with guidance 2, whose rows are doubled, beside its
own plain decode.

The sides take turns call by call, in processes that stay, so that a change in the machine's load meets both. Measure
on an idle machine: where other programs compete for the cores, torch's spinning threads lose far more than bvl.

The peer (tools/bench_transformers.py, VisionEncoderDecoderModel.generate with its cache) runs under a Python that has
torch and transformers. Both sides read requests "KIND BATCH BEAMS CALLS" and answer each with a line of JSON.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

IMAGE_SIZE, IMAGE_TOKENS, VOCABULARY, NEW_TOKENS = 224, 197, 8192, 30
START, END, PAD = 1, 2, 0
SCALE = 2.0


@dataclasses.dataclass(frozen=True)
class Case:
    """One row of a table: what is measured; `kind` is decode, caption or guided."""

    kind: str
    batch: int
    beams: int

    @property
    def name(self) -> str:
        search = "greedy" if self.beams == 1 else f"beam {self.beams}"
        return f"{self.kind}, batch {self.batch}, {search}"

    @property
    def calls(self) -> int:
        """How often a round measures it: short calls more often."""
        return max(1, 6 // (self.batch * self.beams))


@dataclasses.dataclass
class Side:
    """A running worker and what it has measured: seconds of wall clock and of processor time for each case."""

    process: subprocess.Popen[str]
    facts: dict[str, Any]
    wall: dict[Case, list[float]]
    cpu: dict[Case, list[float]]

    @classmethod
    def start(cls, command: list[str]) -> Side:
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        side = cls(process, {}, {}, {})
        side.facts = side._read()
        return side

    def _read(self) -> dict[str, Any]:
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{' '.join(self.process.args)}\nended with code {self.process.wait()}")
        return json.loads(line)

    def measure(self, case: Case, *, keep: bool) -> float:
        """Median wall seconds of one turn."""
        request = f"{case.kind} {case.batch} {case.beams} {case.calls if keep else 1}\n"
        self.process.stdin.write(request)
        self.process.stdin.flush()
        answer = self._read()
        if keep:
            self.wall.setdefault(case, []).extend(answer["wall_s"])
            self.cpu.setdefault(case, []).extend(answer["cpu_s"])
        return statistics.median(answer["wall_s"])


def make_bvl() -> Callable[[str, int, int], Callable[[], None]]:
    """`prepare(kind, batch, beams)`: a function of no arguments that runs the case to its end."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from bvl.decode.guidance import guided_merge
    from bvl.decode.options import DecodeOptions
    from bvl.decode.search import search
    from bvl.mesh import unbox
    from bvl.models.decoder import DecoderConfig
    from bvl.models.vit import ViTConfig
    from bvl.models.vlm import DualEncoder, DualEncoderConfig
    from bvl.train.environment import enable_compilation_cache, keep_freed_memory

    keep_freed_memory()
    enable_compilation_cache()
    config = DualEncoderConfig(
        image=ViTConfig(variant="S/16", pool="mean"),
        text=None,
        decoder=DecoderConfig(width=512, depth=6, num_heads=8),
        embed_dim=512,
    )
    model = DualEncoder(config, (IMAGE_SIZE, IMAGE_SIZE), VOCABULARY, NEW_TOKENS + 1, END, PAD)
    rng = np.random.default_rng(0)
    image = jnp.zeros((1, IMAGE_SIZE, IMAGE_SIZE, 3))
    token = jnp.zeros((1, 1), jnp.int32)
    shapes = unbox(jax.eval_shape(model.init, jax.random.key(0), image, token, token == 0)["params"])
    params = jax.tree.map(lambda s: jnp.asarray(rng.normal(0, 0.02, s.shape), s.dtype), shapes)

    @jax.jit
    def encode(params, images):
        features = model.apply(
            {"params": params}, images, frozenset({"tokens"}), method=DualEncoder.encode_image
        )
        return features.tokens

    @functools.partial(jax.jit, static_argnames=("options", "guided"))
    def decode(params, tokens, scale, *, options, guided):
        apply = functools.partial(model.apply, {"params": params})
        rows = len(tokens)
        if guided:
            tokens = jnp.concatenate([tokens, jnp.zeros_like(tokens)])
        visual, visual_mask = apply(tokens, jnp.arange(len(tokens)) >= rows, method="visual_tokens")
        start = jnp.full((len(tokens), 1), START, jnp.int32)
        logits, context, cache = apply(
            visual, visual_mask, start, start == START, options.max_length, method="prefill"
        )
        return search(
            logits,
            cache,
            functools.partial(apply, context, method="decoder_step"),
            options=options,
            end_id=END,
            pad_id=PAD,
            merge=guided_merge(scale) if guided else None,
        )

    def prepare(kind: str, batch: int, beams: int) -> Callable[[], None]:
        options = DecodeOptions(
            max_length=NEW_TOKENS, min_length=NEW_TOKENS - 1, beams=beams, length_penalty=0.0
        )
        images = jnp.asarray(rng.normal(size=(batch, IMAGE_SIZE, IMAGE_SIZE, 3)), jnp.float32)
        tokens = jnp.asarray(rng.normal(size=(batch, IMAGE_TOKENS, 384)), jnp.float32)

        def run() -> None:
            given = encode(params, images) if kind == "caption" else tokens
            found = decode(params, given, SCALE, options=options, guided=kind == "guided")
            lengths = np.asarray(found.lengths)
            if (lengths != NEW_TOKENS).any():
                raise SystemExit(f"texts of {lengths} tokens: these times mean nothing")

        return run

    facts = {
        "threads": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "device": jax.devices()[0].device_kind,
        "decoder_parameters": sum(x.size for x in jax.tree.leaves(params["decoder"])),
    }
    print(json.dumps(facts), flush=True)
    return prepare


def serve(prepare: Callable[[str, int, int], Callable[[], None]]) -> None:
    """Answer requests until there are no more; the first call of a case, which compiles, is not timed."""
    prepared: dict[tuple[str, ...], Callable[[], None]] = {}
    for line in sys.stdin:
        *case, calls = line.split()
        if tuple(case) not in prepared:
            kind, batch, beams = case
            prepared[tuple(case)] = prepare(kind, int(batch), int(beams))
            prepared[tuple(case)]()
        wall, cpu = [], []
        for _ in range(int(calls)):
            before = time.perf_counter(), time.process_time()
            prepared[tuple(case)]()
            wall.append(time.perf_counter() - before[0])
            cpu.append(time.process_time() - before[1])
        print(json.dumps({"wall_s": wall, "cpu_s": cpu}), flush=True)


def row(name: str, sides: tuple[tuple[Side, Case], tuple[Side, Case]], wanted: str) -> str:
    """A row that compares two (side, case): medians of wall and processor seconds, and the ratio of the former."""
    (a, case_a), (b, case_b) = sides
    walls = [statistics.median(side.wall[case]) for side, case in sides]
    cpus = [statistics.median(side.cpu[case]) for side, case in sides]
    per_round = len(a.wall[case_a]) // case_a.calls
    ratios = [
        statistics.median(a.wall[case_a][i * case_a.calls :][: case_a.calls])
        / statistics.median(b.wall[case_b][i * case_b.calls :][: case_b.calls])
        for i in range(per_round)
    ]
    by_round = " ".join(f"{x:.2f}" for x in ratios)
    return (
        f"| {name} | {walls[0]:.3f} | {walls[1]:.3f} | {walls[0] / walls[1]:.2f} | {wanted} | {by_round} "
        f"| {cpus[0]:.2f} / {cpus[1]:.2f} |"
    )


def wanted_speed(case: Case) -> str:
    """What the decoding is meant to reach, as the peer's time over bvl's."""
    if case.kind == "caption" or case.batch not in (1, 16) or case.beams not in (1, 4):
        return ""
    return ">= 1.2" if case.batch == 16 and case.beams == 1 else ">= 2"


def tables(bvl: Side, peer: Side | None, cases: list[Case]) -> str:
    rule = "|---|---|---|---|---|---|---|"
    parts = []
    if peer is not None:
        parts += ["| | transformers s | bvl s | transformers / bvl | wanted | by round | CPU s |", rule]
        parts += [
            row(case.name, ((peer, case), (bvl, case)), wanted_speed(case))
            for case in cases
            if case.kind != "guided"
        ]
        parts.append("")
    guided = [
        case for case in cases if case.kind == "guided" and dataclasses.replace(case, kind="decode") in cases
    ]
    if guided:
        parts += ["| bvl alone | guided s | plain s | guided / plain | wanted | by round | CPU s |", rule]
        parts += [
            row(case.name, ((bvl, case), (bvl, dataclasses.replace(case, kind="decode"))), "<= 2.1")
            for case in guided
        ]
    if peer is None:
        parts += ["", "| | bvl s | CPU s |", "|---|---|---|"]
        parts += [
            f"| {case.name} | {statistics.median(bvl.wall[case]):.3f} | {statistics.median(bvl.cpu[case]):.3f} |"
            for case in cases
        ]
    return "\n".join(parts)


def load_average() -> str:
    return "/".join(f"{x:.1f}" for x in os.getloadavg()) if hasattr(os, "getloadavg") else "unknown"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--beams", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--only", default="", help="cases whose name contains this, as in the tables")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--peer-python", help="a Python with torch and transformers; without it bvl runs alone"
    )
    parser.add_argument("--worker", action="store_true", help="serve bvl's side on standard input and output")
    args = parser.parse_args()
    if min(*args.batches, *args.beams, args.rounds) < 1:
        parser.error("--batches, --beams and --rounds must be at least 1")
    if args.worker:
        serve(make_bvl())
        return

    cases = [Case(*x) for x in itertools.product(("decode", "caption", "guided"), args.batches, args.beams)]
    cases = [case for case in cases if args.only in case.name]
    if not cases:
        parser.error(f"--only {args.only!r} matches no case")
    before = load_average()
    if hasattr(os, "getloadavg") and os.getloadavg()[0] > 0.5:
        print(f"warning: the load average is {before}; other programs distort the ratio", file=sys.stderr)
    script = Path(__file__).resolve()
    bvl, peer = Side.start([sys.executable, str(script), "--worker"]), None
    sides = {"bvl": bvl}
    if args.peer_python:
        peer = Side.start([args.peer_python, str(script.with_name("bench_transformers.py"))])
        sides = {"transformers": peer, "bvl": bvl}
    for number in range(args.rounds + 1):
        for case in cases:
            for name, side in sides.items():
                if case.kind == "guided" and side is peer:
                    continue
                seconds = side.measure(case, keep=number > 0)
                print(
                    f"round {number} ({'timed' if number else 'warm-up'}): {case.name}: {name} {seconds:.3f} s",
                    file=sys.stderr,
                    flush=True,
                )
    for side in sides.values():
        side.process.stdin.close()
        side.process.wait()
    print(f"{NEW_TOKENS} tokens, float32, {args.rounds} rounds\n\n{tables(bvl, peer, cases)}\n")
    threads = ", ".join(f"{name} {side.facts['threads']}" for name, side in sides.items())
    sizes = ", ".join(f"{name} {side.facts['decoder_parameters']:,}" for name, side in sides.items())
    print(
        f"decoder parameters: {sizes}; host: {os.cpu_count()} cores; threads: {threads}; "
        f"device: {bvl.facts['device']}; load average (1/5/15 min) before {before}, after {load_average()}"
    )


if __name__ == "__main__":
    main()
