"""Whether texts of benchmarks are found in ten disguises, what is found in clean text, and how fast.

    python benchmarks/decontamination.py [--input PATH ...] [--megabytes 8] [--items 200]

Items are sentences of the input's own documents, of which half is never looked for otherwise (the hidden
half); each is planted into clean text in each disguise.  Clean text is the other half, with documents that
hold an item word by word left out.  The baseline is the usual way in numpy: words by a regular expression, a
hash for each, ten of them rolled into one.
"""

from __future__ import annotations

import argparse
import random
import re
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import xxhash

sys.path.insert(0, str(Path(__file__).parents[1]))

from data_prep.curate.decontamination.step import find_hits
from megatron_sov.base.documents import list_files, read_documents
from megatron_sov.base.documents.item_search import ItemSearch, SearchItem, plain
from megatron_sov.base.documents.overlap import find_units, fold
from megatron_sov.base.errors import UserError
from tests.data_prep.curate.decontamination.disguises import DISGUISES, ITEMS

_WORDS = re.compile(r"\w+")
_TAGS = re.compile(r"<(script|style).*?</\1>|<[^>]*>", re.DOTALL)
_BASE = np.uint64(0x9E3779B97F4A7C15)


def texts_of(paths: list[Path], size_bytes: int) -> list[str]:
    """Return documents of files as plain text, spread over them, about so many bytes."""
    files = [file for path in paths for file in list_files(path)]
    random.Random(0).shuffle(files)
    found, held = [], 0
    for file in files:
        try:
            text = file.read_text(encoding="utf-8") if file.suffix in (".html", ".htm", ".txt") else "".join(
                d.text for d in read_documents([file]))
        except (UserError, ValueError, OSError, RuntimeError):
            continue
        text = re.sub(r"\s*\n\s*", "\n", _TAGS.sub(" ", text))[:50_000]
        found.append(text)
        held += len(text.encode(errors="surrogatepass"))
        if held >= size_bytes:
            break
    return found


def sentences(texts: list[str], count: int) -> list[str]:
    """Return lines of 12 to 60 words."""
    found = sorted({line.strip() for text in texts for line in text.split("\n")
                    if 12 <= find_units(line).size / 12 <= 60})
    random.Random(1).shuffle(found)
    return found[:count]


def rolled(text: str) -> np.ndarray:
    """Return hashes of runs of ten words in the usual way."""
    words = _WORDS.findall(text.lower().encode(errors="replace").decode())
    ids = np.fromiter((xxhash.xxh64_intdigest(word.encode()) for word in words), np.uint64, count=len(words))
    found = np.zeros(max(0, len(ids) - 9), np.uint64)
    for k in range(10 if len(found) else 0):
        found = found * _BASE + ids[k:len(found) + k]
    return found ^ (found >> np.uint64(29))


def speed(texts: list[str], work: Callable[[str], object]) -> float:
    """Return megabytes in a second of the processor, the best of three."""
    size = sum(len(text.encode(errors="surrogatepass")) for text in texts) / 1e6
    taken = []
    for _ in range(3):
        start = time.process_time()
        for text in texts:
            work(text)
        taken.append(time.process_time() - start)
    return size / min(taken)


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--input", nargs="+", type=Path, default=[Path("/usr/share/doc")])
    parser.add_argument("--megabytes", type=float, default=8)
    parser.add_argument("--items", type=int, default=200)
    args = parser.parse_args()
    texts = texts_of(args.input, int(args.megabytes * 1e6))
    size = sum(len(text.encode(errors="surrogatepass")) for text in texts) / 1e6
    hidden, clean = texts[::2], texts[1::2]
    named = {**ITEMS, **{f"sentence {i}": text for i, text in enumerate(sentences(hidden, args.items))}}
    items = [SearchItem("planted", name, "text", text) for name, text in named.items()]
    search = ItemSearch(items, 10, 5)
    print(f"{len(texts)} documents, {size:.1f} MB; {len(items)} items, {len(search.too_short)} too short")
    for name, disguise in DISGUISES.items():
        planted = [f"{clean[0][:300]}\n{disguise(item.text)}\n{clean[-1][:300]}" for item in items]
        missed = [item.id for item, text in zip(items, planted, strict=True)
                  if not any(hit.item == item.id for hit in find_hits(text, search, 0))]
        usual = [bool(np.isin(rolled(text), rolled(item.text)).any())
                 for item, text in zip(items, planted, strict=True)]
        print(f"{name:20} {len(items) - len(missed)} of {len(items)} found (baseline {sum(usual)}, of the "
              f"first {len(ITEMS)}, which are of several languages, {sum(usual[:len(ITEMS)])})"
              + (f"; missed {', '.join(missed[:5])}" if missed else ""))
    hits: Counter[str] = Counter()
    for text in clean:
        hits.update({hit.item for hit in find_hits(text, search, 0)})
    letters = Counter(item.id for item in items for text in clean
                      if " ".join(item.text.split()).casefold() in " ".join(text.split()).casefold())
    print(f"clean text: {len(clean)} documents; items found in them: {sum(hits.values())} times "
          f"({sum(letters.values())} of these stand there letter by letter)")
    alone = sum(len({found.item for found in search.find(find_units(text))}) for text in clean)
    print(f"  of these by the text as it is, without its plain form: {alone}")
    known = np.unique(np.concatenate([rolled(item.text) for item in items]))
    print(f"baseline in numpy   {speed(texts, lambda t: np.isin(rolled(t), known).any()):6.1f} MB/s and core")
    both = speed(clean, lambda t: find_hits(t, search, 0))
    print(f"this search         {both:6.1f} MB/s and core ({1 / both:.3f} s for a MB)")
    first = speed(clean, lambda t: search.find(find_units(t)))
    print(f"  the text as it is {first:6.1f} ({1 / first:.3f} s for a MB)")
    print(f"  its plain form    {speed(clean, plain):6.1f}, without searching it")
    print(f"  folding alone     {speed(texts, fold):6.1f}")
    print(f"  units             {speed(texts, find_units):6.1f}")
    ascii_texts = [text for text in texts if text.isascii()]
    print(f"  search, ASCII     {speed(ascii_texts, lambda t: search.find(find_units(t))):6.1f}")


if __name__ == "__main__":
    main()
