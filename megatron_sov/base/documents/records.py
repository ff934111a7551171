"""Parse a record (text, chat, preference or prompt) to a `Document` with numeric columns, bucket and tags."""

import codecs
import contextlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from megatron_sov.base.documents.groups import are_equal
from megatron_sov.base.documents.layouts import (
    COMPLETIONS, KTO_TAG, LABEL, LAYOUT_FIELDS, Renames, convert_layout, describe_foreign_turns,
    get_completion_field, parse_label, propose_columns, refuse_media, rename_fields)
from megatron_sov.base.documents.messages import (
    BadRecord, Conversation, Message, Messages, check_depth, parse_messages, parse_sharegpt,
    parse_tools_and_kwargs)

COLUMN_NAME = re.compile(r"[a-z_]+")
BUCKET_NAME = re.compile(r"\w[\w.-]{0,59}")
TAG_VALUE = re.compile(r"[\w.:+-]{1,60}")
"""Pattern for tag values, for example domain:law; without wildcard characters."""
RESERVED = ("bin", "extra", "idx", "kind", "loss", "routes", "type")
"""Column names that would collide with shard files."""
MAX_FLOAT32 = 3.4028234663852886e38
"""Largest finite float32."""
ROLLOUTS = "rollouts"
"""Kind of token shards that `rl` publishes (a model's responses to prompts); records never have this kind."""
DIALOGUE = ("messages", "conversations", "prompt", "chosen", "rejected", "tools", *COMPLETIONS)
"""Fields for messages and tool descriptions."""
NUM_PROMPT_FIELD = "num_prompt_messages"
"""Chat field: number of leading messages that form a prompt shared with other chats."""
FILE_SIGNATURES = ((b"%PDF", "a PDF; extract its text first, for example by pdftotext"),
                   (b"PK\x03\x04", "a ZIP file, as .docx and .xlsx are; extract its text first"),
                   (b"\x1f\x8b", "compressed by gzip; name it with the ending .gz"),
                   (b"\x28\xb5\x2f\xfd", "compressed by zstd; name it with the ending .zst"),
                   (b"PAR1", "a Parquet file; name it with the ending .parquet"),
                   (b"\xff\xfe", "in UTF-16; convert it: iconv -f UTF-16 -t UTF-8 FILE > NEW_FILE"),
                   (b"\xfe\xff", "in UTF-16; convert it: iconv -f UTF-16 -t UTF-8 FILE > NEW_FILE"))
"""First bytes -> file format and how to obtain UTF-8 text."""
_SURROGATE_ESCAPE = re.compile(rb"\\u[dD][89a-fA-F]")
_SCORE = re.compile("(?=.*chosen).*(?:score|rating|reward)")
"""Matches fields with the score of a pair's better side: chosen_score, score_chosen, chosen-rating."""
_VALUES: dict[str, Any] = {LABEL: True, KTO_TAG: True, "completions": [], "history": []}
"""Column -> placeholder value; the remaining columns hold text."""


def find_column_problems(names: Iterable[str]) -> list[str]:
    """Return a sentence per invalid or repeated column name."""
    names = list(names)
    problems = [f"{name!r} cannot name a column (letters a-z and '_', and none of {', '.join(RESERVED)})"
                for name in names if not COLUMN_NAME.fullmatch(name) or name in RESERVED]
    return problems + [f"{name!r} is given {names.count(name)} times"
                       for name in dict.fromkeys(names) if names.count(name) > 1]


def read_columns(record: Mapping[str, Any], names: Iterable[str],
                 num_sequences: int) -> dict[str, tuple[float, ...]]:
    """Return column -> a number per sequence in the record.

    Args:
        record: holds a field for each column: a number, or a list with one number per sequence.
        names: the columns.
        num_sequences: 2 for a preference (chosen, rejected), else 1.

    Raises:
        BadRecord: a field is missing or malformed.
    """
    return {name: _read_numbers(record, name, num_sequences) for name in names}


