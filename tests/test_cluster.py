"""The files of full_scale/cluster, started as a cluster would start them, on this machine."""

import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

import train_leap_align as trainer
from runtime.command_line import check, choose
from runtime.files import read_csv
from tests.toy_runs import ROOT, checkpoints, metrics

CLUSTER = ROOT / "full_scale" / "cluster"
PAGE, SLURM, TORCHRUN = ((CLUSTER / name).read_text() for name in ("README.md", "slurm.sh", "torchrun.sh"))
JOB = "1234567"
COMMANDS = re.findall(r"```bash\n(.*?)```", PAGE.replace("\\\n", ""), re.S)[0].splitlines()

# In place of Slurm's programs.  srun passes SIGUSR1 on to its tasks and returns their highest status, as Slurm's does.
SRUN = f"""#!{sys.executable}
import os, signal, subprocess, sys
first = next(i for i, word in enumerate(sys.argv) if i and not word.startswith("-"))
n, on_node = (int(os.environ[name]) for name in ("SLURM_NTASKS", "SLURM_NTASKS_PER_NODE"))
names = lambda i: {{"SLURM_STEP_NUM_TASKS": str(n), "SLURM_PROCID": str(i), "SLURM_LOCALID": str(i % on_node)}}
tasks = [subprocess.Popen(sys.argv[first:], env=os.environ | names(i)) for i in range(n)]
signal.signal(signal.SIGUSR1, lambda *_: [task.send_signal(signal.SIGUSR1) for task in tasks])
sys.exit(max(code if code >= 0 else 128 - code for code in [task.wait() for task in tasks]))
"""
SCONTROL = """#!/usr/bin/env bash
[ "$1" = show ] && echo 127.0.0.1 || echo "$@" >> "$REQUEUED"
"""


def job():
    return pytest.importorskip("yaml").safe_load((CLUSTER / "pytorchjob.yaml").read_text())["spec"]


def pod(replica="Master"):
    """The pod of a kind of replica, and its container."""
    spec = job()["pytorchReplicaSpecs"][replica]["template"]["spec"]
    return spec, spec["containers"][0]


def flags_of(name):
    """The trainer's flags in a file or in its command on the page."""
    if name == "pytorchjob.yaml":
        return pod()[1]["args"]
    (command,) = (line for line in COMMANDS if name in line)
    return shlex.split(command.split(name)[1], comments=True)


FILES = ["slurm.sh", "pytorchjob.yaml", "torchrun.sh"]


@pytest.mark.parametrize("name", FILES)
def test_the_commands_parse_and_suit_the_file_s_processes(name):
    pytest.importorskip("diffusers")
    flags = trainer.parse(flags_of(name))
    check(flags.run, flags.method, choose("method", flags.run.method, trainer.METHODS), world_size=16)
    assert flags.run.batch_size == 16 * flags.run.gradient_accumulation_steps  # a sample in a microbatch
    if name.endswith("sh"):
        subprocess.run(["bash", "-n", CLUSTER / name], check=True)


def test_each_launcher_waits_as_long_as_the_cluster_and_the_page_says_how_long():
    (warning,) = re.findall(r"^#SBATCH --signal=USR1@(\d+)$", SLURM, re.M)
    (torchrun,) = re.findall(r"--shutdown-timeout=(\d+)", TORCHRUN)
    (in_pod,) = (word.split("=")[1] for word in pod()[1]["command"] if word.startswith("--shutdown-timeout"))
    grace = pod()[0]["terminationGracePeriodSeconds"]
    assert warning == torchrun == in_pod == "600" and 600 < grace and pod() == pod("Worker")
    for setting in (f"`--signal=USR1@{warning}`", f"`--shutdown-timeout={torchrun}`", f"`{grace}`"):
        assert setting in PAGE


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def slurm(nodes, processes, folder, flags):
    """The batch script, as Slurm starts it on the first node."""
    for name, text in {"srun": SRUN, "scontrol": SCONTROL}.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    environment = {"SLURM_JOB_ID": JOB, "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_CPUS_PER_TASK": "1"}
    environment |= {"SLURM_NTASKS": str(nodes * processes), "SLURM_NTASKS_PER_NODE": str(processes)}
    return [(["bash", CLUSTER / "slurm.sh", *flags], environment)]


def pytorchjob(nodes, processes, folder, flags):
    """A pod's command on each node, with the operator's variables."""
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "PYTHONUNBUFFERED": "1"}
    address |= {f"PET_{name}": address[name] for name in ("MASTER_ADDR", "MASTER_PORT")}
    address |= {"WORLD_SIZE": str(nodes * processes), "PET_NNODES": str(nodes), "PET_NPROC_PER_NODE": str(processes)}
    words = [*pod()[1]["command"], *pod()[1]["args"], *flags]
    return [(words, address | {"RANK": str(node), "PET_NODE_RANK": str(node)}) for node in range(nodes)]


def torchrun(nodes, processes, folder, flags):
    """The command of each node."""
    group = {"HOST": "127.0.0.1", "PORT": str(free_port()), "NODES": str(nodes), "GPUS": str(processes)}
    return [(["bash", CLUSTER / "torchrun.sh", *flags], group | {"NODE": str(node)}) for node in range(nodes)]


