"""LanguageModel: a loaded file, its compiled programs, and the ways to run them.

Shapes come in buckets (batch, prompt chunk, cache length), so that any request runs on a few programs, each compiled
once. While the host reads one chunk of tokens, the next is already running.
"""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from os import PathLike
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

import pallas_kernels
from orcd_jax import decoding, hub, packed_decoding, programs
from orcd_jax.cache import KVCache, init_cache
from orcd_jax.cache_policy import CachePolicy
from orcd_jax.chat import ChatTemplate
from orcd_jax.config import ModelConfig, WeightFormat
from orcd_jax.device import available_bytes, check_fits, human_bytes, memory_errors, peak_bytes, select_device, wake
from orcd_jax.errors import GGUFError, NonFiniteError, RequestError, TemplateError
from orcd_jax.gguf_reader import GGUFFile
from orcd_jax.loader import Params, load_params
from orcd_jax.prefix import Prefix, digest, load_prefix
from orcd_jax.sampling import Method, Sampling, method_of, row_keys, value_dtype
from orcd_jax.tokenizer import StreamDecoder, Tokenizer
from pallas_kernels.flash_attention import HEAD_WIDTHS
from pallas_kernels.implementation import compiled, on_hopper

Kernels = Literal["auto", "xla", "mosaic_gpu"]
FinishReason = Literal["stop", "length", "context", "interrupted"]  # the last: it had not ended

MAX_LOGPROBS = 20
_SHORTEST_CACHE = 256
_SCORE_CHUNK = 128


@dataclass(frozen=True)
class _Buckets:
    """Static sizes that suit a platform."""

    prefill: tuple[int, ...]  # tokens a row in one prefill program, ascending
    steps: int  # tokens decoded between two looks of the host
    batch: int  # most rows in one program


_BUCKETS = {"cpu": _Buckets((32, 128, 512), 8, 32), "gpu": _Buckets((32, 128, 512, 2048), 32, 128)}

GREEDY = Sampling(temperature=0.0)


@dataclass(frozen=True)
class Timings:
    """Seconds and rates of a request, or of the batch that it was part of. Compilation is in `compile_s` alone."""

    load_s: float
    compile_s: float
    ttft_s: float  # from the request to the first token on the host
    prefill_tok_s: float
    decode_tok_s: float  # of all rows together, after the first token


@dataclass(frozen=True)
class TokenLogprobs:
    """Natural log-probabilities at one position, before penalty, truncation and temperature."""

    logprob: float  # of the token that was chosen
    top: dict[int, float]  # of the likeliest tokens, by id, likeliest first


@dataclass(frozen=True)
class Completion:
    """What came of one prompt. `token_ids` leaves out the stop id; `text` ends before a stop text."""

    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None
    finish_reason: FinishReason
    prompt_tokens: int
    seed: int
    timings: Timings


@dataclass(frozen=True)
class Score:
    """Log-likelihood (natural log) of a text: the sum over `tokens` scored tokens, all but the first."""

    log_likelihood: float
    tokens: int
    perplexity: float


@dataclass
class _Row:
    """One prompt on its way through a batch."""

    before: list[int]  # of a prefix
    ids: list[int]
    budget: int
    limit: FinishReason  # what it means to use the budget up
    sampling: Sampling
    seed: int
    stop_ids: tuple[int, ...]
    decoder: StreamDecoder
    pieces: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish_reason: FinishReason | None = None

    def accept(self, tokens: list[int], logprobs: list[TokenLogprobs]) -> str:
        """Take tokens of the device's, which mean nothing after the row's end, and return the text that they settle."""
        if self.finish_reason is not None:
            return ""
        tokens = tokens[: self.budget - len(self.token_ids)]
        end = next((i for i, token in enumerate(tokens) if token in self.stop_ids), len(tokens))
        before = self.decoder.consumed
        piece = self.decoder.push(tokens[:end])
        taken = self.decoder.consumed - before  # fewer where a stop text is complete
        self.token_ids += tokens[:taken]
        self.logprobs += logprobs[:taken]
        if end < len(tokens):
            self.finish_reason = "stop"
        elif len(self.token_ids) == self.budget:
            self.finish_reason = self.limit
        if self.finish_reason is not None:
            piece += self.decoder.flush()  # nothing after a stop text
        if self.decoder.stopped:
            self.finish_reason = "stop"
        self.pieces.append(piece)
        return piece

    def completion(self, timings: Timings, with_logprobs: bool) -> Completion:
        """The row as it stands."""
        return Completion(
            text="".join(self.pieces),
            token_ids=self.token_ids,
            logprobs=self.logprobs if with_logprobs else None,
            finish_reason=self.finish_reason or "interrupted",
            prompt_tokens=len(self.before) + len(self.ids),
            seed=self.seed,
            timings=timings,
        )


