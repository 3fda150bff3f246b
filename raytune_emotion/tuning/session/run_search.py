"""Run a search from the request to its conclusion, and finish the study with `--finish`.

A local Ray starts first, and PyTorch is imported meanwhile, because each takes seconds. For the same reason, slow
imports are in the functions that need them.
"""

import dataclasses
import json
from contextlib import ExitStack
from typing import TYPE_CHECKING

from raytune_emotion.errors import Breakdown, UserError
from raytune_emotion.interruption import finish_block, import_meanwhile, keep_error
from raytune_emotion.known_errors import first_line
from raytune_emotion.storage.atomic import write_text
from raytune_emotion.storage.json_text import load_json
from raytune_emotion.storage.locations import Location
from raytune_emotion.terminal import announce, count, plain_console, typed_command, typed_options
from raytune_emotion.tuning.session.search_inputs import NewStudy, check_new, check_resumed, list_obstacles
from raytune_emotion.tuning.space.parser import parse_space
from raytune_emotion.tuning.study.remote_copy import TAKEN_OVER
from raytune_emotion.tuning.study.request import AUTO, SearchRequest
from raytune_emotion.tuning.study.spec import SPEC, StudySpec, spec_of

if TYPE_CHECKING:
    from raytune_emotion.tuning.execution.recorder import Watch
    from raytune_emotion.tuning.study.open_study import OpenStudy

#: Name of the file that marks a study as searched, so that only its finish continues. It holds the search limits.
_SEARCHED = ".searched"
#: Slow imports, in the order in which a search needs them.
_SLOW = ("raytune_emotion.tuning.study.creation", "raytune_emotion.tuning.report.conclusion")


def run_search(request: SearchRequest) -> None:
    """Run a search, and finish the study with `--finish`.

    Raises:
        UserError: the request is wrong: one sentence for each error.
        Breakdown: the study broke off, and can be resumed.
        KeyboardInterrupt: it was interrupted, and can be resumed.
    """
    with announce("reading the study" if request.resume else "reading the search space and the data"):
        place = request.find_study()
        if request.joins(place):
            request = dataclasses.replace(request, resume=True)
        if request.resume:
            check_resumed(request, place)
        new = None if request.resume else check_new(request, place)
        is_searched = _is_searched(request, place)
    # Until everything is written, this process holds the lock of the study's folder, or is one of its drivers.
    with ExitStack() as held:
        study = _conclude_again(request, place, held) if is_searched else _search(request, place, new, held)
        if request.finish:
            _finish(request, place, study, held)


def _limits(request: SearchRequest) -> dict[str, float]:
    """Return the limits of a search that are not part of its study, by name."""
    budget = request.time_budget
    limits = {"time_budget": budget.total_seconds() if budget else None, "until_gain": request.until_gain}
    return {name: limit for name, limit in limits.items() if limit is not None}


def _is_searched(request: SearchRequest, place: Location) -> bool:
    """Tell whether only the finish of a study remains.

    This is the case once a search with --finish is over and no new limit is given. The limits that ended the search are
    not new, so the same command with `--resume` continues with the finish.
    """
    text = place.read(_SEARCHED) if request.resume and request.finish else None
    if text is None:
        return False
    spec = spec_of(place)
    try:
        ended_by = dict(load_json(text))
    except (TypeError, ValueError):  # the file was edited
        ended_by = {}
    if (request.trials or 0) > spec.trials or (request.epochs or 0) > spec.epochs:
        return False
    return all(ended_by.get(name) == limit for name, limit in _limits(request).items())


def _conclude_again(request: SearchRequest, place: Location, held: ExitStack) -> "OpenStudy":
    """Update a searched study with the request, such as the new folder of its data, without searching further.

    Returns:
        The study, which stays open until `held` ends.
    """
    study = _go_on(request, place, held)
    study.claim()
    left = "" if study.is_over() else ", without the remaining trials"
    plain_console().print(
        f"study {place}: the search is over, so only the finish continues{left}; to search further, raise --trials "
        f"or --epochs, or name another --time-budget or --until-gain"
    )
    if request.mlflow is not None:
        plain_console().print("--mlflow: applies only to a search, and is ignored here")
    if request.gpus_per_worker == AUTO:
        plain_console().print(f"--gpus-per-worker {AUTO}: applies only to a search, and is ignored here")
    # If a process was killed after the search, the page and the export may be missing.
    _conclude(request, study)
    return study


