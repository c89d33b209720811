"""The layer, its gradients and the per-sample squares, in balls.

Dims: N tokens, I inputs, O outputs, E experts, K kept, R packed columns.
"""

import itertools
from typing import NamedTuple

import torch
from balls import Ball, add, ball, exact, logsumexp, matmul, mul, rounded, scaled, softmax, widened
from balls import total as summed

from floe_kernels.reference.dropout import keep_threshold, philox
from floe_kernels.reference.moe_lora import expert_of_column
from floe_kernels.reference.routing import expert_load


class Routed(NamedTuple):
    out: Ball
    logits: Ball
    gates: Ball
    z: Ball
    x: Ball  #: zero where masked
    x_dropped: Ball


class Gradients(NamedTuple):
    x: Ball
    lora_A: Ball
    lora_B: Ball
    router: Ball


def dropped(a, p, seed, dtype, *stored):
    if not p:
        return a
    counter = torch.arange(a.v.numel()).view(a.v.shape)
    keep = philox(seed, counter) >= keep_threshold(p)
    scale = rounded(scaled(a, 1 / (1 - p), dtype), *stored)
    # who scales sums, not terms, may have flushed a term that would be normal once scaled
    r = scale.r + torch.finfo(dtype).tiny / (1 - p)
    return Ball(torch.where(keep, scale.v, 0.0), torch.where(keep, r, 0.0))


def columns(dense, ranks):
    """Repeat each expert's number for each of its columns."""
    return dense[:, expert_of_column(ranks, dense.v.device)]


def dense(kept, experts, count):
    def spread(values):
        return values.new_zeros(len(values), count).scatter(1, experts, values)

    return Ball(spread(kept.v), spread(kept.r))


def packed(z, case):
    if not case.shared_A:
        return z
    return Ball(z.v.repeat(1, len(case.ranks)), z.r.repeat(1, len(case.ranks)))


def forward(case, t, experts):
    """What the forward may return, given the experts that the kernel itself chose."""
    dtype, sums = case.dtype, widened(case.dtype)
    x = exact(t["x"]).rows(t["mask"])
    x_dropped = dropped(x, case.dropout_p, t["seed"], sums, dtype)
    lora_A = rounded(exact(t["lora_A"]), *_if_other(t["lora_A"].dtype, dtype))
    lora_B = rounded(exact(t["lora_B"]), *_if_other(t["lora_B"].dtype, dtype))
    z = rounded(matmul(x_dropped, lora_A.T, sums), dtype)
    logits = matmul(x, rounded(exact(t["router"]), *_if_wider(t["router"].dtype, sums)).T, sums)
    kept = logits if not case.renormalize else Ball(*(a.gather(1, experts) for a in logits))
    gates = softmax(kept, sums)
    if not case.renormalize:
        gates = Ball(*(a.gather(1, experts) for a in gates))
    gates = gates.rows(t["mask"])
    h = rounded(mul(_gate(case, t, gates, experts, sums), packed(z, case), sums), dtype)
    if t["base"] is None:
        base = matmul(exact(t["x"]), exact(t["weight"]).T, sums)
        if t["bias"] is not None:
            bias = exact(t["bias"])[None]
            sooner = _among_terms(t, bias, sums)  # BLAS may start its sums with the bias
            base = add(rounded(base, dtype), bias, sums)
            base = Ball(base.v, torch.maximum(base.r, sooner.r))
        stored = (dtype, dtype)
    else:
        base, stored = exact(t["base"]), (dtype, t["base"].dtype)
    added = rounded(matmul(h, lora_B, sums), *stored)
    coarse = torch.promote_types(stored[1], torch.float32)
    out = rounded(add(rounded(base, *stored[1:]), added, coarse), stored[1])
    return Routed(out, logits, gates, z, x, x_dropped)


