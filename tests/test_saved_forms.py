"""Every form of checkpoint that sentence-transformers saves: served with the library's numbers, or refused with the reason."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import checkpoints_page, oracle, saved_forms


@pytest.mark.parametrize("name", saved_forms.FORMS)
def test_a_form_is_served_with_the_librarys_numbers_or_refused(name: str, tmp_path: Path) -> None:
    form = saved_forms.FORMS[name]
    path = saved_forms.save(name, tmp_path / "model")
    verdict = oracle.verdict(path, form.kind, **form.model)
    print("FORM", name, "->", verdict)
    if form.refused is not None:
        assert isinstance(verdict, str), "it is served by now"
        assert form.refused in verdict
        assert "trust_remote_code" not in verdict
    else:
        assert not isinstance(verdict, str), verdict
        assert verdict <= oracle.WITHIN


def test_the_page_is_that_of_these_forms() -> None:
    assert checkpoints_page.PAGE.read_text(encoding="utf-8") == checkpoints_page.page(), (
        "run python -m tests.checkpoints_page"
    )
