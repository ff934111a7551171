"""Replies in which each part stands between tags: <title>...</title>."""

from __future__ import annotations

import re
from collections.abc import Mapping

from data_prep.synth.generator import GeneratedSample, Reply, SampleVerdict
from data_prep.synth.generators.documents.verdicts import complete

MAX_KEPT_CHARS = 2000
"""What is kept of an answer that has not the form that was asked for."""


def read_tagged(text: str, *names: str) -> dict[str, str] | None:
    """Return what stands between the tags of each name, in order, each once and not empty; None where a reply
    has another form.  What stands around them is left out: models like to say what they do."""
    found: dict[str, str] = {}
    place = 0
    for name in names:
        opening, closing = f"<{name}>", f"</{name}>"
        if text.count(opening) != 1 or text.count(closing) != 1:
            return None
        start, stop = text.index(opening) + len(opening), text.index(closing)
        if start < place or stop <= start or not (part := text[start:stop].strip()):
            return None
        found[name], place = part, stop + len(closing)
    return found


def read_list(text: str, *names: str) -> list[dict[str, str]] | None:
    """Return the parts of each group of tags that follow each other over and over; None for another form."""
    count = text.count(f"<{names[0]}>")
    if not count or any(text.count(mark) != count for name in names for mark in (f"<{name}>", f"</{name}>")):
        return None
    found = []
    for piece in re.split(rf"(?=<{re.escape(names[0])}>)", text)[1:]:
        if (parts := read_tagged(piece, *names)) is None:
            return None
        found.append(parts)
    return found


def malformed(reply: Reply, record: Mapping[str, object], group: str = "") -> GeneratedSample:
    """Return the sample of a reply that cannot be read, with what was said for the report."""
    verdicts = (complete(reply), SampleVerdict("form", False, "has not the form that was asked for"))
    return GeneratedSample({**record, "text": reply.text[:MAX_KEPT_CHARS]}, verdicts, group)
