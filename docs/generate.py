"""`python -m docs.generate`: writes the pages that are read off the code; with `--check` names those that are out of date.

    reference/settings.md      celeryconfig.WIRE, core/settings.py
    reference/options.md       core/options.py
    reference/metrics.md       tasks/metrics.py
    reference/redis-keys.md    the heads of the files that write keys
    reference/commands.md      the help of every command
    explain/code-map.md        the first docstring line of every file, and tests/layout.py's path of a job

Where a page shows a whole file, `<!-- file: path -->` stands above its block, and the block is brought up to date. A field is
described by the `#:` lines above it. ValueError names a field, a key or a file that has no description.
`tests/test_docs_generated.py` compares the pages with what this makes.
"""

from __future__ import annotations

import ast
import inspect
import re
import sys
import textwrap
from collections.abc import Callable, Iterable
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, get_args

import click
from celery.backends.base import KeyValueStoreBackend

from embedq import celeryconfig
from embedq.__main__ import COMMANDS, embedq
from embedq.core import options as call_options
from embedq.core.batching.job import MAX_INTERACTIVE_PRIORITY, MAX_INTERACTIVE_ROWS
from embedq.core.command_line import EXIT_CODES
from embedq.core.results import Dtype
from embedq.core.settings import ModelSettings, Settings
from embedq.tasks import metrics as catalogue
from tests.layout import FILES, MAIN_PATH, ROOT, parsed

DOCS = Path(__file__).parent

#: Folders of the code map, in the order in which they are read.
PARTS = ("tasks", "core", "workers", "testing", "deploy")

#: Files whose head lists keys in Redis.
KEY_FILES = ("workers/broker/transport.lua", "tasks/models.py", "tasks/speeds.py", "tasks/datasets/run_state.py")

#: Variables of the environment that no settings class declares.
ENVIRONMENT_ONLY = {
    "EMBEDQ_CONFIG": ("`embedq.toml`", "Path of the settings file. A file that is named must exist."),
    "EMBEDQ_LOG_LEVEL": ("INFO", "Level of embedq's own log lines: DEBUG, INFO, WARNING or ERROR."),
    "REDIS_URL": ("not set", "The server, where `EMBEDQ_REDIS_URL` is not set."),
    "EMBEDQ_DEVICE_LABEL": (
        "set by the launcher",
        "Name of a worker's device, `cuda1` or `cuda1-2`; part of its own name.",
    ),
    "EMBEDQ_WORKER_NAME": ("from models and device", "Name of one worker, as Celery's option `-n` writes it."),
    "EMBEDQ_HEARTBEAT_FD": ("set by the launcher", "File descriptor on which a worker sends its heartbeats."),
}

#: What Celery and kombu keep beside our own keys.
CELERYS_KEYS = (
    (
        "`_kombu.binding.<exchange>`",
        "set",
        "queues that kombu has declared; written when a process first publishes or consumes",
    ),
    ("`unacked_mutex`", "string", "lock of stock workers that look for old jobs; our workers do not take it"),
)


def settings() -> str:
    """The page of every setting."""
    wire = [(name, celeryconfig.WIRE[name], "", text) for name, text in _wire_descriptions().items()]
    parts = [
        "# Settings",
        _GENERATED.format("celeryconfig.py and core/settings.py"),
        _SETTINGS_HEAD,
        "## Producers and workers\n\nIn the file under `[wire]`. Producers and workers must agree on them.",
        _table(("variable", "default", "meaning"), [_variable(*row) for row in wire]),
        "## Workers\n\nIn the file at top level.",
        _table(("variable", "default", "meaning"), [_variable(*row) for row in _fields(Settings)]),
        "## One model\n\nIn the file under `[models.<alias>]`; in Python the argument `model=` of `embedq.core.load`.",
        _table(
            ("setting", "default", "values", "meaning"),
            [(f"`{name}`", _default(default), values, text) for name, default, values, text in _fields(ModelSettings)],
        ),
        "## Environment only",
        _table(
            ("variable", "default", "meaning"),
            [(f"`{name}`", default, text) for name, (default, text) in ENVIRONMENT_ONLY.items()],
        ),
        _SETTINGS_FOOT,
    ]
    return _page(parts)


