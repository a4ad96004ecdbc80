"""Indexes that are used if they are there and made if not; a finished one costs no Ray."""

from collections.abc import Iterator

from sae_ray.artifacts import is_finished
from sae_ray.curate.index import KIND
from sae_ray.curate.settings import IndexSettings
from sae_ray.distributed.progress import IndexProgress


def ensure_index(settings: IndexSettings, path: str) -> Iterator[IndexProgress]:
    """Build an index where there is none; one that is there must be of what was asked for.

    Raises:
        ArtifactError: it is of other settings, or of another pool, model or SAE, than was said.
    """
    if is_finished(path, KIND):
        settings.require_same(path, settings.model_fields_set)
        return
    from sae_ray.distributed.data import build_index  # noqa: PLC0415 (Ray: seconds to import)

    yield from build_index(settings, path)
