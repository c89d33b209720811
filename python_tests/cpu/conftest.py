"""Every test that asks for ``isa`` runs once on each instruction set that this machine has."""

import pytest

try:
    from floe_kernels import _info
except ImportError:  # without the extensions such tests skip themselves
    _info = None


@pytest.fixture(params=_info.cpu_isas() if _info else ["none"])
def isa(request):
    """Run on one instruction set, then on the one from before."""
    before = _info.cpu_isa()
    _info.set_cpu_isa(request.param)
    yield request.param
    _info.set_cpu_isa(before)
