"""Training SAEs: they learn planted directions, resume to the bit, and workers stay equal."""

import copy
import dataclasses
import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sae_ray.errors import ConfigError, TrainingError
from sae_ray.lm import HookPoint
from sae_ray.sae.buffer import TokenBatch
from sae_ray.sae.encoder import LatentEncoder
from sae_ray.sae.quality import measure, measure_sae
from sae_ray.sae.recipe import Architecture, Recipe, SAESpec, fast_paper, grid
from sae_ray.sae.sequences import instance_of
from sae_ray.sae.train import Step, Trainer, train, train_on_instances

pytestmark = [
    pytest.mark.slow,  # sae-lens takes 8 s to import
    pytest.mark.filterwarnings("ignore:The 'utils' module has been deprecated:DeprecationWarning"),
]

POINT = HookPoint.parse("blocks.1.hook_resid_post")
WIDTHS = {POINT: 16}
RECIPE = Recipe(num_steps=300, batch_tokens=256, learning_rate=1e-2, dead_after_tokens=20_000)
ARCHITECTURES: tuple[Architecture, ...] = (
    "standard", "gated", "jumprelu", "topk", "batchtopk", "matryoshka"
)  # fmt: skip


def planted(seed: int, scale: float = 5.0, rows: int = 256) -> Iterator[TokenBatch]:
    """Yield sums of three of 24 fixed directions, with a mean of their own."""
    directions = torch.nn.functional.normalize(
        torch.randn(24, 16, generator=torch.Generator().manual_seed(7)), dim=1
    )
    generator = torch.Generator().manual_seed(seed)
    while True:
        chosen = torch.rand(rows, 24, generator=generator).argsort(dim=1)[:, :3]
        strength = 1 + torch.rand(rows, 3, 1, generator=generator)
        x = scale * ((directions[chosen] * strength).sum(dim=1) + 1.0)
        yield TokenBatch(torch.arange(4 * rows, dtype=torch.int32).view(rows, 4), {POINT: x})


def spec(architecture: Architecture, seed: int = 0, **changes: Any) -> SAESpec:
    (one,) = grid([POINT], [architecture], [48], k=3, sparsity=None, seeds=[seed])
    if architecture == "standard":
        changes = {"sparsity": 0.5} | changes
    if architecture == "gated":
        changes = {"sparsity": 0.3} | changes
    if architecture == "jumprelu":
        changes = {"sparsity": 0.03} | changes
    return dataclasses.replace(one, **changes)


def trainer_of(
    *specs: SAESpec, recipe: Recipe = RECIPE, reduce: Any = None, num_workers: int = 1
) -> Trainer:
    trainer = Trainer(specs, recipe, WIDTHS, reduce=reduce, num_workers=num_workers)
    if reduce is None:
        trainer.start(next(planted(99)))
    return trainer


@pytest.fixture(scope="module", params=ARCHITECTURES)
def trained(request: pytest.FixtureRequest, tmp_path_factory) -> tuple[SAESpec, Path, list[Step]]:
    one = spec(request.param)
    trainer = trainer_of(one)
    steps = list(train(trainer, planted(0)))
    folder = tmp_path_factory.mktemp("sae")
    return one, trainer.save(folder, model_name="m")[one.name], steps


def test_every_architecture_learns_what_is_planted(trained) -> None:
    one, _, steps = trained
    assert len(steps) == RECIPE.num_steps
    assert steps[-1].num_tokens == RECIPE.num_steps * 256
    first, last = steps[0].saes[one.name], steps[-1].saes[one.name]
    assert last.fvu < 0.3 * first.fvu
    assert last.fvu < 0.25
    assert last.l0 < 12
    peak = max(step.saes[one.name].learning_rate for step in steps)
    assert first.learning_rate < peak
    assert last.learning_rate < 0.1 * peak
    if one.architecture in ("topk", "batchtopk", "matryoshka"):
        assert last.l0 <= 3 + 1e-6


def test_what_is_saved_reads_activations_in_the_models_own_scale(trained) -> None:
    one, folder, steps = trained
    quality = measure(LatentEncoder.load(folder), itertools.islice(planted(1), 10))
    last = steps[-1].saes[one.name]
    assert quality.fvu == pytest.approx(last.fvu, abs=0.05)
    assert quality.l0 == pytest.approx(last.l0, rel=0.35)


