"""Byte-level BPE ranks, compiled functions and the shape of expert routes."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import regex
from tokenizers import pre_tokenizers

from megatron_sov.base.documents import compiled
from megatron_sov.base.documents.byte_bpe import (
    GPT2_PATTERN, NotByteBpe, build_ranks, byte_alphabet, parse_merges, parse_split_pattern)
from megatron_sov.base.documents.shard_files import RouteShape
from megatron_sov.base.errors import UserError


def build_tokenizer(**model: Any) -> dict[str, Any]:
    """Return a tokenizer.json of byte-level BPE with two merges; `model` replaces fields of its model."""
    vocab = dict(byte_alphabet()) | {"ab": 256, "abc": 257, "<e>": 258}
    return {"added_tokens": [{"content": "<e>", "special": True}], "pre_tokenizer": {
        "type": "ByteLevel", "add_prefix_space": False, "use_regex": True}, "model": {
        "type": "BPE", "vocab": vocab, "merges": ["a b", ["ab", "c"]], **model}}


def test_byte_alphabet_matches_transformers() -> None:
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    assert byte_alphabet() == {character: byte for byte, character in bytes_to_unicode().items()}


def test_byte_level_uses_gpt2_pattern() -> None:
    assert parse_split_pattern(build_tokenizer()) == GPT2_PATTERN
    text = "It's 2026,  don't\n\n  panic: 한국어 ไทย x=1 \t"
    pieces = pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str(text)
    assert [text[a:b] for _, (a, b) in pieces] == [m.group() for m in regex.finditer(GPT2_PATTERN, text)]


def test_ranks_are_ids_of_bytes_and_merges() -> None:
    assert parse_merges(build_tokenizer()) == [("a", "b"), ("ab", "c")]
    ranks_by_bytes = build_ranks(build_tokenizer())
    assert ranks_by_bytes == {bytes([b]): b for b in range(256)} | {b"ab": 256, b"abc": 257}
    tokenizer = build_tokenizer(ignore_merges=True)
    tokenizer["model"]["vocab"] |= {"xyz": 259}
    assert build_ranks(tokenizer)[b"xyz"] == 259


@pytest.mark.each(("model", "reason"), [
    ({"type": "Unigram"}, "its model is not plain byte-level BPE"),
    ({"merges": ["ab c", "a b"]}, "its ids do not rise with its merges"),
    ({"merges": ["a b"]}, "its vocabulary is not 256 bytes and one token for each merge"),
    ({"vocab": {"▁": 0}, "merges": []}, "its vocabulary is not spelled in bytes"),
])
def test_tokenizers_without_ranks_are_refused(model: dict[str, Any], reason: str) -> None:
    with pytest.raises(NotByteBpe, match=reason):
        build_ranks(build_tokenizer(**model))


def test_compilation_works_without_cache_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    njit = compiled.numba.njit

    def refusing(**options: bool) -> Any:
        if options.get("cache"):
            raise RuntimeError("cannot cache function: no locator available")
        return njit(**options)

    monkeypatch.setattr(compiled, "numba", SimpleNamespace(njit=refusing))
    assert compiled.jit_compile(lambda x: x + 1)(4) == 5


def test_reading_does_not_import_numba() -> None:
    code = ("import sys, tokenizer.cli, tokenizer.train, tokenizer.formats.hf_files\n"
            "sys.exit('numba' in sys.modules)")
    root = Path(__file__).parents[3]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, timeout=600).returncode == 0


@pytest.mark.each(("num_experts", "dtype", "mark"), [
    (128, "uint8", 255), (255, "uint8", 255), (256, "uint16", 65535), (512, "uint16", 65535)])
def test_route_dtype_leaves_value_for_mark(num_experts: int, dtype: str, mark: int) -> None:
    shape = RouteShape(48, 8, num_experts)
    assert (shape.dtype, shape.mark) == (dtype, mark)
    assert shape.bytes_per_token == 48 * 8 * (1 if dtype == "uint8" else 2)
    assert shape.build_unrecorded(3).nbytes == 3 * shape.bytes_per_token
    assert RouteShape.from_record(shape.record(), "x") == shape


@pytest.mark.each(("choice", "message"), [
    ([1, 4], r"sends token 1 in layer 2 of those with experts to \[1, 4\]; expert numbers must lie below 4, "
             r"or all be 255"),
    ([3, 3], r"token 1 in layer 2 .* to \[3, 3\]; a token visits an expert of a layer once"),
    ([2, 255], r"to \[2, 255\]; expert numbers must lie below 4"),
])
def test_invalid_routes_name_token_and_layer(choice: list[int], message: str) -> None:
    shape = RouteShape(3, 2, 4)
    routes = shape.build_unrecorded(2)
    routes[0] = [3, 0]
    assert shape.problem(routes) == ""
    routes[1, 2] = choice
    with pytest.raises(UserError, match=message):
        raise UserError(shape.problem(routes))
    assert "shape [2, 3, 1] and type uint8, must be [tokens, 3, 2] of uint8" in shape.problem(
        routes[:, :, :1])
    assert "type uint16" in shape.problem(routes.astype(np.uint16))


@pytest.mark.each("record", [
    None, {}, {"layers": 0, "top_k": 2, "num_experts": 4, "dtype": "uint8"},
    {"layers": 1, "top_k": 5, "num_experts": 4, "dtype": "uint8"},
    {"layers": 1, "top_k": 2, "num_experts": 4, "dtype": "uint16"}])
def test_malformed_route_shape_is_refused(record: Any) -> None:
    with pytest.raises(UserError, match=r"DIR: source 'a': routes = .* cannot be read .*write the data"):
        RouteShape.from_record(record, "DIR: source 'a'")
