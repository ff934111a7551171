"""Presets: everything that makes a tokenizer what it is, except its text, as data.

The split patterns are those of the Solar Open report (arXiv 2601.07022) and of K-EXAONE's released tokenizer.  Both split
digits one by one.  Ids 0 to 63 are special or reserved, ids 64 to 319 are the 256 bytes, merges follow: a fixed place for
every id that a model's config names, whatever the vocabulary's size.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Literal

from pydantic import ConfigDict, TypeAdapter, ValidationError

from megatron_sov.errors import UserError, nearest

NUM_SPECIAL_IDS = 64
NUM_BYTES = 256
SMALLEST_VOCAB = NUM_SPECIAL_IDS + NUM_BYTES


@dataclasses.dataclass(frozen=True)
class Preset:
    """The rules of one tokenizer."""

    __pydantic_config__ = ConfigDict(extra="forbid")
    name: str
    """Name on the command line and in the manifest."""
    split_pattern: str
    """Regular expression (Oniguruma) whose matches, and the text between them, are the units within which bytes merge."""
    normalization: Literal["nfc", "none"]
    """nfc: composed Unicode form, so that decomposed Hangul meets composed; none: bytes are kept as they are."""
    special_tokens: dict[str, int]
    """Special token -> id below 64; the ids in between become `<|reserved_N|>`."""
    bos_token: str
    """Begin of a document for models that want one; never added by itself."""
    eos_token: str
    """End of a document, and of generation."""
    pad_token: str
    """Fills batches; may be the end token."""
    chat_template: str
    """Jinja template of a conversation, as transformers reads it."""
    max_token_bytes: int = 48
    """Longest token; without a limit, rules and ASCII art take vocabulary."""

    def problems(self) -> list[str]:
        """Return one sentence for each rule that this preset breaks."""
        p = [f"special_tokens[{token!r}] = {id_} must lie in 0..{NUM_SPECIAL_IDS - 1}"
             for token, id_ in self.special_tokens.items() if not 0 <= id_ < NUM_SPECIAL_IDS]
        if len(set(self.special_tokens.values())) < len(self.special_tokens):
            p.append("special_tokens gives one id to two tokens; give each its own")
        for field in ("bos_token", "eos_token", "pad_token"):
            if getattr(self, field) not in self.special_tokens:
                p.append(f"{field} = {getattr(self, field)!r} must stand in special_tokens")
        if self.max_token_bytes < 2:
            p.append(f"max_token_bytes = {self.max_token_bytes} must be at least 2")
        return p

    def special_by_id(self) -> list[str]:
        """Return the 64 special and reserved tokens in order of their ids."""
        names = {id_: token for token, id_ in self.special_tokens.items()}
        return [names.get(i, f"<|reserved_{i}|>") for i in range(NUM_SPECIAL_IDS)]


SOLAR_OPEN = Preset(
    name="solar-open",
    split_pattern=r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
                  r"|\s+(?!\S)|\s+",
    normalization="none",
    special_tokens={
        "<|unk|>": 0, "<|startoftext|>": 1, "<|endoftext|>": 2, "<|begin|>": 20, "<|end|>": 21, "<|think|>": 22,
        "<|content|>": 23, "<|flush|>": 24, "<|calls|>": 25, "<|tool_calls|>": 30,
    },
    bos_token="<|startoftext|>", eos_token="<|endoftext|>", pad_token="<|endoftext|>",
    chat_template="{% for message in messages %}"
                  "<|begin|>{{ message['role'] }}<|content|>{{ message['content'] }}<|end|>"
                  "{% endfor %}{% if add_generation_prompt %}<|begin|>assistant<|content|>{% endif %}",
)

K_EXAONE = Preset(
    name="k-exaone",
    split_pattern=r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?(?:\p{L}\p{M}*)+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]?|\s*[\r\n]"
                  r"|\s+(?!\S)|\s+",
    normalization="nfc",
    special_tokens={
        "[PAD]": 0, "[BOS]": 1, "[UNK]": 3, "<|system|>": 49, "<|user|>": 50, "<|assistant|>": 51, "<|tool|>": 52,
        "<|endofturn|>": 53, "<think>": 54, "</think>": 55, "<tool_call>": 56, "</tool_call>": 57,
    },
    bos_token="[BOS]", eos_token="<|endofturn|>", pad_token="[PAD]",
    chat_template="{% for message in messages %}"
                  "{{ '<|' + message['role'] + '|>\n' }}{{ message['content'] }}<|endofturn|>"
                  "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}",
)

PRESETS = {p.name: p for p in (SOLAR_OPEN, K_EXAONE)}
CUSTOM = "custom"


def load_preset(name: str, file: Path | None) -> Preset:
    """Return the preset of that name; `custom` is read from a JSON file with the fields of `Preset`.

    Raises:
        UserError: an unknown name, a missing or malformed file, or fields that break a rule.
    """
    if name != CUSTOM:
        if file is not None:
            raise UserError(f"--preset-file {file}: belongs to --preset custom, not to --preset {name}; drop one of them")
        if name not in PRESETS:
            known = [*PRESETS, CUSTOM]
            raise UserError(f"--preset {name!r}: does not exist{nearest(name, known)} (presets: {', '.join(known)})")
        return PRESETS[name]
    if file is None:
        raise UserError(f"--preset {name}: needs --preset-file FILE.json with the tokenizer's rules (see docs/tokenizer.md)")
    try:
        preset = TypeAdapter(Preset).validate_python({"name": CUSTOM, **json.loads(file.read_text(encoding="utf-8"))})
    except OSError as e:
        raise UserError(f"--preset-file {file}: cannot be read ({e.strerror}); check the path") from None
    except ValidationError as e:
        lines = [f"{'.'.join(map(str, error['loc']))}: {error['msg']}" for error in e.errors()]
        raise UserError(f"--preset-file {file}: " + "; ".join(lines)) from None
    except (ValueError, TypeError) as e:
        raise UserError(f"--preset-file {file}: is not a JSON object ({e}); see docs/tokenizer.md for the form") from None
    if problems := preset.problems():
        raise UserError(f"--preset-file {file}: " + "; ".join(problems))
    return preset
