"""End a command in order when a signal interrupts it.

Ctrl-C sends SIGINT. Slurm, Kubernetes, `timeout` and `ray job stop` send SIGTERM, often several times and to the whole
process group. A terminal that closes sends SIGHUP. All do the same here: the first one raises KeyboardInterrupt. What a
command still has to write is then written in peace: further signals do nothing, until a third Ctrl-C insists.
"""

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
_INSISTS = 3


class _State:
    """What has been heard. Signals belong to the process, so there is one."""

    interrupted = False
    ctrl_c = 0
    held = 0  # blocks of `finish_block` that run


_state = _State()


def _hear(number: int, frame: FrameType | None) -> None:
    _state.ctrl_c += number == signal.SIGINT
    first, _state.interrupted = not _state.interrupted, True
    if (first and not _state.held) or _state.ctrl_c >= _INSISTS:
        raise KeyboardInterrupt


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


@contextlib.contextmanager
def keep_handlers() -> Iterator[None]:
    """Undo what the block does to the handlers of signals: libraries install their own."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (*_SIGNALS, signal.SIGUSR1)}
    try:
        yield
    finally:
        for number, handler in before.items():
            if handler is not None:
                signal.signal(number, handler)
