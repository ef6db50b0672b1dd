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
import { configureSync, getLogger, type LogRecord } from "@logtape/logtape";
import { type AwsStub, mockClient } from "aws-sdk-client-mock";
import fc from "fast-check";
import { Server as SshServerOfAPacket, utils } from "ssh2";
import * as v from "valibot";
import { afterAll, afterEach, beforeAll, beforeEach, describe, expect, test } from "vitest";
import {
  type Config,
  ConfigSchema,
  type Connection,
  type Context,
  exitCode,
  Failure,
  formatRecord,
  formatSweep,
  interpreterOf,
  type Job,
  makeKeyPair,
  managerId,
  openDirectory,
  parseCommandLine,
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
  jobsOf,
  makeScene,
  newJobId,
  type Scene,
  testTable,
} from "./fixtures/scene.ts";
import { wholeRun } from "./fixtures/secrets.ts";
import { startSshServer } from "./fixtures/ssh-server.ts";
import {
  cleanup,
  collect,
  configFile,
  connect,
  describeProgram,
  directory,
  hosts,
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

describeProgram("a job that claims to be another", () => {
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
  const { makeRunner, callsSince, nothingLeft, byHand, scriptFile } = jobsOf(() => world);

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
});

// ---------------------------------------------------------------------------------------------------------
// A hostile server: what a job can make of its container's sshd
// ---------------------------------------------------------------------------------------------------------

describe.concurrent("another server at the task's address", () => {
  const ready = async (scene: Scene) => {
    ended(await scene.stage("prepare"), 0);
    return readRecord(scene.record) as TaskRecord;
  };

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
});

describeProgram.concurrent("a hostile SSH server", () => {
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
    "kill-nothing": [2, /warning: the script may still run in the container: not found/],
    "zlib-bomb": [2, /Handshake failed: no matching .*compression/],
    "zlib-openssh-bomb": [2, /Handshake failed: no matching .*compression/],
    "requests-global-deaf": deaf,
    "requests-channel-deaf": deaf,
    "channels-deaf": deaf,
    "packet-size-0": [2, /error: the server accepts only packets of 0 bytes/],
    "packet-size-1": [2, /error: the server accepts only packets of 1 bytes/],
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
        const { environment, response } = gitlabJob({ id: newJobId() });
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
        expect(stderr).not.toMatch(/bug in the driver|undefined is not|is not a function/);
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

describeProgram.concurrent("a hostile server at the address of a new task", () => {
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
      expect(finished.stderr).not.toMatch(/bug in the driver|^2026-01-01/m);
    });
});

describe("the security model", () => {
  test("each row of SECURITY.md names tests, and each of them exists", async () => {
    // The names of all tests of all files, as vitest finds them.
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
  });
});

// ---------------------------------------------------------------------------------------------------------
// Any input: what comes from outside may be anything, and each property says what holds all the same
// ---------------------------------------------------------------------------------------------------------

describe("any input", () => {
  /** What an engine says when a program has made a mistake: no operator can do anything with it. */
  const ENGINE =
    /is not a(n object| function)|(undefined|null) is not|[Cc]annot read prop|not iterable|\[object |call stack|[Ii]nvalid (Date|time)|must be of type|bug in the driver/;
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
    const context: Context = { config, job, jobOverrides: [], log, env: {}, stop: never, now, wallTime: Date.now };
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

  testProgram(
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

    test("with any address: a job, or a failure without a word of it", () =>
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
    const content = mutatedJson(record).map((text) => text.replace(/("ContainerIP":)"[^"]*"/, '$1"127.0.0.1"'));

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
    const keyless = mutatedJson({ ...record, PrivateKey: "AAAA" });

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
            for (const name of made) if (!left.includes(name)) expect(name).toMatch(DRIVER_FILE);
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

  testProgram.each([
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
        if (operation !== wanted || status !== 200 || !isComplete(answer)) return [];
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

testTable("security");

testSecrets({ never: ["logRecords"] });
