"""Job configs: one YAML file, the environment and flags; help and errors that teach.

A job's config is one flat, frozen pydantic model. Each value comes from the first of

    --field value    >    SAE_RAY_FIELD    >    --config FILE.yaml    >    its default

and a key that no field knows is refused with the nearest that one does. The docstring under a
field is its help; the docstring of the class opens `--help` and starts with lines to run.

Flags are read here and not by pydantic-settings, whose lists take row ids such as `null`, `true`
and `it"s` for something else than text.
"""

import argparse
import difflib
import inspect
import json
import logging
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import (
    Annotated,
    Any,
    Literal,
    NoReturn,
    TypeVar,
    Union,
    get_args,
    get_origin,
)

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, JsonValue, ValidationError
from pydantic.fields import FieldInfo

from sae_ray.errors import ConfigError, SaeRayError
from sae_ray.storage import is_refusal, storage_errors, told

ENV_PREFIX = "SAE_RAY_"

logger = logging.getLogger(__name__)


def require_absolute_inside_ray_job(path: str) -> str:
    """Return `path`, refusing a relative one where the working directory is thrown away."""
    # Ray: `ray job submit` sets this for the entrypoint and for nothing else.
    inside_ray_job = "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ
    if inside_ray_job and "://" not in path and not Path(path).is_absolute():
        raise ConfigError(
            f"output path {path!r} is relative, and a Ray job runs in a folder that is deleted "
            f"after it: give an absolute path on storage that all nodes share, or a URL such as "
            f"s3://bucket/{path}"
        )
    return path


OutputPath = Annotated[str, AfterValidator(require_absolute_inside_ray_job)]
"""Where a job writes: a folder or any fsspec URL; absolute inside a Ray job."""


ConfigT = TypeVar("ConfigT", bound="JobConfig")


class JobConfig(BaseModel):
    """Base of every job's config: subclass it, and document each field underneath."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, coerce_numbers_to_str=True
    )

    @classmethod
    def parse(cls: type[ConfigT], argv: Sequence[str] | None = None) -> ConfigT:
        """Read flags, environment and YAML; `argv` is `sys.argv[1:]` unless told."""
        flags = _read_flags(cls, sys.argv[1:] if argv is None else argv)
        config_path = flags.pop("config", None)
        from_file = _read_yaml(cls, str(config_path)) if config_path is not None else {}
        values = {**from_file, **_read_environment(cls), **flags}
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise ConfigError(_explain(cls, error)) from None


def run_job(
    main: Callable[[ConfigT], int | None],
    config_class: type[ConfigT],
    argv: Sequence[str] | None = None,
) -> int:
    """Run a job's `main` and return its exit code: a `SaeRayError` is one line on stderr and 2."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("sae_ray").setLevel(logging.INFO)
    try:
        return main(config_class.parse(argv)) or 0
    except SaeRayError as error:
        return _fail(str(error))
    except storage_errors() as error:
        if not is_refusal(error):
            raise
        place = getattr(error, "filename", None)
        return _fail(told(str(place) if place else "storage", error))
    except KeyboardInterrupt:
        return 130


def _fail(message: str) -> int:
    sys.stderr.write(f"error: {_flat(message)}\n")
    return 2


def _flat(text: str | None) -> str:
    return " ".join((text or "").split())


