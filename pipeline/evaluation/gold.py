"""The gold score: what the reward model stands in for, and training never sees.

The only module that imports vaderSentiment; an import contract keeps training code away from it.
"""

from collections.abc import Sequence

from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer


def gold_scores(responses: Sequence[str]) -> list[float]:
    """Returns the VADER compound of each response, from -1 (negative) to 1 (positive)."""
    analyzer = SentimentIntensityAnalyzer()
    return [float(analyzer.polarity_scores(text)["compound"]) for text in responses]
