"""A service under load that loses a part answers on: nothing accepted is lost, streams say so."""

import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from tests.mixture import Mixture, make_mixture, prompts
from tests.service import ROOT, Load, Service, serving, wait_until

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(1200)]

logger = logging.getLogger(__name__)
CONTROLLER = "ServeController"


@pytest.fixture(scope="module")
def mixture(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_lm_of: Callable[[str], Path],
    make_tiny_sae: Callable[[Path], Path],
) -> Mixture:
    """Two experts and a router."""
    folder = tmp_path_factory.mktemp("mixture")
    return make_mixture(folder, tiny_lm_of("llama"), make_tiny_sae(folder / "sae"))


@pytest.fixture(scope="module")
def flags(mixture: Mixture, tiny_lm_of: Callable[[str], Path]) -> list[str]:
    """The mixture on two engines; with time for replicas to start on a busy machine."""
    where = [f"--lm={tiny_lm_of('llama')}", f"--registry={mixture.registry}"]
    return [
        *where,
        f"--router={mixture.router}",
        "--min_engines=2",
        "--num_cpus=1",
        "--timeout_s=300",
    ]


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory, flags: list[str]) -> Iterator[Service]:
    with serving(tmp_path_factory.mktemp("service"), flags) as service:
        yield service


@pytest.fixture(scope="module")
def load(service: Service) -> Iterator[Load]:
    """What is asked while parts are lost: of the mixture, an expert and the base."""
    asked = {"moie": prompts("rivers", 1)[0], "sums": prompts("sums", 1)[0], "base": "Write a"}
    with Load(service.url, asked) as load:
        yield load


def lose(service: Service, load: Load, title: str, victims: list[psutil.Process]) -> None:
    """Kill processes under load, wait for others in their place, and for answers from these."""
    there = len(service.actors(title))
    with load.running():
        load.wait_for(6)
        broken = len(load.broken)
        for victim in victims:
            victim.kill()
        until_next_s = load.wait_for(1)
        gone = {victim.pid for victim in victims}

        def replaced() -> bool:
            pids = {one.pid for one in service.actors(title)}
            return len(pids) >= there and not pids & gone

        until_whole_s = wait_until(replaced, f"another {title}")
        load.wait_for(6)
        time.sleep(1)
        load.wait_for(6)
    logger.info(
        "%d %s killed: next answer after %.1f s, replaced after %.1f s; so far %d whole answers "
        "and %d streams, of which %d broke now",
        len(victims),
        title,
        until_next_s,
        until_next_s + until_whole_s,
        len(load.whole),
        len(load.streamed),
        len(load.broken) - broken,
    )
    assert load.wrong == []
    assert all(error["type"] == "server_error" for error in load.broken)


def test_an_engine_is_lost(service: Service, load: Load) -> None:
    lose(service, load, "ServeReplica:moie:engine", service.replicas("engine")[:1])


def test_all_engines_are_lost(service: Service, load: Load) -> None:
    lose(service, load, "ServeReplica:moie:engine", service.replicas("engine"))


def test_the_router_is_lost(service: Service, load: Load) -> None:
    lose(service, load, "ServeReplica:moie:router", service.replicas("router"))


def test_the_controller_is_lost_and_an_engine_after_it(service: Service, load: Load) -> None:
    lose(service, load, CONTROLLER, service.actors(CONTROLLER))
    # Who watches over the replicas is there again, and knows them.
    lose(service, load, "ServeReplica:moie:engine", service.replicas("engine")[:1])


TWO_NODES = """
import contextlib, os, sys
from ray._private.state import actors
from ray.cluster_utils import Cluster
sys.path.insert(0, {root!r})
from sae_ray.config import run_job
from sae_ray.experts.settings import ServeSettings
from serve.running import running

# The head takes in HTTP and nothing else; what answers is spread over two other nodes.
head = {{"num_cpus": 0, "include_dashboard": False}}
cluster = Cluster(initialize_head=True, head_node_args=head)
nodes = {{node.node_id: node for node in (cluster.add_node(num_cpus=2) for _ in range(2))}}
os.environ["RAY_ADDRESS"] = cluster.address


def main(settings):
    with running(settings) as url, contextlib.suppress(KeyboardInterrupt):
        sys.stdout.write(f"serving at {{url}}\\n")
        sys.stdout.flush()
        sys.stdin.readline()
        homes = {{a["Name"]: a["Address"]["NodeID"] for a in actors().values() if a["Name"]}}
        (ingress,) = (home for name, home in homes.items() if "#ingress#" in name)
        (victim,) = (node for home, node in nodes.items() if home != ingress)
        cluster.remove_node(victim, allow_graceful=False)
        cluster.add_node(num_cpus=2)
        sys.stdin.readline()


code = run_job(main, ServeSettings, sys.argv[1:])
cluster.shutdown()
sys.exit(code)
"""


@pytest.mark.soak
def test_a_node_without_the_ingress_is_lost(flags: list[str], tmp_path: Path) -> None:
    script = tmp_path / "two_nodes.py"
    script.write_text(TWO_NODES.format(root=str(ROOT)))
    asked = {"moie": prompts("rivers", 1)[0], "sums": prompts("sums", 1)[0]}
    with (
        serving(tmp_path, flags, script=script) as service,
        Load(service.url, asked) as load,
    ):
        before = {one.pid for one in service.actors("ServeReplica:moie:")}
        assert len(before) == 4
        with load.running():
            load.wait_for(6)
            assert service.process.stdin is not None
            service.process.stdin.write("lose\n")
            service.process.stdin.flush()

            def replaced() -> bool:
                now = {one.pid for one in service.actors("ServeReplica:moie:")}
                return len(now) == 4 and now != before

            wait_until(replaced, "what was on the node, on another")
            load.wait_for(12)
    assert load.wrong == []
