"""Tests of examples/cloudformation/fargate-runner.yaml: what it creates, and with which values."""

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import template as cloudformation
from deployment import (
    ACCOUNT,
    EVERYTHING,
    PSEUDO,
    REGION,
    REQUIRED,
    ROOT,
    SECRET,
    STACK,
    TEMPLATE,
    Deployment,
    Network,
    client,
    image,
)
from manager import GitLab, configure
from policies import is_allowed

# Rules of cfn-lint that the template breaks, each with the reason.
IGNORED_RULES = {}
# Regions of three partitions.
LINTED_REGIONS = ["us-east-1", "eu-central-1", "cn-north-1", "us-gov-west-1"]

# Types that moto's CloudFormation skips, each with what creates it in the tests instead.
SKIPPED_BY_MOTO = {
    "AWS::EC2::SecurityGroupEgress": "deployment.py, through AuthorizeSecurityGroupEgress",
    "AWS::S3::BucketPolicy": "deployment.py, through PutBucketPolicy",
}

VARIANTS = {"defaults": {}, "everything": EVERYTHING}


@pytest.fixture(params=VARIANTS.values(), ids=VARIANTS.keys())
def stack(request, aws):
    return Deployment(aws, request.param).create()


def lint(path):
    options = ["--format", "json", "--include-checks", "I", "--regions", *LINTED_REGIONS]
    ignored = ["--ignore-checks", *IGNORED_RULES] if IGNORED_RULES else []
    program = Path(sys.executable).with_name("cfn-lint")
    command = [str(program), *options, *ignored, "--", str(path)]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    assert finished.stderr == ""
    return [(finding["Rule"]["Id"], finding["Message"]) for finding in json.loads(finished.stdout)]


def test_cfn_lint_finds_nothing():
    assert lint(TEMPLATE) == []


def test_cfn_lint_finds_a_mistake(tmp_path):
    broken = tmp_path / "broken.yaml"
    text = TEMPLATE.read_text()
    broken.write_text(text.replace("LaunchType: FARGATE", "LaunchTypo: FARGATE").replace("!Ref LogRetention", "31"))
    assert {rule for rule, _ in lint(broken)} == {"E3002", "E3030", "W2001"}


@pytest.mark.filterwarnings("ignore:Tried to parse AWS")
@pytest.mark.parametrize("parameters", VARIANTS.values(), ids=VARIANTS.keys())
def test_moto_skips_only_the_listed_types(aws, parameters):
    network = Network(aws)
    given = {"VpcId": network.vpc, "SubnetIds": ",".join(network.subnets), **REQUIRED, **parameters}
    formation = client(aws, "cloudformation")
    formation.create_stack(
        StackName=STACK,
        TemplateBody=TEMPLATE.read_text(),
        Parameters=[{"ParameterKey": key, "ParameterValue": value} for key, value in given.items()],
        Capabilities=["CAPABILITY_IAM"],
    )
    [made] = formation.describe_stacks(StackName=STACK)["Stacks"]
    assert made["StackStatus"] == "CREATE_COMPLETE"
    # moto lists a resource of a type that it does not know, but without its name.
    resources = formation.describe_stack_resources(StackName=STACK)["StackResources"]
    created = {resource["LogicalResourceId"] for resource in resources if "LogicalResourceId" in resource}
    resolver = Deployment(aws, parameters, network)
    wanted = {name for name in resolver.template["Resources"] if resolver.is_created(name)}
    assert created <= wanted
    skipped = {resolver.template["Resources"][name]["Type"] for name in wanted - created}
    assert skipped == set(SKIPPED_BY_MOTO)


def test_template_can_be_sent_without_a_bucket():
    assert len(TEMPLATE.read_bytes()) <= 51_200  # bytes, the limit of CreateStack


# ---------------------------------------------------------------------------------------------------------
# Parameters
# ---------------------------------------------------------------------------------------------------------


def test_template_names_no_account_region_or_partition():
    text = re.sub(r"^ *(Description: .*|#.*|.*such as.*)$", "", TEMPLATE.read_text(), flags=re.MULTILINE)
    assert not re.search(r"\b\d{12}\b", text)
    assert not re.search(r"\b[a-z]{2}-[a-z]+-\d\b", text)
    assert not re.search(r"arn:aws\b", text)


def test_template_shows_every_parameter_in_a_group():
    template = cloudformation.load(TEMPLATE)
    groups = template["Metadata"]["AWS::CloudFormation::Interface"]["ParameterGroups"]
    shown = [name for group in groups for name in group["Parameters"]]
    assert shown == list(template["Parameters"])
    assert all(parameter["Description"] for parameter in template["Parameters"].values())


