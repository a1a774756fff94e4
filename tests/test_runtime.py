"""The parts of runtime/: each by itself."""

import os
import socket
import subprocess
import sys

import pytest
import torch

from leap_align import BadInput
from runtime import files, processes, run_dir
from runtime.ema import EMA
from runtime.processes import RaisedOnAllRanks, all_gather, one_line, run_on_all_ranks, run_on_rank0
from runtime.report import reward_hacking_warnings
from tests.toy_runs import ROOT, SMALL


def enter(context):
    with context:
        pass


@pytest.mark.parametrize("atomic", [files.atomic_file, files.atomic_folder])
def test_a_file_or_folder_is_replaced_whole_or_not_at_all(tmp_path, atomic):
    path, content = tmp_path / "new" / "name", "" if atomic is files.atomic_file else "content"
    for text in ("old", "new"):
        with atomic(path) as temporary:
            (temporary / content).write_text(text)
            assert text == "new" or not path.exists()
    with pytest.raises(RuntimeError), atomic(path) as temporary:
        (temporary / content).write_text("half of it")
        raise RuntimeError("disk full")
    assert (path / content).read_text() == "new" and list(path.parent.iterdir()) == [path]


def test_digests_are_those_of_contents_and_names(tmp_path):
    (tmp_path / "a.bin").write_bytes(b"content")
    assert files.digest(tmp_path / "a.bin") == files.digest(b"content") != files.digest(b"contents")
    first = files.digest_files(tmp_path, tmp_path.glob("*.bin"))
    (tmp_path / "a.bin").write_bytes(b"another")
    second = files.digest_files(tmp_path, tmp_path.glob("*.bin"))
    (tmp_path / "a.bin").rename(tmp_path / "b.bin")
    assert len({first, second, files.digest_files(tmp_path, tmp_path.glob("*.bin"))}) == 3


def test_only_the_names_of_checkpoints_count(tmp_path):
    for name in ("000100", "000099", "1000000", "000100-mine", "9notes", "part", "99"):
        (tmp_path / "checkpoint" / name).mkdir(parents=True)
        (tmp_path / "checkpoint" / name / "state.json").touch()
    (tmp_path / "checkpoint" / "000200").mkdir()  # not finished
    assert [path.name for path in run_dir.checkpoints(tmp_path)] == ["000099", "000100", "1000000"]


@pytest.mark.parametrize("name", ["model_index.json", "settings.json", "transformer/config.json", "thesis.part"])
def test_a_folder_that_somebody_else_filled_is_refused_and_left_alone(tmp_path, name):
    file = tmp_path / "folder" / name
    file.parent.mkdir(parents=True)
    file.write_text("{}")
    with pytest.raises(BadInput, match=r"folder is not empty, and sample did not fill it"):
        enter(run_dir.claimed_output_folder(tmp_path / "folder", "sample", {}))
    assert [path for path in (tmp_path / "folder").rglob("*") if path.is_file()] == [file]


def test_a_locked_folder_is_refused_until_its_process_ends(tmp_path):
    code = f"""
from pathlib import Path
from runtime.run_dir import locked_folder
with locked_folder(Path({str(tmp_path)!r}), "config.json", "train"):
    input(print("locked", flush=True))
"""
    other = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert other.stdout.readline() == b"locked\n"
    with pytest.raises(BadInput, match="in use by another process"):
        enter(run_dir.locked_folder(tmp_path, "config.json", "train"))
    other.kill()
    other.communicate()
    enter(run_dir.locked_folder(tmp_path, "config.json", "train"))


CHANGEABLE = frozenset({"iterations"})


