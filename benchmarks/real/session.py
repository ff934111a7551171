"""Run commands in a folder with SmolLM2-135M-Instruct, and compute references with transformers."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch

QUESTIONS = ["What is the capital of France?", "Name three colours.", "What is 2 plus 2?",
             "Who wrote Hamlet?", "Write one sentence about the sea.", "What is the largest planet?",
             "Say hello in Spanish.", "What do bees make?", "Give a word that rhymes with cat.",
             "What is water made of?"]
CITIES = {"France": "Paris", "Japan": "Tokyo", "Italy": "Rome", "Spain": "Madrid", "Egypt": "Cairo",
          "Germany": "Berlin", "Greece": "Athens", "Russia": "Moscow", "Peru": "Lima", "Cuba": "Havana",
          "Korea": "Seoul", "Thailand": "Bangkok"}
Outcome = tuple[str, str, bool]
"""Our figure, the figure of the reference, and whether they agree."""


class Session:
    """Runs commands in a folder that has the model as `my-model` and its checkpoint as `ck`."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.model, self.checkpoint = folder, folder / "my-model", folder / "ck"
        folder.mkdir(parents=True, exist_ok=True)

    def run(self, *words: str, program: str = "megatron_sov", stdin: str = "", code: int = 0) -> str:
        """Run one of our commands in the folder, and return its output.

        Raises:
            RuntimeError: the exit code is not `code`.
        """
        completed = subprocess.run(
            [sys.executable, "-m", program, *words], cwd=self.folder, input=stdin, text=True,
            capture_output=True, check=False, env={**os.environ, "COLUMNS": "200"})
        if completed.returncode != code:
            raise RuntimeError(f"{' '.join(words)}: exit {completed.returncode}\n{completed.stdout[-2000:]}"
                               f"\n{completed.stderr[-3000:]}")
        return completed.stdout + completed.stderr

    def run_once(self, target: str, *words: str, program: str = "megatron_sov",
                 settings: Sequence[str] = ()) -> None:
        """Run a command that creates the folder or file `target`, unless it exists."""
        if not (self.folder / target).exists():
            self.run(*words, *format_settings(*settings), program=program)

    def verify_export(self, checkpoint: str, folder: str) -> str:
        """Return the verdict of `convert verify`."""
        output = self.run("convert", "verify", checkpoint, folder)
        return next((line for line in output.splitlines() if line.startswith("verified")), "no verdict")

    def read_rows(self, name: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / name).read_text(encoding="utf-8").splitlines()]

    def write_rows(self, name: str, rows: Sequence[dict[str, Any]]) -> str:
        (self.folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return name

    @cache  # noqa: B019 - one object per process
    def reference(self) -> tuple[Any, Any]:
        """Return transformers' float32 model and tokenizer of the folder."""
        return load_reference(self.model)

    def answer_greedily(self, questions: Sequence[str], num_tokens: int) -> list[str]:
        """Return transformers' greedy answers of at most `num_tokens` tokens."""
        model, tokenizer = self.reference()
        return [generate_greedily(model, tokenizer, encode_question(tokenizer, question), num_tokens)
                for question in questions]


def format_settings(*settings: str) -> list[str]:
    """Return the words `--set SETTING` for all settings."""
    return [word for setting in settings for word in ("--set", setting)]


def load_reference(folder: Path) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    return model.eval(), AutoTokenizer.from_pretrained(folder)


def encode_question(tokenizer: Any, question: str) -> list[int]:
    encoded = tokenizer.apply_chat_template([{"role": "user", "content": question}],
                                            add_generation_prompt=True, return_dict=True)
    return list(encoded["input_ids"])


@torch.no_grad()
def generate_greedily(model: Any, tokenizer: Any, ids: list[int], count: int) -> str:
    out = model.generate(torch.tensor([ids]), max_new_tokens=count, do_sample=False, pad_token_id=2)
    return str(tokenizer.decode(out[0, len(ids):], skip_special_tokens=True))


def find_number(value: Any, name: str) -> Any:
    """Return the first number with the key `name` in nested JSON, or None."""
    if isinstance(value, dict):
        if isinstance(value.get(name), (int, float)):
            return value[name]
        value = list(value.values())
    if isinstance(value, list):
        return next((found for part in value if (found := find_number(part, name)) is not None), None)
    return None
