"""From logits to the next token: penalties, truncation, temperature, and a draw that belongs to the row alone.

The order is llama.cpp's: repeat penalty, top-k, top-p, min-p, then temperature, so that the temperature reshapes only
what truncation kept. The repeat penalty counts every token of prompt and completion, as in Hugging Face (Keskar et
al. 2019, https://arxiv.org/abs/1909.05858). Top-p: Holtzman et al. 2019, https://arxiv.org/abs/1904.09751; min-p:
Nguyen et al. 2024, https://arxiv.org/abs/2407.01082. The draw is the Gumbel-max trick over ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from orcd_jax.errors import RequestError
from pallas_kernels import top_k
from pallas_kernels.quant_matmul_argmax import agree

_MOST = float(np.finfo(np.float32).max)  # values are float32 where they are used
_LEAST = 1e-37  # that is not zero, or nearly so, there

# Rows that keep at most this many tokens by top-k are sampled from the largest few, without sorting the vocabulary.
_CANDIDATES = 64

Method = Literal["argmax", "greedy", "largest", "candidates", "any"]
"""What a batch needs: the greatest logit, for which the others need not exist; the same after a penalty; draws from the
largest few; the same after a penalty; or a decision in each step, which costs a GPU 16 us."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen: numbers, or arrays [B] with one value a row.

    A pytree: changing a value compiles nothing new.
    """

    temperature: Any = 0.8  # 0: greedy
    top_k: Any = 40  # keep the k likeliest; 0: all
    top_p: Any = 0.95  # keep the likeliest until their probability reaches p; 1: all
    min_p: Any = 0.05  # keep those at least min_p times as likely as the likeliest; 0: all
    repeat_penalty: Any = 1.0  # divide positive, multiply negative logits of tokens already there; 1: none

    def check(self) -> None:
        """Refuse values that mean nothing.

        Raises:
          RequestError: naming the value, what it is and what is expected.
        """
        rules: dict[str, tuple[str, Callable[[float], bool]]] = {
            "temperature": (f"0 to {_MOST:.0e}", lambda v: v >= 0),
            "top_k": ("a whole number, 0 to 2^31 - 1", lambda v: v >= 0 and v == int(v) and v < 2**31),
            "top_p": ("above 0, at most 1", lambda v: 0 < v <= 1),
            "min_p": ("from 0 to 1", lambda v: 0 <= v <= 1),
            "repeat_penalty": (f"{_LEAST:.0e} to {_MOST:.0e}", lambda v: v >= _LEAST),
        }
        for name, (expected, allowed) in rules.items():
            for value in self._values(name):
                number = isinstance(value, int | float) and not isinstance(value, bool)
                if not number or not -_MOST <= value <= _MOST or not allowed(value):
                    raise RequestError(f"{name} is {value!s:.40}; expected {expected}")

    def split(self, batch: int) -> list[Sampling]:
        """One Sampling of plain numbers for each row.

        Raises:
          RequestError: if a value is an array of another length.
        """
        columns = {}
        for field in fields(self):
            values = self._values(field.name)
            if len(values) not in (1, batch):
                raise RequestError(f"{field.name} has {len(values)} values for {batch} prompts")
            columns[field.name] = values if len(values) == batch else values * batch
        return [Sampling(*row) for row in zip(*columns.values(), strict=True)]

    def _values(self, name: str) -> list[Any]:
        try:
            return np.ravel(getattr(self, name)).tolist()
        except ValueError:  # lists of different lengths
            raise RequestError(f"{name} is ragged; expected a number, or an array with one a prompt") from None

    def rows(self, batch: int) -> Sampling:
        """The same with every value an array [batch], int32 for top_k and float32 for the rest.

        Raises:
          RequestError: if a value is an array of another shape.
        """
        values = {}
        for field in fields(self):
            value = jnp.asarray(getattr(self, field.name), value_dtype(field.name))
            if value.shape not in ((), (1,), (batch,)):
                raise RequestError(f"{field.name} has the shape {value.shape}; it does not broadcast to {batch} rows")
            values[field.name] = jnp.broadcast_to(value, (batch,))
        return Sampling(**values)


def value_dtype(name: str) -> Any:
    """The dtype of a value of `Sampling` where it is used."""
    return jnp.int32 if name == "top_k" else jnp.float32


def method_of(rows: Sequence[Sampling]) -> Method:
    """The cheapest method that serves all rows, of plain numbers."""
    drawing, penalized = [row for row in rows if row.temperature > 0], any(row.repeat_penalty != 1 for row in rows)
    if not drawing:
        return "greedy" if penalized else "argmax"
    if not all(0 < row.top_k <= _CANDIDATES for row in drawing):
        return "any"
    return "candidates" if penalized else "largest"


def penalize(logits: jax.Array, seen: jax.Array, penalty: jax.Array) -> jax.Array:
    """Apply the repeat penalty [B] to logits [B, V] where seen, bool [B, V]; what was finite stays so."""
    penalty = penalty[:, None]
    most = jnp.finfo(logits.dtype).max
    penalized = jnp.clip(jnp.where(logits > 0, logits / penalty, logits * penalty), -most, most)
    return jnp.where(seen & jnp.isfinite(logits), penalized, logits)


def sample(
    logits: jax.Array,
    sampling: Sampling,
    keys: jax.Array,
    steps: jax.Array,
    method: Method = "any",
    known: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Choose one token a row.

    Args:
      logits: float32 [B, V], penalised already; -inf is never chosen.
      sampling: values [B].
      keys: random keys [B]; a row's draw depends on its key, its step and its own logits alone.
      steps: int32 [B], folded into the keys.
      method: static; one that serves all rows.
      known: static; ids from there on do not count, by methods that draw from the largest few. None: all count.

    Returns:
      Token ids, int32 [B], of which a tie goes to the lower, and each row's greatest logit, float32 [B], where a NaN is
      the greatest. They do not depend on the method.
    """
    candidates = min(_CANDIDATES, logits.shape[-1])
    ids = lax.broadcasted_iota(jnp.int32, logits.shape, 1)

    def draw_few() -> tuple[jax.Array, jax.Array]:
        values, few = top_k(logits, candidates, known=known)
        return _draw(values, few, sampling, keys, steps), values[:, 0]

    def draw_all() -> jax.Array:
        # By two keys: with one, XLA takes CUB's sort, which cannot be part of a command buffer.
        descending, order = lax.sort((-logits, ids), num_keys=2, is_stable=False)
        return _draw(-descending, order, sampling, keys, steps)

    if method in ("largest", "candidates"):
        return draw_few()
    greatest, greedy = agree(logits, ids)  # in a branch it takes a CPU 6 ms more
    if method in ("argmax", "greedy"):
        return greedy, greatest
    drawing = sampling.temperature > 0
    few = (sampling.top_k > 0) & (sampling.top_k <= candidates) | ~drawing
    branch = jnp.where(jnp.any(drawing), jnp.where(jnp.all(few), 1, 2), 0)
    # One switch: two conditions would cost twice.
    return lax.switch(branch, (lambda: greedy, lambda: draw_few()[0], draw_all)), greatest


