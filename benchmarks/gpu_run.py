"""python -m benchmarks.gpu_run --out DIR --minutes 9: build, test and measure on a CUDA GPU.

Needs no network, and takes the torch and Triton that are there. Leaves results.jsonl, log.txt and
report.md in DIR, each written as it goes, so that a run cut off loses one case. Exits 2 without a
GPU, 1 if a correctness step failed. ``--dry-run`` takes every step on the CPU, with few cases.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import records

ROOT = Path(__file__).parent.parent
#: Seconds kept back for the report at the end, and the least that a command is started for.
MARGIN, SHORTEST = 15.0, 5.0


class Group(NamedTuple):
    """Cases that one process measures, in this order."""

    op: str
    mode: str
    cases: tuple[str, ...]
    more: tuple[str, ...] = ()


#: In order of importance: what the goals are stated at, then where peers are strongest.
PLAN = (
    Group("moe_lora", "fwdbwd", ("goal-4096", "goal-1024", "goal-grouped")),
    Group("grad_square", "fwdbwd", ("r16-len128-bf16", "r64-len128-bf16", "r128-len128-bf16")),
    Group("two_source", "fwd", ("y-4096-R128", "dx-4096-R128", "y-1024-R128", "dx-1024-R128")),
    Group("moe_lora", "fwdbwd", ("T512-bf16", "T64-bf16", "T1-bf16", "R1024-E64-bf16")),
    Group("moe_lora", "fwd", ("goal-4096", "goal-1024")),
    Group("fisher", "fwdbwd", ("routed-r16-len512-bf16", "routed-r64-len128-bf16")),
    Group("training_step", "step", ("llama-1b-shape",), (
        "--hidden", "2048", "--intermediate", "8192", "--layers", "8", "--heads", "32",
        "--kv-heads", "8", "--vocab", "32000", "--batch", "4", "--length", "1024",
        "--rank", "16", "--seconds", "15",
    )),
    Group("moe_lora", "fwdbwd", ("hydralora-q-bf16", "uneven-ranks-bf16", "zipf-large-R-bf16",
                                 "llama8b-gate-bf16", "llama8b-down-bf16", "hot-large-R-bf16")),
    Group("moe_lora", "fwdbwd", ("R512-E32-bf16", "R2048-E64-bf16", "R4096-E64-bf16",
                                 "R256-E16-bf16", "R128-E8-bf16", "R32-E4-bf16")),
    Group("moe_lora", "fwdbwd", ("T8-bf16", "T2048-bf16", "T8192-bf16", "T32768-bf16")),
    Group("moe_lora", "fwdbwd", ("fp32-adapter", "llama1b-q-bf16", "mola-q-bf16")),
    Group("grad_square", "fwdbwd", ("r16-len8-bf16", "r16-len512-bf16", "r16-ragged-bf16")),
)  # fmt: skip
DRY_PLAN = (
    Group("moe_lora", "fwdbwd", ("T1-bf16", "T64-bf16")),
    Group("two_source", "fwd", ("y-1024-R64",)),
    Group("grad_square", "fwdbwd", ("r16-len512-bf16",)),
    Group("training_step", "step", ("small",), (
        "--layers", "2", "--vocab", "512", "--seconds", "2",
    )),
)  # fmt: skip

#: Tests that compile or emulate for a GPU that need not be there.
AHEAD_OF_TIME = (
    "triton/test_triton_compiled.py", "cuda/test_cuda_compiled.py", "cuda/test_cuda_emulation.py",
    "cuda/test_cuda_build.py", "cuda/test_cuda_toolchain.py",
)  # fmt: skip


class Run:
    """One run: where it writes, when it must end, and what has failed."""

    def __init__(self, out: Path, minutes: float, dry: bool) -> None:
        out.mkdir(parents=True, exist_ok=True)
        self.out, self.dry = out, dry
        self.results, self.log = out / "results.jsonl", out / "log.txt"
        self.end = time.time() + 60 * minutes - MARGIN
        self.device = "cpu" if dry else "cuda"
        self.failed: list[str] = []

    def say(self, text: str) -> None:
        """Print a line and log it at once."""
        print(text, flush=True)
        with self.log.open("a") as file:
            file.write(text + "\n")

    def command(
        self, title: str, command: list[str], most: float, last: int = 0, **environment: str
    ) -> int:
        """Run a command, its output (or the last so many lines of it) in the log.

        Returns its exit code; 124 if it ran past its time, 127 if there is no such command.
        """
        limit = min(most, self.end - time.time())
        if limit < SHORTEST:
            self.say(f"-- {title}: no time left")
            return 0
        self.say(f"-- {title}: {' '.join(Path(c).name if os.sep in c else c for c in command)}")
        start = time.time()
        with tempfile.TemporaryFile("w+") if last else self.log.open("a") as output:
            try:
                code = subprocess.run(
                    command, cwd=ROOT, timeout=limit, stdout=output, stderr=subprocess.STDOUT,
                    env={**os.environ, **environment},
                ).returncode  # fmt: skip
            except subprocess.TimeoutExpired:
                code = 124
            except OSError as error:
                self.say(f"   {error}")
                code = 127
            if last:
                output.seek(0)
                with self.log.open("a") as file:
                    file.writelines(output.readlines()[-last:])
        self.say(f"   exit {code}, {time.time() - start:.0f} s")
        return code

    def must(self, title: str, command: list[str], most: float, **rest: Any) -> None:
        """Run a command and remember if it fails."""
        if self.command(title, command, most, **rest):
            self.failed.append(title)


def build(run: Run) -> None:
    """Compile the extensions: in place on a GPU machine, to the side in a dry run."""
    command = [sys.executable, "setup.py", "--quiet", "build_ext"]
    with tempfile.TemporaryDirectory() as folder:
        aside = ["--build-lib", folder, "--build-temp", f"{folder}/objects"]
        where = aside if run.dry else ["--inplace"]
        # the package works without them: a failure is recorded, and the run goes on
        run.must("build", [*command, *where], 300 if run.dry else 150, last=60, FLOE_BUILD="auto")


def test(run: Run) -> None:
    """Run the tests that use the device where there is one; ahead-of-time builds are not that."""
    folders = ["functional", "nn", "triton", "cuda"]
    chosen = [f"python_tests/{f}" for f in folders if (ROOT / "python_tests" / f).is_dir()]
    if run.dry:
        chosen = ["python_tests/functional/test_routing.py"]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--maxfail=20"]
    if not run.dry and find_spec("xdist"):
        command += ["-n", "6"]
    ahead = [f"--ignore=python_tests/{path}" for path in AHEAD_OF_TIME]
    run.must("correctness tests", [*command, *ahead, *chosen], 170)


def check(run: Run) -> None:
    """Check results, repeatability, syncs and graphs; then memory accesses, where the tool is."""
    checks = [sys.executable, "-m", "benchmarks.gpu_checks", "--device", run.device]
    run.must("device checks", checks, 120)
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        run.say("-- compute-sanitizer: not installed here")
        return
    small = [*checks, "--small", "--only", "results"]
    for tool in ("memcheck", "racecheck"):
        command = [sanitizer, "--tool", tool, "--error-exitcode", "99", *small]
        run.must(f"compute-sanitizer {tool}", command, 60)


def done_cases(path: Path, group: Group) -> set[str]:
    """Return the cases of the group that the results file already has."""
    lines = records.read(path) if path.exists() else []
    return {r["case"]["name"] for r in lines if (r["op"], r["mode"]) == (group.op, group.mode)}


def measure(run: Run, group: Group, peers: list[str]) -> None:
    """Measure a group; a process that dies costs the case it died in, which is recorded."""
    if group.op == "training_step":
        command = [sys.executable, "-m", "benchmarks.end_to_end", "--device", run.device]
        run.must("training step", [*command, *group.more, "--out", str(run.results)], 120)
        return
    pending = list(group.cases)
    while pending and time.time() < run.end - 10:
        command = [
            sys.executable, "-m", "benchmarks.run", "--op", group.op, "--mode", group.mode,
            "--device", run.device, "--cases", ",".join(pending), "--out", str(run.results),
            "--seconds", "1" if run.dry else "6", "--epochs", "1" if run.dry else "2",
            "--together", "--until", str(run.end), *[f"--peer-path={p}" for p in peers],
        ]  # fmt: skip
        code = run.command(f"{group.op} {group.mode}", command, run.end - time.time())
        done = done_cases(run.results, group)
        pending = [case for case in pending if case not in done]
        if code == 0 or code == 124:
            return  # all that there was time for
        if pending:
            line: dict[str, Any] = {"op": group.op, "mode": group.mode, "provider": "all"}
            line |= {"case": {"name": pending[0]}, "status": "crashed", "why": f"exit {code}"}
            with run.results.open("a") as file:
                file.write(json.dumps({"schema": records.SCHEMA, **line}) + "\n")
            run.failed.append(f"{group.op} {group.mode} {pending.pop(0)}")


def report(run: Run) -> None:
    """Write the tables; their summary is the last thing printed."""
    from benchmarks import report as tables

    lines = records.read(run.results) if run.results.exists() else []
    lines = [line for line in lines if "machine" in line]
    if not lines:
        run.say("nothing was measured")
        return
    lines = tables.with_best_ceilings(tables.last_of_each(lines))
    layers = [line for line in lines if line["op"] != "training_step"]
    text = "\n".join(tables.case_table(group) for group in tables.by_case(layers))
    (run.out / "report.md").write_text(f"{tables.summary(layers)}\n\n{text}")
    run.say(tables.summary(layers))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_run", description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--dry-run", action="store_true", help="every step on the CPU, few cases")
    parser.add_argument("--skip", default="", help="build, test or check, comma separated")
    parser.add_argument("--peer-path", action="append", default=[], help="folder of a peer's copy")
    parser.add_argument("--commit", help="what to record where there is no git")
    options = parser.parse_args(argv)

    import torch

    if not options.dry_run and not torch.cuda.is_available():
        print("this needs a CUDA GPU, and torch finds none; --dry-run takes every step on the CPU")
        return 2
    if options.commit:
        os.environ["FLOE_BENCH_COMMIT"] = options.commit
    run = Run(options.out, options.minutes, options.dry_run)
    where = records.machine(run.device)
    run.say(f"{where['machine']}; {', '.join(f'{k} {v}' for k, v in records.versions().items())}")
    for name, step in (("build", build), ("test", test), ("check", check)):
        if name not in options.skip.split(","):
            step(run)
    for group in DRY_PLAN if run.dry else PLAN:
        measure(run, group, options.peer_path)
    report(run)
    run.say(f"failed: {', '.join(run.failed) or 'nothing'}")
    return int(bool(run.failed))


if __name__ == "__main__":
    raise SystemExit(main())
