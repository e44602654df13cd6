"""The runner against workers that misbehave."""

import mmap
import os
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest

from calibration import card
from calibration.record import Figures, Kind, Outcome, environment_here
from calibration.runner import Device, NoDeviceError, Runner
from tests.calibration.cases import case

REPORT = "import sys, pathlib; report = pathlib.Path(sys.argv[2]); "


def runner(script: str, device: Device = Device.CPU, timeout_seconds: float = 20.0) -> Runner:
    return Runner(device=device, timeout_seconds=timeout_seconds, worker=(sys.executable, "-S", "-c", script))


def test_a_report_becomes_a_record_of_the_case() -> None:
    record = runner(REPORT + """report.write_text('{"outcome": "ok", "step_seconds": 0.5}')""").run(case())
    assert (record.outcome, record.kind, record.case, record.provenance.step_seconds) == (Outcome.OK, Kind.DRY_RUN, case(), 0.5)


def test_running_out_of_memory_is_recorded_with_what_was_seen_until_then() -> None:
    script = REPORT + """report.write_text('{"outcome": "oom", "figures": {"loaded_bytes": 7}, "error": "full"}')"""
    record = runner(script, Device.CUDA).run(case())
    assert (record.outcome, record.figures, record.error) == (Outcome.OOM, Figures(loaded_bytes=7), "full")


@pytest.mark.parametrize(
    ("script", "told"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "SIGKILL"),
        ("import sys; sys.exit('no such kernel')", "no such kernel"),
        ("raise ValueError('bad layer')", "bad layer"),
        ("pass", "exited with code 0 without a report"),
        (REPORT + "report.write_text('{\"outcome\": ')", "without a report"),
        (REPORT + """report.write_text('{"outcome": "splendid"}')""", "without a report"),
    ],
)
def test_a_worker_that_breaks_costs_only_its_case(script: str, told: str) -> None:
    record = runner(script).run(case())
    assert record.outcome is Outcome.FAILED
    assert told in (record.error or "")


FULL = "Error out of memory at line 41 in file /src/csrc/pythonInterface.cpp"


@pytest.mark.parametrize(
    ("printed", "code", "outcome"),
    [
        (FULL, 1, Outcome.OOM),
        (f" 50%|#####     | 1/2 [00:01<00:01]{FULL}", 1, Outcome.OOM),
        (FULL, 2, Outcome.FAILED),  # something else ended the process
        (FULL.replace("out of memory", "invalid device function"), 1, Outcome.FAILED),
        ("RuntimeError: out of memory", 1, Outcome.FAILED),
    ],
)
def test_bitsandbytes_ends_the_process_when_the_card_is_full(printed: str, code: int, outcome: Outcome) -> None:
    record = runner(f"import os; os.write(2, {printed!r}.encode() + b'\\n'); os._exit({code})").run(case())
    assert (record.outcome, record.figures) == (outcome, None)
    assert printed[-30:] in (record.error or "")
    # without the environment the case would be run again and again
    assert (record.environment is not None and record.environment.key == environment_here().key) == (outcome is Outcome.OOM)


def test_the_text_that_bitsandbytes_prints_is_in_its_libraries() -> None:
    folder = Path(str(find_spec("bitsandbytes").submodule_search_locations[0]))  # type: ignore[union-attr,index]
    libraries = list(folder.glob("libbitsandbytes_cuda*.so"))
    assert libraries
    with libraries[0].open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        assert content.find(b"Error %s at line %d in file %s\n") >= 0


