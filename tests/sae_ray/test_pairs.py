import pytest

from sae_ray.pairs import to_pair
from sae_ray.rows import BadRow, to_conversation

ASKED = {"role": "user", "content": "Is it raining?"}
YES = {"role": "assistant", "content": "Yes."}
NO = {"role": "assistant", "content": "No."}


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Is it raining?", "chosen": "Yes.", "rejected": "No."},
        {"prompt": [ASKED], "chosen": [YES], "rejected": [NO]},
        {"prompt": "Is it raining?", "chosen": [ASKED, YES], "rejected": [ASKED, NO]},
        {"chosen": [ASKED, YES], "rejected": [ASKED, NO]},
        {
            "chosen": "\n\nHuman: Is it raining?\n\nAssistant: Yes.",
            "rejected": "\n\nHuman: Is it raining?\n\nAssistant: No.",
        },
    ],
    ids=["text", "messages", "ultrafeedback", "whole", "hh-rlhf"],
)
def test_every_form_is_the_same_pair(row: dict) -> None:
    pair = to_pair(row)
    assert pair.chosen.messages == [ASKED, YES]
    assert pair.rejected.messages == [ASKED, NO]
    assert to_conversation(row) == pair.chosen


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "p", "completion": "c"}, "no columns of a pair"),
        ({"prompt": "p", "chosen": "a", "rejected": " a\n"}, "are the same"),
        ({"prompt": "p", "chosen": "a", "rejected": 3}, "not a list"),
        ({"prompt": "p", "chosen": "a", "rejected": ""}, "empty assistant turn"),
        ({"chosen": [ASKED, YES], "rejected": [YES, NO]}, "different prompts"),
        ({"chosen": [ASKED, YES], "rejected": [ASKED, NO, ASKED]}, "does not end with"),
        ({"chosen": "no marks", "rejected": "none"}, "no marks"),
    ],
)
def test_bad_pairs_say_why(row: dict, reason: str) -> None:
    with pytest.raises(BadRow, match=reason):
        to_pair(row)


def test_marked_text_is_a_conversation() -> None:
    turns = "[Human]: Hi <eoh> [MOSS]: Hello. <eoa> [Human]: Bye <eoh> [MOSS]: So long. <eoa>"
    row = {"plain_text": f"Be brief. {turns}"}
    messages = to_conversation(row).messages
    assert [m["role"] for m in messages] == ["system", "user", "assistant", "user", "assistant"]
    assert messages[-1]["content"] == "So long."
