"""One record of a user's file as a document: text, a chat, a preference (two answers to one prompt), or a
prompt; and what a record says of itself beside its text: numbers that become columns, its bucket, its tags.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from megatron_sov.base.documents.groups import are_equal
from megatron_sov.base.documents.layouts import (
    COMPLETIONS, FOREIGN, KTO_TAG, LABEL, Renames, completion_of, own_fields, propose_columns, refuse_media,
    rename_fields)
from megatron_sov.base.documents.messages import (
    BadRecord, Conversation, Message, Messages, read_beside, read_messages, read_sharegpt, refuse_deep)

COLUMN_NAME = re.compile(r"[a-z_]+")
BUCKET_NAME = re.compile(r"\w[\w.-]{0,59}")
TAG_VALUE = re.compile(r"[\w.:+-]{1,60}")
"""What a tag may be, such as domain:law; no sign among them is one of a pattern."""
RESERVED = ("bin", "extra", "idx", "kind", "loss", "routes", "type")
"""Endings of the other files of a shard."""
LARGEST = 3.4028234663852886e38
"""Of float32."""


def column_problems(names: Iterable[str]) -> list[str]:
    """Return one sentence for each name that no column can have."""
    names = list(names)
    problems = [f"{name!r} cannot name a column (letters a-z and '_', and none of {', '.join(RESERVED)})"
                for name in names if not COLUMN_NAME.fullmatch(name) or name in RESERVED]
    return problems + [f"{name!r} is given {names.count(name)} times"
                       for name in dict.fromkeys(names) if names.count(name) > 1]


def read_columns(record: Mapping[str, Any], names: Iterable[str],
                 num_sequences: int) -> dict[str, tuple[float, ...]]:
    """Return column -> its number for each sequence of a record.

    Args:
        record: has a field for each column: a number, or a list with one for each sequence.
        names: the columns.
        num_sequences: 2 for a preference (chosen, rejected), else 1.

    Raises:
        BadRecord: a field is missing, or holds something else.
    """
    return {name: _numbers(record, name, num_sequences) for name in names}


def read_bucket(record: Mapping[str, Any], field: str) -> str:
    """Return the value of a record's field as the name of a bucket.

    Raises:
        BadRecord: the field is missing, or its value is no name.
    """
    value = _held(record, field, "--bucket-by")
    name = str(value) if isinstance(value, (str, int)) else ""
    if not BUCKET_NAME.fullmatch(name):
        raise BadRecord("fields", f"has {str(value)[:40]!r} in field {field!r}, by which --bucket-by sorts; "
                                  "must be a name of letters, digits, '.', '_', '-', or a whole number")
    return name


def tag_value(value: Any) -> str | None:
    """Return how a value is written as a tag, `True` as "true"; None: it is none."""
    text = str(value).lower() if isinstance(value, bool) else str(value)
    return text if isinstance(value, (str, int)) and TAG_VALUE.fullmatch(text) else None


def read_tags(record: Mapping[str, Any], names: Iterable[str]) -> tuple[str, ...]:
    """Return the value of each of these fields as a tag; "" where the record has none.

    A record of `sov-data synth` has its provenance in the field `synthetic`, which says that it is.

    Raises:
        BadRecord: a value cannot be one.
    """
    found = []
    for name in names:
        value = record.get(name)
        # the whole provenance is no tag; that there is one is what blends choose by
        if name == "synthetic" and isinstance(value, dict):
            value = True
        tag = "" if value is None or value == "" else tag_value(value)
        if tag is None:
            raise BadRecord("fields", f"has {str(value)[:40]!r} in field {name!r}, which --tag names; must "
                                      "be a word of letters, digits, '.', ':', '+', '_', '-', a whole "
                                      "number, true or false")
        found.append(tag)
    return tuple(found)


def _held(record: Mapping[str, Any], name: str, option: str) -> Any:
    if name not in record:
        raise BadRecord("fields", f"has no field {name!r}, which {option} names "
                                  f"(fields: {', '.join(record) or 'none'}); add it")
    return record[name]


def _numbers(record: Mapping[str, Any], name: str, num_sequences: int) -> tuple[float, ...]:
    value = _held(record, name, "--column")
    values = value if isinstance(value, list) else [value] * num_sequences
    if len(values) != num_sequences or not all(map(is_float32, values)):
        wanted = "a number" if num_sequences == 1 else f"a number or a list of {num_sequences}"
        raise BadRecord("fields", f"has {str(value)[:40]!r} in field {name!r}, must be {wanted} that float32 "
                                  "holds, for --column")
    return tuple(map(float, values))


def is_float32(value: Any) -> bool:
    """Return whether a value is a finite number that float32 holds."""
    # a comparison, since a whole number of 400 digits has no float that could be asked whether it is finite
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= LARGEST


ROLLOUTS = "rollouts"
"""What token shards hold that no record is packed to: responses of a model to prompts, as `rl` publishes
them."""
DIALOGUE = ("messages", "conversations", "prompt", "chosen", "rejected", "tools", *COMPLETIONS)
"""Fields of messages and of descriptions of tools."""
DESIRABLE = "desirable"
"""Field, and column, of a response beside one to another prompt, which may say the same: 1 of one that was
judged good, 0 of one that was judged bad."""
NUM_PROMPT = "num_prompt_messages"
"""Field of a chat: how many of its first messages are the prompt that it shares with other chats."""


@dataclass(frozen=True)
class RecordReading:
    """What records are expected to hold."""

    kind: str | None = None
    """One of `KINDS`; None: text or a chat, by the record's fields."""
    text_field: str = "text"
    """Field, or column, that holds the text."""
    max_document_bytes: int = 64 << 20
    """A longer line, row or value is a bad record: it is passed over without being held in memory."""
    columns: tuple[str, ...] = ()
    """Fields that hold numbers, each of which becomes a column."""
    bucket_by: str = ""
    """Field whose values sort the records into buckets; "": none."""
    tags: tuple[str, ...] = ()
    """Fields whose values become tags of the source, by which blends choose."""
    renames: Renames = ()
    """Fields of other names that make those which are read (`--columns`)."""
    by_line: bool = False
    """Whether each line of a text file is a document."""
    media: bool = False
    """Whether they are those of a media corpus, whose texts hold tokens of media and which name rows of
    banks."""


