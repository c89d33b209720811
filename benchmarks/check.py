"""How wrong each provider is: relative Frobenius error against float64, before it is timed."""

import statistics
from dataclasses import dataclass, field

import torch
from torch import Tensor

from benchmarks.registry import Operation, Provider, Unavailable

#: Times the error of plain PyTorch in the same dtype that a provider may make, plus the mean of one
#: rounding of the output. Sums in another order differ by less, a missing factor by far more.
FACTOR, ROUNDING = 2.0, 0.25
#: FLOPs of a forward and backward in float64 that a check may cost on a CPU.
CHECK_FLOPS = 40e9


@dataclass
class Verdict:
    """What the check found."""

    status: str  #: "ok", "wrong", "unavailable" or "failed"
    why: str = ""
    errors: dict[str, float] = field(default_factory=dict)
    allowed: dict[str, float] = field(default_factory=dict)

    @property
    def error(self) -> float | None:
        """The largest error of any result."""
        return max(self.errors.values()) if self.errors else None


def relative_error(got: Tensor, truth: Tensor) -> float:
    """Return ||got - truth|| / ||truth||; infinite where something is not finite."""
    if got.shape != truth.shape:
        return float("inf")
    got = got.detach().double()
    error = (got - truth).norm() / truth.norm().clamp(min=1e-300)
    return float(error) if bool(got.isfinite().all()) else float("inf")


class Checker:
    """The truth of one case, computed once for all providers."""

    def __init__(self, op: Operation, case: object, device: str, seed: int = 1234) -> None:
        flops = op.cost(case, "fwdbwd")[0]
        if device == "cpu" and flops > CHECK_FLOPS:
            tokens = case.tokens  # type: ignore[attr-defined]
            case = op.limit(case, max(1, int(tokens * CHECK_FLOPS / flops)))
        self.tokens = case.tokens  # type: ignore[attr-defined]
        self.inputs = op.inputs(case, device, seed)
        self.truth = op.truth(self.inputs)
        rounding = ROUNDING * torch.finfo(case.dtype).eps  # type: ignore[attr-defined]
        plain = op.yardstick(self.inputs)
        plain_errors = {n: relative_error(plain[n], value) for n, value in self.truth.items()}
        # plain PyTorch may be exact by luck in one small result: not less than its usual error
        usual = statistics.median(plain_errors.values())
        self.allowed = {n: FACTOR * max(e, usual) + rounding for n, e in plain_errors.items()}

    def verdict(self, provider: Provider) -> Verdict:
        """Run the provider once and judge every result it gives."""
        try:
            results = provider.build(self.inputs).results()
        except Unavailable as reason:
            return Verdict("unavailable", str(reason))
        except Exception as error:  # a peer may fail in any way; the row says how
            return Verdict("failed", one_line(error))
        truth, allowed = self.truth, self.allowed
        if provider.truth is not None:  # it computes something else, and is held to that
            truth = provider.truth(self.inputs)
            allowed = dict.fromkeys(truth, max(self.allowed.values()))
        errors = {
            name: relative_error(results[name], truth[name]) if name in results else float("inf")
            for name in truth
        }
        wrong = [name for name in errors if not errors[name] <= allowed[name]]
        if wrong:
            why = ", ".join(f"{n} off by {errors[n]:.1e} (allowed {allowed[n]:.1e})" for n in wrong)
            return Verdict("wrong", why, errors, allowed)
        return Verdict("ok", "", errors, allowed)


def one_line(error: BaseException) -> str:
    """Return the kind and the first line of an exception."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:160] if lines else ''}"
