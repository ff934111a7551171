"""Tokenizers of others, read as data: a Hugging Face folder or tokenizer.json, tiktoken's ranks, a
sentencepiece model.

Each comes as the tokenizer.json that says the same, beside the library that it was made for, to compare with.
"""

from __future__ import annotations

import json
import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from megatron_sov.base.documents.byte_bpe import byte_alphabet
from megatron_sov.base.errors import UserError, fix_missing, suggest_download
from megatron_sov.model.pretrained import read_json
from tokenizer.formats import sentencepiece_format, tiktoken_format
from tokenizer.formats.hf_files import CONFIG_JSON, TOKENIZER_JSON, check_id_range, translate_panics
from tokenizer.formats.sentencepiece_format import SPACE, format_byte_piece

NAMED = ("bos_token", "eos_token", "pad_token")
FORMS = f"a folder with {TOKENIZER_JSON}, such a file, tiktoken's ranks or sentencepiece's .model"


@dataclass(frozen=True)
class ForeignTokenizer:
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
        return max(get_token_ids(self.raw).values()) + 1


def get_token_ids(raw: dict[str, Any]) -> dict[str, int]:
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
        raise UserError(f"{path}: does not exist; pass {FORMS}"
                        f"{suggest_download(path, is_bare=not path.suffix)}",
                        fix_missing(path, is_bare=not path.suffix))
    if (path / TOKENIZER_JSON).is_file():
        return path / TOKENIZER_JSON
    # two candidates are a question to the user and no choice of ours
    found = sorted([*path.glob("*.tiktoken"), *path.glob("*.model")])
    if len(found) != 1:
        advice = f"pass {FORMS}"
        if (path / "merges.txt").is_file():
            advice = ("make tokenizer.json of vocab.json and merges.txt: transformers' GPT2TokenizerFast("
                      f"'{path}/vocab.json', '{path}/merges.txt').save_pretrained('{path}')")
        elif not found and (path / "config.json").is_file():
            advice = ("copy tokenizer.json, tokenizer_config.json and chat_template.jinja of the same model "
                      "into the folder")
        raise UserError(f"{path}: holds {len(found)} tokenizers "
                        f"({', '.join(f.name for f in found) or 'no tokenizer.json'}); {advice}")
    return found[0]


def open_foreign(path: Path, rules: Path | None = None) -> ForeignTokenizer:
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
    # by content: Llama 3 calls such a file tokenizer.model
    if tiktoken_format.is_ranks_file(file):
        return _open_tiktoken(file, rules or tiktoken_format.get_rules_path(file))
    return _open_sentencepiece(file)


def load_tokenizer(raw: dict[str, Any], where: object) -> Tokenizer:
    """Return a tokenizer.json as `tokenizers` reads it, with special tokens in text as ordinary text.

    Raises:
        UserError: it cannot be read.
    """
    try:
        with translate_panics(where):
            tokenizer = Tokenizer.from_str(json.dumps(raw, ensure_ascii=False))
            tokenizer.encode(tiktoken_format.PROBE)  # some patterns only fail in use
    except UserError:
        raise
    except Exception as e:  # the binding raises a bare Exception
        raise UserError(f"{where}: tokenizers cannot read it ({e}); restore it from its source") from None
    # or a user's text could spell the end of a turn
    tokenizer.encode_special_tokens = True
    return tokenizer


def build_text_encoder(tokenizer: Tokenizer) -> Callable[[str], list[int]]:
    return lambda text: tokenizer.encode(text, add_special_tokens=False).ids


def open_hf(file: Path) -> ForeignTokenizer:
    """Read a tokenizer.json and, beside it, tokenizer_config.json and the chat template.

    Raises:
        UserError: a file is damaged, or encoding is random.
    """
    raw = read_json(file)
    if (not isinstance(raw.get("model"), dict) or not isinstance(raw.get("added_tokens"), list)
            or "vocab" not in raw["model"]):
        is_pair = (file.parent / "merges.txt").is_file()
        raise UserError(f"{file}: has no model.vocab and added_tokens, so it is no tokenizer.json; " + (
            "of a vocab.json with merges.txt transformers makes one: `python -c \"from transformers import "
            f"AutoTokenizer as A; A.from_pretrained('{file.parent}').save_pretrained('DIR')\"`; pass DIR"
            if is_pair else f"pass {FORMS}"))
    try:
        ids = list(get_token_ids(raw).values())
    except (TypeError, ValueError, KeyError, AttributeError) as e:
        raise UserError(f"{file}: model.vocab or added_tokens are not what they should be ({e!r}); "
                        "restore it from its source") from None
    check_id_range(ids, file)
    if raw["model"].get("dropout"):
        raise UserError(f"{file}: model.dropout = {raw['model']['dropout']} makes encoding random; "
                        "set it to null")
    # settings of one use of it, by which text would be cut off silently
    raw |= {"truncation": None, "padding": None}
    tokenizer = load_tokenizer(raw, file)
    config = read_json(file.with_name(CONFIG_JSON)) if file.with_name(CONFIG_JSON).is_file() else {}
    named = {name: _get_token_text(config.get(name)) for name in NAMED}
    return ForeignTokenizer(file, "tokenizers", raw, build_text_encoder(tokenizer),
                   lambda ids: tokenizer.decode(ids, skip_special_tokens=False), named,
                   _read_template(config, file.with_name("chat_template.jinja")))


