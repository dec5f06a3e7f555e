"""Preferences: the Bradley–Terry loss, reward models on a 4-bit base, and strengths of items estimated from wins.

Given two answers with rewards c and r, a person prefers the first with probability F(c − r). If a person values an
answer
at its reward plus independent noise, F is the distribution of the difference of two noises: the logistic σ for Gumbel
noise (Bradley–Terry), the normal Φ for Gaussian noise of variance ½ (Thurstone's case V).
"""

from .loss import bradley_terry_loss
from .reward import HEAD, POOLINGS, RewardHead, RewardModel, load_reward_model, reward_model, save_reward_model
from .strengths import Strengths, fit_bradley_terry, win_probability

__all__ = [
    "HEAD",
    "POOLINGS",
    "RewardHead",
    "RewardModel",
    "Strengths",
    "bradley_terry_loss",
    "fit_bradley_terry",
    "load_reward_model",
    "reward_model",
    "save_reward_model",
    "win_probability",
]
