"""What is tried next: the candidate that is expected to better what the study has by the most."""

import itertools
import json
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import FixedTrial, FrozenTrial, TrialState
from threadpoolctl import threadpool_limits

from raytune_emotion.tuning.policy.decisions import COST, SETTINGS, Begin, Proposer, best_js
from raytune_emotion.tuning.policy.forecast import (
    Configurations,
    Curve,
    Encoding,
    Floats,
    Forecast,
    encoding_of,
    expected_improvement,
    expected_improvement_of_front,
)
from raytune_emotion.tuning.policy.objective import JS_ALONE, Objective, pareto_front
from raytune_emotion.tuning.space.space import Fixed, Simplex, Space

#: Trials that end before any is modelled.
_STARTUP = 4
#: Candidates drawn at random, and as many that change one of the best trials.
_CANDIDATES, _BEST = 1000, 5
#: By how much less sure a forecast is taken to be than it says: it turns out too sure (`benchmarks.calibration`).
_WIDER = 1.4
#: Of a trial's parameters, a change draws some anew and moves the other numbers, in parts of their range.
_ANEW, _STEP = 0.2, 0.1
#: Parameters' values that are gone through, where all candidates were tried before.
_ENUMERABLE = 100_000

Column = npt.NDArray[Any]


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
    params = candidates(space, _leading(reported, objective)[:_BEST], seed)
    order = np.arange(len(next(iter(params.values()))))
    if earlier or (reported and len(past) - len(running) >= _STARTUP):
        # Matrices this small are slower on several threads, and other trials are training.
        with threadpool_limits(1):
            forecast = Forecast(encoding_of(space), curves(past), earlier)
            if running:
                forecast.believe(running)
            promise_M = _promise(objective, forecast, encoding_of(space), reported, settings_of(space, params))
        order = np.argsort(-promise_M, kind="stable")
    for number in order:
        trial = FixedTrial({name: column[number : number + 1].tolist()[0] for name, column in params.items()})
        if _key(space.suggest(trial)) not in tried:
            return trial.params
    return _first_untried(space, tried)


def _first_untried(space: Space, tried: Collection[str]) -> dict[str, Any] | None:
    """Return the first configuration, of a space that has few, that was not tried; chance need not have drawn it."""
    values = {name: _all_values(distribution) for name, distribution in space.parameters.items()}
    if math.prod(len(those) for those in values.values()) > _ENUMERABLE or not all(map(len, values.values())):
        return None
    for point in itertools.product(*values.values()):
        trial = FixedTrial(dict(zip(values, point, strict=True)))
        if _key(space.suggest(trial)) not in tried:
            return trial.params
    return None


def _all_values(distribution: BaseDistribution) -> Sequence[Any]:
    """Return the values that a parameter can have; none where they cannot be listed."""
    if isinstance(distribution, CategoricalDistribution):
        return distribution.choices
    if isinstance(distribution, IntDistribution):
        return range(distribution.low, distribution.high + 1, distribution.step)
    assert isinstance(distribution, FloatDistribution)
    if distribution.step is None:
        return ()
    steps = round((distribution.high - distribution.low) / distribution.step)
    return [distribution.low + number * distribution.step for number in range(steps + 1)]


def make_proposer(earlier: Sequence[Forecast] = (), objective: Objective = JS_ALONE) -> Proposer:
    """Have `propose` begin trials, as long as new ones may begin; it takes up none."""

    def answer(space: Space, past: list[FrozenTrial], seed: int, *, new: bool) -> Begin | None:
        params = propose(space, past, seed, earlier, objective) if new else None
        return None if params is None else Begin(params)

    return answer


def _promise(
    objective: Objective,
    forecast: Forecast,
    encoding: Encoding,
    reported: Sequence[FrozenTrial],
    settings: Configurations,
) -> Floats:
    """By how much each of M candidates is expected to better what there is, [M]."""
    mean_M, std_M = forecast(settings)
    std_M = _WIDER * std_M
    seen_N = forecast([trial.user_attrs[SETTINGS] for trial in reported])[0] if reported else mean_M
    improvement_M = expected_improvement(mean_M, std_M, float(np.min(seen_N)))
    if objective.cost is None or not reported:
        return improvement_M
    known = [(trial.user_attrs[SETTINGS], trial.user_attrs[COST]) for trial in reported]
    # Where a difference shows in JS, it need not in cost.
    cost_M, _ = Forecast(encoding, [Curve(its, {1: cost}) for its, cost in known], lengths={})(settings)
    if not objective.front:
        return improvement_M / np.exp(cost_M)
    logs_N = np.log([cost for _, cost in known])
    return expected_improvement_of_front(mean_M, std_M, cost_M, seen_N, logs_N)


def _leading(reported: Sequence[FrozenTrial], objective: Objective) -> list[FrozenTrial]:
    """The trials worth changing: the best first, of which a front keeps those that no cheaper one has bettered."""
    ranked = sorted(reported, key=best_js)
    return pareto_front(ranked, lambda trial: float(trial.user_attrs[COST])) if objective.front else ranked


