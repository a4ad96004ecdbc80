"""Scored rows are what the plain way gives: whole model, sae-lens, one conversation at a time."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from sae_ray.chat import Conversation, Message
from sae_ray.curate import scorer as scorer_module
from sae_ray.curate.block import SEGMENTS, IndexBlock
from sae_ray.curate.scorer import LatentScorer, ScorerConfig, check_pair
from sae_ray.errors import ModelError

# sae-lens imports what it knows to be deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:The 'utils' module has been deprecated")

SHARED_LM = Path(__file__).parents[4] / "shared" / "models" / "pool-lm-2.6m"
SHARED_SAE = SHARED_LM / "sae_blocks.2.hook_resid_post"
HOOK = "blocks.1.hook_resid_post"


def conversation(*contents: str) -> Conversation:
    roles = ("user", "assistant")
    messages = [Message(role=roles[i % 2], content=text) for i, text in enumerate(contents)]
    return Conversation(f"id of {contents[0][:20]}", messages)


TALKS = [
    conversation("Write a query that counts the orders.", "select count(*) from orders"),
    conversation("Hi", "Good day! What can I do for you? 日本語 👩🏽\u200d🔬", "Nothing", "Bye"),
    conversation("Only a question?"),
    conversation("a", "b"),
    conversation("user", "assistant <|im_end|>\nof each customer " * 9),
]


def load(lm: Path, sae: Path, **settings: Any) -> LatentScorer:
    settings = {"dtype": "float32"} | settings
    return LatentScorer.load(ScorerConfig(str(lm), str(sae), **settings))


def score(scorer: LatentScorer, talks=TALKS) -> IndexBlock:
    scored = scorer(talks, range(len(talks)))
    assert not scored.unreadable
    return scored.block


def segments(tokenizer, talk: Conversation) -> tuple[list[int], np.ndarray]:
    """Ids, and of each token 0 for prompt, 1 for response, 2 for template (ChatML, by hand)."""
    text, owner = "", np.zeros(0, dtype=int)
    for message in talk.messages:
        kind = 1 if message["role"] == "assistant" else 0
        parts = ((f"<|im_start|>{message['role']}\n", 2), (message["content"], kind))
        for part, who in (*parts, ("<|im_end|>\n", 2)):
            text += part
            owner = np.append(owner, np.full(len(part), who))
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    return encoded["input_ids"], owner[[start for start, _ in encoded["offset_mapping"]]]


@torch.no_grad()
def plainly(lm: Path, sae: Path, talks: list[Conversation]) -> dict[str, np.ndarray]:
    """Pool with the whole model, sae-lens' encode on every token, and numpy, one by one."""
    from sae_lens import SAE  # noqa: PLC0415 - seconds, once

    model = AutoModelForCausalLM.from_pretrained(lm, attn_implementation="eager").eval()
    tokenizer, encoder = AutoTokenizer.from_pretrained(lm), SAE.load_from_disk(sae)
    rows: dict[str, list] = {"mean": [], "max": [], "count": [], "hidden": [], "n_tokens": []}
    on_template = []
    for talk in talks:
        ids, owner = segments(tokenizer, talk)
        x = model(torch.tensor([ids]), output_hidden_states=True).hidden_states[2][0]
        z = encoder.encode(x).numpy()
        on_template.append((z[owner == 2] > 0).sum(0))
        for name, values, pool in (
            ("mean", z, lambda v: v.mean(0)),
            ("max", z, lambda v: v.max(0)),
            ("count", z, lambda v: (v > 0).sum(0)),
            ("hidden", x.numpy(), lambda v: v.mean(0)),
        ):
            parts = [values[owner == s] for s in (0, 1)]
            empty = np.zeros(values.shape[1])
            rows[name].append([pool(part) if len(part) else empty for part in parts])
        rows["n_tokens"].append([(owner == s).sum() for s in (0, 1)])
    return {name: np.array(values) for name, values in rows.items()} | {
        "template": np.sum(on_template, axis=0)
    }


