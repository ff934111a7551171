"""Split patterns of tiktoken (fancy-regex) for `tokenizers` (Oniguruma, Ruby's syntax): the same signs,
not the same sense.

Where the two differ, silently:

- `X{1,3}+` is possessive in fancy-regex; in Ruby's syntax it is a repetition of `X{1,3}`, so all digits
  become one piece.  The atomic group `(?>X{1,3})` means the same in both.
- `$` and `^` are the ends of the text in fancy-regex, of a line in Ruby; `\\z` and `\\A` are the ends
  of the text in both.
"""

from __future__ import annotations

import re

_ATOM_OR_SIGN = re.compile(
    r"(?P<atom>\\[pP]\{[^}]*\}|\\x\{[^}]*\}|\\.|[^\\\[\](){}|^$*+?])"  # a class, an escape, a character
    r"|(?P<interval>\{\d*,?\d*\}\+)"
    r"|(?P<quantifier>\{\d*,?\d*\}\??|[*+?][+?]?)"
    r"|(?P<sign>[\[\](){}|^$])", re.DOTALL)


def for_oniguruma(pattern: str) -> str:
    """Return fancy-regex's pattern in Ruby's syntax."""
    out: list[str] = []
    starts: list[int] = []  # where in `out` each open group began
    last = 0  # where in `out` the last complete atom begins
    position = 0
    while position < len(pattern):
        if pattern[position] == "[":
            end = _class_end(pattern, position)
            last = len(out)
            out.append(pattern[position:end])
            position = end
            continue
        match = _ATOM_OR_SIGN.match(pattern, position)
        if match is None:
            return pattern  # malformed: whoever compiles it says so
        text, position = match.group(), match.end()
        if match["interval"]:
            out[last:] = ["(?>", *out[last:], text[:-1], ")"]
            continue
        if match["atom"]:
            last = len(out)
        elif text == "(":
            starts.append(len(out))
        elif text == ")" and starts:
            last = starts.pop()
        out.append({"^": r"\A", "$": r"\z"}.get(text, text))
    return "".join(out)


def _class_end(pattern: str, start: int) -> int:
    """Return the position behind the character class that begins at `start`; classes nest."""
    depth, position = 0, start
    while position < len(pattern):
        if pattern[position] == "\\":
            position += 1
        elif pattern[position] == "[":
            depth += 1
        elif pattern[position] == "]":
            depth -= 1
            if not depth:
                return position + 1
        position += 1
    return len(pattern)
