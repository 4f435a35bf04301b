"""`python -m workers`: one worker per accelerator, and a server if none is given."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys

from core.devices import Device, cpu_devices
from core.errors import InvalidSettings, OperatorError
from core.settings import read_settings
from workers import embedded, logs
from workers.launcher import Launcher, list_devices


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = _parser()
    asked = parser.parse_args(arguments)
    logs.set_up(os.environ.get("EMBEDQ_LOG_LEVEL", "INFO"))
    try:
        if asked.command == "devices":
            return _print_devices()
        return _start(asked)
    except OperatorError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 1


def _start(asked: argparse.Namespace) -> int:
    environment = {"EMBEDQ_MODELS": ",".join(asked.model)} if asked.model else {}
    os.environ.update(environment)  # the workers read the same settings as we do here
    settings = read_settings()
    if not settings.models:
        raise InvalidSettings(
            "no model is configured; give --model alias=path, or set EMBEDQ_MODELS or [models.alias] in embedq.toml"
        )
    devices = cpu_devices(asked.cpu_workers) if asked.cpu_workers else _chosen(list_devices(), asked.device)
    with contextlib.ExitStack() as stack:
        if not embedded.is_given():
            environment["EMBEDQ_REDIS_URL"] = stack.enter_context(embedded.server())
        return Launcher(devices, settings, environment).run()


def _chosen(found: list[Device], names: list[str]) -> list[Device]:
    """The devices named on the command line; all where none is."""
    if not names:
        return found
    by_name = {str(device): device for device in found}
    absent = [name for name in names if name not in by_name]
    if absent:
        raise InvalidSettings(f"device {absent[0]!r:.40} is not on this machine; there is {', '.join(by_name)}")
    return [by_name[name] for name in names]


def _print_devices() -> int:
    for device in list_devices():
        print(_described(device))
    return 0


def _described(device: Device) -> str:
    """Two lines: what the device is, and what it computes in."""
    parts = [str(device), device.name]
    if device.cores:
        parts.append(f"{len(device.cores)} cores")
    parts.append(f"{device.memory_bytes / 2**30:.0f} GiB" if device.memory_bytes else "memory not told")
    return (
        f"{'  '.join(parts)}\n  computes in {', '.join(device.precisions)}; auto takes {device.chosen}: {device.reason}"
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m workers", description="Start one worker per accelerator and watch them."
    )
    parser.add_argument(
        "command", nargs="?", choices=["start", "devices"], default="start", help="devices: list them and stop"
    )
    parser.add_argument(
        "--model", action="append", default=[], metavar="ALIAS=PATH", help="serve this model; may be repeated"
    )
    parser.add_argument(
        "--device",
        action="append",
        default=[],
        metavar="cuda:0",
        help="use this device; may be repeated (default: all)",
    )
    parser.add_argument(
        "--cpu-workers", type=int, default=0, metavar="N", help="ignore accelerators; N workers, the cores split evenly"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
