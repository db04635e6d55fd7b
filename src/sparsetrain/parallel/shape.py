"""GridShape: the sizes of a grid of devices, where each rank stands in it, and what it can cut.

A grid has four axes. x and y cut a weight matrix in its two dimensions, z cuts each piece again (and the batch), data
holds copies of the whole (and cuts the batch). Ranks are numbered with x fastest, then y, z, data, so that the axes
that move most lie closest together. arXiv 2305.13525, section 3.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

AXES = ("data", "z", "x", "y")
TRANSPOSED_ROLES = ("o", "down")
"""The second linear of each pair, attention's and the FFN's: it takes what the first has left, cut over y."""


@dataclass(frozen=True)
class Place:
    """Where one rank stands."""

    data: int
    z: int
    x: int
    y: int


@dataclass(frozen=True)
class GridShape:
    """Devices along each axis; their product is the number of ranks.

    Raises:
        ValueError: a size below 1.
    """

    data: int = 1
    z: int = 1
    x: int = 1
    y: int = 1

    def __post_init__(self) -> None:
        for axis in AXES:
            size = getattr(self, axis)
            if not isinstance(size, int) or isinstance(size, bool) or size < 1:
                raise ValueError(f"grid {axis}={size!r}: an axis has a whole number of devices, 1 or more. Correct it.")

    @classmethod
    def from_text(cls, text: str) -> GridShape:
        """`data=2,x=2,y=2` -> a shape; axes that are left out have one device.

        Raises:
            ValueError: another form, an unknown axis, or one given twice.
        """
        sizes: dict[str, int] = {}
        for part in text.split(","):
            match = re.fullmatch(r"\s*(\w+)\s*=\s*(\d{1,9})\s*", part)
            if match is None or match[1] not in AXES or match[1] in sizes:
                raise ValueError(
                    f"grid {text[:80]!r}: cannot read {part.strip()[:40]!r}. Write each axis once, with its devices: "
                    "data=2,z=1,x=2,y=2 (axes left out have one)."
                )
            sizes[match[1]] = int(match[2])
        return cls(**sizes)

    def __str__(self) -> str:
        return ",".join(f"{axis}={self.size(axis)}" for axis in AXES)

    @property
    def world(self) -> int:
        """Ranks in the grid."""
        return self.data * self.z * self.x * self.y

    def size(self, axis: str) -> int:
        return getattr(self, axis)

    def place(self, rank: int) -> Place:
        """Where a rank stands."""
        rest, x = divmod(rank, self.x)
        rest, y = divmod(rest, self.y)
        data, z = divmod(rest, self.z)
        return Place(data=data, z=z, x=x, y=y)

    def rank(self, place: Place) -> int:
        return ((place.data * self.z + place.z) * self.y + place.y) * self.x + place.x

    def group(self, rank: int, axis: str) -> list[int]:
        """The ranks that differ from this one along one axis alone, in order."""
        here = self.place(rank)
        return [self.rank(Place(**{**vars(here), axis: i})) for i in range(self.size(axis))]

    def check_world(self, ranks: int) -> None:
        """Raise ValueError if the grid does not hold exactly so many ranks."""
        if self.world != ranks:
            raise ValueError(
                f"grid {self} has {self.world} ranks, and {ranks} were started. "
                f"Start {self.world}, or choose sizes whose product is {ranks}."
            )

    def check_rows(self, rows: int) -> None:
        """Raise ValueError if a batch of so many rows cannot be cut over data and z."""
        cut = self.data * self.z
        if rows % cut:
            raise ValueError(
                f"grid {self} cuts the batch into data * z = {cut} parts, and {rows} rows do not divide by it. "
                f"Take {max(cut, rows // cut * cut)} rows."
            )


def axes_of_linear(transposed: bool) -> tuple[str, str]:
    """(the axis that cuts a linear's inputs, the axis that cuts its outputs).

    Every second linear of a pair is transposed, so that it takes its inputs as the first has left its outputs.
    """
    return ("y", "x") if transposed else ("x", "y")


def linear_error(shape: GridShape, in_features: int, out_features: int, transposed: bool = False) -> str | None:
    """Why a grid cannot cut a linear, or None."""
    in_axis, out_axis = axes_of_linear(transposed)
    for features, axis, what in ((in_features, in_axis, "inputs"), (out_features, out_axis, "outputs")):
        if features % shape.size(axis):
            return f"its {features} {what} do not divide by {axis}={shape.size(axis)}"
    block = in_features * out_features // (shape.x * shape.y)
    if block % shape.z:
        return f"its blocks of {block} weights do not divide by z={shape.z}"
    return None


def check_linear(shape: GridShape, name: str, in_features: int, out_features: int, transposed: bool = False) -> None:
    """Raise ValueError if a grid cannot cut a linear."""
    if why := linear_error(shape, in_features, out_features, transposed):
        raise ValueError(f"grid {shape} cannot cut {name} ({in_features} -> {out_features}): {why}. Use another grid.")
