import socket

import pytest

from sae_ray.distributed.runtime import require_listener
from sae_ray.errors import ConfigError


def test_an_address_at_which_nobody_listens_is_refused_at_once() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
        with pytest.raises(ConfigError, match=f"no Ray cluster answers at RAY_ADDRESS={address}"):
            require_listener(address)
        probe.listen()
        require_listener(address)
    for elsewhere in ("auto", "ray://127.0.0.1:1"):
        require_listener(elsewhere)
