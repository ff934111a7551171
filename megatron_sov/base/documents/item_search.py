"""Search texts for benchmark items by runs of words (`documents.overlap`).

An item of at least `ngram` words matches if the text contains one of its runs of `ngram` words. A shorter
item matches if the text contains all of it; items below `min_words` are not searched. A text's runs are first
looked up in a table of one byte per hash prefix; only the hits are then searched in the sorted hashes of all
items.

`to_plain_form` computes a second form: the visible text without markup, escapes and look-alike letters. It
is searched besides the original text, so that the conversion hides no match. Entities and escapes are
decoded; tags inside words, TeX and Markdown commands and accents are removed; and letters of other scripts
that look like Latin letters become Latin (Unicode Technical Standard 39, confusables).
"""

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

from megatron_sov.base.documents.overlap import TWELFTHS, Units, find_units, hash_stretches

_MAY_DIFFER = re.compile(r"[&<\\{}*_`$%~=+^\[\u00a0-\U0010ffff]")
_ROUNDS = 3
"""Passes over nested escapes: an entity may contain a further entity's sign, as in &amp;lt;."""
_BLOCKS = ("p|br|div|li|ul|ol|td|th|tr|table|h[1-6]|hr|section|article|header|footer|blockquote|pre|dd|dt|dl|"
           "option|label|figcaption|title|body|head|html")
_ESCAPE = re.compile(
    r"(?P<entity>&#?\w{1,31};?)|(?P<percent>(?:%[0-9A-Fa-f]{2})+)|"
    r"(?P<quoted>(?:=[0-9A-F]{2})+)|(?P<soft>=\r?\n)|"
    r"\\u(?:\{(?P<unicode>[0-9a-fA-F]{1,6})\}|(?P<four>[0-9a-fA-F]{4}))|\\x(?P<byte>[0-9a-fA-F]{2})")
# `_strip_markup`: block and blank become a space, accent and literal keep their character, others vanish
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
"""Pattern -> cheap pattern for the first characters of a match."""
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
"""Start and end (exclusive) per character in an earlier text."""
_Step = Callable[[], _Places]
"""Computes where a text's characters were before a replacement."""


@dataclass(frozen=True)
class PlainForm:
    """A text's plain form, and the origins of its characters in the text."""

    text: str
    steps: tuple[_Step, ...]

    @property
    def starts(self) -> NDArray[np.int64]:
        """Return each character's start in the original text."""
        return self._origins[0]

    @property
    def ends(self) -> NDArray[np.int64]:
        return self._origins[1]

    @cached_property
    def _origins(self) -> _Places:
        # computed lazily: most texts contain no item and need no origins
        starts, ends = self.steps[0]()
        for step in self.steps[1:]:
            step_starts, step_ends = step()
            # each step maps characters to the text before the step: compose the maps
            starts, ends = starts[step_starts], ends[step_ends - 1]
        return starts, ends


def to_plain_form(text: str) -> PlainForm | None:
    """Return the plain form of a text; None if a search by words would see no difference."""
    if not _MAY_DIFFER.search(text):
        return None
    current, steps = text, list[_Step]()
    # escapes first: they may hide markup; markup before letters: accent commands produce letters
    for _ in range(_ROUNDS):
        new, step = _replace_matches(current, _ESCAPE, _unescape)
        if new == current:
            break
        current, steps = new, [*steps, step]
    new, step = _replace_matches(current, _MARKUP, _strip_markup)
    if new != current:
        current, steps = new, [*steps, step]
    if not current.isascii():
        new, step = _replace_letters(current)
        if new != current:
            current, steps = new, [*steps, step]
    return None if current == text or not current else PlainForm(current, tuple(steps))


def list_search_forms(text: str) -> list[str]:
    plain_form = to_plain_form(text)
    return [text] if plain_form is None else [text, plain_form.text]


