"""Tests of the Terraform module in examples/terraform.

The first part parses its files with python-hcl2 and needs nothing else. The second part runs Terraform against moto, a
server that stands in for AWS. It is skipped without a terraform program, and without a directory with the AWS provider:
the variable TERRAFORM_PLUGINS names one, a filesystem mirror, or it is in one of the usual places.
"""

import http.server
import json
import os
import re
import shutil
import subprocess
import threading
from pathlib import Path

import boto3
import hcl2
import pytest

from policies import as_list, is_allowed

ROOT = Path(__file__).resolve().parents[2]
MODULE = ROOT / "examples" / "terraform"
FILES = sorted(MODULE.glob("*.tf"))

ACCOUNT = "123456789012"
REGION = "us-east-2"

# Inputs of the module that this one replaces: name, type, default. REQUIRED marks those without a default.
REQUIRED = object()
WORKER = {
    "tags": "list(string)",
    "limit": "number",
    "worker_docker_image": "string",
    "worker_cpu": "number",
    "worker_memory": "number",
    "worker_ecs_cluster_arn": "string",
    "worker_aws_region": "string",
    "worker_subnet_id": "string",
    "worker_security_group_id": "string",
    "worker_ssh_user": "string",
    "worker_task_role_arn": "string",
}
SAMPLE = {
    "tags": ["env1", "tool1", "tool2"],
    "limit": 10,
    "worker_docker_image": "image_1",
    "worker_cpu": 256,
    "worker_memory": 512,
    "worker_ecs_cluster_arn": "ecs_cluster_arn_1",
    "worker_aws_region": "region-1",
    "worker_subnet_id": "subnet-123",
    "worker_security_group_id": "sg-321",
    "worker_ssh_user": "user_1",
    "worker_task_role_arn": "task_role_arn_1",
}
REPLACED_INPUTS = {
    "project_code": ("string", REQUIRED),
    "environment": ("string", REQUIRED),
    "service_name": ("string", REQUIRED),
    "manager_instance_count": ("number", 1),
    "manager_ecs_cluster_arn": ("string", REQUIRED),
    "manager_docker_image": ("string", REQUIRED),
    "manager_subnet_ids": ("list(string)", REQUIRED),
    "manager_security_group_ids": ("list(string)", REQUIRED),
    "gitlab_token_secret_arn": ("string", REQUIRED),
    "secrets_kms_key": ("string", ""),
    "gitlab_url": ("string", REQUIRED),
    "gitlab_runner_concurrency": ("number", 10),
    "gitlab_runner_name_prefix": ("string", REQUIRED),
    "managers_configs": (f"map(object({{{','.join(f'{k}={v}' for k, v in WORKER.items())}}}))", {"r1": SAMPLE}),
    "iam_permissions_boundary": ("string", None),
    "tags_common": ("map(string)", {}),
    # Required there: here, the region of the managers' cluster is its default.
    "aws_region": ("string", None),
}
REPLACED_OUTPUTS = {"manager_service_name", "worker_task_definition_arns"}


# ---------------------------------------------------------------------------------------------------------
# The files
# ---------------------------------------------------------------------------------------------------------

OPTIONS = hcl2.SerializationOptions(with_comments=False, explicit_blocks=False, strip_string_quotes=True)


def parse(path):
    with path.open() as file:
        return hcl2.load(file, serialization_options=OPTIONS)


def unquote(name):
    return name.strip('"')


def blocks(kind):
    """All blocks of a kind, such as variable or resource, in all files: their labels and their body."""
    for path in FILES:
        for block in parse(path).get(kind, []):
            if kind in ("resource", "data"):
                for type_, named in block.items():
                    for name, body in named.items():
                        yield (unquote(type_), unquote(name)), body
            elif kind in ("variable", "output"):
                for name, body in block.items():
                    yield unquote(name), body
            else:
                yield None, block


