"""What needs no training, beside the models of the experiments on regions."""

from __future__ import annotations

import collections

import numpy as np

from bvl.data.images import open_image
from bvl.data.sources import RecordSet, Source
from bvl.metrics.masks import dice


def otsu(source: Source) -> dict[str, float]:
    """Mean Dice of Otsu's threshold (1979), of all images and by modality.

    The nuclei are taken for the brighter side in fluorescence, else for the darker one.
    """
    records, by = RecordSet(source), collections.defaultdict(list)
    for i in range(len(records)):
        record = records.load(i, mask=True)
        grey = np.asarray(open_image(record["image"]).convert("L"))
        counts = np.bincount(grey.ravel(), minlength=256).astype(np.float64)
        below, total = np.cumsum(counts), counts.sum()
        sums = np.cumsum(counts * np.arange(256))
        means = sums / np.maximum(below, 1), (sums[-1] - sums) / np.maximum(total - below, 1)
        bright = grey > np.argmax(below * (total - below) * (means[0] - means[1]) ** 2)
        kind = record.get("modality", "")
        by[kind].append(dice(bright if "fluorescence" in kind else ~bright, record["mask"] > 0))
    everything = [value for values in by.values() for value in values]
    return {"otsu/dice": float(np.mean(everything))} | {
        f"otsu/dice/{kind}": float(np.mean(values)) for kind, values in by.items()
    }


def size_alone(train: Source, held_out: Source) -> float:
    """Balanced accuracy of naming a box by the nearest mean (log width, log height) of the training boxes of a name."""

    def sizes(source: Source) -> dict[str, np.ndarray]:
        records, by = RecordSet(source), collections.defaultdict(list)
        for i in range(len(records)):
            for entry in records.describe(i)["boxes"]:
                x0, y0, x1, y1 = entry["box"]
                by[entry["name"]].append(np.log([x1 - x0, y1 - y0]))
        return {name: np.array(values) for name, values in by.items()}

    means = {name: values.mean(0) for name, values in sizes(train).items()}
    names = sorted(means)
    recalls = []
    for name, values in sizes(held_out).items():
        distance = [np.square(values - means[n]).sum(1) for n in names]
        recalls.append(np.mean([names[k] == name for k in np.argmin(distance, axis=0)]))
    return float(np.mean(recalls))
