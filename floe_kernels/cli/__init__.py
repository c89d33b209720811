"""The command line: ``floe``, or ``python -m floe_kernels``."""

import sys


def main() -> None:
    """Run the command that the process was started with, and leave with its exit code.

    0: done. 1: it could not be done, and one sentence on stderr says why. 2: it was asked for in
    the wrong way. 130: interrupted.
    """
    try:
        from floe_kernels.cli.app import run
    except ModuleNotFoundError as error:
        if error.name not in ("typer", "rich"):
            raise
        sys.exit(f"error: the command line needs {error.name}: pip install floe-kernels[cli]")
    sys.exit(run(sys.argv[1:]))
