"""`sov-data encode-media`: text, banks, resuming and cluster jobs."""

import json
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from data_prep.media import encode_media_run
from data_prep.media.encoder import MediaRecordEncoder
from data_prep.media.records import CHAT, TEXT, parse_record
from megatron_sov.base.artifacts import read_manifest
from megatron_sov.base.documents import BadRecord
from megatron_sov.base.errors import ExitCode
from megatron_sov.chat.media_tokens import AUDIO_PAD, IMAGE_PAD, VIDEO_PAD, parse_codebook_tokens
from megatron_sov.model.modality import PICTURES, SOUNDS
from megatron_sov.omni.media.banks import open_bank, read_bank_shapes
from megatron_sov.work.clusters import client
from megatron_sov.work.submit.arrays import WORK_FILE, Jobs
from tests.data_prep.media.chats import Encode, build_media_chat


def read_records(folder: Path) -> list[Any]:
    return [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]


def read_bank(folder: Path, kind: str) -> np.ndarray:
    """Return the records of PICTURES or SOUNDS that a corpus stores for encoders."""
    shapes = read_bank_shapes(read_manifest(folder).content["media"], "it")
    return open_bank(folder / f"{kind}.bin", shapes[kind])


def test_media_become_tokens_and_rows(encode: Encode, tmp_path: Path) -> None:
    assert encode([build_media_chat(("image", "light.png"), ("text", "What?")),
                   build_media_chat(("audio", "long.wav"), ("image", "dark.png"), ("image", "twin.png")),
                   build_media_chat(("video", "moving.gif"))]) == 0
    first, second, third = read_records(tmp_path / "corpus")
    user = first["messages"][0]["content"]
    assert parse_codebook_tokens("image", user) == [7] * 4
    assert user.count(IMAGE_PAD) == 3 and user.endswith("\nWhat?")
    assert first["media"] == {"pictures": [[0, 3]]}
    user = second["messages"][0]["content"]
    # 1.5 s are 15 codec tokens (0.5 * 7 rounds to 4), and two pieces of 1 s with 5 and 3 placeholders
    assert parse_codebook_tokens("audio", user) == [4] * 15 and user.count(AUDIO_PAD) == 5 + 3
    assert parse_codebook_tokens("image", user) == [0] * 4 + [7] * 4 and '"image_01"' in user
    # twin.png has the content of light.png and shares its record 0
    assert second["media"] == {"pictures": [[1, 3], [0, 3]], "sounds": [[0, 5], [1, 3]]}
    assert third["messages"][0]["content"].count(VIDEO_PAD) == 6  # 2 frames x 3 placeholders
    pictures = read_bank(tmp_path / "corpus", PICTURES)
    # light, dark, and the two frames of the animation (black, white)
    assert [int(p.max()) for p in pictures] == [255, 0, 0, 255] and pictures.shape[1:] == (3, 4, 4)
    content = read_manifest(tmp_path / "corpus", "media_corpus").content
    assert content["num_media"] == {"image": 3, "audio": 1, "video": 1} and content["format"] == "chat"
    assert content["codecs"]["image"]["codebook_size"] == 8


def test_spectrograms_equal_whisper(encode: Encode, tmp_path: Path, media: Path) -> None:
    from transformers import WhisperFeatureExtractor

    from megatron_sov.omni.media.reading.decoders import read_sound
    from megatron_sov.omni.media.reading.limits import MediaLimits

    assert encode([build_media_chat(("audio", "short.wav"))]) == 0
    samples, _ = read_sound(media / "short.wav", 16_000, MediaLimits())
    expected = WhisperFeatureExtractor(feature_size=8, chunk_length=1)(samples, sampling_rate=16_000)
    np.testing.assert_array_equal(read_bank(tmp_path / "corpus", SOUNDS),
                                  np.asarray(expected["input_features"], np.float16))


