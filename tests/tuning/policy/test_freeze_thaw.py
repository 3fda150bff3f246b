"""Which trial trains next, and for how long, in simulated studies: no Ray, no training."""

import math

import numpy as np
import optuna
import pytest
from optuna.distributions import FloatDistribution, IntDistribution
from optuna.trial import TrialState

from benchmarks.simulation import Simulation
from raytune_emotion.tuning.policy import forecast, freeze_thaw, outlook
from raytune_emotion.tuning.policy.decisions import NO_LIMITS, Limits, TakeUp
from raytune_emotion.tuning.policy.freeze_thaw import FreezeThaw, stretch_ends
from raytune_emotion.tuning.policy.inputs import PolicyInputs
from raytune_emotion.tuning.policy.objective import BY_SIZE, JS_ALONE, OBJECTIVES
from raytune_emotion.tuning.policy.outlook import Outlook
from raytune_emotion.tuning.policy.policies import make_sampler_of
from raytune_emotion.tuning.policy.trial_attributes import (
    COST,
    PAUSED,
    RESUMED_IN,
    SECONDS,
    START,
    TAKEN_UP,
    is_paused,
)
from raytune_emotion.tuning.space.space import Space
from raytune_emotion.tuning.study.optuna_study import Searcher

REPORTS = 16
LONG_LOOK = freeze_thaw._LONG_LOOK
SPACE = Space({"optim.lr": FloatDistribution(0.0, 1.0), "train.batch_size": FloatDistribution(0.0, 1.0)})


def inputs_of(seed):
    return PolicyInputs(SPACE, REPORTS, REPORTS, seed)


def late(settings):
    """A curve that shows late what comes of a configuration."""
    quality = 1 - abs(settings["optim.lr"] - 0.3)
    done = np.arange(1, REPORTS + 1) / REPORTS
    return 0.5 - 0.02 * done - 0.3 * quality * np.maximum(0, done - 0.25) ** 2, np.ones(REPORTS)


def early(settings):
    """A curve that falls fast, and with it what was to be found."""
    quality = 1 - abs(settings["optim.lr"] - 0.3)
    return 0.5 - 0.3 * quality * (1 - np.exp(-np.arange(1, REPORTS + 1) / 5)), np.ones(REPORTS)


class Study:
    """A study that is simulated."""

    def __init__(
        self, *, respond=late, take_up_s=0.0, trials=10**9, paused=10**9, seed=0, remade=False,
        proposes=True, assumed_s=None,
    ):  # fmt: skip
        self.optuna = optuna.create_study()
        self.most_paused, self._trials, self._paused = 0, trials, paused

        def policy():
            assumed = take_up_s if assumed_s is None else assumed_s
            return FreezeThaw(inputs_of(seed), take_up_s=assumed, proposes=proposes)

        self._searcher = Searcher(
            self.optuna, SPACE, Remade(policy) if remade else policy(),
            sampler=make_sampler_of(inputs_of(seed), "random"),
        )  # fmt: skip
        self._respond, self._take_up_s = respond, take_up_s

    def run(self, seconds, workers=1):
        simulation = Simulation(self._searcher, self._respond, workers, self._take_up_s, self._limits)
        return simulation.run(seconds)

    def _limits(self):
        self.most_paused = max(self.most_paused, self.count(paused=True))
        return Limits(new=len(self.optuna.trials) < self._trials, paused=self._paused)

    def count(self, *, paused):
        return sum(is_paused(trial) == paused for trial in self.optuna.trials)

    @property
    def reports(self):
        return [len(trial.intermediate_values) for trial in self.optuna.trials]


class Remade:
    """A policy that is made anew for every question, as by a study that is interrupted all the time."""

    def __init__(self, make):
        self._make = make

    def next(self, past, limits):
        return self._make().next(past, limits)

    def decide(self, *about):
        return self._make().decide(*about)


@pytest.fixture(autouse=True)
def _quiet():
    optuna.logging.set_verbosity(optuna.logging.WARNING)


@pytest.fixture(autouse=True)
def short_looks(monkeypatch):
    """Let a first look count as short, however many reports there are, so that first trials pause like others."""
    monkeypatch.setattr(freeze_thaw, "_LONG_LOOK", 1.0)


@pytest.fixture
def long_looks(short_looks, monkeypatch):
    """Let a first look count as it does in a study."""
    monkeypatch.setattr(freeze_thaw, "_LONG_LOOK", LONG_LOOK)


