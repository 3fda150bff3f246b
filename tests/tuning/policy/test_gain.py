"""What further training is expected to gain: on past trials that are made up."""

import numpy as np
import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution
from optuna.trial import TrialState

from raytune_emotion.tuning.policy.acquisition import expected_fall
from raytune_emotion.tuning.policy.decisions import Gain
from raytune_emotion.tuning.policy.gain import GainForecast
from raytune_emotion.tuning.policy.inputs import PolicyInputs
from raytune_emotion.tuning.policy.objective import BY_SIZE, OBJECTIVES
from raytune_emotion.tuning.policy.trial_attributes import PAUSED, SECONDS, SETTINGS
from raytune_emotion.tuning.space.space import Space

REPORTS = 4
LR = FloatDistribution(0.0, 1.0)
SPACE = Space({"optim.lr": LR})
NAMES = CategoricalDistribution(["resnet18", "resnet34"])


def trial(number, settings, values, state=TrialState.COMPLETE, *, paused=False, seconds=None, dist=LR):
    """A trial with these values at its reports, that took ten seconds for each."""
    attrs = {SETTINGS: settings, PAUSED: paused}
    if state != TrialState.RUNNING or paused:
        attrs[SECONDS] = 10.0 * len(values) if seconds is None else seconds
    made = optuna.trial.create_trial(
        state=state, value=min(values) if state == TrialState.COMPLETE else None, params=settings,
        distributions=dict.fromkeys(settings, dist), user_attrs=attrs,
        intermediate_values=dict(enumerate(values, start=1)),
    )  # fmt: skip
    made.number = number
    return made


def curve(quality, length=REPORTS):
    return [0.5 - 0.3 * quality * (1 - 0.5**report) for report in range(1, length + 1)]


def past(*lengths):
    """Trials at several learning rates, of which those that are shorter are paused."""
    made = []
    for number, length in enumerate(lengths):
        lr = number / len(lengths)
        state = TrialState.COMPLETE if length == REPORTS else TrialState.RUNNING
        values = curve(1 - abs(lr - 0.4), length)
        made.append(trial(number, {"optim.lr": lr}, values, state, paused=length < REPORTS))
    return made


def gains(space=SPACE, **options):
    return GainForecast(PolicyInputs(space, REPORTS, REPORTS, seed=0, **options))


def test_the_expected_fall_is_the_mean_over_what_may_come():
    x = np.random.default_rng(0).normal(-1.2, 0.3, 10**6)
    mean = np.maximum(np.exp(-1.3) - np.exp(x), 0).mean()
    assert expected_fall(np.array([-1.2]), np.array([0.3]), -1.3)[0] == pytest.approx(mean, rel=0.01)


@pytest.mark.parametrize("lengths", [(4,), (4, 4, 4), (2, 2, 2, 2, 2), ()])
def test_nothing_is_known_of_the_gain_before_enough_has_been_seen(lengths):
    assert gains()(past(*lengths)) is None


@pytest.mark.parametrize("raised", [0, 2])
def test_a_trial_that_completed_early_was_trained_to_its_end_unless_the_study_has_got_more_epochs(raised):
    trials = past(2, 2, 2, 2, 2)
    trials[1].state, trials[1].value = TrialState.COMPLETE, min(trials[1].intermediate_values.values())
    assert (gains(raised=raised)(trials) is None) == (raised > 1)


def test_a_front_has_no_gain_in_bits():
    assert gains()(past(4, 4, 4, 2, 2)).bits > 0
    assert gains(objective=OBJECTIVES[BY_SIZE])(past(4, 4, 4, 2, 2)) is None


def test_the_gain_falls_as_the_space_becomes_known():
    few, many = gains()(past(*[4] * 5)), gains()(past(*[4] * 40))
    assert many.per_hour < few.per_hour / 3


def test_a_gain_takes_the_time_that_training_takes():
    slow = [trial(each.number, each.user_attrs[SETTINGS], [*each.intermediate_values.values()],
                  seconds=40.0 * len(each.intermediate_values)) for each in past(*[4] * 6)]  # fmt: skip
    late, soon = gains()(slow), gains()(past(*[4] * 6))
    assert (late.bits, late.seconds) == pytest.approx((soon.bits, 4 * soon.seconds), rel=1e-6)
    assert soon.seconds == pytest.approx(10 * REPORTS)
    assert soon.per_hour == pytest.approx(soon.bits * 3600 / (10 * REPORTS))


def test_the_seconds_of_a_trial_that_runs_are_not_those_until_it_last_paused():
    """It has reported since: by both its reports would take a fraction of their time."""
    ended = past(*[4] * 6)
    running = trial(6, {"optim.lr": 0.45}, curve(0.95, 3), TrialState.RUNNING)
    again = trial(6, {"optim.lr": 0.45}, curve(0.95, 3), TrialState.RUNNING)
    again.user_attrs |= {SECONDS: 10.0, PAUSED: False}  # it had one report then
    assert gains()([*ended, again]) == gains()([*ended, running])


def test_a_trial_promises_as_much_while_it_runs_as_when_it_is_paused():
    """Else a study would end while the best that it has is under way."""

    def quality(lr):
        return 1 - (lr - 0.45) ** 2

    ended = [trial(number, {"optim.lr": lr}, curve(quality(lr))) for number, lr in enumerate((0, 0.1, 0.2, 0.7, 0.9))]
    paused, running = (
        trial(5, {"optim.lr": 0.45}, curve(quality(0.45), 2), TrialState.RUNNING, paused=paused)
        for paused in (True, False)
    )
    found = gains()([*ended, running])
    assert found.bits == pytest.approx(gains()([*ended, paused]).bits, rel=0.05)
    # From the best of the others to its own end, in the two reports of ten seconds that are left to it.
    assert found.seconds == pytest.approx(20)
    assert found.bits == pytest.approx(min(curve(quality(0.2))) - min(curve(1)), rel=0.3)


def test_nothing_is_gained_where_nothing_is_left_to_train():
    space = Space({"model.backbone": NAMES, "optim.lr": CategoricalDistribution([0.1, 0.2])})
    points = [{"model.backbone": name, "optim.lr": lr} for name in NAMES.choices for lr in (0.1, 0.2)]
    ended = []
    for number, settings in enumerate(points):
        each = trial(number, {}, curve(0.5 + number / 8))
        each.user_attrs[SETTINGS] = settings
        ended.append(each)
    assert gains(space)(ended) == Gain(0.0, 0.0)
    assert Gain(0.0, 0.0).per_hour == 0
    assert gains(space)(ended[:3]) is None, "too few to forecast by"
