"""The one command for a GPU machine, as far as a CPU can follow it."""

import json

import pytest
import torch

from benchmarks import gpu_checks, gpu_run, run


def test_without_a_gpu_it_says_so(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_run.main(["--out", str(tmp_path)]) == 2
    assert "needs a CUDA GPU" in capsys.readouterr().out


def test_plans_name_cases_that_exist(operations):
    for group in (*gpu_run.PLAN, *gpu_run.DRY_PLAN):
        if group.op == "training_step":
            continue
        op = operations[group.op]
        assert group.mode in op.modes
        found = [c.name for c in run.select(op, ",".join(group.cases))]
        assert found == list(group.cases), "in this order"


def test_quick_and_check_cases_exist(operations):
    for name, cases in (*run.QUICK.items(), *gpu_checks.CASES.items(), *gpu_checks.SMALL.items()):
        assert set(cases) <= {c.name for c in operations[name].cases()}


def test_a_case_that_kills_its_process_costs_only_itself(tmp_path, monkeypatch):
    ran = []

    def command(self, title, words, most, **rest):
        cases = words[words.index("--cases") + 1].split(",")
        ran.append(cases)
        for case in cases:
            if case == "T64-bf16":
                return -11
            record = {"op": "moe_lora", "mode": "fwdbwd", "case": {"name": case}}
            with self.results.open("a") as file:
                file.write(json.dumps(record) + "\n")
        return 0

    monkeypatch.setattr(gpu_run.Run, "command", command)
    this = gpu_run.Run(tmp_path / "out", 5, dry=True)
    group = gpu_run.Group("moe_lora", "fwdbwd", ("T1-bf16", "T64-bf16", "T512-bf16"))
    gpu_run.measure(this, group, [])
    assert ran == [["T1-bf16", "T64-bf16", "T512-bf16"], ["T512-bf16"]]
    lines = [json.loads(text) for text in this.results.read_text().splitlines()]
    assert [r["case"]["name"] for r in lines] == ["T1-bf16", "T64-bf16", "T512-bf16"]
    assert (lines[1]["status"], lines[1]["why"]) == ("crashed", "exit -11")
    assert this.failed == ["moe_lora fwdbwd T64-bf16"]


def test_a_command_runs_with_its_limits(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_run, "SHORTEST", 0.1)
    this = gpu_run.Run(tmp_path / "out", 5, dry=True)
    assert this.command("ok", ["echo", "hello"], 20) == 0
    assert this.command("slow", ["sleep", "60"], 0.2) == 124
    assert this.command("none", ["no-such-command"], 20) == 127
    this.must("wrong", ["false"], 20)
    assert this.failed == ["wrong"]
    assert "hello" in (tmp_path / "out" / "log.txt").read_text()
    assert len(list((tmp_path / "out").iterdir())) <= 8


def test_no_time_left_starts_nothing(tmp_path):
    this = gpu_run.Run(tmp_path / "out", 0, dry=True)
    assert this.command("late", ["touch", str(tmp_path / "made")], 20) == 0
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("check", gpu_checks.CHECKS)
def test_device_checks_pass_on_small_cases(check):
    assert gpu_checks.main(["--device", "cpu", "--small", "--only", check]) == 0


def test_device_checks_catch_a_kernel_that_wanders(operations, monkeypatch, capsys):
    import dataclasses

    op = operations["moe_lora"]
    right = op.providers["ours"]

    def build(inputs):
        step = right.build(inputs)
        forward = step._forward
        step._forward = lambda: forward() + torch.rand(()) * 1e-3
        return step

    monkeypatch.setitem(op.providers, "ours", dataclasses.replace(right, build=build))
    assert gpu_checks.main(["--device", "cpu", "--small", "--only", "repeats"]) == 1
    assert "FAILED  repeats" in capsys.readouterr().out


def test_passes_and_cases_in_turn_measure_the_same(operations, monkeypatch):
    told = []

    class Fake:
        def __init__(self, op, case, *rest):
            self.name = case.name

        def time(self, epoch, *rest):
            told.append((self.name, epoch))

        def lines(self):
            return [self.name]

    monkeypatch.setattr(run, "Measurement", Fake)
    op = operations["moe_lora"]
    chosen = [(op, case) for case in run.select(op, "T1-bf16,T8-bf16")]
    options = run.arguments(["--epochs", "2"])
    assert list(run.in_passes(chosen, options)) == [["T1-bf16"], ["T8-bf16"]]
    assert told == [("T1-bf16", 0), ("T8-bf16", 0), ("T1-bf16", 1), ("T8-bf16", 1)]
    told.clear()
    assert list(run.case_by_case(chosen, options)) == [["T1-bf16"], ["T8-bf16"]]
    assert told == [("T1-bf16", 0), ("T1-bf16", 1), ("T8-bf16", 0), ("T8-bf16", 1)]
    late = run.arguments(["--until", "1"])
    assert list(run.case_by_case(chosen, late)) == []
