"""Sandboxed program that calls tools in a virtual world; imports nothing from this package.

Standard input is a JSON object: `code`, Python source, and `calls`, each [tables, name, arguments]. Each call
writes a JSON line: `result` and `tables`, or `refused` or `failed` with the reason.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

MAX_REASON_CHARS = 300


class Refused(Exception):
    """Raised by a tool to refuse a call, with a sentence for the model."""


def call_tool(code: str, tables: dict[str, Any], name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """Load the code anew, without state from earlier calls, and call a function."""
    names: dict[str, Any] = {"__name__": "world", "Refused": Refused}
    try:
        exec(compile(code, "world.py", "exec"), names)
        outcome = {"result": names[name](tables, **arguments), "tables": tables}
        json.dumps(outcome, allow_nan=False)
        return outcome
    except Refused as e:
        return {"refused": str(e)[:MAX_REASON_CHARS]}
    except BaseException as e:  # SystemExit too: only this call ends
        return {"failed": f"{type(e).__name__}: {e}"[:MAX_REASON_CHARS]}


def main() -> None:
    request = json.load(sys.stdin)
    outcomes = os.dup(1)
    os.dup2(2, 1)  # prints from the code are not outcomes
    for tables, name, arguments in request["calls"]:
        outcome = call_tool(request["code"], tables, name, arguments)
        os.write(outcomes, json.dumps(outcome).encode() + b"\n")


if __name__ == "__main__":
    main()
