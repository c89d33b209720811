"""torch's compiler without a place for its cache: a sentence that says which folder it is."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("typer")
NOWHERE = "/proc/no/such/place"
SENTENCE = (
    "torch cannot make the folder of its cache, /proc/no: No such file or directory: "
    "set TORCHINDUCTOR_CACHE_DIR to a folder that can be written"
)
needs_proc = pytest.mark.skipif(sys.platform != "linux", reason="/proc")


@needs_proc
def test_a_command_says_which_folder_it_was(small, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "floe_kernels", "tune", *map(str, small), "--out", tmp_path / "run"],
        env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": NOWHERE, "HF_HUB_OFFLINE": "1"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == f"error: {SENTENCE}"
    assert "Traceback" not in done.stderr


@needs_proc
def test_an_error_of_another_file_stays_what_it_is(monkeypatch):
    from floe_kernels.cli.app import no_cache

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", NOWHERE)
    assert no_cache(AssertionError("already registered")) == SENTENCE
    assert no_cache(FileNotFoundError(2, "No such file or directory", "/proc/no")) == SENTENCE
    assert no_cache(FileNotFoundError(2, "No such file or directory", "data.json")) is None


def test_a_folder_that_can_be_made_is_not_blamed(monkeypatch, tmp_path):
    from floe_kernels.cli.app import no_cache

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    assert no_cache(AssertionError("something else")) is None
