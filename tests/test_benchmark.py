"""The benchmark's counts against counts by hand, and its files."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import train_leap_align as trainer
from leap_align import METHODS, BadInput, Hyper, uniform_times
from toy import benchmark, learn
from toy.benchmark import TWO_PASSES, bare_step, floor, flops, network_flops, saved_bytes, typical

B, IN, HIDDEN, T = 3, 4, 5, 6
FORWARD = 2 * B * IN * HIDDEN + 2 * B * HIDDEN * IN  # 240: a product and a sum for each entry of two matrices
BACKWARD = FORWARD + 2 * B * HIDDEN * IN  # 360: both weights' gradients, and that of the hidden layer
BACKWARD_X = FORWARD + FORWARD  # 480: that of the input as well
FLOOR = 6 * 240 + 360 + 480
COSTS = {"leap_align": FLOOR, "two passes": FLOOR + 2 * 240, "full_backprop": 6 * 240 + 360 + 5 * 480}


@pytest.fixture
def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(IN, HIDDEN, bias=False), nn.Linear(HIDDEN, IN, bias=False))


@pytest.fixture
def task(net):
    """The least that a task can be; its reward costs no matrix product."""
    return SimpleNamespace(
        times=uniform_times(T),
        velocity=lambda condition: lambda x, t: net(x),
        decode=lambda x: x,
        reward=lambda sample, condition: sample.sum(1),
    )


def test_the_constants_are_those_of_the_comments():
    assert (FORWARD, BACKWARD, BACKWARD_X, FLOOR) == (240, 360, 480, 2280)


def test_floor_of_a_known_network(task):
    assert floor(task.velocity(None), torch.randn(B, IN), task.times) == FLOOR


@pytest.mark.parametrize("name", COSTS)
def test_operations_of_a_method_by_hand(task, name):
    method = {**METHODS, "two passes": TWO_PASSES}[name]
    velocity, x = task.velocity(None), torch.randn(B, IN)
    assert network_flops(method, velocity, x, task.times, Hyper(), seed=0) == COSTS[name]


def test_typical_draws_cost_the_mean_of_all_draws(task):
    """Over i_min = 1..11 and s = 1..13: 26 - i_min forwards, and a backward at s if it is run, at s + 12 always."""
    velocity, x, times, hyper = task.velocity(None), torch.randn(B, IN), uniform_times(25), Hyper()
    every = [(i_min, s) for i_min in range(1, 12) for s in range(1, 14)]
    mean = {
        "refl": sum((26 - i_min) * FORWARD + BACKWARD for i_min, _ in every) / len(every),
        "drtune": sum((26 - i_min) * FORWARD + (1 + (s >= i_min)) * BACKWARD for i_min, s in every) / len(every),
    }
    for name, draws in (("refl", 1), ("drtune", 13)):
        seeds = typical(METHODS[name], times, hyper)
        counted = [network_flops(METHODS[name], velocity, x, times, hyper, seed) for seed in seeds]
        assert len(seeds) == draws and sum(counted) / draws == pytest.approx(mean[name], rel=1e-12)
    assert len(typical(METHODS["leap_align"], times, hyper)) == 1


def test_leap_align_is_at_the_floor_on_the_toys_network():
    shape = (8, 2)
    net = benchmark.learn.VelocityNet((2,), 8, width=16, depth=2)
    velocity, x = lambda x, t: net(x, t, torch.zeros(8, dtype=torch.long)), torch.randn(shape)
    times = uniform_times(25)
    counted = network_flops(METHODS["leap_align"], velocity, x, times, Hyper(), seed=3)
    assert counted <= 1.01 * floor(velocity, x, times)


def test_bare_step_is_at_the_floor_and_reaches_every_weight(task, net):
    assert flops(partial(bare_step, task, None, torch.randn(B, IN))) == FLOOR
    assert all(p.grad.abs().sum() > 0 for p in net.parameters())
    with_graph = []
    task.velocity = lambda condition: lambda x, t: with_graph.append(torch.is_grad_enabled()) or net(x)
    bare_step(task, None, torch.randn(B, IN))
    assert len(with_graph) == T and sum(with_graph) == 2


def test_fused_attention_counts_as_its_matrix_products():
    q = torch.randn(2, 3, 10, 8)
    assert flops(lambda: nn.functional.scaled_dot_product_attention(q, q, q)) == 2 * (2 * 2 * 3 * 10 * 10 * 8)


# Memory


def test_saved_bytes_by_hand(net):
    """Each layer keeps its input for its weight's gradient: B x 4 and B x 5 numbers of four bytes; weights are none."""
    x = torch.randn(B, IN)
    assert saved_bytes(lambda: net(x)) == 4 * (B * IN + B * HIDDEN)
    assert saved_bytes(lambda: net(x) + net(x)) == 4 * (B * IN + 2 * B * HIDDEN)  # x once


