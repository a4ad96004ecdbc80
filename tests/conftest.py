"""What tests share: a world of their own, tiny models of every family, a Ray cluster, S3, data."""

import json
import os
import random
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

# A world of their own, before any library looks at it.
os.environ["HOME"] = tempfile.mkdtemp(prefix="home-")
os.environ["HF_HOME"] = os.environ["HOME"] + "/huggingface"
os.environ.update(
    DS_ACCELERATOR="cpu",
    HF_HUB_OFFLINE="1",
    RAY_USAGE_STATS_ENABLED="0",
    TOKENIZERS_PARALLELISM="false",
    WANDB_MODE="disabled",
)

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from sae_ray.curate.settings import IndexSettings

ROOT = Path(__file__).parent.parent
SHARED_DATA = ROOT.parent / "shared" / "data"

COSTS = {"ray_cluster": "ray", "gpu": "gpu"}
"""Fixtures that cost something, and the marker that each puts on the tests that use it."""

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "gpt_neox", "gpt2")

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL_TOKENS = ("<pad>", "<s>", "<|im_start|>", "<|im_end|>")


def pytest_configure(config: pytest.Config) -> None:
    """Take away what would reach into the tests' world, and leave nothing of it behind."""
    for name in [name for name in os.environ if name.startswith("SAE_RAY_")]:
        del os.environ[name]
    os.environ.pop("RAY_ADDRESS", None)
    config.add_cleanup(lambda: shutil.rmtree(os.environ["HOME"], ignore_errors=True))


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark each test with the costs of its fixtures, before `-m` chooses."""
    for item in items:
        for fixture, marker in COSTS.items():
            if fixture in getattr(item, "fixturenames", ()):
                item.add_marker(marker)


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """A Ray of this test run alone: four logical CPUs, loopback, gone afterwards."""
    import ray  # noqa: PLC0415 - six seconds that most runs do not need

    # Ray: sockets live in this folder, and their paths may have about 100 characters.
    folder = Path("/tmp") / f"sr-{uuid.uuid4().hex[:8]}"
    ray.init(
        address="local",
        num_cpus=4,
        num_gpus=0,
        include_dashboard=False,
        object_store_memory=200 * 2**20,
        log_to_driver=False,
        _temp_dir=str(folder),
    )
    yield
    ray.shutdown()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def gpu() -> torch.device:
    """The GPU, for tests that cannot do without."""
    if not torch.cuda.is_available():
        pytest.skip("no GPU on this machine")
    return torch.device("cuda")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data that may lie beside the repository."""
    if not SHARED_DATA.is_dir():
        pytest.skip("the real data (../shared/data) is not on this machine")
    return SHARED_DATA


@pytest.fixture(scope="session")
def s3_server() -> Iterator[None]:
    """An S3 server on loopback, which s3:// URLs reach while the tests run."""
    from moto.server import ThreadedMotoServer  # noqa: PLC0415 - imports half of AWS

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    settings = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setenv(name, value)
        yield
    server.stop()


@pytest.fixture
def s3_folder(s3_server: None) -> str:
    """The URL of a new bucket."""
    import s3fs  # noqa: PLC0415 - only where S3 is tested

    url = f"s3://bucket-{uuid.uuid4().hex[:12]}"
    s3fs.S3FileSystem().mkdir(url)
    return url


@pytest.fixture(scope="session")
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of 400 tokens with a chat template, made here."""
    return train_tokenizer()


def train_tokenizer() -> PreTrainedTokenizerFast:
    """Train the tiny tokenizer."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    roles = ["system", "user", "assistant"] * 20
    sentence = "Write a query that counts the orders of each customer since the last day of May."
    tokenizer.train_from_iterator([*roles, sentence, sentence], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="<|im_end|>",
        chat_template=CHAT_TEMPLATE,
    )


@pytest.fixture(scope="session")
def tiny_lm_of(
    tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerFast
) -> Callable[[str], Path]:
    """Return the folder of a tiny random model of a family, saved once a session."""
    folders: dict[str, Path] = {}

    def tiny_lm_of(family: str) -> Path:
        if family not in folders:
            folder = tmp_path_factory.mktemp(family)
            save_tiny_lm(family, tiny_tokenizer, folder)
            folders[family] = folder
        return folders[family]

    return tiny_lm_of


@pytest.fixture
def tiny_lm(tiny_lm_of: Callable[[str], Path]) -> Path:
    """The folder of a tiny random Llama."""
    return tiny_lm_of("llama")


@pytest.fixture(params=FAMILIES)
def any_tiny_lm(request: pytest.FixtureRequest, tiny_lm_of: Callable[[str], Path]) -> Path:
    """The folder of a tiny random model, once for each family."""
    return tiny_lm_of(request.param)


