"""The search of texts for items of benchmarks, by runs of words (`documents.overlap`).

An item of `ngram` words or more is found where one of its runs of so many words is.  A shorter one is found
where all of it is; one below `min_words` says too little to be looked for.  A text's runs are looked up in a
table of one byte for each value of their first bits, and those few that may be an item's among all of them.

`plain` gives a second form of a text: what a reader sees of one that is written with markup, escapes or
letters that look like others.  It is searched beside the text itself, so that nothing that is found without
it is lost: entities and escapes are read, tags inside words and commands of TeX and Markdown go, accents go,
and letters of other scripts that look like Latin ones become these (Unicode Technical Standard 39,
confusables).
"""

from __future__ import annotations

import html
import re
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from urllib.parse import unquote

import numpy as np
from numpy.typing import NDArray

from megatron_sov.base.documents.overlap import TWELFTHS, Units, find_units, stretch_hashes

_MAY_DIFFER = re.compile(r"[&<\\{}*_`$%~=+^\[\u00a0-\U0010ffff]")
_ROUNDS = 3
"""An entity may hold the sign of another one, as in &amp;lt;."""
_BLOCKS = ("p|br|div|li|ul|ol|td|th|tr|table|h[1-6]|hr|section|article|header|footer|blockquote|pre|dd|dt|dl|"
           "option|label|figcaption|title|body|head|html")
_ESCAPE = re.compile(
    r"(?P<entity>&#?\w{1,31};?)|(?P<percent>(?:%[0-9A-Fa-f]{2})+)|"
    r"(?P<quoted>(?:=[0-9A-F]{2})+)|(?P<soft>=\r?\n)|"
    r"\\u(?:\{(?P<unicode>[0-9a-fA-F]{1,6})\}|(?P<four>[0-9a-fA-F]{4}))|\\x(?P<byte>[0-9a-fA-F]{2})")
_MARKUP = re.compile(
    r"(?P<gone><!--.*?-->|<(?P<rt>rt|rp|script|style)\b[^<>]{0,200}>.*?</(?P=rt)>|<!\[CDATA\[|\]\]>)|"
    rf"(?P<block></?(?:{_BLOCKS})\b[^<>]{{0,500}}>)|"
    r"(?P<tag></?[A-Za-z][^<>]{0,500}>)|"
    r"(?P<link>\]\((?:https?:|/|#|mailto:)[^\s()]{0,500}\)|!?\[(?=[^\[\]\n]{1,200}\]\())|"
    r"(?P<accent>\\[\"'`^~=.uvHck](?:\{\\?(?P<a>[A-Za-z])\}|\\?(?P<b>[A-Za-z])(?![A-Za-z])|"
    r"(?<=[\"'`^~=.])(?P<c>[A-Za-z])))|"
    r"(?P<blank>\\(?:[ ,;:!/>~]|\\(?:\[[^\]\n]{0,20}\])?|q?quad\b ?|newline\b ?|par\b ?|[ntr](?![a-z]))|~)|"
    r"(?P<hyphen>\\-)|"
    r"(?P<font>\\(?:tt|bf|it|rm|sf|sc|em|sl|bfseries|itshape|ttfamily|rmfamily|sffamily|scshape|slshape|"
    r"mdseries|upshape|normalfont|tiny|scriptsize|footnotesize|small|normalsize|large|Large|LARGE|huge|Huge|cal|"
    r"centering|noindent|bgroup|egroup|protect|relax|displaystyle|textstyle|left|right)(?![A-Za-z]) ?)|"
    r"(?P<color>\\(?:text)?color\{[^{}\n]{0,40}\}|"
    r"\\(?:fontsize|hspace|vspace|label|href)\*?\{[^{}\n]{0,200}\})|"
    r"(?P<command>\\(?:text\w{0,8}|math\w{2,5}|emph|underline|uline|mbox|hbox|fbox|operatorname|boldsymbol|bm|"
    r"ensuremath|uppercase|lowercase|MakeUppercase|MakeLowercase|section|subsection|item|sout|hl|textcolor)"
    r"\*?(?=\{| ))|"
    r"\\(?P<literal>[&%$#_{}*`\[\]()!.+>|-])|"
    r"(?P<marks>[{}$`^]|\*{1,3}|~~|(?<=\w)_{1,3}(?=\w)|\b_{1,2}|_{1,2}\b|==|\+\+)", re.DOTALL)
