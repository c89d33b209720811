"""The CUDA C++ compiles and links for sm_80 and sm_90a: no spills, and the instructions meant.

What a compiler says is no proof of speed, and a kernel that only compiled has not run.
"""

import nvcc
import pytest

pytestmark = pytest.mark.skipif(nvcc.why_not() is not None, reason=str(nvcc.why_not()))

# (source, kernel): registers, threads and blocks that must fit a multiprocessor at once
KERNELS = {
    ("routing.cu", "topk_softmax_kernel<"): (128, 128, 4),
    ("routing.cu", "count_pairs_kernel"): (64, 256, 4),
    ("routing.cu", "place_pairs_kernel"): (64, 256, 4),
    ("grad_square.cu", "16> >"): (128, 128, 4),
    ("grad_square.cu", "MmaTile<__nv_bfloat16, 32>"): (128, 128, 4),
    ("grad_square.cu", "MmaTile<__nv_bfloat16, 64>"): (128, 256, 2),
    ("grad_square.cu", "MmaTile<__half, 128>"): (128, 512, 1),
    ("grad_square.cu", "FmaTile<float, 64>"): (255, 256, 1),
    ("grad_square.cu", "finish_kernel<"): (40, 256, 6),
    ("grad_square.cu", "grad_square_norms_kernel"): (64, 256, 4),
    ("linear_grad_square.cu", "MmaSquare<"): (255, 256, 1),
    ("linear_grad_square.cu", "FmaSquare>"): (255, 256, 1),
}
SOURCES = sorted({source for source, _ in KERNELS})
REGISTERS = 65536  # of a multiprocessor


@pytest.fixture(scope="module", params=SOURCES)
def compiled(request):
    return nvcc.compile(request.param)


def test_spills_nothing_and_has_no_static_shared_memory(compiled):
    assert {kernel.arch for kernel in compiled.kernels} == {"80", "90a"}
    for kernel in compiled.kernels:
        assert kernel.spills == 0, kernel
        assert kernel.shared == 0, kernel  # the launcher asks for what there is


def test_registers_leave_room(compiled):
    rules = {w: v for (source, w), v in KERNELS.items() if source.startswith(compiled.path.stem)}
    for word, (most, threads, blocks) in rules.items():
        assert most * threads * blocks <= REGISTERS
        for kernel in compiled.named(word):
            assert kernel.registers <= most, kernel


def test_uses_the_instructions_that_it_is_made_of(compiled):
    if nvcc.find_tool("cuobjdump") is None:
        pytest.skip("cuobjdump is neither in Triton's wheel nor beside nvcc")
    opcodes = compiled.opcodes()
    for kernel in compiled.kernels:
        found = opcodes[kernel.arch, kernel.symbol]
        if "Mma" in kernel.name:  # tensor cores, ldmatrix, cp.async
            assert all(found[code] for code in ("HMMA", "LDSM", "LDGSTS")), kernel
        elif "Fma" in kernel.name:
            assert found["LDGSTS"], kernel
            assert found["FFMA"] >= 16, kernel
            assert not found["HMMA"], kernel
        elif "pairs_kernel" in kernel.name:
            assert found["MATCH"], kernel
        assert not any(code.startswith(("RED", "ATOM")) and code != "REDUX" for code in found), (
            kernel  # the bits would depend on who comes first
        )


def test_links():
    library = nvcc.link(*(nvcc.compile(source) for source in SOURCES))
    assert library.stat().st_size > 100_000
