"""Where tests keep their files, and what lies in a folder, to compare before and after."""

import os
import shutil
from pathlib import Path

_MEMORY = Path("/dev/shm")
_IS_USABLE = (
    os.access(_MEMORY, os.W_OK)
    and not os.statvfs(_MEMORY).f_flag & os.ST_NOEXEC  # as Docker mounts it; tests run scripts and build programs there
    and shutil.disk_usage(_MEMORY).free > 6e9
)
#: The folder for the files of all tests. In memory files are written, flushed and deleted in microseconds; on a disk
#: that takes milliseconds.
SCRATCH = _MEMORY if _IS_USABLE else Path("/tmp")


def files_of(path):
    """Read the files of a folder."""
    return {file.name: file.read_bytes() for file in path.iterdir()}


def tree(folder: Path) -> dict[str, tuple[int, int]]:
    """List all below a folder with sizes and times, but for empty folders of the cache."""
    return {
        str(path): (path.stat().st_size, path.stat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
        if path.is_file() or (path.is_dir() and "raytune_emotion" not in path.parts)
    }
