"""Experts as tables for people: all of a registry, or all that is known of one."""

from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from sae_ray.experts.card import Measure
from sae_ray.experts.registry import Expert


def tabulate(experts: Sequence[Expert]) -> Table:
    """Return a row an expert."""
    table = Table("expert", "id", "status", "adapter", "figure that decides", "parameters")
    for one in experts:
        card = one.card
        figure = told(card.measures[0]) if card.measures else "none"
        share = f"{card.num_parameters:,} ({card.share:.2%})"
        kind = f"{card.adapter}, {card.objective}"
        table.add_row(f"{card.name}@{one.version}", one.id, one.status, kind, figure, share)
    return table


def describe(expert: Expert) -> Table:
    """Return all that is known of an expert, a line a fact."""
    card = expert.card
    table = Table(show_header=False)
    facts = {
        "expert": f"{card.name}@{expert.version} ({expert.id})",
        "status": expert.status,
        "task": card.description,
        "adapter": f"{card.adapter}, by {card.objective}; {card.num_parameters:,} parameters",
        "base": f"{card.base} ({card.base_sha256[:12]})",
        **{role: f"{one.name}" for role, one in sorted(card.sources.items())},
        **{one.name: told(one) for one in card.measures},
        **{name: f"{file.bytes:,} bytes, {file.sha256[:12]}" for name, file in card.files.items()},
    }
    for name, value in facts.items():
        table.add_row(Text(name), Text(value))
    for event in expert.events:
        said = f": {event.reason}" if event.reason else ""
        forced = " by force" if event.forced else ""
        table.add_row(f"{event.at:%Y-%m-%d %H:%M:%S}", Text(f"{event.action}{forced}{said}"))
    return table


def told(measure: Measure) -> str:
    """Return a figure before and after, with the interval of the gain."""
    return (
        f"{measure.name} {measure.base:.4g} to {measure.expert:.4g}, gain {measure.gain:+.4g} "
        f"[{measure.low:+.4g}, {measure.high:+.4g}] over {measure.num_rows:,} rows"
    )
