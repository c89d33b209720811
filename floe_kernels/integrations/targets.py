"""Discovery: which linears of a model can carry experts, and what users call them."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from torch import nn

from floe_kernels._types import ModuleSpec
from floe_kernels.allocation.arguments import nearest
from floe_kernels.integrations.wrapped import model_of, original_of
from floe_kernels.nn.fused_moe_lora import linear_features

_LLAMA = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
DEFAULT_TARGETS = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "gemma": _LLAMA,
    "gemma2": _LLAMA,
    "gemma3": _LLAMA,
    "gemma3_text": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "phi": ("q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2"),
    "gpt2": ("c_attn", "c_proj", "c_fc"),
}
GROUPS = ("all-linear", "attention", "mlp")

# torch's own blocks read these layers' weights without calling them
_NEVER_CALLED = (nn.MultiheadAttention, nn.TransformerEncoderLayer)


class Linear(NamedTuple):
    """One linear of a model that can carry experts, or already does."""

    module: nn.Module  #: the linear, or the FusedMoELoRA around it
    spec: ModuleSpec  #: its sizes and its layer
    in_block: bool  #: whether a repeated block encloses it


def find_modules(
    model: nn.Module, targets: str | Sequence[str] | None = None
) -> dict[str, ModuleSpec]:
    """List the linears of a model that can carry experts.

    A linear is anything that :class:`~floe_kernels.nn.FusedMoELoRA` can wrap. A wrapped one is
    listed under its own name with its base's sizes; routers and bases are not listed. A linear
    that is shared under several names is listed once, under its first. The linears of
    ``nn.MultiheadAttention`` and ``nn.TransformerEncoderLayer`` are never listed, because these
    read the weights without calling the layer. Names are the base model's, whatever
    ``torch.compile``, DDP or PEFT wrapped around it.

    Args:
        model: Any module. Where the architecture is Llama, Mistral, Gemma 1-3, Qwen 2-3, Phi or
            GPT-2 (``model.config.model_type``), the default is the linears of its language
            blocks; elsewhere, ``"all-linear"``.
        targets: Names, each a suffix (``"q_proj"``) or whole, or ``"all-linear"`` (every linear of
            the repeated blocks, or without such blocks every one but the output head),
            ``"attention"`` (those of them below a module with "attn" or "attention" in its name)
            or ``"mlp"`` (the others). None means the architecture's default.

    Returns:
        Name -> sizes and layer, in model order; the layer is the outermost repeated block around
        the linear (``"model.layers.3"``), or the linear's own name outside of any.

    Raises:
        ValueError: A target matches nothing (the nearest names are given), or nothing is found.

    Example:
        >>> block = lambda: nn.ModuleDict({"attn": nn.Linear(8, 8), "fc": nn.Linear(8, 4)})
        >>> model = nn.ModuleDict({"h": nn.ModuleList([block(), block()]), "head": nn.Linear(4, 9)})
        >>> find_modules(model, "fc")["h.1.fc"]
        ModuleSpec(in_features=8, out_features=4, layer='h.1')
        >>> list(find_modules(model))
        ['h.0.attn', 'h.0.fc', 'h.1.attn', 'h.1.fc']
    """
    model = model_of(model)
    linears, aliases = linears_of(model)
    if targets is None:
        names = _default(model, linears)
    else:
        wanted = [targets] if isinstance(targets, str) else list(targets)
        if not wanted:
            raise ValueError("targets must name something, got none")
        names = {name for target in wanted for name in _matches(target, model, linears, aliases)}
    if not names:
        raise ValueError(
            f"a model must have linear layers to adapt, {type(model).__name__} has none"
        )
    return {name: linear.spec for name, linear in linears.items() if name in names}


def linears_of(model: nn.Module) -> tuple[dict[str, Linear], dict[str, str]]:
    """Return every linear by its first name, in model order, and every name -> the first one."""
    linears: dict[str, Linear] = {}
    aliases: dict[str, str] = {}
    first: dict[int, str] = {}
    for name, module, features, block in _walk(model, "", None):
        aliases[name] = first.setdefault(id(module), name)
        if aliases[name] == name:
            linears[name] = Linear(module, ModuleSpec(*features, block or name), block is not None)
    return linears, aliases


def _walk(
    parent: nn.Module, prefix: str, block: str | None
) -> Iterator[tuple[str, nn.Module, tuple[int, int], str | None]]:
    """Yield (name, module, features, block) of all linears, once a name, never from inside one."""
    if isinstance(parent, _NEVER_CALLED):
        return
    for key, child in parent._modules.items():
        if child is None:
            continue
        name = f"{prefix}{key}"
        inside = name if block is None and _is_repeated(child, parent) else block
        original = original_of(child)
        try:
            features = linear_features(original)
        except TypeError:
            yield from _walk(original, f"{name}.", inside)
            continue
        if min(features) > 0:  # 0 is a lazy layer that has not seen its input yet
            yield name, child, features, inside


def _is_repeated(child: nn.Module, parent: nn.Module) -> bool:
    if isinstance(parent, nn.Sequential):
        return sum(type(sibling) is type(child) for sibling in parent) > 1
    return isinstance(parent, nn.ModuleList)


def _default(model: nn.Module, linears: dict[str, Linear]) -> set[str]:
    kind = getattr(getattr(model, "config", None), "model_type", None)
    suffixes = DEFAULT_TARGETS.get(kind) if isinstance(kind, str) else None
    if suffixes is None:
        return _all_linear(model, linears)
    return {
        name
        for name, linear in linears.items()
        if linear.in_block and name.rpartition(".")[2] in suffixes and "vision" not in name
    }


def _all_linear(model: nn.Module, linears: dict[str, Linear]) -> set[str]:
    inside = {name for name, linear in linears.items() if linear.in_block}
    head = _output_head(model)
    return inside or {name for name, linear in linears.items() if linear.module is not head}


def _output_head(model: nn.Module) -> nn.Module | None:
    get: Any = getattr(model, "get_output_embeddings", None)
    try:
        head = get() if get is not None else None
    except NotImplementedError:
        return None
    return head if isinstance(head, nn.Module) else None


def _matches(
    target: str, model: nn.Module, linears: dict[str, Linear], aliases: dict[str, str]
) -> set[str]:
    if target in GROUPS:
        found = _all_linear(model, linears)
        if target != "all-linear":
            want = target == "attention"
            found = {name for name in found if _is_attention(name) == want}
    else:
        found = {
            first
            for name, first in aliases.items()
            if name == target or name.endswith(f".{target}")
        }
    if not found:
        last = dict.fromkeys(name.rpartition(".")[2] for name in aliases)
        near = nearest(target, aliases if "." in target else (*last, *GROUPS))
        raise ValueError(f"every target must match a linear layer, got {target!r}{near}")
    return found


def _is_attention(name: str) -> bool:
    return any(word in name.lower() for word in ("attn", "attention"))
