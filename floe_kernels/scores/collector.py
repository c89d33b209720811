"""Collect per-sample squared gradients around ordinary backward passes."""

import inspect
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from floe_kernels.functional import FisherBuffers, linear_grad_square
from floe_kernels.nn import FusedMoELoRA
from floe_kernels.scores.batch import (
    LOSS_REDUCTIONS,
    PER_SAMPLE,
    SampleBatch,
    describe_batch,
    make_batch,
)
from floe_kernels.scores.gate_rows import GateRows
from floe_kernels.scores.names import plain_name
from floe_kernels.scores.record import COUNTS, FisherRecord

GRANULARITIES = {"matrix": 0, "rank": 1, "element": 2}


class LayerFisher:
    """The running buffers of one adapted layer, for the step in flight."""

    def __init__(self, layer: FusedMoELoRA, ndim: int, keep_gates: bool) -> None:
        parameters = {
            "lora_A": layer.lora_A,
            "lora_B": layer.lora_B,
            "router": layer.router.weight,
        }
        self.step = {name: score_zeros(p, p.shape[:ndim]) for name, p in parameters.items()}
        self.keep_gates = keep_gates
        self.batch: SampleBatch | None = None
        self.gate: Tensor | None = None

    def begin(self, batch: SampleBatch) -> None:
        """Make ready for a forward pass of ``batch``."""
        self.batch = batch
        if self.keep_gates:
            self.gate = self.step["lora_B"].new_zeros(batch.num_samples)

    def buffers(self, x: Tensor) -> FisherBuffers | None:
        """Return the buffers the layer's operator adds to; None outside a described batch."""
        if self.batch is None:
            return None
        return FisherBuffers(
            self.batch.offsets_for(x),
            self.batch.scale,
            self.step["lora_A"],
            self.step["lora_B"],
            self.step["router"],
            self.gate,
        )


