"""Per-sample squares by ourselves and by plain PyTorch, each way in its best form."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.fisher import FISHER, samples_of, truth
from benchmarks.moe_lora import leaf
from benchmarks.providers import layers
from benchmarks.providers.dense_cat import by_hand, column_scaling, forward, spread
from benchmarks.registry import AutogradStep, Step, Unavailable
from floe_kernels import functional
from floe_kernels.reference.moe_lora import FisherBuffers
from floe_kernels.testing.cases import MoELoRAInputs, sample_offsets

#: Bytes of per-sample gradients that one chunk of vmap may make.
CHUNK = 512e6


def gradients_truth(inputs: MoELoRAInputs) -> dict[str, Tensor]:
    """Return the gradients without the squares."""
    return {name: value for name, value in truth(inputs).items() if name[0] == "d"}


class GradientsOnly(Step):
    """A layer's step with its gradients alone among its results."""

    def __init__(self, step: Step) -> None:
        self.step, self.forward, self.backward = step, step.forward, step.backward  # type: ignore[method-assign]

    def results(self) -> dict[str, Tensor]:
        results = self.step.results()
        return {name: results[name] for name in ("dx", "dA", "dB")}

    def held(self) -> list[Tensor]:
        return self.step.held()


@FISHER.provide("gradients alone", "PyTorch", role="base", truth=gradients_truth)
def gradients_alone(inputs: MoELoRAInputs) -> Step:
    """Dense-cat by hand, and no squares: the floor."""
    return GradientsOnly(by_hand(inputs))


@FISHER.provide("ours without squares", "ours", role="context", truth=gradients_truth)
def ours_without(inputs: MoELoRAInputs) -> Step:
    return GradientsOnly(layers.ours(inputs))


class OurSquares(AutogradStep):
    """The layer's own backward with FisherBuffers; buffers grow from call to call, as in use."""

    def __init__(self, inputs: MoELoRAInputs, whole: bool) -> None:
        case, device = inputs.case, inputs.x.device
        options: dict[str, Any] = {"device": device, "dtype": torch.float32}
        shapes = [() if whole else t.shape for t in (inputs.lora_A, inputs.lora_B)]
        self.sums = [torch.zeros(shape, **options) for shape in shapes]
        offsets = sample_offsets(case, device)
        fisher = FisherBuffers(offsets, None, self.sums[0], self.sums[1], None, None)
        names = ("x", "lora_A", "lora_B", "router_weight")
        x, lora_A, lora_B, router = leaves = [leaf(getattr(inputs, n)) for n in names]

        def run() -> Tensor:
            return functional.moe_lora_linear(
                x, inputs.weight, None, lora_A, lora_B, router, ranks=case.ranks,
                top_k=case.top_k, scaling=inputs.scaling, shared_A=case.shared_A, fisher=fisher,
            ).out  # fmt: skip

        super().__init__(
            run,
            inputs.grad_out,
            dict(zip(("x", "lora_A", "lora_B", "router"), leaves, strict=True)),
            layers.canonical,
            frozen=(inputs.weight, inputs.scaling, *self.sums),
        )

    def results(self) -> dict[str, Tensor]:
        for total in self.sums:
            total.zero_()
        grads = super().results()
        return {**grads, "FA": self.sums[0], "FB": self.sums[1]}


@FISHER.provide("ours", "ours", role="ours")
def ours(inputs: MoELoRAInputs) -> Step:
    """Elementwise squares."""
    return OurSquares(inputs, whole=False)


def whole_truth(inputs: MoELoRAInputs) -> dict[str, Tensor]:
    """Return the results with the squares summed over each matrix."""
    return {name: v.sum() if name[0] == "F" else v for name, v in truth(inputs).items()}


@FISHER.provide("ours, one sum a matrix", "ours", role="context", truth=whole_truth)
def ours_whole(inputs: MoELoRAInputs) -> Step:
    """What a layer score needs: one number per matrix."""
    return OurSquares(inputs, whole=True)


class Whole(Step):
    """A provider that is one function: everything happens in the backward."""

    def __init__(self, run: Any, inputs: MoELoRAInputs) -> None:
        self.run, self.inputs = run, inputs

    def forward(self) -> None:
        return None

    def backward(self, out: None) -> dict[str, Tensor]:
        return self.run()  # type: ignore[no-any-return]

    def results(self) -> dict[str, Tensor]:
        return self.backward(None)

    def held(self) -> list[Tensor]:
        return [t for t in self.inputs if isinstance(t, Tensor)]


@FISHER.provide("batch-size-1 loop", "PyTorch")
def loop(inputs: MoELoRAInputs) -> Step:
    """One forward and backward per sample: exact, and what most code does."""
    steps = [by_hand(sample) for sample in samples_of(inputs)]

    def run() -> dict[str, Tensor]:
        FA, FB = (torch.zeros(t.shape, device=t.device) for t in (inputs.lora_A, inputs.lora_B))
        dA, dB = torch.zeros_like(FA), torch.zeros_like(FB)
        dx = []
        for step in steps:
            grad_x, shrink, grad_B = step.backward(step.forward())
            dx.append(grad_x)
            grad_A, grad_B = shrink[: len(FA)].float(), grad_B.float()
            dA += grad_A
            dB += grad_B
            FA.addcmul_(grad_A, grad_A)
            FB.addcmul_(grad_B, grad_B)
        return {"dx": torch.cat(dx), "dA": dA, "dB": dB, "FA": FA, "FB": FB}

    return Whole(run, inputs)


