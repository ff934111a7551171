"""Addresses of endpoints, as people write them."""

from __future__ import annotations

from urllib.parse import urlsplit

from megatron_sov.base.settings import ProblemCode, SettingsProblem


def is_address(text: str) -> bool:
    """Return whether a text begins as an address, and is no path."""
    return text.startswith(("http://", "https://"))


def address_problems(field: str, text: str, key_field: str) -> list[SettingsProblem]:
    """Return what is wrong with an address up to `/v1`; it is not quoted, for it may hold a key.

    Args:
        field: that holds it.
        text: as it was written.
        key_field: that names the variable of the key.
    """
    p = []
    try:
        parts = urlsplit(text)
        is_sound = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # brackets that are not closed, a port that is none
        parts, is_sound = urlsplit(""), False
    if not is_sound:
        p.append("must be an address such as http://localhost:8000/v1")
    if parts.path.rstrip("/").endswith("/completions"):
        p.append("must end before /chat/completions, which is added to it, such as "
                 "http://localhost:8000/v1")
    if parts.username or parts.password or parts.query:
        p.append("holds a key or a query, which would come into files; put the key into the "
                 f"environment and name its variable with {key_field}")
    return [SettingsProblem(ProblemCode.RULE, field, rule) for rule in p]
