"""The schema: every wrong key is named before anything is written; a user's class needs no annotations."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Sequence
from pathlib import Path, PurePath
from typing import Annotated, Any, Literal

import pytest
import torch
from torch import nn

from maml.config.identity import training_config
from maml.config.schema import Settings, build, check
from maml.domain.sinusoid import Sinusoid
from maml.errors import MamlError
from maml.experiment import run_experiment
from tests.runs import ROOT, TinyRuns

CONF = ROOT / "conf"
EXPERIMENTS = sorted(path.stem for path in (CONF / "experiment").glob("*.yaml"))
Config = dict[str, Any]


def changed(config: Config | Settings, key: str, value: Any) -> Config:
    """Returns a copy with another value at a dotted key, or without the key if the value is ``...``."""
    config = copy.deepcopy(config.as_dict() if isinstance(config, Settings) else config)
    *parents, last = key.split(".")
    node = config
    for parent in parents:
        node = node[parent]
    if value is ...:
        del node[last]
    else:
        node[last] = value
    return config


def refusal(config: Config | Settings) -> str:
    """Returns the message with which a config is refused, and checks that nothing was written."""
    with pytest.raises(MamlError) as caught:
        settings = config if isinstance(config, Settings) else check(config)
        run_experiment(settings, "custom")
    assert not Path(config.runs_dir if isinstance(config, Settings) else config["runs_dir"]).exists()
    return str(caught.value)


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("inner.step_size", "abc", "inner.step_size='abc': input should be a valid number"),
        ("inner.step_size", True, "inner.step_size=True: input should be a valid number"),
        ("inner.step_size", None, "inner.step_size=None: input should be a valid number"),
        ("inner.step_size", -1, "inner.step_size=-1: input should be greater than 0"),
        ("inner.step_size", 0, "inner.step_size=0: input should be greater than 0"),
        ("inner.step_size", float("nan"), "inner.step_size=nan: input should be a finite number"),
        ("inner.step_size", float("inf"), "inner.step_size=inf: input should be a finite number"),
        ("inner.num_steps", 0.5, "inner.num_steps=0.5: input should be a valid integer"),
        ("inner.num_steps", True, "inner.num_steps=True: input should be a valid integer"),
        ("inner.num_steps", "3", "inner.num_steps='3': input should be a valid integer"),
        ("inner.num_steps", -1, "inner.num_steps=-1: input should be greater than or equal to 0"),
        ("inner.order", 3, "inner.order=3: input should be 1 or 2"),
        ("inner.adapt", "*", "inner.adapt='*': input should be a list, such as [a, b]"),
        ("inner.adapt", ["linear9.*"], "'linear9.*' matches no parameter; there are linear1.weight, linear1.bias, "),
        ("inner.adapt", [], "inner.adapt=[] leaves no parameter to adapt; there are linear1.weight"),
        ("inner.adapt", ["*", "!linear*", "!head.*"], "leaves no parameter to adapt; there are linear1.weight"),
        ("outer.betas", [0.9], "outer.betas=[0.9]: field required"),
        ("outer.betas", [0.9, 1.0], "outer.betas=[0.9, 1.0]: input should be less than 1"),
        ("outer.clip", 0, "outer.clip=0: input should be greater than 0"),
        ("domain.num_shots", 0, "domain.num_shots=0: input should be greater than or equal to 1"),
        ("model.hidden_sizes", 40, "model.hidden_sizes=40: input should be a list, such as [a, b]"),
        ("model.hidden_sizes", [40, 0], "model.hidden_sizes=[40, 0]: input should be greater than or equal to 1"),
        ("model.activation", "rellu", "model.activation='rellu': input should be 'relu', 'softplus' or 'tanh'"),
        ("hardware.task_chunk", 0, "hardware.task_chunk=0: input should be greater than or equal to 1; or input"),
        ("hardware.task_chunk", "some", "input should be 'auto' or 'all'"),
        ("hardware.device", "gpu", "hardware.device='gpu': input should be 'auto', 'cpu' or 'cuda'"),
        ("evaluation.num_tasks", 1, "evaluation.num_tasks=1: input should be greater than or equal to 2"),
        ("evaluation.num_shots", [], "evaluation.num_shots=[]: list should have at least 1 item"),
        ("evaluation.num_shots", [5, 5], "evaluation.num_shots=[5, 5] names a K twice"),
        ("evaluation.step_size", [0.1], "evaluation.step_size lists 1 sizes for evaluation.num_steps=2; give one per"),
        ("evaluation.step_size", [0.1, -0.1], "evaluation.step_size=[0.1, -0.1]: "),
        ("evaluation.split", "tst", "evaluation.split='tst': input should be 'test' or 'val'"),
        ("seed", -1, "seed=-1: input should be greater than or equal to 0"),
        ("seed", 1.0, "seed=1.0: input should be a valid integer"),
        ("seed", 2**64, "seed=18446744073709551616: an integer is below 2^63"),
        ("evaluation.bank_seed", 2**63, "evaluation.bank_seed=9223372036854775808: an integer is below 2^63"),
        ("seeds", True, "seeds=True: input should be a valid integer"),
        ("inner.second_order_from", 1, "inner.second_order_from=1: input should be greater than or equal to 2"),
        ("inner.order", True, "inner.order=True: input should be a number, not true or false"),
        ("model.hidden_sizes", [2**63], "model.hidden_sizes=[9223372036854775808]: an integer is below 2^63"),
        ("run_dir", "", "run_dir='': a path cannot be empty; the current folder is '.'"),
        ("inner.step_size", 1e300, "inner.step_size=1e+300: a number is at most 3.4e+38, the largest of float32"),
        ("inner.step_size", 1e-50, "inner.step_size=1e-50: a number is 0 or at least 1.2e-38, the smallest of float32"),
        ("data_dir", " ", "data_dir=' ': a path cannot be empty"),
        ("run_dir", "a\0b", "run_dir='a\\x00b': a path cannot have a zero byte"),
        ("checkpoint", "a/" * 2000, "it has 4000 bytes; a path has at most 3900 here"),
        ("cache_dir", "a" * 300, "a name in it has 300 bytes, but file systems take 255; shorten it"),
        ("hardware.num_threads", 10**9, "hardware.num_threads=1000000000: input should be less than or equal to 1024"),
        ("mode", "test", "mode='test': input should be 'train' or 'eval'"),
        ("num_iterations", -5, "num_iterations=-5: input should be greater than or equal to 0"),
        ("checkpoint_every", 0, "checkpoint_every=0: input should be greater than or equal to 1"),
        ("data_dir", None, "data_dir=None: input should be a valid string"),
        ("domain.nmu_shots", 3, "domain.nmu_shots is not a key: did you mean domain.num_shots? allowed: num_shots, "),
        ("inner.zzz", 3, "inner.zzz is not a key; allowed: step_size, num_steps, order, adapt"),
        ("num_iteration", 3, "num_iteration is not a key: did you mean num_iterations?"),
        ("modell", {}, "modell is not a key: did you mean model?"),
        ("zzz", 3, "zzz is not a key; allowed: seed, seeds, num_iterations, meta_batch_size, "),
        ("inner.order", ..., "inner.order is missing"),
        ("seeds", [0, 1], "seeds=[0, 1]: input should be a valid integer"),
        ("sede", 1, "sede is not a key: did you mean seed?"),
        ("num_iterations", ..., "num_iterations is missing"),
        ("outer", ..., "outer is missing"),
        ("outer", None, "outer has no _target_; choose one of the files in conf/outer/"),
        ("model._target_", ..., "model has no _target_; choose one of the files in conf/model/"),
        ("model._target_", "maml.model.mlp.MPL", "model._target_=maml.model.mlp.MPL: no such class"),
        ("model._target_", "maml.modle.mlp.MLP", "model._target_=maml.modle.mlp.MLP: no such class"),
        ("model._target_", 3, "model._target_=3: no such class"),
        ("model._target_", "torch.nn.Linear", "torch.nn.Linear: the class has to inherit from maml.model.base.Model"),
        ("evaluation._target_", "pandas.read_pickle", "no such class (it is a function, not a class)"),
        ("evaluation._target_", "maml.record.checkpoint.save", "no such class (it is a function, not a class)"),
        ("evaluation._target_", "subprocess.Popen", "the class has to inherit from maml.evaluation.Evaluation"),
        ("hardware._target_", "builtins.dict", "the class has to inherit from maml.hardware.base.Hardware"),
        ("logger._target_", "logging.Logger", "the class has to inherit from maml.logger.base.Logger"),
        ("inner._target_", "maml.outer.sgd.SGD", "the class has to inherit from maml.inner.base.Inner"),
        ("outer._target_", "maml.inner.sgd.SGD", "the class has to inherit from maml.outer.base.Outer"),
        ("algorithm._target_", "maml.model.mlp.MLP", "the class has to inherit from maml.algorithm.base.Algorithm"),
        (
            "domain._target_",
            "maml.domain.base.Domain",
            "the class lacks data, draw_tasks, inner_loss, measure, outer_loss",
        ),
        (
            "evaluation.search",
            {"_target_": "maml.evaluation.Evaluation"},
            "inherit from maml.evaluation.StepSizeSearch",
        ),
        ("evaluation.search", {"_target_": "maml.evaluation.StepSizeSearch"}, "search.step_sizes is missing"),
        ("evaluation.search", {"a": 1}, "a mapping with a _target_ that is maml.evaluation.StepSizeSearch or inherits"),
        ("inner.step_size", {"_target_": "pathlib.Path"}, "inner.step_size is a plain value, not a part"),
        ("seed", {"_target_": "pathlib.Path"}, "seed is a plain value, not a part; remove its _target_"),
        ("model.hidden_sizes", [{"_target_": "pathlib.Path"}], "model.hidden_sizes.0 is a plain value, not a part"),
        ("model._partial_", True, "model._partial_=True has to be left out, because it takes no callable"),
        ("model._args_", [1], "model._args_ is not a key"),
    ],
)
def test_wrong_value_is_refused_by_name(tiny: TinyRuns, key: str, value: Any, reason: str) -> None:
    assert reason in refusal(changed(tiny.config(), key, value))


def test_empty_folder_of_runs_is_refused(tiny: TinyRuns) -> None:
    with pytest.raises(MamlError, match="runs_dir='': a path cannot be empty"):
        check(changed(tiny.config(), "runs_dir", ""))


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("domain.num_shots", 11, "num_shots=11 plus num_query=11 is 22, but there are 20 images of each class"),
        ("domain.num_query", 20, "num_shots=1 plus num_query=20 is 21, but there are 20 images of each class"),
        ("evaluation.num_shots", [1, 15], "evaluation at K=15, num_query=15: num_shots=15 plus num_query=15 is 30"),
        ("evaluation.num_query", 25, "evaluation at K=1, num_query=25: num_shots=1 plus num_query=25 is 26"),
        ("domain.num_ways", 1, "domain.num_ways=1: input should be greater than or equal to 2"),
        ("domain.cache_dir", "", "domain.cache_dir='': a path cannot be empty"),
        (
            "domain.num_ways",
            500,
            "num_ways=500, but the test split has 423 classes; lower evaluation.num_ways if it is set",
        ),
        ("domain.num_ways", 1200, "num_ways=1200, but the train split has 1100 classes; lower domain.num_ways"),
        ("evaluation.num_ways", 1, "evaluation.num_ways=1: input should be greater than or equal to 2"),
        ("evaluation.num_ways", 6, "evaluation.num_ways=6, but the network has an output for each of the 5 classes"),
        ("model.head_std", -1.0, "model.head_std=-1.0: input should be greater than 0"),
        ("model.pooling", "avg", "model.pooling='avg': input should be 'stride', 'max', 'max_keep_odd' or 'mean'"),
    ],
)
def test_wrong_value_for_images_is_refused_by_name(tiny_images: TinyRuns, key: str, value: Any, reason: str) -> None:
    assert reason in refusal(changed(tiny_images.config(), key, value))


@pytest.mark.parametrize(
    ("target", "hint"),
    [
        ("mine.nets.Net", "; put the folder that holds mine/ on PYTHONPATH, or start `maml train` there"),
        ("mine.Net", "; put the folder that holds mine.py on PYTHONPATH, or start `maml train` there"),
        ("found_net.nets.Net", ""),
        ("found_net.Net", ""),
    ],
)
def test_own_class_that_is_not_found_says_where_python_looks(
    tiny: TinyRuns, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str, hint: str
) -> None:
    (tmp_path / "found_net.py").write_text("import not_installed\n")
    monkeypatch.syspath_prepend(tmp_path)
    message = refusal(changed(tiny.config(), "model._target_", target))
    assert "no such class (No module named " in message
    assert message.partition("no such class (")[2].partition(")")[2] == hint


def test_all_mistakes_are_named_at_once(tiny: TinyRuns) -> None:
    config = changed(changed(changed(tiny.config(), "inner.step_size", -1), "zzz", 1), "model.hidden_sizes", "x")
    message = refusal(config)
    for part in ("inner.step_size=-1", "zzz is not a key", "model.hidden_sizes='x'"):
        assert part in message


def test_image_network_on_vectors_is_refused(tiny: TinyRuns) -> None:
    config = changed(tiny.config(), "model", tiny.on_domain("omniglot").config().model)
    assert "model=conv4 takes images (height, width, channels)" in refusal(config)


def test_absent_gpu_is_said(tiny: TinyRuns, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    message = refusal(changed(tiny.config(), "hardware.device", "cuda"))
    assert "sees no CUDA device: use hardware=cpu (or auto)" in message


def test_missing_data_says_what_goes_where(tiny: TinyRuns, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchvision.datasets", None)
    config = tiny.on_domain("omniglot").config(f"data_dir={tmp_path / 'none'}", f"cache_dir={tmp_path / 'empty'}")
    assert f"{tmp_path / 'none'}/omniglot/images_background.zip" in refusal(config)


@pytest.mark.parametrize("override", ["+zzz=1", "+inner.zzz=1", "+evaluation.zzz={a: 1}", "+hardware.gpu=1"])
def test_added_key_that_nobody_reads_is_refused(tiny: TinyRuns, override: str) -> None:
    name = override.removeprefix("+").partition("=")[0]
    with pytest.raises(MamlError, match=rf"{name} is not a key"):
        tiny.config(override)


class Inheriting(Sinusoid):
    """A user's domain that does not define a constructor."""