def read_bucket(record: Mapping[str, Any], field: str) -> str:
    """Return a field's value as a bucket name. Raises `BadRecord`: it is missing, or no valid name."""
    value = _require_field(record, field, "--bucket-by")
    name = str(value) if isinstance(value, (str, int)) else ""
    if not BUCKET_NAME.fullmatch(name):
        raise BadRecord("fields", f"has {str(value)[:40]!r} in field {field!r}, by which --bucket-by sorts; "
                                  "must be a name of letters, digits, '.', '_', '-', or a whole number")
    return name


def format_tag(value: Any) -> str | None:
    """Format a field's value as a tag (`True` as "true"); None: the value cannot be a tag."""
    text = str(value).lower() if isinstance(value, bool) else str(value)
    return text if isinstance(value, (str, int)) and TAG_VALUE.fullmatch(text) else None


def read_tags(record: Mapping[str, Any], names: Iterable[str]) -> tuple[str, ...]:
    """Return a tag per field; "" if the record lacks the field.

    The field `synthetic` of records from `sov-data synth` holds an object, which counts as `True`. Raises
    `BadRecord`: a value cannot be a tag.
    """
    tags = []
    for name in names:
        value = record.get(name)
        # blends select by whether a record is synthetic, not by how it was made
        if name == "synthetic" and isinstance(value, dict):
            value = True
        tag = "" if value is None or value == "" else format_tag(value)
        if tag is None:
            raise BadRecord("fields", f"has {str(value)[:40]!r} in field {name!r}, which --tag names; must "
                                      "be a word of letters, digits, '.', ':', '+', '_', '-', a whole "
                                      "number, true or false")
        tags.append(tag)
    return tuple(tags)


def _require_field(record: Mapping[str, Any], name: str, option: str) -> Any:
    if name not in record:
        raise BadRecord("fields", f"has no field {name!r}, which {option} names "
                                  f"(fields: {', '.join(record) or 'none'}); add it")
    return record[name]


def _read_numbers(record: Mapping[str, Any], name: str, num_sequences: int) -> tuple[float, ...]:
    value = _require_field(record, name, "--column")
    values = value if isinstance(value, list) else [value] * num_sequences
    if len(values) != num_sequences or not all(map(is_float32, values)):
        expected = "a number" if num_sequences == 1 else f"a number or a list of {num_sequences}"
        raise BadRecord("fields", f"has {str(value)[:40]!r} in field {name!r}, must be {expected} that "
                                  "float32 holds, for --column")
    return tuple(map(float, values))


def is_float32(value: Any) -> bool:
    """Return whether a value is a finite number within the range of float32."""
    # compare integers without conversion: an integer of 400 digits cannot become a float
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= MAX_FLOAT32


@dataclass(frozen=True)
class RecordReading:
    """Settings for reading records."""

    kind: str | None = None
    """A kind in `KINDS`; None: text or chat, depending on the record's fields."""
    text_field: str = "text"
    """Field or column with the text."""
    max_document_bytes: int = 64 << 20
    """Maximum bytes per line, row or value; longer records are bad, and are skipped without loading them."""
    columns: tuple[str, ...] = ()
    """Numeric fields that become columns."""
    bucket_by: str = ""
    """Field that holds the record's bucket; "": no buckets."""
    tags: tuple[str, ...] = ()
    """Fields that become tags; blends select sources by tags."""
    renames: Renames = ()
    """Renamed fields (`--columns`)."""
    by_line: bool = False
    """Whether each line in a text file is a document."""
    media: bool = False
    """Whether the records belong to a media corpus: texts with media tokens and references to bank rows."""


RecordParser = Callable[[dict[str, Any], str, int, RecordReading], Any]
"""Function (record, location, line or row, reading) -> parsed record, such as `parse_record`."""


