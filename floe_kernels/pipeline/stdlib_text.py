"""Text that every Python brings along: the documented functions of its standard library."""

import ast
import random
import sysconfig
import textwrap
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

SKIPPED = (
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "idlelib",
    "turtledemo",
    "__pycache__",
)
HELD_OUT = 0.2  # of the modules


class StdlibText(NamedTuple):
    """Functions to train on, and functions of other modules held out."""

    train: list[str]
    held_out: list[str]


def stdlib_text(train_chars: int, held_out_chars: int, seed: int) -> StdlibText:
    """Collect functions with docstrings from the installed standard library.

    Modules are drawn by the seed, a fifth of them held out, and read until there is enough text;
    no module is on both sides. Tests and IDLE are left out.

    Args:
        train_chars: Characters wanted to train on.
        held_out_chars: Characters wanted held out.
        seed: Of the draw.

    Returns:
        The functions' sources, dedented; the last one may exceed what was wanted.

    Raises:
        FileNotFoundError: The library's sources are not installed.

    Example:
        >>> text = stdlib_text(2_000, 1_000, seed=0)
        >>> sum(map(len, text.train)) >= 2_000, text.train[0].lstrip("@").split()[0] != ""
        (True, True)
    """
    root = Path(sysconfig.get_path("stdlib"))
    modules = sorted(
        path for path in root.rglob("*.py") if not set(path.relative_to(root).parts) & set(SKIPPED)
    )
    if len(modules) < 2:
        raise FileNotFoundError(f"the sources of Python's standard library must be in {root}")
    random.Random(f"modules {seed}").shuffle(modules)
    cut = max(1, round(HELD_OUT * len(modules)))
    return StdlibText(_collect(modules[cut:], train_chars), _collect(modules[:cut], held_out_chars))


def documented_functions(source: str) -> Iterator[str]:
    r"""Yield the source of every function in ``source`` that has a docstring, dedented.

    Args:
        source: Python code; what does not parse yields nothing.

    Example:
        >>> list(documented_functions("class A:\n  def f(self):\n    'Do it.'\n"))
        ["def f(self):\n  'Do it.'"]
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old modules have odd escapes
            tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return
    lines = source.split("\n")  # a form feed is no line end to the parser
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and ast.get_docstring(node):
            first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
            yield textwrap.dedent("\n".join(lines[first - 1 : node.end_lineno]))


def _collect(modules: list[Path], chars: int) -> list[str]:
    functions: list[str] = []
    size = 0
    for path in modules:
        if size >= chars:
            break
        for function in documented_functions(path.read_text(encoding="utf-8", errors="replace")):
            if size < chars:
                functions.append(function)
                size += len(function)
    return functions
