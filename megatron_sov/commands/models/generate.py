"""`megatron-sov generate TARGET --prompt TEXT ...`."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from annotated_types import MinLen

from megatron_sov.base.artifacts import write_output
from megatron_sov.base.errors import ExitCode, UserError, escape_controls
from megatron_sov.base.outputs import check_output
from megatron_sov.base.settings import (
    AtLeastOne, Flag, NotNegativeInt, ProblemCode, SettingsProblem, add_options, read_options)
from megatron_sov.base.settings.problem import UNSET
from megatron_sov.chat.media_tokens import AUDIO, IMAGE
from megatron_sov.commands.shared_options import ModelPath, get_target_step
from megatron_sov.infer.engine import MEGATRON, ChosenEngine, Engine, choose_engine, run_with_engine
from megatron_sov.infer.prompts import (
    EncodedPrompts, ModelPrompt, check_engine, check_length, encode_prompts, format_responses, read_prompts)
from megatron_sov.infer.request import (
    Batching, GenerationResult, RankOptions, Sampling, StopRule, WholeSampling)
from megatron_sov.model.recipes.requested import PluginOptions, load_plugins
from megatron_sov.runs.checkpoints import check_model_path
from megatron_sov.runs.folder import RunEvents

if TYPE_CHECKING:
    from megatron_sov.infer.engines.target import Target
    from megatron_sov.omni.generation.prompts import ShownMedia
    from megatron_sov.omni.generation.replies import MediaDecoders


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


def shown_media(args: CodecsOptions, root: Path) -> ShownMedia:
    """Return what sees and hears media below a folder."""
    from megatron_sov.omni.generation.prompts import ShownMedia

    given = {IMAGE: args.image_tokenizer, AUDIO: args.audio_tokenizer}
    return ShownMedia(root, {kind: folder for kind, folder in given.items() if folder is not None})


def media_decoders(args: CodecsOptions) -> MediaDecoders:
    from megatron_sov.omni.generation.replies import MediaDecoders

    given = {IMAGE: args.image_decoder, AUDIO: args.vocoder}
    return MediaDecoders({kind: folder for kind, folder in given.items() if folder is not None})


def check_media(args: CodecsOptions, out: dict[str, Path]) -> None:
    """Raise `UserError` where a folder is asked for and nothing makes what belongs there, or no codec is
    there."""
    for kind, option, codec in ((IMAGE, "--image-decoder", args.image_decoder),
                                (AUDIO, "--vocoder", args.vocoder)):
        if kind in out and codec is None:
            raise UserError(f"--out-{kind} {out[kind]}: needs {option} CODEC, which makes files of tokens")


@dataclass(frozen=True)
class ReplySampling(WholeSampling):
    """How each token of a reply is chosen."""

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
        """Whether media are shown to the model, or made by it."""
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
        return [SettingsProblem(ProblemCode.RULE, key, rule, value, way_out) for broken, key, value, rule,
                way_out in rules
                if broken]

    def _media_problems(self) -> list[SettingsProblem]:
        given = {"prompts": self.prompts, "sampling.num_drafts": self.sampling.num_drafts,
                 "output": self.output, "samples": self.samples if self.samples > 1 else None,
                 "stop": self.stop, "logprobs": self.logprobs, "run": self.run}
        found = [SettingsProblem(ProblemCode.RULE, key, "does not go with media", UNSET,
                                 "leave it out (`eval media` asks many prompts)")
                 for key, value in given.items() if value]
        if self.engine not in (None, MEGATRON):
            found.append(SettingsProblem(ProblemCode.RULE, "engine", "does not keep blocks of media whole",
                                         self.engine, f"use {MEGATRON}"))
        if not (self.prompt or self.image or self.audio):
            found.append(SettingsProblem(ProblemCode.MISSING, "", "there is nothing to answer",
                                         way_out="pass --prompt TEXT, --image FILE or --audio FILE"))
        return found


add_arguments = partial(add_options, cls=GenerateOptions)


def run(args: argparse.Namespace) -> int:
    """Continue the prompts and print what the model wrote."""
    options = read_options(GenerateOptions, args)
    load_plugins(options.plugins)
    if options.has_media:
        return _run_with_media(options)
    # samples are copies of the prompt: each continuation has random numbers of its own
    prompts = [prompt for prompt in read_prompts(options.prompt, options.prompts)
               for _ in range(options.samples)]
    check_model_path(options.target)
    check_output("--output", options.output)
    events = RunEvents(options.run)

    from megatron_sov.infer.engines.target import find_target

    target = find_target(options.target)
    asked = encode_prompts(target, [p.text for p in prompts], options.chat)
    stop = StopRule(asked.end_ids, options.stop, asked.decode)
    found = _continue(options, target, asked, stop)
    if found is None:
        return 0  # the job's first process prints
    texts = [asked.response(i, stop.truncate_text(asked.decode(c)))
             for i, c in enumerate(found.continuations)]
    if options.output is not None:
        write_output(options.output, format_responses(prompts, texts, found))
    else:
        _show(options, prompts, texts, found)
    step = get_target_step(target, events)
    for prompt, text in zip(prompts, texts, strict=True):
        events.add("sample", step=step, prompt=prompt.text, text=text, target=prompt.target)
    return 0


def _continue(options: GenerateOptions, target: Target, asked: EncodedPrompts,
              stop: StopRule) -> GenerationResult | None:
    """Return what the chosen engine writes; None where another process of the job prints."""
    sampling = options.sampling
    longest = asked.longest + sampling.max_new_tokens
    engine_name = options.engine or choose_engine(target)
    check_length(target, longest, "prompt and --max-new-tokens", "shorten one of them")
    check_engine(engine_name, target, options.settings, options.nproc, num_drafts=sampling.num_drafts)

    def work(engine: Engine) -> dict[str, object]:
        return vars(engine.generate(asked.ids, sampling, stop=stop))

    answer = run_with_engine(engine_name, target, work, longest=longest, batching=options.batching,
                             settings=options.settings, nproc=options.nproc)
    if answer is None:
        return None
    found = GenerationResult(**answer)
    if sampling.num_drafts:
        share = found.accepted / found.drafted if found.drafted else 0.0
        print(f"drafts: {found.drafted}, accepted {share:.1%}", file=sys.stderr)
    return found


def _show(options: GenerateOptions, prompts: list[ModelPrompt], texts: list[str],
          found: GenerationResult) -> None:
    if options.json:
        rows: list[dict[str, object]] = [
            {"prompt": p.text, "text": t, "tokens": c}
            for p, t, c in zip(prompts, texts, found.continuations, strict=True)]
        if options.logprobs:
            for row, logprobs, reason in zip(rows, found.logprobs, found.finish_reasons, strict=True):
                row |= {"logprobs": logprobs, "temperature": found.temperature, "finish_reason": reason}
        print(json.dumps(rows, ensure_ascii=False, indent=1))
        return
    for prompt, text in zip(prompts, texts, strict=True):
        # an answer does not go on from its question, so each has a line that says who speaks
        shown = f"user: {prompt.text}\nassistant: {text}" if options.chat else f"{prompt.text}{text}"
        # a terminal obeys control characters; a file or pipe gets the text as it is
        if sys.stdout.isatty():
            shown = escape_controls(shown)
        print(f"{shown}\n" if len(prompts) > 1 else shown)


def _run_with_media(args: GenerateOptions) -> int:
    """Answer the prompts, each with all the media before it; print text and files.

    Raises:
        UserError: a codec is missing, or see `omni.generation.replies`.
    """
    out = {kind: folder for kind, folder in ((IMAGE, args.out_image), (AUDIO, args.out_audio))
           if folder is not None}
    check_media(args, out)
    # all pictures, then all sounds, in the order of the command line
    files = [(kind, file) for kind, given in ((IMAGE, args.image), (AUDIO, args.audio)) for file in given]
    root = _root([file for _, file in files])
    # paths below one root, as rows of `eval media` have them
    parts: list[dict[str, Any]] = [{"type": kind, "path": str(Path(os.path.abspath(file)).relative_to(root))}
                                   for kind, file in files]
    check_model_path(args.target)
    from megatron_sov.infer.engines.target import find_target
    from megatron_sov.omni.generation.replies import Asking, replies

    asking = Asking(shown_media(args, root), media_decoders(args), out, args.sampling,
                    chat=args.chat, max_audio_tokens=args.max_audio_tokens, batching=args.batching,
                    with_features=not args.no_features)
    prompts = [[*parts, *([{"type": "text", "text": text}] if text else [])] for text in args.prompt or [""]]
    found = replies(find_target(args.target), prompts, asking, settings=args.settings, nproc=args.nproc)
    if found is None:
        return ExitCode.OK  # the job's first process prints
    if args.json:
        print(json.dumps([{"prompt": prompt, "text": reply.text,
                           "pictures": list(map(str, reply.made.pictures)),
                           "sounds": list(map(str, reply.made.sounds)),
                           "broken_pictures": reply.made.num_broken}
                          for prompt, reply in zip(args.prompt or [""], found, strict=True)],
                         ensure_ascii=False, indent=1))
        return ExitCode.OK
    for reply in found:
        if reply.text:
            print(reply.text)
        for file in (*reply.made.pictures, *reply.made.sounds):
            print(f"wrote {file}")
        if reply.made.num_broken:
            print(f"{reply.made.num_broken} pictures broke off; raise --max-new-tokens")
    return ExitCode.OK


def _root(files: Sequence[Path]) -> Path:
    """Return the folder that all media lie in."""
    for file in files:
        if not file.is_file():
            raise UserError(f"{file}: is no file; name a picture or a sound")
    # not resolved: a link among the files is followed by the reader, which refuses what leads out
    return Path(os.path.commonpath([os.path.dirname(os.path.abspath(file)) for file in files])
                if files else os.getcwd())
