"""The files by which Hugging Face `transformers` loads a tokenizer."""

from __future__ import annotations

from typing import Any

from tokenizer.presets import Preset

TOKENIZER_JSON = "tokenizer.json"
CONFIG_JSON = "tokenizer_config.json"


def tokenizer_config(preset: Preset) -> dict[str, Any]:
    """Return the content of tokenizer_config.json: special tokens, chat template, nothing added or cleaned by itself."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": preset.bos_token,
        "eos_token": preset.eos_token,
        "pad_token": preset.pad_token,
        "add_bos_token": False,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": int(1e30),  # transformers' own number for "no limit"; the model's config holds the real one
        "chat_template": preset.chat_template,
    }
