"""A server on two processes, of which each writes answers of its own: what one process writes; a key; the end
with its parent.  The second command of docs/serve.md."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest

from megatron_sov.cli import main
from tests.pages_typed import ROOT, commands_of

PROMPTS = ["def parse(self", "The ", "import argparse", "한국어 "]


def test_two_processes_answer_what_one_writes_and_end_with_their_parent(
        serving: Any, imported: dict[str, Path], one_rank: None, capsys: Any,
        monkeypatch: pytest.MonkeyPatch) -> None:
    expected = []
    for number, prompt in enumerate(PROMPTS):
        assert main(["generate", str(imported["solar_open"]), "--prompt", prompt, "--samples", "2", "--json",
                     "--temperature", "1", "--seed", str(number), "--max-new-tokens", str(6 + number)]) == 0
        expected.append([found["text"] for found in json.loads(capsys.readouterr().out)])
    typed = [shlex.split(line)[3:] for line in commands_of((ROOT / "docs/serve.md").read_text())
             if " serve my-checkpoint " in line]
    monkeypatch.setenv("SERVE_KEY", "sesame")
    parent = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    with serving(imported["solar_open"], *typed[1], "--parent-pid", str(parent.pid),
                 "--set", "train.num_threads=1") as two:
        client = openai.OpenAI(base_url=two.url, api_key="sesame", max_retries=0)
        assert [model.id for model in client.models.list()] == ["solar_open"]

        def ask(number: int) -> list[str]:
            found = client.completions.create(model="solar_open", prompt=PROMPTS[number], n=2, seed=number,
                                              temperature=1, max_tokens=6 + number)
            return [choice.text for choice in found.choices]

        with ThreadPoolExecutor(len(PROMPTS)) as pool:
            assert list(pool.map(ask, range(len(PROMPTS)))) == expected
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(base_url=two.url, api_key="none", max_retries=0).models.list()
        parent.kill()
        parent.wait()
        two.thread.join(600)
        assert two.ended and not os.path.exists(f"/proc/{two.pid}")
