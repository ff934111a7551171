"""Scorers for OpenAI-MRCR and HotpotQA, and rows for rewards from IFEval's and LiveCodeBench's data.

LiveCodeBench packs hidden tests as base64 of zlib of a pickled JSON text. Nothing is unpickled here: the
pickle is read opcode by opcode, and anything but a single text is refused. """

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

MAX_BYTES = 1 << 30
"""Largest unpacked tests of a problem."""
_TEXT_OPCODES = frozenset(("SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "UNICODE"))
_FRAME_OPCODES = frozenset(("PROTO", "FRAME", "MEMOIZE", "PUT", "BINPUT", "LONG_BINPUT", "STOP"))


class MrcrScorer:
    """OpenAI-MRCR: similarity to a text that the model has to repeat after a given prefix.

    Ratio from Python's difflib, as in openai/mrcr (`grade`).
    """

    def score(self, row: Row) -> Score:
        """Score `response` against `answer`; 0 if the response does not begin with `prefix`. Raises
        `Refused`: the row has no `prefix` or `answer`."""
        response = unquote_marks(get_text(row, "response"))
        answer, prefix = get_text(row, "answer"), get_text(row, "prefix")
        if not response.startswith(prefix):
            return Score(0.0, {"prefix": False})
        ratio = SequenceMatcher(None, response.removeprefix(prefix), answer.removeprefix(prefix)).ratio()
        return Score(ratio, {"prefix": True})


@dataclass(frozen=True)
class ShortAnswerScorer:
    """HotpotQA: F1 or equality of words, as in hotpotqa/hotpot (hotpot_evaluate_v1.py).

    Case, punctuation and articles do not count; `yes`, `no` and `noanswer` are right or wrong as a whole.
    """

    exact: bool = False
    """Require equal words instead of F1."""

    def score(self, row: Row) -> Score:
        """Score `response` against `answer`. Raises `Refused`: the row has no `answer`."""
        response, answer = (_normalize_answer(get_text(row, name)) for name in ("response", "answer"))
        if self.exact or (response != answer and {response, answer} & {"yes", "no", "noanswer"}):
            return Score(float(response == answer), {"extracted": response})
        words, answer_words = Counter(response.split()), Counter(answer.split())
        shared = (words & answer_words).total()
        total = words.total() + answer_words.total()
        return Score(2 * shared / total if shared else 0.0, {"extracted": response})


def _normalize_answer(answer: str) -> str:
    text = "".join(c for c in answer.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


SCORERS: dict[str, type[Any]] = {"mrcr": MrcrScorer, "short-answer": ShortAnswerScorer}
"""Scorers that are no rewards for training."""


def _build_instructions(doc: Mapping[str, Any]) -> dict[str, Any]:
    """Return IFEval's and IFBench's columns, which CSV files hold as JSON."""
    return {name: json.loads(value) if isinstance(value := doc[name], str) else value
            for name in ("instruction_id_list", "kwargs") if name in doc}


def build_code_tests(doc: Mapping[str, Any]) -> dict[str, Any]:
    """Return a LiveCodeBench problem's `tests` for the reward `code`. Raises `Refused`: unreadable tests."""
    tests = [*_read_tests(doc, "public_test_cases"), *_read_tests(doc, "private_test_cases")]
    if not tests:
        raise Refused("the problem has no tests")
    metadata = _parse_json(doc.get("metadata") or "{}", "metadata")
    if not isinstance(metadata, dict):
        raise Refused("metadata must be a JSON object")
    return {"tests": [_convert_test(test, metadata.get("func_name")) for test in tests]}


def _read_tests(doc: Mapping[str, Any], field: str) -> list[Any]:
    value = doc.get(field) or "[]"
    if not isinstance(value, str):
        raise Refused(f"{field} must be text that is JSON, as the publisher has it")
    tests = _parse_json(value if value.lstrip().startswith("[") else unpack_tests(value, field), field)
    if not isinstance(tests, list):
        raise Refused(f"{field} must be a list of tests")
    return tests


def unpack_tests(value: str, field: str) -> str:
    """Decode base64, zlib and a pickled text. Raises `Refused`: another format, more than `MAX_BYTES`, or a
    pickle with anything but a text."""
    try:
        stream = zlib.decompressobj()
        # bounded: a small text may unpack to more than the memory
        raw = stream.decompress(base64.b64decode(value, validate=True), MAX_BYTES)
    except (binascii.Error, ValueError, zlib.error) as e:
        raise Refused(f"{field} is neither JSON nor packed as the publisher packs it ({e})") from None
    if stream.unconsumed_tail or not stream.eof:
        raise Refused(f"{field} is cut off, or larger than {MAX_BYTES >> 20} MiB unpacked")
    texts = []
    try:
        for opcode, argument, _ in pickletools.genops(raw):
            # read, never executed: a pickle is a program
            if opcode.name in _TEXT_OPCODES:
                texts.append(argument)
            elif opcode.name not in _FRAME_OPCODES:
                raise Refused(f"{field} holds a pickle with {opcode.name}; only a single text is read, and "
                              "nothing is ever unpickled")
    except (ValueError, IndexError, KeyError) as e:
        raise Refused(f"{field} holds an incomplete pickle ({e})") from None
    if len(texts) != 1 or not isinstance(texts[0], str):
        raise Refused(f"{field} holds a pickle of {len(texts)} texts; it must be one")
    return texts[0]


def _parse_json(text: str, field: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError, TypeError) as e:
        raise Refused(f"{field} is no JSON ({str(e)[:120]})") from None


def _convert_test(test: Any, name: Any) -> dict[str, Any]:
    """Return a test as input and expected output, or as a call to the solution's method `name`."""
    if not isinstance(test, dict) or not all(isinstance(test.get(key), str) for key in ("input", "output")):
        raise Refused(f"test {format_short(test)} must have the texts input and output")
    kind = test.get("testtype", "functional" if name else "stdin")
    if kind == "stdin":
        return {"stdin": test["input"], "stdout": test["output"]}
    if kind != "functional" or not isinstance(name, str):
        raise Refused(f"testtype = {format_short(kind)} with func_name = {format_short(name)}; it must be "
                      "stdin, or functional with a name")
    # an argument per line, as in the publisher's runner
    arguments = [_parse_value(line) for line in test["input"].split("\n") if line.strip()]
    expected = _parse_value(test["output"])
    return {"function": f"Solution().{name}", "arguments": arguments, "expected": expected}


def _parse_value(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        try:
            return ast.literal_eval(text.strip())
        except (ValueError, SyntaxError, RecursionError, MemoryError, TypeError):
            raise Refused(f"{format_short(text)} is no value for a function call") from None


ROW_MAKERS: dict[str, Callable[[Mapping[str, Any]], dict[str, Any]]] = {
    "instructions": _build_instructions, "livecodebench": build_code_tests}
"""Name -> function from an item's data to a reward's fields."""
