"""A provider replayed as one CUDA graph: what is left of it without launches from Python."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.registry import Step, Unavailable

#: How a graphed provider registers.
GRAPHED: dict[str, Any] = {"devices": ("cuda",), "graphed": True}


class GraphedStep(Step):
    """Replays a captured step. A graph cannot be cut, so the backward replays the forward too."""

    def __init__(self, step: Step) -> None:
        self.step = step
        self.graph: Any = None
        self.captured: Any = None
        self.mode = ""

    def bind(self, mode: str) -> "GraphedStep":
        """Capture what ``mode`` times."""
        if mode == "bwd":
            raise Unavailable("a graph holds forward and backward together")
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):  # allocates, and lets libraries choose their algorithms
                self._work(mode)
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.captured = self._work(mode)
        self.mode = mode
        return self

    def _work(self, mode: str) -> Any:
        return self.step.forward() if mode == "fwd" else self.step.results()

    def forward(self) -> None:
        if self.mode == "fwd":
            self.graph.replay()

    def backward(self, out: Any) -> None:
        if self.mode != "fwd":
            self.graph.replay()

    def results(self) -> dict[str, Tensor]:
        """Replay once and copy what came out."""
        self.bind("fwdbwd")
        for tensor in self.captured.values():
            tensor.fill_(float("nan"))  # so that what the replay does not write is seen
        self.graph.replay()
        torch.cuda.synchronize()
        return {name: tensor.clone() for name, tensor in self.captured.items()}

    def held(self) -> list[Tensor]:
        return self.step.held()


def graphed(build: Callable[[Any], Step]) -> Callable[[Any], Step]:
    """Wrap a provider's ``build``."""
    return lambda inputs: GraphedStep(build(inputs))
