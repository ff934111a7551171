"""Time, memory, results and resumption of `sov-data run`, compared with datatrove on a synthetic corpus.

    python benchmarks/curate_datatrove.py --folder FOLDER --peer PYTHON [--size-mb 60] [--documents 100000]

PYTHON is an interpreter with `pip install "datatrove[io,processing]" spacy "kiwipiepy<0.22" pythainlp
lxml_html_clean psutil`. The script generates documents with planted defects, runs both pipelines, and prints
for each step how many documents each pipeline keeps and how often both agree. Then it kills workers and
commands of both, and compares the resumed output with the output of an undisturbed run.

datatrove's steps are used as documented, except for two that do not run offline. Its language filter
downloads fastText's model, so datatrove gets one folder per language. Its indexer for decontamination imports
lighteval, so this script writes the index in the format that the filter reads.
"""

import argparse
import gzip
import hashlib
import io
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from measurement import await_cost, describe_machine

REPOSITORY = Path(__file__).parents[1]
FOLDERS = {"en": 0.55, "ko": 0.2, "th": 0.15, "html": 0.08, "pdf": 0.02}
"""Folder of raw documents -> its share of the documents."""
TEXT_FOLDERS = ("en", "html", "ko", "th")
SMALL_FILES = 20
SKEW = 100
"""Expected size of a folder's one large file in sizes of a small one."""
KILL_AFTER_S = 3
"""Processor seconds of the busiest worker at which a process is killed."""
WAIT_S = 60
STEPS = ("rules", "exact_dedup", "minhash_dedup", "decontaminate")
"""Steps of both pipelines that drop documents, in their order."""
PIPELINE = """name: trial
shard_bytes: 8000000
sources: [{sources}]
steps: [language, rules, exact_dedup, {{minhash_dedup: {{threshold: 0.75, num_bands: 14, rows_per_band: 8}}}},
        {{decontaminate: {{benchmarks: [bench.jsonl], ngram: 12, min_words: 12}}}}]
""".format(sources=", ".join(f"{{name: {name}, path: raw/{name}}}" for name in FOLDERS))
_WORDS = """
en the of and to the of and to the of and to in that is was for it with as his on be at by had not are but
en from or have an they which one you were all system network teacher river
ko 사람 나라 학교 시간 역사 음악 도시 강물 시장 바다 산길 겨울 여름 의사 편지 이야기 기계 마을 종이 창문 학생
particles 은 는 이 가 을 를 에 에서 의 로 와 도 까지 부터 보다
verbs 있다 했다 된다 간다 온다 본다 말했다 만들었다 시작했다 알려졌다 이어졌다
th ใน ที่ และ ของ เป็น มี การ ได้ ให้ กับ ไป มา จาก คน บ้าน โรงเรียน เมือง เวลา ประเทศ
"""
WORDS: dict[str, list[str]] = {}
"""Language or kind of word (the first word of a line) -> words."""
for _name, *_words in map(str.split, _WORDS.strip().splitlines()):
    WORDS.setdefault(_name, []).extend(_words)


def draw_sentence(draw: random.Random, language: str) -> str:
    """Return a random sentence: Thai without spaces, Korean with particles and a verb, or English."""
    count = draw.randint(7, 15)
    if language == "th":
        return "".join(draw.choice(WORDS["th"]) for _ in range(count))
    if language == "ko":
        words = [draw.choice(WORDS["ko"]) + draw.choice(WORDS["particles"]) for _ in range(count - 3)]
        return f"{' '.join(words)} {draw.choice(WORDS['verbs'])}."
    return " ".join(draw.choice(WORDS["en"]) for _ in range(count)).capitalize() + "."


def damage_text(draw: random.Random, text: str) -> str:
    """Return a text that a quality rule of C4, Gopher or FineWeb should drop."""
    lines = text.split("\n")
    too_short = text[:60]
    repeated_line = "\n".join([lines[0]] * 6 + lines)
    one_word_per_line = "\n".join(text.split())
    bullets_with_ellipses = "\n".join(f"- {line}..." for line in lines)
    many_symbols = text.replace(" ", " # ")
    filler_text = f"{text}\nlorem ipsum {{ a b }}."
    return draw.choice([too_short, repeated_line, one_word_per_line, bullets_with_ellipses, many_symbols,
                        filler_text])


