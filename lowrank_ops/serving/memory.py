"""Allocate pieces of one block of device memory: a list of free pieces, and of holders that may be evicted."""

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
    """An object that may hold a piece of the memory."""

    region: Region | None
    size: int


H = TypeVar("H", bound=Holder)


class Memory(Generic[H]):
    """``capacity`` bytes on a device, their free pieces, and the evictable holders of the other pieces.

    Attributes:
        bytes: uint8 [capacity].
        free: the free pieces, sorted by begin.
        idle: evictable holders, least recently used first.
    """

    def __init__(self, capacity: int, device: torch.device) -> None:
        self.bytes = torch.empty(capacity, dtype=torch.uint8, device=device)
        self.free = [Region(0, capacity)]
        self.idle: dict[H, None] = {}

    def mark_used(self, holder: H, evictable: bool) -> None:
        """Mark a holder as the most recently used, and as evictable or not."""
        self.idle.pop(holder, None)
        if evictable:
            self.idle[holder] = None

    def take(self, size: int, what: str, may_leave: Callable[[H], bool], evict: Callable[[H], None]) -> Region:
        """Take a free piece; evict idle holders for it, least recently used first.

        Args:
            size: bytes, in one piece.
            what: who needs the bytes, for the message.
            may_leave: tells whether an idle holder can be evicted.
            evict: makes a holder give its piece back.

        Raises:
            MemoryError: evicting every holder would not free enough bytes; then none is evicted.
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
            # Evict nothing if even evicting everything would not make room.
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
        """Free a piece and merge it with its free neighbours."""
        at = bisect(self.free, region.begin, key=lambda r: r.begin)
        self.free.insert(at, region)
        for left in (at, at - 1):  # merge with the next piece, then with the previous one
            if 0 <= left < len(self.free) - 1:
                piece, following = self.free[left : left + 2]
                if piece.begin + piece.size == following.begin:
                    piece.size += following.size
                    del self.free[left + 1]
