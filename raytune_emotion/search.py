"""Search for the configuration that best predicts distributions over emotions: the main command."""

import argparse
import re
import sys
import types
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raytune_emotion.cli import (
    add_address_option,
    add_training_data_options,
    command_main,
    folder_name,
    gpu_share,
    local_path,
    location,
    natural_number,
    positive_integer,
)
from raytune_emotion.errors import UserError
from raytune_emotion.storage.locations import Folder, Location
from raytune_emotion.storage.nearest import RESULTS
from raytune_emotion.terminal import plain_console
from raytune_emotion.tuning.policy.decisions import DEFAULT_SCHEDULERS, FORECAST, FREEZE_THAW, SAMPLERS, SCHEDULERS
from raytune_emotion.tuning.policy.objective import DEFAULT_OBJECTIVE, OBJECTIVES
from raytune_emotion.tuning.session.run_search import run_search
from raytune_emotion.tuning.session.search_inputs import check_options, read_inputs
from raytune_emotion.tuning.space.library import DEFAULT, find_space, packaged_spaces
from raytune_emotion.tuning.study.database import check_url
from raytune_emotion.tuning.study.endings import MAX_FAILURES
from raytune_emotion.tuning.study.request import AUTO, DEFAULT_EPOCHS, DEFAULT_TRIALS, NONE, SearchRequest

if TYPE_CHECKING:
    from raytune_emotion.library.studies import Study

_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--data",
        type=location,
        metavar="DIR",
        help="AffectNetFused folder, table of faces (.csv, .parquet) or packed store, as a path or URI "
        "(default: the built-in sample)",
    )
    add(
        "--space",
        type=_space_file,
        metavar="SPACE",
        help=f"search space: {', '.join(packaged_spaces())}, or a YAML file (default: {DEFAULT})",
    )
    add(
        "--objective",
        choices=OBJECTIVES,
        metavar="WHAT",
        help=f"objective: {', '.join(map(repr, OBJECTIVES))} (default: {DEFAULT_OBJECTIVE!r})",
    )
    add(
        "--sampler",
        choices=SAMPLERS,
        metavar="NAME",
        help=f"sampler, which proposes configurations: {', '.join(SAMPLERS)} (default: {FORECAST})",
    )
    add(
        "--scheduler",
        choices=SCHEDULERS,
        metavar="NAME",
        help=f"scheduler, which decides which trials continue: {', '.join(SCHEDULERS)} (default: {FREEZE_THAW}; "
        f"{', '.join(f'with {sampler}: {name}' for sampler, name in DEFAULT_SCHEDULERS.items())})",
    )
    add("--trials", type=positive_integer, metavar="N", help=f"total number of trials (default: {DEFAULT_TRIALS})")
    add(
        "--epochs",
        type=positive_integer,
        metavar="N",
        help=f"epochs of a trial that is not stopped early (default: the value of the space, else {DEFAULT_EPOCHS})",
    )
    add("--concurrency", type=positive_integer, metavar="N", help="trials at the same time (default: as many as fit)")
    add(
        "--workers-per-trial",
        type=positive_integer,
        metavar="N",
        help="processes that train one trial together (default: 1)",
    )
    add(
        "--gpus-per-worker",
        type=_gpu_share_or_auto,
        metavar="X",
        help=f"GPUs per worker: 0, a fraction, 1, or {AUTO} for the fastest share (default: 1 if there are GPUs)",
    )
    _add_study_arguments(parser)


