"""Convert sentencepiece's `.model` file (protobuf) to a tokenizer.json: BPE or unigram over characters,
with bytes for other characters.

The converters of `transformers` and `tokenizers` depend on the model's class or assume the default
normalizer, let ordinary text such as `<s>` or `<0x0A>` become that token, and list every split of a token.
The import compares ids with sentencepiece before it writes a file.
"""

import base64
from itertools import pairwise
from typing import Any

from megatron_sov.base.errors import UserError, format_install_command
from tokenizer.bpe.segmenting import find_last_merge
from tokenizer.formats.hf_files import build_special_token

SPACE = "▁"
UNIGRAM, BPE = 1, 2
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
NEVER = -1e6
"""Score for pieces that text must not become, far below other scores."""
_REMEDY = format_install_command("sentencepiece")
_EDGES, _RUNS = r"\A +| +\z", " {2,}"
_MODELS = {3: "word", 4: "char"}


def import_sentencepiece() -> Any:
    """Import the optional package sentencepiece. Raises `UserError`: not installed."""
    try:
        import sentencepiece  # optional package
    except ImportError:
        raise UserError("sentencepiece is not installed, and every conversion is compared with "
                        f"it; {_REMEDY}") from None
    return sentencepiece


def create_proto() -> Any:
    """Return an empty ModelProto. Raises `UserError`: sentencepiece or protobuf is not installed."""
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
    """Convert a ModelProto to a tokenizer.json; `name` is the file in errors. Raises `UserError`:
    `tokenizers` cannot express the model."""
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
        "pre_tokenizer": pre_tokenizer, "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": decoders}, "model": model}


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


def _build_replacement(old: str, new: str, kind: str = "String") -> dict[str, Any]:
    return {"type": "Replace", "pattern": {kind: old}, "content": new}


def _build_normalizers(spec: Any) -> list[dict[str, Any]]:
    """Return the steps in sentencepiece's order: characters, extra spaces, prefix, marked spaces."""
    steps: list[dict[str, Any]] = []
    if spec.precompiled_charsmap:
        charsmap = base64.b64encode(spec.precompiled_charsmap).decode()
        # `tokenizers` maps single characters, so compose letters with marks, and Hangul, before
        if "nfkc" in spec.name:
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
