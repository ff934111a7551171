"""The `verifiers` world with a small double of the library `verifiers`, in a process of its own.
benchmarks/verifiers_worlds.py uses the library itself."""

import contextlib
import json
import os
import select
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_sov.base.errors import UserError
from megatron_sov.chat.tool_calls import ServedTurn, ToolCall
from megatron_sov.judge.rewards.reward import Score
from megatron_sov.judge.tools.environment import EpisodeLimits, InfrastructureFault, Observation, TurnReply
from megatron_sov.judge.tools.host import EnvironmentHost, EnvironmentReply
from megatron_sov.judge.tools.registry import build_versioned_environment, request_environment
from megatron_sov.judge.tools.worlds.verifiers import NETWORK_VARIABLES, Verifiers

LIBRARY = '''
import asyncio, json, os
from dataclasses import dataclass, field
from types import SimpleNamespace as Made
import aiohttp

@dataclass(frozen=True)
class EvalClientConfig:
    base_url: str
    api_key_var: str

@dataclass(frozen=True)
class ModelContext:
    model: str
    client: EvalClientConfig

TOOLS = [{"type": "function", "function": {"name": "add", "description": "Add.", "parameters": {
    "type": "object", "properties": {"n": {"type": "integer"}}}}}]

class Environment:
    """Plays a task, a list of user messages, one before each turn; the reward counts turns, plus 0.5."""

    def __init__(self, config):
        print("printed text is no message of the protocol")
        self.how = config
        self.config = {name: Made(client=None) for name in config["seats"]}
        self.taskset = config["tasks"]

    def serving(self):
        return self

    async def __aenter__(self):
        pass

    async def __aexit__(self, *error):
        pass

    def complete(self, episode):
        return not episode.errors

    async def run_episode(self, task, ctx):
        errors, stop, turns = [], "agent_completed", 0
        try:
            turns, stop = await self.talk(task, ctx)
        except Exception as e:
            errors.append(Made(type=type(e).__name__, message=str(e)))
        trace = Made(agent=Made(config=Made(client=ctx.client)), reward=turns + 0.5, errors=[],
                     rewards={"turns": Made(value=float(turns)), "half": Made(value=0.5), "judge": None},
                     metrics={"keys": float("KEY" in os.environ), "home": float("HOME" in os.environ)},
                     stop_condition=stop)
        return Made(traces=[trace], errors=errors)

    async def talk(self, task, ctx):
        messages, turns, calls = [], 0, []
        async with aiohttp.ClientSession() as http:
            for said in [*task, None]:
                if said is None and not calls:
                    return turns, "agent_completed"
                messages += [{"role": "tool", "tool_call_id": call["id"], "name": "add",
                              "content": f"added {call['function']['arguments']}"} for call in calls]
                if self.how.get("forgets") and len(messages) > 1:
                    messages = messages[-1:]
                if self.how.get("counts"):
                    path = self.how["counts"]
                    with open(path, "a") as file:
                        file.write("x")
                    said = said and f"{said} {os.path.getsize(path)}"
                messages += [] if said is None else [{"role": "user", "content": [
                    {"type": "text", "text": said}]}]
                body = {"model": ctx.model, "messages": messages, "tools": TOOLS, "stream": True}
                key = "wrong" if self.how.get("wrong_key") else os.environ[ctx.client.api_key_var]
                async with http.post(ctx.client.base_url + "/chat/completions", json=body,
                                     headers={"Authorization": f"Bearer {key}"}) as answer:
                    text = await answer.text()
                    if "context_length_exceeded" in text:
                        return turns, "context"
                    answer.raise_for_status()
                deltas = [json.loads(line[6:])["choices"][0] for line in text.split("\\n")
                          if line.startswith("data: {")]
                message = deltas[0]["delta"]
                calls = [{k: v for k, v in call.items() if k != "index"}
                         for call in message.get("tool_calls", [])]
                assert deltas[1]["finish_reason"] == ("tool_calls" if calls else "stop")
                messages.append({"role": "assistant", "content": message["content"] or None,
                                 **({"tool_calls": calls} if calls else {})})
                turns += 1
        return turns, "agent_completed"
'''
MODULES = {"verifiers/__init__.py": "", "verifiers/v1/configs/__init__.py": "",
           "verifiers/v1/utils/__init__.py": "", "verifiers/v1/__init__.py": LIBRARY,
           "verifiers/v1/configs/agent.py": "agent_config_fields = dict",
           "verifiers/v1/utils/loaders.py": "from verifiers.v1 import Environment as load_environment\n"
                                            "resolve_env_config = dict"}
Play = Callable[..., Verifiers]
ADD = ServedTurn("hm", "", (ToolCall("add", {"n": 1}), ToolCall("add", {"n": 2})))
TASK = {"task": 0}


def build_text_turn(text: str) -> ServedTurn:
    return ServedTurn("", text)


def write_library(folder: Path, tasks: Any = (["Say a.", "Say b."],), seats: Any = ("agent",),
                  repeat: bool = False, **how: Any) -> dict[str, Any]:
    """Write the library double and its config file into `folder`, and return the settings of the world.

    Args:
        folder: Folder of the package and the config.
        tasks: User messages of each task.
        seats: Agents of the environment that have no client.
        repeat: The world's setting `repeat`, whether a resumed episode may repeat calls of tools.
        how: Misbehavior of the environment: "forgets", "counts" (a file) or "wrong_key".
    """
    for name, text in MODULES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    config = folder / "config.json"
    config.write_text(json.dumps({"env": {"tasks": tasks, "seats": seats, **how}}))
    return {"config": str(config), "python": sys.executable, "repeat": repeat}