def test_assistant_pictures_become_calls_and_sounds_text(encode: Encode, tmp_path: Path) -> None:
    answer = [{"type": "text", "text": "Here:"}, {"type": "image", "path": "light.png"},
              {"type": "audio", "path": "short.wav"}]
    assert encode([build_media_chat(("text", "Draw."), answer=answer)]) == 0
    message = read_records(tmp_path / "corpus")[0]["messages"][1]
    assert message["content"] == "Here:\n<|discrete_audio_start|><|audio0007|><|discrete_audio_end|>"
    call = message["tool_calls"][0]["function"]
    assert call["name"] == "t2i_model_generation"
    assert parse_codebook_tokens("image", call["arguments"]["discrete_image_token"]) == [7] * 4
    assert read_records(tmp_path / "corpus")[0]["media"] == {}
    assert encode([build_media_chat(("text", "Draw."), answer=answer)], "--drawn", "content",
                  output="two") == 0
    message = read_records(tmp_path / "two")[0]["messages"][1]
    assert "tool_calls" not in message and parse_codebook_tokens("image", message["content"]) == [7] * 4


def test_killed_encoding_resumes_to_the_same_bytes(encode: Encode, tmp_path: Path,
                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encode_media_run, "RECORDS_PER_UNIT", 2)
    chats = [build_media_chat(("image", name))
             for name in ("light.png", "dark.png", "twin.png", "dark.png", "light.png")]
    assert encode(chats, output="whole") == 0
    encode_unit, calls = MediaRecordEncoder.encode, []

    def interrupt_second_call(self: MediaRecordEncoder, *arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return encode_unit(self, *arguments)

    monkeypatch.setattr(MediaRecordEncoder, "encode", interrupt_second_call)
    assert encode(chats) == ExitCode.INTERRUPTED
    assert not (tmp_path / "corpus").exists() and (tmp_path / ".corpus.work").is_dir()
    assert encode(chats) == 0 and len(calls) == 4  # two of three units were left, after two calls
    for name in ("records.jsonl", "pictures.bin", "bad_media.jsonl"):
        assert (tmp_path / "corpus" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert not (tmp_path / ".corpus.work").exists()


def test_bad_records_stop_or_are_listed(encode: Encode, tmp_path: Path,
                                        capsys: pytest.CaptureFixture[str]) -> None:
    chats: list[Any] = [build_media_chat(("image", "light.png")), build_media_chat(("image", "broken.png")),
                        build_media_chat(("image", "../records.jsonl")),
                        build_media_chat(("text", "<|IMAGE_PAD|>")), {"text": "a"},
                        build_media_chat(("text", "a"), answer=[{"type": "video", "path": "moving.gif"}])]
    assert encode(chats) == 2
    stderr = capsys.readouterr().err
    assert stderr.count("\n") == 1 and "records.jsonl:4: spells '<|IMAGE_PAD|>'" in stderr
    assert encode(chats[:2]) == 2
    assert "records.jsonl:2: broken.png is not a picture" in capsys.readouterr().err
    assert encode(chats, "--bad-media", "skip") == 0
    bad = [json.loads(line) for line in (tmp_path / "corpus/bad_media.jsonl").read_text().splitlines()]
    assert sorted((row["line"], row["code"]) for row in bad) == [
        (2, "no_picture"), (3, "outside"), (4, "mark"), (5, "fields"), (6, "answer")]
    assert read_manifest(tmp_path / "corpus").content["num_bad"]["outside"] == 1


@pytest.mark.parametrize(("options", "message"), [
    (("--continuous-pictures", "4"), "SIDE:SLOTS"),
    (("--continuous-sounds", "8:0:5"), "from 1 to 1024:600:65536"),
    (("--threads", "0"), "--threads 0"), (("--media-root", "/proc/nowhere"), "is no folder"),
    (("--input", "gone.jsonl"), 'gone.jsonl": does not exist'), (("--workers", "2"), "only for --cluster"),
    (("--max-duration", "nan"), "--max-duration"), (("--cluster", "no-such"), "no-such"),
    (("--max-pixels", "0"), "--max-pixels 0"), (("--video-frames", "0"), "--video-frames 0")])
def test_wrong_options_are_one_message(encode: Encode, tmp_path: Path, capsys: pytest.CaptureFixture[str],
                                       options: tuple[str, ...], message: str) -> None:
    assert encode([build_media_chat(("text", "a"))], *options) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "corpus").exists()


def parse_chat(record: Any) -> Any:
    return parse_record(json.dumps(record).encode())


def test_chats_and_documents_keep_fields() -> None:
    user_turn = {"role": "user", "name": "bo", "content": [{"type": "text", "text": "See"},
                                                           {"type": "image", "path": "a.png"}]}
    chat = parse_chat({"id": "a", "messages": [user_turn, {"role": "assistant", "content": "Ok"}]})
    assert (chat.kind, chat.fields) == (CHAT, {"id": "a"})
    assert chat.messages[0].fields == {"role": "user", "name": "bo"}
    assert [p.value for p in chat.iter_media()] == ["a.png"]
    assert [m.is_drawn for m in chat.messages] == [False, True]
    assert parse_chat({"content": [{"type": "video", "path": "v"}]}).kind == TEXT


@pytest.mark.each(("record", "reason"), [
    ([], "an object with either"),
    ({"messages": [], "content": "a"}, "either"),
    ({"messages": []}, "non-empty list"),
    ({"content": 3}, "must be a string or a list"), ({"content": []}, "must be a string or a list"),
    ({"content": "a", "media": {}}, "which this step writes"),
    ({"content": "see <|vision00003|>"}, "spells '<|vision00003|>'"),
    ({"messages": [{"role": "user", "content": "a", "reasoning_content": "<|IMAGE_PAD|>"}]}, "spells")])
def test_malformed_records_are_rejected(record: Any, reason: str) -> None:
    with pytest.raises(BadRecord) as error:
        parse_chat(record)
    assert reason in error.value.reason


def test_escaped_media_tokens_are_found() -> None:
    with pytest.raises(BadRecord, match="spells"):
        parse_record(b'{"content": "\\u003c|vision00003|\\u003e"}')
    with pytest.raises(BadRecord, match="not valid JSON"):
        parse_record(b"{" + b"[" * 100_000)


PROFILE = """description: jobs are recorded, not run
partition: cpu
account: lab
cpus_per_node: 8
gpus_per_node: 0
memory: 16G
"""


@pytest.fixture
def jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """The submitted jobs: (function, number of tasks, ids of the jobs to wait for, folder of logs)."""
    submitted: list[tuple[Any, ...]] = []

    def submit(script: Path, *, after: list[str]) -> str:
        submitted.append((*pickle.loads((script.parent / WORK_FILE).read_bytes()), after, script.parent))
        return str(100 + len(submitted))

    monkeypatch.setattr(client, "submit_script", submit)
    monkeypatch.setattr(client, "check_script", lambda text: None)
    monkeypatch.setattr(client, "run_slurm_program", lambda *words: SimpleNamespace(stdout=""))
    monkeypatch.setattr(client, "check_partition", lambda name: None)
    monkeypatch.setattr(client, "read_active_states", lambda numbers: {})
    monkeypatch.setattr(encode_media_run, "check_restarts", lambda *words: None)
    (tmp_path / "profile.yaml").write_text(PROFILE)
    return submitted


def test_cluster_jobs_write_the_same_bytes(encode: Encode, tmp_path: Path, jobs: list[tuple[Any, ...]],
                                           monkeypatch: pytest.MonkeyPatch,
                                           capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(encode_media_run, "RECORDS_PER_UNIT", 1)
    chats = [build_media_chat(("image", name)) for name in ("light.png", "dark.png", "twin.png")]
    assert encode(chats, output="local") == 0
    cluster = ("--cluster", str(tmp_path / "profile.yaml"), "--workers", "2")
    assert encode(chats, *cluster, output="remote") == 0
    assert "submitted encode 101, finish 102" in capsys.readouterr().out
    (run_task, num_tasks, dependencies, logs), (run_last, num_last_tasks, last_dependencies, _) = jobs
    assert (num_tasks, dependencies) == (2, []) and (num_last_tasks, last_dependencies) == (1, ["101"])
    assert "--gres" not in (logs / "job.sbatch").read_text()
    assert Jobs.read(tmp_path / ".remote.slurm").numbers == {"encode": "101", "finish": "102"}
    run_task(1)  # only the second of the two tasks runs
    jobs.clear()
    assert encode(chats, *cluster, output="remote") == 0  # a second start submits the incomplete work
    (run_task, num_tasks, _, _), (run_last, *_) = jobs
    assert num_tasks == 2
    for task in range(2):
        run_task(task)
    run_last(0)
    for name in ("records.jsonl", "pictures.bin"):
        assert (tmp_path / "remote" / name).read_bytes() == (tmp_path / "local" / name).read_bytes()
    assert not (tmp_path / ".remote.work").exists()
    assert encode(chats, *cluster, output="remote") == 0
    assert "complete from before" in capsys.readouterr().out
