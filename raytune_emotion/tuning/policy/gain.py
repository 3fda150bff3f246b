"""Estimate the decrease of a study's best JS by further training, and the time for it."""

import math
from collections.abc import Sequence

import numpy as np
from optuna.trial import FixedTrial, FrozenTrial, TrialState

from raytune_emotion.tuning.policy.candidates import domain_of
from raytune_emotion.tuning.policy.decisions import Gain
from raytune_emotion.tuning.policy.gaussian_process import on_one_thread
from raytune_emotion.tuning.policy.inputs import PolicyInputs
from raytune_emotion.tuning.policy.outlook import Aim, Outlook
from raytune_emotion.tuning.policy.trial_attributes import SECONDS, as_paused, has_whole_trial, is_running, reports_left


class GainForecast:
    """Forecast the further gain of a study, for any sampler and scheduler."""

    def __init__(self, inputs: PolicyInputs) -> None:
        """Make a forecast of the gain."""
        self._space, self._domain = inputs.space, domain_of(inputs.space)
        self._reports, self._raised = inputs.reports, inputs.raised
        self._seed, self._earlier = inputs.seed, inputs.earlier
        self._aim, self._front = Aim(inputs.objective, reports=inputs.reports), inputs.objective.front

    def __call__(self, past: Sequence[FrozenTrial]) -> Gain | None:
        """Return the gain of the best next training: of an unfinished trial, or of a new configuration.

        The gain of a trial is the expected decrease of the study's best JS if the trial is trained to its end. The best
        trial has the largest decrease per hour of its remaining training. A study with several places gains more,
        because other trials train at the same time.

        Args:
            past: every trial that has begun, by number.

        Returns:
            Bits and seconds; both 0 if nothing can be trained. None if the gain is unknown: before a forecast is
            possible, before a trial was trained to its end with its time, and for a front.
        """
        if self._front or not has_whole_trial(past, self._reports, self._raised):
            return None
        # Count running trials as paused ones: their remaining training is part of the gain.
        still = [as_paused(trial) if is_running(trial) else trial for trial in past]
        if not any(trial.user_attrs.get(SECONDS) for trial in still):
            return None
        with on_one_thread():
            outlook = Outlook(self._domain, still, self._aim, self._earlier)
            return None if outlook.forecast is None else self._best(outlook, past)

    def _best(self, outlook: Outlook, past: Sequence[FrozenTrial]) -> Gain | None:
        under_way = [trial for trial in past if trial.state == TrialState.RUNNING]
        left = [reports_left(trial, self._reports) for trial in under_way]
        settings = [self._domain.settings(trial) for trial in under_way]
        offer = outlook.offer(outlook.candidates(np.random.default_rng([self._seed, len(past)])))
        if offer is not None:
            settings.append(self._space.suggest(FixedTrial(offer.params)))
            left.append(self._reports)
        if not settings:
            return Gain(0.0, 0.0)
        fall_M, seconds_M = outlook.expect_fall(settings, np.array(left, float))
        first = int((fall_M / seconds_M).argmax())
        gain = Gain(float(fall_M[first]), float(seconds_M[first]))
        return gain if math.isfinite(gain.per_hour) else None
