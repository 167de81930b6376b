"""One seed of a run: what learns, the folder that records it, and the logger that mirrors it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from maml.algorithm.base import Algorithm
from maml.config.schema import Settings, build
from maml.errors import Disconnected
from maml.hardware import distributed
from maml.hardware.base import Hardware
from maml.logger.base import Logger
from maml.record.run_folder import Follower, RunFolder, command_line
from maml.seeding import Stream


class Learner:
    """The one owner of a seed. Nothing is written before `open`.

    Args:
        settings: of this seed alone.
        experiment: its name.
        algorithm: built from the settings; its state is changed in place.

    Attributes:
        folder: of the run.
        stream: of the seed; draws the meta-batches.
        logger: a mirror of the metrics.
        start: the iterations that the state has behind it.
        report: of the run's own evaluation, once there is one.
    """

    def __init__(self, settings: Settings, experiment: str, algorithm: Algorithm) -> None:
        self.settings, self.algorithm = settings, algorithm
        on_rank_zero = distributed.rank() == 0
        self.folder = RunFolder(settings, experiment) if on_rank_zero else Follower(settings, experiment)
        self.logger: Logger = build(settings.logger) if on_rank_zero else Logger()
        self.stream = Stream(settings.seed, algorithm.stream.device)
        self.start = 0
        self.report: dict[str, Any] | None = None

    @property
    def title(self) -> str:
        """What the console calls the run."""
        return f"{self.folder.experiment} {self.folder.run_id[:6]}, {self.algorithm.name}"

    def restore(self, saved: dict[str, Any]) -> None:
        """Takes over the state of a checkpoint of this run."""
        self.algorithm.load_state_dict(saved["state"])
        self.start = saved["iteration"]

    @contextmanager
    def open(self, hardware: Hardware, num_seeds: int) -> Iterator[dict[str, Any] | None]:
        """Holds folder and logger; yields the checkpoint to resume from, if there is one, and records the end.

        Args:
            hardware: on which the run trains.
            num_seeds: number of seeds that are trained with this one, which share the time.
        """
        described, command = hardware.describe(), command_line()
        if num_seeds > 1:
            described["seeds"] = num_seeds
        saved = distributed.on_rank_zero(lambda: self.folder.open(described, command, self.algorithm.name))
        status = "failed"
        try:
            folder, settings = self.folder, self.settings.as_dict()
            self.logger.start(folder.path, folder.experiment, folder.run_id, settings, saved is not None)
            yield saved
        except (KeyboardInterrupt, SystemExit, Disconnected):  # a launcher that requeues raises SystemExit
            status = "interrupted"
            raise
        finally:
            status = "finished" if self.report is not None else status
            self.folder.close(status)  # first: a mirror may take its time
            self.logger.finish(status)
