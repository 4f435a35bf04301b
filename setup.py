"""Puts every package of the tree under the one name `embedq`, which pyproject.toml cannot express."""

from __future__ import annotations

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

#: Kubernetes, Compose, systemd and dashboards are files for operators and no packages; the tests stay in the checkout.
SHIPPED = ("core*", "tasks*", "testing*", "workers*", "deploy", "deploy.demo*", "deploy.flower*")


class Modules(build_py):
    """The modules of the tree without this file, which lies in the package `embedq` as the root's other modules do."""

    def find_package_modules(self, package: str, package_dir: str) -> list[tuple[str, str, str]]:
        """(package, module, file) of each module that is shipped."""
        found: list[tuple[str, str, str]] = super().find_package_modules(package, package_dir)
        return [module for module in found if module[:2] != ("embedq", "setup")]


setup(
    package_dir={"embedq": "."},
    packages=["embedq", *(f"embedq.{name}" for name in find_packages(include=SHIPPED))],
    cmdclass={"build_py": Modules},
)