# one look for a cheap sign instead of the large pattern at every character
_SIGNS = {_ESCAPE: re.compile(r"&(?=[#\w])|%(?=[0-9A-Fa-f])|=(?=[0-9A-F\r\n])|\\(?=[ux])"),
          _MARKUP: re.compile(r"<(?=[!/A-Za-z])|\\|\](?=[\](])|\[(?=[^\[\]\n]{1,200}\]\()|!(?=\[)|[~{}$`^*_]|"
                              r"=(?==)|\+(?=\+)")}
"""With what a match of these begins."""
_CONFUSABLE = {
    **dict(zip("аеорсухіјѕһԁɡԛԝвкмнтзпгьґүӏ", "aeopcyxijshdgqwbkmht3nrbryl", strict=True)),
    **dict(zip("АВЕКМНОРСТУХІЈЅԌԚԜЗҮӀ", "ABEKMHOPCTYXIJSGQW3YI", strict=True)),
    **dict(zip("αβγεικνορτυχωηϲϳ", "abyeikvoptuxwncj", strict=True)),
    **dict(zip("ΑΒΕΖΗΙΚΜΝΟΡΤΥΧ", "ABEZHIKMNOPTYX", strict=True)),
    **dict(zip("ɑɩɪıʟɴʀᴀʙᴄᴅᴇɢʜᴊᴋᴍᴏᴘᴛᴜᴠᴡʏᴢꜱꜰ", "aiiilnrabcdeghjkmoptuvwyzsf", strict=True)),
    **dict(zip("օոսցհեկք", "onugheuk", strict=True)),
    "ø": "o", "Ø": "O", "ł": "l", "Ł": "L", "đ": "d", "ð": "d"}
_COMBINING = re.compile("[\u0300-\u036f\u0483-\u0489\u1ab0-\u1aff\u1dc0-\u1dff\u20d0-\u20ff\ufe20-\ufe2f]+")

_Places = tuple[NDArray[np.int64], NDArray[np.int64]]
"""Where the origin of each character begins, and where it ends."""
_Step = Callable[[], _Places]
"""Tells the places of a text that was made of another."""


@dataclass(frozen=True)
class Plain:
    """The plain form of a text."""

    text: str
    steps: tuple[_Step, ...]

    @property
    def starts(self) -> NDArray[np.int64]:
        """Return where in the text as it was written that begins from which each character was made."""
        return self._origins[0]

    @property
    def ends(self) -> NDArray[np.int64]:
        return self._origins[1]

    @cached_property
    def _origins(self) -> _Places:
        # most texts hold nothing that is looked for, and are never asked for places
        starts, ends = self.steps[0]()
        for step in self.steps[1:]:
            at, upto = step()
            # places compose: each step says where its characters came from in the text before it
            starts, ends = starts[at], ends[upto - 1]
        return starts, ends


def plain(text: str) -> Plain | None:
    """Return the plain form of a text; None where it would say the same to a search by words."""
    if not _MAY_DIFFER.search(text):
        return None
    made, steps = text, list[_Step]()
    # escapes first, for they may hide markup; markup before letters, for commands of accents make letters
    for _ in range(_ROUNDS):
        new, step = _replaced(made, _ESCAPE, _unescaped)
        if new == made:
            break
        made, steps = new, [*steps, step]
    new, step = _replaced(made, _MARKUP, _without_markup)
    if new != made:
        made, steps = new, [*steps, step]
    if not made.isascii():
        new, step = _letters(made)
        if new != made:
            made, steps = new, [*steps, step]
    return None if made == text or not made else Plain(made, tuple(steps))


def forms(text: str) -> list[str]:
    other = plain(text)
    return [text] if other is None else [text, other.text]


