"""Convert between tokenizer.json and sentencepiece's `.model` file (protobuf): BPE or unigram over
characters, with bytes for other characters.

The converters of `transformers` and `tokenizers` depend on the model's class or assume the default
normalizer, let ordinary text such as `<s>` or `<0x0A>` become that token, and list every split of a token.
The commands compare ids with sentencepiece before they write a file.
"""

from __future__ import annotations

import base64
from itertools import pairwise
from typing import Any

from megatron_sov.base.documents.byte_bpe import parse_merges
from megatron_sov.base.errors import UserError, format_install_command
from tokenizer.bpe.segmenting import find_last_merge
from tokenizer.formats.hf_files import build_special_token, get_token_ids

SPACE = "▁"
UNIGRAM, BPE = 1, 2
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
NEVER = -1e6
"""Score for pieces that text must not become, far below other scores."""
_REMEDY = format_install_command("sentencepiece")
_EDGES, _RUNS = r"\A +| +\z", " {2,}"
_MODELS = {3: "word", 4: "char"}


class NotSentencepiece(Exception):
    """sentencepiece cannot express a tokenizer; the message begins with "its"."""


def import_sentencepiece() -> Any:
    """Import the optional package sentencepiece.

    Raises:
        UserError: not installed.
    """
    try:
        import sentencepiece  # optional package
    except ImportError:
        raise UserError("sentencepiece is not installed, and every conversion is compared with "
                        f"it; {_REMEDY}") from None
    return sentencepiece


def create_proto() -> Any:
    """Return an empty ModelProto.

    Raises:
        UserError: sentencepiece or protobuf is not installed.
    """
    import_sentencepiece()
    try:
        from sentencepiece import sentencepiece_model_pb2 as format_  # needs protobuf, also optional
    except ImportError as e:
        raise UserError(f"sentencepiece's model format cannot be read ({e}); {_REMEDY}") from None
    return format_.ModelProto()


def create_processor(model: bytes) -> Any:
    return import_sentencepiece().SentencePieceProcessor(model_proto=model)


def format_byte_piece(byte: int) -> str:
    return f"<0x{byte:02X}>"


def get_special_tokens(proto: Any) -> dict[str, str | None]:
    """Return bos_token, eos_token and pad_token; None if the model has no such token."""
    trainer = proto.trainer_spec
    ids = {"bos_token": trainer.bos_id, "eos_token": trainer.eos_id, "pad_token": trainer.pad_id}
    return {name: proto.pieces[id_].piece if 0 <= id_ < len(proto.pieces) else None
            for name, id_ in ids.items()}


def from_sentencepiece(proto: Any, name: str) -> dict[str, Any]:
    """Convert a ModelProto to a tokenizer.json; `name` is the file in errors.

    Raises:
        UserError: `tokenizers` cannot express the model.
    """
    trainer = proto.trainer_spec
    if fault := _find_model_fault(proto):
        raise UserError(f"{name}: {fault}")
    pieces = [p.piece for p in proto.pieces]
    unknown = next(p.piece for p in proto.pieces if p.type == UNKNOWN)
    # longest first: an alternation takes the first match, sentencepiece the longest
    user_pieces = sorted((p.piece for p in proto.pieces if p.type == USER_DEFINED),
                         key=lambda piece: (-len(piece), piece))
    if trainer.model_type == BPE:
        model = _build_bpe(proto, name, unknown, bool(user_pieces))
    else:
        model = _build_unigram(proto, name, pieces.index(unknown))
    special = [(i, p.piece) for i, p in enumerate(proto.pieces) if p.type in (CONTROL, UNKNOWN)]
    pre_tokenizer = None
    if user_pieces:
        pattern = "|".join(map(_escape_pattern, user_pieces))
        pre_tokenizer = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated",
                         "invert": False}
    decoders = [_build_replacement(SPACE, " "), {"type": "ByteFallback"}, {"type": "Fuse"}]
    if proto.normalizer_spec.add_dummy_prefix:
        # remove the space that encoding prepended
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [build_special_token(id_, piece) for id_, piece in special],
        "normalizer": {"type": "Sequence", "normalizers": _build_normalizers(proto.normalizer_spec)},
        "pre_tokenizer": pre_tokenizer,
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": model,
    }


def _find_model_fault(proto: Any) -> str:
    """Return the first feature that tokenizer.json cannot express, or an empty string."""
    trainer = proto.trainer_spec
    if trainer.model_type not in (UNIGRAM, BPE):
        model_type = _MODELS.get(trainer.model_type, trainer.model_type)
        return f"its model type is {model_type}, and only bpe and unigram can be expressed"
    if trainer.treat_whitespace_as_suffix:
        return "it writes white space behind words (treat_whitespace_as_suffix)"
    if not proto.normalizer_spec.escape_whitespaces:
        return "it does not mark spaces (escape_whitespaces is false)"
    if proto.denormalizer_spec.precompiled_charsmap:
        return "it changes characters when decoding (denormalizer)"
    types = {piece.type for piece in proto.pieces}
    if trainer.model_type == BPE and UNUSED in types:
        return "it is BPE with unused pieces, cut again"
    return "" if UNKNOWN in types else "none of its pieces is the unknown one, so it is empty or damaged"


