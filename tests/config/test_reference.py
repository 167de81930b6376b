"""The reference of all keys: complete, and consistent with constructors, annotations and yaml files."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import pytest
from annotated_types import Ge, MinLen
from omegaconf import OmegaConf

from maml.config import reference as ref
from maml.config.compose import compose
from maml.config.paths import CONF
from maml.config.reference import Key, Option, reference
from maml.config.schema import PARTS, SUPPLIED
from maml.types import Count, Decay, Interval, PositiveFloat

OPTIONS = [option for group in reference() for option in group.options]


def option(group: str, name: str) -> Option:
    (found,) = (one for one in OPTIONS if (one.group, one.name) == (group, name))
    return found


def key(group: str, name: str, key: str) -> Key:
    (found,) = (one for one in option(group, name).keys if one.name == key)
    return found


def test_reference_has_every_file_of_the_configs() -> None:
    assert {one.file for one in OPTIONS} == {path.relative_to(CONF).as_posix() for path in CONF.rglob("*.yaml")}


@pytest.mark.parametrize("one", OPTIONS, ids=lambda one: one.file)
def test_every_key_has_a_type_and_a_meaning(one: Option) -> None:
    assert one.header
    assert [key.name for key in one.keys if not key.type or not key.meaning] == []
    assert [key.name for key in one.keys if "maml." in key.meaning and "`" not in key.meaning] == []
    if one.group in PARTS:
        assert one.target


@pytest.mark.parametrize("part", PARTS)
def test_keys_and_values_are_those_of_the_composed_config(part: str) -> None:
    for one in (one for one in OPTIONS if one.group == part and "???" not in (CONF / one.file).read_text()):
        composed = getattr(compose([f"{part}={one.name}", "evaluation.num_steps=1"])[0], part)
        own = {key.name.removeprefix(f"{part}."): key for key in one.keys if key.name.count(".") == 1}
        assert composed.keys() - {"_target_"} <= own.keys()
        assert not own.keys() & SUPPLIED.get(part, set())
        for name, value in composed.items():
            text = own[name].value if name in own else None
            if text and "${" not in text and name != "num_steps":
                assert OmegaConf.create(f"value: {text}").value == value, f"{one.file}: {name}"


def test_key_says_all_there_is_to_know() -> None:
    found = key("inner", "learned_sgd", "inner.num_steps")
    assert (found.type, found.range, found.default, found.value) == ("integer", ">= 1", None, "1")
    found = key("outer", "adam", "outer.clip")
    assert (found.type, found.range, found.default, found.initial) == ("number or null", "> 0", "null", "null")
    assert key("", "config", "precision").type == "float64, float32, tf32 or bf16"
    assert key("", "config", "domain").initial == "sinusoid"
    assert key("hardware", "gpu", "hardware.device").initial == "cuda", "a file takes over what another has"
    assert key("domain", "ant_velocity", "domain.goal_range").range == "the first below the second"


def test_option_says_what_it_sets_elsewhere() -> None:
    assert [(one.name, one.value) for one in option("algorithm", "fomaml").settings] == [("inner.order", "1")]
    assert {one.name: one.value for one in option("algorithm", "reptile").settings} == {"inner": "adam", "outer": "sgd"}
    assert "seed" in [one.name.rpartition(".")[2] for one in option("sweeper", "optuna").settings]


@pytest.mark.parametrize(
    ("annotation", "words", "ranges"),
    [
        (int, "integer", []),
        (bool | Literal["auto"], "true, false or auto", []),
        (Count | Literal["auto", "all"], "integer, auto or all", [">= 1"]),
        (Annotated[list[Count], MinLen(1)] | None, "list of integers or null", ["at least 1 entry", ">= 1"]),
        (tuple[Decay, Decay], "two numbers", [">= 0 and < 1", ">= 0 and < 1"]),
        (dict[str, Interval], "mapping of texts to two numbers", ["the first below the second"]),
        (
            dict[str, list[int] | dict[str, bool | str]],
            "mapping of texts to lists of integers or mappings of texts to booleans or texts",
            [],
        ),
        (PositiveFloat | dict[int, PositiveFloat], "number or mapping of integers to numbers", ["> 0", "> 0"]),
        (Annotated[int, Ge(2)], "integer", [">= 2"]),
        (Literal[1, 2], "1 or 2", []),
        (Any, "anything", []),
    ],
)
def test_annotation_in_words(annotation: Any, words: str, ranges: list[str]) -> None:
    assert ref._type_in_words(annotation) == words
    assert list(ref._ranges(annotation)) == ranges


class Base:
    """A thing.

    Args:
        first, second: of two,
            over two lines.
        third: `None` stays; None does not.

    Raises:
        ValueError: never.
    """


class Derived(Base):
    """Another.

    Args:
        third: its own.
    """


def test_meanings_are_read_from_docstrings_with_those_inherited() -> None:
    assert ref._meanings(Derived) == {
        "first": "of two, over two lines.",
        "second": "of two, over two lines.",
        "third": "its own.",
    }


def test_meaning_is_a_sentence_in_the_words_of_yaml() -> None:
    assert ref._as_sentence("of two; None is one") == "Of two; null is one."
    assert ref._as_sentence("theta' is adapted.") == "theta' is adapted."
    assert ref._as_sentence("") == ""
