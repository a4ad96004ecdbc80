"""Neuronpedia's export layout: features, activations and explanations, as its tools read them.

    ROOT/{model}/{source}/release.jsonl, model.jsonl, sourceset.jsonl, source.jsonl
    ROOT/{model}/{source}/{features,activations,explanations}/batch-N.jsonl.gz
    ROOT/{model}/{source}/sae-ray.json      ours: the weights that all this is about

A source is `{layer}-{set}`, such as `12-my-sae`. Batch N of all three folders is about the same
latents; rows have the names of Neuronpedia's own tables, and indices are text. Times are left to
its database, so that equal results are equal files.

Source: neuronpedia's `utils/neuronpedia-utils` (`db_models`, `export-data.py`,
`convert-saedashboard-to-neuronpedia-export.py`), as of November 2025.
"""

import dataclasses
import gzip
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence

from pydantic import JsonValue

from sae_ray.artifacts import write_atomically
from sae_ray.lm import HookPoint
from sae_ray.sae.contexts import Context, LatentContexts
from sae_ray.sae.interpret import LatentFacts, TokenTexts
from sae_ray.sae.neuronpedia_labels import FINGERPRINT

LATENTS_PER_BATCH = 1024
_CREATOR = "sae-ray"
_ID_CHARS = 25
_DIGITS = 4

Row = Mapping[str, JsonValue]


@dataclasses.dataclass(frozen=True, slots=True)
class Explained:
    """A latent's label, and who gave it."""

    description: str
    type_name: str
    """`eleuther_acts_top20`, `sae-ray_tokens` or another name that Neuronpedia is told."""
    model: str | None = None
    notes: str | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class ExportedLatent:
    """What is written of one latent."""

    facts: LatentFacts
    contexts: LatentContexts
    explained: Explained | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Place:
    """Where in Neuronpedia's tables a SAE belongs."""

    model: str
    set_name: str
    hook_point: HookPoint
    dataset: str
    conversations: Sequence[str]
    """Their ids, by the numbers in contexts."""
    context_tokens: int
    sae_sha256: str
    """Of its weights, by which the labels are known again as its own."""

    @property
    def source(self) -> str:
        """Neuronpedia's id of the SAE within its model; its other tables call it the layer."""
        return f"{self.hook_point.layer}-{self.set_name}"

    def row(self, index: int) -> dict[str, JsonValue]:
        """Return how a row of any table says which latent it is about."""
        return {"modelId": self.model, "layer": self.source, "index": str(index)}


def export(root: str, place: Place, latents: Iterable[ExportedLatent], texts: TokenTexts) -> None:
    """Write all of a SAE's latents below `root`."""
    folder = f"{root}/{place.model}/{place.source}"
    for name, row in _heads(place).items():
        write_atomically(f"{folder}/{name}.jsonl", (json.dumps(row) + "\n").encode())
    owner = json.dumps({"sae_sha256": place.sae_sha256}) + "\n"
    write_atomically(f"{folder}/{FINGERPRINT}", owner.encode())
    batch: list[ExportedLatent] = []
    number = 0
    for latent in latents:
        batch.append(latent)
        if len(batch) == LATENTS_PER_BATCH:
            _write_batch(folder, number, place, batch, texts)
            batch, number = [], number + 1
    if batch:
        _write_batch(folder, number, place, batch, texts)


def _write_batch(
    folder: str, number: int, place: Place, batch: Sequence[ExportedLatent], texts: TokenTexts
) -> None:
    tables: dict[str, list[Row]] = {
        "features": [_feature(place, one.facts) for one in batch],
        "activations": [row for one in batch for row in _activations(place, one, texts)],
        "explanations": [
            _explanation(place, one.facts.latent, one.explained) for one in batch if one.explained
        ],
    }
    for table, rows in tables.items():
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        packed = gzip.compress(lines.encode("utf-8", "replace"), compresslevel=5, mtime=0)
        write_atomically(f"{folder}/{table}/batch-{number}.jsonl.gz", packed)


def _heads(place: Place) -> dict[str, Row]:
    return {
        "release": {
            "name": place.set_name,
            "description": place.set_name,
            "creatorName": _CREATOR,
            "creatorId": _CREATOR,
        },
        "model": {
            "id": place.model,
            "instruct": True,
            "displayName": place.model,
            "displayNameShort": place.model,
            "creatorId": _CREATOR,
        },
        "sourceset": {
            "modelId": place.model,
            "name": place.set_name,
            "creatorId": _CREATOR,
            "creatorName": _CREATOR,
            "releaseName": place.set_name,
            "description": str(place.hook_point),
            "visibility": "PRIVATE",
        },
        "source": {
            "id": place.source,
            "modelId": place.model,
            "setName": place.set_name,
            "creatorId": _CREATOR,
            "visibility": "PRIVATE",
            "inferenceEnabled": False,
            "dataset": place.dataset,
            "num_prompts": len(place.conversations),
            "num_tokens_in_prompt": place.context_tokens,
        },
    }


def _feature(place: Place, facts: LatentFacts) -> Row:
    return {
        **place.row(facts.latent),
        "creatorId": _CREATOR,
        "maxActApprox": round(facts.max_activation, _DIGITS),
        "hookName": str(place.hook_point),
        "frac_nonzero": facts.density,
        "topkCosSimIndices": list(facts.neighbours),
        "topkCosSimValues": list(facts.neighbour_cosines),
        "pos_str": [token for token, _ in facts.promoted],
        "pos_values": [round(value, _DIGITS) for _, value in facts.promoted],
        "neg_str": [token for token, _ in facts.suppressed],
        "neg_values": [round(value, _DIGITS) for _, value in facts.suppressed],
    }


def _activations(place: Place, one: ExportedLatent, texts: TokenTexts) -> Iterable[Row]:
    """Yield contexts: the strongest, and the spread in ten bins from the weakest up."""
    for context in one.contexts.strongest:
        yield _activation(place, one.facts.latent, context, texts, {})
    for part in one.contexts.quantiles(10):
        edges: dict[str, JsonValue] = {}
        if part:
            edges = {
                "binMin": round(part[0].strength, _DIGITS),
                "binMax": round(part[-1].strength, _DIGITS),
                "binContains": 0.1,
            }
        for context in part:
            yield _activation(place, one.facts.latent, context, texts, edges)


def _activation(place: Place, latent: int, context: Context, texts: TokenTexts, edges: Row) -> Row:
    tokens = [texts[id] for id in context.ids.tolist()]
    values = [round(value, _DIGITS) for value in context.values.tolist()]
    where = f"{place.conversations[context.conversation]}:{context.position}"
    return {
        "id": _id(place.source, latent, "activation", where, "bin" * bool(edges)),
        **place.row(latent),
        "tokens": list(tokens),
        "values": list(values),
        "maxValue": max(values),
        "maxValueTokenIndex": context.peak,
        "minValue": min(values),
        "creatorId": _CREATOR,
        "dataSource": place.dataset,
        "dataIndex": where,
        **edges,
    }


def _explanation(place: Place, latent: int, explained: Explained) -> Row:
    return {
        "id": _id(place.source, latent, "explanation", explained.type_name, ""),
        **place.row(latent),
        "description": explained.description,
        "authorId": _CREATOR,
        "typeName": explained.type_name,
        "explanationModelName": explained.model,
        "notes": explained.notes,
    }


def _id(source: str, latent: int, *what: str) -> str:
    """Return an id of the form of Neuronpedia's own: a letter, then letters and digits."""
    digest = hashlib.sha256(json.dumps([source, latent, *what]).encode()).hexdigest()
    return f"c{digest[: _ID_CHARS - 1]}"
