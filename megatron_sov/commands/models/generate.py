"""Options and checks for `megatron-sov generate TARGET --prompt TEXT ...`."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from annotated_types import MinLen

from megatron_sov.base.errors import UserError
from megatron_sov.base.settings import (
    AtLeastOne, DeclaredCommand, Flag, NotNegativeInt, ProblemCode, SettingsProblem)
from megatron_sov.base.settings.problem import UNSET
from megatron_sov.chat.media_tokens import AUDIO, IMAGE
from megatron_sov.commands.shared_options import ModelPath
from megatron_sov.infer.engine import ChosenEngine
from megatron_sov.infer.prompts import ModelPrompt, read_prompts
from megatron_sov.infer.request import MEGATRON, Batching, RankOptions, Sampling, WholeSampling
from megatron_sov.model.recipes.requested import PluginOptions, load_plugins
from megatron_sov.runs.checkpoints import check_model
from megatron_sov.runs.folder import RunEvents


@dataclass(frozen=True, kw_only=True)
class CodecsOptions:
    """Codecs for pictures and sounds."""

    image_tokenizer: Annotated[Path | None, Flag(value="CODEC")] = None
    """Codec that encodes prompt pictures: the codec used in training."""
    audio_tokenizer: Annotated[Path | None, Flag(value="CODEC")] = None
    """Codec that encodes prompt sounds: the codec used in training."""
    image_decoder: Annotated[Path | None, Flag(value="CODEC")] = None
    """Codec that decodes generated picture tokens (vqmodel)."""
    vocoder: Annotated[Path | None, Flag(value="CODEC")] = None
    """Codec that decodes generated sound tokens (mimi, dac)."""
    no_features: bool = False
    """Encode media as discrete tokens only, also for a model trained with encoder features."""
    max_audio_tokens: NotNegativeInt = 0
    """Maximum speech tokens per reply (default: the reply's length)."""


@dataclass(frozen=True)
class ReplySampling(WholeSampling):
    """Sampling settings for replies."""

    max_new_tokens: AtLeastOne = 1024
    """Longest reply."""


@dataclass(frozen=True, kw_only=True)
class GenerateOptions(CodecsOptions, PluginOptions, RankOptions):
    """Continue prompts with a model, and print or write the texts."""

    target: ModelPath
    prompt: tuple[str, ...] = ()
    """Text to continue; may be repeated."""
    prompts: Annotated[Path | None, Flag(value="FILE.jsonl")] = None
    """Lines with "prompt" and, if wanted, "target"."""
    chat: bool = False
    """Format prompts as user messages with the chat template."""
    sampling: Sampling = field(default_factory=Sampling)
    samples: AtLeastOne = 1
    """Continuations per prompt; more than one needs --temperature above 0."""
    stop: tuple[Annotated[str, MinLen(1)], ...] = ()
    """Text that ends a continuation; may be repeated."""
    image: Annotated[tuple[Path, ...], Flag(value="FILE")] = ()
    """Picture before the prompt; may be repeated."""
    audio: Annotated[tuple[Path, ...], Flag(value="FILE")] = ()
    """Sound before the prompt; may be repeated."""
    out_image: Annotated[Path | None, Flag(value="DIR")] = None
    """Generate pictures, and write them to this folder."""
    out_audio: Annotated[Path | None, Flag(value="DIR")] = None
    """Generate sounds, and write them to this folder."""
    batching: Batching = field(default_factory=Batching)
    engine: ChosenEngine = None
    run: Annotated[Path | None, Flag(value="DIR")] = None
    """Also record the texts in DIR/events.jsonl, for the run's report."""
    output: Annotated[Path | None, Flag(value="FILE.jsonl")] = None
    """Write a JSONL row per continuation (the prompt's fields and `response`, the input of `megatron-sov
    score`) instead of printing."""
    json: bool = False
    """Print texts and tokens as JSON."""
    logprobs: bool = False
    """With --json: also print log-probabilities per token, the temperature that they belong to, and finish
    reasons."""

    @property
    def has_media(self) -> bool:
        """Whether the prompt or the reply contains media."""
        return bool(self.image or self.audio or self.out_image or self.out_audio)

    def problems(self) -> list[SettingsProblem]:
        return self._media_problems() if self.has_media else self._text_problems()

    def _text_problems(self) -> list[SettingsProblem]:
        temperature = f"needs --temperature above 0, which is {self.sampling.temperature:g}"
        rules = [(self.samples > 1 and not self.sampling.temperature, "samples", self.samples, temperature,
                  "add --temperature 1"),
                 (self.sampling.top_p < 1 and not self.sampling.temperature, "sampling.top_p",
                  self.sampling.top_p, temperature, "add --temperature 1"),
                 (self.output is not None and self.json, "output", self.output, "excludes --json",
                  "leave one out"),
                 (self.logprobs and not self.json, "logprobs", UNSET, "needs --json", "add it"),
                 *((os.path.isfile(text), "prompt", text, "is the name of a file, not a text",
                    f"pass --prompts {text}, lines of JSON with \"prompt\"") for text in self.prompt)]
        return [SettingsProblem(ProblemCode.RULE, key, rule, value, fix)
                for is_broken, key, value, rule, fix in rules if is_broken]

    def _media_problems(self) -> list[SettingsProblem]:
        text_options = {"prompts": self.prompts, "output": self.output,
                        "samples": self.samples if self.samples > 1 else None,
                        "stop": self.stop, "logprobs": self.logprobs, "run": self.run}
        problems = [SettingsProblem(ProblemCode.RULE, key, "is not supported with media", UNSET,
                                    "leave it out (`eval media` reads many prompts)")
                    for key, value in text_options.items() if value]
        if self.engine not in (None, MEGATRON):
            problems.append(SettingsProblem(ProblemCode.RULE, "engine", "cannot enforce whole media blocks",
                                            self.engine, f"use {MEGATRON}"))
        if not (self.prompt or self.image or self.audio):
            problems.append(SettingsProblem(ProblemCode.MISSING, "", "the prompt is empty",
                                            way_out="pass --prompt TEXT, --image FILE or --audio FILE"))
        return problems


@dataclass(frozen=True)
class GenerateRequest:
    """Checked input for `generate_run.generate_texts`."""

    options: GenerateOptions
    prompts: list[ModelPrompt]
    """Every prompt `options.samples` times, because continuations have separate random numbers."""
    events: RunEvents


@dataclass(frozen=True)
class MediaRequest:
    """Checked input for `generate_media_run.generate_media`."""

    options: GenerateOptions
    root: Path
    """Common folder of --image and --audio."""
    parts: list[dict[str, Any]]
    """Message parts with paths below `root`: pictures, then sounds."""
    output_folders: dict[str, Path]
    """`IMAGE` or `AUDIO` -> folder."""


def check_generate(options: GenerateOptions) -> GenerateRequest | MediaRequest:
    load_plugins(options.plugins)
    if options.has_media:
        return _check_media(options)
    prompts = [prompt for prompt in read_prompts(options.prompt, options.prompts)
               for _ in range(options.samples)]
    check_model(options.target, options.settings, options.nproc)
    return GenerateRequest(options, prompts, RunEvents(options.run))


GENERATE = DeclaredCommand(GenerateOptions, check_generate, {
    GenerateRequest: "megatron_sov.commands.models.generate_run:generate_texts",
    MediaRequest: "megatron_sov.commands.models.generate_media_run:generate_media"})


def _check_media(options: GenerateOptions) -> MediaRequest:
    folders = {IMAGE: options.out_image, AUDIO: options.out_audio}
    output_folders = {kind: folder for kind, folder in folders.items() if folder is not None}
    check_decoders(options, output_folders)
    files = [(IMAGE, file) for file in options.image] + [(AUDIO, file) for file in options.audio]
    root = _find_common_folder([file for _, file in files])
    parts = [{"type": kind, "path": str(Path(os.path.abspath(file)).relative_to(root))}
             for kind, file in files]
    check_model(options.target, options.settings, options.nproc)
    return MediaRequest(options, root, parts, output_folders)


def check_decoders(options: CodecsOptions, output_folders: dict[str, Path]) -> None:
    """Raise `UserError` for an output folder without the codec that decodes its files."""
    for kind, option, codec in ((IMAGE, "--image-decoder", options.image_decoder),
                                (AUDIO, "--vocoder", options.vocoder)):
        if kind in output_folders and codec is None:
            raise UserError(f"--out-{kind} {output_folders[kind]}: needs {option} CODEC, which decodes "
                            "tokens to files")


def _find_common_folder(files: list[Path]) -> Path:
    for file in files:
        if not file.is_file():
            raise UserError(f"{file}: is not a file; pass a picture or a sound")
    if not files:
        return Path(os.getcwd())
    # links stay unresolved: the reader follows links and refuses targets outside the folder
    return Path(os.path.commonpath([os.path.dirname(os.path.abspath(file)) for file in files]))
