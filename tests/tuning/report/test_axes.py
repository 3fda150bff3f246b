"""The scales on which settings are drawn."""

from raytune_emotion.tuning.report.axes import Axis, searched_axes
from raytune_emotion.tuning.space.parser import parse_space
from raytune_emotion.tuning.study.records import TrialRecord


def trials(*settings):
    return [TrialRecord(f"{i:04d}", "complete", given, "", ()) for i, given in enumerate(settings)]


def axes(space, *settings):
    return searched_axes(parse_space(space), trials(*settings))


def test_scale_and_range_are_those_of_the_space_and_not_of_the_values_seen():
    space = {
        "optim.lr": {"log_uniform": [1e-4, 1e-2]},
        "optim.warmup_epochs": {"uniform": [0, 0.9]},
        "train.batch_size": {"choice": [32, 64, 128]},
    }
    found = axes(
        space,
        {"optim.lr": 1e-3, "optim.warmup_epochs": 0.01, "train.batch_size": 128},
        {"optim.lr": 2e-3, "optim.warmup_epochs": 0.9, "train.batch_size": 32},
    )
    assert found == [
        Axis("optim.lr", "log", 1e-4, 1e-2),
        Axis("optim.warmup_epochs", "linear", 0.0, 0.9),
        Axis("train.batch_size", "choice", choices=("32", "64", "128")),
    ]
    assert found[2].position(64) == "64"
    assert found[0].position(None) is None


def test_a_setting_of_branches_has_one_axis_over_all_of_them():
    space = {
        "optim.name": {"choice": ["adam", "adamw"]},
        "optim.weight_decay": {"log_uniform": [1e-3, 0.3]},
        "when": [{"if": {"optim.name": "adam"}, "optim.weight_decay": {"log_uniform": [1e-6, 1e-3]}}],
    }
    found = axes(
        space, {"optim.name": "adam", "optim.weight_decay": 1e-5}, {"optim.name": "adamw", "optim.weight_decay": 0.1}
    )
    assert found[1] == Axis("optim.weight_decay", "log", 1e-6, 0.3)


def test_weights_of_a_mixture_go_from_none_to_all():
    space = {"loss": {"simplex": ["kl", "js"]}}
    found = axes(space, {"loss.kl": 0.4, "loss.js": 0.6}, {"loss.kl": 0.5, "loss.js": 0.5})
    assert found == [Axis("loss.kl", "linear", 0.0, 1.0), Axis("loss.js", "linear", 0.0, 1.0)]


def test_a_value_outside_of_the_space_widens_the_axis():
    space = {"optim.lr": {"log_uniform": [1e-3, 1e-2]}}
    assert axes(space, {"optim.lr": 1e-5}, {"optim.lr": 2e-3}) == [Axis("optim.lr", "log", 1e-5, 1e-2)]


def test_truths_are_written_as_in_the_space():
    space = {"model.pretrained": {"choice": [True, False]}}
    (axis,) = axes(space, {"model.pretrained": True}, {"model.pretrained": False})
    assert axis.choices == ("true", "false")
    assert axis.position(True) == "true"


def test_names_are_told_from_numbers():
    kinds = {("32", "64"): False, ("0.1", "1"): False, ("adam", "sgd"): True, ("32", "auto"): True, (): False}
    for choices, holds_text in kinds.items():
        assert Axis("a", "choice", choices=choices).holds_text == holds_text


def test_settings_that_do_not_differ_have_none():
    assert axes({"optim.lr": {"log_uniform": [1e-3, 1e-2]}}, {"optim.lr": 2e-3}, {"optim.lr": 2e-3}) == []
