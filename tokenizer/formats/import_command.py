"""`sov-tokenizer import`: a tokenizer of Hugging Face, tiktoken or sentencepiece becomes one of ours,
with the same ids."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any

from megatron_sov.base.artifacts import ArtifactWriter, new_artifact, refuse_existing, sha256_file, to_json
from megatron_sov.base.errors import UserError, nearest
from megatron_sov.base.settings import Flag, add_options, read_options

PRESET = "imported"
"""What the manifest says where it names the preset of a trained tokenizer."""


@dataclass(frozen=True, kw_only=True)
class TokenizerImportOptions:
    """Take over a tokenizer of Hugging Face (a folder with tokenizer.json, or the file), tiktoken (a file of
    ranks, its pattern and special tokens in FILE.json beside it) or sentencepiece (a .model file, BPE
    or unigram).

    What is written gives the same ids as the library that the tokenizer was made for, on built-in texts
    of all scripts and on yours; if it does not, nothing is written."""

    path: Annotated[Path, Flag("PATH")]
    """The folder or file."""
    output: Annotated[Path, Flag(value="DIR")]
    """Folder for the tokenizer."""
    rules: Annotated[Path | None, Flag(value="FILE.json")] = None
    """For tiktoken: pat_str and special_tokens, if they do not stand in PATH.json."""
    text: tuple[Path, ...] = ()
    """Text on which ids are compared, beside the built-in ones; bytes per token are measured on it."""
    overwrite: bool = False
    """Replace a tokenizer that is already there."""
    bos: Annotated[str | None, Flag(value="TOKEN")] = None
    """Special token for the begin of a document, if the source names none."""
    eos: Annotated[str | None, Flag(value="TOKEN")] = None
    """Special token for the end of a document, if the source names none."""
    pad: Annotated[str | None, Flag(value="TOKEN")] = None
    """Special token for padding (default: eos), if the source names none."""


def run_import(typed: argparse.Namespace) -> int:
    """Run `sov-tokenizer import`; returns 0."""
    args = read_options(TokenizerImportOptions, typed)
    named = {"bos_token": args.bos, "eos_token": args.eos, "pad_token": args.pad}
    import_tokenizer(args.path, args.output, rules=args.rules, named=named, texts=args.text,
                     overwrite=args.overwrite)
    return 0


def import_tokenizer(path: Path, output: Path, *, rules: Path | None = None,
                     named: dict[str, str | None] | None = None, texts: Sequence[Path] = (),
                     overwrite: bool = False) -> None:
    """Write a foreign tokenizer as an artifact of kind "tokenizer".

    Args:
        path: what `open_foreign` reads.
        output: the folder to write.
        rules: see `open_foreign`.
        named: bos_token, eos_token, pad_token, where they are other ones than the source names.
        texts: files and folders on which ids are compared besides.
        overwrite: replace a tokenizer that is already there.

    Raises:
        UserError: it cannot be read or represented, names no end of a document,
            or `output` may not be replaced.
    """
    from tokenizer.formats.hf_files import CONFIG_JSON, TOKENIZER_JSON, config_json
    from tokenizer.formats.reader import open_foreign, opened

    refuse_existing(output, "tokenizer", overwrite)
    source = open_foreign(path, rules)
    special = _special_tokens(source, {k: v for k, v in (named or {}).items() if v is not None})
    with new_artifact(output, "tokenizer", overwrite=overwrite) as artifact:
        (artifact.path / TOKENIZER_JSON).write_text(opened(source.raw, source.file).to_str(),
                                                    encoding="utf-8")
        config = config_json(special["bos_token"], special["eos_token"], special["pad_token"],
                             source.chat_template)
        (artifact.path / CONFIG_JSON).write_text(to_json(config), encoding="utf-8")
        checked, ratios = _check(artifact.path, source, texts)
        _describe(artifact, source, special, checked, ratios)
    print(f"{source.file}: {checked}")
    for name, ratio in ratios.items():
        print(f"{name}: {ratio:.3f} bytes per token")
    print(f"wrote {output}")


def _special_tokens(source: Any, named: dict[str, str]) -> dict[str, Any]:
    """Return bos_token, eos_token and pad_token; pad is eos where there is none.

    Raises:
        UserError: one is no token, or nothing says how documents end.
    """
    from tokenizer.formats.reader import ids_of

    special: dict[str, Any] = {**source.named, **named}
    ids = ids_of(source.raw)
    for name, token in special.items():
        if token is not None and token not in ids:
            raise UserError(f"{source.file}: {name} = {token!r} is no token of it{nearest(token, ids)}; "
                            f"pass another one by --{name.removesuffix('_token')}")
    if not special.get("eos_token"):
        known = [t["content"] for t in source.raw["added_tokens"]][:8]
        raise UserError(f"{source.file}: does not say which token ends a document; "
                        f"pass it by --eos (special tokens: {', '.join(known) or 'none'})")
    return {"bos_token": None, **special, "pad_token": special.get("pad_token") or special["eos_token"]}


def _check(folder: Path, source: Any, paths: Sequence[Path]) -> tuple[str, dict[str, float]]:
    """Compare the written files with the source's library; returns a sentence and bytes per token of each
    of the user's texts.

    Raises:
        UserError: ids or text differ.
    """
    from transformers import AutoTokenizer

    from megatron_sov.model.pretrained import read_json
    from tokenizer.formats.hf_files import TOKENIZER_JSON
    from tokenizer.formats.reader import opened, plain_ids
    from tokenizer.sample_texts import CHUNK_BYTES, DISORDERED_MARKS, built_in, first_difference, users

    ours = opened(read_json(folder / TOKENIZER_JSON), source.file)
    loaded = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    own = {str(path): list(users([path])) for path in paths}
    texts = [*built_in(source.raw), *(text for group in own.values() for text in group)]
    encoders = {"tokenizers": plain_ids(ours), "transformers": lambda text: loaded(
        text, add_special_tokens=False, split_special_tokens=True)["input_ids"]}
    # transformers encodes by tokenizers, and slowly
    short = [text for text in texts if len(text) <= CHUNK_BYTES]
    for library, encode in encoders.items():
        if difference := first_difference(texts if library == "tokenizers" else short, encode, source.encode):
            raise UserError(f"{source.file}: cannot be represented, since {library} would not give the ids "
                            f"of {source.library} for {difference}")
    unknown = _unknown_id(source.raw)
    for text in texts:
        ids = source.encode(text)
        if (unknown not in ids and (found := ours.decode(ids, skip_special_tokens=False))
                != (expected := source.decode(ids))):
            raise UserError(f"{source.file}: cannot be represented, since ids of {text[:60]!r} would become "
                            f"{found[:60]!r}, not {expected[:60]!r}")
    sentence = (f"the same ids as {source.library}, by tokenizers and by transformers, on "
                f"{sum(len(t.encode()) for t in texts) / 1e6:.2f} MB of text")
    if first_difference([DISORDERED_MARKS], encoders["tokenizers"], source.encode):
        sentence += ", but not for combining marks in an order other than Unicode's"
    return (sentence,
            {name: sum(len(t.encode()) for t in group) / max(1, sum(len(source.encode(t)) for t in group))
             for name, group in own.items()})


def _unknown_id(raw: dict[str, Any]) -> int | None:
    """Return the id that stands for text outside the vocabulary; libraries spell it differently."""
    from tokenizer.formats.reader import ids_of

    model = raw["model"]
    return (model["unk_id"] if model.get("unk_id") is not None
            else ids_of(raw).get(model.get("unk_token") or ""))


def _describe(artifact: ArtifactWriter, source: Any, special: dict[str, Any], checked: str,
              ratios: dict[str, float]) -> None:
    """State the same facts as of a trained tokenizer, and where it comes from."""
    from tokenizer.formats.hf_files import TOKENIZER_JSON
    from tokenizer.formats.reader import ids_of

    ids = ids_of(source.raw)
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


IMPORT = SimpleNamespace(add_arguments=partial(add_options, cls=TokenizerImportOptions), run=run_import)