def test_rows_equal_the_plain_way_for_every_family(any_tiny_lm, tiny_sae):
    expected = plainly(any_tiny_lm, tiny_sae, TALKS)
    scored = load(any_tiny_lm, tiny_sae, batch_tokens=300)(TALKS, range(10, 15))
    block = scored.block
    assert block.ids == [talk.id for talk in TALKS]
    assert block.rows.tolist() == [10, 11, 12, 13, 14]
    np.testing.assert_array_equal(block.n_tokens, expected["n_tokens"])
    np.testing.assert_allclose(block.hidden, expected["hidden"], rtol=1e-4, atol=1e-4)
    for s, segment in enumerate(SEGMENTS):
        for how in ("mean", "max"):
            pooled = block.pooled(how, segment).toarray()
            np.testing.assert_allclose(pooled, expected[how][:, s], rtol=1e-4, atol=1e-4)
        off = np.abs(block.pooled("count", segment).toarray() - expected["count"][:, s])
        assert off.sum() <= 1e-3 * expected["count"].sum()  # at the threshold, kernels differ
        l1 = expected["mean"][:, s].sum(1)
        np.testing.assert_allclose(block.l1[:, s], l1, rtol=1e-4, atol=1e-4)
    assert np.abs(scored.template_counts - expected["template"]).sum() <= 2
    lengths = [len(segments(AutoTokenizer.from_pretrained(any_tiny_lm), t)[0]) for t in TALKS]
    assert scored.template_tokens == sum(lengths) - expected["n_tokens"].sum()


def assert_close(a: IndexBlock, b: IndexBlock) -> None:
    assert a.ids == b.ids
    for how in ("mean", "max"):
        for segment in SEGMENTS:
            np.testing.assert_allclose(
                a.pooled(how, segment).toarray(),
                b.pooled(how, segment).toarray(),
                rtol=1e-4,
                atol=1e-4,
            )
    np.testing.assert_allclose(a.hidden, b.hidden, rtol=1e-4, atol=1e-5)


def test_rows_do_not_depend_on_their_batch(tiny_lm, tiny_sae, monkeypatch):
    whole = score(load(tiny_lm, tiny_sae))
    assert_close(score(load(tiny_lm, tiny_sae, batch_tokens=1)), whole)
    alone = [score(load(tiny_lm, tiny_sae), [talk]) for talk in TALKS]
    assert_close(IndexBlock.concatenate(alone), whole)
    monkeypatch.setattr(scorer_module, "MAX_POOLED_VALUES", 64 * 2 * 2)
    scorer = load(tiny_lm, tiny_sae)
    batches = scorer._batches(list(range(5)), scorer._tokenize(TALKS))
    assert [len(batch) for batch in batches] == [2, 2, 1]
    assert_close(score(scorer), whole)


def test_the_same_call_gives_the_same_bits(tiny_lm, tiny_sae):
    first, second = (score(load(tiny_lm, tiny_sae)).to_table() for _ in range(2))
    assert first.equals(second)


def wide_sae(path: Path, d_sae: int = 5000) -> Path:
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(32, d_sae, generator=generator)
    weights = {"W_enc": W, "W_dec": W.T.contiguous(), "b_enc": torch.zeros(d_sae)}
    path.mkdir()
    save_file(weights | {"b_dec": torch.zeros(32)}, path / "sae_weights.safetensors")
    config = {"d_in": 32, "d_sae": d_sae, "architecture": "standard"}
    config |= {"apply_b_dec_to_input": False, "metadata": {"hook_name": HOOK}}
    (path / "cfg.json").write_text(json.dumps(config))
    return path


