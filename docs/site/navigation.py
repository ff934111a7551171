"""The site's navigation: a section for each heading of docs/index.md, with the pages of its table in their
order; then what docs/site makes itself.  A page that no table lists stands under "More"."""

from __future__ import annotations

import re

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import Files
from mkdocs.structure.pages import Page

HOME, MORE, REFERENCE = "index.md", "More", "Reference"
OF_PROJECT = ("commands.md", "CONTRIBUTING.md", "CHANGELOG.md")


def sections(index: str) -> dict[str, list[str]]:
    """Return heading -> pages of the table below it."""
    found: dict[str, list[str]] = {}
    for heading, text in re.findall(r"^## (.+)\n((?:(?!## ).*\n?)*)", index, re.MULTILINE):
        found[heading] = re.findall(r"^\| \[[^]]*\]\(([\w/]+\.md)\)", text, re.MULTILINE)
    return found


def navigation(index: str, pages: list[str]) -> list[dict[str, str | list[str]]]:
    """Return mkdocs' `nav` of the pages that exist, each of them once."""
    listed = {name: [page for page in listed if page in pages] for name, listed in sections(index).items()}
    known = {HOME, *OF_PROJECT, *(page for found in listed.values() for page in found)}
    listed[REFERENCE] = [page for page in pages if page.startswith("reference/")]
    listed["Project"] = [page for page in OF_PROJECT if page in pages]
    listed[MORE] = [page for page in pages if page not in known | set(listed[REFERENCE])]
    return [{"Home": HOME}, *({name: found} for name, found in listed.items() if found)]


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Lay the navigation out, behind the hooks that make pages."""
    home = files.get_file_from_path(HOME)
    assert home is not None
    config.nav = navigation(home.content_string, [file.src_uri for file in files.documentation_pages()])
    return files


def titled(index: str, titles: dict[str, str]) -> str:
    """Return the home page with the titles of pages in the place of their files' names."""
    return re.sub(r"^\| \[([\w/]+\.md)\]\(\1\)",
                  lambda row: f"| [{titles.get(row[1], row[1])}]({row[1]})", index, flags=re.MULTILINE)


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Let the home page name pages as they name themselves."""
    if page.file.src_uri != HOME:
        return markdown
    found = {file.src_uri: re.search(r"^# (.+)$", file.content_string, re.MULTILINE)
             for file in files.documentation_pages()}
    return titled(markdown, {name: title[1] for name, title in found.items() if title})


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Show the bars in the code of tables as GitHub does, without the backslash that keeps them in a cell."""
    return re.sub(r"<td[^>]*>.*?</td>", lambda cell: cell[0].replace(r"\|", "|"), html, flags=re.DOTALL)
