"""The files of full_scale/cluster, started as a cluster would start them, on this machine."""

import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
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

# In place of Slurm's programs.  srun passes signals on to its tasks, returns their highest status, and ends the others
# after the first bad one or after --wait, as Slurm's does on a cluster whose administrator set KillOnBadExit.
SRUN = f"""#!{sys.executable}
import os, signal, subprocess, sys, time
first = next(i for i, word in enumerate(sys.argv) if i and not word.startswith("-"))
options = dict(word.split("=") for word in sys.argv[1:first] if "=" in word)
if "--overlap" in sys.argv:
    sys.exit("NODE_LOST" in os.environ)
n, on_node = (int(os.environ[name]) for name in ("SLURM_NTASKS", "SLURM_NTASKS_PER_NODE"))
names = lambda i: {{"SLURM_STEP_NUM_TASKS": str(n), "SLURM_PROCID": str(i), "SLURM_LOCALID": str(i % on_node)}}
tasks = [subprocess.Popen(sys.argv[first:], env=os.environ | names(i)) for i in range(n)]
for number in (signal.SIGUSR1, signal.SIGTERM):
    signal.signal(number, lambda number, _: [task.send_signal(number) for task in tasks])
deadline = float("inf")
while None in (codes := [task.poll() for task in tasks]):
    time.sleep(0.02)
    if deadline == float("inf") and codes.count(None) < n:
        deadline = time.monotonic() + float(options.get("--wait", "inf")) * float(os.environ.get("SECOND", 1))
    if any(codes) and options.get("--kill-on-bad-exit") != "0" or time.monotonic() > deadline:
        [task.kill() for task in tasks]
sys.exit(max(code if code >= 0 else 128 - code for code in codes))
"""
SCONTROL = """#!/usr/bin/env bash
case "$1 $2" in
    "show hostnames") echo 127.0.0.1 ;;
    "show job") echo "JobId=$3 JobState=${JOB_STATE:-RUNNING} PreemptTime=${PREEMPTED:-None}" ;;  # a part
    *) echo "$@" >> "$REQUEUED" ;;
esac
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


# What the stand-ins do not need, and a cluster does.
@pytest.mark.parametrize(
    ("setting", "reason"),
    [
        ("--requeue", "neither scontrol nor Slurm, after a lost node, requeues a job where JobRequeue=0"),
        ("--open-mode=append", "a second start empties the log of the first"),
    ],
)
def test_slurm_sh_can_be_started_again_on_every_cluster(setting, reason):
    assert f"#SBATCH {setting}" in SLURM.splitlines(), f"else {reason}"


@pytest.mark.parametrize("replica", ["Master", "Worker"])
def test_pods_are_started_again_and_have_shared_memory(replica):
    spec, container = pod(replica)
    assert job()["pytorchReplicaSpecs"][replica]["restartPolicy"] == "OnFailure"  # else a lost process ends the run
    (name,) = (mount["name"] for mount in container["volumeMounts"] if mount["mountPath"] == "/dev/shm")
    (volume,) = (volume for volume in spec["volumes"] if volume["name"] == name)
    assert volume["emptyDir"]["medium"] == "Memory"  # NCCL needs more than a container's 64 MB
    assert container["resources"]["requests"].keys() == {"cpu", "memory"}  # a pod without is evicted first
    # Half the restarts are a pod's.  The pauses between them double from 10 to 300 s: a wrong flag ends within an hour.
    most = job()["runPolicy"]["backoffLimit"]
    assert 10 <= most and sum(min(10 * 2**i, 300) for i in range(most // 2)) < 3600


@pytest.mark.parametrize("missing", ["NODE", "HOST"])
def test_torchrun_sh_names_the_variable_that_is_missing(missing):
    environment = {name: value for name, value in {"NODE": "0", "HOST": "a"}.items() if name != missing}
    done = subprocess.run(["bash", CLUSTER / "torchrun.sh"], env=environment, capture_output=True, text=True)
    assert done.returncode and f": {missing}: " in done.stderr


def test_slurm_sh_needs_the_folder():
    """It sees there whether a start has made progress."""
    script = ["bash", CLUSTER / "slurm.sh", "--task", "flux"]
    done = subprocess.run(script, env=os.environ | {"SLURM_JOB_ID": JOB}, capture_output=True, text=True)
    assert done.returncode and "add --out" in done.stderr


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def slurm(nodes, processes, folder, flags):
    """The batch script, as Slurm starts it on the first node."""
    for name, text in {"srun": SRUN, "scontrol": SCONTROL}.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    numbers = {"JOB_ID": JOB, "NNODES": nodes, "NTASKS": nodes * processes, "NTASKS_PER_NODE": processes}
    numbers |= {"JOB_NODELIST": "node[1-2]", "CPUS_PER_TASK": 1}
    environment = {f"SLURM_{name}": str(value) for name, value in numbers.items()}
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


@pytest.fixture
def start(tmp_path):
    """Starts the launchers of all nodes, with output to tmp_path/log; they and their children end with the test."""
    path = os.pathsep.join([str(tmp_path), str(Path(sys.executable).parent), os.environ["PATH"]])
    common = os.environ | {"PATH": path, "OMP_NUM_THREADS": "1", "REQUEUED": str(tmp_path / "requeued")}
    every = []

    def start_launchers(launcher, nodes, processes, flags, **environment):
        with (tmp_path / "log").open("a") as log:
            options = {"cwd": ROOT, "stdout": log, "stderr": log, "start_new_session": True}
            commands = launcher(nodes, processes, tmp_path, [*flags, "--out", str(tmp_path / "run")])
            started = [subprocess.Popen(words, env=common | own | environment, **options) for words, own in commands]
        every.extend(started)
        return started

    yield start_launchers
    for process in every:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def wait_for_rows(started, folder, number):
    """Until the run in folder/run has made so many iterations."""
    path, deadline = folder / "run" / "metrics.csv", time.monotonic() + 600
    while not path.exists() or len(path.read_text().splitlines()) <= number:
        time.sleep(0.05)
        assert time.monotonic() < deadline and started[0].poll() is None, (folder / "log").read_text()[-3000:]


def finish(started, seconds=600):
    """The exit statuses."""
    return [process.wait(timeout=seconds) for process in started]


# In place of `python train_leap_align.py`: what the tasks of slurm.sh do, in bash.
SAVE = 'mkdir -p "$FOLDER/checkpoint/2"; echo > "$FOLDER/checkpoint/2/state.json";'
BATCH = "$(awk '{print $4}' /proc/$PPID/stat)"  # the script, which started srun, the parent of this task
CANCELLED, PREEMPTED = {"JOB_STATE": "COMPLETING"}, {"PREEMPTED": "2026-11-29T11:22:06"}
ENDS = {  # what the tasks do; what Slurm says then; whether the job is requeued
    "warned": (f"{SAVE} exit 138", {}, True),
    "warned, and so is the script": (f"{SAVE} kill -USR1 {BATCH}; exit 138", {}, True),
    "warned before a checkpoint": ("exit 138", {}, False),
    "warned during the imports": ("kill -USR1 $$", {}, False),
    "warned, then cancelled": (f"{SAVE} exit 138", CANCELLED, False),
    "preempted": (f"{SAVE} exit 143", PREEMPTED, True),
    "preempted, and so is the script": (f"{SAVE} kill -TERM {BATCH}; exit 143", PREEMPTED, True),
    "preempted before a checkpoint": ("exit 143", PREEMPTED, True),
    "preempted by send_user_signal before a checkpoint": ("exit 138", PREEMPTED, True),
    "preempted during the imports": ("kill -TERM $$", PREEMPTED, True),
    "preempted, then cancelled": (f"{SAVE} exit 143", CANCELLED | PREEMPTED, False),
    "preempted, but finished": (f"{SAVE} exit 0", PREEMPTED, False),
    "scancel": (f"{SAVE} exit 143", CANCELLED, False),
    "scancel --signal=TERM": (f"{SAVE} exit 143", {}, False),
    "an error": ("exit 1", {}, False),
    "an error after a checkpoint": (f"{SAVE} exit 1", {}, False),
    "finished": (f"{SAVE} exit 0", {}, False),
}


def start_script(start, folder, tasks, **environment):
    """slurm.sh on two nodes, with a checkpoint of an earlier start in folder/run."""
    (folder / "run" / "checkpoint" / "1").mkdir(parents=True)
    (folder / "run" / "checkpoint" / "1" / "state.json").touch()
    (folder / "sleep").write_text('#!/usr/bin/env bash\necho "waits $1 s"')
    (folder / "python").write_text(f"#!/usr/bin/env bash\n{tasks}")
    for name in ("sleep", "python"):
        (folder / name).chmod(0o755)
    (status,) = finish(start(slurm, 2, 1, [], FOLDER=str(folder / "run"), **environment), seconds=60)
    return status, (folder / "requeued").exists(), (folder / "log").read_text()


@pytest.mark.parametrize("end", ENDS)
def test_slurm_starts_again_what_can_go_on_and_nothing_else(start, tmp_path, end):
    tasks, told_by_slurm, is_requeued = ENDS[end]
    status, requeued, log = start_script(start, tmp_path, tasks, **told_by_slurm)
    assert requeued == is_requeued and "waits" not in log
    assert (status == 0) == ("exit 0" in tasks)


def test_the_job_of_a_lost_node_runs_until_slurm_notices(start, tmp_path):
    """Slurm requeues only what runs when it declares the node down, SlurmdTimeout later."""
    status, requeued, log = start_script(start, tmp_path, "exit 1", NODE_LOST="1")
    assert (status, requeued) == (1, False) and "waits 900 s" in log


@pytest.mark.parametrize(
    ("other", "second", "is_told"),
    [("/bin/sleep 0.3", 1, True), ("exec tail -f /dev/null", 0.005, False)],
    ids=["that says why", "that hangs"],
)
def test_srun_gives_the_others_of_a_lost_process_a_minute(start, tmp_path, other, second, is_told):
    tasks = f"[ $RANK = 0 ] && exit 1; {other}; echo lost another process; exit 1"
    status, _, log = start_script(start, tmp_path, tasks, SECOND=str(second))
    assert ("lost another process" in log) == is_told and status == (1 if is_told else 128 + signal.SIGKILL)


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
    small, start, tmp_path, launcher, first, then, number
):
    """On other nodes and processes: the rows of metrics.csv and evaluations.csv, every export along the way and the
    weights at the end, up to rounding."""
    (flags, undisturbed), out = small, tmp_path / "run"
    started = start(launcher, *first, flags)
    wait_for_rows(started, tmp_path, 3)
    os.kill(children(started[0].pid)[-1] if launcher is slurm else started[-1].pid, number)  # Slurm warns srun's tasks
    statuses, told = finish(started), (tmp_path / "log").read_text()
    assert f"stopped by {signal.Signals(number).name}, progress is saved: continue with --resume" in told
    assert all(statuses) and 3 <= int(checkpoints(out)[-1]) < 6 and not (out / "result.json").exists()
    if launcher is slurm:
        assert statuses == [138] and (tmp_path / "requeued").read_text() == f"requeue {JOB}\n"
    assert set(finish(start(launcher, *then, flags))) == {0}
    assert sorted(path.name for path in (out / "exports").iterdir()) == ["000002", "000004", "000006"]
    for name in ("metrics.csv", "evaluations.csv"):
        for expected, found in zip(numbers(undisturbed / name), numbers(out / name), strict=True):
            assert found == pytest.approx(expected, rel=1e-3, abs=1e-5)  # training amplifies rounding
    for name in ("exports", "transformer"):
        assert_close(undisturbed / name, out / name)


@pytest.mark.slow
@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("launcher", [slurm, pytorchjob, torchrun])
def test_a_lost_process_ends_the_others_and_the_same_command_continues(small, start, tmp_path, launcher):
    """Slurm's script asks for no other start: that is for a warning alone."""
    flags = [*small[0], "--checkpoint-every", "1"]
    started = start(launcher, 2, 1, flags)
    wait_for_rows(started, tmp_path, 2)
    launcher_of_last = children(started[0].pid)[-1] if launcher is slurm else started[-1].pid
    os.kill(children(launcher_of_last)[-1], signal.SIGKILL)
    assert all(finish(started)) and not (tmp_path / "requeued").exists()
    assert "lost another process" in (tmp_path / "log").read_text()
    assert set(finish(start(launcher, 2, 1, flags))) == {0} and len(metrics(tmp_path / "run")) == 6
