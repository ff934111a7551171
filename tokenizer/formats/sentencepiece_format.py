"""sentencepiece's form of a tokenizer, the protobuf of a `.model` file: BPE or unigram over characters,
bytes for the rest.

Why not through the converters of `transformers` and `tokenizers`: they know the model's class or assume the
default normalizer, they let ordinary text that reads `<s>` or `<0x0A>` become that token, and they list every
way to cut a token.  What is made here is compared with the library itself before anything is written.
"""

from __future__ import annotations

import base64
from itertools import pairwise
from typing import Any

from megatron_sov.base.documents.byte_bpe import parse_merges
from megatron_sov.base.errors import UserError, format_install_command
from tokenizer.bpe.segmenting import find_last_merge
from tokenizer.formats.hf_files import build_special_token

SPACE = "▁"
UNIGRAM, BPE = 1, 2
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
NEVER = -1e6
"""Score of pieces that text must not become, far below what any text costs otherwise."""
_REMEDY = format_install_command("sentencepiece")
_EDGES, _RUNS = r"\A +| +\z", " {2,}"
_MODELS = {3: "word", 4: "char"}


class NotSentencepiece(Exception):
    """Why a tokenizer has no form in sentencepiece; the message begins with "its"."""


def import_sentencepiece() -> Any:
    """Return the module sentencepiece.

    Raises:
        UserError: it is not installed.
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
        from sentencepiece import sentencepiece_model_pb2 as format_  # needs protobuf, optional too
    except ImportError as e:
        raise UserError(f"sentencepiece's model format cannot be read ({e}); {_REMEDY}") from None
    return format_.ModelProto()


def create_processor(model: bytes) -> Any:
    return import_sentencepiece().SentencePieceProcessor(model_proto=model)


def format_byte_piece(byte: int) -> str:
    return f"<0x{byte:02X}>"


def get_special_tokens(proto: Any) -> dict[str, str | None]:
    """Return bos_token, eos_token and pad_token; None where the model has none."""
    trainer = proto.trainer_spec
    ids = {"bos_token": trainer.bos_id, "eos_token": trainer.eos_id, "pad_token": trainer.pad_id}
    return {name: proto.pieces[id_].piece if 0 <= id_ < len(proto.pieces) else None
            for name, id_ in ids.items()}


def from_sentencepiece(proto: Any, name: str) -> dict[str, Any]:
    """Return the tokenizer.json of a model.

    Raises:
        UserError: the model uses something that `tokenizers` has no form for.
    """
    trainer = proto.trainer_spec
    # these have no counterpart in tokenizer.json: refused, since ids would differ in silence
    reasons = {
        trainer.model_type not in (UNIGRAM, BPE): "its model type is "
                                                  f"{_MODELS.get(trainer.model_type, trainer.model_type)}, "
                                                  "and only bpe and unigram can be expressed",
        trainer.treat_whitespace_as_suffix: "it writes white space behind words (treat_whitespace_as_suffix)",
        not proto.normalizer_spec.escape_whitespaces: "it does not mark spaces (escape_whitespaces is false)",
        bool(proto.denormalizer_spec.precompiled_charsmap): "it changes characters when decoding "
                                                            "(denormalizer)",
        trainer.model_type == BPE
        and any(p.type == UNUSED for p in proto.pieces): "it is BPE with unused pieces, cut again",
    }
    unknown = [p.piece for p in proto.pieces if p.type == UNKNOWN]
    if reason := reasons.get(True, "" if unknown else "none of its pieces is the unknown one, so it is empty "
                                                      "or damaged"):
        raise UserError(f"{name}: {reason}")
    pieces = [p.piece for p in proto.pieces]
    # longest first: an alternation takes the first that fits, and sentencepiece the longest
    users = sorted((p.piece for p in proto.pieces if p.type == USER_DEFINED), key=lambda p: (-len(p), p))
    model = _build_bpe(proto, name, unknown[0], bool(users)) if trainer.model_type == BPE \
        else _build_unigram(proto, name, pieces.index(unknown[0]))
    special = [(i, p.piece) for i, p in enumerate(proto.pieces) if p.type in (CONTROL, UNKNOWN)]
    # the space that encoding put in front is taken away once, by the decoder
    prefixed = proto.normalizer_spec.add_dummy_prefix
    return {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [build_special_token(id_, piece) for id_, piece in special],
        "normalizer": {"type": "Sequence", "normalizers": _build_normalizers(proto.normalizer_spec)},
        "pre_tokenizer": {"type": "Split", "pattern": {"Regex": "|".join(map(_escape_pattern, users))},
                          "behavior": "Isolated", "invert": False} if users else None,
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": [
            _build_replacement(SPACE, " "), {"type": "ByteFallback"}, {"type": "Fuse"},
            *([{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefixed else [])]},
        "model": model,
    }


def composes_characters(spec: Any) -> bool:
    """Return whether a normalizer is one of sentencepiece's own forms of NFKC."""
    return "nfkc" in spec.name


