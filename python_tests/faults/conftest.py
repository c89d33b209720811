"""What runs are made of, and the line that says how many faults were survived."""

import sys
from pathlib import Path

import pytest
from counting import SURVIVED

sys.path.insert(0, str(Path(__file__).parents[1] / "pipeline"))


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    pytest.importorskip("transformers")
    pytest.importorskip("typer")
    pytest.importorskip("optuna")
    from tiny_model import make_model

    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def data_file(tmp_path_factory):
    from tiny_model import write_data

    return write_data(tmp_path_factory.mktemp("data") / "sums.jsonl")


@pytest.fixture(scope="session")
def arguments(model_folder, data_file):
    from running import SMALL

    return ["--model", str(model_folder), "--data", str(data_file), *SMALL]


@pytest.fixture(scope="session")
def undisturbed(arguments, tmp_path_factory):
    """A run that nothing happens to."""
    from running import finished, start

    folder = tmp_path_factory.mktemp("undisturbed")
    code, said = finished(start(folder, arguments))
    assert code == 0, said
    return folder


def pytest_terminal_summary(terminalreporter):
    failed = len(terminalreporter.stats.get("failed", []))
    each = ", ".join(f"{name} {count}" for name, count in sorted(SURVIVED.items()))
    if SURVIVED:
        lost = "nothing lost" if not failed else f"{failed} tests failed"
        terminalreporter.write_line(f"faults: {SURVIVED.total()} survived ({each}), {lost}")
