"""The trade-off of guidance: one model's captions at several scales, as rows, a table and a figure.

Kornblith et al. 2023 (arXiv:2307.16686, figure 1): as the scale rises, captions become easier to tell apart by and
less like the references.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bvl.config import Config
from bvl.decode.guidance import check_guidance
from bvl.errors import ConfigError
from bvl.evals.base import EvalResult
from bvl.evals.caption import Captions
from bvl.evals.folder import suites_for
from bvl.runs import Components, write_atomic
from bvl.tasks.captioning import captioning_task_of

logger = logging.getLogger(__name__)

# Column of the table -> metric. Those that a sweep does not have are left out.
TABLE = {
    "CIDEr-D": "cider_d",
    "BLEU-4": "bleu4",
    "CLIPScore": "clipscore",
    "RefCLIPScore": "ref_clipscore",
    "R@1": "self_retrieval_r1",
    "bag R@1": "bag_r1",
    "words": "mean_length",
    "distinct-2": "distinct2",
    "invented": "invented_rate",
    "finding F1": "finding_f1",
}
# What the figure has on its horizontal axes, against CIDEr-D.
PANELS = {"self_retrieval_r1": "self-retrieval R@1", "clipscore": "CLIPScore"}


@dataclasses.dataclass(frozen=True)
class Point:
    """One scale of guidance and what the suite found with it."""

    guidance: float
    result: EvalResult

    @property
    def metrics(self) -> dict[str, Any]:
        return self.result.metrics


def parse_gammas(text: str) -> tuple[float, ...]:
    """ "0.5:4:0.5" (first, last, step) or "1,2,4" as scales in rising order; raises ConfigError for anything else."""
    try:
        parts = [float(part) for part in text.split(":" if ":" in text else ",")]
    except ValueError:
        parts = []
    if not parts or not np.isfinite(parts).all() or (":" in text and len(parts) != 3):
        raise ConfigError(f"gammas={text!r}: give first:last:step such as 0.5:4:0.5, or numbers with commas")
    if ":" in text:
        first, last, step = parts
        if step <= 0 or last < first:
            raise ConfigError(f"gammas={text!r}: first:last:step, with last not below first and step above 0")
        # The last one belongs to the range, in spite of rounding.
        parts = [round(first + i * step, 10) for i in range(int((last - first) / step + 1e-6) + 1)]
    if min(parts) < 0:
        raise ConfigError(f"gammas={text!r}: scales of guidance are not below 0")
    return tuple(sorted(set(parts)))


def suite_for(
    config: Config, *, data: str | Path | None = None, split: str | None = None, **options: Any
) -> Captions:
    """The suite to sweep: captions of the folder of records `data`, or the first suite of captions that the run has.

    options: fields of `Captions` that replace the suite's own. Raises ConfigError for a run without captions, or
    without a suite where no `data` is given.
    """
    captioning_task_of(config)
    if data is not None:
        suites = suites_for(data, split=split, config=config, captions=options, only_captions=True)
        return next(iter(suites.values()))
    if split is not None:
        raise ConfigError(f"split={split!r} is of a folder of records: name it by data (--data)")
    for suite in config.eval.suites.values():
        if isinstance(suite, Captions):
            suite = dataclasses.replace(suite, **options)
            return suite if config.data.root is None else suite.at_root(config.data.root)
    raise ConfigError("the run's eval.suites have no Captions: name a folder of records by data (--data)")


def sweep_guidance(
    components: Components, suite: Captions, gammas: Sequence[float], *, batch_size: int = 256
) -> list[Point]:
    """The suite at every scale. Images are read and encoded once, references and the scorer read once, and decoding
    compiles once."""
    scales = check_guidance(list(gammas), len(gammas))
    prepared = suite.encoded(components, suite.prepare(components, batch_size=batch_size))
    points = []
    for scale in map(float, scales):
        at = suite.with_guidance(scale)
        captions = at.write(components, prepared, always_guided=True)
        points.append(Point(scale, at.judge(components, prepared, captions)))
        logger.info("guidance %g: %s", scale, _line(points[-1].metrics))
    return points


def write_frontier(points: Sequence[Point], out: Path, *, title: str = "") -> list[Path]:
    """frontier.csv, frontier.md, frontier.png, captions.jsonl (captions at every scale) and provenance.json."""
    out.mkdir(parents=True, exist_ok=True)
    write_atomic(out / "frontier.csv", frontier_csv(points))
    write_atomic(out / "frontier.md", frontier_markdown(points, title=title))
    rows = []
    for examples in zip(*(point.result.per_example for point in points), strict=True):
        captions = {f"{p.guidance:g}": e["caption"] for p, e in zip(points, examples, strict=True)}
        rows.append({"id": examples[0]["id"], "references": examples[0]["references"], "captions": captions})
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_atomic(out / "captions.jsonl", lines)
    provenance = {f"{point.guidance:g}": point.result.provenance for point in points}
    write_atomic(out / "provenance.json", json.dumps(provenance, indent=2, ensure_ascii=False) + "\n")
    plot_frontier({"": points}, out / "frontier.png", title=title)
    names = ("frontier.csv", "frontier.md", "frontier.png", "captions.jsonl", "provenance.json")
    return [out / name for name in names]


def frontier_csv(points: Sequence[Point]) -> str:
    """One line a scale: guidance, then every metric, with "<metric>_low" and "<metric>_high" where it has an interval."""
    names = list(dict.fromkeys(n for p in points for n in p.metrics if not n.endswith("/ci95")))
    intervals = {n for p in points for n in names if f"{n}/ci95" in p.metrics}
    fields = ["guidance"]
    for name in names:
        fields += [name, f"{name}_low", f"{name}_high"] if name in intervals else [name]
    text = io.StringIO()
    writer = csv.DictWriter(text, fields, lineterminator="\n")
    writer.writeheader()
    for point in points:
        row: dict[str, Any] = {"guidance": point.guidance}
        for name in names:
            row[name] = point.metrics.get(name)
            if f"{name}/ci95" in point.metrics:
                row[f"{name}_low"], row[f"{name}_high"] = point.metrics[f"{name}/ci95"]
        writer.writerow(row)
    return text.getvalue()


def frontier_markdown(points: Sequence[Point], *, title: str = "") -> str:
    """A table with a row for each scale; in brackets the 95 % intervals."""
    columns = {head: name for head, name in TABLE.items() if any(name in p.metrics for p in points)}
    first = points[0]
    about = f"{first.metrics['num_images']} images, {first.metrics['num_references']} references"
    interval, scorer = (first.result.provenance[name] for name in ("interval", "scorer"))
    judge = f" Scorer: {scorer['run']} (weights {scorer['weights_hash']})." if scorer else ""
    lines = [f"# {title}", ""] if title else []
    lines += [
        f"{about}; 95 % intervals by {interval['unit']} in brackets.{judge}",
        "",
        "| g | " + " | ".join(columns) + " |",
        "|---:" * (len(columns) + 1) + "|",
    ]
    for point in points:
        cells = [_cell(point.metrics, name) for name in columns.values()]
        lines.append(f"| {point.guidance:g} | " + " | ".join(cells) + " |")
    chances = [
        f"{head} {first.metrics[f'{name}/chance']:.3f}"
        for head, name in columns.items()
        if f"{name}/chance" in first.metrics
    ]
    if chances:
        lines += ["", f"By chance: {', '.join(chances)}."]
    return "\n".join(lines) + "\n"


def plot_frontier(curves: dict[str, Sequence[Point]], path: Path, *, title: str = "") -> None:
    """CIDEr-D against self-retrieval R@1 and CLIPScore, a line for each curve, its points labelled with the scale.

    curves: name -> points; names go into a legend. Without a scorer CIDEr-D stands against the scale itself.
    """
    # Not at import: it takes long, and only figures need it. The class draws without a display.
    from matplotlib.figure import Figure

    known = {
        name: label
        for name, label in PANELS.items()
        if any(name in p.metrics for points in curves.values() for p in points)
    }
    panels = known or {"guidance": "guidance scale"}
    figure = Figure(figsize=(5.2 * len(panels), 4.4), dpi=150, layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axis, (name, label) in zip(axes, panels.items(), strict=True):
        for number, (curve, points) in enumerate(curves.items()):
            _draw(axis, [p for p in points if name == "guidance" or name in p.metrics], name, curve, number)
        axis.set_xlabel(label)
        axis.grid(alpha=0.3, linewidth=0.6)
        axis.margins(0.12)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("CIDEr-D")
    if len(curves) > 1:
        axes[-1].legend(frameon=False, fontsize=9)
    if title:
        figure.suptitle(title, fontsize=11)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _draw(axis: Any, points: Sequence[Point], name: str, label: str, number: int) -> None:
    if not points:
        return
    x, x_error = _values(points, name)
    y, y_error = _values(points, "cider_d")
    colour = f"C{number}"
    axis.errorbar(
        x, y, xerr=x_error, yerr=y_error, fmt="none", ecolor=colour, elinewidth=0.7, capsize=1.5, alpha=0.4
    )
    axis.plot(x, y, "o-", color=colour, markersize=4, linewidth=1.3, zorder=4, label=label or None)
    for point, left, top in zip(points, x, y, strict=True):
        axis.annotate(
            f"{point.guidance:g}",
            (left, top),
            textcoords="offset points",
            xytext=(5, 5),
            fontsize=8,
            color=colour,
            path_effects=_halo(),
            zorder=3,
        )


def _halo() -> list[Any]:
    """A white edge, so that a label can be read on top of lines."""
    from matplotlib.patheffects import withStroke

    return [withStroke(linewidth=2.5, foreground="white")]


def _values(points: Sequence[Point], name: str) -> tuple[np.ndarray, np.ndarray | None]:
    """(values, distances [2, n] down and up to the ends of their intervals)."""
    if name == "guidance":
        return np.array([p.guidance for p in points]), None
    values = np.array([p.metrics.get(name, np.nan) for p in points], np.float64)
    ends = np.array([p.metrics.get(f"{name}/ci95", [v, v]) for p, v in zip(points, values, strict=True)])
    # An interval need not hold its own value.
    return values, np.maximum(np.stack([values - ends[:, 0], ends[:, 1] - values]), 0)


def _cell(metrics: dict[str, Any], name: str) -> str:
    if name not in metrics:
        return ""
    digits = 1 if name == "mean_length" else 3
    value, interval = metrics[name], metrics.get(f"{name}/ci95")
    ends = f" [{interval[0]:.{digits}f}, {interval[1]:.{digits}f}]" if interval else ""
    return f"{value:.{digits}f}{ends}"


def _line(metrics: dict[str, Any]) -> str:
    return ", ".join(f"{head} {metrics[name]:.3f}" for head, name in TABLE.items() if name in metrics)
