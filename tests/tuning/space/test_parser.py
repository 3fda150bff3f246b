import json
import math
from pathlib import Path
from textwrap import dedent
from typing import Any, get_args

import jsonschema
import numpy as np
import optuna
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ruamel.yaml import YAML

from raytune_emotion.config import SETTINGS, RunConfig
from raytune_emotion.errors import UserError
from raytune_emotion.learn.model import check_backbone
from raytune_emotion.tuning.space import joint_check
from raytune_emotion.tuning.space.json_schema import json_schema
from raytune_emotion.tuning.space.parser import load_space, parse_space
from raytune_emotion.tuning.space.space import LOSSES, Simplex, Space, are_settings
from raytune_emotion.tuning.space.words import NEVER_SEARCHED, read_setting
from tests.support.yaml import BOMB

optuna.logging.set_verbosity(optuna.logging.WARNING)

#: Made once, because to make and to check the schema for each example takes most of the time of a test.
SCHEMA = jsonschema.Draft7Validator(json_schema())
SPACES = Path(__file__).parents[3] / "search_spaces"
SHIPPED = sorted(SPACES.glob("*.yaml"))

#: The space of the README, with everything that the format has.
WHOLE = """\
model.backbone: {choice: [resnet18, resnet50, efficientnet_b0, vit_base_patch16_224]}
model.dropout: {uniform: [0.0, 0.5]}
optim.name: {choice: [adam, adamw]}
optim.lr: {log_uniform: [1e-5, 3e-3]}
train.batch_size: {int_uniform: [32, 128, 32]}
train.accumulate: {int_log_uniform: [1, 8]}
augment.erase: {uniform: [0, 0.5, 0.1]}
loss: {simplex: [mse, l1, kl, ce, js]}
data.image_size: 96
when:
  - if: {model.backbone: [vit_base_patch16_224]}
    optim.lr: {log_uniform: [1e-6, 3e-4]}
    augment.erase: 0.25
  - if: {model.backbone: [efficientnet_b0, vit_base_patch16_224], optim.name: adamw}
    optim.lr: {log_uniform: [1e-7, 1e-4]}
    augment.mixup: {uniform: [0, 1]}
start:
  - {model.backbone: resnet18, optim.name: adam, optim.lr: 1e-3, train.batch_size: 32, loss.mse: 1}
  - {model.backbone: vit_base_patch16_224, optim.name: adamw, optim.lr: 5e-5, loss.kl: 0.7, loss.js: 0.3}
"""


def space_of(text: str) -> Space:
    return parse_space(YAML(typ="safe", pure=True).load(text), "test")


def faults_of(tmp_path: Path, text: str, **overrides: Any) -> list[str]:
    path = tmp_path / "a.yaml"
    path.write_text(dedent(text), encoding="utf-8")
    with pytest.raises(UserError) as caught:
        load_space(path, overrides=overrides)
    assert all(fault.startswith(f"{path}:") for fault in caught.value.faults)
    return [fault.removeprefix(f"{path}:") for fault in caught.value.faults]


def unknown_backbone(name: str) -> str:
    with pytest.raises(UserError) as caught:
        check_backbone(name)
    return str(caught.value).removeprefix("model.backbone: ")


def samples(space: Space, n: int, seed: int = 0) -> list[dict[str, Any]]:
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed))
    return [space.suggest(study.ask()) for _ in range(n)]