def _replace_matches(text: str, pattern: re.Pattern[str], value: Callable[[re.Match[str]], str]
                     ) -> tuple[str, _Step]:
    """Replace matches of a pattern; return the new text and the `_Step` that computes origins."""
    parts: list[str] = []
    begins, stops = [0], []  # origins of the parts, alternately unchanged and replaced
    start = 0  # of the unchanged part
    # a search for signs is many times faster than matching the whole pattern everywhere
    for sign in _SIGNS[pattern].finditer(text):
        if sign.start() < start or (match := pattern.match(text, sign.start())) is None:
            continue
        new = value(match)
        if new == match[0]:
            continue
        begin, end = match.span()
        parts += [text[start:begin], new]
        begins += [begin, end]
        stops += [begin, end]
        start = end
    parts.append(text[start:])
    stops.append(len(text))
    return "".join(parts), partial(_compute_origins, parts, begins, stops)


def _compute_origins(parts: list[str], begins: list[int], stops: list[int]) -> _Places:
    """Return the start and end in the old text of each character in the joined `parts`.

    Parts alternate: even ones are unchanged, odd ones replaced; part i comes from `begins[i]`:`stops[i]`.
    """
    sizes = np.fromiter(map(len, parts), np.int64, len(parts))
    part_indices = np.repeat(np.arange(len(parts)), sizes)  # per character
    # characters in an unchanged part have consecutive origins; those of a replaced part share a range
    offsets = np.arange(len(part_indices)) - (np.cumsum(sizes) - sizes)[part_indices]
    is_unchanged = part_indices % 2 == 0
    starts = np.array(begins)[part_indices] + offsets * is_unchanged
    return starts, np.where(is_unchanged, starts + 1, np.array(stops)[part_indices])


def _unescape(match: re.Match[str]) -> str:
    if match["entity"]:
        return html.unescape(match[0])
    if match["soft"]:
        return ""
    if match["percent"]:
        decoded = unquote(match[0], errors="replace")
        return match[0] if "\ufffd" in decoded else decoded
    if match["quoted"]:
        decoded = bytes.fromhex(match[0].replace("=", "")).decode("utf-8", "replace")
        return match[0] if "\ufffd" in decoded else decoded
    code = int(match["unicode"] or match["four"] or match["byte"], 16)
    return chr(code) if code < 0x110000 and not 0xD800 <= code < 0xE000 else match[0]


def _strip_markup(match: re.Match[str]) -> str:
    if match["block"] or match["blank"] or match["marks"] == "$":
        return " "
    if match["accent"]:
        return match["a"] or match["b"] or match["c"]
    return match["literal"] or ""


def _replace_letters(text: str) -> tuple[str, _Step]:
    """Replace letters by Latin look-alikes; return the new text and the `_Step` that computes origins."""
    # complete table: `translate` would raise and catch an exception for each missing character
    table = {ord(c): _to_latin(c) for c in set(text)}

    def compute_origins() -> _Places:
        sizes = np.fromiter((len(table[ord(c)]) for c in text), np.int64, len(text))
        starts = np.repeat(np.arange(len(text)), sizes)
        return starts, starts + 1

    return text.translate(table), compute_origins


@lru_cache(maxsize=1 << 16)
def _to_latin(character: str) -> str:
    """Return a character's Latin look-alike without accents; Hangul and further scripts stay unchanged."""
    if character.isascii():
        return character
    if (latin := _CONFUSABLE.get(character)) is not None:
        return latin
    if _COMBINING.fullmatch(character):
        return ""
    # decomposition separates accents from Latin letters, and Hangul into jamo
    decomposed = unicodedata.normalize("NFKD", character)
    if not decomposed[:1].isascii() and decomposed[:1] not in _CONFUSABLE:
        return character
    return "".join(_CONFUSABLE.get(c, c) for c in _COMBINING.sub("", decomposed))


_BYTES_PER_KEY = 32
_MIN_BITS, _MAX_BITS = 12, 30


@dataclass(frozen=True)
class SearchItem:
    """A benchmark text."""

    benchmark: str
    """Task name, or file name without ending."""
    id: str
    """The record's id or line number."""
    field: str
    """Record field."""
    text: str


@dataclass(frozen=True)
class ItemMatch:
    """A match between item and text."""

    item: int
    """Item index."""
    begin: int
    """First matching unit."""
    end: int
    """End unit (exclusive)."""


