"""FlagEmbedding's classes on top of the engine: change one import and keep the program.

    from embedq.core.flag import BGEM3FlagModel, FlagReranker

Constructors, calls, defaults, types and numbers are those of FlagEmbedding 1.4.2. Three of its behaviours change
numbers unnoticed; they are the default here, too, and a keyword turns each off: weights rounded on a CPU
(`round_weights_on_cpu`), padding that takes part in ColBERT scores (`score_padding`), heads in the order of the request
(`heads_by`). Different on purpose: an unknown keyword or a layer without a head is an error, no input returns no
output, of several devices the first is used, and no code of a checkpoint is run.

`core.load(…).embed`, `.score` and `.rerank` offer everything these classes do.
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
