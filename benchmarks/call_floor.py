"""python -m benchmarks.call_floor --case T8-bf16: where a call's time goes when tokens are few.

Beside the layer, its peer and the frozen linear: an ``autograd.Function`` that takes, saves and
returns the same tensors and computes nothing, and both operators called past autograd. Inputs are
cold, as in ``benchmarks.run``; rows are medians in microseconds. ``--decode`` times forward alone,
without gradients.
"""

import argparse
import random
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks import registry, roofline
from benchmarks.measure import input_sets
from benchmarks.moe_lora import leaf
from benchmarks.run import select
from floe_kernels.ops.moe_lora import moe_lora_backward, moe_lora_linear, saved_like
from floe_kernels.testing.cases import MoELoRAInputs

Timed = Callable[[], tuple[float, float]]


class Empty(torch.autograd.Function):
    """The layer's tensors in, saved and out, and no arithmetic."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, router: Tensor,
        scaling: Tensor, top_k: int,
    ) -> Tensor:  # fmt: skip
        ctx.set_materialize_grads(False)
        routing = saved_like(x, lora_A, router, top_k)
        ctx.save_for_backward(x, weight, lora_A, lora_B, router, scaling, *routing)
        return x.new_empty(len(x), len(weight))

    @staticmethod
    def backward(ctx: Any, _grad_out: Tensor) -> tuple[Tensor | None, ...]:
        x, _weight, *adapter = ctx.saved_tensors[:5]
        return torch.empty_like(x), None, *map(torch.empty_like, adapter), None, None


def timed(forward: Callable[[], Any], backward: Callable[[Any], Any]) -> Timed:
    """Return a function that runs both and returns the seconds of each."""

    def run() -> tuple[float, float]:
        start = time.perf_counter()
        out = forward()
        between = time.perf_counter()
        backward(out)
        return between - start, time.perf_counter() - between

    return run


def decoding(step: registry.Step) -> Timed:
    """Bind a forward alone, without gradients."""
    return timed(torch.no_grad()(step.forward), lambda _: None)


def empty_function(inputs: MoELoRAInputs) -> Timed:
    """Bind :class:`Empty` to leaves."""
    leaves = [leaf(t) for t in (inputs.x, inputs.lora_A, inputs.lora_B, inputs.router_weight)]
    rest = (inputs.scaling, inputs.case.top_k)
    return timed(
        lambda: Empty.apply(leaves[0], inputs.weight, *leaves[1:], *rest),  # type: ignore[no-untyped-call]
        lambda out: torch.autograd.grad(out, leaves, inputs.grad_out),
    )


def below_autograd(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Return the function without what autograd adds to every operator."""

    def run(*arguments: Any) -> Any:
        with torch.no_grad(), torch._C._AutoDispatchBelowAutograd():
            return function(*arguments)

    return run


def operators(inputs: MoELoRAInputs) -> Timed:
    """Bind the two operators of a layer."""
    case, none = inputs.case, (None,) * 6
    adapter = (inputs.lora_A, inputs.lora_B, inputs.router_weight, inputs.scaling)
    rule, rest = (case.shared_A, case.renormalize), (None, 0.0, None, None)
    ranks = list(case.ranks)
    forward = (inputs.x, inputs.weight, None, *adapter, ranks, case.top_k, *rule, *rest, *none)

    def backward(out: tuple[Tensor, ...]) -> Any:
        saved = (*out[1:], ranks, *rule, *rest, [True] * 4, *none)
        return moe_lora_backward(inputs.grad_out, inputs.x, inputs.weight, *adapter, *saved)

    run = below_autograd(lambda _: moe_lora_linear(*forward))
    return timed(lambda: run(None), below_autograd(backward))


def products(inputs: MoELoRAInputs) -> Timed:
    """Bind the frozen linear's two products alone."""
    run = below_autograd(lambda _: torch.nn.functional.linear(inputs.x, inputs.weight))
    return timed(lambda: run(None), below_autograd(lambda _: inputs.grad_out @ inputs.weight))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.call_floor", description=__doc__)
    parser.add_argument("--case", default="T8-bf16")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--decode", action="store_true", help="forward alone, without gradients")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.empty(24 << 20, dtype=torch.uint8)  # freed: from now on malloc keeps what it gets back
    op = registry.load()["moe_lora"]
    (case,) = select(op, options.case)
    sets = input_sets(op, case, "cpu", seed=0)
    rows: dict[str, list[Timed]] = {}
    for name in ("base", "ours", "dense-cat", "dense-cat by hand"):
        steps = [op.providers[name].build(inputs) for inputs in sets]
        rows[name] = [
            decoding(step) if options.decode else timed(step.forward, step.backward)
            for step in steps
        ]
    if not options.decode:
        rows["operators"] = [operators(inputs) for inputs in sets]
        rows["products"] = [products(inputs) for inputs in sets]
        rows["empty function"] = [empty_function(inputs) for inputs in sets]
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in rows}
    order = list(rows)
    for _ in range(options.rounds + 1):
        random.shuffle(order)
        for name in order:
            times = [run() for run in rows[name]]
            taken[name].append(tuple(map(statistics.median, zip(*times, strict=True))))
    medians = {
        n: [statistics.median(c) for c in zip(*t[1:], strict=True)] for n, t in taken.items()
    }
    base = sum(medians["base"])
    for name, (forward, backward) in medians.items():
        total = forward + backward
        print(
            f"{name:18} forward {forward * 1e6:7.1f}  backward {backward * 1e6:7.1f}"
            f"  sum {total * 1e6:7.1f}  beyond the linear {(total - base) * 1e6:7.1f}"
        )
    peer = min(sum(medians[n]) for n in medians if n.startswith("dense-cat")) - base
    print(f"overhead over dense-cat's: {(sum(medians['ours']) - base) / peer:.3f}")
    if not options.decode:
        moved = sum(t.nbytes for t in (sets[0].lora_A, sets[0].lora_B)) * 3
        print(
            f"lora_A and lora_B read twice and their gradients written: "
            f"{moved / roofline.peak_bandwidth('cpu') * 1e6:.0f} us at the copy's bandwidth"
        )


if __name__ == "__main__":
    main()