REFUSED = [
    ("RunnerTokenSecretArn", "glrt-not-an-arn"),
    ("RunnerTokenSecretArn", SECRET.removesuffix("-AbCdEf")),
    ("RunnerTokenKeyArn", "alias/key"),
    ("GitLabUrl", "gitlab.example.com"),
    ("GitLabUrl", "https://user:password@gitlab.example.com"),
    ("WorkerImage", "debian:bookworm-slim"),
    ("ManagerImage", "registry.example.com/manager:1"),
    ("AllowedImages", 'node:*,"],"x":["'),
    ("SpotShare", "60"),
    ("WorkerDisk", "19"),
    ("ManagerCount", "11"),
    ("PermissionsBoundaryArn", "boundary"),
]


@pytest.mark.parametrize(("name", "value"), REFUSED)
def test_parameters_refuse(aws, name, value):
    with pytest.raises(AssertionError, match=f"^{name}: "):
        Deployment(aws, {name: value})


# CPU units of Fargate, and the MiB of memory that each may have.
FARGATE_SIZES = {
    256: [512, 1024, 2048],
    512: range(1024, 4096 + 1, 1024),
    1024: range(2048, 8192 + 1, 1024),
    2048: range(4096, 16384 + 1, 1024),
    4096: range(8192, 30720 + 1, 1024),
    8192: range(16384, 61440 + 1, 4096),
    16384: range(32768, 122880 + 1, 8192),
}


@pytest.mark.parametrize("container", ["Worker", "Manager"])
def test_rules_allow_exactly_the_sizes_that_fargate_has(aws, container):
    network = Network(aws)
    declared = cloudformation.load(TEMPLATE)["Parameters"]
    every = {512, *range(1024, 122880 + 1, 1024)}
    memory = sorted(declared[f"{container}Memory"].get("AllowedValues", every))
    for cpu in declared[f"{container}Cpu"]["AllowedValues"]:
        for mib in memory:
            sizes = {f"{container}Cpu": cpu, f"{container}Memory": mib}
            broken = Deployment(aws, sizes, network).broken_rules()
            exists = mib in FARGATE_SIZES[cpu]
            assert len(broken) == (0 if exists else 1), sizes
            assert exists or broken[0].startswith(f"With {container}Cpu {cpu}, {container}Memory must be ")


def test_rules_refuse_a_subnet_of_another_vpc(aws):
    network = Network(aws)
    network.subnets.append(Network(aws, cidr="10.2").subnets[0])
    assert Deployment(aws, {}, network).broken_rules() == ["All of SubnetIds must be subnets of VpcId."]


