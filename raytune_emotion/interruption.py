"""End a command in order when a signal interrupts it.

Ctrl-C sends SIGINT. Slurm, Kubernetes, `timeout` and `ray job stop` send SIGTERM, often several times and to the whole
process group. A terminal that closes sends SIGHUP. All are handled alike: the first one raises KeyboardInterrupt. Later
signals do nothing, so that the command can write its results. The third Ctrl-C raises KeyboardInterrupt again.
"""

import atexit
import contextlib
import importlib
import os
import signal
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import NoReturn

from raytune_emotion.errors import Breakdown, UserError

_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
#: Number of Ctrl-C from which each one interrupts.
_INSISTS = 3
#: File name of the code that holds the import locks, and seconds after which a signal that meets it is sent again.
_IMPORTER, _AGAIN_S = "<frozen importlib._bootstrap>", 0.05
#: Longest wait for imports in a thread, seconds.
_IMPORT_S = 30.0
#: Seconds between two looks for a signal while a thread waits.
_LOOK_S = 0.2


class _State:
    """Hold the signals that were received. Signals belong to the process, so there is one state."""

    interrupted = False
    ctrl_c = 0
    held = 0  # number of `finish_block` blocks that run


_state = _State()


def _hear(number: int, frame: FrameType | None) -> None:
    if frame is not None and frame.f_code.co_filename == _IMPORTER:
        # An exception here may leave the import lock taken. A thread that imports would then wait for ever.
        again = threading.Timer(_AGAIN_S, os.kill, (os.getpid(), number))
        again.daemon = True
        again.start()
        return
    _state.ctrl_c += number == signal.SIGINT
    if number == getattr(signal, "SIGHUP", None):
        _leave_terminal()
    first, _state.interrupted = not _state.interrupted, True
    if (first and not _state.held) or _state.ctrl_c >= _INSISTS:
        raise KeyboardInterrupt


def is_command(words: Sequence[str]) -> bool:
    """Tell from the command line of Python whether it runs a command of this package."""
    if "-m" in words[:-1]:
        package, _, verb = words[words.index("-m") + 1].partition(".")
        return package == "raytune_emotion" and "." not in verb
    return any(os.path.basename(word) == "raytune-emotion" for word in words[:2])  # noqa: PTH119  # pathlib takes time


def end_quietly() -> None:
    """Let a signal end the process without a traceback, before `handle_signals` begins and after it has ended.

    At those times the command is still being imported, or has finished: it has nothing to write.
    """
    for number in _SIGNALS:
        if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
            signal.signal(number, _end)
    # Python removes handlers when it exits, and a signal would then kill it. An ignored signal stays ignored.
    atexit.register(_ignore)


def _ignore() -> None:
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _end(number: int, frame: FrameType | None) -> NoReturn:
    with contextlib.suppress(OSError):  # the terminal may have closed
        os.write(2, b"interrupted\n")
    os._exit(130)


def skip_exit_handlers() -> None:
    """Let `end_without_handlers` end this process: an exit handler of a library would block it."""
    global _skips_handlers
    _skips_handlers = True


#: Whether the exit handlers are skipped.
_skips_handlers = False


def end_without_handlers(code: int) -> None:
    """End this process with an exit code at once, if its exit handlers are to be skipped."""
    if _skips_handlers:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):  # its file may be closed, or its disk full
                stream.flush()
        os._exit(code)


