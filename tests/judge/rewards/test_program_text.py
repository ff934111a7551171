"""Extraction of the Python program from the Markdown of a response."""

import pytest

from megatron_sov.judge.rewards.program_text import (
    extract_program, find_definitions, find_entry_points, parse_python)

PRINTING = "print(5)\n"
FUNCTION = "def f(x):\n    return x + 1\n"


BLANKS = 'x = """a\n   \n  b"""\nprint(x)\n'
FENCE = 'def f(x):\n    """Add.\n\n    ```\n    f(1)\n    ```\n    """\n    return x + 1\n'


@pytest.mark.each(("response", "names", "program"), [
    # the last block of Python outside of thoughts counts
    ("<think>```python\nno\n```</think>One:\n```python\na = 1\n```\nor\n  ```py\nb = 2\n  ```\n"
     "```sh\nls\n```", (), "b = 2\n"), ("print(1)", (), "print(1)"),
    # a response without such a block is the program
    ("I cannot do this.", (), "I cannot do this."),
    ("```\nno program at all\n```", (), "```\nno program at all\n```"),
    ("```python\nbroken(\n```\n```\nno program\n```", (), "broken(\n"),
    # a fence inside a docstring does not end the block, and lines keep their blanks
    (f"```python\n{FENCE}```\n", ("f",), FENCE), (f"```python\n{BLANKS}```", (), BLANKS),
    ("1. ```python\n   x = 1\n   y = '''a\nb'''\n   ```", (), "x = 1\ny = '''a\nb'''\n")])
def test_program_of_a_response(response: str, names: tuple[str, ...], program: str) -> None:
    assert extract_program(response, names) == program


@pytest.mark.each("response", [
    f"```python\n{PRINTING}```\nOutput:\n```\n5\n```",
    f"```\n{PRINTING}```\nOutput:\n```\n5\n```\nand\n```\n[5]\n```",
    f"```python\n{PRINTING}```\n```output\nprint(6)\n```\n```text\nprint(7)\n```",
    "1. So:\n\n   ```python\n   print(5)\n   ```",
    "1. ```python\n   print(5)\n   ```",
    "- So:\n\t```python\n\tprint(5)\n\t```\n",
    "```python\n    print(5)\n```",
    f"```python\n{PRINTING}",
    f"So:\n```py\n{PRINTING}\n",
    f"Draft:\n```python\nprint(4)\nNow better:\n```python\n{PRINTING}```",
    f"~~~python\n{PRINTING}~~~\n",
    f"````python\n{PRINTING}````\n```\n4\n```",
    f"```Python3 title=\"a.py\"\n{PRINTING}```",
    f"``` python\r\n{PRINTING.strip()}\r\n```\r\n",
    f"```{{.python}}\n{PRINTING}```",
    f"```python\nprint(\n```\n```\n{PRINTING}```",
    f"````markdown\n```python\nprint(4)\n```\n````\n```python\n{PRINTING}```",
    f"Python:\n```python\n{PRINTING}```\nC:\n```c\nint main() {{}}\n```",
    f"```python\n{PRINTING}``` \nand more text `x`",
    "print(5)"])
def test_the_program_that_prints_is_found(response: str) -> None:
    assert extract_program(response).strip() == PRINTING.strip()


@pytest.mark.each("response", [
    f"```python\n{FUNCTION}```\nUsage:\n```python\nprint(f(1))\n```",
    f"```python\n{FUNCTION}```\nUsage:\n```python\nfrom solution import f\nprint(f(1))\n```",
    f"Draft:\n```python\ndef f(x): return 0\n```\nFinal:\n```python\n{FUNCTION}```",
    f"```python\ndef g(x): return 0\n```\n```python\n{FUNCTION}```\n```python\nassert f(1) == 2\n```",
    f"```python\n{FUNCTION}```\nIt prints\n```\n2\n```",
    f"```\n{FUNCTION}```\n```\n>>> f(1)\n2\n```",
    f"```python\n{FUNCTION}```\nor\n```python\ndef f(x:\n```",
    f"```python\n{FUNCTION}\nif __name__ == '__main__':\n    print(f(1))\n```\n```python\nprint(f(2))\n```",
    "1. Code:\n   ```python\n   def f(x):\n       return x + 1\n   ```\n"
    "2. Run:\n   ```python\n   f(1)\n   ```",
    FUNCTION])
@pytest.mark.each("names", [("f",), ("f", "List"), ()])
def test_the_program_that_tests_call_is_found(response: str, names: tuple[str, ...]) -> None:
    assert extract_program(response, names).startswith(FUNCTION.rstrip())


@pytest.mark.each("response", [
    "```" + " " * 300_000, "`" * 300_000, "```\n" * 20_000, " " * 300_000 + "```", "~~~" + "`" * 300_000,
    "1. " * 100_000 + "```", "```python\n" + "-" * 300_000 + "1\n```", "```python\n" + "(" * 300_000,
    "```\n" + "a" + ".b" * 100_000 + "\n```", "```python\n" + "if x: pass\nel" * 3000 + "if y: pass\n```"])
def test_long_lines_take_linear_time(response: str) -> None:
    assert isinstance(extract_program(response, ("f",)), str)


def test_top_level_definitions() -> None:
    tree = parse_python("import a\nfrom b import c\nif a:\n    def d(): x = 1\nelse:\n    e: int = 1\n"
                        "class F:\n    def g(self): pass\nh, (i, j) = 1, (2, 3)\nk[0] = 1\n"
                        "for _ in a:\n    l = 2\n")
    assert tree is not None and set(find_definitions(tree)) == {"d", "e", "F", "h", "i", "j", "l"}


@pytest.mark.each("source, found", [
    (FUNCTION, ["f"]), ("def g(): pass\ndef f(): return g()", ["f"]), ("def f(): return f()", ["f"]),
    ("def a(): pass\ndef b(): pass", ["a", "b"]), ("x = 1", []), ("def f(:", None),
    ("class A:\n    def m(self): return g()\ndef g(): pass\ndef f(): pass", ["f"]),
    ("async def f(): pass", ["f"]), ("f = lambda x: x", []), ("def f(): pass\nx = f()", ["f"]),
    ("def a(): return b()\ndef b(): return a()", ["a", "b"])])
def test_entry_points_are_functions_without_callers(source: str, found: list[str] | None) -> None:
    assert find_entry_points(source) == found
