"""Presets: the rules of a tokenizer as data.

The split patterns are from the Solar Open report (arXiv 2601.07022) and from K-EXAONE's released tokenizer.
Both split digits one by one.  The first ids (64 in the presets) are special or reserved, the next 256 are the
bytes, merges follow, so that every id that a model's config names is the same at any vocabulary size.
"""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge, MinLen
from jinja2 import TemplateSyntaxError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from megatron_sov.base.errors import UserError, suggest_name
from megatron_sov.base.settings import (
    Bound, Fraction, NotNegativeInt, Place, ProblemCode, SettingsError, SettingsProblem, Violation,
    find_broken_rules, parse_located_yaml, parse_settings, read_settings_text)

NUM_BYTES = 256
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_DIGITS = {"single": r"\p{N}", "triples": r"\p{N}{1,3}", "runs": r"\p{N}+"}
_WHITESPACE = {"runs": r"\s*[\r\n]+|\s+(?!\S)|\s+", "single": r"\s"}
CUSTOM = "custom"
SMALLEST_MEMORY_GB = 1.0


def _find_template_fault(template: str) -> Violation | None:
    """Parse a chat template as transformers does, and return the fault."""
    # jinja does not know the generation tag of transformers
    text = re.sub(r"\{%-?\s*(end)?generation\s*-?%\}", "", template)
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                                extensions=["jinja2.ext.loopcontrols"])
    try:
        environment.from_string(text)
    except TemplateSyntaxError as e:
        return ProblemCode.BOUND, f"is no Jinja template, line {e.lineno}: {e.message}", "correct it"
    except RecursionError:
        return ProblemCode.BOUND, "is nested too deep", "make it flatter"
    return None


@dataclasses.dataclass(frozen=True)
class Preset:
    """Rules for `sov-tokenizer train`."""

    name: str
    """Name on the command line and in the manifest."""
    split_pattern: str
    """Regular expression (Oniguruma); bytes merge within matches and within the text between matches."""
    normalization: Literal["nfc", "none"]
    """nfc: composed Unicode form, which unites decomposed and composed Hangul; none: unchanged bytes."""
    special_tokens: dict[Annotated[str, MinLen(1)], NotNegativeInt]
    """Special token -> id below `num_special_ids`; the ids in between become `<|reserved_N|>`."""
    bos_token: str
    """Document begin; the tokenizer never adds it."""
    eos_token: str
    """Document end, and generation end."""
    pad_token: str
    """Fills batches; may be the end token."""
    chat_template: Annotated[str, Bound(_find_template_fault)]
    """Jinja template of a conversation, as transformers reads it."""
    max_token_bytes: Annotated[int, Ge(2)] = 48
    """Longest token; without a limit, rules and ASCII art take vocabulary."""
    num_special_ids: NotNegativeInt = 64
    """Ids for special and reserved tokens."""
    superword_pattern: str = ""
    """Split pattern of a finished SuperBPE tokenizer; its matches may contain several words. Empty: BPE."""
    superword_share: Fraction = 0.0
    """Share of superwords in the vocabulary."""
    max_superword_words: Annotated[int, Ge(2)] = 4
    """Maximum words in a token."""

    @property
    def smallest_vocab(self) -> int:
        """Special ids and bytes."""
        return self.num_special_ids + NUM_BYTES

    @property
    def final_pattern(self) -> str:
        return self.superword_pattern or self.split_pattern

    def problems(self) -> list[SettingsProblem]:
        reserved = {_format_reserved_name(i): i for i in range(self.num_special_ids)}
        owners = {id_: token for token, id_ in reversed(self.special_tokens.items())}
        problems = []
        for token, id_ in self.special_tokens.items():
            key = f"special_tokens.{token}"
            if id_ >= self.num_special_ids:
                rule = f"must be below num_special_ids = {self.num_special_ids}"
                problems.append(SettingsProblem(ProblemCode.RULE, key, rule, id_))
            if owners[id_] != token:
                rule = f"is the id of {owners[id_]} too"
                problems.append(SettingsProblem(ProblemCode.TWICE, key, rule, id_, "give each its own"))
            if reserved.get(token, id_) != id_:
                rule = "is the name of another reserved id"
                problems.append(SettingsProblem(ProblemCode.RULE, key, rule, id_, "choose another name"))
        return problems + find_broken_rules(
            self, "",
            *((getattr(self, name) in self.special_tokens, name, "must stand in special_tokens")
              for name in ("bos_token", "eos_token", "pad_token")),
            (not self.superword_share or bool(self.superword_pattern), "superword_share",
             "needs a superword_pattern in which words join", "add it, or set 0"))

    def special_by_id(self) -> list[str]:
        """Return special and reserved tokens, sorted by id."""
        names = {id_: token for token, id_ in self.special_tokens.items()}
        return [names.get(i, _format_reserved_name(i)) for i in range(self.num_special_ids)]


def _format_reserved_name(id_: int) -> str:
    return f"<|reserved_{id_}|>"


