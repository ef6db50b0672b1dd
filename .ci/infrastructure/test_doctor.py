"""`fargate doctor` against moto: on the stack of examples/cloudformation, and on the same with one thing broken.

Cluster, task definitions, roles and groups are created through the APIs, from the properties of the template. The
driver has the configuration that the manager writes, and the credentials of the manager's role. All setups are in one
account, each with a VPC and a stack of its own, so that doctor can examine several at a time.
"""

import concurrent.futures
import json
import os
import re
import subprocess

import pytest
import requests

from deployment import ACCOUNT, EVERYTHING, REGION, Deployment, Network
from manager import GitLab, configure

# What moto cannot serve, so that it is unknown.
UNKNOWN_IN_MOTO = {
    "permission ecs:RunTask": "moto has no SimulatePrincipalPolicy",
    "permission iam:PassRole": "the same",
    "permission ecs:StopTask": "the same, and moto answers the call for no task with an error of its own",
    "permission ecs:RegisterTaskDefinition": "as for RunTask; needed with AllowedImages",
    "permission ecs:ListTaskDefinitions": "the same",
    "permission ecs:DeregisterTaskDefinition": "the same",
}


def own_address():
    """An address of this machine, but none of loopback."""
    addresses = subprocess.run(["hostname", "-I"], capture_output=True, text=True, check=True).stdout.split()
    return next(address for address in addresses if "." in address)


class Host:
    """The manager's host, in the VPC of a stack. A test changes something before it calls doctor."""

    def __init__(self, endpoint, driver, directory, parameters):
        directory.mkdir()
        self.name = f"ci-{directory.name}"
        self.stack = Deployment(endpoint, parameters, pseudo={"AWS::StackName": self.name})
        self.driver, self.network = driver, self.stack.network
        self.ecs, self.ec2 = self.stack.client("ecs"), self.stack.client("ec2")
        self.manager_group = self.stack.attribute("ManagerSecurityGroup", "Ref")
        self.group = self.stack.attribute("TaskSecurityGroup", "Ref")
        self.stack.attribute("ManagerToTasks", "Ref")
        self.stack.attribute("WorkerTaskDefinition", "Ref")
        with GitLab() as gitlab:
            self.files = configure(self.stack, driver, gitlab, directory)
        self.config = self.files.driver_config
        # In place of the directory of the image.
        self.edit("/opt/gitlab-runner/metadata", str(directory / "metadata"))
        program = directory / "gitlab-runner"
        program.write_text("#!/bin/sh\necho 'Version:      17.9.0'\n")
        program.chmod(0o755)
        self.ec2.create_network_interface(
            SubnetId=self.network.subnets[0], PrivateIpAddress=own_address(), Groups=[self.manager_group]
        )
        self.env = {
            "AWS_ENDPOINT_URL": endpoint,
            "FARGATE_MANAGER": "r_0123456789ab",  # as for the processes of fargate manager
            "HOME": str(directory),
            "PATH": f"{directory}:{os.environ['PATH']}",
        }
        self.assume(self.stack.attribute("ManagerTaskRole", "Arn"))

    def assume(self, role):
        made = self.stack.client("sts").assume_role(RoleArn=role, RoleSessionName="0123456789abcdef")["Credentials"]
        self.env.update(
            AWS_ACCESS_KEY_ID=made["AccessKeyId"],
            AWS_SECRET_ACCESS_KEY=made["SecretAccessKey"],
            AWS_SESSION_TOKEN=made["SessionToken"],
        )

    def edit(self, old, new):
        """Changes the driver's configuration file."""
        text = self.config.read_text()
        assert text.count(old) == 1, f"{old} is {text.count(old)} times in {text}"
        self.config.write_text(text.replace(old, new))

    def add(self, setting):
        """Adds a setting to [Fargate]."""
        self.edit("[Fargate]\n", f"[Fargate]\n{setting}\n")

    def redefine(self, change=lambda definition: None, **container):
        """Registers a new revision of the worker's definition, with other values."""
        definition = self.ecs.describe_task_definition(taskDefinition=f"{self.name}-worker")["taskDefinition"]
        for key in (
            "taskDefinitionArn",
            "revision",
            "status",
            "compatibilities",
            "placementConstraints",
            "registeredAt",
        ):
            definition.pop(key, None)
        definition["containerDefinitions"][0].update(container)
        change(definition)
        self.ecs.register_task_definition(**definition)

    def without(self, key):
        self.redefine(lambda definition: definition.pop(key))

    def revoke(self, direction, port=None):
        """Removes the rules of the tasks' group, for a port if there is one."""
        [group] = self.ec2.describe_security_groups(GroupIds=[self.group])["SecurityGroups"]
        rules = group["IpPermissions" if direction == "ingress" else "IpPermissionsEgress"]
        chosen = [rule for rule in rules if port in (None, rule.get("FromPort"))]
        assert chosen
        getattr(self.ec2, f"revoke_security_group_{direction}")(GroupId=self.group, IpPermissions=chosen)

    def allow(self, port, group):
        rule = {"IpProtocol": "tcp", "FromPort": port, "ToPort": port, "UserIdGroupPairs": [{"GroupId": group}]}
        self.ec2.authorize_security_group_ingress(GroupId=self.group, IpPermissions=[rule])

    def use_subnets(self, *subnets):
        self.edit(json.dumps(self.network.subnets)[1:-1], json.dumps(list(subnets))[1:-1])

    def remove_route(self):
        self.ec2.delete_route(RouteTableId=self.network.table, DestinationCidrBlock="0.0.0.0/0")

    def add_endpoints(self, *services):
        for service in services:
            gateway = {"VpcEndpointType": "Gateway", "RouteTableIds": [self.network.table]}
            interface = {"VpcEndpointType": "Interface", "SubnetIds": self.network.subnets}
            kind = gateway if service == "s3" else interface
            self.ec2.create_vpc_endpoint(
                VpcId=self.network.vpc, ServiceName=f"com.amazonaws.{REGION}.{service}", **kind
            )

    def doctor(self):
        """Runs fargate doctor. Returns its exit code and its findings."""
        files = ["--config", str(self.config), "--runner-config", str(self.files.runner_config)]
        command = [self.driver, "doctor", "--json", *files]
        finished = subprocess.run(command, env=self.env, capture_output=True, text=True, check=False, timeout=240)
        assert finished.stderr == ""
        return finished.returncode, json.loads(finished.stdout)["findings"]


