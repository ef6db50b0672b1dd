/**
 * Attacks, and input of any kind: jobs that claim another job's identity, hostile SSH servers (with their rows of
 * `docs/faults.md`), arbitrary input at every boundary, and secrets that appear where they must not. SECURITY.md names
 * tests of all files; one test here checks that they exist.
 */
import { spawn, spawnSync } from "node:child_process";
import * as fs from "node:fs";
import { join } from "node:path";
import { Writable } from "node:stream";
import {
  DescribeTasksCommand,
  ECSClient,
  type ECSClientResolvedConfig,
  type ServiceInputTypes as EcsInput,
  type ServiceOutputTypes as EcsOutput,
  ListTasksCommand,
  RunTaskCommand,
  StopTaskCommand,
  type Task,
} from "@aws-sdk/client-ecs";
import { type AwsStub, mockClient } from "aws-sdk-client-mock";
import * as commander from "commander";
import fc from "fast-check";
import { Server as SshServerOfAPacket, utils } from "ssh2";
import * as v from "valibot";
import { afterAll, beforeAll, beforeEach, describe, expect, test } from "vitest";
import {
  type Config,
  ConfigSchema,
  type Connection,
  type Context,
  createDirectory,
  exitCode,
  Failure,
  formatRecord,
  formatSweep,
  interpreterOf,
  type Job,
  type LogRecord,
  makeKeyPair,
  makeLogger,
  managerId,
  matchesImage,
  parseCommandLine,
  parseImage,
  parseImagePattern,
  parseStage,
  planImages,
  readConfig,
  readJob,
  readRecord,
  run as runStage,
  sweep,
  type TaskRecord,
  writeRecord,
} from "./fargate.ts";
import type { FaultAction } from "./fixtures/aws.ts";
import {
  type Answer,
  answerTo,
  arbitraryScript,
  commandLine,
  configText,
  DRIVER_FILE,
  exitCodeText,
  forAny,
  forAnyAtOnce,
  fuzzBanner,
  fuzzRuns,
  harmlessScript,
  hugeConfigs,
  isComplete,
  type Junk,
  junk,
  makeJunk,
  mutatedJson,
  oddUrl,
  repositoryAddress,
  startEndpoint,
} from "./fixtures/fuzz.ts";
import { type AttackName, attacks, hostileHosts, startHostileSshServer } from "./fixtures/hostile-ssh.ts";
import { gitlabJob } from "./fixtures/job.ts";
import { driver, fargate, start } from "./fixtures/process.ts";
import {
  ended,
  faultTest,
  filesLeft,
  forever,
  makeScene,
  newJobId,
  type Scene,
  setUpImageJobs,
  setUpJobs,
  testTable,
} from "./fixtures/scene.ts";
import { wholeRun } from "./fixtures/secrets.ts";
import { newPrivateKey, startSshServer } from "./fixtures/ssh-server.ts";
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
  nextNumber,
  prepare,
  runScript,
  setUp,
  someRecord,
  startTask,
  taskTest,
  testProgram,
  testSecrets,
  thrown,
} from "./fixtures/test-support.ts";
import { makeWorld, projectRoot, type World } from "./fixtures/world.ts";

setUp({ hosts: true });

// ---------------------------------------------------------------------------------------------------------
// Identity: jobs that claim to be other jobs
// ---------------------------------------------------------------------------------------------------------

