"""Parses the blocks of Terraform code in the documents, and compares them with the module and the policies."""

import json
import re
from pathlib import Path

import hcl2
import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("examples/**/*.md")])
OPTIONS = hcl2.SerializationOptions(with_comments=False, explicit_blocks=False, strip_string_quotes=True)


def load(text):
    return hcl2.loads(text, serialization_options=OPTIONS)


def blocks(path):
    """The text of each block, without its indentation."""
    found = re.findall(r"^( *)```hcl\n(.*?)^\1```$", path.read_text(), re.M | re.S)
    return [re.sub(f"^{indent}", "", text, flags=re.M) for indent, text in found]


PAGES = [str(path.relative_to(ROOT)) for path in DOCUMENTS if blocks(path)]
UNTESTED = "a page with Terraform code needs a test here"


def test_documents_with_terraform_code_have_a_test():
    assert PAGES == ["docs/moving.md", "examples/terraform/README.md"], UNTESTED


def test_terraform_readme_uses_the_module_as_it_is():
    [text] = blocks(ROOT / "examples" / "terraform" / "README.md")
    [module] = load(text)["module"]
    [given] = module.values()
    variables = {}
    for variable in load((ROOT / "examples" / "terraform" / "variables.tf").read_text())["variable"]:
        variables.update({name.strip('"'): body for name, body in variable.items()})
    assert given.keys() - {"source"} <= variables.keys()
    assert {name for name, body in variables.items() if "default" not in body} <= given.keys()
    fields = set(re.findall(r"(\w+) = ", variables["managers_configs"]["type"]))
    for manager in given["managers_configs"].values():
        assert manager.keys() == fields


STATEMENTS, *VARIABLES = blocks(ROOT / "docs" / "moving.md")


def test_moving_page_adds_the_statements_of_the_examples():
    # They are part of a template, whose text is JSON: an expression in quotation marks, or one whose value is JSON.
    text = re.sub(r'"\$\{.*?\}(/\*)?"|\$\{.*\}(?= \}\n)', '"expression"', STATEMENTS)
    added = json.loads(f"[{text.rstrip().removesuffix(',')}]")
    examples = [
        json.loads((ROOT / "examples" / path).read_text())["Statement"][0]
        for path in ("iam/sweep.json", "ecs-manager/task-role.json")
    ]
    for statement, example in zip(added, examples, strict=True):
        assert statement.keys() == example.keys()
        assert (statement["Sid"], [statement["Action"]]) == (example["Sid"], example["Action"])
        assert statement.get("Condition", {}).keys() == example.get("Condition", {}).keys()


@pytest.mark.parametrize("text", VARIABLES)
def test_moving_page_adds_variables_of_the_manager(text):
    manual = (ROOT / "docs" / "manager.md").read_text()
    entries = load(f"environment = [\n{text}]\n")["environment"]
    for entry in entries:
        entry = {key.strip('"'): value for key, value in entry.items()}
        assert entry.keys() == {"name", "value"}
        assert f"| `{entry['name']}` |" in manual
