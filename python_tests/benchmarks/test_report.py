"""Tables and plots from records."""

import pytest

from benchmarks import plots, records, report


def line(provider, over_base, columns=128, role="peer", **rest):
    return {
        "device": "cpu", "machine": "CPU X", "cores": 2, "threads": 2, "op": "moe_lora",
        "mode": "fwdbwd", "versions": {"torch": "2"}, "commit": "abc", "provider": provider,
        "role": role, "origin": "PyTorch", "status": "ok", "why": "", "error": 1e-7, "rounds": 9,
        "quiet_rounds": 9, "ms": [over_base, over_base, over_base],
        "over_base": [over_base, over_base, over_base], "gflops": 50.0, "gbs": 2.0,
        "ceiling_gflops": 100.0, "ceiling_gbs": 40.0, "fraction": 0.5,
        "case": {"name": f"R{columns}", "tokens": 8, "inputs": 4, "outputs": 4, "experts": 2,
                 "top_k": 1, "columns": columns, "dtype": "bfloat16"},
        **rest,
    }  # fmt: skip


def sweep():
    lines = []
    for columns, dense, grouped in ((64, 1.2, 2.0), (256, 1.6, 2.1), (1024, 4.0, 2.2)):
        lines += [
            line("base", 1.0, columns, "base"),
            line("dense-cat", dense, columns),
            line("grouped_mm", grouped, columns),
            line("ours", 1.1, columns, "ours", best_peer="dense-cat",
                 overhead_over_best_peer=[0.5, 0.4, 0.6]),
        ]  # fmt: skip
    return lines


def test_errors_come_before_times_and_the_wrong_come_last():
    wrong = line("cheat", 0.1, status="wrong", why="FA off")
    wrong.pop("ms")
    table = report.case_table([wrong, *sweep()[:4]])
    header = table.splitlines()[2]
    assert header.index("error") < header.index("ms")
    rows = [r for r in table.splitlines() if r.startswith("|")][2:]
    assert rows[0].startswith("| base")
    assert rows[-1].startswith("| cheat")
    assert "WRONG: FA off" in rows[-1]


def test_disturbed_runs_say_so():
    assert "shared" not in report.case_table(sweep()[:4])
    first, *others = sweep()[:4]
    table = report.case_table([{**first, "quiet_rounds": 2}, *others])
    assert "base was undisturbed in 2 of 9 rounds" in table


def test_losing_rows_stay_in():
    lost = line(
        "ours", 9.0, 64, "ours", best_peer="dense-cat", overhead_over_best_peer=[40, 39, 41]
    )
    assert "40.00" in report.summary([*sweep()[:3], lost])


def test_fractions_use_the_best_ceiling_seen():
    lines = [line("ours", 1.0), line("dense-cat", 1.0, ceiling_gflops=200.0)]
    assert [entry["fraction"] for entry in report.with_best_ceilings(lines)] == [0.25, 0.25]


def test_the_last_record_of_a_measurement_counts():
    lines = [line("ours", 1.0), line("dense-cat", 2.0), line("ours", 3.0)]
    assert [entry["over_base"][0] for entry in report.last_of_each(lines)] == [3.0, 2.0]


def test_crossover_lies_between_the_measured():
    turn = plots.crossover(sweep(), "dense-cat", "grouped_mm")
    assert 256 < turn < 1024
    assert plots.crossover(sweep()[:8], "dense-cat", "grouped_mm") is None


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_plots_are_drawn_and_repeat_byte_for_byte(tmp_path):
    pytest.importorskip("matplotlib")
    records.append(tmp_path / "r.jsonl", sweep())
    contents = []
    for folder in ("one", "two"):
        report.main([str(tmp_path / "r.jsonl"), "--out", str(tmp_path / folder)])
        files = sorted((tmp_path / folder).iterdir())
        assert [f.name for f in files] == [
            "report.md",
            "roofline-cpu.svg",
            "speed-against-R-cpu.svg",
        ]
        contents.append([f.read_bytes() for f in files])
    assert contents[0] == contents[1]
    assert b"grouped_mm passes" in contents[0][2]
