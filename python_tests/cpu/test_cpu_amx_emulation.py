"""What multiplies with AMX's tiles, on tiles in software, under AddressSanitizer and UBSan.

The steps' own programs have them as well, beside every other instruction set: test_cpu_sanitizers.
"""

import pytest
import sanitized

if sanitized.compiler() is None:
    pytest.skip("there is no C++ compiler", allow_module_level=True)


@pytest.mark.parametrize("program", sanitized.EMULATED)
def test_equals_float64_within_its_roundings(program, tmp_path):
    code, said = sanitized.run(sanitized.build(program, "address,undefined", tmp_path))
    assert code == 0, said
    assert said == "amx, emulated: 0 failures\n"
