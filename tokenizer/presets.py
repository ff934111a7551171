"""Presets: everything that makes a tokenizer what it is, except its text, as data.

The split patterns are those of the Solar Open report (arXiv 2601.07022) and of K-EXAONE's released tokenizer.
Both split digits one by one.  The first ids (64 in the presets) are special or reserved, the next 256 are the
bytes, merges follow: a fixed place for every id that a model's config names, whatever the vocabulary's size.
"""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any, Literal

from megatron_sov.errors import UserError, nearest

NUM_BYTES = 256
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_DIGITS = {"single": r"\p{N}", "triples": r"\p{N}{1,3}", "runs": r"\p{N}+"}
_WHITESPACE = {"runs": r"\s*[\r\n]+|\s+(?!\S)|\s+", "single": r"\s"}


@dataclasses.dataclass(frozen=True)
class Preset:
    """The rules of one tokenizer."""

    name: str
    """Name on the command line and in the manifest."""
    split_pattern: str
    """Regular expression (Oniguruma) whose matches, and the text between them,
    are the units within which bytes merge."""
    normalization: Literal["nfc", "none"]
    """nfc: composed Unicode form, so that decomposed Hangul meets composed; none:
    bytes are kept as they are."""
    special_tokens: dict[str, int]
    """Special token -> id below `num_special_ids`; the ids in between become `<|reserved_N|>`."""
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
    num_special_ids: int = 64
    """Ids kept for special tokens, those reserved for later among them."""
    superword_pattern: str = ""
    """Split pattern of the finished tokenizer where words may join to superwords (SuperBPE);
    empty: they may not."""
    superword_share: float = 0.0
    """Share of the vocabulary that spans words."""
    max_superword_words: int = 4
    """Most words in one token."""

    @property
    def smallest_vocab(self) -> int:
        """Special ids and bytes."""
        return self.num_special_ids + NUM_BYTES

    @property
    def final_pattern(self) -> str:
        """The split pattern of the finished tokenizer."""
        return self.superword_pattern or self.split_pattern

    def problems(self) -> list[str]:
        """Return one sentence for each rule that this preset breaks."""
        p = [f"special_tokens[{token!r}] = {id_} must lie in 0..{self.num_special_ids - 1}, "
             "below num_special_ids"
             for token, id_ in self.special_tokens.items() if not 0 <= id_ < self.num_special_ids]
        if len(set(self.special_tokens.values())) < len(self.special_tokens):
            p.append("special_tokens gives one id to two tokens; give each its own")
        reserved = {_reserved_name(i): i for i in range(self.num_special_ids)}
        p += [f"special_tokens has {token!r}, the name of another reserved id; choose another name"
              for token, id_ in self.special_tokens.items() if reserved.get(token, id_) != id_]
        if "" in self.special_tokens:
            p.append("special_tokens has an empty name; give it one")
        for field in ("bos_token", "eos_token", "pad_token"):
            if getattr(self, field) not in self.special_tokens:
                p.append(f"{field} = {getattr(self, field)!r} must stand in special_tokens")
        if self.max_token_bytes < 2:
            p.append(f"max_token_bytes = {self.max_token_bytes} must be at least 2")
        if not 0 <= self.superword_share < 1:
            p.append(f"superword_share = {self.superword_share} must lie between 0 and 1")
        if self.superword_share > 0 and not self.superword_pattern:
            p.append(f"superword_share = {self.superword_share} needs a superword_pattern in which words "
                     "join; add it, or set 0")
        if self.max_superword_words < 2:
            p.append(f"max_superword_words = {self.max_superword_words} must be at least 2")
        return [*p, *_template_problems(self.chat_template)]

    def special_by_id(self) -> list[str]:
        """Return the special and reserved tokens in order of their ids."""
        names = {id_: token for token, id_ in self.special_tokens.items()}
        return [names.get(i, _reserved_name(i)) for i in range(self.num_special_ids)]


def _template_problems(template: str) -> list[str]:
    """Return what keeps a chat template from being one, by jinja as transformers sets it up."""
    from jinja2 import TemplateSyntaxError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    # transformers' own tag around what is to be learned
    text = re.sub(r"\{%-?\s*(end)?generation\s*-?%\}", "", template)
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                                extensions=["jinja2.ext.loopcontrols"])
    try:
        environment.from_string(text)
    except TemplateSyntaxError as e:
        return [f"chat_template is no Jinja template, line {e.lineno}: {e.message}; mend it"]
    return []


def _reserved_name(id_: int) -> str:
    return f"<|reserved_{id_}|>"


SOLAR_OPEN = Preset(
    name="solar-open",
    split_pattern=r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
                  r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
                  r"|\s+(?!\S)|\s+",
    normalization="none",
    special_tokens={
        "<|unk|>": 0, "<|startoftext|>": 1, "<|endoftext|>": 2, "<|begin|>": 20, "<|end|>": 21,
        "<|think|>": 22, "<|content|>": 23, "<|flush|>": 24, "<|calls|>": 25, "<|tool_calls|>": 30,
    },
    bos_token="<|startoftext|>", eos_token="<|endoftext|>", pad_token="<|endoftext|>",
    chat_template="{% for message in messages %}"
                  "<|begin|>{{ message['role'] }}<|content|>{{ message['content'] }}<|end|>"
                  "{% endfor %}{% if add_generation_prompt %}<|begin|>assistant<|content|>{% endif %}",
)

