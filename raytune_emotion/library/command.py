"""Run a command of this package in a child process, for scripts and notebooks.

A command needs a process of its own: for its Ray session, its environment variables and its signal handlers. In a
notebook, Ray may already run, and a thread cannot handle signals. A child process works in all these cases, and several
of them at once. It costs the imports of a command, a few seconds.
"""

import importlib
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from functools import partial
from typing import IO, Any

from raytune_emotion.errors import Breakdown, UserError
from raytune_emotion.interruption import end_quietly, run_in_thread
from raytune_emotion.terminal import ERROR, any_encoding, say, warn, warn_error

#: Longest wait for a line before the next check whether the child has ended, seconds.
_LOOK_S = 0.2


def run_command(verb: str, argv: Sequence[str]) -> None:
    """Run a command in a child process, and print its output line by line.

    KeyboardInterrupt is handed on, and the child ends in order, as it does if this process dies.

    Args:
        verb: name of the command.
        argv: arguments of the command.

    Raises:
        UserError: the input is wrong: one sentence for each error.
        Breakdown: the command broke off.
        KeyboardInterrupt: the command was interrupted.
    """
    if broken := [word for word in argv if "\0" in word]:
        raise UserError(f"{word!r}: holds the character NUL, which no argument can; leave it out" for word in broken)
    process = subprocess.Popen(
        # Without -u, Python writes lines late into a pipe.
        [sys.executable, "-u", "-m", __name__, verb, *argv],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        errors="replace",
        env={**os.environ, **_variables(argv)},
        start_new_session=True,  # Ctrl-C in a terminal comes from this process alone, not twice
    )
    with process, any_encoding():
        errors, interrupted = _follow(process)
    code = process.returncode
    if interrupted or code in (0, 130):
        for error in errors:
            warn_error(error)
    if interrupted or code == 130:
        raise KeyboardInterrupt
    errors = errors or [f"{verb}: ended with exit code {code}; its output above says why"]
    if code == 2:
        raise UserError(errors)
    if code != 0:
        raise Breakdown("\n".join(errors))


def _variables(argv: Sequence[str]) -> dict[str, str]:
    """Return environment variables with which the child finds the same modules and the same cluster."""
    paths = [path for path in sys.path if isinstance(path, str)]  # as imports, which skip others
    found = {"PYTHONPATH": os.pathsep.join(paths), "PYTHONIOENCODING": "utf-8"}
    ray: Any = sys.modules.get("ray")  # if nobody has imported Ray, it does not run here
    if "--address=auto" in argv and ray is not None and ray.is_initialized():
        # This process is connected to this cluster. Ray may find others on this machine.
        found["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address
    return found


def _follow(process: "subprocess.Popen[str]") -> tuple[list[str], bool]:
    """Print the output of a child until it ends. If this fails, the child is told to end, and ends in order.

    Returns:
        The sentences of its errors, which are not printed, and whether this process was interrupted.
    """
    try:
        return _print_lines(process)
    except BaseException:
        assert process.stdin is not None
        process.stdin.close()
        process.wait()  # the readers still take its output
        raise


def _print_lines(process: "subprocess.Popen[str]") -> tuple[list[str], bool]:
    lines: queue.SimpleQueue[tuple[str, bool]] = queue.SimpleQueue()
    assert process.stdout is not None
    assert process.stderr is not None
    # The calling thread prints: a notebook shows what its cell's thread prints below the cell.
    readers = [
        run_in_thread("output", partial(_read, process.stdout, lines, is_error=False)),
        run_in_thread("errors", partial(_read, process.stderr, lines, is_error=True)),
    ]
    errors: list[str] = []
    interrupted = False
    while True:
        try:
            if all(reader.is_set() for reader in readers) and lines.empty():
                return errors, interrupted
            line, is_error = lines.get(timeout=_LOOK_S)
            if is_error and line.startswith(ERROR):
                errors.append(line.removeprefix(ERROR).rstrip("\n"))
            else:
                (warn if is_error else say)(line.rstrip("\n"))
                sys.stdout.flush()  # a log is read while the command runs
        except queue.Empty:
            continue
        except KeyboardInterrupt:
            interrupted = True
            process.send_signal(signal.SIGINT)


def _read(pipe: IO[str], lines: "queue.SimpleQueue[tuple[str, bool]]", *, is_error: bool) -> None:
    for line in pipe:
        lines.put((line, is_error))


def _end_with_parent() -> None:
    """Interrupt this process when its parent closes the pipe of standard input, or dies."""
    while os.read(0, 1):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    end_quietly()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    # Imported only now, after the handlers of signals are installed.
    sys.exit(importlib.import_module("raytune_emotion.cli").command_main(sys.argv[1], sys.argv[2:]))
