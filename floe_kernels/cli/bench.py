"""``floe bench``: what the adapted layer costs on this machine, next to the frozen one."""

import statistics
import time
from collections.abc import Callable
from typing import Annotated

import torch
import typer
from torch import nn

from floe_kernels.cli.arguments import AskedWrongly
from floe_kernels.cli.progress import console
from floe_kernels.cli.tables import print_table
from floe_kernels.nn import FusedMoELoRA
from floe_kernels.pipeline.machine import describe_machine
from floe_kernels.pipeline.models import DTYPES, choose_device

ROUNDS = 9


def command(
    tokens: Annotated[int, typer.Option(help="Tokens of a pass.")] = 1024,
    in_features: Annotated[int, typer.Option(help="Inputs of the linear.")] = 576,
    out_features: Annotated[int, typer.Option(help="Outputs of the linear.")] = 1536,
    experts: Annotated[int, typer.Option(help="Experts.")] = 4,
    rank: Annotated[int, typer.Option(help="Rank of every expert.")] = 8,
    top_k: Annotated[int, typer.Option(help="Experts a token.")] = 2,
    dtype: Annotated[str, typer.Option(help="bfloat16 or float32.")] = "bfloat16",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
) -> None:
    """Time one layer: the frozen linear, the same with experts, and their ratio."""
    sizes = {
        "tokens": tokens, "in-features": in_features, "out-features": out_features,
        "experts": experts, "rank": rank,
    }  # fmt: skip
    for name, value in sizes.items():
        if value < 1:
            raise AskedWrongly(f"--{name} must be >= 1, got {value}")
    if not 1 <= top_k <= experts:
        raise AskedWrongly(f"--top-k must be in 1..E = 1..{experts} (--experts), got {top_k}")
    if dtype not in DTYPES:
        raise AskedWrongly(f"--dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    where = choose_device(device)
    linear = nn.Linear(in_features, out_features, bias=False).to(where, DTYPES[dtype])
    linear.requires_grad_(False)
    x = torch.randn(tokens, in_features, device=where, dtype=DTYPES[dtype], requires_grad=True)
    grad = torch.randn(tokens, out_features, device=where, dtype=DTYPES[dtype])
    adapted = FusedMoELoRA(linear, [rank] * experts, top_k)
    base, ours = alternate(_pass(linear, x, grad), _pass(adapted, x, grad), where)
    machine = describe_machine(where)
    out = console()
    out.print(f"{machine['processor']}, {machine['threads']} threads, {dtype}, {tokens} tokens")
    rows = [
        ("frozen linear", f"{1e3 * base:.2f}", "1.00"),
        (f"with {experts} experts of rank {rank}", f"{1e3 * ours:.2f}", f"{ours / base:.2f}"),
    ]
    headings = (f"{in_features} -> {out_features}, forward and backward", "ms", "ratio")
    print_table(out, headings, rows)
    out.print("Comparisons with other implementations: python -m benchmarks.run, in a checkout.")


def alternate(
    first: Callable[[], None], second: Callable[[], None], device: torch.device
) -> tuple[float, float]:
    """Time two things in turns, so that a busy machine is unfair to neither; return medians.

    Args:
        first: One pass of the first.
        second: One pass of the second.
        device: Where they run.
    """
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(ROUNDS):
        for taken, one in zip(times, (first, second), strict=True):
            one()
            _wait(device)
            start = time.perf_counter()
            one()
            _wait(device)
            taken.append(time.perf_counter() - start)
    return statistics.median(times[0]), statistics.median(times[1])


def _pass(layer: nn.Module, x: torch.Tensor, grad: torch.Tensor) -> Callable[[], None]:
    def run() -> None:
        layer(x).backward(grad)
        layer.zero_grad(set_to_none=True)
        x.grad = None

    return run


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
