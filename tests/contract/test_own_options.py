"""A user's own options, each a module and a yaml, pass the contract tests without any change to the project."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

from maml.config.paths import CONF
from maml.errors import MamlError
from tests.contract import test_options as contracts
from tests.options import options, try_with

MODULE = '''
"""A domain, a model, an algorithm and a logger as a user might write them."""

import torch

from maml.algorithm.maml import MAML
from maml.domain.sinusoid import Sinusoid
from maml.logger.base import Logger
from maml.model.base import Model
from maml.types import PositiveFloat


class Shifted(Sinusoid):
    def __init__(self, shift: float, num_shots: int = 10) -> None:
        super().__init__(num_shots)
        self.shift = shift

    def data(self, tasks, role, step=0):
        examples = super().data(tasks, role, step)
        return examples._replace(y=examples.y + self.shift)


class Linear(Model):
    def __init__(self, in_shape, out_dim):
        self.shape = (out_dim, torch.Size(in_shape).numel())

    def init(self, stream):
        return {"weight": stream.normal(self.shape)}

    def __call__(self, params, x, num_reference=None):
        return torch.bmm(x.flatten(2), params["weight"].transpose(1, 2))


class Damped(MAML):
    def __init__(self, parts, damping: PositiveFloat) -> None:
        super().__init__(parts)
        self.damping = damping

    def task_losses(self, params, tasks):
        losses, metrics = super().task_losses(params, tasks)
        return losses * self.damping, metrics


class Silent(Logger):
    pass
'''

YAML = {
    "domain/shifted": "# Sinusoids moved up or down by the same amount.\n_target_: own_options.Shifted\nshift: 2.0\n",
    "model/linear": "# A linear model without a bias.\n_target_: own_options.Linear\n",
    "algorithm/damped": (
        "# MAML whose losses are scaled; the user has to say by how much.\n"
        "# Try with: domain=shifted model=linear algorithm.damping=0.5\n"
        "_target_: own_options.Damped\ndamping: ???\n"
    ),
    "logger/silent": "# A logger that says nothing.\n_target_: own_options.Silent\n",
}


@pytest.fixture
def own_conf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Returns a copy of conf/ with the user's yaml files added; the user's module can be imported."""
    conf = tmp_path / "conf"
    shutil.copytree(CONF, conf)
    for name, text in YAML.items():
        (conf / f"{name}.yaml").write_text(text)
    (tmp_path / "own_options.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "own_options", raising=False)
    return conf


def test_own_options_are_found_and_meet_the_contracts(own_conf: Path, cache_dir: Path) -> None:
    parts = sorted(name.partition("/")[0] for name in YAML)
    found = {part: set(options(part, own_conf)) - set(options(part)) for part in parts}
    assert found == {"domain": {"shifted"}, "model": {"linear"}, "algorithm": {"damped"}, "logger": {"silent"}}
    for part, (option,) in found.items():
        contracts.test_option_composes_and_passes_the_check(part, option, cache_dir, own_conf)
        contracts.test_yaml_opens_with_a_sentence(own_conf / part / f"{option}.yaml")
    for split in ("train", "val", "test"):
        contracts.test_domain_draws_tasks_as_a_pure_function_of_the_stream("shifted", split, cache_dir, own_conf)
    contracts.test_domain_says_what_a_report_needs("shifted", cache_dir, own_conf)
    contracts.test_model_draws_parameters_from_the_stream_alone("linear", cache_dir, own_conf)
    contracts.test_algorithm_learns_from_a_batch_and_adapts("damped", cache_dir, own_conf)
    contracts.test_loggers_are_loggers("silent", own_conf)


def test_own_option_that_breaks_a_contract_is_caught(own_conf: Path, cache_dir: Path) -> None:
    path = own_conf.parent / "own_options.py"
    path.write_text(path.read_text().replace("stream.normal(self.shape)", "torch.randn(self.shape)"))
    with pytest.raises(AssertionError):
        contracts.test_model_draws_parameters_from_the_stream_alone("linear", cache_dir, own_conf)


def test_option_that_cannot_do_without_a_value_says_so_in_its_yaml(own_conf: Path, cache_dir: Path) -> None:
    assert try_with("algorithm", "damped", own_conf) == ["domain=shifted", "model=linear", "algorithm.damping=0.5"]
    path = own_conf / "algorithm" / "damped.yaml"
    path.write_text("\n".join(line for line in path.read_text().splitlines() if "Try with" not in line))
    with pytest.raises(MamlError, match=r"algorithm\.damping"):
        contracts.test_option_composes_and_passes_the_check("algorithm", "damped", cache_dir, own_conf)


def test_overrides_are_read_as_a_shell_would(own_conf: Path) -> None:
    path = own_conf / "logger" / "silent.yaml"
    path.write_text('# One.\n# Try with: a.b=1 "c={d: [1.0, 2.0]}"\n_target_: x  # Try with: nothing\n')
    assert try_with("logger", "silent", own_conf) == ["a.b=1", "c={d: [1.0, 2.0]}"]
    assert try_with("logger", "local", own_conf) == []
