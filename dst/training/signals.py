"""SIGTERM and SIGINT, noted for the training loop to save and end."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def stop_signals() -> Iterator[list[int]]:
    """A list that SIGTERM or SIGINT fills, for the loop to save and end; a second one kills."""
    caught: list[int] = []
    before: dict[int, Any] = {}

    def note(number: int, frame: Any) -> None:
        caught.append(number)
        signal.signal(number, before[number])

    for number in map(int, (signal.SIGTERM, signal.SIGINT)):
        before[number] = signal.signal(number, note)
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
