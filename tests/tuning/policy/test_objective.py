import math

import numpy as np
import optuna
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from optuna.trial import create_trial

from raytune_emotion.tuning.policy.acquisition import expected_improvement_of_front
from raytune_emotion.tuning.policy.candidates import domain_of
from raytune_emotion.tuning.policy.objective import BY_SIZE, JS_ALONE, OBJECTIVES
from raytune_emotion.tuning.policy.outlook import Aim, Outlook
from raytune_emotion.tuning.policy.scheduler import Halving, replay, rungs_of
from raytune_emotion.tuning.policy.trial_attributes import COST, SETTINGS
from raytune_emotion.tuning.space.parser import parse_space
from raytune_emotion.tuning.space.space import draw
from raytune_emotion.tuning.study.records import TrialRecord
from tests.support.studies import searcher_of

#: Of backbones, as multiples of the smallest.
SIZES = {"lcnet_050": 1.0, "test_resnet": 2.0, "resnet10t": 4.0, "resnet18": 8.0}
SPACE = {
    "model.backbone": {"choice": [*SIZES]},
    "optim.lr": {"log_uniform": [1e-5, 1e-1]},
    "loss": {"simplex": ["kl", "js"]},
}


def best_js(settings, doubled):
    """Made up: a valley in the learning rate, and a factor for every doubling of the model."""
    lr = math.log10(settings["optim.lr"])
    return 0.3 * doubled ** math.log2(SIZES[settings["model.backbone"]]) * math.exp(0.3 * (lr + 3) ** 2)


def searched(name, doubled, trials=28):
    """The settings of a study's trials, one at a time, by the objective of a name."""
    objective = OBJECTIVES[name]

    searcher = searcher_of(optuna.create_study(), parse_space(SPACE, "space"), objective=objective)
    asked = []
    for _ in range(trials):
        proposal = searcher.ask()
        size, js = SIZES[proposal.settings["model.backbone"]], best_js(proposal.settings, doubled)
        report = {"report": 1, "epoch": 1.0, "best_val_js": js, "seconds": 10 * size, "params_millions": size}
        searcher.observe(proposal.trial_id, report)
        searcher.tell(proposal.trial_id, "complete")
        asked.append(proposal.settings)
    return asked


def chosen(asked):
    """How often each backbone was chosen by the model."""
    return {name: sum(each["model.backbone"] == name for each in asked[4:]) for name in SIZES}


def test_js_alone_goes_for_the_largest_and_a_front_for_all_of_them():
    alone, front = searched("val_js", 0.9), searched(BY_SIZE, 0.9)
    assert chosen(alone)["resnet18"] > 10
    assert max(chosen(front).values()) < 12
    for name in SIZES:
        best = min(best_js(each, 0.9) for each in front if each["model.backbone"] == name)
        assert best < 1.1 * best_js({"model.backbone": name, "optim.lr": 1e-3}, 0.9)


def test_js_per_hour_takes_the_cheap_where_they_are_as_good():
    hour, alone = chosen(searched("val_js per hour", 1.0)), chosen(searched("val_js", 1.0))
    assert hour["lcnet_050"] > 1.5 * alone["lcnet_050"]
    assert hour["lcnet_050"] > 3 * hour["resnet18"]
    assert alone["lcnet_050"] < 2 * alone["resnet18"]


def area(values, costs, most_value, most_cost):
    """Between a front and its worst corner, by adding up columns."""
    order = np.argsort(costs)
    edges = [*np.array(costs)[order], most_cost]
    least = np.minimum.accumulate(np.array(values)[order])
    return sum(
        max(0.0, right - left) * max(0.0, most_value - low)
        for left, right, low in zip(edges, edges[1:], least, strict=False)
    )


@settings(max_examples=30)
@given(
    seen=st.lists(st.tuples(st.floats(-2, 2), st.floats(0, 3)), min_size=1, max_size=6),
    mean=st.floats(-2, 2),
    std=st.floats(0.05, 1),
    cost=st.floats(0, 4),
)
def test_the_improvement_of_a_front_is_the_area_that_draws_add_in_the_mean(seen, mean, std, cost):
    values, costs = map(list, zip(*seen, strict=True))
    most = 4.0
    (gain,) = expected_improvement_of_front(
        np.array([mean]), np.array([std]), np.array([cost]), np.array(values), np.array(costs), most
    )
    drawn = np.random.default_rng(0).normal(mean, std, 2000)
    before = area(values, costs, max(values), most)
    after = [area([*values, value], [*costs, cost], max(values), most) for value in drawn]
    assert gain == pytest.approx(np.mean(after) - before, abs=0.15 * std * (most - cost) + 1e-9)


def test_what_a_configuration_adds_to_a_front_does_not_depend_on_what_stands_beside_it():
    """New trials and paused ones are compared, and each kind is looked at alone."""
    past = []
    for number, settings_ in enumerate(draw(parse_space(SPACE, "space"), 12, seed=0)):
        js, size = best_js(settings_, 0.9), SIZES[settings_["model.backbone"]]
        attrs = {SETTINGS: settings_, COST: size}
        past.append(create_trial(value=js, user_attrs=attrs, intermediate_values={1: js}))
        past[-1].number = number
    outlook = Outlook(domain_of(parse_space(SPACE, "space")), past, Aim(OBJECTIVES[BY_SIZE]))
    small, large = ({"model.backbone": name, "optim.lr": 1e-3} for name in ("lcnet_050", "resnet18"))
    alone = outlook.log_promise([small])[0]
    assert alone == pytest.approx(outlook.log_promise([small, large])[0])
    assert outlook.log_promise([large])[0] > -50, "the costliest adds something, too"


def stopped(trials, objective, most_reports=3):
    """Of trials that report side by side, each with a size and a JS that stays: which are stopped, and the record."""
    scheduler = Halving(rungs_of(most_reports), objective)
    live = {f"{i:04d}": (size, js) for i, (size, js) in enumerate(trials)}
    histories = {trial_id: [] for trial_id in live}
    gone = set()
    for step in range(1, most_reports + 1):
        for trial_id in [each for each in live if each not in gone]:
            size, js = live[trial_id]
            report = {
                "report": step,
                "epoch": step,
                "best_val_js": js,
                "params_millions": size,
                "finished": step == most_reports,
            }
            report["time"] = len(histories) * step + int(trial_id)
            histories[trial_id].append(report)
            if not report["finished"] and not scheduler.keeps(trial_id, report):
                gone.add(trial_id)
    return gone, histories


def test_for_a_front_small_models_are_compared_with_small_ones():
    small = [(1.0, 0.30), (1.2, 0.31), (1.4, 0.5)]
    large = [(8.0, 0.20), (9.0, 0.21), (8.5, 0.4)]
    mixed = [each for pair in zip(large, small, strict=True) for each in pair]
    beside, _ = stopped(mixed, JS_ALONE)
    assert {"0001", "0003", "0005"} <= beside
    alike, histories = stopped(mixed, OBJECTIVES[BY_SIZE])
    assert alike == {"0002", "0003", "0004", "0005"}
    # A study that was broken off before the last report of the first, and before the last was told that it was stopped.
    histories["0000"].pop()
    statuses = {trial_id: "pruned" if trial_id in alike else "complete" for trial_id in histories}
    statuses |= {"0000": "running", "0005": "running"}
    records = [TrialRecord(t, statuses[t], {}, "", tuple(reports)) for t, reports in histories.items()]
    assert replay(Halving(rungs_of(3), OBJECTIVES[BY_SIZE]), records) == {"0005"}
