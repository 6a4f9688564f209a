"""Images a second of the whole input pipeline, bvl and a torch DataLoader side by side, on the same cores.

    python tools/bench_input.py --peer-python path/to/peer/bin/python --rounds 3
    python tools/bench_input.py --peer-python path/to/peer/bin/python --images path/to/folder/of/jpegs --rounds 3

JPEG files -> decode -> random resized crop to 224 px (bicubic, share of the area 0.3 to 1, ratio 3/4 to 4/3) ->
uint8 batches of 64. Without `--images`, 512 colour JPEGs of 384 x 384 px (quality 90) are made from phantoms.

bvl is its training pipeline (`bvl.data.pipeline.Pipeline`) with its default threads and prefetch; the peer is a
Dataset that does the same with PIL under a DataLoader with one worker process a core. The sides take turns, each
round in a fresh process that may use `--cores` cores (where the system can pin it). The clock runs from batch
`--warmup` to batch `--warmup` + `--batches`, with the pipeline kept busy beyond it, so neither start-up nor full
buffers count. CPU time an image counts worker processes too, and says more than the rate where other programs run.
The peer's Python needs torch, numpy and pillow.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SIZE, CROP_SCALE, CROP_RATIO = 224, (0.3, 1.0), (3 / 4, 4 / 3)
# Batches that are asked for beyond the timed ones: more than either side builds ahead.
BEYOND = 32


def make_jpegs(folder: Path, count: int) -> None:
    """Colour JPEGs of 384 x 384 px, quality 90: phantoms under faint noise, so that files are as large as photographs'."""
    import numpy as np
    from PIL import Image

    from bvl.data.phantoms import Phantoms, PhantomSource

    source = PhantomSource(Phantoms(num_patients=count, image_size=384))
    for i in range(count):
        noise = np.random.default_rng(i).normal(0, 6, (384, 384, 3))
        pixels = np.clip(source[i]["image"].astype(np.float32).reshape(384, 384, -1) + noise, 0, 255)
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i:05d}.jpg", quality=90)


def bvl_batches(files: list[str], batch_size: int, batches: int, data: dict[str, Any]) -> Iterator[Any]:
    """uint8 [batch, 224, 224, 3] from bvl's training pipeline; `data`: options of DataConfig."""
    from bvl.data.pipeline import DataConfig, Pipeline
    from bvl.data.sources import RecordSet, Source
    from bvl.data.transforms import Augment, Preprocess

    with tempfile.TemporaryDirectory() as folder:
        manifest = Path(folder) / "records.jsonl"
        manifest.write_text("".join(json.dumps({"id": f, "image": f}) + "\n" for f in files))
        source = Source(root=folder, split=None)
        sets = [RecordSet(source)]
    pipeline = Pipeline(
        DataConfig(
            train=(source,),
            preprocess=Preprocess(image_size=SIZE),
            augment=Augment(crop_scale=CROP_SCALE, crop_ratio=CROP_RATIO),
            **data,
        ),
        sets=sets,
        keys_of_tasks={"images": frozenset({"image"})},
        tokenizer=None,
        classes=(),
        batch_size=batch_size,
        seed=0,
    )
    for batch, unreadable in pipeline.batches(start=0, stop=batches):
        if unreadable:
            raise SystemExit(f"cannot be read: {unreadable}")
        yield batch["image"]


class CroppedImages:
    """A torch map-style Dataset: the same files, the same distribution of crops, the same resampling."""

    def __init__(self, files: list[str], length: int):
        self.files, self.length = files, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Any:
        import numpy as np
        import torch
        from PIL import Image

        with Image.open(self.files[index % len(self.files)]) as picture:
            picture = picture.convert("RGB")
        picture = picture.resize((SIZE, SIZE), Image.Resampling.BICUBIC, box=random_crop(*picture.size))
        return torch.from_numpy(np.array(picture))


def random_crop(width: int, height: int) -> tuple[float, float, float, float]:
    """A box in pixels, drawn as bvl's `Augment` draws it; the whole image where ten draws do not fit."""
    low, high = (math.log(ratio) for ratio in CROP_RATIO)
    for _ in range(10):
        area = width * height * random.uniform(*CROP_SCALE)
        ratio = math.exp(random.uniform(low, high))
        w, h = math.sqrt(area * ratio), math.sqrt(area / ratio)
        if w <= width and h <= height:
            x, y = random.uniform(0, width - w), random.uniform(0, height - h)
            return x, y, min(x + w, width), min(y + h, height)
    return 0.0, 0.0, float(width), float(height)


def torch_batches(files: list[str], batch_size: int, batches: int, cores: int) -> Iterator[Any]:
    """uint8 [batch, 224, 224, 3] from a DataLoader with a worker process a core."""
    import torch.utils.data

    loader = torch.utils.data.DataLoader(
        CroppedImages(files, batch_size * batches),
        batch_size=batch_size,
        shuffle=True,
        num_workers=cores,
        persistent_workers=True,
    )
    for batch in loader:
        yield batch.numpy()


