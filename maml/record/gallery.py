"""The pictures of an evaluation: the plot of its report, and those that the algorithm makes."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from maml.pictures import Images, Lines, Picture
from maml.record.style import save, style

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LOG = logging.getLogger(__name__)

_PREFIX = "picture_"
_LINE_STYLES = ("-", "--", ":")


def report_pictures(folder: Path) -> dict[str, Path]:
    """Returns the pictures of the report in a folder, by name: its plot, ``adaptation``, and those of the algorithm."""
    plot = {"adaptation": folder / "report.png"}
    return {name: path for name, path in plot.items() if path.exists()} | drawn_pictures(folder)


def drawn_pictures(folder: Path) -> dict[str, Path]:
    """Returns the pictures that the algorithm made for the report in a folder, by name."""
    return {path.stem.removeprefix(_PREFIX): path for path in sorted(folder.glob(f"{_PREFIX}*.png"))}


def draw_pictures(make: Callable[[], Mapping[str, Picture]], folder: Path) -> None:
    """Draws what a function returns. If that fails, a warning says so: no picture is worth a finished meta-test."""
    try:
        for name, picture in make().items():
            draw(name, picture, folder)
    except Exception as error:
        LOG.warning("the report has no pictures of the algorithm, because making them failed", exc_info=error)


@style()
def draw(name: str, picture: Picture, folder: Path) -> Path:
    """Draws a picture as ``picture_<name>.png`` in a folder; returns its path."""
    from matplotlib.figure import Figure  # imported here because it takes half a second

    if isinstance(picture, Lines):
        figure = Figure(figsize=(3.25, 2.6), layout="constrained")
        _draw_lines(figure, picture)
    else:
        columns = max(len(images) for images in picture.rows.values())
        figure = Figure(figsize=(1.2 + 0.5 * columns, 0.4 + 0.55 * len(picture.rows)), layout="constrained")
        _draw_images(figure, picture, columns)
    figure.suptitle(picture.title)
    path = folder / f"{_PREFIX}{name}.png"
    save(figure, path)
    return path


def _draw_lines(figure: Figure, picture: Lines) -> None:
    import matplotlib

    axes, num_colors = figure.subplots(), len(matplotlib.rcParams["axes.prop_cycle"])
    for number, (name, values) in enumerate(picture.lines.items()):
        x = range(len(values)) if picture.x is None else picture.x
        dashes = _LINE_STYLES[number // num_colors % len(_LINE_STYLES)]  # another one when the colours begin again
        axes.plot(x, values, dashes, marker="o", label=name)
    axes.set(xlabel=picture.x_label, ylabel=picture.y_label)
    axes.locator_params(axis="x", integer=all(float(each).is_integer() for each in picture.x or ()))
    if len(picture.lines) > 1:
        axes.legend()


def _draw_images(figure: Figure, picture: Images, columns: int) -> None:
    grid = figure.subplots(len(picture.rows), columns, squeeze=False)
    for row, (name, images) in zip(grid, picture.rows.items(), strict=True):
        for axes in row:
            axes.set(xticks=[], yticks=[])
            axes.set_frame_on(False)
        for axes, image in zip(row, images.cpu().numpy(), strict=False):
            axes.imshow(image, cmap="gray_r", vmin=0, vmax=1)
        row[0].set_ylabel(name, rotation=0, ha="right", va="center")
