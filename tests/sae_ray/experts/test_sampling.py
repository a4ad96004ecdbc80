import random
from collections import Counter

import pytest
import torch
from tokenizers import Tokenizer, decoders, models

from sae_ray.experts.answers import Sampling
from sae_ray.experts.sampling import TextStream, choose

LIKELY = torch.tensor([0.05, 0.4, 0.15, 0.3, 0.1])
DRAWS = 4000


def drawn(**how: float) -> Counter[int]:
    logits = LIKELY.log().repeat(DRAWS, 1)
    sampling = Sampling(**how)  # pyright: ignore[reportArgumentType]
    rows = [random.Random(k) for k in range(DRAWS)]
    return Counter(choose(logits, [sampling] * DRAWS, rows))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_are_drawn_as_often_as_they_are_likely(temperature: float) -> None:
    wanted = LIKELY ** (1 / temperature)
    found = drawn(temperature=temperature)
    for token, share in enumerate((wanted / wanted.sum()).tolist()):
        assert found[token] / DRAWS == pytest.approx(share, abs=4 * (share / DRAWS) ** 0.5)


@pytest.mark.parametrize(
    ("top_p", "kept"), [(0.39, {1}), (0.41, {1, 3}), (0.71, {1, 2, 3}), (0.96, {0, 1, 2, 3, 4})]
)
def test_only_the_likeliest_are_drawn_from(top_p: float, kept: set[int]) -> None:
    found, total = drawn(top_p=top_p), LIKELY[sorted(kept)].sum()
    assert set(found) == kept
    for token in kept:
        share = float(LIKELY[token] / total)
        assert found[token] / DRAWS == pytest.approx(share, abs=4 * (share / DRAWS) ** 0.5)


@pytest.mark.parametrize("how", [{"temperature": 1e-50}, {"temperature": 1e-320}, {"top_p": 1e-46}])
def test_the_smallest_numbers_take_the_likeliest(how: dict[str, float]) -> None:
    assert set(drawn(**how)) == {1}


def test_what_is_impossible_is_never_drawn() -> None:
    class Least(random.Random):
        def random(self) -> float:
            return 0.0

    logits = torch.tensor([[-torch.inf, 1.0, 1.0, -torch.inf]])
    assert choose(logits, [Sampling()], [Least()]) == [1]


@pytest.fixture
def byte_tokenizer() -> Tokenizer:
    """A tokenizer as Llama 2's: what it has no word for it spells in bytes."""
    words = ["<s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁the", "▁a", "x", "▁"]
    model = models.BPE(
        vocab={word: k for k, word in enumerate(words)}, merges=[], byte_fallback=True
    )
    tokenizer = Tokenizer(model)
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return tokenizer


def streamed(tokenizer: Tokenizer, ids: list[int], *stop: str) -> str:
    stream = TextStream(tokenizer, stop)
    return "".join([*(stream.add(id) for id in ids), stream.end()])


def test_text_that_streams_is_the_whole_text(byte_tokenizer: Tokenizer) -> None:
    for text in ("the▁the▁a", "▁the€▁a😀x", "日本▁the"):
        ids = byte_tokenizer.encode(text).ids
        assert streamed(byte_tokenizer, ids) == byte_tokenizer.decode(ids)


def test_bytes_that_are_no_text_do_not_stop_a_stream(byte_tokenizer: Tokenizer) -> None:
    def byte(value: int) -> int:
        return byte_tokenizer.get_vocab()[f"<0x{value:02X}>"]

    the = byte_tokenizer.get_vocab()["▁the"]
    told = streamed(byte_tokenizer, [the, byte(0xC3), byte(0xA9), byte(0xFF), the, byte(0xE2)])
    assert told.startswith("theé")
    assert " the" in told
    assert told.endswith("\ufffd")
