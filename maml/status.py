"""Status lines on standard error: what a run is doing while nothing else appears on the screen."""

import os
import sys


def announce(text: str) -> None:
    """Prints a line on standard error, if this is the first process of the run.

    On a terminal it appears above the progress bar.
    """
    if os.environ.get("RANK", "0") == "0":
        print(text, file=sys.stderr, flush=True)


def about(seconds: float) -> str:
    """Returns a rough duration in words: tens of seconds, or minutes."""
    if seconds < 55:
        return f"about {max(10, round(seconds, -1)):.0f} s"
    minutes = round(seconds / 60)
    return f"about {minutes} minute{'s' * (minutes > 1)}"
