"""Say what came out of a search, and what to type next."""

from typing import get_args

from rich.console import Console

from raytune_emotion.storage.locations import Folder, Location
from raytune_emotion.terminal import plain_table, typed
from raytune_emotion.tuning.policy.objective import OBJECTIVES
from raytune_emotion.tuning.report.page import FRONT, REPORT, front_rows, report_files, write_report
from raytune_emotion.tuning.study.open_study import OpenStudy
from raytune_emotion.tuning.study.optuna_study import Status
from raytune_emotion.tuning.study.records import winner
from raytune_emotion.tuning.study.trial_export import export_trial


def conclude(console: Console, study: OpenStudy, results: Location) -> None:
    """Export the best trial, and say what came out and what to type next."""
    folder, place, spec, records = study.folder, study.copy.location, study.spec, study.records()
    counts = {status: sum(r.status == status for r in records) for status in get_args(Status)}
    best = winner(records)
    write_report(folder, spec, records)
    if best is not None:
        export_trial(place, Folder(folder / "best"), best.trial_id)
    exported = [str(file.relative_to(folder)) for file in folder.glob("best/*")]
    place.push(folder, [*report_files(folder), *exported])
    console.print(", ".join(f"{n} {status}" for status, n in counts.items() if n))
    if best is None or best.best is None:
        console.print("no trial has reported yet, or those that have failed")
        return
    objective = OBJECTIVES[spec.objective]
    if objective.front:
        front = plain_table(*FRONT, title=f"no {objective.cheaper} model has bettered")
        for row in front_rows(records, objective):
            front.add_row(*row)
        console.print(front)
    resume = f"--resume --results {typed(str(results))} --name {place.name}"
    if len(records) >= spec.trials and not counts["running"]:
        resume += f" --trials {2 * spec.trials}"
    console.print(
        f"""
best JS     {best.best["val_js"]:.4f} bits, trial {best.trial_id} ({len(records)} trials)
baseline    {spec.baseline["js"]:.4f} bits, predicting the training mean
exported    {place / "best"}
page        {place / REPORT}

next:
  python -m raytune_emotion.predict {typed(str(place / "best"))} FACE.jpg
  tensorboard --logdir {typed(str(place / "trials"))}
  python -m raytune_emotion.search {resume}"""
    )
