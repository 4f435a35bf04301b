"""The comparison with the peers runs where none is installed, and counts lengths and FLOPs as it says."""

from __future__ import annotations

import json
import math
import signal
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.bench.peers import flops, models, systems, texts
from tests.bench.peers.comparing import Case, Compared, Row
from tests.bench.peers.models import Model
from tests.bench.peers.process import CannotMeasure
from tests.bench.peers.table import best_peer, figures
from tests.running import ROOT, Running

#: What a busy machine may need for a quick run; a quiet one needs a fifth of it.
TIMEOUT_S = 110

CONFIG = {"hidden_size": 8, "intermediate_size": 32, "num_hidden_layers": 3}


def test_ours_is_measured_and_a_peer_that_is_not_installed_is_told(tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    command = [sys.executable, "-m", "tests.bench", "peers", "--quick", "--kinds", "short", "--texts", "16"]
    command += ["--peers", "st-default,st-float32,openvino", "--folder", str(tmp_path / "peers"), "--json", str(file)]
    with Running(command) as running:
        assert running.wait(TIMEOUT_S) == 0, running.output
    told = json.loads(file.read_text())
    (case,) = told["cases"]
    rows = {(row["system"], row["way"]): row for row in case["rows"]}
    assert "not installed" in rows["openvino", ""]["reason"]
    assert "openvino: not available: not installed; run: make bench-peers" in running.output
    for system, way in (("st-default", ""), ("st-float32", ""), ("embedq", systems.LARGE), ("embedq", systems.SMALL)):
        row = rows[system, way]
        assert row["lowest_cosine"] >= 0.999
        (seconds,), (share,) = row["seconds"], row["shares"]
        limit = case["limits"][0][row["about"]["precision"]]
        assert share == pytest.approx(case["gflops"] / seconds / limit)
        assert 2**27 < row["peak_bytes"] < 2**33  # torch and a small model
    assert [rows[system, ""]["about"]["batch_size"] for system in ("st-default", "st-float32")] == ["its own", 8]
    measured = {figure["key"]: figure["value"] for figure in told["figures"]}
    names = ("embedq_by_256", "st-default", "st-float32")
    ours, *theirs = (measured[f"minilm_embed_short_{name}_texts_per_s"] for name in names)
    assert measured["minilm_embed_short_embedq_by_256_ratio"] == pytest.approx(ours / max(theirs))


def test_what_was_compared_before_an_interruption_is_kept(tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    command = [sys.executable, "-m", "tests.bench", "peers", "--quick", "--kinds", "short,mixed", "--peers", "none"]
    with Running([*command, "--folder", str(tmp_path / "peers"), "--json", str(file)]) as running:
        running.wait_for("minilm_embed_mixed, round 1")
        running.process.send_signal(signal.SIGINT)
        assert running.wait(TIMEOUT_S) == 130, running.output
    assert "interrupted; what was compared until then is kept" in running.output
    assert [case["key"] for case in json.loads(file.read_text())["cases"]] == ["minilm_embed_short"]


def test_flops_are_those_of_the_products_of_matrices() -> None:
    width, inner, layers = 8, 32, 3
    num_tokens = 5
    linear = 4 * (2 * num_tokens * width * width) + 2 * (2 * num_tokens * width * inner)
    attention = 2 * (2 * num_tokens * num_tokens * width)  # scores, and their sum over the values
    assert flops.of_sequences(CONFIG, [num_tokens]) == layers * (linear + attention)
    assert flops.of_sequences(CONFIG, [num_tokens] * 4) == 4 * layers * (linear + attention)
    head = 2 * width * width + 2 * width
    assert flops.of_sequences(CONFIG, [num_tokens], is_scored=True) == layers * (linear + attention) + head


def test_texts_have_the_lengths_that_their_kind_states(minilm: Path) -> None:
    mixed, short = texts.to_embed("mixed", 300, minilm), texts.to_embed("short", 32, minilm)
    long = texts.to_embed("long", 4, minilm)
    assert len(set(mixed.texts)) == mixed.num_sequences == 300
    assert mixed.lengths.mean() == pytest.approx(145, abs=2)
    assert mixed.lengths.min() == 20
    assert mixed.lengths.max() == 256
    quartiles = np.percentile(mixed.lengths, [25, 50, 75])
    assert quartiles == pytest.approx([82, 145, 207], abs=3)
    assert short.lengths.max() <= 16
    assert long.lengths.min() >= 512
    assert long.lengths.max() <= 2_048
    assert texts.to_embed("mixed", 300, minilm).texts == mixed.texts
    assert "145 tokens" in texts.distribution(np.array([40, 145, 250]))


def test_pairs_are_counted_with_their_query(minilm: Path) -> None:
    alone, pairs = texts.to_embed("mixed", 260, minilm), texts.to_rerank("mixed", 260, minilm)
    assert [len(passages) for _, passages in pairs.calls] == [256, 4]
    assert [passage for _, passages in pairs.calls for passage in passages] == alone.texts
    beside = pairs.lengths - alone.lengths  # a query of 16 tokens at most, without its own [CLS]
    assert (beside >= 2).all()
    assert (beside <= 15).all()
    assert pairs.first(10).num_sequences == len(pairs.first(10).calls[0][1]) == 10


def test_cosines_are_those_of_each_vector_and_of_each_calls_scores() -> None:
    work = texts.Work([], [("q", ["a", "b"]), ("r", ["c", "d"])], np.array([1, 1, 1, 1]))
    vectors = np.array([[1.0, 0], [0, 2]])
    assert systems.cosines(vectors, np.array([[3.0, 0], [1, 1]]), work) == pytest.approx([1, math.sqrt(0.5)])
    scores, expected = np.array([1.0, 0, 0, 2]), np.array([3.0, 0, 1, 1])
    assert systems.cosines(scores, expected, work) == pytest.approx([1, math.sqrt(0.5)])


def test_ours_is_held_against_the_fastest_peer_in_floating_point_and_int8_against_the_fastest_bfloat16(
    tmp_path: Path,
) -> None:
    model = Model("minilm", "embed", tmp_path, "mean", 256)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    case = Case(model, "mixed", texts.Work(["a"], [], np.array([3])))
    rates = {"st-default": 8.0, "st-float32": 10.0, "openvino": 40.0, "onnx-int8": 90.0, "embedq": 60.0}
    rates["embedq-int8"] = 96.0
    precisions = {"openvino": "bfloat16", "embedq": "bfloat16", "onnx-int8": "int8", "embedq-int8": "int8"}
    rows = [
        Row(name, systems.LARGE if "embedq" in name else "", {"precision": precisions.get(name, "float32")})
        for name in rates
    ]
    for row in rows:
        row.texts_per_s = [rates[row.system] - 5, rates[row.system], rates[row.system] + 50]
    compared = Compared(case, rows, [{"float32": 100.0}])
    best = best_peer(compared)
    assert best
    assert best.system == "openvino"
    told = {figure.key: figure for figure in figures(compared)}
    ratio = told["minilm_embed_mixed_embedq_by_256_ratio"]
    assert (ratio.value, ratio.target, ratio.is_met) == (1.5, 1.4, True)
    (as_it_comes, at_its_best) = (
        told[f"minilm_embed_mixed_embedq_by_256_to_st-{name}"] for name in ("default", "float32")
    )
    assert (as_it_comes.value, as_it_comes.target) == (7.5, 4.0)
    assert (at_its_best.value, at_its_best.target) == (6.0, None)
    int8 = told["minilm_embed_mixed_embedq-int8_by_256_to_bfloat16"]  # ours, which is faster than any peer's
    assert (int8.value, int8.target, int8.is_met) == (1.6, 1.8, False)
    assert "minilm_embed_mixed_embedq_by_256_to_bfloat16" not in told


def test_a_peer_whose_installation_failed_says_why(tmp_path: Path) -> None:
    (tmp_path / "onnx").mkdir()
    (tmp_path / "onnx" / "failed").write_text("first line\nERROR: no such version\n")
    with pytest.raises(CannotMeasure, match="could not be installed: ERROR: no such version"):
        systems.interpreter("onnx", tmp_path)
    with pytest.raises(CannotMeasure, match="not installed; run: make bench-peers"):
        systems.interpreter("infinity", tmp_path)


def test_a_program_that_ends_says_its_last_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.bench.peers import process

    (tmp_path / "ending.py").write_text("import sys\nsys.exit('it could not begin')\n")
    monkeypatch.setattr(process, "PROGRAMS", tmp_path)
    program = process.Program(Path(sys.executable), "ending")
    with pytest.raises(CannotMeasure, match="it could not begin"):
        program.ask({"action": "load"})
    program.close()


def test_a_peer_as_it_comes_is_asked_without_a_batch_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Others are asked with each size, then with the best."""
    from tests.bench.peers import process

    (tmp_path / "noting.py").write_text(
        "import json, sys\n"
        "for line in sys.stdin:\n"
        "    asked = json.loads(line)\n"
        "    size = asked['batch_size']\n"
        "    answer = {'about': {}} if asked['action'] == 'load' else {'seconds': 1.0 if size is None else 1 / size}\n"
        "    print(json.dumps(answer), flush=True)\n"
    )
    monkeypatch.setattr(process, "PROGRAMS", tmp_path)
    model, work = Model("minilm", "embed", tmp_path, "mean", 256), texts.Work(["a"] * 64, [], np.ones(64))
    for sizes, chosen, seconds in (((), "its own", 1.0), ((8, 32), 32, 1 / 32)):
        peer = systems.Peer("peer", "sentence-transformers", "noting", {}, tmp_path, sizes=sizes)
        assert peer.start(model, work) == {"batch_size": chosen}
        assert peer.measure("", work, None) == seconds
        peer.stop()
    assert not any(peer.sizes for peer in systems.all_peers(1).values() if peer.name in systems.AS_THEY_COME)


def test_every_peers_environment_has_its_requirements_and_its_rule() -> None:
    wanted = {peer.environment for peer in systems.all_peers(1, models.PEERS).values()}
    files = {file.stem for file in (Path(systems.__file__).parent / "requirements").glob("*.txt")}
    assert files == wanted
    rule = next(line for line in (ROOT / "Makefile").read_text().splitlines() if line.startswith("PEERS "))
    assert set(rule.partition(":=")[2].split()) == wanted
    programs = {peer.program for peer in systems.all_peers(1, models.PEERS).values()}
    assert all((Path(systems.__file__).parent / "programs" / f"{name}.py").is_file() for name in programs)
