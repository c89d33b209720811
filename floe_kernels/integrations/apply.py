"""Putting a plan's experts on a model, and taking them off again."""

import warnings
from dataclasses import dataclass
from typing import Any

from torch import nn

from floe_kernels.allocation.arguments import nearest
from floe_kernels.allocation.plan import Placement, Plan
from floe_kernels.integrations.batch_hook import BatchHook
from floe_kernels.integrations.fingerprint import fingerprint
from floe_kernels.integrations.targets import linears_of
from floe_kernels.integrations.wrapped import is_sharded, is_tuned, model_of
from floe_kernels.nn import BatchContext, FusedMoELoRA

_STATE = "_floe_applied"


@dataclass
class Applied:
    """What :func:`apply_plan` leaves on a model, for whoever undoes or saves it."""

    plan: Plan
    trainable: frozenset[str]  #: parameters that required a gradient before
    hooks: list[Any]  #: handles of the batch hook


def apply_plan(
    model: nn.Module, plan: Plan, *, load_balance_coef: float = 0.0, z_loss_coef: float = 0.0
) -> nn.Module:
    """Freeze a model and wrap the modules that a plan places experts on, in place.

    Outputs do not change until training moves lora_B from zero. Padding reaches the layers by
    itself: a hook on the model reads its 2-D ``attention_mask``, or what tells packed sequences
    apart (transformers' conventions; not of encoder-decoder models), and padding tokens get no
    expert. Works under ``generate()``, ``torch.compile`` and activation checkpointing. A module
    shared under several names is wrapped under all of them. A placement with no expert leaves its
    module untouched.

    Args:
        model: Any module; ``torch.compile`` may have wrapped it already. Nothing of it changes
            unless the whole plan fits.
        plan: A plan made for it: every module of the plan is there, with the same sizes.
        load_balance_coef: Coefficient of every layer's load balancing loss, whose gradient its
            backward adds. Under gradient accumulation or a ``GradScaler`` leave it to
            :class:`~floe_kernels.integrations.trainer.AuxLossScale`.
        z_loss_coef: Coefficient of every layer's router z-loss, likewise.

    Returns:
        ``model``.

    Raises:
        ValueError: The plan is for another model, the model carries adapters already or is
            sharded, a module is an output head whose weight transformers ties to the embedding, or
            a coefficient is negative.

    Warns:
        UserWarning: The plan's fingerprint is of a model with other weights.

    Example:
        >>> from floe_kernels.allocation.plan import Placement
        >>> from floe_kernels.integrations.targets import find_modules
        >>> model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
        >>> plan = Plan({"1": Placement((4, 4), 1)}, "by hand", modules=find_modules(model))
        >>> apply_plan(model, plan)[1].ranks
        (4, 4)
    """
    if plan.fingerprint and plan.fingerprint != fingerprint(model_of(model)):
        warnings.warn(
            f"the plan was made on {plan.base_model or 'a model'} with other weights "
            f"(fingerprint {plan.fingerprint[:12]}..., this one has another)",
            stacklevel=2,
        )
    return place(model, plan, load_balance_coef=load_balance_coef, z_loss_coef=z_loss_coef)


def place(model: nn.Module, plan: Plan, **aux_coefs: float) -> nn.Module:
    """Do what :func:`apply_plan` does, whatever the plan's fingerprint."""
    target = model_of(model)
    if any(is_tuned(module) for module in target.modules()):
        raise ValueError(
            "a model must carry no adapters when a plan is applied, got PEFT's: "
            "call its merge_and_unload() or unload() first"
        )
    found = adapted_modules(target)
    if found or hasattr(target, _STATE):
        raise ValueError(
            "a model must carry no adapters when a plan is applied, "
            f"got {len(found)} adapted modules: call remove_adapters(model) first"
        )
    if is_sharded(target):
        raise ValueError(
            "a plan must be applied before the model is sharded, got one whose parameters are "
            "DTensors: call apply_plan or load_adapter first, then fully_shard"
        )
    placed = check_fit(target, plan)
    trainable = frozenset(name for name, p in target.named_parameters() if p.requires_grad)
    batch = BatchContext()
    try:
        wrappers = {
            id(linear): _wrap(linear, plan.placements[name], plan, batch, aux_coefs)
            for name, linear in placed.items()
        }
        hook = BatchHook(target, batch)
    except BaseException:
        _set_flags(target, trainable)
        raise
    target.requires_grad_(False)
    for parent in list(target.modules()):
        for key, child in parent._modules.items():
            if id(child) in wrappers:
                setattr(parent, key, wrappers[id(child)])
    setattr(target, _STATE, Applied(plan, trainable, hook.install(target)))
    return model