# ---------------------------------------------------------------------------------------------------------
# Setups
# ---------------------------------------------------------------------------------------------------------


def use_output(host):
    """The configuration in the stack's output, in place of the manager's."""
    directory = host.config.parent
    host.config = directory / "fargate.toml"
    text = host.stack.outputs["FargateToml"]
    host.config.write_text(text.replace("/opt/gitlab-runner/metadata", str(directory / "metadata")))
    runner = host.files.runner_config
    runner.write_text(runner.read_text().replace("fargate-default.toml", "fargate.toml"))


def use_endpoints(host):
    host.remove_route()
    host.add_endpoints("ecr.api", "ecr.dkr", "s3", "logs")


def use_instances_definition(host):
    def change(definition):
        definition.update(requiresCompatibilities=["EC2"], networkMode="host")

    host.redefine(change)


def use_windows(host):
    platform = {"cpuArchitecture": "X86_64", "operatingSystemFamily": "WINDOWS_SERVER_2022_CORE"}
    host.redefine(lambda definition: definition.update(runtimePlatform=platform))


def use_full_subnet(host):
    subnet = host.ec2.create_subnet(VpcId=host.network.vpc, CidrBlock="10.1.9.0/28")["Subnet"]["SubnetId"]
    host.ec2.associate_route_table(RouteTableId=host.network.table, SubnetId=subnet)
    for _ in range(11):
        host.ec2.create_network_interface(SubnetId=subnet)
    host.use_subnets(subnet)


def use_internet_gateway(host):
    host.remove_route()
    target = {"DestinationCidrBlock": "0.0.0.0/0", "GatewayId": host.network.internet}
    host.ec2.create_route(RouteTableId=host.network.table, **target)


def use_other_account(host):
    host.edit(f'"{host.name}"', f'"{host.stack.attribute("Cluster", "Arn")}"')
    host.assume("arn:aws:iam::999988887777:role/manager")


def provide_only_on_demand(host):
    providers = {"capacityProviders": ["FARGATE"], "defaultCapacityProviderStrategy": [{"capacityProvider": "FARGATE"}]}
    host.ecs.put_cluster_capacity_providers(cluster=host.name, **providers)
    host.add('CapacityProviderStrategy = [{ CapacityProvider = "FARGATE_SPOT" }]')


def provide_nothing(host):
    host.ecs.put_cluster_capacity_providers(
        cluster=host.name, capacityProviders=["FARGATE"], defaultCapacityProviderStrategy=[]
    )


NO_ROUTE = {"subnet .*: route": r"there is none out of the VPC, and no endpoint for ecr\.api, ecr\.dkr, s3, logs"}
WORKER = "definition ci-.*-worker"

