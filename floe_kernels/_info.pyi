def build_info() -> dict[str, str]:
    """Return how this build was made.

    Returns:
        ``version``, ``build`` (cpu or cuda), ``compiler``, ``flags``, ``cxx_standard`` (the value
        of ``__cplusplus``) and ``torch_target_version`` (the oldest torch whose stable ABI ``_C``
        asks for).
    """

def cpu_isa() -> str:
    """Return the instruction set that the CPU kernels use.

    Returns:
        ``default``, ``avx2``, ``avx512``, ``avx512_bf16`` or ``amx``: the best that the CPU and
        its operating system have, until :func:`set_cpu_isa` chooses another.
    """

def set_cpu_isa(name: str) -> None:
    """Make the CPU kernels use another instruction set, from the next operator call on.

    Args:
        name: One that this CPU has; the error names them all.

    Raises:
        ValueError: ``name`` is no instruction set, or this CPU does not have it.
    """
