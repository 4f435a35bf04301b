"""Settings: where they come from, which wins, and what an operator is told about a wrong one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from embedq.core.errors import InvalidSettings
from embedq.core.settings import ModelSettings, Settings, config_file, models_text, read_settings

#: Text of a variable EMBEDQ_<NAME> -> value of the setting.
VARIABLES: dict[str, tuple[str, Any]] = {
    "models": ("a=/models/a", {"a": ModelSettings(path="/models/a")}),
    "default_embed": ("none", "none"),
    "default_rerank": ("none", "none"),
    "device": ("cuda:1", "cuda:1"),
    "max_batch_tokens": ("4096", 4096),
    "max_batch_sequences": ("64", 64),
    "max_waiting_tokens": ("5000", 5000),
    "max_batch_s": ("0.25", 0.25),
    "max_bulk_wait_s": ("2.5", 2.5),
    "cpu_streams": ("2", 2),
    "encode_threads": ("3", 3),
    "hang_timeout_s": ("60", 60.0),
    "load_timeout_s": ("60", 60.0),
    "window_batches": ("4", 4),
    "max_jobs": ("8", 8),
    "drain_timeout_s": ("10", 10.0),
    "metrics_port": ("9810", 9810),
    "metrics_host": ("::1", "::1"),
    "traces": ("1", True),
    "replace_revision": ("1", True),
    "data_roots": ("/data, s3://corpus/docs", ("/data", "s3://corpus/docs")),
}


@pytest.fixture(autouse=True)
def empty_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Start in a directory without a settings file."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_file(content: str, name: str = "embedq.toml") -> Path:
    """A settings file in the working directory."""
    path = Path(name)
    path.write_text(content, encoding="utf-8")
    return path


def refusal(**overrides: Any) -> str:
    """The message that an operator reads if these settings are wrong."""
    with pytest.raises(InvalidSettings) as caught:
        read_settings(**overrides)
    return str(caught.value)


def test_this_file_knows_every_setting() -> None:
    assert {*VARIABLES, "wire"} == set(Settings.model_fields)


@pytest.mark.parametrize("name", VARIABLES)
def test_every_setting_has_its_variable(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    text, value = VARIABLES[name]
    assert getattr(read_settings(), name) != value
    monkeypatch.setenv(f"EMBEDQ_{name.upper()}", text)
    assert getattr(read_settings(), name) == value


def test_a_file_in_the_working_directory_is_read() -> None:
    write_file(
        """
        max_jobs = 3
        default_embed = "b"
        [models]
        a = "/models/a"
        [models.b]
        path = "owner/b"
        revision = "abc"
        precision = "float32"
        max_length = 128
        pooling = "cls"
        [wire]
        redis_url = "redis://localhost"
        """
    )
    settings = read_settings()
    assert (settings.max_jobs, settings.default_embed) == (3, "b")
    assert settings.models == {
        "a": ModelSettings(path="/models/a"),
        "b": ModelSettings(path="owner/b", revision="abc", precision="float32", max_length=128, pooling="cls"),
    }


def test_an_argument_wins_over_a_variable_and_a_variable_over_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    write_file("max_jobs = 3\nmax_bulk_wait_s = 3\nmax_batch_sequences = 3")
    monkeypatch.setenv("EMBEDQ_MAX_JOBS", "4")
    monkeypatch.setenv("EMBEDQ_MAX_BULK_WAIT_S", "4")
    settings = read_settings(max_jobs=5)
    assert (settings.max_jobs, settings.max_bulk_wait_s, settings.max_batch_sequences) == (5, 4.0, 3)


def test_an_argument_of_none_leaves_the_setting_to_the_other_sources() -> None:
    write_file("max_jobs = 3")
    assert read_settings(max_jobs=None).max_jobs == 3


def test_models_of_a_call_replace_those_of_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    write_file('[models]\na = "/models/a"')
    assert list(read_settings(models={"mine": {"path": "/m"}}).models) == ["mine"]
    monkeypatch.setenv("EMBEDQ_MODELS", "b=/models/b")
    assert list(read_settings().models) == ["b"]
    assert list(read_settings(models={"mine": "/m"}).models) == ["mine"]


def test_embedq_config_names_another_file(monkeypatch: pytest.MonkeyPatch) -> None:
    write_file("max_jobs = 3")
    monkeypatch.setenv("EMBEDQ_CONFIG", str(write_file("max_jobs = 9", "other.toml")))
    assert config_file() == Path("other.toml")
    assert read_settings().max_jobs == 9


@pytest.mark.parametrize("name", ["gone.toml", "."])
def test_a_file_that_embedq_config_names_must_exist(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMBEDQ_CONFIG", name)
    message = refusal()
    assert "EMBEDQ_CONFIG" in message
    assert repr(name) in message


@pytest.mark.parametrize(
    "models",
    [
        "a=/models/a, b=owner/b",
        json.dumps({"a": "/models/a", "b": {"path": "owner/b"}}),
        {"a": "/models/a", "b": {"path": "owner/b"}},
        " a = /models/a ,, b=owner/b,",
    ],
)
def test_models_are_written_as_pairs_as_json_or_as_a_mapping(models: Any) -> None:
    assert read_settings(models=models).models == {
        "a": ModelSettings(path="/models/a"),
        "b": ModelSettings(path="owner/b"),
    }


@pytest.mark.parametrize("name", ["default_embed", "default_rerank"])
def test_a_default_is_one_of_the_models_or_none(name: str) -> None:
    assert getattr(read_settings(models="a=/m,b=/m", **{name: "b"}), name) == "b"
    assert getattr(read_settings(models="a=/m", **{name: "none"}), name) == "none"
    assert getattr(read_settings(models="a=/m", **{name: ""}), name) is None
    message = refusal(models="a=/m,b=/m", **{name: "c"})
    assert f"{name} (EMBEDQ_{name.upper()})" in message
    assert "'c'" in message
    assert "a, b" in message


@pytest.mark.parametrize("alias", ["A", "a b", "-a", "", "a" * 64, "ä", "a/b", "a\n"])
def test_an_alias_that_could_not_be_part_of_a_queue_name_is_refused(alias: str) -> None:
    message = refusal(models={alias: "/m"})
    assert "EMBEDQ_MODELS" in message
    assert repr(alias) in message
    assert "a-z 0-9" in message


@pytest.mark.parametrize("models", ["/models/a", "a=", "a=/m,/n", "{bad json", "[]", 3, {"a": 3}, {"a": {}}])
def test_models_in_no_known_notation_are_refused(models: Any) -> None:
    assert "EMBEDQ_MODELS" in refusal(models=models)


def test_an_alias_given_twice_is_refused() -> None:
    assert "'a'" in refusal(models="a=/one,a=/two")


@pytest.mark.parametrize(
    ("name", "value", "limit"),
    [
        ("max_jobs", 0, "1"),
        ("max_jobs", "lots", "integer"),
        ("max_jobs", 1.5, "integer"),
        ("max_batch_tokens", 15, "16"),
        ("max_batch_sequences", 0, "1"),
        ("max_waiting_tokens", 999, "1000"),
        ("max_batch_s", 0, "0"),
        ("max_bulk_wait_s", 0, "0"),
        ("max_bulk_wait_s", "soon", "number"),
        ("cpu_streams", 65, "64"),
        ("encode_threads", 257, "256"),
        ("hang_timeout_s", 0, "0"),
        ("window_batches", 1, "2"),
        ("drain_timeout_s", -1, "0"),
    ],
)
def test_a_wrong_setting_is_named_with_its_variable_its_limit_and_its_value(name: str, value: Any, limit: str) -> None:
    message = refusal(**{name: value})
    assert f"{name} (EMBEDQ_{name.upper()})" in message
    assert limit in message
    assert repr(value) in message


@pytest.mark.parametrize(
    ("field", "value"),
    [("precision", "fp16"), ("sha256", "AB"), ("sha256", "g" * 64), ("max_length", 2), ("pooling", "max")],
)
def test_a_wrong_field_of_a_model_is_named_with_its_alias(field: str, value: Any) -> None:
    message = refusal(models={"a": {"path": "/m", field: value}})
    assert f"models.a.{field} (EMBEDQ_MODELS)" in message
    assert repr(value)[:20] in message


def test_every_wrong_setting_is_named_at_once() -> None:
    message = refusal(max_jobs=0, max_bulk_wait_s=0)
    assert "EMBEDQ_MAX_JOBS" in message
    assert "EMBEDQ_MAX_BULK_WAIT_S" in message


def test_an_unknown_setting_is_refused_and_the_known_ones_are_listed() -> None:
    write_file("max_job = 3")
    message = refusal()
    assert message.startswith("max_job:")
    assert all(name in message for name in Settings.model_fields)


@pytest.mark.parametrize("content", ["max_jobs = = 3", "[models", b"\xff\xfe".decode("latin-1")])
def test_a_file_that_is_not_toml_is_named(content: str) -> None:
    Path("embedq.toml").write_bytes(content.encode("latin-1"))
    assert "embedq.toml" in refusal()


@pytest.mark.parametrize(
    "content",
    [
        'redis_url = "redis://:PASSWORD@host"',
        'wire = "redis://:PASSWORD@host"',
        'wire = ["redis://:PASSWORD@host"]',
        'max_jobs = 0\n[wire]\nredis_url = "redis://:PASSWORD@host"',
        'max_jobs = = "redis://:PASSWORD@host"',
        '[models.a]\npath = "/m"\nurl = "redis://:PASSWORD@host"',
    ],
)
def test_a_password_written_in_the_wrong_place_is_not_repeated(content: str) -> None:
    write_file(content)
    assert "PASSWORD" not in refusal()


def test_what_is_logged_of_the_settings_holds_nothing_of_the_wire_table() -> None:
    write_file('[wire]\nredis_url = "redis://:PASSWORD@host"')
    assert "PASSWORD" not in read_settings().model_dump_json()


def test_settings_do_not_change_after_they_were_read() -> None:
    settings = read_settings()
    with pytest.raises(ValueError, match="frozen"):
        settings.max_jobs = 3


@pytest.mark.parametrize(
    "name", ["max_batch_s", "max_bulk_wait_s", "hang_timeout_s", "load_timeout_s", "drain_timeout_s"]
)
@pytest.mark.parametrize("value", ["inf", "nan", "1e300"])
def test_a_time_that_no_thread_can_wait_for_is_refused(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"EMBEDQ_{name.upper()}", value)
    assert f"{name} (EMBEDQ_{name.upper()})" in refusal()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("path", " "),
        ("query_format", "{}"),
        ("passage_format", "{}{}{}"),
        ("examples_format", "{}{}"),
    ],
)
def test_a_field_of_a_model_that_would_fail_its_first_job_is_refused(field: str, value: str) -> None:
    assert f"models.a.{field}" in refusal(models={"a": {"path": "/m"} | {field: value}})


def test_models_of_the_command_line_have_paths_with_commas() -> None:
    text = models_text(["a=/models/one, two", " b = /m=n "])
    assert read_settings(models=text).models == {
        "a": ModelSettings(path="/models/one, two"),
        "b": ModelSettings(path="/m=n"),
    }


@pytest.mark.parametrize("options", [["/models/a"], ["a="], ["a=/m", "a=/n"]])
def test_a_model_of_the_command_line_in_another_form_is_refused(options: list[str]) -> None:
    with pytest.raises(InvalidSettings, match="--model: "):
        models_text(options)


def test_a_comma_in_a_path_of_the_variable_is_refused_with_the_form_for_it() -> None:
    assert 'write JSON: {"alias": "path"}' in refusal(models="a=/one,two")