def test_saved_bytes_leaves_out_the_frozen_weights_of_the_model_alone(net):
    net[1].requires_grad_(False)  # it keeps its weight for the gradient of its input, and no input
    x = torch.randn(B, IN)
    assert saved_bytes(lambda: net(x), net) == 4 * B * IN
    assert saved_bytes(lambda: net(x)) == 4 * (B * IN + HIDDEN * IN)


def test_saved_bytes_misses_no_storage_that_was_freed_and_taken_again(net):
    def steps():
        for _ in range(50):
            net(torch.randn(B, IN)).sum().backward()

    assert saved_bytes(steps) == 50 * 4 * (B * IN + B * HIDDEN)


@pytest.mark.parametrize(("name", "evaluations"), [("leap_align", lambda T: 2), ("full_backprop", lambda T: T)])
def test_leap_align_saves_two_evaluations_and_full_backprop_all(net, name, evaluations):
    for T in (10, 20, 40):
        generator = torch.Generator().manual_seed(0)
        endpoints = METHODS[name](lambda x, t: net(x), torch.randn(B, IN), uniform_times(T), Hyper(), generator)
        # Beside inputs and hidden layers the lengths of the leaps are kept: a number each.
        least = 4 * evaluations(T) * (B * IN + B * HIDDEN)
        assert least <= saved_bytes(partial(next, endpoints), net) <= least + 4 * (evaluations(T) + 4)


# The files


