import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raytune_emotion.config import RECIPES, SETTINGS, LossConfig, RunConfig, unknown_setting
from raytune_emotion.errors import UserError


def test_the_default_is_valid_and_survives_flattening():
    config = RunConfig()
    assert RunConfig.from_flat(config.to_flat()) == config
    assert set(config.to_flat()) == set(SETTINGS)


def test_every_setting_says_what_it_is():
    for key, setting in SETTINGS.items():
        assert setting.default.description, key


def test_all_faults_are_named_at_once():
    with pytest.raises(UserError) as caught:
        RunConfig.from_flat({"optim.lr": -1, "optim.lrr": 3, "train.batch_size": "3", "optim.name": "adagrad"})
    text = str(caught.value)
    assert len(caught.value.faults) == 4
    for part in ("optim.lrr: unknown setting; did you mean optim.lr?", "optim.lr: ", "got -1", "got '3'"):
        assert part in text
    assert "'adam', 'adamw' or 'sgd'" in text


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("lr", "optim.lr"), ("optim.wd", "optim.weight_decay"), ("wd", "model.weights_dir or optim.weight_decay"),
        ("seed", "train.seed"),
        ("train.bs", "train.batch_size"), ("batch-size", "train.batch_size"), ("optim.lrr", "optim.lr"),
        ("optim.learning_rate", "optim.lr"), ("optimizer", "optim.name"), ("backbone", "model.backbone"),
        ("train.lr", "optim.lr"), ("epoch", "train.epochs"), ("augment.fliip", "augment.flip"), ("kl", "loss.kl"),
        ("optim.momentun", "optim.momentum"),
    ],
)  # fmt: skip
def test_the_setting_that_was_meant_is_named(written, meant):
    assert unknown_setting(written) == f"{written}: unknown setting; did you mean {meant}?"


@pytest.mark.parametrize("written", ["foo", "", "."])
def test_no_setting_is_named_for_a_word_that_is_like_none(written):
    assert unknown_setting(written) == f"{written}: unknown setting"


@pytest.mark.parametrize(
    ("flat", "part"),
    [
        ({"loss.mse": 0.5}, "their sum is 0.5"),
        ({"train.accumulate": 64}, "train.accumulate: at most train.batch_size (32)"),
        ({"optim.warmup_epochs": 30.0}, "optim.warmup_epochs: less than train.epochs"),
        ({"model.dropout": float("nan")}, "model.dropout"),
        ({"train.epochs": True}, "train.epochs"),
        ({"train.epochs": 2.0}, "train.epochs"),
        ({"train.epochs": 10**20}, "train.epochs: should be less than or equal to 1000000, got 100000000000000000000"),
        ({"data.classes": ["calm", "tense", "calm"]}, "only once, but these names occur again: calm"),
        ({"data.classes": ["calm", "a\nb"]}, "a name of printable characters, got 'a.+nb'"),
        ({"data.classes": ["calm", " "]}, "a name of printable characters, got ' '"),
        ({"data.classes": ["calm", "\u202eb"]}, "a name of printable characters, got '.+202eb'"),
    ],
)
def test_nonsense_is_refused(flat, part):
    with pytest.raises(UserError, match=part.replace("(", r"\(").replace(")", r"\)")):
        RunConfig.from_flat(flat)


@pytest.mark.parametrize("key", [key for key, its in SETTINGS.items() if type(its.default.default) in (int, float)])
def test_a_number_beyond_all_sense_is_refused(key):
    default = SETTINGS[key].default.default
    with pytest.raises(UserError, match=f"^{key}: .*, got 1"):
        RunConfig.from_flat({key: type(default)(10**20)})
    with pytest.raises(UserError, match=f"^{key}: should be .*, got a number of too many digits$"):
        RunConfig.from_flat({key: 10**5000})


def test_a_recipe_that_python_cannot_write_is_refused():
    with pytest.raises(UserError, match=r"^augment.recipe: should be .*, got a number of too many digits$"):
        RunConfig.from_flat({"augment.recipe": 10**5000})


def test_a_loss_that_is_named_replaces_the_default():
    assert RunConfig.from_flat({"loss.mse": 1}).loss.weights == {"mse": 1.0}


@given(st.lists(st.floats(0.01, 1), min_size=5, max_size=5))
def test_any_point_of_the_simplex_is_a_loss(raw):
    names = [field.name for field in dataclasses.fields(LossConfig)]
    weights = {name: w / sum(raw) for name, w in zip(names, raw, strict=True)}
    assert LossConfig(**weights).weights == pytest.approx(weights)


def test_the_tree_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        RunConfig().optim.lr = 1.0


def test_a_loss_has_a_readable_name():
    assert LossConfig(kl=1.0).label == "kl"
    assert LossConfig(mse=0.25, kl=0.75).label == "mse0.25-kl0.75"


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_of_augmentation_is_the_settings_that_it_stands_for(name):
    by_name = RunConfig.from_flat({"augment.recipe": name})
    by_hand = RunConfig.from_flat({f"augment.{key}": value for key, value in RECIPES[name].items()})
    assert dataclasses.replace(by_name.augment, recipe=None) == by_hand.augment
    assert RunConfig.from_flat(by_name.to_flat()) == by_name
    assert RunConfig.from_flat({"augment.recipe": name, "augment.grey": 0.7}).augment.grey == 0.7


def test_no_recipe_changes_nothing_and_an_unknown_one_is_refused():
    assert RunConfig().augment.flip == 0.5
    with pytest.raises(
        UserError, match=r"augment.recipe: should be 'none', 'light', 'strong' or 'random', got 'heavy'"
    ):
        RunConfig.from_flat({"augment.recipe": "heavy"})
