"""What lies in a folder, to compare before and after."""

from pathlib import Path


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
