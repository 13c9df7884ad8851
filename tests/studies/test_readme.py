"""What README and docs promise is so: the example runs, figures and options are the real ones, links lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import typer

from studies.cli.main import app
from studies.estimate import Verdict
from studies.validation import validate_oracle

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
README = PAGES[0].read_text(encoding="utf-8")
OWN = ROOT / "tests" / "data" / "oracle"
SHARED = ROOT.parent / "shared" / "oracle"
CASES = {
    "our own small cases": OWN / "sample.jsonl",
    "one rank of many, our own small cases": OWN / "distributed.jsonl",
    "early families": OWN / "early.jsonl",
    "GPT-Neo, CodeGen, BioGPT, MPT": OWN / "early_more.jsonl",
    "BERT with its heads": OWN / "encoder.jsonl",
    "latent attention": OWN / "latent.jsonl",
    "dense families": OWN / "dense.jsonl",
    "mixtures of experts (grouped products)": OWN / "experts.jsonl",
    "gpt-oss, Llama 4, weights per token": OWN / "routed.jsonl",
    "experts in a loop": OWN / "expert_loop.jsonl",
    "state space models": OWN / "hybrid.jsonl",
    "gated delta nets": OWN / "delta.jsonl",
    "MiniMax-01": OWN / "minimax.jsonl",
    "load-balancing loss": OWN / "load_balancing.jsonl",
    "Liger's kernels": OWN / "kernels.jsonl",
    "checkpointing by layer": OWN / "checkpointing.jsonl",
    "frozen weights": OWN / "freezing.jsonl",
    "pruned models": OWN / "pruning.jsonl",
    "float8 linear layers": OWN / "float8.jsonl",
    "stages of torch's pipelines": OWN / "pipeline_stages.jsonl",
    "Megatron-LM's pipelines": OWN / "megatron_pipeline.jsonl",
    "multi-token prediction": OWN / "mtp.jsonl",
    "one rank of many: FSDP2": SHARED / "distributed" / "cases.jsonl",
    "44 recorded cases": SHARED / "single" / "cases.jsonl",
}


def test_the_python_example_runs(capsys):
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    exec(compile(example, "README.md", "exec"), {})
    assert "activation" in capsys.readouterr().out


def test_ci_finds_its_commands():
    for marker in ("install-command", "test-command"):
        assert re.search(rf"<!-- {marker} -->\s*```bash\n[^`]+```", README)


@pytest.mark.parametrize("title", sorted(CASES))
def test_the_accuracy_table_says_what_validation_finds(title):
    if not CASES[title].exists():
        pytest.skip("these cases are not next to the checkout")
    row = next(line for line in README.splitlines() if title in line)
    compared, mean, worst = (cell.strip(" %") for cell in row.split("|")[2:5])
    summary = validate_oracle(CASES[title]).summary
    assert int(compared) == summary.n
    assert mean == f"{summary.mean_abs_error_pct:.4f}"
    assert worst == f"{summary.worst_abs_error_pct:.4f}"


def options_of(command):
    """Every long option of a command and of the commands below it."""
    below = getattr(command, "commands", {})
    given = [name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)]
    own = {name for name in given if name.startswith("--")}
    return own.union(*map(options_of, below.values()))


def test_the_page_of_the_command_line_names_every_option():
    real = options_of(typer.main.get_command(app)) - {"--version"}
    named = set(re.findall(r"--[a-z][a-z0-9-]*", (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")))
    assert real - named == set()
    assert named - real <= {"--help", "--optim"}  # the latter is the Trainer's


def test_exit_codes_of_verdicts_are_in_the_readme():
    codes = set(re.findall(r"^\| (\d) \|", README, re.MULTILINE))
    assert {str(verdict.exit_code) for verdict in Verdict} <= codes


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    targets = re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8"))
    missing = [target for target in targets if "://" not in target and not (page.parent / target).exists()]
    assert missing == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_are_named_exist(page):
    """Paths in code spans, but for placeholders in capitals."""
    named = re.findall(r"`([a-z_]+/[a-z0-9_/.-]+\.(?:py|csv|json|md))`", page.read_text(encoding="utf-8"))
    assert [path for path in named if not any((ROOT / top / path).exists() for top in ("", "simulator"))] == []
