"""What installed packages declare for us, found without importing any of them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Declared:
    """One entry point of an installed package, not imported yet."""

    name: str
    """What it is called."""
    reference: str
    """MODULE:NAME, or MODULE."""
    package: str
    """Package and version."""


def declared(group: str) -> list[Declared]:
    """Return what installed packages declare in a group of entry points, by name; nothing is imported."""
    from importlib.metadata import entry_points

    found = {Declared(p.name, p.value, f"{p.dist.name} {p.dist.version}" if p.dist else "unknown package")
             for p in entry_points(group=group)}
    return sorted(found, key=lambda d: (d.name, d.package))
