"""What pyproject.toml cannot say: every package of the tree lies under the one name `embedq`."""

from setuptools import find_packages, setup

#: Kubernetes, Compose, systemd and dashboards are files for operators and no packages; the tests stay in the checkout.
SHIPPED = ("core*", "tasks*", "workers*", "deploy", "deploy.demo*", "deploy.flower*")

setup(
    package_dir={"embedq": "."},
    packages=["embedq", *(f"embedq.{name}" for name in find_packages(include=SHIPPED))],
)
