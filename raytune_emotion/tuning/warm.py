"""What earlier studies have shown, kept in the folder of a study that starts from it.

Kept, since a study that goes on proposes what it would have proposed, wherever the earlier ones are by then.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from raytune_emotion.errors import UserError
from raytune_emotion.storage import remote
from raytune_emotion.storage.atomic import write_text
from raytune_emotion.tuning.model import Curve, Forecast, encoding_of
from raytune_emotion.tuning.sampling import SETTINGS, curves
from raytune_emotion.tuning.searcher import JOURNAL, load_study
from raytune_emotion.tuning.space import parse_space
from raytune_emotion.tuning.study import opened, read_spec

EARLIER = "earlier.json"

#: Trials that must have reported before one can be told from another.
_LEAST = 4


def gather_earlier(studies: Sequence[Path | str]) -> str:
    """The spaces and curves of studies, at folders or URIs, as `write_earlier` writes them.

    Raises:
        UserError: one of them is no study, or too few of its trials have reported; all faults at once.
    """
    gathered: list[dict[str, Any]] = []
    faults: list[str] = []
    for place in studies:
        try:
            with opened(place, JOURNAL) as folder:
                space = read_spec(folder).space
                trials = load_study(folder).get_trials(deepcopy=False)
        except UserError as error:
            faults += error.faults
            continue
        seen = curves([trial for trial in trials if SETTINGS in trial.user_attrs])
        if sum(bool(curve.values) for curve in seen) < _LEAST:
            shown = remote.shown(str(place))
            faults.append(f"--warm-start {shown}: fewer than {_LEAST} of its trials have reported; leave it out")
        gathered.append({"space": space, "trials": [[curve.settings, curve.values] for curve in seen]})
    if faults:
        raise UserError(faults)
    return json.dumps(gathered)


def write_earlier(folder: Path, gathered: str) -> None:
    """Keeps what was gathered in a study's folder."""
    write_text(folder / EARLIER, gathered)


def read_earlier(folder: Path) -> list[Forecast]:
    """What the studies that a study started from say of any configuration; none where it started from none."""
    if not (folder / EARLIER).exists():
        return []
    return [
        Forecast(
            encoding_of(parse_space(study["space"], EARLIER)),
            [Curve(settings, {int(n): js for n, js in values.items()}) for settings, values in study["trials"]],
        )
        for study in json.loads((folder / EARLIER).read_text(encoding="utf-8"))
    ]
