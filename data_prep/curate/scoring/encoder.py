"""Texts as the mean of a local Hugging Face encoder's last hidden states.

torch and transformers are imported where the encoder is loaded.  Texts are encoded one at a time: a text's
numbers must not depend on what else is in a batch, and padding changes their last bits.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from annotated_types import Ge, Le

from megatron_sov.base.errors import UserError, told_in_a_line
from megatron_sov.model.pretrained import HEADS, POOLER, load_pretrained

SUFFIXES = (".json", ".safetensors", ".txt", ".model", ".tiktoken", ".jinja")
"""Files of a Hugging Face folder that a scorer takes along; code and pickles are none of them."""


@dataclass(frozen=True)
class EncoderSettings:
    """How an encoder reads a text."""

    max_tokens: Annotated[int, Ge(1), Le(1 << 17)] = 512
    """Tokens of a text that are encoded, from its beginning."""
    max_chars: Annotated[int, Ge(1), Le(1 << 24)] = 20_000
    """Characters of a text that are given to the tokenizer."""


def copy_encoder(source: Path, target: Path) -> None:
    """Copy what is needed of an encoder's folder, so that a scorer is whole wherever it lies.

    Raises:
        UserError: it is no folder of a Hugging Face model with safetensors.
    """
    files = sorted(p for p in source.glob("*") if p.suffix in SUFFIXES and p.is_file())
    names = {p.name for p in files}
    if "config.json" not in names or not any(p.suffix == ".safetensors" for p in files):
        raise UserError(f"--encoder {source}: has no config.json or no .safetensors file; name the folder of "
                        "a Hugging Face encoder")
    target.mkdir()
    for file in files:
        shutil.copyfile(file, target / file.name)


class ScoringEncoder:
    """Turns texts into rows of mean hidden states."""

    def __init__(self, folder: Path, settings: EncoderSettings) -> None:
        """Load an encoder.

        Raises:
            UserError: it cannot be loaded.
        """
        from transformers import AutoModel, AutoTokenizer

        self.settings = settings
        try:
            # Local files alone and no code of the folder's: a scorer may come from others.
            self._tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True,
                                                            trust_remote_code=False)
            # Heads are left out, as no hidden state goes through them; a pooler that a folder lacks is made
            # up, and not used either.
            model = load_pretrained(AutoModel, folder, left_out=HEADS, made_up=POOLER)
            self._model: Any = model.float().eval()
            self._width = int(self._model.config.hidden_size)
        except UserError:
            raise
        except Exception as e:  # anything, over files that are broken
            raise UserError(f"{folder}: no encoder can be loaded ({told_in_a_line(e)})") from None

    @property
    def width(self) -> int:
        return self._width

    def embed(self, text: str) -> np.ndarray:
        """Return the mean of the last hidden states over a text's tokens (float32, `width` long); zeros for
        a text without tokens.

        Raises:
            UserError: the encoder cannot take the text.
        """
        import torch

        ids = self._tokenizer(text[: self.settings.max_chars], truncation=True,
                              max_length=self.settings.max_tokens)["input_ids"]
        if not ids:
            return np.zeros(self._width, np.float32)
        try:
            with torch.inference_mode():
                states = self._model(input_ids=torch.tensor([ids])).last_hidden_state[0]
        except (RuntimeError, IndexError) as e:
            raise UserError(f"the encoder fails on a text of {len(ids)} tokens ({told_in_a_line(e)}); "
                            "lower --max-tokens to what its positions allow") from None
        mean: np.ndarray = states.mean(dim=0).numpy()
        return mean

    def dot(self, text: str, weights: np.ndarray) -> float:
        """Return the product of a text's row with weights (float32, `width` long)."""
        # In double precision, where the order of a sum changes less than what the score keeps.
        return float(self.embed(text).astype(np.float64) @ weights)