def _replaced(text: str, pattern: re.Pattern[str], value: Callable[[re.Match[str]], str]
              ) -> tuple[str, _Step]:
    """Return a text with matches replaced, and what tells the places."""
    parts: list[str] = []
    begins, stops = [0], []  # of what each part was made of, in turn as it was and replaced
    at = 0
    # a search for signs alone is many times as fast as one for all that they may begin
    for sign in _SIGNS[pattern].finditer(text):
        if sign.start() < at or (match := pattern.match(text, sign.start())) is None:
            continue
        new = value(match)
        if new == match[0]:
            continue
        begin, end = match.span()
        parts += [text[at:begin], new]
        begins += [begin, end]
        stops += [begin, end]
        at = end
    parts.append(text[at:])
    stops.append(len(text))
    return "".join(parts), partial(_places, parts, begins, stops)


def _places(parts: list[str], begins: list[int], stops: list[int]) -> _Places:
    # parts alternate: even ones were kept as they are, odd ones were replaced
    sizes = np.fromiter(map(len, parts), np.int64, len(parts))
    part = np.repeat(np.arange(len(parts)), sizes)
    # place inside its part: characters of a kept part move on one by one, those of a replaced part share its
    # span
    here = np.arange(len(part)) - (np.cumsum(sizes) - sizes)[part]
    is_kept = part % 2 == 0
    starts = np.array(begins)[part] + here * is_kept
    return starts, np.where(is_kept, starts + 1, np.array(stops)[part])


def _unescaped(match: re.Match[str]) -> str:
    if match["entity"]:
        return html.unescape(match[0])
    if match["soft"]:
        return ""
    if match["percent"]:
        read = unquote(match[0], errors="replace")
        return match[0] if "\ufffd" in read else read
    if match["quoted"]:
        read = bytes.fromhex(match[0].replace("=", "")).decode("utf-8", "replace")
        return match[0] if "\ufffd" in read else read
    code = int(match["unicode"] or match["four"] or match["byte"], 16)
    return chr(code) if code < 0x110000 and not 0xD800 <= code < 0xE000 else match[0]


def _without_markup(match: re.Match[str]) -> str:
    if match["block"] or match["blank"] or match["marks"] == "$":
        return " "
    if match["accent"]:
        return match["a"] or match["b"] or match["c"]
    return match["literal"] or ""


def _letters(text: str) -> tuple[str, _Step]:
    """Return a text with the letters that its own look like, and what tells the places."""
    table = {ord(c): _letter(c) for c in set(text)}  # a character that it lacks would cost an exception

    def places() -> _Places:
        sizes = np.fromiter((len(table[ord(c)]) for c in text), np.int64, len(text))
        at = np.repeat(np.arange(len(text)), sizes)
        return at, at + 1

    return text.translate(table), places


@lru_cache(maxsize=1 << 16)
def _letter(character: str) -> str:
    """Return what a character looks like, without its accents; Hangul and what has no Latin form as it is."""
    if character.isascii():
        return character
    if (made := _CONFUSABLE.get(character)) is not None:
        return made
    if _COMBINING.fullmatch(character):
        return ""
    # decomposition takes accents off Latin letters; Hangul falls into jamo and is left as it is
    apart = unicodedata.normalize("NFKD", character)
    if not apart[:1].isascii() and apart[:1] not in _CONFUSABLE:
        return character
    return "".join(_CONFUSABLE.get(c, c) for c in _COMBINING.sub("", apart))


_BYTES_PER_KEY = 32
_MIN_BITS, _MAX_BITS = 12, 30


@dataclass(frozen=True)
class SearchItem:
    """One text of a benchmark."""

    benchmark: str
    """Name of its file, without the ending, or of its task."""
    id: str
    """The record's own, or its line."""
    field: str
    """Which of the record's fields it is."""
    text: str


@dataclass(frozen=True)
class FoundItem:
    """An item, and where a text has it."""

    item: int
    """Its number."""
    begin: int
    """First unit of the stretch."""
    end: int
    """The unit behind it."""


