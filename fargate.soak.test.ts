/**
 * Tests that take minutes: `npm run soak` runs them and checks their rows of `docs/faults.md`. `npm test` only checks
 * that each of them has a row, and lists them.
 */
import { connect as connectTcp } from "node:net";
import { beforeAll, expect, type TaskMeta, test } from "vitest";
import { CONTAINER, callBuild, readRecord, type TaskRecord } from "./fargate.ts";
import { addRow, type FaultRow, normalise } from "./fixtures/faults.ts";
import { makeFleet, managersNamed } from "./fixtures/fleet.ts";
import { REDIS_IMAGE } from "./fixtures/images.ts";
import { runLoad } from "./fixtures/load.ts";
import { lostOutput } from "./fixtures/lost-output.ts";
import { makeManagerWorld } from "./fixtures/manager.ts";
import { startPair } from "./fixtures/relay.ts";
import { enumerateRunnersSteps } from "./fixtures/runner-steps.ts";
import { ANY_IMAGE, ended, forever, imageHosts, makeScene, soaks, testTable } from "./fixtures/scene.ts";
import {
  enumerateSteps,
  isTimingDependent,
  type StepOptions,
  type StepResult,
  stepTable,
  stepTiming,
  straceWorks,
} from "./fixtures/steps.ts";
import { buildImages, containerHosts, NEWER_BASE_IMAGE } from "./fixtures/tasks.ts";
import { collect, hosts, log, never, plainSshd, setUp, startTask, testSecrets } from "./fixtures/test-support.ts";
import { makeWorld } from "./fixtures/world.ts";

const SOAK = process.env.SOAK === "true";

setUp({ hosts: SOAK });

/**
 * Adds a test that takes minutes. Without SOAK=true, only its name is registered.
 *
 * @param concurrent whether to run it beside its neighbours, because it mostly waits
 */
function soakTest(
  name: string,
  body: (task: TaskMeta, skip: (why: string) => never) => Promise<Omit<FaultRow, "fault">>,
  { concurrent = false } = {},
): void {
  soaks.push(name);
  if (!SOAK) return;
  test(name, { timeout: 900_000, concurrent }, async ({ task, skip }) => {
    const row = await body(task.meta, (why) => skip(why));
    addRow({ fault: name, ...row });
    expect(row.left).toBe(0);
  });
}

soakTest("a job keeps its exit code beside 199 others under AWS's request rates", async (meta) => {
  meta.hosts = hosts.kind;
  const count = 200;
  const exitCodeOf = (id: number) => (id % 3 === 0 ? 1 + (id % 200) : 0);
  const load = await runLoad({ jobs: count, exitCodeOf, hosts });
  const { jobs, calls, tasks, tasksLeft, recordsLeft, maxTasks, seconds } = load;
  console.log(`${count} jobs at once: ${JSON.stringify({ calls, tasks, maxTasks, seconds: Math.round(seconds) })}`);
  const seen = jobs.map(({ id, status, exitCode, outputIsComplete, foreignMarks, throttling, prepares }) => {
    return { id, status, exitCode, outputIsComplete, foreignMarks, throttling, prepares };
  });
  const wished = Array.from({ length: count }, (_, index) => {
    const exitCode = exitCodeOf(1001 + index);
    const status = exitCode === 0 ? "success" : "build-failure";
    return {
      id: 1001 + index,
      status,
      exitCode,
      outputIsComplete: true,
      foreignMarks: [],
      throttling: [],
      prepares: 1,
    };
  });
  expect(seen).toEqual(wished);
  // Each job had its own task, and many ran at the same time. Otherwise there was no load.
  expect(new Set(jobs.map(({ task }) => task)).size).toBe(count);
  expect(maxTasks).toBeGreaterThan(count / 2);
  expect(tasks.started).toBe(count);
  expect(recordsLeft).toEqual([]);
  // Max calls per job, including throttled ones. A job alone makes 1 RunTask, 6 or 7 DescribeTasks, 1 StopTask.
  const maxCalls: Record<string, number> = { RunTask: 4, DescribeTasks: 8, StopTask: 2 };
  expect(Object.keys(calls).toSorted()).toEqual(Object.keys(maxCalls).toSorted());
  for (const [operation, { all, throttled, failed }] of Object.entries(calls)) {
    expect(failed, operation).toBe(0);
    expect(all, operation).toBeLessThanOrEqual((maxCalls[operation] ?? 0) * count);
    if (operation !== "DescribeTasks") expect(all - throttled, operation).toBe(count);
  }
  return { ended: "each job: its own exit code", says: "", left: tasksLeft.length };
});

