"""`megatron-sov codec train | import | reconstruct | inspect`: tokenizers, and decoders, of media."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

from megatron_sov.base.artifacts import to_json
from megatron_sov.base.errors import ExitCode, UserError
from megatron_sov.base.settings import (
    AboveZero, Actions, AtLeastOne, Flag, NotNegativeInt, ProblemCode, SettingsProblem, add_actions, change,
    run_action)
from megatron_sov.commands.shared_options import OverwriteOptions

DECODERS = ("image-decoder", "vocoder")
"""Codecs that decode a tokenizer's ids."""


@dataclass(frozen=True, kw_only=True)
class CodecTrainOptions(OverwriteOptions):
    """Train a codec from media of your own, or go on where it was killed."""

    kind: Annotated[Literal["image-tokenizer", "audio-tokenizer", "image-decoder", "vocoder"], Flag("KIND")]
    """One of image-tokenizer, audio-tokenizer, image-decoder, vocoder."""
    input: Annotated[Path, Flag(value="DIR_OR_LIST")]
    """Folder of media, searched below it too, or a text file with a path in each line."""
    output: Annotated[Path, Flag(value="DIR")]
    """Codec to write; what is under way lies in DIR.training beside it."""
    tokenizer: Annotated[Path | None, Flag(value="CODEC")] = None
    """Whose ids a decoder decodes; needed for image-decoder and vocoder."""
    vae: Annotated[Path | None, Flag(value="DIR")] = None
    """AutoencoderKL of diffusers in whose latents image-decoder draws; none: in pixels."""
    encoder: Annotated[Path | None, Flag(value="HF_DIR")] = None
    """Folder of a SigLIP that sees, frozen, in place of an encoder that is learned."""
    steps: int | None = None
    """Optimizer steps (learning.steps)."""
    seed: int | None = None
    """Of weights and order (learning.seed)."""
    changes: Annotated[tuple[str, ...], Flag("--set", "KEY=VALUE")] = ()
    """Another setting, e.g. model.grid=4 or learning.batch_size=16; may be repeated."""
    device: Literal["cpu", "cuda"] | None = None
    """Where (default: a GPU where there is one)."""
    checkpoint_every: Annotated[AboveZero, Flag(value="S")] = 60.0
    """Seconds between two states that are kept to go on from."""
    look_every: NotNegativeInt = 0
    """Steps between two looks at held-out media (default: at the end alone)."""

    def problems(self) -> list[SettingsProblem]:
        """Return what is not for this kind, and what it needs."""
        kinds = {"tokenizer": DECODERS, "vae": ("image-decoder",), "encoder": ("image-tokenizer",)}
        found = [SettingsProblem(ProblemCode.RULE, name, f"is for {' and '.join(of)}", getattr(self, name),
                                 f"leave it out for {self.kind}")
                 for name, of in kinds.items() if getattr(self, name) is not None and self.kind not in of]
        if self.kind in DECODERS and self.tokenizer is None:
            found.append(SettingsProblem(ProblemCode.MISSING, "tokenizer",
                                         f"is missing; {self.kind} decodes its ids",
                                         way_out="pass the folder of a tokenizer"))
        return found

    def all_changes(self) -> list[str]:
        """Return what is set, --steps and --seed first."""
        own = {"learning.steps": self.steps, "learning.seed": self.seed}
        return [*(f"{name}={value}" for name, value in own.items() if value is not None), *self.changes]


@dataclass(frozen=True, kw_only=True)
class CodecImportOptions(OverwriteOptions):
    """Write a published tokenizer's files as a codec; nothing in them is run."""

    kind: Annotated[Literal["ta-tok", "cosyvoice2", "nemo-audio", "nemo-asr"], Flag("KIND")]
    """One of ta-tok, cosyvoice2, nemo-audio, nemo-asr."""
    source: Annotated[Path, Flag("FILE_OR_DIR")]
    """What was downloaded."""
    output: Annotated[Path, Flag("DIR")]
    """Codec to write."""


