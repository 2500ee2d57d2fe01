"""OpenAssistant's oasst1 and oasst2: trees of messages, in which people ranked the replies.

    messages  {"message_id", "parent_id", "message_tree_id", "text", "role": "prompter" |
               "assistant", "lang", "rank", "deleted", "review_result", "tree_state", ...}
    trees     {"message_tree_id", "tree_state", "prompt": {"message_id", "text", "role", ...,
               "replies": [{..., "replies": [...]}, ...]}}

A rank of 0 is the best reply to its message. Instructions take the best reply to every question,
preferences all that are ranked, text the best-ranked way down a tree, prompts every question with
what was said before it. The document is the tree.
"""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

from pipeline.data.adapters.turns import (
    EMPTY,
    Message,
    UnusableError,
    WrongSchemaError,
    column,
    row_of,
    text_of,
)
from pipeline.data.tables import Row

COLUMNS = (
    "message_id, parent_id, message_tree_id, text and role (messages); or message_tree_id and "
    "prompt (trees)"
)
ROLES = {"prompter": "user", "assistant": "assistant"}
READY = "ready_for_export"
"""State of a tree that its people finished."""

NOT_READY = f"trees: not {READY}"
NO_ROOT = "trees: without their first message"
ORPHAN = "messages: the one they answer is missing"
DELETED = "messages: deleted"
REFUSED = "messages: refused in review"
EMPTY_MESSAGE = f"messages: {EMPTY}"
SAME_ROLE = "messages: of the role that they answer"
UNRANKED = "questions: several replies without a rank"
EQUAL = "replies: the text of a better ranked one"

Node = Row
"""A message that is kept: id, role, text, rank, and the kept ones that answer it."""


def trees(placed: Iterable[tuple[str, Row]], dropped: Counter[str]) -> Iterator[tuple[str, Row]]:
    """Returns every row of an export of trees; of an export of messages the trees they make.

    Raises:
        WrongSchemaError: a message has not the columns that say where it belongs.
    """
    messages: dict[str, list[tuple[str, Row]]] = {}
    for where, row in placed:
        if "message_id" in row:
            try:
                key = text_of(row, "message_tree_id")
            except WrongSchemaError as error:
                raise WrongSchemaError(str(error), where=where) from error
            messages.setdefault(key, []).append((where, row))
        else:
            yield where, row
    for key, members in messages.items():
        yield _grown(key, members, dropped)


def _grown(key: str, members: Sequence[tuple[str, Row]], dropped: Counter[str]) -> tuple[str, Row]:
    """Returns the tree of a list of messages, in whatever order they come."""
    nodes: dict[str, Row] = {}
    parents: dict[str, str] = {}
    for where, row in members:
        try:
            name, parent = text_of(row, "message_id"), text_of(row, "parent_id")
        except WrongSchemaError as error:
            raise WrongSchemaError(str(error), where=where) from error
        if name not in nodes:
            nodes[name], parents[name] = {**row, "replies": []}, parent
    roots = [name for name, parent in parents.items() if not parent]
    answers = {name: parent for name, parent in parents.items() if parent}
    for name, parent in answers.items():
        if parent in nodes:
            nodes[parent]["replies"].append(nodes[name])
        else:
            dropped[ORPHAN] += 1
    where, first = members[0]
    state = first.get("tree_state")
    prompt = nodes[roots[0]] if roots else None
    return where, {"message_tree_id": key, "tree_state": state, "prompt": prompt}


def language(tree: Row) -> str:
    """Returns the language of a tree's first message, such as en or pt-BR."""
    prompt = tree.get("prompt")
    return text_of(prompt, "lang") if isinstance(prompt, dict) and "lang" in prompt else ""


def rows(tree: Row, row_type: str, dropped: Counter[str]) -> Iterator[Row]:
    """Returns the rows of one tree.

    Args:
        tree: a row of an export of trees.
        row_type: the type of the rows.
        dropped: counts messages and replies that are left out.
    """
    group = text_of(tree, "message_tree_id")
    state = tree.get("tree_state")
    root = column(tree, "prompt", dict, called="the first message")
    if state not in (None, "", READY):
        raise UnusableError(NOT_READY)
    if root is None:
        raise UnusableError(NO_ROOT)
    kept = _kept(root, dropped)
    if kept is None:
        return
    if row_type == "text":
        yield row_of("text", _best_way(kept), group=group)
        return
    for thread, question in _questions(kept):
        if row_type == "prompts":
            yield {"prompt": thread, "group": group}
        elif row_type == "instructions":
            best = _best(question["replies"], dropped)
            if best is not None:
                yield row_of(row_type, [*thread, _message(best)], group=group)
        else:
            yield from _ranking(thread, question["replies"], dropped, group=group)