# Name: parameters of the stack, what is changed, what is unknown besides the above.
GOOD = {
    "good-defaults": ({}, lambda host: None, set()),
    "good-everything": (EVERYTHING, lambda host: None, set()),
    "good-output": ({}, use_output, set()),
    "good-endpoints": ({}, use_endpoints, {"subnet .*: route"}),
    "good-public": ({"AssignPublicIp": "ENABLED"}, use_internet_gateway, set()),
}
# Name: what is changed, and what is wrong then: the check, and the detail.
BROKEN = {
    "cluster-other": (
        lambda host: host.edit(f'"{host.name}"', '"production"'),
        {"cluster": "production does not exist in us-east-2"},
    ),
    "cluster-deleted": (
        lambda host: host.ecs.delete_cluster(cluster=host.name),
        {"cluster": "is INACTIVE in us-east-2"},
    ),
    "cluster-without-provider": (provide_only_on_demand, {"launch type": "the cluster lacks FARGATE_SPOT"}),
    "cluster-without-strategy": (provide_nothing, {"launch type": "EC2 instances, but the cluster has none"}),
    "launch-type-ec2": (
        lambda host: host.add('LaunchType = "EC2"'),
        {"launch type": "EC2 instances, but the cluster has none"},
    ),
    "region": (
        lambda host: host.edit(f'"{REGION}"', '"eu-west-1"'),
        {
            "cluster": "does not exist in eu-west-1",
            WORKER: "does not exist in eu-west-1",
            "subnet subnet-.*": "does not exist in eu-west-1",
            "security group sg-.*": "does not exist in eu-west-1",
        },
    ),
    "account": (use_other_account, {"credentials": "is of another account than arn:aws:ecs"}),
    "definition-other": (
        lambda host: host.edit(f'"{host.name}-worker"', '"ci-absent-worker"'),
        {WORKER: "does not exist in us-east-2"},
    ),
    "definition-inactive": (
        lambda host: (
            host.edit(f'"{host.name}-worker"', f'"{host.name}-worker:1"'),
            host.ecs.deregister_task_definition(taskDefinition=f"{host.name}-worker:1"),
        ),
        {f"{WORKER}: status": "is INACTIVE"},
    ),
    "definition-container": (
        lambda host: host.redefine(name="worker"),
        {f"{WORKER}: container": "there is no ci-coordinator, only worker"},
    ),
    "definition-for-instances": (
        use_instances_definition,
        {f"{WORKER}: network mode": "it is host", f"{WORKER}: compatibility": "it is for EC2, not for FARGATE"},
    ),
    "definition-windows": (use_windows, {f"{WORKER}: platform": "WINDOWS_SERVER_2022_CORE"}),
    "definition-execution-role": (
        lambda host: host.without("executionRoleArn"),
        {f"{WORKER}: execution role": "there is none, for the image, log or secrets"},
    ),
    "definition-task-role": (
        lambda host: (host.add("EnableExecuteCommand = true"), host.without("taskRoleArn")),
        {f"{WORKER}: task role": "there is none, but ECS Exec needs it"},
    ),
    "definition-port": (
        lambda host: host.redefine(portMappings=[{"containerPort": 2222, "protocol": "tcp"}]),
        {f"{WORKER}: SSH port": "it maps 2222, but Port is 22"},
    ),
    "definition-key": (
        lambda host: host.redefine(
            secrets=[{"name": "SSH_PUBLIC_KEY", "valueFrom": f"arn:aws:ssm:{REGION}:{ACCOUNT}:parameter/key"}]
        ),
        {f"{WORKER}: SSH key": "SSH_PUBLIC_KEY is a secret"},
    ),
    "definition-health-check": (
        lambda host: host.add("WaitForHealthy = true"),
        {f"{WORKER}: health check": "WaitForHealthy is set, but there is none"},
    ),
    "subnet-absent": (
        lambda host: host.use_subnets(host.network.subnets[0], "subnet-0123456789abcdef0"),
        {"subnet subnet-0123456789abcdef0": "does not exist in us-east-2"},
    ),
    "subnet-full": (use_full_subnet, {"subnet .*: addresses": "no address is free"}),
    "subnet-of-another-vpc": (
        lambda host: host.use_subnets(host.network.subnets[0], Network(host.stack.endpoint, cidr="10.2").subnets[0]),
        {"VPC": "subnets and security groups are of vpc-.*, vpc-"},
    ),
    "route-none": (lambda host: host.remove_route(), NO_ROUTE),
    "route-endpoint": (
        lambda host: (host.remove_route(), host.add_endpoints("ecr.api", "s3", "logs")),
        {"subnet .*: route": r"none out of the VPC, and no endpoint for ecr\.dkr$"},
    ),
    "route-internet": (use_internet_gateway, {"subnet .*: route": "needs public addresses, which tasks lack"}),
    "route-public-address": (
        lambda host: (
            host.edit("UsePublicIP = false", "UsePublicIP = true"),
            host.edit("EnablePublicIP = false", "EnablePublicIP = true"),
        ),
        {"subnet .*: route": "leads to no internet gateway, as public addresses need"},
    ),
    "group-absent": (
        lambda host: host.edit(f'"{host.group}"', '"sg-0123456789abcdef0"'),
        {"security group sg-0123456789abcdef0": "does not exist in us-east-2"},
    ),
    "group-without-rule": (
        lambda host: host.revoke("ingress"),
        {"security groups: login": "TCP port 22 is open for nobody"},
    ),
    "group-for-another-group": (
        lambda host: (host.revoke("ingress"), host.allow(22, host.group)),
        {"security groups: login": "TCP port 22 is open for sg-.*, but this host has"},
    ),
    "group-for-another-port": (
        lambda host: (host.revoke("ingress"), host.allow(2222, host.manager_group)),
        {"security groups: login": "TCP port 22 is open for nobody"},
    ),
    "group-without-outbound": (
        lambda host: host.revoke("egress"),
        {"security groups: outbound": "no rule lets tasks send to TCP port 443"},
    ),
    "settings-open": (
        lambda host: host.edit("AllowedTaskDefinitions = []\n", ""),
        {"AllowedTaskDefinitions": "a job may choose any task definition"},
    ),
    "settings-misspelt": (lambda host: host.add("StartTimeOuts = 60"), {"configuration": "StartTimeOuts"}),
}


