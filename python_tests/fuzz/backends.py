"""Run the public functions and the layer on one kernel after the other."""

import contextlib
from functools import partial
from unittest import mock

import torch

from floe_kernels.ops import grad_square, moe_lora, routing, shared_inputs

PLAIN = torch._C.DispatchKey.CompositeExplicitAutograd
OPERATORS = [
    (moe_lora, "moe_lora_linear"), (moe_lora, "moe_lora"), (moe_lora, "moe_lora_backward"),
    (grad_square, "segment_grad_square"), (grad_square, "linear_grad_square"),
    (routing, "topk_softmax"),
    (shared_inputs, "moe_lora_shared_linear"), (shared_inputs, "moe_lora_shared_backward"),
]  # fmt: skip

try:
    from floe_kernels import _info
except ImportError:  # FLOE_BUILD=none: the reference is all there is
    _info = None

SETS = _info.cpu_isas() if _info else []
BACKENDS = ["reference", *SETS]


@contextlib.contextmanager
def running(backend):
    """Let every operator be computed by ``backend``."""
    with contextlib.ExitStack() as stack:
        if backend == "reference":
            for module, name in OPERATORS:
                plain = partial(getattr(module, name)._op_dk, PLAIN)
                stack.enter_context(mock.patch.object(module, name, plain))
        elif backend == "triton":
            for module, name in OPERATORS:
                if name in TRITON:
                    stack.enter_context(mock.patch.object(module, name, TRITON[name]))
        else:
            stack.callback(_info.set_cpu_isa, _info.cpu_isa())
            _info.set_cpu_isa(backend)
        yield


def _forward(x, weight, bias, *rest):
    from floe_kernels.triton import moe_lora_forward as kernels

    return kernels.moe_lora_linear(x, weight, bias, *rest[:11])


def _foreign(x, base_out, *rest):
    from floe_kernels.triton import moe_lora_forward as kernels

    return kernels.moe_lora(x, base_out, *rest[:11])


def _backward(grad_out, x, *rest):
    from floe_kernels.reference.moe_lora import FisherBuffers
    from floe_kernels.triton import moe_lora_backward as kernels

    fisher = None if rest[17] is None else FisherBuffers(*rest[17:])
    return kernels.moe_lora_backward(grad_out, x, *rest[:17], fisher)


def _segments(*arguments):
    from floe_kernels.triton import grad_square as kernels

    return kernels.segment_grad_square(*arguments)


def _linear(*arguments):
    from floe_kernels.triton import grad_square as kernels

    return kernels.linear_grad_square(*arguments)


def _topk(*arguments):
    from floe_kernels.triton import routing as kernels

    return kernels.topk_softmax(*arguments)


TRITON = {
    "moe_lora_linear": _forward, "moe_lora": _foreign, "moe_lora_backward": _backward,
    "segment_grad_square": _segments, "linear_grad_square": _linear, "topk_softmax": _topk,
}  # fmt: skip
