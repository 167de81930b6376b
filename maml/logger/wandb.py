"""Mirrors a run to Weights & Biases, online or offline."""

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Annotated, Any, Literal

from pydantic import AfterValidator

from maml.config.paths import IN_CLONE, ROOT
from maml.errors import MamlError, cause
from maml.logger.base import Mirror, curve_name
from maml.logger.wandb_service import SERVICE
from maml.types import FIRST_STEP, MeasuredBy, Text


def _project_name(name: str) -> str:
    r"""At most 128 characters, without / \ # ? % and :."""
    if len(name) > 128:
        raise ValueError(f"the name of a W&B project has at most 128 characters, this one has {len(name)}")
    if wrong := sorted({*name} & {*"/\\#?%:"}):
        raise ValueError(f"the name of a W&B project has no {' '.join(wrong)}")
    return name


def _tag(tag: str) -> str:
    """1 to 64 characters."""
    if not 1 <= len(tag) <= 64:
        raise ValueError(f"a W&B tag has 1 to 64 characters, this one has {len(tag)}")
    return tag


# One start at a time: the first run that finds the server unreachable switches the whole process to offline.
_STARTING = Lock()


class WandB(Mirror):
    """A W&B run whose id is derived from the experiment and the run id, so that a resumed run continues it.

    Its files are in ``<run_dir>/wandb``. ``wandb sync <run_dir>/wandb`` later sends the data that W&B did not receive
    during the run. It joins the parts of an interrupted run into one W&B run and sends nothing twice.

    Started by an agent of a W&B sweep, the run has the id and the project that the agent gives. Every run has the tags
    of its domain and algorithm, the job type ``train`` or ``eval``, and in its config ``settings_hash``, which is equal
    for runs that differ in the seed only. The summary has the smallest loss and the largest accuracy and return,
    of a resumed run only those since the last resume. W&B saves the commit and the uncommitted changes of the clone,
    unless WANDB_DISABLE_CODE or WANDB_DISABLE_GIT is set.

    Args:
        project: name of the W&B project.
        entity: W&B user or team; None is the account's default.
        group: W&B group of the run; None is the experiment's name.
        tags: further W&B tags of the run.
        mode: whether the run is sent online or kept offline; ``auto`` follows WANDB_MODE and ``wandb offline``, and is
            otherwise online if there are credentials. If the connection fails, the run is kept offline, with a warning.
    """

    name = "W&B"
    folder = "wandb"
    init_timeout = 15.0  # seconds to wait for the server at the start

    @property
    def finish_timeout(self) -> float:
        """Seconds to wait for the server at the end. ``patience`` also covers the start and a switch to offline."""
        return self.patience / 2

    def __init__(
        self,
        project: Annotated[Text, AfterValidator(_project_name)] = "maml",
        entity: Text | None = None,
        group: Text | None = None,
        tags: Sequence[Annotated[str, AfterValidator(_tag)]] = (),
        mode: Literal["auto", "online", "offline"] = "auto",
    ) -> None:
        self.project, self.entity, self.group, self.tags, self.mode = project, entity, group, tags, mode
        self.destination = {"project": project, "entity": entity}

    def check_seeds(self, num_seeds: int) -> None:
        """Refuses several seeds under an agent of a W&B sweep, which gives one id and waits for one result."""
        if num_seeds > 1 and _id_from_agent():
            raise MamlError(
                f"seeds={num_seeds} makes several runs, but a trial of a W&B sweep is one run; set seeds=1, and list "
                "the values of seed in the sweep's parameters"
            )

    def _start(self, run_dir: Path, experiment: str, run_id: str, config: Mapping[str, Any], resumed: bool) -> None:
        import wandb  # takes most of a second, and may be missing

        with _STARTING:
            self._run_dir, self._defined = run_dir, set[str]()
            self._run = self._init(wandb, experiment, run_id, config, resumed)
        # A resumed run logs the iterations after its checkpoint again. W&B's own step axis only accepts rising steps.
        self._run.define_metric("iteration")
        self._run.define_metric("*", step_metric="iteration")

    def _init(self, wandb: Any, experiment: str, run_id: str, config: Mapping[str, Any], resumed: bool) -> Any:
        session = wandb.setup(wandb.Settings(silent=True)).settings
        SERVICE.watch()
        login = partial(wandb.login, prompt=False, verify=False)  # looks for credentials; never asks the user
        mode: Any = self.mode
        if mode == "auto":
            mode = session.mode if session.mode != "online" or login() else "offline"
        seed = [f"seed {config['seed']}"] if config.get("seed") is not None else []
        code: dict[str, Any] = {"git_root": str(ROOT)} if IN_CLONE else {}  # the clone may not be the working directory
        if getattr(session, "save_code", None) is None:  # the user has not decided about it; without it, no changes
            code["save_code"] = True
        init = partial(
            wandb.init,
            project=self.project,
            entity=self.entity,
            group=self.group or experiment,
            name=" ".join([experiment, *seed, run_id]),
            tags=list(dict.fromkeys([*_parts(config), *self.tags])),
            job_type=config.get("mode"),
            config=dict(config),
            dir=self.files_dir.resolve(),
            id=self._id(self.files_dir, experiment, run_id, config),
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
                # The code of a replayed run was another one.
                **({"disable_git": True, "save_code": False} if self.replayed else code),
            ),
        )
        try:
            if mode == "online" and not login():
                raise RuntimeError("no credentials: run `wandb login` or set WANDB_API_KEY")
            return init(mode=mode)
        except Exception as error:
            if mode != "online":
                raise
            command = f"wandb sync {self.files_dir / self.folder}"
            self._warn(f"W&B mirrors this run offline ({cause(error)}), `{command}` sends it later")
            wandb.teardown()  # without it, the id may still be in use
            wandb.setup(wandb.Settings(silent=True, mode="offline"))  # also for the later jobs of a multirun
            SERVICE.watch()
            return init(mode="offline")

    def has_part(self, files_dir: Path, experiment: str, run_id: str, config: Mapping[str, Any]) -> bool:
        return any((files_dir / self.folder).glob(f"*run-*-{self._id(files_dir, experiment, run_id, config)}"))

    def _id(self, files_dir: Path, experiment: str, run_id: str, config: Mapping[str, Any]) -> str:
        if given := _id_from_agent():
            return given
        return re.sub(r"[^A-Za-z0-9_-]", "-", super()._id(files_dir, experiment, run_id, config))

    def _log(self, metrics: dict[str, float], iteration: int) -> None:
        for metric in metrics.keys() - self._defined:
            if best := _best(metric):
                self._run.define_metric(metric, step_metric="iteration", summary=f"{best},last")
        self._defined |= metrics.keys()
        self._run.log({**metrics, "iteration": iteration})

    def _report(self, report: dict[str, Any], pictures: dict[str, Path]) -> None:
        import wandb

        self._run.summary["headline"] = report["headline"]
        for curve in report["curves"]:
            key = curve_name(curve)
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
        measured_by = report.get("measured_by", "gradient step")
        lines = {f"adaptation/{curve_name(curve)}": _line(wandb, curve, measured_by) for curve in report["curves"]}
        self._run.log({"evaluation": table, **lines, **images, "iteration": report["iteration"]})
        if report["headline"] is None:
            self._alert("Adaptation diverged", f"{self._run.name}: the headline metric of meta-test is not finite.")
        checkpoint = self._run_dir / "checkpoint.pt"
        if checkpoint.exists():
            artifact = wandb.Artifact(self._run.id, type="checkpoint", metadata={"iteration": report["iteration"]})
            artifact.add_file(str(checkpoint))
            self._run.log_artifact(artifact)

    def _alert(self, title: str, text: str) -> None:
        self._run.alert(title, text, level="ERROR")

    def _warn(self, what: str) -> None:
        SERVICE.is_troubled = True
        super()._warn(what)

    def _abandon(self) -> None:
        super()._abandon()
        SERVICE.is_troubled = True
        SERVICE.end(0)

    def _finish(self, status: str) -> None:
        self._run.summary["status"] = status
        try:
            self._run.finish(exit_code=0 if status == "finished" else 1)
        except TimeoutError:
            command = f"wandb sync --include-online {self._run.sync_dir}"
            self._warn(
                f"W&B did not receive all of this run in {self.finish_timeout:.0f} seconds, `{command}` sends the rest"
            )


