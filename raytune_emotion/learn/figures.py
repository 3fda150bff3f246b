"""Make figures in which text is text: names of classes, files and settings come from outside."""

import warnings
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text


class PlainFigure(Figure):
    """Draw every text as it stands: between two dollars, matplotlib takes it for a formula, and may fail."""

    def draw(self, renderer: Any) -> None:
        for text in self.findobj(Text):
            assert isinstance(text, Text)
            text.set_parse_math(False)
        with warnings.catch_warnings():
            # A box shows it. Names are in any script, and the font is not.
            warnings.filterwarnings("ignore", "Glyph .* missing from font")
            super().draw(renderer)


def make_figure(width: float, height: float, columns: int = 1, rows: int = 1) -> tuple[Figure, list[Axes]]:
    """Make a figure of this size in inches, and a grid of axes in it, row by row."""
    # Not of pyplot, which would keep it open and may need a window system.
    with mpl.rc_context({"axes.spines.top": False, "axes.spines.right": False, "font.size": 9}):
        figure = PlainFigure(figsize=(width, height), layout="constrained")
        return figure, list(figure.subplots(rows, columns, squeeze=False).flat)
