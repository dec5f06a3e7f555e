"""The patterns of PEFT's rank_pattern and alpha_pattern, matched in bounded time.

PEFT takes a key of these tables as a regular expression for the end of a layer's name. A file may hold any expression, and
Python's matcher takes exponential time for some, in which it cannot be interrupted. So ``re`` only parses here. The matcher
below follows all ways through an expression at once, as sets of positions, which gives the same answer for expressions
without back references and without looking around; other ones are refused.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from re import _constants as kinds  # type: ignore[attr-defined]
from re import _parser as parser  # type: ignore[attr-defined]
from typing import Any

MOST_LETTERS = 1000  # of a pattern
MOST_STEPS = 200_000  # of a pattern and a name; an expression for the layers of a model takes hundreds
_CATEGORIES = {
    kinds.CATEGORY_DIGIT: str.isdecimal,
    kinds.CATEGORY_SPACE: str.isspace,
    kinds.CATEGORY_WORD: lambda letter: letter.isalnum() or letter == "_",
}
_NEGATED = {
    kinds.CATEGORY_NOT_DIGIT: kinds.CATEGORY_DIGIT,
    kinds.CATEGORY_NOT_SPACE: kinds.CATEGORY_SPACE,
    kinds.CATEGORY_NOT_WORD: kinds.CATEGORY_WORD,
}
_REPEATS = (kinds.MAX_REPEAT, kinds.MIN_REPEAT)
_KNOWN = (
    *(kinds.LITERAL, kinds.NOT_LITERAL, kinds.ANY, kinds.IN, kinds.BRANCH, kinds.SUBPATTERN, kinds.AT),
    *_REPEATS,
)
_BEGINNINGS = (kinds.AT_BEGINNING, kinds.AT_BEGINNING_STRING)
_ENDS = (kinds.AT_END, kinds.AT_END_STRING)


@functools.lru_cache(maxsize=4096)
def check_pattern(pattern: str) -> tuple[Any, ...]:
    """The parts of a pattern.

    Raises:
        ValueError: it is no regular expression, longer than 1000 letters, or has something else than letters, classes,
            groups, alternatives, repetitions and anchors. The message names it.
    """
    if not isinstance(pattern, str):
        raise ValueError(f"the pattern {pattern!r} must be a text")
    if len(pattern) > MOST_LETTERS:
        raise ValueError(f"the pattern {pattern[:40]!r}… has {len(pattern)} letters, more than {MOST_LETTERS}")
    try:
        parsed = parser.parse(pattern)
        parts = _frozen(parsed, pattern)
    except (parser.error, RecursionError, OverflowError) as error:
        raise ValueError(f"the pattern {pattern!r} is no regular expression: {error}") from error
    if parsed.state.flags & ~kinds.SRE_FLAG_UNICODE:
        raise ValueError(f"the pattern {pattern!r} sets flags, which are not supported")
    return parts


def matches(pattern: str, name: str) -> bool:
    r"""Whether ``re.match(rf"(.*\.)?({pattern})$", name)``, as PEFT matches.

    Raises:
        ValueError: as of :func:`check_pattern`, or the match takes more than 200,000 steps.
    """
    parts = check_pattern(pattern)
    starts = {0, *(at + 1 for at, letter in enumerate(name) if letter == ".")}
    return len(name) in _Match(pattern, name).sequence(parts, starts)


class _Match:
    """A match of a pattern with a name: a method takes the positions where a part may begin and gives where it may end."""

    def __init__(self, pattern: str, name: str) -> None:
        self.pattern, self.name, self.steps = pattern, name, 0

    def sequence(self, parts: Iterable[Any], starts: set[int]) -> set[int]:
        for part in parts:
            if not starts:
                break
            starts = self.part(part, starts)
        return starts

    def part(self, part: tuple[Any, ...], starts: set[int]) -> set[int]:
        self.steps += len(starts)
        if self.steps > MOST_STEPS:
            raise ValueError(
                f"the pattern {self.pattern!r} takes more than {MOST_STEPS:,} steps to match with {self.name!r}; write a "
                "simpler one"
            )
        kind, *value = part
        if kind == kinds.BRANCH:
            return set().union(*(self.sequence(way, starts) for way in value[0]))
        if kind == kinds.SUBPATTERN:
            return self.sequence(value[0], starts)
        if kind in _REPEATS:
            least, most, inner = value
            return self.repeat(least, most, inner, starts)
        if kind == kinds.AT:
            where = 0 if value[0] in _BEGINNINGS else len(self.name)
            return starts & {where}
        return {at + 1 for at in starts if at < len(self.name) and _is_of(self.name[at], kind, value[0])}

    def repeat(self, least: int, most: int, inner: tuple[Any, ...], starts: set[int]) -> set[int]:
        for _ in range(least):
            before, starts = starts, self.sequence(inner, starts)
            if starts == before:  # every further turn gives the same
                break
        found = new = starts
        for _ in range(most - least):
            new = self.sequence(inner, new) - found
            if not new:
                break
            found = found | new
        return found


def _is_of(letter: str, kind: Any, value: Any) -> bool:
    if kind == kinds.LITERAL:
        return ord(letter) == value
    if kind == kinds.NOT_LITERAL:
        return ord(letter) != value
    if kind == kinds.ANY:
        return letter != "\n"
    negated = value[0][0] == kinds.NEGATE
    return negated != any(_in_class(letter, *item) for item in value[negated:])


def _in_class(letter: str, kind: Any, value: Any) -> bool:
    if kind == kinds.RANGE:
        return value[0] <= ord(letter) <= value[1]
    if kind == kinds.CATEGORY:
        known = _NEGATED.get(value, value)
        return (known != value) != _CATEGORIES[known](letter)
    return ord(letter) == value


def _frozen(parts: Any, pattern: str) -> tuple[Any, ...]:
    """The parts as tuples (kind, what it needs), groups without their numbers; raises for a kind that is not supported."""
    made: list[tuple[Any, ...]] = []
    for kind, value in parts:
        if kind not in _KNOWN or (kind == kinds.AT and value not in (*_BEGINNINGS, *_ENDS)):
            raise ValueError(
                f"the pattern {pattern!r} has {str(kind if kind != kinds.AT else value).lower()}, which is not supported: "
                "use letters, classes, groups, alternatives, repetitions, ^ and $"
            )
        if kind == kinds.BRANCH:
            made.append((kind, tuple(_frozen(way, pattern) for way in value[1])))
        elif kind == kinds.SUBPATTERN:
            if value[1] or value[2]:
                raise ValueError(f"the pattern {pattern!r} sets flags, which are not supported")
            made.append((kind, _frozen(value[3], pattern)))
        elif kind in _REPEATS:
            made.append((kind, value[0], value[1], _frozen(value[2], pattern)))
        else:
            made.append((kind, value))
    return tuple(made)
