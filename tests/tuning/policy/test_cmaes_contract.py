"""CMA-ES without the pickle that Optuna's keeps in a study. A new version of Optuna breaks this test."""

import inspect
import pickle

import numpy as np
import optuna
import pytest
from optuna.samplers import CmaEsSampler

from raytune_emotion.tuning.policy.cmaes_patches import CmaEsFromTrials
from raytune_emotion.tuning.policy.sampler import make_sampler

SIGNATURES = {
    "_get_trials": ["self", "study"],
    "_restore_optimizer": ["self", "completed_trials"],
    "_init_optimizer": ["self", "trans", "direction"],
    "_get_solution_trials": ["self", "trials", "generation"],
}
RAN = []


def run_foreign_code():
    RAN.append("foreign code")


class Payload:
    def __reduce__(self):
        return run_foreign_code, ()


class Watched(CmaEsFromTrials):
    def __init__(self, **options):
        super().__init__(**options)
        self.made = []

    def _init_optimizer(self, trans, direction):
        self.made.append(super()._init_optimizer(trans, direction))
        return self.made[-1]


def bowl(trial):
    return sum((trial.suggest_float(name, -5, 5) - 1) ** 2 for name in "abc")


def searched(sampler, trials=60):
    study = optuna.create_study()
    for number in range(trials):
        study.sampler = sampler(number)
        study.optimize(bowl, n_trials=1)
    return study


def test_the_private_methods_are_as_expected():
    for name, parameters in SIGNATURES.items():
        assert list(inspect.signature(getattr(CmaEsSampler, name)).parameters) == parameters


def test_the_distribution_is_that_of_optuna():
    study = searched(lambda number: CmaEsSampler(seed=number))
    kept = CmaEsSampler()._restore_optimizer(study.trials)
    study.sampler = Watched(seed=0)
    study.optimize(bowl, n_trials=1)
    (made,) = study.sampler.made
    assert made.generation == kept.generation > 5
    np.testing.assert_allclose(made.mean, kept.mean)
    np.testing.assert_allclose(made._C, kept._C)
    assert made._sigma == pytest.approx(kept._sigma)
    assert not any(key.startswith("cma:optimizer") for key in study.trials[-1].system_attrs)


def test_it_never_loads_a_pickle_of_a_study():
    study = searched(lambda number: make_sampler("cmaes", 0, number), 4)
    foreign = study.ask()
    payload = pickle.dumps(Payload())
    study._storage.set_trial_system_attr(foreign._trial_id, "cma:optimizer:0", payload.hex())
    study.tell(foreign, bowl(foreign))
    study.sampler = make_sampler("cmaes", 0, 5)
    study.optimize(bowl, n_trials=1)
    assert not RAN
    pickle.loads(payload)  # so this is what Optuna's own sampler would have done
    assert RAN == ["foreign code"]
