"""Which groups of rollouts take part in an update: filters as data, every one counted."""

from __future__ import annotations

import torch

from rl.advantages import zero_variance_groups
from rl.sections import FilterConfig


def keep_mask(
    options: FilterConfig,
    reward: torch.Tensor,
    group: torch.Tensor,
    overlong: torch.Tensor,
    steps: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, dict[str, float]]:
    """Apply the filters to M scored rollouts. A filter never changes a reward, and all it leaves out is counted.

    Args:
        reward: float64 [M], NaN where there is no score; such rollouts are never kept.
        group: int64 [M], 0..num_groups-1.
        overlong: bool [M], responses that never ended.
        steps: [M, T] rewards of every step's x0 prediction, where the recipe asked for them.

    Returns:
        bool [M], the rollouts to learn from; bool [M], the rollouts that the loss is averaged over; and how many groups
        (or rollouts) each filter left out. A group is booked once, for the first filter that drops it: zero variance,
        then the accuracy band.

    Equal rewards carry no gradient. Skipping their work must not make the other prompts count more, so such rollouts
    stay in the average, unless `filters.refill_rounds` samples other prompts in their place (dynamic sampling; DAPO, Yu
    et al. 2025). Rollouts that another filter leaves out never count.
    """
    num_groups = int(group.max()) + 1 if len(group) else 0
    given = ~torch.isnan(reward)
    counted = given & ~overlong if options.drop_overlong else given
    flat = zero_variance_groups(reward, group, steps)
    zeros = torch.zeros(num_groups, dtype=torch.float64)
    count = zeros.index_add(0, group, given.double())
    mean = zeros.index_add(0, group, torch.where(given, reward, torch.zeros_like(reward))) / count.clamp(min=1)
    low, high = options.accuracy_low, options.accuracy_high
    outside = torch.zeros_like(flat)
    if low is not None:
        outside |= mean < low
    if high is not None:
        outside |= mean > high
    outside &= count > 0
    dropped_flat = flat if options.drop_zero_variance else torch.zeros_like(flat)
    dropped_band = outside & ~dropped_flat
    counted = counted & ~outside[group]
    keep = counted & ~dropped_flat[group]
    return (
        keep,
        keep if options.refill_rounds else counted,
        {
            "filters/groups": float(num_groups),
            "filters/zero_variance": float(dropped_flat.sum()),
            "filters/accuracy_band": float(dropped_band.sum()),
            "filters/overlong": float((overlong & given).sum()) if options.drop_overlong else 0.0,
            "filters/unscored": float((~given).sum()),
        },
    )
