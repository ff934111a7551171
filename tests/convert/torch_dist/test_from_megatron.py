"""What the library's own writer wrote is read, and computes the same in transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_sov import convert
from megatron_sov.artifacts import read_manifest
from megatron_sov.cli import main

WRITTEN = str(Path(__file__).with_name("library_written.py"))
CASES: dict[str, tuple[str, dict[str, Any], dict[str, bool]]] = {
    "layers stacked, TP2": ("llama", {"tp": 2}, {"non_homogeneous_layers": False}),
    "a name per layer, PP2": ("qwen3", {"pp": 2}, {"non_homogeneous_layers": True}),
    "experts, layers stacked, EP2": ("mixtral", {"ep": 2}, {"non_homogeneous_layers": False}),
    "halves and experts by name, EP2": ("solar_open", {"ep": 2}, {"singleton_local_shards": True}),
}


def logits(folder: Path) -> torch.Tensor:
    """Return transformers' logits of the text that the library's were taken on."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32,
                                                 experts_implementation="eager").eval()
    ids = torch.randint(120, (2, 24), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        found: torch.Tensor = model(ids).logits
    return found


@pytest.mark.distributed
def test_what_the_library_wrote_computes_the_same_in_transformers(ranks: Any, job: Any,
                                                                 tmp_path: Path) -> None:
    asked = [job(WRITTEN, "written", 2, {"out": str(tmp_path / case), "name": name, "layout": layout,
                                         "metadata": metadata})
             for case, (name, layout, metadata) in CASES.items()]
    for (case, (name, _, _)), result in zip(CASES.items(), ranks(*asked), strict=True):
        out = tmp_path / f"{case}-ours"
        assert main(["convert", "from-megatron", str(tmp_path / case), str(out)]) == 0, case
        manifest = read_manifest(out, "checkpoint")
        assert manifest.settings["model"]["family"] == name, case
        assert manifest.content["from_megatron"]["iteration"] == 12
        convert.to_hf(out, tmp_path / f"{case}-hf")
        expected = torch.tensor(result[0]).view(2, 24, -1)[..., :120]
        found = logits(tmp_path / f"{case}-hf")
        assert expected.abs().max() > 1, case
        assert (found - expected).abs().max() < 2e-5 * expected.abs().max(), case
