"""The service on one screen: an ingress before a router and engines, as Serve runs them.

serve run serve.app:build registry=/data/experts router=/data/router
serve deploy serve/config.yaml
"""

from ray import serve
from ray.serve import Application
from ray.serve.config import AutoscalingConfig

from sae_ray.experts.answers import Limits
from sae_ray.experts.settings import ServeSettings
from serve.deployments import EngineReplica, IngressReplica, RouterReplica


def build(settings: ServeSettings) -> Application:
    """Put the service together."""
    ongoing = settings.max_rows + settings.max_waiting
    # A new version stands beside the old one until it answers; the old one answers what it began.
    gently = {"max_surge_percent": 100, "graceful_shutdown_timeout_s": settings.timeout_s}
    engine = serve.deployment(
        EngineReplica,
        name="engine",
        autoscaling_config=AutoscalingConfig(
            min_replicas=settings.min_engines,
            max_replicas=max(settings.min_engines, settings.max_engines),
            target_ongoing_requests=settings.max_rows,
        ),
        # The engine's own limit comes first: it refuses at once, where Serve would let wait.
        max_ongoing_requests=ongoing + 32,
        max_queued_requests=ongoing,
        health_check_period_s=5,
        **gently,
        ray_actor_options={
            "num_cpus": settings.num_cpus,
            "num_gpus": int(settings.device.startswith("cuda")),
        },
    ).bind(  # pyright: ignore
        settings.lm,
        settings.registry,
        settings.model_dump(include=set(Limits.__dataclass_fields__)),
        settings.dtype,
        settings.device,
        settings.reload_s,
    )
    router = settings.router and serve.deployment(
        RouterReplica,
        name="router",
        autoscaling_config=AutoscalingConfig(
            min_replicas=1, max_replicas=settings.max_routers, target_ongoing_requests=4
        ),
        max_ongoing_requests=16,
        max_queued_requests=2 * ongoing,
        health_check_period_s=5,
        **gently,
        ray_actor_options={"num_cpus": settings.num_cpus},
    ).bind(settings.router, settings.lm, settings.sae)  # pyright: ignore
    ingress = serve.deployment(
        IngressReplica,
        name="ingress",
        num_replicas=1,
        # What is too much is refused by the ingress itself, in OpenAI's words.
        max_ongoing_requests=100_000,
        **gently,
        ray_actor_options={"num_cpus": 0.1},
    )
    http = {"max_body_bytes": int(settings.max_body_mb * 2**20), "max_ongoing": 4 * ongoing}
    return ingress.bind(engine, router or None, settings.keys, settings.timeout_s, http)  # pyright: ignore
