"""JSON in what a model wrote."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_prep.json_lines import read_objects
from data_prep.synth.generator import GeneratorItem
from data_prep.synth.replies import Reply
from megatron_sov.base.documents.messages import BadRecord, refuse_deep
from megatron_sov.base.errors import UserError
from megatron_sov.judge.rewards.patterns import NO_JSON, json_of
from megatron_sov.judge.rewards.reward import Refused

ID_CHARS = 16
KEPT = "kept.jsonl"
"""File of a finished synthesis that the next generator starts from."""


def object_in(reply: Reply) -> dict[str, Any] | str:
    """Return the JSON object of an answer, with or without words around it, or why there is none."""
    if reply.is_cut:
        return "the answer was cut off at its limit of tokens"
    # models put words around what they were asked for
    begin, end = reply.text.find("{"), reply.text.rfind("}")
    try:
        found = json_of(reply.text)
        if found is NO_JSON and 0 <= begin < end:
            found = json_of(reply.text[begin:end + 1])
        if found is not NO_JSON:
            refuse_deep(found)
            # what the journal could not hold must fail here
            json.dumps(found, ensure_ascii=False, allow_nan=False).encode()
    except (BadRecord, Refused, ValueError, RecursionError) as e:
        return f"the answer holds no JSON that can be kept ({str(e)[:100]})"
    return found if isinstance(found, dict) else "the answer is no JSON object"


def written(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def items_of(inputs: Sequence[Path], needs: str, what: str) -> list[GeneratorItem]:
    """Return the records of files in JSON lines, or of finished synthesis, as items.

    Args:
        inputs: files, or output folders of the generator before.
        needs: field that each record must have.
        what: description of a record, for the sentence.

    Raises:
        UserError: a file cannot be read, or a line is something else.
    """
    found: dict[str, GeneratorItem] = {}
    for path in inputs:
        file = path / KEPT if path.is_dir() else path
        for where, record in read_objects(file):
            if needs not in record:
                raise UserError(f"{where}: has no {needs!r}; each line is {what}")
            # not part of the record's content, and not of its id
            origin = record.pop("synthetic", None)
            origin = origin if isinstance(origin, dict) else {}
            own = record.pop("id", None)
            item = GeneratorItem(_id_of(own, record), record, str(origin.get("source") or file.stem),
                                 str(origin.get("licence") or ""))
            if found.setdefault(item.id, item).fields != item.fields:
                raise UserError(f"{where}: has the id {item.id!r} of an earlier line, which is another "
                                "record; give each an id of its own")
    return list(found.values())


def _id_of(own: Any, record: Any) -> str:
    if isinstance(own, str) and re.fullmatch(r"[A-Za-z0-9:._/-]{1,150}", own):
        return own
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()[:ID_CHARS]