def _draw(values: jax.Array, ids: jax.Array, sampling: Sampling, keys: jax.Array, steps: jax.Array) -> jax.Array:
    """Truncate and draw from logits sorted downwards [B, C] with their ids [B, C].

    The noise belongs to ranks, so that it is the same however many candidates there are.
    """
    rank = lax.broadcasted_iota(jnp.int32, values.shape, 1)
    top_k, top_p, min_p = sampling.top_k[:, None], sampling.top_p[:, None], sampling.min_p[:, None]
    kept = ((rank < top_k) | (top_k == 0)) & (values > -jnp.inf)
    probabilities = jax.nn.softmax(jnp.where(kept, values, -jnp.inf), axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    kept &= (before < top_p) | (top_p >= 1)
    kept &= probabilities >= min_p * probabilities[:, :1]
    kept |= rank == 0
    noise = jax.vmap(lambda key, step: jax.random.gumbel(jax.random.fold_in(key, step), values.shape[1:]))(keys, steps)
    temperature = jnp.where(sampling.temperature > 0, sampling.temperature, 1.0)[:, None]
    # Measured from the largest, so that a tiny temperature cannot overflow.
    scores = (values - values[:, :1]) / temperature + noise
    choice = jnp.argmax(jnp.where(kept, scores, -jnp.inf), axis=-1)
    choice = jnp.where(sampling.temperature > 0, choice, 0)
    return jnp.take_along_axis(ids, choice[:, None], axis=-1)[:, 0]


def portable_keys(keys: jax.Array) -> jax.Array:
    """Keys of any generator as Threefry's, one for each; its own stay as they are.

    Under `vmap` the others draw for a whole batch at once: a row's draws would depend on its place.
    """
    words = jax.random.key_data(keys)
    threefry = jax.random.wrap_key_data(words[..., :2], impl="threefry2x32")
    for i in range(2, words.shape[-1]):
        threefry = jax.vmap(jax.random.fold_in)(threefry.ravel(), words[..., i].ravel()).reshape(keys.shape)
    return threefry


def row_keys(seeds: Sequence[int] | np.ndarray | jax.Array) -> jax.Array:
    """Random keys [B] from seeds of 32 bits; the same on every machine and whatever JAX's default generator is."""
    words = jnp.asarray(seeds, jnp.uint32)
    return jax.random.wrap_key_data(jnp.stack([jnp.zeros_like(words), words], axis=-1), impl="threefry2x32")
