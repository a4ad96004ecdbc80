"""The fast encoder gives what sae-lens gives, and its pools are plain reductions of that."""

import json
import logging
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from sae_ray.errors import ModelError
from sae_ray.lm import HookPoint
from sae_ray.sae.encoder import LatentEncoder

# sae-lens imports what it knows to be deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:The 'utils' module has been deprecated")

D_IN, D_SAE, D_OUT = 24, 160, 20
HOOK = "blocks.1.hook_resid_post"
TRAINED = ("batchtopk", "matryoshka_batchtopk", "jumprelu", "topk", "standard", "gated")
TRANSCODERS = (
    *("transcoder", "skip_transcoder", "jumprelu_transcoder", "jumprelu_skip_transcoder"),
)
INFERENCE = ("standard", "jumprelu", "gated", "topk", "topk_rescaled")
NORMS = ("none", "layer_norm", "constant_norm_rescale")


def make_sae(kind: str, *, training: bool = False, **settings):
    """An SAE of sae-lens with every parameter random, and about a tenth of the latents on."""
    import sae_lens  # noqa: PLC0415, F401 - fills the registry; seconds, once for this file
    from sae_lens.registry import SAE_CLASS_REGISTRY, SAE_TRAINING_CLASS_REGISTRY  # noqa: PLC0415
    from sae_lens.saes.sae import SAEMetadata  # noqa: PLC0415

    registry = SAE_TRAINING_CLASS_REGISTRY if training else SAE_CLASS_REGISTRY
    sae_class, config_class = registry[kind.removesuffix("_rescaled")]
    if kind.startswith("topk") or "batchtopk" in kind:
        settings |= {"k": 9, "rescale_acts_by_decoder_norm": kind.endswith("_rescaled")}
    if kind == "matryoshka_batchtopk":
        settings |= {"matryoshka_widths": [40, D_SAE]}
    if "transcoder" in kind:
        settings |= {"d_out": D_OUT, "apply_b_dec_to_input": False}
    metadata = SAEMetadata(model_name="tiny", hook_name=HOOK)
    sae = sae_class(config_class(d_in=D_IN, d_sae=D_SAE, metadata=metadata, **settings))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            random = torch.randn(parameter.shape, generator=generator)
            scale = {"W_enc": 0.3, "W_dec": 0.2, "b_dec": 3.0}.get(name, 0.4)
            parameter.copy_(random * scale)
            if name == "threshold":  # some below zero, which relu then decides
                parameter.add_(0.7)
            if name.startswith("b_enc") or name == "b_gate":
                parameter.sub_(1.0)
    return sae.eval()


def activations(num_tokens: int = 50, seed: int = 1) -> Tensor:
    """Tokens about a mean as long as the rest, as in a residual stream, and one far longer."""
    x = torch.randn(num_tokens, D_IN, generator=torch.Generator().manual_seed(seed)) * 2 + 2
    x[0] *= 10
    return x


def saved(sae, path: Path) -> LatentEncoder:
    (sae.save_inference_model if hasattr(sae, "save_inference_model") else sae.save_model)(path)
    return LatentEncoder.load(path)


def assert_same(actual: Tensor, expected: Tensor) -> None:
    assert expected.any()
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("apply_b_dec_to_input", [True, False])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("kind", INFERENCE)
@torch.no_grad()
def test_it_encodes_and_reconstructs_as_sae_lens_does(kind, norm, apply_b_dec_to_input, tmp_path):
    sae = make_sae(kind, normalize_activations=norm, apply_b_dec_to_input=apply_b_dec_to_input)
    encoder, x = saved(sae, tmp_path), activations()
    assert_same(encoder.encode(x), sae.encode(x))
    assert_same(encoder.reconstruct(x), sae(x))
    batched = x.reshape(2, 25, D_IN)
    assert_same(encoder.encode(batched), sae.encode(batched))
    assert (encoder.d_in, encoder.d_sae) == (D_IN, D_SAE)
    assert (encoder.hook_point, encoder.model_name) == (HookPoint.parse(HOOK), "tiny")


@pytest.mark.parametrize("kind", TRANSCODERS)
@torch.no_grad()
def test_it_encodes_as_transcoders_do(kind, tmp_path):
    sae = make_sae(kind)
    encoder, x = saved(sae, tmp_path), activations()
    assert_same(encoder.encode(x), sae.encode(x))
    assert encoder.is_transcoder
    with pytest.raises(AssertionError, match="writes elsewhere"):
        encoder.reconstruct(x)