def options() -> str:
    """The page of every option of a call."""
    limits = {
        "most": f"{call_options.MAX_INSTRUCTION_CHARACTERS:,}",
        "interactive": MAX_INTERACTIVE_PRIORITY,
        "rows": f"{MAX_INTERACTIVE_ROWS:,}",
    }
    parts = ["# Options of a call", _GENERATED.format("core/options.py"), _OPTIONS_HEAD]
    for title, kind in (("embed", call_options.EmbedOptions), ("rerank", call_options.RerankOptions)):
        described = descriptions("core/options.py", kind.__name__)
        rows = [
            (f"`{one.name}`", _values_of_option(one.name, str(one.type)), _default(one.default), described[one.name])
            for one in fields(kind)
        ]
        parts += [f"## {_CALLS[title]}", _table(("option", "values", "default", "meaning"), rows)]
    return _page([*parts, _OPTIONS_FOOT.format(**limits)])


def metrics() -> str:
    """The page of every metric."""
    parts = ["# Metrics", _GENERATED.format("tasks/metrics.py"), _METRICS_HEAD]
    for title, of in (("Of a worker", catalogue.WORKER), ("Of the exporter", catalogue.EXPORTER)):
        rows = [
            (f"`{name}`", metric.kind, ", ".join(f"`{label}`" for label in metric.labels), metric.what)
            for name, metric in of.items()
        ]
        parts += [f"## {title}", _table(("metric", "kind", "labels", "meaning"), rows)]
    named = (catalogue.OUTCOMES, catalogue.PART_OUTCOMES, catalogue.STAGES)
    outcomes, of_parts, stages = (", ".join(f"`{one}`" for one in some) for some in named)
    values = f"- `outcome`: {outcomes}; of `embedq_parts_total` {of_parts}\n- `stage`: {stages}"
    return _page([*parts, f"## Values of labels\n\n{values}", _METRICS_FOOT])


def redis_keys() -> str:
    """The page of everything that lies on the server."""
    steps = [step for step in celeryconfig.broker_transport_options["priority_steps"] if step]
    named = [celeryconfig.queue_name(kind, model) for kind in ("embed", "rerank") for model in (None, "<model>")]
    named.append(celeryconfig.parts_queue("<model>"))
    queues = ", ".join(f"`{name}`" for name in named)
    lists = ", ".join(f"`:{step}`" for step in steps)
    results = f"`{KeyValueStoreBackend.task_keyprefix}<job id>`"
    rows = [
        (
            queues,
            "list",
            f"jobs that wait; priorities above 0 in lists of their own, the same name with {lists} behind it",
        ),
        (
            results,
            "string",
            "a job's [blob](blob.md), kept for `EMBEDQ_RESULT_EXPIRES_S`; also published on the channel of that name",
        ),
        *((f"`{name}`", kind, text) for path in KEY_FILES for name, kind, text in keys_at_head(path)),
        *CELERYS_KEYS,
    ]
    parts = [
        "# Redis keys",
        _GENERATED.format(f"{', '.join(KEY_FILES)} and celeryconfig.py"),
        _KEYS_HEAD,
        _table(("key", "type", "what it holds"), rows),
        _KEYS_FOOT,
    ]
    return _page(parts)


def commands() -> str:
    """The page of every command."""
    parts = ["# Commands", _GENERATED.format("the help of each command"), _COMMANDS_HEAD]
    codes = [(str(code), meaning) for code, meaning in EXIT_CODES.items()]
    context = click.Context(embedq, info_name="embedq")
    sections = {title: list(rows) for title, rows in COMMANDS.items()}
    listed = {name for names in sections.values() for name in names}
    sections["More"] = [name for name in embedq.list_commands(context) if name not in listed]
    for title, names in sections.items():
        parts.append(f"## {title}")
        for name in names:
            command = embedq.get_command(context, name)
            assert command
            parts += _command(command, click.Context(command, info_name=name, parent=context), level=3)
    return _page([*parts, "## Exit codes", _table(("code", "meaning"), codes), _COMMANDS_FOOT])


