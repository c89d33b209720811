"""Layers that take the same input, computed together: query, key and value; gate and up."""

import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from floe_kernels.functional.moe_lora import MoELoRAOutput
from floe_kernels.functional.shared_inputs import ExpertLinear, moe_lora_shared_linear
from floe_kernels.nn.fused_moe_lora import FusedMoELoRA, linear_weight

# children of one module that take the same input, in the order in which they are called
SIBLINGS = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("wq", "wk", "wv"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("wi_0", "wi_1"),
)
# where no kernel shares the work, keeping outputs for later calls only costs: on 2 cores of an AMD
# EPYC, three layers of 576 x 576 took 1.56 times as long for one token, 1.06 times for 512
ALONE = frozenset({"cpu"})


class SharedInputs:
    """What :func:`fuse_shared_inputs` did, and how to undo it.

    Attributes:
        groups: The names of the layers that are now computed together, group by group.
        refused: Name of a layer that was left alone -> why, in a sentence.
    """

    def __init__(self, groups: list["_Group"], names: list[tuple[str, ...]]) -> None:
        self.groups, self.refused = names, dict[str, str]()
        self._groups = groups

    def remove(self) -> None:
        """Let every layer compute for itself again; nothing else about it changes."""
        for group in self._groups:
            group.dissolve()
        self._groups, self.groups = [], []

    def __repr__(self) -> str:
        """Say in a sentence what was done."""
        if not self.groups:
            return NOTHING
        layers, groups = sum(map(len, self.groups)), len(self.groups)
        return f"{layers} layers share their input, in {groups} group{'s' * (groups != 1)}"


NOTHING = "no two adapted layers of this model are known to take the same input: nothing changed"


def fuse_shared_inputs(
    model: nn.Module, groups: Sequence[Sequence[str]] | None = None
) -> SharedInputs:
    """Compute adapted layers that take the same input together: query, key, value; gate, up.

    The first of a group to be called computes all of it in one operator and keeps the others'
    outputs until they are called with the same input; a call with another computes anew. From
    Hopper on, where x is bfloat16 or float16, without dropout, for two or three layers of at most
    128 columns and 16 experts, that operator reads x once for all routers and lora_A, and updates
    x's gradient once; otherwise its kernels run layer by layer.

    Values and gradients are those of the separate layers, and so are names, parameters, files,
    auxiliary losses and dropout: every layer draws its own seed, in the order of the group. A layer
    is computed alone, as before, while a :class:`~floe_kernels.FisherCollector` scores it, while
    its base is hooked or trains, under ``torch.export``, and, compiled, where ``record_routing`` is
    off, because sharing writes to the group. So is every layer on a CPU, which would save no work
    and pay for the bookkeeping.

    Args:
        model: A model with :class:`~floe_kernels.FusedMoELoRA` layers; changed in place.
        groups: Names of the layers that share an input, group by group, in the order of their
            calls; None means children of one module by the names that transformers' models give
            them, except in encoder-decoder models, whose cross-attention feeds them differently.

    Returns:
        A handle: its ``groups``, what it ``refused`` and why, and ``remove()``. Without a group
        nothing is changed, and a warning says so.

    Raises:
        ValueError: A group in ``groups`` names what cannot be computed together.

    Example:
        >>> class Mlp(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.gate_proj, self.up_proj = (
        ...             FusedMoELoRA(nn.Linear(8, 4), ranks=[2, 2]) for _ in range(2)
        ...         )
        ...
        ...     def forward(self, x):
        ...         return self.gate_proj(x) * self.up_proj(x)
        >>> handle = fuse_shared_inputs(Mlp())
        >>> handle
        2 layers share their input, in 1 group
        >>> handle.remove()
    """
    modules = dict(model.named_modules())
    made: list[_Group] = []
    names: list[tuple[str, ...]] = []
    refused: dict[str, str] = {}
    if groups is not None:
        for group in groups:
            unknown = [name for name in group if name not in modules]
            why = f"there is no layer {unknown[0]}" if unknown else ""
            members = [modules[name] for name in group if name in modules]
            why = why or next(filter(None, map(_obstacle, members)), "") or _mismatch(members)
            if why:
                raise ValueError(f"{' and '.join(group)} cannot share their input: {why}")
        wanted = [tuple(group) for group in groups]
    elif getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        wanted = []
        refused[""] = "cross-attention feeds query and key differently: name the groups yourself"
    else:
        wanted = _known_groups(modules, refused)
    for group in wanted:
        members = [modules[name] for name in group]
        why = _mismatch(members)
        if why:
            refused |= dict.fromkeys(group, why)
            continue
        made.append(_Group(members))
        names.append(group)
    handle = SharedInputs(made, names)
    handle.refused = refused
    if not made:
        reasons = "; ".join(sorted(set(refused.values())))
        warnings.warn(NOTHING + (f" ({reasons})" if reasons else ""), stacklevel=2)
    return handle


