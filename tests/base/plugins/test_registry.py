"""What is known by name: built in, named by a person, declared by packages;
and that a record runs nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_sov.base.errors import UserError
from megatron_sov.base.plugins.loading import LoadedPlugin, PluginCode
from megatron_sov.base.plugins.registry import PluginOrder, Registry, check_methods, takes
from megatron_sov.judge.rewards import registry as rewards
from megatron_sov.judge.tools import registry as environments

GROUP = "test_sov.shapes"


def check(loaded: LoadedPlugin) -> None:
    if not isinstance(loaded.value, dict):
        raise UserError(f"{loaded.reference}: is no dict")


def registry(**more) -> Registry:
    return Registry("objective", GROUP, ("round", "square"), check, **more)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "shapes.py"
    path.write_text("from pathlib import Path\nPath(__file__).with_name('ran').touch()\n"
                    "flat = {'name': 'level'}\nround = {}\ntext = 'x'\n")
    return path


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Install a package by hand: its folder on sys.path, with metadata that declares entry points."""

    def install(name: str, entries: str, code: str = "", version: str = "1.2") -> None:
        folder = tmp_path / name
        folder.mkdir()
        (folder / f"{name}_code.py").write_text(code)
        info = folder / f"{name}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        (info / "entry_points.txt").write_text(f"[{GROUP}]\n{entries}\n")
        monkeypatch.syspath_prepend(folder)

    return install


def test_a_file_that_a_person_named_is_known_by_its_name(file: Path) -> None:
    shapes = registry()
    assert shapes.load(f"{file}:flat") == "flat"
    assert shapes.get("flat") == {"name": "level"}
    code = shapes.code("flat")
    assert code is not None
    assert (code.kind, code.name, code.reference, code.package) == ("objective", "flat", f"{file}:flat", "")
    assert shapes.listing() == [("flat", f"file {file}:flat")]
    assert shapes.named() == [f"{file}:flat"]
    assert shapes.load(f"{file}:flat") == "flat"  # again: the same


def test_it_may_say_its_name_itself(file: Path) -> None:
    assert registry(own_name=lambda shape: shape["name"]).load(f"{file}:flat") == "level"


def test_names_that_are_taken_and_things_of_another_kind_are_refused(file: Path, tmp_path: Path) -> None:
    shapes = registry()
    shapes.load(f"{file}:flat")
    (tmp_path / "others.py").write_text("flat = {}\n")
    for reference, message in {
        f"{file}:round": "is called 'round' like a built-in objective; give it another name",
        f"{tmp_path}/others.py:flat": f"is called 'flat' like {file}:flat; give one of them another name",
        f"{file}:text": "is no dict",
    }.items():
        with pytest.raises(UserError, match=message):
            shapes.load(reference)


def test_looking_up_never_runs_a_file_whatever_the_record_says(file: Path) -> None:
    shapes = registry()
    record = PluginCode("objective", "flat", f"{file}:flat", files={"shapes.py": "0" * 64})
    with pytest.raises(UserError, match=rf"objective 'flat': stands in {file}:flat, which is run only when "
                                        r"the command line itself names it; if you know it and trust it, "
                                        rf"add --plugin {file}:flat$"):
        shapes.get("flat", [record])
    for name in (f"{file}:flat", "shapes.py:flat", "os:system"):
        with pytest.raises(UserError, match="is a file or module, which is run only when the command line "
                                            "itself names it"):
            shapes.get(name, [record])
    assert not file.with_name("ran").exists()


@pytest.mark.parametrize("reference", ["/a.py:x\x1b[2J; rm -rf ~", "/a.py:x\nerror: all is well"])
def test_a_record_cannot_write_on_the_screen(reference: str) -> None:
    with pytest.raises(UserError) as e:
        registry().get("flat", [PluginCode("objective", "flat", reference)])
    assert reference not in str(e.value) and str(e.value).isprintable()


def test_a_record_cannot_slip_a_command_into_what_is_copied_from_the_message() -> None:
    with pytest.raises(UserError, match=r"add --plugin '/a.py:x; rm -rf ~'$"):
        registry().get("flat", [PluginCode("objective", "flat", "/a.py:x; rm -rf ~")])


def test_an_unknown_name_is_answered_with_the_nearest(package) -> None:
    package("shapely", "cube = shapely_code:cube", "raise SystemExit('imported')")
    with pytest.raises(UserError, match=r"objective 'squar': does not exist; "
                                        r"did you mean 'square'\? \(objectives: round, square, cube; "
                                        r"your own are named FILE.py:NAME\)"):
        registry().get("squar")