def generate_documents(count: int, chars: int, questions: list[str]) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield (folder, document) pairs.

    Args:
        count: number of documents.
        chars: minimal length of an English text.
        questions: benchmark questions; contaminated documents contain one.

    A document's `planted` is "spoiled:", "contaminated:", "exact:ORIGINAL_ID", "near:ORIGINAL_ID" or "".
    """
    draw = random.Random(0)
    originals: dict[str, list[tuple[str, str]]] = {folder: [] for folder in FOLDERS}
    for number in range(count):
        folder = draw.choices(list(FOLDERS), list(FOLDERS.values()))[0]
        language = folder if folder in ("ko", "th") else "en"
        lines: list[str] = []
        # a character of Korean or Thai has three bytes
        while sum(map(len, lines)) < (chars if language == "en" else chars * 2 // 3):
            lines.append(" ".join(draw_sentence(draw, language) for _ in range(draw.randint(2, 4))))
        text, planted, chance = "\n".join(lines), "", draw.random()
        if chance < 0.1:
            text, planted = damage_text(draw, text), "spoiled:"
        elif chance < 0.18 and originals[folder]:
            original, text = draw.choice(originals[folder])
            planted = f"exact:{original}"
            if chance >= 0.14:
                planted = f"near:{original}"
                for _ in range(max(1, len(text) // 900)):
                    place = draw.randrange(len(text))
                    text = text[:place] + draw.choice("xyz") + text[place:]
        elif chance < 0.185 and language == "en":
            text, planted = f"{text}\n{draw.choice(questions)}", "contaminated:"
        else:
            originals[folder].append((f"d{number}", text))
        yield folder, {"id": f"d{number}", "text": text, "planted": planted}


def write_corpus(folder: Path, count: int, size_mb: float) -> float:
    """Write raw documents, benchmark questions and the pipeline of `sov-data run`; return MB of raw files."""
    draw = random.Random(1)
    questions = [" ".join(draw_sentence(draw, "en") for _ in range(3)) for _ in range(200)]
    chars = int(0.72 * size_mb * 1e6 / count)
    for name in FOLDERS:
        (folder / "raw" / name).mkdir(parents=True)
    (folder / "bench.jsonl").write_text("".join(f'{{"question": "{question}"}}\n' for question in questions))
    (folder / "corpus.json").write_text(json.dumps([chars, questions]))
    (folder / "trial.yaml").write_text(PIPELINE)
    for kind, document in generate_documents(count, chars, questions):
        number = draw.choices(range(SMALL_FILES + 1), [1] * SMALL_FILES + [SKEW])[0]
        raw = json.dumps(document, ensure_ascii=False).encode() + b"\n"
        path = folder / "raw" / kind / f"{number:02}.jsonl"
        if kind == "html":
            raw, path = build_warc_record(document), path.with_suffix(".warc.gz")
        elif kind == "pdf":
            raw, path = build_pdf(document["text"]), path.with_name(f"{document['id']}.pdf")
        with open(path, "ab") as file:
            file.write(raw)
    return sum(file.stat().st_size for file in (folder / "raw").rglob("*.*")) / 1e6


def build_warc_record(document: dict[str, str]) -> bytes:
    """Return a compressed WARC record of an HTML page with a document's text."""
    from warcio.statusandheaders import StatusAndHeaders
    from warcio.warcwriter import WARCWriter

    page = ("<html><head><title>A page</title></head><body><nav><a href='/'>Home</a></nav><article><p>"
            + document["text"].replace("\n", "</p><p>") + "</p></article><footer>(c)</footer></body></html>")
    writer = WARCWriter(sink := io.BytesIO(), gzip=True)
    headers = StatusAndHeaders("200 OK", [("Content-Type", "text/html; charset=utf-8")], protocol="HTTP/1.0")
    writer.write_record(writer.create_warc_record(
        "http://example.org/", "response", io.BytesIO(page.encode()), http_headers=headers,
        warc_headers_dict={"WARC-Record-ID": document["id"]}))
    return sink.getvalue()


