"""Read tokenizers of other libraries: a Hugging Face folder or tokenizer.json, or tiktoken's ranks.

`ForeignTokenizer` converts to an equivalent tokenizer.json, which `LoadedTokenizer` runs.
"""

import json
import shlex
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from megatron_sov.base.documents.byte_bpe import byte_alphabet
from megatron_sov.base.errors import Fix, UserError, fix_missing, suggest_download
from megatron_sov.base.hints.kinds import list_run_tokenizers
from megatron_sov.model.pretrained import read_json
from tokenizer.formats import tiktoken_format
from tokenizer.formats.hf_files import (
    CONFIG_JSON, TOKENIZER_JSON, check_id_range, get_token_ids, translate_panics)

SPECIAL_NAMES = ("bos_token", "eos_token", "pad_token")
FORMS = f"a folder with {TOKENIZER_JSON}, such a file, or tiktoken's ranks"
PROBE = "a 가 😀\n"
SPACE = "▁"
_BYTES = {f"<0x{b:02X}>": bytes([b]) for b in range(256)}


@dataclass(frozen=True)
class ForeignTokenizer:
    """A tokenizer as an equivalent tokenizer.json, with its own library's encoder for comparison."""

    file: Path
    library: str
    """tokenizers or tiktoken."""
    raw: dict[str, Any]
    """Equivalent tokenizer.json."""
    encode: Callable[[str], list[int]]
    """The library's ids for ordinary text."""
    decode: Callable[[list[int]], str]
    """The library's text for ids."""
    named_tokens: dict[str, str | None] = field(default_factory=dict)
    """bos_token, eos_token, pad_token; None if the source has no such token."""
    chat_template: str | None = None

    @property
    def vocab_size(self) -> int:
        """Largest id + 1."""
        return max(get_token_ids(self.raw).values()) + 1


def find_file(path: Path) -> Path:
    """Return the tokenizer file at a path or in a folder. Raises `UserError`: the path does not exist, or the
    folder does not contain exactly one tokenizer."""
    if path.is_file():
        return path
    if not path.is_dir():
        raise UserError(f"{path}: does not exist; pass {FORMS}"
                        f"{suggest_download(path, is_bare=not path.suffix)}",
                        fix_missing(path, is_bare=not path.suffix))
    if (path / TOKENIZER_JSON).is_file():
        return path / TOKENIZER_JSON
    files = sorted([*path.glob("*.tiktoken"), *path.glob("*.model")])
    if len(files) != 1:
        advice, fix = f"pass {FORMS}", None
        inside = [folder for folder in (path / "tokenizer", *list_run_tokenizers(path))
                  if (folder / TOKENIZER_JSON).is_file()]
        if (path / "merges.txt").is_file():
            advice = "make tokenizer.json of vocab.json and merges.txt"
            fix = _convert_by_transformers(path, path)
        elif inside:
            fix = Fix(words={str(path): str(inside[-1])})
            advice = f"pass {inside[-1]}"
        elif not files and (path / "config.json").is_file():
            advice = ("copy tokenizer.json, tokenizer_config.json and chat_template.jinja of the same model "
                      "into the folder")
        raise UserError(f"{path}: holds {len(files)} tokenizers "
                        f"({', '.join(f.name for f in files) or 'no tokenizer.json'}); {advice}", fix)
    return files[0]


def open_foreign(path: Path, rules: Path | None = None) -> ForeignTokenizer:
    """Read a tokenizer from a supported library.

    Args:
        path: file, or folder with the file.
        rules: for tiktoken, the JSON file with pat_str and special_tokens; None: next to the ranks.

    Raises:
        UserError: an unknown or damaged file, or `tokenizers` cannot express the tokenizer.
    """
    file = find_file(path)
    if file.suffix == ".json":
        return open_hf(file)
    # by content: Llama 3 has ranks in tokenizer.model
    if tiktoken_format.is_ranks_file(file):
        return _open_tiktoken(file, rules or tiktoken_format.get_rules_path(file))
    if file.suffix == ".model":
        raise UserError(f"{file}: is not tiktoken's ranks; transformers converts sentencepiece's models to "
                        f"{TOKENIZER_JSON}", _convert_by_transformers(path, file.parent))
    raise UserError(f"{file}: is no tokenizer (or a damaged one); pass {FORMS}", _fix_by_neighbour(file))


