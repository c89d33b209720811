"""The CPU kernels' steps under AddressSanitizer and UBSan; `make sanitize` has every sanitizer."""

import platform

import pytest
import sanitized

if sanitized.compiler() is None or platform.machine() != "x86_64":
    pytest.skip("needs a C++ compiler on x86-64", allow_module_level=True)


@pytest.mark.parametrize("steps", sanitized.STEPS)
def test_nothing_is_read_or_written_past_its_end(steps, tmp_path):
    code, said = sanitized.run(sanitized.build(steps, "address,undefined", tmp_path))
    assert code == 0, said
    assert said.splitlines()[0] == "default: 0 failures"
