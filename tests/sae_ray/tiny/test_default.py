"""What is shipped: it loads, it is small, and its card has its figures."""

import json
import re
import statistics

import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from sae_ray import tiny
from sae_ray.tiny import card
from sae_ray.tiny.exam import replies
from sae_ray.tiny.skills import LABELS
from sae_ray.tiny.tokens import ASSISTANT, END, USER, render


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(tiny.lm_path())


def test_all_of_it_is_at_most_16_megabytes_and_no_file_over_6() -> None:
    sizes = [path.stat().st_size for path in tiny.DEFAULT.rglob("*") if path.is_file()]
    assert sum(sizes) <= 16e6
    assert max(sizes) <= 6e6


def test_the_tokenizer_gives_back_any_text(tokenizer: PreTrainedTokenizerBase) -> None:
    for text in ("Ana has 12 plums, 3 nets.", "naïve – 漢字 \U0001f600\n\ttab", ""):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids) == text


def test_numbers_are_read_digit_by_digit(tokenizer: PreTrainedTokenizerBase) -> None:
    assert tokenizer.tokenize("1234") == ["1", "2", "3", "4"]


def test_the_template_marks_roles_by_special_tokens(tokenizer: PreTrainedTokenizerBase) -> None:
    messages = [{"role": "user", "content": " Hi "}, {"role": "assistant", "content": "Yes."}]
    assert render(tokenizer, messages) == f"{USER}Hi{END}{ASSISTANT}Yes.{END}"
    asked = render(tokenizer, messages[:1], generation_prompt=True)
    assert asked == f"{USER}Hi{END}{ASSISTANT}"
    vocabulary = tokenizer.get_vocab()
    assert {vocabulary[token] for token in (USER, ASSISTANT, END)} <= set(
        tokenizer.added_tokens_decoder
    )


def test_the_model_answers_in_the_form_it_was_taught(tokenizer: PreTrainedTokenizerBase) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny.lm_path(), dtype=torch.float32)
    greeting = [{"role": "user", "content": "Hello, I am Nora."}]
    (reply,) = replies(model, tokenizer, [greeting], max_new_tokens=40)
    # It was cut off at the end-of-turn token, well before there was no more room.
    assert 0 < len(tokenizer(reply)["input_ids"]) < 40
    assert "Nora" in reply or "meet" in reply


def test_labels_belong_to_the_shipped_sae() -> None:
    labels = json.loads(tiny.labels_path().read_text(encoding="utf-8"))
    config = json.loads((tiny.sae_path() / "cfg.json").read_text())
    assert [row["latent"] for row in labels["latents"]] == list(range(config["d_sae"]))
    assert config["metadata"]["hook_name"] == tiny.HOOK_POINT
    assert sum(row["kind"] != "unlabelled" for row in labels["latents"]) >= 200
    for row in labels["latents"]:
        assert (row["auc"] is None) == (row["kind"] == "unlabelled")
        assert row["auc"] is None or row["auc"] >= 0.75


def test_files_have_the_columns_that_the_paths_promise() -> None:
    chat = {"id", "domain", "concepts", "spans", "messages"}
    columns = {
        tiny.pool_path(): chat,
        tiny.eval_path(): chat | {"answer", "metric"},
        tiny.preferences_path(): {"id", "domain", "prompt", "chosen", "rejected"},
        tiny.safety_path(): {"id", "harmful", "prompt"},
        tiny.text_path(): {"source", "licence", "text"},
    }
    for path, names in columns.items():
        assert set(pq.read_schema(path).names) == names, path.name


def test_the_card_says_what_the_figures_say() -> None:
    figures = json.loads((tiny.DEFAULT / "figures.json").read_text())
    text = card.path_for(tiny.DEFAULT).read_text()
    assert text == card.of_folder(tiny.DEFAULT)
    assert f"FVU {figures['sae']['fvu']:.3f}" in text
    for loss in figures["lm"]["loss"].values():
        assert f"{loss:.3f} nats" in text


def test_the_default_leaves_room_for_experts_and_reads_well() -> None:
    figures = json.loads((tiny.DEFAULT / "figures.json").read_text())
    headroom = json.loads((tiny.DEFAULT / "headroom.json").read_text())
    accuracy = figures["lm"]["accuracy"]
    roomy = [
        domain
        for domain, measured in headroom.items()
        if accuracy[domain] <= 0.4
        # Above what the base does, and above what knowing the labels alone would give.
        and measured["gain"] >= 0.15
        and statistics.mean(measured["expert"]) >= 0.15 + 1 / len(LABELS.get(domain, range(100)))
    ]
    assert len(roomy) >= 6
    assert all(len(headroom[domain]["expert"]) >= 3 for domain in roomy)
    assert figures["sae"]["fvu"] <= 0.15
    assert 24 <= figures["sae"]["l0"] <= 40


def test_the_card_names_no_domain_that_is_not_there() -> None:
    text = card.path_for(tiny.DEFAULT).read_text()
    metrics = json.loads((tiny.DEFAULT / "figures.json").read_text())["metrics"]
    for domain in metrics:
        assert re.search(rf"^\| {domain} \|", text, re.MULTILINE)