def _finish(request: SearchRequest, place: Location, study: "OpenStudy", held: ExitStack) -> None:
    """Finish a searched study, which is open. After an interruption, print the command that continues."""
    if study.spec.storage is not None:
        held.close()  # other drivers continue the trials that this one has left
    try:
        from raytune_emotion.tuning.session.finish import finish_study

        finish_study(place, request.address, check=lambda: _check_driver(study))
    except (KeyboardInterrupt, Breakdown, UserError) as error:
        if not str(error).endswith(TAKEN_OVER):
            options = typed_options(results=request.results, name=place.typed_name, address=request.address)
            plain_console().print(f"to continue: {typed_command('search')} --resume --finish{options}")
        raise


def _check_driver(study: "OpenStudy") -> None:
    """Check that no other process has taken over a study, where locks do not work. A study in a database is shared.

    Raises:
        Breakdown: another process has taken it over; or a URI cannot be read.
    """
    if study.spec.storage is None and (why := study.drivers.failure()):
        raise Breakdown(why)
    study.copy.check_driver()


def _search(request: SearchRequest, place: Location, new: NewStudy | None, held: ExitStack) -> "OpenStudy":
    """Run a new or a resumed study.

    Returns:
        The study, which stays open until `held` ends.
    """
    from raytune_emotion.tuning.execution.cluster import open_session
    from raytune_emotion.tuning.execution.cluster_watch import ClusterLost

    with ExitStack() as search:
        search.enter_context(import_meanwhile(*_SLOW))

        def prepare() -> "tuple[StudySpec, OpenStudy | None]":
            return _open_resumed(request, place, held) if new is None else (_pack(request, place, new), None)

        # A cluster is joined last, because packing may take hours, in which nothing watches the cluster.
        prepared = prepare() if request.address is not None else None
        study: OpenStudy | None = None
        ended: BaseException | None = None
        try:
            with open_session(request.address, place.name) as cluster:
                spec, resumed = prepared or prepare()
                from raytune_emotion.tuning.execution.cluster_nodes import fit_to_cluster
                from raytune_emotion.tuning.execution.gpu_sharing import fastest_share
                from raytune_emotion.tuning.execution.placement import Demand
                from raytune_emotion.tuning.execution.runner import StudyRun
                from raytune_emotion.tuning.session.console_run import run_with_progress
                from raytune_emotion.tuning.study.open_study import go_on

                console = plain_console()
                if request.gpus_per_worker == AUTO:
                    share = fastest_share(spec, cluster, console.print)
                    spec = dataclasses.replace(spec, gpus_per_worker=share)
                fp16 = "fp16" in parse_space(spec.space).values_of("train.precision")
                demand = Demand(spec.workers_per_trial, spec.gpus_per_worker, spec.concurrency, fp16)
                placement = fit_to_cluster(demand)
                if resumed is not None:
                    study = go_on(resumed, spec)
                else:
                    assert new is not None
                    study = _make_or_join(request, place, new, spec, held)
                study.copy.delete([_SEARCHED])
                console.print(
                    f"study {place}: {count(study.spec.trials, 'trial')} of {count(spec.epochs, 'epoch')}, {placement}"
                )
                for line in _describe_start(study, new):
                    console.print(line)
                run = StudyRun(study, placement, request.time_budget, request.until_gain, failure=cluster.failure)
                run_with_progress(console, run, _other_watches(request, study, search))
                if request.finish and any(record.counts for record in study.records()):
                    write_text(study.folder / _SEARCHED, json.dumps(_limits(request)))
                    study.copy.push(_SEARCHED)
        except (KeyboardInterrupt, ClusterLost) as why:
            # Before the recorder has claimed a URI, nothing may be written there.
            if study is None or not study.copy.is_whole:
                raise
            ended = why
        assert study is not None
        with keep_error(ended):
            _conclude(request, study)
    return study