class TestReading:
    def test_lines_are_read_as_yaml_1_2(self, tmp_path: Path) -> None:
        path = tmp_path / "a.yaml"
        path.write_text("optim.lr: {log_uniform: [1e-5, 1e-2]}\noptim.weight_decay: 1e-4\n")
        space = load_space(path)
        assert space.parameters == {"optim.lr": optuna.distributions.FloatDistribution(1e-5, 1e-2, log=True)}
        assert space.fixed_settings == {"optim.weight_decay": 1e-4}

    def test_a_space_is_kept_as_plain_data_and_read_back(self, tmp_path: Path) -> None:
        path = tmp_path / "a.yaml"
        path.write_text(WHOLE)
        space = load_space(path, overrides={"train.epochs": 7})
        kept = json.loads(json.dumps(space.to_dict()))
        again = parse_space(kept)
        assert again == space
        assert again.fixed_settings["train.epochs"] == 7

    def test_what_is_fixed_from_outside_replaces_what_the_file_says_of_it(self, tmp_path: Path) -> None:
        path = tmp_path / "a.yaml"
        path.write_text(
            "optim.lr: {log_uniform: [1e-4, 1e-2]}\n"
            "augment.flip: 0.5\n"
            "optim.name: {choice: [adam, sgd]}\n"
            "train.epochs: 3\n"
            "when:\n- {if: {optim.name: sgd}, augment.flip: 0.1}\n"
            "start:\n- {augment.flip: 0.2, optim.lr: 1e-3}\n- {augment.flip: 0.3}\n"
        )
        space = load_space(path, overrides={"augment.flip": 0.0, "train.epochs": 9, "data.classes": ("a", "b")})
        assert space.fixed_settings == {"augment.flip": 0.0, "train.epochs": 9, "data.classes": ["a", "b"]}
        assert space.when == ()
        assert space.start_points() == [{"optim.lr": 1e-3}]
        assert parse_space(space.to_dict()) == space

    @pytest.mark.parametrize(
        ("text", "fault"),
        [
            ("a: [1\nb: 2\n", "2: not valid YAML: expected ',' or ']', but got ':'; correct the file"),
            ("optim.lr: 1\n---\nb: 2\n", "2: not valid YAML: but found another document; correct the file"),
            ("optim.lr: *x\n", "1: not valid YAML: found undefined alias 'x'; correct the file"),
            ("- 1\n", "1: expected a mapping of settings, such as `optim.lr: 1e-3`"),
            ("", "1: expected a mapping of settings, such as `optim.lr: 1e-3`"),
            ("optim.lr: !x 3\n", "1: optim.lr: '3' with the tag !x is not a plain value"),
            ("grey: !!bool x\n", "1: grey: 'x' with the tag tag:yaml.org,2002:bool is not a plain value"),
            (
                "train.batch_size: !!int ''\n",
                "1: train.batch_size: '' with the tag tag:yaml.org,2002:int is not a plain value",
            ),
            ("optim.lr: &a [*a]\n", "1: optim.lr: contains itself by an alias"),
            ("optim.lr: 1e-3\n", "1: nothing is searched; give a setting a distribution, such as {choice: [a, b]}"),
        ],
    )
    def test_a_file_that_is_no_space(self, tmp_path: Path, text: str, fault: str) -> None:
        assert fault in faults_of(tmp_path, text)

    def test_a_file_that_cannot_be_read(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match=r"none\.yaml: the search space cannot be read: No such file"):
            load_space(tmp_path / "none.yaml")
        with pytest.raises(UserError, match="cannot be read: Is a directory"):
            load_space(tmp_path)
        (tmp_path / "latin.yaml").write_bytes(b"optim.lr: \xff\n")
        with pytest.raises(UserError, match="not text in UTF-8"):
            load_space(tmp_path / "latin.yaml")


