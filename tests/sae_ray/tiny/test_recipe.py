"""The recipe: a stopped pre-training goes on from its file, and the card tells what was read."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from sae_ray import tiny
from sae_ray.tiny import card
from sae_ray.tiny.pretrain import PretrainConfig
from sae_ray.tiny.recipe import Material, halves, pretrain_lm
from sae_ray.tiny.split import is_held_out
from sae_ray.tiny.tokens import train_tokenizer

CONFIG = PretrainConfig(num_steps=4, tokens_per_batch=128, warmup_steps=1)


@pytest.fixture(scope="module")
def material() -> Material:
    rng = np.random.default_rng(0)
    rows = [rng.integers(5, 250, size=20).astype(np.int32) for _ in range(40)]
    tokenizer = train_tokenizer(["Ana has 12 plums.", "Tom mends the net."] * 20, 300)
    parts = {"generated chats": rows[:20], "real chats": rows[20:]}
    return Material(tokenizer=tokenizer, parts=parts, held_out={})


def test_a_stopped_pretraining_goes_on_to_the_same_weights(
    material: Material, tmp_path: Path
) -> None:
    work = tmp_path / "work"
    first = pretrain_lm(material, CONFIG, tmp_path / "stopped", work, save_every=2)
    assert [step.number for step in itertools.islice(first, 3)] == [0, 1, 2]
    del first
    assert not (tmp_path / "stopped").exists()
    rest = list(pretrain_lm(material, CONFIG, tmp_path / "stopped", work, save_every=2))
    assert [step.number for step in rest] == [2, 3]
    list(pretrain_lm(material, CONFIG, tmp_path / "whole", tmp_path / "other"))
    weights = [tmp_path / name / "model.safetensors" for name in ("stopped", "whole")]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_what_is_written_loads_as_any_model_does(material: Material, tmp_path: Path) -> None:
    list(pretrain_lm(material, CONFIG, tmp_path / "lm", tmp_path / "work"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "lm")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "lm")
    assert model.config.vocab_size == len(tokenizer)
    assert model.config.eos_token_id == tokenizer.eos_token_id
    assert tokenizer.chat_template == material.tokenizer.chat_template


def test_halves_part_rows_by_their_ids() -> None:
    rows = [{"id": str(number)} for number in range(50)]
    seen, unseen = halves(rows)
    assert len(seen) + len(unseen) == 50
    assert all(is_held_out(row["id"]) for row in unseen)
    assert not any(is_held_out(row["id"]) for row in seen)


def test_the_sae_reads_every_chat_of_the_generator_and_a_third_of_the_real(
    material: Material,
) -> None:
    row = {"messages": [{"role": "user", "content": "Tom mends the net."}]}
    chats = material.chats([row])
    assert len(chats) == 20 + 7 + 1


def test_a_card_without_real_data_says_so() -> None:
    figures = json.loads((tiny.DEFAULT / "figures.json").read_text())
    labels = json.loads(tiny.labels_path().read_text(encoding="utf-8"))
    figures["lm"]["num_tokens"] |= {"real chats": 0, "real text": 0}
    text = card.render(figures, {}, labels, 1)
    assert "No real text was given" in text
    assert "--pool" not in text
    assert "not measured" in text
