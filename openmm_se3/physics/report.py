"""What a measure hands back: quantities with their limits, and curves to draw; as JSON and as a table."""

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.markup import escape
from rich.table import Table


@dataclass(frozen=True)
class Quantity:
    """One measured number.

    Attributes
    ----------
    name : str
        What was measured.
    value : float
        NaN where it could not be measured.
    unit : str
        Unit of value, limits and uncertainty; empty for a pure number.
    must, aim : float or None
        Sizes that the value should not exceed: what production dynamics need, and what the best models reach.
    uncertainty : float
        Standard error; 0 where the measure is deterministic.
    """

    name: str
    value: float
    unit: str = ""
    must: float | None = None
    aim: float | None = None
    uncertainty: float = 0.0

    @property
    def verdict(self) -> str:
        """``aim``, ``ok``, ``missed``, or ``open`` where the limit lies within two standard errors; empty without a limit."""
        if self.must is None:
            return ""
        size = abs(self.value)
        if self.aim is not None and size + 2 * self.uncertainty <= self.aim:
            return "aim"
        if size + 2 * self.uncertainty <= self.must:
            return "ok"
        return "open" if size - 2 * self.uncertainty <= self.must else "missed"


@dataclass(frozen=True)
class Line:
    """One curve of a panel: label, abscissae, ordinates, and whether to draw points (references) instead of a line."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    points: bool = False


@dataclass(frozen=True)
class Panel:
    """One set of axes. `y_range` clips what is drawn, not the data."""

    title: str
    x_label: str
    y_label: str
    lines: list[Line]
    y_range: tuple[float, float] | None = None


@dataclass(frozen=True)
class Section:
    """Outcome of one measure.

    Attributes
    ----------
    name, title : str
        Key in files and on the command line, and heading.
    quantities : list of Quantity
        Numbers of the table.
    panels : list of Panel
        Curves of the picture.
    notes : list of str
        What a reader must know besides: molecules left out, runs that ended early.
    seconds : float
        Wall time it took.
    """

    name: str
    title: str
    quantities: list[Quantity]
    panels: list[Panel] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0


def thinned(length: int, count: int = 500) -> np.ndarray:
    """Indices of at most `count` samples of a series, evenly spread, first and last included."""
    return np.unique(np.linspace(0, length - 1, min(count, length)).astype(int))


def missed(sections: Iterable[Section]) -> list[Quantity]:
    """Quantities that exceed what they must keep."""
    return [q for s in sections for q in s.quantities if q.verdict == "missed"]


def _plain(value: Any) -> Any:
    """Numbers that JSON can hold: arrays as lists, what is not finite as None, since NaN is not JSON."""
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, (float, np.floating)):
        return float(value) if math.isfinite(value) else None
    return value.item() if isinstance(value, np.generic) else value


def write_report(path: Path, head: Mapping[str, Any], sections: Sequence[Section]) -> None:
    """Write `head` and the sections as JSON, beside the file first, so that a kill leaves the old report or the new one."""
    rows = [asdict(s) for s in sections]
    for row, section in zip(rows, sections, strict=True):
        for quantity, measured in zip(row["quantities"], section.quantities, strict=True):
            quantity["verdict"] = measured.verdict
    partial = path.with_name("partial-" + path.name)
    partial.write_text(json.dumps(_plain({**head, "sections": rows}), indent=1, allow_nan=False) + "\n")
    os.replace(partial, path)


def read_report(path: Path) -> tuple[dict[str, Any], list[Section]]:
    """Head and sections of a report; the inverse of `write_report`, with NaN where a number was not finite.

    Raises
    ------
    ValueError
        If the file is no such report.
    """
    try:
        head = json.loads(path.read_text())
        return head, _sections(head.pop("sections"))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a report of physics ({type(error).__name__}: {error}); choose another output directory") from None


#: What a number of a quantity was that JSON could not hold: values are NaN, errors of too few samples infinite.
_NOT_FINITE = {"value": float("nan"), "uncertainty": float("inf")}


def _sections(rows: list[dict[str, Any]]) -> list[Section]:
    sections = []
    for row in rows:
        for quantity in row["quantities"]:
            del quantity["verdict"]
        quantities = [Quantity(**{**q, **{name: number for name, number in _NOT_FINITE.items() if q[name] is None}}) for q in row["quantities"]]
        panels = [
            Panel(**{**p, "lines": [Line(**line) for line in p["lines"]], "y_range": None if p["y_range"] is None else tuple(p["y_range"])})
            for p in row["panels"]
        ]
        sections.append(Section(**{**row, "quantities": quantities, "panels": panels}))
    return sections


_STYLE = {"aim": "[green]aim[/]", "ok": "ok", "open": "[yellow]open[/]", "missed": "[bold red]MISSED[/]", "": ""}


def report_table(sections: Iterable[Section]) -> Table:
    """All quantities as a table, one block per section."""
    table = Table("measure", "value", "must", "aim", "")
    for section in sections:
        table.add_row(f"[bold]{escape(section.title)}[/]", f"[dim]{section.seconds:.0f} s[/]")
        for q in section.quantities:
            value = f"{q.value:.3g}" + (f" ± {q.uncertainty:.2g}" if q.uncertainty else "")
            limits = ("" if limit is None else f"{limit:g}" for limit in (q.must, q.aim))
            table.add_row(f"  {escape(q.name)}", escape(f"{value} {q.unit}".strip()), *limits, _STYLE[q.verdict])
        for note in section.notes:
            table.add_row(f"  [dim]{escape(note)}[/]")
        table.add_section()
    return table
