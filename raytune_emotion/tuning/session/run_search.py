"""Run a search from the request to what came out of it, and finish the study if that is asked for.

Ray of this machine starts first, and PyTorch is loaded meanwhile: each takes seconds. So what is slow to import is
imported where it is needed.
"""

import dataclasses
import json
from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING

from raytune_emotion.errors import Breakdown, UserError
from raytune_emotion.interruption import finish_block, import_meanwhile
from raytune_emotion.known_errors import first_line
from raytune_emotion.storage.atomic import write_text
from raytune_emotion.storage.json_text import load_json
from raytune_emotion.storage.locations import Location
from raytune_emotion.terminal import announce, count, plain_console, typed_command, typed_options
from raytune_emotion.tuning.session.search_inputs import NewStudy, check_new, check_resumed, list_obstacles
from raytune_emotion.tuning.space.space import Space
from raytune_emotion.tuning.study.request import AUTO, SearchRequest
from raytune_emotion.tuning.study.spec import StudySpec, spec_of

if TYPE_CHECKING:
    from raytune_emotion.tuning.execution.recorder import Watch
    from raytune_emotion.tuning.study.open_study import OpenStudy

#: The file of a study whose search is over, so that its finish goes on. It holds the limits that ended the search.
_SEARCHED = ".searched"
#: What takes seconds to be imported, in the order in which a search needs it.
_SLOW = ("raytune_emotion.tuning.study.creation", "raytune_emotion.tuning.report.conclusion")


def run_search(request: SearchRequest) -> None:
    """Run a search, and finish the study if that is asked for.

    Raises:
        UserError: something is wrong with what is asked for: one sentence for each error.
        Breakdown: the study broke off, and can be resumed.
        KeyboardInterrupt: it was interrupted, and can be resumed.
    """
    if request.finish:
        request.results.require_folder("leave --finish out, or name a folder with --results")
    with announce("reading the study" if request.resume else "reading the search space and the data"):
        place = request.find_study()
        if request.joins(place):
            request = dataclasses.replace(request, resume=True)
        if request.resume:
            check_resumed(request, place)
        new = None if request.resume else check_new(request, place)
        is_searched = _is_searched(request, place)
    if is_searched:
        _take_over(request, place)
    else:
        _search(request, place, new)
    if request.finish:
        _finish(request, place)


def _limits(request: SearchRequest) -> dict[str, float]:
    """Return the limits of a search that its study does not know, by their names."""
    budget = request.time_budget
    limits = {"time_budget": budget.total_seconds() if budget else None, "until_gain": request.until_gain}
    return {name: limit for name, limit in limits.items() if limit is not None}


def _is_searched(request: SearchRequest, place: Location) -> bool:
    """Tell whether a study is to go on with its finish, because its search is over and no more of it is asked for.

    The limits that ended the search are no more of it: the same command goes on, with `--resume` added.
    """
    text = place.read(_SEARCHED) if request.resume and request.finish else None
    if text is None:
        return False
    spec = spec_of(place)
    try:
        ended_by = dict(load_json(text))
    except (TypeError, ValueError):  # whatever somebody has written there
        ended_by = {}
    if (request.trials or 0) > spec.trials or (request.epochs or 0) > spec.epochs:
        return False
    return all(ended_by.get(name) == limit for name, limit in _limits(request).items())


def _take_over(request: SearchRequest, place: Location) -> None:
    """Give a study what it is asked to go on with, such as where its data are now, and search no further."""
    with ExitStack() as held:
        prepared = _prepare_resumed(request, place, held)
        study = prepared.open_with(prepared.spec)
        left = "" if study.is_over() else ", without the trials that are left"
        plain_console().print(
            f"study {place}: its search is over, so its finish goes on{left}; to search on, ask for more by --trials, "
            f"--epochs, --time-budget or --until-gain"
        )
        if request.mlflow is not None:
            plain_console().print("--mlflow: logs a search, and is passed over here")
        if request.gpus_per_worker == AUTO:
            plain_console().print(f"--gpus-per-worker {AUTO}: measures for a search, and is passed over here")
        # A process that was killed after the search may have left neither page nor export.
        _conclude(request, study)


def _finish(request: SearchRequest, place: Location) -> None:
    """Finish a study that has been searched; where this is broken off, say what to type."""
    folder = place.require_folder("leave --finish out, or name a folder with --results").absolute()
    try:
        from raytune_emotion.tuning.session.finish import finish_study

        finish_study(folder, request.address)
    except (KeyboardInterrupt, Breakdown, UserError):
        options = typed_options(results=folder.parent, name=folder.name, address=request.address)
        plain_console().print(f"to go on: {typed_command('search')} --resume --finish{options}")
        raise


@dataclasses.dataclass(frozen=True)
class _Prepared:
    """A study that is about to run."""

    spec: StudySpec
    space: Space
    open_with: "Callable[[StudySpec], OpenStudy]"  # opens it with a spec; a new study is made then
    guide: str | None  # what guides the search of a new study, for people


