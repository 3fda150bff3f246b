"""Keep results of earlier studies in a file of the study that starts from them, and make forecasts from it.

A copy is kept, so that a resumed study makes the same proposals even if the earlier studies have moved.
"""

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from raytune_emotion.errors import UserError
from raytune_emotion.storage.json_text import is_number, load_json
from raytune_emotion.tuning.policy.encoding import encoding_of
from raytune_emotion.tuning.policy.forecast import Curve, Forecast
from raytune_emotion.tuning.policy.portfolio import RECORDED
from raytune_emotion.tuning.space.parser import parse_space
from raytune_emotion.tuning.space.space import are_settings

EARLIER = "earlier.json"
NOTHING, OWN = "none", "the portfolio"
#: Key of the location of an earlier study.
STUDY = "study"


def name_earlier(folder: Path) -> str:
    """Return the source of a study's warm start: `NOTHING`, `OWN`, or the locations of the earlier studies."""
    if not (folder / EARLIER).exists():
        return NOTHING
    with _damage_in_words(folder):
        parts = load_json((folder / EARLIER).read_bytes())
        return OWN if any(RECORDED in part for part in parts) else ", ".join(str(part[STUDY]) for part in parts)


def read_earlier(folder: Path) -> list[Forecast]:
    """Return forecasts of the earlier studies from which a study started; an empty list if there are none."""
    if not (folder / EARLIER).exists():
        return []
    with _damage_in_words(folder):
        return forecasts_of((folder / EARLIER).read_bytes())


@contextlib.contextmanager
def _damage_in_words(folder: Path) -> Iterator[None]:
    """Turn errors of the block into a sentence about the file of earlier studies."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{folder}/{fault}" for fault in error.faults) from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{folder / EARLIER}: damaged ({type(error).__name__}: {error}); restore it from a copy"
        ) from error


def forecasts_of(gathered: str | bytes) -> list[Forecast]:
    """Return a forecast of each earlier study."""
    return [
        Forecast(
            encoding_of(parse_space(study["space"], EARLIER)),
            [_curve(kept, values) for kept, values in study["trials"]],
            at_once=RECORDED not in study,
        )
        for study in load_json(gathered)
    ]


def _curve(kept: Any, values: Mapping[str, Any]) -> Curve:
    if not (are_settings(kept) and all(map(is_number, values.values()))):
        raise ValueError("a trial does not have the format of a search")
    return Curve(kept, {int(n): float(js) for n, js in values.items()})
