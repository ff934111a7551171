"""Read and write tiktoken's files: ranks (base64 bytes, a space and the id per line) and rules (JSON).

tiktoken's split patterns are for fancy-regex, but `tokenizers` uses Oniguruma with Ruby's syntax, which
differs silently: `X{1,3}+` is possessive in fancy-regex and a repetition of `X{1,3}` in Ruby, and `^` and `$`
are ends of the text in fancy-regex and ends of a line in Ruby.
"""

import base64
import binascii
import json
import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import tiktoken

from megatron_sov.base.documents.byte_bpe import build_ranks, parse_split_pattern
from megatron_sov.base.errors import UserError
from tokenizer.bpe.segmenting import find_last_merge
from tokenizer.bpe.vocabulary import spell_token
from tokenizer.formats.hf_files import ID_DIGITS, build_special_token, check_id_range, translate_panics

_ATOM_OR_SIGN = re.compile(
    r"(?P<atom>\\[pP]\{[^}]*\}|\\x\{[^}]*\}|\\.|[^\\\[\](){}|^$*+?])"  # a class, an escape, a character
    r"|(?P<interval>\{\d*,?\d*\}\+)"
    r"|(?P<quantifier>\{\d*,?\d*\}\??|[*+?][+?]?)"
    r"|(?P<sign>[\[\](){}|^$])", re.DOTALL)
NORMALIZATIONS = {"NFC", "NFD", "NFKC", "NFKD"}
PROBE = "a b 1\n"


def convert_to_oniguruma(pattern: str) -> str:
    """Translate a fancy-regex pattern to Ruby's syntax."""
    out: list[str] = []
    starts: list[int] = []  # index in `out` of each open group
    last = 0  # index in `out` of the last complete atom
    position = 0
    while position < len(pattern):
        if pattern[position] == "[":
            end = _find_class_end(pattern, position)
            last = len(out)
            out.append(pattern[position:end])
            position = end
            continue
        match = _ATOM_OR_SIGN.match(pattern, position)
        if match is None:
            return pattern  # malformed, which the compiler reports
        text, position = match.group(), match.end()
        if match["interval"]:
            # an atomic group means the same in both syntaxes
            out[last:] = ["(?>", *out[last:], text[:-1], ")"]
            continue
        if match["atom"]:
            last = len(out)
        elif text == "(":
            starts.append(len(out))
        elif text == ")" and starts:
            last = starts.pop()
        out.append({"^": r"\A", "$": r"\z"}.get(text, text))
    return "".join(out)


def _find_class_end(pattern: str, start: int) -> int:
    """Return the end index for the character class at `start`; classes nest."""
    depth, position = 0, start
    while position < len(pattern):
        if pattern[position] == "\\":
            position += 1
        elif pattern[position] == "[":
            depth += 1
        elif pattern[position] == "]":
            depth -= 1
            if not depth:
                return position + 1
        position += 1
    return len(pattern)


@dataclass(frozen=True)
class TiktokenRules:
    """The rules file: the arguments of tiktoken, and three named tokens for `import`."""

    pat_str: str
    """Split pattern in fancy-regex syntax."""
    special_tokens: dict[str, int]
    """Special token -> id."""
    name: str = "imported"
    normalization: str | None = None
    """Unicode form (NFC, ...) to apply to text before tiktoken."""
    bos_token: str | None = None
    eos_token: str | None = None
    pad_token: str | None = None

    def find_problem(self) -> str | None:
        """Return a sentence about the first wrong field."""
        types: dict[str, type | tuple[type, ...]] = {"pat_str": str, "special_tokens": dict, "name": str}
        for field in fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, types.get(field.name, (str, type(None)))):
                return f"{field.name} = {value!r} has the wrong type"
        if bad := next((t for t, i in self.special_tokens.items() if type(i) is not int or i < 0), None):
            return (f"special_tokens[{bad!r}] = {self.special_tokens[bad]!r} must be an id, "
                    "a whole number from 0")
        if len(set(self.special_tokens.values())) < len(self.special_tokens):
            return "special_tokens gives one id to two tokens"
        if self.normalization not in {None, *NORMALIZATIONS}:
            return (f"normalization = {self.normalization!r} must be one of "
                    f"{', '.join(sorted(NORMALIZATIONS))}, or null")
        return None


