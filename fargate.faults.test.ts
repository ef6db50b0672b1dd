/**
 * Fault tests. Each injects one fault where it would occur (AWS endpoint, container, SSH server, process, disk) while
 * the compiled driver runs. Afterwards no task may be running. Each result is a row of `docs/faults.md`.
 */
import { execFileSync, spawnSync } from "node:child_process";
import { once } from "node:events";
import * as fs from "node:fs";
import { createServer } from "node:http";
import { connect as connectTcp, type Socket } from "node:net";
import { uptime } from "node:os";
import { basename, join } from "node:path";
import { promisify } from "node:util";
import { ECSClient, RunTaskCommand, type RunTaskCommandInput } from "@aws-sdk/client-ecs";
import { describe, expect, onTestFinished } from "vitest";
import {
  CONTAINER,
  managerId,
  readJob,
  readRecord,
  type SweepReport,
  type TaskRecord,
  writeRecord,
} from "./fargate.ts";
import type { Fault, FaultAction, Operation, StopCause } from "./fixtures/aws.ts";
import { makeAuthority } from "./fixtures/certificates.ts";
import { addRow } from "./fixtures/faults.ts";
import { gitlabJob } from "./fixtures/job.ts";
import {
  type Container,
  MANAGER_CLUSTER,
  type ManagerWorld,
  type ManagerWorldOptions,
  managerTest,
} from "./fixtures/manager.ts";
import { driver, type Finished, type Started, start } from "./fixtures/process.ts";
import { startConnectProxy, startProxy } from "./fixtures/proxy.ts";
import {
  ANY_IMAGE,
  adviceLine,
  ended,
  type FaultEffect,
  type FaultOptions,
  faultRow,
  faults,
  faultTest,
  filesLeft,
  forever,
  imageHosts,
  makeScene,
  nextJobId,
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
  LIKE_ALPINE,
  ONE_SESSION,
  ONLY_ED25519,
} from "./fixtures/tasks.ts";
import {
  DUMB_INIT,
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

/** A FIFO: its reader blocks until `release`. `reached` resolves when there is a reader. */
function fifo(): { path: string; reached: Promise<unknown>; release: (content: string) => Promise<void> } {
  const path = join(directory(), "fifo");
  execFileSync("mkfifo", [path]);
  const opened = promisify(fs.open)(path, "w"); // resolves when there is a reader
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

/** A server that never answers. `reached` resolves at its first request. */
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

/** A step at which a test can hold prepare. */
interface Step {
  readonly name: string;
  /** Starts prepare and resolves when it has reached the step. `release` lets it go on; call it after the signal. */
  hold(scene: Scene): Promise<{ prepare: Started; release?: () => unknown }>;
  readonly isAfterLogin?: boolean;
  readonly options?: FaultOptions;
}

/** A service that counts as ready once this port has a listener. */
const serviceAt = (port: string) => {
  const variable = { key: "HEALTHCHECK_TCP_PORT", value: port, public: true, masked: false, file: false, raw: true };
  return { services: [{ name: "redis:7", variables: [variable] }] };
};
/** A job with a service. Embedded hosts do not run it: the port is that of the stand-in for AWS. */
const withService: FaultOptions = {
  changes: { top: { JobImage: ANY_IMAGE } },
  job: ({ aws }) => serviceAt(new URL(aws.url).port),
};

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
    name: "before RunTask is sent",
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
    name: "before RunTask takes effect",
    async hold(scene) {
      const { aws } = scene.world;
      const held = Promise.withResolvers<void>();
      aws.inject({ operation: "RunTask", do: { holdUntil: held.promise } });
      const prepare = scene.begin("prepare");
      await aws.waitFor(() => aws.callsTo("RunTask").length === 1, 30_000);
      expect(aws.tasks()).toEqual([]);
      // RunTask takes effect only after the driver has ended.
      return { prepare, release: () => held.resolve() };
    },
    options: { timing: { hideList: 1_500 } },
  },
  {
    name: "before RunTask is answered",
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
    name: "before DescribeTasks is answered",
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
    name: "while it looks for shells",
    async hold(scene) {
      const prepare = scene.begin("prepare");
      await scene.commandHeld;
      return { prepare };
    },
    options: { holdFirstCommand: true },
  },
  ...(["DescribeTaskDefinition", "RegisterTaskDefinition"] as const).map(
    (operation): Step => ({
      name: `while a definition is ${operation.startsWith("Describe") ? "described" : "registered"}`,
      async hold({ begin, world: { aws } }) {
        const held = Promise.withResolvers<void>();
        aws.inject({ operation, do: { holdUntil: held.promise, after: true } });
        const prepare = begin("prepare");
        await aws.waitFor(() => aws.callsTo(operation).length === 1, 30_000);
        expect(aws.tasks()).toEqual([]);
        return { prepare, release: () => held.resolve() };
      },
      options: withService,
    }),
  ),
  {
    name: "while it waits for a service",
    isAfterLogin: true,
    async hold(scene) {
      const server = createServer().listen(0, "127.0.0.1");
      await once(server, "listening");
      const { port } = server.address() as { port: number };
      await new Promise((closed) => server.close(closed));
      const path = scene.env.JOB_RESPONSE_FILE as string;
      const { response } = gitlabJob(serviceAt(`${port}`));
      const { services } = response;
      fs.writeFileSync(path, JSON.stringify({ ...JSON.parse(fs.readFileSync(path, "utf8")), services }));
      const prepare = scene.begin("prepare");
      await prepare.shows("Waiting for services: redis:7");
      return { prepare, release: () => server.listen(port, "127.0.0.1").unref() };
    },
    options: withService,
  },
];

describe.concurrent("interrupted prepare", () => {
  for (const step of steps) {
    faultTest(
      `cleanup leaves no task after prepare is killed ${step.name}`,
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
      `prepare succeeds after an earlier one is killed ${step.name}`,
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
        `prepare ends on ${signal} ${step.name}`,
        async (scene) => {
          const { prepare, release } = await step.hold(scene);
          prepare.process.kill(signal);
          if (step.name.startsWith("before its record")) await release?.(); // prepare is blocked in a read and cannot handle the signal yet
          const finished = await prepare.finished;
          await release?.();
          ended(finished, 2);
          // If RunTask was answered, prepare has stopped the task itself.
          if (scene.world.aws.callsTo("RunTask").every(({ status }) => status === 200))
            expect(scene.world.aws.running()).toEqual([]);
          return { stage: "prepare", finished };
        },
        step.options,
      );
  }
});

describe.concurrent("task definitions of jobs", () => {
  const throttled = { error: "ThrottlingException", message: "Rate exceeded" };
  const derived = ({ world }: Scene) => world.aws.taskDefinitions().filter(({ family }) => /-job-/.test(family));

  for (const operation of ["DescribeTaskDefinition", "RegisterTaskDefinition"] as const) {
    const faults: [what: string, fault: FaultAction, times: number][] = [
      ["is throttled three times", throttled, 3],
      ["answers 500 after its effect", "500-after", 1],
      ["loses its answer", "reset-after", 1],
      ["gets no connection", "reset-before", 1],
    ];
    for (const [what, fault, times] of faults)
      faultTest(
        `prepare registers once when ${operation} ${what}`,
        async (scene) => {
          const injected = scene.world.aws.inject({ operation, times, do: fault });
          const finished = await scene.stage("prepare");
          ended(finished, 0);
          expect(injected.used).toBe(times);
          expect(derived(scene)).toHaveLength(1);
          expect(scene.world.aws.running()[0]?.taskDefinitionArn).toBe(derived(scene)[0]?.taskDefinitionArn);
          return { stage: "prepare", finished };
        },
        withService,
      );
    faultTest(
      `prepare fails when ${operation} is not permitted`,
      async (scene) => {
        scene.world.aws.permissions = new Set(
          ["RunTask", "StopTask", "DescribeTasks", "ListTasks", "DescribeTaskDefinition", "RegisterTaskDefinition"]
            .filter((name) => name !== operation)
            .map((name) => `ecs:${name}`),
        );
        const finished = await scene.stage("prepare");
        ended(finished, 2);
        expect(finished.stderr).toContain(`ecs:${operation} was refused: AccessDeniedException`);
        expect(scene.world.aws.tasks()).toEqual([]);
        return { stage: "prepare", finished };
      },
      withService,
    );
    faultTest(
      `prepare fails when ${operation} is throttled until StartTimeout`,
      async (scene) => {
        scene.world.aws.inject({ operation, times: Number.POSITIVE_INFINITY, do: throttled });
        const finished = await scene.stage("prepare");
        ended(finished, 2);
        expect(scene.world.aws.tasks()).toEqual([]);
        return { stage: "prepare", finished };
      },
      { ...withService, changes: { ...withService.changes, Fargate: { StartTimeout: 3 } } },
    );
  }

  faultTest(
    "prepare fails when ECS refuses the task definition of a job",
    async (scene) => {
      const message = "No Fargate configuration exists for given values.";
      scene.world.aws.inject({ operation: "RegisterTaskDefinition", do: { error: "ClientException", message } });
      const finished = await scene.stage("prepare");
      ended(finished, 2);
      return { stage: "prepare", finished };
    },
    withService,
  );

  faultTest(
    "prepare registers a task definition again that was deregistered meanwhile",
    async (scene) => {
      ended(await scene.stage("prepare"), 0);
      ended(await scene.stage("cleanup"), 0);
      const [first] = derived(scene);
      if (first) first.status = "INACTIVE";
      const finished = await scene.stage("prepare");
      ended(finished, 0);
      expect(derived(scene)).toHaveLength(2);
      expect(scene.world.aws.running()[0]?.taskDefinitionArn).toBe(derived(scene)[1]?.taskDefinitionArn);
      return { stage: "prepare", finished };
    },
    withService,
  );

  const hostsWithDebian = { container: imageHosts({ "debian:12": [], "redis:7": [] }) };
  const withEntryPoint = (...entrypoint: string[]): FaultOptions => ({
    ...hostsWithDebian,
    changes: { top: { JobImage: ANY_IMAGE }, Fargate: { StartTimeout: 15 } },
    job: () => ({ image: { name: "debian:12", entrypoint } }),
  });
  faultTest(
    "prepare fails the build when image:entrypoint ends at once",
    async (scene) => {
      const finished = await scene.stage("prepare");
      ended(finished, 1);
      return { stage: "prepare", finished };
    },
    withEntryPoint("sh", "-c", "exit 3"),
  );
  faultTest(
    "prepare fails when image:entrypoint never runs its arguments",
    async (scene) => {
      const finished = await scene.stage("prepare");
      ended(finished, 1);
      return { stage: "prepare", finished };
    },
    withEntryPoint("sh", "-c", "sleep 600"),
  );
  const unhealthy = { command: ["CMD-SHELL", "exit 1"], interval: 5, retries: 1 };
  for (const [what, healthCheck] of [
    ["becomes UNHEALTHY", unhealthy],
    ["is not HEALTHY within StartTimeout", { ...unhealthy, startPeriod: 300 }],
  ] as const)
    faultTest(
      `prepare starts no service if ci-coordinator ${what}`,
      async (scene) => {
        const finished = await scene.stage("prepare");
        ended(finished, 2);
        return { stage: "prepare", finished };
      },
      {
        ...hostsWithDebian,
        taskDefinitions: [
          { family: "test-task", containerDefinitions: [{ name: CONTAINER, image: "sshd", healthCheck }] },
        ],
        changes: { top: { JobImage: ANY_IMAGE }, Fargate: { StartTimeout: 15 } },
        job: () => ({ services: ["redis:7"] }),
      },
    );
});