def _get_token_text(token: Any) -> str | None:
    """Return a special token's text; transformers writes it as text or as an object."""
    text = token.get("content") if isinstance(token, dict) else token
    if not isinstance(text, str | None):
        raise UserError(f"{CONFIG_JSON}: {text!r} is no special token; spell it as text")
    return text


def _read_template(config: dict[str, Any], file: Path) -> str | None:
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


def _open_tiktoken(file: Path, rules_file: Path) -> ForeignTokenizer:
    found, rules = tiktoken_format.read_ranks(file), tiktoken_format.read_rules(rules_file)
    encoder = tiktoken_format.build_encoder(found, rules)
    decode = tiktoken_format.build_encoding(found, rules).decode
    named = {name: getattr(rules, name) for name in NAMED}
    return ForeignTokenizer(file, "tiktoken", tiktoken_format.from_tiktoken(found, rules), encoder, decode,
                            named)


def _open_sentencepiece(file: Path) -> ForeignTokenizer:
    # optional: comes with sentencepiece
    from google.protobuf.message import DecodeError

    model = file.read_bytes()
    proto = sentencepiece_format.create_proto()
    try:
        proto.ParseFromString(model)
        processor = sentencepiece_format.create_processor(model)
    except (DecodeError, RuntimeError):
        raise UserError(f"{file}: is none of the forms that are read (or a damaged "
                        f"one); pass {FORMS}") from None
    raw = sentencepiece_format.from_sentencepiece(proto, str(file))
    return ForeignTokenizer(file, "sentencepiece", raw, processor.encode, processor.decode,
                   sentencepiece_format.get_special_tokens(proto))


PROBE = "a 가 😀\n"
_BYTES = {format_byte_piece(b): bytes([b]) for b in range(256)}


