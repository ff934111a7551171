"""Settings under metadata.sov: what is refused, what a stranger's file may not do, what a command changes."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_sov.errors import UserError
from megatron_sov.eval.suites.protocol import Protocol, changed, protocol_of
from megatron_sov.settings import SettingsError


def made(allow_code: bool = False, **settings: Any) -> Protocol:
    protocol = protocol_of({"sov": {"reward": "math", **settings}}, "t", allow_code)
    assert protocol is not None
    return protocol


def test_a_task_without_a_protocol_is_lm_evals_own() -> None:
    assert protocol_of(None, "t") is None
    assert protocol_of({"version": 1.0}, "t") is None
    assert protocol_of({"sov": {"suite": "MMLU", "fields": {"question": "text"}}}, "t") is None


def test_all_problems_are_told_at_once() -> None:
    with pytest.raises(SettingsError) as e:
        made(samples=0, top_p=0.0, mode="fast", metrics=["best"], reward="mth", extract="(")
    assert e.value.codes == [
        ("bound", "samples"), ("bound", "top_p"), ("choice", "metrics.0"), ("choice", "mode"),
        ("choice", "reward"), ("bound", "extract")]
    assert "did you mean 'math'?" in str(e.value)
    with pytest.raises(SettingsError) as e:
        made(samples=8, k=[9], reward="", limits={"max_turn": 3})
    assert e.value.codes == [("rule", "samples"), ("rule", "k.0"), ("rule", "reward"),
                             ("unknown", "limits.max_turn")]
    for wrong in ({"extract": "answer"}, {"limits": {"max_turns": 0}}, {"task": "another"}):
        with pytest.raises(SettingsError):
            made(**wrong)
    with pytest.raises(UserError, match="must be an object"):
        protocol_of({"sov": ["samples"]}, "t")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"reward": "evil.py:Reward"}, "names code to run"),
        ({"reward": "", "environment": "evil.py:World"}, "names code to run"),
        ({"reward": "composed"}, "loads what its settings name"),
        ({"reward": "", "environment": "mcp", "environment_settings": {"command": ["sh"]}},
         "starts a program"),
        ({"reward": "code", "reward_settings": {"command": ["sh", "-c", "id"]}}, "reward_settings.command"),
        ({"reward": "judge", "reward_settings": {"endpoint": "http://evil/v1"}}, "reward_settings.endpoint"),
        ({"reward": "judge", "reward_settings": {"api_key_env": "AWS_SECRET"}},
         "reward_settings.api_key_env"),
        ({"reward": "judge", "variants": {"a": {"cache": "/etc/x"}}}, "reward_settings.cache"),
        ({"reward": "", "environment": "retrieval", "environment_settings": {"corpus": "/etc/passwd"}},
         "must lie in"),
        ({"reward": "", "environment": "retrieval", "environment_settings": {"corpus": "${DATA}/../x"}},
         "must lie in"),
        ({"reward": "", "environment": "retrieval", "environment_settings": {"corpus": "passwd"}},
         "must lie in"),
    ],
)
def test_a_strangers_file_runs_nothing_and_sends_nothing(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        made(**settings)
    assert made(True, **settings)  # a user's own may


def test_a_command_changes_a_protocol() -> None:
    protocol = made(samples=64, temperature=1.0, k=[1, 8, 64], metrics=["avg", "pass"],
                    reward_settings={"marked_only": True})
    assert protocol.metric_names == ["avg@64", "pass@1", "pass@8", "pass@64"]
    fewer = changed(protocol, {"samples": 8, "mode": "thinking", "reward_settings": {"strict": False}})
    assert fewer.metric_names == ["avg@8", "pass@1", "pass@8"]
    assert fewer.reward_settings == {"marked_only": True, "strict": False}
    assert fewer.chat_template_kwargs == {"enable_thinking": True}
    assert changed(protocol, {"mode": "no-thinking"}).chat_template_kwargs == {"enable_thinking": False}
    assert protocol.chat_template_kwargs == {}
    assert fewer.as_json()["sampling"] == {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "max_tokens": 4096,
                                           "seed": 0, "samples": 8}
    with pytest.raises(UserError, match="samples = 0"):
        changed(protocol, {"samples": 0})


def test_limits_of_agents_stand_with_the_score() -> None:
    protocol = made(reward="", environment="booking", limits={"max_turns": 30})
    limits = protocol.as_json()["agent_limits"]
    assert (limits["max_turns"], limits["max_tool_chars"]) == (30, 4000)
    assert protocol.as_json()["judge"] == "booking"
    assert made().as_json()["agent_limits"] is None
