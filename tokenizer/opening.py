"""Any tokenizer given as a path, opened by the library that it was made for, behind one small interface.

A path may be a folder (ours, or a Hugging Face model's), a tokenizer.json, tiktoken's ranks (with the pattern beside them)
or a sentencepiece model.  Files are data: nothing of them is run or unpickled, and nothing is fetched.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

from megatron_sov.errors import UserError
from tokenizer.hf_files import TOKENIZER_JSON
from tokenizer.vocabulary import byte_characters

WORD_START = "▁"
"""How sentencepiece spells a space."""
_RANKS_LINE = re.compile(rb"[A-Za-z0-9+/]+=* \d+\s*")
_BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")


class Opened(ABC):
    """A tokenizer that encodes ordinary text: special tokens spelled out in it stay text wherever its library can do that."""

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

    def merged_alone(self, id_: int) -> list[int] | None:
        """Return what a token's own bytes become by merges alone, unsplit; None where the library does not tell.

        In byte-pair encoding a token that its own bytes do not become is never given for any text: merges inside it come in
        the same order whatever stands around it.
        """
        return None


class HuggingFace(Opened):
    """A tokenizer.json, by `tokenizers`."""

    library = "tokenizers"

    def __init__(self, path: Path, file: Path) -> None:
        """Raises: UserError: the file is no tokenizer.json that the library reads."""
        from tokenizers import Tokenizer

        super().__init__(path, file)
        try:
            self._tokenizer = Tokenizer.from_file(str(file))
            self._tokenizer.encode("a 가 😀\n")
        except Exception as e:  # the binding raises a bare Exception
            raise UserError(f"{file}: is no tokenizer.json that the tokenizers library reads ({_line(e)}); "
                            "save it again with a current version of transformers") from None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True
        self._rules = json.loads(self._tokenizer.to_str())
        found = self._tokenizer.get_added_tokens_decoder()
        self.special = {id_: token.content for id_, token in found.items() if token.special}
        self.added = {id_: token.content for id_, token in found.items() if not token.special}
        spelled = self._tokenizer.get_vocab(with_added_tokens=False)
        if unknown := self._rules["model"].get("unk_token"):
            self.special.setdefault(spelled.get(unknown, 0), unknown)
        self._spelled = {id_: token for token, id_ in spelled.items() if id_ not in found and id_ not in self.special}
        self.tokens = {id_: self._bytes(id_, token) for id_, token in self._spelled.items()}

    def _bytes(self, id_: int, token: str) -> bytes:
        kinds = _kinds(self._rules["decoder"])
        if "ByteLevel" in kinds:
            back = byte_of_character()
            return bytes(back[c] for c in token) if all(c in back for c in token) else token.encode()
        if "ByteFallback" in kinds or "Metaspace" in kinds or any(c.startswith(WORD_START) for c in token):
            return _piece_bytes(token)
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
        return text if normalizer is None else str(normalizer.normalize_str(text)).replace(WORD_START, " ")

    def merged_alone(self, id_: int) -> list[int] | None:
        model = self._rules["model"]
        if model["type"] != "BPE" or model.get("ignore_merges") or model.get("dropout"):
            return None
        return [token.id for token in self._tokenizer.model.tokenize(self._spelled[id_])]


class Tiktoken(Opened):
    """A file of ranks and the pattern beside it, by `tiktoken`."""

    library = "tiktoken"

    def __init__(self, path: Path, file: Path) -> None:
        """Raises: UserError: the ranks are damaged, or there is no pattern for them."""
        import tiktoken

        super().__init__(path, file)
        rules = _tiktoken_rules(file)
        ranks = _ranks(file)
        try:
            self._encoding = tiktoken.Encoding(self.name, pat_str=rules["pat_str"], mergeable_ranks=ranks,
                                               special_tokens=rules["special_tokens"])
            self.encode("a")
        except BaseException as e:  # the binding panics on a bad pattern, which is no Exception
            if isinstance(e, (KeyboardInterrupt, SystemExit)):
                raise
            raise UserError(f"{file}: tiktoken does not take its ranks with this pattern ({_line(e)}); "
                            "check both files") from None
        self.special = {id_: token for token, id_ in rules["special_tokens"].items()}
        self.added = {}
        self.tokens = {rank: token for token, rank in ranks.items()}

    def encode(self, text: str) -> list[int]:
        return self._encoding.encode_ordinary(text)

    def encode_many(self, texts: list[str]) -> list[list[int]]:
        return self._encoding.encode_ordinary_batch(texts, num_threads=2)

    def encode_special(self, text: str) -> list[int]:
        return self._encoding.encode(text, allowed_special="all")

    def decode(self, ids: list[int]) -> str:
        return self._encoding.decode(ids, errors="replace")


class SentencePiece(Opened):
    """A .model file, by `sentencepiece`."""

    library = "sentencepiece"

    def __init__(self, path: Path, file: Path) -> None:
        """Raises: UserError: the package is not installed, or the file is no model of its."""
        try:
            import sentencepiece
        except ImportError:
            raise UserError(f"{file}: reading a sentencepiece model needs the package sentencepiece; "
                            "pip install sentencepiece") from None
        super().__init__(path, file)
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_file=str(file))
        except (RuntimeError, OSError) as e:
            raise UserError(f"{file}: is no sentencepiece model ({_line(e)}); "
                            "pass a .model file as its trainer wrote it") from None
        ids = range(self._model.get_piece_size())
        self.special = {i: self._model.id_to_piece(i) for i in ids if self._model.is_control(i) or self._model.is_unknown(i)}
        self.added = {}
        self.tokens = {i: _piece_bytes(self._model.id_to_piece(i)) for i in ids if i not in self.special}
        self._adds_space = self._model.normalize("a").startswith(WORD_START)

    def encode(self, text: str) -> list[int]:
        return list(self._model.encode(text, out_type=int))

    def encode_many(self, texts: list[str]) -> list[list[int]]:
        return list(self._model.encode(texts, out_type=int, num_threads=2))

    def encode_special(self, text: str) -> list[int]:
        return self.encode(text)  # control tokens are never read from text

    def decode(self, ids: list[int]) -> str:
        return str(self._model.decode(ids))

    def normalize(self, text: str) -> str:
        normal = str(self._model.normalize(text)).replace(WORD_START, " ")
        return normal.removeprefix(" ") if self._adds_space else normal


def open_tokenizer(path: Path) -> Opened:
    """Open a tokenizer.

    Raises:
        UserError: there is none at the path, or it cannot be read.
    """
    if not path.exists():
        raise UserError(f"{path}: does not exist; pass a tokenizer's folder, a tokenizer.json, a .tiktoken file or a .model file")
    file = _main_file(path)
    try:
        with open(file, "rb") as f:
            first = f.readline(1000)
    except OSError as e:
        raise UserError(f"{file}: cannot be read ({e.strerror}); check the path and its permissions") from None
    if _RANKS_LINE.fullmatch(first):  # Llama 3 has ranks in a file called tokenizer.model
        return Tiktoken(path, file)
    if file.suffix == ".model":
        return SentencePiece(path, file)
    if file.suffix == ".tiktoken":
        raise UserError(f"{file}: line 1 is not a token in base64 and its rank; fetch the file again")
    return HuggingFace(path, file)


def _main_file(path: Path) -> Path:
    """Return the file of a folder that holds the tokenizer.

    Raises:
        UserError: there is none, or several.
    """
    if path.is_file():
        return path
    if (path / TOKENIZER_JSON).is_file():
        return path / TOKENIZER_JSON
    found = sorted([*path.glob("*.tiktoken"), *path.glob("*.model")])
    if len(found) != 1:
        what = f"holds {len(found)} of them: {', '.join(f.name for f in found)}" if found else "holds none of them"
        raise UserError(f"{path}: needs a {TOKENIZER_JSON}, or else one .tiktoken or .model file, and {what}; "
                        "name the file itself")
    return found[0]


def _ranks(file: Path) -> dict[bytes, int]:
    """Return tiktoken's ranks.

    Raises:
        UserError: a line is damaged.
    """
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(file.read_bytes().splitlines(), 1):
        if not line:
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error):
            raise UserError(f"{file}:{number}: {line[:40]!r} is not a token in base64 and its rank; "
                            "fetch the file again") from None
    return ranks


def _tiktoken_rules(file: Path) -> dict[str, Any]:
    """Return pattern and special tokens of a file of ranks.

    Raises:
        UserError: they are missing or malformed.
    """
    beside = file.with_name(f"{file.name}.json")
    form = '{"pat_str": "...", "special_tokens": {"<|endoftext|>": 100257}}'
    try:
        rules = json.loads(beside.read_text(encoding="utf-8"))
        pattern, special = rules["pat_str"], rules.get("special_tokens", {})
        if not isinstance(pattern, str) or not all(isinstance(i, int) for i in special.values()):
            raise ValueError("pat_str must be text and special_tokens must give ids")
        return {"pat_str": pattern, "special_tokens": special}
    except FileNotFoundError:
        raise UserError(f"{file}: ranks alone do not say how text is split; write {beside.name} beside them: {form}") from None
    except (ValueError, KeyError, AttributeError, TypeError) as e:
        raise UserError(f"{beside}: {type(e).__name__}: {e}; it must have the form {form}") from None


def byte_of_character() -> dict[str, int]:
    """Return character of the byte-level alphabet -> byte."""
    return {character: byte for byte, character in byte_characters().items()}


def _piece_bytes(piece: str) -> bytes:
    """Return the bytes of a sentencepiece token."""
    found = _BYTE_PIECE.fullmatch(piece)
    return bytes([int(found[1], 16)]) if found else piece.replace(WORD_START, " ").encode()


def _kinds(rules: dict[str, Any] | None) -> set[str]:
    """Return the types of a decoder and of those inside it."""
    if not rules:
        return set()
    return {rules["type"]}.union(*(_kinds(inner) for inner in rules.get("decoders", [])))


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]
