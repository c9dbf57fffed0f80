"""The soak in its short form: the same traffic, faults and checks as `./dev soak 30`."""
import subprocess
import sys

from conftest import BINARY, ROOT


def test_short_soak():
    result = subprocess.run([sys.executable, ROOT / "deploy/soak", BINARY, "0.5"], capture_output=True, text=True, timeout=600,
                            check=False)
    print(result.stdout)
    assert result.returncode == 0, result.stdout + result.stderr