# For each parameter, another value, and the properties that it changes.
MANAGER = "ManagerTaskDefinition.ContainerDefinitions[manager]"
SETTINGS = f"{MANAGER}.Environment[DRIVER_SETTINGS].Value"
JOB_IMAGE = [
    f"ManagerTaskRole.Policies[{policy}].PolicyDocument.Statement[{sid}]"
    for policy, sid in (
        ("driver", "RegisterDefinitionsOfImages"),
        ("driver", "StartTasksOfImages"),
        ("driver", "PassRolesToTasksOfImages"),
        ("sweep", "DeregisterOldDefinitionsOfImages"),
    )
]
EFFECTS = {
    "GitLabUrl": ("https://gitlab.example.com", [f"{MANAGER}.Environment[GITLAB_URL].Value"]),
    "RunnerTokenSecretArn": (
        SECRET.replace("AbCdEf", "GhIjKl"),
        [
            "ManagerExecutionRole.Policies[execution-role].PolicyDocument.Statement[ReadRunnerToken].Resource",
            f"{MANAGER}.Secrets[GITLAB_RUNNER_TOKEN].ValueFrom",
        ],
    ),
    "RunnerTokenKeyArn": (
        EVERYTHING["RunnerTokenKeyArn"],
        ["ManagerExecutionRole.Policies[execution-role].PolicyDocument.Statement[DecryptRunnerToken]"],
    ),
    "Concurrency": ("20", [f"{MANAGER}.Environment[RUNNER_CONCURRENCY].Value"]),
    "VpcId": ("vpc-2", ["ManagerSecurityGroup.VpcId", "TaskSecurityGroup.VpcId"]),
    "SubnetIds": ("subnet-2", ["ManagerService.NetworkConfiguration.AwsvpcConfiguration.Subnets", SETTINGS]),
    "AssignPublicIp": (
        "ENABLED",
        ["ManagerService.NetworkConfiguration.AwsvpcConfiguration.AssignPublicIp", SETTINGS],
    ),
    "TaskOutbound": ("all", ["TaskSecurityGroup.SecurityGroupEgress[0]"]),
    "ManagerImage": (
        image("other:1"),
        [
            "ManagerExecutionRole.Policies[execution-role].PolicyDocument.Statement[PullManagerImage].Resource",
            f"{MANAGER}.Image",
        ],
    ),
    "WorkerImage": (
        image("other:1"),
        [
            "WorkerExecutionRole.Policies[execution-role].PolicyDocument.Statement[PullWorkerImage].Resource",
            "WorkerTaskDefinition.ContainerDefinitions[ci-coordinator].Image",
        ],
    ),
    "CpuArchitecture": (
        "ARM64",
        [f"{name}TaskDefinition.RuntimePlatform.CpuArchitecture" for name in ("Manager", "Worker")],
    ),
    "AllowedImages": ("node:*", [SETTINGS, *JOB_IMAGE]),
    "AllowedServices": ("postgres:*", [SETTINGS, *JOB_IMAGE]),
    "WorkerCpu": ("2048", ["WorkerTaskDefinition.Cpu"]),
    "WorkerMemory": ("4096", ["WorkerTaskDefinition.Memory"]),
    "WorkerDisk": ("50", ["WorkerTaskDefinition.EphemeralStorage.SizeInGiB"]),
    "SpotShare": ("75", ["Cluster.DefaultCapacityProviderStrategy[FARGATE_SPOT].Weight", SETTINGS]),
    "JobPolicyArns": (EVERYTHING["JobPolicyArns"], ["WorkerTaskRole.ManagedPolicyArns"]),
    "ExecuteCommand": ("ENABLED", [SETTINGS, "WorkerTaskRole.Policies"]),
    "ManagerCount": ("2", ["ManagerService.DesiredCount"]),
    "ManagerCpu": ("1024", ["ManagerTaskDefinition.Cpu"]),
    "ManagerMemory": ("2048", ["ManagerTaskDefinition.Memory"]),
    "LogRetention": ("7", ["ManagerLogGroup.RetentionInDays", "WorkerLogGroup.RetentionInDays"]),
    "CacheExpiration": ("30", ["CacheBucket.LifecycleConfiguration.Rules[0].ExpirationInDays"]),
    "ContainerInsights": ("enabled", ["Cluster.ClusterSettings[containerInsights].Value"]),
    "PermissionsBoundaryArn": (
        EVERYTHING["PermissionsBoundaryArn"],
        [
            f"{name}.PermissionsBoundary"
            for name in ("ManagerExecutionRole", "ManagerTaskRole", "WorkerExecutionRole", "WorkerTaskRole")
        ],
    ),
}


def values_with(**parameters):
    given = {"VpcId": "vpc-1", "SubnetIds": "subnet-1", **REQUIRED, **parameters}
    return cloudformation.Symbols(cloudformation.load(TEMPLATE), given, PSEUDO)


def test_every_parameter_has_its_effect_and_no_other():
    assert list(EFFECTS) == list(cloudformation.load(TEMPLATE)["Parameters"])
    before = values_with().values()
    for name, (value, paths) in EFFECTS.items():
        after = values_with(**{name: value}).values()
        changed = {path for path in before.keys() | after.keys() if before.get(path) != after.get(path)}
        for path in changed:
            assert path.startswith(tuple(paths)), f"{name} changes {path}"
        for path in paths:
            assert any(each.startswith(path) for each in changed), f"{name} does not change {path}"


def test_resources_refer_to_each_other_as_they_should():
    values = values_with().values()
    for name, container in (("Worker", "ci-coordinator"), ("Manager", "manager")):
        definition = f"{name}TaskDefinition"
        log = f"{definition}.ContainerDefinitions[{container}].LogConfiguration.Options"
        assert values[f"{definition}.ExecutionRoleArn"] == f"{name}ExecutionRole.Arn"
        assert values[f"{definition}.TaskRoleArn"] == f"{name}TaskRole.Arn"
        assert values[f"{log}.awslogs-group"] == f"{name}LogGroup"
        assert values[f"{log}.awslogs-region"] == REGION
    variables = f"{MANAGER}.Environment"
    for variable, resource in (
        ("CACHE_S3_BUCKET_NAME", "CacheBucket"),
        ("FARGATE_CLUSTER", "Cluster"),
        ("FARGATE_SECURITY_GROUP", "TaskSecurityGroup"),
    ):
        assert values[f"{variables}[{variable}].Value"] == resource
    assert values["ManagerService.Cluster"] == "Cluster"
    assert values["ManagerService.TaskDefinition"] == "ManagerTaskDefinition"
    assert values["ManagerService.NetworkConfiguration.AwsvpcConfiguration.SecurityGroups"] == ["ManagerSecurityGroup"]
    # Without it, the service's first jobs could fail, and its last ones when the stack is removed.
    needed = {"WorkerTaskDefinition", "ManagerToTasks", "CacheBucketPolicy"}
    assert set(cloudformation.load(TEMPLATE)["Resources"]["ManagerService"]["DependsOn"]) == needed