class Flexible(Sinusoid):
    def __init__(self, **settings: int) -> None:
        super().__init__(settings["shots"])


class Oddly(Sinusoid):
    """Annotations that pydantic cannot check, or that exist for a type checker only."""

    def __init__(self, num_shots: int, layers: list[nn.Module], other: NotImported = None) -> None:  # type: ignore[name-defined]  # noqa: F821
        super().__init__(num_shots)


class Listed(Sinusoid):
    def __init__(self, num_shots: int, layers: list[nn.Module]) -> None:
        super().__init__(num_shots)


def test_inherited_constructor_is_a_schema_too(tiny: TinyRuns) -> None:
    config = changed(tiny.config(), "domain._target_", "tests.config.test_schema.Inheriting")
    check(config)
    assert "domain.num_shots=-1: input" in refusal(changed(config, "domain.num_shots", -1))


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("Flexible", {"shots": 3}),
        ("Oddly", {"num_shots": 3, "layers": [{"_target_": "torch.nn.ReLU"}], "other": 1}),
        ("Listed", {"num_shots": 3, "layers": [{"_target_": "torch.nn.ReLU"}]}),
    ],
)
def test_class_of_a_user_needs_no_special_annotations(tiny: TinyRuns, name: str, settings: Config) -> None:
    part = {"_target_": f"tests.config.test_schema.{name}"} | settings
    checked = check(changed(tiny.config(), "domain", part))
    assert {f"domain.{key}" for key in settings} <= training_config(checked).keys()
    assert build(part).num_shots == 3


