"""The documentation site: navigation, copied files, API reference, and no resources from elsewhere."""

import ast
import importlib.util
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted(path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md"))


def hook(name: str, folder: str = "docs/site") -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"site_{name}", ROOT / folder / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_navigation_has_every_page_once_under_the_heading_of_the_index() -> None:
    index = (ROOT / "docs/index.md").read_text()
    nav = hook("navigation").build_navigation(index, PAGES)
    pages = [page for entry in nav for value in entry.values()
             for page in ([value] if isinstance(value, str) else value)]
    assert sorted(pages) == PAGES
    assert {"Home": "index.md"} in nav and not any("More" in entry for entry in nav)
    (train,) = (entry["Train"] for entry in nav if "Train" in entry)
    assert "pretrain.md" in train and "sft.md" not in train


@pytest.mark.each(("page", "link", "led"), [
    ("plan.md", "../benchmarks/a.txt", "repository/benchmarks/a.txt"),
    ("tutorials/language.md", "../../README.md", "../repository/README.md"),
    ("house.md", "../CONTRIBUTING.md", "CONTRIBUTING.md"),
    ("CONTRIBUTING.md", "docs/house.md", "house.md"),
    ("CONTRIBUTING.md", "docs/index.md#start", "index.md#start"),
    ("tutorials/language.md", "../sft.md", "../sft.md"),
    ("plan.md", "slurm.md#links", "slurm.md#links"),
])
def test_links_out_of_the_pages_lead_to_a_copy_in_the_site(page: str, link: str, led: str) -> None:
    outside = hook("outside")

    class Page:
        class file:
            src_uri = page

    assert outside.on_page_markdown(f"see [it]({link}).", Page, None, None) == f"see [it]({led})."


def test_the_reference_has_every_module_with_something_public_once() -> None:
    reference = hook("reference")
    pages = dict(reference.iter_pages())
    shown = [module for modules in pages.values() for module in modules]
    assert len(shown) == len(set(shown)) > 500
    for room in ("megatron_sov/runs/obs", "tokenizer/bpe", "megatron_sov"):  # by their syntax trees
        public = {path for path in (ROOT / room).glob("*.py") if any(
            isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_")
            for node in ast.parse(path.read_text()).body) and not path.name.startswith("__m")}
        assert public == {module for module in shown if module.parent == ROOT / room}
    base = "megatron_sov.base"
    assert f"\n::: {base}.artifacts\n" in reference.build_page(base, pages[base])
    assert "megatron_sov.engine.parallel" in pages
    assert all(module.parent.name == "engine" for module in pages["megatron_sov.engine"]), "no wings"
    assert "megatron_sov.runs" in pages and "megatron_sov.runs.obs" not in pages


@pytest.fixture
def build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Return `build(name=text, ...)`: the folder of a site of these pages, made by our mkdocs.yml without the
    reference."""
    monkeypatch.setenv("NO_MKDOCS_2_WARNING", "1")
    from mkdocs.commands.build import build as make
    from mkdocs.config import load_config

    def built(**pages: str) -> Path:
        (tmp_path / "docs").mkdir()
        for name, text in (pages | {page: f"# {page}\n" for page in FROM_CONTRIBUTING}).items():
            (tmp_path / f"docs/{name}.md").write_text(text)
        config = load_config(str(ROOT / "mkdocs.yml"), strict=True, docs_dir=str(tmp_path / "docs"),
                             site_dir=str(tmp_path / "site"), plugins=["search", "offline"],
                             hooks=[str(ROOT / f"docs/site/{name}.py") for name in ("outside", "navigation")])
        config.plugins.on_startup(command="build", dirty=False)
        make(config)
        return tmp_path / "site"

    return built


FROM_CONTRIBUTING = ("house", "own_code", "families", "data", "eval_lm")
"""Pages that CONTRIBUTING.md, which is in every site, links to."""
INDEX = "# All\n\n## One\n\n| page | job |\n|---|---|\n| [a.md](a.md) | x |\n"


def test_the_site_loads_no_external_resource(build: Callable[..., Path]) -> None:
    site = build(index=INDEX,
                 a="# Page A\n\nsee [a file](../constraints.txt) and https://elsewhere.example\n",
                 new="# Not listed\n")
    for page in ("index.html", "a.html", "new.html"):
        text = (site / page).read_text()
        loaded = re.findall(r"<(?:script|img|iframe|link)[^>]* (?:src|href)=\"([^\"]*)\"", text)
        assert loaded and not [where for where in loaded if re.match("(?:[a-z]+:)?//", where)]
        (policy,) = re.findall(r'Content-Security-Policy" content="([^"]*)"', text)
        assert policy.startswith("default-src 'self'") and "http" not in policy
    assert "Page A" in (site / "index.html").read_text() and "More" in (site / "index.html").read_text()
    assert (site / "repository/constraints.txt").read_bytes() == (ROOT / "constraints.txt").read_bytes()
    assert (site / "search/search_index.js").is_file()
    assert (site / "assets/javascripts/iframe-worker.js").is_file()


def test_links_that_lead_nowhere_end_the_build(build: Callable[..., Path]) -> None:
    from mkdocs.exceptions import Abort

    with pytest.raises(Abort, match="3 warnings in strict mode"):
        build(index=INDEX, a="# Page A\n\n[one](gone.md) [two](index.md#nowhere) [three](../gone.txt)\n")


def test_house_picture_shows_halls_in_order_without_upward_imports() -> None:
    house = hook("generate_house", "docs")
    table, picture = house.load_rules(), house.PICTURE.read_text()  # that it is fresh, test_docs.py shows
    result = re.findall(r"<title>(\w+) imports (\w+)</title>", picture)
    assert len(result) == len(set(result)) > 100
    order = [hall for hall in table.HALLS if hall in house.SUBJECTS]
    assert [hall for hall in house.SUBJECTS if hall in order] == order
    folders = {p.name for p in (ROOT / "megatron_sov").iterdir() if (p / "__init__.py").exists()}
    assert folders <= set(order)
    assert all((ROOT / f"megatron_sov/{hall}.py").is_file() for hall in set(order) - folders)
    for hall, other in result:
        assert hall in table.PROGRAMS or order.index(other) < order.index(hall)
