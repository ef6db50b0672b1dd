#!/usr/bin/env -S bun --no-env-file --config=/dev/null --use-system-ca
/**
 * fargate: runs each GitLab CI job in an AWS ECS task of its own on Fargate.
 *
 * GitLab Runner's Custom executor starts this program once per stage of a job; an operator or a timer runs the sweep:
 *
 *     fargate custom config                prints who the driver is, as JSON
 *     fargate custom prepare               starts the job's task, waits until a login by SSH works
 *     fargate custom run SCRIPT STAGE      runs one script in the task; many times a job
 *     fargate custom cleanup               stops the task
 *     fargate sweep                        stops tasks that nobody will stop any more
 *
 * AWS calls      RunTask, DescribeTasks, StopTask; ListTasks to sweep, and when a record is missing or names no task;
 *                EC2 DescribeNetworkInterfaces only to connect to public addresses. Nothing else.
 * Files          reads the configuration file, JOB_RESPONSE_FILE, the stage's script, PrivateKeyPath, AWS_CA_BUNDLE,
 *                and two time limits of the runner's config.toml;
 *                writes <Directory>/<stem>.json (0600, one for each running job), <Directory>/.manager-id,
 *                <Directory>/<stem>.*.lock (empty, by each process of the job), BUILD_EXIT_CODE_FILE, LogFile.
 * Secrets        the job's private key: in memory and in the record. AWS credentials: in memory of the AWS
 *                SDK only, never written, never sent to a task. Stage scripts hold the job's secrets: they
 *                pass through memory into SSH and are never parsed, logged or stored.
 * Trusted        the configuration file, the runner and its JOB_RESPONSE_FILE (ids, not the author's words),
 *                ECS. Not trusted: CUSTOM_ENV_* variables, and whatever a job's container sends.
 *
 * The sections follow the life of a job; each can be read without those below it.
 */

import { createHash, generateKeyPairSync, randomBytes, randomUUID, X509Certificate } from "node:crypto";
import * as fs from "node:fs";
import type { Socket } from "node:net";
import { hostname, constants as osConstants, uptime } from "node:os";
import { basename, dirname, join, resolve } from "node:path";
import type { Readable, Writable } from "node:stream";
import { setTimeout as delay } from "node:timers/promises";
import type { EC2 } from "@aws-sdk/client-ec2";
import type { ECS, RunTaskCommandInput, Task } from "@aws-sdk/client-ecs";
import { configureSync, getLogger, type Logger, type LogLevel, type LogRecord } from "@logtape/logtape";
import { Command, CommanderError, InvalidArgumentError } from "commander";
import { distance } from "fastest-levenshtein";
import { parse as parseToml, TomlError } from "smol-toml";
import type { Client, ClientChannel, ConnectConfig } from "ssh2";
import * as v from "valibot";

declare const BUILD: string | undefined; // set by the build: version (commit)
export const VERSION = typeof BUILD === "string" ? BUILD : "dev (HEAD)";
export type Environment = Readonly<Record<string, string | undefined>>;

// 2. Failures ---------------------------------------------------------------------------------------------

/** Control and format characters (direction, joining, tags), line ends, lone surrogates and private-use characters. */
const UNPRINTABLE = /[\p{Cc}\p{Cf}\p{Co}\p{Cs}\p{Zl}\p{Zp}]/gu;
const escaped = (character: string) =>
  character.replace(/[\s\S]/g, (unit) => `\\u${unit.charCodeAt(0).toString(16).padStart(4, "0")}`);
const MAX_TEXT_LENGTH = 4_000; // characters

/** Escapes and shortens text from outside: it must not end a log line, forge another or control a terminal. */
export function printable(value: unknown): string {
  const text = String(value);
  const line = text.slice(0, MAX_TEXT_LENGTH).replaceAll("\n", " | ").replace(UNPRINTABLE, escaped);
  return text.length > MAX_TEXT_LENGTH ? `${line}...` : line;
}

/** What decisions depend on: set where the failure is first seen, never derived from our own text. */
export interface Cause {
  readonly problem?: Problem | undefined; // selects the advice
  readonly subject?: string | undefined; // the IAM action that AWS names, for the advice
  readonly operation?: string; // the call that failed, such as ecs:RunTask; STOPPED if the task itself has ended
  readonly error?: string; // AWS's name for the error
  readonly isRetryable?: boolean; // the same call may succeed in a moment
  readonly mayHaveStarted?: boolean; // RunTask may have started a task nevertheless
}

/** Ends a stage. `build`: the job's fault, the runner does not retry; `system`: ours, the operator's or AWS's. */
export class Failure extends Error {
  override name = "Failure";
  constructor(
    readonly kind: "build" | "system",
    message: string,
    override readonly cause: Cause = {},
    details: readonly string[] = [], // each is printed on a line of its own
  ) {
    super([message, ...details].map(printable).join("\n  "));
  }
}

/** The exit code that GitLab Runner expects for this kind of failure; 1 or 2 if it names none. */
export function exitCode(kind: Failure["kind"], env: Environment): number {
  const code = Number(kind === "build" ? env.BUILD_FAILURE_EXIT_CODE : env.SYSTEM_FAILURE_EXIT_CODE);
  if (Number.isInteger(code) && code > 0 && code < 256) return code;
  return kind === "build" ? 1 : 2;
}

export function reasonOf(error: unknown): string {
  if (!(error instanceof Error)) return String(error);
  return error.message || ("code" in error && typeof error.code === "string" ? error.code : error.name);
}

// What to do about each problem that the driver recognizes; $1 is the IAM action that AWS names. The texts are only
// printed; decisions depend on a problem's name and group.

/** Another start may succeed: later, in another subnet or with other capacity. */
const TRANSIENT = {
  throttled: "start fewer tasks at once, or ask AWS for higher API rates",
  provisioning: "lower the runner's limit: too many tasks wait for capacity in this cluster",
  capacity: "wait, give Subnets in several zones, or set FallbackCapacityProviderStrategy",
  quota: "lower the runner's limit, or ask AWS for a higher Fargate quota",
  instances: "give the cluster's instances more room, or lower the runner's limit",
  addresses: "give Subnets with more free addresses",
  interfaces: "ask AWS for more network interfaces in this region",
  awsFault: "ask AWS if it happens again",
  spot: "run it again, with on-demand capacity if it must not happen",
  host: "run it again: AWS took the task's host away",
};

/** The task definition is at fault. */
const DEFINITION_FAULTS = {
  definition: "name a task definition that is active in this region",
  incompatible: "make the task definition compatible with LaunchType or the capacity provider",
  networkMode: "set networkMode to awsvpc in the task definition",
  container: "its container must be named ci-coordinator and get no secret SSH_PUBLIC_KEY; or set PrivateKeyPath",
  secret: "its container must be named ci-coordinator and get no secret SSH_PUBLIC_KEY; or set PrivateKeyPath",
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
  disk: "the runner's user must be able to write there, on a disk with room",
  credentials: "give the runner's host a role (a container on EC2: hop limit 2), or AWS_* variables with a valid key",
  profile: "check AWS_PROFILE and credential_process, and that the runner's user can read and run them",
  clock: "correct the clock of the runner's host",
  unreachable:
    "the runner's host must be able to reach AWS in Region: by a NAT gateway, a VPC endpoint for ECS, or HTTPS_PROXY",
  certificate: "set AWS_CA_BUNDLE to the certificate authority of your proxy or endpoint",
  proxy: "check HTTPS_PROXY: its address, user name and password, and what it allows",
  accessDenied: "allow $1 in the IAM policy of the runner's host",
  account: "ask AWS support to enable ECS and Fargate for this account and region",
  // Settings.
  cluster: "check Cluster and Region in the configuration file",
  network: "check Subnet, SecurityGroup and Region: all must belong to one VPC",
  publicIp: "set EnablePublicIP = false: only Fargate tasks have public addresses",
  location: "add instances in the zones of Subnets",
  unsupported: "use a region that offers what the task definition asks for, or another task definition",
  launchType: 'set LaunchType = "FARGATE", or give the cluster a default capacity provider strategy',
  capacityProvider: "add it to the cluster: aws ecs put-cluster-capacity-providers",
  taskSize: "make the task smaller, or ask AWS for a higher Fargate quota",
  assumeRole: "let ecs-tasks.amazonaws.com assume the definition's roles; a new role takes a minute",
  linkedRole: "create it: aws iam create-service-linked-role --aws-service-name ecs.amazonaws.com",
  // Tasks that do not start.
  executionRole: "allow $1 to the task definition's execution role",
  route:
    "check secrets and logging, and the subnet's route to ECR, S3, Secrets Manager and CloudWatch (NAT, endpoints)",
  missing: "create what the task definition names: a secret, a parameter, a file, a log group",
  efsName: "give EFS a mount target in each zone of Subnets, and let the VPC resolve DNS host names",
  efsPort: "allow port 2049 from the task's security group to the EFS mount targets",
  efsAccess: "allow elasticfilesystem:ClientMount to the task role, and check the volume's directory",
  volume: "check the task definition's volumes, and the disk space of the instance",
  pullRate: "copy the image to ECR, or give the registry's credentials",
  pullSpace: "give the task definition more ephemeralStorage",
  architecture: "build the image for the task definition's cpuArchitecture, or change that",
  pull: "check the image's name, the execution role, and the subnet's route to the registry (NAT, endpoints)",
  command: "check the command and entry point in the image and the task definition, and memory",
  // Tasks that stop.
  memory: "give the task definition more memory, or the job less to do at once",
  exited: "read the container's log: its SSH server must run until the task is stopped",
  unhealthy: "correct the health check of ci-coordinator, or give it a longer startPeriod",
  noHealth: "give ci-coordinator a healthCheck in the task definition, or set WaitForHealthy = false",
  ownStop: "the reason names this driver: see GitLab Runner's log, and what runs fargate sweep",
  userStop: "look in CloudTrail for who called StopTask",
  noTask: "look for the task in the ECS console",
  // Logins.
  noShell: "install bash or sh in the image",
  loginShell: "give Username a login shell such as bash, not nologin or false; its start-up files must not exit",
  startUpFile: "let the start-up files of Username, such as ~/.bashrc, return instead of exit",
  key: 'let Username in with the key in SSH_PUBLIC_KEY; KeyType = "ed25519" works with any OpenSSH',
  publicAddress: "set EnablePublicIP, and give the subnet a route to an internet gateway",
  connection: "the task runs on: look at what the job did to sshd, at its load and memory",
  refused: "the image must start an SSH server on Port",
  algorithms: "the SSH server must offer curve25519 or ECDH, and AES, as OpenSSH does",
  noServer: "Port must lead to an SSH server that lets this host in",
  silent: "allow Port in the task's security group, from the runner's host; check routes",
  hostKey: "nothing was sent; find out what answers at that address in place of the task",
};
export type Problem = keyof typeof ADVICE;

/** What to do about a failure; undefined if the driver does not know. */
export const adviceFor = ({ problem, subject }: Cause): string | undefined =>
  problem && ADVICE[problem].replace("$1", subject ?? "this action");
export const causeOf = (error: unknown): Cause => (error instanceof Failure ? error.cause : {});

/** Runs `action`; rethrows its error as a Failure prefixed with `what`; `problem`: that of a system error in it. */
function withContext<T>(what: string, action: () => T, problem?: Problem): T {
  try {
    return action();
  } catch (error) {
    const known = (error as NodeJS.ErrnoException).code === undefined ? undefined : problem;
    throw new Failure("system", `${what}: ${reasonOf(error)}`, { problem: known, ...causeOf(error) });
  }
}

const readFile = (path: string, what: string): Buffer =>
  withContext(`${what} ${path} cannot be read`, () => fs.readFileSync(path));

// 3. Configuration ----------------------------------------------------------------------------------------

const LEVELS = ["trace", "debug", "info", "warn", "warning", "error", "fatal", "panic"] as const;
const FORMATS = ["text", "text-simple", "json"] as const;

// The description of a setting says what it means and what is allowed; error messages show it.
const text = (allowed: string) => v.pipe(v.string(), v.trim(), v.nonEmpty(), v.description(allowed));
const whole = (min: number, max: number, what: string) => {
  const meaning = `${what}, a whole number from ${min} to ${max}`;
  return v.pipe(v.number(), v.integer(), v.minValue(min), v.maxValue(max), v.description(meaning));
};
const exactly = <const T extends readonly string[]>(words: T, meaning: string) =>
  v.pipe(v.picklist(words), v.description(`${meaning}: ${words.join(", ")}`));
const oneOf = <const T extends readonly string[]>(words: T, meaning: string) =>
  v.pipe(v.string(), v.trim(), v.toLowerCase(), exactly(words, meaning)); // all `words` are in lower case
const listOf = (item: string, max: number) =>
  v.pipe(v.array(text(item)), v.minLength(1), v.maxLength(max), v.description(`a list of 1 to ${max}: ${item}`));
const PATTERN = "family or family:revision, with up to three * for anything but : and /";
const pattern = v.pipe(v.string(), v.trim(), v.regex(/^(?!(.*\*){4})[\w*-]+(:[\d*]+)?$/), v.description(PATTERN));
const listOfUpTo100 = (item: v.GenericSchema<string>, what: string) =>
  v.pipe(v.array(item), v.maxLength(100), v.description(what));
const allowed = (item: v.GenericSchema<string>, what: string) =>
  v.optional(listOfUpTo100(item, `what a job's variable may name, a list: ${what}`));
const PLATFORM_VERSION = "a Fargate platform version, such as 1.4.0 or LATEST";
const VARIABLE = "a list of names of variables, with up to three * for any characters";
const variable = v.pipe(v.string(), v.trim(), v.regex(/^(?!(.*\*){4})(?!\d)[\w*]+$/), v.description(VARIABLE));
const AWS_VARIABLES = "AWS_CONTAINER_* AWS_REGION AWS_DEFAULT_REGION AWS_EXECUTION_ENV ECS_CONTAINER_METADATA_URI*";
const flag = (meaning: string) => v.pipe(v.boolean(), v.description(`${meaning}: true or false`));

const CapacityProviderSchema = v.object({
  CapacityProvider: text("the capacity provider's name, such as FARGATE or FARGATE_SPOT"),
  Weight: v.optional(whole(0, 1000, "its share of the tasks"), 1),
  Base: v.optional(whole(0, 100_000, "how many tasks it runs at least")),
});
const strategy = v.pipe(
  v.array(CapacityProviderSchema),
  v.check((providers) => providers.length <= 20 && providers.some((provider) => provider.Weight > 0)),
  v.description('1 to 20 of {CapacityProvider = "FARGATE_SPOT", Weight = 1}, at least one with a Weight above 0'),
);
const RESERVED = ["__proto__", "constructor", "prototype"]; // keys that valibot's `record` drops silently
const tags = v.pipe(
  v.custom<Record<string, string>>((tags) => isTable(tags) && !RESERVED.some((key) => Object.hasOwn(tags, key))),
  v.record(v.string(), v.string()),
  v.maxEntries(50),
  v.description("a table of at most 50 tags for the task, text = text"),
);

/** Every setting, as the configuration file spells it, with default, unit and meaning. */
export const ConfigSchema = v.object({
  LogLevel: v.optional(oneOf(LEVELS, "the least severe messages that are logged"), "info"),
  LogFormat: v.optional(oneOf(FORMATS, "how log messages are written"), "text"),
  LogFile: v.optional(v.pipe(v.string(), v.description("a file that gets the log instead of standard error")), ""),
  Fargate: v.pipe(
    v.object({
      Cluster: text("the name or ARN of the ECS cluster"),
      Region: text("an AWS region, such as us-east-1"),
      Subnet: v.optional(text("a subnet ID, such as subnet-0a1b2c3d")),
      Subnets: v.optional(listOf("a subnet ID", 16)),
      SecurityGroup: v.optional(text("a security group ID, such as sg-0a1b2c3d")),
      SecurityGroups: v.optional(listOf("a security group ID", 5)),
      TaskDefinition: text("family, family:revision or ARN of the task definition"),
      AllowedTaskDefinitions: allowed(pattern, PATTERN),
      EnablePublicIP: v.optional(flag("whether the task gets a public address"), false),
      UsePublicIP: v.optional(flag("whether to connect to the task's public address")),
      PlatformVersion: v.optional(text(PLATFORM_VERSION)),
      AllowedPlatformVersions: allowed(text(PLATFORM_VERSION), PLATFORM_VERSION),
      LaunchType: v.optional(exactly(["FARGATE", "EC2"], "where the task runs")),
      CapacityProviderStrategy: v.optional(strategy),
      FallbackCapacityProviderStrategy: v.optional(strategy),
      EnableExecuteCommand: v.optional(flag("whether ECS Exec may enter the task"), false),
      Tags: v.optional(tags, {}),
      PropagateTags: v.optional(exactly(["TASK_DEFINITION", "NONE"], "whose tags the task gets beside its own")),
      StartTimeout: v.optional(whole(1, 86_400, "seconds from the start of a task until it must be ready"), 600),
      WaitForHealthy: v.optional(flag("whether prepare waits until ECS reports the container healthy"), false),
      DeadlineMargin: v.optional(whole(0, 604_800, "seconds of grace after StartTimeout and job timeout"), 3600),
      AbandonedAfter: v.optional(whole(0, 604_800, "seconds without a live stage until sweep stops a task"), 900),
      MaxTaskAge: v.optional(whole(3600, 2_592_000, "seconds until sweep stops a task without a deadline"), 86_400),
    }),
    v.rawCheck(({ dataset: { value }, addIssue }) => {
      if (!isTable(value)) return;
      const has = (key: string) => value[key] !== undefined;
      const subnets = "give either Subnet, a subnet ID, or Subnets, a list of 1 to 16";
      const groups = "give either SecurityGroup, a security group ID, or SecurityGroups, a list of 1 to 5";
      const both = "cannot be given together with CapacityProviderStrategy; ECS takes one of the two";
      if (has("Subnet") === has("Subnets")) addIssue({ message: `Fargate.Subnet: ${subnets}` });
      if (has("SecurityGroup") === has("SecurityGroups")) addIssue({ message: `Fargate.SecurityGroup: ${groups}` });
      if (has("LaunchType") && has("CapacityProviderStrategy")) addIssue({ message: `Fargate.LaunchType: ${both}` });
    }),
  ),
  TaskMetadata: v.object({ Directory: text("the directory for the records of running tasks") }),
  SSH: v.object({
    Username: text("the user to log in as"),
    Port: v.optional(whole(1, 65_535, "the port of the task's SSH server"), 22),
    PrivateKeyPath: v.optional(text("a private key to log in with, instead of one made for the job")),
    KeyType: v.optional(oneOf(["ed25519", "rsa"], "the type of the key made for the job"), "ed25519"),
    ConnectTimeout: v.optional(whole(1, 3600, "seconds in which the SSH server must accept a login"), 120),
    KeepAliveInterval: v.optional(whole(0, 3600, "seconds between signs of life on an idle connection"), 15),
    CancelGracePeriod: v.optional(whole(0, 240, "seconds from SIGTERM to SIGKILL for a script that is cancelled"), 10),
    PassEnvironment: v.optional(listOfUpTo100(variable, `what a job gets: ${VARIABLE}`), AWS_VARIABLES.split(" ")),
  }),
});

export type Config = v.InferOutput<typeof ConfigSchema>;
/** Settings that a job may choose, by a variable of this name. The runner passes it on as `CUSTOM_ENV_<name>`. */
const VARIABLES = { TaskDefinition: "FARGATE_TASK_DEFINITION", PlatformVersion: "FARGATE_PLATFORM_VERSION" } as const;
type JobSetting = keyof typeof VARIABLES;
/** Settings that the command line may override. */
export type Options = { readonly [Key in "LogLevel" | "LogFormat" | "LogFile" | JobSetting]?: string | undefined };

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
  Object.entries(entriesOf(schema) ?? {}).flatMap(([key, item]) => [path + key, ...knownKeys(item, `${path}${key}.`)]);

/** The known key that is most like an unknown one: by edit distance in proportion to length. */
function nearestKey(unknown: string): string {
  const far = (key: string) => {
    const name = key.slice(key.lastIndexOf(".") + 1);
    return distance(unknown.toLowerCase(), name.toLowerCase()) / Math.max(unknown.length, name.length);
  };
  return knownKeys(ConfigSchema).reduce((best, key) => (far(key) < far(best) ? key : best));
}

/** The job's variables without effect: FARGATE_*, or within two edits of one in `VARIABLES` (less `CUSTOM_ENV_`). */
export function unusedVariables(env: Environment) {
  const read: string[] = Object.values(VARIABLES);
  return Object.keys(env).flatMap((key) => {
    const [, name = "", bare = ""] = /^CUSTOM_ENV_((?:CUSTOM_ENV_)?(.*))$/s.exec(key) ?? [];
    const meant = read.find((known) => distance(bare, known) <= 2);
    return !read.includes(name) && (meant || bare.startsWith("FARGATE_")) ? [{ name, meant }] : [];
  });
}