def test_a_short_run_leaves_tables_and_a_figure(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(learn, "cached", lambda *_: None)  # random networks cost as much as trained ones
    monkeypatch.setattr(benchmark, "METHODS", {name: METHODS[name] for name in ("leap_align", "full_backprop")})
    parts = ("flops", "memory", "time", "gpu")
    benchmark.main(benchmark.Options(out=tmp_path, tasks=("toy",), parts=parts, seconds=0.1))
    names = {path.name for path in tmp_path.iterdir()}
    assert {"flops.csv", "memory.csv", "time.csv", "shares.csv", "benchmark.png"} <= names
    printed = capsys.readouterr().out
    assert "| toy | leap_align | 1.000 | 1.000 |" in printed
    assert torch.cuda.is_available() or "was not measured" in printed
    shares = next(line for line in (tmp_path / "shares.csv").read_text().splitlines() if line.startswith("toy"))
    assert sum(map(float, shares.split(",")[1:])) == pytest.approx(1)
    assert all(float(share) >= 0 for share in shares.split(",")[1:])


@pytest.mark.parametrize(
    "wrong", [{"tasks": ("toy", "mnist")}, {"parts": ("flop",)}, {"seconds": 0.0}, {"seconds": float("nan")}]
)
def test_wrong_flags_are_refused_in_one_line(wrong):
    with pytest.raises(BadInput, match=r"^[^\n]+$"):
        benchmark.check(benchmark.Options(**wrong))


def test_without_diffusers_flux_and_sd3_are_left_out(monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "find_spec", lambda name: None)
    assert benchmark.check(benchmark.Options()) == ["toy", "digits"]
    assert "flux, sd3: left out" in capsys.readouterr().out


# Time


def test_overhead_by_hand():
    """Ratios 1, 1.1, 1.2: the median is not the mean of the times, and slow neighbours do not count."""
    ratio, error, quartiles = benchmark.overhead([1.0, 22.0, 1.2], [1.0, 20.0, 1.0])
    assert ratio == pytest.approx(1.1) and quartiles == "1.000-1.200"
    assert error == pytest.approx(1.2533 * (0.2 / 1.349) / 3**0.5)  # of a median, spread from the quartiles


def test_the_bare_step_without_fsdp_does_the_same_work(tmp_path):
    for library in ("diffusers", "open_clip"):
        pytest.importorskip(library)
    benchmark.make_tiny(["flux"], tmp_path)
    run = benchmark.start("flux", tmp_path, "--T", "3", "--batch-size", "1")
    try:
        actions = benchmark.contenders(run)
        actions["bare"]()  # the reward encodes a prompt once a run
        run.optimizer.zero_grad()
        counted = flops(actions["unwrapped"])
        assert all(p.grad is None for p in run.parameters)
        assert counted == flops(actions["bare"]) > 0
        assert all(p.grad is not None for p in run.parameters)
    finally:
        torch.distributed.destroy_process_group()


# FLUX.1-dev's size


@pytest.fixture
def full_size():
    for library in ("diffusers", "peft", "open_clip"):
        pytest.importorskip(library)
    from toy import full_size

    return full_size


def test_the_full_size_step_runs_at_a_tiny_size(full_size, tmp_path, monkeypatch):
    small = {"num_layers": 2, "num_single_layers": 2, "attention_head_dim": 16, "num_attention_heads": 2}
    small |= {"joint_attention_dim": 32, "pooled_projection_dim": 32, "axes_dims_rope": (4, 4, 8)}
    monkeypatch.setattr(full_size.RandomFlux, "size", full_size.DEV | small)
    monkeypatch.setattr(full_size.trainer, "Config", partial(trainer.Config, T=2))
    benchmark.make_tiny(["flux"], tmp_path)
    rows, costs = [], []
    try:
        for checkpointing in full_size.ACTIVATIONS:
            costs.append(flops(lambda c=checkpointing: rows.append(full_size.case(tmp_path, c, False, 1, pixels=32))))
    finally:
        torch.distributed.destroy_process_group()
    assert all(row["s"] > 0 for row in rows)
    on, selective, off = costs  # two of four blocks are computed once more, of one kind each
    assert off < selective < on and selective - off == pytest.approx((on - off) / 2, rel=0.2)


def test_a_case_that_does_not_fit_says_so(full_size, tmp_path, monkeypatch):
    monkeypatch.setattr(full_size, "step_cost", lambda *_: (_ for _ in ()).throw(BadInput("needs 24 GiB")))
    assert full_size.case(tmp_path, "on", False, 1)["GiB"] == "needs 24 GiB"


class FusedAttention(torch.autograd.Function):
    """What attention on a GPU keeps: its inputs, its output and a number a row."""

    @staticmethod
    def forward(ctx, query, key, value):
        out = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, out, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return out


def test_the_predictions_of_the_full_size_are_counted(full_size, monkeypatch):
    """Operations, and bytes kept, of FLUX.1-dev's own architecture with LoRA at 720 px, on the meta device."""
    from diffusers import FluxTransformer2DModel
    from peft import LoraConfig

    with torch.device("meta"):
        model = FluxTransformer2DModel(**full_size.DEV).requires_grad_(False)
        model.add_adapter(LoraConfig(r=64, target_modules=[*full_size.Flux.Options.lora_targets]))
        model.to(torch.bfloat16)
        side = 720 // 16
        like = partial(torch.empty, dtype=torch.bfloat16)
        inputs = {"hidden_states": like(1, side**2, 64), "encoder_hidden_states": like(1, full_size.TOKENS, 4096)}
        inputs |= {"pooled_projections": like(1, 768), "timestep": like(1), "guidance": like(1)}
        inputs |= {"img_ids": torch.empty(side**2, 3), "txt_ids": torch.empty(full_size.TOKENS, 3)}
    assert flops(lambda: model(**inputs)) == pytest.approx(full_size.FORWARD, rel=0.01)

    weights, kept = {weight.untyped_storage()._cdata for weight in model.parameters()}, {}

    def keep(tensor):
        if tensor.untyped_storage()._cdata not in weights:
            kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    fused = lambda query, key, value, **_: FusedAttention.apply(query, key, value)  # noqa: E731
    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", fused)
    for mode in ("off", "on", "selective"):
        if mode != "off":
            model.enable_gradient_checkpointing()
        if mode == "selective":
            full_size.every_other(model)
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model(**inputs)
        found = sum(storage.nbytes() for storage in kept.values()) / 2**30
        assert found == pytest.approx(full_size.ACTIVATIONS[mode], rel=0.01), mode