def test_outputs_are_those_of_the_resources_that_they_name():
    resolver = values_with()
    outputs = {name: resolver.resolve(output["Value"]) for name, output in resolver.template["Outputs"].items()}
    del outputs["FargateToml"]
    assert outputs == {
        "ClusterName": "Cluster",
        "ManagerServiceName": "ManagerService.Name",
        "ManagerLogGroupName": "ManagerLogGroup",
        "WorkerLogGroupName": "WorkerLogGroup",
        "ManagerTaskRoleArn": "ManagerTaskRole.Arn",
        "WorkerTaskRoleArn": "WorkerTaskRole.Arn",
        "ManagerSecurityGroupId": "ManagerSecurityGroup",
        "TaskSecurityGroupId": "TaskSecurityGroup",
        "CacheBucketName": "CacheBucket",
    }


def test_template_creates_everything_that_it_declares(stack):
    assert set(stack.attributes) == {name for name in stack.template["Resources"] if stack.is_created(name)}
    if stack.parameters["AllowedImages"] != [""]:
        assert set(stack.attributes) == set(stack.template["Resources"])


# ---------------------------------------------------------------------------------------------------------
# Tasks
# ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("share", "weights"),
    [("0", (0, 1)), ("25", (1, 3)), ("50", (1, 1)), ("75", (3, 1)), ("100", (1, 0))],
)
def test_cluster_starts_the_share_of_jobs_on_spot(aws, share, weights):
    stack = Deployment(aws, {"SpotShare": share}).create()
    [cluster] = stack.client("ecs").describe_clusters(clusters=[STACK])["clusters"]
    assert cluster["capacityProviders"] == ["FARGATE", "FARGATE_SPOT"]
    strategy = {item["capacityProvider"]: item["weight"] for item in cluster["defaultCapacityProviderStrategy"]}
    assert strategy == {"FARGATE_SPOT": weights[0], "FARGATE": weights[1]}
    fallback = json.loads(stack.environment()["DRIVER_SETTINGS"])["Fargate"].get("FallbackCapacityProviderStrategy")
    assert fallback == (None if share == "0" else [{"CapacityProvider": "FARGATE"}])


def test_definitions_are_those_of_the_examples(stack):
    """The same as the task definitions in examples/, but for names, sizes, variables and what a comment explains."""
    for logical_id, path in (
        ("WorkerTaskDefinition", "task-definition.json"),
        ("ManagerTaskDefinition", "ecs-manager/task-definition.json"),
    ):
        example = json.loads((ROOT / "examples" / path).read_text())
        made = stack.client("ecs").describe_task_definition(taskDefinition=stack.attribute(logical_id, "Ref"))[
            "taskDefinition"
        ]
        for key in ("requiresCompatibilities", "networkMode"):
            assert made[key] == example[key]
        for key in ("cpu", "memory"):
            assert (made[key], logical_id) == (example[key], logical_id)
        [container], [wanted] = made["containerDefinitions"], example["containerDefinitions"]
        for key in ("name", "essential", "stopTimeout", "portMappings", "healthCheck"):
            assert container.get(key, []) == wanted.get(key, [])
        assert container["linuxParameters"]["initProcessEnabled"] is True
        log, wanted_log = container["logConfiguration"], wanted["logConfiguration"]
        assert log["logDriver"] == wanted_log["logDriver"]
        assert set(log["options"]) == set(wanted_log["options"])
        assert log["options"]["awslogs-stream-prefix"] == wanted_log["options"]["awslogs-stream-prefix"]
    size = made.get("ephemeralStorage")
    assert size is None
    worker = stack.client("ecs").describe_task_definition(taskDefinition=f"{STACK}-worker")["taskDefinition"]
    disk = stack.parameters["WorkerDisk"]
    assert worker.get("ephemeralStorage") == (None if disk == "20" else {"sizeInGiB": int(disk)})


