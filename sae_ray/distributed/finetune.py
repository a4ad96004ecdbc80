"""Fine-tuning on Ray Train: TRL's trainers on DeepSpeed, ZeRO 0 to 3, taken up again when killed.

Each worker runs the same `Finetuning` on its share of every batch. Checkpoints go to the folder of
the run, of all ranks, since each holds the shards of one. What was asked is what runs: a training
asserts at its start that the engine is DeepSpeed's, of that stage and over that many workers, and
that they are given different rows.
"""

import dataclasses
import os
import shutil
import tempfile
from collections.abc import Generator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

import ray
import ray.train
import torch
import torch.distributed
from accelerate import PartialState

from sae_ray.adapters.attach import AdapterSpec
from sae_ray.adapters.finetune import Finetuning, Look, Material, Step
from sae_ray.adapters.objectives import World
from sae_ray.adapters.recipe import Recipe
from sae_ray.artifacts import locate, read_file, write_atomically
from sae_ray.distributed.gang import Gang, Tell, run_gang, together
from sae_ray.distributed.runtime import Workers, cluster, plan_workers
from sae_ray.memory import keep_large_blocks
from sae_ray.storage import explain_storage, write_local

Offload = Literal["none", "cpu", "nvme"]


@dataclasses.dataclass(frozen=True)
class Training:
    """What is trained, and where it lies; the same on every worker."""

    lm: str
    adapter: AdapterSpec | None
    recipe: Recipe
    out: str
    """Folder or URL that all nodes reach: checkpoints go to its scratch, the model to `adapter`."""
    start_from: str | None = None
    subspaces: tuple[str, ...] = ()
    """Folders or URLs of the subspaces of an adapter along them."""
    zero_stage: int = 2
    offload: Offload = "none"
    nvme_path: str | None = None


@dataclasses.dataclass(frozen=True)
class Trained:
    """What came of a training."""

    before: Look
    after: Look
    """At the best step."""
    curves: list[dict[str, float]]
    """Figures of every step, also of those before a restart."""
    num_parameters: int
    num_base_parameters: int
    stopped_early: bool
    num_workers: int


def train_expert(
    training: Training,
    material: Material,
    *,
    num_workers: int | None = None,
    max_failures: int = 3,
) -> Generator[Step, None, Trained]:
    """Train on Ray, or in this process with `num_workers=0`; yield steps, return what came of it.

    Raises:
        TrainingError, ModelError, ConfigError: it cannot be trained so.
        WorkError: workers died too often; the same call goes on from the last checkpoint.
    """
    if num_workers == 0:
        return (yield from _here(training, material))
    with cluster():
        workers = plan_workers(num_workers)
        training.recipe.micro_rows_for(workers.count)
        # Shards are of one number of workers: another number starts anew.
        name = f"{workers.count}-workers"
        gang = Gang(workers, f"{training.out}/.run", name, max_failures=max_failures)
        config = {"training": training, "material": ray.put(material), "workers": workers}
        return (yield from run_gang(_loop, config, gang))


def _here(training: Training, material: Material) -> Generator[Step, None, Trained]:
    keep_large_blocks()
    if not torch.cuda.is_available():
        # transformers imports DeepSpeed where it is installed, which warns that it finds no GPU.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    with tempfile.TemporaryDirectory(prefix="sae-ray-") as scratch:
        finetuning = _finetuning(training, material, Path(scratch), World())
        yield from finetuning.steps()
        _write(finetuning, training.out, Path(scratch))
        return _trained(finetuning, 1)


def _loop(config: dict[str, Any], tell: Tell) -> Trained:
    """Run one worker's part."""
    keep_large_blocks()
    training, workers = config["training"], config["workers"]
    material = ray.get(config["material"])
    world = _join(training, workers)
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="sae-ray-")))
        finetuning = _finetuning(training, material, scratch, world)  # pyright: ignore[reportArgumentType]
        last = ray.train.get_checkpoint()
        folder = Path(stack.enter_context(last.as_directory())) if last else None
        for step in finetuning.steps(folder):
            if step.checkpoint is not None:
                kept = ray.train.Checkpoint.from_directory(step.checkpoint)
                # From all ranks: each has written its own shards.
                ray.train.report({"step": step.number}, checkpoint=kept)
                shutil.rmtree(step.checkpoint)
            elif world.rank == 0:
                tell(step)
        together(lambda: world.rank or _write(finetuning, training.out, scratch))
        return _trained(finetuning, world.count)


