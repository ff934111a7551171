"""Escape untrusted text for Markdown."""

import html
import re

from megatron_sov.base.errors import escape_controls

MAX_CHARS = 2_000
_SPECIAL = re.compile(r"[\\`*_\[\]|~$]|^[#+=-]|(?<=^\d)[.)]")


def escape_md(text: object, chars: int = MAX_CHARS) -> str:
    """Escape a text for a Markdown line, shortened to `chars` characters."""
    # one line: a line break would end a table row or begin a heading
    line = escape_controls(" ".join(str(text).split()))
    line = line if len(line) <= chars else f"{line[:chars]} …"
    return _SPECIAL.sub(r"\\\g<0>", html.escape(line, quote=False))