def test_of_a_wide_sae_the_strongest_by_maximum_and_by_mean_are_kept(tiny_lm, tmp_path):
    sae = wide_sae(tmp_path / "wide")
    kept = score(load(tiny_lm, sae, top_latents=20))
    whole = score(load(tiny_lm, sae, top_latents=5000))
    for row in range(len(TALKS)):
        maxima, means = (whole.pooled(how).toarray()[row] for how in ("max", "sum"))
        expected = set(np.argsort(-maxima)[:20]) | set(np.argsort(-means)[:20])
        one = kept.take([row])
        assert set(one.latents.tolist()) == expected
        assert (np.diff(one.latents) > 0).all()
        np.testing.assert_array_equal(
            one.pooled("max").toarray()[0, one.latents], maxima[one.latents]
        )
    np.testing.assert_array_equal(kept.l1, whole.l1)
    assert (kept.l1 > kept.pooled().sum(1).max() * 2).any(), "mass of latents left out is counted"


def test_a_trace_peaks_at_the_pooled_maxima_and_says_the_contents(tiny_lm, tiny_sae):
    scorer = load(tiny_lm, tiny_sae)
    block = score(scorer)
    for row, talk in enumerate(TALKS):
        trace = scorer.trace(talk)
        assert "".join(trace.texts) == "".join(m["content"] for m in talk.messages)
        maxima = block.pooled("max").toarray()[row]
        np.testing.assert_allclose(trace.latents.max(0), maxima, rtol=1e-4, atol=1e-4)
    chosen = np.array([40, 3])
    for talk, trace in zip(TALKS, scorer.traces(TALKS, chosen), strict=True):
        expected = scorer.trace(talk)
        assert trace.texts == expected.texts
        np.testing.assert_allclose(trace.latents, expected.latents[:, chosen], rtol=1e-4, atol=1e-4)


def test_rows_that_cannot_be_read_say_why_and_the_others_keep_their_places(tiny_lm, tiny_sae):
    scorer = load(tiny_lm, tiny_sae)
    talks = [conversation("", ""), TALKS[0], conversation("x\ud800", "y"), TALKS[1]]
    scored = scorer(talks, [5, 6, 7, 8])
    assert scored.unreadable.keys() == {0, 2}
    assert scored.unreadable[0] == "no content tokens"
    assert "surrogates" in scored.unreadable[2]
    assert scored.block.rows.tolist() == [6, 8]
    assert_close(scored.block, score(scorer, TALKS[:2]))
    assert [len(trace.texts) > 0 for trace in scorer.traces(talks, np.array([0]))] == [0, 1, 0, 1]


@pytest.mark.parametrize("talks", [[], [conversation("", "")]])
def test_without_a_readable_row_the_block_is_empty(talks, tiny_lm, tiny_sae):
    block = load(tiny_lm, tiny_sae)(talks, range(len(talks))).block
    assert (len(block), block.pooled().shape, block.hidden.shape) == (0, (0, 64), (0, 2, 32))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_row_whose_activations_are_not_finite_is_unreadable(value, tiny_lm, tiny_sae):
    scorer = load(tiny_lm, tiny_sae)
    clean = score(scorer)
    (poison,) = scorer.tokenizer.tokenizer("?", add_special_tokens=False)["input_ids"]
    scorer.lm.model.get_input_embeddings().get_parameter("weight").data[poison] = value
    scored = scorer(TALKS, range(5))
    assert scored.unreadable == dict.fromkeys((1, 2), "activations are not finite")
    assert_close(scored.block, clean.take([0, 3, 4]))


def test_a_model_is_given_no_more_tokens_than_it_has_positions(tiny_lm_of, tiny_sae):
    scorer = load(tiny_lm_of("gpt2"), tiny_sae)
    assert scorer.max_tokens == 512
    block = score(scorer, [conversation("orders " * 2000, "never read"), TALKS[0]])
    assert block.truncated.tolist() == [True, False]
    assert block.n_tokens[0, 0] > 500
    assert block.n_tokens[0, 1] == 0


def edited(sae: Path, to: Path, **config) -> Path:
    to.mkdir()
    values = json.loads((sae / "cfg.json").read_text()) | config
    (to / "cfg.json").write_text(json.dumps(values))
    save_file(load_file(sae / "sae_weights.safetensors"), to / "sae_weights.safetensors")
    return to


