"""Every provider that runs here computes what it says, or says why it does not."""

import dataclasses

import pytest
import torch

from benchmarks.check import Checker, relative_error
from floe_kernels.testing.cases import GradSquareCase, MoELoRACase

HOOKS = ("Opacus", "BackPACK", "Kronfluence")
TINY = MoELoRACase("tiny", 48, 32, 24, (8, 8, 8, 8), dtype=torch.float32, samples=4)
LAYER_CASES = {
    "equal": TINY,
    "top-1": dataclasses.replace(TINY, top_k=1),
    "uneven": dataclasses.replace(TINY, ranks=(4, 0, 12, 8)),
    "shared": dataclasses.replace(TINY, shared_A=True, top_k=4),
    "bf16": dataclasses.replace(TINY, dtype=torch.bfloat16),
    "fp32-adapter": dataclasses.replace(TINY, dtype=torch.bfloat16, adapter_dtype=torch.float32),
}


def verdicts(op, case, names=None):
    checker = Checker(op, case, "cpu")
    chosen = [p for p in op.choose("all", "cpu") if "compiled" not in p.name]
    return {p.name: checker.verdict(p) for p in chosen if names is None or p.name in names}


@pytest.mark.filterwarnings("ignore")  # PEFT's own
@pytest.mark.parametrize("case", LAYER_CASES.values(), ids=LAYER_CASES.keys())
def test_layer_providers_are_right(moe_lora, case):
    found = verdicts(moe_lora, case)
    wrong = {n: v.why for n, v in found.items() if v.status not in ("ok", "unavailable")}
    assert not wrong
    assert found["base"].status == found["ours"].status == found["dense-cat"].status == "ok"
    for verdict in found.values():
        assert (verdict.status == "unavailable") == bool(verdict.why)


def test_a_check_takes_every_requested_gradient(moe_lora):
    assert set(verdicts(moe_lora, TINY, ("ours",))["ours"].errors) == {
        "y", "dx", "dA", "dB", "drouter",
    }  # fmt: skip


@pytest.mark.filterwarnings("ignore")  # the hooks' own
@pytest.mark.parametrize("name", HOOKS)
def test_hooks_are_right_on_a_dense_layer_and_wrong_on_a_routed_one(operations, name):
    op = operations["fisher"]
    dense = dataclasses.replace(TINY, ranks=(8,), top_k=1)
    found = verdicts(op, dense, (name,))[name]
    if found.status == "unavailable":
        pytest.skip(found.why)
    assert found.status == "ok", found.why
    routed = verdicts(op, TINY, (name,))[name]
    assert routed.status == "wrong"
    assert routed.errors["FA"] > 0.05


def test_square_providers_are_right(operations):
    found = verdicts(operations["fisher"], TINY)
    assert {n for n, v in found.items() if v.status != "ok"} <= set(HOOKS)
    assert len(found) >= 7


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_grad_square_providers_are_right(operations, ragged, dtype):
    case = GradSquareCase("c", 96, 32, 8, 6, dtype=dtype, ragged=ragged)
    found = verdicts(operations["grad_square"], case)
    wrong = {n: v.why for n, v in found.items() if v.status not in ("ok", "unavailable")}
    assert not wrong
    assert found["ours"].status == found["weight gradient alone"].status == "ok"


def test_not_finite_is_infinitely_wrong():
    truth = torch.ones(3, dtype=torch.float64)
    assert relative_error(torch.tensor([1.0, 1.0, float("nan")]), truth) == float("inf")
    assert relative_error(torch.ones(2), truth) == float("inf")
    assert relative_error(torch.tensor([1.0, 1.0, 1.1]), truth) == pytest.approx(0.1 / 3**0.5)


def test_a_large_check_is_cut_to_fewer_tokens(moe_lora, monkeypatch):
    monkeypatch.setattr("benchmarks.check.CHECK_FLOPS", 1e5)
    assert Checker(moe_lora, TINY, "cpu").tokens < TINY.tokens


def test_choose_keeps_the_base_and_names_what_is_unknown(moe_lora):
    assert [p.name for p in moe_lora.choose("ours", "cpu")] == ["base", "ours"]
    assert "ours graphed" in {p.name for p in moe_lora.choose("all", "cuda")}
    assert "ours graphed" not in {p.name for p in moe_lora.choose("all", "cpu")}
    with pytest.raises(SystemExit, match="got nobody"):
        moe_lora.choose("ours,nobody", "cpu")


@pytest.mark.parametrize("way", ["y", "dx"])
def test_two_source_providers_are_right(operations, way):
    from benchmarks.two_source import TwoSourceCase

    case = TwoSourceCase(f"{way}-tiny", 40, 32, 24, 8, 4)
    op = operations["two_source"]
    checker = Checker(op, case, "cpu")
    found = {p.name: checker.verdict(p).status for p in op.providers.values()}
    assert found == dict.fromkeys(op.providers, "ok")
    assert not any(p.name.startswith("ours") for p in op.choose("all", "cpu"))