@pytest.mark.parametrize(("refused", "words"), [
    (lambda out: enter(run_dir.claimed_output_folder(out, "sample", {"lr": 2.0})), "lr was 1.0, is 2.0; choose"),
    (lambda out: run_dir.check_run_folder(out, {"lr": 2.0, "iterations": 5}, True, CHANGEABLE), "is 2.0; give"),
    (lambda out: run_dir.check_contents(out, {"prompts": "a", "model": "c"}), "model changed since"),
    (lambda out: enter(run_dir.locked_folder(out / "config.json", "config.json", "sample")), "config.json is a file"),
    (lambda out: enter(run_dir.locked_folder(out / "config.json" / "a", "config.json", "sample")), "cannot write to"),
])  # fmt: skip
def test_other_settings_contents_or_files_are_refused(refused, words, tmp_path):
    settings = {"lr": 1.0, "iterations": 3}
    for _ in range(2):
        enter(run_dir.claimed_output_folder(tmp_path, "sample", {"lr": 1.0}))
    run_dir.write_settings(tmp_path / "config.json", settings | {"contents": {"prompts": "a", "model": "b"}})
    (tmp_path / "checkpoint" / "000001").mkdir(parents=True)
    (tmp_path / "checkpoint" / "000001" / "state.json").touch()
    run_dir.check_run_folder(tmp_path, settings | {"iterations": 4}, True, CHANGEABLE)
    run_dir.check_contents(tmp_path, {"prompts": "a", "model": "b"})
    with pytest.raises(BadInput) as stop:
        refused(tmp_path)
    assert words in str(stop.value) and "\n" not in str(stop.value)
    assert files.read_json(tmp_path / "settings.json")["lr"] == 1.0


DAMAGED = [("config.json", content) for content in (b"{", b"[]", b"\xff\xfe", b"3", b'{"a":"\\udc80"}')]
DAMAGED += [("config.json", opening * 10_000) for opening in (b"[", b'{"a":')]
DAMAGED += [
    ("metrics.csv", content)
    for content in (b"a,b\n1,2\n", b"\xff\xfe\x00", b"", b"iteration,reward\nxx,1\n", b"x" * 200_000)
]


