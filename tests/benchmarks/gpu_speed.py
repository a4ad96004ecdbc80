"""Reading latents on a GPU: conversations a second and the share of the matmul peak.

    python tests/benchmarks/gpu_speed.py --pool P --tokenizer M --out gpu_speed.json

A model of Llama-3.2-1B's shape and a SAE of 16,384 latents at half its depth, both of random
weights: speed does not depend on what they know. Ours (`LatentScorer`) and the plain way read the
same conversations; each at the best of several batch sizes, in bf16. Needs one GPU, and no Ray.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import torch
from contestants import count_work
from measure import read_sample
from plain import PlainWay
from safetensors.torch import save_file
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from sae_ray import tiny
from sae_ray.chat import Kind, Tokens
from sae_ray.curate.scorer import LatentScorer, ScorerConfig

LAYERS, WIDTH, LATENTS, HOOK = 16, 2048, 16_384, "blocks.8.hook_resid_post"


def save_random_pair(folder: Path, tokenizer_path: str) -> tuple[Path, Path]:
    """Save a random model of a 1B shape and a random JumpReLU SAE, about 300 latents on."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_path)
    shape = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=8192,
        num_hidden_layers=LAYERS,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=4096,
    )
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = LlamaForCausalLM(shape).bfloat16()
        W_dec = torch.nn.functional.normalize(torch.randn(LATENTS, WIDTH), dim=-1)
    model.save_pretrained(folder / "lm")
    tokenizer.save_pretrained(folder / "lm")
    (folder / "sae").mkdir()
    weights = {
        "W_enc": W_dec.T.contiguous(),
        "W_dec": W_dec,
        "b_enc": torch.zeros(LATENTS),
        "b_dec": torch.zeros(WIDTH),
        "threshold": torch.full((LATENTS,), 2.1),
    }
    save_file(
        {name: w.cpu() for name, w in weights.items()}, folder / "sae/sae_weights.safetensors"
    )
    config = {
        "d_in": WIDTH,
        "d_sae": LATENTS,
        "dtype": "float32",
        "device": "cpu",
        "architecture": "jumprelu",
        "apply_b_dec_to_input": False,
        "normalize_activations": "layer_norm",
        "metadata": {"hook_name": HOOK, "sae_lens_version": "6.54.12"},
    }
    (folder / "sae/cfg.json").write_text(json.dumps(config))
    return folder / "lm", folder / "sae"


def peak_flops() -> float:
    """Return the best rate of a large bf16 product of random matrices."""
    a, b = (torch.randn(8192, 8192, device="cuda").bfloat16() for _ in range(2))
    return 2 * 8192**3 / seconds_of(lambda: a @ b, repeats=10)


def seconds_of(work: Callable[[], object], repeats: int = 3) -> float:
    """Return the median time of a work, after one run that is not counted."""
    taken = []
    for _ in range(repeats + 1):
        torch.cuda.synchronize()
        started = time.perf_counter()
        work()
        torch.cuda.synchronize()
        taken.append(time.perf_counter() - started)
    return statistics.median(taken[1:])


def main() -> None:
    """Measure both ways and print the figures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--pool", default=tiny.pool_path(), help="Parquet: id, messages")
    parser.add_argument("--tokenizer", default=str(tiny.lm_path()))
    parser.add_argument("--rows", type=int, default=2048)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp())
    lm, sae = save_random_pair(folder, options.tokenizer)
    sample = folder / "sample.parquet"
    pq.write_table(pq.read_table(options.pool, columns=["id", "messages"])[: options.rows], sample)
    conversations = read_sample(sample)
    config = ScorerConfig(str(lm), str(sae), check_fit=False)
    ours = LatentScorer.load(config)
    tokens = [t for t in ours._tokenize(conversations) if isinstance(t, Tokens)]
    rows = list(range(len(conversations)))
    report: dict = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__}
    report["peak_tflops"] = peak_flops() / 1e12
    for batch in (8192, 32_768, 131_072):
        one = ScorerConfig(str(lm), str(sae), check_fit=False, batch_tokens=batch)
        ours.config = one
        report[f"ours, {batch} tokens a batch"] = seconds_of(lambda: ours(conversations, rows))
    report["ours, tokenising alone"] = seconds_of(lambda: ours._tokenize(conversations))
    report["gb_at_most"] = torch.cuda.max_memory_allocated() / 1e9
    del ours
    way = PlainWay(str(lm), str(sae), "bfloat16", "cuda")
    content = [t.kinds == Kind.CONTENT for t in tokens]
    for batch in (32, 128):
        report[f"plain, {batch} rows a batch"] = seconds_of(
            lambda batch=batch: way(
                conversations, content, batch_rows=batch, max_tokens=2048, length_sorted=True
            )
        )
    flops, num_tokens = count_work(config, str(sample))
    best = {
        side: min(
            v for name, v in report.items() if name.startswith(f"{side}, ") and "batch" in name
        )
        for side in ("ours", "plain")
    }
    report |= {
        "conversations": len(conversations),
        "tokens": num_tokens,
        "ours_conversations_per_s": len(conversations) / best["ours"],
        "ours_tokens_per_s": num_tokens / best["ours"],
        "ours_share_of_peak": flops / best["ours"] / (report["peak_tflops"] * 1e12),
        "times_the_plain_way": best["plain"] / best["ours"],
    }
    print(json.dumps(report, indent=1))
    if options.out:
        options.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
