"""`sov-tokenizer graft` and `media`: other tokens for a Hugging Face model, with rows of embedding and head
to match; tokens of pictures and sounds behind those of a tokenizer or a model."""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Le

from megatron_sov.base.artifacts import (
    MANIFEST, ArtifactWriter, atomic_write, damaged_files, new_artifact, read_manifest, refuse_existing,
    sha256_file, to_json)
from megatron_sov.base.errors import UserError
from megatron_sov.base.settings import (
    AtLeastOne, Flag, NotNegative, NotNegativeInt, ProblemCode, SettingsProblem, add_options, command_of,
    only_with, read_options)
from megatron_sov.chat.media_tokens import (
    AUDIO, DIGITS, IMAGE, MARKS, MEDIA, VocabularyBlock, describe_blocks, entry)
from megatron_sov.model.pretrained import INDEX, hub_name, read_json, weight_files

KIND = "hf_model"
"""As `megatron-sov convert to-hf` names its folders."""
LIST = "graft.json"
CONFIG = "config.json"
COMPANIONS = ("generation_config.json", "special_tokens_map.json", "chat_template.jinja",
              "chat_template.json")
"""Files that stay true; vocab.json and the like would not, and code is not taken along."""


@dataclass(frozen=True, kw_only=True)
class GraftOptions:
    """Add tokens to a Hugging Face model's folder, or replace some, before training it on.

    Tokens come from a .txt file, one per line (found in text as written), or from another tokenizer of
    the same kind (BPE: they become merges). Each new row of embedding and head is the mean of the rows of
    which its text was made before. Old ids, and the ids of text without new tokens, stay."""

    model: Annotated[Path, Flag("MODEL_DIR")]
    """The model's folder: config.json, safetensors, tokenizer.json."""
    add: Annotated[tuple[Path, ...], Flag(value="TOKENS.txt|TOKENIZER")] = ()
    """Tokens to add: a text file, one per line, or a tokenizer (any form that import reads); repeat it."""
    special: bool = False
    """Tokens of .txt files are special tokens, such as <|think|>."""
    replace: Annotated[tuple[str, ...], Flag(value="OLD=NEW")] = ()
    """Let NEW take the id of OLD; repeat it."""
    vocab_size: AtLeastOne | None = None
    """Rows of the finished model; tokens of a tokenizer fill them up, in its order (default: as many as
    needed)."""
    output: Annotated[Path, Flag(value="DIR")]
    """Folder for the grafted model."""
    text: tuple[Path, ...] = ()
    """Text on which old and new ids are compared, beside the built-in one."""
    overwrite: bool = False
    """Replace a model that is already there."""


