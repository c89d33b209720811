"""PEFT's view of one adapted linear: a base, and one mixture of experts per adapter name."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from floe_kernels.nn import BatchContext, FusedMoELoRA
from floe_kernels.nn.fused_moe_lora import (
    is_conv1d,
    kaiming_uniform_,
    linear_features,
    linear_weight,
)

try:
    from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
except ImportError as error:
    raise ImportError("PEFT's tuner needs peft: pip install floe-kernels[peft]") from error


_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Experts(FusedMoELoRA):
    """The experts of one adapter; what they stand on belongs to somebody else.

    As :class:`~floe_kernels.FusedMoELoRA`, but ``base_layer`` is no submodule, so that every base
    weight keeps one name however many adapters there are, and neither is ``router``: PEFT takes an
    adapter's name out of a parameter's only at the end, or one before. With several active
    adapters, one stands on another.
    """

    def __init__(self, base_layer: nn.Module, *args: Any, **options: Any) -> None:
        super().__init__(base_layer, *args, **options)
        # in a tuple, nn.Module does not make them its children
        self._router = (self._modules.pop("router"),)
        del self._modules["base_layer"]
        self.stand_on(base_layer)

    @property
    def base_layer(self) -> nn.Module:  # type: ignore[override]
        """What gives the output that the experts add to."""
        return self._below[0]

    @property
    def router(self) -> Any:  # type: ignore[override]
        """The router, a child of the :class:`FusedMoELoRALayer`."""
        return self._router[0]

    def stand_on(self, base_layer: nn.Module) -> None:
        """Add to the output of this module from now on."""
        self._below = (base_layer,)


class FusedMoELoRALayer(nn.Module, BaseTunerLayer):
    """A linear with a mixture of LoRA experts for every adapter name.

    Args:
        base_layer: As :class:`~floe_kernels.FusedMoELoRA` takes it.
        batch: What the model's hook writes about each batch.

    Attributes:
        in_features: I.
        out_features: O.
        floe_experts: Adapter name -> its experts.
        floe_router: Adapter name -> its router, ``nn.Linear(I, E, bias=False)``.
        merge_gates: Adapter name -> the fixed gates that merging may use, ``(E,)``.

    Example:
        >>> layer = FusedMoELoRALayer(nn.Linear(8, 4))
        >>> layer.update_layer("default", {"ranks": [2, 2]})
        >>> layer(torch.zeros(3, 8)).shape
        torch.Size([3, 4])
    """

    adapter_layer_names = ("floe_experts", "floe_router")
    other_param_names = ("merge_gates",)

    def __init__(self, base_layer: nn.Module, batch: BatchContext | None = None) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.in_features, self.out_features = linear_features(self._plain())
        self.batch = batch
        self.floe_experts = nn.ModuleDict()
        self.floe_router = nn.ModuleDict()
        self.merge_gates: dict[str, Tensor] = {}
        self._disable_adapters = False
        self._active_adapter: list[str] = []
        self.merged_adapters: list[str] = []

    def update_layer(
        self,
        adapter_name: str,
        options: dict[str, Any],
        *,
        init_weights: bool = True,
        inference_mode: bool = False,
    ) -> None:
        """Add an adapter, in the base's dtype; it becomes active if none is.

        Args:
            adapter_name: Its name.
            options: Arguments of :class:`~floe_kernels.FusedMoELoRA`.
            init_weights: Whether it starts as no change; False draws lora_B, too.
            inference_mode: Whether it stays frozen.
        """
        weight = next(self._plain().parameters(), torch.empty(0))
        dtype = weight.dtype if weight.dtype in _FLOATS else torch.float32  # packed: quantised
        experts = Experts(self.base_layer, **options, dtype=dtype)
        if not init_weights:
            kaiming_uniform_(experts.lora_B)
        experts.batch = self.batch
        self.floe_experts[adapter_name] = experts.train(self.training)
        self.floe_router[adapter_name] = experts.router
        active: Any = self.active_adapters or adapter_name
        self.set_adapter(active, inference_mode=inference_mode)

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Activate adapters, in this order, and make only them trainable."""
        super().set_adapter(adapter_names, inference_mode=inference_mode)
        below = self.base_layer
        for experts in self._active():
            experts.stand_on(below)
            below = experts

    def delete_adapter(self, adapter_name: str) -> None:
        """Take an adapter away."""
        super().delete_adapter(adapter_name)
        flags = {name: p.requires_grad for name, p in self.named_parameters()}
        active: Any = self.active_adapters
        self.set_adapter(active)
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(flags[name])

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the base's output, plus that of the active adapters' experts.

        Raises:
            ValueError: Adapters were named sample by sample, which is not supported.
        """
        if kwargs.pop("adapter_names", None) is not None:
            raise ValueError("a mixture of experts serves one set of adapters a batch, got names")
        if self.disable_adapters and self.merged:
            self.unmerge()
        active = [] if self.disable_adapters or self.merged else self._active()
        out: Tensor = active[-1](x) if active else self.base_layer(x, *args, **kwargs)
        return out

    def experts(self, adapter_name: str) -> Experts:
        """Return the experts of one adapter."""
        found: Any = self.floe_experts[adapter_name]
        mixture: Experts = found
        return mixture

    def get_delta_weight(self, adapter_name: str) -> Tensor:
        """Return what merging an adapter adds to the base weight, in that weight's layout.

        Raises:
            ValueError: Tokens are routed, and no fixed gates were stated.
        """
        experts = self.experts(adapter_name)
        gates = self.merge_gates.get(adapter_name)
        if gates is None and len(experts.ranks) == 1:
            gates = torch.ones(1)  # softmax over one
        if gates is None:
            raise ValueError(
                f"a routed mixture depends on the token, so adapter {adapter_name!r} cannot be "
                "merged into a weight as it is: state fixed gates with set_merge_gates(model, ...) "
                "if an approximation will do, or call unload()"
            )
        lora_A, lora_B = as_lora(experts, gates)
        delta = lora_B @ lora_A
        return delta.T if is_conv1d(self._plain()) else delta

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add adapters to the base weight, with the gates that :func:`set_merge_gates` stated.

        Args:
            safe_merge: Refuse a result that is not finite.
            adapter_names: Which; None means the active ones.

        Raises:
            ValueError: No gates were stated, the base is no plain linear, or the result is not
                finite.
        """
        for name in check_adapters_to_merge(self, adapter_names) or []:
            if name not in self.floe_experts:
                continue
            delta, base = self.get_delta_weight(name), self._plain()
            if linear_weight(base) is None:
                kind = type(base).__name__
                raise ValueError(f"experts merge into a plain frozen linear, got {kind}")
            weight: Any = base.weight
            merged = (weight.data + delta).to(weight.dtype)
            if safe_merge and not merged.isfinite().all():
                raise ValueError(f"a merged weight must be finite, adapter {name!r} makes it not")
            weight.data = merged
            self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Take merged adapters out of the base weight again, to rounding."""
        while self.merged_adapters:
            name = self.merged_adapters.pop()
            weight: Any = self._plain().weight
            weight.data = (weight.data - self.get_delta_weight(name)).to(weight.dtype)

    def _active(self) -> list[Experts]:
        names: Any = self.active_adapters
        return [self.experts(name) for name in names if name in self.floe_experts]

    def _plain(self) -> nn.Module:
        base: Any = BaseTunerLayer.get_base_layer(self)
        module: nn.Module = base
        return module

    def _move_adapter_to_device_of_base_layer(
        self, adapter_name: str, device: torch.device | None = None
    ) -> None:
        # PEFT's own would round the experts to the base's dtype
        weight: Any = self.weight
        for parts in (self.floe_experts, self.floe_router):
            if adapter_name in parts:
                parts[adapter_name].to(device or weight.device)


def as_lora(layer: FusedMoELoRA, gates: Sequence[float] | Tensor) -> tuple[Tensor, Tensor]:
    r"""Return the plain LoRA, of scaling 1, that a layer is under fixed gates.

    .. math:: B A = \sum_e g_e \, s_e \, B_e^\top A_e

    Args:
        layer: E experts, R packed columns.
        gates: E numbers; ``[0, 1, 0]`` is the second expert alone. Experts of gate 0 are left out.

    Returns:
        lora_A ``(r, I)`` and lora_B ``(O, r)`` in float32 (float64 for float64 adapters), where r
        is the sum of the ranks left in, or with ``shared_A`` the one rank.

    Raises:
        ValueError: There are not E gates, or one is not finite.

    Example:
        >>> layer = FusedMoELoRA(nn.Linear(8, 4), ranks=[2, 3])
        >>> [tuple(t.shape) for t in as_lora(layer, [0.0, 1.0])]
        [(3, 8), (4, 3)]
    """
    device = layer.lora_B.device
    dtype = torch.promote_types(layer.lora_B.dtype, torch.float32)
    g = torch.as_tensor(gates).to(device, dtype)
    if g.shape != (len(layer.ranks),) or not g.isfinite().all():
        raise ValueError(f"gates must be {len(layer.ranks)} finite numbers, got {g.tolist()}")
    lora_A, lora_B = layer.lora_A.detach().to(dtype), layer.lora_B.detach().to(dtype)
    columns = g.repeat_interleave(torch.tensor(layer.ranks, device=device))
    lora_B = (columns * layer.scaling)[:, None] * lora_B
    if layer.shared_A:
        return lora_A, lora_B.view(len(layer.ranks), -1, layer.out_features).sum(0).T
    kept = columns != 0
    return lora_A[kept], lora_B[kept].T
