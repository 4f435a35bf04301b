"""`deploy/kubernetes`: every object and every field is one that Kubernetes, KEDA and the Prometheus operator know."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from typing import Any

import kubernetes_validate
import pytest
import yaml
from cloudcoil.models.keda.v1alpha1 import ScaledObject, TriggerAuthentication
from cloudcoil.models.prometheus_operator.v1 import PodMonitor

from tests.kustomizing import Object
from tests.manifests import DIRECTORY, of_kind

#: The oldest and the newest release that the objects are checked against.
RELEASES = ("1.30", "1.37")

#: Kinds that are not Kubernetes' own; each with its package's model.
CUSTOM = {"ScaledObject": ScaledObject, "TriggerAuthentication": TriggerAuthentication, "PodMonitor": PodMonitor}


@pytest.mark.parametrize("release", RELEASES)
def test_kubernetes_knows_every_object_and_every_field(objects: list[Object], release: str) -> None:
    own = [one for one in objects if one["kind"] not in CUSTOM]
    assert len(own) >= 12
    for one in own:
        kubernetes_validate.validate(one, release, strict=True)


def unknown_fields(given: Any, known: Any, path: str = "") -> Iterator[str]:
    """What stands in `given` and did not survive being read by a model that ignores what it does not know."""
    if isinstance(given, dict):
        for name, value in given.items():
            if not isinstance(known, dict) or name not in known:
                yield f"{path}.{name}"
            else:
                yield from unknown_fields(value, known[name], f"{path}.{name}")
    elif isinstance(given, list):
        for index, (one, read) in enumerate(zip(given, known, strict=True)):
            yield from unknown_fields(one, read, f"{path}[{index}]")


@pytest.mark.parametrize("kind", CUSTOM)
def test_keda_and_the_operator_know_every_object_and_every_field(objects: list[Object], kind: str) -> None:
    for one in of_kind(objects, kind):
        read = CUSTOM[kind].model_validate(one).model_dump(by_alias=True, exclude_unset=True, mode="json")
        assert list(unknown_fields(one, read)) == []


def test_the_check_for_unknown_fields_sees_one(objects: list[Object]) -> None:
    (scaled,) = of_kind(objects, "ScaledObject")
    scaled["spec"]["triggers"][0]["metricTyp"] = "Value"
    read = ScaledObject.model_validate(scaled).model_dump(by_alias=True, exclude_unset=True, mode="json")
    assert list(unknown_fields(scaled, read)) == [".spec.triggers[0].metricTyp"]


@pytest.mark.skipif(not shutil.which("kubectl"), reason="kubectl is not installed; our own reader was used alone")
def test_our_reader_gives_what_kubectl_gives(objects: list[Object], overlay: str) -> None:
    command = ["kubectl", "kustomize", str(DIRECTORY / "overlays" / overlay)]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)

    def by_name(found: list[Object]) -> dict[tuple[str, str], Object]:
        return {(one["kind"], one["metadata"]["name"]): one for one in found}

    assert by_name(objects) == by_name(list(yaml.safe_load_all(answer.stdout)))