class ItemSearch:
    """A search index over benchmark items."""

    def __init__(self, items: Sequence[SearchItem], ngram: int, min_words: int) -> None:
        """Index the items.

        Args:
            items: texts of all benchmarks.
            ngram: length of a run in words.
            min_words: length of the shortest searched item; at most `ngram`.
        """
        self.items, self.ngram, self.min_words = items, ngram, min_words
        self.too_short: list[int] = []
        """Indices of unsearched items, shorter than `min_words`."""
        # `runs`: hash of a run -> item indices
        # `_whole`: hash of a short item's first words -> (number of units, hash of all units, item index)
        runs: dict[int, list[int]] = defaultdict(list)
        self._whole: dict[int, list[tuple[int, int, int]]] = defaultdict(list)
        for number, item in enumerate(items):
            self._index_item(number, find_units(item.text), runs)
            # the plain form too, unless the original is too short
            if (other := to_plain_form(item.text)) and (not self.too_short or self.too_short[-1] != number):
                self._index_item(number, find_units(other.text), runs)
        self._owners = runs
        self._runs, self._beginnings = _Keys(list(runs)), _Keys(list(self._whole))

    def _index_item(self, number: int, units: Units, runs: dict[int, list[int]]) -> None:
        """Index one form of an item, the original or the plain text; add its runs to `runs`."""
        if units.size >= self.ngram * TWELFTHS:
            # record an item once per run, even if the run occurs twice or in both forms
            for run in np.unique(units.runs(self.ngram)).tolist():
                if number not in runs[run][-1:]:
                    runs[run].append(number)
        elif units.size >= self.min_words * TWELFTHS:
            count = len(units.hashes)
            stretch = hash_stretches(units.hashes, np.array([0]), np.array([count]))
            entry = (count, int(stretch[0]), number)
            if entry not in (entries := self._whole[int(units.runs(self.min_words)[0])]):
                entries.append(entry)
        elif number not in self.too_short:
            self.too_short.append(number)

    def find(self, units: Units) -> list[ItemMatch]:
        """Return the matches by item and position; touching stretches with the same item are merged."""
        matches: dict[int, list[tuple[int, int]]] = defaultdict(list)
        ends = units.run_ends(self.ngram)
        places = self._runs.find(hash_stretches(units.hashes, np.arange(len(ends)), ends))
        for begin, run in places:
            for item in self._owners[run]:
                stretches = matches[item]
                # begins ascend: a run that touches the last stretch extends the stretch
                if stretches and begin <= stretches[-1][1]:
                    stretches[-1] = (stretches[-1][0], int(ends[begin]))
                else:
                    stretches.append((begin, int(ends[begin])))
        if self._whole:
            for begin, run in self._beginnings.find(units.runs(self.min_words)):
                for count, stretch_hash, item in self._whole[run]:
                    end = begin + count
                    # the first words match; compare the hash of the whole item
                    if end <= len(units.hashes) and stretch_hash == int(hash_stretches(
                            units.hashes[begin:end], np.array([0]), np.array([count]))[0]):
                        matches[item].append((begin, end))
        return [ItemMatch(item, *stretch) for item in sorted(matches) for stretch in matches[item]]


class _Keys:
    """A set with 64-bit keys and vectorised lookup."""

    def __init__(self, keys: list[int]) -> None:
        self._keys = np.sort(np.array(keys, np.uint64))
        # at most 1 in 32 table entries is set, so most lookups end at the table
        num_bits = max(1, len(keys) * _BYTES_PER_KEY).bit_length()
        table_bits = min(max(num_bits, _MIN_BITS), _MAX_BITS)
        self._shift = np.uint64(64 - table_bits)
        self._may_be = np.zeros(1 << table_bits, np.bool_)
        self._may_be[self._keys >> self._shift] = True

    def find(self, keys: NDArray[np.uint64]) -> list[tuple[int, int]]:
        """Return (index, key) for keys in the set."""
        places = np.flatnonzero(self._may_be[keys >> self._shift])
        if not len(places):
            return []
        # binary search for the candidates; clipped, because the highest key has no successor
        nearest = np.minimum(np.searchsorted(self._keys, keys[places]), len(self._keys) - 1)
        places = places[self._keys[nearest] == keys[places]]
        return list(zip(places.tolist(), keys[places].tolist(), strict=True))
