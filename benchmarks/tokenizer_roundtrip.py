"""Encoding and decoding of random strings: text comes back, by `tokenizers` and by tiktoken,
and so do raw bytes.

    python benchmarks/tokenizer_roundtrip.py TOKENIZER ... [--strings 10000000]

TOKENIZER is a folder that `sov-tokenizer train` wrote.  Each gets the same strings, of five kinds.  For each
string x: `tokenizers` decodes the ids of x to NFC(x) by Python's `unicodedata` (to x where the preset does
not normalize), and tiktoken's form gives the same ids and the same text.  `tokenizers` knows no combining
class of marks that are newer than its tables, and no characters that are composed of such marks, so it leaves
them as they stand; strings with them are held against its own NFC.  Raw bytes are drawn from all 256, from
bytes that lead and continue characters, and from valid text with one byte changed;
tiktoken encodes and decodes them.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizer_train import machine
from tokenizers import Tokenizer

from tokenizer.formats import tiktoken_format

BATCH_STRINGS = 20_000
MEAN_CHARS = 8
RAW_SHARE = 0.1
"""Raw byte strings for each string of text."""
SURROGATES, NUM_SCALARS = (0xD800, 0xE000), 0x110000 - 2048
BLOCKS = [(0x20, 0x7F), (0xA0, 0x250), (0x370, 0x400), (0x400, 0x530), (0x590, 0x600), (0x600, 0x700),
          (0x900, 0x980), (0xE00, 0xE80), (0x1000, 0x10A0), (0x1100, 0x1200), (0x1E00, 0x1F00),
          (0x2000, 0x2070), (0x3040, 0x3100), (0x3130, 0x3190), (0x4E00, 0x5200), (0xAC00, 0xD7A4),
          (0xF900, 0xFB00), (0xFE00, 0xFE10), (0xFF00, 0xFFF0), (0x1F300, 0x1F650), (0xE0020, 0xE0080)]
"""Scripts of large languages, jamo, compatibility and full-width forms, variation selectors, emoji, tags."""
WHITE_SPACE = [*range(9, 14), 0x20, 0x20, 0x20, 0x85, 0xA0, 0x1680, *range(0x2000, 0x200E), 0x2028, 0x2029,
               0x202F, 0x205F, 0x3000, 0xFEFF]
MARKS = [c for c in range(0x20000) if unicodedata.category(chr(c))[0] == "M"]
PAIRS = [unicodedata.normalize("NFD", chr(c))
         for c in range(0x20000) if unicodedata.decomposition(chr(c))[:1] not in ("", "<")]
BASES = [*map(ord, "aeiouAEIOUncs "), 0x1100, 0x1112, 0x1161, 0x1175, 0x11A8, 0xAC00, 0xE01, 0x915, 0x5D0,
         0x3042, 0x212B]
CLASSES = ("\u0334", "\u0323")
"""Marks of the lowest class, and of a low one: what comes before them in canonical order
is of another class."""
Draw = np.random.Generator
Lengths = NDArray[np.int64]


def cut(codes: NDArray[np.int64], lengths: Lengths) -> list[str]:
    """Return strings of the given lengths from code points, [sum of lengths]."""
    text = codes.astype("<u4").tobytes().decode("utf-32-le")
    ends = np.cumsum(lengths).tolist()
    return [text[start:end] for start, end in zip([0, *ends[:-1]], ends, strict=True)]


def scalars(draw: Draw, lengths: Lengths, names: list[str]) -> list[str]:
    """Return strings of any Unicode scalar values, all equally likely."""
    codes = draw.integers(NUM_SCALARS, size=lengths.sum())
    return cut(codes + 2048 * (codes >= SURROGATES[0]), lengths)


def scripts(draw: Draw, lengths: Lengths, names: list[str]) -> list[str]:
    """Return strings that change between scripts every few characters."""
    total = int(lengths.sum())
    starts, stops = (np.array(bounds) for bounds in zip(*BLOCKS, strict=True))
    blocks = np.repeat(draw.integers(len(BLOCKS), size=total), draw.geometric(0.3, total))[:total]
    return cut(draw.integers(starts[blocks], stops[blocks]), lengths)


def marks(draw: Draw, lengths: Lengths, names: list[str]) -> list[str]:
    """Return strings of letters, jamo and combining marks in any order and number."""
    total = int(lengths.sum())
    codes = np.where(draw.random(total) < 0.6, draw.choice(np.array(MARKS), total),
                     draw.choice(np.array(BASES), total))
    return cut(codes, lengths)


def spaces(draw: Draw, lengths: Lengths, names: list[str]) -> list[str]:
    """Return runs of white space of all kinds between letters, digits and punctuation."""
    total = int(lengths.sum())
    runs = draw.geometric(0.4, total)
    space = np.repeat(draw.choice(np.array(WHITE_SPACE), total), runs)[:total]
    other = draw.choice(np.array([*map(ord, "aZé가ก중0９.,'-/{\"")]), total)
    return cut(np.where(draw.random(total) < 0.7, space, other), lengths)


def lookalikes(draw: Draw, lengths: Lengths, names: list[str]) -> list[str]:
    """Return names of special tokens, parts of them and what resembles them, between text."""
    parts = [*names, *(n[:k] for n in names for k in (1, len(n) // 2, len(n) - 1)), *(n[1:] for n in names),
             *(n.upper() for n in names), *(n.replace("|", "｜") for n in names), "<", "|", "|>", "<|", "</",
             "[", "]", " ", "\n", "the", " of the", "가", " 나라", "'s", "0", "\u200b", "\u0301"]
    chosen = draw.integers(len(parts), size=int(np.maximum(lengths // 4, 1).sum())).tolist()
    ends = np.cumsum(np.maximum(lengths // 4, 1)).tolist()
    return ["".join(parts[i] for i in chosen[start:end])
            for start, end in zip([0, *ends[:-1]], ends, strict=True)]


def raw_bytes(draw: Draw, count: int, text: list[str]) -> list[bytes]:
    """Return byte strings that are mostly no UTF-8."""
    lengths = draw.geometric(1 / MEAN_CHARS, count)
    likely = np.array([0x20, 0x41, 0x80, 0x9F, 0xA0, 0xBF, 0xC0, 0xC3, 0xE0, 0xEA, 0xED, 0xEF, 0xF0, 0xF4,
                       0xF5, 0xFF], np.uint8)
    total = int(lengths.sum())
    drawn = np.where(np.repeat(draw.random(count) < 0.5, lengths), draw.integers(256, size=total),
                     draw.choice(likely, total))
    flat, ends = drawn.astype(np.uint8).tobytes(), np.cumsum(lengths).tolist()
    found = [flat[start:end] for start, end in zip([0, *ends[:-1]], ends, strict=True)]
    for i, string in enumerate(text[: count // 3]):
        changed = bytearray(string.encode() or b"a")
        changed[int(draw.integers(len(changed)))] = int(draw.integers(256))
        found[i] = bytes(changed)
    return found


MAKERS: dict[str, Callable[[Draw, Lengths, list[str]], list[str]]] = {
    "any scalar values": scalars, "mixed scripts": scripts, "combining marks": marks, "white space": spaces,
    "special look-alikes": lookalikes}


class Library:
    """A tokenizer by `tokenizers` and by tiktoken."""

    def __init__(self, folder: Path) -> None:
        """Open the folder."""
        raw = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        self.names = [token["content"] for token in raw["added_tokens"]]
        self._fast = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._fast.encode_special_tokens = True
        ranks, rules = tiktoken_format.to_tiktoken(raw, folder.name, {})
        self._tiktoken, self.form = tiktoken_format.encoding(ranks, rules), rules.normalization
        newer = [chr(c) for c in MARKS if any(self._own(chr(c) + mark) != self._pythons(chr(c) + mark)
                                              for mark in CLASSES)]
        newer += [pair for pair in PAIRS if self._own(pair) != self._pythons(pair)]
        self.num_newer, self._newer = len(newer), re.compile("|".join(map(re.escape, newer)) or "(?!)")

    def _own(self, text: str) -> str:
        return text if self.form is None else str(self._fast.normalizer.normalize_str(text))

    def _pythons(self, text: str) -> str:
        return text if self.form is None else unicodedata.normalize(self.form, text)  # type: ignore[arg-type]

    def normal(self, text: str) -> str:
        """Return the text that should come back."""
        return self._own(text) if self._newer.search(text) else self._pythons(text)

    def wrong(self, texts: list[str]) -> Iterator[tuple[str, str]]:
        """Yield (what is wrong, text)."""
        ids = [e.ids for e in self._fast.encode_batch_fast(texts, add_special_tokens=False)]
        normal = [self.normal(text) for text in texts]
        decoded = self._fast.decode_batch(ids, skip_special_tokens=False)
        # its own batches start a thread's task for each string
        others = map(self._tiktoken.encode_ordinary, normal)
        for text, expected, found, one, other in zip(texts, normal, decoded, ids, others, strict=True):
            if found != expected:
                yield "decoded to other text", text
            elif one != other:
                yield "tiktoken gives other ids", text
            elif self._tiktoken.decode_bytes(one) != found.encode():
                yield "tiktoken gives other text", text

    def wrong_bytes(self, strings: list[bytes]) -> Iterator[tuple[str, bytes]]:
        """Yield (what is wrong, bytes)."""
        for raw in strings:
            if self._tiktoken.decode_bytes(self._tiktoken._encode_bytes(raw)) != raw:
                yield "bytes do not come back", raw


def run(folder: Path, num_strings: int) -> int:
    """Print the figures of one tokenizer; returns how many strings were wrong."""
    library, started_s, cpu_s = Library(folder), time.monotonic(), time.process_time()
    print(f"\n{folder.name}: {library.form or 'no normalization'}; {library.num_newer} marks and pairs newer "
          "than its tables\n"
          f"{'':<24} {'strings':>11} {'MB':>8} {'changed by NFC':>15} {'wrong':>6}")
    total_wrong, raw = 0, [0, 0, 0]
    for kind, (name, make) in enumerate(MAKERS.items()):
        draw = np.random.default_rng(kind)
        done, size_bytes, changed, wrong = 0, 0, 0, 0
        while done < num_strings // len(MAKERS):
            texts = make(draw, draw.geometric(1 / MEAN_CHARS, BATCH_STRINGS), library.names)
            strings = raw_bytes(draw, round(RAW_SHARE * len(texts)), texts)
            found = [*library.wrong(texts), *library.wrong_bytes(strings)]
            for what, string in found[:3]:
                print(f"  {what}: {string!r}")
            wrong += sum(isinstance(string, str) for _, string in found)
            raw = [raw[0] + len(strings), raw[1] + sum(map(len, strings)),
                   raw[2] + sum(isinstance(s, bytes) for _, s in found)]
            done += len(texts)
            size_bytes += sum(len(t.encode()) for t in texts)
            changed += sum(library.normal(t) != t for t in texts)
        total_wrong += wrong
        print(f"{name:<24} {done:11,} {size_bytes / 1e6:8.1f} {changed:15,} {wrong:6,}", flush=True)
    print(f"{'raw bytes, by tiktoken':<24} {raw[0]:11,} {raw[1] / 1e6:8.1f} {'':>15} {raw[2]:6,}\n"
          f"{time.process_time() - cpu_s:.0f} CPU s, {time.monotonic() - started_s:.0f} s on the clock",
          flush=True)
    return total_wrong + raw[2]


def main() -> int:
    """Run everything."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("tokenizers", nargs="+", type=Path, metavar="TOKENIZER",
                        help="folder of a trained tokenizer")
    parser.add_argument("--strings", type=int, default=10_000_000,
                        help="strings of text for each (default %(default)s)")
    args = parser.parse_args()
    print(machine())
    return int(sum(run(folder, args.strings) for folder in args.tokenizers) > 0)


if __name__ == "__main__":
    sys.exit(main())
