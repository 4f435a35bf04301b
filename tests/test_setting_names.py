"""Misspelt settings: who refuses which, with the nearest right name, and whom they keep from nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from docs.generate import ENVIRONMENT_ONLY
from embedq import celeryconfig
from embedq.core import setting_names
from embedq.core.errors import InvalidSettings
from embedq.core.setting_names import ENVIRONMENT, WIRE, WORKER, misspelt_variables, nearest, variable_of
from embedq.core.settings import Settings, read_settings
from embedq.workers import heartbeat_line
from tests.running import ROOT, Running

ALL = (*WIRE, *WORKER, *ENVIRONMENT)


@pytest.fixture(autouse=True)
def empty_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Start in a directory without a settings file."""
    monkeypatch.chdir(tmp_path)


def importing_tasks(**environment: str) -> subprocess.CompletedProcess[str]:
    """What comes of a producer with these variables."""
    return subprocess.run(
        [sys.executable, "-c", "from embedq import tasks; print(tasks.app.conf.broker_url)"],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_names_are_those_of_the_settings() -> None:
    assert list(WORKER) == [name for name in Settings.model_fields if name != "wire"]
    assert list(WIRE) == list(celeryconfig.WIRE)
    assert {variable_of(name) for name in ENVIRONMENT} == {one for one in ENVIRONMENT_ONLY if one.startswith("EMBEDQ_")}
    assert heartbeat_line.VARIABLE in map(variable_of, ENVIRONMENT)


@given(st.sampled_from(ALL), st.data())
def test_a_slip_of_a_finger_finds_the_name_that_was_meant(name: str, data: st.DataObject) -> None:
    place = data.draw(st.integers(0, len(name) - 1))
    slip = data.draw(st.sampled_from(["left out", "twice", "swapped", "upper"]))
    slips = {
        "left out": name[:place] + name[place + 1 :],
        "twice": name[:place] + name[place] + name[place:],
        "swapped": name[:place] + name[place : place + 2][::-1] + name[place + 2 :],
        "upper": name.upper(),
    }
    assert nearest(slips[slip], ALL) == name


def test_a_name_that_is_like_none_has_no_nearest() -> None:
    assert nearest("xyzzy", ALL) is None


@pytest.mark.parametrize(
    "variable",
    [
        *map(variable_of, ALL),
        "EMBEDQ_SERVICE_HOST",
        "EMBEDQ_SERVER_SERVICE_PORT_REDIS",
        "EMBEDQ_PORT",
        "EMBEDQ_VALKEY_PORT_6379_TCP_ADDR",
        "_EMBEDQ_COMPLETE",
        "MY_EMBEDQ_MODEL",
    ],
)
def test_what_is_read_or_set_by_a_cluster_is_not_misspelt(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, "x")
    assert misspelt_variables() == {}


@pytest.mark.parametrize(
    ("variable", "cure"),
    [
        ("EMBEDQ_METRICS_PORTS", ", did you mean EMBEDQ_METRICS_PORT?"),
        ("EMBEDQ_WORKER_NAMES", ", did you mean EMBEDQ_WORKER_NAME?"),
        ("EMBEDQ_REDIS_URI", ", did you mean EMBEDQ_REDIS_URL?"),
        ("EMBEDQ_max_jobs", ", did you mean EMBEDQ_MAX_JOBS?"),
        ("EMBEDQ_WIRE", ""),
        ("EMBEDQ_XYZZY", ""),
    ],
)
def test_a_worker_refuses_a_variable_that_nobody_reads(
    variable: str, cure: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, "redis://:PASSWORD@host")
    with pytest.raises(InvalidSettings) as caught:
        read_settings()
    assert str(caught.value) == f"{variable} is no setting of embedq{cure}"


def test_a_worker_names_all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("EMBEDQ_METRICS_PORTS", "EMBEDQ_XYZZY"):
        monkeypatch.setenv(variable, "1")
    with pytest.raises(InvalidSettings, match=r"EMBEDQ_METRICS_PORTS .*; EMBEDQ_XYZZY "):
        read_settings()


@pytest.mark.parametrize(
    ("variable", "meant"),
    [("EMBEDQ_REDIS_URI", "REDIS_URL"), ("EMBEDQ_BROKER_URL", "REDIS_URL"), ("EMBEDQ_LEASE", "LEASE_S")],
)
def test_a_producer_refuses_a_misspelt_setting_of_its_own(variable: str, meant: str) -> None:
    done = importing_tasks(**{variable: "redis://:PASSWORD@host:1/0"})
    assert done.returncode == 1
    assert f"InvalidSettings: {variable} is no setting of embedq; did you mean EMBEDQ_{meant}?" in done.stderr
    assert "PASSWORD" not in done.stderr


@pytest.mark.parametrize(
    ("variables", "warning"),
    [
        ({"EMBEDQ_MAX_JOBS": "lots", "EMBEDQ_MODELS": "?", "EMBEDQ_METRICS_PORT": "tcp://10.0.0.1:9808"}, ""),
        (
            {"EMBEDQ_METRICS_PORTS": "9808"},
            "EMBEDQ_METRICS_PORTS is no setting of embedq, did you mean EMBEDQ_METRICS_PORT?\n",
        ),
        ({"EMBEDQ_XYZZY": "1"}, "EMBEDQ_XYZZY is no setting of embedq\n"),
    ],
)
def test_a_setting_of_a_worker_right_or_wrong_keeps_no_producer_from_its_work(
    variables: dict[str, str], warning: str
) -> None:
    done = importing_tasks(EMBEDQ_REDIS_URL="redis://host:1/0", **variables)
    assert (done.returncode, done.stdout, done.stderr) == (0, "redis://host:1/0\n", warning)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('[wire]\nredis_uri = "redis://:PASSWORD@host"', "unknown [wire] setting 'redis_uri'; did you mean redis_url?"),
        ("[wire]\nxyzzy = 1", "unknown [wire] setting 'xyzzy' (known are redis_url, "),
        ("[wire]\nmax_jobs = 1", "unknown [wire] setting 'max_jobs'; it is a worker's and belongs at top level"),
        ('redis_url = "redis://:PASSWORD@host"', "unknown setting 'redis_url'; did you mean redis_url in the table [wire]?"),
        ('redis_uri = "redis://:PASSWORD@host"', "unknown setting 'redis_uri'; did you mean redis_url in the table [wire]?"),
        ('[wires]\nredis_url = "redis://:PASSWORD@host"', "unknown table [wires]; did you mean [wire]?"),
    ],
)  # fmt: skip
def test_a_producer_refuses_a_wrong_key_of_its_own_in_the_file(content: str, said: str) -> None:
    Path("embedq.toml").write_text(content)
    with pytest.raises(InvalidSettings) as caught:
        celeryconfig.read_wire()
    assert f"embedq.toml has an {said}" in str(caught.value)
    assert "PASSWORD" not in str(caught.value)