def test_service_is_that_of_the_examples(stack):
    example = json.loads((ROOT / "examples" / "ecs-manager" / "service.json").read_text())
    properties = stack.properties("ManagerService")
    assert properties["LaunchType"] == example["launchType"]
    deployment, wanted = properties["DeploymentConfiguration"], example["deploymentConfiguration"]
    assert deployment["MinimumHealthyPercent"] == wanted["minimumHealthyPercent"]
    assert deployment["MaximumPercent"] == wanted["maximumPercent"]
    breaker = {key.lower(): value for key, value in deployment["DeploymentCircuitBreaker"].items()}
    assert breaker == wanted["deploymentCircuitBreaker"]
    assert properties["AvailabilityZoneRebalancing"] == example["availabilityZoneRebalancing"]
    network = properties["NetworkConfiguration"]["AwsvpcConfiguration"]
    assert network == {
        "Subnets": stack.network.subnets,
        "SecurityGroups": [stack.attribute("ManagerSecurityGroup", "Ref")],
        "AssignPublicIp": stack.parameters["AssignPublicIp"],
    }


def rules_of(stack, group, direction):
    [found] = stack.client("ec2").describe_security_groups(GroupIds=[stack.attribute(group, "Ref")])["SecurityGroups"]
    return {
        (
            rule["IpProtocol"],
            rule.get("FromPort"),
            rule.get("ToPort"),
            *(item["CidrIp"] for item in rule["IpRanges"]),
            *(item["GroupId"] for item in rule["UserIdGroupPairs"]),
        )
        for rule in found["IpPermissions" if direction == "in" else "IpPermissionsEgress"]
    }


def test_security_groups_are_those_of_the_examples(stack):
    """As in examples/security-groups.md."""
    manager, task = (stack.attribute(group, "Ref") for group in ("ManagerSecurityGroup", "TaskSecurityGroup"))
    https = ("tcp", 443, 443, "0.0.0.0/0")
    assert rules_of(stack, "ManagerSecurityGroup", "in") == set()
    assert rules_of(stack, "ManagerSecurityGroup", "out") == {https, ("tcp", 22, 22, task)}
    assert rules_of(stack, "TaskSecurityGroup", "in") == {("tcp", 22, 22, manager)}
    everything = ("-1", None, None, "0.0.0.0/0")
    is_open = stack.parameters["TaskOutbound"] == "all"
    assert rules_of(stack, "TaskSecurityGroup", "out") == {everything if is_open else https}


def test_bucket_is_private_and_encrypted(stack):
    s3, bucket = stack.client("s3"), stack.outputs["CacheBucketName"]
    block = s3.get_public_access_block(Bucket=bucket)["PublicAccessBlockConfiguration"]
    assert block and all(block.values())
    [encryption] = s3.get_bucket_encryption(Bucket=bucket)["ServerSideEncryptionConfiguration"]["Rules"]
    assert encryption["ApplyServerSideEncryptionByDefault"]["SSEAlgorithm"] == "AES256"
    [rule] = s3.get_bucket_lifecycle_configuration(Bucket=bucket)["Rules"]
    assert (rule["Status"], rule["Expiration"]["Days"]) == ("Enabled", 14)
    assert rule["AbortIncompleteMultipartUpload"]["DaysAfterInitiation"] == 1
    [ownership] = s3.get_bucket_ownership_controls(Bucket=bucket)["OwnershipControls"]["Rules"]
    assert ownership["ObjectOwnership"] == "BucketOwnerEnforced"
    [statement] = json.loads(s3.get_bucket_policy(Bucket=bucket)["Policy"])["Statement"]
    assert (statement["Effect"], statement["Principal"], statement["Action"]) == ("Deny", "*", ["s3:*"])
    assert statement["Resource"] == [f"arn:aws:s3:::{bucket}", f"arn:aws:s3:::{bucket}/*"]
    assert statement["Condition"] == {"Bool": {"aws:SecureTransport": "false"}}
    resource = stack.template["Resources"]["CacheBucket"]
    assert (resource["DeletionPolicy"], resource["UpdateReplacePolicy"]) == ("RetainExceptOnCreate", "Retain")


def test_logs_are_kept_for_the_given_time(stack):
    groups = stack.client("logs").describe_log_groups(logGroupNamePrefix=f"/ecs/{STACK}/")["logGroups"]
    assert {group["logGroupName"]: group["retentionInDays"] for group in groups} == {
        f"/ecs/{STACK}/manager": 30,
        f"/ecs/{STACK}/worker": 30,
    }


