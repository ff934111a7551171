"""Korean text out of pages, and machines that have none."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from data_prep.demo import korean
from data_prep.demo.korean import Unavailable, html_text, is_korean, korean_only, korean_pages

PAGE = """<html><head><title>제목</title><script>var 가 = 1;</script></head><body><aside>차례</aside>
<h1>파일 &amp; 폴더</h1><p>파일을
<b>열려면</b> 누르십시오.</p><ul><li>하나<li>둘</ul></body></html>"""


def test_visible_text_of_a_page_one_block_a_line() -> None:
    assert html_text(PAGE) == "파일 & 폴더\n파일을 열려면 누르십시오.\n하나\n둘"


def test_lines_count_as_korean_by_their_letters() -> None:
    assert is_korean("LibreOffice Writer 문서를 열고 저장할 수 있습니다")
    assert not is_korean("Click the button named 확인 to go on")
    assert not is_korean("1234 --")


def test_notes_that_stand_on_every_page_are_kept_once() -> None:
    note = "이 안내문은 모든 쪽에 똑같이 나오는 아주 긴 문장입니다. 한 번이면 됩니다."
    pages = {"a": f"{note}\n예\nEnglish only", "b": f"{note}\n예", "c": note, "d": "English only"}
    assert korean_only(pages) == {"a": f"{note}\n예", "b": "예"}


def fake_commands(folder: Path, monkeypatch: pytest.MonkeyPatch, **scripts: str) -> None:
    """Put scripts in place of system commands, as the only ones on PATH."""
    for name, body in scripts.items():
        file = folder / name.replace("_", "-")
        file.write_text(f"#!{sys.executable}\nimport os, pathlib, sys\n{body}\n")
        file.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))


def test_packages_are_downloaded_unpacked_and_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = "usr/share/help/ko/a.html"
    with tarfile.open(tmp_path / "package.tar", "w") as archive:
        files = {f"./{page}": PAGE, "./usr/share/help/ko/a.png": "그림",
                 "./usr/share/help/de/b.html": "한국어가 아닌 곳"}
        for name, text in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(text.encode())
            archive.addfile(member, io.BytesIO(text.encode()))
    fake_commands(tmp_path, monkeypatch, apt_get="sys.exit(1) if 'gnome' in sys.argv[-1] else "
                                                 "pathlib.Path(sys.argv[-1] + '.deb').touch()",
                  dpkg_deb="sys.stdout.buffer.write(pathlib.Path("
                           f"{str(tmp_path / 'package.tar')!r}).read_bytes())")
    assert korean_pages() == {page: "파일 & 폴더\n파일을 열려면 누르십시오.\n하나\n둘"}


def test_fresh_package_lists_are_fetched_once_by_root_only(tmp_path: Path,
                                                           monkeypatch: pytest.MonkeyPatch) -> None:
    log = tmp_path / "log"
    fake_commands(tmp_path, monkeypatch, apt_get=f"open({str(log)!r}, 'a').write(sys.argv[-1] + '\\n'); "
                                                 "print('E: no lists'); sys.exit(100)")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(Unavailable, match="apt-get failed: E: no lists"):
        korean_pages()
    assert "update" not in log.read_text()
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    with pytest.raises(Unavailable, match="apt-get failed"):
        korean_pages()
    assert log.read_text().count("update") == 1


def test_a_missing_command_or_a_dead_network_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(Unavailable, match="apt-get is not on this machine"):
        korean_pages()

    def hang(command: list[str], **settings: object) -> None:
        raise subprocess.TimeoutExpired(command, 1)

    monkeypatch.setattr(korean.subprocess, "run", hang)
    with pytest.raises(Unavailable, match="did not finish within"):
        korean_pages()