class SharedInputMoELoRA(FusedMoELoRA):
    """A :class:`FusedMoELoRA` that is computed together with those that take the same input."""

    group: "_Group"

    def forward(self, x: Tensor, token_mask: Tensor | None = None) -> Tensor:
        """Return base and experts' output for ``x``; see :meth:`FusedMoELoRA.forward`."""
        if token_mask is not None or not self.group.may_serve(self, x):
            return super().forward(x, token_mask)
        result, mask = self.group.take(self, x)
        if self.record_routing:
            self._routed = (result.logits, result.experts, mask)
        return result.out


class _Pending(NamedTuple):
    """The outputs of one input that their layers have not asked for yet."""

    x: Tensor
    state: tuple[Any, ...]  # of everything else that an output depends on
    results: tuple[MoELoRAOutput | None, ...]  # None once taken
    mask: Tensor | None


class _Group:
    """Layers that take the same input.

    The outputs wait in one place and belong to one tensor: it is held, so that no other can be
    mistaken for it, and compared by identity and version. What nobody fetches (a recomputation
    that stops early) is never returned to anyone, and is dropped by the next call.
    """

    def __init__(self, members: Sequence[nn.Module]) -> None:
        self.members: tuple[Any, ...] = tuple(members)
        self.pending: _Pending | None = None
        self.lost = 0  # times that outputs were computed in vain
        for member in self.members:
            member.__class__ = SharedInputMoELoRA
            member.group = self

    def __getstate__(self) -> dict[str, Any]:
        """Leave behind what waits: a copy of the model has had no input yet."""
        return {**self.__dict__, "pending": None}

    def dissolve(self) -> None:
        for member in self.members:
            if isinstance(member, SharedInputMoELoRA) and member.group is self:
                del member.group
                member.__class__ = FusedMoELoRA  # type: ignore[assignment]
        self.pending = None

    def may_serve(self, layer: SharedInputMoELoRA, x: Tensor) -> bool:
        """Say whether the layers may be computed together just now."""
        if x.device.type in ALONE:
            return False
        compiling = torch.compiler.is_compiling()
        if compiling and (torch.compiler.is_exporting() or not layer.record_routing):
            return False
        if not compiling and torch._C._are_functorch_transforms_active():
            return False
        # a replica of one layer has the originals for a group
        if not any(member is layer for member in self.members):
            return False
        return all(
            member.fisher is None
            and member.batch is layer.batch
            and linear_weight(member.base_layer) is not None
            # sharded or offloaded by itself, a layer's weights come when it is called, not before
            and type(member.lora_A) in (nn.Parameter, Tensor)
            and member.lora_A.device == member.weight.device == x.device
            for member in self.members
        )

    def take(self, layer: SharedInputMoELoRA, x: Tensor) -> tuple[MoELoRAOutput, Tensor | None]:
        """Return one layer's output and the token mask it was computed with."""
        index = [member is layer for member in self.members].index(True)
        state, pending = self._state(x), self.pending
        if (
            pending is None
            or pending.x is not x
            or pending.state != state
            or pending.results[index] is None
        ):
            if pending is not None:
                self._lose()
            mask = None if layer.batch is None else layer.batch.mask_for(x)
            pending = _Pending(x, state, tuple(self._compute(x, mask)), mask)
        result = pending.results[index]
        assert result is not None
        left = tuple(None if i == index else r for i, r in enumerate(pending.results))
        done = all(r is None for r in left)
        self.pending = None if done else pending._replace(results=left)
        return result, pending.mask

    def _lose(self) -> None:
        self.lost += 1
        if self.lost == 2:  # once may be a forward pass that was interrupted
            warnings.warn(
                "fuse_shared_inputs grouped layers that do not all take the same input: outputs "
                "are computed that nobody asks for; remove() the groups, or name them yourself",
                stacklevel=4,
            )

    def _state(self, x: Tensor) -> tuple[Any, ...]:
        """Return what a kept output depends on besides the identity of x."""
        kind = x.device.type
        autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        modes = (torch.is_grad_enabled(), autocast, *(m.training for m in self.members))
        if torch.compiler.is_compiling():  # a graph orders its reads and writes itself
            return modes
        tensors = [
            t
            for m in self.members
            for t in (m.weight, m.lora_A, m.lora_B, m.router.weight, m.scaling)
        ]
        return (*modes, *(None if t.is_inference() else t._version for t in (x, *tensors)))

    def _compute(self, x: Tensor, mask: Tensor | None) -> list[MoELoRAOutput]:
        linears, narrow = [], x
        for layer in self.members:
            # options in the order of the members: each draws its seed as it would alone
            narrow, weight, bias = layer.call_linear(x)  # None never: may_serve has looked
            experts = (layer.lora_A, layer.lora_B, layer.router.weight)
            linears.append(ExpertLinear(weight, bias, *experts, **layer.call_options(x)))
        return moe_lora_shared_linear(narrow, linears, token_mask=mask)


