"""Hold what a policy is made of: the space of its study, the length of its trials, and what earlier ones say."""

from collections.abc import Sequence
from dataclasses import dataclass

from raytune_emotion.tuning.policy.forecast import Forecast
from raytune_emotion.tuning.policy.objective import JS_ALONE, Objective
from raytune_emotion.tuning.space.space import Space


@dataclass(frozen=True)
class PolicyInputs:
    """What a policy is made of."""

    space: Space
    epochs: float  # of a trial that is trained to its end
    reports: int  # of such a trial
    seed: int
    objective: Objective = JS_ALONE
    earlier: Sequence[Forecast] = ()  # what other studies say of configurations
    raised: int = 0  # number of the first trial that completes at these epochs, not at fewer