Parse = Callable[[dict[str, Any], str, int, RecordReading], Any]
"""What makes something of a record: record, place, line or row, how it is read."""


@dataclass(frozen=True)
class Document:
    """One document.

    >>> Document("corpus.jsonl:1", text="A sentence.").kind
    'text'
    """

    where: str
    """Its place for messages: the file, and the line of a JSONL file or the row of a Parquet file."""
    text: str = ""
    messages: Messages = ()
    """A chat, or the prompt of a preference."""
    chosen: Messages = ()
    """The better continuation of a preference."""
    rejected: Messages = ()
    """The worse one."""
    tools: tuple[dict[str, Any], ...] = ()
    """What the chat's tools are."""
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    """Variables of the chat template."""
    num_prompt: int = 0
    """How many of a chat's first messages are its prompt, where it is one of several chats with that prompt,
    which are then held out together; 0: it stands alone."""
    awaits_response: bool = False
    """Whether it is a prompt, for which responses will be generated."""
    id: str | None = None
    """The record's own `id`."""
    extra: str = ""
    """JSON of a prompt's other fields (what a reward needs, such as an answer)."""
    columns: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    """Column -> its number for each sequence: one, or those of chosen and rejected."""
    bucket: str = ""
    """The bucket that it belongs to; "": there are none."""
    tags: tuple[str, ...] = ()
    """The value of each of `RecordReading.tags`; "" where the record has none."""
    media: Mapping[str, tuple[tuple[int, int], ...]] | None = None
    """Bank -> row and used slots of each of its records that features are made of; None: its texts hold no
    tokens of media."""
    line: int = 0
    """Line or row, from 1, counted from where reading began; 0 where there is none."""

    @property
    def kind(self) -> str:
        if self.chosen:
            return "preference"
        if self.awaits_response:
            return "prompt"
        return "chat" if self.messages else "text"

    def texts(self) -> tuple[str, ...]:
        """Return the pieces of text that users wrote: the text itself, or each message's content."""
        if not self.messages and not self.chosen:
            return (self.text,)
        return (*((json.dumps(self.tools, ensure_ascii=False),) if self.tools else ()),
                *(text for m in (*self.messages, *self.chosen, *self.rejected) for text in m.texts()))

    def unread(self) -> Iterator[str]:
        """Yield the fields of its messages that are not read."""
        for message in (*self.messages, *self.chosen, *self.rejected):
            yield from message.unread

    def conversation(self, *more: Message) -> Conversation:
        """Return the chat, or the prompt, with more messages behind it, as chat templates take it."""
        return Conversation((*self.messages, *more), self.tools, self.template_kwargs)