def backward(case, t, grad_out, experts, saved):
    """The gradients of x, lora_A, lora_B and router, and a function for per-sample squares."""
    dtype, sums = case.dtype, widened(case.dtype)
    weights = t["lora_A"].dtype
    stored = (dtype,) if t["base"] is None else (grad_out.dtype, dtype)
    lora_A = rounded(exact(t["lora_A"]), *_if_other(weights, dtype))
    lora_B = rounded(exact(t["lora_B"]), *_if_other(weights, *stored))
    router = rounded(exact(t["router"]), *_if_other(weights, dtype))
    dy = rounded(exact(grad_out).rows(t["mask"]), *_if_other(grad_out.dtype, dtype))
    z, gates = packed(saved.z, case), saved.gates
    gate = _gate(case, t, gates, experts, sums)
    u = rounded(matmul(dy, lora_B.T, sums), *stored)
    scaling = exact(t["scaling"])[None]
    column = mul(mul(scaling, z, sums), u, sums)
    owner = torch.nn.functional.one_hot(expert_of_column(case.ranks, gates.v.device), case.experts)
    owner = owner.double()
    spread = matmul(column, exact(owner), sums)  # a sum over each expert's columns
    dlogits = _logit_gradient(case, spread, experts, gates, saved.logits, sums)
    if t["aux"] is not None:
        aux = _aux_gradient(case, t, experts, saved.logits, sums)
        dlogits = add(dlogits, aux, sums)
    dlogits = dlogits.rows(t["mask"])
    dz = mul(gate, u, sums)
    if case.shared_A:
        parts = (a.view(len(dz.v), case.experts, case.ranks[0]) for a in dz)
        dz = summed(Ball(*parts), 1, sums)
    dz = rounded(dz, dtype)
    h = rounded(mul(gate, z, sums), dtype)
    narrow = rounded(dlogits, dtype)
    through = rounded(matmul(dz, lora_A, sums), dtype)
    through = dropped(through, case.dropout_p, t["seed"], sums, dtype)
    grad_x = add(through, rounded(matmul(narrow, router, sums), dtype), sums)
    grad_x = rounded(grad_x, dtype)
    if t["base"] is None:
        base = rounded(matmul(exact(grad_out), exact(t["weight"]), sums), dtype)
        grad_x = rounded(add(grad_x, base, sums), dtype)
    pairs = ((dz, saved.x_dropped), (h, dy), (narrow, saved.x))
    grads = [rounded(matmul(g.T, c, sums), *stored, weights) for g, c in pairs]
    gate_tokens = summed(mul(gate, mul(z, u, sums), sums), 1, sums)
    return Gradients(grad_x, *grads), pairs, gate_tokens


def squares(g, x, offsets, scale, sums):
    """F by element, by row and in all, and the norm of each sample."""
    shape = g.v.shape[1], x.v.shape[1]
    zero = g.v.new_zeros(shape)
    fisher, norms = Ball(zero, zero), []
    for i, (begin, end) in enumerate(itertools.pairwise(offsets.tolist())):
        sample = matmul(g[begin:end].T, x[begin:end], sums)
        if scale is not None:
            sample = mul(sample, exact(scale if scale.ndim == 0 else scale[i]), sums)
        square = mul(sample, sample, sums)
        fisher = add(fisher, square, sums)
        norms.append(summed(summed(square, 1, sums), 0, sums))
    rows = summed(fisher, 1, sums)
    # whichever sum comes first, rows within samples or samples within rows, the roundings are as
    # many: one for each term
    fisher = {"element": fisher, "rank": rows, "matrix": summed(rows, 0, sums)}
    spare = torch.finfo(sums).eps * (len(norms) + sum(shape))
    fisher = {key: ball(a.v, a.r + spare * a.size) for key, a in fisher.items()}
    if not norms:
        return fisher, Ball(g.v.new_zeros(0), g.v.new_zeros(0))
    return fisher, Ball(torch.stack([n.v for n in norms]), torch.stack([n.r for n in norms]))


def _among_terms(t, bias, sums):
    """x W^T + b with b one of the terms that are summed in any order."""
    ones = torch.ones(len(t["x"]), 1, dtype=torch.float64)
    x = torch.cat([t["x"].detach().double(), ones], 1)
    weight = torch.cat([t["weight"].detach().double(), bias.v.T], 1)
    return matmul(exact(x), exact(weight).T, sums)


def _if_other(own, *dtypes):
    """Rounding on the way to another dtype; to a wider one there is none."""
    return [d for d in dtypes if torch.promote_types(own, d) != d]


_if_wider = _if_other


def _gate(case, t, gates, experts, sums):
    return mul(
        exact(t["scaling"])[None], columns(dense(gates, experts, case.experts), case.ranks), sums
    )


def _logit_gradient(case, spread, experts, gates, logits, sums):
    if case.renormalize:
        kept = Ball(*(a.gather(1, experts) for a in spread))
        mean = summed(mul(gates, kept, sums), 1, sums)[:, None]
        kept = mul(gates, add(kept, Ball(-mean.v, mean.r), sums), sums)
        return dense(kept, experts, case.experts)
    p = softmax(logits, sums)
    chosen = torch.zeros_like(p.v).scatter(1, experts, 1.0) > 0
    kept = Ball(torch.where(chosen, spread.v, 0.0), torch.where(chosen, spread.r, 0.0))
    mean = summed(mul(p, kept, sums), 1, sums)[:, None]
    return mul(p, add(kept, Ball(-mean.v, mean.r), sums), sums)


def _aux_gradient(case, t, experts, logits, sums):
    p = softmax(logits, sums)
    load = expert_load(experts, case.experts, t["mask"]).double()
    load = Ball(load, 2.0**-23 * load)[None]
    mean = summed(mul(p, load, sums), 1, sums)[:, None]
    balance = mul(p, add(load, Ball(-mean.v, mean.r), sums), sums)
    balance = scaled(balance, float(case.experts), sums)
    z = scaled(mul(logsumexp(logits, sums), p, sums), 2.0, sums)
    rows = len(p.v) if t["mask"] is None else int(t["mask"].sum())
    coefs = t["aux"].double()
    both = add(scaled(balance, float(coefs[0]), sums), scaled(z, float(coefs[1]), sums), sums)
    return scaled(both, 1 / max(1, rows), sums)
