"""Make the Performance Guide's tables and plots out of measurements; `--run` makes those first.

Every table of bench/README.md between `<!-- begin NAME -->` and `<!-- end NAME -->` is written from the JSON files in
bench/results, and so are the plots beside them. `--run` adds measurements of a model or preset on this device: one file
a benchmark, named after benchmark, model, weights and device, which replaces an older one.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from bench import common
from orcd_jax.arguments import Parser
from orcd_jax.config import ModelConfig
from orcd_jax.device import PEAK_BANDWIDTH
from orcd_jax.errors import RequestError
from orcd_jax.profile import COMPONENTS

Result = dict[str, Any]

GUIDE = Path(__file__).with_name("README.md")
RUNS = {
    "latency": (), "latency-guide": ("--guide",), "throughput": (), "throughput-guide": ("--guide",), "memory": (),
    "full_context": ("--tiny",), "breakdown": (), "compare": (), "kernels": (), "startup": (), "cache_policies": (),
}  # fmt: skip


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--run", nargs="*", metavar="NAME", choices=RUNS, help=f"measure first: {', '.join(RUNS)} (none: all of them); "
        "what else is given, as --preset, is passed on",
    )  # fmt: skip
    parser.add_argument("--results", type=Path, default=Path(__file__).with_name("results"), help="(%(default)s)")
    parser.add_argument("--guide", type=Path, default=GUIDE, help="whose tables to write (%(default)s)")
    args, passed_on = parser.parse_known_args()
    if args.run is None and passed_on:
        parser.error(f"without --run nothing is measured: {' '.join(passed_on)}")
    failed = (
        [name for name in args.run or RUNS if not run(name, passed_on, args.results)] if args.run is not None else []
    )
    results = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(args.results.glob("*.json"))]
    if not results:
        raise RequestError(f"{args.results} holds no results (*.json)")
    guide = args.guide.read_text(encoding="utf-8")
    for name, make in TABLES.items():
        table = make([result for result in results if result["bench"] == name or name in MIXED])
        guide = between(guide, name, table)
    args.guide.write_text(guide, encoding="utf-8")
    plots(results, args.results)
    print(f"{len(results)} results into {args.guide}")
    if failed:
        raise RequestError(f"these have failed: {', '.join(failed)}")


def run(name: str, passed_on: list[str], folder: Path) -> bool:
    """Run one benchmark in a process of its own and keep its result; False if it failed."""
    if name in ("startup", "cache_policies") and any(arg.startswith("--preset") for arg in passed_on):
        return True  # they need a real file
    if name == "full_context" and not any(arg.startswith("--preset") for arg in passed_on):
        return True  # it needs a preset
    if name == "kernels":  # of no one model
        passed_on = [arg for arg in passed_on if arg == "--quick"]
    command = [sys.executable, "-m", f"bench.{name.removesuffix('-guide')}", *RUNS[name], *passed_on]
    print("$", *command[1:], flush=True)
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        line = ""
        for line in process.stdout:
            if not line.startswith("{"):
                print(line, end="", flush=True)
    if process.returncode:
        return False
    result = json.loads(line)
    folder.mkdir(parents=True, exist_ok=True)
    parts = (name, result.get("model", ""), result.get("weights", ""), result["device"])
    common.write(result, folder / f"{'_'.join(filter(None, map(slug, parts)))}.json")
    return True


def slug(text: str) -> str:
    """A text as a part of a file's name."""
    return re.sub(r"[^\w.]+", "-", text.lower())


def between(text: str, name: str, content: str) -> str:
    """Replace what stands between a table's marks."""
    begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
    if text.count(begin) != 1 or text.count(end) != 1:
        raise SystemExit(f"{GUIDE.name} lacks the marks of {name!r}")
    head, _, rest = text.partition(begin)
    return f"{head}{begin}\n{content}\n{end}{rest.partition(end)[2]}"


# Tables


def grid(columns: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    """A Markdown table."""
    head = list(columns)
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(str(cell) for cell in line)} |" for line in lines)


def where(result: Result) -> str:
    """What a table was measured on."""
    model = f"{result['model']}, {result['weights']}; " if result.get("weights") else ""
    bandwidth = f"; reads {result['read_bytes_s'] / 1e9:,.1f} GB/s" if "read_bytes_s" in result else ""
    rate = f", multiplies {result['matmul_flops_s'] / 1e12:,.2f} TFLOP/s" if "matmul_flops_s" in result else ""
    note = f"; {result['note']}" if "note" in result else ""
    return f"**{model}{result['device']}** (jax {result['jax']}, {result['date']}{bandwidth}{rate}{note})\n"


