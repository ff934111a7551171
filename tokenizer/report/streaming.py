"""Text and tokens that arrive one by one, and the same text encoded again."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence

from megatron_sov.pages.page import Table
from tokenizer.formats.loaders import Opened, open_tokenizer
from tokenizer.report.check import Check, Verdict, shown
from tokenizer.report.measures import NamedText

SAMPLE_CHARS = 300
"""Of each text, character by character."""
LONG_REWIND = 8
NUM_CHUNKS, CHUNK_CHARS = 200, 10_000
"""Text that is encoded again."""
MIXED = ("The quick brown fox isn't here, it's 2026.  def f(x):\n    return x ** 2\n\n"
         "한국어 문장은 띄어쓰기가 있다. 日本語と中文。 "
         "กำลังที่นี้ 👨\u200d👩\u200d👧 naïve e\u0301 <|end|> https://example.org/a?b=1&c=2")


def check_streaming(tokenizer: Opened, texts: Sequence[NamedText]) -> Check:
    """Let text grow by a character and see how many tokens are taken back; decode tokens as they come.

    A server that shows text while it is made, or caches the tokens of a prompt, meets both.
    """
    samples = {"mixed": MIXED} | {t.name: t.chunks[len(t.chunks) // 2].strip()[:SAMPLE_CHARS] for t in texts}
    found, rows, broken = {}, [], []
    for name, text in samples.items():
        if not text:
            continue
        grown = tokenizer.encode_many([text[:n] for n in range(1, len(text) + 1)])
        back = [len(a) - _common(a, b) for a, b in itertools.pairwise(grown)]
        whole = tokenizer.decode(grown[-1])
        decoded = [tokenizer.decode(grown[-1][:k]).rstrip("\ufffd") for k in range(1, len(grown[-1]) + 1)]
        if not all(whole.startswith(part) for part in decoded):
            broken.append(name)
        most = max(back, default=0)
        where = text[:back.index(most) + 2] if back else text
        found[name] = {"num_chars": len(text), "num_tokens": len(grown[-1]), "most_taken_back": most,
                       "mean_taken_back": sum(back) / max(1, len(back)),
                       "prefixes_decode": name not in broken}
        rows.append([name, f"{len(grown[-1])}", f"{most}", f"{sum(back) / max(1, len(back)):.2f}",
                     shown(where[-24:]), "no" if name in broken else "yes"])
    most = max(int(f["most_taken_back"]) for f in found.values())
    summary = f"one character more takes back at most {most} tokens; " + (
        f"decoding the first tokens gives other text than the beginning in {', '.join(broken)}" if broken
        else "the first tokens always decode to the beginning of the text")
    verdict: Verdict = "bad" if broken else "note" if most > LONG_REWIND else "good"
    return Check("streaming", "Streaming", verdict, summary, {"texts": found}, [
        Table(["text", "tokens", "most taken back", "mean", "where", "prefixes decode"], rows)])


def _common(a: list[int], b: list[int]) -> int:
    """Return how many ids two lists begin with in common."""
    return next((k for k, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def check_determinism(tokenizer: Opened, texts: Sequence[NamedText]) -> Check:
    """Encode the same text alone, among others, and by the same files opened again."""
    chunks = [MIXED] + [chunk[:CHUNK_CHARS] for text in texts
                        for chunk in text.chunks[:max(1, NUM_CHUNKS // len(texts))]]
    together = tokenizer.encode_many(chunks)
    again = open_tokenizer(tokenizer.path).encode_many(list(reversed(chunks)))[::-1]
    differ = [i for i, chunk in enumerate(chunks) if not together[i] == again[i] == tokenizer.encode(chunk)]
    digest = hashlib.sha256(repr(together).encode()).hexdigest()
    summary = f"{len(chunks):,} pieces of text encoded three times: " + (
        f"{len(differ)} differ, the first {shown(chunks[differ[0]][:40])}" if differ
        else f"the same ids (SHA-256 {digest[:12]})")
    numbers = {"num_chunks": len(chunks), "num_different": len(differ), "ids_sha256": digest}
    return Check("determinism", "Determinism", "bad" if differ else "good", summary, numbers)