def build_pdf(text: str) -> bytes:
    """Return a PDF file of one page with the first 52 lines of 80 characters of a text."""
    shown = " ".join(f"1 0 0 1 50 {780 - 14 * i} Tm ({text[80 * i:80 * i + 80]}) Tj" for i in range(52))
    content = f"BT /F 10 Tf {shown} ET".replace("\n", " ")
    bodies = ["<</Type/Catalog/Pages 2 0 R>>", "<</Type/Pages/Count 1/Kids[4 0 R]>>",
              "<</Type/Font/Subtype/Type1/BaseFont/Helvetica>>",
              "<</Type/Page/Parent 2 0 R/MediaBox[0 0 600 800]/Contents 5 0 R"
              "/Resources<</Font<</F 3 0 R>>>>>>",
              f"<</Length {len(content)}>>stream\n{content}\nendstream"]
    out, table = "%PDF-1.4\n", "0000000000 65535 f \n"
    for number, body in enumerate(bodies, 1):
        table += f"{len(out):010} 00000 n \n"
        out += f"{number} 0 obj{body}endobj\n"
    return (f"{out}xref\n0 6\n{table}trailer<</Size 6/Root 1 0 R>>\nstartxref\n{len(out)}\n%%EOF").encode()


def build_datatrove_filters(language: str) -> list[Any]:
    """Return datatrove's filters with the thresholds that FineWeb-2 publishes for a language."""
    import yaml
    from datatrove.pipeline.filters import (
        C4QualityFilter, FineWebQualityFilter, GopherQualityFilter, GopherRepetitionFilter)

    if language == "en":
        return [GopherRepetitionFilter(), GopherQualityFilter(),
                C4QualityFilter(filter_no_terminal_punct=False), FineWebQualityFilter()]
    file = REPOSITORY / "data_prep/curate/quality/rules/languages.yaml"
    rules = yaml.safe_load(file.read_text(encoding="utf-8"))[language]
    limits = rules["thresholds"]
    return [
        GopherRepetitionFilter(
            limits["max_duplicate_line_share"], 0, 0, 0, tuple(limits["max_top_ngram_char_share"].items()),
            tuple(limits["max_duplicate_ngram_char_share"].items()), language=language),
        FineWebQualityFilter(
            language=language, short_line_thr=999, char_duplicates_ratio=0.1,
            line_punct_thr=limits["min_terminal_line_share"] or 0,
            new_line_ratio=limits["max_newlines_per_word"]),
        GopherQualityFilter(
            min_avg_word_length=None, max_avg_word_length=None, stop_words=rules["stop_words"],
            max_non_alpha_words_ratio=limits["min_alpha_word_share"], language=language)]


def run_datatrove_stage(folder: Path, stage: str, workers: int) -> int:
    """Run one of STEPS of datatrove's pipeline on every text folder (in the interpreter with datatrove)."""
    import numpy as np
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.decont.n_grams import NGramsDecontConfig, NGramsDecontFilter
    from datatrove.pipeline.dedup import (
        ExactDedupConfig, ExactDedupFilter, ExactDedupSignature, ExactFindDedups, MinhashDedupBuckets,
        MinhashDedupCluster, MinhashDedupFilter, MinhashDedupSignature)
    from datatrove.pipeline.extractors import Trafilatura
    from datatrove.pipeline.readers import JsonlReader, WarcReader
    from datatrove.pipeline.writers import JsonlWriter
    from datatrove.utils.text import ngrams, simplify_text

    out = folder / "peer"
    previous = dict(zip(STEPS[1:], STEPS, strict=False)).get(stage, "")

    def run(name: str, *steps: Any, tasks: int = SMALL_FILES + 1) -> None:
        LocalPipelineExecutor(list(steps), tasks=tasks, workers=workers, start_method="fork",
                              logging_dir=str(out / "logs" / f"{stage}-{name}")).run()

    for kind in TEXT_FOLDERS:
        language, work = kind if kind in ("ko", "th") else "en", f"{out}/work/{kind}"
        read, write = JsonlReader(str(out / previous / kind)), JsonlWriter(str(out / stage / kind))
        if stage == "rules":
            raw = f"{folder}/raw/{kind}"
            readers = [JsonlReader(raw)]
            if kind == "html":  # the default timeout of one second drops pages on a loaded machine
                readers = [WarcReader(raw), Trafilatura(timeout=60)]
            run(kind, *readers, *build_datatrove_filters(language), write)
        elif stage == "exact_dedup":
            config = ExactDedupConfig(content_getter=lambda document: document.text)
            run(f"1-{kind}", read, ExactDedupSignature(f"{work}/sig", config))
            run(f"2-{kind}", ExactFindDedups(f"{work}/sig", f"{work}/dups", config), tasks=1)
            run(f"3-{kind}", read, ExactDedupFilter(f"{work}/dups", config), write)
        elif stage == "minhash_dedup":
            run(f"1-{kind}", read, MinhashDedupSignature(f"{work}/min", language=language))
            run(f"2-{kind}", MinhashDedupBuckets(f"{work}/min", f"{work}/buckets"), tasks=14)
            run(f"3-{kind}", MinhashDedupCluster(f"{work}/buckets", f"{work}/remove"), tasks=1)
            run(f"4-{kind}", read, MinhashDedupFilter(f"{work}/remove"), write)
        else:
            config = NGramsDecontConfig(n_grams=12)
            step = NGramsDecontFilter(f"{work}/index", config, language=language)
            questions = json.loads((folder / "corpus.json").read_text())[1]
            hashes = set()
            for question in questions:
                words = step.tokenizer.word_tokenize(simplify_text(question, config.norm_config))
                hashes |= {step.hash_func(" ".join(ngram)) for ngram in ngrams(words, config.n_grams)}
            Path(work, "index").mkdir(parents=True)
            np.array(sorted(hashes), config.hash_config.np_descr).tofile(f"{work}/index/b.index.hashes")
            run(kind, read, step, write)
    return 0


