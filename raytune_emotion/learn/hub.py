"""Fetch from the Hugging Face hub without its client's log, and without retries if the hub does not answer."""

import contextlib
import logging
from collections.abc import Iterator

from huggingface_hub import constants, get_session, snapshot_download

from raytune_emotion.known_errors import first_line

_LOG = logging.getLogger("huggingface_hub")
#: Longest wait for an answer of the hub, seconds.
_ANSWERS_IN_S = 5.0


@contextlib.contextmanager
def hub_client(repository: str, revision: str | None = None) -> Iterator[None]:
    """Fetch files of a repository within the block. Errors are raised, and not logged.

    Raises:
        ConnectionError: the hub does not answer, and the repository is not in its cache.
    """
    if not _is_cached(repository, revision) and (why := _why_silent()):
        raise ConnectionError(f"{constants.ENDPOINT} does not answer: {why}")
    level = _LOG.level
    _LOG.setLevel(logging.ERROR)
    try:
        yield
    finally:
        _LOG.setLevel(level)


def _why_silent() -> str:
    """Ask the hub once, through a proxy if there is one. Return "" for any answer, else the error."""
    try:
        get_session().head(constants.ENDPOINT, timeout=_ANSWERS_IN_S)
    except Exception as error:  # the hub's client and its network library have different error classes
        return first_line(error)
    return ""


def _is_cached(repository: str, revision: str | None) -> bool:
    try:
        snapshot_download(repository, revision=revision, local_files_only=True)
    except Exception:  # for the same reason
        return False
    return True