/** Jobs at once with services in these many images. Their tasks have an SSH server inside this process. */
const manyImages = (name: string, jobs: number, images: number, managers: number) =>
  soakTest(name, async (meta) => {
    meta.hosts = "embedded";
    const stages = ["get_sources", "build_script"];
    const serviceOf = (id: number) => `redis:${id % images}`;
    const load = await runLoad({ jobs, serviceOf, managers, hosts, stages });
    const { RegisterTaskDefinition: register, DescribeTaskDefinition: describe } = load.calls;
    console.log(`${name}: ${JSON.stringify({ calls: load.calls, seconds: Math.round(load.seconds) })}`);
    // Not the number of prepares: this machine also runs all tasks, and one may be too slow to answer.
    const failed = load.jobs.filter(({ status, outputIsComplete, throttling }) => {
      return status !== "success" || !outputIsComplete || throttling.length > 0;
    });
    expect(failed.map(({ id, log }) => `${id}: ${log}`)).toEqual([]);
    expect(load.jobs.map((job) => job.images)).toEqual(
      load.jobs.map(({ id }) => [`docker.io/library/${serviceOf(id)}`]),
    );
    expect(load.recordsLeft).toEqual([]);
    expect([register?.failed, describe?.failed]).toEqual([0, expect.any(Number)]); // the first to look finds none
    const registered = (register?.all ?? 0) - (register?.throttled ?? 0);
    expect(registered).toBeGreaterThanOrEqual(images);
    // Other hosts may register the same at the same moment, and no host registers one twice.
    expect(registered).toBeLessThanOrEqual(images * managers);
    return { ended: "each job: 0", says: "", left: load.tasksLeft.length };
  });
manyImages("prepare fails for none of 200 jobs at once with 40 images under AWS's rates", 200, 40, 1);
manyImages("prepare fails for none of 60 jobs at once with 20 images on three hosts", 60, 20, 3);

soakTest("a job runs in its own image beside 49 others with 5 images", async (meta, skip) => {
  if (hosts.kind !== "container") return skip("it needs a container");
  meta.hosts = "container";
  const images = Object.fromEntries([0, 1, 2, 3, 4].map((n) => [`ci/base:${n}`, [`RUN echo ${n} >/image`]]));
  await buildImages(images);
  const own = await containerHosts({ samePort: true, images });
  try {
    const stages = ["get_sources", "build_script"];
    const load = await runLoad({ jobs: 50, imageOf: (id) => `ci/base:${id % 5}`, hosts: own, stages });
    console.log(`50 jobs with 5 images: ${JSON.stringify({ calls: load.calls, seconds: Math.round(load.seconds) })}`);
    const seen = load.jobs.map(({ id, status, image, outputIsComplete }) => ({ id, status, image, outputIsComplete }));
    expect(seen).toEqual(
      load.jobs.map(({ id }) => ({ id, status: "success", image: `${id % 5}`, outputIsComplete: true })),
    );
    expect(load.calls.RegisterTaskDefinition).toEqual({ all: 5, throttled: 0, failed: 0 });
    return { ended: "each job: 0", says: "", left: load.tasksLeft.length };
  } finally {
    await own.close();
  }
});