def test_packages_declare_and_are_imported_when_their_name_is_asked_for(package) -> None:
    package("shapes_a", "cube = shapes_a_code:cube", "cube = {'sides': 6}")
    shapes = registry()
    assert shapes.listing() == [("cube", "package shapes_a 1.2")]
    assert shapes.code("cube") is None
    assert shapes.get("cube") == {"sides": 6}
    code = shapes.code("cube")
    assert code is not None and list(code.files) == ["shapes_a_code.py"]
    assert (code.package, code.reference) == ("shapes_a 1.2", "shapes_a_code:cube")
    assert shapes.named() == []


def test_what_is_wrong_with_a_package_names_it(package) -> None:
    package("shapes_b", "bad = shapes_b_code:none\ntext = shapes_b_code:text\ntwice = shapes_b_code:good\n"
                        "other = shapes_b_code:good\nwhole = shapes_b_code",
            "text = ''\ngood = {'name': 'good'}")
    package("shapes_c", "twice = shapes_c_code:good")
    shapes = registry(own_name=lambda shape: shape["name"])
    for name, message in {
        "bad": "objective 'bad' of package shapes_b 1.2: shapes_b_code:none: shapes_b_code has no 'none'",
        "text": "of package shapes_b 1.2: shapes_b_code:text: is no dict",
        "twice": "objective 'twice': is declared by shapes_b 1.2 and by shapes_c 1.2; uninstall one of them",
        "other": "objective 'other' of package shapes_b 1.2: calls itself 'good'; "
                 "its entry point must have that name",
        "whole": "of package shapes_b 1.2: shapes_b_code: must have the form FILE.py:NAME or MODULE:NAME",
    }.items():
        with pytest.raises(UserError, match=message):
            shapes.get(name)
        assert shapes.code(name) is None


# What a person named of rewards and tool environments, known by one name alone.


@pytest.mark.parametrize("order, kind, group, name", [
    (rewards.order, "reward", "megatron_sov.rewards", "length"),
    (environments.order, "tool environment", "megatron_sov.environments", "calculator")])
def test_a_package_cannot_take_the_name_of_what_is_built_in(
        order: Callable[[str, dict[str, Any]], PluginOrder], kind: str, group: str, name: str, tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch) -> None:
    assert order(name, {}) == PluginOrder(name)
    (info := tmp_path / "namesake-1.2.dist-info").mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: namesake\nVersion: 1.2\n")
    (info / "entry_points.txt").write_text(f"[{group}]\n{name} = namesake_code:Other\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError) as raised:
        order(name, {})
    assert str(raised.value) == (
        f"{kind} '{name}': is built in, and namesake 1.2 declares one of that name; name namesake_code:Other "
        "for that one, uninstall the package for the built-in one")


# What is called wrongly fails when it is loaded, with what it should have taken.


METHODS = {"read": ("path",), "write": ("path", "text")}


class Good:
    def read(self, path, encoding="utf-8"): ...
    def write(self, *anything): ...


class Bad:
    def read(self): ...


def test_arguments_by_position() -> None:
    assert takes(len, ("x",)) and takes(Good, ()) and takes(lambda *a: a, ("a", "b"))
    assert not takes(lambda: 0, ("x",)) and not takes(lambda x, *, y: 0, ("x",)) and not takes("text", ())


def test_methods_of_a_class() -> None:
    check_methods(Good, "mine.py:Good", "a store", METHODS)
    with pytest.raises(UserError, match=r"^mine.py:Bad: a store needs read\(self, path\), write\(self, path, "
                                        r"text\); it has read\(self\)$"):
        check_methods(Bad, "mine.py:Bad", "a store", METHODS)
    with pytest.raises(UserError, match=r"is a Good; a store is a class with read\(self, path\), "
                                        r"write\(self, path, text\)"):
        check_methods(Good(), "mine.py:good", "a store", METHODS)
    with pytest.raises(UserError, match=r"a store needs .*; it has none"):
        check_methods(int, "mine.py:int", "a store", METHODS)


def test_what_is_built_in_is_loaded_by_its_place_and_says_what_it_lacks() -> None:
    own: Registry[Any] = Registry("data step", "megatron_sov.data_steps", (), lambda loaded: None)
    places = {"decoder": "json:JSONDecoder", "lacking": "no_such_library.part:Class"}
    assert own.loaded("decoder", places, "data") is json.JSONDecoder
    with pytest.raises(UserError, match="lacking: needs no_such_library, which is not installed"):
        own.loaded("lacking", places, "data")
    with pytest.raises(UserError, match="data step 'other'"):
        own.loaded("other", places, "data")
