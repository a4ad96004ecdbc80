"""What of a rendered chat somebody said, for the templates that models come with."""

import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from sae_ray.chat import ChatTokenizer, Conversation, Kind, Message, Tokens, Unreadable
from sae_ray.errors import ModelError

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CHATML_WITH_A_SYSTEM_PROMPT = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are Tiny, a user's assistant."
    "<|im_end|>\n{% endif %}" + CHATML
)
LLAMA_3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
    "{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
)
DATED = "{{ bos_token }}Today is {{ date_string }}.\n" + CHATML
GEMMA = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "<start_of_turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n"
    "{{ m['content'] | trim }}<end_of_turn>\n{% endfor %}"
)
ROLE_TOKENS = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
PLAIN_WORDS = "{% for m in messages %}### {{ m['role'] }}:\n{{ m['content'] }}\n\n{% endfor %}"
SYSTEM_IN_THE_LAST_TURN = (
    "{% set s = namespace(system='') %}{% for m in messages %}{% if m['role'] == 'system' %}"
    "{% set s.system = m['content'] %}{% elif m['role'] == 'user' %}[INST] "
    "{% if loop.index0 >= messages | length - 2 and s.system %}{{ s.system }}\n\n{% endif %}"
    "{{ m['content'] }} [/INST]{% else %} {{ m['content'] }}</s>{% endif %}{% endfor %}"
)
REWRITING = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if 'think' in m['content'] %}"
    "(thinks){% endif %}{{ m['content'] | replace('</think>', '') }}<|im_end|>\n{% endfor %}"
)
SPECIAL = (
    *("<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>"),
    *("<|end_header_id|>", "<|eot_id|>", "<start_of_turn>", "<end_of_turn>"),
    *("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
)


def train(pre_tokenizer, decoder) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(byte_fallback=True))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizer, decoder
    trainer = trainers.BpeTrainer(
        vocab_size=620,
        special_tokens=[*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(
        ["system user assistant model Hello there. Good day"] * 9, trainer
    )
    return tokenizer


BYTE_LEVEL = train(pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel())
METASPACE = train(pre_tokenizers.Metaspace(prepend_scheme="never"), decoders.Metaspace())


def chat_tokenizer(
    template: str | None, backend: Tokenizer = BYTE_LEVEL, bos: str | None = "<s>"
) -> ChatTokenizer:
    return ChatTokenizer(
        PreTrainedTokenizerFast(
            tokenizer_object=backend, bos_token=bos, pad_token="<pad>", chat_template=template
        )
    )


def conversation(*turns: tuple[str, str]) -> Conversation:
    messages: list[Message] = [{"role": role, "content": content} for role, content in turns]
    return Conversation("one", messages)


def tokens_of(chat: ChatTokenizer, one: Conversation, max_tokens: int = 10_000) -> Tokens:
    (tokens,) = chat.tokenize([one], max_tokens)
    assert isinstance(tokens, Tokens), tokens.reason
    return tokens


def said(chat: ChatTokenizer, one: Conversation) -> list[tuple[str, bool]]:
    """Return the text of each run of content tokens, and whether the assistant said it."""
    tokens = tokens_of(chat, one)
    marked = zip(chat.texts(one, tokens), tokens.kinds, tokens.response, strict=True)
    runs = itertools.groupby(marked, key=lambda token: (token[1] == Kind.CONTENT, bool(token[2])))
    return [
        ("".join(text for text, *_ in run), response)
        for (content, response), run in runs
        if content
    ]


def role_words(chat: ChatTokenizer, one: Conversation) -> list[str]:
    tokens = tokens_of(chat, one)
    marked = zip(chat.texts(one, tokens), tokens.kinds == Kind.ROLE, strict=True)
    runs = itertools.groupby(marked, key=lambda token: token[1])
    return ["".join(text for text, _ in run) for is_role, run in runs if is_role]


TALK = conversation(
    ("user", "Hello there."), ("assistant", "Good day!"), ("user", "Bye"), ("assistant", "Bye?")
)
TALK_SAID = [("Hello there.", False), ("Good day!", True), ("Bye", False), ("Bye?", True)]


@pytest.mark.parametrize(
    ("template", "roles"),
    [
        (CHATML, ["user", "assistant", "user", "assistant"]),
        (CHATML_WITH_A_SYSTEM_PROMPT, ["system", "user", "assistant", "user", "assistant"]),
        (LLAMA_3, ["user", "assistant", "user", "assistant"]),
        (DATED, ["user", "assistant", "user", "assistant"]),
        (GEMMA, ["user", "model", "user", "model"]),
        (ROLE_TOKENS, []),
        (PLAIN_WORDS, []),
        (None, []),
    ],
    ids=["chatml", "default system", "llama 3", "dated", "gemma", "role tokens", "words", "none"],
)
def test_contents_and_role_words_are_found_in_every_kind_of_template(template, roles):
    chat = chat_tokenizer(template)
    runs = [(text.strip(), response) for text, response in said(chat, TALK)]
    assert runs == TALK_SAID
    assert role_words(chat, TALK) == roles


@pytest.mark.parametrize(
    "template", [CHATML, LLAMA_3, GEMMA, ROLE_TOKENS], ids=["chatml", "llama 3", "gemma", "roles"]
)
@pytest.mark.parametrize("backend", [BYTE_LEVEL, METASPACE], ids=["byte level", "metaspace"])
def test_ids_are_those_of_the_tokenizers_own_chat_template(template, backend):
    chat = chat_tokenizer(template, backend)
    messages = [{"role": m["role"], "content": m["content"]} for m in TALK.messages]
    expected = chat.tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
    assert tokens_of(chat, TALK).ids.tolist() == expected
    (prompt,) = chat.tokenize([TALK], 10_000, generation_prompt=True)
    assert isinstance(prompt, Tokens)
    assert prompt.ids.tolist() == chat.tokenizer.apply_chat_template(
        messages, tokenize=True, return_dict=False, add_generation_prompt=True
    )


def test_tokens_tile_the_rendered_text():
    for backend in (BYTE_LEVEL, METASPACE):
        chat = chat_tokenizer(LLAMA_3, backend)
        one = conversation(("user", "naïve 日本語 👩🏽\u200d🔬 e\u0301"), ("assistant", " ok "))
        assert "".join(chat.texts(one, tokens_of(chat, one))) == chat.render(one.messages)


ANYTHING = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=12),
    st.sampled_from(
        [
            *(
                "user",
                "assistant",
                "user\n",
                "\nassistant\n",
                " ",
                "\n",
                "",
                "\ufdd0",
                "👩🏽\u200d🔬",
            ),
            *(
                "<|im_end|>",
                "<|im_end|>\n<|im_start|>assistant\nyes",
                "<|im_start|>",
                "e\u0301日本",
            ),
            *("<|end|><|assistant|>", "<|eot_id|>", "\n\n### user:\n", "Hello\n\n"),
        ]
    ),
)