@dataclass(frozen=True)
class Document:
    """A document: text, chat, preference or prompt.

    >>> Document("corpus.jsonl:1", text="A sentence.").kind
    'text'
    """

    where: str
    """Location for messages: the file with a JSONL line or a Parquet row."""
    text: str = ""
    messages: Messages = ()
    """A chat, or a preference's prompt."""
    chosen: Messages = ()
    """A preference's better continuation (`chosen`)."""
    rejected: Messages = ()
    """A preference's worse continuation (`rejected`)."""
    tools: tuple[dict[str, Any], ...] = ()
    """Tool descriptions (`tools`)."""
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    """Chat template variables (`chat_template_kwargs`)."""
    num_prompt: int = 0
    """Number of leading messages that form a prompt shared with other chats, which are held out together with
    this one; 0: no shared prompt."""
    awaits_response: bool = False
    """Whether the document is a prompt for generating responses."""
    id: str | None = None
    """The record's field `id`."""
    extra: str = ""
    """JSON with a prompt's further fields, for example the reference answer for a reward."""
    columns: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    """Column -> a number per sequence (a preference has two sequences: chosen, rejected)."""
    bucket: str = ""
    """Bucket name; "": no buckets."""
    tags: tuple[str, ...] = ()
    """Values for `RecordReading.tags`; "" if the record lacks the field."""
    media: Mapping[str, tuple[tuple[int, int], ...]] | None = None
    """Bank -> (row, used slots) per medium; None: the text has no media tokens."""
    line: int = 0
    """Line or row, counted from 1 at the start of the file span; 0: unknown."""

    @property
    def kind(self) -> str:
        if self.chosen:
            return "preference"
        if self.awaits_response:
            return "prompt"
        return "chat" if self.messages else "text"

    def texts(self) -> tuple[str, ...]:
        """Return the document's texts: the text itself, or tool descriptions and message texts."""
        if not self.messages and not self.chosen:
            return (self.text,)
        tools = (json.dumps(self.tools, ensure_ascii=False),) if self.tools else ()
        messages = (*self.messages, *self.chosen, *self.rejected)
        return (*tools, *(text for message in messages for text in message.texts()))

    def unread(self) -> Iterator[str]:
        """Yield names of unread message fields."""
        for message in (*self.messages, *self.chosen, *self.rejected):
            yield from message.unread

    def conversation(self, *more: Message) -> Conversation:
        """Return the chat or prompt, followed by `more` messages, as input for a chat template."""
        return Conversation((*self.messages, *more), self.tools, self.template_kwargs)


@dataclass(frozen=True)
class LeftOut:
    """What a data step (step `code` in a pipeline) returns to drop a document.

    >>> long_enough = lambda document: document if len(document.text) >= 60 else LeftOut("short")
    """

    reason: str
    """A few words; the manifest counts documents by reason."""


def decode_utf8(raw: bytes, start_bytes: int = 0) -> str:
    """Decode UTF-8 bytes.

    Args:
        start_bytes: their offset in the file, for the error message.

    Raises:
        BadRecord: the bytes are not UTF-8.
    """
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as e:
        raise BadRecord("utf8", f"is not UTF-8 (byte {raw[e.start]:#04x} at offset {start_bytes + e.start}); "
                                f"{explain_bytes(raw, is_begin=not start_bytes)}") from None


def explain_bytes(raw: bytes, *, is_begin: bool = True) -> str:
    """Explain the format of a file that is not UTF-8, and how to convert the file; `is_begin`: whether `raw`
    is a whole file or line, not a block that may end inside a character."""
    file_format = next((text for magic, text in FILE_SIGNATURES if is_begin and raw.startswith(magic)), "")
    if file_format:
        return f"the file is {file_format}"
    for encoding in ("CP949", "CP1252"):
        with contextlib.suppress(UnicodeDecodeError):
            codecs.getincrementaldecoder(encoding)().decode(raw, final=is_begin)
            return f"convert it: iconv -f {encoding} -t UTF-8 FILE > NEW_FILE"
    return "convert it: iconv -f LATIN1 -t UTF-8 FILE > NEW_FILE"


