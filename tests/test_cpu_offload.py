"""Weights, gradients and optimizer in host memory (--cpu-offload): the same training, and what the plan says of it."""

import pytest

from tests import tiny_pipelines as tiny  # first: skips without the libraries

# isort: split

from runtime.files import read_csv
from tests.tiny_pipelines import flags, slow, train

pytestmark = pytest.mark.usefixtures("one_process")
SIZES = "--gradient-accumulation-steps 2 --ema-decay 0.5 --evaluate-every 1 --iterations 2".split()


@pytest.mark.parametrize(
    ("name", "more", "processes", "nodes"),
    [
        ("flux", "", 1, 1),
        ("sd3", "--lora-rank 2 --reshard-after-forward", 1, 1),
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
        tiny.torchrun("train_leap_align.py", *arguments, "--out", tmp_path / out, nodes=nodes)

    start("device"), start("host", "--cpu-offload", "--iterations", 1), start("host", "--cpu-offload", "--resume")
    tiny.assert_close(tiny.exported(tmp_path / "device"), tiny.exported(tmp_path / "host"), rtol=0, atol=0)
    one, two = (read_csv(tmp_path / out / "evaluations.csv") for out in ("device", "host"))
    assert one == two and len(one) == 3
