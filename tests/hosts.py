"""Hosts of a network, on this machine: network namespaces, each joined to that of the server by a cable of its own.

Nothing of it can be reached from outside, nor reaches out. Linux, root and `ip` are needed.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from types import TracebackType


def reason_against() -> str | None:
    """Why there can be no such hosts here; None if there can."""
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        return "only root can make network namespaces"
    if not shutil.which("ip"):
        return "the program ip is not installed"
    probe = f"embedq-probe-{os.getpid()}"
    if subprocess.run(["ip", "netns", "add", probe], capture_output=True, timeout=20, check=False).returncode:
        return "network namespaces are not allowed here"
    _ip("netns", "delete", probe)
    return None


class Network:
    """A server's host and others with a cable to it; a context manager that removes them."""

    def __init__(self, *names: str) -> None:
        self._server = f"embedq-{os.getpid()}-server"
        self._names = {name: f"embedq-{os.getpid()}-{name}" for name in names}
        self._numbers = {name: number for number, name in enumerate(names, 1)}

    def __enter__(self) -> Network:
        try:
            self._make()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def address(self, name: str) -> str:
        """The server's address as this host sees it."""
        return f"10.77.{self._numbers[name]}.1"

    def on_server(self, *command: str) -> list[str]:
        """The command that runs another one on the server's host."""
        return ["ip", "netns", "exec", self._server, *command]

    def on(self, name: str, *command: str) -> list[str]:
        """The command that runs another one on this host."""
        return ["ip", "netns", "exec", self._names[name], *command]

    def cut(self, name: str) -> None:
        """Pull this host's cable: nothing arrives, and nobody is told."""
        _ip("-n", self._server, "link", "set", self._cable(name), "down")

    def mend(self, name: str) -> None:
        """Put it back."""
        _ip("-n", self._server, "link", "set", self._cable(name), "up")

    def close(self) -> None:
        """Remove all; the cables go with their ends."""
        for namespace in (self._server, *self._names.values()):
            subprocess.run(["ip", "netns", "delete", namespace], capture_output=True, timeout=20, check=False)

    def _make(self) -> None:
        for namespace in (self._server, *self._names.values()):
            _ip("netns", "add", namespace)
            _ip("-n", namespace, "link", "set", "lo", "up")
        for name, namespace in self._names.items():
            ends = ("netns", self._server, "type", "veth", "peer", "name", "eth0", "netns", namespace)
            _ip("link", "add", self._cable(name), *ends)
            _ip("-n", self._server, "address", "add", f"{self.address(name)}/24", "dev", self._cable(name))
            _ip("-n", namespace, "address", "add", f"10.77.{self._numbers[name]}.2/24", "dev", "eth0")
            _ip("-n", self._server, "link", "set", self._cable(name), "up")
            _ip("-n", namespace, "link", "set", "eth0", "up")

    def _cable(self, name: str) -> str:
        return f"to-{name}"


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], capture_output=True, timeout=20, check=True)
