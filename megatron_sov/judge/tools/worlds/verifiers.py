"""Environments from the library `verifiers` (0.4): tasksets with harness, tools, users and rewards.

The library runs in its own Python (`verifiers_bridge.py`) and requests each model turn from a chat endpoint.
The new messages in a request are shown to the model; the model's turn is the answer. The library runs the
calls, plays the user, and computes the reward.

The library's world cannot be saved: the state holds the turns and replies, and resuming replays them, which
must give the same replies.
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

from annotated_types import MinLen

from megatron_sov.base.artifacts import hash_file
from megatron_sov.base.errors import UserError
from megatron_sov.base.settings import Bound, ProblemCode, Violation
from megatron_sov.chat.tool_calls import ServedTurn
from megatron_sov.judge.rewards.reward import Score, shorten_reason
from megatron_sov.judge.rewards.version import hash_code
from megatron_sov.judge.tools.environment import InfrastructureFault, Observation, Task, TurnReply, World
from megatron_sov.work.processes.children import foreign_environment
from megatron_sov.work.processes.supervisor import SupervisedCommand

MAX_LINE_BYTES = 256 << 20
"""Longest message from the library's process."""
BRIDGE = __name__ + "_bridge"
"""Module run by the library's Python."""
SYSTEM_ROLES = ("system", "developer")
"""Roles that carry rules."""
NETWORK_VARIABLES = ("SSL_CERT_FILE", "SSL_CERT_DIR", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy",
                     "https_proxy", "no_proxy", "UV_INDEX_URL", "UV_DEFAULT_INDEX")
"""Variables that uv needs for a proxy."""


def find_program_problem(command: tuple[str, ...]) -> Violation | None:
    return None if not command or shutil.which(command[0]) else (
        ProblemCode.FILE, "names no program that is on PATH", 'write it as ["program", "argument"]')


def find_variable_problem(name: str) -> Violation | None:
    return None if name in os.environ else (
        ProblemCode.RULE, "is not set in this environment", "set it, or leave it out")


def _find_config_problem(text: str) -> Violation | None:
    return None if Path(text).is_file() and text.endswith((".toml", ".json")) else (
        ProblemCode.FILE, "is no file in TOML or JSON", "name settings of vf-eval, with a table `env`")