def code_map() -> str:
    """The page of every file."""
    parts = ["# Code map", _GENERATED.format("the first docstring line of each file, and tests/layout.py"), _MAP_HEAD]
    steps = [f"{number}. `{path}`: {_first_line(ROOT / path)}" for number, path in enumerate(MAIN_PATH, 1)]
    parts += [
        f"## The path of one dense embed\n\nIt passes through {len(MAIN_PATH)} files, in this order:",
        "\n".join(steps),
    ]
    for part in PARTS:
        parts.append(f"## {part}")
        for folder, files in _by_folder(part).items():
            heading = [] if folder == part else [f"### {folder}"]
            table = _table(("file", "what it is"), [(f"`{path.name}`", _first_line(path)) for path in files])
            parts += [*heading, table]
    return _page(parts)


#: Page below docs/ -> what makes it.
PAGES: dict[str, Callable[[], str]] = {
    "reference/settings.md": settings,
    "reference/options.md": options,
    "reference/metrics.md": metrics,
    "reference/redis-keys.md": redis_keys,
    "reference/commands.md": commands,
    "explain/code-map.md": code_map,
}


def descriptions(path: str, class_name: str) -> dict[str, str]:
    """Field -> the `#:` lines above it, of one class. ValueError names a field without any."""
    lines = (ROOT / path).read_text(encoding="utf-8").splitlines()
    body = next(
        node.body for node in parsed(ROOT / path).body if isinstance(node, ast.ClassDef) and node.name == class_name
    )
    found: dict[str, str] = {}
    for node in body:
        if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
            continue
        above: list[str] = []
        for line in reversed(lines[: node.lineno - 1]):
            if not line.lstrip().startswith("#:"):
                break
            above.insert(0, line.strip().removeprefix("#:").strip())
        if not above:
            raise ValueError(f"{path}: {class_name}.{node.target.id} has no #: line above it")
        found[node.target.id] = " ".join(above)
    return found


def keys_at_head(path: str) -> list[tuple[str, str, str]]:
    """(key, type, what it holds) of the keys listed in a file's first comment or docstring. ValueError for none."""
    found: list[tuple[str, str, str]] = []
    column = 0
    for line in (ROOT / path).read_text(encoding="utf-8").splitlines()[:40]:
        plain = re.sub("^--", "  ", line)
        entry = re.match(r"\s+(?:\d\s+)?((?:embedq:|unacked)[\w:<>]*)\s+(hash|zset|stream|string|list)\s+(\S.*)", plain)
        if entry:
            found.append((entry[1], entry[2], entry[3]))
            column = entry.start(3)
        elif column and plain.strip() and len(plain) - len(plain.lstrip()) >= column:
            name, kind, text = found[-1]
            found[-1] = (name, kind, f"{text} {plain.strip()}")
        else:
            column = 0
    if not found:
        raise ValueError(f"{path} lists no keys at its head")
    return found


def with_files(page: str) -> str:
    """A page with the files that it shows as they are now."""

    def shown(found: re.Match[str]) -> str:
        text = (ROOT / found["path"]).read_text(encoding="utf-8")
        return f"{found['mark']}```{found['language']}\n{text}```"

    pattern = r"(?P<mark><!-- file: (?P<path>\S+) -->\n)```(?P<language>\w+)\n.*?```(?=\n)"
    return re.sub(pattern, shown, page, flags=re.DOTALL)


def _command(command: click.Command, context: click.Context, level: int) -> list[str]:
    """One command, and those below it: usage, what it does, arguments, options, examples."""
    parts = [f"{'#' * level} {context.command_path}"]
    usage = " ".join((context.command_path, *command.collect_usage_pieces(context)))
    paragraphs = (inspect.cleandoc(command.help or "")).replace("\b\n", "").split("\n\n")
    parts += [f"```text\n{usage}\n```", *(" ".join(one.split()) for one in paragraphs)]
    options = [one for one in command.get_params(context) if isinstance(one, click.Option) and one.name != "help"]
    records = [record for one in options if (record := one.get_help_record(context))]
    rows = [(f"`{names}`", text.replace("  [", " [")) for names, text in records]
    if rows:
        parts.append(_table(("option", "meaning"), rows))
    examples = re.findall(r"^  (\S.*)$", (command.epilog or "").partition("Exit codes:")[0], re.MULTILINE)
    if examples:
        parts.append("```sh\n" + "\n".join(examples) + "\n```")
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            below = command.get_command(context, name)
            assert below
            parts += _command(below, click.Context(below, info_name=name, parent=context), level + 1)
    return parts


