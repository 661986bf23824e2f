"""Reward modules: text or images in, score out. Importing this package never imports torch."""

from rewards.failures import RewardFailureError
from rewards.load import load_reward
from rewards.run import RewardRunner
from rewards.score import RewardFunction, Score, TransientRewardError, as_score
from rewards.table import RewardPart, ScoreTable

__all__ = [
    "RewardFailureError",
    "RewardFunction",
    "RewardPart",
    "RewardRunner",
    "Score",
    "ScoreTable",
    "TransientRewardError",
    "as_score",
    "load_reward",
]
