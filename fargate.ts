#!/usr/bin/env -S bun --no-env-file --config=/dev/null
/**
 * fargate: runs each GitLab CI job in an AWS ECS task of its own on Fargate.
 *
 * GitLab Runner's Custom executor starts this program once for every stage of a job:
 *
 *     fargate custom config                prints who the driver is, as JSON
 *     fargate custom prepare               starts the job's task, waits until a login by SSH works
 *     fargate custom run SCRIPT STAGE      runs one script in the task; many times a job
 *     fargate custom cleanup               stops the task
 *
 * AWS calls      RunTask, DescribeTasks, StopTask; ListTasks when a record is missing or names no task;
 *                EC2 DescribeNetworkInterfaces only to connect to public addresses. Nothing else.
 * Files          reads the configuration file, JOB_RESPONSE_FILE, the stage's script and PrivateKeyPath;
 *                writes <Directory>/<stem>.json (0600, one for each running job), <Directory>/.manager-id,
 *                BUILD_EXIT_CODE_FILE and LogFile.
 * Secrets        the job's private key: in memory and in the record. AWS credentials: in memory of the AWS
 *                SDK only, never written, never sent to a task. Stage scripts hold the job's secrets: they
 *                pass through memory into SSH and are never parsed, logged or stored.
 * Trusted        the configuration file, the runner and its JOB_RESPONSE_FILE (ids, not the author's words),
 *                ECS. Not trusted: CUSTOM_ENV_* variables, and whatever a job's container sends.
 *
 * The sections stand in the order in which a job meets them; each can be read without those below it.
 *
 * @module
 */

import { createHash, generateKeyPairSync, randomBytes, randomUUID } from "node:crypto";
import * as fs from "node:fs";
import { constants as osConstants } from "node:os";
import { join } from "node:path";
import type { Readable, Writable } from "node:stream";
import { setTimeout as delay } from "node:timers/promises";
import type { ECSClient, RunTaskCommandInput, Task } from "@aws-sdk/client-ecs";
import { configureSync, getLogger, type Logger, type LogLevel, type LogRecord } from "@logtape/logtape";
import { Command, CommanderError, InvalidArgumentError } from "commander";
import { distance } from "fastest-levenshtein";
import { parse as parseToml, TomlError } from "smol-toml";
import type { Client, ClientChannel } from "ssh2";
import * as v from "valibot";

/** Set by the build: the package's version and the commit it was built from. */
declare const BUILD_VERSION: string | undefined;
declare const BUILD_REVISION: string | undefined;

/** `version (revision)`; `dev (HEAD)` when run from source. */
export const VERSION =
  typeof BUILD_VERSION === "string" && typeof BUILD_REVISION === "string"
    ? `${BUILD_VERSION} (${BUILD_REVISION})`
    : "dev (HEAD)";

/** The environment variables of a process. */
export type Environment = Readonly<Record<string, string | undefined>>;

// ---------------------------------------------------------------------------------------------------------
// 2. Failures
// ---------------------------------------------------------------------------------------------------------

/**
 * Everything that ends a stage other than success, with whose fault it is: a `build` failure is the job's (the
 * runner does not try again), a `system` failure is ours, the operator's or AWS's.
 */
export class Failure extends Error {
  override name = "Failure";
  constructor(
    readonly kind: "build" | "system",
    message: string,
    options: { cause?: unknown } = {},
  ) {
    super(message, options);
  }
}

/** The exit code that GitLab Runner gave for a kind of failure; 1 and 2 where it gave none. */
export function exitCode(kind: Failure["kind"], env: Environment): number {
  const [name, fallback] =
    kind === "build" ? (["BUILD_FAILURE_EXIT_CODE", 1] as const) : (["SYSTEM_FAILURE_EXIT_CODE", 2] as const);
  const code = Number(env[name]);
  return Number.isInteger(code) && code > 0 && code < 256 ? code : fallback;
}

/** One line for any thrown value, without a stack. */
export function reasonOf(error: unknown): string {
  if (!(error instanceof Error)) return String(error);
  return error.message || ("code" in error ? String(error.code) : error.name);
}

/** Reads a file that must be there. @throws {Failure} naming it as `what` */
function readFile(path: string, what: string): Buffer {
  try {
    return fs.readFileSync(path);
  } catch (error) {
    throw new Failure("system", `${what} ${path} cannot be read: ${reasonOf(error)}`);
  }
}

// ---------------------------------------------------------------------------------------------------------
// 3. Configuration
// ---------------------------------------------------------------------------------------------------------

const LEVELS = ["trace", "debug", "info", "warn", "warning", "error", "fatal", "panic"] as const;
const FORMATS = ["text", "text-simple", "json"] as const;

// The description of a key says what it means and what is allowed; error texts and the README's table use it.
const text = (allowed: string) => v.pipe(v.string(), v.trim(), v.nonEmpty(), v.description(allowed));
const whole = (least: number, most: number, allowed: string) =>
  v.pipe(v.number(), v.integer(), v.minValue(least), v.maxValue(most), v.description(allowed));
const oneOf = <const T extends readonly string[]>(words: T, meaning: string) =>
  v.pipe(
    v.string(),
    v.transform((word) => word.trim().toLowerCase()),
    v.picklist(words.map((word) => word.toLowerCase()) as unknown as { [K in keyof T]: Lowercase<T[K]> }),
    v.description(`${meaning}: ${words.join(", ")}`),
  );
const exactly = <const T extends readonly string[]>(words: T, meaning: string) =>
  v.pipe(v.picklist(words), v.description(`${meaning}: ${words.join(", ")}`));
const listOf = (item: string, most: number) =>
  v.pipe(v.array(text(item)), v.minLength(1), v.maxLength(most), v.description(`a list of 1 to ${most}: ${item}`));
const flag = (meaning: string) => v.pipe(v.boolean(), v.description(`${meaning}: true or false`));

const CapacityProviderSchema = v.object({
  CapacityProvider: text("the capacity provider's name, such as FARGATE or FARGATE_SPOT"),
  Weight: v.optional(whole(0, 1000, "its share of the tasks, a whole number from 0 to 1000"), 1),
  Base: v.optional(whole(0, 100_000, "how many tasks it runs at least, a whole number from 0 to 100000")),
});

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
      EnablePublicIP: v.optional(flag("whether the task gets a public address"), false),
      UsePublicIP: v.optional(flag("whether to connect to the task's public address")),
      PlatformVersion: v.optional(text("a Fargate platform version, such as 1.4.0 or LATEST")),
      LaunchType: v.optional(exactly(["FARGATE", "EC2"], "where the task runs")),
      CapacityProviderStrategy: v.optional(
        v.pipe(
          v.array(CapacityProviderSchema),
          v.minLength(1),
          v.maxLength(20),
          v.check((providers) => providers.some((provider) => provider.Weight > 0)),
          v.description(
            "1 to 20 of {CapacityProvider, Weight, Base}, at least one with a Weight above 0, such as " +
              '[{CapacityProvider = "FARGATE_SPOT", Weight = 1}]',
          ),
        ),
      ),
      EnableExecuteCommand: v.optional(flag("whether ECS Exec may enter the task"), false),
      Tags: v.optional(
        v.pipe(
          v.record(v.string(), v.string()),
          v.check((tags) => Object.keys(tags).length <= 50),
          v.description("a table of at most 50 tags for the task, text = text"),
        ),
        {},
      ),
      PropagateTags: v.optional(exactly(["TASK_DEFINITION", "NONE"], "whose tags the task gets beside its own")),
      StartTimeout: v.optional(
        whole(1, 86_400, "seconds from the start of a task until it must be ready, 1 to 86400"),
        600,
      ),
    }),
    v.forward(
      v.partialCheck(
        [["Subnet"], ["Subnets"]],
        (f) => (f.Subnet === undefined) !== (f.Subnets === undefined),
        "give either Subnet, a subnet ID, or Subnets, a list of 1 to 16",
      ),
      ["Subnet"],
    ),
    v.forward(
      v.partialCheck(
        [["SecurityGroup"], ["SecurityGroups"]],
        (f) => (f.SecurityGroup === undefined) !== (f.SecurityGroups === undefined),
        "give either SecurityGroup, a security group ID, or SecurityGroups, a list of 1 to 5",
      ),
      ["SecurityGroup"],
    ),
    v.forward(
      v.partialCheck(
        [["LaunchType"], ["CapacityProviderStrategy"]],
        (f) => f.LaunchType === undefined || f.CapacityProviderStrategy === undefined,
        "cannot be given together with CapacityProviderStrategy; ECS takes one of the two",
      ),
      ["LaunchType"],
    ),
  ),
  TaskMetadata: v.object({
    Directory: text("the directory for the records of running tasks"),
  }),
  SSH: v.object({
    Username: text("the user to log in as"),
    Port: v.optional(whole(1, 65_535, "the port of the task's SSH server, 1 to 65535"), 22),
    PrivateKeyPath: v.optional(text("a private key to log in with, instead of one made for the job")),
    KeyType: v.optional(oneOf(["ed25519", "rsa"], "the type of the key made for the job"), "ed25519"),
    ConnectTimeout: v.optional(whole(1, 3600, "seconds in which the SSH server must accept a login, 1 to 3600"), 120),
    KeepAliveInterval: v.optional(
      whole(0, 3600, "seconds between signs of life on an idle connection, 0 for none, up to 3600"),
      15,
    ),
  }),
});

/** What a file, the command line and the job's variables come to. */
export type Config = v.InferOutput<typeof ConfigSchema>;

/** Options of the command line, by the name of their setting. Each beats variable and file. */
export interface Options {
  readonly LogLevel?: string | undefined;
  readonly LogFormat?: string | undefined;
  readonly LogFile?: string | undefined;
  readonly TaskDefinition?: string | undefined;
  readonly PlatformVersion?: string | undefined;
}

type Table = Record<string, unknown>;
const isTable = (value: unknown): value is Table =>
  typeof value === "object" && value !== null && !Array.isArray(value) && !(value instanceof Date);

/** What `optional` wraps, or the schema itself. */
const unwrap = (schema: v.GenericSchema): v.GenericSchema =>
  "wrapped" in schema ? (schema.wrapped as v.GenericSchema) : schema;

/** The known keys of a table, or of the tables in a list; undefined where any key will do. */
function entriesOf(schema: v.GenericSchema): Record<string, v.GenericSchema> | undefined {
  const inner = unwrap(schema);
  if ("entries" in inner) return inner.entries as Record<string, v.GenericSchema>;
  return "item" in inner ? entriesOf(inner.item as v.GenericSchema) : undefined;
}

/** Every known key with the tables it stands in, such as `SSH.Port`. */
function* knownKeys(schema: v.GenericSchema = ConfigSchema, path = ""): Generator<string> {
  for (const [key, entry] of Object.entries(entriesOf(schema) ?? {})) {
    yield path + key;
    yield* knownKeys(entry, `${path}${key}.`);
  }
}

