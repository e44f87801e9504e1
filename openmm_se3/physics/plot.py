"""Draw the panels of a section."""

import os
from pathlib import Path

import numpy as np

from openmm_se3.physics.report import Section


def plot_section(section: Section, picture: Path) -> None:
    """Draw all panels of a section into one PNG file.

    Parameters
    ----------
    section : Section
        With at least one panel.
    picture : Path
        File to write.
    """
    from matplotlib.figure import Figure

    columns = min(2, len(section.panels))
    rows = -(-len(section.panels) // columns)
    figure = Figure(figsize=(5.5 * columns, 3.8 * rows), layout="constrained")
    figure.suptitle(section.title)
    for k, panel in enumerate(section.panels):
        axes = figure.add_subplot(rows, columns, k + 1)
        for line in panel.lines:
            # What could not be computed is None in a report that was read back.
            y = np.array(line.y, dtype=float)
            axes.plot(line.x, y, **({"ls": "", "marker": "o", "ms": 4, "color": "black"} if line.points else {"lw": 1.2}), label=line.label)
        axes.set(title=panel.title, xlabel=panel.x_label, ylabel=panel.y_label)
        if panel.y_range is not None:
            axes.set_ylim(*panel.y_range)
        if len(panel.lines) > 1:
            axes.legend(fontsize="small")
        axes.grid(alpha=0.3)
    temporary = picture.with_suffix(".tmp.png")
    figure.savefig(temporary, dpi=130)
    os.replace(temporary, picture)