def composes_characters(spec: Any) -> bool:
    return "nfkc" in spec.name


def _build_replacement(old: str, new: str, kind: str = "String") -> dict[str, Any]:
    return {"type": "Replace", "pattern": {kind: old}, "content": new}


def _build_normalizers(spec: Any) -> list[dict[str, Any]]:
    """Return the steps in sentencepiece's order: characters, extra spaces, prefix, marked spaces."""
    steps: list[dict[str, Any]] = []
    if spec.precompiled_charsmap:
        charsmap = base64.b64encode(spec.precompiled_charsmap).decode()
        # `tokenizers` maps single characters, so compose letters with marks, and Hangul, before
        if composes_characters(spec):
            steps.append({"type": "NFC"})
        steps.append({"type": "Precompiled", "precompiled_charsmap": charsmap})
    # before the prefix, which is itself an extra space
    if spec.remove_extra_whitespaces:
        steps += [_build_replacement(_EDGES, "", "Regex"), _build_replacement(_RUNS, " ", "Regex")]
    if spec.add_dummy_prefix:
        steps += [{"type": "Prepend", "prepend": SPACE}]
    return [*steps, _build_replacement(" ", SPACE)]


def _escape_pattern(text: str) -> str:
    """Return a regular expression that matches a text, with ASCII signs as hexadecimal escapes."""
    return "".join(c if c.isalnum() or ord(c) >= 128 else f"\\x{{{ord(c):x}}}" for c in text)


def _build_bpe(proto: Any, name: str, unknown: str, whole_pieces: bool) -> dict[str, Any]:
    """Return the BPE model; `whole_pieces`: the pre-tokenizer isolates user-defined pieces."""
    vocab = {p.piece: id_ for id_, p in enumerate(proto.pieces)}
    normal = [(id_, p) for id_, p in enumerate(proto.pieces) if p.type == NORMAL]
    rank_of: dict[str, float] = {p.piece: -p.score for _, p in normal}
    long = sorted((-p.score, id_, p.piece) for id_, p in normal if len(p.piece) > 1)
    # of equal scores sentencepiece merges the leftmost pair, which a list of merges cannot express
    if twice := next((b for a, b in pairwise(long) if a[0] == b[0]), None):
        raise UserError(f"{name}: its pieces {twice[2]!r} and another one have the same score {-twice[0]}, "
                        "so which merges first depends on the text, for which a list of merges has no form")
    pairs = [pair for _, _, piece in long if (pair := find_last_merge(list(piece), rank_of))]
    if broken := next((pair for pair in pairs if not set(pair) <= vocab.keys()), None):
        raise UserError(f"{name}: its piece {''.join(broken)!r} has a character that is no piece of its own, "
                        "for which a list of merges has no form")
    return {"type": "BPE", "dropout": None, "unk_token": unknown, "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": True,
            "byte_fallback": bool(proto.trainer_spec.byte_fallback), "ignore_merges": whole_pieces,
            "vocab": vocab, "merges": [list(pair) for pair in pairs]}


def _build_unigram(proto: Any, name: str, unknown: int) -> dict[str, Any]:
    normal = {p.piece for p in proto.pieces if p.type in (NORMAL, USER_DEFINED)}
    for piece in (p.piece for p in proto.pieces if p.type in (CONTROL, UNKNOWN, UNUSED, BYTE)):
        if character := next((c for c in piece if c not in normal), None):
            # an unknown character costs more than any piece
            raise UserError(f"{name}: it has no piece for {character!r}, so text that reads {piece!r} would "
                            "become that piece")
    vocab = []
    for p in proto.pieces:
        # text must not become a control token
        score = p.score if p.type == NORMAL else NEVER
        vocab.append([p.piece, 0.0 if p.type == USER_DEFINED else score])
    return {"type": "Unigram", "unk_id": unknown, "vocab": vocab,
            "byte_fallback": bool(proto.trainer_spec.byte_fallback)}


def to_sentencepiece(raw: dict[str, Any], named_tokens: dict[str, str | None]) -> bytes:
    """Convert a tokenizer.json to a `.model` file.

    Args:
        raw: tokenizer.json.
        named_tokens: bos_token, eos_token and pad_token.

    Raises:
        NotSentencepiece: sentencepiece cannot express the tokenizer.
    """
    proto, model = create_proto(), raw["model"]
    pieces = _score_pieces(raw)
    for piece, (score, kind) in pieces.items():
        proto.pieces.add(piece=piece, score=score, type=kind)
    if sum(kind == UNKNOWN for _, kind in pieces.values()) != 1:
        raise NotSentencepiece("its model has no token for the unknown, which sentencepiece always has")
    _read_normalizers(raw, proto.normalizer_spec)
    trainer, ids = proto.trainer_spec, {piece: id_ for id_, piece in enumerate(pieces)}
    trainer.model_type = BPE if model["type"] == "BPE" else UNIGRAM
    trainer.vocab_size, trainer.byte_fallback = len(pieces), bool(model.get("byte_fallback"))
    trainer.unk_id = next(id_ for id_, (_, kind) in enumerate(pieces.values()) if kind == UNKNOWN)
    trainer.unk_piece = list(pieces)[trainer.unk_id]
    for field in ("bos", "eos", "pad"):
        token = named_tokens.get(f"{field}_token")
        setattr(trainer, f"{field}_id", ids.get(token, -1) if token else -1)
        if token in ids:
            setattr(trainer, f"{field}_piece", token)
    return bytes(proto.SerializeToString())


