"""Runs of several processes: what ends them, and that every line about it names its cause."""

import signal
import subprocess
import time
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
import torch.distributed as dist

from runtime import processes
from tests.toy_runs import ROOT, SMALL, TORCHRUN, checkpoints

LONG = ["--iterations", "100000"]


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGKILL, signal.SIGTERM])
def test_a_signal_to_torchrun_saves_also_if_it_dies_of_it(tmp_path, number):
    """The same launcher twice would be two starts: SIGUSR1, which torchrun does not know, kills it like SIGKILL."""
    out, errors = tmp_path / "run", tmp_path / "errors.txt"
    with errors.open("w") as file:
        launched = subprocess.Popen([*TORCHRUN, *SMALL, *LONG, "--out", str(out)], cwd=ROOT, stdout=file, stderr=file)
    while not (out / "metrics.csv").exists() or len((out / "metrics.csv").read_text().splitlines()) < 3:
        time.sleep(0.01)
    workers = Path(f"/proc/{launched.pid}/task/{launched.pid}/children").read_text().split()
    assert len(workers) == 2
    launched.send_signal(number)
    launched.wait()
    while any(Path(f"/proc/{worker}").exists() for worker in workers):
        time.sleep(0.01)
    name = "SIGTERM" if number == signal.SIGTERM else "SIGHUP"
    assert f"stopped by {name}, progress is saved: continue with --resume" in errors.read_text()
    assert len(checkpoints(out)) == 1


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
        processes.exit_process(error, "go on", "free some")
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
    """In place of torch's store; rank 1 lives for two minutes, and so does the store."""

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
    with nullcontext() if mortal else pytest.raises(TimeoutError):
        processes.report_silence(store, 0, 1, "rank 1", "store")
    assert capsys.readouterr().err == (f"warning: {mortal} has not answered for 60 s\n" if mortal else "")
    assert not mortal or 180 <= clock.now <= 200
    assert int(store["leap_align/beat/0"]) >= 24
