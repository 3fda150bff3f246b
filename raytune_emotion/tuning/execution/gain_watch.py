"""Keep the gain that is expected of a study's further training, and tell when it is too little."""

import math
from collections.abc import Callable

from raytune_emotion.tuning.policy.decisions import Gain
from raytune_emotion.tuning.policy.gain import GainForecast
from raytune_emotion.tuning.study.optuna_study import Searcher

#: Share of the driver's time in which the expected gain is computed, at most.
_SHARE = 0.02


class GainWatch:
    """Know the expected gain of a running study."""

    def __init__(
        self,
        searcher: Searcher,
        forecast: GainForecast | None,
        *,
        until: float | None,
        clock: Callable[[], float],
    ) -> None:
        """Begin without a gain.

        Args:
            searcher: keeps the gain in the study.
            forecast: expects the gain; None where none is known, as in a confirmation.
            until: bits per hour; less than that is too little. None: any gain will do.
            clock: tells the time in seconds.
        """
        self._searcher, self._forecast = searcher, forecast
        self._until, self._clock, self._due = until, clock, -math.inf
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
