"""Layers, tensors and samples as hypothesis draws them: shapes, layouts, magnitudes, flaws."""

from dataclasses import dataclass

import torch
from hypothesis import strategies as st

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
#: of x and of the adapter
DTYPES = [
    (FP32, FP32), (BF16, BF16), (BF16, FP32), (FP16, FP16), (FP16, FP32), (FP64, FP64),
    (FP32, BF16), (FP64, FP32), (FP32, FP64), (BF16, FP16),
]  # fmt: skip
#: powers of two that a tensor is multiplied by: products overflow, or are flushed to zero
MAGNITUDES = {FP16: [8, 13, -8, -13], FP64: [60, 300, -60, -300]}
LAYOUTS = ["rows", "transposed", "every other column", "every other row", "offset", "expanded"]
SIZES = st.one_of(
    st.sampled_from([0, 1, 1, 2, 3, 8, 16, 17, 31, 32, 33, 64, 65]), st.integers(0, 150)
)


@dataclass(frozen=True)
class Case:
    """One layer and what it meets."""

    tokens: int
    inputs: int
    outputs: int
    ranks: tuple[int, ...]
    top_k: int
    dtype: torch.dtype
    weight_dtype: torch.dtype
    base_dtype: torch.dtype | None  #: of a foreign base; None owns the frozen linear
    shared_A: bool
    renormalize: bool
    masked: float | None  #: share of padding
    dropout_p: float
    aux: bool
    bias: bool
    lead: int  #: leading sizes of x: 1, 2 or 3
    layouts: tuple[str, str, str, str]  #: of x, weight, adapters and the output's gradient
    powers: tuple[int, int, int, int]  #: of x, weight, adapters and the output's gradient
    router: str
    bad: tuple[str, ...]  #: what rows are spoilt with
    samples: tuple[int, ...] | None  #: their lengths, as shares
    reduce: str
    seed: int

    @property
    def experts(self) -> int:
        return len(self.ranks)


@st.composite
def cases(draw, triton=False):
    """Draw a layer."""
    sizes = st.sampled_from([0, 1, 2, 5, 16, 17, 33]) if triton else SIZES
    shared_A = draw(st.integers(0, 4)) == 0
    experts = draw(st.sampled_from([1, 2, 2, 3, 4, 5, 8, 8, 70]))
    rank = st.sampled_from([0, 0, 1, 2, 3, 4, 8, 8, 16, 17])
    if experts <= 4 and not triton:
        rank = st.one_of(rank, st.sampled_from([64, 65, 130]))
    if shared_A:
        ranks = (draw(rank),) * experts
    else:
        ranks = tuple(draw(st.lists(rank, min_size=experts, max_size=experts)))
    dtypes = [d for d in DTYPES if not (triton and FP64 in d)]
    dtype, weight_dtype = draw(st.sampled_from(dtypes))
    base_dtype = None
    if draw(st.integers(0, 3)) == 0:
        others = [FP32, BF16, FP16] if triton else [FP32, BF16, FP16, FP64]
        base_dtype = draw(st.sampled_from([dtype] * len(others) + others))
    top_k = draw(st.sampled_from([1, 2, min(3, experts), experts]))
    top_k = min(top_k, experts)
    plain = draw(st.integers(0, 2)) > 0
    power = st.sampled_from([0, 0, *MAGNITUDES.get(dtype, [30, 62, 110, -30, -62, -120])])
    bad = st.lists(st.sampled_from(["nan", "inf", "-inf", "one nan"]), max_size=2)
    layout = st.sampled_from(LAYOUTS)
    tokens = draw(sizes)
    return Case(
        tokens=tokens,
        inputs=draw(sizes),
        outputs=draw(sizes),
        ranks=ranks,
        top_k=top_k,
        dtype=dtype,
        weight_dtype=weight_dtype,
        base_dtype=base_dtype,
        shared_A=shared_A,
        renormalize=draw(st.sampled_from([top_k > 1, top_k > 1, True, False])),
        masked=draw(st.sampled_from([None, None, 0.0, 0.3, 1.0])),
        dropout_p=draw(st.sampled_from([0.0, 0.0, 0.1, 0.5, 0.99])),
        aux=draw(st.booleans()),
        bias=draw(st.booleans()),
        lead=draw(st.sampled_from([1, 2, 2, 3])),
        layouts=draw(st.tuples(layout, layout, layout, layout)),
        powers=(0, 0, 0, 0) if plain else draw(st.tuples(power, power, power, power)),
        router=draw(st.sampled_from(["any", "any", "hot", "ties", "zero", "close"])),
        bad=() if draw(st.booleans()) else tuple(draw(bad)),
        samples=draw(st.none() | st.lists(st.integers(0, 5), max_size=8).map(tuple)),
        reduce=draw(st.sampled_from(["element", "rank", "matrix"])),
        seed=draw(st.integers(0, 2**32)),
    )