def to_tiktoken(raw: dict[str, Any], name: str,
                named_tokens: dict[str, str | None]) -> tuple[dict[bytes, int], TiktokenRules]:
    """Convert a tokenizer.json to ranks and rules. `raw`: tokenizer.json; `name`: encoding name;
    `named_tokens`: bos_token, eos_token and pad_token. Raises `NotByteBpe`: the tokenizer is not byte-level
    BPE. `UserError`: tiktoken cannot express the normalizer or a special token."""
    normalizer = raw.get("normalizer")
    kind = normalizer["type"] if normalizer else None
    if kind not in {None, *NORMALIZATIONS}:
        raise UserError(f"{name}: its normalizer {kind} has no form in tiktoken, which takes text as it is; "
                        f"only {', '.join(sorted(NORMALIZATIONS))} can be applied beforehand")
    special = {token["content"]: token["id"] for token in raw["added_tokens"]}
    for token in raw["added_tokens"]:
        text = token["content"]
        for flag in ("lstrip", "rstrip", "single_word"):
            if token.get(flag):
                raise UserError(f"{name}: added token {text!r} has {flag}, for which tiktoken has no form")
        if longer := next((s for s in special if s != text and s.startswith(text)), None):
            raise UserError(f"{name}: special token {text!r} begins {longer!r}, "
                            "and tiktoken does not define which of the two matches; rename one")
    return build_ranks(raw), TiktokenRules(parse_split_pattern(raw), special, name, kind, **named_tokens)


def format_ranks(ranks: dict[bytes, int]) -> bytes:
    """Return a ranks file, sorted by id."""
    return b"".join(base64.b64encode(token) + b" %d\n" % id_
                    for token, id_ in sorted(ranks.items(), key=lambda e: e[1]))


def get_rules_path(file: Path) -> Path:
    return file.with_name(file.name + ".json")


def is_ranks_file(file: Path) -> bool:
    """Return whether the first line has base64, a space and an id."""
    with open(file, "rb") as f:
        return _parse_rank_line(f.readline(4096)) is not None


def _parse_rank_line(line: bytes) -> tuple[bytes, int] | None:
    token, _, id_ = line.rstrip(b"\r\n").partition(b" ")
    try:
        # int() of a huge number takes quadratic time
        if not id_.isdigit() or len(id_) > ID_DIGITS:
            return None
        return base64.b64decode(token, validate=True), int(id_)
    except binascii.Error:
        return None


def read_ranks(file: Path) -> dict[bytes, int]:
    """Read a ranks file. Raises `UserError`: a damaged line, a duplicate token or id, or one of the 256 bytes
    is missing."""
    ranks: dict[bytes, int] = {}
    ids: set[int] = set()
    with open(file, "rb") as f:
        for number, line in enumerate(f, 1):
            if not line.strip():
                continue
            if (entry := _parse_rank_line(line)) is None:
                raise UserError(f"{file}:{number}: {line[:40]!r} is not a token in base64, a space and its "
                                "id; restore the file from its source")
            token, id_ = entry
            if token in ranks or id_ in ids:
                raise UserError(f"{file}:{number}: token {token!r} or id {id_} stands twice; "
                                "restore the file from its source")
            ranks[token] = id_
            ids.add(id_)
    # tiktoken allocates memory up to the largest id
    check_id_range(ids, file)
    if missing := [b for b in range(256) if bytes([b]) not in ranks]:
        raise UserError(f"{file}: byte 0x{missing[0]:02X} is no token, so text that holds it could not be "
                        "encoded; add all 256 bytes or take another tokenizer")
    return ranks


