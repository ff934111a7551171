"""The same questions to a Hugging Face folder, answered by transformers: continuations and most probable tokens."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from megatron_sov.errors import UserError
from megatron_sov.generate.documents import ROW_TOKENS, rows_of


def load_hf(folder: Path, dtype: str | torch.dtype = "auto") -> Any:
    """Return transformers' model in evaluation mode, on the GPU if there is one; code files in the folder are not run.

    Raises:
        UserError: transformers cannot load the folder.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True, use_safetensors=True)
    except (RuntimeError, ValueError, OSError) as e:
        raise UserError(f"{folder}: transformers cannot load it ({str(e).strip().splitlines()[0]}); save it again") from None
    model.generation_config = GenerationConfig()  # the folder's own defaults would answer for what a caller left open
    return model.eval().to(device)


@torch.no_grad()
def generate_hf(model: Any, prompts: Sequence[Sequence[int]], max_new_tokens: int, *, temperature: float = 0.0,
                top_p: float = 1.0, seed: int = 0, eos_id: int | None = None) -> list[list[int]]:
    """Continue prompts one at a time; arguments and result as in `sampling.generate`.

    Greedy continuations are the same; samples follow the same distribution with other random numbers.
    """
    sampling = {"temperature": temperature, "top_p": top_p, "top_k": 0} if temperature else {}
    pad_id = 0 if eos_id is None else eos_id
    torch.manual_seed(seed)
    continuations = []
    for prompt in prompts:
        ids = torch.tensor([list(prompt)], device=model.device)
        found = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new_tokens,
                               eos_token_id=eos_id, pad_token_id=pad_id,
                               do_sample=bool(temperature), **sampling)
        continuations.append(found[0, len(prompt):].tolist())
    return continuations


@torch.no_grad()
def next_tokens_hf(model: Any, documents: Sequence[Sequence[int]], last: int = 1) -> torch.Tensor:
    """Return [documents, last] int64, as `documents.next_tokens` does; neighbours of equal length share a batch."""
    found = []
    for _, group in groupby(documents, key=len):
        same = list(group)
        for row in rows_of([len(d) for d in same], ROW_TOKENS):
            ids = torch.tensor([list(same[i]) for i in row], device=model.device)
            found.append(model(input_ids=ids, logits_to_keep=last, use_cache=False).logits.argmax(dim=-1).cpu())
    return torch.cat(found)
