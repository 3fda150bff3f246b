"""Replace the part of Optuna's CMA-ES that loads a pickle.

`tests/tuning/policy/test_cmaes_contract.py` names the private interfaces that are used.
"""

from typing import Any

from optuna.distributions import BaseDistribution
from optuna.samplers import CmaEsSampler
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial


class CmaEsFromTrials(CmaEsSampler):
    """Compute the distribution of CMA-ES from the trials.

    Optuna's sampler keeps it as a pickle in the attributes of trials. A pickle can run code, and a study may come from
    a stranger.
    """

    _complete: list[FrozenTrial]

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        self._complete = self._get_trials(study)
        return super().sample_relative(study, trial, search_space)

    def _restore_optimizer(self, completed_trials: list[FrozenTrial]) -> None:
        """Never load a distribution, so that `_init_optimizer` makes it."""

    def _init_optimizer(self, trans: Any, direction: StudyDirection) -> Any:
        """Make the distribution of the present generation from all generations before it."""
        optimizer = super()._init_optimizer(trans, direction)
        sign = 1.0 if direction == StudyDirection.MINIMIZE else -1.0
        while True:
            trials = self._get_solution_trials(self._complete, optimizer.generation)[: optimizer.population_size]
            if len(trials) < optimizer.population_size:
                return optimizer
            optimizer.tell([(trans.transform(each.params), sign * each.values[0]) for each in trials])
