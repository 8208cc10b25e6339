"""The command line: what it prints where, and how it fails."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from orcd_jax import hub
from orcd_jax.generate import DEFAULT_MODEL, main
from orcd_jax.language_model import LanguageModel

ROOT = Path(__file__).parent.parent
ON_CPU = os.environ | {"JAX_PLATFORMS": "cpu"}


@pytest.fixture(scope="module")
def model(tiny):
    return str(tiny("qwen2"))


@pytest.fixture
def run(capsys, monkeypatch):
    """Runs the command line in this process and returns its status, stdout and stderr."""
    monkeypatch.setattr("warnings.showwarning", lambda *_: None)

    def call(*argv):
        try:
            status = main([str(a) for a in argv])
        except SystemExit as e:  # argparse's own way out
            status = e.code
        out, err = capsys.readouterr()
        return status, out, err

    return call


def process(*argv, env=(), **options):
    """The command line as a process of its own, on the CPU."""
    environment = ON_CPU | dict(env)
    return subprocess.Popen(
        [sys.executable, "-m", "orcd_jax.generate", *map(str, argv)], cwd=ROOT, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options,
    )  # fmt: skip


def test_text_on_stdout_summary_on_stderr(run, model):
    status, out, err = run("-m", model, "-p", "hello world", "-n", 12, "--seed", 5)
    assert status == 0 and out.endswith("\n") and len(out) > 1
    assert err.count("\n") == 1 and "seed 5" in err and "tok/s" in err
    assert run("-m", model, "-p", "hello world", "-n", 12, "--seed", 5)[1] == out
    assert run("-m", model, "-p", "hello world", "-n", 12, "--seed", 5, "-q")[1:] == (out, "")


def test_json_has_what_the_contract_says(run, model):
    status, out, _ = run("-m", model, "-p", "hello", "-n", 6, "--json", "--ignore-eos", "--logprobs", 2)
    report = json.loads(out)
    assert status == 0 and out.count("\n") == 1
    assert report["finish_reason"] == "length" and len(report["token_ids"]) == 6
    assert isinstance(report["text"], str) and report["prompt_tokens"] > 1 and 0 <= report["seed"] < 2**32
    assert report["timings"].keys() == {"load_s", "compile_s", "ttft_s", "decode_tok_s", "prefill_tok_s"}
    assert report["memory"].keys() == {"weights_bytes", "kv_bytes", "peak_bytes"}
    assert all(value > 0 for value in [*report["memory"].values(), report["achieved_gb_s"]])
    assert [entry["id"] for entry in report["logprobs"]] == report["token_ids"]
    assert all(len(entry["top"]) == 2 for entry in report["logprobs"])


def test_the_template_is_used_unless_raw(run, model):
    chat = json.loads(run("-m", model, "-p", "hello", "-n", 1, "--json")[1])
    raw = json.loads(run("-m", model, "-p", "hello", "-n", 1, "--json", "--raw")[1])
    system = json.loads(run("-m", model, "-p", "hello", "-n", 1, "--json", "--system", "be short")[1])
    assert raw["prompt_tokens"] < chat["prompt_tokens"] < system["prompt_tokens"]


def test_a_prompt_may_come_from_a_file_or_a_conversation(run, model, tmp_path):
    expected = run("-m", model, "-p", "hello\nyou", "-n", 8, "--temperature", 0)[1]
    (tmp_path / "prompt.txt").write_text("hello\nyou")
    assert run("-m", model, "-f", tmp_path / "prompt.txt", "-n", 8, "--temperature", 0)[1] == expected
    (tmp_path / "chat.json").write_text(json.dumps([{"role": "user", "content": "hello\nyou"}]))
    assert run("-m", model, "--messages", tmp_path / "chat.json", "-n", 8, "--temperature", 0)[1] == expected


def test_a_batch_file_gives_a_line_a_prompt_in_order(run, model, tmp_path):
    lines = ["hello", {"prompt": "the other one and more", "max_new_tokens": 3},
             {"messages": [{"role": "user", "content": "hello"}], "temperature": 0, "seed": 9}]  # fmt: skip
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(json.dumps(line) for line in lines) + "\n\n")
    status, out, err = run("-m", model, "--batch-file", path, "-n", 5, "--seed", 4, "--ignore-eos")
    rows = [json.loads(line) for line in out.splitlines()]
    assert status == 0 and [len(row["token_ids"]) for row in rows] == [5, 3, 5]
    assert [row["seed"] for row in rows] == [4, 4, 9] and "3/3" in err
    alone = json.loads(run("-m", model, "-p", "hello", "-n", 5, "--seed", 4, "--ignore-eos", "--json")[1])
    assert rows[0]["token_ids"] == alone["token_ids"]
    path.write_text("")
    assert run("-m", model, "--batch-file", path)[:2] == (0, "")


def test_text_files_may_come_from_anywhere(run, model, tmp_path):
    """With a byte order mark, line ends of DOS, and line separators of Unicode inside a text."""
    path = tmp_path / "prompts.jsonl"
    path.write_bytes('\ufeff"a\u2028b\x85c"\r\n"d"\r\n'.encode())
    status, out, _ = run("-m", model, "--batch-file", path, "-n", 2, "--ignore-eos")
    assert status == 0 and [len(json.loads(line)["token_ids"]) for line in out.splitlines()] == [2, 2]
    path.write_bytes("\ufeffhello".encode())
    expected = run("-m", model, "-p", "hello", "-n", 4, "--temperature", 0, "-q")
    assert run("-m", model, "-f", path, "-n", 4, "--temperature", 0, "-q") == expected


def test_what_stdout_cannot_express_becomes_a_question_mark(model):
    child = process(
        "-m", model, "-p", "hello", "-n", 64, "--seed", 1, "--ignore-eos", env={"PYTHONIOENCODING": "ascii"}
    )
    out, err = child.communicate(timeout=120)
    assert child.returncode == 0 and "Traceback" not in err
    assert "?" in out and out.isascii()


def test_streams_may_be_closed(model):
    for streams, is_printed in ((">&-", False), ("2>&-", True), (">&- 2>&- <&-", False)):
        command = f'exec "{sys.executable}" -m orcd_jax.generate -m "{model}" -p hello -n 3 --seed 1 {streams}'
        done = subprocess.run(command, shell=True, cwd=ROOT, env=ON_CPU, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0 and "Traceback" not in done.stderr
        assert bool(done.stdout) == is_printed


def test_a_conversation_survives_a_message_that_does_not_fit(model):
    child = process(
        "-m", model, "-i", "-n", 4, "--ignore-eos", stdin=subprocess.PIPE, env={"PYTHONIOENCODING": "utf-8"}
    )
    out, err = child.communicate("hello\n" + "word " * 3000 + "\nand you\n", timeout=120)
    assert child.returncode == 0 and "Traceback" not in err
    told = [line for line in err.splitlines() if "error" in line]
    assert len(told) == 1 and "context" in told[0] and "left out" in told[0]
    assert err.count("new tokens") == 2 and out.count("\n") >= 2


def test_a_conversation_reads_any_bytes(model):
    child = subprocess.Popen(
        [sys.executable, "-m", "orcd_jax.generate", "-m", model, "-i", "-n", "2", "-q"], cwd=ROOT,
        env=ON_CPU | {"PYTHONIOENCODING": "utf-8:strict"}, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )  # fmt: skip
    _, err = child.communicate(b"hi \xff\xfe\n", timeout=120)
    assert child.returncode == 0 and not err


def test_a_conversation_remembers(run, model, monkeypatch):
    lines = iter(["hello", "", "and you"])

    def answer(_):
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", answer)
    status, out, err = run("-m", model, "-i", "-n", 4, "--seed", 1, "--ignore-eos")
    assert status == 0 and len(err.splitlines()) == 2
    first, second = (int(line[1:].split()[0]) for line in err.splitlines())
    assert second > first + 4  # the second prompt holds the first turn and its answer
    assert out


def test_an_estimate_needs_no_weights(run, tiny):
    # A file whose tensors are there but whose values are not finite: only loading would notice.
    model = tiny("llama", tensor_types={"*": 8})
    status, out, _ = run("-m", model, "--estimate", "--json", "--weights", "int8", "-c", 64)
    report = json.loads(out)
    assert status == 0 and report["context"] == 64 and report["fits"] is True
    assert report["kv_bytes"] == 64 * report["kv_bytes_per_token"] == 64 * 2 * 3 * 2 * 16 * 4
    assert report["total_bytes"] == report["weights_bytes"] + report["kv_bytes"] + report["workspace_bytes"]
    assert "weights" in run("-m", model, "--estimate")[1]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ((), "nothing to complete"),
        (("-p", ""), "prompt is empty"),
        (("-p", "", "--raw"), "prompt is empty"),
        (("-p", "x", "-m", "no/such/file.gguf"), "no/such/file.gguf"),
        (("-p", "x", "-m", "no-such-name"), "smollm2-135m-instruct"),
        (("-p", "x", "-f", "y"), "not allowed with"),
        (("-f", "no/such/prompt.txt"), "no/such/prompt.txt"),
        (("--messages", "no/such.json"), "no/such.json"),
        (("--batch-file", "no/such.jsonl"), "no/such.jsonl"),
        (("-p", "x", "--weights", "int3"), "int3"),
        (("-p", "x", "--device", "tpu"), "tpu"),
        (("-p", "x", "--kv-cache", "none"), "none"),
        (("-p", "x", "--temperature", "warm"), "warm"),
        (("-p", "x", "--temperature", "nan"), "temperature is nan"),
        (("-p", "x", "--temperature", "-1"), "temperature is -1"),
        (("-p", "x", "--temperature", "1e39"), "temperature is 1e+39"),
        (("-p", "x", "--repeat-penalty", "1e-50"), "repeat_penalty is 1e-50"),
        (("-p", "x", "--top-k", "99999999999"), "top_k is 99999999999"),
        (("-p", "x", "--kv-cache", "compress:00"), "compress:00"),
        (("-p", "x", "--top-p", "0"), "top_p is 0.0"),
        (("-p", "x", "--top-k", "-1"), "top_k is -1"),
        (("-p", "x", "--seed", "-1"), "seed is -1"),
        (("-p", "x", "-n", "0"), "max_new_tokens is 0"),
        (("-p", "x", "--stop", ""), "stop text"),
        (("-p", "x", "-c", "0"), "context is 0"),
        (("-p", "x", "-c", "4096"), "context is 4096"),
        (("-p", "x y z " * 300), "more than the context"),
        (("-p", "x", "--logprobs", "2"), "--logprobs needs"),
        (("-p", "x", "--logprobs", "99", "--json"), "logprobs is 99"),
        (("-p", "x", "--raw", "--system", "y"), "--raw"),
        (("-i", "--json"), "--interactive"),
        (("-p", "x", "--no-such-option"), "--no-such-option"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(run, model, argv, message):
    if "-m" not in argv:
        argv = ("-m", model, *argv)
    status, out, err = run(*argv)
    assert (status, out) == (2, "")
    assert err.count("\n") == 1 and message in err and "Traceback" not in err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("not json", "line 1: is not JSON"),
        ('"fine"\n{"prompt": "x", "messages": []}', "line 2: expected"),
        ('{"prompt": "x", "top_q": 1}', "unknown key 'top_q'"),
        ('{"prompt": "x", "seed": "y"}', "seed is 'y'"),
        ('{"prompt": "x", "temperature": -1}', "line 1: temperature is -1"),
        ('"fine"\n{"prompt": "x", "temperature": 1' + "0" * 400 + "}", "line 2: temperature is 1000"),
        ('"fine"\n{"prompt": "x", "temperature": NaN}', "line 2: temperature is nan"),
        ('"fine"\n{"prompt": "x", "max_new_tokens": 1.5}', "line 2: max_new_tokens is 1.5"),
        ('"fine"\n{"prompt": "x", "seed": -1}', "line 2: seed is -1"),
        ('{"prompt": 5}', "line 1: expected"),
        ('"fine"\n\n""', "line 3: the prompt is empty"),
        ('{"messages": [{"role": "user"}]}', "line 1: message"),
        ("[1, 2]", "line 1: expected"),
    ],
)
def test_a_bad_batch_file_names_the_line(run, model, tmp_path, content, message):
    path = tmp_path / "prompts.jsonl"
    path.write_text(content)
    status, out, err = run("-m", model, "--batch-file", path, "-q")
    assert (status, out) == (2, "") and err.count("\n") == 1 and message in err


def test_a_file_that_is_no_gguf(run, tmp_path):
    path = tmp_path / "model.gguf"
    path.write_text("This is a text and no model at all.")
    status, _, err = run("-m", path, "-p", "x")
    assert status == 2 and "not a GGUF file" in err and err.count("\n") == 1


def test_an_unsupported_architecture(run, tiny):
    path = tiny("llama", metadata_overrides={"general.architecture": "mamba"})
    status, _, err = run("-m", path, "-p", "x")
    assert status == 2 and "'mamba'" in err and "llama, phi3, qwen2" in err


def test_the_default_model_of_the_help_is_the_hubs():
    assert DEFAULT_MODEL == hub.DEFAULT_MODEL and DEFAULT_MODEL in hub.MODELS


def test_help_is_quick_and_needs_no_jax():
    code = "import sys; from orcd_jax.generate import main\n"
    code += "try: main(['--help'])\nfinally: assert 'jax' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "--max-new-tokens" in done.stdout and not done.stderr


def test_interrupted_it_keeps_what_there_is_and_exits_130(tiny):
    model = tiny("llama", metadata_overrides={"llama.context_length": 1 << 15})
    child = process("-m", model, "-p", "hello", "-n", 1 << 14, "--raw", "--ignore-eos", "--seed", 1)
    first = child.stdout.read(1)  # it has begun
    child.send_signal(signal.SIGINT)
    out, err = child.communicate(timeout=60)
    assert child.returncode == 130 and first + out and "Traceback" not in err
    assert "new tokens" in err


@pytest.mark.parametrize("how", ["--json", "--batch-file"])
def test_interrupted_reports_are_whole(run, model, tmp_path, monkeypatch, how):
    """Ctrl-C comes in a callback that swallows it, in the middle of a generation."""
    accept, calls = LanguageModel._accept, []
    handler = signal.getsignal(signal.SIGINT)

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 3:
            with contextlib.suppress(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
        return accept(*args)

    monkeypatch.setattr(LanguageModel, "_accept", interrupted)
    path = tmp_path / "prompts.jsonl"
    path.write_text('"hello"\n{"prompt": "hello", "max_new_tokens": 2}\n')
    what = ("--batch-file", path) if how == "--batch-file" else ("-p", "hello", "--json")
    status, out, err = run("-m", model, *what, "-n", 100, "--raw", "--ignore-eos", "--seed", 1)
    rows = [json.loads(line) for line in out.splitlines()]
    assert status == 130 and len(calls) == 3 and "new tokens" in err
    assert [row["finish_reason"] for row in rows] == ["interrupted", "length"][: len(rows)]
    assert [len(row["token_ids"]) for row in rows] == [17, 2][: len(rows)]
    assert signal.getsignal(signal.SIGINT) is handler


def test_an_interruption_waits_for_imports(run, model, monkeypatch):
    """In the middle of loading an extension module it could crash the process."""
    ended = []

    def check_values(*_):
        ended.append("too late")

    class Module:
        def __getattr__(self, name):
            signal.raise_signal(signal.SIGINT)
            ended.append(name)
            return check_values

    monkeypatch.setitem(sys.modules, "orcd_jax.language_model", Module())
    assert run("-m", model, "-p", "hello")[0] == 130
    assert ended[-2:] == ["check_values", "load"]


def test_an_interruption_may_come_back_as_another_exception(run, model, monkeypatch):
    def fail(*_, **__):
        with contextlib.suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        raise SystemError("returned a result with an exception set")

    monkeypatch.setattr("orcd_jax.language_model.load", fail)
    status, out, err = run("-m", model, "-p", "hello")
    assert (status, out, err) == (130, "", "\n")


def test_profile_and_xla_dump_write_their_files(model, tmp_path):
    child = process(
        "-m", model, "-p", "hello", "-n", 4, "--profile", tmp_path / "trace", "--xla-dump", tmp_path / "xla"
    )
    _, err = child.communicate(timeout=120)
    assert child.returncode == 0, err
    traces = list((tmp_path / "trace").rglob("*.xplane.pb")) + list(
        (tmp_path / "trace").rglob("perfetto_trace.json.gz")
    )
    assert len(traces) == 2
    dumps = [path.name for path in (tmp_path / "xla").iterdir()]
    for program in ("prefill", "decode"):
        assert any(program in name and name.endswith("after_optimizations.txt") for name in dumps)
        assert any(program in name and "buffer-assignment" in name for name in dumps)


def test_a_reader_that_goes_away_is_no_error(model):
    child = process("-m", model, "-p", "hello", "-n", 200, "--ignore-eos")
    child.stdout.close()
    _, err = child.communicate(timeout=120)
    assert "Traceback" not in err and "BrokenPipe" not in err
