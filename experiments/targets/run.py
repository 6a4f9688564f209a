"""Train every arm of config.py with three seeds and write the table: what counts as a positive, and how much.

    python experiments/targets/run.py --runs runs/targets --figures path/to/openstax_figures

A run that is complete is not trained again, and one that was interrupted goes on, so the command may be stopped and
given again. Without --figures the arms on real figures are left out. Writes results.json and results.md beside this
file.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import scipy.stats
from config import ARMS

HERE = Path(__file__).resolve().parent
SEEDS = (0, 1, 2)
# What an arm is compared with: (title, base arm, other arms, metrics).
PHANTOM_METRICS = (
    "zeroshot_phantoms/auroc_macro",
    "retrieval_phantoms/i2t_r10",
    "retrieval_phantoms/t2i_r10",
)
FIGURE_METRICS = tuple(
    f"retrieval_figures/{field}/{metric}"
    for field in ("caption", "alt_text")
    for metric in ("i2t_r10", "t2i_r10")
)
COMPARISONS = (
    (
        "Soft targets, where half of the texts repeat",
        "repeats_diagonal",
        ("repeats_overlapping_labels", "repeats_label_similarity"),
        PHANTOM_METRICS,
    ),
    ("Several texts an image", "captions_one", ("captions_two",), PHANTOM_METRICS),
    (
        "Weighted directions",
        "captions_one",
        ("captions_image_to_text",),
        PHANTOM_METRICS,
    ),
    (
        "Real figures: caption and alternative text",
        "figures_caption",
        ("figures_two",),
        FIGURE_METRICS,
    ),
)


def train(arm: str, seed: int, folder: Path, figures: Path | None) -> dict:
    """The evaluation of one run, which is trained first where it is not complete."""
    workdir = folder / f"{arm}_{seed}"
    command = [sys.executable, "-m", "bvl.cli", "train", f"{HERE / 'config.py'}:arm={arm},seed={seed}"]
    command.append(f"workdir={workdir}")
    if arm.startswith("figures"):
        command.append(f"data.root={figures}")
    start = time.perf_counter()
    with open(folder / f"{arm}_{seed}.log", "w") as log:
        subprocess.run(command, check=True, stdout=log, stderr=log)
    print(f"{arm}, seed {seed}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
    return json.loads((workdir / "eval.json").read_text())


def mean_and_interval(values: list[float]) -> tuple[float, float]:
    """(mean, half width of its 95 % interval by Student's t over the seeds)."""
    factor = scipy.stats.t.ppf(0.975, len(values) - 1)
    return float(np.mean(values)), float(factor * np.std(values, ddof=1) / np.sqrt(len(values)))


def table(results: dict[str, dict[str, dict]]) -> str:
    """A markdown table for each comparison, of the arms that were trained with every seed."""
    seeds = [str(seed) for seed in SEEDS]
    parts = []
    for title, base, others, metrics in COMPARISONS:
        others = [arm for arm in others if arm in results]
        if base not in results or not others:
            continue
        lines = [f"### {title}", "", f"| arm | {' | '.join(m.partition('_')[2] for m in metrics)} |"]
        lines.append("|---|" + "---|" * len(metrics))
        for arm in (base, *others):
            cells = []
            for metric in metrics:
                values = [results[arm][seed][metric] for seed in seeds]
                mean, half = mean_and_interval(values)
                cell = f"{mean:.3f} ± {half:.3f}"
                if arm != base:
                    paired = [v - results[base][s][metric] for v, s in zip(values, seeds, strict=True)]
                    cell += " ({:+.3f} ± {:.3f})".format(*mean_and_interval(paired))
                cells.append(cell)
            lines.append(f"| {arm} | {' | '.join(cells)} |")
        chance = [results[base]["0"].get(f"{m}/chance") for m in metrics]
        lines.append("| chance | " + " | ".join("0.500" if c is None else f"{c:.3f}" for c in chance) + " |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=Path, default=Path("runs/targets"), help="where the run folders go")
    parser.add_argument("--figures", type=Path, help="the folder openstax_figures")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    args = parser.parse_args()
    args.runs.mkdir(parents=True, exist_ok=True)
    arms = [a for a in args.arms if args.figures is not None or not a.startswith("figures")]
    kept = HERE / "results.json"
    results = json.loads(kept.read_text()) if kept.is_file() else {}
    # Seed by seed, so that an early stop still leaves whole comparisons behind.
    runs = [(arm, seed) for seed in SEEDS for arm in arms]
    with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
        futures = {pool.submit(train, *run, args.runs, args.figures): run for run in runs}
        for future in concurrent.futures.as_completed(futures):
            arm, seed = futures[future]
            metrics = future.result()
            wanted = {m: v for m, v in metrics.items() if m in PHANTOM_METRICS + FIGURE_METRICS}
            wanted |= {m: v for m, v in metrics.items() if m.endswith(("/chance", "/ci95")) and "_r10" in m}
            results.setdefault(arm, {})[str(seed)] = wanted
            kept.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")
    complete = {arm: runs for arm, runs in results.items() if len(runs) == len(SEEDS)}
    (HERE / "results.md").write_text(table(complete))
    print(table(complete))


if __name__ == "__main__":
    main()
