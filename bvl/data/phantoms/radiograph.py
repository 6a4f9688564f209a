"""Chest radiograph phantoms: projections of chest wall, lungs, ribs, heart and diaphragm, with count noise."""

import math

import numpy as np
from jaxtyping import Float

from bvl.data.phantoms.canvas import ellipse, footprint, grain, grid, smooth_field
from bvl.data.phantoms.scene import Instance, Scene


def _lungs(anatomy: tuple[float, ...]) -> dict[str, tuple[float, float, float, float]]:
    """Centre and semi-axes of each lung. The patient's left is on the right of the image."""
    middle, height = 0.46 + 0.08 * anatomy[0], 0.44 + 0.1 * anatomy[1]
    width, length = 0.155 + 0.035 * anatomy[2], 0.28 + 0.06 * anatomy[3]
    apart = 0.19 + 0.03 * anatomy[4]
    return {
        "right": (middle - apart, height, width, length),
        "left": (middle + apart, height, width * 0.94, length),
    }


def obstacles(anatomy: tuple[float, ...], view: str) -> list[tuple[float, float, float]]:
    """Discs (x, y, radius) that findings keep clear of: none."""
    return []


def place(
    anatomy: tuple[float, ...], view: str, site: str, u: float, v: float, reach: float
) -> tuple[float, float]:
    """A point in the lung on one side of the patient, from two uniform numbers."""
    x, y, width, length = _lungs(anatomy)[site]
    t, angle = math.sqrt(u), 2.0 * math.pi * v
    return (
        x + max(width - reach, 0.02) * t * math.cos(angle),
        y + max(length - reach, 0.02) * t * math.sin(angle),
    )


def _draw(image: Float[np.ndarray, "h w"], instance: Instance) -> None:
    f = footprint(instance, image.shape[0])
    part, strength = image[f.window], instance.strength
    alpha = f.alpha()
    if instance.finding == "nodule":
        part += 0.62 * strength * alpha
    elif instance.finding == "cavity":
        part += strength * (0.6 * alpha - 1.05 * f.alpha(0.6))
    elif instance.finding == "consolidation":
        # Aerated bronchi cross the opacity: a coarse bright and dark weave.
        k = 2.0 * math.pi / 0.085
        c, s = math.cos(instance.phase), math.sin(instance.phase)
        weave = np.sin(k * (f.dx * c + f.dy * s)) * np.sin(k * (f.dy * c - f.dx * s))
        part += strength * alpha * (0.1 + 0.6 * weave)
    else:
        part += 0.62 * strength * alpha


def render(scene: Scene, size: int, rng: np.random.Generator) -> Float[np.ndarray, "size size"]:
    """The radiograph with values in 0..1."""
    x, y = grid(size)
    anatomy, exposure = scene.anatomy, scene.exposure
    lungs = _lungs(anatomy)
    middle = 0.5 * (lungs["left"][0] + lungs["right"][0])
    height = lungs["left"][1]

    image = 0.55 + 0.09 * smooth_field(rng, size, cells=5) + 0.04 * smooth_field(rng, size, cells=9)
    wall = 0.4 + 0.05 * anatomy[5] + 0.1 * y
    body = np.clip((wall - np.abs(x - middle)) * 14.0, 0.0, 1.0) * np.clip(
        (y + 0.9 - 2.2 * np.abs(x - middle)) * 4, 0.0, 1.0
    )
    aerated = 0.0
    for lx, ly, width, length in lungs.values():
        aerated = aerated + ellipse(x, y, (lx, ly), (width, length), sharpness=2.2)
    image -= (0.34 + 0.08 * exposure[0]) * aerated

    # Ribs: bright arcs that fall off to the sides.
    rib = np.cos(
        (y + (0.9 + 0.8 * anatomy[6]) * (x - middle) ** 2) * (52.0 + 14.0 * anatomy[7]) + 6.28 * anatomy[8]
    )
    image += (0.03 + 0.04 * anatomy[9]) * np.maximum(rib, 0.0)
    # Spine and mediastinum, heart to the patient's left, diaphragm with a dome on each side.
    image += 0.12 * np.exp(-(((x - middle) / 0.05) ** 2))
    heart = (middle + 0.05 + 0.03 * anatomy[10], height + 0.16 + 0.04 * anatomy[11])
    image += 0.18 * ellipse(
        x, y, heart, (0.11 + 0.05 * anatomy[12], 0.13 + 0.04 * anatomy[13]), sharpness=1.6
    )
    across = np.abs(x - middle) - 0.18
    dome = (
        height
        + 0.2
        + 0.05 * anatomy[14]
        + 1.6 * across * across
        + 0.03 * (anatomy[15] - 0.5) * np.sign(x - middle)
    )
    image += 0.2 * np.clip((y - dome) * 16.0, 0.0, 1.0) * np.clip(aerated + 0.4, 0.0, 1.0)

    for instance in scene.instances:
        _draw(image, instance)

    image *= 0.08 + 0.92 * body
    # Quantum noise: the spread grows with the square root of the signal.
    image += (0.01 + 0.02 * exposure[1]) * np.sqrt(np.maximum(image, 0.02)) * grain(rng, size)
    gain, level = 0.8 + 0.3 * exposure[2], 0.16 * (exposure[3] - 0.5)
    return np.clip(image * gain + level, 0.0, 1.0)