def laid_out(t, how):
    """The same numbers elsewhere in memory; ``expanded`` repeats the first row without storing."""
    if how == "transposed":
        return t.T.contiguous().T
    if how == "every other column":
        return torch.stack([t, torch.full_like(t, torch.nan)], -1).flatten(1)[:, ::2]
    if how == "every other row":
        return torch.stack([t, torch.full_like(t, torch.nan)], 1).flatten(0, 1)[::2]
    if how == "offset":  # rows that start at odd addresses, farther apart than they are long
        wide = torch.full((len(t), t.shape[1] + 3), torch.nan, dtype=t.dtype)
        wide[:, 1:-2] = t
        return wide[:, 1:-2]
    if how == "expanded" and len(t):
        return t[:1].expand(len(t), -1)
    return t


def bounds(lengths, tokens):
    """Turn drawn lengths into offsets within ``0..tokens``; what is left over belongs to nobody."""
    offsets = torch.tensor([0, *lengths], dtype=torch.int64).cumsum(0)
    return (offsets * 3).clamp(max=tokens) if tokens < 16 else (offsets * 4).clamp(max=tokens)


def tensors(case):
    """Draw the numbers of a case."""
    generator = torch.Generator().manual_seed(case.seed)
    n, i, o, r = case.tokens, case.inputs, case.outputs, sum(case.ranks)

    def normal(rows, width, dtype, power=0, layout="rows", fan=1):
        values = torch.randn(rows, width, generator=generator, dtype=FP64) / max(1, fan) ** 0.5
        return laid_out((values * 2.0**power).to(dtype), layout)

    px, pw, pa, pg = case.powers
    lx, lw, la, lg = case.layouts
    x = normal(n, i, case.dtype, px, lx)
    router = normal(case.experts, i, case.weight_dtype, 0, "rows", fan=i)
    if case.router == "zero":
        router.zero_()
    elif case.router == "ties":
        router[1:] = router[:1].clone()
    elif case.router == "close":
        router[1:] = router[:1] * (1 + torch.finfo(case.weight_dtype).eps)
    elif case.router == "hot" and i:
        x = laid_out(x.abs().clone(), lx)
        router[0] = 1.0
    if lx != "expanded" and case.bad and n and i:
        x = x.clone(memory_format=torch.preserve_format) if x.is_contiguous() else x
        for kind in case.bad:
            row = int(torch.randint(n, (), generator=generator))
            column = int(torch.randint(i, (), generator=generator))
            if kind == "nan":
                x[row] = torch.nan
            else:
                x[row, column] = float(kind.removeprefix("one "))
    mask = None
    if case.masked is not None:
        mask = torch.rand(n, generator=generator) >= case.masked
    rows_A = case.ranks[0] if case.shared_A else r
    foreign = case.base_dtype is not None
    return {
        "x": x,
        "weight": normal(o, i, case.dtype, pw, lw, fan=i),
        "bias": normal(1, o, case.dtype)[0] if case.bias and not foreign else None,
        "lora_A": normal(rows_A, i, case.weight_dtype, 0, la, fan=i),
        "lora_B": normal(r, o, case.weight_dtype, _within(pa, case.weight_dtype), la, fan=4),
        "router": router,
        "scaling": torch.rand(r, generator=generator) + 0.5,
        "mask": mask,
        "seed": torch.tensor(case.seed * 2654435761 % 2**64 - 2**63),
        "aux": torch.tensor([0.3, 0.2]) if case.aux else None,
        "base": normal(n, o, case.base_dtype) if foreign else None,
        "grad_out": normal(n, o, case.base_dtype or case.dtype, pg, lg),
    }


def _within(power, dtype):
    limit = {FP16: 13}.get(dtype, 120 if dtype != FP64 else 300)
    return max(-limit, min(limit, power))
