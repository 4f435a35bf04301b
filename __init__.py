"""embedq: embedding and reranking through a durable queue.

    from embedq import tasks          # what applications import: tasks.embed.delay(texts)
    import embedq.core                # the model core, for programs without a queue
    import embedq.core.flag           # FlagEmbedding's classes on the same core

The command is `embedq`, or `python -m embedq`.
"""

__version__ = "0.2.0"