def when(result: Result) -> str:
    """What a line of a table was measured with; the device has a column."""
    return f"jax {result['jax']}, {result['date']}"


def ranged(values: dict[str, float], factor: float = 1.0, digits: int = 1) -> str:
    """A median with its range."""
    median, low, high = (f"{values[key] * factor:,.{digits}f}" for key in ("median", "min", "max"))
    return f"{median} ({low} to {high})" if low != high else median


def sections(make: Callable[[Result], str]) -> Callable[[list[Result]], str]:
    """One table a result, each with what it was measured on."""
    return lambda results: "\n\n".join(f"{where(result)}\n{make(result)}" for result in results) or "Not measured yet."


@sections
def latency(result: Result) -> str:
    if "guide" in result:
        guide = result["guide"]
        return (
            f"The first guide's benchmark ({guide['iterations']} requests of 5 + 10 tokens): "
            f"{guide['latency_s'] * 1e3:.1f} ms a request, {guide['requests_s']:.1f} requests/s, "
            f"{guide['tok_s']:.1f} tok/s."
        )
    requests = grid(
        ("batch", "prompt", "sampling", "first token, ms", "prefill, tok/s", "decoding, tok/s", "share of its ceiling"),
        (
            (
                row["batch"], row["prompt_tokens"], row["sampling"], ranged(row["ttft_s"], 1e3),
                f"{row['prefill_tok_s']['median']:,.0f}", ranged(row["decode_tok_s"]),
                f"{row['decode_tok_s']['median'] / row['ceiling_tok_s']:.0%}",
            )
            for row in result["requests"]
        ),
    )  # fmt: skip
    steps = grid(
        ("tokens in the cache", "a decode step, ms", "least by bytes, ms", "share"),
        (
            (
                row["cache_tokens"], ranged(row["step_s"], 1e3, 3), f"{row['ceiling_s'] * 1e3:.3f}",
                f"{row['ceiling_s'] / row['step_s']['median']:.0%}",
            )
            for row in result["steps"]
        ),
    )  # fmt: skip
    return f"{requests}\n\n{steps}" if result["steps"] else requests


@sections
def throughput(result: Result) -> str:
    if "guide" in result:
        guide = result["guide"]
        return (
            "The first guide's benchmark (prompts of 5, 20 new tokens): "
            f"{guide['sequential_tok_s']:.1f} tok/s one after another, {guide['together_tok_s']:.1f} tok/s as one call."
        )
    return grid(
        ("batch", "requests", "mean prompt", "whole requests, tok/s", "decoding, tok/s", "ceiling", "share"),
        (
            (
                row["batch"], row["requests"], row["mean_prompt"], ranged(row["tok_s"]), ranged(row["decode_tok_s"]),
                f"{row['ceiling_tok_s']:,.0f}", f"{row['decode_tok_s']['median'] / row['ceiling_tok_s']:.0%}",
            )
            for row in result["rows"]
        ),
    )  # fmt: skip


@sections
def memory(result: Result) -> str:
    table = grid(
        ("cache", "bytes", "by the formula", "decode's temporaries", f"prefill's, {result['chunk']} tokens",
         "by the formula"),
        (
            (
                row["cache_tokens"], f"{row['cache_bytes']:,}", f"{row['cache_formula_bytes']:,}",
                f"{row['decode_temporary']:,}", f"{row['prefill_temporary']:,}", f"{row['workspace_formula_bytes']:,}",
            )
            for row in result["rows"]
        ),
    )  # fmt: skip
    more = result.get("packed_bytes", 0)  # younger than some results
    packed = f", and {more:,} of a copy for the decode step's kernel" if more else ""
    text = (
        f"Weights {result['weights_bytes']:,} bytes (formula {result['weights_formula_bytes']:,}){packed}; "
        f"{result['kv_bytes_per_token']:,} bytes of cache a token and row."
    )
    if "loading" in result:
        loading = result["loading"]
        seconds, tensors = (ranged(loading[key], digits=2) for key in ("load_s", "tensors_s"))
        text += (
            f" Loading {loading['file_bytes']:,} bytes of file: {seconds} s, the tensors alone {tensors} s, "
            f"{loading['bytes_s'] / 1e9:.2f} GB/s; {loading['host_bytes']:,} bytes of the host's memory at most."
        )
    peak = "of the process" if result["device"].startswith("CPU") else "in use on the device"
    text += f" At most {result['peak_bytes']:,} bytes {peak}." if result.get("peak_bytes") else ""
    return f"{text}\n\n{table}"