/** Gives keys the schema's spelling: the official driver's TOML library ignores case, but prefers an exact match. */
function normalizeKeys(value: unknown, schema: v.GenericSchema, path: string, warnings: string[]): unknown {
  const entries = entriesOf(schema);
  if (entries && Array.isArray(value)) return value.map((item) => normalizeKeys(item, schema, path, warnings));
  if (!entries || !isTable(value)) return value;
  const folded: Table = {};
  for (const [key, item] of Object.entries(value)) {
    const name = Object.keys(entries).find((name) => name.toLowerCase() === key.toLowerCase());
    const entry = entries[name ?? ""];
    // An empty text or port 0 counts as not given, as in the official driver, which has no lists.
    const isGiven = (item !== "" || (entry && "item" in unwrap(entry))) && !(name === "Port" && item === 0);
    if (!name || !entry) warnings.push(`unknown key ${path}${key}; the nearest known one is ${nearestKey(key)}`);
    else if (key !== name && Object.hasOwn(value, name))
      warnings.push(`${path}${key} has no effect beside ${path}${name}`);
    else if (isGiven) folded[name] = normalizeKeys(item, entry, `${path}${name}.`, warnings);
  }
  return folded;
}

/** A value as TOML spells it, in at most 80 characters. */
function shown(value: unknown): string {
  if (typeof value === "number" && !Number.isFinite(value)) return `${value}`.toLowerCase().replace("infinity", "inf");
  try {
    return JSON.stringify(value).slice(0, 80);
  } catch {
    return "nested too deeply"; // for the engine's stack: dotted keys have no limit
  }
}

function describeProblem(issue: v.BaseIssue<unknown>): string {
  if (issue.type === "raw_check") return issue.message;
  let schema: v.GenericSchema = ConfigSchema;
  let expected = "a table";
  for (const { key: step } of issue.path ?? []) {
    schema = entriesOf(schema)?.[String(step)] ?? schema;
    expected = v.getDescription(unwrap(schema)) ?? expected;
  }
  const value = issue.path?.at(-1)?.value;
  return `${v.getDotPath(issue)} ${value === undefined ? "is missing" : `is ${shown(value)}`}; expected: ${expected}`;
}

/** Why the job's own choice is not allowed; undefined if it is. `configured`: the file's own TaskDefinition. */
function refuseOverride(
  f: Config["Fargate"],
  jobOverrides: readonly string[],
  configured: unknown,
): string | undefined {
  const refused = (key: JobSetting, why: string) =>
    `${VARIABLES[key]} of this job, ${f[key]?.slice(0, 300)}, is not allowed: ${why}`;
  const { TaskDefinition: asked, AllowedTaskDefinitions: patterns, AllowedPlatformVersions: versions } = f;
  if (jobOverrides.includes("PlatformVersion") && versions && !versions.includes(f.PlatformVersion ?? ""))
    return refused("PlatformVersion", `AllowedPlatformVersions has ${versions.join(", ") || "none"}`);
  if (!jobOverrides.includes("TaskDefinition") || !patterns) return undefined;
  const [, partition, region, account, name = asked] =
    /^arn:([\w-]+):ecs:([\w-]+):(\d{12}):task-definition\/(.*)$/s.exec(asked) ?? [];
  if (account) {
    // An allowed name means a definition of this account, region and partition, and not one of that name elsewhere.
    const arn = /^arn:([\w-]+):ecs:[\w-]+:(\d{12}):/;
    const own = [f.Cluster, String(configured)].map((name) => arn.exec(name)).filter((arn) => arn !== null);
    const known = own.some((arn) => arn[2] === account) && own.every((arn) => arn[1] === partition);
    const right = `region ${f.Region} and of the account in the ARN of Cluster or TaskDefinition in the file`;
    if (!known || region !== f.Region) return refused("TaskDefinition", `an ARN must be of ${right}`);
  }
  const fits = (pattern: string) => {
    const expression = pattern.replaceAll("*", "[^:/]*") + (pattern.includes(":") ? "" : "(:\\d+)?"); // any revision
    return new RegExp(`^${expression}$`).test(name);
  };
  if (/^[\w-]{1,255}(:\d{1,10})?$/.test(name) && patterns.some(fits)) return undefined;
  return refused("TaskDefinition", `AllowedTaskDefinitions has ${patterns.join(", ") || "none"}`);
}

/**
 * Reads the configuration file's text. Options override variables; variables override the file.
 * @returns also the settings that the job's variables decided (`jobOverrides`), and why that is not allowed (`refusal`)
 * @throws {Failure} naming every problem at once
 */
export function readConfig(file: string, path: string, options: Options, env: Environment) {
  let table: Table;
  try {
    table = parseToml(file.replace(/^\uFEFF/, ""));
  } catch (error) {
    if (!(error instanceof TomlError)) throw error;
    const what = error.message.split("\n")[0]?.replace(/^Invalid TOML document: /, "");
    throw new Failure("system", `${path}, line ${error.line}, column ${error.column}: not TOML: ${what}`);
  }
  const warnings: string[] = [];
  const folded = normalizeKeys(table, ConfigSchema, "", warnings) as Table;
  const merged: Table = { Fargate: {}, TaskMetadata: {}, SSH: {}, ...folded };
  const given = (...values: unknown[]) =>
    values.find((value) => value !== undefined && (typeof value !== "string" || value.trim() !== ""));
  for (const key of ["LogLevel", "LogFormat", "LogFile"] as const) merged[key] = given(options[key], merged[key]);
  const fargate = isTable(merged.Fargate) ? merged.Fargate : {}; // the schema reports what is no table
  const configured = fargate.TaskDefinition;
  const jobOverrides: string[] = [];
  for (const key of ["TaskDefinition", "PlatformVersion"] as const) {
    const variable = env[`CUSTOM_ENV_${VARIABLES[key]}`];
    if (given(options[key]) === undefined && given(variable) !== undefined) jobOverrides.push(key);
    fargate[key] = given(options[key], variable, fargate[key]);
  }
  const result = v.safeParse(ConfigSchema, merged);
  if (!result.success) {
    const problems = [...new Set(result.issues.map(describeProblem))];
    if (problems.length > 30) problems.splice(29, Infinity, `and ${problems.length - 29} more`);
    throw new Failure("system", `${path} cannot be used:`, {}, problems);
  }
  const config = result.output;
  // Not relative to the working directory: the runner makes a new one for each attempt, and removes it.
  const beside = (name: string) => resolve(dirname(path), name);
  config.TaskMetadata.Directory = beside(config.TaskMetadata.Directory);
  if (config.SSH.PrivateKeyPath) config.SSH.PrivateKeyPath = beside(config.SSH.PrivateKeyPath);
  if (config.LogFile && !given(options.LogFile)) config.LogFile = beside(config.LogFile);
  const refusal = refuseOverride(config.Fargate, jobOverrides, configured);
  return { config, jobOverrides, refusal, warnings: warnings.map((warning) => `${path}: ${warning}`) };
}

// 4. Logging ----------------------------------------------------------------------------------------------

export function formatRecord(record: LogRecord, format: Config["LogFormat"]): string {
  const message = printable(record.message.join(""));
  const time = `${new Date(record.timestamp).toISOString().slice(0, 19)}Z`;
  if (format === "json") {
    const object = { time, level: record.level, msg: message, ...record.properties };
    const cut = (_key: string, value: unknown) => (typeof value === "string" ? value.slice(0, MAX_TEXT_LENGTH) : value);
    return `${JSON.stringify(object, cut).replace(UNPRINTABLE, escaped)}\n`;
  }
  const level = record.level === "info" ? "" : `${record.level === "fatal" ? "error" : record.level}: `;
  return format === "text-simple" ? `${level}${message}\n` : `${time} ${level}${message}\n`;
}

/** Writes all of a text. Bun makes standard error non-blocking: if the runner's pipe is full, retries for up to 5 s. */
function writeWhole(file: number, text: string): void {
  let rest = Buffer.from(text);
  for (let tries = 0; rest.length > 0; ) {
    try {
      rest = rest.subarray(fs.writeSync(file, rest));
    } catch (error) {
      if ((error as NodeJS.ErrnoException).code !== "EAGAIN" || ++tries > 500) throw error;
      Atomics.wait(new Int32Array(new SharedArrayBuffer(4)), 0, 0, 10);
    }
  }
}

/** Resolves symbolic links, except the kernel's in /proc. @throws at another user's, who could redirect the log */
function followTrustedLinks(path: string): string {
  const here = path === "/" ? path : join(followTrustedLinks(dirname(path)), basename(path));
  const link = here.startsWith("/proc/") ? undefined : fs.lstatSync(here, { throwIfNoEntry: false });
  if (!link?.isSymbolicLink()) return here;
  if (link.uid !== 0 && link.uid !== process.geteuid?.())
    throw new Error(`${here} is a symbolic link of another user, of id ${link.uid}`);
  return followTrustedLinks(resolve(dirname(here), fs.readlinkSync(here)));
}

/** Opens the log file for appending. A pipe must not block a stage; /dev/stderr leads to /proc, which holds links. */
function openLogFile(name: string): number {
  const { O_WRONLY, O_APPEND, O_CREAT, O_NONBLOCK, O_NOFOLLOW } = fs.constants;
  const path = followTrustedLinks(resolve(name));
  const noLink = path.startsWith("/proc/") ? 0 : O_NOFOLLOW; // it may have become a link since
  return fs.openSync(path, O_WRONLY | O_APPEND | O_CREAT | O_NONBLOCK | noLink, 0o600);
}

/** Makes the one logger. It writes to standard error or to `LogFile`, never to standard output, which is the job's. */
export function openLog({ LogLevel, LogFormat, LogFile }: Pick<Config, "LogLevel" | "LogFormat" | "LogFile">): Logger {
  let file = 2;
  let trouble: unknown;
  try {
    if (LogFile) file = openLogFile(LogFile);
  } catch (error) {
    trouble = error;
  }
  const sink = (record: LogRecord) => {
    const line = formatRecord(record, LogFormat);
    try {
      writeWhole(file, line);
      if (file !== 2 && record.level === "fatal") writeWhole(2, line); // so that the job log says what ended a stage
    } catch {} // Nobody reads the log any more (EPIPE) or its disk is full: no reason to leave a task running.
  };
  const fromLogrus: Record<string, LogLevel> = { warn: "warning", panic: "fatal" }; // as in the official driver's files
  const lowestLevel = fromLogrus[LogLevel] ?? (LogLevel as LogLevel);
  const loggers = [
    { category: "fargate", sinks: ["sink"], lowestLevel },
    { category: ["logtape", "meta"], sinks: [], lowestLevel: "fatal" as const },
  ];
  configureSync({ reset: true, sinks: { sink }, loggers });
  const log = getLogger("fargate");
  const fields = { file: LogFile, reason: reasonOf(trouble) };
  if (trouble) log.warn("LogFile {file} cannot be written: {reason}; logging to standard error", fields);
  return log;
}

// 5. The job ----------------------------------------------------------------------------------------------

/** Identifies the job: the same in each of its stages, and different from all other jobs. */
export interface Job {
  readonly stem: string; // job-<id>-<hash>: names the record
  readonly hash: string; // 64 hex digits of SHA-256, what the identity rests on
  readonly title: string; // ids for AWS (a StopTask reason), without words that a job's author could choose
  readonly timeout: number; // seconds
  readonly unused?: readonly string[]; // image and services that its author asks for, only to be logged
}

const ASSUMED_JOB_TIMEOUT = 86_400; // seconds; if the runner does not give the job's timeout
const MAX_JOB_TIMEOUT = 2_678_400; // seconds, a month, as in GitLab
const DEFAULT_JOB_TIMEOUT = 7_200; // seconds; GitLab Runner's own for a job without one

const named = v.fallback(v.object({ name: v.string() }), { name: "" });
const JobResponseSchema = v.object({
  id: v.pipe(v.number(), v.safeInteger()),
  token: v.optional(v.string(), ""),
  job_info: v.object({ project_id: v.pipe(v.number(), v.safeInteger()) }),
  git_info: v.object({ repo_url: v.pipe(v.string(), v.url()) }),
  runner_info: v.fallback(v.object({ timeout: v.optional(v.number()) }), {}),
  image: named,
  services: v.fallback(v.array(named), []),
});

/** Reads JSON by a schema. Errors name the key and never the value: it holds tokens and keys. */
function readJson<T extends v.GenericSchema>(content: string, schema: T): v.InferOutput<T> {
  const json = v.safeParse(v.pipe(v.string(), v.parseJson()), content);
  if (!json.success) throw new Error("it is not JSON");
  const result = v.safeParse(schema, json.output);
  if (result.success) return result.output;
  throw new Error(`${v.getDotPath(result.issues[0]) ?? "it"} is missing or not as expected`);
}

const sha256 = (value: string) => createHash("sha256").update(value).digest("hex");

/** Identifies the job by `JOB_RESPONSE_FILE` (GitLab Runner 14.1+), whose ids no job author can set. */
export function readJob(env: Environment): Job | undefined {
  const path = env.JOB_RESPONSE_FILE;
  if (path) {
    const what = `JOB_RESPONSE_FILE ${path} cannot be used`;
    const response = withContext(what, () => readJson(fs.readFileSync(path, "utf8"), JobResponseSchema));
    const { protocol, host, pathname } = new URL(response.git_info.repo_url); // without the token in it
    const project = response.job_info.project_id;
    // The job's token: nobody can guess it, and no other GitLab with the same address issues the same one.
    const hash = sha256(JSON.stringify([`${protocol}//${host}${pathname}`, project, response.id, response.token]));
    const { timeout = ASSUMED_JOB_TIMEOUT } = response.runner_info;
    return {
      stem: `job-${response.id}-${hash}`,
      hash,
      title: `job ${response.id} of project ${project}`,
      timeout: timeout > 0 ? Math.min(timeout, MAX_JOB_TIMEOUT) : DEFAULT_JOB_TIMEOUT,
      unused: [response.image, ...response.services].flatMap(({ name }) => name || []),
    };
  }
  // Only without a response, not if it cannot be read: the official driver's formula.
  const { CUSTOM_ENV_CI_PROJECT_URL: url, CUSTOM_ENV_CI_PIPELINE_ID: pipeline, CUSTOM_ENV_CI_JOB_ID: id } = env;
  if (!url || !pipeline || !id) return undefined;
  const hash = sha256(`${url}-${pipeline}-${id}`);
  const [label] = /^[\w-]{1,32}$/.exec(env.CUSTOM_ENV_CI_RUNNER_SHORT_TOKEN ?? "") ?? ["job"];
  return { stem: `${label}-${hash}`, hash, title: `job ${hash.slice(0, 12)}`, timeout: ASSUMED_JOB_TIMEOUT };
}

// 6. Task record ------------------------------------------------------------------------------------------

const RECORD_VERSION = 1;
const MANAGER = /^[0-9a-f]{12}$/;
const STARTED_BY = /^fargate-[0-9a-f]{12}-[0-9a-f]{32}$/; // fargate-<manager>-<job>, as in this driver's tasks
const seconds = v.pipe(v.number(), v.minValue(0), v.maxValue(8.64e12)); // since the epoch, in the range of Date

/** What prepare leaves for the later stages, on disk: the official driver's fields and ours. */
const RecordSchema = v.object({
  Version: v.literal(RECORD_VERSION),
  TaskARN: v.string(), // empty until RunTask has answered
  ContainerIP: v.string(), // empty until a login has worked
  PrivateKey: v.string(), // base64 of the PEM text; empty when the key is the operator's own (PrivateKeyPath)
  Cluster: v.string(),
  Region: v.string(),
  StartedBy: v.pipe(v.string(), v.regex(STARTED_BY)), // with another, or none, ListTasks would find other jobs
  ClientTokens: v.array(v.string()), // every token that RunTask was or may have been called with
  Unanswered: v.boolean(), // RunTask may have been sent: there may be a task whose ARN is not known
  HostKey: v.string(), // base64 of the SSH server's key, as first seen
  Interpreter: v.picklist(["bash", "sh"]), // the best shell that the container has
  LoginShell: v.string(), // file name of the login user's own shell
  Deadline: seconds, // after this, the task is overdue; 0 until RunTask is first sent, 1 once it is to be stopped
  UpdatedAt: seconds, // when the record was made, then when RunTask was last sent
});
export type TaskRecord = v.InferOutput<typeof RecordSchema>;

/** Makes the directory of records, for its owner alone, unless it exists; then does what `checkDirectory` does. */
export function openDirectory(directory: string): string | undefined {
  const make = () => fs.mkdirSync(directory, { recursive: true, mode: 0o700 });
  withContext(`TaskMetadata.Directory ${directory} cannot be made`, make, "disk");
  return checkDirectory(directory);
}

/** Warns if others may write to the directory, or own it. @throws {Failure} if anybody may replace a record */
export function checkDirectory(directory: string): string | undefined {
  const what = `TaskMetadata.Directory ${directory}`;
  // No advice to change the mode: other programs may need a directory such as /tmp as it is.
  const use = "use a directory of the driver's own with mode 0700, such as /opt/gitlab-runner/metadata";
  const { mode, uid } = fs.statSync(directory, { throwIfNoEntry: false }) ?? { mode: 0, uid: 0 };
  if ((mode & 0o1002) === 0o002) throw new Failure("system", `${what} cannot be used: anybody may write to it; ${use}`);
  if (uid !== 0 && uid !== process.geteuid?.()) return `${what} belongs to another user, of id ${uid}; ${use}`;
  return mode & 0o022 ? `${what} can be written to by others; ${use}` : undefined;
}

/** Reads a file that this user owns; never through a link or a pipe. `others`: mode bits that must not be set. */
function readPrivateFile(path: string, others = 0o077): string {
  const { O_RDONLY, O_NOFOLLOW, O_NONBLOCK } = fs.constants;
  if (fs.lstatSync(path).isSymbolicLink()) throw new Error("it is a symbolic link");
  const file = fs.openSync(path, O_RDONLY | O_NOFOLLOW | O_NONBLOCK); // it may have become a link since
  try {
    const stat = fs.fstatSync(file);
    if (!stat.isFile()) throw new Error("it is not a regular file");
    if (stat.uid !== process.geteuid?.()) {
      // Also on a file system that gives all files to one user: anyone who can mount it could have written them.
      const fixed = "; if the file system gives all files to that user (an EFS access point), run GitLab Runner as it";
      const like = fs.statSync(dirname(path)).uid === stat.uid ? fixed : "";
      throw new Error(`it belongs to another user, of id ${stat.uid}${like}`);
    }
    if (stat.mode & others) throw new Error(`its mode is ${(stat.mode & 0o777).toString(8)}, and should be 600`);
    return fs.readFileSync(file, "utf8");
  } finally {
    fs.closeSync(file);
  }
}

function removeQuietly(path: string): void {
  try {
    fs.rmSync(path, { force: true });
  } catch {}
}

/** Writes a file, flushed to disk: after a crash it holds either its old or its new content, whole. */
function writeDurably(path: string, content: string, put: (temporary: string, path: string) => void): void {
  const temporary = `${path}.${randomBytes(6).toString("hex")}.tmp`;
  try {
    fs.writeFileSync(temporary, content, { flag: "wx", mode: 0o600, flush: true });
    put(temporary, path);
  } finally {
    removeQuietly(temporary);
  }
  const directory = fs.openSync(join(path, ".."), "r"); // it holds the name
  fs.fsyncSync(directory);
  fs.closeSync(directory);
}

/** @throws {Failure} if the record cannot be stored; the caller must then not start a task */
export function writeRecord(path: string, record: TaskRecord): void {
  const content = `${JSON.stringify(record, null, 2)}\n`;
  withContext(`the record ${path} cannot be written`, () => writeDurably(path, content, fs.renameSync), "disk");
}

/** Whether a text contains the `startedBy` of a job other than the one in the record's file name. */
const isOfAnother = (path: string, text: string): boolean =>
  !path.includes(/fargate-[0-9a-f]{12}(-[0-9a-f]{32})/.exec(text)?.[1] ?? "");

/** @returns undefined if there is none. @throws {Failure} if there is one that cannot be understood or trusted */
export function readRecord(path: string): TaskRecord | undefined {
  return withContext(`the record ${path} cannot be used`, () => {
    try {
      const record = readJson(readPrivateFile(path), RecordSchema);
      if (isOfAnother(path, record.StartedBy)) throw new Error("it is of another job");
      return record;
    } catch (error) {
      if ((error as NodeJS.ErrnoException).code !== "ENOENT") throw error;
    }
  });
}

/** What a broken record (truncated, other version) still shows: its age; its task, if nobody else could write it. */
export function salvageRecord(path: string, others = 0o022): Partial<TaskRecord> {
  const status = fs.lstatSync(path, { throwIfNoEntry: false });
  const UpdatedAt = status?.isFile() ? { UpdatedAt: status.mtimeMs / 1000 } : {};
  try {
    const content = readPrivateFile(path, others);
    const arn = /arn:aws[\w-]*:ecs:([\w-]+):\d{12}:task\/([\w-]+)\/[0-9a-f]{32}/;
    const [TaskARN, Region, Cluster] = arn.exec(content) ?? [];
    if (TaskARN && Region && Cluster && !isOfAnother(path, content)) return { TaskARN, Region, Cluster, ...UpdatedAt };
  } catch {}
  return UpdatedAt;
}

