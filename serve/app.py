"""The service on one screen: an ingress before a router and engines, as Serve runs them.

serve run serve.app:build registry=/data/experts router=/data/router
serve deploy serve/config.yaml
"""

from typing import Any

from ray import serve
from ray.serve import Application
from ray.serve.config import AutoscalingConfig

from sae_ray.experts.agreement import agreed
from sae_ray.experts.answers import Limits
from sae_ray.experts.settings import ServeSettings
from serve.deployments import EngineReplica, IngressReplica, RouterReplica
from serve.hosts import require_address


def build(settings: ServeSettings) -> Application:
    """Put the service together.

    Raises:
        ConfigError: base, router and experts do not belong together, or everyone could ask from
            other machines: at the host given, or at that of the Serve that runs already.
    """
    require_address(settings)
    settings = agreed(settings)
    ingress = serve.deployment(
        IngressReplica,
        name="ingress",
        num_replicas=1,
        # What is too much is refused by the ingress itself, in OpenAI's words.
        max_ongoing_requests=100_000,
        **_gently(settings),
        ray_actor_options={"num_cpus": 0.1},
    )
    # All that the engines take on, and a batch more, of bodies on their way and of answers just
    # ended: what is beyond is refused before it is read or routed.
    most = settings.most_engines * (settings.max_rows + settings.max_waiting) + settings.max_rows
    http = {"max_body_bytes": int(settings.max_body_mb * 2**20), "max_ongoing": most}
    router = None if settings.router is None else _router(settings)
    return ingress.bind(_engine(settings), router, settings.keys, settings.timeout_s, http)  # pyright: ignore


def _gently(settings: ServeSettings) -> dict[str, Any]:
    """Let a new version stand beside the old one until it answers; the old one ends its answers."""
    return {"max_surge_percent": 100, "graceful_shutdown_timeout_s": settings.timeout_s}


def _engine(settings: ServeSettings) -> Application:
    ongoing = settings.max_rows + settings.max_waiting
    return serve.deployment(
        EngineReplica,
        name="engine",
        autoscaling_config=AutoscalingConfig(
            min_replicas=settings.min_engines,
            max_replicas=settings.most_engines,
            target_ongoing_requests=settings.max_rows,
        ),
        # The engine's own limit comes first: it refuses at once, where Serve would let wait.
        max_ongoing_requests=ongoing + 32,
        max_queued_requests=ongoing,
        health_check_period_s=5,
        **_gently(settings),
        ray_actor_options={
            "num_cpus": settings.num_cpus or 1,
            "num_gpus": int(settings.device.startswith("cuda")),
        },
    ).bind(  # pyright: ignore
        settings.lm,
        settings.registry,
        settings.model_dump(include=set(Limits.__dataclass_fields__)),
        settings.dtype,
        settings.device,
        settings.reload_s,
        settings.num_cpus,
    )


def _router(settings: ServeSettings) -> Application:
    return serve.deployment(
        RouterReplica,
        name="router",
        autoscaling_config=AutoscalingConfig(
            min_replicas=1, max_replicas=settings.max_routers, target_ongoing_requests=4
        ),
        max_ongoing_requests=16,
        max_queued_requests=2 * (settings.max_rows + settings.max_waiting),
        health_check_period_s=5,
        **_gently(settings),
        ray_actor_options={"num_cpus": settings.router_cpus or 1},
    ).bind(  # pyright: ignore
        settings.router,
        settings.lm,
        settings.sae,
        settings.registry,
        settings.reload_s,
        settings.router_cpus,
    )