def full_context(results: list[Result]) -> str:
    columns = (
        "model", "device", "context", "seconds, of which compiling", "cache, bytes", "temporaries at half of it",
        "at all of it", "by the formula", "measured with",
    )  # fmt: skip
    return grid(
        columns,
        (
            (
                f"{result['model']}{', made tiny' if result['tiny'] else ''}", result["device"], result["context"],
                f"{result['seconds']:.1f} ({result['compile_s']:.1f})", f"{result['cache_bytes']:,}",
                *(f"{count:,}" for count in result["temporaries"]), f"{result['workspace_formula_bytes']:,}",
                when(result),
            )
            for result in results
        ),
    )  # fmt: skip


@sections
def breakdown(result: Result) -> str:
    parts = []
    titles = {
        "prefill": f"Prefill, {result['batch']} x {result['prompt_tokens']} tokens",
        "decode": f"A decode step, batch {result['batch']}, {result['cache_tokens']} tokens in the cache",
    }
    for phase, title in titles.items():
        if phase not in result:
            continue
        found = result[phase]
        rows = []
        for row in found["components"]:
            if not row["seconds"]:
                continue
            cells = [
                row["name"],
                f"{row['seconds'] * 1e3:.3f}",
                f"{row['seconds'] / found['traced_s']:.1%}",
                "",
                "",
                "",
            ]
            if row["read_bytes"] and row["seconds"]:
                least = max(row["read_bytes"] / result["read_bytes_s"], row["flops"] / result["matmul_flops_s"])
                cells[3:] = (
                    f"{row['read_bytes'] / 1e6:,.2f}", f"{row['read_bytes'] / row['seconds'] / 1e9:,.1f}",
                    f"{least / row['seconds']:.0%}",
                )  # fmt: skip
            rows.append(cells)
        rows.append(["**total**", f"**{found['traced_s'] * 1e3:.3f}**", "100%", "", "", ""])
        table = grid(("component", "time, ms", "share", "MB", "GB/s", "share of its ceiling"), rows)
        of = f", one of {found['steps']} in a program" if found["steps"] > 1 else ""
        time = f"{found['untraced_s'] * 1e3:.3f} ms without the profiler (±{found['spread']:.1%})"
        parts.append(f"{title}{of}: {time}.\n\n{table}")
    return "\n\n".join(parts)


@sections
def kernels(result: Result) -> str:
    rows = []
    for row in result["rows"]:
        if "failed" in row:
            rows.append((row["op"], row["shape"], row["implementation"], "", row["failed"][:60], "", "", "", ""))
            continue
        of_baseline = row.get("of_baseline")
        rows.append(
            (
                row["op"], row["shape"], row["implementation"],
                "" if row.get("error") is None else f"{row['error']:.1e}",
                ranged(row["seconds"], 1e6), f"{row['bytes_s'] / 1e9:,.0f}" if "bytes_s" in row else "",
                f"{row['of_ceiling']:.0%}", "" if of_baseline is None else f"{of_baseline:.2f} x {row['baseline']}",
                row["target"],
            )
        )  # fmt: skip
    columns = ("op", "shape", "implementation", "error", "µs", "GB/s", "of the ceiling", "speed", "target")
    return grid(columns, rows)


@sections
def compare(result: Result) -> str:
    first, *_ = result["rows"]
    return grid(
        ("", f"prefill of {result['prompt_tokens']}, tok/s", "decoding, tok/s", "orcd_jax is faster by"),
        (
            (
                row["engine"], f"{row['prefill_tok_s']:,.0f}", f"{row['decode_tok_s']:,.1f}",
                " / ".join(f"{first[key] / row[key]:.2f}" for key in ("prefill_tok_s", "decode_tok_s")),
            )
            for row in result["rows"]
        ),
    )  # fmt: skip


def startup(results: list[Result]) -> str:
    return grid(
        ("file", "device", "first start, s", "later starts, s", "measured with"),
        (
            (
                result["model"], result["device"], f"{result['first_start_s']:.1f}", ranged(result["later_start_s"]),
                when(result),
            )
            for result in results
        ),
    )  # fmt: skip


@sections
def cache_policies(result: Result) -> str:
    full = result["rows"][0]
    return f"{result['tokens']:,} tokens\n\n" + grid(
        ("policy", "perplexity", "against full", "bytes held"),
        (
            (
                f"`{row['policy']}`", f"{row['perplexity']:.3f}", f"{row['perplexity'] / full['perplexity'] - 1:+.2%}",
                f"{row['bytes']:,}",
            )
            for row in result["rows"]
        ),
    )  # fmt: skip


_KEYS = ("model", "weights", "device")