def _add_study_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--results",
        type=location,
        default=Folder(RESULTS),
        metavar="DIR",
        help="folder of the studies, or a URI such as s3://bucket/prefix (default: ray_results)",
    )
    add(
        "--warm-start",
        type=_earlier_study,
        nargs="+",
        metavar="STUDY",
        help="earlier studies, of the same or other data, that guide the search (default: the portfolio of the package "
        f"if it fits the space, once four trials have paused or ended; {NONE}: nothing)",
    )
    add("--name", type=folder_name, metavar="NAME", help="name of the study (default: the space and the time)")
    add("--resume", action="store_true", help="continue the study --name; without a name, the newest study")
    add(
        "--storage",
        type=_database_url,
        metavar="URL",
        help="PostgreSQL database, as postgresql://HOST/DATABASE: all machines that run this same command share the "
        "study; needs pip install 'raytune_emotion[postgres]'",
    )
    add(
        "--seed",
        type=natural_number,
        metavar="N",
        help="seed of proposals and trials (default: the value of the space, else 0)",
    )
    add(
        "--time-budget",
        type=_duration,
        metavar="T",
        help="stop after this time, such as 90m, 2h or 1d; --resume continues the study",
    )
    add(
        "--until-gain",
        type=_gain,
        metavar="G",
        help="stop once further training is expected to lower the JS by less than this, such as 0.001/h (bits an "
        "hour); --resume continues the study",
    )
    add(
        "--mlflow",
        metavar="URI",
        help="log the study to this MLflow server; needs pip install 'raytune_emotion[mlflow]'",
    )
    add(
        "--max-failures",
        type=natural_number,
        metavar="N",
        help="restarts of a trial whose process died, counted from 0 again after each new report "
        f"(default: {MAX_FAILURES})",
    )
    add_training_data_options(parser)
    add_address_option(parser)
    add(
        "--finish",
        action="store_true",
        help="afterwards confirm, train the winner longer, combine models if that helps, and export to finished/",
    )
    add(
        "--dry-run",
        action="store_true",
        help="show the space, ten configurations and the training speed; start nothing",
    )


def run(args: argparse.Namespace) -> None:
    request = SearchRequest(**vars(args))
    if request.dry_run:
        _dry_run(request)
    else:
        run_search(request)


def _dry_run(request: SearchRequest) -> None:
    errors = ["--resume: --dry-run shows what a new study would do; leave one of them out"] if request.resume else []
    check_options(request, errors)
    new = read_inputs(request, errors)
    # Imported only now: it takes seconds.
    from raytune_emotion.tuning.report.dry_run import show_dry_run

    show_dry_run(plain_console(), request, new.space, new.data, new.warm_start)


def _gpu_share_or_auto(text: str) -> float | str:
    return AUTO if text == AUTO else gpu_share(text)


def _earlier_study(text: str) -> Location | str:
    return NONE if text == NONE else location(text)


def _database_url(text: str) -> str:
    try:
        return check_url(text)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _space_file(text: str) -> Path:
    try:
        return find_space(str(local_path(text)))
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error).removeprefix("--space ")) from None


def _duration(text: str) -> timedelta:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd])", text)
    try:
        length = timedelta(**{_UNITS[found[2]]: float(found[1])}) if found else timedelta()
    except OverflowError:
        length = timedelta()
    if not length:
        raise argparse.ArgumentTypeError(f"expected a time such as 90m, 2h or 1d, got {text!r}")
    return length


def _gain(text: str) -> float:
    found = re.fullmatch(r"(\d+(?:\.\d*)?(?:[eE]-?\d+)?)/h", text)
    gain = float(found[1]) if found else 0.0
    if not 0 < gain < float("inf"):
        raise argparse.ArgumentTypeError(f"expected bits per hour such as 0.001/h, got {text!r}")
    return gain


class _CallableModule(types.ModuleType):
    """Make this module callable, because the library's function `search` has the same name."""

    def __call__(self, *args: Any, **options: Any) -> "Study":
        # Imported only now: it takes seconds, and the command does not need it.
        from raytune_emotion.library import studies

        return studies.search(*args, **options)

    @property
    def __doc__(self) -> str | None:  # type: ignore[override]
        from raytune_emotion.library import studies

        return studies.search.__doc__


sys.modules[__name__].__class__ = _CallableModule

if __name__ == "__main__":
    sys.exit(command_main("search"))
