"""Registry of rewards: rewards by name and from files, TRL's reward functions, settings, and versions."""

import ast
import asyncio
import inspect
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from megatron_sov.base.errors import UserError
from megatron_sov.judge.rewards import version
from megatron_sov.judge.rewards.registry import build_versioned_reward, find_missing_field, request_reward
from megatron_sov.judge.rewards.reward import OPERATION, REWARDS, run_reward
from megatron_sov.judge.rewards.version import collect_settings, compute_version

CONTAINS = '''
class Contains:
    """Reward 1 for a response that contains a word at least `times` times."""

    def __init__(self, *, word: str = "yes", times: int = 1) -> None:
        self.word, self.times = word, times

    def score(self, row):
        return float(row["response"].count(self.word) >= self.times)
'''


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A file with the reward `Contains`."""
    path = tmp_path / "contains.py"
    path.write_text(CONTAINS)
    return path


def test_reward_from_a_file_takes_settings(file: Path) -> None:
    versioned_reward = build_versioned_reward(request_reward(f"{file}:Contains", {"word": "ja", "times": 2}))
    assert versioned_reward.reward.score({"response": "ja, ja"}) == 1.0
    assert versioned_reward.reward.score({"response": "ja"}) == 0.0


def test_version_depends_on_file_and_settings(file: Path) -> None:
    def version(**settings: object) -> str:
        return build_versioned_reward(request_reward(f"{file}:Contains", settings)).version

    before = version()
    assert before == version(word="yes") != version(word="no")
    file.write_text(CONTAINS.replace(">=", ">"))
    assert version() != before


def test_file_changed_after_the_request_is_refused(file: Path) -> None:
    request = request_reward(f"{file}:Contains", {})
    before = build_versioned_reward(request).version
    file.write_text(CONTAINS.replace(">=", ">"))
    with pytest.raises(UserError, match=r"contains\.py has changed since this command began"):
        build_versioned_reward(request)
    assert build_versioned_reward(request_reward(f"{file}:Contains", {})).version != before


@pytest.mark.parametrize(("settings", "message"), [
    ({"wrod": "x"}, "wrod: no such setting; did you mean 'word'?"),
    ({"times": "many"}, 'times = "many" must be a whole number'),
])
def test_wrong_settings_are_named(file: Path, settings: dict, message: str) -> None:
    with pytest.raises(UserError) as e:
        build_versioned_reward(request_reward(f"{file}:Contains", settings))
    assert message in str(e.value)


def test_trl_reward_function_is_a_reward(tmp_path: Path) -> None:
    file = tmp_path / "own.py"
    file.write_text("""
def starts_well(completions, answer, **kwargs):
    assert sorted(kwargs) == ["prompt", "prompts", "response"]
    texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
    return [float(t.startswith(a)) for t, a in zip(texts, answer, strict=True)]
def other(rows):
    return [1.0]
