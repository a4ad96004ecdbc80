"""Labels from Neuronpedia's explanations: which files, of which SAE, and one label a latent.

What may be given, as a local path or any fsspec URL:

    ROOT/{model}/{source}/explanations/batch-N.jsonl.gz   a published export, or one of its folders
    batch-0.jsonl.gz, batch-0.jsonl                        some of its files
    export.json, export.json.gz                            what its API gave: a list of such rows

Rows say modelId, layer (which is the source), index and description; they are joined by index
alone, in whatever order they come. Of several explanations of a latent the one that is first in
this order is taken, so that the same rows give the same label:

    scored before unscored, the highest mean of its scores first; then by typeName,
    explanationModelName and description, as text sorts

Such files know nothing of weights. What this library exports has `sae-ray.json` beside it, with
the SHA-256 of the SAE's; of others the SAE's own `neuronpedia_id` says whose they are, or failing
that its layer and its number of latents say whose they are not.
"""

import contextlib
import dataclasses
import gzip
import io
import itertools
import json
import math
import zlib
from codecs import getincrementaldecoder
from collections.abc import Iterator, Sequence
from typing import Any, cast

from fsspec import AbstractFileSystem

from sae_ray.artifacts import locate
from sae_ray.errors import ModelError
from sae_ray.lm import HookPoint
from sae_ray.sae.pretrained import resolve
from sae_ray.storage import explain_storage

FINGERPRINT = "sae-ray.json"
"""Beside the explanations that this library exports: whose they are."""

_FOLDER = "explanations"
_LINES = (".jsonl", ".jsonl.gz")
_HEADS = ("release.jsonl", "model.jsonl", "sourceset.jsonl", "source.jsonl")
_DEPTH = 3
"""Folders between the one given and `explanations`: neuronpedia/model/source at most."""
_KEYS = ("modelId", "layer", "index", "description")
_BROKEN_GZIP = (gzip.BadGzipFile, EOFError, zlib.error)
_MAX_CHARS = 1 << 24
_CHUNK_BYTES = 1 << 16

Rank = tuple[float, str, str, str]
"""Minus the score, typeName, explanationModelName, description: the least is taken."""


class Labels(dict[int, str]):
    """What latents stand for, of those that have a label, by their index."""

    warnings: tuple[str, ...] = ()
    """What could not be checked of them."""


@dataclasses.dataclass(frozen=True, slots=True)
class Owner:
    """What a SAE's config says by which labels can be held against it."""

    name: str
    d_sae: int
    neuronpedia_id: str | None
    layer: int | None

    @classmethod
    def load(cls, sae: str) -> "Owner":
        """Read the config of a SAE.

        Raises:
            ModelError: there is none, or it does not say how many latents there are.
        """
        path = resolve(sae) / "cfg.json"
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
            metadata = config.get("metadata") or config
            d_sae, id = config["d_sae"], metadata.get("neuronpedia_id")
            if not isinstance(d_sae, int) or not isinstance(id, str | None):
                raise TypeError("d_sae must be a whole number, neuronpedia_id text or null")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelError(
                f"{path} cannot be read ({type(error).__name__}: {error}): give a SAE folder as "
                "sae-lens writes it"
            ) from error
        layer = None
        with contextlib.suppress(ModelError):
            layer = HookPoint.parse(str(metadata.get("hook_name"))).layer
        return cls(sae, d_sae, id or None, layer)


def explanation_files(path: str) -> list[str] | None:
    """Return the files of explanations that a path stands for, or None if it is no such thing.

    Raises:
        ModelError: nothing is there, or a folder without explanations, or with those of several
            sources.
    """
    fs, root = locate(path)
    with explain_storage(path):
        if fs.isfile(root):
            is_rows = path.endswith(_LINES) or _first_character(path) == b"["
            return [path] if is_rows else None
        if not fs.isdir(root):
            raise ModelError(
                f"{path} is not there: give a label file, or a file or folder of Neuronpedia's "
                "explanations"
            )
        folders = list(itertools.islice(_folders(fs, root, _DEPTH), 4))
        found = _files(fs, folders[0] if folders else root)
    shown = [path.rstrip("/") + folder[len(root) :] for folder in folders]
    if len(shown) > 1:
        more = " and more" if len(shown) > 3 else ""
        raise ModelError(
            f"{path} holds explanations of several sources ({', '.join(shown[:3])}{more}): by "
            "index they would name other SAEs' latents; give the folder of one"
        )
    if not found:
        raise ModelError(
            f"{path} holds no explanations: give a folder MODEL/SOURCE of Neuronpedia's export, "
            "which holds explanations/batch-N.jsonl.gz, or such a file"
        )
    return [path.rstrip("/") + name[len(root) :] for name in found]