def _wire_descriptions() -> dict[str, str]:
    """Setting -> its lines in the docstring of celeryconfig.py. ValueError names one that is missing."""
    found: dict[str, str] = {}
    name = ""
    for line in (ast.get_docstring(parsed(ROOT / "celeryconfig.py")) or "").splitlines():
        entry = re.match(r"    (\w+) {2,}(\S.*)", line)
        if entry:
            name, text = entry[1], entry[2]
            found[name] = text
        elif name and line.startswith(" " * 8):
            found[name] += f" {line.strip()}"
        else:
            name = ""
    if set(found) != set(celeryconfig.WIRE):
        raise ValueError(
            f"the docstring of celeryconfig.py and WIRE differ in {sorted(set(found) ^ set(celeryconfig.WIRE))}"
        )
    return {name: found[name] for name in celeryconfig.WIRE}


def _fields(of: type[Settings] | type[ModelSettings]) -> list[tuple[str, Any, str, str]]:
    """(name, default, values, description) of each setting."""
    described = descriptions("core/settings.py", of.__name__)
    return [
        (name, MISSING if field.is_required() else field.default, _values(field), described[name])
        for name, field in of.model_fields.items()
        if name != "wire"
    ]


def _variable(name: str, default: Any, values: str, text: str) -> tuple[str, str, str]:
    meaning = _sentence(text) + (f" Values: {values}." if values else "")
    return (f"`EMBEDQ_{name.upper()}`", _default(default), meaning[0].upper() + meaning[1:])


def _values(field: Any) -> str:
    """Bounds and choices of a setting, as far as its type says them."""
    choices = [value for one in (field.annotation, *get_args(field.annotation)) for value in get_args(one)]
    words = [f"`{one}`" for one in dict.fromkeys(choices) if isinstance(one, str)]
    if words:
        return ", ".join(words)
    bounds = {"ge": "from", "gt": "above", "le": "to", "lt": "below"}
    said = [
        f"{word} {getattr(one, key):,.15g}"
        for one in field.metadata
        for key, word in bounds.items()
        if hasattr(one, key)
    ]
    return " ".join(said)


def _values_of_option(name: str, annotation: str) -> str:
    choices: dict[str, Iterable[Any]] = {
        "outputs": call_options.OUTPUTS,
        "mode": call_options.MODES,
        "input_type": call_options.INPUT_TYPES,
        "compress_ratio": call_options.COMPRESS_RATIOS,
        "dtype": get_args(Dtype),
    }
    if name in choices:
        return ", ".join(f"`{one}`" for one in choices[name])
    kind = annotation.removesuffix(" | None")
    plain = {"str": "a string", "int": "a whole number", "bool": "true or false", "bool | None": "true or false"}
    listed = {"tuple[int, ...]": "a list of whole numbers", "tuple[float, float, float]": "three numbers from 0"}
    return (plain | listed | {"tuple[dict[str, str], ...]": "a list of dicts"})[kind]


def _default(value: Any) -> str:
    if value is MISSING:
        return "required"
    if value is None or value in ("", {}, ()):
        return "not set"
    if isinstance(value, tuple):
        return ", ".join(f"`{one}`" for one in value)
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def _by_folder(part: str) -> dict[str, list[Path]]:
    """Folder -> its files, of one part of the code, in the order of a listing."""
    files = [path for path in FILES if path.is_relative_to(ROOT / part)] + sorted((ROOT / part).rglob("*.lua"))
    found: dict[str, list[Path]] = {}
    for path in sorted(files, key=lambda path: (path.parent.as_posix(), path.name)):
        if path.read_text(encoding="utf-8").strip():
            found.setdefault(path.parent.relative_to(ROOT).as_posix(), []).append(path)
    return found


def _first_line(path: Path) -> str:
    """A file's first sentence about itself. ValueError if there is none."""
    text = path.read_text(encoding="utf-8")
    said = (ast.get_docstring(parsed(path)) or "") if path.suffix == ".py" else text.removeprefix("--").strip()
    if not said:
        raise ValueError(f"{path.relative_to(ROOT)} has no docstring")
    return said.splitlines()[0].rstrip(":")


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join(f"| {' | '.join(_cell(cell) for cell in line)} |" for line in lines)


