"""Tickets of customers: who has which trouble, who cares for it, and how it ended."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from megatron_sov.judge.tools.faults import ToolRefused
from megatron_sov.judge.tools.schema import tool
from megatron_sov.judge.tools.worlds.goals import Database

Status = Literal["open", "waiting", "closed"]
_DESK = {
    "customers": {"C1": {"name": "Somchai", "plan": "basic"}, "C2": {"name": "Mina", "plan": "business"}},
    "agents": {"A1": {"name": "Ann", "team": "billing"}, "A2": {"name": "Bo", "team": "network"}},
    "tickets": {
        "T1": {"customer": "C1", "title": "Charged twice in March", "priority": 2, "status": "open",
               "agent": None, "notes": []},
        "T2": {"customer": "C2", "title": "Router restarts every night", "priority": 2, "status": "open",
               "agent": None, "notes": []},
        "T3": {"customer": "C2", "title": "Router restarts at night", "priority": 3, "status": "open",
               "agent": None, "notes": []}}}


@dataclass
class Tickets(Database):
    """Rules: a ticket goes to an agent of the team that fits; a closed one is not changed."""

    SYSTEM = ("You sort customers' tickets. Trouble with money is for the team billing, trouble with devices "
              "and lines for the team network. Tickets of business customers have priority 1. A ticket that "
              "says the same as an earlier one of the same customer is closed, with the note "
              "'duplicate of' and the earlier one's id. In the end say which tickets you changed.")
    TABLES = ("customers", "agents", "tickets")
    EXAMPLES = (
        {"question": "Please care for ticket T1.", "tables": _DESK,
         "goal": {"calls": [{"name": "assign_ticket", "arguments": {"ticket_id": "T1", "agent_id": "A1"}}],
                  "answers": ["T1"]}},
        {"question": "Please care for Mina's tickets.", "tables": _DESK,
         "goal": {"calls": [
             {"name": "assign_ticket", "arguments": {"ticket_id": "T2", "agent_id": "A2"}},
             {"name": "set_priority", "arguments": {"ticket_id": "T2", "priority": 1}},
             {"name": "close_ticket", "arguments": {"ticket_id": "T3", "note": "duplicate of T2"}}],
             "answers": ["T2", "T3"]}})

    @tool
    def find_tickets(self, customer: str | None = None, status: Status | None = None) -> list[dict[str, Any]]:
        """List tickets.

        Args:
            customer: of the customer with this name.
            status: with this status.
        """
        ids = [c["id"] for c in self.found("customers", name=customer)]
        return [t for t in self.found("tickets", status=status) if customer is None or t["customer"] in ids]

    @tool
    def get_customer(self, customer_id: str) -> dict[str, Any]:
        """Show a customer.

        Args:
            customer_id: as tickets name it.
        """
        return {"id": customer_id, **self.row("customers", customer_id)}

    @tool
    def list_agents(self) -> list[dict[str, Any]]:
        """List the agents and their teams."""
        return self.found("agents")

    @tool
    def assign_ticket(self, ticket_id: str, agent_id: str) -> str:
        """Give a ticket to an agent.

        Args:
            ticket_id: which.
            agent_id: whose it will be.
        """
        self.row("agents", agent_id)
        self._open(ticket_id)["agent"] = agent_id
        return f"{ticket_id} is {agent_id}'s"

    @tool
    def set_priority(self, ticket_id: str, priority: Literal[1, 2, 3]) -> str:
        """Set how urgent a ticket is.

        Args:
            ticket_id: which.
            priority: 1 is the most urgent.
        """
        self._open(ticket_id)["priority"] = priority
        return f"{ticket_id} has priority {priority}"

    @tool
    def close_ticket(self, ticket_id: str, note: str) -> str:
        """Close a ticket.

        Args:
            ticket_id: which.
            note: why.
        """
        ticket = self._open(ticket_id)
        ticket["notes"].append(note)
        ticket["status"] = "closed"
        return f"{ticket_id} is closed"

    def _open(self, ticket_id: str) -> dict[str, Any]:
        ticket = self.row("tickets", ticket_id)
        if ticket["status"] == "closed":
            raise ToolRefused(f"{ticket_id} is closed")
        return ticket
