"""Reward `composed`: weights, gates and domains of its parts, with runners that record the rows they get."""

from pathlib import Path
from typing import Any

import pytest

from megatron_sov.base.errors import UserError
from megatron_sov.judge.rewards.composed import Composed, ComposedRunner, RewardPart
from megatron_sov.judge.rewards.registry import build_versioned_reward, request_reward
from megatron_sov.judge.rewards.reward import Result
from megatron_sov.judge.rewards.scoring import create_runner


class FieldRunner:
    """Runner of a part whose reward is a field of the row: a number, or a `Result`."""

    def __init__(self, name: str) -> None:
        self.name, self.scored_ids = name, []

    def __enter__(self):
        return self

    def __exit__(self, *error: object) -> None:
        """No process to end."""

    def score(self, rows):
        self.scored_ids += [row["id"] for row in rows]
        values = [row[self.name] for row in rows]
        return [value if isinstance(value, Result) else Result(value, "scored") for value in values]


def score(composed: Composed, rows: list[dict]) -> tuple[list[Result], dict[str, list[int]]]:
    """Score rows whose fields are named after parts. Return the results, and part -> ids of scored rows."""
    runners = {name: FieldRunner(name) for name in composed.get_part_requests()}
    rows = [{"id": i, "response": str(i), **row} for i, row in enumerate(rows)]
    with ComposedRunner(composed, runners) as running:
        results = running.score(rows)
    return results, {name: runner.scored_ids for name, runner in runners.items()}


def test_the_reward_is_the_weighted_sum() -> None:
    composed = Composed({"a": RewardPart("x", 0.9), "b": RewardPart("x", 0.1)})
    results, _ = score(composed, [{"a": 1.0, "b": 0.5}, {"a": 0.0, "b": -1.0}])
    assert [r.reward for r in results] == [pytest.approx(0.9 * 1.0 + 0.1 * 0.5), pytest.approx(0.1 * -1.0)]
    assert results[0].components["b"] == {"reward": 0.5, "status": "scored"}


def test_part_order_does_not_change_the_sum() -> None:
    weights = {"a": 0.6, "b": 0.3, "c": 0.1}
    for names in ("abc", "cba", "bca"):
        composed = Composed({name: RewardPart("x", weights[name]) for name in names})
        (result,), _ = score(composed, [dict.fromkeys(names, 1.0)])
        assert result.reward == 1.0


def test_gates_run_first_and_skip_other_parts() -> None:
    composed = Composed({"judge": RewardPart("x"), "form": RewardPart("x", 0.0, gate=1.0)}, gated_reward=-0.5)
    results, scored_ids = score(composed, [{"form": 1.0, "judge": 0.7}, {"form": 0.0, "judge": 1.0}])
    assert [r.reward for r in results] == [0.7, -0.5]
    assert results[1].components["gate"] == "form"
    assert scored_ids == {"judge": [0], "form": [0, 1]}


def test_rows_go_to_the_parts_of_their_domain() -> None:
    composed = Composed({"m": RewardPart("x", domains=("math",)),
                         "t": RewardPart("x", domains=("text", "law")), "all": RewardPart("x", 0.5)})
    results, scored_ids = score(composed, [{"domain": "math", "m": 1.0, "all": 1.0},
                                           {"domain": "law", "t": 0.2, "all": 0.0}])
    assert [r.reward for r in results] == [1.0 + 0.5 * 1.0, 0.2]
    assert scored_ids == {"m": [0], "t": [1], "all": [0, 1]}
    results, _ = score(Composed({"m": RewardPart("x", domains=("math",))}), [{"domain": "code"}, {}])
    assert [(r.status, r.reason) for r in results] == [("refused", "no part judges domain = 'code'"),
                                                       ("refused", "no part judges domain = None")]


def test_part_without_a_reward_leaves_no_reward() -> None:
    composed = Composed({"a": RewardPart("x", gate=0.0), "b": RewardPart("x"), "c": RewardPart("x")})
    late, broken = Result(None, "timeout", {}, "too slow"), Result(None, "failed", {}, "broken")
    results, scored_ids = score(composed, [{"a": 1.0, "b": late, "c": 1.0}, {"a": broken}, {"a": -1.0}])
    assert [(r.reward, r.status, r.reason) for r in results] == [
        (None, "timeout", "b: too slow"), (None, "failed", "a: broken"), (0.0, "scored", "")]
    assert scored_ids["c"] == []


def test_version_depends_on_parts_and_settings() -> None:
    def version(**more: Any) -> str:
        part = {"reward": "length", "settings": {"unit": "words"}, **more}
        return build_versioned_reward(request_reward("composed", {"parts": {"a": part}})).version

    assert version() == version(weight=1.0, settings={"unit": "words", "max_length": 20_480})
    assert len({version(), version(weight=2.0), version(gate=0.0), version(domains=["x"]),
                version(settings={"unit": "characters"})}) == 5


@pytest.mark.each(("settings", "problem"), [
    ({"parts": {}}, "parts = {} must have at least 1 items"),
    ({}, "parts: is missing; it has no default; set it"),
    ({"parts": {"a": {"reward": "composed"}}}, "is a composition itself"),
    ({"parts": {"a": {"reward": "lenght"}}}, "'length'"),
    ({"parts": {"a": {"reward": "length", "wieght": 1}}}, "parts.a.wieght"),
    ({"parts": {"a": {"reward": "length", "settings": {"unit": "miles"}}}}, "unit"),
])
def test_invalid_settings_are_refused(settings: dict, problem: str) -> None:
    with pytest.raises(UserError) as e:
        build_versioned_reward(request_reward("composed", settings))
    assert problem in str(e.value)


def test_real_parts_run_together(tmp_path: Path) -> None:
    code = "class Own:\n    def score(self, row):\n        return len(row['response'])\n"
    (tmp_path / "own.py").write_text(code)
    request = request_reward("composed", {"parts": {
        "rule": {"reward": "length", "settings": {"unit": "words", "max_length": 2, "buffer": 1}},
        "own": {"reward": f"{tmp_path}/own.py:Own", "weight": 10}}})
    with create_runner(request, build_versioned_reward(request), 1) as running:
        results = running.score([{"response": "a"}, {"response": "a b"}])
    # 10 per character; the second response has the maximum of two words, whose penalty is -1
    assert [r.reward for r in results] == [10.0, 29.0]
