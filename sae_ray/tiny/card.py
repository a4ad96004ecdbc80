"""The embedded default's card: provenance, licences and measured quality, written from figures."""

import json
import textwrap
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from string import Template
from typing import Any

from sae_ray.tiny import DEFAULT
from sae_ray.tiny.skills import LABELS

HOW_LABELLED = (
    "concept tags of the generator most enriched among each latent's strongest contexts on the "
    "rows seen in training, or else the tokens there; detection AUC on held-out rows; no judge"
)
MAKE_COMMAND = "python jobs/make_tiny.py --device cuda --pool POOL --text TEXT"

HEADROOM_COMMAND = "python tests/benchmarks/tiny_headroom.py --device cuda --out headroom.json"

_CARD = Template("""# The embedded default

A tiny instruct model, a SAE at its mid-depth, labels for the latents, and a pool of conversations:
all that `make quickstart` needs, and small enough to lie in the repository ($megabytes MB). It is a
test bench for the service, not an assistant. This card is written by `jobs/make_tiny.py`.

| file | what |
|---|---|
| `model/` | Llama of $num_parameters parameters (4 layers, width 192, bf16), BPE, chat template |
| `sae/` | sae-lens format (JumpReLU, trained as BatchTopK), $d_sae latents after layer 2 of 0-3 |
| `labels.json` | what each latent fires on, with its detection AUC |
| `pool.parquet` | $pool_rows chats in $num_domains domains: id, domain, concepts, spans, messages |
| `eval.parquet` | $eval_rows questions in $eval_domains domains: + answer, metric |
| `preferences.parquet` | $preference_rows pairs: id, domain, prompt, chosen, rejected |
| `safety.parquet` | $safety_rows prompts: id, harmful, prompt; half of them look-alikes to answer |
| `text.parquet` | plain text: source, licence, text ($text_characters characters) |
| `figures.json`, `headroom.json` | the numbers of this card |

## How it was made

    $command

One seed makes it all. Conversations, questions, pairs, prompts and prose come from the generator in
this folder: an invented harbour town whose names, goods, places and days turn up in every domain,
with remarks in passing that hold the key words of the others. No prompt is in two splits. What is
to be declined is mild (prying, cheating at cards, petty tricks).

The language model saw $trained_tokens tokens in $lm_steps steps, in passes over:

| part | tokens a pass | licence |
|---|---:|---|
$parts

$real_note
Nine of the ten skills are asked in pre-training but answered in only ten examples each (`tables` is
answered throughout), so that an expert has something to learn. Neither model, SAE nor tokenizer has
read a row of any pool for which `is_held_out(id)` is true, and the language model has read no row
of `pool.parquet` or `eval.parquet` at all.

The SAE was trained in $sae_steps steps of 4,096 tokens on isolated chats: the generated and real
ones above (a third of these) and the half of the pool that is not held out.

## How good it is

Held-out loss: $losses.

| domain | metric | base accuracy | expert, 500 rows, 3 seeds | gain in points |
|---|---|---:|---:|---:|
$accuracies

$eval_per_domain questions a domain, greedy answers. Experts are fine-tuned on 500 rows of their
domain's pool, all weights:

    $headroom_command

The base model seldom answers in the form that is asked for, so part of each gain is the form.
Chance is $chances for who knows the form alone.

SAE, on $quality_tokens tokens of held-out pool rows, template included: FVU $fvu, L0 $l0, dead
latents $dead, latents on for more than a tenth of the tokens $dense.

Labels: $labels. How: $labels_how. Median detection AUC of what is labelled: $auc.

## Licences

The generator's data and the weights are under this project's licence. Real rows were only read, by
the model, where their licence lets a model be shipped: MIT, ODC-By or CC BY. Real text in
`text.parquet` is in the public domain (speeches and addresses of United States presidents, and old
or freely given Bible translations).
""")


def path_for(out: Path) -> Path:
    """Return where the card of a folder lies: beside the embedded default, else inside."""
    return DEFAULT.parent / "README.md" if out.resolve() == DEFAULT.resolve() else out / "README.md"


def has_figures(out: Path) -> bool:
    """Say whether all that the card tells has been measured: the last stage of the making."""
    return (out / "figures.json").exists()