def start_stage(folder: Path, peer: str, stage: str, workers: int) -> subprocess.Popen[bytes]:
    """Start `sov-data run` (stage "ours") or one step of datatrove's pipeline (a stage of STEPS)."""
    words = [peer, __file__, "--folder", str(folder), "--peer-stage", stage]
    if stage == "ours":
        words = [sys.executable, "-m", "data_prep.cli", "run", f"{folder}/trial.yaml", "--output",
                 f"{folder}/ours"]
    with open(folder / "log.txt", "a") as out:
        return subprocess.Popen([*words, "--workers", str(workers)], stdout=out, stderr=out, cwd=REPOSITORY,
                                env={**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"})


def run_stage(folder: Path, peer: str, stage: str, workers: int) -> str:
    """Run a stage to its end; return the time of its process tree and the memory of its largest process."""
    cost = await_cost(start_stage(folder, peer, stage, workers), time.monotonic())
    return (f"{cost.cpu_s:8.1f} CPU s {cost.wall_s:8.1f} s wall time, "
            f"largest process {cost.peak_bytes / 1e6:.0f} MB")


def read_our_outcomes(folder: Path) -> dict[str, str]:
    """Return document id -> the step of ours that dropped the document, or "kept"."""
    import pyarrow.parquet as pq

    outcomes: dict[str, str] = {}
    for source in json.loads((folder / "ours/summary.json").read_text())["sources"]:
        layers = [(step["kind"], folder / "ours" / step["folder"]) for step in source["steps"]]
        for file in sorted(layers[0][1].glob("*.parquet")):
            base = pq.read_table(file, columns=["own_id", "where"]).to_pylist()
            ids = [row["own_id"] or Path(row["where"]).stem for row in base]
            outcomes |= dict.fromkeys(ids, "kept")
            for kind, layer in layers[1:]:
                reasons = pq.read_table(layer / file.name, columns=["reason"]).column(0).to_pylist()
                outcomes |= {id_: kind for id_, reason in zip(ids, reasons, strict=True) if reason}
    return outcomes


def read_datatrove_outcomes(folder: Path, ids: set[str]) -> dict[str, str]:
    """Return document id -> the step of datatrove that dropped the document, or "kept"."""
    outcomes, inputs = dict.fromkeys(ids, "kept"), ids
    for step in STEPS:
        kept = {json.loads(line)["id"] for file in (folder / "peer" / step).rglob("*.jsonl.gz")
                for line in gzip.decompress(file.read_bytes()).splitlines()}
        outcomes |= dict.fromkeys(inputs - kept, step)
        inputs = kept
    return outcomes


def print_agreement(folder: Path, count: int) -> None:
    """Print for each step the documents that each pipeline keeps and how often both agree; and for each
    planted defect the steps that dropped its documents.

    The rules agree on a document if both pipelines keep it or both drop it. Later steps may keep different
    copies of a text, so they agree on a text if both keep as many of its copies. A step is compared on the
    documents or texts of which both pipelines have as many before the step.
    """
    corpus = generate_documents(count, *json.loads((folder / "corpus.json").read_text()))
    planted = {document["id"]: (kind, document["planted"]) for kind, document in corpus}
    ours = read_our_outcomes(folder)
    texts = {id_ for id_, (kind, _) in planted.items() if kind != "pdf" and ours.get(id_) != "language"}
    datatrove = read_datatrove_outcomes(folder, texts)

    def count_remaining(outcomes: dict[str, str], steps: tuple[str, ...], by_text: bool) -> Counter[str]:
        """Count the documents that none of the steps dropped: by document, or by original text."""
        remaining = [id_ for id_ in texts if outcomes.get(id_) not in steps]
        if by_text:
            remaining = [planted[id_][1].rpartition(":")[2] or id_ for id_ in remaining]
        return Counter(remaining)

    for place, step in enumerate(STEPS):
        by_text = step != "rules"
        ours_before = count_remaining(ours, STEPS[:place], by_text)
        ours_after = count_remaining(ours, STEPS[:place + 1], by_text)
        datatrove_before = count_remaining(datatrove, STEPS[:place], by_text)
        datatrove_after = count_remaining(datatrove, STEPS[:place + 1], by_text)
        compared = [key for key in ours_before if ours_before[key] == datatrove_before[key]]
        shares = []
        for kinds in (TEXT_FOLDERS, *((kind,) for kind in TEXT_FOLDERS)):
            agreed = [ours_after[key] == datatrove_after[key] for key in compared if planted[key][0] in kinds]
            shares.append(f"{'/'.join(kinds)} {100 * sum(agreed) / max(len(agreed), 1):.2f}")
        print(f"{step:<14} ours keeps {ours_after.total():,}, datatrove {datatrove_after.total():,}; "
              f"agreement in % of {len(compared):,}: {', '.join(shares)}")
    for defect in ("exact", "near", "contaminated", "spoiled", ""):
        ids = [id_ for id_, (_, name) in planted.items() if name.partition(":")[0] == defect]
        counts = [f"{side} {dict(Counter(outcomes.get(id_, 'not read') for id_ in ids).most_common(5))}"
                  for side, outcomes in (("ours", ours), ("datatrove", datatrove))]
        print(f"planted {defect or 'nothing'}, {len(ids):,}: {'; '.join(counts)}")


def compute_digest(folder: Path) -> str:
    """Return the first 12 digits of the SHA-256 of all output files, decompressed, with their names."""
    result = hashlib.sha256()
    for file in sorted(f for f in folder.rglob("*") if f.suffix in (".gz", ".parquet")):
        raw = file.read_bytes()
        result.update(str(file.relative_to(folder)).encode())
        result.update(gzip.decompress(raw) if file.suffix == ".gz" else raw)
    return result.hexdigest()[:12]


def kill_and_resume(folder: Path, peer: str, stage: str) -> None:
    """Kill a worker, then a whole command; resume, and compare with an undisturbed run of one worker."""
    import psutil

    output = folder / ("ours/text" if stage == "ours" else f"peer/{stage}")
    for victim in ("a worker", "the command"):
        process, children = start_stage(folder, peer, stage, 2), list[psutil.Process]()
        while len(children) < 2 or max(child.cpu_times().user for child in children) < KILL_AFTER_S:
            time.sleep(0.2)
            children = psutil.Process(process.pid).children(recursive=True)
        if victim == "a worker":
            max(children, key=lambda child: child.cpu_times().user).kill()
        else:
            process.kill()
        try:
            outcome = f"ends with {process.wait(WAIT_S)}"
        except subprocess.TimeoutExpired:
            process.kill()
            outcome = f"still waits {WAIT_S} s later"
        alive = psutil.wait_procs(children, timeout=5)[1]
        for child in alive:
            child.kill()
        print(f"{stage}: {victim} killed: the command {outcome}, {len(alive)} processes remain", flush=True)
    run_stage(folder, peer, stage, 2)
    resumed = compute_digest(output)
    shutil.rmtree(folder / ("ours" if stage == "ours" else "peer"))
    run_stage(folder, peer, stage, 1)
    print(f"{stage}: resumed {resumed}, undisturbed with one worker {compute_digest(output)}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--peer", help="interpreter with datatrove")
    for name, default in (("size-mb", 60), ("documents", 100_000), ("workers", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--peer-stage", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peer_stage:
        return run_datatrove_stage(args.folder, args.peer_stage, args.workers)
    size_mb = write_corpus(args.folder, args.documents, args.size_mb)
    print(f"{describe_machine()}\n{args.documents:,} documents, {size_mb:.1f} MB, {args.workers} workers",
          flush=True)
    for stage in ("ours", *STEPS):
        print(f"{stage:<14}{run_stage(args.folder, args.peer, stage, args.workers)}", flush=True)
    print_agreement(args.folder, args.documents)
    write_corpus(small := args.folder / "kills", args.documents // 10, args.size_mb / 10)
    for stage in ("ours", "rules"):
        kill_and_resume(small, args.peer, stage)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
