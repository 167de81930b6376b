"""Shows the progress of training and of meta-test: a live bar on a terminal, a line every half minute elsewhere."""

from collections import deque
from collections.abc import Callable, Mapping
from datetime import timedelta
from time import monotonic
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, ProgressColumn, TextColumn
from rich.progress import Progress as Bar
from rich.table import Column

from maml.hardware import distributed

REDRAW_SECONDS = 0.2  # on a terminal
LINE_SECONDS = 30.0  # elsewhere
SHORT_SECONDS = 1.0  # a shorter meta-test is not shown
WINDOW_SECONDS = 10.0  # the speed is that of the iterations of the last ten seconds, or of the last one if longer


def duration(seconds: float) -> str:
    """Returns a time as days, hours, minutes and seconds; at most the longest time of `timedelta`."""
    longest = timedelta.max // timedelta(seconds=1)
    return str(timedelta(seconds=round(min(seconds, longest))))


class _Display:
    """A bar on a terminal, lines elsewhere; in other processes than rank 0 it shows nothing.

    Args:
        console: the console to draw on; None is standard error.
        columns: the columns of the bar.
        transient: whether the bar is removed at the end.
    """

    def __init__(self, console: Console | None, *columns: ProgressColumn, transient: bool = False) -> None:
        self._console = console or Console(stderr=True, quiet=distributed.rank() > 0)
        self._live = self._console.is_interactive and not self._console.quiet
        self._interval = REDRAW_SECONDS if self._live else LINE_SECONDS
        self._next_draw = 0.0
        # A refreshing thread would slow the training loop down.
        self._bar = Bar(*columns, console=self._console, auto_refresh=False, transient=transient)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar.live.is_started:  # stopping the bar of a short meta-test would print an empty line
            self._bar.stop()

    def message(self, text: str) -> None:
        """Prints a line, above the bar if there is one."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)


class Progress(_Display):
    """The display of one training run; a context manager.

    Args:
        title: name of the run.
        total: number of the last iteration.
        start: number of iterations that were done before.
        console: the console to draw on; None is standard error.
    """

    def __init__(self, title: str, total: int, start: int = 0, console: Console | None = None) -> None:
        super().__init__(
            console,
            BarColumn(bar_width=20),  # narrower on a narrow terminal
            MofNCompleteColumn(table_column=Column(no_wrap=True)),
            TextColumn("{task.fields[facts]}", markup=False),
        )
        self.title, self.total = title, total
        self._samples: deque[tuple[float, int]] = deque()
        self._task = self._bar.add_task(title, completed=start, total=total, facts="")

    def __enter__(self) -> Self:
        """Draws the title and the bar."""
        if self._live:
            self.message(self.title)
            self._bar.start()
        return self

    def update(self, iteration: int, metrics: Callable[[], Mapping[str, float]]) -> None:
        """Reports that ``iteration`` iterations are done. Most calls draw nothing, so it is cheap.

        Args:
            iteration: from ``start`` + 1 to ``total``. The first call and the one for ``total`` always draw.
            metrics: returns the numbers to show; called only for drawing, because it may wait for the device.
        """
        now = monotonic()
        if now < self._next_draw and iteration < self.total:
            return
        self._next_draw = now + self._interval
        facts = [f"{name} {value:.4g}" for name, value in metrics().items()] + self._speed_and_time_left(iteration)
        if self._live:
            self._bar.update(self._task, completed=iteration, facts="  ".join(facts), refresh=True)
        else:
            self.message("  ".join([f"{self.title} {iteration}/{self.total}", *facts]))

    def _speed_and_time_left(self, iteration: int) -> list[str]:
        """Returns the speed and the time left. The first iteration, which may compile, does not count for either."""
        now = monotonic()
        self._samples.append((now, iteration))
        while len(self._samples) > 2 and now - self._samples[1][0] >= WINDOW_SECONDS:
            self._samples.popleft()
        then, before = self._samples[0]
        if iteration == before or now == then:
            return []
        seconds = (now - then) / (iteration - before)
        speed = f"{1 / seconds:,.1f} it/s" if seconds < 1 else f"{seconds:,.1f} s/it"
        return [speed, f"ETA {duration(seconds * (self.total - iteration))}"]


class EvaluationProgress(_Display):
    """The display of one meta-test; a context manager. A short one shows nothing, or nothing that stays.

    Args:
        total: number of tasks that are adapted to, those of a search included.
        console: the console to draw on; None is standard error, on rank 0 only.

    Attributes:
        done: number of tasks that are done. A task counts in parts, one for each gradient step.
        what: what is measured now, for the display.
    """

    def __init__(self, total: int, console: Console | None = None) -> None:
        facts = TextColumn("{task.fields[facts]}", markup=False)
        super().__init__(console, TextColumn("evaluating"), BarColumn(bar_width=20), facts, transient=True)
        self.total, self.done, self.what = total, 0.0, ""
        self._start = monotonic()
        self._next_draw = self._start + SHORT_SECONDS
        self._task = self._bar.add_task("", total=total, facts="")

    def reach(self, done: float) -> None:
        """Reports that ``done`` tasks are done. Most calls draw nothing, so it is cheap."""
        self.done = done
        now = monotonic()
        if now < self._next_draw:
            return
        self._next_draw = now + self._interval
        share = done / self.total
        facts = [f"{100 * share:.0f} %", self.what]
        if share:
            facts.append(f"ETA {duration((now - self._start) * (1 - share) / share)}")
        if self._live:
            self._bar.start()
            self._bar.update(self._task, completed=done, facts="  ".join(facts), refresh=True)
        else:
            self.message(" ".join(["evaluating", "  ".join(facts)]))
