"""An environment in a process of its own: a tool that hangs, eats the machine or ends its process costs its
call and nothing else.

The state behind the last call lies here as JSON; where a process had to be ended, the next one goes on from
it.
"""

from __future__ import annotations

import json
from collections import deque
from dataclasses import asdict, dataclass
from typing import Any, Self, cast

from megatron_sov.base.errors import UserError, format_error
from megatron_sov.base.plugins.registry import PluginRequest
from megatron_sov.chat.tool_calls import ServedTurn, ToolCall
from megatron_sov.judge.rewards.reward import Result, shorten_reason, to_result
from megatron_sov.judge.tools.environment import (
    INFRASTRUCTURE, ConversingEnvironment, Environment, EpisodeLimits, InfrastructureFault, Observation, Task,
    ToolFault, cut_text, format_unknown_tool)
from megatron_sov.judge.tools.registry import BUILT_IN, build_environment
from megatron_sov.work.processes.children import MAX_MEMORY_BYTES, limit_memory
from megatron_sov.work.processes.workers import START_LIMIT_S, Answer, LostAnswer, Workers

_ANSWER_BYTES = 64 << 20
"""An answer's size beside the state's."""


@dataclass(frozen=True)
class CallResult:
    """What became of one call."""

    text: str
    """What the model is told."""
    fault: str = ""
    """One of `environment.FAULTS`; empty: the tool gave this."""
    is_cut: bool = False
    """Whether the tool said more."""


@dataclass(frozen=True)
class Opening:
    """How an episode begins."""

    observation: Observation
    """What the model is told."""
    tools: tuple[dict[str, Any], ...]
    """What it may call, as OpenAI describes functions."""


@dataclass(frozen=True)
class EnvironmentReply:
    """What became of a turn that an environment was told."""

    results: tuple[CallResult, ...] = ()
    """Of its calls, in order."""
    user: str | None = None
    """What a user says behind them; None: nothing."""
    is_over: bool = False
    """Whether the model is asked for no more."""


class EpisodeLost(UserError):
    """An episode cannot be continued, by no fault of its task: it has no reward."""


class _ProcessEnded(Exception):
    """The process did not answer: a fault's code and reason."""

    def __init__(self, code: str, reason: str) -> None:
        super().__init__(reason)
        self.code, self.reason = code, reason


