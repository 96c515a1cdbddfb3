"""Adapters in, one adapter or one merged model out, each with a measured receipt. Torch is imported on use."""

from adapterhub_lite.merging.adapters import MergedAdapter, merge_adapters, rebuild_merge
from adapterhub_lite.merging.into_base import MergedModel, merge_into_base

__all__ = ["MergedAdapter", "MergedModel", "merge_adapters", "merge_into_base", "rebuild_merge"]
