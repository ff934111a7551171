"""The program in the sandbox that calls tools of a virtual world; it imports nothing of ours.

It reads a JSON object from standard input: `code`, Python, and `calls`, each a list of tables, name and
arguments. For each call it writes a line: an object with `result` and `tables`, or with `refused` or `failed`
and the reason.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

MAX_REASON_CHARS = 300


class Refused(Exception):
    """Raised by a tool to refuse a call, with the sentence that the model reads."""


def call_tool(code: str, tables: dict[str, Any], name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """Load the code anew, so that nothing of an earlier call counts, and call one of its functions."""
    names: dict[str, Any] = {"__name__": "world", "Refused": Refused}
    try:
        exec(compile(code, "world.py", "exec"), names)
        outcome = {"result": names[name](tables, **arguments), "tables": tables}
        json.dumps(outcome, allow_nan=False)
        return outcome
    except Refused as e:
        return {"refused": str(e)[:MAX_REASON_CHARS]}
    except BaseException as e:  # SystemExit too: it ends the call, and not the calls after it
        return {"failed": f"{type(e).__name__}: {e}"[:MAX_REASON_CHARS]}


def main() -> None:
    request = json.load(sys.stdin)
    outcomes = os.dup(1)
    os.dup2(2, 1)  # a print of the code is no outcome
    for tables, name, arguments in request["calls"]:
        outcome = call_tool(request["code"], tables, name, arguments)
        os.write(outcomes, json.dumps(outcome).encode() + b"\n")


if __name__ == "__main__":
    main()
