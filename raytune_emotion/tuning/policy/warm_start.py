"""Keep what earlier studies have shown in a file of the study that starts from it, and make forecasts of it.

Kept, since a study that goes on proposes what it would have proposed, wherever the earlier ones are by then.
"""

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from raytune_emotion.errors import UserError
from raytune_emotion.storage.atomic import write_text
from raytune_emotion.storage.json_text import is_number, load_json
from raytune_emotion.tuning.policy.encoding import encoding_of
from raytune_emotion.tuning.policy.forecast import Curve, Forecast
from raytune_emotion.tuning.policy.portfolio import RECORDED
from raytune_emotion.tuning.space.parser import parse_space
from raytune_emotion.tuning.space.space import are_settings

EARLIER = "earlier.json"
NOTHING, OWN = "none", "the portfolio"
#: The key of where an earlier study lay.
STUDY = "study"


def write_earlier(folder: Path, gathered: str) -> None:
    """Write what was gathered from earlier studies to a study's folder."""
    write_text(folder / EARLIER, gathered)


def name_earlier(folder: Path) -> str:
    """Name what a study started from: `NOTHING`, `OWN`, or where the earlier studies lay."""
    if not (folder / EARLIER).exists():
        return NOTHING
    with _damage_in_words(folder):
        parts = load_json((folder / EARLIER).read_bytes())
        return OWN if any(RECORDED in part for part in parts) else ", ".join(str(part[STUDY]) for part in parts)


def read_earlier(folder: Path) -> list[Forecast]:
    """Read what the studies that a study started from say of any configuration; none where it started from none."""
    if not (folder / EARLIER).exists():
        return []
    with _damage_in_words(folder):
        return forecasts_of((folder / EARLIER).read_bytes())


@contextlib.contextmanager
def _damage_in_words(folder: Path) -> Iterator[None]:
    """Say in a sentence what is wrong with the file of a study."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{folder}/{fault}" for fault in error.faults) from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{folder / EARLIER}: damaged ({type(error).__name__}: {error}); restore it from a copy"
        ) from error


def forecasts_of(gathered: str | bytes) -> list[Forecast]:
    """Return what each of the studies says that were gathered."""
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
        raise ValueError("a trial is not as a search writes it")
    return Curve(kept, {int(n): float(js) for n, js in values.items()})
