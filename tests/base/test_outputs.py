"""Check output paths and links before a command starts its work."""

import errno
import os
import tempfile
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest

from data_prep.cli import main as sov_data
from megatron_sov.base.artifacts import check_output_folder, write_output
from megatron_sov.base.errors import UserError
from megatron_sov.base.outputs import check_output, check_page, refuse_outside_link, refuse_unwritable
from megatron_sov.cli import main as megatron_sov
from tokenizer.cli import main as sov_tokenizer

NOWHERE = "/proc/x"
"""A folder in which even root cannot create files, although its permissions allow it (/proc)."""


def test_check_output_refuses_impossible_paths(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path, sentence in ((tmp_path, "is a folder; name the file"),
                           (tmp_path / "file/a/b", "file is a file, so nothing"),
                           (tmp_path / ("a" * 999), "File name too long"),
                           (Path("/dev/null"), "is not a regular file"),
                           (Path(NOWHERE), "nothing can be made")):
        with pytest.raises(UserError, match=rf"--output {path}: .*{sentence}"):
            check_output("--output", path)
    check_output("--output", tmp_path / "new/folders/page.html")
    with pytest.raises(UserError, match="File name too long"):
        check_output_folder(tmp_path / ("a" * 999), "tokens", overwrite=True)
    with pytest.raises(UserError, match=r"udcff': is not valid UTF-8"):
        check_output_folder(tmp_path / "\udcff", "tokens", overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    write_output(tmp_path / "new/folders/page.html", "x")
    assert (tmp_path / "new/folders/page.html").read_text() == "x"


@pytest.mark.parametrize("has_nameless_files", [True, False])
def test_write_probe_leaves_nothing(has_nameless_files: bool, tmp_path: Path,
                                    monkeypatch: pytest.MonkeyPatch) -> None:
    """`has_nameless_files`: whether the file system supports O_TMPFILE; otherwise the probe is a folder."""
    created: list[str] = []

    def record_folder(prefix: str, dir: Path) -> str:
        created.append(mkdtemp(prefix=prefix, dir=dir))
        return created[-1]

    def refuse(folder: Path, flags: int) -> int:
        raise OSError(errno.EOPNOTSUPP, "this file system makes no files without names")

    monkeypatch.setattr(tempfile, "mkdtemp", record_folder)
    if not has_nameless_files:
        monkeypatch.setattr(os, "open", refuse)
    refuse_unwritable(tmp_path, "--run x")
    assert list(tmp_path.iterdir()) == [] and bool(created) != has_nameless_files


COMMANDS = {
    "pack": (sov_data, "pack --tokenizer {data.tokenizer} --input {text} --output {out}"),
    "mix": (sov_data, "mix {data.text} --output {out}"),
    "trajectories": (sov_data, "trajectories --input {text} --output {out}"),
    "demo-corpus": (sov_data, "demo-corpus --output {out}"),
    "tokenizer train": (sov_tokenizer,
                        "train --preset solar-open --vocab-size 300 --input {text} --output {out}"),
    "tokenizer import": (sov_tokenizer, "import {data.tokenizer} --output {out}"),
    "tokenizer export": (sov_tokenizer, "export {data.tokenizer} --format tiktoken --output {out}"),
    "tokenizer report": (sov_tokenizer, "report {data.tokenizer} --output {out}"),
    "tokenizer compare": (sov_tokenizer,
                          "compare {data.tokenizer} {data.tokenizer} --text a={text} --json {out}"),
    "media": (sov_tokenizer, "media {data.tokenizer} --image-tokens 4 --output {out}"),
    "report": (megatron_sov, "report {text} --output {out}"),
    "eval": (megatron_sov, "eval ppl nowhere --data {data.text} --output {out}"),
    "generate": (megatron_sov, "generate {model} --prompt x --output {out}"),
}


@pytest.mark.deep
@pytest.mark.each("name", COMMANDS)
def test_every_command_refuses_unwritable_output(
        name: str, packed_data: Any, capsys: pytest.CaptureFixture[str]) -> None:
    main, line = COMMANDS[name]
    text, model = (packed_data.tokenizer.parent / name for name in ("even.jsonl", "model"))
    model.mkdir(exist_ok=True)
    (model / "config.json").write_text('{"model_type": "qwen3"}')
    (model / "model.safetensors").touch()
    for out, reason in ((NOWHERE, "nothing can be made in /proc"), (text / "x", "even.jsonl is a file")):
        words = line.format(data=packed_data, text=text, model=model, out=out).split()
        assert main(words) == 2
        error = capsys.readouterr().err
        assert reason in error.splitlines()[0] and "Traceback" not in error, error


def test_links_out_of_foreign_folder_are_refused(tmp_path: Path) -> None:
    secret, folder = tmp_path / "secret.txt", tmp_path / "model"
    secret.write_text("secret")
    folder.mkdir()
    (folder / "own.txt").write_text("own")
    for name, target in (("inside.txt", "own.txt"), ("outside.txt", secret), ("up.txt", "../secret.txt")):
        (folder / name).symlink_to(target)
    refuse_outside_link(folder, folder / "own.txt")
    refuse_outside_link(folder, folder / "inside.txt")
    for name in ("outside.txt", "up.txt"):
        with pytest.raises(UserError, match=f"{name}: is a link to .*secret.txt, outside of its folder"):
            refuse_outside_link(folder, folder / name)
    snapshot, blobs = tmp_path / "models--a/snapshots/abc", tmp_path / "models--a/blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "123").write_text("{}")
    (snapshot / "config.json").symlink_to("../../blobs/123")
    refuse_outside_link(snapshot, snapshot / "config.json")


@pytest.mark.each("name", ["a.pdf", "a", "a.json"])
def test_page_requires_html_suffix(name: str, tmp_path: Path) -> None:
    check_page("--output", None)
    check_page("--output", tmp_path / "a.html")
    with pytest.raises(UserError, match=f"name it {tmp_path}/a.html"):
        check_page("--output", tmp_path / name)
