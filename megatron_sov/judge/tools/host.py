"""Run an environment in a child process, so that a tool that hangs, exhausts memory or exits only affects its
call.

The state after the last call is held here as JSON, so that a new process can continue after a crash.
"""

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
"""Size of an answer beyond the state."""


@dataclass(frozen=True)
class CallResult:
    """Result of a call."""

    text: str
    """Text for the model."""
    fault: str = ""
    """Key of `environment.FAULTS`, or ""."""
    is_cut: bool = False
    """The text was cut."""


@dataclass(frozen=True)
class Opening:
    """Start of an episode."""

    observation: Observation
    """First messages."""
    tools: tuple[dict[str, Any], ...]
    """Tools in OpenAI's format."""


@dataclass(frozen=True)
class EnvironmentReply:
    """Reply of a conversing environment."""

    results: tuple[CallResult, ...] = ()
    """Results of the calls, in order."""
    user: str | None = None
    """User message, if any."""
    is_over: bool = False
    """The episode is over."""


class EpisodeLost(UserError):
    """The episode cannot continue, through no fault of its task, and has no reward."""


class _ProcessEnded(Exception):
    """The process did not answer; fault code and reason."""

    def __init__(self, code: str, reason: str) -> None:
        super().__init__(reason)
        self.code, self.reason = code, reason


class EnvironmentHost:
    """Runs an environment in a child process, one episode at a time."""

    def __init__(self, request: PluginRequest, limits: EpisodeLimits) -> None:
        """Prepare without starting the process.

        Args:
            request: the environment.
            limits: limits for calls and state.
        """
        self._asked, self._limits = request, limits
        self._workers = Workers(  # sandboxes are processes too
            f"tool environment {request.name}", _start_environment,
            (request, {"max_tool_chars": limits.max_tool_chars, "max_state_bytes": limits.max_state_bytes}),
            modules=[module for module, _, _ in BUILT_IN.values()], may_start_processes=True,
            # The process runs foreign code, so its answers are bounded.
            most_bytes=limits.max_state_bytes + _ANSWER_BYTES)
        self._task: Task = {}
        self.state = "null"
        """State (`snapshot`) after the last call, as JSON."""
        self.converses = False
        """The environment takes whole turns; set by `reset`."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.end()

    def end(self) -> None:
        """End the process without notifying servers, whose sessions remain. The next episode starts a new
        process."""
        self._workers.end()

    def reset(self, task: Task) -> Opening:
        """Begin an episode.

        Raises:
            UserError: the environment cannot be built, or the task does not fit.
        """
        self._task = task
        answer = self._request_opening("reset", task=dict(task))
        return Opening(Observation(**answer["observation"]), tuple(answer["tools"]))

    def resume(self, task: Task, state: str) -> Opening:
        """Continue an episode from its state; raises like `reset`.

        Raises:
            EpisodeLost: the environment cannot reach the state.
        """
        # Task first, because the state has no goal and no tools.
        opening = self.reset(task)
        self._request_opening("restore", task=dict(task), state=json.loads(state))
        return opening

    def call(self, call: ToolCall) -> CallResult:
        """Call a tool; failures become results with a fault."""
        try:
            answer = self._request("call", self._limits.call_timeout_s, name=call.name,
                                   arguments=call.arguments)
        except _ProcessEnded as gone:
            try:
                self._request_opening("restore", task=dict(self._task), state=json.loads(self.state))
            except UserError as e:  # restoring worked before, so the machine is at fault
                return CallResult(f"error: {call.name}: {gone.reason}, and {shorten_reason(str(e))}",
                                  INFRASTRUCTURE)
            return CallResult(f"error: {call.name}: {gone.reason}", gone.code)
        # Failed calls have no state: it is unchanged.
        self.state = answer.get("state", self.state)
        return CallResult(answer["text"], answer["fault"], answer["is_cut"])

    def reply(self, turn: ServedTurn) -> EnvironmentReply:
        """Return a conversing environment's reply to a turn.

        Raises:
            InfrastructureFault: the episode cannot continue.
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
        """Send a request that begins or resumes an episode, starting a process if needed."""
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
        """Send a request and return the answer; end the process on a timeout."""
        ((_, answer),) = self._workers.answers(deque([(operation, {"what": operation, **request})]),
                                               timeout_s)
        if isinstance(answer, LostAnswer):
            raise (_ProcessEnded("timeout", f"took longer than {timeout_s:g} s") if answer.exit_code is None
                   else _ProcessEnded("ended", "ended its process"))
        return dict(answer)


def _start_environment(environment_request: PluginRequest, limits: dict[str, int]) -> Answer:
    """Build the environment in the child process; return the request handler."""
    # Without its version, because hashing the code would dominate the start.
    environment = build_environment(environment_request)
    # Afterwards, because building the environment is not limited.
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
    except ToolFault as e:  # also for a repeated call that worked before
        return {"lost": e.reason}
    except (Exception, SystemExit) as e:
        return {"problem": f"tool environment {type(environment).__name__}: its state "
                           f"{shorten_reason(json.dumps(request['state']))} makes it "
                           f"fail ({format_error(e)})"}


def _call_tool(environment: Environment, request: dict[str, Any]) -> dict[str, Any]:
    """Run a call; restore the state if it has no result."""
    # Before each call, because a tool may fail halfway.
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
    # Also if the result could not be formatted: no call would explain the new state.
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
    except (Exception, SystemExit) as e:  # MemoryError too: a broken conversation cannot continue
        return {"lost": f"failed ({shorten_reason(format_error(e))})"}


def _get_call_value(environment: Environment, request: dict[str, Any]) -> Any:
    # By the episode's tools, which may depend on the task.
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
    return text.encode("utf-8", "replace").decode(), is_cut  # lone surrogates are not valid UTF-8


def _dump_state(environment: Environment, request: dict[str, Any]) -> str:
    try:
        state = json.dumps(environment.snapshot(), allow_nan=False)
    except (TypeError, ValueError, RecursionError) as e:
        raise ToolFault("state", f"left a state that is no JSON ({shorten_reason(str(e))})") from None
    # json.dumps writes ASCII, so characters are bytes.
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
