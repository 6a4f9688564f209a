"""Fundus photograph phantoms: a coloured disc with optic disc, macula and branching vessels."""

import math

import numpy as np
from jaxtyping import Float
from PIL import Image, ImageDraw

from bvl.data.phantoms.canvas import blend, footprint, grain, grid, smooth_field
from bvl.data.phantoms.scene import Instance, Scene


def _nasal(view: str) -> float:
    """+1 where the nose is on the right of the image: in a right eye, the optic disc lies on the right."""
    return 1.0 if view == "right eye" else -1.0


def _field(anatomy: tuple[float, ...]) -> tuple[float, float, float]:
    """Centre and radius of the photographed field."""
    return 0.49 + 0.02 * anatomy[0], 0.49 + 0.02 * anatomy[1], 0.455 + 0.03 * anatomy[2]


def _optic_disc(anatomy: tuple[float, ...], view: str) -> tuple[float, float, float]:
    x, y, _ = _field(anatomy)
    return (
        x + _nasal(view) * (0.19 + 0.06 * anatomy[3]),
        y + 0.06 * (anatomy[4] - 0.5),
        0.052 + 0.018 * anatomy[5],
    )


def obstacles(anatomy: tuple[float, ...], view: str) -> list[tuple[float, float, float]]:
    """Discs (x, y, radius) that findings keep clear of: the optic disc."""
    return [_optic_disc(anatomy, view)]


def place(
    anatomy: tuple[float, ...], view: str, site: str, u: float, v: float, reach: float
) -> tuple[float, float]:
    """A point in one quadrant about the middle of the field, from two uniform numbers."""
    x, y, radius = _field(anatomy)
    near, far = 0.1, max(radius - reach - 0.02, 0.12)
    distance = math.sqrt(near * near + u * (far * far - near * near))
    angle = 0.2 + v * (math.pi / 2 - 0.4)
    toward_nose = 1.0 if site.endswith("nasal") else -1.0
    down = -1.0 if site.startswith("superior") or site.startswith("supero") else 1.0
    return (
        x + _nasal(view) * toward_nose * distance * math.cos(angle),
        y + down * distance * math.sin(angle),
    )