# ---------------------------------------------------------------------------------------------------------
# Manager
# ---------------------------------------------------------------------------------------------------------


def test_manager_accepts_its_variables(stack, driver, tmp_path):
    """fargate runners writes the files of the manager from the variables of the container, without a warning."""
    with GitLab() as gitlab:
        files = configure(stack, driver, gitlab, tmp_path)
    assert [request["path"] for request in gitlab.requests] == ["/api/v4/runners/verify"]
    runner_config = tomllib.loads(files.runner_config.read_text())
    assert runner_config["concurrent"] == 10
    assert runner_config["shutdown_timeout"] == 40
    [runner] = runner_config["runners"]
    assert runner["name"].startswith(f"{STACK}_default_")
    assert runner["cache"] == {
        "Type": "s3",
        "Shared": True,
        "s3": {
            "ServerAddress": f"s3.{REGION}.amazonaws.com",
            "BucketName": stack.outputs["CacheBucketName"],
            "BucketLocation": REGION,
            "AuthenticationType": "iam",
        },
    }
    config = tomllib.loads(files.driver_config.read_text())
    wanted = {
        "Cluster": STACK,
        "Region": REGION,
        "Subnets": stack.network.subnets,
        "SecurityGroup": stack.attribute("TaskSecurityGroup", "Ref"),
        "TaskDefinition": f"{STACK}-worker",
        "AllowedTaskDefinitions": [],
        "EnablePublicIP": stack.parameters["AssignPublicIp"] == "ENABLED",
        "UsePublicIP": False,
    }
    if stack.parameters["ExecuteCommand"] == "ENABLED":
        wanted["EnableExecuteCommand"] = True
    assert {key: config["Fargate"][key] for key in wanted} == wanted
    # Without these, the cluster's default strategy applies.
    assert not {"LaunchType", "CapacityProviderStrategy"} & set(config["Fargate"])
    for key in ("AllowedImages", "AllowedServices"):
        assert config["JobImage"][key] == [name for name in stack.parameters[key] if name]


def test_manager_has_no_capabilities(stack):
    container = stack.container("ManagerTaskDefinition")
    assert container["linuxParameters"]["capabilities"]["drop"] == ["ALL"]


def test_manager_gets_its_token_as_a_secret(stack):
    container = stack.container("ManagerTaskDefinition")
    assert container["secrets"] == [{"name": "GITLAB_RUNNER_TOKEN", "valueFrom": SECRET}]
    assert not [name for name in stack.environment() if "TOKEN" in name]


def test_health_check_passes_once_a_runner_is_registered(stack, driver, tmp_path):
    kind, command = stack.container("ManagerTaskDefinition")["healthCheck"]["command"]
    assert kind == "CMD-SHELL"

    def is_healthy():
        env = {"CONFIG_FILE": str(tmp_path / "config.toml"), "PATH": "/usr/bin:/bin"}
        return subprocess.run(["/bin/sh", "-c", command], env=env, check=False, capture_output=True).returncode == 0

    assert not is_healthy()
    with GitLab(refuses=True) as gitlab:
        configure(stack, driver, gitlab, tmp_path, succeeds=False)
    assert (tmp_path / "config.toml").exists()
    assert not is_healthy()
    with GitLab() as gitlab:
        configure(stack, driver, gitlab, tmp_path)
    assert is_healthy()


def test_output_for_the_driver_names_the_resources(stack):
    config = tomllib.loads(stack.outputs["FargateToml"])
    assert config["Fargate"] == {
        "Cluster": STACK,
        "Region": REGION,
        "Subnets": stack.network.subnets,
        "SecurityGroups": [stack.outputs["TaskSecurityGroupId"]],
        "TaskDefinition": f"{STACK}-worker",
        "AllowedTaskDefinitions": [],
        "EnablePublicIP": stack.parameters["AssignPublicIp"] == "ENABLED",
        "UsePublicIP": False,
    }


# ---------------------------------------------------------------------------------------------------------
# Permissions
# ---------------------------------------------------------------------------------------------------------

# Files in examples/ whose statements the roles have. examples/examples.test.ts compares these files with the calls that
# the driver makes for each feature.
POLICIES = {
    "ManagerTaskRole": ["iam/driver.json", "iam/sweep.json", "iam/cache-s3.json"],
    "ManagerExecutionRole": ["ecs-manager/execution-role.json"],
    "WorkerExecutionRole": ["iam/execution-role.json"],
    "WorkerTaskRole": [],
}
WITH_JOB_IMAGES = ["iam/job-image.json", "iam/job-image-sweep.json"]
WITH_EXECUTE_COMMAND = ["iam/execute-command.json"]


