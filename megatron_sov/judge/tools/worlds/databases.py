"""Worlds whose state is tables: hotel rooms with guests and bookings of nights, and tickets of customers."""

from __future__ import annotations

import datetime
from dataclasses import dataclass
from typing import Any, Literal

from megatron_sov.judge.tools.environment import ToolRefused, tool
from megatron_sov.judge.tools.worlds.goals import Database

_ROOMS = {"R1": {"city": "Seoul", "beds": 1, "price": 90}, "R2": {"city": "Seoul", "beds": 2, "price": 140},
          "R3": {"city": "Busan", "beds": 2, "price": 110}}
_GUESTS = {"G1": {"name": "Kim Mina", "email": "mina@example.com"},
           "G2": {"name": "Lee Joon", "email": "joon@example.com"}}
_BOOKINGS = {"B1": {"guest": "G1", "room": "R1", "check_in": "2026-05-01", "check_out": "2026-05-03",
                    "status": "booked"}}
_HOTEL = {"rooms": _ROOMS, "guests": _GUESTS, "bookings": _BOOKINGS}


@dataclass
class Booking(Database):
    """Rooms are booked by the night; a room has one guest at a time."""

    SYSTEM = ("You work at the desk of a chain of hotels. Find the guest by e-mail first. Book, change and "
              "cancel only what the guest asks for. Days are written YYYY-MM-DD; a stay of one night ends "
              "on the next day. In the end tell the guest what you did, with the total price if you booked.")
    TABLES = ("rooms", "guests", "bookings")
    EXAMPLES = (
        {"question": "I am mina@example.com. Please book me the cheapest room for two in Busan from "
                     "2026-06-10 to 2026-06-12. What will it cost?", "tables": _HOTEL,
         "goal": {"calls": [{"name": "book_room", "arguments": {
             "guest_id": "G1", "room_id": "R3", "check_in": "2026-06-10", "check_out": "2026-06-12"}}],
             "answers": ["220"]}},
        {"question": "I am mina@example.com and cannot come in May. Cancel my booking.", "tables": _HOTEL,
         "goal": {"calls": [{"name": "cancel_booking", "arguments": {"booking_id": "B1"}}]}})

    @tool
    def find_guest(self, email: str) -> dict[str, Any]:
        """Find a guest and the guest's bookings.

        Args:
            email: the guest's address.
        """
        guests = self.found("guests", email=email)
        if not guests:
            raise ToolRefused(f"no guest has the address {email[:60]!r}")
        return {**guests[0], "bookings": self.found("bookings", guest=guests[0]["id"])}

    @tool
    def search_rooms(self, city: str, check_in: str, check_out: str, beds: int = 1) -> list[dict[str, Any]]:
        """Find the rooms of a city that are free on all nights of a stay.

        Args:
            city: where.
            check_in: first day.
            check_out: last day.
            beds: at least so many.
        """
        _nights(check_in, check_out)
        return [room for room in self.found("rooms", city=city)
                if room["beds"] >= beds and self._is_free(room["id"], check_in, check_out)]

    @tool
    def book_room(self, guest_id: str, room_id: str, check_in: str, check_out: str) -> dict[str, Any]:
        """Book a room.

        Args:
            guest_id: as find_guest gives it.
            room_id: as search_rooms gives it.
            check_in: first day.
            check_out: last day.
        """
        self.row("guests", guest_id)
        # both checks refuse by themselves, before anything has changed
        price = self.row("rooms", room_id)["price"] * _nights(check_in, check_out)
        if not self._is_free(room_id, check_in, check_out):
            raise ToolRefused(f"{room_id} is not free from {check_in} to {check_out}")
        key = self.add("bookings", "B", {"guest": guest_id, "room": room_id, "check_in": check_in,
                                         "check_out": check_out, "status": "booked"})
        return {"booking_id": key, "total_price": price}

    @tool
    def change_booking(self, booking_id: str, check_in: str, check_out: str) -> dict[str, Any]:
        """Move a booking to other days.

        Args:
            booking_id: which.
            check_in: first day.
            check_out: last day.
        """
        booking = self._booked(booking_id)
        nights = _nights(check_in, check_out)
        if not self._is_free(booking["room"], check_in, check_out, but=booking_id):
            raise ToolRefused(f"{booking['room']} is not free from {check_in} to {check_out}")
        booking |= {"check_in": check_in, "check_out": check_out}
        return {"booking_id": booking_id, "total_price": self.row("rooms", booking["room"])["price"] * nights}

    @tool
    def cancel_booking(self, booking_id: str) -> str:
        """Cancel a booking.

        Args:
            booking_id: which.
        """
        self._booked(booking_id)["status"] = "cancelled"
        return f"{booking_id} is cancelled"

    def _booked(self, booking_id: str) -> dict[str, Any]:
        booking = self.row("bookings", booking_id)
        if booking["status"] != "booked":
            raise ToolRefused(f"{booking_id} is {booking['status']} already")
        return booking

    def _is_free(self, room_id: str, check_in: str, check_out: str, but: str = "") -> bool:
        # days written YYYY-MM-DD are in order as texts
        return not any(key != but and b["room"] == room_id and b["status"] == "booked"
                       and b["check_in"] < check_out and check_in < b["check_out"]
                       for key, b in self.state["bookings"].items())


def _nights(check_in: str, check_out: str) -> int:
    days = []
    for day in (check_in, check_out):
        try:
            days.append(datetime.date.fromisoformat(day))
        except ValueError:
            days.append(datetime.date.min)
        # also 20260510, which Python reads as a day
        if days[-1].isoformat() != day:
            raise ToolRefused(f"{day[:40]!r} is no day written YYYY-MM-DD")
    if days[1] <= days[0]:
        raise ToolRefused(f"a stay from {check_in} to {check_out} has no night")
    return (days[1] - days[0]).days


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
