"""Load plug-in files: values, recorded hashes and error messages."""

import hashlib
import sys
from pathlib import Path

import pytest

from megatron_sov.base.errors import UserError
from megatron_sov.base.plugins.loading import call_plugin, is_reference, load_plugin


def hash_sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def plugin_file(tmp_path: Path) -> Path:
    path = tmp_path / "mine.py"
    path.write_text("answer = 42\n")
    return path


def test_load_plugin_records_path_and_hash(plugin_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(plugin_file.parent)
    for reference in ("mine.py:answer", "./mine.py:answer", f"{plugin_file}:answer",
                      "../" + plugin_file.parent.name + "/mine.py:answer"):
        loaded = load_plugin(reference)
        assert (loaded.value, loaded.attribute, loaded.reference) == (42, "answer", f"{plugin_file}:answer")
        assert loaded.files == {"mine.py": hash_sha256(plugin_file)}


def test_file_executes_again_only_after_change(plugin_file: Path) -> None:
    plugin_file.write_text("import sys\nanswer = object()\n")
    first = load_plugin(f"{plugin_file}:answer").value
    assert load_plugin(f"{plugin_file}:answer").value is first
    plugin_file.write_text("import sys\nanswer = 'other!'\n")
    assert load_plugin(f"{plugin_file}:answer").value == "other!"
    assert not (plugin_file.parent / "__pycache__").exists()


def test_sibling_modules_are_imported_and_recorded(tmp_path: Path) -> None:
    (tmp_path / "beside_mine.py").write_text("from package_mine.part import three\n")
    (tmp_path / "package_mine").mkdir()
    (tmp_path / "package_mine" / "__init__.py").write_text("")
    (tmp_path / "package_mine" / "part.py").write_text("three = 3\n")
    (tmp_path / "uses.py").write_text("import json\nimport numpy\nfrom beside_mine import three\n")
    loaded = load_plugin(f"{tmp_path}/uses.py:three")
    names = ["uses.py", "beside_mine.py", "package_mine/__init__.py", "package_mine/part.py"]
    assert loaded.value == 3
    assert loaded.files == {name: hash_sha256(tmp_path / name) for name in names}
    assert next(iter(loaded.files)) == "uses.py"
    assert str(tmp_path) not in sys.path


def test_installed_modules_precede_siblings(tmp_path: Path) -> None:
    (tmp_path / "colorsys.py").write_text("raise SystemExit('shadowed')\n")
    (tmp_path / "uses.py").write_text("from colorsys import rgb_to_hsv\n")
    assert load_plugin(f"{tmp_path}/uses.py:rgb_to_hsv").value(1, 1, 1) == (0.0, 0.0, 1)


def test_plugin_file_supports_dataclasses(tmp_path: Path) -> None:
    (tmp_path / "typed.py").write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\n\n"
        "@dataclass(frozen=True)\nclass Point:\n    x: int\n    other: Point | None = None\n")
    point = load_plugin(f"{tmp_path}/typed.py:Point").value
    assert point(1, point(2)).other.x == 2


def test_plugin_file_does_not_inherit_future_imports(tmp_path: Path) -> None:
    (tmp_path / "plain.py").write_text("def f(x: int): ...\nhint = f.__annotations__['x']\n")
    assert load_plugin(f"{tmp_path}/plain.py:hint").value is int


def test_load_plugin_from_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "named_pack").mkdir()
    (tmp_path / "named_pack" / "__init__.py").write_text("")
    (tmp_path / "named_pack" / "deep.py").write_text("answer = 7\n")
    monkeypatch.syspath_prepend(tmp_path)
    loaded = load_plugin("named_pack.deep:answer")
    assert (loaded.value, loaded.reference) == (7, "named_pack.deep:answer")
    assert loaded.files == {"deep.py": hash_sha256(tmp_path / "named_pack/deep.py"),
                           "__init__.py": hash_sha256(tmp_path / "named_pack/__init__.py")}
    assert load_plugin("math:pi").files == {} or "math" in next(iter(load_plugin("math:pi").files))


@pytest.mark.parametrize(("text", "message"), [
    ("", r"mine.py has no 'wanted'$"),
    ("wnated = 1\n", r"mine.py has no 'wanted'; did you mean 'wnated'\?"),
    ("x = (\n", r"mine.py:1: '\(' was never closed; correct the line"),
    ("x = 1\nfrom none_such import y\n", r"mine.py:2: ModuleNotFoundError: No module named 'none_such'"),
    ("def f():\n    return 1 / 0\n\nf()\n", r"mine.py:2: ZeroDivisionError: division by zero"),
    ("import sys\nsys.exit(3)\n", r"mine.py:2: SystemExit: 3"),
    ("from . import x\n", r"mine.py:1: ImportError: attempted relative import"),
    ("x = 1\0\n", r"mine.py: .*source code string cannot contain null bytes"),
])
def test_plugin_errors_name_the_line(plugin_file: Path, text: str, message: str) -> None:
    plugin_file.write_text(text)
    with pytest.raises(UserError, match=message):
        load_plugin(f"{plugin_file}:wanted")


def test_failed_plugin_leaves_no_module(plugin_file: Path) -> None:
    plugin_file.write_text("1 / 0\n")
    before = set(sys.modules)
    with pytest.raises(UserError):
        load_plugin(f"{plugin_file}:answer")
    assert set(sys.modules) == before


@pytest.mark.each(("reference", "message"), [
    ("mine.py", "must have the form FILE.py:NAME"), (":x", "must have the form"),
    ("mine.py:", "must have the form"), ("mine.py:a b", "must have the form"),
    ("mine.py:a.b", "must have the form"), ("none.py:x", r"none.py: cannot be read \(No such file"),
    ("./folder:x", r"folder: cannot be read \(Is a directory"),
    ("none_such.deep:x", "none_such.deep: ModuleNotFoundError.*a file of your own is named FILE.py:NAME"),
    ("math:none", "math has no 'none'"),
])
def test_invalid_references_are_refused(cwd: Path, reference: str, message: str) -> None:
    (cwd / "folder").mkdir()
    with pytest.raises(UserError, match=message):
        load_plugin(reference)


def test_call_plugin_imports_siblings_and_reports_errors(tmp_path: Path) -> None:
    (tmp_path / "late_helper.py").write_text("value = 5\n")
    (tmp_path / "late.py").write_text(
        "def good():\n    from late_helper import value\n    return value\n\ndef bad():\n    "
        "return {}['x']\n")
    for name in ("good", "bad"):
        loaded = load_plugin(f"{tmp_path}/late.py:{name}")
        if name == "good":
            assert call_plugin(loaded.reference, loaded.value) == 5
    with pytest.raises(UserError, match=r"late.py:6: KeyError: 'x'"):
        call_plugin(loaded.reference, loaded.value)


def test_is_reference() -> None:
    assert all(map(is_reference, ("a.py:b", "a.b:c", "./a", "a.py")))
    assert not any(map(is_reference, ("tiny-qwen3", "llama", "qwen2-1.5b")))
