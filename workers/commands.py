"""A pool operator's commands: start workers, look at them, drain and scale them, list devices, convert a checkpoint.

What an extra installs is imported inside the commands, so that their help shows everywhere. None loads torch here:
workers and the listing of devices are processes of their own.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import click

from embedq import tasks
from embedq.core.command_line import CONTEXT, EXIT_DONE, EXIT_FAILED, examples, needs
from embedq.core.devices import Device, cpu_devices, device_of_cores
from embedq.core.errors import InvalidInput, InvalidSettings
from embedq.workers import logs
from embedq.workers.launcher import remote_control
from embedq.workers.launcher.scaling_policy import Policy

if TYPE_CHECKING:
    from embedq.workers.launcher.launcher import Plan


@click.command(
    context_settings=CONTEXT,
    epilog=examples(
        "embedq workers --model minilm=/srv/models/minilm",
        "embedq workers --devices cuda:0,cuda:1",
        "embedq workers --devices cpu:0-7               # and another launcher with --devices cpu:8-15",
        "embedq workers --min 1 --max 8                 # as many as the backlog needs",
    ),
)
@click.option("--model", "models", multiple=True, metavar="ALIAS=PATH", help="Serve this model; may be repeated.")
@click.option(
    "--devices",
    default="",
    metavar="cuda:0,cuda:2",
    help="Use these devices; cpu:0-3 is one worker on these cores.  [default: all]",
)
@click.option("--per-device", type=int, default=1, show_default=True, metavar="N", help="Workers on each device.")
@click.option("--cpu-workers", type=int, default=0, metavar="N", help="Ignore accelerators; split the cores among N.")
@click.option("--min", "least", type=int, metavar="A", help="Scale with the backlog, never below A.  [default: 1]")
@click.option(
    "--max",
    "most",
    type=int,
    metavar="B",
    help="Scale with the backlog, never above B; a CPU's cores are split among B.  [default: all fit]",
)
@click.option(
    "--backlog-s", type=float, default=Policy.target_s, show_default=True, help="Seconds of backlog to allow."
)
@click.option(
    "--up-delay-s",
    type=float,
    default=Policy.up_delay_s,
    show_default=True,
    help="Seconds of too much backlog before workers are added.",
)
@click.option(
    "--down-delay-s",
    type=float,
    default=Policy.down_delay_s,
    show_default=True,
    help="Seconds of too little backlog before a worker is drained.",
)
@click.option(
    "--drain-first",
    is_flag=True,
    help="On SIGHUP, end a worker before its successor starts: for devices whose memory holds one only.",
)
@needs("worker")
def workers(models: Sequence[str], **options: Any) -> int:
    """Start workers on this machine, and watch them.

    One worker per accelerator, or one on the CPU, until SIGTERM or Ctrl-C, which drain them; SIGHUP reads the settings
    file again and replaces them one by one. Without EMBEDQ_REDIS_URL they use this user's embedded server, which is
    started if none runs. Models are those of --model, else of EMBEDQ_MODELS, else of [models.ALIAS] in embedq.toml.
    """
    from embedq.core.checkpoint.files import refuse_absent
    from embedq.core.settings import models_text, read_settings
    from embedq.workers import embedded
    from embedq.workers.broker.leases import give_back_jobs_of
    from embedq.workers.launcher.launcher import Launcher

    _log()
    environment = {"EMBEDQ_MODELS": models_text(models)} if models else {}
    os.environ.update(environment)  # the workers read the same settings as we do here
    settings = read_settings()
    if not settings.models:
        raise InvalidSettings(
            "no model is configured; give --model alias=path, or set EMBEDQ_MODELS or [models.alias] in embedq.toml"
        )
    refuse_absent(settings.models)
    plan = _plan(SimpleNamespace(**options))
    with contextlib.ExitStack() as stack:
        if not tasks.config.is_server_named():
            url = environment["EMBEDQ_REDIS_URL"] = stack.enter_context(embedded.server())
            tasks.app.conf.update(broker_url=url, result_backend=url)
        return Launcher(plan, settings, environment, partial(give_back_jobs_of, app=tasks.app)).run()


def _plan(asked: SimpleNamespace) -> Plan:
    """The launcher's plan from the options of `workers`. InvalidSettings if they do not fit this machine."""
    from embedq.workers.launcher.launcher import Plan, list_devices

    devices = cpu_devices(asked.cpu_workers) if asked.cpu_workers else _chosen(list_devices, asked.devices)
    if asked.per_device < 1:
        raise InvalidSettings(f"--per-device must be at least 1, given {asked.per_device}")
    is_scaled = asked.least is not None or asked.most is not None
    if is_scaled and asked.most and devices[0].kind == "cpu" and not (asked.cpu_workers or asked.devices):
        devices = cpu_devices(asked.most)  # there is nothing else to put them on
    policy = None
    if is_scaled:
        num_places = len(devices) * asked.per_device
        most = num_places if asked.most is None else asked.most
        least = 1 if asked.least is None else asked.least
        policy = Policy(least, most, asked.backlog_s, asked.up_delay_s, asked.down_delay_s)
    return Plan(devices, asked.per_device, policy, asked.drain_first)


def _chosen(found: Callable[[], list[Device]], listed: str) -> list[Device]:
    """The devices listed on the command line; all that are found where none is. InvalidSettings names a wrong one."""
    names = list(dict.fromkeys(name.strip() for name in listed.split(",") if name.strip()))
    by_cores = {name: device for name in names if (device := device_of_cores(name))}
    if names and len(by_cores) == len(names):
        _check_apart(by_cores)
        return list(by_cores.values())
    by_name = {str(device): device for device in found()} | by_cores
    absent = [name for name in names if name not in by_name]
    if absent:
        raise InvalidSettings(
            f"device {absent[0]!r:.40} is not on this machine; there is {', '.join(by_name)}. Part of a CPU is named by its "
            "cores: cpu:0-3"
        )
    _check_apart(by_cores)
    return [by_name[name] for name in names] or list(by_name.values())


def _check_apart(by_cores: dict[str, Device]) -> None:
    cores = [core for device in by_cores.values() for core in device.cores]
    if len(cores) != len(set(cores)):
        raise InvalidSettings(f"devices {', '.join(by_cores)} share cores; each core may belong to one of them")


@click.command(context_settings=CONTEXT, epilog=examples("embedq status"))
@needs("worker", "rich")
def status() -> int:
    """Show every worker that answers.

    Asks all launchers and workers through the server: name, device, model, state, speed and work of each, and what waits
    in the queues. Exit code 1 if no worker answers.
    """
    from rich.console import Console

    from embedq.workers.launcher import status_table

    _log()
    answers = {name: answer for name, answer in remote_control.ask_all().items() if "workers" in answer}
    rows: dict[str, dict[str, object]] = {}
    # A launcher knows more than its worker: what it says of one comes last, and counts.
    for name in sorted(answers, key=lambda name: name.startswith(remote_control.PREFIX)):
        rows |= {one["worker"]: one for one in answers[name]["workers"]}
    captions = [f"{name}: {answer['caption']}" for name, answer in sorted(answers.items()) if "caption" in answer]
    if not rows:
        click.echo("\n".join(["no worker answers; `embedq workers` starts one", *captions]))
        return EXIT_FAILED
    # Piped or redirected, nobody's terminal is too narrow for it.
    console = Console() if sys.stdout.isatty() else Console(width=200)
    console.print(status_table.table([rows[name] for name in sorted(rows)], "\n".join(captions)))
    return EXIT_DONE


@click.command(context_settings=CONTEXT, epilog=examples("embedq drain minilm.cuda0@gpu-host"))
@click.argument("worker")
def drain(worker: str) -> None:
    """Let a worker finish its jobs and end.

    WORKER is a name that `embedq status` shows. No other worker takes its place but where --min or the backlog asks for
    one.
    """
    _log()
    click.echo(f"{worker}: {remote_control.drain(worker)}")


@click.command(
    context_settings=CONTEXT, epilog=examples("embedq scale 3", "embedq scale auto --launcher launcher.minilm@gpu-host")
)
@click.argument("number", metavar="NUMBER|auto")
@click.option("--launcher", metavar="NAME", help="Which launcher, where several run.")
def scale(number: str, launcher: str | None) -> None:
    """Set the number of a launcher's workers.

    NUMBER holds whatever --min, --max and the backlog say; `auto` returns the decision to the backlog.
    """
    _log()
    if number != "auto" and not number.isdecimal():
        raise InvalidInput(f"scale needs a number of workers, or auto; given {number!r:.40}")
    click.echo(remote_control.scale(None if number == "auto" else int(number), launcher))


@click.command(context_settings=CONTEXT, epilog=examples("embedq devices"))
@needs("worker")
def devices() -> None:
    """List the devices of this machine.

    Those that `embedq workers` would use, as --devices writes them, with what each computes in and what `auto` takes.
    """
    from embedq.workers.launcher.launcher import list_devices

    _log()
    for device in list_devices():
        click.echo(_described(device))


def _described(device: Device) -> str:
    """Two lines: what the device is, and what it computes in."""
    parts = [str(device), device.name]
    if device.cores:
        parts.append(f"{len(device.cores)} cores")
    parts.append(f"{device.memory_bytes / 2**30:.0f} GiB" if device.memory_bytes else "memory not told")
    return (
        f"{'  '.join(parts)}\n  computes in {', '.join(device.precisions)}; auto takes {device.chosen}: {device.reason}"
    )


@click.command(context_settings=CONTEXT, epilog=examples("embedq convert /srv/models/old"))
@click.argument("directory", type=click.Path(path_type=Path))
@needs("worker")
def convert(directory: Path) -> None:
    """Convert a pickled checkpoint to safetensors.

    Reads pytorch_model.bin in DIRECTORY, which is never served, and writes model.safetensors beside it.
    """
    from embedq.core.convert import convert as convert_checkpoint

    click.echo(convert_checkpoint(directory))


def _log() -> None:
    logs.set_up(os.environ.get("EMBEDQ_LOG_LEVEL", "INFO"))
