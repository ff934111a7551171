"""Worlds of other people's servers, played for real: OpenEnv's own example, and two resources servers of NeMo
Gym, with the calls of a script in place of a model.

    python benchmarks/served_worlds.py --openenv ENV/bin/python --nemo-gym GYM/bin/python --checkout Gym \
        > benchmarks/results/served_worlds.txt

`--openenv`: an interpreter with openenv-core and uvicorn.  `--nemo-gym`: one with NeMo Gym's requirements;
`--checkout` is its repository: it is on no package index.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_sov.chat.tool_calls import ToolCall
from megatron_sov.judge.tools.environment import EpisodeLimits
from megatron_sov.judge.tools.host import EnvironmentHost
from megatron_sov.judge.tools.registry import order

NAMES = {"__ENV_NAME__": "echo", "__ENV_CLASS_NAME__": "Echo", "__ENV_TITLE_NAME__": "Echo"}
"""As `openenv init echo` fills its template in."""
TEMPLATE = ("import openenv.cli, pathlib; "
            "print(pathlib.Path(openenv.cli.__file__).parent / 'templates/openenv_env')")
SERVER = """
import sys
from unittest.mock import MagicMock
sys.path.insert(0, ".")
import uvicorn
from importlib import import_module
from nemo_gym.server_utils import ServerClient
module, name, port = import_module(f"resources_servers.{sys.argv[1]}.app"), sys.argv[2], int(sys.argv[3])
made = getattr(module, name)
config = made.model_fields["config"].annotation(
    host="127.0.0.1", port=port, entrypoint="app.py", name=sys.argv[1], domain="agent")
app = made(config=config, server_client=MagicMock(spec=ServerClient)).setup_webserver()
uvicorn.run(app, host="127.0.0.1", port=port, log_level="warning")
"""
"""A resources server by itself: Gym's own start wants Ray and a configuration of all servers."""


@contextlib.contextmanager
def served(command: Sequence[str], folder: Path) -> Iterator[str]:
    """Run a server, which is given a free port as its last word; gives its address."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    server = subprocess.Popen([*command, str(port)], cwd=folder, stdout=sys.stderr)
    try:
        for _ in range(600):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            if server.poll() is not None:
                raise SystemExit(f"{command[0]}: the server has ended")
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait()


def play(world: str, url: str, what: str, task: Mapping[str, Any],
         calls: Sequence[tuple[str, dict[str, Any]]], answer: str) -> None:
    """Play an episode, half of it in another process, and print what came of it."""
    with EnvironmentHost(order(world, {"url": url}), EpisodeLimits(max_tool_chars=200)) as host:
        tools = [tool["function"]["name"] for tool in host.reset(task).tools]
        print(f"{world}, {what}: tools {', '.join(tools)}")
        for number, (name, arguments) in enumerate(calls):
            if number == len(calls) // 2:
                host.resume(task, host.state)
            found = host.call(ToolCall(name, arguments))
            print(f"  {name}({json.dumps(arguments)}) -> {found.fault or 'ok'}: "
                  f"{' '.join(found.text.split())}")
        result = host.score(answer)
        print(f"  reward {result.reward}, {json.dumps(dict(result.components))}")


def echo(python: str, folder: Path) -> Path:
    """Return a copy of OpenEnv's template as its own command makes one."""
    asked = subprocess.run([python, "-c", TEMPLATE], capture_output=True, text=True, check=True)
    shutil.copytree(asked.stdout.strip(), folder / "echo", ignore=shutil.ignore_patterns("__pycache__"))
    for file in [*(folder / "echo").rglob("*.py")]:
        text, name = file.read_text(encoding="utf-8"), file.name
        for before, after in NAMES.items():
            text, name = text.replace(before, after), name.replace(before, after)
        file.unlink()
        file.with_name(name).write_text(text, encoding="utf-8")
    return folder / "echo"


def main() -> None:
    """Play with the servers that there are."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--openenv", required=True)
    parser.add_argument("--nemo-gym", required=True)
    parser.add_argument("--checkout", required=True, type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        made = echo(args.openenv, Path(folder))
        with served([args.openenv, "-m", "server.app", "--port"], made) as url:
            play("openenv", url, "its template's echo", {"question": "Say hello."},
                 [("step", {"message": "hello"}), ("step", {"text": "hello"}),
                  ("step", {"message": "hello!"})], "")
    data = args.checkout.resolve() / "resources_servers"
    for name, made_of in (("example_session_state_mgmt", "StatefulCounterResourcesServer"),
                          ("example_multi_step", "ExampleMultiStepResourcesServer")):
        with (data / name / "data/example.jsonl").open(encoding="utf-8") as lines:
            row = json.loads(next(lines))
        with served([args.nemo_gym, "-c", SERVER, name, made_of], data.parent) as url:
            if name == "example_multi_step":
                calls = [("get_synonym_value", {"synonym": word}) for word in row["expected_synonyms"]]
                play("nemo_gym", url, name, row,
                     [*calls, ("extract_synonym_values", {"synonym_values": row["expected_synonym_values"]})],
                     "done")
                play("nemo_gym", url, f"{name}, a wrong value", row,
                     [("extract_synonym_values", {"synonym_values": [1]})], "done")
            else:
                play("nemo_gym", url, name, row,
                     [("increment_counter", {"count": 1}), ("increment_counter", {"count": "two"}),
                      ("increment_counter", {"count": 2}), ("get_counter_value", {})], "6")


if __name__ == "__main__":
    main()
