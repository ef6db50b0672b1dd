/**
 * The driver's tests, in the order of its sections: by value, then real scripts through the real SSH code in a
 * container, then the compiled program as GitLab Runner calls it.
 */
import { execFileSync, spawn, spawnSync } from "node:child_process";
import { createHash, randomBytes } from "node:crypto";
import * as fs from "node:fs";
import { createServer } from "node:http";
import { connect as connectTcp, createServer as createTcpServer, type Socket } from "node:net";
import { hostname, networkInterfaces, uptime } from "node:os";
import { basename, join, relative as relativePath } from "node:path";
import { PassThrough, Writable } from "node:stream";
import { promisify } from "node:util";
import {
  DescribeNetworkInterfacesCommand,
  EC2Client,
  type EC2ClientResolvedConfig,
  type ServiceInputTypes as Ec2Input,
  type ServiceOutputTypes as Ec2Output,
} from "@aws-sdk/client-ec2";
import {
  DescribeTasksCommand,
  ECSClient,
  type ECSClientResolvedConfig,
  type ServiceInputTypes as EcsInput,
  type ServiceOutputTypes as EcsOutput,
  ListTasksCommand,
  RunTaskCommand,
  type RunTaskCommandInput,
  StopTaskCommand,
  type Task,
} from "@aws-sdk/client-ecs";
import { configureSync, getLogger, type LogRecord } from "@logtape/logtape";
import { type AwsStub, mockClient } from "aws-sdk-client-mock";
import fc from "fast-check";
import { Server as SshServerOfAPacket, utils } from "ssh2";
import * as v from "valibot";
import {
  afterAll,
  afterEach,
  beforeAll,
  beforeEach,
  describe,
  expect,
  onTestFinished,
  type TaskMeta,
  test,
} from "vitest";
import { judgeAudit } from "./.ci/audit.ts";
import { writeSums } from "./.ci/build.ts";
import { licenceFaults, licenceOf, packagesOf } from "./.ci/licences.ts";
import {
  adviceFor,
  announce,
  awsFailure,
  type Cause,
  CONTAINER,
  type Config,
  ConfigSchema,
  type Connection,
  type Context,
  cleanup as cleanupStage,
  configAnswer,
  connect as connectOnce,
  exitCode,
  explainStop,
  Failure,
  findShells,
  formatRecord,
  formatSweep,
  holdersOf,
  interfaceOf,
  interpreterOf,
  type Job,
  keyPairOf,
  makeKeyPair,
  managerId,
  type Outcome,
  openDirectory,
  Preamble,
  type Problem,
  parseCommandLine,
  pauseAfter,
  pollPause,
  prepare as prepareStage,
  readConfig,
  readJob,
  readRecord,
  recognize,
  remainsOf,
  remoteProgram,
  retry,
  run,
  runScript as runScriptOnce,
  run as runStage,
  runTaskInput,
  type SshTarget,
  type SweepReport,
  stopCause,
  sweep,
  type TaskRecord,
  unreadVariables,
  usersOf,
  writeRecord,
} from "./fargate.ts";
import type { FaultAction, StopCause } from "./fixtures/aws.ts";
import { makeAuthority } from "./fixtures/certificates.ts";
import { atDebug, DebugFilter, DriverOutput, type LogFormat } from "./fixtures/debug.ts";
import { addRow, compareWithReadme, type FaultRow, normalise, writeTable } from "./fixtures/faults.ts";
import {
  type Answer,
  almostJson,
  answerTo,
  commandLine,
  configText,
  DRIVERS_OWN,
  exitCodeText,
  forAny,
  forAnyAtOnce,
  fuzzBanner,
  fuzzRuns,
  harmlessScript,
  hugeConfigs,
  isWhole,
  type Junk,
  junk,
  makeJunk,
  oddAddress,
  repositoryAddress,
  shellSoup,
  startEndpoint,
} from "./fixtures/fuzz.ts";
import { type AttackName, attacks, hostileHosts, startHostileSshServer } from "./fixtures/hostile-ssh.ts";
import { awkwardVariables, gitlabJob, proofOfArrival } from "./fixtures/job.ts";
import { runLoad } from "./fixtures/load.ts";
import { driver, type Finished, fargate, type Started, start } from "./fixtures/process.ts";
import { startConnectProxy, startProxy } from "./fixtures/proxy.ts";
import { Runner } from "./fixtures/runner.ts";
import { SecretSearch, tagsOf, wholeRun } from "./fixtures/secrets.ts";
import { type Misbehaviour, type SshServer, startSshServer } from "./fixtures/ssh-server.ts";
import {
  enumerateSteps,
  isPiece,
  type StepOptions,
  type StepResult,
  stepTable,
  stepTiming,
  straceWorks,
} from "./fixtures/steps.ts";
import {
  type ContainerHostsOptions,
  containerHosts,
  DROPBEAR,
  embeddedHosts,
  NEWER_BASE_IMAGE,
  ONE_SESSION,
  ONLY_ED25519,
  type TaskHosts,
  taskHosts,
} from "./fixtures/tasks.ts";
import {
  type ConfigChanges,
  makeRepository,
  makeWorld,
  projectRoot,
  scratchDirectory,
  type World,
  type WorldOptions,
} from "./fixtures/world.ts";

/** Debian packages that the tests need in the worker image. */
const PACKAGES = ["busybox", "tini"];
const scratch = scratchDirectory("test");
const repository = makeRepository(scratch.path);
let hosts: TaskHosts;
let directories = 0;

/** Ends the search for secrets, which looks at all that the tests bring about. */
let endSearch = () => {};

beforeAll(async () => {
  endSearch = wholeRun.begin();
  const made = await taskHosts({ mounts: [scratch.path], packages: PACKAGES });
  hosts = made.hosts;
  if (made.fallback) console.log(`the tests of containers run against the embedded SSH server: ${made.fallback}`);
});
afterAll(async () => {
  await hosts?.close();
  endSearch();
  scratch.close();
  // Where only some tests were selected, the one that tells was not: see "secrets over the whole run".
  expect(wholeRun.findings).toEqual([]);
});

/** The same, with each error that comes of it searched for secrets. */
function searched<A extends unknown[], T>(what: string, call: (...args: A) => Promise<T>): (...args: A) => Promise<T> {
  return (...args) =>
    call(...args).catch((error) => {
      wholeRun.error(what, error);
      throw error;
    });
}
const prepare = searched("prepare", prepareStage);
const cleanup = searched("cleanup", cleanupStage);
const connect = searched("connect", connectOnce);
const runScript = searched("runScript", runScriptOnce);

/** Takes log records of this process, down to debug, and has them searched for secrets. */
const searchRecord = (record: LogRecord) =>
  wholeRun.logRecord(formatRecord(record, "text"), formatRecord(record, "json"));

/** A new directory of this test's own. */
function directory(): string {
  const path = join(scratch.path, String(directories++));
  fs.mkdirSync(path);
  return path;
}

/** A test whose task runs in a container where there is Docker; the run's last lines count them. */
function taskTest(name: string, body: () => Promise<void>, { timeout = 60_000, containerOnly = false } = {}): void {
  test(
    name,
    async ({ task, skip }) => {
      if (containerOnly && hosts.kind !== "container") skip("it needs a container");
      task.meta.hosts = hosts.kind;
      await body();
    },
    timeout,
  );
}

/** A stream that keeps what is written to it. */
const collect = () => {
  const chunks: Buffer[] = [];
  const sink = new Writable({
    write(chunk: Buffer, _, done) {
      chunks.push(Buffer.from(chunk));
      done();
    },
  });
  return { sink, bytes: () => Buffer.concat(chunks) };
};

const configFile = (name: string) => fs.readFileSync(join(projectRoot, "fixtures", "config", `${name}.toml`), "utf8");
const thrown = (call: () => unknown): Error => {
  try {
    call();
  } catch (error) {
    wholeRun.error("a call", error);
    return error as Error;
  }
  throw new Error("nothing was thrown");
};

// ---------------------------------------------------------------------------------------------------------
// 2. Failures
// ---------------------------------------------------------------------------------------------------------

describe("failures", () => {
  /** What AWS answers to RunTask: an exception of that name with that message. */
  const refusal = (name: string, message: string) =>
    awsFailure("ecs:RunTask", Object.assign(new Error(message), { name, $metadata: { httpStatusCode: 400 } })).cause;
  const stopped = (stoppedReason: string, stopCode: Task["stopCode"] = "TaskFailedToStart") =>
    stopCause({ stopCode, stoppedReason });
  const user = "User: arn:aws:sts::123456789012:assumed-role/x/i-0";

  // Texts are AWS's own, as its documentation and public reports quote them.
  test.each<[problem: Problem, cause: Cause]>([
    // An error's name decides.
    ["throttled", refusal("ThrottlingException", "Rate exceeded")],
    ["provisioning", refusal("LimitExceededException", "Tasks provisioning capacity limit exceeded.")],
    [
      "accessDenied",
      refusal("AccessDeniedException", `${user} is not authorized to perform: ecs:RunTask on resource: y`),
    ],
    ["credentials", refusal("ExpiredTokenException", "The security token included in the request is expired")],
    ["credentials", refusal("InvalidSignatureException", "The request signature we calculated does not match")],
    ["clock", refusal("InvalidSignatureException", "Signature expired: 20191209T104625Z is now earlier than x")],
    ["account", refusal("BlockedException", "Your Amazon Web Services account was blocked.")],
    ["cluster", refusal("ClusterNotFoundException", "Cluster not found.")],
    ["platform", refusal("PlatformUnknownException", "The specified platform does not exist.")],
    ["platform", refusal("PlatformTaskDefinitionIncompatibilityException", "x")],
    ["unsupported", refusal("UnsupportedFeatureException", "The specified task isn't supported in this Region.")],
    // ClientException and InvalidParameterException: how the message begins.
    ["definition", refusal("ClientException", "TaskDefinition not found.")],
    ["definition", refusal("InvalidParameterException", "TaskDefinition is inactive")],
    ["incompatible", refusal("InvalidParameterException", "Task definition does not support launch_type FARGATE.")],
    [
      "networkMode",
      refusal(
        "InvalidParameterException",
        "Network Configuration is not valid for the given networkMode of this task definition.",
      ),
    ],
    [
      "container",
      refusal("InvalidParameterException", "Override for container named x is not a container in the TaskDefinition."),
    ],
    ["secret", refusal("ClientException", "The secret name must be unique and not shared with any new or existing x")],
    [
      "fargateOnly",
      refusal("InvalidParameterException", "The platform version must be null when specifying an EC2 launch type."),
    ],
    ["publicIp", refusal("InvalidParameterException", "Assign public IP is not supported for this launch type.")],
    [
      "taskRole",
      refusal(
        "InvalidParameterException",
        "The execute command failed because a valid task role is not being used. Specify a valid task role.",
      ),
    ],
    [
      "capacityProvider",
      refusal(
        "InvalidParameterException",
        "The specified capacity provider strategy cannot contain a capacity provider that is not associated with x",
      ),
    ],
    ["launchType", refusal("InvalidParameterException", "No Container Instances were found in your cluster.")],
    [
      "assumeRole",
      refusal("ClientException", "ECS was unable to assume the role 'arn' that was provided for this task."),
    ],
    ["linkedRole", refusal("InvalidParameterException", "Unable to assume the service linked role. Please verify x")],
    ["provisioning", refusal("ClientException", "Tasks provisioning capacity limit exceeded.")],
    ["capacity", refusal("ClientException", "Capacity is unavailable at this time. Please try again later")],
    [
      "throttled",
      refusal(
        "InvalidParameterException",
        "Error retrieving subnet information for [subnet-1]: Request limit exceeded. (ErrorCode: RequestLimitExceeded)",
      ),
    ],
    [
      "network",
      refusal(
        "InvalidParameterException",
        "Error retrieving subnet information for [subnet-1]: The subnet ID 'subnet-1' does not exist " +
          "(ErrorCode: InvalidSubnetID.NotFound)",
      ),
    ],
    // Reasons of failures.
    ["quota", recognize("", "You\u2019ve reached the limit on the number of vCPUs you can run concurrently")],
    ["quota", recognize("", "You've reached the limit on the number of tasks you can run concurrently")],
    ["taskSize", recognize("", "The requested MEMORY configuration is above your limit.")],
    ["instances", recognize("", "RESOURCE:MEMORY")],
    ["instances", recognize("", "AGENT")],
    ["addresses", recognize("", "RESOURCE:ENI")],
    ["placement", recognize("", "ATTRIBUTE")],
    ["location", recognize("", "LOCATION")],
    // Tasks that do not start.
    ["awsFault", stopped("Timeout waiting for network interface provisioning to complete.")],
    [
      "awsFault",
      stopped("Unexpected EC2 error while attempting to Create Network Interface in subnet 'x': AuthFailure"),
    ],
    [
      "awsFault",
      stopped("ResourceInitializationError: failed to configure ENI: failed to setup regular eni: netplugin"),
    ],
    [
      "addresses",
      stopped("Unexpected EC2 error while attempting to Create Network Interface: InsufficientFreeAddressesInSubnet"),
    ],
    [
      "interfaces",
      stopped("Unexpected EC2 error while attempting to Create Network Interface: NetworkInterfaceLimitExceeded"),
    ],
    ["network", stopped("Unexpected EC2 error while attempting to Create Network Interface: InvalidSubnetID.NotFound")],
    [
      "pullRate",
      stopped("CannotPullContainerError: ref pull has been retried 1 time(s): toomanyrequests: You have reached"),
    ],
    ["pullSpace", stopped("CannotPullContainerError: write /var/lib/containerd/x: no space left on device")],
    ["architecture", stopped("CannotPullContainerError: does not contain descriptor matching platform 'linux/amd64'")],
    ["architecture", stopped("CannotStartContainerError: OCI runtime create failed: exec /bin/x: exec format error")],
    [
      "pull",
      stopped("CannotPullContainerError: pull image manifest has been retried: failed to resolve ref x: not found"),
    ],
    [
      "executionRole",
      stopped("CannotPullECRContainerError: AccessDeniedException: x is not authorized to perform: ecr:Get"),
    ],
    [
      "executionRole",
      stopped(
        "ResourceInitializationError: unable to pull secrets or registry auth: AccessDeniedException: User: x is not " +
          "authorized to perform: secretsmanager:GetSecretValue on resource: y",
      ),
    ],
    [
      "missing",
      stopped("ResourceInitializationError: unable to pull secrets or registry auth: ResourceNotFoundException"),
    ],
    ["missing", stopped("ResourceInitializationError: failed to validate logger args: ResourceNotFoundException: x")],
    ["route", stopped("ResourceInitializationError: unable to pull secrets or registry auth: i/o timeout")],
    [
      "efsName",
      stopped(
        'ResourceInitializationError: failed to invoke EFS utils commands to set up EFS volumes: stderr: Failed to resolve "x"',
      ),
    ],
    [
      "efsPort",
      stopped(
        "ResourceInitializationError: failed to invoke EFS utils commands to set up EFS volumes: stderr: b'mount.nfs4: Connection timed out'",
      ),
    ],
    [
      "efsAccess",
      stopped(
        "ResourceInitializationError: failed to invoke EFS utils commands to set up EFS volumes: stderr: b'mount.nfs4: access denied by server",
      ),
    ],
    [
      "command",
      stopped("CannotStartContainerError: ResourceInitializationError: failed to create new container runtime task"),
    ],
    ["volume", stopped("CannotCreateVolumeError: unable to copy contents to volume on host")],
    // Tasks that stop.
    ["spot", stopped("Your Spot Task was interrupted.", "SpotInterruption")],
    ["spot", stopped("Your Spot Task was interrupted.", "TerminationNotice")],
    [
      "host",
      stopped("ECS is performing maintenance on the underlying infrastructure hosting the task.", "TerminationNotice"),
    ],
    ["exited", stopped("Essential container in task exited", "EssentialContainerExited")],
    ["unhealthy", stopped("Task failed container health checks", "ServiceSchedulerInitiated")],
    ["awsFault", stopped("InternalError: Unable to create the container", "TaskFailedToStart")],
    ["awsFault", stopped("DockerTimeoutError: Could not transition to started; timed out after waiting 3m0s")],
    ["clock", refusal("RequestExpired", "Request has expired.")],
    ["ownStop", stopped("fargate sweep: it is past its deadline", "UserInitiated")],
    ["userStop", stopped("Task stopped by user", "UserInitiated")],
    [
      "memory",
      stopCause({
        stopCode: "EssentialContainerExited",
        stoppedReason: "Essential container in task exited",
        containers: [{ name: CONTAINER, reason: "OutOfMemoryError: Container killed due to memory usage" }],
      }),
    ],
  ])("%s is recognized in AWS's answer, %j", (problem, cause) => {
    expect(cause.problem).toBe(problem);
    expect(adviceFor(cause)).toMatch(/^[a-z].{10,110}$/);
  });

  test("words that somebody else has chosen are not recognized as AWS's", () => {
    const capacity = "Capacity is unavailable at this time";
    const denied = `${user} is not authorized to perform: ecs:RunTask on resource: arn:aws:ecs:r:1:task-definition/`;
    for (const planted of ["InterfaceLimitExceeded", "Capacity is unavailable at this time", "RESOURCE:ENI"])
      expect(refusal("AccessDeniedException", `${denied}${planted}:1`).problem).toBe("accessDenied");
    expect(stopped(capacity, "UserInitiated").problem).toBe("userStop");
    // A path that a task definition may name.
    const mount = "ResourceInitializationError: failed to invoke EFS utils commands: mount.nfs4: mounting fs-1:";
    expect(stopped(`${mount}/configure ENI failed, reason given by server: No such file`).problem).toBe("efsAccess");
    expect(refusal("ClientException", `Invalid value: ${capacity}`).problem).toBeUndefined();
    const unknown = new Failure("system", `the server says "${capacity}"`);
    expect(adviceFor(unknown.cause)).toBeUndefined();
  });

  test("the advice names the action that IAM refuses", () => {
    const cause = refusal("AccessDeniedException", `${user} is not authorized to perform: iam:PassRole on resource: x`);
    expect(adviceFor(cause)).toBe("allow iam:PassRole in the IAM policy of the runner's host");
    expect(adviceFor({ problem: "accessDenied" })).toBe("allow this action in the IAM policy of the runner's host");
  });

  test("end with the exit codes that the runner gave, else with 1 and 2", () => {
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

  test.each(["manual", "guide-2020", "guide", "guide-private"])("the documented file %s is accepted", (name) => {
    const { config, warnings } = read(name);
    expect(warnings).toEqual([]);
    expect(config.SSH.Username).toBe("root");
    expect(config.SSH.Port).toBe(22);
    expect(config.Fargate.EnablePublicIP).toBe(name === "guide" || name === "guide-2020");
  });

  test("the official driver's looser spellings mean the same", () => {
    const loose = read("loose");
    const exact = read("manual").config;
    expect(loose.config).toEqual({ ...exact, LogLevel: "warning", LogFormat: "text-simple" });
    expect(loose.warnings).toEqual([
      expect.stringMatching(/^loose\.toml: unknown key SomethingOfOurs; the nearest known one is /),
      "loose.toml: unknown key Fargate.Plattform; the nearest known one is Fargate.PlatformVersion",
      expect.stringMatching(/^loose\.toml: unknown key Other; the nearest known one is /),
    ]);
  });

  test("a key that stands twice in different spellings counts as its exact spelling says", () => {
    const twice = configFile("guide").replace("Port = 22", "port = 1\nPort = 2\nPORT = 3");
    const { config, warnings } = readConfig(twice, "x", {}, {});
    expect(config.SSH.Port).toBe(2);
    expect(warnings).toEqual([
      "x: SSH.port has no effect beside SSH.Port",
      "x: SSH.PORT has no effect beside SSH.Port",
    ]);
  });

  test("what is no table is named, and what is given as blanks is not given", () => {
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

  test("port 0 is no port given", () => {
    expect(readConfig(configFile("guide").replace("Port = 22", "Port = 0"), "x", {}, {}).config.SSH.Port).toBe(22);
  });

  test("every setting reaches the configuration", () => {
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

  test("option beats variable beats file", () => {
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

  test("relative paths in the file start from its directory, --log-file from the working directory", () => {
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

  test("a variable may name the task definition that the file leaves out", () => {
    const file = configFile("manual").replace(/.*TaskDefinition.*\n/, "");
    const env = { CUSTOM_ENV_FARGATE_TASK_DEFINITION: "from-variable" };
    expect(readConfig(file, "x", {}, env).config.Fargate.TaskDefinition).toBe("from-variable");
    expect(thrown(() => readConfig(file, "x", {}, {})).message).toContain("Fargate.TaskDefinition is missing");
  });

  test("all problems are reported at once: the key, what is wrong, what is expected", () => {
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
        "TaskMetadata.Directory",
        "SSH.Username",
        "SSH.Port",
        "SSH.KeyType",
        "SSH.ConnectTimeout",
        "SSH.KeepAliveInterval",
        "SSH.CancelGracePeriod",
        "SSH.PassEnvironment.1",
      ].sort(),
    );
    expect(problems).toContain("  Fargate.Cluster is missing; expected: the name or ARN of the ECS cluster");
    expect(problems).toContain(
      "  SSH.Port is 70000; expected: the port of the task's SSH server, a whole number from 1 to 65535",
    );
    for (const line of problems) expect(line).toMatch(/; expected: \S|: give either|: cannot be given/);
  });

  test("PassEnvironment takes names and patterns of variables", () => {
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

  test("CancelGracePeriod is a whole number from 0 to 240", () => {
    const withPeriod = (value: string) => `${configFile("guide")}\n  CancelGracePeriod = ${value}\n`;
    for (const good of [0, 240])
      expect(readConfig(withPeriod(`${good}`), "x", {}, {}).config.SSH.CancelGracePeriod).toBe(good);
    for (const bad of ["-1", "241", "1.5", '"10"'])
      expect(thrown(() => readConfig(withPeriod(bad), "x", {}, {})).message).toContain("SSH.CancelGracePeriod");
  });

  test("LaunchType and CapacityProviderStrategy exclude each other", () => {
    const file = `${configFile("full")}`.replace("[Fargate]", '[Fargate]\nLaunchType = "FARGATE"');
    expect(thrown(() => readConfig(file, "x", {}, {})).message).toContain(
      "Fargate.LaunchType: cannot be given together with CapacityProviderStrategy",
    );
  });

  const ours = "arn:aws:ecs:us-east-2:123456789012";
  test.each<[asked: string, allowed: boolean, file?: Record<string, string>]>([
    ["family", true],
    ["family:3", true],
    ["famil", false],
    ["family-2", false],
    ["Family", false],
    ["ci-", true],
    ["ci-build", true],
    ["ci-build:12", true],
    ["ci-build:12:3", false],
    ["ci-a/b", false],
    ["x-ci-build", false],
    ["build:7", true],
    ["build:70", false],
    ["build", false],
    ["build:07", false],
    ["tool-x:4", true],
    ["tool-x", false],
    ["family:", false],
    ["family:latest", false],
    ["family\nother", false],
    ["family\u0000", false],
    ["fämily", false],
    [`${"ci-".repeat(2_000)}`, false],
    // An ARN: with none configured there is no account to compare with.
    [`${ours}:task-definition/family:1`, false],
    [`${ours}:task-definition/family:1`, true, { Cluster: `${ours}:cluster/c` }],
    [`${ours}:task-definition/family:1`, true, { TaskDefinition: `${ours}:task-definition/default:1` }],
    [`${ours}:task-definition/other:1`, false, { Cluster: `${ours}:cluster/c` }],
    [`${ours}:task-definition/build:7`, true, { Cluster: `${ours}:cluster/c` }],
    [`${ours}:task-definition/build:8`, false, { Cluster: `${ours}:cluster/c` }],
    [`${ours}:task-definition/ci-a/b:1`, false, { Cluster: `${ours}:cluster/c` }],
    [`${ours}:cluster/family`, false, { Cluster: `${ours}:cluster/c` }],
    ["arn:aws:ecs:us-east-1:123456789012:task-definition/family:1", false, { Cluster: `${ours}:cluster/c` }],
    ["arn:aws-cn:ecs:us-east-2:123456789012:task-definition/family:1", false, { Cluster: `${ours}:cluster/c` }],
    ["arn:aws:ecs:us-east-2:210987654321:task-definition/family:1", false, { Cluster: `${ours}:cluster/c` }],
    ["arn:aws:ecs:us-east-2::task-definition/family:1", false, { Cluster: `${ours}:cluster/c` }],
    ["arn:aws:ec2:us-east-2:123456789012:task-definition/family:1", false, { Cluster: `${ours}:cluster/c` }],
    ["ARN:aws:ecs:us-east-2:123456789012:task-definition/family:1", false, { Cluster: `${ours}:cluster/c` }],
    [
      "arn:aws:ecs:us-east-2:123456789012:task-definition/family:1",
      false, // the partition is the cluster's
      {
        Cluster: "arn:aws-us-gov:ecs:us-east-2:123456789012:cluster/c",
        TaskDefinition: `${ours}:task-definition/default:1`,
      },
    ],
  ])("AllowedTaskDefinitions: a job that names %j may: %j %j", (asked, allowed, file = {}) => {
    const values = { Cluster: "c", Region: "us-east-2", TaskDefinition: "default", ...file };
    const given = Object.entries(values).map(([key, value]) => `  ${key} = "${value}"\n`);
    const patterns = '  AllowedTaskDefinitions = ["family", "ci-*", "build:7", "*ol-*:4"]\n';
    const text = configFile("guide").replace(/^ *(Cluster|Region|TaskDefinition) .*\n/gm, "");
    const config = text.replace("[Fargate]\n", `[Fargate]\n${patterns}${given.join("")}`);
    const env = { CUSTOM_ENV_FARGATE_TASK_DEFINITION: asked };
    const { refusal } = readConfig(config, "x", {}, env);
    if (allowed) expect(refusal).toBeUndefined();
    else
      expect(refusal).toMatch(/^FARGATE_TASK_DEFINITION of this job, [\s\S]*, is not allowed: (an ARN must|Allowed)/);
    // An operator's choice is not asked about, and without the setting nobody's is.
    expect(readConfig(config, "x", { TaskDefinition: asked }, env).refusal).toBeUndefined();
    expect(readConfig(config, "x", {}, {}).refusal).toBeUndefined();
    expect(readConfig(config.replace(patterns, ""), "x", {}, env).refusal).toBeUndefined();
  });

  test("AllowedTaskDefinitions may allow nothing; what is no list of patterns is refused, and never taken for no setting", () => {
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
      "FARGATE_TASK_DEFINITION of this job, family, is not allowed: AllowedTaskDefinitions has none",
    );
    for (const bad of ['""', '"family"', "true", '[""]', '["a/b"]', '["a:b"]', '["a*b*c*d*e"]', '["(a|b)"]', "[3]"])
      expect(thrown(() => read(bad)).message).toMatch(/Fargate\.AllowedTaskDefinitions\S* is .*; expected: .*family/);
  });

  test.each<[list: string | undefined, asked: string, refusal?: string]>([
    [undefined, "9.9.9"],
    ['["1.4.0", "LATEST"]', "1.4.0"],
    ['["1.4.0", "LATEST"]', " LATEST "],
    ['["1.4.0", "LATEST"]', "latest", "latest, is not allowed: AllowedPlatformVersions has 1.4.0, LATEST"],
    ['["1.4.0", "LATEST"]', "1.4.0\n", undefined],
    ['["1.*"]', "1.4.0", "1.4.0, is not allowed: AllowedPlatformVersions has 1.*"],
    ["[]", "1.4.0", "1.4.0, is not allowed: AllowedPlatformVersions has none"],
    ["[]", "x".repeat(5_000), `${"x".repeat(300)}, is not allowed: AllowedPlatformVersions has none`],
  ])("AllowedPlatformVersions = %s, and a job asks for %j", (list, asked, refusal) => {
    const text = configFile("guide").replace(/^ *PlatformVersion .*\n/m, "");
    const file = list ? text.replace("[Fargate]\n", `[Fargate]\n  AllowedPlatformVersions = ${list}\n`) : text;
    const env = { CUSTOM_ENV_FARGATE_PLATFORM_VERSION: asked };
    expect(readConfig(file, "x", {}, env).refusal).toBe(refusal && `FARGATE_PLATFORM_VERSION of this job, ${refusal}`);
    // The operator's own choice, and a job that chooses none, are not asked about.
    const other = { CUSTOM_ENV_FARGATE_TASK_DEFINITION: "any" };
    expect(readConfig(file, "x", { PlatformVersion: asked }, { ...env, ...other }).refusal).toBeUndefined();
    expect(readConfig(file, "x", {}, other).refusal).toBeUndefined();
  });

  test("AllowedPlatformVersions that is no list of versions is refused, and never taken for no setting", () => {
    const read = (value: string) => {
      const file = configFile("guide").replace("[Fargate]\n", `[Fargate]\nAllowedPlatformVersions = ${value}\n`);
      return readConfig(file, "x", {}, {});
    };
    for (const bad of ['""', '"LATEST"', "true", '[""]', "[3]"])
      expect(thrown(() => read(bad)).message).toMatch(/Fargate\.AllowedPlatformVersions\S* is .*; expected: .*1\.4\.0/);
  });

  test("a job's variable that nothing reads is reported, with the name that it may misspell", () => {
    const reportOn = (...names: string[]) =>
      unreadVariables(Object.fromEntries(names.map((name) => [`CUSTOM_ENV_${name}`, "x"])));
    const meant = (name: string, known: string) => [{ name, meant: known }];
    for (const name of [
      "FARGATE_TASK_DEFINITON",
      "FARGATE_TASKDEFINITION",
      "FARGATE_TASK_DEFINITIONS",
      "FARGTE_TASK_DEFINITION",
    ])
      expect(reportOn(name)).toEqual(meant(name, "FARGATE_TASK_DEFINITION"));
    expect(reportOn("FARGATE_PLATFORM_VERSON")).toEqual(meant("FARGATE_PLATFORM_VERSON", "FARGATE_PLATFORM_VERSION"));
    // As the driver sees it, but set by the job's author.
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
    // Of the manager's own environment, no variable is the job's.
    expect(unreadVariables({ FARGATE_TASK_DEFINITON: "x", FARGATE_X: "x" })).toEqual([]);
  });

  test("a pattern full of stars does not hold up prepare", () => {
    const evil = configFile("guide").replace("[Fargate]\n", '[Fargate]\nAllowedTaskDefinitions = ["*a*a*b"]\n');
    expect(
      readConfig(evil, "x", {}, { CUSTOM_ENV_FARGATE_TASK_DEFINITION: "a".repeat(120_000) }).refusal,
    ).toBeDefined();
    expect(readConfig(evil, "x", {}, { CUSTOM_ENV_FARGATE_TASK_DEFINITION: "a".repeat(255) }).refusal).toBeDefined();
  });

  test("a syntax error is given with line and column", () => {
    const { message } = thrown(() => readConfig('[Fargate]\n  Cluster = "x"\n  Region = \n', "f.toml", {}, {}));
    expect(message).toMatch(/^f\.toml, line 3, column \d+: not TOML: /);
    expect(message).not.toContain("\n");
  });

  test("a byte order mark and Windows line ends do no harm", () => {
    const file = `\uFEFF${configFile("manual").replaceAll("\n", "\r\n")}`;
    expect(readConfig(file, "x", {}, {})).toEqual(read("manual"));
  });
});

// ---------------------------------------------------------------------------------------------------------
// 4. Logging
// ---------------------------------------------------------------------------------------------------------

describe("logging", () => {
  const record = (level: LogRecord["level"], message: unknown[], properties = {}): LogRecord => ({
    category: ["fargate"],
    level,
    message,
    rawMessage: "",
    properties,
    timestamp: Date.UTC(2026, 0, 2, 3, 4, 5, 678),
  });

  test("text carries the time, text-simple does not, json is one object a line", () => {
    const info = record("info", ["the task is ", "RUNNING", ""], { status: "RUNNING" });
    expect(formatRecord(info, "text")).toBe("2026-01-02T03:04:05Z the task is RUNNING\n");
    expect(formatRecord(info, "text-simple")).toBe("the task is RUNNING\n");
    expect(JSON.parse(formatRecord(info, "json"))).toEqual({
      time: "2026-01-02T03:04:05Z",
      level: "info",
      msg: "the task is RUNNING",
      status: "RUNNING",
    });
    expect(formatRecord(record("warning", ["x"]), "text-simple")).toBe("warning: x\n");
    expect(formatRecord(record("fatal", ["x"]), "text-simple")).toBe("error: x\n");
  });

  // What ends lines, moves the cursor, turns the direction of writing, hides, or is half a character.
  const hostile =
    'a\nb\r\u001b[0Ksection_start:1:x\u0085\u2028\u202e\u200b\u{e0041}\ud800"}\n{"level":"fatal","msg":"forged"}';

  test("text from outside cannot end a line, forge another or a section, nor control a terminal", () => {
    for (const format of ["text", "text-simple", "json"] as const) {
      const line = formatRecord(record("info", ["", hostile, ""], { hostile }), format);
      expect(line.endsWith("\n")).toBe(true);
      expect(line.slice(0, -1)).not.toMatch(/[\p{Cc}\p{Cf}\p{Co}\p{Cs}\p{Zl}\p{Zp}]/u);
      if (format === "json") {
        // The message is as in a text; the property holds what was there, escaped.
        const { level, msg, hostile: property } = JSON.parse(line);
        expect({ level, property }).toEqual({ level: "info", property: hostile });
        expect(msg).toMatch(/^a \| b\\u000d\\u001b\[0Ksection_start/);
      }
    }
  });

  test("a failure is printable, and only what the driver lists has lines of its own", () => {
    const failure = new Failure("system", `AWS said ${hostile}`, {}, [`one ${hostile}`, "two"]);
    expect(failure.message.split("\n")).toEqual([
      expect.stringMatching(/^AWS said a \| b/),
      expect.stringMatching(/^ {2}one a \| b/),
      "  two",
    ]);
    expect(failure.message.replaceAll("\n", "")).not.toMatch(/[\p{Cc}\p{Cf}\p{Co}\p{Cs}\p{Zl}\p{Zp}]/u);
    expect(new Failure("build", "x".repeat(1_000_000)).message.length).toBeLessThan(5_000);
    const long = "y".repeat(1_000_000);
    expect(formatRecord(record("info", ["", long, ""], { long }), "json").length).toBeLessThan(10_000);
  });
});

// ---------------------------------------------------------------------------------------------------------
// 5. The job
// ---------------------------------------------------------------------------------------------------------

describe("the job's identity", () => {
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

  test("without a response it is the official driver's", () => {
    const hash = sha256("https://gitlab.example.com/group/project-20-300");
    expect(readJob(variables)?.stem).toBe(`abc12345-${hash}`);
  });

  test("a response outweighs every variable, whatever is in it", () => {
    const JOB_RESPONSE_FILE = response();
    const hash = sha256(
      JSON.stringify(["https://gitlab.example.com/acme/rocket.git", 42, 4711, gitlabJob().response.token]),
    );
    const job = { stem: `job-4711-${hash}`, hash, title: "job 4711 of project 42", timeout: 3600, unused: [] };
    expect(readJob({ ...variables, JOB_RESPONSE_FILE })).toEqual(job);
    for (const name of [...Object.keys(variables), "CUSTOM_ENV_CI_BUILDS_DIR", "CUSTOM_ENV_JOB_RESPONSE_FILE"])
      for (const value of ["", "other", "../../x", "a\u0000b", "\u001b[0K\n", "x".repeat(5_000)])
        expect(readJob({ ...variables, JOB_RESPONSE_FILE, [name]: value })).toEqual(job);
  });

  test.each(["", "../../etc/x", "a/b", "a".repeat(33), "a\u0000b", "é"])("the label %j is not used", (token) => {
    const env = { ...variables, CUSTOM_ENV_CI_RUNNER_SHORT_TOKEN: token };
    expect(readJob(env)?.stem).toMatch(/^job-[0-9a-f]{64}$/);
  });

  test("host, project and id each make another job, the token in the address does not", () => {
    const stemOf = (changes: object) => readJob({ JOB_RESPONSE_FILE: response(changes) })?.stem;
    const address = (url: string) => ({ git_info: { ...gitlabJob().response.git_info, repo_url: url } });
    const own = stemOf(address("https://gitlab-ci-token:one@gitlab.example.com/a/b.git"));
    expect(stemOf(address("https://gitlab-ci-token:two@gitlab.example.com/a/b.git"))).toBe(own);
    const others = [
      stemOf(address("https://gitlab-ci-token:one@gitlab.example.org/a/b.git")),
      stemOf(address("http://gitlab-ci-token:one@gitlab.example.com/a/b.git")),
      stemOf(address("https://gitlab-ci-token:one@gitlab.example.com:8443/a/b.git")),
      // Two instances below one host name.
      stemOf(address("https://gitlab-ci-token:one@gitlab.example.com/other/a/b.git")),
      // One of them that lies about its address.
      stemOf({ ...address("https://gitlab-ci-token:one@gitlab.example.com/a/b.git"), token: "another" }),
      stemOf({ id: 1 }),
      stemOf({ job_info: { ...gitlabJob().response.job_info, project_id: 1 } }),
      own,
    ];
    expect(new Set(others).size).toBe(others.length);
  });

  test("of image and services only the names are read, and nothing depends on them", () => {
    const jobOf = (changes: object) => readJob({ JOB_RESPONSE_FILE: response(changes) });
    const none = jobOf({ image: { name: "" }, services: [] });
    const services = [{ name: "postgres:16", alias: "db" }, { name: "redis" }];
    expect(jobOf({ image: { name: "ruby:3.2" }, services })).toEqual({
      ...none,
      unused: ["ruby:3.2", "postgres:16", "redis"],
    });
    for (const odd of [null, 3, "ruby", [], {}, { name: 3 }, undefined])
      expect(jobOf({ image: odd, services: odd })).toEqual(none);
    expect(jobOf({ services: [null, { name: null }, "x", { name: "y" }] })?.unused).toEqual(["y"]);
  });

  test("a response that cannot be read is a failure, and no token of it is shown", () => {
    const broken = join(directory(), "response.json");
    fs.writeFileSync(broken, '{"token": "secret-token-1"');
    for (const [path, why] of [
      [broken, "it is not JSON"],
      [join(broken, "..", "none.json"), "ENOENT"],
      [response({ git_info: { repo_url: "secret-token-2" } }), "git_info.repo_url"],
      [response({ id: "4711" }), "id is missing or not as expected"],
    ]) {
      const { message } = thrown(() => readJob({ ...variables, JOB_RESPONSE_FILE: path }));
      expect(message).toContain(why);
      expect(message).not.toContain("secret-token");
    }
  });

  test("config's answer has the documented shape", () => {
    expect(configAnswer(undefined)).toBe('{"driver":{"name":"fargate","version":"dev (HEAD)"},"hostname":""}');
    expect(JSON.parse(configAnswer(readJob(variables), "ci-manager-1.example"))).toMatchObject({
      hostname: "ci-manager-1.example",
    });
    expect(readJob({})).toBeUndefined();
  });

  test("the host name in config's answer has no character that is special in a shell", () => {
    const nameFor = (host: string) => JSON.parse(configAnswer(readJob(variables), host)).hostname;
    expect(nameFor('$(id)`id`"\\!$HOME;a\nb_c é')).toBe("ididHOMEabc");
    expect(nameFor('$(`"')).toBe("");
    expect(nameFor(hostname())).toBe(JSON.parse(configAnswer(readJob(variables))).hostname);
  });
});

// ---------------------------------------------------------------------------------------------------------
// 6. Task record
// ---------------------------------------------------------------------------------------------------------

const someRecord: TaskRecord = {
  Version: 1,
  TaskARN: "arn:aws:ecs:us-east-2:123456789012:task/test-cluster/0123456789abcdef0123456789abcdef",
  ContainerIP: "10.0.0.1",
  PrivateKey: Buffer.from("key").toString("base64"),
  Cluster: "test-cluster",
  Region: "us-east-2",
  StartedBy: "fargate-0123456789ab-0123456789abcdef0123456789abcdef",
  ClientTokens: ["one"],
  Unanswered: false,
  HostKey: "",
  Interpreter: "bash",
  LoginShell: "bash",
  Deadline: 0,
  UpdatedAt: 1,
};

describe("the task record", () => {
  /** Advice that is harmless wherever `Directory` is, also /tmp, whose mode other programs need. */
  const ownDirectory = "use a directory of the driver's own with mode 0700, such as /opt/gitlab-runner/metadata";
  /** A path whose name says the job, as that in `someRecord`. */
  const recordIn = (where: string) => join(where, `job-1-${"0123456789abcdef".repeat(4)}.json`);

  test("comes back as written, for its owner alone, and leaves nothing beside it", () => {
    const path = recordIn(join(directory(), "records"));
    openDirectory(join(path, ".."));
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

  test("one that another could have written, read or put in its place is not used, nor what it says", () => {
    const path = recordIn(directory());
    const elsewhere = join(directory(), "x.json");
    const change = (make: () => void, why: RegExp, remains: boolean) => {
      fs.rmSync(path, { recursive: true, force: true });
      writeRecord(path, someRecord);
      expect(readRecord(path)).toEqual(someRecord);
      make();
      expect(thrown(() => readRecord(path)).message).toMatch(why);
      expect(remainsOf(path).TaskARN).toBe(remains ? someRecord.TaskARN : undefined);
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
      change(() => fs.chmodSync(path, mode), /its mode is 6.., and should/, true);
    for (const mode of [0o602, 0o620, 0o666])
      change(() => fs.chmodSync(path, mode), /its mode is 6.., and should/, false);
    change(
      () => writeRecord(path, { ...someRecord, StartedBy: `fargate-0123456789ab-${"f".repeat(32)}` }),
      /it is of another job$/,
      false,
    );
  });

  test("one that belongs to another user is not used, nor what it says", ({ skip }) => {
    if (process.geteuid?.() !== 0) return skip("only root can give files away");
    const path = recordIn(directory());
    writeRecord(path, someRecord);
    fs.chownSync(path, 12_345, 0);
    expect(thrown(() => readRecord(path)).message).toMatch(/it belongs to another user, of id 12345$/);
    expect(remainsOf(path).TaskARN).toBeUndefined();
    fs.chownSync(path, 0, 0);
    expect(readRecord(path)).toEqual(someRecord);
  });

  test("a directory that belongs to another user is a warning, a lock of another's counts for nothing", ({ skip }) => {
    if (process.geteuid?.() !== 0) return skip("only root can give files away");
    const where = directory();
    fs.chmodSync(where, 0o755);
    fs.chownSync(where, 12_345, 0);
    expect(openDirectory(where)).toBe(
      `TaskMetadata.Directory ${where} belongs to another user, of id 12345; ${ownDirectory}`,
    );
    const stem = `job-1-${"0123456789abcdef".repeat(4)}`;
    announce({ Directory: where }, stem, "run");
    expect(usersOf({ Directory: where }, Date.now())).toMatchObject([{ stem, stage: "run", lives: true }]);
    fs.chownSync(join(where, fs.readdirSync(where)[0] as string), 12_345, 0);
    expect(usersOf({ Directory: where }, Date.now())).toEqual([]);
  });

  test("a directory that anybody may write to is refused, one that its group may write to is a warning", () => {
    const where = join(directory(), "records");
    expect(openDirectory(where)).toBeUndefined();
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
        const { message } = thrown(() => openDirectory(where));
        expect(message).toBe(
          `TaskMetadata.Directory ${where} cannot be used: anybody may write to it; ${ownDirectory}`,
        );
      } else {
        const warning = `TaskMetadata.Directory ${where} can be written to by others; ${ownDirectory}`;
        expect(openDirectory(where)).toBe(verdict === "warning" ? warning : undefined);
      }
    }
  });

  test("one that is damaged, of another version or cannot be written is a failure that shows no key", () => {
    const path = join(directory(), "x.json");
    for (const content of ["", '{"PrivateKey": "c2VjcmV0"', '{"PrivateKey": "c2VjcmV0", "Version": 2}', "[]"]) {
      fs.writeFileSync(path, content, { mode: 0o600 });
      const { message } = thrown(() => readRecord(path));
      expect(message).toContain(path);
      expect(message).not.toContain("c2VjcmV0");
    }
    expect(thrown(() => writeRecord(join(path, "y.json"), someRecord)).message).toContain("cannot be written");
    expect(thrown(() => openDirectory(join(path, "y"))).message).toContain("cannot be made");
  });

  test("one manager has one identity, however many ask for it first", async () => {
    const where = directory();
    const script = `import {managerId} from ${JSON.stringify(join(projectRoot, "fargate.ts"))}; console.log(managerId(process.argv[1]))`;
    const asked = Array.from({ length: 8 }, () => start([process.execPath, "-e", script, where]).finished);
    const ids = (await Promise.all(asked)).map(({ stdout }) => stdout.toString().trim());
    expect(new Set(ids).size).toBe(1);
    expect(ids[0]).toMatch(/^[0-9a-f]{12}$/);
    expect(managerId(where)).toBe(ids[0]);
    expect(managerId(directory())).not.toBe(ids[0]);
    expect(fs.readdirSync(where)).toEqual([".manager-id"]);
    fs.writeFileSync(join(where, ".manager-id"), "../x\n");
    expect(thrown(() => managerId(where)).message).toContain("12 hex digits");
  });
});

// ---------------------------------------------------------------------------------------------------------
// 7. Keys
// ---------------------------------------------------------------------------------------------------------

describe("keys", () => {
  test.each([
    ["ed25519", "ssh-ed25519"],
    ["rsa", "ssh-rsa"],
  ] as const)("%s: the public half belongs to the private one, and no two are alike", async (type, name) => {
    const [one, other] = await Promise.all([makeKeyPair(type), makeKeyPair(type)]);
    expect(one.publicKey).toMatch(new RegExp(`^${name} [A-Za-z0-9+/=]+$`));
    expect(one.publicKey).not.toBe(other.publicKey);
    expect((await keyPairOf(one.privateKey)).publicKey).toBe(one.publicKey);
    // As OpenSSH sees it.
    const path = join(directory(), "key");
    fs.writeFileSync(path, one.privateKey, { mode: 0o600 });
    const { status, stdout } = spawnSync("ssh-keygen", ["-y", "-f", path], { encoding: "utf8" });
    if (status !== null) expect(stdout.trim()).toBe(one.publicKey);
  });

  test("a thousand ed25519 keys are whole, also those that begin with a zero byte", async () => {
    for (let n = 0; n < 1_000; n++) {
      const { publicKey } = await makeKeyPair("ed25519");
      // 4 + 11 bytes of the name, 4 of the length, 32 of the key.
      expect(Buffer.from(publicKey.split(" ")[1] as string, "base64").length).toBe(51);
    }
  });

  test("what is no private key is refused", async () => {
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

  test("is the official driver's for its file, plus startedBy and clientToken", () => {
    expect(input("guide")).toEqual({ ...official, ...identity });
  });

  test.each<[string, (config: Config) => void, Partial<RunTaskCommandInput>]>([
    ["PlatformVersion", (c) => (c.Fargate.PlatformVersion = "1.4.0"), { platformVersion: "1.4.0" }],
    ["LaunchType", (c) => (c.Fargate.LaunchType = "FARGATE"), { launchType: "FARGATE" }],
    [
      "CapacityProviderStrategy, always with a weight",
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
  ])("%s adds itself and nothing else", (_, change, added) => {
    expect(input("guide", change)).toEqual({ ...official, ...identity, ...added });
  });

  test("lists of subnets and security groups, private addresses, no override", () => {
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
  test("only what may pass is tried again, until the time is up", async () => {
    let time = 0;
    let calls = 0;
    const attempt = (again: boolean, succeedAt = Number.POSITIVE_INFINITY) =>
      retry(
        async () => {
          time += 1_000;
          if (++calls >= succeedAt) return calls;
          throw new Error(`call ${calls}`);
        },
        { until: 5_000, again: () => again, now: () => time },
      );
    await expect(attempt(true, 3)).resolves.toBe(3);
    [time, calls] = [0, 0];
    await expect(attempt(false)).rejects.toThrow("call 1");
    [time, calls] = [0, 0];
    await expect(attempt(true)).rejects.toThrow(/call [45]/);
  });

  test("a signal ends the repetitions with its reason", async () => {
    const stop = new AbortController();
    const endless = retry(() => Promise.reject(new Error("again")), {
      until: Number.POSITIVE_INFINITY,
      again: () => true,
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
    ["no credentials", { name: "CredentialsProviderError" }, false, false],
    ["no credentials, with metadata", { name: "CredentialsProviderError", $metadata: {} }, false, false],
    ["an untrusted certificate", { code: "SELF_SIGNED_CERT_IN_CHAIN", $metadata: {} }, false, false],
    ["a proxy's refusal", { code: "ERR_PROXY_TUNNEL", status: 403, $metadata: {} }, false, false],
    ["a proxy's failure", { code: "ERR_PROXY_TUNNEL", status: 502, $metadata: {} }, true, false],
    ["an answer that names a certificate", { code: "CERT_X", $metadata: { httpStatusCode: 500 } }, true, true],
    ["a name that is no text", { name: 7, message: {}, $metadata: { httpStatusCode: 400 } }, false, false],
  ])("%s: whether it is retried, and whether a task may have been started", (_, error, isRetryable, mayHaveStarted) => {
    const { cause } = awsFailure("ecs:RunTask", Object.assign(new Error("x"), error));
    expect(cause).toMatchObject({ operation: "ecs:RunTask", isRetryable, mayHaveStarted });
  });

  test("the pauses between starts begin at 2 s and grow when every placement has been tried", () => {
    expect([1, 2, 3, 4, 5, 50].map((attempts) => pauseAfter(attempts, 1) / 1000)).toEqual([2, 4, 8, 16, 20, 20]);
    expect([1, 3, 4, 6, 7].map((attempts) => pauseAfter(attempts, 3) / 1000)).toEqual([2, 2, 4, 4, 8]);
  });

  test("polling is quick at first, slower later, and slow once the address is known", () => {
    expect(pollPause(0, false, 0.5)).toBe(500);
    expect(pollPause(20, false, 0.5)).toBe(2_000);
    expect(pollPause(60, false, 0.5)).toBe(5_000);
    expect(pollPause(0, true, 0.5)).toBe(5_000);
    expect([pollPause(60, true, 0), pollPause(60, true, 1)]).toEqual([3_750, 6_250]);
    // Each throttled call makes it slower, to a limit.
    expect([pollPause(0, false, 0.5, 1), pollPause(0, false, 0.5, 100)]).toEqual([1_000, 10_000]);
    expect([pollPause(0, true, 0.5, 1), pollPause(0, true, 0.5, 100)]).toEqual([10_000, 30_000]);
  });

  test("a task's address is its IPv4 address, else its IPv6 address", () => {
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

  test("the reason why a task stopped is in AWS's words, with each container's exit", () => {
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
// 8 to 10 with ECS mocked: what prepare and cleanup ask of AWS, and what they do with its answers
// ---------------------------------------------------------------------------------------------------------

describe("prepare and cleanup, with ECS mocked", () => {
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
    configureSync({
      reset: true,
      sinks: {
        test: (record) => {
          searchRecord(record);
          if (record.level !== "debug") logged.push(formatRecord(record, "text-simple").trimEnd());
        },
      },
      loggers: [
        { category: "fargate", sinks: ["test"], lowestLevel: "debug" },
        { category: ["logtape", "meta"], sinks: [] },
      ],
    });
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
      byJob: [],
      log: getLogger("fargate"),
      env: {},
      stop: stop.signal,
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
  /** RunTask starts an SSH server that takes the key of its override; DescribeTasks goes through these states. */
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

  test("a task unknown at first, then provisioning, is logged in to as soon as its address is known", async () => {
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

  test("the record is on disk, with the token, before RunTask is called", async () => {
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
    // A refusal is an answer: there is nothing to look for.
    expect(ecs.commandCalls(ListTasksCommand)).toHaveLength(0);
  });

  test.each([
    ["forward", 3_600_000],
    ["back", -3_600_000],
  ])("a wall clock that is set %s by an hour whenever it is read changes no duration", async (_, step) => {
    let time = Date.now();
    const context = { ...contextOf((config) => (config.SSH.Port = 0)), wallTime: () => (time += step) };
    taskGoesThrough(context, undefined, taskIn("PROVISIONING"), taskIn("PENDING", "127.0.0.1"));
    await prepare(context);
    ecs.on(StopTaskCommand).rejectsOnce(awsError("ThrottlingException", "Rate exceeded")).resolves({});
    await cleanup(context);
    expect(inputs(StopTaskCommand)).toHaveLength(2);
    expect(fs.existsSync(recordFile())).toBe(false);
  });

  test("a deadline beyond the range of a timer does not end a run early, but does end it", async () => {
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

  test("an answer with failures and no task gives their reasons", async () => {
    ecs.on(RunTaskCommand).resolves({ tasks: [], failures: [{ reason: "ATTRIBUTE", detail: "none fits" }] });
    await expect(prepare(contextOf())).rejects.toThrow("ecs:RunTask started no task: ATTRIBUTE none fits");
    expect(ecs.commandCalls(StopTaskCommand)).toHaveLength(0);
  });

  test("a shortage is reported when it begins, once a minute and when it ends", async () => {
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

  test("RunTask is repeated with the same token while it is throttled", async () => {
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

  test("an answer of RunTask that broke off is asked for again with the same token", async () => {
    const broken = awsError("TypeError", "ECONNRESET\n  Deserialization error: to see the raw response, ...", 200);
    ecs
      .on(RunTaskCommand)
      .rejectsOnce(broken)
      .resolves({ failures: [{ reason: "x" }] });
    await expect(prepare(contextOf())).rejects.toThrow("started no task: x");
    const tokens = (inputs(RunTaskCommand) as RunTaskCommandInput[]).map(({ clientToken }) => clientToken);
    expect(tokens).toEqual([tokens[0], tokens[0]]);
    // Where it stays so, the record says that there may be a task, and it is looked for.
    ecs.on(RunTaskCommand).rejects(broken);
    ecs.on(ListTasksCommand).resolves({ taskArns: [arn] });
    const short = contextOf((config) => (config.Fargate.StartTimeout = 1));
    await expect(prepare(short)).rejects.toThrow(/^ecs:RunTask got no answer: ECONNRESET$/);
    expect(inputs(StopTaskCommand)).toMatchObject([{ task: arn }]);
  });

  test("a login counts at once, also while DescribeTasks does not answer or is refused", async () => {
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
        // sshd is late: it listens only from here on.
        const where = { address: "127.0.0.1", port: free.port, username: "worker" };
        if (polls === 2) server = await startSshServer({ ...where, authorizedKey, home: directory() });
        return later();
      });
      const begun = Date.now();
      await prepare({ ...context, now: () => begun }); // else the first answer may be old by then
      expect(polls).toBe(2);
      expect(readRecord(recordFile())?.ContainerIP).toBe("127.0.0.1");
      await server?.close();
    }
  });

  test("a single MISSING after the login does not fail prepare", async () => {
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
  ])("a task that is %s before it is ready is a failure that says why, and is stopped", async (_, state) => {
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

  test("StartTimeout and ConnectTimeout end the wait, and say what the last login came to", async () => {
    const late = contextOf((config) => (config.Fargate.StartTimeout = 1));
    ecs.on(RunTaskCommand).resolves({ tasks: [{ taskArn: arn }] });
    ecs.on(DescribeTasksCommand).resolves({ tasks: [taskIn("PENDING")] });
    await expect(prepare(late)).rejects.toThrow("the task was not ready within StartTimeout (1 s): it is PENDING");
    ecs.on(DescribeTasksCommand).resolves({ tasks: [taskIn("RUNNING")] });
    await expect(prepare(contextOf((config) => (config.SSH.ConnectTimeout = 1)))).rejects.toThrow(
      /no login worked within ConnectTimeout \(1 s\); it has no address$/,
    );
    const closed = await startProxy({ host: "127.0.0.1", port: 1 });
    await closed.close();
    const refusing = contextOf((config) => {
      config.SSH.ConnectTimeout = 1;
      config.SSH.Port = closed.port;
    });
    ecs.on(DescribeTasksCommand).resolves({ tasks: [taskIn("RUNNING", "127.0.0.1")] });
    await expect(prepare(refusing)).rejects.toThrow(
      /the task runs, but no login worked within ConnectTimeout \(1 s\); the last attempt to log in: worker@127\.0\.0\.1:\d+: .*ECONNREFUSED/,
    );
    expect(inputs(StopTaskCommand)).toHaveLength(3);
  });

  test("with UsePublicIP the address comes from EC2, once the interface has one", async () => {
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

  test("a task without the public address that is to be used: the failure says what is missing", async () => {
    const context = contextOf((config) => {
      config.Fargate.UsePublicIP = true;
      config.SSH.ConnectTimeout = 1;
    });
    ecs.on(RunTaskCommand).resolves({ tasks: [{ taskArn: arn }] });
    ecs.on(DescribeTasksCommand).resolves({ tasks: [taskIn("RUNNING", "192.0.2.1")] });
    ec2.on(DescribeNetworkInterfacesCommand).resolves({ NetworkInterfaces: [{}] });
    await expect(prepare(context)).rejects.toThrow(/; it has no public address$/);
  });

  test("told to stop while it waits, it stops the task", async () => {
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
  ])("an override refused for its %s is left out with PrivateKeyPath, once, under another token", async (_, error) => {
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

  test("a login with a key that other tasks take as well does not count when the task has ended", async () => {
    const key = await makeKeyPair("ed25519");
    const path = join(directory(), "id_ed25519");
    fs.writeFileSync(path, key.privateKey);
    const context = contextOf((config) => {
      config.SSH.PrivateKeyPath = path;
      config.SSH.Port = 0;
    });
    // Its address is another task's by the time of the login, and ECS says so only then.
    taskGoesThrough(context, taskIn("PENDING", "127.0.0.1"), {
      ...taskIn("STOPPED", "127.0.0.1"),
      desiredStatus: "STOPPED",
      stopCode: "UserInitiated",
      stoppedReason: "Task stopped by user",
    });
    await expect(prepare(context)).rejects.toThrow("the task stopped before it was ready: UserInitiated");
    expect(fs.existsSync(recordFile())).toBe(false);
  });

  test("a login long after the task's last sign of life does not count when the task has ended", async () => {
    const context = contextOf((config) => (config.SSH.Port = 0));
    let time = Date.now();
    taskGoesThrough(context, taskIn("PENDING", "127.0.0.1"), { ...taskIn("STOPPED"), desiredStatus: "STOPPED" });
    await expect(prepare({ ...context, now: () => (time += 6_000) })).rejects.toThrow(
      "the task stopped before it was ready",
    );
  });

  test("no decision looks at the text of a message: with other texts, the same calls and the same verdicts", async () => {
    const source = fs.readFileSync(join(projectRoot, "fargate.ts"), "utf8");
    const original = 'super([message, ...details].map(printable).join("\\n  "));';
    expect(source.split(original)).toHaveLength(2);
    const copy = join(projectRoot, "dist", `reworded-${process.pid}.ts`);
    onTestFinished(() => fs.rmSync(copy, { force: true }));
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
      Object.assign(context, { byJob: ["TaskDefinition"] });
    };
    const withKey = (context: Context) => {
      context.config.SSH.PrivateKeyPath = join(directory(), "key");
      fs.writeFileSync(context.config.SSH.PrivateKeyPath, utils.generateKeyPairSync("ed25519").private);
    };
    /** What AWS answers, how the job is set up, and how many times RunTask is called. */
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
        // How often a lost answer is asked for again is a matter of time.
        seen.push({ what, kind, cause, calls: [...new Set(calls)], record: fs.existsSync(recordFile()) });
        if (what !== "a lost answer, and no permission to list")
          expect(inputs(RunTaskCommand), what).toHaveLength(runs);
      }
      expect(seen[1]).toEqual(seen[0]);
    }
  });

  test("without PrivateKeyPath that refusal says how the container must be named", async () => {
    ecs.on(RunTaskCommand).rejects(noContainer);
    const refused = "Override for container named ci-coordinator is not a container in the TaskDefinition.";
    await expect(prepare(contextOf())).rejects.toMatchObject({
      message: expect.stringContaining(refused),
      cause: { problem: "container" },
    });
    expect(inputs(RunTaskCommand)).toHaveLength(1);
  });

  test("a PrivateKeyPath that cannot be used is a warning, and a key is made", async () => {
    const context = contextOf((config) => (config.SSH.PrivateKeyPath = join(directory(), "none")));
    ecs.on(RunTaskCommand).resolves({ failures: [{ reason: "enough" }] });
    await expect(prepare(context)).rejects.toThrow("enough");
    expect(logged[0]).toMatch(
      /^warning: PrivateKeyPath .*none cannot be used: ENOENT.*a key is made for this job instead$/,
    );
    expect(JSON.stringify(inputs(RunTaskCommand))).toContain("ssh-ed25519 ");
  });

  test("a record that an earlier try left is cleared, with its task, before another is started", async () => {
    openDirectory(records);
    writeRecord(recordFile(), { ...someRecord, TaskARN: "earlier" });
    ecs.on(RunTaskCommand).callsFake(() => {
      expect(inputs(StopTaskCommand)).toHaveLength(1);
      return { failures: [{ reason: "enough" }] };
    });
    await expect(prepare(contextOf())).rejects.toThrow("enough");
    expect(inputs(StopTaskCommand)).toMatchObject([{ task: "earlier" }]);
  });

  test("cleanup stops the record's task where the record says it runs, then removes the record; twice is once", async () => {
    openDirectory(records);
    managerId(records);
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

  test("cleanup without a record looks for the job's tasks by startedBy alone, and stops each", async () => {
    openDirectory(records);
    const startedBy = `fargate-${managerId(records)}-0123456789abcdef0123456789abcdef`;
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

  test("cleanup where nothing was ever started asks nothing; where ListTasks is not permitted it warns", async () => {
    await cleanup(contextOf());
    expect(ecs.calls()).toHaveLength(0);
    expect(logged.splice(0)).toEqual([expect.stringMatching(/^warning: \S+ is not there: nothing was ever started/)]);
    openDirectory(records);
    managerId(records);
    ecs.on(ListTasksCommand).rejects(awsError("AccessDeniedException", "no"));
    await cleanup(contextOf());
    expect(logged).toEqual([
      expect.stringMatching(/^warning: whether a task started by \S+ is left could not be looked up: ecs:List/),
    ]);
  });

  test("a start that was not answered does not block the next where ListTasks is not permitted", async () => {
    openDirectory(records);
    const unanswered = { ...someRecord, TaskARN: "", Unanswered: true };
    writeRecord(recordFile(), unanswered);
    ecs.on(ListTasksCommand).rejects(awsError("AccessDeniedException", "no"));
    await cleanup(contextOf());
    expect(logged).toEqual([
      expect.stringMatching(/^warning: whether a task started by fargate-.* is left could not be/),
    ]);
    expect(readRecord(recordFile())).toEqual(unanswered);
    ecs.on(RunTaskCommand).resolves({ failures: [{ reason: "enough" }] });
    await expect(prepare(contextOf())).rejects.toThrow("enough");
  });

  test("a request that never reached AWS leaves nothing to look for", async () => {
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
    // One of several may have: the connection broke, and was refused from then on.
    const broken = Object.assign(new Error("ECONNRESET"), { code: "ECONNRESET", $metadata: {} });
    let calls = 0;
    ecs.on(RunTaskCommand).callsFake(() => Promise.reject(calls++ === 0 ? broken : refused));
    ecs.on(ListTasksCommand).resolves({ taskArns: [arn] });
    await expect(prepare(contextOf((config) => (config.Fargate.StartTimeout = 1)))).rejects.toThrow("ECONNREFUSED");
    expect(inputs(StopTaskCommand)).toMatchObject([{ task: arn }]);
  });

  test("told to stop, prepare sends no RunTask any more", async () => {
    const sigterm = new Failure("system", "stopped by SIGTERM");
    let calls = 0;
    // Between two tries of a throttled one.
    ecs.on(RunTaskCommand).callsFake(() => {
      if (++calls === 2) setTimeout(() => stop.abort(sigterm), 10);
      throw awsError("ThrottlingException", "Rate exceeded");
    });
    await expect(prepare(contextOf())).rejects.toThrow("stopped by SIGTERM");
    expect(calls).toBe(2);
    expect(fs.existsSync(recordFile())).toBe(false);
    // Where the first was refused for its override, and would be repeated without.
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

  test("told to stop while RunTask is under way, prepare stops the task that the answer names", async () => {
    ecs.on(RunTaskCommand).callsFake(async () => {
      stop.abort(new Failure("system", "stopped by SIGTERM"));
      await new Promise((later) => setTimeout(later, 500));
      return { tasks: [{ taskArn: arn }] };
    });
    await expect(prepare(contextOf())).rejects.toThrow("stopped by SIGTERM");
    expect(inputs(StopTaskCommand)).toMatchObject([{ task: arn }]);
    expect(fs.existsSync(recordFile())).toBe(false);
  });

  test("told to stop while it looks for a task whose start was not answered, prepare leaves that to cleanup", async () => {
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
    expect(logged.slice(1)).toEqual(["error: a task is left for cleanup to stop"]);
  });

  test("told to stop while it clears what an earlier try left, prepare ends and starts nothing", async () => {
    openDirectory(records);
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

  test("cleanup after an unanswered RunTask looks until the task is listed", async () => {
    openDirectory(records);
    writeRecord(recordFile(), { ...someRecord, TaskARN: "", Unanswered: true, UpdatedAt: Date.now() / 1000 });
    ecs
      .on(ListTasksCommand)
      .resolvesOnce({ taskArns: [] })
      .resolves({ taskArns: [arn] });
    await cleanup(contextOf());
    // Under the name of then, also when the manager has another identity by now.
    expect(inputs(ListTasksCommand)).toMatchObject([
      { startedBy: someRecord.StartedBy },
      { startedBy: someRecord.StartedBy },
    ]);
    expect(inputs(StopTaskCommand)).toMatchObject([{ task: arn }]);
    expect(fs.existsSync(recordFile())).toBe(false);
  });

  test("a list that still shows the stopped task of an earlier try is not the end of looking", async () => {
    openDirectory(records);
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

  test("cleanup beside a live prepare, where ListTasks is not permitted, logs one warning", async () => {
    openDirectory(records);
    writeRecord(recordFile(), { ...someRecord, TaskARN: "", Unanswered: true });
    const { job, config } = contextOf();
    const other = spawn("sleep", ["600"]);
    // The lock of a prepare that is this other process.
    const identity = execFileSync("cut", ["-d", " ", "-f", "22", `/proc/${other.pid}/stat`])
      .toString()
      .trim();
    const done = announce(config.TaskMetadata, job.stem, "prepare");
    const [own = ""] = fs.readdirSync(records).filter((name) => name.endsWith(".lock"));
    const [, , place] = own.split(".").slice(-4);
    done();
    fs.writeFileSync(join(records, `${job.stem}.prepare.${other.pid}.${identity}.${place}.lock`), "");
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
      expect.stringMatching(/^warning: whether a task started by \S+ is left could not be looked up: ecs:List/),
    ]);
  });

  test("a clock that was set back does not make cleanup look for longer than half a minute", async () => {
    openDirectory(records);
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

  test("an answer of RunTask without a task and without a reason is asked for again", async () => {
    let calls = 0;
    ecs.on(RunTaskCommand).callsFake(() => (calls++ === 0 ? {} : { failures: [{ reason: "enough" }] }));
    await expect(prepare(contextOf())).rejects.toThrow("enough");
    const tokens = (inputs(RunTaskCommand) as RunTaskCommandInput[]).map(({ clientToken }) => clientToken);
    expect(tokens).toEqual([tokens[0], tokens[0]]);
  });

  test("a damaged record is told, and its task looked for by name", async () => {
    openDirectory(records);
    fs.writeFileSync(recordFile(), "{", { mode: 0o600 });
    ecs.on(ListTasksCommand).resolves({ taskArns: [arn] });
    await cleanup(contextOf());
    expect(logged).toEqual([expect.stringMatching(/^warning: the record .* cannot be used: it is not JSON; looking/)]);
    expect(inputs(StopTaskCommand)).toMatchObject([{ task: arn }]);
    expect(fs.existsSync(recordFile())).toBe(false);
  });

  test("with a damaged record and an unusable identity, the task that the record still names is stopped", async () => {
    openDirectory(records);
    fs.writeFileSync(recordFile(), `{"TaskARN": "${arn}", "Con`, { mode: 0o600 });
    fs.writeFileSync(join(records, ".manager-id"), "not an identity");
    await expect(cleanup(contextOf())).rejects.toThrow("the manager's identity");
    expect(inputs(StopTaskCommand)).toMatchObject([{ cluster: "test-cluster", task: arn }]);
    expect(fs.existsSync(recordFile())).toBe(true);
  });

  test("StopTask is repeated when it is throttled, and when credentials fail for a moment", async () => {
    openDirectory(records);
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

  test("a task that ECS no longer knows counts as stopped; one that cannot be stopped keeps its record", async () => {
    openDirectory(records);
    writeRecord(recordFile(), someRecord);
    ecs.on(StopTaskCommand).rejects(awsError("AccessDeniedException", "no"));
    await expect(cleanup(contextOf())).rejects.toThrow(
      `${arn} may still run, stop it by hand: ecs:StopTask was refused: AccessDeniedException: no`,
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

describe("the marks before a script's output", () => {
  const mark = "fargate-0123";
  const first = `${mark} 89 89 (my) shell) S 1 88 87 0 -1 4194560 338 0 10 0 0 0 0 0 20 0 1 0 75158 4464640\n`;
  const pipes = "l-wx------ 1 0 0 64 /proc/89/fd/1 -> pipe:[77]\nl-wx------ 1 0 0 64 /proc/89/fd/2 -> pipe:[78]\n";
  /** Pushes the chunks, and answers what came out, with the rest that was held. */
  const read = (chunks: Buffer[]) => {
    const preamble = new Preamble(mark);
    const own = chunks.map((chunk) => preamble.push(chunk));
    const rest = preamble.shell ? Buffer.alloc(0) : preamble.held;
    return { preamble, own: Buffer.concat([...own, rest]).toString("latin1") };
  };

  test("are removed wherever the stream is split into chunks, and nothing else is", () => {
    const piece = fc.oneof(
      fc.constantFrom("fargate-", mark, `${mark} complete`, `${mark} $$ x\n`, "\n", " ", "pipe:[1]\n"),
      fc.string({ unit: "binary" }).map((text) => Buffer.from(text).toString("latin1")),
    );
    const sizes = fc.infiniteStream(fc.integer({ min: 1, max: 99 }));
    fc.assert(
      fc.property(fc.array(piece), fc.array(piece), sizes, (startUp, script, size) => {
        // A start-up file cannot know the mark; it can show the program that has it.
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

  test("all that follows them is the script's output, even if it looks like marks", () => {
    const own = `${first}${mark} incomplete\n${mark} complete\n`;
    const { preamble, own: out } = read([Buffer.from(`${first}${mark} complete\n${own}`), Buffer.from(own)]);
    expect(out).toBe(own + own);
    expect(preamble.state).toBe("complete");
  });

  test("without /proc, the shell counts as the leader of its session", () => {
    const { preamble } = read([Buffer.from(`${mark} 12 \n${mark} complete\n`)]);
    expect(preamble).toMatchObject({ shell: { pid: 12, session: 12, start: 0 }, pipes: [] });
  });

  test("if they do not come, the output so far is passed on", () => {
    const noise = "x".repeat(10_000);
    expect(read([Buffer.from(noise)])).toMatchObject({ own: noise, preamble: { state: "pending", shell: undefined } });
    const { preamble } = read([Buffer.from(first), Buffer.from(noise)]);
    expect(preamble.state).toBe("pending");
    expect(preamble.held.length).toBeLessThan(noise.length);
  });
});

test.each<[string, ReturnType<typeof holdersOf>, string[]]>([
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
    "a filter, when the channel's streams are sockets",
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
  ["the server, which reads the pipes", { filter: false, paths: [] }, ["r 12/fd/0 pipe:[9]", "r 12/fd/1 pipe:[1]"]],
  ["nothing that is shown", undefined, []],
])("what holds a channel open: %s", (_, expected, links) => {
  const modes = { r: "lr-x------", w: "l-wx------" };
  const line = (link: string) => {
    const [mode, path, target] = link.split(" ");
    return `${modes[mode as "r" | "w"]} 1 0 0 64 Nov 26 02:45 /proc/${path} -> ${target}\n`;
  };
  const listing = links.map(line).join("");
  expect(holdersOf(listing, ["pipe:[1]", "pipe:[2]", "socket:[3]"])).toEqual(expected);
  expect(holdersOf(listing, [])).toBe(undefined); // without /proc, the shell's pipes have no names
});

test.each([
  ["#!/usr/bin/env bash\n", "bash"],
  ["#!/bin/bash\n", "bash"],
  ["#! /usr/bin/env -S bash -e\n", "bash"],
  ["#!/usr/bin/env sh\n", "sh"],
  ["#!/bin/sh", "sh"],
  ["echo no first line\n", "bash"],
  ["", "bash"],
])("the interpreter of %j is %s", (script, name) => {
  expect(interpreterOf(Buffer.from(script), "bash")).toBe(name);
  expect(interpreterOf(Buffer.from(script), "sh")).toBe("sh");
});

test.each([
  ["#!/usr/bin/env pwsh\n", "pwsh"],
  ["#!/usr/bin/env pwsh\r\n& {\r\n", "pwsh"],
  ["& {\r\n\r\n$ErrorActionPreference = 'Stop'\r\n", "PowerShell or cmd.exe"],
  ["\ufeff& {\r\n", "PowerShell or cmd.exe"],
  ["\ufeff#!/usr/bin/env bash\n", "PowerShell or cmd.exe"],
  [Buffer.from("\ufeffecho", "utf16le"), "PowerShell or cmd.exe"],
  ["@echo off\r\nsetlocal\r\n", "PowerShell or cmd.exe"],
])("the script %j is refused: it is for %s", (script, name) => {
  const failure = thrown(() => interpreterOf(Buffer.from(script as string), "bash"));
  expect(failure).toMatchObject({ kind: "system" });
  expect(failure.message).toContain(`the script is for ${name}, but only bash and sh can be used; set shell = "bash"`);
});

/** What a script of a job left, seen from the driver. */
interface Ran {
  outcome: Outcome;
  stdout: Buffer;
  stderr: Buffer;
}

const never = new AbortController().signal;

/** A task without ECS: a container, or the embedded server, with a key of its own, and how to log in to it. */
async function startTask(on: TaskHosts = hosts, environment: Record<string, string> = {}, Username = "root") {
  const key = await makeKeyPair("ed25519");
  // The address is this test process's own; containers of several tests may run at once.
  const address = `127.78.${(process.pid >> 8) & 255}.${(directories++ % 250) + 1}`;
  const port = 2222;
  const own = { SSH_PUBLIC_KEY: key.publicKey, ...environment };
  const host = await on.start({ name: "test", address, port, environment: own });
  const target: SshTarget = {
    host: address,
    Port: port,
    Username,
    privateKey: key.privateKey,
    KeepAliveInterval: 15,
    CancelGracePeriod: 5,
  };
  const logIn = (to: SshTarget = target): Promise<Connection> =>
    retry(() => connect(to, 3_000, never), { until: Date.now() + 15_000, again: () => true, now: Date.now });
  await logIn().then(({ client }) => client.end());
  return { host, target, logIn };
}

/** Filters, and what they make of the lines "b" and "a". `sort` prints nothing for 3 s. */
const filters = {
  tee: ["tee /dev/null", "b\na\n"],
  sed: ["sed s/^/x/", "xb\nxa\n"],
  loop: ['while read -r line; do echo "$(echo 1) $line"; done', "1 b\n1 a\n"],
  sort: ["sleep 3; sort", "a\nb\n"],
} as const;

/**
 * Runs scripts that fail behind filters of both streams, four at a time.
 * @returns what was not as it should be
 */
async function lostOutput(
  logIn: () => Promise<Connection>,
  form: "17.9" | "19.x",
  { runs, sorts }: { runs: number; sorts: number },
): Promise<string[]> {
  const wrong: string[] = [];
  const buildsDir = `/tmp/builds-${process.pid}`;
  const { projectDir } = gitlabJob({ buildsDir });
  const cases = Object.entries(filters).flatMap(([name, [filter, filtered]]) =>
    (["stdout", "stderr"] as const).flatMap((stream) => {
      const redirect = stream === "stdout" ? `exec > >(${filter})` : `exec 2> >((${filter}) >&2)`;
      const to = stream === "stdout" ? "" : " >&2";
      const script = [`${redirect}; echo b${to}; echo a${to}; false`];
      const { scripts } = gitlabJob({ form, buildsDir, script });
      const text = scripts.find(({ stage }) => stage === "build_script")?.text as string;
      return Array.from({ length: name === "sort" ? sorts : runs }, () => ({ name, stream, filtered, text }));
    }),
  );
  const inOwnConnection = async (script: string) => {
    const [out, err] = [collect(), collect()];
    const connection = await logIn();
    const shells = { interpreter: "bash", loginShell: "bash" } as const;
    const options = { stop: never, log: getLogger("fargate"), stdout: out.sink, stderr: err.sink };
    const outcome = await runScript(connection, Buffer.from(script), shells, options);
    connection.client.end();
    return { outcome, stdout: out.bytes().toString(), stderr: err.bytes().toString() };
  };
  await inOwnConnection(`mkdir -p ${projectDir}`);
  const worker = async () => {
    for (let it = cases.shift(); it; it = cases.shift()) {
      const { outcome, ...output } = await inOwnConnection(it.text);
      const came = output[it.stream];
      if (outcome.ended !== "exited" || outcome.code !== 1 || !came.endsWith(it.filtered))
        wrong.push(`${it.name} on ${it.stream}: ${JSON.stringify([outcome, came])}`);
    }
  };
  await Promise.all([worker(), worker(), worker(), worker()]);
  return wrong;
}

test("output and exit status that arrive with the channel's confirmation are not lost", async () => {
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

test("lines written alternately to both streams keep their order", async () => {
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
      highWaterMark: 64, // neither takes all at once
      write(chunk: Buffer, _, done) {
        // As of a full pipe that both lead to: it takes a part now, and the rest when somebody has read.
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
    { stop: never, log: getLogger("fargate"), stdout: both(), stderr: both() },
  );
  expect(outcome).toEqual({ ended: "exited", code: 0 });
  expect(written.join("")).toBe(lines.join(""));
  connection.client.destroy();
  server.close();
});

test.each([
  ["with the channel still open, is reported", false],
  ["with the channel closed, is not: all output has come", true],
])("a connection lost after the exit status, %s", async (_, closes) => {
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
  cut = () => setTimeout(proxy.cut, 300);
  const target = {
    host: "127.0.0.1",
    Port: proxy.port,
    Username: "root",
    privateKey,
    KeepAliveInterval: 0,
    CancelGracePeriod: 1,
  };
  const warnings: string[] = [];
  const log = { ...getLogger("fargate"), warn: (text: string) => warnings.push(text) } as unknown as Context["log"];
  let out = "";
  const stdout = new Writable({
    write(chunk: Buffer, _, done) {
      out += chunk;
      setTimeout(done, 600); // longer than the connection lasts
    },
  });
  const outcome = await runScript(
    await connect(target, 3_000, never),
    Buffer.from("true"),
    { interpreter: "bash", loginShell: "bash" },
    { stop: never, log, stdout, stderr: new PassThrough() },
  );
  expect(outcome).toEqual({ ended: "exited", code: 0 });
  expect(out).toBe("first\n");
  expect(warnings).toEqual(closes ? [] : ["connection lost: the script's last output may be lost"]);
  await proxy.close();
  server.close();
});

test.each(["garbage", "a disconnect"])(
  "a server that sends %s and keeps its side open ends the script at once",
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
    // In front of it, what never closes.
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
      { stop: signal, log: getLogger("fargate"), stdout: sink(), stderr: sink() },
    );
    expect(outcome).toMatchObject({ ended: "lost", begun: true });
    for (const socket of sockets) socket.destroy();
    front.close();
    server.close();
  },
  20_000,
);

test("a key that cannot be read fails the login, and nothing else", async () => {
  const target = {
    host: "127.0.0.1",
    Port: 1,
    Username: "root",
    privateKey: "no key",
    KeepAliveInterval: 0,
    CancelGracePeriod: 1,
  };
  await expect(connect(target, 200, new AbortController().signal)).rejects.toThrow(/Cannot parse privateKey/);
  await new Promise((later) => setTimeout(later, 400)); // its timer would have rejected what nobody awaits
});

describe("scripts over SSH", () => {
  let task: Awaited<ReturnType<typeof startTask>>;
  beforeAll(async () => {
    task = await startTask();
    configureSync({
      reset: true,
      sinks: { searchRecord },
      loggers: [
        { category: "fargate", sinks: ["searchRecord"], lowestLevel: "debug" },
        { category: ["logtape", "meta"], sinks: [] },
      ],
    });
  });
  afterAll(() => task?.host.stop(0));

  async function runIn(
    connection: Connection,
    script: string | Buffer,
    { interpreter = "bash" as "bash" | "sh", loginShell = "bash", stop = new AbortController().signal } = {},
  ): Promise<Ran> {
    const out = collect();
    const err = collect();
    const outcome = await runScript(
      connection,
      Buffer.from(script),
      { interpreter, loginShell },
      {
        stop,
        log: getLogger("fargate"),
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

  taskTest("the shells of a container are found", async () => {
    const connection = await task.logIn();
    expect(await findShells(connection, never)).toMatchObject({ Interpreter: "bash", LoginShell: "bash" });
    connection.client.end();
  });

  for (const code of [0, 1, 42, 137, 255])
    taskTest(`exit code ${code} comes back`, async () => {
      expect((await runOnce(`exit ${code}`)).outcome).toEqual(exited(code));
    });

  taskTest("death by signal n is 128 + n, of a command and of the shell itself", async () => {
    expect((await runOnce("sh -c 'kill -TERM $$'")).outcome).toEqual(exited(143));
    expect((await runOnce("sh -c 'kill -SEGV $$'")).outcome).toEqual(exited(139));
    expect((await runOnce("echo before; kill -KILL $$")).outcome).toEqual(exited(137));
  });

  taskTest("a script that sends itself TERM ends as bash does", async () => {
    for (const [script, code] of [
      ["x=$(kill -s TERM $$); true", 143],
      ["(kill -s TERM $$); exit 3", 143],
      ["kill -TERM 0; exit 3", 143],
      ["trap '' TERM; kill -TERM 0; exit 0", 0],
      ["trap 'exit 7' TERM; kill -TERM $$; exit 0", 7],
    ] as const)
      expect((await runOnce(script)).outcome, script).toEqual(exited(code));
  });

  taskTest("output that nobody has read yet when the script ends is not lost", async () => {
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
        { stop: never, log: getLogger("fargate"), stdout: redirect ? rest : slow, stderr: redirect ? slow : rest },
      );
      expect(outcome).toEqual(exited(7));
      expect(Buffer.concat(received).length).toBe(3_000_000);
    }
    connection.client.end();
  });

  taskTest("a process in the background and a slow reader: nothing of the script's output is lost", async () => {
    const connection = await task.logIn();
    let bytes = 0;
    const slow = new Writable({
      highWaterMark: 16_384,
      write(chunk: Buffer, _, done) {
        bytes += chunk.length;
        setTimeout(done, chunk.length / 1_000); // 1 MB/s: longer than a process in the background is waited for
      },
    });
    const outcome = await runScript(
      connection,
      Buffer.from("sleep 300 & head -c 3000000 /dev/zero; exit 7"),
      { interpreter: "bash", loginShell: "bash" },
      { stop: never, log: getLogger("fargate"), stdout: slow, stderr: collect().sink },
    );
    connection.client.end();
    expect(outcome).toEqual(exited(7));
    expect(bytes).toBe(3_000_000);
  });

  describe("with a login shell that does more than it should", () => {
    const bashrc = (text: string) => task.host.exec(`printf '%s\\n' '${text}' >/root/.bashrc`);
    afterAll(async () => {
      if (hosts.kind === "container") await task.host.exec("rm -f /root/.bashrc");
    });

    taskTest(
      "set -x in .bashrc: nothing of the script's output is taken for a mark",
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
      "set -e in .bashrc, or one that ends before the script begins",
      async () => {
        await bashrc("set -eu");
        expect((await runOnce("sleep 600 & exit 3")).outcome).toEqual(exited(3));
        expect((await runOnce("true")).outcome).toEqual(exited(0));
        await bashrc("exit 0");
        await expect(runOnce("true")).rejects.toThrow(
          "the container's login shell ended with 0 before it took the script",
        );
      },
      { containerOnly: true },
    );

    taskTest(
      "functions, aliases, options, IFS and PATH of a start-up file do not change what the driver runs",
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
        // `set -a` would export the script, and so no program could start: "Argument list too long".
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
      "variables, PATH and functions of a start-up file are there for the script",
      async () => {
        await bashrc("export OWN=value; plain=text; PATH=/opt/own:$PATH; greet() { echo hello; }");
        const ran = await runOnce("echo $OWN $plain; greet; echo $PATH");
        expect(ran.stdout.toString()).toMatch(/^value text\nhello\n\/opt\/own:\/usr/);
        await bashrc("");
      },
      { containerOnly: true },
    );

    taskTest(
      "one that hangs ends with SIGTERM, also before the script",
      async () => {
        await bashrc("sleep 600");
        const stop = new AbortController();
        const connection = await task.logIn();
        const asked = findShells(connection, stop.signal);
        const running = runIn(await task.logIn(), "true", { stop: stop.signal });
        stop.abort(new Failure("system", "stopped by SIGTERM"));
        await expect(asked).rejects.toThrow("stopped by SIGTERM");
        await expect(running).rejects.toThrow("stopped by SIGTERM");
        await bashrc("");
      },
      { containerOnly: true },
    );

    taskTest(
      "without cat in the container, the failure says so at once",
      async () => {
        await task.host.exec("mv /usr/bin/cat /usr/bin/cat.off");
        try {
          await expect(runOnce("true")).rejects.toThrow(
            "the container's shell could not take the script whole: it needs cat",
          );
        } finally {
          await task.host.exec("mv /usr/bin/cat.off /usr/bin/cat");
        }
      },
      { containerOnly: true },
    );
  });

  taskTest("both streams come back apart, byte for byte", async () => {
    const bytes = Buffer.from(Array.from({ length: 256 }, (_, byte) => byte));
    const octal = [...bytes].map((byte) => `\\${byte.toString(8).padStart(3, "0")}`).join("");
    const ran = await runOnce(`printf '${octal}'; printf '%s' error >&2; printf '${octal}'`);
    expect(ran.outcome).toEqual(exited(0));
    expect(ran.stdout.equals(Buffer.concat([bytes, bytes]))).toBe(true);
    expect(ran.stderr.toString()).toBe("error");
  });

  taskTest("the commands of a script find standard input empty", async () => {
    const ran = await runOnce('read -r line; echo "$? [$line]"; cat; wc -c');
    expect(
      ran.stdout
        .toString()
        .trim()
        .split("\n")
        .map((line) => line.trim()),
    ).toEqual(["1 []", "0"]);
  });

  taskTest("a process in the background does not hold the stage", async () => {
    const ran = await runOnce("sleep 300 & (sleep 300; echo late) & echo $!; echo done");
    expect(ran.outcome).toEqual(exited(0));
    expect(ran.stdout.toString()).toMatch(/^\d+\ndone\n$/);
    const pid = ran.stdout.toString().split("\n")[0];
    // Nor is it ended: a server that one stage starts serves the next.
    const next = await runOnce(`kill -0 ${pid} && echo lives`);
    expect(next.stdout.toString()).toBe("lives\n");
  });

  taskTest(
    "a process in the background that goes on writing to the job's output does not end with its stage",
    async () => {
      const listed = "for f in /proc/[0-9]*/comm; do grep -x cat $f; done 2>/dev/null | wc -l";
      const cats = async () => Number((await task.host.exec(listed)).output);
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
      await expect.poll(cats, { timeout: 30_000 }).toBeLessThanOrEqual(before); // what read its pipes ends when it does
    },
    { containerOnly: true },
  );

  taskTest(
    "BusyBox's ls shows what holds a channel open, too",
    async () => {
      const { output } = await task.host.exec("echo | sh -c 'busybox ls -ln /proc/$$/fd/[0-2]; :'");
      const [, pipe = ""] = /fd\/1 -> (.*)/.exec(output) ?? [];
      expect(pipe).toMatch(/^pipe:/);
      expect(holdersOf(output, [pipe])).toMatchObject({ filter: true, paths: [expect.stringMatching(/fd\/1$/)] });
    },
    { containerOnly: true },
  );

  taskTest("a process in the background that floods the job's output does not hold the stage", async () => {
    const ran = await runOnce("yes & echo $! >&2; exit 4");
    expect(ran.outcome).toEqual(exited(4));
    expect(ran.stdout.length).toBeGreaterThan(0);
    await task.host.exec(`kill ${ran.stderr.toString().trim()}`);
  });

  taskTest("all output of a filter that outlives a background process arrives", async () => {
    const ran = await runOnce("exec > >(cat; sleep 1; echo filtered); sleep 0.5 & echo done");
    expect(ran).toMatchObject({ outcome: exited(0), stdout: Buffer.from("done\nfiltered\n") });
  });

  taskTest("a filter that does not end holds the stage for 10 s, and the log says so", async () => {
    const connection = await task.logIn();
    const warnings: string[] = [];
    const log = { ...getLogger("fargate"), warn: (text: string) => warnings.push(text) } as unknown as Context["log"];
    const out = collect();
    const outcome = await runScript(
      connection,
      Buffer.from("tail -f /dev/null | sleep 300 & echo done"),
      { interpreter: "bash", loginShell: "bash" },
      { stop: never, log, stdout: out.sink, stderr: collect().sink },
    );
    connection.client.end();
    expect(outcome).toEqual(exited(0));
    expect(out.bytes().toString()).toBe("done\n");
    expect(warnings).toEqual(["a process holds the script's output open after 10 s: what else it writes is lost"]);
  });

  for (const form of ["17.9", "19.x"] as const)
    taskTest(`no output of a filter behind a process substitution is lost, in a script of form ${form}`, async () => {
      expect(await lostOutput(task.logIn, form, { runs: 2, sorts: 1 })).toEqual([]);
    });

  taskTest("a script of 1 MB arrives whole, and of 20 MB", async () => {
    for (const size of [1_000_000, 20_000_000]) {
      const text = "0123456789".repeat(size / 10);
      const ran = await runOnce(`x='${text}'\necho "\${#x}"; printf %s "$x" | sha256sum`);
      const sum = createHash("sha256").update(text).digest("hex");
      expect(ran.stdout.toString()).toBe(`${size}\n${sum}  -\n`);
    }
  });

  taskTest("nothing of a script is on disk, in an argument or in the environment while it runs", async () => {
    const places = hosts.kind === "container" ? "/root /tmp /var /run /etc /dev/shm" : "$HOME/nowhere";
    /** How many processes and files show the text; the bracket keeps the search from finding itself. */
    const found = async (text: string) => {
      const pattern = `[${text[0]}]${text.slice(1)}`;
      const shown = `cat /proc/[0-9]*/cmdline /proc/[0-9]*/environ 2>/dev/null | tr '\\0' '\\n' | grep -c '${pattern}'`;
      const { output } = await task.host.exec(`${shown}; grep -rl '${pattern}' ${places} 2>/dev/null | wc -l`);
      return output.trim().split(/\s+/).map(Number);
    };
    for (const [plant, expected] of [
      [(secret: string) => `: ${secret}`, (counts: number[]) => expect(counts).toEqual([0, 0])],
      // The search itself must be able to find something.
      [(secret: string) => `export X=${secret}`, ([shown]: number[]) => expect(shown).toBeGreaterThan(0)],
    ] as const) {
      const secret = `secret-${Math.random().toString(36).slice(2)}`;
      const stop = new AbortController();
      const out = collect();
      const running = runScript(
        await task.logIn(),
        Buffer.from(`${plant(secret)}\necho ready; sleep 600`),
        { interpreter: "bash", loginShell: "bash" },
        { stop: stop.signal, log: getLogger("fargate"), stdout: out.sink, stderr: collect().sink },
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
    describe(`as ${shell} understands them`, () => {
      beforeAll(async () => {
        if (hosts.kind !== "container") return;
        const setUp = `ln -sf "$(command -v busybox)" /usr/local/bin/ash && usermod --shell ${path} root`;
        expect((await task.host.exec(setUp)).exitCode).toBe(0);
      });
      afterAll(async () => {
        if (hosts.kind === "container") await task.host.exec("usermod --shell /bin/bash root");
      });
      // Without a container there is no login shell to change.
      const options = { containerOnly: shell !== "bash" };
      const own = () => ({
        interpreter: shell === "bash" ? ("bash" as const) : ("sh" as const),
        loginShell: hosts.kind === "container" ? (path.split("/").at(-1) as string) : "bash",
      });

      const cases: [string, string, number, string][] = [
        ["exit in the middle", "echo one\nexit 42\necho two\n", 42, "one\n"],
        ["set -e", "set -e\necho one\nfalse\necho two\n", 1, "one\n"],
        ["no newline at the end", "printf '%s' one", 0, "one"],
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
        taskTest(
          what,
          async () => {
            const ran = await runOnce(Buffer.from(script, what.includes("UTF-8") ? "latin1" : "utf8"), own());
            expect(ran.outcome).toEqual(exited(code));
            expect(ran.stdout.toString(what.includes("UTF-8") ? "latin1" : "utf8")).toBe(output);
          },
          options,
        );

      taskTest(
        "1 MB",
        async () => {
          const ran = await runOnce(`x='${"y".repeat(1_000_000)}'; echo \${#x}`, own());
          expect(ran).toMatchObject({ outcome: exited(0), stdout: Buffer.from("1000000\n") });
        },
        options,
      );

      taskTest(
        "a connection cut at 10, 50 and 99 % of a script: no command of it runs",
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
          // The marks of the shells that run: what other tests left in the background has some, too.
          const shells = "cat /proc/[0-9]*/cmdline 2>/dev/null";
          const marks = async () =>
            new Set((await task.host.exec(shells)).output.match(/fargate-[0-9a-f]{32}(?= incomplete)/g));
          const earlier = await marks();
          for (const part of [0.1, 0.5, 0.99]) {
            const cut = await over(Math.floor(whole.sent * part));
            expect(cut.outcome.ended).toBe("lost");
            // The remote shell has noticed when it has ended; it would have run the script by then.
            await expect.poll(marks).toEqual(earlier);
            expect(await began()).toBe("");
          }
        },
        options,
      );
    });

  taskTest("an interpreter that is not the login shell gets the script all the same", async () => {
    const ran = await runOnce('echo "$0 ${BASH_VERSION:+bash}"', { interpreter: "sh", loginShell: "bash" });
    expect(ran.stdout.toString().trim()).toBe("sh");
    const other = await runOnce('echo "$0 ${BASH_VERSION:+bash}"', { interpreter: "bash", loginShell: "fish" });
    expect(other.stdout.toString()).toBe("bash bash\n");
  });

  taskTest("200 MB of output come through a slow reader in bounded memory", async () => {
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
      { stop: new AbortController().signal, log: getLogger("fargate"), stdout: slow, stderr: new PassThrough() },
    );
    connection.client.end();
    expect(outcome).toEqual(exited(0));
    expect(bytes).toBe(200_000_000);
    // What waits in this process: the server's first window, of 2 MiB, and less than that again.
    expect(queued).toBeLessThan(4 * 2 ** 20);
  });

  for (const [what, script] of [
    ["a sleeping command", "sleep 600"],
    ["a loop that ignores TERM", "trap '' TERM; while :; do sleep 1; done"],
    ["a command in a group of its own", "timeout 600 sleep 600"],
    ["children in the background", "sleep 600 & sleep 600 & wait"],
  ] as const)
    taskTest(`told to stop, it ends ${what} before it returns`, async () => {
      const id = `token-${Math.random().toString(36).slice(2)}`;
      const stop = new AbortController();
      const connection = await task.logIn();
      const out = collect();
      const running = runScript(
        connection,
        Buffer.from(`export FARGATE_TEST=${id}; echo ready; ${script}`),
        { interpreter: "bash", loginShell: "bash" },
        { stop: stop.signal, log: getLogger("fargate"), stdout: out.sink, stderr: collect().sink },
      );
      const marked = `grep -lz '^FARGATE_TEST=${id}$' /proc/[0-9]*/environ 2>/dev/null | wc -l`;
      await expect
        .poll(async () => Number((await task.host.exec(marked)).output), { timeout: 30_000 })
        .toBeGreaterThan(0);
      stop.abort(new Failure("system", "stopped by SIGTERM"));
      await expect(running).rejects.toThrow("stopped by SIGTERM");
      expect(Number((await task.host.exec(marked)).output)).toBe(0);
    });

  taskTest("what another stage left in the background survives that", async () => {
    const { stdout } = await runOnce("sleep 300 >/dev/null 2>&1 & echo $!");
    const stop = new AbortController();
    const out = collect();
    const running = runScript(
      await task.logIn(),
      Buffer.from("echo ready; sleep 600"),
      { interpreter: "bash", loginShell: "bash" },
      { stop: stop.signal, log: getLogger("fargate"), stdout: out.sink, stderr: collect().sink },
    );
    await expect.poll(() => out.bytes().toString(), { timeout: 30_000 }).toBe("ready\n");
    stop.abort(new Failure("system", "stopped"));
    await expect(running).rejects.toThrow("stopped");
    expect((await runOnce(`kill -0 ${stdout.toString().trim()}`)).outcome).toEqual(exited(0));
  });

  taskTest("both types of key log in", async () => {
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

  taskTest("another host key than the pinned one is refused, and a wrong key or user", async () => {
    const { hostKey, client } = await task.logIn();
    client.end();
    await expect(
      connect({ ...task.target, hostKey }, 3_000, never).then(({ client }) => client.end()),
    ).resolves.toBeDefined();
    const changed = Buffer.from(hostKey);
    changed[changed.length - 1] = (changed.at(-1) as number) ^ 1;
    await expect(connect({ ...task.target, hostKey: changed }, 3_000, never)).rejects.toThrow(
      "the server's key is not the one seen when the task was prepared",
    );
    const other = await makeKeyPair("ed25519");
    await expect(connect({ ...task.target, privateKey: other.privateKey }, 3_000, never)).rejects.toThrow(
      "the server refused the key",
    );
  });

  taskTest("a server that makes this process too large is left", async () => {
    const { rss } = process.memoryUsage;
    const connection = await task.logIn();
    try {
      Object.assign(process.memoryUsage, { rss: () => rss() + 2 ** 30 }); // as if what came had taken that much
      // The script must not end before the connection does.
      const { outcome } = await runIn(connection, "head -c 20000000 /dev/zero; sleep 600");
      const reason = "the server makes this process too large";
      expect(outcome).toEqual({ ended: "lost", begun: true, wasSilent: false, reason });
    } finally {
      Object.assign(process.memoryUsage, { rss });
      connection.client.destroy();
    }
  });

  taskTest("a connection that breaks in the middle of a script is told as lost", async () => {
    const proxy = await startProxy({ host: task.target.host, port: task.target.Port });
    const connection = await task.logIn({ ...task.target, host: "127.0.0.1", Port: proxy.port });
    const out = collect();
    const running = runScript(
      connection,
      Buffer.from("echo ready; sleep 600"),
      { interpreter: "bash", loginShell: "bash" },
      { stop: new AbortController().signal, log: getLogger("fargate"), stdout: out.sink, stderr: collect().sink },
    );
    await expect.poll(() => out.bytes().toString(), { timeout: 30_000 }).toBe("ready\n");
    proxy.cut();
    expect(await running).toMatchObject({ ended: "lost", begun: true });
    await proxy.close();
  });
});

// ---------------------------------------------------------------------------------------------------------
// The worker image
// ---------------------------------------------------------------------------------------------------------

describe("the worker image", () => {
  /** Runs a script in a new container of the image, and ends it. */
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
        { stop: never, log: getLogger("fargate"), stdout: out.sink, stderr: collect().sink },
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
    ["as root, for another user", {}, "worker", { SSH_USER: "worker" }],
    ["on a read-only root file system", { readOnly: true }, "root", {}],
    ["as user 1000", { user: "1000" }, "worker", {}],
    [
      "as user 1000, on a read-only root file system, at port 2022",
      { user: "1000", readOnly: true, containerPort: 2022 },
      "worker",
      { SSH_PORT: "2022" },
    ],
  ] as const)
    taskTest(
      `works ${what}`,
      async () => {
        // The configuration holds the container's environment.
        const script = "id -un; touch /tmp/here && stat -c %a /run/sshd/config /tmp/sshd.*/config 2>/dev/null; exit 3";
        const ran = await runWith(options, script, { environment, Username });
        expect(ran.stdout).toBe(`${Username}\n600\n`);
        expect(ran.outcome).toEqual({ ended: "exited", code: 3 });
      },
      { containerOnly: true, timeout: 300_000 },
    );

  for (const [what, sentence, options, environment] of [
    ["it runs as a user that the image does not know", "this image has no such user: add one", { user: "1234" }, {}],
    [
      "it runs as user 1000 and is to let root in",
      "who cannot start a session for anybody else",
      { user: "1000" },
      { SSH_USER: "root" },
    ],
    [
      "the root file system is read-only and the account is locked",
      "the account worker is locked, and /etc/shadow cannot be written",
      { readOnly: true },
      { SSH_USER: "worker" },
    ],
    [
      "nothing can be written to",
      "neither /run/sshd nor /tmp can be written to",
      { readOnly: true, user: "1000", lines: ["RUN chmod 700 /run/sshd && mv /bin/mktemp /bin/mktemp.off"] },
      {},
    ],
  ] as const)
    taskTest(
      `says in one sentence that ${what}`,
      async () => {
        const own = await containerHosts({
          packages: PACKAGES,
          ...options,
          lines: [...("lines" in options ? options.lines : [])],
        });
        try {
          const { publicKey } = await makeKeyPair("ed25519");
          const address = `127.78.${(process.pid >> 8) & 255}.${(directories++ % 250) + 1}`;
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

  taskTest(
    "passes its environment and the task definition's to the job, but nothing of a login or a shell",
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
      const ran = await runWith({ lines }, "tr '\\0' '\\n' </proc/$$/environ | sort", { environment });
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
        "SHELL=/bin/bash",
        "USER=root",
      ]);
      expect(ran.log).toContain("not passed to sessions, because they hold line breaks: SEVERAL_LINES \n");
    },
    { containerOnly: true, timeout: 300_000 },
  );
});

/** Lines for a Dockerfile: a plain sshd, as in images that others have made, after what is to be process 1, if anything. */
const plainSshd = (first: readonly string[] = [], options = "") => [
  `RUN ssh-keygen -A && printf '%s\\n' \\
  'for home in /root /home/worker; do mkdir -p $home/.ssh; echo "$SSH_PUBLIC_KEY" >$home/.ssh/authorized_keys; done' \\
  'chown -R worker /home/worker/.ssh; exec /usr/sbin/sshd -D -e ${options}' >/start`,
  `ENTRYPOINT ${JSON.stringify([...first, "/bin/sh", "/start"])}`,
];
const TINI = ["/usr/bin/tini", "--"];

describe("the container's environment, of an image with a plain sshd under tini", () => {
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

  /** Runs a script that prints its environment, of the login shell bash or of another. */
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
      { stop: never, log: getLogger("fargate"), stdout: out.sink, stderr: err.sink },
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
      `["*"] passes all of it to ${shell}, but nothing of a login or a shell`,
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
    "patterns choose, [] passes nothing",
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
    "a script sees it as if the session had begun with it: start-up files count, and no value is traced",
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
    "its values are in no argument",
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
// The stand-in for AWS: the tests below are worth as much as it is strict
// ---------------------------------------------------------------------------------------------------------

describe("the stand-in for AWS", () => {
  let world: World;
  let ecs: ECSClient;
  beforeAll(async () => {
    world = await makeWorld({ embedded: true, timing: { hideDescribe: 200, hideList: 200 } });
    publicKey = (await makeKeyPair("ed25519")).publicKey;
    const credentials = { accessKeyId: "test", secretAccessKey: "test" };
    ecs = new ECSClient({ region: "us-east-2", endpoint: world.aws.url, credentials, maxAttempts: 1 });
  });
  afterAll(() => world?.close());
  let publicKey = "";
  const input = (changes: Partial<RunTaskCommandInput> = {}): RunTaskCommandInput => ({
    cluster: "test-cluster",
    taskDefinition: "test-task",
    networkConfiguration: { awsvpcConfiguration: { subnets: ["subnet-1"], securityGroups: ["sg-1"] } },
    overrides: {
      containerOverrides: [{ name: "ci-coordinator", environment: [{ name: "SSH_PUBLIC_KEY", value: publicKey }] }],
    },
    ...changes,
  });
  const spot = { capacityProvider: "FARGATE_SPOT", weight: 1 };

  test.each<[string, Partial<RunTaskCommandInput>, RegExp]>([
    ["an unknown cluster", { cluster: "none" }, /Cluster not found/],
    ["a cluster without a strategy", { cluster: "bare-cluster" }, /No Container Instances were found in your cluster/],
    ["an unknown task definition", { taskDefinition: "none" }, /TaskDefinition not found/],
    ["launch type and strategy at once", { launchType: "FARGATE", capacityProviderStrategy: [spot] }, /./],
    ["weights of zero", { capacityProviderStrategy: [{ ...spot, weight: 0 }] }, /weight/i],
    ["a provider the cluster lacks", { capacityProviderStrategy: [{ ...spot, capacityProvider: "x" }] }, /provider/i],
    ["a token that is too long", { clientToken: "x".repeat(65) }, /token/i],
    ["startedBy with a blank", { startedBy: "a b" }, /startedBy/],
    ["startedBy that is too long", { startedBy: "x".repeat(129) }, /startedBy/],
    ["an override for no container", { overrides: { containerOverrides: [{ name: "x" }] } }, /not a container/],
    [
      "overrides of more than 8192 characters",
      { overrides: { containerOverrides: [{ name: "ci-coordinator", command: ["x".repeat(8192)] }] } },
      /8192/,
    ],
    ["a variable that is a secret", { taskDefinition: "secret-task" }, /secret name must be unique/],
    ["an unknown platform version", { platformVersion: "9.9.9" }, /platform/i],
    ["51 tags", { tags: Array.from({ length: 51 }, (_, n) => ({ key: `${n}`, value: "" })) }, /tag/i],
    ["a member that the driver has no business with", { referenceId: "x" }, /referenceId/],
  ])("refuses %s", async (_, changes, message) => {
    await expect(ecs.send(new RunTaskCommand(input(changes)))).rejects.toThrow(message);
  });

  test("answers a token again with the same task, and other parameters under it with a conflict", async () => {
    const first = await ecs.send(new RunTaskCommand(input({ clientToken: "one" })));
    const again = await ecs.send(new RunTaskCommand(input({ clientToken: "one" })));
    expect(again.tasks?.[0]?.taskArn).toBe(first.tasks?.[0]?.taskArn);
    const other = ecs.send(new RunTaskCommand(input({ clientToken: "one", startedBy: "x" })));
    await expect(other).rejects.toMatchObject({ name: "ConflictException" });
  });

  test("hides a new task for a while, and finds it by startedBy alone", async () => {
    const { tasks } = await ecs.send(new RunTaskCommand(input({ startedBy: "someone" })));
    const task = tasks?.[0]?.taskArn as string;
    const describe = () => ecs.send(new DescribeTasksCommand({ cluster: "test-cluster", tasks: [task] }));
    const list = (more = {}) =>
      ecs.send(new ListTasksCommand({ cluster: "test-cluster", startedBy: "someone", ...more }));
    expect((await describe()).failures).toMatchObject([{ reason: "MISSING" }]);
    expect((await list()).taskArns).toEqual([]);
    await expect.poll(async () => (await list()).taskArns, { timeout: 30_000 }).toEqual([task]);
    expect((await describe()).tasks).toMatchObject([{ taskArn: task }]);
    await expect(list({ family: "test-task" })).rejects.toThrow(/startedBy/);
  });
});

// ---------------------------------------------------------------------------------------------------------
// 10. Stages, by the compiled program
// ---------------------------------------------------------------------------------------------------------

describe("the compiled program", () => {
  let world: World;
  beforeAll(async () => {
    world = await makeWorld({ hosts, secrets: { SSH_PUBLIC_KEY: "set below" }, timing: { hideDescribe: 300 } });
  });
  // What a failed test left must not fail the next.
  afterEach(async () => {
    for (const { taskArn } of world.aws.running())
      await world.aws.stopTask(taskArn, { stopCode: "UserInitiated", stoppedReason: "test over", graceSeconds: 0 });
    fs.rmSync(world.records, { recursive: true, force: true });
  });
  afterAll(() => world?.close());
  let jobs = 1000;

  /** A job of its own, and a runner for it. */
  function makeRunner({
    config = world.configure(),
    job = {},
    ...options
  }: {
    config?: string;
    job?: Parameters<typeof gitlabJob>[0];
    environment?: Record<string, string>;
    gracefulKillTimeout?: number;
    without?: string[];
    onOutput?: (stage: string, stream: "stdout" | "stderr", chunk: Buffer) => void;
  } = {}) {
    const where = directory();
    const buildsDir = hosts.kind === "container" ? "/builds" : join(where, "builds");
    const made = gitlabJob({ id: jobs++, source: repository.bundle, sha: repository.sha, buildsDir, ...job });
    const environment = { ...world.aws.environment, ...options.environment };
    const command = [driver, "--config", config];
    const runner = new Runner({ ...options, driver: command, environment, job: made, directory: where });
    return Object.assign(runner, { job: made });
  }
  /** How many calls of each kind there have been since. */
  const callsSince = (since: number) => {
    const counts: Record<string, number> = {};
    for (const { operation } of world.aws.calls.slice(since)) counts[operation] = (counts[operation] ?? 0) + 1;
    return counts;
  };
  const nothingLeft = () => {
    expect(world.aws.running().map(({ taskArn }) => taskArn)).toEqual([]);
    expect(
      fs.existsSync(world.records) ? fs.readdirSync(world.records).filter((name) => name !== ".manager-id") : [],
    ).toEqual([]);
  };
  /** Environment of a stage called by hand, for a job without a runner. */
  const byHand = () => {
    const { environment, response } = gitlabJob({ id: jobs++ });
    const where = directory();
    fs.writeFileSync(join(where, "response.json"), JSON.stringify(response));
    return {
      ...world.aws.environment,
      ...environment,
      JOB_RESPONSE_FILE: join(where, "response.json"),
      BUILD_EXIT_CODE_FILE: join(where, "exit-code"),
    };
  };
  const scriptFile = (text: string) => {
    const path = join(directory(), "script.sh");
    fs.writeFileSync(path, text);
    return path;
  };

  for (const form of ["17.9", "19.x"] as const)
    for (const shell of ["bash", "sh"] as const)
      taskTest(`a whole job, scripts of GitLab Runner ${form} for ${shell}`, async () => {
        const since = world.aws.calls.length;
        const runner = makeRunner({
          job: {
            form,
            shell,
            script: ["git log -1 --format=%H", proofOfArrival(awkwardVariables), "echo to stderr >&2"],
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
        // run and cleanup say nothing of their own.
        for (const { stage, stderr } of result.stages)
          if (stage === "cleanup" || stage === "prepare_script") expect(stderr.toString()).toBe("");
      });

  taskTest("what prepare tells, and what RunTask is asked, with the guide's settings", async () => {
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
    test(`a task that has only an IPv6 address, ${UsePublicIP ? "with" : "without"} UsePublicIP`, async ({ skip }) => {
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

  test("a task that has addresses of both kinds is logged in to at its IPv4 address", async () => {
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

  test("keys in the environment override AWS_PROFILE, as in the Go SDK", async () => {
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

  taskTest("a failing job ends with its exit code, and its after_script runs", async () => {
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

  taskTest("an older runner without an exit code file gets the build failure alone", async () => {
    const result = await makeRunner({ job: { script: ["exit 42"] }, without: ["BUILD_EXIT_CODE_FILE"] }).runJob();
    expect(result).toMatchObject({ status: "build-failure", exitCode: 1 });
    nothingLeft();
  });

  taskTest("by hand: five runs, a script of 300 KB, exit codes in the file and gone from it", async () => {
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
      stderr: expect.stringContaining("the script of build_script, /does/not/exist cannot be read"),
    });
    expect(codeFile()).toBe("");
    expect(await custom("cleanup")).toMatchObject({ code: 0, stderr: "" });
    const late = await custom("run", scriptFile("true"), "after_script");
    expect(late).toMatchObject({ code: 12, stderr: expect.stringContaining("there is no task for this job") });
    nothingLeft();
  });

  taskTest("cancelled in the user's script: it is ended, and after_script runs in the same task", async () => {
    const seconds = `9${process.pid}`; // no other process of this machine sleeps for as long
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
    "a whole job passes in a container of user 1000 with a read-only root file system",
    async () => {
      const shared = scratchDirectory("shared");
      const source = join(shared.path, "repository.bundle");
      fs.chmodSync(shared.path, 0o755); // the container's user is not this test's
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

  taskTest("cancelled in prepare: the task is stopped before the driver ends", async () => {
    const held = world.aws.inject({ operation: "RunTask", do: { address: "refusing" } });
    const process = start([driver, "--config", world.configure(), "custom", "prepare"], { env: byHand() });
    await process.shows("Task ");
    process.process.kill("SIGTERM");
    const { code, stderr } = await process.finished;
    expect({ code, stderr }).toMatchObject({ code: 2, stderr: expect.stringMatching(/error: stopped by SIGTERM\n$/) });
    expect(held.used).toBe(1);
    nothingLeft();
  });

  taskTest("with no more than the official driver's permissions a whole job passes", async () => {
    world.aws.permissions = new Set(["ecs:RunTask", "ecs:StopTask", "ecs:DescribeTasks", "iam:PassRole"]);
    onTestFinished(() => {
      delete world.aws.permissions;
    });
    const runner = makeRunner({ job: { script: ["true"] } });
    expect(await runner.runJob()).toMatchObject({ status: "success" });
    // A second cleanup has no record and may not look: one warning.
    const again = await runner.cleanup();
    expect(again.exitCode).toBe(0);
    expect(again.stderr.toString().match(/warning: .*ecs:ListTasks was refused: AccessDeniedException/g)).toHaveLength(
      1,
    );
    nothingLeft();
  });

  taskTest("public addresses are asked of EC2, private ones are not", async () => {
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

  for (const definition of ["legacy-task", "secret-task:1"])
    taskTest(`the guide of 2020, whose key comes from a secret of ${definition}`, async () => {
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

  taskTest("a PrivateKeyPath beside a task definition that accepts a key for each job is a warning", async () => {
    const path = join(directory(), "id_ed25519");
    fs.writeFileSync(path, (await makeKeyPair("ed25519")).privateKey, { mode: 0o600 });
    const result = await makeRunner({
      config: world.configure({ SSH: { PrivateKeyPath: path } }),
      job: { script: ["true"] },
    }).runJob();
    expect(result).toMatchObject({ status: "success" });
    const warnings = result.trace.toString().match(/warning: .*PrivateKeyPath.*/g);
    expect(warnings).toEqual([
      "warning: with PrivateKeyPath all tasks accept one key; remove it, unless the image ignores SSH_PUBLIC_KEY",
    ]);
    // With a key for each job there is nothing to say.
    const plain = await makeRunner({ job: { script: ["true"] } }).runJob();
    expect(plain.trace.toString()).not.toContain("PrivateKeyPath");
    nothingLeft();
  });

  taskTest(
    "a job's variable names the task definition; if that does not accept the key, the failure says what to change",
    async () => {
      const legacy = await makeRunner({
        job: { variables: { FARGATE_TASK_DEFINITION: "legacy-task" }, script: ["true"] },
      }).prepare();
      const text = legacy.map(({ stderr }) => stderr.toString()).join("");
      expect(text).toContain(
        "FARGATE_TASK_DEFINITION of this job, legacy-task, cannot be used: ecs:RunTask was refused",
      );
      expect(text).toContain("what to do: its container must be named ci-coordinator");
      // A build failure: the runner does not try again.
      expect(legacy.map(({ stage }) => stage)).toEqual(["config", "prepare", "cleanup"]);
      nothingLeft();
    },
    { timeout: 90_000 },
  );

  taskTest("settings that users of the official driver ask for reach ECS", async () => {
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

  taskTest("connections that are refused or reset are made again", async () => {
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
    // Nobody answers for as long as ConnectTimeout allows: the task lives, and that is said, too.
    await proxy.close();
    const gone = world.configure({ SSH: { Port: proxy.port, ConnectTimeout: 1 } });
    const failed = await fargate(["--config", gone, "custom", "run", scriptFile("echo never"), "x"], { env });
    expect(failed).toMatchObject({ code: 2, stdout: Buffer.from("") });
    expect(failed.stderr).toMatch(
      /error: x did not begin: \w+@127\.\S+: .*ECONNREFUSED.*; ECS says that the task is RUNNING\n.*what to do: the task runs on: .*\n$/,
    );
    expect(await fargate(["--config", world.configure(), "custom", "cleanup"], { env })).toMatchObject({ code: 0 });
    nothingLeft();
  });

  taskTest("a task that stops under a script: the log says why", async () => {
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
    // The stages after it do not wait for ConnectTimeout (120 s) each.
    const next = start([driver, "--config", config, "custom", "run", scriptFile("true"), "after_script"], { env });
    await next.shows("after_script did not begin: the task stopped: SpotInterruption");
    expect((await next.finished).code).toBe(2);
    expect(await fargate(["--config", config, "custom", "cleanup"], { env })).toMatchObject({ code: 0 });
    nothingLeft();
  });

  taskTest("200 MB of output in bounded memory", async () => {
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
      // Peak resident set in kB. A slow reader: the driver must wait for it.
      const status = fs.readFileSync(`/proc/${child.pid}/status`, "utf8");
      peak = Math.max(peak, Number(/VmHWM:\s+(\d+)/.exec(status)?.[1] ?? 0));
      child.stdout.pause();
      setImmediate(() => child.stdout.resume());
    });
    expect(await new Promise((done) => child.on("close", done))).toBe(0);
    expect(bytes).toBe(200_000_000);
    expect(peak / 1024).toBeGreaterThan(20);
    expect(peak / 1024).toBeLessThan(250); // it has 65 MB before the first byte comes
    await fargate(["--config", config, "custom", "cleanup"], { env });
  });

  taskTest("a slow reader gets every byte of both streams, and the reason of a failure after them", async () => {
    const env = byHand();
    const config = world.configure();
    expect(await fargate(["--config", config, "custom", "prepare"], { env })).toMatchObject({ code: 0 });
    const slowly = async (script: string, stopAfter?: number) => {
      const command = ["--config", config, "custom", "run", scriptFile(script), "x"];
      const debugged = atDebug([driver, ...command]);
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
        // Nobody reads until the driver has been told to stop and has had time to fill the pipe.
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
    // For each word on the one stream, ssh2 would let the server send two MiB more of the other.
    const mixed = await slowly("for i in $(seq 60); do head -c 1000000 /dev/zero; echo $i >&2; done");
    expect([mixed.code, mixed.stdout.length, mixed.stderr.length]).toEqual([0, 60_000_000, 171]);
    const stopped = await slowly("head -c 1000000 /dev/zero >&2; sleep 600", 1_000);
    expect(stopped.code).toBe(2);
    expect(stopped.stderr.toString()).toContain("error: stopped by SIGTERM\n");
    await fargate(["--config", config, "custom", "cleanup"], { env });
    nothingLeft();
  });

  taskTest("a reader that goes away ends the stage and the script", async () => {
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

  test("a .env, bunfig.toml or node_modules in the working directory has no say", async () => {
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
    // From source: as documented it works, plainly it refuses to go on (and only bun itself has run the preload).
    // From source: what bun itself reads first is a reason to do nothing.
    const source = join(projectRoot, "fargate.ts");
    const documented = [process.execPath, "--no-env-file", "--config=/dev/null", source, "custom", "config"];
    fs.rmSync(join(hostile, "tsconfig.json")); // bun would follow it; see the README
    expect(await start(documented, { env, cwd: hostile }).finished).toMatchObject({ code: 0, stderr: "" });
    expect(fs.existsSync(marker)).toBe(false);
    const plain = await start([process.execPath, source, "custom", "prepare"], { env, cwd: hostile }).finished;
    expect(plain).toMatchObject({
      code: 2,
      stderr: expect.stringContaining("bun takes settings from .env, bunfig.toml here; call it as: bun --no-env-file"),
    });
    nothingLeft();
  });

  taskTest("bun fargate.ts custom ... works as the compiled program does", async () => {
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

  test("requests go through HTTP_PROXY, and past it with NO_PROXY", async () => {
    const config = world.configure();
    const env = { ...byHand(), AWS_ENDPOINT_URL: "http://ecs.example.test", HTTP_PROXY: world.aws.url };
    expect(await fargate(["--config", config, "custom", "prepare"], { env })).toMatchObject({ code: 0 });
    expect(await fargate(["--config", config, "custom", "cleanup"], { env })).toMatchObject({ code: 0 });
    const past = { ...byHand(), HTTP_PROXY: "http://127.0.0.1:1", NO_PROXY: "127.0.0.1" };
    expect(await fargate(["--config", config, "custom", "prepare"], { env: past })).toMatchObject({ code: 0 });
    expect(await fargate(["--config", config, "custom", "cleanup"], { env: past })).toMatchObject({ code: 0 });
    nothingLeft();
  });

  test("LogFile takes the log, in its format; what ends a stage is on standard error as well", async () => {
    const file = join(directory(), "fargate.log");
    const config = world.configure({ top: { LogFile: file, LogFormat: "json", LogLevel: "debug" } });
    const env = byHand();
    expect(await fargate(["--config", config, "custom", "prepare"], { env })).toMatchObject({ code: 0, stderr: "" });
    expect(await fargate(["--config", config, "custom", "cleanup"], { env })).toMatchObject({ code: 0, stderr: "" });
    const failed = await fargate(["--config", config, "custom", "run", "/none", "x"], { env });
    expect(failed.stderr).toMatch(/^\{.*"msg":"the script of x, .none cannot be read.*\}\n$/);
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
      msg: expect.stringContaining("cannot be read"),
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
    expect({ code, stderr }).toEqual({ code: 0, stderr: expect.stringContaining("cannot be written: ENXIO") });
    const nowhere = world.configure({ top: { LogFile: "/does/not/exist/x.log" } });
    const warned = await fargate(["--config", nowhere, "custom", "cleanup"], { env });
    expect(warned).toMatchObject({
      code: 0,
      stderr: expect.stringContaining("LogFile /does/not/exist/x.log cannot be"),
    });
  });

  test("LogFile is not opened through a link of another user's, at its end or on the way", async ({ skip }) => {
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
      ["theirs.log", `${path("theirs.log")} is a symbolic link of another user, of id 12345`],
      ["their-logs/x.log", `${path("their-logs")} is a symbolic link of another user, of id 12345`],
      ["ours-to-theirs.log", `${path("theirs.log")} is a symbolic link of another user, of id 12345`],
      ["loop.log", "Maximum call stack size exceeded"],
    ] as const) {
      const { code, stderr } = await cleanUp(path(file));
      expect({ code, stderr }).toMatchObject({
        code: 0,
        stderr: expect.stringContaining(`warning: LogFile ${path(file)} cannot be written: ${why}`),
      });
    }
    expect([fs.existsSync(target), fs.readdirSync(path("logs"))]).toEqual([false, []]);
    // Links of root and of this user are followed, to a file that need not be there yet.
    link("target", "ours.log", 0);
    link("logs", "our-logs", 0);
    for (const file of ["ours.log", "our-logs/x.log"])
      expect(await cleanUp(path(file))).toMatchObject({ code: 0, stderr: "" });
    for (const file of [target, path("logs/x.log")]) expect(fs.readFileSync(file, "utf8")).toContain("is not there");
  });

  test("LogFile may be /dev/stderr", async () => {
    const config = world.configure({ top: { LogFile: "/dev/stderr" } });
    const output = join(directory(), "output");
    const shell = ["sh", "-c", 'output=$1; shift; exec "$@" 2>"$output"', "sh", output];
    const command = [...shell, driver, "--config", config, "custom", "cleanup"];
    const { code, stderr } = await start(command, { env: byHand() }).finished;
    expect({ code, stderr }).toEqual({ code: 0, stderr: "" });
    const text = fs.readFileSync(output, "utf8");
    expect(text).toContain("is not there: nothing was ever started");
    expect(text).not.toContain("LogFile");
  });

  test("relative paths in the configuration file work from any working directory", async () => {
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

  test("unknown keys are a warning in prepare, and in prepare only", async () => {
    const config = world.configure({ Fargate: { Clutser: "x" } });
    const env = byHand();
    const warning = "warning: .*unknown key Fargate\\.Clutser; the nearest known one is Fargate\\.Cluster\n";
    expect((await fargate(["--config", config, "custom", "prepare"], { env })).stderr).toMatch(new RegExp(warning));
    expect((await fargate(["--config", config, "custom", "cleanup"], { env })).stderr).toBe("");
    nothingLeft();
  });

  test.each<[what: string, lines: string[], warnings: string[]]>([
    ["enough time", ["shutdown_timeout = 60", "graceful_kill_timeout = 40"], []],
    ["the default times", [], ["shutdown_timeout = 30"]],
    [
      "0, which stands for the defaults",
      ["shutdown_timeout = 0", "graceful_kill_timeout = 0"],
      ["shutdown_timeout = 30"],
    ],
    [
      "too little time",
      ["shutdown_timeout = 39", "graceful_kill_timeout = 39"],
      ["graceful_kill_timeout = 39", "shutdown_timeout = 39"],
    ],
    ["a damaged file", ["shutdown_timeout = ["], []],
    ["values of other types", ['shutdown_timeout = "x"', 'graceful_kill_timeout = "y"'], []],
  ])("prepare compares CancelGracePeriod with the runner's config.toml: %s", async (_, lines, warnings) => {
    const path = join(directory(), "config.toml");
    const [shutdown = "", graceful = ""] = lines;
    const runners = [
      `[[runners]]\n[runners.custom]\nrun_exec = "/bin/true"\ngraceful_kill_timeout = 1`, // another driver's
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
        expect.stringContaining(`warning: ${warning} in the runner's config.toml: it should be 40 s or more`),
      ),
    );
    expect(stderr).not.toContain("glrt-");
    expect((await prepared({})).stderr).not.toContain("config.toml");
    nothingLeft();
  });

  test("a bad configuration starts no task and lists every problem", async () => {
    const since = world.aws.calls.length;
    const config = join(projectRoot, "fixtures", "config", "bad.toml");
    const bad = await fargate(["--config", config, "custom", "prepare"], { env: byHand() });
    expect(bad.code).toBe(2);
    expect(bad.stderr.trimEnd().split("\n")).toHaveLength(22);
    const none = await fargate(["custom", "prepare"], { env: byHand(), cwd: directory() });
    // With its whole path: the runner starts each stage in a working directory of its own.
    expect(none.stderr).toMatch(/error: the configuration file \/\S+\/config\.toml cannot be read: ENOENT/);
    const jobless = await fargate(["--config", world.configure(), "custom", "prepare"], { env: world.aws.environment });
    expect(jobless.stderr).toContain("there is no job: neither JOB_RESPONSE_FILE nor CUSTOM_ENV_CI_JOB_ID");
    expect([none.code, jobless.code]).toEqual([2, 2]);
    expect(world.aws.calls.length).toBe(since);
  });

  /** Every path below a directory, with what its file holds. */
  const filesBelow = (root: string): Record<string, string> =>
    Object.fromEntries(
      fs
        .readdirSync(root, { recursive: true, withFileTypes: true })
        .filter((entry) => entry.isFile() || entry.isSymbolicLink())
        .map((entry) => join(entry.parentPath, entry.name))
        .map((path) => [path, fs.readFileSync(path, "latin1")]),
    );
  /** Leaves a mark in the task, and shows those that are there. */
  const markTask = (who: string) => [`echo ${who} >> ~/visitors`, 'echo "visitors: $(echo $(cat ~/visitors))"'];

  const victim = { id: 901_000, projectId: 77, projectPath: "bank/vault", runnerToken: "glrt-victims_Runner" };
  const stolen = {
    CI_JOB_ID: String(victim.id),
    CI_PIPELINE_ID: String(victim.id - 100),
    CI_PROJECT_ID: String(victim.projectId),
    CI_PROJECT_PATH: victim.projectPath,
    CI_PROJECT_URL: `https://gitlab.example.com/${victim.projectPath}`,
    CI_RUNNER_SHORT_TOKEN: "victims_R",
    CI_JOB_TOKEN: "stolen",
  };
  const everywhere = (value: string) => ({
    ...Object.fromEntries(Object.keys(stolen).map((name) => [name, value])),
    CI_BUILDS_DIR: value,
    CI_CONCURRENT_ID: value,
  });
  for (const [what, variables] of [
    ["the values of another job that runs", stolen],
    ["../../x", everywhere("../../x")],
    ["a path from the root", everywhere("/etc/x")],
    ["control characters", everywhere("\u0001\u001b[0K\r\n\u007f\u2028section_start:1:x\r\u001b[0K")],
    ["5 KB", everywhere("x".repeat(5_000))],
    ["nothing", everywhere("")],
  ] as const)
    taskTest(`two jobs at once, of which one sets its ids to ${what}: each stays in its own task`, async () => {
      const root = directory();
      const metadata = join(root, "a", "b", "c", "metadata");
      const config = world.configure({ TaskMetadata: { Directory: metadata }, top: { LogLevel: "debug" } });
      const stops = world.aws.callsTo("StopTask").length;
      const starts = world.aws.callsTo("RunTask").length;
      const honest = makeRunner({ config, job: victim });
      expect((await honest.prepare()).at(-1)).toMatchObject({ stage: "prepare", exitCode: 0 });
      const before = filesBelow(root);
      const [task] = world.aws.running();
      const script = markTask("victim").join("\n");
      const [attack] = await Promise.all([
        makeRunner({ config, job: { variables, script: markTask("attacker") } }).runJob(),
        honest.run("build_script", script),
      ]);
      expect(attack).toMatchObject({ status: "success" });
      expect(attack.trace.toString()).toMatch(/^visitors: attacker$/m);
      // The victim's task runs on, and nobody else has been there; nothing of the attacker's is left anywhere.
      expect(world.aws.running()).toEqual([expect.objectContaining({ taskArn: task?.taskArn })]);
      expect(filesBelow(root)).toEqual(before);
      const again = await honest.run("build_script", script);
      expect(again.stdout.toString()).toMatch(/^visitors: victim victim$/m);
      expect((await honest.cleanup()).exitCode).toBe(0);
      const stopped = world.aws.callsTo("StopTask").slice(stops);
      expect(stopped).toHaveLength(2);
      for (const { input } of stopped) expect(input.reason).toMatch(/^job \d+ of project \d+$/);
      for (const { input } of world.aws.callsTo("RunTask").slice(starts)) {
        expect(input.startedBy).toMatch(/^fargate-[0-9a-f]{12}-[0-9a-f]{32}$/);
        expect(input.tags).toBeUndefined();
      }
      expect(world.aws.running()).toEqual([]);
      expect(Object.keys(filesBelow(root))).toEqual([join(metadata, ".manager-id")]);
    });

  test("a variable that holds NUL cannot reach the driver, and one of 128 KiB neither: no task is started", async () => {
    const since = world.aws.calls.length;
    for (const value of ["a\u0000b", "x".repeat(140_000)]) {
      const result = await makeRunner({ job: { variables: { CI_JOB_ID: value } } }).runJob();
      expect(result).toMatchObject({ status: "system-failure" });
    }
    expect(world.aws.calls.length).toBe(since);
    nothingLeft();
  });

  taskTest("the same ids from two GitLab instances, also of one host name, do not meet", async () => {
    const ids = { id: 902_000, projectId: 78, projectPath: "acme/rocket" };
    const instances = [
      { ...ids, host: "gitlab.example.com" },
      { ...ids, host: "gitlab.example.org" },
      { ...ids, host: "gitlab.example.com/second" },
    ];
    const runners = instances.map((job) => makeRunner({ job: { ...job, script: markTask("a") } }));
    const results = await Promise.all(runners.map((runner) => runner.runJob()));
    for (const { status, trace } of results) {
      expect({ status, trace: trace.toString() }).toMatchObject({ status: "success" });
      expect(trace.toString()).toMatch(/^visitors: a$/m);
    }
    nothingLeft();
  });

  taskTest("a record under the name that variables make is not looked at where there is a job response", async () => {
    const env = byHand();
    const config = world.configure();
    const custom = (...args: string[]) => fargate(["--config", config, "custom", ...args], { env });
    // A task of somebody else's, and a record of it where the official driver would look.
    expect(await custom("prepare")).toMatchObject({ code: 0 });
    const [other] = world.aws.running();
    const own = join(world.records, `${readJob(env)?.stem}.json`);
    const { JOB_RESPONSE_FILE: _, ...variables } = env;
    const named = join(world.records, `${readJob(variables)?.stem}.json`);
    const { StartedBy } = readRecord(own) as TaskRecord;
    const forged = StartedBy.replace(/[0-9a-f]{32}$/, readJob(variables)?.hash.slice(0, 32) as string);
    writeRecord(named, { ...(readRecord(own) as TaskRecord), StartedBy: forged });
    fs.rmSync(own);
    expect(await custom("run", scriptFile("echo never"), "x")).toMatchObject({
      code: 2,
      stdout: Buffer.from(""),
      stderr: expect.stringContaining("there is no task for this job"),
    });
    const since = world.aws.calls.length;
    const prepared = await custom("prepare");
    expect(prepared.code, prepared.stderr).toBe(0);
    expect(callsSince(since).StopTask).toBeUndefined();
    expect(world.aws.running().map(({ taskArn }) => taskArn)).toContain(other?.taskArn);
    expect(await custom("cleanup")).toMatchObject({ code: 0 });
    expect(world.aws.running().map(({ taskArn }) => taskArn)).toEqual([other?.taskArn]);
    // Without a response it is what there is to go by.
    const byVariables = await fargate(["--config", config, "custom", "cleanup"], { env: variables });
    expect(byVariables.code, byVariables.stderr).toBe(0);
    nothingLeft();
  });

  taskTest("a task definition that a job may not name: a build failure, and no call to AWS", async () => {
    const since = world.aws.calls.length;
    const variables = { FARGATE_TASK_DEFINITION: "secret-task:1" };
    const config = world.configure({ Fargate: { AllowedTaskDefinitions: ["test-*"] } });
    const refused = await makeRunner({ config, job: { variables } }).runJob();
    expect(refused).toMatchObject({ status: "build-failure", exitCode: 1 });
    // Not tried again.
    expect(refused.stages.map(({ stage }) => stage)).toEqual(["config", "prepare", "cleanup"]);
    expect(refused.trace.toString()).toMatch(
      /Z error: FARGATE_TASK_DEFINITION of this job, secret-task:1, is not allowed: AllowedTaskDefinitions has test-\*\n/,
    );
    expect(world.aws.calls.length).toBe(since);
    const allowed = makeRunner({
      config,
      job: { variables: { FARGATE_TASK_DEFINITION: "test-task" }, script: ["true"] },
    });
    expect(await allowed.runJob()).toMatchObject({ status: "success" });
    nothingLeft();
    // A job that runs is not left alone with its task when the operator forbids what it has named.
    const open = makeRunner({ job: { variables: { FARGATE_TASK_DEFINITION: "test-task" } } });
    await open.prepare();
    const env = {
      ...world.aws.environment,
      ...open.job.environment,
      JOB_RESPONSE_FILE: join(directory(), "response.json"),
    };
    fs.writeFileSync(env.JOB_RESPONSE_FILE, JSON.stringify(open.job.response));
    const closed = world.configure({ Fargate: { AllowedTaskDefinitions: [] } });
    expect(await fargate(["--config", closed, "custom", "cleanup"], { env })).toMatchObject({ code: 0, stderr: "" });
    nothingLeft();
  });

  test("a job's variables that nothing reads: a warning if they look misspelt, else a line at debug", async () => {
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
    const lines = stderr.split("\n").filter((line) => line.includes("nothing reads the job's variable "));
    const warnings = lines
      .filter((line) => line.includes(" warning: "))
      .map((line) => line.replace(/^.* variable /, ""));
    expect(warnings.sort()).toEqual([
      "CUSTOM_ENV_FARGATE_PLATFORM_VERSION; did you mean FARGATE_PLATFORM_VERSION?",
      "FARGATE_TASK_DEFINITON; did you mean FARGATE_TASK_DEFINITION?",
    ]);
    // Nobody can fill the log with names.
    expect(lines).toHaveLength(20);
    for (const line of lines) expect(line).not.toMatch(/\p{Cc}|y{5000}/u);
    expect((await fargate(["--config", config, "custom", "cleanup"], { env })).stderr).not.toContain("nothing reads");
    nothingLeft();
  });

  taskTest("a job's image and services have no effect: prepare says so in one line", async () => {
    const hostile = "\u001b[0Ksection_start:1:x\r\n{names}";
    const services = ["postgres:16", { name: "redis:7", alias: "cache" }, hostile, "z".repeat(9_000)];
    const result = await makeRunner({ job: { image: "ruby:3.2", services, script: ["true"] } }).runJob();
    expect(result).toMatchObject({ status: "success" });
    const lines = result.stages.flatMap(({ stderr }) => stderr.toString().split("\n"));
    const [line, ...more] = lines.filter((text) => /ruby|postgres|redis|no effect/.test(text));
    expect(more).toEqual([]);
    expect(line).toMatch(
      /Z warning: image: and services: have no effect, choose a task definition by FARGATE_TASK_DEFINITION instead: ruby:3\.2, postgres:16, redis:7, /,
    );
    expect(line).not.toMatch(/\p{Cc}|z{5000}/u);
    // Without any, nothing.
    const plain = await makeRunner({ job: { script: ["true"] } }).runJob();
    expect(plain.trace.toString()).not.toContain("have no effect");
    nothingLeft();
  });

  taskTest("without AllowedTaskDefinitions prepare says at debug that a job may name any", async () => {
    const says = "debug: AllowedTaskDefinitions is not set: a job's variable may name any task definition";
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

describe("an AWS endpoint with a certificate of a private CA", () => {
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
  /** Calls ListTasks, with none of the CA settings of the tests' own environment. */
  const list = (env: Record<string, string | undefined> = {}, wrapper: string[] = []) =>
    start([...wrapper, driver, "--config", world.configure(), "sweep"], { env: { ...world.aws.environment, ...env } })
      .finished;

  test.each([
    ["AWS_CA_BUNDLE", () => ({ AWS_CA_BUNDLE: files["ca.pem"] })],
    ["AWS_CA_BUNDLE, as the second certificate of a file", () => ({ AWS_CA_BUNDLE: files["two.pem"] })],
    ["ca_bundle of the shared config file", () => ({ AWS_CONFIG_FILE: files.config })],
    ["ca_bundle of a profile", () => ({ AWS_CONFIG_FILE: files.profiles, AWS_PROFILE: "ci" })],
    [
      "AWS_CA_BUNDLE, which overrides ca_bundle",
      () => ({ AWS_CA_BUNDLE: files["ca.pem"], AWS_CONFIG_FILE: files.config, AWS_PROFILE: "ci" }),
    ],
    ["NODE_EXTRA_CA_CERTS", () => ({ NODE_EXTRA_CA_CERTS: files["ca.pem"] })],
    [
      "NODE_EXTRA_CA_CERTS, beside an AWS_CA_BUNDLE",
      () => ({ NODE_EXTRA_CA_CERTS: files["ca.pem"], AWS_CA_BUNDLE: files["other.pem"] }),
    ],
    ["SSL_CERT_FILE", () => ({ SSL_CERT_FILE: files["ca.pem"] })],
    [
      "SSL_CERT_FILE, beside an AWS_CA_BUNDLE",
      () => ({ SSL_CERT_FILE: files["ca.pem"], AWS_CA_BUNDLE: files["other.pem"] }),
    ],
  ])("is trusted through %s", async (_, env) => {
    const finished = await list(env());
    expect(finished).toMatchObject({ code: 0, stderr: "" });
  });

  for (const beside of [false, true])
    test(`is trusted through the system's store${beside ? ", beside an AWS_CA_BUNDLE" : ""}`, async ({ skip }) => {
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
    ["is not there", "none.pem", /: ENOENT: /],
    ["is empty", "empty.pem", /: there is no certificate in it\n/],
    ["holds a broken certificate", "broken.pem", /: .*\n/],
  ])("an AWS_CA_BUNDLE that %s is a failure that names it", async (_, name, reason) => {
    const calls = world.aws.calls.length;
    const path = files[name] ?? "/none.pem";
    const finished = await list({ AWS_CA_BUNDLE: path });
    ended(finished, 2);
    expect(finished.stderr).toMatch(/error: the CA bundle \/\S+ cannot be used: /);
    expect(finished.stderr).toContain(path);
    expect(finished.stderr).toMatch(reason);
    expect(world.aws.calls.length).toBe(calls);
  });

  test("a whole job", async () => {
    const scene = makeScene(world, {}, forever);
    const env = { AWS_CA_BUNDLE: files["ca.pem"] };
    ended(await scene.stage("prepare", { env }), 0);
    ended(await scene.begin("run", { script: "true", env }).finished, 0);
    ended(await scene.stage("cleanup", { env }), 0);
    expect(world.aws.running()).toEqual([]);
  });
});

// ---------------------------------------------------------------------------------------------------------
// Faults: what each ends with, what the log says, and how many tasks are left
// ---------------------------------------------------------------------------------------------------------

/** A world of one job's own, and its stages as GitLab Runner would call them. */
interface Scene {
  readonly world: World;
  readonly env: Record<string, string>;
  /** The job's record. */
  readonly record: string;
  /** Resolves when the first command that the task is to execute is held, where `holdFirstCommand` asks for that. */
  readonly commandHeld: Promise<void>;
  configure(changes?: ConfigChanges): void;
  /** Path of the configuration file. */
  readonly config: string;
  /** Runs a stage of the compiled program to its end. */
  stage(name: string, options?: { env?: Record<string, string | undefined> }): Promise<Finished>;
  /** Begins one; `run` gets a script. */
  begin(
    name: string,
    options?: { env?: Record<string, string | undefined>; script?: string; operands?: string[] },
  ): Started;
  run(script: string): Promise<Finished>;
}

/** What a fault came to: the stage whose log is shown, and the line of it that tells (the last one unless given). */
interface Met {
  readonly stage: string;
  readonly finished: Finished;
  readonly says?: RegExp;
  /** The record may stay: it is for the sweep. */
  readonly keepsRecord?: boolean;
}

interface FaultOptions extends WorldOptions {
  readonly changes?: ConfigChanges;
  /** The task's SSH server does not begin the first command that it is sent. */
  readonly holdFirstCommand?: boolean;
  readonly misbehaviour?: Misbehaviour;
  /** Seconds. */
  readonly jobTimeout?: number;
  /** It needs a container, maybe one of its own kind; elsewhere it is skipped, by name. */
  readonly container?: boolean | ContainerHostsOptions;
  readonly timeout?: number;
}

const SOAK = process.env.SOAK === "true";
const faults: string[] = [];
/** Faults that take minutes: `npm run soak` injects them, `npm test` says that it does not. */
const soaks: string[] = [];
let faultJobs = 500_000;

function makeScene(world: World, { changes = {}, jobTimeout = 3600 }: FaultOptions, commandHeld: Promise<void>): Scene {
  const where = directory();
  const { environment, response } = gitlabJob({ id: faultJobs++, timeout: jobTimeout });
  fs.writeFileSync(join(where, "response.json"), JSON.stringify(response));
  const env = {
    ...world.aws.environment,
    ...environment,
    JOB_RESPONSE_FILE: join(where, "response.json"),
    BUILD_EXIT_CODE_FILE: join(where, "exit-code"),
  };
  let config = world.configure(changes);
  let scripts = 0;
  const job = readJob(env) as Job;
  const begin: Scene["begin"] = (name, options = {}) => {
    const script = join(where, `script-${scripts++}`);
    if (options.script !== undefined) fs.writeFileSync(script, options.script);
    const operands = options.operands ?? (name === "run" ? [script, "build_script"] : []);
    const command = name === "sweep" ? [name] : ["custom", name];
    return start([driver, "--config", config, ...command, ...operands], { env: { ...env, ...options.env } });
  };
  return {
    world,
    env,
    record: join(world.records, `${job.stem}.json`),
    commandHeld,
    configure: (more = {}) => {
      config = world.configure(more);
    },
    get config() {
      return config;
    },
    begin,
    stage: (name, options) => begin(name, options).finished,
    run: (script) => begin("run", { script }).finished,
  };
}

/** Files of the directory of records but for the manager's identity. */
const filesLeft = (world: World) =>
  fs.existsSync(world.records) ? fs.readdirSync(world.records).filter((name) => name !== ".manager-id") : [];

const forever = new Promise<never>(() => {});

const adviceLine = /error: what to do: /;

/** Expects an exit code; what the log says is shown when it is another. */
const ended = ({ code, stderr }: Finished, expected: number) => expect(code, stderr).toBe(expected);

/** Thrown by a fault that cannot be made here; its test is skipped, by name and with the reason. */
class SkipFault extends Error {}

/** Injects a fault, then cleans up as the runner does: no task may be left. What came of it is a row of the table. */
function faultTest(name: string, body: (scene: Scene) => Promise<Met>, options: FaultOptions = {}): void {
  const {
    changes: _,
    jobTimeout: __,
    container = false,
    holdFirstCommand,
    misbehaviour,
    timeout = 120_000,
    ...worldOptions
  } = options;
  faults.push(name);
  test.concurrent(
    name,
    async ({ task, skip }) => {
      if (container && hosts.kind !== "container") skip("it needs a container");
      const held = Promise.withResolvers<void>();
      let commands = 0;
      const holdExec = () => {
        if (!holdFirstCommand || commands++ > 0) return undefined;
        held.resolve();
        return forever;
      };
      const own =
        container === true
          ? hosts
          : container
            ? await containerHosts({ packages: PACKAGES, ...container })
            : embeddedHosts({ misbehaviour: { holdExec, ...misbehaviour } });
      const world = await makeWorld({ hosts: own, ...worldOptions });
      task.meta.hosts = world.hosts.kind;
      try {
        const scene = makeScene(world, options, held.promise);
        const { stage, finished, says, keepsRecord } = await body(scene).catch((error) => {
          if (error instanceof SkipFault) skip(error.message);
          throw error;
        });
        const after = await scene.stage("cleanup");
        if (!keepsRecord) expect(after).toMatchObject({ code: 0 });
        const lines = finished.stderr.trimEnd().split("\n");
        const line = says
          ? lines.find((line) => says.test(line))
          : lines.findLast((line) => !adviceLine.test(line) && !/ debug: /.test(line));
        if (says && line === undefined) throw new Error(`no line says ${says}: ${finished.stderr}`);
        const left = world.aws.running().length;
        addRow({
          fault: name,
          ended: `${stage}: ${finished.signal ?? finished.code}`,
          says: normalise(line ?? ""),
          left,
        });
        expect(left).toBe(0);
        if (!keepsRecord) expect(filesLeft(world)).toEqual([]);
      } finally {
        await world.close();
        if (own !== hosts) await own.close();
      }
    },
    timeout,
  );
}

/** A file that blocks whoever reads it, until `release`; `reached` resolves when somebody does. */
function fifo(): { path: string; reached: Promise<unknown>; release: (content: string) => Promise<void> } {
  const path = join(directory(), "fifo");
  execFileSync("mkfifo", [path]);
  const opened = promisify(fs.open)(path, "w"); // calls back when there is a reader
  let released = false;
  return {
    path,
    reached: opened,
    release: async (content) => {
      if (released) return;
      released = true;
      const file = await opened;
      try {
        fs.writeSync(file, content);
      } catch (error) {
        if ((error as NodeJS.ErrnoException).code !== "EPIPE") throw error; // the reader has been killed
      } finally {
        fs.closeSync(file);
      }
    },
  };
}

/** A server that takes requests and never answers; `reached` resolves at the first. */
async function silentServer(): Promise<{ url: string; reached: Promise<void>; close: () => void }> {
  const reached = Promise.withResolvers<void>();
  const server = createServer(() => reached.resolve()).listen(0, "127.0.0.1");
  await new Promise((listening) => server.once("listening", listening));
  const { port } = server.address() as { port: number };
  const close = () => {
    server.closeAllConnections();
    server.close();
  };
  return { url: `http://127.0.0.1:${port}/`, reached: reached.promise, close };
}

/** A step of prepare at which it can be held. */
interface Step {
  readonly name: string;
  /** Begins prepare and resolves once it is there. `release`: what holds it is let go, after the signal. */
  hold(scene: Scene): Promise<{ prepare: Started; release?: () => unknown }>;
  readonly options?: FaultOptions;
}

const steps: Step[] = [
  {
    name: "before its record is written",
    async hold(scene) {
      const key = fifo();
      scene.configure({ SSH: { PrivateKeyPath: key.path } });
      const prepare = scene.begin("prepare");
      await key.reached;
      expect(fs.existsSync(scene.record)).toBe(false);
      scene.configure();
      return { prepare, release: () => key.release("no key") };
    },
  },
  {
    name: "with its record written, before RunTask is sent",
    async hold(scene) {
      const credentials = await silentServer();
      const prepare = scene.begin("prepare", {
        env: {
          AWS_ACCESS_KEY_ID: undefined,
          AWS_SECRET_ACCESS_KEY: undefined,
          AWS_CONTAINER_CREDENTIALS_FULL_URI: credentials.url,
        },
      });
      await credentials.reached;
      expect(readRecord(scene.record)).toMatchObject({ TaskARN: "", Unanswered: true });
      return { prepare, release: () => credentials.close() };
    },
  },
  {
    name: "with RunTask sent, before it takes effect",
    async hold(scene) {
      const { aws } = scene.world;
      const held = Promise.withResolvers<void>();
      aws.inject({ operation: "RunTask", do: { holdUntil: held.promise } });
      const prepare = scene.begin("prepare");
      await aws.waitFor(() => aws.callsTo("RunTask").length === 1, 30_000);
      expect(aws.tasks()).toEqual([]);
      // It takes effect after the driver is gone.
      return { prepare, release: () => held.resolve() };
    },
    options: { timing: { hideList: 1_500 } },
  },
  {
    name: "with RunTask in effect, before its answer",
    async hold(scene) {
      const { aws } = scene.world;
      const held = Promise.withResolvers<void>();
      aws.inject({ operation: "RunTask", do: { holdUntil: held.promise, after: true } });
      const prepare = scene.begin("prepare");
      await aws.waitFor(() => aws.tasks().length === 1, 30_000);
      expect(readRecord(scene.record)).toMatchObject({ TaskARN: "", Unanswered: true });
      return { prepare, release: () => held.resolve() };
    },
    options: { timing: { hideList: 1_500 } },
  },
  {
    name: "with RunTask answered, before DescribeTasks is",
    async hold(scene) {
      const { aws } = scene.world;
      const held = Promise.withResolvers<void>();
      aws.inject({ operation: "DescribeTasks", do: { holdUntil: held.promise } });
      const prepare = scene.begin("prepare");
      await aws.waitFor(() => aws.callsTo("DescribeTasks").length === 1, 30_000);
      expect(readRecord(scene.record)).toMatchObject({ TaskARN: aws.tasks()[0]?.taskArn, Unanswered: false });
      return { prepare, release: () => held.resolve() };
    },
  },
  {
    name: "while it waits for the task",
    async hold(scene) {
      const { aws } = scene.world;
      aws.timing.provisioning = 600_000;
      const prepare = scene.begin("prepare");
      await aws.waitFor(() => aws.callsTo("DescribeTasks").filter(({ status }) => status === 200).length > 1, 30_000);
      aws.timing.provisioning = 100;
      return { prepare };
    },
  },
  {
    name: "while it logs in",
    async hold(scene) {
      scene.world.aws.inject({ operation: "RunTask", do: { address: "silent" } });
      scene.configure({ top: { LogLevel: "debug" } });
      const prepare = scene.begin("prepare");
      await prepare.shows("no login yet");
      scene.configure();
      return { prepare };
    },
  },
  {
    name: "logged in, while it asks for the container's shells",
    async hold(scene) {
      const prepare = scene.begin("prepare");
      await scene.commandHeld;
      return { prepare };
    },
    options: { holdFirstCommand: true },
  },
];

describe.concurrent("prepare is killed or told to stop", () => {
  for (const step of steps) {
    faultTest(
      `prepare is killed (SIGKILL) ${step.name}; cleanup follows`,
      async (scene) => {
        const { prepare, release } = await step.hold(scene);
        prepare.process.kill("SIGKILL");
        const finished = await prepare.finished;
        await release?.();
        return { stage: "prepare", finished };
      },
      step.options,
    );
    faultTest(
      `prepare is killed (SIGKILL) ${step.name}; the next try follows`,
      async (scene) => {
        const { prepare, release } = await step.hold(scene);
        prepare.process.kill("SIGKILL");
        await prepare.finished;
        await release?.();
        const finished = await scene.stage("prepare");
        ended(finished, 0);
        expect(scene.world.aws.running()).toHaveLength(1);
        expect(scene.world.aws.running()[0]?.taskArn).toBe(readRecord(scene.record)?.TaskARN);
        expect(await scene.run("echo ready")).toMatchObject({ code: 0, stdout: Buffer.from("ready\n") });
        return { stage: "the next prepare", finished };
      },
      step.options,
    );
    for (const signal of ["SIGTERM", "SIGINT"] as const)
      faultTest(
        `prepare gets ${signal} ${step.name}`,
        async (scene) => {
          const { prepare, release } = await step.hold(scene);
          prepare.process.kill(signal);
          if (step.name.startsWith("before its record")) await release?.(); // it waits for a file, and hears nothing
          const finished = await prepare.finished;
          await release?.();
          ended(finished, 2);
          // What it knows of, it has stopped itself.
          if (scene.world.aws.callsTo("RunTask").every(({ status }) => status === 200))
            expect(scene.world.aws.running()).toEqual([]);
          return { stage: "prepare", finished };
        },
        step.options,
      );
  }
});

describe.concurrent("RunTask's answer", () => {
  for (const [what, fault] of [
    ["is lost with the connection, after it took effect", "reset-after"],
    ["is a 500, after it took effect", "500-after"],
    ["is lost with the connection, before it took effect", "reset-before"],
  ] as const)
    faultTest(`RunTask's answer ${what}`, async (scene) => {
      const { aws } = scene.world;
      const lost = aws.inject({ operation: "RunTask", do: fault });
      const finished = await scene.stage("prepare");
      ended(finished, 0);
      expect(lost.used).toBe(1);
      expect(aws.tasks()).toHaveLength(1);
      const tokens = aws.callsTo("RunTask").map(({ input }) => input.clientToken);
      expect(tokens).toEqual([tokens[0], tokens[0]]);
      return { stage: "prepare", finished };
    });

  faultTest("RunTask's answer never comes, after it took effect (30 s)", async (scene) => {
    const { aws } = scene.world;
    aws.inject({ operation: "RunTask", do: "hang-after" });
    const finished = await scene.stage("prepare");
    ended(finished, 0);
    expect(aws.tasks()).toHaveLength(1);
    return { stage: "prepare", finished, says: /got no answer|still fails/ };
  });

  faultTest("RunTask is throttled ten times", async (scene) => {
    const { aws } = scene.world;
    aws.inject({ operation: "RunTask", times: 10, do: { error: "ThrottlingException", message: "Rate exceeded" } });
    const finished = await scene.stage("prepare");
    ended(finished, 0);
    expect(aws.tasks()).toHaveLength(1);
    expect(new Set(aws.callsTo("RunTask").map(({ input }) => input.clientToken)).size).toBe(1);
    return { stage: "prepare", finished };
  });

  faultTest(
    "RunTask's answer is lost, then its token is said to be in conflict",
    async (scene) => {
      const { aws } = scene.world;
      aws.inject({ operation: "RunTask", do: "500-after" });
      const message = "The provided clientToken is already in use with a different RunTask request.";
      aws.inject({ operation: "RunTask", do: { error: "ConflictException", message } });
      const finished = await scene.stage("prepare");
      ended(finished, 2);
      expect(aws.tasks()).toHaveLength(1);
      expect(aws.running()).toEqual([]); // found by its name, and stopped, before prepare ended
      // The runner's next try gets a task of its own.
      ended(await scene.stage("prepare"), 0);
      expect(aws.running()).toHaveLength(1);
      return { stage: "prepare", finished };
    },
    { timing: { hideList: 1_000 } },
  );

  faultTest(
    "DescribeTasks is throttled until StartTimeout",
    async (scene) => {
      const { aws } = scene.world;
      const throttled: FaultAction = { error: "ThrottlingException", message: "Rate exceeded" };
      aws.inject({ operation: "DescribeTasks", times: Number.POSITIVE_INFINITY, do: throttled });
      const finished = await scene.stage("prepare");
      ended(finished, 2);
      // Its text is one that may pass for a start; but here there is a task.
      expect(aws.tasks()).toHaveLength(1);
      expect(aws.running()).toEqual([]);
      return { stage: "prepare", finished };
    },
    { changes: { Fargate: { StartTimeout: 8 } } },
  );

  faultTest(
    "RunTask's answer is lost, then its token is refused for want of capacity",
    async (scene) => {
      const { aws } = scene.world;
      aws.inject({ operation: "RunTask", do: "500-after" });
      const message = "You've reached the limit on the number of vCPUs you can run concurrently";
      aws.inject({ operation: "RunTask", do: { error: "ClientException", message } });
      const finished = await scene.stage("prepare");
      ended(finished, 2);
      // No other token is tried while the first may have started a task; that is looked for, and stopped.
      expect(aws.callsTo("RunTask")).toHaveLength(2);
      expect(aws.tasks()).toHaveLength(1);
      expect(aws.running()).toEqual([]);
      return { stage: "prepare", finished };
    },
    { timing: { hideList: 1_000 } },
  );

  faultTest(
    "RunTask's answer is lost each time, until StartTimeout",
    async (scene) => {
      const { aws } = scene.world;
      aws.inject({ operation: "RunTask", times: Number.POSITIVE_INFINITY, do: "reset-after" });
      const finished = await scene.stage("prepare");
      ended(finished, 2);
      expect(aws.tasks()).toHaveLength(1);
      expect(aws.running()).toEqual([]);
      return { stage: "prepare", finished };
    },
    { changes: { Fargate: { StartTimeout: 2 } }, timing: { hideList: 1_000 } },
  );

  faultTest("the task stops at once, in each of the runner's three tries", async (scene) => {
    const { aws } = scene.world;
    const stoppedReason = "CannotPullContainerError: pull image manifest has been retried 1 time(s): not found";
    const ends = { stopCode: "TaskFailedToStart", stoppedReason };
    aws.inject({ operation: "RunTask", times: 3, do: { ends } });
    const seen: (string | undefined)[] = [];
    let finished: Finished | undefined;
    for (let tries = 0; tries < 3; tries++) {
      finished = await scene.stage("prepare");
      ended(finished, 2);
      seen.push(aws.tasks().at(-1)?.taskArn);
      await scene.stage("cleanup");
    }
    // No try gets the stopped task of the one before it back.
    expect(new Set(seen).size).toBe(3);
    expect(aws.tasks()).toHaveLength(3);
    return { stage: "prepare", finished: finished as Finished };
  });
});

describe.concurrent("cleanup", () => {
  /** A scene whose job has a task that is ready. */
  const prepared = async (scene: Scene) => {
    ended(await scene.stage("prepare"), 0);
    const [task] = scene.world.aws.running();
    return task?.taskArn as string;
  };
  const noRunTask = (scene: Scene, since: number) =>
    expect(scene.world.aws.callsTo("RunTask").length, "cleanup never calls RunTask").toBe(since);

  for (const [what, fault] of [
    ["is throttled ten times", { error: "ThrottlingException", message: "Rate exceeded" }],
    ["fails with 500 ten times", { error: "ServerException", message: "Service Unavailable", status: 500 }],
    ["gets no answer five times", "reset-before"],
  ] as const)
    faultTest(`StopTask ${what}`, async (scene) => {
      await prepared(scene);
      const times = fault === "reset-before" ? 5 : 10;
      scene.world.aws.inject({ operation: "StopTask", times, do: fault });
      const finished = await scene.stage("cleanup");
      ended(finished, 0);
      expect(scene.world.aws.running()).toEqual([]);
      expect(scene.world.aws.callsTo("StopTask").length).toBeGreaterThan(times);
      return { stage: "cleanup", finished };
    });

  faultTest("StopTask fails for more than a minute; a later cleanup succeeds", async (scene) => {
    const arn = await prepared(scene);
    const broken = scene.world.aws.inject({
      operation: "StopTask",
      times: Number.POSITIVE_INFINITY,
      do: { error: "ServerException", message: "Service Unavailable", status: 500 },
    });
    const finished = await scene.stage("cleanup");
    ended(finished, 2);
    expect(finished.stderr).toContain(`${arn} may still run, stop it by hand`);
    expect(readRecord(scene.record)).toMatchObject({ TaskARN: arn });
    broken.remove();
    return { stage: "cleanup", finished };
  });

  faultTest("StopTask is not permitted; a later cleanup may", async (scene) => {
    const arn = await prepared(scene);
    scene.world.aws.permissions = new Set(["ecs:RunTask", "ecs:DescribeTasks"]);
    const finished = await scene.stage("cleanup");
    ended(finished, 2);
    expect(finished.stderr).toContain(arn);
    expect(finished.stderr).toContain("what to do: allow ecs:StopTask in the IAM policy of the runner's host");
    expect(readRecord(scene.record)).toMatchObject({ TaskARN: arn });
    delete scene.world.aws.permissions;
    return { stage: "cleanup", finished };
  });

  faultTest("cleanup is called twice", async (scene) => {
    await prepared(scene);
    expect(await scene.stage("cleanup")).toMatchObject({ code: 0, stderr: "" });
    const finished = await scene.stage("cleanup");
    expect(finished).toMatchObject({ code: 0, stderr: "" });
    noRunTask(scene, 1);
    return { stage: "the second cleanup", finished };
  });

  faultTest("two cleanups at the same time", async (scene) => {
    await prepared(scene);
    const both = await Promise.all([scene.stage("cleanup"), scene.stage("cleanup")]);
    for (const one of both) expect(one).toMatchObject({ code: 0, stderr: "" });
    return { stage: "cleanup", finished: both[0] as Finished };
  });

  // The record says that RunTask may have been sent, and its task is hidden for a while.
  for (const hidden of [0, 3_000])
    faultTest(`the task of an unanswered RunTask is not listed for ${hidden / 1000} s`, async (scene) => {
      const { aws } = scene.world;
      aws.timing.hideList = hidden;
      aws.inject({ operation: "RunTask", do: { holdUntil: forever, after: true } });
      const prepare = scene.begin("prepare");
      await aws.waitFor(() => aws.tasks().length === 1, 30_000);
      prepare.process.kill("SIGKILL");
      await prepare.finished;
      const finished = await scene.stage("cleanup");
      expect(finished).toMatchObject({ code: 0, stderr: "" });
      expect(aws.running()).toEqual([]);
      noRunTask(scene, 1);
      return { stage: "cleanup", finished };
    });

  faultTest("StopTask does not know the task yet, for 2 s after RunTask", async (scene) => {
    const { aws } = scene.world;
    const arn = await prepared(scene);
    const unknown = aws.inject({
      operation: "StopTask",
      times: Number.POSITIVE_INFINITY,
      do: { error: "InvalidParameterException", message: "The referenced task was not found." },
    });
    const cleaning = scene.begin("cleanup");
    await aws.waitFor(() => unknown.used > 3, 30_000);
    unknown.remove();
    const finished = await cleaning.finished;
    ended(finished, 0);
    expect(aws.running()).toEqual([]);
    expect(aws.callsTo("StopTask").at(-1)).toMatchObject({ status: 200, input: { task: arn } });
    return { stage: "cleanup", finished };
  });

  faultTest("cleanup gets SIGQUIT, which asks the runner to end when its jobs have", async (scene) => {
    const { aws } = scene.world;
    await prepared(scene);
    aws.inject({ operation: "StopTask", times: 3, do: { error: "ThrottlingException", message: "Rate exceeded" } });
    const cleaning = scene.begin("cleanup");
    await aws.waitFor(() => aws.callsTo("StopTask").length > 0);
    cleaning.process.kill("SIGQUIT");
    const finished = await cleaning.finished;
    ended(finished, 0);
    expect(aws.running()).toEqual([]);
    return { stage: "cleanup", finished };
  });

  faultTest("cleanup is killed before StopTask works; sweep follows at once", async (scene) => {
    const { aws } = scene.world;
    await prepared(scene);
    const held = aws.inject({ operation: "StopTask", times: Number.POSITIVE_INFINITY, do: { holdUntil: forever } });
    const cleaning = scene.begin("cleanup");
    await aws.waitFor(() => aws.callsTo("StopTask").length > 0);
    cleaning.process.kill("SIGKILL");
    const finished = await cleaning.finished;
    held.remove();
    // The deadline of the task itself is hours away, but its job is over.
    const swept = await scene.begin("sweep").finished;
    ended(swept, 0);
    expect(aws.running()).toEqual([]);
    return { stage: "cleanup", finished };
  });

  faultTest("the disk of the records becomes read-only while a job runs", async (scene) => {
    const path = directory();
    const mount = (...args: string[]) => spawnSync("mount", [...args, path], { stdio: "ignore" }).status === 0;
    if (!mount("-t", "tmpfs", "-o", "size=1m", "tmpfs")) throw new SkipFault("mount(8) is not permitted");
    try {
      scene.configure({ TaskMetadata: { Directory: path } });
      await prepared(scene);
      const run = scene.begin("run", { script: "echo running; read -r _ < /dev/zero; sleep 1" });
      await run.shows("running");
      if (!mount("-o", "remount,ro")) throw new SkipFault("mount(8) cannot remount");
      run.process.kill("SIGKILL");
      await run.finished;
      const finished = await scene.stage("cleanup");
      ended(finished, 2);
      expect(scene.world.aws.running()).toEqual([]);
      scene.configure();
      return { stage: "cleanup", finished };
    } finally {
      spawnSync("umount", [path]);
    }
  });

  const damages: [what: string, damage: (path: string) => void, right?: { code: number; keepsRecord: boolean }][] = [
    ["is missing", (path) => fs.rmSync(path)],
    ["is empty", (path) => fs.truncateSync(path, 0)],
    ["is cut off after its task's name", (path) => fs.truncateSync(path, 160)],
    ["is cut off before its task's name", (path) => fs.truncateSync(path, 20)],
    [
      "is of a newer version",
      (path) => {
        const record = JSON.parse(fs.readFileSync(path, "utf8"));
        fs.writeFileSync(path, JSON.stringify({ ...record, Version: 2, ContainerIP: { v4: record.ContainerIP } }));
      },
    ],
    [
      "cannot be read: a directory stands in its place",
      (path) => {
        fs.rmSync(path);
        fs.mkdirSync(path);
      },
      { code: 2, keepsRecord: true },
    ],
    ["may be read by others", (path) => fs.chmodSync(path, 0o644)],
    ["may be written by others", (path) => fs.chmodSync(path, 0o666)],
    [
      "belongs to another user",
      (path) => {
        if (process.geteuid?.() !== 0) throw new SkipFault("only root can give files away");
        fs.chownSync(path, 12_345, 12_345);
      },
    ],
  ];
  for (const [what, damage, right = { code: 0, keepsRecord: false }] of damages)
    faultTest(`the record ${what}`, async (scene) => {
      await prepared(scene);
      wholeRun.ownFile(scene.record); // what the test makes of it is no fault of the driver's
      damage(scene.record);
      const finished = await scene.stage("cleanup");
      expect(finished).toMatchObject({ code: right.code });
      expect(scene.world.aws.running()).toEqual([]);
      noRunTask(scene, 1);
      return { stage: "cleanup", finished, keepsRecord: right.keepsRecord };
    });

  for (const [what, replace] of [
    ["a link to", (path: string, other: string) => fs.symlinkSync(other, path)],
    ["a copy of", (path: string, other: string) => fs.copyFileSync(other, path)],
    ["the same file as", (path: string, other: string) => fs.linkSync(other, path)],
  ] as const)
    faultTest(`the record has become ${what} another job's, which runs`, async (scene) => {
      const arn = await prepared(scene);
      const response = join(directory(), "response.json");
      const { id, ...rest } = JSON.parse(fs.readFileSync(scene.env.JOB_RESPONSE_FILE as string, "utf8"));
      fs.writeFileSync(response, JSON.stringify({ ...rest, id: id + 1_000_000 }));
      const env = { JOB_RESPONSE_FILE: response };
      ended(await scene.stage("prepare", { env }), 0);
      const other = readJob({ ...scene.env, ...env })?.stem;
      fs.rmSync(scene.record);
      replace(scene.record, join(scene.world.records, `${other}.json`));
      const run = await scene.run("echo never");
      ended(run, 2);
      expect(run.stdout.toString()).toBe("");
      ended(await scene.stage("cleanup"), 0);
      // Its own task is found by its name and stopped; the other's runs on, and its record is whole.
      expect(scene.world.aws.running().map(({ taskArn }) => taskArn)).not.toContain(arn);
      expect(scene.world.aws.running()).toHaveLength(1);
      ended(await scene.begin("run", { script: "true", env }).finished, 0);
      ended(await scene.stage("cleanup", { env }), 0);
      return { stage: "run", finished: run };
    });

  faultTest(
    "the record may be written by others, and the configuration names another cluster by now",
    async (scene) => {
      await prepared(scene);
      wholeRun.ownFile(scene.record);
      fs.chmodSync(scene.record, 0o660);
      scene.configure({ Fargate: { Cluster: "bare-cluster" } });
      const finished = await scene.stage("cleanup");
      ended(finished, 0);
      // What it says counts once ECS has said the same.
      expect(scene.world.aws.running()).toEqual([]);
      scene.configure();
      return { stage: "cleanup", finished };
    },
  );
  faultTest("anybody may write to the directory for records", async (scene) => {
    fs.mkdirSync(scene.world.records);
    fs.chmodSync(scene.world.records, 0o777);
    const refused = await scene.stage("prepare");
    ended(refused, 2);
    expect(scene.world.aws.calls).toEqual([]);
    ended(await scene.stage("sweep"), 2);
    fs.chmodSync(scene.world.records, 0o700);
    await prepared(scene);
    // What is there by then is not run in, but it is stopped.
    fs.chmodSync(scene.world.records, 0o777);
    ended(await scene.run("echo never"), 2);
    return { stage: "prepare", finished: refused };
  });
  faultTest("the group may write to the directory for records", async (scene) => {
    fs.mkdirSync(scene.world.records);
    fs.chmodSync(scene.world.records, 0o770);
    const finished = await scene.stage("prepare");
    ended(finished, 0);
    ended(await scene.run("true"), 0);
    return { stage: "prepare", finished, says: /warning: TaskMetadata/ };
  });
  faultTest("the directory for records is shared by all users, as /tmp is", async (scene) => {
    fs.mkdirSync(scene.world.records);
    fs.chmodSync(scene.world.records, 0o1777);
    scene.configure({ TaskMetadata: { Directory: `${scene.world.records}/` } });
    const finished = await scene.stage("prepare");
    ended(finished, 0);
    expect(finished.stderr).not.toContain("chmod");
    ended(await scene.run("true"), 0);
    return { stage: "prepare", finished, says: /warning: / };
  });

  faultTest("the task has stopped before cleanup", async (scene) => {
    const arn = await prepared(scene);
    await scene.world.aws.stopTask(arn, { stopCode: "UserInitiated", stoppedReason: "Task stopped by user" });
    const finished = await scene.stage("cleanup");
    expect(finished).toMatchObject({ code: 0, stderr: "" });
    return { stage: "cleanup", finished };
  });

  faultTest("the task is not known any more", async (scene) => {
    await prepared(scene);
    const unknown = "arn:aws:ecs:us-east-2:123456789012:task/test-cluster/00000000000000000000000000000000";
    const record = readRecord(scene.record) as TaskRecord;
    writeRecord(scene.record, { ...record, TaskARN: unknown });
    const finished = await scene.stage("cleanup");
    ended(finished, 0);
    expect(filesLeft(scene.world)).toEqual([]);
    // The real one, which the record does not name, is none of this test.
    await scene.world.aws.stopTask(record.TaskARN, { stopCode: "UserInitiated", stoppedReason: "test over" });
    return { stage: "cleanup", finished };
  });

  for (const step of steps)
    faultTest(
      `cleanup comes at the same time as prepare, which is ${step.name}`,
      async (scene) => {
        const { aws } = scene.world;
        aws.timing.sshDelay = 600_000; // no login works before cleanup has done its work
        if (step.options?.holdFirstCommand) aws.timing.sshDelay = 100;
        const { prepare, release } = await step.hold(scene);
        scene.configure({ top: { LogLevel: "debug" } });
        const begun = scene.begin("cleanup");
        const cleaning = begun.finished;
        await begun.shows("prepare still runs"); // then prepare goes on
        await release?.();
        const finished = await prepare.finished;
        const cleaned = await cleaning;
        ended(cleaned, 0);
        ended(finished, 2);
        expect(aws.running()).toEqual([]);
        return { stage: "cleanup", finished: { ...cleaned, stderr: "" } };
      },
      step.options,
    );

  faultTest("cleanup comes at the same time as prepare, and ListTasks is not permitted", async (scene) => {
    const { aws } = scene.world;
    aws.permissions = new Set(["ecs:RunTask", "ecs:StopTask", "ecs:DescribeTasks", "iam:PassRole"]);
    aws.timing.sshDelay = 600_000;
    const prepare = scene.begin("prepare");
    await aws.waitFor(() => aws.running().length === 1);
    scene.configure({ top: { LogLevel: "debug" } });
    const cleaning = scene.begin("cleanup");
    await cleaning.shows("prepare still runs");
    ended(await prepare.finished, 2);
    const finished = await cleaning.finished;
    ended(finished, 0);
    expect(finished.stderr.match(/could not be looked up/g)).toHaveLength(1);
    expect(aws.running()).toEqual([]);
    return { stage: "cleanup", finished, says: /could not be looked up/ };
  });

  for (const signal of ["SIGTERM", "SIGINT"] as const) {
    faultTest(`cleanup gets ${signal} while StopTask is under way`, async (scene) => {
      await prepared(scene);
      const held = Promise.withResolvers<void>();
      scene.world.aws.inject({ operation: "StopTask", do: { holdUntil: held.promise } });
      const cleaning = scene.begin("cleanup");
      await scene.world.aws.waitFor(() => scene.world.aws.callsTo("StopTask").length === 1);
      cleaning.process.kill(signal);
      held.resolve();
      const finished = await cleaning.finished;
      ended(finished, 0);
      expect(scene.world.aws.running()).toEqual([]);
      return { stage: "cleanup", finished };
    });
    faultTest(`cleanup gets ${signal} while it looks for a task`, async (scene) => {
      const { aws } = scene.world;
      await prepared(scene);
      fs.rmSync(scene.record);
      const held = Promise.withResolvers<void>();
      aws.inject({ operation: "ListTasks", do: { holdUntil: held.promise } });
      const cleaning = scene.begin("cleanup");
      await aws.waitFor(() => aws.callsTo("ListTasks").length === 1);
      cleaning.process.kill(signal);
      held.resolve();
      const finished = await cleaning.finished;
      ended(finished, 0);
      expect(aws.running()).toEqual([]);
      return { stage: "cleanup", finished };
    });
  }
});

describe.concurrent("a script's output outlives its shell", () => {
  faultTest(
    "a filter of a script's output writes 3 s after the script has failed",
    async (scene) => {
      ended(await scene.stage("prepare"), 0);
      const finished = await scene.run("exec > >(sleep 3; sort) 2>&1; echo b; echo a >&2; exit 3");
      ended(finished, 1);
      expect(finished.stdout.toString()).toBe("a\nb\n");
      expect(fs.readFileSync(`${scene.env.BUILD_EXIT_CODE_FILE}`, "utf8")).toBe("3");
      return { stage: "run", finished };
    },
    { container: true },
  );
  faultTest(
    "a filter of a script's output writes 3 s after the script has failed, and no further command begins meanwhile",
    async (scene) => {
      ended(await scene.stage("prepare"), 0);
      const finished = await scene.run("exec > >(sleep 3; sort) 2>&1; echo b; echo a >&2; exit 3");
      ended(finished, 1);
      expect(finished.stdout.toString()).toBe("a\nb\n");
      return { stage: "run", finished };
    },
    // The question what holds the channel open.
    { misbehaviour: { holdExec: (command) => (command.includes("/fd/[0-2]") ? forever : undefined) } },
  );
  faultTest(
    "a process in the background goes on writing to the job's output after its stage",
    async (scene) => {
      ended(await scene.stage("prepare"), 0);
      const writer = "while echo line; do date +%N >/root/wrote; sleep 0.1; done & echo $! >/root/pid";
      const finished = await scene.run(`${writer}; echo done; exit 4`);
      ended(finished, 1);
      expect(finished.stdout.toString()).toMatch(/^done$/m);
      const wait = 'before=$(cat /root/wrote); until [ "$(cat /root/wrote)" != "$before" ]; do sleep 0.1; done';
      ended(await scene.run(`${wait}; kill -0 $(cat /root/pid)`), 0);
      return { stage: "run", finished };
    },
    { container: true },
  );
});

/** A line of .bashrc. */
const BREAKS_PATH_AND_EXEC =
  "PATH=/nowhere; exec() { echo meddled; }; shopt -s expand_aliases; alias exec=:; kill() { :; }; export -f kill";

describe.concurrent("run gets a signal", () => {
  faultTest("the runner writes scripts for PowerShell", async (scene) => {
    ended(await scene.stage("prepare"), 0);
    const finished = await scene.run("& {\r\n\r\n$ErrorActionPreference = 'Stop'\r\n");
    ended(finished, 2);
    return { stage: "run", finished };
  });

  faultTest("the runner has died, its run goes on, and the job's deadline comes", async (scene) => {
    ended(await scene.stage("prepare"), 0);
    const record = readRecord(scene.record) as TaskRecord;
    writeRecord(scene.record, { ...record, Deadline: Math.floor(Date.now() / 1000) });
    const finished = await scene.run("echo running; sleep 600");
    ended(finished, 2);
    return { stage: "run", finished };
  });

  for (const signal of ["SIGTERM", "SIGINT"] as const) {
    faultTest(`run gets ${signal} while it connects`, async (scene) => {
      ended(await scene.stage("prepare"), 0);
      const { ContainerIP: host } = readRecord(scene.record) as TaskRecord;
      const proxy = await startProxy({ host, port: scene.world.sshPort }, { host });
      proxy.stall();
      scene.configure({ SSH: { Port: proxy.port } });
      const run = scene.begin("run", { script: "echo never" });
      await expect.poll(() => proxy.connections, { timeout: 30_000 }).toBe(1);
      run.process.kill(signal);
      const finished = await run.finished;
      expect(finished).toMatchObject({ code: 2, stdout: Buffer.from("") });
      await proxy.close();
      scene.configure();
      return { stage: "run", finished };
    });
    faultTest(`run gets ${signal} while its script runs`, async (scene) => {
      ended(await scene.stage("prepare"), 0);
      const mark = `600.${process.pid}${signal.length}`; // a duration that nobody else sleeps
      const run = scene.begin("run", { script: `echo running; sleep ${mark}; echo never` });
      await run.shows("running");
      run.process.kill(signal);
      const finished = await run.finished;
      expect(finished).toMatchObject({ code: 2, stdout: Buffer.from("running\n") });
      const [task] = scene.world.aws.running();
      const still = await task?.host?.exec(`grep -lz '^${mark}$' /proc/[0-9]*/cmdline | wc -l`);
      expect(still?.output.trim()).toBe("0");
      return { stage: "run", finished };
    });
  }

  /** The output of a script's trap must arrive, none of its processes may be left, and after_script must work. */
  const releasesLock = async (scene: Scene, trap: string) => {
    const mark = `600.${process.pid}${faultJobs}`;
    const script = `PATH=/usr/bin:/bin; trap '${trap}' TERM; echo running; sleep ${mark} & wait; echo never`;
    const run = scene.begin("run", { script });
    await run.shows("running");
    run.process.kill("SIGTERM");
    const finished = await run.finished;
    expect(finished).toMatchObject({ code: 2, stdout: Buffer.from("running\nreleased\n") });
    expect(finished.stderr).not.toContain("may still run");
    const [task] = scene.world.aws.running();
    const still = await task?.host?.exec(`cat /proc/[0-9]*/cmdline 2>/dev/null | tr '\\0' '\\n' | grep -c '^${mark}$'`);
    expect(still?.output.trim()).toBe("0");
    const after = await scene.run("echo after");
    expect(after).toMatchObject({ code: 0, stdout: Buffer.from("after\n") });
    return { stage: "run", finished };
  };
  for (const [what, container] of [
    ["the task's SSH server is dropbear, under which a script's shell does not lead its session", DROPBEAR],
    ["the task's SSH server opens one channel a connection (MaxSessions 1)", ONE_SESSION],
  ] as const)
    faultTest(
      `run gets SIGTERM; ${what}`,
      async (scene) => {
        ended(await scene.stage("prepare"), 0);
        return releasesLock(scene, "echo released; exit 1");
      },
      { container },
    );
  faultTest(
    "run gets SIGTERM; a .bashrc takes 4 s, and the script's trap 8 s",
    async (scene) => {
      ended(await scene.stage("prepare"), 0);
      const [task] = scene.world.aws.running();
      await task?.host?.exec("echo 'sleep 4' >/root/.bashrc");
      return releasesLock(scene, "sleep 8; echo released; exit 1");
    },
    { container: true },
  );
  faultTest(
    "run gets SIGTERM; CancelGracePeriod is 0 and the script ignores SIGTERM",
    async (scene) => {
      ended(await scene.stage("prepare"), 0);
      const mark = `600.${process.pid}0${faultJobs}`;
      const run = scene.begin("run", { script: `trap '' TERM; echo running; while :; do sleep ${mark}; done` });
      await run.shows("running");
      run.process.kill("SIGTERM");
      const finished = await run.finished;
      expect(finished).toMatchObject({ code: 2, stdout: Buffer.from("running\n") });
      const [task] = scene.world.aws.running();
      const left = await task?.host?.exec(`grep -lz '^${mark}$' /proc/[0-9]*/cmdline | wc -l`);
      expect(left?.output.trim()).toBe("0");
      return { stage: "run", finished };
    },
    { changes: { SSH: { CancelGracePeriod: 0 } } },
  );
  faultTest(
    "run gets SIGTERM; a .bashrc breaks PATH and replaces exec",
    async (scene) => {
      ended(await scene.stage("prepare"), 0);
      const [task] = scene.world.aws.running();
      await task?.host?.exec(`echo '${BREAKS_PATH_AND_EXEC}' >/root/.bashrc`);
      return releasesLock(scene, "sleep 3; echo released; exit 1");
    },
    { container: true },
  );
});

describe.concurrent("sweep", () => {
  const sweeping = async (scene: Scene, ...args: string[]) => {
    const finished = await scene.begin("sweep", { operands: args }).finished;
    return { ...finished, report: args.includes("--json") ? (JSON.parse(`${finished.stdout}`) as SweepReport) : null };
  };
  const managerOf = (scene: Scene) => scene.world.aws.callsTo("RunTask")[0]?.input.startedBy?.split("-")[1] as string;
  /** Makes a task look older than it is, to the driver: AWS's times are its only clock. */
  const age = (scene: Scene, seconds: number) => {
    for (const task of scene.world.aws.tasks()) (task as { createdAt: number }).createdAt -= seconds * 1000;
  };
  const deadlineIn = (scene: Scene, seconds: number) => {
    for (const { request } of scene.world.aws.tasks())
      for (const variable of request.overrides?.containerOverrides?.[0]?.environment ?? [])
        if (variable.name === "FARGATE_DEADLINE") variable.value = String(Math.floor(Date.now() / 1000 + seconds));
  };
  const prepared = async (scene: Scene) => {
    ended(await scene.stage("prepare"), 0);
    return scene.world.aws.running()[0]?.taskArn as string;
  };
  /** A record becomes as old as it would be after so many seconds. */
  const ageRecord = (path: string, seconds: number, changes: Partial<TaskRecord> = {}) => {
    const record = readRecord(path) as TaskRecord;
    writeRecord(path, { ...record, UpdatedAt: Math.floor(Date.now() / 1000 - seconds), ...changes });
  };

  faultTest("the records are lost while a task runs; sweep, 10 minutes later", async (scene) => {
    const arn = await prepared(scene);
    fs.rmSync(scene.record);
    const early = await sweeping(scene, "--json");
    expect(early).toMatchObject({ code: 0, report: { stopped: [], left: [{ taskArn: arn }] } });
    age(scene, 601);
    const dry = await sweeping(scene, "--dry-run", "--json");
    expect(dry).toMatchObject({
      code: 0,
      report: { dryRun: true, stopped: [{ taskArn: arn, why: "its record is gone" }] },
    });
    expect(scene.world.aws.running()).toHaveLength(1);
    const finished = await sweeping(scene);
    expect(finished).toMatchObject({ code: 0, stderr: "" });
    expect(scene.world.aws.running()).toEqual([]);
    const lines = finished.stdout.toString().trimEnd().split("\n");
    expect(lines[0]).toMatch(`${arn} stopped: its record is gone; created 20`);
    expect(lines[1]).toBe("tasks: 1 stopped, 0 left alone; records: 0 removed; problems: 0");
    const stop = scene.world.aws.callsTo("StopTask").at(-1);
    expect(stop?.input.reason).toBe("fargate sweep: its record is gone");
    return {
      stage: "sweep",
      finished: { ...finished, stderr: finished.stdout.toString() },
      says: /its record is gone/,
    };
  });

  faultTest("the runner's host dies with its directory; sweep on another host, past the deadline", async (scene) => {
    const arn = await prepared(scene);
    const manager = managerOf(scene);
    fs.rmSync(scene.world.records, { recursive: true });
    age(scene, 100_000);
    const early = await sweeping(scene, "--json");
    expect(early).toMatchObject({ code: 0, report: { stopped: [], left: [{ taskArn: arn }] } });
    // An operator who knows that the host is gone need not wait for the deadline.
    const known = await sweeping(scene, "--manager", manager, "--dry-run", "--json");
    expect(known).toMatchObject({ code: 0, report: { stopped: [{ taskArn: arn, why: "its record is gone" }] } });
    deadlineIn(scene, -1);
    const finished = await sweeping(scene);
    expect(scene.world.aws.running()).toEqual([]);
    return { stage: "sweep", finished: { ...finished, stderr: finished.stdout.toString() }, says: /past its deadline/ };
  });

  faultTest("a task without a readable deadline is older than MaxTaskAge; sweep", async (scene) => {
    await prepared(scene);
    const record = fs.readFileSync(scene.record);
    fs.rmSync(scene.world.records, { recursive: true });
    for (const { request } of scene.world.aws.tasks()) request.overrides = {};
    age(scene, 86_300);
    expect(await sweeping(scene, "--json")).toMatchObject({ code: 0, report: { stopped: [] } });
    age(scene, 200);
    const finished = await sweeping(scene);
    expect(scene.world.aws.running()).toEqual([]);
    expect(record.length).toBeGreaterThan(0);
    return { stage: "sweep", finished: { ...finished, stderr: finished.stdout.toString() }, says: /past its deadline/ };
  });

  faultTest("sweep while jobs run, and beside tasks that are none of its business", async (scene) => {
    const { aws } = scene.world;
    const arn = await prepared(scene);
    // Somebody else's tasks: of no driver, and of another manager whose deadline has not come.
    const client = new ECSClient({
      region: "us-east-2",
      endpoint: aws.url,
      credentials: { accessKeyId: "test", secretAccessKey: "test" },
    });
    const strangers: string[] = [];
    const input = aws.callsTo("RunTask")[0]?.input as RunTaskCommandInput;
    for (const startedBy of ["ecs-svc/1234", "fargate-ffffffffffff-0123456789abcdef0123456789abcdef", "fargate-x"]) {
      const { tasks } = await client.send(new RunTaskCommand({ ...input, startedBy, clientToken: startedBy }));
      strangers.push(tasks?.[0]?.taskArn as string);
    }
    age(scene, 80_000);
    const run = scene.begin("run", { script: "echo running; read -r _ </dev/zero; sleep 1" });
    const swept = await sweeping(scene, "--json");
    expect(swept).toMatchObject({ code: 0, report: { stopped: [], removedRecords: [], problems: [] } });
    expect(
      aws
        .running()
        .map(({ taskArn }) => taskArn)
        .sort(),
    ).toEqual([arn, ...strangers].sort());
    run.process.kill("SIGTERM");
    await run.finished;
    expect(fs.existsSync(scene.record)).toBe(true);
    const finished = await sweeping(scene);
    for (const stranger of strangers)
      await aws.stopTask(stranger, { stopCode: "UserInitiated", stoppedReason: "over" });
    return { stage: "sweep", finished: { ...finished, stderr: finished.stdout.toString() } };
  });

  faultTest(
    "a job past its deadline that a run still works on; sweep leaves it, and takes it when the run is gone",
    async (scene) => {
      const { aws } = scene.world;
      await prepared(scene);
      const run = scene.begin("run", { script: "echo running; sleep 600" });
      await run.shows("running");
      deadlineIn(scene, -1);
      ageRecord(scene.record, 7_200, { Deadline: 1 });
      expect(await sweeping(scene, "--json")).toMatchObject({ code: 0, report: { stopped: [], removedRecords: [] } });
      expect(aws.running()).toHaveLength(1);
      run.process.kill("SIGKILL");
      await run.finished;
      const finished = await sweeping(scene, "--json");
      expect(finished.report).toMatchObject({ stopped: [{ why: "it is past its deadline" }] });
      expect(aws.running()).toEqual([]);
      // In the same sweep, or as soon as the task is on its way down, the record goes as well.
      expect(filesLeft(scene.world)).toEqual([]);
      return { stage: "sweep", finished: { ...finished, stderr: finished.stdout.toString() }, says: /./ };
    },
  );

  /** Makes every lock and record that many seconds old, as a clock that is set forward does. */
  const idle = (scene: Scene, seconds: number) => {
    const then = Date.now() / 1000 - seconds;
    for (const name of filesLeft(scene.world)) fs.utimesSync(join(scene.world.records, name), then, then);
  };
  const report = (finished: Finished) => ({ ...finished, stderr: finished.stdout.toString() });
  const untouched = { code: 0, report: { stopped: [], removedRecords: [], problems: [] } };
  /** Runs a script in a PID namespace of its own, as in another container that has the same directory of records. */
  const runElsewhere = (scene: Scene, script: string) => {
    const file = join(directory(), "script");
    fs.writeFileSync(file, script);
    const elsewhere = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child"];
    if (spawnSync(elsewhere[0] as string, [...elsewhere.slice(1), "true"]).status !== 0)
      throw new SkipFault("unshare(1) is not permitted");
    const run = [driver, "--config", scene.config, "custom", "run", file, "build_script"];
    return start([...elsewhere, ...run], { env: scene.env });
  };

  faultTest(
    "the process that plays the runner is killed (SIGKILL) during a script; sweep stops its task, and no other's",
    async (scene) => {
      const { aws } = scene.world;
      const other = await prepared(scene);
      const lasting = scene.begin("run", { script: "echo running; sleep 600" });
      await lasting.shows("running");
      const second = makeScene(scene.world, {}, forever);
      ended(await second.stage("prepare"), 0);
      const killed = aws.running().find(({ taskArn }) => taskArn !== other)?.taskArn;
      const script = join(directory(), "script");
      fs.writeFileSync(script, "echo begun; sleep 600");
      const run = [driver, "--config", second.config, "custom", "run", script, "build_script"];
      const runner = start(["sh", "-c", '"$@"; exit', "sh", ...run], { env: second.env });
      await runner.shows("begun");
      runner.process.kill("SIGKILL");
      // Its output ends when the driver's process has ended, too.
      expect((await runner.finished).stderr).toContain("the process that started this stage has ended");
      expect(await sweeping(scene, "--json")).toMatchObject(untouched);
      idle(scene, 901);
      const finished = await sweeping(scene, "--json");
      expect(finished).toMatchObject({
        code: 0,
        report: { stopped: [{ taskArn: killed, why: "its job is abandoned" }] },
      });
      expect(aws.running().map(({ taskArn }) => taskArn)).toEqual([other]);
      lasting.process.kill("SIGTERM");
      await lasting.finished;
      ended(await second.stage("cleanup"), 0);
      return { stage: "sweep", finished: { ...finished, stderr: `${finished.report?.stopped[0]?.why}` } };
    },
  );

  faultTest("a runner dies between two stages; sweep, AbandonedAfter later", async (scene) => {
    const arn = await prepared(scene);
    ended(await scene.run("true"), 0);
    idle(scene, 890);
    expect(await sweeping(scene, "--json")).toMatchObject(untouched);
    idle(scene, 901);
    scene.configure({ Fargate: { AbandonedAfter: 0 } });
    expect(await sweeping(scene, "--json")).toMatchObject(untouched);
    scene.configure();
    const finished = await sweeping(scene);
    expect(finished).toMatchObject({ code: 0, stderr: "" });
    expect(scene.world.aws.running()).toEqual([]);
    expect(scene.world.aws.callsTo("StopTask").at(-1)?.input).toMatchObject({
      task: arn,
      reason: "fargate sweep: its job is abandoned",
    });
    return { stage: "sweep", finished: report(finished), says: /its job is abandoned/ };
  });

  faultTest(
    "a run is killed long after the stage before it; sweep waits for AbandonedAfter from its end",
    async (scene) => {
      await prepared(scene);
      const run = scene.begin("run", { script: "echo running; sleep 600" });
      await run.shows("running");
      idle(scene, 1_800);
      const [lock = ""] = filesLeft(scene.world).filter((name) => name.endsWith(".lock"));
      run.process.kill("SIGKILL");
      await run.finished;
      const touched = (ago: number) => {
        const then = Date.now() / 1000 - ago;
        fs.utimesSync(join(scene.world.records, lock), then, then);
      };
      touched(890);
      expect(await sweeping(scene, "--json")).toMatchObject(untouched);
      touched(901);
      const finished = await sweeping(scene);
      expect(scene.world.aws.running()).toEqual([]);
      return { stage: "sweep", finished: report(finished), says: /its job is abandoned/ };
    },
  );

  faultTest(
    "a stage fails long after the one before it; sweep waits for AbandonedAfter from its end",
    async (scene) => {
      await prepared(scene);
      const run = scene.begin("run", { script: "echo running; sleep 600" });
      await run.shows("running");
      const then = Date.now() / 1000 - 1_800;
      fs.utimesSync(scene.record, then, then); // as old as the end of the stage before
      run.process.kill("SIGTERM");
      ended(await run.finished, 2);
      expect(await sweeping(scene, "--json")).toMatchObject(untouched);
      idle(scene, 901);
      const finished = await sweeping(scene);
      expect(scene.world.aws.running()).toEqual([]);
      return { stage: "sweep", finished: report(finished), says: /its job is abandoned/ };
    },
  );

  faultTest(
    "no lock can be made, because the disk of the records is full; sweep leaves the running job",
    async (scene) => {
      const path = directory();
      const mount = ["-t", "tmpfs", "-o", "size=1m,nr_inodes=20,mode=0700", "tmpfs", path];
      if (spawnSync("mount", mount, { stdio: "ignore" }).status !== 0) throw new SkipFault("mount(8) is not permitted");
      try {
        scene.configure({ TaskMetadata: { Directory: path } });
        await prepared(scene);
        expect(() => {
          for (let count = 0; count < 100; count++) fs.writeFileSync(join(path, `full-${count}`), "");
        }).toThrow("ENOSPC");
        const run = scene.begin("run", { script: "echo running; sleep 600" });
        await run.shows("running");
        expect(fs.readdirSync(path).filter((name) => name.endsWith(".lock"))).toEqual([]);
        const then = Date.now() / 1000 - 1_800;
        fs.utimesSync(join(path, basename(scene.record)), then, then);
        const finished = await sweeping(scene);
        ended(finished, 2);
        expect(scene.world.aws.running()).toHaveLength(1);
        run.process.kill("SIGTERM");
        await run.finished;
        ended(await scene.stage("cleanup"), 0);
        scene.configure();
        const stderr = finished.stderr.replaceAll(path, "...").replace(/, open '[^']*'/, "");
        return { stage: "sweep", finished: { ...finished, stderr } };
      } finally {
        spawnSync("umount", [path]);
      }
    },
  );

  faultTest("a lock is touched by a clock that is an hour behind sweep's; sweep leaves its job", async (scene) => {
    await prepared(scene);
    const lock = join(scene.world.records, `${basename(scene.record, ".json")}.run.17.123.0123456789.lock`);
    fs.writeFileSync(lock, "", { mode: 0o600 });
    const touch = () => fs.utimesSync(lock, Date.now() / 1000 - 3_600, Date.now() / 1000 - 3_600);
    idle(scene, 3_600);
    touch();
    const timer = setInterval(touch, 1_000);
    try {
      const finished = await sweeping(scene);
      expect(scene.world.aws.running()).toHaveLength(1);
      return { stage: "sweep", finished: report(finished) };
    } finally {
      clearInterval(timer);
    }
  });

  faultTest("the host is booted anew in the middle of a job; sweep need not wait", async (scene) => {
    scene.configure({ Fargate: { AbandonedAfter: 604_800 } });
    await prepared(scene);
    const lock = `${basename(scene.record, ".json")}.run.4711.123.0123456789.lock`;
    fs.writeFileSync(join(scene.world.records, lock), "", { mode: 0o600 });
    idle(scene, uptime() - 5);
    expect(await sweeping(scene, "--json")).toMatchObject(untouched);
    idle(scene, uptime() + 5);
    const finished = await sweeping(scene);
    expect(scene.world.aws.running()).toEqual([]);
    return { stage: "sweep", finished: report(finished), says: /its job is abandoned/ };
  });

  faultTest(
    "the manager's container is replaced in the middle of a script; its lock does not count for ever",
    async (scene) => {
      await prepared(scene);
      const run = runElsewhere(scene, "echo running; sleep 600");
      await run.shows("running");
      // From here its process cannot be looked at, but it touches its lock.
      idle(scene, 1_800);
      expect(await sweeping(scene, "--json")).toMatchObject(untouched);
      run.process.kill("SIGKILL");
      await run.finished;
      idle(scene, 901);
      const finished = await sweeping(scene);
      expect(scene.world.aws.running()).toEqual([]);
      return { stage: "sweep", finished: report(finished), says: /its job is abandoned/ };
    },
  );

  faultTest("a script prints nothing for half an hour; sweep leaves its job", async (scene) => {
    await prepared(scene);
    const gate = join(directory(), "gate");
    execFileSync("mkfifo", [gate]);
    const run = scene.begin("run", { script: `echo running; read -r _ < ${gate}; echo done` });
    await run.shows("running");
    age(scene, 1_800);
    ageRecord(scene.record, 1_800);
    idle(scene, 1_800);
    const finished = await sweeping(scene);
    expect(scene.world.aws.running()).toHaveLength(1);
    fs.writeFileSync(gate, "go on\n");
    expect(await run.finished).toMatchObject({ code: 0, stdout: Buffer.from("running\ndone\n") });
    return { stage: "sweep", finished: report(finished) };
  });

  faultTest(
    "a driver process is stopped (SIGSTOP) for longer than AbandonedAfter; sweep leaves its job",
    async (scene) => {
      await prepared(scene);
      const gate = join(directory(), "gate");
      execFileSync("mkfifo", [gate]);
      const run = scene.begin("run", { script: `echo running; read -r _ < ${gate}; echo done` });
      await run.shows("running");
      run.process.kill("SIGSTOP");
      idle(scene, 1_800);
      const finished = await sweeping(scene);
      expect(scene.world.aws.running()).toHaveLength(1);
      run.process.kill("SIGCONT");
      fs.writeFileSync(gate, "go on\n");
      expect(await run.finished).toMatchObject({ code: 0, stdout: Buffer.from("running\ndone\n") });
      return { stage: "sweep", finished: report(finished) };
    },
  );

  faultTest("the clock is set forward by an hour while a job is between two stages; sweep leaves it", async (scene) => {
    await prepared(scene);
    idle(scene, 3_600);
    scene.configure({ top: { LogLevel: "debug" } });
    const begun = scene.begin("sweep");
    await begun.shows("looking again");
    ended(await scene.run("true"), 0);
    const finished = await begun.finished;
    ended(finished, 0);
    expect(scene.world.aws.running()).toHaveLength(1);
    scene.configure();
    return { stage: "sweep", finished: report(finished) };
  });

  faultTest("records older than an hour whose tasks are gone, and what killed writers left; sweep", async (scene) => {
    const arn = await prepared(scene);
    await scene.world.aws.stopTask(arn, { stopCode: "UserInitiated", stoppedReason: "Task stopped by user" });
    const cutOff = `${scene.record}.0123456789ab.tmp`;
    fs.writeFileSync(cutOff, "{");
    expect(await sweeping(scene, "--json")).toMatchObject({ code: 0, report: { removedRecords: [] } });
    ageRecord(scene.record, 3_700);
    const hourAgo = Date.now() / 1000 - 3_700;
    fs.utimesSync(cutOff, hourAgo, hourAgo);
    const dry = await sweeping(scene, "--json", "--dry-run");
    expect(dry.report?.removedRecords).toHaveLength(1);
    expect(filesLeft(scene.world)).toHaveLength(2);
    const finished = await sweeping(scene);
    expect(filesLeft(scene.world)).toEqual([]);
    return {
      stage: "sweep",
      finished: { ...finished, stderr: finished.stdout.toString() },
      says: /removed: its task is gone/,
    };
  });

  faultTest("a record older than an hour whose task runs; sweep leaves both", async (scene) => {
    await prepared(scene);
    ageRecord(scene.record, 7_200);
    age(scene, 7_200);
    const finished = await sweeping(scene);
    expect(fs.existsSync(scene.record)).toBe(true);
    expect(scene.world.aws.running()).toHaveLength(1);
    return { stage: "sweep", finished: { ...finished, stderr: finished.stdout.toString() } };
  });

  faultTest(
    "the task of a record is in another cluster than the file names by now; sweep, past the deadline",
    async (scene) => {
      const arn = await prepared(scene);
      expect(arn).toContain("/bare-cluster/");
      scene.configure();
      ageRecord(scene.record, 7_200, { Deadline: Math.floor(Date.now() / 1000 + 60) });
      expect(await sweeping(scene, "--json")).toMatchObject({ code: 0, report: { stopped: [], removedRecords: [] } });
      ageRecord(scene.record, 7_200, { Deadline: 2 });
      const finished = await sweeping(scene);
      expect(scene.world.aws.running()).toEqual([]);
      return {
        stage: "sweep",
        finished: { ...finished, stderr: finished.stdout.toString() },
        says: /past its deadline/,
      };
    },
    { changes: { Fargate: { Cluster: "bare-cluster", LaunchType: "FARGATE" } } },
  );

  faultTest(
    "more tasks than a page of ListTasks has; sweep",
    async (scene) => {
      const first = await prepared(scene);
      const input = scene.world.aws.callsTo("RunTask")[0]?.input as RunTaskCommandInput;
      const client = new ECSClient({
        region: "us-east-2",
        endpoint: scene.world.aws.url,
        credentials: { accessKeyId: "test", secretAccessKey: "test" },
      });
      const manager = managerOf(scene);
      for (let n = 0; n < 7; n++) {
        const startedBy = `fargate-${manager}-${String(n).padStart(32, "0")}`;
        await client.send(new RunTaskCommand({ ...input, startedBy, clientToken: startedBy }));
      }
      age(scene, 700);
      const finished = await sweeping(scene);
      expect(scene.world.aws.running().map(({ taskArn }) => taskArn)).toEqual([first]);
      expect(scene.world.aws.callsTo("ListTasks").length).toBeGreaterThan(3);
      return { stage: "sweep", finished: { ...finished, stderr: finished.stdout.toString() } };
    },
    { pageSize: 2 },
  );

  faultTest("StopTask is not permitted to a sweep; a later one may", async (scene) => {
    const { aws } = scene.world;
    const arn = await prepared(scene);
    fs.rmSync(scene.record);
    age(scene, 700);
    const denied = aws.inject({
      operation: "StopTask",
      times: Number.POSITIVE_INFINITY,
      do: { error: "AccessDeniedException", message: "User: x is not authorized to perform: ecs:StopTask" },
    });
    const finished = await sweeping(scene);
    ended(finished, 2);
    expect(finished.stderr).toContain(`${arn} may still run`);
    denied.remove();
    expect((await sweeping(scene)).code).toBe(0);
    expect(aws.running()).toEqual([]);
    return { stage: "sweep", finished };
  });

  faultTest("ListTasks is not permitted; sweep", async (scene) => {
    scene.world.aws.permissions = new Set(["ecs:RunTask"]);
    const finished = await sweeping(scene);
    expect(finished).toMatchObject({ code: 2, stdout: Buffer.from("") });
    expect(finished.stderr).toContain("what to do: allow ecs:ListTasks");
    return { stage: "sweep", finished };
  });

  faultTest(
    "nobody cleans up at all: the worker image ends its container at the deadline",
    async (scene) => {
      const { aws } = scene.world;
      const finished = await scene.stage("prepare");
      ended(finished, 0);
      await aws.waitFor(() => aws.running().length === 0, 60_000);
      expect(aws.tasks()[0]).toMatchObject({ stopCode: "EssentialContainerExited" });
      return { stage: "prepare", finished };
    },
    // The job's timeout is 1 s (see below): the deadline is 16 s after RunTask.
    { container: true, jobTimeout: 1, changes: { Fargate: { StartTimeout: 15, DeadlineMargin: 0 } } },
  );
});

describe.concurrent("RunTask is refused", () => {
  const capacity = "Capacity is unavailable at this time. Please try again later or in a different availability zone";
  /** AWS's answer, and what the log advises. */
  const refusals: [what: string, fault: FaultAction, advice: RegExp][] = [
    [
      "AccessDeniedException for ecs:RunTask",
      {
        error: "AccessDeniedException",
        message:
          "User: arn:aws:sts::123456789012:assumed-role/x/i-0 is not authorized to perform: ecs:RunTask on resource: y " +
          "because no identity-based policy allows the ecs:RunTask action",
      },
      /allow ecs:RunTask in the IAM policy of the runner's host/,
    ],
    [
      "AccessDeniedException for iam:PassRole",
      {
        error: "AccessDeniedException",
        message: "User: x is not authorized to perform: iam:PassRole on resource: arn:aws:iam::123456789012:role/r",
      },
      /allow iam:PassRole in the IAM policy/,
    ],
    ["ClusterNotFoundException", { error: "ClusterNotFoundException", message: "Cluster not found." }, /check Cluster/],
    [
      "no default strategy",
      { error: "InvalidParameterException", message: "No Container Instances were found in your cluster." },
      /LaunchType = "FARGATE"/,
    ],
    [
      "the task definition of the file is not found",
      { error: "ClientException", message: "TaskDefinition not found." },
      /name a task definition that is active/,
    ],
    [
      "the task definition of the file is inactive",
      { error: "InvalidParameterException", message: "TaskDefinition is inactive" },
      /name a task definition that is active/,
    ],
    [
      "Spot without its provider on the cluster",
      {
        error: "InvalidParameterException",
        message:
          "The specified capacity provider strategy cannot contain a capacity provider that is not associated with the " +
          "cluster. Associate the capacity provider with the cluster or specify a valid capacity provider and try again.",
      },
      /put-cluster-capacity-providers/,
    ],
    [
      "the platform version does not exist",
      { error: "PlatformUnknownException", message: "The specified platform does not exist." },
      /set PlatformVersion to one that AWS lists/,
    ],
    [
      "the subnet does not exist",
      {
        error: "InvalidParameterException",
        message:
          "Error retrieving subnet information for [subnet-1]: The subnet ID 'subnet-1' does not exist " +
          "(ErrorCode: InvalidSubnetID.NotFound)",
      },
      /check Subnet, SecurityGroup and Region/,
    ],
    [
      "the credentials have expired",
      { error: "ExpiredTokenException", message: "The security token included in the request is expired" },
      /give the runner's host a role/,
    ],
    [
      "the host's clock is wrong",
      {
        error: "InvalidSignatureException",
        message: "Signature expired: 20191209T104625Z is now earlier than 20191210T033904Z (20191210T034404Z - 5 min.)",
      },
      /set the clock/,
    ],
    [
      "the account is blocked",
      { error: "BlockedException", message: "Your account is currently blocked." },
      /ask AWS support/,
    ],
    [
      "the network mode is not awsvpc",
      {
        error: "InvalidParameterException",
        message: "Network Configuration is not valid for the given networkMode of this task definition.",
      },
      /set networkMode to awsvpc/,
    ],
    [
      "ECS Exec without a task role",
      {
        error: "InvalidParameterException",
        message:
          "The execute command failed because a valid task role is not being used. Specify a valid task role in your " +
          "task definition and try again.",
      },
      /give the task definition a taskRoleArn, or set EnableExecuteCommand = false/,
    ],
    [
      "a platform version with EC2",
      {
        error: "InvalidParameterException",
        message: "The platform version must be null when specifying an EC2 launch type.",
      },
      /remove PlatformVersion/,
    ],
    [
      "the task is larger than the account's limit",
      { failures: [{ reason: "The requested CPU configuration is above your limit." }] },
      /make the task smaller, or ask AWS for a higher Fargate quota/,
    ],
  ];
  for (const [what, fault, advice] of refusals)
    faultTest(`RunTask is refused: ${what}`, async (scene) => {
      scene.world.aws.inject({ operation: "RunTask", times: Number.POSITIVE_INFINITY, do: fault });
      const finished = await scene.stage("prepare");
      ended(finished, 2);
      expect(finished.stderr).toMatch(advice);
      expect(finished.stderr.trimEnd().split("\n").at(-1)).toMatch(adviceLine);
      expect(finished.stderr).not.toMatch(/\n\s+at |Error: /); // no stack
      // It fails at once: nothing of this passes by itself.
      expect(scene.world.aws.callsTo("RunTask")).toHaveLength(1);
      return { stage: "prepare", finished };
    });

  const passing: [what: string, fault: FaultAction, advice: RegExp][] = [
    ["no capacity", { failures: [{ arn: "x", reason: capacity }] }, /Subnets in several zones/],
    [
      "no capacity, as an exception",
      { error: "ClientException", message: capacity },
      /FallbackCapacityProviderStrategy/,
    ],
    [
      "the vCPU limit",
      { failures: [{ reason: "You’ve reached the limit on the number of vCPUs you can run concurrently" }] },
      /higher Fargate quota/,
    ],
    ["no network interface", { failures: [{ reason: "RESOURCE:ENI" }] }, /more free addresses/],
    [
      "an instance is in another zone, and one has no room",
      { failures: [{ reason: "LOCATION" }, { reason: "RESOURCE:CPU" }] },
      /give the cluster's instances more room/,
    ],
    [
      "the provisioning limit",
      { error: "LimitExceededException", message: "Tasks provisioning capacity limit exceeded." },
      /too many tasks wait for capacity/,
    ],
    [
      "EC2's own throttling",
      {
        error: "InvalidParameterException",
        message: "Error retrieving subnet information for [subnet-1]: Rate exceeded (ErrorCode: Throttling)",
      },
      /start fewer tasks at once/,
    ],
  ];
  for (const [what, fault, advice] of passing) {
    faultTest(`RunTask is refused for a moment: ${what}`, async (scene) => {
      const { aws } = scene.world;
      aws.inject({ operation: "RunTask", times: 2, do: fault });
      const finished = await scene.stage("prepare");
      ended(finished, 0);
      expect(aws.tasks()).toHaveLength(1);
      // Each was answered: another token each time, all of them in the record.
      const tokens = aws.callsTo("RunTask").map(({ input }) => input.clientToken);
      expect(new Set(tokens).size).toBe(3);
      expect(readRecord(scene.record)?.ClientTokens).toEqual(tokens);
      return { stage: "prepare", finished, says: /trying again in/ };
    });
    faultTest(
      `RunTask is refused until StartTimeout: ${what}`,
      async (scene) => {
        const { aws } = scene.world;
        aws.inject({ operation: "RunTask", times: Number.POSITIVE_INFINITY, do: fault });
        const finished = await scene.stage("prepare");
        ended(finished, 2);
        expect(finished.stderr.trimEnd().split("\n").at(-1)).toMatch(advice);
        expect(aws.callsTo("RunTask").length).toBeGreaterThan(2);
        expect(aws.callsTo("ListTasks")).toEqual([]);
        return { stage: "prepare", finished };
      },
      { changes: { Fargate: { StartTimeout: 10 } } },
    );
  }

  faultTest(
    "one subnet has no capacity: the next is tried first",
    async (scene) => {
      const { aws } = scene.world;
      const first = (input: { networkConfiguration?: { awsvpcConfiguration?: { subnets?: string[] | undefined } } }) =>
        input.networkConfiguration?.awsvpcConfiguration?.subnets?.[0] === "subnet-1";
      const refused = aws.inject({
        operation: "RunTask",
        when: first as never,
        times: Number.POSITIVE_INFINITY,
        do: { failures: [{ reason: capacity }] },
      });
      const finished = await scene.stage("prepare");
      ended(finished, 0);
      expect(refused.used).toBe(1);
      expect(
        aws.callsTo("RunTask").map(({ input }) => input.networkConfiguration?.awsvpcConfiguration?.subnets),
      ).toEqual([["subnet-1", "subnet-2", "subnet-3"], ["subnet-2"]]);
      return { stage: "prepare", finished, says: /trying again in subnet-2/ };
    },
    { changes: { Fargate: { Subnet: undefined, Subnets: ["subnet-1", "subnet-2", "subnet-3"] } } },
  );

  const spot = [{ CapacityProvider: "FARGATE_SPOT", Weight: 1 }];
  faultTest(
    "Spot has no capacity in any subnet: the fallback strategy is tried",
    async (scene) => {
      const { aws } = scene.world;
      const onSpot = (input: { capacityProviderStrategy?: { capacityProvider?: string | undefined }[] | undefined }) =>
        input.capacityProviderStrategy?.[0]?.capacityProvider === "FARGATE_SPOT";
      aws.inject({
        operation: "RunTask",
        when: onSpot as never,
        times: Number.POSITIVE_INFINITY,
        do: { failures: [{ reason: capacity }] },
      });
      const finished = await scene.stage("prepare");
      ended(finished, 0);
      expect(aws.callsTo("RunTask").map(({ input }) => onSpot(input))).toEqual([true, true, true, false]);
      expect(aws.running()[0]).toMatchObject({ capacityProviderName: "FARGATE" });
      return { stage: "prepare", finished, says: /trying again in/ };
    },
    {
      changes: {
        Fargate: {
          Subnet: undefined,
          Subnets: ["subnet-1", "subnet-2"],
          CapacityProviderStrategy: spot,
          FallbackCapacityProviderStrategy: [{ CapacityProvider: "FARGATE", Weight: 1 }],
        },
      },
    },
  );

  faultTest("the job's own variable names a platform version that does not exist", async (scene) => {
    scene.world.aws.inject({
      operation: "RunTask",
      do: { error: "PlatformUnknownException", message: "The specified platform does not exist." },
    });
    const env = { CUSTOM_ENV_FARGATE_PLATFORM_VERSION: "9.9.9", BUILD_FAILURE_EXIT_CODE: "11" };
    const finished = await scene.stage("prepare", { env });
    ended(finished, 11);
    return { stage: "prepare (a build failure)", finished };
  });
  faultTest("the runner's host has no credentials", async (scene) => {
    const env = { AWS_ACCESS_KEY_ID: undefined, AWS_SECRET_ACCESS_KEY: undefined };
    const finished = await scene.stage("prepare", { env });
    ended(finished, 2);
    expect(scene.world.aws.calls).toEqual([]);
    expect(finished.stderr).toContain("what to do: give the runner's host a role");
    return { stage: "prepare", finished };
  });

  for (const [what, changes, says, advice] of [
    [
      "no credentials, and a profile that only has a region",
      { AWS_CONFIG_FILE: "config", AWS_EC2_METADATA_DISABLED: "true" },
      "Could not load credentials from any providers",
      "what to do: give the runner's host a role (a container on EC2: hop limit 2)",
    ],
    [
      "no credentials, and the answers of IMDS do not reach its container (hop limit 1)",
      { AWS_EC2_METADATA_SERVICE_ENDPOINT: "silent" },
      "Could not load credentials from any providers",
      "what to do: give the runner's host a role (a container on EC2: hop limit 2)",
    ],
    [
      "a web identity token that is not there",
      { AWS_WEB_IDENTITY_TOKEN_FILE: "token", AWS_ROLE_ARN: "arn:aws:iam::123456789012:role/r" },
      "ENOENT",
      "",
    ],
  ] as const)
    faultTest(`the runner's host has ${what}`, async (scene) => {
      const where = directory();
      fs.writeFileSync(join(where, "config"), "[default]\nregion = us-east-2\n");
      const silent = await silentServer();
      onTestFinished(silent.close);
      const contentOf = (name: string, value: string) =>
        value === "silent" ? silent.url : name.endsWith("_FILE") ? join(where, value) : value;
      const files = Object.entries<string>(changes).map(([name, value]) => [name, contentOf(name, value)]);
      const none = { AWS_ACCESS_KEY_ID: undefined, AWS_SECRET_ACCESS_KEY: undefined };
      const finished = await scene.stage("prepare", { env: { ...none, ...Object.fromEntries(files) } });
      ended(finished, 2);
      expect(finished.stderr).toMatch(new RegExp(`ecs:RunTask was not sent: .*${says}`));
      expect(finished.stderr).toContain(advice);
      expect(finished.stderr).not.toContain("NAT gateway");
      const line = { ...finished, stderr: finished.stderr.replaceAll(where, "...") };
      return { stage: "prepare", finished: line };
    });

  const sharedConfig = `[profile broken]\ncredential_process = /nonexistent/program --password ${["hidden", "words"].join("-")}\n`;
  for (const [what, profile, says] of [
    ["a profile that does not exist", "missing", "profile missing (AWS_PROFILE) is not in the shared config"],
    [
      "a profile whose credential_process fails",
      "broken",
      "the credential_process of profile broken gave no credentials",
    ],
  ] as const)
    faultTest(`AWS_PROFILE names ${what}`, async (scene) => {
      const file = join(directory(), "aws-config");
      fs.writeFileSync(file, sharedConfig);
      const none = { AWS_ACCESS_KEY_ID: undefined, AWS_SECRET_ACCESS_KEY: undefined };
      const env = { ...none, AWS_PROFILE: profile, AWS_CONFIG_FILE: file, AWS_EC2_METADATA_DISABLED: "true" };
      const finished = await scene.stage("prepare", { env });
      ended(finished, 2);
      expect(finished.stderr).toContain(`ecs:RunTask was not sent: ${says}`);
      expect(finished.stderr).toContain("what to do: check AWS_PROFILE and credential_process");
      expect(finished.stderr).not.toContain("hidden-words");
      expect(scene.world.aws.calls).toEqual([]);
      return { stage: "prepare", finished };
    });

  faultTest("IAM refuses a job's task definition whose name is one of AWS's errors", async (scene) => {
    const name = "InterfaceLimitExceeded:1";
    const message =
      "User: arn:aws:sts::123456789012:assumed-role/x/i-0 is not authorized to perform: ecs:RunTask on resource: " +
      `arn:aws:ecs:us-east-2:123456789012:task-definition/${name}`;
    const { aws } = scene.world;
    aws.inject({ operation: "RunTask", times: Infinity, do: { error: "AccessDeniedException", message } });
    const finished = await scene.stage("prepare", { env: { CUSTOM_ENV_FARGATE_TASK_DEFINITION: name } });
    ended(finished, 2);
    expect(aws.callsTo("RunTask")).toHaveLength(1);
    expect(finished.stderr).toContain("what to do: allow ecs:RunTask in the IAM policy of the runner's host");
    return { stage: "prepare", finished };
  });

  faultTest("no instance is in the zones of Subnets, for a task definition that the job has chosen", async (scene) => {
    const { aws } = scene.world;
    aws.inject({ operation: "RunTask", times: Infinity, do: { failures: [{ reason: "LOCATION" }] } });
    const env = { CUSTOM_ENV_FARGATE_TASK_DEFINITION: "test-task", BUILD_FAILURE_EXIT_CODE: "11" };
    const finished = await scene.stage("prepare", { env });
    ended(finished, 2); // the operator's trouble, not the job's
    expect(finished.stderr).toContain("what to do: add instances in the zones of Subnets");
    expect(aws.callsTo("RunTask")).toHaveLength(1);
    return { stage: "prepare", finished };
  });

  const notFound: FaultAction = { error: "ClientException", message: "TaskDefinition not found." };
  faultTest("the job's own variable names a task definition that does not exist", async (scene) => {
    scene.world.aws.inject({ operation: "RunTask", do: notFound });
    const env = { CUSTOM_ENV_FARGATE_TASK_DEFINITION: "no-such:3", BUILD_FAILURE_EXIT_CODE: "11" };
    const finished = await scene.stage("prepare", { env });
    ended(finished, 11); // a build failure: the runner does not try again
    expect(scene.world.aws.callsTo("RunTask")).toHaveLength(1);
    return { stage: "prepare (a build failure)", finished };
  });
  faultTest("an option names the task definition, the job another, and the option's does not exist", async (scene) => {
    scene.world.aws.inject({ operation: "RunTask", do: notFound });
    const finished = await scene.begin("prepare", {
      env: { CUSTOM_ENV_FARGATE_TASK_DEFINITION: "no-such:3", BUILD_FAILURE_EXIT_CODE: "11" },
      operands: ["--task-def", "no-such:4"],
    }).finished;
    ended(finished, 2);
    return { stage: "prepare", finished };
  });
});

describe.concurrent("the task stops", () => {
  const causes: [what: string, cause: StopCause, advice: RegExp][] = [
    [
      "its image cannot be pulled",
      {
        stopCode: "TaskFailedToStart",
        stoppedReason:
          "CannotPullContainerError: pull image manifest has been retried 1 time(s): failed to resolve ref x: not found",
      },
      /check the image's name/,
    ],
    [
      "a secret may not be read",
      {
        stopCode: "TaskFailedToStart",
        stoppedReason:
          "ResourceInitializationError: unable to pull secrets or registry auth: AccessDeniedException: User: x is not " +
          "authorized to perform: secretsmanager:GetSecretValue on resource: y",
      },
      /allow secretsmanager:GetSecretValue to the task definition's execution role/,
    ],
    [
      "the registry cannot be reached",
      {
        stopCode: "TaskFailedToStart",
        stoppedReason: "ResourceInitializationError: unable to pull secrets or registry auth: i/o timeout",
      },
      /the subnet's route to ECR, S3, Secrets Manager/,
    ],
    ...(
      [
        ['stderr: Failed to resolve "fs-1.efs.us-east-2.amazonaws.com"', /a mount target in each zone/],
        ["stderr: b'mount.nfs4: Connection timed out'", /allow port 2049/],
        ["stderr: b'mount.nfs4: access denied by server while mounting fs-1'", /elasticfilesystem:ClientMount/],
      ] as const
    ).map(([cause, advice]): [string, StopCause, RegExp] => [
      `EFS cannot be mounted, ${cause}`,
      {
        stopCode: "TaskFailedToStart",
        stoppedReason: `ResourceInitializationError: failed to invoke EFS utils commands to set up EFS volumes: ${cause}`,
      },
      advice,
    ]),
    [
      "its image is for another architecture",
      {
        stopCode: "TaskFailedToStart",
        stoppedReason:
          "CannotStartContainerError: ResourceInitializationError: failed to create new container runtime task: OCI " +
          "runtime create failed: exec /bin/sh: exec format error",
      },
      /build the image for the task definition's cpuArchitecture/,
    ],
    [
      "its container exits",
      {
        stopCode: "EssentialContainerExited",
        stoppedReason: "Essential container in task exited",
        containers: [{ exitCode: 64 }],
      },
      /its SSH server must run until/,
    ],
    [
      "somebody stops it",
      { stopCode: "UserInitiated", stoppedReason: "Task stopped by user" },
      /look in CloudTrail for who called StopTask/,
    ],
  ];
  for (const [what, cause, advice] of causes)
    faultTest(`the task stops before it is ready: ${what}`, async (scene) => {
      scene.world.aws.inject({ operation: "RunTask", do: { ends: cause } });
      const finished = await scene.stage("prepare");
      ended(finished, 2);
      expect(finished.stderr).toContain(`${cause.stopCode}: ${cause.stoppedReason}`);
      expect(finished.stderr.trimEnd().split("\n").at(-1)).toMatch(advice);
      return { stage: "prepare", finished };
    });

  for (const [what, cause] of [
    ["no capacity", { stopCode: "TaskFailedToStart", stoppedReason: "Capacity is unavailable at this time." }],
    [
      "no free address in the subnet",
      {
        stopCode: "TaskFailedToStart",
        stoppedReason:
          "Unexpected EC2 error while attempting to Create Network Interface with public IP assignment enabled in subnet " +
          "'subnet-1': InsufficientFreeAddressesInSubnet",
      },
    ],
    [
      "its network interface is late",
      {
        stopCode: "TaskFailedToStart",
        stoppedReason: "Timeout waiting for network interface provisioning to complete.",
      },
    ],
    [
      "its network interface cannot be configured",
      {
        stopCode: "TaskFailedToStart",
        stoppedReason:
          "ResourceInitializationError: failed to configure ENI: failed to setup regular eni: netplugin failed with no " +
          "error message",
      },
    ],
    ["Spot takes it back", { stopCode: "SpotInterruption", stoppedReason: "Your Spot Task was interrupted." }],
  ] as const)
    faultTest(`the task stops before it is ready, for a cause that passes: ${what}`, async (scene) => {
      scene.world.aws.inject({ operation: "RunTask", do: { ends: cause } });
      const finished = await scene.stage("prepare");
      ended(finished, 0);
      expect(scene.world.aws.tasks()).toHaveLength(2);
      expect(scene.world.aws.running()).toHaveLength(1);
      expect(await scene.run("echo ready")).toMatchObject({ code: 0, stdout: Buffer.from("ready\n") });
      return { stage: "prepare", finished, says: /trying again in/ };
    });

  const wait = { changes: { Fargate: { WaitForHealthy: true } } };
  test.concurrent("with WaitForHealthy prepare logs in once ECS reports the container healthy", async () => {
    const own = embeddedHosts();
    const world = await makeWorld({ hosts: own });
    try {
      const scene = makeScene(world, wait, forever);
      const { aws } = world;
      aws.permissions = new Set(["ecs:RunTask", "ecs:DescribeTasks", "ecs:StopTask"]);
      const prepare = scene.begin("prepare");
      await prepare.shows("is RUNNING");
      const calls = aws.callsTo("DescribeTasks").length;
      await aws.waitFor(() => aws.callsTo("DescribeTasks").length > calls + 1);
      expect(own.servers[0]?.connections).toBe(0);
      Object.assign(aws.running()[0]?.containers[0] ?? {}, { healthStatus: "HEALTHY" });
      ended(await prepare.finished, 0);
      expect(new Set(aws.calls.map(({ operation }) => operation))).toEqual(new Set(["RunTask", "DescribeTasks"]));
      ended(await scene.run("true"), 0);
      ended(await scene.stage("cleanup"), 0);
    } finally {
      await world.close();
      await own.close();
    }
  });
  faultTest(
    "the container becomes unhealthy, and prepare waits for its health",
    async (scene) => {
      const prepare = scene.begin("prepare");
      await prepare.shows("is RUNNING");
      Object.assign(scene.world.aws.running()[0]?.containers[0] ?? {}, { healthStatus: "UNHEALTHY" });
      const finished = await prepare.finished;
      ended(finished, 2);
      expect(finished.stderr).toContain("what to do: correct the health check of ci-coordinator");
      return { stage: "prepare", finished };
    },
    wait,
  );
  faultTest(
    "the container has no health check, and prepare waits for its health",
    async (scene) => {
      const finished = await scene.stage("prepare");
      ended(finished, 2);
      expect(finished.stderr).toContain("what to do: give ci-coordinator a healthCheck in the task definition");
      return { stage: "prepare", finished };
    },
    { changes: { Fargate: { WaitForHealthy: true, StartTimeout: 2 } } },
  );

  const under: [what: string, cause: StopCause, advice: RegExp][] = [
    [
      "out of memory",
      {
        stopCode: "EssentialContainerExited",
        stoppedReason: "Essential container in task exited",
        containers: [{ exitCode: 137, reason: "OutOfMemoryError: Container killed due to memory usage" }],
      },
      /give the task definition more memory/,
    ],
    [
      "its container exits",
      {
        stopCode: "EssentialContainerExited",
        stoppedReason: "Essential container in task exited",
        containers: [{ exitCode: 1 }],
      },
      /its SSH server must run until/,
    ],
    [
      "Spot takes it back",
      { stopCode: "SpotInterruption", stoppedReason: "Your Spot Task was interrupted." },
      /run it again, with on-demand capacity/,
    ],
    [
      "somebody stops it",
      { stopCode: "UserInitiated", stoppedReason: "Task stopped by user" },
      /look in CloudTrail for who/,
    ],
  ];
  for (const [what, cause, advice] of under)
    faultTest(
      `the task stops under a script: ${what}`,
      async (scene) => {
        ended(await scene.stage("prepare"), 0);
        const run = scene.begin("run", { script: "echo running; sleep 600" });
        await run.shows("running");
        const arn = scene.world.aws.running()[0]?.taskArn as string;
        await scene.world.aws.stopTask(arn, { graceSeconds: 0, ...cause });
        const finished = await run.finished;
        expect(finished).toMatchObject({ code: 2, stdout: Buffer.from("running\n") });
        expect(finished.stderr).toContain(
          `${cause.stopCode}: ${cause.stoppedReason}; container ci-coordinator: exit code`,
        );
        for (const { reason } of cause.containers ?? []) expect(finished.stderr).toContain(reason ?? "");
        expect(finished.stderr.trimEnd().split("\n").at(-1)).toMatch(advice);
        return { stage: "run", finished };
      },
      // AWS needs a while from the end of the containers to STOPPED.
      { container: true, timing: { deprovisioning: 4_000 } },
    );

  for (const [what, times, code] of [
    ["once", 1, 0],
    ["any more", Number.POSITIVE_INFINITY, 2],
  ] as const)
    faultTest(`ECS does not know the task ${what}, before a script is sent to it`, async (scene) => {
      ended(await scene.stage("prepare"), 0);
      const before = new Date(Date.now() - 20_000); // the driver asks ECS only after some silence
      fs.utimesSync(scene.record, before, before);
      const arn = scene.world.aws.running()[0]?.taskArn as string;
      const missing = scene.world.aws.inject({
        operation: "DescribeTasks",
        times,
        do: { failures: [{ arn, reason: "MISSING" }] },
      });
      const finished = await scene.run("echo ran");
      ended(finished, code);
      expect(finished.stdout.toString()).toBe(code === 0 ? "ran\n" : "");
      expect(missing.used).toBeGreaterThanOrEqual(times === 1 ? 1 : 3);
      return { stage: "run", finished };
    });

  faultTest(
    "a script is killed for want of memory, and the container lives on",
    async (scene) => {
      ended(await scene.stage("prepare"), 0);
      const finished = await scene.run("echo running; tail /dev/zero");
      expect(finished).toMatchObject({ code: 1, stdout: Buffer.from("running\n") });
      expect(fs.readFileSync(scene.env.BUILD_EXIT_CODE_FILE as string, "utf8")).toBe("137");
      expect(finished.stderr).toContain("what to do: give the task definition more memory");
      return { stage: "run (a build failure, 137)", finished, says: /error: .*137/ };
    },
    { container: true, enforceMemory: true },
  );

  faultTest("a script ends with 137, and ECS says that its container ran out of memory", async (scene) => {
    ended(await scene.stage("prepare"), 0);
    const { aws } = scene.world;
    const [container] = aws.running()[0]?.containers ?? [];
    Object.assign(container ?? {}, { exitCode: 137, reason: "OutOfMemoryError: Container killed due to memory usage" });
    const [task] = aws.running();
    Object.assign(task ?? {}, {
      desiredStatus: "STOPPED",
      stopCode: "EssentialContainerExited",
      stoppedReason: "Essential container in task exited",
    });
    const finished = await scene.run("exit 137");
    ended(finished, 1);
    expect(fs.readFileSync(scene.env.BUILD_EXIT_CODE_FILE as string, "utf8")).toBe("137");
    Object.assign(task ?? {}, { desiredStatus: "RUNNING" });
    return { stage: "run (a build failure, 137)", finished, says: /error: .*137/ };
  });

  faultTest("a script ends with 137 of its own", async (scene) => {
    ended(await scene.stage("prepare"), 0);
    const finished = await scene.run("exit 137");
    expect(finished).toMatchObject({ code: 1, stderr: "" });
    return { stage: "run (a build failure, 137)", finished };
  });
});

describe.concurrent("SSH fails", () => {
  const prepareFails = async (scene: Scene, last: RegExp, advice: RegExp): Promise<Met> => {
    const finished = await scene.stage("prepare");
    ended(finished, 2);
    const lines = finished.stderr.trimEnd().split("\n");
    expect(lines.at(-2)).toMatch(last);
    expect(lines.at(-1)).toMatch(advice);
    expect(scene.world.aws.running()).toEqual([]);
    return { stage: "prepare", finished };
  };
  const ready = async (scene: Scene) => {
    ended(await scene.stage("prepare"), 0);
    return readRecord(scene.record) as TaskRecord;
  };

  for (const [address, last, advice] of [
    [
      "silent",
      /no login worked within ConnectTimeout \(5 s\); .*nothing answered for \d+ s/,
      /allow Port in the task's security group/,
    ],
    ["refusing", /no login worked within ConnectTimeout \(5 s\); .*ECONNREFUSED/, /the image must start an SSH server/],
  ] as const)
    faultTest(
      `the task's address is ${address}`,
      async (scene) => {
        scene.world.aws.inject({ operation: "RunTask", do: { address } });
        return prepareFails(scene, last, advice);
      },
      { changes: { SSH: { ConnectTimeout: 5 } } },
    );
  for (const [address, ms] of [
    ["silent", 8_000],
    ["refusing", 4_000],
  ] as const)
    faultTest(`the task's address is ${address} for ${ms / 1000} s`, async (scene) => {
      scene.world.aws.inject({ operation: "RunTask", do: { address, ms } });
      const finished = await scene.stage("prepare");
      ended(finished, 0);
      return { stage: "prepare", finished };
    });

  faultTest(
    "Username is not the container's",
    (scene) =>
      prepareFails(scene, /refuses to let daemon in; .*the server refused the key/, /let Username in with the key/),
    { container: true, changes: { SSH: { Username: "daemon" } } },
  );
  faultTest(
    "the container refuses the key",
    (scene) =>
      prepareFails(scene, /refuses to let root in; .*the server refused the key/, /let Username in with the key/),
    { misbehaviour: { refuseKey: Number.POSITIVE_INFINITY } },
  );
  faultTest(
    "the container's sshd accepts no RSA key (KeyType = rsa)",
    (scene) => prepareFails(scene, /refuses to let root in; .*the server refused the key/, /KeyType = "ed25519"/),
    { container: ONLY_ED25519, changes: { SSH: { KeyType: "rsa" } } },
  );
  taskTest(
    "that sshd accepts an Ed25519 key",
    async () => {
      const own = await containerHosts({ packages: PACKAGES, ...ONLY_ED25519 });
      try {
        const { host, logIn } = await startTask(own);
        (await logIn()).client.end();
        await host.stop(0);
      } finally {
        await own.close();
      }
    },
    { containerOnly: true },
  );
  faultTest(
    "the container refuses the key at first",
    async (scene) => {
      const finished = await scene.stage("prepare");
      ended(finished, 0);
      return { stage: "prepare", finished };
    },
    { misbehaviour: { refuseKey: 2 } },
  );
  faultTest(
    "logins take 6 s",
    async (scene) => {
      const finished = await scene.stage("prepare");
      ended(finished, 0);
      return { stage: "prepare", finished };
    },
    { misbehaviour: { loginDelay: 6_000 } },
  );

  faultTest(
    "the server needs 3.5 s for its first bytes",
    async (scene) => {
      const finished = await scene.stage("prepare");
      ended(finished, 0);
      ended(await scene.run("true"), 0);
      return { stage: "prepare", finished };
    },
    { misbehaviour: { handshakeDelay: 3_500 } },
  );

  const shellFaults: [fault: string, line: string, code: number, said: string[], advice: RegExp][] = [
    [
      "nologin",
      "RUN usermod --shell /usr/sbin/nologin root",
      1,
      ["This account is currently not available."],
      /give Username a login shell such as bash, not nologin or false/,
    ],
    ["false", "RUN usermod --shell /bin/false root", 1, [], /give Username a login shell/],
    [
      "ended by a start-up file (exit 3)",
      "RUN echo 'echo some words; exit 3' >/root/.bashrc",
      3,
      ["some words"],
      /let the start-up files of Username, such as ~\/.bashrc, return instead of exit/,
    ],
    [
      "bash in an image without sh",
      'ENTRYPOINT ["/bin/bash", "/usr/local/bin/worker-entrypoint"]\nRUN rm /bin/sh',
      127,
      ["bash: line 1: /bin/sh: No such file or directory"],
      /install bash or sh in the image/,
    ],
  ];
  for (const [fault, line, code, said, advice] of shellFaults)
    faultTest(
      `the login shell is ${fault}`,
      async (scene) => {
        const finished = await scene.stage("prepare");
        ended(finished, 2);
        const how = said.length > 0 ? ":" : " and said nothing";
        const text = `error: the container's login shell runs no commands: it ended with ${code}${how}`;
        const lines = finished.stderr.split("\n").map((line) => line.replace(/^\S+Z /, ""));
        const at = lines.indexOf(text);
        expect(at).toBeGreaterThan(0);
        expect(lines.slice(at + 1, at + 1 + said.length)).toEqual(said.map((line) => `error:   ${line}`));
        expect(finished.stderr).toMatch(advice);
        return { stage: "prepare", finished, says: /runs no commands/ };
      },
      { container: { lines: [line] } },
    );

  const definition = (environment: Record<string, string>) => ({
    taskDefinitions: [
      {
        family: "test-task",
        containerDefinitions: [
          {
            name: "ci-coordinator",
            image: "sshd",
            environment: Object.entries(environment).map(([name, value]) => ({ name, value })),
          },
        ],
      },
    ],
  });
  for (const [fault, image, Username, says, seen, patterns] of [
    ["sshd is its first process", { lines: plainSshd() }, "root", /PassEnvironment.*overwritten/, ""],
    ["another user owns it", { lines: plainSshd(TINI) }, "worker", /PassEnvironment.*may not read/, ""],
    ["the image lacks tr", { lines: [...plainSshd(TINI), "RUN rm /usr/bin/tr"] }, "root", /PassEnvironment.*no tr/, ""],
    [
      "initProcessEnabled makes another process than sshd the first",
      { lines: plainSshd(), init: true },
      "root",
      undefined,
      "eu-west-1",
    ],
    ["tini is its first process", { lines: plainSshd(TINI) }, "root", undefined, "eu-west-1"],
    [
      "sshd is its first process and has SetEnv",
      { lines: plainSshd([], "-o SetEnv=AWS_REGION=us") },
      "root",
      undefined,
      "us",
    ],
    ["sshd is its first process, and PassEnvironment is []", { lines: plainSshd() }, "root", undefined, "", []],
    ["the worker image passes it", {}, "root", undefined, "eu-west-1", ["OTHER"]],
    ["the worker image passes it, under tini", { init: true }, "root", undefined, "eu-west-1"],
  ] as const)
    faultTest(
      `the container's environment: ${fault}`,
      async (scene) => {
        const finished = await scene.stage("prepare");
        ended(finished, 0);
        if (!says) expect(finished.stderr).not.toContain("PassEnvironment");
        const ran = await scene.run("echo $AWS_REGION");
        ended(ran, 0);
        expect(ran.stdout.toString()).toBe(`${seen}\n`);
        return { stage: "prepare", finished, ...(says ? { says } : {}) };
      },
      {
        container: image as ContainerHostsOptions,
        changes: { SSH: { Username, ...(patterns ? { PassEnvironment: patterns } : {}) } },
        ...definition({ AWS_REGION: "eu-west-1", UNRELATED: "x" }),
      },
    );

  faultTest(
    "the login shell does not exist",
    (scene) => prepareFails(scene, /refuses to let root in; .*the server refused the key/, /let Username in/),
    { container: { lines: ["RUN usermod --shell /bin/missing root"] } },
  );

  faultTest(
    "a start-up file sets -a and replaces cat by a function",
    async (scene) => {
      ended(await scene.stage("prepare"), 0);
      // Exported, the script would leave no room for the arguments of any program.
      const finished = await scene.run(`: '${"x".repeat(200_000)}'\n/bin/echo runs\ncat`);
      ended(finished, 0);
      expect(finished.stdout.toString()).toBe("runs\nfunction\n");
      return { stage: "run", finished };
    },
    { container: { lines: ["RUN echo 'set -a; cat() { echo function; }' >/root/.bashrc"] } },
  );

  faultTest(
    "a start-up file breaks PATH and replaces exec",
    async (scene) => {
      const finished = await scene.stage("prepare");
      ended(finished, 0);
      const script = "echo $PATH; type cat || PATH=/usr/bin:/bin; cat /etc/hostname >/dev/null && echo runs";
      const ran = await scene.run(script);
      ended(ran, 0);
      expect(ran.stdout.toString()).toBe("/nowhere\nruns\n");
      const other = await scene.run("#!/usr/bin/env sh\necho $0 $PATH");
      ended(other, 0);
      expect(other.stdout.toString()).toBe("sh /nowhere\n");
      return { stage: "prepare", finished };
    },
    { container: { lines: [`RUN echo '${BREAKS_PATH_AND_EXEC}' >/root/.bashrc`] } },
  );

  faultTest(
    "the SSH server's key is another one than prepare saw",
    async (scene) => {
      await ready(scene);
      const [task] = scene.world.aws.running();
      // sshd reads its keys again at HUP.
      const made = await task?.host?.exec(
        "cd /run/sshd && rm -f host_ed25519* && ssh-keygen -q -t ed25519 -N '' -f host_ed25519 && kill -HUP 1",
      );
      expect(made?.exitCode).toBe(0);
      const { ContainerIP: host, PrivateKey, HostKey } = readRecord(scene.record) as TaskRecord;
      const privateKey = Buffer.from(PrivateKey, "base64").toString();
      const target = {
        host,
        Port: scene.world.sshPort,
        Username: "root",
        KeepAliveInterval: 0,
        privateKey,
        CancelGracePeriod: 1,
      };
      const shownKey = async () => {
        const { client, hostKey } = await connect(target, 3_000, new AbortController().signal);
        client.end();
        return hostKey.toString("base64");
      };
      await expect.poll(() => shownKey().catch(() => HostKey), { timeout: 20_000 }).not.toBe(HostKey);
      const finished = await scene.run("echo never");
      ended(finished, 2);
      expect(finished.stdout.toString()).toBe("");
      expect(finished.stderr).toContain("the server's key is not the one seen when the task was prepared");
      expect(finished.stderr).toContain("what to do: nothing was sent");
      return { stage: "run", finished };
    },
    { container: true },
  );

  faultTest(
    "the network falls silent under a script (KeepAliveInterval 15, the default)",
    async (scene) => {
      await ready(scene);
      const [task] = scene.world.aws.running();
      const run = scene.begin("run", { script: "echo running; sleep 600" });
      await run.shows("running");
      await task?.host?.pause();
      const finished = await run.finished;
      ended(finished, 2);
      await task?.host?.resume();
      return { stage: "run", finished };
    },
    { container: true },
  );

  faultTest(
    "the server closes a script's channel without an exit status",
    async (scene) => {
      await ready(scene);
      const finished = await scene.run("echo done");
      ended(finished, 2);
      expect(finished.stdout.toString()).toBe("done\n");
      return { stage: "run", finished };
    },
    { misbehaviour: { withoutExitStatus: (command) => command.includes("FARGATE_SCRIPT") } },
  );
  faultTest(
    "the server's process for the connection is killed under a script",
    async (scene) => {
      await ready(scene);
      const [task] = scene.world.aws.running();
      const run = scene.begin("run", { script: "echo running; sleep 600" });
      await run.shows("running");
      await task?.host?.exec(
        "for f in /proc/[0-9]*/cmdline; do grep -q '^sshd: root' $f && kill -KILL $(echo $f | cut -d/ -f3); done",
      );
      const finished = await run.finished;
      ended(finished, 2);
      return { stage: "run", finished };
    },
    { container: true },
  );

  faultTest(
    "sshd has as many logins under way as it takes (MaxStartups)",
    async (scene) => {
      const { ContainerIP: host } = await ready(scene);
      // sshd turns away a growing share of those that come while 10 have not logged in, and everybody from 100 on.
      const waiting = new Set<Socket>();
      const knock = async () => {
        const socket = connectTcp(scene.world.sshPort, host).on("error", () => {});
        const first = await new Promise<string>((said) => {
          socket.once("data", (data) => said(data.toString("latin1")));
          socket.once("close", () => said(""));
        });
        if (!first.startsWith("SSH-")) return void socket.destroy();
        waiting.add(socket);
        socket.once("close", () => waiting.delete(socket));
      };
      while (waiting.size < 100) await Promise.all(Array.from({ length: 10 }, knock));
      const begun = scene.begin("run", { script: "echo at last" });
      await begun.shows("trying again");
      for (const socket of waiting) socket.destroy();
      const finished = await begun.finished;
      ended(finished, 0);
      expect(finished.stdout.toString()).toBe("at last\n");
      return { stage: "run", finished, says: /trying again/ };
    },
    { container: true, changes: { top: { LogLevel: "debug" } } },
  );
  faultTest(
    "sshd punishes the address for a login that it refused (OpenSSH 9.8)",
    async (scene) => {
      const finished = await scene.stage("prepare");
      ended(finished, 0);
      ended(await scene.run("true"), 0);
      return { stage: "prepare", finished };
    },
    { misbehaviour: { penalties: true, refuseKey: 3 } },
  );
});

describe.concurrent("what the official driver's guides list as troubles", () => {
  faultTest(
    "ECS cannot be reached",
    async (scene) => {
      const closed = await startProxy({ host: "127.0.0.1", port: 1 });
      await closed.close();
      const finished = await scene.stage("prepare", { env: { AWS_ENDPOINT_URL: `http://127.0.0.1:${closed.port}` } });
      ended(finished, 2);
      expect(finished.stderr).toContain("what to do: let the runner's host reach AWS");
      return { stage: "prepare", finished };
    },
    { changes: { Fargate: { StartTimeout: 2 } } },
  );
  const authority = makeAuthority();
  for (const [what, trusted, certificate] of [
    ["that is not trusted", false, {}],
    ["that has expired", true, { notAfter: new Date(Date.now() - 1_000) }],
    ["of another host", true, { host: "other.example" }],
  ] as const)
    faultTest(
      `the AWS endpoint shows a certificate ${what}`,
      async (scene) => {
        const ca = join(directory(), "ca.pem");
        fs.writeFileSync(ca, authority.pem);
        const finished = await scene.stage("prepare", { env: trusted ? { AWS_CA_BUNDLE: ca } : {} });
        ended(finished, 2);
        // Final, and nothing was sent: there is nothing to repeat, to look for or to leave behind.
        expect(finished.stderr.match(/was not sent|got no answer|tried again/g)).toEqual(["was not sent"]);
        expect(finished.stderr).toContain("what to do: set AWS_CA_BUNDLE");
        expect(filesLeft(scene.world)).toEqual([]);
        expect(scene.world.aws.calls).toEqual([]);
        return { stage: "prepare", finished, keepsRecord: true }; // there is none, but cleanup cannot call AWS either
      },
      { tls: authority.issue(certificate) },
    );
  for (const status of [403, 407])
    faultTest(`the proxy refuses a tunnel to AWS, with ${status}`, async (scene) => {
      const proxy = await startConnectProxy(Array(100).fill(status));
      try {
        const env = { HTTPS_PROXY: proxy.url, AWS_ENDPOINT_URL: undefined };
        const finished = await scene.stage("prepare", { env });
        ended(finished, 2);
        expect(proxy.asked).toEqual(["ecs.us-east-2.amazonaws.com:443"]);
        expect(finished.stderr).toContain("what to do: check HTTPS_PROXY");
        expect(filesLeft(scene.world)).toEqual([]);
        return { stage: "prepare", finished };
      } finally {
        await proxy.close();
      }
    });
  faultTest(
    "the proxy refuses a tunnel to AWS for a moment, with 502",
    async (scene) => {
      const proxy = await startConnectProxy([502, 502]);
      try {
        const ca = join(directory(), "ca.pem");
        fs.writeFileSync(ca, authority.pem);
        scene.env.AWS_CA_BUNDLE = ca;
        const finished = await scene.stage("prepare", { env: { HTTPS_PROXY: proxy.url } });
        ended(finished, 0);
        expect(proxy.asked.length).toBeGreaterThan(2);
        expect(scene.world.aws.callsTo("RunTask")).toHaveLength(1);
        return { stage: "prepare", finished };
      } finally {
        await proxy.close();
      }
    },
    { tls: authority.issue() },
  );
  faultTest(
    "the proxy refuses a tunnel to AWS until StartTimeout, with 502",
    async (scene) => {
      const proxy = await startConnectProxy(Array(1_000).fill(502));
      try {
        const env = { HTTPS_PROXY: proxy.url, AWS_ENDPOINT_URL: undefined };
        const finished = await scene.stage("prepare", { env });
        ended(finished, 2);
        expect(proxy.asked.length).toBeGreaterThan(2);
        expect(filesLeft(scene.world)).toEqual([]); // never sent: no task is looked for
        return { stage: "prepare", finished };
      } finally {
        await proxy.close();
      }
    },
    { changes: { Fargate: { StartTimeout: 2 } } },
  );
  faultTest(
    "the job's own variable names a task definition that it may not",
    async (scene) => {
      const finished = await scene.stage("prepare", { env: { CUSTOM_ENV_FARGATE_TASK_DEFINITION: "secret-task:1" } });
      ended(finished, 1);
      expect(scene.world.aws.calls).toEqual([]);
      return { stage: "prepare", finished };
    },
    { changes: { Fargate: { AllowedTaskDefinitions: ["test-*"] } } },
  );
  faultTest(
    "the job's own variable names a platform version that it may not",
    async (scene) => {
      const env = { CUSTOM_ENV_FARGATE_PLATFORM_VERSION: "1.3.0", BUILD_FAILURE_EXIT_CODE: "11" };
      const finished = await scene.stage("prepare", { env });
      ended(finished, 11);
      expect(scene.world.aws.calls).toEqual([]);
      ended(await scene.stage("prepare", { env: { CUSTOM_ENV_FARGATE_PLATFORM_VERSION: "1.4.0" } }), 0);
      return { stage: "prepare (a build failure)", finished };
    },
    { changes: { Fargate: { AllowedPlatformVersions: ["1.4.0"] } } },
  );
  for (const [whose, operators] of [
    ["with the same keys (PrivateKeyPath, host keys of the image)", true],
    ["with the same host key, and lets any key in", false],
  ] as const)
    faultTest(`the task has ended, and its address is another's ${whose}`, async (scene) => {
      const own = await makeKeyPair("ed25519");
      const path = join(directory(), "id_ed25519");
      fs.writeFileSync(path, own.privateKey, { mode: 0o600 });
      if (operators) scene.configure({ SSH: { PrivateKeyPath: path } });
      ended(await scene.stage("prepare"), 0);
      ended(await scene.run("true"), 0);
      const record = readRecord(scene.record) as TaskRecord;
      await scene.world.aws.stopTask(record.TaskARN, {
        stopCode: "EssentialContainerExited",
        stoppedReason: "Essential container in task exited",
      });
      const home = directory();
      const { ContainerIP: address } = record;
      const [started] = scene.world.aws.callsTo("RunTask");
      const authorizedKey = started?.input.overrides?.containerOverrides?.[0]?.environment?.[0]?.value as string;
      const other = await startSshServer({ address, port: scene.world.sshPort, authorizedKey, home });
      try {
        writeRecord(scene.record, { ...record, HostKey: other.hostKey.split(" ")[1] as string });
        // No address is given to another task at once; this one has had time to start.
        const before = new Date(Date.now() - 20_000);
        if (!operators) fs.utimesSync(scene.record, before, before);
        const finished = await scene.run("touch ~/ran");
        ended(finished, 2);
        expect(other.connections).toBeGreaterThan(0);
        expect(fs.readdirSync(home)).toEqual([]);
        return { stage: "run", finished };
      } finally {
        await other.close();
      }
    });
  faultTest(
    "ECS does not say whether a task runs that has given no sign of life",
    async (scene) => {
      ended(await scene.stage("prepare"), 0);
      const before = new Date(Date.now() - 20_000);
      fs.utimesSync(scene.record, before, before);
      ended(await scene.run("true"), 0);
      // Its end was a sign of life.
      expect(fs.statSync(scene.record).mtimeMs).toBeGreaterThan(before.getTime());
      fs.utimesSync(scene.record, before, before);
      const refused: FaultAction = { error: "AccessDeniedException", message: "no" };
      scene.world.aws.inject({ operation: "DescribeTasks", times: Number.POSITIVE_INFINITY, do: refused });
      const finished = await scene.run("echo never");
      ended(finished, 2);
      expect(finished.stdout.toString()).toBe("");
      return { stage: "run", finished };
    },
    { changes: { SSH: { ConnectTimeout: 1 } } },
  );
  faultTest("the job's container leads to another job's, whose host key is of the same image", async (scene) => {
    ended(await scene.stage("prepare"), 0);
    const response = join(directory(), "response.json");
    const { id, ...rest } = JSON.parse(fs.readFileSync(scene.env.JOB_RESPONSE_FILE as string, "utf8"));
    fs.writeFileSync(response, JSON.stringify({ ...rest, id: id + 2_000_000 }));
    const env = { JOB_RESPONSE_FILE: response };
    ended(await scene.stage("prepare", { env }), 0);
    const other = join(scene.world.records, `${readJob({ ...scene.env, ...env })?.stem}.json`);
    const { ContainerIP, HostKey } = readRecord(other) as TaskRecord;
    // As if its own address passed everything on to there.
    writeRecord(scene.record, { ...(readRecord(scene.record) as TaskRecord), ContainerIP, HostKey });
    const finished = await scene.run("echo never");
    ended(finished, 2);
    expect(finished.stdout.toString()).toBe("");
    ended(await scene.stage("cleanup", { env }), 0);
    return { stage: "run", finished };
  });
  faultTest("there is no record when a script is to run", async (scene) => {
    const finished = await scene.run("echo never");
    ended(finished, 2);
    return { stage: "run", finished };
  });
  for (const [what, port] of [
    ["is refused", "closed"],
    ["times out", "stalled"],
  ] as const)
    faultTest(`the connection of a run ${what}`, async (scene) => {
      ended(await scene.stage("prepare"), 0);
      const { ContainerIP: host } = readRecord(scene.record) as TaskRecord;
      const proxy = await startProxy({ host, port: scene.world.sshPort }, { host });
      if (port === "closed") await proxy.close();
      else proxy.stall();
      scene.configure({ SSH: { Port: proxy.port, ConnectTimeout: 1 } });
      const finished = await scene.run("echo never");
      ended(finished, 2);
      scene.configure();
      if (port === "stalled") await proxy.close();
      return { stage: "run", finished };
    });
  faultTest(
    "the key is RSA, and the container's sshd refuses SHA-1 signatures",
    async (scene) => {
      const finished = await scene.stage("prepare");
      ended(finished, 0);
      ended(await scene.run("true"), 0);
      return { stage: "prepare", finished };
    },
    { container: true, changes: { SSH: { KeyType: "rsa" } } },
  );
  faultTest(
    "a script needs the task role's credentials",
    async (scene) => {
      ended(await scene.stage("prepare"), 0);
      const finished = await scene.run("echo $AWS_CONTAINER_CREDENTIALS_RELATIVE_URI");
      ended(finished, 0);
      expect(finished.stdout.toString()).toBe("/v2/credentials/0123\n");
      return { stage: "run", finished: { ...finished, stderr: finished.stdout.toString() } };
    },
    {
      container: true,
      taskDefinitions: [
        {
          family: "test-task",
          containerDefinitions: [
            {
              name: "ci-coordinator",
              image: "sshd",
              environment: [{ name: "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI", value: "/v2/credentials/0123" }],
            },
          ],
        },
      ],
    },
  );

  /** The words that users look for, the fault that meets them here, and what our log says instead. */
  const troubles: [old: string, fault: string, ours: string][] = [
    [
      "No Container Instances were found in your cluster",
      "RunTask is refused: no default strategy",
      "ecs:RunTask was refused: InvalidParameterException: No Container Instances were found in your cluster.",
    ],
    [
      "file does not exist",
      "there is no record when a script is to run",
      "there is no task for this job: no finished record",
    ],
    ["connect: connection timed out", "the task's address is silent", "nothing answered for"],
    ["connect: connection timed out", "the connection of a run times out", "nothing answered for"],
    ["connect: connection refused", "the task's address is refusing", "ECONNREFUSED"],
    ["connect: connection refused", "the connection of a run is refused", "ECONNREFUSED"],
    [
      "unable to authenticate, attempted methods [none publickey]",
      "the container refuses the key",
      "the server refused the key",
    ],
    ["unable to connect to ECS", "ECS cannot be reached", "ecs:RunTask got no answer"],
    [
      "unable to connect to worker ECS task via ssh",
      "the task's address is refusing",
      "no login worked within ConnectTimeout",
    ],
    [
      "signature algorithm ssh-rsa not in PubkeyAcceptedAlgorithms",
      "the key is RSA, and the container's sshd refuses SHA-1 signatures",
      "",
    ],
    ["no credentials to access AWS", "a script needs the task role's credentials", ""],
  ];
  test.each(troubles)("%s: %s", (old, fault, ours) => {
    expect(faults).toContain(fault);
    const readme = fs.readFileSync(join(projectRoot, "README.md"), "utf8");
    const section = readme.slice(readme.indexOf("\n## When something fails"), readme.indexOf("\n## Faults, and what"));
    const entry = section.split("\n").find((line) => line.includes(old) && line.includes(ours));
    expect(entry, "an entry by the old words and ours").toBeDefined();
    // What the log of that fault said is in the table of faults, which a run checks.
    const row = readme.split("\n").find((line) => line.startsWith(`| ${fault} |`));
    expect(row).toContain(ours);
  });
});

describe.concurrent("the record cannot be kept", () => {
  /** A directory that nobody can write to, root included. */
  const places: [what: string, path: string][] = [
    ["cannot be made", "/proc/fargate"],
    ["is a file", "/dev/null"],
    ["can be looked at only", "/proc/self"],
  ];
  for (const [what, path] of places)
    faultTest(
      `the directory for records ${what}`,
      async (scene) => {
        const finished = await scene.stage("prepare");
        ended(finished, 2);
        expect(scene.world.aws.calls).toEqual([]);
        scene.configure();
        return { stage: "prepare", finished };
      },
      { changes: { TaskMetadata: { Directory: path } } },
    );

  // A file system of its own needs root.
  const mount = (options: string, path: string) =>
    spawnSync("mount", ["-t", "tmpfs", "-o", options, "tmpfs", path], { stdio: "ignore" }).status === 0;
  for (const [what, options, fill] of [
    ["is full", "size=64k", true],
    ["is read-only", "ro", false],
  ] as const)
    faultTest(`the disk of the directory for records ${what}`, async (scene) => {
      const path = directory();
      if (!mount(options, path)) throw new SkipFault("mount(8) is not permitted");
      try {
        if (fill) managerId(path);
        if (fill) spawnSync("dd", ["if=/dev/zero", `of=${join(path, "fill")}`], { stdio: "ignore" });
        scene.configure({ TaskMetadata: { Directory: path } });
        const finished = await scene.stage("prepare");
        ended(finished, 2);
        expect(scene.world.aws.calls).toEqual([]);
        scene.configure();
        return { stage: "prepare", finished };
      } finally {
        spawnSync("umount", [path]);
      }
    });

  faultTest("a network file system gives all files in the directory for records to another user", async (scene) => {
    // The same from the driver's point of view: it runs as one user, and its new files belong to another.
    const strace = [
      "strace",
      "-f",
      "-qq",
      "-o",
      "/dev/null",
      "-e",
      "trace=geteuid",
      "-e",
      "inject=geteuid:retval=12345",
    ];
    if (!(await straceWorks())) throw new SkipFault("strace(1) does not work");
    if (process.geteuid?.() !== 0) throw new SkipFault("the table of faults shows root's id");
    fs.mkdirSync(scene.world.records, { mode: 0o700 });
    const command = [...strace, driver, "--config", scene.world.configure(), "custom"];
    const finished = await start([...command, "prepare"], { env: scene.env }).finished;
    ended(finished, 2);
    expect(scene.world.aws.calls).toEqual([]);
    expect(finished.stderr).toContain("run GitLab Runner as it");
    // No exception for it: whoever reaches such a directory writes as that user. A good record is not used, either.
    ended(await scene.stage("prepare"), 0);
    const script = join(directory(), "script");
    fs.writeFileSync(script, "echo never");
    const run = await start([...command, "run", script, "build_script"], { env: scene.env }).finished;
    ended(run, 2);
    expect(run.stdout.toString()).toBe("");
    return { stage: "prepare", finished };
  });

  /** A script fails and its exit code cannot be stored: still a build failure, and no file says otherwise. */
  const failsWithoutExitCode = async (scene: Scene, file: string) => {
    ended(await scene.stage("prepare"), 0);
    const env = { BUILD_EXIT_CODE_FILE: file, BUILD_FAILURE_EXIT_CODE: "11" };
    const finished = await scene.begin("run", { script: "exit 42", env }).finished;
    ended(finished, 11);
    expect(fs.existsSync(file)).toBe(false);
    return { stage: "run (a build failure)", finished, says: /warning: BUILD_EXIT_CODE_FILE / };
  };
  faultTest("a script fails, and the disk of BUILD_EXIT_CODE_FILE is full", async (scene) => {
    const path = directory();
    if (!mount("size=64k", path)) throw new SkipFault("mount(8) is not permitted");
    try {
      spawnSync("dd", ["if=/dev/zero", `of=${join(path, "fill")}`], { stdio: "ignore" });
      return await failsWithoutExitCode(scene, join(path, "exit-code"));
    } finally {
      spawnSync("umount", [path]);
    }
  });
  faultTest("a script fails, and the directory of BUILD_EXIT_CODE_FILE is gone", (scene) =>
    failsWithoutExitCode(scene, join(directory(), "gone", "exit-code")),
  );
  faultTest("BUILD_EXIT_CODE_FILE of an earlier stage cannot be removed", async (scene) => {
    ended(await scene.stage("prepare"), 0);
    const env = { BUILD_EXIT_CODE_FILE: join(directory(), "exit-code") };
    fs.mkdirSync(env.BUILD_EXIT_CODE_FILE);
    const finished = await scene.begin("run", { script: "echo never", env }).finished;
    ended(finished, 2);
    expect(finished.stdout.toString()).toBe("");
    return { stage: "run", finished };
  });

  faultTest("the disk is full when RunTask has answered", async (scene) => {
    const path = directory();
    if (!mount("size=64k", path)) throw new SkipFault("mount(8) is not permitted");
    try {
      const { aws } = scene.world;
      const held = Promise.withResolvers<void>();
      aws.inject({ operation: "RunTask", do: { holdUntil: held.promise, after: true } });
      scene.configure({ TaskMetadata: { Directory: path } });
      const prepare = scene.begin("prepare");
      await aws.waitFor(() => aws.tasks().length === 1, 30_000);
      spawnSync("dd", ["if=/dev/zero", `of=${join(path, "fill")}`], { stdio: "ignore" });
      held.resolve();
      const finished = await prepare.finished;
      ended(finished, 2);
      expect(aws.running()).toEqual([]);
      scene.configure();
      return { stage: "prepare", finished };
    } finally {
      spawnSync("umount", [path]);
    }
  });
});

// ---------------------------------------------------------------------------------------------------------
// A hostile server: what a job can make of its container's sshd
// ---------------------------------------------------------------------------------------------------------

describe.concurrent("a hostile SSH server", () => {
  let world: World;
  beforeAll(async () => {
    world = await makeWorld({ embedded: true });
  });
  afterAll(() => world?.close());

  /** Three at a time: the driver, and the server that floods it, share this machine's processors with the others. */
  let busy = 0;
  const waiting: (() => void)[] = [];
  const turn = async () => {
    if (busy < 3) busy++;
    else await new Promise<void>((next) => waiting.push(next));
    return () => {
      const next = waiting.shift();
      if (next) next();
      else busy--;
    };
  };
  /** These wait for what does not come, which costs nobody anything. */
  const idle: readonly AttackName[] = [
    "silence",
    "version-only",
    "version-slow",
    "never-answered",
    "prompt-count",
    "rekey-silent",
    "open-unanswered",
    "open-other",
    "window-0",
    "window-1",
    "exec-unanswered",
    "exit-unmarked",
    "eof-only",
    "killed-and-silent",
    "kill-unopened",
    "kill-unanswered",
    "silent",
  ];

  /** The exit code, what the log says, and the exit code that the runner is told. */
  type Verdict = readonly [code: number, says?: RegExp, exitCode?: string];
  const noKex: Verdict = [2, /Handshake failed: no matching key exchange algorithm/];
  const otherKey: Verdict = [2, /did not begin: .*the server's key is not the one seen when the task was prepared/];
  const noLogin: Verdict = [2, /did not begin: .*the server refused the key/];
  const room: Verdict = [2, /the server sends more than there is room for|stopped by SIGTERM/];
  const notEnded: Verdict = [2, /warning: the script may still run in the container: no answer/];
  const says: Verdict = [
    2,
    /the server says "\\u001b\[2J\\u001b\]0;owned\\u0007\\u000d \| 2026-01-01T00:00:00Z all is well/,
  ];
  const deaf: Verdict = [2, /: the server makes requests and does not read the answers; /];
  const special: Partial<Record<AttackName, Verdict>> = {
    "newkeys-first": [2, /the server broke the protocol/],
    "disconnect-first": says,
    "open-refused": [2, /the server opened no channel: the server says "/],
    "group-16": noKex,
    "group-17": noKex,
    "group-18": noKex,
    "group-safe": noKex,
    "group-32k": noKex,
    "host-key-other": otherKey,
    "host-key-rsa-16k": otherKey,
    "host-key-malformed": otherKey,
    failures: noLogin,
    "partial-success": noLogin,
    "partial-successes": noLogin,
    "password-only": noLogin,
    prompts: noLogin,
    stdout: room,
    stderr: room,
    "marks-unended": room,
    "kill-flooded": room,
    "kill-unopened": notEnded,
    "kill-unanswered": notEnded,
    "kill-endless": notEnded,
    silent: notEnded,
    "kill-lie": notEnded,
    "kill-nothing": [2, /warning: the script may still run in the container: not found/],
    "zlib-bomb": [2, /Handshake failed: no matching .*compression/],
    "zlib-openssh-bomb": [2, /Handshake failed: no matching .*compression/],
    "requests-global-deaf": deaf,
    "requests-channel-deaf": deaf,
    "channels-deaf": deaf,
    "packet-size-0": [2, /error: the server takes packets of 0 bytes only/],
    "packet-size-1": [2, /error: the server takes packets of 1 bytes only/],
    // The job's own server says how the job's own script ended; what SSH has room for and the runner has not is 255.
    "success-unasked": [0],
    "open-twice": [0],
    "packet-size-4g": [0],
    "window-overflow": [0],
    "mark-complete-first": [0],
    "mark-number": [0],
    "exit-unclosed": [1, undefined, "3"],
    "exit-256": [1, undefined, "255"],
    "exit-1000": [1, undefined, "255"],
    "exit-4g": [1, undefined, "255"],
    "signal-line": [1, undefined, "128"],
    "signal-proto": [1, undefined, "128"],
    "signal-empty": [1, undefined, "128"],
    "signal-long": [1, undefined, "128"],
    "signal-before-mark": [1, undefined, "128"],
    "killed-and-silent": [1, undefined, "137"],
  };

  /** These end when the driver is told to, and not before. */
  const goesOn = (attack: AttackName) =>
    [room, notEnded].includes(special[attack] as Verdict) || attack === "kill-nothing";

  for (const attack of Object.keys(attacks) as AttackName[])
    test(`a hostile server: ${attack}`, async () => {
      const done = idle.includes(attack) ? () => {} : await turn();
      const where = directory();
      const address = `127.78.0.${1 + Object.keys(attacks).indexOf(attack)}`;
      const server = await startHostileSshServer({ address, port: 0, attack });
      try {
        const { environment, response } = gitlabJob({ id: faultJobs++ });
        const env = {
          ...world.aws.environment,
          ...environment,
          JOB_RESPONSE_FILE: join(where, "response.json"),
          BUILD_EXIT_CODE_FILE: join(where, "exit-code"),
        };
        fs.writeFileSync(env.JOB_RESPONSE_FILE, JSON.stringify(response));
        // As prepare has left it, before the job's first command changed the server. ECS knows the task no more.
        const job = readJob(env) as Job;
        const records = join(where, "records");
        openDirectory(records);
        const key = await makeKeyPair("ed25519");
        writeRecord(join(records, `${job.stem}.json`), {
          ...someRecord,
          StartedBy: `fargate-0123456789ab-${job.hash.slice(0, 32)}`,
          ContainerIP: address,
          PrivateKey: Buffer.from(key.privateKey).toString("base64"),
          HostKey: server.hostKey.toString("base64"),
          Deadline: Math.floor(Date.now() / 1000) + 3_600,
        });
        const config = world.configure({
          top: { LogLevel: "debug" },
          TaskMetadata: { Directory: records },
          SSH: { Port: server.port, ConnectTimeout: 1, CancelGracePeriod: 1 },
        });
        const script = join(where, "script");
        fs.writeFileSync(script, `#!/usr/bin/env bash\n${"# nothing\n".repeat(2_000)}`);
        const child = spawn(driver, ["--config", config, "custom", "run", script, "build_script"], {
          env: { PATH: process.env.PATH, ...env },
          stdio: ["ignore", "pipe", "pipe"],
        });
        const chunks: Buffer[] = [];
        child.stdout.resume();
        child.stderr.on("data", (chunk: Buffer) => {
          if (chunks.length < 100) chunks.push(chunk);
          else chunks[99] = chunk; // of a flood, its beginning and what the driver says at last
        });
        let peak = 0;
        const look = setInterval(() => {
          try {
            const status = fs.readFileSync(`/proc/${child.pid}/status`, "latin1");
            peak = Math.max(peak, Number(/VmHWM:\s+(\d+)/.exec(status)?.[1] ?? 0) / 1024);
          } catch {}
        }, 50);
        const over = new Promise<number | string | null>((resolve) =>
          child.on("close", (code, signal) => resolve(signal ?? code)),
        );
        // Most end by themselves. What goes on must end when it is told to; then nothing but SIGKILL would help.
        const patience = (ms: number, signal: NodeJS.Signals) => setTimeout(() => child.kill(signal), ms);
        const timers = [
          patience(attack in special && !goesOn(attack) ? 60_000 : 2_000, "SIGTERM"),
          patience(90_000, "SIGKILL"),
        ];
        const code = await over;
        timers.forEach(clearTimeout);
        clearInterval(look);
        const stderr = Buffer.concat(chunks).toString();
        wholeRun.look("the log of an attacked run", stderr);
        const [expected, says, exitCode] = special[attack] ?? [2];
        expect(code, stderr.slice(-2_000)).toBe(expected);
        if (says) expect(stderr).toMatch(says);
        const { BUILD_EXIT_CODE_FILE: told } = env;
        expect(fs.existsSync(told) ? fs.readFileSync(told, "latin1") : undefined).toBe(exitCode);
        // It has 60 MB before the attack; where nothing is bounded, each second brings hundreds more.
        expect(peak).toBeLessThan(500);
        expect(stderr).not.toMatch(/bug of the driver|undefined is not|is not a function/);
        // What the server says is in the log, if at all, on one line and without effect.
        expect(stderr).not.toMatch(/^2026-01-01/m);
        // biome-ignore lint/suspicious/noControlCharactersInRegex: control characters are what it looks for
        expect(stderr).not.toMatch(/[\u0000-\u0009\u000b-\u001f\u007f-\u009f]/);
        expect(stderr).not.toMatch(/what to do: .*(iam:|execution role)/);
        const { answers, accepted, commands, scripts } = server.seen;
        expect({ answers, accepted }).toEqual({ answers: 0, accepted: 0 });
        expect(scripts.length).toBeLessThan(2);
        // The server does notice answers.
        if (attack === "channels") expect(server.seen.refused).toBeGreaterThan(0);
        if (attack === "requests-global") expect(server.seen.replies).toBeGreaterThan(0);
        if ([otherKey, noLogin, noKex].includes(special[attack] as Verdict))
          expect({ commands, scripts }).toEqual({ commands: [], scripts: [] });
      } finally {
        await server.close();
        done();
      }
    }, 120_000);
});

describe.concurrent("a hostile server at the address of a new task", () => {
  const short = { Fargate: { StartTimeout: 3 }, SSH: { ConnectTimeout: 2 } };
  const prepareIn = async (attack?: AttackName) => {
    const hosts = hostileHosts(attack);
    const world = await makeWorld({ hosts });
    try {
      const scene = makeScene(world, attack ? { changes: short } : {}, forever);
      const finished = await scene.stage("prepare");
      const left = world.aws.running();
      const cleaned = await scene.stage("cleanup");
      expect(cleaned).toMatchObject({ code: 0 });
      expect(filesLeft(world)).toEqual([]);
      const seen = hosts.servers.map((server) => server.seen);
      for (const { answers, accepted } of seen) expect({ answers, accepted }).toEqual({ answers: 0, accepted: 0 });
      return { finished, left, seen };
    } finally {
      await world.close();
      await hosts.close();
    }
  };

  test("whoever answers first at a task's address is taken for it, and prepare gives no secret away", async () => {
    const { finished, seen } = await prepareIn();
    ended(finished, 0);
    const [{ commands = [], scripts = [], authMethods = [] } = {}] = seen;
    expect({ commands, scripts }).toEqual({ commands: [expect.stringContaining("fargate-shells")], scripts: [] });
    expect(new Set(authMethods)).toEqual(new Set(["publickey"]));
    wholeRun.look("what prepare sends to whoever answers", commands.join("\n"));
  });

  for (const attack of [
    "greeting-lines",
    "silence",
    "group-18",
    "banners",
    "never-answered",
    "password-only",
    "garbage-later",
    "disconnect",
    "packet-size-0",
    "open-unanswered",
    "kill-unanswered",
    "kill-endless",
    "kill-lie",
  ] as const)
    test(`a hostile server at the address of a new task: ${attack}`, async () => {
      const { finished, left } = await prepareIn(attack);
      ended(finished, 2);
      expect(left).toEqual([]);
      expect(finished.stderr).not.toMatch(/bug of the driver|^2026-01-01/m);
    });
});

/** What takes minutes; its name begins with `soak: `, which is what `npm run soak` selects. */
function soakTest(
  name: string,
  body: (task: TaskMeta, skip: (why: string) => never) => Promise<Omit<FaultRow, "fault">>,
): void {
  soaks.push(name);
  if (!SOAK) return;
  test(`soak: ${name}`, { timeout: 900_000 }, async ({ task, skip }) => {
    const row = await body(task.meta, (why) => skip(why));
    addRow({ fault: name, ...row });
    expect(row.left).toBe(0);
  });
}

soakTest("200 jobs at once, with AWS's request rates enforced", async (meta) => {
  meta.hosts = hosts.kind;
  const count = 200;
  const exitCodeOf = (id: number) => (id % 3 === 0 ? 1 + (id % 200) : 0);
  const load = await runLoad({ jobs: count, exitCodeOf, hosts });
  const { jobs, calls, tasks, tasksLeft, recordsLeft, mostTasks, seconds } = load;
  console.log(`${count} jobs at once: ${JSON.stringify({ calls, tasks, mostTasks, seconds: Math.round(seconds) })}`);
  const seen = jobs.map(({ id, status, exitCode, hasOwnOutput, strangeMarks, throttling, prepares }) => {
    return { id, status, exitCode, hasOwnOutput, strangeMarks, throttling, prepares };
  });
  const wished = Array.from({ length: count }, (_, index) => {
    const exitCode = exitCodeOf(1001 + index);
    const status = exitCode === 0 ? "success" : "build-failure";
    return { id: 1001 + index, status, exitCode, hasOwnOutput: true, strangeMarks: [], throttling: [], prepares: 1 };
  });
  expect(seen).toEqual(wished);
  // Each in a task of its own, and at the same time: else this was no load.
  expect(new Set(jobs.map(({ task }) => task)).size).toBe(count);
  expect(mostTasks).toBeGreaterThan(count / 2);
  expect(tasks.started).toBe(count);
  expect(recordsLeft).toEqual([]);
  // Most calls for each job, throttled ones among them; a job on its own makes 1, 6 or 7, and 1.
  const most: Record<string, number> = { RunTask: 4, DescribeTasks: 8, StopTask: 2 };
  expect(Object.keys(calls).toSorted()).toEqual(Object.keys(most).toSorted());
  for (const [operation, { all, throttled, failed }] of Object.entries(calls)) {
    expect(failed, operation).toBe(0);
    expect(all, operation).toBeLessThanOrEqual((most[operation] ?? 0) * count);
    if (operation !== "DescribeTasks") expect(all - throttled, operation).toBe(count);
  }
  return { ended: "each job: its own exit code", says: "", left: tasksLeft.length };
});

for (const cpus of [undefined, 0.25])
  soakTest(
    `320 scripts that fail end with their last output behind a filter${cpus ? `, on ${cpus} of a processor` : ""}`,
    async (meta, skip) => {
      if (hosts.kind !== "container") return skip("it needs a container");
      const own = await containerHosts(cpus ? { cpus } : {});
      meta.hosts = "container";
      try {
        const { logIn } = await startTask(own);
        for (const form of ["17.9", "19.x"] as const)
          expect(await lostOutput(logIn, form, { runs: 20, sorts: 20 })).toEqual([]);
        return { ended: "each script: 1, all output there", says: "", left: 0 };
      } finally {
        await own.close();
      }
    },
  );

soakTest("sshd bars the address for connections that left without a login (OpenSSH 10)", async (meta) => {
  const newer = await containerHosts({ baseImage: NEWER_BASE_IMAGE });
  const world = await makeWorld({ hosts: newer });
  meta.hosts = "container";
  try {
    const scene = makeScene(world, {}, forever);
    ended(await scene.stage("prepare"), 0);
    const { ContainerIP: host } = readRecord(scene.record) as TaskRecord;
    const knock = () =>
      new Promise<string>((said) => {
        const socket = connectTcp(world.sshPort, host).on("error", () => said(""));
        socket.once("data", (data) => {
          said(data.toString("latin1"));
          socket.destroy();
        });
        socket.once("close", () => said(""));
      });
    // One second for each that leaves after the server's first line; from 15 on nobody is let in.
    for (let knocks = 0; !(await knock()).startsWith("Not allowed"); knocks++) expect(knocks).toBeLessThan(100);
    scene.configure({ top: { LogLevel: "debug" } });
    const finished = await scene.run("echo at last");
    ended(finished, 0);
    expect(finished.stdout.toString()).toBe("at last\n");
    expect(finished.stderr).toMatch(/trying again/);
    ended(await scene.stage("cleanup"), 0);
    return { ended: "run: 0", says: "", left: world.aws.running().length };
  } finally {
    await world.close();
    await newer.close();
  }
});

/** Interrupts a stage after each of its system calls that changes or waits for something outside of it. */
async function stepsOf(...enumerations: Omit<StepOptions, "world">[]): Promise<number> {
  const world = await makeWorld({ embedded: true, timing: stepTiming });
  try {
    const all = await Promise.all(enumerations.map((options) => enumerateSteps({ world, ...options })));
    const results = all.flat();
    console.log(
      `${results.length} steps: ${enumerations.map((e, n) => `${e.stage} ${e.signal} ${all[n]?.length}`).join(", ")}`,
    );
    const table = (which: (result: StepResult) => boolean) => stepTable(results.filter(which));
    for (const steps of all) expect(steps.length).toBeGreaterThan(0);
    expect(
      table(({ reached, step }) => !reached && !isPiece(step)),
      "not reached",
    ).toBe("");
    expect(
      table(({ tasksLeft }) => tasksLeft > 0),
      "tasks left",
    ).toBe("");
    // What was to become the manager's identity holds no secret; sweep removes it.
    const litter = (name: string) => !/^\.manager-id\.[0-9a-f]{12}\.tmp$/.test(name);
    expect(
      table(({ filesLeft }) => filesLeft.some(litter)),
      "files left",
    ).toBe("");
    expect(
      table(({ cleanup }) => cleanup.exitCode !== 0),
      "cleanup failed",
    ).toBe("");
    const again = ({ nextTry }: StepResult) => nextTry && (nextTry.exitCode !== 0 || nextTry.tasks !== 1);
    expect(
      table((result) => Boolean(again(result))),
      "the next try",
    ).toBe("");
    const killed = results.filter(({ reached, signal }) => reached && signal === "SIGKILL");
    expect(stepTable(killed.filter(({ exitSignal }) => exitSignal !== "SIGKILL")), "not killed").toBe("");
    const told = results.filter(({ reached, signal }) => reached && signal !== "SIGKILL");
    // A stage that has done its work may end as if nothing had been; cleanup does its work whatever comes.
    const whole = { prepare: /Ready/, run: /\bdone\b/, cleanup: /^/ };
    const right = ({ stage, exitCode, output }: StepResult) =>
      exitCode === 2 || (exitCode === 0 && whole[stage].test(output));
    expect(stepTable(told.filter((result) => !right(result))), "exit code").toBe("");
    expect(stepTable(told.filter(({ scriptProcesses }) => scriptProcesses > 0)), "the script goes on").toBe("");
    return results.reduce((left, { tasksLeft }) => left + tasksLeft, 0);
  } finally {
    await world.close();
  }
}

/** Without strace there is no stopping after each system call: where CI=true that is a failure, elsewhere a skip. */
function stepTest(name: string, ended: string, ...enumerations: Omit<StepOptions, "world">[]): void {
  soakTest(name, async (_, skip) => {
    if (!(await straceWorks())) {
      if (process.env.CI === "true") throw new Error("CI=true, and strace does not work");
      skip("strace is missing, or may not trace");
    }
    return { ended, says: "", left: await stepsOf(...enumerations) };
  });
}

const atRunTask = { only: (step: string) => /RunTask/.test(step), runTask: { delay: 3_000 } };
stepTest(
  "prepare is killed after each of its system calls; cleanup, or the next try, follows",
  "prepare: SIGKILL",
  { stage: "prepare", signal: "SIGKILL" },
  { stage: "prepare", signal: "SIGKILL", followedBy: "next try" },
  { stage: "prepare", signal: "SIGKILL", ...atRunTask },
  { stage: "prepare", signal: "SIGKILL", ...atRunTask, followedBy: "next try" },
);
const whenSent = (step: string) => step === "send RunTask";
stepTest(
  "prepare gets SIGTERM or SIGINT after each of its system calls",
  "prepare: 2, or 0 once it is ready",
  { stage: "prepare", signal: "SIGTERM" },
  { stage: "prepare", signal: "SIGINT" },
  { stage: "prepare", signal: "SIGTERM", only: whenSent, runTask: { delay: 3_000 } },
  { stage: "prepare", signal: "SIGTERM", only: whenSent, runTask: { delay: 8_000 } },
  { stage: "prepare", signal: "SIGTERM", only: whenSent, runTask: "hang-after" },
  { stage: "prepare", signal: "SIGINT", only: whenSent, runTask: "hang-after" },
);
stepTest(
  "run gets SIGTERM or SIGINT, or is killed, after each of its system calls",
  "run: 2, or 0 once its script has ended",
  { stage: "run", signal: "SIGTERM" },
  { stage: "run", signal: "SIGINT" },
  { stage: "run", signal: "SIGKILL" },
);
stepTest(
  "cleanup gets SIGTERM or SIGINT, or is killed, after each of its system calls; cleanup follows",
  "cleanup: 0",
  ...(["ready", "unanswered", "unsent", "unrecorded"] as const).flatMap((from) =>
    (["SIGTERM", "SIGINT", "SIGKILL"] as const).map((signal) => ({
      stage: "cleanup" as const,
      signal,
      from,
      ...(from === "unsent" && { only: (step: string) => !/\(\d+\)$/.test(step) }),
    })),
  ),
);

describe("the security model", () => {
  test("each row of SECURITY.md names tests, and each of them exists", ({ task }) => {
    const namesIn = (tasks: readonly { name: string; tasks?: readonly unknown[] }[]): string[] =>
      tasks.flatMap((one) => (one.tasks ? namesIn(one.tasks as typeof tasks) : [one.name]));
    const known = new Set(namesIn(task.file.tasks as Parameters<typeof namesIn>[0]));
    const text = fs.readFileSync(join(projectRoot, "SECURITY.md"), "utf8");
    const [, table = ""] = /\| tests \|\n[-| ]+\n((?:\|.*\n)+)/.exec(text) ?? [];
    const rows = table.trimEnd().split("\n");
    expect(rows.length).toBeGreaterThan(15);
    for (const row of rows) {
      const cells = row.split(" | ");
      expect(cells, row).toHaveLength(5);
      const names = [...(cells[4] ?? "").matchAll(/`([^`]+)`/g)].map(([, name]) => name as string);
      expect(names.length, row).toBeGreaterThan(0);
      for (const name of names) expect(known, row).toContain(name);
    }
  });
});

// ---------------------------------------------------------------------------------------------------------
// Any input: what comes from outside may be anything, and each property says what holds all the same
// ---------------------------------------------------------------------------------------------------------

describe("any input", () => {
  /** What an engine says when a program has made a mistake: no operator can do anything with it. */
  const ENGINE =
    /is not a(n object| function)|(undefined|null) is not|[Cc]annot read prop|not iterable|\[object |call stack|[Ii]nvalid (Date|time)|must be of type|bug of the driver/;
  /** Characters; enough for every setting to be wrong at once, and no flood. */
  const LONGEST = 20_000;
  /** Controls, line ends, marks of the direction of writing. */
  const UNSAFE = /[\p{Cc}\p{Zl}\p{Zp}\p{Bidi_Control}]/u;
  const FORMATS = ["text", "text-simple", "json"] as const;
  const timeout = 60_000 * fuzzRuns;

  const logRecord = (message: string, properties = {}): LogRecord => ({
    category: ["fargate"],
    level: "fatal",
    message: [message],
    rawMessage: message,
    properties,
    timestamp: 0,
  });
  /** What a failure says is for an operator's eyes, and short. */
  function expectClear(failure: unknown, kind: Failure["kind"] = "system"): string {
    if (!(failure instanceof Failure)) throw new Error(`no Failure: ${failure}`, { cause: failure });
    expect(failure.kind).toBe(kind);
    expect(failure.message.trim()).not.toBe("");
    expect(failure.message.length).toBeLessThan(LONGEST);
    expect(failure.message).not.toMatch(ENGINE);
    for (const line of failure.message.split("\n"))
      for (const format of FORMATS) expect(formatRecord(logRecord(line), format).slice(0, -1)).not.toMatch(UNSAFE);
    return failure.message;
  }
  const outcomeOf = async <T>(call: () => Promise<T> | T): Promise<{ value: T } | { failure: unknown }> => {
    try {
      return { value: await call() };
    } catch (failure) {
      return { failure };
    }
  };
  const discard = () => new Writable({ write: (_chunk, _encoding, done) => done() });

  /** Log lines, by what they were logged for. */
  const logs = new Map<string, string[]>();
  let cases = 0;
  /** A stage of a job of its own, whose clock runs as `now` says. */
  function stageOf(records: string, now: () => number, change: (config: Config) => void = () => {}) {
    const { config } = readConfig(configFile("guide"), "guide", {}, {});
    config.TaskMetadata.Directory = records;
    config.Fargate.EnablePublicIP = false;
    config.SSH.Port = 1;
    change(config);
    const name = `case-${cases++}`;
    const lines: string[] = [];
    logs.set(name, lines);
    const hash = "0123456789abcdef".repeat(4);
    const job: Job = { stem: `label-${hash}`, hash, title: "job 1 of project 2", timeout: 3600 };
    const log = getLogger(["fargate", name]);
    const context: Context = { config, job, byJob: [], log, env: {}, stop: never, now, wallTime: Date.now };
    return { context, lines, record: join(records, `${job.stem}.json`) };
  }
  const ownStartedBy = /^fargate-[0-9a-f]{12}-0123456789abcdef0123456789abcdef$/;

  beforeAll(() => console.log(fuzzBanner));
  beforeEach(() => {
    logs.clear();
    configureSync({
      reset: true,
      sinks: {
        test: (record) => void logs.get(record.category[1] ?? "")?.push(formatRecord(record, "text-simple").trimEnd()),
      },
      loggers: [
        { category: "fargate", sinks: ["test"], lowestLevel: "info" },
        { category: ["logtape", "meta"], sinks: [] },
      ],
    });
  });

  // --- Configuration ---

  const configFiles = ["guide", "guide-2020", "guide-private", "manual", "loose", "full"].map(configFile);
  const KEY = /^ {2}(LogLevel|LogFormat|LogFile|Fargate|TaskMetadata|SSH)(\.[^\n]*)?(: | is |$)/;

  /** What reading any text as a configuration comes to. */
  function expectConfigOrFailure(text: string): void {
    let read: ReturnType<typeof readConfig>;
    try {
      read = readConfig(text, "/etc/any.toml", {}, {});
    } catch (failure) {
      const [head, ...problems] = expectClear(failure).split("\n");
      expect(head).toMatch(/^\/etc\/any\.toml( cannot be used:$|, line \d+, column \d+: not TOML: \S)/);
      for (const problem of problems) if (!/^ {2}.*\b\d+ more/.test(problem)) expect(problem).toMatch(KEY);
      // What stands in the file is told as it stands there.
      if (/=\s*[-+]?(nan|inf)\s*$/m.test(text) && !/null/.test(text))
        expect(problems.join("\n")).not.toMatch(/is null;/);
      return;
    } finally {
      expect(({} as { polluted?: unknown }).polluted).toBeUndefined();
    }
    const { config, warnings } = read;
    expect(v.parse(ConfigSchema, config)).toEqual(config);
    for (const warning of warnings) expect(formatRecord(logRecord(warning), "text").length).toBeLessThan(LONGEST);
    for (const table of [config, config.Fargate, config.Fargate.Tags, config.TaskMetadata, config.SSH])
      expect(Object.getPrototypeOf(table)).toBe(Object.prototype);
  }

  test(
    "as a configuration is one, or a failure that names the file and the keys",
    () => forAny(fc.property(configText(configFiles), expectConfigOrFailure), { runs: 1_500 }),
    timeout,
  );

  test.each(hugeConfigs(configFile("guide")))("as a configuration, even with %s", (_, text) => {
    expectConfigOrFailure(text);
  });

  test("tags are what the file says, whatever their names, or a failure", () =>
    forAny(
      fc.property(
        fc.dictionary(fc.oneof(fc.constantFrom("constructor", "prototype", "team"), fc.string()), fc.string(), {
          maxKeys: 5,
        }),
        (tags) => {
          const lines = Object.entries(tags).map(([key, value]) => `${JSON.stringify(key)} = ${JSON.stringify(value)}`);
          const text = `${configFile("guide")}\n[Fargate.Tags]\n${lines.join("\n").replaceAll("\u007f", "\\u007f")}\n`;
          const read = attempt(() => readConfig(text, "f", {}, {}).config.Fargate.Tags);
          if ("failure" in read) expect(expectClear(read.failure)).toContain("Fargate.Tags");
          else expect({ ...(read.value as object) }).toEqual({ ...tags });
        },
      ),
      { runs: 200 },
    ));

  test.each(['["a", "b"]', "1979-05-27", "[]", "[{a = 'b'}]"])("as tags, %s is no table, and refused", (value) => {
    const text = configFile("guide").replace("[Fargate]", `[Fargate]\nTags = ${value}`);
    expect(expectClear(thrown(() => readConfig(text, "f", {}, {})))).toContain("Fargate.Tags");
  });

  test(
    "as a configuration that is none, given to prepare: no call to AWS, no record, exit code 2",
    async () => {
      let asked = 0;
      const endpoint = await startEndpoint(() => {
        asked++;
        return { status: 500, headers: [], body: "{}" };
      });
      const where = directory();
      const records = join(where, "records");
      const response = join(where, "response.json");
      fs.writeFileSync(response, JSON.stringify(gitlabJob().response));
      const file = configFile("guide").replace("/opt/gitlab-runner/metadata", records);
      // The search for secrets may add --log-level, which overrides a level that is none.
      const options = { LogLevel: "debug" };
      const bad = configText([file]).filter((text) => "failure" in attempt(() => readConfig(text, "f", options, {})));
      const env = { ...awsEnvironment(endpoint.url), JOB_RESPONSE_FILE: response };
      try {
        await forAnyAtOnce(
          fc.asyncProperty(bad, async (text) => {
            const path = join(where, `${directories++}.toml`);
            fs.writeFileSync(path, text);
            const { code, stdout, stderr } = await fargate(["custom", "prepare", "--config", path], {
              env,
              cwd: where,
            });
            expect({ code, stdout: stdout.toString() }).toEqual({ code: 2, stdout: "" });
            expect(stderr.length).toBeLessThan(LONGEST);
            expect(stderr).not.toMatch(ENGINE);
            expect(stderr.trimEnd().split("\n")[0]).toMatch(/^\S+Z error: /);
            expect(stderr.trimEnd().split("\n")[0]).toContain(path);
            expect(asked).toBe(0);
            expect(fs.existsSync(records)).toBe(false);
          }),
          { runs: 12, lanes: 3 },
        );
      } finally {
        endpoint.close();
      }
    },
    timeout,
  );
  const attempt = (call: () => unknown) => {
    try {
      return { value: call() };
    } catch (failure) {
      return { failure };
    }
  };
  const awsEnvironment = (url: string) => ({
    AWS_ENDPOINT_URL: url,
    AWS_REGION: "us-east-2",
    AWS_ACCESS_KEY_ID: "AKIAIOSFODNN7EXAMPLE",
    AWS_SECRET_ACCESS_KEY: "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY",
    AWS_SESSION_TOKEN: "session-token",
    AWS_EC2_METADATA_DISABLED: "true",
    AWS_CONFIG_FILE: "/dev/null",
    AWS_SHARED_CREDENTIALS_FILE: "/dev/null",
  });

  // --- Jobs ---

  describe("as a job response", () => {
    let path: string;
    beforeAll(() => {
      path = join(directory(), "response.json");
    });
    const { response } = gitlabJob({ token: "token-planted" });
    const jobOf = (content: string, encoding: "utf8" | "latin1" = "utf8"): Job | undefined => {
      fs.writeFileSync(path, content, encoding);
      return readJob({ JOB_RESPONSE_FILE: path });
    };
    const expectJob = (job: Job | undefined) => {
      expect(job?.stem).toMatch(/^[\w-]{1,32}-[0-9a-f]{64}$/);
      expect(job?.title).toMatch(/^job -?\d{1,16} of project -?\d{1,16}$/);
      // Of it the deadline is made, which the record and the container must be able to bear.
      const deadline = Math.ceil(Date.now() / 1000 + (job?.timeout ?? 0));
      expect(job?.timeout).toBeGreaterThan(0);
      expect(`${deadline}`).toMatch(/^\d+$/);
    };

    test("is a job, or a failure without a word of the file", () =>
      forAny(
        fc.property(almostJson(response), (content) => {
          try {
            expectJob(jobOf(content, "latin1"));
          } catch (failure) {
            if (!(failure instanceof Failure)) throw failure;
            expect(expectClear(failure)).toContain(path);
            expect(failure.message).not.toContain("token-planted");
            expect(failure.message.length).toBeLessThan(path.length + 200);
          }
        }),
        {
          runs: 400,
          examples: ["1e999", "1e308", "-1", "0.5"].map((timeout) => {
            const text = JSON.stringify(response).replace(/"timeout":\d+,"runner/, `"timeout":${timeout},"runner`);
            return [Buffer.from(text).toString("latin1")];
          }),
        },
      ));

    test("with any address: a job, or a failure without a word of it", () =>
      forAny(
        fc.property(oddAddress, fc.maxSafeInteger(), fc.maxSafeInteger(), (repo_url, id, project_id) => {
          try {
            expectJob(jobOf(JSON.stringify({ ...response, id, job_info: { project_id }, git_info: { repo_url } })));
          } catch (failure) {
            if (!(failure instanceof Failure)) throw failure;
            expect(expectClear(failure)).toContain("git_info.repo_url");
            expect(failure.message).not.toContain("token-planted");
          }
        }),
        { runs: 200 },
      ));

    test("another scheme, host, path, project or id is another job; other credentials are not", () => {
      const identity = fc.record({ at: repositoryAddress, id: fc.nat(2), project: fc.nat(2) });
      const stemOf = ({ at, id, project }: typeof identity extends fc.Arbitrary<infer I> ? I : never) => {
        const repo_url = `${at.scheme}${at.userinfo}${at.host}${at.port}${at.path}`;
        const content = JSON.stringify({ ...response, id, job_info: { project_id: project }, git_info: { repo_url } });
        try {
          return { stem: jobOf(content)?.stem, repo_url };
        } catch (failure) {
          expect(expectClear(failure)).not.toContain("token-planted");
          return undefined;
        }
      };
      return forAny(
        fc.property(identity, identity, repositoryAddress, (one, other, { userinfo }) => {
          const [a, b] = [stemOf(one), stemOf(other)];
          const again = stemOf({ ...one, at: { ...one.at, userinfo } });
          if (a && again) expect(again.stem).toBe(a.stem);
          if (!a || !b) return;
          const [of, and] = [new URL(a.repo_url), new URL(b.repo_url)];
          const same =
            of.protocol === and.protocol &&
            of.hostname === and.hostname &&
            of.port === and.port &&
            of.pathname === and.pathname &&
            one.id === other.id &&
            one.project === other.project;
          expect(a.stem === b.stem).toBe(same);
        }),
        { runs: 400 },
      );
    });
  });

  // --- Records, with ECS mocked ---

  describe("as a record", () => {
    let ecs: AwsStub<EcsInput, EcsOutput, ECSClientResolvedConfig>;
    const arnOf = (digit: string) => `arn:aws:ecs:us-east-2:123456789012:task/test-cluster/${digit.repeat(32)}`;
    const [recorded, ownTask, foreign] = ["1", "2", "3"].map(arnOf) as [string, string, string];
    const record: TaskRecord = {
      ...someRecord,
      TaskARN: recorded,
      ContainerIP: "127.0.0.1",
      // A real key, so that a record without damage leads as far as to an address where nothing listens.
      PrivateKey: Buffer.from(utils.generateKeyPairSync("ed25519").private).toString("base64"),
      HostKey: "AAAA",
      Deadline: 2_000_000_000,
      UpdatedAt: 1_900_000_000,
    };
    beforeAll(() => {
      ecs = mockClient(ECSClient);
    });
    beforeEach(() => {
      ecs.reset();
      const refusal = Object.assign(new Error("is not authorized to perform: ecs:RunTask"), {
        name: "AccessDeniedException",
        $metadata: { httpStatusCode: 400 },
      });
      ecs.on(RunTaskCommand).rejects(refusal);
      ecs.on(StopTaskCommand).resolves({});
      ecs.on(DescribeTasksCommand).resolves({ tasks: [] });
      // As ECS: without a name, whatever runs in the cluster.
      ecs.on(ListTasksCommand).callsFake(({ startedBy }) => ({
        taskArns: !startedBy ? [ownTask, foreign] : ownStartedBy.test(startedBy) ? [ownTask] : [foreign],
      }));
    });
    afterAll(() => ecs.restore());
    /** A clock by which all patience is soon at its end. */
    const hasty = () => {
      let time = 1_950_000_000_000;
      return () => (time += 20_000);
    };
    // Of a record that can be read, the address is where a run connects to: it stays on loopback.
    const content = almostJson(record).map((text) => text.replace(/("ContainerIP":)"[^"]*"/, '$1"127.0.0.1"'));

    // Each is one change away from a record.
    const damagedRecords = [
      { StartedBy: "", TaskARN: "", Unanswered: true },
      { StartedBy: "someone else", TaskARN: "", Unanswered: true },
      { PrivateKey: "AAAA" },
      { UpdatedAt: -1e308, Deadline: 2 },
      { UpdatedAt: 1e308 },
      { Deadline: 1e308 },
    ].map((change) => JSON.stringify({ ...record, ...change }));
    const ownName = `label-${"0123456789abcdef".repeat(4)}.json`;
    const keyless = almostJson({ ...record, PrivateKey: "AAAA" });

    test.each(["cleanup", "prepare", "run"] as const)(
      "%s stops nothing that is not the job's, and fails clearly if at all",
      (stage) =>
        forAny(
          fc.asyncProperty(content, async (text) => {
            ecs.resetHistory();
            const records = join(directory(), "records");
            fs.mkdirSync(records);
            const {
              context,
              lines,
              record: path,
            } = stageOf(records, hasty(), (config) => {
              config.SSH.ConnectTimeout = 1;
            });
            managerId(records);
            fs.writeFileSync(path, text, { encoding: "latin1", mode: 0o600 });
            const script = join(records, "script");
            fs.writeFileSync(script, "true");
            const outcome = await outcomeOf(async () => {
              if (stage === "cleanup") await cleanup(context);
              else if (stage === "prepare") await prepare(context);
              else await runStage({ ...context, stdout: discard(), stderr: discard() }, script, "build_script");
            });
            if ("failure" in outcome) expectClear(outcome.failure);
            if (stage !== "cleanup") expect(outcome).toHaveProperty("failure");
            for (const line of lines) expect(line).not.toMatch(ENGINE);
            const stopped = ecs.commandCalls(StopTaskCommand).map((call) => call.args[0].input.task as string);
            const named = attempt(() => readRecord(path)?.TaskARN);
            for (const arn of stopped)
              if (arn !== ownTask) {
                expect(arn).not.toBe(foreign);
                expect(text).toContain(
                  JSON.stringify(arn)
                    .slice(1, -1)
                    .replace(/[^ -~]/g, ""),
                );
              }
            if ("failure" in named) expectClear(named.failure);
            // Either the record is gone, or it is said why not.
            if (stage === "cleanup") {
              const told = "failure" in outcome || lines.some((line) => line.includes("could not be looked up"));
              expect(told || !fs.existsSync(path)).toBe(true);
            }
            if (stage === "run") expect(stopped).toEqual([]);
          }),
          { runs: 120, examples: damagedRecords.map((text) => [text]) },
        ),
      timeout,
    );

    test(
      "sweep bears a directory of anything, and removes only what is the driver's",
      () =>
        forAny(
          fc.asyncProperty(fc.array(junk(keyless), { maxLength: 8 }), fc.boolean(), async (files, gone) => {
            ecs.resetHistory();
            ecs.on(DescribeTasksCommand).callsFake(({ tasks = [] }) => ({
              tasks: gone ? [] : (tasks as string[]).map((taskArn) => ({ taskArn, lastStatus: "RUNNING" })),
            }));
            const records = join(directory(), "records");
            fs.mkdirSync(records);
            const outside = join(directory(), "outside");
            fs.writeFileSync(outside, "not the driver's");
            const made = makeJunk(records, outside, files); // and no keys: it lies about anywhere
            const { context, lines } = stageOf(records, () => Date.now());
            const outcome = await outcomeOf(() => sweep(context, { dryRun: false, json: false }));
            if ("failure" in outcome) return void expectClear(outcome.failure);
            for (const json of [false, true]) {
              const text = formatSweep(outcome.value, json);
              expect(text.trimEnd().split("\n").join("")).not.toMatch(json ? /[\p{Cc}]/u : UNSAFE);
              expect(text).not.toMatch(ENGINE);
            }
            for (const line of [...lines, ...outcome.value.problems]) expect(line).not.toMatch(ENGINE);
            for (const call of ecs.commandCalls(StopTaskCommand)) expect(call.args[0].input.task).not.toBe(foreign);
            expect(fs.readFileSync(outside, "utf8")).toBe("not the driver's");
            const left = fs.readdirSync(records, { encoding: "buffer" }).map((name) => name.toString("latin1"));
            for (const name of made) if (!left.includes(name)) expect(name).toMatch(DRIVERS_OWN);
          }),
          {
            runs: 120,
            examples: [
              ...damagedRecords.map((text): [Junk[], boolean] => [
                [{ name: ownName, kind: "file", content: text.replace(record.PrivateKey, "AAAA") }],
                false,
              ]),
              [[{ name: `${ownName}.0123456789ab.tmp`, kind: "link to itself", content: "" }], true],
            ],
          },
        ),
      timeout,
    );
  });

  test.each([
    ["the record", "cleanup"],
    ["the record", "prepare"],
    ["the record", "run"],
    [".manager-id", "cleanup"],
    [".manager-id", "prepare"],
    [".manager-id", "sweep"],
  ])("%s is a FIFO to which nobody writes: %s ends, and says so", async (what, stage) => {
    const endpoint = await startEndpoint(({ operation }) => ({
      status: operation === "RunTask" ? 400 : 200,
      headers: [],
      body: '{"taskArns": [], "tasks": []}',
    }));
    const where = directory();
    const response = join(where, "response.json");
    fs.writeFileSync(response, JSON.stringify(gitlabJob().response));
    const fifo = join(where, what === "the record" ? `${readJob({ JOB_RESPONSE_FILE: response })?.stem}.json` : what);
    spawnSync("mkfifo", [fifo]);
    const config = join(where, "config.toml");
    fs.writeFileSync(config, configFile("guide").replace("/opt/gitlab-runner/metadata", where));
    const command =
      stage === "sweep" ? [stage] : ["custom", stage, ...(stage === "run" ? [config, "build_script"] : [])];
    const env = { ...awsEnvironment(endpoint.url), JOB_RESPONSE_FILE: response };
    const begun = start([driver, "--config", config, ...command], { env });
    const timer = setTimeout(() => begun.process.kill("SIGKILL"), 30_000);
    const { code, signal, stderr } = await begun.finished;
    clearTimeout(timer);
    endpoint.close();
    expect({ code, signal }).toEqual({ code: expect.any(Number), signal: null });
    expect(stderr).toContain(fifo);
  });

  // --- Answers of AWS ---

  describe("as an answer of AWS", () => {
    const arnOf = (n: number) =>
      `arn:aws:ecs:us-east-2:123456789012:task/test-cluster/${n.toString(16).padStart(32, "0")}`;
    const [own, other] = [arnOf(1), arnOf(2)];
    const taskOf = (lastStatus: string) => ({
      taskArn: own,
      lastStatus,
      desiredStatus: lastStatus === "STOPPED" ? "STOPPED" : "RUNNING",
      createdAt: 1_700_000_000.5,
      startedBy: "fargate-0123456789ab-0123456789abcdef0123456789abcdef",
      stopCode: "TaskFailedToStart",
      stoppedReason: "no reason",
      containers: [{ name: "ci-coordinator", lastStatus, exitCode: 1, reason: "x" }],
      attachments: [{ type: "ElasticNetworkInterface", details: [{ name: "privateIPv4Address", value: "127.0.0.1" }] }],
      overrides: {
        containerOverrides: [{ name: "ci-coordinator", environment: [{ name: "FARGATE_DEADLINE", value: "1" }] }],
      },
    });
    const several = (...right: unknown[]) => fc.array(fc.oneof(...right.map(answerTo)), { minLength: 1, maxLength: 3 });
    const answers = fc.record({
      RunTask: several({ tasks: [taskOf("PROVISIONING")], failures: [] }),
      DescribeTasks: several(
        { tasks: [taskOf("PENDING")], failures: [] },
        { tasks: [taskOf("STOPPED")], failures: [] },
        { tasks: [], failures: [{ arn: own, reason: "MISSING" }] },
      ),
      StopTask: several({ task: taskOf("STOPPED") }),
      ListTasks: several({ taskArns: [own] }, { taskArns: [] }, { taskArns: [other], nextToken: "more" }),
    });
    type Answers = typeof answers extends fc.Arbitrary<infer A> ? A : never;
    type Operation = keyof Answers;
    const json = (value: unknown): Answer => ({ status: 200, headers: [], body: JSON.stringify(value) });
    const usual: Answers = {
      RunTask: [json({ tasks: [taskOf("PROVISIONING")], failures: [] })],
      DescribeTasks: [json({ tasks: [taskOf("STOPPED")], failures: [] })],
      StopTask: [json({ task: taskOf("STOPPED") })],
      ListTasks: [json({ taskArns: [own] })],
    };
    const oddlyCreated = { ...taskOf("RUNNING"), createdAt: 1e300 };
    const strangeAnswers: Answers[] = [
      { ...usual, RunTask: [json({ tasks: [{ lastStatus: "PROVISIONING" }] })] },
      { ...usual, RunTask: [json({ tasks: [{ taskArn: 5 }] })] },
      { ...usual, RunTask: [{ status: 400, headers: [], body: '{"__type":"ClientException","message":5}' }] },
      { ...usual, RunTask: [json({ tasks: [{ taskArn: own, createdAt: "x" }] })], ListTasks: [json(7)] },
      { ...usual, ListTasks: [{ status: 409, headers: [], body: '{"__type":{}}' }] },
      { ...usual, DescribeTasks: [json({ tasks: [oddlyCreated] })] },
      { ...usual, DescribeTasks: [json({ tasks: [{ ...taskOf("STOPPED"), containers: {} }] })] },
    ];
    interface Scenario {
      answer(operation: Operation): Answer;
      readonly asked: { operation: string; input: Record<string, unknown>; answer: Answer }[];
    }
    const scenarios = new Map<string, Scenario>();
    let endpoint: Awaited<ReturnType<typeof startEndpoint>>;
    let key: Awaited<ReturnType<typeof makeKeyPair>>;
    const before = { ...process.env };
    beforeAll(async () => {
      endpoint = await startEndpoint(({ operation, input }) => {
        const scenario = scenarios.get(`${input.cluster}`);
        const answer = scenario?.answer(operation as Operation);
        if (!scenario || !answer) return { status: 400, headers: [], body: "{}" };
        scenario.asked.push({ operation, input, answer });
        return answer;
      });
      Object.assign(process.env, awsEnvironment(endpoint.url));
      key = await makeKeyPair("ed25519");
    });
    afterAll(() => {
      endpoint?.close();
      for (const name of Object.keys(awsEnvironment(""))) {
        if (before[name] === undefined) delete process.env[name];
        else process.env[name] = before[name];
      }
    });

    /** A cluster of its own, in which each operation is answered by these in turn, the last one for ever. */
    function clusterOf(lists: Partial<Record<Operation, readonly Answer[]>>) {
      const cluster = `cluster-${cases}`;
      const at: Partial<Record<Operation, number>> = {};
      const scenario: Scenario = {
        asked: [],
        answer: (operation) => {
          const list = lists[operation] ?? [];
          const turn = at[operation] ?? 0;
          at[operation] = turn + 1;
          return list[Math.min(turn, list.length - 1)] ?? { status: 400, headers: [], body: "{}" };
        },
      };
      scenarios.set(cluster, scenario);
      return { cluster, scenario };
    }
    /** Every wait of the driver passes sixty times as fast, as far as it looks at its clock. */
    const fast = () => {
      const begun = Date.now();
      return () => begun + (Date.now() - begun) * 60;
    };
    /** What the endpoint has said to calls of an operation, in whole answers with success. */
    const saidTo = ({ asked }: Scenario, wanted: Operation): { tasks?: unknown; taskArns?: unknown }[] =>
      asked.flatMap(({ operation, answer: { status, body, claims }, answer }) => {
        if (operation !== wanted || status !== 200 || !isWhole(answer)) return [];
        const said = attempt(() => JSON.parse(Buffer.from(body.slice(0, claims), "latin1").toString()));
        return "value" in said && typeof said.value === "object" && said.value !== null ? [said.value] : [];
      });
    /** The tasks that have been started, as the endpoint says. */
    const startedBy = (scenario: Scenario): string[] =>
      saidTo(scenario, "RunTask").flatMap(({ tasks }) => {
        const arns = Array.isArray(tasks) ? (tasks as (Task | null)[]).map((task) => task?.taskArn) : [];
        return arns.filter((arn) => typeof arn === "string" && arn !== "") as string[];
      });
    /** Whether the endpoint has given a list of tasks that lacks this one. */
    const isDenied = (scenario: Scenario, arn: string): boolean =>
      saidTo(scenario, "ListTasks").some(({ taskArns }) => Array.isArray(taskArns) && !taskArns.includes(arn));
    const within = async <T>(ms: number, what: Promise<T>): Promise<T> => {
      const late = Promise.withResolvers<never>();
      const timer = setTimeout(() => late.reject(new Error(`still busy after ${ms} ms`)), ms);
      return Promise.race([what, late.promise]).finally(() => clearTimeout(timer));
    };

    test(
      "prepare and cleanup end in time, say why, and lose no task that was started",
      () =>
        forAnyAtOnce(
          fc.asyncProperty(answers, async (lists) => {
            const { cluster, scenario } = clusterOf(lists);
            const { context, lines, record } = stageOf(join(directory(), "records"), fast(), (config) => {
              config.Fargate.Cluster = cluster;
              config.Fargate.StartTimeout = 60;
              config.SSH.ConnectTimeout = 60;
            });
            const said: string[] = [];
            for (const stage of [prepare, cleanup]) {
              const outcome = await within(
                20_000,
                outcomeOf(() => stage(context)),
              );
              if ("failure" in outcome) said.push(expectClear(outcome.failure));
              else expect(stage).toBe(cleanup);
            }
            for (const line of lines) expect(line).not.toMatch(ENGINE);
            for (const line of [...lines, ...said]) expect(line.length).toBeLessThan(LONGEST);
            const stopped = scenario.asked.flatMap(({ operation, input }) =>
              operation === "StopTask" ? [input.task] : [],
            );
            const told = [...lines, ...said].join("\n");
            // One whose name was lost with the rest of its answer is looked for: until it is known that there is none, the
            // record stays, for the next cleanup or a sweep.
            const kept = fs.existsSync(record);
            for (const arn of startedBy(scenario)) {
              const named = told.includes(formatRecord(logRecord(arn), "text-simple").slice("error: ".length, -1));
              expect(stopped.includes(arn) || named || kept || isDenied(scenario, arn)).toBe(true);
            }
          }),
          { runs: 40, lanes: 40, examples: strangeAnswers.map((lists) => [lists]) },
        ),
      timeout,
    );

    test(
      "sweep and the end of a run that has lost its task do as well",
      () =>
        forAnyAtOnce(
          fc.asyncProperty(answers, fc.boolean(), async (lists, sweeping) => {
            const { cluster } = clusterOf(lists);
            const records = join(directory(), "records");
            fs.mkdirSync(records);
            const { context, lines, record } = stageOf(records, fast(), (config) => {
              config.Fargate.Cluster = cluster;
              config.SSH.ConnectTimeout = 60;
            });
            const script = join(records, "script");
            fs.writeFileSync(script, "true");
            if (sweeping) {
              const outcome = await within(
                20_000,
                outcomeOf(() => sweep(context, { dryRun: false, json: false })),
              );
              if ("failure" in outcome) expectClear(outcome.failure);
              else {
                for (const line of outcome.value.problems) expect(line).not.toMatch(ENGINE);
                for (const json of [false, true]) expect(formatSweep(outcome.value, json)).not.toMatch(ENGINE);
              }
            } else {
              const HostKey = "AAAA";
              const PrivateKey = Buffer.from(key.privateKey).toString("base64");
              const host = { PrivateKey, HostKey, ContainerIP: "127.0.0.1" };
              writeRecord(record, { ...someRecord, ...host, TaskARN: own, Cluster: cluster });
              const sinks = { stdout: discard(), stderr: discard() };
              const outcome = await within(
                20_000,
                outcomeOf(() => runStage({ ...context, ...sinks }, script, "x")),
              );
              expect(outcome).toHaveProperty("failure");
              if ("failure" in outcome) expectClear(outcome.failure);
            }
            for (const line of lines) expect(line).not.toMatch(ENGINE);
          }),
          {
            runs: 40,
            lanes: 40,
            examples: strangeAnswers.flatMap((lists): [typeof lists, boolean][] => [
              [lists, true],
              [lists, false],
            ]),
          },
        ),
      timeout,
    );

    test.each([
      ["always the same", () => "again"],
      ["always another", (page: number) => `page ${page}`],
    ])(
      "a list of tasks that never ends, the token of the next page being %s, is a failure",
      async (_, token) => {
        const { cluster, scenario } = clusterOf({});
        let pages = 0;
        scenario.answer = () => json({ taskArns: [], nextToken: token(pages++) });
        const { context } = stageOf(join(directory(), "records"), fast(), (config) => {
          config.Fargate.Cluster = cluster;
        });
        try {
          const outcome = await within(
            10_000,
            outcomeOf(() => sweep(context, { dryRun: true, json: false })),
          );
          expect(expectClear("failure" in outcome && outcome.failure)).toContain("ecs:ListTasks");
        } finally {
          scenario.answer = () => json({ taskArns: [] });
        }
      },
      20_000,
    );

    test.each([301, 302, 303, 307, 308])(
      "a redirection (%i) is no answer, and nothing is sent to where it leads",
      async (status) => {
        const elsewhere: string[] = [];
        const stranger = await startEndpoint(({ operation }) => {
          elsewhere.push(operation);
          return json({ tasks: [taskOf("PROVISIONING")] });
        });
        const { cluster } = clusterOf({
          RunTask: [{ status, headers: [`location: ${stranger.url}/`], body: "" }],
        });
        const { context } = stageOf(join(directory(), "records"), fast(), (config) => {
          config.Fargate.Cluster = cluster;
          config.Fargate.StartTimeout = 60;
        });
        const outcome = await outcomeOf(() => prepare(context));
        stranger.close();
        expect(elsewhere).toEqual([]);
        expect(expectClear("failure" in outcome && outcome.failure)).toContain("ecs:RunTask");
      },
    );

    test("an answer of 10 MB that is a single text is told in short", async () => {
      const long = "x".repeat(10_000_000);
      const { cluster } = clusterOf({
        RunTask: [json({ tasks: [], failures: [{ reason: long, detail: long }] })],
      });
      const { context } = stageOf(join(directory(), "records"), fast(), (config) => {
        config.Fargate.Cluster = cluster;
      });
      const outcome = await outcomeOf(() => prepare(context));
      expect(expectClear("failure" in outcome && outcome.failure)).toContain("ecs:RunTask started no task");
    });
  });

  // --- Scripts ---

  describe("as a script", () => {
    let task: Awaited<ReturnType<typeof startTask>>;
    beforeAll(async () => {
      task = await startTask();
    });
    afterAll(() => task?.host.stop(0));
    /** The same bytes by bash itself, where the driver runs them, without the driver. */
    async function byBash({ client }: Connection, path: string): Promise<{ code: number; stdout: Buffer }> {
      const program = 'S=$(cat "$0"; echo x); exec </dev/null; eval "unset S; ${S%x}"';
      const ended = Promise.withResolvers<{ code: number; stdout: Buffer }>();
      client.exec(`exec bash -c '${program}' '${path}'`, (error, channel) => {
        if (error) return ended.reject(error);
        const out: Buffer[] = [];
        channel.stderr.resume();
        let code: number | undefined;
        channel.on("data", (chunk: Buffer) => out.push(chunk));
        channel.on("exit", (number: number | null, signal: string) => {
          code = number ?? 128 + (signal === "SIGKILL" ? 9 : 15);
        });
        channel.on("close", () => ended.resolve({ code: code ?? -1, stdout: Buffer.concat(out) }));
      });
      return ended.promise;
    }

    taskTest(
      "any bytes come to what bash makes of them, or to a failure, and the connection stays usable",
      async () => {
        const connection = await task.logIn();
        const path = join(directory(), "script");
        const script = hosts.kind === "container" ? fc.oneof(harmlessScript, shellSoup) : harmlessScript;
        try {
          await forAny(
            fc.asyncProperty(script, async (text) => {
              const bytes = Buffer.from(text, "latin1");
              const out = collect();
              const outcome = await outcomeOf(() =>
                runScript(
                  connection,
                  bytes,
                  { interpreter: "bash", loginShell: "bash" },
                  { stop: never, log: getLogger("fargate"), stdout: out.sink, stderr: discard() },
                ),
              );
              if ("failure" in outcome) {
                expect(expectClear(outcome.failure)).toContain("the script has NUL characters");
                expect(bytes.includes(0)).toBe(true);
                expect(out.bytes().toString("latin1")).toBe("");
                return;
              }
              fs.writeFileSync(path, bytes);
              const { code, stdout } = await byBash(connection, path);
              expect({ outcome: outcome.value, stdout: out.bytes().toString("latin1") }).toEqual({
                outcome: { ended: "exited", code },
                stdout: stdout.toString("latin1"),
              });
            }),
            { runs: 60 },
          );
        } finally {
          connection.client.end();
        }
      },
      { timeout },
    );

    test("any first line names bash or sh, or is refused", () =>
      forAny(
        fc.property(
          fc.oneof(
            harmlessScript,
            fc.string({ unit: "binary" }).map((line) => `#!${line}`),
          ),
          (text) => {
            const asked = attempt(() => interpreterOf(Buffer.from(text), "bash"));
            if ("failure" in asked) expect(expectClear(asked.failure)).toMatch(/^the script is for /);
            else expect(["bash", "sh"]).toContain(asked.value);
          },
        ),
        { runs: 500 },
      ));
  });

  // --- Exit codes ---

  test("as the runner's exit codes, any text gives one from 1 to 255", () =>
    forAny(
      fc.property(exitCodeText, (text) => {
        for (const kind of ["build", "system"] as const) {
          const code = exitCode(kind, { BUILD_FAILURE_EXIT_CODE: text, SYSTEM_FAILURE_EXIT_CODE: text });
          expect(Number.isInteger(code) && code >= 1 && code <= 255).toBe(true);
        }
      }),
      { runs: 500 },
    ));

  test(
    "as a script's end, every exit code and signal reaches the runner's file",
    async () => {
      const { privateKey } = await makeKeyPair("ed25519");
      let ends: { code: number } | { signal: string } = { code: 0 };
      let hostKey = Buffer.alloc(0);
      const made = await makeKeyPair("ed25519");
      const server = new SshServerOfAPacket(
        { hostKeys: [made.privateKey], algorithms: { cipher: ["aes128-gcm@openssh.com"] } },
        (client) =>
          client
            .on("error", () => {})
            .on("authentication", (attempt) => attempt.accept())
            .on("session", (accept) =>
              accept().on("exec", (accept, _, { command }) => {
                const channel = accept();
                const mark = /fargate-[0-9a-f]{32}/.exec(command)?.[0];
                if (mark) channel.write(`${mark} 4242 \n`);
                channel.resume().on("end", () => {
                  channel.write(`${mark} complete\n`);
                  if ("code" in ends) channel.exit(ends.code);
                  else channel.exit(ends.signal, false, "");
                  channel.end();
                });
                if (mark) return;
                channel.exit(0); // a question of the driver's own
                channel.end();
              }),
            ),
      ).listen(0, "127.0.0.1");
      await new Promise((listening) => server.once("listening", listening));
      const key = utils.parseKey(made.privateKey);
      if (!(key instanceof Error) && !Array.isArray(key)) hostKey = Buffer.from(key.getPublicSSH());
      const records = join(directory(), "records");
      fs.mkdirSync(records);
      const { context, record } = stageOf(records, Date.now, (config) => {
        config.SSH.Port = (server.address() as { port: number }).port;
      });
      const [script, codeFile] = [join(records, "script"), join(records, "code")];
      fs.writeFileSync(script, "true");
      writeRecord(record, {
        ...someRecord,
        ContainerIP: "127.0.0.1",
        HostKey: hostKey.toString("base64"),
        PrivateKey: Buffer.from(privateKey).toString("base64"),
        Deadline: 4_000_000_000,
      });
      const endsWith = async (end: typeof ends) => {
        ends = end;
        const env = { BUILD_EXIT_CODE_FILE: codeFile, BUILD_FAILURE_EXIT_CODE: "71" };
        const sinks = { stdout: discard(), stderr: discard() };
        const code = await runStage({ ...context, env, ...sinks }, script, "build_script");
        return [code, fs.existsSync(codeFile) ? fs.readFileSync(codeFile, "utf8") : undefined];
      };
      try {
        expect(await endsWith({ code: 0 })).toEqual([0, undefined]);
        const code = fc.oneof(
          { weight: 4, arbitrary: fc.integer({ min: 1, max: 255 }) },
          { weight: 1, arbitrary: fc.integer({ min: 256, max: 0xffffffff }) },
          { weight: 1, arbitrary: fc.constant(0xffffffff) },
        );
        await forAny(
          fc.asyncProperty(code, async (code) => {
            // 137 would ask ECS for the reason.
            fc.pre(code !== 137);
            expect(await endsWith({ code })).toEqual([71, `${Math.min(code, 255)}`]);
          }),
          { runs: 60 },
        );
        for (const [signal, code] of [
          ["TERM", 143],
          ["SEGV", 139],
          ["HUP", 129],
          ["USR1", 138],
        ] as const)
          expect(await endsWith({ signal })).toEqual([71, `${code}`]);
      } finally {
        server.close();
      }
    },
    timeout,
  );

  // --- The command line and the log ---

  test("as a command line is a request, or a failure that says what is known", () =>
    forAny(
      fc.property(commandLine, (words) => {
        const parsed = attempt(() => parseCommandLine(words));
        if ("failure" in parsed) return void expect(expectClear(parsed.failure)).toMatch(/^fargate.*; known: /s);
        const request = parsed.value as ReturnType<typeof parseCommandLine>;
        expect(["config", "prepare", "run", "cleanup", "sweep"]).toContain(request?.command);
        expect(request?.operands.length).toBe(request?.command === "run" ? 2 : 0);
        expect(typeof request?.config).toBe("string");
      }),
      { runs: 600 },
    ));

  test("in the log is one line without anything that a terminal or a reader would fall for", () =>
    forAny(
      fc.property(
        fc.string({
          unit: fc.oneof(
            fc.constantFrom(
              ...'\n\r\t\u0000\u001b\u007f\u0085\u009b\u061c\u200e\u200f\u2028\u2029\u202a\u202e\u2066\u2069{}"\\',
            ),
            fc.string({ unit: "binary", minLength: 1, maxLength: 1 }),
          ),
        }),
        fc.jsonValue(),
        (text, reason) => {
          for (const format of FORMATS) {
            const line = formatRecord(logRecord(text, { reason, text }), format);
            expect(line.endsWith("\n")).toBe(true);
            expect(line.slice(0, -1)).not.toMatch(UNSAFE);
            if (format === "json") expect(JSON.parse(line)).toMatchObject({ level: "fatal", text });
          }
        },
      ),
      { runs: 1_000 },
    ));
});

describe("the table of faults", () => {
  test(SOAK ? "soak: the README shows what each fault came to" : "the README shows what each fault came to", () => {
    const all = [...faults, ...soaks];
    writeTable(SOAK ? "faults-soak" : "faults", all);
    const { wrong, unknown, absent } = compareWithReadme(all);
    expect(wrong, "rows that the README's table lacks, see dist/").toEqual([]);
    expect(unknown, "rows of the README's table that no test has").toEqual([]);
    expect(absent, "faults that the README's table lacks").toEqual([]);
    if (!SOAK) console.log(`left to npm run soak: ${soaks.join("; ")}`);
  });
});

describe("supply", () => {
  const npmReport = (
    ...found: { name: string; severity: string; range?: string; via?: readonly unknown[] }[]
  ): Record<string, unknown> => ({
    auditReportVersion: 2,
    vulnerabilities: Object.fromEntries(
      found.map(({ name, severity, range = "<2", via }) => [
        name,
        {
          name,
          severity,
          range,
          via: via ?? [{ title: `A hole in ${name}`, url: `https://advisory/${name}`, severity }],
        },
      ]),
    ),
    metadata: {
      vulnerabilities: {
        ...Object.fromEntries(
          ["info", "low", "moderate", "high", "critical"].map((severity) => [
            severity,
            found.filter((one) => one.severity === severity).length,
          ]),
        ),
        total: found.length,
      },
      dependencies: { prod: 38, dev: 281, optional: 77, peer: 0, peerOptional: 0, total: 341 },
    },
  });
  const npmError = (message: string, statusCode?: number) => ({
    message,
    ...(statusCode && { method: "POST", uri: "https://registry/audit", headers: {}, statusCode, body: "" }),
    error: { summary: "", detail: "" },
  });

  test.each<[why: string, answer: unknown, outcome: string, lines: (string | RegExp)[]]>([
    ["nothing", npmReport(), "clean", ["nothing high or critical"]],
    [
      "a moderate finding",
      npmReport({ name: "ssh2", severity: "moderate" }),
      "clean",
      ["moderate: ssh2 <2: A hole in ssh2 (https://advisory/ssh2)", "nothing high or critical"],
    ],
    [
      "a high finding, and what is affected through it",
      npmReport(
        { name: "bowser", severity: "low" },
        { name: "asn1", severity: "high" },
        { name: "ssh2", severity: "high", range: "*", via: ["asn1"] },
      ),
      "found",
      [
        "high: asn1 <2: A hole in asn1 (https://advisory/asn1)",
        "high: ssh2 *: through asn1",
        "low: bowser <2: A hole in bowser (https://advisory/bowser)",
      ],
    ],
    ["a critical finding", npmReport({ name: "asn1", severity: "critical" }), "found", [/^critical: asn1/]],
    [
      "a registry without the endpoint",
      npmError("405 Method Not Allowed - POST https://registry/audit", 405),
      "not checked",
      ["not checked: the registry serves no audit (405 Method Not Allowed)"],
    ],
    ["a registry that cannot now", npmError("503 Service Unavailable - POST x", 503), "not checked", [/503/]],
    [
      "no connection",
      npmError("request to https://registry/audit failed, reason: connect ECONNREFUSED 10.0.0.1:443"),
      "not checked",
      ["not checked: the registry does not answer (ECONNREFUSED)"],
    ],
    [
      "a certificate that is not trusted",
      npmError("request to https://registry/audit failed, reason: self-signed certificate in certificate chain"),
      "not checked",
      ["not checked: the registry does not answer (self-signed certificate in certificate chain)"],
    ],
    [
      "no answer",
      npmError("network timeout at: https://registry/audit"),
      "not checked",
      ["not checked: the registry does not answer (no answer in time)"],
    ],
    [
      "a question the registry does not accept",
      npmError("400 Bad Request - POST x", 400),
      "not understood",
      [/./, /./],
    ],
    ["a page in place of an answer", npmError("invalid json response body at x"), "not understood", [/./, /./]],
    [
      "a lock file npm cannot use",
      { error: { code: "ENOLOCK", summary: "no lock file" } },
      "not understood",
      [/./, /./],
    ],
    ["an empty object", {}, "not understood", [/./, /./]],
    ["another version of the report", { ...npmReport(), auditReportVersion: 3 }, "not understood", [/./, /./]],
    ["an unknown severity", npmReport({ name: "asn1", severity: "severe" }), "not understood", [/./, /./]],
    [
      "a number of findings that the list does not have",
      { ...npmReport(), metadata: npmReport({ name: "asn1", severity: "high" }).metadata },
      "not understood",
      [/number of high findings/, /./],
    ],
    [
      "a report about nothing",
      { ...npmReport(), metadata: { ...(npmReport().metadata as object), dependencies: { prod: 0, total: 0 } } },
      "not understood",
      [/no package/, /./],
    ],
  ])("the audit: %s", (_, answer, outcome, lines) => {
    const verdict = judgeAudit(JSON.stringify(answer));
    expect(verdict.outcome).toBe(outcome);
    expect(verdict.lines).toHaveLength(lines.length);
    for (const [at, line] of lines.entries())
      if (typeof line === "string") expect(verdict.lines[at]).toBe(line);
      else expect(verdict.lines[at]).toMatch(line);
  });

  test("the audit: no JSON is no clean report", () => {
    for (const output of ["", "found 0 vulnerabilities\n", "null", "[]", "0"])
      expect(judgeAudit(output).outcome).toBe("not understood");
  });

  test("the audit: of the development dependencies only the runtime counts", () => {
    const output = JSON.stringify(
      npmReport({ name: "vitest", severity: "critical" }, { name: "bun", severity: "high" }),
    );
    expect(judgeAudit(output, (name) => name === "bun")).toEqual({
      outcome: "found",
      lines: ["high: bun <2: A hole in bun (https://advisory/bun)"],
    });
  });

  /** `npm run audit`, without the installation, against a registry that answers so; nothing for one that is not there. */
  async function auditAt(answer?: { status: number; advisories?: Record<string, object[]> }): Promise<Finished> {
    const requests: string[] = [];
    const registry = createServer((request, response) => {
      requests.push(`${request.method} ${request.url}`);
      request.resume().on("end", () => {
        // npm asks which versions there are of a package that has an advisory.
        const name = decodeURIComponent(request.url?.slice(1) ?? "");
        const version = { name, version: "0.0.1", dist: {} };
        const body = request.method === "GET" ? { name, versions: { "0.0.1": version } } : (answer?.advisories ?? {});
        response.statusCode = answer?.status ?? 500;
        response.setHeader("Content-Type", "application/json");
        response.end(JSON.stringify(body));
      });
    });
    await new Promise<void>((resolve) => registry.listen(0, "127.0.0.1", resolve));
    onTestFinished(() => void registry.close());
    const { port } = registry.address() as { port: number };
    if (!answer) await new Promise((resolve) => registry.close(resolve));
    const env = {
      PATH: pathWithoutBun,
      HOME: directory(),
      // npm keeps what it worked out about an advisory.
      NPM_CONFIG_CACHE: directory(),
      NPM_CONFIG_REGISTRY: `http://127.0.0.1:${port}/`,
      // Offline, npm reports without having asked that nothing was found.
      NPM_CONFIG_OFFLINE: "true",
    };
    const finished = await start([process.execPath, join(projectRoot, ".ci", "audit.ts")], { env }).finished;
    if (answer) expect(requests.filter((request) => request.startsWith("POST "))).toHaveLength(2);
    return finished;
  }
  // `bun --bun` puts itself in node's place, for the programs that are started, too; npm is Node's.
  const pathWithoutBun = (process.env.PATH ?? "")
    .split(":")
    .filter((entry) => !entry.includes("bun-node"))
    .join(":");

  test("npm's own audit: a high finding fails, a registry without an audit passes and says so", async () => {
    const advisory = (severity: string) => ({
      id: 1,
      url: "https://advisory/1",
      title: "Planted",
      severity,
      vulnerable_versions: "<1000",
      cwe: [],
      cvss: { score: 0, vectorString: null },
    });
    const [high, moderate, runtime, absent, away] = await Promise.all([
      auditAt({ status: 200, advisories: { ssh2: [advisory("high")] } }),
      auditAt({ status: 200, advisories: { ssh2: [advisory("moderate")], vitest: [advisory("critical")] } }),
      auditAt({ status: 200, advisories: { bun: [advisory("critical")] } }),
      auditAt({ status: 405 }),
      auditAt(),
    ]);
    expect(high.stdout.toString()).toMatch(/^dependencies: high: ssh2 .*: Planted \(https:\/\/advisory\/1\)$/m);
    expect(high.code).toBe(1);
    expect(moderate.stdout.toString()).toMatch(/^dependencies: moderate: ssh2 .*: Planted/m);
    expect(moderate.code).toBe(0);
    expect(runtime.stdout.toString()).toMatch(/^bun: critical: bun .*: Planted/m);
    expect(runtime.code).toBe(1);
    expect(absent.stdout.toString().match(/not checked: the registry serves no audit \(405 /g)).toHaveLength(2);
    expect(absent.code).toBe(0);
    expect(away.stdout.toString().match(/not checked: the registry does not answer \(ECONNREFUSED\)/g)).toHaveLength(2);
    expect(away.code).toBe(0);
  });

  test("a licence that is not known to be harmless, or has no text, stops the build", () => {
    const made = (name: string, licence: string, texts = ["text"]) => ({ name, version: "1.0.0", licence, texts });
    const fine = [
      made("a", "MIT"),
      made("b", "(GPL-3.0 OR ISC)"),
      made("@c/d", "Apache-2.0"),
      made("@c/e", "Apache-2.0", []),
    ];
    expect(licenceFaults(fine)).toEqual([]);
    for (const licence of [
      "",
      "GPL-3.0-only",
      "LGPL-2.1",
      "MIT AND GPL-2.0",
      "(MIT OR ISC) AND GPL-2.0",
      "SEE LICENSE",
    ])
      expect(licenceFaults([...fine, made("f", licence)])).toEqual([
        expect.stringMatching(/^f 1\.0\.0: its licence, /),
      ]);
    for (const without of [made("f", "MIT", []), made("@c/f", "MIT", []), made("@g/f", "Apache-2.0", [])])
      expect(licenceFaults([...fine, without])).toEqual([`${without.name} 1.0.0: it has no licence text to pass on`]);
    expect(licenceOf({ license: { type: "MIT" } })).toBe("MIT");
    expect(licenceOf({ licenses: [{ type: "MIT" }, { type: "GPL-2.0" }] })).toBe("MIT OR GPL-2.0");
    expect(licenceOf({})).toBe("");
    expect(() => packagesOf(["/etc/passwd"])).toThrow("whose is /etc/passwd");
  });

  test("of the packages that want to run a script when they are installed, only bun's does", () => {
    const read = (...path: string[]) => fs.readFileSync(join(projectRoot, ...path), "utf8");
    const lock = JSON.parse(read("package-lock.json")) as { packages: Record<string, { hasInstallScript?: true }> };
    const wanting = Object.keys(lock.packages).filter((path) => lock.packages[path]?.hasInstallScript);
    expect(wanting).toEqual([
      // Puts its program in its place.
      "node_modules/bun",
      // Native add-ons, which the program must not have: it could only load them from beside it.
      "node_modules/cpu-features",
      // For the tests' containers; it warns about how a package.json states versions, and no more.
      "node_modules/protobufjs",
      // As cpu-features: its own JavaScript does the same.
      "node_modules/ssh2",
    ]);
    expect(read(".npmrc").split("\n")).toContain("ignore-scripts=true");
    const install = read(".ci", "install.mjs");
    expect(install).toContain('"npm", ["ci", "--ignore-scripts", ');
    expect([...install.matchAll(/"node_modules", "([^"]+)", "[^"]*\.[cm]?js"/g)].map(([, name]) => name)).toEqual([
      "bun",
    ]);
    // What the others would have left, and what everything here runs without.
    for (const path of ["ssh2/lib/protocol/crypto/build", "cpu-features/build"])
      expect(fs.existsSync(join(projectRoot, "node_modules", path))).toBe(false);

    const manifest = JSON.parse(read("package.json"));
    for (const script of ["preinstall", "install", "postinstall", "prepare"])
      expect(manifest.scripts).not.toHaveProperty(script);
    for (const version of Object.values({ ...manifest.dependencies, ...manifest.devDependencies }))
      expect(version).toMatch(/^\d+\.\d+\.\d+$/);
  });

  test("SHA256SUMS is as sha256sum reads it", () => {
    const made = directory();
    fs.writeFileSync(join(made, "a"), "a");
    fs.writeFileSync(join(made, "b"), "b");
    writeSums(made, ["a", "b"]);
    const check = () => spawnSync("sha256sum", ["-c", "--strict", "SHA256SUMS"], { cwd: made, encoding: "utf8" });
    expect(check()).toMatchObject({ status: 0, stdout: "a: OK\nb: OK\n" });
    fs.writeFileSync(join(made, "b"), "c");
    expect(check()).toMatchObject({ status: 1, stdout: "a: OK\nb: FAILED\n" });
  });

  test("two builds of one tree, in two directories, give the same bytes", async () => {
    // The other one is deeper, has its packages in it, and is as little as an image build has: no git.
    const other = join(directory(), "another", "place");
    fs.mkdirSync(other, { recursive: true });
    for (const name of [".ci", "LICENSE", "fargate.ts", "package.json", "tsconfig.json"])
      fs.cpSync(join(projectRoot, name), join(other, name), { recursive: true });
    const modules = fs.realpathSync(join(projectRoot, "node_modules"));
    const lock = JSON.parse(fs.readFileSync(join(projectRoot, "package-lock.json"), "utf8")) as {
      packages: Record<string, { dev?: true }>;
    };
    const copied = Object.keys(lock.packages)
      .filter((path) => path.startsWith("node_modules/") && !lock.packages[path]?.dev)
      .map((path) => path.slice("node_modules/".length));
    const licences = ["bun/package.json", "bun-types/package.json", "bun-types/docs/project/license.mdx"];
    for (const path of [...copied, ...licences])
      if (fs.existsSync(join(modules, path)))
        fs.cpSync(join(modules, path), join(other, "node_modules", path), {
          recursive: true,
          // Most of it is types, and the same again as ES modules.
          filter: (from) => !/\/dist-(types|es)$/.test(from),
        });
    fs.mkdirSync(join(other, "dist"));
    fs.writeFileSync(join(other, "dist", "SHA256SUMS"), "of another build\n");

    const version = (await fargate(["--version"], {})).stdout.toString();
    const build = ["sh", "-c", 'umask 077; exec "$@"', "sh", process.execPath, join(other, ".ci", "build.ts")];
    const env = {
      SOURCE_REVISION: /\((.*)\)/.exec(version)?.[1] ?? "",
      HOME: directory(),
      TMPDIR: directory(),
      TZ: "Asia/Tokyo",
    };
    const finished = await start([...build, "--licences"], { env, cwd: "/" }).finished;
    expect({ code: finished.code, stderr: finished.stderr }).toEqual({ code: 0, stderr: "" });
    // Buffers of 120 MB: expect would print them.
    const same = (name: string) =>
      fs.readFileSync(join(other, "dist", name)).equals(fs.readFileSync(join(projectRoot, "dist", name)));
    expect(same("fargate")).toBe(true);
    expect(same("THIRD-PARTY-LICENSES")).toBe(true);
    expect(fs.readdirSync(join(other, "dist")).sort()).toEqual(["THIRD-PARTY-LICENSES", "fargate"]);

    // What is compiled in, and nothing that is only installed.
    const list = finished.stdout.toString();
    for (const line of [
      /^ssh2 +\S+ +MIT$/m,
      /^@aws-sdk\/client-ecs +\S+ +Apache-2\.0$/m,
      /^bun +\S+ +MIT; it links:$/m,
    ])
      expect(list).toMatch(line);
    expect(list).toMatch(/^ {2}JavaScriptCore \(WebKit\): LGPL-2$/m);
    expect(list).not.toMatch(/cpu-features|protobufjs|vitest|typescript/);
    const text = fs.readFileSync(join(other, "dist", "THIRD-PARTY-LICENSES"), "utf8");
    for (const notice of ["Copyright Brian White", "Niels Provos", "LIBRARY GENERAL PUBLIC", "LESSER GENERAL PUBLIC"])
      expect(text).toContain(notice);
  });
});

// ---------------------------------------------------------------------------------------------------------
// 13. Command line
// ---------------------------------------------------------------------------------------------------------

describe("the command line", () => {
  test.each([
    ["custom config", "config", []],
    ["c co", "config", []],
    ["custom prepare", "prepare", []],
    ["c p", "prepare", []],
    ["custom run script stage", "run", ["script", "stage"]],
    ["c r script stage", "run", ["script", "stage"]],
    ["custom cleanup", "cleanup", []],
    ["c cl", "cleanup", []],
  ])("%s", (line, stage, operands) => {
    expect(parseCommandLine(line.split(" "))).toEqual({
      command: stage,
      operands,
      config: "config.toml",
      options: {},
    });
  });

  test("options are taken before and after the commands", () => {
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
      expect(parseCommandLine([...words.slice(0, at), ...options, ...words.slice(at)])).toEqual(expected);
    expect(parseCommandLine(["--debug", "custom", "prepare"])?.options).toEqual({ LogLevel: "debug" });
    expect(parseCommandLine(["custom", "prepare", "--debug", "--log-level", "warn"])?.options).toEqual({
      LogLevel: "debug",
    });
  });

  test("help and version at every level, with no configuration and no job", async () => {
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

  test("config answers with no configuration file and no job", async () => {
    const answer = await fargate(["custom", "config"], { cwd: directory() });
    expect(answer).toMatchObject({ code: 0, stderr: "" });
    expect(answer.stdout.toString()).toMatch(
      /^\{"driver":\{"name":"fargate","version":"\d+\.\d+\.\d+ \(\S+\)"\},"hostname":""\}\n$/,
    );
  });

  test.each([
    ["custom foo", "fargate custom: unknown command 'foo'; known: config, prepare, run, cleanup"],
    ["foo", "fargate: unknown command 'foo'; known: custom, sweep"],
    [
      "custom run a b --colour",
      "fargate custom run: unknown option '--colour'; known: --version, --config, --debug, --log-level, " +
        "--log-format, --log-file, --task-def, --platform-version",
    ],
    [
      "custom run a",
      "fargate custom run: missing required argument 'stage'; known: fargate custom run [options] <script> <stage>",
    ],
    [
      "custom prepare a",
      "fargate custom prepare: too many arguments for 'prepare'. Expected 0 arguments but got 1; known: " +
        "fargate custom prepare [options]",
    ],
  ])("%s: one line that says what is wrong and what is known", async (line, message) => {
    const { code, stdout, stderr } = await fargate(line.split(" "), { env: { SYSTEM_FAILURE_EXIT_CODE: "77" } });
    expect({ code, stdout: stdout.toString() }).toEqual({ code: 77, stdout: "" });
    expect(stderr.replace(/^\S+Z error: /, "")).toBe(`${message}\n`);
  });

  test.each([
    ["", "fargate: no command was given; known: custom, sweep"],
    ["custom", "fargate custom: no command was given; known: config, prepare, run, cleanup"],
  ])("%j alone prints its help to standard error, then what is missing, and fails", async (line, message) => {
    const words = line.split(" ").filter(Boolean);
    const { code, stdout, stderr } = await fargate(words, { env: { SYSTEM_FAILURE_EXIT_CODE: "77" } });
    const help = (await fargate([...words, "--help"])).stdout.toString();
    expect({ code, stdout: stdout.toString() }).toEqual({ code: 77, stdout: "" });
    expect(stderr.startsWith(help)).toBe(true);
    expect(stderr.slice(help.length).replace(/^\S+Z error: /, "")).toBe(`${message}\n`);
  });

  test.each([
    [
      "--log-level loud custom config",
      "fargate: option '--log-level <level>' argument 'loud' is invalid; known: trace, debug, info, warn, warning, " +
        "error, fatal, panic",
    ],
    [
      "custom config --log-format xml",
      "fargate: option '--log-format <format>' argument 'xml' is invalid; known: text, text-simple, json",
    ],
  ])("%j: no success, and one line", async (line, message) => {
    const { code, stdout, stderr } = await fargate(line.split(" ").filter(Boolean));
    expect({ code, stdout: stdout.toString() }).toEqual({ code: 2, stdout: "" });
    expect(stderr.replace(/^\S+Z error: /, "")).toBe(`${message}\n`);
  });

  test("heavy packages are loaded by the stages that need them, not at start", () => {
    const source = fs.readFileSync(join(projectRoot, "fargate.ts"), "utf8");
    const atStart = [...source.matchAll(/^import (?!type )[^;]*? from "([^"]+)"/gm)].map(([, name]) => name as string);
    expect(atStart).toContain("commander");
    for (const name of atStart) expect(name).not.toMatch(/^(@aws-sdk|@smithy|ssh2)/);
  });
});

// ---------------------------------------------------------------------------------------------------------
// Secrets: nothing that a run brings about holds one, and the search for them finds what there is
// ---------------------------------------------------------------------------------------------------------

describe("the search for secrets", () => {
  /** A secret that only one search knows, so that the one over the whole run passes it by. */
  const planted = () => `planted-${randomBytes(18).toString("base64url")}/+ü`;
  /** A search of its own that knows one secret. */
  const searchFor = (secret: string, kind: "job" | "aws" | "key" = "job") => {
    const search = new SecretSearch();
    search.register(secret, "the planted secret", kind);
    return search;
  };
  const whats = (search: SecretSearch) => search.findings.map(({ what }) => what);

  /** A program that is taken for the driver: it writes what STDOUT and STDERR hold. */
  const fakeDriver = () => {
    const path = join(directory(), "dist", "fargate");
    fs.mkdirSync(join(path, ".."));
    fs.writeFileSync(path, `#!/bin/sh\nprintf %s "$STDOUT"\nprintf %s "$STDERR" >&2\n`, { mode: 0o700 });
    return path;
  };
  const time = "2026-01-02T03:04:05Z";

  test.each<[string, (value: string) => string]>([
    ["as it is", (value) => value],
    ["in JSON", (value) => JSON.stringify({ x: JSON.stringify(value) })],
    ["in an address", (value) => `https://x:${encodeURIComponent(value)}@example.test`],
    ["in hex", (value) => Buffer.from(value).toString("hex")],
    ...[0, 1, 2, 3].flatMap((before): [string, (value: string) => string][] => [
      [
        `in base64, after ${before} bytes`,
        (value) => Buffer.from(`${"x".repeat(before)}${value}${"y".repeat(before)}`).toString("base64"),
      ],
      [
        `in base64url, after ${before} bytes`,
        (value) => Buffer.from(`${"x".repeat(before)}${value}`).toString("base64url"),
      ],
    ]),
  ])("finds it %s", (_, write) => {
    const secret = planted();
    const search = searchFor(secret);
    search.look("a text", `before ${write(secret)} after`);
    expect(search.findings).toMatchObject([{ what: "the planted secret", place: "a text" }]);
    const other = searchFor(planted());
    other.look("a text", `before ${write(secret)} after`);
    expect(other.findings).toEqual([]);
  });

  test.each(["ed25519", "rsa"] as const)(
    "finds an %s key that it does not know, wherever one is written",
    async (type) => {
      const { privateKey, publicKey } = await makeKeyPair(type);
      const base64 = Buffer.from(privateKey).toString("base64");
      const record = JSON.stringify({ ...someRecord, PrivateKey: base64 });
      const other = JSON.stringify(privateKey);
      const found = [privateKey, base64, record, Buffer.from(record).toString("base64"), other].map((text) => {
        const search = new SecretSearch();
        search.look("a text", text);
        return search.findings.length > 0;
      });
      expect(found).toEqual([true, true, true, true, true]);
      const search = new SecretSearch();
      search.registerKey(privateKey);
      for (const text of [publicKey, JSON.stringify(publicKey), Buffer.from(publicKey).toString("base64")])
        search.look("a text", text);
      expect(search.findings).toEqual([]);
      search.look("a text", privateKey.split("\n").slice(2).join("\n").replace(/^-.*/m, ""));
      expect(whats(search)).toEqual(["the operator's private key"]);
    },
  );

  test("finds a key in a debug line of a process, which the test does not see", async () => {
    const search = new SecretSearch();
    const { privateKey } = await makeKeyPair("ed25519");
    const STDERR = `no end${time} debug: the key is ${privateKey.replaceAll("\n", " | ")}\n, and on`;
    const { stderr } = await start([fakeDriver(), "custom", "prepare"], { env: { STDERR }, search }).finished;
    expect(stderr).toBe("no end, and on");
    expect(search.counts).toMatchObject({ drivers: 1, debugLines: 1 });
    expect(new Set(whats(search))).toEqual(new Set(["a private key"]));
  });

  test("finds a token on both streams of a process, in a log record and in an error", async () => {
    const secret = planted();
    for (const stream of ["STDOUT", "STDERR"]) {
      const search = searchFor(secret);
      await start([fakeDriver(), "custom", "cleanup"], { env: { [stream]: `x${secret}x` }, search }).finished;
      expect(search.findings).toMatchObject([{ place: expect.stringMatching(/^standard (output|error) of .*custom/) }]);
    }
    const search = searchFor(secret);
    search.logRecord(`{"msg":"${secret}"}`);
    search.error("prepare", new Failure("system", `x: ${Buffer.from(secret).toString("base64")}`));
    expect(search.findings.map(({ place }) => place)).toEqual(["a log record", "an error of prepare"]);
  });

  test("finds what is in requests and in a container's environment, and words of an author's", async () => {
    const secret = planted();
    const search = searchFor(secret);
    const world = await makeWorld({ embedded: true, search });
    try {
      world.configure({ Fargate: { Tags: { team: "ci" } } });
      const { aws } = world;
      const { AWS_ACCESS_KEY_ID = "", AWS_SECRET_ACCESS_KEY = "", AWS_SESSION_TOKEN } = aws.environment;
      const driversKey = {
        accessKeyId: AWS_ACCESS_KEY_ID,
        secretAccessKey: AWS_SECRET_ACCESS_KEY,
        sessionToken: AWS_SESSION_TOKEN,
      };
      search.register(AWS_SECRET_ACCESS_KEY, "AWS's secret", "aws");
      search.register(AWS_SESSION_TOKEN ?? "", "AWS's token", "aws");
      const client = (credentials = driversKey) =>
        new ECSClient({ region: "us-east-2", endpoint: aws.url, credentials, maxAttempts: 1 });
      const { publicKey } = await makeKeyPair("ed25519");
      const input = (environment: Record<string, string>): RunTaskCommandInput => ({
        cluster: "test-cluster",
        taskDefinition: "test-task",
        networkConfiguration: { awsvpcConfiguration: { subnets: ["subnet-1"], securityGroups: ["sg-1"] } },
        overrides: {
          containerOverrides: [
            {
              name: "ci-coordinator",
              environment: Object.entries(environment).map(([name, value]) => ({ name, value })),
            },
          ],
        },
        startedBy: someRecord.StartedBy,
        clientToken: "01234567-89ab-cdef-0123-456789abcdef",
        tags: [{ key: "team", value: "ci" }],
      });
      const right = { SSH_PUBLIC_KEY: publicKey, FARGATE_DEADLINE: "1767225600" };
      const { tasks } = await client().send(new RunTaskCommand(input({ SSH_PUBLIC_KEY: publicKey })));
      const [task] = tasks?.map(({ taskArn }) => taskArn) ?? [];
      await aws.waitFor(() => search.counts.containers === 1);
      search.call("RunTask", input(right), [tagsOf([{ key: "team", value: "ci" }])]);
      for (const reason of ["job 1 of project 2", "job 0123456789ab", "fargate sweep: it is past its deadline"])
        await client().send(new StopTaskCommand({ cluster: "test-cluster", task, reason }));
      expect(search.findings).toEqual([]);
      expect(search.counts).toMatchObject({ requests: 5, containers: 1 });

      // A call under another key is not the driver's.
      const stranger = client({ ...driversKey, accessKeyId: "test" });
      await stranger.send(new StopTaskCommand({ cluster: "test-cluster", task, reason: "my own words" }));
      expect(search.counts.requests).toBe(5);
      const reasons = ["job x of project 2", "job unit tests", "fargate sweep: main", "job 1 of project 2, by ada"];
      for (const [n, reason] of reasons.entries()) {
        await client().send(new StopTaskCommand({ cluster: "test-cluster", task, reason }));
        expect(search.findings.splice(0), `${n}: ${reason}`).toEqual([
          { what: "a reason that is none of the driver's own words", place: "StopTask", excerpt: reason },
        ]);
      }
      await client().send(
        new RunTaskCommand({
          ...input({ SSH_PUBLIC_KEY: publicKey, FARGATE_DEADLINE: "soon", CI_JOB_TOKEN: secret }),
          startedBy: "main",
          clientToken: "one",
          tags: [{ key: "branch", value: "main" }],
        }),
      );
      await aws.waitFor(() => search.counts.containers === 2);
      expect(search.findings.map(({ what, place }) => `${place}: ${what}`).sort()).toEqual(
        [
          "RunTask: FARGATE_DEADLINE that is none of the driver's own words",
          "RunTask: a clientToken that is none of the driver's own words",
          "RunTask: a container's variable that is none of the driver's own words",
          "RunTask: a startedBy that is none of the driver's own words",
          "RunTask: a tag that is none of the driver's own words",
          "a container's environment, CI_JOB_TOKEN: the planted secret",
          "the body of RunTask: the planted secret",
          "the input of RunTask: the planted secret",
        ].sort(),
      );
    } finally {
      await world.close();
    }
  });

  test("finds what is on a command line, and in the environment of the shell that reads a script", async ({ skip }) => {
    if (process.platform !== "linux") skip("there is no /proc");
    const [argument, variable] = [planted(), planted()];
    const search = searchFor(argument);
    search.register(variable, "the other secret", "job");
    const shell = spawn("bash", ["-c", remoteProgram("fargate-0123"), "bash", argument], {
      env: { ...process.env, TOKEN: variable },
      stdio: ["pipe", "ignore", "ignore"],
    });
    try {
      await new Promise((spawned) => shell.once("spawn", spawned));
      const seen = () => {
        search.sampleProcesses();
        return new Set(search.findings.map(({ what, place }) => `${what}: ${place.replace(/\d+.*/s, "n")}`));
      };
      const right = [
        "the planted secret: the command line of process n",
        "the other secret: the environment of process n",
      ];
      await expect.poll(seen, { timeout: 30_000 }).toEqual(new Set(right));
      expect(search.counts.commandLines).toBeGreaterThan(1);
    } finally {
      shell.kill("SIGKILL");
    }
  });

  taskTest(
    "finds what is in the environment of a container",
    async () => {
      const secret = planted();
      const search = searchFor(secret);
      const { publicKey } = await makeKeyPair("ed25519");
      const address = `127.79.${(process.pid >> 8) & 255}.${(directories++ % 250) + 1}`;
      const environment = { SSH_PUBLIC_KEY: publicKey, CI_JOB_TOKEN: secret };
      const host = await hosts.start({ name: "planted", address, port: 2222, environment });
      try {
        const seen = () => {
          search.sampleProcesses();
          return search.findings.map(({ place }) => place.replace(/\d+/, "n")).join("\n");
        };
        await expect.poll(seen, { timeout: 30_000 }).toMatch(/^the environment of process n: .*(sshd|entrypoint)/m);
      } finally {
        await host.stop(0);
      }
    },
    { containerOnly: true },
  );

  test("finds what is in files where it may not be, and in no others", async () => {
    const secrets = { job: planted(), aws: planted() };
    const search = searchFor(secrets.job);
    search.register(secrets.aws, "AWS's secret", "aws");
    const { privateKey } = await makeKeyPair("ed25519");
    const where = directory();
    const put = (name: string, text: string, mode = 0o600) => {
      const path = join(where, name);
      fs.mkdirSync(join(path, ".."), { recursive: true });
      fs.writeFileSync(path, text, { mode });
      return path;
    };
    const stem = `label-${"0123456789abcdef".repeat(4)}`;
    const record = JSON.stringify({ ...someRecord, PrivateKey: Buffer.from(privateKey).toString("base64") });
    try {
      put("response.json", secrets.job);
      put(`records/${stem}.json`, record);
      put(`records/${stem}.json.0123456789ab.tmp`, record);
      search.ownFile(put("script/script.", secrets.job));
      search.ownKey(put("operator.pem", privateKey));
      const end = search.directory(where);
      search.recordsOf(join(where, "records"));
      search.sampleRecords();
      end();
      expect(search.findings).toEqual([]);
      expect(search.counts).toMatchObject({ files: 7, records: 4 });

      const wrong = [
        put("build_exit_code", secrets.job),
        put("other/script.", secrets.job),
        put(`records/${stem}.json.bak`, record),
        put(`other/${stem}.json`, record, 0o640),
        put(`records/${stem.replace("0", "f")}.json`, secrets.aws),
        put("aws/response.json", secrets.aws),
        put("fargate.log", `${time} ${privateKey}`),
      ];
      search.files(where);
      const paths = new Set(search.findings.map(({ place }) => place.replace(/, mode \d+$/, "")));
      expect([...paths].sort()).toEqual(wrong.sort());
    } finally {
      fs.rmSync(where, { recursive: true }); // the search over the whole run would find the key
    }
  });

  test("debug lines are taken out wherever a stream is cut into chunks, and nothing else is", () => {
    const debug = {
      text: `${time} debug: a {"b"} c`,
      "text-simple": "debug: a",
      json: `{"time":"${time}","level":"debug","msg":"a","x":1}`,
    };
    const pieces = [
      "2",
      "2026-01-02",
      `${time} `,
      `${time} debug`,
      "{",
      '{"time":"',
      "debug",
      "d",
      "\n",
      `${time} x\n`,
    ];
    for (const format of Object.keys(debug) as LogFormat[])
      fc.assert(
        fc.property(
          fc.array(fc.oneof(fc.constantFrom(...pieces), fc.string(), fc.constant(debug))),
          fc.infiniteStream(fc.integer({ min: 1, max: 40 })),
          (parts, sizes) => {
            const filter = new DebugFilter(format);
            let [whole, own] = ["", ""];
            let lines = 0;
            for (const part of parts) {
              // Where that format's debug lines are told by the beginning of a line, they stand at one.
              const line = typeof part !== "string" && (format !== "text-simple" || /(^|\n)$/.test(own));
              whole += line ? `${debug[format]}\n` : typeof part === "string" ? part : "";
              if (line) lines++;
              else if (typeof part === "string") own += part;
            }
            // A script that writes what looks like a debug line is another matter.
            const looksLike = { text: /Z debug: /, "text-simple": /^debug: /m, json: /"level":"debug",/ }[format];
            if (looksLike.test(own)) return;
            const bytes = Buffer.from(whole);
            const out: Buffer[] = [];
            for (let at = 0; at < bytes.length; ) {
              const size = sizes.next().value as number;
              out.push(filter.push(bytes.subarray(at, at + size)));
              at += size;
            }
            expect(Buffer.concat([...out, filter.held]).toString()).toBe(own);
            expect(filter.lines).toBe(lines);
          },
        ),
        { numRuns: 1_000 },
      );
  });

  test("what is no beginning of a debug line is not held back", () => {
    for (const text of ["running", "x\n", `${time} Ready`, `${time} warning: debug: x`, "{}", "20 26\n"]) {
      const filter = new DebugFilter("text");
      expect(filter.push(Buffer.from(text)).toString()).toBe(text);
    }
  });

  test("a level that a test asks for is left alone", () => {
    const where = directory();
    const config = (name: string, text: string) => {
      fs.writeFileSync(join(where, name), text);
      return join(where, name);
    };
    const info = config("info.toml", 'LogLevel = "info"\nLogFormat = "json"\n');
    const warn = config("warn.toml", 'loglevel = "warn"\n');
    const search = new SecretSearch();
    const options = (...args: string[]) => {
      const { command, hides } = atDebug(["nice", driver, ...args], where, search);
      return [command.slice(0, 2).join(" ") === `nice ${driver}`, command.slice(2, 4).join(" "), hides];
    };
    expect(options("--config", info)).toEqual([true, "--log-level debug", "json"]);
    expect(options("--config=info.toml", "--log-format=text")).toEqual([true, "--log-level debug", "text"]);
    expect(options("custom", "config")).toEqual([true, "--log-level debug", "text"]);
    expect(options("--config", warn)).toEqual([true, `--config ${warn}`, undefined]);
    expect(options("--log-level=error", "custom")).toEqual([true, "--log-level=error custom", undefined]);
    expect(options("custom", "--debug")).toEqual([true, "custom --debug", undefined]);
    expect(atDebug(["sh", "-c", "true"], where, search)).toEqual({ command: ["sh", "-c", "true"], isDriver: false });
  });
});

describe("secrets over the whole run", () => {
  const name = "no log, error text, request, container environment, process list or file of this run held a secret";
  test(SOAK ? `soak: ${name}` : name, ({ task }) => {
    const dist = join(projectRoot, "dist");
    for (const table of fs.readdirSync(dist).filter((file) => file.endsWith(".md")))
      wholeRun.look(table, fs.readFileSync(join(dist, table)));
    endSearch();
    console.log(`searched for secrets: ${wholeRun.report}`);
    expect(wholeRun.findings).toEqual([]);
    type Task = (typeof task.file.tasks)[number];
    const testsOf = (of: readonly Task[]): Task[] => of.flatMap((one) => ("tasks" in one ? testsOf(one.tasks) : [one]));
    const selected = ({ mode, result }: Task) => mode !== "skip" || result !== undefined;
    const meant = testsOf(task.file.tasks).filter((one) => one.name.startsWith("soak: ") === SOAK);
    // Of a run of some tests nothing can be said but that.
    if (!meant.every(selected)) return console.log("only some tests were selected");
    const { logRecords, errors, processSamples, commandLines, environments, ...always } = wholeRun.counts;
    const inside = SOAK ? {} : { logRecords, errors }; // a soak runs the compiled program alone
    const processes = process.platform === "linux" ? { processSamples, commandLines, environments } : {};
    for (const [what, count] of Object.entries({ ...always, ...inside, ...processes }))
      expect(count, what).toBeGreaterThan(SOAK || what === "environments" ? 10 : 50);
  });
});
