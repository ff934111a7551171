"""Code that a command may execute: only files on its own command line, never files named in a config or
checkpoint."""

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_sov import cli, recipes
from megatron_sov.base.artifacts import create_artifact, format_json
from megatron_sov.base.errors import UserError
from megatron_sov.model import objectives
from megatron_sov.model.config import RunConfig, apply_settings
from megatron_sov.model.families import supported as models
from megatron_sov.model.recipes import requested
from megatron_sov.model.recipes.requested import load_plugins
from tests.typed_words import parse_settings

FAMILY = """
from pathlib import Path
Path(__file__).with_name("ran").touch()
from dataclasses import replace
from megatron_sov.model.families.supported import QWEN3
MINE = replace(QWEN3, name="mine")
WRONG = replace(QWEN3, name="wrong", structure={"qk_nrom": True})
SPACED = replace(QWEN3, name="my family")
"""
OBJECTIVE = """
from pathlib import Path
Path(__file__).with_name("ran").touch()

class Halved:
    def __init__(self, context, *, share: float = 0.5, name: str = "x"): ...
    def collect(self, policy, step): ...
    def prepare(self, batch): ...
    def loss(self, hidden, head, batch): ...
"""
RECIPE = """
from dataclasses import replace
from megatron_sov import recipes

def plain():
    return replace(recipes.get("tiny-qwen3"), recipe="mine")

def whole():
    run = plain()
    return replace(run, model=replace(run.model, family="family.py:MINE"),
                   objective=replace(run.objective, name="objective.py:Halved"))

def wrong_type():
    return {"recipe": "mine"}

def wrong_value():
    return replace(plain(), train=replace(plain().train, steps="many"))

def fails():
    return recipes.get("tiny-qwen3").nothing

def takes_something(size):
    return plain()
"""


