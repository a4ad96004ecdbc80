"""Trackers: a training's curves in TensorBoard, Weights & Biases or MLflow, which never stop it.

Each is written by its own library, which has its settings from its own environment variables
(WANDB_PROJECT, MLFLOW_TRACKING_URI). A run that goes on is the same run there.
"""

import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Literal

from sae_ray.errors import ConfigError

logger = logging.getLogger(__name__)

Name = Literal["tensorboard", "wandb", "mlflow"]
Log = Callable[[Mapping[str, float], int], None]
"""Takes figures by name, and the step."""

_FAILURES = (OSError, RuntimeError, ValueError, TypeError, LookupError, AttributeError)
"""What these libraries raise; their own errors derive from Exception alone and are added."""


class Trackers:
    """Any number of trackers; one that fails is told of once and left out from then on."""

    def __init__(self, names: Sequence[Name], run: str) -> None:
        """Open a run in each.

        Raises:
            ConfigError: a tracker's library is not installed.
        """
        self._logs: dict[str, Log] = {}
        self._failures = _FAILURES
        for name in names:
            opened = self._guarded(name, lambda name=name: self._open(name, run))
            if opened is not None:
                self._logs[name] = opened

    def log(self, figures: Mapping[str, float], step: int) -> None:
        """Send figures of one step."""
        for name, send in list(self._logs.items()):
            sent = self._guarded(name, lambda send=send: send(figures, step) or send)
            if sent is None:
                del self._logs[name]

    def _guarded(self, name: str, act: Callable[[], Log | None]) -> Log | None:
        try:
            return act()
        except ImportError as error:
            raise ConfigError(
                f"trackers={name}: its library is not installed ({error}); install it, or leave "
                "that tracker out"
            ) from error
        except self._failures as error:
            logger.warning("tracker %s failed (%s): training goes on without it", name, error)
            return None

    def _open(self, name: Name, run: str) -> Log:
        id = hashlib.sha256(run.encode()).hexdigest()[:12]
        match name:
            case "tensorboard":
                return _tensorboard(f"{run.rstrip('/')}-tensorboard")
            case "wandb":
                import wandb  # noqa: PLC0415 - only where asked for, as below

                self._failures += (wandb.Error,)
                opened = wandb.init(id=id, name=run, resume="allow")
                return lambda figures, step: opened.log(dict(figures), step=step)
            case "mlflow":
                import mlflow  # noqa: PLC0415 # pyright: ignore[reportMissingImports]

                self._failures += (mlflow.exceptions.MlflowException,)
                found = mlflow.search_runs(
                    filter_string=f"tags.`sae_ray.run` = '{id}'", output_format="list"
                )
                opened = found[0].info.run_id if found else None
                mlflow.start_run(opened, run_name=run, tags={"sae_ray.run": id})
                return lambda figures, step: mlflow.log_metrics(dict(figures), step=step)


def _tensorboard(folder: str) -> Log:
    from tensorboardX import SummaryWriter  # noqa: PLC0415

    writer = SummaryWriter(folder, flush_secs=10)

    def log(figures: Mapping[str, float], step: int) -> None:
        for name, value in figures.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    return log


def flat(saes: Mapping[str, object], names: Sequence[str]) -> Iterator[tuple[str, float]]:
    """Yield the figures of SAEs by `sae/figure`."""
    for sae, figures in saes.items():
        for name in names:
            yield f"{sae}/{name}", float(getattr(figures, name))
