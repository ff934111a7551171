"""Programs that mean no harm do in a sandbox what they do outside."""

from __future__ import annotations

import pytest

from megatron_sov.sandbox.program import Program
from megatron_sov.sandbox.sandbox import Sandbox

HONEST = [
    ("print(sum(range(100)))", "4950"),
    ("print(2 ** 1000 % 1007)", str(2 ** 1000 % 1007)),
    ("a, b = map(int, input().split()); print(a + b)", "7"),
    ("import sys; print(len(sys.stdin.read()))", "4"),
    ("print(sum(map(int, open('/dev/stdin').read().split())))", "7"),
    ("from pathlib import Path; print(Path('/dev/stdin').read_text(), file=open('/dev/stdout', 'w'))", "3 4"),
    ("from collections import Counter; print(Counter('banana').most_common(1))", "[('a', 3)]"),
    ("import heapq; h = [3, 1, 2]; heapq.heapify(h); print(heapq.heappop(h))", "1"),
    ("import math; print(math.comb(10, 3), f'{math.pi:.3f}')", "120 3.142"),
    ("import re; print(re.findall(r'\\d+', 'a1b22'))", "['1', '22']"),
    ("import json; print(json.dumps({'b': [1, None], 'a': True}))", '{"b": [1, null], "a": true}'),
    ("import itertools; print(len(list(itertools.permutations(range(6)))))", "720"),
    ("from functools import lru_cache\n@lru_cache(None)\ndef f(n): return n if n < 2 else f(n-1) + f(n-2)\n"
     "print(f(200))", "280571172992510140037611932413038677189525"),
    ("import sys; sys.setrecursionlimit(9000)\ndef f(n): return n and 1 + f(n - 1)\nprint(f(8000))", "8000"),
    ("from datetime import date; print(date(2024, 2, 29).isoformat())", "2024-02-29"),
    ("from fractions import Fraction as F; print(F(1, 3) + F(1, 6))", "1/2"),
    ("from decimal import Decimal; print(Decimal('0.1') * 3)", "0.3"),
    ("with open('x.txt', 'w') as f: f.write('한국어')\nprint(open('x.txt').read())", "한국어"),
    ("import tempfile, os\nwith tempfile.TemporaryDirectory() as d:\n    open(d + '/x', 'w').close()\n"
     "    print(os.listdir(d))", "['x']"),
    ("import shutil, os\nopen('a', 'w').write('x')\nshutil.copy('a', 'b'); shutil.copytree('.', 'd')\n"
     "shutil.rmtree('d'); print(open('b').read())", "x"),
    ("import subprocess, sys; print(subprocess.run(['sh', '-c', 'echo $((6 * 7))'], capture_output=True,"
     " text=True).stdout.strip())", "42"),
    ("import threading\nfound = []\n"
     "ts = [threading.Thread(target=found.append, args=(i,)) for i in range(8)]\n"
     "[t.start() for t in ts]; [t.join() for t in ts]; print(sorted(found))", "[0, 1, 2, 3, 4, 5, 6, 7]"),
    ("from concurrent.futures import ThreadPoolExecutor as P\nwith P(4) as p:\n"
     "    print(list(p.map(lambda x: x * x, range(5))))", "[0, 1, 4, 9, 16]"),
    ("import asyncio\nasync def f():\n    await asyncio.sleep(0.01)\n    return 5\nprint(asyncio.run(f()))",
     "5"),
    ("import os\nr, w = os.pipe()\nif os.fork() == 0:\n    os.write(w, b'child'); os._exit(0)\nos.wait()\n"
     "print(os.read(r, 9).decode())", "child"),
    ("import sqlite3; c = sqlite3.connect('x.db'); c.execute('create table t (a)')\n"
     "c.execute('insert into t values (3)'); c.commit(); print(c.execute('select * from t').fetchall())",
     "[(3,)]"),
    ("import random; random.seed(1); print(random.randint(1, 10 ** 6))", "140892"),
    ("import hashlib, zlib, base64; print(hashlib.sha256(b'x').hexdigest()[:8], zlib.crc32(b'x'), "
     "base64.b64encode(b'x').decode())", "2d711642 2363233923 eA=="),
    ("import pickle; print(pickle.loads(pickle.dumps({'a': (1, 2)})))", "{'a': (1, 2)}"),
    ("import signal\nsignal.signal(signal.SIGALRM, lambda *a: print('rang'))\nsignal.setitimer("
     "signal.ITIMER_REAL, 0.01); signal.pause()", "rang"),
    ("import dataclasses, enum, typing\n@dataclasses.dataclass\nclass A:\n    x: int = 3\nprint(A())",
     "A(x=3)"),
    ("import unittest\nclass T(unittest.TestCase):\n    def test(self): self.assertEqual(1, 1)\n"
     "print(unittest.TextTestRunner(verbosity=0).run(unittest.defaultTestLoader.loadTestsFromTestCase(T))"
     ".wasSuccessful())", "True"),
    ("import socket; a, b = socket.socketpair(); a.sendall(b'pair'); print(b.recv(9).decode())", "pair"),
    ("print('end')\nexit()\nprint('no')", "end"), ("print('end'); quit(0)", "end"),
    ("import numpy as np; print((np.arange(4).reshape(2, 2) @ np.eye(2)).sum())", "6.0"),
    ("import numpy as np; print(np.linalg.solve(np.eye(2) * 2, [2, 4]), np.random.default_rng(0).integers(9)"
     ")", "[1. 2.] 7"),
    ("import sys; print(len(str(3 ** 20_000)), int('7' * 5000) % 10)", "9543 7"),
    ("print(sorted({'b', 'a'}), {3, 1, 2}, len({str(i) for i in range(999)}))", "['a', 'b'] {1, 2, 3} 999"),
]


def test_honest_programs_are_not_affected(sandbox: Sandbox) -> None:
    programs = [Program(source, stdin="3 4\n") for source, _ in HONEST]
    for outcome, (source, expected) in zip(sandbox.run_many(programs), HONEST, strict=True):
        assert (outcome.status, outcome.stdout.strip()) == ("ok", expected), (source, outcome)
        assert outcome.stderr == "" or "unittest" in source


@pytest.mark.parametrize("package", ["torch", "pytest", "safetensors", "megatron_sov"])
def test_numpy_is_all_that_programs_have_of_this_environment(sandbox: Sandbox, package: str) -> None:
    source = f"""
import os
import numpy
around = os.path.dirname(os.path.dirname(numpy.__file__))
for path in ("{package}/__init__.py", "{package}"):
    try:
        print(open(around + "/" + path).read(1) or "read", os.listdir(around + "/" + path))
    except OSError:
        pass
try:
    print(set(os.listdir(around)) - {{"numpy", "numpy.libs"}} or "")
except OSError:
    print()
try:
    open(numpy.__file__, "a")
    print("written")
except OSError:
    pass
import {package}
"""
    outcome = sandbox.run(Program(source))
    assert (outcome.status, outcome.stdout.strip()) == ("error", ""), outcome
    assert f"No module named '{package}'" in outcome.stderr
