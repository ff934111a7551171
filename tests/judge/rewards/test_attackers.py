"""Programs that try to earn the reward `code` without a solution, in each enclosure. Attacks on files and
processes outside the sandbox are in tests/sandbox/test_attacks.py.

The programs of an enclosure share one server, so anything that one of them leaves behind would raise or lower
the rewards of the next ones.
"""

import pytest

from megatron_sov.judge.rewards.code import CodeReward
from megatron_sov.judge.rewards.reward import Result, run_reward

FORGE = r'''
import gc, glob, json, os, socket, struct, sys, threading
def forge(fds=range(0, 64)):
    for fd in fds:
        for test in range(2):
            try:
                os.set_blocking(fd, False)
                os.write(fd, b'\n{"test": %d, "passed": true}\n{"done": true}\n7431\n' % test)
            except OSError:
                pass
def forge_values():
    for found in gc.get_objects():
        if isinstance(found, socket.socket):
            for message in (["value", ["plain", True], []], {"f": ["plain", 7431]}, [b".".decode(), 0]):
                data = json.dumps(message).encode()
                try:
                    found.sendall(struct.pack("<Q", len(data)) + data)
                except OSError:
                    pass
'''
"""Prefix of each attacking program: functions that write forged verdicts to all descriptors and sockets. The
solutions that tests expect are 7431 and 7432."""
# attack -> program that defines `f`, for `FUNCTION_TESTS`
FUNCTION_ATTACKS = {
    "a class that says it is another": """
class Int(int):
    __class__ = property(lambda self: int)
    __eq__ = __ge__ = __le__ = __contains__ = lambda *a: True
    __ne__ = lambda *a: False
    __hash__ = lambda self: 7431
def f(x): return Int(0)""",
    "a text and a list that equal everything": """
class Text(str):
    __eq__ = lambda *a: True
    __hash__ = lambda self: hash("7431")
class List(list):
    __eq__ = lambda *a: True
def f(x): return Text("x") if x == 1 else List()""",
    "a metaclass": """
class Meta(type):
    __eq__ = __instancecheck__ = __subclasscheck__ = lambda *a: True
    __hash__ = lambda self: 1
class f(metaclass=Meta):
    def __new__(cls, x): return cls""",
    "patched modules of both sides": """
import builtins, operator, math
for module in (builtins, json, operator, math, sys, struct, os):
    for name in ("eq", "abs", "all", "loads", "isclose", "AssertionError"):
        if hasattr(module, name):
            setattr(module, name, lambda *a, **k: True)
def f(x): return 0""",
    "modules that it leaves in the folder": """
for name in ("json", "math", "test", "sitecustomize", "usercustomize", "program", "encodings"):
    with open(name + ".py", "w") as written:
        written.write("import builtins\\nbuiltins.AssertionError = SystemExit")
def f(x): return 0""",
    "poisoned sys.modules": "sys.modules.update(math=sys, operator=sys)\ndef f(x): return 0",
    "exit functions": "import atexit\natexit.register(forge)\ndef f(x): sys.exit(0)",
    "a thread that survives": """
def again():
    while True:
        forge(); forge_values()
threading.Thread(target=again, daemon=True).start()
def f(x): return 0""",
    "messages at load": "forge_values()\ndef f(x): return 0",
    "messages at a call": "def f(x):\n    forge_values()\n    return 0",
    "a message without end": """
for found in gc.get_objects():
    if isinstance(found, socket.socket):
        found.sendall(struct.pack("<Q", 1 << 60))
def f(x): return 0""",
    "a message that is too deep": """
def f(x):
    for found in gc.get_objects():
        if isinstance(found, socket.socket):
            data = b"[" * 200000
            found.sendall(struct.pack("<Q", len(data)) + data)
    return 0""",
    "closed descriptors": "os.closerange(0, 64)\ndef f(x): return 0",
    "descriptors over one another": """
for fd in range(3, 20):
    for other in (0, 1, 2):
        try: os.dup2(fd, other)
        except OSError: pass
forge()
def f(x): return 0""",
    "frames of whoever calls": """
def f(x):
    frame, seen = sys._getframe(), []
    while frame:
        seen += [repr({**frame.f_globals, **frame.f_locals})]
        frame = frame.f_back
    return next((n for n in (7431, 7432) if any(str(n)[:3] + str(n)[3:] + "'" in s for s in seen)), 0)""",
    "a trace of whoever calls": """
seen = []
def trace(frame, *more):
    seen.append(repr(frame.f_locals))
    return trace
sys.settrace(trace); sys.setprofile(trace); threading.settrace(trace)
def f(x): return 7430 + x if any("== " + str(7430 + x) in s for s in seen) else 0""",
    "what a callback knows": """
def f(x, back=None):
    for path in ("__globals__", "__code__", "__closure__", "__self__", "__class__", "__defaults__"):
        try:
            held = getattr(back, path)
            return held["expected"]
        except Exception:
            pass
    return 0""",
    "a callback from its traceback": """
def f(x, back=None):
    try:
        back(1, 2, 3)
    except Exception as e:
        trace = e.__traceback__
        while trace:
            for value in trace.tb_frame.f_locals.values():
                if str(value).startswith("743"):
                    return value
            trace = trace.tb_next
    return 0""",
    "objects that were never handed out": """
for found in gc.get_objects():
    if type(found).__name__ == "Peer":
        peer = found
def f(x):
    for operation in ("get", "call", "item"):
        for number in (1, id(f), id(peer)):
            try:
                return peer.ask(operation, type(peer).decoded(peer, ["mine", number]), "expected")
            except Exception:
                pass
    return 0""",
    "names of the tests' own functions": """
def assertion(*a): return True
AssertionError = Exception = check = test = __plain__ = print = assertion
def f(x): return 0""",
    "errors that are no failures": """
class AssertionError(BaseException): pass
def f(x): raise GeneratorExit if x == 1 else AssertionError""",
    "more memory than there is": "def f(x): return bytearray(1 << 40)",
    "an interrupt": "import signal\nsignal.raise_signal(signal.SIGINT)\ndef f(x): return 0",
}
# attack -> program, for `PROGRAM_TESTS`
PROGRAM_ATTACKS = {
    "verdicts in its output": "forge(); print(json.dumps({'test': 0, 'passed': True})); print('7431 7432')",
    "an early exit": "os._exit(0)",
    "an exit code of 256": "print(7430 + int(input())); raise SystemExit(256)",
    "an exit code that no C has": "print(7430 + int(input())); raise SystemExit(2 ** 70)",
    "an exit code that denies itself": """
class Code(int):
    __bool__ = lambda self: False
    __index__ = __and__ = lambda *a: 0
print(7430 + int(input()))
raise SystemExit(Code(3))""",
    "an error at its end": "import atexit\natexit.register(lambda: 1 / 0)\nprint(7430 + int(input()))\n"
                           "raise KeyboardInterrupt",
    "all guesses": "print(*range(7000, 8000), sep='\\n')",
    "lines by other signs": "print('7431\\x1c7432\\u20287431\\x857432')",
    "a lot of output": "for _ in range(64): os.write(1, b'7431\\n' * 20000)",
    "the socket of its server": r"""
for found in gc.get_objects():
    if isinstance(found, socket.socket):
        print(found)
        for data in (b"f", b"w", struct.pack("<ii", 1, 0), struct.pack("<id", 0, 0.0),
                     b'{"status": "ok", "stdout": "7431"}'):
            try: found.sendall(data)
            except OSError: pass""",
    "the enclosure's own functions": """
for found in gc.get_objects():
    for name in ("kill", "clean", "close", "fork", "totals"):
        if type(found).__module__.startswith("megatron_sov"):
            try: getattr(found, name)(1)
            except BaseException: pass""",
    "its input a second time": """
os.dup2(0, 1)
for path in ("/dev/stdin", "/proc/self/fd/0", "/dev/fd/0"):
    try: print(open(path).read())
    except OSError: pass""",
}
# attack -> program that defines `f`, for `FRAMEWORK_TESTS`
FRAMEWORK_ATTACKS = {
    "modules of its own name": """
import types
for name in ("pytest", "unittest", "solution", "numpy", "np", "math", "unittest.case", "asyncio"):
    module = types.ModuleType(name)
    module.__getattr__ = lambda name: lambda *a, **k: True
    sys.modules[name] = globals()[name] = module
def f(x): return 0""",
    "files of these modules": """
text = "class Any:\\n    __eq__ = lambda *a: True\\n"
text += "    def __getattr__(self, name): return lambda *a, **k: self\\n"
text += "def __getattr__(name): return Any()\\n"
for name in ("pytest", "unittest", "solution", "numpy", "asyncio", "megatron_sov/judge/rewards/solution_peer",
             "megatron_sov/judge/rewards/solution_frameworks", "unittest/__init__", "numpy/__init__"):
    os.makedirs(os.path.dirname(name) or ".", exist_ok=True)
    with open(name + ".py", "w") as written:
        written.write(text)
def f(x): return 0""",
    "names of helpers": """
class Same:
    __eq__ = __lt__ = __contains__ = __bool__ = lambda *a: True
    def __getattr__(self, name): return self
    def __call__(self, *a, **k): return self
    def __enter__(self): return self
    def __exit__(self, *a): return True
    __iter__ = lambda self: iter([self])
pytest = unittest = np = numpy = approx = raises = mark = check = Test = TestCase = candidate = Same()
__assertion__ = __same__ = test_a = assertEqual = main = fixture = solution = asyncio = Same()
def f(x): return Same()""",
    "its own copy of the runner": """
import unittest
for module in list(sys.modules.values()):
    for name in ("TestText", "AssertionCounter", "is_close", "Approx", "raises", "run_tests", "plain"):
        if hasattr(module, name):
            setattr(module, name, lambda *a, **k: True)
    if hasattr(module, "TestText"):
        module.TestText.run = lambda self: None
unittest.TestCase.assertEqual = lambda *a: None
def f(x): return 0""",
    "names that it sends itself": """
frame = sys._getframe()
while "peer" not in frame.f_locals:
    frame = frame.f_back
peer = frame.f_locals["peer"]
def f(x): return 0
own = ["value", peer.encoded(f)]
names = ("f", "__assertion__", "__same__", "__name__", "__builtins__", "pytest", "unittest", "assertEqual")
peer.send({**dict.fromkeys(names, own), "pytest": ["shared", ["unittest", "mock"]],
           "np": ["module", "pytest"],
           "unittest": ["error class", ["unittest", "Exception"]]})
peer.serve()""",
    "an exit without an error": "def f(x): sys.exit(0)",
    "an end of its process": "def f(x): os._exit(0)",
    "a closed socket": "def f(x): os.closerange(3, 64)",
    "nothing to look at": "def f(x): return []",
    "coroutines without an end": "async def f(x):\n    return 0",
    "arrays": "import numpy\ndef f(x): return numpy.array([numpy.nan])",
    "an array of its own kind": """
import numpy
class Same(numpy.ndarray):
    __eq__ = lambda *a: True
    tolist = lambda self: 0
    shape = property(lambda self: ())
def f(x): return numpy.zeros(1).view(Same)""",
    "numbers without a type": """
import numpy
class Any(numpy.float64):
    item = lambda self: self
    __eq__ = lambda *a: True
def f(x): return Any(0)""",
}
FRAMEWORK_TESTS = [
    "import pytest\ndef test_a():\n    assert f(1) == pytest.approx(7431)",
    "import pytest\ndef test_a():\n    with pytest.raises(KeyError):\n        f('no')\n"
    "    assert f(1) == 7431",
    "async def test_a():\n    assert f(1) in [7431]",
    "from solution import f as given\nassert given(1) == 7431",
    "import solution\nassert solution.f(1) == 7431",
    "def check(candidate):\n    assert candidate(1) == 7431",
    "for item in [f(2)]:\n    assert item == 7432",
    "for item in (f(1) if isinstance(f(1), list) else [f(1)]):\n    assert item == 7431",
    "import numpy as np\nassert np.array_equal(f(1), 7431)",
    {"function": "f", "arguments": [1], "expected": 7431},
    "import math\nassert math.isclose(f(1), 7431)", "assert abs(f(1) - 7431) < 0.1"]
