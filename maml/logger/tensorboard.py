"""Mirrors a run to TensorBoard."""

import json
from collections.abc import Mapping
from pathlib import Path
from textwrap import indent
from typing import Any

from maml.logger.base import Mirror, curve_name
from maml.types import FIRST_STEP


class TensorBoard(Mirror):
    """Event files in ``<run_dir>/tensorboard``; ``tensorboard --logdir runs`` shows every run."""

    name = "TensorBoard"
    folder = "tensorboard"

    def _start(self, run_dir: Path, experiment: str, run_id: str, config: Mapping[str, Any], resumed: bool) -> None:
        from torch.utils.tensorboard import SummaryWriter  # slow to import, and may be missing

        # Without a checkpoint, or if the run is replayed, the part before is not a resumed one.
        self._follows_earlier_part = any((self.files_dir / self.folder).glob("events.out.*"))
        self._writer = SummaryWriter(self.files_dir / self.folder)
        self._writer.add_text("config", indent(json.dumps(config, indent=2), " " * 4))

    def _log(self, metrics: dict[str, float], iteration: int) -> None:
        if self._follows_earlier_part:
            self._replace_from(iteration)
        for key, value in metrics.items():
            self._writer.add_scalar(key, value, iteration)

    def _replace_from(self, iteration: int) -> None:
        """Tells TensorBoard that what an earlier part of the run has logged from this iteration on is replaced."""
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog

        writer = self._writer.file_writer
        assert writer is not None  # it is, until it is closed
        writer.add_event(Event(session_log=SessionLog(status=SessionLog.START)), iteration)
        self._follows_earlier_part = False

    def _report(self, report: dict[str, Any], pictures: dict[str, Path]) -> None:
        import numpy as np
        from PIL import Image

        if report["headline"] is not None:  # None: adaptation diverged
            self._writer.add_scalar("headline", report["headline"], report["iteration"])
        for curve in report["curves"]:
            tag = f"evaluation/{curve_name(curve)}"
            first = FIRST_STEP[report.get("measured_by", "gradient step")]
            for step in curve["steps"]:  # gradient steps or showings on the horizontal axis
                if step["mean"] is not None:
                    self._writer.add_scalar(tag, step["mean"], first + step["step"])
        for name, path in pictures.items():
            image = np.asarray(Image.open(path).convert("RGB"))
            self._writer.add_image(f"pictures/{name}", image, report["iteration"], dataformats="HWC")

    def _finish(self, status: str) -> None:
        self._writer.add_text("status", status)
        self._writer.close()