def _join(training: Training, workers: Workers) -> World:
    """Join the process group that Ray made, in DeepSpeed's way."""
    import deepspeed  # noqa: PLC0415 - looks for devices when it is imported: in workers alone

    if not workers.num_gpus:
        # Else every worker compiles an all-reduce of DeepSpeed's own; gloo's is there.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("nccl" if workers.num_gpus else "gloo")
    if not workers.num_gpus:
        _tell_accelerate()
    return World(
        rank=torch.distributed.get_rank(),
        count=torch.distributed.get_world_size(),
        deepspeed=deepspeed_config(training, workers),
        gathered=deepspeed.zero.GatheredParameters if training.zero_stage == 3 else _as_they_are,
    )


def _tell_accelerate() -> None:
    """Tell accelerate of the workers: without a GPU it would see one, that has all the rows."""
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    PartialState(backend="gloo")


def deepspeed_config(training: Training, workers: Workers) -> dict[str, Any]:
    """Return DeepSpeed's configuration of a training."""
    recipe, on_cpu = training.recipe, not workers.num_gpus
    micro, accumulated = recipe.micro_rows_for(workers.count)
    zero: dict[str, Any] = {"stage": training.zero_stage}
    if training.zero_stage == 3:
        zero["stage3_gather_16bit_weights_on_model_save"] = True
        if on_cpu:
            # Small models are below the threshold under which weights are not sharded at all.
            zero["stage3_param_persistence_threshold"] = 0
    if training.offload != "none":
        place = {"device": training.offload, "pin_memory": not on_cpu}
        place |= {"nvme_path": training.nvme_path} if training.offload == "nvme" else {}
        zero["offload_optimizer"] = place
        if training.zero_stage == 3:
            zero["offload_param"] = place
    return {
        "train_batch_size": recipe.batch_rows,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": accumulated,
        "gradient_clipping": recipe.max_gradient_norm,
        "bf16": {"enabled": recipe.dtype == "bfloat16"},
        "zero_optimization": zero,
        # torch's AdamW: DeepSpeed's own for CPUs is compiled for over a minute.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }


def _finetuning(training: Training, material: Material, scratch: Path, world: World) -> Finetuning:
    start = training.start_from and Path(copied(training.start_from, scratch / "start"))
    adapter = training.adapter
    if adapter is not None and training.subspaces:
        local = [copied(url, scratch / f"subspace-{i}") for i, url in enumerate(training.subspaces)]
        adapter = adapter.model_copy(update={"subspaces": tuple(local)})
    return Finetuning(
        training.lm,
        adapter,
        training.recipe,
        material,
        scratch / "trainer",
        world=world,
        gather=_gather if world.count > 1 else None,
        start_from=start or None,
    )


def copied(url: str, folder: Path) -> str:
    """Bring a folder to this node."""
    fs, root = locate(url)
    with explain_storage(url):
        for path in map(str, fs.find(root)):
            write_local(
                folder / path[len(root) :].lstrip("/"), read_file(fs.unstrip_protocol(path))
            )
    return str(folder)


def _gather(mine: list) -> list:
    """Return what all workers hold, a worker's turn at a time, in the order of their ranks."""
    all_of: list[list] = [[] for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather_object(all_of, mine)
    return [one for turn in zip(*all_of, strict=True) for one in turn]


def _as_they_are(_parameters: list[torch.nn.Parameter]) -> Any:
    return ExitStack()


def _write(finetuning: Finetuning, out: str, scratch: Path) -> None:
    """Write the model of the best step, file by file, where everybody finds it."""
    folder = scratch / "best"
    finetuning.save(folder)
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            name = path.relative_to(folder).as_posix()
            write_atomically(f"{out}/adapter/{name}", path.read_bytes())


def _trained(finetuning: Finetuning, num_workers: int) -> Trained:
    return Trained(
        before=finetuning.looks[0],
        after=finetuning.best,
        curves=finetuning.curves(),
        num_parameters=finetuning.num_parameters,
        num_base_parameters=finetuning.num_base_parameters,
        stopped_early=finetuning.stopped_early,
        num_workers=num_workers,
    )
