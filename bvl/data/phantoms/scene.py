"""What one phantom image shows, before it is drawn."""

import dataclasses


@dataclasses.dataclass(frozen=True, slots=True)
class Instance:
    """One drawn finding; lengths and positions are fractions of the image side, angles are radians."""

    finding: str
    site: str
    x: float
    y: float
    radius: float  # semi-major axis
    aspect: float
    angle: float
    bend: float
    wobble: float
    phase: float
    dots: tuple[tuple[float, float, float], ...]  # (x offset, y offset, radius) inside the outline
    strength: float  # how strongly it stands out: 1 is full contrast

    @property
    def minor(self) -> float:
        """Semi-minor axis."""
        return self.radius / self.aspect

    @property
    def reach(self) -> float:
        """A radius about the centre that holds the whole outline."""
        return self.radius * (1.0 + 0.2 * self.bend) + 1.42 * self.wobble * self.minor


@dataclasses.dataclass(frozen=True, slots=True)
class Scene:
    """One image's content: who, how it was taken, what is in it."""

    modality: str
    view: str
    anatomy: tuple[float, ...]  # uniform numbers that are the patient's own
    exposure: tuple[float, ...]  # uniform numbers that belong to this image
    instances: tuple[Instance, ...]
    facts: dict
