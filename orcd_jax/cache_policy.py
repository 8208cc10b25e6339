"""What a key/value cache keeps, and in how many bytes."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from orcd_jax.errors import RequestError

_SINKS = 4  # enough for the models tried by Xiao et al. 2023, https://arxiv.org/abs/2309.17453


@dataclass(frozen=True)
class CachePolicy:
    """What is kept of a row's tokens. `parse` makes one from its name.

    - full: every token, or all that a model with a sliding window of its own can see.
    - sliding:W or sliding:W:S: the last W tokens, and the first S (default 4) as attention sinks, in constant memory.
    - int8: values as int8 with one float16 scale for each head and position; also sliding:W+int8.
    - compress:W: the last W tokens as they are, older ones as int8.
    """

    window: int | None = None
    sinks: int = 0
    int8: bool = False
    recent: int | None = None

    @classmethod
    def parse(cls, text: str) -> CachePolicy:
        """Read a policy's name.

        Raises:
          RequestError: for a name that is none of the above, or a W below 1.
        """
        match = re.fullmatch(r"full|int8|sliding:0*(\d+)(?::0*(\d+))?(\+int8)?|compress:0*(\d+)", str(text))
        if match is None:
            raise RequestError(
                f"the cache policy is {text!r:.60}; expected full, int8, sliding:W, sliding:W:SINKS, sliding:W+int8 or "
                "compress:W"
            )
        window, sinks, int8, recent = match.groups()
        if "0" in (window, recent) or any(n is not None and len(n) > 9 for n in (window, sinks, recent)):
            raise RequestError(f"the cache policy is {text!r:.60}; expected a W from 1 to 999999999")
        return cls(
            window=None if window is None else int(window),
            sinks=0 if window is None else _SINKS if sinks is None else int(sinks),
            int8=text == "int8" or int8 is not None,
            recent=None if recent is None else int(recent),
        )

    @property
    def name(self) -> str:
        """The name that `parse` reads."""
        if self.recent is not None:
            return f"compress:{self.recent}"
        if self.window is None:
            return "int8" if self.int8 else "full"
        return f"sliding:{self.window}:{self.sinks}" + ("+int8" if self.int8 else "")

    def resolve(self, model_window: int | None, length: int) -> CachePolicy:
        """The policy that gives the same attention for rows of up to `length` tokens, with a window only if it wraps.

        A model's own window takes the place of a wider one, without sinks: it is what the model was trained with.
        """
        if self.recent is not None:
            return replace(self, recent=min(self.recent, length))
        window, sinks = self.window, self.sinks
        if model_window is not None and (window is None or window >= model_window):
            window, sinks = model_window, 0
        if window is None or length <= window + sinks:
            return replace(self, window=None, sinks=0)
        return replace(self, window=window, sinks=sinks)

    def row_bytes(self, head_dim: int, itemsize: int, model_window: int | None, length: int) -> int:
        """Bytes that a row of `length` tokens holds for each key/value head of a layer."""
        policy = self.resolve(model_window, length)
        exact, int8 = 2 * head_dim * itemsize, 2 * (head_dim + 2)
        if policy.recent is not None:
            return length * int8 + policy.recent * exact
        slots = length if policy.window is None else policy.sinks + policy.window
        return slots * (int8 if policy.int8 else exact)
