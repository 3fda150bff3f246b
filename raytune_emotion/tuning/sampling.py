"""What is tried next: the candidate that is expected to better the study's best by the most."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from optuna._transform import _SearchSpaceTransform
from optuna.trial import FixedTrial, FrozenTrial, TrialState
from threadpoolctl import threadpool_limits

from raytune_emotion.tuning.model import Curve, Forecast, encoding_of, expected_improvement
from raytune_emotion.tuning.space import Space

#: The attribute of an Optuna trial that has its configuration by dotted path.
SETTINGS = "settings"

#: Trials that end before any is modelled.
_STARTUP = 8
#: Candidates drawn at random, and as many that change one of the best trials.
_CANDIDATES, _BEST = 200, 5
#: Of a trial's parameters, a change draws some anew and moves the others, in parts of their range.
_ANEW, _STEP = 0.2, 0.1


def propose(
    space: Space, past: Sequence[FrozenTrial], seed: int, earlier: Sequence[Forecast] = ()
) -> dict[str, Any] | None:
    """Optuna's parameters of a configuration that was not tried before; None where the space has no other.

    Args:
        space: to choose from.
        past: all trials that were asked for, in order, with their settings as an attribute.
        seed: of the candidates; with the same past the same is proposed.
        earlier: what other studies say of the configurations.
    """
    tried = {_key(trial.user_attrs[SETTINGS]) for trial in past}
    drawn = ((params, settings) for params, settings in candidates(space, past, seed) if _key(settings) not in tried)
    running = [trial.user_attrs[SETTINGS] for trial in past if trial.state == TrialState.RUNNING]
    seen = curves(past)
    reported = [curve.settings for curve in seen if curve.values]
    if not earlier and (not reported or len(past) - len(running) < _STARTUP):
        return next((params for params, _ in drawn), None)
    fresh = [*drawn]
    if not fresh:
        return None
    # Matrices this small are slower on several threads, and other trials are training.
    with threadpool_limits(1):
        forecast = Forecast(encoding_of(space), seen, earlier)
        if running:
            forecast.believe(running)
        mean_M, std_M = forecast([settings for _, settings in fresh])
        best = float(np.min(forecast(reported)[0] if reported else mean_M))
        return fresh[int(np.argmax(expected_improvement(mean_M, std_M, best)))][0]


def curves(past: Sequence[FrozenTrial]) -> list[Curve]:
    """What trials have shown until now; Optuna itself passes over those that failed."""
    return [
        Curve(trial.user_attrs[SETTINGS], {} if trial.state == TrialState.FAIL else trial.intermediate_values)
        for trial in past
        if trial.state == TrialState.FAIL or trial.intermediate_values
    ]


def candidates(space: Space, past: Sequence[FrozenTrial], seed: int) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Optuna's parameters, with the settings that follow from them."""
    # Of all parameters, whether or not a branch of the space has use for them.
    unit = _SearchSpaceTransform(space.parameters, transform_0_1=True)
    rng = np.random.default_rng(seed)
    width = len(unit.bounds)

    def candidate(x_P: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        trial = FixedTrial(unit.untransform(x_P))
        settings = space.suggest(trial)
        return trial.params, settings

    for _ in range(_CANDIDATES):
        yield candidate(rng.random(width))
    reported = [trial for trial in past if trial.intermediate_values and trial.state != TrialState.FAIL]
    best = sorted(reported, key=lambda trial: min(trial.intermediate_values.values()))[:_BEST]
    for number in range(_CANDIDATES if best else 0):
        whole = unit.untransform(rng.random(width)) | best[number % len(best)].params
        x_P = np.clip(unit.transform(whole) + _STEP * rng.standard_normal(width), 0, 1)
        for columns in unit.column_to_encoded_columns:
            if rng.random() < _ANEW:
                x_P[columns] = rng.random(len(columns))
        yield candidate(x_P)


def _key(settings: Mapping[str, Any]) -> str:
    return json.dumps(settings, sort_keys=True)