def _kept(root: Row, dropped: Counter[str]) -> Node | None:
    """Returns the tree without messages that are left out, and what answers them."""
    top: list[Node] = []
    todo: list[tuple[Row, list[Node], str]] = [(root, top, "assistant")]
    while todo:
        raw, siblings, answered = todo.pop()
        role = column(raw, "role", str, called="a text")
        if role not in ROLES:
            raise WrongSchemaError(f"role must be {' or '.join(ROLES)}, got {role!r}")
        reason = _reason(raw, is_turn=ROLES[role] != answered)
        if reason:
            dropped[reason] += 1
            continue
        node: Node = {
            "id": text_of(raw, "message_id"),
            "role": ROLES[role],
            "text": text_of(raw, "text"),
            "rank": _rank(raw),
            "replies": [],
        }
        siblings.append(node)
        replies = raw.get("replies") or []
        if not isinstance(replies, list) or not all(isinstance(one, dict) for one in replies):
            raise WrongSchemaError("replies must be a list of messages")
        todo += [(reply, node["replies"], node["role"]) for reply in reversed(replies)]
    return top[0] if top else None


def _rank(raw: Row) -> float | None:
    """A message's place among those beside it; tables of numbers write a missing one as NaN."""
    rank = column(raw, "rank", int | float, called="a number") if "rank" in raw else None
    return None if rank is None or math.isnan(rank) else float(rank)


def _reason(raw: Row, *, is_turn: bool) -> str:
    """Why a message is left out, and with it what answers it; empty where it is kept."""
    flags = {
        name: column(raw, name, bool, called="true or false")
        for name in ("deleted", "review_result")
        if name in raw
    }
    if flags.get("deleted"):
        return DELETED
    if flags.get("review_result") is False:
        return REFUSED
    if not text_of(raw, "text"):
        return EMPTY_MESSAGE
    return "" if is_turn else SAME_ROLE


def _questions(root: Node) -> Iterator[tuple[list[Message], Node]]:
    """Returns every message of a user with the conversation that ends with it."""
    todo: list[tuple[list[Message], Node]] = [([], root)]
    while todo:
        before, node = todo.pop()
        thread = [*before, _message(node)]
        if node["role"] == "user":
            yield thread, node
        todo += [(thread, reply) for reply in reversed(node["replies"])]


def _message(node: Node) -> Message:
    return {"role": node["role"], "content": node["text"]}


def _best(replies: Sequence[Node], dropped: Counter[str]) -> Node | None:
    ranked = [reply for reply in replies if reply["rank"] is not None]
    if ranked:
        return min(ranked, key=lambda reply: reply["rank"])
    if len(replies) > 1:
        dropped[UNRANKED] += 1
    return replies[0] if len(replies) == 1 else None


def _best_way(root: Node) -> list[Message]:
    """Returns the conversation that takes the best-ranked message every time, up to a reply."""
    way = [root]
    while way[-1]["replies"]:
        replies = way[-1]["replies"]
        ranked = [reply for reply in replies if reply["rank"] is not None]
        way.append(min(ranked, key=lambda one: one["rank"]) if ranked else replies[0])
    if len(way) > 1 and way[-1]["role"] == "user":
        way.pop()
    return [_message(node) for node in way]


def _ranking(
    thread: list[Message], replies: Sequence[Node], dropped: Counter[str], *, group: str
) -> Iterator[Row]:
    """Returns the ranked replies to one question, where there are two of different texts."""
    ranked = sorted(
        (reply for reply in replies if reply["rank"] is not None), key=lambda one: one["rank"]
    )
    if len(ranked) < 2:
        dropped[UNRANKED] += len(replies) > 1
        return
    distinct: dict[str, Node] = {}
    for reply in ranked:
        distinct.setdefault(reply["text"], reply)
    dropped[EQUAL] += len(ranked) - len(distinct)
    if len(distinct) < 2:
        return
    yield {
        "prompts": [thread],
        "set": "oasst",
        "ids": [reply["id"] for reply in distinct.values()],
        "responses": list(distinct),
        "scores": [-reply["rank"] for reply in distinct.values()],
        "group": group,
    }
