"""Engine: one base model that answers through many experts in one batch.

Every step, requests that wait join the batch (their prompts are read together, right-padded), all
rows grow by a token, and who is done leaves: the last row takes its place. A row is one expert's
view of one request; a request to two experts has two rows, whose logits are averaged and which both
go on with the token that was chosen.

The engine is plain Python: any thread may submit and cancel, one thread calls `step`, or `run`.
Source: iteration-level scheduling as in Orca (OSDI 2022); factors by row as in S-LoRA (2311.03285).
"""

import collections
import contextlib
import dataclasses
import logging
import random
import threading
from collections.abc import Callable, Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from sae_ray.adapters.loading import load_causal
from sae_ray.chat import ChatTokenizer, Conversation, Message, Tokens
from sae_ray.curate.sources import EMBEDDED, fingerprint, locate_model
from sae_ray.errors import BusyError, RequestError
from sae_ray.experts.answers import Ask, Finish, Limits, Load, Piece, Ticket, Token
from sae_ray.experts.registry import Expert, ExpertRegistry
from sae_ray.experts.residents import NOBODY, Resident, Residents, require_servable
from sae_ray.experts.row_cache import RowCache
from sae_ray.experts.sampling import TextStream, choose, told
from sae_ray.experts.stacked import StackedLora
from sae_ray.lm import DTypeName

logger = logging.getLogger(__name__)


@dataclasses.dataclass(eq=False)
class _Running:
    """A request with what has been made of its answer."""

    ticket: Ticket
    residents: list[Resident]
    max_tokens: int
    text: TextStream
    draw: random.Random
    num_tokens: int = 0
    untold: list[Token] = dataclasses.field(default_factory=list)
    """Tokens whose text is not shown yet, where probabilities were asked for."""

    def due(self, *, at_end: bool) -> tuple[Token, ...]:
        """Take the tokens whose text is shown; those that a stop string cut off never are."""
        begun = [
            at_end and not self.text.stopped or t.offset < self.text.shown for t in self.untold
        ]
        due, self.untold = self.untold[: sum(begun)], self.untold[sum(begun) :]
        return tuple(due)


@dataclasses.dataclass(eq=False)
class _Row:
    """A row of the batch."""

    running: _Running
    resident: Resident | None
    length: int
    """Tokens whose keys and values are kept."""
    next_id: int = 0
    """The token to read next."""


