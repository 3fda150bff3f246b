"""Run a confirmation from the request to its conclusion."""

from raytune_emotion.interruption import finish_block, keep_error
from raytune_emotion.terminal import count, plain_console, shell_word, typed_command, typed_options
from raytune_emotion.tuning.execution.gpu_presence import refuse_absent_gpu
from raytune_emotion.tuning.study.request import ConfirmRequest
from raytune_emotion.tuning.study.spec import spec_of


def run_confirmation(request: ConfirmRequest, *, advise: bool = True) -> None:
    """Run the remaining runs of a confirmation, and export the winner.

    Args:
        request: the request.
        advise: whether to print the command that continues an interrupted confirmation; otherwise the caller does it.

    Raises:
        UserError: there is nothing to confirm, or it cannot be run here.
    """
    spec_of(request.study)  # raises an error at once if it is not a study
    refuse_absent_gpu(request.gpus_per_worker, request.address)
    # Imported only now: it takes seconds.
    from raytune_emotion.learn.export_folder import check_replaceable
    from raytune_emotion.tuning.execution.cluster import check_cluster, open_session
    from raytune_emotion.tuning.execution.cluster_nodes import fit_to_cluster
    from raytune_emotion.tuning.execution.cluster_watch import ClusterLost
    from raytune_emotion.tuning.execution.placement import Demand, fit_here
    from raytune_emotion.tuning.execution.runner import StudyRun
    from raytune_emotion.tuning.report.conclusion import conclude_confirmation
    from raytune_emotion.tuning.session.console_run import run_with_progress
    from raytune_emotion.tuning.study.confirmation import (
        CONFIRMED,
        enqueue_runs,
        open_confirmation,
        plan_confirmation,
    )

    check_cluster(request.address)
    plan = plan_confirmation(request)
    spec = plan.spec
    fp16 = any(its.get("train.precision") == "fp16" for its in plan.settings)
    demand = Demand(spec.workers_per_trial, spec.gpus_per_worker, spec.concurrency, fp16)
    if request.address is None:
        fit_here(demand)
    place, console = request.study / CONFIRMED, plain_console()
    place.check(write=True)
    check_replaceable(place / "best")
    # The confirmation's folder is locked until everything is written.
    with open_confirmation(place, spec) as confirmation:
        ended = None
        try:
            with open_session(request.address, f"{request.study.name} {CONFIRMED}") as cluster:
                placement = fit_to_cluster(demand)
                confirmation = enqueue_runs(confirmation, plan, request.seeds)
                runs = f"{count(len(spec.confirms or ()), 'configuration')}, {count(confirmation.spec.trials, 'run')}"
                console.print(f"confirmation {place}: {runs} of {count(spec.epochs, 'epoch')}, {placement}")
                run_with_progress(console, StudyRun(confirmation, placement, failure=cluster.failure))
        except (KeyboardInterrupt, ClusterLost) as why:
            # Before the recorder has claimed a URI, nothing may be written there.
            if not confirmation.copy.is_whole:
                raise
            ended = why
        with keep_error(ended), finish_block():
            conclude_confirmation(console, confirmation, whole=ended is None)
            if ended is not None and advise:
                console.print(f"the same command continues: {_same_command(request)}")


def _same_command(request: ConfirmRequest) -> str:
    options = {name: value for name, value in vars(request).items() if name != "study"}
    return f"{typed_command('confirm')} {shell_word(str(request.study))}{typed_options(**options)}"
