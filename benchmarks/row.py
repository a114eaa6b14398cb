"""One measured figure, its target, and the values of peers."""

from dataclasses import asdict, dataclass, field, fields
from typing import Any


@dataclass(frozen=True)
class Row:
    """A figure and its target, all in the same unit.

    target: the largest allowed value, or the smallest if `is_least`; None without a target.
    bound: the best possible value; None if unknown.
    beside: the peers' values in the same run, by name.
    note: remark for the reader.
    """

    figure: str
    value: float
    unit: str
    target: float | None = None
    is_least: bool = False
    bound: float | None = None
    beside: dict[str, float] = field(default_factory=dict)
    note: str = ""

    @property
    def met(self) -> bool | None:
        """True if the value meets the target; None without a target."""
        if self.target is None:
            return None
        return self.value >= self.target if self.is_least else self.value <= self.target

    @property
    def ahead(self) -> dict[str, float]:
        """Factor by which the value is better than each peer's; below 1 is worse. Peers at 0 are left out."""
        pairs = {
            name: (self.value, peer) if self.is_least else (peer, self.value) for name, peer in self.beside.items()
        }
        return {name: better / worse for name, (better, worse) in pairs.items() if worse}

    def to_dict(self) -> dict[str, Any]:
        """Return the row as `bench.json` stores it."""
        return {**asdict(self), "met": self.met, "ahead": self.ahead}


def row_from_dict(stored: dict[str, Any]) -> Row:
    """Return a row of `bench.json`; `met` and `ahead` follow from the other fields."""
    return Row(**{each.name: stored[each.name] for each in fields(Row)})


def row(
    figure: str,
    value: float,
    unit: str,
    *,
    at_most: float | None = None,
    at_least: float | None = None,
    bound: float | None = None,
    beside: dict[str, float] | None = None,
    note: str = "",
) -> Row:
    target, is_least = (at_most, False) if at_least is None else (at_least, True)
    return Row(figure, value, unit, target, is_least, bound, beside or {}, note)


def table(rows: list[Row]) -> str:
    """Format rows as a table, with each peer's value and the factor by which the suite is better."""
    peers = list(dict.fromkeys(name for each in rows for name in each.beside))
    heads = ["figure", "value", "", "bound", "target", "met", *peers, "note"]
    lines = [heads, *([*_cells(each), *(_peer(each, name) for name in peers), each.note] for each in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(heads))]
    right = {1, 3, 4}
    return "\n".join(
        "  ".join(
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def _cells(each: Row) -> list[str]:
    def number(value: float | None) -> str:
        return "" if value is None else f"{value:.4g}"

    sign = ">= " if each.is_least else "<= "
    target = "" if each.target is None else sign + number(each.target)
    met = {None: "", True: "yes", False: "no"}[each.met]
    return [each.figure, number(each.value), each.unit, number(each.bound), target, met]


def _peer(each: Row, name: str) -> str:
    if name not in each.beside:
        return ""
    factor = f" ({each.ahead[name]:.2g}x)" if each.target is not None and name in each.ahead else ""
    return f"{each.beside[name]:.4g}{factor}"
