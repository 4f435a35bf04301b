"""`deploy/kubernetes`: what the objects say fits our code, and each other."""

from __future__ import annotations

import base64
import re
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import redis
import yaml

from embedq import tasks
from embedq.core.settings import Settings
from embedq.tasks.datasets.part_task import PRIORITY
from embedq.workers.embedded import _free_port, find_program
from tests.kustomizing import Object, rendered
from tests.manifests import DIRECTORY, environment, of_kind, pods, worker
from tests.running import ROOT, Running
from tests.told_commands import misfit

#: What each kind of device is called in a pod's resources.
ACCELERATORS = {"cuda": "nvidia.com/gpu", "npu": "huawei.com/Ascend910"}


@pytest.fixture
def base() -> list[Object]:
    """What all overlays share."""
    return rendered(DIRECTORY / "base")


def test_every_pod_is_as_weak_as_it_can_be(objects: list[Object]) -> None:
    for pod in pods(objects).values():
        assert pod["automountServiceAccountToken"] is False
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        writable = {one["name"] for one in pod["volumes"] if "emptyDir" in one}
        for container in pod["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
            assert {"name": "tmp", "mountPath": "/tmp"} in container["volumeMounts"]
            assert "tmp" in writable
            assert container["resources"]["limits"]["memory"]
            assert container["resources"]["requests"]["cpu"]


def test_nothing_secret_stands_in_the_files_and_what_is_named_is_made_by_the_readme(objects: list[Object]) -> None:
    text = yaml.safe_dump_all(objects)
    wanted = set(re.findall(r"secretKeyRef:\s+key: (\S+)\s+name: (\S+)", text))
    wanted |= {
        (one["key"], one["name"])
        for o in of_kind(objects, "TriggerAuthentication")
        for one in o["spec"]["secretTargetRef"]
    }
    assert len(wanted) == 5
    readme = (ROOT / "deploy" / "README.md").read_text(encoding="utf-8")
    for key, name in wanted:
        assert re.search(rf"secret generic {name}\b[^`]*--from-literal={key}=", readme, re.DOTALL)
    assert "secret generic embedq-server-users" in readme
    assert all(one["kind"] != "Secret" for one in objects)


def test_every_image_is_pinned(objects: list[Object]) -> None:
    images = {container["image"] for pod in pods(objects).values() for container in pod["containers"]}
    assert all(re.search(r":\d+\.\d+", image) for image in images)


def test_one_accelerator_per_pod_and_its_kind_is_asked_for(objects: list[Object], overlay: str) -> None:
    _, container = worker(objects)
    assert environment(container, objects)["EMBEDQ_DEVICE"] == overlay
    asked = {name: number for name, number in container["resources"]["limits"].items() if "/" in name}
    assert asked == ({ACCELERATORS[overlay]: 1} if overlay in ACCELERATORS else {})


def test_a_pod_has_longer_to_end_than_its_worker_to_drain(objects: list[Object]) -> None:
    pod, container = worker(objects)
    drain_s = Settings.model_validate(
        {"drain_timeout_s": environment(container, objects)["EMBEDQ_DRAIN_TIMEOUT_S"]}
    ).drain_timeout_s
    assert pod["terminationGracePeriodSeconds"] >= 1.5 * drain_s


def test_what_a_worker_is_told_is_what_its_settings_accept(
    objects: list[Object], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, container = worker(objects)
    for name, value in environment(container, objects).items():
        if value is not None:
            monkeypatch.setenv(name, value)
    settings = Settings()
    assert list(settings.models) == ["minilm"]
    assert (settings.default_embed, settings.default_rerank) == ("minilm", "none")


def test_every_container_of_ours_runs_what_exists(objects: list[Object]) -> None:
    commands = {name: pod["containers"][0].get("command", []) for name, pod in pods(objects).items()}
    assert commands.pop("worker-minilm") == ["python", "-m", "embedq.workers.worker"]  # no launcher: see worker.yaml
    assert (ROOT / "workers" / "worker.py").is_file()
    assert commands.pop("server") == []
    assert {name: (program, misfit(words)) for name, (program, *words) in commands.items()} == {
        "exporter": ("embedq", ""),
        "flower": ("embedq", ""),
    }


def test_a_job_in_any_list_of_the_model_starts_the_first_worker(objects: list[Object]) -> None:
    (scaled,) = of_kind(objects, "ScaledObject")
    lists = [one["metadata"]["listName"] for one in scaled["spec"]["triggers"] if one["type"] == "redis"]
    steps = tasks.config.broker_transport_options["priority_steps"]
    sep = tasks.config.broker_transport_options["sep"]
    queues = [tasks.config.queue_name("embed", "minilm"), tasks.config.queue_name("rerank", "minilm"), "embed"]
    keys = [f"{queue}{sep}{step}" if step else queue for queue in queues for step in steps]
    assert PRIORITY in steps  # of every part: their queue has one list
    parts = f"{tasks.config.parts_queue('minilm')}{sep}{PRIORITY}"
    assert sorted(lists) == sorted([*keys, parts, "unacked_index"])
    assert scaled["spec"]["minReplicaCount"] == 0
    assert scaled["spec"]["scaleTargetRef"]["name"] in pods(objects)
    # The jobs of a killed worker come back after its lease, and must find somebody.
    assert scaled["spec"]["cooldownPeriod"] > 2 * int(environment(worker(objects)[1], objects)["EMBEDQ_LEASE_S"] or 0)


def test_the_addresses_in_triggers_are_those_of_the_server(objects: list[Object]) -> None:
    (service,) = [one for one in of_kind(objects, "Service") if one["metadata"]["name"] == "server"]
    (scaled,) = of_kind(objects, "ScaledObject")
    port = service["spec"]["ports"][0]["port"]
    addresses = {one["metadata"]["address"] for one in scaled["spec"]["triggers"] if one["type"] == "redis"}
    assert addresses == {f"server.{service['metadata']['namespace']}.svc:{port}"}


def test_every_port_that_is_named_is_a_containers(objects: list[Object]) -> None:
    ports = {
        port["name"] for pod in pods(objects).values() for container in pod["containers"] for port in container["ports"]
    }
    used = set(re.findall(r"(?:port|targetPort): ([a-z]+)\b", yaml.safe_dump_all(objects)))
    assert used == ports


def test_policies_and_monitors_select_pods_that_exist(objects: list[Object]) -> None:
    components = {
        o["spec"]["template"]["metadata"]["labels"]["app.kubernetes.io/component"]
        for o in objects
        if "template" in o.get("spec", {})
    }
    text = yaml.safe_dump_all(of_kind(objects, "NetworkPolicy") + of_kind(objects, "PodMonitor"))
    named = set(re.findall(r"app.kubernetes.io/component: (\S+)", text))
    for listed in re.findall(r"key: app.kubernetes.io/component\s+operator: In\s+values:((?:\s+- [a-z]+\n)+)", text):
        named |= set(listed.replace("- ", "").split())
    assert components == {"server", "worker", "exporter", "flower"} == named


def test_the_servers_settings_keep_jobs(base: list[Object], tmp_path: Path) -> None:
    """A real server, started with the very file (its paths apart), has the append-only file on and throws nothing away."""
    (settings,) = [one for one in of_kind(base, "ConfigMap") if "valkey.conf" in one["data"]]
    users, port = tmp_path / "users.acl", _free_port()
    users.write_text("user default on nopass ~* &* +@all\n")
    file = tmp_path / "valkey.conf"
    text = (
        settings["data"]["valkey.conf"]
        .replace("/data", str(tmp_path))
        .replace("/etc/valkey/users/users.acl", str(users))
    )
    file.write_text(f"{text}\nbind 127.0.0.1\nport {port}\n")
    with Running([find_program(), str(file)]) as server, redis.Redis(port=port) as client:
        server.wait_for("Ready to accept connections")
        told = {name: client.config_get(name)[name] for name in ("appendonly", "maxmemory-policy", "appendfsync")}
        limit = int(client.config_get("maxmemory")["maxmemory"])
    assert told == {"appendonly": "yes", "maxmemory-policy": "noeviction", "appendfsync": "everysec"}
    memory = pods(base)["server"]["containers"][0]["resources"]["limits"]["memory"]
    assert 1.3 * limit <= int(memory.removesuffix("Gi")) * 2**30


def test_flower_asks_for_a_password(base: list[Object], server: str) -> None:
    """Flower started with the pod's own command and variables, on another port."""
    container = pods(base)["flower"]["containers"][0]
    port = _free_port()
    command = [sys.executable, "-m", *container["command"]]  # `embedq`, without the script that pip makes of it
    command = [part.replace("0.0.0.0", "127.0.0.1").replace("5555", str(port)) for part in command]
    given = {name: value for name, value in environment(container, base).items() if value is not None}
    assert "FLOWER_BASIC_AUTH" in environment(container, base)
    with Running(command, given | {"FLOWER_BASIC_AUTH": "somebody:secret", "EMBEDQ_REDIS_URL": server}) as flower:
        flower.wait_for("Visit me at")
        with pytest.raises(urllib.error.HTTPError, match="401"):
            urllib.request.urlopen(f"http://127.0.0.1:{port}/workers", timeout=20)
        allowed = base64.b64encode(b"somebody:secret").decode()
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/workers", headers={"Authorization": f"Basic {allowed}"}
        )
        assert urllib.request.urlopen(request, timeout=20).status == 200
        # The probe has no password.
        probe = container["readinessProbe"]["httpGet"]["path"]
        assert urllib.request.urlopen(f"http://127.0.0.1:{port}{probe}", timeout=20).status == 200
        flower.process.kill()


def test_another_model_is_a_copy_with_another_alias(overlay: str, tmp_path: Path) -> None:
    """The two commands of deploy/README.md, done in a copy of the directory."""
    readme = (ROOT / "deploy" / "README.md").read_text(encoding="utf-8")
    (block,) = [one for one in re.findall(r"```sh\n(.*?)```", readme, re.DOTALL) if "cp -r worker" in one]
    shutil.copytree(DIRECTORY, tmp_path / "kubernetes")
    script = block.replace("overlays/cuda", f"overlays/{overlay}").replace(
        "deploy/kubernetes", str(tmp_path / "kubernetes")
    )
    subprocess.run(["bash", "-euc", script], check=True, timeout=30)
    objects = rendered(tmp_path / "kubernetes" / "overlays" / overlay)
    assert {"worker-minilm", "worker-reranker"} <= set(pods(objects))
    first, second = sorted(of_kind(objects, "ScaledObject"), key=lambda one: one["metadata"]["name"])
    assert "minilm" not in yaml.safe_dump(second)
    assert environment(pods(objects)["worker-reranker"]["containers"][0], objects)["EMBEDQ_DEVICE"] == overlay
    names = [{one["name"] for one in scaled["spec"]["triggers"]} for scaled in (first, second)]
    assert names[0] & names[1] == {
        "backlog-seconds",
        "busy-workers",
        "in-flight",
    }  # the default queue is minilm's alone
