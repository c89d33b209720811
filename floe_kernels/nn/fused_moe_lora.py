"""The drop-in layer: a frozen linear with a routed mixture of LoRA experts."""

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from floe_kernels import functional
from floe_kernels.functional.moe_lora import default_top_k

if TYPE_CHECKING:
    from floe_kernels.nn.batch import BatchContext


class Router(nn.Linear):
    """One row of scores per expert; unlike ``nn.Linear``, content to have none."""

    def reset_parameters(self) -> None:
        """Draw the weight anew."""
        kaiming_uniform_(self.weight)


class LayerRouting(NamedTuple):
    """How a layer routed the N tokens of its last forward pass; on padding, anything."""

    logits: Tensor  #: ``(N, E)`` float32 (float64 for float64), without a gradient
    experts: Tensor  #: ``(N, K)`` int64, best first
    token_mask: Tensor | None  #: ``(N,)`` bool, False on padding; None if every token counted


class FusedMoELoRA(nn.Module):
    r"""Wrap a linear layer; freeze it and train a mixture of LoRA experts beside it.

    .. math:: y = \mathrm{base}(x) + \sum_{e \in \mathrm{top}_k(x)} g_e \, s_e \, (x A_e^\top) B_e

    MoLA's layer (arXiv 2402.08562) or, with ``shared_A``, HydraLoRA's (arXiv 2404.19245). Goes
    wherever the wrapped layer was: same input shapes, same output shape and dtype. lora_A and the
    router start Kaiming-uniform (a = sqrt 5), lora_B at zero, so wrapping changes no output. An
    empty batch gives an empty output. Ties between experts keep index order. A routed mixture
    depends on the token, so it cannot be merged into the base weight.

    Args:
        base_layer: ``nn.Linear``, transformers' ``Conv1D``, or any module that maps ``(..., I)``
            to ``(..., O)`` and has ``in_features`` and ``out_features`` (quantised linears).
        ranks: Rank of every expert; experts of rank 0, and no expert at all, are legal.
        top_k: Experts kept per token; None means ``min(2, E)``, or E with ``shared_A``.
        lora_alpha: Scale of the adapter: column scaling is ``lora_alpha / rank``.
        lora_dropout: Dropout probability on the input of lora_A while training, in [0, 1).
        shared_A: One A for all experts, which then must have equal ranks.
        use_rslora: Scale by ``lora_alpha / sqrt(rank)`` instead (arXiv 2312.03732).
        load_balance_coef: Coefficient of the load balancing loss, whose gradient the backward adds.
        z_loss_coef: Coefficient of the router z-loss, likewise.
        dtype: Dtype of the adapter; None means float32, or the base's if that is wider.

    Attributes:
        lora_A: ``(R, I)``, or ``(rank, I)`` with ``shared_A``.
        lora_B: ``(R, O)``, expert after expert.
        router: ``nn.Linear(I, E, bias=False)``.
        scaling: ``(R,)`` float32 buffer; a zero switches one rank component off.
        aux_coefs: ``(2,)`` float32 buffer, the two coefficients; multiply it in place by the loss
            scale of a ``GradScaler``, or divide by the steps of gradient accumulation. To switch a
            loss on, call :meth:`set_aux_loss`.
        record_routing: Whether a forward pass leaves :attr:`routing` behind, True at first. Set it
            to False to compile activation checkpointing (non-reentrant) without a graph break: a
            compiled region that is to run twice may not change the layer. Or keep the figures and
            set ``torch._dynamo.config.skip_fwd_side_effects_in_bwd_under_checkpoint``.

    Raises:
        TypeError: ``base_layer`` has no in and out features.
        ValueError: A number is out of range.

    Example:
        >>> import torch
        >>> layer = FusedMoELoRA(torch.nn.Linear(16, 8), ranks=[4, 4, 2], top_k=2)
        >>> layer(torch.randn(3, 5, 16)).shape
        torch.Size([3, 5, 8])
        >>> sorted(name for name, p in layer.named_parameters() if p.requires_grad)
        ['lora_A', 'lora_B', 'router.weight']
    """

    scaling: Tensor
    aux_coefs: Tensor

    def __init__(
        self,
        base_layer: nn.Module,
        ranks: Sequence[int],
        top_k: int | None = None,
        lora_alpha: float = 16,
        lora_dropout: float = 0.0,
        shared_A: bool = False,
        use_rslora: bool = False,
        load_balance_coef: float = 0.0,
        z_loss_coef: float = 0.0,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        ranks = tuple(int(r) for r in ranks)
        if any(r < 0 for r in ranks):
            raise ValueError(f"ranks must not be negative, got {list(ranks)}")
        if shared_A and len(set(ranks)) > 1:
            raise ValueError(f"with shared_A all experts have one rank, got {list(ranks)}")
        if top_k is not None and ranks and not 1 <= top_k <= len(ranks):
            raise ValueError(f"top_k must be in 1..E = 1..{len(ranks)}, got {top_k}")
        if not 0 <= lora_dropout < 1:
            raise ValueError(f"lora_dropout must be in [0, 1), got {lora_dropout}")
        self.in_features, self.out_features = linear_features(base_layer)
        self.ranks, self.shared_A = ranks, shared_A
        self.top_k = default_top_k(len(ranks), shared_A) if top_k is None else top_k
        self.lora_alpha, self.lora_dropout, self.use_rslora = lora_alpha, lora_dropout, use_rslora
        self.batch: BatchContext | None = None
        self.fisher: Any = None  # LayerFisher while a scores.FisherCollector is active
        self.record_routing = True
        self._routed: tuple[Tensor, Tensor, Tensor | None] | None = None

        self.base_layer = base_layer.requires_grad_(False)
        reference = next(base_layer.parameters(), torch.empty(0))
        if dtype is None:
            floating = reference.dtype if reference.is_floating_point() else torch.float32
            dtype = torch.promote_types(floating, torch.float32)
        options: dict[str, Any] = {"device": reference.device, "dtype": dtype}
        rows_A = (ranks[0] if ranks else 0) if shared_A else sum(ranks)
        self.lora_A = nn.Parameter(torch.empty(rows_A, self.in_features, **options))
        self.lora_B = nn.Parameter(torch.empty(sum(ranks), self.out_features, **options))
        self.router = Router(self.in_features, len(ranks), bias=False, **options)
        by_rank = [
            lora_alpha / (math.sqrt(r) if use_rslora else r) for r in ranks for _ in range(r)
        ]
        device = reference.device
        self.register_buffer("scaling", torch.tensor(by_rank, dtype=torch.float32, device=device))
        coefs = torch.zeros(2, dtype=torch.float32, device=device)
        self.register_buffer("aux_coefs", coefs, persistent=False)
        self.load_balance_coef = self.z_loss_coef = 0.0
        self.set_aux_loss(load_balance_coef, z_loss_coef)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw lora_A and the router anew and set lora_B to zero."""
        kaiming_uniform_(self.lora_A)
        self.router.reset_parameters()
        nn.init.zeros_(self.lora_B)

    @property
    def weight(self) -> Any:
        """The frozen base weight, for code that asks a linear layer for its dtype or device."""
        return self.base_layer.weight

    @property
    def bias(self) -> Any:
        """The frozen base bias, or None."""
        return getattr(self.base_layer, "bias", None)

    def forward(self, x: Tensor, token_mask: Tensor | None = None) -> Tensor:
        """Return base and experts' output for ``x``.

        Args:
            x: ``(..., I)``.
            token_mask: ``(...)`` bool, False on padding, which gets no expert and does not count
                in the auxiliary losses; None takes the mask of the batch context, if there is one.

        Returns:
            ``(..., O)``, in the dtype the base layer alone would give.

        Raises:
            ValueError: A shape or dtype does not fit.
        """
        if token_mask is None and self.batch is not None:
            token_mask = self.batch.mask_for(x)
        fisher = None
        if self.fisher is not None and torch.is_grad_enabled():
            fisher = self.fisher.buffers(x)
        options = {**self.call_options(x), "token_mask": token_mask, "fisher": fisher}
        if fisher is not None:
            options["aux_coefs"] = None
        experts = (self.lora_A, self.lora_B, self.router.weight)
        linear = self.call_linear(x)
        if linear is None:
            base_out = self.base_layer(x)
            result = functional.moe_lora(x.to(base_out.dtype), base_out, *experts, **options)
        else:
            result = functional.moe_lora_linear(*linear, *experts, **options)
        if self.record_routing or fisher is not None:
            self._routed = (result.logits, result.experts, token_mask)
        return result.out

    def call_options(self, x: Tensor) -> dict[str, Any]:
        """Return the layer's own keywords of the functional operations, with a fresh dropout seed.

        Args:
            x: The input that they are for.
        """
        drop = self.lora_dropout if self.training else 0.0
        return {
            "ranks": self.ranks,
            "top_k": self.top_k if self.ranks else None,
            "scaling": self.scaling,
            "shared_A": self.shared_A,
            "dropout_p": drop,
            # drawn from torch's generator, so a checkpoint's recomputation draws the same seed
            "dropout_seed": torch.randint(2**63 - 1, (), device=x.device) if drop else None,
            "aux_coefs": self.aux_coefs if self.load_balance_coef or self.z_loss_coef else None,
        }

    def call_linear(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None] | None:
        """Return ``x`` and the frozen linear's weight and bias, in autocast's dtype if any.

        Args:
            x: The input.

        Returns:
            None where the base is no plain frozen linear, and must run itself.
        """
        weight, bias = linear_weight(self.base_layer), self.bias
        if weight is None:
            return None
        if not torch.is_autocast_enabled(x.device.type):
            return x, weight, bias
        dtype = torch.get_autocast_dtype(x.device.type)
        return x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)

    def set_aux_loss(
        self, load_balance_coef: float | None = None, z_loss_coef: float | None = None
    ) -> None:
        """Set the coefficients of the auxiliary losses from the next forward pass on.

        Args:
            load_balance_coef: Of the load balancing loss; None leaves it as it is.
            z_loss_coef: Of the router z-loss; None leaves it as it is.

        Raises:
            ValueError: A coefficient is negative or not finite.

        Example:
            >>> layer = FusedMoELoRA(nn.Linear(8, 8), ranks=[4, 4], z_loss_coef=0.25)
            >>> layer.set_aux_loss(load_balance_coef=0.5)
            >>> layer.aux_coefs
            tensor([0.5000, 0.2500])
        """
        balance = self.load_balance_coef if load_balance_coef is None else load_balance_coef
        z = self.z_loss_coef if z_loss_coef is None else z_loss_coef
        for name, coef in (("load_balance_coef", balance), ("z_loss_coef", z)):
            if not 0 <= coef < math.inf:
                raise ValueError(f"{name} must be finite and not negative, got {coef}")
        self.load_balance_coef, self.z_loss_coef = balance, z
        if load_balance_coef is not None:
            self.aux_coefs[0] = load_balance_coef
        if z_loss_coef is not None:
            self.aux_coefs[1] = z_loss_coef

    @property
    def routing(self) -> LayerRouting | None:
        """How the last forward pass routed its tokens; None before the first."""
        if self._routed is None:
            return None
        logits, experts, mask = self._routed
        return LayerRouting(logits, experts, None if mask is None else mask.reshape(-1))

    def aux_loss(self) -> Tensor:
        """Return the value of the auxiliary losses in the last forward pass, times coefficients.

        For logging: the backward has already added their gradient, so this one carries none.

        Returns:
            A scalar; zero before the first forward pass, or without experts.
        """
        routing = self.routing
        if routing is None or not self.ranks:
            return self.aux_coefs.new_zeros(())
        logits, experts, mask = routing
        balance = functional.load_balance_loss(logits, experts, token_mask=mask)
        z = functional.router_z_loss(logits, token_mask=mask)
        return self.aux_coefs[0] * balance + self.aux_coefs[1] * z

    def expert_load(self) -> Tensor:
        """Return each expert's share of all picks in the last forward pass.

        Returns:
            ``(E,)`` float32, summing to 1; zeros before the first forward pass.
        """
        if (routing := self.routing) is None:
            return self.aux_coefs.new_zeros(len(self.ranks))
        return functional.expert_load(
            routing.experts, len(self.ranks), token_mask=routing.token_mask
        )

    def extra_repr(self) -> str:
        """Describe the adapter as ``print(model)`` shows it."""
        equal = len(set(self.ranks)) == 1
        ranks = f"{self.ranks[0]} x {len(self.ranks)}" if equal else str(list(self.ranks))
        parts = [f"ranks={ranks}", f"top_k={self.top_k}", f"lora_alpha={self.lora_alpha}"]
        parts += [f"lora_dropout={self.lora_dropout}"] * bool(self.lora_dropout)
        parts += ["shared_A=True"] * self.shared_A + ["use_rslora=True"] * self.use_rslora
        return ", ".join(parts)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "FusedMoELoRA":
        # model.half() and model.to(dtype) move the buffers but must not round them
        exact = {name: getattr(self, name) for name in ("scaling", "aux_coefs")}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, before in exact.items():
            after = getattr(self, name)
            if after.dtype != torch.float32:
                setattr(self, name, before.to(after.device))
        return self


def kaiming_uniform_(weight: Tensor) -> None:
    """Draw a ``(rows, I)`` weight as ``nn.Linear`` does: Kaiming-uniform with a = sqrt 5."""
    if weight.numel():
        bound = 1 / math.sqrt(weight.shape[1])
        nn.init.uniform_(weight, -bound, bound)


def linear_features(layer: nn.Module) -> tuple[int, int]:
    """Return (inputs, outputs) of a linear-like layer.

    Raises:
        TypeError: The layer does not say.
    """
    if is_conv1d(layer):
        weight: Any = layer.weight
        return int(weight.shape[0]), int(weight.shape[1])
    num_inputs = getattr(layer, "in_features", None)
    num_outputs = getattr(layer, "out_features", None)
    if not isinstance(num_inputs, int) or not isinstance(num_outputs, int):
        raise TypeError(
            "base_layer must be a linear layer with in_features and out_features, "
            f"got {type(layer).__name__}"
        )
    return num_inputs, num_outputs


def linear_weight(layer: nn.Module) -> Tensor | None:
    """Return the ``(O, I)`` weight of a plain frozen linear; None if the layer must run itself.

    It must where it is no plain linear (quantised, subclassed), where somebody hooked it or gave it
    a forward of its own (offloading does), and where it trains after all.
    """
    # exact types: a subclass may compute anything
    plain = type(layer) is nn.Linear or is_conv1d(layer)
    hooks = (layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks)
    if not plain or any(hooks) or "forward" in layer.__dict__:
        return None
    weight: Any = layer.weight
    bias: Any = layer.bias
    if weight.requires_grad or (bias is not None and bias.requires_grad):
        return None
    oriented: Tensor = weight.T if is_conv1d(layer) else weight
    return oriented


def is_conv1d(layer: nn.Module) -> bool:
    """Tell whether this is transformers' ``Conv1D``, a linear with a transposed weight."""
    kind = type(layer)
    return kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils"
