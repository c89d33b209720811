"""A run's folder: one process, whole files, and nothing lost."""

import errno
import json
import multiprocessing
import os
import resource
import signal

import pytest

from floe_kernels.pipeline import files
from floe_kernels.pipeline.history import History
from floe_kernels.pipeline.runs import clear_run, load_run, open_run


def visit(folder, command="tune", arguments=None, resume=False):
    with open_run(folder, command, arguments or {}, resume=resume):
        pass


def test_a_run_is_taken_up_where_it_was(tmp_path):
    with open_run(tmp_path / "r", "tune", {"seed": 1, "data": "d"}) as run:
        run.pin(model="abc")
        run.finish("search", {"rank": 8, "loss": float("nan")})
        run.history.add("step", step=1)
    with open_run(tmp_path / "r", "tune", {"seed": 1}, resume=True) as run:
        assert run.arguments == {"seed": 1, "data": "d"}
        assert run.state == {"search": {"rank": 8, "loss": None}}
        assert run.history.lines == [{"event": "step", "step": 1}]
        run.pin(model="abc")
        with pytest.raises(ValueError, match="needs the model it began with, abc, got abd"):
            run.pin(model="abd")


@pytest.mark.parametrize(
    ("command", "arguments", "resume", "error", "message"),
    [
        ("tune", {}, False, FileExistsError, "holds a run already: add --resume"),
        ("train", {}, True, ValueError, "is of floe tune, got floe train"),
        ("tune", {"seed": 2}, True, ValueError, "keeps its arguments: seed was 1, got 2"),
    ],
)
def test_another_run_is_refused(tmp_path, command, arguments, resume, error, message):
    with open_run(tmp_path, "tune", {"seed": 1}):
        pass
    with pytest.raises(error, match=message):
        visit(tmp_path, command, arguments, resume)


def test_there_must_be_something_to_resume(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no run to resume"):
        visit(tmp_path / "r", resume=True)
    assert not (tmp_path / "r").exists()


def hold(folder, ready):
    with open_run(folder, "tune", {}):
        ready.set()
        signal.pause()


def test_a_second_process_is_told_and_the_lock_dies_with_the_first(tmp_path):
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    first = context.Process(target=hold, args=(tmp_path, ready))
    first.start()
    try:
        assert ready.wait(30)
        with pytest.raises(BlockingIOError, match=f"process {first.pid} does: wait for it"):
            visit(tmp_path, resume=True)
    finally:
        first.kill()
        first.join()
    with open_run(tmp_path, "tune", {}, resume=True) as run:
        assert run.command == "tune"


def test_what_a_kill_left_half_written_is_cleared(tmp_path):
    with open_run(tmp_path, "tune", {}) as run:
        run.history.add("step", step=1)
    (tmp_path / f".state.json{files.PARTIAL}").write_text('{"sea')
    with (tmp_path / "history.jsonl").open("a") as file:
        file.write('{"event": "st')
    with open_run(tmp_path, "tune", {}, resume=True) as run:
        run.history.add("step", step=2)
    lines = [json.loads(line) for line in (tmp_path / "history.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    assert not list(tmp_path.glob(f".*{files.PARTIAL}"))


def test_looking_at_a_run_changes_nothing(tmp_path):
    with open_run(tmp_path, "tune", {}) as run:
        run.history.add("step", step=1)
    with (tmp_path / "history.jsonl").open("a") as file:
        file.write('{"event": "st')
    before = (tmp_path / "history.jsonl").read_text()
    assert len(load_run(tmp_path).history.lines) == 1
    assert (tmp_path / "history.jsonl").read_text() == before


@pytest.mark.parametrize("name", ["config.json", "state.json"])
@pytest.mark.parametrize("content", ["", '{"format"', "[]", "\xff\xfe"])
def test_a_damaged_file_is_named(tmp_path, name, content):
    with open_run(tmp_path, "tune", {}) as run:
        run.finish("plan", {})
    (tmp_path / name).write_bytes(content.encode("latin-1"))
    with pytest.raises(ValueError, match=name):
        load_run(tmp_path)


@pytest.mark.parametrize("line", ["oops", "[" * 100_000])
def test_a_damaged_line_is_named(tmp_path, line):
    (tmp_path / "h").write_text(f'{{"event": "a"}}\n{line}\n{{"event": "b"}}\n')
    with pytest.raises(ValueError, match="h, line 2: must be JSON"):
        History(tmp_path / "h")


def test_rewinding_takes_out_what_will_be_done_again(tmp_path):
    history = History(tmp_path / "h")
    for run in ("a", "b"):
        for step in (1, 2, 3):
            history.add("step", run=run, step=step)
    history.rewind("step", after=1, run="a")
    left = [(line["run"], line["step"]) for line in History(tmp_path / "h").lines]
    assert left == [("a", 1), ("b", 1), ("b", 2), ("b", 3)]
    assert [line["step"] for line in history.of("step", run="b")] == [1, 2, 3]


def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "state.json"
    files.write_json(path, {"old": 1})

    def full(_file):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        files.write_json(path, {"new": 2})
    assert json.loads(path.read_text()) == {"old": 1}
    assert os.listdir(tmp_path) == ["state.json"]


def test_a_file_that_outgrows_its_limit_leaves_the_old_one(tmp_path):
    path = tmp_path / "state.json"
    files.write_json(path, {"old": 1})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            files.write_json(path, {"new": "x" * 5000})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert json.loads(path.read_text()) == {"old": 1}


@pytest.mark.parametrize("folder", ["file/run", "file"])
def test_a_folder_that_cannot_be_written_is_named(tmp_path, folder):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match="cannot write there") as caught:
        visit(tmp_path / folder)
    assert caught.value.filename == str(tmp_path / folder)


def test_clearing_deletes_the_run_alone(tmp_path):
    with open_run(tmp_path, "demo", {}) as run:
        run.finish("plan", {})
        run.history.add("step")
        run.checkpoint("floe").touch()
    (tmp_path / "mine.txt").touch()
    clear_run(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"mine.txt", "lock"}
    with pytest.raises(FileNotFoundError, match="holds no run"):
        clear_run(tmp_path)


@pytest.mark.parametrize("name", ["arguments", "facts"])
def test_a_configuration_of_another_shape_is_refused(tmp_path, name):
    with open_run(tmp_path, "tune", {}):
        pass
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, name: None}))
    with pytest.raises(ValueError, match=f"{name} in .*config.json must be an object, got None"):
        load_run(tmp_path)
