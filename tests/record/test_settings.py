"""The settings in which runs differ from their experiment."""

from __future__ import annotations

from maml.record.settings import differing_keys, experiment_settings, setting_texts

MLP = {"model._target_": "maml.model.mlp.MLP"}


def test_settings_of_an_experiment_are_those_of_training_and_of_evaluation() -> None:
    training, evaluation = experiment_settings("sinusoid_10shot")
    assert training["inner.step_size"] == 0.001
    assert evaluation["evaluation.num_steps"] == 10


def test_unknown_experiment_has_no_settings() -> None:
    assert experiment_settings("custom") == ({}, {})


def test_setting_that_is_not_recorded_has_its_default() -> None:
    assert differing_keys(MLP | {"model.activation": "relu"}, MLP) == []
    assert differing_keys(MLP | {"model.activation": "tanh"}, MLP) == ["model.activation"]


def test_texts_name_what_differs_without_the_seed() -> None:
    own = MLP | {"model.activation": "tanh", "model.widths": [8, 8], "seed": 3, "precision": "bfloat16"}
    expected = ["model.activation=tanh", "model.widths=[8,8]", "precision=bfloat16"]
    assert setting_texts(own, MLP | {"model.widths": [40, 40]}) == expected
    assert setting_texts(own, own) == []


def test_unrecorded_argument_of_a_class_of_ones_own_is_called_default() -> None:
    own = {"algorithm._target_": "away.Own"}
    assert setting_texts(own, own | {"algorithm.strength": 0.5}) == ["algorithm.strength=default"]
    assert "algorithm.strength=default" not in setting_texts(MLP, own | {"algorithm.strength": 0.5})
