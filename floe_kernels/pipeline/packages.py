"""The optional packages that a run needs: missed before it starts, not when it is half done."""

from importlib.util import find_spec

from floe_kernels.pipeline.options import Options


def check_packages(options: Options) -> None:
    """Make sure that everything is installed that a run will need.

    Args:
        options: Of the run.

    Raises:
        ImportError: A package is missing; the message names the extra that brings it.

    Example:
        >>> check_packages(Options(rank=8))
    """
    needed = [
        ("transformers", "loading a model", "transformers"),
        ("safetensors", "saving an adapter", "transformers"),
        ("matplotlib", "drawing the report's plots", "cli"),
    ]
    if not options.rank:
        needed.append(("optuna", "searching for the rank", "search"))
        if options.sampler == "gp":
            needed.append(("scipy", "searching for the rank", "search"))
    for package, purpose, extra in needed:
        if find_spec(package) is None:
            raise ImportError(f"{purpose} needs {package}: pip install floe-kernels[{extra}]")