SOLAR_OPEN = Preset(
    name="solar-open", split_pattern=r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
                  r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
                  r"|\s+(?!\S)|\s+", normalization="none",
    special_tokens={
        "<|unk|>": 0, "<|startoftext|>": 1, "<|endoftext|>": 2, "<|begin|>": 20, "<|end|>": 21,
        "<|think|>": 22, "<|content|>": 23, "<|flush|>": 24, "<|calls|>": 25, "<|tool_calls|>": 30},
    bos_token="<|startoftext|>", eos_token="<|endoftext|>", pad_token="<|endoftext|>",
    chat_template="{% for message in messages %}"
                  "<|begin|>{{ message['role'] }}<|content|>{{ message['content'] }}<|end|>"
                  "{% endfor %}{% if add_generation_prompt %}<|begin|>assistant<|content|>{% endif %}")

K_EXAONE = Preset(
    name="k-exaone", split_pattern=r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?(?:\p{L}\p{M}*)+|\p{N}"
                  r"| ?[^\s\p{L}\p{N}]+[\r\n/]?|\s*[\r\n]"
                  r"|\s+(?!\S)|\s+",
    superword_pattern=r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?(?:\p{L}\p{M}*(?: \p{L}\p{M}*)*)+"
                      r"|\p{N}"
                      r"| ?[^\s\p{L}\p{N}]+[\r\n/]?|\s*[\r\n]|\s+(?!\S)|\s+", superword_share=0.2,
    normalization="nfc",
    special_tokens={
        "[PAD]": 0, "[BOS]": 1, "[UNK]": 3, "<|system|>": 49, "<|user|>": 50, "<|assistant|>": 51,
        "<|tool|>": 52, "<|endofturn|>": 53, "<think>": 54, "</think>": 55, "<tool_call>": 56,
        "</tool_call>": 57},
    bos_token="[BOS]", eos_token="<|endofturn|>", pad_token="[PAD]",
    chat_template="{% for message in messages %}"
                  "{{ '<|' + message['role'] + '|>\n' }}{{ message['content'] }}<|endofturn|>"
                  "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}")

PRESETS = {p.name: p for p in (SOLAR_OPEN, K_EXAONE)}
KINDS = {SOLAR_OPEN.name: "BPE", K_EXAONE.name: "SuperBPE: tokens of several words too",
         CUSTOM: "the rules in --config FILE"}
"""Preset -> kind of tokenizer, for help and messages."""


def load_preset(name: str, file: Path | None) -> Preset:
    """Return a built-in preset, or read `custom` from a JSON or YAML file with the fields of `Preset`.

    The file may have `digits` and `whitespace` (see `_Split`) instead of `split_pattern`. Raises `UserError`:
    an unknown name, a missing or malformed file, or fields that break a rule.
    """
    if name != CUSTOM:
        if file is not None:
            raise UserError(f"--config {file}: belongs to --preset custom, not to --preset {name}; "
                            "drop one of them")
        if name not in PRESETS:
            presets = ", ".join(f"{preset} ({kind})" for preset, kind in KINDS.items())
            raise UserError(f"--preset {name!r}: does not exist{suggest_name(name, KINDS)} (presets: "
                            f"{presets})")
        return PRESETS[name]
    if file is None:
        raise UserError(f"--preset {name}: needs --config FILE with the tokenizer's rules, JSON or YAML (see "
                        "docs/tokenizer.md)")
    where = f"--config {file}"
    located = parse_located_yaml(read_settings_text(file, where))
    if located.problems:
        raise SettingsError(where, located.problems)
    raw = located.value
    if isinstance(raw, dict):
        raw = {"name": CUSTOM, **_add_pattern(raw, where, located.lines)}
    return parse_settings(Preset, raw, where, lines=located.lines)


@dataclasses.dataclass(frozen=True)
class _Split:
    """Choices in a file from which the split pattern is built."""

    digits: Literal["single", "triples", "runs"] = "single"
    """Split numbers into digits or groups of three, or keep them whole."""
    whitespace: Literal["runs", "single"] = "runs"
    """Keep runs of blanks, or split each blank."""


def _add_pattern(raw: dict[str, Any], where: str, lines: Mapping[Place, int]) -> dict[str, Any]:
    """Replace `digits` and `whitespace` by a split pattern. Raises `SettingsError`: unknown values, or the
    file has `split_pattern` too."""
    choices = {key: raw[key] for key in ("digits", "whitespace") if key in raw}
    if "split_pattern" in raw:
        if choices:
            rule = "is a part of split_pattern, which is given too"
            raise SettingsError(where, [SettingsProblem(ProblemCode.RULE, key, rule, value,
                                                        "keep one of them")
                                        for key, value in choices.items()])
        return raw
    split = parse_settings(_Split, choices, where, lines=lines)
    punctuation = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
    word = r"[^\r\n\p{L}\p{N}]?(?:\p{L}\p{M}*)+"
    pattern = "|".join((_CONTRACTIONS, word, _DIGITS[split.digits], punctuation,
                        _WHITESPACE[split.whitespace]))
    return {key: value for key, value in raw.items() if key not in choices} | {"split_pattern": pattern}


@dataclasses.dataclass(frozen=True)
class CountPlan:
    """Settings for `learn_vocabulary`."""

    preset: Preset
    vocab_size: int
    """Ids, including special tokens."""
    transition_size: int
    """Ids before words join; `vocab_size` for plain BPE."""
    only_superwords: bool
    """Learn only superwords from there on, while the text has any. False: merge within words too."""
    superword_sample_bytes: int
    """Maximum text from which superwords are learned."""
    max_memory_bytes: int | None
    """Bound on memory. None: no bound on learning."""
    workers: int
    work: Path
    """Folder for counts."""
