"""Write to the terminal, and format sizes, paths and commands for it."""

import contextlib
import errno
import io
import os
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

#: The console script of the package.
SCRIPT = "raytune-emotion"
#: Start of the lines on standard error that each hold an error.
ERROR = "error: "

_COLOUR_CODE = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]")
_CONTROL_CHARACTER = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def escape(text: str) -> str:
    """Remove colour codes from a text, and escape control characters and broken Unicode.

    Names of files and messages of other programs may contain all of these. A terminal would obey them.
    """
    text = _CONTROL_CHARACTER.sub(lambda found: f"\\x{ord(found[0]):02x}", _COLOUR_CODE.sub("", text))
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


class _PlainConsole(Console):
    def on_broken_pipe(self) -> None:
        """Discard all further output, since its reader has closed it. Rich would end the thread that writes."""
        discard_output(self.file)

    def render_str(self, text: str, *args: Any, **options: Any) -> Text:
        return super().render_str(escape(text), *args, **options)


def plain_console(*, stderr: bool = False) -> Console:
    """Make a console that shows text unchanged.

    It interprets no markup and no emoji code, and colours no word, because texts come from paths, errors and files. All
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
    """Print a line on standard error. If its reader, such as `tee`, has ended, further output there is discarded."""
    try:
        print(escape(text), file=sys.stderr, flush=True)
    except OSError:
        discard_output(sys.stderr)


def warn_error(sentence: str) -> None:
    """Print an error on standard error, as one line: names of files and words of a command line may have newlines."""
    warn(ERROR + sentence.replace("\n", "\\n"))


def discard_output(stream: IO[str]) -> None:
    """Discard all further output of a stream, and what it has not written yet: it cannot be written."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def open_missing_streams() -> None:
    """Open standard streams that are missing from the start, as by `>&-`, and discard their output.

    Otherwise the next opened files get their numbers, and a library's output is written into these files. The output of
    a stream that is open for reading alone, as by `1</dev/null`, is discarded, too.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)  # child processes have them, too
    for number in (1, 2):
        try:
            os.write(number, b"")
        except OSError as error:
            if error.errno == errno.EBADF:
                os.dup2(descriptor, number)
    os.close(descriptor)
    for name, number, mode in (("stdin", 0, "r"), ("stdout", 1, "w"), ("stderr", 2, "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, mode, closefd=False))  # noqa: SIM115  # as long as the process


@contextlib.contextmanager
def any_encoding() -> Iterator[None]:
    """Within the block, write characters that the encoding of the output lacks as escapes instead of failing."""
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
    """Tell whether a console can redraw its output. A file, a job's log and a notebook cannot."""
    # Rich takes a file for a terminal where FORCE_COLOR is set.
    return console.is_terminal and not (console.is_jupyter or console.is_dumb_terminal) and console.file.isatty()


@contextlib.contextmanager
def announce(what: str) -> Iterator[None]:
    """Say on standard error what the block does: in a terminal only while it runs, elsewhere as a line."""
    console = plain_console(stderr=True)
    if not is_screen(console):
        warn(what)
        yield
        return
    with console.status(Text(escape(what)), spinner="dots"):
        yield


def count(number: float, noun: str) -> str:
    """Write a number with its noun: `count(1, "trial")` is "1 trial", `count(2.5, "epoch")` is "2.5 epochs"."""
    amount = f"{number:g}" if isinstance(number, float) else str(number)
    return f"{amount} {noun}{'' if number == 1 else 's'}"


def byte_size(number: float) -> str:
    """Write a number of bytes with a unit for people."""
    for unit in ("B", "kB", "MB", "GB"):
        if number < 999.5:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.3g} TB"


def short_path(path: Path) -> str:
    """Return a path for people: relative if it is below the working folder, else absolute."""
    try:
        path = path.absolute()
        return str(path.relative_to(Path.cwd()))
    except (ValueError, OSError):  # the path is elsewhere, or the working folder is gone
        return str(path)


def shell_word(place: Path | str) -> str:
    """Quote a path, or another word, for a shell."""
    return shlex.quote(short_path(place) if isinstance(place, Path) else place)


def typed_command(verb: str) -> str:
    """Return how to type a command of this package: in the same form as the command that runs.

    Python may not find the modules where the shell finds the script, as in the folder that holds a clone of the
    repository.
    """
    started = os.path.basename(sys.argv[0]) if sys.argv else ""  # noqa: PTH119  # as in `is_command`
    return f"{SCRIPT} {verb}" if started == SCRIPT else f"python -m raytune_emotion.{verb}"


def typed_options(**options: object) -> str:
    """Return the text of options for a command line, each after a space.

    Options that are None or False are left out. One that is True has no value.
    """
    given = {
        name.replace("_", "-"): value for name, value in options.items() if value is not None and value is not False
    }
    return "".join(
        f" --{name}" if value is True else f" --{name} {shell_word(str(value))}" for name, value in given.items()
    )