/** Identifies a process: start time, dot, this boot and PID namespace; only "." if it has ended, or without /proc. */
function identityOf(pid: number | "self"): string {
  try {
    // "pid (name) state ppid ...": the start is the 22nd field.
    const stat = fs.readFileSync(`/proc/${pid}/stat`, "latin1");
    const [state = "", ...fields] = stat.replace(/^.*\) /s, "").split(" ");
    const boot = fs.readFileSync("/proc/sys/kernel/random/boot_id", "latin1").slice(0, 8);
    return /[ZX]/.test(state) ? "." : `${fields[18]}.${boot}${fs.statSync("/proc/self/ns/pid").ino}`;
  } catch {
    return ".";
  }
}

const LOCK_TOUCH_MS = 5_000; // how often a process that works on a job touches its lock
// After so long without a touch, a process that /proc does not show counts as dead.
const LOCK_EXPIRY_MS = 4 * LOCK_TOUCH_MS;

/** Makes a lock, named after this process: `sweep` leaves the job alone, `cleanup` waits. Returns its removal. */
export function createLock({ Directory }: Config["TaskMetadata"], stem: string, stage: string): () => void {
  const path = join(Directory, [stem, stage, process.pid, identityOf("self"), "lock"].join("."));
  const beat = () => {
    try {
      // Touched regularly, for those who cannot look at this process.
      if (fs.existsSync(path)) fs.lutimesSync(path, new Date(), new Date());
      else fs.closeSync(fs.openSync(path, "wx", 0o600));
    } catch {} // best effort: a run needs only to read its record, and a full disk may have room later
  };
  beat();
  const timer = setInterval(beat, LOCK_TOUCH_MS).unref();
  return () => {
    clearInterval(timer);
    removeQuietly(path);
  };
}

/** The processes that work, or have worked, on records in a directory, by their locks. */
export function readLocks({ Directory }: Config["TaskMetadata"], wallTime: number) {
  return fs.readdirSync(Directory).flatMap((name) => {
    const [, stem, stage, pid, identity = "", place] =
      /^([\w-]{1,32}-[0-9a-f]{64})\.(\w+)\.(\d+)\.(\d*\.(\w*))\.lock$/.exec(name) ?? [];
    const { uid, mtimeMs = 0 } = fs.lstatSync(join(Directory, name), { throwIfNoEntry: false }) ?? {};
    if (!stem || !stage || uid !== process.geteuid?.()) return [];
    // /proc does not show a process elsewhere (other host or container, or before a reboot): the last touch decides.
    const isHere = place && identityOf("self").endsWith(`.${place}`);
    const lives = isHere ? identityOf(Number(pid)) === identity : Math.abs(wallTime - mtimeMs) < LOCK_EXPIRY_MS;
    // While the record exists, its locks stay: they show when the job was last worked on.
    if (!lives && !fs.existsSync(join(Directory, `${stem}.json`))) removeQuietly(join(Directory, name));
    return [{ stem, stage, pid: Number(pid), identity, lives, mtimeMs }];
  });
}

/** This manager's id among those that share a cluster; a copy of the directory on another host gives another one. */
export function managerId(directory: string): string {
  const path = join(directory, ".manager-id");
  return withContext(`the manager's identity ${path} cannot be used`, () => {
    try {
      // link(2) creates the file whole, and only once.
      if (!fs.existsSync(path)) writeDurably(path, `${randomBytes(6).toString("hex")}\n`, fs.linkSync);
    } catch (error) {
      if ((error as NodeJS.ErrnoException).code !== "EEXIST") throw error;
    }
    const id = readPrivateFile(path).trim();
    if (!MANAGER.test(id)) throw new Error("it does not hold 12 hex digits; remove it");
    return sha256(`${id} ${hostname()}`).slice(0, 12);
  });
}

// 7. Keys -------------------------------------------------------------------------------------------------

/** A private key (PEM text), and the public one as a line of authorized_keys. */
export type KeyPair = Readonly<Record<"privateKey" | "publicKey", string>>;
/** @throws {Failure} if the text is no private key, or one with a passphrase */
export async function keyPairOf(privateKey: string): Promise<KeyPair> {
  const { utils } = await import("ssh2");
  const [key] = [utils.parseKey(privateKey)].flat();
  if (key instanceof Error || !key?.isPrivateKey())
    throw new Failure("system", key instanceof Error ? key.message : "it holds no private key");
  return { privateKey, publicKey: `${key.type} ${key.getPublicSSH().toString("base64")}` };
}

/** Makes a key pair for one job. RSA has 3072 bits, as much as NIST SP 800-57 asks for beyond 2030. */
export async function makeKeyPair(type: Config["SSH"]["KeyType"]): Promise<KeyPair> {
  if (type === "rsa") {
    const { privateKey } = generateKeyPairSync("rsa", { modulusLength: 3072 });
    return keyPairOf(privateKey.export({ type: "pkcs1", format: "pem" }).toString());
  }
  const { utils } = await import("ssh2");
  // ssh2 1.17 cuts leading zero bytes off a public key: one key in 256 is malformed, and made anew.
  return keyPairOf(utils.generateKeyPairSync("ed25519").private).catch(() => makeKeyPair(type));
}

// 8. ECS --------------------------------------------------------------------------------------------------

export const CONTAINER = "ci-coordinator"; // the container that gets the public key; the name is the official driver's

/** What every command works with. */
export interface BaseContext {
  readonly config: Config;
  readonly log: Logger;
  readonly stop: AbortSignal; // aborted by SIGTERM or SIGINT; the reason is a Failure that says so
  readonly now: () => number; // milliseconds of a clock that nobody sets: for durations, within this process
  readonly wallTime: () => number; // milliseconds since the epoch: only to compare with other processes and machines
  readonly env: Environment;
}

/** What every stage works with. */
export interface Context extends BaseContext {
  readonly job: Job;
  readonly jobOverrides: readonly string[]; // the settings that a variable of the job decided
  readonly refusal?: string | undefined; // why these are not allowed, if they are not
  readonly warned?: Set<string>; // warnings already given, in a stage that repeats steps
}

export type OutputSinks = Readonly<Record<"stdout" | "stderr", Writable>>; // where the output of a script goes

/** The input of RunTask: what the official driver sends, and what the configuration adds to it. Pure. */
export function runTaskInput(
  { Fargate: f }: Config,
  identity: { startedBy: string; clientToken: string },
  environment: Readonly<Record<string, string>> | undefined,
): RunTaskCommandInput {
  const subnets = f.Subnets ?? [f.Subnet as string];
  const securityGroups = f.SecurityGroups ?? [f.SecurityGroup as string];
  const assignPublicIp = f.EnablePublicIP ? "ENABLED" : "DISABLED";
  const variables = environment && Object.entries(environment).map(([name, value]) => ({ name, value }));
  return {
    cluster: f.Cluster,
    taskDefinition: f.TaskDefinition,
    platformVersion: f.PlatformVersion,
    count: 1,
    networkConfiguration: { awsvpcConfiguration: { subnets, securityGroups, assignPublicIp } },
    ...(variables && { overrides: { containerOverrides: [{ name: CONTAINER, environment: variables }] } }),
    launchType: f.LaunchType,
    capacityProviderStrategy: f.CapacityProviderStrategy?.map(
      ({ CapacityProvider: capacityProvider, Weight: weight, Base: base }) => ({ capacityProvider, weight, base }),
    ),
    ...(f.EnableExecuteCommand && { enableExecuteCommand: true }),
    ...(Object.keys(f.Tags).length > 0 && { tags: Object.entries(f.Tags).map(([key, value]) => ({ key, value })) }),
    propagateTags: f.PropagateTags,
    ...identity,
  };
}

/** The limits of a call that may be repeated. `onSend` and `grace` are for calls to AWS. */
export interface Limits {
  readonly until: number; // ms, as of `now`, after which it is not repeated
  readonly signal?: AbortSignal | undefined; // ends it with the signal's reason
  readonly again?: (error: unknown) => boolean; // whether to repeat it after this error; `isRetryable` unless given
  readonly onSend?: () => void; // called before each time it is sent
  readonly grace?: number; // ms for which a call that was sent may outlast the signal; none unless given
}

/** Bounds of the pauses between two calls of `retry`, in ms, before jitter of a half up or down. */
type Pauses = { now: () => number; most?: number; least?: (error: unknown) => number };
/** Calls until it works, with jittered backoff. @throws the last error, or the reason of `signal` */
export async function retry<T>(call: () => Promise<T>, limits: Limits & Pauses): Promise<T> {
  const { until, again = isRetryable, signal, now, most = 5_000, least = () => 0 } = limits;
  for (let wait = 100; ; wait = Math.min(wait * 2, most)) {
    signal?.throwIfAborted();
    try {
      return await call();
    } catch (error) {
      const pause = Math.max(wait, least(error)) * (0.5 + Math.random());
      if (!again(error) || now() + pause > until) throw error;
      await sleep(pause, signal);
    }
  }
}

/** Waits, in ms; a signal ends the wait with its own reason. */
async function sleep(ms: number, signal?: AbortSignal): Promise<void> {
  await delay(ms, undefined, { signal }).catch(() => signal?.throwIfAborted());
}

type Patterns = readonly (readonly [Problem, RegExp])[];
/** AWS's names for errors, and two stop codes. A name decides, whatever the text beside it. */
const BY_NAME: Patterns = [
  ["throttled", /^(Throttling(Exception)?|RequestLimitExceeded|TooManyRequestsException|RequestThrottled|SlowDown)$/],
  ["provisioning", /^LimitExceededException$/],
  ["accessDenied", /^(AccessDenied(Exception)?|UnauthorizedOperation|NotAuthorized)$/],
  ["credentials", /^(CredentialsProviderError|InvalidClientTokenId|AuthFailure)$/],
  ["credentials", /^(ExpiredToken|UnrecognizedClient|MissingAuthenticationToken|IncompleteSignature)(Exception)?$/],
  ["clock", /^(RequestExpired|RequestTimeTooSkewed|RequestInTheFuture)$/],
  ["account", /^(BlockedException|OptInRequired|SubscriptionRequiredException)$/],
  ["cluster", /^ClusterNotFoundException$/],
  ["platform", /^Platform(Unknown|TaskDefinitionIncompatibility)Exception$/],
  ["unsupported", /^UnsupportedFeatureException$/],
  ["spot", /^SpotInterruption$/],
  ["userStop", /^UserInitiated$/],
];

// How AWS's explanations begin, for problems without a name; the first match counts. They come from the ECS API
// reference, the ECS developer guide (stopped tasks' errors, API failure reasons), and public reports.
const BY_TEXT: Patterns = [
  // Messages of RunTask and StopTask.
  ["clock", /^Signature (expired|not yet current)/],
  ["credentials", /^The (request signature we calculated|security token included in the request)/],
  ["noTask", /^The referenced task was not found/],
  ["definition", /^TaskDefinition (not found|is inactive)/],
  ["incompatible", /^(Task definition does not support launch_type|The selected task definition is not compatible)/],
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
  // Load, capacity and limits: of RunTask, and of tasks that stop before they are ready.
  ["provisioning", /^Tasks provisioning capacity limit exceeded/],
  ["capacity", /^Capacity is unavailable at this time/],
  ["quota", /^You've reached the limit on the number of/],
  ["addresses", /^(RESOURCE:ENI|Unexpected EC2 error.*\bInsufficientFreeAddressesInSubnet)/],
  ["instances", /^(RESOURCE:|AGENT\b|Unable to attach network interface to unused device index)/],
  ["location", /^LOCATION/],
  ["placement", /^(ATTRIBUTE|MemberOf placement constraint)/],
  ["throttled", /^(Error retrieving|Unexpected EC2 error).*\b(RequestLimitExceeded|Throttling|Rate exceeded)/],
  ["interfaces", /^Unexpected EC2 error.*InterfaceLimitExceeded/],
  ["network", /^(Error retrieving|Unexpected EC2 error).*\b(Invalid(Subnet|Group|Security|Param)|Unauthorized)/],
  ["awsFault", /^(Error retrieving|Unexpected EC2 error|Timeout waiting for|Network interface provision)/],
  ["awsFault", /^(Internal ?[eE]rror|ContainerRuntime|DockerTimeout|CannotInspect)/],
  ["awsFault", /^ResourceInitializationError: failed to configure ENI/],
  // Tasks that do not start. AWS's word at the beginning decides; the rest of the text only chooses the advice.
  ["executionRole", /^(ResourceInit|Fetching|CannotPull).*(AccessDenied|not authorized|KMS is not allowed)/],
  ["efsName", /^ResourceInit.*invoke EFS utils.*Failed to resolve/],
  ["efsAccess", /^ResourceInit.*invoke EFS utils.*(access denied|No such file)/],
  ["efsPort", /^ResourceInit.*invoke EFS utils/],
  ["missing", /^(ResourceInit|Fetching).*(NotFound|not found|invalid ssm|did not contain|failed to initialize)/],
  ["route", /^ResourceInit/],
  ["pullRate", /^CannotPull.*(toomanyrequests|Too Many Requests|pull rate limit)/],
  ["pullSpace", /^CannotPull.*no space left/],
  ["architecture", /^(CannotPull.*(matching platform|no matching manifest)|CannotStart.*exec format error)/],
  ["pull", /^CannotPull/],
  ["command", /^CannotStartContainerError/],
  ["volume", /^CannotCreate(Volume|Container)Error/],
  ["spot", /^Your Spot Task was interrupted/],
  ["host", /^(Host EC2 |ECS is performing maint|Container instance dereg|(TerminationNotice|InfrastructureHealth)$)/],
  ["unhealthy", /^Task failed container health checks/],
  ["memory", /^OutOfMemory/],
  ["exited", /^EssentialContainerExited$/], // a stop code, like those that end in $ above: used if no text matches
];
const firstMatch = (rows: Patterns, text: string) => rows.find(([, pattern]) => pattern.test(text))?.[0];
/** Recognizes a problem by AWS's name for it, else by how one of AWS's texts begins. */
export function recognize(name: string, ...texts: (string | undefined)[]): Pick<Cause, "problem" | "subject"> {
  const known = texts.flatMap((text) => text?.replaceAll("\u2019", "'") ?? []); // AWS writes both apostrophes
  const problem = firstMatch(BY_NAME, name) ?? known.map((text) => firstMatch(BY_TEXT, text)).find(Boolean);
  const subject = known.map((text) => / is not authorized to perform: ([\w-]+:\w+)/.exec(text)?.[1]).find(Boolean);
  return { problem, subject };
}

/** What the SDK throws. Its fields come from the answer, where they may be of any type. */
type AwsError = { [field: string]: unknown; $metadata?: { httpStatusCode?: number } };

/** Error codes that prove that no request left this host. They are bun's, which takes them from Node and OpenSSL. */
const NOT_SENT: Patterns = [
  ["unreachable", /^(ECONNREFUSED|ENOTFOUND|EAI_AGAIN)$/],
  ["certificate", /CERT|^(CRL|HOSTNAME|PATH_LENGTH)_|^UNABLE_TO_(GET|VERIFY|DE)|^INVALID_(CA|PURPOSE)$/],
  ["proxy", /^ERR_PROXY_TUNNEL$/], // refused CONNECT; the error has the answer's status
];

const HINTS = /(?: For more information, pass `verbose|\n)[\s\S]*/; // for programmers, in the SDK's and bun's messages
/** The Failure for what a call to AWS threw. `profileProblem`: why a profile gives none, if so. */
export function awsFailure(operation: string, thrown: unknown, profileProblem?: string): Failure {
  const { name, message, code, status: proxyStatus, $metadata } = thrown as AwsError;
  const status = $metadata?.httpStatusCode ?? 0;
  const error = typeof name === "string" && name ? name : "UnknownError";
  const refused = status >= 300;
  const known = recognize(error, refused && typeof message === "string" ? message : undefined);
  const notSent = status > 0 ? undefined : firstMatch(NOT_SENT, String(code)); // else the endpoint set `code`
  const isFinal = notSent === "certificate" || (notSent === "proxy" && Number(proxyStatus) < 500);
  // Without a status, the request or its answer was lost; with one of success, the answer broke off.
  const isLost = !refused && $metadata !== undefined && known.problem !== "credentials";
  const isThrottled = firstMatch(BY_NAME, error) === "throttled" || status === 429;
  const isRetryable = isThrottled || status >= 500 || (isLost && !isFinal);
  // A conflict means that this token, which is ours alone, has already started a task.
  const mayHaveStarted = status >= 500 || (refused && error === "ConflictException") || (isLost && !notSent);
  const cause = { operation, error, ...known, isRetryable, mayHaveStarted };
  let text = (typeof message === "string" ? reasonOf(thrown) : error).replace(HINTS, "");
  // The SDK stumbles over a body that it does not expect, such as a proxy's page.
  const isForeign = status > 0 && /^(Type|Syntax|Range)Error$/.test(error) && !/ECONN|socket/i.test(text);
  if (isForeign) text = `HTTP ${status} with a body that is not from AWS`;
  else if (refused) text = `${error}: ${text}`;
  else if (notSent === "certificate") text = `the endpoint's certificate is not accepted: ${code}`;
  const fail = (outcome: string, reason: string, problem?: Problem) =>
    new Failure("system", `${operation} ${outcome}: ${reason}`, { ...cause, problem });
  if (refused) return fail("was refused", text, known.problem);
  if (profileProblem) return fail("was not sent", profileProblem, "profile");
  const problem = isLost ? (notSent ?? "unreachable") : known.problem; // else it failed before, as over a token's file
  return fail(problem === "unreachable" ? "got no answer" : "was not sent", text, problem);
}

/** Whether the same call may succeed in a moment: throttled, AWS's own failure, or no whole answer. */
const isRetryable = (error: unknown): boolean => causeOf(error).isRetryable === true;
/** The same if a task is to be found and stopped: credentials may fail for a moment, and nobody repeats a cleanup. */
const isRetryableStop = (error: unknown): boolean =>
  isRetryable(error) || ["credentials", "profile"].includes(causeOf(error).problem ?? "");
/** Whether AWS asks for fewer calls: its limits are for an account and region, all runners together. */
const isThrottling = (error: unknown): boolean => causeOf(error).problem === "throttled";

const CALL_TIMEOUT_MS = 30_000; // for one call to AWS, from getting credentials to the answer's last byte

/** A value of another type counts as absent. */
const given = <T extends v.GenericSchema>(schema: T) => v.fallback(v.nullish(schema), undefined);
const texts = <K extends string>(...keys: K[]) => v.entriesFromList(keys, given(v.string()));
const listed = <T extends v.ObjectEntries>(entries: T) => given(v.array(v.fallback(v.object(entries), {} as never)));
const pairs = listed(texts("name", "value"));
const networkInterfaces = listed(texts("privateIpv4Address", "ipv6Address"));
/** What this driver reads in ECS's answers, whose types the SDK does not check. */
const AnswerSchema = v.object({
  tasks: listed({
    ...texts("taskArn", "startedBy", "lastStatus", "desiredStatus", "stopCode", "stoppedReason"),
    createdAt: given(v.date()),
    attachments: listed({ ...texts("type"), details: pairs }),
    containers: listed({ ...texts("name", "reason", "healthStatus"), exitCode: given(v.number()), networkInterfaces }),
    overrides: given(v.object({ containerOverrides: listed({ environment: pairs }) })),
  }),
  failures: listed(texts("reason", "detail")),
  taskArns: given(v.array(v.string())),
  ...texts("nextToken"),
});
type Answer = v.InferOutput<typeof AnswerSchema>;
/** Whether an answer has what its call asked for; if not, it comes from a proxy and not from ECS. */
const IS_COMPLETE = {
  RunTask: ({ tasks, failures }: Answer) => Boolean(tasks?.length ? tasks[0]?.taskArn : failures?.length),
  DescribeTasks: ({ tasks }: Answer) => Boolean(tasks),
  ListTasks: ({ taskArns }: Answer) => Boolean(taskArns),
  StopTask: () => true,
};

/** An error like the SDK's own for a missing or incomplete answer. */
const missingAnswer = (message: string) => Object.assign(new Error(message), { $metadata: {} });
type Abort = { abortSignal: AbortSignal }; // how the SDK takes a signal

/** The certificates of the CAs that are trusted by default, and of those in a PEM file. @throws {Failure} */
async function trustedCas(path: string): Promise<string[]> {
  const { getCACertificates } = await import("node:tls");
  return withContext(`the CA bundle ${path} cannot be used`, () => {
    const found = fs.readFileSync(path, "utf8").match(/-----BEGIN CERTIFICATE-----[^-]+-----END CERTIFICATE-----/g);
    if (!found) throw new Error("there is no certificate in it");
    for (const pem of found) new X509Certificate(pem); // else each connection would fail without a reason
    return [...getCACertificates("default"), ...found];
  });
}

/** Why a profile gives no credentials. The SDK's own messages may hold the output of a credential_process. */
async function explainProfile({ AWS_PROFILE: name = "default" }: Environment): Promise<string | undefined> {
  const { configFile, credentialsFile } = await (await import("@smithy/core/config")).loadSharedConfigFiles();
  const profile = { ...configFile[name], ...credentialsFile[name] };
  const isSource = Object.keys(profile).some((key) => /^(credential|role_arn|sso_|aws_|web_identity|login_)/.test(key));
  const source = profile.credential_process ? "the credential_process of profile" : "profile";
  if (isSource) return `${source} ${name} gave no credentials`;
  if (name !== "default" && Object.keys(profile).length === 0)
    return `profile ${name} (AWS_PROFILE) is not in the shared config and credentials files`;
}

/** The calls to AWS that this driver makes. Each SDK is loaded, and its client made, at first use. */
export class Aws {
  #ecsClient: Promise<ECS> | undefined;
  #ec2Client: Promise<EC2> | undefined;
  throttled = 0; // how often AWS has throttled a call of this process

  constructor(
    private readonly place: Pick<TaskRecord, "Region" | "Cluster">,
    private readonly context: Pick<BaseContext, "log" | "now" | "env">,
  ) {}

  async #settings() {
    const { FetchHttpHandler } = await import("@smithy/fetch-http-handler");
    const { loadConfig } = await import("@smithy/core/config");
    const bundle = await loadConfig({
      environmentVariableSelector: (env) => env.AWS_CA_BUNDLE || undefined,
      configFileSelector: (profile) => profile.ca_bundle || undefined,
      default: "",
    })();
    const init: BunFetchRequestInit = { redirect: "manual", ...(bundle && { tls: { ca: await trustedCas(bundle) } }) };
    // bun's fetch honours HTTPS_PROXY, HTTP_PROXY and NO_PROXY as the Go SDK does; the SDK's own handler does not.
    const customFetch = ((request: Request) => fetch(request, init)) as typeof fetch;
    const requestHandler = new FetchHttpHandler({ customFetch });
    const { env } = this.context;
    const { AWS_ACCESS_KEY_ID: accessKeyId, AWS_SECRET_ACCESS_KEY: secretAccessKey } = env;
    // As in the Go SDK, keys override a profile. This SDK would use the profile.
    const override = env.AWS_PROFILE && accessKeyId && secretAccessKey;
    const keys = override && { credentials: { accessKeyId, secretAccessKey, sessionToken: env.AWS_SESSION_TOKEN } };
    return { region: this.place.Region, maxAttempts: 1, requestHandler, ...keys }; // `retry` alone repeats calls
  }

  async #send<T>(action: string, limits: Limits, call: (abort: Abort) => Promise<T>): Promise<T> {
    const { until, signal, again = isRetryable, onSend, grace = 0 } = limits;
    const { log, now, env } = this.context;
    const first = now();
    let warned = false;
    const once = async () => {
      onSend?.();
      const begun = now();
      // Only RunTask has a grace. `until` does not cut it short, because its answer matters more than the time.
      const most = grace ? CALL_TIMEOUT_MS : Math.min(CALL_TIMEOUT_MS, Math.max(until - begun, 1_000));
      // Not left to the SDK, which ignores signals while it gets credentials, and modifies the signal's reason.
      const sdk = new AbortController();
      const cut = Promise.withResolvers<never>();
      const end = () => {
        sdk.abort();
        cut.reject(missingAnswer(`no whole answer after ${now() - begun} ms`));
      };
      const timers = [setTimeout(end, most)];
      const onSignal = () => void timers.push(setTimeout(end, grace));
      signal?.addEventListener("abort", onSignal);
      try {
        return await Promise.race([call({ abortSignal: sdk.signal }), cut.promise]);
      } catch (error) {
        const isWithout = (error as AwsError).name === "CredentialsProviderError";
        const failure = awsFailure(action, error, isWithout ? await explainProfile(env) : undefined);
        log.debug("{reason} (after {ms} ms)", { reason: failure.message, ms: now() - begun });
        const patience = isThrottling(failure) ? 60_000 : 10_000; // ms; throttling may last as long as a rush of jobs
        if (!warned && now() > first + patience && now() < until && !signal?.aborted && again(failure)) {
          warned = true;
          log.warn("{reason}; trying again", { reason: failure.message });
        }
        throw failure;
      } finally {
        timers.forEach(clearTimeout);
        signal?.removeEventListener("abort", onSignal);
      }
    };
    // After throttling, waits longer each time, up to 5 s: the limits are shared by all jobs of the account.
    const least = (error: unknown) => (isThrottling(error) ? Math.min(500 * 2 ** ++this.throttled, 5_000) : 0);
    const isOfCall = (error: unknown) => causeOf(error).operation === action; // else nothing was sent
    const mayRepeat = (error: unknown) => isOfCall(error) && again(error);
    return retry(once, { until, again: mayRepeat, now, signal, least }).catch((error) => {
      throw signal?.aborted && isOfCall(error) ? signal.reason : error;
    });
  }

  async #ecs<T>(action: keyof typeof IS_COMPLETE, limits: Limits, call: (ecs: ECS, abort: Abort) => Promise<T>) {
    this.#ecsClient ??= this.#settings().then(async (made) => new (await import("@aws-sdk/client-ecs")).ECS(made));
    const ecs = await this.#ecsClient;
    return this.#send(`ecs:${action}`, limits, async (abort) => {
      const answer: Answer = v.parse(v.fallback(AnswerSchema, {}), await call(ecs, abort));
      if (IS_COMPLETE[action](answer)) return answer as T;
      throw missingAnswer("the answer is empty");
    });
  }

  /** Starts a task; the input's clientToken makes a repeated call harmless. @returns its ARN, or why there is none */
  async runTask(input: RunTaskCommandInput, limits: Limits): Promise<string | Failure> {
    const { tasks, failures = [] } = await this.#ecs("RunTask", limits, (ecs, abort) => ecs.runTask(input, abort));
    const arn = tasks?.[0]?.taskArn;
    if (arn) return arn;
    const reasons = failures.map((f) => [f.reason, f.detail].filter(Boolean).join(" ")).join("; ");
    // On a cluster of instances, each has its own reason: one that only lacks room is worth another attempt.
    const causes = failures.map(({ reason }) => recognize("", reason));
    const known = causes.find(({ problem = "" }) => problem in TRANSIENT) ?? causes.find(({ problem }) => problem);
    const cause = { operation: "ecs:RunTask", ...known };
    return new Failure("system", `ecs:RunTask started no task: ${reasons || "AWS gave no reason"}`, cause);
  }

  /** Those of these tasks that ECS knows, in calls of 100. */
  async describeTasks(arns: readonly string[], limits: Limits): Promise<Task[]> {
    if (arns.length === 0) return [];
    const asked = { cluster: this.place.Cluster, tasks: arns.slice(0, 100) };
    const { tasks = [] } = await this.#ecs("DescribeTasks", limits, (ecs, abort) => ecs.describeTasks(asked, abort));
    return [...tasks, ...(await this.describeTasks(arns.slice(100), limits))];
  }

  /** The same for one task that has been seen before. A single MISSING proves nothing: ECS is eventually consistent. */
  async describeTask(arn: string, limits: Limits, calls = 4): Promise<Task | undefined> {
    const [task] = await this.describeTasks([arn], limits);
    if (task || calls === 1) return task;
    await sleep(1_500, limits.signal);
    return this.describeTask(arn, limits, calls - 1);
  }

  /** Stops a task, unless it is gone; ECS may not know it until `young`, in ms as of `now`. `reason` holds ids only. */
  async stopTask(task: string, reason: string, limits: Limits, young = 0): Promise<void> {
    const isGone = (error: unknown) => causeOf(error).problem === "noTask";
    const again = (error: unknown) => isRetryableStop(error) || (isGone(error) && this.context.now() < young);
    const asked = { cluster: this.place.Cluster, task, reason };
    await this.#ecs("StopTask", { ...limits, again }, (ecs, abort) => ecs.stopTask(asked, abort)).catch((error) => {
      if (isGone(error)) return;
      if (error === limits.signal?.reason) throw error;
      throw new Failure("system", `${task} may still run, stop it by hand: ${reasonOf(error)}`, causeOf(error));
    });
  }

  /** ARNs of the cluster's tasks that are not stopped yet: those started under a name, or all. */
  async listTasks(startedBy: string | undefined, limits: Limits, nextToken?: string): Promise<string[]> {
    const asked = { cluster: this.place.Cluster, startedBy, nextToken };
    const again = isRetryableStop;
    const page = await this.#ecs("ListTasks", { ...limits, again }, (ecs, abort) => ecs.listTasks(asked, abort));
    if (!page.nextToken) return page.taskArns ?? [];
    if (this.context.now() > limits.until)
      throw new Failure("system", "ecs:ListTasks has more pages than there is time for");
    return [...(page.taskArns ?? []), ...(await this.listTasks(startedBy, limits, page.nextToken))];
  }

  /** The public address of a network interface; undefined while it has none, or is unknown. */
  async publicAddress(networkInterfaceId: string, limits: Limits): Promise<string | undefined> {
    this.#ec2Client ??= this.#settings().then(async (made) => new (await import("@aws-sdk/client-ec2")).EC2(made));
    const ec2 = await this.#ec2Client;
    const asked = { NetworkInterfaceIds: [networkInterfaceId] };
    const describe = (abort: Abort) => ec2.describeNetworkInterfaces(asked, abort);
    const answer = await this.#send("ec2:DescribeNetworkInterfaces", limits, describe).catch((failure: Failure) => {
      if (failure.cause.error !== "InvalidNetworkInterfaceID.NotFound") throw failure; // EC2 may learn of it after ECS
    });
    return answer?.NetworkInterfaces?.[0]?.Association?.PublicIp;
  }
}