def read_rules(file: Path) -> TiktokenRules:
    """Read a rules file; unknown fields are ignored. Raises `UserError`: the file cannot be read, or a field
    is missing or wrong."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
        rules = TiktokenRules(**{f.name: value[f.name] for f in fields(TiktokenRules) if f.name in value})
    except FileNotFoundError:
        raise UserError(f"{file}: does not exist, but a ranks file alone is no tokenizer; "
                        "write pat_str and special_tokens there, or name such a file by --rules") from None
    except (OSError, ValueError, TypeError, RecursionError) as e:
        raise UserError(f"{file}: is no JSON object with pat_str and special_tokens ({e})") from None
    if problem := rules.find_problem():
        raise UserError(f"{file}: {problem}")
    if token := next((t for t, id_ in rules.special_tokens.items() if id_ >= 10**ID_DIGITS), None):
        raise UserError(f"{file}: special_tokens[{token!r}] is no id that a tokenizer has; correct it")
    return rules


def build_encoding(ranks: dict[bytes, int], rules: TiktokenRules) -> tiktoken.Encoding:
    """Build the tiktoken encoding. Raises `UserError`: a malformed pattern, or a special token has the id of
    an ordinary token."""
    tokens = {id_: token for token, id_ in ranks.items()}
    for special, id_ in rules.special_tokens.items():
        if id_ in tokens:
            raise UserError(f"{rules.name}: special token {special!r} has id {id_}, which is the id of "
                            f"{tokens[id_]!r}; give it a free id")
    check_id_range([*ranks.values(), *rules.special_tokens.values()], rules.name)
    if not rules.pat_str:
        raise UserError(f"{rules.name}: pat_str is empty, and would not split text; set a pattern")
    try:
        with translate_panics(rules.name):
            encoding = tiktoken.Encoding(rules.name, pat_str=rules.pat_str, mergeable_ranks=ranks,
                                         special_tokens=rules.special_tokens)
            encoding.encode_ordinary(PROBE)  # some patterns fail only when they run
        return encoding
    except ValueError as e:
        raise UserError(f"{rules.name}: pat_str {rules.pat_str!r} is no regular expression ({e})") from None


def build_encoder(ranks: dict[bytes, int], rules: TiktokenRules) -> Callable[[str], list[int]]:
    """Return a function that normalizes and encodes ordinary text."""
    ordinary = build_encoding(ranks, rules).encode_ordinary
    form: Any = rules.normalization
    return ordinary if form is None else lambda text: ordinary(unicodedata.normalize(form, text))


def from_tiktoken(ranks: dict[bytes, int], rules: TiktokenRules) -> dict[str, Any]:
    """Convert ranks and rules to a tokenizer.json.

    A token that no merge produces matches only a complete piece of text, which `ignore_merges` expresses.
    """
    spellings = {token: spell_token(token) for token in sorted(ranks, key=ranks.__getitem__)}
    vocab = {text: ranks[token] for token, text in spellings.items()}
    # tokenizer.json has one table for both, so text could become a special token
    if taken := next((t for t in rules.special_tokens if t in vocab), None):
        raise UserError(f"{rules.name}: special token {taken!r} is spelled like an ordinary token, "
                        "so text could become its id; rename it")
    rank_of: dict[bytes, float] = dict(ranks)
    # ranks list the products of merges; merging below a product's rank gives its pair
    pairs = [find_last_merge([bytes([b]) for b in token], rank_of) for token in spellings if len(token) > 1]
    added = sorted(rules.special_tokens.items(), key=lambda e: e[1])
    return {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [build_special_token(id_, token) for token, id_ in added],
        "normalizer": {"type": rules.normalization} if rules.normalization else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": convert_to_oniguruma(rules.pat_str)},
             "behavior": "Isolated", "invert": False},
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}]},
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                  "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
                  "ignore_merges": None in pairs, "vocab": vocab | dict(added),
                  "merges": [[spellings[a], spellings[b]] for a, b in filter(None, pairs)]}}