def parse_line(line: bytes, where: str, number: int, reading: RecordReading, parse: RecordParser) -> Any:
    """Parse a line of JSONL. Raises `BadRecord`: the line is not a JSON object of the expected kind."""
    try:
        record = json.loads(decode_utf8(line))
    except (ValueError, RecursionError) as e:
        advice = "an array of records needs a name in .json" if line.lstrip()[:1] == b"[" else (
            "every line must be one JSON object")
        raise BadRecord("json", f"is not valid JSON ({e}); {advice}") from None
    # only a \u escape can yield a surrogate; looking for its two bytes first saves most lines the search
    may_have_surrogates = b"\\u" in line and _SURROGATE_ESCAPE.search(line) is not None
    return parse_json_value(record, where, number, reading, parse, may_have_surrogates=may_have_surrogates)


def parse_json_value(record: Any, where: str, number: int, reading: RecordReading, parse: RecordParser, *,
                     may_have_surrogates: bool = True) -> Any:
    """Parse a decoded JSON value. Raises `BadRecord`: the value is not an object of the expected kind, or is
    a prompt with a lone surrogate in any field (prompts keep all fields)."""
    if not isinstance(record, dict):
        raise BadRecord("json", f"is a JSON {type(record).__name__}, must be an object")
    if may_have_surrogates and reading.kind == "prompt":
        count_text_bytes(json.dumps(record, ensure_ascii=False))
    return parse(record, where, number, reading)


def parse_record(record: dict[str, Any], where: str, number: int, reading: RecordReading) -> Document:
    """Convert a record to a `Document`. Raises `BadRecord`: fields are missing or malformed, a value is too
    long, or the record has no text."""
    if reading.renames:
        record = rename_fields(record, reading.renames)
    # a record with plain text is text even if it has another layout's fields
    if not isinstance(record.get(reading.text_field), str) or reading.kind not in (None, "text"):
        record = convert_layout(record, reading.kind)
    kind = _choose_kind(record, reading)
    fields: dict[str, Any] = {}
    if kind != "text":
        check_depth(record)
        if not reading.media:
            refuse_media(record, kind == "prompt")
    if kind == "text":
        fields["text"] = record[reading.text_field]
    elif kind == "chat":
        fields["messages"], num_implied = _parse_chat(record)
        # an explicit count overrides the count implied by the layout
        fields["num_prompt"] = _parse_num_prompt(record, len(fields["messages"])) or num_implied
    elif kind == "preference":
        fields = _parse_preference(record)
    else:
        fields["messages"] = _parse_messages(record["prompt"], "prompt", "user")
        if fields["messages"][-1].role == "assistant":
            raise BadRecord("fields", "ends with an answer of the assistant, which a prompt would show; "
                                      "write {\"prompt\": QUESTION, \"answer\": ANSWER}")
        fields["extra"] = json.dumps({k: v for k, v in record.items() if k != "prompt"}, ensure_ascii=False,
                                     default=str)
        fields["awaits_response"] = True
    if kind != "text":
        # the system prompt is added last, because it raises `num_prompt` by 1
        fields |= parse_tools_and_kwargs(record.get("tools"), record.get("chat_template_kwargs"))
        fields |= _prepend_system(record, fields)
    if reading.bucket_by:
        fields["bucket"] = read_bucket(record, reading.bucket_by)
    fields["tags"] = read_tags(record, reading.tags)
    if reading.media:
        fields["media"] = _parse_media(record)
    fields["columns"] = read_columns(record, reading.columns, 2 if kind == "preference" else 1)
    id_ = record.get("id")
    document = Document(where, id=str(id_) if isinstance(id_, (str, int)) else None, line=number, **fields)
    check_texts(document.texts(), reading)
    if kind != "text":
        for text in (*document.conversation().extra_texts(), document.extra):
            count_text_bytes(text)  # raises for invalid text; these bytes are not counted
    return document


