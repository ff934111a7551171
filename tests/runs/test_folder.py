"""Run folders: refused starts, and read-only checks."""

import dataclasses
import json
from pathlib import Path

import pytest

from megatron_sov import recipes
from megatron_sov.base.errors import UserError
from megatron_sov.base.plugins.loading import PluginCode
from megatron_sov.model.config import RunConfig, apply_settings
from megatron_sov.runs.folder import COMPLETION, CONFIG, RunEvents, RunFolder
from megatron_sov.runs.launch_environment import COMMAND_VARIABLE
from megatron_sov.runs.obs.events import EVENTS, EventLog, read_events

CONFIG_OF_RUN = recipes.get("tiny-solar-open")


def start_run(path: Path, build_lora_config: RunConfig = CONFIG_OF_RUN) -> RunFolder:
    folder = RunFolder(path)
    folder.create()
    folder.declare(build_lora_config)
    return folder


def test_enter_accepts_new_folder_without_creating_files(tmp_path: Path) -> None:
    for resume in (False, True):
        RunFolder(tmp_path / "new").enter(CONFIG_OF_RUN, resume)
    assert list(tmp_path.iterdir()) == []


def test_enter_accepts_files_of_killed_start(tmp_path: Path) -> None:
    (tmp_path / "lock.json").write_text("{}")
    (tmp_path / ".config.json.tmp-123").write_text("{")
    (tmp_path / "reference").mkdir()  # of a run that was refused before its first step
    RunFolder(tmp_path).enter(CONFIG_OF_RUN, resume=False)


def test_enter_rejects_foreign_folders_and_files(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="empty and holds"):
        RunFolder(tmp_path).enter(CONFIG_OF_RUN, resume=True)
    with pytest.raises(UserError, match="--run needs a folder"):
        RunFolder(tmp_path / "notes.txt").enter(CONFIG_OF_RUN, resume=False)
    with pytest.raises(UserError, match="--run /proc/x: nothing can"):
        RunFolder(Path("/proc/x")).enter(CONFIG_OF_RUN, resume=False)


def test_existing_run_requires_resume(tmp_path: Path) -> None:
    folder = start_run(tmp_path / "run")
    assert folder.config() == CONFIG_OF_RUN
    with pytest.raises(UserError, match="tiny-solar-open; pass --resume"):
        folder.enter(CONFIG_OF_RUN, resume=False)
    folder.enter(CONFIG_OF_RUN, resume=True)


def test_start_records_previous_settings_and_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(COMMAND_VARIABLE, json.dumps(["pretrain", "tiny-solar-open"]))
    folder = start_run(tmp_path / "run")
    EventLog(folder.path / EVENTS).close()
    folder.declare(CONFIG_OF_RUN, 3)
    assert list(read_events(folder.path / EVENTS)) == [], "nothing has changed"

    changed_config = apply_settings(CONFIG_OF_RUN, ["train.steps=9", "parallel.tp=2", "obs.wandb=true"])
    monkeypatch.setenv(COMMAND_VARIABLE, json.dumps(["resume", "run"]))
    folder.declare(changed_config, 4)
    [event] = read_events(folder.path / EVENTS)
    assert (event["step"], event["was"]) == (4, {
        "train.steps": [CONFIG_OF_RUN.train.steps, 9], "parallel.tp": [1, 2]}), "how it is watched counts not"
    assert event["command"]["words"] == ["pretrain", "tiny-solar-open"]
    assert "parallel.tp was 1, is 2" in event["text"]


@pytest.mark.each("setting", ["model.num_layers=2", "optim.lr=0.1", "train.seed=7",
                                     "train.precision=bf16", "data.packing=concat"])
def test_resume_rejects_changed_fixed_settings(tmp_path: Path, setting: str) -> None:
    folder = start_run(tmp_path / "run")
    name, _, value = setting.partition("=")
    with pytest.raises(UserError, match=rf"was started with {name} = .*, now it is {value}"):
        folder.enter(apply_settings(CONFIG_OF_RUN, [setting]), resume=True)


def test_resume_accepts_run_of_earlier_defaults(tmp_path: Path) -> None:
    old_config = apply_settings(CONFIG_OF_RUN, ["preference.beta=0.1", "policy.correction=none"])
    folder = start_run(tmp_path / "run", old_config)
    folder.enter(CONFIG_OF_RUN, resume=True)
    with pytest.raises(UserError, match=r"preference.beta = 0.1, now"):
        folder.enter(apply_settings(CONFIG_OF_RUN, ["preference.beta=0.2"]), resume=True)


def test_error_lists_all_changed_settings(tmp_path: Path) -> None:
    folder = start_run(tmp_path / "run")
    with pytest.raises(UserError, match=r"optim.lr = (.*), now .*; optim.min_lr = (.*), now .*; train.seed = "
                                        r"1234, now it is 1; a resumed run keeps this \(--set optim.lr=\1 "
                                        r"--set optim.min_lr=\2 --set train.seed=1234\), and"):
        folder.enter(apply_settings(CONFIG_OF_RUN, ["optim.lr=0.01", "train.seed=1"]), resume=True)


@pytest.mark.each("setting",
                         ["parallel.ep=2", "train.micro_batch_size=1", "train.checkpoint_every_steps=7",
                          "train.steps=300", "optim.rewarm=[[100, 20]]"])
