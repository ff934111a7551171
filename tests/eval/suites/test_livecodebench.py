"""LiveCodeBench's packed tests: read as what they are, and never unpickled."""

from __future__ import annotations

import base64
import json
import os
import pickle
import zlib
from pathlib import Path
from typing import Any

import pytest
from suite_items import packed

from megatron_sov.eval.suites import livecodebench
from megatron_sov.eval.suites.folding import code_row, unpacked
from megatron_sov.rewards.reward import Refused

CALLED = [{"input": '[1, 2]\n"a"', "output": "true", "testtype": "functional"}]
PRINTED = [{"input": "1 2\n", "output": "3\n", "testtype": "stdin"}]


def as_published(value: Any, protocol: int) -> str:
    return base64.b64encode(zlib.compress(pickle.dumps(value, protocol))).decode()


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickled_text_is_read_in_every_protocol(protocol: int) -> None:
    text = json.dumps(CALLED) + " " * 70_000 + "가"
    assert unpacked(as_published(text, protocol), "f") == text
    assert unpacked(packed("[]"), "f") == "[]"


def test_tests_become_calls_or_inputs() -> None:
    doc = {"public_test_cases": json.dumps(CALLED), "private_test_cases": packed(json.dumps(CALLED)),
           "metadata": json.dumps({"func_name": "has"})}
    call = {"function": "Solution().has", "arguments": [[1, 2], "a"], "expected": True}
    assert code_row(doc) == {"tests": [call, call]}
    assert code_row(
        {"public_test_cases": json.dumps(PRINTED), "private_test_cases": None, "metadata": "{}"}
    ) == {"tests": [{"stdin": "1 2\n", "stdout": "3\n"}]}


class Evil:
    """Runs a program where it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.mark}",)


def test_a_pickle_of_anything_else_is_refused(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    for value in (Evil(mark), ["[]"], {"a": "[]"}, b"[]", ("[]", "[]"), 3, None):
        for protocol in (0, 2, 4):
            with pytest.raises(Refused):
                unpacked(as_published(value, protocol), "f")
    assert not mark.exists()


@pytest.mark.parametrize(
    "value",
    ["no base64!", base64.b64encode(b"no zlib").decode(),
     base64.b64encode(zlib.compress(b"no pickle")).decode(),
     base64.b64encode(zlib.compress(pickle.dumps("[]"))[:-3]).decode()],
)
def test_what_is_packed_otherwise_is_refused(value: str) -> None:
    with pytest.raises(Refused, match="private_test_cases"):
        code_row({"private_test_cases": value})


def test_a_bomb_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(livecodebench, "MAX_BYTES", 1 << 20)
    with pytest.raises(Refused, match="larger than 1 MiB"):
        unpacked(as_published("0" * (8 << 20), 4), "f")


@pytest.mark.parametrize(
    ("doc", "said"),
    [
        ({}, "no tests"),
        ({"public_test_cases": "[1]"}, "must have the texts"),
        ({"public_test_cases": 3}, "must be text"),
        ({"public_test_cases": json.dumps(CALLED), "metadata": "{}"}, "func_name"),
        ({"public_test_cases": json.dumps(CALLED), "metadata": "{"}, "metadata is no JSON"),
        ({"public_test_cases": json.dumps(CALLED), "metadata": "[]"}, "metadata"),
        (
            {"public_test_cases": json.dumps([CALLED[0] | {"input": "import os"}]),
             "metadata": '{"func_name": "f"}'},
            "no value",
        ),
    ],
)
def test_a_problem_without_tests_that_can_be_run_is_refused(doc: dict[str, Any], said: str) -> None:
    with pytest.raises(Refused, match=said):
        code_row(doc)
