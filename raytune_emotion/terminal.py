"""Write to the terminal, and word what is written: sizes, paths, and commands that can be typed."""

import contextlib
import io
import os
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

#: The console script of the package.
SCRIPT = "raytune-emotion"

_COLOUR_CODE = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]")
_CONTROL_CHARACTER = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def escape(text: str) -> str:
    """Return a text without colour codes, and with control characters and broken Unicode as escapes.

    Names of files and messages of other programs may hold all of these; a terminal would obey them.
    """
    text = _CONTROL_CHARACTER.sub(lambda found: f"\\x{ord(found[0]):02x}", _COLOUR_CODE.sub("", text))
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


class _PlainConsole(Console):
    def on_broken_pipe(self) -> None:
        """Have what is still said go nowhere: whoever read it has had enough. Rich would end the thread that speaks."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.file.fileno())
        os.close(nowhere)

    def render_str(self, text: str, *args: Any, **options: Any) -> Text:
        return super().render_str(escape(text), *args, **options)


def plain_console(*, stderr: bool = False) -> Console:
    """Make a console that shows text as it stands.

    Nothing in a text is markup, an emoji code or a word to be coloured: texts come from paths, errors and files. All
    console output of this project goes through such a console, or through `say` and `warn`.
    """
    return _PlainConsole(stderr=stderr, soft_wrap=True, markup=False, emoji=False, highlight=False)


def plain_table(*headings: str, title: str | None = None) -> Table:
    """Make a table for a plain console; each heading is a column."""
    return Table(*headings, box=box.SIMPLE, title=title, title_justify="left")


def say(text: str) -> None:
    """Print a line on standard output."""
    print(escape(text))


def warn(text: str) -> None:
    """Print a line on standard error."""
    print(escape(text), file=sys.stderr, flush=True)


def open_missing_streams() -> None:
    """Open the standard streams that this process was started without, as by `>&-`; what is said there goes nowhere.

    Otherwise the next files that are opened take their numbers, and what a library prints is written into them.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)  # processes that are started have them, too
    os.close(descriptor)
    for name, number, mode in (("stdin", 0, "r"), ("stdout", 1, "w"), ("stderr", 2, "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, mode, closefd=False))  # noqa: SIM115  # as long as the process


@contextlib.contextmanager
def any_encoding() -> Iterator[None]:
    """Write characters that the encoding of the output lacks as escapes within the block, in place of failing."""
    streams = [stream for stream in (sys.stdout, sys.stderr) if isinstance(stream, io.TextIOWrapper)]
    before = [stream.errors for stream in streams]
    for stream in streams:
        stream.reconfigure(errors="backslashreplace")
    try:
        yield
    finally:
        for stream, errors in zip(streams, before, strict=True):
            stream.reconfigure(errors=errors)


def is_screen(console: Console) -> bool:
    """Tell whether what is written to a console can be drawn again: not so a file, a job's log or a notebook."""
    # Rich takes a file for a terminal where FORCE_COLOR is set.
    return console.is_terminal and not (console.is_jupyter or console.is_dumb_terminal) and console.file.isatty()


@contextlib.contextmanager
def announce(what: str) -> Iterator[None]:
    """Say on standard error what is done while the block runs: in a terminal only until it ends, else as a line."""
    console = plain_console(stderr=True)
    if not is_screen(console):
        warn(what)
        yield
        return
    with console.status(Text(escape(what)), spinner="dots"):
        yield


def count(number: float, noun: str, nouns: str | None = None) -> str:
    """Say how many there are: `count(1, "trial")` is "1 trial", `count(2.5, "epoch")` is "2.5 epochs"."""
    amount = f"{number:g}" if isinstance(number, float) else str(number)
    return f"{amount} {noun if number == 1 else nouns or f'{noun}s'}"


def byte_size(number: float) -> str:
    """Write a number of bytes as people read it."""
    for unit in ("B", "kB", "MB", "GB"):
        if number < 999.5:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.3g} TB"


def short_path(path: Path) -> str:
    """Return a path as people read it: relative if it is below the working folder, else absolute."""
    path = path.absolute()
    try:
        return str(path.relative_to(Path.cwd()))
    except (ValueError, OSError):  # elsewhere; or the working folder is gone
        return str(path)


def shell_word(place: Path | str) -> str:
    """Return a path, or another word, as it is typed in a shell."""
    return shlex.quote(short_path(place) if isinstance(place, Path) else place)


def typed_command(verb: str) -> str:
    """Return a command of this package as it is typed: as the command that runs was.

    The modules cannot always be found where the script can, as in the folder that holds a clone of the repository.
    """
    started = os.path.basename(sys.argv[0]) if sys.argv else ""  # noqa: PTH119  # as in `is_command`
    return f"{SCRIPT} {verb}" if started == SCRIPT else f"python -m raytune_emotion.{verb}"


def typed_options(**options: object) -> str:
    """Return options as they are typed behind a command, each with a space before it; those that are None are not."""
    given = {name.replace("_", "-"): value for name, value in options.items() if value is not None}
    return "".join(f" --{name} {shell_word(str(value))}" for name, value in given.items())
