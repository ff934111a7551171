"""Tokenizers of others, read as data: a Hugging Face folder or tokenizer.json, tiktoken's ranks, a
sentencepiece model.

Each comes as the tokenizer.json that says the same, beside the library that it was made for, to compare with.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_sov.base.errors import UserError, download
from megatron_sov.model.pretrained import read_json
from tokenizer.formats import sentencepiece_format, tiktoken_format
from tokenizer.formats.hf_files import CONFIG_JSON, TOKENIZER_JSON
from tokenizer.formats.hostile import no_panics, refuse_far_ids

if TYPE_CHECKING:
    from tokenizers import Tokenizer

NAMED = ("bos_token", "eos_token", "pad_token")
FORMS = f"a folder with {TOKENIZER_JSON}, such a file, tiktoken's ranks or sentencepiece's .model"


@dataclass(frozen=True)
class Foreign:
    """A tokenizer that was read."""

    file: Path
    """What it was read from."""
    library: str
    """The library that it was made for: tokenizers, tiktoken, sentencepiece."""
    raw: dict[str, Any]
    """The tokenizer.json that says the same."""
    encode: Callable[[str], list[int]]
    """The library's ids of ordinary text."""
    decode: Callable[[list[int]], str]
    """The library's text of ids."""
    named: dict[str, str | None] = field(default_factory=dict)
    """bos_token, eos_token, pad_token; None where it has none."""
    chat_template: str | None = None

    @property
    def vocab_size(self) -> int:
        """The largest id and one."""
        return max(ids_of(self.raw).values()) + 1


def ids_of(raw: dict[str, Any]) -> dict[str, int]:
    """Return token -> id of a tokenizer.json, added tokens included."""
    vocab = raw["model"]["vocab"]
    ids = dict(vocab) if isinstance(vocab, dict) else {piece: id_ for id_, (piece, _) in enumerate(vocab)}
    return ids | {token["content"]: token["id"] for token in raw["added_tokens"]}


def find_file(path: Path) -> Path:
    """Return the file of a path that holds the tokenizer; a folder may hold one.

    Raises:
        UserError: there is none.
    """
    if path.is_file():
        return path
    if not path.is_dir():
        raise UserError(f"{path}: does not exist; pass {FORMS}{download(path)}")
    if (path / TOKENIZER_JSON).is_file():
        return path / TOKENIZER_JSON
    found = sorted([*path.glob("*.tiktoken"), *path.glob("*.model")])
    if len(found) != 1:
        raise UserError(f"{path}: holds {len(found)} tokenizers "
                        f"({', '.join(f.name for f in found) or 'no tokenizer.json'}); pass {FORMS}")
    return found[0]


def open_foreign(path: Path, rules: Path | None = None) -> Foreign:
    """Read a tokenizer of any of the forms.

    Args:
        path: file, or folder that holds one.
        rules: for tiktoken, the JSON file with pat_str and special_tokens; None: beside the ranks.

    Raises:
        UserError: it is of none of the forms, damaged, or uses what `tokenizers` has no form for.
    """
    file = find_file(path)
    if file.suffix == ".json":
        return open_hf(file)
    if tiktoken_format.is_ranks_file(file):
        return _open_tiktoken(file, rules or tiktoken_format.rules_path(file))
    return _open_sentencepiece(file)


def opened(raw: dict[str, Any], where: object) -> Tokenizer:
    """Return a tokenizer.json as `tokenizers` reads it, with special tokens in text as ordinary text.

    Raises:
        UserError: it cannot be read.
    """
    from tokenizers import Tokenizer

    try:
        with no_panics(where):
            tokenizer = Tokenizer.from_str(json.dumps(raw, ensure_ascii=False))
            tokenizer.encode(tiktoken_format.PROBE)  # some patterns only fail in use
    except UserError:
        raise
    except Exception as e:  # the binding raises a bare Exception
        raise UserError(f"{where}: tokenizers cannot read it ({e}); restore it from its source") from None
    tokenizer.encode_special_tokens = True
    return tokenizer


def plain_ids(tokenizer: Tokenizer) -> Callable[[str], list[int]]:
    """Return the encoding of ordinary text, nothing added."""
    return lambda text: tokenizer.encode(text, add_special_tokens=False).ids


def open_hf(file: Path) -> Foreign:
    """Read a tokenizer.json and, beside it, tokenizer_config.json and the chat template.

    Raises:
        UserError: a file is damaged, or encoding is random.
    """
    raw = read_json(file)
    if (not isinstance(raw.get("model"), dict) or not isinstance(raw.get("added_tokens"), list)
            or "vocab" not in raw["model"]):
        raise UserError(f"{file}: has no model.vocab and added_tokens, "
                        f"so it is no tokenizer.json; pass {FORMS}")
    try:
        ids = list(ids_of(raw).values())
    except (TypeError, ValueError, KeyError, AttributeError) as e:
        raise UserError(f"{file}: model.vocab or added_tokens are not what they should be ({e!r}); "
                        "restore it from its source") from None
    refuse_far_ids(ids, file)
    if raw["model"].get("dropout"):
        raise UserError(f"{file}: model.dropout = {raw['model']['dropout']} makes encoding random; "
                        "set it to null")
    # settings of one use of it, by which text would be cut off silently
    raw |= {"truncation": None, "padding": None}
    tokenizer = opened(raw, file)
    config = read_json(file.with_name(CONFIG_JSON)) if file.with_name(CONFIG_JSON).is_file() else {}
    named = {name: _content(config.get(name)) for name in NAMED}
    return Foreign(file, "tokenizers", raw, plain_ids(tokenizer),
                   lambda ids: tokenizer.decode(ids, skip_special_tokens=False), named,
                   _template(config, file.with_name("chat_template.jinja")))


def _content(token: Any) -> str | None:
    """Return a special token's text; transformers writes it as text or as an object."""
    text = token.get("content") if isinstance(token, dict) else token
    if not isinstance(text, str | None):
        raise UserError(f"{CONFIG_JSON}: {text!r} is no special token; spell it as text")
    return text


def _template(config: dict[str, Any], file: Path) -> str | None:
    """Return the chat template, the default one of several."""
    if file.is_file():
        return file.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):
        template = next((t.get("template") for t in template
                         if isinstance(t, dict) and t.get("name") == "default"), None)
    if not isinstance(template, str | None):
        raise UserError(f"{file.with_name(CONFIG_JSON)}: chat_template is a {type(template).__name__}, "
                        "must be text; correct it there")
    return template


def _open_tiktoken(file: Path, rules_file: Path) -> Foreign:
    found, rules = tiktoken_format.read_ranks(file), tiktoken_format.read_rules(rules_file)
    encoder = tiktoken_format.encoder(found, rules)
    decode = tiktoken_format.encoding(found, rules).decode
    named = {name: getattr(rules, name) for name in NAMED}
    return Foreign(file, "tiktoken", tiktoken_format.from_tiktoken(found, rules), encoder, decode, named)


def _open_sentencepiece(file: Path) -> Foreign:
    from google.protobuf.message import DecodeError

    model = file.read_bytes()
    proto = sentencepiece_format.new_proto()
    try:
        proto.ParseFromString(model)
        processor = sentencepiece_format.processor(model)
    except (DecodeError, RuntimeError):
        raise UserError(f"{file}: is none of the forms that are read (or a damaged "
                        f"one); pass {FORMS}") from None
    raw = sentencepiece_format.from_sentencepiece(proto, str(file))
    return Foreign(file, "sentencepiece", raw, processor.encode, processor.decode,
                   sentencepiece_format.named_tokens(proto))
