"""Pre-training: isolated rows, a schedule that can be cut, the same run from the same seed."""

import itertools
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sae_ray.tiny.corpus import public_pages, real_corpus
from sae_ray.tiny.pretrain import (
    IGNORED,
    PretrainConfig,
    batches,
    cut,
    held_out_loss,
    learning_rate,
    logits_at,
    new_model,
    new_optimiser,
    pad,
    pretrain,
)
from sae_ray.tiny.split import is_held_out
from sae_ray.tiny.tokens import train_tokenizer

CONFIG = PretrainConfig(num_steps=6, tokens_per_batch=256, warmup_steps=2)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return train_tokenizer(["Ana has 12 plums.", "Tom mends the net."] * 20, 300)


def instances() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(5, 250, size=n).astype(np.int32) for n in rng.integers(3, 60, size=50)]


def run(tokenizer: PreTrainedTokenizerBase, seed: int) -> tuple[PreTrainedModel, list[float]]:
    model = new_model(tokenizer, seed)
    steps = pretrain(model, new_optimiser(model, CONFIG), instances(), CONFIG)
    return model, [step.loss for step in steps]


def test_the_same_seed_trains_the_same_model(tokenizer: PreTrainedTokenizerBase) -> None:
    first, losses = run(tokenizer, 0)
    second, again = run(tokenizer, 0)
    assert losses == again
    assert losses[-1] < losses[0]
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)
    assert run(tokenizer, 1)[1] != losses


def test_a_stopped_run_goes_on_as_if_it_had_not_stopped(tokenizer: PreTrainedTokenizerBase) -> None:
    whole, losses = run(tokenizer, 0)
    model = new_model(tokenizer, 0)
    optimiser = new_optimiser(model, CONFIG)
    first = list(itertools.islice(pretrain(model, optimiser, instances(), CONFIG), 3))
    rest = list(pretrain(model, optimiser, instances(), CONFIG, start_step=3))
    assert [step.loss for step in first + rest] == losses
    for a, b in zip(model.parameters(), whole.parameters(), strict=True):
        assert torch.equal(a, b)


def test_each_pass_reads_every_instance_once_within_the_budget() -> None:
    data = instances()
    seen: list[bytes] = []
    for rows in batches(data, CONFIG):
        assert rows.numel() <= CONFIG.tokens_per_batch
        seen += [row[row != IGNORED].to(torch.int32).numpy().tobytes() for row in rows]
        if len(seen) >= len(data):
            break
    assert sorted(seen) == sorted(instance.tobytes() for instance in data)


def test_a_row_is_not_changed_by_its_neighbours(tokenizer: PreTrainedTokenizerBase) -> None:
    model = new_model(tokenizer, 0).eval()
    short, long = instances()[0][:5], instances()[1][:20]
    both = pad([short, long])
    kept = both[:, 1:] != IGNORED
    with torch.no_grad():
        alone = logits_at(model, pad([short]), torch.ones(1, 4, dtype=torch.bool))
        beside = logits_at(model, both, kept)[:4]
    torch.testing.assert_close(alone, beside, atol=1e-5, rtol=1e-4)


def test_the_rate_warms_up_stays_and_falls_to_zero() -> None:
    config = PretrainConfig(num_steps=100, warmup_steps=10, decay_share=0.3, learning_rate=1.0)
    rates = [learning_rate(config, step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[10:70] == [1.0] * 60
    assert rates[71:] == sorted(rates[71:], reverse=True)
    assert rates[-1] == pytest.approx(1 / 30)
    longer = PretrainConfig(num_steps=200, warmup_steps=10, decay_share=0.3, learning_rate=1.0)
    assert rates[:70] == [learning_rate(longer, step) for step in range(70)]


def test_the_loss_of_an_untrained_model_is_about_uniform(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    loss = held_out_loss(new_model(tokenizer, 0), instances())
    assert loss == pytest.approx(np.log(len(tokenizer)), rel=0.05)


def test_long_documents_are_cut_and_single_tokens_left_out() -> None:
    assert [piece.tolist() for piece in cut(range(7), 3)] == [[0, 1, 2], [3, 4, 5]]


def test_only_permitted_rows_that_are_not_held_out_are_read(tmp_path: Path) -> None:
    licences = ("MIT", "ODC-By", "CC BY 4.0", "Apache-2.0 (carrier); source data keep theirs")
    rows = [
        {
            "id": f"{licence}-{i}",
            "licence": licence,
            "messages": [{"role": "user", "content": f"{licence}|{i}"}],
        }
        for licence in licences
        for i in range(20)
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "pool.parquet")
    corpus = real_corpus(tmp_path / "pool.parquet", None)
    read = {chat[0]["content"] for chat in corpus.chats}
    wanted = {
        row["messages"][0]["content"]
        for row in rows
        if row["licence"] in licences[:3] and not is_held_out(row["id"])
    }
    assert read == wanted
    assert len(read) + len(corpus.held_out_chats) == 60
    assert corpus.pages == []


def test_only_english_pages_in_the_public_domain_are_read(tmp_path: Path) -> None:
    english = "In the beginning of the year the house and the senate met to hear that the war ended"
    finnish = "Alussa loi Jumala taivaan ja maan ja maa oli autio ja tyhjä"
    rows = [
        {"source": source, "licence": "public domain or free", "text": text}
        for source in ("nltk/genesis", "nltk/abc", "nltk/webtext", "tinystories")
        for text in (english, finnish)
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "text.parquet")
    pages = public_pages(tmp_path / "text.parquet")
    assert [(page["source"], page["text"]) for page in pages] == [("nltk/genesis", english)]