/** A task's network interface, undefined until it is attached; the address is IPv4 if it has one, else IPv6. */
export function interfaceOf(task: Task): Record<"id" | "address", string | undefined> {
  const eni = task.attachments?.find((attachment) => attachment.type === "ElasticNetworkInterface");
  const detail = (wanted: string) => eni?.details?.find(({ name }) => name === wanted)?.value;
  const shared = task.containers?.flatMap((container) => container.networkInterfaces ?? [])[0]; // by all
  const address = detail("privateIPv4Address") || shared?.privateIpv4Address || shared?.ipv6Address;
  return { id: detail("networkInterfaceId"), address };
}

/** While a start is awaited, desiredStatus STOPPED is the end already, whatever lastStatus says. */
export const isEnding = (task: Task): boolean =>
  task.desiredStatus === "STOPPED" ||
  /^(DEACTIVATING|STOPPING|DEPROVISIONING|STOPPED|DELETED)$/.test(task.lastStatus ?? "");

/** Why a task stopped, in AWS's words: stop code, reason, and how each container ended. */
export function explainStop(task: Task): string {
  const stopped = [task.stopCode, task.stoppedReason].filter(Boolean).join(": ") || "ECS gave no reason";
  const containers = task.containers?.map(({ name, exitCode, reason }) => {
    if (exitCode === undefined && !reason) return "";
    const code = exitCode === undefined ? "no exit code" : `exit code ${exitCode}`;
    return `; container ${name}: ${[code, reason].filter(Boolean).join(", ")}`;
  });
  return [stopped, ...(containers ?? [])].join("");
}

const STOPPED = "task"; // the operation of a Cause: the task itself has ended
const OWN_STOP = /^(fargate sweep: |job )/; // reasons that this driver gives to StopTask
/** Why a task stopped, for decisions. */
export function stopCause({ stopCode, stoppedReason = "", containers = [] }: Task): Cause {
  const reasons = containers.map((container) => container.reason);
  const { problem, subject } = recognize(stopCode ?? "", stoppedReason, ...reasons, stopCode);
  const isOwn = problem === "userStop" && OWN_STOP.test(stoppedReason);
  return { operation: STOPPED, problem: isOwn ? "ownStop" : problem, subject };
}

// Pause before the next DescribeTasks, in ms, with jitter. An account has 20 such calls a second for all its jobs, so:
// 0.5 to 2 s while the address is about to come, then 5 s. Each throttled call makes them longer, up to 10 and 30 s.
export function pollPause(polls: number, addressKnown: boolean, random: number, throttled = 0): number {
  const pause = addressKnown || polls > 30 ? 5_000 : Math.min(500 * 1.3 ** polls, 2_000);
  return Math.min(pause * (1 + throttled), addressKnown ? 30_000 : 10_000) * (0.75 + random / 2);
}

// 9. SSH --------------------------------------------------------------------------------------------------

/** The server to log in to, and how. */
export interface SshTarget
  extends Pick<Config["SSH"], "Port" | "Username" | "KeepAliveInterval" | "CancelGracePeriod"> {
  readonly host: string;
  readonly privateKey: string;
  readonly hostKey?: Buffer; // the only server key that is accepted; undefined on first use, which pins it
  readonly toSend?: number; // max bytes to send, besides our own commands
  readonly PassEnvironment?: readonly string[];
}

/** `target` is for a second connection to the same server. */
export type Connection = Readonly<{ client: Client; hostKey: Buffer; socket: Socket; target: SshTarget }>;

/** Why there is no connection. `unreachable` and `unverified` (ECS did not answer) are transient, the others final. */
export class SshFailure extends Failure {
  readonly why: "unreachable" | "unverified" | "login" | "host-key";
  constructor(why: SshFailure["why"], message: string, cause: Cause = {}) {
    super("system", message, cause);
    this.why = why;
  }
}

/** The level that ssh2 gives its errors, and the operating system's code. */
type SshError = Error & { level?: string; code?: unknown };

// Memory limits in bytes. ssh2 has none; a server that keeps to the protocol stays far below them.
const MAX_UNSENT = 2 ** 20; // replies waiting to be sent, besides the script: each of 36 bytes takes 1.5 KB
const MAX_UNWRITTEN = 32 * 2 ** 20; // output not written yet: the window is 2 MiB, which ssh2 does not enforce
const WINDOW_LIMIT = 2 ** 20; // with more unwritten output, the server may not send more
const MAX_RSS_GROWTH = 512 * 2 ** 20; // growth of the whole process

/** Destroys the socket of a server that makes this process use too much memory. `toSend`: bytes of the stage script */
function limitMemory(socket: Socket, toSend: number): void {
  const maxRss = process.memoryUsage.rss() + MAX_RSS_GROWTH + 2 * toSend;
  let bytesAtLastCheck = 0;
  socket.on("data", () => {
    if (socket.writableLength > MAX_UNSENT + toSend)
      socket.destroy(new Error("the server sends requests without reading the replies"));
    if (socket.bytesRead < bytesAtLastCheck + 2 ** 20) return;
    bytesAtLastCheck = socket.bytesRead;
    // bun collects the garbage of many small packets late.
    if (process.memoryUsage.rss() > maxRss - MAX_RSS_GROWTH / 2) Bun.gc(true);
    if (process.memoryUsage.rss() > maxRss)
      socket.destroy(new Error("the server makes this process use too much memory"));
  });
}

/** Why SSH failed. A server's own words are quoted or left out, so that nobody takes them for ours or for AWS's. */
function sshReason(error: Error): string {
  if (error instanceof TypeError || error instanceof RangeError) return "the server broke the protocol";
  if (error.message.startsWith("Wrong signature type: ")) return "the server signs in another way than agreed";
  const said = ("code" in error && typeof error.code === "number") || "reason" in error;
  return said ? `the server says "${printable(reasonOf(error)).replaceAll('"', "'").slice(0, 300)}"` : reasonOf(error);
}

// ---- Begin of ssh2's internals ----
// Everything that ssh2 does not publish is used here and nowhere else. A test fails for any version of ssh2 other than
// the one whose source was read for this block (1.17.0).

type Handler = (protocol: { requestFailure(): void; ping(): void }, payload: Buffer) => void;

/**
 * Replaces ssh2's handler of global requests (message 80 of RFC 4254), none of which this driver needs. ssh2 parses the
 * host keys that a server announces with regular expressions that take minutes for some texts, and keeps the keys until
 * the server proves that it has them.
 */
async function ignoreGlobalRequests(): Promise<void> {
  // @ts-expect-error: no types; a table of functions by message number
  const { default: handlers }: { default: Record<number, Handler> } = await import("ssh2/lib/protocol/handlers.js");
  handlers[80] = (protocol, payload) => {
    const wantsReply = payload[5 + payload.readUInt32BE(1)]; // follows the request's name
    if (wantsReply) protocol.requestFailure();
    else protocol.ping(); // otherwise sshd's next packet waits 40 ms for TCP's acknowledgement of this one
  };
}

/** The largest packet the server accepts, in bytes. ssh2 splits data by it; a size of 0 would be an endless loop. */
const maxPacketSize = (channel: ClientChannel): number => (channel.outgoing as { packetSize: number }).packetSize;

/**
 * Lets the server send more on a channel only while `mayGrow`. ssh2 opens the window whenever it has handed data to a
 * stream. Pausing a stream would hold the window as well, but reorders standard output and standard error.
 * @returns `update`, to be called when `mayGrow` may have changed, and whether the server has closed the channel
 */
function controlWindow(client: Client, channel: ClientChannel, mayGrow: () => boolean) {
  type Protocol = { channelWindowAdjust(id: number, bytes: number): void };
  const { _protocol: protocol } = client as unknown as { _protocol: Protocol };
  const adjust = protocol.channelWindowAdjust.bind(protocol);
  const server = channel.outgoing as { id: number; state: string };
  const isClosed = () => server.state === "closed"; // the id may then be another channel's
  let withheld = 0; // bytes
  const update = (bytes = 0) => {
    withheld += bytes;
    if (withheld === 0 || !mayGrow() || isClosed()) return;
    adjust(server.id, withheld);
    withheld = 0;
  };
  protocol.channelWindowAdjust = (id, bytes) => (id === server.id && !isClosed() ? update(bytes) : adjust(id, bytes));
  return { update, isClosed };
}
// ---- End of ssh2's internals ----

/** Waits for `promise`. `onAbort` is called if `signal` aborts meanwhile, or has aborted before. */
async function withAbort<T>(signal: AbortSignal, onAbort: () => void, promise: Promise<T>): Promise<T> {
  signal.addEventListener("abort", onAbort);
  if (signal.aborted) onAbort();
  return promise.finally(() => signal.removeEventListener("abort", onAbort));
}

const ALGORITHMS: ConnectConfig["algorithms"] = {
  cipher: { remove: "chacha20-poly1305@openssh.com", append: [], prepend: [] }, // does not work under bun
  serverHostKey: { remove: "ssh-rsa", append: [], prepend: [] }, // uses SHA-1, which OpenSSH 8.8 refuses as well
  // No Diffie-Hellman groups: under bun, ssh2 tests the prime at each key exchange, which blocks this process for
  // half a minute at 8192 bits. OpenSSH has had ECDH since 5.7.
  kex: [
    "curve25519-sha256",
    "curve25519-sha256@libssh.org",
    "ecdh-sha2-nistp256",
    "ecdh-sha2-nistp384",
    "ecdh-sha2-nistp521",
  ],
  compress: ["none"], // with compression, a few bytes from a server could become many
};
const CONNECT_TIMEOUT_MS = 3_000; // for the TCP connection: a new attempt is faster than TCP's own retransmissions
const MAX_SILENCE_MS = 15_000; // from the TCP connection to the server's first bytes
const LOGIN_TIMEOUT_MS = 30_000; // from those to the login: busy hosts, name look-ups and PAM take long

/**
 * Limits the time for each phase of a login: TCP connection, the server's first bytes, login.
 * @returns a function that ends the limits
 */
function limitPhases(
  socket: Socket,
  maxSilence: number,
  loginTimeout: number,
  onTimeout: (text: string, problem: Problem) => void,
): () => void {
  let timer: NodeJS.Timeout | undefined;
  const limit = (ms: number, text: string, problem: Problem) => {
    clearTimeout(timer);
    timer = setTimeout(() => onTimeout(text, problem), ms);
  };
  const limitSilence = (ms: number) => limit(ms, `nothing answered for ${ms / 1000} s`, "silent");
  const late = `login did not complete within ${loginTimeout / 1000} s`;
  limitSilence(Math.min(maxSilence, CONNECT_TIMEOUT_MS));
  socket.once("connect", () => limitSilence(maxSilence));
  socket.once("data", () => limit(loginTimeout, late, "noServer"));
  return () => clearTimeout(timer);
}

/** Classifies an error that ends a login: SshFailure's `why`, a message, and the problem. */
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
 * Logs in once. @throws {SshFailure}
 * @param silence max ms from the TCP connection to the server's first bytes, which `onAnswer` reports
 */
