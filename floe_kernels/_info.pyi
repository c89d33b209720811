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
        ``default``, ``avx2``, ``avx512``, ``avx512_bf16`` or ``amx``: until :func:`set_cpu_isa`
        chooses another, the best that the CPU and its operating system have, short of ``amx``,
        whose kernels are compiled and emulated, but not yet run.
    """

def cpu_isas() -> list[str]:
    """Return the instruction sets that this CPU and its operating system have.

    On a CPU with AMX, Linux is asked for its tiles: from then on a signal handler's stack must
    hold 8 KiB more.

    Returns:
        Their names, the best one last: what :func:`set_cpu_isa` takes.
    """

def set_cpu_isa(name: str) -> None:
    """Make the CPU kernels use another instruction set, from the next operator call on.

    Args:
        name: One of :func:`cpu_isas`. ``amx`` takes tiles for products of bfloat16, and is
            ``avx512_bf16`` in all else; no CPU has run its kernels yet.

    Raises:
        ValueError: ``name`` is no instruction set, or this CPU does not have it.
    """
