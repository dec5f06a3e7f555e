"""Texts that end a completion."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache


@lru_cache(maxsize=256)
def _borders(stop: str) -> list[int]:
    """For every beginning of a text the length of its longest proper beginning that is also its end."""
    borders = [0]
    for char in stop[1:]:
        n = borders[-1]
        while n and stop[n] != char:
            n = borders[n - 1]
        borders.append(n + (stop[n] == char))
    return borders


class Stops:
    """Find the stop that is complete first in a text that comes in pieces; of several at once the longest.

    Knuth, Morris and Pratt's method: the time is linear in the text, whatever the stops are.

    Args:
        stops: none of them empty.

    Attributes:
        held: the end of the text so far that may begin a stop.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [(stop, _borders(stop)) for stop in stops]
        self._matched = [0] * len(self._stops)
        self.held = ""

    def add(self, piece: str) -> tuple[str, bool]:
        """Add a piece; return the text before a stop, or before what may become one, and whether a stop is complete."""
        text, before = self.held + piece, len(self.held)
        for at, char in enumerate(piece if self._stops else ""):
            longest = 0
            for i, (stop, borders) in enumerate(self._stops):
                n = self._matched[i]
                while n and stop[n] != char:
                    n = borders[n - 1]
                self._matched[i] = n = n + (stop[n] == char)
                if n == len(stop):
                    longest = max(longest, n)
            if longest:
                self.held = ""
                return text[: before + at + 1 - longest], True
        sure = len(text) - max(self._matched, default=0)
        self.held = text[sure:]
        return text[:sure], False