@dataclass(frozen=True)
class LeftOut:
    """Result of a data step (the step `code` of a pipeline) for a document that is dropped.

    >>> long_enough = lambda document: document if len(document.text) >= 60 else LeftOut("short")
    """

    reason: str
    """A few words to count by: documents of the same reason are one figure in the manifest."""


def decode(raw: bytes, start_bytes: int = 0) -> str:
    """Return UTF-8 bytes as text; `start_bytes`: their place in the file, for the message.

    Raises:
        BadRecord: they are not UTF-8.
    """
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as e:
        begin = raw if not start_bytes else b""
        raise BadRecord("utf8", f"is not UTF-8 (byte {raw[e.start]:#04x} at offset {start_bytes + e.start}); "
                                f"{explain_bytes(begin)}") from None


FILE_BEGINS = ((b"%PDF", "a PDF; extract its text first, for example by pdftotext"),
               (b"PK\x03\x04", "a ZIP file, as .docx and .xlsx are; extract its text first"),
               (b"\x1f\x8b", "compressed by gzip; name it with the ending .gz"),
               (b"\x28\xb5\x2f\xfd", "compressed by zstd; name it with the ending .zst"),
               (b"PAR1", "a Parquet file; name it with the ending .parquet"),
               (b"\xff\xfe", "in UTF-16; convert it: iconv -f UTF-16 -t UTF-8 FILE > NEW_FILE"),
               (b"\xfe\xff", "in UTF-16; convert it: iconv -f UTF-16 -t UTF-8 FILE > NEW_FILE"))
"""First bytes of a file -> what it is, and the way to text in UTF-8."""


def explain_bytes(begin: bytes) -> str:
    """Return what a file is that is not UTF-8, by its first bytes, and how to convert it."""
    known = next((text for magic, text in FILE_BEGINS if begin.startswith(magic)), "")
    return f"the file is {known}" if known else "convert it, e.g. iconv -f CP949 -t UTF-8"


def parse_line(line: bytes, where: str, number: int, reading: RecordReading, parse: Parse) -> Any:
    """Return what `parse` makes of one JSONL line.

    Raises:
        BadRecord: it is no JSON object of the expected kind.
    """
    try:
        record = json.loads(decode(line))
    except (ValueError, RecursionError) as e:
        raise BadRecord("json", f"is not valid JSON ({e}); every line must be one JSON object") from None
    return parse_object(record, where, number, reading, parse)


def parse_object(record: Any, where: str, number: int, reading: RecordReading, parse: Parse) -> Any:
    """Return what `parse` makes of a decoded JSON value.

    Raises:
        BadRecord: it is no object of the expected kind.
    """
    if not isinstance(record, dict):
        raise BadRecord("json",
                        f"is a JSON {type(record).__name__}, must be an object with 'text' or 'messages'")
    return parse(record, where, number, reading)


