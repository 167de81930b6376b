"""Mirrors a run to Weights & Biases, online or offline."""

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

from maml.logger.base import Mirror, cause


class WandB(Mirror):
    """A W&B run whose id follows from the experiment and the run id, so that a resumed run continues it.

    Its files lie in ``<run_dir>/wandb``. What W&B did not get while the run lasted, ``wandb sync <run_dir>/wandb``
    sends; there the parts of an interrupted run become one W&B run, and what was sent is not sent twice.

    Args:
        project: the W&B project.
        entity: the W&B user or team; None is the account's default.
        group: None groups the runs of an experiment.
        tags: labels of the run.
        mode: "auto" obeys WANDB_MODE and ``wandb offline``, and else is online where there are credentials. A run
            that cannot be online after all is mirrored offline, with a warning.
    """

    name = "W&B"
    # Seconds to wait for the server; ``patience`` covers both, and turning to offline in between.
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
            # Without "allow" the W&B run of this id starts anew, as the local record did.
            resume="allow" if resumed else None,
            reinit="create_new",  # shares no state with the other runs of a multirun
            settings=wandb.Settings(
                console="off",
                silent=True,
                init_timeout=self.init_timeout,
                finish_timeout=self.finish_timeout,
                finish_timeout_raises=True,
                allow_offline_artifacts=False,  # an offline table is then sent from the run folder, wherever that is
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
            wandb.teardown()  # or the id may still be in use
            wandb.setup(wandb.Settings(silent=True, mode="offline"))  # also for what follows in a multirun
            self._run = init(mode="offline")
        # A resumed run logs the iterations since its checkpoint again, which W&B refuses on its own rising step axis.
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
            self._warn(f"W&B did not take all of this run in {self.finish_timeout:.0f} seconds, `{command}` sends it")