@FISHER.provide("torch.func vmap", "PyTorch")
def vmap(inputs: MoELoRAInputs) -> Step:
    """``vmap(grad(loss))`` over samples, on dense-masked experts: a gather would not trace."""
    case = inputs.case
    shrink = torch.cat([inputs.lora_A, inputs.router_weight]).detach()
    ones = column_scaling(inputs)
    size = 4 * (shrink.numel() + inputs.lora_B.numel())
    samples = max(1, min(case.samples, int(CHUNK / size)))

    def loss(leaves: tuple[Tensor, Tensor], x: Tensor, grad_out: Tensor) -> Tensor:
        y = forward(case, x, inputs.weight, *leaves, inputs.scaling, ones, in_place=False)
        return (y.float() * grad_out.float()).sum()

    gradient = torch.func.grad(loss, argnums=(0, 1))
    per_sample = torch.func.vmap(gradient, in_dims=(None, 0, 0), chunk_size=samples)

    def run() -> dict[str, Tensor]:
        x = inputs.x.view(case.samples, -1, case.inputs)
        grad_out = inputs.grad_out.view(case.samples, -1, case.outputs)
        grads, dx = per_sample((shrink, inputs.lora_B), x, grad_out)
        GA, GB = grads[0][:, : len(inputs.lora_A)].float(), grads[1].float()
        sums = {"dA": GA.sum(0), "dB": GB.sum(0), "FA": squared(GA), "FB": squared(GB)}
        return {"dx": dx.flatten(0, 1), **sums}

    return Whole(run, inputs)


def squared(gradients: Tensor) -> Tensor:
    """Return the sum over samples of the squares; einsum makes no copy of the samples."""
    return torch.einsum("s...,s...->...", gradients, gradients)


class Materialised(Step):
    """The closed-form backward, and every sample's gradient as one batched product."""

    def __init__(self, inputs: MoELoRAInputs) -> None:
        self.inputs, self.step = inputs, by_hand(inputs)

    def forward(self) -> Tensor:
        return self.step.forward()

    def backward(self, out: Tensor) -> dict[str, Tensor]:
        case, saved = self.inputs.case, out.grad_fn.saved_tensors  # type: ignore[union-attr]
        x, _weight, _shrink, lora_B, scaling, ones, zl, kept, experts = saved
        dx, shrink, dB = self.step.backward(out)
        dense = kept.new_zeros(len(x), case.experts).scatter_(1, experts, kept)
        z = zl[:, : case.columns]
        dy = self.inputs.grad_out
        u = dy @ lora_B.to(x.dtype).T
        dz, h = (spread(case, dense, t, scaling, ones) for t in (u, z.contiguous()))
        FA, FB = self.squares(dz, x, experts), self.squares(h, dy, experts)
        return {"dx": dx, "dA": shrink[: case.columns], "dB": dB, "FA": FA, "FB": FB}

    def squares(self, g: Tensor, x: Tensor, experts: Tensor) -> Tensor:
        """Return the sum of the squares of the samples' g_i^T x_i."""
        batch = self.inputs.case.samples
        G = g.view(batch, -1, g.shape[1]).transpose(1, 2) @ x.view(batch, -1, x.shape[1])
        return squared(G.float())

    def results(self) -> dict[str, Tensor]:
        return self.backward(self.forward())

    def held(self) -> list[Tensor]:
        return self.step.held()


class MaterialisedGroups(Materialised):
    """Only the tokens an expert kept, sorted by (expert, sample): one grouped product."""

    def squares(self, g: Tensor, x: Tensor, experts: Tensor) -> Tensor:
        case = self.inputs.case
        rank, groups = case.ranks[0], case.experts * case.samples
        sample = torch.arange(len(x), device=x.device) // (len(x) // case.samples)
        key = (experts * case.samples + sample[:, None]).flatten()
        order = key.argsort(stable=True)
        counts = torch.histc(key.float(), groups, 0, groups)
        ends = counts.cumsum(0).to(torch.int32)
        token, expert = order // case.top_k, key[order] // case.samples
        g_kept = g.view(len(g), case.experts, rank)[token, expert]
        G = F.grouped_mm(g_kept.T, x[token], offs=ends).float()  # (E * S, r, D)
        per_expert = G.view(case.experts, case.samples, rank, -1)
        return torch.einsum("esrd,esrd->erd", per_expert, per_expert).flatten(0, 1)


@FISHER.provide("materialise, bmm", "PyTorch")
def materialise_bmm(inputs: MoELoRAInputs) -> Step:
    """(samples, R, D) of dense columns."""
    if inputs.case.shared_A:
        raise Unavailable("written for experts with an A of their own")
    return Materialised(inputs)


@FISHER.provide("materialise, grouped_mm", "PyTorch")
def materialise_grouped(inputs: MoELoRAInputs) -> Step:
    """(experts x samples, r, D) of the tokens that were kept."""
    case = inputs.case
    if case.shared_A or not case.equal_rank or case.equal_rank * case.dtype.itemsize % 16:
        raise Unavailable("grouped_mm wants experts of one rank, in multiples of 16 bytes")
    if not hasattr(F, "grouped_mm"):
        raise Unavailable("this torch has no nn.functional.grouped_mm (2.10 or later does)")
    return MaterialisedGroups(inputs)