@pytest.mark.parametrize("content", ["max_jobs = 0", "max_job = 1", "xyzzy = 1", "[model.a]\npath = '/m'"])
def test_a_key_of_a_worker_right_or_wrong_keeps_no_producer_from_its_work(content: str) -> None:
    Path("embedq.toml").write_text(content)
    assert celeryconfig.read_wire()["lease_s"] == celeryconfig.WIRE["lease_s"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("max_job = 3", "max_job: unknown setting; did you mean max_jobs?"),
        ("[model.a]\npath = '/m'", "model: unknown setting; did you mean models?"),
        (
            "[models.a]\npath = '/m'\nprecison = 'float32'",
            "models.a.precison: unknown setting; did you mean precision?",
        ),
        ("lease_s = 3", "lease_s: unknown setting; it belongs in the table [wire]"),
        ("xyzzy = 3", "xyzzy: unknown setting; producers' settings belong in the table [wire]"),
    ],
)
def test_a_worker_refuses_a_wrong_key_in_the_file(content: str, said: str) -> None:
    Path("embedq.toml").write_text(content)
    with pytest.raises(InvalidSettings) as caught:
        read_settings()
    assert str(caught.value).startswith(said)


def imported(running: Running) -> set[str]:
    """The modules that a process and its children imported, as PYTHONPROFILEIMPORTTIME has them say."""
    return {line.rpartition("|")[2].strip() for line in running.lines if line.startswith("import time:")}


@pytest.mark.parametrize("module", [["embedq", "workers"], ["embedq.workers.worker"]])
def test_a_model_that_is_not_there_is_told_before_torch_is_imported_and_a_server_is_looked_for(
    module: list[str], tmp_path: Path
) -> None:
    environment = {"EMBEDQ_MODELS": f"mine={tmp_path}/gone", "EMBEDQ_REDIS_URL": "redis://127.0.0.1:1/0"}
    with Running([sys.executable, "-m", *module], environment | {"PYTHONPROFILEIMPORTTIME": "1"}) as running:
        assert running.wait() == 1
    said = f"model 'mine': there is no model directory '{tmp_path}/gone'; a hub name is written owner/name"
    assert said in running.lines[-1]
    assert "embedq.core.settings" in imported(running)
    assert "torch" not in imported(running)


def test_the_module_of_names_loads_nothing() -> None:
    code = f"import sys; import {setting_names.__name__}; print(*sorted({{'celery', 'pydantic', 'torch'}} & set(sys.modules)))"
    assert subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True) == "\n"