def test_sae_lens_loads_what_we_save_and_we_what_it_saves(trained, tmp_path: Path) -> None:
    from sae_lens import SAE  # noqa: PLC0415

    one, folder, _ = trained
    sae = SAE.load_from_disk(folder)
    assert sae.cfg.metadata.hook_name == str(POINT)
    assert sae.cfg.metadata.model_name == "m"
    assert sae.cfg.metadata.training_architecture.startswith(one.architecture)
    x = next(planted(2)).activations[POINT]
    with torch.no_grad():
        theirs = sae.encode(x)
        reconstruction = sae.decode(theirs)
    sae.save_model(tmp_path)
    for path in (folder, tmp_path):
        ours = LatentEncoder.load(path)
        torch.testing.assert_close(ours.encode(x), theirs, atol=1e-3, rtol=1e-4)
        torch.testing.assert_close(ours.reconstruct(x), reconstruction, atol=1e-3, rtol=1e-4)


def test_many_saes_train_together_as_each_would_alone() -> None:
    specs = [spec(name, seed) for name in ("topk", "standard", "batchtopk") for seed in (0, 1)]
    recipe = dataclasses.replace(RECIPE, num_steps=12)
    together = trainer_of(*specs, recipe=recipe)
    list(train(together, planted(0)))
    for one in specs:
        alone = trainer_of(one, recipe=recipe)
        list(train(alone, planted(0)))
        assert_same_weights(alone, together, [one.name])


def assert_same_weights(a: Trainer, b: Trainer, names: list[str]) -> None:
    for name in names:
        theirs = b.learners[name].sae.state_dict()
        for key, value in a.learners[name].sae.state_dict().items():
            assert torch.equal(value, theirs[key]), f"{name} {key}"


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
def test_a_resumed_training_ends_at_the_same_weights_to_the_bit(compute, tmp_path: Path) -> None:
    specs = [spec(name) for name in ARCHITECTURES]
    recipe = dataclasses.replace(RECIPE, num_steps=24, dead_after_tokens=1000, compute=compute)
    whole = trainer_of(*specs, recipe=recipe)
    batches = list(itertools.islice(planted(0), 24))
    stream = iter(batches)
    for step in train(whole, stream):
        if step.number == 10:
            torch.save(whole.state_dict(), tmp_path / "state.pt")
    resumed = Trainer(specs, recipe, WIDTHS)
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    steps = list(train(resumed, iter(batches[11:])))
    assert [step.number for step in steps] == list(range(11, 24))
    assert any(figures.num_dead for figures in steps[-1].saes.values())
    assert_same_weights(whole, resumed, [one.name for one in specs])


@pytest.mark.parametrize("architecture", ["standard", "gated", "jumprelu"])
def test_a_batch_in_parts_has_the_gradients_of_the_whole(architecture) -> None:
    one = spec(architecture, d_sae=4096)
    learner = trainer_of(one).learners[one.name]
    x = next(planted(0, rows=600)).activations[POINT]
    assert learner._rows_at_once < 300
    tally = learner.gradients(x, 200)
    parts = [gradient.clone() for gradient in learner.shared(tally)[:-2]]
    learner.optimiser.zero_grad()
    output = learner._forward(x * learner.scale, 200)
    output.loss.backward()
    assert float(tally.figures[0]) == pytest.approx(output.loss.item(), rel=1e-5)
    for part, whole in zip(parts, learner.shared(tally)[:-2], strict=True):
        assert whole.abs().max() > 0
        assert (part - whole).abs().max() <= 1e-5 * whole.abs().max()


def test_a_checkpoint_of_another_run_is_refused() -> None:
    state = trainer_of(spec("topk")).state_dict()
    with pytest.raises(ConfigError, match="learning_rate=0.5, but the checkpoint"):
        trainer_of(
            spec("topk"), recipe=dataclasses.replace(RECIPE, learning_rate=0.5)
        ).load_state_dict(state)
    with pytest.raises(ConfigError, match="saes="):
        trainer_of(spec("topk", 1)).load_state_dict(state)


