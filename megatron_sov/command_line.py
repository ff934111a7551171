"""What all our programs do alike: their version, and how an error becomes one sentence and an exit code."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Mapping
from types import ModuleType

from megatron_sov.errors import ExitCode, GateFailed, StopRequested, UserError
from megatron_sov.version import __version__

MAX_PATH_CHARS = 300
"""Of a path that is shown; the longest that a disk takes are longer than a screen."""


def version_of(program: str) -> str:
    """Return what `PROGRAM --version` prints."""
    return f"{program} {__version__}"


def parser_of(program: str, description: str, commands: Mapping[str, ModuleType]) -> argparse.ArgumentParser:
    """Return the parser of a program whose commands are modules with `HELP`, `add_arguments` and `run`."""
    parser = argparse.ArgumentParser(prog=program, description=description)
    parser.add_argument("--version", action="version", version=version_of(program))
    actions = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, module in commands.items():
        module.add_arguments(actions.add_parser(name, help=module.HELP))
    return parser


def exit_code(action: Callable[[], int]) -> int:
    """Run a command and return its exit code; what a user can mend becomes one message."""
    try:
        return action()
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        return ExitCode.USER_ERROR
    except GateFailed as e:
        print(f"gate: {e}", file=sys.stderr)
        return ExitCode.GATE_FAILED
    except StopRequested as e:
        print(f"stopped: {e}", file=sys.stderr)
        return ExitCode.STOPPED
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return ExitCode.INTERRUPTED
    except MemoryError as e:
        print(f"error: out of memory ({e or 'no more than that is known'}); free some, or give the command "
              "less to do at a time", file=sys.stderr)
        return ExitCode.CRASH
    except BrokenPipeError:
        return ExitCode.OK
    except OSError as e:
        if e.filename is None:  # not about a file that somebody named: a defect
            raise
        path = os.fsdecode(e.filename)[:MAX_PATH_CHARS]
        print(f"error: {path}: cannot be used ({e.strerror or e}); look at the path, its permissions and its "
              "disk", file=sys.stderr)
        return ExitCode.USER_ERROR