@dataclass(frozen=True)
class Codebooks:
    """Special tokens whose spelling says nothing about them: entries of codebooks and what stands around
    them."""

    tokens: tuple[str, ...]
    """In the order of their ids, behind all others."""
    noise: float
    """Of their rows, which are the mean of all: normal, in standard deviations of each column."""
    seed: int
    """Of the noise."""
    content: dict[str, Any] = field(default_factory=dict)
    """What the manifest says of them."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_options(parser, GraftOptions)


def run(typed: argparse.Namespace) -> int:
    args = read_options(GraftOptions, typed)
    graft(args.model, args.output, add=args.add, special=args.special, replace=args.replace,
          vocab_size=args.vocab_size, texts=args.text, overwrite=args.overwrite)
    return 0


def graft(model: Path, output: Path, *, add: Sequence[Path], special: bool = False,
          replace: Sequence[str] = (), vocab_size: int | None = None, texts: Sequence[Path] = (),
          codebooks: Codebooks | None = None, overwrite: bool = False) -> None:
    """Write a model with other tokens, as an artifact of kind "hf_model".

    Args:
        model: a Hugging Face folder.
        output: the folder to write.
        add: .txt files and tokenizers.
        special: tokens of .txt files are special tokens.
        replace: OLD=NEW.
        vocab_size: rows of the finished model; None: as many as needed, but no fewer than before.
        texts: files and folders on which ids are compared besides.
        codebooks: tokens that are added behind those of `add`.
        overwrite: replace a model that is already there.

    Raises:
        UserError: the folder is damaged or of an unknown make, a token cannot be added,
            or `output` may not be replaced.
    """
    from tokenizer.formats.reader import find_file, ids_of, open_hf
    from tokenizer.graft.vocabulary import RowPlan, Surgery, find_tables

    refuse_existing(output, KIND, overwrite)
    if not add and not replace and codebooks is None:
        raise UserError("sov-tokenizer graft: nothing to do; pass --add or --replace")
    if not (model / CONFIG).is_file():
        raise UserError(f"{model}: has no {CONFIG}, so it is not a Hugging Face folder; "
                        "pass the folder that holds the model")
    config = read_json(model / CONFIG)
    old_rows = _vocab_size(config, model)
    source = open_hf(find_file(model))
    if (known_ids := max(ids_of(source.raw).values()) + 1) > old_rows:
        raise UserError(f"{model}: its tokenizer has {known_ids} ids, but vocab_size in {CONFIG} is "
                        f"{old_rows}; restore the folder from its source")
    files = [model / name for name in weight_files(model)]
    tables = find_tables(files, old_rows)
    surgery = Surgery(source.raw, str(source.file), _protected(source, config))
    if add or replace:
        _operate(surgery, add, special, replace, vocab_size)
    noisy = range(surgery.num_ids, surgery.num_ids + len(codebooks.tokens)) if codebooks else range(0)
    if codebooks is not None:
        surgery.add_words(codebooks.tokens, special=True)
    new_rows = max(old_rows, surgery.num_ids) if vocab_size is None else vocab_size
    if new_rows < max(old_rows, surgery.num_ids):
        raise UserError(f"--vocab-size {vocab_size}: must be at least {max(old_rows, surgery.num_ids)}, "
                        "which the model has and the tokens need")
    plan = RowPlan(old_rows, new_rows, known_ids, {
        token.id: [] if token.id in noisy else token.old_ids for token in surgery.new},
        codebooks.noise if codebooks else 0.0, noisy, codebooks.seed if codebooks else 0)
    with new_artifact(output, KIND, overwrite=overwrite) as artifact:
        _write_tokenizer(artifact.path, model, surgery)
        config.get("text_config", config)["vocab_size"] = new_rows
        (artifact.path / CONFIG).write_text(to_json(config), encoding="utf-8")
        checked = _check(artifact.path, source, surgery, texts)
        _write_weights(artifact, files, tables, plan)
        _describe(artifact, model, surgery, plan, checked, config)
        artifact.content |= codebooks.content if codebooks else {}
    _tell(surgery, plan, checked, output)


def _vocab_size(config: dict[str, Any], model: Path) -> int:
    """Return vocab_size of a config.json, which may stand in its text_config."""
    value = config.get("text_config", config).get("vocab_size")
    if type(value) is not int or value < 1:
        raise UserError(f"{model / CONFIG}: vocab_size = {value!r} must be a positive number; "
                        "restore it from its source")
    return value


def _protected(source: Any, config: dict[str, Any]) -> set[str]:
    """Return the tokens that something relies on: those named anywhere as bos, eos, pad or unknown,
    and those in templates."""
    from tokenizer.formats.reader import ids_of

    defaults = source.file.with_name("generation_config.json")
    ids: list[int | None] = []
    for place in (config, read_json(defaults) if defaults.is_file() else {}):
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            value = place.get(name)
            ids += value if isinstance(value, list) else [value]
    relied = json.dumps(source.raw.get("post_processor"), ensure_ascii=False) + (source.chat_template or "")
    named = {token for token in (*source.named.values(), source.raw["model"].get("unk_token")) if token}
    named |= {token for token, id_ in ids_of(source.raw).items()
              if id_ in ids or id_ == source.raw["model"].get("unk_id")}
    return named | {token["content"] for token in source.raw["added_tokens"] if token["content"] in relied}


def _operate(surgery: Any, add: Sequence[Path], special: bool, replace: Sequence[str],
             max_ids: int | None) -> None:
    """Replace first, then add words, then the tokens of tokenizers, which may fill up what is left."""
    from tokenizer.formats.reader import open_foreign

    for pair in replace:
        cuts = [i for i, c in enumerate(pair) if c == "="]
        if not cuts:
            raise UserError(f"--replace {pair}: must be OLD=NEW, e.g. '<|reserved_5|>=<|think|>'")
        cut = next((i for i in cuts if surgery.knows(pair[:i])), cuts[0])  # a token may hold the sign itself
        surgery.replace(pair[:cut], pair[cut + 1:])
    for path in (path for path in add if path.suffix == ".txt"):
        surgery.add_words(_words(path), special=special)
    for path in (path for path in add if path.suffix != ".txt"):
        surgery.add_tokens_of(open_foreign(path).raw, str(path), max_ids)
    if not surgery.new:
        reasons = "; ".join(f"{len(texts)}: {reason}" for reason, texts in surgery.skipped.items())
        raise UserError("--add: none of the tokens can be added "
                        f"({reasons or 'the files hold none that are not there already'})")


def _words(path: Path) -> list[str]:
    """Return the lines of a text file.

    Raises:
        UserError: it cannot be read, is empty, or says a token twice.
    """
    try:
        words = [line for line in path.read_text(encoding="utf-8").split("\n") if line.rstrip("\r")]
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"--add {path}: cannot be read as UTF-8 text ({e}); "
                        "pass a file with one token per line") from None
    words = [word.rstrip("\r") for word in words]
    if not words:
        raise UserError(f"--add {path}: holds no tokens; write one per line")
    if len(set(words)) < len(words):
        raise UserError(f"--add {path}: has {next(w for w in words if words.count(w) > 1)!r} "
                        "twice; leave one out")
    return words


def _write_tokenizer(folder: Path, model: Path, surgery: Any) -> None:
    """Write the tokenizer's files; replaced tokens are renamed wherever a file names them."""
    from tokenizer.formats.hf_files import CONFIG_JSON, TOKENIZER_JSON
    from tokenizer.formats.reader import opened

    raw = surgery.finished()
    (folder / TOKENIZER_JSON).write_text(opened(raw, model).to_str(), encoding="utf-8")
    for name in (name for name in COMPANIONS if (model / name).is_file()):
        shutil.copyfile(model / name, folder / name)
    renamed = {token.how.removeprefix("instead of "): token.token
               for token in surgery.new if token.how.startswith("instead of ")}
    config = read_json(model / CONFIG_JSON) if (model / CONFIG_JSON).is_file() else {}
    config.pop("added_tokens_decoder", None)  # tokenizer.json has them
    # classes named after models build their own splitting around vocabulary and merges;
    # this one reads tokenizer.json
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    (folder / CONFIG_JSON).write_text(to_json(_renamed(config, renamed)), encoding="utf-8")
    if (folder / "special_tokens_map.json").is_file():
        listed = _renamed(read_json(folder / "special_tokens_map.json"), renamed)
        (folder / "special_tokens_map.json").write_text(to_json(listed), encoding="utf-8")


