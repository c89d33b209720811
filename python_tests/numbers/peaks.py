"""How much resident memory each public function takes at its peak, beyond its arguments.

    python python_tests/numbers/peaks.py float32 bfloat16     JSON: function, case, dims, bytes

A process of its own, because malloc must hand freed memory back at once for this.
"""

import ctypes
import json
import sys
from functools import partial

import torch

from floe_kernels import functional as FK
from floe_kernels.functional.shared_inputs import ExpertLinear, moe_lora_shared_linear

M_MMAP_THRESHOLD = -3
SIBLINGS = 3
#: dense, dense with one A, grouped
LAYERS = {
    "dense": {"N": 8192, "I": 512, "O": 256, "E": 4, "K": 4, "r": 16},
    "shared A": {"N": 8192, "I": 256, "O": 128, "E": 4, "K": 4, "r": 64},
    "grouped": {"N": 8192, "I": 128, "O": 256, "E": 8, "K": 2, "r": 64},
}


def status(key):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith(key)) * 1024


def peak(function, before=None):
    """Call twice, the second time on the clock; return the highest resident memory it added."""
    for _ in range(2):
        prepared = None if before is None else before()
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # the highest so far is what there is now
        start = status("VmRSS")
        result = function() if before is None else function(prepared)
        highest = status("VmHWM") - start
        del result, prepared
    return highest


def drawn(dtype, *shape):
    return torch.randn(*shape, dtype=torch.float32).to(dtype)


def layers(dtype):
    for regime, dims in LAYERS.items():
        n, i, o, e, k, r = dims.values()
        c = r if regime == "shared A" else e * r
        shapes = ((n, i), (c, i), (e * r, o), (e, i))
        known = {**dims, "R": e * r, "C": c, "b": dtype.itemsize}
        known["W"] = c * i + e * r * o + e * i
        known["G"] = k * r if regime == "grouped" else 0
        weight, base, grad = drawn(dtype, o, i), drawn(dtype, n, o), drawn(dtype, n, o)
        leaves = [drawn(dtype, *shape).requires_grad_() for shape in shapes]
        x, *adapter = leaves
        rest = {"ranks": [r] * e, "top_k": k, "shared_A": regime == "shared A"}
        own = ExpertLinear(weight, None, *adapter, **rest)
        calls = {
            "moe_lora_linear": partial(FK.moe_lora_linear, x, weight, None, *adapter, **rest),
            "moe_lora": partial(FK.moe_lora, x, base, *adapter, **rest),
            "moe_lora_shared_linear": partial(moe_lora_shared_linear, x, [own] * SIBLINGS),
        }
        for name, call in calls.items():
            with torch.no_grad():
                yield name, f"{regime}, forward", known, peak(call)

            def outputs(call=call):
                results = call()
                return [results.out] if hasattr(results, "out") else [r.out for r in results]

            def backward(outs, leaves=leaves, grad=grad):
                return torch.autograd.grad(outs, leaves, [grad] * len(outs))

            yield name, f"{regime}, backward", known, peak(backward, outputs)


def squares(dtype):
    for n, r, d, s in ((8192, 256, 1024, 16), (2048, 512, 4096, 2)):
        g, x, offsets = drawn(dtype, n, r), drawn(dtype, n, d), torch.arange(s + 1) * (n // s)
        known = {"N": n, "R": r, "D": d, "S": s, "T": n // s, "b": dtype.itemsize}
        for reduce in ("element", "rank", "matrix"):
            call = partial(FK.segment_grad_square, g, x, offsets, reduce=reduce)
            yield "segment_grad_square", reduce, known, peak(call)
        yield (
            "linear_grad_square",
            "long",
            known,
            peak(partial(FK.linear_grad_square, g, x, offsets)),
        )
    n, r, d, s = 2048, 4096, 4096, 4
    g, x, offsets = drawn(dtype, n, r), drawn(dtype, n, d), torch.arange(s + 1) * (n // s)
    known = {"N": n, "R": r, "D": d, "S": s, "T": n // s, "b": dtype.itemsize}
    yield "linear_grad_square", "short", known, peak(partial(FK.linear_grad_square, g, x, offsets))


def routing(dtype):
    n, e, k = 2**19, 16, 4
    logits, experts = drawn(dtype, n, e), torch.randint(e, (n, k))
    known = {"N": n, "E": e, "K": k, "k": k, "b": dtype.itemsize}
    calls = {
        "topk_softmax": partial(FK.topk_softmax, logits, k),
        "load_balance_loss": partial(FK.load_balance_loss, logits, experts),
        "router_z_loss": partial(FK.router_z_loss, logits),
        "expert_load": partial(FK.expert_load, experts, e),
    }
    for name, call in calls.items():
        yield name, "forward", known, peak(call)


def spectra(dtype):
    for method, n in (("median", 2**20), ("fix_finger", 2**12)):
        eigenvalues = torch.rand(n)
        call = partial(FK.hill_alpha, eigenvalues, method=method)
        yield "hill_alpha", method, {"N": n}, peak(call)
    for o, i in ((4096, 512), (512, 16384)):
        known = {"O": o, "I": i, "G": min(o, i)}
        call = partial(FK.gram_eigenvalues, drawn(dtype, o, i))
        yield "gram_eigenvalues", f"{o} x {i}", known, peak(call)


def main():
    torch.manual_seed(0)
    torch.set_num_threads(1)
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 2**16)
    found = []
    for dtype in map(partial(getattr, torch), sys.argv[1:]):
        for cases in (layers, squares, routing):
            found += [(name, f"{how}, {dtype}", *rest) for name, how, *rest in cases(dtype)]
    found += spectra(torch.float32)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
