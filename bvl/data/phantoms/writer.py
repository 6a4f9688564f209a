"""Phantoms as a `records.jsonl` folder."""

import dataclasses
import json
from pathlib import Path

from PIL import Image

from bvl.data.phantoms.source import Phantoms, PhantomSource
from bvl.errors import ConfigError, DataError

_README = """# Phantom images

{count} synthetic biomedical images drawn by `bvl data phantoms` (seed {seed}, {size} pixels a side).
No person and no photograph is behind them. Licence: CC0-1.0.

`records.jsonl` has one record a line; `images/` and `masks/` lie beside it. Id k of a mask is `boxes[k-1]`,
0 is background; boxes are [x0, y0, x1, y1] in 0..1 of the image, `texts` what is true of each. `facts` is the ground truth of each image,
`caption_statements` what each caption says. Left and right are the patient's.
"""


def write_phantoms(out: Path, config: Phantoms, num_images: int) -> Path:
    """Write the first `num_images` phantoms as a folder with `records.jsonl`, `images/` and `masks/`.

    The number of patients in `config` is raised as needed. Returns the path of `records.jsonl`. Raises
    ConfigError if `num_images` is below 1 and DataError if the folder already holds records.
    """
    if num_images < 1:
        raise ConfigError(f"phantoms: the number of images must be at least 1, not {num_images}")
    out = Path(out)
    manifest = out / "records.jsonl"
    if manifest.exists():
        raise DataError(f"{manifest} exists already; name another folder or remove it")
    # Every patient has at least one image, so this many patients always suffice.
    source = PhantomSource(dataclasses.replace(config, num_patients=max(config.num_patients, num_images)))
    for folder in ("images", "masks"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    partial = manifest.with_suffix(".jsonl.partial")
    with partial.open("w", encoding="utf-8") as lines:
        for index in range(num_images):
            record = source[index]
            for field, folder in (("image", "images"), ("mask", "masks")):
                path = f"{folder}/{record['id']}.png"
                Image.fromarray(record[field]).save(out / path, compress_level=1)
                record[field] = path
            lines.write(json.dumps(record, ensure_ascii=False) + "\n")
    text = _README.format(count=num_images, seed=config.seed, size=config.image_size)
    (out / "README.md").write_text(text, encoding="utf-8")
    # Last, so that a folder with a manifest is complete.
    partial.rename(manifest)
    return manifest
