"""Small language models from GGUF files in JAX, with the weights still quantised.

    model = orcd_jax.load("model.gguf")
    print(model.generate("Once upon a time")[0].text)

Names are imported when they are first used, so that the command line can set up JAX before it is loaded.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from orcd_jax.cache import KVCache, init_cache
    from orcd_jax.config import ModelConfig
    from orcd_jax.decoding import forward, generate_tokens
    from orcd_jax.errors import (
        CapacityError,
        DownloadError,
        GGUFError,
        NonFiniteError,
        OrcdJaxError,
        RequestError,
        TemplateError,
    )
    from orcd_jax.language_model import Completion, LanguageModel, Score, load
    from orcd_jax.sampling import Sampling
    from orcd_jax.tokenizer import Tokenizer

_MODULES = {
    "cache": ("KVCache", "init_cache"),
    "config": ("ModelConfig",),
    "decoding": ("forward", "generate_tokens"),
    "errors": (
        "CapacityError", "DownloadError", "GGUFError", "NonFiniteError", "OrcdJaxError", "RequestError",
        "TemplateError",
    ),
    "language_model": ("Completion", "LanguageModel", "Score", "load"),
    "sampling": ("Sampling",),
    "tokenizer": ("Tokenizer",),
}  # fmt: skip
_HOME = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [  # noqa: RUF022 (in the order of _MODULES)
    "KVCache", "init_cache", "ModelConfig", "forward", "generate_tokens", "CapacityError", "DownloadError",
    "GGUFError", "NonFiniteError", "OrcdJaxError", "RequestError", "TemplateError", "Completion", "LanguageModel",
    "Score", "load", "Sampling", "Tokenizer",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    try:
        return import_module(f"{__name__}.{name}")  # orcd_jax.tokenizer and the like, without another import
    except ModuleNotFoundError:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None
