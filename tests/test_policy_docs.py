"""The policy reference tells the truth: its examples load, its tables name every key, preset and convention."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from quant_compile import policy as policy_module
from quant_compile.ir.family import bits_per_weight
from quant_compile.ir.scheme import PRESETS
from quant_compile.policy import Policy
from quant_compile.yaml_lines import read_yaml

TEXT = (Path(__file__).parents[1] / "docs" / "policy.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```yaml\n(.*?)^```", TEXT, flags=re.S | re.M)


@pytest.mark.parametrize("index", range(len(BLOCKS)))
def test_every_yaml_example_is_a_policy(index: int, tmp_path: Path) -> None:
    path = tmp_path / "example.yaml"
    path.write_text(BLOCKS[index], encoding="utf-8")
    policy = Policy.load(path)
    assert Policy.load(policy.save(tmp_path / "again.yaml")) == policy
    assert policy == Policy.load(
        {**read_yaml(BLOCKS[index], "x").data, **({"scales": policy.scales} if policy.scales else {})}
    )


def test_there_are_examples() -> None:
    assert len(BLOCKS) == 8


def rows_of(heading: str) -> dict[str, list[str]]:
    """First column (without backticks) -> cells of the first table under a heading."""
    section = TEXT.split(f"\n## {heading}\n", 1)[1].split("\n## ", 1)[0]
    table = re.search(r"((?:^\|.*\n)+)", section, flags=re.M)
    assert table is not None
    rows = [[cell.strip() for cell in line.strip("|\n").split(" | ")] for line in table[1].splitlines()[2:]]
    return {row[0].strip("` "): row for row in rows}


def test_the_tables_name_every_key() -> None:
    assert tuple(rows_of("Keys of a policy")) == policy_module._POLICY_KEYS
    assert set(rows_of("Rules")) == set(policy_module._RULE_KEYS)


def test_the_table_of_presets_is_complete_and_its_bits_are_right() -> None:
    rows = rows_of("Schemes")
    assert set(rows) == set(PRESETS)
    for name, row in rows.items():
        assert row[-1] == f"{bits_per_weight(PRESETS[name]):.3g}", name


def test_the_table_of_shipped_policies_is_complete() -> None:
    table = re.search(r"^\| shipped policy \|.*\n\|[-|]+\n((?:\|.*\n)+)", TEXT, flags=re.M)
    assert table is not None
    rows = [line.split("|")[1:4] for line in table[1].splitlines()]
    found = {name: gives for names, _, gives in rows for name in re.findall(r"`(\w+)`", names)}
    assert set(found) == set(policy_module.shipped_policies())
    for name, gives in found.items():
        default = Policy.load(name).default
        assert default is not None and (default.spec in gives or default == PRESETS.get(name.upper()))


def test_every_convention_is_named() -> None:
    for rule in policy_module.CONVENTIONS:
        assert f"`{rule.match.split(')*')[-1]}`" in TEXT


def test_the_quoted_errors_are_what_the_code_says(tmp_path: Path) -> None:
    path = tmp_path / "my_policy.yaml"
    for text, line in (
        (
            "version: 1\ndefault: FP8_DYNAMC\n",
            "my_policy.yaml:2: unknown scheme 'FP8_DYNAMC'. Did you mean FP8_DYNAMIC?",
        ),
        (
            "default: keep\nrules:\n- {match: a, scheme: keep, where: {k: big}}\n",
            "k: 'big' is no condition. Fix: write",
        ),
    ):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(policy_module.PolicyError) as caught:
            Policy.load(path)
        assert line in str(caught.value) and line in TEXT
