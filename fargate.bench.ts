/**
 * `npm run bench`: measures the compiled driver against real programs: OpenSSH's client, a program that bun
 * compiled, /bin/true. Prints a table and a projection, and writes dist/bench.json. With `UPDATE_DOCS=true`, it
 * also writes them to docs/performance.md, and draws docs/performance.svg.
 *
 *     bun fargate.bench.ts [--only start,stage] [--driver PATH] [--baseline PATH] [--runs N]
 *
 *     --only      the benchmarks to run, separated by commas; default all
 *     --driver    the driver to measure; default dist/fargate
 *     --baseline  another driver, measured in the same rounds as a further reference;
 *                 not in prepare, job, image and scale
 *     --runs      rounds of the short measurements; default 30. Longer ones have fewer
 *
 * It judges nothing: a figure that misses its goal is marked in the table, and the exit code is 0. A process that
 * fails or prints something else than it should ends the benchmark with 1.
 *
 * @module
 */
import { execFileSync, spawnSync } from "node:child_process";
import { accessSync, constants, mkdirSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { availableParallelism, release, totalmem } from "node:os";
import { join, resolve } from "node:path";
import { setTimeout as sleep } from "node:timers/promises";
import { parseArgs } from "node:util";
import { bundle } from "./.ci/build.ts";
import {
  imageBenchmark,
  prepareBenchmark,
  projection,
  scaleBenchmark,
  wholeJobBenchmark,
} from "./fixtures/bench-jobs.ts";
import {
  abandon,
  alternate,
  announce,
  barChart,
  begin,
  busyStarts,
  cpuTimeOf,
  type Figure,
  figure,
  type Measured,
  makeJob,
  markdownTables,
  measure,
  median,
  memoryOf,
  reachesGoal,
  type StagedJob,
  stageEnvironment,
  type Transfer,
  textTable,
  transfer,
  withWorld,
} from "./fixtures/measure.ts";
import { parseDriverConfig } from "./fixtures/runner.ts";
import { dockerAnswers } from "./fixtures/tasks.ts";
import { projectRoot, scratchDirectory, type World } from "./fixtures/world.ts";

/** What a benchmark measures. */
interface Subject {
  /** The driver's command. */
  readonly driver: readonly string[];
  /** Another driver to compare with. */
  readonly baseline?: readonly string[];
  /** The number of rounds of short measurements. */
  readonly runs: number;
}

const scratch = scratchDirectory("bench");
let files = 0;
/** Writes a new temporary file and returns its path. */
function temporaryFile(content: string): string {
  const path = join(scratch.path, String(files++));
  writeFileSync(path, content, { mode: 0o600 });
  return path;
}

// ---------------------------------------------------------------------------------------------------------
// Jobs, tasks and references
// ---------------------------------------------------------------------------------------------------------

/** The driver, and the baseline if there is one. */
const driversOf = ({ driver, baseline }: Subject): [name: string, command: readonly string[]][] => [
  ["driver", driver],
  ...(baseline ? [["baseline", baseline] as [string, readonly string[]]] : []),
];

/** Runs the stage prepare of a new job. */
async function prepareJob(world: World, config: string, driver: readonly string[], id: number): Promise<StagedJob> {
  const job = makeJob(world, config, scratch.path, id);
  await measure(job.stage(driver, "prepare"), { env: job.env });
  return job;
}

/** Prepares jobs with one task each, in containers of the worker image. */
async function withContainers<T>(
  { driver }: Subject,
  tasks: number,
  use: (jobs: readonly StagedJob[], world: World) => Promise<T>,
): Promise<T> {
  return await withWorld({}, async (world) => {
    if (world.hosts.kind !== "container") throw new Error(`tasks cannot run in containers: ${world.fallback}`);
    const config = world.configure();
    const ids = Array.from({ length: tasks }, (_, index) => 1 + index);
    return await use(await Promise.all(ids.map((id) => prepareJob(world, config, driver, id))), world);
  });
}

/** Compiles a program that prints a line, exactly as the driver is compiled. */
async function compileHello(): Promise<string[]> {
  const [source, program] = [join(scratch.path, "hello.ts"), join(scratch.path, "hello")];
  writeFileSync(source, 'console.log("hello world");\n');
  await bundle(program, source);
  return [program];
}

/** A reference, and the goal of the ratio to it. */
interface Reference {
  readonly name: string;
  /** Undefined without a baseline. */
  readonly values: readonly number[] | undefined;
  readonly goal?: number;
}

/** The figures of some values: one for each reference. Before them, one without reference if it has a `goal`. */
function compare(
  { goal, ...about }: Pick<Figure, "group" | "name" | "unit" | "goal" | "note">,
  values: readonly number[] = [],
  references: readonly Reference[],
): Figure[] {
  const compared = references.flatMap(({ name, values: reference, goal }) =>
    reference ? [figure({ ...about, ...(goal && { goal }) }, values, { name, values: reference })] : [],
  );
  return goal === undefined ? compared : [figure({ ...about, goal }, values), ...compared];
}

/** One number of each result, by subject. */
const pick = <T>(results: Record<string, T[]>, number: (result: T) => number): Record<string, number[]> =>
  Object.fromEntries(Object.entries(results).map(([name, list]) => [name, list.map(number)]));
const milliseconds = ({ ms }: Measured) => ms;

const HELLO = "hello world, compiled by bun";
const TRUE = "/bin/true";
const BASELINE = "the baseline";
const OPENSSH = "OpenSSH";
/** The driver's own key exchange and cipher. */
const CURVE25519 = "OpenSSH with curve25519-sha256";
const AES_GCM = "OpenSSH with aes128-gcm";

/** An algorithm that OpenSSH's client and the task's sshd chose, by its name in the client's debug output. */
async function negotiated(job: StagedJob, what: string): Promise<string> {
  const { stderr } = await measure(job.ssh("-v"), { stdin: temporaryFile("true\n") });
  const [, algorithm] = new RegExp(`kex: ${what}: (\\S+)`).exec(stderr) ?? [];
  if (algorithm === undefined) throw new Error(`ssh -v does not show the ${what}`);
  return algorithm;
}

// ---------------------------------------------------------------------------------------------------------
// Benchmarks
// ---------------------------------------------------------------------------------------------------------

async function startBenchmark(subject: Subject): Promise<Figure[]> {
  const hello = await compileHello();
  const env = stageEnvironment(1, scratch.path);
  const subjects: Record<string, () => Promise<Measured>> = {
    hello: () => measure(hello, { env, stdout: "hello world\n" }),
    true: () => measure([TRUE], { env, stdout: "" }),
  };
  for (const [name, command] of driversOf(subject)) {
    subjects[`${name} config`] = async () => {
      const result = await measure([...command, "custom", "config"], { env });
      if (parseDriverConfig(result.stdout.toString()).driver?.name === undefined) throw new Error("config is wrong");
      return result;
    };
    subjects[`${name} help`] = async () => {
      const result = await measure([...command, "--help"], { env });
      if (!result.stdout.includes("Usage: fargate")) throw new Error("--help is wrong");
      return result;
    };
  }
  const times = pick(await alternate(subject.runs, subjects), milliseconds);
  const figures = (name: string, of: string, goal: number) =>
    compare({ group: "Start", name, unit: "ms" }, times[`driver ${of}`], [
      { name: HELLO, values: times.hello, goal },
      { name: TRUE, values: times.true },
      { name: BASELINE, values: times[`baseline ${of}`] },
    ]);
  return [...figures("`custom config`", "config", 1.8), ...figures("`--help`", "help", 2.7)];
}

async function stageBenchmark(subject: Subject): Promise<Figure[]> {
  return await withContainers(subject, 1, async ([job], { aws }) => {
    if (!job) throw new Error("no job was prepared");
    const script = temporaryFile("true\n");
    const curve25519 = job.ssh("-o", "KexAlgorithms=curve25519-sha256");
    const subjects: Record<string, () => Promise<Measured>> = {
      openssh: () => measure(job.ssh(), { stdin: script, stdout: "" }),
      curve25519: () => measure(curve25519, { stdin: script, stdout: "" }),
    };
    for (const [name, command] of driversOf(subject))
      subjects[name] = () => {
        job.touch();
        return measure(job.stage(command, "run", script, "build_script"), { env: job.env, stdout: "" });
      };
    const calls = aws.calls.length;
    const times = pick(await alternate(subject.runs, subjects), milliseconds);
    if (aws.calls.length > calls) throw new Error(`run called ${aws.calls.at(-1)?.operation}`);
    const exchange = await negotiated(job, "algorithm");
    const share = 1 - median(times.curve25519 ?? []) / median(times.openssh ?? []);
    const note =
      `OpenSSH's client chose the key exchange ${exchange} by default. With curve25519-sha256 instead, its median was ` +
      `${(share * 100).toFixed(0)}% lower.`;
    return compare({ group: "One stage", name: "`custom run` of `true`", unit: "ms", note }, times.driver, [
      { name: OPENSSH, values: times.openssh, goal: 0.3 },
      { name: CURVE25519, values: times.curve25519 },
      { name: BASELINE, values: times.baseline },
    ]);
  });
}

/** Output of a script, with its size in bytes. */
const OUTPUTS = [
  { what: "1 GB in large writes", script: "dd if=/dev/zero bs=1000000 count=1000\n", bytes: 1e9, hasGoals: true },
  { what: "10 million short lines", script: "seq 10000000\n", bytes: 78_888_897, hasGoals: false },
];

async function throughputBenchmark(subject: Subject): Promise<Figure[]> {
  return await withContainers(subject, 1, async ([job]) => {
    if (!job) throw new Error("no job was prepared");
    const fifo = join(scratch.path, "output");
    execFileSync("mkfifo", [fifo]);
    const aesGcm = job.ssh("-o", "Ciphers=aes128-gcm@openssh.com");
    const cipher = await negotiated(job, "server->client cipher");
    const note = `OpenSSH's client chose the cipher ${cipher} by default. The driver uses aes128-gcm.`;
    const figures: Figure[] = [];
    for (const { what, script, bytes, hasGoals } of OUTPUTS) {
      const path = temporaryFile(script);
      for (const into of [undefined, fifo]) {
        const sink = into === undefined ? "into /dev/null" : "into a pipe";
        announce(`Log throughput: ${what}, ${sink}`);
        const subjects: Record<string, () => Promise<Transfer>> = {
          openssh: () => transfer(job.ssh(), { stdin: path, bytes, fifo: into }),
          gcm: () => transfer(aesGcm, { stdin: path, bytes, fifo: into }),
        };
        for (const [name, command] of driversOf(subject))
          subjects[name] = () => {
            job.touch();
            const run = job.stage(command, "run", path, "build_script");
            return transfer(run, { env: job.env, bytes, fifo: into });
          };
        const results = await alternate(Math.min(subject.runs, 5), subjects, { warmUp: false });
        const figuresOf = (
          measured: string,
          unit: string,
          number: (result: Transfer) => number,
          { goal, ratio }: { goal?: number; ratio?: number },
        ) => {
          const values = pick(results, number);
          const about = { group: "Log throughput", name: `${what}, ${sink}: ${measured}`, unit, note };
          return compare({ ...about, ...(hasGoals && goal && { goal }) }, values.driver, [
            { name: OPENSSH, values: values.openssh, ...(hasGoals && ratio && { goal: ratio }) },
            ...(unit === "s" ? [{ name: AES_GCM, values: values.gcm }] : []),
            { name: BASELINE, values: values.baseline },
          ]);
        };
        figures.push(
          ...figuresOf("time", "s", ({ ms }) => ms / 1000, { ratio: 0.85 }),
          ...figuresOf("CPU time", "s", ({ cpuMs }) => cpuMs / 1000, { ratio: 1 }),
          ...figuresOf("peak memory", "MiB", ({ peak }) => peak, { goal: 130 }),
        );
      }
    }
    rmSync(fifo);
    return figures;
  });
}

async function cleanupBenchmark(subject: Subject): Promise<Figure[]> {
  const hello = await compileHello();
  const runs = Math.min(subject.runs, 10);
  const timing = { provisioning: 0, pending: 0, activating: 0, sshDelay: 0, deprovisioning: 0 };
  return await withWorld({ embedded: true, timing }, async (world) => {
    const config = world.configure();
    let id = 0;
    const subjects: Record<string, () => Promise<Measured>> = {
      hello: () => measure(hello, { stdout: "hello world\n" }),
      true: () => measure([TRUE], { stdout: "" }),
    };
    for (const [name, command] of driversOf(subject)) {
      // One for each round, and one to warm up.
      const ids = Array.from({ length: runs + 1 }, () => ++id);
      const jobs = await Promise.all(ids.map((id) => prepareJob(world, config, command, id)));
      subjects[name] = async () => {
        const job = jobs.pop() as StagedJob;
        const before = world.aws.running().length;
        const result = await measure(job.stage(command, "cleanup"), { env: job.env, stdout: "" });
        if (world.aws.running().length !== before - 1) throw new Error("cleanup did not stop its task");
        return result;
      };
    }
    const times = pick(await alternate(runs, subjects), milliseconds);
    return compare({ group: "Cleanup", name: "`custom cleanup`", unit: "ms" }, times.driver, [
      { name: HELLO, values: times.hello },
      { name: TRUE, values: times.true },
      { name: BASELINE, values: times.baseline },
    ]);
  });
}

/** Tasks, and clients of each. sshd refuses some connections if more than ten have not logged in yet. */
const WAITING = { tasks: 10, each: 5 } as const;
const CLIENTS = WAITING.tasks * WAITING.each;
/** How long clients wait until they are judged, and for how long their CPU time is measured, in ms. */
const SETTLE_MS = 2_000;
const IDLE_MS = 5_000;

/** What fifty clients needed. */
interface Crowd {
  /** Time to the first output of each, in ms. */
  readonly firstOutputs: readonly number[];
  readonly memory: Record<"private" | "rss" | "pss", number>;
  /** CPU time of all together while they waited, in ms per second. */
  readonly idleCpu: number;
}

async function waitingBenchmark(subject: Subject): Promise<Figure[]> {
  return await withContainers(subject, WAITING.tasks, async (jobs, { aws }) => {
    // Each script waits until another process opens the pipe.
    const script = temporaryFile("echo begun; read -r _ </tmp/gate || :\n");
    const [make, open] = [temporaryFile("mkfifo /tmp/gate\n"), temporaryFile(": >/tmp/gate\n")];
    await Promise.all(jobs.map((job) => measure(job.ssh(), { stdin: make })));
    const crowd = async (start: (job: StagedJob, onFirstOutput: (ms: number) => void) => ReturnType<typeof begin>) => {
      const firstOutputs: number[] = [];
      const { promise: allBegun, resolve } = Promise.withResolvers<void>();
      const onFirstOutput = (ms: number) => firstOutputs.push(ms) === CLIENTS && resolve();
      const clients = jobs.flatMap((job) => Array.from({ length: WAITING.each }, () => start(job, onFirstOutput)));
      const finished = Promise.all(clients.map((client) => client.finished));
      await Promise.race([allBegun, finished]);
      await sleep(SETTLE_MS);
      const cpu = () => clients.reduce((sum, { pid }) => sum + cpuTimeOf(pid), 0);
      const [began, before] = [performance.now(), cpu()];
      await sleep(IDLE_MS);
      const idleCpu = (cpu() - before) / ((performance.now() - began) / 1000);
      const memories = clients.map(({ pid }) => memoryOf(pid));
      const memory = (kind: keyof Crowd["memory"]) => median(memories.map((one) => one[kind]));
      await Promise.all(jobs.map((job) => measure(job.ssh(), { stdin: open })));
      for (const { stdout } of await finished)
        if (stdout.toString() !== "begun\n") throw new Error(`a waiting client printed ${JSON.stringify(`${stdout}`)}`);
      return {
        firstOutputs,
        idleCpu,
        memory: { private: memory("private"), rss: memory("rss"), pss: memory("pss") },
      };
    };
    const subjects: Record<string, () => Promise<Crowd>> = {
      openssh: () => crowd((job, onFirstOutput) => begin(job.ssh(), { stdin: script, onFirstOutput })),
    };
    for (const [name, command] of driversOf(subject))
      subjects[name] = () => {
        for (const job of jobs) job.touch();
        return crowd((job, onFirstOutput) =>
          begin(job.stage(command, "run", script, "build_script"), { env: job.env, onFirstOutput }),
        );
      };
    const calls = aws.calls.length;
    const results = await alternate(Math.min(subject.runs, 3), subjects, { warmUp: false });
    const asked = aws.calls.length - calls;
    const notes = {
      waiting:
        `Medians of ${CLIENTS} processes, ${SETTLE_MS / 1000} s after the last one's first output. ` +
        `CPU time over ${IDLE_MS / 1000} s.`,
      starting:
        `${CLIENTS} processes at once, ${WAITING.each} in each of ${WAITING.tasks} tasks: sshd refuses some of the ` +
        "connections if more than ten have not logged in, which the driver repeats and OpenSSH's client does not. " +
        `The driver called AWS ${asked} times.`,
    };
    const figures = (name: string, unit: string, number: (result: Crowd) => number, goal?: number) => {
      const values = pick(results, number);
      const [group, note] = name.startsWith("first")
        ? ["Fifty starting", notes.starting]
        : ["Fifty waiting", notes.waiting];
      return compare({ group, name, unit, note, ...(goal && { goal }) }, values.driver, [
        { name: OPENSSH, values: values.openssh },
        { name: BASELINE, values: values.baseline },
      ]);
    };
    // Without a ratio, because OpenSSH's client may use no CPU time at all.
    const idleCpu = pick(results, ({ idleCpu }) => idleCpu);
    const idle = [...driversOf(subject).map(([name]) => name), "openssh"].map((name) =>
      figure(
        {
          group: "Fifty waiting",
          name: `CPU time of all fifty, ${name === "openssh" ? OPENSSH : name}`,
          unit: "ms/s",
          note: notes.waiting,
        },
        idleCpu[name] ?? [],
      ),
    );
    return [
      ...figures("private memory", "MiB", ({ memory }) => memory.private, 9),
      ...figures("resident memory", "MiB", ({ memory }) => memory.rss),
      ...figures("proportional share of memory", "MiB", ({ memory }) => memory.pss),
      ...idle,
      ...figures("first output of fifty, median", "ms", ({ firstOutputs }) => median(firstOutputs)),
      ...figures("first output of fifty, last", "ms", ({ firstOutputs }) => Math.max(...firstOutputs)),
    ];
  });
}

/** The benchmarks, by their names for `--only`, in the order of the table. */
const BENCHMARKS: Readonly<Record<string, (subject: Subject) => Promise<Figure[]>>> = {
  start: startBenchmark,
  stage: stageBenchmark,
  throughput: throughputBenchmark,
  prepare: prepareBenchmark,
  cleanup: cleanupBenchmark,
  job: wholeJobBenchmark,
  image: imageBenchmark,
  waiting: waitingBenchmark,
  scale: scaleBenchmark,
};

// ---------------------------------------------------------------------------------------------------------
// Command line
// ---------------------------------------------------------------------------------------------------------

/** An error of the caller, which is shown without a stack trace. */
class UsageError extends Error {}

function parseOptions(argv: string[]) {
  const option = { type: "string" } as const;
  try {
    return parseArgs({ args: argv, options: { only: option, driver: option, baseline: option, runs: option } }).values;
  } catch (error) {
    throw new UsageError((error as Error).message);
  }
}

/** The command of a driver. @throws UsageError when it cannot be executed */
function executable(path: string): readonly string[] {
  try {
    accessSync(path, constants.X_OK);
    return [resolve(path)];
  } catch {
    throw new UsageError(`${path} is no program: build the driver with npm run build, or give another --driver`);
  }
}

/** What the figures depend on. */
interface Conditions {
  readonly date: string;
  readonly cores: number;
  readonly memoryGiB: number;
  readonly kernel: string;
  readonly bun: string;
  readonly openssh: string;
  readonly driver: string;
}

/** @throws UsageError when something that the benchmarks need is missing */
async function checkConditions({ driver }: Subject): Promise<Conditions> {
  if (process.platform !== "linux") throw new UsageError("npm run bench needs Linux: it reads /proc");
  const ssh = spawnSync("ssh", ["-V"], { encoding: "utf8" });
  if (ssh.error || ssh.status !== 0)
    throw new UsageError("npm run bench needs OpenSSH's client as reference: install ssh (openssh-client)");
  if (!(await dockerAnswers()))
    throw new UsageError(
      "npm run bench needs a Docker engine, because tasks are containers of sshd-image: none answers",
    );
  const version = await measure([...driver, "--version"]);
  return {
    date: new Date().toISOString().slice(0, 10),
    cores: availableParallelism(),
    memoryGiB: Math.round(totalmem() / 2 ** 30),
    kernel: release(),
    bun: Bun.version,
    openssh: /^OpenSSH_([^\s,]+)/.exec(ssh.stderr)?.[1] ?? ssh.stderr.trim(),
    driver: version.stdout.toString().trim(),
  };
}

/** Replaces the part of docs/performance.md between its markers, and draws the chart. */
function updateDocs(conditions: Conditions, figures: readonly Figure[], projected: string): void {
  const { date, cores, memoryGiB, kernel, bun, openssh } = conditions;
  const page = join(projectRoot, "docs", "performance.md");
  const missed = figures.filter((one) => !reachesGoal(one)).length;
  const results = [
    `Measured with \`npm run bench\` on ${date}, on a machine with ${cores} cores and ${memoryGiB} GiB of memory, ` +
      `Linux ${kernel.replace(/^(\d+\.\d+).*/, "$1")}, bun ${bun}, OpenSSH ${openssh.replace(/p\d+.*/, "")}. ` +
      `${missed === 0 ? "All goals were reached" : `Goals that were missed: ${missed}`}.`,
    markdownTables(figures),
    projected,
  ].join("\n\n");
  const text = readFileSync(page, "utf8");
  const marked = /(<!-- results -->\n)[\s\S]*(\n<!-- end results -->)/;
  if (!marked.test(text)) throw new Error(`${page} has no place for the results`);
  writeFileSync(
    page,
    text.replace(marked, (_, start, end) => `${start}\n${results}\n${end}`),
  );
  // The ratios to other programs that have a goal, and those of the same values to OpenSSH with the driver's algorithms.
  const hasGoal = ({ reference, goal }: Figure) =>
    goal !== undefined && reference !== undefined && [HELLO, OPENSSH].includes(reference.name);
  const names = new Set(figures.filter(hasGoal).map(({ name }) => name));
  const drawn = figures.filter(
    (one) => hasGoal(one) || (names.has(one.name) && [CURVE25519, AES_GCM].includes(one.reference?.name ?? "")),
  );
  writeFileSync(
    join(projectRoot, "docs", "performance.svg"),
    barChart("The driver's time and CPU time, relative to other programs", drawn),
  );
}

async function main(argv: string[]): Promise<void> {
  const { only, driver = join(projectRoot, "dist", "fargate"), baseline, runs = "30" } = parseOptions(argv);
  const names = only?.split(",") ?? Object.keys(BENCHMARKS);
  const unknown = names.filter((name) => !(name in BENCHMARKS));
  if (unknown.length > 0)
    throw new UsageError(`there is no benchmark ${unknown[0]}: choose from ${Object.keys(BENCHMARKS).join(",")}`);
  if (!/^[1-9]\d{0,3}$/.test(runs)) throw new UsageError("--runs takes a number from 1 to 9999");
  const writesDocs = process.env.UPDATE_DOCS === "true";
  if (writesDocs && argv.length > 0) throw new UsageError("UPDATE_DOCS=true needs a run without options");
  const subject: Subject = {
    driver: executable(driver),
    ...(baseline !== undefined && { baseline: executable(baseline) }),
    runs: Number(runs),
  };
  const conditions = await checkConditions(subject);

  const figures: Figure[] = [];
  const began = performance.now();
  for (const name of names) {
    announce(name);
    figures.push(...((await BENCHMARKS[name]?.(subject)) ?? []));
  }
  const seconds = Math.round((performance.now() - began) / 1000);
  console.log(`${conditions.driver}, ${conditions.date}: ${conditions.cores} cores, ${conditions.memoryGiB} GiB of memory, \
Linux ${conditions.kernel}, bun ${conditions.bun}, OpenSSH ${conditions.openssh}; ${seconds} s\n`);
  console.log(textTable(figures));
  const projected = names.includes("scale") ? projection(figures) : "";
  if (projected) console.log(`\n${projected}`);
  if (busyStarts > 0) console.log(`\nThe machine was busy: ${busyStarts} runs began although it was not idle.`);
  mkdirSync(join(projectRoot, "dist"), { recursive: true });
  const json = { ...conditions, seconds, busyStarts, figures, ...(projected && { projection: projected }) };
  writeFileSync(join(projectRoot, "dist", "bench.json"), `${JSON.stringify(json, null, 2)}\n`);
  if (writesDocs) updateDocs(conditions, figures, projected);
}

/** Set when the benchmark is being stopped. Errors of what was running do not matter then. */
let stopping = false;
async function stop(exitCode: number): Promise<never> {
  stopping = true;
  await abandon();
  scratch.close();
  process.exit(exitCode);
}
for (const [signal, number] of [
  ["SIGINT", 2],
  ["SIGTERM", 15],
] as const)
  process.on(signal, () => {
    if (!stopping) void stop(128 + number);
  });
const fail = (error: unknown) => {
  if (stopping) return;
  console.error(error instanceof UsageError ? `error: ${error.message}` : error);
  void stop(1);
};
process.on("unhandledRejection", fail);
main(process.argv.slice(2)).then(() => stop(0), fail);