/** The known key that an unknown one is most likely meant for, by edit distance in proportion to length. */
function nearestKey(unknown: string): string {
  const wanted = unknown.toLowerCase();
  const far = (key: string) => {
    const name = key.split(".").at(-1)?.toLowerCase() as string;
    return distance(wanted, name) / Math.max(wanted.length, name.length);
  };
  return [...knownKeys()].reduce((best, key) => (far(key) < far(best) ? key : best));
}

/**
 * Gives every key the schema's spelling: the official driver's TOML library matches keys without regard to case,
 * an exact spelling first. Keys that match none are left out, with a warning.
 */
function foldKeys(value: unknown, schema: v.GenericSchema, path: string, unknown: string[]): unknown {
  const entries = entriesOf(schema);
  if (!entries) return value;
  if (Array.isArray(value)) return value.map((item) => foldKeys(item, schema, path, unknown));
  if (!isTable(value)) return value;
  const folded: Table = {};
  for (const [key, item] of Object.entries(value)) {
    const name = Object.hasOwn(entries, key)
      ? key
      : Object.keys(entries).find((n) => n.toLowerCase() === key.toLowerCase());
    if (name === undefined) unknown.push(`unknown key ${path}${key}; the nearest known one is ${nearestKey(key)}`);
    else if (key !== name && Object.hasOwn(value, name))
      unknown.push(`${path}${key} has no effect beside ${path}${name}`);
    else folded[name] = foldKeys(item, entries[name] as v.GenericSchema, `${path}${name}.`, unknown);
  }
  return folded;
}

/** One problem of a configuration: its key, what is wrong, what is expected. */
function describeProblem(issue: v.BaseIssue<unknown>): string {
  const key = v.getDotPath(issue) ?? "";
  if (issue.type === "partial_check") return `${key}: ${issue.message}`;
  let schema: v.GenericSchema = ConfigSchema;
  let expected = "a table";
  for (const { key: step } of issue.path ?? []) {
    schema = entriesOf(schema)?.[String(step)] ?? schema;
    expected = v.getDescription(unwrap(schema)) ?? expected;
  }
  const given = issue.path?.at(-1)?.value;
  const wrong = given === undefined ? "is missing" : `is ${JSON.stringify(given)?.slice(0, 80)}`;
  return `${key} ${wrong}; expected: ${expected}`;
}

/**
 * Merges file, variables and command line into one validated configuration; option beats variable beats file.
 *
 * @param file the configuration file's text
 * @returns the configuration, and a warning for each key of the file that is not known
 * @throws {Failure} naming every problem at once
 */
export function readConfig(
  file: string,
  path: string,
  options: Options,
  env: Environment,
): { config: Config; warnings: string[] } {
  let table: Table;
  try {
    table = parseToml(file.replace(/^\uFEFF/, ""));
  } catch (error) {
    if (!(error instanceof TomlError)) throw error;
    const what = error.message.split("\n")[0]?.replace(/^Invalid TOML document: /, "");
    throw new Failure("system", `${path}, line ${error.line}, column ${error.column}: not TOML: ${what}`);
  }
  const unknown: string[] = [];
  const folded = foldKeys(table, ConfigSchema, "", unknown) as Table;
  // An empty text stands for a missing one, and port 0 for none, as with the official driver.
  const given = (...values: unknown[]) =>
    values.find((value) => value !== undefined && (typeof value !== "string" || value.trim() !== ""));
  const part = (name: string): Table => {
    const table = folded[name] ?? {};
    if (!isTable(table)) return table as Table; // the schema says what is wrong with it
    const entries = Object.entries(table);
    return Object.fromEntries(entries.filter(([key, value]) => value !== "" && !(key === "Port" && value === 0)));
  };
  const fargate = part("Fargate");
  const overrides = {
    TaskDefinition: given(options.TaskDefinition, env.CUSTOM_ENV_FARGATE_TASK_DEFINITION, fargate.TaskDefinition),
    PlatformVersion: given(options.PlatformVersion, env.CUSTOM_ENV_FARGATE_PLATFORM_VERSION, fargate.PlatformVersion),
  };
  const merged: Table = {
    LogLevel: given(options.LogLevel, folded.LogLevel),
    LogFormat: given(options.LogFormat, folded.LogFormat),
    LogFile: given(options.LogFile, folded.LogFile),
    Fargate: isTable(fargate) ? { ...fargate, ...overrides } : fargate,
    TaskMetadata: part("TaskMetadata"),
    SSH: part("SSH"),
  };
  const result = v.safeParse(ConfigSchema, merged);
  if (!result.success) {
    const problems = result.issues.map(describeProblem);
    throw new Failure("system", `${path} cannot be used:\n  ${problems.join("\n  ")}`);
  }
  return { config: result.output, warnings: unknown.map((warning) => `${path}: ${warning}`) };
}

// ---------------------------------------------------------------------------------------------------------
// 4. Logging
// ---------------------------------------------------------------------------------------------------------

/** How log messages are written, and where. */
export type LogSettings = Pick<Config, "LogLevel" | "LogFormat" | "LogFile">;

// logrus' names, which the official driver's files use, to LogTape's.
const LOGTAPE_LEVEL: Record<string, LogLevel> = { warn: "warning", panic: "fatal" };

/** Control characters of ASCII and Latin-1, line ends of Unicode, and marks that turn the direction of writing. */
// biome-ignore lint/suspicious/noControlCharactersInRegex: control characters are what it looks for
const UNPRINTABLE = /[\u0000-\u001f\u007f-\u009f\u2028\u2029\u202a-\u202e\u2066-\u2069]/g;
const escaped = (c: string) => `\\u${c.charCodeAt(0).toString(16).padStart(4, "0")}`;

/** Text from outside must not end a log line, forge another or control a terminal: such characters are escaped. */
export const printable = (value: unknown): string =>
  String(value).replaceAll("\n", " | ").replace(UNPRINTABLE, escaped);

/** One log line in the wanted format, with its line end. */
export function formatRecord(record: LogRecord, format: Config["LogFormat"]): string {
  const message = printable(record.message.join(""));
  const time = `${new Date(record.timestamp).toISOString().slice(0, 19)}Z`;
  if (format === "json") {
    const object = { time, level: record.level, msg: message, ...record.properties };
    return `${JSON.stringify(object).replace(UNPRINTABLE, escaped)}\n`;
  }
  const level = record.level === "info" ? "" : `${record.level === "fatal" ? "error" : record.level}: `;
  return format === "text-simple" ? `${level}${message}\n` : `${time} ${level}${message}\n`;
}

/**
 * Writes all of a text. Standard error may be a full pipe that does not block (bun makes it so): the runner reads it, so
 * it is tried again for up to 5 s, and a log line is no reason to wait longer.
 */
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

/**
 * Makes the one logger. It writes to standard error or to `LogFile`, never to standard output, which belongs to
 * the job. What ends a stage is always shown on standard error too, so that the job log says why.
 */
export function openLog(settings: LogSettings): Logger {
  const toStandardError = (line: string) => writeWhole(2, line);
  let write = toStandardError;
  let trouble: unknown;
  if (settings.LogFile) {
    try {
      const file = fs.openSync(settings.LogFile, "a", 0o600);
      write = (line) => writeWhole(file, line);
    } catch (error) {
      trouble = error;
    }
  }
  const sink = (record: LogRecord) => {
    const line = formatRecord(record, settings.LogFormat);
    try {
      write(line);
      if (write !== toStandardError && record.level === "fatal") toStandardError(line);
    } catch {
      // Nobody reads the log any more (EPIPE) or its disk is full: no reason to leave a task running.
    }
  };
  const lowestLevel = LOGTAPE_LEVEL[settings.LogLevel] ?? (settings.LogLevel as LogLevel);
  configureSync({
    reset: true,
    sinks: { sink },
    loggers: [
      { category: "fargate", sinks: ["sink"], lowestLevel },
      { category: ["logtape", "meta"], sinks: [], lowestLevel: "fatal" },
    ],
  });
  const log = getLogger("fargate");
  if (trouble)
    log.warn("LogFile {file} cannot be written: {reason}; logging to standard error", {
      file: settings.LogFile,
      reason: reasonOf(trouble),
    });
  return log;
}

// ---------------------------------------------------------------------------------------------------------
// 5. The job
// ---------------------------------------------------------------------------------------------------------

/** Who this job is. Every stage of it comes to the same answer, and no other job does. */
export interface Job {
  /** `<label>-<hash>`: names the record. */
  readonly stem: string;
  /** 64 hex digits of SHA-256, what the identity rests on. */
  readonly hash: string;
  /** Ids for AWS's eyes (a StopTask reason), free of words that a job's author could choose. */
  readonly title: string;
}

const JobResponseSchema = v.object({
  id: v.pipe(v.number(), v.safeInteger()),
  job_info: v.object({ project_id: v.pipe(v.number(), v.safeInteger()) }),
  git_info: v.object({ repo_url: v.pipe(v.string(), v.url()) }),
});

/** Reads a JSON file by a schema. Errors name the key and never the value: these files hold tokens and keys. */
function readJson<T extends v.GenericSchema>(path: string, schema: T): v.InferOutput<T> {
  const content = fs.readFileSync(path, "utf8");
  let value: unknown;
  try {
    value = JSON.parse(content);
  } catch {
    throw new Error("it is not JSON");
  }
  const result = v.safeParse(schema, value);
  if (result.success) return result.output;
  throw new Error(`${v.getDotPath(result.issues[0]) ?? "it"} is missing or not as expected`);
}

const sha256 = (value: string) => createHash("sha256").update(value).digest("hex");

/** The runner's short token, for people to recognise a record by; job authors can set it, so it decides nothing. */
function labelOf(env: Environment): string {
  const token = env.CUSTOM_ENV_CI_RUNNER_SHORT_TOKEN ?? "";
  return /^[A-Za-z0-9_-]{1,32}$/.test(token) ? token : "job";
}

/**
 * The job of this process: from `JOB_RESPONSE_FILE` (GitLab Runner 14.1+), whose ids no job author can set. Only
 * where the runner gave none, from the official driver's formula over `CUSTOM_ENV_*`.
 *
 * @returns undefined where there is no job at all (by hand)
 * @throws {Failure} when there is a response that cannot be read: the variables are no substitute for it
 */