@pytest.fixture
def site(cwd: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a recipe, a family and an objective, and registries that know nothing yet."""
    for name, text in {"recipe.py": RECIPE, "family.py": FAMILY, "objective.py": OBJECTIVE}.items():
        (cwd / name).write_text(text)
    for registry in (models.FAMILY_PLUGINS, objectives.OBJECTIVE_PLUGINS, recipes.RECIPE_PLUGINS):
        monkeypatch.setattr(registry, "_known", {})
    return cwd


def request_config(*argv: str) -> RunConfig:
    return requested.request_recipe(parse_settings(requested.RecipeOptions, argv)).config()


def write_config(path: Path, **fields: Any) -> str:
    """Write a config.json of somebody else's; returns its path."""
    config = recipes.get("tiny-qwen3").to_dict()
    for name, value in fields.items():
        part, _, field = name.partition("__")
        if field:
            config[part][field] = value
        else:
            config[part] = value
    path.write_text(json.dumps(config))
    return str(path)


def test_a_user_recipe_is_recorded(site: Path) -> None:
    config = request_config("./recipe.py:plain", "--set", "train.steps=7")
    assert (config.recipe, config.train.steps) == ("mine", 7)
    (code,) = config.code
    assert (code.kind, code.name, code.reference) == ("recipe", "plain", f"{site}/recipe.py:plain")
    assert list(code.files) == ["recipe.py"]


def test_a_named_recipe_may_load_code_from_its_folder(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (site / "elsewhere").mkdir()
    monkeypatch.chdir(site / "elsewhere")
    config = request_config("../recipe.py:whole")
    assert (config.model.family, config.objective.name) == ("mine", "Halved")
    assert [(c.kind, c.reference.rpartition("/")[2]) for c in config.code] == [
        ("recipe", "recipe.py:whole"), ("model family", "family.py:MINE"),
        ("objective", "objective.py:Halved")]
    assert models.get_family("mine").name == "mine"


def test_families_and_objectives_by_set_and_their_settings(site: Path) -> None:
    config = request_config("tiny-qwen3", "--set", "model.family=family.py:MINE", "--set",
                            "objective.name=objective.py:Halved", "--set", "objective.options.share=0.25")
    assert (config.model.family, config.objective.options) == ("mine", {"share": 0.25})
    factory = objectives.get_factory(config, lambda context: pytest.fail("the built-in one"))
    with pytest.raises(UserError, match="objective Halved: has no `coefficients`"):
        factory(None)


@pytest.mark.parametrize(("argument", "message"), [
    ("recipe.py:wrong_type", r"recipe.py:wrong_type: returns a dict; a recipe returns a RunConfig"),
    ("recipe.py:wrong_value", r'recipe.py:wrong_value: config: train.steps = "many" must be a whole'),
    ("recipe.py:fails", r"recipe.py:\d+: AttributeError: 'RunConfig' object has no attribute 'nothing'"),
    ("recipe.py:takes_something",
     r"takes_something: is <function .*>; a recipe is a function without arguments"),
    ("recipe.py:recipes", r"recipes: is <module .*>; a recipe is a function without arguments"),
    ("recipe.py:plian", r"did you mean 'plain'"),
])
def test_invalid_recipes_are_refused(site: Path, argument: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        request_config(argument)


@pytest.mark.parametrize(("setting", "message"), [
    ("model.family=family.py:WRONG",
     r"structure and training name unknown settings of the model: 'qk_nrom'; did you mean"),
    ("model.family=family.py:SPACED", r"is called 'my family'; its name must be transformers' model_type"),
    ("model.family=objective.py:Halved", r"objective.py:Halved: is a type; a model family is a"),
    ("objective.name=family.py:MINE",
     r"family.py:MINE: is a Family; an objective is a class with collect\(self, policy, step\)"),
    ("objective.options.shaer=1", r"objective.options.shaer: no such setting; did you mean 'share'\?"),
    ("objective.options.share=much", r'objective.options.share = "much" must be a number'),
])
def test_invalid_families_objectives_and_options_are_refused(site: Path, setting: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        request_config("tiny-qwen3", "--set", "objective.name=objective.py:Halved", "--set", setting)


def attacks(site: Path) -> dict[str, str]:
    """Return foreign configs that name code on this machine, with the expected answer to each."""
    code = {"reference": f"{site}/family.py:MINE", "package": "", "files": {"family.py": requested.__name__}}
    family, objective = {"kind": "model family", "name": "mine", **code}, f"{site}/objective.py:Halved"
    halved = {"kind": "objective", "name": "Halved", **code, "reference": objective}
    return {
        write_config(site / "a.json", model__family=f"{site}/family.py:MINE"): "is a file or module, "
                                                                          "which is run only when",
        write_config(site / "b.json", model__family="mine",
                     code=[family]): f"add --plugin {site}/family.py:MINE",
        write_config(site / "c.json", objective__name="objective.py:Halved"): "is a file or module, "
                                                                         "which is run only when",
        write_config(site / "d.json", objective__name="Halved", code=[halved]): f"add --plugin {objective}",
        write_config(site / "e.json", recipe=f"{site}/recipe.py:whole",
                     model__family="os:system"): "is a file or module",
        write_config(site / "f.json", code=[{**family, "kind": "command"}]): 'code.0.kind = "command"',
        write_config(site / "g.json", code=[{**family, "run": True}]): "code.0.run: no such setting",
    }


@pytest.mark.deep
def test_a_config_executes_no_code(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path, message in attacks(site).items():
        with pytest.raises(UserError) as e:
            request_config("--config", path)
        assert message in str(e.value), path
        for command in (["plan"], ["recipes"], ["pretrain", "--data", str(site), "--run", "run"],
                        ["extend", "--data", str(site), "--run", "run", "--from", "none"],
                        ["submit", "pretrain", "--cluster", "local", "--dry-run", "--data", str(site),
                         "--run", "run"]):
            assert cli.main([*command, "--config", path]) == 2, command
            capsys.readouterr()
    assert not (site / "ran").exists()
    assert not (site / "run").exists()


def test_a_config_whose_recipe_was_a_file_needs_no_file(site: Path) -> None:
    first = request_config("recipe.py:plain")
    (site / "config.json").write_text(format_json(first.to_dict()))
    (site / "recipe.py").unlink()
    assert request_config("--config", "config.json") == first


def test_a_config_uses_code_named_on_the_command_line(site: Path) -> None:
    first = request_config("recipe.py:whole")
    (site / "config.json").write_text(format_json(first.to_dict()))
    for registry in (models.FAMILY_PLUGINS, objectives.OBJECTIVE_PLUGINS, recipes.RECIPE_PLUGINS):
        registry._known.clear()
    named = ("--plugin", "family.py:MINE", "--plugin", "objective.py:Halved")
    assert request_config("--config", "config.json", *named) == first


def test_a_user_recipe_is_submitted_by_its_given_name(site: Path, read_output: Any, get_refusal: Any) -> None:
    (site / "tokens").mkdir()
    command = ["submit", "pretrain", "--cluster", "local", "--dry-run", "./recipe.py:plain",
               "--data", "tokens", "--run", "r"]
    assert "./recipe.py:plain" in read_output(*command)
    command[5] = "./recipe.py:plian"
    assert "did you mean 'plain'" in get_refusal(*command)


def test_a_hugging_face_folder_executes_no_code(site: Path, get_refusal: Any) -> None:
    (site / "hf").mkdir()
    (site / "hf" / "model.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0{}")
    for model_type in (f"{site}/family.py:MINE", "family.py:MINE", "mine"):
        config = {"model_type": model_type, "auto_map": {"AutoModelForCausalLM": "family.MINE"}}
        (site / "hf" / "config.json").write_text(json.dumps(config))
        for command in (["convert", "from-hf", "hf", "out"], ["convert", "inspect", "hf"],
                        ["pretrain", "tiny-qwen3", "--data", str(site), "--run", "run", "--from", "hf"]):
            assert "model family" in get_refusal(*command)
    assert not (site / "ran").exists()


def test_a_checkpoint_executes_no_code(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number, (path, message) in enumerate(attacks(site).items()):
        with create_artifact(site / f"checkpoint-{number}", "checkpoint") as artifact:
            artifact.content = {"step": 1, "tokens": 0, "parts": ["model"]}
            artifact.settings = json.loads(Path(path).read_text())
        names_family = artifact.settings["model"]["family"] != "qwen3"
        # objectives are not converted
        expected = message if names_family or "code.0" in message else "model.index.json"
        for command in (["convert", "to-hf", f"checkpoint-{number}", "out"],
                        ["convert", "inspect", f"checkpoint-{number}"],
                        ["pretrain", "tiny-qwen3", "--data", str(site), "--run", "run", "--from",
                         f"checkpoint-{number}"]):
            assert cli.main(command) == 2, (path, command)
            if command[0] == "pretrain" and "code.0" not in message:
                expected = " model, recipe tiny-qwen3 is for qwen3" if names_family else "tokens"
            assert expected in capsys.readouterr().err, (path, command)
    assert not (site / "ran").exists()


@pytest.mark.parametrize(("text", "message"), [
    ("{", "is not valid YAML"), ("[" * 20_000, "is nested more than"),
    ("[]", "must be an object of settings"),
    ('{"model_type": "llama"}', "names no recipe"),
    ("recipe: tiny-qwen3\nmodel_type: llama", "model_type: no such setting"),
])
def test_files_without_settings_are_refused(site: Path, text: str, message: str) -> None:
    (site / "config.json").write_text(text)
    with pytest.raises(UserError, match=r"--config config.json(, line \d+)?: ") as e:
        request_config("--config", "config.json")
    assert message in str(e.value)


def test_a_recipe_is_named_once(site: Path) -> None:
    with pytest.raises(UserError, match="pass --config FILE"):
        request_config()
    (site / "part.yaml").write_text("recipe: tiny-qwen3\n")
    with pytest.raises(UserError, match=r"--config part.yaml:"):
        request_config("tiny-llama", "--config", "part.yaml")
    with pytest.raises(UserError, match=r"--config \.: is a"):
        request_config("--config", ".")


def test_config_files_override_the_recipe_in_order(site: Path) -> None:
    (site / "a.yaml").write_text("recipe: tiny-qwen3\ntrain:\n  steps: 7\n  seed: 3\noptim.lr: 2e-3\n"
                                 "data:\n  phases:\n  - {name: one, seq_len: 64}\n")
    (site / "b.json").write_text('{"train": {"steps": 9}, "lora": {"rank": 4}}')
    config = request_config("--config", "a.yaml", "--config", "b.json", "--set", "train.seed=5")
    assert config == request_config("tiny-qwen3", "--set", "train.steps=9", "--set", "train.seed=5", "--set",
                                    "optim.lr=2e-3", "--set", "lora.rank=4", "--set",
                                    'data.phases=[{"name": "one", "seq_len": 64}]')
    assert request_config("tiny-qwen3", "--config", "b.json").train.steps == 9
    (site / "b.json").write_text('{"train": {"steps": "ten"}}')
    with pytest.raises(UserError, match=r"--config b.json, line 1"):
        request_config("tiny-qwen3", "--config", "b.json")


def test_a_config_with_a_code_recipe_executes_no_code(site: Path) -> None:
    (site / "a.yaml").write_text("recipe: recipe.py:plain\n")
    with pytest.raises(UserError, match=r"recipe = 'recipe.py:plain'"):
        request_config("--config", "a.yaml")
    assert not (site / "ran").exists()


def test_plugins_are_families_and_objectives(site: Path) -> None:
    load_plugins(["family.py:MINE", "objective.py:Halved"])
    assert models.FAMILY_PLUGINS.named() == [f"{site}/family.py:MINE"]
    assert objectives.OBJECTIVE_PLUGINS.named() == [f"{site}/objective.py:Halved"]
    assert (site / "ran").exists()  # so that its absence elsewhere says something
    with pytest.raises(UserError, match=r"recipe.py:plain: is a function"):
        load_plugins(["recipe.py:plain"])


def test_nested_code_references_in_settings_are_not_executed(site: Path) -> None:
    model = json.dumps({**recipes.get("tiny-qwen3").to_dict()["model"], "family": "family.py:MINE"})
    with pytest.raises(UserError, match="is a file or module"):
        request_config("tiny-qwen3", "--set", f"model={model}")
    assert (apply_settings(recipes.get("tiny-qwen3"), ["model.family=family.py:MINE"]).model.family
            == "family.py:MINE")
    assert not (site / "ran").exists()
