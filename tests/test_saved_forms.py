"""Every form of checkpoint that sentence-transformers saves: served with the library's numbers, or refused with the reason.

`python -m tests.test_saved_forms` prints docs/reference/checkpoints.md, which the last test holds against this.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import oracle, saved_forms

#: Forms that are refused, and what the refusal says.
REFUSED = {
    "convbert, mean, normalized": "padding changes them",
    "mobilebert, mean, normalized": "padding changes them",
    "nystromformer, mean, normalized": "which fails on texts of up to 126 tokens",
}


@pytest.mark.parametrize("name", saved_forms.FORMS)
def test_a_form_is_served_with_the_librarys_numbers_or_refused(name: str, tmp_path: Path) -> None:
    path = saved_forms.save(name, tmp_path / "model")
    verdict = oracle.verdict(path, saved_forms.FORMS[name].kind)
    print("FORM", name, "->", verdict)
    if name in REFUSED:
        assert isinstance(verdict, str)
        assert REFUSED[name] in verdict
    else:
        assert not isinstance(verdict, str), verdict
        assert verdict <= oracle.WITHIN
