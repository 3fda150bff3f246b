"""Hold what one evaluation of a run reports, and name the number that a study minimises."""

from typing import Any

#: Column and key of the objective: the lowest validation JS of a trial so far, bits.
OBJECTIVE = "best_val_js"

Report = dict[str, Any]

# The whole report lies in the trial's folder. Tune keeps statistics of every number for as long as the study runs.
#: What the driver hears of a report.
HEARD = ("report", "epoch", "seconds", OBJECTIVE, "finished", "params_millions", "images_per_second")
