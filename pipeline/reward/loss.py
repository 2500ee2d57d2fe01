"""The loss over rankings: every text is scored once and every comparison in it trains."""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional


def comparison_loss(
    scores: Float[Tensor, " text"],
    *,
    better: Int[Tensor, " comparison"],
    worse: Int[Tensor, " comparison"],
    targets: Float[Tensor, " comparison"],
) -> Float[Tensor, ""]:
    """Returns the Bradley-Terry negative log-likelihood, summed over the comparisons, in nats.

    P(a beats b) = sigmoid(score_a - score_b) (Bradley and Terry 1952); over all comparisons of a
    ranking this is InstructGPT (Ouyang et al. 2022) equation 1 before its division by the number
    of comparisons. The caller divides: by the comparisons of all processes, so that the loss does
    not depend on how rankings are dealt to them.

    Args:
        scores: one score per text; computed in float32 whatever the model's precision.
        better: index of the text that was rated higher.
        worse: index of the text that was rated lower.
        targets: probability that `better` beats `worse`: 1 for a hard label.
    """
    margin = scores.float()[better] - scores.float()[worse]
    targets = targets.float()
    return (
        -(targets * functional.logsigmoid(margin)).sum()
        - ((1.0 - targets) * functional.logsigmoid(-margin)).sum()
    )


def comparisons(
    ratings: Float[Tensor, " text"], *, min_gap: float
) -> tuple[Int[Tensor, " comparison"], Int[Tensor, " comparison"]]:
    """Returns the indices of the better and the worse text of every comparison in a ranking.

    Args:
        ratings: mean rating of each text.
        min_gap: a comparison counts when the ratings differ by at least this much, and differ.
    """
    gap = ratings[:, None] - ratings[None, :]
    better, worse = ((gap >= min_gap) & (gap > 0)).nonzero(as_tuple=True)
    return better, worse


def rater_targets(
    ratings: list[list[int]],
    *,
    better: Int[Tensor, " comparison"],
    worse: Int[Tensor, " comparison"],
) -> Float[Tensor, " comparison"]:
    """Returns P(one rater of `better` rates higher than one of `worse`), equal ratings half.

    With h the histogram of a text's ratings over the levels and F its cumulative sum,
    P = sum over levels of h_better (F_worse - h_worse / 2).

    Args:
        ratings: every rater's rating of each text.
        better: index of the text with the higher mean.
        worse: index of the text with the lower mean.
    """
    levels = sorted({rating for text in ratings for rating in text})
    place = {level: index for index, level in enumerate(levels)}
    histogram = torch.zeros(len(ratings), len(levels))
    for row, text in enumerate(ratings):
        for rating in text:
            histogram[row, place[rating]] += 1.0 / len(text)
    below = histogram.cumsum(dim=1) - histogram / 2
    return (histogram[better] * below[worse]).sum(dim=1)
