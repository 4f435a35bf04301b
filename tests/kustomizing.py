"""A directory for Kustomize -> the objects it stands for, as far as `deploy/kubernetes` needs Kustomize.

Knows `resources`, `namespace`, `images`, and `patches` of JSON operations on whatever a kind and a label select; anything
else is an AssertionError, so that a file which uses more cannot pass for tested. Where a real `kubectl` is
installed, a test holds the two against each other.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

Object = dict[str, Any]

#: Kinds that belong to no namespace.
_CLUSTER_WIDE = frozenset({"Namespace"})


def rendered(directory: Path) -> list[Object]:
    """All objects of a directory's kustomization, in the order of its files."""
    asked = yaml.safe_load((directory / "kustomization.yaml").read_text(encoding="utf-8"))
    assert asked.pop("kind") == "Kustomization"
    assert asked.pop("apiVersion") == "kustomize.config.k8s.io/v1beta1"
    found = [one for name in asked.pop("resources") for one in _resource(directory / name)]
    for patch in asked.pop("patches", []):
        found = _patched(found, patch)
    namespace = asked.pop("namespace", None)
    for one in found:
        if namespace and one["kind"] not in _CLUSTER_WIDE:
            one["metadata"]["namespace"] = namespace
    images = asked.pop("images", [])
    for container in _containers(found):
        _rename(container, images)
    assert not asked, f"not known here: {', '.join(asked)}"
    return found


def _resource(path: Path) -> list[Object]:
    if path.is_dir():
        return rendered(path)
    return [one for one in yaml.safe_load_all(path.read_text(encoding="utf-8")) if one]


def _patched(objects: list[Object], patch: Object) -> list[Object]:
    target = patch["target"]
    assert set(patch) == {"target", "patch"}
    assert set(target) == {"kind", "labelSelector"}
    label, _, value = target["labelSelector"].partition("=")
    meant = [o for o in objects if o["kind"] == target["kind"] and o["metadata"].get("labels", {}).get(label) == value]
    assert meant, f"nothing is selected by {target}"
    for one in meant:
        for operation in yaml.safe_load(patch["patch"]):
            _apply(one, operation)
    return objects


def _apply(target: Object, operation: Object) -> None:
    """One operation of RFC 6902, "add" or "replace"."""
    assert set(operation) == {"op", "path", "value"}
    *parents, last = (part.replace("~1", "/").replace("~0", "~") for part in operation["path"].split("/")[1:])
    place: Any = target
    for part in parents:
        place = place[int(part) if isinstance(place, list) else part]
    value = copy.deepcopy(operation["value"])
    if isinstance(place, list):
        assert operation["op"] == "replace" or last == "-", "lists grow at their end here"
        place[len(place) if last == "-" else int(last) : len(place) if last == "-" else int(last) + 1] = [value]
        return
    assert operation["op"] == "add" or last in place, f"{operation['path']} is not there to be replaced"
    place[last] = value


def _containers(objects: list[Object]) -> Iterator[Object]:
    for one in objects:
        template = one.get("spec", {}).get("template")
        if template:
            yield from template["spec"]["containers"]


def _rename(container: Object, images: list[Object]) -> None:
    name = container["image"].partition(":")[0]
    for image in images:
        assert set(image) == {"name", "newName", "newTag"}
        if image["name"] == name:
            container["image"] = f"{image['newName']}:{image['newTag']}"