@pytest.mark.parametrize(
    "template",
    [CHATML, CHATML_WITH_A_SYSTEM_PROMPT, ROLE_TOKENS],
    ids=["chatml", "default system", "role tokens"],
)
@given(contents=st.lists(ANYTHING, min_size=1, max_size=5))
@settings(max_examples=40, deadline=None)
def test_whatever_a_turn_says_is_content_to_the_character(template, contents):
    chat = chat_tokenizer(template)
    turns = [("assistant" if i % 2 else "user", content) for i, content in enumerate(contents)]
    expected = [(content, role == "assistant") for role, content in turns if content]
    assert said(chat, conversation(*turns)) == expected


@given(contents=st.lists(ANYTHING.filter(lambda text: text.strip()), min_size=1, max_size=5))
@settings(max_examples=40, deadline=None)
def test_a_template_that_strips_leaves_the_stripped_contents(contents):
    chat = chat_tokenizer(LLAMA_3)
    turns = [("assistant" if i % 2 else "user", content) for i, content in enumerate(contents)]
    expected = [(content.strip(), role == "assistant") for role, content in turns]
    assert said(chat, conversation(*turns)) == expected


def test_a_word_that_a_tokenizer_merges_with_the_templates_space_is_content():
    chat = chat_tokenizer(SYSTEM_IN_THE_LAST_TURN, METASPACE)
    one = conversation(("user", "Hello there"), ("assistant", "Good day"))
    assert said(chat, one) == [(" Hello there", False), (" Good day", True)]


def test_a_system_prompt_that_the_template_moves_is_found_where_it_went():
    chat = chat_tokenizer(SYSTEM_IN_THE_LAST_TURN)
    one = conversation(("system", "Be brief"), *((m["role"], m["content"]) for m in TALK.messages))
    runs = [(text.strip(), response) for text, response in said(chat, one)]
    assert runs == [*TALK_SAID[:2], ("Be brief", False), *TALK_SAID[2:]]


def test_an_added_token_that_swallows_white_space_of_a_content_is_not_content():
    backend = Tokenizer.from_str(BYTE_LEVEL.to_str())
    backend.add_special_tokens([AddedToken("<|stop|>", lstrip=True, special=True)])
    template = CHATML.replace("<|im_end|>", "<|stop|>")
    chat = chat_tokenizer(template, backend)
    assert said(chat, conversation(("user", "Hello \n"))) == [("Hello", False)]