def made_for(files: Sequence[str]) -> str | None:
    """Return the SHA-256 of the weights of the SAE that explanations were exported for, if known.

    Raises:
        ModelError: the file that says so is damaged.
    """
    fs, target = locate(files[0])
    folder = target.rpartition("/")[0].removesuffix(f"/{_FOLDER}")
    try:
        with explain_storage(files[0]):
            content = fs.cat_file(f"{folder}/{FINGERPRINT}")
        return str(json.loads(content)["sae_sha256"])
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"{folder}/{FINGERPRINT} is damaged ({error}): export the labels again, or delete it "
            "to use them unchecked"
        ) from error


def read_explanations(files: Sequence[str], owner: Owner, *, is_proved: bool) -> Labels:
    """Choose one explanation for each latent that has any.

    Args:
        files: where they are.
        owner: the SAE that they are to be of.
        is_proved: they are known to be of that SAE's weights.

    Raises:
        ModelError: a file is damaged or of other rows, or its rows are another SAE's.
    """
    best: dict[int, Rank] = {}
    source = ""
    for file in files:
        for line, row in _rows(file):
            where = f"{file}, line {line}"
            index, said, rank = _read(where, row)
            if not source:
                source = said
                if not is_proved:
                    _require_own(file, source, owner)
            if said != source:
                raise ModelError(
                    f"{where}: an explanation of {said} among those of {source}: by index it would "
                    "name another SAE's latent; give the file or folder of one source alone"
                )
            if index >= owner.d_sae:
                raise ModelError(
                    f"{where}: index {index}, but {owner.name} has {owner.d_sae} latents (0 to "
                    f"{owner.d_sae - 1}): these are another SAE's labels; give that SAE's, or none"
                )
            if rank[-1] and (index not in best or rank < best[index]):
                best[index] = rank
    if not source:
        raise ModelError(
            f"{files[0]} holds no explanation: give a file or folder that does, or no labels"
        )
    labels = Labels({index: best[index][-1] for index in sorted(best)})
    if not is_proved and owner.neuronpedia_id is None:
        labels.warnings = (
            f"whether {source} names the latents of {owner.name} could not be checked, since its "
            "cfg.json has no neuronpedia_id: only layer and number of latents were; look at some",
        )
    return labels


def _require_own(file: str, source: str, owner: Owner) -> None:
    """Refuse explanations of a source that is not the SAE's."""
    if owner.neuronpedia_id is not None:
        if source != owner.neuronpedia_id:
            raise ModelError(
                f"{file} explains {source}, but {owner.name} is {owner.neuronpedia_id} on "
                "Neuronpedia: by index they would name other latents; give that one's labels, or "
                "none"
            )
        return
    layer = source.rpartition("/")[2].partition("-")[0]
    if owner.layer is not None and layer.isdecimal() and int(layer) != owner.layer:
        raise ModelError(
            f"{file} explains {source}, which reads layer {layer}, but {owner.name} reads layer "
            f"{owner.layer}: give that SAE's labels, or none; if they are its all the same, say "
            f'so in the metadata of its cfg.json: "neuronpedia_id": "{source}"'
        )


def _read(where: str, row: Any) -> tuple[int, str, Rank]:
    """Return a row's index, whose latents it is about, and the place of its explanation."""
    if not isinstance(row, dict):
        raise _bad(where, "no JSON object")
    if missing := [key for key in _KEYS if key not in row]:
        raise _bad(where, f"{missing[0]} is missing")
    index, description = row["index"], row["description"] or ""
    named = str(index) if isinstance(index, int | str) and not isinstance(index, bool) else ""
    if not (named.isascii() and named.isdecimal() and len(named) < 16):
        raise _bad(where, f"index must be a whole number from 0, not {str(index)[:40]!r}")
    for key in ("modelId", "layer", "description"):
        if not isinstance(row[key], str) and (key != "description" or row[key] is not None):
            raise _bad(where, f"{key} must be text, not {str(row[key])[:40]}")
    kind, model = (str(row.get(key) or "") for key in ("typeName", "explanationModelName"))
    # Half of a surrogate pair can be written in JSON, and in no file of text.
    text = description.encode("utf-8", "replace").decode().strip()
    rank = (-_score(row.get("scores")), kind, model, text)
    return int(named), f"{row['modelId']}/{row['layer']}", rank


