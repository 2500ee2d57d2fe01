"""Reward functions to start from; docs/ppo.md, "Rewards of every kind", has their contract.

In ppo.yaml, beside the reward model:

    reward:
      sources:
      - model: reward
      - function: configs.rewards:ends_as_a_sentence
        weight: 0.5
"""  # noqa: INP001 - a folder of recipes, whose modules are found from the checkout


def ends_as_a_sentence(
    prompts: list[list[dict[str, str]]],  # noqa: ARG001 - a function that reads responses alone
    responses: list[str],
) -> list[float]:
    """Returns 1 for a response that ends as a sentence does, else 0."""
    return [float(response.rstrip().endswith((".", "!", "?"))) for response in responses]


def takes_up_the_prompt(prompts: list[list[dict[str, str]]], responses: list[str]) -> list[float]:
    """Returns the share of the response's words that the user's last message holds too."""
    scores = []
    for prompt, response in zip(prompts, responses, strict=True):
        asked = set(prompt[-1]["content"].lower().split())
        words = response.lower().split()
        scores.append(sum(word in asked for word in words) / max(1, len(words)))
    return scores
