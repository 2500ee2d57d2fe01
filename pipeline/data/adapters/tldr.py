r"""TL;DR: posts of Reddit and summaries of them, in the forms in which they are published.

    comparisons  {"info": {"id", "subreddit", "title", "post"}, "summaries": [{"text"}, {"text"}],
                  "choice": 0 | 1, ...}                        openai/summarize_from_feedback
    posts        {"id", "subreddit", "title", "post", "summary"}    its filtered posts
    prompts      {"prompt", "completion"} or {"prompt", "chosen", "rejected"}     trl-lib/tldr*

The prompt is written as in the third form: SUBREDDIT, TITLE, POST and a TL;DR that is to be
continued (Stiennon et al. 2020, appendix B.1). The document is the post.
"""

from collections.abc import Iterator

from pipeline.data.adapters.turns import (
    EMPTY,
    UnusableError,
    WrongSchemaError,
    column,
    pair_of,
    row_of,
    text_of,
)
from pipeline.data.cleaning import normalise
from pipeline.data.tables import Row

COLUMNS = (
    "info, summaries and choice (comparisons); or post and summary (posts); or prompt, with "
    "completion or with chosen and rejected"
)
NO_POST = "no post of Reddit (a news article)"


def rows(row: Row, row_type: str) -> Iterator[Row]:
    """Returns the pair, or the post with its best summary where no preferences are wanted."""
    prompt, group = _prompt(row)
    replies = _replies(row)
    answers = [_exchange(prompt, reply) for reply in replies]
    if row_type not in ("preferences", "guard_preferences"):
        yield row_of(row_type, answers[0], group=group)
    elif len(answers) == 2:
        yield pair_of(*answers, group=group)
    else:
        raise WrongSchemaError("a row with one summary is no comparison")


def _exchange(prompt: str, reply: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": reply}]


def _prompt(row: Row) -> tuple[str, str]:
    """Returns the prompt, and the name of the post."""
    if "prompt" in row:
        prompt = text_of(row, "prompt")
        if not prompt:
            raise UnusableError(EMPTY)
        return prompt, normalise(prompt)
    info = row
    if "info" in row:
        info = column(row, "info", dict, called="an object {id, subreddit, title, post}") or {}
    post = text_of(info, "post")
    if not post:
        raise UnusableError(NO_POST if info.get("article") else "an empty post")
    title, subreddit = text_of(info, "title"), text_of(info, "subreddit")
    prompt = f"SUBREDDIT: r/{subreddit}\n\nTITLE: {title}\n\nPOST: {post}\n\nTL;DR:"
    return prompt, text_of(info, "id") or normalise(prompt)


def _replies(row: Row) -> list[str]:
    """Returns the summaries, the better one first."""
    if "summaries" in row:
        return _compared(row)
    if "chosen" in row:
        return [text_of(row, "chosen"), text_of(row, "rejected")]
    return [text_of(row, "completion" if "completion" in row else "summary")]


def _compared(row: Row) -> list[str]:
    choice = column(row, "choice", int, called="0 or 1")
    summaries = column(row, "summaries", list, called="a list of two summaries {text}") or []
    if not all(isinstance(summary, dict) for summary in summaries):
        raise WrongSchemaError("summaries must be a list of two summaries {text}")
    if len(summaries) != 2 or choice not in (0, 1):
        raise UnusableError("no choice between two summaries")
    return [text_of(summaries[choice], "text"), text_of(summaries[1 - choice], "text")]
