"""Every comparison with the reference once more, on the tiles of a CPU that has them."""

import pytest

_info = pytest.importorskip("floe_kernels._info", reason="the native extensions are not built")
if "amx" not in _info.cpu_isas():
    pytest.skip("this CPU has no AMX, or its operating system keeps it", allow_module_level=True)

from test_cpu_grad_square import test_matches_reference as test_segment_grad_square  # noqa: E402
from test_cpu_moe_lora import test_backward_matches_reference as test_backward  # noqa: E402
from test_cpu_moe_lora import test_fisher_matches_reference as test_fisher  # noqa: E402
from test_cpu_moe_lora import test_forward_matches_reference as test_forward  # noqa: E402

__all__ = ["test_backward", "test_fisher", "test_forward", "test_segment_grad_square"]


@pytest.fixture
def isa():
    """Run on tiles, then on what was chosen before."""
    before = _info.cpu_isa()
    _info.set_cpu_isa("amx")
    yield "amx"
    _info.set_cpu_isa(before)
