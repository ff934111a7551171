"""Text of strangers in Markdown, and their media as addresses."""

from __future__ import annotations

import base64
import html
import re
from pathlib import Path

from megatron_sov.base.errors import visible

MAX_CHARS = 2_000
_SPECIAL = re.compile(r"[\\`*_\[\]|~$]|^[#+=-]|(?<=^\d)[.)]")


def md(text: object, chars: int = MAX_CHARS) -> str:
    """Return a text on one line that is text alone wherever Markdown is read."""
    # one line: a line break would end a table's row or begin a heading
    line = visible(" ".join(str(text).split()))
    line = line if len(line) <= chars else f"{line[:chars]} …"
    return _SPECIAL.sub(r"\\\g<0>", html.escape(line, quote=False))


# Small pictures and sounds inside a page: addresses that hold their content, so that nothing is loaded.

MOST_BYTES = 200_000
"""Of one medium; a larger one is left out."""
_SIGNATURES = ((b"\x89PNG\r\n\x1a\n", "image/png"), (b"\xff\xd8\xff", "image/jpeg"))
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


def is_sound(address: object) -> bool:
    """Return whether something is the address of a sound as `address_of` gives it, and nothing else."""
    return isinstance(address, str) and len(address) <= _MOST_CHARACTERS and bool(_SOUND.fullmatch(address))