def plain(value):
    """A parsed value, without the ${} around an expression and with null as None."""
    if isinstance(value, dict):
        return {unquote(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [plain(inner) for inner in value]
    if isinstance(value, str):
        inner = re.fullmatch(r"\$\{(.*)\}", value, re.S)
        text = inner.group(1) if inner else value
        return None if text == "null" else text
    return value


VARIABLES = dict(blocks("variable"))
SOURCE = "\n".join(path.read_text() for path in FILES)


def type_of(variable):
    return re.sub(r"\s+", "", plain(VARIABLES[variable]["type"]))


def default_of(variable):
    body = VARIABLES[variable]
    return plain(body["default"]) if "default" in body else REQUIRED


def test_terraform_module_is_parsed():
    assert {path.name for path in FILES} >= {"variables.tf", "outputs.tf", "versions.tf"}
    for path in FILES:
        assert parse(path), path.name


@pytest.mark.parametrize("name", REPLACED_INPUTS)
def test_terraform_module_has_the_input(name):
    assert name in VARIABLES
    assert (type_of(name), default_of(name)) == REPLACED_INPUTS[name]


def test_terraform_module_has_no_further_required_input():
    further = {name: default_of(name) for name in VARIABLES if name not in REPLACED_INPUTS}
    assert further and REQUIRED not in further.values()


def test_terraform_module_has_the_outputs():
    assert REPLACED_OUTPUTS <= {name for name, _ in blocks("output")}


def test_terraform_module_describes_every_input_and_output():
    for kind in ("variable", "output"):
        for name, body in blocks(kind):
            assert body.get("description"), f"{kind} {name} has no description"


def test_terraform_module_uses_every_input_and_local():
    outside = "\n".join(path.read_text() for path in FILES if path.name != "variables.tf")
    for name in VARIABLES:
        assert re.search(rf"\bvar\.{name}\b", outside), f"var.{name} is not used"
    for _, body in blocks("locals"):
        for name in body:
            assert re.search(rf"\blocal\.{name}\b", outside), f"local.{name} is not used"


def test_terraform_module_refers_only_to_what_exists():
    code = re.sub(r"(?m)(^|\s)#.*$", "", SOURCE)
    code = re.sub(r'(?m)^\s*(description|error_message)\s*=\s*"(?:[^"\\]|\\.)*"$', "", code)
    locals_ = {name for _, body in blocks("locals") for name in body}
    resources = {labels for labels, _ in blocks("resource")}
    data = {labels for labels, _ in blocks("data")}
    assert {*re.findall(r"\bvar\.(\w+)", code)} <= VARIABLES.keys()
    assert {*re.findall(r"\blocal\.(\w+)", code)} <= locals_
    assert {*re.findall(r"\bdata\.(aws_\w+)\.(\w+)", code)} <= data
    # Addresses in the state of the module that this one replaces are not ours.
    own = re.sub(r"\bfrom\s*=.*", "", code)
    assert {*re.findall(r"(?<![\w.\"])(aws_\w+)\.(\w+)", own)} <= resources
    assert not re.findall(r"\bmodule\.", own)


def test_terraform_module_names_no_region_account_or_partition():
    code = "\n".join(path.read_text() for path in FILES if path.name != "variables.tf")
    assert not re.search(r"\b[a-z]{2}(-[a-z]+)+-\d\b", code)
    assert not re.search(r"\b\d{12}\b", code)
    assert not re.search(r"arn:aws", code)


def test_terraform_module_limits_its_versions():
    ((_, body),) = list(blocks("terraform"))
    assert re.fullmatch(r">= \d+\.\d+", plain(body["required_version"]))
    (providers,) = body["required_providers"]
    assert {name: plain(limits) for name, limits in providers.items()} == {
        "aws": {"source": "hashicorp/aws", "version": ">= 5.77, < 7.0"}
    }


def statements(document):
    """The statements of an aws_iam_policy_document, dynamic ones too, which exist under a condition."""
    body = dict(blocks("data"))[("aws_iam_policy_document", document)]
    yield from body.get("statement", [])
    for dynamic in body.get("dynamic", []):
        for content in dynamic.values():
            yield from content["content"]


def actions_of(*documents):
    return {action for document in documents for each in statements(document) for action in plain(each["actions"])}


def actions_in(*paths):
    """The actions of policies in examples/, which other tests compare with the calls of the driver."""
    policies = [json.loads((ROOT / "examples" / path).read_text()) for path in paths]
    return {action for policy in policies for each in policy["Statement"] for action in each["Action"]}


def test_terraform_module_allows_exactly_the_actions_that_are_needed():
    assert actions_of("manager") == actions_in("iam/driver.json", "iam/sweep.json", "ecs-manager/task-role.json")
    assert actions_of("worker_execution") == actions_in("iam/execution-role.json")
    # Secrets are in Secrets Manager or in Parameter Store, and may have a key of their own.
    assert actions_of("manager_execution") == actions_in("ecs-manager/execution-role.json") | {
        "secretsmanager:GetSecretValue",
        "kms:Decrypt",
    }
    assert actions_of("tasks_trust") == actions_in("iam/trust-tasks.json")
    documents = {name for (type_, name), _ in blocks("data") if type_ == "aws_iam_policy_document"}
    assert documents == {"manager", "worker_execution", "manager_execution", "tasks_trust"}


# The example of each document. Its statements have the same Sid, but for those in RENAMED.
EXAMPLES = {
    "manager": ["iam/driver.json", "iam/sweep.json", "ecs-manager/task-role.json"],
    "worker_execution": ["iam/execution-role.json"],
    "manager_execution": ["ecs-manager/execution-role.json"],
}
RENAMED = {"PullWorkerImages": "PullWorkerImage", "ReadTokensInParameterStore": "ReadRunnerTokens"}
# What the resources of each statement come from.
RESOURCES = {
    "StartTasks": ["local.worker_definition_arns"],
    "DescribeAndStopTasks": ["local.worker_cluster_arns"],
    "FindTasks": [],
    "FindStoppedManagers": ["var.manager_ecs_cluster_arn"],
    "PassRolesToTasks": ["aws_iam_role.worker_execution", "local.worker_task_role_arns"],
    "LogInToRegistry": [],
    "PullWorkerImages": ["local.worker_repository_arns"],
    "PullManagerImage": ["local.manager_repository_arns"],
    "WriteLogs": ["aws_cloudwatch_log_group.{}"],
    "ReadTokensInSecretsManager": ["local.token_secret_arns"],
    "ReadTokensInParameterStore": ["local.token_secret_arns"],
    "DecryptTokens": ["statement.value.arn"],
}


def conditions_of(statement):
    return {(plain(each["test"]), plain(each["variable"])): plain(each["values"]) for each in statement["condition"]}


@pytest.mark.parametrize("document", EXAMPLES)
def test_terraform_module_has_the_conditions_and_resources_of_the_examples(document):
    wanted = {}
    for path in EXAMPLES[document]:
        wanted.update({each["Sid"]: each for each in json.loads((ROOT / "examples" / path).read_text())["Statement"]})
    for each in statements(document):
        sid = plain(each["sid"])
        example = wanted.pop(RENAMED.get(sid, sid), {})
        made = conditions_of({"condition": [], **each})
        if example:
            assert plain(each["actions"]) == example["Action"]
            tests = example.get("Condition", {}).items()
            assert made.keys() == {(test, variable) for test, values in tests for variable in values}
        if sid == "PassRolesToTasks":
            assert list(made.values()) == [as_list(value) for _, values in tests for value in values.values()]
        elif "ecs:cluster" in {variable for _, variable in made}:
            assert list(made.values()) == ["local.worker_cluster_arns"]
        if sid == "DecryptTokens":
            services = [value.split(".")[0] for value in made[("StringLike", "kms:ViaService")]]
            assert services == ["secretsmanager", "ssm"]
        expression = re.sub(r"each\.|config\.", "", json.dumps(plain(each["resources"])))
        found = re.findall(r"(?:local|var|statement|aws_\w+)\.\w+(?:\.arn\b)?", expression)
        group = document.split("_")[0]
        assert [name.removesuffix(".arn") if name.startswith("aws_") else name for name in found] == [
            name.format(group) for name in RESOURCES[sid]
        ], sid
    assert not wanted


def test_terraform_module_lets_only_tasks_of_the_account_assume_its_roles():
    ((statement,),) = [list(statements("tasks_trust"))]
    (principals,) = statement["principals"]
    assert plain(principals) == {"type": "Service", "identifiers": ["ecs-tasks.amazonaws.com"]}
    assert conditions_of(statement) == {
        ("ArnLike", "aws:SourceArn"): ["arn:${local.partition}:ecs:${local.region}:${local.account}:*"],
        ("StringEquals", "aws:SourceAccount"): ["local.account"],
    }
    roles = {name: body for (type_, name), body in blocks("resource") if type_ == "aws_iam_role"}
    assert roles.keys() == {"manager", "manager_execution", "worker_execution"}
    for body in roles.values():
        assert plain(body["assume_role_policy"]) == "data.aws_iam_policy_document.tasks_trust.json"
        assert plain(body["permissions_boundary"]) == "local.permissions_boundary"


def test_terraform_module_gives_tags_to_every_resource_that_has_some():
    without = {"aws_iam_role_policy", "aws_iam_role_policy_attachment"}
    for (type_, name), body in blocks("resource"):
        assert (plain(body.get("tags")) == "var.tags_common") is (type_ not in without), f"{type_}.{name}"


def test_terraform_service_is_that_of_the_examples():
    service = dict(blocks("resource"))[("aws_ecs_service", "manager")]
    example = json.loads((ROOT / "examples" / "ecs-manager" / "service.json").read_text())
    deployment = example["deploymentConfiguration"]
    (breaker,), (network,) = service["deployment_circuit_breaker"], service["network_configuration"]
    assert plain(service["launch_type"]) == example["launchType"]
    assert plain(service["availability_zone_rebalancing"]) == example["availabilityZoneRebalancing"]
    assert service["deployment_minimum_healthy_percent"] == deployment["minimumHealthyPercent"]
    assert service["deployment_maximum_percent"] == deployment["maximumPercent"]
    assert plain(breaker) == deployment["deploymentCircuitBreaker"]
    assert plain(network["assign_public_ip"]) is (
        example["networkConfiguration"]["awsvpcConfiguration"]["assignPublicIp"] == "ENABLED"
    )
    # It starts once everything is there that managers and their jobs need, and is removed before it.
    needed = {
        f"{type_}.{name}"
        for (type_, name), _ in blocks("resource")
        if type_.startswith("aws_iam_role_policy") or name == "worker" and type_ == "aws_ecs_task_definition"
    }
    assert {*plain(service["depends_on"])} == needed


def test_terraform_definitions_have_the_roles_and_containers_of_the_examples():
    resources = dict(blocks("resource"))
    for name, path in (("worker", "task-definition.json"), ("manager", "ecs-manager/task-definition.json")):
        body = resources[("aws_ecs_task_definition", name)]
        assert plain(body["execution_role_arn"]) == f"aws_iam_role.{name}_execution.arn"
        example = json.loads((ROOT / "examples" / path).read_text())
        (wanted,) = example["containerDefinitions"]
        text = plain(body["container_definitions"])
        assert plain(body["network_mode"]) == example["networkMode"]
        assert f"aws_cloudwatch_log_group.{name}.name" in text
        assert re.search(rf"\bstopTimeout\s*=\s*{wanted['stopTimeout']}\b", text)
        ports = [mapping["containerPort"] for mapping in wanted.get("portMappings", [])]
        assert [int(port) for port in re.findall(r"\bcontainerPort\s*=\s*(\d+)", text)] == ports
    assert plain(resources[("aws_ecs_task_definition", "manager")]["task_role_arn"]) == "aws_iam_role.manager.arn"


def test_terraform_module_restricts_every_action_that_iam_can_restrict():
    unrestricted = {"ecr:GetAuthorizationToken"}
    for document in ("manager", "worker_execution", "manager_execution"):
        for each in statements(document):
            if plain(each["resources"]) != ["*"]:
                continue
            if {*plain(each["actions"])} <= unrestricted:
                continue
            (condition,) = each["condition"]
            assert plain(condition["variable"]) == "ecs:cluster"


def test_terraform_readme_undoes_every_move():
    readme = (MODULE / "README.md").read_text()
    names = {"module.manager_service": "$old"}
    for _, move in blocks("moved"):
        old, new = (plain(move[end]) for end in ("from", "to"))
        for name, short in names.items():
            old = old.replace(name, short)
        old = old if old.startswith("$") else f"$new.{old}"
        assert f'terraform state mv "$new.{new}" "{old}"' in readme


def test_terraform_readme_has_every_input_and_output():
    readme = (MODULE / "README.md").read_text()
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", readme, re.M))
    outputs = {name for name, _ in blocks("output")}
    assert rows.keys() == VARIABLES.keys() | outputs
    for name in VARIABLES:
        type_, default, _ = rows[name].split(" | ", 2)
        known = default_of(name)
        shown = {REQUIRED: "required", None: "`null`"}.get(known if known in (REQUIRED, None) else 0)
        if name == "managers_configs":
            assert (type_, default) == ("map of objects", "a sample")
        else:
            assert type_ == f"`{type_of(name)}`", name
            written = re.sub(r"\s", "", default.strip("`"))
            hcl = re.sub(r"\s", "", json.dumps(known).replace('": ', "=").replace('"', "")) if shown is None else ""
            assert default == shown or written == (hcl or '""'), name


# ---------------------------------------------------------------------------------------------------------
# Terraform itself
# ---------------------------------------------------------------------------------------------------------


def find_plugins():
    """A directory with the AWS provider, in the layout of a filesystem mirror."""
    usual = ["/opt/*", "/usr/share/terraform/plugins", "/usr/local/share/terraform/plugins"]
    places = [Path(os.environ[name]) for name in ("TERRAFORM_PLUGINS",) if os.environ.get(name)]
    places += [path for pattern in usual for path in Path("/").glob(pattern.lstrip("/"))]
    places += [Path.home() / ".terraform.d" / "plugins"]
    return next((path for path in places if any(path.glob("*/hashicorp/aws/*/*/terraform-provider-aws*"))), None)


PLUGINS = find_plugins()
needs_terraform = pytest.mark.skipif(not shutil.which("terraform"), reason="there is no terraform program")
needs_provider = pytest.mark.skipif(
    not (shutil.which("terraform") and PLUGINS), reason="there is no terraform program, or no AWS provider for it"
)


@needs_terraform
def test_terraform_fmt_changes_nothing():
    result = subprocess.run(["terraform", "fmt", "-check", "-diff", str(MODULE)], capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (0, "")


PROVIDER = """
provider "aws" {{
  region                      = "{region}"
  access_key                  = "none"
  secret_key                  = "none"
  skip_credentials_validation = true
  skip_metadata_api_check     = true
  skip_requesting_account_id  = true

  endpoints {{
    ec2  = "{url}"
    ecs  = "{url}"
    iam  = "{url}"
    kms  = "{url}"
    logs = "{url}"
    sts  = "{url}"
  }}
}}

output "all" {{
  value = module.runners
}}
"""


# Arguments of a service that moto does not return, or loses in an update.
LOST_BY_MOTO = {
    "availability_zone_rebalancing",
    "deployment_maximum_percent",
    "deployment_minimum_healthy_percent",
}


def changes_something(change):
    if change["actions"] != ["update"]:
        return change["actions"] not in (["no-op"], ["read"])
    before, after = change["before"], change["after"]
    names = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
    return not names <= LOST_BY_MOTO


class Stack:
    """A root module that calls `runners`, and its state."""

    def __init__(self, directory, url):
        self.directory = directory
        self.modules = directory / "modules"
        self.source = ""
        shutil.copytree(MODULE, self.modules / "new")
        (directory / "main.tf").write_text(PROVIDER.format(region=REGION, url=url))
        mirror = f'provider_installation {{\n  filesystem_mirror {{\n    path = "{PLUGINS}"\n  }}\n}}\n'
        (directory / "terraformrc").write_text(mirror)
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "TF_"))},
            "TF_CLI_CONFIG_FILE": str(directory / "terraformrc"),
            "CHECKPOINT_DISABLE": "1",
            "TF_CLI_ARGS": "-no-color",
        }

    def write(self, source, inputs):
        call = {"module": {"runners": {"source": f"./modules/{source}", **inputs}}}
        (self.directory / "runners.tf.json").write_text(json.dumps(call))
        if source != self.source:
            self.terraform("init", "-input=false")
        self.source = source

    def terraform(self, *arguments, codes=(0,)):
        result = subprocess.run(
            ["terraform", *arguments],
            cwd=self.directory,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert result.returncode in codes, result.stdout + result.stderr
        return result

    def plan(self, codes=(0,)):
        """What a plan changes: the actions for each address below the module, and the addresses before."""
        result = self.terraform("plan", "-input=false", "-out=plan", codes=codes)
        if result.returncode != 0:
            return " ".join(re.sub(r"[│╷╵]", "", result.stderr).split())
        changes = json.loads(self.terraform("show", "-json", "plan").stdout)["resource_changes"]
        return {
            each["address"].removeprefix("module.runners."): (each["change"]["actions"], each.get("previous_address"))
            for each in changes
            if changes_something(each["change"]) or each.get("previous_address")
        }

    def apply(self):
        self.terraform("apply", "-input=false", "plan")

    def outputs(self):
        return json.loads(self.terraform("output", "-json").stdout)["all"]["value"]


@pytest.fixture(scope="module")
def cloud(moto):
    """moto, with the clusters, subnets and security groups that the module does not make."""

    def client(service):
        keys = {"aws_access_key_id": "none", "aws_secret_access_key": "none"}
        return boto3.client(service, endpoint_url=moto, region_name=REGION, **keys)

    ec2, ecs = client("ec2"), client("ecs")
    vpc = ec2.create_vpc(CidrBlock="10.0.0.0/16")["Vpc"]["VpcId"]
    cloud = {
        "url": moto,
        "client": client,
        "clusters": {
            name: ecs.create_cluster(clusterName=name)["cluster"]["clusterArn"] for name in ("managers", "workers")
        },
        "subnets": [
            ec2.create_subnet(VpcId=vpc, CidrBlock=f"10.0.{number}.0/24")["Subnet"]["SubnetId"] for number in (0, 1)
        ],
        "groups": [
            ec2.create_security_group(VpcId=vpc, GroupName=name, Description=name)["GroupId"]
            for name in ("managers", "workers", "own")
        ],
    }
    return cloud


def inputs_for(cloud, name):
    """Inputs as users of the replaced module have them."""
    worker = {
        "worker_ecs_cluster_arn": cloud["clusters"]["workers"],
        "worker_aws_region": REGION,
        "worker_subnet_id": cloud["subnets"][1],
        "worker_security_group_id": cloud["groups"][1],
    }
    return {
        "project_code": "My_project",
        "environment": "dev",
        "service_name": name,
        "manager_instance_count": 1,
        "manager_ecs_cluster_arn": cloud["clusters"]["managers"],
        "manager_docker_image": f"{ACCOUNT}.dkr.ecr.{REGION}.amazonaws.com/manager:1",
        "manager_subnet_ids": cloud["subnets"],
        "manager_security_group_ids": cloud["groups"][:1],
        "gitlab_token_secret_arn": f"arn:aws:secretsmanager:{REGION}:{ACCOUNT}:secret:gitlab-AbCdEf:token::",
        "gitlab_url": "https://gitlab.example.com/",
        "gitlab_runner_concurrency": 10,
        "gitlab_runner_name_prefix": "fargate",
        "managers_configs": {
            "dev_tool1": {
                **worker,
                "tags": ["dev", "tool1"],
                "limit": 10,
                "worker_docker_image": f"{ACCOUNT}.dkr.ecr.{REGION}.amazonaws.com/team/worker-1:2",
                "worker_cpu": 256,
                "worker_memory": 512,
                "worker_ssh_user": "user_1",
                "worker_task_role_arn": f"arn:aws:iam::{ACCOUNT}:role/worker-1",
            },
            "dev_tool2_tool3": {
                **worker,
                "tags": ["dev", "r&d"],
                "limit": 5,
                "worker_docker_image": "debian:12",
                "worker_cpu": 512,
                "worker_memory": 2048,
                "worker_ssh_user": "",
                "worker_task_role_arn": "",
            },
        },
        "iam_permissions_boundary": "",
    }


@pytest.fixture
def stack(cloud, tmp_path):
    return Stack(tmp_path, cloud["url"])


@needs_provider
def test_terraform_validate_accepts_the_module(stack, cloud):
    stack.write("new", inputs_for(cloud, "valid"))
    assert "Success" in stack.terraform("validate").stdout
    assert "Warning" not in stack.terraform("validate").stdout


def container_of(cloud, definition):
    found = cloud["client"]("ecs").describe_task_definition(taskDefinition=definition)["taskDefinition"]
    (container,) = found["containerDefinitions"]
    return found, container


@needs_provider
def test_terraform_apply_makes_what_the_driver_needs(stack, cloud):
    inputs = inputs_for(cloud, "whole")
    stack.write("new", inputs)
    plan = stack.plan()
    assert {actions[0] for actions, _ in plan.values()} == {"create"}
    stack.apply()
    assert stack.plan() == {}, "a second plan changes something"

    outputs = stack.outputs()
    assert outputs["manager_service_name"] == "myproject-dev-whole"
    worker, container = container_of(cloud, outputs["worker_task_definition_arns"]["dev_tool1"])
    assert worker["family"] == "task-My_project-dev-whole-worker-dev_tool1"
    assert (worker["cpu"], worker["memory"], worker["networkMode"]) == ("256", "512", "awsvpc")
    assert worker["taskRoleArn"].endswith(":role/worker-1")
    assert container["name"] == "ci-coordinator"
    assert [mapping["containerPort"] for mapping in container["portMappings"]] == [22]

    manager, container = container_of(cloud, "myproject-dev-whole")
    assert container["secrets"] == [
        {"name": "GITLAB_REGISTRATION_TOKEN", "valueFrom": inputs["gitlab_token_secret_arn"]}
    ]
    variables = {each["name"]: each["value"] for each in container["environment"]}
    assert json.loads(variables["DRIVER_SETTINGS"]) == {"Fargate": {"AllowedTaskDefinitions": []}}
    managers = json.loads(variables["MANAGERS_CONFIGS"])
    assert managers["dev_tool2_tool3"]["tag_list"] == "dev,r&d"
    for name, config in managers.items():
        assert outputs["worker_task_definition_arns"][name].startswith(f"{config['worker_task_definition_arn']}:")
    assert int(variables["STOP_TIMEOUT"]) + int(variables["SHUTDOWN_TIMEOUT"]) + 7 <= container["stopTimeout"] <= 120
    (example,) = json.loads((ROOT / "examples/ecs-manager/task-definition.json").read_text())["containerDefinitions"]
    for key in ("healthCheck", "linuxParameters", "stopTimeout"):
        assert container[key] == example[key]

    (service,) = cloud["client"]("ecs").describe_services(
        cluster=inputs["manager_ecs_cluster_arn"], services=[outputs["manager_service_name"]]
    )["services"]
    assert service["desiredCount"] == 1

    def policy(role, name):
        return cloud["client"]("iam").get_role_policy(RoleName=role, PolicyName=name)["PolicyDocument"]["Statement"]

    tasks = {each["Sid"]: each for each in policy("myproject-dev-whole-task", "manager")}
    definitions = f"arn:aws:ecs:{REGION}:{ACCOUNT}:task-definition/task-My_project-dev-whole-worker"
    assert tasks["StartTasks"]["Resource"] == [f"{definitions}-dev_tool2_tool3:*", f"{definitions}-dev_tool1:*"]
    assert tasks["FindTasks"]["Condition"] == {"ArnEquals": {"ecs:cluster": cloud["clusters"]["workers"]}}
    assert tasks["PassRolesToTasks"]["Resource"] == [
        f"arn:aws:iam::{ACCOUNT}:role/worker-1",
        outputs["worker_execution_role_arn"],
    ]
    ecs = f"arn:aws:ecs:{REGION}:{ACCOUNT}"
    own, other = {"ecs:cluster": cloud["clusters"]["workers"]}, {"ecs:cluster": f"{ecs}:cluster/production"}
    to_tasks = {"iam:PassedToService": "ecs-tasks.amazonaws.com"}
    worker_role = f"arn:aws:iam::{ACCOUNT}:role/worker-1"
    rows = [
        (True, "ecs:RunTask", f"{definitions}-dev_tool1:7", own),
        (False, "ecs:RunTask", f"{definitions}-dev_tool1:7", other),
        (False, "ecs:RunTask", f"{definitions}-other:1", own),
        (False, "ecs:RunTask", f"{ecs}:task-definition/myproject-dev-whole:1", own),
        (True, "ecs:ListTasks", "*", own),
        (False, "ecs:ListTasks", "*", other),
        (True, "ecs:StopTask", f"{ecs}:task/workers/0123", own),
        (True, "ecs:DescribeTasks", f"{ecs}:task/workers/0123", own),
        (True, "ecs:DescribeTasks", f"{ecs}:task/managers/0123", {}),
        (False, "ecs:StopTask", f"{ecs}:task/managers/0123", {}),
        (True, "iam:PassRole", worker_role, to_tasks),
        (True, "iam:PassRole", outputs["worker_execution_role_arn"], to_tasks),
        (False, "iam:PassRole", worker_role, {"iam:PassedToService": "lambda.amazonaws.com"}),
        (False, "iam:PassRole", outputs["manager_task_role_arn"], to_tasks),
    ]
    assert [(is_allowed(tasks.values(), *question), *question) for _, *question in rows] == rows
    execution = {each["Sid"]: each for each in policy("myproject-dev-whole-exec", "manager-execution")}
    assert execution["ReadTokensInSecretsManager"]["Resource"].endswith(":secret:gitlab-AbCdEf")
    assert "ReadTokensInParameterStore" not in execution and "DecryptTokens" not in execution
    pulls = {
        each["Sid"]: each for each in policy("iam-role-My_project-dev-whole-worker-execution", "worker-execution")
    }
    assert pulls["PullWorkerImages"]["Resource"] == f"arn:aws:ecr:{REGION}:{ACCOUNT}:repository/team/worker-1"

    # A new worker image does not restart the managers.
    inputs["managers_configs"]["dev_tool2_tool3"]["worker_docker_image"] = "debian:13"
    stack.write("new", inputs)
    assert stack.plan() == {'aws_ecs_task_definition.worker["dev_tool2_tool3"]': (["create", "delete"], None)}
    stack.terraform("destroy", "-auto-approve")


@needs_provider
def test_terraform_apply_reads_tokens_of_either_service(stack, cloud):
    inputs = inputs_for(cloud, "tokens")
    key = cloud["client"]("kms").create_key()["KeyMetadata"]["Arn"]
    parameter = f"arn:aws:ssm:{REGION}:{ACCOUNT}:parameter/gitlab/tool1"
    secret = f"arn:aws:secretsmanager:{REGION}:{ACCOUNT}:secret:tool2-AbCdEf"
    inputs["gitlab_token_secret_arn"] = ""
    inputs["gitlab_runner_token_secret_arns"] = {"dev_tool1": parameter, "dev_tool2_tool3": secret}
    inputs["secrets_kms_key"] = key
    inputs["driver_settings"] = {"Fargate": {"LaunchType": "FARGATE", "AllowedTaskDefinitions": []}}
    inputs["managers_driver_settings"] = {"dev_tool1": {"SSH": {"CancelGracePeriod": 20}}}
    inputs["manager_policy_arns"] = {"tags": f"arn:aws:iam::{ACCOUNT}:policy/tags"}
    iam = cloud["client"]("iam")
    allow = {"Version": "2012-10-17", "Statement": [{"Effect": "Allow", "Action": "ecs:TagResource", "Resource": "*"}]}
    iam.create_policy(PolicyName="tags", PolicyDocument=json.dumps(allow))
    stack.write("new", inputs)
    stack.plan()
    stack.apply()
    _, container = container_of(cloud, "myproject-dev-tokens")
    assert {each["name"]: each["valueFrom"] for each in container["secrets"]} == {
        "GITLAB_RUNNER_TOKEN_DEV_TOOL1": parameter,
        "GITLAB_RUNNER_TOKEN_DEV_TOOL2_TOOL3": secret,
    }
    managers = json.loads({each["name"]: each["value"] for each in container["environment"]}["MANAGERS_CONFIGS"])
    assert managers["dev_tool1"]["driver_settings"] == {"SSH": {"CancelGracePeriod": 20}}
    assert "driver_settings" not in managers["dev_tool2_tool3"]
    document = iam.get_role_policy(RoleName="myproject-dev-tokens-exec", PolicyName="manager-execution")
    resources = {each["Sid"]: each["Resource"] for each in document["PolicyDocument"]["Statement"]}
    assert resources["ReadTokensInSecretsManager"] == secret
    assert resources["ReadTokensInParameterStore"] == parameter
    assert resources["DecryptTokens"] == key
    attached = iam.list_attached_role_policies(RoleName="myproject-dev-tokens-task")["AttachedPolicies"]
    assert [each["PolicyName"] for each in attached] == ["tags"]
    stack.terraform("destroy", "-auto-approve")


BAD_INPUTS = {
    "project_code": ("a b", "project_code may contain only letters"),
    "manager_instance_count": (1.5, "manager_instance_count must be a whole number"),
    "manager_ecs_cluster_arn": ("managers", "manager_ecs_cluster_arn must be the ARN of an ECS cluster"),
    "manager_subnet_ids": ([], "manager_subnet_ids must name at least one subnet"),
    "manager_security_group_ids": ([], "manager_security_group_ids must name 1 to 5"),
    # The sample of the replaced module names the region twice, in place of the account.
    "gitlab_token_secret_arn": (f"arn:aws:secretsmanager:{REGION}:{REGION}:secret:a", "must be the ARN of a secret"),
    "gitlab_url": ("gitlab.example.com", "gitlab_url must begin with https://"),
    "gitlab_runner_concurrency": (0, "gitlab_runner_concurrency must be a whole number of at least 1"),
    "gitlab_runner_name_prefix": ("", "gitlab_runner_name_prefix must have 1 to 100 printable characters"),
    "managers_configs": ({}, "managers_configs must describe at least one manager"),
    "gitlab_runner_token_secret_arns": ({"dev_tool1": "glrt-token"}, "must have ARNs of secrets"),
    "driver_settings": ("a", "driver_settings must be an object"),
    "log_retention_days": (31, "log_retention_days must be a number of days that CloudWatch Logs accepts"),
}


@needs_provider
def test_terraform_plan_refuses_bad_inputs(stack, cloud):
    good = inputs_for(cloud, "bad")
    stack.write("new", good)
    # Terraform reports all of these at once, and only then looks at what depends on several inputs.
    stack.write("new", {**good, **{name: value for name, (value, _) in BAD_INPUTS.items()}})
    problems = stack.plan(codes=(1,))
    for name, (_, message) in BAD_INPUTS.items():
        assert message in problems, name
    bad = {"gitlab_token_secret_arn": "", "aws_region": "eu-west-1", "managers_driver_settings": {"other": {}}}
    stack.write("new", {**good, **bad})
    problems = stack.plan(codes=(1,))
    assert "Each manager needs a token" in problems
    assert "aws_region differs from the region of manager_ecs_cluster_arn, which is us-east-2" in problems
    assert "may name only managers of managers_configs" in problems
    without = {name: value for name, value in good.items() if name != "managers_configs"}
    stack.write("new", without)
    assert "worker_aws_region of r1 is region-1" in stack.plan(codes=(1,))


def replaced_module(cloud, modules, name):
    """What the replaced module leaves in the state: resources at its addresses, with its names."""
    trust = json.dumps(
        {
            "Version": "2012-10-17",
            "Statement": [
                {
                    "Effect": "Allow",
                    "Principal": {"Service": "ecs-tasks.amazonaws.com"},
                    "Action": "sts:AssumeRole",
                }
            ],
        }
    )
    task = {"requires_compatibilities": ["FARGATE"], "network_mode": "awsvpc", "cpu": 256, "memory": 512}

    def container(name):
        return json.dumps([{"name": name, "image": "old", "essential": True}])

    full = f"My_project-dev-{name}"
    short = f"myproject-dev-{name}"
    service = {
        "resource": {
            "aws_ecs_task_definition": {
                "default": {"count": 1, "family": short, "container_definitions": container("manager"), **task}
            },
            "aws_iam_role": {
                "ecs_task": {"count": 1, "name": f"{short}-task", "assume_role_policy": trust},
                "ecs_exec": {"count": 1, "name": f"{short}-exec", "assume_role_policy": trust},
            },
            "aws_ecs_service": {
                "default": {
                    "count": 1,
                    "name": short,
                    "cluster": cloud["clusters"]["managers"],
                    "task_definition": "${aws_ecs_task_definition.default[0].arn}",
                    "desired_count": 1,
                    "launch_type": "FARGATE",
                    "network_configuration": {
                        "subnets": cloud["subnets"],
                        "security_groups": [cloud["groups"][0], cloud["groups"][2]],
                    },
                    "depends_on": ["var.worker"],
                }
            },
        },
        "variable": {"worker": {}},
        "output": {"role": {"value": "${aws_iam_role.ecs_task[0].name}"}},
    }
    worker = {
        "variable": {"key": {"type": "string"}},
        "resource": {
            "aws_ecs_task_definition": {
                "ecs_task_definition": {
                    "count": 1,
                    "family": f"task-{full}-worker-${{var.key}}",
                    "container_definitions": container("ci-coordinator"),
                    **task,
                }
            }
        },
        "output": {"arn": {"value": "${aws_ecs_task_definition.ecs_task_definition[0].arn}"}},
    }
    allow = {"Version": "2012-10-17", "Statement": [{"Effect": "Allow", "Action": "ecs:RunTask", "Resource": "*"}]}
    main = {
        "module": {
            "worker_task_definition": {
                "for_each": '${toset(["dev_tool1", "dev_tool2_tool3"])}',
                "source": "./worker",
                "key": "${each.key}",
            },
            "manager_service": {
                "source": "./service",
                "worker": "${[for each in module.worker_task_definition : each.arn]}",
            },
        },
        "resource": {
            "aws_iam_role": {
                "worker_execution_role": {
                    "name": f"iam-role-{full}-worker-execution",
                    "assume_role_policy": trust,
                }
            },
            "aws_iam_role_policy": {
                "manager_service_run_task": {
                    "name": f"iam-policy-{name}-run-task",
                    "role": "${module.manager_service.role}",
                    "policy": json.dumps(allow),
                }
            },
        },
        "output": {"manager_service_name": {"value": short}},
    }
    for path, content in {"": main, "service": service, "worker": worker}.items():
        directory = modules / "old" / path
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "main.tf.json").write_text(json.dumps(content))