def _vessels(scene: Scene, size: int) -> Float[np.ndarray, "size size"]:
    """Coverage of the vessels: arcades from the optic disc round the macula, each with branches."""
    scale = 2 if size <= 128 else 1
    canvas = Image.new("L", (size * scale, size * scale))
    draw = ImageDraw.Draw(canvas)
    anatomy, side = scene.anatomy, size * scale
    x0, y0, _ = _optic_disc(anatomy, scene.view)
    temporal = -_nasal(scene.view)
    width = max(1, round(side * 0.017))
    for k, (direction, reach, rise) in enumerate(
        ((temporal, 0.62, -0.3), (temporal, 0.62, 0.3), (-temporal, 0.26, -0.36), (-temporal, 0.26, 0.36))
    ):
        bow = rise * (0.85 + 0.35 * anatomy[6 + k])
        path = []
        for t in (0.0, 0.12, 0.28, 0.45, 0.65, 0.85, 1.0):
            wiggle = 0.012 * math.sin(9.0 * t + 6.28 * anatomy[10 + k])
            path.append(
                (
                    x0 + direction * reach * t,
                    y0 + bow * math.sin(math.pi * 0.62 * min(t * 1.35, 1.35)) + wiggle,
                )
            )
        draw.line([(px * side, py * side) for px, py in path], fill=255, width=width)
        for node in (2, 4):
            bx, by = path[node]
            outward = math.copysign(1.0, rise)
            ends = (
                (bx + direction * 0.12, by + outward * (0.06 + 0.08 * anatomy[14 + k])),
                (bx + direction * 0.1, by - outward * (0.05 + 0.05 * anatomy[14 + k])),
            )
            for ex, ey in ends:
                draw.line(
                    [(bx * side, by * side), (ex * side, ey * side)], fill=190, width=max(1, width // 2)
                )
    if scale > 1:
        canvas = canvas.reduce(scale)
    return np.asarray(canvas, np.float32) / 255.0


def _draw(image: Float[np.ndarray, "h w 3"], instance: Instance, tint: np.ndarray) -> None:
    f = footprint(instance, image.shape[0])
    strength = instance.strength
    if instance.finding == "haemorrhage":
        blend(image, f.window, 0.95 * strength * f.alpha(), tint * (0.22, 0.1, 0.12))
    elif instance.finding == "hard exudates":
        # Yellow dots on swollen, darker retina.
        blend(image, f.window, 0.9 * strength * f.alpha(), tint * (0.7, 0.35, 0.6))
        for x, y, r in instance.dots:
            rho = np.sqrt((f.dx - x) ** 2 + (f.dy - y) ** 2) / r
            dot = np.clip((1.0 - rho) * (r * image.shape[0]) + 0.5, 0.0, 1.0)
            blend(image, f.window, 0.95 * strength * dot, (1.0, 0.9, 0.4))
    elif instance.finding == "cotton wool spot":
        soft = np.clip(1.35 * (1.0 - f.rho * f.rho) + 0.15, 0.0, 1.0) * f.alpha(1.06)
        blend(image, f.window, 0.95 * strength * soft, (0.95, 0.95, 0.85))
    else:
        blend(image, f.window, 0.95 * strength * f.alpha(), tint * (0.12, 0.12, 0.3))
        blend(image, f.window, 0.95 * strength * f.alpha(0.6), (0.9, 0.75, 0.6))


def render(scene: Scene, size: int, rng: np.random.Generator) -> Float[np.ndarray, "size size 3"]:
    """The photograph with values in 0..1, red, green, blue."""
    x, y = grid(size)
    anatomy, exposure = scene.anatomy, scene.exposure
    cx, cy, radius = _field(anatomy)
    tint = np.array(
        [0.6 + 0.2 * exposure[0], 0.28 + 0.16 * exposure[1], 0.13 + 0.12 * exposure[2]], np.float32
    )
    squared = ((x - cx) ** 2 + (y - cy) ** 2) / (radius * radius)
    light = (
        1.0
        - 0.3 * squared
        + 0.12 * smooth_field(rng, size, cells=4)
        + 0.08 * smooth_field(rng, size, cells=9)
    )
    hue = 0.12 * smooth_field(rng, size, cells=8)
    blue = 0.2 * smooth_field(rng, size, cells=8)
    # Macula: a darker spot a little to the temporal side.
    mx, my = cx - _nasal(scene.view) * 0.06, cy + 0.015
    light -= 0.22 * np.exp(-((x - mx) ** 2 + (y - my) ** 2) * 180.0)
    vessels = _vessels(scene, size)
    # Reflexes of the nerve fibre layer: a whitish haze that no finding explains.
    haze = np.maximum(0.03 + (0.05 + 0.2 * exposure[5]) * smooth_field(rng, size, cells=7), 0.0)

    image = np.empty((size, size, 3), np.float32)
    for channel, (absorbed, shift) in enumerate(((0.38, -0.4 * hue), (0.6, hue), (0.45, blue))):
        image[..., channel] = tint[channel] * light * (1.0 + shift) * (1.0 - absorbed * vessels) + haze
    ox, oy, disc = _optic_disc(anatomy, scene.view)
    pale = np.clip((1.0 - ((x - ox) ** 2 + ((y - oy) * 0.9) ** 2) / (disc * disc)) * 3.0, 0.0, 1.0)
    pale *= 0.75 * (1.0 - 0.6 * vessels)
    image += pale[..., None] * (tint * np.float32([1.3, 2.3, 2.6]) - image)

    for instance in scene.instances:
        _draw(image, instance, tint)

    image += ((0.005 + 0.015 * exposure[3]) * grain(rng, size))[..., None]
    image *= np.clip((1.0 - squared) * radius * size * 0.5, 0.0, 1.0)[..., None]
    return np.clip(image * (0.8 + 0.25 * exposure[4]), 0.0, 1.0)
