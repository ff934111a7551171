"""A model folder as `--engine`: a child process serves it with its own key, and ends with the run."""

import os
import sys
import threading
import urllib.error
import urllib.request
from pathlib import Path

import psutil
import pytest

from data_prep.synth.models import Model
from megatron_sov.base.errors import StopRequested, UserError
from megatron_sov.work.endpoints.local_server import KEY_ENV, serve_model
from megatron_sov.work.processes.pool import StopSignal

# A server that, as the real one, writes its address to a file and takes the key from its environment.
SERVER = """import json, os, sys
from http.server import BaseHTTPRequestHandler, HTTPServer
words = dict(zip(sys.argv[2::2], sys.argv[3::2]))
assert words["--parent-pid"] == str(os.getppid())
class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        key = os.environ[words["--api-key-env"]]
        self.send_response(200 if self.headers["authorization"] == "Bearer " + key else 401)
        self.end_headers()
server = HTTPServer(("127.0.0.1", int(words["--port"])), Handler)
with open(words["--address-file"] + ".tmp", "w") as f:
    json.dump({"url": f"http://127.0.0.1:{server.server_port}/v1", "model": os.path.basename(sys.argv[1])}, f)
os.replace(words["--address-file"] + ".tmp", words["--address-file"])
server.serve_forever()
"""


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "my-model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    return folder


def write_program(folder: Path, text: str) -> list[str]:
    """Write a server program, and return the command that starts it."""
    (folder / "serve.py").write_text(text)
    return [sys.executable, str(folder / "serve.py")]


def list_servers(folder: Path) -> list[psutil.Process]:
    """Return the running processes of the folder's server program."""
    return [child for child in psutil.Process().children() if str(folder / "serve.py") in child.cmdline()]


def test_a_folder_is_served_with_a_key_until_the_context_ends(model: Path, tmp_path: Path) -> None:
    with serve_model(model, "x: ", program=write_program(tmp_path, SERVER)) as served:
        assert served.model == "my-model" and served.url.startswith("http://127.0.0.1:")
        (child,) = list_servers(tmp_path)
        # all users see a command line, and every other program of the run would inherit the environment
        assert served.key not in " ".join(child.cmdline()) + repr(served)
        assert KEY_ENV not in os.environ
        with pytest.raises(urllib.error.HTTPError):
            urllib.request.urlopen(served.url)
        request = urllib.request.Request(served.url, headers={"Authorization": f"Bearer {served.key}"})
        urllib.request.urlopen(request).close()
    assert not child.is_running()


def test_a_server_that_does_not_start_says_why(model: Path, tmp_path: Path) -> None:
    text = "import sys; print('loading'); sys.exit('error: config.json: is no model')"
    with pytest.raises(UserError, match=r"^x: config\.json: is no model"), \
            serve_model(model, "x: ", program=write_program(tmp_path, text)):
        pass


def test_a_stop_request_does_not_wait_for_the_model_to_load(model: Path, tmp_path: Path) -> None:
    stop = StopSignal()
    threading.Timer(0.3, stop.ask, ["enough"]).start()
    with pytest.raises(StopRequested, match="enough"), \
            serve_model(model, "x: ", sleep=stop.sleep,
                        program=write_program(tmp_path, "import time; time.sleep(3600)")):
        pass
    assert not list_servers(tmp_path)


def test_the_identity_of_a_model_depends_on_its_files_only(model: Path, tmp_path: Path) -> None:
    def identify(folder: Path) -> str:
        return Model(str(folder), "").identity

    before = identify(model)
    model.rename(tmp_path / "moved")
    assert identify(tmp_path / "moved") == before
    (tmp_path / "moved" / "weights").write_bytes(b"x")
    assert identify(tmp_path / "moved") != before
    with pytest.raises(UserError, match="is neither an address"):
        identify(tmp_path / "nowhere")