def example_statements(stack, path):
    """The statements of a policy in examples/, with the names of the stack in place of those of the examples."""
    names = {
        "111122223333": ACCOUNT,
        "us-east-2": REGION,
        "role/test-ci-execution": f"role/{stack.attribute('WorkerExecutionRole', 'Ref')}",
        "role/test-ci-task": f"role/{stack.attribute('WorkerTaskRole', 'Ref')}",
        "task-definition/test-task": f"task-definition/{STACK}-worker",
        "cluster/test-cluster": f"cluster/{STACK}",
        "task/test-cluster": f"task/{STACK}",
        "repository/test-ci-worker": "repository/fargate-worker",
        "repository/test-ci-manager": "repository/fargate-manager",
        "/ecs/test-task": f"/ecs/{STACK}/worker",
        "/ecs/test-manager": f"/ecs/{STACK}/manager",
        "test-ci-cache": stack.attribute("CacheBucket", "Ref"),
    }
    text = (ROOT / "examples" / path).read_text()
    for example, own in names.items():
        text = text.replace(example, own)
    return {statement["Sid"]: statement for statement in json.loads(text)["Statement"]}


@pytest.mark.parametrize("role", POLICIES)
def test_roles_have_the_policies_of_the_examples(stack, role):
    has_images = stack.parameters["AllowedImages"] != [""]
    paths = POLICIES[role] + (WITH_JOB_IMAGES if role == "ManagerTaskRole" and has_images else [])
    if role == "WorkerTaskRole" and stack.parameters["ExecuteCommand"] == "ENABLED":
        paths = paths + WITH_EXECUTE_COMMAND
    wanted = {}
    for path in paths:
        wanted.update(example_statements(stack, path))
    if role == "ManagerTaskRole":
        # The stack has no further task definitions.
        resources = wanted["StartTasks"]["Resource"]
        resources.remove(f"arn:aws:ecs:{REGION}:{ACCOUNT}:task-definition/ci-*:*")
    if role == "ManagerExecutionRole":
        # The example has its tokens in Parameter Store.
        del wanted["ReadRunnerTokens"]
        wanted["ReadRunnerToken"] = {
            "Sid": "ReadRunnerToken",
            "Effect": "Allow",
            "Action": ["secretsmanager:GetSecretValue"],
            "Resource": [SECRET],
        }
        if stack.parameters["RunnerTokenKeyArn"]:
            wanted["DecryptRunnerToken"] = {
                "Sid": "DecryptRunnerToken",
                "Effect": "Allow",
                "Action": ["kms:Decrypt"],
                "Resource": [stack.parameters["RunnerTokenKeyArn"]],
                "Condition": {"StringEquals": {"kms:ViaService": f"secretsmanager.{REGION}.amazonaws.com"}},
            }
    assert stack.statements(role) == wanted


def test_manager_may_describe_the_managers_of_its_cluster(stack):
    """examples/ecs-manager/task-role.json allows it for a cluster of their own."""
    [statement] = json.loads((ROOT / "examples" / "ecs-manager" / "task-role.json").read_text())["Statement"]
    allowed = stack.statements("ManagerTaskRole")["DescribeAndStopTasks"]
    assert set(statement["Action"]) <= set(allowed["Action"])
    # The service is in the same cluster.
    assert stack.properties("ManagerService")["Cluster"] == STACK


def test_roles_trust_only_tasks_of_this_account(stack):
    text = (ROOT / "examples" / "iam" / "trust-tasks.json").read_text().replace("111122223333", ACCOUNT)
    for role in POLICIES:
        made = stack.client("iam").get_role(RoleName=stack.attribute(role, "Ref"))["Role"]
        assert made["AssumeRolePolicyDocument"] == json.loads(text.replace("us-east-2", REGION))
        boundary = stack.parameters["PermissionsBoundaryArn"]
        assert made.get("PermissionsBoundary", {}).get("PermissionsBoundaryArn", "") == boundary


def test_jobs_have_only_the_given_policies(stack):
    name = stack.attribute("WorkerTaskRole", "Ref")
    attached = stack.client("iam").list_attached_role_policies(RoleName=name)["AttachedPolicies"]
    assert [policy["PolicyArn"] for policy in attached] == [arn for arn in stack.parameters["JobPolicyArns"] if arn]