def _pack(request: SearchRequest, place: Location, new: NewStudy) -> StudySpec:
    """Pack the data of a new study, and return its spec."""
    with announce("loading PyTorch"):
        from raytune_emotion.tuning.study.creation import new_spec

    return new_spec(request, place.name, new.space, new.data)


def _make_or_join(
    request: SearchRequest, place: Location, new: NewStudy, spec: StudySpec, held: ExitStack
) -> "OpenStudy":
    """Make a study, or join it if another driver has made it meanwhile. It stays open until `held` ends."""
    from raytune_emotion.tuning.study.open_study import make_study, open_study

    folder = place.working_folder()
    place.free_working_folder()
    try:
        make_study(folder, spec, new.warm_start.gathered)
    except UserError:
        if not request.joins(place):
            if place.read(SPEC) is None:
                raise
            raise UserError(f"{place}: another search has just made this study; choose another name") from None
        return _go_on(request, place, held)
    return held.enter_context(open_study(folder, place))


def _open_resumed(request: SearchRequest, place: Location, held: ExitStack) -> "tuple[StudySpec, OpenStudy]":
    """Open a study to resume, until `held` ends, and check the request. Return its new spec and the study."""
    with announce("loading PyTorch"):
        from raytune_emotion.tuning.study.creation import resumed_spec
        from raytune_emotion.tuning.study.open_study import open_existing

    study = open_existing(place, held)
    return resumed_spec(request, study, list_obstacles(request, study)), study


def _go_on(request: SearchRequest, place: Location, held: ExitStack) -> "OpenStudy":
    """Open a study to resume, until `held` ends, and give it its new spec."""
    spec, study = _open_resumed(request, place, held)
    from raytune_emotion.tuning.study.open_study import go_on

    return go_on(study, spec)


def _describe_start(study: "OpenStudy", new: NewStudy | None) -> list[str]:
    """Return lines on the warm start of a new study, or on the remaining trials of a resumed one."""
    from raytune_emotion.tuning.report.summary import ALL_TRIED
    from raytune_emotion.tuning.study.optuna_study import trials_to_continue

    lines = []
    if study.spec.weights_dir and parse_space(study.spec.space).values_of("model.pretrained") == (False,):
        lines.append("--weights-dir: the space has model.pretrained: false, so trials begin with random weights")
    if new is not None and new.warm_start.gathered is not None and new.warm_start.description:
        lines.append(f"the search is guided by {new.warm_start.description}")
    if longer := sorted(trials_to_continue(study.optuna)):
        lines.append(f"{', '.join(longer)}: continued to epoch {study.spec.epochs}, each as a new trial")
    if study.is_over():
        total = count(study.spec.trials, "trial")
        why = ALL_TRIED if study.has_tried_all() else f"ask for more than {total} with --trials"
        lines.append(f"every trial has ended, so nothing remains to run; {why}")
    return lines


def _conclude(request: SearchRequest, study: "OpenStudy") -> None:
    """Write and print the results.

    Raises:
        Breakdown: a package that this needs cannot be imported. The study itself is complete.
    """
    # The turn takes minutes. Meanwhile other drivers may write their tables. The first signal of a session, and a third
    # Ctrl-C, end the wait for it.
    with study.drivers.turn("conclusion"), finish_block():
        try:
            from raytune_emotion.tuning.report.conclusion import conclude
        except Exception as error:
            options = typed_options(
                finish=request.finish,
                results=request.results,
                name=study.copy.location.typed_name,
                address=request.address,
            )
            raise Breakdown(
                f"{study.copy}: the study is recorded, but its export and its page cannot be made "
                f"({first_line(error)}); repair the installation, and make them with "
                f"`{typed_command('search')} --resume{options}`"
            ) from error
        conclude(plain_console(), study, request.results, request.address, finish=request.finish)


def _other_watches(request: SearchRequest, study: "OpenStudy", held: ExitStack) -> "list[Watch]":
    """Start further watches of a study, which run until its export is written."""
    if request.mlflow is None:
        return []
    from raytune_emotion.tuning.report.mlflow_log import mlflow_log

    return [held.enter_context(mlflow_log(request.mlflow, study))]
