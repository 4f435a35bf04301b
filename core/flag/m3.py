"""FlagEmbedding's class of BGE-M3: dense vectors, lexical weights and ColBERT vectors, and scores of all three.

Returns dicts of arrays, lists and floats, of the same types as FlagEmbedding.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from embedq.core import vectors
from embedq.core.checkpoint.prompts import PLAIN
from embedq.core.errors import InvalidInput
from embedq.core.flag.embedders import MORE, PADDING, WRITTEN, EmbedderFace, Texts
from embedq.core.flag.face import Devices, checked, pairs_of
from embedq.core.options import RerankOptions
from embedq.core.results import Embeddings, Sparse

if TYPE_CHECKING:
    import torch

    from embedq.core.tokenizer import Tokenizer

#: NumPy floats by token id as a string; missing ids read as 0.
Lexical = dict[str, Any]

_OUTPUTS = ("dense", "sparse", "colbert")


class BGEM3FlagModel(EmbedderFace):
    """BGE-M3. Always returns NumPy arrays, whatever `convert_to_numpy` is.

    `score_padding=False` leaves the padding of passages out of ColBERT scores. FlagEmbedding includes it as rows of
    zeros, so a negative best match counts as 0 if the batch has a longer passage.
    """

    family = "m3"
    more: ClassVar[Mapping[str, Any]] = {"convert_to_numpy": True, "score_padding": True, **MORE}
    call_more: ClassVar[Mapping[str, Any]] = {"convert_to_numpy": None, **PADDING}
    poolings = ("cls", "mean", "last_token")
    DEFAULT_POOLING_METHOD = "cls"

    return_dense: bool
    return_sparse: bool
    return_colbert_vecs: bool
    score_padding: bool
    colbert_dim: int

    def __init__(
        self,
        model_name_or_path: str,
        normalize_embeddings: bool = True,
        use_fp16: bool = True,
        use_bf16: bool = False,
        query_instruction_for_retrieval: str | None = None,
        query_instruction_format: str = PLAIN,
        devices: Devices = None,
        pooling_method: str = "cls",
        trust_remote_code: bool = False,
        cache_dir: str | None = None,
        colbert_dim: int = -1,
        batch_size: int = 256,
        query_max_length: int = 512,
        passage_max_length: int = 512,
        return_dense: bool = True,
        return_sparse: bool = False,
        return_colbert_vecs: bool = False,
        truncate_dim: int | None = None,
        **given: Any,
    ) -> None:
        self._load(locals())
        if self.colbert_dim > 0:
            self._check_colbert_dim()

    def encode_queries(
        self,
        queries: Texts,
        batch_size: int | None = None,
        max_length: int | None = None,
        return_dense: bool | None = None,
        return_sparse: bool | None = None,
        return_colbert_vecs: bool | None = None,
        **given: Any,
    ) -> dict[str, Any]:
        """Embed queries with their instruction; see `encode`."""
        self._call(self.encode_queries, given)
        outputs = self._outputs(return_dense, return_sparse, return_colbert_vecs)
        instruction, written = self.query_instruction_for_retrieval, self.query_instruction_format
        length = self._cut(max_length, self.query_max_length)
        return self._results(queries, outputs, "query", instruction, written, length)

    def encode_corpus(
        self,
        corpus: Texts,
        batch_size: int | None = None,
        max_length: int | None = None,
        return_dense: bool | None = None,
        return_sparse: bool | None = None,
        return_colbert_vecs: bool | None = None,
        **given: Any,
    ) -> dict[str, Any]:
        """Embed passages with their instruction; see `encode`."""
        self._call(self.encode_corpus, given)
        outputs = self._outputs(return_dense, return_sparse, return_colbert_vecs)
        instruction, written = self.passage_instruction_for_retrieval, self.passage_instruction_format
        length = self._cut(max_length, self.passage_max_length)
        return self._results(corpus, outputs, "document", instruction, written, length)

    def encode(
        self,
        sentences: Texts,
        batch_size: int | None = None,
        max_length: int | None = None,
        return_dense: bool | None = None,
        return_sparse: bool | None = None,
        return_colbert_vecs: bool | None = None,
        **given: Any,
    ) -> dict[str, Any]:
        """Embed texts as they are: "dense_vecs" (num_texts, dim), "lexical_weights" and "colbert_vecs" one per text.

        Outputs not requested are None; for one string each value is the string's own. Weights are by token id as a
        string, ascending.
        """
        asked = self._call(self.encode, given, **WRITTEN)
        outputs = self._outputs(return_dense, return_sparse, return_colbert_vecs)
        instruction, written = asked["instruction"], asked["instruction_format"]
        length = self._cut(max_length, self.passage_max_length)
        return self._results(sentences, outputs, "document", instruction, written, length)

    def compute_score(
        self,
        sentence_pairs: Any,
        batch_size: int | None = None,
        max_query_length: int | None = None,
        max_passage_length: int | None = None,
        weights_for_different_modes: list[float] | None = None,
        **given: Any,
    ) -> dict[str, Any] | list[Any]:
        """Score (query, passage) pairs in five ways: lists of floats, floats for one pair, [] for no pairs.

        `weights_for_different_modes` are those of dense, sparse and ColBERT. Pairs are scored in slices of `batch_size`
        in the given order, which decides where passages are padded (see `score_padding`).
        """
        checked(self.compute_score, given, {})
        pairs, is_one = pairs_of(sentence_pairs)
        if not pairs:
            return []
        weights = RerankOptions.checked({"weights": weights_for_different_modes}).weights or (1.0, 1.0, 1.0)
        queries = self._side([query for query, _ in pairs], self._cut(max_query_length, self.query_max_length))
        passages = self._side([text for _, text in pairs], self._cut(max_passage_length, self.passage_max_length))
        num_together = (batch_size or self.batch_size) if self.score_padding else 1
        found = _weighted(*_scores(queries, passages, num_together), weights)
        return {name: scores.tolist()[0] if is_one else scores.tolist() for name, scores in found.items()}

    def convert_id_to_token(self, lexical_weights: Lexical | list[Lexical]) -> Lexical | list[Lexical]:
        """Weights by token string, one dict per text, a bare dict for one text.

        Of ids with the same string the last counts.
        """
        texts = [lexical_weights] if isinstance(lexical_weights, dict) else lexical_weights
        read = [{self._tokenizer.decode([int(one)]): weight for one, weight in text.items()} for text in texts]
        return read[0] if len(read) == 1 else read

    def compute_lexical_matching_score(
        self, lexical_weights_1: Lexical | list[Lexical], lexical_weights_2: Lexical | list[Lexical]
    ) -> Any:
        """Sum of products over common tokens: a number for two dicts, (n, m) for two lists."""
        if isinstance(lexical_weights_1, dict) and isinstance(lexical_weights_2, dict):
            return _match(lexical_weights_1, lexical_weights_2)
        if isinstance(lexical_weights_1, list) and isinstance(lexical_weights_2, list):
            return np.array([[_match(first, second) for second in lexical_weights_2] for first in lexical_weights_1])
        raise InvalidInput("lexical weights to compare must be two dicts or two lists of dicts")

    def colbert_score(self, q_reps: np.ndarray, p_reps: np.ndarray) -> torch.Tensor:
        """Score (num_query_tokens, dim) against (num_passage_tokens, dim): a tensor without dimensions."""
        import torch

        return torch.tensor(vectors.max_sim(q_reps, p_reps))

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        from embedq.core.tokenizer import Tokenizer

        return Tokenizer(self.spec)

    def _check_colbert_dim(self) -> None:
        found = self.engine.embed(["a"], outputs=("colbert",)).colbert
        assert found is not None
        if found[0].shape[1] != self.colbert_dim:
            self.close()
            raise InvalidInput(
                f"colbert_dim is {self.colbert_dim}; the checkpoint's layer has {found[0].shape[1]} outputs"
            )

    def _outputs(self, dense: bool | None, sparse: bool | None, colbert: bool | None) -> tuple[str, ...]:
        """The outputs a call requests; what it leaves open, the constructor decides."""
        flags = (
            self.return_dense if dense is None else dense,
            self.return_sparse if sparse is None else sparse,
            self.return_colbert_vecs if colbert is None else colbert,
        )
        return tuple(output for output, is_wanted in zip(_OUTPUTS, flags, strict=True) if is_wanted)

    def _results(
        self,
        texts: Texts,
        outputs: tuple[str, ...],
        input_type: str,
        instruction: str | None,
        instruction_format: str,
        max_length: int | None,
    ) -> dict[str, Any]:
        found = self._embed(texts, input_type, instruction, instruction_format, max_length=max_length, outputs=outputs)
        dtype = np.float16 if self.precision == "float16" else np.float32
        results = {
            "dense_vecs": found.dense,
            "lexical_weights": None if found.sparse is None else [_lexical(one, dtype) for one in found.sparse],
            "colbert_vecs": found.colbert,
        }
        if isinstance(texts, str):
            return {name: None if rows is None else rows[0] for name, rows in results.items()}
        return results

    def _side(self, texts: list[str], max_length: int | None) -> Embeddings:
        """All outputs of one side of each pair; computes each distinct text once."""
        different = list(dict.fromkeys(texts))
        whole: dict[str, Any] = {"max_length": max_length, "outputs": _OUTPUTS, "dimensions": None, "dtype": "float32"}
        found = self._embed(different, "document", None, PLAIN, **whole)
        assert found.dense is not None
        assert found.colbert is not None
        assert found.sparse is not None
        place = {text: index for index, text in enumerate(different)}
        rows = [place[text] for text in texts]
        return Embeddings(found.dense[rows], [found.colbert[row] for row in rows], [found.sparse[row] for row in rows])


def _scores(queries: Embeddings, passages: Embeddings, batch_size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Dense, sparse and ColBERT scores of each pair, (num_pairs,) float32 each.

    In each slice of `batch_size` pairs, passages shorter than the longest are scored as padded.
    """
    assert queries.dense is not None
    assert passages.dense is not None
    dense = np.einsum("id,id->i", queries.dense, passages.dense)
    sparse = [vectors.match_weights(*pair) for pair in zip(queries.sparse or (), passages.sparse or (), strict=True)]
    pairs = list(zip(queries.colbert or (), passages.colbert or (), strict=True))
    colbert: list[float] = []
    for start in range(0, len(pairs), batch_size):
        batch = pairs[start : start + batch_size]
        longest = max(len(passage) for _, passage in batch)
        colbert += [vectors.max_sim(query, passage, len(passage) < longest) for query, passage in batch]
    return dense, np.array(sparse, np.float32), np.array(colbert, np.float32)


def _weighted(
    dense: np.ndarray, sparse: np.ndarray, colbert: np.ndarray, weights: tuple[float, float, float]
) -> dict[str, np.ndarray]:
    """Each kind of score, (num_pairs,), and their two weighted means."""
    sums = weights[0] * dense + weights[1] * sparse
    with np.errstate(invalid="ignore"):  # 0 / 0 if only ColBERT has weight
        both = sums / (weights[0] + weights[1])
    return {
        "colbert": colbert,
        "sparse": sparse,
        "dense": dense,
        "sparse+dense": both,
        "colbert+sparse+dense": (sums + weights[2] * colbert) / sum(weights),
    }


def _lexical(weights: Sparse, dtype: type[np.floating[Any]]) -> Lexical:
    found: Lexical = defaultdict(int)
    found.update(zip(map(str, weights.ids.tolist()), weights.weights.astype(dtype), strict=True))
    return found


def _match(first: Lexical, second: Lexical) -> Any:
    return sum(weight * second[token] for token, weight in first.items() if token in second)