def test_a_stretch_is_as_long_as_all_before_it():
    assert stretch_ends(51) == [2, 4, 8, 16, 32]
    assert stretch_ends(16) == [2, 4, 8]
    assert stretch_ends(6) == [2, 4]
    assert stretch_ends(2) == stretch_ends(1) == []


def test_a_trial_is_trained_to_its_end_early_though_curves_show_late_what_comes_of_them(monkeypatch):
    study = Study()
    study.run(2.75 * REPORTS)
    assert max(study.reports) == REPORTS
    monkeypatch.setattr(freeze_thaw, "_LONGEST_IN", math.inf)
    monkeypatch.setattr(freeze_thaw, "_LEAST_NEW_SHARE", 1.0)
    study = Study()
    study.run(2.75 * REPORTS)
    assert max(study.reports) < REPORTS, "the test is of no use"


@pytest.mark.parametrize("start", [1, 3])
def test_two_start_points_at_most_train_to_their_end_before_others_are_looked_at_again(start):
    study = Study()
    for rate in (0.9, 0.8, 0.7)[:start]:
        study.optuna.enqueue_trial({"optim.lr": rate, "train.batch_size": 0.5}, {START: True})
    straight = min(start, 2)
    study.run((straight + 0.5) * REPORTS)
    assert study.reports[:straight] == [REPORTS] * straight
    assert 0 < max(study.reports[straight:]) < REPORTS / 2
    assert not any(trial.user_attrs.get(TAKEN_UP) for trial in study.optuna.trials[:straight])


def test_a_first_trial_that_is_no_start_point_pauses():
    study = Study()
    study.optuna.enqueue_trial({"optim.lr": 0.9, "train.batch_size": 0.5})
    study.run(REPORTS)
    assert study.reports[0] < REPORTS


@pytest.mark.usefixtures("long_looks")
@pytest.mark.parametrize(
    ("reports", "workers", "straight"), [(8, 1, 2), (16, 2, 2), (32, 1, 2), (51, 1, 0), (51, 2, 0), (16, 3, 0)]
)
def test_the_first_two_trials_train_to_their_end_where_looks_are_long_and_few_run(reports, workers, straight):
    policy = FreezeThaw(PolicyInputs(SPACE, reports, reports, 0))
    study = optuna.create_study()
    searcher = Searcher(study, SPACE, policy, sampler=make_sampler_of(inputs_of(0), "random"))
    simulation = Simulation(searcher, lambda settings: (np.linspace(0.5, 0.4, reports), np.ones(reports)), workers, 0.0)
    simulation.run((straight / workers + 0.5) * reports)
    had = [len(trial.intermediate_values) for trial in study.trials]
    assert had[:straight] == [reports] * straight
    assert had[straight] < reports


def test_one_of_many_workers_trains_further_than_all_before_and_the_others_search():
    study = Study()
    study.run(REPORTS / 2, workers=8)
    assert max(study.reports) > 4
    assert len(study.reports) > 12


@pytest.mark.usefixtures("long_looks")
def test_eight_trials_find_no_less_than_without_stopping_in_the_same_time():
    for seed in range(4):
        study = Study(respond=early, trials=8, proposes=False, seed=seed)
        found = study.run(math.inf)
        took = sum(study.reports)
        whole = [early(trial.params)[0] for trial in study.optuna.trials]  # the same configurations, in the same order
        assert took < 8 * REPORTS
        assert found.best[-1] <= np.concatenate(whole)[:took].min()


def test_decisions_follow_from_the_past_alone():
    whole, broken = Study(), Study(remade=True)
    whole.run(2 * REPORTS, workers=2)
    broken.run(2 * REPORTS, workers=2)
    assert [trial.params for trial in whole.optuna.trials] == [trial.params for trial in broken.optuna.trials]
    assert whole.reports == broken.reports
    assert whole.count(paused=True)


