"""Files for contributors: each one parses, agrees with pyproject.toml, and contains no invented address."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

import koopmon
from koopmon.doctor.environment import MIN_TORCH

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT = PYPROJECT["project"]
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
FORMS = sorted(path for path in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml") if path.stem != "config")
FILES = [
    *(ROOT / name for name in ("SECURITY.md", "CODE_OF_CONDUCT.md", "CONTRIBUTING.md", "CITATION.cff")),
    *(ROOT / ".github").rglob("*.yml"),
    ROOT / ".pre-commit-config.yaml",
]
NOBODYS = re.compile(r"[\w.+-]+@(?!v\d)[\w-]+\.\w+|github\.com|example\.(?:com|org)")


def load(name: str) -> Any:
    return yaml.safe_load((ROOT / name).read_text(encoding="utf-8"))


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return dict(line.split("==") for line in lines if line and line[0] != "#")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_no_address_is_invented(path: Path) -> None:
    assert NOBODYS.findall(path.read_text(encoding="utf-8")) == []


def test_the_workflow_runs_what_a_contributor_runs() -> None:
    workflow = load(".github/workflows/ci.yml")
    assert set(workflow[True]) >= {"push", "pull_request"}, "YAML reads `on` as true"
    assert workflow["permissions"] == {"contents": "read"}
    steps = [step.get("run") for step in workflow["jobs"]["test"]["steps"]]
    assert steps[-1] == ".ci/run"
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o111
    assert "make test" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert [step.get("run") for step in workflow["jobs"]["lint"]["steps"]][-1] == "make lint"


WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_every_action_is_pinned_by_its_commit(path: Path) -> None:
    used = re.findall(r"uses: (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    assert used
    for action in used:
        assert action.startswith("./") or re.fullmatch(r"[\w/-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", action), action


def test_a_release_has_the_least_permissions_and_needs_the_tests() -> None:
    workflow = load(".github/workflows/release.yml")
    assert workflow[True] == {"push": {"tags": ["v[0-9]+.[0-9]+.[0-9]+*"]}}
    assert workflow["permissions"] == {}
    jobs = workflow["jobs"]
    assert jobs["test"]["uses"] == "./.github/workflows/ci.yml"
    assert "workflow_call" in load(".github/workflows/ci.yml")[True]
    writes = {
        name: {key for key, value in job["permissions"].items() if value == "write"} for name, job in jobs.items()
    }
    assert writes["test"] == writes["build"] == set()
    assert writes["publish"] == {"id-token", "attestations"}
    for name in ("publish", "image"):
        assert set(jobs[name]["needs"]) == {"test", "build"}
        assert jobs[name]["environment"] == "release", "the environment may ask for an approval"
    assert "password" not in str(jobs["publish"])
    for job in jobs.values():
        checkouts = [step for step in job.get("steps", []) if step.get("uses", "").startswith("actions/checkout@")]
        assert all(step["with"] == {"persist-credentials": False} for step in checkouts)


def test_the_version_is_in_one_place() -> None:
    """Other files have copies that `python -m manual.write` writes."""
    assert PROJECT["dynamic"] == ["version"]
    assert load("CITATION.cff")["version"] == koopmon.__version__
    chart = load("deploy/helm/koopmon/Chart.yaml")
    assert chart["version"] == chart["appVersion"] == koopmon.__version__


def test_the_changelog_can_be_cut() -> None:
    """The newest changes are under Unreleased; a released version has its date."""
    headings = re.findall(r"^## (.*)$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert headings[0] == "[Unreleased]"
    for heading in headings[1:]:
        assert re.fullmatch(r"\[\d+\.\d+\.\d+\] - \d{4}-\d{2}-\d{2}", heading), heading
    sections = re.findall(r"^### (.*)$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert set(sections) <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}


def test_the_matrix_is_what_pyproject_promises() -> None:
    job = load(".github/workflows/ci.yml")["jobs"]["test"]
    matrix = job["strategy"]["matrix"]
    promised = [line.rpartition(" :: ")[2] for line in PROJECT["classifiers"] if ":: Python :: 3." in line]
    assert matrix["python"] == promised
    assert PROJECT["requires-python"] == f">={promised[0]}"
    assert PYPROJECT["tool"]["mypy"]["python_version"] == promised[0]
    assert PYPROJECT["tool"]["ruff"]["target-version"] == f"py{promised[0].replace('.', '')}"
    assert job["container"]["image"] == "python:${{ matrix.python }}-bookworm"
    (oldest,) = (line for line in PROJECT["optional-dependencies"]["monitor"] if line.startswith("torch>="))
    assert matrix["torch"] == ["", oldest.replace(">=", "==") + ".*"]
    assert oldest == f"torch>={MIN_TORCH[0]}.{MIN_TORCH[1]}"
    assert job["env"]["TORCH"] == "${{ matrix.torch }}"


@pytest.mark.process
@pytest.mark.parametrize("given", ["", "torch==2.7.*"])
def test_make_takes_the_torch_of_the_environment(given: str, tmp_path: Path) -> None:
    """The chosen torch is installed and constrains the other packages; an empty value means the pin."""
    done = subprocess.run(
        ["make", "-n", "unit", f"VENV={tmp_path / 'venv'}"],
        cwd=ROOT,
        env={"TORCH": given, "PATH": "/usr/local/bin:/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=True,
    )
    wanted = given or f"torch=={pins()['torch']}"
    assert f'install  "{wanted}"' in done.stdout
    assert (
        f"{{ grep -v '^torch==' constraints.txt; echo \"{wanted}\"; }} > {tmp_path}/venv/constraints.txt" in done.stdout
    )
    assert f'install -c {tmp_path}/venv/constraints.txt  -e ".[dev]"' in done.stdout
    assert set(re.findall(r"torch==[\d.*]+", done.stdout)) == {wanted}


def test_every_issue_form_is_one() -> None:
    assert {path.stem for path in FORMS} == {"bug", "feature", "question"}
    assert load(".github/ISSUE_TEMPLATE/config.yml") == {"blank_issues_enabled": False}
    for path in FORMS:
        form = yaml.safe_load(path.read_text(encoding="utf-8"))
        assert {"name", "description", "body"} <= form.keys() <= {"name", "description", "body", "labels", "title"}
        asked = [part for part in form["body"] if part["type"] != "markdown"]
        assert {part["type"] for part in form["body"]} <= {"markdown", "textarea", "input", "dropdown", "checkboxes"}
        assert len({part["id"] for part in asked}) == len(asked) > 0
        assert all(part["attributes"]["label"] for part in asked)
        assert any(part.get("validations", {}).get("required") for part in asked)


def test_dependabot_watches_the_pins_the_actions_and_the_image() -> None:
    found = load(".github/dependabot.yml")
    assert found["version"] == 2
    watched = {(update["package-ecosystem"], update["directory"]) for update in found["updates"]}
    assert watched == {("pip", "/"), ("github-actions", "/"), ("docker", "/deploy/docker")}
    assert (ROOT / "deploy" / "docker" / "Dockerfile").is_file()


def test_pre_commit_takes_its_tools_from_the_environment() -> None:
    """Their versions are then those of constraints.txt."""
    found = load(".pre-commit-config.yaml")
    assert [repository["repo"] for repository in found["repos"]] == ["local"]
    hooks = found["repos"][0]["hooks"]
    assert {hook["language"] for hook in hooks} == {"system"}
    tools = {hook["entry"].split()[0] for hook in hooks}
    assert tools <= {".venv/bin/ruff", ".venv/bin/python"}
    assert {"ruff", "pytest", "mypy"} <= pins().keys()
    re.compile(found["exclude"])


def test_the_extra_of_the_tests_is_small_and_part_of_dev() -> None:
    extras = PROJECT["optional-dependencies"]
    names = {re.split(r"[>=<\[ ;]", line)[0] for line in extras["test"]}
    assert names == {"koopmon", "pytest", "pytest-xdist", "pytest-timeout", "hypothesis"}
    assert "koopmon[monitor]" in extras["test"]
    own = next(line for line in extras["dev"] if line.startswith("koopmon["))
    assert "test" in own.partition("[")[2].rstrip("]").split(",")


def test_the_citation_is_one() -> None:
    found = load("CITATION.cff")
    assert {"cff-version", "message", "title", "authors", "version", "license", "references"} <= found.keys()
    assert found["cff-version"] == "1.2.0"
    assert found["license"] == PROJECT["license"]
    assert found["title"] == PROJECT["name"]
    (paper,) = found["references"]
    assert paper["url"] == PROJECT["urls"]["Paper"]
    assert {"type", "title", "authors", "year"} <= paper.keys()
    assert paper["title"] in re.sub(r"\s+", " ", (ROOT / "README.md").read_text(encoding="utf-8"))


def test_contributing_tells_every_target_and_marker() -> None:
    targets = set(re.findall(r"^([a-z]+):.*## ", MAKEFILE, re.MULTILINE)) - {"help", "clean"}
    told = set(re.findall(r"^\| `make (\w+)` \|", CONTRIBUTING, re.MULTILINE))
    assert told == targets
    for marker in PYPROJECT["tool"]["pytest"]["ini_options"]["markers"]:
        name = re.split(r"[(:]", marker)[0]
        assert f"`{name}`" in CONTRIBUTING or f"`{name}(" in CONTRIBUTING
    selected = re.search(r'-m "(not process[^"]+)"', MAKEFILE)
    assert selected
    assert f'-m "{selected[1]}"' in CONTRIBUTING


def test_the_tests_that_contributing_names_are_there() -> None:
    named = re.findall(r"pytest (tests/[\w/.]+)(?:::(\w+))?", CONTRIBUTING)
    assert len(named) >= 2
    for path, test in named:
        assert f"def {test}" in (ROOT / path).read_text(encoding="utf-8")


@pytest.mark.process
@pytest.mark.parametrize(
    ("name", "text", "finding"),
    [
        ("fine.py", "a = 1\n", ""),
        ("fine.yaml", "a: 1\n---\nb: 2\n", ""),
        ("fine.md", "two blanks  \nbreak a line\n", ""),
        ("empty.py", "", ""),
        ("blanks.py", "a = 1 \n", "blanks.py:1: blanks at the end of the line"),
        ("open.py", "a = 1", "the file ends with one line end"),
        ("lines.py", "a = 1\n\n", "the file ends with one line end"),
        ("dos.py", "a = 1\r\n", "carriage return"),
        ("merged.py", "<<<<<<< ours\n", "merged.py:1: conflict marker"),
        ("bad.yml", "a: [1\n", "bad.yml: while parsing"),
        ("bad.toml", "a = \n", "bad.toml: Invalid value"),
        ("bad.json", "{", "bad.json: Expecting"),
        ("key.txt", "-----BEGIN EC PRIVATE KEY-----\n", "a private key"),
        ("large.txt", "a\n" * 300_000, "allowed are 500000"),
    ],
)
def test_the_file_checks(tmp_path: Path, name: str, text: str, finding: str) -> None:
    (tmp_path / name).write_text(text, newline="")
    script = [sys.executable, str(ROOT / ".ci" / "check_files.py"), name]
    done = subprocess.run(script, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, bool(done.stdout)) == ((1, True) if finding else (0, False)), done.stderr
    assert finding in done.stdout
