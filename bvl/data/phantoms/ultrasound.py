"""Ultrasound phantoms: multiplicative speckle in a sector, with shadows and enhancement behind findings."""

import math

import numpy as np
from jaxtyping import Float

from bvl.data.phantoms.canvas import footprint, grain, grid, smooth_field
from bvl.data.phantoms.scene import Instance, Scene


def _sector(anatomy: tuple[float, ...]) -> tuple[float, float, float]:
    """Apex (x, y) of the sector and half its opening angle in radians."""
    return 0.47 + 0.06 * anatomy[0], -0.12 + 0.06 * anatomy[1], 0.52 + 0.1 * anatomy[2]


_NEAR, _FAR = 0.2, 1.04  # distances from the apex at which the image begins and ends
_RANGES = {"near": (0.3, 0.56), "far": (0.68, 0.98)}


def obstacles(anatomy: tuple[float, ...], view: str) -> list[tuple[float, float, float]]:
    """Discs (x, y, radius) that findings keep clear of: none."""
    return []


def place(
    anatomy: tuple[float, ...], view: str, site: str, u: float, v: float, reach: float
) -> tuple[float, float]:
    """A point in the near or far part of the sector, from two uniform numbers."""
    x, y, half = _sector(anatomy)
    low, high = _RANGES[site]
    low = max(low, _NEAR + reach + 0.02)
    high = min(high, _FAR - reach - 0.02)
    distance = low + u * max(high - low, 0.0)
    spread = max(half - (reach + 0.015) / distance, 0.02)
    angle = (2.0 * v - 1.0) * spread
    return x + distance * math.sin(angle), y + distance * math.cos(angle)


def _behind(
    instance: Instance, apex: tuple[float, float], x: np.ndarray, y: np.ndarray
) -> Float[np.ndarray, "h w"]:
    """Coverage of the strip behind a finding, as the beams run."""
    vx, vy = instance.x - apex[0], instance.y - apex[1]
    distance = math.hypot(vx, vy)
    vx, vy = vx / distance, vy / distance
    px, py = x - apex[0], y - apex[1]
    along = px * vx + py * vy
    across = np.abs(px * vy - py * vx) / np.maximum(along, 0.05) * distance
    edge = np.clip((instance.radius * 0.95 - across) * 40.0 + 0.5, 0.0, 1.0)
    return edge * np.clip((along - distance) * 25.0, 0.0, 1.0)


def _draw_behind(echo: Float[np.ndarray, "h w"], instance: Instance, apex: tuple[float, float]) -> None:
    """The shadow behind a stone, the enhancement behind a cyst."""
    change = {"cyst": 0.7, "stone": -0.65}.get(instance.finding)
    if change is None:
        return
    x, y = grid(echo.shape[0])
    rows = slice(max(0, int(instance.y * echo.shape[0])), None)
    echo[rows] *= 1.0 + change * instance.strength * _behind(instance, apex, x, y[rows])


def _draw(echo: Float[np.ndarray, "h w"], instance: Instance) -> None:
    f = footprint(instance, echo.shape[0])
    strength, alpha = instance.strength, f.alpha()
    part = echo[f.window]
    if instance.finding == "cyst":
        part *= 1.0 - 0.97 * strength * alpha
    elif instance.finding == "stone":
        part += strength * alpha * (2.6 - part)
    elif instance.finding == "heterogeneous mass":
        k = 2.0 * math.pi / 0.085
        c, s = math.cos(instance.phase), math.sin(instance.phase)
        weave = np.sin(k * (f.dx * c + f.dy * s)) * np.sin(k * (f.dy * c - f.dx * s))
        part *= 1.0 + strength * alpha * (np.exp(2.4 * weave - 0.15) - 1.0)
    else:
        core = f.alpha(0.55)
        part *= 1.0 - 0.95 * strength * (alpha - core)
        part += strength * core * 1.3


def render(scene: Scene, size: int, rng: np.random.Generator) -> Float[np.ndarray, "size size"]:
    """The sector image with values in 0..1."""
    x, y = grid(size)
    anatomy, exposure = scene.anatomy, scene.exposure
    ax, ay, half = _sector(anatomy)
    px, py = x - ax, y - ay
    distance = np.sqrt(px * px + py * py)

    echo = np.exp(0.3 * smooth_field(rng, size, cells=5) + 0.22 * smooth_field(rng, size, cells=9))
    echo *= 0.45 + 0.25 * exposure[0]
    # Gain set by depth, never quite right: horizontal bands that the operator left.
    echo *= 1.0 + (0.5 * exposure[1] - 0.25) * np.cos(
        distance * (5.0 + 6.0 * exposure[2]) + 6.28 * exposure[3]
    )
    # A bright curved interface, such as the diaphragm, and a dark vessel: anatomy, no finding.
    interface = np.abs(distance - 0.45 - 0.5 * anatomy[3] - 0.3 * px * (anatomy[4] - 0.5))
    echo += 0.7 * anatomy[5] * np.clip(1.0 - interface * 60.0, 0.0, 1.0)
    turn = 3.14 * anatomy[6]
    vessel = np.abs(
        (x - 0.3 - 0.4 * anatomy[7]) * math.cos(turn) + (y - 0.3 - 0.5 * anatomy[8]) * math.sin(turn)
    )
    echo *= 1.0 - 0.75 * np.clip((0.016 - vessel) * 60.0 + 0.5, 0.0, 1.0) * (anatomy[9] > 0.4)

    # Poor contact of the probe: dark or bright beams that begin at the surface.
    beam = np.arctan2(px, py) / half
    for k in (6, 9):
        width = 0.07 + 0.16 * exposure[k + 1]
        edge = np.clip((width - np.abs(beam - 1.8 * exposure[k] + 0.9)) * 12.0 + 0.5, 0.0, 1.0)
        echo *= 1.0 + (1.0 * exposure[k + 2] - 0.6) * edge

    # What lies behind a finding first: a shadow never hides another finding.
    for instance in scene.instances:
        _draw_behind(echo, instance, (ax, ay))
    for instance in scene.instances:
        _draw(echo, instance)

    # Speckle: the modulus of a complex normal field, a little wider across the beam than along it.
    real, imaginary = grain(rng, size, limit=96), grain(rng, size, limit=96)
    real[:, 1:] += 0.6 * real[:, :-1]
    imaginary[:, 1:] += 0.6 * imaginary[:, :-1]
    depth = 0.2 + 0.25 * exposure[4]
    speckle = (1.0 - depth) + depth * 0.7 * np.sqrt(real * real + imaginary * imaginary)
    image = np.log1p(6.0 * np.maximum(echo, 0.0) * speckle) / math.log1p(6.0 * 2.2)

    inside = np.clip((1.0 - np.abs(beam)) * half * distance * 64.0 + 0.5, 0.0, 1.0)
    inside *= np.clip((distance - _NEAR) * 64.0 + 0.5, 0.0, 1.0) * np.clip(
        (_FAR - distance) * 64.0 + 0.5, 0.0, 1.0
    )
    return np.clip(image * inside * (0.75 + 0.4 * exposure[5]) + 0.02, 0.0, 1.0)
