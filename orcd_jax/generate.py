"""The command line: `python -m orcd_jax.generate --prompt TEXT`.

Text goes to stdout as it is made, everything else to stderr. Exit status: 0; 2 for a mistake in what was asked, with
one line that says what is wrong and what to do; 130 when interrupted, with what was generated kept.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import re
import secrets
import signal
import sys
import threading
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from orcd_jax.arguments import Parser
from orcd_jax.errors import OrcdJaxError, RequestError

if TYPE_CHECKING:
    from orcd_jax.language_model import Completion, LanguageModel
    from orcd_jax.sampling import Sampling

_T = TypeVar("_T")

_INTERRUPTED = 130  # as a shell reports a process that Ctrl-C has ended
DEFAULT_MODEL = "smollm2-135m-instruct"


class _Interrupts:
    """Makes Ctrl-C a KeyboardInterrupt that neither gets lost nor does harm.

    In a callback (JAX has one in the garbage collector), Python or C++ reports the exception and goes on; hence it is
    raised again at the next step of the work. In the middle of loading an extension module it can crash the process;
    hence it waits there.
    """

    def __init__(self) -> None:
        self.pending = self._holding = False

    def __enter__(self) -> _Interrupts:
        self._hook, sys.unraisablehook = sys.unraisablehook, self._unraisable
        if threading.current_thread() is threading.main_thread():
            self._handler = signal.signal(signal.SIGINT, self._interrupt)
        return self

    def __exit__(self, *_: object) -> None:
        sys.unraisablehook = self._hook
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, self._handler)

    def _interrupt(self, *_: object) -> None:
        self.pending = True
        if not self._holding:
            raise KeyboardInterrupt

    def _unraisable(self, unraisable: Any) -> None:
        if unraisable.exc_type is not KeyboardInterrupt:
            self._hook(unraisable)

    def check(self) -> None:
        """Raise what got lost."""
        if self.pending:
            raise KeyboardInterrupt

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Interrupt after the block."""
        self._holding = True
        try:
            yield
        finally:
            self._holding = False
        self.check()

    def watch(self, steps: Iterable[_T]) -> Iterator[_T]:
        """The same steps, with a check after each."""
        for step in steps:
            yield step
            self.check()


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="orcd-jax",
        description="Generate text with a small language model from a GGUF file, compiled by XLA.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("-m", "--model", default=DEFAULT_MODEL, help="a .gguf path, hf://OWNER/REPO/FILE.gguf, or a short name: "
        "smollm2-135m-instruct, qwen2.5-0.5b-instruct, phi-3-mini-4k-instruct, phi-3-mini-4k-instruct-fp16 "
        "(default: %(default)s)")  # fmt: skip

    what = parser.add_argument_group("what to complete (one of these)").add_mutually_exclusive_group()
    what.add_argument("-p", "--prompt", metavar="TEXT", help="a prompt")
    what.add_argument("-f", "--file", help="a file with a prompt; - for stdin")
    what.add_argument("--messages", metavar="JSON", help='a file with a conversation, [{"role": ..., "content": ...}]')
    what.add_argument("--batch-file", metavar="JSONL", help="a file with a prompt a line: a string, or an object with "
        "prompt or messages, and max_new_tokens, seed, temperature, top_k, top_p, min_p or repeat_penalty of its own; "
        "prints a JSON object a line, in order")  # fmt: skip
    what.add_argument("-i", "--interactive", action="store_true", help="a conversation, line by line")
    add("--system", metavar="TEXT", help="a system message")
    add("--raw", action="store_true", help="complete the text as it is, without the file's chat template")

    how = parser.add_argument_group("how")
    how.add_argument("-n", "--max-new-tokens", type=int, default=128, metavar="N", help="default: %(default)s")
    how.add_argument("--temperature", type=float, default=0.8, help="0: greedy (default: %(default)s)")
    how.add_argument("--top-k", type=int, default=40, help="0: all (default: %(default)s)")
    how.add_argument("--top-p", type=float, default=0.95, help="1: all (default: %(default)s)")
    how.add_argument("--min-p", type=float, default=0.05, help="0: all (default: %(default)s)")
    how.add_argument("--repeat-penalty", type=float, default=1.0, help="1: none (default: %(default)s)")
    how.add_argument("--seed", type=int, help="0 to 2^32 - 1; drawn and reported if absent")
    how.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before this text; repeatable")
    how.add_argument("--ignore-eos", action="store_true", help="do not end at the model's stop tokens")
    how.add_argument("--logprobs", type=int, metavar="K",
        help="report log-probabilities, with those of the K likeliest (with --json or --batch-file)")  # fmt: skip

    run = parser.add_argument_group("running")
    run.add_argument("--weights", choices=("auto", "int8", "bf16", "f32"), default="auto",
        help="format of the weights; auto: f32 on a CPU if it fits, else as the file is, 8 or 16 bits")  # fmt: skip
    run.add_argument(
        "--kv-cache",
        default="full",
        metavar="POLICY",
        help="full (default), int8, sliding:W, sliding:W:SINKS, sliding:W+int8, or compress:W",
    )
    run.add_argument(
        "-c", "--context", type=int, metavar="N", help="most tokens, prompt included; default: the model's"
    )
    run.add_argument("--kernels", choices=("auto", "xla", "mosaic_gpu"), default="auto",
        help="auto: the fastest, on an NVIDIA Hopper GPU hand-written ones and one for the whole decode step of up "
        "to eight prompts; mosaic_gpu: without that one; xla: none of them")  # fmt: skip
    run.add_argument("--device", choices=("cpu", "gpu"), help="default: a GPU if JAX finds one")

    out = parser.add_argument_group("reports")
    out.add_argument("--json", action="store_true", help="print one JSON object in place of the text")
    out.add_argument("--estimate", action="store_true", help="print the bytes needed, without loading the weights")
    out.add_argument("--profile", metavar="DIR", help="write a profiler trace for xprof and Perfetto")
    out.add_argument("--xla-dump", metavar="DIR", help="write XLA's HLO, buffers and, on a GPU, thunks")
    out.add_argument("-q", "--quiet", action="store_true", help="no progress and no summary on stderr")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line with `argv` (default: the process's) and return its exit status."""
    parser = _parser()
    args = parser.parse_args(argv)
    given = args.prompt is not None or args.file or args.messages or args.batch_file or args.interactive
    if not given and not args.estimate:
        parser.error("nothing to complete: give --prompt, --file, --messages, --batch-file or --interactive")
    if args.logprobs is not None and not (args.json or args.batch_file):
        parser.error("--logprobs needs --json or --batch-file")
    if args.raw and (args.messages or args.system is not None):
        parser.error("--raw is without a chat template, which --messages and --system need")
    if args.interactive and args.json:
        parser.error("--interactive prints text, not --json")
    if args.messages and args.system is not None:
        parser.error("--messages has system messages of its own; leave out --system")

    _mend_streams()
    # What JAX reads when it starts.
    if args.device == "cpu":
        os.environ["JAX_PLATFORMS"] = "cpu"
    warnings.showwarning = lambda message, *_: _show_warning(message)
    interrupts = _Interrupts()
    try:
        if args.xla_dump:
            from orcd_jax.profiling import dump_xla

            dump_xla(args.xla_dump)
        with interrupts:
            status = _run(args, interrupts)
            sys.stdout.flush()  # here its errors can still be told
            return status
    except OrcdJaxError as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        if isinstance(error, BrokenPipeError):  # the reader has gone; nobody is left to tell
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 2
    except BaseException as error:
        if not interrupts.pending and not isinstance(error, KeyboardInterrupt):
            raise
        # The interruption, or what has become of it on its way through C++.
        print(file=sys.stderr)
        return _INTERRUPTED


def _show_warning(message: Warning | str) -> None:
    print(f"orcd-jax: warning: {message}", file=sys.stderr)
    # JAX writes an entry straight to its place, and would keep one that a full disk or a kill has cut off for ever.
    if damaged := re.match(r"Error reading persistent compilation cache entry for '(\w+)'", str(message)):
        from orcd_jax.hub import programs_dir

        with contextlib.suppress(OSError):
            for entry in programs_dir().glob(f"{damaged[1]}-*-cache"):
                entry.unlink(missing_ok=True)


def _mend_streams() -> None:
    """A stream that was closed (`>&-`) is as good as empty, and a `?` goes out for what its encoding lacks."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115 (until the process ends)
    _on_bad_text(sys.stdout, "replace")


def _on_bad_text(stream: Any, errors: str) -> None:
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors=errors)


def _run(args: argparse.Namespace, interrupts: _Interrupts) -> int:
    if args.estimate:
        return _estimate(args, interrupts)
    # Before the model is loaded, so that a mistake is told at once.
    prompt = _read(args.file) if args.file else args.prompt
    messages = _parse_messages(_read(args.messages), args.messages) if args.messages else None
    batch = _parse_batch(_read(args.batch_file), args.batch_file) if args.batch_file else None
    with interrupts.held():
        from orcd_jax.device import wake

        wake()  # beside the other imports
        from orcd_jax.language_model import check_values, load
    seed = secrets.randbits(32) if args.seed is None else args.seed
    sampling = _sampling(args)
    check_values(args.max_new_tokens, sampling, seed)
    for row in batch or ():
        with _line(args.batch_file, row):
            budget = row.get("max_new_tokens", args.max_new_tokens)
            check_values(budget, _sampling(args, **row), row.get("seed", seed))

    model = load(
        args.model, weights=args.weights, kv_cache=args.kv_cache, context=args.context, device=args.device,
        kernels=args.kernels,
        progress=not args.quiet and sys.stderr.isatty(),
    )  # fmt: skip
    options: dict[str, Any] = {
        "max_new_tokens": args.max_new_tokens, "stop": args.stop, "ignore_eos": args.ignore_eos,
        "logprobs": args.logprobs,
    }  # fmt: skip
    interrupts.check()
    with _profile(args.profile):
        if batch is not None:
            return _run_batch(args, model, batch, options, seed, interrupts)
        options |= {"sampling": sampling, "seed": seed}
        if args.interactive:
            return _converse(args, model, options, interrupts)
        ids = _encode(model, prompt, args.system, args.raw) if messages is None else model.encode_chat(messages)
        return _complete(args, model, ids, options, interrupts)


def _sampling(args: argparse.Namespace, **changes: Any) -> Sampling:
    from orcd_jax.sampling import Sampling

    names = ("temperature", "top_k", "top_p", "min_p", "repeat_penalty")
    return Sampling(**{name: changes.get(name, getattr(args, name)) for name in names})


def _profile(folder: str | None) -> contextlib.AbstractContextManager[None]:
    from orcd_jax.profiling import trace

    return trace(folder) if folder else contextlib.nullcontext()


def _read(path: str) -> str:
    try:
        if path == "-":
            _on_bad_text(sys.stdin, "strict")
            return sys.stdin.read()
        with open(path, encoding="utf-8-sig") as f:
            return f.read()
    except OSError as error:
        raise RequestError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise RequestError(f"{path}: is not UTF-8 text") from None


def _parse_messages(text: str, where: str) -> list[dict[str, str]]:
    try:
        return json.loads(text)  # its shape is checked where it is rendered
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{where}: is not JSON: {error}") from None


_ROW_NUMBERS = ("max_new_tokens", "seed", "temperature", "top_k", "top_p", "min_p", "repeat_penalty")


def _parse_batch(text: str, where: str) -> list[dict[str, Any]]:
    """The lines of a batch file as objects, each with `prompt` or `messages`."""
    rows = []
    for number, line in enumerate(text.split("\n"), 1):  # splitlines would end one at a U+2028 in a string
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise RequestError(f"{where}, line {number}: is not JSON: {error}") from None
        row = {"prompt": row} if isinstance(row, str) else row
        right = isinstance(row, dict) and ("prompt" in row) != ("messages" in row)
        if not right or not isinstance(row.get("prompt", ""), str):
            raise RequestError(f"{where}, line {number}: expected a string, or an object with prompt or messages")
        unknown = row.keys() - {"prompt", "messages", *_ROW_NUMBERS}
        if unknown:
            raise RequestError(f"{where}, line {number}: unknown key {min(unknown)!r}")
        for name in _ROW_NUMBERS:
            if name in row and (isinstance(row[name], bool) or not isinstance(row[name], int | float)):
                raise RequestError(f"{where}, line {number}: {name} is {row[name]!r}; expected a number")
        rows.append({**row, "line": number})
    return rows


@contextlib.contextmanager
def _line(where: str, row: dict[str, Any]) -> Iterator[None]:
    """Say in errors which line of a batch file they are about."""
    try:
        yield
    except OrcdJaxError as error:
        raise RequestError(f"{where}, line {row['line']}: {error}") from None


def _encode(model: LanguageModel, prompt: str, system: str | None, raw: bool) -> list[int]:
    """A prompt as it is, or as the user's turn in the file's template if it has one."""
    if raw or (model.template is None and system is None):
        if not prompt:
            raise RequestError("the prompt is empty; give some text")
        return model.encode_prompt(prompt)
    if not prompt:
        raise RequestError("the prompt is empty; give some text, or --raw for none of the template's")
    return model.encode_chat([*_system(system), {"role": "user", "content": prompt}])


def _system(text: str | None) -> list[dict[str, str]]:
    return [] if text is None else [{"role": "system", "content": text}]


def _complete(
    args: argparse.Namespace, model: LanguageModel, ids: list[int], options: dict[str, Any], interrupts: _Interrupts
) -> int:
    stream = model.stream(ids, **options)
    status = 0
    try:
        for piece in interrupts.watch(stream):
            if not args.json:
                print(piece, end="", flush=True)
    except KeyboardInterrupt:
        status = _INTERRUPTED
    completion = stream.completion
    if args.json:
        print(json.dumps(_report(args, model, completion), ensure_ascii=False), flush=True)
    else:
        print(flush=True)
    _summarize(args, model, [completion])
    return status


def _run_batch(
    args: argparse.Namespace,
    model: LanguageModel,
    batch: list[dict[str, Any]],
    options: dict[str, Any],
    seed: int,
    interrupts: _Interrupts,
) -> int:
    from tqdm import tqdm

    prompts = []
    for row in batch:
        with _line(args.batch_file, row):
            if "messages" in row:
                prompts.append(model.encode_chat(row["messages"]))
            else:
                prompts.append(_encode(model, row["prompt"], args.system, args.raw))
    options["max_new_tokens"] = [row.get("max_new_tokens", args.max_new_tokens) for row in batch]
    running = model.batch(
        prompts,
        sampling=[_sampling(args, **row) for row in batch],
        seed=[row.get("seed", seed) for row in batch],
        **options,
    )
    status = 0
    with tqdm(total=len(batch), unit="prompt", disable=args.quiet) as bar:
        try:
            for ended in interrupts.watch(running):
                bar.update(ended)
        except KeyboardInterrupt:
            status = _INTERRUPTED
    completions = running.completions
    for completion in completions:
        print(json.dumps(_report(args, model, completion), ensure_ascii=False))
    if completions:
        _summarize(args, model, completions)
    return status


def _converse(args: argparse.Namespace, model: LanguageModel, options: dict[str, Any], interrupts: _Interrupts) -> int:
    """Turns from stdin, one a line, until it ends; Ctrl-C ends an answer, and at the prompt the conversation."""
    messages = _system(args.system)
    _on_bad_text(sys.stdin, "replace")
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return 0
        if not line.strip():
            continue
        messages.append({"role": "user", "content": line})
        try:
            stream = model.stream(model.encode_prompt(line) if args.raw else model.encode_chat(messages), **options)
        except OrcdJaxError as error:  # most likely the context is full
            print(f"orcd-jax: error: {error}; this message is left out", file=sys.stderr)
            messages.pop()
            continue
        with contextlib.suppress(KeyboardInterrupt):
            for piece in interrupts.watch(stream):
                print(piece, end="", flush=True)
        interrupts.pending = False
        print(flush=True)
        completion = stream.completion
        messages.append({"role": "assistant", "content": completion.text})
        _summarize(args, model, [completion])


def _report(args: argparse.Namespace, model: LanguageModel, completion: Completion) -> dict[str, Any]:
    """The object of --json."""
    memory = model.memory()
    held = completion.prompt_tokens + len(completion.token_ids)
    report: dict[str, Any] = {
        "text": completion.text,
        "token_ids": completion.token_ids,
        "prompt_tokens": completion.prompt_tokens,
        "finish_reason": completion.finish_reason,
        "seed": completion.seed,
        "model": model.config.name,
        "weights": model.weights,
        "device": model.device.device_kind,
        "timings": vars(completion.timings),
        "memory": {
            "weights_bytes": memory["weights_bytes"],
            "kv_bytes": memory["kv_bytes_per_token"] * held,
            "peak_bytes": memory["peak_bytes"],
        },
        **_bandwidth(model, [completion]),
    }
    if completion.logprobs is not None:
        report["logprobs"] = [
            {"id": token, "logprob": entry.logprob, "top": [{"id": i, "logprob": p} for i, p in entry.top.items()]}
            for token, entry in zip(completion.token_ids, completion.logprobs, strict=True)
        ]
    return report


def _bandwidth(model: LanguageModel, completions: list[Completion]) -> dict[str, Any]:
    """Bytes a second that decoding read, weights and cache once a step, and its share of the device's peak."""
    from orcd_jax.device import peak_bandwidth

    rows = len(completions)
    held = sum(c.prompt_tokens + len(c.token_ids) / 2 for c in completions) / rows
    steps = completions[0].timings.decode_tok_s / rows
    achieved = model.config.step_bytes(model.weights, rows, round(held)) * steps
    peak = peak_bandwidth(model.device)
    return {"achieved_gb_s": achieved / 1e9, "share_of_peak": achieved / peak if peak else None}


def _summarize(args: argparse.Namespace, model: LanguageModel, completions: list[Completion]) -> None:
    if args.quiet:
        return
    t, new = completions[0].timings, sum(len(c.token_ids) for c in completions)
    bandwidth = _bandwidth(model, completions) if len(completions) == 1 else None
    rate = f"{t.decode_tok_s:.1f} tok/s"
    if bandwidth is not None:
        share = bandwidth["share_of_peak"]
        rate += f" ({bandwidth['achieved_gb_s']:.1f} GB/s{'' if share is None else f', {share:.0%} of peak'})"
    what = completions[0].finish_reason if len(completions) == 1 else f"{len(completions)} completions"
    print(
        f"[{sum(c.prompt_tokens for c in completions)} prompt + {new} new tokens, {what}, seed {completions[0].seed} | "
        f"{model.weights} on {model.device.device_kind} | load {t.load_s:.1f} s, compile {t.compile_s:.1f} s, "
        f"first token {t.ttft_s:.2f} s, {rate}]",
        file=sys.stderr,
    )


def _estimate(args: argparse.Namespace, interrupts: _Interrupts) -> int:
    """Print what the model would need, and whether it fits."""
    with interrupts.held():
        from orcd_jax.cache_policy import CachePolicy
        from orcd_jax.device import available_bytes, human_bytes, select_device
        from orcd_jax.language_model import attention_is_fused, choose_weights, configure, inspect, matrix_types

    device = select_device(args.device)
    file, config = inspect(args.model, args.context, progress=not args.quiet)
    weights = choose_weights(args.weights, matrix_types(file), config, device)
    config = replace(configure(config, weights, device), cache=CachePolicy.parse(args.kv_cache))
    context = args.context or config.context_length
    report = {
        "model": config.name,
        "weights": weights,
        "context": context,
        "weights_bytes": config.weight_bytes(weights),
        "kv_bytes_per_token": config.cache_bytes(1, 1),
        "kv_bytes": config.cache_bytes(1, context),
        "workspace_bytes": config.workspace_bytes(
            1, min(512, context), context, attention_is_fused(config, device, args.kernels)
        ),
        "available_bytes": available_bytes(device),
    }
    total = report["weights_bytes"] + report["kv_bytes"] + report["workspace_bytes"]  # type: ignore[operator]
    report["total_bytes"], report["fits"] = total, total <= report["available_bytes"]  # type: ignore[operator]
    if args.json:
        print(json.dumps(report))
        return 0
    print(f"{config.name}, weights {weights}, {context} tokens of context, on {device}")
    for label, key in (
        ("weights", "weights_bytes"), ("cache", "kv_bytes"), ("  a token", "kv_bytes_per_token"),
        ("workspace", "workspace_bytes"), ("total", "total_bytes"), ("available", "available_bytes"),
    ):  # fmt: skip
        print(f"{label:<12}{report[key]:>16,} bytes  {human_bytes(report[key]):>12}")  # type: ignore[arg-type]
    return 0


def run() -> NoReturn:
    """The command line as a process."""
    status = main()
    if status == _INTERRUPTED:
        # At once: JAX does not always survive being taken down in the middle of its work.
        with contextlib.suppress(OSError):
            sys.stdout.flush()
        os._exit(status)
    sys.exit(status)


if __name__ == "__main__":
    run()