def _renamed(value: Any, names: dict[str, str]) -> Any:
    """Return JSON with texts exchanged wherever they stand as a value."""
    if isinstance(value, dict):
        return {key: _renamed(part, names) for key, part in value.items()}
    if isinstance(value, list):
        return [_renamed(part, names) for part in value]
    return names.get(value, value) if isinstance(value, str) else value


def _check(folder: Path, source: Any, surgery: Any, paths: Sequence[Path]) -> str:
    """Compare old and new ids, by tokenizers and transformers; returns a sentence.

    `folder` holds config.json as well: for some model types transformers takes a tokenizer class of its own
    whatever tokenizer_config.json says.

    Raises:
        UserError: text without new tokens has other ids, or a new token is not found in its own text.
    """
    from transformers import AutoTokenizer

    from tokenizer.formats.hf_files import TOKENIZER_JSON
    from tokenizer.formats.reader import opened, plain_ids
    from tokenizer.graft.vocabulary import CHARACTERS
    from tokenizer.sample_texts import CHUNK_BYTES, built_in, users

    tokenizer = opened(read_json(folder / TOKENIZER_JSON), folder)
    loaded, encode = AutoTokenizer.from_pretrained(folder, trust_remote_code=False), plain_ids(tokenizer)
    fresh, num_same = {token.id for token in surgery.new}, 0
    texts = [*built_in(source.raw), *users(paths)]
    for text in texts:
        ids, before = encode(text), source.encode(text)
        if (len(text) <= CHUNK_BYTES
                and loaded(text, add_special_tokens=False, split_special_tokens=True)["input_ids"] != ids):
            raise UserError(f"{source.file}: after the graft, transformers would read it by its class "
                            f"{type(loaded).__name__}, which gives other ids than the file says, e.g. "
                            f"for {text[:60]!r}; the model needs a tokenizer of that class")
        if fresh.isdisjoint(ids) and fresh.isdisjoint(before):
            num_same += 1
            if ids != before:
                raise UserError(f"{source.file}: {text[:60]!r} has no new token but would get other ids, "
                                "so this tokenizer cannot be grafted")
    for token in surgery.new:
        # a part of a character is no text, and sentencepiece's kind puts a space before its text
        alone = token.how in ("merge", "character") and ("\ufffd" in token.text or surgery.kind == CHARACTERS)
        found = [t.id for t in tokenizer.model.tokenize(token.token)] if alone else loaded.encode(token.text)
        if token.id not in found:
            raise UserError(f"{source.file}: new token {token.text!r} would not be found in its own "
                            "text; leave it out")
    return (f"each new token is found in its own text, and {num_same} of {len(texts)} texts, "
            "which have none, keep their ids")