describe.concurrent("RunTask answers", () => {
  for (const [what, fault] of [
    ["the connection breaks after RunTask takes effect", "reset-after"],
    ["the answer is a 500 after RunTask takes effect", "500-after"],
    ["the connection breaks before RunTask takes effect", "reset-before"],
  ] as const)
    faultTest(`prepare starts one task when ${what}`, async (scene) => {
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

  // The driver gives up the call after 30 s.
  faultTest("prepare starts one task when RunTask takes effect without an answer", async (scene) => {
    const { aws } = scene.world;
    aws.inject({ operation: "RunTask", do: "hang-after" });
    const finished = await scene.stage("prepare");
    ended(finished, 0);
    expect(aws.tasks()).toHaveLength(1);
    return { stage: "prepare", finished, says: /got no answer|still fails/ };
  });

  faultTest("prepare starts one task when RunTask is throttled ten times", async (scene) => {
    const { aws } = scene.world;
    aws.inject({ operation: "RunTask", times: 10, do: { error: "ThrottlingException", message: "Rate exceeded" } });
    const finished = await scene.stage("prepare");
    ended(finished, 0);
    expect(aws.tasks()).toHaveLength(1);
    expect(new Set(aws.callsTo("RunTask").map(({ input }) => input.clientToken)).size).toBe(1);
    return { stage: "prepare", finished };
  });

  faultTest(
    "prepare stops its task when its token conflicts after a lost answer",
    async (scene) => {
      const { aws } = scene.world;
      aws.inject({ operation: "RunTask", do: "500-after" });
      const message = "The provided clientToken is already in use with a different RunTask request.";
      aws.inject({ operation: "RunTask", do: { error: "ConflictException", message } });
      const finished = await scene.stage("prepare");
      ended(finished, 2);
      expect(aws.tasks()).toHaveLength(1);
      expect(aws.running()).toEqual([]); // prepare found the task by its startedBy and stopped it
      // The runner's next attempt gets a new task.
      ended(await scene.stage("prepare"), 0);
      expect(aws.running()).toHaveLength(1);
      return { stage: "prepare", finished };
    },
    { timing: { hideList: 1_000 } },
  );

  faultTest(
    "prepare stops its task when DescribeTasks is throttled until StartTimeout",
    async (scene) => {
      const { aws } = scene.world;
      const throttled: FaultAction = { error: "ThrottlingException", message: "Rate exceeded" };
      aws.inject({ operation: "DescribeTasks", times: Number.POSITIVE_INFINITY, do: throttled });
      const finished = await scene.stage("prepare");
      ended(finished, 2);
      // Throttling is a reason to start again, but not here: a task exists.
      expect(aws.tasks()).toHaveLength(1);
      expect(aws.running()).toEqual([]);
      return { stage: "prepare", finished };
    },
    { changes: { Fargate: { StartTimeout: 8 } } },
  );

  faultTest(
    "prepare stops its task when capacity is refused after a lost answer",
    async (scene) => {
      const { aws } = scene.world;
      aws.inject({ operation: "RunTask", do: "500-after" });
      const message = "You've reached the limit on the number of vCPUs you can run concurrently";
      aws.inject({ operation: "RunTask", do: { error: "ClientException", message } });
      const finished = await scene.stage("prepare");
      ended(finished, 2);
      // The first call may have started a task, so prepare uses no other token: it finds the task and stops it.
      expect(aws.callsTo("RunTask")).toHaveLength(2);
      expect(aws.tasks()).toHaveLength(1);
      expect(aws.running()).toEqual([]);
      return { stage: "prepare", finished };
    },
    { timing: { hideList: 1_000 } },
  );

  faultTest(
    "prepare stops its task when every answer is lost until StartTimeout",
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

  faultTest("prepare starts a new task in each of three tries when tasks stop at once", async (scene) => {
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
    // Each attempt gets a new task, not the stopped one of the attempt before.
    expect(new Set(seen).size).toBe(3);
    expect(aws.tasks()).toHaveLength(3);
    return { stage: "prepare", finished: finished as Finished };
  });
});

describe.concurrent("cleanup", () => {
  /** Runs prepare, so that the scene's job has a task. */
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
    faultTest(`cleanup stops the task when StopTask ${what}`, async (scene) => {
      await prepared(scene);
      const times = fault === "reset-before" ? 5 : 10;
      scene.world.aws.inject({ operation: "StopTask", times, do: fault });
      const finished = await scene.stage("cleanup");
      ended(finished, 0);
      expect(scene.world.aws.running()).toEqual([]);
      expect(scene.world.aws.callsTo("StopTask").length).toBeGreaterThan(times);
      return { stage: "cleanup", finished };
    });

  // The next cleanup succeeds.
  faultTest("cleanup keeps the record when StopTask fails for more than a minute", async (scene) => {
    const arn = await prepared(scene);
    const broken = scene.world.aws.inject({
      operation: "StopTask",
      times: Number.POSITIVE_INFINITY,
      do: { error: "ServerException", message: "Service Unavailable", status: 500 },
    });
    const finished = await scene.stage("cleanup");
    ended(finished, 2);
    expect(finished.stderr).toMatch(/may still be running \(.*\); stop it by hand/);
    expect(readRecord(scene.record)).toMatchObject({ TaskARN: arn });
    broken.remove();
    return { stage: "cleanup", finished };
  });

  faultTest("cleanup keeps the record when StopTask is not permitted", async (scene) => {
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

  faultTest("cleanup is idempotent", async (scene) => {
    await prepared(scene);
    expect(await scene.stage("cleanup")).toMatchObject({ code: 0, stderr: "" });
    const finished = await scene.stage("cleanup");
    expect(finished).toMatchObject({ code: 0, stderr: "" });
    noRunTask(scene, 1);
    return { stage: "the second cleanup", finished };
  });

  faultTest("cleanup succeeds beside another cleanup of the job", async (scene) => {
    await prepared(scene);
    const both = await Promise.all([scene.stage("cleanup"), scene.stage("cleanup")]);
    for (const one of both) expect(one).toMatchObject({ code: 0, stderr: "" });
    return { stage: "cleanup", finished: both[0] as Finished };
  });

  // The record has `Unanswered`, and ListTasks does not return the task at first.
  for (const hidden of [0, 3_000])
    faultTest(
      `cleanup stops the task of an unanswered RunTask that is hidden for ${hidden / 1000} s`,
      async (scene) => {
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
      },
    );

  faultTest("cleanup stops a task that StopTask does not know at first", async (scene) => {
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

  // systemd may send SIGQUIT, which is meant for the runner, to its stages as well.
  faultTest("cleanup stops the task despite SIGQUIT", async (scene) => {
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

  faultTest("sweep stops the task of a killed cleanup before its deadline", async (scene) => {
    const { aws } = scene.world;
    await prepared(scene);
    const held = aws.inject({ operation: "StopTask", times: Number.POSITIVE_INFINITY, do: { holdUntil: forever } });
    const cleaning = scene.begin("cleanup");
    await aws.waitFor(() => aws.callsTo("StopTask").length > 0);
    cleaning.process.kill("SIGKILL");
    const finished = await cleaning.finished;
    held.remove();
    // The task's deadline is hours away, but cleanup has marked it in the record.
    const swept = await scene.begin("sweep").finished;
    ended(swept, 0);
    expect(aws.running()).toEqual([]);
    return { stage: "cleanup", finished };
  });

  faultTest("cleanup stops the task when the disk of its record becomes read-only", async (scene) => {
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
    ["is cut off after the task's name", (path) => fs.truncateSync(path, 160)],
    ["is cut off before the task's name", (path) => fs.truncateSync(path, 20)],
    [
      "is of a newer version",
      (path) => {
        const record = JSON.parse(fs.readFileSync(path, "utf8"));
        fs.writeFileSync(path, JSON.stringify({ ...record, Version: 2, ContainerIP: { v4: record.ContainerIP } }));
      },
    ],
    [
      "is a directory",
      (path) => {
        fs.rmSync(path);
        fs.mkdirSync(path);
      },
      { code: 2, keepsRecord: true },
    ],
    ["is readable by others", (path) => fs.chmodSync(path, 0o644)],
    ["is writable by others", (path) => fs.chmodSync(path, 0o666)],
    [
      "belongs to another user",
      (path) => {
        if (process.geteuid?.() !== 0) throw new SkipFault("only root can give files away");
        fs.chownSync(path, 12_345, 12_345);
      },
    ],
  ];
  for (const [what, damage, right = { code: 0, keepsRecord: false }] of damages)
    faultTest(`cleanup stops the task when its record ${what}`, async (scene) => {
      await prepared(scene);
      wholeRun.ownFile(scene.record); // the test damages it, so its content is not the driver's
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
    faultTest(`run refuses a record that is ${what} a running job's`, async (scene) => {
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
      // cleanup finds its own task by its startedBy. The other job's task and record are untouched.
      expect(scene.world.aws.running().map(({ taskArn }) => taskArn)).not.toContain(arn);
      expect(scene.world.aws.running()).toHaveLength(1);
      ended(await scene.begin("run", { script: "true", env }).finished, 0);
      ended(await scene.stage("cleanup", { env }), 0);
      return { stage: "run", finished: run };
    });

  faultTest("cleanup stops a task in a cluster that only a writable record names", async (scene) => {
    await prepared(scene);
    wholeRun.ownFile(scene.record);
    fs.chmodSync(scene.record, 0o660);
    scene.configure({ Fargate: { Cluster: "bare-cluster" } });
    const finished = await scene.stage("cleanup");
    ended(finished, 0);
    // The task in the damaged record counts, because ECS confirms that it is this job's.
    expect(scene.world.aws.running()).toEqual([]);
    scene.configure();
    return { stage: "cleanup", finished };
  });
  faultTest("prepare refuses a directory for records that anybody may write to", async (scene) => {
    fs.mkdirSync(scene.world.records);
    fs.chmodSync(scene.world.records, 0o777);
    const refused = await scene.stage("prepare");
    ended(refused, 2);
    expect(scene.world.aws.calls).toEqual([]);
    ended(await scene.stage("sweep"), 2);
    fs.chmodSync(scene.world.records, 0o700);
    await prepared(scene);
    // An existing task gets no more scripts, but cleanup still stops it.
    fs.chmodSync(scene.world.records, 0o777);
    ended(await scene.run("echo never"), 2);
    return { stage: "prepare", finished: refused };
  });
  faultTest("prepare warns of a directory for records that the group may write to", async (scene) => {
    fs.mkdirSync(scene.world.records);
    fs.chmodSync(scene.world.records, 0o770);
    const finished = await scene.stage("prepare");
    ended(finished, 0);
    ended(await scene.run("true"), 0);
    return { stage: "prepare", finished, says: /warning: TaskMetadata/ };
  });
  // World-writable with the sticky bit, like /tmp.
  faultTest("prepare warns of a directory for records that all users share", async (scene) => {
    fs.mkdirSync(scene.world.records);
    fs.chmodSync(scene.world.records, 0o1777);
    scene.configure({ TaskMetadata: { Directory: `${scene.world.records}/` } });
    const finished = await scene.stage("prepare");
    ended(finished, 0);
    expect(finished.stderr).not.toContain("chmod");
    ended(await scene.run("true"), 0);
    return { stage: "prepare", finished, says: /warning: / };
  });

  faultTest("cleanup succeeds when the task has already stopped", async (scene) => {
    const arn = await prepared(scene);
    await scene.world.aws.stopTask(arn, { stopCode: "UserInitiated", stoppedReason: "Task stopped by user" });
    const finished = await scene.stage("cleanup");
    expect(finished).toMatchObject({ code: 0, stderr: "" });
    return { stage: "cleanup", finished };
  });

  faultTest("cleanup succeeds when ECS no longer knows the task", async (scene) => {
    await prepared(scene);
    const unknown = "arn:aws:ecs:us-east-2:123456789012:task/test-cluster/00000000000000000000000000000000";
    const record = readRecord(scene.record) as TaskRecord;
    writeRecord(scene.record, { ...record, TaskARN: unknown });
    const finished = await scene.stage("cleanup");
    ended(finished, 0);
    expect(filesLeft(scene.world)).toEqual([]);
    // The job's real task, which the damaged record does not name, would otherwise be left.
    await scene.world.aws.stopTask(record.TaskARN, { stopCode: "UserInitiated", stoppedReason: "test over" });
    return { stage: "cleanup", finished };
  });

  for (const step of steps)
    faultTest(
      `cleanup ends a live prepare ${step.name}`,
      async (scene) => {
        const { aws } = scene.world;
        aws.timing.sshDelay = 600_000; // no login succeeds before cleanup is done
        if (step.options?.holdFirstCommand || step.isAfterLogin) aws.timing.sshDelay = 100;
        const { prepare, release } = await step.hold(scene);
        scene.configure({ top: { LogLevel: "debug" } });
        const begun = scene.begin("cleanup");
        const cleaning = begun.finished;
        await begun.shows("prepare is still running"); // only now may prepare go on
        if (!step.isAfterLogin) await release?.();
        const finished = await prepare.finished;
        const cleaned = await cleaning;
        ended(cleaned, 0);
        ended(finished, 2);
        expect(aws.running()).toEqual([]);
        return { stage: "cleanup", finished: { ...cleaned, stderr: "" } };
      },
      step.options,
    );

  faultTest("cleanup ends a live prepare when ListTasks is not permitted", async (scene) => {
    const { aws } = scene.world;
    aws.permissions = new Set(["ecs:RunTask", "ecs:StopTask", "ecs:DescribeTasks", "iam:PassRole"]);
    aws.timing.sshDelay = 600_000;
    const prepare = scene.begin("prepare");
    await aws.waitFor(() => aws.running().length === 1);
    scene.configure({ top: { LogLevel: "debug" } });
    const cleaning = scene.begin("cleanup");
    await cleaning.shows("prepare is still running");
    ended(await prepare.finished, 2);
    const finished = await cleaning.finished;
    ended(finished, 0);
    expect(finished.stderr.match(/cannot check whether a task/g)).toHaveLength(1);
    expect(aws.running()).toEqual([]);
    return { stage: "cleanup", finished, says: /cannot check whether a task/ };
  });

  for (const signal of ["SIGTERM", "SIGINT"] as const) {
    faultTest(`cleanup stops the task despite ${signal} during StopTask`, async (scene) => {
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
    faultTest(`cleanup stops the task despite ${signal} during ListTasks`, async (scene) => {
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

describe.concurrent("late output", () => {
  faultTest(
    "run waits for a filter that writes 3 s after the script has failed",
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
    "run waits for a late filter when it can begin no further command",
    async (scene) => {
      ended(await scene.stage("prepare"), 0);
      const finished = await scene.run("exec > >(sleep 3; sort) 2>&1; echo b; echo a >&2; exit 3");
      ended(finished, 1);
      expect(finished.stdout.toString()).toBe("a\nb\n");
      return { stage: "run", finished };
    },
    // The driver's command that looks for the processes holding the channel.
    { misbehaviour: { holdExec: (command) => (command.includes("/fd/[0-2]") ? forever : undefined) } },
  );
  faultTest(
    "run ends while a background process still writes to the job's output",
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

/** A .bashrc that breaks PATH, exec and kill. */
const BREAKS_PATH_AND_EXEC =
  "PATH=/nowhere; exec() { echo meddled; }; shopt -s expand_aliases; alias exec=:; kill() { :; }; export -f kill";

describe.concurrent("interrupted run", () => {
  faultTest("run refuses a script for PowerShell", async (scene) => {
    ended(await scene.stage("prepare"), 0);
    const finished = await scene.run("& {\r\n\r\n$ErrorActionPreference = 'Stop'\r\n");
    ended(finished, 2);
    return { stage: "run", finished };
  });

  faultTest("run ends at the job's deadline after the runner has died", async (scene) => {
    ended(await scene.stage("prepare"), 0);
    const record = readRecord(scene.record) as TaskRecord;
    writeRecord(scene.record, { ...record, Deadline: Math.floor(Date.now() / 1000) });
    const finished = await scene.run("echo running; sleep 600");
    ended(finished, 2);
    return { stage: "run", finished };
  });

  for (const signal of ["SIGTERM", "SIGINT"] as const) {
    faultTest(`run ends on ${signal} while it connects`, async (scene) => {
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
    faultTest(`run ends its script on ${signal}`, async (scene) => {
      ended(await scene.stage("prepare"), 0);
      const mark = `600.${process.pid}${signal.length}`; // a duration that no other process uses
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
    const mark = `600.${process.pid}${nextJobId}`;
    const script = `PATH=/usr/bin:/bin; trap '${trap}' TERM; echo running; sleep ${mark} & wait; echo never`;
    const run = scene.begin("run", { script });
    await run.shows("running");
    run.process.kill("SIGTERM");
    const finished = await run.finished;
    expect(finished).toMatchObject({ code: 2, stdout: Buffer.from("running\nreleased\n") });
    expect(finished.stderr).not.toContain("may still be running");
    const [task] = scene.world.aws.running();
    const still = await task?.host?.exec(`cat /proc/[0-9]*/cmdline 2>/dev/null | tr '\\0' '\\n' | grep -c '^${mark}$'`);
    expect(still?.output.trim()).toBe("0");
    const after = await scene.run("echo after");
    expect(after).toMatchObject({ code: 0, stdout: Buffer.from("after\n") });
    return { stage: "run", finished };
  };
  for (const [what, container] of [
    ["dropbear", DROPBEAR], // where a script's shell does not lead its session
    ["an sshd with MaxSessions 1", ONE_SESSION], // one channel per connection
  ] as const)
    faultTest(
      `run ends its script on SIGTERM under ${what}`,
      async (scene) => {
        ended(await scene.stage("prepare"), 0);
        return releasesLock(scene, "echo released; exit 1");
      },
      { container },
    );
  faultTest(
    "run ends its script on SIGTERM with a .bashrc of 4 s and a trap of 8 s",
    async (scene) => {
      ended(await scene.stage("prepare"), 0);
      const [task] = scene.world.aws.running();
      await task?.host?.exec("echo 'sleep 4' >/root/.bashrc");
      return releasesLock(scene, "sleep 8; echo released; exit 1");
    },
    { container: true },
  );
  faultTest(
    "run ends a script that ignores SIGTERM when CancelGracePeriod is 0",
    async (scene) => {
      ended(await scene.stage("prepare"), 0);
      const mark = `600.${process.pid}0${nextJobId}`;
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
    "run ends its script on SIGTERM when .bashrc breaks PATH and replaces exec",
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
  /** Makes tasks look older: the driver takes their age from AWS's createdAt. */
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
  /** Makes a record this many seconds old. */
  const ageRecord = (path: string, seconds: number, changes: Partial<TaskRecord> = {}) => {
    const record = readRecord(path) as TaskRecord;
    writeRecord(path, { ...record, UpdatedAt: Math.floor(Date.now() / 1000 - seconds), ...changes });
  };

  faultTest("sweep stops a task without a record after 10 minutes", async (scene) => {
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
    expect(lines[1]).toBe("tasks: 1 stopped, 0 left running; records: 0 removed; problems: 0");
    const stop = scene.world.aws.callsTo("StopTask").at(-1);
    expect(stop?.input.reason).toBe("fargate sweep: its record is gone");
    return {
      stage: "sweep",
      finished: { ...finished, stderr: finished.stdout.toString() },
      says: /its record is gone/,
    };
  });

  faultTest("sweep leaves a task that its job stops just after the task was listed", async (scene) => {
    const arn = await prepared(scene);
    age(scene, 601);
    const { aws } = scene.world;
    const held = Promise.withResolvers<void>();
    aws.inject({ operation: "DescribeTasks", do: { holdUntil: held.promise, after: true } });
    const before = aws.callsTo("DescribeTasks").length;
    const sweep = sweeping(scene);
    await aws.waitFor(() => aws.callsTo("DescribeTasks").length > before, 30_000);
    ended(await scene.stage("cleanup"), 0);
    expect(fs.existsSync(scene.record)).toBe(false);
    held.resolve();
    const finished = await sweep;
    expect(finished).toMatchObject({ code: 0, stderr: "" });
    expect(aws.callsTo("StopTask").map(({ input }) => input.task)).toEqual([arn]);
    return {
      stage: "sweep",
      finished: { ...finished, stderr: finished.stdout.toString() },
      says: /^tasks: 0 stopped, 0 left running; records: 0 removed; problems: 0/,
    };
  });

  faultTest("sweep leaves a task that its cleanup is about to stop", async (scene) => {
    const arn = await prepared(scene);
    const { aws } = scene.world;
    const held = Promise.withResolvers<void>();
    aws.inject({ operation: "StopTask", do: { holdUntil: held.promise } });
    const cleaning = scene.begin("cleanup");
    await aws.waitFor(() => aws.callsTo("StopTask").length > 0);
    const finished = await sweeping(scene);
    expect(JSON.parse(fs.readFileSync(scene.record, "utf8"))).toMatchObject({ Deadline: 1 });
    held.resolve();
    ended(await cleaning.finished, 0);
    expect(finished).toMatchObject({ code: 0, stderr: "" });
    expect(aws.callsTo("StopTask").map(({ input }) => input.task)).toEqual([arn]);
    expect(filesLeft(scene.world).filter((name) => !name.startsWith(".manager-id"))).toEqual([]);
    return {
      stage: "sweep",
      finished: { ...finished, stderr: finished.stdout.toString() },
      says: /^tasks: 0 stopped, 1 left running; records: 0 removed; problems: 0/,
    };
  });

  faultTest("sweep stops a task of another host past its deadline", async (scene) => {
    const arn = await prepared(scene);
    const manager = managerOf(scene);
    fs.rmSync(scene.world.records, { recursive: true });
    age(scene, 100_000);
    const early = await sweeping(scene, "--json");
    expect(early).toMatchObject({ code: 0, report: { stopped: [], left: [{ taskArn: arn }] } });
    // With --manager, the operator need not wait for the deadline.
    const known = await sweeping(scene, "--manager", manager, "--dry-run", "--json");
    expect(known).toMatchObject({ code: 0, report: { stopped: [{ taskArn: arn, why: "its record is gone" }] } });
    deadlineIn(scene, -1);
    const finished = await sweeping(scene);
    expect(scene.world.aws.running()).toEqual([]);
    return { stage: "sweep", finished: { ...finished, stderr: finished.stdout.toString() }, says: /past its deadline/ };
  });

  faultTest("sweep stops a task without a readable deadline after MaxTaskAge", async (scene) => {
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

  faultTest("sweep leaves running jobs and foreign tasks alone", async (scene) => {
    const { aws } = scene.world;
    const arn = await prepared(scene);
    // Tasks that sweep must not stop: of other programs, and of another manager before their deadline.
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

  faultTest("sweep leaves a job past its deadline until its run is gone", async (scene) => {
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
    // The same sweep removes the record.
    expect(filesLeft(scene.world)).toEqual([]);
    return { stage: "sweep", finished: { ...finished, stderr: finished.stdout.toString() }, says: /./ };
  });

  /** Makes all locks and records this many seconds old, as if the clock had been set forward. */
  const idle = (scene: Scene, seconds: number) => {
    const then = Date.now() / 1000 - seconds;
    for (const name of filesLeft(scene.world)) fs.utimesSync(join(scene.world.records, name), then, then);
  };
  const report = (finished: Finished) => ({ ...finished, stderr: finished.stdout.toString() });
  const untouched = { code: 0, report: { stopped: [], removedRecords: [], problems: [] } };
  /** Runs a script in a new PID namespace, like a driver in another container with the same directory of records. */
  const runElsewhere = (scene: Scene, script: string) => {
    const file = join(directory(), "script");
    fs.writeFileSync(file, script);
    const elsewhere = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child"];
    if (spawnSync(elsewhere[0] as string, [...elsewhere.slice(1), "true"]).status !== 0)
      throw new SkipFault("unshare(1) is not permitted");
    const run = [driver, "--config", scene.config, "custom", "run", file, "build_script"];
    return start([...elsewhere, ...run], { env: scene.env });
  };

  faultTest("sweep stops only the task of a runner that is killed during a script", async (scene) => {
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
    // `finished` also waits for the driver, which holds the same output.
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
  });

  faultTest("sweep waits for AbandonedAfter when a runner dies between two stages", async (scene) => {
    // Must be shorter than this machine's uptime, which also limits it.
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

  faultTest("sweep counts AbandonedAfter from the end of a run that is killed", async (scene) => {
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
  });

  faultTest("sweep counts AbandonedAfter from the end of a stage that fails", async (scene) => {
    await prepared(scene);
    const run = scene.begin("run", { script: "echo running; sleep 600" });
    await run.shows("running");
    const then = Date.now() / 1000 - 1_800;
    fs.utimesSync(scene.record, then, then); // when the previous stage ended
    run.process.kill("SIGTERM");
    ended(await run.finished, 2);
    expect(await sweeping(scene, "--json")).toMatchObject(untouched);
    idle(scene, 901);
    const finished = await sweeping(scene);
    expect(scene.world.aws.running()).toEqual([]);
    return { stage: "sweep", finished: report(finished), says: /its job is abandoned/ };
  });

  faultTest("sweep leaves a running job that can make no lock on a full disk", async (scene) => {
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
  });

  faultTest("sweep leaves a job whose lock is touched by a clock an hour behind", async (scene) => {
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

  faultTest("sweep stops a task at once after a reboot in the middle of its job", async (scene) => {
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

  faultTest("sweep lets the lock of a replaced manager's container expire", async (scene) => {
    await prepared(scene);
    const run = runElsewhere(scene, "echo running; sleep 600");
    await run.shows("running");
    // sweep cannot see the process from here, but the process touches its lock.
    idle(scene, 1_800);
    expect(await sweeping(scene, "--json")).toMatchObject(untouched);
    run.process.kill("SIGKILL");
    await run.finished;
    idle(scene, 901);
    const finished = await sweeping(scene);
    expect(scene.world.aws.running()).toEqual([]);
    return { stage: "sweep", finished: report(finished), says: /its job is abandoned/ };
  });

  faultTest("sweep leaves a job whose script prints nothing for half an hour", async (scene) => {
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

  faultTest("sweep leaves a job whose process is stopped beyond AbandonedAfter", async (scene) => {
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
  });

  faultTest("sweep leaves a job between two stages when the clock jumps an hour ahead", async (scene) => {
    await prepared(scene);
    idle(scene, 3_600);
    scene.configure({ top: { LogLevel: "debug" } });
    const begun = scene.begin("sweep");
    await begun.shows("judging again");
    ended(await scene.run("true"), 0);
    const finished = await begun.finished;
    ended(finished, 0);
    expect(scene.world.aws.running()).toHaveLength(1);
    scene.configure();
    return { stage: "sweep", finished: report(finished) };
  });

  faultTest("sweep removes old records without a task and files of killed writers", async (scene) => {
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

  faultTest("sweep leaves an old record whose task runs", async (scene) => {
    await prepared(scene);
    ageRecord(scene.record, 7_200);
    age(scene, 7_200);
    const finished = await sweeping(scene);
    expect(fs.existsSync(scene.record)).toBe(true);
    expect(scene.world.aws.running()).toHaveLength(1);
    return { stage: "sweep", finished: { ...finished, stderr: finished.stdout.toString() } };
  });

  faultTest(
    "sweep stops a task past its deadline in the cluster that its record names",
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
    "sweep reads every page of ListTasks",
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

  faultTest("sweep fails when StopTask is not permitted", async (scene) => {
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
    expect(finished.stderr).toContain(`${arn} may still be running`);
    denied.remove();
    expect((await sweeping(scene)).code).toBe(0);
    expect(aws.running()).toEqual([]);
    return { stage: "sweep", finished };
  });

  faultTest("sweep fails when ListTasks is not permitted", async (scene) => {
    scene.world.aws.permissions = new Set(["ecs:RunTask"]);
    const finished = await sweeping(scene);
    expect(finished).toMatchObject({ code: 2, stdout: Buffer.from("") });
    expect(finished.stderr).toContain("what to do: allow ecs:ListTasks");
    return { stage: "sweep", finished };
  });

  faultTest(
    "the worker image ends its container at the deadline when nobody cleans up",
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

describe.concurrent("RunTask refusals", () => {
  const capacity = "Capacity is unavailable at this time. Please try again later or in a different availability zone";
  /** AWS's answer, and the advice in the log. */
  const refusals: [what: string, fault: FaultAction, advice: RegExp][] = [
    [
      "IAM refuses ecs:RunTask",
      {
        error: "AccessDeniedException",
        message:
          "User: arn:aws:sts::123456789012:assumed-role/x/i-0 is not authorized to perform: ecs:RunTask on resource: y " +
          "because no identity-based policy allows the ecs:RunTask action",
      },
      /allow ecs:RunTask in the IAM policy of the runner's host/,
    ],
    [
      "IAM refuses iam:PassRole",
      {
        error: "AccessDeniedException",
        message: "User: x is not authorized to perform: iam:PassRole on resource: arn:aws:iam::123456789012:role/r",
      },
      /allow iam:PassRole in the IAM policy/,
    ],
    ["the cluster is not found", { error: "ClusterNotFoundException", message: "Cluster not found." }, /check Cluster/],
    [
      "the cluster has no default strategy",
      { error: "InvalidParameterException", message: "No Container Instances were found in your cluster." },
      /LaunchType = "FARGATE"/,
    ],
    [
      "the file's task definition is not found",
      { error: "ClientException", message: "TaskDefinition not found." },
      /name a task definition that is active/,
    ],
    [
      "the file's task definition is inactive",
      { error: "InvalidParameterException", message: "TaskDefinition is inactive" },
      /name a task definition that is active/,
    ],
    [
      "the cluster has no provider for Spot",
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
      "ECS Exec has no task role",
      {
        error: "InvalidParameterException",
        message:
          "The execute command failed because a valid task role is not being used. Specify a valid task role in your " +
          "task definition and try again.",
      },
      /give the task definition a taskRoleArn, or set EnableExecuteCommand = false/,
    ],
    [
      "a platform version is set for EC2",
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
    faultTest(`prepare fails at once when ${what}`, async (scene) => {
      scene.world.aws.inject({ operation: "RunTask", times: Number.POSITIVE_INFINITY, do: fault });
      const finished = await scene.stage("prepare");
      ended(finished, 2);
      expect(finished.stderr).toMatch(advice);
      expect(finished.stderr.trimEnd().split("\n").at(-1)).toMatch(adviceLine);
      expect(finished.stderr).not.toMatch(/\n\s+at |Error: /); // no stack
      // No second attempt: none of these problems is transient.
      expect(scene.world.aws.callsTo("RunTask")).toHaveLength(1);
      return { stage: "prepare", finished };
    });

  const passing: [what: string, fault: FaultAction, advice: RegExp][] = [
    ["a lack of capacity", { failures: [{ arn: "x", reason: capacity }] }, /Subnets in several zones/],
    [
      "an exception for a lack of capacity",
      { error: "ClientException", message: capacity },
      /FallbackCapacityProviderStrategy/,
    ],
    [
      "hitting the vCPU limit",
      { failures: [{ reason: "You’ve reached the limit on the number of vCPUs you can run concurrently" }] },
      /higher Fargate quota/,
    ],
    ["a lack of network interfaces", { failures: [{ reason: "RESOURCE:ENI" }] }, /more free addresses/],
    [
      "instances without room or in another zone",
      { failures: [{ reason: "LOCATION" }, { reason: "RESOURCE:CPU" }] },
      /add instances to the cluster/,
    ],
    [
      "hitting the provisioning limit",
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
    faultTest(`prepare tries again after ${what}`, async (scene) => {
      const { aws } = scene.world;
      aws.inject({ operation: "RunTask", times: 2, do: fault });
      const finished = await scene.stage("prepare");
      ended(finished, 0);
      expect(aws.tasks()).toHaveLength(1);
      // Each call was answered, so each has a new token. The record has all of them.
      const tokens = aws.callsTo("RunTask").map(({ input }) => input.clientToken);
      expect(new Set(tokens).size).toBe(3);
      expect(readRecord(scene.record)?.ClientTokens).toEqual(tokens);
      return { stage: "prepare", finished, says: /trying again in/ };
    });
    faultTest(
      `prepare fails at StartTimeout after ${what}`,
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
    "prepare tries the next subnet first when one has no capacity",
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
    "prepare uses the fallback strategy when no subnet has capacity for Spot",
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

  faultTest("prepare fails the build when the job's platform version does not exist", async (scene) => {
    scene.world.aws.inject({
      operation: "RunTask",
      do: { error: "PlatformUnknownException", message: "The specified platform does not exist." },
    });
    const env = { CUSTOM_ENV_FARGATE_PLATFORM_VERSION: "9.9.9", BUILD_FAILURE_EXIT_CODE: "11" };
    const finished = await scene.stage("prepare", { env });
    ended(finished, 11);
    return { stage: "prepare (a build failure)", finished };
  });
  faultTest("prepare fails when the runner's host has no credentials", async (scene) => {
    const env = { AWS_ACCESS_KEY_ID: undefined, AWS_SECRET_ACCESS_KEY: undefined };
    const finished = await scene.stage("prepare", { env });
    ended(finished, 2);
    expect(scene.world.aws.calls).toEqual([]);
    expect(finished.stderr).toContain("what to do: give the runner's host a role");
    return { stage: "prepare", finished };
  });

  for (const [what, changes, says, advice] of [
    [
      "only a profile with a region",
      { AWS_CONFIG_FILE: "config", AWS_EC2_METADATA_DISABLED: "true" },
      "Could not load credentials from any providers",
      "what to do: give the runner's host a role (in a container on EC2, with hop limit 2)",
    ],
    [
      "no answer from IMDS (hop limit 1)",
      { AWS_EC2_METADATA_SERVICE_ENDPOINT: "silent" },
      "Could not load credentials from any providers",
      "what to do: give the runner's host a role (in a container on EC2, with hop limit 2)",
    ],
    [
      "no file for its web identity token",
      { AWS_WEB_IDENTITY_TOKEN_FILE: "token", AWS_ROLE_ARN: "arn:aws:iam::123456789012:role/r" },
      "ENOENT",
      "",
    ],
  ] as const)
    faultTest(`prepare fails when the runner's host has ${what}`, async (scene) => {
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
    faultTest(`prepare fails when AWS_PROFILE names ${what}`, async (scene) => {
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

  faultTest("prepare blames IAM when a refused task definition is named like an error", async (scene) => {
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

  // Also if the job chose the task definition.
  faultTest("prepare blames the operator when no instance is in the zones of Subnets", async (scene) => {
    const { aws } = scene.world;
    aws.inject({ operation: "RunTask", times: Infinity, do: { failures: [{ reason: "LOCATION" }] } });
    const env = { CUSTOM_ENV_FARGATE_TASK_DEFINITION: "test-task", BUILD_FAILURE_EXIT_CODE: "11" };
    const finished = await scene.stage("prepare", { env });
    ended(finished, 2); // a system failure: the operator must act
    expect(finished.stderr).toContain("what to do: add instances in the zones of Subnets");
    expect(aws.callsTo("RunTask")).toHaveLength(1);
    return { stage: "prepare", finished };
  });

  const notFound: FaultAction = { error: "ClientException", message: "TaskDefinition not found." };
  faultTest("prepare fails the build when the job's task definition does not exist", async (scene) => {
    scene.world.aws.inject({ operation: "RunTask", do: notFound });
    const env = { CUSTOM_ENV_FARGATE_TASK_DEFINITION: "no-such:3", BUILD_FAILURE_EXIT_CODE: "11" };
    const finished = await scene.stage("prepare", { env });
    ended(finished, 11); // a build failure: the runner does not try again
    expect(scene.world.aws.callsTo("RunTask")).toHaveLength(1);
    return { stage: "prepare (a build failure)", finished };
  });
  // The option overrides the job's variable.
  faultTest("prepare blames the operator when the option's task definition does not exist", async (scene) => {
    scene.world.aws.inject({ operation: "RunTask", do: notFound });
    const finished = await scene.begin("prepare", {
      env: { CUSTOM_ENV_FARGATE_TASK_DEFINITION: "no-such:3", BUILD_FAILURE_EXIT_CODE: "11" },
      operands: ["--task-def", "no-such:4"],
    }).finished;
    ended(finished, 2);
    return { stage: "prepare", finished };
  });
});

describe.concurrent("stopped tasks", () => {
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
        [
          "cannot be resolved",
          'stderr: Failed to resolve "fs-1.efs.us-east-2.amazonaws.com"',
          /a mount target in each zone/,
        ],
        ["times out", "stderr: b'mount.nfs4: Connection timed out'", /allow port 2049/],
        [
          "denies access",
          "stderr: b'mount.nfs4: access denied by server while mounting fs-1'",
          /elasticfilesystem:ClientMount/,
        ],
      ] as const
    ).map(([what, cause, advice]): [string, StopCause, RegExp] => [
      `EFS ${what}`,
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
    faultTest(`prepare fails when the task stops because ${what}`, async (scene) => {
      scene.world.aws.inject({ operation: "RunTask", do: { ends: cause } });
      const finished = await scene.stage("prepare");
      ended(finished, 2);
      expect(finished.stderr).toContain(`${cause.stopCode}: ${cause.stoppedReason}`);
      expect(finished.stderr.trimEnd().split("\n").at(-1)).toMatch(advice);
      return { stage: "prepare", finished };
    });

  for (const [what, cause] of [
    ["a lack of capacity", { stopCode: "TaskFailedToStart", stoppedReason: "Capacity is unavailable at this time." }],
    [
      "a lack of free addresses",
      {
        stopCode: "TaskFailedToStart",
        stoppedReason:
          "Unexpected EC2 error while attempting to Create Network Interface with public IP assignment enabled in subnet " +
          "'subnet-1': InsufficientFreeAddressesInSubnet",
      },
    ],
    [
      "a late network interface",
      {
        stopCode: "TaskFailedToStart",
        stoppedReason: "Timeout waiting for network interface provisioning to complete.",
      },
    ],
    [
      "a broken network interface",
      {
        stopCode: "TaskFailedToStart",
        stoppedReason:
          "ResourceInitializationError: failed to configure ENI: failed to setup regular eni: netplugin failed with no " +
          "error message",
      },
    ],
    ["a Spot interruption", { stopCode: "SpotInterruption", stoppedReason: "Your Spot Task was interrupted." }],
  ] as const)
    faultTest(`prepare starts another task after one stops for ${what}`, async (scene) => {
      scene.world.aws.inject({ operation: "RunTask", do: { ends: cause } });
      const finished = await scene.stage("prepare");
      ended(finished, 0);
      expect(scene.world.aws.tasks()).toHaveLength(2);
      expect(scene.world.aws.running()).toHaveLength(1);
      expect(await scene.run("echo ready")).toMatchObject({ code: 0, stdout: Buffer.from("ready\n") });
      return { stage: "prepare", finished, says: /trying again in/ };
    });

  const wait = { changes: { Fargate: { WaitForHealthy: true } } };
  testProgram.concurrent("prepare logs in once the container is healthy with WaitForHealthy", async () => {
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
    "prepare fails when the container becomes unhealthy with WaitForHealthy",
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
    "prepare fails when the container has no health check with WaitForHealthy",
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
      "its container is out of memory",
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
      /run the job again; on-demand capacity/,
    ],
    [
      "somebody stops it",
      { stopCode: "UserInitiated", stoppedReason: "Task stopped by user" },
      /look in CloudTrail for who/,
    ],
  ];
  for (const [what, cause, advice] of under)
    faultTest(
      `run fails when the task stops because ${what}`,
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
      // As in AWS, some seconds pass from the end of the containers to STOPPED.
      { container: true, timing: { deprovisioning: 4_000 } },
    );

  for (const [name, times, code] of [
    ["run sends its script when ECS fails to find the task once", 1, 0],
    ["run sends no script when ECS no longer knows the task", Number.POSITIVE_INFINITY, 2],
  ] as const)
    faultTest(name, async (scene) => {
      ended(await scene.stage("prepare"), 0);
      const before = new Date(Date.now() - 20_000); // after 10 s without news of the task, the driver asks ECS
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
    // The kernel kills only the script, not the container.
    "run stores 137 when a script is killed for lack of memory",
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

  faultTest("run stores 137 when a script ends because its container ran out of memory", async (scene) => {
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

  faultTest("run stores 137 when a script exits with 137", async (scene) => {
    ended(await scene.stage("prepare"), 0);
    const finished = await scene.run("exit 137");
    expect(finished).toMatchObject({ code: 1, stderr: "" });
    return { stage: "run (a build failure, 137)", finished };
  });
});

describe.concurrent("SSH failures", () => {
  const prepareFails = async (scene: Scene, last: RegExp, advice: RegExp): Promise<FaultEffect> => {
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
      /no login succeeded within ConnectTimeout \(5 s\); .*nothing answered for \d+ s/,
      /let the task's security group accept Port/,
    ],
    [
      "refusing",
      /no login succeeded within ConnectTimeout \(5 s\); .*ECONNREFUSED/,
      /the image must start an SSH server/,
    ],
  ] as const)
    faultTest(
      `prepare fails at ConnectTimeout when the task's address is ${address}`,
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
    faultTest(`prepare waits for a task's address that is ${address} for ${ms / 1000} s`, async (scene) => {
      scene.world.aws.inject({ operation: "RunTask", do: { address, ms } });
      const finished = await scene.stage("prepare");
      ended(finished, 0);
      return { stage: "prepare", finished };
    });

  faultTest(
    "prepare fails when Username is not the container's",
    (scene) =>
      prepareFails(
        scene,
        /refuses the key of daemon; .*the server refused the key/,
        /the image must install SSH_PUBLIC_KEY/,
      ),
    { container: true, changes: { SSH: { Username: "daemon" } } },
  );
  faultTest(
    "prepare fails when the container refuses the key",
    (scene) =>
      prepareFails(
        scene,
        /refuses the key of root; .*the server refused the key/,
        /the image must install SSH_PUBLIC_KEY/,
      ),
    { misbehaviour: { refuseKey: Number.POSITIVE_INFINITY } },
  );
  faultTest(
    "prepare fails with KeyType = rsa when sshd accepts no RSA key",
    (scene) => prepareFails(scene, /refuses the key of root; .*the server refused the key/, /KeyType = "ed25519"/),
    { container: ONLY_ED25519, changes: { SSH: { KeyType: "rsa" } } },
  );
  taskTest(
    "connect logs in with an Ed25519 key when sshd accepts no RSA key",
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
    "prepare succeeds when the container refuses the key at first",
    async (scene) => {
      const finished = await scene.stage("prepare");
      ended(finished, 0);
      return { stage: "prepare", finished };
    },
    { misbehaviour: { refuseKey: 2 } },
  );
  faultTest(
    "prepare succeeds when logins take 6 s",
    async (scene) => {
      const finished = await scene.stage("prepare");
      ended(finished, 0);
      return { stage: "prepare", finished };
    },
    { misbehaviour: { loginDelay: 6_000 } },
  );

  faultTest(
    "prepare succeeds when the server needs 3.5 s for its first bytes",
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
      /make the start-up files of Username, such as ~\/.bashrc, return instead of exit/,
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
      `prepare fails when the login shell is ${fault}`,
      async (scene) => {
        const finished = await scene.stage("prepare");
        ended(finished, 2);
        const exit = typeof code === "number" ? `exit code ${code}` : code;
        const output = said.length > 0 ? "this output:" : "no output";
        const text = `error: the container's login shell runs no commands: ${exit} and ${output}`;
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
  for (const [name, image, Username, says, seen, patterns] of [
    [
      "prepare warns of a lost environment when sshd is process 1",
      { lines: plainSshd() },
      "root",
      /PassEnvironment.*overwritten/,
      "",
    ],
    [
      "prepare warns of a lost environment when another user owns it",
      { lines: plainSshd(TINI) },
      "worker",
      /PassEnvironment.*may not read/,
      "",
    ],
    [
      "prepare warns of a lost environment when the image lacks tr",
      { lines: [...plainSshd(TINI), "RUN rm /usr/bin/tr"] },
      "root",
      /PassEnvironment.*no tr/,
      "",
    ],
    [
      "run passes the environment when initProcessEnabled adds process 1",
      { lines: plainSshd(), init: true },
      "root",
      undefined,
      "eu-west-1",
    ],
    ["run passes the environment when tini is process 1", { lines: plainSshd(TINI) }, "root", undefined, "eu-west-1"],
    [
      "run passes the environment when dumb-init is process 1",
      { packages: [...PACKAGES, "dumb-init"], lines: plainSshd(DUMB_INIT) },
      "root",
      undefined,
      "eu-west-1",
    ],
    [
      "run passes what a quoted SetEnv gives under tini on a base like Alpine",
      { ...LIKE_ALPINE, lines: plainSshd(TINI, '-o "SetEnv=AWS_REGION=\\"near $AWS_REGION\\""') },
      "root",
      undefined,
      "near eu-west-1",
    ],
    [
      "run passes what SetEnv gives when sshd is process 1",
      { lines: plainSshd([], "-o SetEnv=AWS_REGION=us") },
      "root",
      undefined,
      "us",
    ],
    [
      "prepare accepts a lost environment when PassEnvironment is []",
      { lines: plainSshd() },
      "root",
      undefined,
      "",
      [],
    ],
    ["run passes the environment of the worker image", {}, "root", undefined, "eu-west-1", ["OTHER"]],
    ["run passes the environment of the worker image under tini", { init: true }, "root", undefined, "eu-west-1"],
  ] as const)
    faultTest(
      name,
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
    "prepare fails when the login shell does not exist",
    (scene) =>
      prepareFails(
        scene,
        /refuses the key of root; .*the server refused the key/,
        /the image must install SSH_PUBLIC_KEY/,
      ),
    { container: { lines: ["RUN usermod --shell /bin/missing root"] } },
  );

  faultTest(
    "run works when a start-up file sets -a and replaces cat",
    async (scene) => {
      ended(await scene.stage("prepare"), 0);
      // With set -a, the script could be exported, and no program could start: "Argument list too long".
      const finished = await scene.run(`: '${"x".repeat(200_000)}'\n/bin/echo runs\ncat`);
      ended(finished, 0);
      expect(finished.stdout.toString()).toBe("runs\nfunction\n");
      return { stage: "run", finished };
    },
    { container: { lines: ["RUN echo 'set -a; cat() { echo function; }' >/root/.bashrc"] } },
  );

  faultTest(
    "prepare works when a start-up file breaks PATH and replaces exec",
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
    // KeepAliveInterval is 15, the default.
    "run fails when the network falls silent under a script",
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
    "run fails when the server closes the channel without an exit status",
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
    "run fails when the server's process for the connection is killed",
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
    "run tries again while sshd has as many logins as MaxStartups",
    async (scene) => {
      const { ContainerIP: host } = await ready(scene);
      // From 10 connections without a login, sshd refuses a growing share of new ones; from 100, all.
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
    "prepare succeeds when sshd penalizes refused logins (OpenSSH 9.8)",
    async (scene) => {
      const finished = await scene.stage("prepare");
      ended(finished, 0);
      ended(await scene.run("true"), 0);
      return { stage: "prepare", finished };
    },
    { misbehaviour: { penalties: true, refuseKey: 3 } },
  );
});

describe.concurrent("troubles of the official driver", () => {
  faultTest(
    "prepare fails when ECS cannot be reached",
    async (scene) => {
      const closed = await startProxy({ host: "127.0.0.1", port: 1 });
      await closed.close();
      const finished = await scene.stage("prepare", { env: { AWS_ENDPOINT_URL: `http://127.0.0.1:${closed.port}` } });
      ended(finished, 2);
      expect(finished.stderr).toContain("what to do: the runner's host must reach AWS");
      return { stage: "prepare", finished };
    },
    { changes: { Fargate: { StartTimeout: 2 } } },
  );
  const authority = makeAuthority();
  for (const [what, trusted, certificate] of [
    ["is not trusted", false, {}],
    ["has expired", true, { notAfter: new Date(Date.now() - 1_000) }],
    ["names another host", true, { host: "other.example" }],
  ] as const)
    faultTest(
      `prepare fails when the AWS endpoint's certificate ${what}`,
      async (scene) => {
        const ca = join(directory(), "ca.pem");
        fs.writeFileSync(ca, authority.pem);
        const finished = await scene.stage("prepare", { env: trusted ? { AWS_CA_BUNDLE: ca } : {} });
        ended(finished, 2);
        // Nothing was sent, and another attempt cannot help: no retry, no search for a task, no record.
        expect(finished.stderr.match(/was not sent|got no answer|tried again/g)).toEqual(["was not sent"]);
        expect(finished.stderr).toContain("what to do: set AWS_CA_BUNDLE");
        expect(filesLeft(scene.world)).toEqual([]);
        expect(scene.world.aws.calls).toEqual([]);
        return { stage: "prepare", finished, keepsRecord: true }; // there is no record, but cleanup fails as well: it cannot call AWS
      },
      { tls: authority.issue(certificate) },
    );
  for (const status of [403, 407])
    faultTest(`prepare fails when the proxy refuses a tunnel with ${status}`, async (scene) => {
      const proxy = await startConnectProxy(Array(100).fill(status));
      try {
        const env = { HTTPS_PROXY: proxy.url, AWS_ENDPOINT_URL: undefined };
        const finished = await scene.stage("prepare", { env });
        ended(finished, 2);
        expect(proxy.targets).toEqual(["ecs.us-east-2.amazonaws.com:443"]);
        expect(finished.stderr).toContain("what to do: check HTTPS_PROXY");
        expect(filesLeft(scene.world)).toEqual([]);
        return { stage: "prepare", finished };
      } finally {
        await proxy.close();
      }
    });
  faultTest(
    "prepare succeeds when the proxy refuses a tunnel with 502 for a moment",
    async (scene) => {
      const proxy = await startConnectProxy([502, 502]);
      try {
        const ca = join(directory(), "ca.pem");
        fs.writeFileSync(ca, authority.pem);
        scene.env.AWS_CA_BUNDLE = ca;
        const finished = await scene.stage("prepare", { env: { HTTPS_PROXY: proxy.url } });
        ended(finished, 0);
        expect(proxy.targets.length).toBeGreaterThan(2);
        expect(scene.world.aws.callsTo("RunTask")).toHaveLength(1);
        return { stage: "prepare", finished };
      } finally {
        await proxy.close();
      }
    },
    { tls: authority.issue() },
  );
  faultTest(
    "prepare fails when the proxy refuses a tunnel with 502 until StartTimeout",
    async (scene) => {
      const proxy = await startConnectProxy(Array(1_000).fill(502));
      try {
        const env = { HTTPS_PROXY: proxy.url, AWS_ENDPOINT_URL: undefined };
        const finished = await scene.stage("prepare", { env });
        ended(finished, 2);
        expect(proxy.targets.length).toBeGreaterThan(2);
        expect(filesLeft(scene.world)).toEqual([]); // never sent, so there is no task to look for
        return { stage: "prepare", finished };
      } finally {
        await proxy.close();
      }
    },
    { changes: { Fargate: { StartTimeout: 2 } } },
  );
  faultTest(
    "prepare fails the build when the job's task definition is not allowed",
    async (scene) => {
      const finished = await scene.stage("prepare", { env: { CUSTOM_ENV_FARGATE_TASK_DEFINITION: "secret-task:1" } });
      ended(finished, 1);
      expect(scene.world.aws.calls).toEqual([]);
      return { stage: "prepare", finished };
    },
    { changes: { Fargate: { AllowedTaskDefinitions: ["test-*"] } } },
  );
  faultTest(
    "prepare fails the build when the job's platform version is not allowed",
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
  faultTest("run fails when there is no record", async (scene) => {
    const finished = await scene.run("echo never");
    ended(finished, 2);
    return { stage: "run", finished };
  });
  for (const [what, port] of [
    ["is refused", "closed"],
    ["times out", "stalled"],
  ] as const)
    faultTest(`run fails when its connection ${what}`, async (scene) => {
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
    "prepare logs in with an RSA key when sshd refuses SHA-1 signatures",
    async (scene) => {
      const finished = await scene.stage("prepare");
      ended(finished, 0);
      ended(await scene.run("true"), 0);
      return { stage: "prepare", finished };
    },
    { container: true, changes: { SSH: { KeyType: "rsa" } } },
  );
  faultTest(
    "run gives a script the task role's credentials",
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

describe.concurrent("unwritable records", () => {
  /** Directories that nobody can write to, not even root. */
  const places: [what: string, path: string][] = [
    ["cannot be created", "/proc/fargate"],
    ["is a file", "/dev/null"],
    ["is read-only", "/proc/self"],
  ];
  for (const [what, path] of places)
    faultTest(
      `prepare fails when the directory for records ${what}`,
      async (scene) => {
        const finished = await scene.stage("prepare");
        ended(finished, 2);
        expect(scene.world.aws.calls).toEqual([]);
        scene.configure();
        return { stage: "prepare", finished };
      },
      { changes: { TaskMetadata: { Directory: path } } },
    );

  // Mounting a file system needs root.
  const mount = (options: string, path: string) =>
    spawnSync("mount", ["-t", "tmpfs", "-o", options, "tmpfs", path], { stdio: "ignore" }).status === 0;
  for (const [what, options, fill] of [
    ["is full", "size=64k", true],
    ["is read-only", "ro", false],
  ] as const)
    faultTest(`prepare fails when the disk of the directory for records ${what}`, async (scene) => {
      const path = directory();
      if (!mount(options, path)) throw new SkipFault("mount(8) is not permitted");
      try {
        if (fill) managerId(path, {});
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

  // As on a network file system that maps all users to one.
  faultTest("prepare fails when all files in the directory for records get another owner", async (scene) => {
    // strace simulates it: the driver gets another user's id, so its new files seem to belong to somebody else.
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
    expect(finished.stderr).toContain("run GitLab Runner as that user");
    // Even a valid record is refused there: anybody who can reach the directory writes as that user.
    ended(await scene.stage("prepare"), 0);
    const script = join(directory(), "script");
    fs.writeFileSync(script, "echo never");
    const run = await start([...command, "run", script, "build_script"], { env: scene.env }).finished;
    ended(run, 2);
    expect(run.stdout.toString()).toBe("");
    return { stage: "prepare", finished };
  });

  /** A script fails and its exit code cannot be stored. It is still a build failure, and no file is left. */
  const failsWithoutExitCode = async (scene: Scene, file: string) => {
    ended(await scene.stage("prepare"), 0);
    const env = { BUILD_EXIT_CODE_FILE: file, BUILD_FAILURE_EXIT_CODE: "11" };
    const finished = await scene.begin("run", { script: "exit 42", env }).finished;
    ended(finished, 11);
    expect(fs.existsSync(file)).toBe(false);
    return { stage: "run (a build failure)", finished, says: /warning: BUILD_EXIT_CODE_FILE / };
  };
  faultTest("run fails the build when the disk of BUILD_EXIT_CODE_FILE is full", async (scene) => {
    const path = directory();
    if (!mount("size=64k", path)) throw new SkipFault("mount(8) is not permitted");
    try {
      spawnSync("dd", ["if=/dev/zero", `of=${join(path, "fill")}`], { stdio: "ignore" });
      return await failsWithoutExitCode(scene, join(path, "exit-code"));
    } finally {
      spawnSync("umount", [path]);
    }
  });
  faultTest("run fails the build when the directory of BUILD_EXIT_CODE_FILE is gone", (scene) =>
    failsWithoutExitCode(scene, join(directory(), "gone", "exit-code")),
  );
  faultTest("run fails when an earlier stage's BUILD_EXIT_CODE_FILE cannot be removed", async (scene) => {
    ended(await scene.stage("prepare"), 0);
    const env = { BUILD_EXIT_CODE_FILE: join(directory(), "exit-code") };
    fs.mkdirSync(env.BUILD_EXIT_CODE_FILE);
    const finished = await scene.begin("run", { script: "echo never", env }).finished;
    ended(finished, 2);
    expect(finished.stdout.toString()).toBe("");
    return { stage: "run", finished };
  });

  faultTest("prepare stops its task when the disk is full once RunTask has answered", async (scene) => {
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

describe.concurrent("manager", () => {
  /** Adds a test with managers, and a row of the table of faults. */
  function managerFault(
    name: string,
    body: (fleet: ManagerWorld) => Promise<FaultEffect>,
    options: ManagerWorldOptions = {},
  ): void {
    faults.push(name);
    const run = async (fleet: ManagerWorld) => {
      const effect = await body(fleet);
      addRow(faultRow(name, effect, fleet.workers().length));
    };
    managerTest(name, run, options);
  }
  const lines = ({ stderr }: Finished) => stderr.replace(/^\d{4}-\d\d-\d\dT\S+Z /gm, "").split("\n");
  const terminated = async (started: Started, code = 0) => {
    started.process.kill("SIGTERM");
    const finished = await started.finished;
    ended(finished, code);
    return finished;
  };
  const startedAll = ({ gitlab }: ManagerWorld, runners = 1) =>
    gitlab.waitFor(() => {
      const tokens = new Set(gitlab.requestsTo("requestJob").map(({ parameters }) => parameters.token));
      return gitlab.runners.length === runners && gitlab.runners.every(({ token }) => tokens.has(token));
    }, 60_000);
  /** How often one manager has asked for another one's own task. */
  const asked = ({ world }: ManagerWorld, { task }: Container) =>
    world.aws.callsTo("DescribeTasks").filter(({ input }) => input.tasks?.includes(task?.taskArn.slice(-32) ?? "none"))
      .length;
  const sweptBy = ({ world }: ManagerWorld) =>
    world.aws.callsTo("StopTask").filter(({ input }) => input.reason?.startsWith("fargate sweep"));
  const stopWorkers = async ({ workers, world }: ManagerWorld) => {
    for (const { taskArn } of workers())
      await world.aws.stopTask(taskArn, { stopCode: "UserInitiated", stoppedReason: "over", graceSeconds: 0 });
  };
  const often = { SWEEP_INTERVAL: "1" };

  managerFault("manager stops what a killed manager has left once its own task is STOPPED", async (fleet) => {
    const { aws } = fleet.world;
    const [killed, other] = [await fleet.container({ ecs: true }), await fleet.container({ ecs: true, env: often })];
    killed.start();
    await fleet.runningJob();
    await killed.kill();
    fs.rmSync(killed.directory, { recursive: true }); // with its container
    const started = other.start();
    // ECS has not noticed yet, or is stopping the task.
    for (const status of ["RUNNING", "DEACTIVATING", "STOPPING", "DEPROVISIONING"]) {
      (killed.task as { lastStatus: string }).lastStatus = status;
      const before = asked(fleet, killed);
      await aws.waitFor(() => asked(fleet, killed) > before + 1, 60_000);
      expect(fleet.workers()).toHaveLength(1);
    }
    await killed.stopTask();
    await aws.waitFor(() => fleet.workers().length === 0, 60_000);
    await started.shows("sweep stopped");
    const finished = await terminated(started);
    // A killed manager cannot unregister its runner.
    expect(fleet.gitlab.runners).toHaveLength(1);
    return { stage: "manager", finished, says: /sweep stopped/ };
  });

  managerFault("manager leaves a killed manager's tasks if it may not describe its cluster", async (fleet) => {
    const { aws } = fleet.world;
    const [killed, other] = [await fleet.container({ ecs: true }), await fleet.container({ ecs: true, env: often })];
    killed.start();
    await fleet.runningJob();
    await killed.kill();
    fs.rmSync(killed.directory, { recursive: true });
    await killed.stopTask();
    const refused = aws.inject({
      operation: "DescribeTasks",
      when: ({ cluster }) => cluster?.endsWith(MANAGER_CLUSTER) ?? false,
      times: Number.POSITIVE_INFINITY,
      do: { error: "AccessDeniedException", message: "User: x is not authorized to perform: ecs:DescribeTasks" },
    });
    const started = other.start();
    await startedAll(fleet, 2);
    const { job, release } = await fleet.runningJob({ token: fleet.gitlab.runners[1]?.token });
    await aws.waitFor(() => refused.used >= 3, 60_000);
    const swept = await other.sweep().finished;
    const problem = expect.stringMatching(
      /^ecs:DescribeTasks was refused: .*; what to do: allow ecs:DescribeTasks in /,
    );
    expect(JSON.parse(`${swept.stdout}`)).toMatchObject({ stopped: [], removedRecords: [], problems: [problem] });
    release();
    await fleet.gitlab.waitFor(() => job.state === "success", 60_000);
    const finished = await terminated(started);
    expect(fleet.workers()).toHaveLength(1);
    await stopWorkers(fleet);
    expect(lines(finished).filter((line) => line.includes("DescribeTasks"))).toHaveLength(1);
    return { stage: "manager", finished, says: /DescribeTasks/ };
  });

  for (const [where, isShared] of [
    ["their own directories", false],
    ["one directory of records", true],
  ] as const)
    managerFault(`manager leaves the jobs of another live manager with ${where}`, async (fleet) => {
      const { aws } = fleet.world;
      const records = isShared ? { records: join(directory(), "records") } : {};
      const env = { ...often, STOP_TIMEOUT: "600", RUNNER_CONCURRENCY: "2" };
      const [old, young] = [
        await fleet.container({ ecs: true, env, ...records }),
        await fleet.container({ ecs: true, env, ...records }),
      ];
      const all = [old.start()];
      await startedAll(fleet, 1);
      all.push(young.start());
      await startedAll(fleet, 2);
      const tokens = fleet.gitlab.runners.map(({ token }) => token);
      const jobs = [await fleet.runningJob({ token: tokens[0] }), await fleet.runningJob({ token: tokens[1] })];
      for (const task of fleet.workers()) (task as { createdAt: number }).createdAt -= 80_000_000; // 22 hours
      const seen = () => Math.min(asked(fleet, old), asked(fleet, young));
      const sweeps = async () => {
        const before = seen();
        await aws.waitFor(() => seen() > before + 1, 60_000);
      };
      if (!isShared) await sweeps();
      // Short jobs start and end between the sweeps.
      const short = tokens.flatMap((token) => [1, 2, 3].map(() => fleet.queueJob(["true"], token)));
      await fleet.gitlab.waitFor(() => short.every(({ state }) => state === "success"), 60_000);
      // The deployment stops the old one, which lets its job finish.
      (old.task as { lastStatus: string; desiredStatus: string }).desiredStatus = "STOPPED";
      (old.task as { lastStatus: string }).lastStatus = "DEACTIVATING";
      all[0]?.process.kill("SIGTERM");
      await all[0]?.shows("graceful shutdown");
      const before = aws.callsTo("ListTasks").length;
      await aws.waitFor(() => aws.callsTo("ListTasks").length > before + 2, 60_000);
      expect(fleet.workers()).toHaveLength(2);
      for (const { release } of jobs) release();
      await fleet.gitlab.waitFor(() => jobs.every(({ job }) => job.state === "success"), 60_000);
      const finished = (await all[0]?.finished) as Finished;
      ended(finished, 0);
      await terminated(all[1] as Started);
      expect(sweptBy(fleet)).toEqual([]);
      expect(aws.callsTo("RunTask")).toHaveLength(jobs.length + short.length);
      expect(fleet.gitlab.runners).toEqual([]);
      return { stage: "manager", finished, says: /unregistered/ };
    });

  managerFault("manager leaves the jobs of a manager with the same id when it ends", async (fleet) => {
    // Two containers on one host, with its name and one directory of records, outside ECS.
    const records = join(directory(), "records");
    const [first, second] = [await fleet.container({ records }), await fleet.container({ records })];
    const ending = first.start();
    await startedAll(fleet, 1);
    const going = second.start();
    await startedAll(fleet, 2);
    const [one, two] = fleet.gitlab.runners.map(({ token }) => token);
    await fleet.runningJob({ token: one });
    const { job, release } = await fleet.runningJob({ token: two });
    const finished = await terminated(ending);
    expect(fleet.workers()).toHaveLength(1);
    release();
    await fleet.gitlab.waitFor(() => job.state !== "running", 60_000);
    expect(job.state).toBe("success");
    await terminated(going);
    return { stage: "manager", finished, says: /unregistered/ };
  });

  managerFault("manager ends when gitlab-runner is killed during a job", async (fleet) => {
    const container = await fleet.container({ ecs: true });
    const started = container.start();
    await fleet.runningJob();
    process.kill(container.gitlabRunner(), "SIGKILL");
    const finished = await started.finished;
    await container.kill(); // as all processes of a container end with the first one
    ended(finished, 1);
    expect(fleet.gitlab.runners).toEqual([]);
    expect(fleet.world.aws.callsTo("StopTask")).toMatchObject([{ input: { reason: "its manager was stopped" } }]);
    return { stage: "manager", finished, says: /by itself/ };
  });

  managerFault("manager stops the task of an unanswered RunTask when gitlab-runner is killed", async (fleet) => {
    const { aws } = fleet.world;
    aws.inject({ operation: "RunTask", do: { holdUntil: forever, after: true } });
    const container = await fleet.container({ ecs: true });
    const started = container.start();
    await startedAll(fleet);
    fleet.queueJob(["true"]);
    await aws.waitFor(() => fleet.workers().length === 1, 60_000);
    process.kill(container.gitlabRunner(), "SIGKILL");
    const finished = await started.finished;
    await container.kill();
    ended(finished, 1);
    return { stage: "manager", finished, says: /by itself/ };
  });

  managerFault("manager names the task that AWS does not stop before it ends", async (fleet) => {
    const { aws } = fleet.world;
    const container = await fleet.container();
    const started = container.start();
    await fleet.runningJob();
    const [task] = fleet.workers();
    aws.inject({ operation: "StopTask", times: Number.POSITIVE_INFINITY, do: { holdUntil: forever } });
    process.kill(container.gitlabRunner(), "SIGKILL");
    const finished = await started.finished;
    await container.kill();
    ended(finished, 1);
    expect(finished.stderr).toContain(`${task?.taskArn}: AWS has not answered within 5 s`);
    expect(fleet.gitlab.runners).toEqual([]);
    expect(fleet.workers()).toHaveLength(1);
    expect(container.recordsLeft()).toHaveLength(1);
    await stopWorkers(fleet);
    fs.rmSync(container.records, { recursive: true });
    return { stage: "manager", finished, says: /may be left running/ };
  });

  for (const code of [0, 3])
    managerFault(`manager fails when gitlab-runner exits with ${code}`, async (fleet) => {
      const container = await fleet.container();
      replaceRunner(container, `#!/bin/sh\nexit ${code}\n`);
      const finished = await container.start().finished;
      ended(finished, code || 1);
      expect(fleet.gitlab.requestsTo("register")).toHaveLength(1);
      expect(fleet.gitlab.runners).toEqual([]);
      return { stage: "manager", finished, says: /by itself/ };
    });
  const replaceRunner = (container: Container, script: string) =>
    fs.writeFileSync(join(container.directory, "bin", "gitlab-runner"), script);

  managerFault("manager fails when gitlab-runner cannot be executed", async (fleet) => {
    const container = await fleet.container();
    replaceRunner(container, "#!/no/such/interpreter\n");
    const finished = await container.start().finished;
    ended(finished, 2);
    expect(fleet.gitlab.requestsTo("register")).toHaveLength(1);
    expect(fleet.gitlab.runners).toEqual([]);
    return { stage: "manager", finished, says: /cannot be started/ };
  });

  managerFault("manager registers nothing when gitlab-runner is not in PATH", async (fleet) => {
    const container = await fleet.container({ env: { PATH: "/usr/bin:/bin" } });
    const finished = await container.start().finished;
    ended(finished, 2);
    expect(fleet.gitlab.requests).toEqual([]);
    return { stage: "manager", finished };
  });

  managerFault("manager kills gitlab-runner when it hangs beyond SHUTDOWN_TIMEOUT", async (fleet) => {
    const container = await fleet.container({ env: { SHUTDOWN_TIMEOUT: "1" } });
    const started = container.start();
    await fleet.runningJob();
    const hanging = container.gitlabRunner();
    process.kill(hanging, "SIGSTOP");
    const finished = await terminated(started);
    await expect.poll(() => container.processes()).not.toContain(hanging);
    await container.kill();
    expect(fleet.gitlab.runners).toEqual([]);
    return { stage: "manager", finished, says: /is killed/ };
  });

  managerFault("manager unregisters what it has registered at TERM between two registrations", async (fleet) => {
    const { gitlab } = fleet;
    // GitLab is overloaded: the second registration is repeated.
    const refused = { operation: "register", skip: 1, times: Number.POSITIVE_INFINITY, do: { status: 429 } } as const;
    gitlab.inject(refused);
    const container = await fleet.container({ managers: ["one", "two", "three"] });
    const started = container.start();
    await gitlab.waitFor(() => gitlab.requestsTo("register").length >= 2, 60_000);
    expect(gitlab.runners).toHaveLength(1);
    const finished = await terminated(started, 2);
    expect(gitlab.runners).toEqual([]);
    expect(container.sections()).toEqual([]);
    expect(finished.stderr).not.toContain("Runtime platform");
    return { stage: "manager", finished };
  });

  managerFault("manager names the registration that TERM has interrupted", async (fleet) => {
    const { gitlab } = fleet;
    gitlab.inject({ operation: "register", skip: 1, do: "hang-after" });
    const container = await fleet.container({ managers: ["one", "two", "three"] });
    const started = container.start();
    await gitlab.waitFor(() => gitlab.runners.length === 2, 60_000);
    const finished = await terminated(started, 2);
    const [left, ...more] = gitlab.runners;
    expect(more).toEqual([]);
    expect(left?.description).toMatch(/^fargate_two_/);
    expect(finished.stderr).toContain(`it may have registered ${left?.description}; if GitLab lists`);
    return { stage: "manager", finished, says: /may have registered/ };
  });

  managerFault("manager starts nothing at QUIT while it registers", async (fleet) => {
    const { gitlab } = fleet;
    const held = Promise.withResolvers<void>();
    gitlab.inject({ operation: "register", do: { holdUntil: held.promise } });
    const container = await fleet.container();
    replaceRunner(container, "#!/no/such/interpreter\n"); // an attempt to start it would be an error
    const started = container.start();
    await gitlab.waitFor(() => gitlab.requestsTo("register").length === 1, 60_000);
    started.process.kill("SIGQUIT");
    await signalled(started);
    held.resolve();
    const finished = await started.finished;
    ended(finished, 0);
    expect(gitlab.runners).toEqual([]);
    return { stage: "manager", finished, says: /unregistered/ };
  });
  /** Resolves when no signal is pending for a process any more. */
  const signalled = ({ process: { pid } }: Started) =>
    expect
      .poll(() => fs.readFileSync(`/proc/${pid}/status`, "latin1").match(/^(Sig|Shd)Pnd:.*/gm), { timeout: 30_000 })
      .toEqual(["SigPnd:\t0000000000000000", "ShdPnd:\t0000000000000000"]);

  for (const [how, action] of [
    ["is down", undefined],
    ["does not answer", "hang-before"],
    ["fails", { status: 500 }],
  ] as const)
    managerFault(`manager names each runner for removal if GitLab ${how} at its end`, async (fleet) => {
      const { gitlab } = fleet;
      const container = await fleet.container({ managers: ["one", "two"] });
      const started = container.start();
      await startedAll(fleet, 2);
      const times = Number.POSITIVE_INFINITY;
      if (action) gitlab.inject({ operation: "unregister", times, do: action });
      else await gitlab.close();
      const finished = await terminated(started);
      for (const { description } of gitlab.runners)
        expect(lines(finished)).toContainEqual(
          expect.stringMatching(`^error: ${description} could not be unregistered: .*; remove it in GitLab$`),
        );
      // The next start of the container uses them.
      expect(container.sections()).toHaveLength(2);
      return { stage: "manager", finished, says: /one_.* could not be unregistered/ };
    });

  managerFault("manager names no runner of a user for removal if GitLab is down at its end", async (fleet) => {
    const { gitlab } = fleet;
    const token = gitlab.createRunner({ description: "shared" });
    const env = { GITLAB_REGISTRATION_TOKEN: undefined, GITLAB_RUNNER_TOKEN: token };
    const started = (await fleet.container({ env })).start();
    await startedAll(fleet);
    await gitlab.close();
    const finished = await terminated(started);
    expect(finished.stderr).not.toContain("remove it in GitLab");
    return { stage: "manager", finished, says: /GitLab still lists/ };
  });

  managerFault("manager unregisters its runner although GitLab fails once", async (fleet) => {
    const { gitlab } = fleet;
    const started = (await fleet.container()).start();
    await startedAll(fleet);
    gitlab.inject({ operation: "unregister", do: { status: 503 } });
    const finished = await terminated(started);
    expect(gitlab.runners).toEqual([]);
    return { stage: "manager", finished, says: /trying again/ };
  });

  managerFault("manager ends well when its runner was removed in GitLab", async (fleet) => {
    const { gitlab } = fleet;
    const container = await fleet.container();
    const started = container.start();
    await startedAll(fleet);
    gitlab.runners.length = 0;
    const finished = await terminated(started);
    expect(container.sections()).toEqual([]);
    expect(finished.stderr).not.toMatch(/error: (?!Checking)/);
    return { stage: "manager", finished, says: /unregistered/ };
  });

  managerFault("manager runs with the other runners if GitLab refuses one token", async (fleet) => {
    const { gitlab } = fleet;
    const valid = gitlab.createRunner({ description: "valid" });
    const revoked = gitlab.createRunner({ description: "revoked" });
    gitlab.runners.pop();
    const env = { GITLAB_RUNNER_TOKEN_ONE: revoked, GITLAB_RUNNER_TOKEN_TWO: valid };
    const container = await fleet.container({ managers: ["one", "two"], env });
    const started = container.start();
    await startedAll(fleet);
    const job = fleet.queueJob(["true"], valid);
    await gitlab.waitFor(() => job.state === "success", 60_000);
    const finished = await terminated(started);
    expect(gitlab.requestsTo("unregisterManager")).toHaveLength(1);
    expect(gitlab.runners).toMatchObject([{ token: valid, managers: [] }]);
    return { stage: "manager", finished, says: /manager one: / };
  });

  managerFault("manager starts nothing if GitLab refuses all tokens", async (fleet) => {
    const container = await fleet.container({ env: { GITLAB_REGISTRATION_TOKEN: "GR1348941-wrong" } });
    const finished = await container.start().finished;
    ended(finished, 2);
    expect(finished.stderr).not.toContain("Runtime platform");
    return { stage: "manager", finished };
  });

  managerFault("manager ends at TERM during a sweep that AWS does not answer", async (fleet) => {
    const { aws } = fleet.world;
    aws.inject({ operation: "ListTasks", times: Number.POSITIVE_INFINITY, do: { holdUntil: forever } });
    const started = (await fleet.container()).start();
    await startedAll(fleet);
    await aws.waitFor(() => aws.callsTo("ListTasks").length > 0, 60_000);
    const finished = await terminated(started);
    expect(fleet.gitlab.runners).toEqual([]);
    return { stage: "manager", finished, says: /unregistered/ };
  });

  managerFault("manager runs jobs with a random id if the metadata endpoint is silent", async (fleet) => {
    const container = await fleet.container({ ecs: "silent", env: often });
    const started = container.start();
    const { job, release } = await fleet.runningJob();
    if (container.metadata) container.metadata.fault = undefined;
    release();
    await fleet.gitlab.waitFor(() => job.state === "success", 60_000);
    const finished = await terminated(started);
    const [run] = fleet.world.aws.callsTo("RunTask");
    expect(run?.input.startedBy).toMatch(/^fargate-[0-9a-f]{12}-[0-9a-f]{32}$/);
    expect(container.metadata?.requests).toHaveLength(3); // all before the first job
    expect(lines(finished).filter((line) => /^(warning|error): (?!Starting)/.test(line))).toEqual([
      expect.stringMatching(/^warning: the task metadata endpoint does not answer: /),
    ]);
    return { stage: "manager", finished, says: /unregistered/ };
  });
});

describe("definitions of images", () => {
  // On embedded hosts, nothing runs the service: any listener of this machine counts as its own.
  const withService: FaultOptions = {
    changes: { top: { JobImage: { AllowedServices: ["**"] } } },
    job: { services: ["redis:7"] },
  };
  const definitionFault = (name: string, body: (scene: Scene) => Promise<FaultEffect>) =>
    faultTest(name, body, withService);
  const calls = ({ world }: Scene, operation: Operation) => world.aws.callsTo(operation).length;
  const derived = ({ world }: Scene) =>
    world.aws.taskDefinitions().filter(({ family }) => family.startsWith("test-task-job-"));

  definitionFault("prepare registers a definition again that has been deregistered", async (scene) => {
    ended(await scene.stage("prepare"), 0);
    ended(await scene.stage("cleanup"), 0);
    for (const definition of derived(scene)) definition.status = "INACTIVE";
    const finished = await scene.stage("prepare");
    ended(finished, 0);
    ended(await scene.run("echo hello"), 0);
    expect(derived(scene).map(({ status, revision }) => `${status} ${revision}`)).toEqual(["INACTIVE 1", "ACTIVE 2"]);
    const runs = scene.world.aws.callsTo("RunTask").map(({ input, error }) => {
      return `${input.taskDefinition?.split(":").at(-1)} ${error ?? "ok"}`;
    });
    expect(runs).toEqual(["1 ok", "1 ClientException", "2 ok"]);
    return { stage: "prepare", finished, says: /Ready/ };
  });

  definitionFault("prepare registers a definition only once more if RunTask refuses it", async (scene) => {
    const refusal = { error: "ClientException", message: "TaskDefinition is inactive" };
    scene.world.aws.inject({ operation: "RunTask", times: Number.POSITIVE_INFINITY, do: refusal });
    const finished = await scene.stage("prepare");
    ended(finished, 2);
    expect(calls(scene, "RunTask")).toBe(2);
    // The second time, ECS still describes it as active.
    expect(calls(scene, "RegisterTaskDefinition")).toBe(1);
    return { stage: "prepare", finished };
  });

  for (const operation of ["DescribeTaskDefinition", "RegisterTaskDefinition"] as const)
    definitionFault(`prepare fails at once when IAM refuses ecs:${operation}`, async (scene) => {
      const rest = ["DescribeTaskDefinition", "RegisterTaskDefinition", "RunTask", "DescribeTasks", "StopTask"];
      const allowed = rest.filter((name) => name !== operation).map((name) => `ecs:${name}`);
      scene.world.aws.permissions = new Set(allowed);
      const finished = await scene.stage("prepare");
      ended(finished, 2);
      expect(finished.stderr).toContain(`what to do: allow ecs:${operation} in the IAM policy`);
      expect(calls(scene, operation)).toBe(1);
      expect(calls(scene, "RunTask")).toBe(0);
      scene.world.aws.permissions = new Set(rest.map((name) => `ecs:${name}`));
      ended(await scene.stage("prepare"), 0);
      return { stage: "prepare", finished };
    });

  definitionFault("prepare fails at once when the definition to add a service to is not found", async (scene) => {
    scene.configure({ ...withService.changes, Fargate: { TaskDefinition: "ci-none" } });
    const finished = await scene.stage("prepare");
    ended(finished, 2);
    expect(scene.world.aws.calls.map(({ operation }) => operation)).toEqual(["DescribeTaskDefinition"]);
    return { stage: "prepare", finished };
  });

  // Where prepare is: the call that AWS has received but not answered.
  const MOMENTS: [where: string, fault: Fault["operation"], nth: number, after: boolean][] = [
    ["asks for its base", "DescribeTaskDefinition", 1, false],
    ["looks for it", "DescribeTaskDefinition", 2, false],
    ["has sent it", "RegisterTaskDefinition", 1, false],
    ["has registered it", "RegisterTaskDefinition", 1, true],
  ];
  for (const signal of ["SIGKILL", "SIGTERM"] as const)
    for (const [where, operation, nth, after] of MOMENTS)
      definitionFault(`prepare leaves at most a definition after ${signal} when it ${where}`, async (scene) => {
        const { aws } = scene.world;
        const answer = Promise.withResolvers<void>();
        let seen = 0;
        const action = { holdUntil: answer.promise, after };
        aws.inject({ operation, when: () => ++seen === nth, do: action });
        const first = scene.begin("prepare");
        await aws.waitFor(() => calls(scene, operation) === nth && (!after || derived(scene).length === 1), 60_000);
        first.process.kill(signal);
        const finished = await first.finished;
        answer.resolve();
        expect([finished.signal, finished.code]).toEqual(signal === "SIGKILL" ? [signal, null] : [null, 2]);
        expect(aws.tasks()).toEqual([]);
        expect(filesLeft(scene.world).filter((name) => /\.tmp$/.test(name))).toEqual([]);
        ended(await scene.stage("cleanup"), 0);
        const next = await scene.stage("prepare");
        ended(next, 0);
        ended(await scene.run("echo hello"), 0);
        expect(derived(scene).length).toBeLessThanOrEqual(2);
        expect(filesLeft(scene.world)).toEqual([basename(scene.record)]);
        return { stage: "prepare", finished };
      });
});

testTable("faults");

testSecrets({ never: ["logRecords", "errors"] });
