"""The hooks that carry a batch's padding mask from a model's arguments to its adapted layers."""

import inspect
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Variable

from floe_kernels.nn import BatchContext
from floe_kernels.nn.packing import batch_shape, packed_padding, sample_starts


class BatchHook:
    """Publish each batch's token mask before a model's forward pass and withdraw it after.

    The mask comes back for the backward pass: activation checkpointing then runs layers again, and
    must route as it did, whatever batches went through the model in between.

    Args:
        model: The model whose arguments are read: ``attention_mask`` (B, S), of which the last T
            columns belong to ``input_ids`` (B, T) or ``inputs_embeds`` (B, T, I). A packed batch
            has no such mask: there, with ``labels``, padding is what ends a row in samples of one
            token (:func:`floe_kernels.nn.packing.packed_padding`).
        batch: What its adapted layers read.

    Example:
        >>> class Model(nn.Module):
        ...     def forward(self, input_ids, attention_mask):
        ...         return batch.token_mask
        >>> model, batch = Model(), BatchContext()
        >>> handles = BatchHook(model, batch).install(model)
        >>> model(torch.zeros(1, 1), attention_mask=torch.tensor([[1, 1, 0]]))
        tensor([[False]])
    """

    def __init__(self, model: nn.Module, batch: BatchContext) -> None:
        self.batch = batch
        self.names = list(inspect.signature(model.forward).parameters)
        # there the one argument named attention_mask is the encoder's
        config = getattr(model, "config", None)
        self.two_sequences = bool(getattr(config, "is_encoder_decoder", False))

    def install(self, model: nn.Module) -> list[Any]:
        """Hook ``model`` and return the handles that unhook it."""
        return [
            model.register_forward_pre_hook(self.before, with_kwargs=True),
            model.register_forward_hook(self.after, always_call=True),
        ]

    def before(self, _model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Publish the mask of the tokens that go in, or that there is none."""
        self.batch.token_mask = None if self.two_sequences else self._token_mask(args, kwargs)

    def after(self, _model: nn.Module, _args: Any, output: Any) -> None:
        """Withdraw the mask, so that no call of a part of the model finds a stale one."""
        mask, self.batch.token_mask = self.batch.token_mask, None
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return  # a compiled graph recomputes from its own tensors
        tensor: Any
        for tensor in _tensors(output):
            if tensor.grad_fn is not None:  # a leaf would keep the hook for good
                tensor.register_hook(partial(self._restore, mask))

    def _restore(self, mask: Tensor | None, _grad: Tensor) -> None:
        # the engine runs younger nodes first, so all of this forward's nodes follow, and only they
        self.batch.token_mask = mask
        engine: Any = Variable._execution_engine
        engine.queue_callback(self._clear)

    def _clear(self) -> None:
        self.batch.token_mask = None

    def _token_mask(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
        arguments = {**dict(zip(self.names, args, strict=False)), **kwargs}
        shape = batch_shape(arguments)
        if shape is None:
            return None
        mask = arguments.get("attention_mask")
        if isinstance(mask, Tensor) and mask.ndim == 2:
            start = mask.shape[1] - shape[1]  # the columns before belong to the KV cache
            return mask[:, start:].bool() if start >= 0 else None
        # a finished 4-D mask no longer says what is padding; and without labels a last sample of
        # one token may be a prompt, whose output somebody wants
        starts = None if arguments.get("labels") is None else sample_starts(arguments)
        return None if starts is None else ~packed_padding(starts)


def _tensors(output: Any) -> Iterator[Tensor]:
    """Yield the tensors of a model's output: a tensor, a tuple or a mapping, nested or not."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, dict):
        for value in output.values():
            yield from _tensors(value)
    elif isinstance(output, (tuple, list)):
        for value in output:
            yield from _tensors(value)
