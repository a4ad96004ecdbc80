from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml
from ray._common.utils import import_attr
from ray.serve._private.api import call_user_app_builder_with_args_if_necessary
from ray.serve._private.build_app import build_app
from ray.serve.schema import ServeDeploySchema

from sae_ray import tiny
from sae_ray.adapters.attach import AdapterSpec
from sae_ray.errors import ConfigError
from sae_ray.experts.prototypes import Eyes, draw_prompts, requests
from sae_ray.experts.registry import ExpertRegistry
from sae_ray.experts.router import Router
from sae_ray.experts.settings import ServeSettings
from serve.app import build
from tests.made_experts import add_expert

CONFIG = Path(__file__).parents[2] / "serve" / "config.yaml"


def put_experts(folder: Path) -> None:
    """Make a registry of one expert and its router where the config looks for them."""
    expert = add_expert(ExpertRegistry(str(folder / "experts")), "velan", AdapterSpec(kind="lora"))
    rows = pq.read_table(tiny.pool_path(), columns=["domain", "messages"]).to_pylist()
    own = [requests(row["messages"])[-1] for row in rows if row["domain"] == "velan"][:20]
    eyes = Eyes.open("embedded", "embedded")
    background = eyes.read(draw_prompts(str(tiny.pool_path()), 200))
    known = {expert.id: ("velan", "", eyes.read(own))}
    router = Router.fit(eyes, known, background, mixed=True)
    router.save(str(folder / "router"), "embedded", "embedded")


def test_the_config_is_serves_and_builds_a_mixture(tmp_path: Path) -> None:
    text = CONFIG.read_text()
    assert text.count("/data/moie") > 2
    config = ServeDeploySchema.model_validate(
        yaml.safe_load(text.replace("/data/moie", str(tmp_path)))
    )
    (application,) = config.applications
    args: dict[str, Any] = application.args
    assert config.http_options.host == "127.0.0.1"
    assert config.http_options.request_timeout_s is not None
    assert config.http_options.request_timeout_s > args["timeout_s"]
    put_experts(tmp_path)
    builder = import_attr(str(application.import_path))
    built = build_app(
        call_user_app_builder_with_args_if_necessary(builder, args),
        name=application.name,
        route_prefix=application.route_prefix,
    )
    deployed = {one.name: one for one in built.deployments}
    assert set(deployed) == {"engine", "router", "ingress"}
    assert built.ingress_deployment_name == "ingress"
    # Engine and router read the same base, which the config need not name.
    assert deployed["engine"].init_args[:2] == ("embedded", f"{tmp_path}/experts")
    assert deployed["router"].init_args[:2] == (f"{tmp_path}/router", "embedded")


def test_an_address_beyond_loopback_is_not_built_without_keys() -> None:
    with pytest.raises(ConfigError, match="without keys everyone may ask"):
        build(ServeSettings(host="0.0.0.0"))


def test_a_router_without_experts_is_not_built(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no --registry"):
        build(ServeSettings(router=str(tmp_path / "router")))


def test_places_grow_with_the_engines() -> None:
    for engines in (1, 3):
        settings = ServeSettings(max_engines=engines, max_rows=8, max_waiting=4)
        built = build_app(build(settings), name="moie", route_prefix="/")
        (ingress,) = [one for one in built.deployments if one.name == "ingress"]
        assert ingress.init_args[-1]["max_ongoing"] == engines * (8 + 4) + 8


@pytest.mark.parametrize("num_cpus", [None, 2])
def test_an_engine_takes_of_the_cluster_what_it_was_given_to_compute_on(
    num_cpus: int | None,
) -> None:
    built = build_app(build(ServeSettings(num_cpus=num_cpus)), name="moie", route_prefix="/")
    (engine,) = [one for one in built.deployments if one.name == "engine"]
    assert engine.init_args[-1] == num_cpus
    assert engine.ray_actor_options is not None
    assert engine.ray_actor_options["num_cpus"] == (num_cpus or 1)
