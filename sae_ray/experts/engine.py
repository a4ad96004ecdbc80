"""Engine: one base model that answers through many experts in one batch.

Every step, requests that wait join the batch (their prompts are read together), all rows grow by a
token, and who is done leaves. A request to two experts has two rows, whose logits are averaged and
which both go on with the token that was chosen. Where keys and values would outgrow their memory,
who came last waits again, and is read anew with what it has of its answer.

A request that the model cannot be run on ends alone, and the others go on. An engine whose model
cannot be run at all any more stops, so that another may take its place.

The engine is plain Python: any thread may submit and cancel, one thread calls `step`, or `run`.
Source: iteration-level scheduling as in Orca (OSDI 2022); factors by row as in S-LoRA (2311.03285).
"""

import collections
import contextlib
import dataclasses
import logging
import random
import threading
import time
from collections.abc import Callable, Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from sae_ray.adapters.loading import load_causal
from sae_ray.chat import ChatTokenizer
from sae_ray.curate.sources import EMBEDDED, fingerprint, locate_model
from sae_ray.errors import BusyError, RequestError, WorkError
from sae_ray.experts.answers import Ask, Finish, Limits, Load, Piece, Ticket, Token
from sae_ray.experts.batch import FORWARD_ERRORS, Batch, Row
from sae_ray.experts.prompts import Prompts
from sae_ray.experts.registry import Expert, ExpertRegistry
from sae_ray.experts.residents import Resident, Residents, require_servable
from sae_ray.experts.sampling import TextStream, choose
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
    answered: list[int] = dataclasses.field(default_factory=list)
    rows: list[Row] = dataclasses.field(default_factory=list)
    """In the batch; none while it waits."""

    @property
    def num_rows(self) -> int:
        return max(1, len(self.residents))

    @property
    def length(self) -> int:
        return len(self.ticket.ask.ids) + len(self.answered)


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
        self.prompts = Prompts(self.chat, self.context, int(config.vocab_size))
        ends = self.model.generation_config and self.model.generation_config.eos_token_id
        ends = self.chat.tokenizer.eos_token_id if ends is None else ends
        self._ends = frozenset(ends if isinstance(ends, list) else [ends])
        self._registry = None if registry is None else ExpertRegistry(registry)
        self._base_sha256 = fingerprint("lm", lm or EMBEDDED)
        max_bytes = int(self.limits.adapter_memory_mb * 2**20)
        self.residents = Residents(self.model, self._registry, max_bytes, self._require_mine)
        self.batch = Batch(self.model, self.limits.max_rows, self.residents.latents)
        self._running: list[_Running] = []
        """Who is in the batch, in the order in which they came."""
        self._waiting: collections.deque[_Running] = collections.deque()
        self._queueing = threading.Lock()
        self._wake = threading.Event()
        self._tokens = 0
        self._left_out: set[str] = set()
        """Experts in use that cannot be asked, which was said once of each."""
        self.stopped = False
        """Whether it steps no more, and takes nothing on."""
        self.stepped_at = time.monotonic()
        """When it last ended a step, or found nothing to do."""
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

    def submit(self, ask: Ask, hand_over: Callable[[Piece], None]) -> Ticket:
        """Let a request wait for its place; its pieces are handed over by the thread that steps.

        Raises:
            RequestError: it is longer than the context, or no such expert can be asked.
            BusyError: too many wait already, or there is no room for its expert now.
            RegistryError, ModelError: an expert's files are not what they should be.
            WorkError: the engine has stopped.
        """
        max_tokens = self._max_tokens(ask)
        self._require_place()  # before an expert is fetched for nothing
        ticket = Ticket(ask, hand_over)
        with contextlib.ExitStack() as undo:
            residents = []
            for id in ask.experts:
                residents.append(self.residents.pin(id))
                undo.callback(self.residents.unpin, residents[-1])
            text = TextStream(self._backend, ask.sampling.stop)  # pyright: ignore
            draw = random.Random(ask.sampling.seed)
            with self._queueing:
                self._require_place()
                self._waiting.append(_Running(ticket, residents, max_tokens, text, draw))
            undo.pop_all()
        self._wake.set()
        return ticket

    def _require_place(self) -> None:
        if self.stopped:
            raise WorkError("the engine has stopped: ask another one")
        if len(self._waiting) >= self.limits.max_waiting:
            raise BusyError(
                f"{self.limits.max_waiting} requests are waiting already: ask again in a moment"
            )

    def _max_tokens(self, ask: Ask) -> int:
        """Return how long an answer may get."""
        num_rows = max(1, len(ask.experts))
        context = self._context_of(num_rows)
        most = context - len(ask.ids)
        asked = ask.sampling.max_tokens
        if not ask.ids:
            raise RequestError("the prompt is empty: give at least one token", param="prompt")
        if num_rows > self.limits.max_rows:
            raise RequestError(f"{num_rows} experts are more than the batch holds")
        if most < (asked or 1):
            more = "" if asked is None else f" and {asked:,} more are asked for"
            raise RequestError(
                f"the prompt has {len(ask.ids):,} tokens{more}, and the model's context is "
                f"{context:,} tokens here: shorten the prompt or lower max_tokens",
                param="messages" if asked is None or len(ask.ids) >= context else "max_tokens",
                code="context_length_exceeded",
            )
        return most if asked is None else asked

    def _context_of(self, num_rows: int) -> int:
        """Return how many tokens so many rows may have: as the model has it, and as memory does."""
        context = self.context
        while context > 1 and not self._fits(num_rows, context):
            context = 1 << ((context - 1).bit_length() - 1)
        return context

    def _fits(self, num_rows: int, longest: int) -> bool:
        most = self.limits.kv_memory_mb * 2**20
        return self.batch.cache.bytes_for(num_rows, longest) <= most

    @property
    def load(self) -> Load:
        """Say what it is busy with."""
        rows, waiting, num_bytes = (
            len(self.batch.rows),
            len(self._waiting),
            self.residents.num_bytes,
        )
        return Load(rows, waiting, self._tokens, len(self.residents.ids), num_bytes)

    def run(self, stop: threading.Event) -> None:
        """Step until told to stop; who still waits then is told that there is no more to come."""
        try:
            while not stop.is_set():
                if not self.step():
                    self._wake.wait(0.1)
                    self._wake.clear()
                elif self.residents.wanted.is_set():
                    time.sleep(0.001)  # who loads an expert comes in between two steps
                self.stepped_at = time.monotonic()
        finally:
            with self._queueing:
                self.stopped = True
                left = [*self._running, *self._waiting]
                self._waiting.clear()
            for running in left:
                self._end(running, "", (), "cancelled")
            self._running.clear()

    @torch.inference_mode()
    def step(self) -> bool:
        """Let who waits join and every row grow by a token; say whether there is more to do.

        Raises:
            WorkError: the model cannot be run any more.
        """
        with self.residents.lock:
            self._drop_cancelled()
            self._join()
            if self._running:
                self._grow()
            return bool(self._running or self._waiting)

    def _drop_cancelled(self) -> None:
        for running in [one for one in self._running if one.ticket.cancelled]:
            self._finish(running, "cancelled")
        with self._queueing:
            left = [one for one in self._waiting if one.ticket.cancelled]
            for running in left:
                self._waiting.remove(running)
        for running in left:
            self._end(running, "", (), "cancelled")

    def _join(self) -> None:
        """Let who waits into the batch, in turn, as far as there is room."""
        rows, longest, joining = 0, 0, list[_Running]()
        held = len(self.batch.rows)
        deepest = max((row.length for row in self.batch.rows), default=0)
        while self._waiting:
            running = self._waiting[0]
            rows, longest = rows + running.num_rows, max(longest, running.length)
            full = held + rows > self.limits.max_rows
            full |= not self._fits(held + rows, max(deepest, longest) + 1)
            if full or (joining and longest * rows > self.limits.prefill_tokens):
                break
            joining.append(self._waiting.popleft())
        if joining:
            self._read(joining)

    def _read(self, joining: Sequence[_Running]) -> None:
        """Read prompts together, and where that fails each alone, to find out whose fault it is."""
        for running in joining:
            ids = (*running.ticket.ask.ids, *running.answered)
            running.rows = [Row(ids, one) for one in running.residents or [None]]
        try:
            logits = self.batch.join([row for one in joining for row in one.rows])
        except FORWARD_ERRORS as error:
            if len(joining) > 1:
                for running in joining:
                    self._read([running])
                return
            self._fail(joining, error)
            return
        self._running += joining
        self._advance(list(joining), logits)

    def _grow(self) -> None:
        """Read each row's next token, and choose the one behind it."""
        deepest = max(row.length for row in self.batch.rows)
        while len(self._running) > 1 and not self._fits(len(self.batch.rows), deepest + 1):
            latest = self._running.pop()
            self.batch.leave(latest.rows)
            latest.rows = []
            self._waiting.appendleft(latest)
        try:
            logits = self.batch.grow()
        except FORWARD_ERRORS as error:
            self._fail(list(self._running), error)
            return
        order = {id(row): i for i, row in enumerate(self.batch.rows)}
        mine = [order[id(row)] for running in self._running for row in running.rows]
        self._advance(list(self._running), logits[mine])

    def _fail(self, failing: Sequence[_Running], error: BaseException) -> None:
        """End requests that the model cannot be run on."""
        logger.exception("a forward failed for %d requests", len(failing), exc_info=error)
        for running in failing:
            self._finish(running, "failed")
        try:
            self.batch.try_out()
        except FORWARD_ERRORS as cause:
            raise WorkError(
                f"the model cannot be run any more ({type(cause).__name__}): start the engine again"
            ) from cause

    def _advance(self, running: Sequence[_Running], logits: Float[Tensor, "rows vocab"]) -> None:
        """Choose the next token of every request, and hand over what its answer grows by."""
        if len(logits) > len(running):
            parts = logits.split([one.num_rows for one in running])
            logits = torch.stack([_mixed(*each) for each in zip(parts, running, strict=True)])
        # Of an expert whose weights have run away: there is nothing to choose by.
        sound = (~logits.isnan().any(-1)).tolist()
        for one in (one for one, ok in zip(running, sound, strict=True) if not ok):
            logger.error("an expert's logits are no numbers: %s", one.ticket.ask.experts)
            self._finish(one, "failed")
        going = [i for i, ok in enumerate(sound) if ok]
        asks = [running[i] for i in going]
        logits = logits[going] if len(going) < len(sound) else logits
        chosen = choose(logits, [o.ticket.ask.sampling for o in asks], [o.draw for o in asks])
        for one, token, row_logits in zip(asks, chosen, logits, strict=True):
            for row in one.rows:
                row.next_id = token
            self._take(one, token, row_logits)

    def _take(self, running: _Running, token: int, logits: Float[Tensor, " vocab"]) -> None:
        """Add a token to an answer."""
        self._tokens += 1
        running.answered.append(token)
        top = running.ticket.ask.sampling.top_logprobs
        ended = token in self._ends
        text = "" if ended else running.text.add(token)
        if top is not None and not ended:
            running.text.note(logits, top)
        finish: Finish | None = "stop" if ended or running.text.stopped else None
        if finish is None and len(running.answered) >= running.max_tokens:
            finish = "length"
        if finish is None:
            running.ticket.hand_over(Piece(text, 1, running.text.due()))
        else:
            self._finish(running, finish, text + running.text.end(), running.text.due())

    def _finish(
        self, running: _Running, why: Finish, text: str = "", tokens: tuple[Token, ...] = ()
    ) -> None:
        """Take a request out of the batch, and end it."""
        self.batch.leave(running.rows)
        if running in self._running:
            self._running.remove(running)
        self._end(running, text, tokens, why)

    def _end(self, running: _Running, text: str, tokens: tuple[Token, ...], finish: Finish) -> None:
        """Hand over the last piece, and let the experts go."""
        for resident in running.residents:
            self.residents.unpin(resident)
        num_tokens = 0 if finish in ("cancelled", "failed") else 1
        running.ticket.hand_over(Piece(text, num_tokens, tokens, finish))


def _mixed(logits: Float[Tensor, "rows vocab"], running: _Running) -> Float[Tensor, " vocab"]:
    """Average the logits of a request's experts by their weights."""
    if len(logits) == 1:
        return logits[0]
    weights = torch.tensor(running.ticket.ask.weights, dtype=logits.dtype, device=logits.device)
    return (weights / weights.sum()) @ logits