export function readJob(env: Environment): Job | undefined {
  const path = env.JOB_RESPONSE_FILE;
  if (path) {
    let response: v.InferOutput<typeof JobResponseSchema>;
    try {
      response = readJson(path, JobResponseSchema);
    } catch (error) {
      throw new Failure("system", `JOB_RESPONSE_FILE ${path} cannot be used: ${reasonOf(error)}`);
    }
    const { protocol, host } = new URL(response.git_info.repo_url);
    const project = response.job_info.project_id;
    const hash = sha256(JSON.stringify([`${protocol}//${host}`, project, response.id]));
    return { stem: `${labelOf(env)}-${hash}`, hash, title: `job ${response.id} of project ${project}` };
  }
  const { CUSTOM_ENV_CI_PROJECT_URL: url, CUSTOM_ENV_CI_PIPELINE_ID: pipeline, CUSTOM_ENV_CI_JOB_ID: id } = env;
  if (!url || !pipeline || !id) return undefined;
  const hash = sha256(`${url}-${pipeline}-${id}`);
  return { stem: `${labelOf(env)}-${hash}`, hash, title: `job ${hash.slice(0, 12)}` };
}

// ---------------------------------------------------------------------------------------------------------
// 6. Task record
// ---------------------------------------------------------------------------------------------------------

const RECORD_VERSION = 1;

const RecordSchema = v.object({
  Version: v.literal(RECORD_VERSION),
  /** Empty until RunTask has answered. */
  TaskARN: v.string(),
  /** Empty until a login has worked. */
  ContainerIP: v.string(),
  /** Base64 of the PEM text; empty when the key is the operator's own (PrivateKeyPath). */
  PrivateKey: v.string(),
  Cluster: v.string(),
  Region: v.string(),
  StartedBy: v.string(),
  /** Every token that RunTask was or may have been called with. */
  ClientTokens: v.array(v.string()),
  /** RunTask may have been sent and has not been answered: there may be a task whose ARN is not known. */
  Unanswered: v.boolean(),
  /** Base64 of the SSH server's key, as first seen. */
  HostKey: v.string(),
  /** The best shell that the container has. */
  Interpreter: v.picklist(["bash", "sh"]),
  /** File name of the login user's own shell. */
  LoginShell: v.string(),
  /** Epoch seconds. */
  CreatedAt: v.number(),
});

/** What prepare leaves for the later stages, on disk: the official driver's fields and ours. */
export type TaskRecord = v.InferOutput<typeof RecordSchema>;

/** Makes the directory of records, for its owner alone, unless it is there. */
export function openDirectory(directory: string): void {
  try {
    fs.mkdirSync(directory, { recursive: true, mode: 0o700 });
  } catch (error) {
    throw new Failure("system", `TaskMetadata.Directory ${directory} cannot be made: ${reasonOf(error)}`);
  }
}

/** Does something with a file's descriptor, syncs the file to disk and closes it. */
function withSync(path: string, flags: string, use: (file: number) => void): void {
  const file = fs.openSync(path, flags, 0o600);
  try {
    use(file);
    fs.fsyncSync(file);
  } finally {
    fs.closeSync(file);
  }
}

/** Writes a file so that after a crash it holds either its old or its new content, whole, and survives power loss. */
function writeDurably(path: string, content: string, put: (temporary: string, path: string) => void): void {
  const temporary = `${path}.${randomBytes(6).toString("hex")}.tmp`;
  try {
    withSync(temporary, "wx", (file) => fs.writeFileSync(file, content));
    put(temporary, path);
  } finally {
    fs.rmSync(temporary, { force: true });
  }
  withSync(join(path, ".."), "r", () => {}); // the directory, which holds the name
}

/** @throws {Failure} when the record cannot be kept safe; the caller must not go on to start a task */
export function writeRecord(path: string, record: TaskRecord): void {
  try {
    writeDurably(path, `${JSON.stringify(record, null, 2)}\n`, fs.renameSync);
  } catch (error) {
    throw new Failure("system", `the record ${path} cannot be written: ${reasonOf(error)}`);
  }
}

/**
 * @returns undefined where there is no record
 * @throws {Failure} when there is one that cannot be understood
 */
export function readRecord(path: string): TaskRecord | undefined {
  try {
    return readJson(path, RecordSchema);
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code === "ENOENT") return undefined;
    throw new Failure("system", `the record ${path} cannot be used: ${reasonOf(error)}`);
  }
}

/**
 * Who this manager is among those that share a cluster: 12 hex digits, made once for a directory of records.
 * link(2) makes the file appear whole and for one of several makers only.
 */
export function managerId(directory: string): string {
  const path = join(directory, ".manager-id");
  const read = () => fs.readFileSync(path, "utf8").trim();
  try {
    if (!fs.existsSync(path)) {
      try {
        writeDurably(path, `${randomBytes(6).toString("hex")}\n`, fs.linkSync);
      } catch (error) {
        if ((error as NodeJS.ErrnoException).code !== "EEXIST") throw error;
      }
    }
    const id = read();
    if (!/^[0-9a-f]{12}$/.test(id)) throw new Error("it does not hold 12 hex digits; remove it");
    return id;
  } catch (error) {
    throw new Failure("system", `the manager's identity ${path} cannot be used: ${reasonOf(error)}`);
  }
}

// ---------------------------------------------------------------------------------------------------------
// 7. Keys
// ---------------------------------------------------------------------------------------------------------

/** A private key (PEM text) and its public half as a line of authorized_keys. */
export interface KeyPair {
  readonly privateKey: string;
  readonly publicKey: string;
}

/** @throws {Failure} when the text is no private key, or one with a passphrase */
export async function keyPairOf(privateKey: string): Promise<KeyPair> {
  const { utils } = await import("ssh2");
  const parsed = utils.parseKey(privateKey);
  const key = Array.isArray(parsed) ? parsed[0] : parsed;
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
  for (;;) {
    const pair = await keyPairOf(utils.generateKeyPairSync("ed25519").private).catch(() => undefined);
    // ssh2 1.17 cuts leading zero bytes off a public key: one key in 256 is malformed, and made anew.
    if (pair) return pair;
  }
}

// ---------------------------------------------------------------------------------------------------------
// 8. ECS
// ---------------------------------------------------------------------------------------------------------

/** The container that gets the public key; the name is the official driver's. */
export const CONTAINER = "ci-coordinator";

/** What every stage works with. */
export interface Context {
  readonly config: Config;
  readonly job: Job;
  readonly log: Logger;
  readonly env: Environment;
  /** Aborted by SIGTERM or SIGINT; the reason is a Failure that says so. */
  readonly stop: AbortSignal;
  /** Milliseconds since the epoch. */
  readonly now: () => number;
}

/** Where the output of a script goes. */
export interface Sinks {
  readonly stdout: Writable;
  readonly stderr: Writable;
}

/** The input of RunTask: what the official driver sends, and what the configuration adds to it. Pure. */
export function runTaskInput(
  config: Config,
  identity: { startedBy: string; clientToken: string },
  environment: Readonly<Record<string, string>> | undefined,
): RunTaskCommandInput {
  const f = config.Fargate;
  return {
    cluster: f.Cluster,
    taskDefinition: f.TaskDefinition,
    ...(f.PlatformVersion && { platformVersion: f.PlatformVersion }),
    count: 1,
    networkConfiguration: {
      awsvpcConfiguration: {
        subnets: f.Subnets ?? [f.Subnet as string],
        securityGroups: f.SecurityGroups ?? [f.SecurityGroup as string],
        assignPublicIp: f.EnablePublicIP ? "ENABLED" : "DISABLED",
      },
    },
    ...(environment && {
      overrides: {
        containerOverrides: [
          {
            name: CONTAINER,
            environment: Object.entries(environment).map(([name, value]) => ({ name, value })),
          },
        ],
      },
    }),
    ...(f.LaunchType && { launchType: f.LaunchType }),
    ...(f.CapacityProviderStrategy && {
      capacityProviderStrategy: f.CapacityProviderStrategy.map((p) => ({
        capacityProvider: p.CapacityProvider,
        weight: p.Weight,
        ...(p.Base !== undefined && { base: p.Base }),
      })),
    }),
    ...(f.EnableExecuteCommand && { enableExecuteCommand: true }),
    ...(Object.keys(f.Tags).length > 0 && {
      tags: Object.entries(f.Tags).map(([key, value]) => ({ key, value })),
    }),
    ...(f.PropagateTags && { propagateTags: f.PropagateTags }),
    startedBy: identity.startedBy,
    clientToken: identity.clientToken,
  };
}

/** How something is bounded that may be repeated: `until` in epoch ms; a signal ends it with the signal's reason. */
export interface Limits {
  readonly until: number;
  readonly signal?: AbortSignal | undefined;
}

/**
 * Calls until it works, with jittered backoff.
 *
 * @param again whether an error may pass
 * @throws the last error, or the reason of `signal`
 */
export async function retry<T>(
  call: () => Promise<T>,
  { until, again, now, signal }: Limits & { again: (error: unknown) => boolean; now: () => number },
): Promise<T> {
  for (let wait = 100; ; wait = Math.min(wait * 2, 5_000)) {
    signal?.throwIfAborted();
    try {
      return await call();
    } catch (error) {
      const pause = wait * (0.5 + Math.random());
      if (!again(error) || now() + pause > until) throw error;
      await sleep(pause, signal);
    }
  }
}

/** Waits, in ms; a signal ends the wait with its own reason. */
async function sleep(ms: number, signal?: AbortSignal): Promise<void> {
  await delay(ms, undefined, { signal }).catch(() => signal?.throwIfAborted());
}

/** What the SDK throws; without a status no answer came. */
type AwsError = { name?: string; $metadata?: { httpStatusCode?: number } };

/** Whether the same call may succeed in a moment: throttled, AWS's own failure, or no whole answer. */
export function isTransient(error: unknown): boolean {
  const { name = "", $metadata } = (error ?? {}) as AwsError;
  const status = $metadata?.httpStatusCode ?? 0;
  if (/Throttl|TooManyRequests|RequestLimitExceeded|SlowDown/.test(name)) return true;
  // Without a status the request or its answer was lost on the way; with one of success, the answer broke off.
  // Missing credentials look alike.
  if (status < 300) return $metadata !== undefined && !/Credential/.test(name);
  return status >= 500 || status === 429;
}

/** Whether a call that failed may have taken effect: it reached AWS, and what came back does not deny it. */
export function mayHaveWorked(error: unknown): boolean {
  const status = (error as AwsError).$metadata?.httpStatusCode ?? 0;
  if (status >= 300) return status >= 500;
  const { name = "", code = "", message = "" } = error as NodeJS.ErrnoException;
  return !/Credential|ECONNREFUSED|ConnectionRefused|ENOTFOUND|EAI_AGAIN/.test(`${name} ${code} ${message}`);
}

/** What a call to AWS came to, as a Failure that names the call, the error and the operator's next step. */
export function awsFailure(action: string, error: unknown): Failure {
  const { name = "Error", $metadata } = error as AwsError;
  const answered = ($metadata?.httpStatusCode ?? 0) >= 300;
  const reason = reasonOf(error).split("\n")[0]; // the SDK adds hints for programmers
  const detail = answered ? `${name}: ${reason}` : reason;
  const advice = /^(AccessDenied|UnauthorizedOperation)/.test(name)
    ? `; allow ${action} in the IAM policy of the runner's host`
    : /Credential/.test(name)
      ? "; give the runner's host a role, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY in its environment"
      : "";
  return new Failure("system", `${action} ${answered ? "was refused" : "got no answer"}: ${detail}${advice}`, {
    cause: error,
  });
}