def test_lists_reach_constructors_as_lists(tiny: TinyRuns) -> None:
    config = tiny.config("model.hidden_sizes=[7,3]", "evaluation.num_shots=[2]")
    model = build(config.model, in_shape=(1,), out_dim=1)
    assert model.sizes == [1, 7, 3, 1]
    assert type(build(config.evaluation).num_shots) is list


class Holder(Sinusoid):
    """Takes parts in every way in which an annotation can ask for them."""

    def __init__(  # type: ignore[no-untyped-def]
        self,
        one: nn.Module | None = None,
        several: Sequence[nn.Module] = (),
        named: dict[str, nn.Module] | None = None,
        maker: Callable[[], nn.Module] | None = None,
        kind: type[nn.Module] = nn.ReLU,
        anything: Any = None,
        rows: list | None = None,
        bare=None,
        number: Annotated[int, "a count"] | Literal["all"] = 1,
    ) -> None:
        super().__init__()
        self.parts = (one, several, named, maker, kind, anything, rows, bare)


LAYER, MAKER, PATH = {"_target_": "torch.nn.ReLU"}, {"_target_": "torch.nn.ReLU", "_partial_": True}, "pathlib.PurePath"


def test_part_in_an_argument_has_the_class_of_its_annotation(tiny: TinyRuns) -> None:
    part = {"_target_": "tests.config.test_schema.Holder"}
    good = {
        "one": LAYER,
        "several": [LAYER, LAYER],
        "named": {"a": LAYER},
        "maker": MAKER,
        "kind": MAKER,
        "anything": [{"_target_": PATH}],
        "rows": [{"_target_": PATH}],
        "bare": {"_target_": PATH},
    }
    check(changed(tiny.config(), "domain", part | good))
    one, several, named, maker, kind, anything, rows, bare = build(part | good).parts
    assert [type(layer) for layer in (one, *several, named["a"], maker(), kind())] == [nn.ReLU] * 6
    assert anything == rows == [bare] == [PurePath()]
    for key in ("one", "several", "named"):
        wrong = {"several": [{"_target_": PATH}], "named": {"a": {"_target_": PATH}}}.get(key, {"_target_": PATH})
        message = refusal(changed(tiny.config(), "domain", part | {key: wrong}))
        assert f"domain.{key}" in message
        assert f"{PATH}: the class has to inherit from torch.nn.modules.module.Module" in message
    for key, value, reason in [
        ("one", MAKER, "domain.one._partial_=True has to be left out, because it takes no callable"),
        ("maker", LAYER, "domain.maker._partial_=False has to be true, because it takes a callable"),
        ("maker", {**MAKER, "_target_": PATH}, "the class has to inherit from torch.nn.modules.module.Module"),
        ("maker", {**MAKER, "_target_": "torch.nn.functional.relu"}, "no such class (it is a function, not a class)"),
        ("anything", {"_target_": "os.system", "command": "ls"}, "not a class"),
        ("number", LAYER, "domain.number is a plain value, not a part"),
    ]:
        assert reason in refusal(changed(tiny.config(), "domain", part | {key: value}))


def test_texts_of_a_config_are_not_resolved_when_a_part_is_built() -> None:
    part = {"_target_": "tests.config.test_schema.Holder", "anything": ["${oc.env:HOME}", {"a": ("${b}",)}]}
    assert build(part).parts[5] == ["${oc.env:HOME}", {"a": ["${b}"]}]


def test_part_owns_copies_of_what_the_config_lists() -> None:
    listed = [[1], {"a": [2]}]
    (first, second) = (build({"_target_": "tests.config.test_schema.Holder", "anything": listed}) for _ in range(2))
    first.parts[5][0].append(3)
    assert second.parts[5] == listed == [[1], {"a": [2]}]
