"""Record layouts (`LAYOUTS`), their conversion to `Document` fields, and renamed fields (`--columns`)."""

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from megatron_sov.base.documents.messages import EMPTY_VALUES, BadRecord, convert_sharegpt
from megatron_sov.base.errors import Fix, UserError
from megatron_sov.base.hints.table import load_table

KINDS = ("text", "chat", "preference", "prompt")
COMPLETIONS = ("completion", "response")
"""Field names for the response to a `prompt`; the first name is TRL's."""
LABEL = "label"
"""Field for a judged response: true for a good response."""
KTO_TAG = "kto_tag"
"""LLaMA-Factory's name for `LABEL`."""
LABEL_WORDS = {"true": True, "false": False, "yes": True, "no": False, "1": True, "0": False}
"""Spelling of a `LABEL` value in lower case -> label."""
ALPACA = ("instruction", "input", "output", "system", "history")
"""Fields of an Alpaca record: a question in two parts, its answer, system prompt and earlier turns."""
DOLLY = {"context": "input", "response": "output"}
"""Dolly's names -> Alpaca's names."""
QUESTIONS = ("question", "answer")
"""Fields in GSM8K and many other datasets."""
CHATS = ("messages", "conversations")
"""Fields that hold a list of messages: OpenAI's and ShareGPT's name."""
SIDES = ("chosen", "rejected")
"""Fields with the better and the worse response of a preference pair."""
MEDIA = ("images", "image", "videos", "video", "audios", "audio")
"""Fields in which other tools store media next to a text with references."""
LAYOUT_FIELDS = (*ALPACA, *DOLLY, *QUESTIONS, *MEDIA, KTO_TAG, LABEL)
"""Fields that determine a record's layout, in addition to message fields."""
_TURN = re.compile(r"(?:\A|\n)\n?(Human|Assistant): ?")
TARGETS = ("prompt", "response", "completion", "messages", "conversations", "chosen", "rejected", "system",
           "tools", "label")
"""Fields that `--columns` can assign."""
Renames = tuple[tuple[str, tuple[str, ...]], ...]
"""(target field, the record's fields that are joined)."""
_NEEDED = {"chat": ("prompt", "response"), "preference": ("chosen", "rejected", "prompt"),
           "prompt": ("prompt",), "text": ("text",)}
"""Kind -> targets that a record needs; a chat may have "messages" instead."""


def parse_label(value: Any) -> bool | None:
    """Parse a boolean, a number or a text in `LABEL_WORDS`; None: not a label."""
    if not isinstance(value, (bool, int, float, str)):
        return None
    word = str(value).strip().lower().removesuffix(".0")  # the number 1.0 is the label "1"
    return LABEL_WORDS.get(word)


def split_response(record: dict[str, Any]) -> dict[str, Any]:
    """Split a judged chat into prompt and completion (the last message); other records stay unchanged."""
    chat = _find_chat_field(record)
    if chat is None or "prompt" in record or LABEL not in record:
        return record
    messages = convert_sharegpt(record[chat], chat)
    return {"prompt": messages[:-1], "completion": messages[-1:], **_omit_fields(record, (chat,))}


def refuse_media(record: Mapping[str, Any], is_prompt: bool) -> None:
    """Raise `BadRecord` for media next to a text, which packing would drop: a non-empty field of `MEDIA`."""
    # a prompt's string may be a file name that the reward reads
    media_types = (list, dict, bytes) if is_prompt else (list, dict, bytes, str)
    for name in MEDIA:
        value = record.get(name)
        if value and isinstance(value, media_types):
            raise BadRecord("media", f"has {name!r}, and what is packed here is text; turn such records into "
                                     "tokens with `sov-data encode-media` first, or remove the field")


def _find_chat_field(record: Mapping[str, Any]) -> str | None:
    return next((name for name in CHATS if isinstance(record.get(name), list) and record[name]), None)


