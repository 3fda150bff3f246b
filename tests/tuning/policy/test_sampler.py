"""The sampler in studies of anybody's, driven by Optuna alone."""

import math
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import optuna
import pytest
import tomllib
from optuna.trial import TrialState

from raytune_emotion.tuning.policy import gaussian_process
from raytune_emotion.tuning.policy.decisions import FORECAST, SAMPLERS
from raytune_emotion.tuning.policy.sampler import OPTUNA, ForecastSampler, make_sampler

optuna.logging.set_verbosity(optuna.logging.WARNING)


def conditional(trial):
    """A valley in each of two branches, which have parameters of their own; some trials are pruned, and some fail."""
    x = trial.suggest_float("x", -5, 5)
    if trial.suggest_categorical("kind", ["narrow", "wide"]) == "narrow":
        value = (x - 1) ** 2 + math.log10(trial.suggest_float("rate", 1e-3, 10, log=True)) ** 2
    else:
        value = (x + 2) ** 2 + abs(trial.suggest_int("layers", 0, 10) - 3) + 0.5
    for step in range(4):
        trial.report(value + 3 - step, step)
        if step == 1 and value > 20:
            raise optuna.TrialPruned
    if trial.number % 11 == 3:
        raise RuntimeError("out of luck")
    return value


def optimised(sampler, trials=50, **options):
    study = optuna.create_study(sampler=sampler, **options)
    study.optimize(conditional, n_trials=trials, catch=(RuntimeError,))
    return study


def test_it_searches_branches_beside_pruned_and_failed_trials():
    ours = [optimised(ForecastSampler(seed=seed)) for seed in range(3)]
    random = [optimised(optuna.samplers.RandomSampler(seed=seed)) for seed in range(3)]
    assert np.median([study.best_value for study in ours]) < 0.3 * np.median([study.best_value for study in random])
    assert {trial.state for trial in ours[0].trials} == {TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL}


def test_what_is_proposed_follows_from_the_seed_and_the_past():
    first, again, other = (optimised(ForecastSampler(seed=seed), 12) for seed in (1, 1, 2))
    assert [t.params for t in first.trials] == [t.params for t in again.trials]
    assert [t.params for t in first.trials] != [t.params for t in other.trials]
    # A sampler that is made anew, as when a study goes on in another process.
    resumed = optuna.create_study(sampler=ForecastSampler(seed=1))
    for trials in (7, 5):
        resumed.sampler = ForecastSampler(seed=1)
        resumed.optimize(conditional, n_trials=trials, catch=(RuntimeError,))
    assert [t.params["kind"] for t in resumed.trials][4:] == [t.params["kind"] for t in first.trials][4:]


def test_workers_are_not_sent_to_one_place():
    def valley(trial):
        return (trial.suggest_float("x", 0, 1) - 0.3) ** 2 + (trial.suggest_float("y", 0, 1) - 0.6) ** 2

    study = optuna.create_study(sampler=ForecastSampler(seed=0))
    study.optimize(valley, n_trials=12)
    running = [study.ask() for _ in range(6)]
    points = np.array([[trial.suggest_float("x", 0, 1), trial.suggest_float("y", 0, 1)] for trial in running])
    apart = np.sqrt(((points[:, None] - points) ** 2).sum(axis=2)) + np.eye(len(points))
    assert apart.min() > 0.01


def test_high_values_are_found_where_they_are_wanted():
    study = optuna.create_study(sampler=ForecastSampler(seed=0), direction="maximize")
    study.optimize(lambda trial: -((trial.suggest_float("x", -5, 5) - 2) ** 2), n_trials=25)
    assert study.best_params["x"] == pytest.approx(2, abs=0.2)


def test_a_study_of_several_objectives_is_refused():
    study = optuna.create_study(sampler=ForecastSampler(seed=0), directions=["minimize", "minimize"])
    study.optimize(lambda trial: (trial.suggest_float("x", 0, 1), 1.0), n_trials=1)
    with pytest.raises(ValueError, match="several objectives"):
        study.optimize(lambda trial: (trial.suggest_float("x", 0, 1), 1.0), n_trials=1)


@pytest.mark.parametrize("broken", ["minimize", "_cholesky"])
def test_a_fit_that_fails_falls_back_and_says_so(monkeypatch, broken):
    def fails(*arguments, **options):
        raise np.linalg.LinAlgError("not positive definite")

    monkeypatch.setattr(gaussian_process, broken, fails)
    with pytest.warns(RuntimeWarning, match=r"forecast: .*not positive definite"):
        study = optimised(ForecastSampler(seed=0), 10)
    assert len({trial.params["x"] for trial in study.trials}) == 10


def test_values_that_say_nothing_are_borne():
    for value in (0.0, 1.0, math.inf):
        study = optuna.create_study(sampler=ForecastSampler(seed=0))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            study.optimize(lambda trial, value=value: value + 0 * trial.suggest_float("x", 0, 1), n_trials=8)
        assert len({trial.params["x"] for trial in study.trials}) == 8


def test_every_name_of_a_sampler_makes_one():
    assert {*SAMPLERS} == {FORECAST, *OPTUNA}
    for name in OPTUNA:
        proposed = []
        for _ in range(2):
            study = optuna.create_study()
            for number in range(6):
                study.sampler = make_sampler(name, 7, number)
                study.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=1)
            proposed.append([trial.params["x"] for trial in study.trials])
        assert proposed[0] == proposed[1]
        assert len({*proposed[0]}) == 6