@dataclass
class Verifiers(World):
    """An environment from `verifiers`; a task is an index into its taskset."""

    EXAMPLES = ({"task": 0},)
    MAX_MEMORY_BYTES = 0
    """No limit for the library, its programs and servers."""

    config: Annotated[str, MinLen(1), Bound(_find_config_problem)]
    """`vf-eval` settings file: its table `env` names taskset, harness and location. Modules next to the file
    are importable."""
    python: Annotated[str, MinLen(1), Bound(lambda text: find_program_problem((text,)))] = "python3"
    """Python interpreter with `verifiers`."""
    repeat: bool = False
    """Calls may be repeated when an episode resumes: only for tools without effects outside the episode.
    Otherwise a resumed episode with calls has no reward."""
    env: tuple[Annotated[str, Bound(find_variable_problem)], ...] = ()
    """Environment variables passed to the library, e.g. a judge's key, besides HOME, LOGNAME, PATH, SHELL,
    TERM and USER."""
    _tools: list[dict[str, Any]] = field(default_factory=list, init=False, repr=False)
    _seen: list[dict[str, Any]] = field(default_factory=list, init=False, repr=False)
    """Conversation that the next request must extend."""

    def __post_init__(self) -> None:
        self._bridge: SupervisedCommand | None = None  # not a field, because fields are settings

    def inputs(self) -> dict[str, Any]:
        """Return version inputs: settings file and bridge code."""
        return {"config": hash_file(Path(self.config)), "bridge": hash_code(BRIDGE)}

    def reset(self, task: Task) -> Observation:
        """Begin an episode on a task."""
        number = task.get("task")
        if isinstance(number, bool) or not isinstance(number, int) or number < 0:
            raise UserError('the task has no number: write {"task": 0} for the first one of the taskset')
        self._seen, self._tools = [], []
        try:
            self._start_bridge()
            request = self._exchange({"task": number})
            self._tools = request["tools"]
            system, user = _split_opening(request["messages"])
        except InfrastructureFault as e:
            raise UserError(f"the environment of {self.config} cannot be played: {e.reason}") from None
        self._seen = request["messages"]
        self.task, self.state = task, {"opening": [system, user], "turns": [], "replies": [], "result": None}
        return Observation(user, system)

    def tools(self) -> list[dict[str, Any]]:
        return self._tools

    def reply(self, turn: ServedTurn) -> TurnReply:
        """Return the environment's reply to a turn."""
        message = _to_message(turn, len(self.state["turns"]))
        request = self._exchange({"answer": message})
        self.state["turns"].append(asdict(turn))
        if "end" in request:
            self.state["result"], reply = request["end"], TurnReply(is_over=True)
        else:
            reply = _parse_reply(_get_new_messages(request["messages"], [*self._seen, message]), message)
            if request["tools"] != self._tools:
                raise InfrastructureFault("the environment changes its tools in the middle of an episode, "
                                          "which the prompt before has shown already")
            self._seen = request["messages"]
        self.state["replies"].append(asdict(reply))
        return reply

    def score(self, answer: str) -> Score:
        """Return the environment's reward; after a limit, first report that the model stops."""
        if (result := self.state["result"]) is None:
            result = self._exchange({"stop": True}).get("end")
        if result is None:
            raise InfrastructureFault("the environment goes on where the model can write no more")
        return Score(result["reward"], {**result["components"], "stop": result["stop"]})

    def restore(self, state: Any) -> None:
        """Replay the turns in a state, unless this process already played them.

        Raises:
            InfrastructureFault: the replies differ, or calls may have had effects.
        """
        if state == self.state:
            return
        if state["result"] is None:
            if not self.repeat and any(turn["calls"] for turn in state["turns"]):
                raise InfrastructureFault("the calls of the episode may have acted on the world; set "
                                          "repeat=true where they can be made again")
            if self.state["turns"]:
                self.reset(self.task)
            for turn in state["turns"]:
                self.reply(ServedTurn.from_dict(turn))
            # Through JSON, like the stored state.
            if json.loads(json.dumps(self.state)) != state:
                raise InfrastructureFault("the environment does not repeat itself: its conversation is "
                                          "another one than before")
        self.state = copy.deepcopy(state)

    # The library's process.

    def end(self) -> None:
        """End the process, which also ends with this one."""
        if self._bridge is not None:
            self._bridge.end()
            self._bridge = None

    def _start_bridge(self) -> None:
        """Start the bridge unless it is running."""
        if self._bridge is not None:
            return
        program, folder = shutil.which(self.python) or self.python, str(Path(self.config).resolve().parent)
        variables = foreign_environment(self.env)
        # Programs next to the library's Python first, such as uv.
        path = os.pathsep.join((str(Path(program).absolute().parent), variables.get("PATH", os.defpath)))
        bridge = Path(__file__).with_name("verifiers_bridge.py")
        # -P: modules in this folder would shadow other packages.
        self._bridge = SupervisedCommand([program, "-P", str(bridge), self.config],
                                         {**variables, "PATH": path, "PYTHONPATH": folder}, None)
        message = self._receive()
        if "ready" not in message:
            self.end()
            raise InfrastructureFault(shorten_reason(str(message.get("problem"))) + self._describe_withheld())

    def _describe_withheld(self) -> str:
        """Describe network variables that were not passed to the library."""
        names = [name for name in NETWORK_VARIABLES if name in os.environ and name not in self.env]
        return (f"; it was not given {', '.join(names)} of this environment: where it needs the network, as "
                f"uv does, set env={json.dumps([*self.env, *names])}" if names else "")

    def _exchange(self, line: dict[str, Any]) -> dict[str, Any]:
        """Send a message; return the next request to the model, or the end.

        Raises:
            InfrastructureFault: the environment cannot continue.
        """
        assert self._bridge is not None
        with contextlib.suppress(OSError):  # the process ended; the missing answer reports it
            self._bridge.stdin.write(json.dumps(line).encode() + b"\n")
            self._bridge.stdin.flush()
        answer = self._receive()
        if "end" in answer:
            return answer
        if "request" not in answer:
            raise InfrastructureFault(shorten_reason(str(answer.get("error"))) + self._describe_withheld())
        request = answer["request"]
        return {"messages": [_simplify_message(message) for message in request["messages"]],
                "tools": request["tools"]}

    def _receive(self) -> dict[str, Any]:
        assert self._bridge is not None
        line = self._bridge.stdout.readline(MAX_LINE_BYTES)
        try:
            message = json.loads(line)
        except ValueError:
            message = None
        if not isinstance(message, dict):
            raise InfrastructureFault(f"{self.python} wrote a line that is not a message" if line else
                                      f"{self.python} has ended; see its output above"
                                      f"{self._describe_withheld()}")
        return message