@needs_provider
def test_terraform_apply_takes_over_the_state_of_the_replaced_module(stack, cloud):
    replaced_module(cloud, stack.modules, "moved")
    stack.write("old", {})
    stack.plan()
    stack.apply()
    inputs = inputs_for(cloud, "moved")
    stack.write("new", inputs)
    plan = stack.plan()
    moved = {address: change for address, change in plan.items() if change[1]}
    assert moved == {
        "aws_ecs_service.manager": (["update"], "module.runners.module.manager_service.aws_ecs_service.default[0]"),
        "aws_iam_role.manager": (["update"], "module.runners.module.manager_service.aws_iam_role.ecs_task[0]"),
        "aws_iam_role.manager_execution": (
            ["update"],
            "module.runners.module.manager_service.aws_iam_role.ecs_exec[0]",
        ),
        "aws_iam_role.worker_execution": (["update"], "module.runners.aws_iam_role.worker_execution_role"),
    }
    removed = {address for address, (actions, _) in plan.items() if actions == ["delete"]}
    assert removed == {
        "aws_iam_role_policy.manager_service_run_task",
        "module.manager_service.aws_ecs_task_definition.default[0]",
        'module.worker_task_definition["dev_tool1"].aws_ecs_task_definition.ecs_task_definition[0]',
        'module.worker_task_definition["dev_tool2_tool3"].aws_ecs_task_definition.ecs_task_definition[0]',
    }
    stack.apply()
    assert stack.plan() == {}

    # And the way back that README.md describes.
    for block in re.findall(r"^moved \{.*?^\}", (MODULE / "moved.tf").read_text(), re.M | re.S):
        old, new = (re.search(rf"\b{end}\s*= (.*)", block).group(1) for end in ("from", "to"))
        stack.terraform("state", "mv", f"module.runners.{new}", f"module.runners.{old}")
    stack.write("old", {})
    back = stack.plan()
    for _, (_, address) in moved.items():
        assert back[address.removeprefix("module.runners.")] == (["update"], None)
    stack.terraform("destroy", "-auto-approve")


