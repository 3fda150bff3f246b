"""Define `UserError` and `Breakdown`, which the commands report without a traceback, and collect several."""

import contextlib
import difflib
from collections.abc import Iterable, Iterator


class UserError(ValueError):
    """Report wrong input: all errors at once, one sentence each.

    The commands print the sentences on standard error and exit with code 2.
    """

    def __init__(self, faults: str | Iterable[str]) -> None:
        self.faults: tuple[str, ...] = (faults,) if isinstance(faults, str) else tuple(faults)
        if not self.faults:
            raise AssertionError("a UserError without an error")
        super().__init__("\n".join(self.faults))

    def __reduce__(self) -> tuple[type["UserError"], tuple[tuple[str, ...]]]:
        return type(self), (self.faults,)


class Breakdown(RuntimeError):
    """Report a failure with correct input, such as a full disk. Finished work is kept and can be resumed.

    The commands print it as one sentence on standard error and exit with code 1.
    """


class Incomplete(RuntimeError):
    """Report that the work is done except for a part of the input, whose errors were printed before.

    The commands print it as one sentence on standard error and exit with code 3.
    """


@contextlib.contextmanager
def collect_errors(errors: list[str]) -> Iterator[None]:
    """Collect the errors of the block instead of raising them, so that the user sees all of them at once."""
    try:
        yield
    except UserError as error:
        errors += error.faults


def show(value: object) -> str:
    """Return a value as Python code for a message. Python does not write integers of more than some 4000 digits."""
    try:
        return repr(value)
    except ValueError:
        return "a number of too many digits"


def suggest(word: str, known: Iterable[str], most: int = 1) -> str:
    """Return "; did you mean ...?" with the known names that are closest to a word; "" if none is close."""
    return did_you_mean(difflib.get_close_matches(word, list(known), n=most))


def suggest_or_list(word: str, known: Iterable[str]) -> str:
    """Return "; did you mean ...?" with the known name that is closest to a word; if none is close, list all."""
    names = list(known)
    return suggest(word, names) or f"; choose one of {', '.join(names)}"


def did_you_mean(names: Iterable[str]) -> str:
    """Return "; did you mean ...?" with names; "" if there are none."""
    asked = " or ".join(names)
    return f"; did you mean {asked}?" if asked else ""