class EnvironmentHost:
    """An environment that plays one episode at a time; a context, since its process has to end."""

    def __init__(self, request: PluginRequest, limits: EpisodeLimits) -> None:
        """Nothing is started yet.

        Args:
            request: which environment.
            limits: of calls and of what they leave.
        """
        self._asked, self._limits = request, limits
        self._workers = Workers(  # whose sandbox is a process of its own
            f"tool environment {request.name}", _start_environment,
            (request, {"max_tool_chars": limits.max_tool_chars, "max_state_bytes": limits.max_state_bytes}),
            modules=[module for module, _, _ in BUILT_IN.values()], may_start_processes=True,
            # the process runs code of others: its answers are bounded before they are read
            most_bytes=limits.max_state_bytes + _ANSWER_BYTES)
        self._task: Task = {}
        self.state = "null"
        """Of the environment behind the last call, as JSON."""
        self.converses = False
        """Whether the environment is told whole turns; known when an episode has begun."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.end()

    def end(self) -> None:
        """End the process without a word to servers that it has asked: their sessions stay.  The next episode
        begins another process."""
        self._workers.end()

    def reset(self, task: Task) -> Opening:
        """Begin an episode.

        Raises:
            UserError: the environment cannot be made, or the task is none of its own.
        """
        self._task = task
        answer = self._request_opening("reset", task=dict(task))
        return Opening(Observation(**answer["observation"]), tuple(answer["tools"]))

    def resume(self, task: Task, state: str) -> Opening:
        """Go on in an episode whose state is known; raises as `reset` does.

        Raises:
            EpisodeLost: the world cannot come to that state again.
        """
        # the task first: a state alone has no goal and no tools
        opening = self.reset(task)
        self._request_opening("restore", task=dict(task), state=json.loads(state))
        return opening

    def call(self, call: ToolCall) -> CallResult:
        """Return what a call gives, whatever the tool does."""
        try:
            answer = self._request("call", self._limits.call_timeout_s, name=call.name,
                                   arguments=call.arguments)
        except _ProcessEnded as gone:
            try:
                self._request_opening("restore", task=dict(self._task), state=json.loads(self.state))
            except UserError as e:  # it could before: nothing is known about the model's doing
                return CallResult(f"error: {call.name}: {gone.reason}, and {shorten_reason(str(e))}",
                                  INFRASTRUCTURE)
            return CallResult(f"error: {call.name}: {gone.reason}", gone.code)
        # a call that failed sends none: the state is what it was
        self.state = answer.get("state", self.state)
        return CallResult(answer["text"], answer["fault"], answer["is_cut"])

    def reply(self, turn: ServedTurn) -> EnvironmentReply:
        """Return what an environment that converses says behind a turn.

        Raises:
            InfrastructureFault: the episode cannot go on.
        """
        try:
            answer = self._request("reply", self._limits.call_timeout_s, turn=asdict(turn))
        except _ProcessEnded as gone:
            raise InfrastructureFault(f"the environment {gone.reason}") from None
        if "lost" in answer:
            raise InfrastructureFault(answer["lost"])
        self.state = answer["state"]
        results = tuple(CallResult(text, is_cut=is_cut) for text, is_cut in answer["results"])
        return EnvironmentReply(results, answer["user"], answer["is_over"])

    def score(self, answer: str) -> Result:
        try:
            result = self._request("score", self._limits.call_timeout_s, answer=answer)
        except _ProcessEnded as gone:
            return Result(None, "timeout" if gone.code == "timeout" else "failed", {}, gone.reason)
        return Result(result["reward"], result["status"], result["components"], result["reason"])

    def _request_opening(self, operation: str, **request: Any) -> dict[str, Any]:
        """Ask for what begins an episode, of a process that is started where there is none."""
        try:
            answer = self._request(operation, START_LIMIT_S, **request)
        except _ProcessEnded as gone:
            raise UserError(f"tool environment {self._asked.name}: {gone.reason} while an episode began; "
                            "see what it wrote above") from None
        if "problem" in answer:
            raise UserError(answer["problem"])
        if "lost" in answer:
            raise EpisodeLost(answer["lost"])
        self.state, self.converses = answer["state"], answer["converses"]
        return answer

    def _request(self, operation: str, timeout_s: float, **request: Any) -> dict[str, Any]:
        """Return what the process answers; it is ended where it does not."""
        ((_, answer),) = self._workers.answers(deque([(operation, {"what": operation, **request})]),
                                               timeout_s)
        if isinstance(answer, LostAnswer):
            raise (_ProcessEnded("timeout", f"took longer than {timeout_s:g} s") if answer.exit_code is None
                   else _ProcessEnded("ended", "ended its process"))
        return dict(answer)


def _start_environment(asked: PluginRequest, limits: dict[str, int]) -> Answer:
    """Return what does as it is asked, in the environment's process."""
    # without its version: to read all its code took most of the start
    environment = build_environment(asked)
    # behind that: making the world is not limited itself
    limit_memory(getattr(environment, "MAX_MEMORY_BYTES", MAX_MEMORY_BYTES))
    return lambda request, again: _REQUEST_HANDLERS[request.pop("what")](environment, request | limits)


def _reset_environment(environment: Environment, request: dict[str, Any]) -> dict[str, Any]:
    try:
        observation = environment.reset(request["task"])
        observed = {"user": observation.user, "system": observation.system}
        return {"observation": observed, "tools": list(environment.tools()),
                "converses": hasattr(environment, "reply"), "state": _dump_state(environment, request)}
    except UserError as e:
        return {"problem": str(e)}
    except (Exception, SystemExit) as e:
        return {"problem": f"tool environment {type(environment).__name__}: the task "
                           f"{shorten_reason(json.dumps(request['task']))} makes it fail ({format_error(e)})"}