def _build_replacement(old: str, new: str, kind: str = "String") -> dict[str, Any]:
    return {"type": "Replace", "pattern": {kind: old}, "content": new}


def _build_normalizers(spec: Any) -> list[dict[str, Any]]:
    """Return the steps from text to what is cut, in sentencepiece's order: characters, extra spaces,
    prefix, marked spaces."""
    charsmap = base64.b64encode(spec.precompiled_charsmap).decode()
    steps: list[dict[str, Any]] = ([{"type": "Precompiled", "precompiled_charsmap": charsmap}]
                                   if charsmap else [])
    if charsmap and composes_characters(spec):
        # `tokenizers` maps characters one by one, so letters and marks, and Hangul's parts,
        # have to be composed before
        steps.insert(0, {"type": "NFC"})
    # before the prefix, which would itself be taken for an extra space
    if spec.remove_extra_whitespaces:
        steps += [_build_replacement(_EDGES, "", "Regex"), _build_replacement(_RUNS, " ", "Regex")]
    if spec.add_dummy_prefix:
        steps += [{"type": "Prepend", "prepend": SPACE}]
    return [*steps, _build_replacement(" ", SPACE)]


def _escape_pattern(text: str) -> str:
    """Return a regular expression for a text: ASCII signs get a backslash, which is safe in Oniguruma too."""
    return "".join(c if c.isalnum() or ord(c) >= 128 else f"\\x{{{ord(c):x}}}" for c in text)


def _build_bpe(proto: Any, name: str, unknown: str, whole_pieces: bool) -> dict[str, Any]:
    """Return the BPE model; user-defined pieces are cut out beforehand and looked up as a whole."""
    vocab = {p.piece: id_ for id_, p in enumerate(proto.pieces)}
    normal = [(id_, p) for id_, p in enumerate(proto.pieces) if p.type == NORMAL]
    # the best score merges first; of equal scores the library takes the leftmost, whatever the piece
    rank_of: dict[str, float] = {p.piece: -p.score for _, p in normal}
    long = sorted((-p.score, id_, p.piece) for id_, p in normal if len(p.piece) > 1)
    # a list of merges has a fixed order, and the library's ties depend on the place in the text
    if twice := next((b for a, b in pairwise(long) if a[0] == b[0]), None):
        raise UserError(f"{name}: its pieces {twice[2]!r} and another one have the same score {-twice[0]}, "
                        "so which merges first depends on the text, for which a list of merges has no form")
    # each piece's last merge: the best pair of what shorter pieces make of it
    pairs = [pair for _, _, piece in long if (pair := find_last_merge(list(piece), rank_of))]
    # a piece that is reached through text that is no piece itself
    if broken := next((pair for pair in pairs if not set(pair) <= vocab.keys()), None):
        raise UserError(f"{name}: its piece {''.join(broken)!r} has a character that is no piece of its own, "
                        "for which a list of merges has no form")
    return {"type": "BPE", "dropout": None, "unk_token": unknown, "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": True,
            "byte_fallback": bool(proto.trainer_spec.byte_fallback), "ignore_merges": whole_pieces,
            "vocab": vocab, "merges": [list(pair) for pair in pairs]}


def _build_unigram(proto: Any, name: str, unknown: int) -> dict[str, Any]:
    """Return the unigram model; a user-defined piece, cut out beforehand, costs nothing."""
    normal = {p.piece for p in proto.pieces if p.type in (NORMAL, USER_DEFINED)}
    for piece in (p.piece for p in proto.pieces if p.type in (CONTROL, UNKNOWN, UNUSED, BYTE)):
        if strange := next((c for c in piece if c not in normal), None):
            # what is unknown costs more than any piece, so more than this one
            raise UserError(f"{name}: it has no piece for {strange!r}, so text that reads {piece!r} would "
                            "become that piece")
    # other types get a score that never wins: text must not become a control token
    scores = {NORMAL: None, USER_DEFINED: 0.0}
    vocab = [[p.piece, p.score if scores.get(p.type, NEVER) is None else scores.get(p.type, NEVER)]
             for p in proto.pieces]
    return {"type": "Unigram", "unk_id": unknown, "vocab": vocab,
            "byte_fallback": bool(proto.trainer_spec.byte_fallback)}