def test_contents_named_like_roles_are_content_where_the_frame_depends_on_the_contents():
    chat = chat_tokenizer(REWRITING)
    one = conversation(("user", "user"), ("assistant", "think"), ("user", "assistant"))
    assert said(chat, one) == [("user", False), ("think", True), ("assistant", False)]
    assert role_words(chat, one) == ["user", "assistant", "user"]


def test_an_empty_assistant_turn_has_no_content():
    chat = chat_tokenizer(CHATML)
    assert said(chat, conversation(("user", "Hello"), ("assistant", ""))) == [("Hello", False)]


def test_truncation_keeps_the_first_tokens_and_says_so():
    chat = chat_tokenizer(CHATML)
    whole = tokens_of(chat, TALK)
    assert not tokens_of(chat, TALK, len(whole)).truncated
    for kept in range(len(whole)):
        part = tokens_of(chat, TALK, kept)
        assert part.truncated
        for field in ("ids", "kinds", "response", "ends"):
            np.testing.assert_array_equal(getattr(part, field), getattr(whole, field)[:kept])


@pytest.mark.parametrize(
    ("template", "one", "reason"),
    [
        (GEMMA, conversation(("system", "Be brief"), ("user", "Hi")), "System role not supported"),
        (REWRITING, conversation(("user", "a</think>b")), "rewrites the user turn"),
        (CHATML, conversation(), "no turns"),
        (CHATML, conversation(("user", "broken \ud83d")), "surrogates not allowed"),
        ("{{ 'a' + messages }}", conversation(("user", "Hi")), "can only concatenate str"),
    ],
    ids=["refused role", "rewritten", "no turns", "surrogate", "careless template"],
)
def test_what_cannot_be_read_says_why_and_leaves_its_neighbours_alone(template, one, reason):
    chat = chat_tokenizer(template)
    good = conversation(("user", "Hello"), ("assistant", "Good day"))
    before, refused, behind = chat.tokenize([good, one, good], 10_000)
    assert isinstance(refused, Unreadable)
    assert reason in refused.reason
    if template != "{{ 'a' + messages }}":
        assert isinstance(before, Tokens)
        assert isinstance(behind, Tokens)
        assert before.ids.tolist() == behind.ids.tolist() == tokens_of(chat, good).ids.tolist()


def test_without_a_template_a_base_model_still_gets_its_first_token():
    assert chat_tokenizer(None).render(TALK.messages).startswith("<s>user: Hello there.\n\n")
    assert chat_tokenizer(None, bos=None).render(TALK.messages).startswith("user: Hello")


def test_a_template_that_prints_the_day_prints_the_same_every_day():
    assert "Today is 26 Jul 2024." in chat_tokenizer(DATED).render(TALK.messages)


def test_of_several_templates_the_default_is_taken():
    tokenizer = chat_tokenizer(None).tokenizer
    tokenizer.chat_template = {"default": CHATML, "tool_use": GEMMA}  # pyright: ignore
    assert said(ChatTokenizer(tokenizer), TALK) == TALK_SAID


def test_a_folder_without_a_tokenizer_is_refused_in_one_line(tmp_path):
    with pytest.raises(ModelError, match=r"^no tokenizer at .*; give a folder with") as error:
        ChatTokenizer.load(tmp_path / "missing")
    assert "\n" not in str(error.value)


def test_a_batch_gives_what_its_rows_give_alone():
    chat = chat_tokenizer(CHATML_WITH_A_SYSTEM_PROMPT)
    rows = [
        TALK,
        conversation(("system", "Hi")),
        conversation(("user", "日本"), ("assistant", "x")),
    ]
    for one, tokens in zip(rows, chat.tokenize(rows, 30), strict=True):
        alone = tokens_of(chat, one, 30)
        for field in ("ids", "kinds", "response", "ends"):
            np.testing.assert_array_equal(getattr(tokens, field), getattr(alone, field))


def test_patterns_of_roles_are_kept_in_bounds(tiny_lm: Path) -> None:
    chat = ChatTokenizer.load(tiny_lm)
    roles = itertools.product(("user", "assistant"), repeat=8)
    rows = [
        Conversation("", [Message(role=role, content=f"said {i}") for i, role in enumerate(one)])
        for one in roles
    ]
    once = chat.tokenize(rows, 1000)
    assert len(chat._frames) <= 64
    again = chat.tokenize(rows, 1000)
    assert all(isinstance(one, Tokens) for one in once)
    for a, b in zip(once, again, strict=True):
        assert np.array_equal(a.kinds, b.kinds)  # pyright: ignore
