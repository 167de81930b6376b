"""One seed of a run: its algorithm, its run folder and its logger."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from maml.algorithm.base import Algorithm
from maml.config.schema import Settings, build
from maml.errors import Disconnected
from maml.hardware import distributed
from maml.hardware.base import Hardware
from maml.logger.base import Logger
from maml.logger.mirror import described, replay
from maml.record.gallery import report_pictures
from maml.record.provenance import command_line
from maml.record.run_files import read_metrics
from maml.record.run_folder import NonWritingRunFolder, RunFolder
from maml.seeding import Stream


class Learner:
    """Owns all that belongs to one seed. Nothing is written before `open`.

    Args:
        settings: the settings of this seed.
        experiment: the experiment's name.
        algorithm: the algorithm built from these settings; its state is changed in place.

    Attributes:
        folder: the run folder. Only rank 0 writes to it.
        stream: the seed's random stream, which draws the meta-batches.
        logger: sends metrics to the logging service; on rank 0 only.
        start: number of iterations that the algorithm's state has been trained for.
        report: the report of the run's own evaluation; None before that.
    """

    def __init__(self, settings: Settings, experiment: str, algorithm: Algorithm) -> None:
        self.settings, self.algorithm = settings, algorithm
        on_rank_zero = distributed.rank() == 0
        folder = RunFolder if on_rank_zero else NonWritingRunFolder
        self.folder = folder(settings, experiment, algorithm.domain.data_digest)
        self.logger: Logger = build(settings.logger) if on_rank_zero else Logger()
        self.stream = Stream(settings.seed, algorithm.stream.device)
        self.start = 0
        self.report: dict[str, Any] | None = None

    @property
    def title(self) -> str:
        """The run's title on the console."""
        return f"{self.folder.experiment} {self.folder.run_id[:6]}, {self.algorithm.name}"

    def restore(self, saved: dict[str, Any]) -> None:
        """Restores the algorithm's state from a checkpoint of this run."""
        self.algorithm.load_state_dict(saved["state"])
        self.start = saved["iteration"]

    def finish(self, report: dict[str, Any], plot: Path) -> None:
        """Takes the report of the run's own evaluation, and sends it to the logger with its plot."""
        self.folder.stop_clock()
        if self.folder.is_trained:  # a report in `evaluations/` is logged as a separate run, as in `mirror`
            is_own = plot.parent == self.folder.path
            self._start_logger(plot.parent, resumed=is_own, mode=self.settings.mode if is_own else "eval")
        self.logger.report(report, report_pictures(plot.parent))
        self.report = report

    def _start_logger(self, run_dir: Path, resumed: bool, mode: str | None = None) -> None:
        """Starts the logger; if it has no earlier part of a resumed run, it gets the metrics of that part first."""
        folder, settings = self.folder, self.settings.as_dict() | {"mode": mode or self.settings.mode}
        config = described(settings, folder.training_config, self.algorithm.name)
        earlier: list[dict[str, Any]] = []
        if resumed and not self.logger.has_part(run_dir, folder.experiment, folder.run_id, config):
            resumed, earlier = False, read_metrics(folder.path / "metrics.jsonl")
        self.logger.start(run_dir, folder.experiment, folder.run_id, config, resumed)
        for line in earlier:
            self.logger.log({key: value for key, value in line.items() if key != "iteration"}, line["iteration"])

    def send_evaluation(self, report: dict[str, Any], plot: Path) -> None:
        """Sends an evaluation of a saved state to the logger, as a run of its own with its files beside the plot."""
        self._start_logger(plot.parent, resumed=False)
        self.logger.report(report, report_pictures(plot.parent))
        self.logger.finish("finished")

    def send_finished(self, report: dict[str, Any], cells: Callable[[], Mapping[str, str]]) -> None:
        """Sends a run that was finished before to the logger, unless the logger has it already.

        Args:
            report: the content of its ``report.json``, or of that of another evaluation of the run.
            cells: returns verdicts by cell.
        """
        config = self.settings.as_dict() | {"algorithm_name": self.algorithm.name}
        replay(self.folder.path, self.logger, config, report, cells)

    @contextmanager
    def open(self, hardware: Hardware, num_seeds: int) -> Iterator[dict[str, Any] | None]:
        """Opens the run folder and the logger; at the end, records how the run ended and closes both.

        Args:
            hardware: the hardware that the run trains on.
            num_seeds: number of seeds that are trained at once, this one included; they share the training time.

        Yields:
            The checkpoint to resume from; None if there is none.
        """
        machine, command = hardware.describe(), command_line()
        if num_seeds > 1:
            machine["seeds"] = num_seeds
        saved = distributed.on_rank_zero(lambda: self.folder.open(machine, command, self.algorithm.name))
        status = "failed"
        try:
            if not self.folder.is_trained:
                self._start_logger(self.folder.path, resumed=saved is not None)
            yield saved
        except (KeyboardInterrupt, SystemExit, Disconnected):  # a launcher that requeues raises SystemExit
            status = "interrupted"
            raise
        finally:
            if self.report is None:
                self.folder.close(status)  # before the logger, which may wait for a network
                self.logger.finish(status)
            else:
                self._commit()

    def _commit(self) -> None:
        """Records that the run is finished, after the logger has it all: nothing is left to do then."""
        status = "interrupted"
        try:
            self.logger.finish("finished")
            status = "finished"
        finally:
            self.folder.close(status)
