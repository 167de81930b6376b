"""One style for all pictures, their sizes on paper, and how they are written to files."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from maml.record.atomic import write_bytes_atomically
from maml.record.labels import AXIS
from maml.types import MeasuredBy

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

STYLE = Path(__file__).with_name("maml.mplstyle")
COLUMN, PAGE = 3.25, 6.75  # widths of one column and of the page in the paper's layout, in inches
GRAY = "#808080"  # readable on white and on black
# Line styles of a complete training and of one with a reduced budget.
COMPLETE: dict[str, Any] = {"ls": "-", "marker": "o"}
REDUCED: dict[str, Any] = {"ls": (0, (4, 2)), "marker": "o", "markerfacecolor": "none"}
_NO_DATE = {  # without a date, so that equal numbers give equal bytes
    "png": {"Software": None},
    "pdf": {"CreationDate": None, "Creator": None, "Producer": None},
    "svg": {"Date": None, "Creator": None, "Format": None, "Type": None},
}


@contextmanager
def style() -> Iterator[None]:
    """Draws with the project's style, whatever style the user has; also a decorator.

    Not only drawing, but also saving has to happen inside.
    """
    import matplotlib  # imported here because it takes half a second

    with matplotlib.rc_context(fname=STYLE):
        yield


def save(canvas: Figure, *paths: Path) -> None:
    """Writes a picture as PNG, PDF or SVG, as the suffixes say; each file is written whole or not at all."""
    for path in paths:
        kind, buffer = path.suffix[1:], BytesIO()
        background = "none" if kind == "svg" else "auto"  # an SVG is transparent: it lies on pages of any colour
        canvas.savefig(buffer, format=kind, metadata=_NO_DATE[kind], facecolor=background)
        content = themed(buffer.getvalue().decode()).encode() if kind == "svg" else buffer.getvalue()
        write_bytes_atomically(path, content)


def themed(svg: str) -> str:
    """Returns Matplotlib's SVG with text and axes in the colour of the text around it.

    It may stand on a page beside others: its rules apply to itself only, and names of groups, which others have too,
    are left out. Definitions keep their names, because definitions of equal names have equal contents.
    """
    import matplotlib

    ink = str(matplotlib.rcParams["text.color"])
    svg = re.sub(f"{ink if ink.startswith('#') else '#' + ink}", "currentColor", svg, flags=re.IGNORECASE)
    rules = re.search(r'<defs>\s*<style type="text/css">\*\{([^}]*)\}</style>\s*</defs>\s*', svg)
    if rules:  # for all elements of the page; the same is inherited from the root
        svg = svg.replace(rules[0], "").replace("<svg ", f'<svg style="{rules[1]}" ', 1)
    return re.sub(r'(<g) id="[^"]*"', r"\1", svg)


def count_steps(axes: Axes, measured_by: MeasuredBy = "gradient step") -> None:
    """Labels the horizontal axis as gradient steps or showings, with ticks at whole numbers only."""
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel(AXIS[measured_by])
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=[1, 2, 5, 10], min_n_ticks=1))


def log_ticks(axes: Axes) -> None:
    """Gives a logarithmic vertical axis labelled ticks at 1, 2 and 5 times the powers of ten.

    Over more than three powers of ten, only the powers are labelled.
    """
    from matplotlib.ticker import LogLocator, NullFormatter

    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(10, subs=(1,) if high > 1000 * low else (1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())
