"""Gather what earlier studies have shown, for a study that starts from them."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from raytune_emotion.errors import UserError, collect_errors
from raytune_emotion.storage.locations import Location
from raytune_emotion.tuning.policy.candidates import domain_of
from raytune_emotion.tuning.policy.decisions import FORECAST
from raytune_emotion.tuning.policy.forecast import curves_of
from raytune_emotion.tuning.policy.portfolio import portfolio_of
from raytune_emotion.tuning.policy.trial_attributes import SETTINGS
from raytune_emotion.tuning.policy.warm_start import STUDY
from raytune_emotion.tuning.space.space import Space
from raytune_emotion.tuning.study.open_study import load
from raytune_emotion.tuning.study.optuna_study import JOURNAL
from raytune_emotion.tuning.study.request import SearchRequest
from raytune_emotion.tuning.study.spec import SPEC, spec_of

#: Trials that must have reported before a study says anything about what is good.
_LEAST = 4


@dataclass(frozen=True)
class WarmStart:
    """What guides the search of a new study."""

    gathered: str | None  # as `write_earlier` writes it; None: nothing
    told: str  # what it is, for people


def gather_warm_start(request: SearchRequest, space: Space) -> WarmStart:
    """Gather what guides the search of a study: earlier studies that are named, or else the portfolio.

    The portfolio guides a study whose space it fits, and whose sampler asks it.

    Raises:
        UserError: an earlier study that is named says nothing; all faults at once.
    """
    studies = request.earlier_studies
    if studies:
        return WarmStart(gather_earlier(studies), f"{', '.join(map(str, studies))} (--warm-start)")
    if request.warm_start:
        return WarmStart(None, "nothing (--warm-start none)")
    if (request.sampler or FORECAST) != FORECAST:
        return WarmStart(None, f"nothing (--sampler {request.sampler})")
    portfolio = portfolio_of(space)
    if portfolio is None:
        return WarmStart(None, "nothing, as the portfolio does not fit this space")
    return WarmStart(portfolio.text, f"{portfolio} (--warm-start none leaves it out)")


def gather_earlier(studies: Sequence[Location]) -> str:
    """Gather the spaces and curves of studies, as `write_earlier` writes them.

    Raises:
        UserError: one of them is no study, or too few of its trials have reported; all faults at once.
    """
    gathered: list[dict[str, Any]] = []
    faults: list[str] = []
    for place in studies:
        with collect_errors(faults):
            gathered.append(_gather(place))
    if faults:
        raise UserError(faults)
    return json.dumps(gathered)


def _gather(place: Location) -> dict[str, Any]:
    """Gather the space and the curves of one study."""
    spec = spec_of(place)
    with place.copy_here(SPEC, JOURNAL) as folder:  # what its trials have reported is in the journal, too
        study = load(folder)
        trials = study.optuna.get_trials(deepcopy=False)
        seen = curves_of(domain_of(study.space), [trial for trial in trials if SETTINGS in trial.user_attrs])
    if sum(bool(curve.values) for curve in seen) < _LEAST:
        raise UserError(f"--warm-start {place}: fewer than {_LEAST} of its trials have reported; leave it out")
    return {STUDY: place.address, "space": spec.space, "trials": [[curve.settings, curve.values] for curve in seen]}