def _write_weights(artifact: ArtifactWriter, files: list[Path], tables: dict[str, Path], plan: Any) -> None:
    """Write all safetensors files, and the index with the new total."""
    from tqdm import tqdm

    from tokenizer.graft.vocabulary import copy_file, graft_file, row_bytes

    for file in tqdm(files, desc="graft", unit="file", disable=None):
        held, target = {name for name, place in tables.items() if place == file}, artifact.path / file.name
        artifact.known_files[file.name] = (graft_file(file, target, held, plan) if held
                                           else copy_file(file, target))
    index = files[0].with_name(INDEX)
    if index.is_file():
        value = read_json(index)
        metadata = value.setdefault("metadata", {})
        if "total_size" in metadata:
            metadata["total_size"] += (plan.new_rows - plan.old_rows) * row_bytes(tables)
        metadata.pop("total_parameters", None)  # newer files have it; readers count for themselves
        atomic_write(artifact.path / INDEX, to_json(value))


def _describe(artifact: ArtifactWriter, model: Path, surgery: Any, plan: Any, checked: str,
              config: dict[str, Any]) -> None:
    """Write the list of new tokens and the facts of the manifest."""
    from tokenizer.formats.reader import ids_of

    num_ids = max(ids_of(surgery.raw).values()) + 1
    padding = [num_ids, plan.new_rows] if plan.new_rows > max(num_ids, plan.old_rows) else None
    atomic_write(artifact.path / LIST, to_json({"tokens": surgery.new, "mean_rows_from_to": padding}))
    if (model / MANIFEST).is_file():
        artifact.add_input(model, leaves=True)
    artifact.content = {"family": config.get("model_type"), "vocab_size": plan.new_rows,
                        "num_new_tokens": len(surgery.new), "new_tokens": LIST, "checked": checked}
    artifact.settings = {"model": hub_name(model), "old_vocab_size": plan.old_rows,
                         "skipped": {reason: len(texts) for reason, texts in surgery.skipped.items()}}


def _tell(surgery: Any, plan: Any, checked: str, output: Path) -> None:
    """Print what was done."""
    counts: dict[str, int] = {}
    for token in surgery.new:
        how = "replaced" if token.how.startswith("instead of ") else token.how
        counts[how] = counts.get(how, 0) + 1
    print(f"{len(surgery.new)} new tokens ({', '.join(f'{n} {how}' for how, n in counts.items())}); "
          f"{plan.old_rows} rows became {plan.new_rows}")
    for reason, texts in surgery.skipped.items():
        print(f"not taken over: {len(texts)} tokens, {reason} (e.g. {', '.join(map(repr, texts[:3]))})")
    print(f"checked: {checked}")
    print(f"wrote {output}")


FILLER = "<|reserved_media_{}|>"
"""What stands on ids between blocks whose first ids were asked for."""
TOKENIZER = "tokenizer"
NOISE = 0.1
"""Standard deviations of each column (ours: the authors of the published model do not say how they began)."""


# Which ids the tokens of media get: marks, then sounds, then pictures, as in HyperCLOVA X 8B Omni.


@dataclass(frozen=True)
class MediaTokens:
    """Tokens of media."""

    audio_tokens: Annotated[NotNegativeInt, Le(10 ** DIGITS[AUDIO])] = 0
    """Entries of the codebook of sounds (HyperCLOVA X 8B Omni: 6561; default: none)."""
    image_tokens: Annotated[NotNegativeInt, Le(10 ** DIGITS[IMAGE])] = 0
    """Entries of the codebook of pictures (HyperCLOVA X 8B Omni: 65536; default: none)."""
    audio_first: Annotated[int | None, Flag(value="ID"), only_with("audio_tokens")] = None
    """Id of the first sound; ids left free before it become reserved tokens (default: the next id)."""
    image_first: Annotated[int | None, Flag(value="ID"), only_with("image_tokens")] = None
    """Id of the first picture, likewise."""

    def problems(self) -> list[SettingsProblem]:
        return [] if self.audio_tokens or self.image_tokens else [
            SettingsProblem(ProblemCode.RULE, "audio_tokens", "adds nothing, and no --image-tokens do", 0)]


