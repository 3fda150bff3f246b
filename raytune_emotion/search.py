"""Search for the configuration that best predicts distributions over emotions: the main command."""

import argparse
import dataclasses
import functools
import importlib.util
import re
import sys
import types
from contextlib import ExitStack
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
from raytune_emotion.data.prepare import Data, find_data
from raytune_emotion.data.synthetic import sample_folder
from raytune_emotion.errors import Breakdown, UserError, collect_errors
from raytune_emotion.interruption import finish_block, import_meanwhile
from raytune_emotion.known_errors import first_line
from raytune_emotion.storage.atomic import exclusive_lock
from raytune_emotion.storage.locations import Folder, Location
from raytune_emotion.storage.nearest import RESULTS
from raytune_emotion.terminal import announce, count, plain_console, typed_command, typed_options
from raytune_emotion.tuning.execution.gpu_presence import refuse_absent_gpu
from raytune_emotion.tuning.policy.decisions import ASHA, FORECAST, FREEZE_THAW, LEARN_FROM_ENDED, SAMPLERS, SCHEDULERS
from raytune_emotion.tuning.policy.objective import DEFAULT_OBJECTIVE, OBJECTIVES
from raytune_emotion.tuning.space.library import DEFAULT, find_space, packaged_spaces
from raytune_emotion.tuning.space.space import Space
from raytune_emotion.tuning.study.continuation import check_continuation
from raytune_emotion.tuning.study.database import check_url
from raytune_emotion.tuning.study.endings import MAX_FAILURES
from raytune_emotion.tuning.study.request import AUTO, DEFAULT_EPOCHS, DEFAULT_TRIALS, NONE, SearchRequest
from raytune_emotion.tuning.study.spec import SPEC, StudySpec, spec_of

if TYPE_CHECKING:
    from raytune_emotion.library.studies import Study
    from raytune_emotion.tuning.execution.recorder import Watch
    from raytune_emotion.tuning.study.earlier import WarmStart
    from raytune_emotion.tuning.study.open_study import OpenStudy

