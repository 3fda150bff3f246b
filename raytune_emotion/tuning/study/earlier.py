"""Gather results of earlier studies for a study that starts from them."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from raytune_emotion.errors import UserError, collect_errors
from raytune_emotion.storage.locations import Location
from raytune_emotion.tuning.policy.candidates import domain_of
from raytune_emotion.tuning.policy.decisions import FORECAST
from raytune_emotion.tuning.policy.forecast import curves_of
from raytune_emotion.tuning.policy.outlook import STARTUP
from raytune_emotion.tuning.policy.portfolio import portfolio_of
from raytune_emotion.tuning.policy.trial_attributes import SETTINGS
from raytune_emotion.tuning.policy.warm_start import STUDY
from raytune_emotion.tuning.space.space import Space
from raytune_emotion.tuning.study.open_study import load
from raytune_emotion.tuning.study.optuna_study import JOURNAL
from raytune_emotion.tuning.study.remote_copy import PIECES, join_pieces
from raytune_emotion.tuning.study.request import DEFAULT_TRIALS, SearchRequest
from raytune_emotion.tuning.study.spec import SPEC, spec_of

#: Smallest number of trials with reports from which an earlier study is useful.
_LEAST = 4


@dataclass(frozen=True)
class WarmStart:
    """The results of earlier studies that guide a new study."""

    gathered: str | None  # in the format of `EARLIER`; None: nothing
    description: str  # for people; "" if the study has too few trials to be guided


def gather_warm_start(request: SearchRequest, space: Space) -> WarmStart:
    """Gather the results that guide the search of a study: those of the named studies, or else the portfolio.

    The portfolio guides a study if it fits the space, and if the sampler uses it.

    Raises:
        UserError: a named study has too few results; all errors at once.
    """
    studies = request.earlier_studies
    if studies:
        named = f"{', '.join(map(str, studies))} (--warm-start)"
        if request.sampler not in (None, FORECAST):
            named += f", but only in its pauses, because the sampler {request.sampler} does not use earlier studies"
        return WarmStart(gather_earlier(studies), named)
    if request.warm_start:
        return WarmStart(None, "nothing (--warm-start none)")
    if (request.sampler or FORECAST) != FORECAST:
        return WarmStart(None, f"nothing (--sampler {request.sampler})")
    portfolio = portfolio_of(space)
    if portfolio is None:
        return WarmStart(None, "nothing, because the portfolio does not fit this space")
    # A study of few trials keeps it, too, because a later session may raise their number.
    uses = (request.trials or DEFAULT_TRIALS) >= STARTUP
    since = f"once {STARTUP} trials have paused or ended"
    return WarmStart(portfolio.text, f"{portfolio}, {since} (--warm-start none leaves it out)" if uses else "")


def gather_earlier(studies: Sequence[Location]) -> str:
    """Gather the spaces and curves of studies, in the format of `EARLIER`.

    Raises:
        UserError: one of them is not a study, or too few of its trials have reported; all errors at once.
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
    # The journal also has what its trials have reported.
    with place.copy_here(SPEC, JOURNAL, *PIECES) as folder:
        if not place.is_here(folder):
            join_pieces(folder, JOURNAL)
        study = load(folder)
        trials = study.optuna.get_trials(deepcopy=False)
        seen = curves_of(domain_of(study.space), [trial for trial in trials if SETTINGS in trial.user_attrs])
    if sum(bool(curve.values) for curve in seen) < _LEAST:
        raise UserError(f"--warm-start {place}: fewer than {_LEAST} of its trials have reported; leave it out")
    return {STUDY: place.address, "space": spec.space, "trials": [[curve.settings, curve.values] for curve in seen]}