def test_two_workers_step_as_one_with_twice_the_batch() -> None:
    """In double precision, by hand: both compute, what they share is averaged, both update."""
    specs = [spec(name) for name in ("standard", "gated", "jumprelu", "topk")]
    batches = list(itertools.islice(planted(0), 2))
    recipe = dataclasses.replace(RECIPE, dead_after_tokens=2000)

    def doubled(batch: TokenBatch) -> TokenBatch:
        return TokenBatch(batch.lanes, {POINT: batch.activations[POINT].double()})

    def gradients(trainer: Trainer, batch: TokenBatch) -> list[list[torch.Tensor]]:
        tallies = {n: l.gradients(batch.activations[POINT], 5) for n, l in trainer.learners.items()}
        return [one.shared(tallies[name]) for name, one in trainer.learners.items()]

    for dead in (0, 5000):
        workers = [trainer_of(*specs, recipe=recipe) for _ in range(3)]
        for worker in workers:
            for learner in worker.learners.values():
                learner.sae.double()
                learner.sae.dtype = torch.float64
                learner.tokens_off[::3] = dead
        first, second = (
            gradients(w, doubled(b)) for w, b in zip(workers[:2], batches[:2], strict=True)
        )
        both = TokenBatch(
            torch.cat([batches[0].lanes, batches[1].lanes]),
            {POINT: torch.cat([b.activations[POINT] for b in batches[:2]])},
        )
        whole = gradients(workers[2], doubled(both))
        for a, b, c, one in zip(first, second, whole, specs, strict=True):
            num_weights = len(list(workers[0].learners[one.name].sae.parameters()))
            for p, q, r in list(zip(a, b, c, strict=True))[:num_weights]:
                tolerance = 1e-9 if p.dtype == torch.float64 else 1e-5
                assert r.abs().max() > 0
                assert ((p + q) / 2 - r).abs().max() <= tolerance * max(1, r.abs().max())


