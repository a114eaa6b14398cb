"""One measured figure."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """A figure and what it should be.

    target: the most that it may be, in the same unit; None where nothing is asked.
    met: whether it is; None where nothing is asked.
    """

    figure: str
    value: float
    target: float | None
    met: bool | None
    unit: str


def row(figure: str, value: float, unit: str, *, at_most: float | None = None) -> Row:
    return Row(figure, value, at_most, None if at_most is None else value <= at_most, unit)