def _restore_environment(environment: Environment, request: dict[str, Any]) -> dict[str, Any]:
    answer = _reset_environment(environment, request)
    if "problem" in answer:
        return answer
    try:
        environment.restore(request["state"])
        return answer | {"state": _dump_state(environment, request)}
    except ToolFault as e:  # also of a call that is made again, and was granted before
        return {"lost": e.reason}
    except (Exception, SystemExit) as e:
        return {"problem": f"tool environment {type(environment).__name__}: its state "
                           f"{shorten_reason(json.dumps(request['state']))} makes it "
                           f"fail ({format_error(e)})"}


def _call_tool(environment: Environment, request: dict[str, Any]) -> dict[str, Any]:
    """Make a call; one that gives no result leaves the state as it was."""
    # before each call, since a tool may fail half way through its changes
    before = environment.snapshot()
    try:
        text, is_cut = _format_value(_get_call_value(environment, request), request["max_tool_chars"])
        return {"text": text, "is_cut": is_cut, "fault": "", "state": _dump_state(environment, request)}
    except ToolFault as e:
        fault = e
    except MemoryError:
        fault = ToolFault("memory", "asked for more memory than it may have")
    except (Exception, SystemExit) as e:
        fault = ToolFault("failed", f"failed ({shorten_reason(format_error(e))})")
    # also where the result could not be shown: the model must not see a state that no call explains
    environment.restore(before)
    problem = fault.reason if fault.code in ("unknown_tool", "arguments") else (
        f"{request['name']}: {fault.reason}")
    text, is_cut = _format_value(f"error: {problem}", request["max_tool_chars"])
    return {"text": text, "is_cut": is_cut, "fault": fault.code}


def _get_reply(environment: Environment, request: dict[str, Any]) -> dict[str, Any]:
    try:
        reply = cast(ConversingEnvironment, environment).reply(ServedTurn.from_dict(request["turn"]))
        results = [_format_value(text, request["max_tool_chars"]) for text in reply.results]
        return {"results": results, "user": reply.user, "is_over": reply.is_over,
                "state": _dump_state(environment, request)}
    except ToolFault as e:
        return {"lost": e.reason}
    except (Exception, SystemExit) as e:  # MemoryError too: half a conversation cannot go on
        return {"lost": f"failed ({shorten_reason(format_error(e))})"}


def _get_call_value(environment: Environment, request: dict[str, Any]) -> Any:
    # by what this episode shows, not by what the class has: tools may depend on the task
    names = [tool["function"]["name"] for tool in environment.tools()]
    if request["name"] not in names:
        raise ToolFault("unknown_tool", format_unknown_tool(request["name"], names))
    return environment.call(request["name"], request["arguments"])


def _format_value(value: Any, max_chars: int) -> tuple[str, bool]:
    if not isinstance(value, str):
        try:
            value = json.dumps(value, ensure_ascii=False, allow_nan=False)
        except (TypeError, ValueError, RecursionError) as e:
            raise ToolFault("result",
                            f"returned something that is no JSON ({shorten_reason(str(e))})") from None
    text, is_cut = cut_text(value, max_chars)
    return text.encode("utf-8", "replace").decode(), is_cut  # half a surrogate pair is no text


def _dump_state(environment: Environment, request: dict[str, Any]) -> str:
    try:
        state = json.dumps(environment.snapshot(), allow_nan=False)
    except (TypeError, ValueError, RecursionError) as e:
        raise ToolFault("state", f"left a state that is no JSON ({shorten_reason(str(e))})") from None
    # ASCII by json.dumps: characters are bytes
    if len(state) > request["max_state_bytes"]:
        raise ToolFault("state", f"left a state of {len(state):,} bytes, more than "
                                 f"{request['max_state_bytes']:,}")
    return state


def _score_episode(environment: Environment, request: dict[str, Any]) -> dict[str, Any]:
    try:
        result = to_result(environment.score(request["answer"]))
    except MemoryError:
        result = Result(None, "failed", {}, "asked for more memory than it may have")
    except InfrastructureFault as e:
        result = Result(None, "failed", {}, e.reason)
    except (Exception, SystemExit) as e:
        result = Result(None, "failed", {}, shorten_reason(format_error(e)))
    return {"reward": result.reward, "status": result.status, "components": dict(result.components),
            "reason": result.reason}


_REQUEST_HANDLERS = {"reset": _reset_environment, "restore": _restore_environment, "call": _call_tool,
                     "reply": _get_reply, "score": _score_episode}
