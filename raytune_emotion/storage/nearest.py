"""Suggest the folder that was probably meant when the named one does not exist."""

import difflib
from collections.abc import Sequence
from pathlib import Path

from raytune_emotion.errors import did_you_mean
from raytune_emotion.storage.locations import Folder, Location

#: Default folder of studies and runs.
RESULTS = Path("ray_results")
#: Name of the export folder in a study or a run.
BEST_EXPORT = "best"
_LISTED = 10


def suggest_folder(place: Location, file: str, inner: Sequence[str] = ("",)) -> str:
    """Suggest folders that have a file which the named folder lacks: the one with the closest name, else all.

    Args:
        place: the named folder. For a URI, nothing is suggested.
        file: the file that the folder must have.
        inner: paths from the folder of a study or a run, whose name is compared; "": that folder itself.

    Returns:
        "; did you mean ...?", "; choose one of ...", or "" if there is none.
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
    return f"; choose one of {', '.join(map(str, list(found.values())[:_LISTED]))}"
