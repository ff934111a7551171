"""What is in a vocabulary: its size and parts, tokens of several words, the longest ones."""

from __future__ import annotations

from collections import Counter

from megatron_sov.pages.page import Table
from tokenizer.formats.loaders import Opened
from tokenizer.report.charts import bars
from tokenizer.report.check import Check, is_text, shown

NUM_EXAMPLES = 20


def check_inventory(tokenizer: Opened) -> Check:
    """Size, special tokens, bytes, parts of characters and the longest tokens."""
    tokens = tokenizer.tokens
    ids = {*tokens, *tokenizer.special, *tokenizer.added}
    single = {token[0] for token in tokens.values() if len(token) == 1}
    partial = [id_ for id_, token in tokens.items() if len(token) > 1 and not is_text(token)]
    unused_ids = tokenizer.vocab_size - len(ids)
    twins = [token for token, count in Counter(tokens.values()).items() if count > 1]
    by_length = sorted(tokens, key=lambda id_: (-len(tokens[id_]), id_))
    longest = [id_ for id_ in by_length if tokens[id_].strip()][:NUM_EXAMPLES]
    numbers = {
        "library": tokenizer.library, "vocab_size": tokenizer.vocab_size,
        "num_special": len(tokenizer.special), "num_added": len(tokenizer.added),
        "special": {str(i): t for i, t in sorted(tokenizer.special.items())},
        "added": {str(i): t for i, t in sorted(tokenizer.added.items())}, "num_single_bytes": len(single),
        "num_parts_of_characters": len(partial),
        "share_parts_of_characters": len(partial) / tokenizer.vocab_size, "ids_without_token": unused_ids,
        "num_same_bytes": len(twins), "same_bytes": [shown(t) for t in twins[:NUM_EXAMPLES]],
        "mean_bytes": sum(map(len, tokens.values())) / max(1, len(tokens)),
        "longest": [{"id": i, "token": shown(tokens[i]), "num_bytes": len(tokens[i])} for i in longest],
        "tokens_by_num_bytes": dict(sorted(Counter(map(len, tokens.values())).items()))}
    summary = (f"{tokenizer.vocab_size:,} ids: {len(tokenizer.special):,} special, {len(tokenizer.added):,} "
               f"added, {len(single)} single bytes, {len(partial):,} parts of characters; "
               f"the longest token has {len(tokens[by_length[0]])} bytes"
               + (f"; {unused_ids:,} ids have no token" if unused_ids else "")
               + (f"; {len(twins):,} tokens share their bytes with another" if twins else ""))
    tables = [Table(["longest tokens", "id", "bytes"],
                    [[shown(tokens[i]), f"{i:,}", f"{len(tokens[i])}"] for i in longest])]
    if named := sorted((tokenizer.special | tokenizer.added).items()):
        rows = [[shown(t), f"{i:,}", "special" if i in tokenizer.special else "added"]
                for i, t in named[:3 * NUM_EXAMPLES]]
        tables.insert(0, Table(["special and added tokens", "id", "kind"], rows))
    lengths = Counter(min(len(t), 24) for t in tokens.values())
    labels = [f"{n}" if n < 24 else "24 and more" for n in sorted(lengths)]
    drawn = bars(labels, {"tokens": [lengths[n] for n in sorted(lengths)]}, "tokens",
                 "Tokens by their bytes.")
    return Check("inventory", "Vocabulary", "note" if unused_ids or twins else "good", summary, numbers,
                 tables, [drawn])


def words_in(token: bytes) -> int:
    """Return how many words with a letter in them stand in a token."""
    return sum(any(c.isalpha() for c in word) for word in token.decode("utf-8", errors="ignore").split())


def check_superwords(tokenizer: Opened) -> Check:
    """Tokens that span several words (SuperBPE, arXiv 2503.13423)."""
    words = {id_: n for id_, token in tokenizer.tokens.items()
             if b" " in token and (n := words_in(token)) > 1}
    share = len(words) / tokenizer.vocab_size
    longest = sorted(words, key=lambda id_: (-words[id_], -len(tokenizer.tokens[id_]), id_))
    step = max(1, len(words) // NUM_EXAMPLES)
    spread = sorted(words)[::step][:NUM_EXAMPLES]
    numbers = {"num_superwords": len(words), "share": share,
               "by_num_words": dict(sorted(Counter(words.values()).items())),
               "longest": [shown(tokenizer.tokens[i]) for i in longest[:NUM_EXAMPLES]],
               "examples": [shown(tokenizer.tokens[i]) for i in spread]}
    summary = (f"{len(words):,} tokens span words, {share:.1%} of the vocabulary; "
               f"the longest spans {max(words.values())} words" if words else "no token spans words")
    rows = [[shown(tokenizer.tokens[i]), f"{i:,}", f"{words[i]}"] for i in [*longest[:10], *spread]]
    tables = [Table(["superwords: longest, then some of all ids", "id", "words"], rows)] if rows else []
    return Check("superwords", "Superwords", "good", summary, numbers, tables)
