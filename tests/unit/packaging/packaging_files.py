"""The files that are tested here, read once each."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[3]
HERE = Path(__file__).resolve().parent
DOCKERFILE = ROOT / "docker" / "Dockerfile"
DOCKERFILE_DEPLOY = ROOT / "docker" / "Dockerfile.deploy"
COMPOSE = ROOT / "docker" / "docker-compose.yml"
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
SCRIPTS = Path(sys.executable).parent


def schema_errors(schema: str, path: Path) -> str:
    """What a schema that check-jsonschema brings along has against a file."""
    command = [str(SCRIPTS / "check-jsonschema"), "--builtin-schema", f"vendor.{schema}", str(path)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=60)
    return ran.stdout if ran.returncode else ""


def text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def manifest() -> dict[str, Any]:
    return json.loads(text_of(ROOT / "config.json"))


def yaml_of(path: Path) -> dict[str, Any]:
    # GitHub's "on" is YAML 1.1's true, so it is read as the string it is meant to be.
    return yaml.load(text_of(path), Loader=yaml.BaseLoader)


def pinned(package: str) -> str:
    """The version in requirements.txt."""
    found = re.search(rf"^{package}==(\S+)$", text_of(ROOT / "requirements.txt"), re.MULTILINE)
    assert found, f"{package} is not pinned in requirements.txt"
    return found[1]


def instructions(dockerfile: Path) -> list[tuple[str, str]]:
    """(keyword, arguments) in order, with continued lines joined and comments left out."""
    lines = [line for line in text_of(dockerfile).splitlines() if not line.startswith("#")]
    joined = "\n".join(lines).replace("\\\n", "")
    parts = [line.split(maxsplit=1) for line in joined.splitlines() if line.strip()]
    return [(keyword, arguments.strip()) for keyword, arguments in parts]


def environment(dockerfile: Path) -> dict[str, str]:
    """The variables that the last stage sets itself."""
    variables: dict[str, str] = {}
    for keyword, words in instructions(dockerfile):
        if keyword == "FROM":
            variables = {}
        elif keyword == "ENV":
            variables.update(pair.split("=", 1) for pair in words.split())
    return variables