def test_a_sae_of_another_width_or_a_missing_layer_is_refused(tiny_lm, tiny_sae, tmp_path):
    names = {"hook_name": "blocks.7.hook_resid_post", "model_name": "tiny"}
    high = edited(tiny_sae, tmp_path / "high", metadata=names)
    with pytest.raises(ModelError, match="has layers 0 to 2"):
        check_pair(ScorerConfig(str(tiny_lm), str(high)))
    narrow = tmp_path / "narrow"
    narrow.mkdir()
    weights = load_file(tiny_sae / "sae_weights.safetensors")
    weights |= {"W_enc": torch.ones(8, 64), "W_dec": torch.ones(64, 8), "b_dec": torch.ones(8)}
    save_file(weights, narrow / "sae_weights.safetensors")
    config = json.loads((tiny_sae / "cfg.json").read_text()) | {"d_in": 8}
    (narrow / "cfg.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"reads 8 values a token, but blocks\.1.* holds 32: give"):
        check_pair(ScorerConfig(str(tiny_lm), str(narrow)))


def test_a_random_sae_is_refused_unless_asked_for(tiny_lm, tiny_sae):
    with pytest.raises(ModelError, match=r"leaves \d+% of the variance at blocks\.1.*switch"):
        load(tiny_lm, tiny_sae).check_fit(TALKS)
    fvu = load(tiny_lm, tiny_sae, check_fit=False).check_fit(TALKS)
    assert fvu is not None
    assert fvu > 0.8


def test_a_fit_is_not_judged_on_a_handful_of_tokens_nor_for_a_transcoder(tiny_lm, tiny_sae):
    scorer = load(tiny_lm, tiny_sae)
    assert scorer.check_fit([TALKS[3]]) is None
    assert scorer.check_fit([conversation("", "")]) is None
    scorer.encoder = dataclasses.replace(scorer.encoder, is_transcoder=True)
    assert scorer.check_fit(TALKS) is None


@pytest.fixture
def real_talks() -> list[Conversation]:
    if not SHARED_LM.is_dir():
        pytest.skip("the small real model (../shared/models/pool-lm-2.6m) is not on this machine")
    question = "Natalia sold clips to 48 of her friends in April, and then half as many in May."
    talks = [conversation(question, "She sold 24 in May, so 48 + 24 = 72 in all."), *TALKS]
    return [Conversation(f"{i}", talk.messages) for i, talk in enumerate(talks * 4)]


def test_the_right_sae_fits_and_that_of_another_model_does_not(real_talks, tmp_path):
    fvu = load(SHARED_LM, SHARED_SAE).check_fit(real_talks)
    assert fvu is not None
    assert 0 < fvu < 0.6
    other = edited(SHARED_SAE, tmp_path / "other")
    weights = load_file(other / "sae_weights.safetensors")
    permuted = torch.randperm(192, generator=torch.Generator().manual_seed(0))
    weights |= {"W_enc": weights["W_enc"][permuted], "W_dec": weights["W_dec"][:, permuted]}
    save_file({n: w.contiguous() for n, w in weights.items()}, other / "sae_weights.safetensors")
    with pytest.raises(ModelError, match="was trained on another model or layer"):
        load(SHARED_LM, other).check_fit(real_talks)


def test_in_bfloat16_real_rows_agree_to_two_percent(real_talks, shared_data):
    columns = pq.ParquetFile(shared_data / "pool.parquet").read_row_group(0, ["id", "messages"])
    rows = columns.slice(0, 40).to_pylist()
    talks = [Conversation(row["id"], row["messages"]) for row in rows]
    exact = score(load(SHARED_LM, SHARED_SAE), talks).pooled().toarray()
    halved = score(load(SHARED_LM, SHARED_SAE, dtype="bfloat16"), talks).pooled().toarray()
    assert np.linalg.norm(halved - exact) / np.linalg.norm(exact) < 0.02
