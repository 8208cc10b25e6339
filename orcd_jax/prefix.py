"""A prompt's beginning, prefilled once and used by many requests, in memory or from a file."""

from __future__ import annotations

import hashlib
import os
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from orcd_jax.cache import KVCache, init_cache
from orcd_jax.config import ModelConfig
from orcd_jax.errors import RequestError
from orcd_jax.files import whole
from orcd_jax.loader import Params


@dataclass(frozen=True)
class Prefix:
    """Token ids and the cache of one row that holds them; belongs to the model that made it.

    Attributes:
      ids: the tokens.
      cache: of one row, holding them all.
      length: the most tokens that the cache was made for.
      model: a digest of the model, its weights' format and its cache policy.
    """

    ids: list[int]
    cache: KVCache
    length: int
    model: str

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the prefix to a file, for `LanguageModel.load_prefix`. The file appears whole or not at all."""
        arrays: dict[str, Any] = {f"cache_{i}": _bytes(x) for i, x in enumerate(jax.tree.leaves(self.cache))}
        arrays |= {"model": self.model, "ids": np.array(self.ids, np.int32), "length": self.length}
        with whole(Path(path)) as partial, open(partial, "wb") as f:
            np.savez(f, **arrays)


def load_prefix(path: str | os.PathLike[str], config: ModelConfig, model: str, device: jax.Device) -> Prefix:
    """Read a file that `Prefix.save` wrote.

    Args:
      path: the file.
      config, model: of the model that will use it; `model` is its `digest`.
      device: where the cache goes.

    Raises:
      RequestError: if the file is damaged, or of another model, weight format or cache policy.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            ids, length, made_by = file["ids"], int(file["length"]), str(file["model"])
            if made_by == model:
                shapes = jax.eval_shape(lambda: init_cache(config, 1, length))
                leaves, tree = jax.tree.flatten(shapes)
                arrays = [file[f"cache_{i}"].view(x.dtype).reshape(x.shape) for i, x in enumerate(leaves)]
                cache: KVCache = jax.tree.unflatten(tree, arrays)
                _check(ids, cache, length, config)
    except FileNotFoundError:
        raise RequestError(f"{path}: no such file") from None
    except (OSError, TypeError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as reason:
        raise RequestError(f"{path}: is no prefix file, or is damaged: {reason}") from None
    if made_by != model:
        raise RequestError(f"{path}: was made by another model, weight format or cache policy; prefill again")
    return Prefix(ids.tolist(), jax.device_put(cache, device), length, model)


def _check(ids: np.ndarray, cache: KVCache, length: int, config: ModelConfig) -> None:
    """Raise ValueError for what `Prefix.save` would not write: a number that is not finite shows in later rows."""
    if ids.ndim != 1 or ids.dtype.kind != "i" or not 0 < ids.size <= length or ids.size != cache.lengths:
        raise ValueError("its token ids and its cache do not belong together")
    if ids.min() < 0 or ids.max() >= config.vocab_size:
        raise ValueError(f"it has token ids outside 0 to {config.vocab_size - 1}")
    if not all(np.isfinite(x).all() for x in jax.tree.leaves(cache)):
        raise ValueError("its cache holds numbers that are not finite")


def digest(config: ModelConfig, params: Params, weights: str) -> str:
    """Tells models apart: by config, weight format and the values of the final norm."""
    return hashlib.sha256(repr((config, weights)).encode() + _bytes(params["norm"]).tobytes()).hexdigest()


def _bytes(x: Any) -> np.ndarray:
    return np.ascontiguousarray(np.asarray(x)).reshape(-1).view(np.uint8)