def load_tokenizer(raw: dict[str, Any], where: object) -> Tokenizer:
    """Load a tokenizer.json; special tokens in a text stay ordinary text.

    `where` names the file in errors. Raises `UserError`: `tokenizers` cannot read it.
    """
    try:
        with translate_panics(where):
            tokenizer = Tokenizer.from_str(json.dumps(raw, ensure_ascii=False))
            tokenizer.encode(tiktoken_format.PROBE)  # some patterns fail only when they run
    except UserError:
        raise
    except Exception as e:  # the binding raises a bare Exception
        raise UserError(f"{where}: tokenizers cannot read it ({e}); restore it from its source") from None
    # otherwise a user's text could contain the end of a turn
    tokenizer.encode_special_tokens = True
    return tokenizer


def build_text_encoder(tokenizer: Tokenizer) -> Callable[[str], list[int]]:
    return lambda text: tokenizer.encode(text, add_special_tokens=False).ids


def open_hf(file: Path) -> ForeignTokenizer:
    """Read a tokenizer.json and, from its folder, tokenizer_config.json and the chat template. Raises
    `UserError`: a file is damaged, or the model has dropout, which makes encoding random."""
    raw = read_json(file)
    if (not isinstance(raw.get("model"), dict) or not isinstance(raw.get("added_tokens"), list)
            or "vocab" not in raw["model"]):
        problem = f"{file}: has no model.vocab and added_tokens, so it is no {TOKENIZER_JSON}"
        if (file.parent / "merges.txt").is_file():
            raise UserError(f"{problem}; transformers makes one of vocab.json with merges.txt",
                            _convert_by_transformers(file, file.parent))
        raise UserError(f"{problem}; pass {FORMS}", _fix_by_neighbour(file))
    try:
        ids = list(get_token_ids(raw).values())
    except (TypeError, ValueError, KeyError, AttributeError) as e:
        raise UserError(f"{file}: model.vocab or added_tokens are not what they should be ({e!r}); "
                        "restore it from its source") from None
    check_id_range(ids, file)
    vocab = raw["model"]["vocab"]
    if isinstance(vocab, dict) and len({*vocab.values()}) < len(vocab):
        raise UserError(f"{file}: model.vocab gives one id to two tokens; restore the file from its source")
    if raw["model"].get("dropout"):
        raise UserError(f"{file}: model.dropout = {raw['model']['dropout']} makes encoding random; "
                        "set it to null")
    # truncation would cut text silently
    raw |= {"truncation": None, "padding": None}
    tokenizer = load_tokenizer(raw, file)
    config = read_json(file.with_name(CONFIG_JSON)) if file.with_name(CONFIG_JSON).is_file() else {}
    named_tokens = {name: _get_token_text(config.get(name)) for name in SPECIAL_NAMES}
    return ForeignTokenizer(file, "tokenizers", raw, build_text_encoder(tokenizer),
                            lambda ids: tokenizer.decode(ids, skip_special_tokens=False), named_tokens,
                            _read_template(config, file.with_name("chat_template.jinja")))


def _get_token_text(token: Any) -> str | None:
    """Return a special token's text; tokenizer_config.json has a string or an object."""
    text = token.get("content") if isinstance(token, dict) else token
    if not isinstance(text, str | None):
        raise UserError(f"{CONFIG_JSON}: {text!r} is no special token; spell it as text")
    return text


def _read_template(config: dict[str, Any], file: Path) -> str | None:
    """Return the chat template; of several, the one named "default"."""
    if file.is_file():
        try:
            return file.read_text(encoding="utf-8")
        except UnicodeDecodeError as e:
            raise UserError(f"{file}: is not UTF-8 ({e.reason}); save it as UTF-8") from None
    template = config.get("chat_template")
    if isinstance(template, list):
        template = next((t.get("template") for t in template
                         if isinstance(t, dict) and t.get("name") == "default"), None)
    if not isinstance(template, str | None):
        raise UserError(f"{file.with_name(CONFIG_JSON)}: chat_template is a {type(template).__name__}, "
                        "must be text; correct it there")
    return template


def _open_tiktoken(file: Path, rules_file: Path) -> ForeignTokenizer:
    ranks, rules = tiktoken_format.read_ranks(file), tiktoken_format.read_rules(rules_file)
    return ForeignTokenizer(file, "tiktoken", raw=tiktoken_format.from_tiktoken(ranks, rules),
                            encode=tiktoken_format.build_encoder(ranks, rules),
                            decode=tiktoken_format.build_encoding(ranks, rules).decode,
                            named_tokens={name: getattr(rules, name) for name in SPECIAL_NAMES})


def _convert_by_transformers(typed: Path, folder: Path) -> Fix:
    """Return the command that writes a tokenizer.json into a folder with vocab.json and merges.txt, or with
    sentencepiece's .model."""
    loading = f"AutoTokenizer as T; T.from_pretrained({str(folder)!r})"
    if (folder / "merges.txt").is_file():
        loading = f"GPT2TokenizerFast as T; T({f'{folder}/vocab.json'!r}, {f'{folder}/merges.txt'!r})"
    code = f"from transformers import {loading}.save_pretrained({str(folder)!r})"
    return Fix(words={str(typed): str(folder)}, before=(shlex.join(["python", "-c", code]),))