@dataclass(frozen=True, kw_only=True)
class ReconstructOptions:
    """Write what a decoder makes of media's tokens."""

    codec: Annotated[Path, Flag("CODEC")]
    """Folder of a tokenizer."""
    files: Annotated[tuple[Path, ...], Flag("FILE")]
    """Pictures or sounds."""
    output: Annotated[Path, Flag(value="DIR")]
    """Folder to write files into."""
    decoder: Annotated[Path | None, Flag(value="CODEC")] = None
    """An image decoder or a vocoder (default: the tokenizer's own plain decoder)."""
    speaker: Annotated[str | None, Flag(value="NAME")] = None
    """Voice of the vocoder (default: its first)."""
    decoder_steps: AtLeastOne | None = None
    """Of the image decoder's sampler."""
    seed: int = 0
    """Of the image decoder's noise."""


@dataclass(frozen=True, kw_only=True)
class CodecInspectOptions:
    """Show a codec's kind, settings, size and figures."""

    codec: Annotated[Path, Flag("CODEC")]
    """Folder of a codec."""
    json: bool = False
    """Print as JSON."""


def _train(args: CodecTrainOptions) -> int:
    figures = (_train_decoder if args.kind in DECODERS else _train_tokenizer)(args)
    print(f"wrote codec {args.output}" + (f": held out, {_told(figures)}" if figures else ""))
    return ExitCode.OK


def _train_tokenizer(args: CodecTrainOptions) -> dict[str, float]:
    from megatron_sov.omni.codecs.training.tokenizers import settings_of, train_tokenizer

    settings = change(settings_of(args.kind, args.encoder), args.all_changes())
    return train_tokenizer(args.input, args.output, settings, encoder=args.encoder,
                           device=_device(args.device),
                           checkpoint_every_s=args.checkpoint_every, look_every=args.look_every,
                           overwrite=args.overwrite)


def _train_decoder(args: CodecTrainOptions) -> dict[str, float]:
    from megatron_sov.omni.codecs.training.decoders import SETTINGS, train_decoder

    assert args.tokenizer is not None, "its options are checked"
    return train_decoder(args.input, args.output, change(SETTINGS[args.kind], args.all_changes()),
                         args.tokenizer, vae=args.vae, device=_device(args.device),
                         checkpoint_every_s=args.checkpoint_every, look_every=args.look_every,
                         overwrite=args.overwrite)


def _device(asked: str | None) -> str:
    import torch

    if asked == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no GPU here; leave it out, or ask `megatron-sov doctor`")
    return asked or ("cuda" if torch.cuda.is_available() else "cpu")


def _told(figures: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in figures.items())


def _import(args: CodecImportOptions) -> int:
    from megatron_sov.omni.codecs.published import import_codec

    import_codec(args.kind, args.source, args.output, overwrite=args.overwrite)
    print(f"wrote codec {args.output}")
    return ExitCode.OK


def _reconstruct(args: ReconstructOptions) -> int:
    from megatron_sov.omni.codecs.training.tokenizers import Through, reconstruct

    through = Through(args.decoder, args.speaker, args.decoder_steps, args.seed)
    for file in reconstruct(args.codec, args.files, args.output, through):
        print(f"wrote {file}")
    return ExitCode.OK


def _inspect(args: CodecInspectOptions) -> int:
    from megatron_sov.omni.codecs.folder import inspected

    facts = inspected(args.codec)
    if args.json:
        print(to_json(facts), end="")
        return ExitCode.OK
    print(f"kind        {facts['codec']}\nparameters  {facts['num_parameters']:,}")
    for title, group in (("settings", facts["config"]), ("held out", facts["heldout"])):
        for name, value in group.items():
            text = f"{value:.4g}" if isinstance(value, float) else str(value)
            print(f"{title:<11} {name} = {text}")
    return ExitCode.OK


ACTIONS: Actions = {"train": (CodecTrainOptions, _train), "import": (CodecImportOptions, _import),
                    "reconstruct": (ReconstructOptions, _reconstruct),
                    "inspect": (CodecInspectOptions, _inspect)}
add_arguments = partial(add_actions, actions=ACTIONS)
run = partial(run_action, ACTIONS)
