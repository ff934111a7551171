"""Whether one sentence contradicts another, by a local model for natural language inference, such as the
multilingual mDeBERTa that AutoIF uses.

torch and transformers are imported where the model is loaded.
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

from megatron_sov.errors import UserError, told_in_a_line
from megatron_sov.pretrained import load_pretrained

MAX_TOKENS = 512
CONTRADICTION = "contradiction"


class Entailment:
    """A sequence classifier with a label `contradiction`; threads may share it.

    Args:
        folder: of a Hugging Face model with safetensors.

    Raises:
        UserError: it cannot be loaded, or has no such label.
    """

    def __init__(self, folder: Path) -> None:
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        try:
            self._tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True,
                                                            trust_remote_code=False)
            self._model: Any = load_pretrained(AutoModelForSequenceClassification, folder).float().eval()
        except UserError as e:
            raise UserError(f"nli = {e}") from None
        except Exception as e:  # anything, over files that are broken
            raise UserError(f"nli = {folder}: no classifier can be loaded ({told_in_a_line(e)})") from None
        labels = {int(place): str(name).lower() for place, name in self._model.config.id2label.items()}
        if CONTRADICTION not in labels.values():
            raise UserError(f"nli = {folder}: its labels are {', '.join(labels.values())}, and none is "
                            f"{CONTRADICTION}; name a model for natural language inference")
        self._labels = labels
        self._lock = threading.Lock()

    def label(self, premise: str, hypothesis: str) -> str:
        """Return the likeliest label of a pair."""
        import torch

        with self._lock, torch.inference_mode():  # one pair at a time: no padding that would change a number
            given = self._tokenizer(premise, hypothesis, truncation=True, max_length=MAX_TOKENS,
                                    return_tensors="pt")
            return self._labels[int(self._model(**given).logits[0].argmax())]
