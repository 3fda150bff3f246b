"""Print the results of a search or a confirmation, and the next commands."""

from collections.abc import Sequence

from rich.console import Console

from raytune_emotion.errors import Breakdown
from raytune_emotion.learn.checkpoint import read_best
from raytune_emotion.learn.export_files import CONFIG
from raytune_emotion.learn.export_folder import NOT_FOR_PHOTOS, check_replaceable, publish_export, write_package
from raytune_emotion.learn.run_folder import BEST
from raytune_emotion.storage.locations import Folder, Location, parent_of, replace_files
from raytune_emotion.terminal import count, plain_table, shell_word, typed_command, typed_options
from raytune_emotion.tuning.policy.objective import OBJECTIVES
from raytune_emotion.tuning.policy.outlook import STARTUP
from raytune_emotion.tuning.report.page import FRONT, REPORT, front_rows
from raytune_emotion.tuning.report.publication import publish_report
from raytune_emotion.tuning.report.summary import ALL_TRIED, count_statuses, counts_text
from raytune_emotion.tuning.study.confirmation import (
    CONFIRMED_TABLE,
    HEADINGS,
    ConfirmedConfiguration,
    rank_confirmed,
)
from raytune_emotion.tuning.study.creation import GENERATED
from raytune_emotion.tuning.study.open_study import OpenStudy
from raytune_emotion.tuning.study.records import TrialRecord, winner
from raytune_emotion.tuning.study.tables import TRIALS
from raytune_emotion.tuning.study.trial_export import export_trial, store_of

_DRAWN = f"\nnote        the faces of the sample are drawn: {NOT_FOR_PHOTOS}"


def conclude(
    console: Console, study: OpenStudy, results: Location, address: str | None, *, finish: bool = False
) -> None:
    """Export the best trial, and print the results and the next commands.

    Args:
        console: console for the results.
        study: the study, which has run.
        results: folder or URI of the studies.
        address: address of its cluster; None for this machine.
        finish: whether the study is to be finished, which the next command then says, too.

    Raises:
        Breakdown: every trial has failed.
    """
    folder, place, spec, records = study.folder, study.copy.location, study.spec, study.records()
    best = winner(records)
    rivals = publish_report(study, records)
    if best is not None:
        export_trial(place, Folder(folder / "best"), best.trial_id)
        check_replaceable(place / "best")
        replace_files(place / "best", folder / "best", CONFIG)
    over = study.is_over()
    all_tried = over and study.has_tried_all()
    told = counts_text(count_statuses(record.status for record in records))
    console.print(f"{told}; {ALL_TRIED}" if all_tried else told)
    options = typed_options(finish=finish, results=results, name=place.typed_name)
    resume = f"{typed_command('search')} --resume{options}"
    if over:
        # If every configuration was tried, only longer training of the best ones is left.
        resume += f" --epochs {2 * spec.epochs}" if all_tried else f" --trials {2 * spec.trials}"
    resume += typed_options(address=address)
    if best is None or best.best is None:
        if records and all(record.status == "failed" for record in records):
            raise Breakdown(f"{place}: every trial has failed; the reasons are in the last column of {place / TRIALS}")
        console.print(
            f"no trial has a result yet: none has reported, or all that reported have failed\n\nnext:\n  {resume}"
        )
        return
    confirmation = advise_confirmation(place, rivals)
    objective = OBJECTIVES[spec.objective]
    if objective.front:
        front = plain_table(*FRONT, title=f"Pareto front: no {objective.cheaper} model has a lower JS")
        for row in front_rows(records, objective):
            front.add_row(*row)
        console.print(front)
    gain = gain_over_start(records, best.best["val_js"], over=over)
    gained = f"\ngained      {gain}" if gain else ""
    console.print(
        f"""
best JS     {best.best["val_js"]:.4f} bits, trial {best.trial_id} ({count(len(records), "trial")}){gained}
baseline    {spec.baseline["js"]:.4f} bits, predicting the training mean
exported    {place / "best"}
page        {place / REPORT}{_DRAWN if spec.data == GENERATED else ""}

next:
  {typed_command("predict")} {shell_word(str(place / "best"))} FACE.jpg{confirmation}
  tensorboard --logdir {shell_word(str(place / "trials"))}
  {resume}"""
    )


def advise_confirmation(study: Location, rivals: Sequence[str]) -> str:
    """Return the command that compares the best trial with others that may be as good; "" if there are none."""
    if not rivals:
        return ""
    some = f"trial {rivals[0]}" if len(rivals) == 1 else f"trials {', '.join(rivals)}"
    command = f"{typed_command('confirm')} {shell_word(str(study))}"
    return f"\n  {command}  # {some} may be as good: train the best with new seeds"


def gain_over_start(records: Sequence[TrialRecord], js: float, *, over: bool) -> str:
    """Return a text on the improvement over the first trials, which were chosen without a forecast.

    While it is unknown, the text says from when on it is known; it is "" if the study is over.
    """
    first = winner(record for record in records if int(record.trial_id) < STARTUP)
    if first is None or first.best is None or len(records) <= STARTUP:
        return "" if over else f"not known yet: it is measured from the best of the first {count(STARTUP, 'trial')} on"
    reached = first.best["val_js"]
    return f"{reached - js:.4f} bits over the best of the first {count(STARTUP, 'trial')} ({reached:.4f})"


def conclude_confirmation(console: Console, study: OpenStudy, *, whole: bool) -> None:
    """Print the ranking of the configurations, and export the winner of a complete confirmation.

    Args:
        console: console for the results.
        study: the confirmation.
        whole: whether it is complete.
    """
    place, records = study.copy.location, study.records()
    publish_report(study, records)
    found = rank_confirmed(study.spec, records)
    table = plain_table(*HEADINGS)
    for configuration in found:
        table.add_row(*configuration.cells)
    console.print(table)
    if not whole:
        return
    winner = found[0]
    if not winner.runs:
        raise Breakdown(f"{place}: no run is complete; the reasons are in the last column of {place / TRIALS}")
    _export(study, winner, len(found))
    console.print(
        f"""best mean   {winner.summary}, trial {winner.trial_id} of the search
exported    {place / "best"}, the median run ({winner.median.trial_id})
table       {place / CONFIRMED_TABLE}
page        {place / REPORT}"""
    )


def _export(study: OpenStudy, winner: ConfirmedConfiguration, configurations: int) -> None:
    """Export the median run of the winner, so that the result does not depend on a lucky seed."""
    run, place = winner.median, study.copy.location
    trained = study.trial_folder(run.trial_id)
    best = read_best(trained / BEST)
    confirmed = {
        "confirmed_mean_js": winner.mean,
        "confirmed_standard_error": winner.standard_error,
        "confirmed_seeds": len(winner.runs),
    }
    notes = [
        f"The configuration of trial {winner.trial_id} of the study {parent_of(place).name}, the best of "
        f"{configurations} with new seeds: JS {winner.summary}.",
        f"These weights are from the median run, trial {run.trial_id} of the confirmation.",
    ]
    metrics = {**best.report, **confirmed}
    with publish_export(place / "best") as dest:
        write_package(dest, best, notes, metrics=metrics, store=store_of(trained, best, study.spec))
