/**
 * Faults: each is injected where it would occur (the AWS endpoint, a container, an SSH server, a process, a disk), and the
 * compiled program meets it. Afterwards no task may be left. Each result is a row of `docs/faults.md`.
 */
import { execFileSync, spawnSync } from "node:child_process";
import * as fs from "node:fs";
import { createServer } from "node:http";
import { connect as connectTcp, type Socket } from "node:net";
import { uptime } from "node:os";
import { basename, join } from "node:path";
import { promisify } from "node:util";
import { ECSClient, RunTaskCommand, type RunTaskCommandInput } from "@aws-sdk/client-ecs";
import { describe, expect, onTestFinished } from "vitest";
import { managerId, readJob, readRecord, type SweepReport, type TaskRecord, writeRecord } from "./fargate.ts";
import type { FaultAction, StopCause } from "./fixtures/aws.ts";
import { makeAuthority } from "./fixtures/certificates.ts";
import { driver, type Finished, type Started, start } from "./fixtures/process.ts";
import { startConnectProxy, startProxy } from "./fixtures/proxy.ts";
import {
  adviceLine,
  ended,
  type FaultOptions,
  faultJobs,
  faultTest,
  filesLeft,
  forever,
  type Met,
  makeScene,
  type Scene,
  SkipFault,
  testTable,
} from "./fixtures/scene.ts";
import { wholeRun } from "./fixtures/secrets.ts";
import { straceWorks } from "./fixtures/steps.ts";
import {
  type ContainerHostsOptions,
  containerHosts,
  DROPBEAR,
  embeddedHosts,
  ONE_SESSION,
  ONLY_ED25519,
} from "./fixtures/tasks.ts";
import {
  directory,
  PACKAGES,
  plainSshd,
  setUp,
  startTask,
  TINI,
  taskTest,
  testProgram,
  testSecrets,
} from "./fixtures/test-support.ts";
import { makeWorld } from "./fixtures/world.ts";

setUp({ hosts: true });

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
    // Shorter than the time since this machine has booted, which counts as well.
    scene.configure({ Fargate: { AbandonedAfter: 60 } });
    const arn = await prepared(scene);
    ended(await scene.run("true"), 0);
    idle(scene, 50);
    expect(await sweeping(scene, "--json")).toMatchObject(untouched);
    idle(scene, 61);
    scene.configure({ Fargate: { AbandonedAfter: 0 } });
    expect(await sweeping(scene, "--json")).toMatchObject(untouched);
    scene.configure({ Fargate: { AbandonedAfter: 60 } });
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
      scene.configure({ Fargate: { AbandonedAfter: 60 } });
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
      touched(50);
      expect(await sweeping(scene, "--json")).toMatchObject(untouched);
      touched(61);
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
      /correct the clock/,
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
  testProgram.concurrent("with WaitForHealthy prepare logs in once ECS reports the container healthy", async () => {
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
      expect(finished.stderr).toContain("what to do: the runner's host must be able to reach AWS");
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

testTable("faults");

testSecrets({ never: ["logRecords", "errors"] });
