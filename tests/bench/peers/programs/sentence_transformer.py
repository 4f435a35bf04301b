"""sentence-transformers with any of its backends: PyTorch, ONNX Runtime, OpenVINO.

Exported models are kept beside the model's directory and found there by the next run.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from answering import pairs_of, serve, size_of
from sentence_transformers import CrossEncoder, SentenceTransformer, __version__

#: The file that dynamic quantisation writes for a CPU of this kind; ONNX Runtime's only int8 way without examples.
_INT8_FILE, _INT8_FOR = "model_qint8_avx512_vnni.onnx", "avx512_vnni"


class Transformer:
    """`precision` is torch's name of a type; for ONNX "float32" or "int8"; OpenVINO chooses by itself."""

    def load(self, model: str, task: str, backend: str, precision: str, max_length: int, **_: Any) -> dict[str, Any]:
        self._model: Any
        self._class: Any = SentenceTransformer if task == "embed" else CrossEncoder
        if backend == "torch":
            self._model = self._class(model, device="cpu", model_kwargs={_dtype_word(): getattr(torch, precision)})
        else:
            self._model = self._open(_exported(self._class, model, backend), backend, precision)
        limit = "max_seq_length" if task == "embed" else "max_length"
        setattr(self._model, limit, max_length)
        about = {"version": __version__, "threads": torch.get_num_threads()}
        return about | (_of_openvino(self._model) if backend == "openvino" else {"precision": precision})

    def embed(self, texts: list[str], batch_size: int | None, **_: Any) -> np.ndarray:
        return np.asarray(self._model.encode(texts, show_progress_bar=False, **size_of(batch_size)))

    def rerank(self, calls: list[tuple[str, list[str]]], batch_size: int | None, **_: Any) -> np.ndarray:
        words: dict[str, Any] = {
            "activation_fn": torch.nn.Identity(),
            "show_progress_bar": False,
            **size_of(batch_size),
        }
        return np.asarray(self._model.predict(pairs_of(calls), **words))

    def _open(self, exported: Path, backend: str, precision: str) -> Any:
        if backend == "openvino":
            return self._class(str(exported), device="cpu", backend=backend)
        file = _INT8_FILE if precision == "int8" else "model.onnx"
        if not (exported / "onnx" / file).is_file():
            from sentence_transformers import export_dynamic_quantized_onnx_model

            export_dynamic_quantized_onnx_model(self._open(exported, backend, "float32"), _INT8_FOR, str(exported))
        words = {"provider": "CPUExecutionProvider", "file_name": f"onnx/{file}"}
        return self._class(str(exported), device="cpu", backend=backend, model_kwargs=words)


def _exported(of: Any, model: str, backend: str) -> Path:
    """The model in the backend's format, made where it is missing."""
    done = Path(f"{model}.{backend}")
    if not done.is_dir():
        making = Path(f"{done}.{os.getpid()}")
        try:
            of(model, device="cpu", backend=backend, model_kwargs={"export": True}).save_pretrained(str(making))
            making.rename(done)
        finally:
            shutil.rmtree(making, ignore_errors=True)
    return done


def _of_openvino(model: Any) -> dict[str, Any]:
    """What it chose; told by the compiled model, which is made at the first call."""
    inner = model[0] if isinstance(model, SentenceTransformer) else model
    network: Any = next(
        found for name in ("auto_model", "model") if hasattr(found := getattr(inner, name, None), "compile")
    )
    network.compile()
    asked = getattr(network, "compiled_model", None) or network.request
    if hasattr(asked, "get_compiled_model"):
        asked = asked.get_compiled_model()
    chosen = asked.get_property("INFERENCE_PRECISION_HINT")
    name = chosen.get_type_name() if hasattr(chosen, "get_type_name") else str(chosen)
    return {
        "precision": {"bf16": "bfloat16", "f32": "float32", "f16": "float16"}.get(name, name),
        "threads": int(asked.get_property("INFERENCE_NUM_THREADS")),
        "streams": int(asked.get_property("NUM_STREAMS")),
    }


def _dtype_word() -> str:
    import transformers

    return "torch_dtype" if transformers.__version__.startswith("4.") else "dtype"


if __name__ == "__main__":
    serve(Transformer())