@pytest.mark.parametrize(("workers", "least", "most"), [(8, 1, 1), (32, 2.5, 4)])
def test_with_many_workers_a_kernel_and_the_best_candidates_serve_several_forecasts(monkeypatch, workers, least, most):
    fitted, drawn, forecasts = [], [], []
    fit, candidates, curves = forecast.fit_kernel, Outlook.candidates, outlook.curves_of
    monkeypatch.setattr(forecast, "fit_kernel", lambda *args: fitted.append(1) or fit(*args))
    monkeypatch.setattr(Outlook, "candidates", lambda *args: drawn.append(1) or candidates(*args))
    monkeypatch.setattr(
        outlook, "curves_of", lambda *args, **named: forecasts.append(len(drawn)) or curves(*args, **named)
    )
    study = Study()
    study.run(2 * REPORTS, workers)
    assert least <= len(forecasts) / len(fitted) <= most
    assert forecasts[0] >= workers, "before the first forecast, they are drawn for each trial"
    assert len(drawn) - forecasts[0] <= len(fitted)
    params = [tuple(trial.params.values()) for trial in study.optuna.trials]
    assert len({*params}) == len(params) > workers, "a candidate that is kept begins once"


def test_a_small_space_is_tried_as_a_whole_also_with_many_workers():
    space = Space({"optim.lr": IntDistribution(1, 8), "train.batch_size": IntDistribution(1, 8)})
    study = optuna.create_study()
    policy = FreezeThaw(PolicyInputs(space, REPORTS, REPORTS, 0), take_up_s=0.0)
    searcher = Searcher(study, space, policy, sampler=make_sampler_of(inputs_of(0), "random"))
    Simulation(searcher, lambda settings: (np.linspace(0.5, 0.4, REPORTS), np.ones(REPORTS)), 32).run(math.inf)
    tried = [tuple(trial.params.values()) for trial in study.trials]
    assert len(tried) == len({*tried}) == 64


def test_new_configurations_are_worked_out_only_where_one_may_begin(monkeypatch):
    """That takes about half of the time of a decision."""
    asked, planned = [], []
    offer, make_plan = Outlook.offer, FreezeThaw._make_plan
    monkeypatch.setattr(Outlook, "offer", lambda *args: asked.append(1) or offer(*args))
    monkeypatch.setattr(FreezeThaw, "_make_plan", lambda *args: planned.append(1) or make_plan(*args))
    study = Study()
    study.run(4 * REPORTS)
    assert len(study.reports) <= len(asked) < 0.8 * len(planned)


def test_a_trial_that_failed_after_it_was_let_go_on_is_not_taken_up():
    """Nothing was asked in between, so that the plan is the one by which it went on."""
    study = Study(trials=8)
    study.run(REPORTS)
    past = study.optuna.get_trials()
    policy = FreezeThaw(inputs_of(seed=0), take_up_s=0.0)
    limits = Limits(new=False, paused=8)
    best = past[policy.next(past, limits).number]
    length = len(best.intermediate_values)
    report = {"report": length, "epoch": float(length), "seconds": float(length)}
    best.user_attrs[PAUSED] = False
    assert policy.decide(str(best.number), report, past, limits) == "go on"
    best.state = TrialState.FAIL
    assert policy.next(past, limits) != TakeUp(best.number)


def test_a_space_that_has_no_other_configuration_goes_on_with_its_paused_trials(monkeypatch):
    """Also one whose parameters have too many values to be counted, of which only few are told apart."""
    offer = Outlook.offer
    monkeypatch.setattr(Outlook, "offer", lambda self, *_: None if len(self._past) == 6 else offer(self, *_))
    study = Study(take_up_s=2.0)
    study.run(math.inf)
    assert len(study.reports) == 6
    assert max(study.reports) == REPORTS


def test_a_space_that_has_no_other_configuration_is_planned_once_without_one(monkeypatch):
    study = Study(trials=8)
    study.run(REPORTS)
    past = study.optuna.get_trials()
    planned, make_plan = [], FreezeThaw._make_plan
    monkeypatch.setattr(FreezeThaw, "_make_plan", lambda *args: planned.append(1) or make_plan(*args))
    monkeypatch.setattr(FreezeThaw, "_has_begun_enough", lambda *_: True)  # else one is worked out with the plan
    monkeypatch.setattr(Outlook, "offer", lambda *_: None)
    policy = FreezeThaw(inputs_of(seed=0), take_up_s=1e9)
    for _ in range(3):
        policy.next(past, NO_LIMITS)
    assert len(planned) == 2, "with new trials, and then without"


@pytest.mark.parametrize(("trials", "workers"), [(10**9, 1), (8, 1), (16, 4)])
def test_trials_that_stop_early_by_themselves_do_not_make_all_others_run_to_their_end(trials, workers):
    def stopped_early(settings):
        values, seconds = early(settings)
        return values[:10], seconds[:10]

    study = Study(respond=stopped_early, trials=trials)
    study.run(8 * REPORTS)
    begun = [reports for reports in study.reports if reports]
    assert 10 in begun, "a trial is trained to its end early"
    assert sum(reports < 10 for reports in begun) >= len(begun) / 4