class TestFaults:
    def test_all_are_named_at_once_each_with_its_line(self, tmp_path: Path) -> None:
        text = """\
            model.backbone:
              choice:
                - resnet18
                - resnet51
                - resnet18
            model.dropout: {uniform: [0.5, 0.0]}
            optim.name: {choice: []}
            optim.lr: {log_unifrm: [1e-5, 3e-3]}
            optim.weight_decay: {log_uniform: [0, 1e-1]}
            train.batch_size: {uniform: [32, 64]}
            loss: {simplex: [mse, l2]}
            data.image_size: 8
            train.epocs: 4
            optim.lr: 3
            augment.flip: {uniform: [0, 1, 0.3]}
            augment.grey: {uniform: [0, 1.5]}
            optim.schedule: [cosine]
            train.seed: {choice: [1, 2]}
            optim.momentum: {choice: [0.9], uniform: [0, 1]}
            model.pretrained: yes
            train.accumulate: {int_uniform: [1, 2.0]}
            train.precision: {uniform: [0, 1]}
            augment.erase: {uniform: [0, .inf]}
            train.grad_clip: {choice: [1, [2]]}
            augment.colour: {uniform: 0.5}
            augment.mixup: {log_uniform: [0.1, 0.2, 0.3]}
            when:
              - if: {train.patience: [1]}
                augment.cutmix: 0.5
              - if: {model.backbone: [resnet188]}
                optim.lr: {log_uniform: [1e-6, -3e-4]}
                model.backbone: resnet18
                train.epochs: 5
                augment.crop: 1
              - augment.cutmix: 0.5
              - {if: {model.backbone: resnet18}}
            start:
              - {model.backbone: resnet19, augment.grey: 7, foo: 3, train.patience: 1}
              - {}
        """
        assert [fault.partition(": ")[::2] for fault in faults_of(tmp_path, text)] == [
            ("4", "model.backbone: " + unknown_backbone("resnet51")),
            ("5", "model.backbone: 'resnet18' occurs twice"),
            ("6", "model.dropout: the lower bound must be below the upper, got [0.5, 0.0]"),
            ("7", "optim.name: choice needs a list of values, such as [a, b], got []"),
            (
                "8",
                "optim.lr: expected a distribution (choice, uniform, log_uniform, int_uniform, int_log_uniform), "
                "got `log_unifrm`; did you mean log_uniform?",
            ),
            ("9", "optim.weight_decay: the bounds of log_uniform must be above 0, got [0.0, 0.1]"),
            ("10", "train.batch_size: a whole number; write int_uniform instead of uniform"),
            ("11", "loss: should be 'mse', 'l1', 'kl', 'ce' or 'js', got 'l2'"),
            ("12", "data.image_size: should be greater than or equal to 16, got 8"),
            ("13", "train.epocs: unknown setting; did you mean train.epochs?"),
            ("14", "optim.lr: repeats line 8; remove one of them"),
            (
                "15",
                "augment.flip: the step must be above 0 and lead from the lower bound to the upper, "
                "got [0.0, 1.0, 0.3]",
            ),
            ("16", "augment.grey: should be less than or equal to 1, got 1.5"),
            ("17", "optim.schedule: expected a single value, got a list; write {choice: [a, b]} to search it"),
            ("18", "train.seed: cannot be searched, because a lucky seed is not a better setting; give one value"),
            ("19", "optim.momentum: expected one word of a distribution, such as {choice: …}, got 2"),
            ("20", "model.pretrained: should be a valid boolean, got 'yes'"),
            ("21", "train.accumulate: should be a valid integer, got 2.0"),
            ("22", "train.precision: not a number; write {choice: [a, b]} to search it"),
            ("23", "augment.erase: should be a finite number, got inf"),
            ("24", "train.grad_clip: should be a valid number, got [2]"),
            ("25", "augment.colour: uniform needs [low, high] or [low, high, step], got 0.5"),
            ("26", "augment.mixup: log_uniform needs [low, high], got [0.1, 0.2, 0.3]"),
            ("28", "train.patience: an `if` needs a setting that is searched by choice; this one is not"),
            (
                "30",
                "model.backbone: expected one of its choices (resnet18, resnet51), got 'resnet188'; did you mean "
                "resnet18?",
            ),
            ("31", "optim.lr: the lower bound must be below the upper, got [1e-06, -0.0003]"),
            ("32", "model.backbone: the `if` of an entry uses it, so it cannot depend on a `when` itself"),
            ("33", "train.epochs: must be the same in all trials, because trials of unequal length cannot be compared"),
            ("34", "augment.crop: unknown setting; did you mean augment.crop_scale?"),
            ("35", "when: an entry needs an `if`, such as {model.backbone: [resnet18]}"),
            ("36", "when: an entry needs settings in addition to its `if`"),
            ("38", "model.backbone: must be one of resnet18, resnet51, got 'resnet19'"),
            ("38", "augment.grey: must lie from 0 to 1.5, got 7"),
            ("38", "foo: unknown setting"),
            ("38", "train.patience: not in this space, so it cannot be set here"),
            ("39", "start: expected a mapping of settings to values as a point"),
        ]

    def test_a_condition_on_a_wrong_choice_is_no_second_error(self, tmp_path: Path) -> None:
        text = """\
            optim.name: {choice: [adam, sdg, [2]]}
            optim.momentum: {choice: [[2]]}
            when:
              - if: {optim.name: [adam, sdg]}
                optim.lr: 1e-3
              - if: {optim.momentum: 2}
                optim.lr: 1e-2
        """
        assert [fault.partition(": should")[0] for fault in faults_of(tmp_path, text)] == [
            "1: optim.name",
            "1: optim.name",
            "2: optim.momentum",
        ]

    @pytest.mark.parametrize(
        ("line", "fault"),
        [
            ("optim.lr: {}", "optim.lr: expected one word of a distribution, such as {choice: …}, got 0"),
            ("optim.lr: .nan", "optim.lr: should be a finite number, got nan"),
            ("optim.lr: null", "optim.lr: should be a valid number, got None"),
            ("optim.lr: {uniform: [true, 2]}", "optim.lr: should be a valid number, got True"),
            ("optim.lr: {uniform: [0, 1]}", "optim.lr: should be greater than 0, got 0"),
            ("optim.lr: {uniform: [0.1, 0.1]}", "optim.lr: the lower bound must be below the upper, got [0.1, 0.1]"),
            ("model.dropout: {uniform: [0, 1]}", "model.dropout: should be less than 1, got 1"),
            ("optim.lr: {uniform: [0.1, 1.0e+305]}", "optim.lr: uniform needs smaller numbers, got [0.1, 1e+305]"),
            (
                "optim.lr: {uniform: [0.1, 10, 1e-30]}",
                "optim.lr: the step is too small for numbers from 0.1 to 10, got [0.1, 10.0, 1e-30]",
            ),
            (
                "optim.name: {choice: [adam, sdg]}",
                "optim.name: should be 'adam', 'adamw' or 'sgd', got 'sdg'; did you mean sgd?",
            ),
            ("train.batch_size: {choice: [8, 8.5]}", "train.batch_size: should be a valid integer, got 8.5"),
            (
                "train.batch_size: {int_uniform: [0, 8]}",
                "train.batch_size: should be greater than or equal to 1, got 0",
            ),
            (
                "data.image_size: {int_uniform: [32, 64]}",
                "data.image_size: each size needs its own packed store; list the sizes with choice",
            ),
            (
                "data.classes: [a]",
                "data.classes: Tuple should have at least 2 items after validation, not 1, got ('a',)",
            ),
            ("loss: huber", "loss: should be 'mse', 'l1', 'kl', 'ce' or 'js', got 'huber'"),
            ("loss: [kl]", "loss: expected a single value, got a list; write {choice: [a, b]} to search it"),
            ("loss: {choice: [kl, kl]}", "loss: 'kl' occurs twice"),
            (
                "loss: {simplex: [kl]}",
                "loss: simplex needs a list of two or more losses, such as [mse, kl], got ['kl']",
            ),
            (
                "loss: {uniform: [0, 1]}",
                "loss: expected a distribution (simplex, choice), got `uniform`",
            ),
            (
                "loss.kl: {uniform: [0, 1]}",
                "loss.kl: a single weight cannot be searched; write loss: {simplex: [mse, kl]}",
            ),
            ("loss.kl: 0.5", "loss: the weights of the mixture must sum to 1, but their sum is 0.5"),
            ("{loss: kl, loss.kl: 1}", "loss: cannot be combined with single weights (loss.…); give one or the other"),
            ("when: 3", "when: expected a list of entries, each with an `if` and settings"),
            ("when: [3]", "when: an entry needs an `if`, such as {model.backbone: [resnet18]}"),
            (
                "when: [{if: {augment.flip: []}, loss: kl}]",
                "augment.flip: an `if` needs at least one of its choices",
            ),
            (
                "when: [{if: {augment.flip: 1}, loss.kl: 1}]",
                "loss.kl: in a `when`, write loss: with a name, a choice or a simplex",
            ),
            (
                "when: [{if: {augment.flip: 1}, loss: kl}, {if: {augment.flip: [1.0]}, loss: js}]",
                "loss: already set by an earlier entry with the same `if`",
            ),
            ("start: 3", "start: expected a list of points, each a mapping of settings to values"),
            ("start: [{augment.flip: 0.5}]", "augment.flip: must be one of 0.0, 1.0, got 0.5"),
        ],
    )
    def test_each_kind(self, tmp_path: Path, line: str, fault: str) -> None:
        line = line[1:-1].replace(", ", "\n") if line.startswith("{") else line
        assert faults_of(tmp_path, f"{line}\naugment.flip: {{choice: [0, 1]}}\n") == [f"1: {fault}"]

    @pytest.mark.parametrize(
        ("point", "fault"),
        [
            ("{loss.kl: 0.5}", "start: the weights of the mixture must sum to 1, but their sum is 0.5"),
            ("{loss.kl: 2}", "loss.kl: expected a weight from 0 to 1, got 2"),
            ("{loss.l1: 1}", "loss.l1: is not in the mixture of kl, js"),
            ("{loss: kl}", "loss: a mixture in this space; give weights, such as loss.kl: 1"),
            ("{optim.lr: 1}", "optim.lr: depends on optim.name; give that in this start point, too"),
            ("{optim.lr: 1, optim.name: sgd}", "optim.lr: must lie from 0.1 to 0.5, got 1"),
            ("{augment.erase: 0.25}", "augment.erase: must lie on the grid from 0 by 0.1, got 0.25"),
            ("{augment.erase: a}", "augment.erase: must lie from 0 to 0.5, got 'a'"),
            ("{optim.warmup_epochs: 1.5}", "optim.warmup_epochs: must lie on the grid from 1 by 1, got 1.5"),
            ("{augment.grey: 0.5}", "augment.grey: is fixed to 0.25 in this space, got 0.5"),
        ],
    )
    def test_each_kind_of_start_point(self, tmp_path: Path, point: str, fault: str) -> None:
        text = f"""\
            loss: {{simplex: [kl, js]}}
            optim.name: {{choice: [adam, sgd]}}
            optim.lr: {{log_uniform: [1e-4, 1]}}
            augment.erase: {{uniform: [0, 0.5, 0.1]}}
            augment.grey: 0.25
            optim.warmup_epochs: {{int_uniform: [1, 3]}}
            when: [{{if: {{optim.name: sgd}}, optim.lr: {{uniform: [0.1, 0.5]}}}}]
            start:
              - {point}
        """
        assert faults_of(tmp_path, text) == [f"9: {fault}"]

    def test_what_only_refers_to_a_broken_setting_has_no_fault(self, tmp_path: Path) -> None:
        text = """\
            optim.name: {choose: [adam, sgd]}
            loss: {simplex: [kl, jss]}
            when: [{if: {optim.name: sgd}, optim.lr: {uniform: [0.1, 0.5]}}]
            start: [{optim.name: sgd, loss.js: 1}]
        """
        assert [fault.partition(":")[0] for fault in faults_of(tmp_path, text)] == ["1", "2"]


