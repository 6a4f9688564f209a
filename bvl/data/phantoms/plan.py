"""From hashed numbers to a scene: what a patient has, at which visit, where, how large, how distinct."""

import math

import numpy as np

from bvl.data.phantoms import fundus, radiograph, smear, ultrasound
from bvl.data.phantoms.catalogue import CATALOGUE, Finding
from bvl.data.phantoms.scene import Instance, Scene

PAINTERS = {
    "chest radiograph": radiograph,
    "fundus photograph": fundus,
    "blood smear": smear,
    "ultrasound image": ultrasound,
}

MAX_VISITS = 3
PREVALENCE = 0.45  # of each finding, before the few that find no room are left out
UNCERTAIN = 0.05  # share of drawn findings that are equivocal
PROGRESS = 0.4  # chance that a finding is drawn anew at a follow-up
# Contrast by severity; the ranges are apart, so that a named severity can be decided from the image.
STRENGTHS = {"equivocal": (0.38, 0.44), "mild": (0.72, 0.8), "marked": (0.98, 1.04)}

_TRIES = 8  # places tried for each instance
_STATE = 8  # uniform numbers for a finding as a whole
_SHAPE = 6  # uniform numbers for the shape of an instance
_MAX_COUNT = 3
_PER_FINDING = _STATE + _MAX_COUNT * (_SHAPE + 2 * _TRIES)
_ANATOMY = 24
_MASK = (1 << 64) - 1


def mix(*numbers: int) -> int:
    """A 64-bit hash of a few integers (the finaliser of SplitMix64, chained)."""
    z = 0
    for number in numbers:
        z = (z + number + 0x9E3779B97F4A7C15) & _MASK
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
        z ^= z >> 31
    return z


def generator(*numbers: int) -> np.random.Generator:
    """A random generator that depends on the numbers alone."""
    return np.random.Generator(np.random.Philox(key=[mix(*numbers), mix(1, *numbers)]))


def _between(limits: tuple[float, float], u: float) -> float:
    return limits[0] + u * (limits[1] - limits[0])


def _instance(finding: Finding, large: bool, strength: float, u: list[float], site: str) -> Instance:
    """An instance of a finding at the origin, shaped by six uniform numbers."""
    radius = _between(finding.large if large else finding.small, u[0])
    phase = 2.0 * math.pi * u[3]
    dots = []
    if finding.dots:
        # Dots on a loose ring about one in the middle, so that they stay apart at any phase.
        dot = radius * 0.25
        dots.append((0.0, 0.0, dot))
        for k in range(finding.dots - 1):
            turn = phase + 2.0 * math.pi * (k + 0.35 * math.sin(7.0 * k + phase)) / (finding.dots - 1)
            far = radius * 0.7
            dots.append(
                (far * math.cos(turn), far * math.sin(turn), dot * (0.75 + 0.25 * math.cos(k + phase)))
            )
    return Instance(
        finding=finding.name,
        site=site,
        x=0.0,
        y=0.0,
        radius=radius,
        aspect=_between(finding.aspect, u[1]),
        angle=(u[2] - 0.5) * finding.tilt + (math.pi * (u[4] > 0.5) if finding.bend else 0.0),
        bend=finding.bend,
        wobble=finding.wobble,
        phase=phase,
        dots=tuple(dots),
        strength=strength,
    )


def _moved(instance: Instance, x: float, y: float) -> Instance:
    return Instance(
        instance.finding, instance.site, x, y, instance.radius, instance.aspect, instance.angle,
        instance.bend, instance.wobble, instance.phase, instance.dots, instance.strength,
    )  # fmt: skip


def plan_scene(seed: int, patient: int, visit: int, modality: str) -> Scene:
    """The scene of one visit of one patient.

    Anatomy belongs to the patient. Each finding keeps its state from visit to visit unless it is drawn
    anew, with chance `PROGRESS`.
    """
    entry = CATALOGUE[modality]
    painter = PAINTERS[modality]
    rng = generator(seed, 11, patient)
    anatomy = tuple(rng.random(_ANATOMY).tolist())
    view = entry.views[int(rng.random() * len(entry.views))]
    numbers = rng.random((MAX_VISITS, len(entry.findings), _PER_FINDING))
    exposure = tuple(rng.random((MAX_VISITS, 16))[visit].tolist())

    sites = [site for site in entry.sites if site != "both"]
    taken = list(painter.obstacles(anatomy, view))
    instances: list[Instance] = []
    facts = {}
    order = rng.permutation(len(entry.findings)).tolist()
    for k in order:
        finding = entry.findings[k]
        row = max(v for v in range(visit + 1) if v == 0 or numbers[v, k, 0] < PROGRESS)
        u = numbers[row, k].tolist()
        drawn: list[Instance] = []
        if u[1] < PREVALENCE:
            severity = "equivocal" if u[2] < UNCERTAIN else ("mild" if u[3] < 0.5 else "marked")
            large = u[4] < 0.5
            count = 1 + int(u[5] * finding.max_count) if severity != "equivocal" else 1
            first = int(u[6] * len(sites))
            for n in range(count):
                v = u[_STATE + n * (_SHAPE + 2 * _TRIES) :]
                # About a third of the multiple ones are spread over sites.
                site = sites[(first + n) % len(sites)] if u[7] < 0.35 else sites[first]
                shape = _instance(finding, large, _between(STRENGTHS[severity], v[5]), v, site)
                for t in range(_TRIES):
                    x, y = painter.place(
                        anatomy, view, site, v[_SHAPE + 2 * t], v[_SHAPE + 2 * t + 1], shape.reach
                    )
                    room = shape.reach + 0.012
                    if all((x - tx) ** 2 + (y - ty) ** 2 > (room + tr) ** 2 for tx, ty, tr in taken):
                        taken.append((x, y, shape.reach))
                        drawn.append(_moved(shape, x, y))
                        break
        if not drawn:
            facts[finding.name] = {"presence": "absent"}
            continue
        instances.extend(drawn)
        found = {instance.site for instance in drawn}
        facts[finding.name] = {
            "presence": "uncertain" if severity == "equivocal" else "present",
            "count": len(drawn),
            "site": found.pop() if len(found) == 1 else "both",
            "size": "large" if large else "small",
            "severity": severity,
        }
    ordered = {finding.name: facts[finding.name] for finding in entry.findings}
    return Scene(
        modality=modality,
        view=view,
        anatomy=anatomy,
        exposure=exposure,
        instances=tuple(instances),
        facts={"modality": modality, "view": view, "findings": ordered},
    )