def _leave_terminal() -> None:
    """Discard all further output: each write to a terminal that has closed is an error."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for descriptor in (1, 2):
        with contextlib.suppress(OSError):
            # `isatty` is false for a terminal that has closed. Files and pipes are kept.
            if stat.S_ISCHR(os.fstat(descriptor).st_mode):
                os.dup2(nowhere, descriptor)
    os.close(nowhere)


@contextlib.contextmanager
def handle_signals() -> Iterator[None]:
    """Install these signal handlers for the block, then restore the previous ones.

    A signal that was ignored from the start, as by `nohup`, stays ignored. Outside the main thread nothing is changed,
    since the main thread alone handles signals.
    """
    global _state
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    outer, _state = _state, _State()
    before = {number: signal.getsignal(number) for number in _SIGNALS}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, _hear)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _state = outer
        # If an interruption has met `exec` of a text, as in the definition of a dataclass, Python would end by SIGINT
        # in place of its exit code, though the interruption was handled. The next text makes it forget that.
        eval("0")


def run_in_thread(name: str, action: Callable[[], None]) -> threading.Event:
    """Start a daemon thread, and return an event that is set when the thread has ended.

    `Thread.join` is not reliable: after a signal has interrupted it, Python 3.11 and 3.12 take the thread for ended
    (python/cpython#90882), and do not wait again.
    """
    ended = threading.Event()

    def run() -> None:
        try:
            action()
        finally:
            ended.set()

    threading.Thread(target=run, name=name, daemon=True).start()
    return ended


@contextlib.contextmanager
def import_meanwhile(*modules: str) -> Iterator[None]:
    """Import modules, one after the other, in a thread while the block runs, and wait for the thread.

    Use it for slow imports while the block waits for other processes. The block still imports what it needs. If the
    block fails after an import in the thread has failed, the error of that import is raised: PyTorch does not repeat
    its error at a second import. The wait prevents a crash of Python, which may happen if it ends within an import.
    """
    left, failures = threading.Event(), list[Exception]()

    def import_all() -> None:
        try:
            for module in modules:
                if not left.is_set():
                    importlib.import_module(module)
        except Exception as error:
            failures.append(error)

    ended = run_in_thread("imports", import_all)
    try:
        yield
    except (ImportError, RuntimeError) as error:
        if failures and not isinstance(error, Breakdown):
            raise failures[0] from error
        raise
    finally:
        left.set()
        ended.wait(_IMPORT_S)


@contextlib.contextmanager
def finish_block() -> Iterator[None]:
    """Let no signal interrupt the block. A signal that comes meanwhile interrupts at the end of the block."""
    _state.held += 1
    before = _state.interrupted
    try:
        yield
    finally:
        _state.held -= 1
    if _state.interrupted and not before and not _state.held:
        raise KeyboardInterrupt


@contextlib.contextmanager
def keep_error(error: BaseException | None) -> Iterator[None]:
    """Raise an earlier error after the block. A failure of the block to write is then only a warning.

    A batch system, for example, requeues a job that was interrupted, but not one whose location did not answer.
    """
    try:
        yield
    except (Breakdown, UserError, OSError) as later:
        if error is None:
            raise
        from raytune_emotion.terminal import warn_error  # imported only now: this module must be quick to import

        for fault in later.faults if isinstance(later, UserError) else [str(later)]:
            warn_error(fault)
    if error is not None:
        raise error


def is_interrupted() -> bool:
    """Tell whether a signal has come."""
    return _state.interrupted


def check_interrupted() -> None:
    """Raise KeyboardInterrupt if a signal has come whose own was lost: Python ignores exceptions in destructors."""
    if _state.interrupted and not _state.held:
        raise KeyboardInterrupt


def wait_unless_interrupted(seconds: float) -> bool:
    """Wait in any thread, and tell whether no signal has come until then."""
    deadline = time.monotonic() + seconds
    while not _state.interrupted and (left := deadline - time.monotonic()) > 0:
        time.sleep(min(left, _LOOK_S))
    return not _state.interrupted


@contextlib.contextmanager
def keep_handlers() -> Iterator[Callable[[], None]]:
    """Restore the signal handlers after the block: libraries install their own.

    Yields:
        A function that restores them already within the block.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return
    before = {number: signal.getsignal(number) for number in (*_SIGNALS, signal.SIGUSR1)}

    def restore() -> None:
        for number, handler in before.items():
            if handler is not None:
                signal.signal(number, handler)

    try:
        yield restore
    finally:
        restore()