def remove_adapters(model: nn.Module) -> nn.Module:
    """Put the original modules back, in place; the adapters' values are lost unless saved.

    The modules are the very objects that :func:`apply_plan` wrapped, the hook is gone, and every
    parameter requires a gradient again if it did. A model without adapters stays as it is.

    Args:
        model: A model that :func:`apply_plan` changed, or with ``FusedMoELoRA`` put in by hand.

    Returns:
        ``model``.

    Example:
        >>> from floe_kernels.allocation.plan import Placement
        >>> from floe_kernels.integrations.targets import find_modules
        >>> model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
        >>> plan = Plan({"1": Placement((4,))}, "by hand", modules=find_modules(model))
        >>> remove_adapters(apply_plan(model, plan))
        Sequential(
          (0): Linear(in_features=8, out_features=8, bias=True)
          (1): Linear(in_features=8, out_features=4, bias=True)
        )
    """
    target = model_of(model)
    for parent in list(target.modules()):
        if isinstance(parent, FusedMoELoRA):
            continue
        for key, child in parent._modules.items():
            if isinstance(child, FusedMoELoRA):
                child.batch = None
                setattr(parent, key, child.base_layer)
    state = applied(target)
    if state is not None:
        for handle in state.hooks:
            handle.remove()
        delattr(target, _STATE)
        _set_flags(target, state.trainable)
    return model


def adapted_modules(model: nn.Module) -> dict[str, FusedMoELoRA]:
    """List a model's adapted modules.

    Args:
        model: Any module.

    Returns:
        Name -> layer, in model order; a shared layer once, under its first name.

    Example:
        >>> adapted_modules(nn.Sequential(FusedMoELoRA(nn.Linear(8, 8), ranks=[4])))["0"].ranks
        (4,)
    """
    modules = model_of(model).named_modules()
    return {name: module for name, module in modules if isinstance(module, FusedMoELoRA)}


def applied(model: nn.Module) -> Applied | None:
    """Return what :func:`apply_plan` left on a model, or None."""
    return getattr(model_of(model), _STATE, None)


def check_fit(model: nn.Module, plan: Plan) -> dict[str, nn.Module]:
    """Return the linears that get experts, by name.

    Raises:
        ValueError: The plan is not for this model; the message names the first module that differs.
    """
    linears, _aliases = linears_of(model)
    for name, spec in plan.modules.items():
        if name not in linears:
            raise ValueError(
                f"a plan must be for this model, got module {name!r} that it lacks"
                f"{nearest(name, linears)}"
            )
        ours = linears[name].spec
        if ours[:2] != spec[:2]:
            raise ValueError(
                f"a plan must be for this model, got {name!r} with {spec.in_features} inputs and "
                f"{spec.out_features} outputs where the model has {ours.in_features} and "
                f"{ours.out_features}"
            )
    placed = {n: linears[n].module for n, p in plan.placements.items() if p.experts}
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    for name in placed:
        if f"{name}.weight" in tied:
            raise ValueError(
                f"an adapted module must own its weight, got {name!r}, "
                f"whose weight transformers ties to {tied[f'{name}.weight']!r}"
            )
    return placed


def _wrap(
    linear: nn.Module,
    placement: Placement,
    plan: Plan,
    batch: BatchContext,
    aux_coefs: dict[str, Any],
) -> FusedMoELoRA:
    layer = FusedMoELoRA(
        linear,
        placement.ranks,
        placement.top_k,
        lora_alpha=plan.lora_alpha,
        lora_dropout=plan.lora_dropout,
        shared_A=plan.shared_A,
        use_rslora=plan.use_rslora,
        **aux_coefs,
    )
    layer.batch = batch
    return layer.train(linear.training)


def _set_flags(model: nn.Module, trainable: frozenset[str]) -> None:
    for name, parameter in model.named_parameters():
        if parameter.requires_grad != (name in trainable):
            parameter.requires_grad_(name in trainable)
