"""The interface to images and audio: text works without the `omni` part, and other data reports it as
missing."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_sov import recipes
from megatron_sov.model import modality as seam
from megatron_sov.train.data.sources import open_sources

ROOT = Path(__file__).parents[2]


def test_data_of_text_need_no_encoder(packed_data: Any) -> None:
    model = recipes.get("tiny-qwen3").model
    sources = open_sources({str(packed_data.text): 1.0}, model.vocab_size)
    seam.check_encoders(model, sources)
    documents = sources[0].open_split("train")
    assert len(documents.tokens(0, 0, 3)) == 3 and seam.get_encoder_inputs(documents, 0, 0, 3) == {}
    assert not model.is_multimodal


PROGRAM = """
import sys
import {modules}
print([name for name in sys.modules if name.startswith(("megatron_sov.omni", "data_prep.media"))])
"""
CORE = ("megatron_sov.convert", "megatron_sov.train.trainer", "megatron_sov.infer.decoder.generator",
        "megatron_sov.post.reference", "megatron_sov.eval.heldout_loss",
        "megatron_sov.commands.models.generate_run", "megatron_sov.commands.evaluate.eval_run",
        "data_prep.shards.pack_run", "data_prep.shards.verify")


@pytest.mark.deep
def test_core_imports_no_omni_module() -> None:
    """test_architecture.py also checks imports at module level."""
    program = PROGRAM.format(modules=", ".join(CORE))
    completed = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True,
                               check=False, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert (completed.returncode, completed.stdout) == (0, "[]\n"), completed.stderr