class GitLab(http.server.BaseHTTPRequestHandler):
    """Registers every runner."""

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        body = json.dumps({"id": 1, "token": "glrt-00000000000000000000", "token_expires_at": None}).encode()
        self.send_response(201)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@needs_provider
def test_terraform_passes_variables_that_the_manager_accepts(stack, cloud, tmp_path):
    bun = ROOT / "node_modules" / ".bin" / "bun"
    if not bun.exists():
        pytest.skip("there is no bun: run npm run check first")
    stack.write("new", inputs_for(cloud, "variables"))
    stack.plan()
    stack.apply()
    _, container = container_of(cloud, "myproject-dev-variables")
    stack.terraform("destroy", "-auto-approve")
    gitlab = http.server.ThreadingHTTPServer(("127.0.0.1", 0), GitLab)
    threading.Thread(target=gitlab.serve_forever, daemon=True).start()
    environment = {each["name"]: each["value"] for each in container["environment"]}
    environment.update({each["name"]: "registration-token" for each in container["secrets"]})
    environment["GITLAB_URL"] = f"http://127.0.0.1:{gitlab.server_port}"
    environment["CONFIG_FILE"] = str(tmp_path / "config.toml")
    result = subprocess.run(
        [bun, "--no-env-file", "--config=/dev/null", ROOT / "fargate.ts", "runners"],
        env={"PATH": os.environ["PATH"], "HOME": str(tmp_path), **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    gitlab.shutdown()
    gitlab.server_close()
    assert result.returncode == 0, result.stderr
    assert not re.search(r"(warning|error): ", result.stderr), result.stderr
    settings = (tmp_path / "fargate-dev_tool1.toml").read_text()
    assert "task-definition/task-My_project-dev-variables-worker-dev_tool1" in settings
    assert "AllowedTaskDefinitions = []" in re.sub(r"\[\s+\]", "[]", settings)
