"""What was compared -> a table for people, and figures with what was promised."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from tests.bench import report
from tests.bench.peers.comparing import Compared, Row, describe
from tests.bench.peers.systems import AS_THEY_COME, LARGE, SMALL
from tests.bench.report import Figure, shown

_COLUMNS = ["system", "precision", "batch", "texts/s", "from–to", "to best peer", "lowest cosine", "of limit", "MiB"]

#: What was promised of ours, by model and kind: to the best peer; and the share of the limit.
_RATIOS = {("minilm", "mixed"): 1.4, ("bge-base", "mixed"): 1.25}
_SHARES = {("minilm", "mixed"): 0.75, ("bge-base", "mixed"): 0.85}

#: Of short texts, any model; to float32 as people run it; one-text jobs to one-text requests.
_SHORT_RATIO, _FLOAT32_RATIO, _ONE_TEXT_RATIO = 3.0, 4.0, 5.0

#: Of ours in int8 to the best bfloat16, ours or a peer's; agreement of all others with float32.
_INT8_RATIO, _COSINE = 1.8, 0.999


def best_peer(compared: Compared) -> Row | None:
    """The fastest that computes in a type of floating point; int8 is another promise."""
    return _fastest(row for row in compared.rows if not is_ours(row) and row.precision != "int8")


def _fastest(rows: Iterable[Row]) -> Row | None:
    return max((row for row in rows if row.rate), key=lambda row: row.rate or 0.0, default=None)


def is_ours(row: Row) -> bool:
    return row.system.startswith("embedq")


def show(compared: Compared) -> None:
    """Print one comparison, and below it what was promised of it."""
    best = best_peer(compared)
    limits = ", ".join(
        f"{name} {shown(value)}" for name in ("bfloat16", "float32", "int8") if (value := compared.limit(name))
    )
    title = f"{describe(compared.case)}\nproducts of matrices, GFLOP/s: {limits}"
    report.show_rows(title, _COLUMNS, [_cells(row, best) for row in compared.rows if not row.reason])
    for row in compared.rows:
        if row.reason:
            print(f"{row.name}: not available: {row.reason}")
    if promised := [figure for figure in figures(compared) if figure.target is not None]:
        report.show("promised", promised)
    print()


def figures(compared: Compared) -> list[Figure]:
    """All of one comparison, for the JSON and the promises."""
    key, best = compared.case.key, best_peer(compared)
    told = []
    for row in compared.rows:
        name = f"{key}_{row.system}{'_' + row.way.replace(' ', '_') if row.way else ''}"
        told += [
            Figure(f"{name}_texts_per_s", row.name, row.rate, "texts/s"),
            Figure(
                f"{name}_share", f"{row.name}: share of the matrix limit", row.share, "", _share_target(compared, row)
            ),
            Figure(f"{name}_peak_mib", f"{row.name}: most memory", _mib(row), "MiB"),
            Figure(f"{name}_cosine", f"{row.name}: lowest cosine", row.lowest_cosine, "", _cosine_target(row)),
        ]
        if is_ours(row):
            told += _ratios(compared, name, row, best)
    return told


def rows(compared: Compared) -> dict[str, Any]:
    """Everything measured, round by round, for the JSON."""
    return {
        "case": describe(compared.case),
        "key": compared.case.key,
        "gflops": compared.case.flops / 1e9,
        "limits": compared.limits,
        "rows": [asdict(row) for row in compared.rows],
    }


def _cells(row: Row, best: Row | None) -> list[str]:
    ratio = f"{row.rate / best.rate:.2f}" if best and row.rate and best.rate else "-"
    cosine = "-" if row.lowest_cosine is None else f"{row.lowest_cosine:.5f}"
    share = "-" if row.share is None else f"{row.share:.0%}"
    size = str(row.about.get("batch_size", "-"))
    spread = f"{shown(min(row.texts_per_s))}–{shown(max(row.texts_per_s))}" if row.texts_per_s else "-"
    return [row.name, row.precision, size, shown(row.rate), spread, ratio, cosine, share, shown(_mib(row))]


def _mib(row: Row) -> float | None:
    return None if row.peak_bytes is None else row.peak_bytes / 2**20


def _ratios(compared: Compared, name: str, row: Row, best: Row | None) -> list[Figure]:
    """Ours to the best peer, to float32, int8 to bfloat16, and job by job to requests one by one."""
    model, kind = compared.case.model.name, compared.case.kind
    told = []
    if best:
        target = None if row.precision == "int8" else _SHORT_RATIO if kind == "short" else _RATIOS.get((model, kind))
        told.append(_ratio(f"{name}_ratio", row, best, "the best peer, ", target if row.way == LARGE else None))
    half = _fastest(each for each in compared.rows if each.precision == "bfloat16")
    if half and row.way == LARGE and row.precision == "int8":
        told.append(_ratio(f"{name}_to_bfloat16", row, half, "the best bfloat16, ", _INT8_RATIO))
    for peer in compared.rows:
        if row.way == LARGE and not peer.way and peer.precision == "float32":
            target = _FLOAT32_RATIO if peer.system in AS_THEY_COME else None
            told.append(_ratio(f"{name}_to_{peer.system}", row, peer, "", target))
        if row.way == peer.way == SMALL and not is_ours(peer):
            target = _ONE_TEXT_RATIO if kind == "short" else None
            told.append(_ratio(f"{name}_to_{peer.system}", row, peer, "", target))
    return told


def _ratio(key: str, row: Row, peer: Row, which: str, target: float | None) -> Figure:
    value = row.rate / peer.rate if row.rate and peer.rate else None
    return Figure(key, f"{row.name}, to {which}{peer.name}", value, "×", target)


def _share_target(compared: Compared, row: Row) -> float | None:
    is_promised = is_ours(row) and row.way == LARGE and row.precision == "bfloat16"
    return _SHARES.get((compared.case.model.name, compared.case.kind)) if is_promised else None


def _cosine_target(row: Row) -> float | None:
    return _COSINE if is_ours(row) and row.precision != "int8" else None