class _Clock:
    """When things happened in one run of a batch."""

    def __init__(self, load_s: float):
        self.load_s, self.compile_s = load_s, 0.0
        self.restart()
        self.prompt_tokens = self.new_tokens = self.rows = 0

    def restart(self) -> None:
        self.start = self.first = self.last = time.perf_counter()

    def compiled(self, took: float) -> None:
        """Compilation took so many seconds, which count as nothing else."""
        self.compile_s += took
        self.start += took
        if self.new_tokens:
            self.first += took

    def mark(self, new_tokens: int) -> None:
        """So many tokens are on the host now."""
        self.last = time.perf_counter()
        if self.new_tokens == 0:
            self.first = self.last
        self.new_tokens = new_tokens

    def timings(self) -> Timings:
        ttft = max(self.first - self.start, 1e-9)
        decoding_s = self.last - self.first
        later = self.new_tokens - self.rows
        return Timings(
            load_s=self.load_s,
            compile_s=self.compile_s,
            ttft_s=ttft,
            prefill_tok_s=self.prompt_tokens / ttft,
            decode_tok_s=later / decoding_s if later > 0 and decoding_s > 0 else 0.0,
        )


class Stream:
    """Iterator over pieces of text; `completion` is what there is so far, and the whole once it is exhausted."""

    def __init__(self, pieces: Iterator[str], completion: Callable[[], Completion]):
        self._pieces, self._completion = pieces, completion

    def __iter__(self) -> Iterator[str]:
        return self._pieces

    def __next__(self) -> str:
        return next(self._pieces)

    @property
    def completion(self) -> Completion:
        return self._completion()


class Batch:
    """Iterator over the texts of many prompts; `completions` is what there is so far, and the whole in the end.

    Each step gives the number of prompts whose completion has ended in it.
    """

    def __init__(self, steps: Iterator[int], completions: Callable[[], list[Completion]]):
        self._steps, self._completions = steps, completions

    def __iter__(self) -> Iterator[int]:
        return self._steps

    def __next__(self) -> int:
        return next(self._steps)

    @property
    def completions(self) -> list[Completion]:
        return self._completions()


