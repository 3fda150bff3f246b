"""Gather what earlier studies have shown, for a study that starts from them."""

import json
from collections.abc import Sequence
from typing import Any

from raytune_emotion.errors import UserError
from raytune_emotion.storage.locations import Location
from raytune_emotion.tuning.policy.candidates import domain_of
from raytune_emotion.tuning.policy.decisions import SETTINGS
from raytune_emotion.tuning.policy.forecast import curves_of
from raytune_emotion.tuning.space.parser import parse_space
from raytune_emotion.tuning.study.optuna_study import JOURNAL, load_study
from raytune_emotion.tuning.study.records import study_files
from raytune_emotion.tuning.study.spec import SPEC, read_spec

#: Trials that must have reported before a study says anything about what is good.
_LEAST = 4


def gather_earlier(studies: Sequence[Location]) -> str:
    """Gather the spaces and curves of studies, as `write_earlier` writes them.

    Raises:
        UserError: one of them is no study, or too few of its trials have reported; all faults at once.
    """
    gathered: list[dict[str, Any]] = []
    faults: list[str] = []
    for place in studies:
        try:
            with study_files(place, JOURNAL) as folder:
                space = read_spec(folder).space
                trials = load_study(folder).get_trials(deepcopy=False)
        except UserError as error:
            faults += error.faults
            continue
        domain = domain_of(parse_space(space, SPEC))
        seen = curves_of(domain, [trial for trial in trials if SETTINGS in trial.user_attrs])
        if sum(bool(curve.values) for curve in seen) < _LEAST:
            faults.append(f"--warm-start {place}: fewer than {_LEAST} of its trials have reported; leave it out")
        gathered.append({"space": space, "trials": [[curve.settings, curve.values] for curve in seen]})
    if faults:
        raise UserError(faults)
    return json.dumps(gathered)
