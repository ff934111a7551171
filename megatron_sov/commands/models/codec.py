"""`megatron-sov codec import | reconstruct`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from megatron_sov.base.settings import (
    ActionGroup, AtLeastOne, DeclaredCommand, Flag, ProblemCode, SettingsProblem)
from megatron_sov.commands.shared_options import OverwriteOptions

KIND_OPTIONS = {"codebooks": ("num_codebooks", ("mimi", "dac")), "side_pixels": ("side_pixels", ("vqmodel",))}
"""Option -> argument of `import_codec`, and the codec kinds with the argument."""
RUN = "megatron_sov.commands.models.codec_run"


@dataclass(frozen=True, kw_only=True)
class CodecImportOptions(OverwriteOptions):
    """Convert a published codec; code in the files is not executed."""

    kind: Annotated[Literal["vqmodel", "mimi", "dac", "ta-tok", "cosyvoice2"], Flag("KIND")]
    """Kind: vqmodel, mimi, dac, ta-tok or cosyvoice2."""
    source: Annotated[Path, Flag("FILE_OR_DIR")]
    """Downloaded file or folder."""
    output: Annotated[Path, Flag("DIR")]
    """Codec to write."""
    codebooks: AtLeastOne | None = None
    """Codebooks per frame for mimi or dac; a codebook adds a token per frame (default: 1)."""
    side_pixels: AtLeastOne | None = None
    """Picture height and width for vqmodel (default: from config.json)."""

    def problems(self) -> list[SettingsProblem]:
        return [SettingsProblem(ProblemCode.RULE, name, f"is for {' and '.join(kinds)}", getattr(self, name),
                                f"leave it out for {self.kind}")
                for name, (_, kinds) in KIND_OPTIONS.items()
                if getattr(self, name) is not None and self.kind not in kinds]


@dataclass(frozen=True, kw_only=True)
class ReconstructOptions:
    """Encode and decode media files with a codec."""

    codec: Annotated[Path, Flag("CODEC")]
    """Folder of a codec with a decoder."""
    files: Annotated[tuple[Path, ...], Flag("FILE")]
    """Pictures or sounds."""
    output: Annotated[Path, Flag(value="DIR")]
    """Folder to write files into."""


CODEC = ActionGroup({
    "import": DeclaredCommand(CodecImportOptions, run_function=f"{RUN}:import_files"),
    "reconstruct": DeclaredCommand(ReconstructOptions, run_function=f"{RUN}:reconstruct_files")})