class _Parser(argparse.ArgumentParser):
    """An argument parser that raises instead of ending the process."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}: {self.prog} --help lists every flag")


def _read_flags(cls: type[JobConfig], argv: Sequence[str]) -> dict[str, JsonValue]:
    known, unknown = _build_parser(cls).parse_known_args(argv)
    for argument in unknown:
        if argument.startswith("-"):
            flag = argument.split("=", 1)[0]
            raise ConfigError(_unknown(cls, "flag", flag, "--"))
        raise ConfigError(f"{argument!r} belongs to no flag: put quotes round a value with spaces")
    return {
        name: _from_text(cls.model_fields[name], given) if name in cls.model_fields else given
        for name, given in vars(known).items()
    }


def _build_parser(cls: type[JobConfig]) -> argparse.ArgumentParser:
    parser = _Parser(
        description=inspect.cleandoc(cls.__doc__ or ""),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
        epilog=f"Every flag may also stand in the YAML file given by --config, and be set in the "
        f"environment as {ENV_PREFIX}FLAG. A flag wins over the environment, that over the file.",
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file with any of the settings below")
    for name, field in cls.model_fields.items():
        text = f"{_flat(field.description)} ({_default(field)})"
        _add_flag(parser, name, field, text.replace("%", "%%"))
    return parser


def _add_flag(parser: argparse.ArgumentParser, name: str, field: FieldInfo, text: str) -> None:
    if field.annotation is bool:
        parser.add_argument(f"--{name}", action=argparse.BooleanOptionalAction, help=text)
    elif _is_list(field):
        parser.add_argument(
            f"--{name}", action="extend", nargs="+", metavar=name.upper(), help=text
        )
    else:
        parser.add_argument(f"--{name}", metavar=name.upper(), help=text)


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    default = field.get_default(call_default_factory=True, validated_data={})
    shown = "none" if default is None else json.dumps(default, default=str)
    return f"default: {shown}"


def _read_environment(cls: type[JobConfig]) -> dict[str, JsonValue]:
    """Read `SAE_RAY_<FIELD>`; variables of other fields are left to the jobs that have them."""
    names = {name: ENV_PREFIX + name.upper() for name in cls.model_fields}
    return {
        name: _from_text(cls.model_fields[name], os.environ[variable])
        for name, variable in names.items()
        if variable in os.environ
    }


def _read_yaml(cls: type[JobConfig], path: str) -> dict[str, Any]:
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {path} cannot be read ({error}): give a YAML file") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"--config {path} is not YAML ({error}): mend that line") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"--config {path} holds no settings: write lines such as 'seed: 0'")
    for key in content:
        if key not in cls.model_fields:
            raise ConfigError(_unknown(cls, "key", f"{key}", "") + f" (in {path})")
    return content


def _unknown(cls: type[JobConfig], what: str, given: str, prefix: str) -> str:
    known = [*cls.model_fields, *(["config"] if prefix else [])]
    nearest = difflib.get_close_matches(given.lstrip("-"), known, n=1, cutoff=0.5)
    advice = f"did you mean {prefix}{nearest[0]}?" if nearest else "see --help"
    return f"unknown {what} {given!r}: {advice} Known: {', '.join(known)}"


def _options(field: FieldInfo) -> tuple[Any, ...]:
    """Return the members of a field's type: `int | None` -> `(int, NoneType)`."""
    is_union = get_origin(field.annotation) in (Union, UnionType)
    return get_args(field.annotation) if is_union else (field.annotation,)


def _is_list(field: FieldInfo) -> bool:
    return any(get_origin(option) in (list, tuple, set, frozenset) for option in _options(field))


def _from_text(field: FieldInfo, given: JsonValue) -> JsonValue:
    """Read a flag or environment value; numbers, paths and booleans are left to pydantic."""
    if _is_list(field):
        parts = given if isinstance(given, list) else [given]
        is_text = str in _options(field)
        return [item for part in parts for item in _split(str(part), is_text=is_text)]
    if not isinstance(given, str):
        return given
    options = _options(field)
    if NoneType in options and given.lower() in ("none", "null"):
        return None
    choices = [c for option in options if get_origin(option) is Literal for c in get_args(option)]
    return next((choice for choice in choices if str(choice) == given), given)


def _split(text: str, *, is_text: bool) -> list[JsonValue]:
    """Read a list: JSON where it starts with a bracket, else separated by commas.

    `is_text` means that the field may be one text as well: then commas are part of it.
    """
    if not text.lstrip().startswith("["):
        return [text] if is_text else [item.strip() for item in text.split(",") if item.strip()]
    try:
        items = json.loads(text)
    except json.JSONDecodeError as error:
        how = 'as ["a", "b"]' if is_text else "as a,b,c"
        raise ConfigError(f"{text!r} is not a JSON list ({error}): write it {how}") from None
    return items


def _explain(cls: type[JobConfig], error: ValidationError) -> str:
    """Say what is wrong with each field, named as the user typed it, and what to do."""
    return "; ".join(_explain_one(cls, detail) for detail in error.errors())


def _explain_one(cls: type[JobConfig], detail: Mapping[str, Any]) -> str:
    name = ".".join(str(part) for part in detail["loc"])
    if detail["type"] == "missing" and name in cls.model_fields:
        means = _flat(cls.model_fields[name].description)
        return (
            f"--{name} is missing ({means}): give it as a flag, as '{name}: ...' in the file "
            f"given by --config, or as {ENV_PREFIX}{name.upper()}"
        )
    message = str(detail["msg"]).removeprefix("Value error, ")
    subject = f"--{name}={detail['input']!r}" if name else "these settings"
    return f"{subject}: {message[:1].lower()}{message[1:]}; see --help"
