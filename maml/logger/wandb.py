"""Mirrors a run to Weights & Biases, online or offline."""

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

from maml.logger.base import Mirror, cause


class WandB(Mirror):
    """A W&B run whose id is derived from the experiment and the run id, so that a resumed run continues it.

    Its files are in ``<run_dir>/wandb``. ``wandb sync <run_dir>/wandb`` later sends the data that W&B did not receive
    during the run. It joins the parts of an interrupted run into one W&B run and sends nothing twice.

    Args:
        project: name of the W&B project.
        entity: W&B user or team; None is the account's default.
        group: W&B group of the run; None is the experiment's name.
        tags: W&B tags of the run.
        mode: whether the run is sent online or kept offline; ``auto`` follows WANDB_MODE and ``wandb offline``, and is
            otherwise online if there are credentials. If the connection fails, the run is kept offline, with a warning.
    """

    name = "W&B"
    # Seconds to wait for the server. ``patience`` is longer than their sum plus the time of a switch to offline.
    init_timeout = 15.0
    finish_timeout = 30.0

    def __init__(
        self,
        project: str = "maml",
        entity: str | None = None,
        group: str | None = None,
        tags: Sequence[str] = (),
        mode: Literal["auto", "online", "offline"] = "auto",
    ) -> None:
        self.project, self.entity, self.group, self.tags, self.mode = project, entity, group, tags, mode

    def _start(self, run_dir: Path, experiment: str, run_id: str, config: Mapping[str, Any], resumed: bool) -> None:
        import wandb  # takes most of a second, and may be missing

        self._run_dir = run_dir
        session = wandb.setup(wandb.Settings(silent=True)).settings
        login = partial(wandb.login, prompt=False, verify=False)  # looks for credentials; never asks the user
        mode: Any = self.mode
        if mode == "auto":
            mode = session.mode if session.mode != "online" or login() else "offline"
        init = partial(
            wandb.init,
            project=self.project,
            entity=self.entity,
            group=self.group or experiment,
            name=f"{experiment} {run_id}",
            tags=self.tags,
            config=dict(config),
            dir=run_dir.resolve(),
            id=re.sub(r"[^A-Za-z0-9_-]", "-", f"{experiment}-{run_id}"),
            # "allow" continues the W&B run of this id. None starts it again, for a run folder that starts again.
            resume="allow" if resumed else None,
            reinit="create_new",  # a separate run for each job of a multirun in this process
            settings=wandb.Settings(
                console="off",
                silent=True,
                init_timeout=self.init_timeout,
                finish_timeout=self.finish_timeout,
                finish_timeout_raises=True,
                allow_offline_artifacts=False,  # so that an offline table is sent even if the run folder has moved
            ),
        )
        try:
            if mode == "online" and not login():
                raise RuntimeError("no credentials: run `wandb login` or set WANDB_API_KEY")
            self._run = init(mode=mode)
        except Exception as error:
            if mode != "online":
                raise
            self._warn(
                f"W&B mirrors this run offline ({cause(error)}), `wandb sync {run_dir / 'wandb'}` sends it later"
            )
            wandb.teardown()  # without it, the id may still be in use
            wandb.setup(wandb.Settings(silent=True, mode="offline"))  # also for the later jobs of a multirun
            self._run = init(mode="offline")
        # A resumed run logs the iterations after its checkpoint again. W&B's own step axis only accepts rising steps.
        self._run.define_metric("iteration")
        self._run.define_metric("*", step_metric="iteration")

    def _log(self, metrics: dict[str, float], iteration: int) -> None:
        self._run.log({**metrics, "iteration": iteration})

    def _report(self, report: dict[str, Any], pictures: dict[str, Path]) -> None:
        import wandb

        self._run.summary["headline"] = report["headline"]
        for curve in report["curves"]:
            key = f"{curve['metric']}_{curve['num_shots']}shot"
            self._run.summary[key], self._run.summary[f"{key}_ci95"] = (curve["steps"][-1][c] for c in ("mean", "ci95"))
        for cell, judged in report.get("cells", {}).items():
            self._run.summary[f"cells/{cell}"] = judged
        columns = ["step", "mean", "ci95", "num_tasks"]
        rows: list[Iterable[Any]] = [
            [curve["metric"], curve["num_shots"], *(step[column] for column in columns)]
            for curve in report["curves"]
            for step in curve["steps"]
        ]
        table = wandb.Table(columns=["metric", "num_shots", *columns], data=rows)
        images = {f"pictures/{name}": wandb.Image(str(path)) for name, path in pictures.items()}
        self._run.log({"evaluation": table, **images, "iteration": report["iteration"]})
        checkpoint = self._run_dir / "checkpoint.pt"
        if checkpoint.exists():
            artifact = wandb.Artifact(self._run.id, type="checkpoint", metadata={"iteration": report["iteration"]})
            artifact.add_file(str(checkpoint))
            self._run.log_artifact(artifact)

    def _finish(self, status: str) -> None:
        self._run.summary["status"] = status
        try:
            self._run.finish(exit_code=0 if status == "finished" else 1)
        except TimeoutError:
            command = f"wandb sync --include-online {self._run.sync_dir}"
            self._warn(
                f"W&B did not receive all of this run in {self.finish_timeout:.0f} seconds, `{command}` sends the rest"
            )
