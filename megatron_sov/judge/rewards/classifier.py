"""A reward model on this machine: a Hugging Face sequence classifier.

torch is imported where the model is loaded, in the process that judges: the command, and the server that its
processes are forked from, stay without it.
"""

from __future__ import annotations

import importlib.util
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_sov.base.digests import file_digest
from megatron_sov.base.errors import UserError, told_in_a_line
from megatron_sov.base.settings import AboveZero, AtLeastOne, SettingsProblem, find_broken
from megatron_sov.judge.rewards.reward import Refused, Row, Score, messages_of, text_of
from megatron_sov.model.pretrained import load_pretrained

_LOADED: dict[tuple[str, str], Any] = {}
"""(folder, device) -> tokenizer, the texts of its special tokens, and model of this process."""


@dataclass(frozen=True)
class Classifier:
    """The classifier's number: its logit, or the probability of a label where it has several."""

    LIBRARIES = ("transformers", "torch")
    # one process holds the model; a limit of address space would refuse its mapped weights
    MAX_WORKERS = 1
    MAX_MEMORY_BYTES = 0

    folder: str
    """Hugging Face folder with safetensors and a tokenizer that has a chat template."""
    label: int = 0
    """Which of several labels counts."""
    device: str = "cpu"
    """Or cuda."""
    max_tokens: AtLeastOne = 16_384
    """A longer conversation is refused."""
    time_limit_s: AboveZero = 120.0
    """For a row."""

    def problems(self) -> list[SettingsProblem]:
        return find_broken(
            self, "", ((Path(self.folder) / "config.json").is_file(), "folder", "has no config.json",
                       "name a folder of a sequence classifier"),
            (importlib.util.find_spec("torch") is not None, "device", "needs torch, which is not installed",
             "pip install torch"))

    def inputs(self) -> dict[str, str]:
        """Return file -> digest of the model: other weights are another reward."""
        files = sorted(p for p in Path(self.folder).iterdir()
                       if p.suffix in (".json", ".safetensors", ".jinja", ".model", ".txt", ".tiktoken"))
        return {file.name: file_digest(file) for file in files}

    def prepare(self) -> None:
        """Load the model.

        Raises:
            UserError: it cannot be loaded, or has no chat template.
        """
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        # several instances of one process (parts, a second opinion) share one copy of the weights
        if (self.folder, self.device) in _LOADED:
            return
        try:
            tokenizer = AutoTokenizer.from_pretrained(self.folder, local_files_only=True)
            model = load_pretrained(AutoModelForSequenceClassification, self.folder).eval().to(self.device)
            special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
        except UserError as e:
            raise UserError(f"folder = {e}") from None
        except Exception as e:  # anything, over files that are broken and devices that are not there
            raise UserError(f"folder = {self.folder}, device = {self.device}: no classifier can be loaded "
                            f"({told_in_a_line(e)})") from None
        if not tokenizer.chat_template:
            raise UserError(f"folder = {self.folder}: its tokenizer has no chat template; add "
                            "chat_template.jinja")
        _LOADED[self.folder, self.device] = tokenizer, special, model

    def score(self, row: Row) -> Score:
        """Return the number of the conversation of the row's prompt and response.

        Raises:
            Refused: the row has no prompt, is longer than `max_tokens`, or holds the text of a special token.
        """
        import torch

        tokenizer, special, model = _LOADED[self.folder, self.device]
        messages = [*messages_of(row), {"role": "assistant", "content": text_of(row, "response")}]
        # it would be read as the token: a response could end its turn and write the next one itself
        said = next((token for token in special for m in messages if token in m["content"]), None)
        if said is not None:
            raise Refused(f"holds {said!r}, a special token of the classifier's tokenizer; remove it")
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        # the template has written the special tokens already; adding them would double BOS
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        if len(ids) > self.max_tokens:
            raise Refused(f"has {len(ids):,} tokens; at most {self.max_tokens:,} are read (max_tokens)")
        with torch.inference_mode():
            logits = model(torch.tensor([ids], device=self.device)).logits[0].float().tolist()
        if len(logits) == 1:
            return Score(logits[0], {"logit": logits[0]})
        if not 0 <= self.label < len(logits):
            raise Refused(f"label = {self.label}: the classifier has labels 0 to {len(logits) - 1}")
        # softmax less the maximum, so that no exponential overflows
        most = max(logits)
        shares = [math.exp(x - most) for x in logits]
        return Score(shares[self.label] / sum(shares), {"logit": logits[self.label]})
