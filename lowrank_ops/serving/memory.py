"""One allocation on a device, given out in pieces: a list of what is free, and of the holders that may be evicted."""

from __future__ import annotations

from bisect import bisect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import torch

from ..ops import arena


@dataclass
class Region:
    """A piece of the memory."""

    begin: int
    size: int


class Holder(Protocol):
    """What may lie in a piece of the memory."""

    region: Region | None
    size: int


H = TypeVar("H", bound=Holder)


class Memory(Generic[H]):
    """``capacity`` bytes on a device, the free pieces of it, and which holders of pieces may be evicted.

    Attributes:
        bytes: uint8 [capacity].
        free: the free pieces, by begin.
        idle: evictable holders, least recently used first.
    """

    def __init__(self, capacity: int, device: torch.device) -> None:
        self.bytes = torch.empty(capacity, dtype=torch.uint8, device=device)
        self.free = [Region(0, capacity)]
        self.idle: dict[H, None] = {}

    def settle(self, holder: H, evictable: bool) -> None:
        """Note a holder as the most recently used one, and whether it may be evicted."""
        self.idle.pop(holder, None)
        if evictable:
            self.idle[holder] = None

    def take(self, size: int, what: str, may_leave: Callable[[H], bool], evict: Callable[[H], None]) -> Region:
        """A free piece, after evicting idle holders, the least recently used first.

        Args:
            size: bytes that are needed in one piece.
            what: needs them, for the message.
            may_leave: whether a holder can be evicted where there is a reason beside use.
            evict: makes a holder give its piece back.

        Raises:
            MemoryError: evicting every holder would not give so many bytes; none is evicted then.
        """
        size = max(arena.align(size), arena.ALIGNMENT)
        while True:
            for region in self.free:
                if region.size >= size:
                    taken = Region(region.begin, size)
                    region.begin, region.size = region.begin + size, region.size - size
                    if not region.size:
                        self.free.remove(region)
                    return taken
            free = enough = sum(region.size for region in self.free)
            first: H | None = None
            # What cannot fit at all makes nobody leave.
            for v in self.idle:
                if may_leave(v):
                    assert v.region is not None
                    first, enough = first or v, enough + v.region.size
                    if enough >= size:
                        break
            if first is None or enough < size:
                raise MemoryError(
                    f"{what} needs {size} bytes in one piece; of {len(self.bytes)} bytes {free} are free, the rest is "
                    "pinned, in use, shared, or has no room in host memory"
                )
            evict(first)

    def give_back(self, region: Region) -> None:
        """Make a piece free, and one with its free neighbours."""
        at = bisect(self.free, region.begin, key=lambda r: r.begin)
        self.free.insert(at, region)
        for left in (at, at - 1):  # with the piece behind it, then with the one before
            if 0 <= left < len(self.free) - 1:
                piece, following = self.free[left : left + 2]
                if piece.begin + piece.size == following.begin:
                    piece.size += following.size
                    del self.free[left + 1]
