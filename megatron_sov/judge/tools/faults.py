"""What can go wrong with a call, as a model is told it and as it is counted."""

from __future__ import annotations

FAULTS = {
    "json": "the call is no JSON", "form": "the call is no object of a name and arguments",
    "unclosed": "nothing ends the call", "many": "more calls in a turn than the limit",
    "unknown_tool": "there is no tool of that name", "arguments": "arguments are missing, unknown or of "
    "another type", "refused": "the tool says no: no such row, a rule of the world is broken",
    "failed": "the tool raised an error", "result": "the tool returned something that is no JSON",
    "timeout": "the tool took longer than the limit", "memory": "the tool asked for too much memory",
    "ended": "the tool ended its process", "state": "the tool left a state that is no JSON, or too large",
    "infrastructure": "what the tool runs on is broken: the episode has no reward",
}
"""Code -> what it means."""
BY_THE_MODEL = ("json", "form", "unclosed", "many", "unknown_tool", "arguments")
"""Codes of calls that never reached a tool."""
INFRASTRUCTURE = "infrastructure"


class ToolFault(Exception):
    """A call that gave no result."""

    def __init__(self, code: str, reason: str) -> None:
        """`code`: one of `FAULTS`; `reason`: one sentence, which the model is told."""
        super().__init__(reason)
        self.code, self.reason = code, reason


class ToolRefused(ToolFault):
    """What a tool raises to say no to a model: no such row, a rule of the world is broken."""

    def __init__(self, reason: str) -> None:
        super().__init__("refused", reason)


class InfrastructureFault(ToolFault):
    """What a tool raises when the machine, and not the call, is at fault: the episode has no reward."""

    def __init__(self, reason: str) -> None:
        super().__init__(INFRASTRUCTURE, reason)
