"""Text of strangers in Markdown, their media as addresses, and the hub's words for metadata."""

from __future__ import annotations

import base64
import html
import importlib.resources
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from megatron_sov.base.errors import visible

MAX_ROWS = 50
MAX_CHARS = 2_000
HUB_LICENCES = frozenset(json.loads(importlib.resources.files("megatron_sov.base.pages").joinpath(
    "hub_licences.json").read_text(encoding="utf-8")))
"""Licences that the hub knows (hub-docs, repositories-licenses.md); another one is "other" with a name."""
_SPECIAL = re.compile(r"[\\`*_\[\]|~$]|^[#+=-]|(?<=^\d)[.)]")
_LANGUAGE = re.compile(r"[a-z]{2,3}")


def md(text: object, chars: int = MAX_CHARS) -> str:
    """Return a text on one line that is text alone wherever Markdown is read."""
    # one line: a line break would end a table's row or begin a heading
    line = visible(" ".join(str(text).split()))
    line = line if len(line) <= chars else f"{line[:chars]} …"
    return _SPECIAL.sub(r"\\\g<0>", html.escape(line, quote=False))


def link(text: str) -> str:
    """Return a team's address as one that can be clicked; what is no web address stays text."""
    return f"<{text}>" if re.fullmatch(r"https?://[^\s<>\"'`\\|]+", text) else md(text)


def table(head: Sequence[str], rows: Iterable[Sequence[object]], most: int = MAX_ROWS) -> str:
    """Return a Markdown table; of many rows the first ones, and how many more there are."""
    all_rows = list(rows)
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    lines += [f"| {' | '.join(md(cell) for cell in row)} |" for row in all_rows[:most]]
    if len(all_rows) > most:
        lines.append(f"| … {len(all_rows) - most:,} more, in card.json |{' |' * (len(head) - 1)}")
    return "\n".join(lines)


def hub_licence(names: Iterable[str]) -> dict[str, str | list[str]]:
    """Return the hub's metadata of licences, as people name them; without any it is `unknown`."""
    given = list(names)
    known = sorted({name.lower() for name in given if name.lower() in HUB_LICENCES})
    others = sorted({name for name in given if name.lower() not in HUB_LICENCES})
    licences = [*known, *(["other"] if others else [])] or ["unknown"]
    return {"license": licences[0] if len(licences) == 1 else licences,
            **({"license_name": slug("-".join(others[:8]))} if others else {})}


def hub_languages(names: Iterable[str]) -> list[str]:
    return [name for name in names if _LANGUAGE.fullmatch(name) and name != "und"]


CARD_MARK = "megatron-sov card"
"""Stands in the metadata of every README of ours, so that `card` takes no other for one."""


def slug(text: str) -> str:
    """Return a name as the hub takes it."""
    return re.sub(r"[^a-z0-9.+-]+", "-", text.lower()).strip("-")[:96] or "other"


# Small pictures and sounds inside a page: addresses that hold their content, so that nothing is loaded.

MOST_BYTES = 200_000
"""Of one medium; a larger one is left out."""
_SIGNATURES = ((b"\x89PNG\r\n\x1a\n", "image/png"), (b"\xff\xd8\xff", "image/jpeg"))
_PICTURE = re.compile(r"data:image/(?:png|jpeg);base64,[A-Za-z0-9+/]+={0,2}")
_SOUND = re.compile(r"data:audio/wav;base64,[A-Za-z0-9+/]+={0,2}")
_MOST_CHARACTERS = MOST_BYTES * 4 // 3 + 100


def address_of(file: Path) -> str:
    """Return the content of a PNG, JPEG or WAV file as an address; "" where it is larger than `MOST_BYTES`,
    of another type by its first bytes, or cannot be read."""
    try:
        with open(file, "rb") as f:
            content = f.read(MOST_BYTES + 1)
    except OSError:
        return ""
    # by the first bytes and not by the name, which a stranger chose
    mime = next((mime for signature, mime in _SIGNATURES if content.startswith(signature)), "")
    if content[:4] == b"RIFF" and content[8:12] == b"WAVE":
        mime = "audio/wav"
    if not mime or len(content) > MOST_BYTES:
        return ""
    return f"data:{mime};base64,{base64.b64encode(content).decode()}"


def is_picture(address: object) -> bool:
    """Return whether something is the address of a picture as `address_of` gives it, and nothing else."""
    return _holds(_PICTURE, address)


def is_sound(address: object) -> bool:
    """Return whether something is the address of a sound as `address_of` gives it, and nothing else."""
    return _holds(_SOUND, address)


def _holds(pattern: re.Pattern[str], address: object) -> bool:
    return isinstance(address, str) and len(address) <= _MOST_CHARACTERS and bool(pattern.fullmatch(address))
