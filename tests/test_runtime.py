"""The parts of runtime/: each by itself."""

import json
import subprocess
import sys

import pytest
import torch

from leap_align import BadInput
from runtime.ema import EMA
from runtime.processes import RaisedOnAllRanks, all_gather, one_line, run_on_all_ranks, run_on_rank0
from runtime.report import reward_hacking_signs
from runtime.run_dir import (
    CsvLog,
    atomic_file,
    atomic_folder,
    check_contents,
    check_new_file,
    check_run_folder,
    checkpoints,
    claimed_output_folder,
    digest,
    digest_folder,
    locked_folder,
    read_csv,
    read_json,
    write_csv,
    write_settings,
)
from tests.toy_runs import ROOT

# Atomic writes


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "new" / "file.txt"
    with atomic_file(path) as temporary:
        temporary.write_text("old")
        assert not path.exists()
    with pytest.raises(RuntimeError), atomic_file(path) as temporary:
        temporary.write_text("half of the n")
        raise RuntimeError("disk full")
    assert path.read_text() == "old" and list(path.parent.iterdir()) == [path]


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "folder"
    for name in ("old", "new"):
        with atomic_folder(path) as temporary:
            (temporary / name).touch()
    assert [file.name for file in path.iterdir()] == ["new"]
    with pytest.raises(RuntimeError), atomic_folder(path) as temporary:
        raise RuntimeError("disk full")
    assert [file.name for file in path.iterdir()] == ["new"]


def test_a_digest_is_that_of_the_content(tmp_path):
    (tmp_path / "a").write_bytes(b"content")
    assert digest(tmp_path / "a") == digest(b"content") != digest(b"contents")


def test_a_csv_file_has_a_column_for_every_key(tmp_path):
    write_csv(tmp_path / "table.csv", [{"a": 1}, {"b": 2.5, "a": 3}])
    assert (tmp_path / "table.csv").read_text().split() == ["a,b", "1,", "3,2.5"]


# Settings and logs


def test_a_tool_refuses_a_folder_with_other_settings(tmp_path):
    for _ in range(2):
        with claimed_output_folder(tmp_path, "sample", {"steps": 2, "lora": tmp_path}):
            pass
    with (
        pytest.raises(BadInput, match=r"steps was 2, is 3; choose another folder"),
        claimed_output_folder(tmp_path, "sample", {"steps": 3, "lora": tmp_path}),
    ):
        pass
    assert json.loads((tmp_path / "settings.json").read_text())["steps"] == 2


@pytest.mark.parametrize("name", ["model_index.json", "settings.json", "transformer/config.json", "thesis.part"])
def test_a_folder_that_somebody_else_filled_is_refused_and_left_alone(tmp_path, name):
    file = tmp_path / "folder" / name
    file.parent.mkdir(parents=True)
    file.write_text("{}")
    with (
        pytest.raises(BadInput, match=r"folder is not empty, and sample did not fill it"),
        claimed_output_folder(tmp_path / "folder", "sample", {}),
    ):
        pass
    assert [path for path in (tmp_path / "folder").rglob("*") if path.is_file()] == [file]


def test_a_file_is_no_folder_and_no_new_file(tmp_path):
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(BadInput, match="is a file"), locked_folder(file, "config.json", "train"):
        pass
    with pytest.raises(BadInput, match="exists: choose another --out"):
        check_new_file(file)
    check_new_file(tmp_path / "new")


def test_a_locked_folder_is_refused_until_its_process_ends(tmp_path):
    code = f"""
from pathlib import Path
from runtime.run_dir import locked_folder
with locked_folder(Path({str(tmp_path)!r}), "config.json", "train"):
    print("locked", flush=True)
    input()
"""
    other = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert other.stdout.readline() == b"locked\n"
    with pytest.raises(BadInput, match="in use by another process"), locked_folder(tmp_path, "config.json", "train"):
        pass
    other.kill()
    other.communicate()
    with locked_folder(tmp_path, "config.json", "train"):
        pass


def test_a_run_may_change_only_what_is_changeable_on_resume(tmp_path):
    write_settings(tmp_path / "config.json", {"lr": 1.0, "iterations": 3})
    check_run_folder(tmp_path, {"lr": 1.0, "iterations": 4}, True, frozenset({"iterations"}))
    with pytest.raises(BadInput, match=r"lr was 1\.0, is 2\.0; give those"):
        check_run_folder(tmp_path, {"lr": 2.0, "iterations": 5}, True, frozenset({"iterations"}))