def _omit_fields(record: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    return {name: value for name, value in record.items() if name not in names}


def get_completion_field(record: Mapping[str, Any]) -> str | None:
    """Return the name of the field that answers a record's `prompt`; None: no such field."""
    return next((name for name in COMPLETIONS if record.get(name) is not None), None)


# The functions below are `applies` and `convert` of a `RecordLayout`, and take (record, kind). Kind "prompt"
# is a task for reinforcement learning: the reward reads the fields next to the prompt (an answer, a label),
# so conversions leave them in the record.


def is_alpaca(record: Mapping[str, Any], kind: str | None) -> bool:
    """Return whether a record is Alpaca's or Dolly's: an instruction with input, answer or pair."""
    if "instruction" not in record or {"prompt", *CHATS} & record.keys():
        return False
    has_pair = {*SIDES} <= record.keys()
    return has_pair or bool({"input", "output", "response"} & record.keys())


def _from_alpaca(record: dict[str, Any], kind: str | None) -> dict[str, Any]:
    """Convert a record of Alpaca or Dolly to messages, a prompt, or a prompt with its completion."""
    if not {"input", "output"} & record.keys():
        record = {DOLLY.get(name, name): value for name, value in record.items()}  # rename Dolly's fields
    for name in ("instruction", "input", "output"):
        if record.get(name) is not None and not isinstance(record[name], str):
            raise BadRecord("fields", f"{name!r} is {str(record[name])[:40]!r}, must be a string")
    # joined as in LLaMA-Factory
    question = "\n".join(part for part in (record["instruction"], record.get("input")) if part)
    history: list[dict[str, Any]] = []
    for i, pair in enumerate(record.get("history") or []):
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise BadRecord("fields", f"history[{i}] is {str(pair)[:40]!r}, must be a question and its "
                                      "answer")
        history += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    prompt = [*history, {"role": "user", "content": question}]
    if record.get("output") is None or kind == "prompt":
        return {"prompt": prompt, **_omit_fields(record, ("instruction", "input", "history"))}
    fields = _omit_fields(record, ("instruction", "input", "output", "history"))
    is_judged = parse_label(record.get(KTO_TAG)) is not None  # the label concerns the last answer only
    if history and kind == "chat" and not is_judged:  # as messages: the history's answers are trained too
        return {"messages": [*prompt, {"role": "assistant", "content": record["output"]}], **fields}
    return {"prompt": prompt, "completion": record["output"], **fields}


def _is_questions(record: Mapping[str, Any], kind: str | None) -> bool:
    if not isinstance(record.get("question"), str) or {"prompt", *CHATS} & record.keys():
        return False
    return kind == "prompt" or isinstance(record.get("answer"), str) or {*SIDES} <= record.keys()


def _from_questions(record: dict[str, Any], kind: str | None) -> dict[str, Any]:
    prompt = {"prompt": record["question"], **_omit_fields(record, ("question",))}
    if kind == "prompt" or {*SIDES} <= record.keys():
        return prompt
    return {"completion": record["answer"], **_omit_fields(prompt, ("answer",))}


def _is_tagged(record: Mapping[str, Any], kind: str | None) -> bool:
    # judged responses are read as "preference", and an unreadable tag must be refused: it becomes a label too
    if kind == "preference" and KTO_TAG in record:
        return True
    return kind != "prompt" and parse_label(record.get(KTO_TAG)) is not None


def _from_tagged(record: dict[str, Any], kind: str | None) -> dict[str, Any]:
    label = parse_label(record[KTO_TAG])
    return {LABEL: record[KTO_TAG] if label is None else label, **_omit_fields(record, (KTO_TAG,))}


def _is_sharegpt_pair(record: Mapping[str, Any], kind: str | None) -> bool:
    return (kind is not None and _find_chat_field(record) is not None
            and all(isinstance(record.get(side), dict) for side in SIDES))


def _from_sharegpt_pair(record: dict[str, Any], kind: str | None) -> dict[str, Any]:
    chat = _find_chat_field(record)
    assert chat is not None, "_is_sharegpt_pair requires a chat"
    sides = {side: convert_sharegpt([record[side]], side) for side in SIDES}
    return {"prompt": convert_sharegpt(record[chat], chat), **sides,
            **_omit_fields(record, (chat, "prompt", *SIDES))}


def _is_transcript_pair(record: Mapping[str, Any], kind: str | None) -> bool:
    return "prompt" not in record and all(
        isinstance(record.get(side), str) and record[side].lstrip().startswith("Human:") for side in SIDES)


def _from_transcript_pair(record: dict[str, Any], kind: str | None) -> dict[str, Any]:
    roles, sides = {"Human": "user", "Assistant": "assistant"}, dict[str, Any]()
    for side in SIDES:
        _, *parts = _TURN.split(record[side].lstrip())
        sides[side] = [{"role": roles[speaker], "content": content.strip()}
                       for speaker, content in zip(parts[::2], parts[1::2], strict=True)]
    return record | sides


@dataclass(frozen=True)
class RecordLayout:
    """A set of fields in which programs write records, and its conversion."""

    name: str
    """Layout name, and programs that write the layout."""
    fields: tuple[str, ...]
    """Fields that identify the layout."""
    reader: str
    """A `--format` for `sov-data pack`, or another command that reads the layout."""
    applies: Callable[[Mapping[str, Any], str | None], bool] | None = None
    """Whether a record read as a kind has the layout; None: a layout that needs no conversion."""
    convert: Callable[[dict[str, Any], str | None], dict[str, Any]] | None = None
    """Converts a record to a layout that `records.py` parses; called if `applies`."""


LAYOUTS = (
    RecordLayout("Text", ("text",), "--format text"),
    RecordLayout("Messages (OpenAI, TRL)", ("messages",), "--format chat"),
    RecordLayout("ShareGPT", ("conversations",), "--format chat"),
    RecordLayout("Prompt and completion (TRL)", ("prompt", "completion"), "--format chat"),
    RecordLayout("Prompt and response", ("prompt", "response"), "--format chat"),
    # conversions run in this order: later ones add a label or a pair to the prompts that earlier ones write
    RecordLayout("Alpaca", ("instruction", "input", "output"), "--format chat", is_alpaca, _from_alpaca),
    RecordLayout("Dolly", ("instruction", "context", "response"), "--format chat", is_alpaca, _from_alpaca),
    RecordLayout("Question and answer (GSM8K)", ("question", "answer"), "--format chat", _is_questions,
                 _from_questions),
    RecordLayout("Judged responses (TRL's KTO)", ("prompt", "completion", "label"), "sov-data pairs"),
    RecordLayout("Judged responses (LLaMA-Factory)", ("conversations", "kto_tag"), "sov-data pairs",
                 _is_tagged, _from_tagged),
    RecordLayout("Pairs (TRL)", ("prompt", "chosen", "rejected"), "--format preference"),
    RecordLayout("Whole-chat pairs (TRL)", ("chosen", "rejected"), "--format preference"),
    RecordLayout("Transcript pairs (hh-rlhf)", ("chosen", "rejected"), "--format preference",
                 _is_transcript_pair, _from_transcript_pair),
    RecordLayout("Alpaca pairs", ("instruction", "chosen", "rejected"), "--format preference", is_alpaca,
                 _from_alpaca),
    RecordLayout("ShareGPT pairs", ("conversations", "chosen", "rejected"), "--format preference",
                 _is_sharegpt_pair, _from_sharegpt_pair),
    RecordLayout("Pairs with a question", ("question", "chosen", "rejected"), "--format preference",
                 _is_questions, _from_questions),
    RecordLayout("Prompts", ("prompt",), "--format prompt"),
)
"""The known layouts; conversions run in table order, and after a conversion its `applies` is false."""


def convert_layout(record: dict[str, Any], kind: str | None) -> dict[str, Any]:
    """Convert a record in any known layout to a layout that `records` parses.

    Args:
        record: the record; one in our own layout stays unchanged.
        kind: one of `KINDS`; None: depends on the record's fields.

    Raises:
        BadRecord: a field of the layout has a wrong type.
    """
    for layout in LAYOUTS:
        if layout.applies is not None and layout.convert is not None and layout.applies(record, kind):
            record = layout.convert(record, kind)
    return record


def parse_renames(arguments: Iterable[str], targets: Collection[str] = TARGETS) -> Renames:
    """Parse `TARGET=FIELD[+FIELD],...` with any of `targets`, or any target if `targets` is empty. Raises
    `UserError`: malformed argument, or unknown or repeated target."""
    renames: dict[str, tuple[str, ...]] = {}
    for argument in arguments:
        for part in argument.split(","):
            target, equals, fields = part.strip().partition("=")
            sources = tuple(name.strip() for name in fields.split("+"))
            where = f"--columns {argument}"
            if target == "text" and targets:
                raise UserError(f"{where}: the field of a text is named by --text-field {fields or 'NAME'}")
            if not equals or not target or not all(sources):
                raise UserError(f"{where}: {part!r} must be TARGET=FIELD, e.g. prompt=instruction")
            if targets and target not in targets:
                turned = ",".join(text if text.partition("=")[0].strip() in targets else
                                  "=".join(reversed(text.split("=", 1))) for text in argument.split(","))
                raise UserError(f"{where}: {target!r} is not a field of records; choose from "
                                f"{', '.join(targets)}",
                                Fix(words={argument: turned}) if fields in targets else None)
            if target in renames:
                raise UserError(f"{where}: {target!r} is named twice; join fields with '+', e.g. "
                                f"{target}={'+'.join((*renames[target], *sources))}")
            renames[target] = sources
    return tuple(renames.items())


def rename_fields(record: dict[str, Any], renames: Renames) -> dict[str, Any]:
    """Rename a record's fields by `--columns`; several fields for a target are joined by line feeds. Raises
    `BadRecord`: a field is missing, or a field to be joined is not text."""
    renamed_fields = {name for _, sources in renames for name in sources}
    renamed = {name: value for name, value in record.items() if name not in renamed_fields}
    for target, sources in renames:
        for name in sources:  # a.b: field b of the object in field a
            outer, _, inner = name.partition(".")
            if name not in record and isinstance(record.get(outer), dict) and inner in record[outer]:
                record = {**record, name: record[outer][inner]}
        if missing := [name for name in sources if name not in record]:
            raise BadRecord("fields", f"has no field {missing[0]!r}, which --columns names "
                                      f"(fields: {', '.join(record) or 'none'})")
        if len(sources) == 1:
            renamed[target] = record[sources[0]]
            continue
        if not_text := [name for name in sources if not isinstance(record[name], str | None)]:
            name = not_text[0]
            raise BadRecord("fields", f"has {str(record[name])[:40]!r} in field {name!r}, must be a "
                                      "string to be joined by --columns")
        renamed[target] = "\n".join(filter(None, (record[name] for name in sources)))
    return renamed


def unread_fields(record: dict[str, Any], kind: str, renames: Renames, read: Collection[str]) -> list[str]:
    """Return a record's non-empty fields that do not enter the document, in record order. Raises `BadRecord`.

    Args:
        record: the record as in the file.
        kind: one of `KINDS`.
        renames: renames from `--columns`.
        read: fields that the reader of `kind` uses.
    """
    converted = convert_layout(rename_fields(record, renames), kind)
    # a conversion renames the fields of other tools: with the old name a field is unread, even if `read` has
    # the name. "system" and `COMPLETIONS` keep their names in a conversion.
    foreign = {*ALPACA, *DOLLY, *QUESTIONS, KTO_TAG} - {"system", *COMPLETIONS}
    used = {*read} - foreign
    unread = converted.keys() - used
    return [name for name, value in record.items() if name in unread and value not in EMPTY_VALUES]


def propose_field(record: Mapping[str, Any], target: str) -> str:
    """Return the field whose name contains a word of the row `target` of the table `record_fields`: the word
    that comes first there, then the shortest name; "": no such field."""
    row = load_table()["record_fields"].get(target, ())
    candidates: list[tuple[int, int, str]] = []
    inner = [f"{name}.{key}" for name, value in record.items() if isinstance(value, dict) for key in value]
    for name in (*record, *inner):
        snake_case = re.sub("(?<=[a-z])(?=[A-Z])", "_", name).lower()  # userPrompt -> user_prompt
        words = re.findall("[a-z]+", snake_case)
        candidates += [(rank, len(name), name) for rank, word in enumerate(row) if word in words]
    return min(candidates)[2] if candidates else ""


def describe_foreign_turns(record: Mapping[str, Any]) -> str:
    """Return the fault and fix of a chat whose turns have unknown keys, which `--columns` cannot rename; "":
    the record has no such chat."""
    for name, value in record.items():
        turn = value[0] if isinstance(value, list) and value else None
        if isinstance(turn, Mapping) and not {"role", "from", "content", "value"} & turn.keys():
            keys = " and ".join(map(repr, list(turn)[:2]))
            return (f"{name!r} is a list of turns with {keys}, which --columns cannot name: write each turn "
                    "as {'role': 'user' or 'assistant', 'content': TEXT}, and the list under 'messages'")
    return ""


def propose_columns(record: Mapping[str, Any], kind: str) -> str:
    """Suggest an option that maps a record of an unknown layout to our fields, guessing from field names."""
    guesses: dict[str, str] = {}
    values = {name: value for name, value in record.items() if isinstance(value, (str, list))}
    targets = ("messages", *_NEEDED[kind]) if kind == "chat" else _NEEDED[kind]
    for target in targets:
        candidates = {name: value for name, value in values.items() if name not in guesses.values()}
        if target == "messages":  # a list, or "" if only a table's column names are known
            candidates = {name: value for name, value in candidates.items()
                          if isinstance(value, list) or value == ""}
        if near := propose_field(candidates, target):
            guesses[target] = near
    if "messages" in guesses:
        guesses = {"messages": guesses["messages"]}
    elif not guesses.keys() >= {*_NEEDED[kind]}:  # unknown field names: guess from the field order
        texts = [name for name, value in values.items() if isinstance(value, str)]
        # a prompt precedes its response in most files, but chosen and rejected have no usual order
        has_usual_order = kind != "preference" and len(texts) == len(_NEEDED[kind])
        guesses = dict(zip(_NEEDED[kind], texts, strict=True)) if has_usual_order else {}
        if kind == "text" and texts:
            guesses["text"] = max(texts, key=lambda name: len(values[name]))
    if kind == "text":
        return f"--text-field {guesses.get('text', 'NAME')}"
    columns = guesses or dict.fromkeys(_NEEDED[kind], "FIELD")
    # the prompt first, then in the order of the table
    ordered = [name for name in dict.fromkeys(("prompt", *load_table()["record_fields"])) if name in columns]
    return "--columns " + ",".join(f"{target}={columns[target]}" for target in ordered)
