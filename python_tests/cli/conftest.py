import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "pipeline"))


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    pytest.importorskip("transformers")
    from tiny_model import make_model

    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def data_file(tmp_path_factory):
    from tiny_model import write_data

    return write_data(tmp_path_factory.mktemp("data") / "sums.json")


@pytest.fixture
def floe(capfd):
    """Run a command in this process; return exit code, stdout and stderr."""
    pytest.importorskip("typer")
    from floe_kernels.cli.app import run

    def call(*arguments):
        code = run([str(a) for a in arguments])
        out, error = capfd.readouterr()
        return code, out, error

    return call


@pytest.fixture(scope="session")
def small(model_folder, data_file):
    """Options that make any command quick."""
    return (
        "--model", model_folder, "--data", data_file, "--dtype", "float32", "--length", 32,
    )  # fmt: skip