def _simplify_message(message: Mapping[str, Any]) -> dict[str, Any]:
    """Reduce a chat completions message to its content and calls.

    Raises:
        InfrastructureFault: the content is not text.
    """
    content = message.get("content") or ""
    if isinstance(content, list):
        if any(part.get("type") != "text" for part in content):
            raise InfrastructureFault("the environment shows more than text, which no model is shown")
        content = "".join(part["text"] for part in content)
    simplified = {"role": "system" if message.get("role") in SYSTEM_ROLES else message.get("role"),
                  "content": content}
    if calls := message.get("tool_calls"):
        simplified["tool_calls"] = [{"id": call["id"], "type": "function", "function": {
            "name": call["function"]["name"], "arguments": call["function"]["arguments"]}} for call in calls]
    return simplified | ({"tool_call_id": message["tool_call_id"]} if message.get("role") == "tool" else {})


def _split_opening(messages: Sequence[Mapping[str, Any]]) -> tuple[str, str]:
    """Return the opening's rules and question."""
    roles = [message["role"] for message in messages]
    if roles not in (["user"], ["system", "user"]):
        raise InfrastructureFault(f"it begins with messages of {', '.join(map(str, roles)) or 'nobody'}; it "
                                  "must with a question of the user, rules before it at most")
    return (messages[0]["content"] if len(roles) == 2 else "", messages[-1]["content"])


def _to_message(turn: ServedTurn, number: int) -> dict[str, Any]:
    """Convert a turn to a chat completions message."""
    calls = [{"id": f"call_{number}_{place}", "type": "function", "function": {
        "name": call.name, "arguments": json.dumps(call.arguments, ensure_ascii=False)}}
        for place, call in enumerate(turn.calls)]
    return {"role": "assistant", "content": turn.content,
            **({"reasoning_content": turn.thoughts} if turn.thoughts else {}),
            **({"tool_calls": calls} if calls else {})}


def _get_new_messages(messages: list[dict[str, Any]],
                      before: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the messages after a known conversation.

    Raises:
        InfrastructureFault: the conversation was rewritten.
    """
    earlier = [_simplify_message(message) for message in before]
    if messages[:len(earlier)] == earlier:
        return messages[len(earlier):]
    place = next((n for n, (now, was) in enumerate(zip(messages, earlier, strict=False)) if now != was),
                 min(len(messages), len(earlier)))
    raise InfrastructureFault(f"the environment rewrites the conversation from message {place + 1} on (a "
                              "compaction, a second run or another agent): the tokens that the model wrote "
                              "would be trained behind others than it has read")


def _parse_reply(more: Sequence[Mapping[str, Any]], message: Mapping[str, Any]) -> TurnReply:
    """Parse the messages after a turn: results in call order, then optionally a user message."""
    calls = [call["id"] for call in message.get("tool_calls", [])]
    results, rest = more[:len(calls)], more[len(calls):]
    if [result.get("tool_call_id") for result in results] != calls or len(rest) > 1 or any(
            new["role"] != "user" for new in rest) or not more:
        raise InfrastructureFault(
            f"behind a turn with {len(calls)} calls the environment has messages of "
            f"{', '.join(str(new['role']) for new in more) or 'nobody'}; it must have a result for each "
            "call in order, and a message of the user at most")
    return TurnReply(tuple(result["content"] for result in results), rest[0]["content"] if rest else None)