def laid_out(asked: MediaTokens, known: Collection[str], num_ids: int) -> tuple[list[str],
                                                                                list[VocabularyBlock]]:
    """Return the tokens to add behind `num_ids` ids, in order, and the blocks that they make: marks end where
    the first block begins.

    Args:
        asked: sizes and first ids.
        known: tokens that are there; marks among them stay where they are.
        num_ids: ids that are taken.

    Raises:
        UserError: there are codebook entries already, or an id that was asked for is taken.
    """
    if taken := next((entry(kind, 0) for kind in (AUDIO, IMAGE) if entry(kind, 0) in known), None):
        raise UserError(f"{taken} is a token already: this tokenizer has tokens of media; take the one "
                        "that it was made of")
    words = [mark for mark in MARKS if mark not in known]
    blocks: list[VocabularyBlock] = []
    num_fillers = 0
    for kind, size, first in ((AUDIO, asked.audio_tokens, asked.audio_first),
                              (IMAGE, asked.image_tokens, asked.image_first)):
        free = num_ids + len(words)
        if not size:
            continue
        if first is not None and not free <= first <= free + (1 << 20):
            raise UserError(f"--{kind}-first {first}: the ids up to {free - 1} are taken, and no more than "
                            f"{1 << 20} may be left free; take {free} or a little more")
        gap = (first or free) - free
        fillers = [FILLER.format(num_fillers + i) for i in range(gap)]
        # marks stand right before the first block, where recipes look for placeholders
        words = [*words, *fillers] if blocks else [*fillers, *words]
        num_fillers += gap
        blocks.append(VocabularyBlock(kind, num_ids + len(words), size))
        words += [entry(kind, i) for i in range(size)]
    return words, blocks


@dataclass(frozen=True, kw_only=True)
class TokenizerMediaOptions:
    """Add a token for each entry of the codebooks of sounds and pictures, and the marks around them in a
    text. They follow all other tokens: marks, sounds, pictures. Ids of text stay as they are.

    TOKENIZER is a folder that `sov-tokenizer train` or `import` wrote, or a Hugging Face model's folder.
    A model's embedding and head then get rows too, the mean of all old rows with a little noise."""

    tokenizer: Annotated[Path, Flag("TOKENIZER")]
    """Folder of a tokenizer, or of a Hugging Face model."""
    media: MediaTokens = field(default_factory=MediaTokens)
    noise: Annotated[Annotated[NotNegative, Le(10)] | None, Flag(value="S")] = None
    """Of a model's new rows, in standard deviations of each column (default 0.1)."""
    seed: int = 0
    """Of the noise."""
    output: Annotated[Path, Flag(value="DIR")]
    """Folder for the tokenizer, or the model."""
    overwrite: bool = False
    """Replace what is already there."""


def run_media(typed: argparse.Namespace) -> int:
    args = read_options(TokenizerMediaOptions, typed)
    if (args.tokenizer / "config.json").is_file():
        noise = NOISE if args.noise is None else args.noise
        _grow_model(args.tokenizer, args.output, args.media, noise, args.seed, args.overwrite)
        return 0
    if args.noise is not None:
        raise UserError(f"--noise {args.noise}: {args.tokenizer} is no model, and a tokenizer alone "
                        "has no rows; leave it out")
    add_media(args.tokenizer, args.output, args.media, overwrite=args.overwrite)
    return 0


