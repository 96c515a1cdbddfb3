"""How far a merge is from the exact weighted sum of its parents' changes, measured on what is stored."""

import math
from collections.abc import Mapping, Sequence

import torch

from adapterhub_lite.errors import MergeError
from adapterhub_lite.merging.deltas import Factors


def relative_error(merged: Mapping[str, Factors], parents: Sequence[tuple[Mapping[str, Factors], float]]) -> float:
    """Frobenius norm of (merged - exact) over that of exact, all modules together, multiplied out in fp64.

    Raises:
        MergeError: the exact sum is zero.
    """
    wrong = total = 0.0
    for module, pair in merged.items():
        exact = torch.zeros(pair.b.shape[0], pair.a.shape[1], dtype=torch.float64)
        for factors, weight in parents:
            if module in factors:
                exact += weight * factors[module].delta(torch.float64)
        wrong += float((pair.delta(torch.float64) - exact).square().sum())
        total += float(exact.square().sum())
    if total == 0.0:
        raise MergeError("The weighted sum of these adapters is zero: nothing would be left. Choose other weights.")
    return math.sqrt(wrong / total)
