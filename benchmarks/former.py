"""Propose as this project did before trials could be paused, as a reference for the new policy.

It is a Gaussian process over settings and the share of the full length. It learns from the last report of a trial and
the one at a third. The fit of the kernel starts at long lengths. Trials are stopped at a third, for good.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler, RandomSampler
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from raytune_emotion.tuning.policy.acquisition import expected_improvement
from raytune_emotion.tuning.policy.candidates import domain_of
from raytune_emotion.tuning.policy.forecast import LENGTHS
from raytune_emotion.tuning.policy.gaussian_process import Floats, Posterior, Prior, fit_kernel
from raytune_emotion.tuning.policy.outlook import Draw
from raytune_emotion.tuning.policy.trial_attributes import SETTINGS
from raytune_emotion.tuning.space.space import Space

_STARTUP, _BEST, _WIDER = 4, 5, 1.4
_VARIANCE, _NOISE, _SHARE = (0.0, 1.0), (math.log(0.02), 1.5), (math.log(1.2), 0.4)
_UNKNOWN, _SPREAD = (0.5, 1.0), 0.4


class FormerSampler(BaseSampler):
    """Propose the candidate with the largest expected improvement."""

    def __init__(self, space: Space, seed: int, draw: Draw) -> None:
        self._space, self._domain, self._seed, self._draw = space, domain_of(space), seed, draw
        self._random = RandomSampler(seed=seed)

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return dict(self._space.parameters)

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        past = [each for each in study.get_trials(deepcopy=False) if SETTINGS in each.user_attrs]
        running = [each for each in past if each.state == TrialState.RUNNING]
        reported = sorted(
            (each for each in past if each.intermediate_values), key=lambda each: min(each.intermediate_values.values())
        )
        params = self._draw(search_space, reported[:_BEST], np.random.default_rng([self._seed, trial.number]))
        if not reported or len(past) - len(running) < _STARTUP:
            return _row(params, 0)
        promise_M = self._promise(reported, running, self._domain.settings_of(params))
        return _row(params, int(promise_M.argmax()))

    def _promise(self, reported: Sequence[FrozenTrial], running: Sequence[FrozenTrial], settings: Any) -> Floats:
        at, share_N, y_N = _points(reported)
        encode = self._domain.encoding
        x_ND = np.column_stack([encode([reported[number].user_attrs[SETTINGS] for number in at]), share_N])
        scale = max(float(y_N.std()), 1e-3)
        z_N = (y_N - y_N.mean()) / scale
        kernel, _ = fit_kernel(x_ND, z_N, self._prior())
        posterior = Posterior(kernel, x_ND, z_N)
        if running:
            posterior.believe(_whole(encode([trial.user_attrs[SETTINGS] for trial in running])))
        mean_M, std_M = posterior(_whole(encode(settings)))
        seen_N = posterior.mean(_whole(encode([trial.user_attrs[SETTINGS] for trial in reported])))
        return expected_improvement(mean_M, _WIDER * std_M, float(seen_N.min()))

    def _prior(self) -> Prior:
        names = self._domain.encoding.names
        unknown = math.log(_UNKNOWN[0] * math.sqrt(len(names) + 1)), _UNKNOWN[1]
        known = [[key for key in LENGTHS if f"{name}.".startswith(f"{key}.")] for name in names]
        lengths = [(math.log(LENGTHS[max(keys, key=len)]), _SPREAD) if keys else unknown for keys in known]
        return Prior(_VARIANCE, (*lengths, _SHARE), _NOISE)

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        return self._random.sample_independent(study, trial, param_name, param_distribution)


def _whole(x_MD: Floats) -> Floats:
    return np.column_stack([x_MD, np.ones(len(x_MD))])


def _row(params: Mapping[str, Any], number: int) -> dict[str, Any]:
    return {name: column[number : number + 1].tolist()[0] for name, column in params.items()}


def _points(reported: Sequence[FrozenTrial]) -> tuple[list[int], Floats, Floats]:
    """Return trial, share and log value of points, extrapolated by the mean remaining change of all trials."""
    logs = [{n: math.log(max(v, 1e-9)) for n, v in trial.intermediate_values.items()} for trial in reported]
    most = max(max(each) for each in logs)
    steps = [[each[n + 1] - each[n] for each in logs if {n, n + 1} <= {*each}] for n in range(1, most)]
    rest = np.cumsum([0.0, *(float(np.mean(step)) if step else 0.0 for step in reversed(steps))])[::-1]
    points = [
        (number, n / most, each[n] + float(rest[n - 1]))
        for number, each in enumerate(logs)
        for n in sorted({math.ceil(most / 3), max(each)} & {*each})
    ]
    at, share, value = zip(*points, strict=True)
    return [*at], np.array(share), np.array(value)
