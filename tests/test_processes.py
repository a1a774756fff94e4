"""Runs of several processes: what ends them, and that every line about it names its cause."""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
import torch.distributed as dist

import train_leap_align as trainer
from runtime import environment, processes, run_dir
from runtime.exit import exit_process
from tests.toy_runs import ROOT, SMALL, TORCHRUN, checkpoints, in_group
from toy.modes import Modes

pytestmark = pytest.mark.usefixtures("one_process")
HANDLED = ["--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"]
SENT = [  # torchrun's flags, the signal, whether its workers get it as well, the signal that ends them
    ([], signal.SIGUSR1, False, "SIGHUP"),  # torchrun does not know it, and dies
    ([], signal.SIGKILL, False, "SIGHUP"),
    (HANDLED, signal.SIGUSR1, False, "SIGUSR1"),
    ([], signal.SIGTERM, True, "SIGTERM"),  # torchrun passes it on, and a second one must not kill
]
SENT[1:] = [pytest.param(*case, marks=pytest.mark.slow) for case in SENT[1:]]


@pytest.mark.parametrize(("flags", "number", "to_all", "name"), SENT)
def test_a_signal_to_torchrun_saves_also_if_it_dies_of_it(tmp_path, flags, number, to_all, name):
    """Without their launcher the workers would train on, with the folder locked."""
    out, errors, deadline = tmp_path / "run", tmp_path / "errors.txt", time.monotonic() + 200
    command = [*TORCHRUN[:-1], *flags, TORCHRUN[-1], *SMALL, "--iterations", "100000", "--out", str(out)]
    with errors.open("w") as file:
        launched = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=file)
    while not (out / "metrics.csv").exists() or len((out / "metrics.csv").read_text().splitlines()) < 3:
        time.sleep(0.01)
        assert time.monotonic() < deadline, errors.read_text()
    workers = Path(f"/proc/{launched.pid}/task/{launched.pid}/children").read_text().split()
    for process in (*(map(int, workers) if to_all else ()), launched.pid):
        os.kill(process, number)
    launched.wait()
    while alive := [worker for worker in workers if Path(f"/proc/{worker}").exists()]:
        time.sleep(0.01)
        for worker in alive if time.monotonic() > deadline else ():
            with suppress(ProcessLookupError):
                os.kill(int(worker), signal.SIGKILL)
    assert f"stopped by {name}, progress is saved: continue with --resume" in errors.read_text()
    assert len(workers) == 2 and len(checkpoints(out)) == 1


def test_a_signal_that_torchrun_repeats_does_not_end_a_process_that_saves(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "a")
    with processes.stop_on_signals() as request:
        request.is_deferred = True
        os.kill(os.getpid(), signal.SIGTERM)
        assert request.signal == signal.SIGTERM and signal.getsignal(signal.SIGTERM) == signal.SIG_IGN


NCCL = "NCCL error in: /pytorch/torch/csrc/distributed/c10d/NCCLUtils.cpp:77, unhandled cuda error (run with "
NCCL += "NCCL_DEBUG=INFO for details), NCCL version 2.27.5\nncclUnhandledCudaError: Call to CUDA function failed.\n"
SHARED = "Error while creating shared memory segment /dev/shm/nccl-0UrBLL (size 33030528)"
PORT = "The server socket has failed to listen on any local network address. port: 29500, useIpv6: false, code: -98, "
PORT += "name: EADDRINUSE, message: address already in use"
STACK = "\nException raised from run at /pytorch/TCPStoreLibUvBackend.cpp:48 (most recent call first):\nframe #0: c10"
GLOO = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] "
CUBLAS = "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"
CUDNN = "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"
BEFORE_GROUP = {  # an error before the process group is there -> how its line starts
    RuntimeError(CUBLAS): f"out of memory ({CUBLAS}): free some",
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"): "out of memory (cuDNN error: CUDNN_STATUS_ALLOC_FAILED)",
    RuntimeError(CUDNN): f"out of memory ({CUDNN}): free some",
    RuntimeError("CUDA error: out of memory\nCompile with `TORCH_USE_CUDA_DSA`"): "out of memory (CUDA error: out of",
    torch.OutOfMemoryError("CUDA out of memory."): "out of memory (CUDA out of memory.): free some",
    dist.DistNetworkError(PORT + STACK): f"port 29500 is in use ({PORT}): set another MASTER_PORT",
    dist.DistStoreError("Timed out, 1/2 clients joined."): "no contact at far, port 29500 (Timed out, 1/2 clients",
}
IN_GROUP = {
    dist.DistBackendError(f"{NCCL}Last error:\nCuda failure 2 'out of memory'"): "out of memory (Cuda failure 2 'out",
    dist.DistBackendError(f"{NCCL}Last error:\n{SHARED}"): f"/dev/shm is too small for NCCL ({SHARED}): docker",
    dist.DistBackendError(NCCL): "lost another process (NCCL error in: /pytorch/torch/csrc/distributed",
    RuntimeError(f"{GLOO}Connection closed by peer [::1]:297"): "lost another process (Connection closed by peer [::1]",
    RuntimeError(f"{GLOO}Timed out waiting 60000ms"): "waited too long for another process (Timed out waiting 60000ms)",
}
ENDS = [(*end, False) for end in BEFORE_GROUP.items()] + [(*end, True) for end in IN_GROUP.items()]