def test_resume_accepts_changed_machine_settings(tmp_path: Path, setting: str) -> None:
    start_run(tmp_path / "run").enter(apply_settings(CONFIG_OF_RUN, [setting]), resume=True)


def test_adapter_targets_compare_equal_in_any_spelling(tmp_path: Path) -> None:
    def build_lora_config(*targets: str, rank: int = 4) -> RunConfig:
        return apply_settings(CONFIG_OF_RUN, [f"lora.rank={rank}", f"lora.targets={json.dumps(targets)}"])

    folder = start_run(tmp_path / "run", build_lora_config("v_proj", "experts", "q_proj"))
    folder.enter(build_lora_config("q_proj", "q_proj", "v_proj", "experts"), resume=True)
    with pytest.raises(UserError, match=r"lora.targets = \['experts', 'q_proj'"):
        folder.enter(build_lora_config("v_proj", "q_proj"), resume=True)
    with pytest.raises(UserError, match=r"lora.rank = 4, now"):
        folder.enter(build_lora_config("q_proj", rank=0), resume=True)
    every = start_run(tmp_path / "every", build_lora_config("all-linear"))
    every.enter(build_lora_config("down_proj", "all-linear", "q_proj"), resume=True)


def test_complete_run_rejects_more_steps(tmp_path: Path) -> None:
    folder = start_run(tmp_path / "run")
    assert folder.completion() is None
    folder.complete({"step": 200})
    assert folder.completion() == {"step": 200}
    folder.enter(CONFIG_OF_RUN, resume=True)
    changed_config = apply_settings(CONFIG_OF_RUN, ["train.steps=300"])
    with pytest.raises(UserError, match=r"train.steps = 300 asks"):
        folder.enter(changed_config, resume=True)


@pytest.mark.each("content", ["{", "[]", '{"recipe": 3}', '{"step": [0]}', '{"step": 1, "gate": [1]}'])
def test_damaged_files_raise_user_error(tmp_path: Path, content: str) -> None:
    folder = start_run(tmp_path / "run")
    (tmp_path / "run" / CONFIG).write_text(content)
    with pytest.raises(UserError, match=r"run/config.json: cannot be read"):
        folder.enter(CONFIG_OF_RUN, resume=True)
    (tmp_path / "run" / COMPLETION).write_text(content)
    with pytest.raises(UserError, match=r"run/complete.json: is damaged"):
        folder.completion()


def test_remove_unstarted_keeps_used_folders(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.create()
    folder.remove_if_empty()
    assert not folder.path.exists()
    start_run(tmp_path / "run").remove_if_empty()
    assert (tmp_path / "run" / CONFIG).is_file()


def build_config_with_code(kind: str, files: dict[str, str],
                           reference: str = "/home/me/mine.py:Mine") -> RunConfig:
    code = PluginCode(kind, "mine", reference, files=files)  # type: ignore[arg-type]
    return dataclasses.replace(CONFIG_OF_RUN, code=(code,))


@pytest.mark.each("kind", ["recipe", "model family", "objective"])
def test_resume_rejects_changed_user_code(tmp_path: Path, kind: str) -> None:
    files = {"mine.py": "a" * 64, "beside.py": "b" * 64}
    folder = start_run(tmp_path / "run", build_config_with_code(kind, files))
    folder.enter(build_config_with_code(kind, files), resume=True)
    for changed in files:
        with pytest.raises(UserError, match=rf"was started with {kind} mine of /home/me/mine.py:Mine, "
                                            rf"and {changed} has changed since \(sha256 .{{12}}, "
                                            r"now c{12}\); put it back as it was") as e:
            folder.enter(build_config_with_code(kind, files | {changed: "c" * 64}), resume=True)
        assert ("pass --config" in str(e.value)) == (kind == "recipe")


def test_resume_accepts_moved_user_code(tmp_path: Path) -> None:
    folder = start_run(tmp_path / "run", build_config_with_code("objective", {"mine.py": "a" * 64}))
    folder.enter(build_config_with_code("objective", {"renamed.py": "a" * 64, "new.py": "d" * 64},
                                  "/else/renamed.py:Mine"), resume=True)
    with pytest.raises(UserError, match=r"mine.py has changed since"):
        folder.enter(build_config_with_code("objective", {"other.py": "e" * 64}, "/else/other.py:Mine"),
                     resume=True)


# Events that are added to a run after it has ended.


def test_run_events_append_to_run(tmp_path: Path) -> None:
    log = EventLog(tmp_path / EVENTS)
    for step in (1, 2, 3):
        log.write("step", step=step, loss=1.0)
    log.write("eval", step=9)
    log.close()
    events = RunEvents(tmp_path)
    assert events.last_step() == 3
    events.add("sample", step=3, prompt="a")
    assert [e["event"] for e in read_events(tmp_path / EVENTS)] == ["step"] * 3 + ["eval", "sample"]


def test_run_events_reject_folder_without_run(tmp_path: Path) -> None:
    run_less = RunEvents(None)
    run_less.add("sample", prompt="a")
    assert run_less.last_step() is None
    with pytest.raises(UserError, match=r"holds no events\.jsonl,"):
        RunEvents(tmp_path)
    assert list(tmp_path.iterdir()) == []