@torch.no_grad()
def test_a_transcoders_own_bias_is_never_taken_from_its_input(tmp_path):
    """Its width may be the input's by chance, and its config may say so."""
    sae = make_sae("transcoder")
    sae.save_model(tmp_path)
    weights = load_file(tmp_path / "sae_weights.safetensors")
    weights |= {"W_dec": torch.randn(D_SAE, D_IN), "b_dec": torch.randn(D_IN)}
    save_file(weights, tmp_path / "sae_weights.safetensors")
    edit_config(tmp_path, d_out=D_IN, apply_b_dec_to_input=True)
    assert_same(LatentEncoder.load(tmp_path).encode(activations()), sae.encode(activations()))


@pytest.mark.parametrize("kind", TRAINED)
@torch.no_grad()
def test_what_training_saves_for_inference_is_read_as_sae_lens_reads_it(kind, tmp_path):
    from sae_lens import SAE  # noqa: PLC0415

    sae = make_sae(kind, training=True)
    if hasattr(sae, "topk_threshold"):
        sae.get_buffer("topk_threshold").fill_(0.9)
    encoder, x = saved(sae, tmp_path), activations()
    again = SAE.load_from_disk(tmp_path)
    assert_same(encoder.encode(x), again.encode(x))
    assert_same(encoder.reconstruct(x), again(x))


@pytest.mark.parametrize("apply_b_dec_to_input", [True, False])
@pytest.mark.parametrize("kind", INFERENCE)
@torch.no_grad()
def test_normalisations_folded_into_the_weights_are_read_on_raw_activations(
    kind, apply_b_dec_to_input, tmp_path
):
    x = activations()
    sae = make_sae(kind, apply_b_dec_to_input=apply_b_dec_to_input)
    expected = sae.encode(x * 0.3)
    if kind != "topk_rescaled":  # whose decoder norms, in sae-lens, change with the scale
        sae.fold_activation_norm_scaling_factor(0.3)
        assert_same(saved(sae, tmp_path / "scaled").encode(x), expected)

    sae = make_sae(kind, apply_b_dec_to_input=apply_b_dec_to_input)
    whiten = torch.randn(D_IN, D_IN, generator=torch.Generator().manual_seed(2)) / D_IN**0.5
    whiten += torch.eye(D_IN)
    mean = torch.linspace(-1, 1, D_IN)
    expected = sae.encode((x - mean) @ whiten)
    sae.fold_activation_whitening(mean, whiten, torch.linalg.inv(whiten))
    torch.testing.assert_close(
        saved(sae, tmp_path / "whitened").encode(x), expected, rtol=1e-4, atol=1e-3
    )


def test_a_normalisation_that_was_never_folded_in_is_warned_of(tmp_path, caplog):
    sae = make_sae("standard", normalize_activations="expected_average_only_in")
    with caplog.at_level(logging.WARNING):
        encoder = saved(sae, tmp_path)
    assert "expected_average_only_in" in caplog.text
    assert_same(encoder.encode(activations()), sae.encode(activations()).detach())


def test_half_precision_weights_are_read(tmp_path):
    sae = make_sae("jumprelu").to(dtype=torch.bfloat16)
    encoder, x = saved(sae, tmp_path), activations()
    expected = sae.to(dtype=torch.float32).encode(x).detach()
    assert_same(encoder.encode(x), expected)


@pytest.mark.parametrize("kind", ["jumprelu", "topk_rescaled"])
def test_chosen_latents_are_those_of_all(kind, tmp_path):
    encoder, x = saved(make_sae(kind), tmp_path), activations()
    chosen = np.array([5, 3, 158])
    torch.testing.assert_close(encoder.encode(x, chosen), encoder.encode(x)[:, chosen])


def test_a_decoder_row_of_zeros_reconstructs_nothing(tmp_path):
    sae = make_sae("topk_rescaled")
    sae.W_dec.data[7] = 0
    encoder = saved(sae, tmp_path)
    assert encoder.reconstruct(activations()).isfinite().all()
    assert not encoder.encode(activations())[:, 7].any()


def random_encoder(kind: str) -> LatentEncoder:
    """An encoder of integers, whose products and sums are exact in float32 in any order."""
    generator = torch.Generator().manual_seed(3)
    W = torch.randint(-2, 3, (6, 40), generator=generator).float()
    return LatentEncoder(
        W=W,
        b=torch.randint(-5, 1, (40,), generator=generator).float(),
        theta=torch.zeros(40) if kind == "topk" else torch.arange(40) % 4 / 1.0,
        k=3 if kind == "topk" else None,
        input_norm="none",
        W_dec=W.T.contiguous(),
        b_dec=torch.arange(6).float(),
        hook_point=HookPoint.parse(HOOK),
        model_name=None,
    )


