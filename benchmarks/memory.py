"""Memory and launches of one call: what is saved, the peak, and how many kernels run."""

import gc
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks.graphed import GraphedStep
from benchmarks.registry import Step


def saved_bytes(step: Step) -> int:
    """Return the bytes autograd keeps between forward and backward, each storage once.

    Weights exist anyway and do not count; x does, because a frozen linear alone need not keep it.
    """
    held = {t.untyped_storage().data_ptr() for t in step.held()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in held:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = step.forward()
    step.backward(out)  # hooks of peers count forwards and backwards, and must meet both
    return sum(kept.values())


def peak_bytes(step: Step, device: str) -> int:
    """Return the most bytes a forward and backward hold beyond what was there before."""
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step.backward(step.forward())
        torch.cuda.synchronize()
        return int(torch.cuda.max_memory_allocated() - before)
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        step.backward(step.forward())
    live = peak = 0
    events = [e for e in prof.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def launches(work: Callable[[], Any]) -> tuple[int, Any]:
    """Return how many kernels, copies and fills a call puts on the GPU, and its result."""
    from torch.autograd import DeviceType

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as prof:
        result = work()
        torch.cuda.synchronize()
    events = prof.profiler.kineto_results.events()
    return sum(e.device_type() == DeviceType.CUDA for e in events), result


def extras(step: Step, device: str) -> dict[str, Any]:
    """Return the columns of one provider that one call decides."""
    step.backward(step.forward())  # whatever happens only once happens here
    count = None
    if device == "cuda":
        forward, out = launches(step.forward)
        backward, _ = launches(partial(step.backward, out))
        count = [forward, backward]
    if isinstance(step, GraphedStep):  # its memory was taken when it was captured
        return {"saved_bytes": None, "peak_bytes": None, "launches": count}
    return {
        "saved_bytes": saved_bytes(step),
        "peak_bytes": peak_bytes(step, device),
        "launches": count,
    }