def _cell(text: str) -> str:
    """`text` in one cell: a bar or the end of a line would end it."""
    return text.replace("|", "\\|").replace("\n", " ")


def _sentence(text: str) -> str:
    return text if text.endswith((".", "!", "?")) else f"{text}."


def _page(parts: Iterable[str]) -> str:
    return "\n\n".join(part.strip("\n") for part in parts) + "\n"


def _text(text: str) -> str:
    return textwrap.dedent(text).strip()


_GENERATED = "<!-- Generated by `make docs` from {}. Edits here are overwritten. -->"

_CALLS = {"embed": "tasks.embed(texts, …)", "rerank": "tasks.rerank(query, passages, …)"}

_SETTINGS_HEAD = _text("""
    embedq reads each setting from the first of these that has it: arguments of the command, environment variables,
    `embedq.toml` in the working directory (or the file that `EMBEDQ_CONFIG` names), the default. A wrong value ends the
    process at start with the setting's name, the allowed values, and the value given. In the file a setting has its
    variable's name in lower case without the prefix: `EMBEDQ_MAX_BATCH_S` is `max_batch_s`.

    A name that is misspelt is wrong, too: the prefix `EMBEDQ_` is embedq's own. A worker refuses every variable and every key of the
    file that nothing reads, and names the nearest right one; a producer refuses those meant for its own settings, and only warns of
    others, so that a worker's setting never keeps an application from starting. What Kubernetes sets for a service whose name begins
    with `embedq` counts for neither.

    ```toml
    default_embed = "bge-m3"
    max_batch_s = 0.25

    [models.bge-m3]
    path = "BAAI/bge-m3"
    revision = "5617a9f61b028005a4858fdac845db406aefb181"

    [models.reranker]
    path = "/models/bge-reranker-v2-m3"
    precision = "bfloat16"

    [wire]
    result_expires_s = 600
    ```
""")

_SETTINGS_FOOT = _text("""
    How the server's URL looks with TLS, Sentinels or users is in [The server](../operating/server.md).
    What to choose for `precision` is in [Precision and int8](../explain/precision.md).
""")

_OPTIONS_HEAD = _text("""
    Options are keyword arguments of `tasks.embed.delay`, `tasks.rerank.delay`, `embed_many`, `rerank_many`, and of
    `engine.embed` and `engine.rerank` in [embedq.core](../how-to/without-a-queue.md). The producer checks them at the call; a
    wrong one raises `InvalidInput` before anything is sent. A worker checks them again, because any program can write to
    the queue.

    ```python
    from embedq import tasks

    job = tasks.embed.delay(["a text", "another"], dtype="float16", normalize=True, timings=True)
    vectors = job.get(timeout=30)
    vectors.dense.dtype  # float16
    vectors.timings.num_tokens
    ```
""")

_OPTIONS_FOOT = _text("""
    An instruction, a format, a prompt or a text of an example may have {most} characters.

    ## How the job is sent

    `apply_async` takes the call's arguments, its options, and all that Celery has. These matter here:

    | option of `apply_async` | meaning |
    | --- | --- |
    | `priority` | 0 to 9. Up to {interactive} is interactive, above is bulk; the lists are 0, 3, 6 and 9. A job of more than {rows} texts is bulk whatever its priority. |
    | `expires` | Seconds or a date after which the job is dropped if it has not started. |
    | `block_s` | Seconds to wait where the queue is full, if it has a cap ([Bulk jobs](../how-to/bulk.md#cap-the-queue)). Without it `QueueFull` is raised at once. |
    | `countdown`, `eta` | The job waits in a worker until then, and keeps no other waiting. A worker holds up to `EMBEDQ_MAX_JOBS` such jobs; others wait on the server, and reach a worker two seconds before their time. A revocation holds for either. |
    | `time_limit`, `soft_time_limit` | Seconds from the job's first batch. |
    | `ignore_result` | Store nothing. |
    | `link`, `link_error` | Signatures that the worker sends on when the job ends; see [Chains with your own tasks](../how-to/chains.md). |
    | `task_id` | An id of your own, a text or a UUID, for sending the same job again after an error; see [Retry safely](../how-to/bulk.md#retry-safely). |

    ```python
    job = tasks.embed.apply_async((["a text"],), {{"dimensions": 128}}, priority=9, expires=600)
    len(job.get(timeout=30).dense[0])  # 128
    ```

    What a result holds is in [The blob](blob.md), what a call can raise in [Errors](errors.md).
""")