def _score(scores: Any) -> float:
    """Return the mean of an explanation's scores, or -inf if it has none."""
    given = scores if isinstance(scores, list) else []
    found = [one.get("value") for one in given if isinstance(one, dict)]
    values = [
        float(value)
        for value in found
        if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e9
    ]
    return math.fsum(values) / len(values) if values else -math.inf


def _bad(where: str, why: str) -> ModelError:
    return ModelError(
        f"{where}: {why}; Neuronpedia's explanations have {', '.join(_KEYS)}: mend or remove it, "
        "or download the file again"
    )


def _folders(fs: AbstractFileSystem, root: str, depth: int) -> Iterator[str]:
    """Yield the folders of explanations in a folder."""
    if root.rsplit("/", 1)[-1] == _FOLDER:
        yield root
        return
    entries = fs.ls(root, detail=True)
    names = sorted(str(one["name"]).rstrip("/") for one in entries if one["type"] == "directory")
    names = [name for name in names if name != root]
    if own := [name for name in names if name.rsplit("/", 1)[-1] == _FOLDER]:
        yield own[0]
    elif depth > 0:
        for name in names:
            yield from _folders(fs, name, depth - 1)


def _files(fs: AbstractFileSystem, folder: str) -> list[str]:
    """Return the files of rows that lie in a folder, less those about the source as a whole."""
    names = sorted(str(one["name"]) for one in fs.ls(folder, detail=True) if one["type"] == "file")
    return [
        name for name in names if name.endswith(_LINES) and name.rsplit("/", 1)[-1] not in _HEADS
    ]


def _first_character(path: str) -> bytes:
    with _opened(path) as file:
        try:
            while (one := file.read(1)).isspace():
                pass
        except _BROKEN_GZIP:
            return b"["  # whoever reads it says what is wrong
    return one


@contextlib.contextmanager
def _opened(path: str) -> Iterator[io.BufferedIOBase]:
    """Open a file, unpacked if it is packed, whatever its name."""
    fs, target = locate(path)
    with explain_storage(path), fs.open(target, "rb") as raw:
        file = io.BufferedReader(cast(io.RawIOBase, raw))
        is_packed = file.peek(2)[:2] == b"\x1f\x8b"
        yield gzip.GzipFile(fileobj=file) if is_packed else file


def _rows(path: str) -> Iterator[tuple[int, Any]]:
    """Yield each row of a file with its line, a bounded piece of the file in memory at a time."""
    line = 0
    with _opened(path) as file:
        try:
            for line, row in _lines(path, file) if path.endswith(_LINES) else _items(path, file):
                yield line, row
        except _BROKEN_GZIP as error:
            raise _bad(f"{path}, after line {line}", f"damaged gzip ({error})") from error


def _lines(path: str, file: io.BufferedIOBase) -> Iterator[tuple[int, Any]]:
    number = 0
    while content := file.readline(_MAX_CHARS):
        number += 1
        if len(content) == _MAX_CHARS:
            raise _bad(f"{path}, line {number}", f"longer than {_MAX_CHARS:,} bytes")
        if content.isspace():
            continue
        try:
            yield number, json.loads(content.decode("utf-8"))
        except (ValueError, RecursionError) as error:
            raise _bad(f"{path}, line {number}", f"no JSON ({error})") from error


def _items(path: str, file: io.BufferedIOBase) -> Iterator[tuple[int, Any]]:
    """Yield the items of a JSON list, each with the line that it begins on."""
    unpack, parse = getincrementaldecoder("utf-8")(), json.JSONDecoder().raw_decode
    text, line, at_start = "", 1, True
    while True:
        rest = text.lstrip(" \t\r\n," + "[" * at_start)
        line += text.count("\n", 0, len(text) - len(rest))
        text, at_start = rest, at_start and not rest
        if text.startswith("]"):
            return
        try:
            row, end = parse(text)
        except (ValueError, RecursionError) as error:
            where = f"{path}, line {line}"
            try:
                more = file.read(_CHUNK_BYTES)
                text += unpack.decode(more, final=not more)
            except UnicodeDecodeError as broken:
                raise _bad(where, f"no UTF-8 ({broken})") from broken
            if not more or len(text) > _MAX_CHARS:
                raise _bad(where, f"no JSON ({error})") from error
            continue
        yield line, row
        line += text.count("\n", 0, end)
        text = text[end:]
