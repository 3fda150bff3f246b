"""An actor of Ray Tune's whose trials train nothing: its process imports neither PyTorch nor timm."""

import json
import os
import platform
from pathlib import Path

from raytune_emotion.learn.run_folder import BEST, HISTORY, LAST
from raytune_emotion.tuning.execution.trial_actor import ENDING, NODES
from tests.support.reports import make_report


def stand_in():
    """Make the class of the actor, which has the methods of `TrialActor` and writes the files of a trial.

    The class is local, so Ray sends it by value: its process imports nothing of the tests. A subclass says by
    `ending(trial_id, report)` how a trial ends for good, before its report of this number; None: it goes on.
    """
    template, history, weights, ending_key, node_key = make_report(1, 1.0), HISTORY, (BEST, LAST), ENDING, NODES

    class StandIn:
        def __init__(self, config):
            self._begin(config)

        def _begin(self, config):
            self.settings, self.folder = config["settings"], Path(config["folder"])
            self._reports = self._train()

        def ending(self, trial_id, report):
            return None

        def _train(self):
            self.folder.mkdir(parents=True, exist_ok=True)
            file, trial_id = self.folder / history, self.folder.name
            written = file.read_text().splitlines() if file.exists() else []
            # A process may have died after it wrote a report and before that was heard.
            yield from map(json.loads, written[-1:])
            epochs = self.settings["train.epochs"]
            for number in range(len(written) + 1, epochs + 1):
                if (end := self.ending(trial_id, number)) is not None:
                    yield {ending_key: end, node_key: []}
                js = 0.5 + 0.01 * int(trial_id) - 0.01 * number
                report = template | {
                    "report": number, "epoch": float(number), "val_js": js, "best_val_js": js, "seconds": 0.1 * number,
                    "time": 1.0 * number, "finished": number == epochs, "images_per_second": 100.0,
                    "accumulate": self.settings.get("train.accumulate", 1), "workers": 1,
                }  # fmt: skip
                with file.open("a") as lines:
                    lines.write(json.dumps(report) + "\n")
                for name in weights:
                    (self.folder / name).write_bytes(b"weights")
                yield report

        def train(self):
            return {"pid": os.getpid(), "host": platform.node(), node_key: [], **next(self._reports)}

        def reset(self, config):
            self._reports.close()
            self._begin(config)
            return True

        def stop(self):
            self._reports.close()

        def get_auto_filled_metrics(self, debug_metrics_only):
            return {"pid": os.getpid()}

    return StandIn