class FisherCollector:
    r"""Add up per-sample squared gradients while ordinary training code runs backward passes.

    .. math:: F_\theta = \sum_i \Big(\frac{\partial \ell_i}{\partial \theta}\Big)^2

    with :math:`\ell_i` the log-likelihood of sample i: the diagonal of the *empirical* Fisher
    information (observed labels; arXiv 1905.12558 tells it from the Fisher). Squared after summing
    the tokens of a sample and before summing samples, inside the layer's backward operator, so that
    it is right for routed experts, whose tokens arrive without their samples. One step's squares
    are float32 (float64 for float64 parameters), and the sums over steps float64, so that a million
    steps lose nothing of the small ones. Auxiliary losses are off while collecting; gradients are
    what they would be without. A step with a non-finite score is skipped whole and counted. Each
    process scores its own batches, and :meth:`record` adds them up; under FSDP2 too, where every
    process holds the sums of whole parameters, not of shards.

    Memory: 12 bytes for every number the granularity keeps, and with ``keep_gates`` 4 more for
    every sample and adapted module, which is all that grows from step to step.

    Inside the context call the model, call ``backward()``, then :meth:`step`. The batch's samples
    and loss tokens are read off the model's arguments (``input_ids``, ``labels``,
    ``num_items_in_batch``; of packed sequences ``cu_seq_lens_q`` or ``position_ids``); where they
    do not show them, call :meth:`batch` before the model.

    Args:
        model: A model with :class:`~floe_kernels.FusedMoELoRA` layers, or linears named ``frozen``.
        loss_reduction: How the back-propagated scalar relates to the samples' log-likelihoods
            summed over tokens: their ``"sum"``, that divided by samples (``"mean_samples"``) or by
            loss tokens (``"mean_tokens"``, what transformers' models return).
        per_sample: Whether :math:`\ell_i` is the ``"sum"`` over the sample's tokens, the
            likelihood's own, or their ``"mean"``, which does not favour long samples.
        granularity: What is kept: one number a ``"matrix"``, a ``"rank"`` row, or an ``"element"``.
        frozen: Names of frozen linears, adapted or not, whose whole-matrix squared gradients to
            sum as well.
        loss_factor: A further factor on the back-propagated scalar: the scale of a ``GradScaler``
            as a tensor, 1 / steps of gradient accumulation.
        keep_gates: Whether to keep every sample's gate gradients, for
            :meth:`FisherRecord.gate_gradients`; a long training run may do without.

    Raises:
        ValueError: An unknown choice, or nothing in the model to score.

    Example:
        >>> import torch
        >>> model = FusedMoELoRA(torch.nn.Linear(4, 2), ranks=[2, 2])
        >>> with FisherCollector(model, loss_reduction="sum") as collector:
        ...     for x in torch.randn(3, 5, 7, 4):  # 3 batches of 5 samples of 7 tokens
        ...         model(x).square().sum().backward()
        ...         collector.step()
        >>> record = collector.record()
        >>> record.counts["samples"]
        15
        >>> sorted(record.read(how="mean"))  # lora_B is zero, and so is the gradient of lora_A
        ['lora_A', 'lora_B']
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        loss_reduction: str = "mean_tokens",
        per_sample: str = "sum",
        granularity: str = "rank",
        frozen: Sequence[str] = (),
        loss_factor: float | Tensor = 1.0,
        keep_gates: bool = True,
    ) -> None:
        for name, value, known in (
            ("loss_reduction", loss_reduction, LOSS_REDUCTIONS),
            ("per_sample", per_sample, PER_SAMPLE),
            ("granularity", granularity, tuple(GRANULARITIES)),
        ):
            if value not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
        self.model, self.loss_factor = model, loss_factor
        self.meta = {
            "kind": "empirical", "unit": "sequence", "per_sample": per_sample,
            "granularity": granularity, "loss_reduction": loss_reduction,
        }  # fmt: skip
        self.layers = _adapted(model)
        self._frozen = {name: _linear(model, name) for name in frozen}
        if not self.layers and not self._frozen:
            raise ValueError(
                "the model must have FusedMoELoRA layers with experts, or frozen linears be named, "
                "got neither"
            )
        ndim = GRANULARITIES[granularity]
        self._fishers = {
            name: LayerFisher(layer, ndim, keep_gates) for name, layer in self.layers.items()
        }
        self._step = {
            join(name, key): value
            for name, fisher in self._fishers.items()
            for key, value in fisher.step.items()
        }
        for name, module in self._frozen.items():
            self._step[join(name, "weight")] = score_zeros(module.weight, ())
        wide = torch.float64
        self._sums = {key: torch.zeros_like(v, dtype=wide) for key, v in self._step.items()}
        self._hits = {
            name: torch.zeros(len(layer.ranks), dtype=torch.int64, device=layer.lora_B.device)
            for name, layer in self.layers.items()
        }
        device = next(iter(self._step.values())).device
        self._counts = torch.zeros(len(COUNTS), dtype=torch.int64, device=device)
        self._gates = GateRows(len(self.layers))
        self._arguments = list(inspect.signature(model.forward).parameters)
        self._batch: SampleBatch | None = None
        self._told: SampleBatch | None = None
        self._handles: list[Any] = []

    def __enter__(self) -> "FisherCollector":
        """Start: from here on backward passes of the model are scored."""
        for name, layer in self.layers.items():
            if layer.fisher is not None:
                raise RuntimeError(f"one FisherCollector at a time, got a second on {name or 'it'}")
        for name, layer in self.layers.items():
            layer.fisher = self._fishers[name]
        self._handles = [self.model.register_forward_pre_hook(self._begin, with_kwargs=True)]
        for name, module in self._frozen.items():
            self._handles.append(module.register_forward_hook(_FrozenHook(self, name)))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stop; what was collected stays."""
        for layer in self.layers.values():
            layer.fisher = None
        for handle in self._handles:
            handle.remove()
        self._discard()

    def batch(
        self,
        num_samples: int,
        *,
        offsets: Tensor | None = None,
        num_tokens: Tensor | None = None,
    ) -> None:
        """Describe the next forward pass, where the model's arguments do not.

        Args:
            num_samples: S.
            offsets: ``(S + 1,)`` int64: rows ``offsets[i]:offsets[i + 1]`` of a layer's flattened
                input are sample i (packed sequences); None where inputs are ``(S, ..., I)``.
            num_tokens: ``(S,)`` int64, loss tokens of each sample; None where no mean needs them.

        Raises:
            ValueError: The definition needs ``num_tokens``, or a shape does not fit.
        """
        for name, tensor, size in (
            ("offsets", offsets, num_samples + 1),
            ("num_tokens", num_tokens, num_samples),
        ):
            if tensor is not None and tensor.shape != (size,):
                raise ValueError(f"{name} must be ({size},), got {tuple(tensor.shape)}")
        reduction = self.meta["loss_reduction"]
        if reduction == "mean_tokens" and num_tokens is None:
            raise ValueError("loss_reduction='mean_tokens' needs num_tokens, got None")
        total = None if num_tokens is None else num_tokens.sum()
        self._told = make_batch(
            num_samples, offsets, num_tokens, total, reduction, self.meta["per_sample"],
            self._counts.device,
        )  # fmt: skip

    def step(self) -> None:
        """Commit what the last backward pass added; a non-finite step is dropped and counted.

        Raises:
            RuntimeError: No forward pass was made since the last step.
        """
        if self._batch is None:
            raise RuntimeError("step() follows one forward and one backward pass, got neither")
        batch, device = self._batch, self._counts.device
        gates = [f.gate for f in self._fishers.values() if f.gate is not None]
        checks = [value.sum().isfinite() for value in self._step.values()]
        checks += [gate.sum().isfinite() for gate in gates]
        finite = torch.stack([check.to(device) for check in checks]).all()
        for key, value in self._step.items():
            self._sums[key].add_(torch.where(finite.to(value.device), value, 0))
        if gates:
            self._gates.add(torch.stack([g.to(device) for g in gates], 1), finite)
        for name, layer in self.layers.items():
            self._hits[name] += finite.to(self._hits[name].device) * _hits(layer, batch)
        samples = torch.full((), batch.num_samples, device=device)
        tokens = samples.new_zeros(()) if batch.tokens is None else batch.tokens.sum().to(device)
        with_loss = samples if batch.tokens is None else (batch.tokens > 0).sum().to(device)
        self._counts += torch.stack(
            [samples * finite, with_loss * finite, tokens * finite, (~finite).to(torch.int64)]
        )
        self._discard()

    def record(self) -> FisherRecord:
        """Return what was collected so far, summed over all processes of the default group."""
        gates = self._gates.kept()
        counts = self._counts.clone()
        sums = {key: value.clone() for key, value in self._sums.items()}
        hits = {key: value.clone() for key, value in self._hits.items()}
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            _add_over_processes([counts, *sums.values(), *hits.values()])
            parts: list[Any] = [None] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(parts, gates.cpu())
            gates = torch.cat(parts)
        sizes = {key: self._parameter(key).numel() for key in sums}
        numbers = dict(zip(COUNTS, counts.tolist(), strict=True))
        return FisherRecord(sums, sizes, hits, gates, list(self.layers), numbers, dict(self.meta))

    def read(self, **options: Any) -> dict[str, float]:
        """Return scores as plain numbers; the options are :meth:`FisherRecord.read`'s."""
        return self.record().read(**options)

    def _parameter(self, key: str) -> Tensor:
        module, _, name = key.rpartition(".")
        owner: Any = self._frozen[module] if name == "weight" else self.layers[module]
        tensor: Tensor = owner.router.weight if name == "router" else getattr(owner, name)
        return tensor

    def _begin(self, _model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        if not torch.is_grad_enabled():
            return
        if self._batch is not None:
            raise RuntimeError("step() must follow every backward pass, got a second forward pass")
        batch, self._told = self._told, None
        if batch is None:
            arguments = {**dict(zip(self._arguments, args, strict=False)), **kwargs}
            definition = self.meta["loss_reduction"], self.meta["per_sample"]
            batch = describe_batch(arguments, *definition)
        batch.scale = batch.scale / self.loss_factor
        self._batch = batch
        for fisher in self._fishers.values():
            fisher.begin(batch)

    def _discard(self) -> None:
        self._batch = None
        for fisher in self._fishers.values():
            fisher.batch = fisher.gate = None
        for value in self._step.values():
            value.zero_()


class _FrozenHook:
    """Forward hook of a frozen linear: scores its output's gradient when that arrives."""

    def __init__(self, collector: FisherCollector, name: str) -> None:
        self.collector, self.key = collector, join(name, "weight")

    def __call__(self, _module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
        batch = self.collector._batch
        if batch is None or not torch.is_grad_enabled():
            return
        if not out.requires_grad:  # nothing before it trains: the graph starts here
            out.requires_grad_()
            out.register_post_accumulate_grad_hook(_forget_grad)  # type: ignore[no-untyped-call]
        x = args[0].detach()

        def score(grad: Tensor) -> None:
            rows = grad.reshape(-1, grad.shape[-1])
            norms = linear_grad_square(
                rows, x.reshape(-1, x.shape[-1]), batch.offsets_for(x), scale=batch.scale
            )
            self.collector._step[self.key].add_(norms.sum())

        out.register_hook(score)  # type: ignore[no-untyped-call]


def _forget_grad(tensor: Tensor) -> None:
    tensor.grad = None


def _hits(layer: FusedMoELoRA, batch: SampleBatch) -> Tensor:
    """Return how many samples reached each expert in the layer's last forward pass, ``(E,)``."""
    if layer.routing is None:
        return layer.scaling.new_zeros(len(layer.ranks), dtype=torch.int64)
    _logits, experts, token_mask = layer.routing
    offsets = batch.offsets
    if offsets is None:
        rows = len(experts) // max(1, batch.num_samples)
        offsets = torch.arange(batch.num_samples + 1, device=experts.device) * rows
    row = torch.arange(len(experts), device=experts.device)
    sample = torch.searchsorted(offsets, row, right=True) - 1
    inside = (row < offsets[-1]) & (sample >= 0)
    if token_mask is not None:
        inside &= token_mask
    reached = experts.new_zeros(batch.num_samples + 1, len(layer.ranks))
    sample = torch.where(inside, sample, batch.num_samples)  # a bin for rows of no sample
    pairs = sample[:, None].expand_as(experts) * len(layer.ranks) + experts
    reached.view(-1).scatter_(0, pairs.flatten(), torch.ones_like(pairs).flatten())
    return reached[:-1].sum(0)


def _adapted(model: nn.Module) -> dict[str, FusedMoELoRA]:
    """Return the layers with experts by their names in the base model, in model order.

    Where PEFT gave one linear several adapters, the later ones keep PEFT's own names.
    """
    layers: dict[str, FusedMoELoRA] = {}
    for name, module in model.named_modules():
        if isinstance(module, FusedMoELoRA) and module.ranks:
            plain = plain_name(name)
            layers[name if plain in layers else plain] = module
    return layers


def _linear(model: nn.Module, name: str) -> nn.Module:
    """Return the frozen linear that a model without adapters has under this name."""
    modules = dict(model.named_modules())
    module: Any = modules.get(name) or modules.get(f"base_model.model.{name}")
    if module is None:
        raise ValueError(f"frozen must name linear layers, the model has no {name!r}")
    while hasattr(module, "base_layer"):
        module = module.base_layer
    if not isinstance(getattr(module, "weight", None), Tensor) or module.weight.ndim != 2:
        raise ValueError(f"frozen must name linear layers, got {name}: {type(module).__name__}")
    linear: nn.Module = module
    return linear


def _add_over_processes(tensors: Sequence[Tensor]) -> None:
    """Add each tensor up over all processes, in place; one reduction for each dtype."""
    for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
        alike = [tensor for tensor in tensors if tensor.dtype == dtype]
        flat = torch.cat([tensor.reshape(-1).to(alike[0].device) for tensor in alike])
        torch.distributed.all_reduce(flat)
        for tensor, part in zip(alike, torch.split(flat, [t.numel() for t in alike]), strict=True):
            tensor.copy_(part.view(tensor.shape))


def score_zeros(like: Any, shape: Any) -> Tensor:
    """Return zeros in the dtype sums of squares are kept in."""
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    return torch.zeros(shape, dtype=dtype, device=like.device)


def join(module: str, parameter: str) -> str:
    """Return ``module.parameter``, without the dot where the model is itself the layer."""
    return f"{module}.{parameter}" if module else parameter