def plain_pools(z: Tensor, lengths: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Sum, maximum and count of each run, one by one."""
    runs = z.split(lengths)
    return (
        torch.stack([run.sum(0) for run in runs]),
        torch.stack([run.amax(0) if len(run) else torch.zeros(z.shape[1]) for run in runs]),
        torch.stack([(run > 0).sum(0) for run in runs]),
    )


@pytest.mark.parametrize("kind", ["jumprelu", "topk"])
@given(
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=8),
    chunk_tokens=st.integers(1, 12),
    seed=st.integers(0, 9),
)
@example(lengths=[0, 0], chunk_tokens=4, seed=0)
@example(lengths=[25], chunk_tokens=4, seed=0)
@example(lengths=[4, 4, 4], chunk_tokens=4, seed=0)
@example(lengths=[1] * 9, chunk_tokens=4, seed=0)
@example(lengths=[3, 9, 0, 1], chunk_tokens=4, seed=0)
@settings(max_examples=60, deadline=None)
def test_pools_are_reductions_of_the_latents_whatever_the_runs(kind, lengths, chunk_tokens, seed):
    encoder = random_encoder(kind)
    x = torch.randint(-3, 4, (sum(lengths), 6), generator=torch.Generator().manual_seed(seed))
    x = x.float()
    # Ties among the k largest are settled in any way, by chunk: make none.
    x = x + torch.tensor([2**-6, 2**-7, 2**-8, 2**-9, 2**-10, 2**-11]) if kind == "topk" else x
    pooled = encoder.pool(x, np.array(lengths), chunk_tokens=chunk_tokens)
    sums, maxes, counts = plain_pools(encoder.encode(x), lengths)
    torch.testing.assert_close(pooled.sums, sums)
    torch.testing.assert_close(pooled.maxes, maxes)
    assert torch.equal(pooled.counts.long(), counts)


def test_pools_do_not_depend_on_the_chunks_beside_rounding(tmp_path):
    encoder, x = saved(make_sae("jumprelu"), tmp_path), activations(500)
    lengths = np.array([1, 0, 130, 299, 70])
    pooled = encoder.pool(x, lengths)
    expected = plain_pools(encoder.encode(x), lengths.tolist())
    for chunk_tokens in (1024, 100, 7):
        pooled = encoder.pool(x, lengths, chunk_tokens=chunk_tokens)
        assert_same(pooled.sums, expected[0])
        assert_same(pooled.maxes, expected[1])
        assert torch.equal(pooled.counts.long(), expected[2])


@pytest.mark.parametrize("kind", [*INFERENCE, "transcoder"])
def test_in_bfloat16_pools_stay_within_two_percent(kind, tmp_path):
    encoder, x = saved(make_sae(kind), tmp_path), activations(400)
    lengths = np.array([100, 50, 250])
    exact = encoder.pool(x, lengths)
    halved = encoder.to(dtype=torch.bfloat16)
    pooled = halved.pool(x.bfloat16(), lengths)
    # Which latents are among the k largest turns on near ties, and a maximum with it.
    for field in ("sums",) if "topk" in kind else ("sums", "maxes"):
        error = (getattr(pooled, field) - getattr(exact, field)).norm()
        assert error / getattr(exact, field).norm() < 0.02, field
    assert (pooled.counts - exact.counts).abs().sum() / exact.counts.sum() < 0.05
    expected = plain_pools(halved.encode(x.bfloat16()), lengths.tolist())
    torch.testing.assert_close(pooled.sums, expected[0], rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(pooled.maxes, expected[1])
    assert torch.equal(pooled.counts.long(), expected[2])


def test_a_long_mean_does_not_use_up_bfloat16(tmp_path):
    """Ten times as long as what the latents read, as the mean of a residual stream can be."""
    sae = make_sae("standard")
    sae.b_dec.data.copy_(torch.linspace(-40, 40, D_IN))
    encoder = saved(sae, tmp_path)
    x = activations(300)[1:] + sae.b_dec.data
    exact = encoder.pool(x, np.array([299])).sums
    pooled = encoder.to(dtype=torch.bfloat16).pool(x, np.array([299])).sums
    assert (pooled - exact).norm() / exact.norm() < 0.01


def test_minus_zero_is_off():
    encoder = random_encoder("jumprelu").to(dtype=torch.bfloat16)
    encoder.W, encoder.shift = torch.full_like(encoder.W, -(2.0**-70)), -0 * encoder.shift
    x = torch.full((5, 6), 2.0**-70, dtype=torch.bfloat16) + 0 * encoder.centre
    encoder.centre = 0 * encoder.centre
    assert torch.signbit(torch.addmm(encoder.shift, x, encoder.W)).all(), "no minus zeros to test"
    pooled = encoder.pool(x, np.array([2, 3]))
    assert not pooled.counts.any()
    assert not pooled.sums.any()
    assert not pooled.maxes.any()
    assert not encoder.encode(x).any()


@pytest.mark.parametrize("kind", ["jumprelu", "topk"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("value", [math.nan, -math.nan, math.inf, -math.inf])
def test_what_is_not_a_number_does_not_vanish(kind, dtype, value):
    encoder = random_encoder(kind).to(dtype=dtype)
    x = torch.ones(6, 6, dtype=dtype)
    x[1, 2] = value
    z = encoder.encode(x)
    assert not z[1].isfinite().all()
    assert z[2:].isfinite().all()
    pooled = encoder.pool(x, np.array([3, 3]))
    assert not pooled.sums[0].isfinite().all()
    assert pooled.sums[1].isfinite().all()
    if math.isnan(value):
        assert pooled.sums[0].isnan().any()


def edit_config(path: Path, **values) -> None:
    config = json.loads((path / "cfg.json").read_text())
    config |= values
    kept = {key: value for key, value in config.items() if value is not ...}
    (path / "cfg.json").write_text(json.dumps(kept))


@pytest.fixture
def folder(tmp_path) -> Path:
    make_sae("jumprelu").save_model(tmp_path)
    return tmp_path


def refused(folder: Path, match: str) -> None:
    with pytest.raises(ModelError, match=match) as error:
        LatentEncoder.load(folder)
    assert str(folder) in str(error.value)


@pytest.mark.parametrize("name", ["cfg.json", "sae_weights.safetensors"])
def test_a_missing_or_broken_file_is_named(folder, name):
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: len(content) // 2])
    refused(folder, "cannot be read: .*; copy or download")
    (folder / name).write_bytes(b"\xff\xfe broken")
    refused(folder, "cannot be read: .*; copy or download")
    (folder / name).unlink()
    refused(folder, f"{name} is missing; give a folder")


def test_a_config_that_is_no_object_is_refused(folder):
    (folder / "cfg.json").write_text("[1]")
    refused(folder, "holds no object")


@pytest.mark.parametrize("name", ["W_enc", "b_enc", "W_dec", "b_dec", "threshold"])
def test_a_missing_weight_or_one_of_another_shape_is_named(folder, name):
    weights = load_file(folder / "sae_weights.safetensors")
    other = torch.zeros(3, 3)
    save_file(weights | {name: other}, folder / "sae_weights.safetensors")
    refused(folder, rf"{name} has shape \[3, 3\], but cfg.json says d_in=24, d_sae=160")
    del weights[name]
    save_file(weights, folder / "sae_weights.safetensors")
    refused(folder, f"weight {name} is missing")


@pytest.mark.parametrize("key", ["d_in", "d_sae"])
def test_a_config_without_its_sizes_is_refused(folder, key):
    edit_config(folder, **{key: ...})
    refused(folder, f"cfg.json has no {key}; save it again")


def test_a_transcoder_without_its_decoder_is_refused(tmp_path):
    make_sae("transcoder").save_model(tmp_path)
    edit_config(tmp_path, d_out=...)
    refused(tmp_path, "cfg.json has no d_out")
    edit_config(tmp_path, d_out=D_IN)
    refused(tmp_path, r"W_dec has shape \[160, 20\]")


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"architecture": "temporal"}, "'temporal' is not supported for reading; allowed are sta"),
        ({"architecture": "batchtopk"}, "for inference: that makes them jumprelu"),
        (
            {"normalize_activations": "l2"},
            "normalize_activations 'l2' is not known; allowed are no",
        ),
        ({"metadata": {"model_name": "tiny"}}, "does not say which hook point it reads; set"),
    ],
)
def test_a_config_that_says_something_unknown_is_refused(folder, values, match):
    edit_config(folder, **values)
    refused(folder, match)


def test_a_hook_point_that_no_model_has_is_refused(folder):
    edit_config(folder, metadata={"hook_name": "blocks.1.ln2.hook_normalized"})
    with pytest.raises(ModelError, match="hook point 'blocks.1.ln2.hook_normalized' is not known"):
        LatentEncoder.load(folder)
