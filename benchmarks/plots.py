"""Draw the records of the benchmarks, one SVG per file.

    python benchmarks/importance.py --json importance.json
    python benchmarks/plots.py importance.json [more.json …] [--output docs/images]

Every repeat is a dot, the median a bar, the range a line; the dashed line is where there would be
no difference. The picture is named after its file.
"""

from __future__ import annotations

import argparse
import textwrap
from pathlib import Path
from statistics import median

import matplotlib as mpl
from matplotlib.figure import Figure

from records import Record, read

INK, GREY, BLUE = "#1a1a2e", "#8a8fa3", "#2563a8"


def draw(record: Record) -> Figure:
    """Rows of dots, in the record's order from the top."""
    rows = len(record.values)
    figure = Figure(figsize=(7.2, 1.6 + 0.42 * rows), facecolor="white", layout="constrained")
    axes = figure.add_subplot()
    for row, values in enumerate(record.values.values()):
        middle = median(values)
        axes.plot([min(values), max(values)], [row, row], color=BLUE, linewidth=1.5, alpha=0.5)
        axes.plot(values, [row] * len(values), "o", color=BLUE, markersize=4, alpha=0.45)
        axes.plot([middle, middle], [row - 0.25, row + 0.25], color=BLUE, linewidth=2.5)
        axes.annotate(
            f"{middle:.3g}" if middle < 1000 else f"{middle:.0f}",
            (max(values), row),
            xytext=(8, 0),
            textcoords="offset points",
            va="center",
            color=INK,
        )
    if record.reference is not None:
        axes.axvline(record.reference, color=GREY, linewidth=1, linestyle="--")
    axes.set_yticks(range(rows), list(record.values))
    axes.set_ylim(rows - 0.5, -0.5)
    axes.set_xlim(left=0)
    axes.margins(x=0.12)
    conditions = textwrap.fill(record.conditions, 110)
    axes.set_xlabel(f"{record.axis}\n{conditions}", color=INK, fontsize=8)
    axes.set_title(record.claim, loc="left", color=INK, fontsize=11)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color=GREY, alpha=0.2)
    return figure


def main() -> None:
    """Draw every file named."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("records", nargs="+", type=Path)
    parser.add_argument("--output", type=Path, default=Path("docs/images"))
    options = parser.parse_args()
    # The same bytes every time, and text that can be selected.
    mpl.rcParams.update({"svg.hashsalt": "perta", "svg.fonttype": "none"})
    options.output.mkdir(parents=True, exist_ok=True)
    for file in options.records:
        target = options.output / f"{file.stem}.svg"
        draw(read(file)).savefig(target, metadata={"Date": None})
        print(target)


if __name__ == "__main__":
    main()
