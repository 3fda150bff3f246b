"""Find the folder that somebody means who names one that is not there."""

import difflib
from collections.abc import Sequence
from pathlib import Path

from raytune_emotion.errors import did_you_mean
from raytune_emotion.storage.locations import Folder, Location

#: The folder of studies and runs, where no other is named.
RESULTS = Path("ray_results")
#: The export in the folder of a study or a run.
BEST_EXPORT = "best"
_LISTED = 10


def suggest_folder(place: Location, file: str, inner: Sequence[str] = ("",)) -> str:
    """Say which folder may be meant in place of one that lacks a file: the nearest by its name, else all that have it.

    Args:
        place: what was named. At a URI, nothing is looked for.
        file: that the folder must have.
        inner: paths of the folder in that of a study or a run, which has the name; "": it is that folder.

    Returns:
        "; did you mean ...?", "; there are ...", or "" where there is none.
    """
    if not isinstance(place, Folder):
        return ""
    named = place.path.parent if place.path.name in inner else place.path
    found: dict[str, Folder] = {}
    for root in (named.parent, RESULTS):
        for name in sorted(Folder(root).list_folders()):
            for folder in (Folder(root / name / path) for path in inner):
                if name not in found and folder.sizes([file]) != [None]:
                    found[name] = folder
    near = difflib.get_close_matches(named.name, found, n=1)
    if near or not found:
        return did_you_mean(str(found[name]) for name in near)
    return f"; there are {', '.join(map(str, list(found.values())[:_LISTED]))}"
