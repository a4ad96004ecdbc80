"""The house rules, as tests: each failure names every offender."""

import ast
import importlib
import json
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from sae_ray.config import JobConfig

ROOT = Path(__file__).parent.parent
SHIPPED = ("sae_ray", "jobs", "serve")
TOP_LEVEL = {
    *("cluster", "sae_ray", "jobs", "serve", "tests", "pyproject.toml", "README.md"),
    *("Makefile", "requirements.lock", "LICENSE", "CHANGELOG.md"),
}
README_ROW = re.compile(r"^\| *`((?:sae_ray|jobs|serve)/[^`]+)` *\| *(.+?) *\|$", re.MULTILINE)


def python_files(*folders: str) -> list[str]:
    files = (path for folder in folders for path in (ROOT / folder).rglob("*.py"))
    return sorted(str(path.relative_to(ROOT)) for path in files)


def parse(name: str) -> ast.Module:
    return ast.parse((ROOT / name).read_text(encoding="utf-8"), name)


def nodes(*folders: str) -> Iterator[tuple[str, ast.AST]]:
    for name in python_files(*folders):
        for node in ast.walk(parse(name)):
            yield name, node


def imported(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        return [f"{node.module}.{alias.name}" for alias in node.names]
    return []


def pyproject() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def job_configs() -> dict[str, type[JobConfig]]:
    """Return the config class of each job, by the job's name."""
    configs = {}
    for name in python_files("jobs"):
        module = importlib.import_module(name.removesuffix(".py").replace("/", "."))
        for value in vars(module).values():
            defined_here = getattr(value, "__module__", "") == module.__name__
            if defined_here and isinstance(value, type) and issubclass(value, JobConfig):
                configs[Path(name).stem] = value
    return configs


def first_line(name: str) -> str:
    return (ast.get_docstring(parse(name)) or "").split("\n")[0]


def notebooks() -> dict[str, str]:
    """Return the heading of each notebook, by its name."""
    found = {}
    for path in sorted((ROOT / "jobs").rglob("*.ipynb")):
        first = json.loads(path.read_text(encoding="utf-8"))["cells"][0]["source"][0]
        found[str(path.relative_to(ROOT))] = first.strip().removeprefix("# ")
    return found


def listed_in(readme: str) -> dict[str, str]:
    return dict(README_ROW.findall((ROOT / readme).read_text(encoding="utf-8")))


def test_the_readme_lists_every_folder_and_job_with_the_first_line_of_its_docstring():
    packages = [Path(name).parent for name in python_files("sae_ray") if name.count("/") == 2]
    wanted = {f"{folder}/": first_line(f"{folder}/__init__.py") for folder in packages}
    wanted |= {name: first_line(name) for name in python_files("jobs", "serve")} | notebooks()
    assert listed_in("README.md") == wanted


def test_the_librarys_page_lists_every_file_with_the_first_line_of_its_docstring():
    files = [name for name in python_files("sae_ray") if not name.endswith("__init__.py")]
    assert listed_in("sae_ray/README.md") == {name: first_line(name) for name in files}


def test_the_readme_can_be_read_in_one_go():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 250


def test_every_file_opens_with_a_phrase_that_ends_in_a_full_stop():
    assert [n for n in python_files(*SHIPPED) if not first_line(n).endswith(".")] == []


def test_import_contracts_hold():
    # In a process of its own: it switches off every logger that is there already.
    command = [Path(sys.executable).with_name("lint-imports"), "--no-cache"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_import_contracts_cover_everything():
    linter = pyproject()["tool"]["importlinter"]
    contracts = {contract["id"]: contract for contract in linter["contracts"]}
    shipped = {folder for folder in SHIPPED if python_files(folder)}
    assert set(linter["root_packages"]) == shipped
    assert set(pyproject()["tool"]["pyright"]["include"]) == {*shipped, "tests"}
    assert "serving" in contracts or not python_files("serve"), "serving never trains: write it"
    tops = {name.split("/")[1].removesuffix(".py") for name in python_files("sae_ray")}
    science = {f"sae_ray.{top}" for top in tops - {"__init__", "distributed"}}
    assert set(contracts["science"]["source_modules"]) == science


def test_only_distributed_imports_ray_or_deepspeed_and_only_serve_imports_ray_serve():
    offenders = [
        f"{name} imports {module}"
        for name, node in nodes(*SHIPPED)
        for module in imported(node)
        if (
            module.split(".")[0] in ("ray", "deepspeed")
            and name.startswith("sae_ray/")
            and not name.startswith("sae_ray/distributed/")
        )
        or (module.startswith("ray.serve") and not name.startswith("serve/"))
    ]
    assert offenders == []


def test_files_and_functions_are_short():
    offenders = []
    for name in python_files(*SHIPPED):
        limit = 80 if name.startswith("jobs/") else 400
        if (length := len((ROOT / name).read_text(encoding="utf-8").splitlines())) > limit:
            offenders.append(f"{name}: {length} lines, {limit} allowed")
    for name, node in nodes(*SHIPPED):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            if (length := node.end_lineno - node.lineno + 1) > 60:
                offenders.append(f"{name}: {node.name} has {length} lines, 60 allowed")
    assert offenders == []


def test_packages_import_nothing_but_the_standard_library_when_they_are_opened():
    offenders = [
        f"{name} imports {module}"
        for name, node in nodes(*SHIPPED)
        for module in imported(node)
        if name.endswith("__init__.py") and module.split(".")[0] not in sys.stdlib_module_names
    ]
    assert offenders == []


def test_no_file_is_named_for_nothing():
    vague = {"utils", "util", "helpers", "common", "misc", "base"}
    assert [n for n in python_files(*SHIPPED, "tests") if Path(n).stem in vague] == []


def test_no_error_is_caught_without_knowing_it():
    offenders = [
        f"{name}:{node.lineno}"
        for name, node in nodes(*SHIPPED)
        if isinstance(node, ast.ExceptHandler)
        and (node.type is None or "'Exception'" in ast.dump(node.type))
    ]
    assert offenders == []


def test_no_keyword_arguments_are_passed_on_unread():
    offenders = [
        f"{name}:{function.lineno} {function.name}"
        for name, function in nodes(*SHIPPED)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef) and function.args.kwarg
        for call in ast.walk(function)
        if isinstance(call, ast.Call)
        for keyword in call.keywords
        if keyword.arg is None
        and isinstance(keyword.value, ast.Name)
        and keyword.value.id == function.args.kwarg.arg
    ]
    assert offenders == []


def test_every_setting_of_every_job_is_documented_and_help_opens_with_a_line_to_run():
    offenders = [
        f"{job}: {field}"
        for job, config in job_configs().items()
        for field, info in config.model_fields.items()
        if not (info.description or "").strip()
    ]
    offenders += [
        f"{job}: no 'jobs/{job}.py' in the docstring of {config.__name__}"
        for job, config in job_configs().items()
        if f"jobs/{job}.py" not in (config.__doc__ or "")
    ]
    assert offenders == []


def test_no_setting_of_any_job_lets_code_from_elsewhere_run():
    offenders = [
        f"{job}: {field}"
        for job, config in job_configs().items()
        for field in config.model_fields
        if "trust" in field or "remote_code" in field
    ]
    assert offenders == []


def test_every_yaml_of_a_job_loads_into_its_config():
    configs = job_configs()
    for path in sorted((ROOT / "jobs" / "configs").rglob("*.yaml")):
        jobs = [job for job in configs if path.stem == job or path.stem.startswith(f"{job}_")]
        assert jobs, f"{path.name} is named for no job: curate.yaml or curate_maths.yaml, ..."
        config = configs[max(jobs, key=len)]
        # What is asked and where it goes are said at the command line.
        said = {"out": "out", "task": "anything"}
        flags = [f"--{name}={one}" for name, one in said.items() if name in config.model_fields]
        config.parse(["--config", str(path), *flags])


def test_tests_mirror_the_tree():
    offenders = []
    for name in python_files("tests"):
        parts = Path(name).parts
        if parts[1] in SHIPPED and Path(name).name.startswith("test_"):
            source = ROOT.joinpath(*parts[1:-1], Path(name).stem.removeprefix("test_"))
            suffixes = [".js"] if "ui" in parts else [".py", ".ipynb"]
            if not source.is_dir() and not any(source.with_suffix(s).exists() for s in suffixes):
                offenders.append(f"{name} has no {source.relative_to(ROOT)}.py")
        if Path(name).name == "__init__.py":
            offenders.append(f"{name}: tests are no package")
    assert offenders == []


def git_files() -> list[str]:
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    try:
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("this is no git checkout")
    return [name for name in listed.stdout.splitlines() if (ROOT / name).exists()]


def test_the_top_level_holds_what_is_fixed_and_dot_files():
    tops = {name.split("/")[0] for name in git_files()}
    assert {top for top in tops if not top.startswith(".")} <= TOP_LEVEL


def test_no_file_is_large_and_the_embedded_default_stays_small():
    sizes = {name: (ROOT / name).stat().st_size for name in git_files()}
    assert [name for name, size in sizes.items() if size > 6_000_000] == []
    assert sum(s for name, s in sizes.items() if name.startswith("sae_ray/tiny/")) <= 16_000_000


def test_the_lock_pins_releases_and_leaves_the_build_to_the_machine():
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    assert [p for p in pins if not re.match(r"^[a-z0-9.-]+==[0-9][0-9a-z.]*( ; .+)?$", p)] == []
    pinned = {pin.split("==")[0] for pin in pins}
    assert [name for name in pinned if name.startswith(("nvidia-", "cuda-", "triton"))] == []
    assert "deepspeed==" in "\n".join(p for p in pins if p.endswith("; sys_platform == 'linux'"))
    project = pyproject()["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    names = {re.split(r"[\[><=; ]", requirement)[0] for requirement in wanted}
    assert names - pinned == {"sae-ray"}


@pytest.mark.slow
def test_the_wheel_holds_the_library_alone(tmp_path):
    for name in git_files():
        if name.split("/")[0] in ("sae_ray", "jobs", "pyproject.toml", "README.md", "LICENSE"):
            (tmp_path / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, tmp_path / "tree" / name)
    options = ["--no-deps", "--no-build-isolation", "--quiet", "--wheel-dir", str(tmp_path)]
    command = [sys.executable, "-m", "pip", "wheel", *options, str(tmp_path / "tree")]
    subprocess.run(command, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = [name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name]
    assert set(names) == {name for name in git_files() if name.startswith("sae_ray/")}
