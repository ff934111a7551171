"""mkdocs hook: build the navigation from docs/index.md, with a section per heading.

Pages from other hooks come after the index's tables. Pages in no table are below "More".
"""

import re

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import Files
from mkdocs.structure.pages import Page

HOME = "index.md"
PROJECT_PAGES = ("commands.md", "CONTRIBUTING.md", "CHANGELOG.md")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Set `nav`; runs after the hooks that add pages."""
    home = files.get_file_from_path(HOME)
    assert home is not None
    pages = [file.src_uri for file in files.documentation_pages()]
    config.nav = build_navigation(home.content_string, pages)
    return files


def build_navigation(index: str, pages: list[str]) -> list[dict[str, str | list[str]]]:
    """Return mkdocs' `nav` with every page once.

    Args:
        index: text of docs/index.md.
        pages: existing pages.
    """
    sections: dict[str, list[str]] = {}
    for heading, text in re.findall(r"^## (.+)\n((?:(?!## ).*\n?)*)", index, re.MULTILINE):
        names = re.findall(r"^\| \[[^]]*\]\(([\w/]+\.md)\)", text, re.MULTILINE)
        sections[heading] = [name for name in names if name in pages]
    listed = {HOME, *PROJECT_PAGES, *(name for names in sections.values() for name in names)}
    sections.setdefault("Reference", []).extend(page for page in pages if page.startswith("reference/"))
    sections["Project"] = [page for page in PROJECT_PAGES if page in pages]
    sections["More"] = [page for page in pages if page not in listed and not page.startswith("reference/")]
    return [{"Home": HOME}, *({heading: names} for heading, names in sections.items() if names)]


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Replace file names by page titles on the home page."""
    if page.file.src_uri != HOME:
        return markdown
    matches = {file.src_uri: re.search(r"^# (.+)$", file.content_string, re.MULTILINE)
               for file in files.documentation_pages()}
    return insert_titles(markdown, {name: match[1] for name, match in matches.items() if match})


def insert_titles(index: str, titles: dict[str, str]) -> str:
    """Replace file names in link texts of the index's tables by titles."""
    return re.sub(r"^\| \[([\w/]+\.md)\]\(\1\)",
                  lambda row: f"| [{titles.get(row[1], row[1])}]({row[1]})", index, flags=re.MULTILINE)


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    r"""Replace `\|` in table cells by `|`, as GitHub does."""
    return re.sub(r"<td[^>]*>.*?</td>", lambda cell: cell[0].replace(r"\|", "|"), html, flags=re.DOTALL)
