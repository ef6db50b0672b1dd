"""Creates what examples/cloudformation/fargate-runner.yaml describes through the APIs of ECS, EC2 and so on, in moto.

moto's CloudFormation makes a poor task definition of a complete one, and ignores types and properties that it does not
know. So this resolves the template by itself, and sends all properties of all resources to the services. A type or a
property that it does not know is an error.
"""

import functools
import json
import re
from pathlib import Path

import boto3

import template as cloudformation

ROOT = Path(__file__).resolve().parents[2]
TEMPLATE = ROOT / "examples" / "cloudformation" / "fargate-runner.yaml"
ACCOUNT = "123456789012"  # of moto
REGION = "us-east-2"
STACK = "ci-fargate"
PSEUDO = {
    "AWS::AccountId": ACCOUNT,
    "AWS::Partition": "aws",
    "AWS::Region": REGION,
    "AWS::StackName": STACK,
    "AWS::URLSuffix": "amazonaws.com",
}


def image(name, account=ACCOUNT, region=REGION, suffix="amazonaws.com"):
    return f"{account}.dkr.ecr.{region}.{suffix}/{name}"


SECRET = f"arn:aws:secretsmanager:{REGION}:{ACCOUNT}:secret:ci/runner-token-AbCdEf"
# The parameters that have no default, but those of the network.
REQUIRED = {
    "RunnerTokenSecretArn": SECRET,
    "ManagerImage": image("fargate-manager:1.0.0"),
    "WorkerImage": image("fargate-worker:1.0.0"),
}
# Everything that is off by default.
EVERYTHING = {
    "AllowedImages": "node:*,python:3.*",
    "AllowedServices": "postgres:*",
    "AssignPublicIp": "ENABLED",
    "ContainerInsights": "enabled",
    "ExecuteCommand": "ENABLED",
    "JobPolicyArns": f"arn:aws:iam::{ACCOUNT}:policy/jobs",
    "PermissionsBoundaryArn": f"arn:aws:iam::{ACCOUNT}:policy/boundary",
    "RunnerTokenKeyArn": f"arn:aws:kms:{REGION}:{ACCOUNT}:key/0123abcd",
    "SpotShare": "75",
    "TaskOutbound": "all",
    "WorkerDisk": "50",
}


@functools.cache
def client(endpoint, service):
    keys = {"aws_access_key_id": "test", "aws_secret_access_key": "test"}
    return boto3.client(service, region_name=REGION, endpoint_url=endpoint, **keys)


@functools.cache
def load_template():
    return cloudformation.load(TEMPLATE)


class Network:
    """A VPC with two private subnets, whose default route leads to a NAT gateway."""

    def __init__(self, endpoint, cidr="10.1"):
        ec2 = client(endpoint, "ec2")
        self.vpc = ec2.create_vpc(CidrBlock=f"{cidr}.0.0/16")["Vpc"]["VpcId"]
        public, *self.subnets = [
            ec2.create_subnet(VpcId=self.vpc, CidrBlock=f"{cidr}.{n}.0/24", AvailabilityZone=f"{REGION}{zone}")[
                "Subnet"
            ]["SubnetId"]
            for n, zone in enumerate("aab")
        ]
        self.internet = ec2.create_internet_gateway()["InternetGateway"]["InternetGatewayId"]
        ec2.attach_internet_gateway(VpcId=self.vpc, InternetGatewayId=self.internet)
        address = ec2.allocate_address(Domain="vpc")["AllocationId"]
        self.nat = ec2.create_nat_gateway(SubnetId=public, AllocationId=address)["NatGateway"]["NatGatewayId"]
        self.table = ec2.create_route_table(VpcId=self.vpc)["RouteTable"]["RouteTableId"]
        ec2.create_route(RouteTableId=self.table, DestinationCidrBlock="0.0.0.0/0", NatGatewayId=self.nat)
        for subnet in self.subnets:
            ec2.associate_route_table(RouteTableId=self.table, SubnetId=subnet)