@pytest.fixture
def play(tmp_path: Path) -> Iterator[Play]:
    """A function that returns a world of the double; its keyword arguments are those of `write_library`."""
    worlds: list[Any] = []

    def build_world(**arguments: Any) -> Any:
        request = request_environment("verifiers", write_library(tmp_path, **arguments))
        worlds.append(build_versioned_environment(request)[0])
        return worlds[-1]

    yield build_world
    for world in worlds:
        world.end()


def test_environment_user_answers_and_scores(play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEY", "secret")
    world = play()
    assert world.reset(TASK) == Observation("Say a.") and world.tools()[0]["function"]["name"] == "add"
    assert world.reply(build_text_turn("a")) == TurnReply(user="Say b.")
    assert world.reply(build_text_turn("b")) == TurnReply(is_over=True)
    assert world.score("b") == Score(2.5, {
        "turns": 2, "half": 0.5, "keys": 0, "home": 1, "stop": "agent_completed"})


def test_an_environment_makes_the_calls_of_a_turn(play: Play) -> None:
    world = play(tasks=[["Add.", "And?"]])
    world.reset(TASK)
    assert world.reply(ADD) == TurnReply(('added {"n": 1}', 'added {"n": 2}'), "And?")
    assert world.reply(build_text_turn("3")).is_over and world.score("").reward == 2.5


def test_environment_scores_truncated_episodes(play: Play) -> None:
    world = play()
    world.reset(TASK)
    world.reply(build_text_turn("a"))
    score = world.score("")
    assert score.reward == 1.5 and score.components["stop"] == "context"
    # the same process plays the next episode
    world.reset(TASK)
    assert world.reply(build_text_turn("a")).user == "Say b."


@pytest.mark.parametrize("repeat", [False, True])
def test_resumed_episode_repeats_calls_only_if_allowed(play: Play, repeat: bool) -> None:
    world = play(tasks=[["Add.", "And?"]], repeat=repeat)
    world.reset(TASK)
    world.reply(ADD)
    state = json.loads(json.dumps(world.snapshot()))
    world.reset(TASK)
    if repeat:
        world.restore(state)
        assert world.reply(build_text_turn("3")).is_over
    else:
        with pytest.raises(InfrastructureFault, match="may have acted on the world; set repeat=true"):
            world.restore(state)


def test_nondeterministic_environment_has_no_reward(play: Play, tmp_path: Path) -> None:
    world = play(counts=str(tmp_path / "count"))
    world.reset(TASK)
    assert world.reply(build_text_turn("a")).user == "Say b. 2"
    state = world.snapshot()
    world.reset(TASK)
    with pytest.raises(InfrastructureFault, match="does not repeat itself"):
        world.restore(state)


def test_rewritten_conversation_has_no_reward(play: Play) -> None:
    world = play(forgets=True)
    world.reset(TASK)
    with pytest.raises(InfrastructureFault, match="rewrites the conversation from message 1 on"):
        world.reply(build_text_turn("a"))


def test_episode_resumes_in_another_process(tmp_path: Path) -> None:
    request, pids = request_environment("verifiers", write_library(tmp_path)), tmp_path / "pids"
    with (tmp_path / "verifiers/v1/__init__.py").open("a") as file:
        file.write(f"\nopen({str(pids)!r}, 'a').write(f'{{os.getpid()}} ')\n")
    with EnvironmentHost(request, EpisodeLimits()) as host:
        host.reset(TASK)
        assert host.converses and host.reply(build_text_turn("a")) == EnvironmentReply(user="Say b.")
        state = host.state
        host.end()
        host.resume(TASK, state)
        assert host.state == state
        assert host.reply(build_text_turn("b")).is_over and host.score("b").reward == 2.5
    for pid in map(int, pids.read_text().split()):
        with contextlib.suppress(ProcessLookupError):
            assert select.select([os.pidfd_open(pid)], [], [], 60)[0], "the process has not ended"


@pytest.mark.tier1_cases(4)
@pytest.mark.parametrize("task, how, match", [
    ({"task": 9}, {}, "there is no task 9: the taskset has 1"),
    ({"task": "0"}, {}, "has no number"),
    (TASK, {"seats": ["agent", "user"]}, "seats without a client are agent, user: the model plays one"),
    (TASK, {"wrong_key": True}, "401"),
    (TASK, {"tasks": 3}, "TypeError: 'int' object is not iterable")])
def test_unplayable_environments_are_reported(play: Play, task: Any, how: dict[str, Any], match: str) -> None:
    with pytest.raises(UserError, match=match):
        play(**how).reset(task)


def test_missing_library_is_reported(play: Play, tmp_path: Path) -> None:
    world = play()
    (tmp_path / "verifiers/v1/__init__.py").write_text("")
    with pytest.raises(UserError, match="cannot import name 'EvalClientConfig'"):
        world.reset(TASK)


def test_withheld_network_variables_are_reported(play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NETWORK_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SSL_CERT_FILE", "/certificates.pem")
    with pytest.raises(UserError, match=r"401.*; it was not given SSL_CERT_FILE of this environment: .* as "
                                        r'uv does, set env=\["SSL_CERT_FILE"\]'):
        play(wrong_key=True).reset(TASK)


@pytest.mark.each("change, match", [
    ({"config": "nowhere.toml"}, "is no file in TOML or JSON"),
    ({"config": __file__}, "is no file in TOML or JSON"),
    ({"python": "no-python"}, "names no program")])
def test_settings_name_a_file_and_a_program(change: dict[str, str], match: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=match):
        build_versioned_environment(request_environment("verifiers", write_library(tmp_path) | change))
