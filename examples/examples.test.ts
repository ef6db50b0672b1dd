/**
 * Every file in this directory is parsed or run, and compared with the others: a reader copies several of them, and they
 * must fit together. Needs no container, no compiled driver and no AWS account.
 */
import { globSync, mkdirSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { basename, join } from "node:path";
import { PassThrough } from "node:stream";
import { EC2Client } from "@aws-sdk/client-ec2";
import {
  Compatibility,
  CPUArchitecture,
  ECS,
  ECSClient,
  LogDriver,
  NetworkMode,
  OSFamily,
  TransportProtocol,
} from "@aws-sdk/client-ecs";
import { IAMClient } from "@aws-sdk/client-iam";
import { STSClient } from "@aws-sdk/client-sts";
import { mockClient } from "aws-sdk-client-mock";
import * as commander from "commander";
import { parse as parseToml } from "smol-toml";
import * as v from "valibot";
import { afterEach, beforeEach, describe, expect, test, vi } from "vitest";
import {
  Aws,
  CONTAINER,
  ConfigSchema,
  type Context,
  cleanup,
  InspectorAws,
  makeLogger,
  parseCommandLine,
  prepare,
  prepareImages,
  readConfig,
  run,
  runTaskInput,
  sweep,
} from "../fargate.ts";
import { GitLabStandIn } from "../fixtures/gitlab.ts";
import { gitlabJob } from "../fixtures/job.ts";
import { type Finished, start } from "../fixtures/process.ts";
import { parseRunnerConfig } from "../fixtures/runner-config.ts";
import { makeWorld, projectRoot, type World } from "../fixtures/world.ts";
import managersConfigs from "./ecs-manager/managers_configs.json" with { type: "json" };
import service from "./ecs-manager/service.json" with { type: "json" };
import managerDefinition from "./ecs-manager/task-definition.json" with { type: "json" };
import taskDefinition from "./task-definition.json" with { type: "json" };

const ACCOUNT = "111122223333";
const DRIVER = "/opt/gitlab-runner/fargate";
const CONFIG_FILE = "/etc/gitlab-runner/fargate.toml";

const read = (name: string) => readFileSync(join(import.meta.dirname, name), "utf8");
const fargateToml = read("fargate.toml");
const { config, warnings } = readConfig(fargateToml, CONFIG_FILE, {}, {});
const [container] = taskDefinition.containerDefinitions;
const [manager] = managerDefinition.containerDefinitions;
if (!container || !manager) throw new Error("a task definition has no container");
/** The variables of the manager's container. */
const variables: Record<string, string> = Object.fromEntries(
  manager.environment.map(({ name, value }) => [name, value]),
);

/** The body of the request that the SDK makes of an input: only what it knows. The request is not sent. */
async function requestOf(call: (ecs: ECS) => Promise<unknown>): Promise<unknown> {
  let body = "";
  const ecs = new ECS({
    region: config.Fargate.Region,
    credentials: { accessKeyId: "none", secretAccessKey: "none" },
    maxAttempts: 1,
    requestHandler: {
      handle: async (request: { body: string | Uint8Array }) => {
        body = Buffer.from(request.body as string).toString();
        throw new Error("the request is not sent");
      },
    } as never,
  });
  await expect(call(ecs)).rejects.toThrow("the request is not sent");
  return JSON.parse(body);
}

/** A line of fargate.toml that holds an optional setting: # and its name, without a space. */
const OPTIONAL = /^( *)#(?=(\w+) = )/;

describe("fargate.toml", () => {
  const lines = fargateToml.split("\n");
  const optional = lines.flatMap((line) => OPTIONAL.exec(line)?.[2] ?? []);

  test("examples/fargate.toml is accepted without a warning", () => {
    expect(warnings).toEqual([]);
  });

  /** Settings that exclude each other: with the first one, the second must go. */
  const EXCLUDED: Record<string, string> = {
    Subnet: "Subnets",
    SecurityGroup: "SecurityGroups",
    CapacityProviderStrategy: "LaunchType",
  };
  const withSetting = (name: string) =>
    lines
      .map((line) => (OPTIONAL.exec(line)?.[2] === name ? line.replace(OPTIONAL, "$1") : line))
      .filter((line) => !line.trimStart().startsWith(`${EXCLUDED[name]} = `))
      .join("\n");

  test.each(optional)("examples/fargate.toml accepts the optional %s", (name) => {
    const changed = readConfig(withSetting(name), CONFIG_FILE, {}, {});
    expect(changed.warnings).toEqual([]);
  });

  test("examples/fargate.toml shows every setting with its default", () => {
    const tables = ["Fargate", "JobImage", "TaskMetadata", "SSH"] as const;
    const settingsOf = (schema: object, table?: string) => {
      const inner = "wrapped" in schema ? (schema.wrapped as object) : schema;
      const { entries } = ("pipe" in inner ? (inner.pipe as object[])[0] : inner) as { entries: object };
      return Object.entries(entries as Record<string, v.GenericSchema>)
        .filter(([name]) => !tables.some((table) => table === name))
        .map(([name, entry]) => ({ table, name, value: v.getDefault(entry) as unknown }));
    };
    const settings = [
      ...settingsOf(ConfigSchema),
      ...tables.flatMap((table) => settingsOf(ConfigSchema.entries[table], table)),
    ];
    expect(settings.map(({ name }) => name).sort()).toEqual(
      lines.flatMap((line) => /^ *#?(\w+) = /.exec(line)?.[1] ?? []).sort(),
    );
    for (const { table, name, value } of settings) {
      const isEmpty = value === undefined || value === "" || ["{}", "[]"].includes(JSON.stringify(value));
      if (isEmpty || !optional.includes(name)) continue;
      const whole = parseToml(withSetting(name)) as Record<string, Record<string, unknown>>;
      expect({ [name]: (table ? whole[table] : whole)?.[name] }).toEqual({ [name]: value });
    }
  });
});

describe("GitLab Runner's configuration", () => {
  interface RunnerConfig {
    shutdown_timeout: number;
    runners: {
      executor: string;
      builds_dir: string;
      cache_dir: string;
      shell: string;
      custom: Custom;
      cache?: Cache;
    }[];
  }
  type Custom = Record<`${"config" | "prepare" | "run" | "cleanup"}_exec`, string> &
    Record<`${"config" | "prepare" | "run" | "cleanup"}_args`, string[]> & { graceful_kill_timeout: number };
  type Cache = { Type: string; s3: { BucketName: string; BucketLocation: string } };
  const parse = (text: string) => {
    const parsed = parseToml(text) as unknown as RunnerConfig;
    const [runner] = parsed.runners;
    if (!runner || parsed.runners.length > 1) throw new Error("config.toml is to have one runner");
    return { parsed, runner };
  };
  const { parsed, runner } = parse(read("config.toml"));

  test.each(["config", "prepare", "run", "cleanup"] as const)(
    "examples/config.toml starts %s with valid arguments",
    (stage) => {
      expect(runner.custom[`${stage}_exec`]).toBe(DRIVER);
      // The runner appends these.
      const appended = stage === "run" ? ["/tmp/script", "build_script"] : [];
      expect(parseCommandLine([...runner.custom[`${stage}_args`], ...appended], commander)).toMatchObject({
        command: stage,
        operands: appended,
        config: CONFIG_FILE,
      });
    },
  );

  test("examples/config.toml has what the Custom executor requires", () => {
    expect(runner).toMatchObject({ executor: "custom", shell: "bash" });
    for (const directory of [runner.builds_dir, runner.cache_dir]) expect(directory).toMatch(/^\//);
  });

  // And cleanup the time to stop its task.
  test("examples/config.toml leaves the driver time to end a cancelled script", () => {
    const { CancelGracePeriod } = config.SSH;
    expect(runner.custom.graceful_kill_timeout).toBeGreaterThanOrEqual(CancelGracePeriod + 10);
    expect(parsed.shutdown_timeout).toBeGreaterThanOrEqual(CancelGracePeriod + 10 + 60);
  });

  test("examples/cache-s3.toml can be appended to config.toml", () => {
    const { cache } = parse(`${read("config.toml")}\n${read("cache-s3.toml")}`).runner;
    expect(cache).toMatchObject({
      Type: "s3",
      s3: { BucketLocation: config.Fargate.Region, AuthenticationType: "iam" },
    });
    const resources = policies["cache-s3.json"]?.Statement.flatMap(({ Resource }) => Resource);
    expect(resources).toContain(`arn:aws:s3:::${cache?.s3.BucketName}`);
    expect(resources).toContain(`arn:aws:s3:::${cache?.s3.BucketName}/*`);
  });
});

describe("task-definition.json", () => {
  // The SDK sends all of it.
  test("examples/task-definition.json has only what RegisterTaskDefinition knows", async () => {
    expect(await requestOf((ecs) => ecs.registerTaskDefinition(taskDefinition as never))).toEqual(taskDefinition);
  });

  test("examples/task-definition.json uses values that the SDK lists", () => {
    expect(Object.values(NetworkMode)).toContain(taskDefinition.networkMode);
    expect(Object.values(Compatibility)).toEqual(expect.arrayContaining(taskDefinition.requiresCompatibilities));
    expect(Object.values(CPUArchitecture)).toContain(taskDefinition.runtimePlatform.cpuArchitecture);
    expect(Object.values(OSFamily)).toContain(taskDefinition.runtimePlatform.operatingSystemFamily);
    expect(Object.values(LogDriver)).toContain(container.logConfiguration.logDriver);
    for (const { protocol } of container.portMappings) expect(Object.values(TransportProtocol)).toContain(protocol);
  });

  test("examples/task-definition.json is what the driver expects of a task", () => {
    expect(taskDefinition.family).toBe(config.Fargate.TaskDefinition);
    expect(taskDefinition.networkMode).toBe("awsvpc");
    expect(container.name).toBe(CONTAINER);
    expect(container.essential).toBe(true);
    expect(container.portMappings.map(({ containerPort }) => containerPort)).toEqual([config.SSH.Port]);
    expect(container.linuxParameters.initProcessEnabled).toBe(true);
    expect(container.logConfiguration.options["awslogs-region"]).toBe(config.Fargate.Region);
    expect(container.stopTimeout).toBeLessThanOrEqual(120); // Fargate's maximum, in seconds
  });
});

interface Statement {
  Effect: string;
  Action: string[];
  Resource: string[];
  Principal?: { Service: string };
  Condition?: Record<string, Record<string, string>>;
}
type Policy = { Version: string; Statement: Statement[] };
const policies: Record<string, Policy> = Object.fromEntries(
  globSync("*.json", { cwd: join(import.meta.dirname, "iam") }).map((name) => [name, JSON.parse(read(`iam/${name}`))]),
);
const managerPolicies = ["task-role", "execution-role"].map((role): [path: string, policy: Policy] => {
  const path = `ecs-manager/${role}.json`;
  return [path, JSON.parse(read(path))];
});
const actionsOf = (...names: string[]) =>
  names.flatMap((name) => policies[name]?.Statement.flatMap(({ Action }) => Action) ?? []);

describe("IAM policies", () => {
  /** The actions that IAM cannot restrict to a resource, or ListTasks, which the condition on the cluster restricts. */
  const ANY_RESOURCE =
    /^(ecr:GetAuthorizationToken|ec2:Describe\w+|ecs:(ListTasks|\w+TaskDefinitions?)|ssmmessages:\w+)$/;

  const all = Object.entries(policies).map(([name, policy]): [path: string, policy: Policy] => [`iam/${name}`, policy]);
  test.each([...all, ...managerPolicies])(
    "examples/%s names its actions and resources",
    (path, { Version, Statement }) => {
      expect(Version).toBe("2012-10-17");
      expect(Statement.length).toBeGreaterThan(0);
      for (const { Effect, Action, Resource, Principal } of Statement) {
        expect(Effect).toBe("Allow");
        expect(Action.length).toBeGreaterThan(0);
        for (const action of Action) expect(action).toMatch(/^[a-z0-9-]+:[A-Z]\w+$/);
        if (basename(path).startsWith("trust-")) {
          expect(Action).toEqual(["sts:AssumeRole"]);
          expect(Principal?.Service).toMatch(/^[a-z0-9-]+\.amazonaws\.com$/);
          continue;
        }
        expect(Resource.length).toBeGreaterThan(0);
        for (const resource of Resource)
          if (resource === "*") for (const action of Action) expect(action).toMatch(ANY_RESOURCE);
          else expect(resource).toMatch(/^arn:aws:(s3:::|iam::\d{12}:|[a-z0-9-]+:[a-z0-9-]+:\d{12}:)[\w/.*:-]+$/);
      }
    },
  );

  test("examples/iam names the same account, cluster and roles as the other files", () => {
    const { Region, Cluster, TaskDefinition, AllowedTaskDefinitions = [] } = config.Fargate;
    const all = Object.keys(policies).map((name) => read(`iam/${name}`));
    for (const text of [...all, JSON.stringify(taskDefinition)]) {
      for (const [account] of text.matchAll(/\b\d{12}\b/g)) expect(account).toBe(ACCOUNT);
      for (const [region] of text.matchAll(/\b[a-z]{2}-[a-z]+-\d\b/g)) expect(region).toBe(Region);
      for (const [, cluster] of text.matchAll(/:(?:cluster|task)\/([\w-]+)/g)) expect(cluster).toBe(Cluster);
    }
    const [start, , pass] = policies["driver.json"]?.Statement ?? [];
    const families = start?.Resource.map((arn) => /:task-definition\/(.*):\*$/.exec(arn)?.[1]);
    expect(families).toEqual([...new Set([TaskDefinition, ...AllowedTaskDefinitions])]);
    expect(start?.Condition).toEqual({
      ArnEquals: { "ecs:cluster": `arn:aws:ecs:${Region}:${ACCOUNT}:cluster/${Cluster}` },
    });
    expect(pass?.Resource).toEqual([taskDefinition.executionRoleArn, taskDefinition.taskRoleArn]);
    expect(pass?.Condition).toEqual({ StringEquals: { "iam:PassedToService": "ecs-tasks.amazonaws.com" } });
    const [, startImages, passToImages] = policies["job-image.json"]?.Statement ?? [];
    const derived = `arn:aws:ecs:${Region}:${ACCOUNT}:task-definition/${TaskDefinition}-job-*:*`;
    expect(startImages).toMatchObject({ Resource: [derived], Condition: start?.Condition });
    expect(passToImages).toMatchObject({ Resource: pass?.Resource, Condition: pass?.Condition });
    expect(policies["job-image-tags.json"]?.Statement[0]?.Resource).toEqual([derived]);

    const execution = policies["execution-role.json"]?.Statement.flatMap(({ Resource }) => Resource);
    const [, registry, repository] = /^([\d.]+dkr[\w.-]+)\/([\w-]+):/.exec(container.image) ?? [];
    expect(registry).toBe(`${ACCOUNT}.dkr.ecr.${Region}.amazonaws.com`);
    expect(execution).toContain(`arn:aws:ecr:${Region}:${ACCOUNT}:repository/${repository}`);
    const group = container.logConfiguration.options["awslogs-group"];
    expect(execution).toContain(`arn:aws:logs:${Region}:${ACCOUNT}:log-group:${group}:*`);
  });

  /** The calls that some functions make, such as `ecs:RunTask`. Every call gets an empty answer. */
  async function callsOf(functions: readonly (() => Promise<unknown>)[]): Promise<Set<string>> {
    const mocks = {
      ecs: mockClient(ECSClient).onAnyCommand().resolves({ tasks: [], taskArns: [], failures: [] }),
      ec2: mockClient(EC2Client).onAnyCommand().resolves({}),
      iam: mockClient(IAMClient).onAnyCommand().resolves({}),
      sts: mockClient(STSClient).onAnyCommand().resolves({}),
    };
    for (const call of functions) await call().catch(() => {}); // an empty answer is a failure to some
    const nameOf = (command: object) => command.constructor.name.replace(/Command$/, "");
    return new Set(
      Object.entries(mocks).flatMap(([service, mock]) => {
        const names = mock.calls().map(({ args }) => `${service}:${nameOf(args[0])}`);
        mock.restore();
        return names;
      }),
    );
  }
  const methodsOf = (prototype: object) =>
    Object.getOwnPropertyNames(prototype).filter(
      (name) => !["constructor", "settings", "send", "ecsClient", "ec2Client"].includes(name),
    );
  const operator = {
    config,
    log: makeLogger("fatal", () => {}),
    now: () => 0,
    wallTime: Date.now,
    signal: new AbortController().signal,
    env: {},
  };

  test("examples/iam allows exactly the calls that the driver makes", async () => {
    const limits = { until: 0 };
    const aws = new Aws(config.Fargate, operator);
    const identity = { startedBy: "fargate", clientToken: "token" };
    const calls: Record<Exclude<keyof Aws, "throttled">, () => Promise<unknown>> = {
      runTask: () => aws.runTask(runTaskInput(config, identity, {}), limits),
      describeTasks: () => aws.describeTasks(["arn"], limits),
      describeTask: () => aws.describeTask("arn", limits, 1),
      stopTask: () => aws.stopTask("arn", "reason", limits),
      listTasks: () => aws.listTasks(undefined, limits),
      publicAddress: () => aws.publicAddress("eni-1", limits),
      describeTaskDefinition: () => aws.describeTaskDefinition("family", limits),
      registerTaskDefinition: () => aws.registerTaskDefinition({ family: "a", containerDefinitions: [] }, limits),
      listTaskDefinitions: () => aws.listTaskDefinitions(limits),
      deregisterTaskDefinition: () => aws.deregisterTaskDefinition("family:1", limits),
    };
    expect(Object.keys(calls).sort()).toEqual(methodsOf(Aws.prototype).sort());
    expect(new Set(["iam:PassRole", ...(await callsOf(Object.values(calls)))])).toEqual(
      new Set(actionsOf("driver.json", "sweep.json", "public-ip.json", "job-image.json", "job-image-sweep.json")),
    );
    expect(actionsOf("tags.json")).toEqual(["ecs:TagResource"]);
    expect(actionsOf("job-image-tags.json")).toEqual(["ecs:TagResource"]);
  });

  test("examples/iam/doctor.json allows exactly what doctor asks AWS", async () => {
    vi.stubEnv("AWS_ACCESS_KEY_ID", "test");
    vi.stubEnv("AWS_SECRET_ACCESS_KEY", "test");
    const aws = new InspectorAws(operator);
    const permission = { action: "ecs:RunTask", resource: "*", conditions: {}, policy: "driver.json" };
    const kinds = ["Subnets", "SecurityGroups", "RouteTables", "VpcEndpoints", "NetworkInterfaces"] as const;
    const calls: Record<string, () => Promise<unknown>> = {
      identify: () => aws.identify(),
      principalOf: () => aws.principalOf({ account: "1", arn: "arn:aws:sts::1:assumed-role/a/b", source: "" }),
      simulate: () => aws.simulate("arn", permission),
      describeCluster: () => aws.describeCluster(),
      describe: () => Promise.all(kinds.map((kind) => aws.describe(kind, "vpc-id", ["vpc-1"]))),
      stopNoTask: () => aws.stopNoTask(),
    };
    expect(Object.keys(calls).sort()).toEqual(methodsOf(InspectorAws.prototype).sort());
    const made = await callsOf([...Object.values(calls), () => aws.describeTaskDefinition("family", { until: 0 })]);
    // Everybody may call the first; the second is a permission of the driver, which doctor tries out.
    const others = ["sts:GetCallerIdentity", "ecs:StopTask"];
    expect(made).toEqual(new Set([...others, ...actionsOf("doctor.json")]));
    vi.unstubAllEnvs();
  });
});

describe("whole job", () => {
  let world: World | undefined;
  afterEach(async () => {
    vi.unstubAllEnvs();
    await world?.close();
  });

  /** The stand-in for ECS with the cluster and task definition of the examples, and a context for the stages. */
  async function makeContext(...allowed: string[]): Promise<{ context: Context; world: World }> {
    world = await makeWorld({
      embedded: true,
      account: ACCOUNT,
      region: config.Fargate.Region,
      clusters: [{ name: config.Fargate.Cluster }],
      taskDefinitions: [taskDefinition as never],
    });
    world.aws.permissions = new Set(actionsOf(...allowed));
    for (const [name, value] of Object.entries(world.aws.environment)) vi.stubEnv(name, value);
    const hash = "0123456789abcdef".repeat(4);
    const context: Context = {
      config: {
        ...config,
        TaskMetadata: { Directory: world.records },
        SSH: { ...config.SSH, Port: world.sshPort },
      },
      job: { stem: `job-1-${hash}`, hash, title: "job 1 of project 2", timeout: 3600 },
      jobOverrides: [],
      log: makeLogger("fatal", () => {}),
      env: {},
      signal: new AbortController().signal,
      now: () => Math.floor(performance.now()),
      wallTime: Date.now,
    };
    return { context, world };
  }

  test("a job succeeds with the permissions of examples/iam/driver.json alone", async () => {
    const { context, world } = await makeContext("driver.json");
    await prepare(context);
    const [task] = world.aws.running();
    expect(task?.taskDefinitionArn).toContain(`:task-definition/${taskDefinition.family}:1`);
    const script = join(world.directory, "script");
    const stdout = new PassThrough();
    const stderr = new PassThrough();
    writeFileSync(script, "#!/usr/bin/env bash\necho 'It works!'\nexit 0\n");
    expect(await run({ ...context, stdout, stderr }, script, "build_script")).toBe(0);
    expect(String(stdout.read())).toBe("It works!\n");
    await cleanup(context);
    expect(world.aws.running()).toEqual([]);
    expect(world.aws.calls.flatMap(({ error }) => error ?? [])).toEqual([]);
  });

  test("sweep needs only examples/iam/sweep.json besides driver.json", async () => {
    const options = { dryRun: false, json: false };
    const { context, world } = await makeContext("driver.json");
    await expect(sweep(context, options)).rejects.toThrow(/AccessDeniedException.*ecs:ListTasks/);
    world.aws.permissions = new Set(actionsOf("driver.json", "sweep.json"));
    expect(await sweep(context, options)).toMatchObject({ stopped: [], problems: [] });
  });

  const JobImage = { ...config.JobImage, AllowedImages: ["**"], AllowedServices: ["**"] };
  /** A job with an image, on a host with these policies. */
  async function makeImageContext(tags: Record<string, string>, ...allowed: string[]) {
    const { context, world } = await makeContext(...allowed);
    const responseFile = join(world.directory, "response.json");
    writeFileSync(responseFile, JSON.stringify(gitlabJob({ image: "node:22", services: ["redis:7"] }).response));
    mkdirSync(world.records, { mode: 0o700 });
    const withImages: Context = {
      ...context,
      config: { ...context.config, JobImage, Fargate: { ...context.config.Fargate, Tags: tags } },
      job: { ...context.job, imageNames: ["node:22", "redis:7"] },
      env: { JOB_RESPONSE_FILE: responseFile },
    };
    const define = () => {
      const aws = new Aws(withImages.config.Fargate, withImages);
      return prepareImages(withImages, aws, Date.now() + 60_000);
    };
    return { context: withImages, define, world };
  }

  test("prepareImages needs exactly the permissions of examples/iam/job-image.json", async () => {
    const { define, world } = await makeImageContext({}, "job-image.json");
    for (const missing of ["ecs:DescribeTaskDefinition", "ecs:RegisterTaskDefinition", "iam:PassRole"]) {
      world.aws.permissions = new Set(actionsOf("job-image.json").filter((action) => action !== missing));
      await expect(define()).rejects.toThrow(new RegExp(`AccessDeniedException: .* perform: ${missing} on resource`));
    }
    world.aws.permissions = new Set(actionsOf("job-image.json"));
    const { config: derived } = await define();
    // What the policy lets the driver start.
    const [pattern = ""] = policies["job-image.json"]?.Statement[1]?.Resource ?? [];
    expect(derived.Fargate.TaskDefinition).toMatch(new RegExp(`^${pattern.replaceAll("*", ".*")}$`));
    const input = runTaskInput(derived, { startedBy: "image", clientToken: "image" }, undefined);
    const ecs = new ECS({ region: config.Fargate.Region, endpoint: world.aws.url });
    expect((await ecs.runTask(input)).tasks).toHaveLength(1);
  });

  test("prepareImages needs examples/iam/job-image-tags.json only with Tags", async () => {
    const { define, world } = await makeImageContext({ team: "ci" }, "job-image.json");
    await expect(define()).rejects.toThrow(/AccessDeniedException: .* perform: ecs:TagResource on resource/);
    world.aws.permissions = new Set(actionsOf("job-image.json", "job-image-tags.json"));
    await define();
    expect(world.aws.taskDefinitions().at(-1)?.tags).toEqual([{ key: "team", value: "ci" }]);
  });

  test("sweep needs only examples/iam/job-image-sweep.json to deregister definitions", async () => {
    const allowed = ["driver.json", "sweep.json", "job-image.json"];
    const { context, define, world } = await makeImageContext({}, ...allowed);
    await define();
    const definition = world.aws.taskDefinitions().at(-1);
    if (definition) definition.registeredAt -= 8 * 86_400;
    const options = { dryRun: false, json: false };
    const [problem] = (await sweep(context, options)).problems;
    expect(problem).toMatch(/AccessDeniedException.*ecs:ListTaskDefinitions/);
    world.aws.permissions = new Set(actionsOf(...allowed, "job-image-sweep.json"));
    expect(await sweep(context, options)).toMatchObject({
      deregistered: [definition?.taskDefinitionArn],
      problems: [],
    });
  });

  test("examples/task-definition.json has a size that Fargate offers", async () => {
    const { context, world } = await makeContext("driver.json");
    const input = runTaskInput(context.config, { startedBy: "size", clientToken: "size" }, undefined);
    const { cpu, memory } = taskDefinition;
    const ecs = new ECS({ region: config.Fargate.Region, endpoint: world.aws.url });
    const { tasks } = await ecs.runTask({ ...input, overrides: { cpu, memory } });
    expect(tasks).toMatchObject([{ cpu, memory }]);
  });
});

/** Runs `fargate runners` from source. It changes only files beside the configuration file of `env`. */
const runners = (args: readonly string[], env: Record<string, string>): Promise<Finished> =>
  start([process.execPath, "--no-env-file", "--config=/dev/null", join(projectRoot, "fargate.ts"), ...args], { env })
    .finished;

describe("ECS manager", () => {
  let scratch = "";
  let gitlab: GitLabStandIn;
  beforeEach(async () => {
    scratch = mkdtempSync(join(tmpdir(), "fargate-example-"));
    gitlab = await GitLabStandIn.start();
  });
  afterEach(async () => {
    await gitlab.close();
    rmSync(scratch, { recursive: true });
  });
  const configFile = () => join(scratch, "config.toml");
  const written = (name: string) => readFileSync(join(scratch, name), "utf8");

  test("examples/ecs-manager/task-definition.json has only what ECS knows", async () => {
    const registered = await requestOf((ecs) => ecs.registerTaskDefinition(managerDefinition as never));
    expect(registered).toEqual(managerDefinition);
    expect(manager.linuxParameters.initProcessEnabled).toBe(true);
    expect(Object.values(LogDriver)).toContain(manager.logConfiguration.logDriver);
  });

  test("examples/ecs-manager/service.json has only what CreateService knows", async () => {
    expect(await requestOf((ecs) => ecs.createService(service as never))).toEqual(service);
    expect(service.taskDefinition).toBe(managerDefinition.family);
    const { subnets } = service.networkConfiguration.awsvpcConfiguration;
    expect(subnets).toEqual(config.Fargate.Subnets);
  });

  test("examples/ecs-manager/task-definition.json contains managers_configs.json", () => {
    expect(JSON.parse(variables.MANAGERS_CONFIGS ?? "")).toEqual(managersConfigs);
  });

  /** Seconds that a manager takes to end, at most. */
  const secondsToEnd = ({ STOP_TIMEOUT, SHUTDOWN_TIMEOUT }: Record<string, string>) => {
    const source = readFileSync(join(projectRoot, "fargate.ts"), "utf8");
    const seconds = (name: string) =>
      Number(new RegExp(`^const ${name} = ([\\d_]+);`, "m").exec(source)?.[1]?.replace("_", "")) / 1000;
    return Number(STOP_TIMEOUT) + Number(SHUTDOWN_TIMEOUT) + seconds("RUNNER_EXIT_MS") + seconds("LEAVE_MS");
  };

  // ECS sends SIGKILL after stopTimeout, which is at most 120 s on Fargate.
  test("examples/ecs-manager/task-definition.json leaves time for every step of the end", () => {
    expect(manager.stopTimeout).toBeLessThanOrEqual(120);
    expect(secondsToEnd(variables)).toBeLessThan(manager.stopTimeout);
  });

  // .ci/infrastructure tests everything else in it.
  test("examples/cloudformation/fargate-runner.yaml leaves time for the steps of the end", () => {
    interface Container {
      StopTimeout: number;
      Environment: { Name: string; Value: string }[];
    }
    const template = Bun.YAML.parse(read("cloudformation/fargate-runner.yaml")) as {
      Resources: { ManagerTaskDefinition: { Properties: { ContainerDefinitions: [Container] } } };
    };
    const [container] = template.Resources.ManagerTaskDefinition.Properties.ContainerDefinitions;
    const set = Object.fromEntries(container.Environment.map(({ Name, Value }) => [Name, Value]));
    expect(container.StopTimeout).toBeLessThanOrEqual(120);
    expect(secondsToEnd(set)).toBeLessThan(container.StopTimeout);
    expect(Number(set.SWEEP_INTERVAL)).toBeGreaterThan(0);
  });

  test("examples/ecs-manager/managers_configs.json is accepted without a warning", async () => {
    const names = Object.keys(managersConfigs);
    const tokens = manager.secrets.map(({ name }) => [name, gitlab.createRunner()]);
    expect(tokens.map(([name]) => name)).toEqual(names.map((name) => `GITLAB_RUNNER_TOKEN_${name.toUpperCase()}`));
    const env = { ...variables, ...Object.fromEntries(tokens), GITLAB_URL: gitlab.url, CONFIG_FILE: configFile() };
    const { code, stderr } = await runners(["runners"], env);
    expect({ code, warnings: stderr.match(/^.*(warning|error): .*$/gm) }).toEqual({ code: 0, warnings: null });
    const parsed = parseRunnerConfig(written("config.toml"));
    expect(parsed).toMatchObject({ concurrent: 10, shutdown_timeout: Number(variables.SHUTDOWN_TIMEOUT) });
    expect(parsed.runners.map(({ token, limit }) => ({ token, limit }))).toEqual(
      Object.values(managersConfigs).map(({ limit }, index) => ({ token: tokens[index]?.[1], limit })),
    );
    for (const [index, name] of names.entries()) {
      const file = `fargate-${name}.toml`;
      expect(parsed.runners[index]?.custom?.run_args).toEqual(["--config", join(scratch, file), "custom", "run"]);
      const made = readConfig(written(file), file, {}, {});
      expect(made.warnings).toEqual([]);
      expect(made.config.Fargate).toMatchObject({ AllowedTaskDefinitions: [], LaunchType: "FARGATE" });
      expect(made.config.SSH.CancelGracePeriod + 10).toBeLessThanOrEqual(Number(variables.SHUTDOWN_TIMEOUT));
    }
  });

  test("examples/ecs-manager names the same account and clusters as the other files", () => {
    const { Region, Cluster, SecurityGroups } = config.Fargate;
    const cluster = (name: string) => `arn:aws:ecs:${Region}:${ACCOUNT}:cluster/${name}`;
    for (const settings of Object.values(managersConfigs)) {
      expect(settings.worker_ecs_cluster_arn).toBe(cluster(Cluster));
      expect(settings.worker_aws_region).toBe(Region);
      expect(config.Fargate.Subnets).toContain(settings.worker_subnet_id);
      expect([settings.worker_security_group_id]).toEqual(SecurityGroups);
      // driver.json permits it.
      const definition = settings.worker_task_definition_arn;
      const allowed = policies["driver.json"]?.Statement[0]?.Resource ?? [];
      expect(allowed.some((arn) => new RegExp(`^${arn.replaceAll("*", ".*")}$`).test(`${definition}:1`))).toBe(true);
    }
    const [[, task], [, execution]] = managerPolicies as [[string, Policy], [string, Policy]];
    expect(task.Statement.flatMap(({ Resource }) => Resource)).toEqual([
      `${cluster(service.cluster).replace(":cluster/", ":task/")}/*`,
    ]);
    const resources = execution.Statement.flatMap(({ Resource }) => Resource);
    for (const { valueFrom } of manager.secrets) expect(resources).toContain(valueFrom);
    const [, registry, repository] = /^([\d.]+dkr[\w.-]+)\/([\w-]+):/.exec(manager.image) ?? [];
    expect(registry).toBe(`${ACCOUNT}.dkr.ecr.${Region}.amazonaws.com`);
    expect(resources).toContain(`arn:aws:ecr:${Region}:${ACCOUNT}:repository/${repository}`);
    const group = manager.logConfiguration.options["awslogs-group"];
    expect(resources).toContain(`arn:aws:logs:${Region}:${ACCOUNT}:log-group:${group}:*`);
    expect(manager.logConfiguration.options["awslogs-region"]).toBe(Region);
  });

  test("examples/tokens.txt gives each token a section of its own", async () => {
    const list = join(scratch, "tokens.txt");
    const created: string[] = [];
    const replace = () => {
      created.push(gitlab.createRunner());
      return created.at(-1) ?? "";
    };
    writeFileSync(list, read("tokens.txt").replace(/glrt-__REDACTED-\d__/g, replace));
    const args = ["--config", join(import.meta.dirname, "fargate.toml"), "runners", "--tokens", list];
    const env = { GITLAB_URL: gitlab.url, CONFIG_FILE: configFile() };
    const { code, stderr } = await runners(args, env);
    expect({ code, warnings: stderr.match(/^.*(warning|error): .*$/gm) }).toEqual({ code: 0, warnings: null });
    const sections = parseRunnerConfig(written("config.toml")).runners;
    expect(sections.map(({ token }) => token)).toEqual(created);
    expect(sections.map(({ name }) => name)).toEqual([expect.stringMatching(/^fargate-\d+$/), "team-a", "team-b"]);
    const before = written("config.toml");
    expect((await runners(args, env)).code).toBe(0);
    expect(written("config.toml")).toBe(before);
  });
});

/** The sections of a systemd unit. A key that occurs twice is an error, because these files need none. */
function parseUnit(name: string): Record<string, Record<string, string>> {
  const sections: Record<string, Record<string, string>> = {};
  let section: Record<string, string> | undefined;
  for (const line of read(name).split("\n")) {
    if (line === "" || line.startsWith("#")) continue;
    const [, heading] = /^\[(\w+)\]$/.exec(line) ?? [];
    const [, key, value] = /^(\w+)=(.+)$/.exec(line) ?? [];
    if (heading) section = sections[heading] = {};
    else if (section && key && value && !(key in section)) section[key] = value;
    else throw new Error(`${name}: cannot parse ${line}`);
  }
  return sections;
}

describe("services", () => {
  const expectSweep = ([program, ...args]: string[]) => {
    expect(program).toBe(DRIVER);
    const parsed = parseCommandLine(args, commander);
    expect(parsed).toMatchObject({ command: "sweep", config: CONFIG_FILE });
    expect(parsed?.flags).toBeUndefined();
  };

  test("examples/systemd/fargate-sweep.service runs fargate sweep once", () => {
    const { Service } = parseUnit("systemd/fargate-sweep.service");
    expect(Service?.Type).toBe("oneshot");
    expectSweep(Service?.ExecStart?.split(" ") ?? []);
  });

  test("examples/systemd/fargate-sweep.timer starts its service every 10 minutes", () => {
    const { Timer, Install } = parseUnit("systemd/fargate-sweep.timer");
    expect(Timer).toEqual({ OnBootSec: "2min", OnUnitActiveSec: "10min" });
    expect(Install).toEqual({ WantedBy: "timers.target" });
  });

  // It mails only problems.
  test("examples/cron.d/fargate-sweep runs fargate sweep every 10 minutes", () => {
    const entries = read("cron.d/fargate-sweep")
      .split("\n")
      .filter((line) => line !== "" && !line.startsWith("#"));
    const [, schedule, user, command] = /^((?:\S+ ){5})(\w+) (.*) >\/dev\/null$/.exec(entries.join("\n")) ?? [];
    expect(schedule).toBe("*/10 * * * * ");
    expect(user).toBe("root");
    expectSweep(command?.split(" ") ?? []);
  });

  // At least for the default job timeout.
  test("examples/systemd/gitlab-runner.service.d/graceful-stop.conf waits for jobs", () => {
    const { Service } = parseUnit("systemd/gitlab-runner.service.d/graceful-stop.conf");
    expect(Service?.KillSignal).toBe("SIGQUIT");
    expect(Number(Service?.TimeoutStopSec)).toBeGreaterThan(7_200);
  });
});

describe("documents", () => {
  const files = globSync("**/*", { cwd: import.meta.dirname, withFileTypes: true })
    .filter((entry) => entry.isFile())
    .map((entry) => join(entry.parentPath, entry.name).slice(import.meta.dirname.length + 1));

  test("examples/README.md lists every file once", () => {
    const listed = [...read("README.md").matchAll(/^\| \[`(.+?)`\]\((.+?)\) \|/gm)].map(([, name, target]) => {
      expect(target).toBe(name);
      return name;
    });
    expect(listed.sort()).toEqual(files.filter((name) => !/^(README\.md|examples\.test\.ts)$/.test(name)).sort());
  });

  test("examples/README.md lists only values that the files have", () => {
    const [, table = ""] = /^\| value in the examples .*\n.*\n((?:\|.*\n)+)/m.exec(read("README.md")) ?? [];
    const values = [...table.matchAll(/^\| (.*?) \|/gm)].flatMap(([, cell]) => cell?.match(/[^`, ]+/g) ?? []);
    expect(values.length).toBeGreaterThan(8);
    const all = files
      .filter((name) => !/\.(md|ts)$/.test(name))
      .map(read)
      .join("\n");
    for (const value of values) expect(all).toContain(value);
  });

  test("examples/security-groups.md opens only the configured port to the tasks", () => {
    const [, tasks = ""] = read("security-groups.md").split("\n## Tasks\n");
    expect([...tasks.matchAll(/^\| inbound \| TCP \| (\d+) \|/gm)].map(([, port]) => Number(port))).toEqual([
      config.SSH.Port,
    ]);
  });
});
