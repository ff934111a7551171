"""Lists of words and of sites in the forms that they are published in."""

from __future__ import annotations

import re
import unicodedata
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit

from data_prep.pipeline.step import Doc
from data_prep.quality.rules.words import SPACELESS
from megatron_sov.errors import UserError

MAX_LIST_BYTES = 1_000_000_000
"""A larger file is no list of words or sites."""
_HOSTS_LINE = re.compile(r"^(?:0\.0\.0\.0|127\.0\.0\.1|::1?)\s+")
_ADBLOCK = re.compile(r"^\|\|([^/^$]+)\^.*$")
_FIRST_SPACELESS = ord(SPACELESS[0])
_HANGUL = re.compile("[\u1100-\u11ff\u3130-\u318f\uac00-\ud7a3]")
_WORD = re.compile(rf"[^\W_{SPACELESS}]+(?:['’][^\W_{SPACELESS}]+)*|[{SPACELESS}]+")


def entries(file: Path) -> list[tuple[str, str]]:
    """Return (place, entry) of each line of a list that is neither empty nor begins with #.

    Raises:
        UserError: it cannot be read, is not UTF-8, is larger than a list can be, or has no entry.
    """
    found = []
    for part in [p for p in (file / "domains", file / "urls") if p.is_file()] if file.is_dir() else [file]:
        try:
            if part.stat().st_size > MAX_LIST_BYTES:
                raise UserError(f"{part}: has {part.stat().st_size:,} bytes, and a list at most "
                                f"{MAX_LIST_BYTES:,}; is it the right file?")
            text = part.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError:
            raise UserError(f"{part}: is not UTF-8; convert it, for example by iconv") from None
        except OSError as e:
            raise UserError(f"{part}: cannot be read: {e.strerror}; check the path and its rights") from None
        found += [(f"{part}:{number}", line.strip()) for number, line in enumerate(text.split("\n"), 1)
                  if line.strip() and not line.lstrip().startswith("#")]
    if not found:
        raise UserError(f"{file}: has no entry; write one a line, or take the list out")
    return found


def folded(text: str) -> str:
    """Return a text in which what a reader takes for the same is the same: NFKC, and without case."""
    return unicodedata.normalize("NFKC", text).casefold()


class Phrases:
    """Words and phrases: whole words between spaces, in Korean with what is attached to them, anywhere in
    scripts without spaces."""

    def __init__(self, lines: Sequence[tuple[str, str]]) -> None:
        self._by_words: dict[int, set[tuple[str, ...]]] = defaultdict(set)
        self._by_chars: dict[int, set[str]] = defaultdict(set)
        for place, line in lines:
            words = tuple(_WORD.findall(folded(line)))
            if not words:
                raise UserError(f"{place}: {line!r} has no letter and no digit; write words, or use a list "
                                "of patterns")
            if len(words) == 1 and re.match(f"[{SPACELESS}]", words[0]):
                self._by_chars[len(words[0])].add(words[0])
            else:
                self._by_words[len(words)].add(words)

    def num_hits(self, document: Doc) -> int:
        """Return how often words of the list occur in a document."""
        words = _WORD.findall(folded(document.text))
        total = 0
        for length, phrases in self._by_words.items():
            total += sum(gram in phrases for gram in zip(*(words[i:] for i in range(length)), strict=False))
        for length, parts in self._by_chars.items():
            for word in words:
                if ord(word[0]) >= _FIRST_SPACELESS:
                    starts = 1 if _HANGUL.match(word) else len(word) - length + 1
                    total += sum(word[i:i + length] in parts for i in range(starts))
        return total


class Pages:
    """Sites with all below them, and single addresses with all that begins with them."""

    def __init__(self, lines: Sequence[tuple[str, str]]) -> None:
        self._sites: set[str] = set()
        self._pages: dict[str, list[str]] = defaultdict(list)
        for _, line in lines:
            line = _ADBLOCK.sub(r"\1", _HOSTS_LINE.sub("", line.split(" #")[0].strip()))
            host, path = _host_and_path(line)
            if path.strip("/"):
                self._pages[host].append(path)
            elif host:
                self._sites.add(host)

    def num_hits(self, document: Doc) -> int:
        """Return 1 where the document's address is of the list, else 0."""
        host, path = _host_and_path(str(document.columns.get("url") or ""))
        if not host:
            return 0
        parts = host.split(".")
        if any(".".join(parts[i:]) in self._sites for i in range(len(parts))):
            return 1
        return int(any(path == page or path.startswith((page.rstrip("/") + "/", page + "?"))
                       for page in self._pages.get(host, ())))


def _host_and_path(url: str) -> tuple[str, str]:
    """Return (host without www, path and query) of an address with or without its scheme; ("", "") where it
    is none."""
    try:
        parts = urlsplit(url if "//" in url else f"//{url}")
        host = (parts.hostname or "").removeprefix("www.").rstrip(".")
    except ValueError:
        return "", ""
    return host, parts.path + (f"?{parts.query}" if parts.query else "")
