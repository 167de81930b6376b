"""Yaml files as they are written: their header, their values with the comments beside them, and what they take over."""

from __future__ import annotations

from pathlib import Path

from maml.config.files import Entry, read


def written(folder: Path, name: str, text: str) -> Path:
    path = folder / f"{name}.yaml"
    path.write_text(text)
    return path


def test_header_is_all_comments_at_the_top_and_its_first_sentence_the_summary(tmp_path: Path) -> None:
    path = written(
        tmp_path, "a", "# @package _global_\n# Table 1: 98.7 %.   python train.py\n# More of it.\nx: 1\n# No.\n"
    )
    file = read(path)
    assert file.header == "Table 1: 98.7 %.   python train.py More of it."
    assert file.summary == "Table 1: 98.7 %."
    assert file.is_global
    assert not read(written(tmp_path, "b", "# One. Two.\nx: 1\n")).is_global


def test_values_stand_by_dotted_name_as_written_with_their_comments(tmp_path: Path) -> None:
    text = """# A part.
_target_: package.Class
size: 1e-3       # in metres
name: "a # b"    # quoted
nested:
  list: [1,
         2]
object:
  _target_: package.Other
  x: 1
"""
    entries = read(written(tmp_path, "a", text)).entries
    assert entries["size"] == Entry("1e-3", "in metres")
    assert entries["name"] == Entry('"a # b"', "quoted")
    assert entries["nested.list"] == Entry("[1, 2]", "")
    assert entries["object"] == Entry("{_target_: package.Other, x: 1}", ""), "what makes an object is one value"
    assert set(entries) == {"_target_", "size", "name", "nested.list", "object"}


def test_file_takes_over_its_defaults_and_names_the_options_it_chooses(tmp_path: Path) -> None:
    written(tmp_path, "base", "# The base.\na: 1  # of the base\nb: 2\n")
    text = "# The rest.\ndefaults:\n  - base\n  - override /model: conv4\n  - /logger: null\n  - _self_\nb: 3\n"
    file = read(written(tmp_path, "rest", text))
    assert file.entries == {"a": Entry("1", "of the base"), "b": Entry("3", "")}
    assert file.choices == {"model": "conv4"}


def test_file_of_comments_alone_sets_nothing(tmp_path: Path) -> None:
    file = read(written(tmp_path, "a", "# Nothing to set.\n"))
    assert (file.header, file.entries, file.choices) == ("Nothing to set.", {}, {})
