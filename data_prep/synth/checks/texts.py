"""What of a sample is judged: the texts of its record, each for a source of the checks' pipeline."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from data_prep.curate.decontamination.step import text_in
from data_prep.synth.generator import Kind
from megatron_sov.base.documents.messages import BadRecord, Messages
from megatron_sov.base.documents.records import RecordReading, parse_record

SAMPLES, ANSWERS, CONTEXT, INPUT = "samples", "answers", "context", "input"
SOURCES = (SAMPLES, ANSWERS, CONTEXT, INPUT)
"""samples: all that a record says, without system turns; answers: what an assistant says in chats; context:
system turns, each once; input: what the generator was given."""
TASK_FIELDS = ("prompt", "question", "problem", "query", "instruction", "request", "user", "text", "messages")
"""Fields of a task, or of an input, that say what is asked, where it has them."""
MAX_TEXT_BYTES = 32 << 20
"""Of one sample; a longer one is none."""


class NoSample(Exception):
    """A record that no later command would take; says why."""


def texts_of(kind: Kind, record: Mapping[str, Any]) -> dict[str, str]:
    """Return source -> text, of those that a record has.

    Raises:
        NoSample: it is malformed, empty, or too long.
    """
    try:
        found = dict(_texts(kind, record))
        size_bytes = sum(len(text.encode()) for text in found.values())
    except BadRecord as e:
        raise NoSample(str(e)) from None
    except UnicodeEncodeError:
        raise NoSample("holds half of a surrogate pair, which is no character") from None
    if size_bytes > MAX_TEXT_BYTES:
        raise NoSample(f"has {size_bytes:,} bytes of text, at most {MAX_TEXT_BYTES:,} are taken")
    if not found.get(SAMPLES, "").strip() and kind != "task":  # a task may be a world alone
        raise NoSample("holds no text")
    return {name: text for name, text in found.items() if text.strip()}


def _texts(kind: Kind, record: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    if kind == "task":
        yield SAMPLES, asked_in(record)
        return
    is_pair = kind == "prompt" and {"chosen", "rejected"} <= record.keys()
    document = parse_record(dict(record), "", 0, RecordReading("preference" if is_pair else kind))
    if kind == "text":
        yield SAMPLES, document.text
        return
    yield SAMPLES, "\n\n".join(_said((*document.messages, *document.chosen), "user", "assistant", "tool"))
    yield CONTEXT, "\n\n".join(_said(document.messages, "system"))
    if kind == "chat":
        if not any(message.role == "assistant" for message in document.messages):
            raise NoSample("has no message of an assistant, so nothing could be learned from it")
        yield ANSWERS, "\n\n".join(_said(document.messages, "assistant"))


def _said(messages: Messages, *roles: str) -> Iterator[str]:
    """Yield thoughts and contents of some roles; calls are no text."""
    for message in messages:
        if message.role in roles:
            yield from filter(None, (message.reasoning, message.content))


def asked_in(record: Mapping[str, Any]) -> str:
    """Return what a record asks, or says, in the fields that such records have."""
    return "\n\n".join(filter(str.strip, (text_in(record.get(name)) for name in TASK_FIELDS)))