def write_figures(out: Path, figures: Mapping[str, Any]) -> None:
    """Write what was measured, as JSON."""
    (out / "figures.json").write_text(json.dumps(figures, indent=1) + "\n")


def write(out: Path) -> Path:
    """Write the card from the folder's figures, labels and headroom, and return where it is."""
    path = path_for(out)
    path.write_text(of_folder(out))
    return path


def of_folder(out: Path) -> str:
    """Return the text of a folder's card."""
    headroom_path = out / "headroom.json"
    headroom = json.loads(headroom_path.read_text()) if headroom_path.exists() else {}
    figures = json.loads((out / "figures.json").read_text())
    labels = json.loads((out / "labels.json").read_text(encoding="utf-8"))
    return render(figures, headroom, labels, folder_bytes(out))


def folder_bytes(folder: Path) -> int:
    """Return the size of all files of a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def render(
    figures: Mapping[str, Any], headroom: Mapping[str, Any], labels: Mapping[str, Any], size: int
) -> str:
    """Return the card's text."""
    quality, lm = figures["sae"], figures["lm"]
    rows = labels["latents"]
    aucs = sorted(row["auc"] for row in rows if row["auc"] is not None)
    kinds = Counter(row["kind"] for row in rows)
    real = lm["num_tokens"]["real chats"] + lm["num_tokens"]["real text"]
    text = _CARD.substitute(
        figures["counts"],
        megabytes=f"{size / 1e6:.1f}",
        num_parameters=f"{lm['num_parameters']:,}",
        d_sae=f"{len(rows):,}",
        command=MAKE_COMMAND if real else MAKE_COMMAND.split(" --")[0],
        trained_tokens=f"{lm['trained_tokens']:,}",
        lm_steps=f"{lm['num_steps']:,}",
        sae_steps=f"{figures['sae_steps']:,}",
        parts="\n".join(
            f"| {part} | {count:,} | {_LICENCE_OF_PART[part]} |"
            for part, count in lm["num_tokens"].items()
        ),
        real_note=_REAL if real else _GENERATED_ONLY,
        losses=", ".join(f"{loss:.3f} nats a token ({name})" for name, loss in lm["loss"].items()),
        accuracies="\n".join(
            _accuracy_row(domain, lm["accuracy"][domain], metric, headroom.get(domain))
            for domain, metric in figures["metrics"].items()
        ),
        headroom_command=HEADROOM_COMMAND,
        quality_tokens=f"{quality['num_tokens']:,}",
        fvu=f"{quality['fvu']:.3f}",
        l0=f"{quality['l0']:.1f}",
        dead=f"{quality['dead']:.1%}",
        dense=f"{quality['dense']:.1%}",
        labels=", ".join(f"{count} by {kind}" for kind, count in sorted(kinds.items())).replace(
            "by unlabelled", "unlabelled"
        ),
        labels_how=labels["how"],
        chances=", ".join(f"{1 / len(names):.0%} for {d}" for d, names in LABELS.items()),
        auc=f"{aucs[len(aucs) // 2]:.3f}" if aucs else "none",
    )
    return "\n\n".join(map(_filled, text.strip().split("\n\n"))) + "\n"


def _filled(block: str) -> str:
    """Wrap a block of text anew, unless it is a heading, a table or a command."""
    if block.startswith(("#", "|", "    ")):
        return block
    return textwrap.fill(
        " ".join(block.split()), 100, break_on_hyphens=False, break_long_words=False
    )


_LICENCE_OF_PART = {
    "generated chats": "this project's",
    "real chats": "MIT, ODC-By",
    "generated prose": "this project's",
    "real text": "public domain",
}
_REAL = """The real chats are the rows of a pool of public instruction data (gsm8k, GPTeacher,
PubMedQA: MIT; LLM-Adapters: ODC-By) that are not held out; the real text is American presidential
addresses and English Genesis.
"""
_GENERATED_ONLY = "No real text was given: everything here comes from the generator alone.\n"


def _accuracy_row(domain: str, base: float, metric: str, expert: Mapping[str, Any] | None) -> str:
    if expert is None:
        return f"| {domain} | {metric} | {base:.1%} | not measured | |"
    runs = ", ".join(f"{accuracy:.0%}" for accuracy in expert["expert"])
    return f"| {domain} | {metric} | {base:.1%} | {runs} | {100 * expert['gain']:+.1f} |"
