"""`python -m tests.checkpoints_page`: writes docs/reference/checkpoints.md from the forms that the tests try."""

from __future__ import annotations

from pathlib import Path

from tests import oracle, saved_forms

PAGE = Path(__file__).parents[1] / "docs" / "reference" / "checkpoints.md"

_HEAD = """# Checkpoints

<!-- Made by `python -m tests.checkpoints_page`; tests/test_saved_forms.py tries each row. -->

Each row is a tiny checkpoint with random weights, saved by sentence-transformers itself and loaded by both. Texts are
short, long and empty, in eight languages; queries, documents and plain texts, alone and in one batch; pairs for
rerankers. In float32 on a CPU, the largest difference of a component, or of a score in the unit of the largest, is at
most {within:.0e} in each row that is *equal*. A row that is *refused* ends a worker's start with a message that holds
the words shown.

`embedq check DIRECTORY` says the same of a checkpoint of your own, and with `--against sentence-transformers` compares
a few texts' numbers.

Three choices differ from the library's, and are the caller's to make:

- A reranker gives its logit, whatever activation the checkpoint names; `normalize=True` gives the sigmoid.
- A directory without `modules.json` is read as FlagEmbedding reads it: vectors have length 1, and no chat template is
  applied.
- A prompt named `passage` or `corpus` counts as that of documents where there is none named `document`.
"""

_TITLES = {
    "SentenceTransformer": "Embedding",
    "CrossEncoder": "Reranking",
    "SparseEncoder": "Sparse embedding",
    "MultiVectorEncoder": "A vector for each token",
}


def page() -> str:
    """The whole page."""
    parts = [_HEAD.format(within=oracle.WITHIN)]
    forms = saved_forms.FORMS
    served = sum(form.refused is None for form in forms.values())
    parts.append(f"\n{len(forms)} forms: {served} equal, {len(forms) - served} refused.\n")
    for kind, title in _TITLES.items():
        parts.append(f"\n## {title} ({kind})\n\n| form | verdict |\n| --- | --- |\n")
        for name, form in forms.items():
            if form.kind == kind:
                parts.append(f"| {name} | {_verdict(form)} |\n")
    return "".join(parts)


def _verdict(form: saved_forms.Form) -> str:
    given = ", ".join(f"`{name}={value!r}`" for name, value in form.model.items())
    if form.refused is None:
        return "equal" + (f" with {given}" if given else "")
    return f"refused: … {form.refused} …"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(PAGE)