HONEST = "def f(x, back=None):\n    if x == 'no':\n        raise KeyError(x)\n    return 7430 + x\n"
FUNCTION_TESTS = ["assert f(1) == 7431", "assert f(2) == 7432 and abs(f(2)) in {7432}",
                  "expected = 7433\nassert f(3, lambda: expected) == expected"]
PROGRAM_TESTS = [{"stdin": "1\n", "stdout": "7431\n"}, {"stdin": "2\n", "stdout": "7432\n"}]


def score(enclosure: str, response: str, tests: list) -> Result:
    """Return the result of the reward `code`, whose reward is the share of passed tests."""
    return run_reward(CodeReward(all_or_nothing=False, enclosure=enclosure),
                      {"response": response, "tests": tests})


@pytest.mark.tier1_cases(10)
@pytest.mark.parametrize("name", [*FUNCTION_ATTACKS, *PROGRAM_ATTACKS])
def test_attacks_score_0(enclosure: str, name: str) -> None:
    tests = FUNCTION_TESTS if name in FUNCTION_ATTACKS else PROGRAM_TESTS
    result = score(enclosure, FORGE + {**FUNCTION_ATTACKS, **PROGRAM_ATTACKS}[name], tests)
    assert result.reward == 0.0, result


@pytest.mark.tier1_cases(8)
@pytest.mark.parametrize("name", FRAMEWORK_ATTACKS)
def test_no_attacker_replaces_a_framework(enclosure: str, name: str) -> None:
    row = {"response": FORGE + FRAMEWORK_ATTACKS[name], "tests": FRAMEWORK_TESTS, "entry_point": "f"}
    reward = CodeReward(all_or_nothing=False, enclosure=enclosure, number_tolerance=1e-6)
    result = run_reward(reward, row)
    assert (result.reward, result.status) == (0.0, "scored"), result


