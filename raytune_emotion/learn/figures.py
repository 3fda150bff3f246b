"""Make figures that show text unchanged, because names of classes, files and settings come from outside."""

import warnings
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text


class PlainFigure(Figure):
    """Draw every text unchanged. matplotlib takes text between two dollar signs for a formula, and may fail."""

    def draw(self, renderer: Any) -> None:
        for text in self.findobj(Text):
            assert isinstance(text, Text)
            text.set_parse_math(False)
        with warnings.catch_warnings():
            # Names may be in any script. A missing glyph is drawn as a box.
            warnings.filterwarnings("ignore", "Glyph .* missing from font")
            super().draw(renderer)


def make_figure(width: float, height: float, columns: int = 1, rows: int = 1) -> tuple[Figure, list[Axes]]:
    """Make a figure of this size in inches, and a grid of axes in it, row by row."""
    # pyplot is not used: it would keep the figure open and may need a window system.
    with mpl.rc_context({"axes.spines.top": False, "axes.spines.right": False, "font.size": 9}):
        figure = PlainFigure(figsize=(width, height), layout="constrained")
        return figure, list(figure.subplots(rows, columns, squeeze=False).flat)
