"""A fine-tuned Hugging Face folder as teacher of the model it came from: both have the same tokenizer,
although `sov-tokenizer import` rewrites the file."""

import json
from pathlib import Path
from typing import Any

import pytest

from data_prep.cli import main as sov_data
from megatron_sov.base.digests import hash_file
from megatron_sov.convert import to_hf
from megatron_sov.rollouts.store import RolloutStore
from tests.typed_words import format_set_options
from tokenizer.cli import main as sov_tokenizer

SETTINGS = ("model.hidden_size=48", "rollout.rounds=1", "rollout.prompts_per_round=2",
            "rollout.samples_per_prompt=2", "rollout.max_new_tokens=4", "rollout.max_prompt_tokens=24",
            "train.eval_every_steps=0", 'data.phases=[{"name": "main", "seq_len": 32}]')


@pytest.fixture(scope="module")
def folder(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with `base`, a Hugging Face folder whose tokenizer.json is laid out as transformers
    does, and chats in its tokens."""
    folder = tmp_path_factory.mktemp("one-tokenizer")
    to_hf(teacher / "checkpoints/step-2", folder / "base", "float32")
    (folder / "base/manifest.json").unlink()
    for name, more in (("generation_config.json", {"temperature": 0.6, "pad_token_id": 3}),
                       ("tokenizer_config.json", {"unk_token": "<unk>", "model_max_length": 512})):
        file = folder / "base" / name
        file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")) | more))
    file = folder / "base/tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")), indent=2))
    (folder / "chats.jsonl").write_text("".join(json.dumps({"messages": [
        {"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": f"{i}!"}]}) + "\n"
        for i in range(8)))
    (folder / "prompts.jsonl").write_text("".join(f'{{"prompt": "{i}?"}}\n' for i in range(4)))
    assert sov_tokenizer(["import", str(folder / "base"), "--output", str(folder / "tokenizer")]) == 0
    assert sov_data(["pack", "--tokenizer", str(folder / "tokenizer"), "--format", "chat", "--input",
                     str(folder / "chats.jsonl"), "--output", str(folder / "chats")]) == 0
    return folder


@pytest.fixture(scope="module")
def sft_run(folder: Path, tiny: list[str], run_checked: Any) -> Path:
    """Return a run that fine-tuned the folder `base`."""
    run_checked("sft", "tiny-solar-open", *tiny,
                *format_set_options(["train.steps=1", "model.hidden_size=48"]),
                "--from", str(folder / "base"), "--data", str(folder / "chats"), "--run",
                str(folder / "sft"))
    return folder / "sft"


@pytest.mark.deep
def test_a_fine_tuned_folder_teaches_that_folder_and_uses_its_store(
        folder: Path, sft_run: Path, tiny: list[str], run_checked: Any) -> None:
    store, parts = folder / "store", []
    for start, run, more in (
            (folder / "base", "opd", ("policy.method=opd", "none", "--teacher", str(sft_run))),
            (sft_run, "grpo", ("policy.method=grpo", "repetition"))):
        method, reward, *teacher = more
        run_checked("rl", "run", "tiny-solar-open", *tiny, *format_set_options([*SETTINGS, method]),
                    "--prompts", str(folder / "prompts.jsonl"), "--reward", reward, "--plain", "--from",
                    str(start), *teacher, "--run", str(folder / run), "--store", str(store))
        parts.append([part.name for part in RolloutStore.open(store).parts()])
    assert parts[0] == parts[1] != [], "the second run trains on the responses of the first"
    assert len(list((folder / ".from-hf").glob("base-*"))) == 1, "both runs share the conversion"
    base_file = folder / "base/tokenizer.json"
    trained_file = sft_run / "checkpoints/step-1/tokenizer/tokenizer.json"
    assert hash_file(base_file) != hash_file(trained_file), "the files differ, the tokenizer does not"


def test_an_export_has_the_generation_and_tokenizer_settings_of_its_base(folder: Path, sft_run: Path) -> None:
    """Also settings that `sov-tokenizer import` does not copy."""
    to_hf(sft_run, folder / "export")
    for name in ("generation_config.json", "tokenizer_config.json"):
        exported = json.loads((folder / "export" / name).read_text(encoding="utf-8"))
        assert exported == json.loads((folder / "base" / name).read_text(encoding="utf-8")), name
