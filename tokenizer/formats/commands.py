"""`sov-tokenizer import` and `export`: a tokenizer of Hugging Face, tiktoken or sentencepiece becomes one of
ours, or one of ours theirs, with the same ids."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

from megatron_sov.base.artifacts import (
    ArtifactWriter, check_output_folder, create_artifact, format_json, sha256_file, write_output)
from megatron_sov.base.errors import UserError, suggest_name
from megatron_sov.base.outputs import check_output
from megatron_sov.base.settings import DeclaredCommand, Flag

PRESET = "imported"
"""What the manifest says where it names the preset of a trained tokenizer."""


@dataclass(frozen=True, kw_only=True)
class TokenizerImportOptions:
    """Take over a tokenizer of Hugging Face (a folder with tokenizer.json, or the file), tiktoken (a file of
    ranks; pattern and special tokens in FILE.json) or sentencepiece (a .model file, BPE or unigram).

    What is written gives the same ids as the library that the tokenizer was made for, on built-in texts
    of all scripts and on yours. If it does not, nothing is written."""

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


def run_import(args: TokenizerImportOptions) -> int:
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

    check_output_folder(output, "tokenizer", overwrite)
    source = open_foreign(path, rules)
    special = _special_tokens(source, {k: v for k, v in (named or {}).items() if v is not None})
    with create_artifact(output, "tokenizer", overwrite=overwrite) as artifact:
        (artifact.path / TOKENIZER_JSON).write_text(opened(source.raw, source.file).to_str(),
                                                    encoding="utf-8")
        config = config_json(special["bos_token"], special["eos_token"], special["pad_token"],
                             source.chat_template)
        (artifact.path / CONFIG_JSON).write_text(format_json(config), encoding="utf-8")
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
            raise UserError(f"{source.file}: {name} = {token!r} is no token of it{suggest_name(token, ids)}; "
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
    source_ids = cache(source.encode)  # three comparisons below read them
    encoders = {"tokenizers": plain_ids(ours), "transformers": lambda text: loaded(
        text, add_special_tokens=False, split_special_tokens=True)["input_ids"]}
    # transformers encodes by tokenizers, and slowly
    short = [text for text in texts if len(text) <= CHUNK_BYTES]
    for library, encode in encoders.items():
        if difference := first_difference(texts if library == "tokenizers" else short, encode, source_ids):
            raise UserError(f"{source.file}: cannot be represented, since {library} would not give the ids "
                            f"of {source.library} for {difference}")
    unknown = _unknown_id(source.raw)
    for text in texts:
        ids = source_ids(text)
        if (unknown not in ids and (found := ours.decode(ids, skip_special_tokens=False))
                != (expected := source.decode(ids))):
            raise UserError(f"{source.file}: cannot be represented, since ids of {text[:60]!r} would become "
                            f"{found[:60]!r}, not {expected[:60]!r}")
    sentence = (f"the same ids as {source.library}, by tokenizers and by transformers, on "
                f"{sum(len(t.encode()) for t in texts) / 1e6:.2f} MB of text")
    if first_difference([DISORDERED_MARKS], encoders["tokenizers"], source.encode):
        sentence += ", but not for combining marks in an order other than Unicode's"
    return (sentence,
            {name: sum(len(t.encode()) for t in group) / max(1, sum(len(source_ids(t)) for t in group))
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


IMPORT = DeclaredCommand(TokenizerImportOptions, run_import)


@dataclass(frozen=True, kw_only=True)
class TokenizerExportOptions:
    """Write a tokenizer for tiktoken (a file of ranks; pattern and special tokens in FILE.json) or for
    sentencepiece (a .model file; byte-level BPE has no such form).

    Ids are compared before anything is written, on built-in texts of all scripts and on yours."""

    path: Annotated[Path, Flag("DIR")]
    """A tokenizer's folder, ours or Hugging Face's, or its tokenizer.json."""
    format: Literal["tiktoken", "sentencepiece"]
    """Whose form."""
    output: Annotated[Path, Flag(value="FILE")]
    """The file of ranks, or the .model file."""
    text: tuple[Path, ...] = ()
    """Text on which ids are compared, beside the built-in ones."""
    overwrite: bool = False
    """Replace files that are already there."""


def run_export(args: TokenizerExportOptions) -> int:
    export_tokenizer(args.path, args.format, args.output, texts=args.text,
                     overwrite=args.overwrite)
    return 0


def export_tokenizer(path: Path, form: str, output: Path, *, texts: Sequence[Path] = (),
                     overwrite: bool = False) -> None:
    """Write a tokenizer in another form.

    Args:
        path: a folder with tokenizer.json, or the file.
        form: "tiktoken" or "sentencepiece".
        output: the file of ranks (rules are written to `output`.json) or the .model file.
        texts: files and folders on which ids are compared besides.
        overwrite: replace files that are already there.

    Raises:
        UserError: the tokenizer has no such form, or would give other ids; nothing is written then.
    """
    from tokenizer.formats.reader import find_file, open_hf
    from tokenizer.formats.tiktoken_format import rules_path
    from tokenizer.sample_texts import built_in, first_difference, users

    targets = [output, rules_path(output)] if form == "tiktoken" else [output]
    if (there := next((t for t in targets if t.exists()), None)) and (not overwrite or there.is_dir()):
        raise UserError(f"{there}: exists already; choose another file or pass --overwrite")
    for target in targets:
        check_output("--output", target)
    file = find_file(path)
    if file.suffix != ".json":
        raise UserError(f"{file}: is no tokenizer.json; take it over by `sov-tokenizer import` first")
    source = open_hf(file)
    contents, encode = (_tiktoken if form == "tiktoken" else _sentencepiece)(source, output.stem)
    samples = [*built_in(source.raw), *users(texts)]
    if difference := first_difference(samples, encode, source.encode):
        raise UserError(f"{file}: cannot be exported, since {form} would not give the same ids "
                        f"for {difference}")
    for target, content in zip(targets, contents, strict=True):
        write_output(target, content)
        print(f"wrote {target}")
    print(f"{form} gives the same ids on {sum(len(t.encode()) for t in samples) / 1e6:.2f} MB of text")


Made = tuple[list[bytes], Callable[[str], list[int]]]


def _tiktoken(source: Any, name: str) -> Made:
    """Return the contents of ranks and rules, and the encoding by them."""
    from megatron_sov.base.documents.byte_bpe import NotByteBpe
    from tokenizer.formats.tiktoken_format import encoder, encoding, ranks_text, to_tiktoken

    try:
        ranks, rules = to_tiktoken(source.raw, name, source.named)
    except NotByteBpe as e:
        raise UserError(f"{source.file}: has no form in tiktoken: {e}") from None
    found = encoding(ranks, rules)
    for token, id_ in ranks.items():
        if found.decode_single_token_bytes(id_) != token or found.encode_single_token(token) != id_:
            raise UserError(f"{source.file}: cannot be exported, since tiktoken would not keep token "
                            f"{token!r} with id {id_}")
    for special, id_ in rules.special_tokens.items():
        if found.encode(special, allowed_special="all") != [id_]:
            raise UserError(f"{source.file}: cannot be exported, since tiktoken would not find special token "
                            f"{special!r} in text")
    if rules.normalization:
        print(f"tiktoken takes text as it is: apply {rules.normalization} to it beforehand")
    return [ranks_text(ranks), format_json(rules).encode()], encoder(ranks, rules)


def _sentencepiece(source: Any, name: str) -> Made:
    """Return the content of the .model file, and the encoding by it."""
    from tokenizer.formats.sentencepiece_format import NotSentencepiece, processor, to_sentencepiece

    try:
        model = to_sentencepiece(source.raw, source.named)
    except NotSentencepiece as e:
        raise UserError(f"{source.file}: has no form in sentencepiece: {e}") from None
    return [model], processor(model).encode


EXPORT = DeclaredCommand(TokenizerExportOptions, run_export)
