"""Preferences: the Bradley–Terry loss, reward models on a 4-bit base, and strengths of items from a table of wins.

Of two answers with rewards c and r a person prefers the first with probability F(c − r). If each answer's worth to a
person is its reward plus noise of its own, F is the distribution of the difference of two noises: with Gumbel noise the
logistic σ (Bradley–Terry), with Gaussian noise of variance ½ the normal Φ (Thurstone's case V).
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
