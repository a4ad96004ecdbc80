import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from sae_ray.artifacts import Source
from sae_ray.errors import PoolError, RegistryError
from sae_ray.experts.card import ExpertCard
from sae_ray.experts.files import record_files
from sae_ray.experts.prototypes import (
    PROTOTYPES,
    STRONGEST,
    Eyes,
    draw_prompts,
    encode,
    prototypes_of,
    requests,
)
from sae_ray.experts.registry import Expert, ExpertRegistry


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def test_requests_are_what_the_user_asks_before_each_reply() -> None:
    turns = [turn("system", "Be kind"), turn("user", "a"), turn("user", "b")]
    turns += [turn("assistant", "c"), turn("user", "d")]
    assert requests(turns) == ["a\n\nb", "d"]
    assert requests([*turns, turn("assistant", "e")]) == ["a\n\nb", "d"]
    assert requests([turn("system", "Be kind")]) == []


def test_a_trace_tells_where_in_a_prompt_its_latents_are_on(eyes: Eyes) -> None:
    prompt = "Put these in order:\n9, 2, 5"
    block = eyes.read([prompt])
    trace = eyes.trace(prompt, block.latents.tolist())
    assert "".join(trace.texts) == prompt
    assert trace.latents.shape == (block.n_tokens[0, 0], STRONGEST)
    np.testing.assert_allclose(trace.latents.mean(axis=0), block.means[:, 0], rtol=1e-4)
    assert eyes.trace("", [7]).texts == []


def registered(folder: Path, eyes: Eyes, content: bytes | None, data: str, base: str) -> Expert:
    (folder / "adapter").mkdir(parents=True)
    save_file({"lora_A": torch.ones(2, 3)}, folder / "adapter" / "adapter_model.safetensors")
    if content is not None:
        (folder / "adapter" / PROTOTYPES).write_bytes(content)
    card = ExpertCard(
        name="one",
        description="",
        adapter="lora",
        objective="sft",
        base="embedded",
        base_sha256=base,
        files=record_files(str(folder / "adapter")),
        sources={"data": Source(name=data)},
        num_parameters=6,
        share=0.01,
        measures=[],
    )
    return ExpertRegistry(str(folder / "registry")).register(card, str(folder / "adapter"))


def test_of_a_long_prompt_the_end_is_read(eyes: Eyes) -> None:
    question = "Put these numbers in order: 3, 1, 2. " * 200
    block = eyes.read(["Once upon a time. " * 2000 + question, question])
    np.testing.assert_array_equal(block.hidden[0, 0], block.hidden[1, 0])
    # And of the end it is told where latents are on.
    latents = block.latents[:3].tolist()
    traces = [
        eyes.trace(one, latents) for one in ("Once upon a time. " * 2000 + question, question)
    ]
    assert traces[0].texts == traces[1].texts
    np.testing.assert_array_equal(traces[0].latents, traces[1].latents)


def test_no_trace_runs_while_a_prompt_is_read(eyes: Eyes) -> None:
    # Hooks on the one model would show each of them what the other reads.
    with ThreadPoolExecutor(1) as threads:
        with eyes._reading:
            traced = threads.submit(eyes.trace, "Put these in order", [7])
            with pytest.raises(TimeoutError):
                traced.result(timeout=0.5)
        assert traced.result(timeout=60).texts


def test_prototypes_come_back_from_a_file_or_are_read_from_the_data_now(
    tmp_path: Path, eyes: Eyes, prompts: Mapping[str, list[str]]
) -> None:
    texts = prompts["velan"][:20]
    data = tmp_path / "rows.jsonl"
    rows = [{"messages": [turn("user", one), turn("assistant", "ok")]} for one in texts]
    data.write_text("\n".join(map(json.dumps, [*rows, rows[0]])))
    assert sorted(draw_prompts(str(data), 100)) == sorted(texts)
    assert len(draw_prompts(str(data), 7)) == 7
    block = eyes.read(texts)
    assert np.diff(block.indptr).max() == STRONGEST
    content = encode(eyes, block)
    assert len(content) < 30_000  # of 20 prompts: 1.3 kB each
    (tmp_path / PROTOTYPES).write_bytes(content)
    with safe_open(tmp_path / PROTOTYPES, "np") as opened:
        assert opened.metadata()["dtype"] == eyes.scorer.config.dtype

    kept = registered(tmp_path / "kept", eyes, content, "/gone", eyes.lm)
    found = prototypes_of(kept, str(tmp_path / "kept/registry"), eyes)
    assert np.array_equal(found.hidden_mean(), block.hidden_mean())
    assert (found.pooled("mean") != block.pooled("mean")).nnz == 0  # pyright: ignore

    bare = registered(tmp_path / "bare", eyes, None, str(data), eyes.lm)
    found = prototypes_of(bare, str(tmp_path / "bare/registry"), eyes)
    assert sorted(found.hidden_mean()[:, 0]) == pytest.approx(
        sorted(block.hidden_mean()[:, 0]), abs=1e-4
    )

    other = Eyes(eyes.scorer, eyes.lm, "0" * 64)  # another SAE's prototypes are read again
    stale = registered(
        tmp_path / "stale", eyes, encode(other, block.take(range(3))), str(data), eyes.lm
    )
    assert len(prototypes_of(stale, str(tmp_path / "stale/registry"), eyes)) == 20


def test_an_expert_that_cannot_be_known_is_refused(tmp_path: Path, eyes: Eyes) -> None:
    lost = registered(tmp_path / "lost", eyes, None, str(tmp_path / "gone.jsonl"), eyes.lm)
    with pytest.raises(RegistryError, match="put the data back"):
        prototypes_of(lost, str(tmp_path / "lost/registry"), eyes)
    foreign = registered(tmp_path / "foreign", eyes, None, "/gone", "f" * 64)
    with pytest.raises(RegistryError, match="another base"):
        prototypes_of(foreign, str(tmp_path / "foreign/registry"), eyes)
    silent = tmp_path / "silent.jsonl"
    silent.write_text(json.dumps({"messages": [turn("assistant", "hm")]}))
    with pytest.raises(PoolError):
        draw_prompts(str(silent), 5)
