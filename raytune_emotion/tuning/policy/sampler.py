"""Provide the search policy as a sampler for any Optuna study."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from optuna.distributions import BaseDistribution
from optuna.exceptions import ExperimentalWarning
from optuna.samplers import BaseSampler, GPSampler, QMCSampler, RandomSampler, TPESampler
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial, TrialState

from raytune_emotion.tuning.policy.candidates import domain_of, domain_of_parameters, draw_candidates
from raytune_emotion.tuning.policy.cmaes_patches import CmaEsFromTrials
from raytune_emotion.tuning.policy.encoding import values_at
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
        #: Proposed parameters whose ranges differ between trials, each as a place in its range, from 0 to 1; by the
        #: names of studies and the numbers of unfinished trials.
        self._moving: dict[tuple[str, int], Mapping[str, float]] = {}

    def reseed_rng(self) -> None:
        self._seed = int(np.random.SeedSequence().generate_state(1)[0])
        self._random.reseed_rng()

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        if self._space is not None:
            return dict(self._space.parameters)
        found: dict[str, BaseDistribution] = {}
        for past in study.get_trials(deepcopy=False):
            if past.state != TrialState.WAITING:
                found = {name: d for name, d in past.distributions.items() if not d.single()} | found
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
        past = [
            each
            for each in study.get_trials(deepcopy=False)
            if each.number != trial.number
            and each.state != TrialState.WAITING
            and (self._space is None or SETTINGS in each.user_attrs)
        ]
        domain = domain_of_parameters(search_space, past) if self._space is None else domain_of(self._space)
        rng = np.random.default_rng([self._seed, trial.number])
        with on_one_thread():
            outlook = Outlook(domain, past, aim, self._earlier)
            offer = outlook.offer(outlook.candidates(rng, self._draw))
        if offer is None:
            return {}
        # The ranges of the moving ones are known when the trial asks for them.
        if moving := {name: value for name, value in offer.params.items() if name in domain.moving}:
            self._moving[study.study_name, trial.number] = moving
        return {name: value for name, value in offer.params.items() if name not in domain.moving}

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        place = self._moving.get((study.study_name, trial.number), {}).get(param_name)
        if place is not None:
            return values_at(param_distribution, np.array([place])).tolist()[0]
        return self._random.sample_independent(study, trial, param_name, param_distribution)

    def after_trial(self, study: Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None) -> None:
        self._moving.pop((study.study_name, trial.number), None)


def _tpe(seed: int, own: int) -> BaseSampler:
    return TPESampler(multivariate=True, group=True, constant_liar=True, seed=own)


def _cmaes(seed: int, own: int) -> BaseSampler:
    # CMA-ES cannot order choices, so they are drawn at random. Users of CMA-ES know this; suppress the warning.
    return CmaEsFromTrials(seed=own, warn_independent_sampling=False)


def _qmc(seed: int, own: int) -> BaseSampler:
    # The seed selects the sequence, which is the same for all trials. Parameters of branches are drawn at random.
    return QMCSampler(
        seed=seed, scramble=True, independent_sampler=RandomSampler(seed=own), warn_independent_sampling=False
    )


#: Factories of Optuna's samplers, by their names in `--sampler`. They take the seed of the study and that of the trial.
OPTUNA: Mapping[str, Callable[[int, int], BaseSampler]] = {
    "tpe": _tpe,
    "gp": lambda seed, own: GPSampler(seed=own, warn_independent_sampling=False),
    "cmaes": _cmaes,
    "random": lambda seed, own: RandomSampler(seed=own),
    "qmc": _qmc,
}


def make_sampler(name: str, seed: int, number: int) -> BaseSampler:
    """Make one of Optuna's samplers for a trial number, so that a resumed study makes the same proposals."""
    own = int(np.random.SeedSequence([seed, number]).generate_state(1)[0])
    with warnings.catch_warnings():
        # Sampling in groups is marked as experimental since 2021.
        warnings.simplefilter("ignore", ExperimentalWarning)
        return OPTUNA[name](seed, own)
