"""Keep the expected gain of a study's further training, and tell when it is too small."""

import math
from collections.abc import Callable

from raytune_emotion.tuning.policy.decisions import Gain
from raytune_emotion.tuning.policy.gain import GainForecast
from raytune_emotion.tuning.study.optuna_study import Searcher

#: Largest share of the driver's time for the computation of the expected gain.
_SHARE = 0.02


class GainWatch:
    """Compute the expected gain of a running study from time to time."""

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
            forecast: forecast of the gain; None if no gain is expected, as in a confirmation.
            until: smallest sufficient gain, bits per hour. None: any gain is sufficient.
            clock: returns the time in seconds.
        """
        self._searcher, self._forecast = searcher, forecast
        self._until, self._clock, self._due = until, clock, -math.inf
        self.value: Gain | None = None  # None if unknown

    def update(self, *, now: bool = False) -> None:
        """Compute the gain again, unless that would take too much of the driver's time and need not be now."""
        began = self._clock()
        if self._forecast is None or (began < self._due and not now):
            return
        self.value = self._searcher.note_gain(self._forecast)
        ended = self._clock()
        self._due = ended + (ended - began) / _SHARE

    @property
    def shortfall(self) -> str:
        """Say that the gain is too small; "" if it is sufficient or unknown."""
        if self._until is None or self.value is None or self.value.per_hour >= self._until:
            return ""
        return (
            f"further training is expected to gain {self.value.per_hour:.2g} bits an hour ({self.value.bits:.2g} with "
            f"the next trial), less than {self._until:g}: running trials are left as they are"
        )