class LoadedTokenizer(ABC):
    """A tokenizer that encodes ordinary text: special tokens spelled out in it stay text wherever its
    library can do that.  Nothing is converted: what is reported is what the library itself does."""

    library: str
    """tokenizers, tiktoken or sentencepiece."""
    special: dict[int, str]
    """Ids that stand for no text of their own: special, control and unknown tokens."""
    added: dict[int, str]
    """Further tokens that are found before text is split."""
    tokens: dict[int, bytes]
    """Id -> UTF-8 bytes, or a part of a character, of every other token."""

    def __init__(self, path: Path, file: Path) -> None:
        self.path = path
        self.file = file
        self.name = path.name if path.suffix else path.resolve().name

    @property
    def vocab_size(self) -> int:
        """Rows that a model's embedding needs: the largest id + 1."""
        return max([*self.special, *self.added, *self.tokens]) + 1

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Return the ids of ordinary text."""

    @abstractmethod
    def encode_many(self, texts: list[str]) -> list[list[int]]:
        """Return the ids of each text."""

    @abstractmethod
    def encode_special(self, text: str) -> list[int]:
        """Return the ids of text in which special tokens are read as such."""

    @abstractmethod
    def decode(self, ids: list[int]) -> str:
        """Return the text of ids; bytes that are no character become U+FFFD."""

    def normalize(self, text: str) -> str:
        """Return the text that `decode(encode(text))` is meant to give."""
        return text


class HuggingFaceTokenizer(LoadedTokenizer):
    """A tokenizer.json, by `tokenizers`."""

    library = "tokenizers"

    def __init__(self, path: Path, file: Path) -> None:
        """Raises: UserError: the file is no tokenizer.json that the library reads, or it cannot encode."""
        super().__init__(path, file)
        self._raw = open_hf(file).raw
        self._tokenizer = load_tokenizer(self._raw, file)
        try:
            self.encode(PROBE)
        except Exception as e:  # the binding raises a bare Exception
            raise UserError(f"{file}: cannot encode {PROBE!r} ({' '.join(str(e).split())[:200]}); "
                            "give it a token for the unknown") from None
        found = self._tokenizer.get_added_tokens_decoder()
        self.special = {id_: token.content for id_, token in found.items() if token.special}
        self.added = {id_: token.content for id_, token in found.items() if not token.special}
        spelled = self._tokenizer.get_vocab(with_added_tokens=False)
        if (unknown := self._raw["model"].get("unk_token")) in spelled:
            self.special[spelled[unknown]] = unknown
        self._spelled = {id_: token
                         for token, id_ in spelled.items() if id_ not in found and id_ not in self.special}
        # a space, which the decoder takes away again
        self._prepends = "Prepend" in _collect_types(self._raw.get("normalizer"))
        kinds = _collect_types(self._raw.get("decoder"))
        self.tokens = {id_: self._bytes(id_, token, kinds) for id_, token in self._spelled.items()}

    def _bytes(self, id_: int, token: str, kinds: set[str]) -> bytes:
        if "ByteLevel" in kinds:
            back = byte_alphabet()
            return bytes(back[c] for c in token) if all(c in back for c in token) else token.encode()
        if kinds & {"ByteFallback", "Metaspace"}:
            return _decode_piece(token)
        return self._tokenizer.decode([id_], skip_special_tokens=False).encode()

    def encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def encode_many(self, texts: list[str]) -> list[list[int]]:
        return [e.ids for e in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    def encode_special(self, text: str) -> list[int]:
        self._tokenizer.encode_special_tokens = False
        try:
            return self.encode(text)
        finally:
            self._tokenizer.encode_special_tokens = True

    def decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=False))

    def normalize(self, text: str) -> str:
        normalizer = self._tokenizer.normalizer
        if normalizer is None:
            return text
        normal = str(normalizer.normalize_str(text)).replace(SPACE, " ")
        return normal.removeprefix(" ") if self._prepends else normal


class TiktokenTokenizer(LoadedTokenizer):
    """A file of ranks and the rules beside it, by `tiktoken`."""

    library = "tiktoken"

    def __init__(self, path: Path, file: Path) -> None:
        """Raises: UserError: the ranks are damaged, or there are no rules for them."""
        super().__init__(path, file)
        ranks, rules = (tiktoken_format.read_ranks(file),
                        tiktoken_format.read_rules(tiktoken_format.get_rules_path(file)))
        self._encoding = tiktoken_format.build_encoding(ranks, rules)
        self._form: Any = rules.normalization
        self.special = {id_: token for token, id_ in rules.special_tokens.items()}
        self.added = {}
        self.tokens = {rank: token for token, rank in ranks.items()}

    def encode(self, text: str) -> list[int]:
        return self._encoding.encode_ordinary(self.normalize(text))

    def encode_many(self, texts: list[str]) -> list[list[int]]:
        return self._encoding.encode_ordinary_batch([self.normalize(text) for text in texts], num_threads=2)

    def encode_special(self, text: str) -> list[int]:
        return self._encoding.encode(self.normalize(text), allowed_special="all")

    def decode(self, ids: list[int]) -> str:
        return self._encoding.decode(ids, errors="replace")

    def normalize(self, text: str) -> str:
        return text if self._form is None else unicodedata.normalize(self._form, text)


class SentencePieceTokenizer(LoadedTokenizer):
    """A .model file, by `sentencepiece`."""

    library = "sentencepiece"

    def __init__(self, path: Path, file: Path) -> None:
        """Raises: UserError: the package is not installed, or the file is no model of its."""
        super().__init__(path, file)
        try:
            self._model = sentencepiece_format.create_processor(file.read_bytes())
        except (RuntimeError, OSError):
            raise UserError(f"{file}: is none of the forms that are read (or a damaged one); "
                            f"pass {FORMS}") from None
        ids = range(self._model.get_piece_size())
        self.special = {i: self._model.id_to_piece(i)
                        for i in ids if self._model.is_control(i) or self._model.is_unknown(i)}
        self.added = {}
        self.tokens = {i: _decode_piece(self._model.id_to_piece(i)) for i in ids if i not in self.special}
        self._adds_space = self._model.normalize("a").startswith(SPACE)

    def encode(self, text: str) -> list[int]:
        return list(self._model.encode(text, out_type=int))

    def encode_many(self, texts: list[str]) -> list[list[int]]:
        return list(self._model.encode(texts, out_type=int, num_threads=2))

    def encode_special(self, text: str) -> list[int]:
        return self.encode(text)  # control tokens are never read from text

    def decode(self, ids: list[int]) -> str:
        return str(self._model.decode(ids))

    def normalize(self, text: str) -> str:
        normal = str(self._model.normalize(text)).replace(SPACE, " ")
        return normal.removeprefix(" ") if self._adds_space else normal


def open_tokenizer(path: Path) -> LoadedTokenizer:
    """Open a tokenizer.

    Raises:
        UserError: there is none at the path, or it cannot be read.
    """
    file = find_file(path)
    if file.suffix == ".json":
        opened: LoadedTokenizer = HuggingFaceTokenizer(path, file)
    elif tiktoken_format.is_ranks_file(file):  # Llama 3 has ranks in a file called tokenizer.model
        opened = TiktokenTokenizer(path, file)
    else:
        opened = SentencePieceTokenizer(path, file)
    if not opened.tokens:
        raise UserError(f"{file}: holds no tokens, so it is empty or damaged; pass {FORMS}")
    return opened


def _decode_piece(piece: str) -> bytes:
    """Return the bytes of a token that is spelled as sentencepiece does."""
    return _BYTES.get(piece) or piece.replace(SPACE, " ").encode()


def _collect_types(rules: dict[str, Any] | None) -> set[str]:
    """Return the types of a decoder or normalizer and of those inside it."""
    if not rules:
        return set()
    inner = [*rules.get("decoders", []), *rules.get("normalizers", [])]
    return {rules["type"]}.union(*map(_collect_types, inner))