class ItemSearch:
    """Looks for items."""

    def __init__(self, items: Sequence[SearchItem], ngram: int, min_words: int) -> None:
        """Prepare.

        Args:
            items: of all benchmarks.
            ngram: words of a run.
            min_words: shorter items are left out; at most `ngram`.
        """
        self.items, self.ngram, self.min_words = items, ngram, min_words
        self.too_short: list[int] = []
        """Numbers of the items that are not looked for."""
        # hash of a run -> items that have it; `_whole`: hash of the first run -> length and hash of a short
        # item
        runs: dict[int, list[int]] = defaultdict(list)
        self._whole: dict[int, list[tuple[int, int, int]]] = defaultdict(list)
        for number, item in enumerate(items):
            self._add(number, find_units(item.text), runs)
            if (other := plain(item.text)) and (not self.too_short or self.too_short[-1] != number):
                self._add(number, find_units(other.text), runs)
        self._owners = runs
        self._runs, self._beginnings = _Keys(list(runs)), _Keys(list(self._whole))

    def _add(self, number: int, units: Units, runs: dict[int, list[int]]) -> None:
        """Look for an item in one of its forms."""
        if units.size >= self.ngram * TWELFTHS:
            # an item may repeat a run, and both its forms may have it: its number is noted once
            for run in np.unique(units.runs(self.ngram)).tolist():
                if number not in runs[run][-1:]:
                    runs[run].append(number)
        elif units.size >= self.min_words * TWELFTHS:
            count = len(units.hashes)
            whole = stretch_hashes(units.hashes, np.array([0]), np.array([count]))
            entry = (count, int(whole[0]), number)
            if entry not in (known := self._whole[int(units.runs(self.min_words)[0])]):
                known.append(entry)
        elif number not in self.too_short:
            self.too_short.append(number)

    def find(self, units: Units) -> list[FoundItem]:
        """Return what a text has, by item and place; stretches of an item that touch are one."""
        found: dict[int, list[tuple[int, int]]] = defaultdict(list)
        ends = units.run_ends(self.ngram)
        places = self._runs.places(stretch_hashes(units.hashes, np.arange(len(ends)), ends))
        for begin, run in places:
            for item in self._owners[run]:
                stretches = found[item]
                # places come in order, so a run that touches the last stretch makes it longer
                if stretches and begin <= stretches[-1][1]:
                    stretches[-1] = (stretches[-1][0], int(ends[begin]))
                else:
                    stretches.append((begin, int(ends[begin])))
        if self._whole:
            for begin, run in self._beginnings.places(units.runs(self.min_words)):
                for count, whole, item in self._whole[run]:
                    end = begin + count
                    # the first words agree; the hash of the whole item decides
                    if end <= len(units.hashes) and whole == int(stretch_hashes(
                            units.hashes[begin:end], np.array([0]), np.array([count]))[0]):
                        found[item].append((begin, end))
        return [FoundItem(item, *stretch) for item in sorted(found) for stretch in found[item]]


class _Keys:
    """A set of 64-bit keys that is asked for many at a time."""

    def __init__(self, keys: list[int]) -> None:
        self._keys = np.sort(np.array(keys, np.uint64))
        # at most one in 32 values of the table is set, so most runs of a text end at this look
        wanted = max(1, len(keys) * _BYTES_PER_KEY).bit_length()
        bits = min(max(wanted, _MIN_BITS), _MAX_BITS)
        self._shift = np.uint64(64 - bits)
        self._may_be = np.zeros(1 << bits, np.bool_)
        self._may_be[self._keys >> self._shift] = True

    def places(self, asked: NDArray[np.uint64]) -> list[tuple[int, int]]:
        """Return (place, key) of those asked for that are in the set."""
        places = np.flatnonzero(self._may_be[asked >> self._shift])
        if not len(places):
            return []
        # a binary search for the few that are left; clipped, since a key above all others has no place
        nearest = np.minimum(np.searchsorted(self._keys, asked[places]), len(self._keys) - 1)
        places = places[self._keys[nearest] == asked[places]]
        return list(zip(places.tolist(), asked[places].tolist(), strict=True))