def test_a_run_must_find_its_contents_unchanged(tmp_path):
    write_settings(tmp_path / "config.json", {"contents": {"prompts": "a", "model": "b"}})
    check_contents(tmp_path, {"prompts": "a", "model": "b"})
    with pytest.raises(BadInput, match=r"^model changed since"):
        check_contents(tmp_path, {"prompts": "a", "model": "c"})


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff\xfe", b"3"])
def test_damaged_json_is_refused_by_name(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(BadInput, match=r"^\S*config\.json (is damaged|must hold a JSON object)[^\n]*$"):
        read_json(tmp_path / "config.json")


@pytest.mark.parametrize("content", [b"a,b\n1,2\n", b"\xff\xfe\x00", b"", b"iteration,reward\nxx,1\n"])
def test_a_foreign_log_is_refused_by_name(tmp_path, content):
    (tmp_path / "metrics.csv").write_bytes(content)
    with pytest.raises(BadInput, match=r"metrics\.csv (has other columns|is not a CSV file|has a damaged row)"):
        CsvLog(tmp_path / "metrics.csv", ("reward",), 0)
    assert (tmp_path / "metrics.csv").read_bytes() == content


def test_only_the_names_of_checkpoints_count(tmp_path):
    for name in ("000100", "000099", "1000000", "000100-mine", "9notes", "part", "99"):
        (tmp_path / "checkpoint" / name).mkdir(parents=True)
    assert [path.name for path in checkpoints(tmp_path)] == ["000099", "000100", "1000000"]


def test_the_digest_of_a_folder_follows_names_and_contents(tmp_path):
    (tmp_path / "a.bin").write_bytes(b"1")
    (tmp_path / "notes.txt").write_bytes(b"1")
    first = digest_folder(tmp_path, "*.bin")
    (tmp_path / "notes.txt").write_bytes(b"2")
    assert digest_folder(tmp_path, "*.bin") == first
    (tmp_path / "a.bin").write_bytes(b"2")
    assert digest_folder(tmp_path, "*.bin") != first
    (tmp_path / "a.bin").write_bytes(b"1")
    (tmp_path / "a.bin").rename(tmp_path / "b.bin")
    assert digest_folder(tmp_path, "*.bin") != first


def test_a_log_drops_the_rows_after_its_checkpoint(tmp_path):
    path = tmp_path / "metrics.csv"
    log = CsvLog(path, ("reward", "d_j"), 0)
    for iteration in (1, 2, 3):
        log.add({"iteration": iteration, "reward": iteration / 2, "not_a_column": 1})
    CsvLog(path, ("reward", "d_j"), 2).add({"iteration": 3, "d_j": 7})
    rows = read_csv(path, ("iteration", "reward", "d_j"))
    assert [list(row.values()) for row in rows] == [["1", "0.5", ""], ["2", "1.0", ""], ["3", "", "7"]]
    path.unlink()
    with pytest.raises(BadInput, match="is gone"):
        log.add({"iteration": 4})


# Processes


def test_without_a_process_group_there_is_one_rank():
    assert all_gather("value") == ["value"] and run_on_all_ranks(lambda: 3) == 3


@pytest.mark.parametrize("run", [run_on_all_ranks, run_on_rank0])
@pytest.mark.parametrize("error", [BadInput("lr=0"), FileNotFoundError(2, "No such file", "a/b")])
def test_a_refusal_becomes_one_of_all_ranks(run, error):
    def refuse():
        raise error

    with pytest.raises(RaisedOnAllRanks, match=r"lr=0|a/b: No such file"):
        run(refuse)


def test_an_error_fits_on_one_line():
    assert one_line(ValueError("two\n  lines")) == "two lines"
    assert one_line(OSError(28, "No space left on device", "x")) == "No space left on device"
    assert len(one_line(ValueError("x" * 1000))) == 200


# Averages and reports


def test_ema_against_a_hand_calculation_and_swapped_back():
    p = torch.nn.Parameter(torch.tensor([1.0]))
    ema = EMA([p], decay=0.9)
    for value in (2.0, 3.0):
        with torch.no_grad():
            p.fill_(value)
        ema.update()
    expected = 0.9 * (0.9 * 1.0 + 0.1 * 2.0) + 0.1 * 3.0
    with ema.swapped():
        assert p.item() == pytest.approx(expected)
    assert p.item() == 3.0
    with pytest.raises(RuntimeError), ema.swapped():
        raise RuntimeError("in the middle of an evaluation")
    assert p.item() == 3.0


def test_signs_of_reward_hacking_against_a_hand_calculation():
    held_out = {"evaluator": 0.1, "distance": -0.5}
    rows = [
        {"iteration": 0, "reward": 0.0, "evaluator": 0.5, "distance": 2.0},
        {"iteration": 1, "reward": 1.0, "evaluator": 0.9, "distance": 2.4},
        {"iteration": 2, "reward": 2.0, "evaluator": 0.7, "distance": 2.6},
    ]
    assert reward_hacking_signs(rows[:2], held_out) == {}
    signs = reward_hacking_signs(rows, held_out)
    assert set(signs) == {"evaluator", "distance"}
    assert "iteration 1 -> 2" in signs["evaluator"] and "0.9 -> 0.7" in signs["evaluator"]
    assert "iteration 0 -> 2" in signs["distance"]
    # An evaluator that falls together with the reward is a failure, but not hacking.
    assert reward_hacking_signs([rows[1], {**rows[2], "reward": 0.5}], held_out) == {}
