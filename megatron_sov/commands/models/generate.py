"""Options and checks of `megatron-sov generate TARGET --prompt TEXT ...`."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from annotated_types import MinLen

from megatron_sov.base.errors import UserError
from megatron_sov.base.outputs import check_output
from megatron_sov.base.settings import (
    AtLeastOne, DeclaredCommand, Flag, NotNegativeInt, ProblemCode, SettingsProblem)
from megatron_sov.base.settings.problem import UNSET
from megatron_sov.chat.media_tokens import AUDIO, IMAGE
from megatron_sov.commands.shared_options import ModelPath
from megatron_sov.infer.engine import MEGATRON, ChosenEngine
from megatron_sov.infer.prompts import ModelPrompt, read_prompts
from megatron_sov.infer.request import Batching, RankOptions, Sampling, WholeSampling
from megatron_sov.model.recipes.requested import PluginOptions, load_plugins
from megatron_sov.runs.checkpoints import check_model_path
from megatron_sov.runs.folder import RunEvents


@dataclass(frozen=True, kw_only=True)
class CodecsOptions:
    """Codecs of pictures and sounds."""

    image_tokenizer: Annotated[Path | None, Flag(value="CODEC")] = None
    """Codec that its pictures were encoded with, to show it some."""
    audio_tokenizer: Annotated[Path | None, Flag(value="CODEC")] = None
    """Codec that its sounds were encoded with, to let it hear some."""
    image_decoder: Annotated[Path | None, Flag(value="CODEC")] = None
    """Codec that makes pictures of its tokens (vqmodel, janus-vq)."""
    vocoder: Annotated[Path | None, Flag(value="CODEC")] = None
    """Codec that makes sounds of its tokens (mimi, dac)."""
    no_features: bool = False
    """Show discrete tokens alone, also to a model that has learned from features of its encoders."""
    max_audio_tokens: NotNegativeInt = 0
    """Longest speech of a reply, in its tokens (default: the reply's length)."""


@dataclass(frozen=True)
class ReplySampling(WholeSampling):
    """Sampling of replies."""

    max_new_tokens: AtLeastOne = 1024
    """Longest reply."""


@dataclass(frozen=True, kw_only=True)
class GenerateOptions(CodecsOptions, PluginOptions, RankOptions):
    """Continue prompts with a model, and print or write the texts."""

    target: ModelPath
    prompt: tuple[str, ...] = ()
    """Text to continue; repeat it."""
    prompts: Annotated[Path | None, Flag(value="FILE.jsonl")] = None
    """Lines with "prompt" and, if wanted, "target"."""
    chat: bool = False
    """Frame each prompt as a user's message by the chat template."""
    sampling: Sampling = field(default_factory=Sampling)
    samples: AtLeastOne = 1
    """Continuations of each prompt, with --temperature above 0."""
    stop: tuple[Annotated[str, MinLen(1)], ...] = ()
    """Text that ends a continuation; repeat it."""
    image: Annotated[tuple[Path, ...], Flag(value="FILE")] = ()
    """Show it a picture before the prompt; repeat it."""
    audio: Annotated[tuple[Path, ...], Flag(value="FILE")] = ()
    """Let it hear a sound before the prompt; repeat it."""
    out_image: Annotated[Path | None, Flag(value="DIR")] = None
    """Let it draw, and write pictures there."""
    out_audio: Annotated[Path | None, Flag(value="DIR")] = None
    """Let it speak, and write sounds there."""
    batching: Batching = field(default_factory=Batching)
    engine: ChosenEngine = None
    run: Annotated[Path | None, Flag(value="DIR")] = None
    """Also add the texts to this run's events, for its report."""
    output: Annotated[Path | None, Flag(value="FILE.jsonl")] = None
    """Write a line for each continuation, the prompt's fields and `response`, as `megatron-sov score` reads
    them, and print nothing."""
    json: bool = False
    """Print the texts and tokens as JSON."""
    logprobs: bool = False
    """With --json: also each token's log-probability, the temperature it belongs to, and what ended the
    text."""

    @property
    def has_media(self) -> bool:
        """Whether the prompt or the reply contains media."""
        return bool(self.image or self.audio or self.out_image or self.out_audio)

    def problems(self) -> list[SettingsProblem]:
        return self._media_problems() if self.has_media else self._text_problems()

    def _text_problems(self) -> list[SettingsProblem]:
        temperature = f"is of use with --temperature above 0, and it is {self.sampling.temperature:g}"
        rules = [(self.samples > 1 and not self.sampling.temperature, "samples", self.samples, temperature,
                  "add --temperature 1"),
                 (self.output is not None and self.json, "output", self.output, "goes without --json",
                  "leave one of them out"),
                 (self.logprobs and not self.json, "logprobs", UNSET, "goes with --json", "add it"),
                 *((os.path.isfile(text), "prompt", text, "names a file, whose name would be continued",
                    f"pass --prompts {text}, lines of JSON with \"prompt\"") for text in self.prompt)]
        return [SettingsProblem(ProblemCode.RULE, key, rule, value, fix)
                for is_broken, key, value, rule, fix in rules if is_broken]

    def _media_problems(self) -> list[SettingsProblem]:
        text_options = {"prompts": self.prompts, "sampling.num_drafts": self.sampling.num_drafts,
                        "output": self.output, "samples": self.samples if self.samples > 1 else None,
                        "stop": self.stop, "logprobs": self.logprobs, "run": self.run}
        problems = [SettingsProblem(ProblemCode.RULE, key, "does not go with media", UNSET,
                                    "leave it out (`eval media` asks many prompts)")
                    for key, value in text_options.items() if value]
        if self.engine not in (None, MEGATRON):
            problems.append(SettingsProblem(ProblemCode.RULE, "engine", "does not keep blocks of media whole",
                                            self.engine, f"use {MEGATRON}"))
        if not (self.prompt or self.image or self.audio):
            problems.append(SettingsProblem(ProblemCode.MISSING, "", "there is nothing to answer",
                                            way_out="pass --prompt TEXT, --image FILE or --audio FILE"))
        return problems


@dataclass(frozen=True)
class GenerateRequest:
    """Checked input of `generate_run.generate_texts`."""

    options: GenerateOptions
    prompts: list[ModelPrompt]
    """Each prompt `options.samples` times, because each continuation has its own random numbers."""
    events: RunEvents


@dataclass(frozen=True)
class MediaRequest:
    """Checked input of `generate_media_run.generate_media`."""

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
    check_model_path(options.target)
    check_output("--output", options.output)
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
    check_model_path(options.target)
    return MediaRequest(options, root, parts, output_folders)


def check_decoders(options: CodecsOptions, output_folders: dict[str, Path]) -> None:
    """Raise `UserError` for an output folder without the codec that decodes its files."""
    for kind, option, codec in ((IMAGE, "--image-decoder", options.image_decoder),
                                (AUDIO, "--vocoder", options.vocoder)):
        if kind in output_folders and codec is None:
            raise UserError(f"--out-{kind} {output_folders[kind]}: needs {option} CODEC, which makes files "
                            "of tokens")


def _find_common_folder(files: list[Path]) -> Path:
    for file in files:
        if not file.is_file():
            raise UserError(f"{file}: is no file; name a picture or a sound")
    if not files:
        return Path(os.getcwd())
    # links stay unresolved: the reader follows links and refuses targets outside the folder
    return Path(os.path.commonpath([os.path.dirname(os.path.abspath(file)) for file in files]))