def curves(past: Sequence[FrozenTrial]) -> list[Curve]:
    """What trials have shown until now; Optuna itself passes over those that failed."""
    return [
        Curve(trial.user_attrs[SETTINGS], {} if trial.state == TrialState.FAIL else trial.intermediate_values)
        for trial in past
        if trial.state == TrialState.FAIL or trial.intermediate_values
    ]


def candidates(space: Space, best: Sequence[FrozenTrial], seed: int) -> dict[str, Column]:
    """Values of every parameter, whether or not a branch of the space has use for it: at random, then near the best."""
    rng = np.random.default_rng(seed)
    parameters = space.parameters
    u_MP = rng.random((_CANDIDATES, len(parameters)))
    if best:
        near_BP = [
            [_unit(d, t.params[name]) if name in t.params else np.nan for name, d in parameters.items()] for t in best
        ]
        near_MP = np.array(near_BP)[np.arange(_CANDIDATES) % len(best)]
        steps_P = [0.0 if isinstance(d, CategoricalDistribution) else _STEP for d in parameters.values()]
        moved_MP = np.clip(near_MP + steps_P * rng.standard_normal(near_MP.shape), 0, 1)
        anew_MP = np.isnan(near_MP) | (rng.random(near_MP.shape) < _ANEW)
        u_MP = np.concatenate([u_MP, np.where(anew_MP, rng.random(near_MP.shape), moved_MP)])
    return {name: _values(d, u_M) for (name, d), u_M in zip(parameters.items(), u_MP.T, strict=True)}


def settings_of(space: Space, params: Mapping[str, Column]) -> pd.DataFrame:
    """What a space makes of parameters, of the settings in which trials can differ; a row each."""
    deciding = space.deciding()
    count = len(next(iter(params.values())))
    columns = {key: np.full(count, np.nan, object) for key in space.columns()}
    for values in {*zip(*[params[key] for key in deciding], strict=True)} or {()}:
        decided = dict(zip(deciding, values, strict=True))
        rows = np.all([np.full(count, True), *(params[key] == value for key, value in decided.items())], axis=0)
        found: dict[str, Any] = {}
        for key, (name, setting) in space.active(decided).items():
            if isinstance(setting, Simplex):
                raw = setting.raw_names(name)
                # Without a direction, where all are 1, they stand for the middle.
                parts = {loss: np.maximum(-np.log(params[raw[loss]][rows]), 1e-9) for loss in raw}
                found[key] = {loss: part / sum(parts.values()) for loss, part in parts.items()}
            elif isinstance(setting, Fixed):
                found[key] = setting.value
            elif key == "loss" and isinstance(setting, CategoricalDistribution):
                found[key] = {loss: params[name][rows] == loss for loss in setting.choices}
            else:
                found[key] = params[name][rows]
        for key, value in space.flat(found).items():
            if key in columns:
                columns[key][rows] = value
    return pd.DataFrame(columns)


def _ends(distribution: FloatDistribution | IntDistribution) -> tuple[float, float]:
    """Of what is drawn uniformly: its logarithm where it is drawn so; the steps at both ends are as wide as others."""
    half = (distribution.step or 0) / 2
    ends = distribution.low - half, distribution.high + half
    return (math.log(ends[0]), math.log(ends[1])) if distribution.log else ends


def _unit(distribution: BaseDistribution, value: Any) -> float:
    """Where a value lies in the unit interval."""
    if isinstance(distribution, CategoricalDistribution):
        return (distribution.choices.index(value) + 0.5) / len(distribution.choices)
    assert isinstance(distribution, FloatDistribution | IntDistribution)
    low, high = _ends(distribution)
    return ((math.log(value) if distribution.log else value) - low) / (high - low)


def _values(distribution: BaseDistribution, u_M: Floats) -> Column:
    """The inverse of it, of places in the unit interval."""
    if isinstance(distribution, CategoricalDistribution):
        count = len(distribution.choices)
        chosen_M: Column = np.array(distribution.choices, object)[np.minimum(u_M * count, count - 1).astype(int)]
        return chosen_M
    assert isinstance(distribution, FloatDistribution | IntDistribution)
    low, high = _ends(distribution)
    value_M = low + u_M * (high - low)
    if distribution.log:
        value_M = np.exp(value_M)
    if distribution.step:
        value_M = distribution.low + distribution.step * np.round((value_M - distribution.low) / distribution.step)
    value_M = np.clip(value_M, distribution.low, distribution.high)
    return value_M.astype(int) if isinstance(distribution, IntDistribution) else value_M


def _key(settings: Mapping[str, Any]) -> str:
    # 0.3 and 3 * 0.1 are the same setting, and so are 5 and 5.0.
    same = {
        key: f"{value:.9g}" if isinstance(value, int | float) and not isinstance(value, bool) else value
        for key, value in settings.items()
    }
    return json.dumps(same, sort_keys=True)