/** Most ms for one call to AWS, from getting credentials to the last byte of the answer. */
const CALL_TIMEOUT = 30_000;

/** For how long a call may fail and be tried again before the log says so, in ms. */
const PATIENCE = 10_000;

interface CallLimits extends Limits {
  /** Which failures may pass; `isTransient` unless given. */
  readonly again?: (error: unknown) => boolean;
  /** How long a call that was sent may still take after the signal, in ms; not at all unless given. */
  readonly grace?: number;
}

/** The calls to AWS that this driver makes. Each SDK is loaded, and its client made, at first use. */
export class Aws {
  #clients = new Map<string, Promise<unknown>>();

  constructor(
    private readonly region: string,
    private readonly context: Pick<Context, "log" | "now">,
  ) {}

  /** Loads an SDK and makes its client, once. */
  #load<T>(name: string, load: (settings: object) => Promise<T>): Promise<T> {
    const made = this.#clients.get(name) ?? this.#settings().then(load);
    this.#clients.set(name, made);
    return made as Promise<T>;
  }

  /**
   * fetch, because bun's honours HTTPS_PROXY, HTTP_PROXY and NO_PROXY as the Go SDK does; the SDK's own handler does
   * not. No retries by the SDK: `retry` is the one place that decides what is sent again.
   */
  async #settings() {
    const { FetchHttpHandler } = await import("@smithy/fetch-http-handler");
    return { region: this.region, maxAttempts: 1, requestHandler: new FetchHttpHandler() };
  }

  async #send<T>(
    action: string,
    { until, signal, again = isTransient, grace = 0 }: CallLimits,
    call: (abort: { abortSignal: AbortSignal }) => Promise<T>,
  ): Promise<T> {
    const { log, now } = this.context;
    const first = now();
    let told = false;
    const once = async () => {
      const begun = now();
      // RunTask, which alone has a grace, is not cut short by `until`: its answer is worth more than the time.
      const most = grace ? CALL_TIMEOUT : Math.min(CALL_TIMEOUT, Math.max(until - begun, 1_000));
      // Not left to the SDK, which looks at no signal while it gets credentials, and writes into the signal's reason.
      const sdk = new AbortController();
      const cut = Promise.withResolvers<never>();
      const end = () => {
        sdk.abort();
        // The shape of any other answer that did not come.
        cut.reject(Object.assign(new Error(`no whole answer after ${now() - begun} ms`), { $metadata: {} }));
      };
      const timers = [setTimeout(end, most)];
      const onSignal = () => void timers.push(setTimeout(end, grace));
      signal?.addEventListener("abort", onSignal);
      try {
        return await Promise.race([call({ abortSignal: sdk.signal }), cut.promise]);
      } catch (error) {
        log.debug("{action} failed after {ms} ms: {reason}", { action, ms: now() - begun, reason: reasonOf(error) });
        if (!told && now() > first + PATIENCE && now() < until && !signal?.aborted && again(error)) {
          told = true;
          log.warn("{action} still fails, and is tried again: {reason}", { action, reason: reasonOf(error) });
        }
        throw error;
      } finally {
        timers.forEach(clearTimeout);
        signal?.removeEventListener("abort", onSignal);
      }
    };
    try {
      return await retry(once, { until, again, now, signal });
    } catch (error) {
      throw signal?.aborted ? signal.reason : awsFailure(action, error);
    }
  }

  async #ecs<T>(
    action: string,
    limits: CallLimits,
    call: (
      ecs: ECSClient,
      sdk: typeof import("@aws-sdk/client-ecs"),
      abort: { abortSignal: AbortSignal },
    ) => Promise<T>,
  ): Promise<T> {
    const { sdk, client } = await this.#load("ecs", async (settings) => {
      const sdk = await import("@aws-sdk/client-ecs");
      return { sdk, client: new sdk.ECSClient(settings) };
    });
    return this.#send(`ecs:${action}`, limits, (abort) => call(client, sdk, abort));
  }

  /**
   * Starts a task; the input's clientToken makes a repetition answer as before.
   *
   * @returns the task's ARN, or why there is none
   */
  async runTask(input: RunTaskCommandInput, limits: CallLimits): Promise<{ arn?: string | undefined; why: string }> {
    const { tasks, failures } = await this.#ecs("RunTask", limits, (ecs, { RunTaskCommand }, abort) =>
      ecs.send(new RunTaskCommand(input), abort),
    );
    const reasons = (failures ?? []).map((f) => [f.reason, f.detail].filter(Boolean).join(" "));
    return { arn: tasks?.[0]?.taskArn, why: reasons.join("; ") || "AWS gave no reason" };
  }

  /** @returns undefined while ECS does not know the task (yet, or no more) */
  async describeTask(cluster: string, task: string, limits: CallLimits): Promise<Task | undefined> {
    const { tasks } = await this.#ecs("DescribeTasks", limits, (ecs, { DescribeTasksCommand }, abort) =>
      ecs.send(new DescribeTasksCommand({ cluster, tasks: [task] }), abort),
    );
    return tasks?.[0];
  }

  /**
   * Stops a task; one that is unknown or gone counts as stopped. Credentials may fail for a moment as well, and the
   * runner does not repeat a cleanup. `reason` holds ids only.
   */
  async stopTask(cluster: string, task: string, reason: string, limits: Limits): Promise<void> {
    const again = (error: unknown) => isTransient(error) || /Credential/.test((error as Error).name);
    const stop = this.#ecs("StopTask", { ...limits, again }, (ecs, { StopTaskCommand }, abort) =>
      ecs.send(new StopTaskCommand({ cluster, task, reason }), abort),
    );
    await stop.catch((error) => {
      if (/task was not found/i.test(reasonOf(error))) return;
      if (error === limits.signal?.reason) throw error;
      throw new Failure("system", `${task} may still run, stop it by hand: ${reasonOf(error)}`, { cause: error });
    });
  }

  /** ARNs of the tasks started under a name that are not stopped yet. */
  async listTasks(cluster: string, startedBy: string, limits: Limits): Promise<string[]> {
    const arns: string[] = [];
    let nextToken: string | undefined;
    do {
      const page = await this.#ecs("ListTasks", limits, (ecs, { ListTasksCommand }, abort) =>
        ecs.send(new ListTasksCommand({ cluster, startedBy, nextToken }), abort),
      );
      arns.push(...(page.taskArns ?? []));
      nextToken = page.nextToken;
    } while (nextToken);
    return arns;
  }

  /** The public address of a network interface; undefined while it has none, or is unknown. */
  async publicAddress(networkInterfaceId: string, limits: CallLimits): Promise<string | undefined> {
    const { sdk, client } = await this.#load("ec2", async (settings) => {
      const sdk = await import("@aws-sdk/client-ec2");
      return { sdk, client: new sdk.EC2Client(settings) };
    });
    const command = { NetworkInterfaceIds: [networkInterfaceId] };
    const { NetworkInterfaces } = await this.#send("ec2:DescribeNetworkInterfaces", limits, (abort) =>
      client.send(new sdk.DescribeNetworkInterfacesCommand(command), abort),
    ).catch((failure: Failure) => {
      // EC2 may learn of the interface a moment after ECS.
      if (/InvalidNetworkInterfaceID\.NotFound/.test(failure.message)) return { NetworkInterfaces: [] };
      throw failure;
    });
    return NetworkInterfaces?.[0]?.Association?.PublicIp;
  }
}

/** A detail of the task's network interface, undefined until it is attached. */
export function interfaceDetail(task: Task, name: "privateIPv4Address" | "networkInterfaceId"): string | undefined {
  const eni = task.attachments?.find((attachment) => attachment.type === "ElasticNetworkInterface");
  return eni?.details?.find((detail) => detail.name === name)?.value;
}

/** While a start is awaited, desiredStatus STOPPED is the end already, whatever lastStatus says. */
export const isEnding = (task: Task): boolean =>
  task.desiredStatus === "STOPPED" ||
  /^(DEACTIVATING|STOPPING|DEPROVISIONING|STOPPED|DELETED)$/.test(task.lastStatus ?? "");

/** Why a task stopped, in AWS's words: code, reason, and what each container says. */
export function explainStop(task: Task): string {
  const containers = (task.containers ?? [])
    .filter((container) => container.exitCode !== undefined || container.reason)
    .map((container) => {
      const code = container.exitCode === undefined ? "no exit code" : `exit code ${container.exitCode}`;
      return `; container ${container.name}: ${code}${container.reason ? `, ${container.reason}` : ""}`;
    });
  const stopped = [task.stopCode, task.stoppedReason].filter(Boolean).join(": ") || "ECS gave no reason";
  return `${stopped}${containers.join("")}`;
}

/**
 * Pause before the next DescribeTasks, in ms, with jitter. Twenty jobs that poll once a second use up what an
 * account may ask for (20 calls a second), so: quickly at first, when the address is about to come, to 2 s; and 5 s
 * once there is nothing to learn from it but the task's death, or when the address is long in coming.
 */
export function pollPause(polls: number, addressKnown: boolean, random: number): number {
  const pause = addressKnown || polls > 30 ? 5_000 : Math.min(500 * 1.3 ** polls, 2_000);
  return pause * (0.75 + random / 2);
}

// ---------------------------------------------------------------------------------------------------------
// 9. SSH
// ---------------------------------------------------------------------------------------------------------

/** Where to log in, and how. */
export interface SshTarget {
  readonly host: string;
  readonly port: number;
  readonly username: string;
  readonly privateKey: string;
  /** The only server key that is accepted; undefined on first use, which pins it. */
  readonly hostKey?: Buffer;
  /** Seconds between signs of life; 0 for none. With two unanswered, the connection ends when the third is due. */
  readonly keepAlive: number;
}

/** An open, logged-in connection. */
export interface Connection {
  readonly client: Client;
  readonly hostKey: Buffer;
}

/** Why no connection came about; `unreachable` may pass, the others are final. */
export class SshFailure extends Failure {
  constructor(
    readonly why: "unreachable" | "login" | "host-key",
    message: string,
  ) {
    super("system", message);
  }
}

/**
 * Ciphers: AES-GCM only is fast here, AES-CTR is for old servers; chacha20-poly1305 does not work under bun. Server
 * keys: no SHA-1 signatures (ssh-rsa), which OpenSSH refuses since 8.8 (Debian 12) as well.
 */
const ALGORITHMS = {
  cipher: ["aes128-gcm@openssh.com", "aes256-gcm@openssh.com", "aes128-ctr", "aes192-ctr", "aes256-ctr"],
  serverHostKey: [
    "ssh-ed25519",
    "ecdsa-sha2-nistp256",
    "ecdsa-sha2-nistp384",
    "ecdsa-sha2-nistp521",
    "rsa-sha2-512",
    "rsa-sha2-256",
  ],
} as const;

