"""An expert's files: hashed for its card, and read only as the card has them."""

import hashlib

from safetensors import SafetensorError, deserialize

from sae_ray.artifacts import FileRecord, hash_file, locate, read_file
from sae_ray.errors import RegistryError
from sae_ray.experts.card import SAFE_SUFFIXES
from sae_ray.storage import explain_storage


def record_files(adapter: str) -> dict[str, FileRecord]:
    """Hash the files of an adapter's folder, for its card.

    Raises:
        RegistryError: one of them is of a kind that may hold code.
    """
    fs, root = locate(adapter)
    with explain_storage(adapter):
        names = [str(path)[len(root) :].lstrip("/") for path in fs.find(root)]
    for name in names:
        if not name.endswith(SAFE_SUFFIXES):
            raise RegistryError(
                f"{adapter}/{name} may hold code: files of an expert end in "
                f"{', '.join(SAFE_SUFFIXES)}; save weights as safetensors"
            )
    return {name: hash_file(f"{adapter}/{name}") for name in sorted(names)}


def read_checked(path: str, record: FileRecord) -> bytes:
    """Return a file's content, if it is what was recorded."""
    try:
        content = read_file(path)
    except FileNotFoundError:
        raise RegistryError(f"{path} is missing: restore it, or make the expert again") from None
    if len(content) != record.bytes or hashlib.sha256(content).hexdigest() != record.sha256:
        raise RegistryError(
            f"{path} is not what its card says (another size or SHA-256): restore it, or make the "
            "expert again"
        )
    return content


def require_weights(path: str, content: bytes) -> None:
    """Refuse weights that cannot be read, or are empty: what ZeRO-3 leaves outside a gather."""
    try:
        tensors = deserialize(content)
    except SafetensorError as error:
        raise RegistryError(f"{path} is no safetensors file ({error}): save it again") from None
    empty = [name for name, tensor in tensors if not tensor["data"]]
    if empty or not tensors:
        what = f"tensor {empty[0]!r} of {path} is" if empty else f"{path} is"
        raise RegistryError(
            f"{what} empty: weights sharded by ZeRO-3 must be gathered before they are saved"
        )
