"""Tasks from a table: rows of a task, splits, classes, and tables that are wrong."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

import maml
from maml.config.schema import build_without_data
from maml.domain.table import Table
from maml.errors import MamlError, Unavailable
from maml.model.base import Model
from maml.seeding import Stream
from maml.types import Examples, Params, Split, take
from tests.runs import TinyRuns, file_contents

ROWS = {"a": 4, "b": 9, "c": 5, "d": 4, "e": 6, "f": 7}  # rows of each task
PARTS: dict[str, Split] = {"a": "train", "b": "train", "c": "train", "d": "val", "e": "test", "f": "test"}


def frame() -> pd.DataFrame:
    """Returns a shuffled table: x is the number of the row in its task, z and y say which task it is."""
    rows = [
        {
            "task": name,
            "x": number,
            "z": ord(name),
            "y": ord(name) + number / 100,
            "part": PARTS[name],
            "odd": number % 2,
        }
        for name, count in ROWS.items()
        for number in range(count)
    ]
    return pd.DataFrame(rows).sample(frac=1, random_state=0)


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    frame().to_csv(tmp_path / "own.csv", index=False)
    return tmp_path


def table_of(data_dir: Path, **options: Any) -> Table:
    given: dict[str, Any] = {
        "file": "own.csv",
        "task": "task",
        "inputs": ["x", "z"],
        "targets": ["y"],
        "split": "part",
        "num_shots": 2,
    }
    return Table(data_dir=str(data_dir), **(given | options))


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_a_task_has_rows_of_one_task_of_its_split_and_none_twice(data_dir: Path, split: Split) -> None:
    domain = table_of(data_dir)
    tasks = domain.sample_tasks(200, Stream(0), split)
    support, query = domain.data(tasks, "support"), domain.data(tasks, "query")
    assert (support.x.shape, support.y.shape, support.num_shots) == ((200, 2, 2), (200, 2, 1), 2)
    both = torch.cat([support.x, query.x], dim=1)
    seen = set()
    for task in both.tolist():
        (name,) = {chr(int(z)) for _, z in task}
        assert len({x for x, _ in task}) == 4
        seen |= {(name, int(x)) for x, _ in task}
    assert seen == {(name, row) for name, part in PARTS.items() if part == split for row in range(ROWS[name])}
    for data in (support, query):
        torch.testing.assert_close(data.y[..., 0], data.x[..., 1] + data.x[..., 0] / 100)


def test_a_task_depends_neither_on_how_many_are_drawn_nor_on_the_order_of_rows(data_dir: Path) -> None:
    few, many = (table_of(data_dir).sample_tasks(count, Stream(5)) for count in (2, 9))
    assert all(torch.equal(value, take(many, 0, 2)[name]) for name, value in few.items())


@pytest.mark.parametrize(
    ("own", "num_shots", "num_query", "expected"), [(None, None, None, 2), (1, None, None, 1), (1, 1, 3, 3)]
)
def test_query_rows_are_k_unless_asked(
    data_dir: Path, own: int | None, num_shots: int | None, num_query: int | None, expected: int
) -> None:
    tasks = table_of(data_dir, num_query=own).sample_tasks(1, Stream(0), "test", num_shots, num_query)
    assert tasks["query_rows"].shape == (1, expected)


def test_tasks_are_drawn_and_gathered_on_the_device(data_dir: Path) -> None:
    domain = table_of(data_dir)
    domain.to(torch.device("meta"))  # like a GPU, it refuses tensors of the CPU
    tasks = domain.sample_tasks(3, Stream(0, "meta"))
    assert {value.device.type for value in (*tasks.values(), *domain.data(tasks, "query")[:2])} == {"meta"}


def test_shares_share_out_the_tasks(data_dir: Path) -> None:
    domain = table_of(data_dir, split=[0.5, 0.0, 0.5])
    assert {split: len(members) for split, members in domain.splits.items()} == {"train": 3, "test": 3}
    assert all(members.equal(members.sort().values) for members in domain.splits.values()), "as tasks are drawn"
    assert not domain.has_validation
    with pytest.raises(MamlError, match="has no val tasks, only train and test"):
        domain.sample_tasks(1, Stream(0), "val")
    assert table_of(data_dir).has_validation


@pytest.mark.parametrize("num_targets", [1, 2])
def test_loss_is_the_mean_squared_error(data_dir: Path, num_targets: int) -> None:
    domain = table_of(data_dir)
    outputs, y = (Stream(seed).uniform((2, 3, num_targets)) for seed in (1, 2))
    losses, _ = domain.loss(outputs, Examples(torch.empty(0), y, 2))
    for task in range(2):
        squares = [(outputs[task, row, i] - y[task, row, i]) ** 2 for row in range(3) for i in range(num_targets)]
        assert losses[task].item() == pytest.approx(float(sum(squares)) / (3 * num_targets))


class Fixed(Model):
    """Gives the same outputs for every input."""

    def __init__(self, *outputs: float) -> None:
        self.values = torch.tensor(outputs)

    def init(self, stream: Stream) -> Params:
        return {}

    def __call__(self, params: Params, x: torch.Tensor, num_reference: int | None = None) -> torch.Tensor:
        return self.values.expand(*x.shape[:2], -1)


@pytest.mark.parametrize(("column", "classes"), [("odd", [0, 1]), ("odd", ["0", "1"]), ("word", ["even", "odd"])])
def test_classes_are_predicted_by_cross_entropy(tmp_path: Path, column: str, classes: Sequence[Any]) -> None:
    table = frame()
    table["word"] = table["odd"].map({0: "even", 1: "odd"})
    table.to_csv(tmp_path / "own.csv", index=False)
    domain = table_of(tmp_path, targets=[column], classes=classes)
    assert (domain.out_dim, domain.headline, domain.larger_is_better) == (2, "accuracy", True)
    data = domain.data(domain.sample_tasks(3, Stream(0), "test"), "support")
    assert torch.equal(data.y, (data.x[..., 0] % 2).long())
    model = Fixed(0.0, math.log(3))
    losses, metrics = domain.loss(model({}, data.x), data)
    expected = torch.where(data.y == 1, -math.log(0.75), -math.log(0.25)).mean(1)
    torch.testing.assert_close(losses, expected)
    torch.testing.assert_close(metrics["accuracy"], data.y.float().mean(1))
    torch.testing.assert_close(domain.measure(model, {}, data, data, 1)["accuracy"], data.y.float().mean(1))


def test_facts_are_known_without_the_table(data_dir: Path) -> None:
    part = {
        "_target_": "maml.domain.table.Table",
        "data_dir": "nowhere",
        "file": "own.csv",
        "task": "task",
        "inputs": ["x", "z"],
        "targets": ["odd"],
        "classes": [0, 1],
        "split": "part",
        "num_shots": 2,
    }
    bare: Any = build_without_data(part)
    full = table_of(data_dir, targets=["odd"], classes=[0, 1])
    for fact in (
        "in_shape",
        "out_dim",
        "headline",
        "larger_is_better",
        "num_shots",
        "num_query",
        "workload",
        "classes",
    ):
        assert getattr(bare, fact) == getattr(full, fact)
    with pytest.raises(Unavailable, match=r"there is no table nowhere/own\.csv; set domain\.file="):
        bare.check_available()


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({}, {"inputs": ["x", "zz"]}, "has no column zz; it has task, x, z"),
        ({}, {"task": "person", "targets": ["yy"]}, "has no column person and no column yy"),
        ({"x": "?"}, {}, r"row 1: 'x' is '\?', which is no finite number"),
        ({"y": math.inf}, {}, "row 1: 'y' is 'inf', which is no finite number"),
        ({"z": None}, {}, "row 1: 'z' is 'nan', which is no finite number"),
        ({"x": 1e39}, {}, r"row 1: 'x' is '1e\+39', which is too large for torch\.float32"),
        ({"task": None}, {}, "row 1: the column 'task' is empty"),
        (
            {"odd": 7},
            {"targets": ["odd"], "classes": [0, 1]},
            r"row 1: 'odd' is '7', which is none of domain\.classes=",
        ),
        ({"part": "tset"}, {}, "each task has one split, train, val or test, in the column 'part', but . has"),
        ({}, {"targets": ["odd", "y"], "classes": [0, 1]}, "classes are different values of one column"),
        ({}, {"targets": ["odd"], "classes": [0, 0]}, "classes are different values of one column"),
        ({}, {"targets": ["x"]}, "the column 'x' is named twice"),
        ({}, {"inputs": ["x", "x"]}, "the column 'x' is named twice"),
        ({}, {"split": "task"}, "the column 'task' is named twice; name each column once, as .* or the split"),
        ({}, {"split": [0.6, 0.2, 0.3]}, "three shares"),
        ({}, {"split": [1.0, 0.0, 0.0]}, "leaves no tasks for test"),
        ({}, {"num_shots": 3}, "num_shots=3 plus num_query=3 is 6, but task a has 4 rows, task c has 5 rows; lower"),
        ({}, {"file": "gone.csv"}, r"there is no table .*gone\.csv"),
    ],
)
def test_wrong_table_says_what_is_wrong(
    tmp_path: Path, change: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    table = frame().astype(object)
    for name, value in change.items():
        table.iloc[0, table.columns.get_loc(name)] = value
    table.to_csv(tmp_path / "own.csv", index=False)
    with pytest.raises(MamlError, match=message):
        table_of(tmp_path, **options)


def test_task_with_too_few_rows_for_meta_test_is_named(data_dir: Path) -> None:
    with pytest.raises(MamlError, match="num_shots=4 plus num_query=3 is 7, but task e has 6 rows; lower"):
        table_of(data_dir).sample_tasks(1, Stream(0), "test", num_shots=4, num_query=3)


@pytest.mark.parametrize("content", [b"", b"\x00\xff\xfe", b'a,b\n1,2,3\n"'])
def test_file_that_is_no_table_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "own.csv").write_bytes(content)
    with pytest.raises(MamlError, match=r"own\.csv (cannot be read as a table|has no column)"):
        table_of(tmp_path)


def test_parquet_is_read_if_there_is_a_package_for_it(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (data_dir / "own.parquet").touch()
    monkeypatch.setattr(pd, "read_parquet", lambda path: frame())
    expected, found = (table_of(data_dir, file=file) for file in ("own.csv", "own.parquet"))
    assert torch.equal(expected.inputs.sort(0).values, found.inputs.sort(0).values)

    def fail(path: Path) -> None:
        raise ImportError("no pyarrow")

    monkeypatch.setattr(pd, "read_parquet", fail)
    with pytest.raises(Unavailable, match="pip install pyarrow, or save it as csv"):
        table_of(data_dir, file="own.parquet")


def test_network_of_a_table_adapts_to_rows_of_a_new_task(tiny: TinyRuns) -> None:
    runs = TinyRuns(tiny.runs_dir, tiny.cache_dir)
    network = maml.load(
        runs.run("+experiment=own_table", "num_iterations=300", "evaluation.num_tasks=5", "hardware=cpu")
    )
    x = torch.linspace(0, 4, 10).unsqueeze(1)
    y = 1.7 * torch.exp(-1.5 * x)
    before, after = (network.adapt(x, y, steps)(x) for steps in (0, 5))
    assert (after - y).square().mean() < 0.5 * (before - y).square().mean()


def test_network_of_classes_gives_them_back(tiny: TinyRuns, tmp_path: Path) -> None:
    table = frame()
    table["word"] = table["odd"].map({0: "even", 1: "odd"})
    table["x"] /= 5
    table.to_csv(tmp_path / "own.csv", index=False)
    overrides = [
        "domain=table",
        f"data_dir={tmp_path}",
        "domain.file=own.csv",
        "domain.task=task",
        "domain.inputs=[x]",
        "domain.targets=[word]",
        "domain.classes=[even,odd]",
        "domain.split=part",
        "domain.num_shots=2",
        "evaluation=accuracy",
        "evaluation.num_steps=2",
        "evaluation.num_tasks=5",
        "num_iterations=3",
        "hardware=cpu",
    ]
    network = maml.load(TinyRuns(tiny.runs_dir, tiny.cache_dir).run(*overrides))
    predictor = network.adapt([[0.0], [0.2], [0.4]], ["even", "odd", "even"])  # as many of each as there are
    assert predictor.classes == ["even", "odd"]
    assert set(predictor([[0.6], [0.8]])) <= {"even", "odd"}
    assert predictor.probabilities([[0.6]]).shape == (1, 2)
    with pytest.raises(MamlError, match=r"'uneven' is none of the classes that the network was trained on"):
        network.adapt([[0.0]], ["uneven"])
    with pytest.raises(MamlError, match="there are 2 inputs, but 1 labels"):
        network.adapt([[0.0], [1.0]], ["odd"])


def test_predicted_classes_are_those_that_the_accuracy_counts(data_dir: Path) -> None:
    class Line(Model):
        def init(self, stream: Stream) -> Params:
            return {}

        def __call__(self, params: Params, x: torch.Tensor, num_reference: int | None = None) -> torch.Tensor:
            return torch.stack([2 - x[..., 0], x[..., 0] - 1], dim=-1)

    domain = table_of(data_dir, targets=["odd"], classes=[0, 1])
    assert domain.class_names == ["0", "1"] and table_of(data_dir).class_names == []
    tasks = domain.sample_tasks(3, Stream(0), "test")
    predicted = domain.predict_classes(Line(), {}, tasks)
    support, query = (domain.data(tasks, role) for role in ("support", "query"))
    measured = domain.measure(Line(), {}, support, query, 0)["accuracy"]
    assert torch.equal((predicted.classes == predicted.taken_for).double().mean(1), measured.double())
    assert torch.equal(predicted.classes.flatten(), query.y.flatten())
    assert predicted.choices.tolist() == [[0, 1]] * 3


def test_changed_table_is_refused_before_a_run_goes_on_or_is_evaluated(
    tiny: TinyRuns, data_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    runs = TinyRuns(tiny.runs_dir, tiny.cache_dir)
    given = ("domain.task=task", "domain.inputs=[x]", "domain.targets=[y]", "domain.split=part", "domain.num_shots=2")
    small = (
        "evaluation=regression_curve",
        "evaluation.num_shots=[2]",
        "evaluation.num_steps=1",
        "evaluation.num_tasks=5",
        "num_iterations=2",
        "hardware=cpu",
    )
    overrides = ["domain=table", f"data_dir={data_dir}", "domain.file=own.csv", *given, *small]
    folder = runs.run(*overrides)
    before = file_contents(tiny.runs_dir)
    table = frame()
    table.assign(odd=7).to_csv(data_dir / "own.csv", index=False)
    runs.run(*overrides)  # a column that the run does not use
    assert file_contents(tiny.runs_dir) == before
    moved = table["part"].mask(table["task"] == "e", "val")
    for changes in ({"y": table["y"] + 1}, {"part": moved}):
        table.assign(**changes).to_csv(data_dir / "own.csv", index=False)
        for mode in ("train", "eval"):
            with pytest.raises(MamlError, match=r"the data of .*Table have changed since .*changed_sources=accept"):
                runs.run(*overrides, f"mode={mode}")
    assert file_contents(tiny.runs_dir) == before
    runs.run(*overrides, "mode=eval", "changed_sources=accept", "evaluation.bank_seed=1")
    assert f"have changed since {folder} was trained; changed_sources=accept uses it" in caplog.text
    with pytest.raises(MamlError, match=r"belongs to another run .*:\n  domain\.num_query: 1 here, its default there"):
        runs.run(*overrides, "mode=eval", f"checkpoint={folder / 'checkpoint.pt'}", "domain.num_query=1")


def written(tmp_path: Path, text: str) -> Path:
    (tmp_path / "own.csv").write_text(text)
    return tmp_path


def rows_of(names: Sequence[str], count: int = 4) -> str:
    return "".join(f"{name},{row},0,1,train\n{name},{row},0,1,train\n" for name in names for row in range(count // 2))


def test_tasks_are_told_apart_as_they_are_written(tmp_path: Path) -> None:
    names = ["1.1", "1.10", "01", "1", "1e5", "100000"]
    text = "task,x,z,y,part\n" + rows_of(names) + rows_of(["t"]).replace("train", "test")
    assert table_of(written(tmp_path, text), targets=["y"]).tasks == sorted([*names, "t"])


def test_digest_tells_of_which_task_a_row_is(tmp_path: Path) -> None:
    digests = set()
    for border in (4, 5):
        names = ["a"] * border + ["b"] * (9 - border)
        rows = "".join(f"{name},{row},0,1,train\n" for row, name in enumerate(names))
        text = "task,x,z,y,part\n" + rows + rows_of(["t"]).replace("train", "test")
        digests.add(table_of(written(tmp_path, text)).data_digest)
    assert len(digests) == 2


def test_empty_fields_behind_the_last_column_are_no_column(tmp_path: Path) -> None:
    rows = [f"{name},{row},7,{row / 4},{part}" for name, part in (("1", "train"), ("2", "test")) for row in range(4)]
    domain = table_of(written(tmp_path, "task,x,z,y,part\n" + "".join(f"{row},\n" for row in rows)))
    assert domain.tasks == ["1", "2"]
    assert domain.inputs[:, 1].tolist() == [7] * 8
    with pytest.raises(MamlError, match=r"cannot be read as a table \(ParserWarning"):
        table_of(written(tmp_path, "task,x,z,y,part\n" + "".join(f"0,{row}\n" for row in rows)))


def test_columns_of_one_name_are_refused_if_they_are_wanted(tmp_path: Path) -> None:
    lines = frame().assign(more=0).to_csv(index=False).splitlines()
    for name, message in (("x", "has 2 columns 'x'; rename all but one"), ("odd", "")):
        (tmp_path / "own.csv").write_text("\n".join([lines[0].replace("more", name), *lines[1:]]))
        if message:
            with pytest.raises(MamlError, match=message):
                table_of(tmp_path)
        else:
            table_of(tmp_path)


def test_table_without_rows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MamlError, match=r"own\.csv has no rows"):
        table_of(written(tmp_path, "task,x,z,y,part\n"))


def test_empty_class_is_named_by_its_row(data_dir: Path) -> None:
    table = frame().reset_index(drop=True)
    table["odd"] = table["odd"].astype("Int64").mask(table.index == 3)
    table.to_csv(data_dir / "own.csv", index=False)
    with pytest.raises(MamlError, match=r"row 4: 'odd' is empty"):
        table_of(data_dir, targets=["odd"], classes=[0, 1])


@pytest.fixture
def as_parquet(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[pd.DataFrame], dict[str, Any]]:
    """Returns a function that stands for a Parquet file, which needs a further package, and gives its options."""

    def put(table: pd.DataFrame) -> dict[str, Any]:
        monkeypatch.setattr(pd, "read_parquet", lambda path: table.copy())
        (data_dir / "own.parquet").touch()
        return {"file": "own.parquet"}

    return put


def test_dates_are_no_numbers(data_dir: Path, as_parquet: Callable[[pd.DataFrame], dict[str, Any]]) -> None:
    with pytest.raises(MamlError, match="'x' holds dates or durations"):
        table_of(data_dir, **as_parquet(frame().assign(x=pd.Timestamp("2024-01-01"))))


def test_index_of_a_parquet_file_is_a_column_or_nothing(
    data_dir: Path, as_parquet: Callable[[pd.DataFrame], dict[str, Any]]
) -> None:
    expected = table_of(data_dir)
    named, texts = frame().set_index("task"), frame().set_axis([*map(str, range(len(frame())))])
    for table in (named, texts):
        found = table_of(data_dir, **as_parquet(table))
        assert found.tasks == expected.tasks
        assert torch.equal(found.inputs.sort(0)[0], expected.inputs.sort(0)[0])
    lacking = frame().set_axis(range(100, 100 + len(frame())))
    lacking.loc[102, "x"] = math.nan
    with pytest.raises(MamlError, match="row 3: 'x' is 'nan'"):
        table_of(data_dir, **as_parquet(lacking))
