from pathlib import Path

import psutil
import pytest

from sae_ray.errors import WorkError
from sae_ray.explain import asking

SERVES = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.{handler})
port = [one for one in sys.argv if one.startswith("--port=")][0].removeprefix("--port=")
print("a word before", flush=True)
print(f"serving at http://127.0.0.1:{port}", flush=True)
time.sleep(600)
"""


STOPS = SERVES.format(handler="default_int_handler", port="{port}")
STAYS = SERVES.format(handler="SIG_IGN", port="{port}")


def job(folder: Path, code: str) -> Path:
    path = folder / "job.py"
    path.write_text(code)
    return path


def is_running(path: Path) -> bool:
    lines = (one.info["cmdline"] or () for one in psutil.process_iter(["cmdline"]))
    return any(str(path) in line for line in lines)


def test_services_side_by_side_have_ports_of_their_own_and_end_with_their_block(
    tmp_path: Path,
) -> None:
    path = job(tmp_path, STOPS)
    with asking.service(path) as one, asking.service(path) as other:
        assert one.startswith("http://127.0.0.1:")
        assert one != other
        assert is_running(path)
    assert not is_running(path)


def test_a_service_that_ends_or_never_starts_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(WorkError, match="the service ended"), asking.service(job(tmp_path, "")):
        pass
    monkeypatch.setattr(asking, "_START_S", 2.0)
    path = job(tmp_path, "import time; time.sleep(600)")
    with pytest.raises(WorkError, match="not there after 2 s"), asking.service(path):
        pass
    assert not is_running(path)


def test_a_service_that_does_not_stop_is_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(asking, "_STOP_S", 1.0)
    path = job(tmp_path, STAYS)
    with asking.service(path):
        assert is_running(path)
    assert not is_running(path)
