"""Losses: tensors in, loss out. Knows torch only, nothing of data, adapters or training."""

from adapterhub_lite.losses.causal import causal_lm_loss, lm_loss_of_logits
from adapterhub_lite.losses.choice import LossChoice, choose_loss, head_mismatch
from adapterhub_lite.losses.heads import Head, head_of
from adapterhub_lite.losses.reference import LossOptions, full_cross_entropy
from adapterhub_lite.losses.tiled import linear_cross_entropy

__all__ = [
    "Head",
    "LossChoice",
    "LossOptions",
    "causal_lm_loss",
    "choose_loss",
    "full_cross_entropy",
    "head_mismatch",
    "head_of",
    "linear_cross_entropy",
    "lm_loss_of_logits",
]
