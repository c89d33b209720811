"""Which commands there are, and how all of them fail."""

import signal
import threading
import traceback
import warnings
from collections.abc import Sequence
from types import FrameType
from typing import Any

import typer
from rich.console import Console

from floe_kernels.cli import bench, compare, demo, evaluate, info, plan, score, show, train, tune
from floe_kernels.cli.arguments import AskedWrongly

# click's, which newer typers bring themselves
USAGE_ERROR: type[Exception] = typer.BadParameter.__bases__[0]
INTERRUPTED = 130

app = typer.Typer(
    name="floe",
    help="Find out which layers of a language model deserve experts, and train them: FLoE, beside "
    "LoRA-SMoE, AlphaLoRA, LayerIF, MoLA and controls. "
    "--debug anywhere shows the traceback of an error.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
for module in (tune, score, plan, train, evaluate, compare, show, info, bench, demo):
    app.command(name=module.__name__.rpartition(".")[2])(module.command)


def run(arguments: Sequence[str]) -> int:
    """Run one command.

    Args:
        arguments: What follows ``floe``.

    Returns:
        The exit code; see :func:`floe_kernels.cli.main`.
    """
    debug = "--debug" in arguments
    rest = [argument for argument in arguments if argument != "--debug"] or ["--help"]
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _terminate)
    with warnings.catch_warnings():
        warnings.filterwarnings("always", "the plan was made on")
        warnings.showwarning = _warn
        return _run(rest, debug)


def _run(rest: list[str], debug: bool) -> int:
    try:
        code = app(rest, prog_name="floe", standalone_mode=False)
        return code if isinstance(code, int) else 0
    except (KeyboardInterrupt, typer.Abort):
        return INTERRUPTED
    except USAGE_ERROR as error:
        message = str(getattr(error, "format_message", error.__str__)())
        return _fail(f"{message} (floe {' '.join(rest[:1])} --help lists what there is)", 2, debug)
    except AskedWrongly as error:
        return _fail(str(error), 2, debug)
    except (ValueError, ArithmeticError, ImportError, OSError) as error:
        return _fail(no_cache(error) or sentence(error), 1, debug)
    except Exception as error:
        what = f"{type(error).__name__}: {error}".splitlines()[0]
        return _fail(no_cache(error) or f"unexpected {what} (--debug shows where)", 1, debug)


def sentence(error: BaseException) -> str:
    """Put an error in one line.

    Example:
        >>> sentence(FileNotFoundError(2, "No such file or directory", "data.json"))
        'data.json: No such file or directory'
    """
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines) or type(error).__name__


def no_cache(error: Exception) -> str | None:
    """Say that torch has no place for its compiler's cache, if that is what an error comes from.

    torch makes the folder when its compiler is imported, which transformers does and tries again
    where it failed; what arrives here is then an AssertionError about the second attempt.

    Args:
        error: What a command ended with.

    Returns:
        One sentence, or None if the folder can be made or the error is of another file.
    """
    try:
        from torch._inductor.runtime.cache_dir_utils import cache_dir

        cache_dir()
    except OSError as why:
        if isinstance(error, OSError) and error.filename != why.filename:
            return None
        return (
            f"torch cannot make the folder of its cache, {sentence(why)}: "
            "set TORCHINDUCTOR_CACHE_DIR to a folder that can be written"
        )
    except ImportError:  # another torch keeps the function elsewhere
        pass
    return None


def _warn(message: Warning | str, *_where: Any, **_more: Any) -> None:
    _error(f"warning: {message}".splitlines()[0])


def _fail(message: str, code: int, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    _error(f"error: {message}")
    return code


def _error(line: str) -> None:
    Console(stderr=True, markup=False, highlight=False, soft_wrap=True).print(line)


def _terminate(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt
