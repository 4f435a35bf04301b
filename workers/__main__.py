"""`python -m embedq.workers`: workers on the devices of this machine, and a server if none is given.

Beside `start`, which is the default, the commands ask and tell workers and launchers anywhere, through the server.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys

from embedq import tasks
from embedq.core.devices import Device, cpu_devices
from embedq.core.errors import InvalidInput, InvalidSettings, OperatorError
from embedq.core.settings import read_settings
from embedq.workers import embedded, logs
from embedq.workers.launcher import remote_control, status_table
from embedq.workers.launcher.launcher import Launcher, Plan, list_devices
from embedq.workers.launcher.scaling_policy import Policy


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = _parser()
    asked = parser.parse_args(arguments)
    logs.set_up(os.environ.get("EMBEDQ_LOG_LEVEL", "INFO"))
    commands = {"start": _start, "devices": _print_devices, "status": _print_status, "drain": _drain, "scale": _scale}
    try:
        return commands[asked.command](asked)
    except (OperatorError, InvalidInput) as error:
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
    plan = _plan(asked)
    with contextlib.ExitStack() as stack:
        if not embedded.is_given():
            url = environment["EMBEDQ_REDIS_URL"] = stack.enter_context(embedded.server())
            tasks.app.conf.update(broker_url=url, result_backend=url)
        return Launcher(plan, settings, environment).run()


def _plan(asked: argparse.Namespace) -> Plan:
    devices = cpu_devices(asked.cpu_workers) if asked.cpu_workers else _chosen(list_devices(), asked.devices)
    if asked.per_device < 1:
        raise InvalidSettings(f"--per-device must be at least 1, given {asked.per_device}")
    is_scaled = asked.min is not None or asked.max is not None
    if is_scaled and asked.max and devices[0].kind == "cpu" and not asked.cpu_workers:
        devices = cpu_devices(asked.max)  # there is nothing else to put them on
    policy = None
    if is_scaled:
        num_places = len(devices) * asked.per_device
        most = num_places if asked.max is None else asked.max
        least = 1 if asked.min is None else asked.min
        policy = Policy(least, most, asked.backlog_s, asked.up_delay_s, asked.down_delay_s)
    return Plan(devices, asked.per_device, policy, asked.drain_first)


def _chosen(found: list[Device], listed: str) -> list[Device]:
    """The devices listed on the command line; all where none is."""
    names = [name.strip() for name in listed.split(",") if name.strip()]
    if not names:
        return found
    by_name = {str(device): device for device in found}
    absent = [name for name in names if name not in by_name]
    if absent:
        raise InvalidSettings(f"device {absent[0]!r:.40} is not on this machine; there is {', '.join(by_name)}")
    return [by_name[name] for name in dict.fromkeys(names)]


def _print_status(asked: argparse.Namespace) -> int:
    """A table of the workers that launchers tell of, and of those that have none."""
    from rich.console import Console

    answers = {name: answer for name, answer in remote_control.ask_all().items() if "workers" in answer}
    rows: dict[str, dict[str, object]] = {}
    for name in sorted(
        answers, key=lambda name: name.startswith(remote_control.PREFIX)
    ):  # a launcher knows more, and later
        rows |= {one["worker"]: one for one in answers[name]["workers"]}
    captions = [f"{name}: {answer['caption']}" for name, answer in sorted(answers.items()) if "caption" in answer]
    # Piped or redirected, nobody's terminal is too narrow for it.
    console = Console() if sys.stdout.isatty() else Console(width=200)
    console.print(status_table.table([rows[name] for name in sorted(rows)], "\n".join(captions)))
    return 0 if rows else 1


def _drain(asked: argparse.Namespace) -> int:
    print(f"{asked.argument}: {remote_control.drain(_argument(asked, 'the name of a worker'))}")
    return 0


def _scale(asked: argparse.Namespace) -> int:
    given = _argument(asked, "a number of workers, or auto")
    if given != "auto" and not given.isdecimal():
        raise InvalidInput(f"scale needs a number of workers, or auto; given {given!r:.40}")
    print(remote_control.scale(None if given == "auto" else int(given), asked.launcher))
    return 0


def _argument(asked: argparse.Namespace, meaning: str) -> str:
    if not asked.argument:
        raise InvalidInput(f"{asked.command} needs {meaning}")
    return str(asked.argument)


def _print_devices(asked: argparse.Namespace) -> int:
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
        prog="python -m embedq.workers", description="Start workers on the devices of this machine and watch them."
    )
    add = parser.add_argument
    add(
        "command",
        nargs="?",
        choices=["start", "devices", "status", "drain", "scale"],
        default="start",
        help="devices: list this machine's; status: a table of all workers that can be reached; "
        "drain NAME: let a worker finish and end; no other takes its place but where --min or the backlog asks for one. "
        "scale N: have a launcher run N workers, whatever those say (auto: give the decision back)",
    )
    add("argument", nargs="?", help="of drain: the worker's name; of scale: a number, or auto")
    add("--launcher", metavar="NAME", help="of scale: which launcher, where several run")
    start = parser.add_argument_group("start")
    add = start.add_argument
    add("--model", action="append", default=[], metavar="ALIAS=PATH", help="serve this model; may be repeated")
    add("--devices", default="", metavar="cuda:0,cuda:2", help="use these devices (default: all)")
    add("--per-device", type=int, default=1, metavar="N", help="workers on each device (default: %(default)s)")
    add(
        "--cpu-workers", type=int, default=0, metavar="N", help="ignore accelerators; N workers, the cores split evenly"
    )
    add("--min", type=int, metavar="A", help="scale with the backlog, never below A workers (default: 1)")
    add("--max", type=int, metavar="B", help="scale with the backlog, never above B workers (default: all that fit)")
    add("--backlog-s", type=float, default=Policy.target_s, metavar="S", help=f"seconds of backlog aimed at {_DEFAULT}")
    add("--up-delay-s", type=float, default=Policy.up_delay_s, metavar="S", help=f"before workers are added {_DEFAULT}")
    add(
        "--down-delay-s", type=float, default=Policy.down_delay_s, metavar="S", help=f"before one is drained {_DEFAULT}"
    )
    add(
        "--drain-first",
        action="store_true",
        help="on SIGHUP, end a worker before its successor starts: for devices whose memory holds one only",
    )
    return parser


#: How argparse is told to print a default.
_DEFAULT = "(default: %(default)s)"


if __name__ == "__main__":
    sys.exit(main())
