"""mkdocs hook: add CONTRIBUTING.md, CHANGELOG.md and linked repository files (below `repository/`)."""

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
ROOT_PAGES = ("CONTRIBUTING.md", "CHANGELOG.md")
LINK = re.compile(r"(\]\()([\w./-]+)((?:#[\w-]*)?\))")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add `ROOT_PAGES`, and files outside docs/ that a page links to."""
    for name in ROOT_PAGES:
        if (ROOT / name).is_file():
            files.append(File.generated(config, name, abs_src_path=str(ROOT / name)))
    for file in list(files.documentation_pages()):
        for _, link, _ in LINK.findall(file.content_string):
            target = resolve_link(file.src_uri, link)
            site_path = f"repository/{target}"
            is_outside = not target.startswith(("docs/", "..")) and target not in ROOT_PAGES
            if is_outside and (ROOT / target).is_file() and files.get_file_from_path(site_path) is None:
                files.append(File.generated(config, site_path, abs_src_path=str(ROOT / target)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Rewrite links that leave docs/."""
    name = page.file.src_uri

    def rewrite_link(match: re.Match[str]) -> str:
        target = resolve_link(name, match[2])
        if name not in ROOT_PAGES and target.startswith("docs/"):
            return match[0]
        return f"{match[1]}{build_site_link(name, target)}{match[3]}"

    return LINK.sub(rewrite_link, markdown)


def resolve_link(page: str, link: str) -> str:
    """Return a link's target as a path from the repository's root."""
    folder = "." if page in ROOT_PAGES else posixpath.join("docs", posixpath.dirname(page))
    return posixpath.normpath(posixpath.join(folder, link))


def build_site_link(page: str, target: str) -> str:
    """Return the relative link in the site from a page to a repository file."""
    if target.startswith("docs/"):
        site_path = target.removeprefix("docs/")
    else:
        site_path = target if target in ROOT_PAGES else f"repository/{target}"
    return posixpath.relpath(site_path, posixpath.dirname(page) or ".")