def _search(request: SearchRequest, place: Location, new: NewStudy | None) -> None:
    """Run a study: a new one, or one that goes on."""
    from raytune_emotion.tuning.execution.cluster import open_session
    from raytune_emotion.tuning.execution.cluster_watch import ClusterLost

    # Until all is written, the study's folder is this process's alone, or this process one of its drivers.
    with ExitStack() as held:
        held.enter_context(import_meanwhile(*_SLOW))

        def prepare() -> _Prepared:
            return _prepare_resumed(request, place, held) if new is None else _prepare_new(request, place, new, held)

        # A cluster is joined last: to pack may take hours, and nobody watches meanwhile whether it lives.
        prepared = prepare() if request.address is not None else None
        study: OpenStudy | None = None
        ended: BaseException | None = None
        try:
            with open_session(request.address, place.name) as cluster:
                prepared = prepared or prepare()
                from raytune_emotion.tuning.execution.cluster_nodes import fit_to_cluster
                from raytune_emotion.tuning.execution.gpu_sharing import fastest_share
                from raytune_emotion.tuning.execution.runner import StudyRun
                from raytune_emotion.tuning.session.console_run import run_with_progress

                console, spec = plain_console(), prepared.spec
                if request.gpus_per_worker == AUTO:
                    share = fastest_share(spec, cluster, console.print)
                    spec = dataclasses.replace(spec, gpus_per_worker=share)
                placement = fit_to_cluster(
                    workers=spec.workers_per_trial,
                    gpus_per_worker=spec.gpus_per_worker,
                    concurrency=spec.concurrency,
                    fp16="fp16" in prepared.space.values_of("train.precision"),
                )
                study = prepared.open_with(spec)
                (study.folder / _SEARCHED).unlink(missing_ok=True)
                console.print(
                    f"study {place}: {count(study.spec.trials, 'trial')} of {count(spec.epochs, 'epoch')}, {placement}"
                )
                for line in _describe_start(study, prepared.guide):
                    console.print(line)
                run = StudyRun(study, placement, request.time_budget, request.until_gain, failure=cluster.failure)
                run_with_progress(console, run, _other_watches(request, study, held))
                if request.finish and any(record.best for record in study.records()):
                    write_text(study.folder / _SEARCHED, json.dumps(_limits(request)))
        except (KeyboardInterrupt, ClusterLost) as why:
            if study is None:
                raise
            ended = why
        assert study is not None
        _conclude(request, study)
        if ended is not None:
            raise ended


def _prepare_new(request: SearchRequest, place: Location, new: NewStudy, held: ExitStack) -> _Prepared:
    """Pack the data of a new study. It is made only when it is opened, which it is until `held` ends."""
    with announce("loading PyTorch"):
        from raytune_emotion.tuning.study.creation import new_spec

    def make_or_join(spec: StudySpec) -> "OpenStudy":
        """Make the study; join it where another driver has made it meanwhile."""
        from raytune_emotion.tuning.study.open_study import make_study, open_study

        folder = place.working_folder()
        place.free_working_folder()
        try:
            make_study(folder, spec, new.warm_start.gathered)
        except UserError:
            if not request.joins(place):
                raise
            joined = _prepare_resumed(request, place, held)
            return joined.open_with(joined.spec)
        return held.enter_context(open_study(folder, place))

    guide = new.warm_start.told if new.warm_start.gathered is not None else None
    return _Prepared(new_spec(request, place.name, new.space, new.data), new.space, make_or_join, guide)


def _prepare_resumed(request: SearchRequest, place: Location, held: ExitStack) -> _Prepared:
    """Open a study that goes on, until `held` ends, and check what it is asked for."""
    with announce("loading PyTorch"):
        from raytune_emotion.tuning.study.creation import open_existing, resumed_spec
        from raytune_emotion.tuning.study.open_study import go_on

    study = open_existing(place, held)
    spec = resumed_spec(request, study, list_obstacles(request, study))
    return _Prepared(spec, study.space, lambda spec: go_on(study, spec), None)


def _describe_start(study: "OpenStudy", guide: str | None) -> list[str]:
    """Say what guides a search, and what is left to run of a study that goes on."""
    from raytune_emotion.tuning.report.summary import ALL_TRIED
    from raytune_emotion.tuning.study.optuna_study import trials_to_continue

    lines = [f"the search is guided by {guide}"] if guide is not None else []
    if longer := sorted(trials_to_continue(study.optuna)):
        lines.append(f"{', '.join(longer)}: trained on to epoch {study.spec.epochs}, each as a new trial")
    if study.is_over():
        total = count(study.spec.trials, "trial")
        why = ALL_TRIED if study.has_tried_all() else f"ask for more than {total} with --trials"
        lines.append(f"every trial has ended, and nothing is left to run; {why}")
    return lines


def _conclude(request: SearchRequest, study: "OpenStudy") -> None:
    """Write what came out, and say it.

    Raises:
        Breakdown: a package that this needs cannot be imported. The study is whole.
    """
    with finish_block(), study.drivers.turn("files"):
        try:
            from raytune_emotion.tuning.report.conclusion import conclude
        except Exception as error:
            name = study.copy.location.typed_name
            options = typed_options(results=request.results, name=name, address=request.address)
            raise Breakdown(
                f"{study.copy}: is recorded, but its export and its page cannot be made ({first_line(error)}); once "
                f"they can, `{typed_command('search')} --resume{options}` makes them"
            ) from error
        conclude(plain_console(), study, request.results, request.address)


def _other_watches(request: SearchRequest, study: "OpenStudy", held: ExitStack) -> "list[Watch]":
    """Begin what else is told of a study, until its export is written."""
    if request.mlflow is None:
        return []
    from raytune_emotion.tuning.report.mlflow_log import mlflow_log

    return [held.enter_context(mlflow_log(request.mlflow, study))]