_METRICS_HEAD = _text("""
    Workers serve the first table themselves, one exporter for each installation serves the second.
    How to switch them on, and what each figure means for an operator, is in [Metrics and health](../operating/metrics.md).
""")

_METRICS_FOOT = _text("""
    A job whose call was wrong, or that was revoked, has the `model` `unknown`. `kind` is `embed`, `rerank` or `part` (of a dataset). `class` is
    `interactive` or `bulk`. `priority` is that of the list: 0, 3, 6 or 9.
""")

_KEYS_HEAD = _text("""
    Everything that embedq keeps on the server. The layout of queues, jobs in flight and results is kombu's and Celery's own,
    so that stock producers, Flower and KEDA read it; embedq's own keys begin with `embedq:`. Where `global_keyprefix` is set, it
    stands before every key.
""")

_KEYS_FOOT = _text("""
    ## Order of writes

    A script on the server first writes where a job is moved to, and then removes it from where it was. A script that
    breaks off half-way leaves a job twice, never nowhere. Results are stored before their job is acknowledged.

    ## What is left when nothing runs

    Announced models, the last measured speeds, dead letters and kombu's bindings stay. Results expire. `unacked`, `unacked_index`
    and `embedq:jobs` are empty unless a worker was killed; the next worker moves those jobs back to their queues after a lease.
    `embedq:delayed` and `embedq:delayed_jobs` are empty unless workers that held `EMBEDQ_MAX_JOBS` jobs with a countdown were killed; the next
    worker takes up those jobs, too.
""")

_COMMANDS_HEAD = _text("""
    `embedq`, or `python -m embedq`. Every command has help of its own: `embedq COMMAND --help`. A command that needs an extra which is not
    installed names it. Commands that talk to a pool use the server of `EMBEDQ_REDIS_URL`, else of `REDIS_URL`, else the one that `embedq workers`
    started for this user.
""")

_COMMANDS_FOOT = _text("""
    [Deploy](../operating/deploy.md#exit-codes) says which of a worker's codes a service manager should start again.

    ## Completion

    ```sh
    eval "$(embedq completion bash)"
    ```

    in `~/.bashrc`; `zsh` and `fish` the same way.

    ## One worker without a launcher

    `python -m embedq.workers.worker` runs one worker on the device that is visible to it, for Kubernetes and service managers.
    It takes all from [settings](settings.md). `celery -A embedq.tasks worker` does the same.
""")

_MAP_HEAD = _text("""
    Imports point one way: `workers → tasks, core`, `tasks → core` (the parts without torch), `core → core`. The launcher
    imports neither jobs, broker nor monitoring; the broker imports no jobs. Tests enforce it, and `python -m tests.layout`
    prints the structure as figures.
""")


def pages() -> dict[Path, str]:
    """Every page that is made or brought up to date here, as it should be."""
    made = {DOCS / name: make() for name, make in PAGES.items()}
    written = {page: page.read_text(encoding="utf-8") for page in sorted(DOCS.rglob("*.md")) if page not in made}
    return made | {page: with_files(text) for page, text in written.items() if "<!-- file: " in text}


def main(arguments: list[str]) -> int:
    """Write the pages that differ from the code, or only name them; returns the exit code."""
    differing = {
        page: text for page, text in pages().items() if not page.is_file() or page.read_text(encoding="utf-8") != text
    }
    is_check = arguments == ["--check"]
    for page, text in differing.items():
        print(f"{page.relative_to(ROOT)}{' is out of date; run `make docs`' if is_check else ''}")
        if not is_check:
            page.parent.mkdir(parents=True, exist_ok=True)
            page.write_text(text, encoding="utf-8")
    return int(is_check and bool(differing))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
