"""Rewards of `verifiers` environments in this project's bridge, compared with the library's `vf-eval`.

    python benchmarks/verifiers_worlds.py --python ENV/bin/python > benchmarks/results/verifiers_worlds.txt

Both programs get the same scripted model responses in four environments: a question, a simulated user, tools,
and a TextArena game. The bridge resumes each episode in another process after half of the turns. ENV has
verifiers, uv, textarena and nltk. uv downloads the packages of the library's chat program; SSL_CERT_FILE may
name its certificates.
"""

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aiohttp import web

from megatron_sov.chat.tool_calls import ServedTurn, ToolCall
from megatron_sov.judge.tools.environment import EpisodeLimits
from megatron_sov.judge.tools.host import EnvironmentHost
from megatron_sov.judge.tools.registry import request_environment
from megatron_sov.work.processes.children import foreign_environment

# Environments of the library: a question, a simulated user, and tools.
SUM = '''
import verifiers.v1 as vf

class SumData(vf.TaskData):
    answer: str

class SumTask(vf.Task[SumData, vf.State, vf.TaskConfig]):
    @vf.reward(weight=2.0)
    async def is_right(self, trace: vf.Trace) -> float:
        return float(self.data.answer in trace.last_reply)

    @vf.reward(weight=0.5)
    async def is_short(self, trace: vf.Trace) -> float:
        return float(len(trace.last_reply) < 20)

    @vf.metric
    async def num_chars(self, trace: vf.Trace) -> float:
        return float(len(trace.last_reply))

class SumTaskset(vf.Taskset[SumTask, vf.TasksetConfig]):
    def load(self):
        for n in range(4):
            yield SumTask(SumData(prompt=f"What is {n} + 2?", system_prompt="Answer with a number.",
                                  answer=str(n + 2)), self.config.task)

__all__ = ["SumTaskset"]
'''
GUESS = '''
import re
import verifiers.v1 as vf

class GuessData(vf.TaskData):
    number: int

class GuessTask(vf.Task[GuessData, vf.State, vf.TaskConfig]):
    @vf.metric
    async def num_turns(self, trace: vf.Trace) -> float:
        return float(trace.num_turns)

class GuessTaskset(vf.Taskset[GuessTask, vf.TasksetConfig]):
    def load(self):
        for n in (7, 3, 9):
            yield GuessTask(GuessData(prompt="Guess my number from 0 to 9.", number=n), self.config.task)

class GuessConfig(vf.EnvConfig):
    player: vf.AgentConfig = vf.AgentConfig()

class GuessEnv(vf.Env[GuessConfig]):
    async def run(self, task, agents):
        found, number = 0.0, task.data.number
        async with agents.player.interaction(task) as talk:
            segment = await talk.turn()
            for left in (2, 1, 0):
                said = re.findall(r"[0-9]+", segment.last_reply)
                found = float(bool(said) and int(said[-1]) == number)
                if segment.terminated or found or not left:
                    break
                hint = "no number" if not said else "higher" if int(said[-1]) < number else "lower"
                segment = await talk.turn(f"{hint}, {left} left")
        talk.trace.record_reward("found", found, 1.0)

__all__ = ["GuessTaskset", "GuessEnv"]
'''
COUNT = '''
import verifiers.v1 as vf

class CountData(vf.TaskData):
    goal: int

class CountState(vf.State):
    number: int = 0

class Counter(vf.Toolset[vf.ToolsetConfig, CountState]):
    TOOL_PREFIX = None

    @vf.tool
    async def add(self, amount: int) -> str:
        """Add to the counter."""
        self.state.number += amount
        return f"now {self.state.number}"

    @vf.tool
    async def look(self) -> str:
        """Return the counter."""
        return f"it is {self.state.number}"

class CountTask(vf.Task[CountData, CountState, vf.TaskConfig]):
    @classmethod
    def toolsets(cls, config):
        return [Counter(vf.ToolsetConfig())]

    @vf.reward
    async def reached(self, trace: vf.Trace) -> float:
        return float(trace.state.number == self.data.goal)

    @vf.metric
    async def num_results(self, trace: vf.Trace) -> float:
        return float(len(trace.tool_messages))

class CountTaskset(vf.Taskset[CountTask, vf.TasksetConfig]):
    def load(self):
        for n in (3, 5):
            yield CountTask(CountData(prompt=f"Make it {n}.", goal=n), self.config.task)

__all__ = ["CountTaskset"]

if __name__ == "__main__":
    Counter.run()
'''
WORDS = "about account agreement air apple cotton father garden island kettle machine paper river window"
"""Words of Hangman, in place of the word list that NLTK would download."""
Turn = str | list[tuple[str, dict[str, Any]]]
"""Text of a response, or its tool calls (name, arguments)."""
CONTEXT_FULL: Turn = "(no more)"
"""Marks the turn at which the model's context is full."""
CASES: tuple[tuple[str, str, int, Sequence[Turn]], ...] = (
    ("vf_sum", "agent", 1, ["It is 3."]),
    ("vf_guess", "player", 0, ["I say 4", "no idea", "7"]),
    ("vf_guess", "player", 2, ["4", CONTEXT_FULL]),
    ("vf_count", "agent", 0, [[("look", {}), ("add", {"amount": "x"})], [("add", {"amount": 3})], "done"]),
    ("textarena", "player", 1, ["[e]", "I say [a].", "no move", CONTEXT_FULL]))
