"""`megatron-sov codec import | reconstruct | inspect`: tokenizers and decoders of media."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

from megatron_sov.base.artifacts import format_json
from megatron_sov.base.errors import ExitCode
from megatron_sov.base.settings import (
    Actions, AtLeastOne, Flag, ProblemCode, SettingsProblem, add_actions, run_action)
from megatron_sov.commands.shared_options import OverwriteOptions

OWN_OPTIONS = {"codebooks": ("num_codebooks", ("mimi", "dac")),
               "side_pixels": ("side_pixels", ("vqmodel",))}
"""Option -> argument of a codec's `of_folder`, and the kinds that take it."""


@dataclass(frozen=True, kw_only=True)
class CodecImportOptions(OverwriteOptions):
    """Write a published codec's files as a codec; nothing in them is run."""

    kind: Annotated[Literal["vqmodel", "janus-vq", "mimi", "dac", "ta-tok", "cosyvoice2"], Flag("KIND")]
    """One of vqmodel, janus-vq, mimi, dac, ta-tok, cosyvoice2."""
    source: Annotated[Path, Flag("FILE_OR_DIR")]
    """What was downloaded."""
    output: Annotated[Path, Flag("DIR")]
    """Codec to write."""
    codebooks: AtLeastOne | None = None
    """Codebooks of a frame of mimi or dac, each a token (default: 1)."""
    side_pixels: AtLeastOne | None = None
    """Height and width of pictures of vqmodel (default: as config.json says)."""

    def problems(self) -> list[SettingsProblem]:
        """Return options of other kinds."""
        return [SettingsProblem(ProblemCode.RULE, name, f"is for {' and '.join(kinds)}", getattr(self, name),
                                f"leave it out for {self.kind}")
                for name, (_, kinds) in OWN_OPTIONS.items()
                if getattr(self, name) is not None and self.kind not in kinds]


@dataclass(frozen=True, kw_only=True)
class ReconstructOptions:
    """Write media as a codec gives them back."""

    codec: Annotated[Path, Flag("CODEC")]
    """Folder of a codec that decodes."""
    files: Annotated[tuple[Path, ...], Flag("FILE")]
    """Pictures or sounds."""
    output: Annotated[Path, Flag(value="DIR")]
    """Folder to write files into."""


@dataclass(frozen=True, kw_only=True)
class CodecInspectOptions:
    """Show a codec's kind, settings, size and figures."""

    codec: Annotated[Path, Flag("CODEC")]
    """Folder of a codec."""
    json: bool = False
    """Print as JSON."""


def _import(args: CodecImportOptions) -> int:
    from megatron_sov.omni.codecs.published import import_codec

    given = {argument: value for name, (argument, _) in OWN_OPTIONS.items()
             if (value := getattr(args, name)) is not None}
    import_codec(args.kind, args.source, args.output, overwrite=args.overwrite, **given)
    print(f"wrote codec {args.output}")
    return ExitCode.OK


def _reconstruct(args: ReconstructOptions) -> int:
    from megatron_sov.omni.generation.reconstruction import reconstruct

    for file in reconstruct(args.codec, args.files, args.output):
        print(f"wrote {file}")
    return ExitCode.OK


def _inspect(args: CodecInspectOptions) -> int:
    from megatron_sov.omni.codecs.folder import inspected

    facts = inspected(args.codec)
    if args.json:
        print(format_json(facts), end="")
        return ExitCode.OK
    print(f"kind        {facts['codec']}\nparameters  {facts['num_parameters']:,}")
    for name, value in facts["config"].items():
        print(f"settings    {name} = {value}")
    return ExitCode.OK


ACTIONS: Actions = {"import": (CodecImportOptions, _import), "inspect": (CodecInspectOptions, _inspect),
                    "reconstruct": (ReconstructOptions, _reconstruct)}
add_arguments = partial(add_actions, actions=ACTIONS)
run = partial(run_action, ACTIONS)