export async function connect(target: SshTarget, silence: number, signal: AbortSignal, onAnswer = () => {}) {
  const [{ Client }, { Socket }] = await Promise.all([import("ssh2"), import("node:net"), ignoreGlobalRequests()]);
  signal.throwIfAborted();
  const client = new Client();
  const socket = new Socket();
  socket.setNoDelay(true); // else each short packet may wait 40 ms for the last one's acknowledgement
  const where = `${target.Username}@${target.host.replace(/.*:.*/, "[$&]")}:${target.Port}`; // IPv6 as in URLs
  let hostKey: Buffer | undefined;
  const isChanged = () => hostKey !== undefined && target.hostKey?.equals(hostKey) === false;
  const done = Promise.withResolvers<Connection>();
  const end = (reason: unknown) => {
    done.reject(reason);
    // After the login as well: after an error, ssh2 closes its own half only, and the server need not close the other.
    socket.destroy();
  };
  const fail = (why: SshFailure["why"], text: string, problem: Problem) =>
    end(new SshFailure(why, `${where}: ${text}`, { problem }));
  const onTimeout = (text: string, problem: Problem) => fail("unreachable", text, problem);
  const clearTimer = limitPhases(socket, silence, LOGIN_TIMEOUT_MS, onTimeout);
  socket.once("data", onAnswer);
  limitMemory(socket, target.toSend ?? 0);
  client.on("ready", () => {
    if (hostKey) done.resolve({ client, hostKey, socket, target: { ...target, hostKey, toSend: 0 } });
    else fail("host-key", "the server accepted the login before it sent its host key", "hostKey");
  });
  // This listener stays: an error event without one would end the process.
  client.on("error", (error: SshError) => {
    if (isChanged()) fail("host-key", "the server's key is not the one seen when the task was prepared", "hostKey");
    else fail(...classifyLoginError(error));
  });
  client.on("close", () => fail("unreachable", "the server closed the connection", "noServer"));
  try {
    client.connect({
      ...loginOptions(target),
      sock: socket.connect({ host: target.host, port: target.Port }),
      hostVerifier: (key: Buffer) => {
        hostKey = Buffer.from(key);
        return !isChanged();
      },
    });
    return await withAbort(signal, () => end(signal.reason), done.promise);
  } catch (error) {
    socket.destroy(); // also when connect itself throws, for a key that it cannot read
    throw error instanceof Failure ? error : new SshFailure("login", `${where}: ${reasonOf(error)}`);
  } finally {
    clearTimer();
  }
}

// In ms, except `open`. Attempts overlap until one is answered: packets to an address that is not up may be dropped.
// A refused login makes a pause: the key may come later, and OpenSSH 9.8 bars an address that failed for 5 s.
const LOGIN = { every: 250, open: 4, pauseAfterRefusal: 5_000 } as const;

/** Tries to log in until it works or `signal` aborts; reports each failed attempt. @throws the reason of `signal` */
export function logIn(target: SshTarget, signal: AbortSignal, onFailure: (failure: SshFailure) => void) {
  const won = Promise.withResolvers<Connection>();
  const over = new AbortController();
  const ended = AbortSignal.any([signal, over.signal]);
  const open = new Map<symbol, boolean>(); // attempts, and whether the server has answered them
  let pause = 0;
  let silence = CONNECT_TIMEOUT_MS;
  const attempt = async () => {
    if (--pause > 0 || open.size >= LOGIN.open || [...open.values()].includes(true)) return;
    const own = Symbol();
    open.set(own, false);
    const begun = performance.now();
    try {
      const connection = await connect(target, silence, ended, () => open.set(own, true));
      if (ended.aborted) return void connection.client.destroy();
      over.abort();
      won.resolve(connection);
    } catch (error) {
      if (ended.aborted) return;
      const failure = error as SshFailure;
      // A busy server may need longer for its first bytes: the next attempt waits longer.
      if (performance.now() - begun >= silence) silence = Math.min(Math.round(silence / 800) * 1_000, MAX_SILENCE_MS);
      if (failure.why === "login") pause = LOGIN.pauseAfterRefusal / LOGIN.every;
      onFailure(failure);
    } finally {
      open.delete(own);
    }
  };
  const timer = setInterval(attempt, LOGIN.every);
  attempt();
  return withAbort(signal, () => won.reject(signal.reason), won.promise).finally(() => clearInterval(timer));
}

/** A command's exit code, or the signal that ended it; undefined when its channel closed without either. */
type Exit = number | NodeJS.Signals | undefined;

/** Opens a channel that runs a command in the login shell. An abort of `signal` leaves the connection open. */
async function execute({ client }: Connection, command: string, signal: AbortSignal) {
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
      // At once: the packet that opens the channel may hold all that a short command has to say.
      const exit = new Promise<Exit>((ended) => {
        channel.on("exit", (code: number | null, name?: string) => ended(code ?? (name as NodeJS.Signals)));
        channel.on("close", () => ended(undefined));
      });
      opened.resolve({ channel, exit });
    });
  } catch {
    lost(); // authenticated, then disconnected
  }
  return withAbort(signal, () => opened.reject(signal.reason), opened.promise).finally(() => client.off("close", lost));
}

/** `within`: ms; `apart`: over a connection of its own; `report`: gets standard error and how the command ended. */
type CommandOptions = { within?: number; apart?: boolean; report?: { errors: string; ended: Exit } };

// Start-up files may export functions of these names.
const UNSET_FUNCTIONS = "unset -f [ cat command echo env grep kill ls read sleep tr true";
const TOOL_PATH = "PATH=$PATH:/usr/local/bin:/usr/bin:/bin"; // even if a start-up file has broken it
/** Runs a short program, if need be (MaxSessions 1) over a new connection; returns up to 1 MiB of standard output. */
async function ask(
  connection: Connection,
  program: string,
  signal: AbortSignal,
  asking: CommandOptions = {},
): Promise<string> {
  const { within = 10_000, apart, report = { errors: "", ended: undefined } } = asking;
  const late = new AbortController();
  const failure = new SshFailure("unreachable", `the container did not answer for ${within / 1000} s`);
  const timer = setTimeout(() => late.abort(failure), within);
  const bound = AbortSignal.any([signal, late.signal]);
  let own: Connection | undefined;
  try {
    if (apart) own = await connect(connection.target, within, bound);
    const { channel, exit } = await execute(
      own ?? connection,
      `/bin/sh -c '${UNSET_FUNCTIONS}; ${TOOL_PATH}; ${program}'`,
      bound,
    );
    let output = "";
    channel.on("data", (chunk: Buffer) => {
      if (output.length < 2 ** 20) output += chunk.toString();
    });
    channel.stderr.on("data", (chunk: Buffer) => {
      if (report.errors.length < 65_536) report.errors += chunk.toString();
    });
    const closed = Promise.withResolvers<Exit>();
    channel.on("close", () => closed.resolve(exit));
    report.ended = await withAbort(bound, () => closed.reject(bound.reason), closed.promise);
    if (report.ended === undefined) throw new SshFailure("unreachable", "the connection was lost");
    return output;
  } catch (error) {
    if (apart || bound.aborted || connection.socket.destroyed) throw error;
    return await ask(connection, program, bound, { ...asking, apart: true });
  } finally {
    clearTimeout(timer);
    own?.client.end();
  }
}

/** Finds the shells; `warning` says why PassEnvironment cannot work. @throws {Failure} with the login shell's output */
export async function findShells(connection: Connection, signal: AbortSignal) {
  const question = [
    'echo "fargate-shells $SHELL $(command -v bash || command -v sh)";',
    "n=; { read -r n </proc/1/comm; } 2>/dev/null; s=closed; { true </proc/1/environ; } 2>/dev/null && s=open;",
    'command -v tr >/dev/null || s=tr; [ "$n" = sshd ] && s=sshd;',
    // ECS sets AWS_* and ECS_* in every container: if the session has some, the image passes the variables itself.
    'env | grep -Eq "^(FARGATE_ENVIRONMENT|(AWS|ECS)_[A-Z0-9_]+)=" && s=passed; echo "fargate-environment $s"',
  ].join(" ");
  const report = { errors: "", ended: undefined as Exit };
  const output = await ask(connection, question, signal, { report });
  const [, login = "", best] = /fargate-shells (\S*) (\S+)/.exec(output) ?? [];
  if (!best) {
    const said = `${output}\n${report.errors}`.split("\n").filter((line) => line.trim() !== "");
    const how = `it ended with ${report.ended}${said.length > 0 ? ":" : " and said nothing"}`;
    const problem =
      ({ 1: "loginShell", 126: "noShell", 127: "noShell" } as const)[Number(report.ended)] ?? "startUpFile";
    throw new Failure("system", `the container's login shell runs no commands: ${how}`, { problem }, said.slice(-20));
  }
  const Interpreter: TaskRecord["Interpreter"] = /bash$/.test(best) ? "bash" : "sh";
  const reasons: Record<string, string> = {
    sshd: "sshd, which is the container's first process, has overwritten its environment",
    closed: "Username may not read the environment of the container's first process",
    tr: "the image has no tr",
  };
  const [, state] = /^fargate-environment (sshd|closed|tr)$/m.exec(output) ?? [];
  const instead = 'start sshd with -o "SetEnv=NAME=$NAME ..." (see docs/worker-images.md), or set PassEnvironment = []';
  const isLost = state && connection.target.PassEnvironment?.length;
  const warning = isLost ? `PassEnvironment has no effect: ${reasons[state]}; ${instead}` : undefined;
  return { Interpreter, LoginShell: basename(login), warning };
}

/** The shell that a script's first line asks for. @throws {Failure} for any but bash and sh: a wrong one does harm */
export function interpreterOf(script: Buffer, best: TaskRecord["Interpreter"]): "bash" | "sh" {
  const start = script.subarray(0, 256).toString("latin1");
  const [, named = "bash"] = /^#!\s*(?:\S*\/env\s+(?:-\S+\s+)*)?(\S+)/.exec(start) ?? [];
  // Without `#!`: byte-order marks, as Latin-1, and what GitLab Runner writes for other shells.
  const isForeign = /^(\xef\xbb\xbf|\xff\xfe|\xfe\xff|\s*& ?\{|\s*@echo off)/i.test(start);
  const name = isForeign ? "PowerShell or cmd.exe" : named.split("/").at(-1);
  if (name === "sh") return "sh";
  if (name === "bash") return best;
  const instead = `only bash and sh can be used; set shell = "bash" in the runner's config.toml`;
  throw new Failure("system", `the script is for ${name}, but ${instead}`);
}

/** Runs a program of the image, even if a start-up file has broken PATH or defined a function of that name. */
const tool = (words: string) => `{ command ${words} 2>/dev/null || command -p ${words} 2>/dev/null; }`;

/**
 * Passes on variables of the container's first process, unevaluated; what a login or start-up file has set stays. In
 * PATH, its value replaces sshd's part. sshd as first process has overwritten its own. \036 stands for line breaks.
 */
function passEnvironment(patterns: readonly string[]): string {
  const letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZ_abcdefghijklmnopqrstuvwxyz"; // what a range means depends on the locale
  const shells = "UID|EUID|PPID|SHELLOPTS|BASHOPTS|BASH_ENV|BASH_XTRACEFD|ENV|IFS|PS4|POSIXLY_CORRECT";
  const passesPath = new RegExp(`^(${patterns.join("|").replaceAll("*", "\\w*")})$`).test("PATH");
  const sshdPath = `$(${tool('tr "\\000" "\\n"')} </proc/$$/environ | ${tool('sed -n "s/^PATH=//p"')})`;
  return [
    `FARGATE_N=; { command read -r FARGATE_N </proc/1/comm; } 2>/dev/null; FARGATE_P=${passesPath ? sshdPath : ""};`,
    "FARGATE_ALL=; case $FARGATE_N in sshd) ;; *) FARGATE_ALL=$(",
    `${tool('tr "\\000\\n" "\\n\\036"')} 2>/dev/null </proc/1/environ);; esac; set -f; IFS=\${IFS#??};`,
    "for FARGATE_V in $FARGATE_ALL; do FARGATE_N=${FARGATE_V%%=*}; FARGATE_V=${FARGATE_V#*=}; case $FARGATE_N in",
    `""|[0123456789]*|*[!${letters}0123456789]*|_|OLDPWD|SSH_*|FARGATE_*|${shells}) continue;; esac;`,
    `case $FARGATE_N in ${patterns.join("|")}) ;; *) continue;; esac; while :; do case $FARGATE_V in *"$FARGATE_RS"*)`,
    'FARGATE_V=${FARGATE_V%%"$FARGATE_RS"*}$IFS${FARGATE_V#*"$FARGATE_RS"};; *) break;; esac; done;',
    'eval "FARGATE_SET=\\${$FARGATE_N+set}"; case $FARGATE_N$FARGATE_SET in PATHset)',
    'case $PATH in *"${FARGATE_P:-:none:}"*) PATH=${PATH%%"$FARGATE_P"*}$FARGATE_V${PATH#*"$FARGATE_P"};; esac;;',
    '*set) export "$FARGATE_N";; *) export "$FARGATE_N=$FARGATE_V";; esac; done; set +f;',
    "unset FARGATE_N FARGATE_V FARGATE_SET FARGATE_P FARGATE_ALL;",
  ].join(" ");
}

/**
 * The program of the remote shell. The script comes on standard input, followed by the mark: no part of it is in an
 * argument, a file or the environment. One line without single quotes, so that any login shell passes it on. It
 *  - undoes changes by start-up files: shell options, aliases, IFS. The assignment turns on bash's POSIX mode, in which
 *    no function replaces a special builtin; `command` ignores all other functions;
 *  - prints the first mark with its process id and /proc/PID/stat, then the pipes that it writes to;
 *  - reads the script into a variable, and goes on only if the mark follows it: a cut connection runs nothing of it;
 *  - prints the second mark, then evaluates the script in the same shell, with empty standard input.
 */
export function remoteProgram(mark: string, patterns: readonly string[] = []): string {
  const program = [
    "unset FARGATE_SCRIPT; FARGATE_SCRIPT=; { command read -r FARGATE_SCRIPT </proc/$$/stat; } 2>/dev/null;",
    `command echo "${mark} $$ $FARGATE_SCRIPT"; (${tool("ls -ln /proc/$$/fd/1 /proc/$$/fd/2")});`,
    `FARGATE_SCRIPT=$(${tool("cat")}); case $FARGATE_SCRIPT in *"${mark}") ;;`,
    `*) command echo "${mark} incomplete"; exit 1;; esac; FARGATE_SCRIPT=\${FARGATE_SCRIPT%"${mark}"};`,
    'IFS=$(command printf " \\t\\n\\036"); FARGATE_RS=${IFS#???}; IFS=${IFS%?}; FARGATE_IFS=$IFS;',
    patterns.length > 0 ? passEnvironment(patterns) : "",
    `command echo "${mark} complete"; exec </dev/null; IFS=$FARGATE_IFS; unset POSIXLY_CORRECT FARGATE_RS FARGATE_IFS;`,
    "command shopt -u inherit_errexit 2>/dev/null;", // which POSIX mode leaves on
    'command eval "command unset FARGATE_SCRIPT; $FARGATE_SCRIPT"',
  ].join(" ");
  const neutral = "\\unset -f command; \\set +abefmuvxC; \\command unalias -a; \\command trap - DEBUG 2>/dev/null";
  return `POSIXLY_CORRECT=1; ${neutral}; \\eval "${program.replace(/[\\"$`]/g, "\\$&")}"`;
}

/** Takes what `remoteProgram` prints out of the output, wherever that is cut into chunks. */
export class Preamble {
  /** Known from the first mark on. `start`: ticks since the boot. Without /proc, it counts as its session's leader. */
  shell: Readonly<{ pid: number; session: number; start: number }> | undefined;
  pipes: readonly string[] = []; // such as pipe:[123]: the shell's standard output and error
  state: "pending" | "incomplete" | "complete" = "pending";
  held: Buffer = Buffer.alloc(0); // may be part of a mark; if none came, the output of start-up files

  constructor(readonly mark: string) {}

  /** @returns the bytes that are not the program's: output of start-up files, then the script's own */
  push(chunk: Buffer): Buffer {
    if (this.state !== "pending") return chunk;
    const data = Buffer.concat([this.held, chunk]);
    const text = data.toString("latin1");
    // A start-up file may show the program itself, as by `ps`: no number follows the mark there.
    const first = this.shell ? undefined : new RegExp(`${this.mark} (\\d{1,10}) (.{0,600})\\n`).exec(text);
    const own = this.shell ? 0 : (first?.index ?? Math.max(data.length - 1_024, 0)); // bytes before the program's
    if (first) {
      const [, , , session, ...more] = first[2]?.replace(/^.*\) /, "").split(" ") ?? []; // after "pid (name) "
      this.shell = { pid: Number(first[1]), session: Number(session ?? first[1]), start: Number(more[15] ?? 0) };
    }
    const second = this.shell && new RegExp(`${this.mark} (complete|incomplete)\\n`).exec(text.slice(own));
    this.held = data.subarray(this.shell ? Math.max(own, data.length - 8_192) : own); // both marks are much shorter
    if (!second) return data.subarray(0, own);
    this.state = second[1] as "incomplete" | "complete";
    this.pipes = second.input.slice(0, second.index).match(/\w+:\[\d+\]$/gm) ?? [];
    return Buffer.concat([data.subarray(0, own), data.subarray(own + second.index + second[0].length)]);
  }
}

// How long to wait for a script's output when its shell has exited and its channel stays open, in ms.
const DRAIN = { tick: 50, filter: 10_000, background: 2_000, silence: 500 } as const;
const MAX_BUFFERED = 16 * 2 ** 20; // bytes; more than sshd, the network and ssh2 hold of a script that has ended

/**
 * Finds what holds a channel open, in a listing of /proc: the processes that can write to one of its pipes. One that
 * reads from a pipe itself is a filter, such as `tee` in `exec > >(tee log)`; any other is a process in the background.
 * @returns a path to each pipe that is held, by its oldest process; undefined if the listing does not tell
 */
export function findPipeHolders(listing: string, pipes: readonly string[]) {
  const found = listing.matchAll(/^l.(.).* \/proc\/(\d+)\/fd\/(\d) -> (.+)$/gm);
  const links = [...found].map(([, mode, pid, fd, target = ""]) => ({ mode, pid, fd, target }));
  if (links.length === 0 || pipes.length === 0) return undefined;
  const writers = links.filter(({ mode, target }) => mode === "w" && pipes.includes(target));
  const readers = links.filter(({ fd, target }) => fd === "0" && target.startsWith("pipe:")).map(({ pid }) => pid);
  writers.sort((a, b) => Number(b.pid) - Number(a.pid));
  const paths = new Map(writers.map(({ pid, fd, target }) => [target, `/proc/${pid}/fd/${fd}`]));
  return { filter: writers.some(({ pid }) => readers.includes(pid)), paths: [...paths.values()] };
}

/**
 * Terminates a script: TERM to its process group and to what left the group but not the session (`timeout`, `set -m`),
 * KILL after the grace period. By a command: OpenSSH ignores signal requests for root. In /proc/PID/stat, the name is
 * followed by 1 state, 3 process group, 4 session, 20 start. Under dropbear, the server's process leads session and
 * group; it is older than the script's shell and left alone, and that shell gets TERM first.
 */
async function terminate(connection: Connection, { pid, session, start }: NonNullable<Preamble["shell"]>) {
  const grace = connection.target.CancelGracePeriod;
  const apart = pid !== session; // under dropbear, all channels of a connection are of one session
  const first = apart ? `${pid}` : `-${pid}`;
  const program = [
    'left() { for f in /proc/[0-9]*/stat; do { read -r l <"$f"; } 2>/dev/null || continue; i=${l%% *}; set -- ${l##*) };',
    `[ "$4" = ${session} ] && [ "$1" != Z ] && [ "\${20}" -ge ${start} ] || continue;`,
    '[ "$3" = "$skip" ] || [ "$i" = "$skip" ] || echo "$i"; done;',
    `[ -e /proc/self ] || { [ -z "$skip" ] && kill -0 ${first} && echo ${first}; }; }; skip=; set -- $(left);`,
    `kill -TERM ${first}; skip=${pid}; kill -TERM $(left); skip=; sleep ${grace} >/dev/null 2>&1 & k=$!;`,
    'while [ -n "$(left)" ] && kill -0 $k; do sleep 0.1 || sleep 1; done; kill $k; i=0;',
    `kill -KILL ${first}; kill -KILL $(left);`,
    'while [ -n "$(left)" ] && [ $i -lt 10 ]; do i=$((i+1)); sleep 0.1 || { sleep 1; i=$((i+9)); }; done;',
    "echo fargate-terminated $# left $(left)", // how many processes there were, and those that KILL did not end
  ].join(" ");
  // 8 s for this shell to start, and for KILL to take effect: less than the 10 s that SECURITY.md promises.
  const asking = { within: grace * 1000 + 8_000, apart };
  const answer = await ask(connection, program, new AbortController().signal, asking).catch(() => "");
  const [, found, left] = /^fargate-terminated (\d+) left(.*)$/m.exec(answer) ?? [];
  if (found === undefined) return "no answer";
  if (left?.trim()) return "not ended";
  return found === "0" ? "not found" : "terminated";
}

/** How a script ended. `begun`: some of it may have run; `wasSilent`: the server answered no keep-alive. */
export type Outcome =
  | { readonly ended: "exited"; readonly code: number }
  | { readonly ended: "lost"; readonly begun: boolean; readonly wasSilent: boolean; readonly reason: string };

/**
 * Writes a script's output to its sinks, one part after the other: both sinks may lead to the same pipe, and the two
 * streams must keep their order. The streams are never paused; `controlWindow` holds back the server instead.
 */
class OutputWriter {
  received = 0; // bytes
  unwritten = 0; // bytes that no sink has accepted yet
  #written: Promise<void> = Promise.resolve();
  #gathered: { sink: Writable; parts: Buffer[] } | undefined;

  /** @param onWritten called whenever a sink has accepted a part */
  constructor(private readonly onWritten: () => void) {}

