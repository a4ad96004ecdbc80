"""The service as on a cluster: deployed from its file, and again while requests go on."""

import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.head import RAY, head_node
from tests.mixture import make_mixture, prompts
from tests.service import DEADLINE_S, ROOT, Load, Service, free_port, wait_until

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(1200)]

PARTS = ("engine", "router", "ingress")


def deploy(folder: Path, config: dict[str, Any], url: str, environment: dict[str, str]) -> None:
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(config))
    line = [str(RAY.with_name("serve")), "deploy", str(file), f"--address={url}"]
    done = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=DEADLINE_S)
    assert done.returncode == 0, done.stderr


def test_deployed_from_its_file_and_again_without_a_failed_request(
    tmp_path: Path, tiny_lm_of: Callable[[str], Path], make_tiny_sae: Callable[[Path], Path]
) -> None:
    lm = tiny_lm_of("llama")
    mixture = make_mixture(tmp_path, lm, make_tiny_sae(tmp_path / "sae"))
    config = yaml.safe_load((ROOT / "serve" / "config.yaml").read_text())
    port = config["http_options"]["port"] = free_port()
    (application,) = config["applications"]
    paths = {"lm": str(lm), "registry": mixture.registry, "router": mixture.router}
    application["args"] |= {**paths, "min_engines": 1, "max_engines": 1}
    seen = {"PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    with head_node(tmp_path, seen) as (url, environment, process):
        deploy(tmp_path, config, url, environment)
        service = Service(f"http://127.0.0.1:{port}/v1", process, tmp_path / "head.log")
        wait_until(lambda: all(map(service.replicas, PARTS)), "replicas of every part")
        wait_until(service.answers, "an answer")
        asked = {"moie": prompts("rivers", 1)[0], "sums": prompts("sums", 1)[0]}
        before = {part: {one.pid for one in service.replicas(part)} for part in PARTS}
        with Load(service.url, asked) as load, load.running():
            load.wait_for(4)
            application["args"] |= {"max_waiting": 16, "router_cpus": 1, "max_body_mb": 2}
            deploy(tmp_path, config, url, environment)

            def renewed() -> bool:
                now = {part: {one.pid for one in service.replicas(part)} for part in PARTS}
                return all(now[part] and not now[part] & before[part] for part in PARTS)

            wait_until(renewed, "new replicas of every part and no old ones")
            load.wait_for(6)
    assert load.wrong == []
    assert load.broken == []
