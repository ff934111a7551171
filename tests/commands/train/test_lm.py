"""`megatron-sov pretrain`: every mistake is one message and exit code 2, and writes no file."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.run_files import read_run_events
from tests.typed_words import format_set_options

SMALL = ("model.vocab_size=368", "model.hidden_size=32", "model.num_layers=2", "model.expert_ffn_dim=16",
         "model.num_experts=4", 'data.phases=[{"name": "main", "seq_len": 32}]', "train.steps=2")
Refuse = Callable[..., str]


@pytest.fixture
def refuse(get_refusal: Any) -> Refuse:
    """Return `refuse(data, run, *arguments)`: the message of a command that must change no file."""
    def run(data: list[Path | str], folder: Path, *arguments: str, settings: tuple[str, ...] = ()) -> str:
        shards = [part for d in data for part in ("--data", str(d))]
        before = sorted(folder.parent.rglob("*"))
        refusal: str = get_refusal("pretrain", "tiny-solar-open", *shards, "--run", str(folder), *arguments,
                                   *format_set_options((*SMALL, *settings)))
        assert refusal.startswith("error: ") and sorted(folder.parent.rglob("*")) == before
        return refusal

    return run


def test_missing_and_wrong_data(refuse: Refuse, packed_data: Any, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert "--data none: does not exist" in refuse(["none"], run)
    assert "has no manifest.json, so it is not a 'tokens' artifact" in refuse([tmp_path], run)
    assert "tokenizer: is a tokenizer; pass token shards" in refuse([packed_data.tokenizer], run)
    assert ("its tokenizer has 368 ids, the model only model.vocab_size = 100"
            in refuse([packed_data.text], run, settings=("model.vocab_size=100",)))


def test_impossible_layouts_list_every_problem(refuse: Refuse, packed_data: Any, tmp_path: Path) -> None:
    data, run = [packed_data.text], tmp_path / "run"
    message = refuse(data, run, "--nproc", "12",
                     settings=("parallel.tp=3", "parallel.ep=5", "parallel.pp=4"))
    for problem in ("parallel.tp = 3 must divide model.num_heads = 4",
                    "parallel.ep = 5 must divide model.num_experts = 4",
                    "parallel.pp = 4 must divide model.num_layers = 2",
                    "etp 1 x ep 5 x pp 4 = 20 must divide the number of"):
        assert problem in message
    assert ("global_batch_size = 16 (phase main) must be a multiple of train.micro_batch_size 8 x data "
            "parallel size 3" in refuse(data, run, "--nproc", "3"))
    assert "--nproc 0: must be at least 1" in refuse(data, run, "--nproc", "0")


def test_folders_that_hold_something_else(refuse: Refuse, packed_data: Any, tmp_path: Path) -> None:
    data, notes, full = [packed_data.text], tmp_path / "notes", tmp_path / "full"
    notes.write_text("mine")
    assert "notes: is a file; --run needs a folder" in refuse(data, notes)
    assert "notes is a file, so nothing can lie in it" in refuse(data, notes / "run")
    full.mkdir()
    (full / "thesis.txt").write_text("mine")
    assert "is not empty and holds no run" in refuse(data, full, "--resume")


def test_weights_to_start_from_must_fit(refuse: Refuse, token_shards: Path, imported: Any,
                                        tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert ("is a exaone_moe model, recipe tiny-solar-open is for solar_open"
            in refuse([token_shards], run, "--from", str(imported["exaone_moe"]),
                      settings=("model.vocab_size=1024",)))
    assert "--from none: does not exist" in refuse([token_shards], run, "--from", "none")
    assert ("is a folder of token shards, not a checkpoint"
            in refuse([token_shards], run, "--from", str(token_shards)))


SMALL_CHATS = ("train.steps=2", 'data.phases=[{"name": "main", "seq_len": 64}]', "train.global_batch_size=4",
               "train.micro_batch_size=2", "data.heldout_tokens=128", "train.num_threads=1", "optim.lr=0.004")
MODEL = ("model.vocab_size=368", "model.hidden_size=32", "model.num_layers=2", "model.expert_ffn_dim=16",
         "model.num_experts=4")


def build_command(name: str, data: list[Path], run: Path, *arguments: str,
                  settings: tuple[str, ...]) -> list[str]:
    shards = [part for d in data for part in ("--data", str(d))]
    chosen = format_set_options((*SMALL_CHATS, *settings))
    return [name, "tiny-solar-open", *shards, "--run", str(run), *arguments, *chosen]


@pytest.mark.essential
def test_a_run_becomes_a_chat_model(packed_data: Any, tmp_path: Path, run_checked: Any,
                                    get_refusal: Any) -> None:
    base, tuned = tmp_path / "base", tmp_path / "tuned"
    run_checked(*build_command("pretrain", [packed_data.text], base, settings=MODEL))
    chats_and_text = [packed_data.chats, packed_data.text]
    result = run_checked(*build_command("sft", chats_and_text, tuned, "--from", str(base), "--nproc", "2",
                                        settings=("objective.text_coeff=0.3",)))
    assert "Warning" not in result.stderr
    steps = read_run_events(tuned, "step")
    assert len(steps) == 2 and set(steps[0]["losses"]) == {"response", "text"}
    assert json.loads((tuned / "config.json").read_text())["objective"] == {
        "name": "sft", "text_coeff": 0.3, "loss_per": "token", "options": {},
        "audio_weight": 1.0, "image_weight": 1.0}
    assert json.loads((tuned / "complete.json").read_text())["step"] == 2

    def run_refused_command(data: list[Path], *settings: str) -> Any:
        refusal = get_refusal(*build_command("sft", data, tmp_path / "no", "--from", str(base),
                                             settings=settings))
        assert not (tmp_path / "no").exists()
        return refusal

    assert "--set objective.text_coeff=0.1" in run_refused_command(chats_and_text).splitlines()[-1]
    assert "contains conversations; pack some with `sov-data pack" in run_refused_command([packed_data.text])
    assert "use `megatron-sov pretrain`" in run_refused_command([packed_data.chats], "objective.name=lm")
    assert "required: --from" in get_refusal("sft", "tiny-solar-open", "--data", str(packed_data.chats),
                                             "--run", str(tmp_path / "no"))
