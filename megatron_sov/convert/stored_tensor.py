"""One tensor of a Hugging Face folder, however its files store it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from megatron_sov.mcore.checkpoint.safetensors_file import TensorFile


class StoredTensor(Protocol):
    """What conversion asks of a tensor."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the shape of what is read."""

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype of what is read."""

    @property
    def files(self) -> set[str]:
        """Return the names of the files that hold a part of it."""

    @property
    def parts(self) -> tuple[str, ...]:
        """Return the names of what is stored of it."""

    def read(self) -> torch.Tensor:
        """Return the tensor; `UserError` where a file is damaged."""


@dataclass(frozen=True)
class FileTensor:
    """A tensor that a file holds as it is."""

    file: TensorFile
    """The file."""
    name: str
    """Its name there."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Return its shape."""
        return self.file.entries[self.name].shape

    @property
    def dtype(self) -> torch.dtype:
        """Return its dtype."""
        return self.file.dtype(self.name)

    @property
    def files(self) -> set[str]:
        """Return the file's name."""
        return {self.file.path.name}

    @property
    def parts(self) -> tuple[str, ...]:
        """Return its name."""
        return (self.name,)

    def read(self) -> torch.Tensor:
        """Return the tensor; `UserError` where the file is damaged."""
        return self.file.read(self.name)