def list_kinds(record: Mapping[str, Any], text_field: str = "text") -> list[str]:
    """Return the kinds as which a converted record can be read, the likeliest first."""
    # the order matters: a preference also has a prompt, and a chat may also have a text
    present = {"preference": "chosen" in record and "rejected" in record,
               "chat": "messages" in record or "conversations" in record
               or ("prompt" in record and get_completion_field(record) is not None),
               "prompt": "prompt" in record and "chosen" not in record,
               "text": isinstance(record.get(text_field), str)}
    return [kind for kind, is_present in present.items() if is_present]


def _choose_kind(record: dict[str, Any], reading: RecordReading) -> str:
    """Return a record's kind; refuse a record whose kind differs from `reading.kind`."""
    kinds = list_kinds(record, reading.text_field)
    if reading.kind is None:
        if "chat" in kinds or "text" in kinds:
            return "chat" if "chat" in kinds else "text"
    elif reading.kind in kinds:
        return reading.kind
    elif kinds:
        raise _build_kind_fault(record, kinds[0], reading.kind)
    raise _build_missing_fault(record, reading)


def _build_kind_fault(record: dict[str, Any], kind: str, wanted: str) -> BadRecord:
    """Return the fault of a record of another kind than the `wanted` one."""
    # judged responses: chats would teach the bad responses too
    if kind == "chat" and parse_label(record.get(LABEL)) is not None:
        return BadRecord("fields", f"is a response with a {LABEL!r} (or {KTO_TAG!r})",
                         packing=f", but --format is {wanted}; turn such rows into pairs with "
                                 "`sov-data pairs`")
    has_completions = isinstance(record.get("completions"), list)
    addition = ""
    if kind == "prompt" and has_completions:
        addition = (": its 'completions' are not learned; steps with labels train reward models of steps, "
                    "which no command here trains")
    elif kind == "prompt" and wanted == "preference" and len(record) > 2:
        return BadRecord("fields", f"has no 'chosen' and 'rejected' (fields: {', '.join([*record][:8])}); "
                                   "pass --columns chosen=FIELD,rejected=FIELD to `sov-data pack --format "
                                   "preference`")
    elif kind == "prompt":
        addition = ": no response is learned then; a chat has 'messages', or 'prompt' and 'completion'"
    description = "plain text" if kind == "text" else f"a {kind}"
    return BadRecord("fields", f"is {description}", options=("--format", kind),
                     packing=f", but --format is {wanted}; pack it on its own with --format {kind}{addition}")


def _build_missing_fault(record: dict[str, Any], reading: RecordReading) -> BadRecord:
    """Return the fault of a record without the fields of any kind, with the columns that may be meant."""
    expected = {"text": f"string field {reading.text_field!r}",
                "chat": "'messages', 'conversations', or 'prompt' and 'completion'",
                "preference": "'chosen' and 'rejected'", "prompt": "'prompt'",
                None: f"string field {reading.text_field!r} and no 'messages'"}[reading.kind]
    fault = f"has no {expected} (fields: {', '.join(record) or 'none'})"
    if reading.kind is None or not record:
        return BadRecord("fields", f"{fault}; add one")
    if reading.kind == "chat" and (turns := describe_foreign_turns(record)):
        return BadRecord("fields", f"{fault}; {turns}")
    # `sov-data pack` and `rl` read prompts with the same option
    command = "sov-data pack " if reading.kind in ("chat", "preference") else ""
    proposed = propose_columns(record, reading.kind)
    return BadRecord("fields", fault, options=tuple(proposed.split()),
                     packing=f"; name yours with `{command}{proposed}`")


