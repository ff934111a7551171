"""`megatron-sov codec import | reconstruct | inspect`."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

from megatron_sov.base.settings import (
    Actions, AtLeastOne, DeclaredCommand, Flag, ProblemCode, SettingsProblem, add_actions, run_action)
from megatron_sov.commands.shared_options import OverwriteOptions

OWN_OPTIONS = {"codebooks": ("num_codebooks", ("mimi", "dac")),
               "side_pixels": ("side_pixels", ("vqmodel",))}
"""Option of `codec import` -> argument of `import_codec`, and codec kinds with this argument."""


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


RUN = "megatron_sov.commands.models.codec_run"
ACTIONS: Actions = {
    "import": DeclaredCommand(CodecImportOptions, run_function=f"{RUN}:import_files"),
    "inspect": DeclaredCommand(CodecInspectOptions, run_function=f"{RUN}:inspect_codec"),
    "reconstruct": DeclaredCommand(ReconstructOptions, run_function=f"{RUN}:reconstruct_files")}
add_arguments = partial(add_actions, actions=ACTIONS)
run = partial(run_action, ACTIONS)
