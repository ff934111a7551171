"""What one text shares with another: runs of ten words, with punctuation and case left out.

As VibeThinker decontaminates (arXiv 2511.06221, section 2.6).  Scripts that put no blank between words have
no words to count without a dictionary: of them a character counts as a quarter of a word, so that a run is as
long as forty characters.  That quarter is our choice.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Iterator

WORDS = 10
"""Of a run."""
_QUARTERS = 4
_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff"
"""Thai, Lao, Burmese, Khmer, Kana and Han."""
_UNITS = re.compile(f"[{_UNSPACED}]|[^\\s{_UNSPACED}]+")


def units(text: str) -> list[str]:
    """Return the words of a text, or the characters where it has no blanks between words, in one case and
    without punctuation and symbols."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    plain = "".join(" " if unicodedata.category(c)[0] in "PS" else c for c in folded)
    return _UNITS.findall(plain)


def runs(text: str, words: int = WORDS) -> Iterator[int]:
    """Yield 64 bits for each run of so many words, one from each word on; nothing for a shorter text."""
    found = units(text)
    sizes = [1 if re.match(f"[{_UNSPACED}]", unit) else _QUARTERS for unit in found]
    end = held = 0
    for begin, size in enumerate(sizes):
        while held < words * _QUARTERS:
            if end == len(found):
                return
            held += sizes[end]
            end += 1
        run = "\x1f".join(found[begin:end]).encode(errors="surrogatepass")
        yield int.from_bytes(hashlib.blake2b(run, digest_size=8).digest())
        held -= size
