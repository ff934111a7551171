"""Register plug-ins by name; recorded references never execute code."""

import json
from pathlib import Path

import pytest

from megatron_sov.base.errors import UserError
from megatron_sov.base.plugins.loading import LoadedPlugin, PluginCode
from megatron_sov.base.plugins.registry import Registry, accepts_arguments, check_methods, load_built_in


def check_is_dict(loaded: LoadedPlugin) -> None:
    if not isinstance(loaded.value, dict):
        raise UserError(f"{loaded.reference}: is no dict")


def create_registry(**options) -> Registry:
    return Registry("objective", ("round", "square"), check_is_dict, **options)


@pytest.fixture
def plugin_file(tmp_path: Path) -> Path:
    path = tmp_path / "shapes.py"
    path.write_text("from pathlib import Path\nPath(__file__).with_name('ran').touch()\n"
                    "flat = {'name': 'level'}\nround = {}\ntext = 'x'\n")
    return path


def test_loaded_plugin_is_registered_by_name(plugin_file: Path) -> None:
    shapes = create_registry()
    assert shapes.load(f"{plugin_file}:flat") == "flat"
    assert shapes.get("flat") == {"name": "level"}
    code = shapes.code("flat")
    assert code is not None
    assert (code.kind, code.name, code.reference) == ("objective", "flat", f"{plugin_file}:flat")
    assert shapes.listing() == [("flat", f"file {plugin_file}:flat")]
    assert shapes.named() == [f"{plugin_file}:flat"]
    assert shapes.load(f"{plugin_file}:flat") == "flat"  # again: the same


def test_plugin_may_declare_its_name(plugin_file: Path) -> None:
    assert create_registry(own_name=lambda shape: shape["name"]).load(f"{plugin_file}:flat") == "level"


def test_taken_names_and_other_kinds_are_refused(plugin_file: Path, tmp_path: Path) -> None:
    shapes = create_registry()
    shapes.load(f"{plugin_file}:flat")
    (tmp_path / "others.py").write_text("flat = {}\n")
    for reference, message in {
        f"{plugin_file}:round": "is called 'round' like a built-in objective; give it another name",
        f"{tmp_path}/others.py:flat": f"is called 'flat' like {plugin_file}:flat; give one of them another",
        f"{plugin_file}:text": "is no dict",
    }.items():
        with pytest.raises(UserError, match=message):
            shapes.load(reference)


def test_lookup_never_executes_recorded_files(plugin_file: Path) -> None:
    shapes = create_registry()
    record = PluginCode("objective", "flat", f"{plugin_file}:flat", files={"shapes.py": "0" * 64})
    with pytest.raises(UserError, match=rf"objective 'flat': stands in {plugin_file}:flat, which is run only "
                                        r"when the command line itself names it; if you know it and trust "
                                        rf"it, add --plugin {plugin_file}:flat$"):
        shapes.get("flat", [record])
    for name in (f"{plugin_file}:flat", "shapes.py:flat", "os:system"):
        with pytest.raises(UserError, match="is a file or module, which is run only when the command line "
                                            "itself names it"):
            shapes.get(name, [record])
    assert not plugin_file.with_name("ran").exists()


@pytest.mark.parametrize("reference", ["/a.py:x\x1b[2J; rm -rf ~", "/a.py:x\nerror: all is well"])
def test_recorded_reference_is_escaped(reference: str) -> None:
    with pytest.raises(UserError) as e:
        create_registry().get("flat", [PluginCode("objective", "flat", reference)])
    assert reference not in str(e.value) and str(e.value).isprintable()


def test_recorded_reference_is_quoted() -> None:
    with pytest.raises(UserError, match=r"add --plugin '/a.py:x; rm -rf ~'$"):
        create_registry().get("flat", [PluginCode("objective", "flat", "/a.py:x; rm -rf ~")])


def test_unknown_name_suggests_nearest() -> None:
    with pytest.raises(UserError, match=r"objective 'squar': does not exist; "
                                        r"did you mean 'square'\? \(objectives: round, square; "
                                        r"your own are named FILE.py:NAME\)"):
        create_registry().get("squar")


# A plug-in with a wrong signature fails at load, with the expected parameters.


METHODS = {"read": ("path",), "write": ("path", "text")}


class Store:
    def read(self, path, encoding="utf-8"): ...
    def write(self, *anything): ...


class StoreWithoutWrite:
    def read(self): ...


def test_accepts_arguments_by_position() -> None:
    assert accepts_arguments(len, ("x",))
    assert accepts_arguments(Store, ())
    assert accepts_arguments(lambda *a: a, ("a", "b"))
    assert not accepts_arguments(lambda: 0, ("x",))
    assert not accepts_arguments(lambda x, *, y: 0, ("x",))
    assert not accepts_arguments("text", ())


def test_check_methods() -> None:
    check_methods(Store, "mine.py:Good", "a store", METHODS)
    with pytest.raises(UserError, match=r"^mine.py:Bad: a store needs read\(self, path\), write\(self, path, "
                                        r"text\); it has read\(self\)$"):
        check_methods(StoreWithoutWrite, "mine.py:Bad", "a store", METHODS)
    with pytest.raises(UserError, match=r"is a Store; a store is a class with read\(self, path\), "
                                        r"write\(self, path, text\)"):
        check_methods(Store(), "mine.py:good", "a store", METHODS)
    with pytest.raises(UserError, match=r"a store needs .*; it has none"):
        check_methods(int, "mine.py:int", "a store", METHODS)


def test_load_built_in_names_missing_library() -> None:
    assert load_built_in("format json", "json:JSONDecoder", "data") is json.JSONDecoder
    with pytest.raises(UserError, match="format odd: needs no_such_library, which is not installed"):
        load_built_in("format odd", "no_such_library.part:Class", "data")
