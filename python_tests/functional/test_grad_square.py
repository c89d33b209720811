"""segment_grad_square and linear_grad_square: against one autograd backward per sample."""

import pytest
import torch
from closeness import assert_no_worse
from hypothesis import given, settings
from hypothesis import strategies as st

from floe_kernels import functional as FK

# rows of each sample: nothing, one sample, empty ones between, around a tile of 16, one long
SEGMENTS = [[], [0], [1], [5], [0, 3, 0, 0, 2], [1, 2, 15, 16, 17], [1] * 9, [70, 3]]
REDUCE = {"element": (), "rank": (1,), "matrix": (0, 1)}


def offsets_of(lengths):
    return torch.tensor([0, *lengths]).cumsum(0)


def rows(lengths, r=3, d=7, dtype=torch.float64):
    gen = torch.Generator().manual_seed(len(lengths) + sum(lengths))
    n = sum(lengths)
    g, x = (torch.randn(n, c, generator=gen, dtype=torch.float64).to(dtype) for c in (r, d))
    return g, x


def sample_gradients(g, x, lengths):
    """The oracle: a linear layer, one backward pass per sample."""
    weight = torch.zeros(g.shape[1], x.shape[1], dtype=torch.float64, requires_grad=True)
    grads = []
    for gi, xi in zip(g.double().split(lengths), x.double().split(lengths), strict=True):
        (grad,) = torch.autograd.grad((xi @ weight.T * gi).sum(), weight, materialize_grads=True)
        grads.append(grad)
    return torch.stack(grads) if grads else weight.detach().new_zeros(0, *weight.shape)


@pytest.mark.parametrize("scaled", [None, "one", "each"])
@pytest.mark.parametrize("lengths", SEGMENTS, ids=str)
def test_equals_a_backward_per_sample(lengths, scaled):
    g, x = rows(lengths)
    scale = {None: None, "one": torch.tensor(0.5), "each": torch.rand(len(lengths))}[scaled]
    each = sample_gradients(g, x, lengths)
    scored = each if scale is None else each * scale.double().view(-1, *[1] * (2 * scale.ndim))
    for reduce, dims in REDUCE.items():
        out = FK.segment_grad_square(g, x, offsets_of(lengths), scale=scale, reduce=reduce)
        square = scored.square().sum(0)
        torch.testing.assert_close(out.grad, each.sum(0))
        torch.testing.assert_close(out.fisher, square.sum(dims) if dims else square)
        torch.testing.assert_close(out.norms, scored.square().sum((1, 2)))
    norms = FK.linear_grad_square(g, x, offsets_of(lengths), scale=scale)
    torch.testing.assert_close(norms, scored.square().sum((1, 2)))


def test_is_neither_token_as_sample_nor_squared_batch():
    g, x = rows([4, 6, 5])
    fisher = FK.segment_grad_square(g, x, offsets_of([4, 6, 5])).fisher
    tokens = torch.einsum("tr,td->trd", g, x).square().sum(0)
    batch = (g.T @ x).square()
    assert not torch.allclose(fisher, tokens, rtol=0.05)
    assert not torch.allclose(fisher, batch, rtol=0.05)


@pytest.mark.parametrize("r", [1, 4, 16, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_low_precision(dtype, r):
    lengths = [1, 2, 15, 16, 17, 0, 33]
    g, x = rows(lengths, r, 24, dtype)
    out = FK.segment_grad_square(g, x, offsets_of(lengths))
    each = sample_gradients(g, x, lengths)
    wide = torch.stack(
        [
            gi.float().T @ xi.float()
            for gi, xi in zip(g.split(lengths), x.split(lengths), strict=True)
        ]
    )
    assert_no_worse(out.fisher, wide.square().sum(0), each.square().sum(0))
    assert_no_worse(out.norms, wide.square().sum((1, 2)), each.square().sum((1, 2)))
    assert_no_worse(out.grad, g.T @ x, each.sum(0))
    norms = FK.linear_grad_square(g, x, offsets_of(lengths))
    ghost = torch.stack(
        [
            ((gi.float() @ gi.float().T) * (xi.float() @ xi.float().T)).sum()
            for gi, xi in zip(g.split(lengths), x.split(lengths), strict=True)
        ]
    )
    assert_no_worse(norms, ghost, each.square().sum((1, 2)), terms=r * 24)


@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(st.integers(0, 20), max_size=6), r=st.integers(0, 9), d=st.integers(0, 33))
def test_any_shape(lengths, r, d):
    g, x = rows(lengths, r, d)
    each = sample_gradients(g, x, lengths)
    out = FK.segment_grad_square(g, x, offsets_of(lengths))
    torch.testing.assert_close(out.fisher, each.square().sum(0))
    torch.testing.assert_close(out.norms, FK.linear_grad_square(g, x, offsets_of(lengths)))


def test_laws():
    g, x = rows([4, 6, 5])
    offsets = offsets_of([4, 6, 5])
    out = FK.segment_grad_square(g, x, offsets)
    torch.testing.assert_close(out.fisher.sum(), out.norms.sum())  # the trace, both ways
    assert (out.fisher >= out.grad.square() / 3 - 1e-12).all()  # Cauchy-Schwarz
    copies = FK.segment_grad_square(g.repeat(4, 1), x.repeat(4, 1), offsets_of([4, 6, 5] * 4))
    torch.testing.assert_close(copies.fisher, 4 * out.fisher)
    single = FK.segment_grad_square(g, x, torch.tensor([0, 15]))
    torch.testing.assert_close(single.fisher, single.grad.square())
    tokens = FK.segment_grad_square(g, x, torch.arange(16))
    torch.testing.assert_close(tokens.fisher, g.square().T @ x.square())


def test_rows_of_no_sample_count_in_the_gradient_alone():
    g, x = rows([4, 6, 5])
    out = FK.segment_grad_square(g, x, torch.tensor([4, 10]))
    torch.testing.assert_close(out.fisher, (g[4:10].T @ x[4:10]).square())
    torch.testing.assert_close(out.grad, g.T @ x)


@pytest.mark.parametrize("op", ["segment_grad_square", "linear_grad_square"])
def test_registration(op):
    g, x = rows([3, 0, 5], dtype=torch.float32)
    args = (g, x, offsets_of([3, 0, 5]), torch.ones(3))
    args += ("rank",) * (op == "segment_grad_square")
    torch.library.opcheck(getattr(torch.ops.floe, op).default, args)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"g": torch.zeros(5, 2)}, r"with one N, got \(5, 2\) and \(8, 7\)"),
        ({"g": torch.zeros(8, 2).long()}, "must be floating point, got torch.int64"),
        ({"offsets": torch.zeros(2)}, r"offsets must be int64 \(S \+ 1,\), got torch.float32"),
        ({"scale": torch.ones(3)}, r"scale must be \(\) or \(S,\) with S = 2, got \(3,\)"),
        ({"reduce": "row"}, "reduce must be 'element', 'rank' or 'matrix', got 'row'"),
    ],
)
def test_says_what_is_wrong(change, says):
    g, x = rows([3, 5])
    with pytest.raises(ValueError, match=says):
        FK.segment_grad_square(**{"g": g, "x": x, "offsets": offsets_of([3, 5]), **change})