""")
    versioned_reward = build_versioned_reward(request_reward(f"{file}:starts_well", {}))
    row = {"response": "yes, it is", "answer": "yes", "prompt": "p"}
    assert run_reward(versioned_reward.reward, row).reward == 1.0
    # as in TRL, completions of a prompt that is a list of messages are lists of messages
    messages = [{"role": "user", "content": "p"}]
    assert run_reward(versioned_reward.reward, {**row, "prompt": messages}).reward == 1.0
    with pytest.raises(UserError, match=r"is a class with score\(self, row\) or a function f\(comp"):
        request_reward(f"{file}:other", {})


FUNCTIONS = '''
import asyncio, functools
import numpy as np
def chars(completions, **kwargs): return [float(len(c)) for c in completions]
def in_a_tuple(completions): return tuple(len(c) for c in completions)
def generated(completions): return (len(c) for c in completions)
def array(completions, **kwargs): return np.array([len(c) for c in completions])
def array32(completions): return np.float32([len(c) for c in completions])
def scalars(completions): return [np.float64(len(c)) for c in completions]
def flags(completions): return np.array([len(c) > 2 for c in completions])
def gaps(completions): return [None if c == "ab" else float(len(c)) for c in completions]
def nan(completions): return np.array([np.nan if c == "ab" else len(c) for c in completions])
def short(completion_ids, **kwargs): return [-float(len(ids)) for ids in completion_ids]
def longest(completions, **kwargs):
    n = [len(c) for c in completions]
    return [float(x == max(n)) for x in n]
def centred(completions, **kwargs):
    n = np.array([len(c) for c in completions])
    return n - n.mean()
def right(prompts, completions, answer):
    return [float(c == a) for c, a in zip(completions, answer, strict=True)]
async def later(completions, **kwargs):
    await asyncio.sleep(0)
    return [float(len(c)) for c in completions]
def awaited(completions): return later(completions)
class Callable:
    def __call__(self, completions, **kwargs): return [float(len(c)) for c in completions]
called = Callable()
part = functools.partial(lambda completions, factor: [factor * len(c) for c in completions], factor=2.0)
def tensor(completions):
    import torch
    return torch.tensor([len(c) for c in completions], dtype=torch.float32)
def many(completions): return [1.0] * (len(completions) + 1)
def matrix(completions): return np.ones((len(completions), 1))
def number(completions): return np.float64(1.0)
def text(completions): return "1" * len(completions)
def infinite(completions): return [float("inf")] * len(completions)
'''
RESPONSES = ["a", "ab", "abc", "abcd"]


def compute_trl_rewards(function: Any, rows: list[dict[str, Any]]) -> list[float | None]:
    """Return the rewards of a group of rows as TRL's `GRPOTrainer._calculate_rewards` computes them: one call
    with keyword arguments, and NaN or None for a row without a reward."""
    import torch

    fields = {name: [row[name] for row in rows] for name in rows[0] if name not in ("prompt", "response")}
    arguments = {"prompts": [row["prompt"] for row in rows], "completions": [row["response"] for row in rows],
                 **fields}
    parameters = inspect.signature(function).parameters
    if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        arguments = {name: value for name, value in arguments.items() if name in parameters}
    output = function(**arguments)
    output = asyncio.run(output) if inspect.iscoroutine(output) else output
    values = torch.tensor([math.nan if reward is None else float(reward) for reward in output],
                          dtype=torch.float32)
    return [None if math.isnan(value) else value for value in values.tolist()]


@pytest.mark.each("name", [
    "chars", "in_a_tuple", "generated", "array", "array32", "scalars", "flags", "gaps", "nan", "short",
    "longest", "centred", "right", "later", "awaited", "called", "part", "tensor"])
def test_trl_function_gets_the_arguments_of_trl(name: str, tmp_path: Path) -> None:
    file = tmp_path / "functions.py"
    file.write_text(FUNCTIONS)
    rows = [{"prompt": "p", "response": response, "answer": "abc", "completion_ids": [7] * len(response)}
            for response in RESPONSES]
    scope: dict[str, Any] = {}
    exec(FUNCTIONS, scope)
    expected = compute_trl_rewards(scope[name], rows)
    request = request_reward(f"{file}:{name}", {})
    reward = build_versioned_reward(request).reward
    result = run_reward(reward, rows)
    assert result.status == "scored" and result.components[REWARDS] == expected
    for row in rows:  # a group of one row
        assert [run_reward(reward, row).reward] == compute_trl_rewards(scope[name], [row])


@pytest.mark.each("name", ["many", "matrix", "number", "text", "infinite"])
def test_malformed_trl_results_fail(name: str, tmp_path: Path) -> None:
    (tmp_path / "functions.py").write_text(FUNCTIONS)
    reward = build_versioned_reward(request_reward(f"{tmp_path}/functions.py:{name}", {})).reward
    result = run_reward(reward, [{"prompt": "p", "response": text} for text in RESPONSES])
    assert (result.reward, result.status) == (None, "failed")


def test_function_with_token_ids_refuses_rows_without_them(tmp_path: Path) -> None:
    (tmp_path / "functions.py").write_text(FUNCTIONS)
    result = run_reward(build_versioned_reward(request_reward(f"{tmp_path}/functions.py:short", {})).reward,
                        {"response": "a"})
    assert result.status == "refused" and "has no 'completion_ids'" in result.reason


CODE = '''"""Docstring of the module."""
from megatron_sov.judge.rewards import parts  # comment
LIMIT = 3
"""Docstring of a constant."""

def score(row):
    """Docstring of a function."""
    return len(row["response"]) > LIMIT  # a longer comment
'''


@dataclass(frozen=True)
class Long:
    """Reward: 1 for long responses."""

    LIBRARIES = ("numpy",)
    min_chars: int = 5
    speed: int = field(default=4, metadata=OPERATION)

    def score(self, row):
        return len(row["response"]) >= self.min_chars


def get_version(reward: Long, files: dict[str, str] | None = None) -> str:
    """Return the version of a reward whose sources are `files`, path -> text."""
    return compute_version(reward, collect_settings(reward, {}), files or {"long.py": "1"})


def test_version_covers_code_and_settings_but_operational_ones() -> None:
    assert get_version(Long()) == get_version(Long(5)) == get_version(Long(5, speed=9))
    assert get_version(Long()) != get_version(Long(6))
    assert get_version(Long(), {"long.py": "1"}) != get_version(Long(), {"long.py": "2"})


def test_library_version_changes_the_version(monkeypatch: pytest.MonkeyPatch) -> None:
    before = get_version(Long())
    monkeypatch.setattr("importlib.metadata.version", lambda name: "99.0")
    assert get_version(Long()) != before


@pytest.mark.each(("old", "new", "same"), [
    ("  # a longer comment", "  # another", True), ("Docstring of a function.", "Another.", True),
    ("Docstring of a constant.", "Another.", True), ("\n\ndef", "\n\n\n\ndef", True),
    ("LIMIT = 3", "LIMIT = 4", False), ("> LIMIT", ">= LIMIT", False),
    ("import parts", "import other", False),
])
def test_comments_do_not_change_the_version(old: str, new: str, same: bool) -> None:
    assert old in CODE
    before, after = (version._strip_docstrings(ast.parse(text)) for text in (CODE, CODE.replace(old, new)))
    assert (before == after) is same


def test_imported_modules_change_the_version(monkeypatch: pytest.MonkeyPatch) -> None:
    files = {"megatron_sov.judge.rewards.registry":
             "from megatron_sov.judge.rewards import reward\nimport json\n",
             "megatron_sov.judge.rewards.reward": "x = 1\n", "megatron_sov.judge.rewards.version": "y = 1\n"}
    monkeypatch.setattr(version, "read_source", files.__getitem__)

    def hash_code() -> dict[str, str]:
        version.hash_code.cache_clear()
        return version.hash_code("megatron_sov.judge.rewards.registry")

    before = hash_code()
    assert set(before) == {"megatron_sov.judge.rewards.registry", "megatron_sov.judge.rewards.reward"}
    files["megatron_sov.judge.rewards.version"] = "y = 2\n"
    assert hash_code() == before
    files["megatron_sov.judge.rewards.reward"] = "x = 2\n"
    assert hash_code() != before
    version.hash_code.cache_clear()


def test_settings_from_a_constructor() -> None:
    class Plain:
        def __init__(self, *, low: float = 0.5, high: float = 1.0) -> None:
            """Set no attributes."""

    assert collect_settings(Plain(), {"low": 0.25}) == {"low": 0.25, "high": 1.0}


def test_sources_of_all_rewards_are_hashed() -> None:
    code = version.hash_code("megatron_sov.judge.rewards.reward")
    assert set(code) == {"megatron_sov.judge.rewards.reward", "megatron_sov.chat.marks",
                         "megatron_sov.chat.tool_calls"}, "the modules that read a response"
    assert Path(version.__file__).is_file()


@pytest.mark.each(("name", "settings", "row", "field"), [
    ("math", {}, {}, "answer"), ("math", {}, {"answer": "42"}, ""), ("code", {}, {"answer": "42"}, "tests"),
    ("ifeval", {}, {"instruction_id_list": []}, ""), ("language", {}, {}, "language"),
    ("language", {"language": "ko"}, {}, ""), ("repetition", {}, {}, ""),
    ("composed", {"parts": {"m": {"reward": "math", "domains": ["math"]}, "r": {"reward": "repetition"}}},
     {"domain": "math"}, "answer"),
    ("composed", {"parts": {"m": {"reward": "math", "domains": ["math"]}, "r": {"reward": "repetition"}}},
     {"domain": "chat"}, "")])
def test_missing_fields_are_found_before_generation(name: str, settings: dict[str, Any], row: dict[str, Any],
                                                    field: str) -> None:
    request = request_reward(name, settings)
    versioned_reward = build_versioned_reward(request)
    assert find_missing_field(request, versioned_reward, row) == field
    if field and name != "composed":
        # scoring without the field refuses the row
        verdict = run_reward(versioned_reward.reward, {**row, "response": "42"})
        assert verdict.status == "refused" and field in verdict.reason