for (const cpus of [undefined, 0.25])
  soakTest(
    `runScript keeps the last output of 320 scripts behind a filter${cpus ? ` on ${cpus} CPU` : ""}`,
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

soakTest("callBuild keeps 200 MB of two streams apart, and the codes of 2000 calls", async (meta, skip) => {
  if (hosts.kind !== "container") return skip("it needs a container");
  meta.hosts = hosts.kind;
  const pair = await startPair();
  const shells = { interpreter: "bash", loginShell: "bash" } as const;
  const call = async (script: string) => {
    const connection = await pair.logIn();
    const [stdout, stderr] = [collect(), collect()];
    const context = { signal: never, log, stdout: stdout.sink, stderr: stderr.sink };
    const outcome = await callBuild(connection, "bash", Buffer.from(script), shells, context);
    connection.client.end();
    return { outcome, stdout: stdout.bytes(), stderr: stderr.bytes() };
  };
  try {
    const stream = (letter: string) => `head -c 100000000 /dev/zero | tr '\\0' ${letter}`;
    const { outcome, stdout, stderr } = await call(`${stream("o")} & ${stream("e")} >&2; wait`);
    expect(outcome).toEqual({ ended: "exited", code: 0 });
    expect([stdout.equals(Buffer.alloc(1e8, "o")), stderr.equals(Buffer.alloc(1e8, "e"))]).toEqual([true, true]);
    const wrong: unknown[] = [];
    let next = 0;
    const work = async () => {
      for (let n = next++; n < 2_000; n = next++) {
        const ran = await call(`echo out${n}; echo err${n} >&2; exit ${n % 256}`);
        const texts = [ran.stdout.toString(), ran.stderr.toString()];
        const seen = [ran.outcome, ...texts];
        const expected = [{ ended: "exited", code: n % 256 }, `out${n}\n`, `err${n}\n`];
        if (JSON.stringify(seen) !== JSON.stringify(expected)) wrong.push(seen);
      }
    };
    await Promise.all([work(), work(), work(), work()]);
    expect(wrong).toEqual([]);
    expect((await pair.host.exec("ls -A /.fargate")).output).toBe("calls\n");
    return { ended: "each script: its own exit code, all output there", says: "", left: 0 };
  } finally {
    await pair.host.stop();
  }
});

soakTest("run tries again while sshd bars the address (OpenSSH 10)", async (meta) => {
  // The worker image's own entry point turns this off.
  const newer = await containerHosts({ baseImage: NEWER_BASE_IMAGE, lines: plainSshd() });
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
    // Each connection that closes after the server's first line adds 1 s of penalty. Above 15 s, sshd refuses the address.
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

// Another container of the task listens meanwhile.
soakTest(
  "prepare goes on after 30 s without a listener of a service",
  async (meta, skip) => {
    if (hosts.kind !== "container") return skip("it needs a container");
    const images = { "redis:7": REDIS_IMAGE, "silent:1": ['CMD ["sleep", "600"]'] };
    const own = await containerHosts(imageHosts(images));
    const containerDefinitions = [
      { name: CONTAINER, image: "sshd", stopTimeout: 2 },
      { name: "own-cache", image: "redis:7" },
    ];
    const world = await makeWorld({ hosts: own, taskDefinitions: [{ family: "test-task", containerDefinitions }] });
    meta.hosts = "container";
    try {
      const changes = { top: { JobImage: ANY_IMAGE } };
      const scene = makeScene(world, { changes, job: () => ({ services: ["silent:1"] }) }, forever);
      const finished = await scene.stage("prepare");
      ended(finished, 0);
      expect(finished.stderr).toMatch(/warning: services do not listen after 3\d s: silent:1\n.*Ready: /);
      ended(await scene.stage("cleanup"), 0);
      const says = normalise(/^.*services do not listen.*/m.exec(finished.stderr)?.[0] ?? "").replace(/3\d s/, "30 s");
      return { ended: "prepare: 0", says, left: world.aws.running().length };
    } finally {
      await world.close();
      await own.close();
    }
  },
  { concurrent: true },
);

/** Interrupts stages after each system call that changes or observes the outside world. @returns the tasks left */
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
      table(({ reached, step }) => !reached && !isTimingDependent(step)),
      "not reached",
    ).toBe("");
    expect(
      table(({ tasksLeft }) => tasksLeft > 0),
      "tasks left",
    ).toBe("");
    // These may be left: they have no secret, and sweep removes them.
    const litter = (name: string) => !/^\.(manager-id|definition-[0-9a-f]{32})\.([0-9a-f]{12}\.tmp|lock)$/.test(name);
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
    const signalled = results.filter(({ reached, signal }) => reached && signal !== "SIGKILL");
    // A stage that had finished may exit with 0. cleanup ignores signals and always finishes.
    const whole = { prepare: /Ready/, run: /\bdone\b/, cleanup: /^/ };
    const right = ({ stage, exitCode, output }: StepResult) =>
      exitCode === 2 || (exitCode === 0 && whole[stage].test(output));
    expect(stepTable(signalled.filter((result) => !right(result))), "exit code").toBe("");
    expect(stepTable(signalled.filter(({ scriptProcesses }) => scriptProcesses > 0)), "the script goes on").toBe("");
    return results.reduce((left, { tasksLeft }) => left + tasksLeft, 0);
  } finally {
    await world.close();
  }
}