def _fix_by_neighbour(file: Path) -> Fix | None:
    """Return the replacement of a file by the tokenizer in its folder."""
    return Fix(words={str(file): str(file.parent)}) if (file.parent / TOKENIZER_JSON).is_file() else None


class LoadedTokenizer:
    """A tokenizer in `tokenizers`, with the bytes of its tokens.

    Special tokens in ordinary text stay text."""

    special: dict[int, str]
    """Ids of special, control and unknown tokens."""
    added: dict[int, str]
    """Other ids that are matched before the text is split."""
    tokens: dict[int, bytes]
    """Id -> UTF-8 bytes, or part of a character, of every other token."""

    def __init__(self, path: Path, source: ForeignTokenizer) -> None:
        self.path, self.file, self.library = path, source.file, source.library
        self.name = path.name if path.suffix else path.resolve().name
        raw, file = source.raw, source.file
        self._tokenizer = load_tokenizer(raw, file)
        try:
            self.encode(PROBE)
        except Exception as e:  # the binding raises a bare Exception
            raise UserError(f"{file}: cannot encode {PROBE!r} ({' '.join(str(e).split())[:200]}); "
                            "give it a token for the unknown") from None
        added_tokens = self._tokenizer.get_added_tokens_decoder()
        self.special = {id_: token.content for id_, token in added_tokens.items() if token.special}
        self.added = {id_: token.content for id_, token in added_tokens.items() if not token.special}
        vocab = self._tokenizer.get_vocab(with_added_tokens=False)
        if (unknown := raw["model"].get("unk_token")) in vocab:
            self.special[vocab[unknown]] = unknown
        # the decoder removes the space that the normalizer prepends
        self._prepends = "Prepend" in _collect_types(raw.get("normalizer"))
        decoders = _collect_types(raw.get("decoder"))
        self.tokens = {id_: self._decode_token(id_, token, decoders) for token, id_ in vocab.items()
                       if id_ not in added_tokens and id_ not in self.special}

    @property
    def vocab_size(self) -> int:
        """Rows in a model's embedding: the largest id + 1."""
        return max([*self.special, *self.added, *self.tokens]) + 1

    def _decode_token(self, id_: int, token: str, decoders: set[str]) -> bytes:
        if "ByteLevel" in decoders:
            alphabet = byte_alphabet()
            if not all(c in alphabet for c in token):
                return token.encode()
            return bytes(alphabet[c] for c in token)
        if decoders & {"ByteFallback", "Metaspace"}:
            return _BYTES.get(token) or token.replace(SPACE, " ").encode()
        return self._tokenizer.decode([id_], skip_special_tokens=False).encode()

    def encode(self, text: str) -> list[int]:
        """Encode ordinary text."""
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def encode_many(self, texts: list[str]) -> list[list[int]]:
        """Encode ordinary texts in parallel."""
        return [e.ids for e in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    def encode_special(self, text: str) -> list[int]:
        """Encode text and recognize special tokens."""
        self._tokenizer.encode_special_tokens = False
        try:
            return self.encode(text)
        finally:
            self._tokenizer.encode_special_tokens = True

    def decode(self, ids: list[int]) -> str:
        """Decode ids; bytes of incomplete characters become U+FFFD."""
        return str(self._tokenizer.decode(ids, skip_special_tokens=False))

    def normalize(self, text: str) -> str:
        """Return the expected `decode(encode(text))`."""
        normalizer = self._tokenizer.normalizer
        if normalizer is None:
            return text
        normal = str(normalizer.normalize_str(text)).replace(SPACE, " ")
        return normal.removeprefix(" ") if self._prepends else normal


def open_tokenizer(path: Path) -> LoadedTokenizer:
    """Load the tokenizer at a path. Raises `UserError`: no tokenizer at the path, or a damaged file."""
    source = open_foreign(path)
    tokenizer = LoadedTokenizer(path, source)
    if not tokenizer.tokens:
        raise UserError(f"{source.file}: holds no tokens, so it is empty or damaged; pass {FORMS}")
    return tokenizer


def _collect_types(rules: dict[str, Any] | None) -> set[str]:
    """Return the types in a decoder or normalizer, including nested steps."""
    if not rules:
        return set()
    inner = [*rules.get("decoders", []), *rules.get("normalizers", [])]
    return {rules["type"]}.union(*map(_collect_types, inner))
