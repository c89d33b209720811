"""The training step: every variant starts from the same loss."""

import pytest

from benchmarks import compare, end_to_end

SMALL = (
    "--hidden 32 --intermediate 48 --layers 4 --heads 4 --kv-heads 2 --vocab 64 --length 8 "
    "--experts 3 --rank 2 --dtype float32 --seconds 0 --threads 1"
)


@pytest.mark.filterwarnings("ignore")  # transformers' and PEFT's own
def test_variants_agree_and_are_timed():
    pytest.importorskip("peft")
    lines = end_to_end.run(end_to_end.arguments(SMALL.split()))
    found = {line["provider"]: line for line in lines}
    assert len(found) == 4
    assert {line["status"] for line in lines} <= {"ok", "unavailable"}
    every, quarter = found["ours, all layers"], found["ours, a quarter of the layers"]
    assert every["trained_parameters"] == 4 * quarter["trained_parameters"]
    assert every["trained_parameters"] == found["MoLA's loop"]["trained_parameters"]
    assert quarter["peak_bytes"] < every["peak_bytes"]
    assert every["tokens_per_second"][0] > 0
    assert "ours, a quarter" in end_to_end.table(lines)
    assert [c.verdict for c in compare.changes(lines, lines)] == ["same"] * 3
