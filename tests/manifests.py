"""What stands in the objects of `deploy/kubernetes`, for the tests that read them."""

from __future__ import annotations

from tests.kustomizing import Object
from tests.running import ROOT

DIRECTORY = ROOT / "deploy" / "kubernetes"


def of_kind(objects: list[Object], kind: str) -> list[Object]:
    found = [one for one in objects if one["kind"] == kind]
    assert found
    return found


def pods(objects: list[Object]) -> dict[str, Object]:
    """The pods' specs by the names of what runs them."""
    return {o["metadata"]["name"]: o["spec"]["template"]["spec"] for o in objects if "template" in o.get("spec", {})}


def environment(container: Object, objects: list[Object]) -> dict[str, str | None]:
    """What a container's process is given; None for what a Secret holds, nothing of a whole Secret that may be absent."""
    maps = {one["metadata"]["name"]: one["data"] for one in of_kind(objects, "ConfigMap")}
    given: dict[str, str | None] = {}
    for source in container.get("envFrom", []):
        if secret := source.get("secretRef"):
            assert secret["optional"], "the pod would not start: no such Secret is among the objects"
        else:
            given |= maps[source["configMapRef"]["name"]]
    return given | {one["name"]: one.get("value") for one in container.get("env", [])}


def worker(objects: list[Object]) -> tuple[Object, Object]:
    """The worker's pod, and its one container."""
    pod = pods(objects)["worker-minilm"]
    (container,) = pod["containers"]
    return pod, container
