"""What happens to trials of a study, without a cluster."""

from raytune_emotion.tuning.execution.recorder import Event
from raytune_emotion.tuning.study.optuna_study import Proposal
from tests.support.reports import make_report

SETTINGS = {"model.backbone": "test_resnet", "optim.lr": 0.00612345, "loss.kl": 0.996, "loss.ce": 0.004}


def event(trial_id, status, js=None, epoch=1.0, reason="", worker=("node-a", 4711), settings=SETTINGS, gain=None):
    """Make an event of a trial; with a JS it has a report."""
    sent = {"epoch": epoch, "images_per_second": 1234.0, "host": worker[0], "pid": worker[1]}
    heard = None if js is None else {**make_report(int(epoch), js), **sent}
    return Event(Proposal(trial_id, settings, None), status, heard, reason, gain)


class Clock:
    """Tell a time that a test sets."""

    now = 100.0

    def __call__(self):
        return self.now
