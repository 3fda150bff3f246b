"""The portfolio: which studies it guides, and for how long."""

import json

import optuna
import pytest
from optuna.distributions import FloatDistribution
from optuna.trial import FixedTrial, TrialState

from benchmarks.taskset import SETTINGS as OF_TASKSET
from raytune_emotion.storage.yaml_text import load_yaml
from raytune_emotion.tuning.policy.decisions import NO_LIMITS, Begin
from raytune_emotion.tuning.policy.inputs import PolicyInputs
from raytune_emotion.tuning.policy.outlook import STARTUP
from raytune_emotion.tuning.policy.policies import make_policy
from raytune_emotion.tuning.policy.portfolio import PORTFOLIO, fits, portfolio_of
from raytune_emotion.tuning.policy.trial_attributes import SETTINGS
from raytune_emotion.tuning.policy.warm_start import forecasts_of
from raytune_emotion.tuning.space.library import find_space, packaged_spaces
from raytune_emotion.tuning.space.parser import load_space, parse_space
from raytune_emotion.tuning.space.space import Space, draw

REPORTS = 8


@pytest.fixture(scope="module")
def quick():
    return load_space(find_space("quick"))


@pytest.fixture(scope="module")
def parts(quick):
    return json.loads(portfolio_of(quick).text)


def test_it_holds_configurations_of_the_quick_space_from_the_best_to_the_worst(quick, parts):
    assert parts == json.loads(PORTFOLIO.read_text())
    for part in parts:
        values = [js for _, its in part["trials"] for js in its.values()]
        assert len(values) >= 24
        assert 0 < values[0] < values[-1] < 1
        assert values == sorted(values)
        for settings, _ in part["trials"]:
            assert settings.keys() == {*quick.columns()}
            # Refused by Optuna where it lies outside.
            assert quick.suggest(FixedTrial(quick.params_of(settings)))["optim.lr"] == settings["optim.lr"]


def test_it_guides_no_space_that_lacks_its_settings():
    guided = {name for name, file in packaged_spaces().items() if portfolio_of(load_space(file))}
    assert guided == {"quick"}
    of_taskset = {name: FloatDistribution(0.1, 1.0, log=log) for name, log in OF_TASKSET.items()}
    assert portfolio_of(Space(of_taskset)) is None


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"optim.lr": {"log_uniform": [2e-3, 1e-2]}, "when": []}, True),
        ({"augment.colour": {"uniform": [0, 0.4]}}, True),
        ({"model.backbone": {"choice": ["test_resnet", "test_byobnet"]}, "when": []}, True),
        ({"model.backbone": {"choice": ["test_resnet", "resnet18"]}, "when": []}, False),
        ({"optim.lr": {"log_uniform": [1e-6, 1e-3]}, "when": []}, False),
        ({"model.dropout": 0.1}, False),
        ({"train.batch_size": {"choice": [512, 1024]}}, False),
    ],
)
def test_a_space_fits_that_searches_what_was_recorded(parts, changes, expected):
    text = find_space("quick").read_text(encoding="utf-8")
    mapping = {key: value for key, value in load_yaml(text).items() if key != "start"}
    space = parse_space(mapping | changes)
    assert fits(space, parse_space(parts[0]["space"])) == expected


class Study:
    """A study of the quick space, whose trials report at once."""

    def __init__(self, space, gathered):
        self._space = space
        earlier = forecasts_of(gathered) if gathered else []
        self._policy = make_policy(PolicyInputs(space, REPORTS, REPORTS, seed=0, earlier=earlier))
        self.optuna = optuna.create_study()

    def next(self):
        """Return what the policy begins; None where it takes up a paused trial."""
        answer = self._policy.next(self.optuna.get_trials(deepcopy=False), NO_LIMITS)
        return self._space.suggest(FixedTrial(dict(answer.params))) if isinstance(answer, Begin) else None

    def add(self, settings, values):
        trial = optuna.create_trial(
            params={}, distributions={}, value=min(values), user_attrs={SETTINGS: settings},
            intermediate_values=dict(enumerate(values, start=1)),
        )  # fmt: skip
        self.optuna.add_trial(trial)


def test_the_first_trials_begin_as_without_the_portfolio(quick, parts):
    """An earlier study that the user names is heeded at once."""
    named = [{key: value for key, value in part.items() if key != "recorded"} for part in parts]
    guided, alone, other = (Study(quick, its) for its in (json.dumps(parts), None, json.dumps(named)))
    for settings in draw(quick, STARTUP, seed=1):
        first = guided.next()
        assert first == alone.next()
        assert first != other.next()
        for study in (guided, alone, other):
            study.add(settings, [0.3] * REPORTS)


def test_trials_that_run_are_no_evidence_for_it(quick, parts):
    guided, alone = studies = [Study(quick, its) for its in (json.dumps(parts), None)]
    for settings in draw(quick, 2 * STARTUP, seed=1):
        assert guided.next() == alone.next()
        for study in studies:
            trial = optuna.create_trial(state=TrialState.RUNNING, user_attrs={SETTINGS: settings})
            study.optuna.add_trial(trial)


@pytest.mark.parametrize("sign", [1, -1], ids=["agree", "disagree"])
def test_the_next_trials_are_guided_by_it_unless_those_before_disagree(quick, parts, sign):
    guided, alone = studies = [Study(quick, its) for its in (json.dumps(parts), None)]
    forecasts = forecasts_of(json.dumps(parts))
    for settings in draw(quick, STARTUP, seed=1):
        js = 0.3 + sign * 0.05 * sum(float(forecast.standard_scores([settings])[0]) for forecast in forecasts)
        for study in studies:
            study.add(settings, [js + 0.01 * left for left in reversed(range(REPORTS))])
    then = guided.next()
    if sign < 0:
        assert then == alone.next()
        return
    assert then != alone.next()
    drawn = [*draw(quick, 100, seed=0)]
    for forecast in forecasts:
        assert forecast.standard_scores([then])[0] < sorted(forecast.standard_scores(drawn))[10]
