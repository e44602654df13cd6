"""README and guides: every command runs as written and prints what stands behind it."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from app.cli import cli
from estimator.units import GIB

ROOT = Path(__file__).parents[2]
README, GUIDES = ROOT / "README.md", ROOT / "docs" / "guides.md"


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


def promises(page: Path) -> list[tuple[str, str]]:
    """Every command with what is said to come out of it."""
    text = "".join(blocks(page, "sh")).replace("\\\n", "")
    told = re.findall(r"^vramplan (.+?) +# (.+)$", text, re.MULTILINE)
    return told + re.findall(r"`vramplan ([^`]+)` → ([^|]+?) \|", page.read_text())


def answer(command: str) -> Any:
    result = CliRunner().invoke(cli, [*shlex.split(command), "--json"])
    assert result.exit_code in (0, 3), result.output
    return json.loads(result.stdout)


def shown(command: str, promise: str) -> str:
    """The answer in the words of the promise."""
    found = answer(command)
    if command.startswith("plan") and "×" in promise:
        return f"{found['plan']['per_device_train_batch_size']} × {found['plan']['gradient_accumulation_steps']}"
    if command.startswith("plan"):
        return f"{found['plan']['max_length']:,} tokens"
    largest = max(phase["allocated_bytes"] for phase in found["phases"])
    verdict = f", {found['fit']['verdict'].replace('_', ' ')}" if "," in promise else ""
    return f"{largest / GIB:.2f} GiB{verdict}"


@pytest.fixture
def in_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


@pytest.mark.usefixtures("in_root")
@pytest.mark.parametrize(("command", "promise"), promises(GUIDES))
def test_a_command_of_the_guides_page_prints_what_the_page_says(command: str, promise: str) -> None:
    assert shown(command, promise) == promise


def test_no_command_of_the_guides_page_goes_without_a_figure() -> None:
    assert len(promises(GUIDES)) == GUIDES.read_text().count("vramplan estimate ") + GUIDES.read_text().count("vramplan plan ")


def test_the_readme_s_first_example_runs_in_a_shell(tmp_path: Path) -> None:
    script = next(block for block in blocks(README, "sh") if "<<'JSON'" in block)
    command = tmp_path / "bin" / "vramplan"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -c "from app.cli import main; main()" "$@"\n')
    command.chmod(0o755)
    surroundings = os.environ | {"PATH": f"{command.parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    result = subprocess.run(["sh", "-c", script], cwd=tmp_path, env=surroundings, capture_output=True, text=True, check=False)
    assert result.returncode == 3, result.stderr
    assert result.stdout.startswith("Does not fit on rtx4090")


def test_the_readme_s_python_runs(capsys: pytest.CaptureFixture[str]) -> None:
    [code] = blocks(README, "python")
    exec(compile(code, str(README), "exec"), {})
    assert re.search(r"^\d+\.\d GiB in \w+$", capsys.readouterr().out, re.MULTILINE)
