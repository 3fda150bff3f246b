"""Check the settings of a search space together: values that are valid alone may not be so in one configuration."""

import functools
import itertools
import json
from collections.abc import Callable, Iterator

from raytune_emotion.config import FlatConfig, RunConfig
from raytune_emotion.errors import UserError
from raytune_emotion.tuning.space.space import Space, extremes


def conflicts(space: Space) -> Iterator[tuple[str, str]]:
    """Find settings that are valid alone but not together, such as more warm-up than epochs.

    Yields:
        an Optuna parameter or setting of the space, "" if there is none, and an error that concerns it.
    """
    return _judge(space, lambda config: _faults_of(json.dumps(config)))


def missing_weights(space: Space) -> Iterator[tuple[str, str]]:
    """Find pretrained weights that are not at hand, like `conflicts`. Each model is checked only once."""
    found = functools.cache(_faults_of_weights)
    return _judge(space, lambda config: found(json.dumps({k: v for k, v in config.items() if k.startswith("model.")})))


def _judge(space: Space, judge: Callable[[FlatConfig], tuple[str, ...]]) -> Iterator[tuple[str, str]]:
    """Yield the errors of configurations at the ends of the ranges.

    For each set of entries of `when` that can apply together, every pair of settings, also of those in an `if`, is
    checked at the ends of its ranges. The space could suggest a combination that fails, so it is an error of the space.
    Rules on three settings are checked only as far as pairs violate them.
    """
    for group in space.alike():
        decided = {key: values[0] for key, values in group.items()}
        names = {key: name for key, (name, _) in space.active_settings(decided).items()}
        ends = space.ends(decided) | {key: extremes(values) for key, values in group.items()}
        first = {key: end[0] for key, end in ends.items()}
        several = {key: end for key, end in ends.items() if len(end) > 1}
        pairs = [
            {one: a, other: b}
            for (one, ends_one), (other, ends_other) in itertools.combinations(several.items(), 2)
            for a, b in itertools.product(ends_one, ends_other)
        ]
        singles = [{key: a} for key, end in several.items() for a in end]
        for change in (*singles, *pairs, {}):
            for sentence in judge(space.flatten({**first, **change})):
                key = sentence.partition(":")[0]
                # The error concerns a setting, or a section with several settings.
                yield next((names[k] for k in names if k == key or k.startswith(f"{key}.")), ""), sentence


@functools.lru_cache(maxsize=2**14)
def _faults_of(config: str) -> tuple[str, ...]:
    """Return the errors of a configuration in JSON. Cached: a space has a thousand of them, and is read repeatedly."""
    try:
        RunConfig.from_flat(json.loads(config))
    except UserError as error:
        return error.faults
    return ()


def _faults_of_weights(settings: str) -> tuple[str, ...]:
    try:
        model = RunConfig.from_flat(json.loads(settings)).model
        if model.pretrained or model.weights_dir is not None:
            # Imported only now: it imports timm, which takes seconds.
            from raytune_emotion.learn.model import check_weights

            check_weights(model)
    except UserError as error:
        return error.faults
    return ()