/** Needs strace to stop after each system call. Without strace the test is skipped, or fails if CI=true. */
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
  "prepare leaves no task after SIGKILL at any of its system calls",
  "prepare: SIGKILL",
  { stage: "prepare", signal: "SIGKILL" },
  { stage: "prepare", signal: "SIGKILL", followedBy: "next try" },
  { stage: "prepare", signal: "SIGKILL", ...atRunTask },
  { stage: "prepare", signal: "SIGKILL", ...atRunTask, followedBy: "next try" },
);
const whenSent = (step: string) => step === "send RunTask";
stepTest(
  "prepare leaves no task after SIGTERM or SIGINT at any of its system calls",
  "prepare: 2, or 0 once it is ready",
  { stage: "prepare", signal: "SIGTERM" },
  { stage: "prepare", signal: "SIGINT" },
  { stage: "prepare", signal: "SIGTERM", only: whenSent, runTask: { delay: 3_000 } },
  { stage: "prepare", signal: "SIGTERM", only: whenSent, runTask: { delay: 8_000 } },
  { stage: "prepare", signal: "SIGTERM", only: whenSent, runTask: "hang-after" },
  { stage: "prepare", signal: "SIGINT", only: whenSent, runTask: "hang-after" },
);
const registering = {
  stage: "prepare" as const,
  only: (step: string) => /definition/i.test(step),
  config: { top: { JobImage: { AllowedServices: ["**"] } } },
  job: { services: ["redis:7"] },
} satisfies Omit<StepOptions, "world" | "signal">;
stepTest(
  "prepare leaves no task after a signal at any system call for a definition",
  "prepare: SIGKILL or 2",
  { ...registering, signal: "SIGKILL" },
  { ...registering, signal: "SIGKILL", followedBy: "next try" },
  { ...registering, signal: "SIGTERM", followedBy: "next try" },
);
stepTest(
  "run ends after a signal at any of its system calls",
  "run: 2, or 0 once its script has ended",
  { stage: "run", signal: "SIGTERM" },
  { stage: "run", signal: "SIGINT" },
  { stage: "run", signal: "SIGKILL" },
);
stepTest(
  "cleanup leaves no task after a signal at any of its system calls",
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

/** Interrupts `runners` after each of its system calls, with two managers. */
const runnersStepTest = (signal: "SIGKILL" | "SIGTERM", ended: string) =>
  soakTest(`runners loses no registration silently after ${signal} at any of its system calls`, async (_, skip) => {
    if (!(await straceWorks())) {
      if (process.env.CI === "true") throw new Error("CI=true, and strace does not work");
      skip("strace is missing, or may not trace");
    }
    const all = await Promise.all([false, true].map((isMixed) => enumerateRunnersSteps(signal, { isMixed })));
    console.log(`runners ${signal}: ${all.map((steps) => `${steps.length} steps`).join(", ")}`);
    const [registered = [], mixed = []] = all;
    for (const step of [
      "open the lock",
      "send POST /api/v4/runners",
      "rename config.toml's temporary file to config.toml",
    ])
      expect(registered.map(({ step }) => step)).toContain(step);
    expect(mixed.map(({ step }) => step)).toContain("send POST /api/v4/runners/verify");
    const results = all.flat();
    const lines = results.flatMap(({ step, problems }) => problems.map((problem) => `${step}: ${problem}`));
    expect(lines.join("\n")).toBe("");
    expect(results.filter(({ reached, step }) => !reached && !isTimingDependent(step)).map(({ step }) => step)).toEqual(
      [],
    );
    const wrong = results.filter(({ reached, interrupted: { code, signal: by } }) =>
      signal === "SIGKILL" ? reached && by !== signal : ![0, 2].includes(Number(code)),
    );
    expect(wrong.map(({ step, interrupted }) => `${step}: ${interrupted.code} ${interrupted.signal}`)).toEqual([]);
    // In some runs, GitLab had registered a runner whose token was not stored.
    expect(registered.filter(({ runners }) => runners > 3)).toEqual([]);
    expect(registered.some(({ runners }) => runners === 3)).toBe(true);
    return { ended, says: "", left: 0 };
  });
runnersStepTest("SIGKILL", "runners: SIGKILL");
runnersStepTest("SIGTERM", "runners: 2, or 0 once it has ended");

const reachNothing = async () => {
  const fleet = await makeFleet();
  await fleet.close();
  const finished = await fleet.run(managersNamed("one", "two"));
  ended(finished, 2);
  expect(finished.stderr).toMatch(/error: manager one: http:\S+ cannot be reached: .*\n.*1 more runner not processed/);
  expect(fleet.names().filter((name) => name.includes("pending"))).toEqual([]);
  return { ended: "runners: 2", says: "", left: 0 };
};
soakTest("runners tries for a minute to reach GitLab where nothing listens", reachNothing, { concurrent: true });

/** The worst cases of a shutdown. The container is killed `seconds` after TERM. */
const SHUTDOWNS: {
  seconds: number;
  env?: Record<string, string>;
  grace?: number;
  hangs?: boolean;
  starts?: boolean;
}[] = [
  { seconds: 30 },
  { seconds: 30, hangs: true },
  { seconds: 30, starts: true },
  { seconds: 120, env: { STOP_TIMEOUT: "60", SHUTDOWN_TIMEOUT: "40" }, grace: 30 },
  { seconds: 120, env: { STOP_TIMEOUT: "60", SHUTDOWN_TIMEOUT: "40" }, grace: 30, hangs: true },
];

/** Shuts a manager down as ECS does, with slow answers of AWS and GitLab. @returns what is left at SIGKILL */
async function shutDown({ seconds, env, grace, hangs = false, starts = false }: (typeof SHUTDOWNS)[number]) {
  const fleet = await makeManagerWorld();
  try {
    const { aws } = fleet.world;
    const container = await fleet.container({
      ecs: true,
      managers: ["one", "two"],
      env: { RUNNER_CONCURRENCY: "3", ...env },
      settings: grace ? { SSH: { CancelGracePeriod: grace } } : {},
    });
    const started = container.start();
    await fleet.gitlab.waitFor(() => fleet.gitlab.runners.length === 2, 60_000);
    for (const operation of ["RunTask", "StopTask"] as const)
      aws.inject({ operation, times: Number.POSITIVE_INFINITY, do: { delay: 2_000, after: true } });
    for (const operation of ["unregister", "updateJob", "patchTrace"] as const)
      fleet.gitlab.inject({ operation, times: Number.POSITIVE_INFINITY, do: { delay: 2_000 } });
    const tokens = fleet.gitlab.runners.map(({ token }) => token);
    if (starts) {
      for (const token of [...tokens, tokens[0]]) fleet.queueJob(["true"], token);
      await aws.waitFor(() => fleet.workers().length === 3, 60_000);
    } else await Promise.all([...tokens, tokens[0]].map((token) => fleet.runningJob({ token, ignoresTerm: true })));
    if (hangs) process.kill(container.gitlabRunner(), "SIGSTOP");
    started.process.kill("SIGTERM");
    const clock = Promise.withResolvers<void>();
    const timer = setTimeout(clock.resolve, seconds * 1000);
    await Promise.race([started.finished, clock.promise]);
    clearTimeout(timer);
    await container.kill(); // also what remains when the first process has ended
    const { code, stderr } = await started.finished;
    const workers = fleet.workers().length;
    const left = { workers, runners: fleet.gitlab.runners.length, records: container.recordsLeft().length };
    return { code, ...left, errors: stderr.split("\n").filter((line) => / error: /.test(line)) };
  } finally {
    await fleet.close();
  }
}

const shutAllDown = async () => {
  const results = await Promise.all(SHUTDOWNS.map(shutDown));
  expect(results).toEqual(SHUTDOWNS.map(() => ({ code: 0, workers: 0, runners: 0, records: 0, errors: [] })));
  return { ended: "manager: 0", says: "", left: results.reduce((sum, { workers }) => sum + workers, 0) };
};
soakTest("manager leaves nothing when its container is killed after 30 s or 120 s", shutAllDown, { concurrent: true });

testTable("soak");

if (SOAK) testSecrets({ never: ["logRecords", "errors"], least: 10 });
else beforeAll(() => console.log(`left to npm run soak: ${soaks.join("; ")}`));