def test_a_new_trial_that_another_sampler_draws_promises_what_an_average_one_does(monkeypatch):
    offered = {}
    make_offer = FreezeThaw._make_offer

    def noted(self, *about):
        offered[self._proposes] = make_offer(self, *about)
        return offered[self._proposes]

    monkeypatch.setattr(FreezeThaw, "_make_offer", noted)
    study = Study()
    study.run(4 * REPORTS)
    for proposes in (True, False):
        FreezeThaw(inputs_of(seed=0), take_up_s=0.0, proposes=proposes).next(study.optuna.get_trials(), NO_LIMITS)
    assert offered[False].merit < offered[True].merit - 0.5


@pytest.mark.parametrize(("trials", "workers"), [(10**9, 2), (16, 4)])
def test_taking_trials_up_costs_a_small_share_of_the_training(trials, workers):
    for take_up_s in (0.2, 2.0):
        study = Study(take_up_s=take_up_s, trials=trials)
        study.run(4 * trials if trials < 100 else 2 * REPORTS, workers=workers)
        trained_s = sum(study.reports)
        taken_up = sum(trial.user_attrs.get(TAKEN_UP, 0) for trial in study.optuna.trials)
        assert take_up_s * taken_up <= 0.05 * trained_s
        assert all(SECONDS in trial.user_attrs for trial in study.optuna.trials if trial.user_attrs.get(PAUSED))


def test_what_taking_trials_up_costs_is_measured_where_it_differs_from_what_is_assumed():
    study = Study(take_up_s=2.0, assumed_s=0.01)
    study.run(6 * REPORTS)
    attributes = [trial.user_attrs for trial in study.optuna.trials]
    taken_up = sum(each.get(TAKEN_UP, 0) for each in attributes)
    assert 0 < 2.0 * taken_up <= 0.05 * sum(study.reports)
    assert {each[RESUMED_IN] for each in attributes if RESUMED_IN in each} == {2.0}


def test_paused_trials_are_bounded_and_the_least_promising_are_pruned():
    study = Study(paused=3)
    study.run(6 * REPORTS)
    pruned = [trial for trial in study.optuna.trials if trial.state == TrialState.PRUNED]
    assert pruned
    assert study.count(paused=True) <= 3
    assert study.most_paused <= 4, "one more, until a place is free"
    values = [min(trial.intermediate_values.values(), default=math.inf) for trial in study.optuna.trials]
    assert min(values) < min(min(trial.intermediate_values.values()) for trial in pruned)


def test_a_study_of_few_trials_ends_by_itself_with_a_finished_model():
    study = Study(trials=8)
    study.run(1000 * REPORTS)
    assert len(study.optuna.trials) == 8
    assert REPORTS in study.reports
    assert sum(study.reports) < 8 * REPORTS


@pytest.mark.parametrize(("workers", "seed"), [(2, 0), (2, 1), (8, 0)])
def test_a_trial_that_was_pruned_is_never_taken_up(workers, seed, monkeypatch):
    monkeypatch.setattr(freeze_thaw, "_LEAST_NEW_SHARE", 1.0)  # so that more are paused than may be
    study = Study(paused=3, seed=seed)
    study.run(12 * REPORTS / workers, workers=workers)
    assert any(trial.state == TrialState.PRUNED for trial in study.optuna.trials)
    assert study.count(paused=True) <= 3 + workers


def test_a_small_trial_with_a_bad_js_is_taken_up_for_a_front_of_js_and_size():
    study = Study(trials=8)
    study.run(1000 * REPORTS)
    past = study.optuna.get_trials()
    paused = [trial for trial in past if is_paused(trial)]
    worst = max(paused, key=lambda trial: min(trial.intermediate_values.values()))
    for trial in past:
        trial.user_attrs[COST] = 1.0 if trial is worst else 10.0
    limits = Limits(new=False, paused=8)
    answers = [
        FreezeThaw(PolicyInputs(SPACE, REPORTS, REPORTS, 0, objective), take_up_s=0.0).next(past, limits)
        for objective in (JS_ALONE, OBJECTIVES[BY_SIZE])
    ]
    assert answers == [None, TakeUp(worst.number)]