def start(launcher, nodes, processes, folder, flags):
    """Starts the launchers of all nodes, with output to folder/log."""
    path = os.pathsep.join([str(folder), str(Path(sys.executable).parent), os.environ["PATH"]])
    common = os.environ | {"PATH": path, "OMP_NUM_THREADS": "1", "REQUEUED": str(folder / "requeued")}
    with (folder / "log").open("a") as log:
        options = {"cwd": ROOT, "stdout": log, "stderr": log}
        commands = launcher(nodes, processes, folder, [*flags, "--out", str(folder / "run")])
        return [subprocess.Popen(words, env=common | own, **options) for words, own in commands]


def wait_for_rows(started, folder, number):
    """Until the run in folder/run has made so many iterations."""
    path, deadline = folder / "run" / "metrics.csv", time.monotonic() + 600
    while not path.exists() or len(path.read_text().splitlines()) <= number:
        time.sleep(0.05)
        assert time.monotonic() < deadline and started[0].poll() is None, (folder / "log").read_text()[-3000:]


def finish(started):
    """The exit statuses."""
    try:
        return [process.wait(timeout=600) for process in started]
    finally:
        for process in started:
            process.kill()


def children(pid):
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def assert_close(one, two):
    """Two folders of weights: where a gradient is only rounding, Adam's steps differ (tests/tiny_pipelines.py)."""
    names = sorted(str(path.relative_to(one)) for path in one.rglob("*.safetensors"))
    assert names and names == sorted(str(path.relative_to(two)) for path in two.rglob("*.safetensors"))
    for name in names:
        a, b = load_file(one / name), load_file(two / name)
        far = sum((a[key] - b[key]).abs().gt(1e-5).sum().item() for key in a)
        assert a.keys() == b.keys() and far < 0.001 * sum(tensor.numel() for tensor in a.values()), name


def numbers(path):
    """The rows of a CSV file, without the seconds."""
    return [{k: float(v) for k, v in row.items() if v and k != "seconds"} for row in read_csv(path)]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Flags of the small FLUX, and the folder of its undisturbed run on one process."""
    pytest.importorskip("diffusers")
    from full_scale.shapes.build import recommended_run

    flags = recommended_run(ROOT / "full_scale" / "shapes" / "trained").split()[2:]
    flags += "--batch-size 4 --gradient-accumulation-steps 1 --iterations 6 --export-every 2 --evaluate-every 3".split()
    flags += "--evaluation-images 6 --evaluation-T 8".split()
    out = tmp_path_factory.mktemp("small") / "run"
    trainer.main([*flags, "--out", str(out)])
    return flags, out


WARNED = [  # launcher; nodes and processes of a node, first and then; the signal
    (slurm, (2, 2), (1, 1), signal.SIGUSR1),
    (slurm, (1, 1), (2, 1), signal.SIGUSR1),
    (pytorchjob, (2, 1), (2, 1), signal.SIGTERM),
    (torchrun, (2, 1), (1, 2), signal.SIGUSR1),
]


@pytest.mark.slow
@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize(("launcher", "first", "then", "number"), WARNED)
def test_a_run_that_is_warned_and_started_again_ends_as_an_undisturbed_one(
    small, tmp_path, launcher, first, then, number
):
    """On other nodes and processes: the rows of metrics.csv and evaluations.csv, every export along the way and the
    weights at the end, up to rounding."""
    (flags, undisturbed), out = small, tmp_path / "run"
    started = start(launcher, *first, tmp_path, flags)
    wait_for_rows(started, tmp_path, 3)
    os.kill(children(started[0].pid)[-1] if launcher is slurm else started[-1].pid, number)  # Slurm warns srun's tasks
    statuses, told = finish(started), (tmp_path / "log").read_text()
    assert f"stopped by {signal.Signals(number).name}, progress is saved: continue with --resume" in told
    assert all(statuses) and 3 <= int(checkpoints(out)[-1]) < 6 and not (out / "result.json").exists()
    if launcher is slurm:
        assert statuses == [138] and (tmp_path / "requeued").read_text() == f"requeue {JOB}\n"
    assert set(finish(start(launcher, *then, tmp_path, flags))) == {0}
    assert sorted(path.name for path in (out / "exports").iterdir()) == ["000002", "000004", "000006"]
    for name in ("metrics.csv", "evaluations.csv"):
        for expected, found in zip(numbers(undisturbed / name), numbers(out / name), strict=True):
            assert found == pytest.approx(expected, rel=1e-3, abs=1e-5)  # training amplifies rounding
    for name in ("exports", "transformer"):
        assert_close(undisturbed / name, out / name)


@pytest.mark.slow
@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("launcher", [slurm, pytorchjob, torchrun])
def test_a_lost_process_ends_the_others_and_the_same_command_continues(small, tmp_path, launcher):
    """Slurm's script asks for no other start: that is for a warning alone."""
    flags = [*small[0], "--checkpoint-every", "1"]
    started = start(launcher, 2, 1, tmp_path, flags)
    wait_for_rows(started, tmp_path, 2)
    launcher_of_last = children(started[0].pid)[-1] if launcher is slurm else started[-1].pid
    os.kill(children(launcher_of_last)[-1], signal.SIGKILL)
    assert all(finish(started)) and not (tmp_path / "requeued").exists()
    assert "lost another process" in (tmp_path / "log").read_text()
    assert set(finish(start(launcher, 2, 1, tmp_path, flags))) == {0} and len(metrics(tmp_path / "run")) == 6