def parse_record(record: dict[str, Any], where: str, number: int, reading: RecordReading) -> Document:
    """Return the document of one record.

    Raises:
        BadRecord: fields are missing or malformed, a value is too long, or nothing is in it.
    """
    if reading.renames:
        record = rename_fields(record, reading.renames)
    # a record with plain text is text, also where it has fields that other layouts use
    if not isinstance(record.get(reading.text_field), str) or reading.kind not in (None, "text"):
        record = own_fields(record, reading.kind)
    kind = _kind(record, reading)
    fields: dict[str, Any] = {}
    if kind != "text":
        refuse_deep(record)
        if not reading.media:
            refuse_media(record, kind == "prompt")
    if kind == "text":
        fields["text"] = record[reading.text_field]
    elif kind == "chat":
        fields["messages"], shared = _chat(record)
        # a count that the record gives goes before the one that its layout implies
        fields["num_prompt"] = _num_prompt(record, len(fields["messages"])) or shared
    elif kind == "preference":
        fields = _preference(record)
    else:
        fields["messages"] = _messages(record["prompt"], "prompt", "user")
        if fields["messages"][-1].role == "assistant":
            raise BadRecord("fields", "ends with an answer of the assistant, which a prompt would show; "
                                      "write {\"prompt\": QUESTION, \"answer\": ANSWER}")
        fields["extra"] = json.dumps({k: v for k, v in record.items() if k != "prompt"}, ensure_ascii=False,
                                     default=str)
        fields["awaits_response"] = True
    if kind != "text":
        # the system prompt last: it moves the count of prompt messages by one
        fields |= read_beside(record.get("tools"), record.get("chat_template_kwargs")) | _with_system(record,
                                                                                                   fields)
    if reading.bucket_by:
        fields["bucket"] = read_bucket(record, reading.bucket_by)
    fields["tags"] = read_tags(record, reading.tags)
    if reading.media:
        fields["media"] = _media(record)
    fields["columns"] = read_columns(record, reading.columns, 2 if kind == "preference" else 1)
    id_ = record.get("id")
    document = Document(where, id=str(id_) if isinstance(id_, (str, int)) else None, line=number, **fields)
    check_texts(document.texts(), reading)
    if kind != "text":
        for text in (*document.conversation().beside(), document.extra):
            _size_bytes(text)  # which are encoded too, if not counted
    return document


def _kind(record: dict[str, Any], reading: RecordReading) -> str:
    """Return the kind to read a record as; with an expected kind, a record of another one is
    refused by its name."""
    # the order decides: a preference has a prompt too, and a chat may have a text as well
    present = {"preference": "chosen" in record and "rejected" in record,
               "chat": "messages" in record or "conversations" in record
               or ("prompt" in record and completion_of(record) is not None),
               "prompt": "prompt" in record and "chosen" not in record,
               "text": isinstance(record.get(reading.text_field), str)}
    if reading.kind is None:
        if present["chat"] or present["text"]:
            return "chat" if present["chat"] else "text"
    elif present[reading.kind]:
        return reading.kind
    elif found := next((kind for kind, is_one in present.items() if is_one), None):
        article = {"text": "plain text", "chat": "a chat", "preference": "a preference",
                   "prompt": "a prompt"}[found]
        # KTO's rows; training on the bad ones as chats would teach them
        if found == "chat" and isinstance(record.get(LABEL), bool):
            raise BadRecord("fields", f"is a response with a {LABEL!r} (or {KTO_TAG!r}), but --format is "
                                      f"{reading.kind}; turn such rows into pairs with `sov-data unpaired`")
        beside = "" if found != "prompt" else (": no response is learned then; a chat has 'messages', or "
                                               "'prompt' and 'completion'")
        if found == "prompt" and reading.kind == "preference" and len(record) > 2 and not isinstance(
                record.get("completions"), list):
            raise BadRecord("fields", "has no 'chosen' and 'rejected' (fields: "
                                      f"{', '.join(map(str, list(record)[:8]))}); pass --columns "
                                      "chosen=FIELD,rejected=FIELD to `sov-data pack --format preference`")
        if found == "prompt" and isinstance(record.get("completions"), list):
            beside = (": its 'completions' are not learned; steps with labels train reward models of steps, "
                      "which no command here trains")
        raise BadRecord("fields", f"is {article}, but --format is {reading.kind}; "
                                  f"pack it on its own with --format {found}{beside}",
                        options=("--format", found))
    wanted = ({"text": f"string field {reading.text_field!r}",
               "chat": "'messages', 'conversations', or 'prompt' and 'completion'",
               "preference": "'chosen' and 'rejected'", "prompt": "'prompt'"}[reading.kind or "text"]
              + (" and no 'messages'" if reading.kind is None else ""))
    remedy, proposed = "add one", ""
    if reading.kind is not None and record:
        # prompts are packed, and read by `rl` too, which takes the same option
        command = "sov-data pack " if reading.kind in ("chat", "preference") else ""
        proposed = propose_columns(record, reading.kind)
        remedy = f"name yours with `{command}{proposed}`"
    raise BadRecord("fields", f"has no {wanted} (fields: {', '.join(record) or 'none'}); {remedy}",
                    options=tuple(proposed.split()))


