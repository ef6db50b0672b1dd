/**
 * Tests of the driver as its users see it, in the order of its sections: pure functions, stages with ECS mocked,
 * scripts over SSH in a container, the worker image, and whole jobs run by the compiled program.
 *
 * Not here: faults (`fargate.faults.test.ts`), attacks and arbitrary input (`fargate.security.test.ts`), and tests that
 * take minutes (`fargate.soak.test.ts`).
 */
import { execFileSync, spawn, spawnSync } from "node:child_process";
import { createHash, randomBytes } from "node:crypto";
import { once } from "node:events";
import * as fs from "node:fs";
import { type AddressInfo, connect as connectTcp, createServer as createTcpServer, type Socket } from "node:net";
import { hostname, networkInterfaces } from "node:os";
import { basename, dirname, join, relative as relativePath } from "node:path";
import { PassThrough, Writable } from "node:stream";
import {
  DescribeNetworkInterfacesCommand,
  EC2Client,
  type EC2ClientResolvedConfig,
  type ServiceInputTypes as Ec2Input,
  type ServiceOutputTypes as Ec2Output,
  type IpPermission,
  type Route,
  type VpcEndpoint,
} from "@aws-sdk/client-ec2";
import {
  type ContainerDefinition,
  DescribeTasksCommand,
  type DescribeTasksCommandInput,
  ECSClient,
  type ECSClientResolvedConfig,
  type ServiceInputTypes as EcsInput,
  type ServiceOutputTypes as EcsOutput,
  ListTasksCommand,
  type RegisterTaskDefinitionCommandInput,
  RunTaskCommand,
  type RunTaskCommandInput,
  StopTaskCommand,
  type Task,
  type TaskDefinition,
} from "@aws-sdk/client-ecs";
import { type AwsStub, mockClient } from "aws-sdk-client-mock";
import * as commander from "commander";
import fc from "fast-check";
import { parse } from "smol-toml";
import { Client, type ClientChannel, Server as SshServerOfAPacket, utils } from "ssh2";
import { afterAll, afterEach, beforeAll, beforeEach, describe, expect, onTestFinished, test, vi } from "vitest";
import {
  AGENT,
  Aws,
  adviceFor,
  awsFailure,
  type Cause,
  CONTAINER,
  type Config,
  ConfigSchema,
  type Connection,
  type Context,
  callBuild,
  canonical,
  checkPlan,
  configAnswer,
  createDirectory,
  createLock,
  deriveDefinition,
  encodeEd25519,
  exitCode,
  expandVariable,
  explainStop,
  Failure,
  findPipeHolders,
  findShells,
  formatConfig,
  formatDuration,
  formatRecord,
  formatSweep,
  formatTasks,
  GIT_CONFIG,
  hostNames,
  imageDirectories,
  initialSettings,
  interfaceOf,
  interpreterOf,
  isSameDefinition,
  type Job,
  judgeTask,
  keyPairOf,
  type LogRecord,
  listeningPorts,
  makeKeyPair,
  makeLogger,
  managerId,
  matchesImage,
  type Outcome,
  Preamble,
  type Problem,
  parseCommandLine,
  parseImage,
  parseImagePattern,
  parseStage,
  planImages,
  pollPause,
  portsOf,
  prepareImages,
  prepare as prepareStage,
  readConfig,
  readJob,
  readLocks,
  readRecord,
  recognize,
  refuseDefinition,
  retry,
  run,
  runTaskInput,
  salvageRecord,
  serviceOverrides,
  shareFiles,
  sshHealthCheck,
  startRetryPause,
  stopCause,
  sweep,
  type TaskRecord,
  unusedVariables,
  writeRecord,
} from "./fargate.ts";
import type { FaultAction, Operation, PolicyDocument } from "./fixtures/aws.ts";
import type { Statement } from "./fixtures/aws-policies.ts";
import { makeAuthority } from "./fixtures/certificates.ts";
import { DriverOutput, withDebugLines } from "./fixtures/debug.ts";
import { HOST_GROUP, type Network, VPC } from "./fixtures/ec2.ts";
import { EcsMetadata, type MetadataFault } from "./fixtures/ecs-metadata.ts";
import { driverConfig, type Fleet, makeFleet, managersNamed, REGISTRATION_TOKEN, WORKER } from "./fixtures/fleet.ts";
import {
  type GitLabFaultAction,
  type GitLabRequest,
  GitLabStandIn,
  type GitLabStandInOptions,
} from "./fixtures/gitlab.ts";
import { BUSYBOX_IMAGE, DEBIAN_IMAGE, POSTGRES_IMAGE, REDIS_IMAGE } from "./fixtures/images.ts";
import { examplePolicies, type Installation, makeInstallation } from "./fixtures/installation.ts";
import { awkwardVariables, gitlabJob, variableCheck } from "./fixtures/job.ts";
import { type Loaded, recordingProgram, recordLoads } from "./fixtures/loaded-modules.ts";
import { lostOutput } from "./fixtures/lost-output.ts";
import { type Container, makeManagerWorld, managerFields, managerTest } from "./fixtures/manager.ts";
import { driver, type Finished, fargate, start } from "./fixtures/process.ts";
import { startConnectProxy, startProxy } from "./fixtures/proxy.ts";
import { BUILDS, runThroughRelay, startPair } from "./fixtures/relay.ts";
import { parseRunnerConfig, type RunnerSection } from "./fixtures/runner-config.ts";
import { ANY_IMAGE, ended, filesLeft, forever, makeScene, setUpImageJobs, setUpJobs } from "./fixtures/scene.ts";
import { madeUpSecret, tagsOf, wholeRun } from "./fixtures/secrets.ts";
import { newPrivateKey, parseKey, type SshServer, startSshServer } from "./fixtures/ssh-server.ts";
import {
  buildWorkerImage,
  type ContainerHostsOptions,
  containerHosts,
  embeddedHosts,
  LIKE_ALPINE,
  NEWER_BASE_IMAGE,
  type TaskHosts,
} from "./fixtures/tasks.ts";
import { openTerminal } from "./fixtures/terminal.ts";
import {
  cleanup,
  collect,
  configFile,
  connect,
  describeProgram,
  directory,
  hosts,
  log,
  never,
  nextAddress,
  nextNumber,
  PACKAGES,
  plainSshd,
  prepare,
  repository,
  runScript,
  searchRecord,
  setUp,
  someRecord,
  startTask,
  TINI,
  taskTest,
  testProgram,
  testSecrets,
  thrown,
} from "./fixtures/test-support.ts";
import {
  type ConfigChanges,
  makeWorld,
  projectRoot,
  scratchDirectory,
  type World,
  type WorldOptions,
} from "./fixtures/world.ts";

setUp({ hosts: true });

// ---------------------------------------------------------------------------------------------------------
// 2. Failures
// ---------------------------------------------------------------------------------------------------------

describe("failures", () => {
  /** The cause of a RunTask that AWS refuses with this exception and message. */
  const refusal = (name: string, message: string) =>
    awsFailure("ecs:RunTask", Object.assign(new Error(message), { name, $metadata: { httpStatusCode: 400 } })).cause;
  const stopped = (stoppedReason: string, stopCode: Task["stopCode"] = "TaskFailedToStart") =>
    stopCause({ stopCode, stoppedReason });
  const user = "User: arn:aws:sts::123456789012:assumed-role/x/i-0";

  // The texts are AWS's, as quoted in its documentation and in public reports.
  test.each<[answer: string, problem: Problem, cause: Cause]>([
    // Recognized by the error's name.
    ["ThrottlingException", "throttled", refusal("ThrottlingException", "Rate exceeded")],
    [
      "LimitExceededException",
      "provisioning",
      refusal("LimitExceededException", "Tasks provisioning capacity limit exceeded."),
    ],
    [
      "AccessDeniedException",
      "accessDenied",
      refusal("AccessDeniedException", `${user} is not authorized to perform: ecs:RunTask on resource: y`),
    ],
    [
      "ExpiredTokenException",
      "credentials",
      refusal("ExpiredTokenException", "The security token included in the request is expired"),
    ],
    [
      "InvalidSignatureException",
      "credentials",
      refusal("InvalidSignatureException", "The request signature we calculated does not match"),
    ],
    [
      "an expired signature",
      "clock",
      refusal("InvalidSignatureException", "Signature expired: 20191209T104625Z is now earlier than x"),
    ],
    ["BlockedException", "account", refusal("BlockedException", "Your Amazon Web Services account was blocked.")],
    ["ClusterNotFoundException", "cluster", refusal("ClusterNotFoundException", "Cluster not found.")],
    [
      "PlatformUnknownException",
      "platform",
      refusal("PlatformUnknownException", "The specified platform does not exist."),
    ],
    [
      "PlatformTaskDefinitionIncompatibilityException",
      "platform",
      refusal("PlatformTaskDefinitionIncompatibilityException", "x"),
    ],
    [
      "UnsupportedFeatureException",
      "unsupported",
      refusal("UnsupportedFeatureException", "The specified task isn't supported in this Region."),
    ],
    // ClientException and InvalidParameterException: recognized by the beginning of the message.
    ["an unknown task definition", "definition", refusal("ClientException", "TaskDefinition not found.")],
    ["an inactive task definition", "definition", refusal("InvalidParameterException", "TaskDefinition is inactive")],
    [
      "a task definition without support for Fargate",
      "incompatible",
      refusal("InvalidParameterException", "Task definition does not support launch_type FARGATE."),
    ],
    [
      "a network mode that is not awsvpc",
      "networkMode",
      refusal(
        "InvalidParameterException",
        "Network Configuration is not valid for the given networkMode of this task definition.",
      ),
    ],
    [
      "an override for an unknown container",
      "container",
      refusal("InvalidParameterException", "Override for container named x is not a container in the TaskDefinition."),
    ],
    [
      "a secret of the same name",
      "secret",
      refusal("ClientException", "The secret name must be unique and not shared with any new or existing x"),
    ],
    [
      "a platform version for EC2",
      "fargateOnly",
      refusal("InvalidParameterException", "The platform version must be null when specifying an EC2 launch type."),
    ],
    [
      "a public IP for EC2",
      "publicIp",
      refusal("InvalidParameterException", "Assign public IP is not supported for this launch type."),
    ],
    [
      "a missing task role",
      "taskRole",
      refusal(
        "InvalidParameterException",
        "The execute command failed because a valid task role is not being used. Specify a valid task role.",
      ),
    ],
    [
      "an unassociated capacity provider",
      "capacityProvider",
      refusal(
        "InvalidParameterException",
        "The specified capacity provider strategy cannot contain a capacity provider that is not associated with x",
      ),
    ],
    [
      "a cluster without instances",
      "launchType",
      refusal("InvalidParameterException", "No Container Instances were found in your cluster."),
    ],
    [
      "a role that ECS cannot assume",
      "assumeRole",
      refusal("ClientException", "ECS was unable to assume the role 'arn' that was provided for this task."),
    ],
    [
      "a service linked role that ECS cannot assume",
      "linkedRole",
      refusal("InvalidParameterException", "Unable to assume the service linked role. Please verify x"),
    ],
    [
      "the limit of provisioning tasks",
      "provisioning",
      refusal("ClientException", "Tasks provisioning capacity limit exceeded."),
    ],
    [
      "unavailable capacity",
      "capacity",
      refusal("ClientException", "Capacity is unavailable at this time. Please try again later"),
    ],
    [
      "EC2's request limit",
      "throttled",
      refusal(
        "InvalidParameterException",
        "Error retrieving subnet information for [subnet-1]: Request limit exceeded. (ErrorCode: RequestLimitExceeded)",
      ),
    ],
    [
      "a concurrent registration",
      "throttled",
      refusal("ClientException", "Too many concurrent attempts to create a new revision of the specified family."),
    ],
    [
      "an unknown subnet in an answer",
      "network",
      refusal(
        "InvalidParameterException",
        "Error retrieving subnet information for [subnet-1]: The subnet ID 'subnet-1' does not exist " +
          "(ErrorCode: InvalidSubnetID.NotFound)",
      ),
    ],
    // Reasons of failures.
    [
      "the limit of vCPUs",
      "quota",
      recognize("", "You\u2019ve reached the limit on the number of vCPUs you can run concurrently"),
    ],
    [
      "the limit of tasks",
      "quota",
      recognize("", "You've reached the limit on the number of tasks you can run concurrently"),
    ],
    [
      "memory above the account's limit",
      "taskSize",
      recognize("", "The requested MEMORY configuration is above your limit."),
    ],
    ["RESOURCE:MEMORY", "instances", recognize("", "RESOURCE:MEMORY")],
    ["AGENT", "instances", recognize("", "AGENT")],
    ["RESOURCE:ENI", "addresses", recognize("", "RESOURCE:ENI")],
    ["ATTRIBUTE", "placement", recognize("", "ATTRIBUTE")],
    ["LOCATION", "location", recognize("", "LOCATION")],
    // Tasks that do not start.
    [
      "a late network interface",
      "awsFault",
      stopped("Timeout waiting for network interface provisioning to complete."),
    ],
    [
      "an AuthFailure for a network interface",
      "awsFault",
      stopped("Unexpected EC2 error while attempting to Create Network Interface in subnet 'x': AuthFailure"),
    ],
    [
      "an unconfigured network interface",
      "awsFault",
      stopped("ResourceInitializationError: failed to configure ENI: failed to setup regular eni: netplugin"),
    ],
    [
      "a subnet without free addresses",
      "addresses",
      stopped("Unexpected EC2 error while attempting to Create Network Interface: InsufficientFreeAddressesInSubnet"),
    ],
    [
      "NetworkInterfaceLimitExceeded",
      "interfaces",
      stopped("Unexpected EC2 error while attempting to Create Network Interface: NetworkInterfaceLimitExceeded"),
    ],
    [
      "InvalidSubnetID.NotFound of a task",
      "network",
      stopped("Unexpected EC2 error while attempting to Create Network Interface: InvalidSubnetID.NotFound"),
    ],
    [
      "toomanyrequests of a registry",
      "pullRate",
      stopped("CannotPullContainerError: ref pull has been retried 1 time(s): toomanyrequests: You have reached"),
    ],
    [
      "a disk that is full during a pull",
      "pullSpace",
      stopped("CannotPullContainerError: write /var/lib/containerd/x: no space left on device"),
    ],
    [
      "an image without the platform",
      "architecture",
      stopped("CannotPullContainerError: does not contain descriptor matching platform 'linux/amd64'"),
    ],
    [
      "an exec format error",
      "architecture",
      stopped("CannotStartContainerError: OCI runtime create failed: exec /bin/x: exec format error"),
    ],
    [
      "an image that is not found",
      "pull",
      stopped("CannotPullContainerError: pull image manifest has been retried: failed to resolve ref x: not found"),
    ],
    [
      "a denied pull from ECR",
      "executionRole",
      stopped("CannotPullECRContainerError: AccessDeniedException: x is not authorized to perform: ecr:Get"),
    ],
    [
      "a denied secret",
      "executionRole",
      stopped(
        "ResourceInitializationError: unable to pull secrets or registry auth: AccessDeniedException: User: x is not " +
          "authorized to perform: secretsmanager:GetSecretValue on resource: y",
      ),
    ],
    [
      "an unknown secret",
      "missing",
      stopped("ResourceInitializationError: unable to pull secrets or registry auth: ResourceNotFoundException"),
    ],
    [
      "an unknown log group",
      "missing",
      stopped("ResourceInitializationError: failed to validate logger args: ResourceNotFoundException: x"),
    ],
    [
      "a timeout at a registry",
      "route",
      stopped("ResourceInitializationError: unable to pull secrets or registry auth: i/o timeout"),
    ],
    [
      "an EFS name that is not resolved",
      "efsName",
      stopped(
        'ResourceInitializationError: failed to invoke EFS utils commands to set up EFS volumes: stderr: Failed to resolve "x"',
      ),
    ],
    [
      "an EFS timeout",
      "efsPort",
      stopped(
        "ResourceInitializationError: failed to invoke EFS utils commands to set up EFS volumes: stderr: b'mount.nfs4: Connection timed out'",
      ),
    ],
    [
      "a denied EFS access",
      "efsAccess",
      stopped(
        "ResourceInitializationError: failed to invoke EFS utils commands to set up EFS volumes: stderr: b'mount.nfs4: access denied by server",
      ),
    ],
    [
      "a container that cannot be created",
      "command",
      stopped("CannotStartContainerError: ResourceInitializationError: failed to create new container runtime task"),
    ],
    [
      "a volume that cannot be created",
      "volume",
      stopped("CannotCreateVolumeError: unable to copy contents to volume on host"),
    ],
    // Tasks that stop.
    ["SpotInterruption", "spot", stopped("Your Spot Task was interrupted.", "SpotInterruption")],
    ["TerminationNotice of a Spot task", "spot", stopped("Your Spot Task was interrupted.", "TerminationNotice")],
    [
      "maintenance of the host",
      "host",
      stopped("ECS is performing maintenance on the underlying infrastructure hosting the task.", "TerminationNotice"),
    ],
    [
      "an essential container that exited",
      "exited",
      stopped("Essential container in task exited", "EssentialContainerExited"),
    ],
    ["failed health checks", "unhealthy", stopped("Task failed container health checks", "ServiceSchedulerInitiated")],
    ["InternalError", "awsFault", stopped("InternalError: Unable to create the container", "TaskFailedToStart")],
    [
      "DockerTimeoutError",
      "awsFault",
      stopped("DockerTimeoutError: Could not transition to started; timed out after waiting 3m0s"),
    ],
    ["RequestExpired", "clock", refusal("RequestExpired", "Request has expired.")],
    ["a stop by fargate sweep", "ownStop", stopped("fargate sweep: it is past its deadline", "UserInitiated")],
    ["a stop by a user", "userStop", stopped("Task stopped by user", "UserInitiated")],
    [
      "OutOfMemoryError",
      "memory",
      stopCause({
        stopCode: "EssentialContainerExited",
        stoppedReason: "Essential container in task exited",
        containers: [{ name: CONTAINER, reason: "OutOfMemoryError: Container killed due to memory usage" }],
      }),
    ],
  ])("recognize maps %s to %s", (_, problem, cause) => {
    expect(cause.problem).toBe(problem);
    expect(adviceFor(cause)).toMatch(/^[a-z].{10,110}$/);
  });

  test("recognize ignores AWS's words in text that others chose", () => {
    const capacity = "Capacity is unavailable at this time";
    const denied = `${user} is not authorized to perform: ecs:RunTask on resource: arn:aws:ecs:r:1:task-definition/`;
    for (const planted of ["InterfaceLimitExceeded", "Capacity is unavailable at this time", "RESOURCE:ENI"])
      expect(refusal("AccessDeniedException", `${denied}${planted}:1`).problem).toBe("accessDenied");
    expect(stopped(capacity, "UserInitiated").problem).toBe("userStop");
    // The path comes from the task definition, so it must not select the advice.
    const mount = "ResourceInitializationError: failed to invoke EFS utils commands: mount.nfs4: mounting fs-1:";
    expect(stopped(`${mount}/configure ENI failed, reason given by server: No such file`).problem).toBe("efsAccess");
    expect(refusal("ClientException", `Invalid value: ${capacity}`).problem).toBeUndefined();
    const unknown = new Failure("system", `the server says "${capacity}"`);
    expect(adviceFor(unknown.cause)).toBeUndefined();
  });

  test("adviceFor names the action that IAM refuses", () => {
    const cause = refusal("AccessDeniedException", `${user} is not authorized to perform: iam:PassRole on resource: x`);
    expect(adviceFor(cause)).toBe("allow iam:PassRole in the IAM policy of the runner's host");
    expect(adviceFor({ problem: "accessDenied" })).toBe("allow this action in the IAM policy of the runner's host");
  });

  test("exitCode returns the runner's codes or else 1 and 2", () => {
    const env = { BUILD_FAILURE_EXIT_CODE: "71", SYSTEM_FAILURE_EXIT_CODE: "72" };
    expect([exitCode("build", env), exitCode("system", env)]).toEqual([71, 72]);
    for (const bad of [undefined, "", "0", "256", "-1", "1.5", "x"])
      expect([
        exitCode("build", { BUILD_FAILURE_EXIT_CODE: bad }),
        exitCode("system", { SYSTEM_FAILURE_EXIT_CODE: bad }),
      ]).toEqual([1, 2]);
  });
});

// ---------------------------------------------------------------------------------------------------------
// 3. Configuration
// ---------------------------------------------------------------------------------------------------------

describe("configuration", () => {
  const read = (name: string, options = {}, env = {}) => readConfig(configFile(name), `${name}.toml`, options, env);

  test.each(["manual", "guide-2020", "guide", "guide-private"])("readConfig accepts the documented file %s", (name) => {
    const { config, warnings } = read(name);
    expect(warnings).toEqual([]);
    expect(config.SSH.Username).toBe("root");
    expect(config.SSH.Port).toBe(22);
    expect(config.Fargate.EnablePublicIP).toBe(name === "guide" || name === "guide-2020");
  });

  test("readConfig accepts the official driver's looser spellings", () => {
    const loose = read("loose");
    const exact = read("manual").config;
    expect(loose.config).toEqual({ ...exact, LogLevel: "warning", LogFormat: "text-simple" });
    expect(loose.warnings).toEqual([
      expect.stringMatching(/^loose\.toml: unknown key SomethingOfOurs; the most similar known key is /),
      "loose.toml: unknown key Fargate.Plattform; the most similar known key is Fargate.PlatformVersion",
      expect.stringMatching(/^loose\.toml: unknown key Other; the most similar known key is /),
    ]);
  });

  test("readConfig prefers the exact spelling of a key that is given twice", () => {
    const twice = configFile("guide").replace("Port = 22", "port = 1\nPort = 2\nPORT = 3");
    const { config, warnings } = readConfig(twice, "x", {}, {});
    expect(config.SSH.Port).toBe(2);
    expect(warnings).toEqual([
      "x: SSH.port has no effect, since SSH.Port is set",
      "x: SSH.PORT has no effect, since SSH.Port is set",
    ]);
  });

  test("readConfig reports values that must be tables and ignores blank ones", () => {
    const { message } = thrown(() =>
      readConfig('Fargate = "x"\nSSH = 3\n[TaskMetadata]\nDirectory = "/x"', "f", {}, {}),
    );
    expect(message.split("\n").slice(1)).toEqual([
      '  Fargate is "x"; expected: a table',
      "  SSH is 3; expected: a table",
    ]);
    const env = { CUSTOM_ENV_FARGATE_PLATFORM_VERSION: "  ", CUSTOM_ENV_FARGATE_TASK_DEFINITION: " " };
    expect(read("manual", {}, env)).toEqual(read("manual"));
  });

  test("readConfig takes port 0 for a missing port", () => {
    expect(readConfig(configFile("guide").replace("Port = 22", "Port = 0"), "x", {}, {}).config.SSH.Port).toBe(22);
  });

  test("readConfig returns every setting", () => {
    const { config, warnings } = read("full");
    expect(warnings).toEqual([]);
    expect(config).toEqual({
      LogLevel: "debug",
      LogFormat: "json",
      LogFile: "/var/log/fargate.log",
      Fargate: {
        Cluster: "arn:aws:ecs:eu-west-1:123456789012:cluster/ci",
        Region: "eu-west-1",
        Subnets: ["subnet-1", "subnet-2"],
        SecurityGroups: ["sg-1", "sg-2"],
        TaskDefinition: "build",
        EnablePublicIP: true,
        UsePublicIP: false,
        PlatformVersion: "1.4.0",
        AllowedPlatformVersions: ["1.4.0", "LATEST"],
        CapacityProviderStrategy: [
          { CapacityProvider: "FARGATE_SPOT", Weight: 3 },
          { CapacityProvider: "FARGATE", Weight: 1, Base: 1 },
        ],
        FallbackCapacityProviderStrategy: [{ CapacityProvider: "FARGATE", Weight: 1 }],
        EnableExecuteCommand: true,
        PropagateTags: "TASK_DEFINITION",
        StartTimeout: 300,
        WaitForHealthy: true,
        DeadlineMargin: 600,
        MaxTaskAge: 43_200,
        AbandonedAfter: 1800,
        Tags: { team: "ci", "cost centre": "42" },
      },
      JobImage: {
        TaskDefinitions: [{ Image: "registry.example.com/ci/node:*", TaskDefinition: "ci-node" }],
        AllowedImages: ["**", "registry.example.com/{project_id}/**"],
        AllowedServices: ["postgres:*", "registry.example.com:5000/services/*@sha256:*"],
        PullCredentials: [
          {
            Image: "registry.example.com/**",
            SecretArn: "arn:aws:secretsmanager:eu-west-1:123456789012:secret:registry",
          },
        ],
        SecretsInServices: true,
        BuildsDirectory: "/srv/builds",
        CacheDirectory: "/srv/cache",
      },
      TaskMetadata: { Directory: "/var/lib/fargate" },
      SSH: {
        Username: "worker",
        Port: 2222,
        PrivateKeyPath: "/etc/gitlab-runner/id_ed25519",
        KeyType: "rsa",
        ConnectTimeout: 60,
        KeepAliveInterval: 5,
        CancelGracePeriod: 30,
        PassEnvironment: ["AWS_*", "JAVA_HOME"],
      },
    });
  });

  test("readConfig lets options override variables and variables the file", () => {
    const env = { CUSTOM_ENV_FARGATE_TASK_DEFINITION: "from-variable", CUSTOM_ENV_FARGATE_PLATFORM_VERSION: "1.3.0" };
    const options = { TaskDefinition: "from-option", PlatformVersion: "LATEST", LogLevel: "ERROR", LogFormat: "JSON" };
    const chosen = ({ config: { Fargate, LogLevel, LogFormat } }: { config: Config }) => [
      Fargate.TaskDefinition,
      Fargate.PlatformVersion,
      LogLevel,
      LogFormat,
    ];
    expect(chosen(read("manual"))).toEqual(["fargateExecutor:1", undefined, "info", "text"]);
    expect(chosen(read("manual", {}, env))).toEqual(["from-variable", "1.3.0", "info", "text"]);
    expect(chosen(read("manual", options, env))).toEqual(["from-option", "LATEST", "error", "json"]);
    const empty = { CUSTOM_ENV_FARGATE_TASK_DEFINITION: "", CUSTOM_ENV_FARGATE_PLATFORM_VERSION: "" };
    expect(chosen(read("manual", { TaskDefinition: "" }, empty))).toEqual(chosen(read("manual")));
  });

  // Except that of --log-file, which starts from the working directory.
  test("readConfig resolves relative paths from the directory of the file", () => {
    const text = configFile("full")
      .replace("/var/log/fargate.log", "logs/fargate.log")
      .replace("/var/lib/fargate", "../records")
      .replace("/etc/gitlab-runner/id_ed25519", "id_ed25519");
    const pathsIn = (path: string, options = {}) => {
      const { config } = readConfig(text, path, options, {});
      return [config.LogFile, config.TaskMetadata.Directory, config.SSH.PrivateKeyPath];
    };
    expect(pathsIn("/etc/fargate/x.toml")).toEqual([
      "/etc/fargate/logs/fargate.log",
      "/etc/records",
      "/etc/fargate/id_ed25519",
    ]);
    const here = process.cwd();
    expect(pathsIn("conf/x.toml")).toEqual([
      join(here, "conf", "logs", "fargate.log"),
      join(here, "records"),
      join(here, "conf", "id_ed25519"),
    ]);
    expect(pathsIn("/etc/fargate/x.toml", { LogFile: "y.log" })[0]).toBe("y.log");
    expect(pathsIn("/etc/fargate/x.toml", { LogFile: " " })[0]).toBe("/etc/fargate/logs/fargate.log");
  });

  test("readConfig accepts a task definition that only a variable names", () => {
    const file = configFile("manual").replace(/.*TaskDefinition.*\n/, "");
    const env = { CUSTOM_ENV_FARGATE_TASK_DEFINITION: "from-variable" };
    expect(readConfig(file, "x", {}, env).config.Fargate.TaskDefinition).toBe("from-variable");
    expect(thrown(() => readConfig(file, "x", {}, {})).message).toContain("Fargate.TaskDefinition is missing");
  });

  test("readConfig reports all problems at once", () => {
    const { message } = thrown(() => read("bad"));
    const [head, ...problems] = message.split("\n");
    expect(head).toBe("bad.toml cannot be used:");
    const keys = problems.map((line) => line.trim().split(/[ :]/)[0]);
    expect(keys.sort()).toEqual(
      [
        "LogLevel",
        "LogFormat",
        "Fargate.Cluster",
        "Fargate.Region",
        "Fargate.Subnet",
        "Fargate.SecurityGroups",
        "Fargate.TaskDefinition",
        "Fargate.EnablePublicIP",
        "Fargate.LaunchType",
        "Fargate.CapacityProviderStrategy",
        "Fargate.Tags.a",
        "Fargate.PropagateTags",
        "Fargate.StartTimeout",
        "JobImage.TaskDefinitions[0].Image",
        "JobImage.TaskDefinitions[0].TaskDefinition",
        "JobImage.AllowedImages[0]",
        "JobImage.AllowedServices",
        "JobImage.PullCredentials[0].Image",
        "JobImage.PullCredentials[0].SecretArn",
        "JobImage.SecretsInServices",
        "JobImage.BuildsDirectory",
        "JobImage.CacheDirectory",
        "TaskMetadata.Directory",
        "SSH.Username",
        "SSH.Port",
        "SSH.KeyType",
        "SSH.ConnectTimeout",
        "SSH.KeepAliveInterval",
        "SSH.CancelGracePeriod",
        "SSH.PassEnvironment[1]",
      ].sort(),
    );
    expect(problems).toContain("  Fargate.Cluster is missing; expected: the name or ARN of the ECS cluster");
    expect(problems).toContain(
      "  SSH.Port is 70000; expected: the port of the task's SSH server, a whole number from 1 to 65535",
    );
    for (const line of problems) expect(line).toMatch(/; expected: \S|: set either|: cannot be set/);
  });

  test("readConfig accepts only names and patterns of variables in PassEnvironment", () => {
    const withList = (list: string) => `${configFile("guide")}\n  PassEnvironment = ${list}\n`;
    for (const good of ['["*"]', "[]", '["_A1", "A*B*C*", " PATH "]'])
      expect(readConfig(withList(good), "x", {}, {}).config.SSH.PassEnvironment).toHaveLength(JSON.parse(good).length);
    for (const bad of [
      '["1A"]',
      '["A-B"]',
      '["A B"]',
      '[""]',
      '["A=B"]',
      '["*a*b*c*"]',
      '["A\\nB"]',
      '["$(x)"]',
      '"*"',
    ])
      expect(thrown(() => readConfig(withList(bad), "x", {}, {})).message).toContain("SSH.PassEnvironment");
    const { PassEnvironment } = readConfig(configFile("guide"), "x", {}, {}).config.SSH;
    expect(PassEnvironment).toEqual([
      ...["AWS_CONTAINER_*", "AWS_REGION", "AWS_DEFAULT_REGION", "AWS_EXECUTION_ENV", "ECS_CONTAINER_METADATA_URI*"],
    ]);
  });

  const withJobImage = (line: string) => `${configFile("guide")}\n[JobImage]\n  ${line}\n`;
  const problemsOf = (file: string) =>
    thrown(() => readConfig(file, "x", {}, {}))
      .message.split("\n")
      .slice(1);

  test("readConfig uses neither image nor services by default", () => {
    const none = {
      ...{ TaskDefinitions: [], AllowedImages: [], AllowedServices: [], PullCredentials: [] },
      ...{ SecretsInServices: false, BuildsDirectory: "/builds", CacheDirectory: "/cache" },
    };
    for (const file of [configFile("guide"), withJobImage(""), withJobImage('BuildsDirectory = ""')]) {
      const { config, warnings } = readConfig(file, "x", {}, {});
      expect({ JobImage: config.JobImage, warnings }).toEqual({ JobImage: none, warnings: [] });
    }
    const other = readConfig(withJobImage('allowedimages = [" node:* "]'), "x", {}, {});
    expect([other.config.JobImage.AllowedImages, other.warnings]).toEqual([["node:*"], []]);
  });

  test("readConfig explains each bad value in JobImage", () => {
    const pattern =
      "registry/repository:tag or @digest, with * for any text but / and ** for any path, not in the registry";
    const cases: [line: string, problem: string][] = [
      [
        "AllowedImages = [1]",
        `AllowedImages[0] is 1; expected: the images that a job may run its script in: a list of up to 100, each ${pattern}`,
      ],
      [
        'AllowedImages = ["node", "*.io/x"]',
        `AllowedImages[1] is "*.io/x"; expected: the images that a job may run its script in: a list of up to 100, each ${pattern}`,
      ],
      [
        'AllowedServices = "redis"',
        `AllowedServices is "redis"; expected: the images that a job may use for services: a list of up to 100, each ${pattern}`,
      ],
      [
        'TaskDefinitions = [{ Image = "node" }]',
        "TaskDefinitions[0].TaskDefinition is missing; expected: family, family:revision or ARN of the task definition",
      ],
      ['TaskDefinitions = [{ TaskDefinition = "x" }]', `TaskDefinitions[0].Image is missing; expected: ${pattern}`],
      [
        'PullCredentials = [{ Image = "a.io/x" }]',
        "PullCredentials[0].SecretArn is missing; expected: the ARN of a secret with a registry's user name and password",
      ],
      [
        "SecretsInServices = 1",
        "SecretsInServices is 1; expected: whether variables of services may contain secret variables: true or false",
      ],
      [
        'BuildsDirectory = "b"',
        'BuildsDirectory is "b"; expected: builds_dir of jobs with an image of their own: an absolute path',
      ],
      [
        'CacheDirectory = "/c d"',
        'CacheDirectory is "/c d"; expected: cache_dir of jobs with an image of their own: an absolute path',
      ],
    ];
    for (const [line, problem] of cases) expect(problemsOf(withJobImage(line))).toEqual([`  JobImage.${problem}`]);
    const [scalar] = problemsOf(configFile("guide").replace("[Fargate]", "JobImage = 3\n[Fargate]"));
    expect(scalar).toMatch(/^ {2}JobImage is 3; expected: a table/);
    const list = JSON.stringify(Array.from({ length: 101 }, (_, i) => `image-${i}`));
    expect(problemsOf(withJobImage(`AllowedImages = ${list}`))).toHaveLength(1);
    const { warnings } = readConfig(withJobImage("AllowedImage = []"), "x", {}, {});
    expect(warnings).toEqual([
      "x: unknown key JobImage.AllowedImage; the most similar known key is JobImage.AllowedImages",
    ]);
  });

  test("readConfig refuses PullCredentials whose pattern names no registry", () => {
    const withPattern = (pattern: string) =>
      withJobImage(`PullCredentials = [{ Image = "${pattern}", SecretArn = "a" }]`);
    for (const bad of ["node", "**", "*", "group/*:*", "node@sha256:*", "registry/x", "*.example.com/x"]) {
      const [problem, ...more] = problemsOf(withPattern(bad));
      expect([bad, more]).toEqual([bad, []]);
      expect(problem).toMatch(/^ {2}JobImage\.PullCredentials\[0\]\.Image is .*; the registry must be named$/);
    }
    for (const good of ["docker.io/**", "registry.example.com/{project_id}/**", "registry:5000/x", "localhost/x"])
      expect(readConfig(withPattern(good), "x", {}, {}).config.JobImage.PullCredentials).toHaveLength(1);
  });

  test("readConfig refuses directories of which one contains the other", () => {
    const withBoth = (builds: string, cache: string) =>
      withJobImage(`BuildsDirectory = "${builds}"\n  CacheDirectory = "${cache}"`);
    for (const [builds, cache] of [
      ["/a", "/a"],
      ["/a", "/a/b"],
      ["/a/b/c", "/a"],
      ["/cache", "/cache"],
    ] as const)
      expect(problemsOf(withBoth(builds, cache))).toEqual([
        expect.stringMatching(
          /^ {2}JobImage is \{.*\}; expected: a table in which neither BuildsDirectory nor CacheDirectory contains the other$/,
        ),
      ]);
    // Also with a default.
    expect(problemsOf(withJobImage('CacheDirectory = "/builds/cache"'))).toHaveLength(1);
    expect(problemsOf(withJobImage('BuildsDirectory = "/cache"'))).toHaveLength(1);
    const { JobImage } = readConfig(withBoth("/a/b", "/a/bc"), "x", {}, {}).config;
    expect([JobImage.BuildsDirectory, JobImage.CacheDirectory]).toEqual(["/a/b", "/a/bc"]);
    for (const bad of ["", "/"]
      .map((path) => `${path}a/../b`)
      .concat("/", "//a", "/a/", "a", "/a//b", "/.a", "/$x", "/a'b", "/é"))
      expect([bad, problemsOf(withBoth(bad, "/cache")).length]).toEqual([bad, 1]);
  });

  test("readConfig accepts a CancelGracePeriod from 0 to 240", () => {
    const withPeriod = (value: string) => `${configFile("guide")}\n  CancelGracePeriod = ${value}\n`;
    for (const good of [0, 240])
      expect(readConfig(withPeriod(`${good}`), "x", {}, {}).config.SSH.CancelGracePeriod).toBe(good);
    for (const bad of ["-1", "241", "1.5", '"10"'])
      expect(thrown(() => readConfig(withPeriod(bad), "x", {}, {})).message).toContain("SSH.CancelGracePeriod");
  });

  test("readConfig refuses LaunchType beside CapacityProviderStrategy", () => {
    const file = `${configFile("full")}`.replace("[Fargate]", '[Fargate]\nLaunchType = "FARGATE"');
    expect(thrown(() => readConfig(file, "x", {}, {})).message).toContain(
      "Fargate.LaunchType: cannot be set together with CapacityProviderStrategy",
    );
  });

  const ours = "arn:aws:ecs:us-east-2:123456789012";
  test.each<[verdict: string, asked: string, allowed: boolean, file?: Record<string, string>]>([
    ["allows a listed family", "family", true],
    ["allows a revision of a listed family", "family:3", true],
    ["refuses the beginning of a listed family", "famil", false],
    ["refuses a longer family", "family-2", false],
    ["refuses a listed family in capitals", "Family", false],
    ["allows a star that stands for nothing", "ci-", true],
    ["allows a star that stands for a name", "ci-build", true],
    ["allows a revision of a starred family", "ci-build:12", true],
    ["refuses two revisions", "ci-build:12:3", false],
    ["refuses a slash for a star", "ci-a/b", false],
    ["refuses a starred family with a prefix", "x-ci-build", false],
    ["allows a listed revision", "build:7", true],
    ["refuses a longer revision", "build:70", false],
    ["refuses a family without its revision", "build", false],
    ["refuses a revision with a leading zero", "build:07", false],
    ["allows a listed revision of two stars", "tool-x:4", true],
    ["refuses two stars without the revision", "tool-x", false],
    ["refuses an empty revision", "family:", false],
    ["refuses a revision that is a word", "family:latest", false],
    ["refuses a family before a line break", "family\nother", false],
    ["refuses a family before a NUL character", "family\u0000", false],
    ["refuses a listed family with an umlaut", "fämily", false],
    ["refuses a family of 6 KB", `${"ci-".repeat(2_000)}`, false],
    // The file has no ARN, so there is no account to compare with.
    ["refuses an ARN of an unknown account", `${ours}:task-definition/family:1`, false],
    [
      "allows an ARN in the cluster's account",
      `${ours}:task-definition/family:1`,
      true,
      { Cluster: `${ours}:cluster/c` },
    ],
    [
      "allows an ARN in the default's account",
      `${ours}:task-definition/family:1`,
      true,
      { TaskDefinition: `${ours}:task-definition/default:1` },
    ],
    [
      "refuses an ARN of an unlisted family",
      `${ours}:task-definition/other:1`,
      false,
      { Cluster: `${ours}:cluster/c` },
    ],
    ["allows an ARN of a listed revision", `${ours}:task-definition/build:7`, true, { Cluster: `${ours}:cluster/c` }],
    [
      "refuses an ARN of an unlisted revision",
      `${ours}:task-definition/build:8`,
      false,
      { Cluster: `${ours}:cluster/c` },
    ],
    ["refuses an ARN with a slash", `${ours}:task-definition/ci-a/b:1`, false, { Cluster: `${ours}:cluster/c` }],
    ["refuses an ARN of a cluster", `${ours}:cluster/family`, false, { Cluster: `${ours}:cluster/c` }],
    [
      "refuses an ARN in another region",
      "arn:aws:ecs:us-east-1:123456789012:task-definition/family:1",
      false,
      { Cluster: `${ours}:cluster/c` },
    ],
    [
      "refuses an ARN in another partition",
      "arn:aws-cn:ecs:us-east-2:123456789012:task-definition/family:1",
      false,
      { Cluster: `${ours}:cluster/c` },
    ],
    [
      "refuses an ARN in another account",
      "arn:aws:ecs:us-east-2:210987654321:task-definition/family:1",
      false,
      { Cluster: `${ours}:cluster/c` },
    ],
    [
      "refuses an ARN without an account",
      "arn:aws:ecs:us-east-2::task-definition/family:1",
      false,
      { Cluster: `${ours}:cluster/c` },
    ],
    [
      "refuses an ARN of another service",
      "arn:aws:ec2:us-east-2:123456789012:task-definition/family:1",
      false,
      { Cluster: `${ours}:cluster/c` },
    ],
    [
      "refuses an ARN in capitals",
      "ARN:aws:ecs:us-east-2:123456789012:task-definition/family:1",
      false,
      { Cluster: `${ours}:cluster/c` },
    ],
    [
      "refuses an ARN in the wrong partition",
      "arn:aws:ecs:us-east-2:123456789012:task-definition/family:1",
      false, // the partition must be that of Cluster
      {
        Cluster: "arn:aws-us-gov:ecs:us-east-2:123456789012:cluster/c",
        TaskDefinition: `${ours}:task-definition/default:1`,
      },
    ],
  ])("readConfig %s under AllowedTaskDefinitions", (_, asked, allowed, file = {}) => {
    const values = { Cluster: "c", Region: "us-east-2", TaskDefinition: "default", ...file };
    const given = Object.entries(values).map(([key, value]) => `  ${key} = "${value}"\n`);
    const patterns = '  AllowedTaskDefinitions = ["family", "ci-*", "build:7", "*ol-*:4"]\n';
    const text = configFile("guide").replace(/^ *(Cluster|Region|TaskDefinition) .*\n/gm, "");
    const config = text.replace("[Fargate]\n", `[Fargate]\n${patterns}${given.join("")}`);
    const env = { CUSTOM_ENV_FARGATE_TASK_DEFINITION: asked };
    const { refusal } = readConfig(config, "x", {}, env);
    if (allowed) expect(refusal).toBeUndefined();
    else
      expect(refusal).toMatch(
        /^FARGATE_TASK_DEFINITION of this job, [\s\S]*, is not allowed: (its ARN must|the file has no ARN|Allowed)/,
      );
    // Not applied to --task-def, to jobs that choose nothing, or without the setting.
    expect(readConfig(config, "x", { TaskDefinition: asked }, env).refusal).toBeUndefined();
    expect(readConfig(config, "x", {}, {}).refusal).toBeUndefined();
    expect(readConfig(config.replace(patterns, ""), "x", {}, env).refusal).toBeUndefined();
  });

  // A wrong value must not count as "not set", which would allow everything. An empty list allows nothing.
  test("readConfig accepts only a list of patterns as AllowedTaskDefinitions", () => {
    const read = (value: string) =>
      readConfig(
        configFile("guide").replace("[Fargate]\n", `[Fargate]\nAllowedTaskDefinitions = ${value}\n`),
        "x",
        {},
        {
          CUSTOM_ENV_FARGATE_TASK_DEFINITION: "family",
        },
      );
    expect(read("[]").refusal).toBe(
      "FARGATE_TASK_DEFINITION of this job, family, is not allowed: AllowedTaskDefinitions is empty",
    );
    for (const bad of ['""', '"family"', "true", '[""]', '["a/b"]', '["a:b"]', '["a*b*c*d*e"]', '["(a|b)"]', "[3]"])
      expect(thrown(() => read(bad)).message).toMatch(/Fargate\.AllowedTaskDefinitions\S* is .*; expected: .*family/);
  });

  test.each<[verdict: string, list: string | undefined, asked: string, refusal?: string]>([
    ["allows any version without a list", undefined, "9.9.9"],
    ["allows a listed version", '["1.4.0", "LATEST"]', "1.4.0"],
    ["allows a listed version between blanks", '["1.4.0", "LATEST"]', " LATEST "],
    [
      "refuses a listed version in lower case",
      '["1.4.0", "LATEST"]',
      "latest",
      "latest, is not allowed: AllowedPlatformVersions is 1.4.0, LATEST",
    ],
    ["allows a version before a line break", '["1.4.0", "LATEST"]', "1.4.0\n", undefined],
    [
      "refuses a version that matches a star",
      '["1.*"]',
      "1.4.0",
      "1.4.0, is not allowed: AllowedPlatformVersions is 1.*",
    ],
    ["refuses a version with an empty list", "[]", "1.4.0", "1.4.0, is not allowed: AllowedPlatformVersions is empty"],
    [
      "shortens a version that it refuses",
      "[]",
      "x".repeat(5_000),
      `${"x".repeat(300)}, is not allowed: AllowedPlatformVersions is empty`,
    ],
  ])("readConfig %s under AllowedPlatformVersions", (_, list, asked, refusal) => {
    const text = configFile("guide").replace(/^ *PlatformVersion .*\n/m, "");
    const file = list ? text.replace("[Fargate]\n", `[Fargate]\n  AllowedPlatformVersions = ${list}\n`) : text;
    const env = { CUSTOM_ENV_FARGATE_PLATFORM_VERSION: asked };
    expect(readConfig(file, "x", {}, env).refusal).toBe(refusal && `FARGATE_PLATFORM_VERSION of this job, ${refusal}`);
    // Not applied to the operator's own choice, or to jobs that choose no version.
    const other = { CUSTOM_ENV_FARGATE_TASK_DEFINITION: "any" };
    expect(readConfig(file, "x", { PlatformVersion: asked }, { ...env, ...other }).refusal).toBeUndefined();
    expect(readConfig(file, "x", {}, other).refusal).toBeUndefined();
  });

  // A wrong value must not count as "not set", which would allow every version.
  test("readConfig accepts only a list of versions as AllowedPlatformVersions", () => {
    const read = (value: string) => {
      const file = configFile("guide").replace("[Fargate]\n", `[Fargate]\nAllowedPlatformVersions = ${value}\n`);
      return readConfig(file, "x", {}, {});
    };
    for (const bad of ['""', '"LATEST"', "true", '[""]', "[3]"])
      expect(thrown(() => read(bad)).message).toMatch(/Fargate\.AllowedPlatformVersions\S* is .*; expected: .*1\.4\.0/);
  });

  test("unusedVariables names the variable that an unread one may misspell", () => {
    const reportOn = (...names: string[]) =>
      unusedVariables(Object.fromEntries(names.map((name) => [`CUSTOM_ENV_${name}`, "x"])));
    const meant = (name: string, known: string) => [{ name, meant: known }];
    for (const name of [
      "FARGATE_TASK_DEFINITON",
      "FARGATE_TASKDEFINITION",
      "FARGATE_TASK_DEFINITIONS",
      "FARGTE_TASK_DEFINITION",
    ])
      expect(reportOn(name)).toEqual(meant(name, "FARGATE_TASK_DEFINITION"));
    expect(reportOn("FARGATE_PLATFORM_VERSON")).toEqual(meant("FARGATE_PLATFORM_VERSON", "FARGATE_PLATFORM_VERSION"));
    // The author wrote the name with the prefix that the runner adds.
    for (const name of ["FARGATE_TASK_DEFINITION", "FARGATE_TASK_DEFINITON"])
      expect(reportOn(`CUSTOM_ENV_${name}`)).toEqual(meant(`CUSTOM_ENV_${name}`, "FARGATE_TASK_DEFINITION"));
    for (const name of [
      "FARGATE_CLUSTER",
      "FARGATE_TASK_DEFINI",
      "CUSTOM_ENV_FARGATE_CLUSTER",
      `FARGATE_${"x".repeat(5_000)}`,
    ])
      expect(reportOn(name)).toEqual([{ name }]);
    expect(reportOn("FARGATE_TASK_DEFINITION", "FARGATE_PLATFORM_VERSION", "CI_JOB_ID", "PATH", "")).toEqual([]);
    // Variables without CUSTOM_ENV_ belong to the manager host, not to the job.
    expect(unusedVariables({ FARGATE_TASK_DEFINITON: "x", FARGATE_X: "x" })).toEqual([]);
  });

  test("readConfig matches a pattern full of stars without delay", () => {
    const evil = configFile("guide").replace("[Fargate]\n", '[Fargate]\nAllowedTaskDefinitions = ["*a*a*b"]\n');
    expect(
      readConfig(evil, "x", {}, { CUSTOM_ENV_FARGATE_TASK_DEFINITION: "a".repeat(120_000) }).refusal,
    ).toBeDefined();
    expect(readConfig(evil, "x", {}, { CUSTOM_ENV_FARGATE_TASK_DEFINITION: "a".repeat(255) }).refusal).toBeDefined();
  });

  test("readConfig gives the line and column of a syntax error", () => {
    const { message } = thrown(() => readConfig('[Fargate]\n  Cluster = "x"\n  Region = \n', "f.toml", {}, {}));
    expect(message).toMatch(/^f\.toml, line 3, column \d+: invalid TOML: /);
    expect(message).not.toContain("\n");
  });

  test("readConfig accepts a byte order mark and Windows line ends", () => {
    const file = `\uFEFF${configFile("manual").replaceAll("\n", "\r\n")}`;
    expect(readConfig(file, "x", {}, {})).toEqual(read("manual"));
  });
});

// ---------------------------------------------------------------------------------------------------------
// 4. Logging
// ---------------------------------------------------------------------------------------------------------

describe("logging", () => {
  const record = (level: LogRecord["level"], message: string, fields = {}): LogRecord => ({
    level,
    message,
    fields,
    timestamp: Date.UTC(2026, 0, 2, 3, 4, 5, 678),
  });

  test("formatRecord writes the formats text, text-simple and json", () => {
    const info = record("info", "the task is RUNNING", { status: "RUNNING" });
    expect(formatRecord(info, "text")).toBe("2026-01-02T03:04:05Z the task is RUNNING\n");
    expect(formatRecord(info, "text-simple")).toBe("the task is RUNNING\n");
    expect(JSON.parse(formatRecord(info, "json"))).toEqual({
      time: "2026-01-02T03:04:05Z",
      level: "info",
      msg: "the task is RUNNING",
      status: "RUNNING",
    });
    expect(formatRecord(record("warning", "x"), "text-simple")).toBe("warning: x\n");
    expect(formatRecord(record("fatal", "x"), "text-simple")).toBe("error: x\n");
  });

  /** Logs one message at level info and returns its text. */
  const logged = (message: string, fields?: Record<string, unknown>) => {
    const records: LogRecord[] = [];
    makeLogger("debug", (record) => records.push(record)).info(message, fields);
    expect(records.length).toBe(1);
    return records[0]?.message;
  };

  test("makeLogger replaces the names of fields by their values", () => {
    expect(logged("{a} and {b}, {a}", { a: "$&", b: 1 })).toBe("$& and 1, $&");
    expect(logged("{zero} {none} {no}", { zero: 0, none: undefined, no: false })).toBe("0 undefined false");
    expect(logged("{a}{b}", { a: "{b}", b: "{a}" })).toBe("{b}{a}"); // values are not messages
    expect(logged("{{a}}", { a: "x" })).toBe("{x}");
  });

  test("makeLogger leaves all other braces alone", () => {
    for (const text of ["{", "}{", "{}", "{{}}", "{other}", "{ a }", "{a.b}", "{a", "a}", "${b}{a-b}"]) {
      expect(logged(text)).toBe(text);
      expect(logged(text, { a: "x" })).toBe(text);
    }
    for (const name of ["constructor", "__proto__", "toString", "hasOwnProperty"])
      expect(logged(`{${name}}`, { a: "x" })).toBe(`{${name}}`);
    expect(logged("{toString}", { toString: "x" })).toBe("x");
  });

  test("makeLogger passes only records of the lowest level and more severe ones", () => {
    const levels = ["trace", "debug", "info", "warning", "error", "fatal"] as const;
    for (const lowest of levels) {
      const records: LogRecord[] = [];
      const logger = makeLogger(lowest, (record) => records.push(record));
      for (const method of ["debug", "info", "warn", "error", "fatal"] as const) logger[method](method);
      const passed = levels.slice(levels.indexOf(lowest)).filter((level) => level !== "trace");
      expect(records.map(({ level }) => level)).toEqual(passed);
      expect(records.map(({ message }) => message)).toEqual(passed.map((level) => level.replace("warning", "warn")));
    }
  });

  test("makeLogger passes the fields and the time of a record", () => {
    const records: LogRecord[] = [];
    const fields = { status: "RUNNING", unused: [1] };
    const before = Date.now();
    const logger = makeLogger("info", (each) => records.push(each));
    logger.info("it is {status}", fields);
    logger.fatal("no fields");
    expect(records).toEqual([
      { level: "info", message: "it is RUNNING", fields, timestamp: expect.any(Number) },
      { level: "fatal", message: "no fields", fields: {}, timestamp: expect.any(Number) },
    ]);
    for (const { timestamp } of records) {
      expect(timestamp).toBeGreaterThanOrEqual(before);
      expect(timestamp).toBeLessThanOrEqual(Date.now());
    }
  });

  // Line ends, cursor movements, direction marks, invisible characters, and a lone surrogate.
  const hostile =
    'a\nb\r\u001b[0Ksection_start:1:x\u0085\u2028\u202e\u200b\u{e0041}\ud800"}\n{"level":"fatal","msg":"forged"}';

  test("formatRecord keeps text from outside on one harmless line", () => {
    for (const format of ["text", "text-simple", "json"] as const) {
      const line = formatRecord(record("info", hostile, { hostile }), format);
      expect(line.endsWith("\n")).toBe(true);
      expect(line.slice(0, -1)).not.toMatch(/[\p{Cc}\p{Cf}\p{Co}\p{Cs}\p{Zl}\p{Zp}]/u);
      if (format === "json") {
        // The message is as in the text formats. Parsing the JSON restores the property's original value.
        const { level, msg, hostile: property } = JSON.parse(line);
        expect({ level, property }).toEqual({ level: "info", property: hostile });
        expect(msg).toMatch(/^a \| b\\u000d\\u001b\[0Ksection_start/);
      }
    }
  });

  test("Failure breaks lines only between the driver's own parts", () => {
    const failure = new Failure("system", `AWS said ${hostile}`, {}, [`one ${hostile}`, "two"]);
    expect(failure.message.split("\n")).toEqual([
      expect.stringMatching(/^AWS said a \| b/),
      expect.stringMatching(/^ {2}one a \| b/),
      "  two",
    ]);
    expect(failure.message.replaceAll("\n", "")).not.toMatch(/[\p{Cc}\p{Cf}\p{Co}\p{Cs}\p{Zl}\p{Zp}]/u);
    expect(new Failure("build", "x".repeat(1_000_000)).message.length).toBeLessThan(5_000);
    const long = "y".repeat(1_000_000);
    expect(formatRecord(record("info", long, { long }), "json").length).toBeLessThan(10_000);
  });
});

// ---------------------------------------------------------------------------------------------------------
// 5. The job
// ---------------------------------------------------------------------------------------------------------

describe("job identity", () => {
  const variables = {
    CUSTOM_ENV_CI_RUNNER_SHORT_TOKEN: "abc12345",
    CUSTOM_ENV_CI_PROJECT_URL: "https://gitlab.example.com/group/project",
    CUSTOM_ENV_CI_PIPELINE_ID: "20",
    CUSTOM_ENV_CI_JOB_ID: "300",
  };
  const response = (changes: object = {}) => {
    const path = join(directory(), "response.json");
    const body = { ...gitlabJob().response, ...changes };
    fs.writeFileSync(path, JSON.stringify(body));
    return path;
  };
  const sha256 = (text: string) => createHash("sha256").update(text).digest("hex");

  test("readJob identifies a job as the official driver does without a response", () => {
    const hash = sha256("https://gitlab.example.com/group/project-20-300");
    expect(readJob(variables)?.stem).toBe(`abc12345-${hash}`);
  });

  test("readJob ignores every variable when there is a response", () => {
    const JOB_RESPONSE_FILE = response();
    const hash = sha256(
      JSON.stringify(["https://gitlab.example.com/acme/rocket.git", 42, 4711, gitlabJob().response.token]),
    );
    const ids = { job: 4711, project: 42 };
    const job = { stem: `job-4711-${hash}`, hash, title: "job 4711 of project 42", timeout: 3600, imageNames: [], ids };
    expect(readJob({ ...variables, JOB_RESPONSE_FILE })).toEqual(job);
    for (const name of [...Object.keys(variables), "CUSTOM_ENV_CI_BUILDS_DIR", "CUSTOM_ENV_JOB_RESPONSE_FILE"])
      for (const value of ["", "other", "../../x", "a\u0000b", "\u001b[0K\n", "x".repeat(5_000)])
        expect(readJob({ ...variables, JOB_RESPONSE_FILE, [name]: value })).toEqual(job);
  });

  test.each(["", "../../etc/x", "a/b", "a".repeat(33), "a\u0000b", "é"])("readJob ignores the label %j", (token) => {
    const env = { ...variables, CUSTOM_ENV_CI_RUNNER_SHORT_TOKEN: token };
    expect(readJob(env)?.stem).toMatch(/^job-[0-9a-f]{64}$/);
  });

  // The token in the repository's URL is ignored.
  test("readJob identifies a job by host, project and id", () => {
    const stemOf = (changes: object) => readJob({ JOB_RESPONSE_FILE: response(changes) })?.stem;
    const address = (url: string) => ({ git_info: { ...gitlabJob().response.git_info, repo_url: url } });
    const own = stemOf(address("https://gitlab-ci-token:one@gitlab.example.com/a/b.git"));
    expect(stemOf(address("https://gitlab-ci-token:two@gitlab.example.com/a/b.git"))).toBe(own);
    const others = [
      stemOf(address("https://gitlab-ci-token:one@gitlab.example.org/a/b.git")),
      stemOf(address("http://gitlab-ci-token:one@gitlab.example.com/a/b.git")),
      stemOf(address("https://gitlab-ci-token:one@gitlab.example.com:8443/a/b.git")),
      // Another instance under the same host name.
      stemOf(address("https://gitlab-ci-token:one@gitlab.example.com/other/a/b.git")),
      // An instance that claims the address of the first.
      stemOf({ ...address("https://gitlab-ci-token:one@gitlab.example.com/a/b.git"), token: "another" }),
      stemOf({ id: 1 }),
      stemOf({ job_info: { ...gitlabJob().response.job_info, project_id: 1 } }),
      own,
    ];
    expect(new Set(others).size).toBe(others.length);
  });

  test("readJob reads only the names of image and services", () => {
    const jobOf = (changes: object) => readJob({ JOB_RESPONSE_FILE: response(changes) });
    const none = jobOf({ image: { name: "" }, services: [] });
    const services = [{ name: "postgres:16", alias: "db" }, { name: "redis" }];
    expect(jobOf({ image: { name: "ruby:3.2" }, services })).toEqual({
      ...none,
      imageNames: ["ruby:3.2", "postgres:16", "redis"],
    });
    for (const odd of [null, 3, "ruby", [], {}, { name: 3 }, undefined])
      expect(jobOf({ image: odd, services: odd })).toEqual(none);
    expect(jobOf({ services: [null, { name: null }, "x", { name: "y" }] })?.imageNames).toEqual(["y"]);
  });

  test("readJob shows no token of a response that it refuses", () => {
    const broken = join(directory(), "response.json");
    fs.writeFileSync(broken, '{"token": "secret-token-1"');
    for (const [path, why] of [
      [broken, "it is not JSON"],
      [join(broken, "..", "none.json"), "ENOENT"],
      [response({ git_info: { repo_url: "secret-token-2" } }), "git_info.repo_url"],
      [response({ id: "4711" }), "id is missing or invalid"],
    ]) {
      const { message } = thrown(() => readJob({ ...variables, JOB_RESPONSE_FILE: path }));
      expect(message).toContain(why);
      expect(message).not.toContain("secret-token");
    }
  });

  test("configAnswer has the documented shape", () => {
    expect(configAnswer(undefined)).toBe('{"driver":{"name":"fargate","version":"dev (HEAD)"},"hostname":""}');
    expect(JSON.parse(configAnswer(readJob(variables), "ci-manager-1.example"))).toMatchObject({
      hostname: "ci-manager-1.example",
    });
    expect(readJob({})).toBeUndefined();
  });

  test("configAnswer removes characters that are special in a shell from the host name", () => {
    const nameFor = (host: string) => JSON.parse(configAnswer(readJob(variables), host)).hostname;
    expect(nameFor('$(id)`id`"\\!$HOME;a\nb_c é')).toBe("ididHOMEabc");
    expect(nameFor('$(`"')).toBe("");
    expect(nameFor(hostname())).toBe(JSON.parse(configAnswer(readJob(variables))).hostname);
  });
});

// ---------------------------------------------------------------------------------------------------------
// 6. Task record
// ---------------------------------------------------------------------------------------------------------

describe("task record", () => {
  /** The advice. It must also be harmless if `Directory` is /tmp, whose mode other programs need. */
  const ownDirectory = "use a directory of the driver's own with mode 0700, such as /opt/gitlab-runner/metadata";
  /** The path of the record of the job in `someRecord`. */
  const recordIn = (where: string) => join(where, `job-1-${"0123456789abcdef".repeat(4)}.json`);

  test("writeRecord writes one file for its owner alone", () => {
    const path = recordIn(join(directory(), "records"));
    createDirectory(join(path, ".."));
    expect(readRecord(path)).toBeUndefined();
    writeRecord(path, { ...someRecord, TaskARN: "" });
    writeRecord(path, someRecord);
    expect(readRecord(path)).toEqual(someRecord);
    expect(fs.statSync(path).mode & 0o777).toBe(0o600);
    expect(fs.statSync(join(path, "..")).mode & 0o777).toBe(0o700);
    expect(fs.readdirSync(join(path, ".."))).toEqual([basename(path)]);
    // The official driver's fields, under its names.
    expect(JSON.parse(fs.readFileSync(path, "utf8"))).toMatchObject({
      TaskARN: someRecord.TaskARN,
      ContainerIP: someRecord.ContainerIP,
      PrivateKey: someRecord.PrivateKey,
    });
  });

  test("readRecord refuses a record that others could read, write or replace", () => {
    const path = recordIn(directory());
    const elsewhere = join(directory(), "x.json");
    const change = (make: () => void, why: RegExp, remains: boolean) => {
      fs.rmSync(path, { recursive: true, force: true });
      writeRecord(path, someRecord);
      expect(readRecord(path)).toEqual(someRecord);
      make();
      expect(thrown(() => readRecord(path)).message).toMatch(why);
      expect(salvageRecord(path).TaskARN).toBe(remains ? someRecord.TaskARN : undefined);
    };
    const replace = (by: (path: string) => void) => () => {
      fs.rmSync(elsewhere, { force: true });
      fs.renameSync(path, elsewhere);
      by(path);
    };
    change(
      replace((path) => fs.symlinkSync(elsewhere, path)),
      /it is a symbolic link$/,
      false,
    );
    change(
      replace((path) => execFileSync("mkfifo", [path])),
      /it is not a regular file$/,
      false,
    );
    change(
      replace((path) => fs.mkdirSync(path)),
      /it is not a regular file$/,
      false,
    );
    for (const mode of [0o604, 0o640, 0o644])
      change(() => fs.chmodSync(path, mode), /its mode is 6..; it must be 600/, true);
    for (const mode of [0o602, 0o620, 0o666])
      change(() => fs.chmodSync(path, mode), /its mode is 6..; it must be 600/, false);
    change(
      () => writeRecord(path, { ...someRecord, StartedBy: `fargate-0123456789ab-${"f".repeat(32)}` }),
      /it belongs to another job$/,
      false,
    );
  });

  test("readRecord accepts a record with and without containers of the job", () => {
    const path = recordIn(directory());
    const Build = { Shell: "sh", User: 1000, CoordinatorUser: 0 } as const;
    const Services = [{ Container: "service-1-redis", Image: "redis:7", Log: "" }];
    for (const record of [someRecord, { ...someRecord, Services }, { ...someRecord, Build, Services }]) {
      writeRecord(path, record);
      expect(readRecord(path)).toEqual(record);
    }
    for (const odd of [{ Build: { ...Build, Shell: "zsh" } }, { Build: 3 }, { Services: [{}] }]) {
      writeRecord(path, { ...someRecord, ...odd } as TaskRecord);
      expect(thrown(() => readRecord(path)).message).toMatch(/Build|Services/);
      expect(salvageRecord(path).TaskARN).toBe(someRecord.TaskARN);
    }
  });

  test("readRecord refuses a record that belongs to another user", ({ skip }) => {
    if (process.geteuid?.() !== 0) return skip("only root can give files away");
    const path = recordIn(directory());
    writeRecord(path, someRecord);
    fs.chownSync(path, 12_345, 0);
    expect(thrown(() => readRecord(path)).message).toMatch(/it belongs to another user \(id 12345\)$/);
    expect(salvageRecord(path).TaskARN).toBeUndefined();
    fs.chownSync(path, 0, 0);
    expect(readRecord(path)).toEqual(someRecord);
  });

  // Locks of another user are ignored as well.
  test("createDirectory warns of a directory that belongs to another user", ({ skip }) => {
    if (process.geteuid?.() !== 0) return skip("only root can give files away");
    const where = directory();
    fs.chmodSync(where, 0o755);
    fs.chownSync(where, 12_345, 0);
    expect(createDirectory(where)).toBe(
      `TaskMetadata.Directory ${where} belongs to another user (id 12345); ${ownDirectory}`,
    );
    const stem = `job-1-${"0123456789abcdef".repeat(4)}`;
    createLock({ Directory: where }, stem, "run");
    expect(readLocks({ Directory: where }, Date.now())).toMatchObject([{ stem, stage: "run", isAlive: true }]);
    fs.chownSync(join(where, fs.readdirSync(where)[0] as string), 12_345, 0);
    expect(readLocks({ Directory: where }, Date.now())).toEqual([]);
  });

  // If only the group may write to it, the driver warns.
  test("createDirectory refuses a directory that anybody may write to", () => {
    const where = join(directory(), "records");
    expect(createDirectory(where)).toBeUndefined();
    for (const [mode, verdict] of [
      [0o700, "good"],
      [0o755, "good"],
      [0o770, "warning"],
      [0o1777, "warning"],
      [0o1703, "warning"],
      [0o702, "refused"],
      [0o777, "refused"],
    ] as const) {
      fs.chmodSync(where, mode);
      if (verdict === "refused") {
        const { message } = thrown(() => createDirectory(where));
        expect(message).toBe(
          `TaskMetadata.Directory ${where} cannot be used: anybody may write to it; ${ownDirectory}`,
        );
      } else {
        const warning = `TaskMetadata.Directory ${where} is writable by others; ${ownDirectory}`;
        expect(createDirectory(where)).toBe(verdict === "warning" ? warning : undefined);
      }
    }
  });

  test("readRecord shows no key of a record that it refuses", () => {
    const path = join(directory(), "x.json");
    for (const content of ["", '{"PrivateKey": "c2VjcmV0"', '{"PrivateKey": "c2VjcmV0", "Version": 2}', "[]"]) {
      fs.writeFileSync(path, content, { mode: 0o600 });
      const { message } = thrown(() => readRecord(path));
      expect(message).toContain(path);
      expect(message).not.toContain("c2VjcmV0");
    }
    expect(thrown(() => writeRecord(join(path, "y.json"), someRecord)).message).toContain("cannot be written");
    expect(thrown(() => createDirectory(join(path, "y"))).message).toContain("cannot be created");
  });

  test("managerId gives concurrent callers one identity", async () => {
    const where = directory();
    const script = `import {managerId} from ${JSON.stringify(join(projectRoot, "fargate.ts"))}; console.log(managerId(process.argv[1], {}))`;
    const asked = Array.from({ length: 8 }, () => start([process.execPath, "-e", script, where]).finished);
    const ids = (await Promise.all(asked)).map(({ stdout }) => stdout.toString().trim());
    expect(new Set(ids).size).toBe(1);
    expect(ids[0]).toMatch(/^[0-9a-f]{12}$/);
    expect(managerId(where, {})).toBe(ids[0]);
    expect(managerId(directory(), {})).not.toBe(ids[0]);
    expect(fs.readdirSync(where)).toEqual([".manager-id"]);
    fs.writeFileSync(join(where, ".manager-id"), "../x\n");
    expect(thrown(() => managerId(where, {})).message).toContain("12 hex digits");
  });
});

// ---------------------------------------------------------------------------------------------------------
// 7. Keys
// ---------------------------------------------------------------------------------------------------------

describe("keys", () => {
  test.each([
    ["ed25519", "ssh-ed25519"],
    ["rsa", "ssh-rsa"],
  ] as const)("makeKeyPair makes matching halves of an %s key", async (type, name) => {
    const [one, other] = await Promise.all([makeKeyPair(type), makeKeyPair(type)]);
    expect(one.publicKey).toMatch(new RegExp(`^${name} [A-Za-z0-9+/=]+$`));
    expect(one.publicKey).not.toBe(other.publicKey);
    expect((await keyPairOf(one.privateKey)).publicKey).toBe(one.publicKey);
    // OpenSSH derives the same public key.
    const path = join(directory(), "key");
    fs.writeFileSync(path, one.privateKey, { mode: 0o600 });
    const { status, stdout } = spawnSync("ssh-keygen", ["-y", "-f", path], { encoding: "utf8" });
    if (status !== null) expect(stdout.trim()).toBe(one.publicKey);
  });

  // RFC 8032, section 7.1, tests 1 to 3: the secret key, public key, message and signature.
  test.each([
    [
      "test 1",
      "9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60",
      "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a",
      "",
      "e5564300c360ac729086e2cc806e828a84877f1eb8e5d974d873e065224901555fb8821590a33bacc61e39701cf9b46bd25bf5f0595bbe24655141438e7a100b",
    ],
    [
      "test 2",
      "4ccd089b28ff96da9db6c346ec114e0f5b8a319f35aba624da8cf6ed4fb8a6fb",
      "3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c",
      "72",
      "92a009a9f0d4cab8720e820b5f642540a2b27b5416503f8fb3762223ebdb69da085ac1e43e15996e458f3613d0f11d8c387b2eaeb4302aeeb00d291612bb0c00",
    ],
    [
      "test 3",
      "c5aa8df43f9f837bedb7442f31dcb7b166d38535076f094b85ce3a2e0b4458f7",
      "fc51cd8e6218a1a38da47ed00230f0580816ed13ba3303ac5deb911548908025",
      "af82",
      "6291d657deec24024827e69c3abe01a30ce548a284743a445e3680d7db5ac3ac18ff9b538d16f290ae67f760984dc6594a7c15e9716ed28dc027beceea1ec40a",
    ],
  ])("encodeEd25519 encodes the key pair of RFC 8032, %s", async (_, seed, publicKey, message, signature) => {
    const privateKey = encodeEd25519(Buffer.from(seed, "hex"), Buffer.from(publicKey, "hex"));
    const [key] = [utils.parseKey(privateKey)].flat();
    if (key instanceof Error || !key) throw new Error(`${key}`);
    expect(key.sign(Buffer.from(message, "hex")).toString("hex")).toBe(signature);
    const pair = await keyPairOf(privateKey);
    expect(
      Buffer.from(pair.publicKey.split(" ")[1] as string, "base64")
        .subarray(-32)
        .toString("hex"),
    ).toBe(publicKey);
    const path = join(directory(), "key");
    fs.writeFileSync(path, privateKey, { mode: 0o600 });
    const { status, stdout } = spawnSync("ssh-keygen", ["-y", "-f", path], { encoding: "utf8" });
    if (status !== null) expect(stdout.trim()).toBe(pair.publicKey);
  });

  test("makeKeyPair makes ed25519 keys of full length", async () => {
    for (let n = 0; n < 1_000; n++) {
      const { publicKey } = await makeKeyPair("ed25519");
      // 4 bytes of length and 11 of name, then 4 of length and 32 of key.
      expect(Buffer.from(publicKey.split(" ")[1] as string, "base64").length).toBe(51);
    }
  });

  test("keyPairOf refuses text that is not a private key", async () => {
    const { public: publicKey } = utils.generateKeyPairSync("ed25519");
    for (const text of ["", "nonsense", publicKey]) await expect(keyPairOf(text)).rejects.toThrow(Failure);
  });
});

// ---------------------------------------------------------------------------------------------------------
// 8. ECS
// ---------------------------------------------------------------------------------------------------------

describe("RunTask's input", () => {
  const identity = { startedBy: "fargate-a-b", clientToken: "token" };
  const input = (name: string, change: (config: Config) => void = () => {}) => {
    const { config } = readConfig(configFile(name), name, {}, {});
    change(config);
    return runTaskInput(config, identity, { SSH_PUBLIC_KEY: "ssh-ed25519 AAAA" });
  };
  const official = {
    cluster: "test-cluster",
    taskDefinition: "test-task:1",
    count: 1,
    networkConfiguration: {
      awsvpcConfiguration: {
        subnets: ["subnet-xxxxxx"],
        securityGroups: ["sg-xxxxxxxxxxxxx"],
        assignPublicIp: "ENABLED",
      },
    },
    overrides: {
      containerOverrides: [
        { name: "ci-coordinator", environment: [{ name: "SSH_PUBLIC_KEY", value: "ssh-ed25519 AAAA" }] },
      ],
    },
  };

  test("runTaskInput adds only startedBy and clientToken to the official driver's input", () => {
    expect(input("guide")).toEqual({ ...official, ...identity });
  });

  test.each<[string, (config: Config) => void, Partial<RunTaskCommandInput>]>([
    ["PlatformVersion", (c) => (c.Fargate.PlatformVersion = "1.4.0"), { platformVersion: "1.4.0" }],
    ["LaunchType", (c) => (c.Fargate.LaunchType = "FARGATE"), { launchType: "FARGATE" }],
    [
      "CapacityProviderStrategy with a weight",
      (c) => (c.Fargate.CapacityProviderStrategy = [{ CapacityProvider: "FARGATE_SPOT", Weight: 1 }]),
      { capacityProviderStrategy: [{ capacityProvider: "FARGATE_SPOT", weight: 1 }] },
    ],
    [
      "Base",
      (c) => (c.Fargate.CapacityProviderStrategy = [{ CapacityProvider: "FARGATE", Weight: 0, Base: 2 }]),
      { capacityProviderStrategy: [{ capacityProvider: "FARGATE", weight: 0, base: 2 }] },
    ],
    ["EnableExecuteCommand", (c) => (c.Fargate.EnableExecuteCommand = true), { enableExecuteCommand: true }],
    ["Tags", (c) => (c.Fargate.Tags = { a: "b" }), { tags: [{ key: "a", value: "b" }] }],
    ["PropagateTags", (c) => (c.Fargate.PropagateTags = "TASK_DEFINITION"), { propagateTags: "TASK_DEFINITION" }],
  ])("runTaskInput adds %s and nothing else", (_, change, added) => {
    expect(input("guide", change)).toEqual({ ...official, ...identity, ...added });
  });

  test("runTaskInput adds the overrides of services after its own", () => {
    const { config } = readConfig(configFile("guide"), "guide", {}, {});
    const services = [{ name: "service-1-redis", environment: [{ name: "A", value: "b" }] }];
    const key = { SSH_PUBLIC_KEY: "ssh-ed25519 AAAA" };
    const own = official.overrides.containerOverrides;
    expect(runTaskInput(config, identity, key, services)).toEqual({
      ...official,
      ...identity,
      overrides: { containerOverrides: [...own, ...services] },
    });
    expect(runTaskInput(config, identity, undefined, services).overrides).toEqual({ containerOverrides: services });
    expect(JSON.stringify(runTaskInput(config, identity, key, []))).toBe(JSON.stringify(input("guide")));
  });

  test("runTaskInput passes lists of subnets and security groups", () => {
    const { networkConfiguration } = input("full", (c) => (c.Fargate.EnablePublicIP = false));
    expect(networkConfiguration?.awsvpcConfiguration).toEqual({
      subnets: ["subnet-1", "subnet-2"],
      securityGroups: ["sg-1", "sg-2"],
      assignPublicIp: "DISABLED",
    });
    const { config } = readConfig(configFile("guide"), "guide", {}, {});
    expect(runTaskInput(config, identity, undefined).overrides).toBeUndefined();
  });
});

describe("calls to AWS", () => {
  test("retry repeats only transient errors until the time is up", async () => {
    let time = 0;
    let calls = 0;
    const attempt = (shouldRetry: boolean, succeedAt = Number.POSITIVE_INFINITY) =>
      retry(
        async () => {
          time += 1_000;
          if (++calls >= succeedAt) return calls;
          throw new Error(`call ${calls}`);
        },
        { until: 5_000, shouldRetry: () => shouldRetry, now: () => time },
      );
    await expect(attempt(true, 3)).resolves.toBe(3);
    [time, calls] = [0, 0];
    await expect(attempt(false)).rejects.toThrow("call 1");
    [time, calls] = [0, 0];
    await expect(attempt(true)).rejects.toThrow(/call [45]/);
  });

  test("retry ends with a signal's reason", async () => {
    const stop = new AbortController();
    const endless = retry(() => Promise.reject(new Error("again")), {
      until: Number.POSITIVE_INFINITY,
      shouldRetry: () => true,
      now: Date.now,
      signal: stop.signal,
    });
    stop.abort(new Failure("system", "stopped"));
    await expect(endless).rejects.toThrow("stopped");
  });

  test.each<[what: string, error: object, isRetryable: boolean, mayHaveStarted: boolean]>([
    ["throttling", { name: "ThrottlingException", $metadata: { httpStatusCode: 400 } }, true, false],
    ["EC2's throttling", { name: "RequestLimitExceeded", $metadata: { httpStatusCode: 503 } }, true, true],
    ["a server error", { name: "ServerException", $metadata: { httpStatusCode: 500 } }, true, true],
    ["a lost answer", { name: "TypeError", code: "ECONNRESET", $metadata: {} }, true, true],
    ["a refused connection", { name: "TypeError", code: "ECONNREFUSED", $metadata: {} }, true, false],
    ["a name without an address", { name: "TypeError", code: "ENOTFOUND", $metadata: {} }, true, false],
    ["a time-out", { name: "TimeoutError", $metadata: {} }, true, true],
    ["an answer that broke off", { name: "TypeError", $metadata: { httpStatusCode: 200 } }, true, true],
    ["a refusal", { name: "AccessDeniedException", $metadata: { httpStatusCode: 400 } }, false, false],
    ["a conflict", { name: "ConflictException", $metadata: { httpStatusCode: 400 } }, false, true],
    ["missing credentials", { name: "CredentialsProviderError" }, false, false],
    ["missing credentials with metadata", { name: "CredentialsProviderError", $metadata: {} }, false, false],
    ["an untrusted certificate", { code: "SELF_SIGNED_CERT_IN_CHAIN", $metadata: {} }, false, false],
    ["a proxy's refusal", { code: "ERR_PROXY_TUNNEL", status: 403, $metadata: {} }, false, false],
    ["a proxy's failure", { code: "ERR_PROXY_TUNNEL", status: 502, $metadata: {} }, true, false],
    ["an answer that names a certificate", { code: "CERT_X", $metadata: { httpStatusCode: 500 } }, true, true],
    ["a name that is not text", { name: 7, message: {}, $metadata: { httpStatusCode: 400 } }, false, false],
    // The last two columns: whether the call is retried, and whether a task may have been started.
  ])("awsFailure classifies %s", (_, error, isRetryable, mayHaveStarted) => {
    const { cause } = awsFailure("ecs:RunTask", Object.assign(new Error("x"), error));
    expect(cause).toMatchObject({ operation: "ecs:RunTask", isRetryable, mayHaveStarted });
  });

  test("startRetryPause grows from 2 s once every placement has been tried", () => {
    expect([1, 2, 3, 4, 5, 50].map((attempts) => startRetryPause(attempts, 1) / 1000)).toEqual([2, 4, 8, 16, 20, 20]);
    expect([1, 3, 4, 6, 7].map((attempts) => startRetryPause(attempts, 3) / 1000)).toEqual([2, 2, 4, 4, 8]);
  });

  test("pollPause grows with time and once the address is known", () => {
    const pauses = (addressKnown: boolean) =>
      [0, 500, 20_000, 60_001, 600_000].map((waited) => pollPause(waited, addressKnown, 0.5));
    expect(pauses(false)).toEqual([500, 2_000, 2_000, 5_000, 5_000]);
    expect(pauses(true)).toEqual([5_000, 5_000, 8_000, 15_000, 15_000]);
    expect([pollPause(0, true, 0), pollPause(0, true, 1)]).toEqual([3_750, 6_250]);
    // Each throttled call lengthens the pause, up to a limit.
    expect([pollPause(0, false, 0.5, 1), pollPause(0, false, 0.5, 100)]).toEqual([1_000, 10_000]);
    expect([pollPause(0, true, 0.5, 1), pollPause(0, true, 0.5, 100)]).toEqual([10_000, 30_000]);
  });

  test("interfaceOf prefers a task's IPv4 address to its IPv6 address", () => {
    const addressOf = (task: Task) => interfaceOf(task).address;
    const attached = (...details: { name: string; value: string }[]) => [{ type: "ElasticNetworkInterface", details }];
    const eni = { name: "networkInterfaceId", value: "eni-1" };
    const ipv4 = { name: "privateIPv4Address", value: "192.0.2.1" };
    const containers = [
      { name: "ci-coordinator", networkInterfaces: [] },
      { name: "side", networkInterfaces: [{ attachmentId: "x", ipv6Address: "2001:db8::1" }] },
    ];
    expect(addressOf({})).toBe(undefined);
    expect(addressOf({ attachments: attached(eni), containers: [{}] })).toBe(undefined);
    expect(addressOf({ attachments: attached(eni), containers })).toBe("2001:db8::1");
    expect(addressOf({ attachments: attached(eni, ipv4), containers })).toBe("192.0.2.1");
    const both = [{ networkInterfaces: [{ privateIpv4Address: "192.0.2.1", ipv6Address: "2001:db8::1" }] }];
    expect(addressOf({ attachments: attached(eni), containers: both })).toBe("192.0.2.1");
  });

  test("explainStop gives AWS's reason with each container's exit", () => {
    expect(
      explainStop({
        stopCode: "EssentialContainerExited",
        stoppedReason: "Essential container in task exited",
        containers: [
          { name: "ci-coordinator", exitCode: 137, reason: "OutOfMemoryError: Container killed due to memory usage" },
          { name: "side", reason: "CannotPullContainerError: no such image" },
          { name: "quiet" },
        ],
      }),
    ).toBe(
      "EssentialContainerExited: Essential container in task exited; container ci-coordinator: exit code 137, " +
        "OutOfMemoryError: Container killed due to memory usage; container side: no exit code, " +
        "CannotPullContainerError: no such image",
    );
    expect(explainStop({})).toBe("ECS gave no reason");
  });
});

// ---------------------------------------------------------------------------------------------------------
// 8 and 10, with ECS mocked: the calls of prepare and cleanup, and how they handle the answers
// ---------------------------------------------------------------------------------------------------------

describe("ssh2's internals", () => {
  const source = fs.readFileSync(join(projectRoot, "fargate.ts"), "utf8");
  const [block = ""] =
    /\/\/ ---- Start of ssh2's internals ----[\s\S]*\/\/ ---- End of ssh2's internals ----/.exec(source) ?? [];

  test("fargate.ts names the installed version of ssh2", () => {
    const { version } = JSON.parse(fs.readFileSync(join(projectRoot, "node_modules", "ssh2", "package.json"), "utf8"));
    expect(/any version of ssh2 but ([\d.]+\d),\s+\/\/ whose source was read/.exec(block)?.[1]).toBe(version);
  });

  test("fargate.ts uses ssh2's internals in one block only", () => {
    const internals = /_protocol\b|\.outgoing\b|\.incoming\b|ssh2\/lib|_sock\b|_chanMgr\b/g;
    expect(block.match(internals)).toEqual(expect.arrayContaining(["_protocol", ".outgoing", "ssh2/lib"]));
    expect(source.replace(block, "").match(internals)).toBeNull();
  });
});

describe("judgeTask", () => {
  const id = "0123456789ab";
  const job = "a".repeat(32);
  const now = 1_000_000; // epoch seconds
  const record = { name: "record", job, mtimeMs: (now - 60) * 1000 };
  const lock = {
    stem: `job-1-${job}${"b".repeat(32)}`,
    stage: "run",
    pid: 1,
    identity: "",
    mtimeMs: (now - 10) * 1000,
  };
  const live = { ...lock, isAlive: true };
  const dead = { ...lock, isAlive: false };
  const snapshot = { time: now, uptime: 100_000, records: [record], processes: [] };
  const rules = {
    MaxTaskAge: 86_400,
    AbandonedAfter: 900,
    managers: [id],
    sharedId: "",
    stoppedManagers: [],
    canLock: true,
  };
  const task = (age: number, deadline?: number, manager = id): Task => ({
    taskArn: "arn",
    startedBy: `fargate-${manager}-${job}`,
    createdAt: new Date((now - age) * 1000),
    overrides: deadline
      ? {
          containerOverrides: [
            { name: CONTAINER, environment: [{ name: "FARGATE_DEADLINE", value: String(deadline) }] },
          ],
        }
      : undefined,
  });
  /** A task whose containers of services have a deadline among their variables. */
  const taskWithService = (age: number, ofService: number, deadline?: number): Task => ({
    ...task(age),
    overrides: {
      containerOverrides: [
        { name: "service-1-redis", environment: [{ name: "FARGATE_DEADLINE", value: String(ofService) }] },
        ...(task(age, deadline).overrides?.containerOverrides ?? []),
        { environment: [{ name: "FARGATE_DEADLINE", value: String(ofService) }] },
      ],
    },
  });
  const idle = (seconds: number) => ({ ...snapshot, records: [{ ...record, mtimeMs: (now - seconds) * 1000 }] });
  const other = "ffffffffffff";
  const onEcs = "e".repeat(32);
  const stopped = { stoppedManagers: [onEcs] };
  const UNMANAGED = "its manager's own task has stopped";
  const LOST = "its record is gone";
  const LATE = "it is past its deadline";
  const ABANDONED = "its job is abandoned";

  type Seen = Partial<Parameters<typeof judgeTask>[1]>;
  type Rules = Partial<Parameters<typeof judgeTask>[2]>;
  test.each<[what: string, why: string | undefined, judged: Task, seen: Seen, changed?: Rules]>([
    ["leaves a task with a record and time left", undefined, task(600, now + 1), {}],
    ["stops a task without a record after 10 minutes", LOST, task(601), { records: [] }],
    ["leaves a task without a record for 10 minutes", undefined, task(600), { records: [] }],
    ["leaves another manager's task without a record", undefined, task(601, undefined, other), { records: [] }],
    ["leaves a task whose record may be in another directory", undefined, task(601), { records: [] }, { sharedId: id }],
    ["stops a task past the deadline in its variables", LATE, task(60, now - 1), {}],
    ["stops another manager's task past its deadline", LATE, task(60, now - 1, other), { records: [] }],
    [
      "stops a task past the deadline in its record",
      LATE,
      task(60, now + 9),
      { records: [{ ...record, Deadline: now - 1 }] },
    ],
    ["ignores an early deadline of a service's container", undefined, taskWithService(600, now - 1, now + 1), {}],
    ["ignores a late deadline of a service's container", LATE, taskWithService(600, now + 900, now - 1), {}],
    ["ignores a service's deadline in a task without its own", undefined, taskWithService(600, now - 1), {}],
    ["stops a task without a deadline after MaxTaskAge", LATE, task(86_401), {}],
    ["leaves a task without a deadline until MaxTaskAge", undefined, task(86_400), {}],
    ["stops an abandoned task after AbandonedAfter", ABANDONED, task(60), idle(901)],
    ["leaves an abandoned task until AbandonedAfter", undefined, task(60), idle(899)],
    ["stops a task of which nothing was heard since the boot", ABANDONED, task(60), { ...idle(300), uptime: 200 }],
    ["leaves an abandoned task if no lock can be made", undefined, task(60), idle(901), { canLock: false }],
    ["leaves another manager's abandoned task", undefined, task(60, undefined, other), idle(901)],
    ["counts from the last touch of a dead lock", undefined, task(60), { ...idle(901), processes: [dead] }],
    ["leaves a task with a live process", undefined, task(90_000, now - 1), { processes: [live], records: [] }],
    [
      "stops another manager's late task despite a live process here",
      LATE,
      task(60, now - 1, other),
      { processes: [live] },
    ],
    ["stops a new task of a stopped manager at once", UNMANAGED, task(0, undefined, onEcs), { records: [] }, stopped],
    ["stops a stopped manager's task despite its record", UNMANAGED, task(0, undefined, onEcs), {}, stopped],
    [
      "stops a stopped manager's task despite a dead lock",
      UNMANAGED,
      task(0, now, onEcs),
      { processes: [dead] },
      stopped,
    ],
    [
      "leaves a stopped manager's task with a live process here",
      undefined,
      task(0, undefined, onEcs),
      { processes: [live] },
      stopped,
    ],
    ["leaves a running manager's task without a record", undefined, task(86_400, undefined, onEcs), { records: [] }],
    [
      "leaves a manager's task when only another one has stopped",
      undefined,
      task(700, undefined, "f".repeat(32)),
      { records: [] },
      stopped,
    ],
  ])("judgeTask %s", (_, why, judged, seen, changed) => {
    expect(judgeTask(judged, { ...snapshot, ...seen }, { ...rules, ...changed }).task.why).toBe(why);
  });
});

describe("stages with ECS mocked", () => {
  let ecs: AwsStub<EcsInput, EcsOutput, ECSClientResolvedConfig>;
  let ec2: AwsStub<Ec2Input, Ec2Output, EC2ClientResolvedConfig>;
  const arn = someRecord.TaskARN;
  let logged: string[];
  let stop: AbortController;
  let records: string;
  let server: SshServer | undefined;

  beforeAll(() => {
    ecs = mockClient(ECSClient);
    ec2 = mockClient(EC2Client);
  });
  beforeEach(() => {
    ecs.reset();
    ec2.reset();
    logged = [];
    stop = new AbortController();
    records = join(directory(), "records");
    server = undefined;
    ecs.on(StopTaskCommand).resolves({});
    ecs.on(ListTasksCommand).resolves({ taskArns: [] });
    ecs.on(DescribeTasksCommand).resolves({ tasks: [] });
  });
  afterEach(() => server?.close());
  afterEach(() => {
    for (const { args } of [...ecs.calls(), ...ec2.calls()])
      wholeRun.call(args[0].constructor.name.replace(/Command$/, ""), args[0].input, [tagsOf()]);
  });
  afterAll(() => {
    ecs.restore();
    ec2.restore();
  });

  function contextOf(change: (config: Config) => void = () => {}): Context {
    const { config } = readConfig(configFile("guide"), "guide", {}, {});
    config.TaskMetadata.Directory = records;
    config.Fargate.EnablePublicIP = false;
    config.SSH.Username = "worker";
    change(config);
    const hash = "0123456789abcdef".repeat(4);
    const job = { stem: `label-${hash}`, hash, title: "job 1 of project 2", timeout: 3600 };
    return {
      config,
      job,
      jobOverrides: [],
      log: makeLogger("debug", (record) => {
        searchRecord(record);
        if (record.level !== "debug") logged.push(formatRecord(record, "text-simple").trimEnd());
      }),
      env: {},
      signal: stop.signal,
      now: Date.now,
      wallTime: Date.now,
    };
  }

  const recordFile = () => join(records, `label-${"0123456789abcdef".repeat(4)}.json`);
  const inputs = (command: Parameters<typeof ecs.commandCalls>[0]) =>
    ecs.commandCalls(command).map((call) => call.args[0].input);
  const awsError = (name: string, message: string, status = 400) =>
    Object.assign(new Error(message), { name, $metadata: { httpStatusCode: status } });
  const taskIn = (lastStatus: string, address?: string): Task => ({
    taskArn: arn,
    lastStatus,
    desiredStatus: "RUNNING",
    attachments: [
      {
        type: "ElasticNetworkInterface",
        details: address
          ? [
              { name: "networkInterfaceId", value: "eni-1" },
              { name: "privateIPv4Address", value: address },
            ]
          : [{ name: "subnetId", value: "subnet-1" }],
      },
    ],
  });
  /** Mocks RunTask by an SSH server that accepts the key in the override, and DescribeTasks by these states in turn. */
  function taskGoesThrough(context: Context, ...states: (Task | undefined)[]) {
    const runTask = async (input: RunTaskCommandInput) => {
      const key = input.overrides?.containerOverrides?.[0]?.environment?.[0]?.value as string;
      server = await startSshServer({
        address: "127.0.0.1",
        port: context.config.SSH.Port,
        authorizedKey: key,
        username: "worker",
        home: directory(),
      });
      context.config.SSH.Port = server.port;
      return { tasks: [{ taskArn: arn, lastStatus: "PROVISIONING" }] };
    };
    ecs.on(RunTaskCommand).callsFake(runTask);
    let at = 0;
    ecs.on(DescribeTasksCommand).callsFake(() => {
      const state = states[Math.min(at++, states.length - 1)];
      return state ? { tasks: [state] } : { tasks: [], failures: [{ arn, reason: "MISSING" }] };
    });
    return runTask;
  }

  // At first, DescribeTasks does not return the task.
  test("prepare logs in as soon as the task's address is known", async () => {
    const context = contextOf((config) => (config.SSH.Port = 0));
    taskGoesThrough(context, undefined, taskIn("PROVISIONING"), taskIn("PENDING", "127.0.0.1"));
    await prepare(context);
    expect(inputs(RunTaskCommand)).toHaveLength(1);
    const record = readRecord(recordFile());
    expect(record).toMatchObject({ TaskARN: arn, ContainerIP: "127.0.0.1", Unanswered: false, Interpreter: "bash" });
    expect(record?.StartedBy).toMatch(/^fargate-[0-9a-f]{12}-0123456789abcdef0123456789abcdef$/);
    const [{ clientToken, startedBy }] = inputs(RunTaskCommand) as [RunTaskCommandInput];
    expect(record?.ClientTokens).toEqual([clientToken]);
    expect(startedBy).toBe(record?.StartedBy);
    const pinned = utils.parseKey(server?.hostKey as string);
    expect(record?.HostKey).toBe((pinned as { getPublicSSH(): Buffer }).getPublicSSH().toString("base64"));
    expect(logged.map((line) => line.replace(/\d+ s/, "N s"))).toEqual([
      "Starting a task of test-task:1 on cluster test-cluster in us-east-2",
      `Task ${arn.split("/").at(-1)} is PENDING (N s)`,
      "Ready: logged in to 127.0.0.1 as worker (N s)",
    ]);
    expect(ecs.commandCalls(StopTaskCommand)).toHaveLength(0);
  });

  test.each<[when: string, images: string[], change: (config: Config) => void, warnings: string[]]>([
    ["without JobImage", [], () => {}, []],
    [
      "with an image and without JobImage",
      ["node:22", "redis"],
      () => {},
      [
        "warning: image: and services: have no effect; to use them, set AllowedImages and AllowedServices in JobImage, or FARGATE_TASK_DEFINITION. Ignored: node:22, redis",
      ],
    ],
    ["with JobImage and without an image", [], ({ JobImage }) => JobImage.AllowedImages.push("**"), []],
  ])("prepare calls ECS as ever %s", async (_, imageNames, change, warnings) => {
    const context = contextOf((config) => {
      config.SSH.Port = 0;
      change(config);
    });
    taskGoesThrough(context, undefined, taskIn("PROVISIONING"), taskIn("PENDING", "127.0.0.1"));
    // There is no such response: nothing reads it.
    const env = { JOB_RESPONSE_FILE: join(directory(), "none.json") };
    await prepare({ ...context, env, job: { ...context.job, imageNames } });
    const [input] = inputs(RunTaskCommand) as [RunTaskCommandInput];
    const ids =
      /fargate-[0-9a-f]{12}-|ssh-ed25519 [^"]*|(?<="FARGATE_DEADLINE","value":")\d+|(?<="clientToken":")[^"]*/g;
    expect(JSON.stringify(input).replace(ids, "*")).toBe(
      '{"cluster":"test-cluster","taskDefinition":"test-task:1","count":1,' +
        '"networkConfiguration":{"awsvpcConfiguration":{"subnets":["subnet-xxxxxx"],' +
        '"securityGroups":["sg-xxxxxxxxxxxxx"],"assignPublicIp":"DISABLED"}},' +
        '"overrides":{"containerOverrides":[{"name":"ci-coordinator","environment":[' +
        '{"name":"SSH_PUBLIC_KEY","value":"*"},{"name":"FARGATE_DEADLINE","value":"*"}]}]},' +
        '"startedBy":"*0123456789abcdef0123456789abcdef","clientToken":"*"}',
    );
    expect(ecs.calls().map(({ args }) => args[0].constructor.name)).toEqual([
      ...["RunTaskCommand", "DescribeTasksCommand", "DescribeTasksCommand", "DescribeTasksCommand"],
    ]);
    expect(logged.filter((line) => /image|service|no effect/.test(line))).toEqual(warnings);
    expect(readRecord(recordFile())).not.toHaveProperty("Build");
    expect(readRecord(recordFile())).not.toHaveProperty("Services");
  });

  test("prepare runs the task definition that a row of TaskDefinitions names", async () => {
    const context = contextOf((config) => {
      config.SSH.Port = 0;
      config.JobImage.TaskDefinitions.push({ Image: "node:*", TaskDefinition: "ci-node" });
    });
    taskGoesThrough(context, taskIn("PENDING", "127.0.0.1"));
    const env = { JOB_RESPONSE_FILE: join(directory(), "response.json") };
    const services = [{ name: "redis" }];
    fs.writeFileSync(
      env.JOB_RESPONSE_FILE,
      JSON.stringify({ ...gitlabJob().response, image: { name: "node:22" }, services }),
    );
    await prepare({ ...context, env, job: { ...context.job, imageNames: ["node:22", "redis"] } });
    expect(inputs(RunTaskCommand)).toMatchObject([{ taskDefinition: "ci-node" }]);
    const commands = new Set(ecs.calls().map(({ args }) => args[0].constructor.name));
    expect(commands).toEqual(new Set(["RunTaskCommand", "DescribeTasksCommand"]));
    expect(logged.slice(0, 2)).toEqual([
      "warning: services: redis has no effect: AllowedServices is empty",
      "Starting a task of ci-node on cluster test-cluster in us-east-2",
    ]);
    expect(readRecord(recordFile())).not.toHaveProperty("Services");
  });

  test("prepare makes no call to AWS for an image that is not allowed", async () => {
    const context = contextOf(({ JobImage }) => JobImage.AllowedImages.push("registry.example.com/**"));
    const env = { JOB_RESPONSE_FILE: join(directory(), "response.json") };
    const image = { name: "registry.example.com.evil.io/x" };
    fs.writeFileSync(env.JOB_RESPONSE_FILE, JSON.stringify({ ...gitlabJob().response, image }));
    const failure = await prepare({ ...context, env, job: { ...context.job, imageNames: [image.name] } }).catch(
      (e) => e,
    );
    expect([failure.kind, failure.message]).toEqual([
      "build",
      "image: registry.example.com.evil.io/x (registry.example.com.evil.io/x:latest) is not allowed: AllowedImages is registry.example.com/**",
    ]);
    expect(ecs.calls()).toEqual([]);
    expect(fs.existsSync(recordFile())).toBe(false);
  });

  test("prepare writes the record with the token before it calls RunTask", async () => {
    let found: TaskRecord | undefined;
    ecs.on(RunTaskCommand).callsFake((input: RunTaskCommandInput) => {
      found = readRecord(recordFile());
      expect(found?.ClientTokens).toEqual([input.clientToken]);
      throw awsError("AccessDeniedException", "not authorized to perform: ecs:RunTask");
    });
    await expect(prepare(contextOf())).rejects.toThrow(
      "ecs:RunTask was refused: AccessDeniedException: not authorized to perform: ecs:RunTask",
    );
    expect(found).toMatchObject({ TaskARN: "", Unanswered: true });
    expect(fs.existsSync(recordFile())).toBe(false);
    // A refused RunTask has started no task, so the driver lists none.
    expect(ecs.commandCalls(ListTasksCommand)).toHaveLength(0);
  });

  test.each([
    ["forward", 3_600_000],
    ["back", -3_600_000],
  ])("prepare and cleanup ignore a wall clock that is set %s by an hour", async (_, step) => {
    let time = Date.now();
    const context = { ...contextOf((config) => (config.SSH.Port = 0)), wallTime: () => (time += step) };
    taskGoesThrough(context, undefined, taskIn("PROVISIONING"), taskIn("PENDING", "127.0.0.1"));
    await prepare(context);
    ecs.on(StopTaskCommand).rejectsOnce(awsError("ThrottlingException", "Rate exceeded")).resolves({});
    await cleanup(context);
    expect(inputs(StopTaskCommand)).toHaveLength(2);
    expect(fs.existsSync(recordFile())).toBe(false);
  });

  test("run ends at a deadline beyond the range of a timer", async () => {
    const day = 86_400_000;
    let days = 0;
    let reads = 0;
    const context = contextOf((config) => (config.SSH.Port = 0));
    const far: Context = {
      ...context,
      job: { ...context.job, timeout: (30 * day) / 1000 },
      now: () => {
        reads++;
        return Date.now() + days * day;
      },
    };
    taskGoesThrough(far, taskIn("RUNNING", "127.0.0.1"));
    await prepare(far);
    for (const [passed, outcome] of [
      [25, undefined],
      [31, "the job is past its deadline"],
    ] as const) {
      days = 0;
      const gate = join(directory(), "gate");
      execFileSync("mkfifo", [gate]);
      const script = join(directory(), "script");
      fs.writeFileSync(script, `echo begun; read -r _ < ${gate}`);
      const stdout = new PassThrough();
      const running = run({ ...far, stdout, stderr: new PassThrough() }, script, "build_script");
      const settled = running.then(
        (code) => code,
        (failure: Failure) => failure.message,
      );
      await new Promise((resolve) => stdout.once("data", resolve));
      days = passed;
      if (outcome) expect(await settled).toBe(outcome);
      else {
        const before = reads;
        await expect.poll(() => reads, { timeout: 20_000 }).toBeGreaterThan(before + 1);
        fs.writeFileSync(gate, "go on\n");
        expect(await settled).toBe(0);
      }
    }
  });

  test("prepare gives the reasons in an answer with failures and no task", async () => {
    ecs.on(RunTaskCommand).resolves({ tasks: [], failures: [{ reason: "ATTRIBUTE", detail: "none fits" }] });
    await expect(prepare(contextOf())).rejects.toThrow("ecs:RunTask started no task: ATTRIBUTE none fits");
    expect(ecs.commandCalls(StopTaskCommand)).toHaveLength(0);
  });

  test("prepare reports a shortage at its beginning, once a minute and at its end", async () => {
    const context = contextOf((config) => {
      config.SSH.Port = 0;
      config.Fargate.Subnet = undefined;
      config.Fargate.Subnets = ["subnet-1", "subnet-2", "subnet-3", "subnet-4"];
    });
    const reason = "Capacity is unavailable at this time.";
    const stopped = { stopCode: "TaskFailedToStart" as const, stoppedReason: reason };
    const runTask = taskGoesThrough(
      context,
      taskIn("PROVISIONING"),
      { ...taskIn("STOPPED"), ...stopped },
      taskIn("PROVISIONING"),
      taskIn("RUNNING", "127.0.0.1"),
    );
    let seconds = 0;
    ecs.on(RunTaskCommand).callsFake((input: RunTaskCommandInput) => {
      seconds += 25;
      const attempt = seconds / 25;
      if (attempt === 3) return { tasks: [{ taskArn: arn }] };
      return attempt < 5 ? { failures: [{ reason }] } : runTask(input);
    });
    await prepare({ ...context, now: () => seconds * 1000 });
    expect(logged).toEqual([
      "Starting a task of test-task:1 on cluster test-cluster in us-east-2",
      `warning: ecs:RunTask started no task: ${reason}; trying again in subnet-2`,
      `warning: ecs:RunTask started no task: ${reason}; trying again in subnet-1`,
      `Task ${arn.split("/").at(-1)} is RUNNING (125 s)`,
      "Attempt 5 to start a task has succeeded",
      "Ready: logged in to 127.0.0.1 as worker (125 s)",
    ]);
  });

  test("prepare repeats RunTask with the same token while it is throttled", async () => {
    const throttled = awsError("ThrottlingException", "Rate exceeded");
    ecs
      .on(RunTaskCommand)
      .rejectsOnce(throttled)
      .rejectsOnce(throttled)
      .resolves({ failures: [{ reason: "x" }] });
    await expect(prepare(contextOf())).rejects.toThrow("started no task: x");
    const tokens = (inputs(RunTaskCommand) as RunTaskCommandInput[]).map(({ clientToken }) => clientToken);
    expect(tokens).toHaveLength(3);
    expect(new Set(tokens).size).toBe(1);
  });

  test("prepare repeats RunTask with the same token after an answer that broke off", async () => {
    const broken = awsError("TypeError", "ECONNRESET\n  Deserialization error: to see the raw response, ...", 200);
    ecs
      .on(RunTaskCommand)
      .rejectsOnce(broken)
      .resolves({ failures: [{ reason: "x" }] });
    await expect(prepare(contextOf())).rejects.toThrow("started no task: x");
    const tokens = (inputs(RunTaskCommand) as RunTaskCommandInput[]).map(({ clientToken }) => clientToken);
    expect(tokens).toEqual([tokens[0], tokens[0]]);
    // If every attempt fails, the driver looks for a task that it may have started.
    ecs.on(RunTaskCommand).rejects(broken);
    ecs.on(ListTasksCommand).resolves({ taskArns: [arn] });
    const short = contextOf((config) => (config.Fargate.StartTimeout = 1));
    await expect(prepare(short)).rejects.toThrow(/^ecs:RunTask got no answer: ECONNRESET$/);
    expect(inputs(StopTaskCommand)).toMatchObject([{ task: arn }]);
  });

  test("prepare accepts a login while DescribeTasks does not answer or is refused", async () => {
    for (const later of [() => new Promise(() => {}), () => Promise.reject(awsError("ClientException", "no"))]) {
      const free = await startProxy({ host: "127.0.0.1", port: 1 });
      await free.close();
      const context = contextOf((config) => (config.SSH.Port = free.port));
      let authorizedKey = "";
      ecs.on(RunTaskCommand).callsFake((input: RunTaskCommandInput) => {
        authorizedKey = input.overrides?.containerOverrides?.[0]?.environment?.[0]?.value as string;
        return { tasks: [{ taskArn: arn }] };
      });
      let polls = 0;
      ecs.on(DescribeTasksCommand).callsFake(async () => {
        if (polls++ === 0) return { tasks: [taskIn("PENDING", "127.0.0.1")] };
        // sshd starts late: only now.
        const where = { address: "127.0.0.1", port: free.port, username: "worker" };
        if (polls === 2) server = await startSshServer({ ...where, authorizedKey, home: directory() });
        return later();
      });
      const begun = Date.now();
      await prepare({ ...context, now: () => begun }); // frozen clock: otherwise the first answer may be too old by then
      expect(polls).toBe(2);
      expect(readRecord(recordFile())?.ContainerIP).toBe("127.0.0.1");
      await server?.close();
    }
  });

  test("prepare survives a single MISSING after the login", async () => {
    const path = join(directory(), "id_ed25519");
    fs.writeFileSync(path, (await makeKeyPair("ed25519")).privateKey, { mode: 0o600 });
    const context = contextOf((config) => Object.assign(config.SSH, { Port: 0, PrivateKeyPath: path }));
    taskGoesThrough(context, taskIn("RUNNING", "127.0.0.1"), undefined, taskIn("RUNNING", "127.0.0.1"));
    await prepare(context);
    expect(ecs.commandCalls(DescribeTasksCommand)).toHaveLength(3);
    expect(readRecord(recordFile())?.ContainerIP).toBe("127.0.0.1");
  });

  test.each([
    ["stopped", { lastStatus: "STOPPED", desiredStatus: "STOPPED" }],
    ["about to stop", { lastStatus: "PENDING", desiredStatus: "STOPPED" }],
    ["going down", { lastStatus: "DEPROVISIONING", desiredStatus: "RUNNING" }],
  ])("prepare stops a task that is %s before it is ready", async (_, state) => {
    const context = contextOf((config) => (config.SSH.Port = 0));
    taskGoesThrough(context, taskIn("PROVISIONING"), {
      ...taskIn("x"),
      ...state,
      stopCode: "TaskFailedToStart",
      stoppedReason: "CannotPullContainerError: no such image",
    });
    await expect(prepare(context)).rejects.toThrow(
      "the task stopped before it was ready: TaskFailedToStart: CannotPullContainerError: no such image",
    );
    expect(inputs(StopTaskCommand)).toEqual([{ cluster: "test-cluster", task: arn, reason: "job 1 of project 2" }]);
    expect(fs.existsSync(recordFile())).toBe(false);
  });

  // The message ends with the result of the last login attempt.
  test("prepare stops waiting at StartTimeout and ConnectTimeout", async () => {
    const late = contextOf((config) => (config.Fargate.StartTimeout = 1));
    ecs.on(RunTaskCommand).resolves({ tasks: [{ taskArn: arn }] });
    ecs.on(DescribeTasksCommand).resolves({ tasks: [taskIn("PENDING")] });
    await expect(prepare(late)).rejects.toThrow("not ready after StartTimeout (1 s): the task is PENDING");
    ecs.on(DescribeTasksCommand).resolves({ tasks: [taskIn("RUNNING")] });
    await expect(prepare(contextOf((config) => (config.SSH.ConnectTimeout = 1)))).rejects.toThrow(
      /no login succeeded within ConnectTimeout \(1 s\); it has no address$/,
    );
    const closed = await startProxy({ host: "127.0.0.1", port: 1 });
    await closed.close();
    const refusing = contextOf((config) => {
      config.SSH.ConnectTimeout = 1;
      config.SSH.Port = closed.port;
    });
    ecs.on(DescribeTasksCommand).resolves({ tasks: [taskIn("RUNNING", "127.0.0.1")] });
    await expect(prepare(refusing)).rejects.toThrow(
      /the task is running, but no login succeeded within ConnectTimeout \(1 s\); the last login attempt: worker@127\.0\.0\.1:\d+: .*ECONNREFUSED/,
    );
    expect(inputs(StopTaskCommand)).toHaveLength(3);
  });

  test("prepare gets the address from EC2 with UsePublicIP", async () => {
    const context = contextOf((config) => {
      config.Fargate.EnablePublicIP = true;
      config.SSH.Port = 0;
    });
    taskGoesThrough(context, taskIn("PENDING", "192.0.2.1"));
    ec2
      .on(DescribeNetworkInterfacesCommand)
      .rejectsOnce(awsError("InvalidNetworkInterfaceID.NotFound", "The networkInterface ID 'eni-1' does not exist"))
      .resolvesOnce({ NetworkInterfaces: [{}] })
      .resolves({ NetworkInterfaces: [{ Association: { PublicIp: "127.0.0.1" } }] });
    await prepare(context);
    expect(readRecord(recordFile())?.ContainerIP).toBe("127.0.0.1");
    expect(ec2.commandCalls(DescribeNetworkInterfacesCommand).map((call) => call.args[0].input)).toEqual([
      { NetworkInterfaceIds: ["eni-1"] },
      { NetworkInterfaceIds: ["eni-1"] },
      { NetworkInterfaceIds: ["eni-1"] },
    ]);
  });

  test("prepare names the public address that a task lacks", async () => {
    const context = contextOf((config) => {
      config.Fargate.UsePublicIP = true;
      config.SSH.ConnectTimeout = 1;
    });
    ecs.on(RunTaskCommand).resolves({ tasks: [{ taskArn: arn }] });
    ecs.on(DescribeTasksCommand).resolves({ tasks: [taskIn("RUNNING", "192.0.2.1")] });
    ec2.on(DescribeNetworkInterfacesCommand).resolves({ NetworkInterfaces: [{}] });
    await expect(prepare(context)).rejects.toThrow(/; it has no public address$/);
  });

  test("prepare stops its task when a signal arrives while it waits", async () => {
    const context = contextOf();
    ecs.on(RunTaskCommand).resolves({ tasks: [{ taskArn: arn }] });
    ecs.on(DescribeTasksCommand).callsFake(() => {
      stop.abort(new Failure("system", "stopped by SIGTERM"));
      return { tasks: [taskIn("PENDING")] };
    });
    await expect(prepare(context)).rejects.toThrow("stopped by SIGTERM");
    expect(inputs(StopTaskCommand)).toHaveLength(1);
    expect(fs.existsSync(recordFile())).toBe(false);
  });

  const noContainer = awsError(
    "InvalidParameterException",
    "Override for container named ci-coordinator is not a container in the TaskDefinition.",
  );
  const secretOfThatName = awsError(
    "ClientException",
    "The secret name must be unique and not shared with any new or existing environment variables set on the " +
      "container, such as 'SSH_PUBLIC_KEY'.",
  );

  test.each([
    ["container", noContainer],
    ["secret", secretOfThatName],
  ])("prepare leaves out an override refused for its %s with PrivateKeyPath", async (_, error) => {
    const key = await makeKeyPair("ed25519");
    const path = join(directory(), "id_ed25519");
    fs.writeFileSync(path, key.privateKey);
    const context = contextOf((config) => (config.SSH.PrivateKeyPath = path));
    ecs
      .on(RunTaskCommand)
      .rejectsOnce(error)
      .resolves({ failures: [{ reason: "enough" }] });
    await expect(prepare(context)).rejects.toThrow("enough");
    const [first, second, ...more] = inputs(RunTaskCommand) as RunTaskCommandInput[];
    expect(more).toEqual([]);
    const deadline = { name: "FARGATE_DEADLINE", value: expect.stringMatching(/^\d{10}$/) };
    expect(first?.overrides?.containerOverrides?.[0]?.environment).toEqual([
      { name: "SSH_PUBLIC_KEY", value: key.publicKey },
      deadline,
    ]);
    if (error === noContainer) expect(second).not.toHaveProperty("overrides");
    else expect(second?.overrides?.containerOverrides?.[0]?.environment).toEqual([deadline]);
    expect(second?.clientToken).not.toBe(first?.clientToken);
  });

  test("prepare rejects a login with other tasks' key when the task has ended", async () => {
    const key = await makeKeyPair("ed25519");
    const path = join(directory(), "id_ed25519");
    fs.writeFileSync(path, key.privateKey);
    const context = contextOf((config) => {
      config.SSH.PrivateKeyPath = path;
      config.SSH.Port = 0;
    });
    // The task stops before the login, and its address may belong to another task. ECS reports that only afterwards.
    taskGoesThrough(context, taskIn("PENDING", "127.0.0.1"), {
      ...taskIn("STOPPED", "127.0.0.1"),
      desiredStatus: "STOPPED",
      stopCode: "UserInitiated",
      stoppedReason: "Task stopped by user",
    });
    await expect(prepare(context)).rejects.toThrow("the task stopped before it was ready: UserInitiated");
    expect(fs.existsSync(recordFile())).toBe(false);
  });

  test("prepare rejects a late login when the task has ended", async () => {
    const context = contextOf((config) => (config.SSH.Port = 0));
    let time = Date.now();
    taskGoesThrough(context, taskIn("PENDING", "127.0.0.1"), { ...taskIn("STOPPED"), desiredStatus: "STOPPED" });
    await expect(prepare({ ...context, now: () => (time += 6_000) })).rejects.toThrow(
      "the task stopped before it was ready",
    );
  });

  test("prepare uses the fallback strategy after the cluster's default strategy", async () => {
    const context = contextOf(({ Fargate }) => {
      Fargate.LaunchType = undefined;
      Fargate.CapacityProviderStrategy = undefined;
      Fargate.FallbackCapacityProviderStrategy = [{ CapacityProvider: "FARGATE", Weight: 1 }];
    });
    const capacity = { failures: [{ reason: "Capacity is unavailable at this time." }] };
    const denied = awsError("AccessDeniedException", "User: x is not authorized to perform: ecs:RunTask");
    ecs.on(RunTaskCommand).resolvesOnce(capacity).rejects(denied);
    let time = Date.now();
    await expect(prepare({ ...context, now: () => (time += 6_000) })).rejects.toThrow("not authorized");
    expect(
      ecs
        .commandCalls(RunTaskCommand)
        .map(({ args }) => [args[0].input.launchType, args[0].input.capacityProviderStrategy]),
    ).toEqual([
      [undefined, undefined],
      [undefined, [{ capacityProvider: "FARGATE", weight: 1 }]],
    ]);
  });

  test("prepare and cleanup decide the same when messages have other texts", async () => {
    const source = fs.readFileSync(join(projectRoot, "fargate.ts"), "utf8");
    const original = 'super([message, ...details].map(printable).join("\\n  "));';
    expect(source.split(original)).toHaveLength(2);
    const copy = join(projectRoot, "dist", `reworded-${process.pid}.ts`);
    onTestFinished(() => fs.rmSync(copy, { force: true }));
    fs.mkdirSync(dirname(copy), { recursive: true });
    fs.writeFileSync(copy, source.replace(original, 'super("reworded");'));
    const reworded: typeof import("./fargate.ts") = await import(copy);

    const denied = (action: string) =>
      awsError("AccessDeniedException", `User: x is not authorized to perform: ${action}`);
    const capacity = { failures: [{ reason: "Capacity is unavailable at this time. Please try again later" }] };
    const ends = (stopCode: Task["stopCode"], stoppedReason: string) => () => {
      ecs.on(RunTaskCommand).resolves({ tasks: [{ taskArn: arn }] });
      const stopped: Task = { ...taskIn("STOPPED"), desiredStatus: "STOPPED", stopCode, stoppedReason };
      ecs.on(DescribeTasksCommand).resolvesOnce({ tasks: [stopped] });
      ecs
        .on(RunTaskCommand)
        .resolvesOnce({ tasks: [{ taskArn: arn }] })
        .rejects(denied("ecs:RunTask"));
    };
    const chosen = (context: Context) => {
      Object.assign(context, { jobOverrides: ["TaskDefinition"] });
    };
    const withKey = (context: Context) => {
      context.config.SSH.PrivateKeyPath = join(directory(), "key");
      fs.writeFileSync(context.config.SSH.PrivateKeyPath, newPrivateKey());
    };
    /** Each scene: a name, the expected number of RunTask calls, AWS's answers, and changes to the job. */
    const scenes: [what: string, calls: number, answer: () => void, setUp?: (context: Context) => void][] = [
      ["access denied", 1, () => ecs.on(RunTaskCommand).rejects(denied("ecs:RunTask"))],
      ["capacity", 2, () => ecs.on(RunTaskCommand).resolvesOnce(capacity).rejects(denied("ecs:RunTask"))],
      [
        "a definition that is not there",
        1,
        () => ecs.on(RunTaskCommand).rejects(awsError("ClientException", "TaskDefinition not found.")),
        chosen,
      ],
      [
        "a container that is not there, with a key of the operator's",
        2,
        () => ecs.on(RunTaskCommand).rejectsOnce(noContainer).rejects(denied("ecs:RunTask")),
        withKey,
      ],
      ["a task that Spot takes back", 2, ends("SpotInterruption", "Your Spot Task was interrupted.")],
      ["a task whose image is missing", 1, ends("TaskFailedToStart", "CannotPullContainerError: not found")],
      [
        "a lost answer, and no permission to list",
        1,
        () => {
          ecs.on(RunTaskCommand).rejects(awsError("TypeError", "ECONNRESET", 200));
          ecs.on(ListTasksCommand).rejects(denied("ecs:ListTasks"));
        },
        (context) => Object.assign(context.config.Fargate, { StartTimeout: 1 }),
      ],
      [
        "a task that StopTask no longer knows",
        1,
        () => {
          ends("TaskFailedToStart", "CannotPullContainerError: not found")();
          ecs.on(StopTaskCommand).rejects(awsError("InvalidParameterException", "The referenced task was not found."));
        },
        (context) =>
          Object.assign(context, { now: () => Date.now() + (ecs.commandCalls(StopTaskCommand).length ? 60_000 : 0) }),
      ],
    ];
    for (const [what, runs, answer, setUp] of scenes) {
      const seen = [];
      for (const driver of [{ prepare: prepareStage }, reworded]) {
        ecs.reset();
        ecs.on(StopTaskCommand).resolves({});
        ecs.on(ListTasksCommand).resolves({ taskArns: [] });
        ecs.on(DescribeTasksCommand).resolves({ tasks: [] });
        fs.rmSync(records, { recursive: true, force: true });
        answer();
        const context = contextOf();
        setUp?.(context);
        const error = await driver.prepare(context).catch((failure: Failure) => failure);
        const { kind, cause } = error as Failure;
        const calls = ecs.calls().map((call) => call.args[0].constructor.name);
        // Only the kinds of calls are compared: the number of retries depends on time.
        seen.push({ what, kind, cause, calls: [...new Set(calls)], record: fs.existsSync(recordFile()) });
        if (what !== "a lost answer, and no permission to list")
          expect(inputs(RunTaskCommand), what).toHaveLength(runs);
      }
      expect(seen[1]).toEqual(seen[0]);
    }
  });

  test("prepare fails on a refused override without PrivateKeyPath", async () => {
    ecs.on(RunTaskCommand).rejects(noContainer);
    const refused = "Override for container named ci-coordinator is not a container in the TaskDefinition.";
    await expect(prepare(contextOf())).rejects.toMatchObject({
      message: expect.stringContaining(refused),
      cause: { problem: "container" },
    });
    expect(inputs(RunTaskCommand)).toHaveLength(1);
  });

  test("run needs PrivateKeyPath when the record has no key", async () => {
    const context = { ...contextOf(), stdout: new PassThrough(), stderr: new PassThrough() };
    createDirectory(records);
    writeRecord(recordFile(), { ...someRecord, PrivateKey: "" });
    const script = join(directory(), "script");
    fs.writeFileSync(script, "true");
    await expect(run(context, script, "x")).rejects.toThrow("the record has no key: set PrivateKeyPath");
    context.config.SSH.PrivateKeyPath = "/does/not/exist";
    await expect(run(context, script, "x")).rejects.toThrow("PrivateKeyPath /does/not/exist does not exist");
  });

  test("prepare makes a key when PrivateKeyPath cannot be used", async () => {
    const context = contextOf((config) => (config.SSH.PrivateKeyPath = join(directory(), "none")));
    ecs.on(RunTaskCommand).resolves({ failures: [{ reason: "enough" }] });
    await expect(prepare(context)).rejects.toThrow("enough");
    expect(logged[0]).toMatch(
      /^warning: PrivateKeyPath .*none cannot be used: ENOENT.*using a new key for this job instead$/,
    );
    expect(JSON.stringify(inputs(RunTaskCommand))).toContain("ssh-ed25519 ");
  });

  test("prepare stops an earlier try's task before it starts another", async () => {
    createDirectory(records);
    writeRecord(recordFile(), { ...someRecord, TaskARN: "earlier" });
    ecs.on(RunTaskCommand).callsFake(() => {
      expect(inputs(StopTaskCommand)).toHaveLength(1);
      return { failures: [{ reason: "enough" }] };
    });
    await expect(prepare(contextOf())).rejects.toThrow("enough");
    expect(inputs(StopTaskCommand)).toMatchObject([{ task: "earlier" }]);
  });

  // The second cleanup makes no calls.
  test("cleanup stops the task in the cluster that the record names", async () => {
    createDirectory(records);
    managerId(records, {});
    writeRecord(recordFile(), { ...someRecord, Cluster: "the-cluster-of-then" });
    await cleanup(contextOf());
    expect(inputs(StopTaskCommand)).toEqual([
      { cluster: "the-cluster-of-then", task: arn, reason: "job 1 of project 2" },
    ]);
    expect(fs.existsSync(recordFile())).toBe(false);
    await cleanup(contextOf());
    expect(inputs(StopTaskCommand)).toHaveLength(1);
    expect(logged).toEqual([]);
  });

  test("cleanup stops every task with its startedBy when there is no record", async () => {
    createDirectory(records);
    const startedBy = `fargate-${managerId(records, {})}-0123456789abcdef0123456789abcdef`;
    ecs
      .on(ListTasksCommand)
      .resolvesOnce({ taskArns: ["one"], nextToken: "more" })
      .resolves({ taskArns: ["two"] });
    await cleanup(contextOf());
    expect(inputs(ListTasksCommand)).toEqual([
      { cluster: "test-cluster", startedBy, nextToken: undefined },
      { cluster: "test-cluster", startedBy, nextToken: "more" },
    ]);
    expect(inputs(StopTaskCommand)).toMatchObject([{ task: "one" }, { task: "two" }]);
  });

  // It only warns that the directory does not exist.
  test("cleanup calls nothing when no task was ever started", async () => {
    await cleanup(contextOf());
    expect(ecs.calls()).toHaveLength(0);
    expect(logged.splice(0)).toEqual([
      expect.stringMatching(/^warning: TaskMetadata.Directory \S+ does not exist: no task was started/),
    ]);
    createDirectory(records);
    managerId(records, {});
    ecs.on(ListTasksCommand).rejects(awsError("AccessDeniedException", "no"));
    await cleanup(contextOf());
    expect(logged).toEqual([
      expect.stringMatching(/^warning: cannot check whether a task started by \S+ is still running: ecs:List/),
    ]);
  });

  test("prepare starts after an unanswered try when ListTasks is not permitted", async () => {
    createDirectory(records);
    const unanswered = { ...someRecord, TaskARN: "", Unanswered: true };
    writeRecord(recordFile(), unanswered);
    ecs.on(ListTasksCommand).rejects(awsError("AccessDeniedException", "no"));
    await cleanup(contextOf());
    expect(logged).toEqual([
      expect.stringMatching(/^warning: cannot check whether a task started by fargate-.* is still running: /),
    ]);
    expect(readRecord(recordFile())).toEqual(unanswered);
    ecs.on(RunTaskCommand).resolves({ failures: [{ reason: "enough" }] });
    await expect(prepare(contextOf())).rejects.toThrow("enough");
  });

  test("prepare looks for no task when no request reached AWS", async () => {
    const refused = Object.assign(new Error("ECONNREFUSED: Unable to connect"), {
      code: "ECONNREFUSED",
      $metadata: {},
    });
    ecs.on(RunTaskCommand).rejects(refused);
    await expect(prepare(contextOf((config) => (config.Fargate.StartTimeout = 1)))).rejects.toThrow(
      "ecs:RunTask got no answer: ECONNREFUSED: Unable to connect",
    );
    expect(ecs.commandCalls(ListTasksCommand)).toHaveLength(0);
    expect(fs.existsSync(recordFile())).toBe(false);
    // If the first call was cut off and the later ones were refused, the first may have started a task.
    const broken = Object.assign(new Error("ECONNRESET"), { code: "ECONNRESET", $metadata: {} });
    let calls = 0;
    ecs.on(RunTaskCommand).callsFake(() => Promise.reject(calls++ === 0 ? broken : refused));
    ecs.on(ListTasksCommand).resolves({ taskArns: [arn] });
    await expect(prepare(contextOf((config) => (config.Fargate.StartTimeout = 1)))).rejects.toThrow("ECONNREFUSED");
    expect(inputs(StopTaskCommand)).toMatchObject([{ task: arn }]);
  });

  test("prepare sends no RunTask after a signal", async () => {
    const sigterm = new Failure("system", "stopped by SIGTERM");
    let calls = 0;
    // The signal arrives between two attempts of a throttled call.
    ecs.on(RunTaskCommand).callsFake(() => {
      if (++calls === 2) setTimeout(() => stop.abort(sigterm), 10);
      throw awsError("ThrottlingException", "Rate exceeded");
    });
    await expect(prepare(contextOf())).rejects.toThrow("stopped by SIGTERM");
    expect(calls).toBe(2);
    expect(fs.existsSync(recordFile())).toBe(false);
    // The signal arrives after RunTask was refused because of its override, before it is repeated without one.
    stop = new AbortController();
    const { privateKey } = await makeKeyPair("ed25519");
    const path = join(directory(), "id_ed25519");
    fs.writeFileSync(path, privateKey);
    ecs.on(RunTaskCommand).callsFake(() => {
      calls++;
      stop.abort(sigterm);
      throw noContainer;
    });
    await expect(prepare(contextOf((config) => (config.SSH.PrivateKeyPath = path)))).rejects.toThrow("SIGTERM");
    expect(calls).toBe(3);
    expect(fs.existsSync(recordFile())).toBe(false);
    expect(ecs.commandCalls(ListTasksCommand)).toHaveLength(0);
  });

  test("prepare stops the task when a signal arrives during RunTask", async () => {
    ecs.on(RunTaskCommand).callsFake(async () => {
      stop.abort(new Failure("system", "stopped by SIGTERM"));
      await new Promise((later) => setTimeout(later, 500));
      return { tasks: [{ taskArn: arn }] };
    });
    await expect(prepare(contextOf())).rejects.toThrow("stopped by SIGTERM");
    expect(inputs(StopTaskCommand)).toMatchObject([{ task: arn }]);
    expect(fs.existsSync(recordFile())).toBe(false);
  });

  test("prepare leaves an unanswered start to cleanup after a signal", async () => {
    ecs
      .on(RunTaskCommand)
      .rejectsOnce(awsError("ServerException", "x", 500))
      .rejects(awsError("ClientException", "no"));
    ecs.on(ListTasksCommand).callsFake(() => {
      stop.abort(new Failure("system", "stopped by SIGTERM"));
      return { taskArns: [] };
    });
    await expect(prepare(contextOf())).rejects.toThrow("ecs:RunTask was refused: ClientException: no");
    expect(readRecord(recordFile())).toMatchObject({ TaskARN: "", Unanswered: true });
    expect(logged.slice(1)).toEqual(["error: cleanup must stop a task that may have been started"]);
  });

  test("prepare starts nothing when a signal arrives while it removes an earlier attempt", async () => {
    createDirectory(records);
    writeRecord(recordFile(), { ...someRecord, TaskARN: "", Unanswered: true, UpdatedAt: Date.now() / 1000 });
    ecs.on(ListTasksCommand).callsFake(() => {
      stop.abort(new Failure("system", "stopped by SIGTERM"));
      return { taskArns: [] };
    });
    await expect(prepare(contextOf())).rejects.toThrow("stopped by SIGTERM");
    expect(logged).toEqual([]);
    expect(ecs.commandCalls(RunTaskCommand)).toHaveLength(0);
    expect(fs.existsSync(recordFile())).toBe(true);
  });

  test("cleanup looks for the task of an unanswered RunTask until it is listed", async () => {
    createDirectory(records);
    writeRecord(recordFile(), { ...someRecord, TaskARN: "", Unanswered: true, UpdatedAt: Date.now() / 1000 });
    ecs
      .on(ListTasksCommand)
      .resolvesOnce({ taskArns: [] })
      .resolves({ taskArns: [arn] });
    await cleanup(contextOf());
    // By the startedBy in the record, even if the manager's id has changed since.
    expect(inputs(ListTasksCommand)).toMatchObject([
      { startedBy: someRecord.StartedBy },
      { startedBy: someRecord.StartedBy },
    ]);
    expect(inputs(StopTaskCommand)).toMatchObject([{ task: arn }]);
    expect(fs.existsSync(recordFile())).toBe(false);
  });

  test("cleanup keeps looking while only an earlier try's stopped task is listed", async () => {
    createDirectory(records);
    writeRecord(recordFile(), { ...someRecord, TaskARN: "", Unanswered: true, UpdatedAt: Date.now() / 1000 });
    const earlier = arn.replace(/.$/, "0");
    ecs
      .on(ListTasksCommand)
      .resolvesOnce({ taskArns: [earlier] })
      .resolves({ taskArns: [earlier, arn] });
    ecs.on(DescribeTasksCommand).callsFake(({ tasks }) => ({
      tasks: tasks.map((task: string) => ({
        ...taskIn(task === earlier ? "STOPPED" : "PENDING"),
        taskArn: task,
        desiredStatus: task === earlier ? "STOPPED" : "RUNNING",
      })),
    }));
    await cleanup(contextOf());
    expect((inputs(StopTaskCommand) as { task: string }[]).map(({ task }) => task)).toContain(arn);
    expect(fs.existsSync(recordFile())).toBe(false);
  });

  /** Starts a process, and makes it look like a prepare of the job by a lock. */
  function startOtherPrepare() {
    const { job, config } = contextOf();
    const other = spawn("sleep", ["600"]);
    onTestFinished(() => void other.kill("SIGKILL"));
    const identity = execFileSync("cut", ["-d", " ", "-f", "22", `/proc/${other.pid}/stat`])
      .toString()
      .trim();
    const done = createLock(config.TaskMetadata, job.stem, "prepare");
    const [own = ""] = fs.readdirSync(records).filter((name) => name.endsWith(".lock"));
    const [, , place] = own.split(".").slice(-4);
    done();
    fs.writeFileSync(join(records, `${job.stem}.prepare.${other.pid}.${identity}.${place}.lock`), "");
    return other;
  }

  test("cleanup warns once beside a live prepare when ListTasks is not permitted", async () => {
    createDirectory(records);
    writeRecord(recordFile(), { ...someRecord, TaskARN: "", Unanswered: true });
    const other = startOtherPrepare();
    const looked = Promise.withResolvers<void>();
    let looks = 0;
    ecs.on(ListTasksCommand).callsFake(() => {
      if (++looks === 3) looked.resolve();
      throw awsError("AccessDeniedException", "no");
    });
    const cleaning = cleanup(contextOf());
    await looked.promise;
    other.kill("SIGKILL");
    await cleaning;
    expect(looks).toBeGreaterThan(2);
    expect(logged.filter((line) => line.startsWith("warning: "))).toEqual([
      expect.stringMatching(/^warning: cannot check whether a task started by \S+ is still running: ecs:List/),
    ]);
  });

  test("cleanup leaves the record of a live prepare as prepare writes it", async () => {
    createDirectory(records);
    const Deadline = Math.ceil(Date.now() / 1000) + 7_200;
    writeRecord(recordFile(), { ...someRecord, TaskARN: "", Unanswered: true, Deadline });
    const other = startOtherPrepare();
    const deadlines: (number | undefined)[] = [];
    ecs.on(ListTasksCommand).callsFake(() => {
      deadlines.push(readRecord(recordFile())?.Deadline);
      if (deadlines.length > 1) return { taskArns: [] };
      // Now RunTask is answered, and the process ends.
      writeRecord(recordFile(), someRecord);
      other.kill("SIGKILL");
      throw awsError("AccessDeniedException", "no");
    });
    await cleanup(contextOf());
    expect(deadlines[0]).toBe(Deadline);
    expect(inputs(StopTaskCommand)).toMatchObject([{ task: arn }]);
    expect(fs.existsSync(recordFile())).toBe(false);
  });

  test("cleanup looks for at most half a minute when the clock was set back", async () => {
    createDirectory(records);
    const future = Date.now() / 1000 + 3_600;
    writeRecord(recordFile(), { ...someRecord, TaskARN: "", Unanswered: true, UpdatedAt: future });
    let now = Date.now();
    ecs.on(ListTasksCommand).callsFake(() => {
      now += 10_000;
      return { taskArns: [] };
    });
    await cleanup({ ...contextOf(), now: () => now });
    expect(inputs(ListTasksCommand)).toHaveLength(3);
    expect(fs.existsSync(recordFile())).toBe(false);
  }, 15_000);

  test("prepare repeats RunTask after an answer without a task or a reason", async () => {
    let calls = 0;
    ecs.on(RunTaskCommand).callsFake(() => (calls++ === 0 ? {} : { failures: [{ reason: "enough" }] }));
    await expect(prepare(contextOf())).rejects.toThrow("enough");
    const tokens = (inputs(RunTaskCommand) as RunTaskCommandInput[]).map(({ clientToken }) => clientToken);
    expect(tokens).toEqual([tokens[0], tokens[0]]);
  });

  test("cleanup looks for the task by name when its record is damaged", async () => {
    createDirectory(records);
    fs.writeFileSync(recordFile(), "{", { mode: 0o600 });
    ecs.on(ListTasksCommand).resolves({ taskArns: [arn] });
    await cleanup(contextOf());
    expect(logged).toEqual([expect.stringMatching(/^warning: the record .* cannot be used: it is not JSON; looking/)]);
    expect(inputs(StopTaskCommand)).toMatchObject([{ task: arn }]);
    expect(fs.existsSync(recordFile())).toBe(false);
  });

  test("cleanup stops the task of a damaged record without an identity", async () => {
    createDirectory(records);
    fs.writeFileSync(recordFile(), `{"TaskARN": "${arn}", "Con`, { mode: 0o600 });
    fs.writeFileSync(join(records, ".manager-id"), "not an identity");
    await expect(cleanup(contextOf())).rejects.toThrow("the manager's id file");
    expect(inputs(StopTaskCommand)).toMatchObject([{ cluster: "test-cluster", task: arn }]);
    expect(fs.existsSync(recordFile())).toBe(true);
  });

  describe("on ECS", () => {
    const managerCluster = "arn:aws:ecs:us-east-2:123456789012:cluster/manager-cluster";
    const taskDefinitionArn = "arn:aws:ecs:us-east-2:123456789012:task-definition/manager:1";
    const newId = () => randomBytes(16).toString("hex");
    const arnOf = (id: string) => `arn:aws:ecs:us-east-2:123456789012:task/manager-cluster/${id}`;
    const newEndpoint = async (fault?: MetadataFault) => {
      const described = { taskArn: arnOf(newId()), clusterArn: managerCluster, taskDefinitionArn, createdAt: 0 };
      const metadata = await EcsMetadata.start(described, fault);
      onTestFinished(() => metadata.close());
      return metadata;
    };
    const warnings = () => logged.filter((line) => !line.startsWith("Starting a task of "));
    /** Runs prepare until RunTask is refused. @returns the manager's id in `startedBy` */
    const idOfPrepare = async (env: Record<string, string> = {}) => {
      ecs.on(RunTaskCommand).resolves({ failures: [{ reason: "enough" }] });
      await expect(prepare({ ...contextOf(), env })).rejects.toThrow("enough");
      const [input] = inputs(RunTaskCommand).slice(-1) as RunTaskCommandInput[];
      return input?.startedBy?.split("-")[1];
    };

    test("prepare names the manager's own task in startedBy, and asks for it once", async () => {
      const metadata = await newEndpoint();
      expect(await idOfPrepare(metadata.environment)).toBe(metadata.id);
      expect(await idOfPrepare(metadata.environment)).toBe(metadata.id);
      expect(managerId(records, metadata.environment)).toBe(metadata.id);
      expect(metadata.requests).toEqual([expect.stringMatching(/^GET \/v4\/[0-9a-f]{32}-\d+\/task$/)]);
      expect(fs.readdirSync(records)).toEqual([".manager-task"]);
      expect(fs.statSync(join(records, ".manager-task")).mode & 0o777).toBe(0o600);
      expect(warnings()).toEqual([]);
    });

    test("prepare asks no metadata endpoint without ECS_CONTAINER_METADATA_URI_V4", async () => {
      const { environment, requests } = await newEndpoint();
      const version3 = { ECS_CONTAINER_METADATA_URI: environment.ECS_CONTAINER_METADATA_URI_V4 };
      const id = await idOfPrepare(version3);
      expect(id).toMatch(/^[0-9a-f]{12}$/);
      expect(managerId(records, version3)).toBe(id);
      expect(fs.readdirSync(records)).toEqual([".manager-id"]);
      expect(requests).toEqual([]);
    });

    test.each<MetadataFault>(["silent", "stalled", "error", "invalid", "reset"])(
      "prepare keeps a random id for its container if the metadata endpoint is %s",
      async (fault) => {
        const metadata = await newEndpoint(fault);
        const id = await idOfPrepare(metadata.environment);
        expect(id).toMatch(/^[0-9a-f]{12}$/);
        metadata.fault = undefined;
        expect(managerId(records, metadata.environment)).toBe(id);
        expect(await idOfPrepare(metadata.environment)).toBe(id);
        expect(metadata.requests).toHaveLength(3); // all of them by the first prepare
        metadata.replaceContainer();
        expect(await idOfPrepare(metadata.environment)).toBe(metadata.id);
        expect(warnings()).toEqual([]);
      },
    );

    test("prepare has another id in another container with the same directory", async () => {
      const [first, second] = [await newEndpoint(), await newEndpoint()];
      expect(await idOfPrepare(first.environment)).toBe(first.id);
      // Until it has asked, the second one must not use the first one's id.
      expect(managerId(records, second.environment)).toMatch(/^[0-9a-f]{12}$/);
      expect(await idOfPrepare(second.environment)).toBe(second.id);
      expect(managerId(records, first.environment)).not.toBe(second.id);
      expect(await idOfPrepare(first.environment)).toBe(first.id);
    });

    test("prepare starts no task if the manager's id file belongs to others", async () => {
      const { environment } = await newEndpoint();
      createDirectory(records);
      fs.writeFileSync(join(records, ".manager-task"), `${"0".repeat(12)} ${newId()}\n`, { mode: 0o666 });
      fs.chmodSync(join(records, ".manager-task"), 0o666);
      const refused = prepare({ ...contextOf(), env: environment });
      await expect(refused).rejects.toThrow(`${join(records, ".manager-task")} cannot be used: its mode is 666`);
      expect(inputs(RunTaskCommand)).toEqual([]);
    });

    /** A sweep by another manager, while one task of a manager with this id runs. */
    async function sweepBeside(manager: string, managers: Task[], metadata?: EcsMetadata) {
      const own = metadata ?? (await newEndpoint());
      createDirectory(records);
      const startedBy = `fargate-${manager}-${newId()}`;
      const worker: Task = { ...taskIn("RUNNING"), startedBy, createdAt: new Date() };
      ecs.on(ListTasksCommand).resolves({ taskArns: [arn] });
      ecs.on(DescribeTasksCommand).callsFake(({ cluster }: DescribeTasksCommandInput) => ({
        tasks: cluster === managerCluster ? managers : [worker],
      }));
      return sweep({ ...contextOf(), env: own.environment }, { dryRun: false, json: false });
    }

    test("sweep stops the tasks of a manager whose own task is STOPPED", async () => {
      const id = newId();
      const report = await sweepBeside(id, [{ taskArn: arnOf(id), lastStatus: "STOPPED" }]);
      expect(report).toMatchObject({
        stopped: [{ taskArn: arn, why: "its manager's own task has stopped" }],
        left: [],
      });
      expect(inputs(StopTaskCommand)).toMatchObject([{ cluster: "test-cluster", task: arn }]);
      expect(inputs(DescribeTasksCommand)).toContainEqual({ cluster: managerCluster, tasks: [id] });
    });

    test.each(["PROVISIONING", "PENDING", "RUNNING", "DEACTIVATING", "STOPPING", "DEPROVISIONING", "MISSING"])(
      "sweep leaves the tasks of a manager whose own task is %s",
      async (lastStatus) => {
        const id = newId();
        // ECS leaves out a task that it does not know. Another task must not count for this one.
        const known = lastStatus === "MISSING" ? [] : [{ taskArn: arnOf(id), lastStatus, desiredStatus: "STOPPED" }];
        const report = await sweepBeside(id, [...known, { taskArn: arnOf(newId()), lastStatus: "STOPPED" }]);
        expect(report).toMatchObject({ stopped: [], left: [{ taskArn: arn }], problems: [] });
        expect(inputs(StopTaskCommand)).toEqual([]);
      },
    );

    test("sweep asks for no other manager's task if its id is random or its own", async () => {
      const metadata = await newEndpoint();
      for (const manager of ["0123456789ab", metadata.id]) {
        await identified(metadata);
        const report = await sweepBeside(manager, [{ taskArn: arnOf(metadata.id), lastStatus: "STOPPED" }], metadata);
        expect(report).toMatchObject({ stopped: [], problems: [] });
      }
      expect(metadata.requests).toHaveLength(1);
      expect(inputs(DescribeTasksCommand)).not.toContainEqual(expect.objectContaining({ cluster: managerCluster }));
    });
    const identified = async ({ environment }: EcsMetadata) => void (await idOfPrepare(environment));

    test.each<MetadataFault>(["silent", "error"])(
      "sweep has one clear problem if the metadata endpoint is %s",
      async (fault) => {
        const id = newId();
        const metadata = await newEndpoint(fault);
        const report = await sweepBeside(id, [{ taskArn: arnOf(id), lastStatus: "STOPPED" }], metadata);
        const problem = expect.stringMatching(/^the ECS task metadata endpoint \S+ cannot be used: /);
        expect(report).toMatchObject({ stopped: [], left: [{ taskArn: arn }], problems: [problem] });
      },
    );
  });

  test("sweep stops no task of another program that a record names", async () => {
    createDirectory(records);
    // Others could have written this record: its mode is 660.
    writeRecord(recordFile(), { ...someRecord, UpdatedAt: 1 });
    fs.chmodSync(recordFile(), 0o660);
    const created = new Date(Date.now() - 3_600_000);
    fs.utimesSync(recordFile(), new Date(0), new Date(0));
    ecs.on(DescribeTasksCommand).resolves({ tasks: [{ ...taskIn("RUNNING"), createdAt: created, startedBy: "x" }] });
    const report = await sweep(contextOf(), { dryRun: false, json: false });
    expect(report).toMatchObject({ stopped: [], problems: [], removedRecords: [basename(recordFile())] });
    expect(inputs(StopTaskCommand)).toEqual([]);
  });

  test("cleanup repeats StopTask when it is throttled or credentials fail", async () => {
    createDirectory(records);
    writeRecord(recordFile(), someRecord);
    const noCredentials = Object.assign(new Error("Could not load"), {
      name: "CredentialsProviderError",
      $metadata: {},
    });
    ecs
      .on(StopTaskCommand)
      .rejectsOnce(awsError("ThrottlingException", "Rate exceeded"))
      .rejectsOnce(noCredentials)
      .resolves({});
    await cleanup(contextOf());
    expect(inputs(StopTaskCommand)).toHaveLength(3);
    expect(fs.existsSync(recordFile())).toBe(false);
  });

  // But not if ECS no longer knows the task: it counts as stopped.
  test("cleanup keeps the record of a task that cannot be stopped", async () => {
    createDirectory(records);
    writeRecord(recordFile(), someRecord);
    ecs.on(StopTaskCommand).rejects(awsError("AccessDeniedException", "no"));
    await expect(cleanup(contextOf())).rejects.toThrow(
      `${arn} may still be running (ecs:StopTask was refused: AccessDeniedException: no); stop it by hand`,
    );
    expect(readRecord(recordFile())).toEqual(someRecord);
    ecs.on(StopTaskCommand).rejects(awsError("InvalidParameterException", "The referenced task was not found."));
    await cleanup(contextOf());
    expect(fs.existsSync(recordFile())).toBe(false);
  });
});

// ---------------------------------------------------------------------------------------------------------
// 9. SSH
// ---------------------------------------------------------------------------------------------------------

describe("Preamble", () => {
  const mark = "fargate-0123";
  const first = `${mark} 89 89 (my) shell) S 1 88 87 0 -1 4194560 338 0 10 0 0 0 0 0 20 0 1 0 75158 4464640\n`;
  const pipes = "l-wx------ 1 0 0 64 /proc/89/fd/1 -> pipe:[77]\nl-wx------ 1 0 0 64 /proc/89/fd/2 -> pipe:[78]\n";
  /** Pushes the chunks. `own`: all output that the preamble passed on, including the part it held back. */
  const read = (chunks: Buffer[]) => {
    const preamble = new Preamble(mark);
    const own = chunks.map((chunk) => preamble.push(chunk));
    const rest = preamble.shell ? Buffer.alloc(0) : preamble.held;
    return { preamble, own: Buffer.concat([...own, rest]).toString("latin1") };
  };

  test("Preamble removes only the marks wherever the stream is split into chunks", () => {
    const piece = fc.oneof(
      fc.constantFrom("fargate-", mark, `${mark} complete`, `${mark} $$ x\n`, "\n", " ", "pipe:[1]\n"),
      fc.string({ unit: "binary" }).map((text) => Buffer.from(text).toString("latin1")),
    );
    const sizes = fc.infiniteStream(fc.integer({ min: 1, max: 99 }));
    fc.assert(
      fc.property(fc.array(piece), fc.array(piece), sizes, (startUp, script, size) => {
        // A start-up file cannot guess the mark, but may print the program that contains it.
        const before = startUp.join("").replaceAll(new RegExp(`${mark}(?= \\d+ .*\n| complete\n)`, "g"), "");
        const own = script.join("");
        const whole = Buffer.from(`${before}${first}${pipes}${mark} complete\n${own}`, "latin1");
        const chunks: Buffer[] = [];
        for (let at = 0; at < whole.length; at += chunks.at(-1)?.length as number)
          chunks.push(whole.subarray(at, at + (size.next().value as number)));
        const { preamble, own: out } = read(chunks);
        expect(out).toBe(before + own);
        expect(preamble).toMatchObject({
          state: "complete",
          shell: { pid: 89, session: 87, start: 75158 },
          pipes: ["pipe:[77]", "pipe:[78]"],
        });
      }),
      { numRuns: 2_000 },
    );
  });

  test("Preamble passes what looks like marks after the marks", () => {
    const own = `${first}${mark} incomplete\n${mark} complete\n`;
    const { preamble, own: out } = read([Buffer.from(`${first}${mark} complete\n${own}`), Buffer.from(own)]);
    expect(out).toBe(own + own);
    expect(preamble.state).toBe("complete");
  });

  test("Preamble takes the shell for the leader of its session without /proc", () => {
    const { preamble } = read([Buffer.from(`${mark} 12 \n${mark} complete\n`)]);
    expect(preamble).toMatchObject({ shell: { pid: 12, session: 12, start: 0 }, pipes: [] });
  });

  test("Preamble passes the output on when the marks do not come", () => {
    const noise = "x".repeat(10_000);
    expect(read([Buffer.from(noise)])).toMatchObject({ own: noise, preamble: { state: "pending", shell: undefined } });
    const { preamble } = read([Buffer.from(first), Buffer.from(noise)]);
    expect(preamble.state).toBe("pending");
    expect(preamble.held.length).toBeLessThan(noise.length);
  });
});

test.each<[string, ReturnType<typeof findPipeHolders>, string[]]>([
  [
    "tee behind a process substitution",
    { filter: true, paths: ["/proc/12/fd/1", "/proc/12/fd/2"] },
    ["r 12/fd/0 pipe:[9]", "w 12/fd/1 pipe:[1]", "w 12/fd/2 pipe:[2]"],
  ],
  [
    "a filter of standard error",
    { filter: true, paths: ["/proc/12/fd/2"] },
    ["r 12/fd/0 pipe:[9]", "w 12/fd/1 /dev/null", "w 12/fd/2 pipe:[2]"],
  ],
  [
    "a filter of a channel of sockets",
    { filter: true, paths: ["/proc/12/fd/1"] },
    ["r 12/fd/0 pipe:[9]", "w 12/fd/1 socket:[3]"],
  ],
  [
    "a process in the background",
    { filter: false, paths: ["/proc/12/fd/1"] },
    ["r 11/fd/0 pipe:[9]", "r 12/fd/0 /dev/null", "w 12/fd/1 pipe:[1]"],
  ],
  [
    "a filter of another channel",
    { filter: false, paths: [] },
    ["r 12/fd/0 pipe:[9]", "w 12/fd/1 pipe:[4]", "w 12/fd/2 pipe:[5]"],
  ],
  ["the server that reads the pipes", { filter: false, paths: [] }, ["r 12/fd/0 pipe:[9]", "r 12/fd/1 pipe:[1]"]],
  ["an empty listing", undefined, []],
])("findPipeHolders classifies %s", (_, expected, links) => {
  const modes = { r: "lr-x------", w: "l-wx------" };
  const line = (link: string) => {
    const [mode, path, target] = link.split(" ");
    return `${modes[mode as "r" | "w"]} 1 0 0 64 Nov 26 02:45 /proc/${path} -> ${target}\n`;
  };
  const listing = links.map(line).join("");
  expect(findPipeHolders(listing, ["pipe:[1]", "pipe:[2]", "socket:[3]"])).toEqual(expected);
  expect(findPipeHolders(listing, [])).toBe(undefined); // without /proc, the shell's pipes have no names
});

test.each([
  ["#!/usr/bin/env bash\n", "bash"],
  ["#!/bin/bash\n", "bash"],
  ["#! /usr/bin/env -S bash -e\n", "bash"],
  ["#!/usr/bin/env sh\n", "sh"],
  ["#!/bin/sh", "sh"],
  ["echo no first line\n", "bash"],
  ["", "bash"],
])("interpreterOf maps %j to %s", (script, name) => {
  expect(interpreterOf(Buffer.from(script), "bash")).toBe(name);
  expect(interpreterOf(Buffer.from(script), "sh")).toBe("sh");
});

test.each([
  ["a pwsh script", "#!/usr/bin/env pwsh\n", "pwsh"],
  ["a pwsh script with Windows line ends", "#!/usr/bin/env pwsh\r\n& {\r\n", "pwsh"],
  ["a PowerShell script", "& {\r\n\r\n$ErrorActionPreference = 'Stop'\r\n", "PowerShell or cmd.exe"],
  ["a PowerShell script with a byte order mark", "\ufeff& {\r\n", "PowerShell or cmd.exe"],
  ["a bash script with a byte order mark", "\ufeff#!/usr/bin/env bash\n", "PowerShell or cmd.exe"],
  ["a script in UTF-16", Buffer.from("\ufeffecho", "utf16le"), "PowerShell or cmd.exe"],
  ["a cmd.exe script", "@echo off\r\nsetlocal\r\n", "PowerShell or cmd.exe"],
])("interpreterOf refuses %s", (_, script, name) => {
  const failure = thrown(() => interpreterOf(Buffer.from(script as string), "bash"));
  expect(failure).toMatchObject({ kind: "system" });
  expect(failure.message).toContain(
    `the script is for ${name}, but only bash and sh are supported; set shell = "bash"`,
  );
});

/** The outcome and output of a script. */
interface Ran {
  outcome: Outcome;
  stdout: Buffer;
  stderr: Buffer;
}

test("runScript keeps output that arrives with the channel's confirmation", async () => {
  const { privateKey } = await makeKeyPair("ed25519");
  const server = new SshServerOfAPacket(
    { hostKeys: [privateKey], algorithms: { cipher: ["aes128-gcm@openssh.com"] } },
    (client) =>
      client
        .on("error", () => {})
        .on("authentication", (attempt) => attempt.accept())
        .on("session", (accept) =>
          accept().on("exec", (accept) => {
            const channel = accept();
            channel.write("fargate-shells /bin/bash /bin/bash\n");
            channel.exit(0);
            channel.end();
          }),
        ),
  ).listen(0, "127.0.0.1");
  await new Promise((listening) => server.once("listening", listening));
  const { port } = server.address() as { port: number };
  const { signal } = new AbortController();
  for (let round = 0; round < 20; round++) {
    const target = {
      host: "127.0.0.1",
      Port: port,
      Username: "root",
      privateKey,
      KeepAliveInterval: 0,
      CancelGracePeriod: 1,
    };
    const connection = await connect(target, 3_000, signal);
    expect(await findShells(connection, signal)).toMatchObject({ Interpreter: "bash", LoginShell: "bash" });
    connection.client.destroy();
  }
  server.close();
});

test("runScript keeps the order of lines of both streams", async () => {
  const { privateKey } = await makeKeyPair("ed25519");
  const lines = Array.from({ length: 400 }, (_, index) => `line ${index}\n`);
  const server = new SshServerOfAPacket(
    { hostKeys: [privateKey], algorithms: { cipher: ["aes128-gcm@openssh.com"] } },
    (client) =>
      client
        .on("error", () => {})
        .on("authentication", (attempt) => attempt.accept())
        .on("session", (accept) =>
          accept().on("exec", (accept, _, { command }) => {
            const channel = accept();
            const mark = /fargate-[0-9a-f]{32}/.exec(command)?.[0];
            channel.write(`${mark} 4242 \n`);
            channel.resume().on("end", () => {
              channel.write(`${mark} complete\n`);
              for (const [index, line] of lines.entries()) (index % 2 ? channel.stderr : channel).write(line);
              channel.exit(0);
              channel.end();
            });
          }),
        ),
  ).listen(0, "127.0.0.1");
  await new Promise((listening) => server.once("listening", listening));
  const { port } = server.address() as { port: number };
  const target = {
    host: "127.0.0.1",
    Port: port,
    Username: "root",
    privateKey,
    KeepAliveInterval: 0,
    CancelGracePeriod: 1,
  };
  const connection = await connect(target, 3_000, never);
  const written: string[] = [];
  const both = () =>
    new Writable({
      highWaterMark: 64, // small, so that no write is accepted at once
      write(chunk: Buffer, _, done) {
        // Like a full pipe shared by both streams: accepts a part now, and the rest after the reader has read.
        const half = chunk.length >> 1;
        written.push(chunk.toString("utf8", 0, half));
        setImmediate(() => {
          written.push(chunk.toString("utf8", half));
          done();
        });
      },
    });
  const outcome = await runScript(
    connection,
    Buffer.from("true"),
    { interpreter: "bash", loginShell: "bash" },
    { signal: never, log, stdout: both(), stderr: both() },
  );
  expect(outcome).toEqual({ ended: "exited", code: 0 });
  expect(written.join("")).toBe(lines.join(""));
  connection.client.destroy();
  server.close();
});

test.each([
  ["warns of a connection lost between exit status and close", false],
  ["accepts a connection lost after exit status and close", true], // nothing can be missing
])("runScript %s", async (_, closes) => {
  const { privateKey } = await makeKeyPair("ed25519");
  let cut = () => {};
  const server = new SshServerOfAPacket({ hostKeys: [privateKey] }, (client) =>
    client
      .on("error", () => {})
      .on("authentication", (attempt) => attempt.accept())
      .on("session", (accept) =>
        accept().on("exec", (accept, _, { command }) => {
          const channel = accept();
          const mark = /fargate-[0-9a-f]{32}/.exec(command)?.[0];
          channel.write(`${mark} 4242 \n`);
          channel.resume().on("end", () => {
            channel.write(`${mark} complete\nfirst\n`);
            channel.exit(0);
            if (closes) channel.end();
            cut();
          });
        }),
      ),
  ).listen(0, "127.0.0.1");
  await new Promise((listening) => server.once("listening", listening));
  const { port } = server.address() as { port: number };
  const proxy = await startProxy({ host: "127.0.0.1", port });
  cut = () => setTimeout(() => proxy.cut(), 300);
  const target = {
    host: "127.0.0.1",
    Port: proxy.port,
    Username: "root",
    privateKey,
    KeepAliveInterval: 0,
    CancelGracePeriod: 1,
  };
  const warnings: string[] = [];
  const warner = { ...log, warn: (text: string) => void warnings.push(text) };
  let out = "";
  const stdout = new Writable({
    write(chunk: Buffer, _, done) {
      out += chunk;
      setTimeout(done, 600); // slower than the connection's end
    },
  });
  const outcome = await runScript(
    await connect(target, 3_000, never),
    Buffer.from("true"),
    { interpreter: "bash", loginShell: "bash" },
    { signal: never, log: warner, stdout, stderr: new PassThrough() },
  );
  expect(outcome).toEqual({ ended: "exited", code: 0 });
  expect(out).toBe("first\n");
  expect(warnings).toEqual(closes ? [] : ["connection lost: the script's last output may be lost"]);
  await proxy.close();
  server.close();
});

test.each(["garbage", "a disconnect"])(
  // The connection's other half stays open.
  "runScript ends at once when the server sends %s",
  async (what) => {
    const { privateKey } = await makeKeyPair("ed25519");
    const sockets: Socket[] = [];
    let disconnect = () => {};
    const server = new SshServerOfAPacket(
      { hostKeys: [privateKey], algorithms: { cipher: ["aes128-gcm@openssh.com"] } },
      (client) => {
        disconnect = () =>
          (client as unknown as { _protocol: { disconnect(code: number): void } })._protocol.disconnect(2);
        client
          .on("error", () => {})
          .on("authentication", (attempt) => attempt.accept())
          .on("session", (accept) =>
            accept().on("exec", (accept, _, { command }) => {
              const channel = accept();
              channel.write(`${/fargate-[0-9a-f]{32}/.exec(command)?.[0]} 4242 \n`);
              channel.on("data", () => {
                if (what === "garbage") for (const socket of sockets) socket.write(Buffer.alloc(4096, 0x41));
                else disconnect();
              });
            }),
          );
      },
    ).listen(0, "127.0.0.1");
    await new Promise((listening) => server.once("listening", listening));
    // A proxy that never closes its connections.
    const { port: behind } = server.address() as { port: number };
    const front = createTcpServer({ allowHalfOpen: true }, (socket) => {
      sockets.push(socket);
      const upstream = connectTcp({ port: behind, host: "127.0.0.1", allowHalfOpen: true });
      socket.on("error", () => {}).on("data", (data) => upstream.write(data));
      upstream.on("error", () => {}).on("data", (data) => socket.write(data));
    }).listen(0, "127.0.0.1");
    await new Promise((listening) => front.once("listening", listening));
    const { port } = front.address() as { port: number };
    const { signal } = new AbortController();
    const target = {
      host: "127.0.0.1",
      Port: port,
      Username: "root",
      privateKey,
      KeepAliveInterval: 0,
      CancelGracePeriod: 1,
    };
    const connection = await connect(target, 3_000, signal);
    const sink = () => new Writable({ write: (_chunk, _encoding, done) => done() });
    const outcome = await runScript(
      connection,
      Buffer.from("sleep 600"),
      { interpreter: "bash", loginShell: "bash" },
      { signal, log, stdout: sink(), stderr: sink() },
    );
    expect(outcome).toMatchObject({ ended: "lost", begun: true });
    for (const socket of sockets) socket.destroy();
    front.close();
    server.close();
  },
  20_000,
);

test("connect rejects a key that cannot be read", async () => {
  const server = createTcpServer();
  await new Promise<void>((listening) => server.listen(0, "127.0.0.1", listening));
  const target = {
    host: "127.0.0.1",
    Port: (server.address() as AddressInfo).port,
    Username: "root",
    privateKey: "no key",
    KeepAliveInterval: 0,
    CancelGracePeriod: 1,
  };
  await expect(connect(target, 200, new AbortController().signal)).rejects.toThrow(/Cannot parse privateKey/);
  await new Promise((later) => setTimeout(later, 400)); // a timer left behind would by now have caused an unhandled rejection
  server.close();
});

describe("login", () => {
  /** A request of the client, with the result of checking its signature. */
  interface LoginRequest {
    readonly method: string;
    readonly algorithm?: string;
    readonly hash?: string | undefined;
    readonly verified?: boolean;
  }
  /**
   * Logs in to a server. Returns the client's requests.
   *
   * @param accepts whether the server accepts a key with the right signature
   * @param algorithms what the server lists in place of rsa-sha2-256
   */
  async function loginRequests(type: "ed25519" | "rsa", { accepts = true, algorithms = "rsa-sha2-256" } = {}) {
    const { privateKey, publicKey } = await makeKeyPair(type);
    const { privateKey: hostKey } = await makeKeyPair("ed25519");
    const allowed = parseKey(publicKey);
    const requests: LoginRequest[] = [];
    const server = new SshServerOfAPacket({ hostKeys: [hostKey] }, (client) => {
      // ssh2 replaces its writer of packets once both sides have agreed on the algorithms.
      type Writer = { finalize(packet: Buffer, force?: boolean): Buffer };
      const { _packetRW: packets } = (client as unknown as { _protocol: { _packetRW: { write: Writer } } })._protocol;
      let { write } = packets;
      const set = (writer: Writer) => {
        write = writer;
        const finalize = writer.finalize.bind(writer);
        writer.finalize = (packet, force) => {
          const at = packet.includes("server-sig-algs") ? packet.indexOf("rsa-sha2-256") : -1;
          if (at >= 0) packet.write(algorithms, at, "latin1");
          return finalize(packet, force);
        };
      };
      Object.defineProperty(packets, "write", { get: () => write, set });
      client
        .on("error", () => {})
        .on("authentication", (attempt) => {
          const { method } = attempt;
          if (method !== "publickey") {
            requests.push({ method });
            return attempt.reject(["publickey"]);
          }
          const { key, signature, blob, hashAlgo } = attempt;
          const verified = signature && blob ? allowed.verify(blob, signature, hashAlgo) === true : false;
          requests.push({ method, algorithm: key.algo, hash: hashAlgo, verified });
          if (accepts && key.data.equals(allowed.getPublicSSH())) attempt.accept();
          else attempt.reject(["publickey"]);
        });
    }).listen(0, "127.0.0.1");
    await new Promise((listening) => server.once("listening", listening));
    try {
      const { port } = server.address() as { port: number };
      const target = { host: "127.0.0.1", Port: port, Username: "root", privateKey, KeepAliveInterval: 0 };
      const failure = await connect({ ...target, CancelGracePeriod: 1 }, 3_000, never).then(
        ({ client }) => void client.destroy(),
        (error: Error) => error,
      );
      return { requests, failure };
    } finally {
      server.close();
    }
  }

  test.each([
    ["ed25519", "rsa-sha2-256", { algorithm: "ssh-ed25519", hash: undefined }],
    ["rsa", "rsa-sha2-256", { algorithm: "ssh-rsa", hash: "sha256" }],
    ["rsa", "rsa-sha2-512", { algorithm: "ssh-rsa", hash: "sha512" }],
    ["rsa", "other-sha234", { algorithm: "ssh-rsa", hash: undefined }], // SHA-1
  ] as const)("connect logs in with one signed request (%s, %s)", async (type, algorithms, request) => {
    const { requests, failure } = await loginRequests(type, { algorithms });
    expect(failure).toBeUndefined();
    expect(requests).toEqual([{ method: "publickey", ...request, verified: true }]);
  });

  test.each(["ed25519", "rsa"] as const)("connect fails when the server refuses a key of type %s", async (type) => {
    const { requests, failure } = await loginRequests(type, { accepts: false });
    expect(failure).toMatchObject({ why: "login", cause: { problem: "key" } });
    expect(failure?.message).toMatch(/^root@127\.0\.0\.1:\d+: the server refused the key$/);
    expect(requests).toMatchObject([{ method: "publickey", verified: true }]);
  });
});

/** The ways of a script to its shell. Through the relay, tests need containers. */
const WAYS = [
  ["over SSH", { isRelayed: false, startTask, runScript }],
  ["through the relay", { isRelayed: true, startTask: () => startPair(), runScript: runThroughRelay }],
] as const;

// `task.host` is the container that runs the scripts.
describe.each(WAYS)("scripts %s", (_, { isRelayed, startTask, runScript }) => {
  let task: Awaited<ReturnType<typeof startTask>>;
  beforeAll(async () => {
    if (!isRelayed || hosts.kind === "container") task = await startTask();
  });
  afterAll(() => task?.host.stop(0));

  const scriptTest: typeof taskTest = (name, body, { timeout, containerOnly = false } = {}) =>
    taskTest(name, body, { timeout, containerOnly: containerOnly || isRelayed });
  /** For tests of the login, the connection or the worker image, or of what scripts through the relay do not have. */
  const sshTest: typeof taskTest = (...args) => {
    if (!isRelayed) taskTest(...args);
  };
  const describeSsh = isRelayed ? () => {} : describe;

  async function runIn(
    connection: Connection,
    script: string | Buffer,
    { interpreter = "bash" as "bash" | "sh", loginShell = "bash", signal = new AbortController().signal } = {},
  ): Promise<Ran> {
    const out = collect();
    const err = collect();
    const outcome = await runScript(
      connection,
      Buffer.from(script),
      { interpreter, loginShell },
      {
        signal,
        log,
        stdout: out.sink,
        stderr: err.sink,
      },
    );
    return { outcome, stdout: out.bytes(), stderr: err.bytes() };
  }

  async function runOnce(script: string | Buffer, options?: Parameters<typeof runIn>[2]): Promise<Ran> {
    const connection = await task.logIn();
    try {
      return await runIn(connection, script, options);
    } finally {
      connection.client.end();
    }
  }
  const exited = (code: number): Outcome => ({ ended: "exited", code });

  sshTest("findShells finds the shells of a container", async () => {
    const connection = await task.logIn();
    expect(await findShells(connection, never)).toMatchObject({ Interpreter: "bash", LoginShell: "bash" });
    connection.client.end();
  });

  for (const code of [0, 1, 42, 137, 255])
    scriptTest(`runScript returns exit code ${code}`, async () => {
      expect((await runOnce(`exit ${code}`)).outcome).toEqual(exited(code));
    });

  scriptTest("runScript returns 128 + n for death by signal n", async () => {
    expect((await runOnce("sh -c 'kill -TERM $$'")).outcome).toEqual(exited(143));
    expect((await runOnce("sh -c 'kill -SEGV $$'")).outcome).toEqual(exited(139));
    expect((await runOnce("echo before; kill -KILL $$")).outcome).toEqual(exited(137));
  });

  scriptTest("runScript ends as bash does when a script sends itself TERM", async () => {
    for (const [script, code] of [
      ["x=$(kill -s TERM $$); true", 143],
      ["(kill -s TERM $$); exit 3", 143],
      ["kill -TERM 0; exit 3", 143],
      ["trap '' TERM; kill -TERM 0; exit 0", 0],
      ["trap 'exit 7' TERM; kill -TERM $$; exit 0", 7],
    ] as const)
      expect((await runOnce(script)).outcome, script).toEqual(exited(code));
  });

  scriptTest("runScript keeps output that is unread when the script ends", async () => {
    const connection = await task.logIn();
    for (const redirect of ["", ">&2"]) {
      const received: Buffer[] = [];
      const slow = new Writable({
        highWaterMark: 16_384,
        write(chunk: Buffer, _, done) {
          received.push(Buffer.from(chunk));
          setTimeout(done, 1);
        },
      });
      const rest = collect().sink;
      const outcome = await runScript(
        connection,
        Buffer.from(`head -c 3000000 /dev/zero ${redirect}; exit 7`),
        { interpreter: "bash", loginShell: "bash" },
        { signal: never, log, stdout: redirect ? rest : slow, stderr: redirect ? slow : rest },
      );
      expect(outcome).toEqual(exited(7));
      expect(Buffer.concat(received).length).toBe(3_000_000);
    }
    connection.client.end();
  });

  scriptTest("runScript keeps all output despite a background process and a slow reader", async () => {
    const connection = await task.logIn();
    let bytes = 0;
    const slow = new Writable({
      highWaterMark: 16_384,
      write(chunk: Buffer, _, done) {
        bytes += chunk.length;
        setTimeout(done, chunk.length / 1_000); // 1 MB/s: the output takes longer than the driver waits for a background process
      },
    });
    const outcome = await runScript(
      connection,
      Buffer.from("sleep 300 & head -c 3000000 /dev/zero; exit 7"),
      { interpreter: "bash", loginShell: "bash" },
      { signal: never, log, stdout: slow, stderr: collect().sink },
    );
    connection.client.end();
    expect(outcome).toEqual(exited(7));
    expect(bytes).toBe(3_000_000);
  });

  // A shell in the job's own image reads no start-up files.
  describeSsh("start-up files", () => {
    const bashrc = (text: string) => task.host.exec(`printf '%s\\n' '${text}' >/root/.bashrc`);
    afterAll(async () => {
      if (hosts.kind === "container") await task.host.exec("rm -f /root/.bashrc");
    });

    taskTest(
      "runScript takes no output for a mark when .bashrc sets -x",
      async () => {
        await bashrc("set -x; echo noise");
        const ran = await runOnce("echo out; echo err >&2; exit 5");
        expect(ran.outcome).toEqual(exited(5));
        expect(ran.stdout.toString()).toBe("noise\nout\n");
        expect(ran.stderr.toString()).toMatch(/^err$/m);
      },
      { containerOnly: true },
    );

    taskTest(
      "runScript works when .bashrc sets -e",
      async () => {
        await bashrc("set -eu");
        expect((await runOnce("sleep 600 & exit 3")).outcome).toEqual(exited(3));
        expect((await runOnce("true")).outcome).toEqual(exited(0));
        // A start-up file that exits is a failure.
        await bashrc("exit 0");
        await expect(runOnce("true")).rejects.toThrow(
          "the container's login shell ended with 0 before it read the script",
        );
      },
      { containerOnly: true },
    );

    taskTest(
      "runScript is immune to functions, aliases and options of a start-up file",
      async () => {
        const words =
          "cat tr sed readlink echo printf read command builtin eval exec exit export set unset unalias shopt";
        const functions = [...words.split(" "), "trap", "test", "["];
        const reserved = ["if", "then", "case", "esac", "for", "while", "do", "done", "{"];
        await bashrc(
          [
            "IFS=,; PATH=/nowhere; set -aeufC; shopt -s expand_aliases inherit_errexit",
            ...functions.map((name) => `${name}() { /usr/bin/printf "meddled "; }`),
            ...[...reserved, ...functions].map((name) => `alias ${name}="/usr/bin/printf meddled"`),
          ].join("\n"),
        );
        // With `set -a`, the shell would export the script, and every program would fail with "Argument list too long".
        const script = `#!/usr/bin/env bash
: '${"x".repeat(200_000)}'
/usr/bin/printf '%s\n' "flags $-" "options $BASHOPTS" "script $FARGATE_SCRIPT" "path $PATH"
list='a b,c'; for word in $list /etc/hostnam?; do /usr/bin/printf '<%s>\n' "$word"; done
/bin/false
: >/tmp/same; : >/tmp/same
/usr/bin/env | /usr/bin/wc -l >/dev/null && /usr/bin/printf 'programs start\n'
/usr/bin/printf '%s' '  a line break at the end
' `;
        const ran = await runOnce(script);
        expect(ran.stderr.toString()).toBe("");
        const [flags, options, ...rest] = ran.stdout.toString().split("\n");
        expect(flags).toBe("flags hBc");
        expect(options).not.toMatch(/expand_aliases|inherit_errexit/);
        expect(rest).toEqual([
          ...["script ", "path /nowhere", "<a>", "<b,c>", "</etc/hostname>", "programs start"],
          ...["  a line break at the end", ""],
        ]);
        expect(ran.outcome).toEqual(exited(0));
      },
      { containerOnly: true },
    );

    taskTest(
      "runScript passes a start-up file's variables and functions to a script",
      async () => {
        await bashrc("export OWN=value; plain=text; PATH=/opt/own:$PATH; greet() { echo hello; }");
        const ran = await runOnce("echo $OWN $plain; greet; echo $PATH");
        expect(ran.stdout.toString()).toMatch(/^value text\nhello\n\/opt\/own:\/usr/);
        await bashrc("");
      },
      { containerOnly: true },
    );

    taskTest(
      "runScript ends on SIGTERM while a start-up file hangs",
      async () => {
        await bashrc("sleep 600");
        const stop = new AbortController();
        const connection = await task.logIn();
        const asked = findShells(connection, stop.signal);
        const running = runIn(await task.logIn(), "true", { signal: stop.signal });
        stop.abort(new Failure("system", "stopped by SIGTERM"));
        await expect(asked).rejects.toThrow("stopped by SIGTERM");
        await expect(running).rejects.toThrow("stopped by SIGTERM");
        await bashrc("");
      },
      { containerOnly: true },
    );

    taskTest(
      "runScript names cat when the container lacks it",
      async () => {
        await task.host.exec("mv /usr/bin/cat /usr/bin/cat.off");
        try {
          await expect(runOnce("true")).rejects.toThrow(
            "the container's shell could not read the whole script: the image needs cat",
          );
        } finally {
          await task.host.exec("mv /usr/bin/cat.off /usr/bin/cat");
        }
      },
      { containerOnly: true },
    );
  });

  scriptTest("runScript passes both streams apart and byte for byte", async () => {
    const bytes = Buffer.from(Array.from({ length: 256 }, (_, byte) => byte));
    const octal = [...bytes].map((byte) => `\\${byte.toString(8).padStart(3, "0")}`).join("");
    const ran = await runOnce(`printf '${octal}'; printf '%s' error >&2; printf '${octal}'`);
    expect(ran.outcome).toEqual(exited(0));
    expect(ran.stdout.equals(Buffer.concat([bytes, bytes]))).toBe(true);
    expect(ran.stderr.toString()).toBe("error");
  });

  scriptTest("runScript leaves standard input empty for the commands of a script", async () => {
    const ran = await runOnce('read -r line; echo "$? [$line]"; cat; wc -c');
    expect(
      ran.stdout
        .toString()
        .trim()
        .split("\n")
        .map((line) => line.trim()),
    ).toEqual(["1 []", "0"]);
  });

  scriptTest("runScript does not wait for a process in the background", async () => {
    const ran = await runOnce("sleep 300 & (sleep 300; echo late) & echo $!; echo done");
    expect(ran.outcome).toEqual(exited(0));
    expect(ran.stdout.toString()).toMatch(/^\d+\ndone\n$/);
    const pid = ran.stdout.toString().split("\n")[0];
    // The process is not ended: a server that one stage starts is there for the next.
    const next = await runOnce(`kill -0 ${pid} && echo lives`);
    expect(next.stdout.toString()).toBe("lives\n");
  });

  scriptTest(
    "runScript lets a background process write to the job's output after its end",
    async () => {
      const listed = "for f in /proc/[0-9]*/comm; do grep -x cat $f; done 2>/dev/null | wc -l";
      const cats = async () => Number((await task.host.exec(listed, CONTAINER)).output);
      const before = await cats();
      const { outcome, stdout } = await runOnce(
        "trap 'echo >/root/pipe' PIPE; while echo line; do date +%N >/root/wrote; sleep 0.1; done & echo $!; exit 3",
      );
      expect(outcome).toEqual(exited(3));
      const [, pid] = /^(\d+)$/m.exec(stdout.toString()) ?? [];
      const next = await runOnce(
        `before=$(cat /root/wrote); until [ "$(cat /root/wrote)" != "$before" ]; do sleep 0.1; done; ls /root; kill ${pid}`,
      );
      expect(next.outcome).toEqual(exited(0));
      expect(next.stdout.toString()).toMatch(/^wrote$/m);
      expect(next.stdout.toString()).not.toMatch(/^pipe$/m);
      await expect.poll(cats, { timeout: 30_000 }).toBeLessThanOrEqual(before); // the reader of its pipes ends with it
    },
    { containerOnly: true },
  );

  sshTest(
    "findPipeHolders reads the listing of BusyBox's ls",
    async () => {
      const { output } = await task.host.exec("echo | sh -c 'busybox ls -ln /proc/$$/fd/[0-2]; :'");
      const [, pipe = ""] = /fd\/1 -> (.*)/.exec(output) ?? [];
      expect(pipe).toMatch(/^pipe:/);
      expect(findPipeHolders(output, [pipe])).toMatchObject({ filter: true, paths: [expect.stringMatching(/fd\/1$/)] });
    },
    { containerOnly: true },
  );

  scriptTest(
    "runScript does not wait for a background process that floods the output",
    async () => {
      const ran = await runOnce("yes & echo $! >&2; exit 4");
      expect(ran.outcome).toEqual(exited(4));
      expect(ran.stdout.length).toBeGreaterThan(0);
      await task.host.exec(`kill ${ran.stderr.toString().trim()}`);
    },
    // It moves hundreds of megabytes, while other test files use the processors.
    { timeout: 120_000 },
  );

  scriptTest("runScript keeps all output of a filter that outlives a background process", async () => {
    const ran = await runOnce("exec > >(cat; sleep 1; echo filtered); sleep 0.5 & echo done");
    expect(ran).toMatchObject({ outcome: exited(0), stdout: Buffer.from("done\nfiltered\n") });
  });

  scriptTest("runScript waits at most 10 s for a filter that does not end", async () => {
    const connection = await task.logIn();
    const warnings: string[] = [];
    const warner = { ...log, warn: (text: string) => void warnings.push(text) };
    const out = collect();
    const outcome = await runScript(
      connection,
      Buffer.from("tail -f /dev/null | sleep 300 & echo done"),
      { interpreter: "bash", loginShell: "bash" },
      { signal: never, log: warner, stdout: out.sink, stderr: collect().sink },
    );
    connection.client.end();
    expect(outcome).toEqual(exited(0));
    expect(out.bytes().toString()).toBe("done\n");
    // Through the relay, the agent stops waiting, and the driver sees only the relay's own processes.
    const warning = "a process still holds the script's output open after 10 s; its further output is lost";
    expect(warnings).toEqual(isRelayed ? [] : [warning]);
  });

  for (const form of ["17.9", "19.x"] as const)
    scriptTest(`runScript keeps all output of a process substitution in form ${form}`, async () => {
      expect(await lostOutput(task.logIn, form, { runs: 2, sorts: 1, runScript })).toEqual([]);
    });

  scriptTest("runScript passes scripts of 1 MB and 20 MB whole", async () => {
    for (const size of [1_000_000, 20_000_000]) {
      const text = "0123456789".repeat(size / 10);
      const ran = await runOnce(`x='${text}'\necho "\${#x}"; printf %s "$x" | sha256sum`);
      const sum = createHash("sha256").update(text).digest("hex");
      expect(ran.stdout.toString()).toBe(`${size}\n${sum}  -\n`);
    }
  });

  scriptTest("runScript keeps a script off disks, arguments and environments", async () => {
    const places = hosts.kind === "container" ? "/root /tmp /var /run /etc /dev/shm" : "$HOME/nowhere";
    /** The numbers of processes and of files that contain the text. The bracket keeps the search from finding itself. */
    const found = async (text: string) => {
      const pattern = `[${text[0]}]${text.slice(1)}`;
      const shown = `cat /proc/[0-9]*/cmdline /proc/[0-9]*/environ 2>/dev/null | tr '\\0' '\\n' | grep -c '${pattern}'`;
      const { output } = await task.host.exec(`${shown}; grep -rl '${pattern}' ${places} 2>/dev/null | wc -l`);
      return output.trim().split(/\s+/).map(Number);
    };
    for (const [plant, expected] of [
      [(secret: string) => `: ${secret}`, (counts: number[]) => expect(counts).toEqual([0, 0])],
      // Proves that the search can find something.
      [(secret: string) => `export X=${secret}`, ([shown]: number[]) => expect(shown).toBeGreaterThan(0)],
    ] as const) {
      const secret = `secret-${Math.random().toString(36).slice(2)}`;
      const stop = new AbortController();
      const out = collect();
      const running = runScript(
        await task.logIn(),
        Buffer.from(`${plant(secret)}\necho ready; sleep 600`),
        { interpreter: "bash", loginShell: "bash" },
        { signal: stop.signal, log, stdout: out.sink, stderr: collect().sink },
      );
      await expect.poll(() => out.bytes().toString(), { timeout: 30_000 }).toBe("ready\n");
      expected(await found(secret));
      stop.abort(new Failure("system", "stopped"));
      await expect(running).rejects.toThrow("stopped");
    }
  });

  for (const [shell, path] of [
    ["bash", "/bin/bash"],
    ["dash", "/bin/dash"],
    ["busybox", "/usr/local/bin/ash"],
  ] as const)
    describe(`${shell}`, () => {
      beforeAll(async () => {
        if (hosts.kind !== "container") return;
        const setUp = `ln -sf "$(command -v busybox)" /usr/local/bin/ash && usermod --shell ${path} root`;
        expect((await task.host.exec(setUp, CONTAINER)).exitCode).toBe(0);
        if (isRelayed) await task.host.exec(`ln -sf "$(command -v ${shell})" /usr/local/bin/sh`);
      });
      afterAll(async () => {
        if (hosts.kind !== "container") return;
        await task.host.exec("usermod --shell /bin/bash root", CONTAINER);
        if (isRelayed) await task.host.exec("rm /usr/local/bin/sh");
      });
      // The login shell can only be changed in a container.
      const options = { containerOnly: shell !== "bash" };
      const own = () => ({
        interpreter: shell === "bash" ? ("bash" as const) : ("sh" as const),
        loginShell: hosts.kind === "container" ? (path.split("/").at(-1) as string) : "bash",
      });

      const cases: [string, string, number, string][] = [
        ["an exit in the middle", "echo one\nexit 42\necho two\n", 42, "one\n"],
        ["set -e", "set -e\necho one\nfalse\necho two\n", 1, "one\n"],
        ["a missing newline at the end", "printf '%s' one", 0, "one"],
        ["a here-document at the end", "cat <<'X'\none $two\nX", 0, "one $two\n"],
        ["a comment at the end", "echo one # two", 0, "one\n"],
        ["bytes that are not UTF-8", "printf '%s' 'Gr\u00fc\u00df'", 0, "Gr\u00fc\u00df"],
        ["a syntax error in the middle", "echo one\nif then\necho two\n", 2, "one\n"],
        [
          "a function, a loop and a trap",
          "f() { echo $1; }; trap 'f end' EXIT; for i in 1 2; do f $i; done",
          0,
          "1\n2\nend\n",
        ],
      ];
      for (const [what, script, code, output] of cases)
        scriptTest(
          `runScript handles ${what}`,
          async () => {
            const ran = await runOnce(Buffer.from(script, what.includes("UTF-8") ? "latin1" : "utf8"), own());
            expect(ran.outcome).toEqual(exited(code));
            expect(ran.stdout.toString(what.includes("UTF-8") ? "latin1" : "utf8")).toBe(output);
          },
          options,
        );

      scriptTest(
        "runScript handles 1 MB",
        async () => {
          const ran = await runOnce(`x='${"y".repeat(1_000_000)}'; echo \${#x}`, own());
          expect(ran).toMatchObject({ outcome: exited(0), stdout: Buffer.from("1000000\n") });
        },
        options,
      );

      scriptTest(
        "runScript runs no command of a script whose connection is cut",
        async () => {
          const trace = hosts.kind === "container" ? "/tmp/began" : join(directory(), "began");
          const script = `echo began >>${trace}\n: '${"x".repeat(1_000_000)}'\n`;
          const began = async () => (await task.host.exec(`cat ${trace} 2>/dev/null; rm -f ${trace}`)).output;
          const over = async (cutAfter?: number) => {
            const proxy = await startProxy(
              { host: task.target.host, port: task.target.Port },
              cutAfter === undefined ? {} : { cutAfter },
            );
            try {
              const connection = await task.logIn({ ...task.target, host: "127.0.0.1", Port: proxy.port });
              return { ...(await runIn(connection, script, own())), sent: proxy.sent };
            } finally {
              await proxy.close();
            }
          };
          const whole = await over();
          expect(whole.outcome).toEqual(exited(0));
          expect(await began()).toBe("began\n");
          // The marks of all running shells. Background processes of other tests have marks, too.
          const shells = "cat /proc/[0-9]*/cmdline 2>/dev/null";
          const marks = async () =>
            new Set((await task.host.exec(shells, CONTAINER)).output.match(/fargate-[0-9a-f]{32}(?= incomplete)/g));
          const earlier = await marks();
          for (const part of [0.1, 0.5, 0.99]) {
            const cut = await over(Math.floor(whole.sent * part));
            expect(cut.outcome.ended).toBe("lost");
            // Waits until the remote shell has ended. It would have run the script by then.
            await expect.poll(marks).toEqual(earlier);
            expect(await began()).toBe("");
          }
        },
        options,
      );
    });

  scriptTest("runScript passes the script to an interpreter that is not the login shell", async () => {
    const ran = await runOnce('echo "$0 ${BASH_VERSION:+bash}"', { interpreter: "sh", loginShell: "bash" });
    expect(ran.stdout.toString().trim()).toBe("sh");
    const other = await runOnce('echo "$0 ${BASH_VERSION:+bash}"', { interpreter: "bash", loginShell: "fish" });
    expect(other.stdout.toString()).toBe("bash bash\n");
  });

  scriptTest("runScript passes 200 MB to a slow reader in bounded memory", async () => {
    const connection = await task.logIn();
    let bytes = 0;
    let queued = 0;
    const slow = new Writable({
      highWaterMark: 65_536,
      write(chunk: Buffer, _, done) {
        bytes += chunk.length;
        queued = Math.max(queued, slow.writableLength);
        setImmediate(done);
      },
    });
    const outcome = await runScript(
      connection,
      Buffer.from("head -c 200000000 /dev/zero"),
      { interpreter: "bash", loginShell: "bash" },
      { signal: new AbortController().signal, log, stdout: slow, stderr: new PassThrough() },
    );
    connection.client.end();
    expect(outcome).toEqual(exited(0));
    expect(bytes).toBe(200_000_000);
    // Bytes queued in this process: at most the first window (2 MiB), and less than another one.
    expect(queued).toBeLessThan(4 * 2 ** 20);
  });

  for (const [what, script] of [
    ["a sleeping command", "sleep 600"],
    ["a loop that ignores TERM", "trap '' TERM; while :; do sleep 1; done"],
    ["a command in a group of its own", "timeout 600 sleep 600"],
    ["children in the background", "sleep 600 & sleep 600 & wait"],
  ] as const)
    scriptTest(`runScript terminates ${what} when its signal aborts`, async () => {
      const id = `token-${Math.random().toString(36).slice(2)}`;
      const stop = new AbortController();
      const connection = await task.logIn();
      const out = collect();
      const running = runScript(
        connection,
        Buffer.from(`export FARGATE_TEST=${id}; echo ready; ${script}`),
        { interpreter: "bash", loginShell: "bash" },
        { signal: stop.signal, log, stdout: out.sink, stderr: collect().sink },
      );
      const marked = `grep -lz '^FARGATE_TEST=${id}$' /proc/[0-9]*/environ 2>/dev/null | wc -l`;
      await expect
        .poll(async () => Number((await task.host.exec(marked)).output), { timeout: 30_000 })
        .toBeGreaterThan(0);
      stop.abort(new Failure("system", "stopped by SIGTERM"));
      await expect(running).rejects.toThrow("stopped by SIGTERM");
      expect(Number((await task.host.exec(marked)).output)).toBe(0);
    });

  // Through the relay, a cancel ends all processes of the container: see "relay" below.
  sshTest("runScript spares what another stage left in the background", async () => {
    const { stdout } = await runOnce("sleep 300 >/dev/null 2>&1 & echo $!");
    const stop = new AbortController();
    const out = collect();
    const running = runScript(
      await task.logIn(),
      Buffer.from("echo ready; sleep 600"),
      { interpreter: "bash", loginShell: "bash" },
      { signal: stop.signal, log, stdout: out.sink, stderr: collect().sink },
    );
    await expect.poll(() => out.bytes().toString(), { timeout: 30_000 }).toBe("ready\n");
    stop.abort(new Failure("system", "stopped"));
    await expect(running).rejects.toThrow("stopped");
    expect((await runOnce(`kill -0 ${stdout.toString().trim()}`)).outcome).toEqual(exited(0));
  });

  sshTest("connect logs in with both types of key", async () => {
    const rsa = await makeKeyPair("rsa");
    const file = hosts.kind === "container" ? "/run/sshd/authorized_keys" : undefined;
    if (file) await task.host.exec(`echo '${rsa.publicKey}' >>${file}`);
    const server = file
      ? undefined
      : await startSshServer({ address: "127.0.0.1", port: 0, authorizedKey: rsa.publicKey, home: directory() });
    const target = server ? { ...task.target, host: server.address, Port: server.port } : task.target;
    const connection = await task.logIn({ ...target, privateKey: rsa.privateKey });
    expect((await runIn(connection, "exit 3")).outcome).toEqual(exited(3));
    connection.client.end();
    await server?.close();
  });

  sshTest("connect refuses a wrong host key, key or user", async () => {
    const { hostKey, client } = await task.logIn();
    client.end();
    await expect(
      connect({ ...task.target, hostKey }, 3_000, never).then(({ client }) => client.end()),
    ).resolves.toBeDefined();
    const changed = Buffer.from(hostKey);
    changed[changed.length - 1] = (changed.at(-1) as number) ^ 1;
    await expect(connect({ ...task.target, hostKey: changed }, 3_000, never)).rejects.toThrow(
      "the server's host key is not the one that prepare saw",
    );
    const other = await makeKeyPair("ed25519");
    await expect(connect({ ...task.target, privateKey: other.privateKey }, 3_000, never)).rejects.toThrow(
      "the server refused the key",
    );
  });

  sshTest("runScript drops a server that makes the process too large", async () => {
    const { rss } = process.memoryUsage;
    const connection = await task.logIn();
    try {
      Object.assign(process.memoryUsage, { rss: () => rss() + 2 ** 40 }); // far more than the process can shrink meanwhile
      // The sleep keeps the script from ending before the connection.
      const { outcome } = await runIn(connection, "head -c 20000000 /dev/zero; sleep 600");
      const reason = "the server makes this process use too much memory";
      expect(outcome).toEqual({ ended: "lost", begun: true, wasSilent: false, reason });
    } finally {
      Object.assign(process.memoryUsage, { rss });
      connection.client.destroy();
    }
  });

  sshTest("runScript reports a connection that breaks in the middle of a script", async () => {
    const proxy = await startProxy({ host: task.target.host, port: task.target.Port });
    const connection = await task.logIn({ ...task.target, host: "127.0.0.1", Port: proxy.port });
    const out = collect();
    const running = runScript(
      connection,
      Buffer.from("echo ready; sleep 600"),
      { interpreter: "bash", loginShell: "bash" },
      { signal: new AbortController().signal, log, stdout: out.sink, stderr: collect().sink },
    );
    await expect.poll(() => out.bytes().toString(), { timeout: 30_000 }).toBe("ready\n");
    proxy.cut();
    expect(await running).toMatchObject({ ended: "lost", begun: true });
    await proxy.close();
  });
});

// ---------------------------------------------------------------------------------------------------------
// 12. The relay to the container `build`
// ---------------------------------------------------------------------------------------------------------

describe("relay", () => {
  type Pair = Awaited<ReturnType<typeof startPair>>;
  const exited = (code: number) => ({ ended: "exited", code });
  const relayTest = (name: string, body: () => Promise<void>, timeout = 60_000) =>
    taskTest(name, body, { containerOnly: true, timeout });

  interface CallOptions {
    shell?: string;
    signal?: AbortSignal;
    grace?: number;
    out?: ReturnType<typeof collect>;
    login?: Connection;
  }
  /** Runs a script in `build`. Without `login`, over a connection of its own. */
  async function call(pair: Pair, script: string, options: CallOptions = {}) {
    const { shell = "sh", signal = never, grace = 5, out = collect() } = options;
    const err = collect();
    const login = options.login ?? (await pair.logIn());
    const connection = { ...login, target: { ...login.target, CancelGracePeriod: grace } };
    const interpreter = shell === "bash" ? "bash" : "sh";
    const shells = { interpreter, loginShell: "bash" } as const;
    const context = { signal, log, stdout: out.sink, stderr: err.sink };
    try {
      const outcome = await callBuild(connection, interpreter, Buffer.from(script), shells, context);
      return { outcome, stdout: out.bytes().toString(), stderr: err.bytes().toString() };
    } finally {
      if (!options.login) login.client.end();
    }
  }

  /** Calls a script. `ready` settles once it runs, `ended` when the call has ended. */
  const beginLater = (pair: Pair, script: string, options?: Parameters<typeof call>[2]) => {
    const out = collect();
    const ended = call(pair, `echo ready; ${script}`, { ...options, out }).catch((error: Error) => error);
    const ready = expect.poll(() => out.bytes().toString(), { timeout: 30_000 }).toMatch(/^ready$/m);
    return { ended, ready };
  };

  /** What remains of calls: their directories, and processes besides the agent's five. */
  const left = async (pair: Pair) => {
    const { output } = await pair.host.exec(
      "ls -A /.fargate; pgrep -c -f 'fargate-[0-9a-f]{32}'; pgrep -c -x 'cat|sleep'",
      CONTAINER,
    );
    const agents = "n=0; for p in /proc/[0-9]*; do [ $p/fd/3 -ef /.fargate/calls ] && n=$((n+1)); done; echo $n";
    return `${output}${(await pair.host.exec(agents)).output}`.trim().split(/\s+/);
  };
  const NOTHING_LEFT = ["calls", "0", "0", "5"];

  async function withPair(options: Parameters<typeof startPair>[0], body: (pair: Pair) => Promise<void>) {
    const pair = await startPair(options);
    try {
      await body(pair);
    } finally {
      await pair.host.stop();
    }
  }

  /** Calls scripts with these exit codes, four at a time. @returns those with a wrong outcome or output */
  async function wrongCalls(pair: Pair, codes: readonly number[], shell: string): Promise<string[]> {
    const queue = [...codes];
    const wrong: string[] = [];
    const work = async () => {
      while (queue.length > 0) {
        const login = await pair.logIn();
        for (const code of queue.splice(0, 4)) {
          const ran = await call(pair, `echo out${code}; echo err${code} >&2; exit ${code}`, { shell, login });
          const expected = { outcome: exited(code), stdout: `out${code}\n`, stderr: `err${code}\n` };
          if (JSON.stringify(ran) !== JSON.stringify(expected)) wrong.push(JSON.stringify([code, ran]));
        }
        login.client.end();
      }
    };
    await Promise.all([work(), work(), work(), work()]);
    return wrong;
  }

  describe("shared containers", () => {
    let pair: Pair;
    beforeAll(async () => {
      if (hosts.kind === "container") pair = await startPair();
    });
    afterAll(() => pair?.host.stop());

    relayTest("callBuild returns each exit code of concurrent calls, and leaves nothing", async () => {
      const codes = Array.from({ length: 256 }, (_, code) => code);
      expect(await wrongCalls(pair, codes, "sh")).toEqual([]);
      await expect.poll(() => left(pair)).toEqual(NOTHING_LEFT);
      const { output } = await pair.host.exec("grep -l '^State:.Z' /proc/[0-9]*/status 2>/dev/null | wc -l");
      expect(output.trim()).toBe("0");
    });

    relayTest("callBuild keeps two streams of 25 MB apart", async () => {
      const script = "head -c 25000000 /dev/zero | tr '\\0' o & head -c 25000000 /dev/zero | tr '\\0' e >&2; wait";
      const { outcome, stdout, stderr } = await call(pair, script);
      expect(outcome).toEqual(exited(0));
      expect([/^o{25000000}$/.test(stdout), /^e{25000000}$/.test(stderr)]).toEqual([true, true]);
    });

    relayTest("callBuild shows a script the environment of its container", async () => {
      const { stdout } = await call(pair, 'echo "$OWN"; env | grep -c FARGATE_');
      expect(stdout).toBe("value\n0\n");
    });

    relayTest("callBuild runs scripts that do not ignore SIGINT", async () => {
      for (const shell of ["sh", "bash"]) {
        const { stdout } = await call(pair, "sh -c 'kill -INT $$'; echo $?", { shell });
        expect(stdout).toBe("130\n");
      }
    });

    for (const script of ["kill 0; sleep 600", "kill -TERM -1; exit 143", "kill -9 -1", "kill -9 0"])
      relayTest(`callBuild works again after a script that calls ${script.split(";")[0]}`, async () => {
        const { outcome } = await call(pair, script);
        expect(outcome).toEqual(script.includes("-9") ? { ended: "dead" } : exited(143));
        expect((await call(pair, "exit 3")).outcome).toEqual(exited(3));
        await expect.poll(() => left(pair)).toEqual(NOTHING_LEFT);
      });

    relayTest("callBuild ends all processes of cancelled scripts, one after another", async () => {
      for (const [script, times] of [
        ["setsid sleep 600 & sleep 600", 5],
        ["trap '' TERM; while :; do sleep 1; done", 2],
      ] as const)
        for (let i = 0; i < times; i++) {
          const stop = new AbortController();
          const { ended, ready } = beginLater(pair, script, { signal: stop.signal, grace: 1 });
          await ready;
          stop.abort(new Failure("system", "stopped"));
          expect(await ended).toMatchObject({ message: "stopped" });
          const { output } = await pair.host.exec("grep -l sleep /proc/[0-9]*/comm 2>/dev/null");
          expect(output).toBe("");
          // As after_script does.
          expect((await call(pair, "exit 4")).outcome).toEqual(exited(4));
        }
    });

    relayTest("callBuild runs no script that is cancelled before the agent accepts it", async () => {
      const stop = new AbortController();
      await pair.host.pause();
      const ended = call(pair, "echo began >/builds/began", { signal: stop.signal, grace: 1 }).catch((error) => error);
      const arrived = async () => (await pair.host.exec("ls /.fargate", CONTAINER)).output;
      await expect.poll(arrived).toMatch(/\.sh$/m);
      stop.abort(new Failure("system", "stopped"));
      expect(await ended).toMatchObject({ message: "stopped" });
      await pair.host.resume();
      expect((await call(pair, "cat /builds/began; exit 5")).outcome).toEqual(exited(5));
      expect((await call(pair, "[ -e /builds/began ]")).outcome).toEqual(exited(1));
      await pair.host.exec("rm -rf /.fargate/*.sh", CONTAINER);
    });

    relayTest("callBuild works after a relay that was killed, whose script runs whole or not", async () => {
      const script = `echo begin >>/builds/trace; : '${"x".repeat(300_000)}'; echo end >>/builds/trace`;
      for (let ms = 0; ms < 120; ms += 10) {
        const running = call(pair, script).catch((error) => error);
        const kill = `sleep 0.0${String(ms).padStart(2, "0")}; pkill -KILL -f 'fargate-[0-9a-f]{32}'`;
        await pair.host.exec(ms < 100 ? kill : kill.replace("0.0", "0."), CONTAINER);
        await running;
        expect((await call(pair, "exit 6")).outcome).toEqual(exited(6));
      }
      const { stdout } = await call(pair, "cat /builds/trace 2>/dev/null");
      expect(stdout).toMatch(/^(begin\nend\n)*$/);
      await pair.host.exec("rm -rf /.fargate/*.sh*", CONTAINER);
    });

    relayTest("callBuild does not depend on the files of a call after its start", async () => {
      const damage = "cd /.fargate/*.sh; rm -f out err exit; echo x >out; mkdir err exit; cd /; echo done; exit 7";
      expect(await call(pair, damage)).toMatchObject({ outcome: exited(7), stdout: "done\n" });
      expect((await call(pair, "exit 8")).outcome).toEqual(exited(8));
    });
  });

  for (const shell of ["bash", "busybox"])
    relayTest(`callBuild returns each exit code with ${shell} as sh in both containers`, () =>
      withPair(
        shell === "bash"
          ? { entryPoint: ["/bin/bash", "-c", 'ln -sf /bin/bash /usr/local/bin/sh; exec "$@"', "entry"] }
          : { image: BUSYBOX_IMAGE },
        async (own) => {
          await own.host.exec(`ln -sf "$(command -v ${shell})" /usr/local/bin/sh`, CONTAINER);
          expect(await wrongCalls(own, [0, 1, 2, 126, 127, 128, 130, 137, 143, 254, 255], "sh")).toEqual([]);
          const large = await call(own, `x='${"y".repeat(1_000_000)}'; echo \${#x} "$OWN"`);
          expect(large).toMatchObject({ outcome: exited(0), stdout: "1000000 value\n" });
          const stop = new AbortController();
          const { ended, ready } = beginLater(own, "trap '' TERM; sleep 600", { signal: stop.signal, grace: 1 });
          await ready;
          stop.abort(new Failure("system", "stopped"));
          expect(await ended).toMatchObject({ message: "stopped" });
          expect((await call(own, "exit 3")).outcome).toEqual(exited(3));
        },
      ),
    );

  relayTest("callBuild reports a container that ends before or during a script", () =>
    withPair({}, async (own) => {
      const { ended, ready } = beginLater(own, "sleep 600");
      await ready;
      await own.host.killProcesses();
      expect(await ended).toMatchObject({ outcome: { ended: "dead" } });
      expect((await call(own, "exit 3")).outcome).toEqual(exited(3));
      const second = beginLater(own, "sleep 600");
      await second.ready;
      await own.host.kill();
      expect(await second.ended).toMatchObject({ outcome: { ended: "dead" } });
      expect((await call(own, "exit 3")).outcome).toEqual({ ended: "late" });
      expect(await left(own)).toEqual(["calls", "0", "0"]);
    }),
  );

  relayTest("callBuild gives scripts the image's own variables, whatever their names", () => {
    const names = ["link", "name", "shell", "call", "line", "boot", "code", "limit", "p", "f"];
    const environment = Object.fromEntries(names.map((name) => [name, `of-${name}`]));
    const lines = names.map((name) => `echo ${name}=$${name}`);
    return withPair({ environment }, async (own) => {
      const { outcome, stdout } = await call(own, lines.join("\n"));
      expect({ outcome, stdout }).toEqual({ outcome: exited(0), stdout: names.map((n) => `${n}=of-${n}\n`).join("") });
    });
  });

  relayTest("callBuild does not take an unconfirmed exit code for a script that has not begun", () =>
    withPair({}, async (own) => {
      const login = await own.logIn();
      const exec = login.client.exec.bind(login.client);
      let commands = 0;
      // No second channel, and no second connection, for the command that confirms the exit code.
      login.client.exec = ((command: string, done: (error?: Error) => void) =>
        commands++ === 0 ? exec(command, done as never) : done(new Error("no channel"))) as never;
      const target = { ...login.target, Port: 1 };
      const error = await call(own, "echo once >>/builds/runs; exit 3", { login: { ...login, target } }).catch(
        (e) => e,
      );
      expect(error).toBeInstanceOf(Failure);
      expect(error.message).toMatch(/ended with exit code 3, which is not confirmed/);
      expect(error).not.toHaveProperty("why"); // of an SshFailure, after which the driver sends a script again
      expect((await own.host.exec("cat /builds/runs")).output).toBe("once\n");
    }),
  );

  relayTest("callBuild reports an entry point that does not end in exec", () =>
    withPair({ entryPoint: ["sh", "-c", '"$@"; sleep 600', "entry"] }, async (own) => {
      await expect
        .poll(async () => (await own.host.exec("cat /.fargate/refused", CONTAINER)).output)
        .toMatch(/^\d+\n$/);
      expect((await call(own, "exit 3")).outcome).toEqual({ ended: "refused" });
    }),
  );

  relayTest("callBuild fails after a script that removes the link", () =>
    withPair({}, async (own) => {
      await call(own, "rm -rf /.fargate/*; exit 3").catch(() => {});
      expect((await call(own, "exit 3")).outcome).toEqual({ ended: "late" });
    }),
  );

  for (const [username, coordinator] of [
    ["root", 0],
    ["worker", 1000],
  ] as const)
    for (const user of [0, 1001])
      relayTest(`shareFiles lets users ${coordinator} and ${user} use each other's files and repository`, () =>
        withPair({ user: `${user}`, username }, async (own) => {
          const Build = { Shell: "bash" as const, User: user, CoordinatorUser: coordinator };
          const settings = { JobImage: { BuildsDirectory: BUILDS, CacheDirectory: BUILDS } } as Config;
          const share = (script: string) =>
            shareFiles(Buffer.from(`set -e; ${script}`), { ...someRecord, Build }, settings);
          await own.host.exec(`printf "${GIT_CONFIG}" >/.fargate/gitconfig`, CONTAINER);
          const inCoordinator = async (script: string) => {
            const connection = await own.logIn();
            const [out, err] = [collect(), collect()];
            const text = share(script);
            const context = { signal: never, log, stdout: out.sink, stderr: err.sink };
            const outcome = await runScript(connection, text, { interpreter: "bash", loginShell: "bash" }, context);
            connection.client.end();
            return { outcome, stderr: err.bytes().toString() };
          };
          const inBuild = (script: string) => call(own, share(script).toString(), { shell: "bash" });
          const good = { outcome: exited(0), stderr: "" };
          const identity = "-c user.name=x -c user.email=x@example.com";
          expect(
            await inCoordinator(
              `cd ${BUILDS}; git init -q work; cd work; mkdir sub; echo 1 >sub/file; git add .; git ${identity} commit -qm one; chmod 600 sub/file; chmod 700 sub`,
            ),
          ).toMatchObject(good);
          expect(
            await inBuild(
              `cd ${BUILDS}/work; git status --porcelain; echo 2 >>sub/file; mkdir out; echo 3 >out/new; rm -r sub; git checkout -q sub`,
            ),
          ).toMatchObject(good);
          // Each script opens up the files of its user, at its end.
          expect(await inBuild(`cd ${BUILDS}/work; chmod 600 out/new; chmod 700 out`)).toMatchObject(good);
          expect(
            await inCoordinator(
              `cd ${BUILDS}/work; echo 4 >>out/new; git status --porcelain; rm -r out sub; git clean -fdxq; git checkout -q .`,
            ),
          ).toMatchObject(good);
        }),
      );
});

// ---------------------------------------------------------------------------------------------------------
// The worker image
// ---------------------------------------------------------------------------------------------------------

describe("worker image", () => {
  /** Makes sshd's check of its configuration report UsePAM as an sshd does that was built without PAM, as on Alpine. */
  const SSHD_WITHOUT_PAM = [
    "RUN mv /usr/sbin/sshd /usr/sbin/sshd.pam && printf '%s\\n' '#!/bin/sh' \\",
    `'[ "$1" != -t ] || sed -n "s|^UsePAM .*|$3 line 2: Unsupported option UsePAM|p" "$3" >&2' \\`,
    `'exec /usr/sbin/sshd.pam "$@"' >/usr/sbin/sshd && chmod 755 /usr/sbin/sshd`,
  ];

  /** Runs a script in a new container of the image, then stops the container. */
  async function runWith(
    options: ContainerHostsOptions,
    script: string,
    { environment = {} as Record<string, string>, Username = "root" } = {},
  ): Promise<{ stdout: string; outcome: Outcome; log?: string }> {
    const own = await containerHosts({ packages: PACKAGES, ...options });
    try {
      const { host, logIn } = await startTask(own, environment, Username);
      const connection = await logIn();
      const out = collect();
      const outcome = await runScript(
        connection,
        Buffer.from(script),
        { interpreter: "bash", loginShell: "bash" },
        { signal: never, log, stdout: out.sink, stderr: collect().sink },
      );
      connection.client.end();
      await host.stop(0);
      return { stdout: out.bytes().toString(), outcome, ...(await host.exited) };
    } finally {
      await own.close();
    }
  }

  for (const [what, options, Username, environment] of [
    ["as root", {}, "root", {}],
    ["as root for another user", {}, "worker", { SSH_USER: "worker" }],
    ["on a read-only root file system", { readOnly: true }, "root", {}],
    ["as user 1000", { user: "1000" }, "worker", {}],
    [
      "as user 1000 on a read-only root file system at port 2022",
      { user: "1000", readOnly: true, containerPort: 2022 },
      "worker",
      { SSH_PORT: "2022" },
    ],
    ["as root on a base like Alpine", LIKE_ALPINE, "root", {}],
    ["as root for another user on a base like Alpine", LIKE_ALPINE, "worker", { SSH_USER: "worker" }],
    [
      "as user 1000 on a read-only root on a base like Alpine",
      { ...LIKE_ALPINE, user: "1000", readOnly: true },
      "worker",
      {},
    ],
  ] as const)
    taskTest(
      `the worker image works ${what}`,
      async () => {
        // sshd's configuration contains the container's environment, so only its owner may read it.
        const script = "id -un; touch /tmp/here && stat -c %a /run/sshd/config /tmp/sshd.*/config 2>/dev/null; exit 3";
        const ran = await runWith(options, script, { environment, Username });
        expect(ran.stdout).toBe(`${Username}\n600\n`);
        expect(ran.outcome).toEqual({ ended: "exited", code: 3 });
      },
      { containerOnly: true, timeout: 300_000 },
    );

  for (const [what, sentence, options, environment] of [
    ["an unknown user", "this image has no such user: add one", { user: "1234" }, {}],
    [
      "that user 1000 cannot let root log in",
      "who cannot start a session for another user",
      { user: "1000" },
      { SSH_USER: "root" },
    ],
    [
      "that a read-only root keeps the account locked",
      "the account worker is locked, and /etc/shadow cannot be written",
      { readOnly: true },
      { SSH_USER: "worker" },
    ],
    [
      "that it can write nowhere",
      "neither /run/sshd nor /tmp can be written to",
      { readOnly: true, user: "1000", lines: ["RUN chmod 700 /run/sshd && mv /bin/mktemp /bin/mktemp.off"] },
      {},
    ],
  ] as const)
    taskTest(
      `the worker image reports ${what}`,
      async () => {
        const own = await containerHosts({
          packages: PACKAGES,
          ...options,
          lines: [...("lines" in options ? options.lines : [])],
        });
        try {
          const { publicKey } = await makeKeyPair("ed25519");
          const address = nextAddress();
          const all = { SSH_PUBLIC_KEY: publicKey, ...environment };
          const host = await own.start({ name: "test", address, port: 2222, environment: all });
          const { exitCode, log } = await host.exited;
          expect(exitCode).toBe(64);
          expect(log?.trimEnd().split("\n")).toEqual([expect.stringMatching(/^worker-entrypoint: /)]);
          expect(log).toContain(sentence);
        } finally {
          await own.close();
        }
      },
      { containerOnly: true, timeout: 300_000 },
    );

  for (const [base, options, shell] of [
    ["", {}, "/bin/bash"],
    [" on busybox", LIKE_ALPINE, "/bin/ash"],
  ] as const)
    taskTest(
      // It passes nothing of a login or a shell.
      `the worker image passes its own and the task definition's environment${base}`,
      async () => {
        const environment = {
          FROM_DEFINITION: 'a "b" \\c $d `e` #f\ttab  ',
          EMPTY: "",
          "with.dot": "x",
          SEVERAL_LINES: "one\ntwo=2",
          FARGATE_DEADLINE: "9999999999",
          HOME: "/nowhere",
          USER: "nobody",
          SHLVL: "7",
          BASH_ENV: "/dev/null",
          ENV: "/dev/null",
          UID: "5",
          EUID: "5",
          PPID: "5",
          SHELLOPTS: "xtrace",
          BASHOPTS: "extglob",
          IFS: "x",
          PS4: "$(echo evil)",
          "BASH_FUNC_cat%%": "() { echo evil; }",
        };
        const lines = ["ENV FROM_IMAGE=image PATH=/opt/tools/bin:/usr/local/bin:/usr/bin:/bin"];
        const ran = await runWith({ ...options, lines }, "tr '\\0' '\\n' </proc/$$/environ | sort", { environment });
        const seen = ran.stdout.split("\n").filter((line) => line && !/^(SSH_C|HOSTNAME|LANG|MOTD)/.test(line));
        expect(seen).toEqual([
          "EMPTY=",
          "FARGATE_ENVIRONMENT=passed",
          `FROM_DEFINITION=${environment.FROM_DEFINITION}`,
          "FROM_IMAGE=image",
          "HOME=/root",
          "LOGNAME=root",
          "MAIL=/var/mail/root",
          "PATH=/opt/tools/bin:/usr/local/bin:/usr/bin:/bin",
          `SHELL=${shell}`,
          "USER=root",
        ]);
        expect(ran.log).toContain("not passed to sessions, because their values contain line breaks: SEVERAL_LINES \n");
      },
      { containerOnly: true, timeout: 300_000 },
    );

  /** Runs a test with a new container of the image. */
  function withTask(
    name: string,
    options: ContainerHostsOptions,
    body: (task: Awaited<ReturnType<typeof startTask>>) => Promise<void>,
  ) {
    taskTest(
      name,
      async () => {
        const own = await containerHosts({ packages: PACKAGES, ...options });
        try {
          await body(await startTask(own));
        } finally {
          await own.close();
        }
      },
      { containerOnly: true, timeout: 300_000 },
    );
  }

  /** Runs a script in a container, and returns its output. */
  async function outputOf(client: Client, script: string): Promise<string> {
    const channel = await new Promise<ClientChannel>((resolve, reject) =>
      client.exec(script, (error, opened) => (error ? reject(error) : resolve(opened))),
    );
    let output = "";
    for await (const chunk of channel) output += chunk;
    return output;
  }

  withTask("sshd-image/entrypoint.sh is a script for dash and for busybox", {}, async ({ host }) => {
    const path = "/usr/local/bin/worker-entrypoint";
    expect(await host.exec(`dash -n ${path} 2>&1 && busybox sh -n ${path} 2>&1`)).toEqual({ exitCode: 0, output: "" });
  });

  withTask("the worker image asks apk for its packages on a base like Alpine", LIKE_ALPINE, async ({ host }) => {
    const packages = `bash ca-certificates curl git git-lfs musl-utils openssh ${PACKAGES.join(" ")}`;
    expect((await host.exec("cat /etc/apk/world")).output).toBe(`add --no-cache ${packages}\n`);
    expect((await host.exec("git config --system filter.lfs.process")).output).toBe("git-lfs filter-process\n");
  });

  withTask("the worker image lets any user write builds and caches", {}, async ({ host }) => {
    const script = "cd /opt/gitlab-runner && mkdir builds/x cache/x && stat -c %U builds/x cache/x";
    expect((await host.exec(`setpriv --reuid=1000 --clear-groups sh -c '${script}'`)).output).toBe("worker\nworker\n");
  });

  for (const builder of ["classic", "buildkit"] as const) {
    for (const from of ["image", "file"] as const)
      taskTest(
        `the worker image gets gitlab-runner from a given ${from} (${builder} builder)`,
        async () => {
          const script = '#!/bin/sh\necho "stand-in $1 $(id -u)"\n';
          const log = await buildWorkerImage({ ...LIKE_ALPINE, gitlabRunner: { script, from } }, builder);
          expect(log).toContain("stand-in --version 0\n");
          expect(log).not.toMatch(/^No gitlab-runner/m);
        },
        { containerOnly: true, timeout: 300_000 },
      );
    taskTest(
      `the worker image says what is lost without gitlab-runner (${builder} builder)`,
      async () => {
        const log = await buildWorkerImage(LIKE_ALPINE, builder);
        expect(log.match(/^No gitlab-runner .*/gm)).toEqual([
          "No gitlab-runner in this image: jobs can neither pass on artifacts nor use caches (see RUNNER_IMAGE).",
        ]);
      },
      { containerOnly: true, timeout: 300_000 },
    );
  }

  taskTest(
    "the worker image refuses a base without sshd and a package manager",
    async () => {
      const building = buildWorkerImage({ baseLines: ["RUN rm /usr/bin/apt-get"] }, "classic");
      await expect(building).rejects.toThrow("The base image has neither apt-get nor apk, and no ");
    },
    { containerOnly: true, timeout: 300_000 },
  );

  withTask(
    "the worker image can be built on a base that has the programs already",
    { ...LIKE_ALPINE, baseLines: [...(LIKE_ALPINE.baseLines ?? []), "RUN rm /usr/bin/apk"] },
    async ({ logIn }) => {
      const { client } = await logIn();
      expect(await outputOf(client, "id -un")).toBe("root\n");
      client.end();
    },
  );

  withTask(
    "a job finds the gitlab-runner of the worker image",
    { gitlabRunner: { script: '#!/bin/sh\necho "stand-in $1"\n', from: "file" } },
    async ({ logIn }) => {
      const { client } = await logIn();
      expect(await outputOf(client, "gitlab-runner artifacts-uploader")).toBe("stand-in artifacts-uploader\n");
      client.end();
    },
  );

  withTask("the worker image offers a login with the key only", {}, async ({ target }) => {
    const client = new Client();
    const offered = await new Promise((resolve, reject) =>
      client.on("error", reject).connect({
        host: target.host,
        port: target.Port,
        username: "root",
        authHandler: (left, _partial, next) => {
          if (left) resolve(left);
          else next({ type: "none", username: "root" });
        },
      }),
    );
    client.destroy();
    expect(offered).toEqual(["publickey"]);
  });

  withTask("the worker image forwards no connections", {}, async ({ logIn }) => {
    const { client } = await logIn();
    const answers = await Promise.all(
      [
        (then: (error?: Error | null) => void) => client.forwardOut("127.0.0.1", 1, "127.0.0.1", 22, then),
        (then: (error?: Error | null) => void) => client.forwardIn("127.0.0.1", 0, then),
        (then: (error?: Error | null) => void) => client.openssh_forwardOutStreamLocal("/run/x", then),
        (then: (error?: Error | null) => void) => client.openssh_forwardInStreamLocal("/run/x", then),
        (then: (error?: Error | null) => void) => client.exec("true", { x11: true }, then),
      ].map((ask) => new Promise((resolve) => ask((error) => resolve(error?.message)))),
    );
    for (const answer of answers) expect(answer).toMatch(/^(\(SSH\) Channel open failure: |Unable to )/);
    client.end();
  });

  withTask("the worker image forwards no agent", {}, async ({ target: { host, Port: port, privateKey } }) => {
    const client = new Client();
    client.connect({ host, port, username: "root", privateKey, agent: "/run/agent", agentForward: true });
    await once(client, "ready");
    const asked = new Promise((resolve) => client.exec("true", (error) => resolve(error?.message)));
    expect(await asked).toBe("Unable to request agent forwarding");
    client.end();
  });

  withTask(
    "the worker image ends the session of a client that has fallen silent",
    {
      command: [
        "sed -i 's/^ClientAliveInterval .*/ClientAliveInterval 1/; s/^ClientAliveCountMax .*/ClientAliveCountMax 2/' \\",
        "  /usr/local/bin/worker-entrypoint",
        "exec sh /usr/local/bin/worker-entrypoint",
      ].join("\n"),
    },
    async ({ host, target, logIn }) => {
      const proxy = await startProxy({ host: target.host, port: target.Port });
      const { client } = await logIn({ ...target, host: "127.0.0.1", Port: proxy.port, KeepAliveInterval: 0 });
      const running = outputOf(client, "sleep 600").catch(() => {});
      const sessions = () => host.exec("cat /proc/[0-9]*/cmdline | tr '\\0' '\\n' | grep -c 'sshd.*: root@nott[y]'");
      await expect.poll(async () => (await sessions()).output, { timeout: 30_000 }).toBe("1\n");
      proxy.stall();
      await expect.poll(async () => (await sessions()).output, { timeout: 50_000 }).toBe("0\n");
      await proxy.close();
      await running;
    },
  );

  withTask("the worker image waits longer for a silent driver than the driver for it", {}, async ({ host }) => {
    const { output } = await host.exec("/usr/sbin/sshd -T -f /run/sshd/config");
    const value = (name: string) => Number(new RegExp(`^${name} (\\d+)$`, "m").exec(output)?.[1]);
    const { KeepAliveInterval } = readConfig(configFile("guide"), "guide.toml", {}, {}).config.SSH;
    expect(value("clientaliveinterval") * value("clientalivecountmax")).toBeGreaterThan(3 * KeepAliveInterval);
  });

  for (const [version, options, known] of [
    ["9.2", {}, "UsePAM no\n"],
    ["10", { baseImage: NEWER_BASE_IMAGE }, "UsePAM no\nPerSourcePenalties no\n"],
    ["10 without PAM", { baseImage: NEWER_BASE_IMAGE, lines: SSHD_WITHOUT_PAM }, "PerSourcePenalties no\n"],
  ] as const)
    withTask(
      `the worker image uses the options that sshd knows (OpenSSH ${version})`,
      { ...options, lines: [...("lines" in options ? options.lines : [])] },
      async ({ host }) => {
        expect((await host.exec("grep -E 'PAM|Penalties' /run/sshd/config")).output).toBe(known);
      },
    );

  withTask("the worker image lets a job open 50 channels on a connection", {}, async ({ logIn }) => {
    const { client } = await logIn();
    const channels = await Promise.all(Array.from({ length: 50 }, () => outputOf(client, "sleep 1; echo here")));
    expect(channels).toEqual(Array(50).fill("here\n"));
    client.end();
  });

  for (const [version, options] of [
    ["9.2", {}],
    ["10", { baseImage: NEWER_BASE_IMAGE }],
  ] as const) {
    withTask(
      `the worker image lets the driver in beside 50 connections (OpenSSH ${version})`,
      options,
      async ({ host, target, logIn }) => {
        const sockets = Array.from({ length: 50 }, () => connectTcp(target.Port, target.host));
        const greetings = sockets.map((socket) => once(socket, "data").then(([data]) => String(data)));
        for (const greeting of await Promise.all(greetings)) expect(greeting).toMatch(/^SSH-2\.0-/);
        await logIn().then(({ client }) => client.end());
        // Since 9.8, sshd by default refuses an address after some connections that end without a login.
        for (const socket of sockets) socket.destroy();
        const others = "cat /proc/[0-9]*/cmdline | tr '\\0' ' ' | grep -c '\\[preauth\\]\\|\\[accepted\\]'";
        await expect.poll(async () => (await host.exec(others)).output, { timeout: 60_000 }).toBe("0\n");
        await connect(target, 3_000, never).then(({ client }) => client.end());
      },
    );

    withTask(`the worker image reaps orphaned processes (OpenSSH ${version})`, options, async ({ host, logIn }) => {
      const { client } = await logIn();
      const orphans = "for n in $(seq 100); do (exec -a orphan sleep 600 </dev/null >/dev/null 2>&1 &) ; done";
      await outputOf(client, orphans);
      client.end();
      const count = (what: string) =>
        host.exec(`cat /proc/[0-9]*/stat | grep -c '${what}'`).then(({ output }) => output);
      expect(await count("(sleep) . 1 ")).toBe("100\n");
      await host.exec("kill $(grep -l '(sleep) . 1 ' /proc/[0-9]*/stat | cut -d/ -f3)");
      await expect.poll(() => count("(sleep)\\|) Z "), { timeout: 30_000 }).toBe("0\n");
    });
  }

  for (const [base, options] of [
    ["", {}],
    [" under tini", { init: true }],
    [" on a base like Alpine", LIKE_ALPINE],
  ] as const)
    taskTest(
      `the worker image ends its container at FARGATE_DEADLINE${base}`,
      async () => {
        const own = await containerHosts({ packages: PACKAGES, ...options });
        try {
          const { publicKey } = await makeKeyPair("ed25519");
          const deadline = Math.floor(Date.now() / 1000) + 10;
          const environment = { SSH_PUBLIC_KEY: publicKey, FARGATE_DEADLINE: `000${deadline}` };
          const host = await own.start({ name: "test", address: nextAddress(), port: 2222, environment });
          const { exitCode, log } = await host.exited;
          expect(log).toContain(`worker-entrypoint: the deadline ${deadline} has passed: ending the container\n`);
          expect(exitCode).toBe(0);
          expect(Date.now() / 1000).toBeGreaterThan(deadline);
        } finally {
          await own.close();
        }
      },
      { containerOnly: true, timeout: 300_000 },
    );

  withTask("the worker image survives a job that kills all processes", {}, async ({ logIn }) => {
    const { client } = await logIn();
    const closed = once(client, "close");
    await outputOf(client, "kill -KILL -1").catch(() => {});
    await closed;
    const again = await logIn();
    expect(await outputOf(again.client, "echo here")).toBe("here\n");
    again.client.end();
  });
});

describe("container environment of a plain sshd under tini", () => {
  const environment = {
    AWS_REGION: "eu-west-1",
    AWS_CONTAINER_CREDENTIALS_RELATIVE_URI: "/v2/credentials/0123",
    QUOTES: 'a "b" \\c $d `e` $(f) * #g\ttab  ',
    LINES: "one\ntwo=2\n\nfour\n",
    EMPTY: "",
    "with.dot": "x",
    FROM_START_UP: "container",
    SSH_OWN: "x",
    FARGATE_DEADLINE: "9999999999",
    UID: "5",
    EUID: "5",
    PPID: "5",
    BASH_ENV: "/dev/null",
    ENV: "/dev/null",
    SHELLOPTS: "xtrace",
    BASHOPTS: "extglob",
    IFS: "x",
    PS4: "$(echo evil)",
    HOME: "/nowhere",
    PATH: "/opt/tools/bin:/usr/local/bin:/usr/bin:/bin",
    "BASH_FUNC_cat%%": "() { echo evil; }",
  };
  let own: TaskHosts;
  let task: Awaited<ReturnType<typeof startTask>>;
  beforeAll(async () => {
    if (hosts.kind !== "container") return;
    own = await containerHosts({ packages: PACKAGES, lines: plainSshd(TINI) });
    task = await startTask(own, environment);
  });
  afterAll(() => own?.close());

  /** The environment of a script in bash or another shell. */
  async function environmentOf(
    patterns: readonly string[],
    { interpreter = "bash" as "bash" | "sh", loginShell = "bash", script = "" } = {},
  ) {
    const connection = await task.logIn({ ...task.target, PassEnvironment: patterns });
    const out = collect();
    const err = collect();
    const outcome = await runScript(
      connection,
      Buffer.from(`${script}\nexec env -0`),
      { interpreter, loginShell },
      { signal: never, log, stdout: out.sink, stderr: err.sink },
    );
    connection.client.end();
    expect(outcome).toEqual({ ended: "exited", code: 0 });
    const entries = out.bytes().toString().split("\0").filter(Boolean);
    const variables = Object.fromEntries(entries.map((entry) => [entry.split("=", 1)[0], entry.replace(/^.*?=/s, "")]));
    return { variables, errors: err.bytes().toString() };
  }

  const passed = ["AWS_CONTAINER_CREDENTIALS_RELATIVE_URI", "AWS_REGION", "EMPTY", "FROM_START_UP", "LINES", "QUOTES"];
  for (const shell of ["bash", "sh", "ash"] as const)
    taskTest(
      // It passes nothing of a login or a shell.
      `runScript passes the whole environment to ${shell} with PassEnvironment ["*"]`,
      async () => {
        if (shell === "ash") await task.host.exec("mv /bin/sh /bin/sh.off; ln -s /bin/busybox /bin/sh");
        const which = shell === "bash" ? {} : { interpreter: "sh" as const, loginShell: "bash" };
        const { variables, errors } = await environmentOf(["*"], which);
        if (shell === "ash") await task.host.exec("mv /bin/sh.off /bin/sh");
        expect(errors).toBe("");
        for (const name of [...passed, "PATH"])
          expect({ [name]: variables[name] }).toEqual({ [name]: environment[name as keyof typeof environment] });
        const others = Object.keys(variables).filter((name) => !passed.includes(name));
        const login = /^(SSH_C\w+|HOME|HOSTNAME|LANG|LOGNAME|MAIL|MOTD_SHOWN|PATH|PWD|OLDPWD|SHELL|SHLVL|USER|_)$/;
        expect(others.filter((name) => !login.test(name))).toEqual([]);
        expect(variables.HOME).toBe("/root");
        expect(variables.SSH_OWN).toBeUndefined();
      },
      { containerOnly: true },
    );

  taskTest(
    "runScript passes only variables that match PassEnvironment",
    async () => {
      const namesWith = async (patterns: string[]) =>
        Object.keys((await environmentOf(patterns)).variables)
          .filter((name) => passed.includes(name))
          .sort();
      expect(await namesWith(["AWS_CONTAINER_*", "*TEX*", "LINE"])).toEqual(["AWS_CONTAINER_CREDENTIALS_RELATIVE_URI"]);
      expect(await namesWith(["*IN*S"])).toEqual(["LINES"]);
      expect(await namesWith([])).toEqual([]);
      expect((await environmentOf(["AWS_*"])).variables.PATH).not.toContain("/opt/tools");
    },
    { containerOnly: true },
  );

  taskTest(
    // Their changes win, and `set -x` in a start-up file prints none of the values.
    "runScript lets start-up files change the container's environment",
    async () => {
      const lines = "set -x; FROM_START_UP=changed; PATH=/opt/own:$PATH:/opt/last; readonly QUOTES=fixed";
      await task.host.exec(`echo '${lines}' >/root/.bashrc`);
      const { variables, errors } = await environmentOf(["*"]);
      await task.host.exec("rm /root/.bashrc");
      expect(variables).toMatchObject({
        FROM_START_UP: "changed",
        QUOTES: "fixed",
        PATH: `/opt/own:${environment.PATH}:/opt/last`,
      });
      expect(errors).not.toMatch(/credentials|eu-west-1|two=2/);
    },
    { containerOnly: true },
  );

  taskTest(
    "runScript puts no value of the environment into an argument",
    async () => {
      const { variables } = await environmentOf(["*"], {
        script:
          "cat /proc/[0-9]*/cmdline | tr '\\0' ' ' | grep -c 'credentials/012[3]' | { read -r n; export FOUND=$n; exec env -0; }; exit",
      });
      expect(variables.FOUND).toBe("0");
    },
    { containerOnly: true },
  );
});

// ---------------------------------------------------------------------------------------------------------
// 10. Stages, by the compiled program
// ---------------------------------------------------------------------------------------------------------

describeProgram("compiled program", () => {
  let world: World;
  const { makeRunner, callsSince, nothingLeft, byHand, scriptFile } = setUpJobs((made) => {
    world = made;
  });

  for (const form of ["17.9", "19.x"] as const)
    for (const shell of ["bash", "sh"] as const)
      taskTest(`a job succeeds with scripts of GitLab Runner ${form} for ${shell}`, async () => {
        const since = world.aws.calls.length;
        const runner = makeRunner({
          job: {
            form,
            shell,
            script: ["git log -1 --format=%H", variableCheck(awkwardVariables), "echo to stderr >&2"],
            afterScript: ['echo "after: $CI_JOB_STATUS"'],
          },
        });
        const result = await runner.runJob();
        const trace = result.trace.toString();
        expect({ status: result.status, trace }).toMatchObject({ status: "success" });
        expect(trace).toContain(`\n${repository.sha}\n`);
        expect(trace).toContain("to stderr");
        expect(trace).toContain("after: success");
        const { RunTask, StopTask, ListTasks } = callsSince(since);
        expect({ RunTask, StopTask, ListTasks }).toEqual({ RunTask: 1, StopTask: 1, ListTasks: undefined });
        nothingLeft();
        // run and cleanup log nothing.
        for (const { stage, stderr } of result.stages)
          if (stage === "cleanup" || stage === "prepare_script") expect(stderr.toString()).toBe("");
      });

  taskTest("prepare applies the settings of GitLab's guide", async () => {
    const since = world.aws.calls.length;
    const runner = makeRunner({ config: world.configure({ Fargate: { Subnet: "subnet-1", SecurityGroup: "sg-1" } }) });
    const [config, prepared] = (await runner.prepare()).slice(-2);
    expect(config?.stdout.toString()).toMatch(
      /^\{"driver":\{"name":"fargate","version":"\d+\.\d+\.\d+ \(\S+\)"\},"hostname":"[A-Za-z0-9.-]*"\}\n$/,
    );
    expect(JSON.parse(`${config?.stdout}`).hostname).toBe(hostname().replace(/[^A-Za-z0-9.-]/g, ""));
    expect(prepared?.stdout.toString()).toBe("");
    const time = "\\d{4}-\\d\\d-\\d\\dT\\d\\d:\\d\\d:\\d\\dZ";
    const lines = prepared?.stderr.toString().trimEnd().split("\n") ?? [];
    expect(lines[0]).toMatch(
      new RegExp(`^${time} Starting a task of test-task:1 on cluster test-cluster in us-east-2$`),
    );
    expect(lines.at(-1)).toMatch(new RegExp(`^${time} Ready: logged in to 127\\.\\S+ as \\w+ \\(\\d+ s\\)$`));
    for (const line of lines.slice(1, -1))
      expect(line).toMatch(new RegExp(`^${time} Task [0-9a-f]{32} is [A-Z]+ \\(\\d+ s\\)$`));
    expect(lines.length).toBeGreaterThan(2);
    const runTask = world.aws.calls.slice(since).find((call) => call.operation === "RunTask");
    expect(runTask?.input).toEqual({
      cluster: "test-cluster",
      taskDefinition: "test-task:1",
      count: 1,
      networkConfiguration: {
        awsvpcConfiguration: { subnets: ["subnet-1"], securityGroups: ["sg-1"], assignPublicIp: "DISABLED" },
      },
      overrides: {
        containerOverrides: [
          {
            name: "ci-coordinator",
            environment: [
              { name: "SSH_PUBLIC_KEY", value: expect.stringMatching(/^ssh-ed25519 /) },
              { name: "FARGATE_DEADLINE", value: expect.stringMatching(/^\d{10}$/) },
            ],
          },
        ],
      },
      startedBy: expect.stringMatching(/^fargate-[0-9a-f]{12}-[0-9a-f]{32}$/),
      clientToken: expect.stringMatching(/^[0-9a-f-]{36}$/),
    });
    expect((await runner.cleanup()).exitCode).toBe(0);
    expect((await runner.cleanup()).exitCode).toBe(0);
    nothingLeft();
  });

  for (const UsePublicIP of [false, true])
    test(`prepare and run reach an IPv6 address ${UsePublicIP ? "with" : "without"} UsePublicIP`, async ({ skip }) => {
      const loopback = Object.values(networkInterfaces()).flatMap((addresses) => addresses ?? []);
      if (!loopback.some(({ address }) => address === "::1")) skip("this machine has no IPv6 loopback address");
      const other = await makeWorld({ embedded: true, address: () => "::1" });
      try {
        const env = { ...byHand(), ...other.aws.environment };
        const config = other.configure({ Fargate: { UsePublicIP } });
        const custom = (...args: string[]) => fargate(["custom", ...args, "--config", config], { env });
        const prepared = await custom("prepare");
        expect(prepared.stderr).toMatch(/Ready: logged in to ::1 as root/);
        const ran = await custom("run", scriptFile("echo there"), "build_script");
        expect(ran).toMatchObject({ code: 0, stdout: Buffer.from("there\n"), stderr: "" });
        expect(other.aws.callsTo("DescribeNetworkInterfaces")).toEqual([]);
        await other.aws.stopTask(other.aws.running()[0]?.taskArn as string, {
          stopCode: "UserInitiated",
          stoppedReason: "Task stopped by user",
        });
        const late = await custom("run", scriptFile("echo there"), "build_script");
        expect(late.stderr).toContain("the task stopped: UserInitiated");
        expect(await custom("cleanup")).toMatchObject({ code: 0 });
      } finally {
        await other.close();
      }
    });

  test("prepare logs in to a task's IPv4 address if it has both kinds", async () => {
    const other = await makeWorld({ embedded: true, ipv6Address: "2001:db8::1" });
    try {
      const env = { ...byHand(), ...other.aws.environment };
      const config = other.configure();
      const prepared = await fargate(["custom", "prepare", "--config", config], { env });
      expect(prepared.stderr).toContain(`Ready: logged in to ${other.aws.running()[0]?.address} as root`);
      expect(await fargate(["custom", "cleanup", "--config", config], { env })).toMatchObject({ code: 0 });
    } finally {
      await other.close();
    }
  });

  // The Go SDK does the same.
  test("fargate prefers keys in the environment to AWS_PROFILE", async () => {
    const where = directory();
    const [config, credentials] = [join(where, "config"), join(where, "credentials")];
    fs.writeFileSync(config, "[profile other]\nregion = eu-west-1\n");
    fs.writeFileSync(credentials, "[other]\naws_access_key_id = AKIAOTHER\naws_secret_access_key = other\n");
    const env = { AWS_CONFIG_FILE: config, AWS_SHARED_CREDENTIALS_FILE: credentials };
    const keyId = async (changes: Record<string, string | undefined>) => {
      const given = { ...world.aws.environment, ...env, ...changes };
      const finished = await fargate(["--config", world.configure(), "sweep"], { env: given });
      expect(finished).toMatchObject({ code: 0, stderr: "" });
      return /Credential=([^/]+)\//.exec(world.aws.authorizations.at(-1) ?? "")?.[1];
    };
    const own = world.aws.environment.AWS_ACCESS_KEY_ID;
    expect(await keyId({ AWS_PROFILE: "other" })).toBe(own);
    expect(await keyId({ AWS_PROFILE: "missing" })).toBe(own);
    expect(await keyId({})).toBe(own);
    const without = { AWS_SECRET_ACCESS_KEY: undefined, AWS_SESSION_TOKEN: undefined };
    expect(await keyId({ AWS_PROFILE: "other", ...without })).toBe("AKIAOTHER");
  });

  taskTest("a job that fails ends with its exit code after its after_script", async () => {
    const result = await makeRunner({
      job: { script: ["echo before", "(exit 42)", "echo never"], afterScript: ['echo "after: $CI_JOB_STATUS"'] },
    }).runJob();
    expect(result).toMatchObject({ status: "build-failure", exitCode: 42 });
    const trace = result.trace.toString();
    expect(trace).toContain("\nbefore\n");
    expect(trace).toContain("after: failed");
    expect(trace).not.toContain("\nnever\n");
    const failed = result.stages.find(({ stage }) => stage === "build_script");
    expect(failed).toMatchObject({ exitCode: 1, buildExitCode: 42 });
    expect(failed?.stderr.toString()).toBe("");
    nothingLeft();
  });

  taskTest("run reports only a build failure to a runner without an exit code file", async () => {
    const result = await makeRunner({ job: { script: ["exit 42"] }, without: ["BUILD_EXIT_CODE_FILE"] }).runJob();
    expect(result).toMatchObject({ status: "build-failure", exitCode: 1 });
    nothingLeft();
  });

  // One of them has a script of 300 KB.
  taskTest("run keeps the exit code file up to date over five runs by hand", async () => {
    const env = { ...byHand(), BUILD_FAILURE_EXIT_CODE: "11", SYSTEM_FAILURE_EXIT_CODE: "12" };
    const config = world.configure();
    const custom = (...args: string[]) => fargate(["custom", ...args, "--config", config], { env });
    const codeFile = () =>
      fs.existsSync(env.BUILD_EXIT_CODE_FILE) ? fs.readFileSync(env.BUILD_EXIT_CODE_FILE, "utf8") : "";
    expect(await custom("prepare")).toMatchObject({ code: 0 });
    expect(await custom("run", scriptFile("exit 42"), "build_script")).toMatchObject({ code: 11, stderr: "" });
    expect(codeFile()).toBe("42");
    const large = `#!/usr/bin/env bash\nx='${"z".repeat(300_000)}'\necho "\${#x}"\n`;
    expect(await custom("run", scriptFile(large), "step_x")).toMatchObject({
      code: 0,
      stdout: Buffer.from("300000\n"),
    });
    expect(codeFile()).toBe("");
    expect(await custom("run", scriptFile("kill -KILL $BASHPID"), "build_script")).toMatchObject({ code: 11 });
    expect(codeFile()).toBe("137");
    expect(await custom("r", scriptFile("exit 0"), "any_name_will_do")).toMatchObject({ code: 0 });
    const unreadable = await custom("run", "/does/not/exist", "build_script");
    expect(unreadable).toMatchObject({
      code: 12,
      stderr: expect.stringContaining("the script of build_script (/does/not/exist) does not exist"),
    });
    expect(codeFile()).toBe("");
    expect(await custom("cleanup")).toMatchObject({ code: 0, stderr: "" });
    const late = await custom("run", scriptFile("true"), "after_script");
    expect(late).toMatchObject({ code: 12, stderr: expect.stringContaining("this job has no task") });
    nothingLeft();
  });

  taskTest("a job that is cancelled in its script runs after_script in the same task", async () => {
    const seconds = `9${process.pid}`; // a duration that no other process of this machine uses
    let ready: () => void = () => {};
    const began = new Promise<void>((resolve) => {
      ready = resolve;
    });
    const runner = makeRunner({
      job: {
        script: ["echo pid $$", `timeout ${seconds} sleep ${seconds}`],
        afterScript: [
          'echo "after: $CI_JOB_STATUS"',
          "ls /proc/*/cmdline | wc -l",
          `grep -lz '^${seconds}$' /proc/[0-9]*/cmdline | wc -l`,
        ],
      },
      onOutput: (stage, _, chunk) => {
        if (stage === "build_script" && chunk.includes(`timeout ${seconds}`)) ready();
      },
    });
    const whole = runner.runJob();
    await began;
    await runner.cancel();
    const result = await whole;
    expect(result.status).toBe("canceled");
    const cancelled = result.stages.find(({ stage }) => stage === "build_script");
    expect(cancelled).toMatchObject({ exitCode: 2, stderr: expect.anything() });
    expect(cancelled?.stderr.toString()).toMatch(/error: stopped by SIGTERM\n$/);
    const after = result.stages.find(({ stage }) => stage === "after_script")?.stdout.toString() ?? "";
    expect(after).toContain("after: canceled");
    expect(after.trimEnd().split("\n").at(-1)).toBe("0");
    nothingLeft();
  });

  taskTest(
    "a job succeeds as user 1000 on a read-only root file system",
    async () => {
      const shared = scratchDirectory("shared");
      const source = join(shared.path, "repository.bundle");
      fs.chmodSync(shared.path, 0o755); // so that the container's user, who is another one, may read it
      fs.copyFileSync(repository.bundle, source);
      const own = await containerHosts({ mounts: [shared.path], packages: PACKAGES, user: "1000", readOnly: true });
      const narrow = await makeWorld({ hosts: own });
      try {
        const config = narrow.configure({ SSH: { Username: "worker" } });
        const job = { source, buildsDir: "/tmp/builds", script: ["id -un", "touch here; ls here"] };
        const runner = makeRunner({ config, environment: narrow.aws.environment, job });
        const result = await runner.runJob();
        expect(result.status, result.trace.toString()).toBe("success");
        const script = result.stages.find(({ stage }) => stage === "build_script")?.stdout.toString() ?? "";
        expect(script).toContain("\nworker\n");
        expect(script).toContain("\nhere\n");
        expect(narrow.aws.running()).toEqual([]);
      } finally {
        await narrow.close();
        await own.close();
        shared.close();
      }
    },
    { containerOnly: true, timeout: 300_000 },
  );

  taskTest("a job that is cancelled in prepare has its task stopped", async () => {
    const held = world.aws.inject({ operation: "RunTask", do: { address: "refusing" } });
    const process = start([driver, "--config", world.configure(), "custom", "prepare"], { env: byHand() });
    await process.shows("Task ");
    process.process.kill("SIGTERM");
    const { code, stderr } = await process.finished;
    expect({ code, stderr }).toMatchObject({ code: 2, stderr: expect.stringMatching(/error: stopped by SIGTERM\n$/) });
    expect(held.used).toBe(1);
    nothingLeft();
  });

  taskTest("a job succeeds with no more than the official driver's permissions", async () => {
    world.aws.permissions = new Set(["ecs:RunTask", "ecs:StopTask", "ecs:DescribeTasks", "iam:PassRole"]);
    onTestFinished(() => {
      delete world.aws.permissions;
    });
    const runner = makeRunner({ job: { script: ["true"] } });
    expect(await runner.runJob()).toMatchObject({ status: "success" });
    // A second cleanup has no record and no permission to list tasks: it warns once.
    const again = await runner.cleanup();
    expect(again.exitCode).toBe(0);
    expect(again.stderr.toString().match(/warning: .*ecs:ListTasks was refused: AccessDeniedException/g)).toHaveLength(
      1,
    );
    nothingLeft();
  });

  taskTest("prepare asks EC2 only for public addresses", async () => {
    const since = world.aws.calls.length;
    const config = world.configure({ Fargate: { EnablePublicIP: true } });
    expect(await makeRunner({ config, job: { script: ["true"] } }).runJob()).toMatchObject({ status: "success" });
    expect(callsSince(since).DescribeNetworkInterfaces).toBeGreaterThan(0);
    const then = world.aws.calls.length;
    const privately = world.configure({ Fargate: { EnablePublicIP: true, UsePublicIP: false } });
    expect(await makeRunner({ config: privately, job: { script: ["true"] } }).runJob()).toMatchObject({
      status: "success",
    });
    expect(callsSince(then).DescribeNetworkInterfaces).toBeUndefined();
    nothingLeft();
  });

  // The guide of 2020 does this.
  for (const definition of ["legacy-task", "secret-task:1"])
    taskTest(`a job succeeds with the key in a secret of ${definition}`, async () => {
      const key = await makeKeyPair("rsa");
      const path = join(directory(), "id_rsa");
      fs.writeFileSync(path, key.privateKey, { mode: 0o600 });
      const other = await makeWorld({ hosts, secrets: { SSH_PUBLIC_KEY: key.publicKey } });
      onTestFinished(() => other.close());
      const config = other.configure({ Fargate: { TaskDefinition: definition }, SSH: { PrivateKeyPath: path } });
      const runner = makeRunner({ config, environment: other.aws.environment, job: { script: ["true"] } });
      const result = await runner.runJob();
      expect(result).toMatchObject({ status: "success" });
      expect(result.trace.toString()).not.toContain("with PrivateKeyPath");
      const [refused, started] = other.aws.callsTo("RunTask");
      expect(refused?.status).toBe(400);
      const deadline = [{ name: "FARGATE_DEADLINE", value: expect.stringMatching(/^\d{10}$/) }];
      if (definition === "legacy-task") expect(started?.input).not.toHaveProperty("overrides");
      else expect(started?.input.overrides?.containerOverrides?.[0]?.environment).toEqual(deadline);
      expect(other.aws.running()).toEqual([]);
    });

  taskTest("prepare warns of a PrivateKeyPath that the task does not need", async () => {
    const path = join(directory(), "id_ed25519");
    fs.writeFileSync(path, (await makeKeyPair("ed25519")).privateKey, { mode: 0o600 });
    const result = await makeRunner({
      config: world.configure({ SSH: { PrivateKeyPath: path } }),
      job: { script: ["true"] },
    }).runJob();
    expect(result).toMatchObject({ status: "success" });
    const warnings = result.trace.toString().match(/warning: .*PrivateKeyPath.*/g);
    expect(warnings).toEqual([
      "warning: with PrivateKeyPath, all tasks accept the same key; remove it unless the image ignores SSH_PUBLIC_KEY",
    ]);
    // With a key for each job, there is no warning.
    const plain = await makeRunner({ job: { script: ["true"] } }).runJob();
    expect(plain.trace.toString()).not.toContain("PrivateKeyPath");
    nothingLeft();
  });

  taskTest(
    // If the definition does not accept SSH_PUBLIC_KEY, the log has advice.
    "prepare uses the task definition that a job's variable names",
    async () => {
      const legacy = await makeRunner({
        job: { variables: { FARGATE_TASK_DEFINITION: "legacy-task" }, script: ["true"] },
      }).prepare();
      const text = legacy.map(({ stderr }) => stderr.toString()).join("");
      expect(text).toContain(
        "FARGATE_TASK_DEFINITION of this job, legacy-task, cannot be used: ecs:RunTask was refused",
      );
      expect(text).toContain("what to do: name its container ci-coordinator");
      // A build failure: the runner does not try again.
      expect(legacy.map(({ stage }) => stage)).toEqual(["config", "prepare", "cleanup"]);
      nothingLeft();
    },
    { timeout: 90_000 },
  );

  taskTest("prepare passes settings that the official driver lacks to ECS", async () => {
    const config = world.configure({
      Fargate: {
        Subnet: undefined,
        Subnets: ["subnet-1", "subnet-2"],
        SecurityGroup: undefined,
        SecurityGroups: ["sg-1", "sg-2"],
        CapacityProviderStrategy: [{ CapacityProvider: "FARGATE_SPOT", Weight: 1 }],
        Tags: { team: "ci" },
        PropagateTags: "TASK_DEFINITION",
        PlatformVersion: "1.4.0",
      },
      SSH: { KeyType: "rsa" },
    });
    const runner = makeRunner({ config });
    expect((await runner.prepare()).at(-1)).toMatchObject({ stage: "prepare", exitCode: 0 });
    const [task] = world.aws.running();
    expect(task).toMatchObject({ capacityProviderName: "FARGATE_SPOT", tags: [{ key: "team", value: "ci" }] });
    expect((await runner.cleanup()).exitCode).toBe(0);
    nothingLeft();
  });

  taskTest("run connects again when a connection is refused or reset", async () => {
    const env = byHand();
    expect(await fargate(["--config", world.configure(), "custom", "prepare"], { env })).toMatchObject({ code: 0 });
    const [task] = world.aws.running();
    const address = task?.address as string;
    const port = Number(/Port = (\d+)/.exec(fs.readFileSync(world.configure(), "utf8"))?.[1]);
    const proxy = await startProxy({ host: address, port }, { host: address, refuse: 2 });
    onTestFinished(() => proxy.close());
    const config = world.configure({ SSH: { Port: proxy.port } });
    const ran = await fargate(["--config", config, "custom", "run", scriptFile("echo once"), "x"], { env });
    expect(ran).toMatchObject({ code: 0, stdout: Buffer.from("once\n"), stderr: "" });
    expect(proxy.connections).toBe(3);
    // Nothing answers within ConnectTimeout. The message adds that the task is RUNNING.
    await proxy.close();
    const gone = world.configure({ SSH: { Port: proxy.port, ConnectTimeout: 1 } });
    const failed = await fargate(["--config", gone, "custom", "run", scriptFile("echo never"), "x"], { env });
    expect(failed).toMatchObject({ code: 2, stdout: Buffer.from("") });
    expect(failed.stderr).toMatch(
      /error: x did not begin: \w+@127\.\S+: .*ECONNREFUSED.*; ECS reports the task as RUNNING\n.*what to do: the task is still running: .*\n$/,
    );
    expect(await fargate(["--config", world.configure(), "custom", "cleanup"], { env })).toMatchObject({ code: 0 });
    nothingLeft();
  });

  taskTest("run reports why the task stopped during its script", async () => {
    const env = byHand();
    const config = world.configure();
    expect(await fargate(["--config", config, "custom", "prepare"], { env })).toMatchObject({ code: 0 });
    const script = scriptFile("echo running; sleep 600");
    const running = start([driver, "--config", config, "custom", "run", script, "build_script"], { env });
    await running.shows("running");
    const [task] = world.aws.running();
    const cause = { stopCode: "SpotInterruption", stoppedReason: "Your Spot Task was interrupted.", graceSeconds: 0 };
    await world.aws.stopTask(task?.taskArn as string, cause);
    const { code, stderr } = await running.finished;
    expect(code).toBe(2);
    expect(stderr).toMatch(
      /error: the connection to the container was lost while build_script ran: .*; the task stopped: SpotInterruption: Your Spot Task was interrupted\./,
    );
    // Later stages fail at once instead of waiting for ConnectTimeout (120 s).
    const next = start([driver, "--config", config, "custom", "run", scriptFile("true"), "after_script"], { env });
    await next.shows("after_script did not begin: the task stopped: SpotInterruption");
    expect((await next.finished).code).toBe(2);
    expect(await fargate(["--config", config, "custom", "cleanup"], { env })).toMatchObject({ code: 0 });
    nothingLeft();
  });

  taskTest("run passes 200 MB of output in bounded memory", async () => {
    const env = byHand();
    const config = world.configure();
    expect(await fargate(["--config", config, "custom", "prepare"], { env })).toMatchObject({ code: 0 });
    const script = scriptFile("head -c 200000000 /dev/zero");
    const child = spawn(driver, ["--config", config, "custom", "run", script, "x"], {
      env,
      stdio: ["ignore", "pipe", "inherit"],
    });
    let bytes = 0;
    let peak = 0;
    child.stdout.on("data", (chunk: Buffer) => {
      bytes += chunk.length;
      // VmHWM is the peak memory, in kB. The pause makes this a slow reader.
      const status = fs.readFileSync(`/proc/${child.pid}/status`, "utf8");
      peak = Math.max(peak, Number(/VmHWM:\s+(\d+)/.exec(status)?.[1] ?? 0));
      child.stdout.pause();
      setImmediate(() => child.stdout.resume());
    });
    expect(await new Promise((done) => child.on("close", done))).toBe(0);
    expect(bytes).toBe(200_000_000);
    expect(peak / 1024).toBeGreaterThan(20);
    expect(peak / 1024).toBeLessThan(250); // about 65 MB before the first byte arrives
    await fargate(["--config", config, "custom", "cleanup"], { env });
  });

  taskTest("run passes every byte to a slow reader before the reason of a failure", async () => {
    const env = byHand();
    const config = world.configure();
    expect(await fargate(["--config", config, "custom", "prepare"], { env })).toMatchObject({ code: 0 });
    const slowly = async (script: string, stopAfter?: number) => {
      const command = ["--config", config, "custom", "run", scriptFile(script), "x"];
      const debugged = withDebugLines([driver, ...command]);
      const searched = new DriverOutput(debugged);
      const child = spawn(driver, debugged.command.slice(1), { env, stdio: ["ignore", "pipe", "pipe"] });
      const read = async (stream: "stdout" | "stderr") => {
        const chunks: Buffer[] = [];
        for await (const chunk of child[stream]) {
          chunks.push(searched.push(stream, chunk as Buffer));
          await new Promise((later) => setTimeout(later, 3));
        }
        return Buffer.concat(chunks);
      };
      const closed = new Promise((done) => child.on("exit", done));
      if (stopAfter !== undefined) {
        // Reading begins only after SIGTERM, when the driver has had time to fill the pipe.
        await new Promise((later) => setTimeout(later, stopAfter));
        child.kill("SIGTERM");
        await new Promise((later) => setTimeout(later, 3_000));
      }
      const [stdout, stderr] = await Promise.all([read("stdout"), read("stderr")]);
      return { code: await closed, stdout, stderr: Buffer.concat([stderr, searched.end()]) };
    };
    for (let round = 0; round < 3; round++) {
      const { code, stdout, stderr } = await slowly("head -c 1000000 /dev/zero; head -c 1000000 /dev/zero >&2");
      expect([code, stdout.length, stderr.length]).toEqual([0, 1_000_000, 1_000_000]);
    }
    // For each chunk on one stream, ssh2 would let the server send two more MiB on the other.
    const mixed = await slowly("for i in $(seq 60); do head -c 1000000 /dev/zero; echo $i >&2; done");
    expect([mixed.code, mixed.stdout.length, mixed.stderr.length]).toEqual([0, 60_000_000, 171]);
    const stopped = await slowly("head -c 1000000 /dev/zero >&2; sleep 600", 1_000);
    expect(stopped.code).toBe(2);
    expect(stopped.stderr.toString()).toContain("error: stopped by SIGTERM\n");
    await fargate(["--config", config, "custom", "cleanup"], { env });
    nothingLeft();
  });

  taskTest("run ends its script when the reader goes away", async () => {
    const env = byHand();
    const config = world.configure();
    expect(await fargate(["--config", config, "custom", "prepare"], { env })).toMatchObject({ code: 0 });
    const script = scriptFile("while :; do echo line; done");
    const child = spawn(driver, ["--config", config, "custom", "run", script, "x"], {
      env,
      stdio: ["ignore", "pipe", "ignore"],
    });
    await new Promise((shown) => child.stdout.once("data", shown));
    child.stdout.destroy();
    expect(await new Promise((done) => child.on("close", done))).toBe(2);
    await fargate(["--config", config, "custom", "cleanup"], { env });
    nothingLeft();
  });

  taskTest("run fails when its output cannot be written", async () => {
    const env = byHand();
    const config = world.configure();
    expect(await fargate(["--config", config, "custom", "prepare"], { env })).toMatchObject({ code: 0 });
    const runWith = async (script: string, stdio: ["ignore", number | "pipe", number | "pipe"]) => {
      // Debug lines would be written to standard error as well.
      const words = ["--config", config, "--log-level", "warn", "custom", "run", scriptFile(script), "x"];
      const child = spawn(driver, words, { env, stdio });
      const [out, err] = [collect(), collect()];
      child.stdout?.pipe(out.sink);
      child.stderr?.pipe(err.sink);
      const code = await new Promise((done) => child.on("close", done));
      return { code, stdout: out.bytes().toString(), stderr: err.bytes().toString() };
    };
    if (process.platform === "linux") {
      const full = fs.openSync("/dev/full", "w");
      onTestFinished(() => fs.closeSync(full));
      const failed = / error: the job's output cannot be written: ENOSPC: .*\n$/;
      // Whether the script goes on or has ended.
      for (const script of ["echo line; sleep 600", "echo line"]) {
        const out = await runWith(script, ["ignore", full, "pipe"]);
        expect(out).toEqual({ code: 2, stdout: "", stderr: expect.stringMatching(failed) });
        const err = await runWith(`echo first; { ${script}; } >&2`, ["ignore", "pipe", full]);
        expect(err).toEqual({ code: 2, stdout: "first\n", stderr: "" });
      }
      expect(await runWith("exit 0", ["ignore", full, full])).toMatchObject({ code: 0 });
    }
    // Nobody reads standard output any more. Bun reports this in two ways, depending on the size of a part.
    for (const part of ["echo line", "head -c 100000 /dev/zero"]) {
      const words = ["--config", config, "custom", "run", scriptFile(`while :; do ${part}; done`), "x"];
      const child = spawn(driver, words, { env, stdio: ["ignore", "pipe", "pipe"] });
      const errors = collect();
      child.stderr.pipe(errors.sink);
      await new Promise((shown) => child.stdout.once("data", shown));
      child.stdout.destroy();
      expect(await new Promise((done) => child.on("close", done))).toBe(2);
      expect(errors.bytes().toString()).toMatch(/ error: the job's output cannot be written: EPIPE: .*\n$/);
    }
    // Nor standard error.
    const script = scriptFile("while :; do echo line >&2; done");
    const child = spawn(driver, ["--config", config, "custom", "run", script, "x"], {
      env,
      stdio: ["ignore", "ignore", "pipe"],
    });
    await new Promise((shown) => child.stderr.once("data", shown));
    child.stderr.destroy();
    expect(await new Promise((done) => child.on("close", done))).toBe(2);
    await fargate(["--config", config, "custom", "cleanup"], { env });
    nothingLeft();
  });

  taskTest("run writes both streams to one file after its earlier content", async () => {
    const env = byHand();
    const config = world.configure();
    expect(await fargate(["--config", config, "custom", "prepare"], { env })).toMatchObject({ code: 0 });
    const path = join(directory(), "log");
    fs.writeFileSync(path, "earlier\n");
    const size = 5_000_000; // bytes; more than the driver writes at once
    const scripts = [
      "for i in 1 2 3; do echo out $i; sleep 0.1; echo err $i >&2; sleep 0.1; done",
      `head -c ${size} /dev/zero; sleep 0.1; head -c ${size} /dev/zero >&2`,
      "echo last",
    ];
    // Either the system appends, or all processes share one position in the file.
    for (const flag of ["a", "r+"]) {
      fs.truncateSync(path, "earlier\n".length);
      const file = fs.openSync(path, flag);
      if (flag === "r+") fs.readSync(file, Buffer.alloc(100)); // moves the position
      try {
        for (const script of scripts) {
          const words = ["--config", config, "--log-level", "warn", "custom", "run", scriptFile(script), "x"];
          const child = spawn(driver, words, { env, stdio: ["ignore", file, file] });
          expect(await new Promise((done) => child.on("close", done))).toBe(0);
        }
      } finally {
        fs.closeSync(file);
      }
      const text = fs.readFileSync(path, "latin1");
      expect(text.length).toBe("earlier\n".length + 36 + 2 * size + 5);
      expect(text.replace(/\0+/, "\0")).toBe("earlier\nout 1\nerr 1\nout 2\nerr 2\nout 3\nerr 3\n\0last\n");
    }
    await fargate(["--config", config, "custom", "cleanup"], { env });
    nothingLeft();
  });

  test("fargate ignores .env, bunfig.toml and node_modules in the working directory", async () => {
    const hostile = directory();
    const marker = join(hostile, "executed");
    const evil = `require("node:fs").appendFileSync(${JSON.stringify(marker)}, process.argv.join(" ") + "\\n");`;
    const put = (path: string, text: string) => {
      fs.mkdirSync(join(hostile, path, ".."), { recursive: true });
      fs.writeFileSync(join(hostile, path), text);
    };
    put(".env", "AWS_ENDPOINT_URL=http://127.0.0.1:1\nCUSTOM_ENV_CI_JOB_ID=666\n");
    put("bunfig.toml", 'preload = ["./evil.js"]\n');
    put("evil.js", evil);
    put("tsconfig.json", '{"compilerOptions": {"paths": {"ssh2": ["./evil.js"], "@aws-sdk/*": ["./evil.js"]}}}');
    put("package.json", '{"imports": {"#x": "./evil.js"}}');
    for (const name of ["cpu-features", "ssh2", "aws-crt", "@aws-sdk/signature-v4-crt", "@aws-sdk/client-ecs"])
      put(`node_modules/${name}/index.js`, evil);
    put("crypto/build/Release/sshcrypto.node", "");
    const env = byHand();
    const config = world.configure();
    for (const stage of [["prepare"], ["run", scriptFile("true"), "x"], ["cleanup"]])
      expect(await fargate(["--config", config, "custom", ...stage], { env, cwd: hostile })).toMatchObject({ code: 0 });
    expect(fs.existsSync(marker)).toBe(false);
    // From source: works if called as documented. Called plainly, it refuses, although bun has already run the preload.
    const source = join(projectRoot, "fargate.ts");
    const documented = [process.execPath, "--no-env-file", "--config=/dev/null", source, "custom", "config"];
    fs.rmSync(join(hostile, "tsconfig.json")); // bun would apply it: see docs/development.md
    expect(await start(documented, { env, cwd: hostile }).finished).toMatchObject({ code: 0, stderr: "" });
    expect(fs.existsSync(marker)).toBe(false);
    const plain = await start([process.execPath, source, "custom", "prepare"], { env, cwd: hostile }).finished;
    expect(plain).toMatchObject({
      code: 2,
      stderr: expect.stringContaining(
        "bun reads settings from .env, bunfig.toml here; run this instead: bun --no-env-file",
      ),
    });
    nothingLeft();
  });

  taskTest("fargate.ts works from source as the compiled program does", async () => {
    const env = byHand();
    const source = [process.execPath, join(projectRoot, "fargate.ts"), "--config", world.configure(), "custom"];
    const custom = (...args: string[]) => start([...source, ...args], { env, cwd: directory() }).finished;
    expect((await custom("config")).stdout.toString()).toMatch(/"version":"dev \(HEAD\)"/);
    expect(await custom("prepare")).toMatchObject({ code: 0 });
    expect(await custom("run", scriptFile("echo hello"), "x")).toMatchObject({
      code: 0,
      stdout: Buffer.from("hello\n"),
    });
    expect(await custom("cleanup")).toMatchObject({ code: 0 });
    nothingLeft();
  });

  test("fargate sends requests through HTTP_PROXY except with NO_PROXY", async () => {
    const config = world.configure();
    const env = { ...byHand(), AWS_ENDPOINT_URL: "http://ecs.example.test", HTTP_PROXY: world.aws.url };
    expect(await fargate(["--config", config, "custom", "prepare"], { env })).toMatchObject({ code: 0 });
    expect(await fargate(["--config", config, "custom", "cleanup"], { env })).toMatchObject({ code: 0 });
    const past = { ...byHand(), HTTP_PROXY: "http://127.0.0.1:1", NO_PROXY: "127.0.0.1" };
    expect(await fargate(["--config", config, "custom", "prepare"], { env: past })).toMatchObject({ code: 0 });
    expect(await fargate(["--config", config, "custom", "cleanup"], { env: past })).toMatchObject({ code: 0 });
    nothingLeft();
  });

  test("prepare asks the metadata endpoint without HTTP_PROXY", async () => {
    const task = world.aws.addTask({ cluster: "test-cluster", startedBy: "ecs-svc/1" });
    const metadata = await EcsMetadata.start(task);
    onTestFinished(() => metadata.close());
    const since = world.aws.calls.length;
    const through = {
      AWS_ENDPOINT_URL: "http://ecs.example.test",
      HTTP_PROXY: world.aws.url,
      http_proxy: world.aws.url,
    };
    const env = { ...byHand(), ...through, ...metadata.environment };
    const config = world.configure();
    expect(await fargate(["--config", config, "custom", "prepare"], { env })).toMatchObject({ code: 0 });
    expect(await fargate(["--config", config, "custom", "cleanup"], { env })).toMatchObject({ code: 0 });
    expect(metadata.requests).toHaveLength(1);
    const [run] = world.aws.calls.slice(since).filter(({ operation }) => operation === "RunTask");
    expect(run?.input).toMatchObject({ startedBy: expect.stringContaining(`fargate-${metadata.id}-`) });
    await world.aws.stopTask(task.taskArn, { stopCode: "UserInitiated", stoppedReason: "over" });
    fs.rmSync(join(world.records, ".manager-task"));
    nothingLeft();
  });

  // The reason that ends a stage is also on standard error.
  test("fargate writes its log to LogFile in the chosen format", async () => {
    const file = join(directory(), "fargate.log");
    const config = world.configure({ top: { LogFile: file, LogFormat: "json", LogLevel: "debug" } });
    const env = byHand();
    expect(await fargate(["--config", config, "custom", "prepare"], { env })).toMatchObject({ code: 0, stderr: "" });
    expect(await fargate(["--config", config, "custom", "cleanup"], { env })).toMatchObject({ code: 0, stderr: "" });
    const failed = await fargate(["--config", config, "custom", "run", "/none", "x"], { env });
    expect(failed.stderr).toMatch(/^\{.*"msg":"the script of x \(.none\) does not exist.*\}\n$/);
    const lines = fs
      .readFileSync(file, "utf8")
      .trimEnd()
      .split("\n")
      .map((line) => JSON.parse(line));
    expect(lines.map(({ level }) => level)).toContain("debug");
    expect(lines.map(({ msg }) => msg)).toContain(
      "Starting a task of test-task:1 on cluster test-cluster in us-east-2",
    );
    expect(lines.at(-2)).toEqual({
      time: expect.any(String),
      level: "fatal",
      msg: expect.stringContaining("does not exist"),
    });
    expect(fs.readFileSync(file, "utf8")).not.toContain("PRIVATE KEY");
    const pipe = join(directory(), "pipe");
    spawnSync("mkfifo", [pipe]);
    const unread = start([driver, "--config", world.configure({ top: { LogFile: pipe } }), "custom", "cleanup"], {
      env,
    });
    const guard = setTimeout(() => unread.process.kill("SIGKILL"), 30_000);
    const { code, stderr } = await unread.finished;
    clearTimeout(guard);
    expect({ code, stderr }).toEqual({ code: 0, stderr: expect.stringContaining("cannot be opened: ENXIO") });
    const nowhere = world.configure({ top: { LogFile: "/does/not/exist/x.log" } });
    const warned = await fargate(["--config", nowhere, "custom", "cleanup"], { env });
    expect(warned).toMatchObject({
      code: 0,
      stderr: expect.stringContaining("LogFile /does/not/exist/x.log cannot be"),
    });
  });

  // The link may be the file itself or a directory on its path.
  test("fargate opens no LogFile through a link of another user's", async ({ skip }) => {
    if (process.geteuid?.() !== 0) return skip("only root can give links away");
    const where = directory();
    const target = join(where, "target");
    const path = (name: string) => join(where, name);
    const link = (to: string, name: string, owner: number) => {
      fs.symlinkSync(to, path(name));
      fs.lchownSync(path(name), owner, owner);
    };
    fs.mkdirSync(path("logs"));
    link(target, "theirs.log", 12_345);
    link(path("logs"), "their-logs", 12_345);
    link(path("theirs.log"), "ours-to-theirs.log", 0);
    link("loop.log", "loop.log", 0);
    const env = byHand();
    const cleanUp = (LogFile: string) =>
      fargate(["--config", world.configure({ top: { LogFile, LogLevel: "debug" } }), "custom", "cleanup"], { env });
    for (const [file, why] of [
      ["theirs.log", `${path("theirs.log")} is a symbolic link that belongs to another user (id 12345)`],
      ["their-logs/x.log", `${path("their-logs")} is a symbolic link that belongs to another user (id 12345)`],
      ["ours-to-theirs.log", `${path("theirs.log")} is a symbolic link that belongs to another user (id 12345)`],
      ["loop.log", "Maximum call stack size exceeded"],
    ] as const) {
      const { code, stderr } = await cleanUp(path(file));
      expect({ code, stderr }).toMatchObject({
        code: 0,
        stderr: expect.stringContaining(`warning: LogFile ${path(file)} cannot be opened: ${why}`),
      });
    }
    expect([fs.existsSync(target), fs.readdirSync(path("logs"))]).toEqual([false, []]);
    // Follows links of root and of this user, even to a file that does not exist yet.
    link("target", "ours.log", 0);
    link("logs", "our-logs", 0);
    for (const file of ["ours.log", "our-logs/x.log"])
      expect(await cleanUp(path(file))).toMatchObject({ code: 0, stderr: "" });
    for (const file of [target, path("logs/x.log")]) expect(fs.readFileSync(file, "utf8")).toContain("does not exist");
  });

  test("fargate accepts /dev/stderr as LogFile", async () => {
    const config = world.configure({ top: { LogFile: "/dev/stderr" } });
    const output = join(directory(), "output");
    const shell = ["sh", "-c", 'output=$1; shift; exec "$@" 2>"$output"', "sh", output];
    const command = [...shell, driver, "--config", config, "custom", "cleanup"];
    const { code, stderr } = await start(command, { env: byHand() }).finished;
    expect({ code, stderr }).toEqual({ code: 0, stderr: "" });
    const text = fs.readFileSync(output, "utf8");
    expect(text).toContain("does not exist: no task was started");
    expect(text).not.toContain("LogFile");
  });

  test("fargate resolves paths in the file from any working directory", async () => {
    const key = await makeKeyPair("ed25519");
    const config = world.configure({ top: { LogFile: "beside.log" }, SSH: { PrivateKeyPath: "beside.key" } });
    const beside = (name: string) => join(config, "..", name);
    fs.writeFileSync(beside("beside.key"), key.privateKey, { mode: 0o600 });
    wholeRun.ownKey(beside("beside.key"));
    const env = byHand();
    const since = world.aws.callsTo("RunTask").length;
    const [elsewhere, another] = [directory(), directory()];
    const stage = (name: string, cwd: string) => fargate(["--config", config, "custom", name], { env, cwd });
    expect(await stage("prepare", elsewhere)).toMatchObject({ code: 0, stderr: "" });
    const relative = ["--config", relativePath(another, config), "--log-file", "here.log", "custom", "cleanup"];
    expect(await fargate(relative, { env, cwd: another })).toMatchObject({ code: 0, stderr: "" });
    const [sent] = world.aws.callsTo("RunTask").slice(since);
    expect(JSON.stringify(sent?.input)).toContain(key.publicKey);
    expect(fs.readFileSync(beside("beside.log"), "utf8")).toContain("Ready: logged in to");
    expect([fs.readdirSync(elsewhere), fs.readdirSync(another)]).toEqual([[], ["here.log"]]);
    nothingLeft();
  });

  test("prepare is the only stage that warns of unknown keys", async () => {
    const config = world.configure({ Fargate: { Clutser: "x" } });
    const env = byHand();
    const warning = "warning: .*unknown key Fargate\\.Clutser; the most similar known key is Fargate\\.Cluster\n";
    expect((await fargate(["--config", config, "custom", "prepare"], { env })).stderr).toMatch(new RegExp(warning));
    expect((await fargate(["--config", config, "custom", "cleanup"], { env })).stderr).toBe("");
    nothingLeft();
  });

  test.each<[what: string, lines: string[], warnings: string[]]>([
    ["sufficient limits", ["shutdown_timeout = 60", "graceful_kill_timeout = 40"], []],
    ["default limits", [], ["shutdown_timeout = 30"]],
    ["limits of 0", ["shutdown_timeout = 0", "graceful_kill_timeout = 0"], ["shutdown_timeout = 30"]],
    [
      "insufficient limits",
      ["shutdown_timeout = 39", "graceful_kill_timeout = 39"],
      ["graceful_kill_timeout = 39", "shutdown_timeout = 39"],
    ],
    ["damaged config.toml", ["shutdown_timeout = ["], []],
    ["limits of other types", ['shutdown_timeout = "x"', 'graceful_kill_timeout = "y"'], []],
  ])("prepare compares CancelGracePeriod with the runner's %s", async (_, lines, warnings) => {
    const path = join(directory(), "config.toml");
    const [shutdown = "", graceful = ""] = lines;
    const runners = [
      `[[runners]]\n[runners.custom]\nrun_exec = "/bin/true"\ngraceful_kill_timeout = 1`, // the limits of another driver
      "[[runners]]\nexecutor = 'shell'",
      `[[runners]]\ntoken = "glrt-of-the-runner"\n[runners.custom]\nrun_exec = "${driver}"\n${graceful}`,
    ];
    fs.writeFileSync(path, `${shutdown}\n${runners.join("\n")}\n`);
    const config = world.configure({ Fargate: { TaskDefinition: "none" }, SSH: { CancelGracePeriod: 30 } });
    const prepared = (env: Record<string, string>) =>
      fargate(["--config", config, "custom", "prepare"], { env: { ...byHand(), ...env } });
    const { stderr } = await prepared({ CONFIG_FILE: path });
    const shown = stderr.split("\n").filter((line) => line.includes("config.toml"));
    expect(shown).toEqual(
      warnings.map((warning) =>
        expect.stringContaining(`warning: ${warning} in the runner's config.toml should be 40 s or more`),
      ),
    );
    expect(stderr).not.toContain("glrt-");
    expect((await prepared({})).stderr).not.toContain("config.toml");
    nothingLeft();
  });

  test("prepare starts no task with a bad configuration", async () => {
    const since = world.aws.calls.length;
    const config = join(projectRoot, "fixtures", "config", "bad.toml");
    const bad = await fargate(["--config", config, "custom", "prepare"], { env: byHand() });
    expect(bad.code).toBe(2);
    expect(bad.stderr.trimEnd().split("\n")).toHaveLength(31);
    const none = await fargate(["custom", "prepare"], { env: byHand(), cwd: directory() });
    // As an absolute path, because the runner starts each stage in another working directory.
    expect(none.stderr).toMatch(/error: the configuration file \/\S+\/config\.toml does not exist$/m);
    expect(none.stderr).toContain("what to do: name the driver's file with --config; fargate init writes a new one");
    const jobless = await fargate(["--config", world.configure(), "custom", "prepare"], { env: world.aws.environment });
    expect(jobless.stderr).toContain("there is no job: neither JOB_RESPONSE_FILE nor the CUSTOM_ENV_CI_* variables");
    expect([none.code, jobless.code]).toEqual([2, 2]);
    expect(world.aws.calls.length).toBe(since);
  });

  // Other unused FARGATE_* variables get a line at level debug.
  test("prepare warns of a job's variables that look misspelt", async () => {
    const config = world.configure({ top: { LogLevel: "debug" } });
    const env = {
      ...byHand(),
      ...Object.fromEntries(Array.from({ length: 50 }, (_, n) => [`CUSTOM_ENV_FARGATE_${n}`, "x"])),
      "CUSTOM_ENV_FARGATE_\u001b[0Ksection_start:1:x\r\n": "x",
      [`CUSTOM_ENV_FARGATE_${"y".repeat(9_000)}`]: "x",
      CUSTOM_ENV_FARGATE_TASK_DEFINITON: "x",
      CUSTOM_ENV_CUSTOM_ENV_FARGATE_PLATFORM_VERSION: "1.4.0",
    };
    const { code, stderr } = await fargate(["--config", config, "custom", "prepare"], { env });
    expect(code, stderr).toBe(0);
    const lines = stderr.split("\n").filter((line) => line.includes(" has no effect"));
    const warnings = lines
      .filter((line) => line.includes(" warning: "))
      .map((line) => line.replace(/^.* variable /, ""));
    expect(warnings.sort()).toEqual([
      "CUSTOM_ENV_FARGATE_PLATFORM_VERSION has no effect; did you mean FARGATE_PLATFORM_VERSION?",
      "FARGATE_TASK_DEFINITON has no effect; did you mean FARGATE_TASK_DEFINITION?",
    ]);
    // At most 20 lines, whatever the job sets.
    expect(lines).toHaveLength(20);
    for (const line of lines) expect(line).not.toMatch(/\p{Cc}|y{5000}/u);
    expect((await fargate(["--config", config, "custom", "cleanup"], { env })).stderr).not.toContain("has no effect");
    nothingLeft();
  });

  taskTest("prepare warns once that a job's image and services have no effect", async () => {
    const hostile = "\u001b[0Ksection_start:1:x\r\n{names}";
    const services = ["postgres:16", { name: "redis:7", alias: "cache" }, hostile, "z".repeat(9_000)];
    const result = await makeRunner({ job: { image: "ruby:3.2", services, script: ["true"] } }).runJob();
    expect(result).toMatchObject({ status: "success" });
    const lines = result.stages.flatMap(({ stderr }) => stderr.toString().split("\n"));
    const [line, ...more] = lines.filter((text) => /ruby|postgres|redis|no effect/.test(text));
    expect(more).toEqual([]);
    expect(line).toMatch(
      /Z warning: image: and services: have no effect; to use them, set AllowedImages and AllowedServices in JobImage, or FARGATE_TASK_DEFINITION\. Ignored: ruby:3\.2, postgres:16, redis:7, /,
    );
    expect(line).not.toMatch(/\p{Cc}|z{5000}/u);
    // Without image: and services:, there is no warning.
    const plain = await makeRunner({ job: { script: ["true"] } }).runJob();
    expect(plain.trace.toString()).not.toContain("have no effect");
    nothingLeft();
  });

  // Only without AllowedTaskDefinitions.
  taskTest("prepare logs at debug that a job may choose any task definition", async () => {
    const says = "debug: AllowedTaskDefinitions is not set: a job may choose any task definition";
    const env = byHand();
    for (const [AllowedTaskDefinitions, expected] of [
      [undefined, true],
      [["test-task"], false],
    ] as const) {
      const config = world.configure({ Fargate: { AllowedTaskDefinitions } });
      const { code, stderr } = await fargate(["--config", config, "--debug", "custom", "prepare"], { env });
      expect({ code, said: stderr.includes(says) }).toEqual({ code: 0, said: expected });
      expect(await fargate(["--config", config, "custom", "cleanup"], { env })).toMatchObject({ code: 0 });
    }
    nothingLeft();
  });
});

describeProgram.concurrent("jobs with image: and services:", () => {
  const entry = (...lines: string[]) => [
    `RUN printf '%s\\n' '#!/bin/sh' ${lines.map((line) => `'${line}'`).join(" ")} >/entry && chmod 755 /entry`,
    'ENTRYPOINT ["/entry"]',
  ];
  const images = {
    "registry.example.com/minimal:1": BUSYBOX_IMAGE,
    "debian:12": DEBIAN_IMAGE,
    "postgres:16": POSTGRES_IMAGE,
    "redis:7": REDIS_IMAGE,
    "registry.example.com/tools/fails:1": entry("exit 3"),
    "registry.example.com/tools/wraps:1": entry('export WRAPPED="by $0 $1"', 'exec "$@"'),
    "registry.example.com/tools/waits:1": entry('"$@"'),
    "registry.example.com/no-shell:1": ["FROM scratch", "COPY --from=debian:bookworm-slim /etc/hostname /etc/hostname"],
    "registry.example.com/group/dies:1": entry("sleep 2; echo no licence >&2; exit 7"),
  };
  const logConfiguration = {
    logDriver: "awslogs" as const,
    options: { "awslogs-group": "/ci/jobs", "awslogs-region": "us-east-2", "awslogs-stream-prefix": "job" },
  };
  const coordinator = { name: CONTAINER, image: "sshd", stopTimeout: 2 };
  const taskDefinitions = [
    { family: "test-task", memory: "1024", cpu: "512", containerDefinitions: [coordinator] },
    { family: "ci-node", containerDefinitions: [{ ...coordinator, environment: [{ name: "KIND", value: "node" }] }] },
    {
      family: "logged-task",
      executionRoleArn: "arn:aws:iam::123456789012:role/ecsTaskExecutionRole",
      containerDefinitions: [{ ...coordinator, logConfiguration }],
    },
  ];
  const root = setUpImageJobs(images, { taskDefinitions, enforceMemory: true });
  const asWorker = { top: { JobImage: ANY_IMAGE }, SSH: { Username: "worker" } };
  const worker = setUpImageJobs(images, { tasks: { user: "1000" } }, asWorker);
  const { makeRunner, nothingLeft, taskOf, world } = root;
  const variable = (key: string, value: string) => {
    return { ...{ key, value }, public: true, masked: false, file: false, raw: true };
  };
  const port = (number: number) => [{ number, protocol: "tcp", name: "" }];
  const jobTest = (name: string, body: () => Promise<void>) =>
    taskTest(name, body, { containerOnly: true, timeout: 180_000 });
  const run = async (...setup: Parameters<typeof makeRunner>) => {
    const runner = makeRunner(...setup);
    const result = await runner.runJob();
    const trace = result.trace.toString();
    const of = (stage: string) => result.stages.findLast((candidate) => candidate.stage === stage);
    const script = of("build_script")?.stdout.toString() ?? "";
    nothingLeft(result, runner.job);
    return { ...result, trace, of, script, directories: runner.driverConfig, task: taskOf(result.trace) };
  };
  /** Expects a failure of the job in its first prepare. @returns the line of the log with the error */
  const refused = async (...[job, setup]: Parameters<typeof makeRunner>) => {
    const runner = makeRunner(job, setup);
    const { status, stages, trace } = await runner.runJob();
    expect(status, trace.toString()).toBe("build-failure");
    expect(stages.map(({ stage }) => stage)).toEqual(["config", "prepare", "cleanup"]);
    const left = world().aws.running();
    expect(left.filter((task) => task === taskOf(trace))).toEqual([]);
    return /error: (?!what to do)(.*)/.exec(trace.toString())?.[1] ?? "";
  };
  /** Resolves when the runner's build_script has printed this text. */
  const printing = (text: string) => {
    const { promise, resolve } = Promise.withResolvers<void>();
    const onOutput = (stage: string, _: string, chunk: Buffer) => {
      if (stage === "build_script" && chunk.includes(text)) resolve();
    };
    return { printed: promise, onOutput };
  };

  jobTest("a job runs in an image with nothing but sh, cat, sleep and kill", async () => {
    const { status, trace, script, directories, of } = await run({
      image: "registry.example.com/minimal:1",
      shell: "sh",
      script: ["kill -l 9", "ls || echo no ls", "cat README.md >/dev/null && echo cloned"],
      afterScript: ["git --version || echo no git"],
    });
    expect(status, trace).toBe("success");
    expect(script).toMatch(/\nKILL\n[\s\S]*\nno ls\n[\s\S]*\ncloned\n/);
    expect(of("after_script")?.stdout.toString()).toContain("no git");
    expect(directories).toMatchObject({ builds_dir: "/builds", cache_dir: "/cache" });
  });

  jobTest("a job logs which images it gets", async () => {
    const { trace, task } = await run({ image: "debian:12", script: ["true"] });
    const log = trace.replaceAll(/^\S+Z (?=\w)/gm, "").split("\n");
    expect(log).toContain(
      "Images: docker.io/library/debian:12. ECS pulls them, without the job's registry credentials and DOCKER_AUTH_CONFIG",
    );
    const definition = task?.taskDefinitionArn.split("/").at(-1);
    expect(definition).toMatch(/^test-task-job-[0-9a-f]{32}:1$/);
    expect(log).toContain(`Starting a task of ${definition} on cluster test-cluster in us-east-2`);
    expect(trace).not.toMatch(/warning:|error:/);
  });

  jobTest("a job ignores the image's own entry point", async () => {
    const { status, script } = await run({
      image: "registry.example.com/tools/fails:1",
      script: ["echo $0 $$ >/dev/null; echo it runs"],
    });
    expect(status).toBe("success");
    expect(script).toContain("\nit runs\n");
  });

  jobTest("a job runs by way of image:entrypoint if that ends in exec", async () => {
    const name = "registry.example.com/tools/wraps:1";
    const { status, script } = await run({ image: { name, entrypoint: ["/entry"] }, script: ["echo $WRAPPED"] });
    expect(status).toBe("success");
    expect(script).toContain("\nby /entry sh\n");
  });

  jobTest("prepare fails the build if image:entrypoint does not end in exec", async () => {
    const name = "registry.example.com/tools/waits:1";
    expect(await refused({ image: { name, entrypoint: ["/entry"] } })).toBe(
      `the entry point of image: ${name} does not end in exec; set entrypoint: [""]`,
    );
    expect(await run({ image: { name, entrypoint: [""] }, script: ["true"] })).toMatchObject({ status: "success" });
  });

  jobTest("prepare fails the build if the image has no shell", async () => {
    const name = "registry.example.com/no-shell:1";
    expect(await refused({ image: name })).toMatch(
      /^the container of image: registry\.example\.com\/no-shell:1 has ended: CannotStartContainerError: .*"sh": executable file not found/,
    );
  });

  jobTest("prepare fails the build if the image cannot be pulled", async () => {
    expect(await refused({ image: "debian:unknown" })).toMatch(
      /^an image of this job cannot be used: .*CannotPullContainerError: .*docker\.io\/library\/debian:unknown: not found/,
    );
  });

  jobTest("a job reaches its services by name and by alias from both containers", async () => {
    const alive = (host: string, port: number) =>
      `timeout 5 bash -c ': <>/dev/tcp/${host}/${port}' && echo ${host} answers`;
    const runner = makeRunner({
      image: "postgres:16",
      services: [
        { name: "postgres:16", variables: [variable("POSTGRES_PASSWORD", "open"), variable("POSTGRES_DB", "shop")] },
        { name: "redis:7", alias: "cache, store" },
      ],
    });
    const prepared = (await runner.prepare()).at(-1);
    expect(prepared?.exitCode, prepared?.stderr.toString()).toBe(0);
    expect(prepared?.stderr.toString()).toMatch(
      /Waiting for services: postgres:16, redis:7\n[\s\S]*Services are ready/,
    );
    const query = "PGPASSWORD=open psql -h postgres -U postgres -Atc 'SELECT 6 * 7' shop";
    const ping = (host: string) =>
      `exec 3<>/dev/tcp/${host}/6379; echo PING >&3; read -r answer <&3; echo ${host} $answer`;
    const inBuild = await runner.run(
      "build_script",
      ["#!/bin/bash", query, ...["cache", "store", "redis"].map(ping)].join("\n"),
    );
    expect(inBuild.stdout.toString().replaceAll("\r", "")).toBe("42\ncache +PONG\nstore +PONG\nredis +PONG\n");
    const hosts = [alive("postgres", 5432), alive("cache", 6379), "command -v psql || echo coordinator"];
    const inCoordinator = await runner.run("restore_cache", ["#!/bin/bash", ...hosts].join("\n"));
    expect(inCoordinator.stdout.toString()).toBe("postgres answers\ncache answers\ncoordinator\n");
    expect(await runner.cleanup()).toMatchObject({ exitCode: 0 });
    nothingLeft(runner, runner.job);
  });

  jobTest("a job without an image uses services with command, entrypoint and variables", async () => {
    const { status, script, directories, trace } = await run({
      services: [
        { name: "redis:7", alias: "a", command: ["--port", "7001"], ports: port(7001) },
        {
          ...{ name: "redis:7", alias: "b", entrypoint: ["sh", "-c"], command: ['exec redis-server --port "$PORT"'] },
          variables: [variable("PORT", "7002"), variable("HEALTHCHECK_TCP_PORT", "7002")],
        },
      ],
      script: [...["a/7001", "b/7002"].map((at) => `timeout 5 bash -c ': <>/dev/tcp/${at}' && echo ${at}`)],
    });
    expect(status, trace).toBe("success");
    expect(script).toMatch(/\na\/7001\n[\s\S]*\nb\/7002\n/);
    expect(directories).not.toHaveProperty("builds_dir");
    expect(directories).not.toHaveProperty("cache_dir");
  });

  jobTest("prepare names a service that dies, with its reason and its log stream", async () => {
    const more = { Fargate: { TaskDefinition: "logged-task:1" } };
    const { status, trace, task } = await run(
      { services: ["registry.example.com/group/dies:1"], script: ["true"] },
      { more },
    );
    expect(status).toBe("success");
    const stream = `/ci/jobs job/service-1-dies/${task?.taskArn.split("/").at(-1)}`;
    expect(trace).toContain(
      `warning: the service registry.example.com/group/dies:1 has ended: exit code 7; its log: ${stream}\n`,
    );
    expect(trace).not.toContain("Services are ready");
  });

  jobTest("prepare fails the build if two services want one port", async () => {
    const services = ["redis:7", "postgres:16"].map((name) => ({ name, ports: port(7000) }));
    expect(await refused({ services })).toBe(
      "services: postgres:16 and redis:7 cannot both listen on port 7000: the containers of a task share one network",
    );
  });

  jobTest("a job that is cancelled in its image runs after_script there", async () => {
    const seconds = `8${process.pid}`; // a duration that no other process of this machine uses
    const { printed, onOutput } = printing("waiting now");
    const runner = makeRunner(
      {
        image: "debian:12",
        script: ["touch here", `echo waiting now; setsid sleep ${seconds} & timeout ${seconds} sleep ${seconds}`],
        afterScript: ['echo "after: $CI_JOB_STATUS"; ls here', `grep -lz '^${seconds}$' /proc/[0-9]*/cmdline | wc -l`],
      },
      { onOutput },
    );
    const whole = runner.runJob();
    await printed;
    await runner.cancel();
    const result = await whole;
    expect(result.status).toBe("canceled");
    const cancelled = result.stages.find(({ stage }) => stage === "build_script");
    expect(cancelled).toMatchObject({ exitCode: 2 });
    expect(cancelled?.stderr.toString()).toMatch(/error: stopped by SIGTERM\n$/);
    const after = result.stages.find(({ stage }) => stage === "after_script")?.stdout.toString() ?? "";
    expect(after).toMatch(/after: canceled\n[\s\S]*here\n[\s\S]*\n0\n$/);
    nothingLeft(result, runner.job);
  });

  jobTest("a job that runs out of memory in its image ends with 137 and the reason", async () => {
    const { status, exitCode, of, trace } = await run({
      image: "debian:12",
      script: ["tail /dev/zero"],
      afterScript: ['echo "after: $CI_JOB_STATUS"'],
    });
    expect({ status, exitCode }, trace).toEqual({ status: "build-failure", exitCode: 137 });
    expect(of("build_script")?.stderr.toString()).toMatch(
      /error: build_script ended with exit code 137: the kernel killed processes in this container because memory ran out\n.*error: what to do: give the task definition more memory/,
    );
    expect(of("after_script")).toMatchObject({ exitCode: 0 });
    expect(of("after_script")?.stdout.toString()).toContain("after: failed");
    expect(of("upload_artifacts_on_failure")).toMatchObject({ exitCode: 0 });
  });

  jobTest("a job ends when its container is killed", async () => {
    const { printed, onOutput } = printing("waiting now");
    const runner = makeRunner(
      { image: "debian:12", script: ["echo waiting now; sleep 600"], afterScript: ["echo after"] },
      { onOutput },
    );
    const whole = runner.runJob();
    await printed;
    await taskOf(runner.trace)?.host?.kill("build");
    const result = await whole;
    expect(result).toMatchObject({ status: "build-failure", exitCode: 137 });
    const errorOf = (name: string) => result.stages.find(({ stage }) => stage === name)?.stderr.toString();
    expect(errorOf("build_script")).toMatch(
      /error: the container of image: has ended while build_script ran: exit code 137\n/,
    );
    expect(errorOf("after_script")).toMatch(
      /error: after_script did not begin: the container of image: has ended: exit code 137\n/,
    );
    const artifacts = result.stages.find(({ stage }) => stage === "upload_artifacts_on_failure");
    expect(artifacts).toMatchObject({ exitCode: 0 });
    nothingLeft(result, runner.job);
  });

  jobTest("shell shares the files of a job with an image, which does not notice", async () => {
    const { printed, onOutput } = printing("waiting now");
    const config = world().configure({ top: { JobImage: ANY_IMAGE } });
    const wait = "until [ -s /builds/answer ]; do sleep 0.1; done; cat /builds/answer";
    const script = [`echo question >/builds/question; echo waiting now; ${wait}`];
    const runner = makeRunner({ image: "debian:12", script }, { onOutput, config });
    const whole = runner.runJob();
    await printed;
    const command = ["cat /builds/question; echo answer >/builds/answer; exit 6"];
    const args = ["--config", config, "shell", `${runner.job.response.id}`, "--", ...command];
    expect(await fargate(args, { env: world().aws.environment })).toMatchObject({
      code: 6,
      stdout: Buffer.from("question\n"),
      stderr: "",
    });
    const result = await whole;
    expect(result.status).toBe("success");
    const { stdout } = result.stages.find(({ stage }) => stage === "build_script") ?? {};
    expect(stdout?.toString()).toMatch(/waiting now\nanswer\n$/);
    nothingLeft(result, runner.job);
  });

  jobTest("a job runs in the task definition that a row of TaskDefinitions selects", async () => {
    const TaskDefinitions = [
      { Image: "registry.example.com/ci/node:*", TaskDefinition: "ci-node" },
      { Image: "registry.example.com/ci/**", TaskDefinition: "test-task" },
    ];
    const more = { top: { JobImage: { TaskDefinitions } } };
    const known = world().aws.taskDefinitions().length;
    const { status, script, task, directories } = await run(
      { image: "registry.example.com/ci/node:22", script: ["echo KIND is $KIND"] },
      { more },
    );
    expect(status).toBe("success");
    expect(script).toContain("\nKIND is node\n");
    expect(task?.taskDefinitionArn).toMatch(/\/ci-node:1$/);
    expect(directories).not.toHaveProperty("builds_dir");
    expect(
      world()
        .aws.taskDefinitions()
        .slice(known)
        .filter(({ family }) => family.startsWith("ci-node")),
    ).toEqual([]);
  });

  for (const [coordinator, jobs] of Object.entries({ root, worker }))
    for (const user of ["0", "1001:1001"])
      jobTest(`a job shares its files between ${coordinator} and the user ${user} of its image`, async () => {
        const runner = jobs.makeRunner({ image: { name: "debian:12", executor_opts: { docker: { user } } } });
        const textOf = (name: string) => runner.job.scripts.find(({ stage }) => stage === name)?.text ?? "";
        const prepared = (await runner.prepare()).at(-1);
        expect(prepared?.exitCode, prepared?.stderr.toString()).toBe(0);
        const run = async (stage: string, ...lines: string[]) => {
          const begin = ["#!/bin/bash", "set -e", `cd ${runner.job.projectDir}`];
          const text = lines.length > 0 ? [...begin, ...lines].join("\n") : textOf(stage);
          const { exitCode, stderr, stdout } = await runner.run(stage, text);
          expect(exitCode, `${stage}: ${stdout}${stderr}`).toBe(0);
          return stdout.toString();
        };
        await run("get_sources");
        const built = await run(
          "build_script",
          ...["id -u", "git log -1 --format=%H", "git status --porcelain", "echo >>README.md; rm LICENSE"],
          ...["mkdir -p reports/deep", "echo passed >reports/deep/result"],
        );
        expect(built).toBe(`${user.split(":")[0]}\n${repository.sha}\n`);
        const artifacts = await run(
          "upload_artifacts_on_success",
          ...["id -un", "tar -c reports | tar -xO", "git status --porcelain", "rm -r reports", "git checkout -q ."],
          "mkdir .cache; echo kept >.cache/file",
        );
        expect(artifacts).toBe(`${coordinator}\npassed\n D LICENSE\n M README.md\n?? reports/\n`);
        expect(await run("after_script", "cat .cache/file; rm -r .cache LICENSE; git status --porcelain")).toBe(
          "kept\n D LICENSE\n",
        );
        await run("get_sources"); // as the next job in a directory that is kept
        expect(await runner.cleanup()).toMatchObject({ exitCode: 0 });
        jobs.nothingLeft(runner, runner.job);
      });
});

describe("manager", () => {
  const text = ({ stderr }: { stderr: string }) => stderr.replace(/^\d{4}-\S+Z /gm, "");
  /** The environment and the command line of a process. */
  const readProcess = (pid: number) =>
    ["environ", "cmdline"].map((file) => fs.readFileSync(`/proc/${pid}/${file}`, "latin1")).join("\n");

  managerTest("manager registers runners, runs jobs and unregisters the runners at TERM", async (fleet) => {
    const { gitlab, world } = fleet;
    const container = await fleet.container({ managers: ["one", "two.x"], ecs: true });
    const started = container.start();
    await gitlab.waitFor(
      () => gitlab.runners.length === 2 && gitlab.runners.every(({ managers }) => managers.length > 0),
      60_000,
    );
    const systemId = fs.readFileSync(join(container.directory, ".runner_system_id"), "utf8");
    const names = ["one", "two.x"].map((name) => `fargate_${name}_${systemId.slice(2)}`);
    expect(gitlab.runners).toMatchObject(
      names.map((description) => ({ description, tags: ["fargate"], createdBy: "registration", managers: [systemId] })),
    );
    expect(container.sections().map(({ name, token }) => [name, token])).toEqual(
      gitlab.runners.map(({ description, token }) => [description, token]),
    );
    const jobs = gitlab.runners.map(({ token }) => fleet.queueJob(["echo from the script"], token));
    await gitlab.waitFor(() => jobs.every(({ state }) => state !== "pending" && state !== "running"), 60_000);
    expect(jobs).toMatchObject([{ state: "success" }, { state: "success" }]);
    expect(world.aws.callsTo("RunTask").map(({ input }) => input.startedBy?.split("-")[1])).toEqual(
      jobs.map(() => container.metadata?.id),
    );
    started.process.kill("SIGTERM");
    const finished = await started.finished;
    ended(finished, 0);
    expect(gitlab.runners).toEqual([]);
    expect(container.sections()).toEqual([]);
    expect(gitlab.requestsTo("unregisterManager")).toEqual([]);
    for (const name of names) expect(text(finished)).toContain(`\nunregistered ${name}\n`);
    expect(container.metadata?.requests).toHaveLength(1);
    expect(container.processes()).toEqual([]);
  });

  managerTest("manager gives no token to gitlab-runner and the stages of its jobs", async (fleet) => {
    const authentication = fleet.gitlab.createRunner({ description: "by a user" });
    const env = {
      MANAGERS_CONFIGS: JSON.stringify({ one: managerFields, two: managerFields }),
      GITLAB_RUNNER_TOKEN_TWO: authentication,
    };
    const container = await fleet.container({ env });
    const started = container.start();
    await fleet.gitlab.waitFor(() => fleet.gitlab.runners.length === 2, 60_000);
    const token = fleet.gitlab.runners[1]?.token ?? "";
    const { release, job } = await fleet.runningJob({ token });
    const others = container.processes().filter((pid) => pid !== started.process.pid);
    // gitlab-runner, and the stage run.
    expect(others.length).toBeGreaterThanOrEqual(2);
    for (const pid of others)
      for (const secret of [fleet.registrationToken, authentication, token])
        expect(readProcess(pid).includes(secret), readProcess(pid).split("\n")[1]).toBe(false);
    release();
    await fleet.gitlab.waitFor(() => job.state === "success", 60_000);
    started.process.kill("SIGTERM");
    const { stderr } = await started.finished;
    for (const secret of [fleet.registrationToken, authentication, token]) expect(stderr).not.toContain(secret);
  });

  testProgram.concurrent("manager starts gitlab-runner with its own arguments and CONFIG_FILE", async () => {
    const fleet = await makeManagerWorld();
    try {
      const container = await fleet.container({ env: { GITLAB_RUNNER_TOKENS: "x", OTHER: "kept" } });
      const script = `#!/bin/sh\necho "arguments: $*" >&2\nenv | grep -v '^AWS_' >&2\nexit 7\n`;
      fs.writeFileSync(join(container.directory, "bin", "gitlab-runner"), script);
      const finished = await container.start({}, "--", "--log-level", "debug", "run", "--user", "x y").finished;
      ended(finished, 7);
      expect(finished.stderr).toContain("arguments: --log-level debug run --user x y\n");
      expect(finished.stderr).toContain(`\nCONFIG_FILE=${container.configFile}\n`);
      expect(finished.stderr).toContain("\nOTHER=kept\n");
      expect(finished.stderr).not.toMatch(/^(GITLAB_REGISTRATION_TOKEN|GITLAB_RUNNER_TOKEN)/m);
    } finally {
      await fleet.close();
    }
  });

  for (const [signal, timeout] of [
    ["SIGQUIT", "0"],
    ["SIGTERM", "600"],
    ["SIGINT", "600"],
  ] as const)
    managerTest(`manager lets jobs finish at ${signal} with STOP_TIMEOUT ${timeout}`, async (fleet) => {
      const { gitlab } = fleet;
      const container = await fleet.container({ env: { STOP_TIMEOUT: timeout } });
      const started = container.start();
      const { job, release } = await fleet.runningJob();
      const next = fleet.queueJob(["echo never"]);
      started.process.kill(signal);
      await started.shows("Starting graceful shutdown");
      expect(gitlab.runners).toHaveLength(1);
      release();
      const finished = await started.finished;
      ended(finished, 0);
      expect(job).toMatchObject({ state: "success", trace: expect.stringContaining("now going\n") });
      expect(next.state).toBe("pending");
      expect(gitlab.runners).toEqual([]);
    });

  for (const [what, signals, timeout] of [
    ["TERM with STOP_TIMEOUT 0", ["SIGTERM"], "0"],
    ["INT with STOP_TIMEOUT 0", ["SIGINT"], "0"],
    ["TERM and after STOP_TIMEOUT", ["SIGTERM"], "1"],
    ["TERM after QUIT", ["SIGQUIT", "SIGTERM"], "0"],
  ] as const)
    managerTest(`manager cancels jobs at ${what}`, async (fleet) => {
      const container = await fleet.container({ env: { STOP_TIMEOUT: timeout } });
      const started = container.start();
      const { job } = await fleet.runningJob();
      for (const signal of signals) {
        started.process.kill(signal);
        await started.shows(signal === "SIGQUIT" || timeout === "1" ? "graceful shutdown" : "forceful shutdown");
      }
      ended(await started.finished, 0);
      expect(job).toMatchObject({ state: "failed", failureReason: "runner_system_failure" });
      expect(fleet.world.aws.tasks()).toHaveLength(1);
      expect(fleet.gitlab.runners).toEqual([]);
    });

  managerTest("manager unregisters only itself from a runner that a user created", async (fleet) => {
    const { gitlab } = fleet;
    const token = gitlab.createRunner({ description: "shared" });
    const env = { GITLAB_REGISTRATION_TOKEN: undefined, GITLAB_RUNNER_TOKEN: token };
    const [first, second] = [await fleet.container({ env }), await fleet.container({ env })];
    const all = [first.start(), second.start()];
    await gitlab.waitFor(() => new Set(gitlab.requestsTo("requestJob").map(systemIdOf)).size === 2, 60_000);
    const idOf = ({ directory: of }: Container) => fs.readFileSync(join(of, ".runner_system_id"), "utf8");
    all[0]?.process.kill("SIGTERM");
    ended((await all[0]?.finished) as Finished, 0);
    expect(gitlab.runners).toMatchObject([{ token, managers: [idOf(second)] }]);
    // The second one can still run jobs.
    const job = fleet.queueJob(["true"], token);
    await gitlab.waitFor(() => job.state === "success", 60_000);
    all[1]?.process.kill("SIGTERM");
    ended((await all[1]?.finished) as Finished, 0);
    expect(gitlab.runners).toMatchObject([{ token, managers: [] }]);
    expect(gitlab.requestsTo("unregister")).toEqual([]);
    // Its section stays, because the token stays valid.
    expect(first.sections()).toMatchObject([{ token }]);
  });
  const systemIdOf = ({ parameters }: GitLabRequest) => parameters.system_id;

  managerTest("manager keeps a user's runner whose section has the name of a registered one", async (fleet) => {
    const { gitlab } = fleet;
    const token = gitlab.createRunner({ description: "shared" });
    const container = await fleet.container();
    container.start({ GITLAB_RUNNER_TOKEN_ONE: token });
    await gitlab.waitFor(() => gitlab.requestsTo("requestJob").length > 0, 60_000);
    await container.kill();
    const started = container.start();
    await started.shows("Configuration loaded");
    started.process.kill("SIGTERM");
    ended(await started.finished, 0);
    expect(gitlab.requestsTo("unregister")).toEqual([]);
    expect(gitlab.runners).toMatchObject([{ token, managers: [] }]);
    expect(container.sections()).toMatchObject([{ token }]);
  });

  for (const status of [401, 404, 405])
    managerTest(`manager asks to remove a runner when GitLab answers ${status}`, async (fleet) => {
      const { gitlab } = fleet;
      const container = await fleet.container();
      const started = container.start();
      await gitlab.waitFor(() => gitlab.requestsTo("requestJob").length > 0, 60_000);
      gitlab.inject({ operation: "unregister", times: Number.POSITIVE_INFINITY, do: { status } });
      started.process.kill("SIGTERM");
      const finished = await started.finished;
      ended(finished, 0);
      expect(finished.stderr).toMatch(
        new RegExp(`could not be unregistered: \\S+ answers ${status}.*remove it in GitLab`),
      );
      expect(container.sections()).toMatchObject([{ token: gitlab.runners[0]?.token }]);
    });

  managerTest("manager warns about the section of a manager that is no longer configured", async (fleet) => {
    const { gitlab } = fleet;
    const container = await fleet.container();
    container.start();
    await gitlab.waitFor(() => gitlab.requestsTo("requestJob").length > 0, 60_000);
    await container.kill();
    const [former] = gitlab.runners.map(({ description }) => description);
    const MANAGERS_CONFIGS = JSON.stringify({ two: managerFields });
    const started = container.start({ MANAGERS_CONFIGS });
    await started.shows(`${former} in`);
    await gitlab.waitFor(() => gitlab.runners.length === 2, 60_000);
    await started.shows("Configuration loaded");
    started.process.kill("SIGTERM");
    const finished = await started.finished;
    ended(finished, 0);
    expect(finished.stderr).toMatch(/fargate_one_\w+ in \S+ is of no manager; remove it there and in GitLab/);
    expect(gitlab.runners.map(({ description }) => description)).toEqual([former]);
  });

  managerTest("manager registers again when its container is restarted after TERM", async (fleet) => {
    const { gitlab } = fleet;
    const container = await fleet.container();
    const tokens: unknown[] = [];
    for (const _ of [1, 2]) {
      const started = container.start();
      const { job, release } = await fleet.runningJob();
      release();
      await gitlab.waitFor(() => job.state === "success", 60_000);
      expect(container.sections()).toHaveLength(1);
      tokens.push(container.sections()[0]?.token);
      started.process.kill("SIGTERM");
      ended(await started.finished, 0);
      expect(gitlab.runners).toEqual([]);
    }
    expect(new Set(tokens).size).toBe(2);
    expect(gitlab.requestsTo("register")).toHaveLength(2);
  });

  managerTest("manager replaces the section of a runner that GitLab no longer knows", async (fleet) => {
    const { gitlab } = fleet;
    const container = await fleet.container({ managers: ["one", "two"] });
    container.start();
    await gitlab.waitFor(() => gitlab.requestsTo("requestJob").length > 0, 60_000);
    await container.kill();
    const [gone, kept] = gitlab.runners.map(({ token }) => token);
    gitlab.runners.shift();
    const started = container.start();
    await started.shows("registering it again");
    await gitlab.waitFor(() => gitlab.runners.length === 2, 60_000);
    await started.shows("Configuration loaded");
    const tokens = container.sections().map(({ token }) => token);
    expect(tokens).toHaveLength(2);
    expect(tokens).toContain(kept);
    expect(tokens).not.toContain(gone);
    expect(new Set(tokens)).toEqual(new Set(gitlab.runners.map(({ token }) => token)));
    started.process.kill("SIGTERM");
    ended(await started.finished, 0);
    expect(gitlab.runners).toEqual([]);
  });

  managerTest("manager registers nothing twice when its container is restarted after SIGKILL", async (fleet) => {
    const { gitlab } = fleet;
    const container = await fleet.container({ ecs: true });
    container.start();
    await fleet.runningJob();
    await container.kill();
    expect(fleet.workers()).toHaveLength(1);
    const before = fs.readFileSync(container.configFile, "utf8");
    const started = container.start();
    const { job, release } = await fleet.runningJob();
    expect(fs.readFileSync(container.configFile, "utf8")).toBe(before);
    expect(gitlab.requestsTo("register")).toHaveLength(1);
    release();
    await gitlab.waitFor(() => job.state === "success", 60_000);
    // The new process of the same task has the same id, and stops what the old one left.
    started.process.kill("SIGTERM");
    ended(await started.finished, 0);
    expect(gitlab.runners).toEqual([]);
  });

  managerTest("manager sweeps each cluster at once and then every SWEEP_INTERVAL", async (fleet) => {
    const { aws } = fleet.world;
    const two = { ...managerFields, worker_ecs_cluster_arn: "bare-cluster" };
    const configs = { one: managerFields, same: managerFields, two };
    const env = { MANAGERS_CONFIGS: JSON.stringify(configs), SWEEP_INTERVAL: "1" };
    const container = await fleet.container({ env });
    const started = container.start();
    await aws.waitFor(() => aws.callsTo("ListTasks").length >= 6, 60_000);
    const clusters = aws.callsTo("ListTasks").map(({ input }) => input.cluster?.replace(/.*\//, ""));
    expect(clusters.slice(0, 6)).toEqual([1, 2, 3].flatMap(() => ["test-cluster", "bare-cluster"]));
    started.process.kill("SIGTERM");
    const finished = await started.finished;
    ended(finished, 0);
    expect(finished.stderr).not.toMatch(/sweep|warning: (?!Starting)/);
  });

  managerTest("manager calls nothing of AWS without jobs when SWEEP_INTERVAL is 0", async (fleet) => {
    const container = await fleet.container({ env: { SWEEP_INTERVAL: "0" } });
    const started = container.start();
    await fleet.gitlab.waitFor(() => fleet.gitlab.requestsTo("requestJob").length > 3, 60_000);
    started.process.kill("SIGTERM");
    ended(await started.finished, 0);
    expect(fleet.world.aws.calls).toEqual([]);
  });

  managerTest("manager warns once when sweep may not list tasks", async (fleet) => {
    const { aws } = fleet.world;
    aws.permissions = new Set(["ecs:RunTask", "ecs:DescribeTasks", "ecs:StopTask", "iam:PassRole", "ecs:TagResource"]);
    const container = await fleet.container({ env: { SWEEP_INTERVAL: "1" } });
    const started = container.start();
    const { job, release } = await fleet.runningJob();
    const swept = () => aws.callsTo("ListTasks").filter(({ input }) => input.startedBy === undefined).length;
    await aws.waitFor(() => swept() >= 3, 60_000);
    release();
    await fleet.gitlab.waitFor(() => job.state === "success", 60_000);
    started.process.kill("SIGTERM");
    const finished = await started.finished;
    ended(finished, 0);
    const lines = text(finished).split("\n");
    const warnings = lines.filter((line) => line.includes("ListTasks"));
    expect(warnings).toEqual([
      expect.stringMatching(/^warning: sweep of \S*test-cluster: ecs:ListTasks was refused: .*allow ecs:ListTasks in/),
    ]);
  });
});

describeProgram("private CA", () => {
  const authority = makeAuthority();
  const files: Record<string, string> = {};
  let world: World;
  beforeAll(async () => {
    const where = directory();
    const file = (name: string, text: string) => {
      files[name] = join(where, name);
      fs.writeFileSync(files[name], text);
    };
    file("ca.pem", authority.pem);
    file("other.pem", makeAuthority().pem);
    file("two.pem", `# comment\n${makeAuthority().pem}${authority.pem}`);
    file("broken.pem", authority.pem.replace(/\n[^-]{20}/, "\n"));
    file("empty.pem", "");
    file("config", `[default]\nca_bundle = ${files["ca.pem"]}\n[profile ci]\nca_bundle=${files["other.pem"]}\n`);
    file("profiles", `[default]\nca_bundle = ${files["other.pem"]}\n[profile ci]\nca_bundle=${files["ca.pem"]}\n`);
    world = await makeWorld({ embedded: true, tls: authority.issue() });
  });
  afterAll(() => world?.close());
  /** Runs sweep, which calls ListTasks, without the CA settings of this process's environment. */
  const list = (env: Record<string, string | undefined> = {}, wrapper: string[] = []) =>
    start([...wrapper, driver, "--config", world.configure(), "sweep"], { env: { ...world.aws.environment, ...env } })
      .finished;

  test.each([
    ["AWS_CA_BUNDLE", () => ({ AWS_CA_BUNDLE: files["ca.pem"] })],
    ["the second certificate of AWS_CA_BUNDLE", () => ({ AWS_CA_BUNDLE: files["two.pem"] })],
    ["ca_bundle of the shared config file", () => ({ AWS_CONFIG_FILE: files.config })],
    ["ca_bundle of a profile", () => ({ AWS_CONFIG_FILE: files.profiles, AWS_PROFILE: "ci" })],
    [
      "AWS_CA_BUNDLE before ca_bundle",
      () => ({ AWS_CA_BUNDLE: files["ca.pem"], AWS_CONFIG_FILE: files.config, AWS_PROFILE: "ci" }),
    ],
    ["NODE_EXTRA_CA_CERTS", () => ({ NODE_EXTRA_CA_CERTS: files["ca.pem"] })],
    [
      "NODE_EXTRA_CA_CERTS beside AWS_CA_BUNDLE",
      () => ({ NODE_EXTRA_CA_CERTS: files["ca.pem"], AWS_CA_BUNDLE: files["other.pem"] }),
    ],
    ["SSL_CERT_FILE", () => ({ SSL_CERT_FILE: files["ca.pem"] })],
    [
      "SSL_CERT_FILE beside AWS_CA_BUNDLE",
      () => ({ SSL_CERT_FILE: files["ca.pem"], AWS_CA_BUNDLE: files["other.pem"] }),
    ],
  ])("sweep trusts a private CA through %s", async (_, env) => {
    const finished = await list(env());
    expect(finished).toMatchObject({ code: 0, stderr: "" });
  });

  for (const beside of [false, true])
    test(`sweep trusts a private CA through the system's store${beside ? " beside AWS_CA_BUNDLE" : ""}`, async ({
      skip,
    }) => {
      const store = join(directory(), "certs");
      fs.mkdirSync(store);
      fs.writeFileSync(join(store, "ca-certificates.crt"), authority.pem);
      const script = 'mount --bind "$1" /etc/ssl && shift && exec "$@"';
      const inNamespace = ["unshare", "--mount", "sh", "-c", script, "sh", join(store, "..")];
      if (spawnSync(inNamespace[0] as string, [...inNamespace.slice(1), "true"]).status !== 0)
        skip("this process may not mount a directory over /etc/ssl");
      const finished = await list(beside ? { AWS_CA_BUNDLE: files["other.pem"] } : {}, inNamespace);
      expect(finished).toMatchObject({ code: 0, stderr: "" });
    });

  test.each([
    ["is missing", "none.pem", /: ENOENT: /],
    ["is empty", "empty.pem", /: it contains no certificate\n/],
    ["holds a broken certificate", "broken.pem", /: .*\n/],
  ])("sweep names an AWS_CA_BUNDLE that %s", async (_, name, reason) => {
    const calls = world.aws.calls.length;
    const path = files[name] ?? "/none.pem";
    const finished = await list({ AWS_CA_BUNDLE: path });
    ended(finished, 2);
    expect(finished.stderr).toMatch(/error: the CA bundle \/\S+ cannot be used: /);
    expect(finished.stderr).toContain(path);
    expect(finished.stderr).toMatch(reason);
    expect(world.aws.calls.length).toBe(calls);
  });

  test("a job succeeds with a private CA", async () => {
    const scene = makeScene(world, {}, forever);
    const env = { AWS_CA_BUNDLE: files["ca.pem"] };
    ended(await scene.stage("prepare", { env }), 0);
    ended(await scene.begin("run", { script: "true", env }).finished, 0);
    ended(await scene.stage("cleanup", { env }), 0);
    expect(world.aws.running()).toEqual([]);
  });
});

describeProgram("runners", () => {
  const newFleet = async (options?: GitLabStandInOptions) => {
    const fleet = await makeFleet(options);
    onTestFinished(() => fleet.close());
    return fleet;
  };
  const json = (name: string) =>
    JSON.parse(fs.readFileSync(join(projectRoot, "fixtures", "config", `${name}.json`), "utf8"));
  /** Terraform's jsonencode: sorted keys, and three characters escaped. */
  const jsonencode = (value: unknown): string => {
    const sorted = (item: unknown): unknown =>
      Array.isArray(item)
        ? item.map(sorted)
        : item && typeof item === "object"
          ? Object.fromEntries(
              Object.entries(item)
                .sort()
                .map(([key, member]) => [key, sorted(member)]),
            )
          : item;
    const escapes: Record<string, string> = { "<": "\\u003c", ">": "\\u003e", "&": "\\u0026" };
    return JSON.stringify(sorted(value)).replace(/[<>&]/g, (character) => escapes[character] as string);
  };
  /** The lines of a log, without times. */
  const lines = ({ stderr }: Finished) =>
    stderr
      .replace(/^\S+Z /gm, "")
      .trimEnd()
      .split("\n");
  /** The lines about problems. */
  const problems = (finished: Finished) =>
    lines(finished)
      .filter((line) => line.startsWith("error: "))
      .map((line) => line.replace(/^error: +/, ""));
  const systemId = (fleet: Fleet) => fs.readFileSync(join(fleet.directory, ".runner_system_id"), "utf8");
  const named = (fleet: Fleet, name: string) => `fargate_${name}_${systemId(fleet).slice(2)}`;

  describe("managers", () => {
    const forms: [form: string, of: (map: object) => unknown][] = [
      ["map", (map) => map],
      ["list", Object.values],
    ];

    test.each(forms)("runners accepts MANAGERS_CONFIGS as Terraform writes it, as a %s", async (_, of) => {
      const fleet = await newFleet();
      const map = json("managers-terraform");
      const finished = await fleet.run({
        MANAGERS_CONFIGS: jsonencode(of(map)),
        RUNNER_CONCURRENCY: "10",
        RUNNER_NAME_PREFIX: "team.a",
      });
      ended(finished, 0);
      expect(finished.stderr).not.toMatch(/warning|error/);
      const prefix = (name: string) => `team.a_${name}_${systemId(fleet).slice(2)}`;
      const commonSection = {
        url: fleet.gitlab.url,
        executor: "custom",
        builds_dir: "/opt/gitlab-runner/builds",
        cache_dir: "/opt/gitlab-runner/cache",
        custom: expect.anything(),
      };
      const [apps, web] = fleet.gitlab.runners;
      expect(fleet.content()).toEqual({
        concurrent: 10,
        check_interval: 0,
        shutdown_timeout: 18,
        session_server: { session_timeout: 1800 },
        runners: [
          { ...commonSection, name: prefix("dev_apps"), id: apps?.id, token: apps?.token, limit: 10 },
          { ...commonSection, name: prefix("dev_web"), id: web?.id, token: web?.token, limit: 5 },
        ],
      });
      expect(fleet.gitlab.runners).toMatchObject([
        { description: prefix("dev_apps"), tags: ["dev", "apps"], createdBy: "registration" },
        { description: prefix("dev_web"), tags: ["dev", "web", "r&d"], createdBy: "registration" },
      ]);
      const [first, second] = fleet.sections().map(driverConfig);
      expect(first).toMatchObject({ path: join(fleet.directory, "fargate-dev_apps.toml"), warnings: [] });
      expect(second).toMatchObject({ path: join(fleet.directory, "fargate-dev_web.toml"), warnings: [] });
      expect(first?.config).toMatchObject({
        Fargate: {
          Cluster: map.dev_apps.worker_ecs_cluster_arn,
          Region: "eu-west-1",
          Subnet: "subnet-0a1b2c3d",
          SecurityGroup: "sg-0a1b2c3d",
          TaskDefinition: map.dev_apps.worker_task_definition_arn,
        },
        TaskMetadata: { Directory: "/opt/gitlab-runner/metadata" },
        SSH: { Username: "builder", CancelGracePeriod: 8 },
      });
      expect(second?.config.SSH.Username).toBe("root");
      expect(fleet.names()).toEqual([
        ".runner_system_id",
        "config.toml",
        "fargate-dev_apps.toml",
        "fargate-dev_web.toml",
      ]);
      for (const name of fleet.names()) expect(fs.statSync(join(fleet.directory, name)).mode & 0o777, name).toBe(0o600);
    });

    test.each(forms)("runners accepts the sample file of a manager image, as a %s", async (form, of) => {
      const fleet = await newFleet();
      const path = join(fleet.directory, "managers.json");
      fs.writeFileSync(path, JSON.stringify(of(json("managers")), null, 2));
      // One form is read from the file, and one from standard input.
      const input = ["sh", "-c", 'file=$1; shift; exec "$@" <"$file"', "sh", path];
      const finished =
        form === "map" ? await fleet.run({}, ["--managers", path]) : await fleet.run({}, ["--managers", "-"], input);
      ended(finished, 0);
      expect(finished.stderr).not.toMatch(/warning|error/);
      expect(fleet.gitlab.runners).toMatchObject([
        { description: named(fleet, "apps"), tags: ["build", "test", "apps"] },
        { description: named(fleet, "tools"), tags: ["tools"] },
      ]);
      expect(fleet.sections().map(({ limit }) => limit)).toEqual([7, 12]);
      expect(fleet.content().concurrent).toBe(1);
      expect(fleet.sections().map((section) => driverConfig(section).config.Fargate)).toMatchObject([
        { Cluster: "workers-a", Region: "eu-west-1", Subnet: "subnet-0a1b", TaskDefinition: "apps-worker:3" },
        { Cluster: "workers-b", Region: "eu-central-1", SecurityGroup: "sg-2c3d", TaskDefinition: "tools-worker:8" },
      ]);
    });

    test.each(["FARGATE", "WORKER"])("runners accepts the variables %s_* of a single runner", async (prefix) => {
      const fleet = await newFleet();
      const variables = {
        [`${prefix}_CLUSTER`]: "workers",
        [`${prefix}_REGION`]: "eu-west-1",
        [`${prefix}_SUBNET`]: "subnet-0a1b2c3d",
        [`${prefix}_SECURITY_GROUP`]: "sg-0a1b2c3d",
        [`${prefix}_TASK_DEFINITION`]: "worker:2",
        ...(prefix === "WORKER" && { WORKER_SSH_USER: "builder" }),
      };
      const finished = await fleet.run({ ...variables, RUNNER_TAG_LIST: "a, b,", RUNNER_NAME_PREFIX: "shop" });
      ended(finished, 0);
      expect(finished.stderr).not.toMatch(/warning|error/);
      const name = `shop_default_${systemId(fleet).slice(2)}`;
      expect(fleet.gitlab.runners).toMatchObject([{ description: name, tags: ["a", "b"] }]);
      const [section] = fleet.sections() as [RunnerSection];
      expect(section).toMatchObject({ name, token: fleet.gitlab.runners[0]?.token });
      expect(section).not.toHaveProperty("limit");
      expect(driverConfig(section)).toMatchObject({
        path: join(fleet.directory, "fargate-default.toml"),
        config: {
          Fargate: {
            Cluster: "workers",
            Region: "eu-west-1",
            Subnet: "subnet-0a1b2c3d",
            SecurityGroup: "sg-0a1b2c3d",
            TaskDefinition: "worker:2",
          },
          SSH: { Username: prefix === "WORKER" ? "builder" : "root" },
        },
      });
    });

    test("runners prefers DRIVER_SETTINGS to defaults, and a manager's own fields to both", async () => {
      const fleet = await newFleet();
      const { worker_subnet_id: _, worker_security_group_id: __, ...bare } = WORKER;
      const common = {
        LogLevel: "warn",
        Fargate: { Subnets: ["subnet-1", "subnet-2"], SecurityGroup: "sg-common", Tags: { team: "a" } },
        ssh: { port: 2222, username: "common", CancelGracePeriod: 20 },
        TaskMetadata: { Directory: "/srv/metadata" },
      };
      const one = {
        ...bare,
        worker_subnet_id: "subnet-one",
        driver_settings: {
          Fargate: { SecurityGroups: ["sg-1", "sg-2"], StartTimeout: 900 },
          SSH: { Username: "own" },
        },
      };
      const two = { ...bare, worker_ssh_user: "two", worker_security_group_id: "" };
      const finished = await fleet.run({
        MANAGERS_CONFIGS: JSON.stringify({ one, two }),
        DRIVER_SETTINGS: JSON.stringify(common),
        SHUTDOWN_TIMEOUT: "30",
      });
      ended(finished, 0);
      expect(finished.stderr).not.toMatch(/warning|error/);
      const [first, second] = fleet.sections().map((section) => driverConfig(section).config);
      expect(first).toMatchObject({
        LogLevel: "warn",
        Fargate: { Subnet: "subnet-one", SecurityGroups: ["sg-1", "sg-2"], StartTimeout: 900, Tags: { team: "a" } },
        SSH: { Port: 2222, Username: "own", CancelGracePeriod: 20 },
        TaskMetadata: { Directory: "/srv/metadata" },
      });
      expect(first?.Fargate).not.toHaveProperty("Subnets");
      expect(first?.Fargate).not.toHaveProperty("SecurityGroup");
      expect(second).toMatchObject({
        Fargate: { Subnets: ["subnet-1", "subnet-2"], SecurityGroup: "sg-common" },
        SSH: { Username: "two" },
      });
    });

    test("runners warns about fields and settings that it does not know", async () => {
      const fleet = await newFleet();
      const own = { ...WORKER, workers: 3, driver_settings: { SSH: { Prot: 22 } } };
      const finished = await fleet.run({ MANAGERS_CONFIGS: JSON.stringify({ own }) });
      ended(finished, 0);
      expect(lines(finished).filter((line) => line.startsWith("warning"))).toEqual([
        'warning: manager "own": workers is not a known field, and has no effect',
        'warning: manager "own": unknown key SSH.Prot; the most similar known key is SSH.Port',
      ]);
    });

    test("runners leaves a driver's configuration file that differs from the settings", async () => {
      const fleet = await newFleet();
      ended(await fleet.run(managersNamed("one")), 0);
      const path = join(fleet.directory, "fargate-one.toml");
      fs.appendFileSync(path, "Port = 2222\n");
      const before = fleet.snapshot();
      const finished = await fleet.run(managersNamed("one"));
      ended(finished, 0);
      expect(finished.stderr).toContain(`${path} differs from the manager's settings, and is left as it is`);
      expect(fleet.snapshot()).toEqual(before);
    });
  });

  describe("authentication tokens", () => {
    type Variables = Record<string, string>;
    const sources: [where: string, names: string[], give: (tokens: string[], fleet: Fleet) => Variables][] = [
      ["GITLAB_RUNNER_TOKEN", ["one"], ([token = ""]) => ({ GITLAB_RUNNER_TOKEN: token })],
      ["GITLAB_REGISTRATION_TOKEN", ["one"], ([token = ""]) => ({ GITLAB_REGISTRATION_TOKEN: token })],
      [
        "GITLAB_RUNNER_TOKEN_<NAME>",
        ["one", "web-2.x"],
        ([one = "", web = ""]) => ({ GITLAB_RUNNER_TOKEN_ONE: one, GITLAB_RUNNER_TOKEN_WEB_2_X: ` ${web}\n` }),
      ],
      [
        "RUNNER_TOKENS_FILE",
        ["a-b", "a_b"],
        ([one, two], fleet) => ({ RUNNER_TOKENS_FILE: fleet.tokens(`# two\na_b ${two}\n\na-b=${one}\n`) }),
      ],
    ];
    test.each(sources)("runners verifies the authentication tokens in %s", async (_, names, give) => {
      const fleet = await newFleet();
      const tokens = names.map((name) => fleet.gitlab.createRunner({ description: name }));
      const finished = await fleet.run({
        GITLAB_REGISTRATION_TOKEN: undefined,
        ...managersNamed(...names),
        ...give(tokens, fleet),
      });
      ended(finished, 0);
      expect(finished.stderr).not.toMatch(/warning|error/);
      const id = systemId(fleet);
      expect(id).toMatch(/^r_[0-9a-zA-Z]{12}$/);
      expect(fleet.gitlab.requests.map(({ operation, parameters }) => [operation, parameters])).toEqual(
        tokens.map((token) => ["verify", { token, system_id: id }]),
      );
      expect(fleet.gitlab.runners.map(({ managers }) => managers)).toEqual(names.map(() => [id]));
      expect(fleet.sections().map(({ name, id, token }) => ({ name, id, token }))).toEqual(
        tokens.map((token, n) => ({ name: named(fleet, names[n] ?? ""), id: n + 1, token })),
      );
      fleet.sections().forEach(driverConfig);
    });

    test("runners says once that tags have no effect with authentication tokens", async () => {
      const fleet = await newFleet();
      const [one = "", two = "", three = ""] = [1, 2, 3].map(() => fleet.gitlab.createRunner());
      const finished = await fleet.run({
        MANAGERS_CONFIGS: JSON.stringify({
          one: { ...WORKER, tags: ["a"] },
          two: { ...WORKER, tag_list: "b" },
          three: WORKER,
        }),
        GITLAB_RUNNER_TOKEN_ONE: one,
        GITLAB_RUNNER_TOKEN_TWO: two,
        GITLAB_RUNNER_TOKEN_THREE: three,
      });
      ended(finished, 0);
      expect(lines(finished).filter((line) => line.startsWith("warning"))).toEqual([
        "warning: the tags of one, two are ignored: GitLab uses those that are set there",
      ]);
    });

    test("runners stores when a token of its own runner expires", async () => {
      const fleet = await newFleet({ tokenExpiresAt: "2031-02-03T04:05:06.000Z" });
      const token = fleet.gitlab.createRunner();
      ended(await fleet.run({ ...managersNamed("one", "two"), GITLAB_RUNNER_TOKEN_TWO: token }), 0);
      const [registered, given] = fleet.sections();
      expect(registered?.token_expires_at?.toISOString()).toBe("2031-02-03T04:05:06.000Z");
      expect(registered).toHaveProperty("token_obtained_at");
      expect(given).not.toHaveProperty("token_expires_at");
    });

    test("runners gives every runner the cache that CACHE_S3_BUCKET_NAME names", async () => {
      const fleet = await newFleet();
      const bucket = { CACHE_S3_BUCKET_NAME: "test-ci-cache", CACHE_S3_BUCKET_LOCATION: "us-east-2" };
      ended(await fleet.run({ ...managersNamed("one", "two"), ...bucket }), 0);
      const example = parse(fs.readFileSync(join(projectRoot, "examples", "cache-s3.toml"), "utf8"));
      const { cache } = example.runners as unknown as { cache: object };
      expect(fleet.sections().map((section) => section.cache)).toEqual([cache, cache]);
    });

    test("runners uses the registration token of managers without a token of their own", async () => {
      const fleet = await newFleet();
      const token = fleet.gitlab.createRunner();
      const list = fleet.tokens(`two ${token}\nthree ${REGISTRATION_TOKEN}\n`);
      ended(await fleet.run(managersNamed("one", "two", "three"), ["--tokens", list]), 0);
      expect(fleet.gitlab.requests.map(({ operation }) => operation)).toEqual(["register", "verify", "register"]);
      expect(fleet.sections().map(({ token }) => token)).toEqual([
        fleet.gitlab.runners[1]?.token,
        token,
        fleet.gitlab.runners[2]?.token,
      ]);
    });
  });

  describe("problems", () => {
    const TOKEN = `glrt-t1_${madeUpSecret("a token in a wrong place", 20)}`;
    const other = `glrt-${madeUpSecret("another token in a wrong place", 20)}`;
    beforeAll(() => {
      for (const token of [TOKEN, other]) wholeRun.register(token, "a token in a wrong place", "runner");
    });
    const managersOf = (...list: unknown[]) => ({ MANAGERS_CONFIGS: JSON.stringify(list) });
    const one = { manager_name: "one", ...WORKER };
    const { worker_aws_region: _, ...homeless } = one;
    const name = "expected: 1 to 100 of A-Z, a-z, 0-9, _, . and -";
    const whole = (min: number) => `a whole number from ${min} to 999999`;
    const list = (text: string) => (fleet: Fleet) => {
      fleet.driverFile();
      return ["--config", "fargate.toml", "--tokens", fleet.tokens(text)];
    };

    const cases: [
      what: string,
      variables: Record<string, string | undefined>,
      expected: string[],
      args?: (fleet: Fleet) => string[],
    ][] = [
      ["no managers and no tokens", {}, ["there are no runners; set MANAGERS_CONFIGS, or give --tokens"]],
      [
        "MANAGERS_CONFIGS that is not JSON",
        { MANAGERS_CONFIGS: "{" },
        ["MANAGERS_CONFIGS is not a JSON object or list"],
      ],
      [
        "MANAGERS_CONFIGS that is a number",
        { MANAGERS_CONFIGS: "7" },
        ["MANAGERS_CONFIGS is not a JSON object or list"],
      ],
      [
        "managers that are no objects",
        managersOf(null, [], "one"),
        [1, 2, 3].map((key) => `MANAGERS_CONFIGS: manager ${key} is not an object`),
      ],
      [
        "managers with bad names",
        managersOf(
          { ...one, manager_name: "a b" },
          WORKER,
          { ...one, manager_name: null },
          { ...one, manager_name: 5 },
        ),
        [
          `manager "a b": manager_name is "a b"; ${name}`,
          `manager 2: manager_name is missing; ${name}`,
          `manager 3: manager_name is missing; ${name}`,
          `manager 4: manager_name is 5; ${name}`,
        ],
      ],
      ["two managers of one name", managersOf(one, one), ['manager "one": the name occurs twice']],
      [
        "a manager with bad values in all fields",
        managersOf({
          manager_name: "one",
          tag_list: 5,
          tags: [1],
          limit: -1,
          worker_ecs_cluster_arn: [],
          worker_aws_region: true,
          worker_subnet_id: 5,
          worker_security_group_id: {},
          worker_task_definition_arn: 0,
          worker_ssh_user: 7,
          driver_settings: { Fargate: { StartTimeout: "long" }, SSH: { Port: 70_000 } },
        }),
        [
          "tag_list is 5; expected: a list, or a text with commas",
          "tags is [1]; expected: a list, or a text with commas",
          `limit is -1; expected: the number of jobs that this manager runs at once, 0 for no limit, ${whole(0)}`,
          "worker_ecs_cluster_arn: Fargate.Cluster is []; expected: the name or ARN of the ECS cluster",
          "worker_aws_region: Fargate.Region is true; expected: an AWS region, such as us-east-1",
          "worker_subnet_id: Fargate.Subnet is 5; expected: a subnet ID, such as subnet-0a1b2c3d",
          "worker_security_group_id: Fargate.SecurityGroup is {}; expected: a security group ID, such as sg-0a1b2c3d",
          "worker_task_definition_arn: Fargate.TaskDefinition is 0; expected: family, family:revision or ARN of the task definition",
          'Fargate.StartTimeout is "long"; expected: seconds within which a task must be ready, a whole number from 1 to 86400',
          "worker_ssh_user: SSH.Username is 7; expected: the user to log in as",
          "SSH.Port is 70000; expected: the port of the task's SSH server, a whole number from 1 to 65535",
        ].map((line) => `manager "one": ${line}`),
      ],
      [
        "a manager without settings",
        managersOf({ manager_name: "one" }),
        [
          "worker_ecs_cluster_arn: Fargate.Cluster is missing; expected: the name or ARN of the ECS cluster",
          "worker_aws_region: Fargate.Region is missing; expected: an AWS region, such as us-east-1",
          "worker_task_definition_arn: Fargate.TaskDefinition is missing; expected: family, family:revision or ARN of the task definition",
          "Fargate.Subnet: set either Subnet, a subnet ID, or Subnets, a list of 1 to 16 subnet IDs",
          "Fargate.SecurityGroup: set either SecurityGroup, a security group ID, or SecurityGroups, a list of 1 to 5",
        ].map((line) => `manager "one": ${line}`),
      ],
      [
        "bad variables and a bad manager",
        {
          ...managersOf(homeless, { ...one, manager_name: "two", driver_settings: 3 }),
          GITLAB_URL: "gitlab.example.com",
          RUNNER_NAME_PREFIX: "a\tb",
          RUNNER_CONCURRENCY: "0",
          SHUTDOWN_TIMEOUT: "1.5",
          STOP_TIMEOUT: "soon",
          SWEEP_INTERVAL: "-1",
          DRIVER_SETTINGS: "[]",
          CACHE_S3_BUCKET_NAME: "test-ci-cache",
          GITLAB_REGISTRATION_TOKEN: undefined,
          GITLAB_RUNNER_TOKEN_THREE: TOKEN,
        },
        [
          'GITLAB_URL is "gitlab.example.com"; expected: the address of GitLab, such as https://gitlab.com',
          'RUNNER_NAME_PREFIX is "a\\tb"; expected: 1 to 100 printable characters',
          `RUNNER_CONCURRENCY is "0"; expected: the number of jobs that run at once, ${whole(1)}`,
          `SHUTDOWN_TIMEOUT is "1.5"; expected: seconds that cancelled jobs have to end, ${whole(1)}`,
          `STOP_TIMEOUT is "soon"; expected: seconds that jobs have to finish before they are cancelled, ${whole(0)}`,
          `SWEEP_INTERVAL is "-1"; expected: seconds between sweeps, 0 for none, ${whole(0)}`,
          'DRIVER_SETTINGS is "[]"; expected: a JSON object with keys of the driver\'s configuration file',
          "CACHE_S3_BUCKET_LOCATION is not set; expected: the bucket's region",
          'manager "one": worker_aws_region: Fargate.Region is missing; expected: an AWS region, such as us-east-1',
          'manager "two": driver_settings is 3; expected: a JSON object with keys of the driver\'s configuration file',
          "GITLAB_RUNNER_TOKEN_THREE is for no manager",
          "manager one has no token; set GITLAB_RUNNER_TOKEN_ONE",
          "manager two has no token; set GITLAB_RUNNER_TOKEN_TWO",
        ],
      ],
      [
        "DRIVER_SETTINGS that is not JSON",
        { ...managersOf(one), DRIVER_SETTINGS: "{Fargate}" },
        ['DRIVER_SETTINGS is "{Fargate}"; expected: a JSON object with keys of the driver\'s configuration file'],
      ],
      [
        "a password in GITLAB_URL",
        { ...managersOf(one), GITLAB_URL: `https://user:${TOKEN}@gitlab.example.com` },
        [
          'GITLAB_URL is "https://[password]@gitlab.example.com"; expected: the address of GitLab, such as https://gitlab.com',
        ],
      ],
      [
        "tokens in MANAGERS_CONFIGS",
        {
          MANAGERS_CONFIGS: JSON.stringify({
            one: { ...WORKER, gitlab_token: TOKEN },
            [other]: { ...WORKER, colour: 1 },
          }),
        },
        [
          'manager "one": gitlab_token must not be here; set GITLAB_RUNNER_TOKEN_<NAME>',
          `manager "[token]": manager_name is "[token]"; ${name}`,
        ],
      ],
      [
        "an authentication token for two managers",
        { ...managersOf(one, { ...one, manager_name: "t.wo" }), GITLAB_RUNNER_TOKEN: TOKEN },
        [
          "managers one and t.wo have the same authentication token, so either could get the other's jobs; create a " +
            "runner for each in GitLab, and set GITLAB_RUNNER_TOKEN_ONE and GITLAB_RUNNER_TOKEN_T_WO",
        ],
      ],
      [
        "a glrt- registration token of two managers",
        { ...managersOf(one, { ...one, manager_name: "two" }), GITLAB_REGISTRATION_TOKEN: TOKEN },
        [
          "managers one and two have the same authentication token, so either could get the other's jobs; create a " +
            "runner for each in GitLab, and set GITLAB_RUNNER_TOKEN_ONE and GITLAB_RUNNER_TOKEN_TWO",
        ],
      ],
      [
        "a variable that is for two managers",
        {
          ...managersOf({ ...one, manager_name: "a-b" }, { ...one, manager_name: "a_b" }),
          GITLAB_RUNNER_TOKEN_A_B: TOKEN,
        },
        [
          "GITLAB_RUNNER_TOKEN_A_B is for both a_b and a-b; use a list of tokens",
          "GITLAB_RUNNER_TOKEN_A_B is for both a-b and a_b; use a list of tokens",
          "managers a-b and a_b have the same authentication token, so either could get the other's jobs; create a " +
            "runner for each in GitLab, and set GITLAB_RUNNER_TOKEN_A_B and GITLAB_RUNNER_TOKEN_A_B",
        ],
      ],
      [
        "a list of tokens for other managers",
        managersOf(one),
        ["line 1 of TOKENS is for no manager", "line 2 of TOKENS is for no manager"],
        list(`${TOKEN}\ntwo ${other}\n`),
      ],
      [
        "a bad list of tokens",
        {},
        [
          "line 3 of TOKENS is invalid; expected: a token, or a name and a token",
          "line 4 of TOKENS is invalid; expected: a token, or a name and a token",
          `line 5 of TOKENS: the name is "[token]"; ${name}`,
          `line 6 of TOKENS: the name is "a:b"; ${name}`,
          "line 8 of TOKENS has the same token as line 2 of TOKENS",
          "line 10 of TOKENS has the same name as line 9 of TOKENS",
        ],
        list(
          [
            "# a comment",
            TOKEN,
            "one two three",
            "gl\u00fcck",
            `${other} one`,
            "a:b token-b",
            "",
            `last ${TOKEN}`,
            "a token-c",
            "a token-d",
          ].join("\n"),
        ),
      ],
      [
        "a bad list and no file of the driver",
        {},
        [
          "line 1 of TOKENS is invalid; expected: a token, or a name and a token",
          "the configuration file PLACE/fargate.toml does not exist",
        ],
        (fleet) => ["--config", "fargate.toml", "--tokens", fleet.tokens("!\n")],
      ],
      [
        "a bad configuration file of the driver",
        {},
        [
          "PLACE/fargate.toml cannot be used:",
          "SSH.Port is 0.5; expected: the port of the task's SSH server, a whole number from 1 to 65535",
        ],
        (fleet) => {
          fs.appendFileSync(fleet.driverFile(), "Port = 0.5\n");
          return ["--config", "fargate.toml", "--tokens", fleet.tokens(`${TOKEN}\n`)];
        },
      ],
    ];
    test.each(cases)("runners reports %s, and changes nothing", async (_, variables, expected, args = () => []) => {
      const fleet = await newFleet();
      const options = args(fleet);
      const before = fleet.snapshot();
      const finished = await fleet.run(variables, options);
      ended(finished, 2);
      const [title, ...details] = problems(finished);
      expect(title).toBe("the runners cannot be configured:");
      const shown = details.map((line) =>
        line.replaceAll(join(fleet.directory, "tokens"), "TOKENS").replaceAll(fleet.directory, "PLACE"),
      );
      expect(shown).toEqual(expected);
      expect(fleet.snapshot()).toEqual(before);
      expect(fleet.gitlab.requests).toEqual([]);
    });

    test.each([
      ["--managers", "the list of managers"],
      ["--tokens", "the list of tokens"],
    ])("runners names a missing file of %s", async (option, what) => {
      const fleet = await newFleet();
      const finished = await fleet.run({}, [option, "/none/file"]);
      ended(finished, 2);
      expect(problems(finished)).toEqual([`${what} /none/file does not exist`]);
    });
  });

  describe("config.toml", () => {
    const foreign = [
      '[[runners]]\n  name = "theirs"   # a comment\n  url="https://gitlab.example.com/"\n  token = "theirs-1"\n',
      '  executor = "shell"\n  [runners.feature_flags]\n    FF_X = true\n\n',
      "  [[ runners ]]\n\tname = 'second'\n\turl = \"https://gitlab.example.com\"\n\ttoken = 'theirs-2'\n\texecutor = 'shell'\n",
    ].join("");
    const existing: [what: string, text: string | Buffer][] = [
      ["comments", "# first\nconcurrent = 4 # four\n\n\n# last\n"],
      ["line ends of Windows", "concurrent = 4\r\n# a comment\r\n[session_server]\r\n  session_timeout = 1800\r\n"],
      ["no line end at the end", "concurrent = 4\n# the end"],
      ["sections of other runners", `concurrent = 4\n${foreign}`],
      ["unusual formatting", `\n\n  check_interval=0x03\n"concurrent"    =    4\n\n${foreign}\n\n\t# end\n\n`],
      ["a header inside a text", `concurrent = 4\n${foreign}\tpre_build_script = """\n[[runners]]\n[x]\n"""\n`],
      ["a byte order mark", "\ufeffconcurrent = 4\n"],
    ];
    test.each(existing)("runners keeps a config.toml with %s byte for byte", async (_, text) => {
      const fleet = await newFleet();
      fs.writeFileSync(fleet.config, text, { mode: 0o644 });
      wholeRun.ownFile(fleet.config);
      ended(await fleet.run(managersNamed("one")), 0);
      const first = fs.readFileSync(fleet.config);
      expect(first.indexOf(text)).toBe(0);
      ended(await fleet.run(managersNamed("one", "two")), 0);
      const second = fs.readFileSync(fleet.config);
      expect(second.indexOf(first)).toBe(0);
      expect(fs.statSync(fleet.config).mode & 0o777).toBe(0o600);
      const content = parseRunnerConfig(second.toString().replace(/^\ufeff/, ""));
      expect(content.concurrent).toBe(4);
      expect(content.runners.slice(-2).map(({ name }) => name)).toEqual(
        ["one", "two"].map((name) => named(fleet, name)),
      );
      expect(fleet.gitlab.requestsTo("register")).toHaveLength(2);
    });

    const unusable: [what: string, text: string | Buffer, expected: string][] = [
      [
        "an inline list of runners",
        "runners = []\n",
        "no section can be added to its list of runners; write each runner as [[runners]]",
      ],
      [
        "inline runners",
        'runners = [{ name = "x", token = "TOKEN" }]\nconcurrent = 1\n',
        "no section can be added to its list of runners; write each runner as [[runners]]",
      ],
      ["runners that are no list", "[runners]\nx = 1\n", "runners is not a list of tables"],
      [
        "invalid TOML",
        'concurrent = 1\n[[runners]]\ntoken = "TOKEN"\nname = x\n',
        "line 4, column 8: Invalid TOML document: invalid value",
      ],
      ["another encoding", Buffer.from("# caf\xe9\n", "latin1"), "it is not UTF-8"],
    ];
    test.each(unusable)("runners changes nothing beside a config.toml with %s", async (_, text, expected) => {
      const fleet = await newFleet();
      const token = fleet.gitlab.createRunner();
      fs.writeFileSync(fleet.config, typeof text === "string" ? text.replace("TOKEN", token) : text, { mode: 0o600 });
      const before = fleet.snapshot();
      const finished = await fleet.run(managersNamed("one"));
      ended(finished, 2);
      expect(problems(finished)).toEqual([`${fleet.config} cannot be used: ${expected}`]);
      expect(fleet.snapshot()).toEqual(before);
      expect(fleet.gitlab.requests).toEqual([]);
    });

    test("runners changes nothing in its second run", async () => {
      const fleet = await newFleet();
      const token = fleet.gitlab.createRunner();
      const variables = { ...managersNamed("one", "two", "three"), GITLAB_RUNNER_TOKEN_TWO: token };
      ended(await fleet.run(variables), 0);
      const before = fleet.snapshot();
      const finished = await fleet.run(variables);
      ended(finished, 0);
      expect(lines(finished)).toEqual([`${fleet.config}: 0 runners added, 3 already there, 0 problems`]);
      expect(fleet.snapshot()).toEqual(before);
      expect(fleet.gitlab.requestsTo("register")).toHaveLength(2);
    });

    test("runners registers again what GitLab has forgotten, and keeps all other sections", async () => {
      const fleet = await newFleet();
      ended(await fleet.run(managersNamed("one", "two")), 0);
      const written = fs.readFileSync(fleet.config, "utf8");
      const [, one = "", two = ""] = written.split(/^(?=\[\[runners\]\])/m);
      const before = `concurrent = 4 # mine\n\n# about one\n`;
      const after = `\n# about theirs\n  ${foreign}[session_server]\n  session_timeout = 7\n`;
      fs.writeFileSync(fleet.config, `${before}${one.trimEnd()}\n${after}${two}`);
      fleet.gitlab.runners.shift();
      const finished = await fleet.run(managersNamed("one", "two"));
      ended(finished, 0);
      expect(lines(finished)).toContain(
        `GitLab no longer knows the runner ${named(fleet, "one")}; registering it again`,
      );
      expect(lines(finished)[0]).toBe(`warning: concurrent in ${fleet.config} is not 1, and is left as it is`);
      const now = fs.readFileSync(fleet.config, "utf8");
      expect(now.startsWith(before + after + two)).toBe(true);
      expect(fleet.sections().map(({ name }) => name)).toEqual([
        "theirs",
        "second",
        named(fleet, "two"),
        named(fleet, "one"),
      ]);
      expect(fleet.gitlab.runners.map(({ description }) => description)).toEqual([
        named(fleet, "two"),
        named(fleet, "one"),
      ]);
      expect(fleet.sections().at(-1)?.token).toBe(fleet.gitlab.runners.at(-1)?.token);
    });

    test("runners asks for help with a forgotten runner that it cannot tell from others", async () => {
      const fleet = await newFleet();
      ended(await fleet.run(managersNamed("one")), 0);
      const written = fs.readFileSync(fleet.config, "utf8");
      // A key of the section has a line like a header in it.
      fs.writeFileSync(fleet.config, written.replace(/^executor/m, 'pre_build_script = """\n[x]\n"""\nexecutor'));
      fleet.gitlab.runners.shift();
      const before = fleet.snapshot();
      const finished = await fleet.run(managersNamed("one"));
      ended(finished, 2);
      expect(problems(finished)).toEqual([
        "manager one: the section of a runner that GitLab refuses must be removed by hand",
      ]);
      expect(fleet.snapshot()).toEqual(before);
      expect(fleet.gitlab.requestsTo("register")).toHaveLength(1);
    });

    test("runners writes through a symbolic link to config.toml", async () => {
      const fleet = await newFleet();
      const target = join(directory(), "config.toml");
      fs.writeFileSync(target, "concurrent = 2\n");
      fs.symlinkSync(target, fleet.config);
      ended(await fleet.run(managersNamed("one")), 0);
      expect(fs.readlinkSync(fleet.config)).toBe(target);
      expect(fleet.content().concurrent).toBe(2);
      expect(fleet.names()).toEqual(["config.toml"]);
      expect(driverConfig(fleet.sections()[0] as RunnerSection).path).toBe(join(dirname(target), "fargate-one.toml"));
    });

    test("runners keeps the owner of config.toml", async ({ skip }) => {
      if (process.geteuid?.() !== 0) skip("only root may change the owner of a file");
      const fleet = await newFleet();
      fs.writeFileSync(fleet.config, "concurrent = 2\n");
      fs.chownSync(fleet.config, 12_345, 54_321);
      ended(await fleet.run(managersNamed("one")), 0);
      const { uid, gid, mode } = fs.statSync(fleet.config);
      expect({ uid, gid, mode: mode & 0o777 }).toEqual({ uid: 12_345, gid: 54_321, mode: 0o600 });
    });

    test("runners removes the temporary files of killed processes", async () => {
      const fleet = await newFleet();
      const left = ["other.toml", "fargate-one.toml", ".runner_system_id", ".fargate-runners.pending"];
      for (const name of left) fs.writeFileSync(join(fleet.directory, `${name}.0123456789ab.tmp`), "");
      fs.writeFileSync(join(fleet.directory, "mine.0123456789ab.tmp"), "");
      const config = join(fleet.directory, "other.toml");
      const finished = await fleet.run(managersNamed("one"), ["--runner-config", config]);
      ended(finished, 0);
      expect(fleet.names()).toEqual([".runner_system_id", "fargate-one.toml", "mine.0123456789ab.tmp", "other.toml"]);
      wholeRun.ownFile(config);
    });

    test("runners takes its file from HOME without root, as GitLab Runner does", async ({ skip }) => {
      const asUser = ["unshare", "--user", "--map-user=1000"];
      if (spawnSync("unshare", [...asUser.slice(1), "true"]).status !== 0)
        skip("this process may not become another user");
      const fleet = await newFleet();
      const env = { ...fleet.env, CONFIG_FILE: undefined, HOME: fleet.directory, ...managersNamed("one") };
      const { code, stderr } = await start([...asUser, driver, "runners"], { env }).finished;
      expect({ code, stderr }).toMatchObject({ code: 0 });
      const where = join(fleet.directory, ".gitlab-runner");
      expect(fs.statSync(where).mode & 0o777).toBe(0o700);
      expect(parseRunnerConfig(fs.readFileSync(join(where, "config.toml"), "utf8")).runners).toHaveLength(1);
    });

    test("runners sends no request when it cannot write beside config.toml", async () => {
      const fleet = await newFleet();
      // Nobody can write there, not even root.
      for (const [place, reason] of [
        ["/proc/self", "cannot be written: "],
        ["/proc/none", "cannot be created: "],
        ["/dev/null", "cannot be created: "],
      ] as const) {
        const finished = await fleet.run({ ...managersNamed("one"), CONFIG_FILE: `${place}/config.toml` });
        ended(finished, 2);
        expect(problems(finished)[0]).toContain(reason);
      }
      expect(fleet.gitlab.requests).toEqual([]);
    });

    test("runners names the runner whose token does not fit on a full disk", async ({ skip }) => {
      const fleet = await newFleet();
      const path = directory();
      const mount = ["-t", "tmpfs", "-o", "size=1m,mode=0700", "tmpfs", path];
      if (spawnSync("mount", mount, { stdio: "ignore" }).status !== 0) skip("mount(8) is not permitted");
      try {
        const fill = join(path, "fill");
        fleet.gitlab.onRequest = ({ parameters }, moment) => {
          if (moment === "after" && /_two_/.test(String(parameters.description)))
            spawnSync("dd", ["if=/dev/zero", `of=${fill}`], { stdio: "ignore" });
        };
        const variables = { ...managersNamed("one", "two", "three"), CONFIG_FILE: join(path, "config.toml") };
        const finished = await fleet.run(variables);
        ended(finished, 2);
        const names = fleet.gitlab.runners.map(({ description }) => description);
        expect(names).toHaveLength(2);
        const what = `manager two: ${path}/config.toml cannot be written: ENOSPC: no space left on device, write`;
        expect(problems(finished)).toEqual([
          `${what}; GitLab has registered ${names[1]}; remove it there`,
          "1 more runner not processed; run this again",
        ]);
        fs.rmSync(fill);
        fleet.gitlab.onRequest = () => {};
        const again = await fleet.run(variables);
        ended(again, 0);
        expect(again.stderr).toContain(`an earlier registration as ${names[1]} was not completed`);
        const { runners } = parseRunnerConfig(fs.readFileSync(join(path, "config.toml"), "utf8"));
        expect(runners.map(({ token }) => token)).toEqual([0, 2, 3].map((n) => fleet.gitlab.runners[n]?.token));
        expect(fs.readdirSync(path).filter((name) => /tmp|lock|pending/.test(name))).toEqual([]);
      } finally {
        spawnSync("umount", [path]);
      }
    });
  });

  describe("many tokens", () => {
    /** Runs `runners` with a list of tokens, from a file or from standard input. */
    const runWith = (fleet: Fleet, text: string, from: "a file" | "standard input" = "a file") => {
      const path = fleet.tokens(text);
      const bulk = { GITLAB_REGISTRATION_TOKEN: undefined };
      const config = ["--config", fleet.driverFile()];
      if (from === "a file") return fleet.run(bulk, [...config, "--tokens", path]);
      const input = ["sh", "-c", 'file=$1; shift; exec "$@" <"$file"', "sh", path];
      return fleet.run(bulk, [...config, "--tokens", "-"], input);
    };

    test.each(["a file", "standard input"] as const)("runners adds 300 tokens from %s, and 10 more", async (from) => {
      const fleet = await newFleet();
      const tokens = Array.from({ length: 310 }, () => fleet.gitlab.createRunner());
      // Comments, empty lines, line ends of Windows, and a last line without an end.
      const line = (token: string, n: number) =>
        `${n % 50 === 0 ? `# group ${n}\r\n\r\n` : ""}${n % 3 === 0 ? `runner-${n} ` : ""} \t${token}${n % 2 ? "\r" : ""}`;
      const list = (count: number) => tokens.slice(0, count).map(line).join("\n");
      const finished = await runWith(fleet, list(300), from);
      ended(finished, 0);
      expect(lines(finished).at(-1)).toBe(`${fleet.config}: 300 runners added, 0 already there, 0 problems`);
      const first = fs.readFileSync(fleet.config);
      const again = await runWith(fleet, list(310), from);
      ended(again, 0);
      expect(lines(again).at(-1)).toBe(`${fleet.config}: 10 runners added, 300 already there, 0 problems`);
      expect(fs.readFileSync(fleet.config).indexOf(first)).toBe(0);
      const sections = fleet.sections();
      expect(sections.map(({ name, id, token }) => ({ name, id, token }))).toEqual(
        tokens.map((token, n) => ({ name: n % 3 === 0 ? `runner-${n}` : `fargate-${n + 1}`, id: n + 1, token })),
      );
      for (const section of sections) expect(driverConfig(section).path).toBe(join(fleet.directory, "fargate.toml"));
      expect(fleet.gitlab.requestsTo("verify")).toHaveLength(310);
      expect(fleet.names()).toEqual([".runner_system_id", "config.toml"]);
    });

    test("runners accepts registration and authentication tokens in one list", async () => {
      const old = Array.from({ length: 3 }, (_, n) => madeUpSecret(`an old registration token, ${n}`, 20));
      const fleet = await newFleet({ registrationTokens: [REGISTRATION_TOKEN, ...old], tokenForm: "plain" });
      const tokens = [1, 2].map(() => fleet.gitlab.createRunner());
      const list = [tokens[0], `named ${old[0]}`, REGISTRATION_TOKEN, `web ${tokens[1]}`, old[1]].join("\n");
      ended(await runWith(fleet, list), 0);
      expect(fleet.gitlab.requests.map(({ operation }) => operation)).toEqual([
        "verify",
        "register",
        "register",
        "verify",
        "register",
      ]);
      const hash = expect.stringMatching(/^fargate-[0-9a-f]{8}$/);
      expect(fleet.sections().map(({ name }) => name)).toEqual(["fargate-1", "named", hash, "web", hash]);
      const registered = fleet.gitlab.runners.filter(({ createdBy }) => createdBy === "registration");
      expect(registered.map(({ description }) => description)).toEqual(["named", hash, hash]);
      const before = fleet.snapshot();
      const again = await runWith(fleet, `${list}\nlast ${old[2]}\n`);
      ended(again, 0);
      expect(lines(again).at(-1)).toBe(`${fleet.config}: 1 runner added, 5 already there, 0 problems`);
      expect(fs.readFileSync(fleet.config, "latin1")).toContain(
        (before["config.toml"] ?? "").split("\n").slice(1).join("\n"),
      );
      expect(fleet.gitlab.requestsTo("register")).toHaveLength(4);
    });

    test("runners goes on after a token that GitLab refuses", async () => {
      const fleet = await newFleet();
      const tokens = [1, 2, 3].map(() => fleet.gitlab.createRunner());
      const refused = `glrt-${madeUpSecret("a refused token", 20)}`;
      wholeRun.register(refused, "a refused token", "runner");
      const finished = await runWith(fleet, `${tokens[0]}\nold ${refused}\n${tokens[1]}\n${tokens[2]}\n`);
      ended(finished, 2);
      const what = `line 2 of ${join(fleet.directory, "tokens")}: ${fleet.gitlab.url}`;
      expect(problems(finished)).toEqual([`${what} answers 403: GitLab refuses the token`]);
      expect(fleet.sections().map(({ token }) => token)).toEqual(tokens);
    });
  });

  describe("GitLab", () => {
    /** What the log says about a registration whose effect is unknown. */
    const mayHave = (name: string) =>
      `it may have registered ${name}; if GitLab lists a runner of this name that was never used, remove it there`;
    const LEFT = "1 more runner not processed; run this again";

    const unanswered: [fault: string, action: GitLabFaultAction, reason: RegExp | string, tookEffect: boolean][] = [
      ["answers 500 before its effect", { status: 500 }, 'answers 500: "500 injected by a test"', false],
      ["answers 502 after its effect", { status: 502, after: true }, 'answers 502: "502 injected by a test"', true],
      ["is reset before its effect", "reset-before", /^cannot be reached: .+$/, false],
      ["is reset after its effect", "reset-after", /^cannot be reached: .+$/, true],
      ["is reset while it is sent", "close-unread", /^cannot be reached: .+$/, false],
      ["gets an answer that is not JSON", "invalid-json", "answers without a token", true],
    ];
    test.each(unanswered)("runners sends a registration once that %s", async (_, action, reason, tookEffect) => {
      const fleet = await newFleet();
      fleet.gitlab.inject({ operation: "register", do: action });
      const finished = await fleet.run(managersNamed("one", "two"));
      ended(finished, 2);
      const name = named(fleet, "one");
      const [first = "", ...others] = problems(finished);
      const [, said] = first.split(`manager one: ${fleet.gitlab.url} `);
      const [why, ...consequence] = `${said}`.split("; it may");
      if (typeof reason === "string") expect(why).toBe(reason);
      else expect(why).toMatch(reason);
      expect(`it may${consequence}`).toBe(mayHave(name));
      expect(others).toEqual([LEFT]);
      expect(fleet.gitlab.requestsTo("register")).toHaveLength(1);
      expect(fleet.gitlab.runners).toHaveLength(tookEffect ? 1 : 0);
      expect(fleet.sections()).toEqual([]);
      // The next run warns, and registers both.
      const again = await fleet.run(managersNamed("one", "two"));
      ended(again, 0);
      expect(lines(again)[0]).toBe(
        `warning: an earlier registration as ${name} was not completed; if GitLab lists a runner of this name that was ` +
          "never used, remove it there",
      );
      expect(fleet.sections().map(({ token }) => token)).toEqual(
        fleet.gitlab.runners.slice(-2).map(({ token }) => token),
      );
      const last = await fleet.run(managersNamed("one", "two"));
      ended(last, 0);
      expect(last.stderr).not.toContain("warning");
      expect(fleet.names()).toEqual([".runner_system_id", "config.toml", "fargate-one.toml", "fargate-two.toml"]);
    });

    test.each(["hang-before", "hang-after"] as const)(
      "runners reports a registration (%s) when SIGTERM ends it",
      async (action) => {
        const fleet = await newFleet();
        fleet.gitlab.inject({ operation: "register", do: action });
        const started = fleet.begin(managersNamed("one", "two"));
        const request = () => fleet.gitlab.requestsTo("register")[0];
        await fleet.gitlab.waitFor(() => (action === "hang-after" ? request()?.tookEffect : request()));
        started.process.kill("SIGTERM");
        const finished = await started.finished;
        ended(finished, 2);
        const name = named(fleet, "one");
        expect(problems(finished)).toEqual([
          `manager one: ${fleet.gitlab.url} cannot be reached: stopped by SIGTERM; ${mayHave(name)}`,
          LEFT,
        ]);
        const again = await fleet.run(managersNamed("one", "two"));
        ended(again, 0);
        expect(lines(again)[0]).toContain(`an earlier registration as ${name} was not completed`);
      },
    );

    test("runners waits while nothing listens at GitLab's address", async () => {
      const fleet = await newFleet();
      const nobody = await GitLabStandIn.start();
      await nobody.close();
      const started = fleet.begin({ ...managersNamed("one"), GITLAB_URL: nobody.url });
      await started.shows("; trying again");
      const target = { host: "127.0.0.1", port: Number(new URL(fleet.gitlab.url).port) };
      const proxy = await startProxy(target, { port: Number(new URL(nobody.url).port) });
      onTestFinished(() => proxy.close());
      const finished = await started.finished;
      ended(finished, 0);
      expect(lines(finished)[0]).toMatch(`warning: ${nobody.url} cannot be reached: `);
      expect(finished.stderr.match(/trying again/g)).toHaveLength(1);
      expect(fleet.sections()).toMatchObject([{ url: nobody.url, token: fleet.gitlab.runners[0]?.token }]);
    });

    test("runners registers nothing after SIGTERM while it waits for GitLab", async () => {
      const fleet = await newFleet();
      fleet.gitlab.inject({
        operation: "register",
        times: Infinity,
        do: { status: 429, headers: { "retry-after": "20" } },
      });
      const started = fleet.begin(managersNamed("one", "two"));
      await started.shows("; trying again");
      started.process.kill("SIGTERM");
      const finished = await started.finished;
      ended(finished, 2);
      expect(problems(finished)).toEqual(["manager one: stopped by SIGTERM", LEFT]);
      expect(fleet.gitlab.runners).toEqual([]);
      expect(fleet.names()).not.toContain(".fargate-runners.pending");
    });

    test("runners waits for GitLab when it gets too many requests", async () => {
      const fleet = await newFleet();
      const token = fleet.gitlab.createRunner();
      const limited = { status: 429, headers: { "retry-after": "1" } };
      fleet.gitlab.inject({ operation: "register", times: 2, do: limited });
      fleet.gitlab.inject({ operation: "verify", do: limited });
      const finished = await fleet.run({ ...managersNamed("one", "two"), GITLAB_RUNNER_TOKEN_TWO: token });
      ended(finished, 0);
      const warning = `warning: ${fleet.gitlab.url} answers 429: too many requests; trying again`;
      expect(lines(finished).filter((line) => line.startsWith("warning"))).toEqual([warning, warning]);
      expect(fleet.gitlab.requests.map(({ status }) => status)).toEqual([429, 429, 201, 429, 200]);
      expect(fleet.sections()).toHaveLength(2);
    });

    test("runners gives up when GitLab asks it to wait for an hour", async () => {
      const fleet = await newFleet();
      fleet.gitlab.inject({ operation: "register", do: { status: 429, headers: { "retry-after": "3600" } } });
      const finished = await fleet.run(managersNamed("one", "two"));
      ended(finished, 2);
      expect(problems(finished)).toEqual([`manager one: ${fleet.gitlab.url} answers 429: too many requests`, LEFT]);
      expect(finished.stderr).not.toContain("trying again");
      expect(fleet.gitlab.requests).toHaveLength(1);
      expect(fleet.names()).not.toContain(".fargate-runners.pending");
    });

    test.each([
      ["answers 500", { status: 500 }],
      ["answers 503 after its effect", { status: 503, after: true }],
      ["is reset", "reset-after"],
      ["is reset while it is sent", "close-unread"],
    ] satisfies [string, GitLabFaultAction][])("runners repeats a verification that %s", async (_, action) => {
      const fleet = await newFleet();
      const token = fleet.gitlab.createRunner();
      fleet.gitlab.inject({ operation: "verify", times: 2, do: action });
      const finished = await fleet.run({ ...managersNamed("one"), GITLAB_RUNNER_TOKEN: token });
      ended(finished, 0);
      expect(finished.stderr.match(/warning: .*; trying again/g)).toHaveLength(1);
      expect(fleet.gitlab.requestsTo("verify")).toHaveLength(3);
      expect(fleet.sections().map((section) => section.token)).toEqual([token]);
      expect(fleet.gitlab.runners[0]?.managers).toEqual([systemId(fleet)]);
    });

    test("runners accepts a verification whose answer is not JSON", async () => {
      const fleet = await newFleet();
      const token = fleet.gitlab.createRunner();
      fleet.gitlab.inject({ operation: "verify", do: { status: 200, body: '"200"' } });
      ended(await fleet.run({ ...managersNamed("one"), GITLAB_RUNNER_TOKEN: token }), 0);
      expect(fleet.sections()).toMatchObject([{ name: named(fleet, "one"), token }]);
      expect(fleet.sections()[0]).not.toHaveProperty("id");
    });

    test.each(["register", "verify"] as const)("runners follows no redirect of a request to %s", async (operation) => {
      const fleet = await newFleet();
      const elsewhere = await newFleet();
      fleet.gitlab.inject({ operation, times: 2, do: { redirect: `${elsewhere.gitlab.url}/x` } });
      const token = operation === "verify" ? fleet.gitlab.createRunner() : undefined;
      const finished = await fleet.run({ ...managersNamed("one", "two"), GITLAB_RUNNER_TOKEN_ONE: token });
      ended(finished, 2);
      const reason = `answers 302: it redirects to ${elsewhere.gitlab.url}/x; set GITLAB_URL to that`;
      expect(problems(finished)).toEqual([`manager one: ${fleet.gitlab.url} ${reason}`, LEFT]);
      expect(elsewhere.gitlab.requests).toEqual([]);
      const again = await fleet.run({ ...managersNamed("two") });
      expect(again.stderr).not.toContain("an earlier registration");
    });

    test("runners goes on after a registration that GitLab refuses", async () => {
      const fleet = await newFleet();
      fleet.gitlab.inject({ operation: "register", skip: 1, do: { status: 403 } });
      const finished = await fleet.run(managersNamed("one", "two", "three"));
      ended(finished, 2);
      expect(problems(finished)).toEqual([`manager two: ${fleet.gitlab.url} answers 403: GitLab refuses the token`]);
      expect(fleet.gitlab.runners).toMatchObject(["one", "three"].map((name) => ({ description: named(fleet, name) })));
      const again = await fleet.run(managersNamed("one", "two", "three"));
      ended(again, 0);
      expect(lines(again).at(-1)).toBe(`${fleet.config}: 1 runner added, 2 already there, 0 problems`);
      expect(again.stderr).not.toContain("warning");
    });

    test("runners asks for another token where registration tokens are disallowed", async () => {
      const fleet = await newFleet({ registrationAllowed: false });
      const finished = await fleet.run(managersNamed("one"));
      ended(finished, 2);
      expect(problems(finished)).toEqual([
        `manager one: ${fleet.gitlab.url} answers 410: GitLab does not allow registration tokens; create the runner in ` +
          "GitLab, and use its token (glrt-...)",
      ]);
    });

    test.each(["", "/"])("runners accepts a GITLAB_URL with a path that ends with %j", async (end) => {
      const fleet = await newFleet({ prefix: "/git/lab" });
      ended(await fleet.run({ ...managersNamed("one"), GITLAB_URL: fleet.gitlab.url + end }), 0);
      expect(fleet.gitlab.requests.map(({ path }) => path)).toEqual(["/git/lab/api/v4/runners"]);
      expect(fleet.sections().map(({ url }) => url)).toEqual([fleet.gitlab.url]);
    });

    test("runners prefers --url to GITLAB_URL, and names a missing path", async () => {
      const fleet = await newFleet({ prefix: "/gitlab" });
      const url = fleet.gitlab.url.replace("/gitlab", "/");
      const finished = await fleet.run(managersNamed("one"), ["--url", url]);
      ended(finished, 2);
      expect(problems(finished)).toEqual([
        `manager one: ${url.slice(0, -1)} answers 404: this is no GitLab, or its address has a path`,
      ]);
    });

    test("runners trusts the private CA in CA_CERTIFICATES_PATH only", async () => {
      const authority = makeAuthority();
      const fleet = await newFleet({ tls: authority.issue() });
      const ca = join(fleet.directory, "ca.crt");
      fs.writeFileSync(ca, authority.pem);
      const refused = await fleet.run(managersNamed("one"));
      ended(refused, 2);
      expect(problems(refused)[0]).toMatch(
        /^manager one: https:\S+ cannot be reached: .*certificate.*; for a private certificate authority, set CA_CERTIFICATES_PATH$/,
      );
      expect(fleet.sections()).toEqual([]);
      const finished = await fleet.run({ ...managersNamed("one"), CA_CERTIFICATES_PATH: ca });
      ended(finished, 0);
      expect(finished.stderr).not.toContain("warning");
      expect(fleet.sections()).toMatchObject([{ url: fleet.gitlab.url, "tls-ca-file": ca }]);
      const missing = await fleet.run({ ...managersNamed("one"), CA_CERTIFICATES_PATH: `${ca}2` });
      ended(missing, 2);
      expect(problems(missing)[0]).toContain(`the CA bundle ${ca}2 cannot be used: ENOENT`);
    });

    test("runners reaches GitLab through HTTPS_PROXY", async () => {
      const authority = makeAuthority();
      const fleet = await newFleet({ tls: authority.issue() });
      const ca = join(fleet.directory, "ca.crt");
      fs.writeFileSync(ca, authority.pem);
      const proxy = await startConnectProxy();
      onTestFinished(() => proxy.close());
      const variables = { ...managersNamed("one"), CA_CERTIFICATES_PATH: ca, HTTPS_PROXY: proxy.url };
      ended(await fleet.run(variables), 0);
      expect(proxy.targets).toEqual([new URL(fleet.gitlab.url).host]);
      expect(fleet.sections()).toHaveLength(1);
    });
  });

  describe("several processes", () => {
    test("runners ends while another process changes config.toml", async () => {
      const fleet = await newFleet();
      const { promise: released, resolve: release } = Promise.withResolvers<void>();
      fleet.gitlab.inject({ operation: "register", do: { holdUntil: released } });
      const first = fleet.begin(managersNamed("one", "two"));
      await fleet.gitlab.waitFor(() => fleet.gitlab.requestsTo("register").length === 1);
      const second = await fleet.run(managersNamed("one", "two"));
      ended(second, 2);
      expect(problems(second)).toEqual([`another process (${first.process.pid}) is changing ${fleet.config}`]);
      release();
      ended(await first.finished, 0);
      expect(fleet.gitlab.runners).toHaveLength(2);
      expect(fleet.sections()).toHaveLength(2);
      expect(fleet.names().filter((name) => name.endsWith(".lock"))).toEqual([]);
    });

    test("runners registers nothing twice when eight of its processes begin at once", async () => {
      const fleet = await newFleet();
      const all = await Promise.all(Array.from({ length: 8 }, () => fleet.run(managersNamed("one", "two"))));
      for (const finished of all)
        if (finished.code !== 0) expect(problems(finished)[0]).toMatch(/^another process \(\d+\) is changing /);
      ended(await fleet.run(managersNamed("one", "two")), 0);
      expect(fleet.gitlab.requestsTo("register")).toHaveLength(2);
      expect(fleet.sections().map(({ token }) => token)).toEqual(fleet.gitlab.runners.map(({ token }) => token));
      expect(fleet.names()).toEqual([".runner_system_id", "config.toml", "fargate-one.toml", "fargate-two.toml"]);
    });
  });
});

// ---------------------------------------------------------------------------------------------------------
// 11. Operator commands
// ---------------------------------------------------------------------------------------------------------

describe("operator commands", () => {
  test.each([
    [0, "0s"],
    [59.9, "59s"],
    [60, "1m0s"],
    [3_599, "59m59s"],
    [3_600, "1h0m"],
    [86_399, "23h59m"],
    [86_400, "1d0h"],
    [-5, "0s"],
  ])("formatDuration formats %d s as %s", (seconds, text) => {
    expect(formatDuration(seconds)).toBe(text);
  });

  test("formatTasks aligns its columns and escapes text of others", () => {
    const task = {
      project: 42,
      taskArn: `arn:aws:ecs:us-east-2:1:task/c/${"a".repeat(32)}`,
      startedBy: "x",
      stages: [],
    };
    const tasks = [
      { ...task, job: 7, state: "RUNNING", createdAt: 1_000, deadline: 1_000 + 7_200, address: "10.0.0.1" },
      {
        ...task,
        job: null,
        project: null,
        taskArn: null,
        state: null,
        createdAt: 4_590,
        deadline: null,
        address: null,
      },
      { ...task, job: 12345, state: "\x1b[31m", createdAt: 0, deadline: 4_000, address: "10.0.0.22" },
    ];
    expect(formatTasks(tasks, false, 4_600).split("\n")).toEqual([
      "JOB    PROJECT  TASK                              STATE       AGE    DEADLINE   ADDRESS",
      `7      42       ${"a".repeat(32)}  RUNNING     1h0m   in 1h0m    10.0.0.1`,
      "-      -        -                                 -           10s    -          -",
      `12345  42       ${"a".repeat(32)}  \\u001b[31m  1h16m  10m0s ago  10.0.0.22`,
      "",
    ]);
    expect(JSON.parse(formatTasks(tasks, true, 0))).toEqual({ tasks });
  });

  describe("init", () => {
    const uncommented = (text: string) => text.replace(/^# (?=[A-Z]\w* = |\[)/gm, "");
    const values = {
      Fargate: {
        Cluster: "ci",
        Region: "us-east-2",
        Subnets: ["subnet-1", "subnet-2"],
        SecurityGroup: "sg-1",
        TaskDefinition: "ci:3",
        AllowedTaskDefinitions: [],
        EnablePublicIP: true,
        CapacityProviderStrategy: [{ CapacityProvider: "FARGATE_SPOT", Weight: 1 }],
        Tags: { "cost centre": 'a "quoted" \\ text\u007f', team: "ü" },
      },
      TaskMetadata: { Directory: "/opt/gitlab-runner/metadata" },
      SSH: { Username: "root", Port: 2222 },
    };

    test("formatConfig writes every setting and reads back as the given values", () => {
      const text = formatConfig(values);
      expect(parse(text)).toEqual({ ...values, JobImage: {} });
      expect(readConfig(text, "/etc/fargate.toml", {}, {}).warnings).toEqual([]);
      const all = parse(uncommented(text)) as Record<string, Record<string, unknown>>;
      for (const [table, schema] of Object.entries(ConfigSchema.entries)) {
        const inner = "wrapped" in schema ? (schema.wrapped as { entries?: object }) : (schema as { entries?: object });
        if (inner.entries) expect(Object.keys(all[table] ?? {}), table).toEqual(Object.keys(inner.entries));
        else expect(all).toHaveProperty(table);
      }
      for (const line of text.match(/^# (?!\w+ = ).*$/gm) ?? []) expect(line.length).toBeLessThanOrEqual(100);
    });

    test("formatConfig shows the default of each setting", () => {
      const all = uncommented(formatConfig(values));
      for (const line of [
        "StartTimeout = 600",
        'KeyType = "ed25519"',
        "WaitForHealthy = false",
        'BuildsDirectory = "/builds"',
        'LogLevel = "info"',
        "# a subnet ID, such as subnet-0a1b2c3d (required, unless Subnets is set)",
      ])
        expect(all.split("\n")).toContain(line);
    });

    test("formatConfig explains no two settings in the same words", () => {
      const blocks = uncommented(formatConfig(values)).split("\n\n");
      const meanings = blocks.flatMap((block) => /^(#.*\n)+(?=\w+ = )/.exec(block)?.[0] ?? []);
      expect(meanings.length).toBeGreaterThan(30);
      expect(new Set(meanings).size).toBe(meanings.length);
    });

    const settingsOf = (options: Parameters<typeof initialSettings>[0], env: Record<string, string> = {}) =>
      initialSettings(options, {}, env);
    test("initialSettings lets options override variables and --set override both", () => {
      const env = { FARGATE_CLUSTER: "from-env", AWS_REGION: "eu-west-1", WORKER_SUBNET: "subnet-9" };
      expect(settingsOf({ cluster: "from-option", set: ["ssh.port=22", "SSH.Username=ci"] }, env)).toEqual({
        settings: {
          Fargate: {
            Cluster: "from-option",
            Region: "eu-west-1",
            Subnet: "subnet-9",
            AllowedTaskDefinitions: [],
            AllowedPlatformVersions: [],
          },
          TaskMetadata: { Directory: "/opt/gitlab-runner/metadata" },
          SSH: { Port: 22, Username: "ci" },
        },
        missing: ["Fargate.SecurityGroup", "Fargate.TaskDefinition"],
        limits: [],
      });
      const tags = ["Fargate.Tags.team=ci", 'Fargate.Tags.cost="12"', "Fargate.Cluster=last"];
      expect(settingsOf({ set: tags }, env).settings).toMatchObject({
        Fargate: { Cluster: "last", Tags: { team: "ci", cost: "12" } },
      });
    });

    test.each([
      ["Fargate.Clutser=ci", "unknown key Fargate.Clutser; the most similar known key is Fargate.Cluster"],
      ["SSH.Port=99999", "SSH.Port is 99999; expected: the port of the task's SSH server, a whole number"],
      ["SSH.Port=abc", 'SSH.Port is "abc"; expected'],
      ["Port", "--set Port: expected Table.Key=value"],
      ["=5", "--set =5: expected Table.Key=value"],
      ["Fargate.EnablePublicIP=yes", 'Fargate.EnablePublicIP is "yes"; expected'],
      ["Fargate=5", "Fargate is 5; expected: a table, as in Fargate.Key=value"],
    ])("initialSettings refuses --set %s", (assignment, message) => {
      expect(thrown(() => settingsOf({ set: [assignment] })).message).toContain(message);
    });

    testProgram("init writes a file that doctor accepts and a section that a runner reads", async () => {
      const where = directory();
      const env = { FARGATE_CLUSTER: "ci", FARGATE_REGION: "us-east-2", GITLAB_URL: "https://gitlab.example.com" };
      const options = ["--subnet", "subnet-1", "--security-group", "sg-1", "--ssh-user", "root", "--task-def", "ci"];
      const finished = await fargate(["init", ...options], { cwd: where, env });
      const path = join(where, "fargate.toml");
      expect(finished).toMatchObject({ code: 0, stderr: expect.stringContaining(`${path} written`) });
      expect(finished.stderr).not.toContain("still to be set");
      expect(fs.statSync(path).mode & 0o777).toBe(0o644);
      const { config } = readConfig(fs.readFileSync(path, "utf8"), path, {}, {});
      expect(config.Fargate).toMatchObject({ Cluster: "ci", TaskDefinition: "ci", AllowedTaskDefinitions: [] });
      const { runners } = parse(finished.stdout.toString()) as { runners: Record<string, unknown>[] };
      expect(runners).toMatchObject([
        {
          url: "https://gitlab.example.com",
          executor: "custom",
          custom: { run_exec: driver, run_args: ["--config", path, "custom", "run"] },
        },
      ]);
      // It overwrites nothing.
      const before = fs.readFileSync(path);
      const again = await fargate(["init", ...options], { cwd: where, env });
      expect(again).toMatchObject({ code: 2, stdout: Buffer.from("") });
      expect(again.stderr).toContain(`${path} exists already`);
      expect(again.stderr).toContain("what to do: name another file with --config, or remove that one");
      expect(fs.readFileSync(path)).toEqual(before);
      // Prints no section for a file that it cannot write.
      const nowhere = await fargate(["--config", join(where, "none", "x.toml"), "init", ...options], { env });
      expect(nowhere).toMatchObject({ code: 2, stdout: Buffer.from("") });
      expect(nowhere.stderr).toContain("x.toml cannot be written: ENOENT");
    });

    testProgram("init prints the time limits that the runner needs", async () => {
      const set = ["--set", "Fargate.StartTimeout=7200", "--set", "SSH.CancelGracePeriod=120"];
      const { stdout } = await fargate(["init", ...set], { cwd: directory() });
      expect(parse(stdout.toString())).toMatchObject({ runners: [{ custom: { prepare_exec_timeout: 7_260 } }] });
      const comment = stdout
        .toString()
        .match(/^# .*$/gm)
        ?.join(" ")
        .replaceAll(" # ", " ");
      expect(comment).toContain("The top of that file needs shutdown_timeout = 130 or more.");
    });

    testProgram("init leaves no part of a file on a full disk", async ({ skip }) => {
      const where = directory();
      const mount = ["-t", "tmpfs", "-o", "size=4k", "none", where];
      if (spawnSync("mount", mount, { stdio: "ignore" }).status !== 0) skip("mount(8) is not permitted");
      try {
        const finished = await fargate(["init", "--cluster", "ci"], { cwd: where });
        expect(finished.code).toBe(2);
        expect(finished.stderr).toMatch(/cannot be written: ENOSPC.*\n.*what to do: the runner's user must be able/);
        expect(fs.readdirSync(where)).toEqual([]);
      } finally {
        spawnSync("umount", [where]);
      }
    });

    testProgram("init writes what it knows and names what is still to be set", async () => {
      const path = join(directory(), "new.toml");
      const finished = await fargate(["--config", path, "init", "--cluster", "ci"], { env: {} });
      expect(finished.code).toBe(0);
      expect(finished.stderr).toContain(
        `warning: still to be set in ${path}: Fargate.Region, Fargate.Subnet, Fargate.SecurityGroup, ` +
          "Fargate.TaskDefinition, SSH.Username",
      );
      expect(parse(fs.readFileSync(path, "utf8"))).toMatchObject({ Fargate: { Cluster: "ci" } });
    });
  });

  describeProgram("tasks and shell", () => {
    let world: World;
    const { byHand, nothingLeft, scriptFile } = setUpJobs((made) => {
      world = made;
    });
    /** A job that `prepare` has made ready. */
    const prepared = async (config = world.configure()) => {
      const env = byHand();
      expect(await fargate(["--config", config, "custom", "prepare"], { env })).toMatchObject({ code: 0 });
      const id = `${readJob(env)?.ids?.job}`;
      const task = world.aws.running().at(-1);
      const command = (...args: string[]) => fargate(["--config", config, ...args], { env: world.aws.environment });
      const run = (script: string) =>
        start([driver, "--config", config, "custom", "run", scriptFile(script), "build_script"], { env });
      const cleanup = () => fargate(["--config", config, "custom", "cleanup"], { env });
      const record = join(world.records, `${readJob(env)?.stem}.json`);
      return { env, id, task, taskId: `${task?.taskArn.slice(-32)}`, config, command, run, cleanup, record };
    };

    taskTest("tasks shows the running jobs of this host", async () => {
      const first = await prepared();
      const second = await prepared();
      const running = second.run("echo begun; sleep 600");
      await running.shows("begun");
      const since = world.aws.calls.length;
      const shown = await first.command("tasks");
      expect(shown).toMatchObject({ code: 0, stderr: "" });
      const lines = shown.stdout.toString().split("\n");
      expect(lines[0]).toMatch(/^JOB {3}PROJECT {2}TASK {30}STATE {4}AGE +DEADLINE +ADDRESS$/);
      for (const [i, { id, taskId, task }] of [first, second].entries())
        expect(lines[i + 1]).toMatch(
          new RegExp(`^${id}  42 +${taskId}  RUNNING  (\\d+m)?\\d+s +in \\d+h\\d+m +${task?.address}$`),
        );
      expect(lines.slice(3)).toEqual([""]);
      expect(world.aws.calls.slice(since).map(({ operation }) => operation)).toEqual(["ListTasks", "DescribeTasks"]);
      const { tasks } = JSON.parse((await first.command("tasks", "--json")).stdout.toString());
      const { Deadline, StartedBy } = readRecord(first.record) as TaskRecord;
      expect(tasks).toMatchObject([
        {
          job: Number(first.id),
          project: 42,
          taskArn: first.task?.taskArn,
          state: "RUNNING",
          deadline: Deadline,
          startedBy: StartedBy,
          stages: [],
        },
        { job: Number(second.id), address: second.task?.address, stages: ["run"] },
      ]);
      running.process.kill("SIGTERM");
      await running.finished;
      for (const job of [first, second]) await job.cleanup();
      nothingLeft();
      expect((await first.command("tasks")).stdout.toString()).toBe(
        "JOB  PROJECT  TASK  STATE  AGE  DEADLINE  ADDRESS\n",
      );
    });

    taskTest("tasks shows those of other hosts with --all, with the job in their tags", async () => {
      const job = await prepared();
      const startedBy = (manager: string) => `fargate-${manager}-${"0".repeat(32)}`;
      const other = world.aws.addTask({ cluster: "test-cluster", startedBy: startedBy("0123456789ab") });
      const tagged = world.aws.addTask({ cluster: "test-cluster", startedBy: startedBy("ba9876543210") });
      Object.assign(tagged, {
        tags: [
          { key: "gitlab:job-id", value: "77" },
          { key: "gitlab:project-id", value: "8" },
        ],
      });
      world.aws.addTask({ cluster: "test-cluster", startedBy: "another-program" });
      const list = async (...args: string[]) =>
        JSON.parse((await job.command("tasks", "--json", ...args)).stdout.toString()).tasks.map(
          ({ taskArn, job, project }: Record<string, unknown>) => [taskArn, job, project],
        );
      const own = [job.task?.taskArn, Number(job.id), 42];
      const all = [own, [other.taskArn, null, null], [tagged.taskArn, 77, 8]].sort();
      // ECS describes new tasks late.
      await expect.poll(async () => (await list("--all")).sort(), { timeout: 10_000 }).toEqual(all);
      expect(await list()).toEqual([own]);
      await job.cleanup();
    });

    taskTest("tasks shows a job whose task is about to start, and one in another cluster", async () => {
      const held = Promise.withResolvers<void>();
      world.aws.inject({ operation: "RunTask", do: { holdUntil: held.promise } });
      const env = byHand();
      const config = world.configure();
      const starting = start([driver, "--config", config, "custom", "prepare"], { env });
      await starting.shows("Starting a task");
      await world.aws.waitFor(() => fs.existsSync(join(world.records, `${readJob(env)?.stem}.json`)), 10_000);
      const elsewhere = world.configure({ Fargate: { Cluster: "bare-cluster" } });
      const list = async (path: string) =>
        JSON.parse(
          (await fargate(["--config", path, "tasks", "--json"], { env: world.aws.environment })).stdout.toString(),
        );
      const none = { taskArn: null, state: null, address: null };
      await expect
        .poll(() => list(config), { timeout: 10_000 })
        .toMatchObject({ tasks: [{ ...none, stages: ["prepare"] }] });
      held.resolve();
      expect(await starting.finished).toMatchObject({ code: 0 });
      expect(await list(elsewhere)).toMatchObject({ tasks: [{ job: readJob(env)?.ids?.job, state: "RUNNING" }] });
      await fargate(["--config", config, "custom", "cleanup"], { env });
      nothingLeft();
    });

    const listed = async (job: Awaited<ReturnType<typeof prepared>>) =>
      JSON.parse((await job.command("tasks", "--json")).stdout.toString()).tasks;

    taskTest("tasks shows since when cleanup has been stopping a task", async () => {
      const job = await prepared();
      const record = readRecord(job.record) as TaskRecord;
      writeRecord(job.record, { ...record, Deadline: 1 }); // as cleanup does
      const since = Math.floor(fs.statSync(job.record).mtimeMs / 1000);
      expect(await listed(job)).toMatchObject([{ job: Number(job.id), state: "RUNNING", deadline: since }]);
      await job.cleanup();
      nothingLeft();
    });

    taskTest("tasks shows this host's tasks after the host's name has changed", async () => {
      const job = await prepared();
      fs.writeFileSync(join(world.records, ".manager-id"), "0123456789ab\n", { mode: 0o600 });
      expect(await listed(job)).toMatchObject([
        { job: Number(job.id), taskArn: job.task?.taskArn, state: "RUNNING", address: job.task?.address },
      ]);
      await job.cleanup();
      nothingLeft();
    });

    taskTest("tasks shows a job once if ECS lists its task before RunTask answers", async () => {
      const job = await prepared();
      const record = readRecord(job.record) as TaskRecord;
      writeRecord(job.record, { ...record, TaskARN: "", ContainerIP: "", Deadline: 0, Unanswered: true });
      expect(await listed(job)).toMatchObject([
        { job: Number(job.id), project: 42, taskArn: job.task?.taskArn, state: "RUNNING" },
      ]);
      writeRecord(job.record, record);
      await job.cleanup();
      nothingLeft();
    });

    test("tasks asks nothing where no job has run", async () => {
      const since = world.aws.calls.length;
      // An operator would miss what is in the log of the jobs.
      const LogFile = join(directory(), "jobs.log");
      const none = join(directory(), "none");
      const config = world.configure({ top: { LogFile }, TaskMetadata: { Directory: none } });
      const shown = await fargate(["--config", config, "tasks"], { env: world.aws.environment });
      expect(shown).toMatchObject({
        code: 0,
        stderr: expect.stringMatching(/no job has run with TaskMetadata.Directory .* yet\n$/),
      });
      expect(shown.stdout.toString()).toBe("JOB  PROJECT  TASK  STATE  AGE  DEADLINE  ADDRESS\n");
      expect(world.aws.calls.length).toBe(since);
      expect(fs.existsSync(LogFile)).toBe(false);
    });

    taskTest("shell runs a command with its arguments, both streams and its exit code", async () => {
      const job = await prepared();
      const words = ["sh", "-c", 'printf "%s|" "$@"; echo err >&2; exit 3', "x", "a b", "it's", '$HOME "\\'];
      expect(await job.command("shell", job.id, "--", ...words)).toMatchObject({
        code: 3,
        stdout: Buffer.from(`a b|it's|$HOME "\\|`),
        stderr: "err\n",
      });
      expect(await job.command("shell", job.taskId, "--", "echo one; echo two | tr w W")).toMatchObject({
        code: 0,
        stdout: Buffer.from("one\ntWo\n"),
        stderr: "",
      });
      expect(await job.command("shell", job.id, "kill -9 $$")).toMatchObject({ code: 137, stderr: "" });
      expect(await job.command("shell", job.id, "--", "cat")).toMatchObject({ code: 0, stdout: Buffer.from("") });
      await job.cleanup();
      nothingLeft();
    });

    taskTest("shell does not disturb the job", async () => {
      const job = await prepared();
      const files = () =>
        fs.readdirSync(world.records).map((name) => {
          const { mtimeMs, ctimeMs } = fs.statSync(join(world.records, name));
          const isLock = name.endsWith(".lock"); // the live stage touches it
          return [name, isLock || mtimeMs, isLock || ctimeMs, fs.readFileSync(join(world.records, name), "utf8")];
        });
      const running = job.run(`trap "exit 5" USR1; echo "pid $$"; while :; do echo tick; sleep 0.05; done`);
      let output = "";
      running.process.stdout?.on("data", (chunk) => {
        output += chunk;
      });
      await running.shows("tick");
      const before = files();
      const calls = world.aws.calls.length;
      expect(await job.command("shell", job.id, "--", "exit 9")).toMatchObject({ code: 9 });
      // One that is killed in the middle.
      const killed = start([driver, "--config", job.config, "shell", job.id, "--", "echo up; sleep 600"], {
        env: world.aws.environment,
      });
      await killed.shows("up");
      killed.process.kill("SIGKILL");
      await killed.finished;
      expect(files()).toEqual(before);
      const operations = new Set(world.aws.calls.slice(calls).map(({ operation }) => operation));
      expect(operations).toEqual(new Set(["DescribeTasks"]));
      const pid = /^pid (\d+)$/m.exec(output)?.[1];
      expect(await job.command("shell", job.id, "--", `kill -USR1 ${pid}`)).toMatchObject({ code: 0, stderr: "" });
      const { code, stdout } = await running.finished;
      expect(code).toBe(1);
      expect(stdout.toString()).toMatch(/^pid \d+\n(tick\n)+$/);
      await job.cleanup();
      nothingLeft();
    });

    taskTest("shell ends a command in the task when it is terminated", async () => {
      const job = await prepared();
      const mark = `marker-${nextNumber()}`;
      const command = ["shell", job.id, "--", `echo up; exec -a ${mark} sleep 600`];
      const running = start([driver, "--config", job.config, ...command], { env: world.aws.environment });
      await running.shows("up");
      running.process.kill("SIGTERM");
      expect(await running.finished).toMatchObject({
        code: 255,
        stderr: expect.stringContaining("stopped by SIGTERM"),
      });
      const left = await job.command("shell", job.id, "--", `grep -l "^${mark}" /proc/[0-9]*/cmdline || echo none`);
      expect(left.stdout.toString()).toBe("none\n");
      await job.cleanup();
    });

    taskTest("shell ends a command in the task when nobody reads its output", async () => {
      const job = await prepared();
      const mark = `marker-${nextNumber()}`;
      const command = `seq 1 3000000; exec -a ${mark} sleep 600`;
      const line = '"$@" | head -n 1; exit "${PIPESTATUS[0]}"';
      const args = [driver, "--config", job.config, "shell", job.id, "--", command];
      const finished = await start(["bash", "-c", line, "bash", ...args], { env: world.aws.environment }).finished;
      expect(finished).toMatchObject({ code: 255, stdout: Buffer.from("1\n") });
      expect(finished.stderr).toMatch(/error: the output cannot be written: EPIPE/);
      const left = await job.command("shell", job.id, "--", `grep -l "^${mark}" /proc/[0-9]*/cmdline || echo none`);
      expect(left.stdout.toString()).toBe("none\n");
      await job.cleanup();
    });

    taskTest("tasks warns of a record whose cluster is gone and shows the other tasks", async () => {
      const job = await prepared();
      const record = readRecord(job.record) as TaskRecord;
      const stale = `job-77-${record.StartedBy.slice(-32)}${"0".repeat(32)}.json`;
      const TaskARN = record.TaskARN.replace(/.{32}$/, "f".repeat(32));
      writeRecord(join(world.records, stale), { ...record, Cluster: "gone-cluster", TaskARN, JobID: 77 });
      const shown = await job.command("tasks", "--json");
      expect(shown.code).toBe(0);
      expect(shown.stderr).toMatch(
        new RegExp(`warning: cluster gone-cluster, which ${stale} names: .*ClusterNotFound`),
      );
      expect(JSON.parse(shown.stdout.toString()).tasks).toMatchObject([
        { job: Number(job.id), state: "RUNNING" },
        { job: 77, taskArn: TaskARN, state: null },
      ]);
      fs.rmSync(join(world.records, stale));
      await job.cleanup();
      nothingLeft();
    });

    taskTest(
      "shell leaves a login that hangs by ~. at the beginning of a line",
      async () => {
        const job = await prepared();
        const terminal = openTerminal([driver, "--config", job.config, "shell", job.id], {
          env: world.aws.environment,
        });
        await terminal.shows(/[#$] $/);
        terminal.type("sleep 600 # ~.\r");
        await terminal.shows(/~\.\r\n/);
        terminal.type("~.");
        expect(await terminal.finished).toBe(255);
        expect(terminal.text()).toMatch(/\n\S+Z error: left by ~\.\r\n$/);
        await job.cleanup();
      },
      { containerOnly: true },
    );

    taskTest(
      "shell passes on keys that are typed before the login",
      async () => {
        const job = await prepared();
        const terminal = openTerminal([driver, "--config", job.config, "shell", job.id], {
          env: world.aws.environment,
        });
        terminal.type("exit 7\r");
        expect(await terminal.finished).toBe(7);
        await job.cleanup();
        nothingLeft();
      },
      { containerOnly: true },
    );

    taskTest("shell names the reason when it cannot log in", async () => {
      const job = await prepared();
      const failed = async (message: string | RegExp, ...args: string[]) => {
        const finished = await job.command("shell", ...args);
        const isUsage = `${message}`.includes("expected: ");
        expect(finished).toMatchObject({ code: isUsage ? 2 : 255, stdout: Buffer.from("") });
        expect(finished.stderr).toMatch(message);
      };
      await failed(/error: no job 1 runs on this host\n.*what to do: fargate tasks shows the ids/, "1", "--", "true");
      await failed(/shell: .*'x; rm'.*; expected: a job's id, or the 32 hex digits of a task/, "x; rm");
      await failed(/error: this is no terminal\n.*what to do: add a command/, job.id);
      // Another job with the same id, of another GitLab.
      const record = readRecord(job.record) as TaskRecord;
      const twin = `job-${job.id}-${record.StartedBy.slice(-32)}${"0".repeat(32)}.json`;
      writeRecord(join(world.records, twin), {
        ...record,
        ProjectID: 43,
        TaskARN: record.TaskARN.replace(/.{32}$/, "f".repeat(32)),
      });
      await failed(
        new RegExp(`2 running jobs have the id ${job.id}; name one by its task:\n(.*project 4[23]: task \\w{32}\n){2}`),
        ...[job.id, "--", "true"],
      );
      expect(await job.command("shell", job.taskId, "--", "true")).toMatchObject({ code: 0 });
      fs.rmSync(join(world.records, twin));
      // A job's author can choose a record's name if the runner passes no JOB_RESPONSE_FILE.
      const { JobID, ...unnumbered } = record;
      const odd = join(world.records, twin.replace(`job-${JobID}-`, "job-9-x-"));
      writeRecord(odd, unnumbered);
      await failed(/error: no job 9 runs on this host/, "9", "--", "true");
      fs.rmSync(odd);
      // No key in it: the search for secrets must not find one that others can read.
      writeRecord(job.record, { ...record, PrivateKey: "" });
      fs.chmodSync(job.record, 0o640);
      await failed(
        /the job's task is out of reach: the record .* cannot be used: its mode is 640/,
        job.id,
        "--",
        "true",
      );
      const changed = { ...record, HostKey: Buffer.from("another").toString("base64") };
      writeRecord(job.record, changed);
      await failed(/host key is not the one that prepare saw.*\n.*what to do: nothing was sent/, job.id, "--", "true");
      writeRecord(job.record, { ...record, ContainerIP: "" });
      await failed(/nobody can log in to job \d+ yet: its task is starting/, job.id, "--", "true");
      writeRecord(job.record, record);
      await world.aws.stopTask(record.TaskARN, { stopCode: "UserInitiated", stoppedReason: "over", graceSeconds: 0 });
      await failed(/no login to job \d+: .*; the task stopped: UserInitiated: over/, job.id, "--", "true");
      await job.cleanup();
      nothingLeft();
    });

    taskTest(
      "shell opens a login on a terminal that resizes and passes Ctrl-C",
      async () => {
        const job = await prepared();
        const running = job.run('echo begun; while sleep 0.1; do echo "still here"; done');
        await running.shows("still here");
        const terminal = openTerminal([driver, "--config", job.config, "shell", job.id], {
          env: world.aws.environment,
        });
        await terminal.shows(/[#$] $/);
        terminal.type("stty size; echo tty is $(tty)\r");
        await terminal.shows(/\r\n24 80\r\ntty is \/dev\/\S+\r\n/);
        terminal.resize(132, 43);
        await expect
          .poll(
            async () => {
              terminal.type("stty size\r");
              return (await terminal.shows(/\r\n(\d+ \d+)\r\n/))[1];
            },
            { timeout: 10_000 },
          )
          .toBe("43 132");
        terminal.type("sleep 600; echo not reached\r");
        await terminal.shows(/sleep 600/);
        await expect
          .poll(async () =>
            (await job.command("shell", job.id, "--", "grep -l sleep.600 /proc/[0-9]*/cmdline | wc -l")).stdout
              .toString()
              .trim(),
          )
          .not.toBe("0");
        terminal.type("\x03");
        await terminal.shows(/\^C[\s\S]*[#$] $/);
        terminal.type("exit 7\r");
        expect(await terminal.finished).toBe(7);
        expect(terminal.text()).not.toMatch(/^not reached/m);
        expect(running.process.exitCode).toBeNull();
        running.process.kill("SIGTERM");
        await running.finished;
        await job.cleanup();
        nothingLeft();
      },
      { containerOnly: true },
    );

    taskTest(
      "shell restores the terminal and says why when the job ends",
      async () => {
        const job = await prepared();
        const inner = [driver, "--config", job.config, "shell", job.id].map((word) => `'${word}'`).join(" ");
        const outer = openTerminal(
          ["sh", "-c", `stty -a | grep -o "[-]*icanon"; ${inner}; echo "code $?"; stty -a | grep -o "[-]*icanon"`],
          {
            env: world.aws.environment,
          },
        );
        await outer.shows(/^icanon\r\n[\s\S]*[#$] $/);
        await job.cleanup();
        await outer.shows(
          /\n\S+Z error: the connection to the container was lost: .*; the task stopped: .*\r\n(.*\r\n)?code 255\r\nicanon\r\n/,
        );
        expect(await outer.finished).toBe(0);
        nothingLeft();
      },
      { containerOnly: true },
    );

    test("sweep shows its progress on a terminal and clears it", async () => {
      const terminal = openTerminal([driver, "--config", world.configure(), "sweep"], { env: world.aws.environment });
      expect(await terminal.finished).toBe(0);
      const steps = terminal.text().split("\r\u001b[K");
      expect(steps).toEqual([
        "",
        "listing the tasks of cluster test-cluster",
        "checking the records",
        expect.stringMatching(/^tasks: 0 stopped, /),
      ]);
    });
  });
  describeProgram("doctor", () => {
    /** Runs a test with an installation of its own. */
    const hostAddresses = () =>
      Object.values(networkInterfaces()).flatMap((all = []) =>
        all.flatMap(({ internal, family, address }) => (internal || family !== "IPv4" ? [] : [address])),
      );
    const withInstallation =
      (body: (installation: Installation) => Promise<void>, options: WorldOptions = {}) =>
      async () => {
        const installation = await makeInstallation(options);
        await body(installation).finally(() => installation.close());
      };
    const definitionOf = (changes: object) => (i: Installation) => void Object.assign(i.definition, changes);
    const containerOf = (changes: object) => (i: Installation) => void Object.assign(i.container, changes);
    const fargateOf = (changes: object) => (i: Installation) => void Object.assign(i.settings.Fargate, changes);
    const customOf = (changes: object) => (i: Installation) => void Object.assign(i.custom, changes);
    const withImages = { AllowedImages: ["**"] };
    const networkOf = (change: (network: Network) => void) => (i: Installation) => change(i.aws.network);
    /** Replaces the default route. */
    const routeTo = (...routes: Route[]) =>
      networkOf(({ routeTables: [table] }) => void table?.Routes?.splice(1, 1, ...routes));
    const IGW: Route = { DestinationCidrBlock: "0.0.0.0/0", GatewayId: "igw-0a1b2c3d", State: "active" };
    const endpoint = (service: string, more: VpcEndpoint = {}): VpcEndpoint => ({
      VpcEndpointId: `vpce-${service}`,
      VpcId: VPC,
      ServiceName: `com.amazonaws.us-east-2.${service}`,
      VpcEndpointType: "Interface",
      State: "Available",
      ...more,
    });
    const s3 = endpoint("s3", { VpcEndpointType: "Gateway", RouteTableIds: ["rtb-0a1b2c3d"] });
    const allEndpoints = [endpoint("ecr.api"), endpoint("ecr.dkr"), endpoint("logs"), s3];
    const rulesOf = (...rules: IpPermission[]) =>
      networkOf(({ securityGroups: [group] }) => void Object.assign(group ?? {}, { IpPermissions: rules }));
    const openFor = (i: Installation, source: object) =>
      rulesOf({ IpProtocol: "tcp", FromPort: i.world.sshPort, ToPort: i.world.sshPort, ...source })(i);
    /** The policies of the examples, with changes to their statements: undefined removes one. */
    const policiesWith = (i: Installation, change: (statement: Statement) => Statement | undefined) => {
      const policies = Object.entries(i.aws.policies ?? {}).map(([name, { Version, Statement }]) => [
        name,
        { Version, Statement: Statement.flatMap((statement) => change(statement) ?? []) },
      ]);
      i.aws.policies = Object.fromEntries(policies);
    };
    const without = (sid: string) => (i: Installation) =>
      policiesWith(i, (statement) => (statement.Sid === sid ? undefined : statement));
    /** Adds policies of the examples. */
    const attach = (i: Installation, ...names: string[]) => {
      i.aws.policies = { ...i.aws.policies, ...examplePolicies(...names) };
    };
    const allowAll = (i: Installation) => {
      delete i.aws.policies;
    };
    const everything = { Version: "2012-10-17", Statement: [{ Effect: "Allow", Action: "*", Resource: "*" }] };
    const but = (action: string) => ({
      boundary: {
        Version: "2012-10-17",
        Statement: [...everything.Statement, { Effect: "Deny", Action: action, Resource: "*" }],
      },
    });
    const both =
      (...breaks: ((i: Installation) => void)[]) =>
      (i: Installation) => {
        for (const change of breaks) change(i);
      };
    const clusters = (cluster: object) => ({ clusters: [{ name: "test-cluster", ...cluster }] });
    const ec2 = clusters({ registeredContainerInstancesCount: 3 });
    /** As in a mount namespace with an empty /etc, in which a command has changed files. */
    const inNamespace = (change: string) => (i: Installation) => {
      delete i.env.FARGATE_MANAGER;
      const hide = "for dir in /etc /var/spool/cron; do [ ! -d $dir ] || mount -t tmpfs tmpfs $dir || exit 99; done";
      i.wrapper = [...UNSHARE, "sh", "-c", `${hide}; ${change}; exec "$@"`, "sh"];
    };
    const UNSHARE = ["unshare", "--mount", ...(process.geteuid?.() === 0 ? [] : ["--map-root-user"])];
    const canUnshare = spawnSync(UNSHARE[0] as string, [...UNSHARE.slice(1), "true"]).status === 0;
    const cronTable = join(projectRoot, "examples", "cron.d", "fargate-sweep");
    const examples = join(projectRoot, "examples", "systemd");
    const useFile = "s,/etc/gitlab-runner/fargate.toml,DRIVER_FILE,";
    const copyUnits = `units=/etc/systemd/system; mkdir -p $units; cp ${examples}/fargate-sweep.* $units`;
    const units = `${copyUnits}; sed -i ${useFile} $units/fargate-sweep.service`;

    test(
      "doctor finds nothing wrong in a good installation, and changes nothing",
      withInstallation(async (i) => {
        const { code, stderr, findings, wrong, unknown } = await i.examine();
        expect({ wrong, unknown, code, stderr }).toEqual({ wrong: [], unknown: [], code: 0, stderr: "" });
        expect(findings.length).toBeGreaterThan(40);
        const operations = new Set(i.aws.calls.map(({ operation }) => operation));
        expect([...operations].filter((name) => !/^(Describe|Get|Simulate)/.test(name))).toEqual([]);
        expect(fs.readdirSync(i.world.directory).sort()).toEqual([
          "config.toml",
          "fargate-0.toml",
          "fargate.toml",
          "gitlab-runner",
        ]);
      }),
    );

    type Break = [what: string, change: (i: Installation) => void, check: string, detail: RegExp, fix: RegExp];
    type Rest = { options?: WorldOptions; unknown?: string[] };
    /** One fault each. `unknown`: the checks that the fault makes impossible */
    const FAULTS: [...Break, Rest?][] = [
      // Settings.
      [
        "a value out of range",
        (i) => {
          i.settings.SSH.Port = 99_999;
        },
        "configuration",
        /^SSH\.Port is 99999; expected: /,
        /see docs\/settings\.md/,
        { unknown: ["everything else"] },
      ],
      [
        "a configuration file that is not TOML",
        (i) => {
          i.text = "[Fargate";
        },
        "configuration",
        /fargate\.toml, line 1, column \d+: invalid TOML/,
        /docs\/settings\.md/,
        { unknown: ["everything else"] },
      ],
      [
        "a misspelt setting",
        fargateOf({ Clutser: "ci" }),
        "configuration",
        /unknown key Fargate\.Clutser/,
        /^correct or remove it$/,
      ],
      [
        "AllowedTaskDefinitions that is not set",
        fargateOf({ AllowedTaskDefinitions: undefined }),
        "AllowedTaskDefinitions",
        /may choose any task definition/,
        /^set it to /,
      ],
      [
        "a private key that is none",
        (i) => {
          i.settings.SSH.PrivateKeyPath = i.runnerFile;
        },
        "PrivateKeyPath",
        /./,
        /name a private key/,
      ],
      // Credentials and the clock.
      [
        "missing credentials",
        (i) => {
          for (const key of ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"]) delete i.env[key];
        },
        "credentials",
        /Could not load credentials/,
        /give the runner's host a role/,
        { unknown: ["AWS", "clock"] },
      ],
      [
        "credentials that AWS does not know",
        (i) => {
          i.env.AWS_SESSION_TOKEN = "other";
        },
        "credentials",
        /InvalidClientTokenId/,
        /give the runner's host a role/,
        { unknown: ["AWS"] },
      ],
      [
        "a profile that does not exist",
        (i) => {
          for (const key of ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"]) delete i.env[key];
          i.env.AWS_PROFILE = "none";
        },
        "credentials",
        /profile none/,
        /check AWS_PROFILE/,
        { unknown: ["AWS", "clock"] },
      ],
      [
        "credentials of another account",
        fargateOf({ Cluster: "arn:aws:ecs:us-east-2:999999999999:cluster/test-cluster" }),
        "credentials",
        /fargate-manager.*is of another account than arn:aws:ecs:us-east-2:999999999999:/,
        /credentials of account 999999999999/,
        { unknown: ["AWS"] },
      ],
      [
        "an unreadable CA bundle",
        (i) => {
          i.env.AWS_CA_BUNDLE = "/none.pem";
        },
        "credentials",
        /the CA bundle \/none\.pem cannot be used/,
        /correct this first/,
        { unknown: ["AWS", "clock"] },
      ],
      [
        "a clock that is 90 s slow",
        (i) => {
          i.aws.clockOffset = 90;
        },
        "clock",
        /^(89|90)\.\d s behind AWS's clock$/,
        /^correct the clock/,
      ],
      // The cluster.
      [
        "a cluster that does not exist",
        both(fargateOf({ Cluster: "none" }), allowAll),
        "cluster",
        /^none does not exist in us-east-2$/,
        /aws ecs create-cluster --cluster-name none$/,
        { unknown: ["definition test-task: compatibility"] },
      ],
      [
        "an ARN of a cluster that does not exist",
        both(fargateOf({ Cluster: "arn:aws:ecs:us-east-2:111122223333:cluster/none" }), allowAll),
        "cluster",
        /:cluster\/none does not exist in us-east-2$/,
        /aws ecs create-cluster --cluster-name none$/,
        { unknown: ["definition test-task: compatibility"] },
      ],
      [
        "a cluster that does not exist, without the simulator",
        both(fargateOf({ Cluster: "none" }), (i) =>
          policiesWith(i, (s) =>
            s.Sid === "SimulateOwnPolicies" ? undefined : { ...s, Resource: "*", Condition: {} },
          ),
        ),
        "cluster",
        /^none does not exist in us-east-2$/,
        /aws ecs create-cluster/,
        {
          unknown: [
            "definition test-task: compatibility",
            "permission ecs:RunTask",
            "permission ecs:DescribeTasks",
            "permission ecs:StopTask",
            "permission iam:PassRole",
            "permission iam:PassRole",
            "permission ecs:ListTasks",
          ],
        },
      ],
      [
        "an inactive cluster",
        () => {},
        "cluster",
        /^test-cluster is INACTIVE in us-east-2$/,
        /create-cluster/,
        { options: clusters({ status: "INACTIVE" }) },
      ],
      [
        "a capacity provider that the cluster lacks",
        fargateOf({ CapacityProviderStrategy: [{ CapacityProvider: "FARGATE_SPOT" }] }),
        "launch type",
        /^the cluster lacks FARGATE_SPOT$/,
        /put-cluster-capacity-providers --cluster test-cluster --capacity-providers FARGATE FARGATE_SPOT --default-capacity-provider-strategy '\[\]'$/,
        { options: clusters({ capacityProviders: ["FARGATE"] }) },
      ],
      [
        "a fallback that the cluster lacks",
        fargateOf({ LaunchType: "FARGATE", FallbackCapacityProviderStrategy: [{ CapacityProvider: "FARGATE_SPOT" }] }),
        "launch type",
        /^the cluster lacks FARGATE_SPOT$/,
        /put-cluster-capacity-providers/,
        { options: clusters({}) },
      ],
      [
        "a cluster with neither a default strategy nor instances",
        () => {},
        "launch type",
        /the cluster has none$/,
        /set LaunchType = "FARGATE"/,
        { options: clusters({}) },
      ],
      [
        "LaunchType EC2 without instances",
        fargateOf({ LaunchType: "EC2" }),
        "launch type",
        /the cluster has none$/,
        /add instances/,
      ],
      [
        "EnablePublicIP on EC2 instances",
        both(fargateOf({ LaunchType: "EC2", EnablePublicIP: true, UsePublicIP: false })),
        "launch type",
        /^EnablePublicIP is set, but tasks start on EC2$/,
        /only Fargate tasks/,
        { options: ec2 },
      ],
      // Task definitions.
      [
        "a task definition that does not exist",
        (i) => {
          i.definitions.length = 0;
        },
        "definition test-task",
        /^it does not exist in us-east-2$/,
        /^register it/,
      ],
      [
        "an inactive task definition",
        both(
          fargateOf({ TaskDefinition: "test-task:1", AllowedTaskDefinitions: [] }),
          definitionOf({ status: "INACTIVE" }),
        ),
        "definition test-task: status",
        /test-task:1 is INACTIVE/,
        /that is active/,
      ],
      [
        "the network mode bridge",
        definitionOf({ networkMode: "bridge" }),
        "definition test-task: network mode",
        /^it is bridge$/,
        /^set networkMode to awsvpc/,
      ],
      [
        "a task definition for EC2 only",
        definitionOf({ requiresCompatibilities: ["EC2"] }),
        "definition test-task: compatibility",
        /^it is for EC2, not for FARGATE$/,
        /requiresCompatibilities/,
      ],
      [
        "a task definition for Windows",
        definitionOf({ runtimePlatform: { operatingSystemFamily: "WINDOWS_SERVER_2022_CORE" } }),
        "definition test-task: platform",
        /WINDOWS_SERVER_2022_CORE/,
        /Linux image/,
      ],
      [
        "a task definition without ci-coordinator",
        containerOf({ name: "ssh" }),
        "definition test-task: container",
        /^there is no ci-coordinator, only ssh$/,
        /name its container ci-coordinator/,
      ],
      [
        "another port in the task definition",
        containerOf({ portMappings: [{ containerPort: 2 }] }),
        "definition test-task: SSH port",
        /^it maps 2, but Port is \d+$/,
        /^map containerPort \d+, or correct Port/,
      ],
      [
        "an allowed task definition that does not exist",
        fargateOf({ AllowedTaskDefinitions: ["test-task", "ci-none"] }),
        "definition ci-none",
        /^it does not exist in us-east-2$/,
        /^register it/,
      ],
      [
        "environment files without an execution role",
        both(
          containerOf({
            image: "registry.example.com/worker",
            logConfiguration: undefined,
            environmentFiles: [{ type: "s3", value: "arn:aws:s3:::bucket/variables.env" }],
          }),
          definitionOf({ executionRoleArn: undefined }),
        ),
        "definition test-task: execution role",
        /there is none/,
        /set executionRoleArn/,
      ],
      [
        "awslogs without an execution role",
        definitionOf({ executionRoleArn: undefined }),
        "definition test-task: execution role",
        /there is none, for the image, log or secrets/,
        /set executionRoleArn/,
      ],
      [
        "SSH_PUBLIC_KEY as a secret",
        containerOf({
          secrets: [{ name: "SSH_PUBLIC_KEY", valueFrom: "arn:aws:secretsmanager:us-east-2:1:secret:x" }],
        }),
        "definition test-task: SSH key",
        /^SSH_PUBLIC_KEY is a secret$/,
        /PrivateKeyPath/,
      ],
      [
        "WaitForHealthy without a health check",
        fargateOf({ WaitForHealthy: true }),
        "definition test-task: health check",
        /WaitForHealthy is set/,
        /healthCheck/,
      ],
      [
        "ECS Exec without a task role",
        both(fargateOf({ EnableExecuteCommand: true }), definitionOf({ taskRoleArn: undefined })),
        "definition test-task: task role",
        /ECS Exec needs it/,
        /taskRoleArn/,
      ],
      [
        "a task definition of JobImage that does not exist",
        (i) => {
          i.settings.top.JobImage = {
            TaskDefinitions: [{ Image: "registry.example.com/ci/java:*", TaskDefinition: "ci-java" }],
          };
        },
        "definition ci-java",
        /does not exist/,
        /^register it/,
      ],
      [
        "a task definition of JobImage without ci-coordinator",
        (i) => {
          i.settings.top.JobImage = {
            TaskDefinitions: [{ Image: "registry.example.com/ci/java:*", TaskDefinition: "ci-java" }],
          };
          i.definitions.push({
            ...i.definition,
            family: "ci-java",
            containerDefinitions: [{ ...i.container, name: "java" }],
          });
        },
        "definition ci-java: container",
        /only java/,
        /ci-coordinator/,
      ],
      // The network.
      [
        "a subnet that does not exist",
        fargateOf({ Subnet: undefined, Subnets: ["subnet-0a1b2c3d", "subnet-0a1b2c3e"] }),
        "subnet subnet-0a1b2c3e",
        /^it does not exist in us-east-2$/,
        /check Subnet/,
      ],
      [
        "a security group that does not exist",
        fargateOf({ SecurityGroup: undefined, SecurityGroups: ["sg-0a1b2c3d", "sg-1"] }),
        "security group sg-1",
        /^it does not exist in us-east-2$/,
        /SecurityGroup/,
      ],
      [
        "a subnet without free addresses",
        networkOf(({ subnets: [subnet] }) => void Object.assign(subnet ?? {}, { AvailableIpAddressCount: 0 })),
        "subnet subnet-0a1b2c3d: addresses",
        /no address is free/,
        /more free addresses/,
      ],
      [
        "a security group of another VPC",
        networkOf(({ securityGroups: [group] }) => void Object.assign(group ?? {}, { VpcId: "vpc-1" })),
        "VPC",
        /are of vpc-0123456789abcdef0, vpc-1$/,
        /one VPC/,
      ],
      [
        "a route to a gateway that is gone",
        routeTo({ DestinationCidrBlock: "0.0.0.0/0", NatGatewayId: "nat-1", State: "blackhole" }),
        "subnet subnet-0a1b2c3d: route",
        /^the route 0\.0\.0\.0\/0 of rtb-0a1b2c3d leads to nat-1, which is gone$/,
        /lead to a NAT gateway/,
      ],
      [
        "an internet gateway for tasks without public addresses",
        routeTo(IGW),
        "subnet subnet-0a1b2c3d: route",
        /needs public addresses, which tasks lack, and no endpoint for ecr\.api, ecr\.dkr, s3, logs$/,
        /NAT gateway, or the VPC endpoints of docs\/private-subnets\.md$/,
      ],
      [
        "a missing endpoint in a VPC without a route out",
        both(
          routeTo(),
          networkOf((network) => network.vpcEndpoints.push(...allEndpoints.slice(0, 2), s3)),
        ),
        "subnet subnet-0a1b2c3d: route",
        /^there is none out of the VPC, and no endpoint for logs$/,
        /VPC endpoints of docs\/private-subnets\.md/,
      ],
      [
        "an endpoint of S3 for another route table",
        both(
          routeTo(),
          networkOf((network) =>
            network.vpcEndpoints.push(...allEndpoints.slice(0, 3), { ...s3, RouteTableIds: ["rtb-1"] }),
          ),
        ),
        "subnet subnet-0a1b2c3d: route",
        /no endpoint for s3$/,
        /endpoints/,
      ],
      [
        "an endpoint that is not available",
        both(
          routeTo(),
          networkOf((network) =>
            network.vpcEndpoints.push(...allEndpoints.slice(1), endpoint("ecr.api", { State: "Deleting" })),
          ),
        ),
        "subnet subnet-0a1b2c3d: route",
        /no endpoint for ecr\.api$/,
        /endpoints/,
      ],
      [
        "a NAT gateway for logins to public addresses",
        (i) => {
          fargateOf({ EnablePublicIP: true })(i);
          openFor(i, { IpRanges: [{ CidrIp: "0.0.0.0/0" }] });
          attach(i, "public-ip");
        },
        "subnet subnet-0a1b2c3d: route",
        /to no internet gateway/,
        /UsePublicIP = false/,
      ],
      [
        "UsePublicIP without EnablePublicIP",
        (i) => {
          fargateOf({ UsePublicIP: true })(i);
          routeTo(IGW)(i);
          i.aws.network.vpcEndpoints.push(...allEndpoints);
          openFor(i, { IpRanges: [{ CidrIp: "0.0.0.0/0" }] });
          attach(i, "public-ip");
        },
        "UsePublicIP",
        /no public address/,
        /EnablePublicIP/,
        { unknown: ["subnet subnet-0a1b2c3d: route"] },
      ],
      [
        "a security group without a rule for the port",
        rulesOf({ IpProtocol: "tcp", FromPort: 1, ToPort: 2, IpRanges: [{ CidrIp: "0.0.0.0/0" }] }),
        "security groups: login",
        /^TCP port \d+ is open for nobody$/,
        /^aws ec2 authorize-security-group-ingress --group-id sg-0a1b2c3d --protocol tcp --port \d+ --source-group sg-0a1b2c3e$/,
      ],
      [
        "a security group that is open for another group",
        (i) => openFor(i, { UserIdGroupPairs: [{ GroupId: "sg-1" }] }),
        "security groups: login",
        /^TCP port \d+ is open for sg-1, but this host has .*, sg-0a1b2c3e$/,
        /--source-group sg-0a1b2c3e$/,
      ],
      [
        "a security group that is open for other addresses",
        (i) => openFor(i, { IpRanges: [{ CidrIp: "198.51.100.0/24" }] }),
        "security groups: login",
        /is open for 198\.51\.100\.0\/24, but this host has /,
        /authorize-security-group-ingress/,
      ],
      [
        "a security group that is open for UDP only",
        rulesOf({ IpProtocol: "udp", FromPort: 0, ToPort: 65_535, IpRanges: [{ CidrIp: "0.0.0.0/0" }] }),
        "security groups: login",
        /open for nobody/,
        /authorize-security-group-ingress/,
      ],
      [
        "a security group that lets nothing out",
        networkOf(({ securityGroups: [group] }) => void Object.assign(group ?? {}, { IpPermissionsEgress: [] })),
        "security groups: outbound",
        /no rule lets tasks send to TCP port 443/,
        /authorize-security-group-egress --group-id sg-0a1b2c3d /,
      ],
      // Permissions.
      [
        "ecs:RunTask that no policy allows",
        without("StartTasks"),
        "permission ecs:RunTask",
        /^no policy allows it on arn:aws:ecs:us-east-2:111122223333:task-definition\/test-task:1$/,
        /^allow ecs:RunTask on arn:.*:task-definition\/test-task:\* to arn:aws:iam::111122223333:role\/fargate-manager, as in examples\/iam\/driver\.json$/,
      ],
      [
        "ecs:RunTask in another cluster",
        (i) =>
          policiesWith(i, (s) =>
            s.Sid === "StartTasks"
              ? {
                  ...s,
                  Condition: { ArnEquals: { "ecs:cluster": "arn:aws:ecs:us-east-2:111122223333:cluster/other" } },
                }
              : s,
          ),
        "permission ecs:RunTask",
        /no policy allows it/,
        /^allow ecs:RunTask/,
      ],
      [
        "ecs:StopTask that no policy allows",
        (i) =>
          policiesWith(i, (s) => ({ ...s, Action: [s.Action].flat().filter((action) => action !== "ecs:StopTask") })),
        "permission ecs:StopTask",
        /^no policy allows it on .*:task\/test-cluster\/\*$/,
        /^allow ecs:StopTask on .*:task\/test-cluster\/\* to /,
      ],
      [
        "iam:PassRole that no policy allows",
        (i) =>
          policiesWith(i, (s) =>
            s.Sid === "PassRolesToTasks" ? { ...s, Resource: [s.Resource].flat().slice(0, 1) } : s,
          ),
        "permission iam:PassRole",
        /^no policy allows it on .*role\/test-ci-task$/,
        /^allow iam:PassRole on .*role\/test-ci-task to /,
      ],
      [
        "a policy that denies ecs:StopTask",
        (i) => {
          i.aws.policies = { ...i.aws.policies, guardrail: but("ecs:StopTask").boundary };
          policiesWith(i, (s) => (s.Action === "*" ? undefined : s));
        },
        "permission ecs:StopTask",
        /^policy guardrail denies it on /,
        /^correct that policy$/,
      ],
      [
        "a permissions boundary without ecs:StopTask",
        (i) => {
          Object.assign(i.aws, { boundary: but("ecs:StopTask") });
        },
        "permission ecs:StopTask",
        /^the permissions boundary does not allow it/,
        /to the boundary of arn:/,
      ],
      [
        "an organization that does not allow ecs:RunTask",
        (i) => {
          Object.assign(i.aws, { organization: but("ecs:RunTask") });
        },
        "permission ecs:RunTask",
        /^a service control policy does not allow it/,
        /organization's policies/,
      ],
      [
        "ecs:ListTasks that no policy allows",
        without("FindTasks"),
        "permission ecs:ListTasks",
        /^no policy allows it$/,
        /examples\/iam\/sweep\.json$/,
      ],
      [
        "Tags without ecs:TagResource",
        fargateOf({ Tags: { team: "ci" } }),
        "permission ecs:TagResource",
        /no policy allows it on .*task\/test-cluster\/\*/,
        /examples\/iam\/tags\.json$/,
      ],
      [
        "job images without ecs:RegisterTaskDefinition",
        (i) => {
          i.settings.top.JobImage = withImages;
          attach(i, "job-image", "job-image-sweep");
          policiesWith(i, (s) => ({
            ...s,
            Action: [s.Action].flat().filter((action) => action !== "ecs:RegisterTaskDefinition"),
          }));
        },
        "permission ecs:RegisterTaskDefinition",
        /^no policy allows it$/,
        /examples\/iam\/job-image\.json$/,
      ],
      [
        "ecs:StopTask that AWS denies, without the simulator",
        both(without("SimulateOwnPolicies"), (i) =>
          policiesWith(i, (s) => ({ ...s, Action: [s.Action].flat().filter((action) => action !== "ecs:StopTask") })),
        ),
        "permission ecs:StopTask",
        /^AWS denies it on .*:task\/test-cluster\/\*$/,
        /^allow ecs:StopTask/,
        { unknown: ["permission ecs:RunTask", "permission iam:PassRole", "permission iam:PassRole"] },
      ],
      // This host.
      [
        "a directory of records that anybody may write to",
        (i) => {
          fs.mkdirSync(i.world.records);
          fs.chmodSync(i.world.records, 0o777);
        },
        "directory of records",
        /anybody may write to it/,
        /mode 0700/,
      ],
      [
        "a directory of records that a group may write to",
        (i) => {
          fs.mkdirSync(i.world.records);
          fs.chmodSync(i.world.records, 0o770);
        },
        "directory of records",
        /is writable by others/,
        /mode 0700/,
      ],
      [
        "config.toml that is not TOML",
        (i) => {
          fs.writeFileSync(i.runnerFile, "[[runners");
        },
        "runner",
        /config\.toml cannot be used: line 1/,
        /^correct that file$/,
      ],
      [
        "config.toml without a section of this driver",
        (i) => {
          fs.writeFileSync(i.runnerFile, '[[runners]]\nexecutor = "shell"\n');
        },
        "runner",
        /no section of .* calls this driver/,
        /fargate init/,
      ],
      [
        "another executor",
        (i) => {
          i.runner.executor = "shell";
        },
        "runner fargate: executor",
        /^it is shell$/,
        /executor = "custom"/,
      ],
      [
        "arguments of another stage",
        (i) => {
          i.custom.run_args = i.custom.prepare_args;
        },
        "runner fargate: run",
        /^run_args is \["--config", .*, "custom", "prepare"\]$/,
        /run_args = \["--config", ".*fargate\.toml", "custom", "run"\]$/,
      ],
      [
        "a stage without a program",
        customOf({ run_exec: undefined }),
        "runner fargate: run",
        /^run_exec is not set$/,
        /^set run_exec to the path of this program/,
      ],
      [
        "a stage whose program does not exist",
        customOf({ cleanup_exec: "/opt/none/fargate" }),
        "runner fargate: cleanup",
        /cannot run \/opt\/none\/fargate/,
        /cleanup_exec/,
      ],
      [
        "a stage with another configuration file",
        customOf({ prepare_args: ["--config", "/etc/other.toml", "custom", "prepare"] }),
        "runner fargate: prepare",
        /^it uses \/etc\/other\.toml, not \//,
        /prepare_args/,
      ],
      [
        "a stage without a configuration file",
        customOf({ cleanup_args: ["custom", "cleanup"] }),
        "runner fargate: cleanup",
        /no --config with an absolute path/,
        /cleanup_args/,
      ],
      [
        "the shell pwsh",
        (i) => {
          i.runner.shell = "pwsh";
        },
        "runner fargate: shell",
        /^it is pwsh$/,
        /shell = "bash"/,
      ],
      [
        "a section without builds_dir",
        (i) => {
          delete i.runner.builds_dir;
        },
        "runner fargate: builds_dir",
        /^it is not set$/,
        /builds_dir/,
      ],
      [
        "a section without cache_dir",
        (i) => {
          delete i.runner.cache_dir;
        },
        "runner fargate: cache_dir",
        /^it is not set$/,
        /cache_dir/,
      ],
      [
        "a short graceful_kill_timeout",
        customOf({ graceful_kill_timeout: 15 }),
        "runner fargate: graceful_kill_timeout",
        /^it is 15 s$/,
        /to 20 or more$/,
      ],
      [
        "a short prepare_exec_timeout",
        customOf({ prepare_exec_timeout: 300 }),
        "runner fargate: prepare_exec_timeout",
        /^it is 300 s$/,
        /to 660 or more$/,
      ],
      [
        "a short cleanup_exec_timeout",
        customOf({ cleanup_exec_timeout: 30 }),
        "runner fargate: cleanup_exec_timeout",
        /^it is 30 s$/,
        /to 120 or more$/,
      ],
      [
        "a short shutdown_timeout",
        (i) => {
          i.runnerConfig.shutdown_timeout = 10;
        },
        "runner fargate: shutdown_timeout",
        /^it is 10 s$/,
        /to 20 or more$/,
      ],
      [
        "GitLab Runner 14.0",
        (i) => {
          i.version = "14.0.1";
        },
        "version of gitlab-runner",
        /^14\.0\.1 passes no JOB_RESPONSE_FILE$/,
        /14\.1 or later/,
      ],
      // AWS out of reach.
      [
        "an endpoint of AWS that does not answer",
        (i) => {
          i.env.AWS_ENDPOINT_URL = "http://127.0.0.1:9";
        },
        "connection to ECS",
        /^ecs:DescribeClusters got no answer/,
        /must reach AWS in Region/,
        {
          unknown: [
            "credentials",
            "cluster",
            "definition test-task",
            "subnets",
            "security groups",
            "permission ecs:RunTask",
            "permission ecs:DescribeTasks",
            "permission ecs:StopTask",
            "permission ecs:ListTasks",
            "permission iam:PassRole",
            "clock",
          ],
        },
      ],
    ];
    test.concurrent.each(FAULTS)(
      "doctor names %s",
      async (_, change, check, detail, fix, { options = {}, unknown = [] } = {}) => {
        await withInstallation(async (i) => {
          change(i);
          const examined = await i.examine();
          expect(examined.wrong).toEqual([
            { check, result: "wrong", detail: expect.stringMatching(detail), fix: expect.stringMatching(fix) },
          ]);
          expect(examined.unknown).toEqual(unknown);
          expect(examined.code).toBe(1);
          expect(i.aws.tasks()).toEqual([]);
        }, options)();
      },
    );

    /** Variants of a good installation. `unknown`: what cannot be checked in them */
    const GOOD: [string, (i: Installation) => void, Rest?][] = [
      [
        "a role with a path",
        (i) => {
          i.aws.caller.rolePath = "/ci/";
          policiesWith(i, (s) => (s.Sid === "SimulateOwnPolicies" ? { ...s, Resource: "*" } : s));
        },
      ],
      [
        "the root user",
        (i) => {
          i.aws.caller.arn = "arn:aws:iam::111122223333:root";
        },
      ],
      [
        "a cluster with a default strategy of instances",
        definitionOf({ requiresCompatibilities: ["EC2"], executionRoleArn: undefined }),
        {
          options: clusters({
            capacityProviders: ["asg"],
            defaultCapacityProviderStrategy: [{ capacityProvider: "asg", weight: 1 }],
          }),
        },
      ],
      ["LaunchType EC2 on instances", fargateOf({ LaunchType: "EC2" }), { options: ec2 }],
      [
        "an internet gateway for public addresses",
        (i) => {
          fargateOf({ EnablePublicIP: true })(i);
          routeTo(IGW)(i);
          openFor(i, { IpRanges: [{ CidrIp: "0.0.0.0/0" }] });
          attach(i, "public-ip");
        },
      ],
      [
        "a route of the subnet itself",
        networkOf(({ routeTables }) => {
          routeTables[0]?.Routes?.pop();
          routeTables.push({
            RouteTableId: "rtb-2",
            VpcId: VPC,
            Routes: [{ DestinationCidrBlock: "0.0.0.0/0", TransitGatewayId: "tgw-1" }],
            Associations: [{ SubnetId: "subnet-0a1b2c3d" }],
          });
        }),
      ],
      [
        "a subnet with IPv6 only",
        networkOf(({ subnets: [subnet], routeTables: [table] }) => {
          Object.assign(subnet ?? {}, { Ipv6Native: true, AvailableIpAddressCount: 0 });
          table?.Routes?.push({ DestinationIpv6CidrBlock: "::/0", EgressOnlyInternetGatewayId: "eigw-1" });
        }),
        { unknown: ["security groups: login"] },
      ],
      [
        "a rule for this host's addresses",
        (i) => openFor(i, { IpRanges: hostAddresses().map((address) => ({ CidrIp: `${address}/32` })) }),
      ],
      ["a rule for all protocols", rulesOf({ IpProtocol: "-1", UserIdGroupPairs: [{ GroupId: HOST_GROUP }] })],
      [
        "a private key in place of ci-coordinator",
        (i) => {
          const path = join(i.world.directory, "key");
          execFileSync("ssh-keygen", ["-q", "-t", "ed25519", "-N", "", "-f", path]);
          i.settings.SSH.PrivateKeyPath = path;
          i.container.name = "ssh";
        },
      ],
      ["a directory of records with mode 0700", (i) => fs.mkdirSync(i.world.records, { mode: 0o700 })],
      ["the official driver's aliases", customOf({ run_args: ["--config=DRIVER_FILE", "c", "r"] })],
      [
        "a driver under another name",
        (i) => {
          const link = join(i.world.directory, "driver");
          fs.symlinkSync(driver, link);
          for (const stage of ["config", "prepare", "run", "cleanup"]) i.custom[`${stage}_exec`] = link;
        },
      ],
      [
        "a driver that env(1) starts",
        (i) => {
          for (const stage of ["config", "prepare", "run", "cleanup"])
            Object.assign(i.custom, {
              [`${stage}_exec`]: "/usr/bin/env",
              [`${stage}_args`]: ["AWS_PROFILE=ci", driver, "--config", "DRIVER_FILE", "custom", stage],
            });
        },
      ],
      [
        "a configuration file behind a link",
        (i) => {
          fs.symlinkSync(i.world.directory, join(i.world.directory, "link"));
          for (const stage of ["config", "prepare", "run", "cleanup"])
            i.custom[`${stage}_args`] = ["--config", join(i.world.directory, "link/fargate.toml"), "custom", stage];
        },
      ],
      [
        "a log driver that needs no execution role",
        both(
          containerOf({ image: "registry.example.com/worker", logConfiguration: { logDriver: "splunk", options: {} } }),
          definitionOf({ executionRoleArn: undefined }),
        ),
      ],
      [
        "ecs:ListTasks for the container instances of the cluster",
        (i) => {
          const instances = "arn:aws:ecs:us-east-2:111122223333:container-instance/test-cluster/*";
          policiesWith(i, (s) => (s.Sid === "FindTasks" ? { ...s, Resource: [instances] } : s));
        },
      ],
      ["a section without the config stage", customOf({ config_exec: undefined, config_args: undefined })],
      [
        "sections of other programs and configuration files",
        (i) => {
          const { custom: _, ...plain } = i.runner;
          const other = { run_exec: driver, run_args: ["--config", "/etc/other.toml", "custom", "run"] };
          i.others.push({ ...plain, executor: "docker" }, { ...plain, custom: other });
        },
      ],
      [
        "job images with the policies of the examples",
        (i) => {
          i.settings.top.JobImage = withImages;
          fargateOf({ Tags: { team: "ci" } })(i);
          attach(i, "tags", "job-image", "job-image-sweep", "job-image-tags");
        },
      ],
      // What this host cannot know.
      [
        "a task definition without ports",
        containerOf({ portMappings: [] }),
        { unknown: ["definition test-task: SSH port"] },
      ],
      [
        "a task definition with a range of ports",
        containerOf({ portMappings: [{ containerPortRange: "1-60000" }] }),
        { unknown: ["definition test-task: SSH port"] },
      ],
      [
        "a wrapper script in place of the driver",
        customOf({ run_exec: "/bin/sh", run_args: ["-c", 'exec fargate --config /etc/f.toml custom run "$@"', "sh"] }),
        { unknown: ["runner fargate: run"] },
      ],
      [
        "a host that may not ask where tasks start",
        (i) => {
          without("DescribeCluster")(i);
          definitionOf({ requiresCompatibilities: ["EC2"], executionRoleArn: undefined })(i);
        },
        {
          unknown: ["cluster", "definition test-task: compatibility", "definition test-task: execution role"],
        },
      ],
      [
        "a network interface of another VPC with this host's address",
        (i) => {
          for (const own of i.aws.network.interfaces)
            Object.assign(own, { VpcId: "vpc-1", Groups: [{ GroupId: "sg-1" }] });
          openFor(i, { UserIdGroupPairs: [{ GroupId: "sg-1" }] });
        },
        { unknown: ["security groups: login"] },
      ],
      [
        "endpoints in place of a route",
        both(
          routeTo(),
          networkOf((network) => network.vpcEndpoints.push(...allEndpoints)),
        ),
        { unknown: ["subnet subnet-0a1b2c3d: route"] },
      ],
      [
        "a subnet that another account shares",
        networkOf(({ routeTables }) => void routeTables.splice(0)),
        { unknown: ["subnet subnet-0a1b2c3d: route"] },
      ],
      [
        "a host outside of the VPC",
        (i) => {
          i.aws.network.interfaces.length = 0;
        },
        { unknown: ["security groups: login"] },
      ],
      [
        "a rule for a prefix list",
        (i) => openFor(i, { PrefixListIds: [{ PrefixListId: "pl-1" }] }),
        { unknown: ["security groups: login"] },
      ],
      [
        "public addresses that are open for one address",
        (i) => {
          fargateOf({ EnablePublicIP: true })(i);
          routeTo(IGW)(i);
          openFor(i, { IpRanges: [{ CidrIp: "198.51.100.7/32" }] });
          attach(i, "public-ip");
        },
        { unknown: ["security groups: login"] },
      ],
      [
        "a host without the policy of doctor",
        (i) => {
          i.aws.policies = examplePolicies("driver", "sweep");
        },
        {
          unknown: [
            "cluster",
            "definition test-task",
            "subnets",
            "security groups",
            "permission ecs:RunTask",
            "permission iam:PassRole",
          ],
        },
      ],
      [
        "a host that may not ask EC2",
        (i) =>
          policiesWith(i, (s) => ({ ...s, Action: [s.Action].flat().filter((action) => !action.startsWith("ec2:")) })),
        { unknown: ["subnets", "security groups"] },
      ],
      [
        "a host that may not ask about its own network interfaces",
        (i) =>
          policiesWith(i, (s) => ({
            ...s,
            Action: [s.Action].flat().filter((action) => action !== "ec2:DescribeNetworkInterfaces"),
          })),
        { unknown: ["security groups: login"] },
      ],
      [
        "a policy whose condition cannot be known",
        (i) =>
          policiesWith(i, (s) =>
            s.Sid === "StartTasks" ? { ...s, Condition: { StringEquals: { "aws:SourceVpc": VPC } } } : s,
          ),
        { unknown: ["permission ecs:RunTask"] },
      ],
      [
        "STS out of reach",
        (i) => {
          i.env.AWS_ENDPOINT_URL_STS = "http://127.0.0.1:9";
        },
        { unknown: ["credentials", "permission ecs:RunTask", "permission iam:PassRole", "permission iam:PassRole"] },
      ],
      [
        "EC2 and IAM out of reach",
        (i) => {
          i.env.AWS_ENDPOINT_URL_EC2 = "http://127.0.0.1:9";
          i.env.AWS_ENDPOINT_URL_IAM = "http://127.0.0.1:9";
        },
        {
          unknown: [
            "subnets",
            "security groups",
            "permission ecs:RunTask",
            "permission iam:PassRole",
            "permission iam:PassRole",
          ],
        },
      ],
      [
        "a host without GitLab Runner",
        (i) => {
          i.env.PATH = "/usr/bin:/bin";
          i.runnerFile = join(i.world.directory, "none.toml");
          i.isInstalled = false;
        },
        { unknown: ["runner", "version of gitlab-runner"] },
      ],
    ];
    test.concurrent.each(GOOD)("doctor accepts %s", async (_, change, { options = {}, unknown = [] } = {}) => {
      await withInstallation(async (i) => {
        change(i);
        const { code, ...examined } = await i.examine();
        expect(examined.wrong).toEqual([]);
        expect({ code, unknown: examined.unknown }).toEqual({ code: 0, unknown });
      }, options)();
    });

    test(
      "doctor shows where a route leads, whatever its target is",
      withInstallation(async (i) => {
        routeTo({ DestinationCidrBlock: "0.0.0.0/0", LocalGatewayId: "lgw-1", State: "active" })(i);
        const { findings } = await i.examine();
        const check = "subnet subnet-0a1b2c3d: route";
        expect(findings).toContainEqual({ check, result: "right", detail: "to lgw-1" });
      }),
    );

    // AWS refuses requests whose time is more than 5 minutes off.
    test("doctor names a clock that is so slow that AWS refuses requests", async () =>
      withInstallation(async (i) => {
        i.aws.clockOffset = 600;
        const { wrong, unknown } = await i.examine();
        expect(wrong).toMatchObject([{ check: "clock", detail: expect.stringMatching(/^(599|600)\.\d s behind/) }]);
        expect(unknown).toContain("credentials");
      })());

    const NOT_PERMITTED = "unshare(1) is not permitted";
    type Schedule = [what: string, change: string, result: "right" | "wrong", text: RegExp, fix?: RegExp];
    const SCHEDULES: Schedule[] = [
      [
        "no schedule",
        "true",
        "wrong",
        /^no timer or cron job of this host runs fargate sweep with \/.*\/fargate\.toml$/,
        /docs\/orphans\.md/,
      ],
      [
        "a cron job for another configuration file",
        `mkdir /etc/cron.d; cp ${cronTable} /etc/cron.d`,
        "wrong",
        /^no timer or cron job/,
        /docs\/orphans\.md/,
      ],
      [
        "a script that cron runs every hour",
        "mkdir /etc/cron.hourly; echo 'for file in /etc/fargate*.toml; do fargate --config $file sweep; done' " +
          ">/etc/cron.hourly/sweep",
        "right",
        /^started by \/etc\/cron\.hourly\/sweep$/,
      ],
      [
        "the cron job of the examples",
        `mkdir /etc/cron.d; sed ${useFile} ${cronTable} >/etc/cron.d/fargate-sweep`,
        "right",
        /^started by \/etc\/cron\.d\/fargate-sweep$/,
      ],
      [
        "a cron job in a comment",
        `mkdir /etc/cron.d; sed 's/^/#/' ${cronTable} >/etc/cron.d/fargate-sweep`,
        "wrong",
        /^no timer or cron job/,
        /docs\/orphans\.md/,
      ],
      [
        "the timer of the examples",
        `${units}; mkdir $units/timers.target.wants; ln -s ../fargate-sweep.timer $units/timers.target.wants`,
        "right",
        /^started by fargate-sweep\.timer$/,
      ],
      [
        "a timer that is not enabled",
        units,
        "wrong",
        /^fargate-sweep\.timer is not enabled$/,
        /^systemctl enable --now fargate-sweep\.timer$/,
      ],
    ];
    test.each(SCHEDULES)("doctor judges a sweep with %s", async (_, change, result, detail, fix) => {
      if (!canUnshare) return console.log(NOT_PERMITTED);
      await withInstallation(async (i) => {
        inNamespace(change.replaceAll("DRIVER_FILE", join(i.world.directory, "fargate.toml")))(i);
        const { findings, wrong } = await i.examine();
        const finding = { check: "sweep", result, detail: expect.stringMatching(detail) };
        expect(findings).toContainEqual(fix ? { ...finding, fix: expect.stringMatching(fix) } : finding);
        expect(wrong.length).toBe(fix ? 1 : 0);
      })();
    });

    test(
      "doctor names a full disk of the directory of records",
      withInstallation(async (i) => {
        const mount = ["-t", "tmpfs", "-o", "size=1m,mode=0700", "tmpfs", i.world.records];
        fs.mkdirSync(i.world.records);
        if (spawnSync("mount", mount, { stdio: "ignore" }).status !== 0)
          return console.log("mount(8) is not permitted");
        const { wrong, code } = await i.examine().finally(() => spawnSync("umount", [i.world.records]));
        const detail = expect.stringMatching(/^the disk of .*metadata is full: 1 MB free, /);
        expect(wrong).toEqual([
          { check: "directory of records", result: "wrong", detail, fix: expect.stringMatching(/^make room there/) },
        ]);
        expect(code).toBe(1);
      }),
    );

    test(
      "doctor reports what another user than the runner's cannot read",
      withInstallation(async (i) => {
        const user = ["setpriv", "--reuid=12345", "--regid=12345", "--clear-groups"];
        if (process.geteuid?.() !== 0 || spawnSync("setpriv", [...user.slice(1), "true"]).status !== 0)
          return console.log("setpriv(1) is not permitted");
        fs.mkdirSync(i.world.records, { mode: 0o700 });
        fs.chmodSync(i.world.directory, 0o755);
        i.wrapper = user;
        i.command();
        const { wrong, unknown, findings } = await i.examine();
        expect(wrong).toEqual([
          {
            check: "directory of records",
            result: "wrong",
            detail: expect.stringContaining("this user cannot write"),
            fix: expect.stringContaining("run this as that user"),
          },
        ]);
        expect(unknown).toEqual(["runner"]);
        expect(findings.find(({ check }) => check === "runner")?.detail).toMatch(/cannot be read by this user/);
      }),
    );

    test(
      "doctor prints no value of a variable in config.toml",
      withInstallation(async (i) => {
        const values = ["AWS_PROFILE=first-secret", "KEY='second secret'", "TOKEN=third-secret"];
        i.custom.run_exec = "/usr/bin/env";
        i.custom.run_args = [values[0], values[2], driver, "--config", "DRIVER_FILE", "custom", "run"];
        i.custom.cleanup_exec = "/bin/sh";
        i.custom.cleanup_args = ["-c", `${values.join(" ")} exec fargate custom cleanup`];
        i.custom.prepare_args = ["custom", "prepare", values[0]];
        const { stdout, wrong, unknown } = await i.examine();
        expect(wrong).toMatchObject([{ check: "runner fargate: prepare" }]);
        expect(unknown).toEqual(["runner fargate: cleanup"]);
        expect(stdout.toString()).toContain("AWS_PROFILE=... ");
        expect(stdout.toString()).not.toMatch(/(first|second|third).secret/);
      }),
    );

    test("doctor says that a configuration file is missing", async () => {
      const { code, stdout, stderr } = await fargate(["--config", "/none/fargate.toml", "doctor"]);
      expect({ code, stderr }).toEqual({ code: 1, stderr: "" });
      expect(stdout.toString()).toBe(
        [
          "RESULT   CHECK            DETAIL",
          "WRONG    configuration    the configuration file /none/fargate.toml does not exist",
          "                          what to do: name the driver's file with --config; fargate init writes a new one",
          "unknown  everything else  not checked: that needs a configuration",
          "",
          "0 right, 1 wrong, 1 unknown",
          "",
        ].join("\n"),
      );
    });

    test(
      "doctor prints the same findings as a table and as JSON",
      withInstallation(async (i) => {
        i.container.portMappings = [];
        i.runner.shell = "pwsh";
        const json = await i.examine();
        const { findings, ...counts } = JSON.parse(json.stdout.toString());
        expect(findings).toEqual(json.findings);
        const right = json.findings.length - 2;
        expect(counts).toEqual({ right, wrong: 1, unknown: 1 });
        const { stdout, code } = await start(i.command(), { env: i.env }).finished;
        expect(code).toBe(1);
        const lines = stdout.toString().split("\n");
        const columns = /^(RESULT +)(CHECK +)DETAIL$/.exec(lines[0] ?? "");
        const [first, second] = [columns?.[1]?.length ?? 0, columns?.[2]?.length ?? 0];
        const cells = lines
          .slice(1, -3)
          .map((line) =>
            [line.slice(0, first), line.slice(first, first + second), line.slice(first + second)].map((cell) =>
              cell.trim(),
            ),
          );
        const expected = json.findings.flatMap(({ check, result, detail, fix }) => [
          [result === "wrong" ? "WRONG" : result, check, detail],
          ...(fix ? [["", "", `what to do: ${fix}`]] : []),
        ]);
        const stable = (rows: string[][]) =>
          rows.filter(([, check]) => check !== "clock" && check !== "directory of records");
        expect(stable(cells)).toEqual(stable(expected));
        expect(lines.slice(-3)).toEqual(["", `${right} right, 1 wrong, 1 unknown`, ""]);
      }),
    );

    test(
      "doctor needs exactly the policies of examples/iam that its settings need",
      withInstallation(async (i) => {
        i.settings.top.JobImage = withImages;
        fargateOf({ Tags: { team: "ci" }, EnablePublicIP: true })(i);
        openFor(i, { IpRanges: [{ CidrIp: "0.0.0.0/0" }] });
        routeTo(IGW)(i);
        const names = ["driver", "sweep", "public-ip", "tags", "job-image", "job-image-sweep", "job-image-tags"];
        const all = examplePolicies("doctor", ...names);
        for (const name of names) {
          // What doctor itself needs does not count, nor what two of them allow.
          const { [name]: removed, doctor, ...others } = all;
          const calls = ["iam:PassRole", ...(doctor?.Statement.flatMap(({ Action }) => Action) ?? [])];
          i.aws.policies = { doctor: doctor as PolicyDocument, ...others };
          const actions =
            removed?.Statement.flatMap(({ Action }) => Action).filter((action) => !calls.includes(action)) ?? [];
          const { wrong } = await i.examine();
          expect(new Set(wrong.map(({ check }) => check)), name).toEqual(
            new Set(actions.map((action) => `permission ${action}`)),
          );
          for (const { fix } of wrong) expect(fix).toContain(`as in examples/iam/${name}.json`);
        }
        i.aws.policies = all;
        expect((await i.examine()).wrong).toEqual([]);
      }),
    );

    /** An installation whose tasks have credentials of the task role. */
    const withTasks = (body: (installation: Installation) => Promise<void>, options: WorldOptions) =>
      withInstallation(async (i) => {
        const variables = { AWS_CONTAINER_CREDENTIALS_RELATIVE_URI: "/v2/credentials" };
        i.container.environment = Object.entries(variables).map(([name, value]) => ({ name, value }));
        await body(i);
      }, options)();
    const nothingLeft = (i: Installation) => {
      expect(i.aws.tasks().length).toBeGreaterThan(0);
      expect(i.aws.running()).toEqual([]);
      expect(filesLeft(i.world)).toEqual([]);
    };
    const STEPS = [
      "asking AWS whose the credentials are",
      "looking at the cluster and the task definition",
      "looking at the network",
      "checking the permissions",
      "looking at this host",
      "starting a task",
      expect.stringMatching(/^the task is (PENDING|RUNNING)$/),
      "running true",
      "looking at the session",
      "stopping the task",
    ];
    /** The steps in a log, but for a second status. */
    const stepsIn = (lines: readonly string[]) =>
      lines.filter((line, n) => !/^the task is /.test(line) || !/^the task is /.test(lines[n + 1] ?? ""));

    taskTest("doctor --run logs in to a real task, and shows each step with its time", () =>
      withTasks(
        async (i) => {
          i.container.environment?.push({ name: "SSH_PORT", value: "22" });
          const { findings, wrong, unknown, stderr, code } = await i.examine("--run");
          const isWrong = wrong.filter(({ check }) => check !== "session: gitlab-runner");
          expect({ isWrong, unknown }).toEqual({ isWrong: [], unknown: [] });
          expect(code).toBe(wrong.length > 0 ? 1 : 0);
          const ofRun = findings.filter(({ check }) => /^(task|session): /.test(check));
          const detailOf = (name: string) => ofRun.find(({ check }) => check === name)?.detail;
          const time = /\d+\.\d\d s/.source;
          expect(ofRun.map(({ check }) => check).filter((check) => check !== "task: PENDING")).toEqual([
            "task: RUNNING",
            "task: login",
            "task: true",
            "session: PATH",
            "session: credentials",
            "session: git",
            "session: gitlab-runner",
            "session: disk",
            "task: stopped",
          ]);
          expect(detailOf("task: RUNNING")).toMatch(new RegExp(`^after ${time}$`));
          expect(detailOf("task: login")).toMatch(new RegExp(`^after ${time}, at ${i.aws.tasks()[0]?.address}$`));
          expect(detailOf("task: true")).toMatch(new RegExp(`^took ${time}$`));
          expect(detailOf("task: stopped")).toMatch(new RegExp(`^took ${time}$`));
          expect(detailOf("session: PATH")).toMatch(/\/usr\/bin/);
          expect(detailOf("session: credentials")).toBe("of the task role");
          expect(detailOf("session: git")).toMatch(/^git version \d/);
          expect(detailOf("session: disk")).toMatch(/^\d+\.\d GiB free$/);
          expect(
            stepsIn(
              stderr
                .trimEnd()
                .split("\n")
                .map((line) => line.replace(/^\S+Z /, "")),
            ),
          ).toEqual(STEPS);
          nothingLeft(i);
        },
        { hosts },
      ),
    );

    taskTest(
      "doctor --run finds the gitlab-runner of the image, and names its absence",
      async () => {
        const script = "#!/bin/sh\necho 'Version:      17.9.0'\n";
        for (const gitlabRunner of [{ script, from: "file" } as const, undefined]) {
          const own = await containerHosts({ packages: PACKAGES, ...(gitlabRunner && { gitlabRunner }) });
          await withTasks(
            async (i) => {
              const { wrong, code } = await i.examine("--run");
              const absent = {
                check: "session: gitlab-runner",
                result: "wrong",
                detail: expect.stringContaining("not in PATH"),
                fix: expect.stringContaining("docs/worker-images.md"),
              };
              expect({ wrong, code }).toEqual(gitlabRunner ? { wrong: [], code: 0 } : { wrong: [absent], code: 1 });
            },
            { hosts: own },
          ).finally(() => own.close());
        }
      },
      { containerOnly: true, timeout: 300_000 },
    );

    test("doctor --run names a missing task role's credentials", () =>
      withTasks(async (i) => {
        i.container.environment = [];
        const { wrong } = await i.examine("--run");
        const detail = "none, although the task role is arn:aws:iam::111122223333:role/test-ci-task";
        expect(wrong).toContainEqual({
          check: "session: credentials",
          result: "wrong",
          detail,
          fix: expect.stringContaining("docs/worker-images.md"),
        });
        nothingLeft(i);
      }, {}));

    const STARTS: [string, FaultAction, RegExp, RegExp][] = [
      [
        "refuses",
        { error: "AccessDeniedException", message: "User: x is not authorized to perform: ecs:RunTask" },
        /ecs:RunTask was refused: AccessDeniedException/,
        /allow ecs:RunTask in the IAM policy/,
      ],
      [
        "cannot place",
        { failures: [{ reason: "ATTRIBUTE" }] },
        /ecs:RunTask started no task: ATTRIBUTE/,
        /add instances/,
      ],
      [
        "stops",
        {
          ends: {
            stopCode: "TaskFailedToStart",
            stoppedReason: "CannotPullContainerError: access denied",
          },
          in: "PENDING",
        },
        /CannotPullContainerError/,
        /check the image's name/,
      ],
    ];
    test.each(STARTS)("doctor --run explains a task that ECS %s", (_, fault, detail, fix) =>
      withTasks(async (i) => {
        i.aws.inject({ operation: "RunTask", do: fault });
        const { wrong, code, findings } = await i.examine("--run");
        if (i.aws.tasks().length === 0) expect(findings.map(({ check }) => check)).not.toContain("task: stopped");
        expect(wrong).toEqual([
          { check: "task", result: "wrong", detail: expect.stringMatching(detail), fix: expect.stringMatching(fix) },
        ]);
        expect(code).toBe(1);
        expect(i.aws.running()).toEqual([]);
        expect(filesLeft(i.world)).toEqual([]);
      }, {}),
    );

    test("doctor --run does not know whose credentials a session lacks", () =>
      withTasks(async (i) => {
        i.container.environment = [];
        policiesWith(i, (s) => (s.Sid === "DescribeDefinitionsAndNetwork" ? undefined : s));
        const { unknown, wrong } = await i.examine("--run");
        expect(unknown).toContain("session: credentials");
        expect(wrong.map(({ check }) => check)).not.toContain("session: credentials");
        nothingLeft(i);
      }, {}));

    /** Holds the first script after prepare, which looks for the shells. */
    const holdSession = () => {
      const { promise: held, resolve } = Promise.withResolvers<void>();
      let execs = 0;
      const holdExec = () => {
        if (++execs === 1) return undefined;
        resolve();
        return forever;
      };
      return { held, holdExec };
    };
    const REFUSED: FaultAction = {
      error: "AccessDeniedException",
      message: "User: x is not authorized to perform: ecs:StopTask",
    };
    test("doctor --run names a task that it may not stop", () =>
      withTasks(async (i) => {
        i.aws.inject({ operation: "StopTask", times: 99, do: REFUSED });
        const { wrong, code } = await i.examine("--run");
        const arn = i.aws.running()[0]?.taskArn;
        expect(wrong.filter(({ check }) => check !== "session: gitlab-runner")).toEqual([
          {
            check: "task: stopped",
            result: "wrong",
            detail: expect.stringMatching(`^${arn} may still be running .*AccessDeniedException`),
            fix: expect.stringMatching(/^allow ecs:StopTask in the IAM policy .*; stop the task by hand, /),
          },
        ]);
        expect(code).toBe(1);
        // For sweep.
        expect(filesLeft(i.world)).toHaveLength(1);
      }, {}));

    test("doctor --run names a task that it may not stop after SIGTERM", async () => {
      const { held, holdExec } = holdSession();
      await withTasks(
        async (i) => {
          i.aws.inject({ operation: "StopTask", times: 99, do: REFUSED });
          const running = start(i.command("--run"), { env: i.env });
          await held;
          running.process.kill("SIGTERM");
          const { code, stderr } = await running.finished;
          expect(code).toBe(2);
          expect(stderr).toContain(`${i.aws.running()[0]?.taskArn} may still be running`);
          expect(stderr).toMatch(/error: stopped by SIGTERM\n$/);
        },
        { hosts: embeddedHosts({ misbehaviour: { holdExec } }) },
      );
    });

    test.each(["RunTask", "DescribeTasks", "the session"])(
      "doctor --run leaves no task after SIGTERM during %s",
      async (moment) => {
        const { held, holdExec } = holdSession();
        await withTasks(
          async (i) => {
            const { promise, resolve: release } = Promise.withResolvers<void>();
            if (moment === "RunTask" || moment === "DescribeTasks")
              i.aws.inject({ operation: moment, do: { holdUntil: promise, after: true } });
            const running = start(i.command("--run"), { env: i.env });
            if (moment === "the session") await held;
            else
              await i.aws.waitFor(
                () => i.aws.calls.some(({ operation, output }) => operation === moment && output),
                20_000,
              );
            running.process.kill("SIGTERM");
            release();
            const finished = await running.finished;
            expect(finished).toMatchObject({ code: 2, stdout: Buffer.from("") });
            expect(finished.stderr).toMatch(/error: stopped by SIGTERM\n$/);
            nothingLeft(i);
          },
          { hosts: embeddedHosts({ misbehaviour: moment === "the session" ? { holdExec } : {} }) },
        );
      },
    );

    test("doctor --run leaves its task to sweep after SIGKILL", async () => {
      const { promise: held, resolve } = Promise.withResolvers<void>();
      const holdExec = () => {
        resolve();
        return forever;
      };
      await withTasks(
        async (i) => {
          i.settings.Fargate.AbandonedAfter = 60; // must be shorter than this machine's uptime
          const running = start(i.command("--run"), { env: i.env });
          await held;
          running.process.kill("SIGKILL");
          await running.finished;
          const sweep = async () => {
            const finished = await start([driver, "--config", join(i.world.directory, "fargate.toml"), "sweep"], {
              env: i.env,
            }).finished;
            expect(finished).toMatchObject({ code: 0 });
            return finished.stdout.toString();
          };
          expect(await sweep()).toMatch(/^tasks: 0 stopped, 1 left running; records: 0 removed; problems: 0/m);
          const then = Date.now() / 1000 - 61;
          for (const name of filesLeft(i.world)) fs.utimesSync(join(i.world.records, name), then, then);
          expect(await sweep()).toMatch(/ stopped: its job is abandoned; /);
          expect(i.aws.tasks()).toHaveLength(1);
          expect(i.aws.running()).toEqual([]);
        },
        { hosts: embeddedHosts({ misbehaviour: { holdExec } }) },
      );
    });

    test("doctor --run shows its progress on a terminal, then the table", () =>
      withTasks(async (i) => {
        const terminal = openTerminal(i.command("--run"), { env: i.env });
        await terminal.finished;
        const [before, ...steps] = terminal.text().split("\r\u001b[K");
        expect(before).toBe("");
        expect(stepsIn(steps.slice(0, -1))).toEqual(STEPS);
        expect(steps.at(-1)).toMatch(
          /^RESULT +CHECK +DETAIL\r\n[\s\S]*\r\nright +task: stopped +took [\s\S]* wrong, 0 unknown\r\n$/,
        );
        nothingLeft(i);
      }, {}));

    const page = fs.readFileSync(join(projectRoot, "docs", "doctor.md"), "utf8");
    test("docs/doctor.md lists each check", () =>
      withTasks(async (i) => {
        const { findings } = await i.examine("--run");
        const names = [...findings, ...FAULTS.map(([, , check]) => ({ check })), { check: "task" }].map(({ check }) =>
          check
            .replace(/^(definition|runner) [^:]+/, "$1 NAME")
            .replace(/^(subnet|security group) s[^:]+/, "$1 ID")
            .replace(/^permission .*/, "permission ACTION")
            .replace(/^task: [A-Z]+$/, "task: STATUS"),
        );
        for (const name of names) expect(page).toContain(`\`${name}\``);
        const [, tables = ""] = /\n## What is checked\n([\s\S]*)\n## Optional permissions\n/.exec(page) ?? [];
        const listed = [...tables.matchAll(/^\| (`.*?`) \|/gm)].flatMap(([, cell = ""]) => cell.split(", "));
        expect(listed.length).toBeGreaterThan(40);
        for (const name of listed) expect(names.map((known) => `\`${known}\``)).toContain(name);
      }, {}));

    test(
      "docs/doctor.md shows what doctor prints",
      withInstallation(async (i) => {
        definitionOf({ networkMode: "bridge" })(i);
        i.runner.shell = "pwsh";
        i.aws.network.interfaces.length = 0;
        const { stdout } = await start(i.command(), { env: i.env }).finished;
        const printed = stdout
          .toString()
          .replaceAll(join(i.world.directory, "fargate.toml"), "/etc/gitlab-runner/fargate.toml")
          .replaceAll(` ${i.world.sshPort}`, " 22");
        const [, example = ""] = /^```text\n([\s\S]*?)^```$/m.exec(page) ?? [];
        const lines = example.split("\n").filter((line) => line !== "...");
        expect(
          printed
            .split("\n")
            .filter((line) => lines.includes(line))
            .join("\n"),
        ).toBe(lines.join("\n"));
      }),
    );
  });
});

// ---------------------------------------------------------------------------------------------------------
// 12. Job image and services
// ---------------------------------------------------------------------------------------------------------

describe("job image and services", () => {
  type JobImage = Config["JobImage"];
  type Plan = NonNullable<ReturnType<typeof planImages>>;
  const DIGEST = `@sha256:${"0123456789abcdef".repeat(4)}`;
  const all: Partial<JobImage> = { AllowedImages: ["**"], AllowedServices: ["**"] };

  const configWith = (settings: Partial<JobImage>, change: (config: Config) => void = () => {}) => {
    const { config } = readConfig(configFile("guide"), "guide", {}, {});
    Object.assign(config.JobImage, settings);
    change(config);
    return config;
  };
  /** What `planImages` gets for a job with this response. */
  const imageContext = (keywords: object, settings: Partial<JobImage> = all, jobOverrides: string[] = []) => {
    const path = join(directory(), "response.json");
    fs.writeFileSync(path, JSON.stringify({ ...gitlabJob().response, ...keywords }));
    const env = { JOB_RESPONSE_FILE: path };
    return { config: configWith(settings), job: readJob(env) as Job, jobOverrides, env };
  };
  const planOf = (...context: Parameters<typeof imageContext>) => planImages(imageContext(...context)) as Plan;
  const failureOf = (...context: Parameters<typeof imageContext>) => {
    const failure = thrown(() => planImages(imageContext(...context)));
    expect(failure).toBeInstanceOf(Failure);
    return failure as Failure;
  };
  const nameOf = (image: object | undefined) => image && Object.values(image).join(" ");
  const variable = (key: string, value: string, more: object = {}) => ({ key, value, public: true, ...more });

  describe("image references", () => {
    test("parseImage adds Docker's defaults", () => {
      const cases: [text: string, parsed: string | undefined][] = [
        ["node", "docker.io library/node :latest"],
        ["node:22", "docker.io library/node :22"],
        ["group/node", "docker.io group/node :latest"],
        ["a/b/c:d", "docker.io a/b/c :d"],
        ["docker.io/node", "docker.io library/node :latest"],
        ["docker.io/library/node:22", "docker.io library/node :22"],
        ["index.docker.io/node:22", "docker.io library/node :22"],
        ["index.docker.io/group/node", "docker.io group/node :latest"],
        ["INDEX.Docker.IO/node", "docker.io library/node :latest"],
        ["registry-1.docker.io/node", "registry-1.docker.io node :latest"],
        ["localhost/node", "localhost node :latest"],
        ["localhost:5000/node:1", "localhost:5000 node :1"],
        ["registry:5000/node", "registry:5000 node :latest"],
        ["registry/node", "docker.io registry/node :latest"],
        ["node:1/2", "node:1 2 :latest"], // a registry with a port
        ["Registry.Example.COM/ci/node:V1", "registry.example.com ci/node :V1"],
        ["127.0.0.1:5000/a", "127.0.0.1:5000 a :latest"],
        ["xn--80ak6aa92e.com/node", "xn--80ak6aa92e.com node :latest"],
        ["registry.example.com.evil.io/ci/node", "registry.example.com.evil.io ci/node :latest"],
        ["evil.io/registry.example.com/x", "evil.io registry.example.com/x :latest"],
        [`node${DIGEST}`, `docker.io library/node ${DIGEST}`],
        [`node:22${DIGEST}`, `docker.io library/node ${DIGEST}`],
        [`registry.example.com:443/a/b:c${DIGEST}`, `registry.example.com:443 a/b ${DIGEST}`],
        ["node:_", "docker.io library/node :_"],
        ["node:__.--", "docker.io library/node :__.--"],
        [`node:${"t".repeat(128)}`, `docker.io library/node :${"t".repeat(128)}`],
        ["a__b-.c".replace("-.", "---"), "docker.io library/a__b---c :latest"],
        [`a/${"b".repeat(243)}`, `docker.io a/${"b".repeat(243)} :latest`],
        ["a".repeat(63), `docker.io library/${"a".repeat(63)} :latest`],
        // Not references.
        ["", undefined],
        [" ", undefined],
        [" node", undefined],
        ["node ", undefined],
        ["node\n", undefined],
        ["no de", undefined],
        ["node\u0000", undefined],
        ["Node", undefined],
        ["Group/node", undefined],
        ["node:", undefined],
        ["node:-1", undefined],
        ["node:.1", undefined],
        ["node:a:b", undefined],
        ["node:$TAG", undefined],
        [`node:${"t".repeat(129)}`, undefined],
        ["node@", undefined],
        ["node@latest", undefined],
        ["node@sha256:abc", undefined],
        [`node${DIGEST.toUpperCase()}`, undefined],
        [`node${DIGEST}0`, undefined],
        [`node${DIGEST}${DIGEST}`, undefined],
        [`node:${DIGEST}`, undefined],
        [`node:-${DIGEST}`, undefined],
        [`node@sha512:${"0".repeat(128)}`, undefined],
        ["a".repeat(64), undefined],
        [`${"a".repeat(64)}:1`, undefined],
        [`a/${"b".repeat(244)}`, undefined],
        [`${"a/".repeat(300)}b`, undefined],
        ["/node", undefined],
        ["node/", undefined],
        ["a//b", undefined],
        ["a/../b", undefined],
        ["a/./b", undefined],
        ["a..b", undefined],
        ["a___b", undefined],
        ["-a", undefined],
        ["a-", undefined],
        ["https://registry.example.com/node", undefined],
        ["docker://node", undefined],
        ["registry.example.com:/node", undefined],
        ["registry.example.com:port/node", undefined],
        ["registry.example.com:123456/node", undefined],
        ["registry.example.com./node", undefined],
        [".example.com/node", undefined],
        ["registry..example.com/node", undefined],
        ["registry_1.example.com/node", undefined],
        ["user@registry.example.com/node", undefined],
        ["user:password@registry.example.com/node", undefined],
        ["registry.example.com@evil.io/x", undefined],
        ["registry.example.com#evil.io/x", undefined],
        ["registry.example.com\\evil.io/x", undefined],
        ["registry.example.com%2fevil.io/x", undefined],
        ["registry.ex\u0430mple.com/node", undefined], // a Cyrillic letter
        ["n\u043ede", undefined],
        ["registry\u3002example.com/node", undefined], // an ideographic full stop
        ["registry.example.com\u2215evil.io/x", undefined], // a slash for division
        ["[::1]:5000/node", undefined],
        ["**", undefined],
        ["node:*", undefined],
        ["{project_id}/node", undefined],
      ];
      for (const [text, parsed] of cases) expect([text, nameOf(parseImage(text))]).toEqual([text, parsed]);
    });

    test("parseImagePattern refuses a pattern that is none", () => {
      const cases: [pattern: string, hasHost: boolean | undefined][] = [
        ["node", false],
        ["**", false],
        ["*", false],
        ["node:*", false],
        ["node:3.*", false],
        ["node@sha256:*", false],
        [`node${DIGEST}`, false],
        ["*/*:*", false],
        ["docker.io/**", true],
        ["registry.example.com/**", true],
        ["registry.example.com:5000/ci/*/**:*-slim", true],
        ["registry.example.com/{project_id}/*:*", true],
        ["localhost/**", true],
        // None in the registry.
        ["*.example.com/node", undefined],
        ["registry.*/node", undefined],
        ["registry.example.com:*/node", undefined],
        ["**.example.com/node", undefined],
        // An author controls the project's number less than its text would suggest, but the host is fixed.
        ["{project_id}.example.com/node", true],
        ["{project}/node", undefined],
        ["{PROJECT_ID}/node", undefined],
        ["", undefined],
        ["node 22", undefined],
        ["Node", undefined],
        ["***", undefined],
        ["a/***/b", undefined],
        ["a*b*c*d*e", undefined],
        ["node:a*b*c*d*", undefined],
        ["/node", undefined],
        ["node/", undefined],
        ["registry.example.com/", undefined],
        ["registry.example.com//node", undefined],
        ["node:", undefined],
        ["node:a:b", undefined],
        ["node:*@sha256:*", undefined],
        ["node@", undefined],
        ["user@registry.example.com/node", undefined],
        ["https://registry.example.com/**", undefined],
        ["node.*(a+)+$", undefined],
        ["[a-z]/node", undefined],
        ["node|alpine", undefined],
        ["^node$", undefined],
        ["a".repeat(256), undefined],
      ];
      for (const [pattern, hasHost] of cases)
        expect([pattern, parseImagePattern(pattern)?.hasHost]).toEqual([pattern, hasHost]);
    });

    test("matchesImage gives its verdict by the parsed reference", () => {
      const cases: [pattern: string, image: string, matches: boolean][] = [
        ["node", "node", true],
        ["node", "node:latest", true],
        ["node", "index.docker.io/library/node:latest", true],
        ["docker.io/library/node", "node", true],
        ["index.docker.io/node", "node", true],
        ["node", "node:22", false],
        ["node", `node${DIGEST}`, false],
        ["node", "registry.example.com/node", false],
        ["node", "registry.example.com/library/node", false],
        ["node:*", "node", true],
        ["node:*", "node:22-slim", true],
        ["node:*", `node${DIGEST}`, false],
        ["node:*", `node:22${DIGEST}`, false],
        ["node:*", "node-evil:22", false],
        ["node:*", "group/node:22", false],
        ["node:3.*", "node:3.11", true],
        ["node:3.*", "node:3x11", false],
        ["node:3.*", "node:13.1", false],
        ["node@sha256:*", `node${DIGEST}`, true],
        ["node@sha256:*", `node:22${DIGEST}`, true],
        ["node@sha256:*", "node:22", false],
        [`node${DIGEST}`, `node${DIGEST}`, true],
        [`node${DIGEST}`, `node@sha256:${"f".repeat(64)}`, false],
        ["*", "node", true],
        ["*", "group/node", false],
        ["*:*", "node:22", true],
        ["**", "node:22", true],
        ["**", `group/a/b${DIGEST}`, true],
        ["**", "registry.example.com/node", false],
        ["**", "localhost/node", false],
        ["**:22", "group/node:22", true],
        ["**:22", "group/node:23", false],
        ["registry.example.com/**", "registry.example.com/a", true],
        ["registry.example.com/**", "registry.example.com/a/b/c:d", true],
        ["registry.example.com/**", `REGISTRY.example.com/a${DIGEST}`, true],
        ["Registry.Example.com/**", "registry.example.com/a", true],
        ["registry.example.com/**", "registry.example.com:5000/a", false],
        ["registry.example.com/**", "registry.example.com:443/a", false],
        ["registry.example.com:5000/**", "registry.example.com:5000/a", true],
        ["registry.example.com:5000/**", "registry.example.com:50000/a", false],
        ["registry.example.com:5000/**", "registry.example.com/a", false],
        ["registry.example.com/**", "registry.example.com.evil.io/a", false],
        ["registry.example.com/**", "evil.io/registry.example.com/a", false],
        ["registry.example.com/**", "registryxexample.com/a", false],
        ["registry.example.com/**", "evil-registry.example.com/a", false],
        ["registry.example.com/**", "xn--registry-example.com/a", false],
        ["registry.example.com/ci/*:*", "registry.example.com/ci/node:1", true],
        ["registry.example.com/ci/*:*", "registry.example.com/ci/sub/node:1", false],
        ["registry.example.com/ci/*:*", "registry.example.com/cix/node:1", false],
        ["registry.example.com/ci/**", "registry.example.com/ci/sub/node:1", true],
        ["registry.example.com/ci/**", "registry.example.com/ci", false],
        ["registry.example.com/ci/**", "registry.example.com/cix/node", false],
        ["registry.example.com/ci**", "registry.example.com/cix/node", true],
        ["registry.example.com/**/node:*", "registry.example.com/a/b/node:1", true],
        ["registry.example.com/**/node:*", "registry.example.com/node:1", false],
        ["registry.example.com/a/*-ci/x:*", "registry.example.com/a/team-ci/x:1", true],
        ["registry.example.com/a/*-ci/x:*", "registry.example.com/a/b/team-ci/x:1", false],
        ["registry.example.com/{project_id}/*:*", "registry.example.com/42/node:1", true],
        ["registry.example.com/{project_id}/*:*", "registry.example.com/4/node:1", false],
        ["registry.example.com/{project_id}/*:*", "registry.example.com/420/node:1", false],
        ["registry.example.com/p-{project_id}:*", "registry.example.com/p-42:1", true],
        ["registry.example.com/ci/node:{project_id}", "registry.example.com/ci/node:42", true],
        ["registry.example.com/ci/node:{project_id}", "registry.example.com/ci/node:1", false],
        ["node.js", "nodexjs", false],
        ["not a pattern", "node", false],
      ];
      for (const [pattern, text, matches] of cases) {
        const image = parseImage(text);
        if (!image) throw new Error(`${text} is no reference`);
        expect([pattern, text, matchesImage(pattern, image, 42)]).toEqual([pattern, text, matches]);
      }
    });
  });

  describe("plan", () => {
    test("planImages returns nothing without a list or without a keyword", () => {
      const keywords = { image: { name: "node:22" }, services: [{ name: "postgres:16" }] };
      expect(planOf(keywords, {})).toBeUndefined();
      const others = { PullCredentials: [{ Image: "docker.io/**", SecretArn: "arn" }], SecretsInServices: true };
      expect(planOf(keywords, others)).toBeUndefined();
      for (const none of [{}, { image: { name: "" }, services: [] }, { image: null, services: null }])
        expect(planOf(none)).toBeUndefined();
      // Without a response there are no keywords, whatever the job's variables are.
      const env = {
        CUSTOM_ENV_CI_JOB_IMAGE: "node:22",
        CUSTOM_ENV_CI_JOB_ID: "1",
        CUSTOM_ENV_CI_PROJECT_URL: "https://x",
      };
      const job = readJob({ ...env, CUSTOM_ENV_CI_PIPELINE_ID: "1" }) as Job;
      expect(planImages({ config: configWith(all), job, jobOverrides: [], env })).toBeUndefined();
    });

    test("planImages reads the response and never the job's variables", () => {
      const context = imageContext({ image: { name: "node:22" } });
      const env = {
        ...context.env,
        CUSTOM_ENV_CI_JOB_IMAGE: "evil.io/x",
        CUSTOM_ENV_CI_JOB_SERVICES: '[{"name":"y"}]',
      };
      const plan = planImages({ ...context, env });
      expect(nameOf(plan?.build?.image)).toBe("docker.io library/node :22");
      expect(plan?.services).toEqual([]);
    });

    test("planImages uses each keyword by itself", () => {
      const keywords = { image: { name: "node:22" }, services: [{ name: "postgres:16" }, { name: "redis" }] };
      const onlyImage = planOf(keywords, { AllowedImages: ["**"] });
      expect(nameOf(onlyImage.build?.image)).toBe("docker.io library/node :22");
      expect(onlyImage.services).toEqual([]);
      expect(onlyImage.unused).toEqual([["services: postgres:16, redis", "AllowedServices is empty"]]);
      const onlyServices = planOf(keywords, { AllowedServices: ["**"] });
      expect(onlyServices.build).toBeUndefined();
      expect(onlyServices.services.map(({ name }) => name)).toEqual(["service-1-postgres", "service-2-redis"]);
      expect(onlyServices.unused).toEqual([
        ["image: node:22", "no row of TaskDefinitions matches, and AllowedImages is empty"],
      ]);
      const { build, services, unused, taskDefinition } = planOf(keywords);
      expect([build?.name, ...services.map(({ name }) => name)]).toEqual([
        "build",
        "service-1-postgres",
        "service-2-redis",
      ]);
      expect({ unused, taskDefinition }).toEqual({ unused: [], taskDefinition: undefined });
    });

    test("planImages selects the first row of TaskDefinitions that matches", () => {
      const TaskDefinitions = [
        { Image: "node:22", TaskDefinition: "ci-node-22" },
        { Image: "node:*", TaskDefinition: "ci-node" },
        { Image: "registry.example.com/{project_id}/**", TaskDefinition: "ci-own" },
      ];
      const selected = (name: string, more: Partial<JobImage> = {}) => {
        const { taskDefinition, build, unused } = planOf({ image: { name } }, { TaskDefinitions, ...more });
        return [taskDefinition, build?.name, ...unused];
      };
      expect(selected("node:22")).toEqual(["ci-node-22", undefined]);
      expect(selected("docker.io/library/node:20")).toEqual(["ci-node", undefined]);
      expect(selected("registry.example.com/42/a/b")).toEqual(["ci-own", undefined]);
      // A row needs no AllowedImages. Without a row, they decide.
      expect(selected("node:22", { AllowedImages: ["alpine"] })).toEqual(["ci-node-22", undefined]);
      expect(selected("alpine", { AllowedImages: ["alpine"] })).toEqual([undefined, "build"]);
      for (const name of ["alpine", "registry.example.com/7/a/b", "registry.example.com.evil.io/42/a", "no image"])
        expect(selected(name)).toEqual([
          ...[undefined, undefined],
          [`image: ${name}`, "no row of TaskDefinitions matches, and AllowedImages is empty"],
        ]);
      // The services of such a job are derived from the row's definition.
      const keywords = { image: { name: "node:22" }, services: [{ name: "redis" }] };
      const plan = planOf(keywords, { TaskDefinitions, AllowedServices: ["redis"] });
      expect([plan.taskDefinition, plan.build, plan.services.length]).toEqual(["ci-node-22", undefined, 1]);
    });

    test("planImages lets FARGATE_TASK_DEFINITION take precedence over the keywords", () => {
      const keywords = { image: { name: "evil.io/x" }, services: [{ name: "redis" }] };
      const TaskDefinitions = [{ Image: "evil.io/x", TaskDefinition: "ci-x" }];
      expect(planOf(keywords, { ...all, TaskDefinitions }, ["TaskDefinition"])).toEqual({
        services: [],
        variables: [],
        unused: [["image: and services: (evil.io/x, redis)", "the job sets FARGATE_TASK_DEFINITION"]],
      });
      expect(planOf({ image: { name: "node" } }, all, ["PlatformVersion"]).build?.name).toBe("build");
    });

    test("planImages refuses what no pattern allows and names the patterns", () => {
      const settings = { AllowedImages: ["node:*", "registry.example.com/**"], AllowedServices: ["postgres:*"] };
      const image = failureOf({ image: { name: "evil.io/x" } }, settings);
      expect([image.kind, image.message]).toEqual([
        "build",
        "image: evil.io/x (evil.io/x:latest) is not allowed: AllowedImages is node:*, registry.example.com/**",
      ]);
      const service = failureOf({ services: [{ name: "postgres:16" }, { name: "redis" }] }, settings);
      expect([service.kind, service.message]).toEqual([
        "build",
        "services: redis (docker.io/library/redis:latest) is not allowed: AllowedServices is postgres:*",
      ]);
      // The patterns for the one are none for the other.
      expect(failureOf({ services: [{ name: "node:22" }] }, settings).kind).toBe("build");
      expect(failureOf({ image: { name: "postgres:16" } }, settings).kind).toBe("build");
      const broken = failureOf({ image: { name: "user:password@registry.example.com/x" } }, settings);
      expect([broken.kind, broken.message]).toEqual([
        "build",
        "image: user:password@registry.example.com/x is not an image reference, such as registry.example.com/group/image:tag",
      ]);
      const long = failureOf({ image: { name: `${"a/".repeat(5_000)}b` } }, settings);
      expect(long.message.length).toBeLessThan(500);
    });

    test("planImages gives an image the first PullCredentials that match", () => {
      const PullCredentials = [
        { Image: "registry.example.com/{project_id}/**", SecretArn: "arn:own" },
        { Image: "registry.example.com/**", SecretArn: "arn:all" },
        { Image: "docker.io/library/redis:*", SecretArn: "arn:hub" },
      ];
      const settings = { AllowedImages: ["registry.example.com/**", "**"], AllowedServices: ["**", "evil.io/**"] };
      const secretOf = (name: string) => planOf({ image: { name } }, { ...settings, PullCredentials }).build?.secretArn;
      expect(secretOf("registry.example.com/42/a:1")).toBe("arn:own");
      expect(secretOf("registry.example.com/43/a:1")).toBe("arn:all");
      expect(secretOf("redis")).toBe("arn:hub");
      expect(secretOf("node")).toBeUndefined();
      const services = [{ name: "redis:7" }, { name: "evil.io/registry.example.com/a" }];
      const plan = planOf({ services }, { ...settings, PullCredentials });
      expect(plan.services.map(({ secretArn }) => secretArn)).toEqual(["arn:hub", undefined]);
    });

    test("planImages takes the user from executor_opts", () => {
      const cases: [options: unknown, user: string | undefined][] = [
        [{ docker: { user: "worker" } }, "worker"],
        [{ docker: { user: "1000:1000" } }, "1000:1000"],
        [{ docker: { user: 0 } }, "0"],
        [{ kubernetes: { user: "1000" } }, "1000"],
        [{ kubernetes: { user: 1000 } }, "1000"],
        [{ docker: { user: "a" }, kubernetes: { user: "b" } }, "a"],
        [{ docker: { platform: "linux/amd64" }, kubernetes: { user: "b" } }, "b"],
        [{ docker: { user: "" } }, undefined],
        [{ docker: { user: null }, kubernetes: { user: null } }, undefined],
        [{ docker: "x", kubernetes: [] }, undefined],
        [{ docker: { user: {} }, kubernetes: { user: true } }, undefined],
        [null, undefined],
        ["x", undefined],
        [{}, undefined],
        [undefined, undefined],
      ];
      for (const [executor_opts, user] of cases) {
        expect([executor_opts, planOf({ image: { name: "node", executor_opts } }).build?.user]).toEqual([
          executor_opts,
          user,
        ]);
        expect(planOf({ services: [{ name: "redis", executor_opts }] }).services[0]?.user).toBe(user);
      }
    });

    test("planImages refuses a user that is none", () => {
      const users = ["a b", "root; id", "$(id)", "a:b:c", ":", "a:", ":b", "\n", "a\u0000", "x".repeat(65)];
      for (const user of users) {
        const { kind, message } = failureOf({ image: { name: "node", executor_opts: { docker: { user } } } });
        expect(kind).toBe("build");
        expect(message).toContain("has an invalid user");
      }
    });

    test("planImages reports a pull_policy other than always", () => {
      const services = [{ name: "redis", pull_policy: ["if-not-present", "always"] }, { name: "postgres" }];
      expect(planOf({ image: { name: "node", pull_policy: ["never"] }, services }).unused).toEqual([
        ["pull_policy of node", "ECS pulls the images of each task"],
        ["pull_policy of redis", "ECS pulls the images of each task"],
      ]);
      for (const pull_policy of [["always"], [], null, undefined, "never", [3]])
        expect(planOf({ image: { name: "node", pull_policy } }).unused).toEqual([]);
    });

    test.each<[key: string, odd: unknown[]]>([
      ["alias", [3, null, [], {}]],
      ["entrypoint", [3, null, "sh", [3], { 0: "sh" }]],
      ["command", [3, null, "sh", [null], {}]],
      ["variables", [3, null, "x", [3], [{ key: 3, value: "x" }], [{ key: "x" }], {}]],
      ["ports", [3, null, "x", [3], [{ number: "80" }], [{}], {}]],
      ["pull_policy", [3, null, "x", [3], {}]],
      ["executor_opts", [3, null, "x", [], { docker: 3 }, { docker: { user: [], platform: {} } }]],
    ])("planImages takes a malformed %s for a missing one", (key, odd) => {
      const plain = deriveFrom(planOf({ image: { name: "node" }, services: [{ name: "redis" }] }));
      for (const value of odd) {
        const keywords = { image: { name: "node", [key]: value }, services: [{ name: "redis", [key]: value }] };
        const plan = planOf(keywords);
        expect(deriveFrom(plan)).toEqual(plain);
        expect(plan.services.map(({ keyword }) => [portsOf(keyword), hostNames(keyword)])).toEqual([[[], ["redis"]]]);
      }
    });

    test("imageDirectories returns the directories for a job with an image of its own", () => {
      const directories = (keywords: object, settings: Partial<JobImage>) =>
        configAnswer(undefined, "", imageDirectories(imageContext(keywords, settings)));
      const image = { image: { name: "node" } };
      const plain = configAnswer(undefined, "");
      expect(JSON.parse(directories(image, all))).toEqual({
        ...JSON.parse(plain),
        builds_dir: "/builds",
        cache_dir: "/cache",
      });
      expect(JSON.parse(directories(image, { ...all, BuildsDirectory: "/b", CacheDirectory: "/c" }))).toMatchObject({
        builds_dir: "/b",
        cache_dir: "/c",
      });
      const TaskDefinitions = [{ Image: "node", TaskDefinition: "ci-node" }];
      expect(directories(image, {})).toBe(plain);
      expect(directories(image, { AllowedServices: ["**"] })).toBe(plain);
      expect(directories(image, { ...all, TaskDefinitions })).toBe(plain);
      expect(directories({ services: [{ name: "redis" }] }, all)).toBe(plain);
      expect(directories({}, all)).toBe(plain);
    });
  });

  const BASE_ARN = "arn:aws:ecs:us-east-2:123456789012:task-definition/ci:7";
  const logConfiguration = {
    logDriver: "awslogs",
    options: { "awslogs-group": "/ci", "awslogs-region": "us-east-2", "awslogs-stream-prefix": "job" },
  } as const;
  /** A definition as DescribeTaskDefinition returns it. */
  const base: TaskDefinition = {
    taskDefinitionArn: BASE_ARN,
    family: "ci",
    revision: 7,
    status: "ACTIVE",
    containerDefinitions: [
      {
        name: CONTAINER,
        image: "registry.example.com/ci/worker:1",
        cpu: 0,
        portMappings: [{ containerPort: 22, hostPort: 22, protocol: "tcp" }],
        essential: true,
        environment: [],
        mountPoints: [],
        volumesFrom: [],
        logConfiguration,
        repositoryCredentials: { credentialsParameter: "arn:worker" },
      },
    ],
    taskRoleArn: "arn:aws:iam::123456789012:role/task",
    executionRoleArn: "arn:aws:iam::123456789012:role/execution",
    networkMode: "awsvpc",
    volumes: [],
    requiresCompatibilities: ["FARGATE"],
    compatibilities: ["EC2", "FARGATE"],
    cpu: "1024",
    memory: "2048",
    registeredAt: new Date(0),
    registeredBy: "arn:aws:iam::123456789012:user/operator",
  };
  /** `base` with other properties of the coordinator. */
  const baseWith = (coordinator: Partial<ContainerDefinition>, more: Partial<TaskDefinition> = {}): TaskDefinition => ({
    ...base,
    ...more,
    containerDefinitions: [{ ...base.containerDefinitions?.[0], ...coordinator }, ...(more.containerDefinitions ?? [])],
  });
  const deriveFrom = (plan: Plan, from = base, config = configWith(all)) => deriveDefinition(from, plan, config);
  const containersOf = ({ containerDefinitions = [] }: RegisterTaskDefinitionCommandInput) =>
    Object.fromEntries(containerDefinitions.map((container) => [container.name, container]));
  const pathsOf = (container?: ContainerDefinition) =>
    container?.mountPoints?.map(({ containerPath }) => containerPath);

  describe("derived definition", () => {
    test("deriveDefinition adds the containers and volumes of a job", () => {
      const plan = planOf(
        {
          image: { name: "node:22", executor_opts: { docker: { user: "node" } } },
          services: [{ name: "registry.example.com/db:1", command: ["serve"] }],
        },
        {
          AllowedImages: ["**"],
          AllowedServices: ["registry.example.com/**"],
          PullCredentials: [{ Image: "registry.example.com/**", SecretArn: "arn:pull" }],
        },
      );
      const mounts = [
        { sourceVolume: "fargate-link", containerPath: "/.fargate", readOnly: false },
        { sourceVolume: "fargate-builds", containerPath: "/builds", readOnly: false },
        { sourceVolume: "fargate-cache", containerPath: "/cache", readOnly: false },
      ];
      const { family, ...input } = deriveFrom(plan);
      expect(family).toMatch(/^ci-job-[0-9a-f]{32}$/);
      expect(JSON.parse(JSON.stringify(input))).toEqual({
        taskRoleArn: "arn:aws:iam::123456789012:role/task",
        executionRoleArn: "arn:aws:iam::123456789012:role/execution",
        networkMode: "awsvpc",
        requiresCompatibilities: ["FARGATE"],
        cpu: "1024",
        memory: "2048",
        volumes: [{ name: "fargate-link" }, { name: "fargate-builds" }, { name: "fargate-cache" }],
        containerDefinitions: [
          {
            ...base.containerDefinitions?.[0],
            mountPoints: mounts,
            dependsOn: [{ containerName: "permissions", condition: "SUCCESS" }],
            healthCheck: sshHealthCheck(22),
          },
          {
            name: "permissions",
            image: "registry.example.com/ci/worker:1",
            repositoryCredentials: { credentialsParameter: "arn:worker" },
            essential: false,
            user: "0",
            entryPoint: ["/bin/sh", "-c"],
            command: ["umask 0; chmod 777 /.fargate /builds /cache && mkfifo /.fargate/calls"],
            mountPoints: mounts,
            logConfiguration,
          },
          {
            name: "build",
            image: "docker.io/library/node:22",
            essential: false,
            user: "node",
            entryPoint: ["sh", "-c"],
            command: [AGENT],
            mountPoints: mounts,
            stopTimeout: 2,
            dependsOn: [{ containerName: "permissions", condition: "SUCCESS" }],
            logConfiguration,
          },
          {
            name: "service-1-db",
            image: "registry.example.com/db:1",
            repositoryCredentials: { credentialsParameter: "arn:pull" },
            essential: false,
            command: ["serve"],
            dependsOn: [{ containerName: CONTAINER, condition: "HEALTHY" }],
            logConfiguration,
          },
        ],
      });
    });

    test("deriveDefinition adds neither volumes nor an agent for services alone", () => {
      const input = deriveFrom(planOf({ services: [{ name: "redis" }, { name: "redis" }] }));
      expect(Object.keys(containersOf(input))).toEqual([CONTAINER, "service-1-redis", "service-2-redis"]);
      expect(input.volumes).toEqual([]);
      expect(containersOf(input)[CONTAINER]?.mountPoints).toEqual([]);
      expect(containersOf(input)[CONTAINER]?.dependsOn).toBeUndefined();
      // An image alone needs no health check.
      expect(containersOf(deriveFrom(planOf({ image: { name: "node" } })))[CONTAINER]?.healthCheck).toBeUndefined();
    });

    test("deriveDefinition carries the normalised reference and never the author's text", () => {
      const names = ["INDEX.docker.io/node", `Registry.Example.COM/a/b:c${DIGEST}`, "node:latest"];
      const images = names.map((name) => {
        const settings = { AllowedImages: ["**", "registry.example.com/**"] };
        const input = deriveFrom(planOf({ image: { name } }, settings));
        expect(JSON.stringify(input)).not.toMatch(/INDEX|Registry\.Example/);
        return containersOf(input).build?.image;
      });
      expect(images).toEqual([
        "docker.io/library/node:latest",
        `registry.example.com/a/b${DIGEST}`,
        "docker.io/library/node:latest",
      ]);
    });

    test.each<[what: string, entrypoint: unknown, own: string[] | undefined]>([
      ["none", null, undefined],
      ["an empty list", [], undefined],
      ["an empty text", [""], undefined],
      ["one word", ["/entry.sh"], ["/entry.sh"]],
      ["several words", ["tini", "--", ""], ["tini", "--", ""]],
    ])("deriveDefinition runs the agent with image:entrypoint %s", (_, entrypoint, own) => {
      const { build } = containersOf(deriveFrom(planOf({ image: { name: "node", entrypoint, command: ["x"] } })));
      expect([build?.entryPoint, build?.command]).toEqual(own ? [own, ["sh", "-c", AGENT]] : [["sh", "-c"], [AGENT]]);
    });

    test.each<[what: string, keyword: object, start: [entryPoint: unknown, command: unknown]]>([
      ["no keyword", {}, [undefined, undefined]],
      ["a command", { command: ["a", "b"] }, [undefined, ["a", "b"]]],
      ["an entry point", { entrypoint: ["a"] }, [["a"], undefined]],
      ["both", { entrypoint: ["a"], command: ["b", ""] }, [["a"], ["b", ""]]],
      ["an empty entry point and a command", { entrypoint: [""], command: ["a", "b"] }, [["a", "b"], undefined]],
      ["an empty list and a command", { entrypoint: [], command: ["a"] }, [["a"], undefined]],
      ["an empty entry point alone", { entrypoint: [""] }, [undefined, undefined]],
      ["an empty command", { command: [""] }, [undefined, undefined]],
    ])("deriveDefinition starts a service with %s", (_, keyword, start) => {
      const service = containersOf(deriveFrom(planOf({ services: [{ name: "redis", ...keyword }] })))[
        "service-1-redis"
      ];
      expect([service?.entryPoint, service?.command]).toEqual(start);
    });

    test("deriveDefinition keeps the coordinator's mounts, health check and dependencies", () => {
      const healthCheck = { command: ["CMD", "true"] };
      const efs = { sourceVolume: "efs", containerPath: "/cache", readOnly: false };
      const other = { sourceVolume: "other", containerPath: "/data" };
      const dependsOn = [{ containerName: "proxy", condition: "START" as const }];
      const volumes = [{ name: "efs", efsVolumeConfiguration: { fileSystemId: "fs-1" } }, { name: "other" }];
      const proxy = { name: "proxy", image: "proxy" };
      const from = baseWith(
        { healthCheck, mountPoints: [efs, other], dependsOn },
        { volumes, containerDefinitions: [proxy] },
      );
      const input = deriveFrom(planOf({ image: { name: "node" }, services: [{ name: "redis" }] }), from);
      const { [CONTAINER]: coordinator, permissions, build, proxy: kept } = containersOf(input);
      const paths = (container?: ContainerDefinition) =>
        container?.mountPoints?.map(({ sourceVolume, containerPath }) => `${sourceVolume} ${containerPath}`);
      const added = ["fargate-link /.fargate", "fargate-builds /builds"];
      expect(paths(coordinator)).toEqual(["efs /cache", "other /data", ...added]);
      expect(paths(build)).toEqual([...added, "efs /cache"]);
      expect(paths(permissions)).toEqual(added);
      expect(permissions?.command).toEqual(["umask 0; chmod 777 /.fargate /builds && mkfifo /.fargate/calls"]);
      expect(coordinator?.healthCheck).toEqual(healthCheck);
      expect(coordinator?.dependsOn).toEqual([...dependsOn, { containerName: "permissions", condition: "SUCCESS" }]);
      expect(kept).toEqual(proxy);
      expect(input.volumes).toEqual([...volumes, { name: "fargate-link" }, { name: "fargate-builds" }]);
    });

    test("deriveDefinition gives every added container a size if the task has none", () => {
      const from = baseWith({ memory: 512, memoryReservation: 256 }, { cpu: undefined, memory: undefined });
      const plan = planOf({ image: { name: "node" }, services: [{ name: "redis" }] });
      for (const { name, memory, memoryReservation } of deriveFrom(plan, from).containerDefinitions ?? [])
        expect([name, memory, memoryReservation]).toEqual([name, 512, 256]);
      const sized = containersOf(deriveFrom(plan, baseWith({ memory: 512 })));
      for (const name of ["permissions", "build", "service-1-redis"]) expect(sized[name]?.memory).toBeUndefined();
    });

    test("deriveDefinition uses the settings for directories, port and tags", () => {
      const config = configWith({ ...all, BuildsDirectory: "/b", CacheDirectory: "/c/d" }, (c) => {
        c.SSH.Port = 2222;
        c.Fargate.Tags = { team: "ci" };
      });
      const plan = planOf({ image: { name: "node" }, services: [{ name: "redis" }] });
      const input = deriveFrom(plan, base, config);
      const { build, [CONTAINER]: coordinator } = containersOf(input);
      expect(pathsOf(build)).toEqual(["/.fargate", "/b", "/c/d"]);
      expect(coordinator?.healthCheck).toEqual(sshHealthCheck(2222));
      expect(input.tags).toEqual([{ key: "team", value: "ci" }]);
      expect(deriveFrom(plan)).not.toHaveProperty("tags");
    });

    test("deriveDefinition gives each difference a family of its own", () => {
      const keywords = { image: { name: "node:22" }, services: [{ name: "redis" }] };
      const plan = planOf(keywords);
      const own = deriveFrom(plan);
      const image = (more: object) => deriveFrom(planOf({ ...keywords, image: { name: "node:22", ...more } }));
      const service = (more: object) => deriveFrom(planOf({ ...keywords, services: [{ name: "redis", ...more }] }));
      const PullCredentials = [{ Image: "docker.io/**", SecretArn: "arn:pull" }];
      const changed = (settings: Partial<JobImage>, change?: (config: Config) => void) =>
        deriveFrom(plan, base, configWith({ ...all, ...settings }, change));
      const inRegion = (region: string, account: string) =>
        deriveFrom(plan, { ...base, taskDefinitionArn: `arn:aws:ecs:${region}:${account}:task-definition/ci:7` });
      const options = { ...logConfiguration.options, "awslogs-group": "/other" };
      const inputs = [
        own,
        image({ name: "node:23" }),
        image({ entrypoint: ["x"] }),
        image({ executor_opts: { docker: { user: "1" } } }),
        service({ name: "redis:7" }),
        service({ entrypoint: ["x"] }),
        service({ command: ["x"] }),
        service({ executor_opts: { docker: { user: "1" } } }),
        deriveFrom(planOf(keywords, { ...all, PullCredentials })),
        changed({ BuildsDirectory: "/b" }),
        changed({ CacheDirectory: "/c" }),
        changed({}, (c) => (c.SSH.Port = 2222)),
        changed({}, (c) => (c.Fargate.Tags = { a: "b" })),
        inRegion("us-west-2", "123456789012"),
        inRegion("us-east-2", "210987654321"),
        deriveFrom(plan, baseWith({ image: "registry.example.com/ci/worker:2" })),
        deriveFrom(plan, baseWith({ logConfiguration: { ...logConfiguration, options } })),
        deriveFrom(plan, baseWith({ secrets: [{ name: "a", valueFrom: "arn" }] })),
        deriveFrom(plan, { ...base, taskRoleArn: "arn:aws:iam::123456789012:role/other" }),
        deriveFrom(plan, { ...base, memory: "4096" }),
        deriveFrom(plan, { ...base, ephemeralStorage: { sizeInGiB: 50 } }),
        deriveFrom(plan, { ...base, runtimePlatform: { cpuArchitecture: "ARM64" } }),
      ];
      expect(new Set(inputs.map(({ family }) => family)).size).toBe(inputs.length);
      // The same again, with what does not matter to the containers.
      const later = { ...base, revision: 8, registeredAt: new Date(), taskDefinitionArn: BASE_ARN.replace(":7", ":8") };
      expect(deriveFrom(planOf(keywords), later)).toEqual(own);
      expect(service({ variables: [variable("A", "b")], alias: "db" })).toEqual(own);
      // The hash is that of the whole input, which contains the agent.
      const { family, ...input } = own;
      const text = canonical(input);
      expect(text).toContain(JSON.stringify(AGENT));
      const place = BASE_ARN.replace(/\/.*/, "");
      const hash = createHash("sha256").update(`${place}${text}`).digest("hex");
      expect(family).toBe(`ci-job-${hash.slice(0, 32)}`);
    });

    test("deriveDefinition keeps its families within 255 characters", () => {
      const long = "f".repeat(255);
      const plan = planOf({ image: { name: "node" } });
      const { family = "" } = deriveFrom(plan, { ...base, taskDefinitionArn: BASE_ARN.replace("ci:7", `${long}:7`) });
      expect(family).toMatch(/^f{218}-job-[0-9a-f]{32}$/);
      expect(family).toHaveLength(255);
    });

    test("planImages gives containers names that ECS accepts", () => {
      const names = ["a.b__c-d", `x/${"y".repeat(230)}`, "registry.example.com:5000/group/db:1"];
      const settings = { AllowedServices: ["**", "registry.example.com:5000/**"] };
      const { services } = planOf({ services: names.map((name) => ({ name })) }, settings);
      for (const { name } of services) expect(name).toMatch(/^[\w-]{1,255}$/);
      expect(services.map(({ name }) => name.slice(0, 20))).toEqual([
        ...["service-1-a-b__c-d", `service-2-${"y".repeat(10)}`, "service-3-db"],
      ]);
    });
  });

  describe("definition of ECS", () => {
    const plan = () => planOf({ image: { name: "node" }, services: [{ name: "redis" }] });
    /** What DescribeTaskDefinition returns after an input has been registered: with defaults, in another order. */
    const answerTo = (input: RegisterTaskDefinitionCommandInput): TaskDefinition => {
      const reversed = (value: object) => Object.fromEntries(Object.entries(value).reverse());
      const complete = (container: ContainerDefinition): ContainerDefinition => ({
        ...{ cpu: 0, environment: [], mountPoints: [], volumesFrom: [], portMappings: [], systemControls: [] },
        ...reversed(JSON.parse(JSON.stringify(container))),
        ...(container.healthCheck && {
          healthCheck: { retries: 3, timeout: 5, interval: 30, ...container.healthCheck },
        }),
      });
      const { tags: _, ...registered } = input;
      return {
        ...reversed(registered),
        taskDefinitionArn: `arn:aws:ecs:us-east-2:123456789012:task-definition/${input.family}:3`,
        ...{ revision: 3, status: "ACTIVE", compatibilities: ["FARGATE"], requiresAttributes: [{ name: "x" }] },
        ...{ placementConstraints: [], registeredAt: new Date(), registeredBy: "arn" },
        volumes: input.volumes?.map((volume) => ({ host: {}, ...volume })),
        containerDefinitions: input.containerDefinitions?.map(complete).reverse(),
      };
    };

    test("isSameDefinition accepts ECS's defaults and another order", () => {
      const input = deriveFrom(plan());
      expect(isSameDefinition(answerTo(input), input)).toBe(true);
      const tagged = { ...input, tags: [{ key: "a", value: "b" }] };
      expect(isSameDefinition(answerTo(tagged), tagged)).toBe(true);
      const environment = [
        { name: "A", value: "1" },
        { name: "B", value: "2" },
      ];
      const withVariables = deriveFrom(plan(), baseWith({ environment }));
      const swapped = answerTo(deriveFrom(plan(), baseWith({ environment: [...environment].reverse() })));
      expect(isSameDefinition(swapped, withVariables)).toBe(true);
    });

    const changeContainer = (name: string, change: Partial<ContainerDefinition>) => (found: TaskDefinition) => ({
      ...found,
      containerDefinitions: found.containerDefinitions?.map((container) =>
        container.name === name ? { ...container, ...change } : container,
      ),
    });
    test.each<[what: string, change: (found: TaskDefinition) => TaskDefinition]>([
      ["another image", changeContainer("build", { image: "evil.io/x" })],
      ["another tag", changeContainer("build", { image: "docker.io/library/node:22" })],
      ["another command", changeContainer("build", { command: [`${AGENT} `] })],
      ["another order of words", changeContainer("permissions", { entryPoint: ["-c", "/bin/sh"] })],
      ["an entry point", changeContainer("service-1-redis", { entryPoint: ["x"] })],
      ["no entry point", changeContainer("build", { entryPoint: undefined })],
      ["a variable", changeContainer(CONTAINER, { environment: [{ name: "LD_PRELOAD", value: "x" }] })],
      ["a file of variables", changeContainer(CONTAINER, { environmentFiles: [{ value: "arn", type: "s3" }] })],
      ["a secret", changeContainer("build", { secrets: [{ name: "A", valueFrom: "arn" }] })],
      ["other credentials", changeContainer("build", { repositoryCredentials: { credentialsParameter: "arn" } })],
      ["a user", changeContainer("build", { user: "0" })],
      ["no user", changeContainer("permissions", { user: undefined })],
      ["an essential container", changeContainer("build", { essential: true })],
      ["a coordinator that is not essential", changeContainer(CONTAINER, { essential: false })],
      ["no dependency", changeContainer("service-1-redis", { dependsOn: [] })],
      ["no health check", changeContainer(CONTAINER, { healthCheck: undefined })],
      ["another health check", changeContainer(CONTAINER, { healthCheck: { command: ["CMD", "true"] } })],
      ["another log", changeContainer("build", { logConfiguration: { logDriver: "awslogs", options: {} } })],
      ["no mounts", changeContainer("build", { mountPoints: [] })],
      ["a working directory", changeContainer("build", { workingDirectory: "/x" })],
      ["a capability", changeContainer("build", { linuxParameters: { capabilities: { add: ["SYS_PTRACE"] } } })],
      ["an init process", changeContainer("build", { linuxParameters: { initProcessEnabled: true } })],
      ["a further port", changeContainer(CONTAINER, { portMappings: [{ containerPort: 22 }, { containerPort: 80 }] })],
      ["another stop timeout", changeContainer("build", { stopTimeout: 120 })],
      ["a setting that the driver does not know", changeContainer("build", { unknown: "x" } as object)],
      [
        "a read-only mount",
        (found) =>
          changeContainer("build", {
            mountPoints: found.containerDefinitions
              ?.find(({ name }) => name === "build")
              ?.mountPoints?.map((mount) => ({ ...mount, readOnly: true })),
          })(found),
      ],
      [
        "a volume of the host",
        (found) => ({ ...found, volumes: found.volumes?.map((v) => ({ ...v, host: { sourcePath: "/" } })) }),
      ],
      ["a further volume", (found) => ({ ...found, volumes: [...(found.volumes ?? []), { name: "x" }] })],
      [
        "a further container",
        (found) => ({ ...found, containerDefinitions: [...(found.containerDefinitions ?? []), { name: "x" }] }),
      ],
      ["a missing container", (found) => ({ ...found, containerDefinitions: found.containerDefinitions?.slice(1) })],
      ["another task role", (found) => ({ ...found, taskRoleArn: "arn:aws:iam::123456789012:role/admin" })],
      ["no task role", (found) => ({ ...found, taskRoleArn: undefined })],
      ["another execution role", (found) => ({ ...found, executionRoleArn: "arn:aws:iam::123456789012:role/admin" })],
      ["another network mode", (found) => ({ ...found, networkMode: "host" })],
      ["a PID mode", (found) => ({ ...found, pidMode: "task" })],
      ["a proxy", (found) => ({ ...found, proxyConfiguration: { containerName: "build" } })],
      ["another size", (found) => ({ ...found, memory: "4096" })],
      ["another platform", (found) => ({ ...found, runtimePlatform: { cpuArchitecture: "ARM64" } })],
      ["nothing", () => ({})],
    ])("isSameDefinition refuses an answer with %s", (_, change) => {
      const input = deriveFrom(plan());
      expect(isSameDefinition(change(answerTo(input)), input)).toBe(false);
    });

    test("canonical leaves out only what ECS adds", () => {
      const same = (a: object, b: object) => canonical(a) === canonical(b);
      expect(same({ b: 1, a: [{ name: "x" }, { name: "y" }] }, { a: [{ name: "y" }, { name: "x" }], b: 1 })).toBe(true);
      expect(same({ a: [], b: {}, c: null, d: undefined, cpu: 0, essential: true, readOnly: false }, {})).toBe(true);
      expect(same({ p: { containerPort: 22, hostPort: 22 } }, { p: { containerPort: 22, protocol: "tcp" } })).toBe(
        true,
      );
      expect(same({ p: { containerPort: 22, hostPort: 23 } }, { p: { containerPort: 22 } })).toBe(false);
      expect(same({ a: ["x", "y"] }, { a: ["y", "x"] })).toBe(false);
      expect(same({ a: "" }, {})).toBe(false);
      expect(same({ a: 0 }, {})).toBe(false);
      expect(same({ a: false }, {})).toBe(false);
      expect(same({ cpu: "0" }, {})).toBe(false);
      expect(same({ essential: "true" }, {})).toBe(false);
      expect(same({ command: [""] }, {})).toBe(false);
      expect(same({ command: ["a b"] }, { command: ["a", "b"] })).toBe(false);
    });
  });

  describe("checks of the definition", () => {
    const plan = (services = 1) =>
      planOf({ image: { name: "node" }, services: Array.from({ length: services }, () => ({ name: "redis" })) });
    const container = (name: string) => ({ name, image: "x" });
    const others = (count: number) => Array.from({ length: count }, (_, i) => container(`other-${i}`));
    const onlyServices = () => planOf({ services: [{ name: "redis" }] });

    test.each<[what: string, why: string | undefined, from: TaskDefinition, make?: () => Plan]>([
      ["accepts a definition of one container", undefined, base],
      ["accepts 10 containers", undefined, baseWith({}, { containerDefinitions: others(6) })],
      [
        "refuses more than 10 containers",
        "it has 12 containers with those of the job; ECS allows 10",
        baseWith({}, { containerDefinitions: others(8) }),
      ],
      ["accepts 7 services", undefined, base, () => plan(7)],
      [
        "refuses a container named build",
        "it has a container build, the name of one that is added",
        baseWith({}, { containerDefinitions: [container("build")] }),
      ],
      [
        "refuses a container named permissions",
        "it has a container permissions, the name of one that is added",
        baseWith({}, { containerDefinitions: [container("permissions")] }),
      ],
      [
        "refuses a container with the name of a service",
        "it has a container service-1-redis, the name of one that is added",
        baseWith({}, { containerDefinitions: [container("service-1-redis")] }),
      ],
      [
        "accepts a container named build with services alone",
        undefined,
        baseWith({}, { containerDefinitions: [container("build"), container("permissions")] }),
        onlyServices,
      ],
      ["refuses a definition without ci-coordinator", "it has no container ci-coordinator", baseWith({ name: "x" })],
      [
        "refuses a definition without containers",
        "it has no container ci-coordinator",
        { taskDefinitionArn: BASE_ARN },
      ],
      ["refuses pidMode", "it sets pidMode, but the job's container needs process 1", { ...base, pidMode: "task" }],
      ["accepts pidMode with services alone", undefined, { ...base, pidMode: "task" }, onlyServices],
    ])("refuseDefinition %s", (_, why, from, make = plan) => {
      expect(refuseDefinition(from, make())).toBe(why);
    });

    test("refuseDefinition blames a job with too many services", () => {
      const failure = thrown(() => refuseDefinition(base, plan(8)));
      expect(failure).toMatchObject({ kind: "build" });
      expect(failure.message).toBe("services: the task would have 11 containers with those of the job; ECS allows 10");
    });

    const platform = (text: string) => ({ executor_opts: { docker: { platform: text } } });
    const port = (number: number) => ({ ports: [{ number }] });
    const ARM: TaskDefinition = {
      ...base,
      runtimePlatform: { cpuArchitecture: "ARM64", operatingSystemFamily: "LINUX" },
    };
    test.each<[what: string, why: string | undefined, keywords: object, from?: TaskDefinition]>([
      ["accepts no platform", undefined, { image: { name: "node" } }],
      ["accepts an empty platform", undefined, { image: { name: "node", ...platform("") } }],
      ["accepts the definition's platform", undefined, { image: { name: "node", ...platform("linux/amd64") } }],
      [
        "refuses another platform",
        "node asks for platform linux/arm64; available: linux/amd64",
        { image: { name: "node", ...platform("linux/arm64") } },
      ],
      [
        "refuses another platform of a service",
        "redis asks for platform linux/arm64/v8; available: linux/amd64",
        { services: [{ name: "redis", ...platform("linux/arm64/v8") }] },
      ],
      ["accepts arm64", undefined, { image: { name: "node", ...platform("linux/arm64") } }, ARM],
      ["accepts arm64/v8", undefined, { image: { name: "node", ...platform("linux/arm64/v8") } }, ARM],
      [
        "refuses amd64 on arm64",
        "node asks for platform linux/amd64; available: linux/arm64",
        { image: { name: "node", ...platform("linux/amd64") } },
        ARM,
      ],
      [
        "refuses a platform of Windows",
        "node asks for platform windows/amd64; available: linux/amd64",
        {
          image: { name: "node", ...platform("windows/amd64") },
        },
      ],
      [
        "accepts services on different ports",
        undefined,
        {
          services: [
            { name: "a", ...port(1) },
            { name: "b", ...port(2) },
          ],
        },
      ],
      [
        "refuses two services on one port",
        "services: b and a cannot both listen on port 80: the containers of a task share one network",
        {
          services: [
            { name: "a", ...port(80) },
            { name: "b", ...port(80) },
          ],
        },
      ],
      [
        "refuses a service on the SSH port",
        "services: a and the SSH server cannot both listen on port 22: the containers of a task share one network",
        { services: [{ name: "a", ...port(22) }] },
      ],
      [
        "refuses a service that names the SSH port in a variable",
        "services: a and the SSH server cannot both listen on port 22: the containers of a task share one network",
        { services: [{ name: "a", variables: [variable("HEALTHCHECK_TCP_PORT", "22")] }] },
      ],
      ["ignores the ports of the image", undefined, { image: { name: "node", ...port(22) } }],
    ])("checkPlan %s", (_, why, keywords, from = base) => {
      const check = () => checkPlan(from, planOf(keywords), 22);
      if (why === undefined) return expect(check()).toBeUndefined();
      const failure = thrown(check) as Failure;
      expect([failure.kind, failure.message]).toEqual(["build", why]);
    });

    test("portsOf reads HEALTHCHECK_TCP_PORT or the ports of a service", () => {
      const cases: [keyword: { variables?: object[]; ports?: unknown }, ports: number[]][] = [
        [{}, []],
        [{ ports: [{ number: 5432 }, { number: 80 }] }, [5432, 80]],
        [{ ports: [{ number: 80 }, { number: 80 }] }, [80]],
        [{ ports: [{ number: 0 }, { number: 65_536 }, { number: -1 }, { number: 1.5 }, { number: 65_535 }] }, [65_535]],
        [{ variables: [variable("HEALTHCHECK_TCP_PORT", "8080")], ports: [{ number: 80 }] }, [8080]],
        [{ variables: [variable("HEALTHCHECK_TCP_PORT", "1"), variable("HEALTHCHECK_TCP_PORT", "2")] }, [2]],
        [{ variables: [variable("HEALTHCHECK_TCP_PORT", "")], ports: [{ number: 80 }] }, [80]],
        [{ variables: [variable("HEALTHCHECK_TCP_PORT", "http")], ports: [{ number: 80 }] }, [80]],
        [{ variables: [variable("HEALTHCHECK_TCP_PORT", "70000")] }, []],
      ];
      for (const [keyword, ports] of cases) {
        const [service] = planOf({ services: [{ name: "redis", ...keyword }] }).services;
        expect([keyword, service && portsOf(service.keyword)]).toEqual([keyword, ports]);
      }
    });
  });

  describe("names of services", () => {
    test("hostNames follows GitLab's rules for names and aliases", () => {
      const cases: [name: string, alias: string | undefined, names: string[]][] = [
        ["postgres", undefined, ["postgres"]],
        ["postgres:16", "", ["postgres"]],
        ["group/db:1", undefined, ["group__db", "group-db"]],
        ["registry/group/db", undefined, ["registry__group__db", "registry-group-db"]],
        [
          "registry.example.com/group/db:1",
          undefined,
          ["registry.example.com__group__db", "registry.example.com-group-db"],
        ],
        ["registry.example.com:5000/db", undefined, ["registry.example.com__db", "registry.example.com-db"]],
        [`tutum/wordpress${DIGEST}`, undefined, ["tutum__wordpress", "tutum-wordpress"]],
        [`postgres:16${DIGEST}`, "db", ["postgres", "db"]],
        ["postgres", "db,database", ["postgres", "db", "database"]],
        ["postgres", " db , database\tprimary\n", ["postgres", "db", "database", "primary"]],
        ["postgres", "postgres,postgres", ["postgres"]],
        ["postgres", "db.example.com a_b-c", ["postgres", "db.example.com", "a_b-c"]],
        ["postgres", '$(id) `id` ;id a/b a\'b "x" é', ["postgres"]],
        ["postgres", `${"x".repeat(254)},${"y".repeat(253)}`, ["postgres", "y".repeat(253)]],
      ];
      for (const [name, alias, names] of cases) {
        const settings = { AllowedServices: ["**", "registry.example.com/**", "registry.example.com:5000/**"] };
        const [service] = planOf({ services: [{ name, alias }] }, settings).services;
        expect([name, service && hostNames(service.keyword)]).toEqual([name, names]);
      }
    });
  });

  describe("listeners", () => {
    const HEAD = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n";
    const ANY = "00000000";
    const ANY6 = "0".repeat(32);
    const row = (local: string, port: number, state = "0A", remote = "00000000:0000") =>
      `   0: ${local}:${port.toString(16).toUpperCase().padStart(4, "0")} ${remote} ${state} 00000000:00000000 00:00000000 00000000     0        0 12345 1 0 100 0 0 10 0\n`;

    test("listeningPorts reads listeners on IPv4 and IPv6", () => {
      const remote = `${ANY6}:0000`;
      const text = [
        HEAD,
        row(ANY, 22),
        row("0100007F", 5432),
        row("0100007F", 40_000, "01", "0100007F:1538"),
        HEAD.replace("address", "address                        "),
        row(ANY6, 80, "0A", remote),
        row("00000000000000000000000001000000", 65_535, "0A", remote),
        row(ANY6, 8080, "06", remote),
        "  12: garbage\n",
      ];
      expect([...listeningPorts(text.join(""))].sort()).toEqual([22, 5432, 65_535, 80]);
      expect([...listeningPorts("")]).toEqual([]);
      expect([...listeningPorts(HEAD)]).toEqual([]);
    });

    const both = { tcp: row(ANY, 22), tcp6: row(ANY6, 22, "0A", `${ANY6}:0000`) };
    const established = row(ANY, 22, "01", "0100007F:9C40");
    const fromPort22 = row("0100007F", 40_000, "01", "0100007F:0016");
    test.each<
      [what: string, files: { tcp: string; tcp6?: string; disabled?: string }, port: number, isHealthy: boolean]
    >([
      ["passes with both listeners", both, 22, true],
      ["fails with IPv6 alone", { ...both, tcp: "" }, 22, false],
      ["fails with IPv4 alone", { ...both, tcp6: "" }, 22, false],
      ["passes with IPv4 alone if there is no IPv6", { tcp: both.tcp }, 22, true],
      ["passes with IPv4 alone if IPv6 is disabled", { ...both, tcp6: "", disabled: "1\n" }, 22, true],
      ["fails with IPv4 alone if IPv6 is enabled", { ...both, tcp6: "", disabled: "0\n" }, 22, false],
      ["fails with neither", { tcp: "", tcp6: "" }, 22, false],
      ["fails with a listener on another port", both, 23, false],
      ["fails with a port that ends alike", { tcp: row(ANY, 0x1016), tcp6: both.tcp6 }, 0x16, false],
      ["fails with a connection alone", { tcp: established, tcp6: both.tcp6 }, 22, false],
      ["fails with a connection to another server", { tcp: fromPort22, tcp6: both.tcp6 }, 22, false],
      ["passes beside connections", { tcp: established + fromPort22 + both.tcp, tcp6: both.tcp6 }, 22, true],
      ["passes with port 2222", { tcp: row(ANY, 2222), tcp6: row(ANY6, 2222, "0A", `${ANY6}:0000`) }, 2222, true],
    ])("sshHealthCheck %s", (_, { tcp, tcp6, disabled = "0\n" }, port, isHealthy) => {
      const where = directory();
      fs.writeFileSync(join(where, "tcp"), HEAD + tcp);
      if (tcp6 !== undefined) fs.writeFileSync(join(where, "tcp6"), HEAD + tcp6);
      fs.writeFileSync(join(where, "disabled"), disabled);
      const [kind, program = ""] = sshHealthCheck(port).command ?? [];
      expect(kind).toBe("CMD-SHELL");
      const own = program
        .replaceAll("/proc/net/", `${where}/`)
        .replaceAll("/proc/sys/net/ipv6/conf/all/disable_ipv6", `${where}/disabled`);
      expect(own).not.toContain("/proc/");
      const { status, stderr } = spawnSync("/bin/sh", ["-c", own], { encoding: "utf8" });
      expect({ isHealthy: status === 0, stderr }).toEqual({ isHealthy, stderr: "" });
    });
  });

  describe("variables of services", () => {
    /** The overrides for a job with these services and variables, and what is logged. */
    function overridesOf(services: object[], variables: object[], settings: Partial<JobImage> = {}) {
      const context = imageContext({ services, variables }, { ...all, ...settings });
      const logged: string[] = [];
      const log = makeLogger("info", (record) => {
        searchRecord(record);
        logged.push(formatRecord(record, "text-simple").trimEnd());
      });
      const overrides = serviceOverrides({ ...context, log } as unknown as Context, planImages(context) as Plan);
      const environments = overrides.map(({ environment = [] }) =>
        Object.fromEntries(environment.map(({ name, value }) => [name, value])),
      );
      return { overrides, environments, logged };
    }
    const service = (variables: object[] = [], more: object = {}) => ({ name: "redis", variables, ...more });
    const secret = (key: string, value: string, more: object = {}) => variable(key, value, { public: false, ...more });
    const refusalOf = (...given: Parameters<typeof overridesOf>) => {
      const failure = thrown(() => overridesOf(...given)) as Failure;
      expect(failure.kind).toBe("build");
      return failure.message;
    };

    test("serviceOverrides passes a service's own, the job's and predefined variables", () => {
      const variables = [
        variable("CI", "true"),
        variable("CI_COMMIT_SHA", "abc"),
        variable("GITLAB_USER_NAME", "someone"),
        variable("FF_X", "1"),
        variable("MODE", "job"),
        variable("SHARED", "from the job"),
      ];
      const { overrides, logged } = overridesOf(
        [service([variable("MODE", "own"), variable("CI_COMMIT_SHA", "own")]), { name: "postgres:16" }],
        variables,
      );
      expect(overrides.map(({ name }) => name)).toEqual(["service-1-redis", "service-2-postgres"]);
      const ofJob = [
        { name: "CI", value: "true" },
        { name: "GITLAB_USER_NAME", value: "someone" },
        { name: "FF_X", value: "1" },
      ];
      expect(overrides[0]?.environment).toEqual([
        { name: "MODE", value: "own" },
        { name: "SHARED", value: "from the job" },
        { name: "CI_COMMIT_SHA", value: "own" },
        ...ofJob,
      ]);
      expect(overrides[1]?.environment).toEqual([
        { name: "MODE", value: "job" },
        { name: "SHARED", value: "from the job" },
        { name: "CI", value: "true" },
        { name: "CI_COMMIT_SHA", value: "abc" },
        ...ofJob.slice(1),
      ]);
      expect(logged).toEqual([]);
    });

    test("serviceOverrides never passes a secret variable", () => {
      const token = madeUpSecret("glpat-");
      const { environments, logged } = overridesOf(
        [service([variable("OWN", "x")])],
        [
          secret("TOKEN", token),
          variable("MASKED", token, { masked: true }),
          { key: "UNMARKED", value: token },
          variable("KUBECONFIG", token, { file: true }),
          variable("USES", "user:$TOKEN"),
          variable("CI_USES", "${MASKED}"),
          variable("INDIRECT", "a $USES"),
          variable("PLAIN", "b"),
        ],
      );
      expect(environments).toEqual([{ OWN: "x", PLAIN: "b" }]);
      expect(JSON.stringify(environments)).not.toContain(token);
      expect(logged).toEqual(["Not passed to services, since they contain secrets: USES, CI_USES, INDIRECT"]);
      expect(logged.join()).not.toContain(token);
    });

    test("serviceOverrides finds secrets that GitLab has already expanded", () => {
      const token = madeUpSecret("glpat-");
      const variables = [
        secret("TOKEN", token),
        variable("URL", `postgres://u:${token}@localhost`),
        variable("A", "b"),
      ];
      const { environments, logged } = overridesOf([service()], variables);
      expect(environments).toEqual([{ A: "b" }]);
      expect(logged).toEqual(["Not passed to services, since they contain secrets: URL"]);
      const message = refusalOf([service([variable("DATABASE", "$URL")])], variables);
      expect(message).toContain("its variable DATABASE contains TOKEN");
      expect(message).not.toContain(token);
      // A short value may be anything, such as a number.
      expect(overridesOf([service()], [secret("COUNT", "1"), variable("B", "10")]).environments).toEqual([{ B: "10" }]);
    });

    test("serviceOverrides refuses secrets in services without SecretsInServices", () => {
      const token = madeUpSecret("glpat-");
      const variables = [secret("TOKEN", token), variable("USES", "x$TOKEN")];
      const own = (value: string) => [service([variable("POSTGRES_PASSWORD", value)], { name: "postgres:16" })];
      for (const value of ["$TOKEN", "a${TOKEN}b", "$USES"])
        expect(refusalOf(own(value), variables)).toBe(
          "services: postgres:16: its variable POSTGRES_PASSWORD contains TOKEN; " +
            "secret variables are passed to services only with SecretsInServices",
        );
      const { environments } = overridesOf(own("a${TOKEN}b"), variables, { SecretsInServices: true });
      // Only that variable: the secret itself and the job's variables that contain it are not passed.
      expect(environments).toEqual([{ POSTGRES_PASSWORD: `a${token}b` }]);
      for (const value of ["$$TOKEN", "TOKEN", "$TOKENS"])
        expect(overridesOf(own(value), variables).environments[0]).toHaveProperty("POSTGRES_PASSWORD");
    });

    test("serviceOverrides passes no variable that the driver or ECS sets", () => {
      const reserved = [
        ...["SSH_PUBLIC_KEY", "FARGATE_DEADLINE", "FARGATE_X", "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI"],
        "ECS_CONTAINER_METADATA_URI_V4",
      ].map((key) => variable(key, "x"));
      const { environments } = overridesOf([service([...reserved, variable("A", "b")])], reserved);
      expect(environments).toEqual([{ A: "b" }]);
    });

    test("serviceOverrides keeps the others beside a variable without a value", () => {
      const empty = { key: "EMPTY", value: null, public: true } as never;
      expect(overridesOf([service([empty, variable("A", "b")])], [empty, variable("C", "d")]).environments).toEqual([
        { EMPTY: "", A: "b", C: "d" },
      ]);
    });

    test("serviceOverrides lets the variables of a service refer to each other", () => {
      const own = [variable("DB", "app"), variable("URL", "postgres://$DB/$JOB")];
      expect(overridesOf([service(own)], [variable("JOB", "x")]).environments).toEqual([
        { DB: "app", URL: "postgres://app/x", JOB: "x" },
      ]);
    });

    test("serviceOverrides lets the last of several variables of a name count", () => {
      const twice = [variable("A", "1"), variable("A", "2")];
      expect(overridesOf([service()], twice).environments).toEqual([{ A: "2" }]);
      expect(overridesOf([service(twice)], []).environments).toEqual([{ A: "2" }]);
      // A secret that a public variable replaces, and the other way round.
      const token = madeUpSecret("glpat-");
      expect(overridesOf([service()], [secret("T", token), variable("T", "x")]).environments).toEqual([{ T: "x" }]);
      expect(overridesOf([service()], [variable("T", "x"), secret("T", token)]).environments).toEqual([{}]);
    });

    /** Service variables of a given number and length, all public. */
    const many = (count: number, prefix: string, length: number) =>
      Array.from({ length: count }, (_, i) => variable(`${prefix}${i}`, "v".repeat(length)));
    const size = (overrides: unknown) => JSON.stringify(overrides).length;

    test("serviceOverrides passes predefined variables while there is room", () => {
      const services = [service([variable("OWN", "1")]), { name: "postgres" }, { name: "mysql" }];
      const variables = [...many(100, "CI_VARIABLE_", 60), ...many(20, "JOB_", 20)];
      const { overrides, environments, logged } = overridesOf(services, variables);
      expect(size(overrides)).toBeLessThanOrEqual(8_192 - 300);
      expect(size(overrides)).toBeGreaterThan(7_400);
      for (const environment of environments)
        expect(environment).toMatchObject({ JOB_0: "v".repeat(20), JOB_19: "v".repeat(20) });
      const passed = Object.keys(environments[0] ?? {}).filter((name) => name.startsWith("CI_")).length;
      expect(passed).toBeGreaterThan(5);
      expect(logged).toEqual([
        `${100 - passed} predefined variables are not passed to services: ECS limits their length`,
      ]);
      // With the override of ci-coordinator, the whole stays within ECS's limit.
      const identity = { startedBy: "fargate-a-b", clientToken: "token" };
      const own = { SSH_PUBLIC_KEY: `ssh-ed25519 ${"A".repeat(68)}`, FARGATE_DEADLINE: "1700000000" };
      const input = runTaskInput(configWith(all), identity, own, overrides);
      expect(size(input.overrides)).toBeLessThanOrEqual(8_192);
      expect(input.overrides?.containerOverrides?.map(({ name }) => name)).toEqual([
        ...[CONTAINER, "service-1-redis", "service-2-postgres", "service-3-mysql"],
      ]);
    });

    test("serviceOverrides refuses variables of services that do not fit", () => {
      const fits = (length: number) => overridesOf([service([variable("A", "x".repeat(length))])], []).overrides;
      const room = 7_892 - size(fits(0));
      expect(size(fits(room))).toBe(7_892);
      const services = [service([variable("A", "x".repeat(room + 1))])];
      const why = "variables of services: take 7893 characters; ECS accepts 7892 for a task";
      expect(refusalOf(services, [])).toBe(why);
      // The job's own variables count for each service, and in bytes.
      expect(refusalOf([service(), service(), service()], [variable("A", "x".repeat(2_700))])).toContain("characters");
      expect(refusalOf([service()], [variable("A", "é".repeat(4_000))])).toContain("characters");
      expect(refusalOf([service()], [variable("A", '"'.repeat(4_000))])).toContain("characters");
      // Predefined ones alone are no reason.
      expect(overridesOf([service()], [variable("CI_A", "x".repeat(9_000))]).environments).toEqual([{}]);
    });

    test.each<[value: string, expected: string]>([
      ["plain", "plain"],
      ["$A", "a"],
      ["${A}", "a"],
      ["x${A}y$A", "xaya"],
      ["$A-$A.b", "a-a.b"],
      ["$AB", ""],
      ["$UNKNOWN${UNKNOWN}", ""],
      ["$$A", "$A"],
      ["$$$A", "$a"],
      ["$$$$", "$$"],
      ["$", "$"],
      ["100$", "100$"],
      ["$ A", "$ A"],
      ["${A", "${A"],
      ["${A-b}", "${A-b}"],
      ["${}", "${}"],
      ["%A%", "%A%"],
      ["$NESTED", "<a>"],
      ["$RAW", "$A"],
      ["$FILE", ""],
      ["$toString$__proto__", ""],
      ["\\$A", "\\a"],
    ])("expandVariable expands %j as GitLab Runner does", (value, expected) => {
      const known = [
        variable("A", "a"),
        variable("NESTED", "<$A>"),
        variable("RAW", "$A", { raw: true }),
        variable("FILE", "content", { file: true }),
      ].map((entry) => [entry.key, { masked: false, file: false, raw: false, ...entry }] as const);
      const given = { key: "X", value, public: true, masked: false, file: false, raw: false };
      expect(expandVariable(given, new Map(known))).toEqual({ value: expected, secrets: [] });
      expect(expandVariable({ ...given, raw: true }, new Map(known)).value).toBe(value);
    });

    test("expandVariable ends for variables that contain themselves or many others", () => {
      const map = (...values: [key: string, value: string][]) =>
        new Map(
          values.map(([key, value]) => [key, { key, value, public: true, masked: false, file: false, raw: false }]),
        );
      const cycle = map(["A", "$B$B$B$B$B$B$B$B$B$B"], ["B", "$A$A$A$A$A$A$A$A$A$A"], ["C", "$C"]);
      const growing = map(
        ...Array.from({ length: 12 }, (_, i): [string, string] => [`V${i}`, `$V${i + 1}`.repeat(50)]),
        ["V12", "x".repeat(1_000)],
      );
      const large = map(["A", "$B".repeat(100_000)], ["B", "x".repeat(100_000)]);
      for (const all of [cycle, growing, large])
        for (const given of all.values()) expect(expandVariable(given, all).value.length).toBeLessThan(1_000_000);
      // What is cut would not fit in any case.
      for (const [all, key] of [
        [growing, "V0"],
        [large, "A"],
      ] as const)
        expect(expandVariable(all.get(key) as never, all).value.length).toBeGreaterThan(8_192);
    });
  });

  describe("task definition of a job", () => {
    const family = `ci-job-${"0123456789abcdef".repeat(2)}`;
    const refusalFor = (chosen: string, list = "") => {
      const file = configFile("guide").replace("[Fargate]", `[Fargate]\n${list}`);
      return readConfig(file, "x", {}, { CUSTOM_ENV_FARGATE_TASK_DEFINITION: chosen }).refusal;
    };
    const place = "arn:aws:ecs:us-east-2:123456789012:task-definition/";

    test("readConfig refuses a job's choice of a derived family", () => {
      const chosen = [
        ...[family, `${family}:1`, `${family}:`, ` ${family}:12 `, `${family}:1:2`, `${family}:latest`],
        ...[`${place}${family}`, `${place}${family}:3`, `task-definition/${family}:3`],
        `${"f".repeat(218)}-job-${"0".repeat(32)}`,
      ];
      for (const name of chosen)
        for (const list of ["", 'AllowedTaskDefinitions = ["ci-*", "*"]'])
          expect(refusalFor(name, list)).toContain(
            "is not allowed: it belongs to the jobs whose image: and services: it contains",
          );
    });

    test("readConfig allows a job families that resemble a derived one", () => {
      const others = [
        ...["ci", "ci-job", "ci-job-1", `ci-job-${"0".repeat(31)}`, `ci-job-${"0".repeat(33)}`],
        ...[`ci-job-${"g".repeat(32)}`, `${family}-x`, `job-${"0".repeat(32)}`],
      ];
      for (const name of others) expect([name, refusalFor(name)]).toEqual([name, undefined]);
    });

    test("readConfig allows the operator any family", () => {
      const file = configFile("guide").replace(/TaskDefinition = .*/, `TaskDefinition = "${family}"`);
      const { config, refusal } = readConfig(file, "x", {}, {});
      expect([config.Fargate.TaskDefinition, refusal]).toEqual([family, undefined]);
      const byOption = readConfig(configFile("guide"), "x", { TaskDefinition: family }, {});
      expect([byOption.config.Fargate.TaskDefinition, byOption.refusal]).toEqual([family, undefined]);
    });
  });
});

describe("task definitions of images", () => {
  const JobImage = { AllowedImages: ["**", "registry.example.com/**"], AllowedServices: ["**"] };
  let world: World;
  const enter = async (options: WorldOptions = {}) => {
    await world?.close();
    world = await makeWorld({ embedded: true, ...options });
    for (const [name, value] of Object.entries(world.aws.environment)) vi.stubEnv(name, value);
  };
  beforeEach(() => enter());
  afterEach(async () => {
    vi.unstubAllEnvs();
    await world.close();
  });

  /** The context of a stage of a job with this image. `records` stands for a host. */
  const jobWith = (image: string, records = join(directory(), "records"), changes: ConfigChanges = {}): Context => {
    const responseFile = join(directory(), "response.json");
    fs.writeFileSync(responseFile, JSON.stringify(gitlabJob({ image }).response));
    fs.mkdirSync(records, { recursive: true, mode: 0o700 });
    const setup = { ...changes, top: { JobImage, ...changes.top }, TaskMetadata: { Directory: records } };
    const path = world.configure(setup);
    const { config } = readConfig(fs.readFileSync(path, "utf8"), path, {}, {});
    const hash = "0123456789abcdef".repeat(4);
    const job = { stem: `label-${hash}`, hash, title: "job 1 of project 2", timeout: 3600, imageNames: [image] };
    const env = { JOB_RESPONSE_FILE: responseFile };
    const times = { now: Date.now, wallTime: Date.now };
    return { config, job, jobOverrides: [], log, env, signal: never, ...times };
  };
  /** Prepares a job's definition. @returns the ARN that prepare would run */
  const define = async (context: Context, seconds = 60): Promise<string> => {
    const aws = new Aws(context.config.Fargate, context);
    const { config } = await prepareImages(context, aws, Date.now() + seconds * 1000);
    return config.Fargate.TaskDefinition;
  };
  const calls = (operation: Operation) => world.aws.callsTo(operation).length;
  const familyOf = (arn: string) => /\/([\w-]+):\d+$/.exec(arn)?.[1] ?? "";
  const fileOf = (arn: string, records: string) => join(records, `.definition-${familyOf(arn).slice(-32)}`);

  test("prepareImages registers the definition of an image once", async () => {
    const first = jobWith("node:22");
    const arn = await define(first);
    expect(arn).toMatch(/^arn:aws:ecs:us-east-2:123456789012:task-definition\/test-task-job-[0-9a-f]{32}:1$/);
    const { Directory } = first.config.TaskMetadata;
    // On the same host, its file is enough. On another host, ECS knows it.
    expect(await define(jobWith("docker.io/library/node:22", Directory))).toBe(arn);
    expect(calls("DescribeTaskDefinition")).toBe(3); // the base twice
    expect(await define(jobWith("node:22"))).toBe(arn);
    expect(calls("DescribeTaskDefinition")).toBe(5);
    expect(calls("RegisterTaskDefinition")).toBe(1);
    expect(await define(jobWith("node:20", Directory))).not.toBe(arn);
    expect(calls("RegisterTaskDefinition")).toBe(2);
  });

  test("prepareImages runs no revision that somebody else has registered", async () => {
    const arn = await define(jobWith("node:22"));
    const [own] = world.aws.taskDefinitions().filter(({ family }) => family === familyOf(arn));
    const containers = own?.containerDefinitions ?? [];
    const foreign = (change: Partial<ContainerDefinition>) =>
      world.aws.register({
        ...own,
        family: familyOf(arn),
        revision: undefined,
        containerDefinitions: containers.map((one) => (one.name === "build" ? { ...one, ...change } : one)),
      } as never);
    for (const [change, revision] of [
      [{ image: "docker.io/library/evil:22" }, 3],
      [{ command: ["-c", "evil"] }, 5],
      [{ environment: [{ name: "LD_PRELOAD", value: "/evil.so" }] }, 7],
      [{ secrets: [{ name: "TOKEN", valueFrom: "arn:aws:ssm:us-east-2:123456789012:parameter/x" }] }, 9],
      [{ user: "1000" }, 11],
    ] as const) {
      foreign(change as Partial<ContainerDefinition>);
      expect(await define(jobWith("node:22"))).toBe(`${arn.replace(/:1$/, "")}:${revision}`);
    }
    // One with other roles, and one that does the same.
    world.aws.register({ ...own, taskRoleArn: "arn:aws:iam::123456789012:role/evil", revision: undefined } as never);
    expect(await define(jobWith("node:22"))).toMatch(/:13$/);
    foreign({});
    expect(await define(jobWith("node:22"))).toMatch(/:14$/);
    expect(calls("RegisterTaskDefinition")).toBe(7);
  });

  test.each<[what: string, spoil: (path: string, arn: string) => void]>([
    ["is empty", (path) => fs.writeFileSync(path, "")],
    ["is cut", (path, arn) => fs.writeFileSync(path, arn.slice(0, -1))],
    ["is cut in its revision", (path, arn) => fs.writeFileSync(path, `${arn}`)],
    ["names another family", (path, arn) => fs.writeFileSync(path, `${arn.replace("test-task-job", "ci-evil")}\n`)],
    ["names no revision", (path, arn) => fs.writeFileSync(path, `${arn.replace(/:\d+$/, "")}\n`)],
    ["has a second line", (path, arn) => fs.writeFileSync(path, `${arn}\n${arn}\n`)],
    ["is no text", (path) => fs.writeFileSync(path, Buffer.from([0, 255, 254, 10]))],
    ["can be read by others", (path) => fs.chmodSync(path, 0o644)],
    [
      "is a link",
      (path) => {
        fs.renameSync(path, `${path}-target`);
        fs.symlinkSync(`${path}-target`, path);
      },
    ],
    [
      "is a directory",
      (path) => {
        fs.rmSync(path);
        fs.mkdirSync(path);
      },
    ],
    ["belongs to another user", (path) => process.getuid?.() === 0 && fs.chownSync(path, 65_534, 65_534)],
  ])("prepareImages asks ECS when the file of a definition %s", async (what, spoil) => {
    const context = jobWith("node:22");
    const { Directory } = context.config.TaskMetadata;
    const arn = await define(context);
    const path = fileOf(arn, Directory);
    expect(fs.readFileSync(path, "utf8")).toBe(`${arn}\n`);
    expect(fs.statSync(path).mode & 0o777).toBe(0o600);
    spoil(path, arn);
    expect(await define(context)).toBe(arn);
    const isUsed = what === "belongs to another user" && process.getuid?.() !== 0;
    expect(calls("DescribeTaskDefinition")).toBe(isUsed ? 3 : 4); // the base twice, and the definition once or twice
    expect(calls("RegisterTaskDefinition")).toBe(1);
    if (what === "is a directory") return;
    expect(fs.lstatSync(path).isSymbolicLink()).toBe(false);
    expect(fs.readFileSync(path, "utf8")).toBe(`${arn}\n`);
    expect(fs.readdirSync(Directory).filter((name) => /lock|tmp/.test(name))).toEqual([]);
  });

  test("prepareImages registers a definition for each account and region", async () => {
    const records = join(directory(), "records");
    const arns = [await define(jobWith("node:22", records))];
    await enter({ account: "210987654321" });
    arns.push(await define(jobWith("node:22", records)));
    await enter({ region: "eu-west-1" });
    arns.push(await define(jobWith("node:22", records, { Fargate: { Region: "eu-west-1" } })));
    expect(arns.map((arn) => arn.split(":").slice(3, 5).join())).toEqual([
      "us-east-2,123456789012",
      "us-east-2,210987654321",
      "eu-west-1,123456789012",
    ]);
    expect(new Set(arns.map(familyOf)).size).toBe(3);
  });

  test("prepareImages registers five definitions for 50 jobs at once with five images", async () => {
    const records = join(directory(), "records");
    const jobs = Array.from({ length: 50 }, (_, n) => jobWith(`node:${n % 5}`, records));
    const arns = await Promise.all(jobs.map((job) => define(job)));
    expect(arns).toEqual(Array.from({ length: 50 }, (_, n) => arns[n % 5]));
    expect(new Set(arns).size).toBe(5);
    expect(calls("RegisterTaskDefinition")).toBe(5);
    expect(fs.readdirSync(records).filter((name) => !/^\.definition-[0-9a-f]{32}$/.test(name))).toEqual([]);
    for (const [n, arn] of arns.entries()) {
      const { containerDefinitions: containers = [] } =
        world.aws.taskDefinitions().find(({ taskDefinitionArn }) => taskDefinitionArn === arn) ?? {};
      expect(containers.find(({ name }) => name === "build")?.image).toBe(`docker.io/library/node:${n % 5}`);
    }
  });

  test("prepareImages registers the same definition on two hosts at once without harm", async () => {
    const both = Promise.withResolvers<void>();
    const held = { operation: "RegisterTaskDefinition", times: 2, do: { holdUntil: both.promise } } as const;
    world.aws.inject(held);
    const arns = Promise.all([define(jobWith("node:22")), define(jobWith("node:22"))]);
    await world.aws.waitFor(() => calls("RegisterTaskDefinition") === 2);
    both.resolve();
    expect((await arns).map((arn) => arn.replace(/^.*:/, "")).sort()).toEqual(["1", "2"]);
    expect(await define(jobWith("node:22"))).toMatch(/:2$/);
    expect(calls("RegisterTaskDefinition")).toBe(2);
  });

  test.each([
    ["ThrottlingException", "Rate exceeded"],
    ["ClientException", "Too many concurrent attempts to create a new revision of the specified family."],
  ])("prepareImages finds the definition of another host after a %s", async (error, message) => {
    world.aws.inject({ operation: "RegisterTaskDefinition", do: { error, message } });
    const waiting = define(jobWith("node:22"));
    await world.aws.waitFor(() => calls("RegisterTaskDefinition") === 1);
    const arn = await define(jobWith("node:22"));
    expect(await waiting).toBe(arn);
    expect(calls("RegisterTaskDefinition")).toBe(2);
  });

  test.each(["500-after", "reset-after"] as const)(
    "prepareImages registers nothing twice if the answer is lost (%s)",
    async (fault) => {
      world.aws.inject({ operation: "RegisterTaskDefinition", do: fault });
      expect(await define(jobWith("node:22"))).toMatch(/:1$/);
      expect(calls("RegisterTaskDefinition")).toBe(1);
    },
  );

  test("prepareImages fails with AWS's reason if the definition is refused", async () => {
    const message = "Fargate requires task definition to have execution role ARN to support log driver awslogs.";
    const refusal = { error: "ClientException", message };
    world.aws.inject({ operation: "RegisterTaskDefinition", do: refusal });
    await expect(define(jobWith("node:22"))).rejects.toMatchObject({
      kind: "system",
      message: `ecs:RegisterTaskDefinition was refused: ClientException: ${message}`,
    });
    expect(calls("RegisterTaskDefinition")).toBe(1);
  });

  test("prepareImages refuses an image whose name is too long for ECS", async () => {
    const start = "registry.example.com/group/";
    const image = `${start}${"a".repeat(200)}:${"1".repeat(255 - start.length - 201)}`;
    await define(jobWith(image));
    await expect(define(jobWith(`${image}1`))).rejects.toMatchObject({
      kind: "build",
      message: expect.stringMatching(/^image: registry\S+ is longer than the 255 characters that ECS accepts$/),
    });
    expect(calls("RegisterTaskDefinition")).toBe(1);
  });

  describe("lock", () => {
    /** A job whose definition another process is registering, by this content of its lock. */
    const locked = async (content: string, touched = Date.now()) => {
      const arn = await define(jobWith("node:22"));
      const context = jobWith("node:22");
      const path = `${fileOf(arn, context.config.TaskMetadata.Directory)}.lock`;
      fs.writeFileSync(path, content, { mode: 0o600 });
      fs.utimesSync(path, touched / 1000, touched / 1000);
      return { arn, context, path };
    };
    const elsewhere = "12 345.0123456789abcdef";
    const isHeld = async ({ context }: { context: Context }) => {
      const waited = expect(define(context, 0)).rejects;
      await waited.toThrow(/^test-task-job-[0-9a-f]{32} was not registered within StartTimeout$/);
    };

    test("prepareImages waits for the process that registers the same definition", async () => {
      const lock = await locked(elsewhere);
      await isHeld(lock);
      expect(fs.existsSync(lock.path)).toBe(true);
      const waiting = define(lock.context);
      fs.writeFileSync(lock.path.replace(/\.lock$/, ""), `${lock.arn}\n`, { mode: 0o600 });
      expect(await waiting).toBe(lock.arn);
      expect(fs.existsSync(lock.path)).toBe(true); // it belongs to the other process
      expect(calls("RegisterTaskDefinition")).toBe(1);
    });

    test("prepareImages ends at a signal while it waits for another process", async () => {
      const { context } = await locked(elsewhere);
      const stop = new AbortController();
      const waiting = expect(define({ ...context, signal: stop.signal })).rejects.toThrow("stopped");
      stop.abort(new Error("stopped"));
      await waiting;
    });

    test.each([
      ["another container's", elsewhere],
      ["an empty", ""],
    ])("prepareImages takes over %s lock some time after its last touch", async (_, content) => {
      await isHeld(await locked(content, Date.now() - 15_000));
      const old = await locked(content, Date.now() - 21_000);
      expect(await define(old.context)).toBe(old.arn);
      expect(fs.existsSync(old.path)).toBe(false);
      // As after a change of the clock.
      const future = await locked(content, Date.now() + 3_600_000);
      expect(await define(future.context)).toBe(future.arn);
    });

    test("prepareImages takes over the lock of a dead process of this host at once", async () => {
      const arn = await define(jobWith("node:22"));
      const { context, path } = await locked("");
      // A lock of this process, with the start time of another one.
      const content = await readOwnLock(context, path, arn);
      fs.writeFileSync(path, content.replace(/^(\d+) \d+\./, "$1 1."), { mode: 0o600 });
      expect(await define(context)).toBe(arn);
      expect(fs.existsSync(path)).toBe(false);
      fs.rmSync(path.replace(/\.lock$/, ""));
      fs.writeFileSync(path, content, { mode: 0o600 });
      await isHeld({ context });
    });

    /** The content of the lock that this process makes. */
    const readOwnLock = async (context: Context, path: string, arn: string): Promise<string> => {
      fs.rmSync(path);
      const looked = Promise.withResolvers<void>();
      const ofFamily = ({ taskDefinition = "" }) => taskDefinition === familyOf(arn);
      const held = { holdUntil: looked.promise };
      world.aws.inject({ operation: "DescribeTaskDefinition", when: ofFamily, do: held });
      const before = calls("DescribeTaskDefinition");
      const defining = define(context);
      await world.aws.waitFor(() => calls("DescribeTaskDefinition") === before + 2);
      const content = fs.readFileSync(path, "utf8");
      looked.resolve();
      await defining;
      fs.rmSync(path.replace(/\.lock$/, ""));
      return content;
    };

    test("prepareImages takes over a link in place of a lock", async () => {
      const { arn, context, path } = await locked("");
      fs.rmSync(path);
      fs.symlinkSync("/etc/passwd", path);
      fs.lutimesSync(path, 1, 1);
      expect(await define(context)).toBe(arn);
      expect(fs.existsSync(path)).toBe(false);
    });

    test("prepareImages does without files on a full disk", async ({ skip }) => {
      const path = join(directory(), "full");
      fs.mkdirSync(path);
      const mount = ["-t", "tmpfs", "-o", "size=64k,mode=0700", "tmpfs", path];
      if (spawnSync("mount", mount, { stdio: "ignore" }).status !== 0) skip("mount(8) is not permitted");
      try {
        expect(() => fs.writeFileSync(join(path, "filler"), Buffer.alloc(1_000_000))).toThrow("ENOSPC");
        const context = jobWith("node:22", path);
        const arn = await define(context);
        expect(await define(context)).toBe(arn);
        expect(calls("RegisterTaskDefinition")).toBe(1);
        expect(fs.readdirSync(path)).toEqual(["filler"]);
      } finally {
        spawnSync("umount", [path]);
      }
    });
  });

  describe("sweep", () => {
    const DAY = 86_400;
    const hashes = (n: number) => n.toString(16).padStart(32, "0");
    const now = () => Date.now() / 1000;
    const register = (family: string, age: number) =>
      world.aws.register({
        family,
        containerDefinitions: [{ name: CONTAINER, image: "sshd" }],
        registeredAt: now() - age * DAY,
      });
    const sweepOnce = (context: Context, dryRun = false) => sweep(context, { dryRun, json: false });
    const active = () =>
      world.aws
        .taskDefinitions()
        .filter(({ status, family }) => status === "ACTIVE" && family.includes("-job-"))
        .map(({ taskDefinitionArn }) => taskDefinitionArn);
    const sweeper = (changes: ConfigChanges = {}) => jobWith("", undefined, changes);

    test("sweep deregisters old definitions of images that no task uses", async () => {
      const table = { TaskDefinitions: [{ Image: "ruby:*", TaskDefinition: "ci-ruby:3" }] };
      const context = sweeper({ top: { JobImage: { ...JobImage, ...table } } });
      const old = ["test-task", "ci-ruby"].map((base) => register(`${base}-job-${hashes(1)}`, 8));
      const second = register(`test-task-job-${hashes(1)}`, 7.01);
      const young = register(`test-task-job-${hashes(2)}`, 6.99);
      const used = register(`test-task-job-${hashes(3)}`, 30);
      const ended = register(`test-task-job-${hashes(4)}`, 30);
      const run = (taskDefinitionArn: string) =>
        Object.assign(world.aws.addTask({ cluster: "test-cluster", startedBy: "anybody" }), { taskDefinitionArn });
      run(used);
      Object.assign(run(ended), { desiredStatus: "STOPPED", lastStatus: "STOPPED" });
      const alike = [
        `other-job-${hashes(1)}`,
        `test-task-other-job-${hashes(1)}`,
        `my-test-task-job-${hashes(1)}`,
        `test-task-job-${hashes(1)}0`,
        `test-task-job-${hashes(1).slice(1)}`,
        `test-task-job-${hashes(0xa).toUpperCase()}`,
        `test-task-job-${hashes(1)}-job-x`,
        `TEST-TASK-job-${hashes(1)}`,
      ].map((family) => register(family, 30));
      const cached = join(context.config.TaskMetadata.Directory, `.definition-${hashes(1)}`);
      fs.writeFileSync(cached, `${second}\n`, { mode: 0o600 });
      const expected = [...old, second, ended].sort();
      const would = await sweepOnce(context, true);
      expect([...(would.deregistered ?? [])].sort()).toEqual(expected);
      expect(calls("DeregisterTaskDefinition")).toBe(0);
      expect(fs.readdirSync(context.config.TaskMetadata.Directory)).toEqual([basename(cached)]);
      const report = await sweepOnce(context);
      expect([...(report.deregistered ?? [])].sort()).toEqual(expected);
      expect(report.problems).toEqual([]);
      expect(active().sort()).toEqual([young, used, ...alike].sort());
      expect(fs.existsSync(cached)).toBe(false);
    });

    test("sweep reports the definitions as text and as JSON", async () => {
      const context = sweeper();
      const arn = register(`test-task-job-${hashes(1)}`, 8);
      const would = await sweepOnce(context, true);
      const last = "tasks: 0 would be stopped, 0 left running; records: 0 would be removed; problems: 0";
      expect(formatSweep(would, false)).toBe(
        `${arn} would be deregistered: it is older than a week, and no task uses it\n${last}\n`,
      );
      expect(JSON.parse(formatSweep(would, true))).toEqual({
        ...{ dryRun: true, stopped: [], left: [], removedRecords: [], problems: [] },
        deregistered: [arn],
      });
    });

    test("sweep deregisters at most ten definitions, and asks for each date once", async () => {
      const context = sweeper();
      for (let n = 0; n < 23; n++) register(`test-task-job-${hashes(n)}`, 8);
      const young = register(`test-task-job-${hashes(99)}`, 1);
      const counts: number[] = [];
      for (let n = 0; n < 4; n++) counts.push((await sweepOnce(context)).deregistered?.length ?? 0);
      expect(counts).toEqual([10, 10, 3, 0]);
      expect(calls("DescribeTaskDefinition")).toBe(24);
      const dates = join(context.config.TaskMetadata.Directory, ".definition-dates");
      expect(Object.keys(JSON.parse(fs.readFileSync(dates, "utf8")))).toEqual([young]);
      expect(fs.statSync(dates).mode & 0o777).toBe(0o600);
    });

    test.each(["", "{", "[1]", '{"x":null}', "null"])("sweep repairs a file of dates with %j", async (content) => {
      const context = sweeper();
      const arn = register(`test-task-job-${hashes(1)}`, 8);
      const dates = join(context.config.TaskMetadata.Directory, ".definition-dates");
      fs.writeFileSync(dates, content, { mode: 0o600 });
      expect(await sweepOnce(context)).toMatchObject({ deregistered: [arn], problems: [] });
      expect(fs.readFileSync(dates, "utf8")).toBe("{}");
    });

    test.each(["ListTaskDefinitions", "DescribeTaskDefinition", "DeregisterTaskDefinition"] as const)(
      "sweep does the rest of its work if it may not call %s",
      async (operation) => {
        const context = sweeper();
        register(`test-task-job-${hashes(1)}`, 8);
        const { Directory } = context.config.TaskMetadata;
        const startedBy = `fargate-${await managerId(Directory, {})}-${"1".repeat(32)}`;
        const task = world.aws.addTask({ cluster: "test-cluster", startedBy });
        Object.assign(task, { createdAt: task.createdAt - 3_600_000 }); // its record is gone
        const rest = ["ListTasks", "DescribeTasks", "StopTask"];
        const definitions = ["ListTaskDefinitions", "DescribeTaskDefinition", "DeregisterTaskDefinition"];
        const allowed = [...rest, ...definitions.filter((name) => name !== operation)];
        world.aws.permissions = new Set(allowed.map((name) => `ecs:${name}`));
        const report = await sweepOnce(context);
        expect(report).toMatchObject({ stopped: [{ taskArn: task.taskArn }], deregistered: [] });
        const problem = `^ecs:${operation} was refused: AccessDeniedException: .*; what to do: .*ecs:${operation}`;
        expect(report.problems).toEqual([expect.stringMatching(problem)]);
      },
    );

    test("sweep makes no further call and reports nothing more without AllowedImages", async () => {
      const table = { TaskDefinitions: [{ Image: "ruby:*", TaskDefinition: "ci-ruby" }] };
      register(`test-task-job-${hashes(1)}`, 8);
      for (const own of [{}, { JobImage: table }, { JobImage: { AllowedImages: [], AllowedServices: [] } }]) {
        const before = world.aws.calls.length;
        const report = await sweepOnce(sweeper({ top: { JobImage: undefined, ...own } }));
        expect(report).toEqual({ dryRun: false, stopped: [], left: [], removedRecords: [], problems: [] });
        expect(world.aws.calls.slice(before).map(({ operation }) => operation)).toEqual(["ListTasks"]);
      }
    });

    test("sweep removes week-old files of definitions", async () => {
      const context = sweeper();
      const { Directory } = context.config.TaskMetadata;
      const names = ["", ".lock", `.${"a".repeat(12)}.tmp`].map((end) => `.definition-${hashes(1)}${end}`);
      const put = (name: string, age: number) => {
        const path = join(Directory, name.replace(hashes(1), hashes(Math.ceil(age * DAY))));
        fs.writeFileSync(path, "", { mode: 0o600 });
        fs.utimesSync(path, now() - age * DAY, now() - age * DAY);
        return basename(path);
      };
      for (const name of names) put(name, 7.01);
      const kept = [put(names[0] ?? "", 6.9), put(names[1] ?? "", 6.9), put(names[2] ?? "", 0.04)];
      await sweepOnce(context, true);
      expect(fs.readdirSync(Directory)).toHaveLength(6);
      await sweepOnce(context);
      expect(fs.readdirSync(Directory).sort()).toEqual([...kept, ".definition-dates"].sort());
    });
  });
});

// ---------------------------------------------------------------------------------------------------------
// 13. Command line
// ---------------------------------------------------------------------------------------------------------

describe("command line", () => {
  test.each([
    ["custom config", "config", []],
    ["c co", "config", []],
    ["custom prepare", "prepare", []],
    ["c p", "prepare", []],
    ["custom run script stage", "run", ["script", "stage"]],
    ["c r script stage", "run", ["script", "stage"]],
    ["custom cleanup", "cleanup", []],
    ["c cl", "cleanup", []],
  ])("parseCommandLine accepts %s", (line, stage, operands) => {
    expect(parseCommandLine(line.split(" "), commander)).toEqual({
      command: stage,
      operands,
      config: "config.toml",
      options: {},
    });
  });

  test.each(["0123456789ab", "0123456789abcdef0123456789abcdef"])("parseCommandLine accepts --manager %s", (id) => {
    expect(parseCommandLine(["sweep", "--manager", id], commander)?.flags).toMatchObject({ manager: id });
  });

  test("parseCommandLine accepts options before and after the commands", () => {
    const options = ["--config", "x.toml", "--log-level=warn", "--log-format", "json", "--log-file", "y.log"];
    options.push("--task-def", "build:7", "--platform-version", "1.4.0");
    const expected = {
      command: "run",
      operands: ["script", "stage"],
      config: "x.toml",
      options: {
        LogLevel: "warn",
        LogFormat: "json",
        LogFile: "y.log",
        TaskDefinition: "build:7",
        PlatformVersion: "1.4.0",
      },
    };
    const words = ["custom", "run", "script", "stage"];
    for (let at = 0; at <= words.length; at++)
      expect(parseCommandLine([...words.slice(0, at), ...options, ...words.slice(at)], commander)).toEqual(expected);
    expect(parseCommandLine(["--debug", "custom", "prepare"], commander)?.options).toEqual({ LogLevel: "debug" });
    expect(parseCommandLine(["custom", "prepare", "--debug", "--log-level", "warn"], commander)?.options).toEqual({
      LogLevel: "debug",
    });
  });

  test("parseStage recognises the command lines in examples/config.toml", () => {
    const example = fs.readFileSync(join(projectRoot, "examples", "config.toml"), "utf8");
    const { runners } = parse(example) as unknown as { runners: { custom: Record<string, string[]> }[] };
    for (const command of ["config", "prepare", "run", "cleanup"]) {
      const operands = command === "run" ? ["/tmp/script 1", "build_script"] : [];
      const words = [...(runners[0]?.custom[`${command}_args`] ?? []), ...operands];
      const stage = { command, operands, options: {} };
      expect(parseStage(words)).toEqual({ ...stage, config: "/etc/gitlab-runner/fargate.toml" });
      expect(words.shift()).toBe("--config");
      expect(words.shift()).toBe("/etc/gitlab-runner/fargate.toml");
      expect(parseStage(words)).toEqual({ ...stage, config: "config.toml" });
    }
  });

  test.each([
    ["no words", []],
    ["only --config", ["--config"]],
    ["an empty path", ["--config", "", "custom", "config"]],
    ["a path that begins with a dash", ["--config", "-x", "custom", "config"]],
    ["--config=PATH", ["--config=x.toml", "custom", "config"]],
    ["--config after the command", ["custom", "config", "--config", "x.toml"]],
    ["two paths", ["--config", "x.toml", "--config", "y.toml", "custom", "config"]],
    ["other options", ["--debug", "custom", "prepare"]],
    ["options after the command", ["custom", "run", "script", "stage", "--debug"]],
    ["--help", ["custom", "config", "--help"]],
    ["--version", ["--version"]],
    ["the help command", ["custom", "help", "run"]],
    ["aliases", ["c", "config"]],
    ["aliases of stages", ["custom", "r", "script", "stage"]],
    ["sweep", ["sweep"]],
    ["no stage", ["custom"]],
    ["an unknown stage", ["custom", "toString"]],
    ["too few operands", ["custom", "run", "script"]],
    ["too many operands", ["custom", "cleanup", "script"]],
    ["operands that begin with a dash", ["custom", "run", "script", "-stage"]],
    ["the end of options", ["custom", "run", "--", "script", "stage"]],
  ])("parseStage leaves %s to parseCommandLine", (_, words) => {
    expect(parseStage(words)).toBeUndefined();
  });

  testProgram("fargate prints help and version at every level", async () => {
    const nowhere = directory();
    for (const level of [
      [],
      ["custom"],
      ...["config", "prepare", "run", "cleanup"].map((stage) => ["custom", stage]),
    ]) {
      for (const flag of ["--help", "-h"]) {
        const help = await fargate([...level, flag], { cwd: nowhere });
        expect(help).toMatchObject({ code: 0, stderr: "" });
        expect(help.stdout.toString()).toMatch(/^Usage: fargate/);
        for (const option of [
          "--config",
          "--debug",
          "--log-level",
          "--log-format",
          "--log-file",
          "--task-def",
          "--platform-version",
        ])
          expect(help.stdout.toString()).toContain(option);
      }
      for (const flag of ["--version", "-v"]) {
        const version = await fargate([...level, flag], { cwd: nowhere });
        expect(version).toMatchObject({ code: 0, stderr: "" });
        expect(version.stdout.toString()).toMatch(/^fargate \d+\.\d+\.\d+ \(\S+\)\n$/);
      }
    }
  });

  testProgram("config answers without a configuration file and a job", async () => {
    const answer = await fargate(["custom", "config"], { cwd: directory() });
    expect(answer).toMatchObject({ code: 0, stderr: "" });
    expect(answer.stdout.toString()).toMatch(
      /^\{"driver":\{"name":"fargate","version":"\d+\.\d+\.\d+ \(\S+\)"\},"hostname":""\}\n$/,
    );
  });

  testProgram.each([
    ["custom foo", "fargate custom: unknown command 'foo'; valid commands: config, prepare, run, cleanup"],
    [
      "foo",
      "fargate: unknown command 'foo'; valid commands: custom, init, doctor, tasks, shell, sweep, runners, manager",
    ],
    [
      "custom run a b --colour",
      "fargate custom run: unknown option '--colour'; valid options: --version, --config, --debug, --log-level, " +
        "--log-format, --log-file, --task-def, --platform-version",
    ],
    [
      "shell 1 ps -ef",
      "fargate shell: unknown option '-ef'; valid options: --version, --config, --debug, --log-level, --log-format, " +
        "--log-file, --task-def, --platform-version; write -- before the options of another program",
    ],
    [
      "custom run a",
      "fargate custom run: missing required argument 'stage'; usage: fargate custom run [options] <script> <stage>",
    ],
    [
      "custom prepare a",
      "fargate custom prepare: too many arguments for 'prepare'. Expected 0 arguments but got 1; usage: " +
        "fargate custom prepare [options]",
    ],
  ])("fargate lists the valid choices in one line for %j", async (line, message) => {
    const { code, stdout, stderr } = await fargate(line.split(" "), { env: { SYSTEM_FAILURE_EXIT_CODE: "77" } });
    expect({ code, stdout: stdout.toString() }).toEqual({ code: 77, stdout: "" });
    expect(stderr.replace(/^\S+Z error: /, "")).toBe(`${message}\n`);
  });

  testProgram.each([
    ["", "fargate: no command was given; valid commands: custom, init, doctor, tasks, shell, sweep, runners, manager"],
    ["custom", "fargate custom: no command was given; valid commands: config, prepare, run, cleanup"],
  ])("fargate prints its help when it gets only %j", async (line, message) => {
    const words = line.split(" ").filter(Boolean);
    const { code, stdout, stderr } = await fargate(words, { env: { SYSTEM_FAILURE_EXIT_CODE: "77" } });
    const help = (await fargate([...words, "--help"])).stdout.toString();
    expect({ code, stdout: stdout.toString() }).toEqual({ code: 77, stdout: "" });
    expect(stderr.startsWith(help)).toBe(true);
    expect(stderr.slice(help.length).replace(/^\S+Z error: /, "")).toBe(`${message}\n`);
  });

  testProgram.each([
    [
      "--log-level loud custom config",
      "fargate: option '--log-level <level>' argument 'loud' is invalid; expected: trace, debug, info, warn, warning, " +
        "error, fatal, panic",
    ],
    [
      "custom config --log-format xml",
      "fargate: option '--log-format <format>' argument 'xml' is invalid; expected: text, text-simple, json",
    ],
    [
      "sweep --manager 0123456789abcdef",
      "fargate sweep: option '--manager <id>' argument '0123456789abcdef' is invalid; expected: 12 or 32 hex digits, " +
        "as in a task's startedBy: fargate-<id>-<job>",
    ],
  ])("fargate refuses the value in %j", async (line, message) => {
    const { code, stdout, stderr } = await fargate(line.split(" ").filter(Boolean));
    expect({ code, stdout: stdout.toString() }).toEqual({ code: 2, stdout: "" });
    expect(stderr.replace(/^\S+Z error: /, "")).toBe(`${message}\n`);
  });

  describe("loaded modules", () => {
    type Stage = "config" | "prepare" | "run" | "cleanup";
    const stages = {} as Record<Stage, Loaded>;
    let runners: Loaded;

    /** Packages that are not CommonJS: the bundler puts their text into the driver's own. */
    const ALWAYS = ["fastest-levenshtein", "smol-toml", "valibot"];
    const SSH2 = ["asn1", "safer-buffer", "ssh2"];
    const SDK = [
      "@aws-sdk/client-ecs",
      "@aws-sdk/core",
      "@aws-sdk/credential-provider-env",
      "@aws-sdk/credential-provider-node",
      "@aws-sdk/xml-builder",
      "@aws/lambda-invoke-store",
      "@smithy/core",
      "@smithy/fetch-http-handler",
      "@smithy/node-http-handler",
      "@smithy/signature-v4",
      "@smithy/types",
    ];

    beforeAll(async () => {
      const { command, loads, close } = await recordingProgram();
      const world = await makeWorld({ embedded: true });
      try {
        const scene = makeScene(world, {}, forever);
        const script = join(directory(), "script");
        fs.writeFileSync(script, "echo from the script");
        const run = async (stage: Stage, ...operands: string[]) => {
          const words = [...command, "--config", scene.config, "custom", stage, ...operands];
          const finished = await start(words, { env: scene.env }).finished;
          ended(finished, 0);
          stages[stage] = loads().at(-1) as Loaded;
          return finished.stdout.toString();
        };
        expect(JSON.parse(await run("config"))).toHaveProperty("driver");
        await run("prepare");
        expect(world.aws.running().length).toBe(1);
        expect(await run("run", script, "build_script")).toBe("from the script\n");
        await run("cleanup");
        expect(world.aws.running()).toEqual([]);
        const token = madeUpSecret("glrt-");
        const CONFIG_FILE = join(directory(), "config.toml");
        fs.writeFileSync(CONFIG_FILE, `[[runners]]\ntoken = "${token}"\n`, { mode: 0o600 });
        const MANAGERS_CONFIGS = JSON.stringify({ one: WORKER });
        const env = { MANAGERS_CONFIGS, GITLAB_RUNNER_TOKEN: token, CONFIG_FILE };
        ended(await start([...command, "runners"], { env }).finished, 0);
        runners = loads().at(-1) as Loaded;
        expect(loads().length).toBe(5);
      } finally {
        await world.close();
        close();
      }
    }, 120_000);

    test("config loads only the modules that it needs", () => {
      const { packages, builtins } = stages.config;
      expect(packages).not.toContain("ssh2");
      expect(packages).not.toContain("commander");
      expect(packages.join("\n")).not.toMatch(/@aws|@smithy/);
      for (const name of ["crypto", "net", "http", "https", "tls", "stream"]) expect(builtins).not.toContain(name);
      expect(packages).toEqual(ALWAYS);
      expect(builtins).toEqual(["fs", "os", "path", "timers/promises"]);
    });

    test("prepare loads only the modules that it needs", () => {
      const { packages, builtins } = stages.prepare;
      expect(packages).not.toContain("commander");
      expect(packages).not.toContain("@aws-sdk/client-ec2"); // only for tasks with public addresses
      expect(packages).toEqual([...SDK, ...SSH2, ...ALWAYS].sort());
      for (const name of ["dns", "child_process"]) expect(builtins).not.toContain(name);
      expect(builtins).toEqual([
        ..."assert buffer crypto events fs fs/promises http http2 https net os path process stream".split(" "),
        ..."timers/promises tls util zlib".split(" "),
      ]);
    });

    test("run loads only the modules that it needs", () => {
      const { packages, files, builtins } = stages.run;
      expect(packages.join("\n")).not.toMatch(/@aws|@smithy|commander/);
      for (const name of ["http", "https", "http2", "tls", "zlib", "child_process", "dns"])
        expect(builtins).not.toContain(name);
      expect(packages).toEqual([...SSH2, ...ALWAYS].sort());
      expect(builtins).toEqual("assert buffer crypto events fs net os path stream timers/promises util".split(" "));
      const ssh2 = files.filter((file) => file.startsWith("ssh2/")).join("\n");
      expect(ssh2).not.toMatch(/server|agent|SFTP|keygen|index/);
      expect(ssh2).toBe(
        [
          "ssh2/lib/Channel.js",
          "ssh2/lib/client.js",
          "ssh2/lib/protocol/Protocol.js",
          "ssh2/lib/protocol/constants.js",
          "ssh2/lib/protocol/crypto.js",
          "ssh2/lib/protocol/handlers.js",
          "ssh2/lib/protocol/handlers.misc.js",
          "ssh2/lib/protocol/kex.js",
          "ssh2/lib/protocol/keyParser.js",
          "ssh2/lib/protocol/utils.js",
          "ssh2/lib/protocol/zlib.js",
          "ssh2/lib/utils.js",
          "ssh2/package.json",
        ].join("\n"),
      );
    });

    test("cleanup loads only the modules that it needs", () => {
      const { packages, builtins } = stages.cleanup;
      for (const name of ["ssh2", "commander", "@aws-sdk/client-ec2"]) expect(packages).not.toContain(name);
      for (const name of ["net", "child_process"]) expect(builtins).not.toContain(name);
      expect(packages).toEqual([...SDK, ...ALWAYS].sort());
      expect(builtins).toEqual(
        "crypto fs fs/promises http2 https os path process stream timers/promises zlib".split(" "),
      );
    });

    test("runners alone loads the writer of TOML", () => {
      // The reader is another copy, whose text is part of the driver's own.
      const writer = "smol-toml/dist/index.cjs";
      expect(runners.files).toContain(writer);
      for (const { files } of Object.values(stages)) expect(files).not.toContain(writer);
    });

    test("fixtures/loaded-modules.ts refuses a program in an unknown format", () => {
      expect(() => recordLoads("console.log(1)", "log")).toThrow("has no body of @aws-sdk/client-ec2");
    });
  });
});

testSecrets();
