"""`sov-data mix`: weights, blends and links to input files."""

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from data_prep.cli import main
from data_prep.shards.heldout import hash_document
from data_prep.shards.mix import MixPart, parse_part, write_mix
from data_prep.shards.pack import PackSettings, PackSource
from data_prep.shards.pack_run import pack_sources
from data_prep.shards.verify import verify_shards
from megatron_sov.base.artifacts import read_manifest
from megatron_sov.base.documents import Document, RecordReading
from megatron_sov.base.errors import UserError
from megatron_sov.train.data.sources import open_sources


@pytest.fixture(scope="module")
def parts(tokenizers: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A folder of packed text with the sources `few` and `many` (tokens 1 : 3), and one of packed chats."""
    folder = tmp_path_factory.mktemp("mix")
    for name, count in (("few", 50), ("many", 150)):
        (folder / f"{name}.jsonl").write_text("\n".join(json.dumps({"text": f"{1000 + i} words"})
                                                        for i in range(count)))
    chats = [{"messages": [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": f"{i}!"}]}
             for i in range(40)]
    (folder / "chat.jsonl").write_text("\n".join(map(json.dumps, chats)))
    settings = PackSettings(heldout_share=0)
    pack_sources(tokenizers["solar-open"], [PackSource(n, folder / f"{n}.jsonl") for n in ("few", "many")],
                 folder / "text", settings)
    pack_sources(tokenizers["solar-open"], [PackSource("chat", folder / "chat.jsonl")], folder / "chats",
                 PackSettings(0.1, RecordReading("chat")))
    return folder / "text", folder / "chats"


def test_folder_weights_are_divided_by_tokens(parts: tuple[Path, Path], tmp_path: Path) -> None:
    text, chats = parts
    assert main(["mix", f"{text}:0.6", f"{chats}:0.2", "--output", str(tmp_path / "out")]) == 0
    weights = {s["name"]: s["weight"] for s in read_manifest(tmp_path / "out").content["sources"]}
    # 0.6 : 0.2 gives the text 0.75, which few and many share 1 : 3
    assert weights == pytest.approx({"few": 0.1875, "many": 0.5625, "chat": 0.25})
    sources = open_sources({str(tmp_path / "out"): 1.0}, 1000)
    assert {s.name: s.share for s in sources} == weights
    assert [s.is_chat for s in sources] == [False, False, True]
    direct = open_sources({str(text): 0.6, str(chats): 0.2}, 1000)
    assert [s.share for s in direct] == pytest.approx([s.share for s in sources])
    for pair in zip(sources, direct, strict=True):
        mixed, unmixed = ([d.tokens(i, 0, n).tolist() for i, n in enumerate(d.lengths)]
                          for d in (s.open_split("train") for s in pair))
        assert mixed == unmixed
    assert main(["verify", str(tmp_path / "out")]) == 0
    # files are hard links: the same inode
    assert ((tmp_path / "out/many/train-00000.bin").stat().st_ino
            == (text / "many/train-00000.bin").stat().st_ino)


def test_mix_without_weights_uses_tokens_and_accepts_mixes(parts: tuple[Path, Path], tmp_path: Path) -> None:
    text, chats = parts
    write_mix([MixPart(text, None), MixPart(chats, None)], tmp_path / "plain")
    content = read_manifest(tmp_path / "plain").content["sources"]
    tokens = [s["splits"]["train"]["num_tokens"] for s in content]
    assert [s["weight"] for s in content] == pytest.approx([t / sum(tokens) for t in tokens])
    write_mix([MixPart(text, 3.0)], tmp_path / "a")
    write_mix([MixPart(tmp_path / "a", 1.0), MixPart(chats, 1.0)], tmp_path / "b")
    assert ([s["weight"] for s in read_manifest(tmp_path / "b").content["sources"]]
            == pytest.approx([0.125, 0.375, 0.5]))


def test_mix_copies_files_across_devices(parts: tuple[Path, Path], tmp_path: Path,
                                         monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse_link(source: Path, target: Path) -> None:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    monkeypatch.setattr(os, "link", refuse_link)
    write_mix([MixPart(parts[0], None)], tmp_path / "out")
    assert main(["verify", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out/few/train-00000.bin").stat().st_nlink == 1


def test_mix_rejects_damaged_tokenizer(parts: tuple[Path, Path], tmp_path: Path,
                                       capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(parts[0], tmp_path / "text")
    file = tmp_path / "text/tokenizer/tokenizer.json"
    file.write_text(file.read_text().replace("a", "b", 1))
    assert main(["mix", str(tmp_path / "text"), str(parts[1]), "--output", str(tmp_path / "out")]) == 2
    assert f"{file}: is damaged" in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.deep
def test_mix_rejects_contradicting_parts(parts: tuple[Path, Path], tokenizers: dict[str, Path],
                                         tmp_path: Path) -> None:
    text, chats = parts
    (tmp_path / "x.txt").write_text("one document")
    pack_sources(tokenizers["k-exaone"], [PackSource("x", tmp_path / "x.txt")], tmp_path / "other",
                 PackSettings(heldout_share=0))
    pack_sources(tokenizers["solar-open"], [PackSource("y", tmp_path / "x.txt")], tmp_path / "bos",
                 PackSettings(0, bos="start"))
    for given, rule in (([MixPart(text, None), MixPart(tmp_path / "other", None)], "tokenizer_sha256 is"),
                        ([MixPart(text, None), MixPart(tmp_path / "bos", None)],
                         "bos_id is 1, that of .* is None"),
                        ([MixPart(text, None), MixPart(text, None)],
                         "source 'few': occurs in several folders"),
                        ([MixPart(text, 1.0), MixPart(chats, None)], "a weight to every folder or to none")):
        with pytest.raises(UserError, match=rule):
            write_mix(given, tmp_path / "new")
    for argument in (f"{text}:0", f"{text}:much", f"{text}:inf"):
        with pytest.raises(UserError, match="must be a positive number"):
            parse_part(argument)
    assert not (tmp_path / "new").exists()


def test_mix_rejects_heldout_documents_in_training(tokenizers: dict[str, Path], tmp_path: Path,
                                                   capsys: pytest.CaptureFixture[str]) -> None:
    """The shared document has the smallest hash of source `one`, which holds it out; `other` trains on it."""
    texts = sorted((f"document {i} of many" for i in range(60)),
                   key=lambda text: hash_document(Document("", text)))
    shared, contents = texts[20], {"one": texts[20:40], "other": [texts[20], *texts[:10]]}
    for name, documents in contents.items():
        (tmp_path / f"{name}.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in documents))
    sources = [PackSource(name, tmp_path / f"{name}.jsonl") for name in contents]
    settings = PackSettings(heldout_share=1e-9)
    for source in sources:
        pack_sources(tokenizers["solar-open"], [source], tmp_path / source.name, settings)
    parts = [MixPart(tmp_path / name, None) for name in contents]
    with pytest.raises(UserError, match=r"other: trains on 1 documents that .*one holds out; pack both"):
        write_mix(parts, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    capsys.readouterr()
    open_sources({str(part.path): 1.0 for part in parts}, 1000)
    assert "were held out by different rules" in capsys.readouterr().err
    pack_sources(tokenizers["solar-open"], sources, tmp_path / "together", settings)
    assert verify_shards(tmp_path / "together")[0] == [] and shared in contents["other"]


def test_blend_divides_phases_among_tagged_sources(parts: tuple[Path, Path], tokenizers: dict[str, Path],
                                                   tmp_path: Path, read_output: Any) -> None:
    for name in ("ko", "en"):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(json.dumps({"text": f"{name} {i}"})
                                                          for i in range(60)))
    assert main(["pack", "--tokenizer", str(tokenizers["solar-open"]), "--input", str(tmp_path / "ko.jsonl"),
                 str(tmp_path / "en.jsonl"), "--tag", "ko:kind=ko", "--tag", "en:kind=en", "--heldout", "0",
                 "--output", str(tmp_path / "tagged")]) == 0
    (tmp_path / "blend.yaml").write_text("""
phases:
  - {name: one, tokens: 300, shares: [{kind: ko, share: 25}, {kind: en, share: 75}]}
  - {name: two, tokens: 100, shares: [{kind: ko, share: 50}, {source: few, share: 50}]}
""")
    command = ["mix", str(tmp_path / "tagged"), str(parts[0]), "--blend", str(tmp_path / "blend.yaml")]
    assert main([*command, "--dry-run"]) == 0
    assert "left out, for the blend has no share for them: many" in read_output(
        *command, "--output", str(tmp_path / "out"))
    content = read_manifest(tmp_path / "out").content
    assert content["phases"] == [{"name": "one", "tokens": 300, "blend": {"ko": 0.25, "en": 0.75}},
                                 {"name": "two", "tokens": 100, "blend": {"ko": 0.5, "few": 0.5}}]
    assert {s["name"]: s["weight"] for s in content["sources"]} == pytest.approx(
        {"ko": 0.3125, "en": 0.5625, "few": 0.125})
    assert content["sources"][0]["tags"] == {"kind": ["ko"]}
    assert main(["verify", str(tmp_path / "out")]) == 0


@pytest.mark.each(("options", "message"), [
    (["--tokens", "5"], "--tokens 5.0: is for --blend"),
    (["--dry-run"], "--dry-run: is for --blend"),
    ([], "--output: is missing"),
    (["--blend", "none"], "--blend none: is no file and no blend that is shipped"),
    (["--blend", "solar-open", "--max-epochs", "0"], "--max-epochs 0: must be above 0"),
    (["--blend", "solar-open", "--tokens", "-1"], "--tokens -1: must be at least 0"),
])
def test_wrong_blend_options_give_one_sentence(parts: tuple[Path, Path], tmp_path: Path, options: list[str],
                                               message: str, get_refusal: Any) -> None:
    output = ["--output", str(tmp_path / "out")] if options not in ([], ["--dry-run"]) else []
    assert message in get_refusal("mix", str(parts[0]), *options, *output) and not (tmp_path / "out").exists()
    assert "folders have no weights beside --blend" in get_refusal(
        "mix", f"{parts[0]}:2", "--blend", "solar-open", "--output", str(tmp_path / "out"))
