"""The tour: its committed outputs are those of its code, what it measures is right, and so is the animation."""

import base64
import io
import json
import re

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from tests.toy_runs import ROOT, run
from toy import animation, pictures

NOTEBOOK = ROOT / "toy" / "tour.ipynb"
CELLS = json.loads(NOTEBOOK.read_text())["cells"]
CODE = [cell for cell in CELLS if cell["cell_type"] == "code"]
NUMBER = r"-?\d+(?:\.\d+)?"


def text_of(cell):  # what it printed, and its value
    outputs = [output for output in cell["outputs"] if output.get("name") != "stderr"]
    values = ["".join(output.get("text") or output.get("data", {}).get("text/plain", "")) for output in outputs]
    return "".join(value for value in values if "Figure" not in value)  # one print may come in several outputs


def images_of(cell):
    data = [output.get("data", {}).get("image/png") for output in cell["outputs"]]
    return [Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB") for png in data if png]


def code_of_parts(letters):
    """The code cells of these parts."""
    part, found = "", []
    for cell in CELLS:
        if heading := re.search(r"^## \((\w)\)", "".join(cell["source"]), re.MULTILINE):
            part = heading[1]
        if cell["cell_type"] == "code" and part and part in letters:
            found.append(cell)
    return found


def test_the_notebook_is_committed_whole_as_a_run_from_top_to_bottom():
    assert NOTEBOOK.stat().st_size <= 2 * 2**20
    assert [cell["execution_count"] for cell in CODE] == list(range(1, len(CODE) + 1))
    kinds = {output.get("name", output["output_type"]) for cell in CODE for output in cell["outputs"]}
    assert kinds == {"stdout", "display_data", "execute_result"}
    assert sum(len(images_of(cell)) for cell in CODE) >= 10
    text = "".join("".join(cell["source"]) for cell in CELLS if cell["cell_type"] == "markdown")
    assert re.findall(r"## \((\w)\)", text) == list("abcdefghijk")
    links = [target for target in re.findall(r"\]\(([^)#]+)", text) if not target.startswith("http")]
    assert len(links) > 10 and all((NOTEBOOK.parent / target).exists() for target in links)


def runs_after_all_others():
    """Codes, each with the committed cell whose outputs it must give, None where it may give others."""
    again = code_of_parts("bcdefg")[::-1]  # backwards, because a cell might repair what the next one uses
    pair, check = code_of_parts("b")[0], code_of_parts("d")[1]
    codes = ["".join(cell["source"]) for cell in (*again, pair, check)]
    assert len(again) > 10 and "i_k, i_j = 22, 8" in codes[-2] and "assert error < 1e-12" in codes[-1]
    codes[-2] = codes[-2].replace("i_k, i_j = 22, 8", "i_k, i_j = 20, 6")
    return list(zip(codes, (*again, None, check), strict=True))


@pytest.mark.slow
def test_running_the_notebook_gives_the_committed_outputs():
    """Its asserts hold, and it prints and draws nearly the same, also cells that run after all others.

    The check of (d) does so even where the timesteps of (b) have been changed.
    """
    pytest.importorskip("ipykernel")
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    again = runs_after_all_others()
    notebook.cells += [nbformat.v4.new_code_cell(code) for code, _ in again]
    resources = {"metadata": {"path": str(NOTEBOOK.parent)}}
    nbclient.NotebookClient(notebook, timeout=600, resources=resources).execute()
    found = [cell for cell in notebook.cells if cell["cell_type"] == "code"]
    for committed, fresh in zip(CODE + [cell for _, cell in again], found, strict=True):
        if committed:
            check_same_outputs(committed, fresh)


def check_same_outputs(committed, fresh):
    """Training on digits at a large learning rate amplifies rounding; elsewhere a dot may move by a pixel."""
    has_digits = "digits" in committed["metadata"].get("tags", [])
    expected, text = text_of(committed), text_of(fresh)
    assert re.sub(rf" *{NUMBER}", " N", text) == re.sub(rf" *{NUMBER}", " N", expected)  # -0.00 is 0.00
    numbers, expected_numbers = (list(map(float, re.findall(NUMBER, t))) for t in (text, expected))
    assert numbers == pytest.approx(expected_numbers, rel=0.2 if has_digits else 0.05, abs=0.02)
    for image, expected_image in zip(images_of(fresh), images_of(committed), strict=True):
        changed = np.abs(np.subtract(image, expected_image, dtype=float)).max(2) > 0.1 * 255
        assert has_digits or changed.sum() <= 16
    if has_digits and text:
        check_what_the_text_says_of_reward_hacking(text)


def check_what_the_text_says_of_reward_hacking(printed):
    rows = {line[:12].strip(): list(map(float, re.findall(NUMBER, line))) for line in printed.splitlines()}
    (free, hinge, leash), (_, real_diversity) = (rows[n] for n in ("no restraint", "hinge", "leash")), rows["real data"]
    for reward, utility, diversity, _ in (hinge, leash):
        assert reward < free[0] and utility > free[1] + 1 and 2 * diversity < real_diversity
    assert free[1] < free[3] - 1 and 2 * free[2] < real_diversity  # utility falls again, diversity all the time
    assert leash[1] > hinge[1] + 1


def test_the_text_on_reward_hacking_is_what_was_measured():
    check_what_the_text_says_of_reward_hacking(text_of(CODE[-2]))


def test_the_committed_animation_is_small_and_stops_four_times():
    path = ROOT / "toy" / "results" / "tour.gif"
    gif = Image.open(path)
    assert path.stat().st_size <= 1.5 * 10**6 and gif.n_frames == 26 and gif.size == (800, 480)
    durations = [(gif.seek(n), gif.info["duration"])[1] for n in range(26)]
    # Of T = 25 steps it stops at the image, with which it opens, the noise, i_k = 20 and i_j = 10.
    assert [n for n, duration in enumerate(durations) if duration == 2000] == [0, 1, 6, 16]


def test_the_animation_of_a_run(tmp_path, monkeypatch):
    """Leaps appear at i_k and i_j, connectors only where the real state is reached; captions and samples fit."""
    run(tmp_path / "run", "--iterations", "60", "--lr", "1e-3", "--batch-size", "64", "--evaluation-T", "5")
    drawn, captions, right = [], [], []
    points, suptitle = pictures.points, Figure.suptitle
    monkeypatch.setattr(pictures, "leaps", lambda axis, pairs, color: drawn.extend(pairs))
    monkeypatch.setattr(pictures, "points", lambda *a, **k: right.append((a[1], a[2].mean())) or points(*a, **k))
    monkeypatch.setattr(Figure, "suptitle", lambda *a, **k: captions.append(a[1]) or suptitle(*a, **k))
    monkeypatch.setattr("sys.argv", ["animation", str(tmp_path / "run"), str(tmp_path / "a.gif")])
    animation.main()
    # i_k = 4, i_j = 2.  A panel draws: at 0 both leaps closed; at 4 and 3 one, open; at 2 and 1 it is closed, one open.
    is_open = [bool((predicted == real).all()) for _, predicted, real in drawn]
    assert is_open == [False] * 4 + [True] * 4 + [False, True] * 4
    noise, at_k, at_j, image = animation.CAPTIONS
    between = "sampling without gradient: timestep {} of 5".format
    assert captions == [image, noise, at_k, between(3), at_j, between(1)]
    assert Image.open(tmp_path / "a.gif").n_frames == 6
    # Left before training, right after, in each of the six frames; the noise is the same, the images are not.
    assert all(1.5 * before[1] < after[1] for before, after in zip(right[::2], right[1::2], strict=True))
    assert np.array_equal(right[2][0], right[3][0]) and not np.array_equal(right[0][0], right[1][0])


NO_RUN = "must be the folder of a finished run of task toy"
NOT_RIGHT = "no drawn sample is wrong before training and right after: give a run with more iterations"
CASES = [((4, 2), 0, NO_RUN), ((4, 2), 1, NO_RUN), ((4, 1, 8, 8), 2, NO_RUN), ((4, 2), 2, NOT_RIGHT)]


@pytest.mark.parametrize("shape, count, message", CASES)
def test_a_run_that_cannot_be_shown_is_refused(shape, count, message, tmp_path, monkeypatch):
    (tmp_path / "samples").mkdir()
    x = np.full(shape, 9.0)
    some = {"samples": x, "states": x[None], "x_hat_j": x, "x_hat_0": x, "pair": (2, 1), "prompt": np.zeros(4, int)}
    for iteration in range(count):
        np.savez(tmp_path / "samples" / f"{iteration:06d}.npz", **some)
    for arguments, words in (([], "toy.animation runs/toy-leap_align tour.gif"), ([str(tmp_path), "a.gif"], message)):
        monkeypatch.setattr("sys.argv", ["animation", *arguments])
        with pytest.raises(SystemExit, match=words):
            animation.main()