def _id_from_agent() -> str | None:
    """Returns the id that an agent of a W&B sweep gives, which waits for the result of the run with this id."""
    return os.environ.get("WANDB_RUN_ID") if os.environ.get("WANDB_SWEEP_ID") else None


def _parts(config: Mapping[str, Any]) -> list[str]:
    """Returns the names of the run's domain and algorithm."""
    classes = {part: config.get(part, {}).get("_target_", "").rpartition(".")[2] for part in ("domain", "algorithm")}
    return [name for name in (classes["domain"], config.get("algorithm_name") or classes["algorithm"]) if name]


def _best(metric: str) -> Literal["min", "max"] | None:
    """Returns which of a training metric's values is the best one; None if neither end of its range is."""
    if "loss" in metric:
        return "min"
    return "max" if "accuracy" in metric or "return" in metric else None


def _line(wandb: Any, curve: Mapping[str, Any], measured_by: MeasuredBy) -> Any:
    """Draws a curve of a report over gradient steps or showings. Steps at which adaptation diverged are left out."""
    first = FIRST_STEP[measured_by]
    rows = [[first + step["step"], step["mean"]] for step in curve["steps"] if step["mean"] is not None]
    table = wandb.Table(columns=[measured_by, curve["metric"]], data=rows)
    title = f"{curve['metric'].replace('_', ' ')}, K={curve['num_shots']}"
    return wandb.plot.line(table, x=measured_by, y=curve["metric"], title=title)
