"""End a command in order when a signal interrupts it.

Ctrl-C sends SIGINT. Slurm, Kubernetes, `timeout` and `ray job stop` send SIGTERM, often several times and to the whole
process group. A terminal that closes sends SIGHUP. All do the same here: the first one raises KeyboardInterrupt. What a
command still has to write is then written in peace: further signals do nothing, until a third Ctrl-C insists.
"""

import atexit
import contextlib
import importlib
import os
import signal
import stat
import threading
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import NoReturn

from raytune_emotion.errors import Breakdown

_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
_INSISTS = 3
#: The code that holds the locks of imports; and when a signal that meets it comes again.
_IMPORTER, _AGAIN_S = "<frozen importlib._bootstrap>", 0.05
#: Longest wait for imports in a thread.
_IMPORT_S = 30.0


class _State:
    """What has been heard. Signals belong to the process, so there is one."""

    interrupted = False
    ctrl_c = 0
    held = 0  # blocks of `finish_block` that run


_state = _State()


def _hear(number: int, frame: FrameType | None) -> None:
    if frame is not None and frame.f_code.co_filename == _IMPORTER:
        # An exception here may leave the lock of all imports taken, for which a thread that imports waits for ever.
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
    """Tell by the words that Python was started with whether it runs a command of this package."""
    if "-m" in words[:-1]:
        package, _, verb = words[words.index("-m") + 1].partition(".")
        return package == "raytune_emotion" and "." not in verb
    return any(os.path.basename(word) == "raytune-emotion" for word in words[:2])  # noqa: PTH119  # pathlib takes time


def end_quietly() -> None:
    """Have a signal end the process without a traceback, before `handle_signals` begins and after it has ended.

    For a command that is still being imported, or has done its work: there is nothing to be written.
    """
    for number in _SIGNALS:
        if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
            signal.signal(number, _end)
    # In its last moments Python gives up handlers, and a signal would kill it. One that is ignored stays so.
    atexit.register(_ignore)


def _ignore() -> None:
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _end(number: int, frame: FrameType | None) -> NoReturn:
    with contextlib.suppress(OSError):  # the terminal may have closed
        os.write(2, b"interrupted\n")
    os._exit(130)


def _leave_terminal() -> None:
    """Let what is still said go nowhere: a terminal that has closed answers each word with an error."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for descriptor in (1, 2):
        with contextlib.suppress(OSError):
            # One that has closed is no longer known as a terminal. A file or a pipe stays.
            if stat.S_ISCHR(os.fstat(descriptor).st_mode):
                os.dup2(nowhere, descriptor)
    os.close(nowhere)


@contextlib.contextmanager
def handle_signals() -> Iterator[None]:
    """Handle signals so within the block; before and after it they do what they did.

    A signal that this process was started to ignore, as by `nohup`, stays ignored. In another thread than the main one
    nothing is changed: signals are left to whoever has the main thread.
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


def run_in_thread(name: str, action: Callable[[], None]) -> threading.Event:
    """Start a daemon thread, and return what is set when it has ended.

    `Thread.join` will not do: once a signal has interrupted it, Python 3.11 and 3.12 take the thread for ended
    (python/cpython#90882), and wait no more.
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
    """Import modules, one after the other, in a thread while the block runs, and wait for it.

    For what takes seconds while the block waits for other processes. The block imports what it needs of them itself. If
    it fails where an import has failed before, that one's error is raised: PyTorch does not say the same a second time.
    The wait is for Python, which may crash if it ends within an import.
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
    """Let no signal break the block off; one that comes meanwhile interrupts at its end."""
    _state.held += 1
    before = _state.interrupted
    try:
        yield
    finally:
        _state.held -= 1
    if _state.interrupted and not before and not _state.held:
        raise KeyboardInterrupt


def check_interrupted() -> None:
    """Raise KeyboardInterrupt if a signal has come, and its own was lost: Python ignores what a destructor raises."""
    if _state.interrupted and not _state.held:
        raise KeyboardInterrupt


@contextlib.contextmanager
def keep_handlers() -> Iterator[Callable[[], None]]:
    """Undo what the block does to the handlers of signals: libraries install their own.

    Yields:
        What undoes it within the block, too.
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
