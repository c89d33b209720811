"""A slowed kernel and a wrong one are caught; a failing peer says why and stops nobody."""

import dataclasses
import time

import pytest
import torch

from benchmarks import compare, records, report, roofline, timing
from benchmarks import measure as measuring
from benchmarks.measure import Measurement
from benchmarks.memory import saved_bytes
from benchmarks.registry import AutogradStep, Unavailable


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Few sets of inputs, and ceilings that need no measuring."""
    monkeypatch.setattr(measuring, "MOST_SETS", 3)
    monkeypatch.setattr(timing, "RETAKES", 0)
    monkeypatch.setattr(roofline, "peak_flops", lambda dtype, device: 1e11)
    monkeypatch.setattr(roofline, "peak_bandwidth", lambda device: 1e10)


def run(moe_lora, case, providers, mode="fwdbwd"):
    this = Measurement(moe_lora, case, mode, providers, "cpu")
    for epoch in range(2):
        this.time(epoch, 0.02, (4, 6))
    return [records.complete(line, "cpu") for line in this.lines()]


def with_ours(providers, change):
    """Return the providers with ``change`` made to each step of ours."""

    def patched(build):
        def changed(inputs):
            return change(build(inputs))

        return changed

    return [
        dataclasses.replace(p, build=patched(p.build)) if p.role == "ours" else p for p in providers
    ]


def slowed(step):
    forward = step._forward

    def slow():
        time.sleep(0.05)
        return forward()

    step._forward = slow
    return step


def scaled(step):
    """A kernel that is one part in a hundred off in one gradient."""
    unpack = step.unpack
    step.unpack = lambda grads: {n: g * 1.01 if n == "dB" else g for n, g in unpack(grads).items()}
    return step


def unwritten(step):
    """A kernel that leaves the last row of its output as it found it."""
    forward = step._forward

    def tail():
        y = forward()
        return torch.cat([y[:-1], torch.full_like(y[-1:], torch.nan)])

    step._forward = tail
    return step


def by_provider(lines):
    return {line["provider"]: line for line in lines}


def test_a_slowed_kernel_is_caught(moe_lora, tiny, providers):
    before = run(moe_lora, tiny, providers)
    after = run(moe_lora, tiny, with_ours(providers, slowed))
    assert by_provider(after)["ours"]["ms"][0] > 40
    verdicts = {(c.provider, c.ratio): c.verdict for c in compare.changes(before, after)}
    assert verdicts["ours", "over_base"] == "slower"
    assert by_provider(after)["ours"]["over_best_peer"][1] > 2  # and beside its peers at once


def test_a_wrong_kernel_is_caught_and_never_ranked(moe_lora, tiny, providers):
    before = run(moe_lora, tiny, providers)
    for change, why in ((scaled, "dB off by 1.0e-02"), (unwritten, "y off by inf")):
        after = run(moe_lora, tiny, with_ours(providers, change))
        ours = by_provider(after)["ours"]
        assert ours["status"] == "wrong"
        assert why in ours["why"]
        assert "ms" not in ours
        assert "WRONG" in report.case_table(after)
        assert "WRONG" in report.summary(after)
        found = [c for c in compare.changes(before, after) if c.provider == "ours"]
        assert [c.verdict for c in found] == [f"now wrong: {ours['why']}"]


def test_a_wrong_peer_is_not_the_best_peer(moe_lora, tiny, providers):
    fast_and_wrong = dataclasses.replace(
        providers[0], name="cheat", role="peer", truth=None
    )  # the base alone: fast, and no adapter
    lines = by_provider(run(moe_lora, tiny, [*providers, fast_and_wrong]))
    assert lines["cheat"]["status"] == "wrong"
    assert lines["ours"]["best_peer"] in ("dense-cat", "expert loop")


def test_a_failing_peer_says_why(moe_lora, tiny, providers):
    def absent(inputs):
        raise Unavailable("it is not here")

    def broken(inputs):
        raise RuntimeError("first line\nsecond line")

    def breaks_later(inputs, built=[]):  # noqa: B006
        built.append(1)
        if len(built) > 1:
            raise MemoryError("no more")
        return providers[2].build(inputs)

    extra = [
        dataclasses.replace(providers[2], name=n, build=b)
        for n, b in (("absent", absent), ("broken", broken), ("later", breaks_later))
    ]
    lines = by_provider(run(moe_lora, tiny, [*providers, *extra]))
    assert (lines["absent"]["status"], lines["absent"]["why"]) == ("unavailable", "it is not here")
    assert lines["broken"]["why"] == "RuntimeError: first line"
    assert lines["later"]["status"] == "failed"
    assert lines["ours"]["status"] == lines["dense-cat"]["status"] == "ok"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_bytes_are_x_and_a_few_numbers_a_token(moe_lora, tiny, dtype):
    case = dataclasses.replace(tiny, dtype=dtype)
    step = moe_lora.providers["ours"].build(moe_lora.inputs(case, "cpu", 0))
    e, k, r, size = case.experts, case.top_k, case.columns, dtype.itemsize
    a_token = case.inputs * size + r * size + e * 4 + k * (8 + 4)  # x, z, logits, ids and gates
    assert saved_bytes(step) <= case.tokens * a_token + 64 * 8
    loop = moe_lora.providers["expert loop"].build(moe_lora.inputs(case, "cpu", 0))
    assert saved_bytes(loop) > saved_bytes(step)


def test_saved_bytes_count_a_storage_once():
    x = torch.randn(10, 10, requires_grad=True)
    step = AutogradStep(lambda: (x * x.T) * x[:5].sum(), torch.ones(10, 10), {"x": x})
    # the storage of x, of x * x.T and of the sum
    assert saved_bytes(step) == 4 * (100 + 100 + 1) or saved_bytes(step) == 4 * (100 + 1)


def test_modes_time_different_things(moe_lora, tiny, providers):
    lines = {
        mode: by_provider(run(moe_lora, tiny, providers[:2], mode))
        for mode in ("fwd", "bwd", "fwdbwd")
    }
    assert all(line["ours"]["ms"][0] > 0 for line in lines.values())
    assert lines["fwd"]["ours"]["ms"][1] < lines["fwdbwd"]["ours"]["ms"][2]


def test_a_record_holds_no_name_of_a_place(moe_lora, tiny, providers):
    import getpass
    import platform

    text = repr(run(moe_lora, tiny, providers[:1]))
    for secret in (platform.node(), str(records.ROOT), "/" + getpass.getuser()):
        assert secret not in text or len(secret) < 4
