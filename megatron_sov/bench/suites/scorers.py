"""Scorers that belong to one benchmark and are no reward of training, and fields of rewards that are no copy
of a field of the data.

LiveCodeBench's hidden tests are base64 of zlib of a pickled text that is JSON.  Nothing is unpickled here:
the pickle is read opcode by opcode, and one that holds anything but a single text is refused.
"""

from __future__ import annotations

import ast
import base64
import binascii
import json
import pickletools
import re
import string
import zlib
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Any

from megatron_sov.chat.marks import unquote_marks
from megatron_sov.judge.rewards.reward import Refused, Row, Score, format_short, get_text


class Copied:
    """OpenAI-MRCR: how much of the answer is said again, word for word, behind a mark that was asked for.

    The ratio of Python's difflib, as the data's publisher computes it (openai/mrcr, `grade` of its page).
    """

    def score(self, row: Row) -> Score:
        """Return 0 where the response does not begin with the row's `prefix`, else the ratio of what stands
        behind it and behind the prefix of the `answer`.

        Raises:
            Refused: the row has no prefix or answer.
        """
        response = unquote_marks(get_text(row, "response"))
        answer, prefix = get_text(row, "answer"), get_text(row, "prefix")
        if not response.startswith(prefix):
            return Score(0.0, {"prefix": False})
        ratio = SequenceMatcher(None, response.removeprefix(prefix), answer.removeprefix(prefix)).ratio()
        return Score(ratio, {"prefix": True})


@dataclass(frozen=True)
class ShortAnswer:
    """HotpotQA: how many words an answer shares with the known one.

    As in the data's own script (hotpotqa/hotpot, hotpot_evaluate_v1.py): case, punctuation and articles do
    not count, and `yes`, `no` and `noanswer` are right or wrong as a whole.
    """

    exact: bool = False
    """Whether all words have to be the same; else their F1 counts."""

    def score(self, row: Row) -> Score:
        """Return F1 or equality.

        Raises:
            Refused: the row has no answer.
        """
        said, known = (_plain(get_text(row, name)) for name in ("response", "answer"))
        if self.exact or (said != known and {said, known} & {"yes", "no", "noanswer"}):
            return Score(float(said == known), {"extracted": said})
        words, known_words = Counter(said.split()), Counter(known.split())
        shared = (words & known_words).total()
        total = words.total() + known_words.total()
        return Score(2 * shared / total if shared else 0.0, {"extracted": said})


def _plain(answer: str) -> str:
    text = "".join(c for c in answer.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


SCORERS: dict[str, type[Any]] = {"mrcr": Copied, "short-answer": ShortAnswer}
"""Name -> scorer."""


def _instructions(doc: Mapping[str, Any]) -> dict[str, Any]:
    """IFEval's and IFBench's columns; a table has every argument of any instruction, empty for most."""
    return {name: json.loads(value) if isinstance(value := doc[name], str) else value
            for name in ("instruction_id_list", "kwargs") if name in doc}


MAX_BYTES = 1 << 30
"""Of the tests of one problem, unpacked."""
_TEXTS = frozenset(("SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "UNICODE"))
_AROUND = frozenset(("PROTO", "FRAME", "MEMOIZE", "PUT", "BINPUT", "LONG_BINPUT", "STOP"))


def code_row(doc: Mapping[str, Any]) -> dict[str, Any]:
    """Return the field `tests` of a problem, as the reward `code` reads it.

    Raises:
        Refused: the tests cannot be read.
    """
    tests = [*_tests(doc, "public_test_cases"), *_tests(doc, "private_test_cases")]
    if not tests:
        raise Refused("the problem has no tests")
    metadata = _json(doc.get("metadata") or "{}", "metadata")
    if not isinstance(metadata, dict):
        raise Refused("metadata must be a JSON object")
    return {"tests": [_test(test, metadata.get("func_name")) for test in tests]}


def _tests(doc: Mapping[str, Any], field: str) -> list[Any]:
    value = doc.get(field) or "[]"
    if not isinstance(value, str):
        raise Refused(f"{field} must be text that is JSON, as the publisher has it")
    found = _json(value if value.lstrip().startswith("[") else unpacked(value, field), field)
    if not isinstance(found, list):
        raise Refused(f"{field} must be a list of tests")
    return found


def unpacked(value: str, field: str) -> str:
    """Return the text that is packed in base64, zlib and a pickle.

    Raises:
        Refused: it is packed otherwise, larger than `MAX_BYTES`, or the pickle is more than a text.
    """
    try:
        stream = zlib.decompressobj()
        # Bounded: a small text may unpack to more than there is memory.
        raw = stream.decompress(base64.b64decode(value, validate=True), MAX_BYTES)
    except (binascii.Error, ValueError, zlib.error) as e:
        raise Refused(f"{field} is neither JSON nor packed as the publisher packs it ({e})") from None
    if stream.unconsumed_tail or not stream.eof:
        raise Refused(f"{field} is cut off, or larger than {MAX_BYTES >> 20} MiB unpacked")
    texts = []
    try:
        for opcode, argument, _ in pickletools.genops(raw):
            # Read opcode by opcode, and never executed: a pickle is a program.
            if opcode.name in _TEXTS:
                texts.append(argument)
            elif opcode.name not in _AROUND:
                raise Refused(f"{field} holds a pickle with {opcode.name}; one of a single text is read, and "
                              "nothing is ever unpickled")
    except (ValueError, IndexError, KeyError) as e:
        raise Refused(f"{field} holds no whole pickle ({e})") from None
    if len(texts) != 1 or not isinstance(texts[0], str):
        raise Refused(f"{field} holds a pickle of {len(texts)} texts; it must be one")
    return texts[0]


def _json(text: str, field: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError, TypeError) as e:
        raise Refused(f"{field} is no JSON ({str(e)[:120]})") from None


def _test(test: Any, name: Any) -> dict[str, Any]:
    """Return a test as an input with what has to be printed, or as a call of the solution's method."""
    if not isinstance(test, dict) or not all(isinstance(test.get(key), str) for key in ("input", "output")):
        raise Refused(f"test {format_short(test)} must have the texts input and output")
    kind = test.get("testtype", "functional" if name else "stdin")
    if kind == "stdin":
        return {"stdin": test["input"], "stdout": test["output"]}
    if kind != "functional" or not isinstance(name, str):
        raise Refused(f"testtype = {format_short(kind)} with func_name = {format_short(name)}; it must be "
                      "stdin, or functional with a name")
    # each line is one argument, as the publisher's runner reads them
    arguments = [_value(line) for line in test["input"].split("\n") if line.strip()]
    return {"function": f"Solution().{name}", "arguments": arguments, "expected": _value(test["output"])}


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        try:
            return ast.literal_eval(text.strip())
        except (ValueError, SyntaxError, RecursionError, MemoryError, TypeError):
            raise Refused(f"{format_short(text)} is no value that a test can be called with") from None


ROW_MAKERS: dict[str, Callable[[Mapping[str, Any]], dict[str, Any]]] = {
    "instructions": _instructions, "livecodebench": code_row}
"""Name -> what makes fields of a row from an item's data."""
