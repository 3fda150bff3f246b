"""Find the cache folder, which holds only files that can be made again."""

import contextlib
import os
import stat
import tempfile
from pathlib import Path

from raytune_emotion.errors import UserError

#: The cache folder below the home folder.
_CACHE = Path(".cache", "raytune_emotion")


def cache_folder() -> Path:
    """Return the cache folder of this user, by the XDG base directory rules; it need not exist.

    If no home folder can be written, it is below a temporary folder that only this user can read.

    Raises:
        UserError: the temporary folder belongs to another user.
    """
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if base.is_absolute():
        return base / "raytune_emotion"
    home = home_folder()
    if home is None or not _can_make(home / _CACHE):
        home = private_folder()
    return home / _CACHE


def home_folder() -> Path | None:
    """Return the user's home folder; None for a user without one, as in containers."""
    try:
        return Path.home()
    except RuntimeError:
        return None


def private_folder() -> Path:
    """Make a temporary folder that only this user can read, for a user without a home folder, and return it.

    Raises:
        UserError: it belongs to another user.
    """
    folder = Path(tempfile.gettempdir()) / f"raytune_emotion-{os.getuid()}"
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        raise UserError(f"{folder}: belongs to another user; name a folder of your own: export HOME=/some/folder")
    folder.chmod(0o700)
    return folder


def _can_make(folder: Path) -> bool:
    nearest = next(parent for parent in (folder, *folder.parents) if os.path.lexists(parent))
    return nearest.is_dir() and os.access(nearest, os.W_OK | os.X_OK)
