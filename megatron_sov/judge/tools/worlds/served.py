"""What worlds have in common that a server at an address plays: where it is, and the tools that it names."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any

from annotated_types import MinLen

from megatron_sov.base.settings import Bound, Breach, ProblemCode
from megatron_sov.judge.tools.environment import ToolFault, World, unknown
from megatron_sov.work.endpoints.transport import is_address


def no_address(text: str) -> Breach | None:
    return None if is_address(text) else (
        ProblemCode.RULE, "must be the address of a server", "such as http://localhost:8000")


@dataclass
class ServedWorld(World):
    """A world whose tools its server names, for each episode."""

    url: Annotated[str, MinLen(1), Bound(no_address)]
    """Address of the server, without a path."""
    system: str = ""
    """Rules for the model, where a task has none of its own."""
    _tools: list[dict[str, Any]] = field(default_factory=list, init=False, repr=False)
    """As OpenAI describes functions."""

    def rules(self) -> str:
        return self.system

    def tools(self) -> list[dict[str, Any]]:
        return self._tools

    def refuse_unknown(self, name: str) -> None:
        """Raise `ToolFault` where the server has no tool of a name."""
        names = [tool["function"]["name"] for tool in self._tools]
        if name not in names:
            raise ToolFault("unknown_tool", unknown(name, names))