def _known_groups(modules: dict[str, nn.Module], refused: dict[str, str]) -> list[tuple[str, ...]]:
    found = []
    for parent in modules:
        for siblings in SIBLINGS:
            group = [f"{parent}.{name}".lstrip(".") for name in siblings]
            layers = [name for name in group if isinstance(modules.get(name), FusedMoELoRA)]
            reasons = {name: _obstacle(modules[name]) for name in layers}
            refused |= {name: why for name, why in reasons.items() if why and len(layers) > 1}
            members = tuple(name for name in layers if not reasons[name])
            if "cross" in parent.rpartition(".")[2].lower():
                refused |= dict.fromkeys(members, "cross-attention feeds query and key differently")
            elif len(members) > 1:
                found.append(members)
    return found


def _obstacle(module: nn.Module) -> str:
    """Say why a layer must be computed alone; nothing if it need not."""
    if isinstance(module, SharedInputMoELoRA):
        return "it shares its input already"
    if type(module) is not FusedMoELoRA:
        return f"only FusedMoELoRA itself can share its input, not {type(module).__name__}"
    if not module.ranks:
        return "it has no experts"
    if linear_weight(module.base_layer) is None:
        return f"its base runs itself ({type(module.base_layer).__name__}: no plain frozen linear)"
    return ""


def _mismatch(members: Sequence[Any]) -> str:
    """Say why layers that could share an input cannot share it with each other."""
    if len(members) < 2 or len({id(m) for m in members}) < len(members):
        return "a group is two layers or more, each named once"
    for what, values in (
        ("input widths", {m.in_features for m in members}),
        ("devices", {m.lora_A.device for m in members}),
        ("dtypes of the base", {m.weight.dtype for m in members}),
        ("dtypes of the experts", {m.lora_A.dtype for m in members}),
    ):
        if len(values) > 1:
            return f"{what} differ: {', '.join(sorted(map(str, values)))}"
    return ""
