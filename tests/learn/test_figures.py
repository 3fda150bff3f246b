"""Figures: text from outside is drawn as it stands."""

import io

import pytest
from matplotlib.figure import Figure

from raytune_emotion.learn.figures import make_figure


def saved(figure, **options):
    picture = io.BytesIO()
    figure.savefig(picture, format="raw", dpi=60, **options)
    return picture.getvalue()


def label_ticks(axes, text):
    axes.set_yticks([0, 1], [text, text])


def set_title(axes, text):
    axes.set_title(text)


def label_line(axes, text):
    axes.plot([1, 2], label=text)
    axes.legend()


@pytest.mark.parametrize("write", [label_ticks, set_title, label_line])
@pytest.mark.parametrize("options", [{}, {"bbox_inches": "tight"}])
def test_dollars_are_no_formula(write, options):
    figure, (axes,) = make_figure(4, 3)
    write(axes, "$\\frac$")  # as a formula, it is an error
    assert saved(figure, **options)


def test_letters_that_the_font_lacks_are_no_warning(recwarn):
    figure, (axes,) = make_figure(4, 3)
    axes.set_title("开心")
    assert saved(figure)
    assert not [*recwarn]


def test_dollars_are_drawn():
    ours, (axes,) = make_figure(4, 3)
    theirs = Figure(figsize=(4, 3))
    ours.delaxes(axes)
    for figure, text in ((ours, "a $x$"), (theirs, r"a \$x\$")):
        figure.text(0.1, 0.5, text, fontsize=9)
    assert saved(ours) == saved(theirs)