def _score_pieces(raw: dict[str, Any]) -> dict[str, tuple[float, int]]:
    """Return piece -> (score, type), sorted by id."""
    model = raw["model"]
    if model["type"] not in ("BPE", "Unigram"):
        raise NotSentencepiece(f"its model is {model['type']}, and sentencepiece has BPE and unigram")
    if model.get("dropout") or model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        raise NotSentencepiece("its model has dropout, prefixes or suffixes")
    added = {token["content"]: token for token in raw["added_tokens"]}
    ids = get_token_ids(raw)
    if model["type"] == "BPE":
        merges = reversed(list(enumerate(parse_merges(raw))))
        scores = {"".join(pair): -float(i) for i, pair in merges}
        unknown = model.get("unk_token")
    else:
        scores = dict(model["vocab"])
        unknown = model["vocab"][model["unk_id"]][0] if model.get("unk_id") is not None else None
    # an id is an index into the list of pieces
    if sorted(ids.values()) != list(range(len(ids))):
        raise NotSentencepiece("its ids have gaps")
    byte_pieces = {format_byte_piece(b) for b in range(256)} if model.get("byte_fallback") else set()
    isolated = set(_find_isolated_tokens(raw))
    pieces: dict[str, tuple[float, int]] = {}
    for piece in sorted(ids, key=ids.__getitem__):
        # pieces without a merge, such as characters, rank after all merges
        score, kind = scores.get(piece, -float(len(ids))), NORMAL
        if piece == unknown:
            score, kind = 0.0, UNKNOWN
        elif piece in byte_pieces:
            score, kind = 0.0, BYTE
        elif piece in added:
            score, kind = 0.0, CONTROL if added[piece]["special"] else USER_DEFINED
        elif piece in isolated:
            score, kind = 0.0, USER_DEFINED
        pieces[piece] = (score, kind)
    return pieces


def _find_isolated_tokens(raw: dict[str, Any]) -> list[str]:
    """Return the pieces in the pre-tokenizer's pattern, as `from_sentencepiece` writes it."""
    step = raw.get("pre_tokenizer")
    if step is None:
        return []
    if step["type"] == "ByteLevel" or "ByteLevel" in [p["type"] for p in step.get("pretokenizers", [])]:
        raise NotSentencepiece("its tokens are merged bytes within the pieces of a regular expression, "
                               "while sentencepiece merges characters and splits at spaces alone; "
                               "take --format tiktoken")
    pieces = {_escape_pattern(piece): piece for piece in get_token_ids(raw)}
    parts = []
    if step["type"] == "Split" and step["behavior"] == "Isolated":
        parts = step["pattern"].get("Regex", "").split("|")
    if not parts or not set(parts) <= pieces.keys():
        raise NotSentencepiece(f"its pre-tokenizer {step['type']} splits text in a way that "
                               "sentencepiece cannot")
    return [pieces[part] for part in parts]


def _read_normalizers(raw: dict[str, Any], spec: Any) -> None:
    """Fill a NormalizerSpec from the steps that `_build_normalizers` writes."""
    step = raw.get("normalizer") or {"type": "Sequence", "normalizers": []}
    steps = list(step["normalizers"] if step["type"] == "Sequence" else [step])
    spec.name = "identity"
    if [s["type"] for s in steps[:2]] == ["NFC", "Precompiled"]:
        spec.name = "nfkc"
        steps.pop(0)
    if steps and steps[0]["type"] == "Precompiled":
        spec.precompiled_charsmap = base64.b64decode(steps.pop(0)["precompiled_charsmap"])
        if not composes_characters(spec):
            spec.name = "user_defined"
    removals = [_build_replacement(_EDGES, "", "Regex"), _build_replacement(_RUNS, " ", "Regex")]
    spec.remove_extra_whitespaces = steps[:2] == removals
    if spec.remove_extra_whitespaces:
        steps = steps[2:]
    spec.add_dummy_prefix = steps[:1] == [{"type": "Prepend", "prepend": SPACE}]
    if spec.add_dummy_prefix:
        steps = steps[1:]
    spec.escape_whitespaces = True
    if not steps:
        raise NotSentencepiece("its spaces are not marked as sentencepiece marks them")
    if steps != [_build_replacement(" ", SPACE)]:
        raise NotSentencepiece(f"its normalizer is {step}, which is none of the steps of sentencepiece")
