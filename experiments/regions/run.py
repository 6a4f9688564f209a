"""Train the models of config.py one after the other, judge them and draw what they predict.

    python experiments/regions/run.py --runs runs/regions --data path/to/data

--data is the folder that holds covid_cxr, bccd and dsb2018_nuclei; without it phantoms alone are done. A run that is
complete is not trained again and one that was interrupted goes on, so the command may be stopped and given again.
Writes results.json, results.md and a figure a set beside this file. --dev looks at the development split of the phantoms
and writes below --runs; the real sets have no other split than val.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
import time
from pathlib import Path

from baselines import otsu, size_alone
from config import get_config
from figure import draw_set

HERE = Path(__file__).resolve().parent
REAL = ("covid_cxr", "bccd", "dsb2018_nuclei")
NAMES = ("phantoms", "contrast", "mosaic", *REAL, "pretrain", "bccd_pretrained")
WHITE, RED = (f"regions_bccd/detection/ap50/{cell} blood cell" for cell in ("white", "red"))
MODALITIES = (
    "fluorescence microscopy",
    "histology or stained brightfield (colour)",
    "brightfield microscopy (grey)",
)
# (run, what, metric or metrics whose mean is meant, asked).
ASKED = (
    ("phantoms", "box: finding named right", "regions_phantoms/box/name_accuracy", ">= 0.90"),
    ("phantoms", "box: side named right", "regions_phantoms/box/word_accuracy/side", ">= 0.95"),
    ("phantoms", "mirrored: finding", "regions_phantoms/box_mirrored/name_accuracy", ">= 0.90"),
    ("phantoms", "mirrored: side follows", "regions_phantoms/box_mirrored/word_accuracy/side", ">= 0.95"),
    ("phantoms", "point: finding named right", "regions_phantoms/point/name_accuracy", ""),
    ("phantoms", "mask: finding named right", "regions_phantoms/mask/name_accuracy", ""),
    ("phantoms", "length within 1 word", "regions_phantoms/length/length_within_1", ""),
    ("phantoms", "phrase: Acc@0.5", "regions_phantoms/grounding/acc_at_50", ">= 0.80"),
    ("phantoms", "phrase: mIoU", "regions_phantoms/grounding/miou", ""),
    ("phantoms", "phrase: Dice", "regions_phantoms/grounding/dice", ">= 0.80"),
    ("phantoms", "absent phrases found at 90 % found", "regions_phantoms/grounding/false_found_rate_at_90", "<= 0.10"),
    ("phantoms", "conformal, alpha 0.1: there, found", "regions_phantoms/grounding/conformal_found_rate", ""),
    ("phantoms", "conformal: absent, found", "regions_phantoms/grounding/conformal_false_found_rate", ""),
    ("contrast", "heat map: pointing game", "regions_phantoms/heat_maps/pointing_game", ""),
    ("contrast", "heat map: CNR", "regions_phantoms/heat_maps/cnr", ""),
    ("contrast", "\"with a\" less \"without a\": pointing game", "regions_phantoms/denied/pointing_game", ""),
    ("mosaic", "heat map: pointing game", "regions_phantoms/heat_maps/pointing_game", "above contrast"),
    ("mosaic", "heat map: CNR", "regions_phantoms/heat_maps/cnr", ""),
    ("mosaic", "\"with a\" less \"without a\": pointing game", "regions_phantoms/denied/pointing_game", "above contrast"),
    ("covid_cxr", "lungs: mIoU", "regions_covid_cxr/grounding/miou", ">= 0.80"),
    ("covid_cxr", "mean training box: mIoU", "regions_covid_cxr/grounding/mean_box_miou", "baseline"),
    ("covid_cxr", "lungs: Acc@0.5", "regions_covid_cxr/grounding/acc_at_50", ""),
    ("covid_cxr", "mean training box: Acc@0.5", "regions_covid_cxr/grounding/mean_box_acc_at_50", "baseline"),
    ("covid_cxr", "lungs: Acc@0.75", "regions_covid_cxr/grounding/acc_at_75", "reported"),
    ("covid_cxr", "mean training box: Acc@0.75", "regions_covid_cxr/grounding/mean_box_acc_at_75", "baseline"),
    ("covid_cxr", "jittered box: side named right", "regions_covid_cxr/box/name_accuracy", ""),
    ("bccd", "box jittered by 20 %: cell named right, balanced", "regions_bccd/box/name_balanced_accuracy", ">= 0.95"),
    ("bccd", "point: cell named right, balanced", "regions_bccd/point/name_balanced_accuracy", ">= 0.95"),
    ("bccd", "size alone, exact boxes, balanced", "size/name_balanced_accuracy", "baseline"),
    ("bccd", "AP50, mean of white and red cells", (WHITE, RED), ">= 0.60"),
    ("bccd", "AP50, white cells", WHITE, ""),
    ("bccd", "AP50, red cells", RED, ""),
    ("bccd", "AP50, platelets", "regions_bccd/detection/ap50/platelet", "reported"),
    ("bccd", "mAP, all three", "regions_bccd/detection/map", ""),
    ("bccd_pretrained", "AP50, all three, tower pretrained on phantoms", "regions_bccd/detection/ap50", ""),
    ("bccd", "AP50, all three, from scratch", "regions_bccd/detection/ap50", ""),
    ("bccd_pretrained", "box, balanced, pretrained", "regions_bccd/box/name_balanced_accuracy", ""),
    ("bccd", "box, balanced, from scratch", "regions_bccd/box/name_balanced_accuracy", ""),
    ("bccd_pretrained", "point, balanced, pretrained", "regions_bccd/point/name_balanced_accuracy", ""),
    ("bccd", "point, balanced, from scratch", "regions_bccd/point/name_balanced_accuracy", ""),
    ("dsb2018_nuclei", "nucleus: Dice", "regions_dsb2018_nuclei/grounding/dice", ">= 0.885"),
    ("dsb2018_nuclei", "Otsu's threshold: Dice", "otsu/dice", "baseline"),
    *(
        ("dsb2018_nuclei", f"{what}: {kind}", metric.format(kind), "")
        for kind in MODALITIES
        for what, metric in (("nucleus", "regions_dsb2018_nuclei/grounding/dice/{}"), ("Otsu", "otsu/dice/{}"))
    ),
    ("dsb2018_nuclei", "instances: AP50", "regions_dsb2018_nuclei/grounding/instance_ap50", "reported"),
)  # fmt: skip


def train(name: str, arm: str, runs: Path, *overrides: str) -> dict:
    """The metrics of a run, which is trained first where it is not complete; "seconds" is what its commands took."""
    workdir, log, kept = runs / name, runs / f"{name}.log", runs / f"{name}.seconds"
    command = [sys.executable, "-m", "bvl.cli", "train", f"{HERE / 'config.py'}:set={arm}"]
    start = time.perf_counter()
    try:
        with open(log, "a") as file:
            subprocess.run([*command, f"workdir={workdir}", *overrides], check=True, stdout=file, stderr=file)
    except subprocess.CalledProcessError as error:
        raise SystemExit(f"{name} failed; the end of {log}:\n{log.read_text()[-2000:]}") from error
    finally:
        # Also where it was interrupted, to go on another time.
        total = time.perf_counter() - start + (float(kept.read_text()) if kept.is_file() else 0.0)
        kept.write_text(f"{total:.0f}")
    print(f"{name}: {total:.0f} s", file=sys.stderr, flush=True)
    metrics = json.loads((workdir / "eval.json").read_text()) if (workdir / "eval.json").is_file() else {}
    for suite, wanted in get_config(f"set={arm}").eval.suites.items():
        found = metrics[f"{suite}/provenance"]["split"]
        if found != wanted.source.split:
            raise SystemExit(
                f"{workdir} was judged on the split {found!r}: remove it, or choose other --runs"
            )
    return {**{k: v for k, v in metrics.items() if not k.endswith("/provenance")}, "seconds": round(total)}


def table(results: dict[str, dict]) -> str:
    """The metrics that were asked for, with intervals, as a markdown table."""
    lines = ["| set | what | asked | got |", "|---" * 4 + "|"]
    for name, what, metric, asked in ASKED:
        metrics = results.get(name, {})
        names = (metric,) if isinstance(metric, str) else metric
        if any(n not in metrics for n in names):
            continue
        ends = metrics.get(f"{metric}/ci95")
        interval = f" [{ends[0]:.3f}, {ends[1]:.3f}]" if ends else ""
        value = sum(metrics[n] for n in names) / len(names)
        lines.append(f"| {name} | {what} | {asked} | {value:.3f}{interval} |")
    lines += ["", "Seconds that the commands of each run took: "]
    lines[-1] += ", ".join(f"{name} {metrics['seconds']}" for name, metrics in results.items()) + "."
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=Path, default=Path("runs/regions"), help="where the run folders go")
    parser.add_argument("--data", type=Path, help="the folder of covid_cxr, bccd and dsb2018_nuclei")
    parser.add_argument("--only", nargs="+", metavar="RUN", help="these runs alone")
    parser.add_argument(
        "--dev", action="store_true", help="the phantoms' development split, results below --runs"
    )
    args = parser.parse_args()
    unknown = sorted(set(args.only or ()) - set(NAMES))
    if unknown:
        parser.error(f"--only: there is no {', '.join(unknown)}; there are {', '.join(NAMES)}")
    runs = args.runs / "dev" if args.dev else args.runs
    out = runs if args.dev else HERE
    runs.mkdir(parents=True, exist_ok=True)
    split = ",split=val" if args.dev else ""
    kept = out / "results.json"
    results = json.loads(kept.read_text()) if kept.is_file() else {}
    for name in [n for n in NAMES if n in (args.only or NAMES)]:
        arm = "bccd" if name == "bccd_pretrained" else name
        if args.data is None and (arm in REAL or name == "pretrain"):
            continue
        overrides = [f"data.root={args.data}"] if arm in REAL else []
        if name == "bccd_pretrained":
            # Its vocabulary comes along, which has more tokens for the same names.
            contexts = ("data.tokenizer.context_length=28", "data.regions.context_length=12")
            overrides += [f"init_from={runs / 'pretrain'}", *contexts]
        results[name] = train(name, arm if arm in REAL else arm + split, runs, *overrides)
        source = get_config(f"set={arm}").data.train[0]
        if name in REAL:
            source = source.at_root(str(args.data))
        if name in ("phantoms", *REAL):
            unseen = dataclasses.replace(source, split="val" if args.dev or name in REAL else "test")
            draw_set(name, runs / name, unseen, out / f"{name}.jpg")
        if name == "dsb2018_nuclei":
            results[name] |= otsu(unseen)
        if name == "bccd":
            results[name]["size/name_balanced_accuracy"] = size_alone(source, unseen)
        kept.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")
        (out / "results.md").write_text(table(results))
    print(table(results))


if __name__ == "__main__":
    main()
