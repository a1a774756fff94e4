"""runtime/cost_counter.py: operations and bytes against hand calculations."""

import pytest
import torch
from torch import nn

from runtime.cost_counter import flop_count, saved_bytes

B, IN, HIDDEN = 3, 4, 5


@pytest.fixture
def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(IN, HIDDEN, bias=False), nn.Linear(HIDDEN, IN, bias=False))


def test_a_forward_and_a_backward_cost_their_matrix_products(net):
    x, forward = torch.randn(B, IN), 2 * B * IN * HIDDEN + 2 * B * HIDDEN * IN
    assert flop_count(lambda: net(x)) == forward
    to_weights = forward + 2 * B * HIDDEN * IN  # of both weights, and of the hidden layer
    assert flop_count(lambda: net(x).sum().backward()) == forward + to_weights
    q = torch.randn(2, 3, 10, 8)
    assert flop_count(lambda: nn.functional.scaled_dot_product_attention(q, q, q)) == 2 * (2 * 2 * 3 * 10 * 10 * 8)


def test_each_layer_saves_its_input_and_no_weight_except_for_a_frozen_one(net):
    """B x 4 and B x 5 numbers of four bytes, for the gradients of the weights."""
    x = torch.randn(B, IN)
    assert saved_bytes(lambda: net(x)) == 4 * (B * IN + B * HIDDEN)
    assert saved_bytes(lambda: net(x) + net(x)) == 4 * (B * IN + 2 * B * HIDDEN)  # x once
    net[1].requires_grad_(False)  # it saves its weight for the gradient of its input, and does not save its input
    assert saved_bytes(lambda: net(x), net) == 4 * B * IN
    assert saved_bytes(lambda: net(x)) == 4 * (B * IN + HIDDEN * IN)


def test_a_storage_at_the_address_of_a_freed_one_counts(net):
    def steps():
        for _ in range(50):
            net(torch.randn(B, IN)).sum().backward()

    assert saved_bytes(steps) == 50 * 4 * (B * IN + B * HIDDEN)
