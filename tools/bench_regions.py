"""What 32 regions of an image cost beside 1: encoding the image, and the visual tokens of its regions.

    python tools/bench_regions.py --rounds 5

A ViT-S/16 at 224 pixels with random weights, f32. The two are measured by turns in one process; given are medians, and
the ratio that the image's encoding with 32 regions has to that with 1.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
from flax.linen import unbox

from bvl.models.decoder import DecoderConfig
from bvl.models.features import RegionPrompts
from bvl.models.region_encoder import RegionEncoderConfig
from bvl.models.vit import ViTConfig
from bvl.models.vlm import DualEncoder, DualEncoderConfig

KINDS = ("box_token", "roi_align", "mask_embedding")
SIZE = 224


def prompts(count: int) -> RegionPrompts:
    """Boxes of one image, with their masks on a quarter of its resolution."""
    rng = np.random.default_rng(0)
    box = np.sort(rng.random((1, count, 2, 2)), axis=2).reshape(1, count, 4).astype(np.float32)
    return RegionPrompts(
        box=box,
        point=(box[..., :2] + box[..., 2:]) / 2,
        mask=rng.random((1, count, SIZE // 4, SIZE // 4)) < 0.2,
        kind=np.zeros((1, count), np.int8),
    )


def measure(kind: str, rounds: int, most: int) -> tuple[float, float]:
    """Median seconds of the image with 1 region and with `most`."""
    config = DualEncoderConfig(
        image=ViTConfig("S/16", pool="mean"),
        text=None,
        decoder=DecoderConfig(width=384, depth=1, num_heads=6),
        region_encoder=RegionEncoderConfig(kind=kind, width=384),
    )
    model = DualEncoder(config, image_size=(SIZE, SIZE), vocab_size=100, context_length=16, end_id=1)
    tokens = jnp.zeros((1, 16), jnp.int32)
    image = jax.random.normal(jax.random.key(0), (1, SIZE, SIZE, 3))
    params = unbox(jax.jit(model.init)(jax.random.key(1), image, tokens, tokens == 0)["params"])

    @jax.jit
    def run(params, image, prompts):
        apply = functools.partial(model.apply, {"params": params})
        features = apply(image, frozenset({"tokens", "regions"}), method="encode_image")
        dropped = jnp.zeros(prompts.kind.size, bool)
        maps = (features.tokens, features.levels, features.grid)
        # The image's tokens too: coordinates alone would not need them.
        return features.tokens, apply(*maps, prompts, dropped, method="region_tokens")

    times: dict[int, list[float]] = {1: [], most: []}
    for turn in range(rounds + 1):
        for count, seconds in times.items():
            start = time.perf_counter()
            jax.block_until_ready(run(params, image, prompts(count)))
            if turn:  # the first one compiles
                seconds.append(time.perf_counter() - start)
    return statistics.median(times[1]), statistics.median(times[most])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--regions", type=int, default=32)
    args = parser.parse_args()
    for kind in KINDS:
        one, many = measure(kind, args.rounds, args.regions)
        print(f"{kind}: {one:.3f} s with 1 region, {many:.3f} s with {args.regions}: {many / one:.2f}x")


if __name__ == "__main__":
    main()