@pytest.mark.parametrize(("error", "start", "is_in_group"), ENDS)
def test_what_ends_a_process_is_one_line_with_cause_rank_and_host(error, start, is_in_group, monkeypatch, capsys):
    environment = {"MASTER_ADDR": "far", "MASTER_PORT": "29500", "RANK": "3"}
    for name in processes.GROUP:
        monkeypatch.setenv(name, environment.get(name, "8"))
    monkeypatch.setattr(processes.dist, "is_initialized", lambda: is_in_group)
    monkeypatch.setattr(processes.socket, "gethostname", lambda: "node-7")
    monkeypatch.setattr(processes.os, "_exit", Mock(side_effect=SystemExit))
    with pytest.raises(SystemExit):
        exit_process(error, "go on", "free some")
    line = capsys.readouterr().err
    assert line.startswith(f"error: {start}") and line.endswith(" (rank 3 on node-7)\n") and line.count("\n") == 1


class Clock:
    """In place of the module `time`: sleeps in no time, ten minutes at most."""

    now = 0.0

    def monotonic(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds
        if self.now > 600:
            raise TimeoutError


class Store(dict):
    """In place of torch's store, in which rank 1, or the store itself, lives for two minutes."""

    def __init__(self, clock, mortal):
        super().__init__()
        self.clock, self.mortal = clock, mortal

    def set(self, key, value):
        if self.mortal == "store" and self.clock.now > 120:
            raise dist.DistNetworkError("Connection reset by peer")
        self[key] = value

    def get(self, key):
        return "last" if self.mortal == "rank 1" and self.clock.now > 120 else str(self.clock.now)


@pytest.mark.parametrize("mortal", ["rank 1", "store", None])
def test_a_rank_that_falls_silent_is_named(mortal, monkeypatch, capsys):
    clock = Clock()
    store = Store(clock, mortal)
    monkeypatch.setattr(processes, "time", clock)
    with pytest.raises(TimeoutError):
        processes.report_silence(store, 0, 1, "rank 1", "store")
    said = capsys.readouterr().err
    assert said == (f"warning: {mortal} has not answered for 60 s\n" if mortal else "")  # once
    assert int(store["leap_align/beat/0"]) >= (24 if mortal == "store" else 120)  # and its own beat goes on


# What rank 1 has otherwise, as flags or in its environment, and what the line says.
OTHER_FLAGS = """
--lr 0.1 ~ lr is 0.1, there 0.0001 ; --seed 1 ~ seed is 1, there 0 ; --alpha 0.7 ~ alpha is 0.7, there 0.3
--lam 0.2 ~ lam is 0.2, there 0.0 ; --lam None ~ lam is None, there 0.0 ; --batch-size 8 ~ batch_size is 8, there 16
--T 12 ~ T is 12, there 21 ; --solver ab2 ~ solver is ab2, there euler ; --max-grad-norm 2 ~ max_grad_norm is 2.0
--checkpoint-every 3 ~ checkpoint_every is 3, there 100 ; --iterations 9 ~ iterations is 9, there 4
--method refl ~ method is refl, there leap_align ; --method ppo ~ method is ppo, there leap_align
--task digits ~ task is digits, there toy ; --beta 1 ~ beta is 1.0, there 0.0 ; --resume ~ resume is True, there False
--gradient-accumulation-steps 2 ~ gradient_accumulation_steps is 2, there 1 ; --shift 2 ~ shift is 2.0, there 1.0
--tau 1 ~ tau is 1.0, there 0.1 ; --ema-decay 0.5 ~ ema_decay is 0.5, there 0.995
--evaluate-every 7 ~ evaluate_every is 7
--pretrain-seed 3 ~ pretrain_seed is 3, there 0 ; LOCAL_WORLD_SIZE=1 ~ processes a node is 1, there 2
torch ~ torch is 0.0.1, there 2 ; diffusers ~ diffusers is 0.0.1, there ; toy.modes ~ code of toy.modes is
leap_align ~ code of leap_align is ; runtime.ema ~ code of runtime.ema is
"""
OTHERS = [case.split(" ~ ") for case in OTHER_FLAGS.strip().replace(" ; ", "\n").splitlines()]


def make_other(patch, other):
    """Gives this process what OTHERS calls so, and returns its flags."""
    version, digest = environment.version, environment.digest
    if other.startswith("--"):
        return [*SMALL, *other.split()]
    if "=" in other:
        patch.setenv(*other.split("="))
    elif other in ("torch", "diffusers"):
        patch.setattr(environment, "version", lambda name: "0.0.1" if name == other else version(name))
    else:
        file = Path(sys.modules[other].__file__)
        patch.setattr(environment, "digest", lambda path: "other" if path == file else digest(path))
    return SMALL


def refusal(rank, patch, flags):
    """The error of a start as this rank, each rank on a node of its own."""
    patch.setattr(processes.socket, "gethostname", lambda: f"node-{rank}")
    with pytest.raises((processes.RaisedOnAllRanks, AssertionError)) as error:
        trainer.run(trainer.parse(flags), processes.StopRequest())
    return str(error.value)


def refusals(rank):
    """What a start with each of OTHERS is refused with."""
    lines = []
    for other, _ in OTHERS:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("LOCAL_WORLD_SIZE", "2")
            patch.setattr(run_dir, "locked_folder", Mock(side_effect=AssertionError("it began")))
            lines.append(refusal(rank, patch, make_other(patch, other) if rank else SMALL))
    return lines


def test_ranks_with_other_settings_code_or_packages_are_refused_before_anything_is_built():
    for (other, words), *lines in zip(OTHERS, *in_group(refusals), strict=True):
        assert lines[0] == lines[1], other
        assert lines[0].startswith("rank 1 on node-1 differs from rank 0: ") and words in lines[0], (other, lines)
        assert lines[0].endswith(": start every process with the same flags, files, code and packages")


def refused_tool(rank, folder):
    with pytest.raises(processes.RaisedOnAllRanks) as error:
        with run_dir.claimed_output_folder(folder, "sample", {"steps": 4 + rank, "lora": None}):
            pass
    return str(error.value)


def test_ranks_of_a_tool_with_other_settings_are_refused(tmp_path):
    lines = in_group(refused_tool, tmp_path / "images")
    assert lines[0] == lines[1] and "differs from rank 0: steps is 5, there 4: start every process" in lines[0]
    assert not (tmp_path / "images").exists()


def timeouts(rank):
    """Of the groups of a mesh of two nodes with a process each."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOCAL_WORLD_SIZE", "1")
        groups = processes.device_mesh("cpu", minutes=0.5).get_all_groups()
    return [group._get_backend(torch.device("cpu")).options._timeout.total_seconds() for group in groups]


def test_all_groups_of_a_mesh_have_the_timeout():
    assert in_group(timeouts) == [[30, 30]] * 2


CONTENTS = ["model", "text_encoders", "prompts", "reward_weights", "held_out_weights", "code"]


def refused_contents(rank, folder):
    """What a start is refused with if each of CONTENTS is another one on rank 1; the last has no node of its own."""
    lines, digest = [], environment.digest
    for name in [*CONTENTS, "none"]:
        with pytest.MonkeyPatch.context() as patch:
            for variable in processes.GROUP:
                patch.setenv(variable, "1" if variable == "LOCAL_RANK" and name == "none" else "0")
            patch.setenv("LOCAL_WORLD_SIZE", "2")
            contents = dict.fromkeys(CONTENTS[:-1], "content a") | ({name: "content b"} if rank else {})
            patch.setattr(Modes, "contents", lambda self, contents=contents: contents)
            patch.setattr(trainer, "train", Mock(side_effect=AssertionError("it began")))
            if rank and name == "code":  # imported only while the task is built
                patch.setattr(environment, "digest", lambda path: "b" if path.name == "my_late.py" else digest(path))
            build = trainer.build_task
            patch.setattr(trainer, "build_task", lambda flags, build=build: (import_module("my_late"), build(flags))[1])
            lines.append(refusal(rank, patch, [*SMALL, "--out", f"{folder}/{name}"]))
    return lines


def test_nodes_with_other_files_are_refused_before_training(tmp_path, monkeypatch):
    (tmp_path / "my_late.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    first, second = in_group(refused_contents, tmp_path)
    assert first == second and first[-1] == "it began"
    for name, line in zip(CONTENTS, first):
        what = "code of my_late is b, there " if name == "code" else f"{name} is content b, there content a: start"
        assert line.startswith(f"rank 1 on node-1 differs from rank 0: {what}")