  /** Queues a part. Short parts are gathered for one turn of the event loop: each write costs memory and time. */
  write(sink: Writable, part: Buffer): void {
    if (part.length === 0) return;
    this.received += part.length;
    this.unwritten += part.length;
    if (this.#gathered?.sink !== sink) this.flush();
    if (!this.#gathered) setImmediate(() => this.flush());
    this.#gathered ??= { sink, parts: [] };
    this.#gathered.parts.push(part);
    if (part.length > 4_096 || this.#gathered.parts.length > 4_096) this.flush();
  }

  /** Sends on what is gathered. Resolves when the sinks have accepted everything. */
  flush(): Promise<void> {
    if (this.#gathered) {
      const { sink, parts } = this.#gathered;
      this.#gathered = undefined;
      const part = parts.length === 1 ? (parts[0] as Buffer) : Buffer.concat(parts);
      this.#written = this.#written.then(async () => {
        await new Promise((resolve) => sink.write(part, resolve));
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
  // In the login shell if that is the right one, so that the script sees what its start-up files define.
  const isRight = interpreter === "bash" ? loginShell === "bash" : /^(sh|dash|ash)$/.test(loginShell);
  if (isRight) return program;
  const other = `exec "$(${TOOL_PATH}; command -v ${interpreter})" -c "$0" ${interpreter}`;
  return `/bin/sh -c '${other}' '${program}'`; // without `exec`, which may be a function in the login shell
}

/** A script that has been sent to the container. */
interface RunningScript {
  readonly connection: Connection;
  readonly channel: ClientChannel;
  readonly exit: Promise<Exit>;
  readonly preamble: Preamble;
  readonly output: OutputWriter;
  readonly sshErrors: readonly SshError[];
  readonly closed: Promise<void>; // the channel is closed and all output written
  readonly isClosed: () => boolean; // the server has closed the channel
}

/** Opens a channel for a script, sends the script, and passes on its output. */
async function startScript(
  connection: Connection,
  script: Buffer,
  shells: Shells,
  { stop, stdout, stderr }: Pick<Context, "stop"> & OutputSinks,
): Promise<RunningScript> {
  const preamble = new Preamble(`fargate-${randomBytes(16).toString("hex")}`);
  const program = remoteProgram(preamble.mark, connection.target.PassEnvironment);
  const sshErrors: SshError[] = [];
  connection.client.on("error", (error: SshError) => sshErrors.push(error));
  const { channel, exit } = await execute(connection, scriptCommand(program, shells), stop);
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
      connection.socket.destroy(new Error("the server sends more than there is room for"));
  });
  const closing = [channel, errors].map((stream) => new Promise((resolve) => stream.on("close", resolve)));
  const closed = Promise.all(closing).then(() => {
    if (!preamble.shell) output.write(stdout, preamble.held);
    return output.flush();
  });
  return { connection, channel, exit, preamble, output, sshErrors, closed, isClosed: window.isClosed };
}

/** Waits until a script's channel has closed. Gives up on a process that holds it open for too long (DRAIN). */
async function drainOutput(script: RunningScript, { stop, log }: Pick<Context, "stop" | "log">): Promise<void> {
  const { connection, channel, preamble, output, closed } = script;
  const receivedBefore = output.received;
  // Until the holders are known, they are treated as a filter, whose output must not be lost.
  let holders: ReturnType<typeof findPipeHolders>;
  const runCommand = (program: string) => ask(connection, program, stop, { within: DRAIN.background });
  for (let waited = 0, quiet = 0, limit: number = DRAIN.filter; waited < limit; ) {
    const { received } = output;
    const inBackground = holders?.filter === false;
    if ((await Promise.race([closed.then(() => true), delay(DRAIN.tick)])) === true || stop.aborted) return;
    // Time does not count while the sinks accept the rest of the script's output.
    if (output.unwritten > 0 && output.received - receivedBefore < MAX_BUFFERED) continue;
    waited += DRAIN.tick;
    quiet = output.received === received ? quiet + DRAIN.tick : 0;
    if (inBackground && quiet >= DRAIN.silence) break;
    // The first look comes late: most filters have ended by then.
    if (inBackground || waited % DRAIN.silence !== 2 * DRAIN.tick) continue;
    const asked = performance.now();
    const listing = runCommand("ls -ln /proc/[0-9]*/fd/[0-2] 2>/dev/null").catch(() => "");
    holders = findPipeHolders(await Promise.race([closed.then(() => ""), listing]), preamble.pipes);
    waited += Math.round((performance.now() - asked) / DRAIN.tick) * DRAIN.tick;
    if (holders?.filter !== false) continue;
    // The filter may have ended just now: this leaves time for its last output.
    limit = Math.max(DRAIN.background, waited + DRAIN.silence);
    quiet = Math.min(quiet, 2 * DRAIN.tick);
  }
  if (holders?.filter !== false && !script.isClosed())
    log.warn("a process holds the script's output open after 10 s: what else it writes is lost");
  for (const stream of [channel, channel.stderr]) stream.removeAllListeners("data");
  await output.flush();
  if (!holders?.paths.length) return;
  // Something must go on reading the pipes; otherwise SIGPIPE would end the background process.
  const reader = `for f in ${holders.paths.join(" ")}; do { cat <&3 >/dev/null 2>&1 & } 3<"$f"; done`;
  await runCommand(reader).catch(() => {});
}

/** Waits until a script has ended and its output is written. @throws {Failure} if the shell could not read all of it */
async function outcomeOf(script: RunningScript, context: Pick<Context, "stop" | "log">): Promise<Outcome> {
  const { connection, preamble, sshErrors } = script;
  const status = await script.exit;
  if (status === undefined) {
    await script.closed;
    await sleep(50); // a lost connection closes the channel first
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

/** Terminates a cancelled script, waits up to 1 s for its last output, and warns if it may still run. */
async function cancelScript({ connection, preamble, exit, closed }: RunningScript, log: Logger): Promise<void> {
  const { shell } = preamble;
  if (!shell) return;
  log.debug("terminating the script's session {session}", { session: shell.session });
  const result = await terminate(connection, shell);
  await Promise.race([closed, sleep(1_000)]);
  const hasExited = (await Promise.race([exit, undefined])) !== undefined; // by itself, at the same moment
  if (result !== "terminated" && !(result === "not found" && hasExited))
    log.warn("the script may still run in the container: {result}", { result });
}

/**
 * Runs a script over a connection and passes on its output. If `stop` aborts, terminates the script first.
 * @returns how it ended; death by signal n counts as 128 + n, as in a shell
 * @throws {Failure} if the container's shell cannot take the script; the reason of `stop` if that aborts
 */
export async function runScript(
  connection: Connection,
  script: Buffer,
  shells: Shells,
  context: Pick<Context, "stop" | "log"> & OutputSinks,
): Promise<Outcome> {
  const { stop, log } = context;
  if (script.includes(0)) throw new Failure("system", "the script has NUL characters, which no shell can take");
  const running = await startScript(connection, script, shells, context);
  const aborted = Promise.withResolvers<undefined>();
  const ended = Promise.race([outcomeOf(running, context), aborted.promise]);
  const outcome = await withAbort(stop, () => aborted.resolve(undefined), ended);
  if (outcome && !stop.aborted) return outcome;
  await cancelScript(running, log);
  connection.client.destroy();
  throw stop.reason;
}

// 10. Stages ----------------------------------------------------------------------------------------------

const recordPath = ({ config, job }: Context): string => join(config.TaskMetadata.Directory, `${job.stem}.json`);
const startedBy = ({ config, job }: Context): string =>
  `fargate-${managerId(config.TaskMetadata.Directory)}-${job.hash.slice(0, 32)}`;

/** The `config` stage's answer. builds_dir and cache_dir are left to the runner's config.toml. */
export function configAnswer(job: Job | undefined, host = hostname()): string {
  const name = job ? host.replace(/[^A-Za-z0-9.-]/g, "") : ""; // the runner puts it into a script, in double quotes
  return JSON.stringify({ driver: { name: "fargate", version: VERSION }, hostname: name });
}

/** The operator's own key, if it can be read. */
async function readOperatorKey({ config: { SSH }, log }: Context): Promise<KeyPair | undefined> {
  try {
    return SSH.PrivateKeyPath ? await keyPairOf(fs.readFileSync(SSH.PrivateKeyPath, "utf8")) : undefined;
  } catch (error) {
    const told = { path: SSH.PrivateKeyPath, reason: reasonOf(error) };
    log.warn("PrivateKeyPath {path} cannot be used: {reason}; a key is made for this job instead", told);
  }
}

/** Warns if the runner's time limits are too short for cancelled scripts. Its CONFIG_FILE names its config.toml. */
function checkRunnerTimeouts({ config, env, log }: Context): void {
  const needed = config.SSH.CancelGracePeriod + 10;
  type Custom = { run_exec: string; graceful_kill_timeout?: number };
  type RunnerConfig = { shutdown_timeout?: number; runners: { custom?: Custom }[] };
  try {
    const { runners, shutdown_timeout } = parseToml(fs.readFileSync(`${env.CONFIG_FILE}`, "utf8")) as RunnerConfig;
    for (const { custom } of runners) {
      if (!custom || !fs.existsSync(custom.run_exec) || fs.realpathSync(custom.run_exec) !== process.execPath) continue;
      const graceful_kill_timeout = custom.graceful_kill_timeout || 600;
      const limits = { graceful_kill_timeout, shutdown_timeout: shutdown_timeout || 30 };
      for (const [name, value] of Object.entries(limits)) {
        const told = { limit: `${name} = ${value}`, needed };
        if (value < needed) log.warn("{limit} in the runner's config.toml: it should be {needed} s or more", told);
      }
    }
  } catch {} // this user cannot read it; or CONFIG_FILE names another file, as it may after --config
}

const PREPARE_SHUTDOWN_MS = 4_500; // from SIGTERM until prepare has ended
const RUN_TASK_GRACE_MS = 3_000; // of these, for RunTask's answer

/** Logs what prepare notices before it starts a task: what has no effect, and settings that do not fit. */
function checkJob(context: Context): void {
  const { config, job, log, env } = context;
  const noEffect = "image: and services: have no effect; choose a task definition with FARGATE_TASK_DEFINITION instead";
  if (job.unused?.length) log.warn(`${noEffect}: {names}`, { names: job.unused.join(", ") });
  const unread = unusedVariables(env).sort((a, b) => Number(!a.meant) - Number(!b.meant));
  for (const { name, meant } of unread.slice(0, 20))
    if (meant) log.warn("nothing reads the job's variable {name}; did you mean {meant}?", { name, meant });
    else log.debug("nothing reads the job's variable {name}", { name });
  if (!config.Fargate.AllowedTaskDefinitions)
    log.debug("AllowedTaskDefinitions is not set: a job's variable may name any task definition");
  checkRunnerTimeouts(context);
}

/** The `prepare` stage: starts the job's task and returns when a login to it works. */
export async function prepare(context: Context): Promise<void> {
  const { config, job, log, now, stop, refusal } = context;
  if (refusal) throw new Failure("build", refusal);
  checkJob(context);
  const warning = openDirectory(config.TaskMetadata.Directory);
  if (warning) log.warn("{warning}", { warning });
  const removeLock = createLock(config.TaskMetadata, job.stem, "prepare");
  const other = findOtherPrepare(context);
  const leave = new AbortController();
  stop.addEventListener("abort", () => setTimeout(() => leave.abort(stop.reason), PREPARE_SHUTDOWN_MS));
  try {
    if (other) throw new Failure("system", `another prepare of this job runs, as process ${other.pid}`);
    await releaseTask(context, stop); // an earlier attempt may have died without its cleanup
    const own = await readOperatorKey(context); // stays where it is, and out of the record
    const key = own ?? (await makeKeyPair(config.SSH.KeyType));
    const aws = new Aws(config.Fargate, context);
    const record = newRecord(context, own ? "" : key.privateKey);
    writeRecord(recordPath(context), record);
    const begun = now();
    try {
      const { host, connection } = await startUntilReady(context, aws, record, key, begun);
      await recordLogin(context, record, host, connection);
      const fields = { host, user: config.SSH.Username, seconds: Math.round((now() - begun) / 1000) };
      log.info("Ready: logged in to {host} as {user} ({seconds} s)", fields);
    } catch (error) {
      // A known task is always stopped. After a signal there is no time to look for an unknown one; cleanup, which
      // follows, does that.
      await undoStart(context, aws, record, record.TaskARN ? leave.signal : stop);
      throw attributeToJob(context, error);
    }
  } finally {
    removeLock();
  }
}

/** Completes the record with what the login has shown, and closes the connection. */
async function recordLogin(context: Context, record: TaskRecord, host: string, connection: Connection): Promise<void> {
  const { log, stop } = context;
  record.ContainerIP = host;
  record.HostKey = connection.hostKey.toString("base64");
  const { warning, ...shells } = await findShells(connection, stop);
  Object.assign(record, shells);
  if (warning) log.warn("{warning}", { warning });
  connection.client.end();
  await sleep(0, stop); // signals are only heard between turns of the event loop
  stop.throwIfAborted();
  updateRecord(context, record);
}

/** Stops the task of a failed prepare and removes its record. A failure to do so is logged: cleanup follows. */
async function undoStart(context: Context, aws: Aws, record: TaskRecord, signal: AbortSignal): Promise<void> {
  try {
    // If the disk is full, the record in memory knows more than the one on disk.
    if (await stopRecordedTask(context, aws, record, signal)) fs.rmSync(recordPath(context), { force: true });
  } catch (failure) {
    const left = `${record.TaskARN || "a task"} is left for cleanup to stop`;
    const reason = failure === context.stop.reason ? left : reasonOf(failure);
    context.log.error("{reason}", { reason });
  }
}

/** Another live prepare of this job. */
const findOtherPrepare = ({ config, job, wallTime }: Context) =>
  readLocks(config.TaskMetadata, wallTime())
    .filter(({ stem, stage, lives }) => stem === job.stem && stage === "prepare" && lives)
    .find(({ pid, identity }) => pid !== process.pid || identity !== identityOf("self"));

function newRecord(context: Context, privateKey: string): TaskRecord {
  const { Cluster, Region } = context.config.Fargate;
  const PrivateKey = Buffer.from(privateKey).toString("base64");
  const task = { Cluster, Region, StartedBy: startedBy(context), ClientTokens: [], Unanswered: false };
  const login = { HostKey: "", Interpreter: "sh", LoginShell: "" } as const;
  const times = { Deadline: 0, UpdatedAt: Math.floor(context.wallTime() / 1000) };
  return { Version: RECORD_VERSION, TaskARN: "", ContainerIP: "", PrivateKey, ...task, ...login, ...times };
}

/** Writes a record, if given. @throws {Failure} if the old one is gone: nobody would stop a task started after that */
function updateRecord(context: Context, record?: TaskRecord): void {
  const path = recordPath(context);
  if (!fs.existsSync(path)) throw new Failure("system", "the job was cleaned up while prepare ran");
  if (record) writeRecord(path, record);
}

/** Where to start a task: all subnets, then each alone (the first one last), then the same with the fallback. Pure. */
function placements(f: Config["Fargate"]) {
  const subnets = f.Subnets ?? [f.Subnet as string];
  const each = [...subnets.slice(1), ...subnets.slice(0, 1)].map((subnet) => [subnet]);
  const where = subnets.length > 1 ? [subnets, ...each] : [subnets];
  const { LaunchType, CapacityProviderStrategy, FallbackCapacityProviderStrategy: fallback } = f;
  const how = [{ LaunchType, CapacityProviderStrategy }];
  if (fallback) how.push({ LaunchType: undefined, CapacityProviderStrategy: fallback });
  return how.flatMap((strategy) => where.map((Subnets) => ({ ...strategy, Subnets })));
}

/** Pause after failed attempts, in ms: 2 s until each placement has been tried, then doubled every round. */
export const startRetryPause = (attempts: number, placements: number): number =>
  Math.min(2_000 * 2 ** (Math.ceil(attempts / placements) - 1), 20_000);

/** Starts a task and waits for a login. Until StartTimeout, tries elsewhere, or again, if capacity is lacking. */
async function startUntilReady(context: Context, aws: Aws, record: TaskRecord, key: KeyPair, begun: number) {
  const { config, log, now, stop } = context;
  const until = begun + config.Fargate.StartTimeout * 1000;
  const places = placements(config.Fargate);
  let tries = 0;
  let reported = -Infinity; // ms, as of `now`
  const placed = () => ({ ...config.Fargate, ...places[tries % places.length] });
  const { TaskDefinition: definition, Cluster: cluster, Region: region } = config.Fargate;
  log.info("Starting a task of {definition} on cluster {cluster} in {region}", { definition, cluster, region });
  const once = async () => {
    const there = { ...context, config: { ...config, Fargate: placed() } };
    tries++;
    await startTask(there, aws, record, key, until);
    const login = await untilReady(context, aws, record, key, begun);
    if (tries > 1) log.info("Attempt {tries} to start a task has succeeded", { tries });
    return login;
  };
  const again = (error: unknown) => {
    const { operation, problem } = causeOf(error);
    // After an unanswered start, or any other failure, there may be a task already.
    const noTask = !record.Unanswered && (operation === "ecs:RunTask" || operation === STOPPED);
    if (stop.aborted || !noTask || !problem || !(problem in TRANSIENT) || now() >= until) return false;
    const { Subnets, CapacityProviderStrategy } = placed();
    const strategy = CapacityProviderStrategy?.map((provider) => provider.CapacityProvider).join(" and ");
    const where = `${Subnets?.join(", ")}${strategy ? ` with ${strategy}` : ""}`;
    const due = now() >= reported + 60_000;
    if (due) reported = now();
    log[due ? "warn" : "debug"]("{reason}; trying again in {where}", { reason: reasonOf(error), where });
    return true;
  };
  const least = () => startRetryPause(tries, places.length);
  return retry(once, { until, again, now, signal: stop, most: 0, least });
}

// Starts the task, with the public key and the deadline if its definition accepts them. The record is written before
// each call and after its answer, so that a task whose answer is lost can be found.
async function startTask(context: Context, aws: Aws, record: TaskRecord, key: KeyPair, until: number): Promise<void> {
  const { config, job, log, wallTime, stop } = context;
  const { StartTimeout, DeadlineMargin } = config.Fargate;
  const runTask = async (environment?: Record<string, string>) => {
    const clientToken = randomUUID();
    record.TaskARN = "";
    record.ClientTokens.push(clientToken);
    const input = runTaskInput(config, { startedBy: record.StartedBy, clientToken }, environment);
    const onSend = () => {
      record.UpdatedAt = Math.floor(wallTime() / 1000);
      updateRecord(context, { ...record, Unanswered: true });
    };
    const again = (error: unknown) => {
      record.Unanswered ||= causeOf(error).mayHaveStarted === true;
      return isRetryable(error);
    };
    const arn = await aws.runTask(input, { until, again, onSend, signal: stop, grace: RUN_TASK_GRACE_MS });
    record.Unanswered = false;
    if (arn instanceof Failure) throw arn;
    record.TaskARN = arn;
    updateRecord(context, record);
  };

  stop.throwIfAborted();
  record.Deadline = Math.ceil(wallTime() / 1000 + StartTimeout + job.timeout + DeadlineMargin);
  const deadline = { FARGATE_DEADLINE: String(record.Deadline) };
  const shared =
    "with PrivateKeyPath all tasks accept the same key; remove the setting, unless the image ignores SSH_PUBLIC_KEY";
  const accepted = () => record.PrivateKey || log.warn(shared);
  await runTask({ SSH_PUBLIC_KEY: key.publicKey, ...deadline }).then(accepted, (error) => {
    const { problem } = causeOf(error);
    const isRefused = problem === "container" || problem === "secret";
    if (!isRefused || record.PrivateKey || record.Unanswered) throw error;
    log.info("The task definition does not accept SSH_PUBLIC_KEY from the driver; starting the task without it");
    return runTask(problem === "secret" ? deadline : undefined);
  });
}

/** If a variable of the job has decided the setting that is at fault, the failure is the job's. */
function attributeToJob({ config, jobOverrides }: Context, error: unknown): unknown {
  const { problem = "" } = causeOf(error);
  const setting =
    problem in DEFINITION_FAULTS ? "TaskDefinition" : problem in PLATFORM_FAULTS ? "PlatformVersion" : undefined;
  if (!setting || !jobOverrides.includes(setting)) return error;
  const choice = `${VARIABLES[setting]} of this job, ${config.Fargate[setting]},`;
  return new Failure("build", `${choice} cannot be used: ${reasonOf(error)}`, causeOf(error));
}

// For how long the server may refuse the key before prepare gives up: an image may install the key late, and OpenSSH
// 9.8 and later rejects every connection for 15 s after three refusals.
const KEY_REFUSAL_MS = 25_000;
// Within this time of hearing from a task, its address cannot have been reassigned: a new task takes longer to
// start. After that, a task with the same host key may answer there and accept any key. With PrivateKeyPath, ECS is
// always asked.
const ADDRESS_TRUST_MS = 10_000;

/** What is known of a task that is not ready yet. Times are in ms, as of `now`. */
interface Startup {
  readonly begun: number;
  readonly deadline: number; // StartTimeout after `begun`
  host?: string | undefined; // where to log in; undefined until ECS shows an address
  status?: string; // lastStatus
  health: string; // of the container; HEALTHY if that is not waited for
  usableSince: number; // since when it is RUNNING and healthy; Infinity until then
  lastSeen: number; // when ECS last described it
  refusals: number[]; // when the SSH server refused the key
  lastFailure?: SshFailure; // the most telling failure to log in
}

const stoppedEarly = (task: Task): Failure =>
  new Failure("system", `the task stopped before it was ready: ${explainStop(task)}`, stopCause(task));

/** Describes the task once and keeps the result in `startup`. @throws {Failure} if the task has ended or is unhealthy */
async function pollTask(context: Context, aws: Aws, record: TaskRecord, startup: Startup, signal: AbortSignal) {
  const { config, log, now } = context;
  const { WaitForHealthy, EnablePublicIP, UsePublicIP: usePublic = EnablePublicIP } = config.Fargate;
  const { begun, deadline } = startup;
  const asked = now();
  const limits = { until: startup.host ? asked + 10_000 : deadline, signal };
  const [task] = await aws.describeTasks([record.TaskARN], limits).catch((failure): Task[] => {
    if (!startup.host) throw failure;
    log.debug("{reason}", { reason: reasonOf(failure) }); // a login may succeed at any moment: the task has not failed
    return [];
  });
  if (task) startup.lastSeen = asked;
  updateRecord(context);
  if (task?.lastStatus && task.lastStatus !== startup.status) {
    startup.status = task.lastStatus;
    const seconds = Math.round((now() - begun) / 1000);
    const fields = { id: record.TaskARN.split("/").at(-1), status: task.lastStatus, seconds };
    const repeats = task.lastStatus === "PROVISIONING" || isEnding(task); // at each attempt to start a task
    const level = repeats ? "debug" : "info";
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

/** Logs in to the task's address; keeps each failed attempt in `startup`. */
async function logInToTask(context: Context, key: KeyPair, host: string, startup: Startup, signal: AbortSignal) {
  const { config, log, now } = context;
  log.debug("the task's address is {host}", { host });
  let lastMessage = "";
  const onFailure = (failure: SshFailure) => {
    const { why, message } = failure;
    if (message !== lastMessage) log.debug("no login yet: {message}", { message });
    lastMessage = message;
    if (why === "login") startup.refusals.push(now());
    // A refused key tells more than the connections that sshd then rejects for a while.
    if (why === "login" || startup.refusals.length === 0) startup.lastFailure = failure;
  };
  return { host, connection: await logIn({ ...config.SSH, host, privateKey: key.privateKey }, signal, onFailure) };
}

/** The failure of a task that should be ready by now: which limit has passed, and what the task lacks. Pure. */
function latenessOf({ Fargate: f, SSH }: Config, startup: Startup, now: number): Failure | undefined {
  const { host, status, health, usableSince, lastFailure, refusals } = startup;
  const refusedFor = (refusals.at(-1) ?? 0) - (refusals[0] ?? 0);
  let late: string;
  if (usableSince < Infinity && refusedFor > KEY_REFUSAL_MS)
    late = `the task runs, but its SSH server refuses to let ${SSH.Username} in`;
  else if (now > usableSince + SSH.ConnectTimeout * 1000)
    late = `the task runs, but no login worked within ConnectTimeout (${SSH.ConnectTimeout} s)`;
  else if (now > startup.deadline)
    late = `the task was not ready within StartTimeout (${f.StartTimeout} s): it is ${status ?? "unknown to ECS"}`;
  else return undefined;
  const fail = (lack: string, problem: Problem | undefined) => new Failure("system", `${late}${lack}`, { problem });
  if (host) {
    const attempt = lastFailure ? `; the last attempt to log in: ${lastFailure.message}` : "";
    // A task that is not RUNNING has no SSH server yet.
    return fail(attempt, usableSince < Infinity ? (lastFailure?.cause.problem ?? "silent") : undefined);
  }
  if (health !== "HEALTHY")
    return fail(`; the health of ${CONTAINER} is ${health}`, status === "RUNNING" ? "noHealth" : undefined);
  const isPublic = f.UsePublicIP ?? f.EnablePublicIP;
  return fail(`; it has no ${isPublic ? "public " : ""}address`, isPublic ? "publicAddress" : undefined);
}

/**
 * Waits until a login to a new task works. Attempts to log in begin once the task's address is known; from then on,
 * polling only watches for the task's end. @throws {Failure} if the task ends, or is not ready in time
 */
async function untilReady(context: Context, aws: Aws, record: TaskRecord, key: KeyPair, begun: number) {
  const { config, now, stop } = context;
  const deadline = begun + config.Fargate.StartTimeout * 1000;
  const times = { begun, deadline, usableSince: Infinity, lastSeen: -Infinity, refusals: [] };
  const startup: Startup = { ...times, health: "UNKNOWN" };
  const over = new AbortController();
  const signal = AbortSignal.any([stop, over.signal]);
  const ready = Promise.withResolvers<Awaited<ReturnType<typeof logInToTask>>>();
  const watch = async (): Promise<never> => {
    for (let polls = 0; ; polls++) {
      const { host } = startup;
      await pollTask(context, aws, record, startup, signal);
      if (!host && startup.host) ready.resolve(logInToTask(context, key, startup.host, startup, signal));
      const late = latenessOf(config, startup, now());
      if (late) throw late;
      await sleep(pollPause(polls, startup.host !== undefined, Math.random(), aws.throttled), signal);
    }
  };
  try {
    const login = await Promise.race([ready.promise, watch()]);
    if (record.PrivateKey && now() < startup.lastSeen + ADDRESS_TRUST_MS) return login;
    const deleted = { lastStatus: "DELETED", stoppedReason: "ECS no longer knows it" };
    const task = (await aws.describeTask(record.TaskARN, { until: deadline, signal: stop })) ?? deleted;
    if (!isEnding(task)) return login;
    login.connection.client.destroy();
    throw stoppedEarly(task);
  } finally {
    over.abort(new Failure("system", "the task is no longer awaited"));
  }
}

/** The `run` stage: runs a script of the job in its task. @returns the exit code; if not 0, the script said why */
export async function run(context: Context & OutputSinks, scriptPath: string, stage: string): Promise<number> {
  const { env, log, now, wallTime } = context;
  const exitCodeFile = env.BUILD_EXIT_CODE_FILE;
  const forget = () => exitCodeFile && fs.rmSync(exitCodeFile, { force: true });
  withContext("BUILD_EXIT_CODE_FILE of an earlier stage cannot be removed", forget); // the runner would read its code
  const script = readFile(scriptPath, `the script of ${stage},`);
  const path = recordPath(context);
  checkDirectory(context.config.TaskMetadata.Directory);
  const record = readRecord(path);
  if (!record?.ContainerIP)
    throw new Failure(
      "system",
      `there is no task for this job: no finished record ${path}; prepare must succeed first`,
    );
  // If its runner has died, nobody ends this run; it must not keep its task for ever.
  const late = new AbortController();
  const last = now() + Math.max(record.Deadline * 1000 - wallTime(), 60_000);
  const end = () => now() > last && late.abort(new Failure("system", "the job is past its deadline"));
  const timer = setInterval(end, 1_000); // one timer until then would fire early if that is more than 24.8 days away
  const done = createLock(context.config.TaskMetadata, context.job.stem, "run");
  const stop = AbortSignal.any([context.stop, late.signal]);
  const { mtimeMs = 0 } = fs.lstatSync(path, { throwIfNoEntry: false }) ?? {}; // when the previous stage ended
  const seen = now() + mtimeMs - wallTime();
  const code = await runInTask({ ...context, stop }, record, seen, script, stage).finally(() => clearInterval(timer));
  done(); // after a failure, the lock stays with the record, and shows sweep when the job was last worked on
  try {
    fs.lutimesSync(path, new Date(), new Date());
  } catch {} // best effort: without it, the next stage asks ECS
  log.debug("{stage} ended with exit code {code}", { stage, code });
  if (code === 0) return 0;
  try {
    if (exitCodeFile) fs.writeFileSync(exitCodeFile, String(code));
  } catch (error) {
    removeQuietly(exitCodeFile as string); // the runner takes an empty file for a system failure
    log.warn("BUILD_EXIT_CODE_FILE cannot be written; the runner sees 1: {reason}", { reason: reasonOf(error) });
  }
  return exitCode("build", env);
}

/** A stage script, and what running it takes. */
interface ScriptRun {
  readonly context: Context & OutputSinks;
  readonly record: TaskRecord;
  readonly target: SshTarget;
  readonly script: Buffer;
  readonly stage: string;
  readonly shells: Shells;
  readonly lastSeen: number; // when the task was last known to be alive, in ms as of `now`
}

/**
 * Connects, runs the script and returns its exit code. Sends the script again only if no command of it can have run.
 * @throws {Failure} for anything but an exit code
 */
async function runInTask(
  context: Context & OutputSinks,
  record: TaskRecord,
  lastSeen: number,
  script: Buffer,
  stage: string,
) {
  const { config, log, now, stop } = context;
  const shells = { interpreter: interpreterOf(script, record.Interpreter), loginShell: record.LoginShell };
  const { ContainerIP: host, HostKey, PrivateKey } = record;
  // The key that prepare logged in with: the job's own, or the operator's.
  const readKey = () => readFile(config.SSH.PrivateKeyPath ?? "", "PrivateKeyPath");
  const privateKey = (PrivateKey ? Buffer.from(PrivateKey, "base64") : readKey()).toString();
  const hostKey = Buffer.from(HostKey, "base64");
  const target: SshTarget = { ...config.SSH, host, privateKey, hostKey, toSend: script.length };
  const scriptRun: ScriptRun = { context, record, target, script, stage, shells, lastSeen };
  let tries = 0;
  let asked = -Infinity;
  const attempt = async (): Promise<number> => {
    if (++tries > 2 && now() > asked + 5_000) {
      // Do not wait for a task that has ended: each later stage would take the whole ConnectTimeout.
      asked = now();
      await verifyTask(scriptRun);
    }
    return runOnce(scriptRun);
  };
  const again = (error: unknown) => {
    const isRetryable = error instanceof SshFailure && (error.why === "unreachable" || error.why === "unverified");
    if (isRetryable) log.debug("{stage}: {reason}; trying again", { stage, reason: reasonOf(error) });
    return isRetryable;
  };
  const until = now() + config.SSH.ConnectTimeout * 1000;
  return retry(attempt, { until, again, now, signal: stop }).catch(async (error) => {
    if (stop.aborted || !(error instanceof SshFailure)) throw error;
    const notBegun = `${stage} did not begin: ${reasonOf(error)}`;
    if (error.why !== "unreachable") throw new Failure("system", notBegun, error.cause);
    const { says, cause } = await describeTaskState(context, record, 10_000);
    throw new Failure("system", `${notBegun}; ${says}`, { problem: cause.problem ?? error.cause.problem });
  });
}

/** Asks ECS about the task. @returns why its state is unknown, if it is. @throws {Failure} if it has ended */
async function verifyTask({ context, record, stage }: ScriptRun): Promise<SshFailure | undefined> {
  const { ended, says, cause } = await describeTaskState(context, record, 0);
  if (ended) throw new Failure("system", `${stage} did not begin: ${says}`, cause);
  return ended === undefined ? new SshFailure("unverified", says, cause) : undefined;
}

/** Connects once and runs the script. @throws {SshFailure} if no command of the script can have run */
async function runOnce(scriptRun: ScriptRun): Promise<number> {
  const { context, record, target, script, stage, shells, lastSeen } = scriptRun;
  const connection = await connect(target, MAX_SILENCE_MS, context.stop);
  try {
    const isTrusted = record.PrivateKey && Math.abs(context.now() - lastSeen) <= ADDRESS_TRUST_MS;
    const unverified = isTrusted ? undefined : await verifyTask(scriptRun);
    if (unverified) throw unverified;
    const outcome = await runScript(connection, script, shells, context);
    if (outcome.ended === "lost") {
      if (!outcome.begun) throw new SshFailure("unreachable", outcome.reason);
      // ECS may learn of the end some seconds late. Unanswered keep-alives have taken longer than that.
      const { says, cause } = await describeTaskState(context, record, outcome.wasSilent ? 0 : 10_000);
      const lost = `the connection to the container was lost while ${stage} ran: ${outcome.reason}; ${says}`;
      throw new Failure("system", lost, cause);
    }
    if (outcome.code === 137) await explainKill(context, record, connection, stage);
    return outcome.code;
  } finally {
    connection.client.end();
  }
}

/** Exit code 137 is death by SIGKILL; the log says if that was for lack of memory. */
async function explainKill(context: Context, record: TaskRecord, connection: Connection, stage: string): Promise<void> {
  // The counters of both versions of control groups; the container may well live on.
  const counters = "cat /sys/fs/cgroup/memory.events /sys/fs/cgroup/memory/memory.oom_control 2>/dev/null";
  const counted = ask(connection, counters, context.stop).catch(() => "");
  const fate = await describeTaskState(context, record, 0);
  const isOfTask = fate.cause.problem === "memory";
  if (!/oom_kill [1-9]/.test(await counted) && !isOfTask) return;
  const says = isOfTask ? fate.says : "the kernel killed processes in this container because memory ran out";
  context.log.error("{stage} ended with exit code 137: {says}", { stage, says });
  context.log.error("what to do: {advice}", { advice: ADVICE.memory });
}

// What ECS says about a record's task; `ended` is undefined if that is not known. ECS may learn the exit codes up to
// 10 s after the end; a task that has not ended is asked about for `patience` ms.
async function describeTaskState(context: Context, record: TaskRecord, patience: number) {
  const { now, stop } = context;
  const aws = new Aws(record, context);
  const begun = now();
  try {
    for (;;) {
      const task = await aws.describeTask(record.TaskARN, { until: now() + 5_000, signal: stop });
      if (!task) return { ended: true, says: "ECS no longer knows the task", cause: {} };
      const ended = isEnding(task);
      const told = task.lastStatus === "STOPPED" || task.containers?.every((c) => c.exitCode !== undefined || c.reason);
      const enough = (ended && told) || now() > begun + (ended ? 10_000 : patience) - 1_500;
      if (enough && ended) return { ended, says: `the task stopped: ${explainStop(task)}`, cause: stopCause(task) };
      const problem = task.lastStatus === "RUNNING" ? ("connection" as const) : undefined;
      if (enough) return { ended, says: `ECS says that the task is ${task.lastStatus}`, cause: { problem } };
      await sleep(1_500, stop);
    }
  } catch (error) {
    stop.throwIfAborted();
    return { ended: undefined, says: `the task's state is unknown: ${reasonOf(error)}`, cause: causeOf(error) };
  }
}

const STOP_RETRY_MS = 60_000; // for how long stopping a task is tried again
const LIST_LAG_MS = 30_000; // for how long an unanswered RunTask's task is looked for: lists are eventually consistent
const PREPARE_WAIT_MS = 30_000; // for how long cleanup waits for a prepare of its job that still runs
// The `cleanup` stage: stops the job's task and removes its record. Works without a record (by the task's startedBy),
// when repeated, beside a live prepare, which ends when its record is gone, and in a directory that `checkDirectory`
// refuses: only this user can write a record that is believed, and a task costs money.
export async function cleanup(given: Context): Promise<void> {
  const context: Context = { ...given, warned: new Set() };
  const { config, job, log, now } = context;
  const { Directory } = config.TaskMetadata;
  if (!fs.existsSync(Directory))
    return log.warn("{Directory} does not exist: no task was started, or the records are lost", { Directory });
  const until = now() + PREPARE_WAIT_MS;
  // Looked for before its record: a prepare that has ended by now has recorded what it started.
  const first = findOtherPrepare(context);
  for (let busy = first; busy; busy = findOtherPrepare(context)) {
    log.debug("prepare still runs, as process {pid}", { pid: busy.pid });
    await releaseTask(context);
    const still = `prepare of this job still runs, as process ${busy.pid}: end it, and clean up again`;
    if (now() > until) throw new Failure("system", still);
    await sleep(250);
  }
  const isKnown = await releaseTask(context);
  // A prepare may have written a record, and sent RunTask, meanwhile.
  if ((first || !isKnown) && fs.existsSync(join(Directory, ".manager-id")))
    await stopTasksStartedBy(context, new Aws(config.Fargate, context), startedBy(context), { until: now() });
  readLocks(config.TaskMetadata, context.wallTime()); // removes the locks of dead processes
  // What a killed process was writing; it may hold a key.
  const isTemporary = (name: string) => name.startsWith(`${job.stem}.json.`) && name.endsWith(".tmp");
  for (const name of fs.readdirSync(Directory).filter(isTemporary)) fs.rmSync(join(Directory, name), { force: true });
}

/** The fields needed to stop a task. */
type TaskReference = Pick<TaskRecord, "TaskARN" | "Cluster" | "Region" | "StartedBy" | "Unanswered" | "UpdatedAt">;
// Stops the task of this job's record, then removes the record; it stays if that fails. Returns false if there is none.
// `signal` ends it: prepare, which begins with this, must obey SIGTERM.
async function releaseTask(context: Context, signal?: AbortSignal): Promise<boolean> {
  const { config, job, log, now } = context;
  const { Region, Cluster } = config.Fargate;
  const path = recordPath(context);
  const stop = (known: TaskReference) => stopRecordedTask(context, new Aws(known, context), known, signal);
  let trace: TaskReference;
  try {
    const record = readRecord(path);
    if (!record) return false;
    trace = record;
    try {
      // If this process dies, sweep stops the task without waiting for its deadline.
      if (record.Deadline > 1) writeRecord(path, { ...record, Deadline: 1 });
    } catch {} // a full disk is no reason to let a task run
  } catch (error) {
    log.warn("{reason}; looking for the task by its name", { reason: reasonOf(error) });
    const own = { TaskARN: "", Cluster, Region, StartedBy: "", Unanswered: true, UpdatedAt: 0, ...salvageRecord(path) };
    // Others could have written this: it counts only if ECS confirms that the task is this job's.
    const named = { ...own, ...salvageRecord(path, 0) };
    const describe = () => new Aws(named, context).describeTask(named.TaskARN, { until: now() + 5_000, signal });
    const claimed = own.TaskARN || !named.TaskARN ? undefined : await describe();
    const isOurs = own.TaskARN || claimed?.startedBy?.endsWith(`-${job.hash.slice(0, 32)}`);
    // What the record still names is stopped first: the manager's identity may be unusable as well.
    if (isOurs) await stop({ ...named, Unanswered: false });
    trace = { ...own, TaskARN: "", StartedBy: startedBy(context) };
  }
  const left = `its task is stopped, but the record ${path} cannot be removed`;
  if (await stop(trace)) withContext(left, () => fs.rmSync(path, { force: true }));
  return true;
}

/** Stops a record's task; looks for one that may have been started without an answer. @returns as stopTasksStartedBy */
async function stopRecordedTask(
  context: Context,
  aws: Aws,
  record: TaskReference,
  signal?: AbortSignal,
): Promise<boolean> {
  const { job, now, wallTime } = context;
  const young = now() + record.UpdatedAt * 1000 - wallTime() + LIST_LAG_MS;
  if (record.TaskARN) await aws.stopTask(record.TaskARN, job.title, { until: now() + STOP_RETRY_MS, signal }, young);
  return !record.Unanswered || stopTasksStartedBy(context, aws, record.StartedBy, { until: young, signal });
}

// Stops every task started under a name; looks again until `until` while there is none. Returns false, with a warning,
// if the host may not look: the official driver's permissions lack ecs:ListTasks.
async function stopTasksStartedBy(context: Context, aws: Aws, name: string, { until, signal }: Limits) {
  const { job, log, now, warned } = context;
  const latest = Math.min(until, now() + LIST_LAG_MS); // also when the clock has been set back
  for (;;) {
    const limits = { until: now() + STOP_RETRY_MS, signal };
    const tasks = await aws.listTasks(name, limits).catch((error) => {
      if (causeOf(error).problem !== "accessDenied") throw error;
      const unknown = "whether a task started by {name} is left could not be looked up: {reason}";
      if (!warned?.has(name)) log.warn(unknown, { name, reason: reasonOf(error) });
      warned?.add(name);
    });
    if (!tasks) return false;
    // Lists may go on showing a task of an earlier try that has been stopped.
    const known = await aws.describeTasks(tasks, limits).catch((): Task[] => []);
    for (const task of tasks) await aws.stopTask(task, job.title, limits);
    if (tasks.length > known.filter(isEnding).length || now() + 2_000 > latest) return true;
    await sleep(2_000, signal);
  }
}

// 11. For operators ---------------------------------------------------------------------------------------

const SWEEP_TASKS_AFTER = 600; // seconds; a task's record may just be being written or removed
const SWEEP_RECORDS_AFTER = 3_600; // seconds; a record may be of a task that ECS does not show yet
const ABANDONED = "its job is abandoned";
/** `manager`: another manager's id, whose tasks count as this one's: its host is gone, and its records with it. */
export type SweepOptions = Readonly<{ dryRun: boolean; json: boolean; manager?: string | undefined }>;

/** A task of this driver, whichever manager started it. Times are in epoch seconds. */
interface SweptTask extends Readonly<Record<"taskArn" | "startedBy", string>> {
  readonly createdAt: number;
  readonly deadline: number; // as in its variables or its record, else createdAt + MaxTaskAge
  readonly why?: string; // why it is to be stopped; undefined for one that is left alone
}

export interface SweepReport extends Readonly<Record<"stopped" | "left", SweptTask[]>> {
  readonly dryRun: boolean;
  readonly removedRecords: string[]; // file names
  readonly problems: string[];
}

/** The records of a directory, as far as they can be read. `job`: as in `startedBy`; `mtimeMs`: when a stage ended */
function readRecords(directory: string) {
  const read = (path: string): Partial<TaskRecord> => {
    try {
      return readRecord(path) ?? {};
    } catch {
      return salvageRecord(path, 0); // enough to ask whether the task runs
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

/** A look at the clock and the directory of records. */
interface Snapshot {
  readonly time: number; // epoch seconds
  readonly uptime: number; // seconds since the host's last boot
  readonly records: readonly ({ name: string; job: string; mtimeMs: number } & Partial<TaskRecord>)[];
  readonly processes: ReturnType<typeof readLocks>;
}

/** The rules by which sweep judges a task. */
interface SweepRules extends Pick<Config["Fargate"], "MaxTaskAge" | "AbandonedAfter"> {
  readonly managers: readonly (string | undefined)[]; // ids of the managers whose tasks are this host's own
  readonly canLock: boolean; // if not, as on a full disk, live jobs have no locks, and none counts as abandoned
}

const processesOf = ({ processes }: Snapshot, job: string) =>
  processes.filter(({ stem }) => stem.slice(-64, -32) === job);
const isInUse = (snapshot: Snapshot, job: string) => processesOf(snapshot, job).some(({ lives }) => lives);

/** Judges a task of this driver: whether it is orphaned, and when its job last showed a sign of life. Pure. */
export function judgeTask({ taskArn = "", startedBy = "", ...task }: Task, snapshot: Snapshot, rules: SweepRules) {
  const { time } = snapshot;
  const job = startedBy.slice(-32);
  const isOwn = rules.managers.includes(startedBy.split("-")[1]);
  const record = isOwn ? snapshot.records.find((record) => record.job === job) : undefined;
  const createdAt = Math.floor(task.createdAt ? task.createdAt.getTime() / 1000 : time);
  const variables = task.overrides?.containerOverrides?.flatMap((container) => container.environment ?? []);
  const fromTask = Number(variables?.find(({ name }) => name === "FARGATE_DEADLINE")?.value);
  const known = Math.min(fromTask > 0 ? fromTask : Infinity, record?.Deadline || Infinity);
  const deadline = Math.floor(Number.isFinite(known) ? known : createdAt + rules.MaxTaskAge);
  const touches = processesOf(snapshot, job).map(({ mtimeMs }) => mtimeMs);
  const lastSign = Math.max(record?.mtimeMs ?? Infinity, ...touches) / 1000; // epoch seconds
  const isIdle = rules.canLock && lastSign < time - Math.min(snapshot.uptime, rules.AbandonedAfter);
  const isLost = isOwn && !record && time > createdAt + SWEEP_TASKS_AFTER;
  let why: string | undefined;
  if (isOwn && isInUse(snapshot, job)) why = undefined;
  else if (isLost) why = "its record is gone";
  else if (time > deadline) why = "it is past its deadline";
  else if (isIdle) why = ABANDONED;
  const judged: SweptTask = { taskArn, startedBy, createdAt, deadline, ...(why !== undefined && { why }) };
  return { lastSign, task: judged };
}

/** What the steps of one sweep share. */
interface Sweep {
  readonly context: BaseContext;
  readonly aws: Aws;
  readonly tasks: readonly Task[]; // of this driver, whichever manager started them
  readonly rules: SweepRules;
  readonly report: SweepReport;
  readonly hasDirectory: boolean;
  readonly look: () => Snapshot;
  readonly limits: () => Limits;
  readonly attempt: (action: () => Promise<void>) => Promise<void>; // adds a failure to the report's problems
}

/**
 * Stops what jobs have left behind in the cluster: of this manager, tasks whose record is gone, and tasks whose job no
 * process has worked on for AbandonedAfter or since the last boot; of any manager, tasks past their deadline. Then
 * removes old records whose tasks are gone. Never touches other programs' tasks, nor jobs with a live stage.
 * @throws {Failure} if the cluster cannot be listed; any other failure is one of the report's problems
 */
export async function sweep(context: BaseContext, { dryRun, manager }: SweepOptions): Promise<SweepReport> {
  const { config, log, now, wallTime, stop } = context;
  const { MaxTaskAge, AbandonedAfter } = config.Fargate;
  const { Directory } = config.TaskMetadata;
  checkDirectory(Directory);
  const limits = () => ({ until: now() + STOP_RETRY_MS, signal: stop });
  const aws = new Aws(config.Fargate, context);
  const report: SweepReport = { dryRun, stopped: [], left: [], removedRecords: [], problems: [] };
  const attempt = async (action: () => Promise<void>) => {
    stop.throwIfAborted();
    await action().catch((error) => {
      stop.throwIfAborted();
      report.problems.push([reasonOf(error), adviceFor(causeOf(error))].filter(Boolean).join("; what to do: "));
    });
  };
  // Records are read after the tasks: a listed task without a record has lost it.
  const listed = await aws.describeTasks(await aws.listTasks(undefined, limits()), limits());
  const tasks = listed.filter((task) => STARTED_BY.test(task.startedBy ?? ""));
  const hasDirectory = fs.existsSync(Directory);
  const hasIdentity = hasDirectory && fs.existsSync(join(Directory, ".manager-id"));
  const managers = [manager, hasIdentity ? managerId(Directory) : undefined];
  const look = (): Snapshot => ({
    time: wallTime() / 1000,
    uptime: uptime(),
    records: hasDirectory ? readRecords(Directory) : [],
    processes: hasDirectory ? readLocks(config.TaskMetadata, wallTime()) : [],
  });
  let canLock = false;
  await attempt(async () => {
    canLock = hasDirectory && AbandonedAfter > 0 && probeLock(Directory);
  });
  const rules = { MaxTaskAge, AbandonedAfter, managers, canLock };
  const shared: Sweep = { context, aws, tasks, rules, report, hasDirectory, look, limits, attempt };
  await sweepTasks(shared);
  await sweepRecords(shared);
  sweepTemporaryFiles(shared);
  look(); // removes the locks of dead processes
  log.debug("sweep left {left} tasks alone", { left: report.left.length });
  return report;
}

/** Whether a lock can be made. @throws {Failure} if not */
function probeLock(directory: string): true {
  const probe = join(directory, `.manager-id.${randomBytes(6).toString("hex")}.tmp`);
  const make = () => fs.closeSync(fs.openSync(probe, "wx", 0o600));
  withContext(`no lock can be made in ${directory}, so no job counts as abandoned`, make, "disk");
  fs.rmSync(probe);
  return true;
}

async function stopOrphan({ report, limits }: Sweep, aws: Aws, task: SweptTask): Promise<void> {
  if (!report.dryRun) await aws.stopTask(task.taskArn, `fargate sweep: ${task.why}`, limits());
  report.stopped.push(task);
}

/**
 * Judges each task twice before it is stopped. A clock that is set forward makes every lock look old; between the two
 * looks, live processes touch their locks, or a new stage begins.
 */
async function sweepTasks(shared: Sweep): Promise<void> {
  const { context, aws, tasks, rules, report, look } = shared;
  const first = look();
  const judged = tasks
    .filter((task) => !isEnding(task))
    .map((task) => ({ task, before: judgeTask(task, first, rules) }));
  const isDoubtful = ({ why, startedBy }: SweptTask) =>
    why === ABANDONED || (why && processesOf(first, startedBy.slice(-32)).length > 0);
  if (judged.some(({ before }) => isDoubtful(before.task))) {
    context.log.debug("looking again at tasks that may be abandoned, {seconds} s later", {
      seconds: LOCK_EXPIRY_MS / 1000,
    });
    await sleep(LOCK_EXPIRY_MS, context.stop);
  }
  for (const { task, before } of judged) {
    const after = before.task.why ? judgeTask(task, look(), rules) : before;
    const { why, ...left } = after.task;
    // A touch between the two looks is a sign of life, whatever the time of the clock behind it.
    const isOrphan = why && why === before.task.why && after.lastSign === before.lastSign;
    if (isOrphan) await shared.attempt(() => stopOrphan(shared, aws, after.task));
    else report.left.push(left);
  }
}

/** Removes old records whose tasks are gone. Stops tasks of other clusters that only a record names. */
async function sweepRecords(shared: Sweep): Promise<void> {
  const { context, tasks, rules, report, look, limits } = shared;
  const { Fargate, TaskMetadata } = context.config;
  const isAmong = (all: readonly Pick<Task, "taskArn">[], { taskArn }: Task) =>
    all.some((task) => task.taskArn === taskArn);
  const before = look();
  for (const record of before.records) {
    const { name, job, TaskARN, StartedBy } = record;
    if (before.time < (record.UpdatedAt ?? before.time) + SWEEP_RECORDS_AFTER || isInUse(before, job)) continue;
    await shared.attempt(async () => {
      const aws = new Aws({ ...Fargate, ...record }, context);
      const listed = !TaskARN && StartedBy ? await aws.listTasks(StartedBy, limits()) : [];
      const known = TaskARN && (await aws.describeTask(TaskARN, limits()));
      const named = known ? [known] : await aws.describeTasks(listed, limits());
      const running = [...named, ...tasks.filter(({ startedBy }) => startedBy?.endsWith(job))].filter(
        (task) => !isEnding(task) && !isAmong(report.stopped, task),
      );
      // A task of the configured cluster has been judged above; one elsewhere is not looked at twice.
      const elsewhere = running.filter((task) => !isAmong(tasks, task));
      for (const { task } of elsewhere.map((task) => judgeTask(task, look(), rules)))
        if (task.why && task.why !== ABANDONED) await stopOrphan(shared, aws, task);
      // A prepare makes its lock before its record. If its record is removed here, it notices, and stops its task.
      const now = look();
      const { UpdatedAt } = now.records.find((record) => record.name === name) ?? {};
      if (running.length > 0 || isInUse(now, job) || UpdatedAt !== record.UpdatedAt) return;
      if (!report.dryRun) fs.rmSync(join(TaskMetadata.Directory, name), { force: true });
      report.removedRecords.push(name);
    });
  }
}

/** Removes temporary files of writes that were cut off long ago, and those of removals by an earlier version. */
function sweepTemporaryFiles({ context, hasDirectory, report }: Sweep): void {
  const { Directory } = context.config.TaskMetadata;
  for (const name of hasDirectory && !report.dryRun ? fs.readdirSync(Directory) : []) {
    if (!/^([\w-]{1,32}-[0-9a-f]{64}\.json|\.manager-id)\.[0-9a-f]{12}\.(tmp|swept)$/.test(name)) continue;
    const { mtimeMs = Infinity } = fs.lstatSync(join(Directory, name), { throwIfNoEntry: false }) ?? {};
    if (context.wallTime() > mtimeMs + SWEEP_RECORDS_AFTER * 1000) removeQuietly(join(Directory, name));
  }
}

export function formatSweep(report: SweepReport, json: boolean): string {
  if (json) return `${JSON.stringify(report)}\n`;
  const time = (seconds: number) => new Date(seconds * 1000).toISOString().replace(".000", "");
  const would = report.dryRun ? "would be " : "";
  const lines = [
    ...report.stopped.map((task) => `${task.taskArn} ${would}stopped: ${task.why}; created ${time(task.createdAt)}`),
    ...report.removedRecords.map((name) => `${name} ${would}removed: its task is gone`),
    `tasks: ${report.stopped.length} ${would}stopped, ${report.left.length} left alone; ` +
      `records: ${report.removedRecords.length} ${would}removed; problems: ${report.problems.length}`,
  ];
  return lines.map((line) => `${printable(line)}\n`).join("");
}

// 13. Command line ----------------------------------------------------------------------------------------

/** Turns a command's errors into one-line Failures: what is wrong, and what is valid (unless `only` has said it). */
const withErrors = (command: Command): Command =>
  command.exitOverride((error) => {
    if (error.exitCode === 0) throw error; // it has printed the help or the version
    let root = command;
    let path = command.name();
    for (; root.parent; root = root.parent) path = `${root.parent.name()} ${path}`;
    // If a command is missing, commander has printed the help to standard error.
    const message = error.code === "commander.help" ? "no command was given" : error.message;
    const what = `${path}: ${message.replace(/^error: /, "").replace(/\.$/, "")}`;
    if (error.code === "commander.invalidArgument") throw new Failure("system", what.replace(". known: ", "; known: "));
    const known = /option/i.test(error.code)
      ? [...new Set([...root.options, ...command.options])].map((option) => option.long).join(", ")
      : command.commands.map((command) => command.name()).join(", ") || `${path} ${command.usage()}`;
    throw new Failure("system", `${what}; known: ${known}`);
  });

/** Takes a value that fits; `known` says in words what does. */
const only = (known: string, fits: (value: string) => boolean) => (value: string) => {
  if (fits(value)) return value;
  throw new InvalidArgumentError(`known: ${known}`);
};
const oneOfWords = (words: readonly string[]) =>
  only(words.join(", "), (value) => words.includes(value.trim().toLowerCase()));
const managerIdOf = only("12 hex digits, as in the task's startedBy: fargate-<id>-<job>", (id) => MANAGER.test(id));

/** Parses the arguments after the program's name. @returns undefined if they asked for help or version: printed here */
export function parseCommandLine(argv: readonly string[]) {
  const program = withErrors(new Command("fargate"))
    .description("Runs each GitLab CI job in an AWS ECS task of its own on Fargate.")
    .version(`fargate ${VERSION}`, "-v, --version", "print the version")
    .helpOption("-h, --help", "print this help")
    .option("--config <path>", "the configuration file", "config.toml")
    .option("--debug", "same as --log-level debug")
    .option("--log-level <level>", `LogLevel: ${LEVELS.join(", ")}`, oneOfWords(LEVELS))
    .option("--log-format <format>", `LogFormat: ${FORMATS.join(", ")}`, oneOfWords(FORMATS))
    .option("--log-file <path>", "LogFile: log to this file instead of standard error")
    .option("--task-def <definition>", "TaskDefinition: family, family:revision or ARN")
    .option("--platform-version <version>", "PlatformVersion: such as 1.4.0 or LATEST")
    .addHelpText("after", "\nOptions may stand anywhere. They override the job's variables; these override the file.")
    .configureHelp({ showGlobalOptions: true })
    .configureOutput({ writeOut: (text) => writeWhole(1, text), writeErr: (text) => writeWhole(2, text) })
    .configureOutput({ outputError: () => {} })
    .showSuggestionAfterError(false);
  let asked: Command = program;
  const add = (parent: Command, name: string, description: string) =>
    withErrors(parent.command(name).description(description)).action((...args) => {
      asked = args.at(-1);
    });
  const custom = withErrors(program.command("custom").alias("c"));
  custom.description("the stages of GitLab Runner's Custom executor");
  add(custom, "config", "print the driver's name and version for the runner, as JSON").alias("co");
  add(custom, "prepare", "start the job's task and wait until it can be used").alias("p");
  add(custom, "run", "run a script of the job in its task")
    .alias("r")
    .argument("<script>", "path of the script")
    .argument("<stage>", "the runner's name for it, such as build_script");
  add(custom, "cleanup", "stop the job's task").alias("cl");
  add(program, "sweep", "stop tasks that jobs have left behind, and remove their records; for cron or a systemd timer")
    .option("--dry-run", "print what would be done, and do nothing")
    .option("--json", "print the report as one JSON object")
    .option("--manager <id>", "also stop the tasks of this manager, whose host is gone", managerIdOf);
  try {
    program.parse(argv, { from: "user" });
  } catch (error) {
    if (!(error instanceof CommanderError)) throw error;
    return undefined;
  }
  const command = asked.name() as "config" | "prepare" | "run" | "cleanup" | "sweep";
  const sweep: SweepOptions = { dryRun: false, json: false, ...asked.opts<Partial<SweepOptions>>() };
  const { config = "", ...given } = program.opts<Record<string, string | undefined>>();
  const { logFormat: LogFormat, logFile: LogFile, taskDef: TaskDefinition, platformVersion: PlatformVersion } = given;
  const LogLevel = given.debug ? "debug" : given.logLevel;
  const options: Options = { LogLevel, LogFormat, LogFile, TaskDefinition, PlatformVersion };
  return { command, operands: asked.args, config, options, ...(command === "sweep" && { sweep }) };
}

/** Runs one invocation. @returns the process's exit code */
export async function main(argv: readonly string[], env: Environment): Promise<number> {
  let log = openLog({ LogLevel: "info", LogFormat: "text", LogFile: "" });
  const stopping = new AbortController();
  const stopFor = (why: string) => stopping.abort(new Failure("system", why));
  for (const name of ["SIGTERM", "SIGINT", "SIGHUP"]) process.on(name, () => stopFor(`stopped by ${name}`));
  process.on("SIGQUIT", () => {}); // tells the runner to take no further jobs; systemd sends it to the stages as well
  const crash = (error: unknown) => {
    // bun would end with 1, which the runner takes for the job's own failure.
    log.fatal("{reason}", { reason: `a bug in the driver: ${reasonOf(error)}` });
    log.debug("{stack}", { stack: error instanceof Error ? error.stack : undefined });
    process.exit(exitCode("system", env));
  };
  process.on("uncaughtException", crash).on("unhandledRejection", crash);
  try {
    const request = parseCommandLine(argv);
    if (!request) return 0;
    if (request.command === "config") {
      writeWhole(1, `${configAnswer(readJob(env))}\n`);
      return 0;
    }
    const file = readFile(resolve(request.config), "the configuration file");
    const read = readConfig(file.toString(), request.config, request.options, env);
    log = openLog(read.config);
    const now = () => Math.floor(performance.now());
    const signal = stopping.signal;
    const operator: BaseContext = { config: read.config, log, stop: signal, now, wallTime: Date.now, env };
    return await (request.sweep ? runSweep(operator, request.sweep) : runStage(operator, request, read, stopFor));
  } catch (error) {
    const failure = error instanceof Failure ? error : new Failure("system", reasonOf(error));
    const advice = adviceFor(failure.cause);
    const lines = [...failure.message.split("\n"), ...(advice ? [`what to do: ${advice}`] : [])];
    for (const line of lines) log.fatal(line.replace(/[{}]/g, "$&$&")); // no placeholders
    log.debug("{stack}", { stack: error instanceof Error ? error.stack : undefined });
    return exitCode(failure.kind, env);
  }
}

/** The `sweep` command. @returns the exit code */
async function runSweep(context: BaseContext, options: SweepOptions): Promise<number> {
  const report = await sweep(context, options);
  writeWhole(1, formatSweep(report, options.json));
  for (const reason of report.problems) context.log.fatal("{reason}", { reason });
  return report.problems.length > 0 ? exitCode("system", context.env) : 0;
}

type Invocation = NonNullable<ReturnType<typeof parseCommandLine>>;
/** The stages that work on a task: prepare, run and cleanup. @returns the exit code */
async function runStage(
  operator: BaseContext,
  { command, operands }: Invocation,
  { jobOverrides, refusal, warnings }: ReturnType<typeof readConfig>,
  stopFor: (why: string) => void,
): Promise<number> {
  const job = readJob(operator.env);
  if (command === "prepare") for (const warning of warnings) operator.log.warn("{warning}", { warning });
  const none = "there is no job: neither JOB_RESPONSE_FILE nor the CUSTOM_ENV_CI_* variables are set";
  if (!job) throw new Failure("system", none);
  const context: Context = { ...operator, job, jobOverrides, refusal };
  const parent = process.ppid; // once it has ended, nobody reads this stage's result or goes on with the job
  const checkParent = () => process.ppid !== parent && stopFor("the process that started this stage has ended");
  if (command !== "cleanup") setInterval(checkParent, LOCK_TOUCH_MS).unref();
  if (command === "run") {
    const { stdout, stderr } = process; // bun makes these streams when they are first used; no other stage needs them
    for (const stream of [stdout, stderr])
      stream.on("error", (error) => stopFor(`the job's output cannot be written: ${reasonOf(error)}`));
    return run({ ...context, stdout, stderr }, ...(operands as [string, string]));
  }
  await (command === "prepare" ? prepare(context) : cleanup(context));
  return 0;
}

if (import.meta.main) {
  // Unless told not to, bun has already applied .env and bunfig.toml of the working directory. With them, a checkout
  // could redirect signed requests. The compiled program reads neither.
  const isSafe = typeof BUILD === "string" || process.execArgv.includes("--no-env-file");
  const found = isSafe ? [] : fs.readdirSync(".").filter((name) => /^(\.env(\..*)?|\.?bunfig\.toml)$/.test(name));
  if (found.length > 0) {
    const call = `bun --no-env-file --config=/dev/null ${process.argv[1]}`;
    writeWhole(2, `error: bun takes settings from ${printable(found.join(", "))} here; call it as: ${call}\n`);
    process.exit(exitCode("system", process.env));
  }
  main(process.argv.slice(2), process.env).then((code) => process.exit(code));
}