/**
 * Logs in once.
 *
 * @param timeout ms for the whole of it, from the first packet to the accepted key
 * @throws {SshFailure}
 */
export async function connect(target: SshTarget, timeout: number, signal: AbortSignal): Promise<Connection> {
  const { Client } = await import("ssh2");
  signal.throwIfAborted();
  const client = new Client();
  const where = `${target.username}@${target.host}:${target.port}`;
  let hostKey: Buffer | undefined;
  let changed = false;
  return new Promise((resolve, reject) => {
    const abort = () => fail(signal.reason);
    const fail = (error: unknown) => {
      signal.removeEventListener("abort", abort);
      client.destroy();
      reject(error);
    };
    signal.addEventListener("abort", abort);
    client.on("ready", () => {
      signal.removeEventListener("abort", abort);
      resolve({ client, hostKey: hostKey as Buffer });
    });
    // Stays for the connection's life: an error event without a listener would end the process.
    client.on("error", (error: Error & { level?: string }) => {
      const [why, text] = changed
        ? (["host-key", "the server's key is not the one seen when the task was prepared"] as const)
        : error.level === "client-authentication"
          ? (["login", "the server refused the key"] as const)
          : (["unreachable", reasonOf(error)] as const);
      fail(new SshFailure(why, `${where}: ${text}`));
    });
    client.on("close", () => fail(new SshFailure("unreachable", `${where}: the server closed the connection`)));
    client.connect({
      host: target.host,
      port: target.port,
      username: target.username,
      privateKey: target.privateKey,
      authHandler: ["publickey"],
      readyTimeout: timeout,
      keepaliveInterval: target.keepAlive * 1000,
      keepaliveCountMax: 2,
      algorithms: { cipher: [...ALGORITHMS.cipher], serverHostKey: [...ALGORITHMS.serverHostKey] },
      hostVerifier: (key: Buffer) => {
        hostKey = Buffer.from(key);
        changed = target.hostKey !== undefined && !target.hostKey.equals(hostKey);
        return !changed;
      },
    });
  });
}

/**
 * Attempts overlap, because packets to an address that is not up yet are dropped as often as refused. A login that
 * the server itself refused makes a pause: the key may not be in place yet, and OpenSSH 9.8 and later bars an address
 * for a while (5 s) that failed.
 */
const LOGIN = { every: 250, cut: 3_000, open: 4, pauseAfterRefusal: 5_000 } as const;

/**
 * Tries to log in until it works.
 *
 * @param onFailure hears of each attempt that failed
 * @throws the reason of `signal`; it never gives up by itself
 */
export function logIn(
  target: SshTarget,
  signal: AbortSignal,
  onFailure: (failure: SshFailure) => void,
): Promise<Connection> {
  return new Promise((resolve, reject) => {
    const attempts = new AbortController();
    let open = 0;
    let pause = 0;
    const finish = () => {
      clearInterval(timer);
      signal.removeEventListener("abort", abort);
      attempts.abort(new SshFailure("unreachable", "no longer needed"));
    };
    const abort = () => {
      finish();
      reject(signal.reason);
    };
    const attempt = () => {
      if (--pause > 0 || open >= LOGIN.open) return;
      open++;
      connect(target, LOGIN.cut, attempts.signal)
        .then(
          (connection) => {
            if (attempts.signal.aborted) return void connection.client.destroy();
            finish();
            resolve(connection);
          },
          (failure: SshFailure) => {
            if (attempts.signal.aborted) return;
            if (failure.why === "login") pause = LOGIN.pauseAfterRefusal / LOGIN.every;
            onFailure(failure);
          },
        )
        .finally(() => open--);
    };
    const timer = setInterval(attempt, LOGIN.every);
    if (signal.aborted) return abort();
    signal.addEventListener("abort", abort);
    attempt();
  });
}

/** Opens a channel that executes a command in the login user's shell; `signal` ends the connection until it is open. */
function execute(connection: Connection, command: string, signal: AbortSignal): Promise<ClientChannel> {
  const { client } = connection;
  return new Promise((resolve, reject) => {
    signal.throwIfAborted();
    const abort = () => client.destroy();
    const done = () => {
      client.removeListener("close", lost);
      signal.removeEventListener("abort", abort);
    };
    const lost = () => {
      done();
      reject(signal.aborted ? signal.reason : new SshFailure("unreachable", "the connection was lost"));
    };
    client.once("close", lost);
    signal.addEventListener("abort", abort);
    client.exec(command, (error, channel) => {
      done();
      if (error) reject(new SshFailure("unreachable", `the server opened no channel: ${reasonOf(error)}`));
      else resolve(channel);
    });
  });
}

/** Runs a short command of our own, within 10 s, and returns at most 64 KiB of its standard output. */
async function ask(connection: Connection, command: string, signal: AbortSignal): Promise<string> {
  const late = new AbortController();
  const failure = new SshFailure("unreachable", "the container did not answer for 10 s");
  const timer = setTimeout(() => late.abort(failure), 10_000);
  const bound = AbortSignal.any([signal, late.signal]);
  try {
    const channel = await execute(connection, command, bound);
    let output = "";
    let exited = false;
    channel.stderr.resume();
    channel.on("exit", () => {
      exited = true;
    });
    channel.on("data", (chunk: Buffer) => {
      if (output.length < 65_536) output += chunk.toString("latin1");
    });
    return await new Promise((resolve, reject) => {
      const lost = new SshFailure("unreachable", "the connection was lost");
      channel.on("close", () => (exited ? resolve(output) : reject(lost)));
      bound.addEventListener("abort", () => reject(bound.reason));
    });
  } finally {
    clearTimeout(timer);
  }
}

/** Which shells a container has. `sh -c` so that the question is understood by any login shell. */
export async function findShells(
  connection: Connection,
  signal: AbortSignal,
): Promise<Pick<TaskRecord, "Interpreter" | "LoginShell">> {
  const question = 'echo "fargate-shells $SHELL $(command -v bash || command -v sh)"';
  const answer = await ask(connection, `exec sh -c '${question}'`, signal);
  const [, login, best] = /fargate-shells (\S*) (\S+)/.exec(answer) ?? [];
  if (!best) throw new Failure("system", "the container has neither bash nor sh for the user that logs in");
  return { Interpreter: /bash$/.test(best) ? "bash" : "sh", LoginShell: login?.split("/").at(-1) ?? "" };
}

/**
 * The interpreter that a script's first line asks for.
 *
 * @throws {Failure} for one that is neither bash nor sh: in the wrong shell a script does harm
 */
export function interpreterOf(script: Buffer, best: TaskRecord["Interpreter"]): "bash" | "sh" {
  const [, named] = /^#!\s*(?:\S*\/env\s+(?:-\S+\s+)*)?(\S+)/.exec(script.subarray(0, 256).toString("latin1")) ?? [];
  const name = named?.split("/").at(-1) ?? "bash";
  if (name === "sh") return "sh";
  if (name === "bash") return best;
  throw new Failure(
    "system",
    `the script is for ${name}, but only bash and sh can be used; set shell = "bash" in the runner's config.toml`,
  );
}

/**
 * What the remote shell is told to do with a script on its standard input, on one line and without single quotes,
 * so that any login shell passes it on. It
 *  - says its process id, which as sshd's child is also the id of its session and process group;
 *  - reads the whole script into a variable and compares its length, so that a cut connection runs nothing of it;
 *  - evaluates it in a subshell with empty standard input, and nothing of it in an argument, a file or the environment;
 *  - marks the end of both streams, so that a process left in the background does not hold the stage;
 *  - survives TERM and INT itself, to report what the script ended with; where it ended with 0 although the script
 *    sent such a signal to its $$, which is this shell, that counts.
 */
export function remoteProgram(bytes: number, mark: string): string {
  return [
    `set +e; trap "FARGATE_SIGNAL=143" TERM; trap "FARGATE_SIGNAL=130" INT; unset FARGATE_SCRIPT FARGATE_SIGNAL; echo "${mark} $$";`,
    "FARGATE_SCRIPT=$(cat; echo x); FARGATE_SCRIPT=${FARGATE_SCRIPT%x};",
    `if [ "$(printf %s "$FARGATE_SCRIPT" | wc -c)" -eq ${bytes} ]; then`,
    '(eval "unset FARGATE_SCRIPT; $FARGATE_SCRIPT") </dev/null; FARGATE_SCRIPT=$?;',
    "[ $FARGATE_SCRIPT -ne 0 ] || FARGATE_SCRIPT=${FARGATE_SIGNAL:-0};",
    `echo "${mark} end"; echo "${mark} end" >&2; exit $FARGATE_SCRIPT; fi;`,
    `echo "${mark} incomplete"; echo "${mark} incomplete" >&2; exit 1`,
  ].join(" ");
}

/**
 * The command that runs `program`: as it is when the login shell is the wanted one (what its start-up files define
 * is then there for the script, as with the official driver), else handed to the wanted one.
 */
export function remoteCommand(program: string, interpreter: "bash" | "sh", loginShell: string): string {
  const same = interpreter === "bash" ? loginShell === "bash" : /^(sh|dash|ash)$/.test(loginShell);
  return same ? program : `exec ${interpreter} -c '${program}' ${interpreter}`;
}

/**
 * Ends a session: TERM to its process group and to what left the group but not the session (`timeout` and `set -m`
 * do), KILL to what is left after 5 s. By a command, because OpenSSH ignores signal requests for root. Prints what
 * could not be ended. Linux's /proc/PID/stat: "pid (name) state ppid pgrp session ...".
 */
export function endSessionProgram(session: number): string {
  return [
    'left() { for f in /proc/[0-9]*/stat; do { read -r l <"$f"; } 2>/dev/null || continue; i=${l%% *};',
    `set -- \${l##*) }; [ "$4" = ${session} ] && [ "$1" != Z ] && [ "$3" != "$skip" ] && echo "$i"; done; };`,
    `kill -TERM -${session} 2>/dev/null; skip=${session}; for i in $(left); do kill -TERM "$i" 2>/dev/null; done;`,
    'skip=; n=0; while [ -n "$(left)" ] && [ $n -lt 50 ]; do n=$((n+1)); sleep 0.1 || { sleep 1; n=$((n+9)); }; done;',
    `kill -KILL -${session} 2>/dev/null; for i in $(left); do kill -KILL "$i" 2>/dev/null; done;`,
    'n=0; while [ -n "$(left)" ] && [ $n -lt 10 ]; do n=$((n+1)); sleep 0.1 || { sleep 1; n=$((n+9)); }; done; echo fargate-left $(left)',
  ].join(" ");
}

/** Takes the marks of `remoteProgram` out of a stream, across the boundaries of its chunks. */
export class MarkFilter {
  /** What followed each mark on its line: a process id, `end` or `incomplete`. */
  readonly marks: string[] = [];
  #held: Buffer = Buffer.alloc(0);
  readonly #mark: Buffer;

