"""Spectra of weights: how heavy their tails are, which tells how well a matrix is trained.

Dims: N eigenvalues, O outputs and I inputs of a weight.
"""

import torch
from torch import Tensor

from floe_kernels.reference import spectrum

METHODS = ("median", "fix_finger", "fix_finger_compat")
FEWEST = 3  # positive eigenvalues: then the upper half holds two, and two make a ratio


def hill_alpha(eigenvalues: Tensor, *, method: str = "median", k: int | None = None) -> Tensor:
    r"""Estimate the exponent of the power law that a spectrum's tail follows.

    .. math:: \alpha = 1 + k \Big/ \sum_{i \le k} \ln \frac{\lambda_{(i)}}{\lambda_{(k)}},
              \qquad \lambda_{(1)} \ge \lambda_{(2)} \ge \dots

    Hill's estimator, AlphaLoRA's score (arXiv 2410.10054): a heavy tail, so a small exponent,
    marks a matrix that training has shaped. The k largest eigenvalues are the tail and
    :math:`\lambda_{(k)}`, where it begins, counts as one of them. The methods choose k:

    - ``"median"``: the upper half. Stable, and the same for ``c * W``.
    - ``"fix_finger"``: of the eigenvalues within 0.95 to 1.5 times the peak of a histogram of
      :math:`\log_{10} \lambda` (100 bins, left edge), the one whose tail lies closest to its own
      power law (Kolmogorov-Smirnov). The same for ``c * W``. On a spectrum that follows no power
      law the choice, and with it alpha, is at the mercy of the draw.
    - ``"fix_finger_compat"``: as released with the paper, where the lower bound is a logarithm
      compared with eigenvalues: as good as none for small weights, and another one for ``c * W``.

    The methods disagree (2.1 and 5.1 on a Gaussian 512 x 512 matrix), so never mix them. Computed
    in float64. Zeros are no part of a tail and are left out, so N counts the positive
    eigenvalues. Equal eigenvalues stay; a tail of nothing but equal ones gives ``inf``. Not
    differentiable. Deterministic. Memory: ``32 * N`` bytes over all spectra, and for the other
    methods ``8 * 2**20`` more.

    Args:
        eigenvalues: Of :math:`W^\top W`, ``(..., N)``, any order, floating point, finite and not
            negative; at least 3 positive ones in every spectrum.
        method: ``"median"``, ``"fix_finger"`` or ``"fix_finger_compat"``.
        k: Size of the tail instead of the upper half, from 2 to the number of positive
            eigenvalues; with ``"median"`` only.

    Returns:
        ``(...)`` float64, greater than 1.

    Raises:
        ValueError: ``method``, ``k`` or the eigenvalues are not as described.

    Example:
        >>> import torch
        >>> hill_alpha(torch.tensor([0.0, 1.0, 2.0, 2.0, 4.0]))  # 1 + 2 / (ln 1 + ln 2)
        tensor(3.8854, dtype=torch.float64)
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    if k is not None and method != "median":
        raise ValueError(f"k goes with method 'median' only, got k = {k} and {method!r}")
    if not eigenvalues.is_floating_point() or eigenvalues.ndim == 0:
        got = f"{eigenvalues.dtype} {tuple(eigenvalues.shape)}"
        raise ValueError(f"eigenvalues must be floating point (..., N), got {got}")
    bad = eigenvalues[~(eigenvalues.isfinite() & (eigenvalues >= 0))]
    if len(bad):
        raise ValueError(f"eigenvalues must be finite and not negative, got {float(bad[0])}")
    if eigenvalues.shape[:-1].numel():
        fewest = int((eigenvalues > 0).sum(-1).min())
        if fewest < FEWEST:
            raise ValueError(
                f"a spectrum must have at least {FEWEST} positive eigenvalues, got {fewest}"
            )
        if k is not None and not 2 <= k <= fewest:
            raise ValueError(
                f"k must be in 2..{fewest}, the number of positive eigenvalues, got {k}"
            )
    return spectrum.hill_alpha(eigenvalues, method, k)


def gram_eigenvalues(weight: Tensor) -> Tensor:
    r"""Return the squared singular values of a weight, through the Gram matrix of its shorter side.

    .. math:: \lambda(W^\top W) \ \text{if } O \ge I, \qquad \lambda(W W^\top) \ \text{otherwise}

    Float64 whatever the weight is. The error is some
    :math:`\min(O, I) \, \epsilon_{64} \, \lambda_{max}`, and what lies below that is returned as
    zero: singular values under about 4e-7 of the largest are lost at 512 columns, which is where
    float32 singular values end as well, and tails lie far above. A matrix without entries has no
    eigenvalues. Not differentiable. Deterministic. Memory, beyond the weight and what the BLAS
    packs: its product, taken in slices of the longer side, and a copy of it or two slices of
    32 MiB; with G the shorter side ``8 * G**2 + max(8 * G**2, min(8 * O * I, 2**26))`` bytes.

    Args:
        weight: ``(O, I)``, floating point, finite, any strides.

    Returns:
        ``(min(O, I),)`` float64, ascending, not negative.

    Raises:
        ValueError: ``weight`` is not a floating point matrix, or not finite.

    Example:
        >>> import torch
        >>> gram_eigenvalues(torch.tensor([[3.0, 0.0, 0.0], [0.0, 0.5, 0.0]]))
        tensor([0.2500, 9.0000], dtype=torch.float64)
    """
    if weight.ndim != 2 or not weight.is_floating_point():
        got = f"{weight.dtype} {tuple(weight.shape)}"
        raise ValueError(f"weight must be a floating point (O, I) matrix, got {got}")
    product = spectrum.gram(weight)
    # every entry is squared on the diagonal, so this sees them all without another pass
    if not torch.isfinite(product).all():
        raise ValueError("weight must be finite, and so must the float64 squares of its columns")
    return spectrum.gram_eigenvalues(product)