def add_media(tokenizer: Path, output: Path, asked: MediaTokens, *, overwrite: bool = False) -> None:
    """Write a tokenizer with tokens of media as an artifact of kind "tokenizer".

    Args:
        tokenizer: artifact of kind "tokenizer".
        output: the folder to write.
        asked: which tokens.
        overwrite: replace a tokenizer that is already there.

    Raises:
        UserError: there is no such tokenizer, it has tokens of media, or text would get other ids.
    """
    from megatron_sov.model.pretrained import read_json
    from tokenizer.formats.hf_files import CONFIG_JSON, TOKENIZER_JSON
    from tokenizer.formats.reader import find_file, ids_of, open_hf, opened

    refuse_existing(output, TOKENIZER, overwrite)
    manifest = read_manifest(tokenizer, TOKENIZER)
    if problems := damaged_files(tokenizer):
        raise UserError(f"{problems[0]}; train the tokenizer again or restore it from a copy")
    source = open_hf(find_file(tokenizer))
    surgery, blocks = _operated(source, asked)
    config = read_json(tokenizer / CONFIG_JSON)
    with new_artifact(output, TOKENIZER, overwrite=overwrite) as artifact:
        text = opened(surgery.finished(), tokenizer).to_str()
        (artifact.path / TOKENIZER_JSON).write_text(text, encoding="utf-8")
        (artifact.path / CONFIG_JSON).write_text(to_json(config), encoding="utf-8")
        checked = _check_media(artifact.path, source, surgery)
        artifact.add_input(tokenizer, leaves=True)
        artifact.content = {**manifest.content,
                            "tokenizer_sha256": sha256_file(artifact.path / TOKENIZER_JSON),
                            "vocab_size": max(ids_of(surgery.raw).values()) + 1, "checked": checked,
                            MEDIA: describe_blocks(blocks)}
        artifact.settings = {"tokenizer": tokenizer.resolve().name, "asked": asked}
    _tell_blocks(blocks, artifact.content["vocab_size"], checked, output)


def _operated(source: Any, asked: MediaTokens) -> tuple[Any, list[Any]]:
    from tokenizer.graft.vocabulary import Surgery

    surgery = Surgery(source.raw, str(source.file), set())
    words, blocks = _laid_out(source, asked)
    surgery.add_words(words, special=True)
    return surgery, blocks


def _laid_out(source: Any, asked: MediaTokens) -> tuple[list[str], list[Any]]:
    from tokenizer.formats.reader import ids_of

    ids = ids_of(source.raw)
    return laid_out(asked, ids.keys(), max(ids.values()) + 1)


def _check_media(folder: Path, source: Any, surgery: Any) -> str:
    """Compare ids of text before and after, and look for each new token in its own text; returns a sentence.

    Raises:
        UserError: text has other ids, or a token is not found.
    """
    from tokenizers import Tokenizer

    from megatron_sov.model.pretrained import read_json
    from tokenizer.formats.hf_files import TOKENIZER_JSON
    from tokenizer.formats.reader import opened, plain_ids
    from tokenizer.sample_texts import built_in, first_difference

    encode = plain_ids(opened(read_json(folder / TOKENIZER_JSON), folder))
    texts = list(built_in(source.raw))
    if difference := first_difference(texts, encode, source.encode):
        raise UserError(f"{source.file}: text would get other ids with tokens of media in its vocabulary, "
                        f"{difference}; so they cannot be added to this tokenizer")
    special = Tokenizer.from_file(str(folder / TOKENIZER_JSON))
    together = special.encode("".join(token.token for token in surgery.new), add_special_tokens=False).ids
    if together != [token.id for token in surgery.new]:
        raise UserError(f"{source.file}: its new tokens are not found in their own text; it cannot have "
                        "tokens of media")
    return f"each token of media is found in its own text, and {len(texts)} texts keep their ids"


def _grow_model(model: Path, output: Path, asked: MediaTokens, noise: float, seed: int,
                overwrite: bool) -> None:
    from tokenizer.formats.reader import find_file, open_hf

    words, blocks = _laid_out(open_hf(find_file(model)), asked)
    graft(model, output, add=[], overwrite=overwrite, codebooks=Codebooks(
        tuple(words), noise, seed, {MEDIA: describe_blocks(blocks), "media_noise": noise}))
    _tell_blocks(blocks, 0, "", output)


def _tell_blocks(blocks: list[Any], vocab_size: int, checked: str, output: Path) -> None:
    for block in blocks:
        print(f"{block.kind}: ids {block.first:,} to {block.end - 1:,}; set model.{block.kind}_tokens.first="
              f"{block.first} and model.{block.kind}_tokens.size={block.size}")
    if checked:
        print(f"vocabulary of {vocab_size:,}; {checked}")
        print(f"wrote {output}")


MEDIA_COMMAND = command_of(TokenizerMediaOptions, run_media)
