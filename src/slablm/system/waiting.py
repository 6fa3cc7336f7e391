"""How far something is that takes a while, in lines: for logs, and where there is no bar."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

# Seconds of waiting after which one wants to know how long it will go on.
WORTH_A_LINE = 2.0


class Tenths:
    """Told how far something is; says a line each tenth, with the time left, and nothing about what is done at once.

    Args:
        description: what is done.
        say: told each line.
        clock: seconds.
    """

    def __init__(
        self, description: str, say: Callable[[str], None], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._say, self._clock = say, clock
        self._description, self._tenth = description, 0
        self._start = self._said = clock()

    def __call__(self, done: int, total: int, *others: Any) -> None:
        """Steps done, and steps in all, 0 if unknown yet; what callers know besides is of no interest here."""
        tenth, now = 10 * done // max(total, 1), self._clock()
        if tenth > self._tenth and now - self._said >= WORTH_A_LINE:
            elapsed = now - self._start
            left = f", about {duration(elapsed / done * (total - done))} left" if done < total else ""
            self._say(f"{self._description}: {10 * tenth} % after {duration(elapsed)}{left}")
            self._tenth, self._said = tenth, now

    def describe(self, description: str) -> None:
        """What is done from now on."""
        if description != self._description:
            self._description, self._tenth = description, 0
            self._start = self._said = self._clock()


def duration(seconds: float) -> str:
    """Hours, minutes and seconds: 0:01:05."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"