def test_workers_share_all_that_keeps_them_equal() -> None:
    """Two trainers, each with its own data, whose `reduce` truly averages between the two."""
    import threading  # noqa: PLC0415 - only this test plays two workers

    barrier, slots = threading.Barrier(2, timeout=60), [[], []]

    def reduce_of(rank: int):
        def reduce(tensors: list[torch.Tensor]) -> None:
            slots[rank] = [tensor.clone() for tensor in tensors]
            barrier.wait()
            for tensor, mine, other in zip(tensors, slots[0], slots[1], strict=True):
                tensor.copy_((mine + other) / 2)
            barrier.wait()

        return reduce

    specs = [spec(name) for name in ("topk", "batchtopk", "jumprelu")]
    recipe = dataclasses.replace(RECIPE, num_steps=10, dead_after_tokens=1500)
    workers = [Trainer(specs, recipe, WIDTHS, reduce=reduce_of(r), num_workers=2) for r in (0, 1)]
    steps: list[list[Step]] = [[], []]

    def work(rank: int) -> None:
        workers[rank].start(next(planted(rank)))
        steps[rank] = list(train(workers[rank], planted(rank + 10)))

    threads = [threading.Thread(target=work, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert_same_weights(workers[0], workers[1], [one.name for one in specs])
    assert steps[0] == steps[1]
    assert steps[0][-1].num_tokens == 10 * 512
    state, other = workers[0].state_dict(), workers[1].state_dict()
    for name in state["learners"]:
        assert torch.equal(
            state["learners"][name]["tokens_off"], other["learners"][name]["tokens_off"]
        )


def test_what_is_no_number_stops_with_the_step_and_the_place() -> None:
    trainer = trainer_of(spec("topk"), spec("standard"))
    stream = planted(0)
    list(itertools.islice(train(trainer, stream), 3))
    before = copy.deepcopy(trainer.learners[spec("topk").name].sae.state_dict())
    batch = next(stream)
    batch.activations[POINT][17, 3] = math.nan
    place = "conversation 68, position 69, token id 70"
    with pytest.raises(TrainingError, match=f"step 3, SAE .*topk.*not finite, first at {place}"):
        trainer.step(batch)
    after = trainer.learners[spec("topk").name].sae.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_a_loss_that_blows_up_stops_after_a_few_steps_but_one_spike_does_not() -> None:
    trainer = trainer_of(spec("topk"))
    stream = planted(0)
    list(itertools.islice(train(trainer, stream), 50))
    loud = next(stream)
    loud.activations[POINT] *= 100
    trainer.step(loud)
    trainer.step(next(stream))
    for _ in range(4):
        trainer.step(loud)
    with pytest.raises(TrainingError, match="step 56, .*above spike_factor=20 in 5 steps"):
        trainer.step(loud)


def test_sinks_do_not_set_the_scale() -> None:
    batch = next(planted(0))
    trainer = trainer_of(spec("topk"))
    usual = trainer.learners[spec("topk").name].scale
    x = batch.activations[POINT]
    assert (x * usual).norm(dim=-1).mean().item() == pytest.approx(4.0, rel=0.05)
    x[:5] *= 1e4
    trainer.start(batch)
    learner = trainer.learners[spec("topk").name]
    assert learner.scale == pytest.approx(usual, rel=0.05)
    # The first b_dec lies amidst the others, too.
    assert (x[5:] * usual - learner.sae.b_dec).norm(dim=-1).mean() < 4


def test_twice_the_same_sae_is_refused() -> None:
    with pytest.raises(ConfigError, match="twice"):
        trainer_of(spec("topk"), spec("topk"))


def test_the_papers_recipe_keeps_decoder_rows_at_norm_one() -> None:
    recipe = dataclasses.replace(fast_paper(128 * 200), learning_rate=1e-2)
    one = SAESpec(POINT, "standard", 48, sparsity=0.5)
    trainer = trainer_of(one, recipe=recipe)
    steps = list(train(trainer, planted(0, rows=128)))
    learner = trainer.learners[one.name]
    assert torch.allclose(learner.sae.W_dec.norm(dim=-1), torch.ones(48), atol=1e-5)
    assert learner.scale == 1
    assert steps[-1].saes[one.name].fvu < 0.5 * steps[0].saes[one.name].fvu


def test_a_sae_is_trained_on_a_models_instances(tiny_lm: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rows = [instance_of(rng.integers(4, 300, size=20)) for _ in range(40)]
    recipe = Recipe(num_steps=30, batch_tokens=128, learning_rate=1e-2)
    one = SAESpec(POINT, "batchtopk", 64, k=8)
    steps = train_on_instances(
        tiny_lm, rows, one, recipe, tmp_path, model_name="tiny", buffer_batches=2
    )
    fvus = [step.saes[one.name].fvu for step in steps]
    assert len(fvus) == 30
    assert fvus[-1] < fvus[0]
    encoder = LatentEncoder.load(tmp_path)
    assert (encoder.model_name, str(encoder.hook_point)) == ("tiny", str(POINT))
    quality = measure_sae(tiny_lm, tmp_path, rows)
    assert quality.num_tokens == 800
    assert quality.fvu < 1


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_fvu_and_l0_are_those_of_sae_lens_own_trainer(architecture) -> None:
    from sae_lens.config import LoggingConfig, SAETrainerConfig  # noqa: PLC0415
    from sae_lens.registry import get_sae_training_class  # noqa: PLC0415
    from sae_lens.training.sae_trainer import SAETrainer  # noqa: PLC0415

    recipe = Recipe(
        150, 256, learning_rate=3e-3, warmup_share=0.0, decay_share=0.0, sparsity_warmup_share=0.0
    )
    one = spec(architecture)
    ours = trainer_of(one, recipe=recipe)
    learner = ours.learners[one.name]
    theirs = get_sae_training_class(learner.sae.cfg.architecture())[0](
        copy.deepcopy(learner.sae.cfg)
    )
    theirs.load_state_dict(learner.sae.state_dict())
    config = SAETrainerConfig(
        total_training_samples=150 * 256, train_batch_size_samples=256, device="cpu",
        autocast=False, lr=3e-3, lr_end=3e-3, lr_scheduler_name="constant", lr_warm_up_steps=0,
        lr_decay_steps=0, n_restart_cycles=1, adam_beta1=0.9, adam_beta2=0.999,
        n_batches_for_norm_estimate=1, feature_sampling_window=10**6, dead_feature_window=10**6,
        logger=LoggingConfig(log_to_wandb=False), checkpoint_path=None,
        save_final_checkpoint=False, n_checkpoints=0,
    )  # fmt: skip
    # The same activations, in the scale that ours has chosen.
    scaled = (batch.activations[POINT] * learner.scale for batch in planted(0))
    trainer = SAETrainer(config, theirs, scaled)
    outputs: list[Any] = []
    for _ in range(150):
        outputs = [trainer.step(next(scaled))]
        trainer.n_training_steps += 1
    (output,) = outputs
    *_, last = train(ours, planted(0))
    x, x_hat = output.sae_in, output.sae_out.detach()
    fvu = float((x - x_hat).square().sum() / (x - x.mean(0)).square().sum())
    l0 = float((output.feature_acts > 0).sum()) / len(x)
    figures = last.saes[one.name]
    assert figures.fvu == pytest.approx(fvu, rel=0.01)
    assert figures.l0 == pytest.approx(l0, rel=0.01)
    assert fvu < 0.8


def test_a_sae_of_heads_is_saved_for_sae_lens_to_read_heads(tmp_path: Path) -> None:
    from sae_lens import SAE  # noqa: PLC0415

    point = HookPoint.parse("blocks.1.attn.hook_z")
    one = dataclasses.replace(spec("jumprelu"), hook_point=point)
    trainer = Trainer([one], RECIPE, {point: 16})
    batch = next(planted(0))
    trainer.start(TokenBatch(batch.lanes, {point: batch.activations[POINT]}))
    (folder,) = trainer.save(tmp_path, model_name="m").values()
    x = batch.activations[POINT]
    theirs = SAE.load_from_disk(folder).encode(x.view(-1, 4, 4))
    torch.testing.assert_close(LatentEncoder.load(folder).encode(x), theirs, atol=1e-4, rtol=1e-4)