def to_sentencepiece(raw: dict[str, Any], named_tokens: dict[str, str | None]) -> bytes:
    """Return the `.model` file of a tokenizer.json.

    Args:
        raw: the tokenizer.json.
        named_tokens: bos_token, eos_token and pad_token.

    Raises:
        NotSentencepiece: it has no such form.
    """
    proto, model = create_proto(), raw["model"]
    pieces = _score_pieces(raw)
    for piece, (score, kind) in pieces.items():
        proto.pieces.add(piece=piece, score=score, type=kind)
    # sentencepiece has exactly one
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
    """Return piece -> (score, type) in the order of ids."""
    model = raw["model"]
    if model["type"] not in ("BPE", "Unigram"):
        raise NotSentencepiece(f"its model is {model['type']}, and sentencepiece has BPE and unigram")
    if model.get("dropout") or model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        raise NotSentencepiece("its model has dropout, prefixes or suffixes")
    added = {token["content"]: token for token in raw["added_tokens"]}
    if model["type"] == "BPE":
        ids, order = dict(model["vocab"]), {"".join(pair): -float(i)
                                            for i, pair in reversed(list(enumerate(parse_merges(raw))))}
        unknown = model.get("unk_token")
    else:
        ids, order = {piece: id_ for id_, (piece, _) in enumerate(model["vocab"])}, dict(model["vocab"])
        unknown = model["vocab"][model["unk_id"]][0] if model.get("unk_id") is not None else None
    ids |= {content: token["id"] for content, token in added.items()}
    # an id is a place in the list of pieces
    if sorted(ids.values()) != list(range(len(ids))):
        raise NotSentencepiece("its ids have gaps")
    byte_pieces = {format_byte_piece(b) for b in range(256)} if model.get("byte_fallback") else set()
    cut_out = set(_find_isolated_tokens(raw))
    found: dict[str, tuple[float, int]] = {}
    for piece in sorted(ids, key=ids.__getitem__):
        if piece == unknown:
            found[piece] = (0.0, UNKNOWN)
        elif piece in byte_pieces:
            found[piece] = (0.0, BYTE)
        elif piece in added:
            found[piece] = (0.0, CONTROL if added[piece]["special"] else USER_DEFINED)
        elif piece in cut_out:
            found[piece] = (0.0, USER_DEFINED)
        else:
            # pieces that no merge makes, such as characters, come behind all merges
            found[piece] = (order.get(piece, -float(len(ids))), NORMAL)
    return found


def _find_isolated_tokens(raw: dict[str, Any]) -> list[str]:
    """Return the pieces that the pre-tokenizer cuts out, as `from_sentencepiece` writes it."""
    step = raw.get("pre_tokenizer")
    if step is None:
        return []
    if step["type"] == "ByteLevel" or "ByteLevel" in [p["type"] for p in step.get("pretokenizers", [])]:
        raise NotSentencepiece("its tokens are merged bytes within the pieces of a regular expression, "
                               "while sentencepiece merges characters and splits at spaces alone; "
                               "take --format tiktoken")
    vocab = raw["model"]["vocab"]
    # escaped as they were written, so each part is found again exactly
    pieces = {_escape_pattern(piece): piece
              for piece in (vocab if isinstance(vocab, dict) else (p for p, _ in vocab))}
    parts = (step["pattern"].get("Regex", "").split("|")
             if step["type"] == "Split" and step["behavior"] == "Isolated" else [])
    if not parts or not set(parts) <= pieces.keys():
        raise NotSentencepiece(f"its pre-tokenizer {step['type']} splits text in a way that "
                               "sentencepiece has not")
    return [pieces[part] for part in parts]


def _read_normalizers(raw: dict[str, Any], spec: Any) -> None:
    """Fill a NormalizerSpec from the steps that `from_sentencepiece` writes; others have no form."""
    step = raw.get("normalizer") or {"type": "Sequence", "normalizers": []}
    left = list(step["normalizers"] if step["type"] == "Sequence" else [step])
    spec.name = "identity"
    # the steps are taken off from the front; what is left over at the end has no form
    if [s["type"] for s in left[:2]] == ["NFC", "Precompiled"]:
        spec.name = "nfkc"
        left.pop(0)
    if left and left[0]["type"] == "Precompiled":
        spec.precompiled_charsmap = base64.b64decode(left.pop(0)["precompiled_charsmap"])
        spec.name = spec.name if composes_characters(spec) else "user_defined"
    spec.remove_extra_whitespaces = left[:2] == [_build_replacement(_EDGES, "", "Regex"),
                                                 _build_replacement(_RUNS, " ", "Regex")]
    left = left[2:] if spec.remove_extra_whitespaces else left
    spec.add_dummy_prefix = left[:1] == [{"type": "Prepend", "prepend": SPACE}]
    left = left[1:] if spec.add_dummy_prefix else left
    spec.escape_whitespaces = True
    if left != [_build_replacement(" ", SPACE)]:
        raise NotSentencepiece(f"its normalizer is {step}, which is none of the steps of sentencepiece"
                               if left else "its spaces are not marked as sentencepiece marks them")
