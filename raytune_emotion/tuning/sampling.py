"""What is tried next: the candidate that is expected to better what the study has by the most."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from optuna._transform import _SearchSpaceTransform
from optuna.trial import FixedTrial, FrozenTrial, TrialState
from threadpoolctl import threadpool_limits

from raytune_emotion.tuning.model import (
    Curve,
    Encoding,
    Floats,
    Forecast,
    encoding_of,
    expected_improvement,
    expected_improvement_of_front,
)
from raytune_emotion.tuning.objective import JS_ALONE, Objective
from raytune_emotion.tuning.space import Space

#: The attributes of an Optuna trial that have its configuration by dotted path and, where one counts, its cost.
SETTINGS, COST = "settings", "cost"

#: Trials that end before any is modelled.
_STARTUP = 8
#: Candidates drawn at random, and as many that change one of the best trials.
_CANDIDATES, _BEST = 200, 5
#: Of a trial's parameters, a change draws some anew and moves the others, in parts of their range.
_ANEW, _STEP = 0.2, 0.1


def propose(
    space: Space,
    past: Sequence[FrozenTrial],
    seed: int,
    earlier: Sequence[Forecast] = (),
    objective: Objective = JS_ALONE,
) -> dict[str, Any] | None:
    """Optuna's parameters of a configuration that was not tried before; None where the space has no other.

    Args:
        space: to choose from.
        past: all trials that were asked for, in order, with their settings as an attribute.
        seed: of the candidates; with the same past the same is proposed.
        earlier: what other studies say of the configurations.
        objective: of the study.
    """
    tried = {_key(trial.user_attrs[SETTINGS]) for trial in past}
    reported = [trial for trial in past if trial.intermediate_values and trial.state != TrialState.FAIL]
    running = [trial.user_attrs[SETTINGS] for trial in past if trial.state == TrialState.RUNNING]
    offered = candidates(space, _leading(reported, objective)[:_BEST], seed)
    drawn = ((params, settings) for params, settings in offered if _key(settings) not in tried)
    if not earlier and (not reported or len(past) - len(running) < _STARTUP):
        return next((params for params, _ in drawn), None)
    fresh = [*drawn]
    if not fresh:
        return None
    # Matrices this small are slower on several threads, and other trials are training.
    with threadpool_limits(1):
        forecast = Forecast(encoding_of(space), curves(past), earlier)
        if running:
            forecast.believe(running)
        promise_M = _promise(objective, forecast, encoding_of(space), reported, [settings for _, settings in fresh])
        return fresh[int(np.argmax(promise_M))][0]


def _promise(
    objective: Objective,
    forecast: Forecast,
    encoding: Encoding,
    reported: Sequence[FrozenTrial],
    settings: Sequence[Mapping[str, Any]],
) -> Floats:
    """By how much each of M candidates is expected to better what there is, [M]."""
    mean_M, std_M = forecast(settings)
    seen_N = forecast([trial.user_attrs[SETTINGS] for trial in reported])[0] if reported else mean_M
    improvement_M = expected_improvement(mean_M, std_M, float(np.min(seen_N)))
    if objective.cost is None or not reported:
        return improvement_M
    known = [(trial.user_attrs[SETTINGS], trial.user_attrs[COST]) for trial in reported]
    cost_M, _ = Forecast(encoding, [Curve(its, {1: cost}) for its, cost in known])(settings)
    if not objective.front:
        return improvement_M / np.exp(cost_M)
    logs_N = np.log([cost for _, cost in known])
    return expected_improvement_of_front(mean_M, std_M, cost_M, seen_N, logs_N)


def _leading(reported: Sequence[FrozenTrial], objective: Objective) -> list[FrozenTrial]:
    """The trials worth changing: the best first, of which a front keeps those that no cheaper one has bettered."""
    ranked = sorted(reported, key=lambda trial: min(trial.intermediate_values.values()))
    if not objective.front:
        return ranked
    found: list[FrozenTrial] = []
    least = math.inf
    for trial in ranked:
        if trial.user_attrs[COST] < least:
            found.append(trial)
            least = trial.user_attrs[COST]
    return found


def curves(past: Sequence[FrozenTrial]) -> list[Curve]:
    """What trials have shown until now; Optuna itself passes over those that failed."""
    return [
        Curve(trial.user_attrs[SETTINGS], {} if trial.state == TrialState.FAIL else trial.intermediate_values)
        for trial in past
        if trial.state == TrialState.FAIL or trial.intermediate_values
    ]


def candidates(space: Space, best: Sequence[FrozenTrial], seed: int) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Optuna's parameters, with the settings that follow from them: drawn at random, then near the best trials."""
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
    for number in range(_CANDIDATES if best else 0):
        whole = unit.untransform(rng.random(width)) | best[number % len(best)].params
        x_P = np.clip(unit.transform(whole) + _STEP * rng.standard_normal(width), 0, 1)
        for columns in unit.column_to_encoded_columns:
            if rng.random() < _ANEW:
                x_P[columns] = rng.random(len(columns))
        yield candidate(x_P)


def _key(settings: Mapping[str, Any]) -> str:
    return json.dumps(settings, sort_keys=True)
