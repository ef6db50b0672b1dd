"""Compares the commands of the AWS CLI in the documents with AWS's own models of its services, which botocore has."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("examples/**/*.md")]

# Options of every command, and commands that the CLI adds to the operations of a service.
OF_ALL = {"query", "output", "region", "profile", "cli-input-json"}
OF_CLI = {("ecr", "get-login-password"), ("cloudformation", "deploy"), ("cloudformation", "package"), ("logs", "tail")}
NAMES = {"s3api": "s3"}


def commands():
    """Each command in a block of shell commands: where, service, operation, options."""
    for path in DOCUMENTS:
        for block in re.findall(r"^ *```sh\n(.*?)^ *```$", path.read_text(), re.M | re.S):
            text = re.sub(r"\\\n\s*", " ", block)
            text = re.sub(r"(?<!\S)#.*", "", text)
            for line in text.split("\n"):
                # A line may have several, one in another's $(...).
                for found in re.finditer(r"(?:^|[\s(])aws ([a-z0-9]+) ((?:wait )?[a-z-]+)(.*?)(?=[|;)]|$)", line):
                    service, operation, rest = found.groups()
                    rest = re.sub(r"'[^']*'|\"[^\"]*\"", "_", rest)
                    yield path.relative_to(ROOT), service, operation, re.findall(r"(?<=\s)--([a-z][a-z0-9-]*)", rest)


COMMANDS = list(commands())


def test_documents_have_commands_of_the_aws_cli():
    assert len(COMMANDS) > 50
    assert {service for _, service, _, _ in COMMANDS} >= {"ec2", "ecs", "ecr", "iam", "logs", "s3", "s3api", "sts"}


@pytest.mark.parametrize("service", sorted({service for _, service, _, _ in COMMANDS} - {"s3"}))
def test_documents_name_only_operations_and_options_of_aws(service):
    session = pytest.importorskip("botocore.session").get_session()
    from botocore import xform_name

    model = session.get_service_model(NAMES.get(service, service))
    operations = {xform_name(name, "-"): name for name in model.operation_names}
    for path, of, operation, options in COMMANDS:
        if of != service or (of, operation) in OF_CLI:
            continue
        if operation.startswith("wait "):
            waiters = session.get_waiter_model(NAMES.get(service, service))
            named = {xform_name(name, "-"): name for name in waiters.waiter_names}
            assert operation[5:] in named, f"{path}: aws {service} {operation}"
            operation = xform_name(waiters.get_waiter(named[operation[5:]]).operation, "-")
        assert operation in operations, f"{path}: aws {service} {operation}"
        shape = model.operation_model(operations[operation]).input_shape
        known = {xform_name(name, "-") for name in shape.members} if shape else set()
        known |= OF_ALL
        for option in options:
            assert option in known or option.removeprefix("no-") in known, f"{path}: aws {service} {operation} --{option}"
