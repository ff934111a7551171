"""Runs `sov-tokenizer import`: writes another library's tokenizer as a tokenizer artifact, after a comparison
of ids."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from megatron_sov.base.artifacts import ArtifactWriter, create_artifact, format_json, sha256_file
from megatron_sov.base.errors import UserError
from megatron_sov.model.pretrained import read_json
from tokenizer.formats.commands import ImportRequest
from tokenizer.formats.hf_files import CONFIG_JSON, TOKENIZER_JSON, build_tokenizer_config
from tokenizer.formats.reader import ForeignTokenizer, build_text_encoder, get_token_ids, load_tokenizer
from tokenizer.formats.sample_texts import (
    CHUNK_BYTES, DISORDERED_MARKS, find_first_difference, iter_builtin_texts, iter_user_texts)

PRESET = "imported"
"""The manifest's preset."""


def write_import(request: ImportRequest) -> None:
    """Write an artifact of kind "tokenizer".

    Raises:
        UserError: tokenizers or transformers would give other ids or text; nothing is written then.
    """
    source, special, options = request.source, request.special_tokens, request.options
    with create_artifact(options.output, "tokenizer", overwrite=options.overwrite) as artifact:
        (artifact.path / TOKENIZER_JSON).write_text(load_tokenizer(source.raw, source.file).to_str(),
                                                    encoding="utf-8")
        config = build_tokenizer_config(special["bos_token"], special["eos_token"], special["pad_token"],
                             source.chat_template)
        (artifact.path / CONFIG_JSON).write_text(format_json(config), encoding="utf-8")
        checked, ratios = _compare_with_source(artifact.path, source, options.text)
        _fill_manifest(artifact, source, special, checked, ratios)
    print(f"{source.file}: {checked}")
    for name, ratio in ratios.items():
        print(f"{name}: {ratio:.3f} bytes per token")
    print(f"wrote {options.output}")


def _compare_with_source(folder: Path, source: ForeignTokenizer, paths: Sequence[Path]) -> tuple[str,
                                                                                                 dict[str,
                                                                                                      float]]:
    """Compare the written files with the source's library; returns a sentence and bytes per token of each
    of the user's texts.

    Raises:
        UserError: ids or text differ.
    """
    ours = load_tokenizer(read_json(folder / TOKENIZER_JSON), source.file)
    loaded = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    own = {str(path): list(iter_user_texts([path])) for path in paths}
    texts = [*iter_builtin_texts(source.raw), *(text for group in own.values() for text in group)]
    source_ids = cache(source.encode)  # three comparisons below read them
    encoders = {"tokenizers": build_text_encoder(ours), "transformers": lambda text: loaded(
        text, add_special_tokens=False, split_special_tokens=True)["input_ids"]}
    # transformers encodes by tokenizers, and slowly
    short = [text for text in texts if len(text) <= CHUNK_BYTES]
    for library, encode in encoders.items():
        if difference := find_first_difference(texts if library == "tokenizers" else short, encode,
                                               source_ids):
            raise UserError(f"{source.file}: cannot be represented, since {library} would not give the ids "
                            f"of {source.library} for {difference}")
    unknown = _find_unknown_id(source.raw)
    for text in texts:
        ids = source_ids(text)
        if (unknown not in ids and (found := ours.decode(ids, skip_special_tokens=False))
                != (expected := source.decode(ids))):
            raise UserError(f"{source.file}: cannot be represented, since ids of {text[:60]!r} would become "
                            f"{found[:60]!r}, not {expected[:60]!r}")
    sentence = (f"the same ids as {source.library}, by tokenizers and by transformers, on "
                f"{sum(len(t.encode()) for t in texts) / 1e6:.2f} MB of text")
    if find_first_difference([DISORDERED_MARKS], encoders["tokenizers"], source.encode):
        sentence += ", but not for combining marks in an order other than Unicode's"
    return (sentence,
            {name: sum(len(t.encode()) for t in group) / max(1, sum(len(source_ids(t)) for t in group))
             for name, group in own.items()})


def _find_unknown_id(raw: dict[str, Any]) -> int | None:
    """Return the id that stands for text outside the vocabulary; libraries spell it differently."""
    model = raw["model"]
    return (model["unk_id"] if model.get("unk_id") is not None
            else get_token_ids(raw).get(model.get("unk_token") or ""))


def _fill_manifest(artifact: ArtifactWriter, source: ForeignTokenizer, special: dict[str, Any], checked: str,
              ratios: dict[str, float]) -> None:
    """State the same facts as of a trained tokenizer, and where it comes from."""
    ids = get_token_ids(source.raw)
    artifact.content = {
        "preset": PRESET,
        "tokenizer_sha256": sha256_file(artifact.path / TOKENIZER_JSON),
        **{f"{name}_id": ids.get(special[f"{name}_token"] or "") for name in ("bos", "eos", "pad")},
        "vocab_size": source.vocab_size,
        "bytes_per_token": ratios,
        "checked": checked,
    }
    artifact.settings = {"source": source.file.name, "source_sha256": sha256_file(source.file),
                         "library": source.library}
