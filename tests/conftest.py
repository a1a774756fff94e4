"""What every test may use."""

import os
import signal

import pytest
import torch
import torch.distributed as dist

from tests.oracles import RUNS
from tests.problems import METHODS, SHIFTS


def pytest_configure(config):
    """Slow tests run only when they are asked for: -m slow, or any other -m."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # both are ignored where pytest runs in the background,
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # and a run leaves ignored signals alone
    config.addinivalue_line("markers", "slow: takes minutes; left out unless -m is given")
    if not config.option.markexpr:
        config.option.markexpr = "not slow"
    torch.ones((), requires_grad=True).backward()  # if FSDP2's is the first, no forked process can run a backward
    if hasattr(config, "workerinput"):  # several processes, each with threads for all cores, would wait for one another
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        torch.set_num_threads(1)


def cases(*values):
    """An argument of tests that run once for each of these values."""
    return pytest.fixture(params=values, ids=str)(lambda request: request.param)


name, solver, form = cases(*METHODS), cases(*RUNS), cases("one pass", "two passes")
shift, alpha, shape, seed = cases(*SHIFTS), cases(0, 0.3, 1), cases((3,), (2, 2, 2)), cases(*range(4))


@pytest.fixture
def float64():
    """Double precision by default, so that an error of 1e-12 means a wrong equation and not rounding."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """A folder with a tiny random pipeline of each task, and prompts.txt; only for tests that need diffusers."""
    from tests.tiny_pipelines import write_models

    return write_models(tmp_path_factory.mktemp("tiny"))


def leave_group():
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.fixture
def one_process():
    """One thread, and no process group before this test or after it."""
    torch.set_num_threads(1)
    leave_group()
    yield
    leave_group()


@pytest.fixture(scope="session")
def reference(tmp_path_factory):
    """The folder of a short, undisturbed toy run, with figures; tests only read it."""
    from tests.toy_runs import run

    out = tmp_path_factory.mktemp("run") / "reference"
    run(out)
    return out


@pytest.fixture
def no_figures(monkeypatch):
    """Runs draw no figures, apart from the reference run, which is made before."""
    from tests.toy_runs import without_figures

    without_figures(monkeypatch)
