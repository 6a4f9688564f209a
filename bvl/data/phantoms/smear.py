"""Blood smear phantoms: stained red cells with central pallor on a pale field, platelets between them."""

import math

import numpy as np
from jaxtyping import Float

from bvl.data.phantoms.canvas import blend, footprint, grain, smooth_field, window
from bvl.data.phantoms.scene import Instance, Scene

_LATTICE = 7


def obstacles(anatomy: tuple[float, ...], view: str) -> list[tuple[float, float, float]]:
    """Discs (x, y, radius) that findings keep clear of: none."""
    return []


def place(
    anatomy: tuple[float, ...], view: str, site: str, u: float, v: float, reach: float
) -> tuple[float, float]:
    """A point in the upper or lower half of the field, from two uniform numbers."""
    x = reach + 0.01 + u * (0.98 - 2.0 * reach)
    top = reach + 0.01
    depth = v * max(0.47 - top, 0.02)
    return x, (top + depth if site == "upper" else 1.0 - top - depth)


def _colours(scene: Scene) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Background, red cell and nucleus colours of this stain."""
    e = scene.exposure
    field = np.array([0.88 + 0.1 * e[0], 0.84 + 0.12 * e[1], 0.84 + 0.12 * e[2]], np.float32)
    cell = np.array([0.78 + 0.12 * e[3], 0.5 + 0.16 * e[4], 0.52 + 0.18 * e[5]], np.float32)
    nucleus = np.array([0.34 + 0.1 * e[6], 0.18 + 0.1 * e[7], 0.5 + 0.14 * e[8]], np.float32)
    return field, cell, nucleus


def _red_cells(
    image: Float[np.ndarray, "h w 3"], scene: Scene, rng: np.random.Generator, cell: np.ndarray
) -> None:
    """Ordinary red cells on a jittered lattice, where no finding lies."""
    size = image.shape[0]
    missing = 0.2 if scene.view == "crowded field" else 0.68
    radius = 0.058 + 0.012 * scene.anatomy[0]
    turn = 0.5 * scene.anatomy[1]
    c, s = math.cos(turn), math.sin(turn)
    span = 1.25
    for i, j, keep, jx, jy, grow, shade in _lattice(rng):
        if keep < missing:
            continue
        a, b = (
            ((i + 0.5) / _LATTICE - 0.5) * span + 0.05 * jx,
            ((j + 0.5) / _LATTICE - 0.5) * span + 0.05 * jy,
        )
        x, y = 0.5 + a * c - b * s, 0.5 + a * s + b * c
        r = radius * (0.85 + 0.3 * grow)
        if not (-r < x < 1.0 + r and -r < y < 1.0 + r):
            continue
        if any((x - f.x) ** 2 + (y - f.y) ** 2 < (r + f.reach) ** 2 for f in scene.instances):
            continue
        rows, cols, dx, dy = window(size, x, y, r)
        rho = np.sqrt(dx * dx + dy * dy) / r
        alpha = np.clip((1.0 - rho) * (r * size) + 0.5, 0.0, 1.0)
        pallor = np.clip(1.0 - 2.0 * rho, 0.0, 1.0)
        blend(image, (rows, cols), alpha * (0.55 + 0.25 * shade) * (1.0 - 0.6 * pallor), cell)


def _lattice(rng: np.random.Generator):
    """Node (i, j) of the lattice with five uniform numbers each."""
    values = rng.random((_LATTICE, _LATTICE, 5)) * (1, 2, 2, 1, 1) - (0, 1, 1, 0, 0)
    for i, row in enumerate(values.tolist()):
        for j, numbers in enumerate(row):
            yield i, j, *numbers


def _platelets(
    image: Float[np.ndarray, "h w 3"], scene: Scene, rng: np.random.Generator, nucleus: np.ndarray
) -> None:
    """Small purple granules, alone and in clumps, that are no finding."""
    size = image.shape[0]
    for x, y, r, shade in rng.random((int(9 * scene.exposure[9]), 4)).tolist():
        r = 0.012 + 0.02 * r
        if any((x - f.x) ** 2 + (y - f.y) ** 2 < (r + f.reach) ** 2 for f in scene.instances):
            continue
        rows, cols, dx, dy = window(size, x, y, r)
        alpha = np.clip((1.0 - np.sqrt(dx * dx + dy * dy) / r) * (r * size) + 0.5, 0.0, 1.0)
        blend(image, (rows, cols), alpha * (0.4 + 0.5 * shade), nucleus + 0.12)


def _draw(image, instance: Instance, cell: np.ndarray, field: np.ndarray, nucleus: np.ndarray) -> None:
    f = footprint(instance, image.shape[0])
    strength, alpha = instance.strength, f.alpha()
    if instance.finding == "sickle cell":
        blend(image, f.window, alpha * (0.2 + 0.8 * strength), cell * (0.75, 0.3, 0.4))
    elif instance.finding == "target cell":
        blend(image, f.window, 0.9 * alpha, cell)
        blend(image, f.window, strength * (f.alpha(0.78) - f.alpha(0.44)), field)
        blend(image, f.window, strength * f.alpha(0.44), cell * (0.5, 0.3, 0.3))
    elif instance.finding == "malaria parasite":
        blend(image, f.window, 0.9 * alpha, cell)
        # A ring with a chromatin dot, off the centre of the red cell.
        c, s = math.cos(instance.phase), math.sin(instance.phase)
        r = instance.radius
        rho = np.sqrt((f.dx - 0.12 * r * c) ** 2 + (f.dy - 0.12 * r * s) ** 2) / (0.62 * r)
        ring = np.clip(1.0 - np.abs(rho - 0.72) * 3.2, 0.0, 1.0)
        dot = np.clip(
            (0.5 - np.sqrt((f.dx - 0.62 * r * c) ** 2 + (f.dy - 0.62 * r * s) ** 2) / r) * 6.0, 0.0, 1.0
        )
        blend(image, f.window, strength * np.maximum(ring * 0.85, dot) * alpha, nucleus)
    else:
        blend(image, f.window, 0.7 * alpha, field * (0.72, 0.74, 0.95))
        blend(image, f.window, (0.2 + 0.8 * strength) * f.alpha(0.8), nucleus)


def render(scene: Scene, size: int, rng: np.random.Generator) -> Float[np.ndarray, "size size 3"]:
    """The photomicrograph with values in 0..1, red, green, blue."""
    field, cell, nucleus = _colours(scene)
    light = 1.0 + 0.05 * smooth_field(rng, size, cells=4)
    image = field * light[..., None]
    # Uneven stain: broad bluish-purple clouds.
    cloud = np.maximum(0.08 + 0.14 * smooth_field(rng, size, cells=7), 0.0) * (0.3 + 1.4 * scene.exposure[12])
    image -= cloud[..., None] * (field - nucleus)
    _red_cells(image, scene, rng, cell)
    _platelets(image, scene, rng, nucleus)
    for instance in scene.instances:
        _draw(image, instance, cell, field, nucleus)
    image += ((0.005 + 0.015 * scene.exposure[10]) * grain(rng, size))[..., None]
    return np.clip(image * (0.82 + 0.22 * scene.exposure[11]), 0.0, 1.0)
