"""Tools and verifier of a resources server of NeMo Gym (`nemo_gym/base_resources_server.py`): `/seed_session`
begins an episode, `/TOOL` makes a call, `/verify` gives the reward.

A task is a row of the server's own data: `responses_create_params` with the conversation and tools, beside it
what the verifier reads.  The server tells episodes apart by a cookie; the state of an episode is the calls
that it made, and one that is continued makes them again in a new session.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_sov.base.errors import UserError
from megatron_sov.judge.rewards.reward import Score, short
from megatron_sov.judge.tools.environment import InfrastructureFault, Observation, Task, ToolFault
from megatron_sov.judge.tools.worlds.served import ServedWorld
from megatron_sov.work.endpoints.transport import missing_libraries

PARAMETERS = "responses_create_params"
SYSTEMS = ("system", "developer")
"""Roles of the rules."""
TIMEOUT_S = 600.0
"""Of a request; a call has the shorter limit of its episode."""


@dataclass
class NemoGym(ServedWorld):
    """One session of a resources server for each episode."""

    def reset(self, task: Task) -> Observation:
        """Begin an episode in a session of its own."""
        if missing := missing_libraries():
            raise UserError(missing[0])
        asked = task.get(PARAMETERS)
        if not isinstance(asked, dict):
            raise UserError(f"the task has no {PARAMETERS!r}: tasks are rows of a NeMo Gym server's data")
        system, user = _messages(asked.get("input"))
        system = "\n\n".join(filter(None, (asked.get("instructions"), system)))
        self._tools = [_described(tool) for tool in asked.get("tools") or []]
        self.task, self.state = task, {"calls": []}
        try:
            self._begin()
        except ToolFault as e:
            raise UserError(f"the NeMo Gym server at {self.url} cannot be used: {e.reason}") from None
        return Observation(user, system or self.system)

    def call(self, name: str, arguments: Mapping[str, Any]) -> str:
        self.refuse_unknown(name)
        text = self._call(name, arguments)
        self.state["calls"].append([name, dict(arguments), text])
        return text

    def score(self, answer: str) -> Score:
        """Return what the server's verifier gives for the calls and the answer."""
        output: list[dict[str, Any]] = []
        for number, (name, arguments, text) in enumerate(self.state["calls"]):
            call = {"call_id": f"call_{number}", "id": f"fc_{number}", "status": "completed"}
            output += [{**call, "type": "function_call", "name": name, "arguments": json.dumps(arguments)},
                       {**call, "type": "function_call_output", "output": text}]
        if answer:
            output.append({"type": "message", "id": "msg_0", "role": "assistant", "status": "completed",
                           "content": [{"type": "output_text", "text": answer, "annotations": []}]})
        response = {"id": "resp_0", "object": "response", "created_at": 0, "model": "policy",
                    "parallel_tool_calls": True, "tool_choice": "auto",
                    "tools": self.task[PARAMETERS].get("tools") or [], "output": output}
        verdict = self._json(self._post("verify", {**self.task, "response": response}))
        reward = verdict.get("reward")
        if not isinstance(reward, (int, float)):
            raise InfrastructureFault(f"/verify gives no reward but {short(repr(reward))}")
        if verdict.get("mask_sample"):
            raise InfrastructureFault(short(str(
                verdict.get("failure_reason") or verdict.get("failure_kind") or "/verify masks the episode")))
        parts = verdict.get("reward_components")
        return Score(float(reward), parts if isinstance(parts, dict) else {})

    def restore(self, state: Any) -> None:
        """Make the calls of a state in a new session, unless this one has made just them.

        Raises:
            InfrastructureFault: a call gave something else than before.
        """
        if state == self.state:
            return
        self._begin()
        for name, arguments, before in state["calls"]:
            if (now := self._call(name, arguments)) != before:
                raise InfrastructureFault(f"{name} does not repeat itself: {short(now)} in place of "
                                          f"{short(before)}")
        self.state = copy.deepcopy(state)

    def _begin(self) -> None:
        import httpx

        if (client := getattr(self, "_client", None)) is not None:
            client.close()
        # the session's cookie lives in the client; servers of worlds are beside the run, behind no proxy
        self._client = httpx.Client(base_url=self.url, timeout=TIMEOUT_S, trust_env=False)
        self._json(self._post("seed_session", dict(self.task)))

    def _call(self, name: str, arguments: Mapping[str, Any]) -> str:
        # also of an error: NeMo Gym's own agent shows what came, and its verifiers see the call
        return str(self._post(name, dict(arguments)).text)

    def _post(self, path: str, content: dict[str, Any]) -> Any:
        import httpx

        try:
            answer = self._client.post(f"/{path}", json=content)
        except httpx.HTTPError as e:
            raise InfrastructureFault(f"/{path} does not answer ({type(e).__name__})") from None
        # else its words would be a tool's result
        if 300 <= answer.status_code < 400:
            raise InfrastructureFault(f"/{path} sends elsewhere (HTTP {answer.status_code}), which is not "
                                      "followed")
        return answer

    def _json(self, answer: Any) -> dict[str, Any]:
        try:
            content = answer.json()
        except ValueError:
            content = None
        if answer.is_error or not isinstance(content, dict):
            raise InfrastructureFault(f"{answer.url.path} refuses (HTTP {answer.status_code}: "
                                      f"{short(answer.text)})")
        return content


def _messages(given: Any) -> tuple[str, str]:
    """Return rules and question of a conversation.

    Raises:
        UserError: it is none that begins an episode here.
    """
    messages = [{"role": "user", "content": given}] if isinstance(given, str) else given
    roles, texts = [], []
    for message in messages if isinstance(messages, list) else []:
        content = message.get("content") if isinstance(message, dict) else None
        if isinstance(content, list):
            content = "".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
        if not isinstance(content, str):
            break
        roles.append("system" if message.get("role") in SYSTEMS else message.get("role"))
        texts.append(content)
    if roles not in (["user"], ["system", "user"]) or len(roles) != len(messages):
        raise UserError(f"the task's {PARAMETERS}.input must be a text, or a question of the user with rules "
                        "before it at most")
    return ("", texts[0]) if len(texts) == 1 else (texts[0], texts[1])


def _described(tool: Any) -> dict[str, Any]:
    """Return a tool of the Responses API as chat templates show functions."""
    told = tool if isinstance(tool, dict) else {}
    # null: a function without arguments
    parameters = told.get("parameters", 0)
    parameters = {"type": "object", "properties": {}} if parameters is None else parameters
    if not isinstance(told.get("name"), str) or not isinstance(parameters, dict):
        raise UserError(f"the task's {PARAMETERS}.tools holds {short(repr(tool))}, which is no function")
    return {"type": "function", "function": {
        "name": told["name"], "description": told.get("description") or "", "parameters": parameters}}