def test_manager_may_do_only_what_the_stack_needs(stack):
    statements = stack.statements("ManagerTaskRole").values()
    ecs = f"arn:aws:ecs:{REGION}:{ACCOUNT}"
    own = {"ecs:cluster": f"{ecs}:cluster/{STACK}"}
    other = {"ecs:cluster": f"{ecs}:cluster/production"}
    to_tasks = {"iam:PassedToService": "ecs-tasks.amazonaws.com"}
    to_functions = {"iam:PassedToService": "lambda.amazonaws.com"}
    worker, execution = (stack.attribute(role, "Arn") for role in ("WorkerTaskRole", "WorkerExecutionRole"))
    bucket = stack.attribute("CacheBucket", "Arn")
    images = stack.parameters["AllowedImages"] != [""]
    rows = [
        (True, "ecs:RunTask", f"{ecs}:task-definition/{STACK}-worker:7", own),
        (images, "ecs:RunTask", f"{ecs}:task-definition/{STACK}-worker-job-0123:1", own),
        (False, "ecs:RunTask", f"{ecs}:task-definition/{STACK}-worker:7", other),
        (False, "ecs:RunTask", f"{ecs}:task-definition/{STACK}-manager:1", own),
        (False, "ecs:RunTask", f"{ecs}:task-definition/production:1", own),
        (True, "ecs:DescribeTasks", f"{ecs}:task/{STACK}/0123", own),
        (True, "ecs:StopTask", f"{ecs}:task/{STACK}/0123", own),
        (False, "ecs:StopTask", f"{ecs}:task/production/0123", other),
        (True, "ecs:ListTasks", "*", own),
        (False, "ecs:ListTasks", "*", other),
        (True, "iam:PassRole", worker, to_tasks),
        (True, "iam:PassRole", execution, to_tasks),
        (False, "iam:PassRole", worker, to_functions),
        (False, "iam:PassRole", stack.attribute("ManagerTaskRole", "Arn"), to_tasks),
        (False, "iam:PassRole", stack.attribute("ManagerExecutionRole", "Arn"), to_tasks),
        (True, "s3:PutObject", f"{bucket}/project/1/key/cache.zip", {}),
        (True, "s3:GetObject", f"{bucket}/project/1/key/cache.zip", {}),
        (True, "s3:ListBucket", bucket, {}),
        (False, "s3:DeleteObject", f"{bucket}/project/1/key/cache.zip", {}),
        (False, "s3:GetObject", "arn:aws:s3:::another/key", {}),
        (images, "ecs:RegisterTaskDefinition", "*", {}),
        (images, "ecs:DescribeTaskDefinition", "*", {}),
        (images, "ecs:ListTaskDefinitions", "*", {}),
        (images, "ecs:DeregisterTaskDefinition", "*", {}),
        (False, "ecs:ExecuteCommand", f"{ecs}:task/{STACK}/0123", own),
        (False, "secretsmanager:GetSecretValue", SECRET, {}),
    ]
    decisions = [(is_allowed(statements, *question), *question) for _, *question in rows]
    assert decisions == rows


REPOSITORIES = [
    (image("worker"), {}, f"arn:aws:ecr:{REGION}:{ACCOUNT}:repository/worker"),
    (image("worker:1.2"), {}, f"arn:aws:ecr:{REGION}:{ACCOUNT}:repository/worker"),
    (image(f"worker@sha256:{'0' * 64}"), {}, f"arn:aws:ecr:{REGION}:{ACCOUNT}:repository/worker"),
    (image("team/ci/worker:latest"), {}, f"arn:aws:ecr:{REGION}:{ACCOUNT}:repository/team/ci/worker"),
    (
        image("worker:1", account="999988887777", region="eu-west-1"),
        {},
        "arn:aws:ecr:eu-west-1:999988887777:repository/worker",
    ),
    (
        image("team/worker:1", region="cn-north-1", suffix="amazonaws.com.cn"),
        {"AWS::Partition": "aws-cn", "AWS::URLSuffix": "amazonaws.com.cn", "AWS::Region": "cn-north-1"},
        f"arn:aws-cn:ecr:cn-north-1:{ACCOUNT}:repository/team/worker",
    ),
]


@pytest.mark.parametrize(("name", "pseudo", "arn"), REPOSITORIES)
def test_execution_roles_may_pull_only_their_image(aws, name, pseudo, arn):
    stack = Deployment(aws, {"WorkerImage": name, "ManagerImage": name}, pseudo=pseudo)
    assert stack.statements("WorkerExecutionRole")["PullWorkerImage"]["Resource"] == [arn]
    assert stack.statements("ManagerExecutionRole")["PullManagerImage"]["Resource"] == [arn]
