import json
import multiprocessing
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file

from sae_ray.errors import ArtifactError, RegistryError, SaeRayError
from sae_ray.experts.card import ExpertCard, Measure
from sae_ray.experts.files import record_files
from sae_ray.experts.registry import ExpertRegistry


def measure(low: float) -> Measure:
    return Measure(
        name="reply_loss", base=2.0, expert=1.5, gain=0.5, low=low, high=0.6, num_rows=40
    )


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """A folder with the files of an adapter."""
    folder = tmp_path / "adapter"
    folder.mkdir()
    save_file({"lora_A": torch.ones(2, 3)}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    return folder


def card_of(adapter: Path, name: str = "maths", low: float = 0.4, task: str = "sums") -> ExpertCard:
    return ExpertCard(
        name=name,
        description=task,
        adapter="lora",
        objective="sft",
        base="tiny",
        base_sha256="b" * 64,
        files=record_files(str(adapter)),
        num_parameters=6,
        share=0.01,
        measures=[measure(low)],
    )


@pytest.fixture(params=["local", "memory", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "s3":
        return request.getfixturevalue("s3_folder") + "/experts"
    return str(tmp_path / "reg") if request.param == "local" else f"memory://{uuid.uuid4().hex}"


def test_an_expert_is_registered_activated_fetched_and_retired(
    place: str, adapter: Path, tmp_path: Path
) -> None:
    registry = ExpertRegistry(place)
    assert registry.experts() == []
    first = registry.register(card_of(adapter), str(adapter))
    assert (first.status, first.version) == ("candidate", 1)
    assert registry.register(card_of(adapter), str(adapter)) == first
    assert registry.activate("maths").status == "active"
    second = registry.register(card_of(adapter, task="harder sums"), str(adapter))
    assert (second.version, second.status) == (2, "candidate")
    assert registry.find("maths").version == 1
    registry.activate("maths@2")
    assert [(one.version, one.status) for one in registry.experts()] == [
        (1, "retired"),
        (2, "active"),
    ]
    folder = ExpertRegistry(place).fetch("maths", tmp_path / "fetched")
    assert torch.equal(load_file(folder / "adapter_model.safetensors")["lora_A"], torch.ones(2, 3))
    assert registry.retire(second.id[:6], "bad rows").events[-1].reason == "bad rows"
    assert registry.active() == []


def test_only_what_beats_its_base_becomes_active_unless_a_reason_is_recorded(
    tmp_path: Path, adapter: Path
) -> None:
    registry = ExpertRegistry(str(tmp_path / "reg"))
    weak = registry.register(card_of(adapter, low=-0.01), str(adapter))
    for reason in (None, " "):
        with pytest.raises(RegistryError, match="does not beat its base"):
            registry.activate(weak.id, force_reason=reason)
    assert registry.find(weak.id).status == "candidate"
    assert registry.activate(weak.id, force_reason="a demonstration").status == "active"
    assert registry.find("maths").forced_because == "a demonstration"
    strong = registry.register(card_of(adapter), str(adapter))
    assert registry.activate(strong.id, force_reason="not needed").forced_because is None


@pytest.mark.parametrize(
    "spoil",
    [
        lambda path: path.write_bytes(path.read_bytes()[:-1]),
        lambda path: path.write_bytes(path.read_bytes()[:-1] + b"\x01"),
        lambda path: path.unlink(),
    ],
    ids=["truncated", "tampered", "gone"],
)
def test_changed_files_are_refused_by_their_hash(
    tmp_path: Path, adapter: Path, spoil: Callable[[Path], None]
) -> None:
    registry = ExpertRegistry(str(tmp_path / "reg"))
    expert = registry.register(card_of(adapter), str(adapter))
    spoil(tmp_path / "reg/experts" / expert.id / "adapter/adapter_model.safetensors")
    with pytest.raises(RegistryError, match=r"adapter_model\.safetensors is"):
        registry.fetch("maths", tmp_path / "fetched")
    assert not (tmp_path / "fetched/adapter_model.safetensors").exists()
    with pytest.raises(RegistryError):
        registry.verify("maths")


def test_a_changed_card_is_refused(tmp_path: Path, adapter: Path) -> None:
    registry = ExpertRegistry(str(tmp_path / "reg"))
    expert = registry.register(card_of(adapter, low=-1.0), str(adapter))
    card = tmp_path / "reg/experts" / expert.id / "card.json"
    card.write_bytes(card.read_bytes().replace(b'"low":-1.0', b'"low":1.0'))
    with pytest.raises(RegistryError, match="was changed"):
        registry.activate("maths")


def test_pickles_paths_and_empty_weights_are_never_registered(
    tmp_path: Path, adapter: Path
) -> None:
    registry = ExpertRegistry(str(tmp_path / "reg"))
    card = card_of(adapter)
    (adapter / "adapter_model.bin").write_bytes(b"pickle")
    with pytest.raises(RegistryError, match="may hold code"):
        record_files(str(adapter))
    record = next(iter(card.files.values())).model_dump()
    for name in ("evil.pkl", "../out.safetensors", "/etc/x.safetensors", "a/../b.safetensors"):
        content = json.loads(card.encode()) | {"files": {name: record}}
        with pytest.raises(ArtifactError, match="is no card"):
            ExpertCard.decode(json.dumps(content).encode(), "card.json")
    (adapter / "adapter_model.bin").unlink()
    save_file({"lora_A": torch.empty(0)}, adapter / "adapter_model.safetensors")
    with pytest.raises(RegistryError, match="must be gathered"):
        registry.register(card_of(adapter), str(adapter))
    (adapter / "adapter_model.safetensors").write_bytes(b"\x80\x02no")
    with pytest.raises(RegistryError, match="no safetensors file"):
        registry.register(card_of(adapter), str(adapter))
    assert registry.experts() == []


def test_names_that_mean_nothing_or_too_much_are_refused(tmp_path: Path, adapter: Path) -> None:
    registry = ExpertRegistry(str(tmp_path / "reg"))
    registry.register(card_of(adapter), str(adapter))
    for name in ("mathe", "maths@7", "ab", "maths@"):
        if name == "maths@":
            assert registry.find(name).version == 1
            continue
        with pytest.raises(RegistryError, match=r"which holds maths@1"):
            registry.find(name)


def _register(place: str, adapter: str, worker: int, count: int) -> None:
    registry = ExpertRegistry(place)
    for number in range(count):
        card = card_of(Path(adapter), task=f"task {worker} {number}")
        registry.register(card, adapter)
        registry.activate(card.id)


def test_writers_at_once_lose_nothing(tmp_path: Path, adapter: Path) -> None:
    place, context = str(tmp_path / "reg"), multiprocessing.get_context("spawn")
    writers = [
        context.Process(target=_register, args=(place, str(adapter), worker, 5))
        for worker in range(3)
    ]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    experts = ExpertRegistry(place).experts()
    assert [one.version for one in experts] == list(range(1, 16))
    assert [one.status for one in experts].count("active") == 1
    assert len(list((tmp_path / "reg/log").iterdir())) == 30


def test_errors_of_the_registry_are_the_users(tmp_path: Path) -> None:
    log = tmp_path / "reg/log"
    log.mkdir(parents=True)
    (log / "000001.json").write_text("{}")
    with pytest.raises(SaeRayError, match="none of a registry's"):
        ExpertRegistry(str(tmp_path / "reg")).experts()


def test_a_card_that_cannot_be_read_is_the_trouble_of_its_expert_alone(
    tmp_path: Path, adapter: Path
) -> None:
    registry = ExpertRegistry(str(tmp_path / "reg"))
    good = registry.register(card_of(adapter, task="good"), str(adapter))
    bad = registry.register(card_of(adapter, name="other", task="bad"), str(adapter))
    (tmp_path / "reg/experts" / bad.id / "card.json").write_text("{")
    assert [one.id for one in registry.experts()] == [good.id]
    assert registry.activate("maths").status == "active"
    with pytest.raises(RegistryError, match="was changed since it was registered"):
        registry.find(bad.id)
    # Registered again, it is whole, and no other version.
    assert registry.register(card_of(adapter, name="other", task="bad"), str(adapter)).version == 1
    assert registry.find("other").id == bad.id


def test_files_that_were_damaged_are_mended_by_registering_again(
    tmp_path: Path, adapter: Path
) -> None:
    registry = ExpertRegistry(str(tmp_path / "reg"))
    expert = registry.register(card_of(adapter), str(adapter))
    place = tmp_path / "reg/experts" / expert.id / "adapter/adapter_model.safetensors"
    place.write_bytes(b"torn")
    with pytest.raises(RegistryError):
        registry.verify("maths")
    registry.register(card_of(adapter), str(adapter))
    assert registry.verify("maths").version == 1


@pytest.mark.parametrize("name", ["base", "moie"])
def test_no_expert_is_called_what_a_service_calls_its_own(adapter: Path, name: str) -> None:
    with pytest.raises(ValidationError, match="a service calls its base and its mixture"):
        card_of(adapter, name=name)
    assert card_of(adapter, name=f"{name}d").name == f"{name}d"
