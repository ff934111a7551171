"""Text and chat files given as `--data` are packed once into the run's folder. Doubles replace the two
packing commands and write the same last file."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_sov.base.artifacts import create_artifact
from megatron_sov.base.errors import UserError
from megatron_sov.commands.train.setup import packed_files
from megatron_sov.commands.train.setup.packed_files import FilePacking, find_files, warn_of_changed_files
from megatron_sov.runs.folder import COMMAND, CONFIG, RunFolder
from megatron_sov.runs.launch_environment import COMMAND_VARIABLE

CHAT = {"messages": [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Hello."}]}
ALPACA = {"instruction": "Say hello.", "input": "", "output": "Hello."}
PAIR = {"prompt": "Hi?", "chosen": "Hello.", "rejected": "No."}
SFT, PREFER, LM = ("chat", "text"), ("preference", "chat"), ("text", "chat")


@pytest.fixture
def run(cwd: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder of a run that was typed in a folder with a model."""
    (cwd / "model").mkdir()
    (cwd / "model/tokenizer.json").write_text("{}")
    monkeypatch.setenv(COMMAND_VARIABLE, json.dumps(["sft", "--run", "runs/a"]))
    return Path("runs/a")


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Run no command: each writes the artifact of its --output; returns the words of each."""
    commands_run: list[list[str]] = []

    def run_command(words: list[str], go_on_by: str) -> int:
        commands_run.append(words)
        kind = "tokenizer" if words[1] == "import" else "tokens"
        with create_artifact(Path(words[words.index("--output") + 1]), kind,
                             overwrite="--overwrite" in words):
            pass
        return 0

    monkeypatch.setattr(packed_files, "run_command", run_command)
    return commands_run


def write_records(name: str, *records: object) -> str:
    text = "".join(f"{record if isinstance(record, str) else json.dumps(record)}\n" for record in records)
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    return name


def pack_files(run: Path, *data: str, formats: tuple[str, ...] = SFT, dry_run: bool = False) -> list[str]:
    """Return --data as the trainer reads it."""
    packed = FilePacking(run, find_files(data, run, formats), Path("model"), dry_run).pack()
    return [packed.get(argument, argument) for argument in data]


def test_a_file_is_packed_once_by_the_commands_that_are_printed(run: Path, commands: list[list[str]],
                                                                capsys: pytest.CaptureFixture[str]) -> None:
    write_records("chats.jsonl", CHAT)
    assert pack_files(run, "chats.jsonl:0.5") == ["runs/a/data/chats:0.5"]
    printed = ["sov-tokenizer import model --output runs/a/tokenizer",
               "sov-data pack --tokenizer runs/a/tokenizer --format chat --heldout 0.02 --input "
               "chats=chats.jsonl --output runs/a/data/chats"]
    assert capsys.readouterr().out.splitlines()[1:] == printed
    assert [words[1:] for words in commands] == [line.split()[1:] for line in printed]
    assert (run / COMMAND).is_file(), "`megatron-sov resume` knows the command after a kill"
    assert pack_files(run, "chats.jsonl:2") == ["runs/a/data/chats:2"] and len(commands) == 2
    (run / CONFIG).write_text("{}")
    Path("chats.jsonl").unlink()
    assert pack_files(run, "chats.jsonl") == ["runs/a/data/chats"]
    assert len(commands) == 2, "its shards are enough"


@pytest.mark.parametrize(("file", "records", "formats", "expected"), [
    ("chats.jsonl", [CHAT], SFT, ("chats", "chat")),
    ("chats.jsonl.gz", [CHAT], SFT, ("chats", "chat")),
    ("deep/my chats (1).jsonl", [CHAT], SFT, ("my-chats-1-", "chat")),
    ("wiki.txt", ["A plain text."], SFT, ("wiki", "text")),
    ("대화.jsonl", ["", CHAT], SFT, ("대화", "chat")),
    ("pairs.json", [json.dumps([PAIR])], PREFER, ("pairs", "preference")),
    ("chats.jsonl", [CHAT], LM, ("chats", "chat")),
    ("tokenizer.jsonl", [CHAT], SFT, ("data", "chat"))])
def test_name_and_format_follow_from_the_file(run: Path, file: str, records: list[object],
                                              formats: tuple[str, ...], expected: tuple[str, str]) -> None:
    [found] = find_files([write_records(file, *records)], run, formats)
    assert (found.name, found.format) == expected
    [named] = find_files([f"own={file}:3"], run, formats)
    assert named.packed_argument(run) == "own=runs/a/data/own:3"


@pytest.mark.parametrize(("data", "message"), [
    (["a.jsonl", "deep/a.jsonl"], "--data deep/a.jsonl: has the same name 'a' as --data a.jsonl; "
                                  "rename one, e.g. --data a2=deep/a.jsonl"),
    (["a.jsonl:x"], "'x' after the colon is not a weight"),
    (["a.jsonl:nan"], "--data a.jsonl:nan: the weight must be a number that is not negative"),
    (["a.jsonl:-1"], "--data a.jsonl:-1: the weight must be a number that is not negative"),
    (["turns.jsonl"], "--data turns.jsonl:1: has no 'messages'"),
    (["torn.jsonl"], "--data torn.jsonl:1: is not valid JSON"),
    (["pair.jsonl"], "--data pair.jsonl:1: is a pair of responses; `megatron-sov prefer` learns"),
    (["table.csv"], "--data table.csv: is a table"),
    (["latin.txt"], "--data latin.txt: is not UTF-8")])
def test_a_file_that_no_command_can_pack_is_refused_at_its_first_record(run: Path, commands: list[list[str]],
                                                                        data: list[str],
                                                                        message: str) -> None:
    for name, record in {"a.jsonl": CHAT, "deep/a.jsonl": CHAT, "turns.jsonl": {"turns": []},
                         "torn.jsonl": '{"messages": [', "pair.jsonl": PAIR,
                         "table.csv": "prompt,response"}.items():
        write_records(name, record)
    Path("latin.txt").write_bytes("é".encode("latin-1"))
    with pytest.raises(UserError) as error:
        pack_files(run, *data)
    assert message in str(error.value) and not commands and not run.exists()


@pytest.mark.parametrize("killed_in", [1, 2, 3])
def test_a_killed_packing_continues_with_missing_files(run: Path, commands: list[list[str]],
                                                       monkeypatch: pytest.MonkeyPatch,
                                                       killed_in: int) -> None:
    data = [write_records("a.jsonl", CHAT), write_records("b.jsonl", CHAT)]
    run_command = packed_files.run_command

    def run_or_stop(words: list[str], go_on_by: str) -> int:
        if len(commands) + 1 == killed_in:
            raise KeyboardInterrupt
        return run_command(words, go_on_by)

    monkeypatch.setattr(packed_files, "run_command", run_or_stop)
    with pytest.raises(KeyboardInterrupt):
        pack_files(run, *data)
    assert RunFolder(run).check_available(resume=False) is None, "the same command may enter"
    monkeypatch.setattr(packed_files, "run_command", run_command)
    assert pack_files(run, *data) == ["runs/a/data/a", "runs/a/data/b"]
    assert [words[1] for words in commands] == ["import", "pack", "pack"], "nothing is made twice"


def test_exit_code_of_a_failed_packing_is_returned(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_files, "run_command", lambda words, go_on_by: 2)
    with pytest.raises(SystemExit) as ended:
        pack_files(run, write_records("a.jsonl", CHAT))
    assert ended.value.code == 2


@pytest.mark.parametrize("begun", [False, True])
@pytest.mark.parametrize(("change", "named"), [
    (lambda: write_records("a.jsonl", CHAT, CHAT), "a.jsonl has changed"),
    (lambda: write_records("a.jsonl", {"text": "A text."}), "a.jsonl has changed"),
    (lambda: Path("model/tokenizer.json").write_text("[]"), "tokenizer of model has changed"),
    (lambda: Path("model/chat_template.jinja").write_text("hi"), "tokenizer of model has changed")])
def test_a_changed_file_is_packed_again_until_the_run_has_begun(run: Path, commands: list[list[str]],
                                                                change: Callable[[], object], named: str,
                                                                begun: bool) -> None:
    pack_files(run, write_records("a.jsonl", CHAT))
    if begun:
        (run / CONFIG).write_text("{}")
    change()
    if begun:
        with pytest.raises(UserError, match=f"--data a.jsonl: {named} since runs/a packed it.*resume runs/a"):
            pack_files(run, "a.jsonl")
    else:
        pack_files(run, "a.jsonl")
        assert commands[-1][-1] == "--overwrite" and commands[-1][1] == "pack"
    assert [words[1] for words in commands].count("pack") == 2 - begun


def test_resume_warns_of_a_file_that_has_changed(run: Path, commands: list[list[str]],
                                                 capsys: pytest.CaptureFixture[str]) -> None:
    folders = pack_files(run, write_records("a.jsonl", CHAT), write_records("b.jsonl", CHAT))
    warn_of_changed_files(run, [*folders, "elsewhere/data/a"])
    assert not capsys.readouterr().err
    write_records("a.jsonl", CHAT, CHAT)
    Path("b.jsonl").unlink()
    warn_of_changed_files(run, folders)
    assert capsys.readouterr().err == ("warning: " + str(Path("a.jsonl").absolute()) + ": has changed since "
                                       "runs/a packed it; the run continues with runs/a/data/a\n")


def test_a_dry_run_writes_no_files(run: Path, commands: list[list[str]]) -> None:
    write_records("a.jsonl", CHAT)
    [argument] = pack_files(run, "a.jsonl", dry_run=True)
    assert Path(argument).name == "a" and Path(argument).is_dir() and not run.exists()


def test_multi_process_runs_print_the_packing_commands(run: Path, commands: list[list[str]],
                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    write_records("a.jsonl", CHAT)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(UserError, match=r"--data runs/a/data/a:2 --data runs/a/data/b$"):
        pack_files(run, "a.jsonl:2", write_records("b.jsonl", CHAT))
    assert not commands and not run.exists()
    monkeypatch.delenv("WORLD_SIZE")
    pack_files(run, "a.jsonl")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert pack_files(run, "a.jsonl") == ["runs/a/data/a"], "packed before, all of them read it"


def test_a_folder_of_the_users_own_is_not_taken_for_a_run(run: Path) -> None:
    write_records("project/data/chats.jsonl", CHAT)
    Path("project/tokenizer").mkdir()
    with pytest.raises(UserError, match="project: is not empty"):
        RunFolder(Path("project")).check_available(resume=False)
    Path("project/tokenizer").rmdir()
    with create_artifact(Path("project/tokenizer"), "tokenizer"):
        pass
    RunFolder(Path("project")).check_available(resume=False)  # as the printed commands leave it


@pytest.mark.parametrize("theirs", ["data/chats.json", "data/chats/notes.txt", "tokenizer/notes.txt",
                                    "data/tokenizer.json"])
def test_user_files_are_not_replaced(run: Path, commands: list[list[str]], theirs: str) -> None:
    file = run / theirs
    write_records(str(file), json.dumps(PAIR))
    data = str(file) if theirs == "data/chats.json" else write_records("chats.json", json.dumps([CHAT]))
    with pytest.raises(UserError, match="runs/a, which would replace"):
        pack_files(run, data, formats=("preference", "chat"))
    assert file.read_text() == f"{json.dumps(PAIR)}\n" and not commands


@pytest.mark.parametrize("record", ["1", "[]", '{"file": 1, "tokenizer": ""}', '{"tokenizer": ""}',
                                    "[" * 99999])
def test_a_damaged_packing_record_is_ignored(run: Path, record: str) -> None:
    chats = write_records("chats.jsonl", CHAT)
    write_records(str(run / "data/chats.json"), record)
    warn_of_changed_files(run, [str(run / "data/chats")])
    [found] = find_files([chats], run, SFT)
    assert not found.recorded(run)


@pytest.mark.each(("objective", "name", "text", "words"), [
    ("sft", "p.jsonl", '{"prompt": "p", "chosen": "c", "rejected": "r"}', "`megatron-sov prefer` learns"),
    ("preference", "c.jsonl", '{"messages": [{"role": "user", "content": "a"}]}', "`megatron-sov sft` le"),
    ("preference", "t.txt", "words", "`megatron-sov pretrain` learns"),
    ("preference", "ab.jsonl", '{"prompt": "p", "a": "c", "b": "r"}', "--columns chosen=FIELD")])
def test_a_file_of_another_kind_is_refused_with_its_command(tmp_path: Path, objective: str, name: str,
                                                            text: str, words: str) -> None:
    (file := tmp_path / name).write_text(text + "\n")
    formats = {"sft": ["chat", "text"], "preference": ["preference"]}[objective]
    with pytest.raises(UserError, match=words):
        find_files([str(file)], tmp_path / "run", formats)
