"""docs/omni.md with tiny codecs and few steps: from media files to an evaluated model."""

import json
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from PIL import Image

from data_prep.cli import main as sov_data
from megatron_sov.cli import main as megatron_sov
from tests.omni import hf_folders
from tests.pages_typed import blocks, list_commands, page_text
from tests.run_files import read_run_events
from tokenizer.cli import main as sov_tokenizer

PAGE = page_text("omni.md").partition("\n## Media records and codecs\n")[0]
MAINS = {"megatron-sov": megatron_sov, "sov-data": sov_data, "sov-tokenizer": sov_tokenizer}
FEWER = {
    "pretrain": "--set train.steps=2 --set train.global_batch_size=2 --set train.micro_batch_size=2",
    "sft": "--set train.steps=4 --set train.global_batch_size=4 --set train.micro_batch_size=4",
    "generate": "--max-new-tokens 30", "eval": "--max-new-tokens 30", "pack": "--workers 1",
    "encode-media": "--threads 1",
}
"""Word of a command after its program -> arguments that reduce its size."""


def write_media(root: Path) -> None:
    """Write media files, their records, texts, questions and judges, as on the page."""
    random = np.random.default_rng(0)
    for kind in ("pictures", "sounds"):
        (root / "media" / kind).mkdir(parents=True)
    for name in ("7", "9"):
        picture = Image.fromarray(random.integers(256, size=(16, 16, 3), dtype=np.uint8))
        picture.save(root / f"media/pictures/{name}.png")
        soundfile.write(root / f"media/sounds/{name}.wav", random.uniform(-0.5, 0.5, 8000), 16_000)
    picture.save(root / "seven.png")
    soundfile.write(root / "word.wav", random.uniform(-0.5, 0.5, 4000), 16_000)
    spoken = json.loads(next(block for block in blocks(PAGE, "text") if block.startswith('{"messages"')))
    drawn = {"messages": [{"role": "user", "content": [{"type": "image", "path": "pictures/7.png"}]},
                          {"role": "assistant", "content": [{"type": "image", "path": "pictures/9.png"}]}]}
    rows = {"records": [spoken, drawn], "text": [{"text": f"Text {n} beside media. " * 8} for n in range(9)],
            "asked": [{"content": drawn["messages"][0]["content"], "answer": a} for a in ("seven", "nine")],
            "said": [{"content": [{"type": "text", "text": "Say seven."}], "answer": "seven"}]}
    for name, of in rows.items():
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in of))
    (root / "judges.py").write_text("def sounds(files, labels):\n    return ['seven' for _ in files]\n")


@pytest.mark.deep
def test_the_page_leads_from_media_to_a_model_that_is_judged(
        packed_data: Any, one_rank: None, cwd: Path) -> None:
    write_media(cwd)
    Path("text-tokenizer").symlink_to(packed_data.tokenizer)
    hf_folders.save_network("vqmodel", Path("vqmodel-hf"), lambda: hf_folders.build_vqmodel(256))
    hf_folders.save_network("dac", Path("dac-hf"))
    for line in list_commands(PAGE):
        program, *words = shlex.split(line)
        words += shlex.split(next((FEWER[word] for word in words[:3] if word in FEWER), ""))
        assert MAINS[program](words) == 0, line
    run = Path("runs/omni-sft")
    steps = read_run_events(run, "step")
    # the recipe's fine-tuning reads plain text in addition to conversations
    assert any(event["losses"].get("text", 0) > 0 for event in steps) and len(steps) == 4
    assert {event["pair"] for event in read_run_events(run, "media")} == {"image-text", "text-audio"}
