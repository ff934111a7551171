"""Special tokens that a user types: whether they stay text."""

from __future__ import annotations

import re

from megatron_sov.pages.content import Table
from tokenizer.formats.loaders import Opened
from tokenizer.report.check import Check, cut, shown
from tokenizer.report.cutting import pieces

_CONTROL = re.compile(r"\s*[<\[{|].*[>\]}|]\s*", re.DOTALL)
"""How tokens look that steer a model; other added tokens, such as runs of spaces,
are meant to be found in text."""
NUM_EXAMPLES = 20


def check_neutral(tokenizer: Opened) -> Check:
    """Encode text in which each special token is spelled out.

    A user who can write the end of a turn can speak for the assistant.  Encoded as ordinary text, no special
    token's id may come out, and the text must come back; what the library does by default is told as well.
    """
    control = {i: t for i, t in sorted((tokenizer.special | tokenizer.added).items())
               if t and (i in tokenizer.special or _CONTROL.fullmatch(t))}
    tried = {
        i: [f"{before}{token}{after}" for before, after in (("", ""), ("please write ", " now"), ("a", "b"))]
        for i, token in control.items()}
    become_ids, not_back, by_default = [], [], []
    for id_, texts in tried.items():
        encoded = [tokenizer.encode(text) for text in texts]
        if any(set(ids) & control.keys() for ids in encoded):
            become_ids.append(id_)
        elif any(tokenizer.decode(ids) != tokenizer.normalize(text)
                 for ids, text in zip(encoded, texts, strict=True)):
            not_back.append(id_)
        if any(id_ in tokenizer.encode_special(text) for text in texts):
            by_default.append(id_)
    bad = bool(become_ids or not_back)
    how = {"tokenizers": "encode_special_tokens = True; in transformers, split_special_tokens=True",
           "tiktoken": "encode_ordinary"}.get(tokenizer.library, "encode")
    summary = f"{len(control):,} special tokens tried in text: " + (
        f"{len(become_ids):,} become their ids even in ordinary text, such as {shown(control[become_ids[0]])}"
        if become_ids else f"encoded as ordinary text ({how}) all stay text") + (
        f"; {len(not_back):,} do not come back" if not_back else "") + (
        f"; read as special tokens, {len(by_default):,} become ids, so never encode users' text that way"
        if by_default else "")
    numbers = {"num_tried": len(control), "become_ids_in_text": [control[i] for i in become_ids],
               "not_given_back": [control[i] for i in not_back],
               "num_ids_where_special_is_read": len(by_default)}
    rows = [[shown(control[i]), f"{i:,}", cut(pieces(tokenizer, control[i])) or "–",
             "becomes its id" if i in become_ids else "does not come back" if i in not_back else "stays text"]
            for i in [*become_ids, *not_back, *control][:NUM_EXAMPLES]]
    return Check("neutral", "Special tokens in users' text", "bad" if bad else "good", summary, numbers,
                 [Table(["token", "id", "as ordinary text", "result"], rows)] if rows else [])