def cpu_seconds() -> float:
    """Processor time of this process and of its live worker processes (theirs on Linux only)."""
    total = time.process_time()
    for child in multiprocessing.active_children():
        stat = Path(f"/proc/{child.pid}/stat")
        if stat.exists():
            # Fields 14 and 15 of proc(5), counted behind the name, which may hold spaces.
            user, system = stat.read_text().rpartition(")")[2].split()[11:13]
            total += (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")
    return total


def measure(side: str, args: argparse.Namespace) -> dict[str, Any]:
    """Images a second of one side, in this process."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.cores])
    files = image_files(args.images)
    batches = args.warmup + args.batches + BEYOND
    if side == "bvl":
        data = {k: v for k in ("threads", "prefetch", "workers") if (v := getattr(args, k)) is not None}
        stream = bvl_batches(files, args.batch, batches, data)
    else:
        stream = torch_batches(files, args.batch, batches, args.cores)
    started, cpu, mean = 0.0, 0.0, 0.0
    for i, image in enumerate(stream):
        if image.shape != (args.batch, SIZE, SIZE, 3) or image.dtype != "uint8":
            raise SystemExit(f"{side} gave {image.dtype}{image.shape}")
        if i == args.warmup:
            mean = float(image.mean())
            started, cpu = time.perf_counter(), cpu_seconds()
        if i == args.warmup + args.batches:
            break
    seconds, cpu = time.perf_counter() - started, cpu_seconds() - cpu
    count = args.batches * args.batch
    return {"images_per_s": count / seconds, "cpu_ms_per_image": 1000 * cpu / count, "mean_pixel": mean}


def image_files(folder: Path) -> list[str]:
    files = sorted(str(p.resolve()) for p in folder.rglob("*") if p.suffix.lower() in (".jpg", ".jpeg"))
    if not files:
        raise SystemExit(f"{folder}: there is no .jpg file")
    return files


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=Path, help="folder of JPEGs; without it they are made from phantoms")
    parser.add_argument("--count", type=int, default=512, help="how many JPEGs to make")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--batches", type=int, default=40, help="timed batches a round")
    parser.add_argument("--warmup", type=int, default=12, help="batches before the clock starts")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--threads", type=int, help="bvl: data.threads (its default where absent)")
    parser.add_argument("--prefetch", type=int, help="bvl: data.prefetch (its default where absent)")
    parser.add_argument("--workers", type=int, help="bvl: data.workers (its default where absent)")
    parser.add_argument("--peer-python", help="a Python with torch; without it bvl runs alone")
    parser.add_argument("--worker", choices=("bvl", "torch"), help="measure here and print one JSON line")
    args = parser.parse_args()
    if min(args.count, args.batch, args.batches, args.rounds, args.cores) < 1 or args.warmup < 0:
        parser.error("--count, --batch, --batches, --rounds and --cores must be at least 1")
    if args.worker:
        if args.images is None:
            parser.error("--worker needs --images")
        print(json.dumps(measure(args.worker, args)))
        return

    with tempfile.TemporaryDirectory() as folder:
        if args.images is None:
            make_jpegs(Path(folder), args.count)
            args.images = Path(folder)
        # Read once, so that neither side meets a cold page cache.
        sizes = [len(Path(f).read_bytes()) for f in image_files(args.images)]
        python = {"torch": args.peer_python, "bvl": sys.executable}
        options = [
            f"--{name}={value}"
            for name in ("images", "batch", "batches", "warmup", "cores", "threads", "prefetch", "workers")
            if (value := getattr(args, name)) is not None
        ]
        load = os.getloadavg()[0]
        rounds: dict[str, list[dict[str, float]]] = {side: [] for side in python if python[side]}
        for number in range(args.rounds):
            for side in rounds:
                result = run_json([python[side], str(Path(__file__).resolve()), "--worker", side, *options])
                rounds[side].append(result)
                print(
                    f"round {number + 1}: {side} {result['images_per_s']:.1f} images/s "
                    f"(mean pixel {result['mean_pixel']:.1f})",
                    file=sys.stderr,
                    flush=True,
                )
    print(f"{len(sizes)} JPEGs of {statistics.mean(sizes) / 1024:.0f} KiB, batch {args.batch}\n")
    print(table(rounds))
    print(
        f"\nhost: {os.cpu_count()} cores, {args.cores} used; load average before {load:.1f}, "
        f"after {os.getloadavg()[0]:.1f}"
    )


def table(rounds: dict[str, list[dict[str, float]]]) -> str:
    """A markdown table over all rounds; the first side named is what the others are compared with."""
    base = next(iter(rounds))
    lines = [
        f"| | median images/s | max | by round | CPU ms/image | images/s / {base} |",
        "|---|---|---|---|---|---|",
    ]
    rates = {side: [r["images_per_s"] for r in results] for side, results in rounds.items()}
    for side, results in rounds.items():
        median, cpu = (
            statistics.median(rates[side]),
            statistics.median(r["cpu_ms_per_image"] for r in results),
        )
        lines.append(
            f"| {side} | {median:.1f} | {max(rates[side]):.1f} | {' '.join(f'{r:.1f}' for r in rates[side])} "
            f"| {cpu:.2f} | {median / statistics.median(rates[base]):.3f} |"
        )
    return "\n".join(lines)


def run_json(command: list[str]) -> dict[str, Any]:
    """The last line that a command prints, as JSON; stops with its output where it fails."""
    done = subprocess.run(command, capture_output=True, text=True)
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        raise SystemExit(f"{' '.join(command)}\nended with code {done.returncode}:\n{done.stderr[-3000:]}")
    return json.loads(lines[-1])


if __name__ == "__main__":
    main()