@pytest.mark.parametrize(
    ("printed", "kept"),
    [
        ("401 for hf_" + "a1B2" * 8, "401 for hf_…"),
        ("401 for canary-of-no-known-form", "401 for hf_…"),
        ("GET https://cdn.example/x/y?Signature=abc&Key=1 failed", "GET https://cdn.example/x/y?… failed"),
        ("/home/someone/.cache/x: no such file", "~/.cache/x: no such file"),
        ("hf_quantizer.preprocess_model", "hf_quantizer.preprocess_model"),
    ],
)
def test_a_records_error_holds_nothing_that_others_may_not_see(printed: str, kept: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.setenv("HF_TOKEN", "canary-of-no-known-form")
    script = f"""{REPORT}report.write_text('{{"outcome": "failed", "error": "{printed}"}}')"""
    assert runner(script).run(case()).error == kept
    assert (runner(f"import sys; sys.exit({printed!r})").run(case()).error or "").endswith(kept)


def test_a_token_at_the_cut_of_a_long_error_is_taken_out_whole() -> None:
    token = "hf_" + "a1B2" * 8
    record = runner(f"import sys; sys.exit({token!r} + ' ' + 'y' * 3980)").run(case())
    assert record.error is not None
    assert "a1B2" not in record.error
    assert record.error.endswith("yyy")


def test_what_libraries_print_does_not_disturb_the_report() -> None:
    script = REPORT + """print('{"outcome": "oom"}' * 10000); report.write_text('{"outcome": "ok"}')"""
    assert runner(script).run(case()).outcome is Outcome.OK


def test_a_hanging_worker_and_its_children_are_killed(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    script = f"""
import os, pathlib, time
child = os.fork()
if child:
    pathlib.Path({str(pids)!r}).write_text(f"{{os.getpid()}} {{child}}")
time.sleep(600)
"""
    start = time.monotonic()
    record = runner(script, timeout_seconds=2).run(case())
    assert record.outcome is Outcome.TIMEOUT
    assert "2 s" in (record.error or "")
    assert time.monotonic() - start < 15
    deadline = time.monotonic() + 10
    while any(_is_running(int(pid)) for pid in pids.read_text().split()):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_killed_parent_leaves_no_worker_behind(tmp_path: Path) -> None:
    pids = tmp_path / "pid"
    worker = f"""
import os, pathlib, time
from calibration.worker.__main__ import die_with_parent
die_with_parent()
pathlib.Path({str(pids)!r}).write_text(str(os.getpid()))
time.sleep(600)
"""
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {worker!r}])"
    process = subprocess.Popen([sys.executable, "-c", parent], start_new_session=True)
    deadline = time.monotonic() + 60
    while not (pids.exists() and pids.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.kill()
    process.wait()
    while _is_running(int(pids.read_text())):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _is_running(pid: int) -> bool:
    """Neither gone nor a zombie that nobody has collected."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_refusal_makes_no_record() -> None:
    script = REPORT + """report.write_text('{"outcome": "refused", "error": "no card here"}')"""
    with pytest.raises(NoDeviceError, match="no card here"):
        runner(script, Device.CUDA).run(case())


def test_the_worker_sees_one_card_and_no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_canary")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    told = "import os; sys.exit(str([os.environ.get(n) for n in ('CUDA_VISIBLE_DEVICES', 'HF_TOKEN', 'HF_HUB_OFFLINE')]))"
    record = Runner(device=Device.CUDA, gpu=1, worker=(sys.executable, "-c", REPORT + told)).run(case())
    assert "['5', None, '1']" in (record.error or "")


def test_weights_from_the_hub_are_asked_for_with_the_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_canary")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    told = "import os; sys.exit(str([os.environ.get('HF_TOKEN') == 'hf_canary', os.environ.get('HF_HUB_OFFLINE')]))"
    from_hub = case().model_copy(update={"model": "a/b"}).with_hub_weights("v1")
    record = Runner(device=Device.CPU, worker=(sys.executable, "-c", REPORT + told)).run(from_hub)
    assert "[True, None]" in (record.error or "")


def test_the_worker_is_told_where_a_snapshot_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    worker = (sys.executable, "-c", REPORT + "sys.exit(str(sys.argv[3:]))")
    record = Runner(device=Device.CPU, snapshot=Path("history.pickle"), worker=worker).run(case())
    assert f"'--snapshot', '{tmp_path}/history.pickle'" in (record.error or "")


def test_a_snapshot_that_cannot_be_written_is_refused_before_anything_runs(tmp_path: Path) -> None:
    worker = (sys.executable, "-c", f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(FileNotFoundError, match=r"missing/history\.pickle"):
        Runner(device=Device.CPU, snapshot=tmp_path / "missing" / "history.pickle", worker=worker).run(case())
    assert not (tmp_path / "ran").exists()


def test_a_card_is_named_as_the_driver_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert card.card_id(1) == "1"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-aa, GPU-bb")
    assert card.card_id(1) == "GPU-bb"
    assert card.card_id(2) == ""


def test_memory_in_use_is_read_from_the_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "nvidia-smi"
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    program.write_text('#!/bin/sh\ncase "$*" in *memory.used*) echo 12;; *) echo 580.1;; esac\n')
    program.chmod(0o755)
    assert card.used_bytes("0") == 12 * 2**20
    assert card.driver_version("0") == "580.1"
    program.write_text("#!/bin/sh\nexit 9\n")
    assert card.used_bytes("0") is None


@pytest.mark.parametrize(("before", "after", "is_foreign"), [(0, 16, False), (0, 17, True), (17, 0, True)])
def test_a_run_beside_another_process_on_the_card_is_no_measurement(
    before: int, after: int, is_foreign: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a driver that tells so many MiB in use before the worker is started, and so many once it is gone."""
    begun, program = tmp_path / "begun", tmp_path / "nvidia-smi"
    program.write_text(f'#!/bin/sh\ncase "$*" in *memory.used*) if [ -e "{begun}" ]; then echo {after}; else echo {before}; fi;; esac\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    script = f'{REPORT}pathlib.Path({str(begun)!r}).touch(); report.write_text(\'{{"outcome": "ok"}}\')'
    record = runner(script, Device.CUDA).run(case())
    seen = record.provenance.foreign_before_bytes, record.provenance.foreign_after_bytes
    assert seen == (before * 2**20, after * 2**20)
    assert (record.contaminated, record.is_measurement) == (is_foreign, not is_foreign)


def test_what_this_process_holds_is_read_from_the_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "nvidia-smi"
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    for answer, expected in ((f"1, 5, x\\n{os.getpid()}, 300, python", 300 * 2**20), ("1, 5, x", None), (f"{os.getpid()}, [N/A], p", None)):
        program.write_text(f'#!/bin/sh\nprintf "{answer}\\n"\n')
        program.chmod(0o755)
        assert card.own_bytes("0") == expected


def test_without_a_driver_nothing_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert card.used_bytes("0") is None