"""(taskset, agent of the environment that the model plays, task index, responses of the model)."""


@dataclass(frozen=True)
class Library:
    """The Python interpreter of the library, and its inputs."""

    python: str
    folder: Path

    def write_config(self, taskset: str, agent: str) -> Path:
        """Write the TOML settings of an environment for vf-eval, and return their path."""
        game = 'game = "Hangman-v0"\n' if taskset == "textarena" else ""
        path = self.folder / f"{taskset}.toml"
        path.write_text(f'[env.taskset]\nid = "{taskset}"\n{game}\n[env.{agent}]\nharness = {{id = "null"}}\n'
                        'runtime = {type = "subprocess"}\n', encoding="utf-8")
        return path


def build_turn(turn: Turn) -> ServedTurn:
    if isinstance(turn, str):
        return ServedTurn("", turn)
    return ServedTurn("", "", tuple(ToolCall(name, arguments) for name, arguments in turn))


def run_in_bridge(library: Library, config: Path, task: int, turns: Sequence[Turn],
                  log: Callable[[str], object]) -> dict[str, Any]:
    """Run an episode in `EnvironmentHost`, resumed in another process after half of the turns; return the
    reward and its components."""
    settings = {"config": str(config), "python": library.python, "repeat": True,
                "env": [name for name in ("SSL_CERT_FILE", "NLTK_DATA") if name in os.environ]}
    with EnvironmentHost(request_environment("verifiers", settings),
                         EpisodeLimits(call_timeout_s=120)) as host:
        opening = host.reset({"task": task})
        seen = opening.observation
        tools = ", ".join(tool["function"]["name"] for tool in opening.tools) or "no tools"
        log(f"  {tools}; asked {seen.user[:60]!r}" + (" with rules" if seen.system else ""))
        for number, turn in enumerate(turns):
            if turn == CONTEXT_FULL:
                break
            if number == len(turns) // 2:
                host.end()
                host.resume({"task": task}, host.state)
            reply = host.reply(build_turn(turn))
            texts = [result.text.partition("\n")[0] for result in reply.results]
            texts += [reply.user] if reply.user is not None else []
            texts += ["over"] if reply.is_over else []
            log(f"  {turn if isinstance(turn, str) else json.dumps(turn)} -> "
                f"{' | '.join(' '.join(text.split())[:70] for text in texts)}")
        result = host.score("")
        assert result.reward is not None, result.reason
        return {"reward": result.reward, **result.components}