K_EXAONE = Preset(
    name="k-exaone",
    split_pattern=r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?(?:\p{L}\p{M}*)+|\p{N}"
                  r"| ?[^\s\p{L}\p{N}]+[\r\n/]?|\s*[\r\n]"
                  r"|\s+(?!\S)|\s+",
    superword_pattern=r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?(?:\p{L}\p{M}*(?: \p{L}\p{M}*)*)+"
                      r"|\p{N}"
                      r"| ?[^\s\p{L}\p{N}]+[\r\n/]?|\s*[\r\n]|\s+(?!\S)|\s+",
    superword_share=0.2,
    normalization="nfc",
    special_tokens={
        "[PAD]": 0, "[BOS]": 1, "[UNK]": 3, "<|system|>": 49, "<|user|>": 50, "<|assistant|>": 51,
        "<|tool|>": 52, "<|endofturn|>": 53, "<think>": 54, "</think>": 55, "<tool_call>": 56,
        "</tool_call>": 57,
    },
    bos_token="[BOS]", eos_token="<|endofturn|>", pad_token="[PAD]",
    chat_template="{% for message in messages %}"
                  "{{ '<|' + message['role'] + '|>\n' }}{{ message['content'] }}<|endofturn|>"
                  "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}",
)

PRESETS = {p.name: p for p in (SOLAR_OPEN, K_EXAONE)}
CUSTOM = "custom"


def load_preset(name: str, file: Path | None) -> Preset:
    """Return the preset of that name; `custom` is read from a JSON or YAML file with the fields of `Preset`.

    Instead of `split_pattern` the file may have `digits` (single, triples,
    runs) and `whitespace` (runs, single).

    Raises:
        UserError: an unknown name, a missing or malformed file, or fields that break a rule.
    """
    if name != CUSTOM:
        if file is not None:
            raise UserError(f"--config {file}: belongs to --preset custom, not to --preset {name}; "
                            "drop one of them")
        if name not in PRESETS:
            known = [*PRESETS, CUSTOM]
            raise UserError(f"--preset {name!r}: does not exist{nearest(name, known)} (presets: "
                            f"{', '.join(known)})")
        return PRESETS[name]
    if file is None:
        raise UserError(f"--preset {name}: needs --config FILE with the tokenizer's rules, JSON or YAML (see "
                        "docs/tokenizer.md)")
    from pydantic import TypeAdapter, ValidationError

    try:
        preset = TypeAdapter(Preset).validate_python(_with_pattern({"name": CUSTOM, **_read_config(file)}))
    except OSError as e:
        raise UserError(f"--config {file}: cannot be read ({e.strerror}); check the path") from None
    except ValidationError as e:
        lines = [f"{'.'.join(map(str, error['loc']))}: {error['msg']}" for error in e.errors()]
        raise UserError(f"--config {file}: " + "; ".join(lines)) from None
    except ValueError as e:
        raise UserError(f"--config {file}: {e}; see docs/tokenizer.md for the form") from None
    if problems := preset.problems():
        raise UserError(f"--config {file}: " + "; ".join(problems))
    return preset


def _read_config(file: Path) -> dict[str, Any]:
    """Return the content of a JSON or YAML file.

    Raises:
        ValueError: it is neither, gives a name twice, or is no object.
    """
    text = file.read_text(encoding="utf-8")
    if file.suffix.lower() in (".yaml", ".yml"):
        import yaml

        try:
            raw = yaml.load(text, Loader=_unique_loader(yaml))
        except (yaml.YAMLError, RecursionError) as e:
            raise ValueError(f"is not YAML ({' '.join(str(e).split())})") from None
    else:
        raw = json.loads(text, object_pairs_hook=_unique)
    if not isinstance(raw, dict):
        raise ValueError(f"holds a {type(raw).__name__}, must be one object of named rules")
    return raw


def _unique(pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
    """Return pairs as a dict; JSON and YAML themselves keep the last of two silently."""
    seen: dict[Any, Any] = {}
    for key, value in pairs:
        if key in seen:
            raise ValueError(f"names {key!r} twice; keep one of them")
        seen[key] = value
    return seen


def _unique_loader(yaml: Any) -> Any:
    """Return PyYAML's safe loader, made to refuse a name that stands twice in one mapping."""
    class Loader(yaml.SafeLoader):
        pass

    def mapping(loader: Any, node: Any) -> dict[Any, Any]:
        """Return a mapping node as a dict."""
        return _unique([(loader.construct_object(k, deep=True), loader.construct_object(v, deep=True))
                        for k, v in node.value])

    Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, mapping)
    return Loader


def _with_pattern(raw: dict[str, Any]) -> dict[str, Any]:
    """Replace `digits` and `whitespace` by the split pattern that they stand for.

    Raises:
        ValueError: they are unknown, or a pattern is given as well.
    """
    if "split_pattern" in raw:
        if both := [key for key in ("digits", "whitespace") if key in raw]:
            raise ValueError(f"has split_pattern and {both[0]}, which is a part of it; keep one of them")
        return raw
    rules = {}
    for key, known in (("digits", _DIGITS), ("whitespace", _WHITESPACE)):
        value = raw.pop(key, next(iter(known)))
        if value not in known:
            raise ValueError(f"{key} = {value!r} must be one of {', '.join(known)}")
        rules[key] = known[value]
    punctuation = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
    word = r"[^\r\n\p{L}\p{N}]?(?:\p{L}\p{M}*)+"
    return {**raw, "split_pattern": "|".join((_CONTRACTIONS, word, rules["digits"], punctuation,
                                              rules["whitespace"]))}
