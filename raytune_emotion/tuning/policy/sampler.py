"""Provide the search policy as a sampler for any Optuna study."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from optuna.distributions import BaseDistribution
from optuna.exceptions import ExperimentalWarning
from optuna.samplers import BaseSampler, CmaEsSampler, GPSampler, QMCSampler, RandomSampler, TPESampler
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial, TrialState

from raytune_emotion.tuning.policy.candidates import domain_of, domain_of_parameters, draw_candidates
from raytune_emotion.tuning.policy.forecast import Forecast
from raytune_emotion.tuning.policy.gaussian_process import on_one_thread
from raytune_emotion.tuning.policy.objective import JS_ALONE, Objective
from raytune_emotion.tuning.policy.outlook import Aim, Draw, Outlook
from raytune_emotion.tuning.policy.trial_attributes import SETTINGS
from raytune_emotion.tuning.space.space import Space


class ForecastSampler(BaseSampler):
    """Propose the configuration with the largest expected improvement of the study's best value.

    The forecast learns from complete, pruned, running and failed trials, from each as far as it was trained. Running
    trials count as if they had ended with their forecast, so that parallel workers get different configurations.

        study = optuna.create_study(sampler=ForecastSampler(seed=0))
        study.optimize(objective, n_trials=100)

    The proposal depends only on the seed, the number of the trial and the past. The first trials are random.
    """

    def __init__(
        self,
        space: Space | None = None,
        *,
        seed: int | None = None,
        objective: Objective = JS_ALONE,
        earlier: Sequence[Forecast] = (),
        reports: int = 1,
        draw: Draw = draw_candidates,
    ) -> None:
        """Make a sampler.

        Args:
            space: search space of a study of this project. Without it, the parameters are those of the study's trials;
                a trial ignores parameters that its branch of the objective does not use.
            seed: seed of the candidates; None for a random one.
            objective: objective of a study of this project.
            earlier: forecasts of other studies.
            reports: reports of a trial that is trained to its end, if known.
            draw: function that draws the candidates to compare.
        """
        self._space, self._earlier, self._draw = space, earlier, draw
        self._objective, self._reports = objective, reports
        self._seed = int(np.random.SeedSequence(seed).generate_state(1)[0])
        self._random = RandomSampler(seed=seed)

    def reseed_rng(self) -> None:
        self._seed = int(np.random.SeedSequence().generate_state(1)[0])
        self._random.reseed_rng()

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        if self._space is not None:
            return dict(self._space.parameters)
        found: dict[str, BaseDistribution] = {}
        for past in study.get_trials(deepcopy=False):
            if past.state != TrialState.WAITING:
                found |= {name: d for name, d in past.distributions.items() if not d.single()}
        # The order must not depend on which branch a trial took first.
        return dict(sorted(found.items()))

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        if not search_space:
            return {}
        if len(study.directions) > 1:
            raise ValueError("ForecastSampler: the study has several objectives; use one of Optuna's samplers")
        aim = Aim(self._objective, study.direction == StudyDirection.MAXIMIZE, self._reports)
        domain = domain_of_parameters(search_space) if self._space is None else domain_of(self._space)
        past = [
            each
            for each in study.get_trials(deepcopy=False)
            if each.number != trial.number
            and each.state != TrialState.WAITING
            and (self._space is None or SETTINGS in each.user_attrs)
        ]
        rng = np.random.default_rng([self._seed, trial.number])
        with on_one_thread():
            outlook = Outlook(domain, past, aim, self._earlier)
            offer = outlook.offer(outlook.candidates(rng, self._draw))
        return {} if offer is None else offer.params

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        return self._random.sample_independent(study, trial, param_name, param_distribution)


def _tpe(seed: int) -> BaseSampler:
    return TPESampler(multivariate=True, group=True, constant_liar=True, seed=seed)


def _cmaes(seed: int) -> BaseSampler:
    # CMA-ES cannot order choices, so they are drawn at random. Users of CMA-ES know this; suppress the warning.
    return CmaEsSampler(seed=seed, warn_independent_sampling=False)


#: Factories of Optuna's samplers, by their names in `--sampler`.
OPTUNA: Mapping[str, Callable[[int], BaseSampler]] = {
    "tpe": _tpe,
    "gp": lambda seed: GPSampler(seed=seed, warn_independent_sampling=False),
    "cmaes": _cmaes,
    "random": lambda seed: RandomSampler(seed=seed),
    "qmc": lambda seed: QMCSampler(seed=seed, scramble=True, warn_independent_sampling=False),
}
#: Samplers whose seed must be the same for all trials, because it selects a sequence.
_SEQUENCES = {"qmc"}


def make_sampler(name: str, seed: int, number: int) -> BaseSampler:
    """Make one of Optuna's samplers for a trial number, so that a resumed study makes the same proposals."""
    own = int(np.random.SeedSequence([seed, number]).generate_state(1)[0])
    with warnings.catch_warnings():
        # Sampling in groups is marked as experimental since 2021.
        warnings.simplefilter("ignore", ExperimentalWarning)
        return OPTUNA[name](seed if name in _SEQUENCES else own)