def find_table_problem(names: Iterable[str], reading: RecordReading) -> BadRecord | None:
    """Return why a table with `names` as columns cannot be read; None: readable."""
    try:
        record = rename_fields({name: _VALUES.get(name, "") for name in names}, reading.renames)
        _choose_kind(convert_layout(record, None), reading)
    except BadRecord as e:
        return e
    return None


def list_read_fields(reading: RecordReading) -> set[str]:
    """Return the field names that a reading uses, in any layout."""
    return {*DIALOGUE, *LAYOUT_FIELDS, "id", "chat_template_kwargs", NUM_PROMPT_FIELD, reading.bucket_by,
            *reading.columns, *reading.tags, *(name for _, sources in reading.renames for name in sources)}


def _parse_chat(record: dict[str, Any]) -> tuple[Messages, int]:
    """Return a chat's messages, and the number of prompt messages before a completion (not trained on)."""
    chat = next((name for name in ("messages", "conversations") if name in record), None)
    name = get_completion_field(record) or COMPLETIONS[0]
    if isinstance(record.get(LABEL), bool):
        raise BadRecord("fields", f"has a {LABEL!r} (or {KTO_TAG!r}), true or false, and a chat would learn "
                                  f"its {chat or name!r} either way; turn such rows into pairs with "
                                  "`sov-data pairs`")
    if chat is not None:
        parse = parse_messages if chat == "messages" else parse_sharegpt
        return parse(record[chat], chat), 0
    # TRL allows a string on a side and messages on the other side
    sides = []
    for field_name, role in (("prompt", "user"), (name, "assistant")):
        messages = record[field_name]
        if isinstance(messages, str):
            messages = [{"role": role, "content": messages}]
        sides.append(messages)
        if not isinstance(messages, list) or not messages:
            raise BadRecord("fields", f"{field_name!r} must be a string, or a non-empty list of messages")
    messages_read = parse_messages([*sides[0], *sides[1]], f"prompt + {name}")
    num_prompt = len(sides[0])
    if not any(m.role == "assistant" and m.is_learned for m in messages_read[num_prompt:]):
        raise BadRecord("fields", f"{name!r} holds no message of the assistant that is learned")
    prompt = (replace(message, is_learned=False) for message in messages_read[:num_prompt])
    return (*prompt, *messages_read[num_prompt:]), num_prompt


def _parse_num_prompt(record: dict[str, Any], num_messages: int) -> int:
    """Return how many shared prompt messages a chat declares; 0: not declared."""
    count = record.get(NUM_PROMPT_FIELD)
    if count is None:
        return 0
    # `type` instead of isinstance: bool is a subclass of int
    if type(count) is not int or not 0 < count < num_messages:
        raise BadRecord("fields", f"has {str(count)[:40]!r} in {NUM_PROMPT_FIELD!r}, must say how many of "
                                  f"the {num_messages} messages are the prompt: at least 1, and not all")
    return count