@pytest.mark.parametrize(("name", "content"), DAMAGED, ids=lambda value: str(value)[:30])
def test_a_damaged_or_foreign_file_is_refused_by_name(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    words = "is damaged|must hold a JSON object|has other columns|is not a CSV file|has a damaged row"
    with pytest.raises(BadInput, match=rf"^\S*{name} ({words})[^\n]*$"):
        files.read_json(tmp_path / name) if name == "config.json" else run_dir.CsvLog(tmp_path / name, ("reward",), 1)
    assert (tmp_path / name).read_bytes() == content


def test_a_log_drops_the_rows_after_its_checkpoint(tmp_path):
    path = tmp_path / "metrics.csv"
    log = run_dir.CsvLog(path, ("reward", "d_j"), 0)
    for iteration in (1, 2, 3):
        log.add({"iteration": iteration, "reward": iteration / 2, "not_a_column": 1})
    run_dir.CsvLog(path, ("reward", "d_j"), 2).add({"iteration": 3, "d_j": 7})
    rows = files.read_csv(path, ("iteration", "reward", "d_j"))
    assert [list(row.values()) for row in rows] == [["1", "0.5", ""], ["2", "1.0", ""], ["3", "", "7"]]
    files.write_csv(path, [{"a": 1}, {"b": 2.5, "a": 3}])
    assert path.read_text().split() == ["a,b", "1,", "3,2.5"]  # a column for every key


@pytest.fixture
def no_launcher(monkeypatch):
    for name in (*processes.GROUP, *processes.COUNTS):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


@pytest.mark.parametrize("count", ["2", "16"])
@pytest.mark.parametrize("name", ["WORLD_SIZE", "SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"])
def test_processes_that_cannot_find_each_other_do_not_train_side_by_side(no_launcher, name, count):
    no_launcher.setenv("RANK", "0")
    no_launcher.setenv(name, "1")
    processes.init_process_group()
    no_launcher.setenv(name, count)
    with pytest.raises(BadInput, match=rf"^{name}={count}, but .*MASTER_PORT are not set: start one torchrun"):
        processes.init_process_group()


@pytest.mark.slow
def test_processes_of_any_launcher_join_their_group(no_launcher, tmp_path):
    """As Kubernetes' jobs and `accelerate launch` start them: with torchrun's variables, without torchrun."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    group = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    command = [sys.executable, "train_leap_align.py", *SMALL, "--out", str(tmp_path / "run")]
    ranks = [{"RANK": str(i), "LOCAL_RANK": str(i)} for i in range(2)]
    both = [subprocess.Popen(command, cwd=ROOT, env=os.environ | group | own, stdout=subprocess.PIPE) for own in ranks]
    printed = [process.communicate(timeout=300)[0].decode() for process in both]
    assert [process.returncode for process in both] == [0, 0] and printed[1] == ""
    assert "Processes: 2; device: cpu; precision: float32." in printed[0]


def test_a_rank_that_is_no_number_is_refused(no_launcher):
    for name in processes.GROUP:
        no_launcher.setenv(name, "one" if name == "RANK" else "1")
    with pytest.raises(BadInput, match=r"^RANK=.one. in the environment is no number$"):
        processes.init_process_group()


@pytest.mark.parametrize("run", [run_on_all_ranks, run_on_rank0])
@pytest.mark.parametrize("error", [BadInput("lr=0"), FileNotFoundError(2, "No such file", "a/b")])
def test_a_refusal_becomes_one_of_all_ranks(run, error):
    def refuse():
        raise error

    with pytest.raises(RaisedOnAllRanks, match=r"lr=0|a/b: No such file"):
        run(refuse)
    assert all_gather("value") == ["value"] and run_on_all_ranks(lambda: 3) == 3


def test_an_error_fits_on_one_line():
    assert one_line(ValueError("two\n  lines")) == "two lines"
    assert one_line(OSError(28, "No space left on device", "x")) == "No space left on device"
    assert len(one_line(ValueError("x" * 1000))) == 200


def test_ema_against_a_hand_calculation_and_swapped_back():
    p = torch.nn.Parameter(torch.tensor([1.0]))
    ema = EMA([p], decay=0.15)
    for n, value in enumerate((2.0, 3.0)):
        with torch.no_grad():
            p.fill_(value)
        ema.update(n)
    with ema.swapped():  # the decay is 1/10 first, and 2/11 would be more than 0.15
        assert p.item() == pytest.approx(0.15 * (0.1 * 1.0 + 0.9 * 2.0) + 0.85 * 3.0)
    assert p.item() == 3.0
    with pytest.raises(RuntimeError), ema.swapped():
        raise RuntimeError("in the middle of an evaluation")
    assert p.item() == 3.0


@pytest.mark.parametrize("updates, most", [(1, 0.1), (10, 2e-5), (50, 1e-9)])
def test_a_short_runs_average_forgets_the_start(updates, most):
    """What is left of the start: 1/10 2/11 ... n/(9 + n).  A constant decay of 0.995 leaves 0.995, 0.95 and 0.78."""
    p = torch.nn.Parameter(torch.ones(1, dtype=torch.float64))
    ema = EMA([p], decay=0.995)
    torch.nn.init.zeros_(p)
    for n in range(updates):
        ema.update(n)
    assert 0 < ema.average[0].item() <= most


def test_the_average_reaches_its_decay():
    """(1 + n) / (10 + n) = 0.995 at n = 1790."""
    p = torch.nn.Parameter(torch.ones(1, dtype=torch.float64))
    factors = []
    for n in (1789, 1791, 5000):
        ema = EMA([torch.nn.Parameter(p.detach().clone())], decay=0.995)
        torch.nn.init.zeros_(ema.parameters[0])
        ema.update(n)
        factors.append(ema.average[0].item())
    assert factors[0] < 0.995 and factors[1:] == pytest.approx([0.995, 0.995], abs=1e-15)


def test_warnings_of_reward_hacking_against_a_hand_calculation():
    held_out = {"evaluator": 0.1, "distance": -0.5}
    values = zip((0.5, 0.9, 0.7), (2.0, 2.4, 2.6))
    rows = [{"iteration": n, "reward": float(n), "evaluator": e, "distance": d} for n, (e, d) in enumerate(values)]
    assert reward_hacking_warnings(rows[:2], held_out) == {}
    warnings = reward_hacking_warnings(rows, held_out)
    assert warnings.keys() == held_out.keys()
    assert "iteration 1 -> 2" in warnings["evaluator"] and "0.9 -> 0.7" in warnings["evaluator"]
    assert "iteration 0 -> 2" in warnings["distance"]
    # An evaluator that falls together with the reward is a failure, but not hacking.
    assert reward_hacking_warnings([rows[1], {**rows[2], "reward": 0.5}], held_out) == {}