_SCORE = re.compile("(?=.*chosen).*(?:score|rating|reward)")
"""Fields with the score of a pair's better side, such as chosen_score, score_chosen and chosen-rating."""
_VALUES: dict[str, Any] = {LABEL: True, KTO_TAG: True, "completions": [], "history": []}
"""Values that stand for those of a table's columns, others being text."""


def columns_problem(names: Iterable[str], reading: RecordReading) -> BadRecord | None:
    """Return what is wrong with a table that has these columns; None: its rows may be read."""
    try:
        record = rename_fields({name: _VALUES.get(name, "") for name in names}, reading.renames)
        _kind(own_fields(record, None), reading)
    except BadRecord as e:
        return e
    return None


def fields_read(reading: RecordReading) -> set[str]:
    """Return the fields that a reading knows, in any layout; a record has some of them."""
    return {*DIALOGUE, *FOREIGN, "id", "chat_template_kwargs", NUM_PROMPT, reading.bucket_by,
            *reading.columns, *reading.tags, *(name for _, sources in reading.renames for name in sources)}


def _chat(record: dict[str, Any]) -> tuple[Messages, int]:
    """Return a chat's messages, and how many of them are a prompt that has a completion; of it nothing is
    learned."""
    chat = next((name for name in ("messages", "conversations") if name in record), None)
    name = completion_of(record) or COMPLETIONS[0]
    if isinstance(record.get(LABEL), bool):
        raise BadRecord("fields", f"has a {LABEL!r} (or {KTO_TAG!r}), true or false, and a chat would learn "
                                  f"its {chat or name!r} either way; turn such rows into pairs with "
                                  "`sov-data unpaired`")
    if chat is not None:
        return (read_messages if chat == "messages" else read_sharegpt)(record[chat], chat), 0
    # TRL allows a string on one side and messages on the other
    both = [[{"role": role, "content": value}] if isinstance(value, str) else value
            for value, role in ((record["prompt"], "user"), (record[name], "assistant"))]
    for field_name, messages in zip(("prompt", name), both, strict=True):
        if not isinstance(messages, list) or not messages:
            raise BadRecord("fields", f"{field_name!r} must be a string, or a non-empty list of messages")
    found = read_messages([*both[0], *both[1]], f"prompt + {name}")
    num_prompt = len(both[0])
    if not any(m.role == "assistant" and m.is_learned for m in found[num_prompt:]):
        raise BadRecord("fields", f"{name!r} holds no message of the assistant that is learned")
    return (*(replace(m, is_learned=False) for m in found[:num_prompt]), *found[num_prompt:]), num_prompt


def _num_prompt(record: dict[str, Any], num_messages: int) -> int:
    """Return how many messages of a chat are the prompt that it shares with others; 0: it says nothing."""
    count = record.get(NUM_PROMPT)
    if count is None:
        return 0
    # `type` and not isinstance: true is an int for Python
    if type(count) is not int or not 0 < count < num_messages:
        raise BadRecord("fields", f"has {str(count)[:40]!r} in {NUM_PROMPT!r}, must say how many of "
                                  f"the {num_messages} messages are the prompt: at least 1, and not all")
    return count


