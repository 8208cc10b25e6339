"""The README's Python examples run as they stand."""

import re
from pathlib import Path

import pytest

README = (Path(__file__).parent.parent / "README.md").read_text()
EXAMPLES = re.findall(r"^```python\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_an_example_runs(number, default_model, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(EXAMPLES[number], f"README.md, example {number}", "exec"), {})
    assert capsys.readouterr().out


def test_the_pure_functions_agree_with_the_library(default_model, capsys):
    (example,) = (e for e in EXAMPLES if "generate_tokens" in e)
    names = {}
    exec(compile(example, "README.md", "exec"), names)
    expected = names["model"].generate(names["prompts"], max_new_tokens=8)
    for row, completion in zip(names["new"], expected, strict=True):
        assert [int(t) for t in row if t >= 0][: len(completion.token_ids)] == completion.token_ids
