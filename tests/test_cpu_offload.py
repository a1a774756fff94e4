"""Weights, gradients and optimizer in host memory (--cpu-offload): the same training, and what the plan says of it."""

from contextlib import nullcontext
from unittest.mock import Mock

import pytest

from tests import tiny_pipelines as tiny  # first: skips without the libraries

# isort: split

from full_scale import plan, transformer
from leap_align import BadInput
from runtime.cost_counter import total
from runtime.files import read_csv
from tests.test_plan import flags_of
from tests.tiny_pipelines import TASKS, flags, options_of, slow, task_of, train
from tests.toy_runs import in_group, train_rank

pytestmark = pytest.mark.usefixtures("one_process")
SIZES = "--gradient-accumulation-steps 2 --ema-decay 0.5 --evaluate-every 1 --iterations 2".split()


@pytest.mark.parametrize(
    ("name", "more", "processes", "nodes"),
    [
        ("flux", "", 1, 1),
        slow("sd3", "--lora-rank 2 --reshard-after-forward", 1, 1),
        slow("flux", "", 2, 1),
        slow("sd3", "--beta 1 --precision bfloat16", 2, 2),
        slow("klein", "--lora-rank 2 --beta 1 --reshard-after-forward", 2, 1),
    ],
)
def test_offloaded_training_is_the_same_to_the_bit_and_resumes_either_way(
    models, tmp_path, name, more, processes, nodes
):
    def start(out, *changes):
        arguments = [*flags(models, name, *more.split(), *SIZES), *changes]
        if processes == 1:
            return train(tmp_path / out, arguments)
        in_group(train_rank, [*arguments, "--out", tmp_path / out], nodes)

    start("device"), start("host", "--cpu-offload", "--iterations", 1), start("host", "--cpu-offload", "--resume")
    tiny.assert_close(tiny.exported(tmp_path / "device"), tiny.exported(tmp_path / "host"), rtol=0, atol=0)
    one, two = (read_csv(tmp_path / out / "evaluations.csv") for out in ("device", "host"))
    assert one == two and len(one) == 3


@pytest.mark.slow
@pytest.mark.parametrize(
    ("gpus", "lora_rank", "reshard", "gathers"),
    [(1, 0, False, 1), (2, 4, True, 2 + 2 + 2)],  # of each weight: T = 4, the rollout, two leaps, again in the backward
)
def test_the_plan_moves_every_state_to_the_host_and_counts_the_way_there(models, gpus, lora_rank, reshard, gathers):
    changes = {"lora_rank": lora_rank, "reshard_after_forward": reshard, "precision": "bfloat16", "cpu_offload": True}
    costs = plan.simulate(flags_of(models, "flux", changes, gpus=gpus), "")
    sizes = [(p.numel(), p.requires_grad) for p in task_of(models, lora_rank=lora_rank).model.parameters()]
    trained, frozen = (sum(n for n, is_trained in sizes if is_trained == wanted) for wanted in (True, False))
    passed = gathers * (4 * trained + 2 * frozen) + 2 * 4 * trained  # and the gradients of two leaps
    assert total(sum(costs.pieces.values(), plan.Counter())).host == pytest.approx(passed / gpus, rel=0.02)
    for peak in costs.peaks.values():
        assert sum(peak.get(kind, 0) for kind in ("weights", "moments", "average")) < 0.01 * trained
    assert costs.peaks["optimizer"].get("gradients", 0) < 0.01 * trained
    # Weight and gradient are rounded up to a power of two.
    assert 5 * 4 * trained + 2 * frozen < costs.host["training"] < 7 * 4 * trained + 4 * frozen


@pytest.mark.parametrize("reshard", [False, True])
def test_the_memory_check_counts_states_in_host_memory_and_gathered_weights_on_the_gpu(models, monkeypatch, reshard):
    changes = {"precision": "bfloat16", "cpu_offload": True, "reshard_after_forward": reshard}
    task = TASKS["flux"](options_of(models, "flux", **changes), 4)
    weights = sum(p.numel() for p in task.model.parameters())
    host, gpu = 20 * weights / 2, 0 if reshard else 2 * weights
    for free in [(host, gpu), (host - 1, gpu), (host, gpu - 1)]:
        monkeypatch.setattr(transformer, "_free_memory", Mock(side_effect=free))
        monkeypatch.setattr("torch.cuda.is_available", lambda: True)
        remedy = "leave out --cpu-offload" if free[0] < host else "need"
        with nullcontext() if free == (host, gpu) else pytest.raises(BadInput, match=f"and optimizer .*{remedy}"):
            task.check_memory(shards=2)
