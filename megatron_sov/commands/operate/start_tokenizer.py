"""The tokenizer of the model that reinforcement learning starts from."""

from __future__ import annotations

from pathlib import Path

from megatron_sov.base.errors import UserError
from megatron_sov.engine.data.vocabulary import TOKENIZER_JSON


def refuse_no_tokenizer(start_from: Path, folder: Path) -> None:
    """Refuse a start without tokenizer.

    Args:
        start_from: what --from names.
        folder: where its tokenizer would lie.

    Raises:
        UserError: it has none.
    """
    if not (folder / TOKENIZER_JSON).is_file():
        raise UserError(f"--from {start_from}: has no tokenizer with it, and responses need one; start from "
                        "a checkpoint or Hugging Face folder that has one")