def test_what_the_samplers_import_is_installed_with_the_package():
    project = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text())["project"]
    installed = {re.split(r"[\[<>=]", each)[0] for each in project["dependencies"]}
    assert {"cmaes", "scipy", "torch"} <= installed, "Optuna asks for none of them, and its samplers import them"


def test_the_parameters_of_branches_are_drawn_anew_for_each_trial():
    def objective(trial):
        if trial.suggest_categorical("kind", ["a", "b"]) == "a":
            return trial.suggest_float("rate", 0, 1)
        return 1 + trial.suggest_float("width", 0, 1)

    for name in OPTUNA:
        study = optuna.create_study()
        for number in range(16):
            study.sampler = make_sampler(name, 0, number)
            study.optimize(objective, n_trials=1)
        drawn = [value for trial in study.trials for key, value in trial.params.items() if key != "kind"]
        assert len({*drawn}) == 16, name


def branches(trial):
    if trial.suggest_categorical("kind", ["p", "q"]) == "p":
        return float(trial.suggest_int("m", 0, 7))
    return 1.5 + trial.suggest_int("n", 0, 7)


def with_a_constant(trial):
    trial.suggest_categorical("model", ["resnet"])
    return float(trial.suggest_int("m", 0, 3) + trial.suggest_int("n", 0, 3))


@pytest.mark.parametrize("objective", [branches, with_a_constant])
def test_no_configuration_is_tried_twice(objective):
    study = optuna.create_study(sampler=ForecastSampler(seed=0))
    study.optimize(objective, n_trials=16)
    # The first trials of a study are random.
    later = [str(sorted(trial.params.items())) for trial in study.trials[4:]]
    assert len({*later}) == len(later)


def test_it_keeps_away_from_what_is_pruned_before_a_report():
    def objective(trial):
        x, y = trial.suggest_float("x", 0, 1), trial.suggest_float("y", 0, 1)
        if x < 0.5:
            raise optuna.TrialPruned
        return x + (y - 0.5) ** 2

    study = optuna.create_study(sampler=ForecastSampler(seed=0))
    study.optimize(objective, n_trials=40)
    assert sum(trial.state == TrialState.PRUNED for trial in study.trials) < 20


def test_the_value_of_a_trial_counts_not_its_last_report():
    def folds(trial):
        x = trial.suggest_float("x", 0, 1)
        values = [(x - centre) ** 2 for centre in (0.1, 0.5, 0.9)]
        for number, value in enumerate(values):
            trial.report(value, number)
        return sum(values) / 3

    study = optuna.create_study(sampler=ForecastSampler(seed=0))
    study.optimize(folds, n_trials=25)
    assert study.best_params["x"] == pytest.approx(0.5, abs=0.02)


def test_a_parameter_whose_range_changes_is_searched_in_its_range():
    def triangle(trial):
        x = trial.suggest_float("x", 0.1, 1)
        return 2 - trial.suggest_float("y", 0, x) / x + (x - 0.9) ** 2

    study = optuna.create_study(sampler=ForecastSampler(seed=0))
    study.optimize(triangle, n_trials=25)
    assert all(trial.params["y"] <= trial.params["x"] for trial in study.trials)
    assert np.median([trial.params["y"] / trial.params["x"] for trial in study.trials[-10:]]) > 0.8
    assert study.best_value == pytest.approx(1, abs=0.02)


#: Two threads whose computations overlap, the first of which ends first. Prints the threads of BLAS before and after.
OVERLAP = """
import threading
from threadpoolctl import ThreadpoolController
from raytune_emotion.tuning.policy.gaussian_process import on_one_thread

pools = ThreadpoolController()

def threads():
    return [pool["num_threads"] for pool in pools.select(user_api="blas").info()]

def compute(entered, may_end):
    with on_one_thread():
        entered.set()
        may_end.wait(60)

print(threads())
events = [(threading.Event(), threading.Event()) for _ in range(2)]
running = [threading.Thread(target=compute, args=each) for each in events]
for thread, (entered, _) in zip(running, events):
    thread.start()
    entered.wait(0.5)  # the second one may wait for the first one
for thread, (entered, may_end) in zip(running, events):
    entered.wait(60)
    may_end.set()
    thread.join(60)
print(threads())
"""


def test_threads_that_compute_at_once_leave_the_limit_of_blas_as_it_was():
    # In a process of its own, where BLAS has two threads.
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "2"}
    run = subprocess.run([sys.executable, "-c", OVERLAP], env=environment, capture_output=True, text=True, check=True)
    before, after = run.stdout.splitlines()
    assert "2" in before
    assert after == before


@pytest.mark.parametrize("choices", [[(50,), (100,), (50, 50)], [float("nan"), 1.0], [None, "a", 3]])
def test_choices_may_be_of_any_kind(choices):
    with warnings.catch_warnings():
        # Optuna warns of tuples, because not every storage keeps them.
        warnings.simplefilter("ignore", UserWarning)
        study = optuna.create_study(sampler=ForecastSampler(seed=0))
        study.optimize(
            lambda trial: choices.index(trial.suggest_categorical("c", choices)) + trial.suggest_float("x", 0, 1),
            n_trials=8,
        )
    assert study.best_value < 1
