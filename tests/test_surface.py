"""What other people's scripts, files and habits rely on, as it is: whoever changes it changes this table too."""

import argparse
import importlib

import pytest

from raytune_emotion.cli import COMMANDS
from raytune_emotion.config import SETTINGS
from raytune_emotion.emotions import EMOTIONS
from raytune_emotion.learn import export_files, report, run_folder
from raytune_emotion.tuning.report import page
from raytune_emotion.tuning.study import confirmation, optuna_study, spec, tables, trials
from tests.support.surface import COLUMNS, FILES

#: Positional arguments in capitals, as help shows them; options; of these, those that take no value with a bare name.
ARGUMENTS = {
    "search": (
        "--data DIR", "--space SPACE", "--objective WHAT", "--sampler NAME", "--scheduler NAME", "--trials N",
        "--epochs N", "--concurrency N", "--workers-per-trial N", "--gpus-per-worker X", "--results DIR",
        "--warm-start STUDY", "--name NAME", "--resume", "--storage URL", "--seed N", "--time-budget T",
        "--until-gain G", "--mlflow URI", "--max-failures N",
        "--weights-dir DIR", "--skip-bad",
        "--address ADDRESS", "--finish", "--dry-run",
    ),
    "status": ("STUDY", "--json", "--watch SECONDS"),
    "confirm": (
        "STUDY", "--top K", "--seeds N", "--concurrency N", "--workers-per-trial N", "--gpus-per-worker X",
        "--address ADDRESS",
    ),
    "pack": ("SRC", "DEST", "--image-size N", "--skip-bad", "--classes A,B,C", "--check", "--address ADDRESS"),
    "train": (
        "--data DIR", "--set KEY=VALUE", "--config FILE", "--study DIR", "--trial ID", "--epochs N", "--seed N",
        "--workers N", "--gpus-per-worker X", "--results DIR", "--name NAME", "--resume", "--weights-dir DIR",
        "--skip-bad", "--address ADDRESS",
    ),
    "report": ("STUDY",),
    "export": ("STUDY", "DEST", "--trial ID", "--ensemble K", "--soup", "--format A,B"),
    "predict": ("EXPORT", "IMAGE", "--format NAME", "--mirror", "--address ADDRESS", "--device NAME"),
    "demo": ("EXPORT", "--port N"),
}  # fmt: skip

STATUSES = {"complete", "pruned", "failed", "running"}

NAMES_OF_SETTINGS = """
    data.image_size data.classes
    model.backbone model.pretrained model.weights_dir model.dropout model.drop_path model.freeze_epochs
    loss.mse loss.l1 loss.kl loss.ce loss.js
    optim.name optim.lr optim.weight_decay optim.momentum optim.schedule optim.warmup_epochs optim.layer_decay
    optim.plateau_patience optim.plateau_factor
    train.batch_size train.accumulate train.epochs train.evals_per_epoch train.patience train.grad_clip train.ema_decay
    train.balance train.smoothing train.precision train.compile train.seed
    augment.recipe augment.flip augment.crop_scale augment.colour augment.grey augment.erase
    augment.operations augment.magnitude augment.mixup augment.cutmix
"""

CLASSES = (
    "neutral", "happy", "sad", "surprised", "fear", "disgust", "angry", "contempt", "serene", "contemplative",
    "secure", "untroubled", "quiet",
)  # fmt: skip


def arguments_of(verb: str) -> tuple[str, ...]:
    parser = argparse.ArgumentParser(add_help=False)
    importlib.import_module(f"raytune_emotion.{verb}").add_arguments(parser)
    shown = []
    for action in parser._actions:
        names = [*action.option_strings, *([action.metavar] if action.nargs != 0 else [])]
        assert all(isinstance(name, str) for name in names), f"{action.dest} has no metavar"
        assert action.help, f"{action.dest} is not explained"
        shown.append(" ".join(names))
    return tuple(shown)


def test_the_commands():
    assert set(COMMANDS) == set(ARGUMENTS)


@pytest.mark.parametrize("verb", ARGUMENTS)
def test_the_arguments_of_a_command(verb):
    assert arguments_of(verb) == ARGUMENTS[verb]


def test_the_files():
    assert FILES["study"] == (spec.SPEC, optuna_study.JOURNAL, tables.TRIALS, tables.CURVES, page.REPORT)
    weights = (run_folder.LAST, run_folder.BEST, run_folder.PREDICTIONS)
    assert FILES["trial"] == (trials.PARAMS, trials.DATA, run_folder.HISTORY, *weights)
    assert FILES["confirmation"] == (confirmation.CONFIRMED, confirmation.CONFIRMED_TABLE)
    assert FILES["export"] == (export_files.WEIGHTS, export_files.CONFIG, export_files.METRICS, export_files.CARD)
    assert export_files.FORMATS == {"timm": "model.safetensors", "onnx": "model.onnx", "pt2": "model.pt2"}


def test_the_first_columns_and_the_statuses_of_the_table():
    assert tables._FIRST_COLUMNS == COLUMNS
    assert set(optuna_study._STATES) == STATUSES
    assert report.OBJECTIVE == "best_val_js"


def test_the_settings():
    assert list(SETTINGS) == NAMES_OF_SETTINGS.split()


def test_the_classes_and_their_order():
    assert EMOTIONS == CLASSES
