"""A least number of tokens of a text, known without tokenising it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

from ..files import load_json

# Normalisers, and how many characters at most become one.
_NORMALIZERS = {"Prepend": 1, "Lowercase": 1, "NFD": 1, "NFKD": 1, "ByteLevel": 1, "Replace": 1, "NFC": 4, "NFKC": 4}
_SPLITTERS = {"ByteLevel", "Metaspace", "Digits", "WhitespaceSplit", "Whitespace", "Split", "Punctuation"}
# What BERT's splitting makes into at least one token: a mark of ASCII, or a word from its first letter or digit of ASCII.
_WORDS = re.compile(r"[0-9A-Za-z][^\s!-/:-@\[-`{-~]*|[!-/:-@\[-`{-~]")

Bound = Callable[[str, int], bool]


def make_bound(tokenizer: Any) -> Bound:
    """Create a function of a text and a number that tells, in time of the number, whether the text has more tokens.

    False means that it may have more or fewer. True is certain: a token stands for a bounded number of characters
    (byte-level BPE, BPE with bytes for unknown characters), or each word becomes at least one (BERT). Other tokenizers
    drop characters or take any number of them as one unknown token; the function is then always False.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return _unknown
    normalizers, splitters = list(_parts(backend.normalizer)), list(_parts(backend.pre_tokenizer))
    added = [token.content for token in backend.get_added_tokens_decoder().values()]
    kinds = {part["type"] for part in splitters}
    if kinds == {"BertPreTokenizer"} and {part["type"] for part in normalizers} <= {"BertNormalizer", "Lowercase"}:
        most = max([1, *(len(_WORDS.findall(text)) for text in added)])  # words in one added token
        return lambda text, count: _has_more(_WORDS.finditer(text), count * most)
    shrink = max([1, *(_NORMALIZERS.get(part["type"], 1) for part in normalizers)])
    if (
        all(part["type"] in _NORMALIZERS and _keeps(part) for part in normalizers)
        and all(part["type"] in _SPLITTERS and part.get("behavior") != "Removed" for part in splitters)
        and _knows_every_byte(backend, kinds | {part["type"] for part in normalizers})
    ):
        longest = shrink * max(map(len, [*backend.get_vocab(), *added]))
        # Whitespace does not count, because some pipelines drop it.
        return lambda text, count: len(text) > count * longest and len("".join(text.split())) > count * longest
    return _unknown


def _unknown(text: str, count: int) -> bool:
    return False


def _has_more(found: Iterator[Any], count: int) -> bool:
    return next(islice(found, count, None), None) is not None


def _parts(component: Any) -> Iterator[dict[str, Any]]:
    """The settings of a normaliser or pre-tokenizer, and of all parts of a sequence."""
    if component is None:
        return
    state = load_json(component.__getstate__())
    inner = [state]
    while inner:
        part = inner.pop()
        if part["type"] == "Sequence":
            inner += part.get("normalizers", part.get("pretokenizers", []))
        else:
            yield part


def _keeps(normalizer: dict[str, Any]) -> bool:
    """Tell whether a replacement takes nothing but one character and puts something in its place."""
    if normalizer["type"] != "Replace":
        return True
    return len(normalizer["pattern"].get("String", "")) == 1 and bool(normalizer["content"].strip())


def _knows_every_byte(backend: Any, kinds: set[str]) -> bool:
    from tokenizers.models import BPE
    from tokenizers.pre_tokenizers import ByteLevel

    if not isinstance(backend.model, BPE):
        return False
    needed = ByteLevel.alphabet() if "ByteLevel" in kinds else [f"<0x{n:02X}>" for n in range(256)]
    bytes_stand_in = "ByteLevel" in kinds or backend.model.byte_fallback
    return bytes_stand_in and all(backend.token_to_id(token) is not None for token in needed)