class Deployment(cloudformation.Resolver):
    """The stack. Each resource is created when another one first refers to it."""

    def __init__(self, endpoint, parameters=None, network=None, pseudo=None):
        self.endpoint = endpoint
        self.network = network or Network(endpoint)
        given = {
            "VpcId": self.network.vpc,
            "SubnetIds": ",".join(self.network.subnets),
            **REQUIRED,
            **(parameters or {}),
        }
        values = {**PSEUDO, **(pseudo or {})}
        super().__init__(load_template(), given, values)
        self.name = values["AWS::StackName"]

    def client(self, service):
        return client(self.endpoint, service)

    def fn_valueof(self, argument):
        """An attribute of the resources that a parameter names, which only Rules may ask for."""
        parameter, attribute = argument
        found = self.client("ec2").describe_subnets(SubnetIds=self.parameters[parameter])["Subnets"]
        return [subnet[attribute] for subnet in found]

    def create(self):
        assert self.broken_rules() == []
        for logical_id in self.template["Resources"]:
            if self.is_created(logical_id):
                self._create(logical_id)
        return self

    @property
    def outputs(self):
        return {name: self.resolve(output["Value"]) for name, output in self.template["Outputs"].items()}

    def attribute(self, logical_id, name):
        self._create(logical_id)
        return super().attribute(logical_id, name)

    def _create(self, logical_id):
        if logical_id in self.attributes:
            assert self.attributes[logical_id], f"{logical_id} depends on itself"
            return
        assert self.is_created(logical_id), f"something refers to {logical_id}, which its condition excludes"
        self.attributes[logical_id] = {}
        resource = self.template["Resources"][logical_id]
        for other in resource.get("DependsOn", []):
            self._create(other)
        kind = resource["Type"].removeprefix("AWS::").replace("::", "_").lower()
        properties = self.properties(logical_id)
        self.attributes[logical_id] = getattr(self, f"_{kind}")(logical_id, properties)
        assert not properties, f"{logical_id}: {set(properties)} had no effect"

    def _call(self, service, operation, properties, **others):
        """Calls an API with properties of a resource in its own spelling."""
        client = self.client(service)
        shape = client.meta.service_model.operation_model(operation).input_shape
        request = cloudformation.to_request(shape, {**properties, **others}, operation)
        properties.clear()
        return getattr(client, re.sub(r"(?<!^)(?=[A-Z])", "_", operation).lower())(**request)

    # Each of these removes the properties that it has used.

    def _ecs_cluster(self, _, properties):
        settings = properties.pop("ClusterSettings")
        made = self._call("ecs", "CreateCluster", properties, settings=settings)["cluster"]
        return {"Ref": made["clusterName"], "Arn": made["clusterArn"]}

    def _ecs_taskdefinition(self, _, properties):
        made = self._call("ecs", "RegisterTaskDefinition", properties)["taskDefinition"]
        return {"Ref": made["taskDefinitionArn"]}

    def _ecs_service(self, logical_id, properties):
        made = self._call("ecs", "CreateService", properties, serviceName=f"{self.name}-{logical_id}")["service"]
        return {"Ref": made["serviceArn"], "Name": made["serviceName"]}

    def _logs_loggroup(self, _, properties):
        retention = properties.pop("RetentionInDays")
        name = properties["LogGroupName"]
        self._call("logs", "CreateLogGroup", properties)
        self.client("logs").put_retention_policy(logGroupName=name, retentionInDays=int(retention))
        arn = f"arn:{self.pseudo['AWS::Partition']}:logs:{self.pseudo['AWS::Region']}:{ACCOUNT}:log-group:{name}:*"
        return {"Ref": name, "Arn": arn}

    def _ec2_securitygroup(self, logical_id, properties):
        ec2 = self.client("ec2")
        rules = {direction: properties.pop(f"SecurityGroup{direction}", []) for direction in ("Ingress", "Egress")}
        tags = [{"ResourceType": "security-group", "Tags": properties.pop("Tags")}]
        group = ec2.create_security_group(
            GroupName=f"{self.name}-{logical_id}",
            Description=properties.pop("GroupDescription"),
            VpcId=properties.pop("VpcId"),
            TagSpecifications=tags,
        )["GroupId"]
        if rules["Egress"]:  # CloudFormation then removes the rule that allows everything
            everything = {"IpProtocol": "-1", "IpRanges": [{"CidrIp": "0.0.0.0/0"}]}
            ec2.revoke_security_group_egress(GroupId=group, IpPermissions=[everything])
        for rule in rules["Ingress"]:
            ec2.authorize_security_group_ingress(GroupId=group, IpPermissions=[self._permission(rule)])
        for rule in rules["Egress"]:
            ec2.authorize_security_group_egress(GroupId=group, IpPermissions=[self._permission(rule)])
        return {"Ref": group, "GroupId": group}

    def _ec2_securitygroupegress(self, _, properties):
        group = properties.pop("GroupId")
        self.client("ec2").authorize_security_group_egress(GroupId=group, IpPermissions=[self._permission(properties)])
        return {"Ref": group}

    @staticmethod
    def _permission(rule):
        permission = {"IpProtocol": rule.pop("IpProtocol")}
        if permission["IpProtocol"] != "-1":
            permission.update(FromPort=rule.pop("FromPort"), ToPort=rule.pop("ToPort"))
        target = {"Description": rule.pop("Description")}
        if "CidrIp" in rule:
            permission["IpRanges"] = [{"CidrIp": rule.pop("CidrIp"), **target}]
        else:
            [name] = [name for name in rule if name.endswith("SecurityGroupId")]
            permission["UserIdGroupPairs"] = [{"GroupId": rule.pop(name), **target}]
        assert not rule, f"{set(rule)} had no effect"
        return permission

    def _s3_bucket(self, logical_id, properties):
        s3 = self.client("s3")
        name = f"{self.name}-{logical_id}".lower()
        s3.create_bucket(Bucket=name, CreateBucketConfiguration={"LocationConstraint": REGION})
        lifecycle = properties.pop("LifecycleConfiguration")["Rules"]
        for rule in lifecycle:
            rule["Filter"] = {}
            rule["Expiration"] = {"Days": rule.pop("ExpirationInDays")}
        encryption = properties.pop("BucketEncryption")["ServerSideEncryptionConfiguration"]
        for rule in encryption:
            rule["ApplyServerSideEncryptionByDefault"] = rule.pop("ServerSideEncryptionByDefault")
        settings = {
            "PutBucketEncryption": {"ServerSideEncryptionConfiguration": {"Rules": encryption}},
            "PutPublicAccessBlock": {
                "PublicAccessBlockConfiguration": properties.pop("PublicAccessBlockConfiguration")
            },
            "PutBucketOwnershipControls": {"OwnershipControls": properties.pop("OwnershipControls")},
            "PutBucketLifecycleConfiguration": {"LifecycleConfiguration": {"Rules": lifecycle}},
        }
        for operation, request in settings.items():
            self._call("s3", operation, request, Bucket=name)
        return {"Ref": name, "Arn": f"arn:{self.pseudo['AWS::Partition']}:s3:::{name}"}

    def _s3_bucketpolicy(self, _, properties):
        bucket, policy = properties.pop("Bucket"), json.dumps(properties.pop("PolicyDocument"))
        self.client("s3").put_bucket_policy(Bucket=bucket, Policy=policy)
        return {"Ref": bucket}

    def _iam_role(self, logical_id, properties):
        iam = self.client("iam")
        name = f"{self.name}-{logical_id}"
        trust = json.dumps(properties.pop("AssumeRolePolicyDocument"))
        policies = properties.pop("Policies", [])
        attached = properties.pop("ManagedPolicyArns", [])
        made = self._call("iam", "CreateRole", properties, RoleName=name, AssumeRolePolicyDocument=trust)["Role"]
        for policy in policies:
            self._put_role_policy(name, policy)
        for arn in filter(None, attached):
            self._make_policy(arn)
            iam.attach_role_policy(RoleName=name, PolicyArn=arn)
        return {"Ref": name, "Arn": made["Arn"]}

    def _make_policy(self, arn):
        """Creates a policy that a parameter names, and that the stack expects."""
        statement = {"Effect": "Allow", "Action": "s3:GetObject", "Resource": "*"}
        document = json.dumps({"Version": "2012-10-17", "Statement": [statement]})
        self.client("iam").create_policy(PolicyName=arn.split("/")[-1], PolicyDocument=document)

    def _put_role_policy(self, role, policy):
        document = json.dumps(policy.pop("PolicyDocument"))
        name = policy.pop("PolicyName")
        self.client("iam").put_role_policy(RoleName=role, PolicyName=name, PolicyDocument=document)
        assert not policy, f"{set(policy)} had no effect"

    # What the tests look at.

    def statements(self, role):
        """The statements of all policies of a role, by their Sid."""
        iam = self.client("iam")
        name = self.attribute(role, "Ref")
        names = iam.list_role_policies(RoleName=name)["PolicyNames"]
        documents = [iam.get_role_policy(RoleName=name, PolicyName=policy)["PolicyDocument"] for policy in names]
        statements = [statement for document in documents for statement in document["Statement"]]
        found = {statement["Sid"]: statement for statement in statements}
        assert len(found) == len(statements), f"two statements of {role} have one Sid"
        return found

    def container(self, logical_id):
        definition = self.client("ecs").describe_task_definition(taskDefinition=self.attribute(logical_id, "Ref"))
        [container] = definition["taskDefinition"]["containerDefinitions"]
        return container

    def environment(self):
        """The variables of the manager's container."""
        return {
            variable["name"]: variable["value"] for variable in self.container("ManagerTaskDefinition")["environment"]
        }
