"""Training codecs: what is drawn, what is kept, and that a killed training ends as one that was not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_sov.base.artifacts import read_manifest
from megatron_sov.base.errors import UserError
from megatron_sov.base.settings import plain
from megatron_sov.omni.codecs.folder import WEIGHTS, open_codec
from megatron_sov.omni.codecs.quantised import FSQSettings, SimVQSettings
from megatron_sov.omni.codecs.training.banks import PICTURES, SoundBank, media_files, picture_bank
from megatron_sov.omni.codecs.training.loop import CodecTrainingPlan, batch_rows, train
from megatron_sov.omni.codecs.training.tokenizers import (
    AudioTokenizerTask, AudioTokenizerTraining, ImageTokenizerTask, ImageTokenizerTraining, Learning)
from megatron_sov.runs.obs.events import EVENTS, read_events

LEARNING = Learning(steps=6, batch_size=4, warmup_steps=1, seed=3, crop_tokens=4)
SEEING = ImageTokenizerTraining(SimVQSettings(side_pixels=8, grid=2, width=16, num_layers=1, num_heads=2,
                                              code_width=4, codebook_size=16), LEARNING)
HEARING = AudioTokenizerTraining(FSQSettings(num_mels=8, width=8, num_blocks=1, levels=(3, 3)), LEARNING)


class Killed(BaseException):
    """The process ends here."""


def image_task(folder: Path) -> ImageTokenizerTask:
    rng = np.random.default_rng(0)
    shape = (3, 8, 8)
    bank = picture_bank(folder / "train.bin", [str(i) for i in range(10)], 8,
                        lambda name: rng.integers(0, 256, shape, dtype=np.uint8))
    return ImageTokenizerTask.create(SEEING, bank[2:], bank[:2])


def audio_task(folder: Path) -> AudioTokenizerTask:
    rng = np.random.default_rng(0)
    names = [str(length) for length in (100, 5000, 9000, 700)]
    bank = SoundBank(folder / "train.bin", names,
                     lambda name: rng.uniform(-1, 1, int(name)).astype(np.float32))
    return AudioTokenizerTask.create(HEARING, bank, bank)


def plan(output: Path, kind: str) -> CodecTrainingPlan:
    settings = SEEING if kind == "simvq" else HEARING
    return CodecTrainingPlan(kind, output, LEARNING.steps, plain(settings), checkpoint_every_s=0,
                             look_every=4)


@pytest.mark.parametrize(("kind", "make"), [("simvq", image_task), ("fsq", audio_task)])
def test_a_killed_training_goes_on_to_the_same_bits(tmp_path: Path, kind: str,
                                                    make: Callable[[Path], Any]) -> None:
    whole = train(plan(tmp_path / "whole", kind), make)

    def killed(folder: Path) -> Any:
        task = make(folder)
        learn = task.learn
        task.learn = lambda step: learn(step) if step < 4 else (_ for _ in ()).throw(Killed)
        return task

    with pytest.raises(Killed):
        train(plan(tmp_path / "parts", kind), killed)
    assert not (tmp_path / "parts").exists()
    kept = tmp_path / "parts.training" / "checkpoint"
    assert read_manifest(kept).content == {"step": 3}
    assert train(plan(tmp_path / "parts", kind), make) == whole
    assert not (tmp_path / "parts.training").exists()
    assert (tmp_path / "parts" / WEIGHTS).read_bytes() == (tmp_path / "whole" / WEIGHTS).read_bytes()
    told = [[{k: v for k, v in e.items() if k != "time_s"}
             for e in read_events(tmp_path / name / EVENTS)] for name in ("whole", "parts")]
    assert told[0] == told[1]
    assert [e["step"] for e in told[0] if e["event"] == "codec_step"] == [1, 2, 3, 4, 5, 6]
    assert {"loss", "perplexity"} <= told[0][0].keys()
    assert read_manifest(tmp_path / "whole").content["heldout"] == whole
    read = open_codec(tmp_path / "whole", kind=kind)
    assert read.settings == (SEEING if kind == "simvq" else HEARING).model


def test_training_lowers_the_loss(tmp_path: Path) -> None:
    task = image_task(tmp_path)
    losses = [task.learn(step)["loss"] for step in range(1, 30)]
    assert np.mean(losses[-5:]) < 0.8 * losses[0]


def test_a_training_is_not_continued_with_other_settings_or_by_two(tmp_path: Path) -> None:
    folder = tmp_path / "codec.training"
    folder.mkdir()
    (folder / "settings.json").write_text(json.dumps({**plain(SEEING), "learning": {}}))
    with pytest.raises(UserError, match=r"is a training with other settings \(learning\)"):
        train(plan(tmp_path / "codec", "simvq"), image_task)
    (folder / "settings.json").unlink()

    def second(folder: Path) -> Any:
        with pytest.raises(UserError, match="is being written by another"):
            train(plan(tmp_path / "codec", "simvq"), image_task)
        return image_task(folder)

    train(plan(tmp_path / "codec", "simvq"), second)
    with pytest.raises(UserError, match="already exists"):
        train(plan(tmp_path / "codec", "simvq"), image_task)


def test_what_was_kept_is_refused_where_it_is_damaged(tmp_path: Path) -> None:
    def killed(folder: Path) -> Any:
        task = image_task(folder)
        learn = task.learn
        task.learn = lambda step: learn(step) if step < 2 else (_ for _ in ()).throw(Killed)
        return task

    with pytest.raises(Killed):
        train(plan(tmp_path / "codec", "simvq"), killed)
    state = tmp_path / "codec.training" / "checkpoint" / "state.safetensors"
    state.write_bytes(state.read_bytes()[:-4] + b"abcd")
    with pytest.raises(UserError, match="its content differs from the hash in the manifest; delete"):
        train(plan(tmp_path / "codec", "simvq"), image_task)


def test_a_loss_that_is_no_number_ends_a_training(tmp_path: Path) -> None:
    def broken(folder: Path) -> Any:
        task = image_task(folder)
        learn = task.learn
        task.learn = lambda step: {**learn(step), "loss": float("nan")}
        return task

    with pytest.raises(UserError, match=r"the loss of step 1 is nan; lower learning\.learning_rate"):
        train(plan(tmp_path / "codec", "simvq"), broken)
    assert not (tmp_path / "codec").exists()


def test_every_row_comes_once_before_any_comes_again() -> None:
    rows = torch.cat([batch_rows(10, 4, 7, step) for step in range(1, 6)])
    assert sorted(rows[:10].tolist()) == sorted(rows[10:].tolist()) == list(range(10))
    assert rows[:10].tolist() != rows[10:].tolist()
    assert torch.equal(batch_rows(10, 4, 7, 3), rows[8:12])
    assert not torch.equal(batch_rows(10, 10, 8, 1), batch_rows(10, 10, 7, 1))


def test_files_are_split_by_name_and_lists_begin_at_their_folder(tmp_path: Path) -> None:
    for i in range(20):
        (tmp_path / "deep" / str(i % 2)).mkdir(parents=True, exist_ok=True)
        (tmp_path / "deep" / str(i % 2) / f"{i}.PNG").write_bytes(b"x" * i)
    (tmp_path / "deep" / "note.txt").write_text("no picture")
    files = media_files(tmp_path / "deep", PICTURES, 0.25)
    assert (len(files.train), len(files.heldout)) == (15, 5)
    assert not set(files.train) & set(files.heldout)
    listed = tmp_path / "list.txt"
    listed.write_text("".join(f"deep/{name}\n" for name in reversed(files.train)))
    again = media_files(listed, PICTURES, 0.0)
    assert (again.train, again.heldout) == (tuple(f"deep/{name}" for name in files.train), ())
    (tmp_path / "deep" / files.train[0]).write_bytes(b"another")
    assert media_files(tmp_path / "deep", PICTURES, 0.25).digest != files.digest


@pytest.mark.parametrize(("content", "said"), [
    (None, "is neither a folder nor a list of files"), (b"\xff\xfe\x00", "it is no text"),
    (b"", "names no file"),
    (b"a.png\n", r"list:1: 'a.png' is no file"), (b"\0\n", "is no file"), (b"x" * 5000, "is no file"),
    (b"../list\n", r"list:1: '../list' is no file; write paths as they are seen from"),
    (b"/etc/passwd\n", "is no file")])
def test_a_list_that_is_none_is_one_sentence(tmp_path: Path, content: bytes | None, said: str) -> None:
    if content is not None:
        (tmp_path / "list").write_bytes(content)
    with pytest.raises(UserError, match=said):
        media_files(tmp_path / "list", PICTURES, 0.1)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"has no file that ends with \.png"):
        media_files(tmp_path / "empty", PICTURES, 0.1)