@pytest.fixture(scope="module")
def examined(moto, driver, tmp_path_factory):
    """The results of doctor in all setups."""
    requests.post(f"{moto}/moto-api/reset", timeout=60).raise_for_status()
    directory = tmp_path_factory.mktemp("hosts")
    setups = {name: (parameters, change) for name, (parameters, change, _) in GOOD.items()}
    setups.update({name: ({}, change) for name, (change, _) in BROKEN.items()})
    with concurrent.futures.ThreadPoolExecutor(max_workers=8) as pool:
        running = {}
        for name, (parameters, change) in setups.items():
            host = Host(moto, driver, directory / name, parameters)
            change(host)
            running[name] = pool.submit(host.doctor)
        return {name: future.result() for name, future in running.items()}


def check_names(findings, result):
    return [finding["check"] for finding in findings if finding["result"] == result]


def assert_matches(checks, patterns):
    """Each pattern matches a check, and each check a pattern."""
    for check in checks:
        assert any(re.fullmatch(pattern, check) for pattern in patterns), f"unexpected: {check}"
    for pattern in patterns:
        assert any(re.fullmatch(pattern, check) for check in checks), f"{pattern} is not in {checks}"


@pytest.mark.parametrize("name", GOOD)
def test_doctor_accepts(examined, name):
    code, findings = examined[name]
    assert [finding for finding in findings if finding["result"] == "wrong"] == []
    assert code == 0
    unknown = set(check_names(findings, "unknown"))
    assert_matches(unknown - set(UNKNOWN_IN_MOTO), GOOD[name][2])
    required = {"permission ecs:RunTask", "permission iam:PassRole", "permission ecs:StopTask"}
    assert required <= unknown
    right = check_names(findings, "right")
    for check in ("credentials", "cluster", "launch type", "VPC", "security groups: login", "permission ecs:ListTasks"):
        assert check in right


@pytest.mark.parametrize("name", BROKEN)
def test_doctor_names_what_is_wrong(examined, name):
    _, wrong = BROKEN[name]
    code, findings = examined[name]
    found = [finding for finding in findings if finding["result"] == "wrong"]
    assert_matches([finding["check"] for finding in found], wrong)
    for finding in found:
        [detail] = [detail for check, detail in wrong.items() if re.fullmatch(check, finding["check"])]
        assert re.search(detail, finding["detail"]), finding
        assert finding["fix"]
    assert code == 1


def test_every_listed_check_is_unknown_somewhere(examined):
    """A newer moto may serve it: then the list gets shorter."""
    unknown = {check for _, findings in examined.values() for check in check_names(findings, "unknown")}
    assert set(UNKNOWN_IN_MOTO) <= unknown
