"""Train the models of config.py, sweep the guidance scale, measure length and quality control, and write it all down.

    python experiments/guided_captions/run.py --runs runs/guided_captions --data path/to/data

--data is the folder that holds openstax_figures and covid_cxr; without it the sweep on real text is left out. A run
that is complete is not trained again, one that was interrupted goes on, and a sweep that is written is kept, so the
command may be stopped and given again. --dev looks at the development split and writes below --runs: with it the texts
were chosen, before the test split was looked at.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from config import DROPOUTS, NOISY, PHANTOMS, QUALITY_BINS

from bvl.data.phantoms import FINDING_LEXICON, PhantomSource, write_phantoms
from bvl.data.sources import Source
from bvl.evals.base import EvalResult
from bvl.evals.caption import Captions
from bvl.evals.score import score_records
from bvl.evals.sweep import Point, plot_frontier, sweep_guidance, write_frontier
from bvl.metrics.labeller import Lexicon, label_text
from bvl.runs import Components, load_components, write_atomic

HERE = Path(__file__).resolve().parent
GAMMAS = (0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0)
# Which of the two texts that captioners were trained on is asked for in the sweeps; chosen on the development split.
SECTION = "captions"
NOISY_IMAGES = 5000
LEXICONS = {
    modality: Lexicon(findings, normal={"no abnormality": tuple(findings)})
    for modality, findings in FINDING_LEXICON.items()
}


def train(arm: str, runs: Path, *overrides: str) -> Path:
    """The run folder of an arm, which is trained first where it is not complete."""
    workdir = runs / arm
    command = [
        sys.executable,
        "-m",
        "bvl.cli",
        "train",
        f"{HERE / 'config.py'}:arm={arm}",
        f"workdir={workdir}",
    ]
    start = time.perf_counter()
    with open(runs / f"{arm}.log", "a") as log:
        subprocess.run([*command, *overrides], check=True, stdout=log, stderr=log)
    print(f"{arm}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
    return workdir


def phantom_suite(split: str, scorer: Path, **options) -> Captions:
    """All held-out phantoms, judged by the separately trained scorer in pools of 500."""
    source = Source(phantoms=PHANTOMS, split=split, cache=True)
    return Captions(
        source=source, scorer=str(scorer), lexicon="phantoms", max_images=None, text="captions", **options
    )


def weights_of(components: Components, suite: Captions) -> str:
    """Hashes of the captioner and its judge: a result that is kept holds for these."""
    return f"{components.weights_hash()}, judged by {load_components(suite.scorer).weights_hash()}"


def swept(work: Path, out: Path, components: Components, suite: Captions, title: str) -> list[Point]:
    """The sweep of a model, read back from `work` where it was done before with the same weights.

    `out` gets its table and figure, `work` also every caption.
    """
    kept, weights = work / "points.json", weights_of(components, suite)
    if kept.is_file() and (found := json.loads(kept.read_text()))["weights"] == weights:
        rows = found["points"]
        return [Point(row["guidance"], EvalResult(row["metrics"], row["provenance"], [])) for row in rows]
    points = sweep_guidance(components, suite, GAMMAS)
    write_frontier(points, work, title=title)
    out.mkdir(parents=True, exist_ok=True)
    for suffix in (".csv", ".md", ".png"):
        shutil.copy(work / f"frontier{suffix}", out / f"{work.name}{suffix}")
    rows = [{"guidance": p.guidance, "metrics": p.metrics, "provenance": p.result.provenance} for p in points]
    write_atomic(kept, json.dumps({"weights": weights, "points": rows}, indent=1) + "\n")
    return points


def judged(kept: Path, components: Components, suite: Captions) -> dict:
    """The metrics of one suite, read back where they were written before for the same weights."""
    weights = weights_of(components, suite)
    if not kept.is_file() or json.loads(kept.read_text())["weights"] != weights:
        result = suite.run(components, batch_size=256)
        found = {"weights": weights, "metrics": result.metrics, "provenance": result.provenance}
        write_atomic(kept, json.dumps(found, indent=1) + "\n")
    return json.loads(kept.read_text())["metrics"]


def facts_table(work: Path, split: str) -> str:
    """What a judge that knows the truth makes of the captions of each sweep: a markdown table.

    Findings that a caption states (by the labeller) are compared with the facts. R@1: the chance to pick the image from
    500 at random among those with all of these facts; 0 where its own do not agree.
    """
    source = PhantomSource(PHANTOMS)
    records = {r["id"]: r for r in (source.describe(int(i)) for i in source.indices(split))}
    lines = [
        "| image_dropout | g | R@1 by facts | captions without error | findings stated |",
        "|---" * 5 + "|",
    ]
    for arm, dropout in DROPOUTS.items():
        rows = [json.loads(line) for line in (work / arm / "captions.jsonl").read_text().splitlines()]
        for scale in rows[0]["captions"]:
            hits, counts = [], []
            for row in rows:
                own = records[row["id"]]
                stated = label_text(row["captions"][scale], LEXICONS[own["modality"]])
                alike = sum(agrees(record, own["modality"], stated) for record in records.values())
                found = agrees(own, own["modality"], stated)
                hits.append(found / (1 + (alike - 1) * 499 / (len(records) - 1)) if found else 0.0)
                counts.append(len(stated))
            right = np.mean([hit > 0 for hit in hits])
            lines.append(
                f"| {dropout:g} | {scale} | {np.mean(hits):.4f} | {right:.3f} | {np.mean(counts):.2f} |"
            )
    return "\n".join(lines) + "\n"


def agrees(record: dict, modality: str, stated: dict[str, str]) -> bool:
    """Whether a phantom is of the modality and all that is stated of findings is true of it."""
    findings = record["facts"]["findings"]
    return record["modality"] == modality and all(
        findings[name]["presence"] == status for name, status in stated.items()
    )


def shuffled_phantoms(folder: Path) -> Path:
    """A folder of phantoms; in its training split the captions of half of the records are exchanged with each other."""
    if (folder / "records.jsonl").is_file():
        return folder
    clean = folder.with_name(folder.name + "_clean")
    if not (clean / "records.jsonl").is_file():
        # Other patients than the scorer's.
        write_phantoms(clean, dataclasses.replace(PHANTOMS, seed=1), NOISY_IMAGES)
    records = [json.loads(line) for line in (clean / "records.jsonl").read_text().splitlines()]
    rng = np.random.default_rng(0)
    places = rng.permutation([i for i, r in enumerate(records) if r["split"] == "train"])
    moved = places[: len(places) // 2]
    captions = [records[i]["caption"] for i in moved]
    for i, caption in zip(np.roll(moved, 1), captions, strict=True):
        records[i] = {**records[i], "caption": caption, "shuffled": True}
    folder.mkdir(parents=True, exist_ok=True)
    for record in records:
        record["image"] = f"../{clean.name}/{record['image']}"
        record.pop("mask", None)
    write_atomic(folder / "records.jsonl", "".join(json.dumps(r) + "\n" for r in records))
    return folder


def scored(folder: Path, scorer: Path) -> Path:
    """The records of `folder` with the quality that the scorer finds in each pair of image and caption."""
    out = folder.with_name(folder.name + "_scored")
    if not (out / "records.jsonl").is_file():
        score_records(
            load_components(scorer), folder, out, text_field="caption", bins=QUALITY_BINS, by="count"
        )
    return out


def cell(metrics: dict, name: str, digits: int = 3) -> str:
    """A value with its 95 % interval."""
    if name not in metrics:
        return ""
    ends = metrics.get(f"{name}/ci95")
    interval = f" [{ends[0]:.{digits}f}, {ends[1]:.{digits}f}]" if ends else ""
    return f"{metrics[name]:.{digits}f}{interval}"


def table(rows: Iterable[tuple[str, dict]], columns: dict[str, str]) -> str:
    """A markdown table: name of the row, then a metric for each column."""
    lines = ["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for name, metrics in rows:
        lines.append(f"| {name} | " + " | ".join(cell(metrics, column) for column in columns.values()) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--runs", type=Path, default=Path("runs/guided_captions"), help="where the run folders go"
    )
    parser.add_argument("--data", type=Path, help="the folder of openstax_figures and covid_cxr")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument(
        "--dev", action="store_true", help="look at the development split, write below --runs"
    )
    args = parser.parse_args()
    runs, split = args.runs, "val" if args.dev else "test"
    results, work = (runs / "dev" if args.dev else HERE), runs / f"results_{split}"
    runs.mkdir(parents=True, exist_ok=True)

    with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
        real = [f"data.root={args.data}"]
        # The scorer first: what is trained on scored captions waits for it.
        towers = pool.submit(train, "towers", runs)
        waiting = {arm: pool.submit(train, arm, runs) for arm in DROPOUTS}
        if args.data is not None:
            waiting |= {arm: pool.submit(train, arm, runs, *real) for arm in ("real_scorer", "real")}
        waiting["scorer"] = pool.submit(train, "scorer", runs, f"init_from={towers.result()}")
        start = f"init_from={waiting['dropout_0.2'].result()}"
        waiting["lengths"] = pool.submit(train, "lengths", runs, start)
        scorer = waiting["scorer"].result()
        folder = scored(shuffled_phantoms(runs / "shuffled"), scorer)
        waiting |= {arm: pool.submit(train, arm, runs, f"data.root={folder}") for arm in NOISY}
        trained = {arm: future.result() for arm, future in waiting.items()}

    suite = phantom_suite(split, scorer, section=SECTION)
    curves = {}
    for arm, dropout in DROPOUTS.items():
        title = f"Phantoms, image_dropout {dropout:g}"
        curves[f"image_dropout {dropout:g}"] = swept(
            work / arm, results, load_components(trained[arm]), suite, title
        )
    plot_frontier(curves, results / "frontier.png", title="Guided captions of phantoms")
    write_atomic(results / "facts.md", facts_table(work, split))

    asked = tuple(range(4, 21))
    lengths = judged(
        work / "lengths.json",
        load_components(trained["lengths"]),
        phantom_suite(split, scorer, section="captions", length=asked),
    )
    columns = {"within 1 word": "length_within_1", "error, words": "length_error", "words": "mean_length"}
    write_atomic(results / "lengths.md", table([("lengths 4 to 20 in turn", lengths)], columns))

    rows = []
    for arm, quality in (("noisy_plain", None), ("noisy_quality", 0), ("noisy_quality", QUALITY_BINS - 1)):
        name = "plain" if quality is None else f"quality {quality}"
        suite = phantom_suite(split, scorer, quality=quality)
        rows.append(
            (name, judged(work / f"{name.replace(' ', '_')}.json", load_components(trained[arm]), suite))
        )
    columns = {
        "finding F1": "finding_f1",
        "precision": "finding_precision",
        "recall": "finding_recall",
        "invented": "invented_rate",
        "CIDEr-D": "cider_d",
        "R@1": "self_retrieval_r1",
    }
    write_atomic(results / "quality.md", table(rows, columns))

    if args.data is not None:
        # Trained on a thousand figures from nothing, the captioner repeats itself without end unless it is forbidden to.
        figures = Captions(
            source=Source(root=str(args.data / "openstax_figures"), split="val"),
            text="alt_text",
            section="alt_text",
            scorer=str(trained["real_scorer"]),
            no_repeat_ngram=3,
        )
        swept(
            work / "figures",
            results,
            load_components(trained["real"]),
            figures,
            "Textbook figures, alternative text",
        )
        chest = Captions(
            source=Source(root=str(args.data / "covid_cxr"), split="val"),
            section="caption",
            lexicon="chest",
            scorer=str(trained["real_scorer"]),
            no_repeat_ngram=3,
        )
        swept(work / "chest", results, load_components(trained["real"]), chest, "Chest radiographs, notes")


if __name__ == "__main__":
    main()
