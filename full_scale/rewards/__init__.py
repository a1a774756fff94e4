"""Differentiable rewards with one contract: images in [0, 1] and their prompts to one score each.

    from full_scale import rewards

    reward = rewards.load("hpsv2.1", device="cuda")                  weights from the Hugging Face hub
    reward = rewards.load("hpsv2.1", ["HPS_v2.1_compressed.pt"])     or from a local path, without network access
    reward = rewards.load("hpsv2.1:1,pickscore:0.5")                 a weighted sum
    reward = rewards.load("my_module:my_factory")                    a custom reward
    rewards.check_reward(reward)                                     raises BadInput if it breaks the contract
    reward(images, prompts)                                          images (B, 3, H, W) in [0, 1], B prompts, to (B,)

Every step from the pixels to the score is torch: PIL, uint8 or no_grad in between would stop the gradient.  Weights are
frozen, the text carries no gradient, and a reward imports the large libraries only when it is loaded.
"""

from full_scale.rewards.contract import CustomReward, Reward, check_reward
from full_scale.rewards.registry import DROPS, PRESETS, REWARDS, WeightedSum, load, load_each, split_terms
from full_scale.rewards.tiny import tiny

__all__ = [
    "DROPS", "PRESETS", "REWARDS", "CustomReward", "Reward", "WeightedSum", "check_reward", "load", "load_each",
    "split_terms", "tiny",
]  # fmt: skip