class Engine:
    """A base model and the experts of a registry, answering in one batch."""

    def __init__(
        self,
        lm: str | None = None,
        registry: str | None = None,
        *,
        limits: Limits | None = None,
        dtype: DTypeName = "float32",
        device: str = "cpu",
    ) -> None:
        """Load the base.

        Args:
            lm: folder or hub name of the base; the embedded default unless given.
            registry: folder or URL of the experts; the base answers alone unless given.
            limits: of what is taken on at once.
            dtype: of weights and arithmetic.
            device: torch's name of where to compute.

        Raises:
            ModelError: the base cannot be loaded.
            RegistryError: the registry cannot be read.
        """
        self.limits = limits or Limits()
        path = locate_model(lm or EMBEDDED)
        self.chat = ChatTokenizer.load(path)
        self._backend = self.chat.tokenizer.backend_tokenizer
        self.model = load_causal(path, dtype).eval().requires_grad_(False).to(device)  # pyright: ignore
        config = self.model.config.get_text_config()
        self.context = int(config.max_position_embeddings)
        ends = self.model.generation_config and self.model.generation_config.eos_token_id
        ends = self.chat.tokenizer.eos_token_id if ends is None else ends
        self._ends = frozenset(ends if isinstance(ends, list) else [ends])
        self._registry = None if registry is None else ExpertRegistry(registry)
        self._base_sha256 = fingerprint("lm", lm or EMBEDDED)
        max_bytes = int(self.limits.adapter_memory_mb * 2**20)
        self.residents = Residents(self.model, self._registry, max_bytes)
        self._lora = StackedLora(self.model, self.limits.max_rows)
        self._cache = RowCache(config, self.limits.max_rows)
        self._rows: list[_Row] = []
        self._waiting: collections.deque[_Running] = collections.deque()
        self._wake = threading.Event()
        self._tokens = 0
        self._left_out: set[str] = set()
        """Experts in use that cannot be asked, which was said once of each."""
        self.experts: Mapping[str, Expert] = {}
        """The experts in use that can be asked, by name."""
        self.refresh()

    def refresh(self) -> None:
        """Look into the registry again; answers in the making go on with who began them."""
        active = [] if self._registry is None else self._registry.active()
        found: dict[str, Expert] = {}
        for expert in active:
            try:
                self._require_mine(expert)
                found[expert.card.name] = expert
            except RequestError as error:
                if expert.id not in self._left_out:
                    logger.warning("left out: %s", error)
                    self._left_out.add(expert.id)
        self.experts = found

    def _require_mine(self, expert: Expert) -> None:
        require_servable(expert.card)
        if expert.card.base_sha256 != self._base_sha256:
            raise RequestError(
                f"expert {expert.card.name} was trained on another base than the one served here: "
                "serve it with its own"
            )

    def prompt(self, messages: Sequence[Message]) -> tuple[int, ...]:
        """Return the tokens of a conversation that the assistant is to go on with.

        Raises:
            RequestError: the model's chat template refuses it.
        """
        conversation = Conversation("", list(messages))
        longest = 4 * self.context + sum(len(one["content"]) for one in messages)
        (tokens,) = self.chat.tokenize([conversation], longest, generation_prompt=True)
        if not isinstance(tokens, Tokens):
            raise RequestError(
                "the model's chat template refuses these messages: let user and assistant take "
                "turns, beginning with the user, after at most one system message",
                param="messages",
            )
        return tuple(tokens.ids.tolist())

    def prompt_text(self, text: str) -> tuple[int, ...]:
        """Return the tokens of plain text that is to be gone on with."""
        return tuple(self._backend.encode(text).ids)  # pyright: ignore

    def require_tokens(self, ids: Sequence[int]) -> tuple[int, ...]:
        """Return tokens that were given as such.

        Raises:
            RequestError: one of them is none of the model's.
        """
        size = self.model.config.get_text_config().vocab_size
        if not all(0 <= id < size for id in ids):
            raise RequestError(
                f"the prompt holds a token that is none of 0 to {size - 1}: give the model's own",
                param="prompt",
            )
        return tuple(ids)

    def submit(self, ask: Ask, hand_over: Callable[[Piece], None]) -> Ticket:
        """Let a request wait for its place; its pieces are handed over by the thread that steps.

        Raises:
            RequestError: it is longer than the context, or no such expert can be asked.
            BusyError: too many wait already, or there is no room for its expert now.
            RegistryError, ModelError: an expert's files are not what they should be.
        """
        max_tokens = self._max_tokens(ask)
        if len(self._waiting) >= self.limits.max_waiting:
            raise BusyError(
                f"{self.limits.max_waiting} requests are waiting already: ask again in a moment"
            )
        ticket = Ticket(ask, hand_over)
        with contextlib.ExitStack() as undo:
            residents = []
            for id in ask.experts:
                residents.append(self.residents.pin(id))
                undo.callback(self.residents.unpin, residents[-1])
            text = TextStream(self._backend, ask.sampling.stop)  # pyright: ignore
            draw = random.Random(ask.sampling.seed)
            self._waiting.append(_Running(ticket, residents, max_tokens, text, draw))
            undo.pop_all()
        self._wake.set()
        return ticket

    def _max_tokens(self, ask: Ask) -> int:
        """Return how long an answer may get."""
        most = self.context - len(ask.ids)
        asked = ask.sampling.max_tokens
        if not ask.ids:
            raise RequestError("the prompt is empty: give at least one token", param="prompt")
        if most < (asked or 1):
            more = "" if asked is None else f" and {asked:,} more are asked for"
            raise RequestError(
                f"the prompt has {len(ask.ids):,} tokens{more}, and the model's context is "
                f"{self.context:,} tokens: shorten the prompt or lower max_tokens",
                param="messages" if asked is None or len(ask.ids) >= self.context else "max_tokens",
                code="context_length_exceeded",
            )
        if len(ask.experts) > self.limits.max_rows:
            raise RequestError(f"{len(ask.experts)} experts are more than the batch holds")
        return most if asked is None else asked

    @property
    def load(self) -> Load:
        """Say what it is busy with."""
        ids = self.residents.ids
        waiting = len(self._waiting)
        return Load(len(self._rows), waiting, self._tokens, len(ids), self.residents.num_bytes)

    def run(self, stop: threading.Event) -> None:
        """Step until told to stop; who still waits then is told that there is no more to come."""
        try:
            while not stop.is_set():
                if not self.step():
                    self._wake.wait(0.1)
                    self._wake.clear()
        finally:
            with self.residents.lock:
                for running in dict.fromkeys(
                    [*(row.running for row in self._rows), *self._waiting]
                ):
                    self._end(running, "", (), "cancelled")
                self._rows.clear()
                self._waiting.clear()

    @torch.inference_mode()
    def step(self) -> bool:
        """Let who waits join and every row grow by a token; say whether there is more to do."""
        with self.residents.lock:
            self._drop_cancelled()
            first = len(self._rows)
            self._join()
            if len(self._rows) > first:
                self._read_prompts(first)
            if self._rows:
                self._grow()
            return bool(self._rows or self._waiting)

    def _drop_cancelled(self) -> None:
        for running in dict.fromkeys(row.running for row in self._rows):
            if running.ticket.cancelled:
                self._leave(running)
                self._end(running, "", (), "cancelled")
        for _ in range(len(self._waiting)):
            running = self._waiting.popleft()
            if running.ticket.cancelled:
                self._end(running, "", (), "cancelled")
            else:
                self._waiting.append(running)

    def _join(self) -> None:
        """Give rows to who waits, in turn, as far as there are any."""
        first, longest = len(self._rows), 0
        while self._waiting:
            running = self._waiting[0]
            ids = running.ticket.ask.ids
            num = max(1, len(running.residents))
            longest = max(longest, len(ids))
            padded = longest * (len(self._rows) + num - first)
            too_long = len(self._rows) > first and padded > self.limits.prefill_tokens
            if len(self._rows) + num > self.limits.max_rows or too_long:
                return
            self._waiting.popleft()
            for resident in running.residents or [None]:
                self._lora.put(len(self._rows), {} if resident is None else resident.factors)
                self._rows.append(_Row(running, resident, len(ids)))

    def _read_prompts(self, first: int) -> None:
        """Read the prompts of the rows from `first` on, and choose their first tokens."""
        rows = self._rows[first:]
        longest = max(row.length for row in rows)
        device = self.model.device
        ids = torch.zeros(len(rows), longest, dtype=torch.long)
        for i, row in enumerate(rows):
            ids[i, : row.length] = torch.tensor(row.running.ticket.ask.ids)
        positions = torch.arange(longest, device=device).unsqueeze(0)
        self._cache.begin(first, longest)
        ends = sorted({row.length - 1 for row in rows})
        logits = self._forward(slice(first, None), ids.to(device), positions, ends)
        where = [ends.index(row.length - 1) for row in rows]
        self._advance(rows, logits[torch.arange(len(rows)), where])

    def _grow(self) -> None:
        """Read each row's next token, and choose the one behind it."""
        device = self.model.device
        places = torch.tensor([row.length for row in self._rows], device=device)
        ids = torch.tensor([[row.next_id] for row in self._rows], device=device)
        self._cache.grow(places)
        logits = self._forward(slice(0, None), ids, places.unsqueeze(1), [0])
        for row in self._rows:
            row.length += 1
        self._advance(list(self._rows), logits[:, 0])

    def _forward(
        self, part: slice, ids: Tensor, positions: Tensor, ends: list[int]
    ) -> Float[Tensor, "rows ends vocab"]:
        """Run the model over part of the rows; return the logits at some of the tokens."""
        rows = range(*part.indices(len(self._rows)))
        self._lora.look_at(slice(rows.start, rows.stop))
        residents = [self._rows[i].resident for i in rows]
        latent = any(one is not None and one.edits_latents for one in residents)
        names = [one.id if one and one.edits_latents else NOBODY for one in residents]
        self.residents.latents.look_at(names if latent else ())
        return self.model(
            input_ids=ids,
            attention_mask=self._cache.mask(positions, self.model.dtype),
            position_ids=positions.expand(len(ids), -1),
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=torch.tensor(ends, device=ids.device),
        ).logits

    def _advance(self, rows: Sequence[_Row], logits: Float[Tensor, "rows vocab"]) -> None:
        """Choose the next token of every request, and hand over what its answer grows by."""
        mine: dict[_Running, list[int]] = {}
        for i, row in enumerate(rows):
            mine.setdefault(row.running, []).append(i)
        if len(mine) < len(rows):
            logits = torch.stack([_mixed(logits[at], one) for one, at in mine.items()])
        samplings = [one.ticket.ask.sampling for one in mine]
        chosen = choose(logits, samplings, [one.draw for one in mine])
        for (running, at), token, row_logits in zip(mine.items(), chosen, logits, strict=True):
            for i in at:
                rows[i].next_id = token
            self._take(running, token, row_logits)

    def _take(self, running: _Running, token: int, logits: Float[Tensor, " vocab"]) -> None:
        """Add a token to an answer."""
        self._tokens += 1
        running.num_tokens += 1
        top = running.ticket.ask.sampling.top_logprobs
        ended = token in self._ends
        before = running.text.length
        text = "" if ended else running.text.add(token)
        if top is not None and not ended:
            grown = before, running.text.length
            running.untold.append(told(logits, token, grown, top, self._backend))  # pyright: ignore
        finish: Finish | None = "stop" if ended or running.text.stopped else None
        if finish is None and running.num_tokens >= running.max_tokens:
            finish = "length"
        if finish is None:
            running.ticket.hand_over(Piece(text, 1, running.due(at_end=False)))
        else:
            self._leave(running)
            text += running.text.end()
            self._end(running, text, running.due(at_end=True), finish)

    def _leave(self, running: _Running) -> None:
        """Take a request's rows out of the batch."""
        for i in reversed(range(len(self._rows))):
            if self._rows[i].running is running:
                last = len(self._rows) - 1
                if i < last:
                    self._cache.move(last, i, self._rows[last].length)
                    self._lora.move(last, i)
                    self._rows[i] = self._rows[last]
                self._rows.pop()

    def _end(self, running: _Running, text: str, tokens: tuple[Token, ...], finish: Finish) -> None:
        """Hand over the last piece, and let the experts go."""
        for resident in running.residents:
            self.residents.unpin(resident)
        num_tokens = 0 if finish == "cancelled" else 1
        running.ticket.hand_over(Piece(text, num_tokens, tokens, finish))


def _mixed(logits: Float[Tensor, "rows vocab"], running: _Running) -> Float[Tensor, " vocab"]:
    """Average the logits of a request's experts by their weights."""
    if len(logits) == 1:
        return logits[0]
    weights = torch.tensor(running.ticket.ask.weights, dtype=logits.dtype, device=logits.device)
    return (weights / weights.sum()) @ logits
