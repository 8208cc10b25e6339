"""Damaged files end in a model with finite logits or in the project's own error, quickly and in little memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from fuzz_campaign import MEMORY_LIMIT, campaign

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs /proc and RLIMIT_AS as Linux has them")


def test_damaged_files_end_in_the_projects_error(figure):
    """Crafted files, every field of three files damaged, and 2,000 random cases; none takes 2 s or 200 MB."""
    summary = campaign("--thorough", "3", "--random", "2000", processes=2)
    slowest, largest = summary["slowest_s"], summary["largest_mib"]
    refused = sum(n for outcome, n in summary["outcomes"].items() if not outcome.startswith("loaded"))
    figure(
        f"fuzzing: {summary['cases']} damaged files, {refused} refused; slowest {slowest[0]:.2f} s of CPU time "
        f"({slowest[1]}), largest {largest[0]:.0f} MiB ({largest[1]})"
    )
    assert summary["faults"] == []
    assert summary["cases"] > 9000
    # Far from all damage can be seen; the rest has to be refused, or the cases are not what they seem.
    assert 0.8 < refused / summary["cases"] < 0.99
    assert slowest[0] < 2
    assert 10 < largest[0] < MEMORY_LIMIT / 2**20


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("raise ValueError('unexpected')", "ValueError: unexpected"),
        ("return len(bytearray(250 << 20))", "MemoryError"),
        ("raise orcd_jax.GGUFError('two\\nlines')", "not one short line"),
        ("return np.array([[0, np.inf]])", "generate does not say so"),
    ],
)
def test_a_campaign_sees_faults(body, expected, tmp_path):
    result = run_with_load(body, tmp_path)
    assert result.returncode == 0, result.stderr
    (fault,) = json.loads(result.stdout)["faults"]
    assert fault.startswith("case 7: a case: ") and expected in fault


def test_a_campaign_ends_when_a_case_hangs(tmp_path):
    result = run_with_load("time.sleep(60)", tmp_path)
    assert result.returncode and "Timeout" in result.stderr
    assert (tmp_path / "progress").read_text() == "case 7: a case"


def run_with_load(body: str, folder: Path) -> subprocess.CompletedProcess:
    """Run one case in a child process whose loading is replaced."""
    script = f"""
import json, sys, time
import numpy as np
sys.path[:] = {sys.path!r}
import fuzz_campaign, orcd_jax
from pathlib import Path
def load(path, weights):
    {body}
fuzz_campaign._load, fuzz_campaign._says_not_finite, fuzz_campaign.TIME_LIMIT_S = load, lambda *_: False, 1
folder = Path({str(folder)!r})
print(json.dumps(fuzz_campaign.run(iter([(7, ("int8", "a case", b""))]), folder, folder / "progress")))
"""
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
