import pytest
from tiny_model import make_model, write_data


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    pytest.importorskip("transformers")
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def data_file(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data") / "sums.jsonl")