def overview(results: list[Result]) -> str:
    """A line for each model, format and device whose latency was measured."""
    rows = []
    single: dict[tuple[str, ...], list[Result]] = {}
    for result in (r for r in results if r["bench"] == "latency" and "requests" in r):
        of_run = {"measured": when(result), "sizes": (result["weights_bytes"], result["kv_bytes_per_token"])}
        requests = [row | of_run for row in result["requests"] if kind(row)[::2] == (1, "greedy")]
        if requests:
            single.setdefault(tuple(result[key] for key in _KEYS), []).extend(requests)
    for of, requests in single.items():
        short = min(requests, key=lambda row: row["prompt_tokens"])
        usual = min(requests, key=lambda row: abs(row["prompt_tokens"] - 128))
        rows.append(
            (
                *of,
                f"{usual['sizes'][0] / 1e6:,.0f}", f"{usual['sizes'][1]:,}",
                f"{short['ttft_s']['median'] * 1e3:.1f} ({short['prompt_tokens']} tokens)",
                f"{1e3 / usual['decode_tok_s']['median']:.2f}", f"{usual['decode_tok_s']['median']:,.1f}",
                f"{usual['decode_tok_s']['median'] / usual['ceiling_tok_s']:.0%}", usual["measured"],
            )
        )  # fmt: skip
    columns = ("model", "weights", "device", "weights, MB", "cache, bytes a token", "first token, ms", "ms a token",
               "tok/s", "share of its ceiling", "measured with")  # fmt: skip
    return grid(columns, rows)


def strategies(results: list[Result]) -> str:
    """What each way of going faster or smaller gave, where it was measured with and without."""
    rows: list[tuple[str, ...]] = []

    def add(what: str, of: str, result: Result, gave: str) -> None:
        rows.append((what, of, result["device"], gave, when(result)))

    latencies = [r for r in results if r["bench"] == "latency" and "requests" in r]
    for result in latencies:
        of_model = [r for r in latencies if all(r[key] == result[key] for key in ("model", "device"))]
        for other in (r for r in of_model if result["weights"] == "int8" != r["weights"]):
            plain = {kind(row): row for row in other["requests"]}
            for row in (row for row in result["requests"] if kind(row) in plain):
                batch, prompt, sampling = kind(row)
                gain = row["decode_tok_s"]["median"] / plain[kind(row)]["decode_tok_s"]["median"]
                add(f"int8 weights in place of {other['weights']}", result["model"], result,
                    f"{gain:.2f} x tokens a second (batch {batch}, prompt {prompt}, {sampling})")  # fmt: skip
    for result in (r for r in results if r["bench"] == "throughput" and "rows" in r):
        one = next((row for row in result["rows"] if row["batch"] == 1), None)
        best = max(result["rows"], key=lambda row: row["tok_s"]["median"])
        if one is not None:
            gain = best["tok_s"]["median"] / one["tok_s"]["median"]
            add(f"batches of {best['batch']}", f"{result['model']}, {result['weights']}", result,
                f"{gain:.1f} x tokens a second in all")  # fmt: skip
    for result in (r for r in results if r["bench"] == "kernels"):
        found = {(row["op"], row["shape"], row["implementation"]): row for row in result["rows"] if "seconds" in row}
        for (op, shape, implementation), row in found.items():
            plain = found.get((op, shape, "xla"))
            if implementation != "xla" and row.get("baseline") == "separate" != implementation:
                add(f"{op} fused", shape, result, f"{row['of_baseline']:.2f} x as fast as its parts")
            if implementation != "xla" and plain is not None and row["implementation"] != row.get("baseline"):
                gain = plain["seconds"]["median"] / row["seconds"]["median"]
                add(f"{op} as a {implementation} kernel", shape, result, f"{gain:.2f} x as fast as XLA's")
    for result in (r for r in results if r["bench"] == "cache_policies"):
        full = result["rows"][0]
        for row in result["rows"][1:]:
            smaller = full["bytes"] / row["bytes"]
            loss = row["perplexity"] / full["perplexity"] - 1
            add(f"`{row['policy']}` cache", result["model"], result,
                f"{smaller:.1f} x fewer bytes, perplexity {loss:+.2%}")  # fmt: skip
    return grid(("what", "model or shape", "device", "it gave", "measured with"), rows)


def kind(request: Result) -> tuple[int, int, str]:
    """Requests of the same kind can be compared."""
    return request["batch"], request["prompt_tokens"], request["sampling"]


