"""Preference pairs: two replies to one prompt, of which one was preferred; a bad pair says why.

    prompt, chosen, rejected    text, or lists of messages; UltraFeedback's hold the prompt again
    chosen, rejected            whole conversations, as lists or as hh-rlhf's transcripts

This module knows neither files nor models.
"""

import dataclasses
from collections.abc import Mapping

from sae_ray.chat import Conversation, Message
from sae_ray.rows import BadRow, chosen_messages, excerpt, read_id, require_readable


@dataclasses.dataclass(frozen=True, slots=True)
class Pair:
    """Two conversations that differ in their last turn alone."""

    id: str
    chosen: Conversation
    rejected: Conversation


def to_pair(row: Mapping[str, object]) -> Pair:
    """Read one row in any of the forms.

    Raises:
        BadRow: the row holds no pair that can be learnt from.
    """
    if "chosen" not in row or "rejected" not in row:
        raise BadRow("no columns of a pair (chosen, rejected)", excerpt(", ".join(row)))
    chosen = chosen_messages(row)
    rejected = chosen_messages({**row, "chosen": row["rejected"]})
    for messages in (chosen, rejected):
        require_readable(messages)
        if messages[-1]["role"] != "assistant":
            raise BadRow("a pair does not end with the assistant", excerpt(messages[-1]["role"]))
    _require_one_difference(chosen, rejected)
    id = read_id(row, chosen)
    return Pair(id, Conversation(id, chosen), Conversation(id, rejected))


def _require_one_difference(chosen: list[Message], rejected: list[Message]) -> None:
    if chosen[:-1] != rejected[:-1]:
        raise BadRow(
            "chosen and rejected answer different prompts", excerpt(rejected[-1]["content"])
        )
    if chosen[-1]["content"].strip() == rejected[-1]["content"].strip():
        raise BadRow("chosen and rejected are the same", excerpt(chosen[-1]["content"]))
