"""FlagEmbedding's classes as faces of the engine: change an import, keep the program.

    from core.flag import BGEM3FlagModel, FlagReranker

Constructors, calls, defaults, types and numbers are those of FlagEmbedding 1.4.2. What programs depend on without
knowing (weights rounded on a CPU, padding that takes part in ColBERT scores, heads that follow a request) is kept
behind keywords of that name: `round_weights_on_cpu`, `score_padding`, `heads_by`. Different on purpose: an unknown
keyword is an error, a layer without a head as well, no input gives no output, of several devices the first is used,
and no code of a checkpoint is run.

Everything a face can be asked for can be asked of `core.load(…).embed`, `.score` and `.rerank` as well.
"""

from embedq.core.flag.auto import EmbedderModelClass, FlagAutoModel, FlagAutoReranker, RerankerModelClass
from embedq.core.flag.embedders import FlagICLModel, FlagLLMModel, FlagModel, FlagPseudoMoEModel
from embedq.core.flag.m3 import BGEM3FlagModel
from embedq.core.flag.rerankers import (
    FlagLLMReranker,
    FlagReranker,
    LayerWiseFlagLLMReranker,
    LightWeightFlagLLMReranker,
)

__all__ = [
    "BGEM3FlagModel",
    "EmbedderModelClass",
    "FlagAutoModel",
    "FlagAutoReranker",
    "FlagICLModel",
    "FlagLLMModel",
    "FlagLLMReranker",
    "FlagModel",
    "FlagPseudoMoEModel",
    "FlagReranker",
    "LayerWiseFlagLLMReranker",
    "LightWeightFlagLLMReranker",
    "RerankerModelClass",
]