def hardware(results: list[Result]) -> str:
    """Ceilings by formula: data-sheet bandwidth over the bytes of a step. None of it is measured."""
    presets = [ModelConfig.from_preset(name) for name in ("qwen2.5-0.5b", "phi-3-mini-4k")]
    return grid(
        ("GPU (data sheet)", "GB/s", *(f"{config.name}, {w}" for config in presets for w in ("int8", "bf16"))),
        (
            (
                name, f"{bandwidth / 1e9:,.0f}",
                *(f"{bandwidth / config.step_bytes(w):,.0f}" for config in presets for w in ("int8", "bf16")),
            )
            for name, bandwidth in PEAK_BANDWIDTH.items()
        ),
    )  # fmt: skip


def rooflines(results: list[Result]) -> str:
    """The plots that `roofline` makes of breakdowns."""
    devices = dict.fromkeys(result["device"] for result in results if result["bench"] == "breakdown")
    return "\n".join(f"![roofline, {device}](results/{roofline_name(device)})" for device in devices)


def roofline_name(device: str) -> str:
    """The file of a device's plot."""
    return f"roofline_{slug(device)}.png"


MIXED = ("overview", "rooflines", "strategies", "hardware")  # made of several benchmarks' results
TABLES: dict[str, Callable[[list[Result]], str]] = {
    "overview": overview, "breakdown": breakdown, "rooflines": rooflines, "memory": memory,
    "full_context": full_context, "strategies": strategies, "latency": latency, "throughput": throughput,
    "startup": startup, "cache_policies": cache_policies, "compare": compare, "hardware": hardware, "kernels": kernels,
}  # fmt: skip


# Plots


def plots(results: list[Result], folder: Path) -> None:
    """Component bars, a roofline and the batch curves, for whatever was measured."""
    broken_down = [r for r in results if r["bench"] == "breakdown"]
    if broken_down:
        bars = [(f"{r['model']}, {r['weights']}\n{r['device'][:24]}, {phase}", r[phase])
                for r in broken_down for phase in ("prefill", "decode") if phase in r]  # fmt: skip
        height = 1.5 + 0.5 * len(bars)
        axes = common.axes("share of the time", "", "where a step's time goes", height)
        left = [0.0] * len(bars)
        shares = [{row["name"]: row["seconds"] / found["traced_s"] for row in found["components"]} for _, found in bars]
        for index, name in enumerate(COMPONENTS):
            widths = [share.get(name, 0.0) for share in shares]
            colour = {"sampling": "black", "rest": "lightgrey", "gaps": "whitesmoke"}.get(name, f"C{index}")
            axes.barh([label for label, _ in bars], widths, left=left, label=name, color=colour)
            left = [a + b for a, b in zip(left, widths, strict=True)]
        axes.legend(fontsize=7, ncol=4, loc="upper center", bbox_to_anchor=(0.3, -0.7 / height))
        common.save(axes, folder / "components.png")
    for device in {r["device"] for r in broken_down}:
        roofline([r for r in broken_down if r["device"] == device], folder)
    curves = [r for r in results if r["bench"] == "throughput" and "rows" in r]
    if curves:
        axes = common.axes("batch", "tokens a second, whole requests", "many prompts of mixed length")
        for result in curves:
            label = f"{result['model']}, {result['weights']}, {result['device'][:24]}"
            sizes = [row["batch"] for row in result["rows"]]
            (line,) = axes.plot(sizes, [row["tok_s"]["median"] for row in result["rows"]], "o-", label=label)
            axes.plot(sizes, [row["ceiling_tok_s"] for row in result["rows"]], "--", color=line.get_color(), alpha=0.5)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.legend(fontsize=7, title="dashed: the ceiling of decoding", title_fontsize=7)
        common.save(axes, folder / "batches.png")


def roofline(results: list[Result], folder: Path) -> None:
    """Each component's operations a second over its operations a byte, under the device's two ceilings."""
    first = results[0]
    axes = common.axes("operations a byte", "operations a second", f"roofline: {first['device']}")
    intensities = [10 ** (n / 10) for n in range(-5, 40)]
    roof = [min(x * first["read_bytes_s"], first["matmul_flops_s"]) for x in intensities]
    axes.plot(intensities, roof, color="grey", label="measured ceilings")
    for result, phase in ((r, phase) for r in results for phase in ("prefill", "decode") if phase in r):
        rows = [row for row in result[phase]["components"] if row["flops"] and row["seconds"]]
        points = [(row["flops"] / row["read_bytes"], row["flops"] / row["seconds"]) for row in rows]
        axes.plot(*zip(*points, strict=True), "o", label=f"{result['model']}, {result['weights']}, {phase}")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.legend(fontsize=7)
    common.save(axes, folder / roofline_name(first["device"]))


if __name__ == "__main__":
    common.run(main)