def _prepend_system(record: dict[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the messages with the record's field `system` in front; a system message takes precedence."""
    system, messages = record.get("system"), fields["messages"]
    if not isinstance(system, str) or not system.strip() or messages[0].role == "system":
        return {}
    num_prompt = fields.get("num_prompt", 0)
    if num_prompt:  # 0: the prompt is not shared
        num_prompt += 1
    return {"messages": (Message("system", system), *messages), "num_prompt": num_prompt}


def _parse_messages(value: Any, name: str, role: str) -> Messages:
    return (Message(role, value),) if isinstance(value, str) else parse_messages(value, name)


def _parse_media(record: dict[str, Any]) -> dict[str, tuple[tuple[int, int], ...]]:
    """Return bank -> (row, used slots) for a record in a media corpus."""
    value = record.get("media")
    try:
        if not isinstance(value, dict):
            raise TypeError("no object")
        rows_by_bank: dict[str, tuple[tuple[int, int], ...]] = {}
        for kind, rows in value.items():
            rows_by_bank[str(kind)] = tuple((row, used_slots) for row, used_slots in rows)
        numbers = [n for rows in rows_by_bank.values() for pair in rows for n in pair]
        if not all(type(n) is int and 0 <= n < 1 << 40 for n in numbers):
            raise ValueError("no whole numbers")
    except (TypeError, ValueError) as e:
        raise BadRecord("media_rows", f"has {str(value)[:80]!r} in 'media' ({e}), must be rows of banks; "
                                      "encode the media again") from None
    return rows_by_bank


def _parse_preference(record: dict[str, Any]) -> dict[str, Messages]:
    """Return prompt, chosen and rejected messages.

    If `prompt` is missing, or both sides repeat it, their common first messages form the prompt.
    """
    chosen, rejected = (_parse_messages(record[side], side, "assistant") for side in ("chosen", "rejected"))
    prompt = _parse_messages(record["prompt"], "prompt", "user") if record.get("prompt") is not None else ()
    shared = 0
    # each side keeps at least one message, even if both are equal
    while shared < min(len(chosen), len(rejected)) - 1 and chosen[shared] == rejected[shared]:
        shared += 1
    is_repeated = chosen[:len(prompt)] == prompt == rejected[:len(prompt)]
    # last case: `prompt` is a string that both sides repeat as messages
    if not prompt or is_repeated or (shared and isinstance(record["prompt"], str)):
        prompt, chosen, rejected = chosen[:shared], chosen[shared:], rejected[shared:]
    if not prompt:
        raise BadRecord("fields", "has no prompt: give 'prompt', or begin 'chosen' and 'rejected' with "
                                  "the same messages")
    if chosen == rejected:
        raise BadRecord("no_preference",
                        "has the same text as 'chosen' and as 'rejected'; there is nothing to prefer")
    if tied := _find_tied_scores(record):
        raise BadRecord("no_preference", f"has equal scores of both sides ({', '.join(tied)}); there is "
                                         "nothing to prefer")
    for side, messages in (("chosen", chosen), ("rejected", rejected)):
        if not any(m.role == "assistant" and m.is_learned for m in messages):
            raise BadRecord("fields", f"'{side}' holds no message of the assistant behind the prompt that is "
                                      "learned")
    return {"messages": prompt, "chosen": chosen, "rejected": rejected}


def _find_tied_scores(record: dict[str, Any]) -> list[str]:
    """Return a pair's scores as "field = value" if both sides have equal scores, else []."""
    tied_scores = []
    for name in filter(_SCORE.search, record):
        other = name.replace("chosen", "rejected")
        scores: tuple[Any, Any] = (record[name], record.get(other))
        if other == name or not all(type(score) in (int, float) for score in scores):
            continue
        if not are_equal(scores):
            return []
        tied_scores.append(f"{name!r} = {scores[0]:g}")
    return tied_scores


def check_texts(texts: tuple[str, ...], reading: RecordReading) -> None:
    """Raise `BadRecord` if a document's texts are too long, contain invalid characters, or are blank."""
    size_bytes = 0
    for text in texts:
        size_bytes += count_text_bytes(text)
    if size_bytes > reading.max_document_bytes:
        raise create_length_error(reading)
    if not any(text.strip() for text in texts):
        raise BadRecord("empty", "holds no text")


def count_text_bytes(text: str) -> int:
    """Return the UTF-8 bytes of a text. Raises `BadRecord`: a lone surrogate, which no tokenizer accepts."""
    if text.isascii():  # Python stores whether a text is: no character is read
        return len(text)
    try:
        return len(text.encode())
    except UnicodeEncodeError:
        raise BadRecord("utf8", "holds half of a surrogate pair (an escape such as \\ud800), "
                                "which is no character; remove it") from None


def create_length_error(reading: RecordReading) -> BadRecord:
    return BadRecord("too_long", f"is longer than --max-document-bytes {reading.max_document_bytes}; "
                                 "cut it, or raise the limit")