#: The file of a study that tells that its search is over, and that its finish is what goes on.
_SEARCHED = ".searched"
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
        help=f"what proposes configurations: {', '.join(SAMPLERS)} (default: {FORECAST})",
    )
    add(
        "--scheduler",
        choices=SCHEDULERS,
        metavar="NAME",
        help=f"what decides which trials go on: {', '.join(SCHEDULERS)} (default: {FREEZE_THAW}; with the samplers "
        f"{', '.join(LEARN_FROM_ENDED)}, which learn from ended trials alone: {ASHA})",
    )
    add("--trials", type=positive_integer, metavar="N", help=f"total number of trials (default: {DEFAULT_TRIALS})")
    add(
        "--epochs",
        type=positive_integer,
        metavar="N",
        help=f"epochs of a trial that is not stopped early (default: that of the space, else {DEFAULT_EPOCHS})",
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
        f"where it fits the space, once four trials have paused or ended; {NONE}: nothing)",
    )
    add("--name", type=folder_name, metavar="NAME", help="name of the study (default: the space and the time)")
    add("--resume", action="store_true", help="continue the study --name; without a name, the newest study")
    add(
        "--storage",
        type=_database_url,
        metavar="URL",
        help="PostgreSQL database, as postgresql://HOST/DATABASE: each machine that runs this same command works on "
        "the study; needs pip install 'raytune_emotion[postgres]'",
    )
    add(
        "--seed",
        type=natural_number,
        metavar="N",
        help="seed of proposals and trials (default: that of the space, else 0)",
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
        help="log the study to this MLflow server or folder; needs pip install 'raytune_emotion[mlflow]'",
    )
    add(
        "--max-failures",
        type=natural_number,
        metavar="N",
        help="restarts of a trial whose process died, counted anew when a paused trial goes on "
        f"(default: {MAX_FAILURES})",
    )
    add_training_data_options(parser)
    add_address_option(parser)
    add(
        "--finish",
        action="store_true",
        help="then confirm, train the winner longer, combine models if that helps, and export to finished/",
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
        return
    if request.finish:
        request.results.require_folder("leave --finish out, or name a folder with --results")
    with announce("reading the study" if request.resume else "reading the search space and the data"):
        place = request.find_study()
        if request.joins(place):
            request = dataclasses.replace(request, resume=True)
        if request.resume:
            _check_resumed(request, place)
        new = None if request.resume else _check_new(request, place)
        is_searched = _goes_on_with_finish(request, place)
    if is_searched:
        _take_over(request, place)
    else:
        _search(request, place, new)
    if request.finish:
        _finish(request, place)


def _goes_on_with_finish(request: SearchRequest, place: Location) -> bool:
    """Tell whether a study is to go on with its finish, not with its search.

    So it is once a search with --finish is over, unless more of it is asked for. Otherwise the command that goes on
    after one with a time budget would first search on without a limit.
    """
    more = (request.trials, request.epochs, request.time_budget, request.until_gain)
    if not request.resume or not request.finish or any(limit is not None for limit in more):
        return False
    return place.read(_SEARCHED) is not None


def _take_over(request: SearchRequest, place: Location) -> None:
    """Give a study what it is asked to go on with, such as where its data are now, and search no further."""
    with ExitStack() as held:
        study, spec = _prepare(request, place, None, held)
        from raytune_emotion.tuning.study.open_study import go_on

        assert study is not None
        study = go_on(study, spec)
        left = "" if study.is_over() else ", without the trials that are left"
    plain_console().print(
        f"study {place}: its search is over, so its finish goes on{left}; to search on, add --trials, --epochs, "
        f"--time-budget or --until-gain"
    )
    if request.mlflow is not None:
        plain_console().print("--mlflow: logs a search, and is passed over here")
    if request.gpus_per_worker == AUTO:
        plain_console().print(f"--gpus-per-worker {AUTO}: measures for a search, and is passed over here")


def _finish(request: SearchRequest, place: Location) -> None:
    """Finish a study that has been searched; where this is broken off, say what to type."""
    folder = place.require_folder("leave --finish out, or name a folder with --results").absolute()
    try:
        from raytune_emotion.confirm import confirm_study
        from raytune_emotion.tuning.report.finish import finish_study

        finish_study(folder, request.address, functools.partial(confirm_study, advise=False))
    except (KeyboardInterrupt, Breakdown, UserError):
        options = typed_options(results=folder.parent, name=folder.name, address=request.address)
        plain_console().print(f"to go on: {typed_command('search')} --resume --finish{options}")
        raise


def _check_resumed(request: SearchRequest, place: Location) -> None:
    """Look at all that a study is asked for that goes on, as far as that takes no time.

    Raises:
        UserError: with every error at once.
    """
    errors: list[str] = []
    with collect_errors(errors):
        check_continuation(request, place)
    with collect_errors(errors):
        request.check_storage()
    with collect_errors(errors):
        _check_mlflow(request)
    with collect_errors(errors):
        refuse_absent_gpu(request.gpus_per_worker, request.address)
    with collect_errors(errors):
        _check_address(request)
    folder = place.working_folder()
    if not errors and folder.is_dir() and spec_of(place).storage is None:
        # Locked for good when it is opened: here only so that no Ray starts beside that of the process at work. A
        # study in a database has no such lock, and drivers that look at the same moment would refuse each other.
        with collect_errors(errors), exclusive_lock(folder):
            pass
    if errors:
        # Looked at again when the study is open: here only so that all errors are told at once.
        if request.data is not None:
            with collect_errors(errors):
                find_data(request.data)
        raise UserError(errors)


def _check_new(request: SearchRequest, place: Location) -> "_NewStudy":
    """Look at all that a new study is asked for, as far as that takes no time.

    Raises:
        UserError: with every error at once.
    """
    errors: list[str] = []
    with collect_errors(errors):
        request.results.check(write=True)
        if place.exists():
            found = "a study of this name already; go on with it by --resume, or choose another"
            other = "something of this name that is no study; choose another name"
            raise UserError(f"{place}: there is {found if place.read(SPEC) is not None else other}")
    with collect_errors(errors):
        _check_room(request)
    with collect_errors(errors):
        _check_mlflow(request)
    with collect_errors(errors):
        request.check_storage()
    with collect_errors(errors):
        request.check_until_gain(request.objective or DEFAULT_OBJECTIVE)
    return _inputs(request, errors)


@dataclasses.dataclass(frozen=True)
class _NewStudy:
    """What a new study begins with."""

    space: Space
    data: Data
    warm_start: "WarmStart"


def _inputs(request: SearchRequest, errors: list[str]) -> _NewStudy:
    """Read what a new study begins with; what is wrong is raised with the errors that are known."""
    space = Space({})
    with collect_errors(errors):
        space = request.load_space()
    if request.data is not None:
        with collect_errors(errors):
            data = find_data(request.data)
    with collect_errors(errors):
        request.check_warm_start()
        if request.earlier_studies or not errors:
            # Imported only now, as what is imported below: it takes seconds.
            from raytune_emotion.tuning.study.earlier import gather_warm_start

            warm_start = gather_warm_start(request, space)
    if errors:
        raise UserError(errors)
    return _NewStudy(space, data if request.data is not None else find_data(sample_folder()), warm_start)


def _check_address(request: SearchRequest) -> None:
    if request.address is not None:
        from raytune_emotion.tuning.execution.cluster import check_cluster

        check_cluster(request.address)


def _check_room(request: SearchRequest) -> None:
    """Check that the cluster answers; or, where Ray is to be started here, that this machine has room for a trial."""
    if request.address is not None:
        _check_address(request)
        return
    from raytune_emotion.tuning.execution.placement import check_room

    check_room(request)


def _dry_run(request: SearchRequest) -> None:
    errors = ["--resume: --dry-run shows what a new study would do; leave one of them out"] if request.resume else []
    new = _inputs(request, errors)
    from raytune_emotion.tuning.report.dry_run import show_dry_run

    show_dry_run(plain_console(), request, new.space, new.data, new.warm_start)


#: What takes seconds to be imported, in the order in which a search needs it.
_SLOW = ("raytune_emotion.tuning.study.creation", "raytune_emotion.tuning.report.conclusion")


def _search(request: SearchRequest, place: Location, new: _NewStudy | None) -> None:
    """Run a study: a new one, or one that goes on.

    Ray of this machine starts first, and PyTorch is loaded meanwhile: each takes seconds.
    """
    from raytune_emotion.tuning.execution.cluster import open_session
    from raytune_emotion.tuning.execution.cluster_watch import ClusterLost

    console = plain_console()
    # Until all is written, the study's folder is this process's alone, or this process one of its drivers.
    with ExitStack() as held:
        held.enter_context(import_meanwhile(*_SLOW))
        # A cluster is joined last: to pack may take hours, and nobody watches meanwhile whether it lives.
        prepared = _prepare(request, place, new, held) if request.address is not None else None
        study, begun, ended = None, False, None
        try:
            with open_session(request.address, place.name) as cluster:
                study, spec = prepared or _prepare(request, place, new, held)
                from raytune_emotion.tuning.execution.cluster_nodes import fit_to_cluster
                from raytune_emotion.tuning.execution.gpu_sharing import fastest_share
                from raytune_emotion.tuning.report.console import run_with_progress
                from raytune_emotion.tuning.report.summary import ALL_TRIED
                from raytune_emotion.tuning.study.open_study import go_on
                from raytune_emotion.tuning.study.optuna_study import trials_to_continue

                if request.gpus_per_worker == AUTO:
                    share = fastest_share(spec, cluster, console.print)
                    spec = dataclasses.replace(spec, gpus_per_worker=share)
                searched = new or study
                assert searched is not None
                placement = fit_to_cluster(
                    workers=spec.workers_per_trial,
                    gpus_per_worker=spec.gpus_per_worker,
                    concurrency=spec.concurrency,
                    fp16="fp16" in searched.space.values_of("train.precision"),
                )
                if study is None:
                    assert new is not None
                    study = _make_or_join(request, place, spec, new, held)
                else:
                    study = go_on(study, spec)
                trials = f"{count(study.spec.trials, 'trial')} of {count(spec.epochs, 'epoch')}"
                console.print(f"study {place}: {trials}, {placement}")
                if new is not None and new.warm_start.gathered is not None:
                    console.print(f"the search is guided by {new.warm_start.told}")
                if longer := sorted(trials_to_continue(study.optuna)):
                    console.print(f"{', '.join(longer)}: trained on to epoch {spec.epochs}, each as a new trial")
                if study.is_over():
                    total = count(study.spec.trials, "trial")
                    why = ALL_TRIED if study.has_tried_all() else f"ask for more than {total} with --trials"
                    console.print(f"every trial has ended, and nothing is left to run; {why}")
                begun = True
                (study.folder / _SEARCHED).unlink(missing_ok=True)
                run_with_progress(
                    console,
                    study,
                    placement,
                    time_budget=request.time_budget,
                    until_gain=request.until_gain,
                    failure=cluster.failure,
                    watches=_other_watches(request, study, held),
                )
                if request.finish and any(record.best for record in study.records()):
                    (study.folder / _SEARCHED).touch()
        except (KeyboardInterrupt, ClusterLost) as why:
            if not begun:
                raise
            ended = why
        assert study is not None
        with finish_block(), study.drivers.turn("files"):
            _conclude(request, study)
        if ended is not None:
            raise ended


def _prepare(
    request: SearchRequest, place: Location, new: _NewStudy | None, held: ExitStack
) -> "tuple[OpenStudy | None, StudySpec]":
    """Pack the data of a new study; or open one that goes on, until `held` ends. With the spec of either."""
    with announce("loading PyTorch"):
        from raytune_emotion.tuning.study.creation import new_spec, open_existing, resumed_spec

    if new is not None:
        return None, new_spec(request, place.name, new.space, new.data)
    study = open_existing(place, held)
    return study, resumed_spec(request, study, _obstacles(request, study))


def _conclude(request: SearchRequest, study: "OpenStudy") -> None:
    """Write what came out, and say it.

    Raises:
        Breakdown: a package that this needs cannot be imported. The study is whole.
    """
    try:
        from raytune_emotion.tuning.report.conclusion import conclude
    except Exception as error:
        options = typed_options(results=request.results, name=study.copy.location.typed_name, address=request.address)
        raise Breakdown(
            f"{study.copy}: is recorded, but its export and its page cannot be made ({first_line(error)}); once they "
            f"can, `{typed_command('search')} --resume{options}` makes them"
        ) from error
    conclude(plain_console(), study, request.results, request.address)


def _obstacles(request: SearchRequest, study: "OpenStudy") -> list[str]:
    """List what keeps a study from being exported, or finished, at the end."""
    from raytune_emotion.learn.export_folder import check_replaceable
    from raytune_emotion.tuning.report.finish import FINISHED
    from raytune_emotion.tuning.study.confirmation import confirmation_before

    found: list[str] = []
    for name in ("best", FINISHED) if request.finish else ("best",):
        with collect_errors(found):
            check_replaceable(Folder(study.folder / name))
    if request.finish:
        with collect_errors(found):
            confirmation_before(study.folder, request.epochs or study.spec.epochs)
    return found


def _make_or_join(
    request: SearchRequest, place: Location, spec: "StudySpec", new: _NewStudy, held: ExitStack
) -> "OpenStudy":
    """Make a study, and open it until `held` ends; join it where another driver has made it meanwhile."""
    from raytune_emotion.tuning.study.creation import open_existing, resumed_spec
    from raytune_emotion.tuning.study.open_study import go_on, make_study, open_study

    folder = place.working_folder()
    place.free_working_folder()
    try:
        make_study(folder, spec, new.warm_start.gathered)
    except UserError:
        if not request.joins(place):
            raise
        study = open_existing(place, held)
        return go_on(study, resumed_spec(request, study, []))
    return held.enter_context(open_study(folder, place))


def _other_watches(request: SearchRequest, study: "OpenStudy", held: ExitStack) -> "list[Watch]":
    """Begin what else is told of a study, until its export is written."""
    if request.mlflow is None:
        return []
    from raytune_emotion.tuning.report.mlflow_log import mlflow_log

    return [held.enter_context(mlflow_log(request.mlflow, study))]


def _check_mlflow(request: SearchRequest) -> None:
    # Asked without an import, which takes seconds.
    if request.mlflow is not None and importlib.util.find_spec("mlflow") is None:
        raise UserError(
            "--mlflow: the package mlflow is missing; install it with pip install 'raytune_emotion[mlflow]'"
        )


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
    """Let `from raytune_emotion import search` be a function: this module shares its name with that of the library."""

    def __call__(self, *args: Any, **options: Any) -> "Study":
        # Imported only now: the command has no use for it, and it takes seconds.
        from raytune_emotion.library import studies

        return studies.search(*args, **options)

    @property
    def __doc__(self) -> str | None:  # type: ignore[override]
        from raytune_emotion.library import studies

        return studies.search.__doc__


sys.modules[__name__].__class__ = _CallableModule

if __name__ == "__main__":
    sys.exit(command_main("search"))
