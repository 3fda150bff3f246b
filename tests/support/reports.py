"""Reports and records of trials."""

from raytune_emotion.tuning.study.records import TrialRecord

#: What differs between two runs of the same trial.
CLOCKS = ("seconds", "time", "images_per_second")


def without_clocks(reports):
    """Drop the measured times, to compare two runs."""
    return [{name: value for name, value in report.items() if name not in CLOCKS} for report in reports]


def short_report(step, js, *, finished=False):
    return {"report": step, "best_val_js": js, "finished": finished}


def make_report(step, js, **more):
    return {
        "report": step, "epoch": float(step), "val_js": js, "best_val_js": js, "val_kl": js * 2, "seconds": 1.5 * step,
        "time": 100 + 1.5 * step, "params_millions": 0.4, "images_per_second": 100.0, "finished": False, **more,
    }  # fmt: skip


RECORDS = [
    TrialRecord("0000", "pruned", {"optim.lr": 1e-3}, "", (make_report(1, 0.5),)),
    TrialRecord(
        "0001", "complete", {"optim.lr": 1e-2}, "", (make_report(1, 0.4), make_report(2, 0.3), make_report(3, 0.35))
    ),
    TrialRecord("0002", "failed", {"optim.lr": 9.0}, "the loss is not a number", ()),
    TrialRecord("0003", "running", {"optim.lr": 1e-4}, "", (make_report(1, 0.6),)),
]