  constructor(mark: string) {
    this.#mark = Buffer.from(`${mark} `);
  }

  /** Nothing that comes later is the script's. */
  get ended(): boolean {
    return /^(end|incomplete)$/.test(this.marks.at(-1) ?? "");
  }

  /** @returns the stream's own bytes, without the marks; what may be the beginning of one is held back */
  push(chunk: Buffer): Buffer[] {
    let data = this.#held.length > 0 ? Buffer.concat([this.#held, chunk]) : chunk;
    const own: Buffer[] = [];
    for (;;) {
      const first = data.indexOf(this.#mark);
      const end = first < 0 ? -1 : data.indexOf(10, first);
      // The script may write the mark itself: what counts is the last one of a line.
      const at = first < 0 ? -1 : data.lastIndexOf(this.#mark, end < 0 ? undefined : end);
      if (end < 0) {
        // A mark's line is short: one that goes on and on is the script's own output.
        const short = at >= 0 && data.length - at <= this.#mark.length + 64;
        const keep = short ? data.length - at : this.#beginning(data);
        own.push(data.subarray(0, data.length - keep));
        this.#held = data.subarray(data.length - keep);
        return own.filter((part) => part.length > 0);
      }
      const text = data.toString("latin1", at + this.#mark.length, end);
      // Under `set -x` the shell shows the command that writes the mark, with quotes around it.
      const mark = /^(\d+|end|incomplete)$/.test(text);
      if (mark) this.marks.push(text);
      own.push(data.subarray(0, mark ? at : end + 1));
      data = data.subarray(end + 1);
    }
  }

  /** @returns what was held back, when the stream ends without the rest of a mark */
  flush(): Buffer {
    return this.#held;
  }

  #beginning(data: Buffer): number {
    for (let length = Math.min(this.#mark.length - 1, data.length); length > 0; length--)
      if (data.subarray(data.length - length).equals(this.#mark.subarray(0, length))) return length;
    return 0;
  }
}

/**
 * Passes a stream on without its marks, byte for byte and with back-pressure.
 *
 * @param onMark hears of each mark
 * @returns `over`: resolves when the script's part of the stream has been written; `silence`: when nothing has come, and
 *   nobody was waited for, for 2 s
 */
function passOn(source: Readable, sink: Writable, filter: MarkFilter, onMark: () => void) {
  const over = Promise.withResolvers<void>();
  let written: Promise<unknown> = Promise.resolve();
  let chunks = 0;
  const write = (part: Buffer): boolean => {
    let room = true;
    written = new Promise((done) => {
      room = sink.write(part, done);
    });
    return room;
  };
  source.on("data", (chunk: Buffer) => {
    chunks++;
    if (filter.ended) return; // what a process in the background says after the script's end
    const known = filter.marks.length;
    const room = filter.push(chunk).map(write).every(Boolean);
    if (filter.marks.length > known) onMark();
    if (filter.ended) written.then(() => over.resolve());
    else if (!room && !source.isPaused()) {
      source.pause();
      sink.once("drain", () => source.resume());
    }
  });
  source.on("close", () => {
    if (!filter.ended && filter.flush().length > 0) write(filter.flush());
    written.then(() => over.resolve());
  });
  const silence = async () => {
    for (let seen = -1; seen !== chunks || source.isPaused(); await sleep(2_000)) seen = chunks;
  };
  return { over: over.promise, silence };
}

/** How a script ended. */
export type Outcome =
  | { readonly ended: "exited"; readonly code: number }
  /** `begun`: whether any command of the script may have run. */
  | { readonly ended: "lost"; readonly begun: boolean; readonly reason: string };

/**
 * Runs a script over a connection and passes its output on. When `stop` is aborted, the script and its processes are
 * ended first.
 *
 * @returns how it ended; death by signal n counts as 128 + n, as in a shell
 * @throws {Failure} when the container's shell cannot take the script; the reason of `stop`
 */
export async function runScript(
  connection: Connection,
  script: Buffer,
  shells: { interpreter: "bash" | "sh"; loginShell: string },
  { stop, log, stdout, stderr }: Pick<Context, "stop" | "log"> & Sinks,
): Promise<Outcome> {
  const mark = `fargate-${randomBytes(16).toString("hex")}`;
  const command = remoteCommand(remoteProgram(script.length, mark), shells.interpreter, shells.loginShell);
  let reason = "the server closed the connection";
  connection.client.on("error", (error) => {
    reason = reasonOf(error);
  });
  const channel = await execute(connection, command, stop);
  const exit = new Promise<number | NodeJS.Signals | undefined>((resolve) => {
    channel.on("exit", (code: number | null, signal?: string) => resolve(code ?? (signal as NodeJS.Signals)));
    channel.on("close", () => resolve(undefined));
  });
  const marks = new MarkFilter(mark);
  let session: number | undefined;
  const out = passOn(channel, stdout, marks, () => {
    if (session !== undefined) return;
    session = Number(marks.marks[0]);
    channel.end(script);
  });
  const err = passOn(channel.stderr, stderr, new MarkFilter(mark), () => {});
  const over = Promise.all([out.over, err.over]);

  const end = async (): Promise<Outcome> => {
    const status = await exit;
    // Where the shell that writes the marks was killed, something in the background may hold the channel: then the output
    // is over when there has been none for a while. Else the marks are there or will come.
    if (typeof status === "string" || (status ?? 0) > 128)
      await Promise.race([over, Promise.all([out.silence(), err.silence()])]);
    else await over;
    if (status === undefined) return { ended: "lost", begun: session !== undefined, reason };
    if (session === undefined)
      throw new Failure("system", `the container's login shell ended with ${status} before it took the script`);
    if (marks.marks.at(-1) === "incomplete")
      throw new Failure(
        "system",
        "the container's shell could not take the script whole: it needs cat and wc, and a script without NUL characters",
      );
    return { ended: "exited", code: typeof status === "number" ? status : 128 + (osConstants.signals[status] ?? 0) };
  };

  const stopped = Promise.withResolvers<never>();
  const onStop = async () => {
    if (session !== undefined) {
      log.debug("ending the script's session {session}", { session });
      const never = new AbortController().signal;
      const answer = await ask(connection, `exec sh -c '${endSessionProgram(session)}'`, never).catch(reasonOf);
      if (!/^fargate-left\s*$/m.test(answer))
        log.warn("the script may still run in the container: {answer}", { answer: answer.trim() });
    }
    connection.client.destroy();
    await Promise.race([over, sleep(2_000)]); // what it said at last; nobody may be reading
    stopped.reject(stop.reason);
  };
  stop.addEventListener("abort", onStop, { once: true });
  if (stop.aborted) onStop();
  try {
    const outcome = await Promise.race([end(), stopped.promise]);
    return stop.aborted ? await stopped.promise : outcome;
  } finally {
    stop.removeEventListener("abort", onStop);
  }
}

// ---------------------------------------------------------------------------------------------------------
// 10. Stages
// ---------------------------------------------------------------------------------------------------------

const recordPath = ({ config, job }: Context): string => join(config.TaskMetadata.Directory, `${job.stem}.json`);

const startedBy = ({ config, job }: Context): string =>
  `fargate-${managerId(config.TaskMetadata.Directory)}-${job.hash.slice(0, 32)}`;

/** The `config` stage's answer. builds_dir and cache_dir are left to the runner's config.toml. */
export function configAnswer(job: Job | undefined): string {
  return JSON.stringify({ driver: { name: "fargate", version: VERSION }, hostname: job?.stem ?? "" });
}

/** `own`: the operator's, which stays where it is and is not copied into the record. */
type ChosenKey = KeyPair & { own: boolean };

/** The operator's own key where it can be read, else one made for this job. */
async function chooseKey({ config, log }: Context): Promise<ChosenKey> {
  const path = config.SSH.PrivateKeyPath;
  if (path) {
    try {
      return { ...(await keyPairOf(fs.readFileSync(path, "utf8"))), own: true };
    } catch (error) {
      log.warn("PrivateKeyPath {path} cannot be used: {reason}; a key is made for this job instead", {
        path,
        reason: reasonOf(error),
      });
    }
  }
  return { ...(await makeKeyPair(config.SSH.KeyType)), own: false };
}

/** ECS's words for an override that the task definition does not bear: no such container, or a secret of that name. */
const OVERRIDE_REFUSED = /not a container in the TaskDefinition|secret name must be unique/i;

/** The `prepare` stage: starts the job's task and returns when a login to it works. */
export async function prepare(context: Context): Promise<void> {
  const { config, log, now, stop } = context;
  openDirectory(config.TaskMetadata.Directory);
  await release(context, stop); // a try before this one may have died without its cleanup
  const key = await chooseKey(context);
  const aws = new Aws(config.Fargate.Region, context);
  const record = newRecord(context, key);
  const begun = now();
  try {
    await startTask(context, aws, record, key, begun);
    const { host, connection } = await untilReady(context, aws, record, key, begun);
    record.ContainerIP = host;
    record.HostKey = connection.hostKey.toString("base64");
    Object.assign(record, await findShells(connection, stop));
    connection.client.end();
    stop.throwIfAborted();
    writeRecord(recordPath(context), record);
    log.info("Ready: logged in to {host} as {user} ({seconds} s)", {
      host,
      user: config.SSH.Username,
      seconds: Math.round((now() - begun) / 1000),
    });
  } catch (error) {
    await abandon(context, aws, record).catch((failure) => {
      if (failure !== stop.reason) log.error("{reason}", { reason: reasonOf(failure) });
    });
    throw error;
  }
}

function newRecord(context: Context, key: ChosenKey): TaskRecord {
  const { config, now } = context;
  return {
    Version: RECORD_VERSION,
    TaskARN: "",
    ContainerIP: "",
    PrivateKey: key.own ? "" : Buffer.from(key.privateKey).toString("base64"),
    Cluster: config.Fargate.Cluster,
    Region: config.Fargate.Region,
    StartedBy: startedBy(context),
    ClientTokens: [],
    Unanswered: false,
    HostKey: "",
    Interpreter: "sh",
    LoginShell: "",
    CreatedAt: Math.floor(now() / 1000),
  };
}

/**
 * Starts the task, with the public key where its definition takes one, and notes it in the record. The record says so
 * before the call and after its answer, so that a task whose answer is lost can be found.
 */
async function startTask(context: Context, aws: Aws, record: TaskRecord, key: ChosenKey, begun: number): Promise<void> {
  const { config, log, stop } = context;
  const until = begun + config.Fargate.StartTimeout * 1000;
  const runTask = async (environment?: Record<string, string>) => {
    const clientToken = randomUUID();
    record.ClientTokens.push(clientToken);
    writeRecord(recordPath(context), { ...record, Unanswered: true });
    const input = runTaskInput(config, { startedBy: record.StartedBy, clientToken }, environment);
    const again = (error: unknown) => {
      record.Unanswered ||= mayHaveWorked(error);
      return isTransient(error);
    };
    const { arn, why } = await aws.runTask(input, { until, again, signal: stop, grace: ANSWER_GRACE });
    record.Unanswered = false;
    if (!arn) throw new Failure("system", `ecs:RunTask started no task: ${why}`);
    record.TaskARN = arn;
    writeRecord(recordPath(context), record);
  };

  stop.throwIfAborted();
  log.info("Starting a task of {definition} on cluster {cluster}", {
    definition: config.Fargate.TaskDefinition,
    cluster: config.Fargate.Cluster,
  });
  await runTask({ SSH_PUBLIC_KEY: key.publicKey }).catch((failure: Error) => {
    if (!OVERRIDE_REFUSED.test(failure.message)) throw failure;
    if (!key.own)
      throw new Failure(
        "system",
        `${failure.message.replace(/\.$/, "")}; the task definition must have a container named ${CONTAINER}, with an ` +
          "SSH server and without a secret named SSH_PUBLIC_KEY; or give PrivateKeyPath, a key that the container accepts",
      );
    log.info("The task definition does not take SSH_PUBLIC_KEY from here; starting it as it is");
    return runTask();
  });
}

/** Ends what a failed prepare has begun. The record in memory knows more than the one on disk when the disk is full. */
async function abandon(context: Context, aws: Aws, record: TaskRecord): Promise<void> {
  // A stopped prepare has no time to look for a task; cleanup, which follows, has. One that is known is stopped anyhow.
  const signal = record.TaskARN ? undefined : context.stop;
  if (await stopRecorded(context, aws, record, signal)) fs.rmSync(recordPath(context), { force: true });
}

/** How long a stopped prepare waits for RunTask's answer, in ms. */
const ANSWER_GRACE = 5_000;

/**
 * Follows a new task until a login to it works. Logins begin when its address is known, beside the polling, which
 * from then on only watches for the task's death.
 *
 * @throws {Failure} when the task ends, or is not ready in time
 */
async function untilReady(
  { config, log, now, stop }: Context,
  aws: Aws,
  record: TaskRecord,
  key: KeyPair,
  begun: number,
): Promise<{ host: string; connection: Connection }> {
  const secondsSince = () => Math.round((now() - begun) / 1000);
  const deadline = begun + config.Fargate.StartTimeout * 1000;
  const id = record.TaskARN.split("/").at(-1);
  const over = new AbortController();
  const signal = AbortSignal.any([stop, over.signal]);
  const ready = Promise.withResolvers<{ host: string; connection: Connection }>();
  const usePublic = config.Fargate.UsePublicIP ?? config.Fargate.EnablePublicIP;
  let host: string | undefined;
  let status: string | undefined;
  let runningSince: number | undefined;
  let lastFailure = "";

  const beginLogins = (address: string) => {
    log.debug("the task's address is {address}", { address });
    logIn(sshTarget(config, address, key.privateKey), signal, ({ message }) => {
      if (message !== lastFailure) log.debug("no login yet: {message}", { message });
      lastFailure = message;
    }).then((connection) => ready.resolve({ host: address, connection }), ready.reject);
  };
  const describe = async () => {
    // A login may work any moment: from then on a failure of this call is none of the task.
    if (!host) return aws.describeTask(record.Cluster, record.TaskARN, { until: deadline, signal });
    const call = aws.describeTask(record.Cluster, record.TaskARN, { until: now() + 10_000, signal });
    return call.catch((failure) => log.debug("{reason}", { reason: reasonOf(failure) }));
  };
  const watch = async (): Promise<never> => {
    for (let polls = 0; ; polls++) {
      const task = await describe();
      if (task?.lastStatus && task.lastStatus !== status) {
        status = task.lastStatus;
        log.info("Task {id} is {status} ({seconds} s)", { id, status, seconds: secondsSince() });
      }
      if (task && isEnding(task))
        throw new Failure("system", `the task stopped before it was ready: ${explainStop(task)}`);
      if (status === "RUNNING") runningSince ??= now();
      if (task && !host) {
        const eni = interfaceDetail(task, "networkInterfaceId");
        host = usePublic
          ? eni && (await aws.publicAddress(eni, { until: deadline, signal }))
          : interfaceDetail(task, "privateIPv4Address");
        if (host) beginLogins(host);
      }
      const tried = lastFailure && `; the last attempt to log in: ${lastFailure}`;
      const noAddress = `; it has no ${usePublic ? "public address: see EnablePublicIP, and the subnet's route" : "address"}`;
      const why = host ? tried : noAddress;
      const { ConnectTimeout } = config.SSH;
      if (runningSince !== undefined && now() > runningSince + ConnectTimeout * 1000)
        throw new Failure(
          "system",
          `the task runs, but no login worked within ConnectTimeout (${ConnectTimeout} s)${why}`,
        );
      if (now() > deadline)
        throw new Failure(
          "system",
          `the task was not ready within StartTimeout (${config.Fargate.StartTimeout} s): it is ` +
            `${status ?? "unknown to ECS"}${why}`,
        );
      await sleep(pollPause(polls, host !== undefined, Math.random()), signal);
    }
  };
  try {
    return await Promise.race([ready.promise, watch()]);
  } finally {
    over.abort(new Failure("system", "the task is no longer awaited"));
  }
}

const sshTarget = (config: Config, host: string, privateKey: string, hostKey?: Buffer): SshTarget => ({
  host,
  port: config.SSH.Port,
  username: config.SSH.Username,
  privateKey,
  keepAlive: config.SSH.KeepAliveInterval,
  ...(hostKey && { hostKey }),
});

/** Most ms for one attempt to connect; a dropped packet is not waited for. */
const CONNECT_CUT = 10_000;

/** The `run` stage: runs a script of the job in its task. */
export async function run(context: Context & Sinks, scriptPath: string, stage: string): Promise<void> {
  const { env, log } = context;
  const exitCodeFile = env.BUILD_EXIT_CODE_FILE;
  if (exitCodeFile) fs.rmSync(exitCodeFile, { force: true }); // else this stage could answer with another's
  const script = readFile(scriptPath, `the script of ${stage},`);
  const path = recordPath(context);
  const record = readRecord(path);
  if (!record?.ContainerIP)
    throw new Failure("system", `there is no task for this job: no finished record ${path}; prepare must come first`);
  const outcome = await runInTask(context, record, script, stage);
  if (outcome.ended === "lost") {
    const why = await explainLoss(context, record);
    throw new Failure(
      "system",
      `the connection to the container was lost while ${stage} ran: ${outcome.reason}; ${why}`,
    );
  }
  log.debug("{stage} ended with exit code {code}", { stage, code: outcome.code });
  if (outcome.code === 0) return;
  if (exitCodeFile) fs.writeFileSync(exitCodeFile, String(outcome.code));
  throw new ScriptFailure(outcome.code);
}

/** Connects and runs the script; one of which no command can have run is sent again, any other never. */
async function runInTask(
  context: Context & Sinks,
  record: TaskRecord,
  script: Buffer,
  stage: string,
): Promise<Outcome> {
  const { config, log, now, stop } = context;
  const shells = { interpreter: interpreterOf(script, record.Interpreter), loginShell: record.LoginShell };
  const hostKey = Buffer.from(record.HostKey, "base64");
  const target = sshTarget(config, record.ContainerIP, privateKeyOf(record, config), hostKey);
  const aws = new Aws(record.Region, context);
  let tries = 0;
  let asked = 0;
  const attempt = async (): Promise<Outcome> => {
    if (++tries > 2 && now() > asked + 5_000) {
      asked = now();
      await failIfEnded(aws, record, stage, { until: now() + 5_000, signal: stop });
    }
    const connection = await connect(target, CONNECT_CUT, stop);
    try {
      const outcome = await runScript(connection, script, shells, context);
      if (outcome.ended === "lost" && !outcome.begun) throw new SshFailure("unreachable", outcome.reason);
      return outcome;
    } finally {
      connection.client.end();
    }
  };
  const again = (error: unknown) => {
    const passes = error instanceof SshFailure && error.why === "unreachable";
    if (passes) log.debug("{stage}: {reason}; trying again", { stage, reason: reasonOf(error) });
    return passes;
  };
  try {
    return await retry(attempt, { until: now() + config.SSH.ConnectTimeout * 1000, again, now, signal: stop });
  } catch (error) {
    if (stop.aborted || !(error instanceof SshFailure)) throw error;
    const why = error.why === "unreachable" ? `; ${await explainLoss(context, record)}` : "";
    throw new Failure("system", `${stage} did not begin: ${reasonOf(error)}${why}`);
  }
}

/** A task that has ended is not waited for: the stages after its end would each take the whole ConnectTimeout. */
async function failIfEnded(aws: Aws, record: TaskRecord, stage: string, limits: Limits): Promise<void> {
  const task = await aws.describeTask(record.Cluster, record.TaskARN, limits).catch(() => undefined);
  if (task && isEnding(task))
    throw new Failure("system", `${stage} did not begin: the task has stopped: ${explainStop(task)}`);
}

/** The key that prepare logged in with: the job's own from its record, else the operator's from its file. */
function privateKeyOf(record: TaskRecord, config: Config): string {
  if (record.PrivateKey) return Buffer.from(record.PrivateKey, "base64").toString();
  return readFile(config.SSH.PrivateKeyPath ?? "", "PrivateKeyPath").toString();
}

/** The script itself failed; its own output says why, so nothing is added to the job log. */
export class ScriptFailure extends Failure {
  constructor(readonly code: number) {
    super("build", `exit code ${code}`);
  }
}

/** What ECS says of a task whose connection is gone, within 10 s; its answer may lag some seconds behind the loss. */
async function explainLoss(context: Context, record: TaskRecord): Promise<string> {
  const { now, stop } = context;
  const aws = new Aws(record.Region, context);
  const until = now() + 10_000;
  try {
    for (;;) {
      const task = await aws.describeTask(record.Cluster, record.TaskARN, { until, signal: stop });
      if (!task) return "ECS no longer knows the task";
      if (isEnding(task)) return `the task stopped: ${explainStop(task)}`;
      if (now() + 1_500 > until) return `ECS says that the task is ${task.lastStatus}`;
      await sleep(1_500, stop);
    }
  } catch (error) {
    stop.throwIfAborted();
    return `why is not known: ${reasonOf(error)}`;
  }
}

/** For how long stopping a task is tried again, in ms. */
const STOP_FOR = 60_000;
/** How long a task whose start was not answered is looked for, in ms; lists are eventually consistent. */
const LIST_LAG = 30_000;

/**
 * The `cleanup` stage: stops the job's task and removes its record. Also with no record (the task is then looked up
 * by its startedBy), and when called twice.
 */
export async function cleanup(context: Context): Promise<void> {
  if (await release(context)) return;
  const { Directory } = context.config.TaskMetadata;
  if (!fs.existsSync(join(Directory, ".manager-id"))) return; // nothing was ever started
  const { Region, Cluster } = context.config.Fargate;
  await stopByName(context, new Aws(Region, context), Cluster, startedBy(context), { until: 0 });
}

/**
 * Stops what this job's record stands for, then removes the record.
 *
 * @param signal ends it; prepare, which also begins with this, must obey SIGTERM
 * @returns false where there is no record
 * @throws {Failure} when the task could not be stopped; the record stays
 */
async function release(context: Context, signal?: AbortSignal): Promise<boolean> {
  const path = recordPath(context);
  let record: TaskRecord | undefined;
  try {
    record = readRecord(path);
    if (!record) return false;
  } catch (error) {
    context.log.warn("{reason}; looking for the task by its name", { reason: reasonOf(error) });
  }
  const { Region, Cluster } = record ?? context.config.Fargate;
  const aws = new Aws(Region, context);
  const done = record
    ? await stopRecorded(context, aws, record, signal)
    : await stopByName(context, aws, Cluster, startedBy(context), { until: 0, signal });
  if (done) fs.rmSync(path, { force: true });
  return true;
}

/** Stops the task of a record; one that may have been started without an answer is looked for. @returns as stopByName */
async function stopRecorded(context: Context, aws: Aws, record: TaskRecord, signal?: AbortSignal): Promise<boolean> {
  const { job, now } = context;
  const look = () => stopByName(context, aws, record.Cluster, record.StartedBy, { until: now() + LIST_LAG, signal });
  if (!record.TaskARN) return !record.Unanswered || look();
  await aws.stopTask(record.Cluster, record.TaskARN, job.title, { until: now() + STOP_FOR, signal });
  return true;
}

/**
 * Stops every task started under a name; looks again until `until` while there is none.
 *
 * @returns false, with a warning, where the host may not look: the official driver's permissions lack ecs:ListTasks
 */
async function stopByName(
  { job, log, now }: Context,
  aws: Aws,
  cluster: string,
  name: string,
  { until, signal }: Limits,
): Promise<boolean> {
  for (;;) {
    const limits = { until: now() + STOP_FOR, signal };
    let tasks: string[];
    try {
      tasks = await aws.listTasks(cluster, name, limits);
    } catch (error) {
      if (!/AccessDenied/.test(reasonOf(error))) throw error;
      log.warn("whether a task started by {name} is left could not be looked up: {reason}", {
        name,
        reason: reasonOf(error),
      });
      return false;
    }
    for (const task of tasks) await aws.stopTask(cluster, task, job.title, limits);
    if (tasks.length > 0 || now() + 2_000 > until) return true;
    await sleep(2_000, signal);
  }
}

// ---------------------------------------------------------------------------------------------------------
// 13. Command line
// ---------------------------------------------------------------------------------------------------------

/** A command whose errors are one line that says what is wrong and what is known. */
class Cli extends Command {
  override createCommand(name?: string): Cli {
    return new Cli(name);
  }

  override error(message: string, options?: Parameters<Command["error"]>[1]): never {
    let root: Command = this;
    let path = this.name();
    for (; root.parent; root = root.parent) path = `${root.parent.name()} ${path}`;
    const what = message
      .replace(/^error: /, "")
      .replace(/\n[\s\S]*$/, "")
      .replace(/\.$/, "");
    if (options?.code === "commander.invalidArgument")
      throw new Failure("system", `${path}: ${what.replace(". known: ", "; known: ")}`); // see oneOfWords
    const known = /option/i.test(options?.code ?? "")
      ? root.options.map((option) => option.long).join(", ")
      : this.commands.map((command) => command.name()).join(", ") || `${path} ${this.usage()}`;
    throw new Failure("system", `${path}: ${what}; known: ${known}`);
  }

  /** Help that nobody asked for stands for a missing command; a runner must not take it for a stage that went well. */
  override help(context?: unknown): never {
    if ((context as { error?: boolean } | undefined)?.error) this.error("no command was given");
    return super.help(context as never);
  }
}

/** Takes one of some words, in any case. */
const oneOfWords = (words: readonly string[]) => (value: string) => {
  if (words.includes(value.trim().toLowerCase())) return value;
  throw new InvalidArgumentError(`known: ${words.join(", ")}`);
};

/** What the command line asks for. */
interface Request {
  readonly stage: "config" | "prepare" | "run" | "cleanup";
  readonly operands: readonly string[];
  readonly config: string;
  readonly options: Options;
}

/**
 * @param argv the arguments, without the program's own name
 * @returns undefined when help or the version was asked for, and printed
 * @throws {Failure} for wrong arguments
 */
export function parseCommandLine(argv: readonly string[]): Request | undefined {
  let asked: Pick<Request, "stage" | "operands"> | undefined;
  const program = new Cli("fargate")
    .description("Runs each GitLab CI job in an AWS ECS task of its own on Fargate.")
    .version(`fargate ${VERSION}`, "-v, --version", "print the version")
    .helpOption("-h, --help", "print this help")
    .option("--config <path>", "the configuration file", "config.toml")
    .option("--debug", "the same as --log-level debug")
    .option("--log-level <level>", `LogLevel: ${LEVELS.join(", ")}`, oneOfWords(LEVELS))
    .option("--log-format <format>", `LogFormat: ${FORMATS.join(", ")}`, oneOfWords(FORMATS))
    .option("--log-file <path>", "LogFile: log to this file instead of standard error")
    .option("--task-def <definition>", "TaskDefinition: family, family:revision or ARN")
    .option("--platform-version <version>", "PlatformVersion: such as 1.4.0 or LATEST")
    .configureHelp({ showGlobalOptions: true })
    .configureOutput({ writeOut: (text) => writeWhole(1, text), writeErr: (text) => writeWhole(2, text) })
    .exitOverride();
  program.addHelpText(
    "after",
    "\nOptions may stand before or after the command, and beat CUSTOM_ENV_FARGATE_TASK_DEFINITION and" +
      "\nCUSTOM_ENV_FARGATE_PLATFORM_VERSION, which beat the configuration file.",
  );
  const custom = program.command("custom").alias("c").description("the stages of GitLab Runner's Custom executor");
  const stage = (name: Request["stage"], alias: string, description: string, operands: Record<string, string> = {}) =>
    Object.entries(operands)
      .reduce((command, [operand, meaning]) => command.argument(`<${operand}>`, meaning), custom.command(name))
      .alias(alias)
      .description(description)
      .action((...args: unknown[]) => {
        asked = { stage: name, operands: (args.at(-1) as Command).args };
      });
  stage("config", "co", "print the driver's name and version for the runner, as JSON");
  stage("prepare", "p", "start the job's task and wait until it can be used");
  const operands = { script: "path of the script", stage: "the runner's name for it, such as build_script" };
  stage("run", "r", "run a script of the job in its task", operands);
  stage("cleanup", "cl", "stop the job's task");

  try {
    program.parse(argv, { from: "user" });
  } catch (error) {
    if (!(error instanceof CommanderError)) throw error;
    return undefined;
  }
  const given = program.opts<Record<string, string | true | undefined>>();
  const text = (name: string) => given[name] as string | undefined;
  return {
    ...(asked as Pick<Request, "stage" | "operands">),
    config: text("config") as string,
    options: {
      LogLevel: given.debug ? "debug" : text("logLevel"),
      LogFormat: text("logFormat"),
      LogFile: text("logFile"),
      TaskDefinition: text("taskDef"),
      PlatformVersion: text("platformVersion"),
    },
  };
}

/** Runs one invocation. @returns the process's exit code */
export async function main(argv: readonly string[], env: Environment): Promise<number> {
  let log = openLog({ LogLevel: "info", LogFormat: "text", LogFile: "" });
  const stopping = new AbortController();
  const stopFor = (why: string) => stopping.abort(new Failure("system", why));
  for (const signal of ["SIGTERM", "SIGINT"] as const) process.on(signal, () => stopFor(`stopped by ${signal}`));
  const crash = (error: unknown) => {
    // bun would end with 1, which the runner takes for the job's own failure.
    log.fatal("{reason}", { reason: `this is a bug of the driver: ${reasonOf(error)}` });
    log.debug("{stack}", { stack: error instanceof Error ? error.stack : undefined });
    process.exit(exitCode("system", env));
  };
  process.on("uncaughtException", crash).on("unhandledRejection", crash);
  try {
    const request = parseCommandLine(argv);
    if (!request) return 0;
    const job = readJob(env);
    if (request.stage === "config") {
      writeWhole(1, `${configAnswer(job)}\n`);
      return 0;
    }
    const file = readFile(request.config, "the configuration file");
    const { config, warnings } = readConfig(file.toString(), request.config, request.options, env);
    log = openLog(config);
    if (request.stage === "prepare") for (const warning of warnings) log.warn("{warning}", { warning });
    if (!job)
      throw new Failure(
        "system",
        "there is no job: neither JOB_RESPONSE_FILE nor CUSTOM_ENV_CI_JOB_ID and its like are set",
      );
    const context: Context = { config, job, log, env, stop: stopping.signal, now: Date.now };
    if (request.stage === "prepare") await prepare(context);
    else if (request.stage === "cleanup") await cleanup(context);
    else {
      const { stdout, stderr } = process; // bun makes these streams when they are asked for; no other stage needs them
      for (const stream of [stdout, stderr])
        stream.on("error", (error) => stopFor(`the job's output cannot be written: ${reasonOf(error)}`));
      await run({ ...context, stdout, stderr }, ...(request.operands as [string, string]));
    }
    return 0;
  } catch (error) {
    const failure = error instanceof Failure ? error : new Failure("system", reasonOf(error), { cause: error });
    if (!(failure instanceof ScriptFailure))
      for (const line of failure.message.split("\n")) log.fatal(line.replace(/[{}]/g, "$&$&")); // no placeholders
    log.debug("{stack}", { stack: error instanceof Error ? error.stack : undefined });
    return exitCode(failure.kind, env);
  }
}

/**
 * Run from source, bun has taken .env and bunfig.toml of the working directory into account before this line, unless it
 * was told not to: a checkout could so redirect signed requests. Then nothing is done. The compiled program reads none.
 */
function refuseForeignSettings(): void {
  if (typeof BUILD_VERSION === "string" || process.execArgv.includes("--no-env-file")) return;
  const found = fs.readdirSync(".").filter((name) => /^(\.env(\..*)?|\.?bunfig\.toml)$/.test(name));
  if (found.length === 0) return;
  const call = `bun --no-env-file --config=/dev/null ${process.argv[1]}`;
  writeWhole(2, `error: bun takes settings from ${found.join(", ")} here; call it as: ${call}\n`);
  process.exit(exitCode("system", process.env));
}

if (import.meta.main) {
  refuseForeignSettings();
  main(process.argv.slice(2), process.env).then((code) => process.exit(code));
}
