"""Check the request for a search, as far as that is quick, and read the inputs of a new study."""

import dataclasses
import importlib.util
from typing import TYPE_CHECKING

from raytune_emotion.data.prepare import Data, find_data
from raytune_emotion.data.synthetic import sample_folder
from raytune_emotion.errors import UserError, collect_errors
from raytune_emotion.storage.atomic import exclusive_lock
from raytune_emotion.storage.locations import Location
from raytune_emotion.storage.remote import refuse_credentials
from raytune_emotion.tuning.execution.gpu_presence import refuse_absent_gpu, refuse_broken_gpu
from raytune_emotion.tuning.policy.objective import DEFAULT_OBJECTIVE
from raytune_emotion.tuning.space.space import Space
from raytune_emotion.tuning.study.remote_copy import DRIVER
from raytune_emotion.tuning.study.request import SearchRequest
from raytune_emotion.tuning.study.resume_check import check_continuation
from raytune_emotion.tuning.study.spec import SPEC, spec_of

if TYPE_CHECKING:
    from raytune_emotion.tuning.execution.placement import Demand
    from raytune_emotion.tuning.study.earlier import WarmStart
    from raytune_emotion.tuning.study.open_study import OpenStudy


@dataclasses.dataclass(frozen=True)
class NewStudy:
    """The inputs of a new study."""

    space: Space
    data: Data
    warm_start: "WarmStart"


def check_resumed(request: SearchRequest, place: Location) -> None:
    """Check the request to resume a study.

    Raises:
        UserError: all errors at once.
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
        # The study is locked for good when it is opened. This early check prevents a second Ray beside that of a
        # running search. A study in a database has no such lock: concurrent checks of drivers would refuse each other.
        with collect_errors(errors), exclusive_lock(folder):
            pass
    if errors:
        # The data are checked again when the study is open. This check reports their errors together with the others.
        if request.data is not None:
            with collect_errors(errors):
                find_data(request.data)
        raise UserError(errors)
    if request.address is None:
        wanted = request.gpus_per_worker
        refuse_broken_gpu(spec_of(place).gpus_per_worker if wanted is None else wanted)


def check_new(request: SearchRequest, place: Location) -> NewStudy:
    """Check the request for a new study, and read its inputs.

    Raises:
        UserError: all errors at once.
    """
    errors: list[str] = []
    with collect_errors(errors):
        request.results.check(write=True)
        if not place.can_be_built(DRIVER, SPEC):
            found = "a study of this name exists already; continue it with --resume, or choose another name"
            other = "this name is taken, but not by a study; choose another name"
            raise UserError(f"{place}: {found if place.read(SPEC) is not None else other}")
    check_options(request, errors)
    new = read_inputs(request, errors)
    fp16 = "fp16" in new.space.values_of("train.precision")
    if fp16 and request.address is None:
        _check_room(request, fp16=True)
    if request.address is not None and not new.data.stores:
        from raytune_emotion.tuning.execution.cluster_nodes import check_fit

        check_fit(request.address, _demand_of(request, fp16=fp16))
    return new


def check_options(request: SearchRequest, errors: list[str]) -> None:
    """Check the options of a new study that do not depend on its space, data or name.

    Args:
        request: the request.
        errors: is extended by the errors.
    """
    with collect_errors(errors):
        _check_room(request)
    with collect_errors(errors):
        _check_mlflow(request)
    with collect_errors(errors):
        request.check_storage()
    with collect_errors(errors):
        request.check_until_gain(request.objective or DEFAULT_OBJECTIVE)


def read_inputs(request: SearchRequest, errors: list[str]) -> NewStudy:
    """Read the inputs of a new study.

    Raises:
        UserError: the inputs are wrong, or there are already errors: all errors at once.
    """
    space = Space({})
    with collect_errors(errors):
        space = request.load_space()
    if request.data is not None:
        with collect_errors(errors):
            data = find_data(request.data)
    with collect_errors(errors):
        request.check_warm_start()
        if request.earlier_studies or not errors:
            # Imported only now: it takes seconds.
            from raytune_emotion.tuning.study.earlier import gather_warm_start

            warm_start = gather_warm_start(request, space)
    if errors:
        raise UserError(errors)
    return NewStudy(space, data if request.data is not None else find_data(sample_folder()), warm_start)


def list_obstacles(request: SearchRequest, study: "OpenStudy") -> list[str]:
    """List the errors that would prevent the export, or the finish, of a study at the end."""
    from raytune_emotion.learn.export_folder import check_replaceable
    from raytune_emotion.tuning.session.finish import FINISHED
    from raytune_emotion.tuning.study.confirmation import confirmation_before

    found: list[str] = []
    for name in ("best", FINISHED) if request.finish else ("best",):
        with collect_errors(found):
            check_replaceable(study.copy.location / name)
    if request.finish:
        with collect_errors(found):
            confirmation_before(study.copy.location, request.epochs or study.spec.epochs)
    return found


def _check_address(request: SearchRequest) -> None:
    if request.address is not None:
        from raytune_emotion.tuning.execution.cluster import check_cluster

        check_cluster(request.address)


def _check_room(request: SearchRequest, *, fp16: bool = False) -> None:
    """Check that the cluster answers or, without a cluster, that this machine has room for a trial."""
    if request.address is not None:
        _check_address(request)
        return
    from raytune_emotion.tuning.execution.placement import fit_here

    fit_here(_demand_of(request, fp16=fp16))


def _demand_of(request: SearchRequest, *, fp16: bool) -> "Demand":
    from raytune_emotion.tuning.execution.placement import Demand

    return Demand(request.workers_per_trial or 1, request.gpus_per_worker, request.concurrency, fp16)


def _check_mlflow(request: SearchRequest) -> None:
    if request.mlflow is None:
        return
    refuse_credentials(request.mlflow, "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD")
    # This check avoids an import, which takes seconds.
    if importlib.util.find_spec("mlflow") is None:
        raise UserError(
            "--mlflow: the package mlflow is missing; install it with pip install 'raytune_emotion[mlflow]'"
        )
