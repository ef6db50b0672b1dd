#!/usr/bin/env -S bun --no-env-file --config=/dev/null --use-system-ca
/**
 * fargate: runs each GitLab CI job in its own AWS ECS task on Fargate.
 *
 * GitLab Runner's Custom executor starts this program once per stage of a job. The other commands are for
 * operators; a timer also runs sweep, and a container runs manager.
 *
 *     fargate custom config                prints the driver's name and version, as JSON
 *     fargate custom prepare               starts the job's task and waits until an SSH login works
 *     fargate custom run SCRIPT STAGE      runs one script in the task; many times per job
 *     fargate custom cleanup               stops the task
 *     fargate init                         writes a configuration file with every setting
 *     fargate doctor                       checks the installation; with --run, starts and stops a task
 *     fargate tasks                        shows the running tasks
 *     fargate shell JOB [-- COMMAND]       logs in to a running job's task, or runs a command there
 *     fargate sweep                        stops orphaned tasks: those that their jobs did not stop
 *     fargate runners                      registers many runners, and writes GitLab Runner's configuration
 *     fargate manager -- ARGUMENTS         runs gitlab-runner: does what runners does at its start, sweeps
 *                                          regularly, and unregisters the runners at its end
 *
 * AWS calls      RunTask, DescribeTasks and StopTask; ListTasks for sweep, and if a task may exist that no
 *                record names; EC2's DescribeNetworkInterfaces, only to connect to public addresses. For
 *                image: and services:, if JobImage allows them, DescribeTaskDefinition and
 *                RegisterTaskDefinition; then sweep also calls ListTaskDefinitions, DescribeTaskDefinition
 *                and DeregisterTaskDefinition. doctor asks STS (GetCallerIdentity), IAM (GetRole,
 *                SimulatePrincipalPolicy), ECS (also DescribeClusters, DescribeTaskDefinition) and EC2
 *                (DescribeSubnets, DescribeSecurityGroups, DescribeRouteTables, DescribeVpcEndpoints,
 *                DescribeNetworkInterfaces); it calls StopTask with the id of no task.
 * Other calls    In an ECS task: ECS_CONTAINER_METADATA_URI_V4, for the task's own id. Only runners and
 *                manager call GitLab, at GITLAB_URL/api/v4/runners: POST (register), POST verify, DELETE.
 * Files read     the configuration file, JOB_RESPONSE_FILE, the stage's script, PrivateKeyPath,
 *                AWS_CA_BUNDLE, the AWS SDK's own files (such as ~/.aws/config), the runner's config.toml
 *                (two time limits), and /proc (to recognize live processes). By runners and manager: the
 *                lists of managers and of tokens, all of config.toml, CA_CERTIFICATES_PATH. By doctor: all
 *                of config.toml, and the files of cron and systemd (to find what starts sweep).
 * Files written  in TaskMetadata.Directory: <job>.json (the record, mode 0600, one per running job),
 *                <job>.*.lock (empty, one per prepare or run), .manager-id, on ECS .manager-task, with
 *                JobImage .definition-<hash> (the ARN of a task definition), .definition-<hash>.lock and
 *                .definition-dates, and short-lived *.tmp files; BUILD_EXIT_CODE_FILE; LogFile. By runners
 *                and manager: config.toml (mode 0600), and beside it fargate-<manager>.toml,
 *                .runner_system_id, .fargate-runners.pending, runners-*.lock and *.tmp.
 *                In the task of a job with image: or services:, also /.fargate and /etc/hosts.
 * Programs       manager starts gitlab-runner; doctor starts gitlab-runner --version; shell starts stty;
 *                the AWS SDK starts a credential_process of its own files.
 * Secrets        The job's private key: in memory and in the record. AWS credentials: in the memory of the
 *                AWS SDK, never written, never sent to a task. Stage scripts contain the job's secrets: they
 *                go through memory into SSH, for image: on through pipes within the task, and are never
 *                parsed, logged or stored. Variables of a job with services: secret ones are not sent to
 *                ECS, unless SecretsInServices allows it. Runner tokens: runners and manager send them to
 *                GitLab and write them to config.toml, nowhere else; gitlab-runner and the stages of jobs do
 *                not get the variables that contain them.
 * Trusted        The configuration file, the runner, the ids in its JOB_RESPONSE_FILE (not the job author's
 *                text), ECS, and GitLab at GITLAB_URL.
 * Not trusted    CUSTOM_ENV_* variables, the image, services and variables in JOB_RESPONSE_FILE, and
 *                everything that a job's containers send.
 *
 * Contents
 *     1. Header              this comment and the imports
 *     2. Failures            the error type, exit codes, what to do about each problem
 *     3. Configuration       every setting, and where its value comes from
 *     4. Logging             the one logger
 *     5. The job             a job's identity, and the context that commands work with
 *     6. Task record         the state that one stage leaves on disk for the next
 *     7. Keys                the SSH key pair of a job
 *     8. ECS                 requests to AWS, and the meaning of its answers
 *     9. SSH                 logging in; running and terminating scripts
 *    10. Stages              config, prepare, run, cleanup
 *    11. Operator commands   sweep, init, tasks, shell, doctor, runners, manager
 *    12. Job image           `image:` and `services:`, by derived task definitions
 *    13. Command line        arguments, exit codes, signals
 *
 * The sections follow the life of a job. None depends on a later one, except that sections 10 and 11 call
 * section 12: each stage, and sweep, in one place.
 */

import * as fs from "node:fs";
import type { Socket } from "node:net";
import { networkInterfaces as hostInterfaces, hostname, constants as osConstants, uptime } from "node:os";
import { basename, dirname, join, resolve } from "node:path";
import type { Readable } from "node:stream";
import { setTimeout as delay } from "node:timers/promises";
import type {
  EC2,
  IpPermission,
  NetworkInterface,
  RouteTable,
  RouteTableAssociation,
  SecurityGroup,
  Subnet,
  VpcEndpoint,
} from "@aws-sdk/client-ec2";
import type {
  Cluster,
  Container,
  ContainerDefinition,
  ContainerOverride,
  ECS,
  HealthCheck,
  MountPoint,
  RegisterTaskDefinitionCommandInput,
  RunTaskCommandInput,
  Task,
  TaskDefinition,
} from "@aws-sdk/client-ecs";
import type { EvaluationResult, IAM } from "@aws-sdk/client-iam";
import type { Command } from "commander";
import { distance } from "fastest-levenshtein";
import { parse as parseToml, TomlError } from "smol-toml";
import type { Client, ClientChannel, ConnectConfig } from "ssh2";
import * as v from "valibot";

declare const BUILD: string | undefined; // set by the build: version (commit)
const VERSION = typeof BUILD === "string" ? BUILD : "dev (HEAD)";
type Environment = Readonly<Record<string, string | undefined>>;

// 2. Failures -------------------------------------------------------------------------------------------
// Every error that ends a stage becomes a Failure, which states whose fault it is and has typed fields for
// decisions. Uses no other section. Must not derive a decision from the text of a message; only `recognize`,
// in section 8, reads AWS's texts, which have no codes.

/** Control, format and private-use characters, line ends and lone surrogates. */
const UNPRINTABLE = /[\p{Cc}\p{Cf}\p{Co}\p{Cs}\p{Zl}\p{Zp}]/gu;
const escaped = (character: string) =>
  character.replace(/[\s\S]/g, (unit) => `\\u${unit.charCodeAt(0).toString(16).padStart(4, "0")}`);
const MAX_TEXT_LENGTH = 4_000; // characters

/** Escapes and shortens text from outside, so that it cannot forge a log line or control a terminal. */
function printable(value: unknown): string {
  const text = String(value);
  const line = text.slice(0, MAX_TEXT_LENGTH).replaceAll("\n", " | ").replace(UNPRINTABLE, escaped);
  return text.length > MAX_TEXT_LENGTH ? `${line}...` : line;
}

/** The part of a failure that decisions depend on. Set where the failure is first seen. */
interface Cause {
  readonly problem?: Problem | undefined; // selects the advice
  readonly subject?: string | undefined; // the IAM action that AWS names, for the advice
  readonly operation?: string; // the call that failed, such as ecs:RunTask; STOPPED if the task itself ended
  readonly error?: string; // AWS's name for the error
  readonly isRetryable?: boolean; // the same call may succeed if it is repeated
  readonly mayHaveStarted?: boolean; // RunTask may have started a task although it failed
  readonly containers?: readonly string[]; // the containers whose reasons show the problem
}

/**
 * An error that ends a stage. `build`: the job is at fault, and the runner does not retry it. `system`: the
 * driver, its configuration or AWS is at fault.
 */
class Failure extends Error {
  override name = "Failure";
  constructor(
    readonly kind: "build" | "system",
    message: string,
    override readonly cause: Cause = {},
    details: readonly string[] = [], // each is printed on its own line
  ) {
    super([message, ...details].map(printable).join("\n  "));
  }
}

/** The exit code that GitLab Runner expects for this kind of failure; 1 or 2 if it names none. */
function exitCode(kind: Failure["kind"], env: Environment): number {
  const code = Number(kind === "build" ? env.BUILD_FAILURE_EXIT_CODE : env.SYSTEM_FAILURE_EXIT_CODE);
  if (Number.isInteger(code) && code > 0 && code < 256) return code;
  return kind === "build" ? 1 : 2;
}

/** The message of anything that can be thrown. */
function reasonOf(error: unknown): string {
  if (!(error instanceof Error)) return String(error);
  return error.message || ("code" in error && typeof error.code === "string" ? error.code : error.name);
}

// What to do about each problem that the driver recognizes. $1 stands for the IAM action that AWS names. The
// texts are only printed. Decisions depend on a problem's name and group.

/** Transient: another start may succeed later, in another subnet or with other capacity. */
const TRANSIENT = {
  throttled: "start fewer tasks at once, or ask AWS for higher API rates",
  provisioning: "lower the runner's limit: too many tasks wait for capacity in this cluster",
  capacity: "wait, list Subnets in several zones, or set FallbackCapacityProviderStrategy",
  quota: "lower the runner's limit, or ask AWS for a higher Fargate quota",
  instances: "add instances to the cluster, or lower the runner's limit",
  addresses: "use Subnets with more free addresses",
  interfaces: "ask AWS for more network interfaces in this region",
  awsFault: "if it happens again, ask AWS support",
  spot: "run the job again; on-demand capacity has no Spot interruptions",
  host: "run the job again: AWS retired the task's host",
};

/** The task definition is at fault. */
const DEFINITION_FAULTS = {
  definition: "name a task definition that is active in this region",
  incompatible: "make the task definition compatible with LaunchType or the capacity provider",
  networkMode: "set networkMode to awsvpc in the task definition",
  container: "name its container ci-coordinator and give it no secret SSH_PUBLIC_KEY, or set PrivateKeyPath",
  secret: "name its container ci-coordinator and give it no secret SSH_PUBLIC_KEY, or set PrivateKeyPath",
  taskRole: "give the task definition a taskRoleArn, or set EnableExecuteCommand = false",
  placement: "add instances that match the task definition's requirements",
};

/** The platform version is at fault. */
const PLATFORM_FAULTS = {
  platform: "set PlatformVersion to one that AWS lists and the task definition supports, or to LATEST",
  fargateOnly: "remove PlatformVersion: only Fargate tasks have one",
};

const ADVICE = {
  ...TRANSIENT,
  ...DEFINITION_FAULTS,
  ...PLATFORM_FAULTS,
  // The runner's host and its way to AWS.
  disk: "the runner's user must be able to write there, and the disk must have free space",
  credentials:
    "give the runner's host a role (in a container on EC2, with hop limit 2), or set AWS_* to a valid key",
  profile: "check AWS_PROFILE and credential_process, and that the runner's user can read and run them",
  clock: "correct the clock of the runner's host",
  unreachable:
    "the runner's host must reach AWS in Region: by a NAT gateway, a VPC endpoint for ECS, or HTTPS_PROXY",
  certificate: "set AWS_CA_BUNDLE to the certificate authority of your proxy or endpoint",
  proxy: "check HTTPS_PROXY (address, user name, password), and which hosts that proxy allows",
  accessDenied: "allow $1 in the IAM policy of the runner's host",
  account: "ask AWS support to enable ECS and Fargate for this account and region",
  // Settings.
  noSettings: "name the driver's file with --config; fargate init writes a new one",
  cluster: "check Cluster and Region in the configuration file",
  network: "check Subnet, SecurityGroup and Region: all must belong to one VPC",
  publicIp: "set EnablePublicIP = false: only Fargate tasks have public addresses",
  location: "add instances in the zones of Subnets",
  unsupported: "use a region that supports the task definition's features, or another task definition",
  launchType: 'set LaunchType = "FARGATE", or give the cluster a default capacity provider strategy',
  capacityProvider: "add it to the cluster: aws ecs put-cluster-capacity-providers",
  taskSize: "make the task smaller, or ask AWS for a higher Fargate quota",
  assumeRole: "let ecs-tasks.amazonaws.com assume the definition's roles; a new role takes a minute",
  linkedRole: "create it: aws iam create-service-linked-role --aws-service-name ecs.amazonaws.com",
  // Tasks that do not start.
  executionRole: "allow $1 to the task definition's execution role",
  route:
    "check secrets, logging, and the subnet's route to ECR, S3, Secrets Manager, CloudWatch (NAT, endpoints)",
  missing: "create the secret, parameter, file or log group that the task definition names",
  efsName: "give EFS a mount target in each zone of Subnets, and let the VPC resolve DNS host names",
  efsPort: "allow port 2049 from the task's security group to the EFS mount targets",
  efsAccess: "allow elasticfilesystem:ClientMount to the task role, and check the volume's directory",
  volume: "check the task definition's volumes, and the disk space of the instance",
  pullRate: "copy the image to ECR, or set repositoryCredentials in the task definition",
  pullSpace: "give the task definition more ephemeralStorage",
  architecture: "build the image for the task definition's cpuArchitecture, or change the latter",
  pull: "check the image's name, the execution role, and the subnet's route to the registry (NAT, endpoints)",
  command: "check command and entry point, in the image and in the task definition, and the task's memory",
  // Tasks that stop.
  memory: "give the task definition more memory, or let the job do less at once",
  exited: "read the container's log: its SSH server must run until the task is stopped",
  unhealthy: "correct the health check of ci-coordinator, or give it a longer startPeriod",
  noHealth: "give ci-coordinator a healthCheck in the task definition, or set WaitForHealthy = false",
  ownStop: "the driver itself stopped the task: see GitLab Runner's log, and the log of fargate sweep",
  userStop: "look in CloudTrail for who called StopTask",
  noTask: "look for the task in the ECS console",
  // Operator commands.
  runnerUser: "run this as the user that runs GitLab Runner, such as: sudo -u gitlab-runner fargate ...",
  newFile: "name another file with --config, or remove that one",
  jobId: "fargate tasks shows the ids of running jobs",
  noTerminal: "add a command: fargate shell JOB -- COMMAND",
  // Logins.
  noShell: "install bash or sh in the image",
  loginShell:
    "give Username a login shell such as bash, not nologin or false; its start-up files must not call exit",
  startUpFile: "make the start-up files of Username, such as ~/.bashrc, return instead of exit",
  key: 'the image must install SSH_PUBLIC_KEY for Username; KeyType = "ed25519" works with any OpenSSH',
  publicAddress: "set EnablePublicIP, and give the subnet a route to an internet gateway",
  connection: "the task is still running: check whether the job stopped sshd, and the task's load and memory",
  refused: "the image must start an SSH server on Port",
  algorithms: "the SSH server must offer curve25519 or ECDH, and AES, as OpenSSH does",
  noServer: "Port must belong to an SSH server that accepts connections from this host",
  silent: "let the task's security group accept Port from the runner's host; check routes",
  hostKey: "nothing was sent; find out what answers at that address in place of the task",
};
type Problem = keyof typeof ADVICE;

/**
 * What to do about a failure; undefined if the driver does not know.
 * @example adviceFor({ problem: "accessDenied", subject: "ecs:RunTask" })
 * // "allow ecs:RunTask in the IAM policy of the runner's host"
 */
const adviceFor = ({ problem, subject }: Cause): string | undefined =>
  problem && ADVICE[problem].replace("$1", subject ?? "this action");
const causeOf = (error: unknown): Cause => (error instanceof Failure ? error.cause : {});

/** Rethrows an error of `action` as a Failure prefixed with `what`. `problem`: set for errno errors. */
function withContext<T>(what: string, action: () => T, problem?: Problem): T {
  try {
    return action();
  } catch (error) {
    const isSystemError = (error as NodeJS.ErrnoException).code !== undefined;
    const cause = { problem: isSystemError ? problem : undefined, ...causeOf(error) };
    throw new Failure("system", `${what}: ${reasonOf(error)}`, cause);
  }
}

/** Reads a file. `what`: its name in errors; `problem`: set if it is missing. @throws {Failure} */
function readFile(path: string, what: string, problem?: Problem): Buffer {
  try {
    return fs.readFileSync(path);
  } catch (error) {
    const isMissing = (error as NodeJS.ErrnoException).code === "ENOENT";
    const text = isMissing ? "does not exist" : `cannot be read: ${reasonOf(error)}`;
    throw new Failure("system", `${what} ${text}`, { problem: isMissing ? problem : undefined });
  }
}

// 3. Configuration --------------------------------------------------------------------------------------
// One schema has every setting with its default, unit and meaning. readConfig merges the file, the job's
// variables and the command line's options. Uses failures. Must not read a file or process.env: it gets their
// contents as arguments.

const LEVELS = ["trace", "debug", "info", "warn", "warning", "error", "fatal", "panic"] as const;
const FORMATS = ["text", "text-simple", "json"] as const;

// Descriptions state a setting's meaning and valid values, for error messages and docs/settings.md.
const text = (meaning: string) => v.pipe(v.string(), v.trim(), v.nonEmpty(), v.description(meaning));
const whole = (min: number, max: number, what: string) => {
  const meaning = `${what}, a whole number from ${min} to ${max}`;
  return v.pipe(v.number(), v.integer(), v.minValue(min), v.maxValue(max), v.description(meaning));
};
const exactly = <const T extends readonly string[]>(words: T, meaning: string) =>
  v.pipe(v.picklist(words), v.description(`${meaning}: ${words.join(", ")}`));
const oneOf = <const T extends readonly string[]>(words: T, meaning: string) =>
  v.pipe(v.string(), v.trim(), v.toLowerCase(), exactly(words, meaning)); // ignores case
const listOf = (max: number, item: string, items: string) =>
  v.pipe(
    v.array(text(item)),
    v.minLength(1),
    v.maxLength(max),
    v.description(`a list of 1 to ${max} ${items}`),
  );
const PATTERN = "family or family:revision, with up to three * that match anything but : and /";
const pattern = v.pipe(
  v.string(),
  v.trim(),
  v.regex(/^(?!(.*\*){4})[\w*-]+(:[\d*]+)?$/),
  v.description(PATTERN),
);
const listOfUpTo100 = (item: v.GenericSchema<string>, what: string) =>
  v.pipe(v.array(item), v.maxLength(100), v.description(what));
const allowed = (item: v.GenericSchema<string>, what: string) =>
  v.optional(
    listOfUpTo100(
      item,
      `the values that a job may choose, any if not set: a list of up to 100, each ${what}`,
    ),
  );
const PLATFORM_VERSION = "a Fargate platform version, such as 1.4.0 or LATEST";
const VARIABLE_PATTERNS = "a list of up to 100 variable names, with up to three * that match any characters";
const variable = v.pipe(
  v.string(),
  v.trim(),
  v.regex(/^(?!(.*\*){4})(?!\d)[\w*]+$/),
  v.description(VARIABLE_PATTERNS),
);
const AWS_VARIABLES =
  "AWS_CONTAINER_* AWS_REGION AWS_DEFAULT_REGION AWS_EXECUTION_ENV ECS_CONTAINER_METADATA_URI*";
const flag = (meaning: string) => v.pipe(v.boolean(), v.description(`${meaning}: true or false`));

const CapacityProviderSchema = v.object({
  CapacityProvider: text("the capacity provider's name, such as FARGATE or FARGATE_SPOT"),
  Weight: v.optional(whole(0, 1000, "its relative share of the tasks"), 1),
  Base: v.optional(whole(0, 100_000, "the number of tasks that it gets first")),
});
const strategy = (meaning: string) => {
  const providers = '1 to 20 of {CapacityProvider = "FARGATE_SPOT", Weight = 1}';
  return v.pipe(
    v.array(CapacityProviderSchema),
    v.check((providers) => providers.length <= 20 && providers.some((provider) => provider.Weight > 0)),
    v.description(`${meaning}: ${providers}, at least one with a Weight above 0`),
  );
};
// The grammar of image references, from Docker's documentation (distribution/reference).
const LABEL = "[a-zA-Z0-9](?:[a-zA-Z0-9-]*[a-zA-Z0-9])?";
const HOST = new RegExp(`^${LABEL}(?:\\.${LABEL})*(?::\\d{1,5})?$`);
const COMPONENT = "[a-z0-9]+(?:(?:\\.|__?|-+)[a-z0-9]+)*";
const REPOSITORY = new RegExp(`^${COMPONENT}(?:/${COMPONENT})*$`);
const DOCKER_HUB = "docker.io";

/** An image reference with Docker's defaults. `version` is `:tag` or `@digest`. */
interface Image extends Readonly<Record<"host" | "repository" | "version", string>> {}
const nameOfImage = ({ host, repository, version }: Image): string => `${host}/${repository}${version}`;

/** Splits a reference or a pattern into host, path and version. As in Docker, a digest overrides a tag. */
function splitImage(text: string) {
  const [first = ""] = text.split("/", 1);
  const hasHost = text.includes("/") && (/[.:]/.test(first) || first === "localhost");
  const host = hasHost ? first.toLowerCase() : DOCKER_HUB;
  const rest = hasHost ? text.slice(first.length + 1) : text;
  const [, path = "", tag, digest] = /^([^:@]*)(?::([^:@]*))?(?:@(.*))?$/s.exec(rest) ?? [];
  const version = digest !== undefined ? `@${digest}` : tag !== undefined ? `:${tag}` : undefined;
  return { host: host === "index.docker.io" ? DOCKER_HUB : host, hasHost, path, tag, version };
}

/**
 * Parses an image reference and adds Docker's defaults. Pure.
 * @returns undefined if it is none
 * @example parseImage("node:22") // { host: "docker.io", repository: "library/node", version: ":22" }
 */
function parseImage(text: string): Image | undefined {
  if (text.length > 512) return undefined;
  const { host, path, tag, version = ":latest" } = splitImage(text);
  const repository = host === DOCKER_HUB && !path.includes("/") ? `library/${path}` : path;
  const isValid =
    HOST.test(host) &&
    REPOSITORY.test(path) &&
    host.length + repository.length < 255 &&
    !/^[0-9a-f]{64}$/.test(path) && // Docker takes this for the id of an image
    (tag === undefined || /^\w[\w.-]{0,127}$/.test(tag)) &&
    (version.startsWith(":") || /^@sha256:[0-9a-f]{64}$/.test(version));
  return isValid ? { host, repository, version } : undefined;
}

/**
 * Parses an image pattern: a reference, in which `*` stands for any characters of a component, tag or digest,
 * `**` for any components, and `{project_id}` for the number of the job's project. At the end of a pattern,
 * `**` covers any tag and digest, too. The host has no wildcard.
 * @returns undefined if it is none; `hasHost`: whether it names its host
 */
function parseImagePattern(text: string, project = 0) {
  const { host, hasHost, path, tag, version } = splitImage(text.replaceAll("{project_id}", `${project}`));
  const isValid =
    HOST.test(host) &&
    /^(?!.*(\*{3}|\/\/|^\/|\/$))[a-z0-9._/*-]{1,255}$/.test(path) &&
    /^(:[\w.*-]{1,128}|@[a-z0-9:*]{1,80})?$/.test(version ?? "") &&
    !(tag && version?.startsWith("@")) &&
    [path, version ?? ""].every((part) => part.split(/\*+/).length <= 4);
  const isOfficial = host === DOCKER_HUB && !path.includes("/") && path !== "**";
  const anyVersion = path.endsWith("**") ? undefined : ":latest";
  return isValid
    ? { host, hasHost, path: isOfficial ? `library/${path}` : path, version: version ?? anyVersion }
    : undefined;
}

/** Whether a pattern of the configuration file covers an image. */
function matchesImage(pattern: string, image: Image, project: number): boolean {
  const parsed = parseImagePattern(pattern, project);
  const matches = (glob: string, text: string) => {
    const any = (stars: string) => (stars === "**" ? ".*" : "[^/]*");
    const source = glob.split(/(\*+)/).map((part, i) => (i % 2 ? any(part) : part.replace(/\W/g, "\\$&")));
    return new RegExp(`^${source.join("")}$`).test(text);
  };
  return (
    parsed?.host === image.host &&
    matches(parsed.path, image.repository) &&
    (parsed.version === undefined || matches(parsed.version, image.version))
  );
}

const IMAGE_PATTERN =
  "registry/repository:tag or @digest, with * for any text but / and ** for any path, not in the registry";
const imagePattern = v.pipe(
  v.string(),
  v.trim(),
  v.check((pattern) => parseImagePattern(pattern) !== undefined),
  v.description(IMAGE_PATTERN),
);
const hostedPattern = v.pipe(
  imagePattern,
  v.check((pattern) => parseImagePattern(pattern)?.hasHost === true),
  v.description(`${IMAGE_PATTERN}; the registry must be named`),
);
const images = (what: string) =>
  v.optional(listOfUpTo100(imagePattern, `${what}: a list of up to 100, each ${IMAGE_PATTERN}`), []);
const upTo100Tables = <T extends v.ObjectEntries>(entries: T, what: string) =>
  v.optional(
    v.pipe(v.array(v.object(entries)), v.maxLength(100), v.description(`a list of up to 100 ${what}`)),
    [],
  );
const directory = (meaning: string) =>
  v.pipe(
    v.string(),
    v.trim(),
    v.regex(/^(\/[\w-][\w.-]*){1,16}$/),
    v.description(`${meaning}: an absolute path`),
  );
const RESERVED = ["__proto__", "constructor", "prototype"]; // keys that valibot's `record` drops
const tags = v.pipe(
  v.custom<Record<string, string>>(
    (tags) => isTable(tags) && !RESERVED.some((key) => Object.hasOwn(tags, key)),
  ),
  v.record(v.string(), v.string()),
  v.maxEntries(50),
  v.description("a table of at most 50 tags for the task, key = text"),
);

/** Every setting, spelled as in the configuration file, with its default, unit and meaning. */
const ConfigSchema = v.object({
  LogLevel: v.optional(oneOf(LEVELS, "the lowest level of messages that are logged"), "info"),
  LogFormat: v.optional(oneOf(FORMATS, "how log messages are written"), "text"),
  LogFile: v.optional(v.pipe(v.string(), v.description("a file to log to instead of standard error")), ""),
  Fargate: v.pipe(
    v.object({
      Cluster: text("the name or ARN of the ECS cluster"),
      Region: text("an AWS region, such as us-east-1"),
      Subnet: v.optional(text("a subnet ID, such as subnet-0a1b2c3d")),
      Subnets: v.optional(listOf(16, "a subnet ID", "subnet IDs")),
      SecurityGroup: v.optional(text("a security group ID, such as sg-0a1b2c3d")),
      SecurityGroups: v.optional(listOf(5, "a security group ID", "security group IDs")),
      TaskDefinition: text("family, family:revision or ARN of the task definition"),
      AllowedTaskDefinitions: allowed(pattern, PATTERN),
      EnablePublicIP: v.optional(flag("whether the task gets a public address"), false),
      UsePublicIP: v.optional(flag("whether to connect to the task's public address")),
      PlatformVersion: v.optional(text(PLATFORM_VERSION)),
      AllowedPlatformVersions: allowed(text(PLATFORM_VERSION), PLATFORM_VERSION),
      LaunchType: v.optional(exactly(["FARGATE", "EC2"], "where the task runs")),
      CapacityProviderStrategy: v.optional(strategy("where the task runs, instead of LaunchType")),
      FallbackCapacityProviderStrategy: v.optional(strategy("where it runs if no subnet has capacity")),
      EnableExecuteCommand: v.optional(flag("whether ECS Exec may run commands in the task"), false),
      Tags: v.optional(tags, {}),
      PropagateTags: v.optional(
        exactly(["TASK_DEFINITION", "NONE"], "where the task gets tags from besides Tags"),
      ),
      StartTimeout: v.optional(whole(1, 86_400, "seconds within which a task must be ready"), 600),
      WaitForHealthy: v.optional(
        flag("whether prepare waits until ECS reports the container healthy"),
        false,
      ),
      DeadlineMargin: v.optional(
        whole(0, 604_800, "grace period in seconds, added to StartTimeout plus the job timeout"),
        3600,
      ),
      AbandonedAfter: v.optional(
        whole(0, 604_800, "seconds without a live stage until sweep stops a task; 0: never"),
        900,
      ),
      MaxTaskAge: v.optional(
        whole(3600, 2_592_000, "seconds until sweep stops a task without a deadline"),
        86_400,
      ),
    }),
    v.rawCheck(({ dataset: { value }, addIssue }) => {
      if (!isTable(value)) return;
      const has = (key: string) => value[key] !== undefined;
      const subnets = "set either Subnet, a subnet ID, or Subnets, a list of 1 to 16 subnet IDs";
      const groups = "set either SecurityGroup, a security group ID, or SecurityGroups, a list of 1 to 5";
      const both = "cannot be set together with CapacityProviderStrategy: ECS accepts one of the two";
      if (has("Subnet") === has("Subnets")) addIssue({ message: `Fargate.Subnet: ${subnets}` });
      if (has("SecurityGroup") === has("SecurityGroups"))
        addIssue({ message: `Fargate.SecurityGroup: ${groups}` });
      if (has("LaunchType") && has("CapacityProviderStrategy"))
        addIssue({ message: `Fargate.LaunchType: ${both}` });
    }),
  ),
  JobImage: v.optional(
    v.pipe(
      v.object({
        TaskDefinitions: upTo100Tables(
          {
            Image: imagePattern,
            TaskDefinition: text("family, family:revision or ARN of the task definition"),
          },
          'of {Image = "registry.example.com/ci/node:*", TaskDefinition = "ci-node"}',
        ),
        AllowedImages: images("the images that a job may run its script in"),
        AllowedServices: images("the images that a job may use for services"),
        PullCredentials: upTo100Tables(
          {
            Image: hostedPattern,
            SecretArn: text("the ARN of a secret with a registry's user name and password"),
          },
          'of {Image = "registry.example.com/**", SecretArn = "arn:aws:secretsmanager:..."}',
        ),
        SecretsInServices: v.optional(
          flag("whether variables of services may contain secret variables"),
          false,
        ),
        BuildsDirectory: v.optional(directory("builds_dir of jobs with an image of their own"), "/builds"),
        CacheDirectory: v.optional(directory("cache_dir of jobs with an image of their own"), "/cache"),
      }),
      v.check(
        ({ BuildsDirectory: a, CacheDirectory: b }) =>
          !`${a}/`.startsWith(`${b}/`) && !`${b}/`.startsWith(`${a}/`),
      ),
      v.description("a table in which neither BuildsDirectory nor CacheDirectory contains the other"),
    ),
    {},
  ),
  TaskMetadata: v.object({ Directory: text("the directory for the records of running tasks") }),
  SSH: v.object({
    Username: text("the user to log in as"),
    Port: v.optional(whole(1, 65_535, "the port of the task's SSH server"), 22),
    PrivateKeyPath: v.optional(text("a private key to log in with, instead of one made for the job")),
    KeyType: v.optional(oneOf(["ed25519", "rsa"], "the type of the key made for the job"), "ed25519"),
    ConnectTimeout: v.optional(
      whole(1, 3600, "seconds within which the SSH server must accept a login"),
      120,
    ),
    KeepAliveInterval: v.optional(
      whole(0, 3600, "seconds between keep-alive requests on an idle connection"),
      15,
    ),
    CancelGracePeriod: v.optional(
      whole(0, 240, "seconds from SIGTERM to SIGKILL for a cancelled script"),
      10,
    ),
    PassEnvironment: v.optional(
      listOfUpTo100(variable, `the container's variables that are passed to scripts: ${VARIABLE_PATTERNS}`),
      AWS_VARIABLES.split(" "),
    ),
  }),
});

const { LogLevel, LogFormat, LogFile } = ConfigSchema.entries;
/** The settings of the log, for commands without a configuration file. */
const LogSchema = v.object({ LogLevel, LogFormat, LogFile });

type Config = v.InferOutput<typeof ConfigSchema>;
/** Settings that a job may choose by a variable, which the runner passes as `CUSTOM_ENV_<name>`. */
const JOB_VARIABLES = {
  TaskDefinition: "FARGATE_TASK_DEFINITION",
  PlatformVersion: "FARGATE_PLATFORM_VERSION",
} as const;
type JobSetting = keyof typeof JOB_VARIABLES;
/** Settings that the command line may override. */
type Options = { readonly [Key in "LogLevel" | "LogFormat" | "LogFile" | JobSetting]?: string | undefined };

type Table = Record<string, unknown>;
const isTable = (value: unknown): value is Table =>
  typeof value === "object" && value !== null && !Array.isArray(value) && !(value instanceof Date);
/** The schema of a setting's value, without `optional`. */
const unwrap = (schema: v.GenericSchema): v.GenericSchema =>
  "wrapped" in schema ? (schema.wrapped as v.GenericSchema) : schema;

/** The keys of a table, or of the tables in a list; undefined if any key is allowed. */
function entriesOf(schema: v.GenericSchema): Record<string, v.GenericSchema> | undefined {
  const inner = unwrap(schema);
  if ("entries" in inner) return inner.entries as Record<string, v.GenericSchema>;
  return "item" in inner ? entriesOf(inner.item as v.GenericSchema) : undefined;
}

/** Every known key with its path, such as `SSH.Port`. */
const knownKeys = (schema: v.GenericSchema, path = ""): string[] =>
  Object.entries(entriesOf(schema) ?? {}).flatMap(([key, item]) => [
    path + key,
    ...knownKeys(item, `${path}${key}.`),
  ]);

/** The known key that is most similar to an unknown one, by edit distance in proportion to length. */
function nearestKey(unknown: string): string {
  const difference = (key: string) => {
    const name = key.slice(key.lastIndexOf(".") + 1);
    return distance(unknown.toLowerCase(), name.toLowerCase()) / Math.max(unknown.length, name.length);
  };
  return knownKeys(ConfigSchema).reduce((best, key) => (difference(key) < difference(best) ? key : best));
}

/**
 * The job's variables that seem meant for the driver, but have no effect: FARGATE_*, and misspellings of a
 * name in `JOB_VARIABLES` (up to two edits), which is then `meant`.
 */
function unusedVariables(env: Environment) {
  const used: string[] = Object.values(JOB_VARIABLES);
  return Object.keys(env).flatMap((key) => {
    const [, name = "", bare = ""] = /^CUSTOM_ENV_((?:CUSTOM_ENV_)?(.*))$/s.exec(key) ?? [];
    const meant = used.find((known) => distance(bare, known) <= 2);
    return !used.includes(name) && (meant || bare.startsWith("FARGATE_")) ? [{ name, meant }] : [];
  });
}

/** Gives keys the schema's spelling. As in the official driver, case is ignored if no key matches exactly. */
function normalizeKeys(value: unknown, schema: v.GenericSchema, path: string, warnings: string[]): unknown {
  const entries = entriesOf(schema);
  if (entries && Array.isArray(value))
    return value.map((item) => normalizeKeys(item, schema, path, warnings));
  if (!entries || !isTable(value)) return value;
  const normalized: Table = {};
  for (const [key, item] of Object.entries(value)) {
    const name = Object.keys(entries).find((name) => name.toLowerCase() === key.toLowerCase());
    const entry = entries[name ?? ""];
    // An empty string (not in place of a list) and port 0 count as not set, as in the official driver.
    const isSet = (item !== "" || (entry && "item" in unwrap(entry))) && !(name === "Port" && item === 0);
    if (!name || !entry)
      warnings.push(`unknown key ${path}${key}; the most similar known key is ${nearestKey(key)}`);
    else if (key !== name && Object.hasOwn(value, name))
      warnings.push(`${path}${key} has no effect, since ${path}${name} is set`);
    else if (isSet) normalized[name] = normalizeKeys(item, entry, `${path}${name}.`, warnings);
  }
  return normalized;
}

/** Formats a value as TOML does, but tables as JSON, in at most 80 characters. */
function formatValue(value: unknown): string {
  if (typeof value === "number" && !Number.isFinite(value))
    return `${value}`.toLowerCase().replace("infinity", "inf");
  try {
    return JSON.stringify(value).slice(0, 80);
  } catch {
    return "nested too deeply"; // for JSON.stringify; TOML sets no limit
  }
}

/** One error of the schema: the setting's path, its value, and the valid values. */
function describeIssue(issue: v.BaseIssue<unknown>, root: v.GenericSchema = ConfigSchema): string {
  if (issue.type === "raw_check") return issue.message;
  let schema = root;
  let expected = "a table";
  for (const { key: step } of issue.path ?? []) {
    schema = entriesOf(schema)?.[String(step)] ?? schema;
    expected = v.getDescription(unwrap(schema)) ?? expected;
  }
  const steps = issue.path?.map(({ key }) => (typeof key === "number" ? `[${key}]` : `.${key}`)) ?? [];
  const value = issue.path?.at(-1)?.value;
  const state = value === undefined ? "is missing" : `is ${formatValue(value)}`;
  return `${steps.join("").slice(1)} ${state}; expected: ${expected}`;
}

/** The families of task definitions that section 12 derives for jobs: <base>-job-<hash>. */
const DERIVED_FAMILY = /^[\w-]{1,218}-job-[0-9a-f]{32}$/;

/** Whether an allowed pattern such as `team-*` covers a family or family:revision. */
function matchesPattern(pattern: string, name: string): boolean {
  const anyRevision = pattern.includes(":") ? "" : "(:\\d+)?";
  return new RegExp(`^${pattern.replaceAll("*", "[^:/]*")}${anyRevision}$`).test(name);
}

/** Why a job may not override a setting; undefined if it may. `configured`: the file's TaskDefinition. */
function refuseOverride(
  f: Config["Fargate"],
  jobOverrides: readonly string[],
  configured: unknown,
): string | undefined {
  const refused = (key: JobSetting, why: string) =>
    `${JOB_VARIABLES[key]} of this job, ${f[key]?.slice(0, 300)}, is not allowed: ${why}`;
  const { TaskDefinition: chosen, AllowedTaskDefinitions: patterns, AllowedPlatformVersions: versions } = f;
  const family = chosen.replace(/^.*\//s, "").replace(/:.*$/s, "");
  if (jobOverrides.includes("TaskDefinition") && DERIVED_FAMILY.test(family))
    return refused("TaskDefinition", "it belongs to the jobs whose image: and services: it contains");
  if (jobOverrides.includes("PlatformVersion") && versions && !versions.includes(f.PlatformVersion ?? ""))
    return refused("PlatformVersion", `AllowedPlatformVersions is ${versions.join(", ") || "empty"}`);
  if (!jobOverrides.includes("TaskDefinition") || !patterns) return undefined;
  const [, partition, region, account, name = chosen] =
    /^arn:([\w-]+):ecs:([\w-]+):(\d{12}):task-definition\/(.*)$/s.exec(chosen) ?? [];
  if (account) {
    // An allowed name means the definition in the driver's own partition, region and account.
    const arn = /^arn:([\w-]+):ecs:[\w-]+:(\d{12}):/;
    const arns = [f.Cluster, String(configured)].map((name) => arn.exec(name)).filter((arn) => arn !== null);
    const isOwn = arns.some((arn) => arn[2] === account) && arns.every((arn) => arn[1] === partition);
    const place = `of region ${f.Region} and of the account in the ARN of Cluster or TaskDefinition`;
    const rule =
      arns.length > 0 ? `its ARN must be ${place}` : "the file has no ARN whose account allows one";
    if (!isOwn || region !== f.Region) return refused("TaskDefinition", rule);
  }
  const isName = /^[\w-]{1,255}(:\d{1,10})?$/.test(name);
  if (isName && patterns.some((pattern) => matchesPattern(pattern, name))) return undefined;
  return refused("TaskDefinition", `AllowedTaskDefinitions is ${patterns.join(", ") || "empty"}`);
}

/**
 * Reads the configuration from the text of its file. Options override variables; variables override the file.
 * @param path the file's path; relative paths in the file start from its directory
 * @returns the configuration; `jobOverrides`: the settings that the job's variables set; `refusal`: why the
 * job may not set them, if so; `warnings`: keys without effect
 * @throws {Failure} that lists every problem
 * @example readConfig(file, "/etc/fargate.toml", { LogLevel: "debug" }, process.env).config.SSH.Port // 22
 */
function readConfig(file: string, path: string, options: Options, env: Environment) {
  let table: Table;
  try {
    table = parseToml(file.replace(/^\uFEFF/, ""));
  } catch (error) {
    if (!(error instanceof TomlError)) throw error;
    const what = error.message.split("\n")[0]?.replace(/^Invalid TOML document: /, "");
    throw new Failure("system", `${path}, line ${error.line}, column ${error.column}: invalid TOML: ${what}`);
  }
  const warnings: string[] = [];
  const normalized = normalizeKeys(table, ConfigSchema, "", warnings) as Table;
  const merged: Table = { Fargate: {}, TaskMetadata: {}, SSH: {}, ...normalized };
  const firstSet = (...values: unknown[]) =>
    values.find((value) => value !== undefined && (typeof value !== "string" || value.trim() !== ""));
  for (const key of ["LogLevel", "LogFormat", "LogFile"] as const)
    merged[key] = firstSet(options[key], merged[key]);
  const fargate = isTable(merged.Fargate) ? merged.Fargate : {}; // otherwise the schema reports it
  const configured = fargate.TaskDefinition;
  const jobOverrides: string[] = [];
  for (const key of ["TaskDefinition", "PlatformVersion"] as const) {
    const variable = env[`CUSTOM_ENV_${JOB_VARIABLES[key]}`];
    if (firstSet(options[key]) === undefined && firstSet(variable) !== undefined) jobOverrides.push(key);
    fargate[key] = firstSet(options[key], variable, fargate[key]);
  }
  const result = v.safeParse(ConfigSchema, merged);
  if (!result.success) {
    const problems = [...new Set(result.issues.map((issue) => describeIssue(issue)))];
    if (problems.length > 30) problems.splice(29, Infinity, `and ${problems.length - 29} more`);
    throw new Failure("system", `${path} cannot be used:`, {}, problems);
  }
  const config = result.output;
  // Not relative to the working directory, which the runner creates for each attempt and removes afterwards.
  const beside = (name: string) => resolve(dirname(path), name);
  config.TaskMetadata.Directory = beside(config.TaskMetadata.Directory);
  if (config.SSH.PrivateKeyPath) config.SSH.PrivateKeyPath = beside(config.SSH.PrivateKeyPath);
  if (config.LogFile && !firstSet(options.LogFile)) config.LogFile = beside(config.LogFile);
  // The option overrides the table as well.
  if (firstSet(options.TaskDefinition)) config.JobImage.TaskDefinitions = [];
  const refusal = refuseOverride(config.Fargate, jobOverrides, configured);
  return { config, jobOverrides, refusal, warnings: warnings.map((warning) => `${path}: ${warning}`) };
}

// 4. Logging --------------------------------------------------------------------------------------------
// One logger, which writes to standard error or to LogFile. Uses failures and configuration. Must not write
// to standard output, which carries the job's own output.

const LOG_LEVELS = ["trace", "debug", "info", "warning", "error", "fatal"] as const; // in order of severity
type LogLevel = (typeof LOG_LEVELS)[number];
type LogFields = Readonly<Record<string, unknown>>;
interface LogRecord {
  readonly level: LogLevel;
  readonly message: string;
  readonly fields: LogFields; // properties of a line of JSON
  readonly timestamp: number; // ms since the epoch
}
/** Logs a message, in which `{name}` stands for the field of that name. */
type Log = (message: string, fields?: LogFields) => void;
type Logger = Readonly<Record<"debug" | "info" | "warn" | "error" | "fatal", Log>>;

/** Makes a logger that passes records of `lowest` and more severe levels to `sink`. */
function makeLogger(lowest: LogLevel, sink: (record: LogRecord) => void): Logger {
  const at = (level: LogLevel): Log => {
    if (LOG_LEVELS.indexOf(level) < LOG_LEVELS.indexOf(lowest)) return () => {};
    return (text, fields = {}) => {
      const fill = (placeholder: string, name: string) =>
        Object.hasOwn(fields, name) ? String(fields[name]) : placeholder;
      sink({ level, message: text.replace(/\{(\w+)\}/g, fill), fields, timestamp: Date.now() });
    };
  };
  const [debug, info, warn] = [at("debug"), at("info"), at("warning")];
  return { debug, info, warn, error: at("error"), fatal: at("fatal") };
}

/** A log record as one line of text or JSON, with its line break. */
function formatRecord(record: LogRecord, format: Config["LogFormat"]): string {
  const message = printable(record.message);
  const time = `${new Date(record.timestamp).toISOString().slice(0, 19)}Z`;
  if (format === "json") {
    const object = { time, level: record.level, msg: message, ...record.fields };
    const shorten = (_: string, value: unknown) =>
      typeof value === "string" ? value.slice(0, MAX_TEXT_LENGTH) : value;
    return `${JSON.stringify(object, shorten).replace(UNPRINTABLE, escaped)}\n`;
  }
  const level = record.level === "info" ? "" : `${record.level === "fatal" ? "error" : record.level}: `;
  return format === "text-simple" ? `${level}${message}\n` : `${time} ${level}${message}\n`;
}

/** Writes a whole text. bun makes standard error non-blocking: if the pipe is full, retries for up to 5 s. */
function writeWhole(file: number, text: string): void {
  let rest = Buffer.from(text);
  for (let tries = 0; rest.length > 0; ) {
    try {
      rest = rest.subarray(fs.writeSync(file, rest));
    } catch (error) {
      if ((error as NodeJS.ErrnoException).code !== "EAGAIN" || ++tries > 500) throw error;
      Atomics.wait(new Int32Array(new SharedArrayBuffer(4)), 0, 0, 10); // sleeps for 10 ms
    }
  }
}

/** Resolves symbolic links, except the kernel's in /proc. @throws if a link belongs to another user */
function followTrustedLinks(path: string): string {
  const here = path === "/" ? path : join(followTrustedLinks(dirname(path)), basename(path));
  const link = here.startsWith("/proc/") ? undefined : fs.lstatSync(here, { throwIfNoEntry: false });
  if (!link?.isSymbolicLink()) return here;
  if (link.uid !== 0 && link.uid !== process.geteuid?.())
    throw new Error(`${here} is a symbolic link that belongs to another user (id ${link.uid})`);
  return followTrustedLinks(resolve(dirname(here), fs.readlinkSync(here)));
}

/** Opens the log file for appending, without blocking on a pipe. /dev/stderr leads to a link in /proc. */
function openLogFile(name: string): number {
  const { O_WRONLY, O_APPEND, O_CREAT, O_NONBLOCK, O_NOFOLLOW } = fs.constants;
  const path = followTrustedLinks(resolve(name));
  const noFollow = path.startsWith("/proc/") ? 0 : O_NOFOLLOW; // it may have become a link since
  return fs.openSync(path, O_WRONLY | O_APPEND | O_CREAT | O_NONBLOCK | noFollow, 0o600);
}

/** Creates the logger. If `LogFile` cannot be opened, it warns and logs to standard error. */
function openLog({
  LogLevel,
  LogFormat,
  LogFile,
}: Pick<Config, "LogLevel" | "LogFormat" | "LogFile">): Logger {
  let file = 2;
  let openError: unknown;
  try {
    if (LogFile) file = openLogFile(LogFile);
  } catch (error) {
    openError = error;
  }
  const sink = (record: LogRecord) => {
    try {
      const line = formatRecord(record, LogFormat);
      writeWhole(file, line);
      if (file !== 2 && record.level === "fatal") writeWhole(2, line); // for the job log
    } catch {} // No reader (EPIPE) or a full disk is no reason to leave a task running.
  };
  const fromLogrus: Record<string, LogLevel> = { warn: "warning", panic: "fatal" }; // the official driver's
  const log = makeLogger(fromLogrus[LogLevel] ?? (LogLevel as LogLevel), sink);
  const fields = { file: LogFile, reason: reasonOf(openError) };
  if (openError) log.warn("LogFile {file} cannot be opened: {reason}; logging to standard error", fields);
  return log;
}

// 5. The job --------------------------------------------------------------------------------------------
// A job's identity, as the runner passes it, and the context that every command works with. Uses failures
// and configuration. Must not take the identity from CUSTOM_ENV_* variables if JOB_RESPONSE_FILE is set.

/** Identifies a job: the same in each of its stages, different from every other job. */
interface Job {
  readonly stem: string; // <label>-<hash>: the record's file name without .json
  readonly hash: string; // 64 hex digits of SHA-256; identifies the job
  readonly title: string; // for StopTask's reason: ids only, no text that a job's author can choose
  readonly timeout: number; // seconds
  readonly imageNames?: readonly string[]; // names in image: and services:
  readonly ids?: Readonly<{ job: number; project: number }>; // GitLab's; unknown without JOB_RESPONSE_FILE
}

/** What every command works with. */
interface BaseContext {
  readonly config: Config;
  readonly log: Logger;
  readonly signal: AbortSignal; // aborts by SIGTERM, SIGINT, SIGHUP, or if the parent or the output is gone
  readonly now: () => number; // ms of a monotonic clock, for durations within this process
  readonly wallTime: () => number; // ms since the epoch, only to compare with other processes and hosts
  readonly env: Environment;
}

/** What every stage works with. */
interface Context extends BaseContext {
  readonly job: Job;
  readonly jobOverrides: readonly string[]; // the settings that the job's variables set
  readonly refusal?: string | undefined; // why one of these is not allowed, if so
  readonly warned?: Set<string>; // values of startedBy that cleanup has already warned about
  readonly jobTask?: JobTask; // containers for image: and services:, if the job has any
}

/** Where the output of a script goes. `done` is called once, when the part has been written or is lost. */
type OutputSink = { write(part: Buffer, done: () => void): unknown };
type OutputSinks = Readonly<Record<"stdout" | "stderr", OutputSink>>;

const ASSUMED_JOB_TIMEOUT = 86_400; // seconds, if the runner does not pass the job's timeout
const MAX_JOB_TIMEOUT = 2_678_400; // seconds: one month, GitLab's maximum
const DEFAULT_JOB_TIMEOUT = 7_200; // seconds: GitLab Runner's default for a job without a timeout

const ImageSchema = v.fallback(v.object({ name: v.string() }), { name: "" });
const JobResponseSchema = v.object({
  id: v.pipe(v.number(), v.safeInteger()),
  token: v.optional(v.string(), ""),
  job_info: v.object({ project_id: v.pipe(v.number(), v.safeInteger()) }),
  git_info: v.object({ repo_url: v.pipe(v.string(), v.url()) }),
  runner_info: v.fallback(v.object({ timeout: v.optional(v.number()) }), {}),
  image: ImageSchema,
  services: v.fallback(v.array(ImageSchema), []),
});

/** Parses JSON by a schema. Errors name the key, never the value, which may be a token or a private key. */
function readJson<T extends v.GenericSchema>(content: string, schema: T): v.InferOutput<T> {
  const json = v.safeParse(v.pipe(v.string(), v.parseJson()), content);
  if (!json.success) throw new Error("it is not JSON");
  const result = v.safeParse(schema, json.output);
  if (result.success) return result.output;
  throw new Error(`${v.getDotPath(result.issues[0]) ?? "it"} is missing or invalid`);
}

const sha256 = (value: string) => new Bun.CryptoHasher("sha256").update(value).digest("hex");
const randomBytes = (count: number) => Buffer.from(crypto.getRandomValues(new Uint8Array(count)));

/**
 * Identifies the job by `JOB_RESPONSE_FILE` (GitLab Runner 14.1+), whose ids no job author can set; without
 * it, by CI variables.
 * @returns undefined if the runner passes no job. @throws {Failure} if JOB_RESPONSE_FILE cannot be used
 */
function readJob(env: Environment): Job | undefined {
  const path = env.JOB_RESPONSE_FILE;
  if (path) {
    const what = `JOB_RESPONSE_FILE ${path} cannot be used`;
    const response = withContext(what, () => readJson(fs.readFileSync(path, "utf8"), JobResponseSchema));
    const { protocol, host, pathname } = new URL(response.git_info.repo_url); // leaves out the token
    const project = response.job_info.project_id;
    // The token makes the hash unguessable, and unique even if two GitLab instances share an address.
    const hash = sha256(
      JSON.stringify([`${protocol}//${host}${pathname}`, project, response.id, response.token]),
    );
    const { timeout = ASSUMED_JOB_TIMEOUT } = response.runner_info;
    return {
      stem: `job-${response.id}-${hash}`,
      hash,
      title: `job ${response.id} of project ${project}`,
      timeout: timeout > 0 ? Math.min(timeout, MAX_JOB_TIMEOUT) : DEFAULT_JOB_TIMEOUT,
      imageNames: [response.image, ...response.services].flatMap(({ name }) => name || []),
      ids: { job: response.id, project },
    };
  }
  // The official driver's formula; never used if JOB_RESPONSE_FILE is set but cannot be read.
  const {
    CUSTOM_ENV_CI_PROJECT_URL: url,
    CUSTOM_ENV_CI_PIPELINE_ID: pipeline,
    CUSTOM_ENV_CI_JOB_ID: id,
  } = env;
  if (!url || !pipeline || !id) return undefined;
  const hash = sha256(`${url}-${pipeline}-${id}`);
  const [label] = /^[\w-]{1,32}$/.exec(env.CUSTOM_ENV_CI_RUNNER_SHORT_TOKEN ?? "") ?? ["job"];
  return { stem: `${label}-${hash}`, hash, title: `job ${hash.slice(0, 12)}`, timeout: ASSUMED_JOB_TIMEOUT };
}

// 6. Task record ----------------------------------------------------------------------------------------
// The state that one stage leaves on disk for the next: the record of a job's task, and locks that show which
// jobs have a live process. Uses failures, configuration and the job. Must not call AWS, follow links to
// files, or trust files that others could have written.

const RECORD_VERSION = 1;
const MANAGER_ID = /^([0-9a-f]{12}|[0-9a-f]{32})$/; // random; or on ECS, the id of the manager's own task
/** `startedBy` of this driver's tasks: fargate-<manager>-<job>. */
const STARTED_BY = /^fargate-([0-9a-f]{12}|[0-9a-f]{32})-[0-9a-f]{32}$/;
const epochSeconds = v.pipe(v.number(), v.minValue(0), v.maxValue(8.64e12)); // within the range of Date

/** The file that prepare leaves for the later stages: the official driver's fields and this driver's own. */
const RecordSchema = v.object({
  Version: v.literal(RECORD_VERSION),
  TaskARN: v.string(), // empty until RunTask has answered
  ContainerIP: v.string(), // empty until a login has succeeded
  PrivateKey: v.string(), // base64 of the PEM text; empty if the key is the operator's own (PrivateKeyPath)
  Cluster: v.string(),
  Region: v.string(),
  StartedBy: v.pipe(v.string(), v.regex(STARTED_BY)), // else ListTasks would find other jobs' tasks
  ClientTokens: v.array(v.string()), // every token that RunTask may have been called with
  Unanswered: v.boolean(), // RunTask may have been sent and not answered: a task may exist
  HostKey: v.string(), // base64 of the SSH server's key, as first seen
  Interpreter: v.picklist(["bash", "sh"]), // bash, if the container has it
  LoginShell: v.string(), // file name of the login user's own shell
  Deadline: epochSeconds, // when the task is overdue; 0 until RunTask is sent, 1 once it must be stopped
  UpdatedAt: epochSeconds, // when RunTask was last sent; until then, when the record was created
  // With containers for image: and services:. Users are numeric ids.
  Build: v.optional(
    v.object({ Shell: v.picklist(["bash", "sh"]), User: v.number(), CoordinatorUser: v.number() }),
  ),
  Services: v.optional(v.array(v.object({ Container: v.string(), Image: v.string(), Log: v.string() }))),
  Manager: v.optional(v.string()), // the system id of the `manager` that the job runs under, if any
  // GitLab's ids, for operators; absent if the runner passes no JOB_RESPONSE_FILE.
  JobID: v.optional(v.number()),
  ProjectID: v.optional(v.number()),
});
type TaskRecord = v.InferOutput<typeof RecordSchema>;

/** Creates the directory of records with mode 0700, unless it exists. @returns as `checkDirectory` */
function createDirectory(directory: string): string | undefined {
  const make = () => fs.mkdirSync(directory, { recursive: true, mode: 0o700 });
  withContext(`TaskMetadata.Directory ${directory} cannot be created`, make, "disk");
  return checkDirectory(directory);
}

/** @returns a warning if others may write there. @throws {Failure} if anybody may, without a sticky bit */
function checkDirectory(directory: string): string | undefined {
  const what = `TaskMetadata.Directory ${directory}`;
  // Does not advise changing the mode: other programs may need the directory as it is, such as /tmp.
  const instead = "use a directory of the driver's own with mode 0700, such as /opt/gitlab-runner/metadata";
  const { mode, uid } = fs.statSync(directory, { throwIfNoEntry: false }) ?? { mode: 0, uid: 0 };
  if ((mode & 0o1002) === 0o002)
    throw new Failure("system", `${what} cannot be used: anybody may write to it; ${instead}`);
  if (uid !== 0 && uid !== process.geteuid?.())
    return `${what} belongs to another user (id ${uid}); ${instead}`;
  return mode & 0o022 ? `${what} is writable by others; ${instead}` : undefined;
}

/** Reads a file that this user owns, never a link or a pipe. `forbidden`: mode bits that must not be set. */
function readPrivateFile(path: string, forbidden = 0o077): string {
  const { O_RDONLY, O_NOFOLLOW, O_NONBLOCK } = fs.constants;
  if (fs.lstatSync(path).isSymbolicLink()) throw new Error("it is a symbolic link");
  const file = fs.openSync(path, O_RDONLY | O_NOFOLLOW | O_NONBLOCK); // it may have become a link since
  try {
    const stat = fs.fstatSync(file);
    if (!stat.isFile()) throw new Error("it is not a regular file");
    if (stat.uid !== process.geteuid?.()) {
      // No exception for file systems that give all files to one user: whoever mounts one can write them.
      const efs =
        "; if that user owns the whole file system (an EFS access point), run GitLab Runner as that user";
      const hint = fs.statSync(dirname(path)).uid === stat.uid ? efs : "";
      throw new Error(`it belongs to another user (id ${stat.uid})${hint}`);
    }
    if (stat.mode & forbidden)
      throw new Error(`its mode is ${(stat.mode & 0o777).toString(8)}; it must be 600`);
    return fs.readFileSync(file, "utf8");
  } finally {
    fs.closeSync(file);
  }
}

/** Best-effort delete. */
function removeQuietly(path: string): void {
  try {
    fs.rmSync(path, { force: true });
  } catch {}
}

/**
 * Writes a file and flushes it to disk: after a crash, it has either its whole old or its whole new content.
 * @param publish gives the temporary file its final name
 */
function writeDurably(
  path: string,
  content: string,
  publish: (temporary: string, path: string) => void,
): void {
  const temporary = `${path}.${randomBytes(6).toString("hex")}.tmp`;
  try {
    fs.writeFileSync(temporary, content, { flag: "wx", mode: 0o600, flush: true });
    publish(temporary, path);
  } finally {
    removeQuietly(temporary);
  }
  const directory = fs.openSync(join(path, ".."), "r"); // to flush the file's name
  fs.fsyncSync(directory);
  fs.closeSync(directory);
}

/** @throws {Failure} if the record cannot be stored; the caller must then not start a task */
function writeRecord(path: string, record: TaskRecord): void {
  const content = `${JSON.stringify(record, null, 2)}\n`;
  withContext(
    `the record ${path} cannot be written`,
    () => writeDurably(path, content, fs.renameSync),
    "disk",
  );
}

/** Whether a text contains a `startedBy` of a job other than the one in the record's file name. */
const isOfAnotherJob = (path: string, text: string): boolean =>
  !path.includes(/fargate-(?:[0-9a-f]{12}|[0-9a-f]{32})(-[0-9a-f]{32})/.exec(text)?.[1] ?? "");

/** @returns undefined if there is no record. @throws {Failure} if it cannot be parsed or trusted */
function readRecord(path: string): TaskRecord | undefined {
  return withContext(`the record ${path} cannot be used`, () => {
    try {
      const record = readJson(readPrivateFile(path), RecordSchema);
      if (isOfAnotherJob(path, record.StartedBy)) throw new Error("it belongs to another job");
      return record;
    } catch (error) {
      if ((error as NodeJS.ErrnoException).code !== "ENOENT") throw error;
    }
  });
}

/**
 * Reads the usable parts of a broken record (truncated, or of another version): its age, and its task unless
 * the file has one of the `forbidden` mode bits.
 */
function salvageRecord(path: string, forbidden = 0o022): Partial<TaskRecord> {
  const status = fs.lstatSync(path, { throwIfNoEntry: false });
  const UpdatedAt = status?.isFile() ? { UpdatedAt: status.mtimeMs / 1000 } : {};
  try {
    const content = readPrivateFile(path, forbidden);
    const arn = /arn:aws[\w-]*:ecs:([\w-]+):\d{12}:task\/([\w-]+)\/[0-9a-f]{32}/;
    const [TaskARN, Region, Cluster] = arn.exec(content) ?? [];
    if (TaskARN && Region && Cluster && !isOfAnotherJob(path, content))
      return { TaskARN, Region, Cluster, ...UpdatedAt };
  } catch {}
  return UpdatedAt;
}

/**
 * Identifies a process: its start time, a dot, this host's boot and this process's PID namespace. "." if the
 * process has ended, or without /proc.
 */
function identityOf(pid: number | "self"): string {
  try {
    // "pid (name) state ppid ...": the start time is the 22nd field.
    const stat = fs.readFileSync(`/proc/${pid}/stat`, "latin1");
    const [state = "", ...fields] = stat.replace(/^.*\) /s, "").split(" ");
    const boot = fs.readFileSync("/proc/sys/kernel/random/boot_id", "latin1").slice(0, 8);
    return /[ZX]/.test(state) ? "." : `${fields[18]}.${boot}${fs.statSync("/proc/self/ns/pid").ino}`;
  } catch {
    return ".";
  }
}

const LOCK_TOUCH_MS = 5_000; // the interval at which a live process touches its lock
const LOCK_EXPIRY_MS = 4 * LOCK_TOUCH_MS; // from the last touch until a process not in /proc counts as dead

/**
 * Creates a lock named after this process. While the process lives, `sweep` leaves the job alone, and
 * `cleanup` waits for `prepare`.
 * @returns a function that removes it
 */
function createLock({ Directory }: Config["TaskMetadata"], stem: string, stage: string): () => void {
  const path = join(Directory, [stem, stage, process.pid, identityOf("self"), "lock"].join("."));
  const touch = () => {
    try {
      // The time is for processes whose /proc does not show this one.
      if (fs.existsSync(path)) fs.lutimesSync(path, new Date(), new Date());
      else fs.closeSync(fs.openSync(path, "wx", 0o600));
    } catch {} // best effort: run can do without a lock, and a full disk may have room later
  };
  touch();
  const timer = setInterval(touch, LOCK_TOUCH_MS).unref();
  return () => {
    clearInterval(timer);
    removeQuietly(path);
  };
}

/**
 * The processes that work or have worked on jobs, by their locks.
 * @param clean removes dead locks without a record
 */
function readLocks({ Directory }: Config["TaskMetadata"], wallTime: number, clean = true) {
  return fs.readdirSync(Directory).flatMap((name) => {
    const [, stem, stage, pid, identity = "", namespace] =
      /^([\w-]{1,32}-[0-9a-f]{64})\.(\w+)\.(\d+)\.(\d*\.(\w*))\.lock$/.exec(name) ?? [];
    const { uid, mtimeMs = 0 } = fs.lstatSync(join(Directory, name), { throwIfNoEntry: false }) ?? {};
    if (!stem || !stage || uid !== process.geteuid?.()) return [];
    // /proc does not show a process of another host, container or boot: there, the last touch decides.
    const isHere = namespace && identityOf("self").endsWith(`.${namespace}`);
    const isAlive = isHere
      ? identityOf(Number(pid)) === identity
      : Math.abs(wallTime - mtimeMs) < LOCK_EXPIRY_MS;
    // While the record exists, its locks stay: they show when the job was last worked on.
    const isOver = clean && !isAlive && !fs.existsSync(join(Directory, `${stem}.json`));
    if (isOver) removeQuietly(join(Directory, name));
    return [{ stem, stage, pid: Number(pid), identity, isAlive, mtimeMs }];
  });
}

const managerTaskPath = (directory: string) => join(directory, ".manager-task");
/** The manager's own task as last written: "" if unknown; undefined if the file is of another container. */
function readManagerTask(directory: string, endpoint: string): string | undefined {
  const path = managerTaskPath(directory);
  const read = () => (fs.existsSync(path) ? readPrivateFile(path) : "");
  const text = withContext(`the manager's id file ${path} cannot be used`, read);
  const [, container, id] = /^([0-9a-f]{12}) ([0-9a-f]{32})?\n$/.exec(text) ?? [];
  return container === sha256(endpoint).slice(0, 12) ? (id ?? "") : undefined;
}

/** Stores the manager's own task, or "" if unknown, unless another process of this container has done so. */
function writeManagerTask(directory: string, endpoint: string, id: string): void {
  const path = managerTaskPath(directory);
  const write = () => {
    const content = `${sha256(endpoint).slice(0, 12)} ${id}\n`;
    if (readManagerTask(directory, endpoint) === undefined) writeDurably(path, content, fs.renameSync);
  };
  withContext(`the manager's id file ${path} cannot be written`, write, "disk");
}

/**
 * The id that tells this manager from others on the same cluster: the manager's own ECS task, if
 * `identifyManager` has found it. Otherwise a random id, which depends on the host's name as well, so that a
 * copy of the directory on another host has another id.
 */
function managerId(directory: string, { ECS_CONTAINER_METADATA_URI_V4: endpoint }: Environment): string {
  const path = join(directory, ".manager-id");
  const task = endpoint && readManagerTask(directory, endpoint);
  if (task) return task;
  return withContext(`the manager's id file ${path} cannot be used`, () => {
    try {
      // link(2) is atomic, and fails if the file exists.
      if (!fs.existsSync(path)) writeDurably(path, `${randomBytes(6).toString("hex")}\n`, fs.linkSync);
    } catch (error) {
      if ((error as NodeJS.ErrnoException).code !== "EEXIST") throw error;
    }
    const id = readPrivateFile(path).trim();
    if (!/^[0-9a-f]{12}$/.test(id)) throw new Error("it does not contain 12 hex digits; remove it");
    return sha256(`${id} ${hostname()}`).slice(0, 12);
  });
}

/** As `managerId`, but creates nothing. @returns undefined if there is none yet */
function knownManagerId(directory: string, env: Environment): string | undefined {
  const { ECS_CONTAINER_METADATA_URI_V4: endpoint } = env;
  const isKnown = fs.existsSync(join(directory, ".manager-id"));
  return isKnown || (endpoint && readManagerTask(directory, endpoint))
    ? managerId(directory, env)
    : undefined;
}

/** Whether a job has been prepared with this directory. */
const hasManagerId = (directory: string): boolean =>
  [".manager-id", ".manager-task"].some((name) => fs.existsSync(join(directory, name)));

// 7. Keys -----------------------------------------------------------------------------------------------
// The SSH key pair of a job. Uses failures and configuration. Must not store a key: only the record does.

/** A private key (PEM text), and its public key as a line of authorized_keys. */
type KeyPair = Readonly<Record<"privateKey" | "publicKey", string>>;

/** @throws {Failure} if the text is not a private key, or one with a passphrase */
async function keyPairOf(privateKey: string): Promise<KeyPair> {
  const { utils } = await import("ssh2");
  const [key] = [utils.parseKey(privateKey)].flat();
  if (key instanceof Error || !key?.isPrivateKey())
    throw new Failure("system", key instanceof Error ? key.message : "it contains no private key");
  return { privateKey, publicKey: `${key.type} ${key.getPublicSSH().toString("base64")}` };
}

/** Encodes an ed25519 key (two times 32 bytes) in OpenSSH's format for private keys (PROTOCOL.key). */
function encodeEd25519(seed: Buffer, publicKey: Buffer): string {
  const number = (value: number) => Buffer.from([value >>> 24, value >>> 16, value >>> 8, value]);
  const string = (value: Buffer | string) => Buffer.concat([number(value.length), Buffer.from(value)]);
  const publicPart = Buffer.concat([string("ssh-ed25519"), string(publicKey)]);
  const check = randomBytes(4); // stored twice, so that a reader can tell a wrong passphrase
  const privatePart = [check, check, publicPart, string(Buffer.concat([seed, publicKey])), string("")];
  const padding = Buffer.from([1, 2, 3, 4, 5]); // to a multiple of 8 bytes
  const unencrypted = [string("none"), string("none"), string(""), number(1)]; // cipher, KDF, options, keys
  const header = [Buffer.from("openssh-key-v1\0"), ...unencrypted, string(publicPart)];
  const content = Buffer.concat([...header, string(Buffer.concat([...privatePart, padding]))]);
  const lines = content.toString("base64").replace(/.{70}/g, "$&\n");
  const label = "OPENSSH PRIVATE KEY";
  return `-----BEGIN ${label}-----\n${lines}\n-----END ${label}-----\n`;
}

/** Generates the key pair of a job. RSA keys have 3072 bits, as NIST SP 800-57 requires beyond 2030. */
async function makeKeyPair(type: Config["SSH"]["KeyType"]): Promise<KeyPair> {
  const { generateKeyPairSync } = await import("node:crypto");
  if (type === "rsa") {
    const { privateKey } = generateKeyPairSync("rsa", { modulusLength: 3072 });
    return keyPairOf(privateKey.export({ type: "pkcs1", format: "pem" }).toString());
  }
  const { d = "", x = "" } = generateKeyPairSync("ed25519").privateKey.export({ format: "jwk" });
  return keyPairOf(encodeEd25519(Buffer.from(d, "base64url"), Buffer.from(x, "base64url")));
}

// 8. ECS ------------------------------------------------------------------------------------------------
// Builds requests to AWS, sends them, and explains the answers; asks the task metadata endpoint. Uses
// failures, configuration, and types of the job and the record. Must not touch records, log in to a task, or
// decide when tasks start or stop.

const CONTAINER = "ci-coordinator"; // the container that gets the public key, as in the official driver

/**
 * The input of RunTask: the fields that the official driver sends, and those of further settings. Pure.
 * @param identity makes the task findable and a repeated call harmless
 * @param environment variables for the container, or undefined to send no override
 * @param services overrides for the containers of services
 * @example runTaskInput(config, { startedBy, clientToken }, { SSH_PUBLIC_KEY: publicKey })
 */
function runTaskInput(
  { Fargate: f }: Config,
  identity: { startedBy: string; clientToken: string },
  environment: Readonly<Record<string, string>> | undefined,
  services: ContainerOverride[] = [],
): RunTaskCommandInput {
  const subnets = f.Subnets ?? [f.Subnet as string];
  const securityGroups = f.SecurityGroups ?? [f.SecurityGroup as string];
  const assignPublicIp = f.EnablePublicIP ? "ENABLED" : "DISABLED";
  const variables = Object.entries(environment ?? {}).map(([name, value]) => ({ name, value }));
  const containerOverrides = [
    ...(environment ? [{ name: CONTAINER, environment: variables }] : []),
    ...services,
  ];
  return {
    cluster: f.Cluster,
    taskDefinition: f.TaskDefinition,
    platformVersion: f.PlatformVersion,
    count: 1,
    networkConfiguration: { awsvpcConfiguration: { subnets, securityGroups, assignPublicIp } },
    ...(containerOverrides.length > 0 && { overrides: { containerOverrides } }),
    launchType: f.LaunchType,
    capacityProviderStrategy: f.CapacityProviderStrategy?.map(
      ({ CapacityProvider: capacityProvider, Weight: weight, Base: base }) => ({
        capacityProvider,
        weight,
        base,
      }),
    ),
    ...(f.EnableExecuteCommand && { enableExecuteCommand: true }),
    ...(Object.keys(f.Tags).length > 0 && {
      tags: Object.entries(f.Tags).map(([key, value]) => ({ key, value })),
    }),
    propagateTags: f.PropagateTags,
    ...identity,
  };
}

/** The limits of a call that may be repeated. `onSend` and `grace` are for calls to AWS. */
interface Limits {
  readonly until: number; // ms of `now`, after which the call is not repeated
  readonly signal?: AbortSignal | undefined; // ends the call; its reason is thrown
  readonly shouldRetry?: (error: unknown) => boolean; // whether to repeat the call; default: `isRetryable`
  readonly onSend?: () => void; // called before each time the call is sent
  readonly grace?: number; // ms for which a sent call may outlast the signal; default: 0
}

/** The pauses of `retry`, in ms, before jitter of 50 %: backoff up to `maxPause`, or a longer `minPause`. */
type Pauses = { now: () => number; maxPause?: number; minPause?: (error: unknown) => number };
/** Repeats `call` until it succeeds, with backoff. @throws the last error, or the reason of `signal` */
async function retry<T>(call: () => Promise<T>, limits: Limits & Pauses): Promise<T> {
  const { until, shouldRetry = isRetryable, signal, now, maxPause = 5_000, minPause = () => 0 } = limits;
  for (let backoff = 100; ; backoff = Math.min(backoff * 2, maxPause)) {
    signal?.throwIfAborted();
    try {
      return await call();
    } catch (error) {
      const pause = Math.max(backoff, minPause(error)) * (0.5 + Math.random());
      if (!shouldRetry(error) || now() + pause > until) throw error;
      await sleep(pause, signal);
    }
  }
}

/** Waits for `ms` milliseconds. @throws the reason of `signal` if that aborts meanwhile */
async function sleep(ms: number, signal?: AbortSignal): Promise<void> {
  await delay(ms, undefined, { signal }).catch(() => signal?.throwIfAborted());
}

type Patterns = readonly (readonly [Problem, RegExp])[];
/** AWS's names for errors, and two stop codes. If the name is known, the message does not count. */
const BY_NAME: Patterns = [
  [
    "throttled",
    /^(Throttling(Exception)?|RequestLimitExceeded|TooManyRequestsException|RequestThrottled|SlowDown)$/,
  ],
  ["provisioning", /^LimitExceededException$/],
  ["accessDenied", /^(AccessDenied(Exception)?|UnauthorizedOperation|NotAuthorized)$/],
  ["credentials", /^(CredentialsProviderError|InvalidClientTokenId|AuthFailure)$/],
  ["credentials", /^(ExpiredToken|UnrecognizedClient)(Exception)?$/],
  ["credentials", /^(MissingAuthenticationToken|IncompleteSignature)(Exception)?$/],
  ["clock", /^(RequestExpired|RequestTimeTooSkewed|RequestInTheFuture)$/],
  ["account", /^(BlockedException|OptInRequired|SubscriptionRequiredException)$/],
  ["cluster", /^ClusterNotFoundException$/],
  ["platform", /^Platform(Unknown|TaskDefinitionIncompatibility)Exception$/],
  ["unsupported", /^UnsupportedFeatureException$/],
  ["spot", /^SpotInterruption$/],
  ["userStop", /^UserInitiated$/],
];

// How AWS's explanations begin, for problems without a name. The first match counts. Sources: the ECS API
// reference, the ECS developer guide (stopped task errors, API failure reasons), and public reports.
const BY_TEXT: Patterns = [
  // Messages of RunTask and StopTask.
  ["clock", /^Signature (expired|not yet current)/],
  ["credentials", /^The (request signature we calculated|security token included in the request)/],
  ["noTask", /^The referenced task was not found/],
  ["definition", /^(TaskDefinition (not found|is inactive)|Unable to describe task definition)/],
  ["incompatible", /^Task definition does not support launch_type/],
  ["incompatible", /^The selected task definition is not compatible/],
  ["networkMode", /^Network Configuration is not valid for the given networkMode/],
  ["container", /^Override for container named \S+ is not a container in the TaskDefinition/],
  ["secret", /^The secret name must be unique/],
  ["fargateOnly", /^The platform version must be null/],
  ["publicIp", /^Assign public IP is not supported/],
  ["taskRole", /^The execute command failed because a valid task role/],
  ["capacityProvider", /^The specified capacity provider/],
  ["launchType", /^(No Container Instances were found|NO ACTIVE INSTANCES|EMPTY CAPACITY PROVIDER)/],
  ["assumeRole", /^(ResourceInitializationError: )?ECS was unable to assume the role/],
  ["linkedRole", /^Unable to assume the service linked role/],
  ["taskSize", /^(The requested \w+ configuration is above your limit|No Fargate configuration exists)/],
  // Load, capacity and limits, from RunTask or from tasks that stop before they are ready.
  ["provisioning", /^Tasks provisioning capacity limit exceeded/],
  ["capacity", /^Capacity is unavailable at this time/],
  ["quota", /^You've reached the limit on the number of/],
  ["addresses", /^(RESOURCE:ENI|Unexpected EC2 error.*\bInsufficientFreeAddressesInSubnet)/],
  ["instances", /^(RESOURCE:|AGENT\b|Unable to attach network interface to unused device index)/],
  ["location", /^LOCATION/],
  ["placement", /^(ATTRIBUTE|MemberOf placement constraint)/],
  ["throttled", /^Error retrieving.*\b(RequestLimitExceeded|Throttling|Rate exceeded)/],
  ["throttled", /^Unexpected EC2 error.*\b(RequestLimitExceeded|Throttling|Rate exceeded)/],
  ["throttled", /^Too many concurrent attempts to create a new revision/],
  ["interfaces", /^Unexpected EC2 error.*InterfaceLimitExceeded/],
  ["network", /^Error retrieving.*\b(Invalid(Subnet|Group|Security|Param)|Unauthorized)/],
  ["network", /^Unexpected EC2 error.*\b(Invalid(Subnet|Group|Security|Param)|Unauthorized)/],
  ["awsFault", /^(Error retrieving|Unexpected EC2 error|Timeout waiting for|Network interface provision)/],
  ["awsFault", /^(Internal ?[eE]rror|ContainerRuntime|DockerTimeout|CannotInspect)/],
  ["awsFault", /^ResourceInitializationError: failed to configure ENI/],
  // Tasks that do not start. The error name at the beginning decides; the rest only selects the advice.
  ["executionRole", /^(ResourceInit|Fetching|CannotPull).*(AccessDenied|not authorized|KMS is not allowed)/],
  ["efsName", /^ResourceInit.*invoke EFS utils.*Failed to resolve/],
  ["efsAccess", /^ResourceInit.*invoke EFS utils.*(access denied|No such file)/],
  ["efsPort", /^ResourceInit.*invoke EFS utils/],
  ["missing", /^(ResourceInit|Fetching).*(NotFound|not found|invalid ssm|did not contain)/],
  ["missing", /^(ResourceInit|Fetching).*failed to initialize/],
  ["route", /^ResourceInit/],
  ["pullRate", /^CannotPull.*(toomanyrequests|Too Many Requests|pull rate limit)/],
  ["pullSpace", /^CannotPull.*no space left/],
  ["architecture", /^(CannotPull.*(matching platform|no matching manifest)|CannotStart.*exec format error)/],
  ["pull", /^CannotPull/],
  ["command", /^CannotStartContainerError/],
  ["volume", /^CannotCreate(Volume|Container)Error/],
  ["spot", /^Your Spot Task was interrupted/],
  ["host", /^(Host EC2 |ECS is performing maint|Container instance dereg)/],
  ["host", /^(TerminationNotice|InfrastructureHealth)$/],
  ["unhealthy", /^Task failed container health checks/],
  ["memory", /^OutOfMemory/],
  ["exited", /^EssentialContainerExited$/], // a stop code, like others with $; used if no text matches
];

const firstMatch = (rows: Patterns, text: string) => rows.find(([, pattern]) => pattern.test(text))?.[0];
/** Recognizes a problem by AWS's name for it, otherwise by the beginning of one of AWS's texts. */
function recognize(name: string, ...texts: (string | undefined)[]): Pick<Cause, "problem" | "subject"> {
  // AWS writes both apostrophes.
  const explanations = texts.flatMap((text) => text?.replaceAll("\u2019", "'") ?? []);
  const problem =
    firstMatch(BY_NAME, name) ?? explanations.map((text) => firstMatch(BY_TEXT, text)).find(Boolean);
  const subject = explanations
    .map((text) => / is not authorized to perform: ([\w-]+:\w+)/.exec(text)?.[1])
    .find(Boolean);
  return { problem, subject };
}

/** An error of the SDK. Its fields come from the answer and may have any type. */
type AwsError = { [field: string]: unknown; $metadata?: { httpStatusCode?: number } };

/** Error codes that prove that no request left this host: bun's, which come from Node and OpenSSL. */
const NOT_SENT: Patterns = [
  ["unreachable", /^(ECONNREFUSED|ENOTFOUND|EAI_AGAIN)$/],
  ["certificate", /CERT|^(CRL|HOSTNAME|PATH_LENGTH)_|^UNABLE_TO_(GET|VERIFY|DE)|^INVALID_(CA|PURPOSE)$/],
  ["proxy", /^ERR_PROXY_TUNNEL$/], // the proxy refused CONNECT; the error has its status
];

const HINTS = /(?: For more information, pass `verbose|\n)[\s\S]*/; // hints to programmers by the SDK and bun
/** The Failure for an error that a call to AWS threw. `profileProblem`: why there are no credentials. */
function awsFailure(operation: string, thrown: unknown, profileProblem?: string): Failure {
  const { name, message, code, status: proxyStatus, $metadata } = thrown as AwsError;
  const status = $metadata?.httpStatusCode ?? 0;
  const error = typeof name === "string" && name ? name : "UnknownError";
  const refused = status >= 300;
  const recognized = recognize(error, refused && typeof message === "string" ? message : undefined);
  // With a status, `code` is the endpoint's and proves nothing.
  const notSent = status > 0 ? undefined : firstMatch(NOT_SENT, String(code));
  // Repeating the call cannot help.
  const isFinal = notSent === "certificate" || (notSent === "proxy" && Number(proxyStatus) < 500);
  // Without a status, the request or its answer was lost; after a success status, the rest of the answer was.
  const isLost = !refused && $metadata !== undefined && recognized.problem !== "credentials";
  const isThrottled = firstMatch(BY_NAME, error) === "throttled" || status === 429;
  const isRetryable = isThrottled || status >= 500 || (isLost && !isFinal);
  // A conflict means that this clientToken, which no other call uses, has already started a task.
  const mayHaveStarted = status >= 500 || (refused && error === "ConflictException") || (isLost && !notSent);
  const cause = { operation, error, ...recognized, isRetryable, mayHaveStarted };
  let text = (typeof message === "string" ? reasonOf(thrown) : error).replace(HINTS, "");
  // The SDK throws one of these for a body that it cannot parse, such as a proxy's page.
  const isForeign = status > 0 && /^(Type|Syntax|Range)Error$/.test(error) && !/ECONN|socket/i.test(text);
  if (isForeign) text = `HTTP ${status} with a body that is not from AWS`;
  else if (refused) text = `${error}: ${text}`;
  else if (notSent === "certificate") text = `the endpoint's certificate is not accepted: ${code}`;
  const fail = (outcome: string, reason: string, problem?: Problem) =>
    new Failure("system", `${operation} ${outcome}: ${reason}`, { ...cause, problem });
  if (refused) return fail("was refused", text, recognized.problem);
  if (profileProblem) return fail("was not sent", profileProblem, "profile");
  // Otherwise it failed before it was sent, for example because of a token file.
  const problem = isLost ? (notSent ?? "unreachable") : recognized.problem;
  return fail(problem === "unreachable" ? "got no answer" : "was not sent", text, problem);
}

/** Whether the same call may succeed if repeated: throttled, a failure of AWS, or no complete answer. */
const isRetryable = (error: unknown): boolean => causeOf(error).isRetryable === true;
/** For finding and stopping a task: also retries credential problems, as only sweep would try again. */
const isRetryableStop = (error: unknown): boolean =>
  isRetryable(error) || ["credentials", "profile"].includes(causeOf(error).problem ?? "");
/** Whether AWS throttled the call. AWS's limits apply to all runners of an account and region. */
const isThrottling = (error: unknown): boolean => causeOf(error).problem === "throttled";

const CALL_TIMEOUT_MS = 30_000; // for one call, from getting credentials to the last byte of the answer

/** A value of another type counts as absent. */
const ifValid = <T extends v.GenericSchema>(schema: T) => v.fallback(v.nullish(schema), undefined);
const texts = <K extends string>(...keys: K[]) => v.entriesFromList(keys, ifValid(v.string()));
const listOfObjects = <T extends v.ObjectEntries>(entries: T) =>
  ifValid(v.array(v.fallback(v.object(entries), {} as never)));
const pairs = listOfObjects(texts("name", "value"));
const networkInterfaces = listOfObjects(texts("privateIpv4Address", "ipv6Address"));
/** The parts of ECS's answers that this driver reads. The SDK does not check their types. */
const AnswerSchema = v.object({
  tasks: listOfObjects({
    ...texts("taskArn", "startedBy", "lastStatus", "desiredStatus", "stopCode", "stoppedReason"),
    ...texts("taskDefinitionArn"),
    createdAt: ifValid(v.date()),
    attachments: listOfObjects({ ...texts("type"), details: pairs }),
    tags: listOfObjects(texts("key", "value")),
    containers: listOfObjects({
      ...texts("name", "reason", "healthStatus", "lastStatus"),
      exitCode: ifValid(v.number()),
      networkInterfaces,
    }),
    overrides: ifValid(
      v.object({ containerOverrides: listOfObjects({ ...texts("name"), environment: pairs }) }),
    ),
  }),
  failures: listOfObjects(texts("reason", "detail")),
  taskArns: ifValid(v.array(v.string())),
  taskDefinition: ifValid(v.looseObject({ taskDefinitionArn: v.string() })),
  taskDefinitionArns: ifValid(v.array(v.string())),
  ...texts("nextToken"),
});
type Answer = v.InferOutput<typeof AnswerSchema>;
/** Whether an answer has what its call asked for. Otherwise it comes from a proxy, not from ECS. */
const IS_COMPLETE = {
  RunTask: ({ tasks, failures }: Answer) => Boolean(tasks?.length ? tasks[0]?.taskArn : failures?.length),
  DescribeTasks: ({ tasks }: Answer) => Boolean(tasks),
  ListTasks: ({ taskArns }: Answer) => Boolean(taskArns),
  StopTask: () => true,
  DescribeTaskDefinition: ({ taskDefinition }: Answer) => Boolean(taskDefinition),
  RegisterTaskDefinition: ({ taskDefinition }: Answer) => Boolean(taskDefinition),
  ListTaskDefinitions: ({ taskDefinitionArns }: Answer) => Boolean(taskDefinitionArns),
  DeregisterTaskDefinition: () => true,
};

/** An error like the SDK's own for a missing or incomplete answer. */
const missingAnswer = (message: string) => Object.assign(new Error(message), { $metadata: {} });
type Abort = { abortSignal: AbortSignal }; // the SDK's parameter for a signal

/** The CA certificates that are trusted by default, and those in a PEM file. @throws {Failure} */
async function trustedCas(path: string): Promise<string[]> {
  const { X509Certificate } = await import("node:crypto");
  const { getCACertificates } = await import("node:tls");
  return withContext(`the CA bundle ${path} cannot be used`, () => {
    const found = fs
      .readFileSync(path, "utf8")
      .match(/-----BEGIN CERTIFICATE-----[^-]+-----END CERTIFICATE-----/g);
    if (!found) throw new Error("it contains no certificate");
    for (const pem of found) new X509Certificate(pem); // a bad one fails here, with a reason
    return [...getCACertificates("default"), ...found];
  });
}

/** Why a profile gives no credentials. The SDK's own messages may quote a credential_process's output. */
async function explainProfile({ AWS_PROFILE: name = "default" }: Environment): Promise<string | undefined> {
  const { configFile, credentialsFile } = await (await import("@smithy/core/config")).loadSharedConfigFiles();
  const profile = { ...configFile[name], ...credentialsFile[name] };
  const isSource = Object.keys(profile).some((key) =>
    /^(credential|role_arn|sso_|aws_|web_identity|login_)/.test(key),
  );
  const source = profile.credential_process ? "the credential_process of profile" : "profile";
  if (isSource) return `${source} ${name} gave no credentials`;
  if (name !== "default" && Object.keys(profile).length === 0)
    return `profile ${name} (AWS_PROFILE) is not in the shared config and credentials files`;
}

/** The driver's calls to AWS. Each SDK is loaded when it is first used. */
class Aws {
  #ecsClient: Promise<ECS> | undefined;
  #ec2Client: Promise<EC2> | undefined;
  throttled = 0; // how many calls AWS has throttled

  constructor(
    protected readonly location: Pick<TaskRecord, "Region" | "Cluster">,
    protected readonly context: Pick<BaseContext, "log" | "now" | "env">,
  ) {}

  protected async settings() {
    const { FetchHttpHandler } = await import("@smithy/fetch-http-handler");
    const { loadConfig } = await import("@smithy/core/config");
    const bundle = await loadConfig({
      environmentVariableSelector: (env) => env.AWS_CA_BUNDLE || undefined,
      configFileSelector: (profile) => profile.ca_bundle || undefined,
      default: "",
    })();
    const init: BunFetchRequestInit = {
      redirect: "manual",
      ...(bundle && { tls: { ca: await trustedCas(bundle) } }),
    };
    // bun's fetch, unlike the SDK's own handler, honours HTTPS_PROXY, HTTP_PROXY and NO_PROXY.
    const customFetch = ((request: Request) => fetch(request, init)) as typeof fetch;
    const requestHandler = new FetchHttpHandler({ customFetch });
    const { env } = this.context;
    const { AWS_ACCESS_KEY_ID: accessKeyId, AWS_SECRET_ACCESS_KEY: secretAccessKey } = env;
    // As in the Go SDK, keys in variables override a profile. This SDK would use the profile.
    const override = env.AWS_PROFILE && accessKeyId && secretAccessKey;
    const keys = override && {
      credentials: { accessKeyId, secretAccessKey, sessionToken: env.AWS_SESSION_TOKEN },
    };
    return { region: this.location.Region, maxAttempts: 1, requestHandler, ...keys }; // `retry` repeats calls
  }

  protected ecsClient(): Promise<ECS> {
    this.#ecsClient ??= this.settings().then(
      async (settings) => new (await import("@aws-sdk/client-ecs")).ECS(settings),
    );
    return this.#ecsClient;
  }

  protected ec2Client(): Promise<EC2> {
    this.#ec2Client ??= this.settings().then(
      async (settings) => new (await import("@aws-sdk/client-ec2")).EC2(settings),
    );
    return this.#ec2Client;
  }

  protected async send<T>(action: string, limits: Limits, call: (abort: Abort) => Promise<T>): Promise<T> {
    const { until, signal, shouldRetry = isRetryable, onSend, grace = 0 } = limits;
    const { log, now, env } = this.context;
    const firstCallAt = now();
    let warned = false;
    const once = async () => {
      onSend?.();
      const begun = now();
      // Only RunTask has a grace period. Its answer matters more than `until`, which does not cut it short.
      const timeout = grace ? CALL_TIMEOUT_MS : Math.min(CALL_TIMEOUT_MS, Math.max(until - begun, 1_000));
      // The SDK ignores signals while it gets credentials, and modifies a signal's reason.
      const sdk = new AbortController();
      const timedOut = Promise.withResolvers<never>();
      const end = () => {
        sdk.abort();
        timedOut.reject(missingAnswer(`no complete answer after ${now() - begun} ms`));
      };
      const timers = [setTimeout(end, timeout)];
      const onSignal = () => void timers.push(setTimeout(end, grace));
      signal?.addEventListener("abort", onSignal);
      try {
        return await Promise.race([call({ abortSignal: sdk.signal }), timedOut.promise]);
      } catch (error) {
        const hasNoCredentials = (error as AwsError).name === "CredentialsProviderError";
        const failure = awsFailure(action, error, hasNoCredentials ? await explainProfile(env) : undefined);
        log.debug("{reason} (after {ms} ms)", { reason: failure.message, ms: now() - begun });
        const quietFor = isThrottling(failure) ? 60_000 : 10_000; // ms; throttling may last
        const isLate = now() > firstCallAt + quietFor && now() < until;
        if (!warned && isLate && !signal?.aborted && shouldRetry(failure)) {
          warned = true;
          log.warn("{reason}; trying again", { reason: failure.message });
        }
        throw failure;
      } finally {
        timers.forEach(clearTimeout);
        signal?.removeEventListener("abort", onSignal);
      }
    };
    // Each throttled call lengthens the pauses, up to 5 s: all jobs of the account share the limits.
    const minPause = (error: unknown) =>
      isThrottling(error) ? Math.min(500 * 2 ** ++this.throttled, 5_000) : 0;
    const isOfCall = (error: unknown) => causeOf(error).operation === action; // and not of `onSend`
    const mayRepeat = (error: unknown) => isOfCall(error) && shouldRetry(error);
    return retry(once, { until, shouldRetry: mayRepeat, now, signal, minPause }).catch((error) => {
      throw signal?.aborted && isOfCall(error) ? signal.reason : error;
    });
  }

  async #ecs<T>(
    action: keyof typeof IS_COMPLETE,
    limits: Limits,
    call: (ecs: ECS, abort: Abort) => Promise<T>,
  ) {
    const ecs = await this.ecsClient();
    return this.send(`ecs:${action}`, limits, async (abort) => {
      const answer: Answer = v.parse(v.fallback(AnswerSchema, {}), await call(ecs, abort));
      if (IS_COMPLETE[action](answer)) return answer as T;
      throw missingAnswer("the answer is empty");
    });
  }

  /** Starts a task. The clientToken makes a repeated call harmless. @returns its ARN, or why there is none */
  async runTask(input: RunTaskCommandInput, limits: Limits): Promise<string | Failure> {
    const { tasks, failures = [] } = await this.#ecs("RunTask", limits, (ecs, abort) =>
      ecs.runTask(input, abort),
    );
    const arn = tasks?.[0]?.taskArn;
    if (arn) return arn;
    const reasons = failures.map((f) => [f.reason, f.detail].filter(Boolean).join(" ")).join("; ");
    // Each instance of a cluster has its own reason. If one only lacks room, another attempt may succeed.
    const causes = failures.map(({ reason }) => recognize("", reason));
    const known =
      causes.find(({ problem = "" }) => problem in TRANSIENT) ?? causes.find(({ problem }) => problem);
    const cause = { operation: "ecs:RunTask", ...known };
    return new Failure("system", `ecs:RunTask started no task: ${reasons || "AWS gave no reason"}`, cause);
  }

  /** Describes tasks, 100 per call. The result lacks those that ECS does not know. */
  async describeTasks(arns: readonly string[], limits: Limits, include?: ["TAGS"]): Promise<Task[]> {
    if (arns.length === 0) return [];
    const input = { cluster: this.location.Cluster, tasks: arns.slice(0, 100), ...(include && { include }) };
    const { tasks = [] } = await this.#ecs("DescribeTasks", limits, (ecs, abort) =>
      ecs.describeTasks(input, abort),
    );
    return [...tasks, ...(await this.describeTasks(arns.slice(100), limits, include))];
  }

  /** Describes a known task. ECS is eventually consistent, so a single MISSING proves nothing. */
  async describeTask(arn: string, limits: Limits, calls = 4): Promise<Task | undefined> {
    const [task] = await this.describeTasks([arn], limits);
    if (task || calls === 1) return task;
    await sleep(1_500, limits.signal);
    return this.describeTask(arn, limits, calls - 1);
  }

  /**
   * Stops a task, unless it is gone. @param reason contains no text of a job's author
   * @param visibleBy ms of `now`, until which ECS may not know the task yet
   */
  async stopTask(task: string, reason: string, limits: Limits, visibleBy = 0): Promise<void> {
    const isGone = (error: unknown) => causeOf(error).problem === "noTask";
    const isInvisible = (error: unknown) => isGone(error) && this.context.now() < visibleBy;
    const shouldRetry = (error: unknown) => isRetryableStop(error) || isInvisible(error);
    const input = { cluster: this.location.Cluster, task, reason };
    await this.#ecs("StopTask", { ...limits, shouldRetry }, (ecs, abort) => ecs.stopTask(input, abort)).catch(
      (error) => {
        if (isGone(error)) return;
        if (error === limits.signal?.reason) throw error;
        throw new Failure(
          "system",
          `${task} may still be running (${reasonOf(error)}); stop it by hand`,
          causeOf(error),
        );
      },
    );
  }

  /** The ARNs of the cluster's tasks that have not stopped: those with this `startedBy`, or all. */
  async listTasks(startedBy: string | undefined, limits: Limits, nextToken?: string): Promise<string[]> {
    const input = { cluster: this.location.Cluster, startedBy, nextToken };
    const patient = { ...limits, shouldRetry: isRetryableStop };
    const page = await this.#ecs("ListTasks", patient, (ecs, abort) => ecs.listTasks(input, abort));
    if (!page.nextToken) return page.taskArns ?? [];
    if (this.context.now() > limits.until)
      throw new Failure("system", "ecs:ListTasks has more pages than can be read in time");
    return [...(page.taskArns ?? []), ...(await this.listTasks(startedBy, limits, page.nextToken))];
  }

  /** Describes a task definition: by family, the latest active revision; undefined if there is none. */
  async describeTaskDefinition(taskDefinition: string, limits: Limits): Promise<TaskDefinition | undefined> {
    const describe = (ecs: ECS, abort: Abort) => ecs.describeTaskDefinition({ taskDefinition }, abort);
    const answer = await this.#ecs("DescribeTaskDefinition", limits, describe).catch((error) => {
      if (causeOf(error).problem !== "definition") throw error;
    });
    return answer?.taskDefinition;
  }

  /** Registers a task definition, in one call that is not repeated. @returns its ARN, with its revision */
  async registerTaskDefinition(input: RegisterTaskDefinitionCommandInput, limits: Limits): Promise<string> {
    const once = { ...limits, shouldRetry: () => false };
    const { taskDefinition } = await this.#ecs("RegisterTaskDefinition", once, (ecs, abort) =>
      ecs.registerTaskDefinition(input, abort),
    );
    return `${taskDefinition?.taskDefinitionArn}`;
  }

  /** The ARNs of all active task definitions of the account and region. */
  async listTaskDefinitions(limits: Limits, nextToken?: string): Promise<string[]> {
    const page = await this.#ecs("ListTaskDefinitions", limits, (ecs, abort) =>
      ecs.listTaskDefinitions({ nextToken }, abort),
    );
    const arns = page.taskDefinitionArns ?? [];
    return page.nextToken ? [...arns, ...(await this.listTaskDefinitions(limits, page.nextToken))] : arns;
  }

  async deregisterTaskDefinition(taskDefinition: string, limits: Limits): Promise<void> {
    await this.#ecs("DeregisterTaskDefinition", limits, (ecs, abort) =>
      ecs.deregisterTaskDefinition({ taskDefinition }, abort),
    );
  }

  /** The public address of a network interface; undefined if it has none, or EC2 does not know it yet. */
  async publicAddress(networkInterfaceId: string, limits: Limits): Promise<string | undefined> {
    const ec2 = await this.ec2Client();
    const input = { NetworkInterfaceIds: [networkInterfaceId] };
    const describe = (abort: Abort) => ec2.describeNetworkInterfaces(input, abort);
    const answer = await this.send("ec2:DescribeNetworkInterfaces", limits, describe).catch(
      (failure: Failure) => {
        // EC2 may learn of the interface later than ECS.
        if (failure.cause.error !== "InvalidNetworkInterfaceID.NotFound") throw failure;
      },
    );
    return answer?.NetworkInterfaces?.[0]?.Association?.PublicIp;
  }
}

/** The id and address of a task's network interface, undefined until it is attached. Prefers IPv4 to IPv6. */
function interfaceOf(task: Task): Record<"id" | "address", string | undefined> {
  const eni = task.attachments?.find((attachment) => attachment.type === "ElasticNetworkInterface");
  const detail = (wanted: string) => eni?.details?.find(({ name }) => name === wanted)?.value;
  const shared = task.containers?.flatMap((container) => container.networkInterfaces ?? [])[0];
  const address = detail("privateIPv4Address") || shared?.privateIpv4Address || shared?.ipv6Address;
  return { id: detail("networkInterfaceId"), address };
}

/** Whether a task is stopping or has stopped. desiredStatus may be STOPPED before lastStatus changes. */
const isEnding = (task: Task): boolean =>
  task.desiredStatus === "STOPPED" ||
  /^(DEACTIVATING|STOPPING|DEPROVISIONING|STOPPED|DELETED)$/.test(task.lastStatus ?? "");

/** Why a task stopped, in AWS's words: stop code, reason, and the exit code and reason of each container. */
function explainStop(task: Task): string {
  const stopped = [task.stopCode, task.stoppedReason].filter(Boolean).join(": ") || "ECS gave no reason";
  const containers = task.containers?.map(({ name, exitCode, reason }) => {
    if (exitCode === undefined && !reason) return "";
    const code = exitCode === undefined ? "no exit code" : `exit code ${exitCode}`;
    return `; container ${name}: ${[code, reason].filter(Boolean).join(", ")}`;
  });
  return [stopped, ...(containers ?? [])].join("");
}

const STOPPED = "task"; // the operation of a Cause if the task itself ended
const OWN_STOP = /^(fargate sweep: |job )/; // the reasons that this driver gives to StopTask
/** Why a task stopped, as a value for decisions. */
function stopCause({ stopCode, stoppedReason = "", containers = [] }: Task): Cause {
  const reasons = containers.map((container) => container.reason);
  const { problem, subject } = recognize(stopCode ?? "", stoppedReason, ...reasons, stopCode);
  const isOwn = problem === "userStop" && OWN_STOP.test(stoppedReason);
  const named = containers.filter(({ reason }) => reason && recognize("", reason).problem === problem);
  const names = named.map(({ name = "" }) => name);
  return { operation: STOPPED, problem: isOwn ? "ownStop" : problem, subject, containers: names };
}

/**
 * The pause before the next DescribeTasks, in ms, with jitter. Until the task's address is known: 0.5 s, then
 * 2 s, and 5 s after a minute. After that, polls only watch for the task's end: 5 s to 15 s, longer the
 * longer the task has taken. All jobs of an account share 20 such calls per second, so each throttled call
 * lengthens the pauses, up to 10 s before the address is known and 30 s after.
 * @param waited ms since the start of the task
 */
function pollPause(waited: number, addressKnown: boolean, random: number, throttled = 0): number {
  const forAddress = waited < 500 ? 500 : waited <= 60_000 ? 2_000 : 5_000;
  const pause = addressKnown ? Math.min(Math.max(waited / 2.5, 5_000), 15_000) : forAddress;
  return Math.min(pause * (1 + throttled), addressKnown ? 30_000 : 10_000) * (0.75 + random / 2);
}

/** A manager that is itself an ECS task. Cluster: name or ARN */
type ManagerTask = Readonly<Record<"id" | "Cluster" | "Region", string>>;
const METADATA_TIMEOUT_MS = 2_000;
const MetadataSchema = v.object({
  Cluster: v.string(),
  TaskARN: v.pipe(v.string(), v.regex(/^arn:aws[\w-]*:ecs:[\w-]+:\d{12}:task\/([\w-]+\/)?[0-9a-f]{32}$/)),
});
/** The ECS task that this process runs in, from the task metadata endpoint, version 4. @throws {Failure} */
async function readOwnTask(endpoint: string): Promise<ManagerTask> {
  // Not by `fetch`, which would ask a proxy for this link-local address.
  const { get } = await import("node:http");
  const signal = AbortSignal.timeout(METADATA_TIMEOUT_MS);
  try {
    const text = await new Promise<string>((resolve, reject) => {
      const onAnswer = (answer: Readable) =>
        answer.toArray().then((parts) => resolve(parts.join("")), reject);
      get(`${endpoint}/task`, { signal }, onAnswer).on("error", reject);
    });
    const { Cluster, TaskARN } = readJson(text, MetadataSchema);
    return { id: TaskARN.slice(-32), Cluster, Region: TaskARN.split(":")[3] ?? "" };
  } catch (error) {
    const reason = signal.aborted ? `no answer within ${METADATA_TIMEOUT_MS / 1000} s` : reasonOf(error);
    throw new Failure("system", `the ECS task metadata endpoint ${endpoint} cannot be used: ${reason}`);
  }
}

// 9. SSH ------------------------------------------------------------------------------------------------
// Logs in to a task's SSH server, runs scripts and short commands, and terminates scripts. Uses failures,
// `sleep` and types of the sections above. Must not call AWS, use records, or trust what the server sends.

/** The server to log in to, and the login's settings. */
interface SshTarget
  extends Pick<Config["SSH"], "Port" | "Username" | "KeepAliveInterval" | "CancelGracePeriod"> {
  readonly host: string;
  readonly privateKey: string;
  readonly hostKey?: Buffer; // the only host key that is accepted; undefined for the first login
  readonly toSend?: number; // bytes of the script to send
  readonly PassEnvironment?: readonly string[];
}

/** A login. `target`: for a second connection to the same server. */
type Connection = Readonly<{ client: Client; hostKey: Buffer; socket: Socket; target: SshTarget }>;

/** No usable connection. `unreachable` and `unverified` (ECS did not answer) are transient. */
class SshFailure extends Failure {
  readonly why: "unreachable" | "unverified" | "login" | "host-key";
  constructor(why: SshFailure["why"], message: string, cause: Cause = {}) {
    super("system", message, cause);
    this.why = why;
  }
}

/** An error of ssh2 with its level, or of the operating system with its code. */
type SshError = Error & { level?: string; code?: unknown };

// Memory limits in bytes. ssh2 has none. A server that follows the protocol stays far below them.
const MAX_UNSENT = 2 ** 20; // unsent replies, besides the script; a reply of 36 bytes takes 1.5 KB
const MAX_UNWRITTEN = 32 * 2 ** 20; // unwritten output; ssh2 does not enforce its window of 2 MiB
const WINDOW_LIMIT = 2 ** 20; // with more unwritten output, the window stays closed
const MAX_RSS_GROWTH = 512 * 2 ** 20; // growth of the whole process

/** Destroys the socket of a server that makes this process use too much memory. */
function limitMemory(socket: Socket, toSend: number): void {
  const maxRss = process.memoryUsage.rss() + MAX_RSS_GROWTH + 2 * toSend;
  let bytesAtLastCheck = 0;
  socket.on("data", () => {
    if (socket.writableLength > MAX_UNSENT + toSend)
      socket.destroy(new Error("the server sends requests without reading the replies"));
    if (socket.bytesRead < bytesAtLastCheck + 2 ** 20) return;
    bytesAtLastCheck = socket.bytesRead;
    // bun is slow to collect the garbage of many small packets.
    if (process.memoryUsage.rss() > maxRss - MAX_RSS_GROWTH / 2) Bun.gc(true);
    if (process.memoryUsage.rss() > maxRss)
      socket.destroy(new Error("the server makes this process use too much memory"));
  });
}

/** Why SSH failed. Quotes or omits the server's text, which must not pass for the driver's or AWS's. */
function sshReason(error: Error): string {
  if (error instanceof TypeError || error instanceof RangeError) return "the server broke the protocol";
  if (error.message.startsWith("Wrong signature type: "))
    return "the server signed with another algorithm than agreed";
  const isServersText = ("code" in error && typeof error.code === "number") || "reason" in error;
  return isServersText
    ? `the server says "${printable(reasonOf(error)).replaceAll('"', "'").slice(0, 300)}"`
    : reasonOf(error);
}

// ---- Start of ssh2's internals ----
// This block contains every use of ssh2's private parts. A test fails for any version of ssh2 but 1.17.0,
// whose source was read for it. The compiled program lacks the parts that the driver does not use, such as
// SFTP, agents and compression (.ci/build.ts).

/** Loads ssh2's client alone: the package's main module also loads its server, http and more. */
async function newClient(): Promise<Client> {
  // @ts-expect-error: has no types
  const { default: Client } = await import("ssh2/lib/client.js");
  await ignoreGlobalRequests();
  return new Client();
}

type Handler = (protocol: { requestFailure(): void; ping(): void }, payload: Buffer) => void;

/**
 * Replaces ssh2's handler of global requests (message 80 of RFC 4254), none of which this driver needs.
 * ssh2's own handler parses announced host keys with regular expressions, which take minutes for some texts,
 * and keeps the keys until the server proves that it has them. No issue of ssh2 describes this.
 */
async function ignoreGlobalRequests(): Promise<void> {
  // @ts-expect-error: has no types; a table of functions by message number
  const module = await import("ssh2/lib/protocol/handlers.js");
  const handlers: Record<number, Handler> = module.default;
  handlers[80] = (protocol, payload) => {
    const wantsReply = payload[5 + payload.readUInt32BE(1)]; // follows the request's name
    if (wantsReply) protocol.requestFailure();
    else protocol.ping(); // without a reply, sshd's next packet waits 40 ms for TCP's acknowledgement
  };
}

/**
 * Sends the signature with the first login request. ssh2 asks first whether the server accepts the key, which
 * takes a round trip and a second check of the key. The server has proved its identity by then.
 */
function signAtOnce(client: Client): void {
  type Key = { sign(data: Buffer, hash?: string): Buffer | Error };
  type Sign = (data: Buffer, use: (signature: Buffer) => void) => void;
  type Protocol = { authPK(user: string, key: Key, algorithm?: string, sign?: Sign): void };
  const { _protocol: protocol } = client as unknown as { _protocol: Protocol };
  const authPK = protocol.authPK.bind(protocol);
  protocol.authPK = (user, key, algorithm, sign) => {
    const hash = { "rsa-sha2-256": "sha256", "rsa-sha2-512": "sha512", "ssh-rsa": "sha1" }[algorithm ?? ""];
    const signNow: Sign = (data, use) => {
      const signature = key.sign(data, hash);
      if (signature instanceof Error) authPK(user, key, algorithm);
      else use(signature);
    };
    authPK(user, key, algorithm, sign ?? signNow);
  };
}

/** The largest packet that the server accepts, in bytes. At 0, ssh2 would send for ever (its issue 1504). */
const maxPacketSize = (channel: ClientChannel): number =>
  (channel.outgoing as { packetSize: number }).packetSize;

/**
 * Lets the server send more on a channel only while `mayGrow`. ssh2 opens the window whenever it has passed
 * data to a stream, and accepts data beyond the window (its issue 1505). Pausing a stream would keep the
 * window closed as well, but would reorder standard output and standard error.
 * @returns `update`, to be called when `mayGrow` may have changed; `isClosed`: whether the server has closed
 * the channel
 */
function controlWindow(client: Client, channel: ClientChannel, mayGrow: () => boolean) {
  type Protocol = { channelWindowAdjust(id: number, bytes: number): void };
  const { _protocol: protocol } = client as unknown as { _protocol: Protocol };
  const adjust = protocol.channelWindowAdjust.bind(protocol);
  const server = channel.outgoing as { id: number; state: string };
  const isClosed = () => server.state === "closed"; // another channel may then have this id
  let withheld = 0; // bytes
  const update = (bytes = 0) => {
    withheld += bytes;
    if (withheld === 0 || !mayGrow() || isClosed()) return;
    adjust(server.id, withheld);
    withheld = 0;
  };
  protocol.channelWindowAdjust = (id, bytes) =>
    id === server.id && !isClosed() ? update(bytes) : adjust(id, bytes);
  return { update, isClosed };
}
// ---- End of ssh2's internals ----

/** Waits for `promise`. Calls `onAbort` if `signal` aborts meanwhile or has already aborted. */
async function withAbort<T>(signal: AbortSignal, onAbort: () => void, promise: Promise<T>): Promise<T> {
  signal.addEventListener("abort", onAbort);
  if (signal.aborted) onAbort();
  return promise.finally(() => signal.removeEventListener("abort", onAbort));
}

const ALGORITHMS: ConnectConfig["algorithms"] = {
  cipher: { remove: "chacha20-poly1305@openssh.com", append: [], prepend: [] }, // fails under bun
  serverHostKey: { remove: "ssh-rsa", append: [], prepend: [] }, // SHA-1, which OpenSSH 8.8 refuses as well
  // No Diffie-Hellman groups: under bun, ssh2 tests the prime in each key exchange, which blocks this process
  // for half a minute at 8192 bits. OpenSSH has had ECDH since 5.7.
  // P-256 first: it is as strong as curve25519, and faster in OpenSSL, which both sides use.
  kex: [
    "ecdh-sha2-nistp256",
    "curve25519-sha256",
    "curve25519-sha256@libssh.org",
    "ecdh-sha2-nistp384",
    "ecdh-sha2-nistp521",
  ],
  compress: ["none"], // a few bytes from a server could expand without limit
};
const CONNECT_TIMEOUT_MS = 3_000; // for the TCP connection
// The same while prepare waits for a task. Linux repeats an unanswered packet after 1 s and then, before 6.5,
// after 2 s more; a new attempt is faster.
const SHORT_CONNECT_TIMEOUT_MS = 1_000;
const MAX_SILENCE_MS = 15_000; // from the TCP connection to the server's first bytes
const LOGIN_TIMEOUT_MS = 30_000; // from the first bytes to the login; busy hosts, DNS and PAM take long

/**
 * Limits the time, in ms, for each phase of a login: TCP connection, the server's first bytes, login.
 * @returns a function that removes the limits
 */
function limitPhases(
  socket: Socket,
  { tcp, silence, login }: Readonly<Record<"tcp" | "silence" | "login", number>>,
  onTimeout: (text: string, problem: Problem) => void,
): () => void {
  let timer: NodeJS.Timeout | undefined;
  const limit = (ms: number, text: string, problem: Problem) => {
    clearTimeout(timer);
    timer = setTimeout(() => onTimeout(text, problem), ms);
  };
  const limitSilence = (ms: number) => limit(ms, `nothing answered for ${ms / 1000} s`, "silent");
  const late = `login did not complete within ${login / 1000} s`;
  limitSilence(Math.min(tcp, silence));
  socket.once("connect", () => limitSilence(silence));
  socket.once("data", () => limit(login, late, "noServer"));
  return () => clearTimeout(timer);
}

/** A socket for ssh2, which reads from it only when it is loaded. */
async function newSocket(): Promise<Socket> {
  const { Socket } = await import("node:net");
  const socket = new Socket();
  socket.setNoDelay(true); // otherwise a short packet may wait 40 ms for the last one's acknowledgement
  return socket.pause();
}

/** Opens a TCP connection. `onError` gets every later error as well. */
function openTcp(socket: Socket, { host, Port: port }: SshTarget, onError: (error: Error) => void) {
  const opened = Promise.withResolvers<void>();
  const closed = new SshFailure("unreachable", "the connection was closed");
  socket.on("error", onError).once("close", () => opened.reject(closed));
  socket.connect({ host, port }, opened.resolve);
  return opened.promise;
}

/** Classifies an error that ends a login. @returns SshFailure's `why`, a message, and the problem */
function classifyLoginError(error: SshError): [SshFailure["why"], string, Problem] {
  const { level, code } = error;
  if (level === "client-authentication") return ["login", "the server refused the key", "key"];
  if (level === "handshake") return ["unreachable", sshReason(error), "algorithms"];
  if (code === undefined) return ["unreachable", sshReason(error), "noServer"];
  return ["unreachable", sshReason(error), code === "ECONNREFUSED" ? "refused" : "silent"];
}

const loginOptions = ({ Username, privateKey, KeepAliveInterval }: SshTarget): ConnectConfig => ({
  username: Username,
  privateKey,
  authHandler: ["publickey"],
  readyTimeout: 0, // `limitPhases` limits the time
  keepaliveInterval: KeepAliveInterval * 1000,
  keepaliveCountMax: 2,
  algorithms: ALGORITHMS,
});

/**
 * Logs in once. @throws {SshFailure}, or the reason of `signal`
 * @param silence max ms from the TCP connection to the server's first bytes, which `onAnswer` reports
 * @param tcp max ms for the TCP connection
 */
async function connect(
  target: SshTarget,
  silence: number,
  signal: AbortSignal,
  { onAnswer = () => {}, tcp = CONNECT_TIMEOUT_MS } = {},
) {
  const socket = await newSocket();
  signal.throwIfAborted();
  const where = `${target.Username}@${target.host.replace(/.*:.*/, "[$&]")}:${target.Port}`; // as in URLs
  let hostKey: Buffer | undefined;
  const isChanged = () => hostKey !== undefined && target.hostKey?.equals(hostKey) === false;
  const hostVerifier = (key: Buffer) => {
    hostKey = Buffer.from(key);
    return !isChanged();
  };
  const done = Promise.withResolvers<Connection>();
  const end = (reason: unknown) => {
    done.reject(reason);
    // Also after the login: after an error, ssh2 closes only its own half of the connection.
    socket.destroy();
  };
  const fail = (why: SshFailure["why"], text: string, problem: Problem) =>
    end(new SshFailure(why, `${where}: ${text}`, { problem }));
  const onError = (error: SshError) => {
    if (isChanged()) fail("host-key", "the server's host key is not the one that prepare saw", "hostKey");
    else fail(...classifyLoginError(error));
  };
  const limits = { tcp, silence, login: LOGIN_TIMEOUT_MS };
  const clearTimer = limitPhases(socket, limits, (text, problem) => fail("unreachable", text, problem));
  socket.once("data", onAnswer);
  limitMemory(socket, target.toSend ?? 0);
  const logIn = async () => {
    await openTcp(socket, target, onError);
    const client = await newClient(); // is loaded while the server prepares its first bytes
    // The listener for errors stays: an error event without a listener would end the process.
    client.on("error", onError);
    client.on("close", () => fail("unreachable", "the server closed the connection", "noServer"));
    client.on("ready", () => {
      if (hostKey) done.resolve({ client, hostKey, socket, target: { ...target, hostKey, toSend: 0 } });
      else fail("host-key", "the server accepted the login before it sent its host key", "hostKey");
    });
    client.connect({ ...loginOptions(target), sock: socket, hostVerifier });
    signAtOnce(client);
  };
  // If logIn throws, as for a key that ssh2 cannot parse, it is no Failure.
  logIn().catch((error) =>
    end(error instanceof Failure ? error : new SshFailure("login", `${where}: ${error.message}`)),
  );
  return withAbort(signal, () => end(signal.reason), done.promise).finally(clearTimer);
}

// Attempts overlap until the server answers one: packets to an address that is not up yet may be dropped.
// After a refused login there is a pause: the key may be installed later, and OpenSSH 9.8 rejects the client
// for 5 s.
const LOGIN_INTERVAL_MS = 250;
const LOGIN_PAUSE_MS = 5_000;
const MAX_OPEN_LOGINS = 4;

/** Tries to log in until it succeeds. Reports failed attempts. @throws the reason of `signal` */
function logIn(target: SshTarget, signal: AbortSignal, onFailure: (failure: SshFailure) => void) {
  const won = Promise.withResolvers<Connection>();
  const finished = new AbortController();
  const limited = AbortSignal.any([signal, finished.signal]);
  const open = new Map<symbol, boolean>(); // attempts, and whether the server has answered them
  let pause = 0; // intervals
  let silence = 3_000; // ms
  const attempt = async () => {
    if (--pause > 0 || open.size >= MAX_OPEN_LOGINS || [...open.values()].includes(true)) return;
    const id = Symbol();
    open.set(id, false);
    const begun = performance.now();
    try {
      const options = { onAnswer: () => void open.set(id, true), tcp: SHORT_CONNECT_TIMEOUT_MS };
      const connection = await connect(target, silence, limited, options);
      if (limited.aborted) return void connection.client.destroy();
      finished.abort();
      won.resolve(connection);
    } catch (error) {
      if (limited.aborted) return;
      const failure = error as SshFailure;
      // A busy server may need longer for its first bytes: a quarter more, in whole seconds.
      if (performance.now() - begun >= silence)
        silence = Math.min(Math.round(silence / 800) * 1_000, MAX_SILENCE_MS);
      if (failure.why === "login") pause = LOGIN_PAUSE_MS / LOGIN_INTERVAL_MS;
      onFailure(failure);
    } finally {
      open.delete(id);
    }
  };
  const timer = setInterval(attempt, LOGIN_INTERVAL_MS);
  attempt();
  return withAbort(signal, () => won.reject(signal.reason), won.promise).finally(() => clearInterval(timer));
}

/** A command's exit code, or the signal that ended it; undefined if its channel closed without either. */
type Exit = number | NodeJS.Signals | undefined;

/** Opens a channel that runs a command in the login shell. If `signal` aborts, the connection stays open. */
async function openChannel({ client }: Connection, command: string, signal: AbortSignal) {
  signal.throwIfAborted();
  const opened = Promise.withResolvers<{ channel: ClientChannel; exit: Promise<Exit> }>();
  const fail = (text: string) => opened.reject(new SshFailure("unreachable", text));
  const lost = () => (signal.aborted ? opened.reject(signal.reason) : fail("the connection was lost"));
  client.once("close", lost);
  try {
    client.exec(command, (error, channel) => {
      if (error) return fail(`the server opened no channel: ${sshReason(error)}`);
      if (signal.aborted) return channel.close();
      const packetSize = maxPacketSize(channel);
      if (packetSize < 1024) {
        opened.reject(new Failure("system", `the server accepts only packets of ${packetSize} bytes`));
        return client.destroy();
      }
      // Listens at once: a short command's output and end may arrive together with the open channel.
      const exit = new Promise<Exit>((resolve) => {
        channel.on("exit", (code: number | null, name?: string) => resolve(code ?? (name as NodeJS.Signals)));
        channel.on("close", () => resolve(undefined));
      });
      opened.resolve({ channel, exit });
    });
  } catch {
    lost(); // authenticated, then disconnected
  }
  return withAbort(signal, () => opened.reject(signal.reason), opened.promise).finally(() =>
    client.off("close", lost),
  );
}

interface CommandOptions {
  readonly timeoutMs?: number;
  readonly onNewConnection?: boolean;
  readonly result?: { errors: string; exit: Exit }; // receives standard error, and how the command ended
}

// Start-up files may export functions of these names, and may have broken PATH.
const UNSET_FUNCTIONS = "unset -f [ cat command echo env grep kill ls read sleep tr true";
const TOOL_PATH = "PATH=$PATH:/usr/local/bin:/usr/bin:/bin";
/**
 * Runs a short command of the driver's own. If the server opens no second channel (MaxSessions 1), runs it
 * over a new connection.
 * @returns up to 1 MiB of its standard output
 */
async function runCommand(
  connection: Connection,
  program: string,
  signal: AbortSignal,
  options: CommandOptions = {},
): Promise<string> {
  const { timeoutMs = 10_000, onNewConnection, result = { errors: "", exit: undefined } } = options;
  const timeLimit = new AbortController();
  const failure = new SshFailure("unreachable", `the container did not answer for ${timeoutMs / 1000} s`);
  const timer = setTimeout(() => timeLimit.abort(failure), timeoutMs);
  const limited = AbortSignal.any([signal, timeLimit.signal]);
  let own: Connection | undefined;
  try {
    if (onNewConnection) own = await connect(connection.target, timeoutMs, limited);
    const command = `/bin/sh -c '${UNSET_FUNCTIONS}; ${TOOL_PATH}; ${program}'`;
    const { channel, exit } = await openChannel(own ?? connection, command, limited);
    let output = "";
    channel.on("data", (chunk: Buffer) => {
      if (output.length < 2 ** 20) output += chunk.toString();
    });
    channel.stderr.on("data", (chunk: Buffer) => {
      if (result.errors.length < 65_536) result.errors += chunk.toString();
    });
    const closed = Promise.withResolvers<Exit>();
    channel.on("close", () => closed.resolve(exit));
    result.exit = await withAbort(limited, () => closed.reject(limited.reason), closed.promise);
    if (result.exit === undefined) throw new SshFailure("unreachable", "the connection was lost");
    return output;
  } catch (error) {
    if (onNewConnection || limited.aborted || connection.socket.destroyed) throw error;
    return await runCommand(connection, program, limited, { ...options, onNewConnection: true });
  } finally {
    clearTimeout(timer);
    own?.client.end();
  }
}

/**
 * Finds the container's shells, and whether PassEnvironment can work: if not, `warning` explains why.
 * @throws {Failure} with the output of a login shell that runs no commands
 */
async function findShells(connection: Connection, signal: AbortSignal) {
  const program = [
    'echo "fargate-shells $SHELL $(command -v bash || command -v sh)";',
    "n=; { read -r n </proc/1/comm; } 2>/dev/null;",
    "s=closed; { true </proc/1/environ; } 2>/dev/null && s=open;",
    'command -v tr >/dev/null || s=tr; [ "$n" = sshd ] && s=sshd;',
    // ECS sets AWS_* and ECS_* variables in every container. If sessions have any, the image passes them.
    'env | grep -Eq "^(FARGATE_ENVIRONMENT|(AWS|ECS)_[A-Z0-9_]+)=" && s=passed;',
    'echo "fargate-environment $s"',
  ].join(" ");
  const result = { errors: "", exit: undefined as Exit };
  const output = await runCommand(connection, program, signal, { result });
  const [, login = "", best] = /fargate-shells (\S*) (\S+)/.exec(output) ?? [];
  if (!best) {
    const lines = `${output}\n${result.errors}`.split("\n").filter((line) => line.trim() !== "");
    const ended = typeof result.exit === "string" ? result.exit : `exit code ${result.exit}`;
    const how = `${ended}${lines.length > 0 ? " and this output:" : " and no output"}`;
    const problems = { 1: "loginShell", 126: "noShell", 127: "noShell" } as const;
    const problem = problems[Number(result.exit) as keyof typeof problems] ?? "startUpFile";
    throw new Failure(
      "system",
      `the container's login shell runs no commands: ${how}`,
      { problem },
      lines.slice(-20),
    );
  }
  const Interpreter: TaskRecord["Interpreter"] = /bash$/.test(best) ? "bash" : "sh";
  const reasons: Record<string, string> = {
    sshd: "sshd is the container's first process and has overwritten its environment",
    closed: "Username may not read the environment of the container's first process",
    tr: "the image has no tr",
  };
  const [, state] = /^fargate-environment (sshd|closed|tr)$/m.exec(output) ?? [];
  const instead =
    'start sshd with -o "SetEnv=NAME=$NAME ..." (see docs/worker-images.md), or set PassEnvironment = []';
  const isLost = state && connection.target.PassEnvironment?.length;
  const warning = isLost ? `PassEnvironment has no effect: ${reasons[state]}; ${instead}` : undefined;
  return { Interpreter, LoginShell: basename(login), warning };
}

/**
 * The shell that a script's first line asks for. @param best the best shell in the container
 * @throws {Failure} for any shell but bash and sh: in a wrong shell, the script could do harm
 * @example interpreterOf(Buffer.from("#!/usr/bin/env bash\n\nset -eo pipefail\n"), "bash") // "bash"
 */
function interpreterOf(script: Buffer, best: TaskRecord["Interpreter"]): "bash" | "sh" {
  const start = script.subarray(0, 256).toString("latin1");
  const [, named = "bash"] = /^#!\s*(?:\S*\/env\s+(?:-\S+\s+)*)?(\S+)/.exec(start) ?? [];
  // Without `#!`: how GitLab Runner's scripts for other shells begin, with byte-order marks in Latin-1.
  const isForeign = /^(\xef\xbb\xbf|\xff\xfe|\xfe\xff|\s*& ?\{|\s*@echo off)/i.test(start);
  const name = isForeign ? "PowerShell or cmd.exe" : named.split("/").at(-1);
  if (name === "sh") return "sh";
  if (name === "bash") return best;
  const instead = `only bash and sh are supported; set shell = "bash" in the runner's config.toml`;
  throw new Failure("system", `the script is for ${name}, but ${instead}`);
}

/** Shell code that runs a program even if a start-up file broke PATH or defined a function of its name. */
const tool = (words: string) => `{ command ${words} 2>/dev/null || command -p ${words} 2>/dev/null; }`;

/**
 * Shell code that copies variables from the container's first process, without evaluating their values.
 * Variables that the login or a start-up file has set keep their values; in PATH, the first process's value
 * replaces the part that sshd has set. Does nothing if sshd is the first process: it has overwritten its
 * variables. FARGATE_N: a variable's name; _V: its value; _P: sshd's PATH; _RS: \036, which stands for line
 * breaks until the variable is set.
 */
function passEnvironment(patterns: readonly string[]): string {
  // Spelled out, because the meaning of a range depends on the locale.
  const letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZ_abcdefghijklmnopqrstuvwxyz";
  const reserved = "UID|EUID|PPID|SHELLOPTS|BASHOPTS|BASH_ENV|BASH_XTRACEFD|ENV|IFS|PS4|POSIXLY_CORRECT";
  const passesPath = new RegExp(`^(${patterns.join("|").replaceAll("*", "\\w*")})$`).test("PATH");
  const sshdPath = `$(${tool('tr "\\000" "\\n"')} </proc/$$/environ | ${tool('sed -n "s/^PATH=//p"')})`;
  return [
    "FARGATE_N=; { command read -r FARGATE_N </proc/1/comm; } 2>/dev/null;",
    `FARGATE_P=${passesPath ? sshdPath : ""};`,
    "FARGATE_ALL=; case $FARGATE_N in sshd) ;; *) FARGATE_ALL=$(",
    `${tool('tr "\\000\\n" "\\n\\036"')} 2>/dev/null </proc/1/environ);; esac; set -f; IFS=\${IFS#??};`,
    "for FARGATE_V in $FARGATE_ALL; do FARGATE_N=${FARGATE_V%%=*}; FARGATE_V=${FARGATE_V#*=};",
    `case $FARGATE_N in ""|[0123456789]*|*[!${letters}0123456789]*) continue;;`,
    `_|OLDPWD|SSH_*|FARGATE_*|${reserved}) continue;; esac;`,
    `case $FARGATE_N in ${patterns.join("|")}) ;; *) continue;; esac;`,
    'while :; do case $FARGATE_V in *"$FARGATE_RS"*)',
    'FARGATE_V=${FARGATE_V%%"$FARGATE_RS"*}$IFS${FARGATE_V#*"$FARGATE_RS"};; *) break;; esac; done;',
    'eval "FARGATE_SET=\\${$FARGATE_N+set}"; case $FARGATE_N$FARGATE_SET in PATHset)',
    'case $PATH in *"${FARGATE_P:-:none:}"*)',
    'PATH=${PATH%%"$FARGATE_P"*}$FARGATE_V${PATH#*"$FARGATE_P"};; esac;;',
    '*set) export "$FARGATE_N";; *) export "$FARGATE_N=$FARGATE_V";; esac; done; set +f;',
    "unset FARGATE_N FARGATE_V FARGATE_SET FARGATE_P FARGATE_ALL;",
  ].join(" ");
}

/**
 * The program that the remote shell runs. It receives the script on standard input, followed by `mark` (a
 * random text), so that no part of the script is in an argument, a file or the environment. It is one line
 * without single quotes, so that it can be quoted for any login shell. It
 *  - undoes changes by start-up files: shell options, aliases, IFS. The first assignment turns on
 *    bash's POSIX mode, in which functions cannot replace special builtins; `command` ignores all other
 *    functions;
 *  - prints the first mark with its process id and /proc/PID/stat, then the pipes that it writes to;
 *  - reads the script into a variable, and continues only if the mark follows: if the connection breaks, no
 *    part of the script runs;
 *  - prints the second mark, then evaluates the script in the same shell, with empty standard input.
 */
function remoteProgram(mark: string, patterns: readonly string[] = []): string {
  const program = [
    "unset FARGATE_SCRIPT; FARGATE_SCRIPT=; { command read -r FARGATE_SCRIPT </proc/$$/stat; } 2>/dev/null;",
    `command echo "${mark} $$ $FARGATE_SCRIPT"; (${tool("ls -ln /proc/$$/fd/1 /proc/$$/fd/2")});`,
    `FARGATE_SCRIPT=$(${tool("cat")}); case $FARGATE_SCRIPT in *"${mark}") ;;`,
    `*) command echo "${mark} incomplete"; exit 1;; esac; FARGATE_SCRIPT=\${FARGATE_SCRIPT%"${mark}"};`,
    'IFS=$(command printf " \\t\\n\\036"); FARGATE_RS=${IFS#???}; IFS=${IFS%?}; FARGATE_IFS=$IFS;',
    patterns.length > 0 ? passEnvironment(patterns) : "",
    `command echo "${mark} complete"; exec </dev/null;`,
    "IFS=$FARGATE_IFS; unset POSIXLY_CORRECT FARGATE_RS FARGATE_IFS;",
    "command shopt -u inherit_errexit 2>/dev/null;", // POSIX mode leaves it on
    'command eval "command unset FARGATE_SCRIPT; $FARGATE_SCRIPT"',
  ].join(" ");
  const neutral =
    "\\unset -f command; \\set +abefmuvxC; \\command unalias -a; \\command trap - DEBUG 2>/dev/null";
  return `POSIXLY_CORRECT=1; ${neutral}; \\eval "${program.replace(/[\\"$`]/g, "\\$&")}"`;
}

/** Removes `remoteProgram`'s own lines from the output, however that is divided into chunks. */
class Preamble {
  /** Known after the first mark. `start`: ticks since boot. Without /proc, `session` is set to `pid`. */
  shell: Readonly<{ pid: number; session: number; start: number }> | undefined;
  pipes: readonly string[] = []; // the shell's standard output and error, such as pipe:[123]
  state: "pending" | "incomplete" | "complete" = "pending";
  held: Buffer = Buffer.alloc(0); // may be part of a mark; without a mark, output of start-up files

  constructor(readonly mark: string) {}

  /** @returns the bytes that the program did not print: output of start-up files, then the script's */
  push(chunk: Buffer): Buffer {
    if (this.state !== "pending") return chunk;
    const data = Buffer.concat([this.held, chunk]);
    const text = data.toString("latin1");
    // A start-up file may print the program itself, for example by `ps`. There, no number follows the mark.
    const first = this.shell ? undefined : new RegExp(`${this.mark} (\\d{1,10}) (.{0,600})\\n`).exec(text);
    const beforeMark = this.shell ? 0 : (first?.index ?? Math.max(data.length - 1_024, 0)); // bytes
    if (first) {
      const [, , , session, ...more] = first[2]?.replace(/^.*\) /, "").split(" ") ?? []; // from field 3
      this.shell = {
        pid: Number(first[1]),
        session: Number(session ?? first[1]),
        start: Number(more[15] ?? 0), // field 22
      };
    }
    const second =
      this.shell && new RegExp(`${this.mark} (complete|incomplete)\\n`).exec(text.slice(beforeMark));
    this.held = data.subarray(this.shell ? Math.max(beforeMark, data.length - 8_192) : beforeMark);
    if (!second) return data.subarray(0, beforeMark);
    this.state = second[1] as "incomplete" | "complete";
    this.pipes = second.input.slice(0, second.index).match(/\w+:\[\d+\]$/gm) ?? [];
    return Buffer.concat([
      data.subarray(0, beforeMark),
      data.subarray(beforeMark + second.index + second[0].length),
    ]);
  }
}

/** How long to wait, in ms, if a script's shell has exited but its channel stays open. */
const DRAIN_MS = {
  tick: 50, // between two looks at the channel
  filter: 10_000, // for a filter, or for unknown processes
  background: 2_000, // for background processes
  silence: 500, // for background processes that write nothing
} as const;
const MAX_BUFFERED = 16 * 2 ** 20; // bytes; more than sshd, network and ssh2 buffer of an ended script

/**
 * Finds the processes that hold a channel open, in a listing of /proc: those that can write to one of its
 * pipes. A process that also reads from a pipe is a filter, such as `tee` in `exec > >(tee log)`; any other
 * is a background process.
 * @returns `filter`: whether there is a filter; `paths`: for each held pipe, its path in /proc/PID/fd of the
 * oldest such process; undefined if the listing shows no links
 */
function findPipeHolders(listing: string, pipes: readonly string[]) {
  const found = listing.matchAll(/^l.(.).* \/proc\/(\d+)\/fd\/(\d) -> (.+)$/gm);
  const links = [...found].map(([, mode, pid, fd, target = ""]) => ({ mode, pid, fd, target }));
  if (links.length === 0 || pipes.length === 0) return undefined;
  const writers = links.filter(({ mode, target }) => mode === "w" && pipes.includes(target));
  const readers = links
    .filter(({ fd, target }) => fd === "0" && target.startsWith("pipe:"))
    .map(({ pid }) => pid);
  writers.sort((a, b) => Number(b.pid) - Number(a.pid));
  const paths = new Map(writers.map(({ pid, fd, target }) => [target, `/proc/${pid}/fd/${fd}`]));
  return { filter: writers.some(({ pid }) => readers.includes(pid)), paths: [...paths.values()] };
}

/**
 * Terminates a script: SIGTERM to its process group and to processes that have left the group but not the
 * session (`timeout`, `set -m`), SIGKILL after the grace period. Uses a command, because OpenSSH ignores
 * signal requests for root. In /proc/PID/stat, the name is followed by: 1 state, 3 process group, 4 session,
 * 20 start time. Under dropbear, the server's process leads session and group. It is older than the script's
 * shell and is left alone; the shell gets SIGTERM first.
 * @returns "terminated", "not found", "not ended" or "no answer"
 */
async function terminate(connection: Connection, { pid, session, start }: NonNullable<Preamble["shell"]>) {
  const grace = connection.target.CancelGracePeriod;
  const sharesSession = pid !== session; // under dropbear, with all other channels of the connection
  const first = sharesSession ? `${pid}` : `-${pid}`;
  const program = [
    'left() { for f in /proc/[0-9]*/stat; do { read -r l <"$f"; } 2>/dev/null || continue;',
    "i=${l%% *}; set -- ${l##*) };",
    `[ "$4" = ${session} ] && [ "$1" != Z ] && [ "\${20}" -ge ${start} ] || continue;`,
    '[ "$3" = "$skip" ] || [ "$i" = "$skip" ] || echo "$i"; done;',
    `[ -e /proc/self ] || { [ -z "$skip" ] && kill -0 ${first} && echo ${first}; }; };`,
    "skip=; set -- $(left);",
    `kill -TERM ${first}; skip=${pid}; kill -TERM $(left); skip=; sleep ${grace} >/dev/null 2>&1 & k=$!;`,
    'while [ -n "$(left)" ] && kill -0 $k; do sleep 0.1 || sleep 1; done; kill $k; i=0;',
    `kill -KILL ${first}; kill -KILL $(left);`,
    'while [ -n "$(left)" ] && [ $i -lt 10 ]; do i=$((i+1)); sleep 0.1 || { sleep 1; i=$((i+9)); }; done;',
    "echo fargate-terminated $# left $(left)", // the number of processes, and those that SIGKILL did not end
  ].join(" ");
  // 8 s for this shell to start and for SIGKILL to take effect: less than the 10 s that SECURITY.md promises.
  const options = { timeoutMs: grace * 1000 + 8_000, onNewConnection: sharesSession };
  const answer = await runCommand(connection, program, new AbortController().signal, options).catch(() => "");
  const [, found, left] = /^fargate-terminated (\d+) left(.*)$/m.exec(answer) ?? [];
  if (found === undefined) return "no answer";
  if (left?.trim()) return "not ended";
  return found === "0" ? "not found" : "terminated";
}

/** How a script ended. `begun`: part of it may have run. `wasSilent`: no answer to keep-alive requests. */
type Outcome =
  | { readonly ended: "exited"; readonly code: number; readonly isExplained?: boolean }
  | { readonly ended: "lost"; readonly begun: boolean; readonly wasSilent: boolean; readonly reason: string };

/**
 * Writes a script's output to its sinks, one part after the other: both sinks may lead to the same pipe, and
 * the two streams must keep their order. Never pauses the streams; `controlWindow` keeps the server from
 * sending instead.
 */
class OutputWriter {
  received = 0; // bytes
  unwritten = 0; // bytes that no sink has accepted yet
  #written: Promise<void> = Promise.resolve();
  #gathered: { sink: OutputSink; parts: Buffer[] } | undefined;

  /** @param onWritten called whenever a sink has accepted a part */
  constructor(private readonly onWritten: () => void) {}

  /** Queues a part. Gathers short parts for one turn of the event loop: each write costs memory and time. */
  write(sink: OutputSink, part: Buffer): void {
    if (part.length === 0) return;
    this.received += part.length;
    this.unwritten += part.length;
    if (this.#gathered?.sink !== sink) this.flush();
    if (!this.#gathered) setImmediate(() => this.flush());
    this.#gathered ??= { sink, parts: [] };
    this.#gathered.parts.push(part);
    if (part.length > 4_096 || this.#gathered.parts.length > 4_096) this.flush();
  }

  /** Writes the gathered parts. Resolves when the sinks have accepted everything. */
  flush(): Promise<void> {
    if (this.#gathered) {
      const { sink, parts } = this.#gathered;
      this.#gathered = undefined;
      const part = parts.length === 1 ? (parts[0] as Buffer) : Buffer.concat(parts);
      this.#written = this.#written.then(async () => {
        await new Promise<void>((resolve) => sink.write(part, resolve));
        this.unwritten -= part.length;
        this.onWritten();
      });
    }
    return this.#written;
  }
}

type Shells = { readonly interpreter: "bash" | "sh"; readonly loginShell: string };

/** The command that runs `remoteProgram` in the interpreter that the script asks for. */
function scriptCommand(program: string, { interpreter, loginShell }: Shells): string {
  // Directly in a fitting login shell: the script then sees the functions of that shell's start-up files.
  const fits = interpreter === "bash" ? loginShell === "bash" : /^(sh|dash|ash)$/.test(loginShell);
  if (fits) return program;
  const other = `exec "$(${TOOL_PATH}; command -v ${interpreter})" -c "$0" ${interpreter}`;
  return `/bin/sh -c '${other}' '${program}'`; // no `exec`, which may be a function in the login shell
}

/** A script that has been sent to the container. */
interface RunningScript {
  readonly connection: Connection;
  readonly channel: ClientChannel;
  readonly exit: Promise<Exit>;
  readonly preamble: Preamble;
  readonly output: OutputWriter;
  readonly sshErrors: readonly SshError[];
  readonly closed: Promise<void>; // the channel has closed, and all output is written
  readonly isClosed: () => boolean; // the server has closed the channel
}

/** Opens a channel, sends the script, and writes its output to the sinks. */
async function startScript(
  connection: Connection,
  script: Buffer,
  shells: Shells,
  { signal, stdout, stderr }: Pick<Context, "signal"> & OutputSinks,
): Promise<RunningScript> {
  const preamble = new Preamble(`fargate-${randomBytes(16).toString("hex")}`);
  const program = remoteProgram(preamble.mark, connection.target.PassEnvironment);
  const sshErrors: SshError[] = [];
  connection.client.on("error", (error: SshError) => sshErrors.push(error));
  const { channel, exit } = await openChannel(connection, scriptCommand(program, shells), signal);
  const errors = channel.stderr as Readable;
  const output: OutputWriter = new OutputWriter(() => window.update());
  const window = controlWindow(connection.client, channel, () => output.unwritten <= WINDOW_LIMIT);
  channel.on("data", (chunk: Buffer) => {
    output.write(stdout, preamble.push(chunk));
    if (!preamble.shell || channel.writableEnded) return;
    channel.write(script);
    channel.end(preamble.mark);
  });
  errors.on("data", (chunk: Buffer) => output.write(stderr, chunk));
  connection.socket.on("data", () => {
    if (output.unwritten > MAX_UNWRITTEN)
      connection.socket.destroy(new Error("the server sends more output than its window allows"));
  });
  const closing = [channel, errors].map((stream) => new Promise((resolve) => stream.on("close", resolve)));
  const closed = Promise.all(closing).then(() => {
    if (!preamble.shell) output.write(stdout, preamble.held);
    return output.flush();
  });
  return { connection, channel, exit, preamble, output, sshErrors, closed, isClosed: window.isClosed };
}

/** Waits until a script's channel has closed, or a process has held it open for too long (DRAIN_MS). */
async function drainOutput(
  script: RunningScript,
  { signal, log }: Pick<Context, "signal" | "log">,
): Promise<void> {
  const { connection, channel, preamble, output, closed } = script;
  const receivedBefore = output.received;
  // Unknown holders are treated as a filter, whose output must not be lost.
  let holders: ReturnType<typeof findPipeHolders>;
  const runBriefly = (program: string) =>
    runCommand(connection, program, signal, { timeoutMs: DRAIN_MS.background });
  for (let waited = 0, quiet = 0, limit: number = DRAIN_MS.filter; waited < limit; ) {
    const { received } = output;
    const inBackground = holders?.filter === false;
    if ((await Promise.race([closed.then(() => true), delay(DRAIN_MS.tick)])) === true || signal.aborted)
      return;
    // The clock stands still while the sinks accept the rest of the script's output.
    if (output.unwritten > 0 && output.received - receivedBefore < MAX_BUFFERED) continue;
    waited += DRAIN_MS.tick;
    quiet = output.received === received ? quiet + DRAIN_MS.tick : 0;
    if (inBackground && quiet >= DRAIN_MS.silence) break;
    // Looks at the holders after 100 ms, when most filters have ended, and then every 500 ms.
    if (inBackground || waited % DRAIN_MS.silence !== 2 * DRAIN_MS.tick) continue;
    const lookedAt = performance.now();
    const listing = runBriefly("ls -ln /proc/[0-9]*/fd/[0-2] 2>/dev/null").catch(() => "");
    holders = findPipeHolders(await Promise.race([closed.then(() => ""), listing]), preamble.pipes);
    waited += Math.round((performance.now() - lookedAt) / DRAIN_MS.tick) * DRAIN_MS.tick;
    if (holders?.filter !== false) continue;
    // A filter may have ended just now: this leaves time for its last output.
    limit = Math.max(DRAIN_MS.background, waited + DRAIN_MS.silence);
    quiet = Math.min(quiet, 2 * DRAIN_MS.tick);
  }
  if (holders?.filter !== false && !script.isClosed())
    log.warn("a process still holds the script's output open after 10 s; its further output is lost");
  for (const stream of [channel, channel.stderr]) stream.removeAllListeners("data");
  await output.flush();
  if (!holders?.paths.length) return;
  // Something must continue to read the pipes. Otherwise SIGPIPE would end the background process.
  const reader = `for f in ${holders.paths.join(" ")}; do { cat <&3 >/dev/null 2>&1 & } 3<"$f"; done`;
  await runBriefly(reader).catch(() => {});
}

/** Waits until a script has ended and its output is written. @throws {Failure} if the shell did not run it */
async function outcomeOf(script: RunningScript, context: Pick<Context, "signal" | "log">): Promise<Outcome> {
  const { connection, preamble, sshErrors } = script;
  const status = await script.exit;
  if (status === undefined) {
    await script.closed;
    await sleep(50); // if the connection is lost, the channel closes first
    const lastError = sshErrors.at(-1);
    const what = connection.socket.destroyed ? "connection" : "script's channel without an exit status";
    const reason = lastError ? sshReason(lastError) : `the server closed the ${what}`;
    const wasSilent = lastError?.level === "client-timeout";
    return { ended: "lost", begun: preamble.shell !== undefined, wasSilent, reason };
  }
  await drainOutput(script, context);
  if (connection.socket.destroyed && !script.isClosed())
    context.log.warn("connection lost: the script's last output may be lost");
  const early = `the container's login shell ended with ${status} before it read the script`;
  if (!preamble.shell) throw new Failure("system", early, { problem: "startUpFile" });
  if (preamble.state !== "complete")
    throw new Failure("system", "the container's shell could not read the whole script: the image needs cat");
  const code = typeof status === "number" ? status : 128 + (osConstants.signals[status] ?? 0);
  return { ended: "exited", code: Math.min(code, 255) }; // SSH allows larger ones
}

/** Terminates a cancelled script and waits up to 1 s for its last output. Warns if it may still run. */
async function cancelScript(
  { connection, preamble, exit, closed }: RunningScript,
  log: Logger,
): Promise<void> {
  const { shell } = preamble;
  if (!shell) return;
  log.debug("terminating the script's session {session}", { session: shell.session });
  const result = await terminate(connection, shell);
  await Promise.race([closed, sleep(1_000)]);
  const hasExited = (await Promise.race([exit, undefined])) !== undefined; // on its own, at the same moment
  if (result !== "terminated" && !(result === "not found" && hasExited))
    log.warn("the script may still be running in the container: {result}", { result });
}

/** Collects a script's output. */
function collectOutput() {
  const parts: Buffer[] = [];
  const write: OutputSink["write"] = (part, done) => {
    parts.push(part);
    done();
  };
  return { sinks: { stdout: { write }, stderr: { write } }, text: () => Buffer.concat(parts).toString() };
}

/**
 * Runs a script over a connection and writes its output to the sinks. If `signal` aborts, terminates the
 * script.
 * @returns how it ended; an end by signal n counts as exit code 128 + n, as in a shell
 * @throws {Failure} if the container's shell cannot run the script; the reason of `signal` if that aborts
 */
async function runScript(
  connection: Connection,
  script: Buffer,
  shells: Shells,
  context: Pick<Context, "signal" | "log"> & OutputSinks,
): Promise<Outcome> {
  const { signal, log } = context;
  if (script.includes(0))
    throw new Failure("system", "the script contains NUL characters, which no shell accepts");
  const running = await startScript(connection, script, shells, context);
  const aborted = Promise.withResolvers<undefined>();
  const ended = Promise.race([outcomeOf(running, context), aborted.promise]);
  const outcome = await withAbort(signal, () => aborted.resolve(undefined), ended);
  if (outcome && !signal.aborted) return outcome;
  await cancelScript(running, log);
  connection.client.destroy();
  throw signal.reason;
}

// 10. Stages --------------------------------------------------------------------------------------------
// The four stages of a job. May use all sections above. Must not let a task exist that no record names, nor
// send a script to a server that may not be the job's own task.

const recordPath = ({ config, job }: Context): string =>
  join(config.TaskMetadata.Directory, `${job.stem}.json`);
const startedBy = ({ config, job, env }: Context): string =>
  `fargate-${managerId(config.TaskMetadata.Directory, env)}-${job.hash.slice(0, 32)}`;

/**
 * On ECS, looks up the manager's own task and stores its id for `managerId`, once per container. If the
 * metadata endpoint does not answer, the manager keeps its random id for as long as the container lives,
 * because the id must not change between the stages of a job.
 */
async function identifyManager(directory: string, { ECS_CONTAINER_METADATA_URI_V4: endpoint }: Environment) {
  if (!endpoint || readManagerTask(directory, endpoint) !== undefined) return;
  const again = () => sleep(500).then(() => readOwnTask(endpoint));
  const task = await readOwnTask(endpoint)
    .catch(again)
    .catch(again)
    .catch(() => undefined);
  writeManagerTask(directory, endpoint, task?.id ?? "");
}

/**
 * The output of the `config` stage.
 * @param directories builds_dir and cache_dir of a job with its own image; without it, config.toml has them
 */
function configAnswer(
  job: Job | undefined,
  host = hostname(),
  directories: Record<string, string> = {},
): string {
  const name = job ? host.replace(/[^A-Za-z0-9.-]/g, "") : ""; // the runner quotes it with "" in a script
  return JSON.stringify({ driver: { name: "fargate", version: VERSION }, hostname: name, ...directories });
}

/** The operator's own key, if PrivateKeyPath names one that can be used. */
async function readOperatorKey({ config: { SSH }, log }: Context): Promise<KeyPair | undefined> {
  try {
    return SSH.PrivateKeyPath ? await keyPairOf(fs.readFileSync(SSH.PrivateKeyPath, "utf8")) : undefined;
  } catch (error) {
    const fields = { path: SSH.PrivateKeyPath, reason: reasonOf(error) };
    log.warn("PrivateKeyPath {path} cannot be used: {reason}; using a new key for this job instead", fields);
  }
}

/** Warns if time limits in the runner's config.toml (CONFIG_FILE) are too short for cancelled scripts. */
function checkRunnerTimeouts({ config, env, log }: Context): void {
  const needed = config.SSH.CancelGracePeriod + 10; // seconds; SECURITY.md promises the 10 s
  type Custom = { run_exec: string; graceful_kill_timeout?: number };
  type RunnerConfig = { shutdown_timeout?: number; runners: { custom?: Custom }[] };
  try {
    const { runners, shutdown_timeout } = parseToml(
      fs.readFileSync(`${env.CONFIG_FILE}`, "utf8"),
    ) as RunnerConfig;
    for (const { custom } of runners) {
      if (!custom || !fs.existsSync(custom.run_exec) || fs.realpathSync(custom.run_exec) !== process.execPath)
        continue;
      const graceful_kill_timeout = custom.graceful_kill_timeout || 600;
      const limits = { graceful_kill_timeout, shutdown_timeout: shutdown_timeout || 30 };
      for (const [name, value] of Object.entries(limits)) {
        const fields = { limit: `${name} = ${value}`, needed };
        if (value < needed)
          log.warn("{limit} in the runner's config.toml should be {needed} s or more", fields);
      }
    }
  } catch {} // unreadable, or not the runner's own file: the runner may have been started with --config
}

const PREPARE_SHUTDOWN_MS = 4_500; // from SIGTERM to the end of prepare
const RUN_TASK_GRACE_MS = 3_000; // of these, how long RunTask may take to answer

/** Logs parts of the job that have no effect, a missing restriction, and short time limits of the runner. */
function checkJob(context: Context): void {
  const { config, job, log, env } = context;
  const { TaskDefinitions, AllowedImages, AllowedServices } = config.JobImage;
  const isOff = TaskDefinitions.length + AllowedImages.length + AllowedServices.length === 0;
  const instead =
    "to use them, set AllowedImages and AllowedServices in JobImage, or FARGATE_TASK_DEFINITION";
  const names = job.imageNames?.join(", ");
  if (names && isOff)
    log.warn("image: and services: have no effect; {instead}. Ignored: {names}", { names, instead });
  const unused = unusedVariables(env).sort((a, b) => Number(!a.meant) - Number(!b.meant));
  for (const { name, meant } of unused.slice(0, 20))
    if (meant) log.warn("the job's variable {name} has no effect; did you mean {meant}?", { name, meant });
    else log.debug("the job's variable {name} has no effect", { name });
  if (!config.Fargate.AllowedTaskDefinitions)
    log.debug("AllowedTaskDefinitions is not set: a job may choose any task definition");
  checkRunnerTimeouts(context);
}

/** The `prepare` stage: starts the job's task, and returns once a login has succeeded. */
async function prepare(context: Context): Promise<void> {
  const { config, job, log, now, signal, refusal, env } = context;
  if (refusal) throw new Failure("build", refusal);
  checkJob(context);
  const warning = createDirectory(config.TaskMetadata.Directory);
  if (warning) log.warn("{warning}", { warning });
  const removeLock = createLock(config.TaskMetadata, job.stem, "prepare");
  const other = findOtherPrepare(context);
  const shutdown = new AbortController();
  signal.addEventListener("abort", () =>
    setTimeout(() => shutdown.abort(signal.reason), PREPARE_SHUTDOWN_MS),
  );
  try {
    if (other) throw new Failure("system", `another prepare of this job is running (process ${other.pid})`);
    await releaseTask(context, signal); // an earlier attempt may have died without a cleanup
    const own = await readOperatorKey(context); // never copied to the record
    const key = own ?? (await makeKeyPair(config.SSH.KeyType));
    const aws = new Aws(config.Fargate, context);
    await identifyManager(config.TaskMetadata.Directory, env);
    const begun = now();
    const record = newRecord(context, own ? "" : key.privateKey);
    writeRecord(recordPath(context), record);
    try {
      const { host, connection, placed } = await startWithImages(context, aws, record, key, begun);
      await recordLogin(placed, aws, record, host, connection, begun);
      const fields = { host, user: config.SSH.Username, seconds: Math.round((now() - begun) / 1000) };
      log.info("Ready: logged in to {host} as {user} ({seconds} s)", fields);
    } catch (error) {
      // After a signal, there is time to stop a known task, but not to look for an unknown one: cleanup does.
      await undoStart(context, aws, record, record.TaskARN ? shutdown.signal : signal);
      throw attributeToJob(context, error);
    }
  } finally {
    removeLock();
  }
}

/** Adds the address, the host key and the shells to the record, and closes the connection. */
async function recordLogin(
  context: Context,
  aws: Aws,
  record: TaskRecord,
  host: string,
  connection: Connection,
  begun: number,
): Promise<void> {
  const { log, signal } = context;
  record.ContainerIP = host;
  record.HostKey = connection.hostKey.toString("base64");
  const { warning, ...shells } = await findShells(connection, signal);
  Object.assign(record, shells);
  if (warning) log.warn("{warning}", { warning });
  await joinContainers(context, aws, record, connection, begun);
  connection.client.end();
  await sleep(0, signal); // bun delivers signals between turns of the event loop
  signal.throwIfAborted();
  updateRecord(context, record);
}

/** Stops the task of a failed prepare and removes its record. Only logs a failure, since cleanup follows. */
async function undoStart(context: Context, aws: Aws, record: TaskRecord, signal: AbortSignal): Promise<void> {
  try {
    // If the disk is full, the record in memory contains more than the one on disk.
    if (await stopRecordedTask(context, aws, record, signal)) fs.rmSync(recordPath(context), { force: true });
  } catch (failure) {
    const message = `cleanup must stop ${record.TaskARN || "a task that may have been started"}`;
    const reason = failure === context.signal.reason ? message : reasonOf(failure);
    context.log.error("{reason}", { reason });
  }
}

/** Another live prepare of this job. */
const findOtherPrepare = ({ config, job, wallTime }: Context) =>
  readLocks(config.TaskMetadata, wallTime())
    .filter(({ stem, stage, isAlive }) => stem === job.stem && stage === "prepare" && isAlive)
    .find(({ pid, identity }) => pid !== process.pid || identity !== identityOf("self"));

function newRecord(context: Context, privateKey: string): TaskRecord {
  const { Cluster, Region } = context.config.Fargate;
  const PrivateKey = Buffer.from(privateKey).toString("base64");
  const task = { Cluster, Region, StartedBy: startedBy(context), ClientTokens: [], Unanswered: false };
  const login = { HostKey: "", Interpreter: "sh", LoginShell: "" } as const;
  const times = { Deadline: 0, UpdatedAt: Math.floor(context.wallTime() / 1000) };
  const { FARGATE_MANAGER: Manager } = context.env;
  const { ids } = context.job;
  const origin = { ...(Manager && { Manager }), ...(ids && { JobID: ids.job, ProjectID: ids.project }) };
  const empty = { Version: RECORD_VERSION, TaskARN: "", ContainerIP: "" } as const;
  return { ...empty, PrivateKey, ...task, ...login, ...times, ...origin };
}

/** Writes a record, if given. @throws {Failure} if the old one is gone: no stage would then stop the task */
function updateRecord(context: Context, record?: TaskRecord): void {
  const path = recordPath(context);
  if (!fs.existsSync(path)) throw new Failure("system", "the job was cleaned up while prepare ran");
  if (record) writeRecord(path, record);
}

/** Places to start a task: all subnets, each alone (the first one last); then the same with the fallback. */
function placements(f: Config["Fargate"]) {
  const subnets = f.Subnets ?? [f.Subnet as string];
  const single = [...subnets.slice(1), ...subnets.slice(0, 1)].map((subnet) => [subnet]);
  const subnetChoices = subnets.length > 1 ? [subnets, ...single] : [subnets];
  const { LaunchType, CapacityProviderStrategy, FallbackCapacityProviderStrategy: fallback } = f;
  const strategies = [{ LaunchType, CapacityProviderStrategy }];
  if (fallback) strategies.push({ LaunchType: undefined, CapacityProviderStrategy: fallback });
  return strategies.flatMap((strategy) => subnetChoices.map((Subnets) => ({ ...strategy, Subnets })));
}

/** The pause between attempts, in ms: 2 s until each placement has been tried, then twice that, and so on. */
const startRetryPause = (attempts: number, placements: number): number =>
  Math.min(2_000 * 2 ** (Math.ceil(attempts / placements) - 1), 20_000);

/** Starts a task and waits for a login. After a transient failure, tries the next placement. */
async function startUntilReady(context: Context, aws: Aws, record: TaskRecord, key: KeyPair, begun: number) {
  const { config, log, now, signal } = context;
  const until = begun + config.Fargate.StartTimeout * 1000;
  const choices = placements(config.Fargate);
  let tries = 0;
  let lastWarning = -Infinity; // ms of `now`
  const nextPlacement = () => ({ ...config.Fargate, ...choices[tries % choices.length] });
  const { TaskDefinition, Cluster: cluster, Region: region } = config.Fargate;
  const definition = context.jobTask ? TaskDefinition.split("/").at(-1) : TaskDefinition;
  log.info("Starting a task of {definition} on cluster {cluster} in {region}", {
    definition,
    cluster,
    region,
  });
  const once = async () => {
    const placed = { ...context, config: { ...config, Fargate: nextPlacement() } };
    tries++;
    await startTask(placed, aws, record, key, until);
    const login = await waitUntilReady(context, aws, record, key, begun);
    if (tries > 1) log.info("Attempt {tries} to start a task has succeeded", { tries });
    return login;
  };
  const shouldRetry = (error: unknown) => {
    const { operation, problem } = causeOf(error);
    // After an unanswered RunTask, or any other failure, there may be a task already.
    const hasNoTask = !record.Unanswered && (operation === "ecs:RunTask" || operation === STOPPED);
    if (signal.aborted || !hasNoTask || !problem || !(problem in TRANSIENT) || now() >= until) return false;
    const { Subnets, CapacityProviderStrategy } = nextPlacement();
    const strategy = CapacityProviderStrategy?.map((provider) => provider.CapacityProvider).join(" and ");
    const where = `${Subnets?.join(", ")}${strategy ? ` with ${strategy}` : ""}`;
    const isDue = now() >= lastWarning + 60_000;
    if (isDue) lastWarning = now();
    log[isDue ? "warn" : "debug"]("{reason}; trying again in {where}", { reason: reasonOf(error), where });
    return true;
  };
  const minPause = () => startRetryPause(tries, choices.length);
  return retry(once, { until, shouldRetry, now, signal, maxPause: 0, minPause });
}

/**
 * Starts the task, with the public key and the deadline if its definition accepts them. Writes the record
 * before each call and after its answer, so that a task can be found if the answer is lost.
 */
async function startTask(
  context: Context,
  aws: Aws,
  record: TaskRecord,
  key: KeyPair,
  until: number,
): Promise<void> {
  const { config, job, log, wallTime, signal } = context;
  const { StartTimeout, DeadlineMargin } = config.Fargate;
  const runTask = async (environment?: Record<string, string>) => {
    const clientToken = crypto.randomUUID();
    record.TaskARN = "";
    record.ClientTokens.push(clientToken);
    const input = runTaskInput(
      config,
      { startedBy: record.StartedBy, clientToken },
      environment,
      context.jobTask?.overrides,
    );
    const onSend = () => {
      record.UpdatedAt = Math.floor(wallTime() / 1000);
      updateRecord(context, { ...record, Unanswered: true });
    };
    const shouldRetry = (error: unknown) => {
      record.Unanswered ||= causeOf(error).mayHaveStarted === true;
      return isRetryable(error);
    };
    const arn = await aws.runTask(input, { until, shouldRetry, onSend, signal, grace: RUN_TASK_GRACE_MS });
    record.Unanswered = false;
    if (arn instanceof Failure) throw arn;
    record.TaskARN = arn;
    updateRecord(context, record);
  };

  signal.throwIfAborted();
  record.Deadline = Math.ceil(wallTime() / 1000 + StartTimeout + job.timeout + DeadlineMargin);
  const deadline = { FARGATE_DEADLINE: String(record.Deadline) };
  const sharedKey =
    "with PrivateKeyPath, all tasks accept the same key; remove it unless the image ignores SSH_PUBLIC_KEY";
  const warnOfSharedKey = () => record.PrivateKey || log.warn(sharedKey);
  await runTask({ SSH_PUBLIC_KEY: key.publicKey, ...deadline }).then(warnOfSharedKey, (error) => {
    const { problem } = causeOf(error);
    const isRefused = problem === "container" || problem === "secret";
    if (!isRefused || record.PrivateKey || record.Unanswered) throw error;
    log.info(
      "The task definition does not accept SSH_PUBLIC_KEY from the driver; starting the task without it",
    );
    return runTask(problem === "secret" ? deadline : undefined);
  });
}

/** Turns a failure into one of the job (`build`) if a variable of the job set the setting at fault. */
function attributeToJob({ config, jobOverrides }: Context, error: unknown): unknown {
  const { problem = "" } = causeOf(error);
  const setting =
    problem in DEFINITION_FAULTS
      ? "TaskDefinition"
      : problem in PLATFORM_FAULTS
        ? "PlatformVersion"
        : undefined;
  if (!setting || !jobOverrides.includes(setting)) return error;
  const choice = `${JOB_VARIABLES[setting]} of this job, ${config.Fargate[setting]},`;
  return new Failure("build", `${choice} cannot be used: ${reasonOf(error)}`, causeOf(error));
}

// How long the server may refuse the key before prepare gives up: an image may install the key late, and
// OpenSSH 9.8 and later rejects every connection for 15 s after three refusals.
const KEY_REFUSAL_MS = 25_000;
// Within this time of hearing from a task, its address cannot have been reassigned: a new task takes longer
// to start. After that, another task with the same host key could answer there and accept any key. With
// PrivateKeyPath, the driver always asks ECS.
const ADDRESS_TRUST_MS = 10_000;

/** What is known about a task that is not ready yet. Times are in ms of `now`. */
interface Startup {
  readonly begun: number;
  readonly deadline: number; // `begun` plus StartTimeout
  host?: string | undefined; // the address to log in to, once ECS shows one
  status?: string; // lastStatus
  health: string; // of the container; HEALTHY without WaitForHealthy
  usableSince: number; // when it became RUNNING and healthy; Infinity until then
  lastSeen: number; // when ECS last described it
  refusals: number[]; // when the SSH server refused the key
  lastFailure?: SshFailure; // the most informative failure to log in
}

const stoppedEarly = (task: Task): Failure =>
  new Failure("system", `the task stopped before it was ready: ${explainStop(task)}`, stopCause(task));

/** Describes the task and updates `startup`. @throws {Failure} if the task has ended or is unhealthy */
async function pollTask(
  context: Context,
  aws: Aws,
  record: TaskRecord,
  startup: Startup,
  signal: AbortSignal,
) {
  const { config, log, now } = context;
  const { WaitForHealthy, EnablePublicIP, UsePublicIP: usePublic = EnablePublicIP } = config.Fargate;
  const { begun, deadline } = startup;
  const polledAt = now();
  const limits = { until: startup.host ? polledAt + 10_000 : deadline, signal };
  const [task] = await aws.describeTasks([record.TaskARN], limits).catch((failure): Task[] => {
    if (!startup.host) throw failure;
    log.debug("{reason}", { reason: reasonOf(failure) }); // a login may still succeed
    return [];
  });
  if (task) startup.lastSeen = polledAt;
  updateRecord(context);
  if (task?.lastStatus && task.lastStatus !== startup.status) {
    startup.status = task.lastStatus;
    const seconds = Math.round((now() - begun) / 1000);
    const fields = { id: record.TaskARN.split("/").at(-1), status: task.lastStatus, seconds };
    const isRepeated = task.lastStatus === "PROVISIONING" || isEnding(task); // in each attempt
    const level = isRepeated ? "debug" : "info";
    log[level]("Task {id} is {status} ({seconds} s)", fields);
  }
  if (task && isEnding(task)) throw stoppedEarly(task);
  const container = task?.containers?.find(({ name }) => name === CONTAINER);
  startup.health = WaitForHealthy ? (container?.healthStatus ?? "UNKNOWN") : "HEALTHY";
  if (startup.health === "UNHEALTHY")
    throw new Failure("system", `ECS reports ${CONTAINER} as UNHEALTHY`, { problem: "unhealthy" });
  if (startup.health !== "HEALTHY") return;
  if (startup.status === "RUNNING") startup.usableSince = Math.min(startup.usableSince, now());
  if (!task || startup.host) return;
  const { id, address } = interfaceOf(task);
  const isPublic = usePublic && !address?.includes(":"); // IPv6 addresses have no public counterparts
  startup.host = isPublic ? id && (await aws.publicAddress(id, { until: deadline, signal })) : address;
}

/** Logs in to the task's address. Stores failed attempts in `startup`. */
async function logInToTask(
  context: Context,
  key: KeyPair,
  host: string,
  startup: Startup,
  signal: AbortSignal,
) {
  const { config, log, now } = context;
  log.debug("the task's address is {host}", { host });
  let lastMessage = "";
  const onFailure = (failure: SshFailure) => {
    const { why, message } = failure;
    if (message !== lastMessage) log.debug("no login yet: {message}", { message });
    lastMessage = message;
    if (why === "login") startup.refusals.push(now());
    // A refused key is more informative than the connections that sshd then rejects for a while.
    if (why === "login" || startup.refusals.length === 0) startup.lastFailure = failure;
  };
  return {
    host,
    connection: await logIn({ ...config.SSH, host, privateKey: key.privateKey }, signal, onFailure),
  };
}

/** The failure of a late task, with the limit that has passed; undefined if it is not late. Pure. */
function timeoutFailure({ Fargate: f, SSH }: Config, startup: Startup, now: number): Failure | undefined {
  const { host, status, health, usableSince, lastFailure, refusals } = startup;
  const refusedFor = (refusals.at(-1) ?? 0) - (refusals[0] ?? 0);
  let reason: string;
  if (usableSince < Infinity && refusedFor > KEY_REFUSAL_MS)
    reason = `the task is running, but its SSH server refuses the key of ${SSH.Username}`;
  else if (now > usableSince + SSH.ConnectTimeout * 1000)
    reason = `the task is running, but no login succeeded within ConnectTimeout (${SSH.ConnectTimeout} s)`;
  else if (now > startup.deadline)
    reason = `not ready after StartTimeout (${f.StartTimeout} s): the task is ${status ?? "unknown to ECS"}`;
  else return undefined;
  const fail = (lack: string, problem: Problem | undefined) =>
    new Failure("system", `${reason}${lack}`, { problem });
  if (host) {
    const attempt = lastFailure ? `; the last login attempt: ${lastFailure.message}` : "";
    // A task has no SSH server until it is RUNNING.
    return fail(attempt, usableSince < Infinity ? (lastFailure?.cause.problem ?? "silent") : undefined);
  }
  if (health !== "HEALTHY")
    return fail(`; the health of ${CONTAINER} is ${health}`, status === "RUNNING" ? "noHealth" : undefined);
  const isPublic = f.UsePublicIP ?? f.EnablePublicIP;
  return fail(`; it has no ${isPublic ? "public " : ""}address`, isPublic ? "publicAddress" : undefined);
}

/**
 * Waits until a login to a new task succeeds. Attempts to log in begin when the task's address is known. From
 * then on, polling only watches for the task's end.
 * @throws {Failure} if the task ends or is not ready in time
 */
async function waitUntilReady(context: Context, aws: Aws, record: TaskRecord, key: KeyPair, begun: number) {
  const { config, now } = context;
  const started = now();
  const deadline = begun + config.Fargate.StartTimeout * 1000;
  const times = { begun, deadline, usableSince: Infinity, lastSeen: -Infinity, refusals: [] };
  const startup: Startup = { ...times, health: "UNKNOWN" };
  const finished = new AbortController();
  const signal = AbortSignal.any([context.signal, finished.signal]);
  const ready = Promise.withResolvers<Awaited<ReturnType<typeof logInToTask>>>();
  const watch = async (): Promise<never> => {
    for (;;) {
      const { host, usableSince } = startup;
      // While a running task accepts no login, the pause stays at 5 s.
      const waited = host && usableSince < Infinity ? 0 : now() - started;
      const pause = pollPause(waited, host !== undefined, Math.random(), aws.throttled);
      await sleep(Math.min(pause, Math.max(deadline - now(), 0) + 1), signal);
      await pollTask(context, aws, record, startup, signal);
      if (!host && startup.host) ready.resolve(logInToTask(context, key, startup.host, startup, signal));
      const failure = timeoutFailure(config, startup, now());
      if (failure) throw failure;
    }
  };
  try {
    const login = await Promise.race([ready.promise, watch()]);
    if (record.PrivateKey && now() < startup.lastSeen + ADDRESS_TRUST_MS) return login;
    // Otherwise ECS must confirm that the task still runs (see ADDRESS_TRUST_MS).
    const deleted = { lastStatus: "DELETED", stoppedReason: "ECS no longer knows it" };
    const limits = { until: deadline, signal: context.signal };
    const task = (await aws.describeTask(record.TaskARN, limits)) ?? deleted;
    if (!isEnding(task)) return login;
    login.connection.client.destroy();
    throw stoppedEarly(task);
  } finally {
    finished.abort(new Failure("system", "prepare no longer waits for the task"));
  }
}

/** The `run` stage: runs a script in the job's task. @returns the exit code for the runner */
async function run(context: Context & OutputSinks, scriptPath: string, stage: string): Promise<number> {
  const { env, log, now, wallTime } = context;
  const exitCodeFile = env.BUILD_EXIT_CODE_FILE;
  const removeOld = () => exitCodeFile && fs.rmSync(exitCodeFile, { force: true });
  withContext("BUILD_EXIT_CODE_FILE of an earlier stage cannot be removed", removeOld); // the runner reads it
  const script = readFile(scriptPath, `the script of ${stage} (${scriptPath})`);
  const path = recordPath(context);
  checkDirectory(context.config.TaskMetadata.Directory);
  const record = readRecord(path);
  const noTask = `this job has no task: there is no complete record ${path}; prepare must succeed first`;
  if (!record?.ContainerIP) throw new Failure("system", noTask);
  // If the runner has died, nothing else ends this stage. It must not occupy its task for ever.
  const overdue = new AbortController();
  const deadline = now() + Math.max(record.Deadline * 1000 - wallTime(), 60_000);
  const end = () => now() > deadline && overdue.abort(new Failure("system", "the job is past its deadline"));
  const timer = setInterval(end, 1_000); // a single timer for more than 24.8 days would fire early
  const removeLock = createLock(context.config.TaskMetadata, context.job.stem, "run");
  const limited = { ...context, signal: AbortSignal.any([context.signal, overdue.signal]) };
  const { mtimeMs = 0 } = fs.lstatSync(path, { throwIfNoEntry: false }) ?? {}; // at the previous stage's end
  const lastSeen = now() + mtimeMs - wallTime();
  const code = await runInTask(limited, record, lastSeen, script, stage).finally(() => clearInterval(timer));
  removeLock(); // after a failure, the lock stays: it shows sweep when the job was last worked on
  try {
    fs.lutimesSync(path, new Date(), new Date());
  } catch {} // best effort: otherwise the next stage asks ECS
  log.debug("{stage} ended with exit code {code}", { stage, code });
  if (code === 0) return 0;
  if (exitCodeFile) writeExitCode(exitCodeFile, code, log);
  return exitCode("build", env);
}

/** Writes a script's exit code for the runner. Only warns if it cannot: the script's failure still counts. */
function writeExitCode(path: string, code: number, log: Logger): void {
  try {
    fs.writeFileSync(path, String(code));
  } catch (error) {
    removeQuietly(path); // for the runner, an empty file is a system failure
    const lost = "BUILD_EXIT_CODE_FILE cannot be written, so the runner reports exit code 1: {reason}";
    log.warn(lost, { reason: reasonOf(error) });
  }
}

/** A script to run, with everything that is needed to run it. */
interface ScriptRun {
  readonly context: Context & OutputSinks;
  readonly record: TaskRecord;
  readonly target: SshTarget;
  readonly script: Buffer;
  readonly stage: string;
  readonly shells: Shells;
  readonly lastSeen: number; // when the task was last known to be alive, in ms of `now`
}

/** What is needed to log in to a record's task again. @throws {Failure} without the key */
function targetOf({ SSH }: Config, { ContainerIP: host, HostKey, PrivateKey }: TaskRecord): SshTarget {
  // The key that prepare logged in with: the job's own, or the operator's.
  const { PrivateKeyPath: path } = SSH;
  if (!PrivateKey && !path)
    throw new Failure("system", "the record has no key: set PrivateKeyPath to the key that prepare used");
  const isOwn = path && !PrivateKey;
  const key = isOwn ? readFile(path, `PrivateKeyPath ${path}`) : Buffer.from(PrivateKey, "base64");
  return { ...SSH, host, privateKey: key.toString(), hostKey: Buffer.from(HostKey, "base64") };
}

/**
 * Connects, runs the script and returns its exit code. Sends the script again only if no command of it can
 * have run.
 * @throws {Failure} for anything but an exit code
 */
async function runInTask(
  context: Context & OutputSinks,
  record: TaskRecord,
  lastSeen: number,
  script: Buffer,
  stage: string,
) {
  const { config, log, now, signal } = context;
  const shells = { interpreter: interpreterOf(script, record.Interpreter), loginShell: record.LoginShell };
  const target = { ...targetOf(config, record), toSend: lengthToSend(record, script) };
  const scriptRun: ScriptRun = { context, record, target, script, stage, shells, lastSeen };
  let tries = 0;
  let verifiedAt = -Infinity;
  const attempt = async (): Promise<number> => {
    if (++tries > 2 && now() > verifiedAt + 5_000) {
      // Without this, each later stage of a task that has ended would wait for the whole ConnectTimeout.
      verifiedAt = now();
      await verifyTask(scriptRun);
    }
    return runOnce(scriptRun);
  };
  const shouldRetry = (error: unknown) => {
    const canRetry =
      error instanceof SshFailure && (error.why === "unreachable" || error.why === "unverified");
    if (canRetry) log.debug("{stage}: {reason}; trying again", { stage, reason: reasonOf(error) });
    return canRetry;
  };
  const until = now() + config.SSH.ConnectTimeout * 1000;
  return retry(attempt, { until, shouldRetry, now, signal }).catch(async (error) => {
    if (signal.aborted || !(error instanceof SshFailure)) throw error;
    const notBegun = `${stage} did not begin: ${reasonOf(error)}`;
    if (error.why !== "unreachable") throw new Failure("system", notBegun, error.cause);
    const { state, cause } = await describeTaskState(context, record, 10_000);
    throw new Failure("system", `${notBegun}; ${state}`, { problem: cause.problem ?? error.cause.problem });
  });
}

/** Asks ECS about the task. @returns a failure if ECS does not answer. @throws {Failure} if it has ended */
async function verifyTask({ context, record, stage }: ScriptRun): Promise<SshFailure | undefined> {
  const { ended, state, cause } = await describeTaskState(context, record, 0);
  if (ended) throw new Failure("system", `${stage} did not begin: ${state}`, cause);
  return ended === undefined ? new SshFailure("unverified", state, cause) : undefined;
}

/** Connects once and runs the script. @throws {SshFailure} if no command of the script can have run */
async function runOnce(scriptRun: ScriptRun): Promise<number> {
  const { context, record, target, stage, lastSeen } = scriptRun;
  const connection = await connect(target, MAX_SILENCE_MS, context.signal);
  try {
    const isTrusted = record.PrivateKey && Math.abs(context.now() - lastSeen) <= ADDRESS_TRUST_MS;
    const unverified = isTrusted ? undefined : await verifyTask(scriptRun);
    if (unverified) throw unverified;
    const outcome = await runJobScript(scriptRun, connection);
    if (outcome.ended === "lost") {
      if (!outcome.begun) throw new SshFailure("unreachable", outcome.reason);
      // ECS may learn of the end some seconds late; unanswered keep-alive requests have taken longer.
      const { state, cause } = await describeTaskState(context, record, outcome.wasSilent ? 0 : 10_000);
      const lost = `the connection to the container was lost while ${stage} ran: ${outcome.reason}; ${state}`;
      throw new Failure("system", lost, cause);
    }
    const counters = () => runCommand(connection, MEMORY_COUNTERS, context.signal).catch(() => "");
    if (outcome.code === 137 && !outcome.isExplained) await explainKill(context, record, counters, stage);
    return outcome.code;
  } finally {
    connection.client.end();
  }
}

/** Prints the counters of control groups version 2 and 1. */
const MEMORY_COUNTERS =
  "cat /sys/fs/cgroup/memory.events /sys/fs/cgroup/memory/memory.oom_control 2>/dev/null";

/** Exit code 137 means SIGKILL. Logs it if the reason was a lack of memory. */
async function explainKill(
  context: Context,
  record: TaskRecord,
  readCounters: () => Promise<string>, // the output of MEMORY_COUNTERS in the script's container
  stage: string,
): Promise<void> {
  const counted = readCounters(); // the container may still be running
  const { state, cause } = await describeTaskState(context, record, 0);
  const isOfTask = cause.problem === "memory";
  if (!/oom_kill [1-9]/.test(await counted) && !isOfTask) return;
  const reason = isOfTask ? state : "the kernel killed processes in this container because memory ran out";
  context.log.error("{stage} ended with exit code 137: {reason}", { stage, reason });
  context.log.error("what to do: {advice}", { advice: ADVICE.memory });
}

/**
 * Asks ECS for the state of a record's task. ECS may learn the exit codes up to 10 s after the end.
 * @param patience for how many ms to ask again while the task has not ended
 * @returns `ended`: undefined if unknown; `state`: a description
 */
async function describeTaskState(context: BaseContext, record: TaskRecord, patience: number) {
  const { now, signal } = context;
  const aws = new Aws(record, context);
  const begun = now();
  try {
    for (;;) {
      const task = await aws.describeTask(record.TaskARN, { until: now() + 5_000, signal });
      if (!task) return { ended: true, state: "ECS no longer knows the task", cause: {} };
      const ended = isEnding(task);
      const allEnded = task.containers?.every(({ exitCode, reason }) => exitCode !== undefined || reason);
      const isFinal = ended && (task.lastStatus === "STOPPED" || allEnded);
      const isLastTry = now() > begun + (ended ? 10_000 : patience) - 1_500;
      if (isFinal || (isLastTry && ended))
        return { ended, state: `the task stopped: ${explainStop(task)}`, cause: stopCause(task) };
      const problem = task.lastStatus === "RUNNING" ? ("connection" as const) : undefined;
      if (isLastTry)
        return { ended, state: `ECS reports the task as ${task.lastStatus}`, cause: { problem } };
      await sleep(1_500, signal);
    }
  } catch (error) {
    signal.throwIfAborted();
    return {
      ended: undefined,
      state: `the task's state is unknown: ${reasonOf(error)}`,
      cause: causeOf(error),
    };
  }
}

const STOP_RETRY_MS = 60_000; // how long to repeat the calls that find and stop a task
const LIST_LAG_MS = 30_000; // how long to look for an unanswered RunTask's task: lists lag behind
const PREPARE_WAIT_MS = 30_000; // how long cleanup waits for a live prepare of its job

/**
 * The `cleanup` stage: stops the job's task and removes its record. Works without a record (by the task's
 * startedBy), when repeated, and beside a live prepare, which ends when its record is gone. Also works in a
 * directory that `checkDirectory` refuses: only this user's records are trusted, and a task costs money.
 */
async function cleanup(caller: Context): Promise<void> {
  const context: Context = { ...caller, warned: new Set() };
  const { config, job, log } = context;
  const { Directory } = config.TaskMetadata;
  if (!fs.existsSync(Directory))
    return log.warn(
      "TaskMetadata.Directory {Directory} does not exist: no task was started, or its record is lost",
      {
        Directory,
      },
    );
  // Until the task is stopped, its record says that it must be: sweep leaves that to this process.
  const removeLock = createLock(config.TaskMetadata, job.stem, "cleanup");
  try {
    await releaseTasks(context);
  } finally {
    removeLock();
  }
  // Files that a killed process was writing may contain a key.
  const isTemporary = (name: string) => name.startsWith(`${job.stem}.json.`) && name.endsWith(".tmp");
  for (const name of fs.readdirSync(Directory).filter(isTemporary))
    fs.rmSync(join(Directory, name), { force: true });
}

/** Stops the job's task, and any that a live prepare starts meanwhile. Removes the record and dead locks. */
async function releaseTasks(context: Context): Promise<void> {
  const { config, now, wallTime, log } = context;
  const until = now() + PREPARE_WAIT_MS;
  // Looks for a prepare before it reads the record: a prepare that has ended has recorded its task.
  const first = findOtherPrepare(context);
  for (let busy = first; busy; busy = findOtherPrepare(context)) {
    log.debug("prepare is still running (process {pid})", { pid: busy.pid });
    await releaseTask(context);
    const still = `prepare of this job is still running (process ${busy.pid}); end it and run cleanup again`;
    if (now() > until) throw new Failure("system", still);
    await sleep(250);
  }
  const isKnown = await releaseTask(context);
  // Meanwhile, a prepare may have written a record and sent RunTask.
  if ((first || !isKnown) && hasManagerId(config.TaskMetadata.Directory))
    await stopTasksStartedBy(context, new Aws(config.Fargate, context), startedBy(context), { until: now() });
  readLocks(config.TaskMetadata, wallTime()); // removes the locks of dead processes
}

/** The fields needed to stop a task. */
type TaskReference = Pick<
  TaskRecord,
  "TaskARN" | "Cluster" | "Region" | "StartedBy" | "Unanswered" | "UpdatedAt"
>;
/** What stopping a task needs. `title`: the reason that ECS shows for it */
type StopContext = Pick<Context, "now" | "wallTime" | "log" | "warned"> & { job: Pick<Job, "title"> };

/**
 * Stops the task of this job's record, then removes the record. If that fails, the record stays.
 * @param signal aborts it: prepare, which begins with this, must obey SIGTERM
 * @returns whether there is a record
 */
async function releaseTask(context: Context, signal?: AbortSignal): Promise<boolean> {
  const path = recordPath(context);
  // Comes before the record is read: a prepare that has ended by then no longer changes it.
  const isPreparing = findOtherPrepare(context) !== undefined;
  let reference: TaskReference;
  try {
    const record = readRecord(path);
    if (!record) return false;
    reference = record;
    try {
      // If this process dies, sweep stops the task without waiting for its deadline. A live prepare writes
      // the record itself, and what it writes now must not be lost.
      if (record.Deadline > 1 && !isPreparing) writeRecord(path, { ...record, Deadline: 1 });
    } catch {} // a full disk is no reason to leave a task running
  } catch (error) {
    context.log.warn("{reason}; looking for the task by its startedBy", { reason: reasonOf(error) });
    reference = await stopNamedTask(context, path, signal);
  }
  const isStopped = await stopRecordedTask(context, new Aws(reference, context), reference, signal);
  const message = `the task is stopped, but its record ${path} cannot be removed`;
  if (isStopped) withContext(message, () => fs.rmSync(path, { force: true }));
  return true;
}

/** Stops the task that a broken record still names. @returns how to find this job's other tasks */
async function stopNamedTask(context: Context, path: string, signal?: AbortSignal): Promise<TaskReference> {
  const { config, job, now } = context;
  const { Region, Cluster } = config.Fargate;
  const empty = { TaskARN: "", Cluster, Region, StartedBy: "", Unanswered: true, UpdatedAt: 0 };
  const trusted = { ...empty, ...salvageRecord(path) };
  // Others could have written this: it counts only if ECS confirms that the task is of this job.
  const claimed = { ...trusted, ...salvageRecord(path, 0) };
  const aws = new Aws(claimed, context);
  const describe = () => aws.describeTask(claimed.TaskARN, { until: now() + 5_000, signal });
  const described = trusted.TaskARN || !claimed.TaskARN ? undefined : await describe();
  const isOurs = trusted.TaskARN || described?.startedBy?.endsWith(`-${job.hash.slice(0, 32)}`);
  if (isOurs) await stopRecordedTask(context, aws, { ...claimed, Unanswered: false }, signal);
  // Comes last: the manager's id file, which `startedBy` reads, may be unusable as well.
  return { ...trusted, TaskARN: "", StartedBy: startedBy(context) };
}

/** Stops a record's task and that of an unanswered RunTask. @returns as `stopTasksStartedBy` */
async function stopRecordedTask(
  context: StopContext,
  aws: Aws,
  record: TaskReference,
  signal?: AbortSignal,
): Promise<boolean> {
  const { job, now, wallTime } = context;
  const visibleBy = now() + record.UpdatedAt * 1000 - wallTime() + LIST_LAG_MS;
  const limits = { until: now() + STOP_RETRY_MS, signal };
  if (record.TaskARN) await aws.stopTask(record.TaskARN, job.title, limits, visibleBy);
  return (
    !record.Unanswered || stopTasksStartedBy(context, aws, record.StartedBy, { until: visibleBy, signal })
  );
}

/**
 * Stops every task with this `startedBy`. While there is none, looks again until `until`.
 * @returns false, with a warning, if ecs:ListTasks is not allowed, as with the official driver's permissions
 */
async function stopTasksStartedBy(context: StopContext, aws: Aws, name: string, { until, signal }: Limits) {
  const { job, log, now, warned } = context;
  const latest = Math.min(until, now() + LIST_LAG_MS); // also when the clock has been set back
  for (;;) {
    const limits = { until: now() + STOP_RETRY_MS, signal };
    const tasks = await aws.listTasks(name, limits).catch((error) => {
      if (causeOf(error).problem !== "accessDenied") throw error;
      const unknown = "cannot check whether a task started by {name} is still running: {reason}";
      if (!warned?.has(name)) log.warn(unknown, { name, reason: reasonOf(error) });
      warned?.add(name);
    });
    if (!tasks) return false;
    // Lists may still contain a task of an earlier attempt that has been stopped.
    const described = await aws.describeTasks(tasks, limits).catch((): Task[] => []);
    for (const task of tasks) await aws.stopTask(task, job.title, limits);
    if (tasks.length > described.filter(isEnding).length || now() + 2_000 > latest) return true;
    await sleep(2_000, signal);
  }
}

// 11. Operator commands ---------------------------------------------------------------------------------
// Commands that operators and timers run. May use all sections above; no stage of a job uses this one. Must
// not stop a task that this driver did not start, or whose job may still be running.

const SWEEP_TASKS_AFTER = 600; // seconds; the record of a younger task may be about to be written or removed
const SWEEP_RECORDS_AFTER = 3_600; // seconds; ECS may not list the task of a younger record yet
/** Why a task is orphaned. Decisions use the keys. The texts are printed, and are StopTask's reason. */
const ORPHANED = {
  lost: "its record is gone",
  overdue: "it is past its deadline",
  abandoned: "its job is abandoned",
  unmanaged: "its manager's own task has stopped",
} as const;
/** `manager`: the id of another manager, whose host is gone; sweep treats its tasks as its own. */
type SweepOptions = Readonly<{ dryRun: boolean; json: boolean; manager?: string | undefined }>;
type Step = (text: string) => void; // shows what a command does next

/** A task of this driver, of any manager. Times are in epoch seconds. */
interface SweptTask extends Readonly<Record<"taskArn" | "startedBy", string>> {
  readonly createdAt: number;
  readonly deadline: number; // from its variables or its record, otherwise createdAt + MaxTaskAge
  readonly why?: string; // why it is orphaned; undefined if it is not
}

interface SweepReport extends Readonly<Record<"stopped" | "left", SweptTask[]>> {
  readonly dryRun: boolean;
  readonly removedRecords: string[]; // file names
  readonly deregistered?: string[]; // ARNs of derived task definitions, if JobImage allows images
  readonly problems: string[];
}

/** An error and what to do about it, as one text. */
const describeFailure = (error: unknown): string =>
  [reasonOf(error), adviceFor(causeOf(error))].filter(Boolean).join("; what to do: ");

/** The readable parts of all records. `job`: as in `startedBy`; `mtimeMs`: when the last stage ended */
function readRecords(directory: string) {
  const read = (path: string): Partial<TaskRecord> => {
    try {
      return readRecord(path) ?? {};
    } catch {
      return salvageRecord(path, 0); // enough to ask whether the task is running
    }
  };
  return fs.readdirSync(directory, { withFileTypes: true }).flatMap((entry) => {
    const name = entry.isFile() ? entry.name : "";
    const [, job] = /^[\w-]{1,32}-([0-9a-f]{32})[0-9a-f]{32}\.json$/.exec(name) ?? [];
    const path = join(directory, name);
    const { mtimeMs = Infinity } = fs.lstatSync(path, { throwIfNoEntry: false }) ?? {};
    return job ? [{ name, job, mtimeMs, ...read(path) }] : [];
  });
}

/** The state of the clock and the directory of records at one moment. */
interface Snapshot {
  readonly time: number; // epoch seconds
  readonly uptime: number; // seconds since the host's last boot
  readonly records: readonly ({ name: string; job: string; mtimeMs: number } & Partial<TaskRecord>)[];
  readonly processes: ReturnType<typeof readLocks>;
}

/** The rules by which sweep judges a task. */
interface SweepRules extends Pick<Config["Fargate"], "MaxTaskAge" | "AbandonedAfter"> {
  readonly managers: readonly string[]; // ids of the managers whose tasks count as this host's
  readonly sharedId: string; // on ECS, this manager's id, which other containers of its ECS task share
  readonly stoppedManagers: readonly string[]; // ids of managers on ECS whose own tasks have stopped
  readonly canLock: boolean; // if not (full disk), live jobs have no locks, and none counts as abandoned
}

/** @param clean see `readLocks` */
function takeSnapshot(
  { config, wallTime }: Pick<BaseContext, "config" | "wallTime">,
  clean = true,
): Snapshot {
  const { Directory } = config.TaskMetadata;
  const hasDirectory = fs.existsSync(Directory);
  return {
    time: wallTime() / 1000,
    uptime: uptime(),
    records: hasDirectory ? readRecords(Directory) : [],
    processes: hasDirectory ? readLocks(config.TaskMetadata, wallTime(), clean) : [],
  };
}

const processesOf = ({ processes }: Snapshot, job: string) =>
  processes.filter(({ stem }) => stem.slice(-64, -32) === job);
const isInUse = (snapshot: Snapshot, job: string) =>
  processesOf(snapshot, job).some(({ isAlive }) => isAlive);

/** Judges whether a task is orphaned. `lastSign`: the job's last sign of life, in epoch seconds. Pure. */
function judgeTask({ taskArn = "", startedBy = "", ...task }: Task, snapshot: Snapshot, rules: SweepRules) {
  const { time } = snapshot;
  const job = startedBy.slice(-32);
  const manager = startedBy.split("-")[1] ?? "";
  const isUnmanaged = rules.stoppedManagers.includes(manager);
  const isOwn = isUnmanaged || rules.managers.includes(manager);
  const record = isOwn ? snapshot.records.find((record) => record.job === job) : undefined;
  const createdAt = Math.floor(task.createdAt ? task.createdAt.getTime() / 1000 : time);
  // A service's container gets variables of the job.
  const overrides = task.overrides?.containerOverrides?.filter(({ name }) => name === CONTAINER);
  const variables = overrides?.flatMap((container) => container.environment ?? []);
  const fromTask = Number(variables?.find(({ name }) => name === "FARGATE_DEADLINE")?.value);
  const knownDeadline = Math.min(fromTask > 0 ? fromTask : Infinity, record?.Deadline || Infinity);
  const deadline = Math.floor(Number.isFinite(knownDeadline) ? knownDeadline : createdAt + rules.MaxTaskAge);
  const touches = processesOf(snapshot, job).map(({ mtimeMs }) => mtimeMs);
  const lastSign = Math.max(record?.mtimeMs ?? Infinity, ...touches) / 1000; // epoch seconds
  const isIdle = rules.canLock && lastSign < time - Math.min(snapshot.uptime, rules.AbandonedAfter);
  const isLost = isOwn && manager !== rules.sharedId && !record && time > createdAt + SWEEP_TASKS_AFTER;
  let cause: keyof typeof ORPHANED | undefined;
  if (isOwn && isInUse(snapshot, job)) cause = undefined;
  else if (isUnmanaged) cause = "unmanaged";
  else if (isLost) cause = "lost";
  else if (time > deadline) cause = "overdue";
  else if (isIdle) cause = "abandoned";
  const judged: SweptTask = {
    taskArn,
    startedBy,
    createdAt,
    deadline,
    ...(cause && { why: ORPHANED[cause] }),
  };
  return { cause, lastSign, task: judged };
}

/** What the steps of one sweep share. */
interface Sweep {
  readonly context: BaseContext;
  readonly aws: Aws;
  readonly listed: readonly Task[]; // all tasks of the cluster
  readonly tasks: readonly Task[]; // of this driver, of all managers
  readonly rules: SweepRules;
  readonly report: SweepReport;
  readonly hasDirectory: boolean;
  readonly takeSnapshot: () => Snapshot;
  readonly limits: () => Limits;
  readonly attempt: (action: () => Promise<void>) => Promise<void>; // a failure gets into the report
  readonly step: Step;
}

const emptyReport = ({ JobImage: f }: Config, dryRun: boolean): SweepReport => {
  const lists = { stopped: [], left: [], removedRecords: [], problems: [] };
  const isOn = f.AllowedImages.length + f.AllowedServices.length > 0;
  return { dryRun, ...lists, ...(isOn && { deregistered: [] }) };
};

/**
 * Stops orphaned tasks in the cluster:
 *  - of any manager: tasks past their deadline;
 *  - of this manager: tasks whose record is gone, and tasks whose job has had no live process for
 *    AbandonedAfter or since the last boot;
 *  - of other managers on ECS: tasks whose manager's own task has stopped.
 * Then removes old records whose tasks are gone. Never touches other programs' tasks, or jobs with a live
 * stage.
 * @throws {Failure} if the cluster cannot be listed; any other failure is one of the report's problems
 */
async function sweep(
  context: BaseContext,
  { dryRun, manager, progress: step = () => {} }: SweepOptions & { readonly progress?: Step },
): Promise<SweepReport> {
  const { config, log, now, signal, env } = context;
  const { MaxTaskAge, AbandonedAfter } = config.Fargate;
  const { Directory } = config.TaskMetadata;
  checkDirectory(Directory);
  const limits = () => ({ until: now() + STOP_RETRY_MS, signal });
  const aws = new Aws(config.Fargate, context);
  const report = emptyReport(config, dryRun);
  const attempt = async (action: () => Promise<void>) => {
    signal.throwIfAborted();
    await action().catch((error) => {
      signal.throwIfAborted();
      report.problems.push(describeFailure(error));
    });
  };
  step(`listing the tasks of cluster ${config.Fargate.Cluster}`);
  // Reads the records after the tasks: prepare writes the record first, so a task without one has lost it.
  const listed = await aws.describeTasks(await aws.listTasks(undefined, limits()), limits());
  const tasks = listed.filter((task) => STARTED_BY.test(task.startedBy ?? ""));
  const hasDirectory = fs.existsSync(Directory);
  const ownId = hasDirectory && hasManagerId(Directory) ? managerId(Directory, env) : undefined;
  const ids = [manager, ownId];
  const managers = ids.filter((id) => id !== undefined);
  const stoppedManagers: string[] = [];
  await attempt(async () => {
    stoppedManagers.push(...(await findStoppedManagers(context, tasks, managers, limits())));
  });
  let canLock = false;
  await attempt(async () => {
    canLock = hasDirectory && AbandonedAfter > 0 && probeLock(Directory);
  });
  const sharedId = ownId?.length === 32 && ownId !== manager ? ownId : "";
  const rules = { MaxTaskAge, AbandonedAfter, managers, sharedId, stoppedManagers, canLock };
  const steps = { takeSnapshot: () => takeSnapshot(context), limits, attempt, step };
  const shared: Sweep = { context, aws, listed, tasks, rules, report, hasDirectory, ...steps };
  await sweepTasks(shared);
  step("checking the records");
  await sweepRecords(shared);
  sweepTemporaryFiles(shared);
  await sweepDefinitions(shared);
  takeSnapshot(context); // removes the locks of dead processes
  log.debug("sweep leaves {left} tasks running", { left: report.left.length });
  return report;
}

/**
 * On ECS, the other managers of these tasks whose own tasks have stopped. A manager of another cluster, or
 * one that ECS no longer knows, is none of them: its tasks end at their deadline.
 */
async function findStoppedManagers(
  context: BaseContext,
  tasks: readonly Task[],
  known: readonly string[],
  limits: Limits,
): Promise<string[]> {
  const { ECS_CONTAINER_METADATA_URI_V4: endpoint } = context.env;
  const ids = new Set(tasks.map(({ startedBy = "" }) => startedBy.split("-")[1] ?? ""));
  const others = [...ids].filter((id) => id.length === 32 && !known.includes(id));
  if (!endpoint || others.length === 0) return [];
  const own = await readOwnTask(endpoint);
  const described = await new Aws(own, context).describeTasks(others, limits);
  const stopped = described.filter(({ lastStatus }) => lastStatus === "STOPPED");
  return stopped.map(({ taskArn = "" }) => taskArn.slice(-32)).filter((id) => others.includes(id));
}

/** Whether a lock can be created. @throws {Failure} if not */
function probeLock(directory: string): true {
  const probe = join(directory, `.manager-id.${randomBytes(6).toString("hex")}.tmp`);
  const make = () => fs.closeSync(fs.openSync(probe, "wx", 0o600));
  withContext(`no lock can be created in ${directory}, so no job counts as abandoned`, make, "disk");
  fs.rmSync(probe);
  return true;
}

async function stopOrphan({ report, limits, step }: Sweep, aws: Aws, task: SweptTask): Promise<void> {
  step(`stopping ${task.taskArn}`);
  if (!report.dryRun) await aws.stopTask(task.taskArn, `fargate sweep: ${task.why}`, limits());
  report.stopped.push(task);
}

/**
 * Stops orphaned tasks. Judges each one twice: if the clock was set forward, every lock looks old, but
 * between the two snapshots, live processes touch their locks, or a new stage begins.
 */
async function sweepTasks(shared: Sweep): Promise<void> {
  const { context, aws, tasks, rules, report, takeSnapshot, limits } = shared;
  const first = takeSnapshot();
  const judged = tasks
    .filter((task) => !isEnding(task))
    .map((task) => ({ task, before: judgeTask(task, first, rules) }));
  const isDoubtful = ({ cause, task }: ReturnType<typeof judgeTask>) =>
    cause === "abandoned" || (cause && processesOf(first, task.startedBy.slice(-32)).length > 0);
  if (judged.some(({ before }) => isDoubtful(before))) {
    shared.step(`some tasks may be abandoned: judging again in ${LOCK_EXPIRY_MS / 1000} s`);
    await sleep(LOCK_EXPIRY_MS, context.signal);
  }
  for (const { task, before } of judged) {
    const after = before.cause ? judgeTask(task, takeSnapshot(), rules) : before;
    // A touch between the two snapshots is a sign of life, whatever its time.
    const isOrphan = after.cause && after.cause === before.cause && after.lastSign === before.lastSign;
    if (isOrphan)
      await shared.attempt(async () => {
        // Since the tasks were listed, the job's cleanup may have stopped it, and then removed its record.
        const [now] = after.cause === "lost" ? await aws.describeTasks([task.taskArn ?? ""], limits()) : [];
        if (!now || !isEnding(now)) await stopOrphan(shared, aws, after.task);
      });
    else {
      const { why: _, ...left } = after.task;
      report.left.push(left);
    }
  }
}

/** Removes old records whose tasks are gone. Stops orphaned tasks in clusters that only a record names. */
async function sweepRecords(shared: Sweep): Promise<void> {
  const { context, tasks, rules, report, takeSnapshot, limits } = shared;
  const { Fargate, TaskMetadata } = context.config;
  const isAmong = (all: readonly Pick<Task, "taskArn">[], { taskArn }: Task) =>
    all.some((task) => task.taskArn === taskArn);
  const before = takeSnapshot();
  for (const record of before.records) {
    const { name, job, TaskARN, StartedBy } = record;
    if (before.time < (record.UpdatedAt ?? before.time) + SWEEP_RECORDS_AFTER || isInUse(before, job))
      continue;
    await shared.attempt(async () => {
      const aws = new Aws({ ...Fargate, ...record }, context);
      const listed = !TaskARN && StartedBy ? await aws.listTasks(StartedBy, limits()) : [];
      const known = TaskARN && (await aws.describeTask(TaskARN, limits()));
      const named = known ? [known] : await aws.describeTasks(listed, limits());
      // Others could have written the record, and named another program's task.
      const own = named.filter(({ startedBy = "" }) => STARTED_BY.test(startedBy));
      const running = [...own, ...tasks.filter(({ startedBy }) => startedBy?.endsWith(job))].filter(
        (task) => !isEnding(task) && !isAmong(report.stopped, task),
      );
      // Tasks of the configured cluster have been judged before. Tasks elsewhere are judged once.
      const elsewhere = running.filter((task) => !isAmong(tasks, task));
      for (const { cause, task } of elsewhere.map((task) => judgeTask(task, takeSnapshot(), rules)))
        if (cause && cause !== "abandoned") await stopOrphan(shared, aws, task);
      // Prepare creates its lock before its record. If the record is removed here, prepare stops its task.
      const after = takeSnapshot();
      const { UpdatedAt } = after.records.find((record) => record.name === name) ?? {};
      if (running.length > 0 || isInUse(after, job) || UpdatedAt !== record.UpdatedAt) return;
      if (!report.dryRun) fs.rmSync(join(TaskMetadata.Directory, name), { force: true });
      report.removedRecords.push(name);
    });
  }
}

/**
 * Removes old temporary files of interrupted writes, and of removals by an earlier version. Also the files of
 * derived definitions after a week: whoever still uses one finds its ARN at ECS.
 */
function sweepTemporaryFiles({ context, hasDirectory, report }: Sweep): void {
  const { Directory } = context.config.TaskMetadata;
  const temporary =
    /^([\w-]{1,32}-[0-9a-f]{64}\.json|\.manager-(id|task)|\.definition-\w+)\.[0-9a-f]{12}\.(tmp|swept)$/;
  const ofDefinition = /^\.definition-[0-9a-f]{32}(\.lock)?$/;
  for (const name of hasDirectory && !report.dryRun ? fs.readdirSync(Directory) : []) {
    const age = ofDefinition.test(name) ? DEFINITION_AGE : SWEEP_RECORDS_AFTER;
    if (!ofDefinition.test(name) && !temporary.test(name)) continue;
    const { mtimeMs = Infinity } = fs.lstatSync(join(Directory, name), { throwIfNoEntry: false }) ?? {};
    if (context.wallTime() > mtimeMs + age * 1000) removeQuietly(join(Directory, name));
  }
}

/** The report of sweep as text, or as one line of JSON. */
function formatSweep(report: SweepReport, json: boolean): string {
  if (json) return `${JSON.stringify(report)}\n`;
  const time = (seconds: number) => new Date(seconds * 1000).toISOString().replace(".000", "");
  const would = report.dryRun ? "would be " : "";
  const lines = [
    ...report.stopped.map(
      (task) => `${task.taskArn} ${would}stopped: ${task.why}; created ${time(task.createdAt)}`,
    ),
    ...report.removedRecords.map((name) => `${name} ${would}removed: its task is gone`),
    ...(report.deregistered ?? []).map(
      (arn) => `${arn} ${would}deregistered: it is older than a week, and no task uses it`,
    ),
    `tasks: ${report.stopped.length} ${would}stopped, ${report.left.length} left running; ` +
      `records: ${report.removedRecords.length} ${would}removed; problems: ${report.problems.length}`,
  ];
  return lines.map((line) => `${printable(line)}\n`).join("");
}

/** Shows the steps of a command that takes time. `end`: before other output. */
type Progress = Readonly<{ step: Step; end: () => void }>;
/** On a terminal, one line of standard error that each step replaces; otherwise a log line for each step. */
function makeProgress(isTerminal: boolean, log: Log): Progress {
  if (!isTerminal) return { step: (text) => log("{text}", { text }), end: () => {} };
  const replaceLine = (text: string) => writeWhole(2, `\r\x1b[K${text}`);
  return { step: (text) => replaceLine(printable(text).slice(0, 79)), end: () => replaceLine("") };
}

/** Makes a logger whose lines do not begin in the middle of a progress line. */
function loggerBeside({ end }: Progress, log: Logger): Logger {
  const beside =
    (write: Log): Log =>
    (message, fields) => {
      end();
      write(message, fields);
    };
  const { debug, info, warn, error, fatal } = log;
  return { debug, info: beside(info), warn: beside(warn), error: beside(error), fatal: beside(fatal) };
}

/** Formats rows of cells, the first of which are headings. Columns are two spaces apart. */
function formatTable(rows: readonly (readonly string[])[]): string {
  const cells = rows.map((row) => row.map(printable));
  const widths = (cells[0] ?? []).map((_, i) => Math.max(...cells.map((row) => row[i]?.length ?? 0)));
  const lines = cells.map((row) => row.map((cell, i) => cell.padEnd(widths[i] ?? 0)).join("  "));
  return lines.map((line) => `${line.trimEnd()}\n`).join("");
}

/** A duration in its two largest units, such as 1h5m. */
function formatDuration(seconds: number): string {
  const total = Math.max(Math.floor(seconds), 0);
  const [days, hours, minutes] = [total / 86_400, (total / 3600) % 24, (total / 60) % 60].map(Math.floor);
  if (days) return `${days}d${hours}h`;
  if (hours) return `${hours}h${minutes}m`;
  return minutes ? `${minutes}m${total % 60}s` : `${total}s`;
}

// init: writes a configuration file with every setting.

/** Options of `init`: settings, by the last part of the variables with the same effect, and `set`. */
type InitOptions = Readonly<
  Partial<Record<(typeof INIT_OPTIONS)[number], string>> & { set?: readonly string[] }
>;
const INIT_OPTIONS = ["cluster", "region", "subnet", "securityGroup", "sshUser"] as const;

/** Parses `Table.Key=value`, in which the value is TOML, or else text. */
function parseAssignment(assignment: string): Table {
  const [, path = "", text = ""] = /^([^=]*)=(.*)$/s.exec(assignment) ?? [];
  if (!path) throw new Failure("system", `--set ${assignment}: expected Table.Key=value`);
  let value: unknown = text;
  try {
    value = parseToml(`value = ${text}`).value;
  } catch {} // text without quotation marks
  return path.split(".").reduceRight<unknown>((inner, key) => ({ [key.trim()]: inner }), value) as Table;
}

/** A value in one line of TOML. */
function formatInline(value: unknown): string {
  if (Array.isArray(value)) return `[${value.map(formatInline).join(", ")}]`;
  const key = (name: string) => (/^[\w-]+$/.test(name) ? name : formatInline(name));
  if (isTable(value)) {
    const entries = Object.entries(value).map(([name, item]) => `${key(name)} = ${formatInline(item)}`);
    return entries.length > 0 ? `{ ${entries.join(", ")} }` : "{}";
  }
  return JSON.stringify(value).replaceAll("\x7f", "\\u007f");
}

/** Breaks text into comment lines of at most 100 characters. */
function formatComment(text: string): string {
  const lines = text.match(/.{1,98}(\s|$)/g) ?? [];
  return lines.map((line) => `# ${line.trimEnd()}\n`).join("");
}

/** A value for a setting without a default that is not set, to show its type. */
function emptyValue(schema: v.GenericSchema): unknown {
  const { type } = unwrap(schema);
  return { array: [], boolean: false, number: 0 }[type as string] ?? "";
}

/** Required settings that are alternatives: one of the two must be set. */
const ALTERNATIVES: Record<string, string> = { Subnet: "Subnets", SecurityGroup: "SecurityGroups" };

/** The text of a configuration file with every setting. Those without a value are in comments. Pure. */
function formatConfig(settings: Table): string {
  const formatEntry = (key: string, entry: v.GenericSchema, value: unknown) => {
    const isOptional = "wrapped" in entry;
    const fallback = isOptional ? (entry as { default?: unknown }).default : undefined;
    const other = ALTERNATIVES[key];
    const need = other ? ` (required, unless ${other} is set)` : isOptional ? " (no default)" : " (required)";
    const note = fallback === undefined ? need : "";
    const meaning = formatComment(`${v.getDescription(unwrap(entry))}${note}`);
    const shown = `${key} = ${formatInline(value ?? fallback ?? emptyValue(entry))}`;
    return `${meaning}${value === undefined ? "# " : ""}${shown}\n`;
  };
  const sections = Object.entries(ConfigSchema.entries).map(([name, schema]) => {
    const entries = entriesOf(schema);
    if (!entries) return `${formatEntry(name, schema, settings[name])}\n`;
    const table = isTable(settings[name]) ? settings[name] : {};
    const lines = Object.entries(entries).map(([key, entry]) => formatEntry(key, entry, table[key]));
    return `[${name}]\n\n${lines.join("\n")}\n`;
  });
  const title = "Configuration of the Fargate driver for GitLab Runner. A comment shows a setting's default.";
  return `${formatComment(title)}\n${sections.join("")}`.replace(/\n+$/, "\n");
}

/** Merges settings, table by table; later ones win. */
function mergeSettings(layers: readonly Table[]): Table {
  const merged: Table = {};
  for (const [key, value] of layers.flatMap((layer) => Object.entries(layer))) {
    const before = merged[key];
    merged[key] = isTable(value) && isTable(before) ? mergeSettings([before, value]) : value;
  }
  return merged;
}

/**
 * The settings for `init`: defaults, variables of the environment, then options.
 * @returns `missing`: the required settings that nothing sets; `limits`: those of `runnerLimits` that need
 * more than the default
 * @throws {Failure} for an unknown setting or an invalid value
 */
function initialSettings(options: InitOptions, flags: Options, env: Environment) {
  const region = env.FARGATE_REGION || env.WORKER_REGION || env.AWS_REGION || env.AWS_DEFAULT_REGION;
  const [given = {}] = singleManager({ ...env, FARGATE_REGION: region });
  const { cluster, subnet, securityGroup, sshUser } = options;
  const named = [cluster, options.region, subnet, securityGroup, flags.TaskDefinition, sshUser];
  const values = WORKER_FIELDS.flatMap(([table, key, field], i) => {
    const value = named[i] ?? given[field];
    return value === undefined ? [] : [{ [table]: { [key]: value } }];
  });
  const defaults = {
    Fargate: { AllowedTaskDefinitions: [], AllowedPlatformVersions: [] }, // unset would let a job choose any
    TaskMetadata: { Directory: "/opt/gitlab-runner/metadata" },
  };
  const unknown: string[] = [];
  const { PlatformVersion } = flags;
  const platform = PlatformVersion ? [{ Fargate: { PlatformVersion } }] : [];
  const layers = [defaults, ...values, ...platform, ...(options.set ?? []).map(parseAssignment)].map(
    (layer) => normalizeKeys(layer, ConfigSchema, "", unknown) as Table,
  );
  for (const [name, value] of layers.flatMap((layer) => Object.entries(layer)))
    if (entriesOf(ConfigSchema.entries[name as keyof Config]) && !isTable(value))
      unknown.push(`${name} is ${formatValue(value)}; expected: a table, as in ${name}.Key=value`);
  const settings = mergeSettings(layers);
  const missing = missingSettings(settings);
  const placeholders = missing.map(([table, key]) => ({ [table]: { [key]: "to be set" } }));
  const {
    success,
    output,
    issues = [],
  } = v.safeParse(ConfigSchema, mergeSettings([settings, ...placeholders]));
  const problems = [...unknown, ...issues.map((issue) => describeIssue(issue))];
  if (!success || problems.length > 0)
    throw new Failure("system", "the settings cannot be used:", {}, problems);
  const limits = runnerLimits(output).filter(([, byDefault, needed]) => byDefault < needed);
  return { settings, missing: missing.map((path) => path.join(".")), limits };
}

/** The time limits of GitLab Runner that depend on settings of the driver, in seconds. */
function runnerLimits({ Fargate, SSH }: Config): [name: string, byDefault: number, needed: number][] {
  const grace = SSH.CancelGracePeriod + 10; // as in checkRunnerTimeouts
  const stop = STOP_RETRY_MS / 1000;
  return [
    ["prepare_exec_timeout", 3_600, Fargate.StartTimeout + stop],
    ["cleanup_exec_timeout", 3_600, 2 * stop],
    ["graceful_kill_timeout", 600, grace],
    ["shutdown_timeout", 30, grace], // at the top of config.toml
  ];
}

/** The required settings that have no value, each as table and key. */
function missingSettings(settings: Table): [string, string][] {
  return Object.entries(ConfigSchema.entries).flatMap(([table, schema]) => {
    const given = isTable(settings[table]) ? settings[table] : {};
    const isSet = (key: string) => given[key] !== undefined || given[ALTERNATIVES[key] ?? key] !== undefined;
    const required = Object.entries(entriesOf(schema) ?? {}).filter(
      ([key, entry]) => !("wrapped" in entry) || key in ALTERNATIVES,
    );
    return required.flatMap(([key]): [string, string][] => (isSet(key) ? [] : [[table, key]]));
  });
}

/**
 * The `init` command: writes a configuration file with every setting, and prints the runner's section of
 * GitLab Runner's config.toml.
 * @throws {Failure} if the file exists or cannot be written
 */
async function init(
  { log, env, program, driverFile }: Pick<FleetContext, "log" | "env" | "program" | "driverFile">,
  options: InitOptions,
  flags: Options,
  print: (text: string) => void,
): Promise<void> {
  const { settings, missing, limits } = initialSettings(options, flags, env);
  const { success, output: url } = v.safeParse(webAddress, env.GITLAB_URL || "https://gitlab.com");
  if (!success) throw new Failure("system", "GITLAB_URL is no address such as https://gitlab.example.com");
  if (fs.lstatSync(driverFile, { throwIfNoEntry: false }))
    throw new Failure("system", `${driverFile} exists already`, { problem: "newFile" });
  const runner = { isRegistration: false, limit: 0, driverFile };
  const fleet = { gitlab: { url }, cache: undefined, caFile: "", managers: [] };
  const section = await formatSection(fleet, runner, { name: "fargate", token: "__REDACTED__" }, program);
  const write = () => {
    const file = fs.openSync(driverFile, "wx", 0o644);
    try {
      fs.writeFileSync(file, formatConfig(settings));
    } catch (error) {
      removeQuietly(driverFile); // otherwise the next call would not overwrite it
      throw error;
    } finally {
      fs.closeSync(file);
    }
  };
  withContext(`${driverFile} cannot be written`, write, "disk");
  const token = "The token is the runner's own, which begins with glrt- and which GitLab shows once.";
  const longer = limits.map(([name, , needed]) => `${name} = ${needed}`);
  const atTop = longer.filter((line) => line.startsWith("shutdown_timeout"));
  const top = atTop.map((line) => ` The top of that file needs ${line} or more.`).join("");
  // The section ends with the table of the stages, to which these belong.
  const inSection = longer.filter((line) => !atTop.includes(line)).map((line) => `${line}\n`);
  const comment = formatComment(`The runner's section of GitLab Runner's config.toml. ${token}${top}`);
  print(`${comment}${section}${inSection.join("")}\n`);
  log.info("{driverFile} written; check it with: fargate --config {driverFile} doctor", { driverFile });
  if (missing.length > 0)
    log.warn("still to be set in {driverFile}: {missing}", { driverFile, missing: missing.join(", ") });
}

// tasks: shows the tasks that are running.

type TasksOptions = Readonly<{ all: boolean; json: boolean }>;
/** A job's task. What is unknown is null. Times are in epoch seconds. */
interface RunningTask {
  readonly job: number | null; // GitLab's ids
  readonly project: number | null;
  readonly taskArn: string | null; // null until RunTask has answered
  readonly state: string | null; // ECS's lastStatus
  readonly createdAt: number;
  readonly deadline: number | null; // when sweep stops the task; null before RunTask
  readonly address: string | null;
  readonly startedBy: string;
  readonly stages: readonly string[]; // of this host, in progress
}

/** Tags that tell the job of a task. */
const JOB_TAGS = { job: "gitlab:job-id", project: "gitlab:project-id" } as const;

/**
 * Whether the directory of records exists, for operators. @throws {Failure} if only another user can read it
 */
function hasRecords({ config }: BaseContext): boolean {
  const { Directory } = config.TaskMetadata;
  const what = `TaskMetadata.Directory ${Directory}`;
  const look = () => fs.statSync(Directory, { throwIfNoEntry: false });
  const found = withContext(`${what} cannot be read`, look, "runnerUser");
  if (!found) return false;
  if (found.uid !== 0 && found.uid !== process.geteuid?.())
    throw new Failure("system", `${what} belongs to another user (id ${found.uid})`, {
      problem: "runnerUser",
    });
  withContext(`${what} cannot be read`, () => fs.readdirSync(Directory), "runnerUser");
  return true;
}

/** GitLab's id of a record's job, also of a broken record. */
const jobIdOf = ({ name, JobID }: Snapshot["records"][number]): number | null =>
  JobID ?? (Number(/^job-(\d{1,15})-[0-9a-f]{64}\.json$/.exec(name)?.[1]) || null);

/**
 * Describes the tasks of records that a list of tasks lacks: in other clusters, just started, or stopped. A
 * cluster that cannot be asked only causes a warning.
 */
async function describeUnlisted(context: BaseContext, records: Snapshot["records"], listed: readonly Task[]) {
  const { config, now, signal, log } = context;
  const unlisted = records.filter(
    ({ TaskARN }) => TaskARN && !listed.some(({ taskArn }) => taskArn === TaskARN),
  );
  const places = Map.groupBy(unlisted, ({ Region, Cluster }) => `${Region} ${Cluster}`);
  const described = [...places.values()].map(async (group) => {
    const arns = group.flatMap(({ TaskARN = "" }) => TaskARN);
    const limits = { until: now() + UNLISTED_RETRY_MS, signal };
    const place = { ...config.Fargate, ...group[0] };
    return new Aws(place, context).describeTasks(arns, limits).catch((error): Task[] => {
      signal.throwIfAborted();
      const fields = { cluster: place.Cluster, names: group.map(({ name }) => name).join(", ") };
      log.warn("cluster {cluster}, which {names} names: {reason}", {
        ...fields,
        reason: describeFailure(error),
      });
      return [];
    });
  });
  return (await Promise.all(described)).flat();
}
const UNLISTED_RETRY_MS = 10_000;

/**
 * The running tasks of this manager, or with `all` those of every manager on the cluster, oldest first.
 * Changes nothing.
 * @throws {Failure} if ECS does not answer, or the records cannot be read
 */
async function listRunningTasks(context: BaseContext, all: boolean): Promise<RunningTask[]> {
  const { config, now, signal, log, env } = context;
  const { Directory } = config.TaskMetadata;
  const exists = hasRecords(context);
  if (!exists) log.info("no job has run with TaskMetadata.Directory {Directory} yet", { Directory });
  const taken = takeSnapshot(context, false);
  // cleanup makes a deadline 1 when it begins to stop the task.
  const withTime = (record: Snapshot["records"][number]) =>
    record.Deadline === 1 ? { ...record, Deadline: Math.floor(record.mtimeMs / 1000) } : record;
  const snapshot = { ...taken, records: taken.records.map(withTime) };
  const ownId = exists ? knownManagerId(Directory, env) : undefined;
  // A task with a record is this manager's also if the host's name, and so the id, has changed.
  const isOwn = (startedBy: string) =>
    ownId === startedBy.split("-")[1] || snapshot.records.some(({ job }) => job === startedBy.slice(-32));
  const isShown = ({ startedBy = "" }: Task) => STARTED_BY.test(startedBy) && (all || isOwn(startedBy));
  const aws = new Aws(config.Fargate, context);
  const limits = { until: now() + STOP_RETRY_MS, signal };
  const arns = all || ownId ? await aws.listTasks(undefined, limits) : [];
  const listed = (await aws.describeTasks(arns, limits, ["TAGS"])).filter(isShown);
  const others = (await describeUnlisted(context, snapshot.records, listed)).filter(isShown);
  const running = [...listed, ...others].map((task) => describeRunning(task, snapshot, config, ownId));
  // ECS may list a task before RunTask has answered.
  const isDescribed = ({ TaskARN, StartedBy }: Partial<TaskRecord>) =>
    running.some((task) => (TaskARN ? task.taskArn === TaskARN : task.startedBy === StartedBy));
  const rest = snapshot.records.filter((record) => record.StartedBy && !isDescribed(record));
  const undescribed = rest.map((record): RunningTask => {
    const { TaskARN, StartedBy = "", UpdatedAt, ProjectID: project = null } = record;
    const createdAt = UpdatedAt ?? Math.floor(snapshot.time);
    const stages = stagesInProgress(snapshot, StartedBy);
    const unknown = { state: null, deadline: record.Deadline || null, address: record.ContainerIP || null };
    const taskArn = TaskARN || null;
    return { job: jobIdOf(record), project, taskArn, ...unknown, createdAt, startedBy: StartedBy, stages };
  });
  return [...running, ...undescribed].sort((a, b) => a.createdAt - b.createdAt);
}

/** One task, with what its record or its tags tell of the job. */
function describeRunning(
  task: Task,
  snapshot: Snapshot,
  { Fargate: { MaxTaskAge } }: Config,
  ownId: string | undefined,
): RunningTask {
  const { taskArn = "", startedBy = "", lastStatus: state = null } = task;
  const record =
    snapshot.records.find((record) => record.TaskARN === taskArn) ??
    snapshot.records.find((record) => !record.TaskARN && record.job === startedBy.slice(-32));
  const tag = (wanted: string) => {
    const { value = "" } = task.tags?.find(({ key }) => key === wanted) ?? {};
    return /^\d{1,15}$/.test(value) ? Number(value) : null;
  };
  const managers = ownId ? [ownId] : [];
  const rules = {
    MaxTaskAge,
    AbandonedAfter: 0,
    managers,
    sharedId: "",
    stoppedManagers: [],
    canLock: false,
  };
  const { createdAt, deadline } = judgeTask(task, snapshot, rules).task;
  return {
    job: (record && jobIdOf(record)) ?? tag(JOB_TAGS.job),
    project: record?.ProjectID ?? tag(JOB_TAGS.project),
    ...{ taskArn, state, createdAt, deadline, startedBy },
    address: record?.ContainerIP || interfaceOf(task).address || null,
    stages: stagesInProgress(snapshot, startedBy),
  };
}

/** The stages of a job that have a live process on this host. */
const stagesInProgress = (snapshot: Snapshot, startedBy: string): string[] =>
  processesOf(snapshot, startedBy.slice(-32)).flatMap(({ stage, isAlive }) => (isAlive ? stage : []));

/** The running tasks as a table, or as one line of JSON. @param time epoch seconds */
function formatTasks(tasks: readonly RunningTask[], json: boolean, time: number): string {
  if (json) return `${JSON.stringify({ tasks })}\n`;
  const headings = ["JOB", "PROJECT", "TASK", "STATE", "AGE", "DEADLINE", "ADDRESS"];
  const deadlineText = (deadline: number) =>
    deadline > time ? `in ${formatDuration(deadline - time)}` : `${formatDuration(time - deadline)} ago`;
  const rows = tasks.map(({ job, project, taskArn, state, createdAt, deadline, address }) => [
    ...[job, project, taskArn?.split("/").at(-1), state].map((cell) => `${cell ?? "-"}`),
    formatDuration(time - createdAt),
    deadline ? deadlineText(deadline) : "-",
    address ?? "-",
  ]);
  return formatTable([headings, ...rows]);
}

// shell: opens a login, or runs a command, in a job's task.

/**
 * The record of a running job. Only reads it: the job must not notice.
 * @param wanted GitLab's job id, or the id of a task
 * @throws {Failure} if there is none or more than one, or if it cannot be used
 */
function findJobRecord(context: BaseContext, wanted: string): TaskRecord {
  const { Directory } = context.config.TaskMetadata;
  const records = hasRecords(context) ? readRecords(Directory) : [];
  const matches = records.filter(
    (record) => `${jobIdOf(record)}` === wanted || record.TaskARN?.split("/").at(-1) === wanted,
  );
  const [match] = matches;
  if (matches.length > 1) {
    const line = ({ ProjectID, TaskARN }: Partial<TaskRecord>) =>
      `project ${ProjectID ?? "unknown"}: task ${TaskARN?.split("/").at(-1) || "not started"}`;
    const what = `${matches.length} running jobs have the id ${wanted}; name one by its task:`;
    throw new Failure("system", what, {}, matches.map(line));
  }
  const record =
    match && withContext("the job's task is out of reach", () => readRecord(join(Directory, match.name)));
  if (!record) throw new Failure("system", `no job ${wanted} runs on this host`, { problem: "jobId" });
  if (!record.ContainerIP)
    throw new Failure("system", `nobody can log in to job ${wanted} yet: its task is starting`);
  return record;
}

/** The command line for a login shell: a single argument as it is, several as a program and its arguments. */
const commandLine = (words: readonly string[]): string =>
  words.length === 1 ? `${words[0]}` : words.map((word) => `'${word.replaceAll("'", "'\\''")}'`).join(" ");

/** Runs a command in a job's task. @returns its exit code. @throws {Failure} */
async function runShellCommand(
  context: BaseContext & OutputSinks,
  record: TaskRecord,
  connection: Connection,
  command: string,
): Promise<number> {
  const shells = { interpreter: record.Interpreter, loginShell: record.LoginShell };
  const outcome = await runScript(connection, Buffer.from(`${command}\n`), shells, context);
  if (outcome.ended === "exited") return outcome.code;
  throw await lostConnection(context, record, outcome.reason);
}

/** The failure of a connection that broke, with the state of the task. */
async function lostConnection(context: BaseContext, record: TaskRecord, reason: string): Promise<Failure> {
  context.log.info("the connection is lost; asking ECS for the state of the task");
  const { state, cause } = await describeTaskState(context, record, 10_000);
  return new Failure("system", `the connection to the container was lost: ${reason}; ${state}`, cause);
}

/** The operator's terminal. */
interface Terminal {
  readonly input: Pick<NodeJS.ReadStream, "on" | "off" | "pause" | "resume">;
  readonly output: Pick<NodeJS.WriteStream, "write" | "once" | "on" | "off" | "rows" | "columns">;
  readonly type: string; // TERM
}

/**
 * Puts the terminal of standard input in raw mode, as ssh does. The runtime's own raw mode would still change
 * line ends, which breaks full-screen programs.
 * @returns a function that restores it. @throws {Failure} without stty
 */
function makeRaw(): () => void {
  const stty = (...args: string[]) => {
    const { success, stdout } = Bun.spawnSync(["stty", ...args], { stdin: "inherit" });
    if (!success) throw new Error(`stty ${args.join(" ")} fails`);
    return stdout.toString().trim();
  };
  return withContext("the terminal cannot be used", () => {
    const before = stty("-g");
    stty("raw", "-echo");
    return () => void stty(before);
  });
}

/** Whether keys end with `~.` at the beginning of a line: as with ssh, that leaves a login that hangs. */
const isEscape = (keys: string): boolean => /(^|[\r\n])~\.$/.test(keys);

/**
 * Connects the operator's terminal to a login shell with a terminal of its own, until the shell ends. Keys,
 * Ctrl-C included, go to the shell.
 * @returns the shell's exit code or signal; undefined if the connection was lost
 */
async function runTerminal(
  { client }: Connection,
  { input, output, type }: Terminal,
  signal: AbortSignal,
): Promise<Exit> {
  const ended = Promise.withResolvers<Exit>();
  let channel: ClientChannel | undefined;
  const early: Buffer[] = []; // keys from before the shell has started
  let typed = ""; // the last keys
  const onInput = (keys: Buffer) => {
    typed = (typed + keys.toString("latin1")).slice(-3);
    if (isEscape(typed)) ended.reject(new Failure("system", "left by ~."));
    else if (channel) channel.write(keys);
    else early.push(keys);
  };
  const onResize = () => void channel?.setWindow(output.rows, output.columns, 0, 0);
  const open = (error: Error | undefined, opened: ClientChannel) => {
    if (error)
      return ended.reject(new Failure("system", `the server opened no terminal: ${sshReason(error)}`));
    channel = opened;
    for (const keys of early) channel.write(keys);
    let exit: Exit;
    opened.on("data", (part: Buffer) => {
      if (output.write(part)) return;
      opened.pause();
      output.once("drain", () => opened.resume());
    });
    opened.on("exit", (code: number | null, name?: string) => {
      exit = code ?? (name as NodeJS.Signals);
    });
    opened.on("close", () => ended.resolve(exit));
  };
  const restore = makeRaw();
  try {
    client.on("close", () => ended.resolve(undefined));
    input.on("data", onInput).resume();
    output.on("resize", onResize);
    client.shell({ term: type, rows: output.rows, cols: output.columns }, open);
    const exit = await withAbort(signal, () => ended.reject(signal.reason), ended.promise);
    if (exit === undefined) output.write("\r\n");
    return exit;
  } catch (error) {
    output.write("\r\n"); // the reason begins a line
    throw error;
  } finally {
    output.off("resize", onResize);
    input.off("data", onInput).pause();
    restore();
  }
}

const SHELL_KEEP_ALIVE = 15; // seconds, if KeepAliveInterval is 0: an operator should not wait in vain

/** The `shell` command. @returns the exit code of the login shell or the command. @throws {Failure} */
async function shell(
  context: BaseContext & OutputSinks,
  [wanted = "", ...command]: readonly string[],
  terminal: Terminal | undefined,
): Promise<number> {
  const { config, log, signal } = context;
  const record = findJobRecord(context, wanted);
  if (command.length === 0 && !terminal)
    throw new Failure("system", "this is no terminal", { problem: "noTerminal" });
  const failed = async (error: unknown): Promise<never> => {
    if (!(error instanceof SshFailure)) throw error;
    const { ended, state, cause } = await describeTaskState(context, record, 0);
    const what = `no login to job ${wanted}: ${reasonOf(error)}; ${state}`;
    // The server has answered: its fault is not that of a task that merely runs.
    const own = !ended && error.why !== "unreachable" ? error.cause.problem : undefined;
    throw new Failure("system", what, { problem: own ?? cause.problem ?? error.cause.problem });
  };
  const KeepAliveInterval = config.SSH.KeepAliveInterval || SHELL_KEEP_ALIVE;
  const target = { ...targetOf(config, record), KeepAliveInterval };
  const connection = await connect(target, MAX_SILENCE_MS, signal).catch(failed);
  let reason = "the server closed it";
  connection.client.on("error", (error) => {
    reason = sshReason(error);
  });
  try {
    // Another task could have the address by now.
    const { ended, state, cause } = await describeTaskState(context, record, 0);
    if (ended !== false) throw new Failure("system", `no login to job ${wanted}: ${state}`, cause);
    if (command.length > 0) return await runShellCommand(context, record, connection, commandLine(command));
    const instead = "the script of this job runs in a container of its own, which has no SSH server";
    if (record.Build) log.info("This is {container}; {instead}", { container: CONTAINER, instead });
    const exit = await runTerminal(connection, terminal as Terminal, signal);
    if (exit === undefined) throw await lostConnection(context, record, reason);
    return typeof exit === "number" ? exit : 128 + (osConstants.signals[exit] ?? 0);
  } finally {
    connection.client.destroy();
  }
}

// doctor: checks an installation.

/** Options of `doctor`. `run`: whether to start a task */
type DoctorOptions = Readonly<{ run: boolean; json: boolean; runnerConfig?: string }>;
type Result = "right" | "wrong" | "unknown";
/** One row of doctor's table. `fix`: what to do if it is wrong */
interface Finding extends Readonly<Record<"check" | "detail", string>> {
  readonly result: Result;
  readonly fix?: string;
}

/** Problems of a call that tell nothing about what it asks for. */
const NOT_ANSWERED = "accessDenied unreachable certificate proxy throttled awsFault clock".split(" ");
const isUnanswered = (error: unknown): boolean => NOT_ANSWERED.includes(causeOf(error).problem ?? "");

/** Collects findings. `prefix`: what the names of all checks begin with */
class Examination {
  constructor(
    private readonly signal: AbortSignal,
    readonly findings: Finding[] = [],
    private readonly prefix = "",
  ) {}
  /** The same examination, for the checks of one thing. */
  of = (thing: string) => new Examination(this.signal, this.findings, `${thing}: `);
  #add = (check: string, rest: Omit<Finding, "check">) =>
    void this.findings.push({ check: `${this.prefix}${check}`, ...rest } as Finding);
  right = (check: string, detail: string) => this.#add(check, { result: "right", detail });
  wrong = (check: string, detail: string, fix: string) => this.#add(check, { result: "wrong", detail, fix });
  unknown = (check: string, detail: string) => this.#add(check, { result: "unknown", detail });
  /** @param problem what is wrong, if anything */
  judge = (check: string, detail: string, problem: string | false | undefined, fix: string) =>
    problem ? this.wrong(check, problem, fix) : this.right(check, detail);

  /**
   * Runs a check. An error is a problem if there is advice for it or a `fix`. Otherwise, or if AWS did not
   * answer, the result is unknown.
   */
  async attempt(check: string, action: () => Promise<void> | void, fix?: string): Promise<void> {
    try {
      await action();
    } catch (error) {
      this.signal.throwIfAborted();
      const advice = adviceFor(causeOf(error)) ?? fix;
      if (advice && !isUnanswered(error)) this.wrong(check, reasonOf(error), advice);
      else this.unknown(check, `not checked: ${reasonOf(error)}`);
    }
  }
}

/** What the checks share. */
interface Checkup {
  readonly context: BaseContext;
  readonly aws: InspectorAws;
  readonly report: Examination;
  readonly step: Step;
}

/** Whose the credentials are, and where they come from. */
type Identity = Readonly<Record<"account" | "arn" | "source", string>>;
/** The SDK's names for sources of credentials. */
const CREDENTIAL_SOURCES: Readonly<Record<string, string>> = {
  CREDENTIALS_CODE: "environment variables",
  CREDENTIALS_ENV_VARS: "environment variables",
  CREDENTIALS_ENV_VARS_STS_WEB_ID_TOKEN: "a web identity token",
  CREDENTIALS_PROFILE_STS_WEB_ID_TOKEN: "a profile with a web identity token",
  CREDENTIALS_PROFILE_SOURCE_PROFILE: "a profile with a role",
  CREDENTIALS_PROFILE_NAMED_PROVIDER: "a profile with a role",
  CREDENTIALS_PROFILE_SSO: "a profile with SSO",
  CREDENTIALS_PROFILE_SSO_LEGACY: "a profile with SSO",
  CREDENTIALS_PROFILE_LOGIN: "a profile with aws login",
  CREDENTIALS_PROFILE_PROCESS: "the credential_process of a profile",
  CREDENTIALS_PROFILE: "a profile",
  CREDENTIALS_STS_ASSUME_ROLE: "a profile with a role",
  CREDENTIALS_HTTP: "the container's credentials endpoint",
  CREDENTIALS_IMDS: "the EC2 instance's role",
};

interface Ec2Resources {
  readonly Subnets: Subnet;
  readonly SecurityGroups: SecurityGroup;
  readonly RouteTables: RouteTable;
  readonly VpcEndpoints: VpcEndpoint;
  readonly NetworkInterfaces: NetworkInterface;
}
const ASK_MS = 5_000; // how long doctor repeats a call
const NO_ID = "0".repeat(32); // of no task and no derived task definition

/** The calls that only doctor makes. They change nothing. */
class InspectorAws extends Aws {
  readonly unreachable = new Map<string, unknown>(); // services with the reason: they are not called again
  clockSkew = Number.NaN; // seconds that this host is ahead of AWS; NaN before an answer
  #iam: Promise<IAM> | undefined;

  constructor(private readonly base: BaseContext) {
    super(base.config.Fargate, base);
  }

  limits = (): Limits => ({ until: this.base.now() + ASK_MS, signal: this.base.signal });

  protected override async settings() {
    const settings = await super.settings();
    const { requestHandler } = settings;
    const handle = requestHandler.handle.bind(requestHandler);
    requestHandler.handle = async (...args) => {
      const asked = this.base.wallTime();
      const result = await handle(...args);
      const date = Date.parse(result.response.headers.date ?? "") + 500; // it has whole seconds
      if (Number.isNaN(this.clockSkew)) this.clockSkew = ((asked + this.base.wallTime()) / 2 - date) / 1000;
      return result;
    };
    return settings;
  }

  protected override async send<T>(action: string, limits: Limits, call: (abort: Abort) => Promise<T>) {
    const [service = ""] = action.split(":");
    if (this.unreachable.has(service)) throw this.unreachable.get(service);
    return super.send(action, limits, call).catch((error) => {
      const { problem = "" } = causeOf(error);
      if (["unreachable", "certificate", "proxy"].includes(problem)) this.unreachable.set(service, error);
      throw error;
    });
  }

  async identify(): Promise<Identity> {
    const { STS } = await import("@aws-sdk/client-sts");
    const sts = new STS(await this.settings());
    const ask = (abort: Abort) => sts.getCallerIdentity({}, abort);
    const { Account = "", Arn = "" } = await this.send("sts:GetCallerIdentity", this.limits(), ask);
    const { $source = {} } = (await sts.config.credentials()) as { $source?: Record<string, string> };
    const [source = "an unknown source"] = Object.keys($source).flatMap(
      (name) => CREDENTIAL_SOURCES[name] ?? [],
    );
    return { account: Account, arn: Arn, source };
  }

  #iamClient(): Promise<IAM> {
    this.#iam ??= this.settings().then(
      async (settings) => new (await import("@aws-sdk/client-iam")).IAM(settings),
    );
    return this.#iam;
  }

  /** The principal that policies are attached to: for a session of a role, the role. */
  async principalOf({ arn }: Identity): Promise<string> {
    const [, partition, account, RoleName] =
      /^arn:([\w-]+):sts::(\d+):assumed-role\/([^/]+)\//.exec(arn) ?? [];
    if (!RoleName) return arn;
    const iam = await this.#iamClient();
    const get = (abort: Abort) => iam.getRole({ RoleName }, abort);
    const answer = await this.send("iam:GetRole", this.limits(), get).catch(() => undefined);
    // Without this permission, assumes that the role has no path.
    return answer?.Role?.Arn ?? `arn:${partition}:iam::${account}:role/${RoleName}`;
  }

  /** Asks IAM whether its policies allow something. */
  async simulate(principal: string, { action, resource, conditions }: Permission) {
    const iam = await this.#iamClient();
    const known = {
      "aws:RequestedRegion": this.location.Region,
      "aws:PrincipalArn": principal,
      ...conditions,
    };
    const ContextEntries = Object.entries(known).map(([ContextKeyName, value]) => {
      return { ContextKeyName, ContextKeyType: "string" as const, ContextKeyValues: [value] };
    });
    const request = {
      PolicySourceArn: principal,
      ActionNames: [action],
      ResourceArns: [resource],
      ContextEntries,
    };
    const ask = (abort: Abort) => iam.simulatePrincipalPolicy(request, abort);
    const answer = await this.send("iam:SimulatePrincipalPolicy", this.limits(), ask);
    return answer.EvaluationResults?.[0];
  }

  /** The cluster; undefined if there is none of this name. */
  async describeCluster(): Promise<Cluster | undefined> {
    const ecs = await this.ecsClient();
    const input = { clusters: [this.location.Cluster] };
    const ask = (abort: Abort) => ecs.describeClusters(input, abort);
    return (await this.send("ecs:DescribeClusters", this.limits(), ask)).clusters?.[0];
  }

  /** Calls StopTask with the id of no task. */
  async stopNoTask(): Promise<void> {
    const ecs = await this.ecsClient();
    const input = { cluster: this.location.Cluster, task: NO_ID, reason: "job of fargate doctor" };
    await this.send("ecs:StopTask", this.limits(), (abort) => ecs.stopTask(input, abort)).catch((error) => {
      if (causeOf(error).problem !== "noTask") throw error;
    });
  }

  /** Describes EC2's resources of a kind by a filter. One that matches nothing is no error, unlike an id. */
  async describe<K extends keyof Ec2Resources>(kind: K, filter: string, values: readonly string[]) {
    const ec2 = await this.ec2Client();
    type Answer = { readonly [Kind in K]?: Ec2Resources[K][] };
    const call: (input: object, abort: Abort) => Promise<unknown> = ec2[`describe${kind}`].bind(ec2);
    const input = { Filters: [{ Name: filter, Values: [...values] }] };
    const answer = await this.send(`ec2:Describe${kind}`, this.limits(), (abort) => call(input, abort));
    return (answer as Answer)[kind] ?? [];
  }
}

/** Checks the settings by themselves. @param warnings about keys without effect */
async function checkSettings(
  { context, report }: Checkup,
  driverFile: string,
  warnings: readonly string[],
): Promise<void> {
  const { Fargate: f, SSH } = context.config;
  for (const warning of warnings) report.wrong("configuration", warning, "correct or remove it");
  if (warnings.length === 0) report.right("configuration", driverFile);
  const allowed = f.AllowedTaskDefinitions;
  const isOpen =
    !allowed && "it is not set: a job may choose any task definition, with its roles and secrets";
  const fix = 'set it to the task definitions that jobs may choose, such as ["ci-*"], or to []';
  const patterns = allowed?.filter((name) => name.includes("*")) ?? [];
  const unchecked = patterns.length > 0 ? `; definitions of ${patterns.join(", ")} are not checked` : "";
  report.judge("AllowedTaskDefinitions", `${formatInline(allowed ?? [])}${unchecked}`, isOpen, fix);
  if (f.UsePublicIP && !f.EnablePublicIP)
    report.wrong("UsePublicIP", "without EnablePublicIP, tasks have no public address", ADVICE.publicAddress);
  const readKey = async (path: string) => {
    await keyPairOf(fs.readFileSync(path, "utf8"));
    report.right("PrivateKeyPath", path);
  };
  const { PrivateKeyPath: path } = SSH;
  const keyFix = "name a private key without a passphrase that this user can read, or remove PrivateKeyPath";
  if (path) await report.attempt("PrivateKeyPath", () => readKey(path), keyFix);
}

/** Checks whose the credentials are. @returns `isUsable`: whether AWS can be asked anything else */
async function checkIdentity({ aws, context, report }: Checkup) {
  const { Cluster, TaskDefinition } = context.config.Fargate;
  let identity: Identity | undefined;
  let isUsable = true;
  const identify = async () => {
    identity = await aws.identify().catch((error) => {
      isUsable = isUnanswered(error); // such as in a VPC without an endpoint for STS
      throw error;
    });
    const { arn, source, account } = identity;
    const isForeign = (name: string) => name.startsWith("arn:") && name.split(":")[4] !== account;
    const foreign = [Cluster, TaskDefinition].find(isForeign);
    isUsable = !foreign;
    const problem = foreign && `${arn}, from ${source}, is of another account than ${foreign}`;
    const fix = `use credentials of account ${foreign?.split(":")[4]}, or correct that ARN`;
    report.judge("credentials", `${arn}, from ${source}`, problem, fix);
  };
  await report.attempt("credentials", identify, "correct this first: without it, AWS cannot be called");
  return { identity, isUsable };
}

const isFargate = (place: string): boolean => /^FARGATE(_SPOT)?$/.test(place);
/** Where tasks start: names of capacity providers, or a launch type. Empty if that is not known. */
function placesOf({ Fargate: f }: Config, cluster: Cluster | undefined): string[] {
  const named = (strategy: Config["Fargate"]["CapacityProviderStrategy"]) =>
    strategy?.map(({ CapacityProvider }) => CapacityProvider);
  const inherited = cluster?.defaultCapacityProviderStrategy?.map(
    ({ capacityProvider }) => `${capacityProvider}`,
  );
  const byDefault = cluster && !inherited?.length ? ["EC2"] : (inherited ?? []); // as ECS does
  const first = f.LaunchType ? [f.LaunchType] : (named(f.CapacityProviderStrategy) ?? byDefault);
  return [...new Set([...first, ...(named(f.FallbackCapacityProviderStrategy) ?? [])])];
}

/** Checks the cluster, and whether tasks can start where the settings want. */
function checkCluster({ context: { config }, report }: Checkup, cluster: Cluster | undefined): void {
  const { Cluster: name, Region, LaunchType, EnablePublicIP } = config.Fargate;
  const isAbsent =
    cluster?.status !== "ACTIVE" &&
    `${name} ${cluster ? `is ${cluster.status}` : "does not exist"} in ${Region}`;
  const shortName = name.split("/").at(-1);
  const command = `aws ecs create-cluster --cluster-name ${shortName}`;
  const create = `correct Cluster or Region, or create it: ${command}`;
  report.judge("cluster", `${cluster?.clusterArn} is ACTIVE`, isAbsent, create);
  if (!cluster || isAbsent) return;
  const { capacityProviders: known = [], defaultCapacityProviderStrategy: byDefault = [] } = cluster;
  const places = placesOf(config, cluster);
  const lacking = places.filter((place) => place !== LaunchType && place !== "EC2" && !known.includes(place));
  const isEmpty = places.includes("EC2") && !cluster.registeredContainerInstancesCount;
  const lacks = lacking.length > 0 && `the cluster lacks ${lacking.join(", ")}`;
  const noInstances = isEmpty && `tasks would start on EC2 instances, but the cluster has none`;
  const isPublic =
    EnablePublicIP &&
    !places.every(isFargate) &&
    `EnablePublicIP is set, but tasks start on ${places.join(", ")}`;
  const options = `--cluster ${name} --capacity-providers ${[...known, ...lacking].join(" ")}`;
  const strategy = `--default-capacity-provider-strategy '${JSON.stringify(byDefault)}'`;
  const add = `aws ecs put-cluster-capacity-providers ${options} ${strategy}`;
  const instances = LaunchType ? ADVICE.instances : ADVICE.launchType;
  const fix = lacks ? add : noInstances ? instances : ADVICE.publicIp;
  report.judge("launch type", places.join(", "), lacks || noInstances || isPublic, fix);
}

const ECR_IMAGE = /^\d{12}\.dkr[.-]ecr[.-]/;
/** Whether a container needs an execution role. EC2 instances pull images and write logs with their own. */
const needsExecutionRole = (container: ContainerDefinition, onFargate: boolean): boolean => {
  const { image = "", logConfiguration: log, secrets, environmentFiles, repositoryCredentials } = container;
  const byInstance = ECR_IMAGE.test(image) || log?.logDriver === "awslogs";
  const lists = [secrets, environmentFiles, log?.secretOptions];
  return (onFargate && byInstance) || Boolean(repositoryCredentials) || lists.some((list) => list?.length);
};

/** Checks a task definition, for the driver and for the places where tasks start. */
function checkDefinition({ context, report }: Checkup, d: TaskDefinition, places: readonly string[]): void {
  const { Fargate: f, SSH } = context.config;
  const { judge, unknown } = report.of(`definition ${d.family}`);
  const arn = `${d.taskDefinitionArn}`;
  const containers = d.containerDefinitions ?? [];
  const container = containers.find(({ name }) => name === CONTAINER);
  const names = containers.map(({ name }) => name).join(", ");
  const required = d.requiresCompatibilities?.join(", ") || "EC2"; // ECS's default
  const onFargate = places.some(isFargate);
  const isUnfit = onFargate && !required.includes("FARGATE") && `it is for ${required}, not for FARGATE`;
  const where = "where tasks start is not known";
  const { operatingSystemFamily: system = "LINUX", cpuArchitecture = "X86_64" } = d.runtimePlatform ?? {};
  const isWindows = system !== "LINUX" && `its operating system is ${system}`;
  const needsRole = (isFargate: boolean) => containers.some((of) => needsExecutionRole(of, isFargate));
  const lacksRole =
    !d.executionRoleArn && needsRole(onFargate) && "there is none, for the image, log or secrets";
  const lacksTaskRole = f.EnableExecuteCommand && !d.taskRoleArn && "there is none, but ECS Exec needs it";
  const isLost = !container && !SSH.PrivateKeyPath && `there is no ${CONTAINER}, only ${names}`;
  const roleFix = "set executionRoleArn to a role as in examples/iam/execution-role.json";
  judge("status", `${arn} is ACTIVE`, d.status !== "ACTIVE" && `${arn} is ${d.status}`, ADVICE.definition);
  judge("network mode", "awsvpc", d.networkMode !== "awsvpc" && `it is ${d.networkMode}`, ADVICE.networkMode);
  if (places.length === 0) unknown("compatibility", `${required}; ${where}`);
  else
    judge(
      "compatibility",
      required,
      isUnfit,
      'add "FARGATE" to requiresCompatibilities, with cpu and memory',
    );
  judge("platform", `${system}, ${cpuArchitecture}`, isWindows, "use a Linux image: scripts need bash or sh");
  if (places.length === 0 && !d.executionRoleArn && !lacksRole && needsRole(true))
    unknown("execution role", `there is none, which Fargate needs; ${where}`);
  else judge("execution role", d.executionRoleArn ?? "none is needed", lacksRole, roleFix);
  judge("task role", d.taskRoleArn ?? "none: jobs get no AWS credentials", lacksTaskRole, ADVICE.taskRole);
  judge("container", container?.image ?? "PrivateKeyPath needs none", isLost, ADVICE.container);
  if (!container) return;
  const { portMappings = [], secrets = [], logConfiguration: log, healthCheck } = container;
  const ports = portMappings.flatMap(({ containerPort }) => containerPort ?? []); // but for ranges
  const isOther = !ports.includes(SSH.Port) && `it maps ${ports.join(", ")}, but Port is ${SSH.Port}`;
  const isSecret = secrets.some(({ name }) => name === "SSH_PUBLIC_KEY") && "SSH_PUBLIC_KEY is a secret";
  const lacksCheck = f.WaitForHealthy && !healthCheck && "WaitForHealthy is set, but there is none";
  const portFix = `map containerPort ${SSH.Port}, or correct Port in the settings`;
  if (ports.length > 0) judge("SSH port", `${SSH.Port}`, isOther, portFix);
  else unknown("SSH port", "it maps no single port; --run shows whether Port is right");
  judge("SSH key", "from the driver", !SSH.PrivateKeyPath && isSecret, ADVICE.secret);
  judge("logging", log?.logDriver ?? "none: nothing would show why a container ends early", false, "");
  judge("health check", healthCheck ? "there is one" : "none is needed", lacksCheck, ADVICE.noHealth);
}

/** Whether a rule of a security group covers a TCP port. */
const coversPort = ({ IpProtocol, FromPort = 0, ToPort = 65_535 }: IpPermission, port: number): boolean =>
  IpProtocol === "-1" || (IpProtocol === "tcp" && FromPort <= port && port <= ToPort);

const BRIDGE = /^(docker|br-|cni|podman|virbr|lxc|lxd)/; // to containers or virtual machines on this host
/** This host's own addresses of one family, but those that are valid on one link only. */
const ownAddresses = (wanted: "IPv4" | "IPv6"): string[] =>
  Object.entries(hostInterfaces())
    .flatMap(([name, all = []]) => (BRIDGE.test(name) ? [] : all))
    .filter(({ family, internal, address }) => !internal && family === wanted && !/^fe80:/.test(address))
    .map(({ address }) => address);

/** Makes a function that tells whether a range, such as 10.0.0.0/16, contains one of these addresses. */
async function makeRangeCheck(addresses: readonly string[]): Promise<(range: string) => boolean> {
  const { BlockList } = await import("node:net");
  const familyOf = (address: string) => (address.includes(":") ? "ipv6" : "ipv4");
  return (range) => {
    const [base = "", bits = ""] = range.split("/");
    const block = new BlockList();
    block.addSubnet(base, Number(bits), familyOf(base));
    return addresses.some((address) => block.check(address, familyOf(address)));
  };
}

/** Checks that the tasks' security groups let this host log in. */
async function checkLogin(
  { aws, context, report }: Checkup,
  groups: readonly SecurityGroup[],
  { vpcs, isIpv6 }: Readonly<{ vpcs: readonly string[]; isIpv6: boolean }>,
): Promise<void> {
  const { Fargate: f, SSH } = context.config;
  const usesPublic = f.UsePublicIP ?? f.EnablePublicIP;
  const check = "security groups: login";
  const rules = groups
    .flatMap(({ IpPermissions = [] }) => IpPermissions)
    .filter((r) => coversPort(r, SSH.Port));
  const ofRules = <T>(listIn: (rule: IpPermission) => T[] | undefined) =>
    rules.flatMap((r) => listIn(r) ?? []);
  const ranges = [
    ...ofRules(({ IpRanges }) => IpRanges?.map(({ CidrIp }) => `${CidrIp}`)),
    ...ofRules(({ Ipv6Ranges }) => Ipv6Ranges?.map(({ CidrIpv6 }) => `${CidrIpv6}`)),
  ];
  const allowed = ofRules(({ UserIdGroupPairs }) => UserIdGroupPairs?.map(({ GroupId }) => `${GroupId}`));
  const lists = ofRules(({ PrefixListIds }) => PrefixListIds?.map(({ PrefixListId }) => `${PrefixListId}`));
  const open = `TCP port ${SSH.Port} is open for ${[...ranges, ...allowed, ...lists].join(", ") || "nobody"}`;
  const addresses = ownAddresses(isIpv6 ? "IPv6" : "IPv4");
  const own: string[] = []; // security groups of this host
  const findOwn = async () => {
    const filter = isIpv6 ? "ipv6-addresses.ipv6-address" : "addresses.private-ip-address";
    if (addresses.length === 0) return;
    const found = await aws.describe("NetworkInterfaces", filter, addresses);
    // In another VPC, an interface with the same address may be of another host.
    const interfaces = found.filter(({ VpcId }) => vpcs.includes(`${VpcId}`));
    own.push(...interfaces.flatMap(({ Groups = [] }) => Groups.map(({ GroupId }) => `${GroupId}`)));
  };
  // To a public address, this host comes from an address that it does not know.
  const containsOwn = await makeRangeCheck(addresses);
  const range = ranges.find((range) => (usesPublic ? /^[0.:]+\/0$/.test(range) : containsOwn(range)));
  if (!range && !usesPublic)
    await findOwn().catch((error) => {
      if (rules.length > 0) throw error;
    });
  const source = range ?? allowed.find((group) => own.includes(group));
  const who = rules.length > 0 ? `, but this host has ${[...addresses, ...own].join(", ")}` : "";
  const from = usesPublic
    ? "--cidr PUBLIC_ADDRESS_OF_THIS_HOST/32"
    : `--source-group ${own[0] ?? "GROUP_OF_THIS_HOST"}`;
  const command = `aws ec2 authorize-security-group-ingress --group-id ${groups[0]?.GroupId}`;
  if (source) report.right(check, `TCP port ${SSH.Port} is open for ${source}`);
  // Without a network interface of this account, this host may come from any address.
  else if (rules.length > 0 && (own.length === 0 || lists.length > 0))
    report.unknown(check, `${open}; whether that includes this host is not known`);
  else report.wrong(check, `${open}${who}`, `${command} --protocol tcp --port ${SSH.Port} ${from}`);
}

/** The services that tasks on Fargate need before they run, by the names of their VPC endpoints. */
function servicesOf({ Fargate: f }: Config, definitions: readonly TaskDefinition[]): string[] {
  const containers = definitions.flatMap(({ containerDefinitions = [] }) => containerDefinitions);
  const secrets = containers.flatMap(({ secrets = [] }) => secrets.map(({ valueFrom = "" }) => valueFrom));
  const isInEcr = containers.some(({ image = "" }) => ECR_IMAGE.test(image));
  const hasLog = containers.some(({ logConfiguration }) => logConfiguration?.logDriver === "awslogs");
  const isManaged = (secret: string) => secret.includes(":secretsmanager:");
  return [
    ...(isInEcr ? ["ecr.api", "ecr.dkr", "s3"] : []),
    ...(hasLog ? ["logs"] : []),
    ...(secrets.some(isManaged) ? ["secretsmanager"] : []),
    ...(secrets.every(isManaged) ? [] : ["ssm"]),
    ...(f.EnableExecuteCommand ? ["ssmmessages"] : []),
  ];
}

/** Checks a subnet's way out: tasks must pull their image, and usually reach GitLab. */
async function checkRoute(
  { aws, context, report }: Checkup,
  { SubnetId, VpcId, Ipv6Native }: Subnet,
  tables: readonly RouteTable[],
  services: readonly string[],
): Promise<void> {
  const { Region, EnablePublicIP, UsePublicIP: usesPublic = EnablePublicIP } = context.config.Fargate;
  const check = `subnet ${SubnetId}: route`;
  const find = (isMatch: (of: RouteTableAssociation) => boolean | undefined) =>
    tables.find(({ Associations = [] }) => Associations.some(isMatch));
  const table = find((of) => of.SubnetId === SubnetId) ?? find((of) => of.Main);
  if (!table) return report.unknown(check, "its route table does not belong to this account");
  const all = Ipv6Native ? "::/0" : "0.0.0.0/0";
  const route = table.Routes?.find((r) => (r.DestinationIpv6CidrBlock ?? r.DestinationCidrBlock) === all);
  const { State, ...fields } = route ?? {};
  const target =
    Object.entries(fields).find(([key]) => /(Gateway|Interface|Connection)Id$/.test(key))?.[1] ?? "";
  const isInternet = route && target.startsWith("igw-");
  const where = `the route ${all} of ${table.RouteTableId}`;
  const isGone = State === "blackhole" && `${where} leads to ${target}, which is gone`;
  const isPrivate =
    usesPublic && !isInternet && `${where} leads to no internet gateway, as public addresses need`;
  const fix = isGone
    ? `let ${where} lead to a NAT gateway`
    : `${ADVICE.publicAddress}, or UsePublicIP = false`;
  const isOpen = route && (!isInternet || EnablePublicIP || Ipv6Native);
  if (isGone || isPrivate || isOpen) return report.judge(check, `to ${target}`, isGone || isPrivate, fix);
  const endpoints = (await aws.describe("VpcEndpoints", "vpc-id", [`${VpcId}`]))
    .filter(({ State }) => /^available$/i.test(`${State}`))
    .filter((e) => e.VpcEndpointType !== "Gateway" || e.RouteTableIds?.includes(`${table.RouteTableId}`))
    .map(({ ServiceName = "" }) => ServiceName.split(`.${Region}.`)[1]);
  const absent = services.filter((name) => !endpoints.includes(name));
  const none = isInternet
    ? `${where} needs public addresses, which tasks lack`
    : "there is none out of the VPC";
  const natFix = "add a route to a NAT gateway, or the VPC endpoints of docs/private-subnets.md";
  if (absent.length > 0) report.wrong(check, `${none}, and no endpoint for ${absent.join(", ")}`, natFix);
  else report.unknown(check, `${none}: whether tasks reach GitLab and their images is not known`);
}

/** Checks subnets, security groups and routes. */
async function checkNetwork(checkup: Checkup, services: readonly string[]): Promise<void> {
  const { aws, context, report } = checkup;
  const { Region, Subnets, Subnet = "", SecurityGroups, SecurityGroup = "" } = context.config.Fargate;
  const find = async <K extends keyof Ec2Resources>(
    kind: K,
    what: string,
    filter: string,
    ids: readonly string[],
  ) => {
    const found: Ec2Resources[K][] = [];
    await report.attempt(`${what}s`, async () => {
      found.push(...(await aws.describe(kind, filter, ids)));
      for (const id of ids.filter((id) => !found.some((item) => Object.values(item).includes(id))))
        report.wrong(`${what} ${id}`, `it does not exist in ${Region}`, ADVICE.network);
    });
    return found;
  };
  const subnets = await find("Subnets", "subnet", "subnet-id", Subnets ?? [Subnet]);
  const groups = await find(
    "SecurityGroups",
    "security group",
    "group-id",
    SecurityGroups ?? [SecurityGroup],
  );
  for (const { SubnetId, AvailableIpAddressCount: free = 0, AvailabilityZone: zone, Ipv6Native } of subnets) {
    const isFull = free === 0 && !Ipv6Native && "no address is free";
    const count = Ipv6Native ? "only IPv6" : countOf(free, "free address", "es");
    report.judge(`subnet ${SubnetId}: addresses`, `${count}, ${zone}`, isFull, ADVICE.addresses);
  }
  for (const [vpc, members] of Map.groupBy(subnets, ({ VpcId }) => `${VpcId}`))
    await report.attempt(`routes of ${vpc}`, async () => {
      const tables = await aws.describe("RouteTables", "vpc-id", [vpc]);
      for (const subnet of members) await checkRoute(checkup, subnet, tables, services);
    });
  const vpcs = [...new Set([...subnets, ...groups].map(({ VpcId }) => `${VpcId}`))];
  const isMixed = vpcs.length > 1 && `subnets and security groups are of ${vpcs.join(", ")}`;
  if (vpcs.length > 0) report.judge("VPC", `${vpcs[0]}`, isMixed, ADVICE.network);
  if (groups.length === 0) return;
  const rules = groups.flatMap(({ IpPermissionsEgress = [] }) => IpPermissionsEgress);
  const isClosed = !rules.some((rule) => coversPort(rule, 443)) && "no rule lets tasks send to TCP port 443";
  const command = `aws ec2 authorize-security-group-egress --group-id ${groups[0]?.GroupId}`;
  const openFix = `${command} --protocol tcp --port 443 --cidr 0.0.0.0/0`;
  report.judge("security groups: outbound", "TCP port 443 is open", isClosed, openFix);
  const isIpv6 = subnets.some(({ Ipv6Native }) => Ipv6Native);
  await report.attempt("security groups: login", () => checkLogin(checkup, groups, { vpcs, isIpv6 }));
}

/** A call that the driver makes, with what IAM decides on. */
interface Permission extends Readonly<Record<"action" | "resource", string>> {
  readonly policy: string; // the file in examples/iam that allows it
  readonly conditions: Readonly<Record<string, string>>;
}

/** The permissions that the settings need. @param definitions that tasks are started from. Pure. */
function neededPermissions(
  { Fargate: f, JobImage }: Config,
  definitions: readonly Pick<
    TaskDefinition,
    "family" | "taskDefinitionArn" | "taskRoleArn" | "executionRoleArn"
  >[],
  arnOf: (kind: string) => string,
): Permission[] {
  const cluster = f.Cluster.split("/").at(-1);
  const inCluster = { "ecs:cluster": arnOf(`cluster/${cluster}`) };
  const toTasks = { "iam:PassedToService": "ecs-tasks.amazonaws.com" };
  const [byRun, byRegister] = [
    { "ecs:CreateAction": "RunTask" },
    { "ecs:CreateAction": "RegisterTaskDefinition" },
  ];
  const any = ["*"];
  const task = [arnOf(`task/${cluster}/${NO_ID}`)];
  const own = definitions.map(({ taskDefinitionArn }) => taskDefinitionArn);
  const derived = definitions.map(({ family }) => arnOf(`task-definition/${family}-job-${NO_ID}:1`));
  const roles = definitions.flatMap(({ taskRoleArn, executionRoleArn }) => [taskRoleArn, executionRoleArn]);
  const images = JobImage.AllowedImages.length + JobImage.AllowedServices.length > 0;
  const tags = Object.keys(f.Tags).length > 0;
  const usesPublic = f.UsePublicIP ?? f.EnablePublicIP;
  type Row = [boolean, string, string, readonly (string | undefined)[], Permission["conditions"]?];
  const rows: Row[] = [
    [true, "driver", "ecs:RunTask", own, inCluster],
    [true, "driver", "ecs:DescribeTasks", task, inCluster],
    [true, "driver", "ecs:StopTask", task, inCluster],
    [true, "driver", "iam:PassRole", roles, toTasks],
    [true, "sweep", "ecs:ListTasks", any, inCluster],
    [usesPublic, "public-ip", "ec2:DescribeNetworkInterfaces", any],
    [tags || f.PropagateTags === "TASK_DEFINITION", "tags", "ecs:TagResource", task, byRun],
    [images, "job-image", "ecs:DescribeTaskDefinition", any],
    [images, "job-image", "ecs:RegisterTaskDefinition", any],
    [images, "job-image", "ecs:RunTask", derived, inCluster],
    [images, "job-image-sweep", "ecs:ListTaskDefinitions", any],
    [images, "job-image-sweep", "ecs:DeregisterTaskDefinition", any],
    [images && tags, "job-image-tags", "ecs:TagResource", derived, byRegister],
  ];
  return rows.flatMap(([isNeeded, policy, action, resources, conditions = {}]) =>
    [...new Set(resources)].flatMap((resource) =>
      isNeeded && resource ? { policy: `examples/iam/${policy}.json`, action, resource, conditions } : [],
    ),
  );
}

/** Calls without effect that show whether an action is allowed. */
const PROBES: Readonly<Record<string, (aws: InspectorAws, config: Config) => Promise<unknown>>> = {
  "ecs:DescribeTasks": (aws) => aws.describeTasks([NO_ID], aws.limits()),
  "ecs:StopTask": (aws) => aws.stopNoTask(),
  "ecs:ListTasks": (aws) => aws.listTasks(`fargate-${NO_ID}-${NO_ID}`, aws.limits()),
  "ecs:DescribeTaskDefinition": (aws, { Fargate: f }) =>
    aws.describeTaskDefinition(f.TaskDefinition, aws.limits()),
  "ec2:DescribeNetworkInterfaces": (aws) => aws.describe("NetworkInterfaces", "vpc-id", ["vpc-0"]),
};

/** Why IAM denies something, and what to do about it. @param allow the usual fix */
function explainDenial(result: EvaluationResult, action: string, principal: string, allow: string) {
  const names = result.MatchedStatements?.map(({ SourcePolicyId }) => SourcePolicyId).join(", ");
  if (result.OrganizationsDecisionDetail?.AllowedByOrganizations === false)
    return ["a service control policy does not allow it", `let your organization's policies allow ${action}`];
  if (result.PermissionsBoundaryDecisionDetail?.AllowedByPermissionsBoundary === false)
    return ["the permissions boundary does not allow it", `add ${action} to the boundary of ${principal}`];
  if (result.EvalDecision === "explicitDeny") return [`policy ${names} denies it`, "correct that policy"];
  return ["no policy allows it", allow];
}

/** Checks the permissions by IAM's simulator, or else by calls without effect. */
async function checkPermissions(
  { aws, context, report }: Checkup,
  permissions: readonly Permission[],
  identity: Identity | undefined,
): Promise<void> {
  const principal = identity ? await aws.principalOf(identity) : "";
  if (principal.endsWith(":root")) return report.right("permissions", "the root user may do anything");
  let unanswered = identity ? "" : "whose the credentials are is not known";
  const simulate = (permission: Permission) =>
    aws.simulate(principal, permission).catch((error) => {
      unanswered = reasonOf(error);
    });
  for (const permission of permissions) {
    const { action, policy } = permission;
    const resource = permission.resource.replace(NO_ID, "*");
    const check = `permission ${action}`;
    const on = resource === "*" ? "" : ` on ${resource}`;
    const anyRevision = on.replace(/(:task-definition\/.*):\d+$/, "$1:*");
    const owner = principal || "the owner of the credentials";
    const allow = `allow ${action}${anyRevision} to ${owner}, as in ${policy}`;
    const result = unanswered ? undefined : await simulate(permission);
    const results = result ? [result, ...(result.ResourceSpecificResults ?? [])] : [];
    const missing = results.flatMap(({ MissingContextValues = [] }) => MissingContextValues);
    const isDecided = result && missing.length === 0;
    const [why = "AWS denies it", fix = allow] = isDecided
      ? explainDenial(result, action, principal, allow)
      : [];
    const probe = PROBES[action];
    if (isDecided && result.EvalDecision === "allowed") report.right(check, `allowed${on}`);
    // Asks AWS about a denial too: the policies may name resources of another kind than the simulated one.
    else if (probe)
      await report.attempt(check, async () => {
        const onError = (error: unknown) => {
          // Any other problem, such as an absent cluster, says nothing about the permission.
          const isDenied = causeOf(error).problem === "accessDenied";
          if (!isDenied && !isDecided) throw new Failure("system", reasonOf(error));
          return `${why}${on}`;
        };
        const problem = await probe(aws, context.config).then(() => undefined, onError);
        report.judge(check, `allowed${on}, as a call without effect shows`, problem, fix);
      });
    else if (isDecided) report.wrong(check, `${why}${on}`, fix);
    else {
      const reason = unanswered || (result ? `it depends on ${missing.join(", ")}` : "IAM gave no result");
      report.unknown(check, `not checked${on}: ${reason}`);
    }
  }
}

const MIN_FREE_SPACE = 10 * 2 ** 20; // bytes; a record has some 3 KB
const MIN_FREE_FILES = 100;
const DIRECTORY_FIX =
  "give it to the user that runs GitLab Runner, with mode 0700, and run this as that user";

const canAccess = (path: string, mode: number): boolean => {
  try {
    fs.accessSync(path, mode);
    return true;
  } catch {
    return false;
  }
};

/** Checks the directory of records, or the place where prepare would create it. */
function checkRecordDirectory({ context: { config }, report }: Checkup): void {
  const { Directory } = config.TaskMetadata;
  let existing = Directory;
  while (!fs.existsSync(existing)) existing = dirname(existing);
  const warning = existing === Directory ? checkDirectory(Directory) : undefined;
  const isWritable = canAccess(existing, fs.constants.W_OK | fs.constants.X_OK);
  const problem = warning ?? (!isWritable && `this user cannot write to ${existing}`);
  const { bsize, bavail, ffree, files } = fs.statfsSync(existing);
  const space = `${Math.floor((bsize * bavail) / 2 ** 20)} MB free`;
  const hasRoom = bsize * bavail >= MIN_FREE_SPACE && (files === 0 || ffree >= MIN_FREE_FILES);
  const isFull = !hasRoom && `the disk of ${existing} is full: ${space}, room for ${countOf(ffree, "file")}`;
  const fix = problem ? DIRECTORY_FIX : "make room there, or set Directory to another disk";
  const state = existing === Directory ? "" : ", which prepare will create";
  report.judge("directory of records", `${Directory}${state}, ${space}`, problem || isFull, fix);
}

/** The parts of a runner's section that the driver depends on. */
const RunnerSectionSchema = v.object({
  name: v.optional(v.unknown(), "without a name"),
  executor: v.optional(v.unknown()),
  shell: v.optional(v.unknown(), "bash"),
  builds_dir: v.optional(v.unknown()),
  cache_dir: v.optional(v.unknown()),
  custom: v.fallback(v.record(v.string(), v.unknown()), {}),
});
type RunnerSection = v.InferOutput<typeof RunnerSectionSchema>;
const STAGE_ALIASES = { config: "co", prepare: "p", run: "r", cleanup: "cl" };

/** The stages that a section of config.toml starts: programs, arguments, and the file after --config. */
const stagesOf = ({ custom }: RunnerSection) =>
  Object.entries(STAGE_ALIASES).map(([stage, alias]) => {
    const args = custom[`${stage}_args`];
    const words = Array.isArray(args) ? args.map(String) : [];
    const [, file = ""] = /(?:^|\n)--config[=\n]([^\n]*)/.exec(words.join("\n")) ?? [];
    const isCall = new RegExp(`(^| )(custom|c) (${stage}|${alias})( |$)`).test(words.join(" "));
    return { stage, program: `${custom[`${stage}_exec`] ?? ""}`, words, file, isCall };
  });

/** A path without links, as far as it exists. */
const realPath = (path: string): string => {
  try {
    return fs.realpathSync(path);
  } catch {
    return resolve(path);
  }
};
const isSameFile = (a: string, b: string): boolean => realPath(a) === realPath(b);
/** A command line without the values of variables, as after env(1): they may be secrets. */
const hideValues = (text: string): string =>
  withoutSecrets(text).replace(/(^|["'\s])([A-Za-z_]\w*)=("[^"]*"|'[^']*'|[^\s"']*)+/g, "$1$2=...");

/** Checks the sections of GitLab Runner's configuration that call this driver. */
function checkRunnerConfig(checkup: Checkup, path: string, driverFile: string): void {
  const { report } = checkup;
  const isThere = fs.existsSync(path);
  if (!isThere || !canAccess(path, fs.constants.R_OK)) {
    const state = isThere ? "cannot be read by this user" : "is not there, or hidden from this user";
    report.unknown("runner", `${path} ${state}; --runner-config names another file`);
    return;
  }
  const parse = () => parseRunnerToml(fs.readFileSync(path, "utf8"));
  const { runners, others } = withContext(`${path} cannot be used`, parse);
  const sections = runners.map((runner) => v.parse(RunnerSectionSchema, runner));
  const ours = sections.filter((s) => stagesOf(s).some((of) => /fargate/.test(`${of.program} ${of.words}`)));
  // The other sections may be for other configuration files.
  const named = sections.filter((section) =>
    stagesOf(section).some(({ file }) => isSameFile(file, driverFile)),
  );
  const fix = "add the section that fargate init prints, with the runner's token";
  if (ours.length + named.length === 0)
    report.wrong("runner", `no section of ${path} calls this driver`, fix);
  const limits = { shutdown_timeout: others.shutdown_timeout };
  for (const section of named.length > 0 ? named : ours)
    checkRunnerSection(checkup, { ...section, custom: { ...section.custom, ...limits } }, driverFile);
}

/** Checks one section. Times are in seconds. */
function checkRunnerSection({ context, report }: Checkup, section: RunnerSection, driverFile: string): void {
  const { name, executor, shell, builds_dir, cache_dir, custom } = section;
  const { judge, unknown } = report.of(`runner ${name}`);
  judge("executor", "custom", executor !== "custom" && `it is ${executor}`, 'set executor = "custom"');
  for (const { stage, program, words, file, isCall } of stagesOf(section)) {
    const isOptional = !program && stage === "config";
    const found = Bun.which(program, { PATH: context.env.PATH });
    const isDriver = basename(program) === "fargate" || (found && isSameFile(found, process.execPath));
    const args = hideValues(formatInline(words));
    const call = hideValues([program, ...words].join(" "));
    if (found && !isDriver && !(isCall && file)) {
      unknown(stage, `whether ${call} calls the driver is not known`);
      continue;
    }
    const problems: [boolean, string][] = [
      [!program, `${stage}_exec is not set`],
      [!found, `this user cannot run ${program}`],
      [!isCall, `${stage}_args is ${args}`],
      [!file.startsWith("/"), `${stage}_args has no --config with an absolute path: ${args}`],
      [!isSameFile(file, driverFile), `it uses ${file}, not ${driverFile}`],
    ];
    const problem = isOptional ? undefined : problems.find(([isWrong]) => isWrong)?.[1];
    const wanted = formatInline(["--config", driverFile, "custom", stage]);
    const fix = `set ${stage}_exec to the path of this program, and ${stage}_args = ${wanted}`;
    judge(stage, isOptional ? "not set: only job images need it" : call, problem, fix);
  }
  const isOtherShell = shell !== "bash" && shell !== "sh" && `it is ${shell}`;
  judge("shell", `${shell}`, isOtherShell, 'set shell = "bash", or "sh" for images without bash');
  for (const [key, value] of Object.entries({ builds_dir, cache_dir }))
    judge(
      key,
      `${value}`,
      !value && "it is not set",
      `set ${key} to a directory in the task, such as "/${key.slice(0, -4)}"`,
    );
  for (const [key, byDefault, needed] of runnerLimits(context.config)) {
    const value = Number(custom[key]) || byDefault; // as in GitLab Runner
    judge(key, `${value} s`, value < needed && `it is ${value} s`, `set ${key} to ${needed} or more`);
  }
}

/** Files and directories with what cron and systemd start regularly. */
const SCHEDULES = [
  ...["/etc/crontab", "/etc/cron.d", "/etc/cron.hourly", "/etc/cron.daily"],
  ...["/etc/crontabs", "/var/spool/cron/crontabs", "/var/spool/cron"],
  ...["/etc/systemd/system", "/usr/local/lib/systemd/system", "/usr/lib/systemd/system"],
];

/** Reads files and directories for a search. What this user may not read is `hidden`. */
class Searcher {
  readonly hidden = new Set<string>();
  #attempt<T>(path: string, read: () => T, otherwise: T): T {
    try {
      return read();
    } catch (error) {
      if ((error as NodeJS.ErrnoException).code === "EACCES") this.hidden.add(path);
      return otherwise;
    }
  }
  /** The paths in a directory, or that of a file. */
  list(path: string): string[] {
    const read = () => fs.readdirSync(path).map((name) => join(path, name));
    return this.#attempt(path, read, fs.existsSync(path) ? [path] : []);
  }
  textOf = (path: string): string => this.#attempt(path, () => fs.readFileSync(path, "latin1"), "");
}

/** Whether a command line may call the driver with this configuration file: it names it, or no known file. */
function mayUse(call: string, driverFile: string): boolean {
  // The shell and systemd expand $ and %.
  const [, file] = /--config[= ]["']?(\/[^\s"'$%*]+)(?=["'\s])/.exec(call) ?? [];
  return file === undefined || isSameFile(file, driverFile);
}

/** Checks that something runs `fargate sweep` regularly: fargate manager, cron or systemd. */
function checkSweepSchedule({ context: { env }, report }: Checkup, driverFile: string) {
  const check = "sweep";
  const processes = new Searcher();
  const isManager = (path: string) =>
    /(^|\/)fargate\0(.*\0)?manager\0/s.test(processes.textOf(`${path}/cmdline`));
  const pids = () => processes.list("/proc").filter((path) => /\d$/.test(path));
  if (env.FARGATE_MANAGER || pids().some(isManager)) return report.right(check, "fargate manager runs it");
  const schedules = new Searcher();
  const callsIn = (path: string) => schedules.textOf(path).match(/^[^#\n]*fargate\b.*\bsweep\b/gm) ?? [];
  const callers = SCHEDULES.flatMap((path) => schedules.list(path))
    .filter((path) => !path.endsWith(".timer"))
    .filter((path) => callsIn(path).some((call) => mayUse(call, driverFile)));
  const isService = (path: string) => path.endsWith(".service");
  const timers = callers.filter(isService).map((path) => `${basename(path, "service")}timer`);
  const isEnabled = (timer: string) => fs.existsSync(join("/etc/systemd/system/timers.target.wants", timer));
  const found = [...callers.filter((path) => !isService(path)), ...timers.filter(isEnabled)];
  const fix = "set up the timer or the cron job of docs/orphans.md, as the user that runs GitLab Runner";
  const { hidden } = schedules;
  if (found.length > 0) report.right(check, `started by ${found.join(", ")}`);
  else if (timers[0])
    report.wrong(check, `${timers[0]} is not enabled`, `systemctl enable --now ${timers[0]}`);
  else if (hidden.size > 0)
    report.unknown(check, `nothing found, but this user cannot read ${[...hidden].join(", ")}`);
  else report.wrong(check, `no timer or cron job of this host runs fargate sweep with ${driverFile}`, fix);
}

/** Checks the versions of the programs involved. */
async function checkVersions({ context: { env, signal }, report }: Checkup): Promise<void> {
  report.right("version of fargate", VERSION);
  const check = "version of gitlab-runner";
  const program = Bun.which("gitlab-runner", { PATH: env.PATH });
  if (!program) return report.unknown(check, "gitlab-runner is not in PATH");
  const options = { stdin: "ignore", stderr: "ignore", timeout: 10_000, signal } as const;
  const output = await new Response(Bun.spawn([program, "--version"], options).stdout).text();
  const [, version, major, minor] = /^Version:\s+((\d+)\.(\d+)\S*)/m.exec(output) ?? [];
  if (!version) return report.unknown(check, `${program} --version prints none`);
  const isOld = Number(major) * 1000 + Number(minor) < 14_001 && `${version} passes no JOB_RESPONSE_FILE`;
  report.judge(check, version, isOld, "install GitLab Runner 14.1 or later");
}

const MAX_CLOCK_SKEW = 60; // seconds; AWS refuses requests from 300 s on
/** The configuration files of the driver and of GitLab Runner. */
type CheckedFiles = Readonly<{ driverFile: string; runnerConfig: string | undefined }>;

/** Checks this host, but for its way to AWS. */
async function checkHost(checkup: Checkup, { driverFile, runnerConfig }: CheckedFiles): Promise<void> {
  const { aws, report } = checkup;
  const { env } = checkup.context;
  const skew = Math.abs(aws.clockSkew);
  const offset = `${skew.toFixed(1)} s ${aws.clockSkew > 0 ? "ahead of" : "behind"} AWS's clock`;
  if (Number.isNaN(skew)) report.unknown("clock", "not checked: AWS has not answered");
  else report.judge("clock", offset, skew > MAX_CLOCK_SKEW && offset, ADVICE.clock);
  const path = resolve(runnerConfig ?? env.CONFIG_FILE ?? defaultConfigFile(env));
  await report.attempt("directory of records", () => checkRecordDirectory(checkup), DIRECTORY_FIX);
  await report.attempt("runner", () => checkRunnerConfig(checkup, path, driverFile), "correct that file");
  await report.attempt("sweep", () => checkSweepSchedule(checkup, driverFile));
  await report.attempt("version of gitlab-runner", () => checkVersions(checkup));
}

/** What a session in the task prints about itself, each line as name=value. */
const SESSION_PROGRAM = [
  'echo "PATH=$PATH"',
  'echo "credentials=${AWS_CONTAINER_CREDENTIALS_RELATIVE_URI:+yes}"',
  'echo "git=$(git --version 2>/dev/null)"',
  'echo "gitlab-runner=$(gitlab-runner --version 2>/dev/null | head -n 1)"',
  "echo \"disk=$(df -Pk / 2>/dev/null | awk 'NR == 2 { print $4 }')\"",
].join("\n");
const MIN_FREE_DISK = 2 ** 20; // KB: 1 GiB, for a checkout and what a job builds

/** Judges what a session has printed. */
function judgeSession(report: Examination, output: string, definition: TaskDefinition | undefined): void {
  const value = (name: string) => new RegExp(`^${name}=(.*)$`, "m").exec(output)?.[1]?.trim() ?? "";
  const { judge, unknown } = report.of("session");
  const role = definition?.taskRoleArn;
  const isLost = role && !value("credentials") && `none, although the task role is ${role}`;
  const passFix = "let the image pass AWS_CONTAINER_* on: see docs/worker-images.md";
  const lacksRunner = !value("gitlab-runner") && "it is not in PATH: artifacts and caches do not work";
  const disk = Number(value("disk"));
  const free = `${(disk / 2 ** 20).toFixed(1)} GiB free`;
  judge("PATH", value("PATH"), !value("PATH") && "it is empty", "set PATH in the worker image");
  if (definition || value("credentials"))
    judge("credentials", value("credentials") ? "of the task role" : "none", isLost, passFix);
  else unknown("credentials", "none; whether there is a task role is not known");
  judge("git", value("git"), !value("git") && "it is not in PATH", "install git in the worker image");
  judge("gitlab-runner", value("gitlab-runner"), lacksRunner, "install it: see docs/worker-images.md");
  if (value("disk")) judge("disk", free, disk < MIN_FREE_DISK && free, ADVICE.pullSpace);
  else unknown("disk", "the image has no df or awk");
}

const STOP_FIX = "stop the task by hand, or let fargate sweep stop it";

/**
 * Starts a real task as prepare does, logs in, runs `true`, looks at what a session sees, and stops the task
 * as cleanup does. A signal ends it as it ends a job.
 */
async function tryTask(
  { context: base, report, step }: Checkup,
  definition: TaskDefinition | undefined,
): Promise<void> {
  const hash = sha256(randomBytes(32).toString("hex"));
  const job: Job = { stem: `doctor-${hash}`, hash, title: "job of fargate doctor", timeout: 600 };
  const begun = base.now();
  const seconds = (since: number) => `${((base.now() - since) / 1000).toFixed(2)} s`;
  const info: Log = (_, { status, host } = {}) => {
    if (status) step(`the task is ${status}`);
    if (status) report.right(`task: ${status}`, `after ${seconds(begun)}`);
    if (host) report.right("task: login", `after ${seconds(begun)}, at ${host}`);
  };
  const context: Context = { ...base, log: { ...base.log, info }, job, jobOverrides: [] };
  const runText = async (script: string) => {
    const { sinks, text } = collectOutput();
    const record = readRecord(recordPath(context)) as TaskRecord;
    const bytes = Buffer.from(`${script}\n`);
    const code = await runInTask({ ...context, ...sinks }, record, base.now(), bytes, "doctor");
    return { code, text: text() };
  };
  step("starting a task");
  try {
    await prepare(context);
    step("running true");
    const since = base.now();
    const { code } = await runText("true");
    const problem = code !== 0 && `exit code ${code}`;
    report.judge("task: true", `took ${seconds(since)}`, problem, "correct the shell of the image");
    step("looking at the session");
    judgeSession(report, (await runText(SESSION_PROGRAM)).text, definition);
  } finally {
    step("stopping the task");
    const since = base.now();
    const isStarted = report.findings.some(({ check }) => check.startsWith("task: "));
    // Even after a signal: the task costs money.
    await cleanup({ ...context, log: base.log, signal: new AbortController().signal }).then(
      () => isStarted && report.right("task: stopped", `took ${seconds(since)}`),
      (error) => {
        const advice = adviceFor(causeOf(error));
        report.wrong("task: stopped", reasonOf(error), [advice, STOP_FIX].filter(Boolean).join("; "));
        if (base.signal.aborted) base.log.error("{reason}", { reason: reasonOf(error) }); // without a report
      },
    );
  }
}

/** Checks the task definitions that the settings name. @returns those that could be described, by name */
async function checkDefinitions(checkup: Checkup, places: readonly string[]) {
  const { aws, context, report } = checkup;
  const { Fargate: f, JobImage } = context.config;
  const chosen = f.AllowedTaskDefinitions?.filter((pattern) => !pattern.includes("*")) ?? [];
  const ofImages = JobImage.TaskDefinitions.map(({ TaskDefinition }) => TaskDefinition);
  const names = [f.TaskDefinition, ...ofImages, ...chosen];
  const described = new Map<string, TaskDefinition>();
  const hidden = new Set(names);
  for (const name of hidden)
    await report.attempt(`definition ${name}`, async () => {
      const definition = await aws.describeTaskDefinition(name, aws.limits());
      hidden.delete(name);
      const fix = "register it, or correct its name or Region";
      if (!definition) return report.wrong(`definition ${name}`, `it does not exist in ${f.Region}`, fix);
      described.set(name, definition);
      checkDefinition(checkup, definition, places);
    });
  return { described, hidden: [...hidden] };
}

/** Checks what AWS knows. @returns the configured task definition, if it could be described */
async function checkAws(checkup: Checkup): Promise<TaskDefinition | undefined> {
  const { aws, context, report, step } = checkup;
  const { config } = context;
  const { TaskDefinition: main, Region } = config.Fargate;
  step("asking AWS whose the credentials are");
  const { identity, isUsable } = await checkIdentity(checkup);
  if (!isUsable)
    return void report.unknown("AWS", "cluster, task definition, network and permissions were not checked");
  step("looking at the cluster and the task definition");
  let cluster: Cluster | undefined;
  await report.attempt("cluster", async () => {
    cluster = await aws.describeCluster();
    checkCluster(checkup, cluster);
  });
  const places = placesOf(config, cluster);
  const { described, hidden } = await checkDefinitions(checkup, places);
  const definitions = [...described.values()];
  step("looking at the network");
  await checkNetwork(checkup, places.some(isFargate) ? servicesOf(config, definitions) : []);
  step("checking the permissions");
  const { account = "*", arn = "" } = identity ?? {};
  const arnOf = (kind: string) => `arn:${arn.split(":")[1] || "aws"}:ecs:${Region}:${account}:${kind}`;
  const assumed = hidden.map((name) => {
    const [family, revision = "1"] = name.replace(/^.*\//, "").split(":");
    return { family, taskDefinitionArn: arnOf(`task-definition/${family}:${revision}`) };
  });
  const permissions = neededPermissions(config, [...definitions, ...assumed], arnOf);
  await checkPermissions(checkup, permissions, identity);
  if (hidden.length > 0)
    report.unknown("permission iam:PassRole", `not checked for the roles of ${hidden.join(", ")}`);
  const failure = aws.unreachable.get("ecs");
  if (failure) report.wrong("connection to ECS", reasonOf(failure), `${adviceFor(causeOf(failure))}`);
  return described.get(main);
}

/**
 * The `doctor` command: checks whatever can be checked from this host. Without `run`, it changes nothing.
 * @param warnings about the driver's configuration file
 */
async function doctor(
  context: BaseContext,
  files: CheckedFiles,
  { run, warnings, step }: Readonly<{ run: boolean; warnings: readonly string[]; step: Step }>,
): Promise<Finding[]> {
  const report = new Examination(context.signal);
  const checkup: Checkup = { aws: new InspectorAws(context), context, report, step };
  await checkSettings(checkup, files.driverFile, warnings);
  const definition = await checkAws(checkup);
  step("looking at this host");
  await checkHost(checkup, files);
  if (run)
    await tryTask(checkup, definition).catch((error) => {
      context.signal.throwIfAborted();
      const fix = adviceFor(causeOf(error)) ?? "look the message up in docs/troubleshooting.md";
      report.wrong("task", reasonOf(error), fix);
    });
  return report.findings;
}

/** The findings if the configuration cannot be used. */
function brokenSettings(error: unknown): Finding[] {
  const [title = "", ...details] = reasonOf(error)
    .split("\n")
    .map((line) => line.trim());
  const fix = adviceFor(causeOf(error)) ?? "correct it: see docs/settings.md";
  const problems = details.length > 0 ? details : [title];
  return [
    ...problems.map((detail) => ({ check: "configuration", result: "wrong" as const, detail, fix })),
    { check: "everything else", result: "unknown", detail: "not checked: that needs a configuration" },
  ];
}

/** The findings as a table, or as one line of JSON. */
function formatFindings(findings: readonly Finding[], json: boolean): string {
  const count = (wanted: Result) => findings.filter(({ result }) => result === wanted).length;
  const counts = { right: count("right"), wrong: count("wrong"), unknown: count("unknown") };
  if (json) return `${JSON.stringify({ ...counts, findings })}\n`;
  const lines = findings.flatMap(({ check, result, detail, fix }) => [
    [result === "wrong" ? "WRONG" : result, check, detail],
    ...(fix ? [["", "", `what to do: ${fix}`]] : []),
  ]);
  const summary = `${counts.right} right, ${counts.wrong} wrong, ${counts.unknown} unknown\n`;
  return `${formatTable([["RESULT", "CHECK", "DETAIL"], ...lines])}\n${summary}`;
}

// runners: writes the configuration of GitLab Runner and of the driver for many runners.

const MANAGER_CANCEL_GRACE = 8; // seconds: CancelGracePeriod + 10 is the default of SHUTDOWN_TIMEOUT

/** Tokens must not get into messages, wherever somebody has put them. */
const TOKEN_LIKE = /([\w-]*gl(rtr?|pat|dt|cbt|ptt|agent|soat|imt|ft)-|GR1348941)[\w.-]+/g;
const runnerName = v.pipe(
  v.string(),
  v.regex(/^[A-Za-z0-9_.-]{1,100}$/),
  v.check((name) => name.search(TOKEN_LIKE) < 0),
  v.description("1 to 100 of A-Z, a-z, 0-9, _, . and -"),
);
const namePrefix = v.pipe(
  v.string(),
  v.regex(/^[^\p{C}]{1,100}$/u),
  v.check((name) => name.search(TOKEN_LIKE) < 0),
  v.description("1 to 100 printable characters"),
);
const number = (fallback: string, min: number, what: string) => {
  const text = v.pipe(v.string(), v.trim(), v.regex(/^\d{1,9}$/), v.transform(Number));
  return v.optional(v.pipe(v.union([text, v.number()]), whole(min, 999_999, what)), fallback);
};
const DRIVER_KEYS = "a JSON object with keys of the driver's configuration file";
const driverKeys = v.pipe(v.custom<Table>(isTable), v.description(DRIVER_KEYS));
const webAddress = v.pipe(
  v.string(),
  v.trim(),
  v.regex(/^https?:\/\/[^@?#\s]+$/),
  v.transform((url) => url.replace(/\/+$/, "")),
  v.description("the address of GitLab, such as https://gitlab.com"),
);

/** The variables of `runners` and `manager`, besides tokens and managers. Times are in seconds. */
const FleetSchema = v.object({
  GITLAB_URL: v.optional(webAddress, "https://gitlab.com"),
  RUNNER_NAME_PREFIX: v.optional(namePrefix, "fargate"),
  RUNNER_CONCURRENCY: number("1", 1, "the number of jobs that run at once"),
  SHUTDOWN_TIMEOUT: number("18", 1, "seconds that cancelled jobs have to end"),
  STOP_TIMEOUT: number("0", 0, "seconds that jobs have to finish before they are cancelled"),
  SWEEP_INTERVAL: number("600", 0, "seconds between sweeps, 0 for none"),
  CACHE_S3_BUCKET_NAME: v.optional(v.string()),
  CACHE_S3_BUCKET_LOCATION: v.optional(v.string()),
  CACHE_S3_SERVER_ADDRESS: v.optional(v.string(), "s3.amazonaws.com"),
  CA_CERTIFICATES_PATH: v.optional(v.string()),
  DRIVER_SETTINGS: v.optional(
    v.pipe(v.string(), v.parseJson(), driverKeys, v.description(DRIVER_KEYS)),
    "{}",
  ),
});

/** Settings of the driver by their fields in MANAGERS_CONFIGS, and variables FARGATE_* or WORKER_*. */
const WORKER_FIELDS = [
  ["Fargate", "Cluster", "worker_ecs_cluster_arn", "CLUSTER"],
  ["Fargate", "Region", "worker_aws_region", "REGION"],
  ["Fargate", "Subnet", "worker_subnet_id", "SUBNET"],
  ["Fargate", "SecurityGroup", "worker_security_group_id", "SECURITY_GROUP"],
  ["Fargate", "TaskDefinition", "worker_task_definition_arn", "TASK_DEFINITION"],
  ["SSH", "Username", "worker_ssh_user", "SSH_USER"],
] as const;
/** The field of a manager that sets one of the driver's settings, for messages. */
const fieldOf = (path: string): string =>
  WORKER_FIELDS.flatMap(([table, key, field]) => (path === `${table}.${key}` ? `${field}: ` : [])).join("");
const tagList = v.pipe(
  v.union([
    v.pipe(
      v.string(),
      v.transform((tags) => tags.split(",")),
    ),
    v.array(v.string()),
  ]),
  v.transform((tags) => tags.map((tag) => tag.trim()).filter(Boolean)),
  v.description("a list, or a text with commas"),
);
const workerField = v.optional(v.unknown()); // checked as a setting of the driver
const terraformField = v.optional(v.unknown()); // accepted, and not used
/** The fields of a manager in MANAGERS_CONFIGS. */
const ManagerSchema = v.object({
  manager_name: runnerName,
  tag_list: v.optional(tagList),
  tags: v.optional(tagList),
  limit: number("0", 0, "the number of jobs that this manager runs at once, 0 for no limit"),
  worker_ecs_cluster_arn: workerField,
  worker_aws_region: workerField,
  worker_subnet_id: workerField,
  worker_security_group_id: workerField,
  worker_task_definition_arn: workerField,
  worker_ssh_user: workerField,
  worker_docker_image: terraformField,
  worker_cpu: terraformField,
  worker_memory: terraformField,
  worker_task_role_arn: terraformField,
  driver_settings: v.optional(driverKeys, {}),
});

/** A runner that shall have a section in config.toml. */
interface PlannedRunner {
  readonly label: string; // for messages: "manager w1" or "line 3 of tokens.txt"
  readonly name: string; // the manager's, or the one in the list of tokens; may be empty
  readonly token: string;
  readonly isRegistration: boolean; // a registration token; otherwise the runner's authentication token
  readonly tags: readonly string[];
  readonly limit: number; // 0: none
  readonly driverFile: string; // the driver's configuration file
}

/** All that `runners` reads and checks before it changes anything. */
interface Fleet {
  readonly variables: v.InferOutput<typeof FleetSchema>;
  readonly gitlab: GitLab;
  readonly cache: Table | undefined; // of the runners
  readonly caFile: string; // of a private certificate authority; empty if there is none
  readonly configFile: string; // GitLab Runner's config.toml
  readonly runners: readonly PlannedRunner[];
  readonly managers: readonly Readonly<{ name: string; path: string; config: Config; settings: Table }>[];
}

/** What `runners` and `manager` get from outside. */
interface FleetContext extends Omit<BaseContext, "config"> {
  readonly program: string; // path of this program
  readonly driverFile: string; // the file of --config, for runners without managers
  readonly readInput: () => Promise<string>; // reads standard input
}

/** Options of `runners`. In place of a file, "-" is standard input. */
type RunnersOptions = { readonly [Key in "managers" | "tokens" | "url" | "runnerConfig"]?: string };

/** Replaces tokens, and the passwords of addresses. */
const withoutSecrets = (text: string): string =>
  text.replace(TOKEN_LIKE, "[token]").replace(/:\/\/[^"\s]*@/g, "://[password]@");
/** Collects the problems of all fields, to report them at once. */
class Problems {
  readonly #found = new Set<string>();
  add(problem: string): void {
    this.#found.add(withoutSecrets(problem));
  }
  /** Adds the message of an error that `action` throws, line by line. */
  collect(action: () => void): void {
    try {
      action();
    } catch (error) {
      for (const line of reasonOf(error).split("\n")) this.add(line.trim());
    }
  }
  /** @param label names the source of a value, in addition to its path in the schema */
  check<T extends v.GenericSchema>(
    schema: T,
    value: unknown,
    where = "",
    label: (path: string) => string = () => "",
  ): v.InferOutput<T> | undefined {
    const result = v.safeParse(schema, value);
    if (result.success) return result.output;
    for (const issue of result.issues)
      this.add(where + label(v.getDotPath(issue) ?? "") + describeIssue(issue, schema));
    return undefined;
  }
  throwIfAny(): void {
    const what = "the runners cannot be configured:";
    if (this.#found.size > 0) throw new Failure("system", what, {}, [...this.#found]);
  }
}

/** The managers in MANAGERS_CONFIGS: a list, or an object whose keys are names. */
function parseManagers(text: string, source: string, problems: Problems): Table[] {
  const { output: json } = v.safeParse(v.pipe(v.string(), v.parseJson()), text);
  const isList = Array.isArray(json);
  if (!isTable(json) && !isList) problems.add(`${source} is not a JSON object or list`);
  else if (Object.keys(json).length === 0) problems.add(`${source} has no manager`);
  return Object.entries(isTable(json) || isList ? json : {}).flatMap(([key, manager]) => {
    if (!isTable(manager))
      problems.add(`${source}: manager ${isList ? Number(key) + 1 : key} is not an object`);
    return isTable(manager) ? [isList ? manager : { manager_name: key, ...manager }] : [];
  });
}

/** The manager that the variables FARGATE_* or WORKER_* describe, if any is set. */
function singleManager(env: Environment): Table[] {
  const fields = WORKER_FIELDS.flatMap(([, , field, variable]) => {
    const value = env[`FARGATE_${variable}`] || env[`WORKER_${variable}`];
    return value ? [[field, value]] : [];
  });
  const manager = { manager_name: "default", tag_list: env.RUNNER_TAG_LIST, ...Object.fromEntries(fields) };
  return fields.length > 0 ? [manager] : [];
}

/** Merges a manager's settings of the driver: defaults, DRIVER_SETTINGS, worker_* fields, driver_settings. */
function driverSettings(manager: Table, common: Table, warnings: string[], problems: Problems): Table {
  const worker = WORKER_FIELDS.map(([table, key, field]) => ({ [table]: { [key]: manager[field] ?? "" } }));
  const own = isTable(manager.driver_settings) ? manager.driver_settings : {};
  const layers = [
    { Fargate: {}, TaskMetadata: { Directory: "/opt/gitlab-runner/metadata" } },
    { SSH: { Username: "root", CancelGracePeriod: MANAGER_CANCEL_GRACE } },
    ...[common, ...worker, own],
  ].map((layer) => normalizeKeys(layer, ConfigSchema, "", warnings) as Table);
  const merged: Table = {};
  for (const [key, value] of layers.flatMap((layer) => Object.entries(layer))) {
    const before = isTable(merged[key]) ? { ...merged[key] } : {};
    // A list replaces the single value before it, and the reverse.
    for (const one of ["Subnet", "SecurityGroup"])
      if (isTable(value) && (one in value || `${one}s` in value)) {
        delete before[one];
        delete before[`${one}s`];
      }
    if (isTable(merged[key]) && !isTable(value)) problems.add(`${key} is not an object`);
    else merged[key] = isTable(value) ? { ...before, ...value } : value;
  }
  return merged;
}

/** Checks the managers and their settings of the driver. */
function planManagers(
  tables: readonly Table[],
  { common, directory, shutdownTimeout }: { common: Table; directory: string; shutdownTimeout: number },
  problems: Problems,
  log: Logger,
) {
  const names = new Set<unknown>();
  return tables.flatMap((table, index) => {
    const { manager_name: given } = table;
    const where = withoutSecrets(`manager ${typeof given === "string" ? formatValue(given) : index + 1}: `);
    const set = Object.entries(table).filter(([, value]) => value !== null && value !== "");
    const warnings: string[] = [];
    for (const [key] of set.filter(([key]) => !Object.hasOwn(ManagerSchema.entries, key)))
      if (/token/i.test(key)) problems.add(`${where}${key} must not be here; set ${TOKEN_VARIABLE}<NAME>`);
      else warnings.push(`${withoutSecrets(key)} is not a known field, and has no effect`);
    if (given && names.has(given)) problems.add(`${where}the name occurs twice`);
    names.add(given);
    const fields = Object.fromEntries(set);
    const manager = problems.check(ManagerSchema, fields, where);
    const settings = driverSettings(fields, common, warnings, problems);
    for (const warning of warnings) log.warn("{where}{warning}", { where, warning });
    const config = problems.check(ConfigSchema, settings, where, fieldOf);
    const needed = (config?.SSH.CancelGracePeriod ?? 0) + 10; // as in checkRunnerTimeouts
    if (needed > shutdownTimeout)
      log.warn("{where}SHUTDOWN_TIMEOUT should be CancelGracePeriod + 10, {needed} s", { where, needed });
    if (!manager || !config) return [];
    const { manager_name: name } = manager;
    return [{ manager, name, path: join(directory, `fargate-${name}.toml`), config, settings }];
  });
}

const TOKEN_VARIABLE = "GITLAB_RUNNER_TOKEN_";
const tokenVariable = (name: string): string =>
  `${TOKEN_VARIABLE}${name.toUpperCase().replace(/[^A-Z0-9]/g, "_")}`;
/** Authentication tokens begin with glrt-, or with the instance's own prefix before it. */
const isAuthenticationToken = (token: string): boolean => /^([\w-]+-)?glrtr?-/.test(token);

/** The tokens in a list: one per line, or a name and a token. Lines that begin with # are comments. */
function parseTokens(text: string, source: string, problems: Problems) {
  const seen = new Map<string, string>();
  return text.split(/\r?\n/).flatMap((line, index) => {
    const words = line.split(/[\s=]+/).filter(Boolean);
    if (words.length === 0 || line.trimStart().startsWith("#")) return [];
    const label = `line ${index + 1} of ${source}`;
    const [token = "", name = ""] = words.reverse();
    const isValid = words.length <= 2 && /^[\w.-]+$/.test(token);
    if (!isValid) problems.add(`${label} is invalid; expected: a token, or a name and a token`);
    const expected = v.getDescription(runnerName);
    if (name && !v.is(runnerName, name))
      problems.add(`${label}: the name is ${formatValue(name)}; expected: ${expected}`);
    for (const [what, value] of [
      ["token", token],
      ["name", name],
    ] as const) {
      const first = value && seen.get(`${what} ${value}`);
      if (first) problems.add(`${label} has the same ${what} as ${first}`);
      seen.set(`${what} ${value}`, label);
    }
    return [{ label, name, token, isRegistration: !isAuthenticationToken(token) }];
  });
}

/** The token of a runner that a user has created; a registered one begins with glrtr-, or has no prefix. */
const isUserRunner = (token: string): boolean => /^([\w-]+-)?glrt-/.test(token);

type ManagerToken = Pick<PlannedRunner, "token" | "isRegistration">;
/** Finds each manager's token: in the list, in the variable with its name, or in one for all managers. */
function assignTokens(
  names: readonly string[],
  listed: ReturnType<typeof parseTokens>,
  problems: Problems,
  env: Environment,
) {
  const variables = Object.keys(env).filter((key) => key.startsWith(TOKEN_VARIABLE) && env[key]);
  for (const key of variables)
    if (!names.some((name) => tokenVariable(name) === key)) problems.add(`${key} is for no manager`);
  for (const { label, name } of listed) if (!names.includes(name)) problems.add(`${label} is for no manager`);
  const owners = new Map<string, string>();
  const tokens = new Map<string, ManagerToken>();
  for (const name of names) {
    const variable = tokenVariable(name);
    const twin = names.find((other) => other !== name && tokenVariable(other) === variable);
    if (twin && env[variable])
      problems.add(`${variable} is for both ${twin} and ${name}; use a list of tokens`);
    const line = listed.find((line) => line.name === name);
    const own = line?.token || env[variable] || env.GITLAB_RUNNER_TOKEN;
    const token = (own || env.GITLAB_REGISTRATION_TOKEN || "").trim();
    const isRegistration = line ? line.isRegistration : !own && !isAuthenticationToken(token);
    const owner = owners.get(token);
    if (!token) problems.add(`manager ${name} has no token; set ${variable}`);
    else if (owner && !isRegistration)
      problems.add(
        `managers ${owner} and ${name} have the same authentication token, so either could get the other's ` +
          `jobs; create a runner for each in GitLab, and set ${tokenVariable(owner)} and ${variable}`,
      );
    owners.set(token, name);
    tokens.set(name, { token, isRegistration });
  }
  return tokens;
}

/** GitLab Runner's default for the path of its configuration file. */
const defaultConfigFile = ({ HOME = "." }: Environment): string =>
  process.geteuid?.() === 0 ? "/etc/gitlab-runner/config.toml" : join(HOME, ".gitlab-runner/config.toml");
const DEFAULT_CA_FILE = "/etc/gitlab-runner/certs/ca.crt"; // as in GitLab Runner's own image

/** GitLab Runner's settings of a cache in S3. It signs URLs with the credentials of this host. */
function cacheSettings(
  { CACHE_S3_BUCKET_NAME: BucketName, CACHE_S3_BUCKET_LOCATION: BucketLocation }: Environment,
  ServerAddress: string | undefined,
  problems: Problems,
): Table | undefined {
  if (!BucketName) return undefined;
  if (!BucketLocation) problems.add("CACHE_S3_BUCKET_LOCATION is not set; expected: the bucket's region");
  const s3 = { ServerAddress, BucketName, BucketLocation, AuthenticationType: "iam" };
  return { Type: "s3", Shared: true, s3 };
}

/** Reads and checks all that `runners` needs. Changes nothing. @throws {Failure} that lists every problem */
async function planFleet(context: FleetContext, options: RunnersOptions): Promise<Fleet> {
  const { env, log, signal, driverFile } = context;
  const problems = new Problems();
  const read = async (path: string, what: string) =>
    path === "-" ? context.readInput() : readFile(path, `${what} ${path}`).toString();
  if (options.managers === "-" && options.tokens === "-")
    problems.add("only one of --managers and --tokens can be standard input");
  const given = Object.fromEntries(Object.entries(env).filter(([, value]) => value?.trim()));
  const variables = problems.check(FleetSchema, {
    RUNNER_NAME_PREFIX: given.RUNNER_NAME, // the name of this variable in an early image of others
    ...given,
    ...(options.url && { GITLAB_URL: options.url }),
  });
  const cache = cacheSettings(given, variables?.CACHE_S3_SERVER_ADDRESS, problems);
  const json = options.managers
    ? await read(options.managers, "the list of managers")
    : given.MANAGERS_CONFIGS;
  const source = options.managers === "-" ? "standard input" : (options.managers ?? "MANAGERS_CONFIGS");
  const tables = json === undefined ? singleManager(env) : parseManagers(json, source, problems);
  const tokensFile = options.tokens ?? given.RUNNER_TOKENS_FILE;
  const list = tokensFile ? await read(tokensFile, "the list of tokens") : "";
  const listed = parseTokens(list, tokensFile === "-" ? "standard input" : `${tokensFile}`, problems);
  if (json === undefined && tables.length + listed.length === 0)
    problems.add("there are no runners; set MANAGERS_CONFIGS, or give --tokens");
  const path = resolve(options.runnerConfig ?? given.CONFIG_FILE ?? defaultConfigFile(env));
  const configFile = fs.existsSync(path) ? fs.realpathSync(path) : path;
  const { DRIVER_SETTINGS: common = {}, SHUTDOWN_TIMEOUT: shutdownTimeout = Infinity } = variables ?? {};
  const place = { common, directory: dirname(configFile), shutdownTimeout };
  const managers = planManagers(tables, place, problems, log);
  const names = new Set(tables.map((table) => table.manager_name).filter((name) => v.is(runnerName, name)));
  const tokens = tables.length > 0 ? assignTokens([...names], listed, problems, given) : new Map();
  const runners = managers.map(({ manager, name, path }): PlannedRunner => {
    const { tag_list, tags = [], limit } = manager;
    const common = { label: `manager ${name}`, name, tags: tag_list ?? tags, limit, driverFile: path };
    return { ...common, ...(tokens.get(name) as ManagerToken) };
  });
  if (tables.length === 0) {
    const readDriverFile = () => readFile(driverFile, `the configuration file ${driverFile}`).toString();
    if (listed.length > 0) problems.collect(() => readConfig(readDriverFile(), driverFile, {}, {}));
    runners.push(...listed.map((line) => ({ ...line, tags: [], limit: 0, driverFile })));
  }
  problems.throwIfAny();
  const checked = variables as Fleet["variables"];
  const caFile = checked.CA_CERTIFICATES_PATH ?? (fs.existsSync(DEFAULT_CA_FILE) ? DEFAULT_CA_FILE : "");
  const gitlab = { url: checked.GITLAB_URL, ca: caFile ? await trustedCas(caFile) : undefined, signal };
  return { variables: checked, gitlab, cache, caFile, configFile, runners, managers };
}

/** GitLab's runner API. */
interface GitLab {
  readonly url: string; // of GitLab itself
  readonly ca: readonly string[] | undefined; // certificates to trust; undefined: the default ones
  readonly signal: AbortSignal;
}
const GITLAB_TIMEOUT_MS = 30_000;
const GITLAB_RETRY_MS = 60_000; // how long to repeat requests while GitLab does not answer
/** What GitLab's answers to requests of runners mean. */
const GITLAB_STATUS: Readonly<Record<number, string>> = {
  403: "GitLab refuses the token",
  404: "this is no GitLab, or its address has a path",
  410: "GitLab does not allow registration tokens; create the runner in GitLab, and use its token (glrt-...)",
  429: "too many requests",
};

/** A request to GitLab that failed. */
class GitLabFailure extends Failure {
  constructor(
    message: string,
    readonly status: number, // 0 if there was no answer
    readonly mayHaveTakenEffect: boolean,
    isRetryable: boolean,
    readonly retryAfter = 0, // seconds
  ) {
    super("system", message, { isRetryable });
  }
  /** GitLab refuses this token or its tags; others may be valid. */
  get isRefusal(): boolean {
    return [400, 403, 410, 422].includes(this.status);
  }
}

const RunnerAnswerSchema = v.object({
  id: v.fallback(v.optional(v.number()), undefined),
  token: v.optional(v.string(), ""),
  token_expires_at: v.fallback(v.nullish(v.pipe(v.string(), v.isoTimestamp())), undefined),
});
type RunnerAnswer = v.InferOutput<typeof RunnerAnswerSchema>;
const ReasonSchema = v.object({ message: v.unknown() }); // GitLab's reason for an error: a text or an object

/** Sends one request. @param path below /api/v4/runners. @throws {GitLabFailure} */
async function askGitLab(gitlab: GitLab, method: string, path: string, body: Table): Promise<RunnerAnswer> {
  const { url, ca, signal } = gitlab;
  const init: BunFetchRequestInit = {
    method,
    headers: { "Content-Type": "application/json", "User-Agent": `fargate ${VERSION}` },
    body: JSON.stringify(body),
    redirect: "manual",
    keepalive: false, // bun repeats a request if a kept connection breaks, and a registration must not be
    signal: AbortSignal.any([signal, AbortSignal.timeout(GITLAB_TIMEOUT_MS)]),
    ...(ca && { tls: { ca: [...ca] } }),
  };
  try {
    const answer = await fetch(`${url}/api/v4/runners${path}`, init);
    const { status, ok } = answer;
    const text = await answer.text();
    const target = answer.headers.get("location");
    const meaning = target ? `it redirects to ${target}; set GITLAB_URL to that` : GITLAB_STATUS[status];
    const { output: detail } = v.safeParse(v.pipe(v.string(), v.parseJson(), ReasonSchema), text);
    const given = v.is(ReasonSchema, detail) ? withoutSecrets(JSON.stringify(detail.message)) : "";
    const reason = meaning ?? given;
    const what = `${url} answers ${status}${reason && `: ${reason}`}`;
    const isServerError = status >= 500;
    const retryAfter = Number(answer.headers.get("retry-after")) || 0;
    if (!ok)
      throw new GitLabFailure(what, status, isServerError, isServerError || status === 429, retryAfter);
    const { success, output } = v.safeParse(v.pipe(v.string(), v.parseJson(), RunnerAnswerSchema), text);
    return success ? (output as RunnerAnswer) : { token: "" }; // some versions answer with text
  } catch (error) {
    if (error instanceof GitLabFailure) throw error;
    const { code = "" } = error as NodeJS.ErrnoException;
    const notSent = firstMatch(NOT_SENT, code);
    const isCertificate = notSent === "certificate";
    const reason = reasonOf(signal.aborted ? signal.reason : error)
      .replace(HINTS, "")
      .replace(/\.$/, "");
    const hint = isCertificate ? "; for a private certificate authority, set CA_CERTIFICATES_PATH" : "";
    const what = `${url} cannot be reached: ${reason}${hint}`;
    throw new GitLabFailure(what, 0, !notSent, !signal.aborted && !isCertificate);
  }
}

/** Repeats a request for up to a minute if that may help and `mayRepeat` allows it. Warns once. */
async function askPatiently(
  { log, now }: Pick<FleetContext, "log" | "now">,
  gitlab: GitLab,
  request: () => Promise<RunnerAnswer>,
  mayRepeat: (failure: GitLabFailure) => boolean = () => true,
): Promise<RunnerAnswer> {
  let warned = false;
  const shouldRetry = (error: unknown) => {
    const isWorthIt =
      error instanceof GitLabFailure &&
      isRetryable(error) &&
      mayRepeat(error) &&
      error.retryAfter * 1000 < GITLAB_RETRY_MS;
    if (isWorthIt && !warned) log.warn("{reason}; trying again", { reason: reasonOf(error) });
    warned = true;
    return isWorthIt;
  };
  const minPause = (error: unknown) => (error instanceof GitLabFailure ? error.retryAfter * 1000 : 0);
  const until = now() + GITLAB_RETRY_MS;
  return retry(request, { until, signal: gitlab.signal, now, shouldRetry, minPause });
}

/** A count with its noun: "1 runner", "2 runners". */
const countOf = (count: number, noun: string, plural = "s"): string =>
  `${count} ${noun}${count === 1 ? "" : plural}`;

/** What `runners` has done. */
interface FleetReport {
  readonly added: string[]; // names of sections
  readonly present: string[];
  readonly problems: string[];
}

type Section = Readonly<Partial<Record<"name" | "url" | "token", unknown>>>;
/** Parses the text of config.toml. @throws {Error} that quotes nothing, since the text has tokens */
function parseRunnerToml(text: string): { runners: Section[]; others: Table } {
  try {
    const { runners = [], ...others } = parseToml(text.replace(/^\uFEFF/, ""));
    if (!Array.isArray(runners)) throw new Error("runners is not a list of tables");
    return { runners: (runners as unknown[]).filter(isTable), others };
  } catch (error) {
    if (!(error instanceof TomlError)) throw error;
    throw new Error(`line ${error.line}, column ${error.column}: ${error.message.split("\n")[0]}`);
  }
}

/** The text and the runners of config.toml. Read before each change, as GitLab Runner changes it too. */
function readRunnerConfig(path: string): { text: string; sections: Section[] } {
  return withContext(`${path} cannot be used`, () => {
    const bytes = fs.existsSync(path) ? fs.readFileSync(path) : Buffer.alloc(0);
    const text = bytes.toString();
    if (!Buffer.from(text).equals(bytes)) throw new Error("it is not UTF-8");
    const { runners } = parseRunnerToml(text);
    try {
      parseRunnerToml(`${text}\n[[runners]]\n`);
    } catch {
      throw new Error("no section can be added to its list of runners; write each runner as [[runners]]");
    }
    return { text, sections: runners };
  });
}

/**
 * Writes config.toml or a file beside it, with mode 0600. The file keeps its owner; a new one gets that of
 * config.toml or else of the directory, because root may run this for GitLab Runner's user.
 */
function writeRunnerFile(path: string, text: string, configFile = path): void {
  const model = [path, configFile].find((file) => fs.existsSync(file)) ?? dirname(path);
  const publish = (temporary: string) => {
    const { uid, gid } = fs.statSync(model);
    if (process.geteuid?.() === 0) fs.chownSync(temporary, uid, gid);
    fs.renameSync(temporary, path);
  };
  withContext(`${path} cannot be written`, () => writeDurably(path, text, publish), "disk");
}

/**
 * Removes the section of this token from config.toml. All else stays as it is, comments included.
 * @throws {Error} if it cannot be told from the rest
 */
function removeSection(path: string, token: string): void {
  const { text } = readRunnerConfig(path);
  const isOurs = (runner: Section) => runner.token === token;
  const hasToken = (part: string) => {
    try {
      return parseRunnerToml(part).runners.some(isOurs);
    } catch {
      return false; // a part of a text or a list with lines like headers
    }
  };
  let isInside = false;
  const parts = text.split(/^(?=[ \t]*\[)/m).map((part) => {
    const isSubtable = /^[ \t]*\[{1,2}[ \t]*runners[ \t]*\./.test(part);
    isInside = isSubtable ? isInside : hasToken(part);
    if (!isInside) return part;
    const lines = part.split(/(?<=\n)/);
    const rest = lines.slice(lines.findLastIndex((line) => /^\s*[^#\s]/.test(line)) + 1).join("");
    return rest.includes("#") ? rest : "";
  });
  const left = parts.join("");
  const [before, after] = [parseRunnerToml(text), parseRunnerToml(left)];
  const expected = { ...before, runners: before.runners.filter((runner) => !isOurs(runner)) };
  if (JSON.stringify(after) !== JSON.stringify(expected))
    throw new Error("the section of a runner that GitLab refuses must be removed by hand");
  writeRunnerFile(path, left);
}

const systemIdPath = (directory: string): string => join(directory, ".runner_system_id");
/** GitLab Runner's id of this manager, which it reads from this file as well. */
function readSystemId(configFile: string): string {
  const path = systemIdPath(dirname(configFile));
  const read = () => (fs.existsSync(path) ? fs.readFileSync(path, "utf8").trim() : "");
  const id = withContext(`the runner's system id ${path} cannot be used`, read);
  if (/^[sr]_[0-9a-zA-Z]{12}$/.test(id)) return id;
  const made = `r_${randomBytes(6).toString("hex")}`;
  writeRunnerFile(path, made, configFile);
  return made;
}

/** The file with the name of a registration that has been sent, until its token is in config.toml. */
const pendingPath = (configFile: string): string => join(dirname(configFile), ".fargate-runners.pending");

/** Reports a registration whose answer an earlier process did not get or store. */
function reportPending({ configFile }: Fleet, log: Logger): void {
  const path = pendingPath(configFile);
  const read = () => (fs.existsSync(path) ? readPrivateFile(path).trim() : "");
  const name = withContext(`${path} cannot be used`, read);
  if (name && !readRunnerConfig(configFile).sections.some((section) => section.name === name))
    log.warn("an earlier registration as {name} was not completed; {hint}", { name, hint: REMOVE_BY_HAND });
  removeQuietly(path);
}
const REMOVE_BY_HAND = "if GitLab lists a runner of this name that was never used, remove it there";

/** Warns about sections of former managers, which GitLab Runner continues to use. */
function reportFormerManagers(fleet: Fleet, log: Logger): void {
  const { configFile, managers, runners, variables } = fleet;
  const systemId = readSystemId(configFile);
  const planned = runners.map((runner) => sectionName(fleet, runner, systemId));
  const isOfManager = (name: string) =>
    name.startsWith(`${variables.RUNNER_NAME_PREFIX}_`) && name.endsWith(`_${systemId.slice(2)}`);
  for (const { name } of managers.length > 0 ? readRunnerConfig(configFile).sections : [])
    if (isOfManager(String(name)) && !planned.includes(String(name)))
      log.warn("{name} in {configFile} is of no manager; remove it there and in GitLab", {
        name,
        configFile,
      });
}

/** Registers a runner. The request is repeated only if it certainly had no effect. */
async function register(context: FleetContext, fleet: Fleet, { token, tags }: PlannedRunner, name: string) {
  const { gitlab, configFile } = fleet;
  const pending = pendingPath(configFile);
  writeDurably(pending, `${name}\n`, fs.renameSync);
  const request = () => askGitLab(gitlab, "POST", "", { token, description: name, tag_list: tags.join(",") });
  try {
    const answer = await askPatiently(context, gitlab, request, (failure) => !failure.mayHaveTakenEffect);
    if (!answer.token) throw new GitLabFailure(`${gitlab.url} answers without a token`, 201, true, false);
    return answer;
  } catch (error) {
    if (error instanceof GitLabFailure && error.mayHaveTakenEffect)
      throw new Failure("system", `${error.message}; it may have registered ${name}; ${REMOVE_BY_HAND}`);
    removeQuietly(pending);
    throw error;
  }
}

/** Checks an authentication token. GitLab then lists this manager. */
const verify = (context: FleetContext, { gitlab }: Fleet, token: string, systemId: string) =>
  askPatiently(context, gitlab, () => askGitLab(gitlab, "POST", "/verify", { token, system_id: systemId }));

/** The section of a runner, with the driver's commands. */
async function formatSection(
  fleet: Pick<Fleet, "cache" | "caFile" | "managers"> & { readonly gitlab: Pick<GitLab, "url"> },
  runner: Pick<PlannedRunner, "isRegistration" | "limit" | "driverFile">,
  { name, token, id, token_expires_at }: RunnerAnswer & { name: string },
  program: string,
): Promise<string> {
  const { stringify } = await import("smol-toml");
  const commands = ["config", "prepare", "run", "cleanup"].map((stage) => ({
    [`${stage}_exec`]: program,
    [`${stage}_args`]: ["--config", runner.driverFile, "custom", stage],
  }));
  // A renewed token would be lost with the container, and the one in its environment would then be invalid.
  const renews = runner.isRegistration || fleet.managers.length === 0;
  const section = {
    name,
    url: fleet.gitlab.url,
    ...(id !== undefined && { id }),
    token,
    // With these two, GitLab Runner renews the token before it expires.
    ...(renews &&
      token_expires_at && { token_obtained_at: new Date(), token_expires_at: new Date(token_expires_at) }),
    ...(fleet.caFile && { "tls-ca-file": fleet.caFile }),
    executor: "custom",
    ...(runner.limit > 0 && { limit: runner.limit }),
    builds_dir: "/opt/gitlab-runner/builds", // in the task
    cache_dir: "/opt/gitlab-runner/cache",
    ...(fleet.cache && { cache: fleet.cache }),
    custom: Object.assign({}, ...commands),
  };
  return stringify({ runners: [section] });
}

/** Adds a runner's section to config.toml, unless it is there. @throws {Failure} */
async function addRunner(context: FleetContext, fleet: Fleet, runner: PlannedRunner, report: FleetReport) {
  const { configFile, managers, variables, gitlab } = fleet;
  const { isRegistration, label } = runner;
  const { log, program } = context;
  const systemId = readSystemId(configFile);
  const known = sectionName(fleet, runner, systemId);
  const present = readRunnerConfig(configFile).sections.find((section) =>
    isRegistration ? section.name === known : section.token === runner.token,
  );
  if (present) {
    // A manager that was stopped may have unregistered its runner, but not removed the section.
    const isRefused = async () =>
      verify(context, fleet, String(present.token), systemId).then(
        () => false,
        (error) => error instanceof GitLabFailure && error.status === 403,
      );
    const isGone = isRegistration && managers.length > 0 && (await isRefused());
    if (!isGone) return void report.present.push(String(present.name));
    removeSection(configFile, String(present.token));
    log.info("GitLab no longer knows the runner {name}; registering it again", { name: present.name });
  }
  const answer = isRegistration
    ? await register(context, fleet, runner, known)
    : await verify(context, fleet, runner.token, systemId);
  const name = known || `${variables.RUNNER_NAME_PREFIX}-${answer.id ?? sha256(runner.token).slice(0, 8)}`;
  const token = answer.token || runner.token;
  const section = await formatSection(fleet, runner, { ...answer, name, token }, program);
  try {
    const { text } = readRunnerConfig(configFile);
    const gap = /\n\r?\n$/.test(text) ? "" : text.endsWith("\n") ? "\n" : "\n\n";
    writeRunnerFile(configFile, text + gap + section);
  } catch (error) {
    const lost = isRegistration ? `; GitLab has registered ${name}; remove it there` : "";
    throw new Failure("system", `${reasonOf(error)}${lost}`);
  }
  removeQuietly(pendingPath(configFile));
  report.added.push(name);
  const fields = { name, id: answer.id ?? "unknown", url: gitlab.url, label };
  log.info(`${isRegistration ? "registered" : "added"} {name} at {url} (runner {id}, {label})`, fields);
}

/** The name of a runner's section, and of a registered runner in GitLab; empty if its id shall be in it. */
function sectionName(
  { variables, gitlab, managers }: Fleet,
  runner: PlannedRunner,
  systemId: string,
): string {
  const prefix = variables.RUNNER_NAME_PREFIX;
  if (managers.length > 0) return `${prefix}_${runner.name}_${systemId.slice(2)}`;
  if (runner.name || !runner.isRegistration) return runner.name;
  return `${prefix}-${sha256(`${gitlab.url} ${runner.token}`).slice(0, 8)}`;
}

/** Creates GitLab Runner's config.toml and the driver's configuration files, unless they exist. */
async function writeBaseFiles({ configFile, managers, variables }: Fleet, log: Logger): Promise<void> {
  const { stringify } = await import("smol-toml");
  const { text: before } = readRunnerConfig(configFile); // a bad one fails before anything is written
  for (const { name, path, settings } of managers) {
    const comment = `# The driver's configuration for the manager ${name}, written by fargate runners.`;
    const text = `${comment}\n\n${stringify(settings)}`;
    const present = fs.existsSync(path)
      ? readFile(path, `the driver's configuration ${path}`).toString()
      : "";
    if (!present) writeRunnerFile(path, text, configFile);
    else if (present !== text)
      log.warn("{path} differs from the manager's settings, and is left as it is; to renew it, remove it", {
        path,
      });
  }
  const limits = { concurrent: variables.RUNNER_CONCURRENCY, shutdown_timeout: variables.SHUTDOWN_TIMEOUT };
  if (before.trim() !== "") {
    const { others } = parseRunnerToml(before);
    for (const [key, value] of Object.entries(managers.length > 0 ? limits : {}))
      if (others[key] !== value)
        log.warn("{key} in {configFile} is not {value}, and is left as it is", { key, configFile, value });
    return;
  }
  // GitLab Runner's defaults.
  const global = { ...limits, check_interval: 0, session_server: { session_timeout: 1800 } };
  writeRunnerFile(configFile, `# Written by fargate runners.\n\n${stringify(global)}`);
}

/** Locks config.toml against other processes of `runners`. @returns a function that unlocks it */
function lockRunnerConfig({ configFile }: Fleet, wallTime: number): () => void {
  const place = { Directory: dirname(configFile) };
  const stem = `runners-${sha256(configFile)}`;
  const unlock = createLock(place, stem, "runners");
  const isOther = ({ pid, identity }: { pid: number; identity: string }) =>
    pid !== process.pid || identity !== identityOf("self");
  const other = readLocks(place, wallTime).find(
    (lock) => lock.stem === stem && lock.isAlive && isOther(lock),
  );
  if (!other) return unlock;
  unlock();
  throw new Failure("system", `another process (${other.pid}) is changing ${configFile}`);
}

/** Removes temporary files of killed processes. They may contain tokens. */
function removeTemporaryFiles(configFile: string): void {
  const directory = dirname(configFile);
  const ours = [configFile, pendingPath(configFile), systemIdPath(directory)].map((path) => basename(path));
  for (const name of fs.readdirSync(directory)) {
    const [, file = ""] = /^(.+)\.[0-9a-f]{12}\.tmp$/.exec(name) ?? [];
    if (ours.includes(file) || /^fargate-.+\.toml$/.test(file)) removeQuietly(join(directory, name));
  }
}

/**
 * The `runners` command: writes what is missing, and changes nothing that is there. The token of each runner
 * is on disk before the next one is registered.
 * @returns what it has done; `problems` are about single runners, or the one that ended it
 * @throws {Failure} if nothing could be done
 */
async function configureRunners(context: FleetContext, fleet: Fleet): Promise<FleetReport> {
  const { configFile, runners } = fleet;
  const directory = dirname(configFile);
  const make = () => fs.mkdirSync(directory, { recursive: true, mode: 0o700 });
  withContext(`the directory ${directory} cannot be created`, make, "disk");
  const unlock = lockRunnerConfig(fleet, context.wallTime());
  const report: FleetReport = { added: [], present: [], problems: [] };
  try {
    removeTemporaryFiles(configFile);
    reportPending(fleet, context.log);
    await writeBaseFiles(fleet, context.log);
    reportFormerManagers(fleet, context.log);
    for (const [index, runner] of runners.entries())
      try {
        context.signal.throwIfAborted();
        await addRunner(context, fleet, runner, report);
      } catch (error) {
        report.problems.push(`${runner.label}: ${reasonOf(error)}`);
        if (error instanceof GitLabFailure && error.isRefusal) continue;
        // All others would fail as well: GitLab or the disk is at fault, or a signal has come.
        const left = runners.length - index - 1;
        if (left > 0) report.problems.push(`${countOf(left, "more runner")} not processed; run this again`);
        break;
      }
  } finally {
    unlock();
  }
  return report;
}

// manager: runs GitLab Runner in a container, from its start to its end.

const LEAVE_MS = 5_000; // for the last step, so that all steps fit in the 30 s that ECS gives by default
const RUNNER_EXIT_MS = 2_000; // that GitLab Runner may take longer than its own shutdown_timeout
/** Variables that GitLab Runner, and so the stages of jobs, must not get. */
const FLEET_SECRET = /^(GITLAB_REGISTRATION_TOKEN|GITLAB_RUNNER_TOKEN.*)$/;

/**
 * The `manager` command: configures the runners, runs GitLab Runner and regular sweeps, and unregisters the
 * runners at the end. TERM gives jobs STOP_TIMEOUT to finish, then cancels them; QUIT lets them finish.
 * @param args GitLab Runner's arguments
 * @returns the exit code. @throws {Failure} if no runner can be used
 */
async function manage(context: FleetContext, fleet: Fleet, args: readonly string[], quit: AbortSignal) {
  const { log, env } = context;
  const { ECS_CONTAINER_METADATA_URI_V4: endpoint } = env;
  if (fleet.managers.length === 0) throw new Failure("system", "there are no managers; set MANAGERS_CONFIGS");
  if (!Bun.which("gitlab-runner", { PATH: env.PATH ?? "" }))
    throw new Failure("system", "gitlab-runner is not in PATH");
  for (const { TaskMetadata } of fleet.managers.map(({ config }) => config)) {
    const warning = createDirectory(TaskMetadata.Directory);
    if (warning) log.warn("{warning}", { warning });
    await identifyManager(TaskMetadata.Directory, env);
    if (endpoint && managerId(TaskMetadata.Directory, env).length < 32)
      log.warn(
        "the task metadata endpoint does not answer: if this manager is killed, no sweep stops its tasks",
      );
  }
  const ended = new AbortController();
  const { added, present, problems } = await configureRunners(context, fleet);
  const usable = [...added, ...present];
  try {
    for (const reason of problems) log.error("{reason}", { reason });
    context.signal.throwIfAborted();
    if (usable.length === 0) throw new Failure("system", "no runner can be used");
    if (quit.aborted) return 0;
    void sweepRegularly({ ...context, signal: AbortSignal.any([context.signal, quit, ended.signal]) }, fleet);
    return await superviseRunner(context, fleet, args, quit);
  } finally {
    ended.abort();
    const leave = { ...context, signal: AbortSignal.timeout(LEAVE_MS) };
    await Promise.all([stopRemainingTasks(leave, fleet), unregisterRunners(leave, fleet, usable)]);
  }
}

const whenAborted = (signal: AbortSignal): Promise<unknown> =>
  new Promise((done) => (signal.aborted ? done(0) : signal.addEventListener("abort", done)));

/** Runs GitLab Runner until it ends, or until this process is to end. @returns the exit code */
async function superviseRunner(
  { env, signal, log }: FleetContext,
  { configFile, variables }: Fleet,
  args: readonly string[],
  quit: AbortSignal,
): Promise<number> {
  const kept = Object.entries(env).filter(([key]) => !FLEET_SECRET.test(key));
  const options = { stdin: "ignore", stdout: "inherit", stderr: "inherit" } as const;
  const environment = {
    ...Object.fromEntries(kept),
    CONFIG_FILE: configFile,
    FARGATE_MANAGER: readSystemId(configFile),
  };
  const start = () => Bun.spawn(["gitlab-runner", ...args], { ...options, env: environment });
  const child = withContext("gitlab-runner cannot be started", start);
  const endsWithin = (seconds: number) =>
    Promise.race([child.exited.then(() => true), sleep(seconds * 1000).then(() => false)]);
  await Promise.race([child.exited, whenAborted(signal), whenAborted(quit)]);
  if (!signal.aborted && !quit.aborted) {
    const how = child.signalCode ?? `exit code ${child.exitCode}`;
    log.error("gitlab-runner has ended by itself ({how})", { how });
    return child.exitCode || 1;
  }
  const { STOP_TIMEOUT, SHUTDOWN_TIMEOUT } = variables;
  // Not QUIT and TERM at once: GitLab Runner receives signals without a queue, and could lose the second.
  if (quit.aborted || STOP_TIMEOUT > 0) {
    const limit = signal.aborted ? `have ${STOP_TIMEOUT} s to finish` : "may finish";
    log.info("stopping: taking no new jobs; running jobs {limit}", { limit });
    child.kill("SIGQUIT");
    await Promise.race([child.exited, whenAborted(signal)]);
    if (await endsWithin(STOP_TIMEOUT)) return 0;
  }
  log.info("stopping: cancelling jobs, which have {seconds} s to end", { seconds: SHUTDOWN_TIMEOUT });
  child.kill("SIGTERM");
  if (!(await endsWithin(SHUTDOWN_TIMEOUT + RUNNER_EXIT_MS / 1000))) {
    log.warn("gitlab-runner has not ended in time, and is killed");
    child.kill("SIGKILL");
  }
  return 0;
}

/** One configuration of the driver for each cluster of the managers. */
const clustersOf = ({ managers }: Fleet): Config[] => {
  const keyOf = ({ Fargate, TaskMetadata }: Config) =>
    JSON.stringify([Fargate.Region, Fargate.Cluster, TaskMetadata.Directory]);
  return [...new Map(managers.map(({ config }) => [keyOf(config), config])).values()];
};

/** The directories of records. */
const directoriesOf = ({ managers }: Fleet): string[] => [
  ...new Set(managers.map(({ config }) => config.TaskMetadata.Directory)),
];

/** Sweeps each cluster at once, and then every SWEEP_INTERVAL. Logs each problem once. */
async function sweepRegularly(context: Omit<BaseContext, "config">, fleet: Fleet): Promise<void> {
  const { log, signal } = context;
  const interval = fleet.variables.SWEEP_INTERVAL * 1000;
  const known = new Set<string>();
  while (interval > 0 && !signal.aborted) {
    for (const config of clustersOf(fleet)) {
      const options = { dryRun: false, json: false };
      const failed = (error: unknown) => ({ stopped: [], problems: [describeFailure(error)] });
      const { stopped, problems } = await sweep({ ...context, config }, options).catch(failed);
      for (const { taskArn, why } of stopped) log.info("sweep stopped {taskArn}: {why}", { taskArn, why });
      for (const problem of problems.filter((problem) => !signal.aborted && !known.has(problem)))
        log.warn("sweep of {cluster}: {problem}", { cluster: config.Fargate.Cluster, problem });
      for (const problem of problems) known.add(problem);
    }
    await sleep(interval, signal).catch(() => {});
  }
}

/** Stops the tasks of the jobs that have run under this manager, when no stage is left that would. */
async function stopRemainingTasks(context: Omit<BaseContext, "config">, fleet: Fleet): Promise<void> {
  const { log, signal } = context;
  const systemId = readSystemId(fleet.configFile);
  const job = { title: "its manager was stopped" };
  const attempt = (what: string, action: () => Promise<void>) =>
    action().catch((error) => {
      const late = `${what}: AWS has not answered within ${LEAVE_MS / 1000} s`;
      const reason = signal.aborted ? late : describeFailure(error);
      log.error("a task may be left running: {reason}", { reason });
    });
  const stop = async (path: string) => {
    const record = readRecord(path);
    // Another manager or gitlab-runner may use the directory as well. Its jobs go on.
    if (record?.Manager !== systemId) return;
    if (await stopRecordedTask({ ...context, job }, new Aws(record, context), record, signal))
      removeQuietly(path);
  };
  const stopAll = async (directory: string) => {
    const stopEach = ({ name, TaskARN }: ReturnType<typeof readRecords>[number]) =>
      attempt(TaskARN || `the task of ${name}`, () => stop(join(directory, name)));
    await Promise.all(readRecords(directory).map(stopEach));
  };
  await Promise.all(directoriesOf(fleet).map((directory) => attempt(directory, () => stopAll(directory))));
}

/**
 * Unregisters the runners that this manager has registered. A runner with an authentication token belongs to
 * whoever created it: GitLab only forgets this manager.
 */
async function unregisterRunners(
  context: Omit<BaseContext, "config">,
  fleet: Fleet,
  names: readonly string[],
): Promise<void> {
  const { log, signal } = context;
  if (names.length === 0) return;
  const { configFile } = fleet;
  const systemId = readSystemId(configFile);
  const gitlab = { ...fleet.gitlab, signal };
  const unregister = async ({ name, token }: Section) => {
    const runner = fleet.runners.find((runner) => sectionName(fleet, runner, systemId) === name);
    // A section of a user's runner may have the name of a registered one, after a change of tokens.
    const isRegistered = runner?.isRegistration && !isUserRunner(String(token));
    const [path, body] = isRegistered ? ["", { token }] : ["/managers", { token, system_id: systemId }];
    try {
      await askPatiently(context, gitlab, () => askGitLab(gitlab, "DELETE", path, body));
    } catch (error) {
      const hint = isRegistered ? "remove it in GitLab" : `GitLab still lists its manager ${systemId}`;
      const late = `GitLab has not confirmed it within ${LEAVE_MS / 1000} s`;
      const fields = { name, reason: signal.aborted ? late : reasonOf(error), hint };
      const isGone =
        error instanceof GitLabFailure && (error.status === 403 || (path && error.status === 404));
      if (!isGone) return log.error("{name} could not be unregistered: {reason}; {hint}", fields);
    }
    // Unregistered now, or before: GitLab refuses its token.
    log.info("unregistered {name}", { name });
    try {
      if (isRegistered) removeSection(configFile, String(token));
    } catch (error) {
      log.warn("{reason}", { reason: reasonOf(error) }); // the next start verifies the token
    }
  };
  const { sections } = readRunnerConfig(configFile);
  await Promise.all(sections.filter(({ name }) => names.includes(String(name))).map(unregister));
}

// 12. Job image and services ----------------------------------------------------------------------------
// Runs a job's script in the image of `image:`, beside containers for `services:`. ECS cannot override an
// image in RunTask, so this section registers task definitions: the configured one, with containers added.
// Each stage, and sweep, calls it in one place. May use all sections above. Must not use an image that no
// pattern allows, nor put a secret of the job into a task definition or an override.
//
// The container `build` needs no SSH server: a small shell program, AGENT, is its first process. A script for
// it is wrapped in another script, the relay, which runs in ci-coordinator like any script over SSH, and
// passes the real script on through named pipes in a volume that both containers mount.

const BUILD_CONTAINER = "build";
const INIT_CONTAINER = "permissions";
const LINK = "/.fargate"; // where the shared volume is mounted
const ACCEPT_SECONDS = 4; // for the agent to accept a script; then ECS is asked about its container
const MAX_CONTAINERS = 10; // of a task definition
const MAX_OVERRIDES = 8_192; // characters of JSON, for all overrides of RunTask together
const COORDINATOR_OVERRIDE = { ed25519: 300, rsa: 1_000 }; // of these, for the public key and the deadline

const optionalText = ifValid(v.string());
const words = ifValid(v.array(v.string()));
const userOption = ifValid(v.object({ user: ifValid(v.union([v.string(), v.number()])) }));
const platformOption = ifValid(v.object({ platform: optionalText }));
const VariableSchema = v.object({
  key: v.string(),
  value: v.fallback(v.string(), ""),
  public: v.fallback(v.boolean(), false),
  masked: v.fallback(v.boolean(), false),
  file: v.fallback(v.boolean(), false),
  raw: v.fallback(v.boolean(), false),
});
type Variable = v.InferOutput<typeof VariableSchema>;
/** The valid items of a list. */
const validItems = <T extends v.GenericSchema>(item: T) =>
  v.pipe(
    v.fallback(v.array(v.fallback(v.nullable(item), null)), []),
    v.transform((items) => items.flatMap((item): v.InferOutput<T>[] => (item === null ? [] : [item]))),
  );
const variables = validItems(VariableSchema);
/** `image:` or one of `services:`, as the runner passes it. */
const KeywordSchema = v.object({
  ...{ name: v.string(), alias: optionalText, entrypoint: words, command: words, pull_policy: words },
  variables,
  ports: ifValid(v.array(v.object({ number: v.number() }))),
  executor_opts: ifValid(
    v.object({ docker: ifValid(v.intersect([userOption, platformOption])), kubernetes: userOption }),
  ),
});
type Keyword = v.InferOutput<typeof KeywordSchema>;
const KeywordsSchema = v.object({
  job_info: v.object({ project_id: v.number() }),
  image: v.fallback(v.nullable(KeywordSchema), null),
  services: validItems(KeywordSchema),
  variables,
});

/** A container for the job's image or for a service. */
interface JobContainer {
  readonly name: string; // of the container
  readonly image: Image;
  readonly keyword: Keyword;
  readonly user?: string | undefined;
  readonly secretArn?: string | undefined; // the secret with the registry's credentials
}

/** What a job gets of its `image:` and `services:`. */
interface ImagePlan {
  readonly taskDefinition?: string | undefined; // the operator's own, by JobImage.TaskDefinitions
  readonly build?: JobContainer | undefined;
  readonly services: readonly JobContainer[];
  readonly variables: readonly Variable[]; // of the job
  readonly unused: readonly (readonly [what: string, why: string])[]; // what has no effect, for the log
}
type ImageContext = Pick<Context, "config" | "job" | "jobOverrides" | "env">;

/** The user that a container runs as, by `docker:user` or `kubernetes:user`. */
const userOf = ({ executor_opts: options }: Keyword): string | undefined => {
  const user = options?.docker?.user ?? options?.kubernetes?.user;
  return user === undefined || user === null || user === "" ? undefined : String(user);
};

/** The container for an image that the patterns allow. @throws {Failure} of the job, if there is none */
function allowContainer(
  name: string,
  keyword: Keyword,
  patterns: readonly string[],
  project: number,
  f: Config["JobImage"],
): JobContainer {
  const isBuild = name === BUILD_CONTAINER;
  const [what, key] = isBuild ? ["image:", "AllowedImages"] : ["services:", "AllowedServices"];
  const refuse = (why: string) => new Failure("build", `${what} ${keyword.name.slice(0, 300)} ${why}`);
  const image = parseImage(keyword.name);
  if (!image) throw refuse("is not an image reference, such as registry.example.com/group/image:tag");
  if (nameOfImage(image).length > 255) throw refuse("is longer than the 255 characters that ECS accepts");
  if (!patterns.some((pattern) => matchesImage(pattern, image, project)))
    throw refuse(`(${nameOfImage(image)}) is not allowed: ${key} is ${patterns.join(", ")}`);
  const user = userOf(keyword);
  if (user !== undefined && !/^[\w.-]{1,64}(:[\w.-]{1,64})?$/.test(user))
    throw refuse(`has an invalid user, ${user.slice(0, 100)}; expected: name, id, or either with :group`);
  const credentials = f.PullCredentials.find(({ Image }) => matchesImage(Image, image, project));
  return { name, image, keyword, user, secretArn: credentials?.SecretArn };
}

/**
 * Decides what a job gets of its `image:` and `services:`. Reads them from JOB_RESPONSE_FILE, never from a
 * variable of the job.
 * @returns undefined if the job uses neither keyword, or the configuration file has no JobImage
 * @throws {Failure} of the job, if something is not allowed
 */
function planImages({
  config: { JobImage: f },
  job,
  jobOverrides,
  env,
}: ImageContext): ImagePlan | undefined {
  const isOn = f.TaskDefinitions.length + f.AllowedImages.length + f.AllowedServices.length > 0;
  if (!isOn || !job.imageNames?.length) return undefined;
  const keywords = readJson(fs.readFileSync(`${env.JOB_RESPONSE_FILE}`, "utf8"), KeywordsSchema);
  const project = keywords.job_info.project_id;
  const wanted = keywords.image?.name ? keywords.image : undefined;
  const named = keywords.services.filter(({ name }) => name !== "");
  const none = { services: [], variables: [] };
  const list = [...(wanted ? [wanted] : []), ...named].map(({ name }) => name).join(", ");
  if (jobOverrides.includes("TaskDefinition"))
    return { ...none, unused: [[`image: and services: (${list})`, "the job sets FARGATE_TASK_DEFINITION"]] };
  const unused: [string, string][] = [];
  const image = wanted && parseImage(wanted.name);
  const row = f.TaskDefinitions.find(({ Image }) => image && matchesImage(Image, image, project));
  let build: JobContainer | undefined;
  if (wanted && !row && f.AllowedImages.length > 0)
    build = allowContainer(BUILD_CONTAINER, wanted, f.AllowedImages, project, f);
  else if (wanted && !row)
    unused.push([`image: ${wanted.name}`, "no row of TaskDefinitions matches, and AllowedImages is empty"]);
  const isAllowed = f.AllowedServices.length > 0;
  if (named.length > 0 && !isAllowed)
    unused.push([`services: ${named.map(({ name }) => name).join(", ")}`, "AllowedServices is empty"]);
  const services = (isAllowed ? named : []).map((keyword, i) => {
    const last = parseImage(keyword.name)?.repository.split("/").at(-1)?.replace(/\W/g, "-").slice(0, 200);
    return allowContainer(`service-${i + 1}-${last}`, keyword, f.AllowedServices, project, f);
  });
  for (const { keyword } of build ? [build, ...services] : services)
    if (keyword.pull_policy?.some((policy) => policy !== "always"))
      unused.push([`pull_policy of ${keyword.name}`, "ECS pulls the images of each task"]);
  return { taskDefinition: row?.TaskDefinition, build, services, variables: keywords.variables, unused };
}

/** The directories that `config` returns, if the job's script runs in its own image. */
function imageDirectories(context: ImageContext): Record<"builds_dir" | "cache_dir", string> | undefined {
  const { BuildsDirectory: builds_dir, CacheDirectory: cache_dir } = context.config.JobImage;
  return planImages(context)?.build && { builds_dir, cache_dir };
}

/** Shell code that opens up the volumes and creates the pipe on which the agent waits for scripts. */
const openVolumes = (directories: readonly string[]) =>
  `umask 0; chmod 777 ${[LINK, ...directories].join(" ")} && mkfifo ${LINK}/calls`;

/** The volumes for a job with its own image, and where the containers mount them. */
function jobVolumes({ JobImage: f }: Config, coordinator: ContainerDefinition) {
  const directories = { "fargate-builds": f.BuildsDirectory, "fargate-cache": f.CacheDirectory };
  const mounts = Object.entries({ "fargate-link": LINK, ...directories }).map(([name, containerPath]) => {
    // A mount of the configured definition stays, such as one of EFS.
    const own = coordinator.mountPoints?.find(
      (mount) => mount.containerPath?.replace(/\/+$/, "") === containerPath,
    );
    return { own, mount: own ?? { sourceVolume: name, containerPath, readOnly: false } };
  });
  const added = mounts.flatMap(({ own, mount }) => (own ? [] : [mount]));
  return { mounts: mounts.map(({ mount }) => mount), added };
}

/**
 * The health check for an SSH server without one: each address family must have a listener on the port.
 * Services start after it, so none of them can take the port first and pass for the SSH server.
 */
function sshHealthCheck(port: number): HealthCheck {
  const hex = port.toString(16).toUpperCase().padStart(4, "0");
  // In /proc/net/tcp: local address, remote address, state; 0A is LISTEN.
  const listens = (file: string) => `grep -q ':${hex} [0-9A-F]*:0000 0A ' ${file}`;
  const hasNoIpv6 = "[ ! -e /proc/net/tcp6 ] || grep -q 1 /proc/sys/net/ipv6/conf/all/disable_ipv6";
  const command = `${listens("/proc/net/tcp")} && { ${hasNoIpv6} || ${listens("/proc/net/tcp6")}; }`;
  return { command: ["CMD-SHELL", command], interval: 5, timeout: 5, retries: 10, startPeriod: 60 };
}

/** The container definitions for a job's image and services. */
function jobContainers(
  coordinator: ContainerDefinition,
  plan: ImagePlan,
  mounts: MountPoint[],
  size: Pick<ContainerDefinition, "memory" | "memoryReservation">,
) {
  const { logConfiguration } = coordinator;
  const define = ({ name, image, user, secretArn }: JobContainer): ContainerDefinition => ({
    ...{ name, image: nameOfImage(image), essential: false, user, logConfiguration, ...size },
    repositoryCredentials: secretArn ? { credentialsParameter: secretArn } : undefined,
  });
  const given = (words: readonly string[] | null | undefined) =>
    words?.some((word) => word !== "") ? [...words] : undefined;
  const agent = ["sh", "-c", AGENT];
  const build = plan.build && {
    ...define(plan.build),
    entryPoint: given(plan.build.keyword.entrypoint) ?? agent.slice(0, 2),
    command: given(plan.build.keyword.entrypoint) ? agent : agent.slice(2),
    mountPoints: mounts,
    stopTimeout: 2, // seconds; the agent ignores SIGTERM, which a script may send to its process group
    dependsOn: [{ containerName: INIT_CONTAINER, condition: "SUCCESS" as const }],
  };
  const services = plan.services.map((service) => {
    const { entrypoint, command } = service.keyword;
    // Without entry point, [""] or [], the command takes its place. ECS has no empty one.
    const start = entrypoint && !given(entrypoint) && given(command);
    return {
      ...define(service),
      ...(start ? { entryPoint: start } : { entryPoint: given(entrypoint), command: given(command) }),
      dependsOn: [{ containerName: CONTAINER, condition: "HEALTHY" as const }],
    };
  });
  return build ? [build, ...services] : services;
}

/** The parts of a described definition that RegisterTaskDefinition takes. */
const REGISTERED = [
  ...["taskRoleArn", "executionRoleArn", "networkMode", "containerDefinitions", "volumes", "cpu", "memory"],
  ...["placementConstraints", "requiresCompatibilities", "pidMode", "ipcMode", "proxyConfiguration"],
  ...["inferenceAccelerators", "ephemeralStorage", "runtimePlatform", "enableFaultInjection"],
] as const;

/**
 * Why a definition cannot be derived from this one; undefined if it can.
 * @throws {Failure} of the job, if it has too many services
 */
function refuseDefinition(base: TaskDefinition, plan: ImagePlan): string | undefined {
  const containers = base.containerDefinitions ?? [];
  const names = containers.map(({ name }) => name);
  const added = [
    ...(plan.build ? [BUILD_CONTAINER, INIT_CONTAINER] : []),
    ...plan.services.map((s) => s.name),
  ];
  const taken = added.filter((name) => names.includes(name));
  if (!names.includes(CONTAINER)) return `it has no container ${CONTAINER}`;
  if (taken.length > 0) return `it has a container ${taken.join(", ")}, the name of one that is added`;
  if (plan.build && base.pidMode) return "it sets pidMode, but the job's container needs process 1";
  const volume = base.volumes?.find(({ name = "" }) => /^fargate-(link|builds|cache)$/.test(name))?.name;
  if (plan.build && volume) return `it has a volume ${volume}, the name of one that is added`;
  const total = names.length + added.length;
  const excess = `${total} containers with those of the job; ECS allows ${MAX_CONTAINERS}`;
  if (total - plan.services.length > MAX_CONTAINERS) return `it has ${excess}`;
  if (total > MAX_CONTAINERS) throw new Failure("build", `services: the task would have ${excess}`);
}

const SHARED = "the containers of a task share one network";
/** Checks what a job asks for against the definition. @throws {Failure} of the job */
function checkPlan(base: TaskDefinition, plan: ImagePlan, sshPort: number): void {
  const { build, services } = plan;
  const available = base.runtimePlatform?.cpuArchitecture === "ARM64" ? "linux/arm64" : "linux/amd64";
  const ports = new Map<number, string>([[sshPort, "the SSH server"]]);
  for (const { name, portMappings = [] } of base.containerDefinitions ?? [])
    for (const { containerPort = 0 } of portMappings)
      if (!ports.has(containerPort)) ports.set(containerPort, `container ${name}`);
  for (const { keyword } of build ? [build, ...services] : services) {
    const platform = keyword.executor_opts?.docker?.platform || available;
    if (platform !== available && platform !== `${available}/v8`)
      throw new Failure("build", `${keyword.name} asks for platform ${platform}; available: ${available}`);
  }
  for (const { keyword } of services)
    for (const port of portsOf(keyword)) {
      const other = ports.get(port);
      const both = `services: ${keyword.name} and ${other} cannot both listen on port ${port}`;
      if (other) throw new Failure("build", `${both}: ${SHARED}`);
      ports.set(port, keyword.name);
    }
}

/**
 * The definition for a job: the configured one, with containers for its image and services. Pure.
 * @param base as DescribeTaskDefinition returned it
 */
function deriveDefinition(
  base: TaskDefinition,
  plan: ImagePlan,
  config: Config,
): RegisterTaskDefinitionCommandInput {
  const containers = base.containerDefinitions ?? [];
  const coordinator = containers.find(({ name }) => name === CONTAINER) as ContainerDefinition;
  const { mounts, added } = jobVolumes(config, coordinator);
  const { image, logConfiguration, mountPoints = [], dependsOn = [], healthCheck } = coordinator;
  const { memory, memoryReservation } = coordinator;
  // Without a size of the task, as on EC2, ECS asks for one of each container.
  const size = base.memory === undefined ? { memory, memoryReservation } : {};
  const init: ContainerDefinition = {
    ...{ name: INIT_CONTAINER, image, logConfiguration, essential: false, user: "0", mountPoints: added },
    ...{ repositoryCredentials: coordinator.repositoryCredentials, ...size },
    entryPoint: ["/bin/sh", "-c"],
    command: [
      openVolumes(added.map(({ containerPath }) => `${containerPath}`).filter((path) => path !== LINK)),
    ],
  };
  const isHeld = plan.services.length > 0;
  const extended: ContainerDefinition = {
    ...coordinator,
    ...(plan.build && {
      mountPoints: [...mountPoints, ...added],
      dependsOn: [...dependsOn, { containerName: INIT_CONTAINER, condition: "SUCCESS" }],
    }),
    ...(isHeld && !healthCheck && { healthCheck: sshHealthCheck(config.SSH.Port) }),
  };
  const names = added.map(({ sourceVolume: name }) => ({ name }));
  const tags = Object.entries(config.Fargate.Tags).map(([key, value]) => ({ key, value }));
  const kept = Object.fromEntries(REGISTERED.map((key) => [key, base[key as keyof TaskDefinition]]));
  const input = {
    ...kept,
    containerDefinitions: [
      ...containers.map((container) => (container === coordinator ? extended : container)),
      ...(plan.build ? [init] : []),
      ...jobContainers(coordinator, plan, mounts, size),
    ],
    volumes: [...(base.volumes ?? []), ...(plan.build ? names : [])],
    ...(tags.length > 0 && { tags }),
  };
  const [, place = "", family = ""] = /^(.*)\/([^:]+)/.exec(base.taskDefinitionArn ?? "") ?? [];
  const hash = sha256(place + canonical(input)).slice(0, 32);
  return { ...input, family: `${family.slice(0, 218)}-job-${hash}` };
}

/**
 * A definition as JSON without what ECS adds to it in answers: defaults, empty values, and the order of keys
 * and of named items. Two definitions with the same text do the same.
 */
function canonical(definition: object): string {
  const isEmpty = (value: unknown) =>
    value === undefined || value === null || (typeof value === "object" && Object.keys(value).length === 0);
  const DEFAULTS: Table = {
    cpu: 0,
    essential: true,
    protocol: "tcp",
    readOnly: false,
    retries: 3,
    timeout: 5,
    interval: 30,
  };
  const normalize = (value: unknown): unknown => {
    if (Array.isArray(value)) {
      const items = value.map(normalize);
      const isNamed = items.every((item) => isTable(item) && typeof item.name === "string");
      return isNamed
        ? items.sort((a, b) => (String((a as Table).name) < String((b as Table).name) ? -1 : 1))
        : items;
    }
    if (!isTable(value)) return value;
    const entries = Object.entries(value)
      .map(([key, item]) => [key, normalize(item)] as const)
      .filter(([key, item]) => !isEmpty(item) && item !== DEFAULTS[key])
      .filter(([key, item]) => !(key === "hostPort" && (item === 0 || item === value.containerPort)));
    return Object.fromEntries(entries.sort(([a], [b]) => (a < b ? -1 : 1)));
  };
  return JSON.stringify(normalize(definition));
}
/** Whether a described definition does the same as what would be registered. */
function isSameDefinition(described: TaskDefinition, input: RegisterTaskDefinitionCommandInput): boolean {
  const pick = (from: object) => Object.fromEntries(REGISTERED.map((key) => [key, (from as Table)[key]]));
  return canonical(pick(described)) === canonical(pick(input));
}

const definitionPath = ({ TaskMetadata }: Config, family: string): string =>
  join(TaskMetadata.Directory, `.definition-${family.slice(-32)}`);

/**
 * Takes the lock of a family, so that identical jobs of a host wait for one registration.
 * @returns a function that releases it; undefined while another live process has it
 */
function lockFamily(path: string, wallTime: number): (() => void) | undefined {
  const lock = `${path}.lock`;
  try {
    fs.writeFileSync(lock, `${process.pid} ${identityOf("self")}`, { flag: "wx", mode: 0o600 });
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code !== "EEXIST") {
      removeQuietly(lock); // it may be there, but empty
      return () => {}; // do without, as on a full disk
    }
    const { mtimeMs = 0 } = fs.lstatSync(lock, { throwIfNoEntry: false }) ?? {};
    const [pid, identity = ""] = readIfPrivate(lock).split(" ");
    const namespace = identity.split(".")[1];
    const isHere = namespace && identityOf("self").endsWith(`.${namespace}`);
    const isDead = isHere
      ? identityOf(Number(pid)) !== identity
      : Math.abs(wallTime - mtimeMs) > LOCK_EXPIRY_MS;
    // Two processes may both find it dead. The second registration does no harm.
    if (isDead && mtimeMs > 0) removeQuietly(lock);
    return undefined;
  }
  const touch = () => {
    try {
      fs.lutimesSync(lock, new Date(), new Date());
    } catch {} // best effort
  };
  const timer = setInterval(touch, LOCK_TOUCH_MS).unref();
  return () => {
    clearInterval(timer);
    removeQuietly(lock);
  };
}

/** The content of a file of this user; "" if there is none. */
function readIfPrivate(path: string): string {
  try {
    return readPrivateFile(path);
  } catch {
    return "";
  }
}

/**
 * The ARN of a definition that does the same as `input`, with its revision: another revision of the family
 * may be anybody's. Looks for it in the directory of records, then at ECS, and registers it if there is none.
 */
async function registerDefinition(
  { config, log, now, wallTime, signal }: Context,
  aws: Aws,
  input: RegisterTaskDefinitionCommandInput,
  until: number,
): Promise<string> {
  const path = definitionPath(config, `${input.family}`);
  const limits = { until, signal };
  const find = async () => {
    const patient = { until: Math.max(until, now() + 5_000), signal }; // `until` is for registering
    const found = await aws.describeTaskDefinition(`${input.family}`, patient);
    return found?.taskDefinitionArn && isSameDefinition(found, input) ? found.taskDefinitionArn : undefined;
  };
  // Register is limited to one call per second for the account, and ECS refuses concurrent ones of a family:
  // after either, another host may have registered it.
  const findOrRegister = async () => (await find()) ?? (await aws.registerTaskDefinition(input, limits));
  for (;;) {
    signal.throwIfAborted();
    // Its whole line: of a cut one, the revision may be another, which may be anybody's.
    const [, known] = new RegExp(`^(arn:\\S+/${input.family}:\\d+)\n$`).exec(readIfPrivate(path)) ?? [];
    if (known) return known;
    const unlock = lockFamily(path, wallTime());
    if (!unlock) {
      if (now() > until)
        throw new Failure("system", `${input.family} was not registered within StartTimeout`);
      await sleep(100 + 100 * Math.random(), signal);
      continue;
    }
    try {
      const minPause = (error: unknown) => (isThrottling(error) ? 1_000 : 0);
      const shouldRetry = (error: unknown) => isRetryable(error) || isThrottling(error);
      const arn = await retry(findOrRegister, { until, now, signal, minPause, shouldRetry });
      try {
        writeDurably(path, `${arn}\n`, fs.renameSync);
      } catch (error) {
        log.debug("{path} cannot be written: {reason}", { path, reason: reasonOf(error) });
      }
      return arn;
    } finally {
      unlock();
    }
  }
}

/** A task with containers of the job: what `startTask` and the later steps of prepare need. */
interface JobTask {
  readonly plan: ImagePlan;
  readonly family: string; // of the derived definition
  readonly overrides: ContainerOverride[]; // variables of the services
  readonly logs: Readonly<Record<string, string>>; // log group and stream of each container, without task id
  readonly knownPorts: ReadonlySet<number>; // of the configured definition's containers
}

/**
 * Prepares the job's `image:` and `services:`: finds or registers the task definition.
 * @returns the context to start the task with: the same if the job uses no keyword
 * @throws {Failure} of the job, if something is not allowed or does not fit
 */
async function prepareImages(context: Context, aws: Aws, until: number): Promise<Context> {
  const { config, log, signal } = context;
  const plan = planImages(context);
  if (!plan) return context;
  for (const [what, why] of plan.unused) log.warn("{what} has no effect: {why}", { what, why });
  const TaskDefinition = plan.taskDefinition ?? config.Fargate.TaskDefinition;
  const mapped: Context = {
    ...context,
    config: { ...config, Fargate: { ...config.Fargate, TaskDefinition } },
  };
  if (!plan.build && plan.services.length === 0) return mapped;
  const base = await aws.describeTaskDefinition(TaskDefinition, { until, signal });
  if (!base)
    throw new Failure("system", `task definition ${TaskDefinition} does not exist`, {
      problem: "definition",
    });
  const refusal = refuseDefinition(base, plan);
  const unusable = `task definition ${TaskDefinition} cannot be extended for this job`;
  if (refusal) throw new Failure("system", `${unusable}: ${refusal}`);
  checkPlan(base, plan, config.SSH.Port);
  const overrides = serviceOverrides(context, plan);
  const input = deriveDefinition(base, plan, mapped.config);
  const taskDefinition = await registerDefinition(mapped, aws, input, until);
  const images = new Set(
    [plan.build, ...plan.services].flatMap((container) => (container ? nameOfImage(container.image) : [])),
  );
  const unused = "ECS pulls them, without the job's registry credentials and DOCKER_AUTH_CONFIG";
  log.info("Images: {images}. {unused}", { images: [...images].join(", "), unused });
  const known = (base.containerDefinitions ?? []).flatMap(({ portMappings = [] }) => portMappings);
  const jobTask: JobTask = {
    ...{ plan, family: `${input.family}`, overrides, logs: logStreams(input) },
    knownPorts: new Set(known.flatMap(({ containerPort }) => containerPort ?? [])),
  };
  const Fargate = { ...mapped.config.Fargate, TaskDefinition: taskDefinition };
  return { ...mapped, config: { ...config, Fargate }, jobTask };
}

/** Problems of an image that its job has chosen. */
const IMAGE_FAULTS: readonly (Problem | undefined)[] = ["pull", "architecture", "command"];

/**
 * Starts the task with the job's containers and waits for a login. If ECS no longer accepts the definition,
 * which another host may have deregistered, registers it once more.
 * @returns `placed`: the context that the task was started with
 */
async function startWithImages(context: Context, aws: Aws, record: TaskRecord, key: KeyPair, begun: number) {
  const until = begun + context.config.Fargate.StartTimeout * 1000;
  let placed = await prepareImages(context, aws, until);
  const { jobTask } = placed;
  try {
    return { ...(await startUntilReady(placed, aws, record, key, begun)), placed };
  } catch (error) {
    const { operation, problem, containers = [] } = causeOf(error);
    const own = [jobTask?.plan.build, ...(jobTask?.plan.services ?? [])].map((container) => container?.name);
    const isOfJob = containers.length > 0 && containers.every((name) => own.includes(name));
    if (isOfJob && IMAGE_FAULTS.includes(problem))
      throw new Failure("build", `an image of this job cannot be used: ${reasonOf(error)}`, causeOf(error));
    const isGone = operation === "ecs:RunTask" && problem === "definition" && !record.Unanswered;
    if (!jobTask || !isGone) throw error;
    context.log.debug("{reason}; registering it again", { reason: reasonOf(error) });
    removeQuietly(definitionPath(context.config, jobTask.family));
    placed = await prepareImages(context, aws, until);
    return { ...(await startUntilReady(placed, aws, record, key, begun)), placed };
  }
}

/** The ports of a service: HEALTHCHECK_TCP_PORT of its own variables, or `ports`. */
function portsOf({ variables, ports }: Keyword): number[] {
  const declared = Number(variables.findLast(({ key }) => key === "HEALTHCHECK_TCP_PORT")?.value);
  const isPort = (port: number) => Number.isInteger(port) && port > 0 && port < 65_536;
  return [
    ...new Set(isPort(declared) ? [declared] : (ports ?? []).map(({ number }) => number).filter(isPort)),
  ];
}

/**
 * The names of the secret variables that a variable of the job is or contains: GitLab expands variables
 * before the runner gets them, and leaves those public that now contain a secret. Short values may be
 * anything.
 */
const secretsIn = (variable: Variable, all: ReadonlyMap<string, Variable>): string[] =>
  [...all.values()]
    .filter(isSecret)
    .filter(({ key, value }) => key === variable.key || (value.length > 7 && variable.value.includes(value)))
    .map(({ key }) => key);

/**
 * Expands `$NAME` and `${NAME}` as GitLab Runner does: an unknown name to nothing, and `$$` to `$`. Cuts
 * values that are far too long for ECS, since a job's variables may contain each other many times.
 * @returns `secrets`: the names of secret variables that the references lead to
 */
function expandVariable({ value, raw }: Variable, all: ReadonlyMap<string, Variable>) {
  const secrets = new Set<string>();
  let used = 0; // references and characters
  const use = (name: string, depth: number): string => {
    const found = all.get(name);
    if (!found || found.file || used > 10 * MAX_OVERRIDES) return "";
    used += 1 + found.value.length;
    for (const key of secretsIn(found, all)) secrets.add(key);
    return found.raw || depth > 10 ? found.value : expand(found.value, depth + 1);
  };
  const expand = (text: string, depth: number): string =>
    text.replace(
      /\$(?:(\$)|(\w+)|\{(\w+)\})/g,
      (_, dollar, plain, braced) => dollar ?? use(plain ?? braced, depth),
    );
  return { value: raw ? value : expand(value, 0), secrets: [...secrets] };
}

/** Variables of GitLab's settings are not public. Those of .gitlab-ci.yml are public, and never masked. */
const isSecret = (variable: Variable): boolean => !variable.public || variable.masked;
const isPredefined = (name: string): boolean => /^(CI|GITLAB|FF)_/.test(name) || name === "CI";
/** Names that the driver or ECS sets. A service must not pass for the task's container. */
const isReserved = (name: string): boolean => /^(FARGATE_|ECS_|AWS_CONTAINER_)|^SSH_PUBLIC_KEY$/.test(name);

/**
 * The variables of each service, as overrides of RunTask: its own, then the job's public ones, then GitLab's
 * predefined ones while there is room. Anybody who may call DescribeTasks can read them, so none contains
 * a secret variable.
 * @throws {Failure} of the job, if the first two groups do not fit, or a service's variable uses a secret
 */
function serviceOverrides({ config: { JobImage, SSH }, log }: Context, plan: ImagePlan): ContainerOverride[] {
  const all = new Map(plan.variables.map((variable) => [variable.key, variable])); // the last one counts
  const expanded = [...all.values()]
    .filter((variable) => !isSecret(variable) && !variable.file && !isReserved(variable.key))
    .map((variable) => {
      const { value, secrets } = expandVariable(variable, all);
      return { name: variable.key, value, isOpen: secrets.length + secretsIn(variable, all).length === 0 };
    });
  const hidden = expanded.filter(({ isOpen }) => !isOpen).map(({ name }) => name);
  const open = expanded.filter(({ isOpen }) => isOpen);
  const ofJob = open.filter(({ name }) => !isPredefined(name));
  const services = plan.services.map(({ name, keyword }) => {
    const environment = new Map(ofJob.map((variable) => [variable.name, variable.value]));
    const own = keyword.variables.map((variable) => ({ ...variable, public: true, masked: false }));
    const visible = new Map([...all, ...own.map((variable) => [variable.key, variable] as const)]);
    for (const variable of own.filter(({ key }) => !isReserved(key))) {
      const { value, secrets: used } = expandVariable(variable, visible);
      const secrets = [...used, ...secretsIn({ ...variable, key: "" }, all)];
      const uses = `services: ${keyword.name}: its variable ${variable.key} contains ${secrets.join(", ")}`;
      const refused = "secret variables are passed to services only with SecretsInServices";
      if (secrets.length > 0 && !JobImage.SecretsInServices)
        throw new Failure("build", `${uses}; ${refused}`);
      environment.set(variable.key, value);
    }
    return { name, environment };
  });
  const overrides = () =>
    services.map(({ name, environment }) => ({
      name,
      environment: [...environment].map(([name, value]) => ({ name, value })),
    }));
  const limit = MAX_OVERRIDES - COORDINATOR_OVERRIDE[SSH.PrivateKeyPath ? "rsa" : SSH.KeyType];
  const size = Buffer.byteLength(JSON.stringify(overrides()));
  const tooLong = `variables of services: take ${size} characters; ECS accepts ${limit} for a task`;
  if (size > limit) throw new Failure("build", tooLong);
  let [left, used] = [0, size];
  for (const { name, value } of open.filter(({ name }) => isPredefined(name))) {
    const missing = services.filter(({ environment }) => !environment.has(name));
    const length = missing.length * (Buffer.byteLength(JSON.stringify({ name, value })) + 1);
    if (used + length > limit) left++;
    else for (const { environment } of missing) environment.set(name, value);
    if (used + length <= limit) used += length;
  }
  if (services.length > 0 && left > 0)
    log.info("{left} predefined variables are not passed to services: ECS limits their length", { left });
  if (services.length > 0 && hidden.length > 0)
    log.info("Not passed to services, since they contain secrets: {names}", { names: hidden.join(", ") });
  return overrides();
}

/** Where the output of each container goes: log group and stream without the task's id, with awslogs. */
function logStreams({
  containerDefinitions = [],
}: RegisterTaskDefinitionCommandInput): Record<string, string> {
  const entries = containerDefinitions.flatMap(({ name = "", logConfiguration: log }) => {
    const { "awslogs-group": group, "awslogs-stream-prefix": prefix } = log?.options ?? {};
    return log?.logDriver === "awslogs" && group ? [[name, `${group} ${prefix}/${name}/`]] : [];
  });
  return Object.fromEntries(entries);
}

/**
 * The first process of the container `build`. It needs sh, cat, sleep and kill. Each script has a directory
 * in the shared volume, named after its mark and its shell, with named pipes: `in` for the script and the
 * mark, `out` and `err` for its output, `exit` for its exit code, `gone` for the end of a cancel. Some rules:
 *  - Workers wait for a line in `calls`; the first to claim a directory serves it. They are parts of a
 *    pipeline, because a shell makes processes in the background ignore SIGINT, which scripts need.
 *  - The first process only restarts workers, and reaps processes. A script cannot end it: a signal without
 *    a handler does nothing to process 1 of a container, and SIGTERM may be meant for a process group.
 *  - The script runs only if its mark has arrived, and starts in the shell that evaluates it.
 *  - The exit code comes after the last filter behind a process substitution, such as `tee`, has ended. If
 *    any other process holds the pipes open, the file `held` tells the relay not to wait for their end.
 *  - A cancel sends SIGTERM to all processes but the workers, and SIGKILL after the grace period.
 */
const AGENT = `
# Runs the scripts of a GitLab CI job, which its container ci-coordinator passes on. Names of variables have
# a prefix, because the image's own environment must reach the scripts.
fargate_link=${LINK}
if [ $$ -ne 1 ]; then
  echo "fargate: the entry point runs this as process $$, not as process 1" >&2
  echo $$ >$fargate_link/refused
  exit 1
fi
# Reads the script up to its mark, then evaluates it in the same shell.
fargate_boot='FARGATE_SCRIPT=$(cat); case $FARGATE_SCRIPT in *"$FARGATE_MARK") ;; *) exit 1;; esac
exec </dev/null; FARGATE_SCRIPT=\${FARGATE_SCRIPT%"$FARGATE_MARK"}; unset FARGATE_MARK
eval "unset FARGATE_SCRIPT; $FARGATE_SCRIPT"'
pause() { sleep 0.1 || { sleep 1; fargate_limit=$((fargate_limit - 9)); }; }
# Whether a process holds the output of call $1 open; with "filter", one that reads from a pipe.
holds() {
  for fargate_p in /proc/[0-9]*; do
    for fargate_f in 1 2; do
      if [ $fargate_p/fd/$fargate_f -ef $1/out ] || [ $fargate_p/fd/$fargate_f -ef $1/err ]; then
        if [ $2 = any ] || [ -p $fargate_p/fd/0 ]; then return 0; fi
      fi
    done
  done
  return 1
}
# Whether there are processes besides this program's own, which hold the pipe "calls".
others() {
  for fargate_p in /proc/[0-9]*; do
    if [ $fargate_p = /proc/1 ] || [ $fargate_p/fd/3 -ef $fargate_link/calls ]; then continue; fi
    if [ -e $fargate_p ]; then return 0; fi
  done
  return 1
}
background() { holds $1 any && ! holds $1 filter; }
# Waits while "$@" holds, for at most $fargate_limit tenths of a second.
wait_while() { while [ $fargate_limit -gt 0 ] && "$@"; do pause; fargate_limit=$((fargate_limit - 1)); done; }
serve() (
  trap : HUP INT QUIT TERM
  exec 4<>$1/exit
  fargate_name=\${1##*/} fargate_shell=\${1##*.}
  (
    # A pipe that is open for both reading and writing does not block here if the relay has gone.
    exec 5<>$1/in 6<>$1/out 7<>$1/err
    exec <$1/in >$1/out 2>$1/err 3>&- 5>&- 6>&- 7>&-
    echo accepted >&4
    exec 4>&-
    export FARGATE_MARK=\${fargate_name%.*}
    exec $fargate_shell -c "$fargate_boot" $fargate_shell
  )
  fargate_code=$? fargate_limit=5
  wait_while background $1 # a filter may have been forked just now, and not have its pipe yet
  fargate_limit=100
  wait_while holds $1 filter
  if holds $1 any; then : >$1/held; fi
  echo $fargate_code >&4
)
cancel() {
  read -r fargate_grace <$1/cancel
  kill -TERM -1
  sleep $fargate_grace & fargate_timer=$!
  while others && kill -0 $fargate_timer; do pause; done
  kill -KILL $fargate_timer
  wait $fargate_timer
  fargate_limit=20
  if others; then
    kill -KILL -1
    wait_while others
    fargate_ended=workers
  fi
  exec 4<>$1/gone
  echo gone >&4
}
claim() { (set -C; : >$1); }
worker() {
  trap : HUP INT QUIT TERM
  fargate_ended=
  while :; do
    for fargate_call in $fargate_link/*.bash $fargate_link/*.sh; do
      if ! [ -p $fargate_call/in ]; then continue; fi
      if [ -e $fargate_call/cancel ]; then
        if claim $fargate_call/cancelled; then cancel $fargate_call; fi
        # SIGKILL has ended the other workers, and a new pipeline replaces all.
        if [ "$fargate_ended" ]; then exit; fi
      elif claim $fargate_call/taken; then serve $fargate_call
      fi
    done
    read -r fargate_line <&3
  done
}
trap : HUP INT QUIT TERM
exec 3<>$fargate_link/calls
while :; do worker | worker | worker | worker; done 2>/dev/null`.trim();

/** The number of bytes to send for a script: in a relay, each quote takes four. */
const lengthToSend = ({ Build }: TaskRecord, script: Buffer): number =>
  (Build ? shellQuote(script) : script).length;
/** Quotes bytes for a POSIX shell. */
const shellQuote = (bytes: Buffer): Buffer =>
  Buffer.from(`'${bytes.toString("latin1").replaceAll("'", "'\\''")}'`, "latin1");

/**
 * The script that passes another script on to the agent, and ends as that one ended. Needs mkfifo.
 *
 * It opens its ends of the pipes before it calls the agent, so that no side blocks on a missing one. It sends
 * the script only after the agent has accepted it: otherwise, a script could run whose relay has given up.
 * When the agent's process ends, the pipe `exit` ends, too. The name of a file then states why there is
 * no exit code, or confirms one other than 0: a renamed pipe, since the disk may be full.
 */
function relayScript(script: Buffer, mark: string, shell: "bash" | "sh", grace: number): Buffer {
  const text = RELAY.replaceAll("@CALL@", `${LINK}/${mark}.${shell}`).replaceAll("@GRACE@", `${grace}`);
  const [before = "", after = ""] = text.split("@SCRIPT@");
  return Buffer.concat([Buffer.from(before), shellQuote(script), Buffer.from(` ${mark}${after}`)]);
}
const RELAY = `
d=@CALL@
umask 0
n=$d.new # the agent must not find a call whose pipes are incomplete
mkdir $n && mkfifo $n/in $n/out $n/err $n/exit $n/gone $n/timer || exit 1
# Both ends of each pipe, until the agent has opened its own; then only the ends to read from.
exec 3<>${LINK}/calls 5<>$n/in 6<>$n/out 7<>$n/err 9<>$n/exit
exec 0<$n/exit 4<$n/out 8<$n/err
mv $n $d || exit 1
(trap "" TERM; exec cat <&4 3>&- 4>&- 5>&- 6>&- 7>&- 8>&- 9>&-) & a=$!
(trap "" TERM; exec cat <&8 >&2 3>&- 4>&- 5>&- 6>&- 7>&- 8>&- 9>&-) & b=$!
cancel() {
  exec 3<>${LINK}/calls 6<>$d/gone
  echo @GRACE@ >$d/grace && mv $d/grace $d/cancel
  echo >&3
  read -r s <&6
}
trap "exit 143" TERM
# bash reports a process that a signal has ended, unless its standard error leads elsewhere meanwhile.
end() { { kill -KILL "$@"; wait "$@"; } 2>/dev/null; }
# The reader of the pipe "timer" continues after $1 seconds. Both processes are known, and leave nothing.
start_timer() { sleep $1 2>/dev/null 4>&- 8>&- 9>&- >$d/timer & z=$!; }
drain() {
  trap : USR1
  start_timer 2
  (read -r s <$d/timer; kill -USR1 $$) >/dev/null 2>&1 4>&- 8>&- 9>&- & t=$!
  wait $a $b
  end $t $z
}
start_timer ${ACCEPT_SECONDS}
(read -r s <$d/timer; echo late >&9) >/dev/null 2>&1 4>&- 5>&- 6>&- 7>&- 8>&- & t=$!
if [ -e ${LINK}/refused ]; then echo refused >&9; else echo >&3; fi
read -r s
end $t $z
if [ "$s" != accepted ]; then
  if [ -e ${LINK}/refused ]; then s=refused; fi
  mv $d/gone $d/failed-$s
  end $a $b
  exit 1
fi
trap cancel TERM
(exec >$d/in 3>&- 5>&- 6>&- 7>&- 9>&-; printf %s%s @SCRIPT@) 2>/dev/null &
exec 3>&- 5>&- 6>&- 7>&- 9>&- 9<&0
# The timer may have ended at the same moment.
(trap "" TERM; while read -r c <&9; do [ "$c" = late ] || exit $c; done; mv $d/gone $d/failed-dead) & e=$!
while wait $e; c=$?; kill -0 $e 2>/dev/null; do :; done
if [ -e $d/failed-dead ]; then drain; exit 1; fi
if [ ! -e $d/held ]; then drain; fi
# Renames it first: a worker must not claim it while its files disappear.
if [ $c = 0 ]; then mv $d $n && rm -rf $n; else mv $d/gone $d/code-$c; fi
exit $c`.trim();

/** late: not sent. refused: the agent is not process 1. dead: the agent's process has ended */
type BuildOutcome = Outcome | { readonly ended: "late" | "refused" | "dead" };
type Sinks = Pick<Context, "signal" | "log"> & OutputSinks;

/** Runs a script in the container `build`, by a relay in the coordinator. @throws {Failure} */
async function callBuild(
  connection: Connection,
  shell: "bash" | "sh",
  script: Buffer,
  shells: Shells,
  context: Sinks,
): Promise<BuildOutcome> {
  const { target } = connection;
  const grace = target.CancelGracePeriod;
  const mark = randomBytes(16).toString("hex");
  // The relay must outlive the script's grace period.
  const own = { ...connection, target: { ...target, CancelGracePeriod: grace + 2, PassEnvironment: [] } };
  const outcome = await runScript(own, relayScript(script, mark, shell, grace), shells, context);
  if (outcome.ended !== "exited" || outcome.code === 0) return outcome;
  const directory = `${LINK}/${mark}.${shell}`;
  const clear = `mv ${directory} ${directory}.new; rm -rf ${directory}.new`;
  const program = `echo ${directory}/code-* ${directory}/failed-*; ${clear}`;
  // An SshFailure would mean that the script has not begun.
  const answer = await runCommand(own, program, context.signal).catch((error) => {
    context.signal.throwIfAborted();
    return reasonOf(error);
  });
  const [, what] = /\/(?:code|failed)-(\w+)/.exec(answer) ?? [];
  if (what === "late" || what === "refused" || what === "dead") return { ended: what };
  if (what === `${outcome.code}`) return outcome;
  const end = `the relay to container ${BUILD_CONTAINER} ended with exit code ${outcome.code}`;
  throw new Failure("system", `${end}, which is not confirmed: ${answer}`);
}

const findContainer = (task: Task | undefined, name: string) =>
  task?.containers?.find((container) => container.name === name);
const hasEnded = (container: Container | undefined): boolean =>
  container?.lastStatus === "STOPPED" || container?.exitCode !== undefined || Boolean(container?.reason);

/** A container's exit code and reason, in ECS's words. */
const explainContainer = ({ exitCode, reason }: Container): string =>
  [exitCode === undefined ? "" : `exit code ${exitCode}`, reason].filter(Boolean).join(", ") ||
  "no exit code";

/** Names that GitLab gives a service: of its image, without port and version, and its aliases. */
function hostNames({ name, alias }: Keyword): string[] {
  const { host, hasHost, path } = splitImage(name);
  const plain = hasHost ? `${host.replace(/:\d+$/, "")}/${path}` : path;
  const names = [plain.replaceAll("/", "__"), plain.replaceAll("/", "-"), ...(alias ?? "").split(/[\s,]+/)];
  return [...new Set(names.filter((name) => /^[\w.-]{1,253}$/.test(name)))];
}

/** Shell code that prints the user's id, and makes names of services resolve if /etc/hosts is writable. */
function greeting(names: readonly string[]): string {
  const hosts = `{ echo "127.0.0.1 ${names.join(" ")}" >>/etc/hosts; } 2>/dev/null || h=no`;
  return [
    "u=0; h=ok; while read -r k v w; do case $k in Uid:) u=$v;; esac; done </proc/self/status;",
    ...(names.length > 0 ? [`${hosts};`] : []),
    'b=sh; command -v bash >/dev/null && b=bash; echo "fargate-hello $u $h $b"',
  ].join(" ");
}
const readGreeting = (output: string) => {
  const [, user, hosts, shell] = /fargate-hello (\d+) (ok|no) (bash|sh)/.exec(output) ?? [];
  return user ? { user: Number(user), canResolve: hosts === "ok", shell: shell as "bash" | "sh" } : undefined;
};

/** git's configuration for containers with different users: it must not refuse the other's directories. */
const GIT_CONFIG = "[include]\\n\\tpath = /etc/gitconfig\\n[safe]\\n\\tdirectory = *\\n";

/**
 * Waits until the container `build` has answered and the services are ready. Completes the record.
 * @throws {Failure} if a container has ended, or there is no answer until StartTimeout
 */
async function joinContainers(
  context: Context,
  aws: Aws,
  record: TaskRecord,
  connection: Connection,
  begun: number,
): Promise<void> {
  const { jobTask, log, signal, config } = context;
  if (!jobTask) return;
  const until = begun + config.Fargate.StartTimeout * 1000;
  const { plan, logs } = jobTask;
  const names = plan.services.flatMap(({ keyword }) => hostNames(keyword)).slice(0, 100);
  const gitConfig = plan.build ? `printf "${GIT_CONFIG}" >${LINK}/gitconfig; ` : "";
  const answer = await runCommand(connection, gitConfig + greeting(names), signal);
  const coordinator = readGreeting(answer);
  if (!coordinator) throw new Failure("system", `${CONTAINER} does not run a short command: ${answer}`);
  const build = plan.build && (await greetBuild(context, aws, record, connection, names, until));
  const unresolved = [
    coordinator.canResolve ? "" : CONTAINER,
    build?.canResolve === false ? BUILD_CONTAINER : "",
  ];
  const where = unresolved.filter(Boolean).join(" and ");
  if (names.length > 0 && where)
    log.warn("in {where}, names of services do not resolve: use localhost (/etc/hosts is not writable)", {
      where,
    });
  if (build) record.Build = { Shell: build.shell, User: build.user, CoordinatorUser: coordinator.user };
  record.Services = plan.services.map(({ name, keyword }) => ({
    ...{ Container: name, Image: keyword.name.slice(0, 300), Log: logs[name] ?? "" },
  }));
  if (plan.services.length > 0) await waitForServices(context, aws, record, connection, until);
}

/** Waits until the agent answers. @throws {Failure} of the job, if its container cannot run it */
async function greetBuild(
  context: Context,
  aws: Aws,
  record: TaskRecord,
  connection: Connection,
  names: readonly string[],
  until: number,
) {
  const { now, signal, log, jobTask } = context;
  const image = jobTask?.plan.build?.keyword.name;
  const script = Buffer.from(`${greeting(names)}\n`);
  const hurried = { ...connection, target: { ...connection.target, CancelGracePeriod: 0 } };
  let isFirst = true;
  const shells: Shells = { interpreter: record.Interpreter, loginShell: record.LoginShell };
  for (;;) {
    const output = collectOutput();
    const outcome = await callBuild(hurried, "sh", script, shells, { ...context, ...output.sinks });
    const answer = outcome.ended === "exited" ? readGreeting(output.text()) : undefined;
    if (answer) return answer;
    if (outcome.ended === "lost") throw new SshFailure("unreachable", outcome.reason);
    const entryPoint = `the entry point of image: ${image} does not end in exec; set entrypoint: [""]`;
    if (outcome.ended === "refused") throw new Failure("build", entryPoint);
    const unusable = `image: ${image} cannot run scripts: it needs sh, cat, sleep and kill: ${output.text()}`;
    if (outcome.ended === "exited") throw new Failure("build", unusable.slice(0, 1_000));
    const task = await aws.describeTask(record.TaskARN, { until, signal });
    if (!task || isEnding(task)) throw stoppedEarly(task ?? {});
    const container = findContainer(task, BUILD_CONTAINER);
    if (container && hasEnded(container)) {
      const text = `the container of image: ${image} has ended: ${explainContainer(container)}`;
      throw new Failure("build", text, recognize("", container.reason));
    }
    const kind = container?.lastStatus === "RUNNING" ? "build" : "system"; // or it runs something else
    if (now() > until)
      throw new Failure(kind, `the container of image: ${image} did not answer within StartTimeout`);
    if (isFirst) log.info("Waiting for the container of image: {image}", { image });
    isFirst = false;
  }
}

/** The ports with a listener, in the text of /proc/net/tcp and tcp6. Pure. */
const listeningPorts = (text: string): Set<number> =>
  new Set([...text.matchAll(/^ *\d+: \S+:([0-9A-F]{4}) \S+ 0A /gm)].map(([, port]) => Number(`0x${port}`)));

const SERVICE_WAIT_MS = 30_000; // how long prepare waits for the ports of services that have started
const SERVICE_POLL_MS = 500;
const HEALTH_LAG_MS = 3_000; // how late DescribeTasks may show a container as HEALTHY

/** Asks ECS about the services. Warns of those that have ended, and no longer waits for them. */
async function pollServices(
  context: Context,
  aws: Aws,
  record: TaskRecord,
  waiting: Map<string, JobContainer>,
  until: number,
): Promise<Task> {
  const { signal, log, jobTask } = context;
  const task = await aws.describeTask(record.TaskARN, { until, signal });
  if (!task || isEnding(task)) throw stoppedEarly(task ?? {});
  const rule = "a health check in its definition, or an SSH server that listens on Port with IPv4 and IPv6";
  if (findContainer(task, CONTAINER)?.healthStatus === "UNHEALTHY")
    throw new Failure("system", `ECS reports ${CONTAINER} as UNHEALTHY: services need ${rule}`, {
      problem: "unhealthy",
    });
  for (const name of warnOfEndedServices(log, record, task)) {
    const { image, keyword } = waiting.get(name) ?? {};
    waiting.delete(name);
    const isSame = (other: JobContainer) =>
      other.name !== name && other.image.repository === image?.repository;
    const twin = jobTask?.plan.services.find(isSame)?.keyword.name;
    if (twin && findContainer(task, name)?.exitCode && keyword && portsOf(keyword).length === 0)
      throw new Failure(
        "build",
        `services: ${keyword.name} and ${twin} cannot both listen on the same port: ${SHARED}`,
      );
  }
  return task;
}

/** Warns of each service that has ended. @returns the names of their containers */
function warnOfEndedServices(log: Logger, { Services = [], TaskARN }: TaskRecord, task: Task): string[] {
  const ended = Services.flatMap((service) => {
    const container = findContainer(task, service.Container);
    return container && hasEnded(container) ? [{ ...service, reason: explainContainer(container) }] : [];
  });
  for (const { Image, Log, reason } of ended) {
    const where = Log ? `; its log: ${Log}${TaskARN.split("/").at(-1)}` : "";
    log.warn("the service {Image} has ended: {reason}{where}", { Image, reason, where });
  }
  return ended.map(({ Container }) => Container);
}

/**
 * Removes the services that listen from those that prepare waits for.
 * @param others the number of open ports that no service has declared
 * @returns how many it has removed
 */
function removeReady(waiting: Map<string, JobContainer>, open: ReadonlySet<number>, others: number): number {
  const silent = [...waiting.values()].filter(({ keyword }) => portsOf(keyword).length === 0).length;
  const ready = [...waiting.values()].filter(({ keyword }) => {
    const own = portsOf(keyword);
    return own.length > 0 ? own.every((port) => open.has(port)) : others >= silent;
  });
  for (const { name } of ready) waiting.delete(name);
  return ready.length;
}

/** Waits until each service listens, or has ended. Warns of those that do not. */
async function waitForServices(
  context: Context,
  aws: Aws,
  record: TaskRecord,
  connection: Connection,
  until: number,
): Promise<void> {
  const { config, log, now, signal, jobTask } = context;
  const waiting = new Map(jobTask?.plan.services.map((service) => [service.name, service]));
  const ports = [...waiting.values()].map(({ keyword }) => portsOf(keyword));
  const known = new Set([config.SSH.Port, ...(jobTask?.knownPorts ?? []), ...ports.flat()]);
  const images = [...waiting.values()].map(({ keyword }) => keyword.name).join(", ");
  log.info("Waiting for services: {images}", { images });
  const begun = now();
  const firstSeen = new Map<number, number>(); // the time of each port's first listener
  let [startedAt, healthyAt, nextPoll, ready] = [Infinity, Infinity, 0, 0];
  while (waiting.size > 0) {
    if (now() >= nextPoll) {
      nextPoll = now() + pollPause(now() - begun, false, Math.random(), aws.throttled);
      const task = await pollServices(context, aws, record, waiting, until);
      if (findContainer(task, CONTAINER)?.healthStatus === "HEALTHY") healthyAt = Math.min(healthyAt, now());
      const all = [...waiting.keys()].map((name) => findContainer(task, name));
      if (all.every((container) => container?.lastStatus === "RUNNING"))
        startedAt = Math.min(startedAt, now());
    }
    const program = "cat /proc/net/tcp /proc/net/tcp6 2>/dev/null";
    // Services that start may slow down the container.
    const patience = { timeoutMs: SERVICE_WAIT_MS };
    const open = listeningPorts(await runCommand(connection, program, signal, patience));
    for (const port of open) firstSeen.set(port, firstSeen.get(port) ?? now());
    // Services start when the coordinator is healthy. Earlier listeners belong to other containers.
    const isOfService = (port: number) => (firstSeen.get(port) ?? 0) > healthyAt - HEALTH_LAG_MS;
    const others = [...open].filter((port) => !known.has(port) && isOfService(port)).length;
    ready += removeReady(waiting, open, others);
    const late = [...waiting.values()].map(({ keyword }) => keyword.name).join(", ");
    if (late && startedAt === Infinity && now() > until)
      throw new Failure("system", `services did not start within StartTimeout: ${late}`, {
        problem: "unhealthy",
      });
    if (late && now() > startedAt + SERVICE_WAIT_MS) {
      const seconds = Math.floor((now() - startedAt) / 1000);
      log.warn("services do not listen after {seconds} s: {late}", { seconds, late });
      return;
    }
    if (waiting.size > 0) await sleep(SERVICE_POLL_MS, signal);
  }
  if (ready > 0)
    log.info("Services are ready ({seconds} s)", { seconds: Math.round((now() - begun) / 1000) });
}

/** Stages whose scripts run in the job's own image. */
const isBuildStage = (stage: string): boolean => /^(build_script|after_script|step_.+)$/.test(stage);

/**
 * A script that leaves its files usable for the other container, if their users differ: with an open umask,
 * git that accepts the other's directories, and at its end the modes of files that have got other ones.
 */
function shareFiles(script: Buffer, { Build }: TaskRecord, { JobImage: f }: Config): Buffer {
  if (!Build || Build.User === Build.CoordinatorUser) return script;
  // Without root, chmod works only for own files; find and chmod may be missing in the job's image.
  const find = `find ${f.BuildsDirectory} ${f.CacheDirectory} ! -type l ! -perm -0666`;
  const atEnd = `trap 'c=$?; ${find} -exec chmod a+rwX {} + 2>/dev/null; exit $c' 0`;
  const git = `export GIT_CONFIG_SYSTEM="\${GIT_CONFIG_SYSTEM:-${LINK}/gitconfig}"`;
  return Buffer.concat([Buffer.from(`umask 0; ${git}; ${atEnd}\n`), script]);
}

/** Runs a stage's script where it belongs. Without containers of the job, in the coordinator as it is. */
async function runJobScript(scriptRun: ScriptRun, connection: Connection): Promise<Outcome> {
  const { context, record, script, stage, shells } = scriptRun;
  const { Build, Services = [] } = record;
  if (!Build && Services.length === 0) return runScript(connection, script, shells, context);
  const shared = shareFiles(script, record, context.config);
  const outcome =
    Build && isBuildStage(stage)
      ? await runInBuild(scriptRun, Build, connection)
      : await runScript(connection, shared, shells, context);
  if (outcome.ended !== "exited" || outcome.code === 0 || Services.length === 0) return outcome;
  const limits = { until: context.now() + 5_000, signal: context.signal };
  const task = await new Aws(record, context).describeTask(record.TaskARN, limits).catch(() => undefined);
  if (task) warnOfEndedServices(context.log, record, task);
  return outcome;
}

const BUILD_END_MS = 5_000; // how long ECS may take to learn of the end of a container
const SECOND_TRY_MS = 5_000; // within which a script that was not accepted is sent again: once

/** Runs a script in the container `build`. If that has ended, the job is at fault: its task still runs. */
async function runInBuild(
  scriptRun: ScriptRun,
  build: NonNullable<TaskRecord["Build"]>,
  connection: Connection,
): Promise<Outcome> {
  const { context, record, script, stage, shells } = scriptRun;
  const { log, now, signal, config } = context;
  const until = now() + SECOND_TRY_MS;
  const shell = interpreterOf(script, build.Shell);
  const text = shareFiles(script, record, config);
  for (;;) {
    const outcome = await callBuild(connection, shell, text, shells, context);
    if (outcome.ended === "lost") return outcome;
    if (outcome.ended === "exited") {
      if (outcome.code !== 137) return outcome;
      const counters = () => readInBuild(scriptRun, connection, MEMORY_COUNTERS);
      await explainKill(context, record, counters, stage);
      return { ...outcome, isExplained: true };
    }
    const container = await findBuildEnd(context, record, outcome.ended === "dead" ? BUILD_END_MS : 0);
    if (container || outcome.ended === "dead") {
      const what = container ? explainContainer(container) : "its processes were killed";
      const end = "the container of image: has ended";
      if (outcome.ended === "dead") log.error(`${end} while {stage} ran: {what}`, { stage, what });
      else log.error(`{stage} did not begin: ${end}: {what}`, { stage, what });
      const advice = recognize("", container?.reason).problem;
      if (advice) log.error("what to do: {advice}", { advice: ADVICE[advice] });
      return { ended: "exited", code: container?.exitCode || 137, isExplained: true };
    }
    if (now() > until)
      throw new Failure(
        "system",
        `${stage} did not begin: the container ${BUILD_CONTAINER} accepts no script`,
      );
    await sleep(1_000, signal);
  }
}

/** The output of a short script in the container `build`; "" if it fails. */
async function readInBuild(
  { context, shells }: ScriptRun,
  connection: Connection,
  program: string,
): Promise<string> {
  const output = collectOutput();
  const own = { ...context, ...output.sinks };
  await callBuild(connection, "sh", Buffer.from(program), shells, own).catch(() => undefined);
  return output.text();
}

/** The container `build`, if ECS knows that it has ended. @throws {Failure} if the whole task has */
async function findBuildEnd(
  context: Context,
  record: TaskRecord,
  patience: number,
): Promise<Container | undefined> {
  const { now, signal } = context;
  const aws = new Aws(record, context);
  for (const begun = now(); ; ) {
    const limits = { until: now() + 3_000, signal };
    const task = await aws.describeTask(record.TaskARN, limits).catch(() => undefined);
    if (task && isEnding(task))
      throw new Failure("system", `the task stopped: ${explainStop(task)}`, stopCause(task));
    const container = task && findContainer(task, BUILD_CONTAINER);
    if (container && hasEnded(container)) return container;
    if (now() > begun + patience - 1_000) return undefined;
    await sleep(1_000, signal);
  }
}

const DEFINITION_AGE = 7 * 86_400; // seconds after which sweep deregisters an unused definition
const MAX_DEREGISTERED = 10; // per sweep: jobs need the same rate to register theirs
const DatesSchema = v.record(v.string(), v.number());

/** When each derived definition was registered, as an earlier sweep has stored it. */
function readDates(path: string): v.InferOutput<typeof DatesSchema> {
  try {
    return readJson(readIfPrivate(path), DatesSchema);
  } catch {
    return {};
  }
}

/** The part of sweep for derived definitions: deregisters old ones that no task of the cluster uses. */
async function sweepDefinitions({
  context,
  aws,
  listed,
  report,
  limits,
  attempt,
  hasDirectory,
}: Sweep): Promise<void> {
  const { JobImage: f, TaskMetadata, Fargate } = context.config;
  if (!report.deregistered) return;
  const bases = [Fargate, ...f.TaskDefinitions].map(({ TaskDefinition: name }) =>
    name.replace(/^.*\//, "").replace(/:\d+$/, "").slice(0, 218),
  );
  const path = join(TaskMetadata.Directory, ".definition-dates");
  await attempt(async () => {
    const all = await aws.listTaskDefinitions(limits());
    const own = all.filter((arn) => {
      const [, family = ""] = /\/([\w-]+):\d+$/.exec(arn) ?? [];
      return DERIVED_FAMILY.test(family) && bases.includes(family.slice(0, -"-job-".length - 32));
    });
    const known = readDates(path);
    const dates: Record<string, number> = {};
    for (const arn of own) {
      const date = async () => (await aws.describeTaskDefinition(arn, limits()))?.registeredAt;
      dates[arn] = known[arn] ?? ((await date()) ?? new Date(context.wallTime())).getTime() / 1000;
    }
    const isUsed = (arn: string) => listed.some((task) => task.taskDefinitionArn === arn && !isEnding(task));
    const limit = context.wallTime() / 1000 - DEFINITION_AGE;
    const old = own.filter((arn) => (dates[arn] ?? Infinity) < limit && !isUsed(arn));
    for (const arn of old.slice(0, MAX_DEREGISTERED)) {
      if (!report.dryRun) await aws.deregisterTaskDefinition(arn, limits());
      report.deregistered?.push(arn);
      delete dates[arn];
      const [, family = ""] = /\/([\w-]+):\d+$/.exec(arn) ?? [];
      if (!report.dryRun) removeQuietly(definitionPath(context.config, family));
    }
    if (hasDirectory && !report.dryRun) writeDurably(path, JSON.stringify(dates), fs.renameSync);
  });
}

// 13. Command line --------------------------------------------------------------------------------------
// Parses the arguments, builds a command's context, and turns its result into an exit code. Uses all sections
// above. Must not decide anything about a task. Only this section passes process.env on and handles signals.

/** Turns a command's errors into one-line Failures that name the error and the valid choices. */
const withErrors = (command: Command): Command =>
  command.exitOverride((error) => {
    if (error.exitCode === 0) throw error; // it has printed the help or the version
    let root = command;
    let path = command.name();
    for (; root.parent; root = root.parent) path = `${root.parent.name()} ${path}`;
    // If a command is missing, commander has printed the help to standard error.
    const message = error.code === "commander.help" ? "no command was given" : error.message;
    const what = `${path}: ${message.replace(/^error: /, "").replace(/\.$/, "")}`;
    if (error.code === "commander.invalidArgument")
      throw new Failure("system", what.replace(". expected: ", "; expected: ")); // of `accept`
    const commands = command.commands.map((command) => command.name()).join(", ");
    const options = [...new Set([...root.options, ...command.options])]
      .map((option) => option.long)
      .join(", ");
    const isOption = /option/i.test(error.code);
    const others = command.registeredArguments.some(({ variadic }) => variadic)
      ? "; write -- before the options of another program"
      : "";
    const hint = isOption ? `options: ${options}${others}` : commands ? `commands: ${commands}` : "";
    throw new Failure("system", `${what}; ${hint ? `valid ${hint}` : `usage: ${path} ${command.usage()}`}`);
  });

const GENERAL_HELP = `
Options may appear before or after the command. They override the job's
variables; variables override the configuration file.

Variables: AWS_*, as for the AWS SDKs; HTTPS_PROXY, HTTP_PROXY, NO_PROXY.

Exit codes:
  0    success
  1    the job is at fault; or doctor has found something wrong
  2    any other failure
  255  shell could not log in, or lost the connection
Otherwise, shell and manager end with the exit code of what they run.`;

const STAGE_HELP = `
GitLab Runner calls these for each job. They need JOB_RESPONSE_FILE, or the
variables CUSTOM_ENV_CI_*.

Exit codes: BUILD_FAILURE_EXIT_CODE (default 1) if the job is at fault, else
SYSTEM_FAILURE_EXIT_CODE (default 2).`;

const DOCTOR_HELP = `
Without --run, it changes nothing. What it cannot check is "unknown".

Exit codes: 0 if nothing is wrong, 1 if something is, 2 if it is interrupted.`;

const TASKS_HELP = `
JOB and PROJECT are GitLab's ids. After its DEADLINE, sweep stops a task. What
is unknown is "-".`;

const SHELL_HELP = `
Examples:
  fargate shell 4711
  fargate shell 4711 -- ps -ef
  fargate shell 4711 -- 'ps -ef | grep node'

A command gets empty standard input. In a login, ~. at the beginning of a line
leaves one that no longer answers.

Exit codes: that of the login shell or the command; 255 if there is no login,
or if the connection is lost.`;

const SWEEP_HELP = `
Exit codes: 0, or 2 if there was a problem, which is also on standard error.`;

const FLEET_VARIABLES = `
Variables, which docs/manager.md explains:
  MANAGERS_CONFIGS              the managers, as a JSON list or object
  GITLAB_RUNNER_TOKEN_<NAME>    the authentication token of a manager's runner
  GITLAB_RUNNER_TOKEN           the same, if there is one manager
  GITLAB_REGISTRATION_TOKEN     registers a runner for each manager
  RUNNER_TOKENS_FILE            a list of tokens: TOKEN or NAME TOKEN
  DRIVER_SETTINGS               other settings of the driver, as a JSON object
  RUNNER_NAME_PREFIX, RUNNER_CONCURRENCY, SHUTDOWN_TIMEOUT, CONFIG_FILE,
  GITLAB_URL, CA_CERTIFICATES_PATH; for a cache in S3: CACHE_S3_BUCKET_NAME,
  CACHE_S3_BUCKET_LOCATION, CACHE_S3_SERVER_ADDRESS; for manager: STOP_TIMEOUT,
  SWEEP_INTERVAL
  FARGATE_CLUSTER and so on     a single manager, without MANAGERS_CONFIGS
`;

const RUNNERS_HELP = `${FLEET_VARIABLES}
Exit codes: 0, or 2 if there was a problem.`;

const MANAGER_HELP = `${FLEET_VARIABLES}
Exit codes: 0 after a signal; that of gitlab-runner, or 1 in place of 0, if it
has ended by itself; 2 if it could not be started.`;

const INIT_HELP = `
Variables with the same effect, which options override:
  FARGATE_CLUSTER, FARGATE_REGION (or AWS_REGION), FARGATE_SUBNET,
  FARGATE_SECURITY_GROUP, FARGATE_TASK_DEFINITION, FARGATE_SSH_USER
For the runner's section: GITLAB_URL

Example:
  fargate --config /etc/gitlab-runner/fargate.toml init --cluster test-cluster \\
    --region us-east-2 --subnet subnet-0a1b2c3d --security-group sg-0a1b2c3d \\
    --task-def test-task --ssh-user root --set Fargate.LaunchType=FARGATE

The file is fargate.toml, or that of --config. No file is overwritten. The
runner's section of GitLab Runner's config.toml goes to standard output.`;

type Commander = typeof import("commander");

/** Functions that accept an option's value, or throw an error with the valid ones. */
function validators({ InvalidArgumentError }: Commander) {
  const accept = (expected: string, isValid: (value: string) => boolean) => (value: string) => {
    if (isValid(value)) return value;
    throw new InvalidArgumentError(`expected: ${expected}`);
  };
  const managerIds = "12 or 32 hex digits, as in a task's startedBy: fargate-<id>-<job>";
  return {
    oneOfWords: (words: readonly string[]) =>
      accept(words.join(", "), (value) => words.includes(value.trim().toLowerCase())),
    managerId: accept(managerIds, (id) => MANAGER_ID.test(id)),
    jobId: accept("a job's id, or the 32 hex digits of a task", (id) => /^(\d{1,19}|[0-9a-f]{32})$/.test(id)),
  };
}

const [width, colours] = [() => 80, () => false];
/** The format of a help. commander would ask process.stdout, which takes some 5 ms to load, measured. */
const PLAIN = {
  getOutHelpWidth: width,
  getErrHelpWidth: width,
  getOutHasColors: colours,
  getErrHasColors: colours,
};

/** The commands and options of the program. `choose` is called with the command that the arguments name. */
function defineProgram(commander: Commander, choose: (command: Command) => void): Command {
  const { oneOfWords } = validators(commander);
  const program = withErrors(new commander.Command("fargate"))
    .description("Runs each GitLab CI job in its own AWS ECS task on Fargate.")
    .version(`fargate ${VERSION}`, "-v, --version", "print the version")
    .helpOption("-h, --help", "print this help")
    .option("--config <path>", "the configuration file", "config.toml")
    .option("--debug", "same as --log-level debug")
    .option("--log-level <level>", `LogLevel: ${LEVELS.join(", ")}`, oneOfWords(LEVELS))
    .option("--log-format <format>", `LogFormat: ${FORMATS.join(", ")}`, oneOfWords(FORMATS))
    .option("--log-file <path>", "LogFile: log to this file instead of standard error")
    .option("--task-def <definition>", "TaskDefinition: family, family:revision or ARN")
    .option("--platform-version <version>", "PlatformVersion: such as 1.4.0 or LATEST")
    .addHelpText("after", GENERAL_HELP)
    .helpCommand("help [command]", "print the help of a command")
    .configureHelp({ showGlobalOptions: true })
    .configureOutput({ writeOut: (text) => writeWhole(1, text), writeErr: (text) => writeWhole(2, text) })
    .configureOutput({ outputError: () => {}, ...PLAIN })
    .showSuggestionAfterError(false);
  const add = (parent: Command, name: string, description: string) =>
    withErrors(parent.command(name).description(description)).action((...args) => choose(args.at(-1)));
  const custom = withErrors(program.command("custom").alias("c"));
  custom
    .description("the stages of GitLab Runner's Custom executor")
    .addHelpText("after", STAGE_HELP)
    .helpCommand("help [command]", "print the help of a stage");
  add(custom, "config", "print the driver's name and version for the runner, as JSON").alias("co");
  add(custom, "prepare", "start the job's task and wait until it is usable").alias("p");
  add(custom, "run", "run a script in the job's task")
    .alias("r")
    .argument("<script>", "the script's path")
    .argument("<stage>", "the runner's name for the script, such as build_script");
  add(custom, "cleanup", "stop the job's task").alias("cl");
  addOperatorCommands(program, add, commander);
  add(program, "runners", "register many runners, and write GitLab Runner's configuration")
    .option("--managers <file>", "MANAGERS_CONFIGS: managers as JSON; - for standard input")
    .option("--tokens <file>", "runner tokens, one per line; - for standard input")
    .option("--url <url>", "GITLAB_URL: the address of GitLab")
    .option("--runner-config <file>", "CONFIG_FILE: GitLab Runner's configuration file")
    .addHelpText("after", RUNNERS_HELP);
  add(program, "manager", "run GitLab Runner in a container: register, sweep, unregister")
    .argument("[arguments...]", "of gitlab-runner, after --; default: run")
    .addHelpText("after", MANAGER_HELP);
  return program;
}

/** The commands that operators use besides those for fleets. */
function addOperatorCommands(
  program: Command,
  add: (parent: Command, name: string, description: string) => Command,
  commander: Commander,
): void {
  const { managerId, jobId } = validators(commander);
  const collect = (value: string, before: readonly string[] = []) => [...before, value];
  add(program, "init", "write a configuration file with every setting")
    .option("--cluster <name>", "Cluster")
    .option("--region <region>", "Region")
    .option("--subnet <id>", "Subnet")
    .option("--security-group <id>", "SecurityGroup")
    .option("--ssh-user <name>", "Username")
    .option("--set <setting=value>", "any setting, such as SSH.Port=2222; may be repeated", collect)
    .addHelpText("after", INIT_HELP);
  add(program, "doctor", "check the installation: settings, AWS, the runner, this host")
    .option("--run", "also start a task, log in, and stop it")
    .option("--json", "print one JSON object")
    .option("--runner-config <file>", "CONFIG_FILE: GitLab Runner's configuration file")
    .addHelpText("after", DOCTOR_HELP);
  add(program, "tasks", "show the running tasks of this host's jobs")
    .option("--all", "show the tasks of all managers on the cluster")
    .option("--json", "print one JSON object")
    .addHelpText("after", TASKS_HELP);
  add(program, "shell", "log in to a running job's task, or run a command there")
    .argument("<job>", "GitLab's job id, or the id of a task", jobId)
    .argument("[command...]", "after --; without it, a login on a terminal")
    .addHelpText("after", SHELL_HELP);
  add(program, "sweep", "stop orphaned tasks; for cron or a systemd timer")
    .option("--dry-run", "only print what would be done")
    .option("--json", "print one JSON object")
    .option("--manager <id>", "also stop orphaned tasks of this manager, whose host is gone", managerId)
    .addHelpText("after", SWEEP_HELP);
}

/** Arguments, parsed. */
interface Invocation {
  readonly command: StageName | "runners" | "manager" | "init" | "doctor" | "sweep" | "tasks" | "shell";
  readonly operands: readonly string[];
  readonly config: string; // the configuration file's path
  readonly options: Options;
  readonly flags?: Flags; // the command's own options
}
type StageName = "config" | "prepare" | "run" | "cleanup";
type Flags = Partial<SweepOptions & RunnersOptions & InitOptions & DoctorOptions & TasksOptions>;

const OPERANDS: Record<string, number> = { config: 0, prepare: 0, run: 2, cleanup: 0 };
/**
 * Parses `[--config PATH] custom STAGE ...`, as GitLab Runner calls a stage. Loading commander and defining
 * the program would take longer than the start of bun.
 * @returns undefined for any other arguments
 */
function parseStage(argv: readonly string[]): Invocation | undefined {
  const hasConfig = argv[0] === "--config";
  const words = argv.slice(hasConfig ? 1 : 0);
  const config = hasConfig ? words.shift() : "config.toml";
  const [custom, command = "", ...operands] = words;
  const isStage = custom === "custom" && Object.hasOwn(OPERANDS, command);
  if (!isStage || operands.length !== OPERANDS[command]) return undefined;
  if (!config || [config, ...operands].some((word) => word.startsWith("-"))) return undefined;
  return { command: command as Invocation["command"], operands, config, options: {} };
}

/** Parses any arguments. @returns undefined if it has printed the help or the version */
function parseCommandLine(argv: readonly string[], commander: Commander): Invocation | undefined {
  let chosen = new commander.Command();
  const program = defineProgram(commander, (command) => {
    chosen = command;
  });
  try {
    program.parse(argv, { from: "user" });
  } catch (error) {
    if (!(error instanceof commander.CommanderError)) throw error;
    return undefined;
  }
  const command = chosen.name() as Invocation["command"];
  const { config = "", debug, ...flags } = program.opts<Record<string, string | undefined>>();
  const options: Options = {
    LogLevel: debug ? "debug" : flags.logLevel,
    LogFormat: flags.logFormat,
    LogFile: flags.logFile,
    TaskDefinition: flags.taskDef,
    PlatformVersion: flags.platformVersion,
  };
  const isNamed = program.getOptionValueSource("config") === "cli";
  const path = command === "init" && !isNamed ? "fargate.toml" : config;
  const own = chosen.opts<Flags>();
  const parsed = { command, operands: chosen.args, config: path, options };
  return Object.keys(own).length > 0 ? { ...parsed, flags: own } : parsed;
}

/** Runs one invocation. @returns the process's exit code */
async function main(argv: readonly string[], env: Environment): Promise<number> {
  let log = openLog({ LogLevel: "info", LogFormat: "text", LogFile: "" });
  const controller = new AbortController();
  const abort = (why: string) => controller.abort(new Failure("system", why));
  for (const name of ["SIGTERM", "SIGINT", "SIGHUP"]) process.on(name, () => abort(`stopped by ${name}`));
  const quit = new AbortController(); // of manager; stages ignore SIGQUIT, which systemd also sends to them
  process.on("SIGQUIT", () => quit.abort());
  const crash = (error: unknown) => {
    // bun would exit with 1, which the runner would report as the job's own failure.
    log.fatal("{reason}", { reason: `a bug in the driver: ${reasonOf(error)}` });
    log.debug("{stack}", { stack: error instanceof Error ? error.stack : undefined });
    process.exit(exitCode("system", env));
  };
  process.on("uncaughtException", crash).on("unhandledRejection", crash);
  let invocation: Invocation | undefined;
  try {
    invocation = parseStage(argv) ?? parseCommandLine(argv, await import("commander"));
    if (!invocation) return 0;
    if (invocation.command === "config") {
      const job = readJob(env);
      writeWhole(1, `${configAnswer(job, hostname(), readDirectories(invocation, job, env))}\n`);
      return 0;
    }
    const { command, options } = invocation;
    if (Object.hasOwn(OUTSIDE_COMMANDS, command)) {
      log = openLog(v.parse(LogSchema, options));
      const outside = { log, signal: controller.signal, env };
      const run = OUTSIDE_COMMANDS[command as keyof typeof OUTSIDE_COMMANDS];
      return await run(invocation, outside, quit.signal);
    }
    const read = readSettings(invocation, env);
    const isForOperator = command === "tasks" || command === "shell"; // who reads standard error
    log = openLog(isForOperator ? { ...read.config, LogFile: options.LogFile ?? "" } : read.config);
    const now = () => Math.floor(performance.now());
    const { signal } = controller;
    const context: BaseContext = { config: read.config, log, signal, now, wallTime: Date.now, env };
    const runCommand = Object.hasOwn(OPERATOR_COMMANDS, command)
      ? OPERATOR_COMMANDS[command as keyof typeof OPERATOR_COMMANDS]
      : runStage;
    return await runCommand(context, invocation, read, abort);
  } catch (error) {
    const failure = error instanceof Failure ? error : new Failure("system", reasonOf(error));
    const advice = adviceFor(failure.cause);
    const lines = [...failure.message.split("\n"), ...(advice ? [`what to do: ${advice}`] : [])];
    for (const line of lines) log.fatal(line);
    log.debug("{stack}", { stack: error instanceof Error ? error.stack : undefined });
    // As with ssh, a failure must not look like one of the command.
    return invocation?.command === "shell" ? SHELL_FAILED : exitCode(failure.kind, env);
  }
}

const SHELL_FAILED = 255;

/** Reads the configuration file. @throws {Failure} */
function readSettings({ config, options }: Invocation, env: Environment): ReturnType<typeof readConfig> {
  const path = resolve(config);
  const file = readFile(path, `the configuration file ${path}`, "noSettings");
  return readConfig(file.toString(), config, options, env);
}

/** builds_dir and cache_dir of a job with its own image. Any problem is left to prepare, which reports it. */
function readDirectories({ config: path, options }: Invocation, job: Job | undefined, env: Environment) {
  try {
    const file = job?.imageNames?.length ? fs.readFileSync(path, "utf8") : "";
    // Without the table, this stage needs no setting.
    return job && /jobimage/i.test(file)
      ? imageDirectories({ ...readConfig(file, path, options, env), job, env })
      : undefined;
  } catch {
    return undefined;
  }
}

const rejectWhenAborted = (signal: AbortSignal): Promise<never> =>
  new Promise((_, reject) => signal.addEventListener("abort", () => reject(signal.reason)));

type Outside = Pick<FleetContext, "log" | "signal" | "env">;
const fleetContext = ({ config }: Invocation, outside: Outside): FleetContext => ({
  ...outside,
  now: () => Math.floor(performance.now()),
  wallTime: Date.now,
  program: typeof BUILD === "string" ? process.execPath : import.meta.path,
  driverFile: resolve(config),
  readInput: () => Promise.race([Bun.stdin.text(), rejectWhenAborted(outside.signal)]),
});

/** The `init` command. @returns the exit code */
async function runInit(invocation: Invocation, outside: Outside): Promise<number> {
  const { options, flags = {} } = invocation;
  await init(fleetContext(invocation, outside), flags, options, (text) => writeWhole(1, text));
  return 0;
}

/** The `runners` and `manager` commands. @returns the exit code */
async function runFleet(invocation: Invocation, outside: Outside, quit: AbortSignal): Promise<number> {
  const { command, operands, flags: runners = {} } = invocation;
  const context = fleetContext(invocation, outside);
  const { log, env } = context;
  const fleet = await planFleet(context, runners);
  const named = fleet.runners.filter(({ isRegistration, tags }) => !isRegistration && tags.length > 0);
  const names = named.map(({ name }) => name).join(", ");
  if (names) log.warn("the tags of {names} are ignored: GitLab uses those that are set there", { names });
  if (command === "manager") return manage(context, fleet, operands.length > 0 ? operands : ["run"], quit);
  const { added, present, problems } = await configureRunners(context, fleet);
  for (const reason of problems) log.fatal("{reason}", { reason });
  const counts = `${countOf(added.length, "runner")} added, ${present.length} already there`;
  const fields = { path: fleet.configFile, counts, problems: countOf(problems.length, "problem") };
  log.info("{path}: {counts}, {problems}", fields);
  return problems.length > 0 ? exitCode("system", env) : 0;
}

/** The commands that need no valid configuration file. */
const OUTSIDE_COMMANDS = { runners: runFleet, manager: runFleet, init: runInit, doctor: runDoctor };
/** The commands that need one, besides the stages. */
const OPERATOR_COMMANDS = { sweep: runSweep, tasks: runTasks, shell: runShell };

/** The `sweep` command. @returns the exit code */
async function runSweep(base: BaseContext, { flags }: Invocation): Promise<number> {
  // Without a terminal, only problems go to standard error: cron would mail anything else.
  const { isatty } = await import("node:tty");
  const progress = makeProgress(isatty(2), base.log.debug);
  const context = { ...base, log: loggerBeside(progress, base.log) };
  const options = { dryRun: false, json: false, ...flags, progress: progress.step };
  const report = await sweep(context, options).finally(progress.end);
  writeWhole(1, formatSweep(report, options.json));
  for (const reason of report.problems) context.log.fatal("{reason}", { reason });
  return report.problems.length > 0 ? exitCode("system", context.env) : 0;
}

/** The `doctor` command. @returns the exit code: 1 if something is wrong */
async function runDoctor(invocation: Invocation, { log, signal, env }: Outside): Promise<number> {
  const { isatty } = await import("node:tty");
  const { run = false, json = false, runnerConfig } = invocation.flags ?? {};
  const progress = makeProgress(isatty(2), run ? log.info : log.debug);
  const examine = async () => {
    let read: ReturnType<typeof readSettings>;
    try {
      read = readSettings(invocation, env);
    } catch (error) {
      return brokenSettings(error);
    }
    const { config, warnings } = read;
    const now = () => Math.floor(performance.now());
    const base = { config, log: loggerBeside(progress, log), signal, now, wallTime: Date.now, env };
    const files = { driverFile: resolve(invocation.config), runnerConfig };
    return doctor(base, files, { run, warnings, step: progress.step });
  };
  const findings = await examine().finally(progress.end);
  writeWhole(1, formatFindings(findings, json));
  return findings.some(({ result }) => result === "wrong") ? 1 : 0;
}

/** The `tasks` command. @returns the exit code */
async function runTasks(context: BaseContext, { flags }: Invocation): Promise<number> {
  const { all = false, json = false } = flags ?? {};
  const tasks = await listRunningTasks(context, all);
  writeWhole(1, formatTasks(tasks, json, context.wallTime() / 1000));
  return 0;
}

/** The `shell` command. @returns the exit code */
async function runShell(
  context: BaseContext,
  { operands }: Invocation,
  _: ReturnType<typeof readConfig>,
  abort: (why: string) => void,
): Promise<number> {
  const sinks = openSinks(abort, "the output");
  const { isatty } = await import("node:tty");
  const hasTerminal = isatty(0) && isatty(1);
  const open = () => ({ input: process.stdin, output: process.stdout, type: context.env.TERM || "xterm" });
  return shell({ ...context, ...sinks }, operands, hasTerminal ? open() : undefined);
}

/**
 * Opens standard output or standard error for the output of a script. Loading process.stdout would take about
 * 10 ms more, measured.
 */
function openSink(file: Bun.BunFile, onError: (error: unknown) => void): OutputSink {
  const writer = file.writer();
  return {
    async write(part, done) {
      try {
        await writer.write(part); // its promise rejects if there is no reader
        await writer.flush(); // until the kernel has taken all of it, or there is no reader
      } catch (error) {
        onError(error);
      }
      done();
    },
  };
}

/** The sinks for a script's output. @param what names it, if it cannot be written */
function openSinks(abort: (why: string) => void, what: string): OutputSinks {
  const onError = (error: unknown) => abort(`${what} cannot be written: ${reasonOf(error)}`);
  return { stdout: openSink(Bun.stdout, onError), stderr: openSink(Bun.stderr, onError) };
}

/** Runs a stage that works on a task: prepare, run or cleanup. @returns the exit code */
async function runStage(
  base: BaseContext,
  { command, operands }: Invocation,
  { jobOverrides, refusal, warnings }: ReturnType<typeof readConfig>,
  abort: (why: string) => void,
): Promise<number> {
  const job = readJob(base.env);
  if (command === "prepare") for (const warning of warnings) base.log.warn("{warning}", { warning });
  const noJob = "there is no job: neither JOB_RESPONSE_FILE nor the CUSTOM_ENV_CI_* variables are set";
  if (!job) throw new Failure("system", noJob);
  const context: Context = { ...base, job, jobOverrides, refusal };
  const parent = process.ppid; // without it, nobody reads this stage's result or continues the job
  const checkParent = () => process.ppid !== parent && abort("the process that started this stage has ended");
  if (command !== "cleanup") setInterval(checkParent, LOCK_TOUCH_MS).unref();
  if (command === "run") {
    const sinks = openSinks(abort, "the job's output");
    return run({ ...context, ...sinks }, ...(operands as [string, string]));
  }
  await (command === "prepare" ? prepare(context) : cleanup(context));
  return 0;
}

if (import.meta.main) {
  // Without --no-env-file and --config, bun has already applied .env and bunfig.toml of the working
  // directory, and a checkout there could redirect signed requests. The compiled program reads neither.
  const isSafe = typeof BUILD === "string" || process.execArgv.includes("--no-env-file");
  const found = isSafe
    ? []
    : fs.readdirSync(".").filter((name) => /^(\.env(\..*)?|\.?bunfig\.toml)$/.test(name));
  if (found.length > 0) {
    const call = `bun --no-env-file --config=/dev/null ${process.argv[1]}`;
    writeWhole(
      2,
      `error: bun reads settings from ${printable(found.join(", "))} here; run this instead: ${call}\n`,
    );
    process.exit(exitCode("system", process.env));
  }
  main(process.argv.slice(2), process.env).then((code) => process.exit(code));
}

// Exports for tests and fixtures only.
export type {
  Cause,
  Config,
  Connection,
  Context,
  Job,
  LogRecord,
  Outcome,
  Problem,
  SshTarget,
  SweepReport,
  TaskRecord,
};
export {
  AGENT,
  Aws,
  adviceFor,
  awsFailure,
  CONTAINER,
  COORDINATOR_OVERRIDE,
  ConfigSchema,
  callBuild,
  canonical,
  checkPlan,
  cleanup,
  configAnswer,
  connect,
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
  InspectorAws,
  imageDirectories,
  initialSettings,
  interfaceOf,
  interpreterOf,
  isSameDefinition,
  judgeTask,
  keyPairOf,
  listeningPorts,
  makeKeyPair,
  makeLogger,
  managerId,
  matchesImage,
  openVolumes,
  Preamble,
  parseCommandLine,
  parseImage,
  parseImagePattern,
  parseStage,
  planImages,
  pollPause,
  portsOf,
  prepare,
  prepareImages,
  readConfig,
  readJob,
  readLocks,
  readRecord,
  recognize,
  refuseDefinition,
  registerDefinition,
  relayScript,
  remoteProgram,
  retry,
  run,
  runScript,
  runTaskInput,
  salvageRecord,
  serviceOverrides,
  shareFiles,
  sshHealthCheck,
  startRetryPause,
  stopCause,
  sweep,
  unusedVariables,
  writeRecord,
};
