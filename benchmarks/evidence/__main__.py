"""python -m benchmarks.evidence NAME [--data DIR] [--minutes M] [--threads N], or: report, list."""

import argparse
import time
from pathlib import Path

from benchmarks import records
from benchmarks.evidence import config

RESULTS = Path("benchmarks/results/evidence")
WORK = Path("runs/evidence")
REPORT = Path("benchmarks/EVIDENCE.md")
USUAL_RUN_S = 90.0


def main(argv: list[str] | None = None) -> int:
    """Do an experiment's missing runs, or write the report; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.evidence", description=__doc__)
    parser.add_argument("name", help=f"{', '.join(config.names())}, report or list")
    parser.add_argument("--data", type=Path, help="folder of the question files")
    parser.add_argument("--only", metavar="LABEL", help="one data set; two at once need two --work")
    parser.add_argument("--minutes", type=float, default=0.0, help="start no run that ends later")
    parser.add_argument("--threads", type=int, default=0, help="0: torch's")
    parser.add_argument("--results", type=Path, default=records.ROOT / RESULTS)
    parser.add_argument("--work", type=Path, default=records.ROOT / WORK, help="scratch folder")
    parser.add_argument("--out", type=Path, default=records.ROOT / REPORT)
    parser.add_argument("--configs", type=Path, default=config.FOLDER, help="folder of TOML files")
    given = parser.parse_args(argv)
    try:
        if given.name == "list":
            _list(given)
        elif given.name == "report":
            from benchmarks.evidence import report

            for path in report.write(given.configs, given.results, given.out):
                _say(f"wrote {path}")
        else:
            return _run(given)
    except KeyboardInterrupt:
        _say("interrupted; the same command goes on where this one stopped")
        return 130
    except (ValueError, OSError, ImportError) as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    return 0


def _run(given: argparse.Namespace) -> int:
    from benchmarks.evidence.runner import run_all
    from benchmarks.evidence.stage import Stage
    from floe_kernels.pipeline import files

    chosen = config.load(given.name, given.configs)
    if given.only:
        chosen = chosen.only(given.only)
    files.check_writable(given.work)
    with files.lock(given.work):
        stage = Stage(chosen, given.data, given.work, given.threads)
        stage.use_threads()
        for data in chosen.datasets:  # a missing file shows now, not in an hour
            for note in stage.task(data.label).dataset.notes:
                _say(f"{data.label}: {note}")
        run_all(stage, given.results / f"{given.name}.jsonl", minutes=given.minutes, say=_say)
    return 0


def _list(given: argparse.Namespace) -> None:
    from benchmarks.evidence.runner import lines_of, pending

    for name in config.names() if given.configs == config.FOLDER else []:
        chosen = config.load(name, given.configs)
        left = len(pending(chosen, lines_of(given.results / f"{name}.jsonl")))
        _say(f"{name}: {left} of {len(chosen.runs())} runs to do. {chosen.title}")


def _say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