def save_tiny_lm(family: str, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Save a random model: width 32, and enough layers for every kind of attention it has."""
    sizes = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "num_hidden_layers": 4 if family in ("gemma2", "gemma3") else 3,
        "num_attention_heads": 4,
        "max_position_embeddings": 512,
        # Wide enough that logits differ between tokens, which 0.02 at this width does not give.
        "initializer_range": 0.2,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    if family != "gpt2":
        sizes |= {"intermediate_size": 64}
    if family not in ("gpt2", "gpt_neox"):
        sizes |= {"num_key_value_heads": 2, "head_dim": 8}
    if family in ("mistral", "gemma2", "gemma3"):
        # Shorter than the conversations in the tests, so that the window shows.
        sizes |= {"sliding_window": 16}
    if family == "gemma3":
        sizes |= {"layer_types": ["sliding_attention"] * 3 + ["full_attention"]}
    config = AutoConfig.for_model("gemma3_text" if family == "gemma3" else family, **sizes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


_TOPICS = {
    "orders": "orders customer query count day",
    "rivers": "river water bridge boat rain",
    "music": "song piano voice sing chord",
}


def save_tiny_sae(
    folder: Path, hook_point: str = "blocks.1.hook_resid_post", seed: int = 0
) -> Path:
    """Save a random JumpReLU SAE: 32 values in, 64 latents, a third of them on at a token."""
    generator = torch.Generator().manual_seed(seed)
    W_dec = torch.randn(64, 32, generator=generator)
    W_dec /= W_dec.norm(dim=-1, keepdim=True)
    weights = {
        "W_enc": W_dec.T.contiguous(),
        "W_dec": W_dec,
        "b_enc": torch.zeros(64),
        "b_dec": torch.zeros(32),
        "threshold": torch.full((64,), 0.5),
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / "sae_weights.safetensors")
    config = {
        "d_in": 32,
        "d_sae": 64,
        "dtype": "float32",
        "architecture": "jumprelu",
        "apply_b_dec_to_input": False,
        "normalize_activations": "none",
        "metadata": {"hook_name": hook_point, "model_name": "tiny"},
    }
    (folder / "cfg.json").write_text(json.dumps(config))
    return folder


def write_pool(path: Path, num_rows: int, seed: int = 0) -> Path:
    """Write conversations about three topics, of uneven lengths, as JSONL."""
    rng = random.Random(seed)
    lines = []
    for i in range(num_rows):
        topic = sorted(_TOPICS)[i % len(_TOPICS)]
        words = _TOPICS[topic].split()
        question = " ".join(rng.choices(words, k=rng.randint(3, 30)))
        answer = " ".join(rng.choices(words, k=rng.randint(1, 12)))
        messages = [
            {"role": "user", "content": f"Q{i} {question}"},
            {"role": "assistant", "content": answer},
        ]
        lines.append(json.dumps({"id": f"row-{i}", "source": topic, "messages": messages}))
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="session")
def make_tiny_sae() -> Callable[[Path], Path]:
    """Saves a random SAE on the tiny Llama in a folder."""
    return save_tiny_sae


@pytest.fixture(scope="session")
def make_pool() -> Callable[[Path, int], Path]:
    """Writes a pool of so many conversations."""
    return write_pool


@pytest.fixture(scope="session")
def whole() -> Callable[[Path], PreTrainedModel]:
    """Loads a whole tiny model in fp32."""

    def load(path: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
        return AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, attn_implementation="eager"
        ).eval()

    return load


@pytest.fixture
def sae_at(tmp_path: Path, make_tiny_sae: Callable[..., Path]) -> Callable[..., str]:
    """Saves a SAE for a hook point: 32 values in, 64 latents, with biases that matter."""

    def save(hook_point: str, seed: int = 0) -> str:
        folder = make_tiny_sae(tmp_path / f"sae-{hook_point}-{seed}", hook_point, seed)
        weights = load_file(folder / "sae_weights.safetensors")
        generator = torch.Generator().manual_seed(seed + 100)
        weights["b_dec"] = 0.1 * torch.randn(32, generator=generator)
        weights["b_enc"] = 0.1 * torch.randn(64, generator=generator)
        weights["threshold"] = torch.full((64,), 0.1)
        save_file(weights, folder / "sae_weights.safetensors")
        return str(folder)

    return save


@pytest.fixture
def tiny_sae(tmp_path: Path) -> Path:
    """The folder of a random SAE on the tiny Llama."""
    return save_tiny_sae(tmp_path / "sae")


@pytest.fixture
def tiny_pool(tmp_path: Path) -> Path:
    """A JSONL file of 60 conversations."""
    return write_pool(tmp_path / "pool.jsonl", 60)


@pytest.fixture
def tiny_settings(tiny_pool: Path, tiny_lm: Path, tiny_sae: Path) -> IndexSettings:
    """Settings of an index over the tiny pool: four shards, scored in this process."""
    return IndexSettings(
        pool=str(tiny_pool),
        lm=str(tiny_lm),
        sae=str(tiny_sae),
        dtype="float32",
        rows_per_shard=16,
        check_fit=False,
        num_workers=0,
    )


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """Tiny products are slower on several threads, and far slower on a busy machine."""
    torch.set_num_threads(1)
