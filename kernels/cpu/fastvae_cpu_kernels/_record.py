"""What a thread launches, told to a caller that wants to launch it again on the same memory."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

__all__ = ["launch", "recorded"]

Note = Callable[[Callable[..., None], tuple[Any, ...]], None]


class _Recorder(threading.local):
    note: Note | None = None


_recorder = _Recorder()


def launch(function: Callable[..., None], *args: Any) -> None:
    """Calls `function(*args)`, which may launch in turn, and takes nothing from the host but where its memory is.

    Whoever records keeps `args`, and with them the tensors in it; memory that is given by its address alone must stay
    for other reasons.
    """
    note = _recorder.note
    if note is None:
        function(*args)
        return
    note(function, args)
    # what it launches is part of it
    with recorded(None):
        function(*args)


@contextlib.contextmanager
def recorded(note: Note | None) -> Iterator[None]:
    """`note(function, args)` hears of every launch of this thread, before it happens."""
    before, _recorder.note = _recorder.note, note
    try:
        yield
    finally:
        _recorder.note = before
