"""Settings of a service: which base and experts, who chooses among them, and how much at once."""

from pydantic import Field

from sae_ray.config import JobConfig
from sae_ray.lm import DTypeName


class ServeSettings(JobConfig):
    """What is served, and how much of it at once."""

    lm: str | None = None
    """Folder or hub name of the base; the router's or the experts' own unless given, and the
    embedded default where there are neither."""
    registry: str | None = None
    """Folder or URL of the experts; the base answers alone unless given."""
    router: str | None = None
    """Folder of a fitted router; without one nobody can ask the mixture."""
    sae: str | None = None
    """SAE that the router reads; its own unless given."""
    keys: str | None = None
    """File of hashed API keys, one a line; everyone may ask unless given."""
    dtype: DTypeName = "float32"
    """Of weights and arithmetic."""
    device: str = "cpu"
    """Where to compute: cpu, or cuda, of which each engine then takes one."""
    max_rows: int = Field(default=32, ge=1)
    """Rows of an engine's batch."""
    max_waiting: int = Field(default=64, ge=1)
    """Requests that may wait for a place in it; those beyond are refused at once."""
    prefill_tokens: int = Field(default=2048, ge=1)
    """Tokens of prompts read between two steps of the answers in progress."""
    adapter_memory_mb: float = Field(default=2048, gt=0)
    """What all experts in an engine's memory may take."""
    kv_memory_mb: float = Field(default=4096, gt=0)
    """What keys and values in an engine's memory may take; no prompt may be longer than that."""
    min_engines: int = Field(default=1, ge=1)
    """Engines at least; of two, one may be lost without a pause."""
    max_engines: int = Field(default=1, ge=1)
    """Engines at most, where that is more."""
    max_routers: int = Field(default=1, ge=1)
    """Routers at most; there is always one."""
    reload_s: float = Field(default=5.0, gt=0)
    """Seconds between two looks into the registry."""
    timeout_s: float = Field(default=120.0, gt=0)
    """Until an answer is given up, in seconds."""
    max_body_mb: float = Field(default=1.0, gt=0)
    """Largest request."""
    num_cpus: int | None = Field(default=None, ge=1)
    """Cores that each engine computes on, and takes of the cluster. Unless given it computes on all
    of its machine and takes one: give it where engines share a machine."""
    router_cpus: int | None = Field(default=None, ge=1)
    """The same of each router."""
    host: str = "127.0.0.1"
    """Address to listen on; beyond loopback it needs keys."""
    port: int = Field(default=8000, ge=1, le=65535)
    """Port to listen on."""

    @property
    def most_engines(self) -> int:
        """Return how many engines there may be."""
        return max(self.min_engines, self.max_engines)