class LanguageModel:
    """A model on a device. Made by `load`; methods may be called from several threads.

    Attributes:
      config: frozen, static in every program.
      params: the pytree that `forward` and `generate_tokens` take.
      tokenizer: text to ids and back.
      template: the file's chat template, or None.
      context: the most tokens, prompt and completion together, of a row.
      weights: the format of the matrices.
      device: where it runs.
      kernels: as `load` has it.
    """

    def __init__(
        self,
        config: ModelConfig,
        params: Params,
        tokenizer: Tokenizer,
        template: ChatTemplate | None,
        *,
        context: int,
        weights: WeightFormat,
        device: jax.Device,
        kernels: Kernels = "auto",
        load_s: float = 0.0,
    ):
        _check_kernels(kernels, device)
        if kernels == "auto" and config.weight_bytes(weights) < available_bytes(device) // 4:
            with jax.default_device(device):
                params = packed_decoding.pack(params, config)
        self.config, self.params, self.tokenizer, self.template = config, params, tokenizer, template
        self.context, self.weights, self.device, self.load_s = context, weights, device, load_s
        self.kernels = kernels
        self._fused = attention_is_fused(config, device, kernels)
        self._buckets = _BUCKETS.get(device.platform, _BUCKETS["gpu"])
        self._programs: dict[Any, jax.stages.Compiled] = {}
        self._locks: dict[Any, threading.Lock] = {}
        # On a CPU launches are cheap, and a large program that runs out of memory has been seen not to return.
        self._launches_cost = device.platform != "cpu"

    # Text in, text out

    def generate(
        self,
        prompts: str | Sequence[str] | Sequence[Sequence[int]],
        max_new_tokens: int | Sequence[int] = 64,
        sampling: Sampling | Sequence[Sampling] = GREEDY,
        seed: int | Sequence[int] = 0,
        stop: Sequence[str] | Sequence[Sequence[str]] = (),
        ignore_eos: bool = False,
        logprobs: int | None = None,
        prefix: Prefix | None = None,
    ) -> list[Completion]:
        """Complete prompts as they are, without a chat template.

        Args:
          prompts: a text, texts, or lists of token ids; a text gets a BOS token if the file asks for one.
          max_new_tokens: at most so many, for all rows or one number a row.
          sampling: for all rows (its values may be arrays, one a row), or one a row.
          seed: for all rows, or one a row; 0 to 2^32 - 1. Like rows with like seeds have like completions.
          stop: texts that end a completion and are not part of it; or such a list for each row.
          ignore_eos: do not end at the model's stop ids.
          logprobs: K from 0 to 20: report each token's log-probability and those of the K likeliest.
          prefix: what every prompt continues, from `prefill`; the prompts then get no BOS token.

        Returns:
          One Completion a prompt, in their order.

        Raises:
          RequestError: for a prompt that is empty, too long, or has ids out of range, or a value out of range.
          CapacityError: if the cache does not fit the device.
          NonFiniteError: if the model's logits are not finite.
        """
        batch = self.batch(prompts, max_new_tokens, sampling, seed, stop, ignore_eos, logprobs, prefix)
        for _ in batch:
            pass
        return batch.completions

    def batch(
        self,
        prompts: str | Sequence[str] | Sequence[Sequence[int]],
        max_new_tokens: int | Sequence[int] = 64,
        sampling: Sampling | Sequence[Sampling] = GREEDY,
        seed: int | Sequence[int] = 0,
        stop: Sequence[str] | Sequence[Sequence[str]] = (),
        ignore_eos: bool = False,
        logprobs: int | None = None,
        prefix: Prefix | None = None,
    ) -> Batch:
        """As `generate`, step by step: for showing progress, and for keeping what there is when something stops it."""
        rows = self._rows(_listed(prompts), max_new_tokens, sampling, seed, stop, ignore_eos, prefix)
        self._check_logprobs(logprobs)
        # Longest together, so that short rows do not wait in long batches.
        order = sorted(range(len(rows)), key=lambda i: -(len(rows[i].ids) + rows[i].budget))
        most = self._buckets.batch
        groups = [(order[first : first + most], _Clock(self.load_s)) for first in range(0, len(order), most)]

        def steps() -> Iterator[int]:
            for group, clock in groups:
                clock.restart()
                ended = 0
                for _ in self._run([rows[i] for i in group], logprobs, clock, prefix):
                    now = sum(rows[i].finish_reason is not None for i in group)
                    yield now - ended
                    ended = now

        def completions() -> list[Completion]:
            clocks = {i: clock for group, clock in groups for i in group}
            return [row.completion(clocks[i].timings(), logprobs is not None) for i, row in enumerate(rows)]

        return Batch(steps(), completions)

    def stream(
        self,
        prompt: str | Sequence[int],
        max_new_tokens: int = 64,
        sampling: Sampling = GREEDY,
        seed: int = 0,
        stop: Sequence[str] = (),
        ignore_eos: bool = False,
        logprobs: int | None = None,
        prefix: Prefix | None = None,
    ) -> Stream:
        """Complete one prompt and yield its text piece by piece; arguments as in `generate`.

        The pieces joined are the completion's text. No piece ends inside a character, and what may yet become a stop
        text is held back.
        """
        (row,) = self._rows([prompt], max_new_tokens, sampling, seed, stop, ignore_eos, prefix)
        self._check_logprobs(logprobs)
        clock = _Clock(self.load_s)
        pieces = (piece for (piece,) in self._run([row], logprobs, clock, prefix) if piece)
        return Stream(pieces, lambda: row.completion(clock.timings(), logprobs is not None))

    def chat(self, messages: Sequence[dict[str, str]], **options: Any) -> Completion:
        """Answer a conversation in the file's own chat template; options as in `generate`.

        Args:
          messages: [{"role": "user", "content": "..."}, ...]. Special tokens in a content are plain text.

        Raises:
          TemplateError: if the file has no template, or it fails.
        """
        return self.generate([self.encode_chat(messages)], **options)[0]

    def encode_chat(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """Token ids of a conversation in the file's chat template, ready for the answer."""
        if self.template is None:
            raise TemplateError("the file has no chat template; use generate, or --raw on the command line")
        return self.template.encode(self.tokenizer, messages, max_characters=self._max_characters)

    def encode_prompt(self, text: str) -> list[int]:
        """Token ids of a text, with a BOS token if the file asks for one."""
        bos = self.tokenizer.bos_id
        prefix = [bos] if self.tokenizer.add_bos and bos is not None else []
        return prefix + self._encode(text)

    def _encode(self, text: str) -> list[int]:
        # The tokeniser takes some 500 bytes a character, which a text that cannot fit is not worth.
        if len(text) > self._max_characters:
            raise RequestError(
                f"the text has {len(text):,} characters, and a context of {self.context} tokens holds at most "
                f"{self._max_characters:,}; shorten it"
            )
        return self.tokenizer.encode(text)

    @property
    def _max_characters(self) -> int:
        return self.context * self.tokenizer.longest

    # Prefixes

    def prefill(self, prompt: str | Sequence[int]) -> Prefix:
        """Run the beginning that several prompts share, once: `generate(..., prefix=...)` continues from it.

        Args:
          prompt: a text, with a BOS token if the file asks for one, or token ids.
        """
        ids = self._ids(prompt, "the prefix")
        length = self._cache_bucket(len(ids))
        for _, cache in self._teacher_forced(ids, decoding.hidden_states):
            last = cache
        return Prefix(ids, last, length, self._digest)

    def load_prefix(self, path: str | PathLike[str]) -> Prefix:
        """Read a prefix that `Prefix.save` wrote; errors as in `prefix.load_prefix`."""
        return load_prefix(path, self.config, self._digest, self.device)

    @cached_property
    def _digest(self) -> str:
        return digest(self.config, self.params, self.weights)

    # Numbers

    def logits(self, token_ids: Sequence[int]) -> np.ndarray:
        """Logits after every token of a sequence, teacher-forced: float32 [T, V]."""
        ids = self._check_ids(token_ids, "the sequence")
        return np.concatenate([values for values, _ in self._teacher_forced(ids, decoding.forward)])

    def token_logprobs(self, token_ids: Sequence[int]) -> np.ndarray:
        """Natural log-probability of every token but the first, given those before it: float32 [T - 1]."""
        ids = self._check_ids(token_ids, "the sequence")
        return np.concatenate([values for values, _ in self._teacher_forced(ids, decoding.next_logprobs)])[:-1]

    def score(self, texts: str | Sequence[str] | Sequence[Sequence[int]]) -> list[Score]:
        """Log-likelihood and perplexity of texts (a BOS token first if the file asks for one) or lists of ids."""
        return [self._score(text) for text in _listed(texts)]

    def _score(self, text: str | Sequence[int]) -> Score:
        ids = self._ids(text, "the text")
        if len(ids) < 2:
            raise RequestError("a text of one token has nothing to score; give at least two tokens")
        total = float(self.token_logprobs(ids).sum(dtype=np.float64))
        if not math.isfinite(total):
            raise self._not_finite(ids)
        return Score(total, len(ids) - 1, float(np.exp(-total / (len(ids) - 1))))

    def _teacher_forced(self, ids: list[int], program: Callable[..., Any]) -> Iterator[tuple[np.ndarray, KVCache]]:
        """Run a sequence in chunks; yield each chunk's result for its positions, and the cache so far.

        The cache is given away to the next chunk: only the last one stays.
        """
        clock = _Clock(self.load_s)
        length = self._cache_bucket(len(ids))
        self.check_capacity(1, length, _SCORE_CHUNK, 2 * 4 * _SCORE_CHUNK * self.config.vocab_size)
        cache = self._call(clock, init_cache, (), params=False, batch=1, length=length)
        for start in range(0, len(ids), _SCORE_CHUNK):
            piece = ids[start : start + _SCORE_CHUNK + 1]
            count = min(len(piece), _SCORE_CHUNK)
            tokens = np.zeros((1, _SCORE_CHUNK + 1), np.int32)
            tokens[0, : len(piece)] = piece
            with memory_errors(self.device):
                result, cache = self._call(clock, program, (tokens, cache, np.full(1, count, np.int32)), donate=1)
                values = np.asarray(result)[0, :count]
            yield values, cache

    def memory(self) -> dict[str, int]:
        """Bytes by formula and as they are.

        Returns:
          weights_bytes: of the parameters as held; weights_formula_bytes: as the config says; packed_bytes: of the
            copy that the decode step's kernel reads, if there is one.
          kv_bytes_per_token, kv_bytes: of one row's cache, for a token and for the whole context.
          workspace_formula_bytes: for one row's largest prefill chunk; workspace_bytes: the most temporary memory of
            any program compiled so far; peak_bytes: the most in use so far on the device (of the process on a CPU).
        """
        config, chunk = self.config, self._buckets.prefill[-1]
        packed = sum(x.nbytes for x in jax.tree.leaves(self.params.get(packed_decoding.PACKED, ())))
        return {
            "weights_bytes": sum(x.nbytes for x in jax.tree.leaves(self.params)) - packed,
            "weights_formula_bytes": config.weight_bytes(self.weights),
            "packed_bytes": packed,
            "kv_bytes_per_token": config.cache_bytes(1, 1),
            "kv_bytes": config.cache_bytes(1, self.context),
            "workspace_formula_bytes": self.workspace_bytes(1, min(chunk, self.context), self.context),
            "workspace_bytes": max(map(_temporary_bytes, list(self._programs.values())), default=0),
            "peak_bytes": peak_bytes(self.device),
        }

    def workspace_bytes(self, batch: int, chunk: int, length: int) -> int:
        """As `ModelConfig.workspace_bytes`, for the kernels that this model runs on."""
        return self.config.workspace_bytes(batch, chunk, length, self._fused)

    def _not_finite(self, ids: list[int]) -> NonFiniteError:
        """The error for a sequence whose logits are not finite; names the part of the model where that begins."""
        tokens = jnp.asarray([ids], jnp.int32, device=self.device)
        with jax.default_device(self.device), self.tracing():
            where = decoding.first_not_finite(self.params, self.config, tokens) or "only some of the batched programs"
        return NonFiniteError(
            f"the model's logits are not finite after {len(ids)} tokens, beginning in {where}; the weights may be "
            "damaged, or too large for bfloat16 activations: try weights='f32'"
        )

    # Checks

    def _rows(
        self,
        prompts: Sequence[str | Sequence[int]],
        max_new_tokens: int | Sequence[int],
        sampling: Sampling | Sequence[Sampling],
        seed: int | Sequence[int],
        stop: Sequence[str] | Sequence[Sequence[str]],
        ignore_eos: bool,
        prefix: Prefix | None,
    ) -> list[_Row]:
        count = len(prompts)
        if not isinstance(prefix, Prefix | None):
            raise RequestError(f"the prefix is {prefix!r:.80}; expected what prefill returns")
        before = [] if prefix is None else prefix.ids
        if prefix is not None and prefix.model != self._digest:
            raise RequestError("the prefix was made by another model, weight format or cache policy; prefill again")
        if prefix is not None and prefix.length > self.context:
            raise RequestError(f"the prefix was made for {prefix.length} tokens, above the context of {self.context}")

        def per_row(value: Any, name: str) -> list[Any]:
            several = isinstance(value, list | tuple) or (isinstance(value, np.ndarray | jax.Array) and value.ndim)
            values = list(np.asarray(value) if isinstance(value, jax.Array) else value) if several else [value] * count
            if len(values) != count:
                raise RequestError(f"{name} has {len(values)} values for {count} prompts")
            return values

        shared_stop = not isinstance(stop, Iterable) or all(isinstance(text, str) for text in stop)
        columns = zip(
            prompts,
            per_row(max_new_tokens, "max_new_tokens"),
            sampling.split(count) if isinstance(sampling, Sampling) else per_row(sampling, "sampling"),
            per_row(seed, "seed"),
            [stop] * count if shared_stop else per_row(stop, "stop"),
            strict=True,
        )
        rows = []
        for index, (prompt, budget, how, row_seed, row_stop) in enumerate(columns):
            what = "the prompt" if count == 1 else f"prompt {index}"
            check_values(budget, how, row_seed)
            ids = self._ids(prompt, what, begins=prefix is None)
            room = self.context - len(before) - len(ids)
            if room < 1:
                more = "" if self.context == self.config.context_length else " or ask for more context"
                raise RequestError(
                    f"{what} has {len(before) + len(ids)} tokens, and a context of {self.context} leaves no room for "
                    f"an answer; shorten it{more}"
                )
            rows.append(
                _Row(
                    before=before,
                    ids=ids,
                    budget=min(int(budget), room),
                    limit="length" if budget <= room else "context",
                    sampling=how,
                    seed=int(row_seed),
                    stop_ids=() if ignore_eos else self.tokenizer.stop_ids,
                    decoder=StreamDecoder(self.tokenizer, row_stop, after=ids[-1]),
                )
            )
        return rows

    def _ids(self, prompt: Any, what: str, begins: bool = True) -> list[int]:
        """The checked token ids of a text, with a BOS token if it `begins` and the file asks for one, or of ids."""
        if isinstance(prompt, str):
            prompt = self.encode_prompt(prompt) if begins else self._encode(prompt)
        return self._check_ids(prompt, what)

    def _check_ids(self, ids: Any, what: str) -> list[int]:
        ids = _listed(ids)
        if not ids:
            raise RequestError(f"{what} is empty; give at least one token")
        for token in ids:
            if not _is_whole(token) or not 0 <= token < self.config.vocab_size:
                raise RequestError(f"{what} has the token id {token!r:.80}; expected 0 to {self.config.vocab_size - 1}")
        if len(ids) > self.context:
            raise RequestError(f"{what} has {len(ids)} tokens, more than the context of {self.context}; shorten it")
        return [int(token) for token in ids]

    def _check_logprobs(self, logprobs: int | None) -> None:
        highest = min(MAX_LOGPROBS, self.config.vocab_size)
        if logprobs is not None and (not _is_whole(logprobs) or not 0 <= logprobs <= highest):
            raise RequestError(f"logprobs is {logprobs}; expected a whole number from 0 to {highest}")

    def check_capacity(self, batch: int, length: int, chunk: int, extra: int = 0) -> None:
        """Refuse a request whose cache and workspace do not fit, saying how long a context would.

        Args:
          batch: rows.
          length: tokens of each row's cache.
          chunk: tokens a row of the largest program.
          extra: bytes beside that.

        Raises:
          CapacityError: with the bytes that are needed and available.
        """

        def required(config: ModelConfig, length: int) -> int:
            workspace = config.workspace_bytes(batch, min(chunk, length), length, self._fused)
            return config.cache_bytes(batch, length) + workspace + extra

        def advice(available: int) -> str:
            def longest(config: ModelConfig) -> int:
                shorter = (length >> i for i in range(1, length.bit_length()))
                return next((n for n in shorter if required(config, n) <= available), 0)

            fits, fits_int8 = longest(self.config), longest(replace(self.config, cache=CachePolicy(int8=True)))
            advice = f"a context of {fits} tokens would fit" if fits else "fewer rows at a time may fit"
            return advice + (f", one of {fits_int8} with kv_cache='int8'" if fits_int8 > fits else "")

        what = f"a cache of {batch} x {length} tokens ({human_bytes(self.config.cache_bytes(batch, length))})"
        check_fits(required(self.config, length), self.device, f"{what} with its workspace", advice)

    # Programs

    def _run(self, rows: list[_Row], logprobs: int | None, clock: _Clock, prefix: Prefix | None) -> Iterator[list[str]]:
        """Prefill and decode rows as one batch; yield each row's new text, chunk by chunk."""
        with memory_errors(self.device):
            yield from self._run_batch(rows, logprobs, clock, prefix)

    def _run_batch(
        self, rows: list[_Row], logprobs: int | None, clock: _Clock, prefix: Prefix | None
    ) -> Iterator[list[str]]:
        batch = 1 << (len(rows) - 1).bit_length()
        length = self._cache_bucket(max(len(row.before) + len(row.ids) + row.budget for row in rows))
        longest = max(len(row.ids) for row in rows)
        steps, most = self._buckets.steps, max(row.budget for row in rows)
        self.check_capacity(batch, length, min(longest, self._buckets.prefill[-1]))

        options: dict[str, Any] = {"top_logprobs": logprobs}
        request, prompt = self._request(rows, batch), list(self._prompt_chunks(rows, batch, longest))
        if self._launches_cost and prefix is None and len(prompt) == 1:
            state, chunk = self._call(clock, _first_token, (*request, *prompt[0]), length=length, **options)
        else:
            state, hidden = self._call(clock, _begin, request, params=False, length=length)
            if prefix is not None:
                ids = np.full(prefix.length, self.config.vocab_size, np.int32)
                ids[: len(prefix.ids)] = prefix.ids
                state = self._call(clock, decoding.adopt, (state, prefix.cache, ids), params=False, donate=0)
            for tokens, counts in prompt:
                state, hidden = self._call(clock, decoding.prefill, (state, hidden, tokens, counts), donate=(0, 1))
            state, chunk = self._call(clock, decoding.emit, (state, hidden), donate=0, **options)
        clock.prompt_tokens, clock.rows = sum(len(row.ids) for row in rows), len(rows)
        # The first token is chosen by a program for every method: cheaper than to compile another prefill.
        options |= {"steps": steps, "method": self.sampling_method([row.sampling for row in rows])}
        dispatched = 1

        def dispatch() -> decoding.Emitted:
            nonlocal state, dispatched
            state, emitted = self._call(clock, decoding.decode, (state,), donate=0, **options)
            dispatched += steps
            return emitted

        def accept(chunk: decoding.Emitted) -> list[str]:
            pieces = self._accept(rows, chunk)  # waits for the chunk
            clock.mark(sum(len(row.token_ids) for row in rows))
            return pieces

        # The first token waits neither for the compilation of what comes after it nor, of one row, which may be shown
        # as it comes, for the launch: that takes milliseconds, in which many rows' prefill still runs.
        ready = dispatched < most and self._is_compiled(decoding.decode, (state,), **options)
        following = dispatch() if ready and batch > 1 else None
        pieces = accept(chunk)
        if ready and following is None:
            following = dispatch()
        yield pieces
        while not all(row.finish_reason for row in rows):
            chunk = dispatch() if following is None else following
            following = dispatch() if dispatched < most else None  # runs while the host sees to the chunk before it
            yield accept(chunk)

    def _accept(self, rows: list[_Row], chunk: decoding.Emitted) -> list[str]:
        tokens, *reports = (np.asarray(x) for x in chunk if x is not None)
        if tokens.ndim == 1:  # one step alone
            tokens, *reports = (x[None] for x in (tokens, *reports))
        for step, i in np.argwhere(tokens == decoding.NOT_FINITE).tolist():
            if i < len(rows) and rows[i].finish_reason is None:
                raise self._not_finite(rows[i].before + rows[i].ids + rows[i].token_ids + tokens[:step, i].tolist())
        pieces = []
        for i, row in enumerate(rows):
            seen = [
                TokenLogprobs(float(chosen), dict(zip(ids.tolist(), values.tolist(), strict=True)))
                for chosen, ids, values in zip(*(x[:, i] for x in reports), strict=True)
            ]
            pieces.append(row.accept(tokens[:, i].tolist(), seen))
        return pieces

    def _prompt_chunks(self, rows: list[_Row], batch: int, longest: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Right-padded chunks [batch, T] of the prompts and their counts [batch], T from the buckets."""
        start = 0
        while start < longest:
            # The largest bucket that is more than half used: at most as much padding as text.
            left = longest - start
            size = max((b for b in self._buckets.prefill if b < 2 * left), default=self._buckets.prefill[0])
            tokens, counts = np.zeros((batch, size), np.int32), np.zeros(batch, np.int32)
            for i, row in enumerate(rows):
                piece = row.ids[start : start + size]
                tokens[i, : len(piece)] = piece
                counts[i] = len(piece)
            yield tokens, counts
            start += size

    def _request(self, rows: list[_Row], batch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, Sampling]:
        """What `_begin` takes of the rows."""
        padding = batch - len(rows)  # rows that have ended before they begin
        stop_ids = np.full((batch, decoding.MAX_STOP_IDS), decoding.NO_TOKEN, np.int32)
        for i, row in enumerate(rows):
            stop_ids[i, : len(row.stop_ids)] = row.stop_ids
        columns = {}
        for name in (f.name for f in fields(Sampling)):
            values = [getattr(row.sampling, name) for row in rows] + [getattr(GREEDY, name)] * padding
            columns[name] = np.array(values, value_dtype(name))
        remaining = np.array([row.budget for row in rows] + [0] * padding, np.int32)
        seeds = np.array([row.seed for row in rows] + [0] * padding, np.uint32)
        return remaining, seeds, stop_ids, Sampling(**columns)

    def _call(
        self,
        clock: _Clock,
        function: Callable[..., Any],
        args: tuple,
        params: bool = True,
        donate: Any = (),
        **static: Any,
    ) -> Any:
        """Run `function(params, config, *args, **static)`, compiled once for the shapes of args.

        Args:
          donate: which of args are given away.
          params: whether the function takes the parameters.
        """
        key = self._key(function, args, static)
        with jax.default_device(self.device):
            with self._locks.setdefault(key, threading.Lock()):  # different programs are compiled side by side
                if key not in self._programs:
                    start = time.perf_counter()
                    self._programs[key] = self._compile(function, args, params, donate, static)
                    took = time.perf_counter() - start
                    clock.compiled(took)
                program = self._programs[key]
            return program(*((self.params,) if params else ()), *args)

    def _is_compiled(self, function: Callable[..., Any], args: tuple, **static: Any) -> bool:
        return self._key(function, args, static) in self._programs

    def _key(self, function: Callable[..., Any], args: tuple, static: dict) -> Any:
        return function, tuple((x.shape, x.dtype) for x in jax.tree.leaves(args)), tuple(static.items())

    def _compile(self, function: Callable[..., Any], args: tuple, params: bool, donate: Any, static: dict) -> Any:
        donated = tuple(i + params for i in np.ravel(donate).astype(int).tolist())

        def call(*args: Any) -> Any:
            before = args[:params]  # the parameters, if the function takes them
            return function(*before, self.config, *args[params:], **static)

        call.__name__ = function.__name__  # seen in profiles and dumps
        given = ((self.params,) if params else ()) + args
        with self.tracing():
            return programs.kept(
                lambda: compiled(jax.jit(call, donate_argnums=donated), *given),
                self.device, given,
                function.__module__, function.__qualname__, self.config, pallas_kernels.preferred(), donated, static,
            )  # fmt: skip

    def sampling_method(self, rows: Sequence[Sampling]) -> Method:
        """How programs for rows of plain numbers sample; on a CPU always as one program can that serves all."""
        return "any" if self.device.platform == "cpu" else method_of(rows)

    def tracing(self) -> contextlib.AbstractContextManager[None]:
        """The context to trace programs in, so that they run on the kernels that were asked for."""
        return contextlib.nullcontext() if self.kernels == "auto" else pallas_kernels.use(self.kernels)

    def _cache_bucket(self, length: int) -> int:
        """The cache length for so many tokens: a power of two from 256 up, or the whole context."""
        return min(max(_SHORTEST_CACHE, 1 << (length - 1).bit_length()), self.context)


def check_values(max_new_tokens: Any, sampling: Any, seed: Any) -> None:
    """Refuse values of one request that mean nothing; no model is needed for that.

    Raises:
      RequestError: naming the value, what it is and what is expected.
    """
    if not _is_whole(max_new_tokens) or max_new_tokens < 1:
        raise RequestError(f"max_new_tokens is {max_new_tokens!s:.80}; expected a whole number of at least 1")
    if not _is_whole(seed) or not 0 <= seed < 1 << 32:
        raise RequestError(f"seed is {seed!s:.80}; expected a whole number from 0 to {(1 << 32) - 1}")
    if not isinstance(sampling, Sampling):
        raise RequestError(f"sampling is {sampling!r:.80}; expected a Sampling")
    sampling.check()


def _is_whole(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _listed(prompts: Any) -> list[Any]:
    """One text as a list of it, or the items of what holds several."""
    prompts = np.asarray(prompts) if isinstance(prompts, jax.Array) else prompts
    try:
        return [prompts] if isinstance(prompts, str) else list(prompts)
    except TypeError:
        raise RequestError(
            f"{prompts!r:.80} is no prompt; expected a text, a list of texts, or a list of lists of token ids"
        ) from None


def _begin(
    config: ModelConfig,
    remaining: jax.Array,
    seeds: jax.Array,
    stop_ids: jax.Array,
    sampling: Sampling,
    length: int,
) -> tuple[decoding.DecodeState, jax.Array]:
    """An empty state, and the last hidden states before a prompt."""
    state = decoding.init_state(config, remaining, row_keys(seeds), stop_ids, sampling, length)
    return state, jnp.zeros((len(remaining), config.d_model), config.activation_dtype)


def _first_token(
    params: Params,
    config: ModelConfig,
    remaining: jax.Array,
    seeds: jax.Array,
    stop_ids: jax.Array,
    sampling: Sampling,
    tokens: jax.Array,
    counts: jax.Array,
    length: int,
    **options: Any,
) -> tuple[decoding.DecodeState, decoding.Emitted]:
    """All up to the first token for prompts of one chunk."""
    state, hidden = _begin(config, remaining, seeds, stop_ids, sampling, length)
    state, hidden = decoding.prefill(params, config, state, hidden, tokens, counts)
    return decoding.emit(params, config, state, hidden, **options)


def _check_kernels(kernels: str, device: jax.Device) -> None:
    if kernels not in get_args(Kernels):
        raise RequestError(f"kernels is {kernels!r}; expected {', '.join(get_args(Kernels))}")
    with jax.default_device(device):
        if kernels == "mosaic_gpu" and not on_hopper():
            raise RequestError(f"kernels is {kernels!r}, which needs an NVIDIA Hopper GPU and jax 0.11.2 or newer")


def attention_is_fused(config: ModelConfig, device: jax.Device, kernels: Kernels = "auto") -> bool:
    """Whether attention runs on a kernel that keeps its scores to itself."""
    if kernels == "xla" or config.activation_dtype != jnp.bfloat16 or config.head_dim not in HEAD_WIDTHS:
        return False
    with jax.default_device(device):
        return on_hopper()


def load(
    model: str | PathLike[str] = hub.DEFAULT_MODEL,
    weights: Literal["auto", "int8", "bf16", "f32"] = "auto",
    kv_cache: str = "full",
    context: int | None = None,
    device: Literal["cpu", "gpu"] | None = None,
    kernels: Kernels = "auto",
    progress: bool = False,
) -> LanguageModel:
    """Load a model from a GGUF file.

    Args:
      model: a path, `hf://OWNER/REPO/FILE.gguf`, or a short name of `hub.MODELS`; fetched first if need be.
      weights: the format of matrices. auto: float32 on a CPU, where it is fastest, if it fits in half the memory;
        elsewhere int8, or bf16 for a file that holds nothing smaller than 16 bits.
      kv_cache: the cache policy, "full" or another of `CachePolicy`.
      context: the most tokens of a row; None: the model's own.
      device: "cpu" or "gpu"; None: JAX's default.
      kernels: "auto": the fastest, which on an NVIDIA Hopper GPU are the hand-written ones, and a single one for the
        whole step of up to eight rows, for which a second copy of the weights is made if memory is ample;
        "mosaic_gpu": those of the ops alone; "xla": none.
      progress: show downloading and loading on stderr.

    Raises:
      RequestError: for a value that is not one of these, a context longer than the model's, or kernels that cannot run.
      GGUFError: if the file is malformed or holds what is not supported.
      CapacityError: if the weights do not fit the device.
      DownloadError: if the file cannot be fetched.
    """
    start = time.perf_counter()
    if weights not in ("auto", "int8", "bf16", "f32"):
        raise RequestError(f"weights is {weights!r}; expected auto, int8, bf16 or f32")
    if device != "cpu":
        wake()
    if device is not None or kernels != "auto":  # what may be impossible is told before anything is fetched
        _check_kernels(kernels, select_device(device))
    file, config = inspect(model, context, progress)
    tokenizer = Tokenizer.from_gguf(file)  # while the device starts
    if tokenizer.vocab_size > config.vocab_size:
        raise GGUFError(
            f"{file.path}: tokenizer.ggml.tokens has {tokenizer.vocab_size} entries; expected at most the "
            f"{config.vocab_size} rows of 'token_embd.weight'"
        )
    target = select_device(device)
    chosen = choose_weights(weights, matrix_types(file), config, target)
    config = replace(configure(config, chosen, target), cache=CachePolicy.parse(kv_cache))
    config = replace(config, known_tokens=tokenizer.known_tokens, stop_ids=tokenizer.stop_ids)
    smaller = "weights='int8' would need " + human_bytes(config.weight_bytes("int8")) if chosen != "int8" else ""
    what = f"{file.path.name} as {chosen}"
    check_fits(config.weight_bytes(chosen), target, what, lambda _: smaller or "use a smaller model")
    programs.enable_caches()
    with memory_errors(target):
        params = load_params(file, config, chosen, target, progress)
    return LanguageModel(
        config, params, tokenizer, ChatTemplate.from_gguf(file),
        context=context or config.context_length, weights=chosen, device=target, kernels=kernels,
        load_s=time.perf_counter() - start,
    )  # fmt: skip


def inspect(
    model: str | PathLike[str], context: int | None = None, progress: bool = False
) -> tuple[GGUFFile, ModelConfig]:
    """Open a model's file and read its config, without its weights; arguments and errors as in `load`."""
    if context is not None and not (_is_whole(context) and context >= 1):
        raise RequestError(f"the context is {context!s:.80}; expected a whole number of at least 1")
    file = GGUFFile.open(hub.resolve(model, progress=progress))
    config = ModelConfig.from_gguf(file, context)
    if context is not None and context > config.context_length:
        raise RequestError(f"the context is {context}; expected at most the model's {config.context_length}")
    return file, config


def choose_weights(weights: str, types: Iterable[str], config: ModelConfig, device: jax.Device) -> WeightFormat:
    """Resolve "auto" as `load` describes, `types` being the GGML types of the file's matrices."""
    if weights != "auto":
        return weights  # type: ignore[return-value]  # checked by load
    if device.platform == "cpu" and config.weight_bytes("f32") <= available_bytes(device) // 2:
        return "f32"
    return "int8" if set(types) - {"F32", "F16", "BF16"} else "bf16"


def matrix_types(file: GGUFFile) -> set[str]:
    """The GGML types of a file's matrices."""
    return {tensor.type.name for tensor in file.tensors.values() if len(tensor.shape) > 1}


def configure(config: ModelConfig, weights: WeightFormat, device: jax.Device) -> ModelConfig:
    """The config with the activation dtype for a device: float32 on a CPU or with float32 weights, else bfloat16."""
    return replace(config, dtype="float32" if device.platform == "cpu" or weights == "f32" else "bfloat16")


def _temporary_bytes(program: jax.stages.Compiled) -> int:
    analysis: Any = program.memory_analysis()
    return analysis.temp_size_in_bytes if analysis is not None else 0
