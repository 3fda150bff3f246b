"""Keep the gain that is expected of a study's further training, and tell when it is too little."""

import math
from collections.abc import Callable, Sequence

from raytune_emotion.tuning.policy.decisions import Gain
from raytune_emotion.tuning.policy.forecast import Forecast
from raytune_emotion.tuning.policy.gain import GainForecast
from raytune_emotion.tuning.study.open_study import OpenStudy
from raytune_emotion.tuning.study.optuna_study import Searcher

#: Share of the driver's time in which the expected gain is computed, at most.
_SHARE = 0.02


class GainWatch:
    """Know the expected gain of a running study."""

    def __init__(
        self,
        study: OpenStudy,
        searcher: Searcher,
        earlier: Sequence[Forecast],
        *,
        until: float | None,
        clock: Callable[[], float],
    ) -> None:
        """Begin without a gain.

        Args:
            study: that runs.
            searcher: keeps the gain in the study.
            earlier: what other studies say of configurations.
            until: bits per hour; less than that is too little. None: any gain will do.
            clock: tells the time in seconds.
        """
        spec = study.spec
        forecast = GainForecast(
            study.space, reports=study.reports, seed=spec.seed, objective=study.objective, earlier=earlier
        )
        # A confirmation chooses nothing.
        self._forecast = forecast if spec.confirms is None else None
        self._searcher, self._until, self._clock, self._due = searcher, until, clock, -math.inf
        self.value: Gain | None = None  # None where it is not known

    def update(self) -> None:
        """Compute the gain anew, unless that would take too much of the driver's time."""
        began = self._clock()
        if self._forecast is None or began < self._due:
            return
        self.value = self._searcher.note_gain(self._forecast)
        ended = self._clock()
        self._due = ended + (ended - began) / _SHARE

    @property
    def shortfall(self) -> str:
        """Say that the gain is too little; empty while it is enough, or not known."""
        if self._until is None or self.value is None or self.value.per_hour >= self._until:
            return ""
        return (
            f"further training is expected to bring {self.value.per_hour:.2g} bits an hour ({self.value.bits:.2g} with "
            f"the next trial), less than {self._until:g}: trials that run are left as they are"
        )