describeProgram("job identity", () => {
  let world: World;
  const { makeRunner, callsSince, nothingLeft, byHand, scriptFile } = setUpJobs((made) => {
    world = made;
  });

  /** All files below a directory: path and content. */
  const filesBelow = (root: string): Record<string, string> =>
    Object.fromEntries(
      fs
        .readdirSync(root, { recursive: true, withFileTypes: true })
        .filter((entry) => entry.isFile() || entry.isSymbolicLink())
        .map((entry) => join(entry.parentPath, entry.name))
        .map((path) => [path, fs.readFileSync(path, "latin1")]),
    );
  /** Script lines that leave a mark in the task and print all marks. */
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
    ["those of another running job", stolen],
    ["../../x", everywhere("../../x")],
    ["an absolute path", everywhere("/etc/x")],
    ["control characters", everywhere("\u0001\u001b[0K\r\n\u007f\u2028section_start:1:x\r\u001b[0K")],
    ["5 KB of text", everywhere("x".repeat(5_000))],
    ["empty text", everywhere("")],
  ] as const)
    taskTest(`a job that sets its ids to ${what} stays in its own task`, async () => {
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
      // The victim's task still runs and has no other visitor. The attacker has left no file.
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

  test("a job with a NUL character or 128 KiB in a variable starts no task", async () => {
    const since = world.aws.calls.length;
    for (const value of ["a\u0000b", "x".repeat(140_000)]) {
      const job = { variables: { CI_JOB_ID: value } };
      const result = await makeRunner({ job, prepareRetryInterval: 0 }).runJob();
      expect(result).toMatchObject({ status: "system-failure" });
    }
    expect(world.aws.calls.length).toBe(since);
    nothingLeft();
  });

  // Two of the instances share a host name and differ in their paths.
  taskTest("a job shares no task with a job of the same ids on another GitLab instance", async () => {
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

  taskTest("a job with a response ignores a record that is named after its variables", async () => {
    const env = byHand();
    const config = world.configure();
    const custom = (...args: string[]) => fargate(["--config", config, "custom", ...args], { env });
    // Another job's task, and a record of it under the name that the official driver would use.
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
      stderr: expect.stringContaining("this job has no task"),
    });
    const since = world.aws.calls.length;
    const prepared = await custom("prepare");
    expect(prepared.code, prepared.stderr).toBe(0);
    expect(callsSince(since).StopTask).toBeUndefined();
    expect(world.aws.running().map(({ taskArn }) => taskArn)).toContain(other?.taskArn);
    expect(await custom("cleanup")).toMatchObject({ code: 0 });
    expect(world.aws.running().map(({ taskArn }) => taskArn)).toEqual([other?.taskArn]);
    // Without a response, the record named after the variables is used.
    const byVariables = await fargate(["--config", config, "custom", "cleanup"], { env: variables });
    expect(byVariables.code, byVariables.stderr).toBe(0);
    nothingLeft();
  });

  taskTest("prepare makes no call to AWS for a task definition that is not allowed", async () => {
    const since = world.aws.calls.length;
    const variables = { FARGATE_TASK_DEFINITION: "secret-task:1" };
    const config = world.configure({ Fargate: { AllowedTaskDefinitions: ["test-*"] } });
    const refused = await makeRunner({ config, job: { variables } }).runJob();
    expect(refused).toMatchObject({ status: "build-failure", exitCode: 1 });
    // prepare is not repeated.
    expect(refused.stages.map(({ stage }) => stage)).toEqual(["config", "prepare", "cleanup"]);
    expect(refused.trace.toString()).toMatch(
      /Z error: FARGATE_TASK_DEFINITION of this job, secret-task:1, is not allowed: AllowedTaskDefinitions is test-\*\n/,
    );
    expect(world.aws.calls.length).toBe(since);
    const allowed = makeRunner({
      config,
      job: { variables: { FARGATE_TASK_DEFINITION: "test-task" }, script: ["true"] },
    });
    expect(await allowed.runJob()).toMatchObject({ status: "success" });
    nothingLeft();
    // If the operator forbids a task definition while a job runs in it, cleanup still stops the task.
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
});

// ---------------------------------------------------------------------------------------------------------
// Hostile servers: a job can replace its container's sshd by anything
// ---------------------------------------------------------------------------------------------------------

describe.concurrent("server identity", () => {
  const ready = async (scene: Scene) => {
    ended(await scene.stage("prepare"), 0);
    return readRecord(scene.record) as TaskRecord;
  };

  faultTest(
    "run sends no script when the SSH server's key is not the one prepare saw",
    async (scene) => {
      await ready(scene);
      const [task] = scene.world.aws.running();
      // On HUP, sshd reads its host keys again.
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
      expect(finished.stderr).toContain("the server's host key is not the one that prepare saw");
      expect(finished.stderr).toContain("what to do: nothing was sent");
      return { stage: "run", finished };
    },
    { container: true },
  );

  for (const [shared, operators] of [
    ["keys", true], // PrivateKeyPath, and host keys of the image
    ["host key", false], // the other server accepts any key
  ] as const)
    faultTest(`run sends no script after another task with the same ${shared} got its address`, async (scene) => {
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
        // 20 s is long enough for another task to have got the address.
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
    "run sends no script when ECS does not confirm that a silent task runs",
    async (scene) => {
      ended(await scene.stage("prepare"), 0);
      const before = new Date(Date.now() - 20_000);
      fs.utimesSync(scene.record, before, before);
      ended(await scene.run("true"), 0);
      // The end of the stage touched the record.
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
  // Both containers have the host key of their image.
  faultTest("run sends no script when the job's container redirects to another job's", async (scene) => {
    ended(await scene.stage("prepare"), 0);
    const response = join(directory(), "response.json");
    const { id, ...rest } = JSON.parse(fs.readFileSync(scene.env.JOB_RESPONSE_FILE as string, "utf8"));
    fs.writeFileSync(response, JSON.stringify({ ...rest, id: id + 2_000_000 }));
    const env = { JOB_RESPONSE_FILE: response };
    ended(await scene.stage("prepare", { env }), 0);
    const other = join(scene.world.records, `${readJob({ ...scene.env, ...env })?.stem}.json`);
    const { ContainerIP, HostKey } = readRecord(other) as TaskRecord;
    // As if the job's container forwarded all connections to the other task.
    writeRecord(scene.record, { ...(readRecord(scene.record) as TaskRecord), ContainerIP, HostKey });
    const finished = await scene.run("echo never");
    ended(finished, 2);
    expect(finished.stdout.toString()).toBe("");
    ended(await scene.stage("cleanup", { env }), 0);
    return { stage: "run", finished };
  });
});

describeProgram.concurrent("hostile SSH server", () => {
  let world: World;
  beforeAll(async () => {
    world = await makeWorld({ embedded: true });
  });
  afterAll(() => world?.close());

  /** At most three attacks at a time: a flooded driver and its server keep the processors busy. */
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
  /** Attacks that only wait. They need no processor, so any number may run at once. */
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

  /** The driver's exit code, a pattern for its log, and the content of BUILD_EXIT_CODE_FILE. */
  type Verdict = readonly [code: number, says?: RegExp, exitCode?: string];
  const noKex: Verdict = [2, /Handshake failed: no matching key exchange algorithm/];
  const otherKey: Verdict = [2, /did not begin: .*the server's host key is not the one that prepare saw/];
  const noLogin: Verdict = [2, /did not begin: .*the server refused the key/];
  const room: Verdict = [2, /the server sends more output than its window allows|stopped by SIGTERM/];
  const notEnded: Verdict = [2, /warning: the script may still be running in the container: no answer/];
  const says: Verdict = [
    2,
    /the server says "\\u001b\[2J\\u001b\]0;owned\\u0007\\u000d \| 2026-01-01T00:00:00Z all is well/,
  ];
  const deaf: Verdict = [2, /: the server sends requests without reading the replies; /];
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
    "kill-nothing": [2, /warning: the script may still be running in the container: not found/],
    "zlib-bomb": [2, /Handshake failed: no matching .*compression/],
    "zlib-openssh-bomb": [2, /Handshake failed: no matching .*compression/],
    "requests-global-deaf": deaf,
    "requests-channel-deaf": deaf,
    "channels-deaf": deaf,
    "packet-size-0": [2, /error: the server accepts only packets of 0 bytes/],
    "packet-size-1": [2, /error: the server accepts only packets of 1 bytes/],
    // A job's server decides how the job's script ended. Exit codes above 255 count as 255.
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

  /** Attacks that end only when the driver gets SIGTERM. */
  const goesOn = (attack: AttackName) =>
    [room, notEnded].includes(special[attack] as Verdict) || attack === "kill-nothing";

  for (const attack of Object.keys(attacks) as AttackName[])
    test(`run withstands the attack ${attack}`, async () => {
      const done = idle.includes(attack) ? () => {} : await turn();
      const where = directory();
      const address = `127.78.0.${1 + Object.keys(attacks).indexOf(attack)}`;
      const server = await startHostileSshServer({ address, port: 0, attack });
      try {
        const { environment, response } = gitlabJob({ id: newJobId() });
        const env = {
          ...world.aws.environment,
          ...environment,
          JOB_RESPONSE_FILE: join(where, "response.json"),
          BUILD_EXIT_CODE_FILE: join(where, "exit-code"),
        };
        fs.writeFileSync(env.JOB_RESPONSE_FILE, JSON.stringify(response));
        // The record as prepare left it, before the job replaced its server. ECS no longer knows the task.
        const job = readJob(env) as Job;
        const records = join(where, "records");
        createDirectory(records);
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
          else chunks[99] = chunk; // of a flood, keeps the beginning and the driver's last message
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
        // Most runs end by themselves. The others must end on SIGTERM; SIGKILL is the last resort, and fails the test.
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
        const { BUILD_EXIT_CODE_FILE: exitCodeFile } = env;
        expect(fs.existsSync(exitCodeFile) ? fs.readFileSync(exitCodeFile, "latin1") : undefined).toBe(exitCode);
        // In MB. About 60 before the attack; without limits, hundreds more per second.
        expect(peak).toBeLessThan(500);
        expect(stderr).not.toMatch(/bug in the driver|undefined is not|is not a function/);
        // The server's text can neither begin a log line nor control a terminal.
        expect(stderr).not.toMatch(/^2026-01-01/m);
        // biome-ignore lint/suspicious/noControlCharactersInRegex: it searches for control characters
        expect(stderr).not.toMatch(/[\u0000-\u0009\u000b-\u001f\u007f-\u009f]/);
        expect(stderr).not.toMatch(/what to do: .*(iam:|execution role)/);
        const { answers, accepted, commands, scripts } = server.seen;
        expect({ answers, accepted }).toEqual({ answers: 0, accepted: 0 });
        expect(scripts.length).toBeLessThan(2);
        // Proves that the server counts the client's replies.
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

describeProgram.concurrent("hostile server of a new task", () => {
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

  // prepare trusts the first server that answers at the task's address.
  test("prepare gives no secret away to the first server at a task's address", async () => {
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
    test(`prepare withstands the attack ${attack}`, async () => {
      const { finished, left } = await prepareIn(attack);
      ended(finished, 2);
      expect(left).toEqual([]);
      expect(finished.stderr).not.toMatch(/bug in the driver|^2026-01-01/m);
    });
});

describeProgram.concurrent("services", () => {
  // Takes the SSH port as soon as nobody else has it, on IPv4 alone, and accepts any key.
  const images = {
    "registry.example.com/impostor:1": [
      "RUN apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends openssh-server \\",
      " && mkdir -p /run/sshd && ssh-keygen -A && echo impostor >/impostor \\",
      " && printf '%s\\n' 'UsePAM no' 'AuthorizedKeysCommand /bin/echo %t %k' 'AuthorizedKeysCommandUser nobody' >/conf",
      'CMD ["sh", "-c", "while :; do /usr/sbin/sshd -D -f /conf -o ListenAddress=0.0.0.0:$PORT -o ListenAddress=0.0.0.0:7000; sleep 0.1; done"]',
    ],
  };
  const coordinator = { name: "ci-coordinator", image: "sshd", stopTimeout: 2 };
  const healthCheck = { command: ["CMD-SHELL", "exit 0"], interval: 5 };
  const taskDefinitions = [
    { family: "test-task", containerDefinitions: [coordinator] },
    { family: "hasty-task", containerDefinitions: [{ ...coordinator, healthCheck }] },
  ];
  // sshd starts late, so that a service could be faster.
  const tasks = { ipv6: true, command: "sleep 12; exec sh /usr/local/bin/worker-entrypoint" };
  const { makeRunner, nothingLeft, world } = setUpImageJobs(images, { taskDefinitions, tasks });
  /** Runs a job with the impostor as a service. @returns the output of its script */
  const outputWith = async (TaskDefinition: string) => {
    const PORT = { key: "PORT", value: `${world().sshPort}`, public: true, masked: false, file: false, raw: true };
    const ports = [{ number: 7000, protocol: "tcp", name: "" }];
    const service = { name: "registry.example.com/impostor:1", variables: [PORT], ports };
    const runner = makeRunner({ services: [service] }, { more: { Fargate: { TaskDefinition } } });
    await runner.prepare();
    const { stdout } = await runner.run("build_script", "#!/bin/sh\ncat /impostor 2>/dev/null || echo genuine\n");
    await runner.cleanup();
    nothingLeft(runner, runner.job);
    return stdout.toString();
  };

  taskTest(
    "prepare starts no service before the SSH server has all its addresses",
    async () => expect(await outputWith("test-task:1")).toBe("genuine\n"),
    { containerOnly: true, timeout: 120_000 },
  );

  // So the order is what prevents the attack.
  taskTest(
    "prepare trusts a service if a health check of the operator succeeds too early",
    async () => expect(await outputWith("hasty-task:1")).toBe("impostor\n"),
    { containerOnly: true, timeout: 120_000 },
  );
});

describe("security model", () => {
  test("SECURITY.md names existing tests in every row", async () => {
    // All test names, as vitest lists them.
    const vitest = join(projectRoot, "node_modules", "vitest", "vitest.mjs");
    const command = [process.execPath, "--bun", vitest, "list", "--json"];
    const listed = await start(command, { cwd: projectRoot, env: { ...process.env, QUICK: undefined } }).finished;
    const found = JSON.parse(listed.stdout.toString()) as { name: string; file: string }[];
    expect(new Set(found.map(({ file }) => file)).size).toBeGreaterThan(5);
    const names = found.map(({ name }) => ` > ${name}`);
    const known = (test: string) => names.some((name) => name.endsWith(` > ${test}`));
    const text = fs.readFileSync(join(projectRoot, "SECURITY.md"), "utf8");
    const [, table = ""] = /\| tests \|\n[-| ]+\n((?:\|.*\n)+)/.exec(text) ?? [];
    const rows = table.trimEnd().split("\n");
    expect(rows.length).toBeGreaterThan(15);
    for (const row of rows) {
      const cells = row.split(" | ");
      expect(cells, row).toHaveLength(5);
      const named = [...(cells[4] ?? "").matchAll(/`([^`]+)`/g)].map(([, name]) => name as string);
      expect(named.length, row).toBeGreaterThan(0);
      for (const name of named) expect(known(name), `${name} of ${row}`).toBe(true);
    }
  }, 180_000); // vitest loads all test files, which takes long beside other tests
});

// ---------------------------------------------------------------------------------------------------------
// Arbitrary input: properties that hold whatever comes from outside
// ---------------------------------------------------------------------------------------------------------

describe("arbitrary input", () => {
  /** Messages of the JavaScript engine about a bug. They would not help an operator. */
  const ENGINE =
    /is not a(n object| function)|(undefined|null) is not|[Cc]annot read prop|not iterable|\[object |call stack|[Ii]nvalid (Date|time)|must be of type|bug in the driver/;
  /** Max length of a message, in characters: room for an error about every setting. */
  const LONGEST = 20_000;
  /** Control characters, line ends and direction marks. */
  const UNSAFE = /[\p{Cc}\p{Zl}\p{Zp}\p{Bidi_Control}]/u;
  const FORMATS = ["text", "text-simple", "json"] as const;
  const timeout = 60_000 * fuzzRuns;

  const logRecord = (message: string, fields = {}): LogRecord => ({ level: "fatal", message, fields, timestamp: 0 });
  /** Expects a Failure whose message is short and fit for an operator. */
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

  /** A stage of a new job, with the clock `now`. */
  function stageOf(records: string, now: () => number, change: (config: Config) => void = () => {}) {
    const { config } = readConfig(configFile("guide"), "guide", {}, {});
    config.TaskMetadata.Directory = records;
    config.Fargate.EnablePublicIP = false;
    config.SSH.Port = 1;
    change(config);
    const lines: string[] = [];
    const hash = "0123456789abcdef".repeat(4);
    const job: Job = { stem: `label-${hash}`, hash, title: "job 1 of project 2", timeout: 3600 };
    const log = makeLogger("info", (record) => lines.push(formatRecord(record, "text-simple").trimEnd()));
    const context: Context = { config, job, jobOverrides: [], log, env: {}, signal: never, now, wallTime: Date.now };
    return { context, lines, record: join(records, `${job.stem}.json`) };
  }
  const ownStartedBy = /^fargate-[0-9a-f]{12}-0123456789abcdef0123456789abcdef$/;

  beforeAll(() => console.log(fuzzBanner));

  // --- Configuration ---

  const configFiles = ["guide", "guide-2020", "guide-private", "manual", "loose", "full"].map(configFile);
  const KEY = /^ {2}(LogLevel|LogFormat|LogFile|Fargate|JobImage|TaskMetadata|SSH)(\.[^\n]*)?(: | is |$)/;

  /** Expects that any text is either a configuration or a clear failure. */
  function expectConfigOrFailure(text: string): void {
    let read: ReturnType<typeof readConfig>;
    try {
      read = readConfig(text, "/etc/any.toml", {}, {});
    } catch (failure) {
      const [head, ...problems] = expectClear(failure).split("\n");
      expect(head).toMatch(/^\/etc\/any\.toml( cannot be used:$|, line \d+, column \d+: invalid TOML: \S)/);
      for (const problem of problems) if (!/^ {2}.*\b\d+ more/.test(problem)) expect(problem).toMatch(KEY);
      // Messages quote values as in the file: nan and inf, not null.
      if (/=\s*[-+]?(nan|inf)\s*$/m.test(text) && !/null/.test(text))
        expect(problems.join("\n")).not.toMatch(/is null;/);
      return;
    } finally {
      expect(({} as { polluted?: unknown }).polluted).toBeUndefined();
    }
    const { config, warnings } = read;
    expect(v.parse(ConfigSchema, config)).toEqual(config);
    for (const warning of warnings) expect(formatRecord(logRecord(warning), "text").length).toBeLessThan(LONGEST);
    for (const table of [config, config.Fargate, config.Fargate.Tags, config.JobImage, config.TaskMetadata, config.SSH])
      expect(Object.getPrototypeOf(table)).toBe(Object.prototype);
  }

  test(
    "readConfig names the file and its bad keys when it refuses a text",
    () => forAny(fc.property(configText(configFiles), expectConfigOrFailure), { runs: 1_500 }),
    timeout,
  );

  test.each(hugeConfigs(configFile("guide")))("readConfig survives %s", (_, text) => {
    expectConfigOrFailure(text);
  });

  test("readConfig keeps tags of any name as they are or refuses them", () =>
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

  test.each(['["a", "b"]', "1979-05-27", "[]", "[{a = 'b'}]"])("readConfig refuses Tags = %s", (value) => {
    const text = configFile("guide").replace("[Fargate]", `[Fargate]\nTags = ${value}`);
    expect(expectClear(thrown(() => readConfig(text, "f", {}, {})))).toContain("Fargate.Tags");
  });

  testProgram(
    "prepare neither calls AWS nor writes a record with a bad configuration",
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
      // The search for secrets may add --log-level, which would hide an invalid LogLevel.
      const options = { LogLevel: "debug" };
      const bad = configText([file]).filter((text) => "failure" in attempt(() => readConfig(text, "f", options, {})));
      const env = { ...awsEnvironment(endpoint.url), JOB_RESPONSE_FILE: response };
      try {
        await forAnyAtOnce(
          fc.asyncProperty(bad, async (text) => {
            const path = join(where, `${nextNumber()}.toml`);
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

  describe("job response", () => {
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
      // The deadline depends on the timeout, and must be a plain number for the record and the container.
      const deadline = Math.ceil(Date.now() / 1000 + (job?.timeout ?? 0));
      expect(job?.timeout).toBeGreaterThan(0);
      expect(`${deadline}`).toMatch(/^\d+$/);
    };

    test("readJob quotes nothing of a job response that it refuses", () =>
      forAny(
        fc.property(mutatedJson(response), (content) => {
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

    test("readJob quotes nothing of an address that it refuses", () =>
      forAny(
        fc.property(oddUrl, fc.maxSafeInteger(), fc.maxSafeInteger(), (repo_url, id, project_id) => {
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

    test("readJob identifies a job by its address without credentials and its ids", () => {
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

  // --- Images ---

  describe("image reference", () => {
    const HOSTS = [
      ...[
        "docker.io",
        "index.docker.io",
        "registry.example.com",
        "registry.example.com:5000",
        "localhost",
        "registry:80",
      ],
      ...[
        "registry.example.com.evil.io",
        "evil.io",
        "xn--80ak6aa92e.com",
        "10.0.0.1",
        "Registry.Example.com",
        "INDEX.docker.io",
      ],
      ...[
        "registry.example.com@evil.io",
        "user:password@registry.example.com",
        "registry\u3002example.com",
        "[::1]:5000",
      ],
      ...[
        "registry.ex\u0430mple.com",
        "doc\u212aer.io",
        "registry.example.com.",
        "https:",
        "",
        "library",
        "a_b.io",
        "-a.io",
      ],
    ];
    const COMPONENTS = [
      "library",
      "node",
      "a",
      "42",
      "a-b",
      "a--b",
      "a__b",
      "a.b",
      "a_b",
      "..",
      "a___b",
      "-a",
      "A",
      "",
      "é",
      "a b",
    ];
    const component = fc.oneof(
      { weight: 4, arbitrary: fc.constantFrom(...COMPONENTS) },
      { weight: 1, arbitrary: fc.constantFrom("a".repeat(64), "f".repeat(63), "x".repeat(245), "a-".repeat(120)) },
      { weight: 1, arbitrary: fc.string({ unit: "binary", maxLength: 5 }) },
    );
    const tag = fc.oneof(
      fc.constantFrom("latest", "22", "_", "V1.2-x", "-1", ".x", "", "a b", "a/b", "t".repeat(128), "t".repeat(129)),
      fc.string({ maxLength: 5 }),
    );
    const hex = (digits: string, length: number) => digits.repeat(Math.ceil(length / digits.length)).slice(0, length);
    const digest = fc.constantFrom(
      ...[`sha256:${hex("0123456789abcdef", 64)}`, `sha256:${hex("A", 64)}`, `sha256:${hex("a", 63)}`],
      ...[`sha512:${hex("a", 128)}`, "sha256:", "latest", ""],
    );
    /** Texts that are often references. */
    const reference = fc
      .record({
        host: fc.option(fc.constantFrom(...HOSTS), { nil: undefined }),
        path: fc.array(component, { minLength: 1, maxLength: 3 }),
        tag: fc.option(tag, { nil: undefined, freq: 2 }),
        digest: fc.option(digest, { nil: undefined, freq: 2 }),
      })
      .map(({ host, path, tag, digest }) =>
        [host === undefined ? "" : `${host}/`, path.join("/"), tag === undefined ? "" : `:${tag}`]
          .concat(digest === undefined ? "" : `@${digest}`)
          .join(""),
      );

    /**
     * An image by the grammar in the documentation of distribution/reference, and by the way in which Docker
     * completes familiar names. Hosts count as equal without regard to case.
     */
    function imageOfDocker(text: string): string | undefined {
      if (/^[a-f0-9]{64}$/.test(text)) return undefined;
      const slash = text.indexOf("/");
      const first = text.slice(0, Math.max(slash, 0));
      const isHost = slash > 0 && (/[.:]/.test(first) || first === "localhost" || first !== first.toLowerCase());
      const host = isHost ? first.toLowerCase() : "docker.io";
      const rest = isHost ? text.slice(slash + 1) : text;
      const canonicalHost = host === "index.docker.io" ? "docker.io" : host;
      const full = `${canonicalHost}/${canonicalHost === "docker.io" && !rest.includes("/") ? "library/" : ""}${rest}`;
      const LABEL = "(?:[a-zA-Z0-9]|[a-zA-Z0-9][a-zA-Z0-9-]*[a-zA-Z0-9])";
      const DOMAIN = `${LABEL}(?:\\.${LABEL})*(?::[0-9]+)?`;
      const PATH = "[a-z0-9]+(?:(?:[_.]|__|-+)[a-z0-9]+)*";
      const TAG = "[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}";
      const DIGEST = "sha256:[0-9a-f]{64}";
      const grammar = new RegExp(`^(${DOMAIN})/(${PATH}(?:/${PATH})*)(?::(${TAG}))?(?:@(${DIGEST}))?$`);
      const found = grammar.exec(full);
      if (!found) return undefined;
      const [, domain, path, ofTag = "latest", ofDigest] = found;
      return `${domain}/${path}${ofDigest ? `@${ofDigest}` : `:${ofTag}`}`;
    }
    const nameOf = (image: ReturnType<typeof parseImage>) =>
      image && `${image.host}/${image.repository}${image.version}`;

    test("parseImage agrees with Docker's grammar", () => {
      let [parsed, refused] = [0, 0];
      return forAny(
        fc.property(fc.oneof({ weight: 9, arbitrary: reference }, fc.string({ unit: "binary" })), (text) => {
          const own = nameOf(parseImage(text));
          const expected = imageOfDocker(text);
          if (own !== undefined) {
            parsed++;
            expect([text, own]).toEqual([text, expected]);
          } else {
            refused++;
            // Stricter: names that Docker could take for an id, a host in capitals without a dot, length.
            const [first = ""] = text.split("/");
            const isStricter =
              text.split(/[/:@]/).some((part) => part.length > 63) || (/[A-Z]/.test(first) && !/[.:]/.test(first));
            if (expected !== undefined) expect([text, isStricter]).toEqual([text, true]);
          }
        }),
        { runs: 3_000 },
      ).then(() => {
        expect(parsed).toBeGreaterThan(100);
        expect(refused).toBeGreaterThan(100);
      });
    });

    test("parseImage returns the same for its own result", () =>
      forAny(
        fc.property(reference, (text) => {
          const image = parseImage(text);
          if (!image) return;
          const name = `${nameOf(image)}`;
          expect(name).toMatch(/^[a-z0-9.:-]+\/[a-z0-9._/-]+(:[\w.-]{1,128}|@sha256:[0-9a-f]{64})$/);
          expect(parseImage(name)).toEqual(image);
        }),
        { runs: 1_000 },
      ));

    const wildcard = fc.constantFrom(
      "*",
      "**",
      "a*",
      "*-b",
      "node",
      "library",
      "{project_id}",
      "42",
      "a",
      "***",
      "A",
      "",
    );
    const pattern = fc
      .record({
        host: fc.option(fc.constantFrom(...HOSTS, "*.example.com", "**", "registry.*", "*"), { nil: undefined }),
        path: fc.array(wildcard, { minLength: 1, maxLength: 3 }),
        version: fc.constantFrom("", ":*", ":22", ":latest", ":**", "@sha256:*", "@*", ":", "@"),
      })
      .map(({ host, path, version }) => `${host === undefined ? "" : `${host}/`}${path.join("/")}${version}`);

    const simple = fc
      .tuple(fc.constantFrom(...HOSTS), fc.constantFrom("a", "42/a", "node", "42/node"), fc.constantFrom("", ":22"))
      .map(([host, path, version]) => `${host}/${path}${version}`);

    test("matchesImage matches no image of another host", () => {
      let matched = 0;
      return forAny(
        fc.property(pattern, fc.oneof(simple, reference), fc.constantFrom(42, 4), (pattern, text, project) => {
          const image = parseImage(text);
          if (!image || !matchesImage(pattern, image, project)) return;
          matched++;
          const parsed = parseImagePattern(pattern, project);
          expect(parsed?.host).toBe(image.host);
          expect(imageOfDocker(text)?.split("/", 1)).toEqual([parsed?.host]);
          // A pattern whose first component is no host is for Docker Hub.
          if (!/^[^/]*[.:][^/]*\/|^localhost\//.test(pattern)) expect(image.host).toBe("docker.io");
        }),
        { runs: 20_000 },
      ).then(() => expect(matched).toBeGreaterThan(20));
    });

    test("matchesImage covers each image by its own name and its whole host", () =>
      forAny(
        fc.property(reference, (text) => {
          const image = parseImage(text);
          if (!image) return;
          const covers = (pattern: string) => matchesImage(pattern, image, 42);
          expect([text, covers(`${nameOf(image)}`)]).toEqual([text, true]);
          expect(covers(`${image.host}/**`)).toBe(true);
          expect(covers(`${image.host}.evil.io/**`)).toBe(false);
          expect(covers(`evil-${image.host}/**`)).toBe(false);
        }),
        { runs: 1_000 },
      ));

    const unit = fc.constantFrom(
      "a",
      "a-",
      "a.",
      "a__",
      "a/",
      "-",
      ".",
      "_",
      "*",
      "**",
      "a*",
      "/",
      ":",
      "@",
      "0",
      "A.",
      "{",
      " ",
    );
    const repeated = fc.tuple(unit, fc.integer({ min: 1, max: 3_000 })).map(([text, count]) => text.repeat(count));
    const hostile = fc.array(repeated, { minLength: 1, maxLength: 4 }).map((parts) => parts.join(""));

    // The test would not end if an expression backtracked without limit.
    test("matchesImage survives long and repetitive input", () => {
      const longest = parseImage(`registry.example.com/${"a/".repeat(110)}a:${"t".repeat(128)}`);
      if (!longest) throw new Error("it is no reference");
      return forAny(
        fc.property(hostile, (text) => {
          for (const given of [
            text,
            `registry.example.com/${text}`,
            `node:${text}`,
            `node@${text}`,
            text.slice(0, 250),
          ]) {
            const image = parseImage(given);
            if (image) expect(nameOf(image)?.length).toBeLessThan(512);
            expect(typeof matchesImage(given, image ?? longest, 42)).toBe("boolean");
          }
        }),
        {
          runs: 300,
          examples: [["a*a*a*b".padEnd(250, "a")], ["**a**a**b"], [`${"a".repeat(255)}!`], ["*a*a*a:*a*a*b"]],
        },
      );
    });

    test(
      "planImages plans or fails clearly for any response",
      () => {
        const path = join(directory(), "response.json");
        const { config } = readConfig(configFile("full"), "full", {}, {});
        const { response } = gitlabJob({ token: "token-planted" });
        const keyword = (name: string) => ({
          ...{ name, alias: "a,b", entrypoint: ["x"], command: ["y"], pull_policy: ["never"] },
          ...{ ports: [{ number: 80 }], variables: [{ key: "A", value: "$B", public: true }] },
          executor_opts: { docker: { user: "u", platform: "linux/amd64" }, kubernetes: { user: 7 } },
        });
        const whole = { ...response, image: keyword("group/image:1"), services: [keyword("postgres:16")] };
        const env = { JOB_RESPONSE_FILE: path };
        const allowed = (host: string) => host === "docker.io" || host === "registry.example.com";
        return forAny(
          fc.property(mutatedJson(whole), (content) => {
            fs.writeFileSync(path, content, "latin1");
            try {
              const job = readJob(env) as Job;
              const plan = planImages({ config, job: { ...job, imageNames: ["x"] }, jobOverrides: [], env });
              for (const { name, image, user = "0" } of [
                ...(plan?.services ?? []),
                ...(plan?.build ? [plan.build] : []),
              ]) {
                expect(name).toMatch(/^[\w-]{1,255}$/);
                expect(parseImage(`${nameOf(image)}`)).toEqual(image);
                expect(allowed(image.host)).toBe(true);
                expect(user).toMatch(/^[\w.-]+(:[\w.-]+)?$/);
              }
            } catch (failure) {
              if (!(failure instanceof Failure)) throw failure;
              expect(expectClear(failure, failure.kind)).not.toContain("token-planted");
            }
          }),
          { runs: 500 },
        );
      },
      timeout,
    );
  });

  // --- Records, with ECS mocked ---

  describe("record", () => {
    let ecs: AwsStub<EcsInput, EcsOutput, ECSClientResolvedConfig>;
    const arnOf = (digit: string) => `arn:aws:ecs:us-east-2:123456789012:task/test-cluster/${digit.repeat(32)}`;
    const [recorded, ownTask, foreign] = ["1", "2", "3"].map(arnOf) as [string, string, string];
    const record: TaskRecord = {
      ...someRecord,
      TaskARN: recorded,
      ContainerIP: "127.0.0.1",
      // A valid key, so that with an undamaged record, run tries to connect (nothing listens there).
      PrivateKey: Buffer.from(newPrivateKey()).toString("base64"),
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
      // Like ECS: without startedBy, all tasks of the cluster.
      ecs.on(ListTasksCommand).callsFake(({ startedBy }) => ({
        taskArns: !startedBy ? [ownTask, foreign] : ownStartedBy.test(startedBy) ? [ownTask] : [foreign],
      }));
    });
    afterAll(() => ecs.restore());
    /** A clock that advances 20 s per reading, so that all waits end soon. */
    const hasty = () => {
      let time = 1_950_000_000_000;
      return () => (time += 20_000);
    };
    // Keeps the address on loopback, because run connects to it.
    const content = mutatedJson(record).map((text) => text.replace(/("ContainerIP":)"[^"]*"/, '$1"127.0.0.1"'));

    // Each has one or a few wrong fields.
    const damagedRecords = [
      { StartedBy: "", TaskARN: "", Unanswered: true },
      { StartedBy: "someone else", TaskARN: "", Unanswered: true },
      { PrivateKey: "AAAA" },
      { UpdatedAt: -1e308, Deadline: 2 },
      { UpdatedAt: 1e308 },
      { Deadline: 1e308 },
    ].map((change) => JSON.stringify({ ...record, ...change }));
    const ownName = `label-${"0123456789abcdef".repeat(4)}.json`;
    const keyless = mutatedJson({ ...record, PrivateKey: "AAAA" });

    /** Like `forAny`, for several inputs at the same time. */
    const forSeveral = <T>(property: fc.IAsyncProperty<T>, options: { runs: number; examples: T[] }) =>
      forAnyAtOnce(property, { ...options, lanes: 12 });

    test.each(["cleanup", "prepare", "run"] as const)(
      "%s stops no other job's task whatever its record holds",
      (stage) =>
        // Inputs for run may share the mock's history, because run never calls StopTask.
        (stage === "run" ? forSeveral : forAny)(
          fc.asyncProperty(content, async (text) => {
            if (stage !== "run") ecs.resetHistory();
            const records = join(directory(), "records");
            fs.mkdirSync(records);
            const {
              context,
              lines,
              record: path,
            } = stageOf(records, hasty(), (config) => {
              config.SSH.ConnectTimeout = 1;
            });
            managerId(records, {});
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
            // Either the record is gone, or the log has the reason.
            if (stage === "cleanup") {
              const isReported =
                "failure" in outcome || lines.some((line) => line.includes("cannot check whether a task"));
              expect(isReported || !fs.existsSync(path)).toBe(true);
            }
            if (stage === "run") expect(stopped).toEqual([]);
          }),
          { runs: 120, examples: damagedRecords.map((text) => [text]) },
        ),
      timeout,
    );

    const damaged = (text: string): Junk[] => [
      { name: ownName, kind: "file", content: text.replace(record.PrivateKey, "AAAA") },
    ];
    const swept: Junk[] = [{ name: `${ownName}.0123456789ab.tmp`, kind: "link to itself", content: "" }];
    test(
      "sweep removes only the driver's files from a directory of any content",
      async () => {
        for (const gone of [false, true]) {
          ecs.on(DescribeTasksCommand).callsFake(({ tasks = [] }) => ({
            tasks: gone ? [] : (tasks as string[]).map((taskArn) => ({ taskArn, lastStatus: "RUNNING" })),
          }));
          await forSeveral(
            fc.asyncProperty(fc.array(junk(keyless), { maxLength: 8 }), async (files) => {
              const records = join(directory(), "records");
              fs.mkdirSync(records);
              const outside = join(directory(), "outside");
              fs.writeFileSync(outside, "not the driver's");
              const made = makeJunk(records, outside, files); // without keys, because the search for secrets would find them
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
              for (const name of made) if (!left.includes(name)) expect(name).toMatch(DRIVER_FILE);
            }),
            { runs: 120, examples: gone ? [[swept]] : damagedRecords.map((text) => [damaged(text)]) },
          );
        }
      },
      timeout,
    );
  });

  testProgram.each([
    ["cleanup", "the record"],
    ["prepare", "the record"],
    ["run", "the record"],
    ["cleanup", ".manager-id"],
    ["prepare", ".manager-id"],
    ["sweep", ".manager-id"],
  ])("%s names the path when %s is a FIFO without a writer", async (stage, what) => {
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

  describe("answer of AWS", () => {
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

    let clusters = 0;
    /** A new cluster. Each operation gets these answers in turn, and then the last one again and again. */
    function clusterOf(lists: Partial<Record<Operation, readonly Answer[]>>) {
      const cluster = `cluster-${clusters++}`;
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
    /** A clock that runs sixty times as fast. */
    const fast = () => {
      const begun = Date.now();
      return () => begun + (Date.now() - begun) * 60;
    };
    /** The complete, successful answers of the endpoint to an operation. */
    const saidTo = ({ asked }: Scenario, wanted: Operation): { tasks?: unknown; taskArns?: unknown }[] =>
      asked.flatMap(({ operation, answer: { status, body, claims }, answer }) => {
        if (operation !== wanted || status !== 200 || !isComplete(answer)) return [];
        const said = attempt(() => JSON.parse(Buffer.from(body.slice(0, claims), "latin1").toString()));
        return "value" in said && typeof said.value === "object" && said.value !== null ? [said.value] : [];
      });
    /** The tasks that the endpoint claims to have started. */
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
      "prepare and cleanup lose no started task whatever AWS answers",
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
            const output = [...lines, ...said].join("\n");
            // A task whose ARN was lost with its answer: the record stays for the next cleanup or sweep, until a list lacks the task.
            const kept = fs.existsSync(record);
            for (const arn of startedBy(scenario)) {
              const named = output.includes(formatRecord(logRecord(arn), "text-simple").slice("error: ".length, -1));
              expect(stopped.includes(arn) || named || kept || isDenied(scenario, arn)).toBe(true);
            }
          }),
          { runs: 40, lanes: 40, examples: strangeAnswers.map((lists) => [lists]) },
        ),
      timeout,
    );

    test(
      "sweep and run end in time whatever AWS answers",
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
      ["always new", (page: number) => `page ${page}`],
    ])(
      "sweep fails on an endless list of tasks whose page token is %s",
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
      "prepare sends nothing to the target of a redirection (%i)",
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

    test("prepare shortens a text of 10 MB in an answer", async () => {
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

  describe("script", () => {
    let task: Awaited<ReturnType<typeof startTask>>;
    beforeAll(async () => {
      task = await startTask();
    });
    afterAll(() => task?.host.stop(0));
    /** Runs the same script in the same container by bash itself, without the driver. */
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
      "runScript runs any bytes as bash does or refuses them",
      async () => {
        const connection = await task.logIn();
        const path = join(directory(), "script");
        const script = hosts.kind === "container" ? fc.oneof(harmlessScript, arbitraryScript) : harmlessScript;
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
                  { signal: never, log, stdout: out.sink, stderr: discard() },
                ),
              );
              if ("failure" in outcome) {
                expect(expectClear(outcome.failure)).toContain("the script contains NUL characters");
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

    test("interpreterOf maps any first line to bash or sh or refuses it", () =>
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

  test("exitCode returns 1 to 255 for any text in the runner's variables", () =>
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
    "run stores every exit code and signal of a script in the runner's file",
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
                channel.exit(0); // one of the driver's own commands
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
            // After 137, the driver would ask ECS for the reason.
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

  test("parseCommandLine lists the valid choices when it refuses arbitrary words", () =>
    forAny(
      fc.property(commandLine, (words) => {
        const parsed = attempt(() => parseCommandLine(words, commander));
        if ("failure" in parsed)
          return void expect(expectClear(parsed.failure)).toMatch(
            /^fargate.*; (valid options|valid commands|expected|usage): /s,
          );
        const request = parsed.value as ReturnType<typeof parseCommandLine>;
        expect(["config", "prepare", "run", "cleanup", "sweep"]).toContain(request?.command);
        expect(request?.operands.length).toBe(request?.command === "run" ? 2 : 0);
        expect(typeof request?.config).toBe("string");
      }),
      { runs: 600 },
    ));

  test("parseStage parses arbitrary words as parseCommandLine does or leaves them to it", async () => {
    // Command lines of stages, in which a word may have been replaced, removed or added.
    const someWord = fc.oneof(
      commandLine.map(([word = ""]) => word),
      fc.string(),
    );
    const stageLine = fc
      .record({
        config: fc.option(someWord, { nil: undefined }),
        stage: fc.constantFrom(["config"], ["prepare"], ["run", "script", "stage"], ["cleanup"]),
        at: fc.nat({ max: 6 }),
        removed: fc.nat({ max: 1 }),
        added: fc.array(someWord, { maxLength: 1 }),
      })
      .map(({ config, stage, at, removed, added }) =>
        [...(config === undefined ? [] : ["--config", config]), "custom", ...stage].toSpliced(at, removed, ...added),
      );
    let recognised = 0;
    await forAny(
      fc.property(fc.oneof(commandLine, stageLine), (words) => {
        const stage = parseStage(words);
        if (stage === undefined) return;
        recognised++;
        const parsed = attempt(() => parseCommandLine(words, commander));
        expect(JSON.stringify("value" in parsed && parsed.value)).toBe(JSON.stringify(stage));
      }),
      { runs: 2_000 },
    );
    expect(recognised).toBeGreaterThan(100);
  });

  test("formatRecord turns any text into one harmless line", () =>
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

testTable("security");

testSecrets({ never: ["logRecords"] });