class ScriptedChat:
    """A chat completions server that streams scripted responses, then an error."""

    def __init__(self, turns: Sequence[Turn]) -> None:
        self._turns = enumerate(turns)

    async def complete_chat(self, request: web.Request) -> web.Response:
        number, scripted = next(self._turns, (0, CONTEXT_FULL))
        if scripted == CONTEXT_FULL:
            error = {"message": "This model's maximum context length is 8 tokens", "code": 400}
            return web.json_response({"error": error}, status=400)
        turn = build_turn(scripted)
        calls = [{"index": n, "id": f"c{number}{n}", "type": "function", "function": {
            "name": call.name, "arguments": json.dumps(call.arguments)}} for n, call in enumerate(turn.calls)]
        delta = {"role": "assistant", "content": turn.content, **({"tool_calls": calls} if calls else {})}
        chunk = {"id": "x", "object": "chat.completion.chunk", "created": 0, "model": "m", "choices": [
            {"index": 0, "finish_reason": "tool_calls" if calls else "stop", "delta": delta}]}
        return web.Response(text=f"data: {json.dumps(chunk)}\n\ndata: [DONE]\n\n",
                            content_type="text/event-stream")


def run_vf_eval(library: Library, config: Path, task: int, turns: Sequence[Turn]) -> dict[str, Any]:
    """Run `vf-eval` against a server with the same scripted responses; return reward, metrics and stop
    reason."""
    loop, app = asyncio.new_event_loop(), web.Application()
    app.add_routes([web.post("/v1/chat/completions", ScriptedChat(turns).complete_chat)])

    async def start_server() -> int:
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        return int(runner.addresses[0][1])

    threading.Thread(target=loop.run_forever, daemon=True).start()
    port = asyncio.run_coroutine_threadsafe(start_server(), loop).result()
    out = library.folder / f"out-{config.stem}-{task}"
    bin_ = Path(library.python).parent
    subprocess.run(
        [bin_ / "vf-eval", "@", config, "--no-push", "--no-rich", "--model", "m", "--client.base-url",
         f"http://127.0.0.1:{port}/v1", "--client.api-key-var", "NONE", "--select.include.idx", str(task),
         "-n", "1", "--output-dir", out], check=True, stdout=subprocess.DEVNULL,
        env=foreign_environment(["SSL_CERT_FILE", "NLTK_DATA"]) | {
            "PYTHONPATH": str(library.folder), "PATH": f"{bin_}:{os.environ['PATH']}"})
    loop.call_soon_threadsafe(loop.stop)
    (traces,) = out.rglob("traces.jsonl")
    (trace,) = json.loads(traces.read_text(encoding="utf-8").splitlines()[-1])["traces"]
    rewards = {name: reward["score"] * reward["weight"] for name, reward in trace["rewards"].items()}
    return {"reward": sum(rewards.values()), **trace["metrics"], **rewards, "stop": trace["stop_condition"]}


def main() -> None:
    """Run all cases in both programs, and print the results and their differences."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--python", required=True, help="interpreter with verifiers, uv, textarena and nltk")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        library = Library(str(Path(args.python).absolute()), Path(folder))
        for name, text in (("vf_sum", SUM), ("vf_guess", GUESS), ("vf_count", COUNT)):
            (library.folder / f"{name}.py").write_text(text, encoding="utf-8")
        words = library.folder / "nltk/corpora/words"
        words.mkdir(parents=True)
        for file in ("en", "en-basic", "README"):
            (words / file).write_text("\n".join(WORDS.split()) + "\n", encoding="utf-8")
        os.environ["NLTK_DATA"] = str(library.folder / "nltk")
        with ThreadPoolExecutor(2 * len(CASES)) as pool:
            started = []
            for taskset, agent, task, turns in CASES:
                config, lines = library.write_config(taskset, agent), list[str]()
                bridge = pool.submit(run_in_bridge, library, config, task, turns, lines.append)
                vf_eval = pool.submit(run_vf_eval, library, config, task, turns)
                started.append((taskset, task, lines, bridge, vf_eval))
            num_different = 0
            for taskset, task, lines, bridge, vf_eval in started:
                ours, theirs = bridge.result(), vf_eval.result()
                print(f"{taskset}, task {task}", *lines, f"  {json.dumps(ours)}", sep="\n")
                print("  equal in vf-eval" if ours == theirs else f"  vf-eval: {json.dumps(theirs)}")
                num_different += ours != theirs
    print(f"{len(CASES)} episodes, {num_different} with another result in vf-eval")
    sys.exit(bool(num_different))


if __name__ == "__main__":
    main()