def _with_system(record: dict[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the messages with the system prompt that a record has in a field of its own; a message goes
    before it."""
    system, messages = record.get("system"), fields["messages"]
    if not isinstance(system, str) or not system.strip() or messages[0].role == "system":
        return {}
    num_prompt = fields.get("num_prompt", 0)
    if num_prompt:  # 0 says nothing, and stays
        num_prompt += 1
    return {"messages": (Message("system", system), *messages), "num_prompt": num_prompt}


def _messages(value: Any, name: str, role: str) -> Messages:
    return (Message(role, value),) if isinstance(value, str) else read_messages(value, name)


def _media(record: dict[str, Any]) -> dict[str, tuple[tuple[int, int], ...]]:
    """Return the rows of banks that a record of a media corpus names."""
    value = record.get("media")
    try:
        if not isinstance(value, dict):
            raise TypeError("no object")
        found: dict[str, tuple[tuple[int, int], ...]] = {}
        for kind, rows in value.items():
            found[str(kind)] = tuple((row, used) for row, used in rows)
        numbers = [n for rows in found.values() for pair in rows for n in pair]
        if not all(type(n) is int and 0 <= n < 1 << 40 for n in numbers):
            raise ValueError("no whole numbers")
    except (TypeError, ValueError) as e:
        raise BadRecord("media_rows", f"has {str(value)[:80]!r} in 'media' ({e}), must be rows of banks; "
                                      "encode the "
                                      "media again") from None
    return found


def _preference(record: dict[str, Any]) -> dict[str, Messages]:
    """Return prompt, chosen and rejected; without a `prompt`, or with one that the continuations hold again,
    what both begin with is the prompt."""
    chosen, rejected = (_messages(record[field], field, "assistant") for field in ("chosen", "rejected"))
    prompt = _messages(record["prompt"], "prompt", "user") if record.get("prompt") is not None else ()
    shared = 0
    # one message is left on each side, even where both are equal
    while shared < min(len(chosen), len(rejected)) - 1 and chosen[shared] == rejected[shared]:
        shared += 1
    if not prompt or chosen[:len(prompt)] == prompt == rejected[:len(prompt)] or (
            shared and isinstance(record["prompt"], str)):  # which both sides hold again, as messages
        prompt, chosen, rejected = chosen[:shared], chosen[shared:], rejected[shared:]
    if not prompt:
        raise BadRecord("fields", "has no prompt: give 'prompt', or begin 'chosen' and 'rejected' with "
                                  "the same messages")
    if chosen == rejected and DESIRABLE not in record:
        raise BadRecord("no_preference",
                        "has the same text as 'chosen' and as 'rejected'; there is nothing to prefer")
    if DESIRABLE not in record and (tied := _tied_scores(record)):
        raise BadRecord("no_preference", f"has equal scores of both sides ({', '.join(tied)}); there is "
                                         "nothing to prefer")
    for side, messages in (("chosen", chosen), ("rejected", rejected)):
        if not any(m.role == "assistant" and m.is_learned for m in messages):
            raise BadRecord("fields", f"'{side}' holds no message of the assistant behind the prompt that is "
                                      "learned")
    return {"messages": prompt, "chosen": chosen, "rejected": rejected}


def _tied_scores(record: dict[str, Any]) -> list[str]:
    """Return the scores of a pair, as "field = value", if it has scores for both sides and all of them are
    equal; empty: it has none, or one side is better."""
    pairs = [(name, other) for name in record if _SCORE.search(name)
             if (other := name.replace("chosen", "rejected")) in record and other != name]
    numbers = [(name, record[name], record[other]) for name, other in pairs
               if all(type(record[field]) in (int, float) for field in (name, other))]
    is_tied = all(are_equal((first, second)) for _, first, second in numbers)
    return [f"{name!r} = {first:g}" for name, first, _ in numbers] if is_tied else []


def check_texts(texts: tuple[str, ...], reading: RecordReading) -> None:
    """Raise `BadRecord` where a document's texts are too long, no text, or none at all."""
    size_bytes = 0
    for text in texts:
        # encoding also finds half of a surrogate pair, which no tokenizer takes
        size_bytes += _size_bytes(text)
    if size_bytes > reading.max_document_bytes:
        raise too_long(reading)
    if not any(text.strip() for text in texts):
        raise BadRecord("empty", "holds no text")


def _size_bytes(text: str) -> int:
    try:
        return len(text.encode())
    except UnicodeEncodeError:
        raise BadRecord("utf8", "holds half of a surrogate pair (an escape such as \\ud800), "
                                "which is no character; remove it") from None


def too_long(reading: RecordReading) -> BadRecord:
    return BadRecord("too_long", f"is longer than --max-document-bytes {reading.max_document_bytes}; "
                                 "cut it, or raise the limit")
