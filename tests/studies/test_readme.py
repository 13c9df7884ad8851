"""The README's example runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")


def test_the_python_example_runs(capsys):
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    exec(compile(example, "README.md", "exec"), {})
    assert "activation" in capsys.readouterr().out


def test_ci_finds_its_commands():
    for marker in ("install-command", "test-command"):
        assert re.search(rf"<!-- {marker} -->\s*```bash\n[^`]+```", README)
