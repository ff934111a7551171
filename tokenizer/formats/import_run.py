"""Run `sov-tokenizer import`: write a tokenizer artifact and compare its ids with the source's library."""

import itertools
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from megatron_sov.base.artifacts import ArtifactWriter, create_artifact, format_json, sha256_file
from megatron_sov.base.errors import UserError
from megatron_sov.model.pretrained import read_json
from tokenizer.formats.commands import ImportRequest
from tokenizer.formats.hf_files import (
    CONFIG_JSON, TOKENIZER_JSON, build_tokenizer_config, get_token_ids, translate_panics)
from tokenizer.formats.reader import ForeignTokenizer, build_text_encoder, load_tokenizer
from tokenizer.formats.sample_texts import (
    CHUNK_BYTES, find_first_difference, iter_builtin_texts, iter_user_texts)

PRESET = "imported"
"""Preset name in the manifest."""


def write_import(request: ImportRequest) -> None:
    """Write an artifact of kind "tokenizer". Raises `UserError`: tokenizers or transformers would give other
    ids or text; no output is written then."""
    source, special, options = request.source, request.special_tokens, request.options
    with create_artifact(options.output, "tokenizer", overwrite=options.overwrite) as artifact:
        (artifact.path / TOKENIZER_JSON).write_text(load_tokenizer(source.raw, source.file).to_str(),
                                                    encoding="utf-8")
        config = build_tokenizer_config(special["bos_token"], special["eos_token"], special["pad_token"],
                                        source.chat_template)
        (artifact.path / CONFIG_JSON).write_text(format_json(config), encoding="utf-8")
        with translate_panics(source.file):  # patterns that fail on some texts
            checked, ratios = _compare_with_source(artifact.path, source, options.text)
        _fill_manifest(artifact, source, special, checked, ratios)
    print(f"{source.file}: {checked}")
    for name, ratio in ratios.items():
        print(f"{name}: {ratio:.3f} bytes per token")
    print(f"wrote {options.output}")


def _compare_with_source(folder: Path, source: ForeignTokenizer,
                         paths: Sequence[Path]) -> tuple[str, dict[str, float]]:
    """Compare the written files with the source; return a sentence and bytes per token of each path. Raises
    `UserError`: ids or decoded text differ."""
    tokenizer = load_tokenizer(read_json(folder / TOKENIZER_JSON), source.file)
    hf_tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    user_texts = {str(path): list(iter_user_texts([path])) for path in paths}
    texts = [*iter_builtin_texts(source.raw), *itertools.chain.from_iterable(user_texts.values())]
    encode_source = cache(source.encode)  # three comparisons encode the same texts
    # transformers encodes with tokenizers, but slowly
    short_texts = [text for text in texts if len(text) <= CHUNK_BYTES]
    for library, library_texts, library_encode in (
            ("tokenizers", texts, build_text_encoder(tokenizer)),
            ("transformers", short_texts, lambda text: hf_tokenizer(
                text, add_special_tokens=False, split_special_tokens=True)["input_ids"])):
        if difference := find_first_difference(library_texts, library_encode, encode_source):
            raise UserError(f"{source.file}: cannot be represented, since {library} would not give the ids "
                            f"of {source.library} for {difference}")
    for text in texts:
        ids = encode_source(text)
        decoded, expected = tokenizer.decode(ids, skip_special_tokens=False), source.decode(ids)
        if decoded != expected:
            raise UserError(f"{source.file}: cannot be represented, since ids of {text[:60]!r} would become "
                            f"{decoded[:60]!r}, not {expected[:60]!r}")
    sentence = (f"the same ids as {source.library}, by tokenizers and by transformers, on "
                f"{_count_bytes(texts) / 1e6:.2f} MB of text")
    ratios = {path: _count_bytes(group) / max(1, sum(len(encode_source(text)) for text in group))
              for path, group in user_texts.items()}
    return sentence, ratios


def _count_bytes(texts: list[str]) -> int:
    return sum(len(text.encode()) for text in texts)


def _fill_manifest(artifact: ArtifactWriter, source: ForeignTokenizer, special: dict[str, Any], checked: str,
                   ratios: dict[str, float]) -> None:
    """Fill the manifest with the facts of a trained tokenizer and with the source file."""
    ids = get_token_ids(source.raw)
    artifact.content = {
        "preset": PRESET, "tokenizer_sha256": sha256_file(artifact.path / TOKENIZER_JSON),
        **{f"{name}_id": ids.get(special[f"{name}_token"] or "") for name in ("bos", "eos", "pad")},
        "vocab_size": source.vocab_size, "bytes_per_token": ratios, "checked": checked}
    artifact.settings = {"source": source.file.name, "source_sha256": sha256_file(source.file),
                         "library": source.library}
