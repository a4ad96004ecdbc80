"""Material: what a fine-tuning learns from and what it is looked at on, read from its sources."""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sae_ray import tiny
from sae_ray.adapters.examples import Example, PairExample, read_examples, read_pairs, split
from sae_ray.adapters.finetune import Material
from sae_ray.adapters.recipe import Objective
from sae_ray.adapters.settings import FinetuneSettings
from sae_ray.artifacts import locate
from sae_ray.chat import ChatTokenizer
from sae_ray.errors import PoolError
from sae_ray.rows import Rejected, count_reasons
from sae_ray.tables import explained

_NUM_SHOWN = 3
_TEXT_CHARS = 4000
"""Read of each text."""


@dataclasses.dataclass(frozen=True)
class Learnt:
    """Material, and what is told of it."""

    material: Material
    rejected: list[Rejected]
    shown: list[str]
    """Some rows as the model reads them."""

    @property
    def num_tokens(self) -> int:
        """Count the tokens that are learnt in a pass over the rows."""
        return sum(_num_learnt(row) for row in self.material.train)


def rows_path(data: str | None, objective: Objective) -> str:
    """Return where rows lie: in a selection's table, wherever a pool does, or embedded."""
    if data is None:
        return str(tiny.preferences_path() if objective == "dpo" else tiny.pool_path())
    fs, root = locate(data)
    return f"{data}/selection.parquet" if fs.isfile(f"{root}/profile.json") else data


def read_learnt(settings: FinetuneSettings, data: str, lm: str, staging: str) -> Learnt:
    """Read all that a training needs.

    Args:
        settings: which rows, and how many of them.
        data: the pool that is learnt from.
        lm: the language model, for its tokenizer.
        staging: folder for what must be converted first.

    Raises:
        PoolError: too little can be learnt from.
    """
    tokenizer = ChatTokenizer.load(lm)
    limits = {"max_tokens": settings.max_tokens, "staging": staging}
    read = read_pairs if settings.objective == "dpo" else read_examples
    found = read(data, tokenizer, max_rows=settings.max_rows, **limits)
    num = len(found.rows) + len(found.rejected)
    if len(found.rejected) > settings.max_rejected * num:
        reasons = "; ".join(f"{why}: {n}" for why, n in count_reasons(found.rejected).items())
        raise PoolError(
            f"{len(found.rejected)} of {num} rows of {data} cannot be learnt from ({reasons}): at "
            f"most {settings.max_rejected:.0%} may be rejected; mend the data, raise max_tokens, "
            "or raise max_rejected"
        )
    held_out = min(settings.held_out_rows, len(found.rows) // 5)
    if held_out < 2:
        raise PoolError(
            f"{data} holds {len(found.rows)} rows to learn from: ten are the least, two of which "
            "are held out; give more"
        )
    train, held = split(found.rows, held_out, settings.seed)  # pyright: ignore[reportArgumentType]
    retain: Sequence[Example] = ()
    if settings.retain is not None:
        retain = read_examples(settings.retain, tokenizer, **limits).rows
    general = _general(settings, tokenizer, staging)
    material = Material(train, held, general, retain, settings.max_tokens)
    shown = train[:: -(-len(train) // _NUM_SHOWN)]  # from all over: neighbours are much alike
    texts = [_text_of(row, tokenizer) for row in shown]
    return Learnt(material, found.rejected, texts)


def _general(settings: FinetuneSettings, tokenizer: ChatTokenizer, staging: str) -> list[Example]:
    """Read plain text, or the replies of conversations, to look at and never learn from."""
    if not settings.general_rows:
        return []
    source = settings.general or str(tiny.text_path())
    with explained(source):
        texts = list(_texts(source)) if source.endswith(".parquet") else None
    if not texts:
        limits = {"max_tokens": settings.max_tokens, "staging": staging}
        rows = read_examples(source, tokenizer, **limits).rows
        return split(rows, settings.general_rows, settings.seed)[1]
    order = np.random.default_rng(settings.seed).permutation(len(texts))
    chosen = [texts[i] for i in order[: settings.general_rows]]
    backend = tokenizer.tokenizer
    rows = []
    for number, text in enumerate(chosen):
        ids = backend(text[:_TEXT_CHARS], truncation=True, max_length=settings.max_tokens)
        array = np.array(ids["input_ids"], dtype=np.int32)
        rows.append(Example(f"text-{number}", array, np.arange(len(array)) > 0))
    return [row for row in rows if len(row.ids) > 1]


def _texts(source: str) -> Iterator[str]:
    fs, path = locate(source)
    with fs.open(path, "rb") as file:
        table = pq.ParquetFile(file)
        if "text" not in table.schema_arrow.names:
            return
        column: pa.Table = table.read(columns=["text"])
    yield from (text for text in column["text"].to_pylist() if text and text.strip())


def _text_of(row: Example | PairExample, tokenizer: ChatTokenizer) -> str:
    if isinstance(row, PairExample):
        start = int(row.rejected.learnt.argmax())
        worse = tokenizer.tokenizer.decode(row.rejected.ids[start:])
        return f"{tokenizer.tokenizer.decode(row.chosen.ids)}\n\nrather than\n{worse}"
    return str(tokenizer.tokenizer.decode(row.ids))


def _num_learnt(row: Example | PairExample) -> int:
    if isinstance(row, PairExample):
        return int(row.chosen.learnt.sum() + row.rejected.learnt.sum())
    return int(row.learnt.sum())