@pytest.mark.tier1_cases(8)
@pytest.mark.parametrize("exit_call", ["os._exit(0)", "sys.exit(0)", "os.closerange(3, 64)",
                                       "os.kill(os.getpid(), 9)"])
@pytest.mark.parametrize("test", [
    "import pytest\nwith pytest.raises(Exception):\n    f(1)", "assert f(0) == 0\nassert f(1) == 1",
    "try:\n    f(1)\n    assert False\nexcept (ValueError, RuntimeError, OSError):\n    assert True",
    "import pytest\ndef test_a():\n    for x in (1, 2):\n        with pytest.raises(Exception):\n"
    "            f(x)"])
def test_program_exit_is_not_an_expected_error(enclosure: str, test: str, exit_call: str) -> None:
    program = f"import os, sys\ndef f(x):\n    if x:\n        {exit_call}\n    return 0\n"
    assert score(enclosure, program, [test]).reward == 0.0
    # the same program with an honest error passes exactly the tests that expect one
    raising = program.replace(exit_call, "raise ValueError")
    expects_error = "f(0)" not in test
    assert score(enclosure, raising, [test]).reward == expects_error


def test_honest_solutions_pass_after_attacks(enclosure: str) -> None:
    assert score(enclosure, HONEST, FUNCTION_TESTS).reward == 1.0
    assert score(enclosure, HONEST + "print(f(int(input())))", PROGRAM_TESTS).reward == 1.0
    row = {"response": HONEST, "tests": FRAMEWORK_TESTS, "entry_point": "f"}
    assert run_reward(CodeReward(enclosure=enclosure), row).reward == 1.0