def test_a_long_choice_is_read_soon() -> None:
    compared = []

    class Counted(int):
        def __eq__(self, other: object) -> bool:
            compared.append(other)
            return int(self) == other

        __hash__ = int.__hash__

    values = [Counted(value) for value in range(500)]
    read_setting("train.accumulate", {"choice": values})
    assert len(compared) < 10 * len(values)


class TestTogether:
    """Settings that are valid alone must be valid together, in every branch, and only reachable ones count."""

    def test_no_false_alarm(self, tmp_path: Path) -> None:
        # Each would fail beside the defaults of the others: 32 rows a batch, 30 epochs.
        space = space_of("""
            train.accumulate: {choice: [1, 64]}
            train.batch_size: {choice: [64, 128]}
            train.epochs: 90
            optim.warmup_epochs: {uniform: [0, 60]}
        """)
        assert space.fixed_settings == {"train.epochs": 90}

    def test_what_can_be_suggested_and_fails_is_a_fault(self, tmp_path: Path) -> None:
        text = """\
            train.batch_size: {choice: [16, 128]}
            train.accumulate: {choice: [1, 32]}
            optim.warmup_epochs: 5
        """
        assert faults_of(tmp_path, text, **{"train.epochs": 5}) == [
            "2: train.accumulate: at most train.batch_size (16), got 32",
            "3: optim.warmup_epochs: less than train.epochs (5), got 5.0",
        ]

    def test_long_choices_in_several_conditions_are_read_soon(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """All values to which the same entries apply are checked by their extremes, as in a setting without `when`."""
        judged, faults_of_config = [], joint_check._faults_of
        monkeypatch.setattr(joint_check, "_faults_of", lambda config: judged.append(config) or faults_of_config(config))
        space = {
            "train.batch_size": {"choice": [*range(100, 200)]},
            "train.accumulate": {"choice": [*range(1, 101)]},
            "when": [
                {"if": {"train.batch_size": [150]}, "model.dropout": {"uniform": [0, 0.5]}},
                {"if": {"train.accumulate": [1, 2]}, "optim.lr": {"log_uniform": [1e-4, 1e-3]}},
            ],
        }
        assert len(parse_space(space).parameters) == 4
        assert len(judged) < 100
        space["train.batch_size"] = {"choice": [*range(99, 199)]}
        with pytest.raises(UserError, match=r"train.accumulate: at most train.batch_size \(99\), got 100"):
            parse_space(space)

    def test_branches_are_seen_for_themselves(self, tmp_path: Path) -> None:
        text = """\
            model.backbone: {choice: [resnet18, resnet50]}
            train.batch_size: {choice: [16, 128]}
            train.accumulate: 1
            when:
              - if: {train.batch_size: 128}
                train.accumulate: {int_log_uniform: [1, 128]}
        """
        space_of(dedent(text))
        assert faults_of(tmp_path, text.replace("{train.batch_size: 128}", "{model.backbone: resnet50}")) == [
            "6: train.accumulate: at most train.batch_size (16), got 128"
        ]

    def test_a_space_that_is_read_again_is_not_checked_anew(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A search reads its space several times, and checks a thousand configurations of it."""
        judged: list[Any] = []
        judge = RunConfig.from_flat
        monkeypatch.setattr(RunConfig, "from_flat", lambda config: judged.append(config) or judge(config))
        text = {"optim.lr": {"log_uniform": [1e-5, 1e-2]}, "model.dropout": {"uniform": [0.0, 0.123]}}
        parse_space(text)
        first = len(judged)
        parse_space(text)
        assert 0 < first == len(judged)

    def test_one_and_true_are_told_apart_where_a_space_is_read_again(self) -> None:
        parse_space({"model.pretrained": True, "optim.lr": {"uniform": [0.1, 0.2]}})
        with pytest.raises(UserError, match=r"model\.pretrained: "):
            parse_space({"model.pretrained": 1, "optim.lr": {"uniform": [0.1, 0.2]}})

    def test_weights_that_are_not_at_hand_are_a_fault_of_a_file_alone(self, tmp_path: Path) -> None:
        text = f"model.weights_dir: {tmp_path}\nmodel.backbone: {{choice: [resnet18, test_resnet]}}\n"
        for fault, name in zip(faults_of(tmp_path, text), ("resnet18", "test_resnet"), strict=True):
            assert fault.startswith(f"1: model.weights_dir: no file {tmp_path}/{name}.safetensors")
            (tmp_path / f"{name}.safetensors").touch()
        load_space(tmp_path / "a.yaml")


class TestSuggesting:
    def test_branches_have_their_own_bounds_and_names(self) -> None:
        space = space_of(WHOLE)
        vit, both = (
            "[model.backbone=vit_base_patch16_224]",
            "[model.backbone=efficientnet_b0|vit_base_patch16_224, optim.name=adamw]",
        )
        names = {"model.backbone", "model.dropout", "optim.name", "train.batch_size", "train.accumulate"}
        names |= {"augment.erase", "optim.lr", f"optim.lr {vit}", f"optim.lr {both}", f"augment.mixup {both}"}
        assert set(space.parameters) == names | {f"loss.{loss}~" for loss in LOSSES}

        study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=1))
        seen = set()
        for _ in range(200):
            trial = study.ask()
            config = space.suggest(trial)
            is_vit, is_adamw = config["model.backbone"].startswith("vit"), config["optim.name"] == "adamw"
            last = is_adamw and config["model.backbone"] in ("efficientnet_b0", "vit_base_patch16_224")
            name, low, high = (
                (f"optim.lr {both}", 1e-7, 1e-4)
                if last
                else (f"optim.lr {vit}", 1e-6, 3e-4)
                if is_vit
                else ("optim.lr", 1e-5, 3e-3)
            )
            assert trial.params[name] == config["optim.lr"]
            assert low <= config["optim.lr"] <= high
            assert sum(key.startswith("optim.lr") for key in trial.params) == 1
            assert ("augment.mixup" in config) == last
            assert (config["augment.erase"] == 0.25) == is_vit
            assert config["data.image_size"] == 96
            assert trial.distributions.items() <= space.parameters.items()
            seen.add(name)
        assert len(seen) == 3

    def test_columns_are_what_trials_can_differ_in(self) -> None:
        assert space_of(WHOLE).columns() == (
            *("model.backbone", "model.dropout", "optim.name", "optim.lr", "train.batch_size", "train.accumulate"),
            *("augment.erase", "loss.mse", "loss.l1", "loss.kl", "loss.ce", "loss.js", "augment.mixup"),
        )
        space = space_of("""
            optim.name: {choice: [adam, sgd]}
            model.pretrained: false
            train.grad_clip: 1
            loss: kl
            when: [{if: {optim.name: sgd}, model.pretrained: true, loss: {simplex: [js, mse]}}]
        """)
        assert space.columns() == ("optim.name", "model.pretrained", "loss.mse", "loss.kl", "loss.js")
        assert space.fixed_settings == {"train.grad_clip": 1.0}
        for config in samples(space, 20):
            assert set(config) == {*space.columns(), *space.fixed_settings}
            assert (config["loss.kl"] == 1) == (config["optim.name"] == "adam")

    def test_a_loss_by_name_by_choice_and_by_weights(self) -> None:
        rest = "\noptim.lr: {uniform: [1, 2]}"
        assert space_of("loss: js" + rest).fixed_settings == {"loss.js": 1.0}
        assert space_of("loss.js: 0.25\nloss.l1: 0.75" + rest).fixed_settings == {"loss.js": 0.25, "loss.l1": 0.75}
        space = space_of("loss: {choice: [kl, js]}\nstart: [{loss: js}]")
        assert space.columns() == ("loss.kl", "loss.js")
        assert space.start_points() == [{"loss": "js"}]
        configs = samples(space, 20)
        assert {tuple(config.items()) for config in configs} == {
            (("loss.kl", 1.0), ("loss.js", 0.0)),
            (("loss.kl", 0.0), ("loss.js", 1.0)),
        }

    def test_the_values_that_can_be_listed(self) -> None:
        space = space_of("""
            data.image_size: {choice: [48, 64]}
            augment.flip: 0.5
            augment.grey: {uniform: [0, 1]}
            when: [{if: {data.image_size: 64}, augment.flip: 0}]
        """)
        assert space.values_of("data.image_size") == (48, 64)
        assert space.values_of("augment.flip") == (0.5, 0.0)
        assert space.values_of("augment.grey") == space.values_of("model.backbone") == ()

    def test_what_was_suggested_follows_from_what_optuna_has_stored(self) -> None:
        space = space_of(WHOLE)
        study = optuna.create_study()
        for point in space.start_points():
            study.enqueue_trial(point)
        for _ in range(6):
            trial = study.ask()
            config = space.suggest(trial)
            study.tell(trial, 0.5)
            assert space.suggest(study.trials[trial.number]) == config

    @pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
    def test_tpe_with_groups_samples_branches(self) -> None:
        space = space_of(WHOLE)
        sampler = optuna.samplers.TPESampler(multivariate=True, group=True, n_startup_trials=4, seed=0)
        study = optuna.create_study(sampler=sampler)
        study.optimize(lambda trial: space.suggest(trial)["optim.lr"], n_trials=12)
        assert all(trial.state.is_finished() for trial in study.trials)


class TestMixture:
    space = space_of("loss: {simplex: [mse, l1, kl, ce, js]}")

    def test_weights_are_uniform_on_the_simplex(self) -> None:
        weights = np.array([list(config.values()) for config in samples(self.space, 1500)])
        assert np.allclose(weights.sum(axis=1), 1, atol=1e-9)
        assert (weights >= 0).all()
        # The flat Dirichlet distribution: mean 1/K, variance (K - 1) / (K² (K + 1)).
        assert np.allclose(weights.mean(axis=0), 1 / 5, atol=0.02)
        assert np.allclose(weights.var(axis=0), 4 / (25 * 6), rtol=0.2)

    @given(st.lists(st.one_of(st.just(0.0), st.floats(1e-6, 1)), min_size=5, max_size=5).filter(any))
    @settings(max_examples=50)
    def test_start_points_come_back(self, raw: list[float]) -> None:
        weights = {f"loss.{loss}": w / sum(raw) for loss, w in zip(LOSSES, raw, strict=True)}
        space = parse_space({**self.space.to_dict(), "start": [weights]})
        (point,) = space.start_points()
        assert all(space.parameters[name]._contains(u) for name, u in point.items())
        config = space.suggest(optuna.trial.FixedTrial(point))
        assert config.keys() == weights.keys()
        for key, weight in weights.items():
            assert config[key] == pytest.approx(weight, abs=1e-9)
            assert (config[key] == 0) == (weight == 0)
            assert math.copysign(1, config[key]) == 1
        RunConfig.from_flat(config)

    def test_the_corner_without_a_direction_is_the_middle(self) -> None:
        config = self.space.suggest(optuna.trial.FixedTrial(dict.fromkeys(self.space.parameters, 1.0)))
        assert set(config.values()) == {0.2}


_ABOVE_ZERO = ("optim.layer_decay", "optim.plateau_factor", "augment.crop_scale")


def values(key: str) -> st.SearchStrategy[Any]:
    """Valid values of a setting, epochs and batch size apart."""
    kind = SETTINGS[key].type
    if key == "model.backbone":
        return st.sampled_from(["resnet18", "test_resnet", "lcnet_050"])
    if kind is bool:
        return st.booleans()
    if kind is int:
        ends = {"data.image_size": (16, 256), "train.batch_size": (64, 512), "augment.operations": (1, 11)}
        return st.integers(*ends.get(key, (1, 50)))
    if kind is float:
        low = 1e-6 if key == "optim.lr" else 0.01 if key in _ABOVE_ZERO else 0.0
        return st.floats(low, 0.9, allow_subnormal=False)
    choices = [arg for arg in get_args(kind) if arg is not type(None)]  # None is for a setting that is left out
    return st.sampled_from(get_args(choices[0]) or choices)


@st.composite
def distributions(draw: st.DrawFn, key: str) -> dict[str, Any]:
    kind = SETTINGS[key].type
    words = ["choice"]
    if kind in (int, float) and key != "data.image_size":
        words += ["int_uniform", "int_log_uniform"] if kind is int else ["uniform", "log_uniform"]
    word = draw(st.sampled_from(words))
    found = draw(st.lists(values(key), min_size=1 if word == "choice" else 2, max_size=4, unique=True))
    if word == "choice":
        return {word: found}
    low, high = min(found), max(found)
    if "log" in word and low == 0:
        low = high / 10
    if word == "int_uniform" and draw(st.booleans()):
        return {word: [low, high, high - low]}
    return {word: [low, high]} if low < high else {"choice": [low]}


@st.composite
def spaces(draw: st.DrawFn) -> dict[str, Any]:
    keys = [key for key in SETTINGS if key not in NEVER_SEARCHED and not key.startswith("loss.")]
    chosen = draw(st.lists(st.sampled_from(keys), min_size=1, max_size=6, unique=True))
    space: dict[str, Any] = {"optim.name": {"choice": ["adam", "sgd"]}}
    for key in chosen:
        space.setdefault(key, draw(st.one_of(values(key), distributions(key))))
    names = st.lists(st.sampled_from(LOSSES), min_size=2, max_size=5, unique=True)
    loss = st.one_of(st.sampled_from(LOSSES), st.builds(lambda x: {"simplex": x}, names))
    space["loss"] = draw(loss)
    space["when"] = [
        {
            "if": {"optim.name": draw(st.sampled_from(["adam", "sgd", ["sgd", "adam"]]))},
            "loss": draw(loss),
            **{key: draw(st.one_of(values(key), distributions(key))) for key in chosen if key != "optim.name"},
        }
    ]
    return space


@given(spaces(), st.integers(0, 1000))
@settings(max_examples=40)
def test_whatever_a_valid_space_suggests_is_a_valid_configuration(mapping: dict[str, Any], seed: int) -> None:
    # What `values` gives as micro-batches and warm-up always fits these.
    fixed = {"train.epochs": 60} | ({} if "train.batch_size" in mapping else {"train.batch_size": 64})
    space = parse_space({**mapping, **fixed})
    SCHEMA.validate(mapping)
    assert parse_space(json.loads(json.dumps(space.to_dict()))) == space
    for config in samples(space, 3, seed):
        flat = RunConfig.from_flat(config).to_flat()
        assert config.items() <= flat.items()
        assert set(space.fixed_settings) | set(space.columns()) >= set(config)
        # Any suggestion, taken as a start point, comes back.
        start = {key: value for key, value in config.items() if key in space.active_settings(config)}
        start |= mixture_of(space, config)
        again = parse_space({**space.to_dict(), "start": [start]})
        study = optuna.create_study()
        study.enqueue_trial(again.start_points()[0])
        returned = again.suggest(study.ask())
        assert returned.keys() == config.keys()
        for key, value in config.items():
            assert returned[key] == (pytest.approx(value, abs=1e-9) if key.startswith("loss.") else value)


def mixture_of(space: Space, config: dict[str, Any]) -> dict[str, float]:
    loss = space.active_settings(config)["loss"][1]
    return {f"loss.{name}": config[f"loss.{name}"] for name in loss.losses} if isinstance(loss, Simplex) else {}


class TestShipped:
    def test_there_are_all(self) -> None:
        names = ["comparison", "demo", "faces", "gpu", "large", "losses", "quick", "vit"]
        assert [path.stem for path in SHIPPED] == names

    def test_comparison_searches_two_models_by_two_losses_and_nothing_else(self) -> None:
        space = load_space(SPACES / "comparison.yaml")
        assert space.columns() == ("model.backbone", "loss.mse", "loss.kl")
        assert space.values_of("model.backbone") == ("resnet18", "efficientnet_b0")
        assert space.values_of("loss") == ("mse", "kl")
        found = {(c["model.backbone"], c["loss.mse"], c["loss.kl"]) for c in samples(space, 40)}
        assert found == {(name, *one) for name in ("resnet18", "efficientnet_b0") for one in ((1.0, 0.0), (0.0, 1.0))}

    @pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
    def test_is_valid_and_suggests_configurations(self, path: Path) -> None:
        space = load_space(path, overrides={"train.epochs": 8})
        assert path.read_text().startswith("# yaml-language-server: $schema=space.schema.json\n")
        SCHEMA.validate(YAML(typ="safe", pure=True).load(path))
        for config in samples(space, 20):
            RunConfig.from_flat(config)
        study = optuna.create_study()
        for point, start in zip(space.start_points(), space.start, strict=True):
            study.enqueue_trial(point)
            config = space.suggest(study.ask())
            for key, value in start.items():
                assert config[key] == pytest.approx(value)

    def test_the_quick_one_takes_the_size_from_the_data(self) -> None:
        space = load_space(SPACES / "quick.yaml")
        assert "data.image_size" not in space.settings
        assert len(space.start) >= 2

    def test_the_schema_in_the_folder_is_that_of_the_code(self) -> None:
        kept = json.loads((SPACES / "space.schema.json").read_text())
        jsonschema.Draft7Validator.check_schema(kept)
        assert kept == json_schema(), "see search_spaces/README.md for how to write it anew"


@pytest.mark.parametrize(
    "wrong",
    [
        {"optim.lrr": 1},
        {"optim.lr": {"uniform": [0]}},
        {"optim.lr": 0},
        {"optim.lr": {"choices": [1]}},
        {"train.batch_size": {"uniform": [1, 2]}},
        {"train.epochs": {"choice": [1, 2]}},
        {"loss": {"simplex": ["mse", "l2"]}},
        {"when": [{"optim.lr": 1}]},
        {"when": [{"if": {"optim.name": "adam"}, "train.epochs": 1}]},
        {"start": [{"optim.lrr": 1}]},
    ],
)
def test_the_schema_refuses(wrong: dict[str, Any]) -> None:
    good = YAML(typ="safe", pure=True).load(WHOLE)
    SCHEMA.check_schema(SCHEMA.schema)
    SCHEMA.validate(good)
    assert not SCHEMA.is_valid({**good, **wrong})


@st.composite
def guesses(draw: st.DrawFn) -> dict[str, Any]:
    """A setting as it is or may be meant: a good half of the values is right, most lists are no words of it."""
    key = draw(st.sampled_from(["loss", *(key for key in SETTINGS if key not in NEVER_SEARCHED)]))
    right = st.sampled_from(LOSSES) if key == "loss" else values(key)
    odd: st.SearchStrategy[Any] = st.sampled_from(
        [None, True, 0, 1, 2, 0.5, -1, 1e305, 10**400, "", "light", [], {}, ["a"]]
    )
    one = st.one_of(right, right, right, odd)
    words = st.sampled_from(["choice", "choice", "uniform", "log_uniform", "int_uniform", "int_log_uniform", "simplex"])
    lists = st.one_of(
        st.lists(one, max_size=3), st.lists(right, min_size=2, max_size=2).map(lambda x: sorted(x, key=str))
    )
    return {key: draw(st.one_of(one, st.dictionaries(words, lists, min_size=1, max_size=1)))}


@given(guesses(), st.booleans())
@settings(max_examples=200)
def test_the_schema_refuses_only_what_the_parser_refuses(given: dict[str, Any], branch: bool) -> None:
    space: dict[str, Any] = {"optim.momentum": {"choice": [0.5, 0.9]}}
    space |= {"when": [{"if": {"optim.momentum": 0.5}, **given}]} if branch else given
    try:
        parse_space(space)
    except UserError:
        return
    assert SCHEMA.is_valid(space)


@pytest.mark.parametrize(("text", "said"), [(BOMB, "holds more than"), ("a: " + "[" * 1000, "is nested too deeply")])
def test_a_space_that_grows_without_end_is_refused(text, said, tmp_path):
    (tmp_path / "space.yaml").write_text(text)
    with pytest.raises(UserError, match=f"space.yaml: the search space {said}"):
        load_space(tmp_path / "space.yaml")


@pytest.mark.parametrize(
    "text",
    [
        "optim.lr: HUGE",
        "optim.name: HUGE",
        "optim.lr: {uniform: HUGE}",
        "train.batch_size: {int_uniform: [1, HUGE]}",
        "train.batch_size: {choice: [HUGE, HUGE]}",
        "augment.flip: {choice: [0, 1]}\nwhen: [{if: {augment.flip: HUGE}, optim.lr: 1}]",
        "augment.flip: {choice: [0, 1]}\nstart: [{augment.flip: HUGE}]",
    ],
)
def test_a_number_that_python_cannot_write_is_refused(text, tmp_path):
    (tmp_path / "space.yaml").write_text(text.replace("HUGE", "0x" + "f" * 5000))
    with pytest.raises(UserError, match="a number of too many digits"):
        load_space(tmp_path / "space.yaml")


def test_settings_are_plain_values_and_weights_of_losses_are_numbers():
    assert are_settings({"optim.lr": 1e-3, "model.pretrained": True, "data.classes": ["sad"], "loss.kl": 1, "x": None})
    for wrong in ({"loss.kl": "1"}, {"loss.kl": None}, {"optim.lr": 10**400}, {"x": [[1]]}, {"x": {}}, {1: 1}, []):
        assert not are_settings(wrong)
