/**
 * Tests of the Dockerfile: builds its targets with Docker, and runs the manager image. No image registry is needed:
 * Node.js comes from Debian's packages, and gitlab-runner is the program that stands in for it.
 *
 * The first build takes a minute or two. Later ones, also of another target, take its layers from Docker's cache.
 */
import { spawnSync } from "node:child_process";
import * as fs from "node:fs";
import { delimiter, join } from "node:path";
import { afterAll, afterEach, describe, expect, test } from "vitest";
import { GitLabStandIn, type QueuedJob } from "../fixtures/gitlab.ts";
import { compileGitLabRunner } from "../fixtures/gitlab-runner.ts";
import { driver, type Finished, fargate, type Started, start } from "../fixtures/process.ts";
import { parseRunnerConfig } from "../fixtures/runner-config.ts";
import { wholeRun } from "../fixtures/secrets.ts";
import { NEWER_BASE_IMAGE, OWNER_LABEL } from "../fixtures/tasks.ts";
import { directory, hosts, nextNumber, setUp } from "../fixtures/test-support.ts";
import { makeWorld, projectRoot, quick, type World } from "../fixtures/world.ts";

setUp({ hosts: true });

const closing: (() => unknown)[] = [];
afterEach(async () => {
  for (const close of closing.splice(0).reverse()) await close();
});

/** Calls a function at the first call only. */
const once = <T>(make: () => T): (() => T) => {
  let made: { value: T } | undefined;
  return () => {
    made ??= { value: make() };
    return made.value;
  };
};

// Under `bun --bun`, PATH begins with a directory in which `node` is bun.
const path = (process.env.PATH ?? "").split(delimiter).filter((entry) => !entry.includes("bun-node"));
const env = { ...process.env, PATH: path.join(delimiter), DOCKER_BUILDKIT: "1" };

/** Runs a program until it ends, with this process's environment. */
const run = (command: readonly string[], more: Record<string, string> = {}): Promise<Finished> =>
  start(command, { env: { ...env, ...more }, cwd: projectRoot }).finished;

/** Runs a program. @returns its standard output. @throws Error with its last lines if it fails */
async function output(...command: string[]): Promise<string> {
  const { code, stdout, stderr } = await run(command);
  if (code === 0) return stdout.toString();
  throw new Error(`${command.slice(0, 2).join(" ")}: ${stderr.trimEnd().split("\n").slice(-20).join("\n")}`);
}

/** A docker client in PATH that has BuildKit: before version 23 every client, later one with the plug-in buildx. */
const findDocker = once(async (): Promise<string> => {
  const context = directory();
  fs.writeFileSync(join(context, "Dockerfile"), "FROM scratch\nCOPY Dockerfile /\n");
  for (const file of path.map((entry) => join(entry, "docker")).filter((name) => fs.existsSync(name))) {
    const { code } = await run([file, "build", "--output", join(context, "output"), context]);
    if (code === 0) return file;
  }
  return "";
});
/** That client, during a test. */
let docker = "";

/** Adds a test that builds images. It is skipped without Docker; but CI must have it. */
function imageTest(name: string, body: () => Promise<void>): void {
  test.skipIf(quick)(
    name,
    async ({ task, skip }) => {
      if (hosts.kind !== "container") skip("it needs a container");
      docker = await findDocker();
      const reason = "no docker client in PATH has BuildKit: install docker-buildx";
      if (docker === "" && process.env.CI === "true") throw new Error(reason);
      if (docker === "") skip(reason);
      task.meta.hosts = "container";
      await body();
    },
    900_000,
  );
}

/** Options of `docker build` that give it this machine's access to the npm registry. */
const registryOptions = once((): string[] => {
  const keys = ["registry", "cafile", "userconfig", "globalconfig"];
  const { stdout } = spawnSync("npm", ["config", "get", ...keys], { cwd: projectRoot, env, encoding: "utf8" });
  const config = new Map(stdout.split("\n").map((line) => [line.split("=")[0], line.slice(line.indexOf("=") + 1)]));
  const read = (file = "") => (fs.existsSync(file) ? fs.readFileSync(file, "utf8") : "");
  const lines = [config.get("globalconfig"), config.get("userconfig")].flatMap((file) => read(file).split("\n"));
  // The path of a file of this machine. Its content is the other secret.
  const npmrc = [...lines.filter((line) => !/^\s*cafile\b/.test(line)), `registry=${config.get("registry")}`, ""];
  const secrets = { npmrc: npmrc.join("\n"), ca: read(config.get("cafile")) + read(process.env.NODE_EXTRA_CA_CERTS) };
  const made = directory();
  return Object.entries(secrets).flatMap(([id, content]) => {
    if (content === "") return [];
    const file = join(made, id);
    fs.writeFileSync(file, content, { mode: 0o600 });
    return ["--secret", `id=${id},src=${file}`];
  });
});

/** The commit of the compiled driver, for the same bytes. */
const revision = once(async () => /\((.*)\)/.exec((await fargate(["--version"])).stdout.toString())?.[1] ?? "");

/** Builds a target of the Dockerfile. The host's network has the registries even if they listen on loopback. */
async function build(target: string, options: readonly string[], context = "."): Promise<Finished> {
  const proxies = ["HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY"].filter((name) => process.env[name]);
  const args = [`NODE_IMAGE=${NEWER_BASE_IMAGE}`, `SOURCE_REVISION=${await revision()}`, ...proxies];
  const common = ["--network=host", "--progress=plain", ...registryOptions()];
  const buildArgs = args.flatMap((arg) => ["--build-arg", arg]);
  return run([docker, "build", ...common, ...buildArgs, ...options, "--target", target, context]);
}

const images: string[] = [];
afterAll(async () => {
  if (images.length > 0) await run([docker, "rmi", "--force", ...images]);
});

/** Builds the manager. @returns the image's id. @throws Error with the last lines of a build that failed */
async function buildManager(options: readonly string[], context?: string): Promise<string> {
  const file = join(directory(), "id");
  const { code, stderr } = await build("manager", [...options, "--iidfile", file], context);
  if (code !== 0) throw new Error(`docker build: ${stderr.trimEnd().split("\n").slice(-40).join("\n")}`);
  const id = fs.readFileSync(file, "utf8");
  images.push(id);
  return id;
}

/** An image with /usr/bin/gitlab-runner, like gitlab/gitlab-runner. */
const runnerImage = once(async (): Promise<string> => {
  const context = directory();
  wholeRun.ownFile(await compileGitLabRunner(context));
  fs.writeFileSync(join(context, "Dockerfile"), "FROM scratch\nCOPY gitlab-runner /usr/bin/gitlab-runner\n");
  const tag = `fargate-driver-test-runner:${process.pid}`;
  await output(docker, "build", "--quiet", "--tag", tag, context);
  images.push(tag);
  return tag;
});

const managerImage = once(async () => buildManager(["--build-arg", `RUNNER_IMAGE=${await runnerImage()}`]));

describe("building", () => {
  test("docker build in the documents has targets and arguments that exist", () => {
    const read = (name: string) => fs.readFileSync(join(projectRoot, name), "utf8");
    const dockerfile = read("Dockerfile");
    const all = (pattern: RegExp, text: string) => [...text.matchAll(pattern)].map(([, name]) => name);
    const texts = [dockerfile, ...fs.globSync(["*.md", "docs/*.md"], { cwd: projectRoot }).map(read)];
    const commands = texts.flatMap((text) => all(/(docker build (?:[^`\n]|\\\n)*--target(?:[^`\n]|\\\n)*)/g, text));
    expect(commands.length).toBeGreaterThan(4);
    for (const command of commands) {
      expect(["binary", "manager"]).toEqual(expect.arrayContaining(all(/--target (\S+)/g, command ?? "")));
      expect(all(/^ARG (\w+)/gm, dockerfile)).toEqual(expect.arrayContaining(all(/--build-arg (\w+)/g, command ?? "")));
    }
    const rows = /\| build argument \|.*\n.*\n((?:\|.*\n)+)/.exec(read("docs/manager.md"))?.[1] ?? "";
    const defaults = Object.fromEntries(
      [...dockerfile.matchAll(/^ARG (\w+)=(.*)$/gm)].map(([, name, value]) => [name, value === '""' ? "empty" : value]),
    );
    const table = [...rows.matchAll(/^\| `(\w+)` \| `?([^`|]*?)`? \|/gm)].map(([, name, value]) => [name, value]);
    expect(Object.fromEntries(table)).toEqual(defaults);
  });

  imageTest("docker build --target binary gives the same bytes as npm run build", async () => {
    const made = join(directory(), "dist");
    wholeRun.ownFile(join(made, "fargate"));
    const { code, stderr } = await build("binary", ["--output", made]);
    expect(code, stderr).toBe(0);
    expect(fs.readdirSync(made).sort()).toEqual(["THIRD-PARTY-LICENSES", "fargate"]);
    // Not with toEqual, which would print the files if they differ.
    const same = (name: string) =>
      fs.readFileSync(join(made, name)).equals(fs.readFileSync(join(projectRoot, "dist", name)));
    expect(same("fargate")).toBe(true);
    expect(same("THIRD-PARTY-LICENSES")).toBe(true);
    const version = await output(join(made, "fargate"), "--version");
    expect(version).toBe((await fargate(["--version"])).stdout.toString());
    expect(fs.statSync(join(made, "fargate")).mode & 0o777).toBe(0o755);
  });

  imageTest("docker build --target manager fails if there is no gitlab-runner", async () => {
    const { code, stderr } = await build("manager", ["--build-arg", `RUNNER_IMAGE=${NEWER_BASE_IMAGE}`]);
    expect(code).toBe(1);
    const reason = "RUNNER_IMAGE has no /usr/bin/gitlab-runner, and a manager is of no use without it";
    expect(stderr).toMatch(new RegExp(`^#\\d+ [\\d.]+ ${reason}$`, "m"));
    const absent = await build("manager", ["--build-arg", "RUNNER_FILE=gitlab-runner-absent"]);
    expect(absent.code).toBe(1);
    expect(absent.stderr.trimEnd().split("\n").at(-1)).toMatch(/"\/gitlab-runner-absent"(: |.* )not found/);
  });

  imageTest("docker build --target manager takes gitlab-runner from a file", async () => {
    const context = directory();
    for (const name of [".ci", "Dockerfile", ".dockerignore", ".npmrc", "LICENSE", "fargate.ts", "tsconfig.json"])
      fs.cpSync(join(projectRoot, name), join(context, name), { recursive: true });
    for (const name of ["package.json", "package-lock.json"]) fs.cpSync(join(projectRoot, name), join(context, name));
    wholeRun.ownFile(join(context, "fargate.ts")); // it encodes keys, and so contains what every key contains
    fs.writeFileSync(join(context, "gitlab-runner-linux-amd64"), "#!/bin/sh\necho from a file\n", { mode: 0o644 });
    const image = await buildManager(["--build-arg", "RUNNER_FILE=gitlab-runner-linux-amd64"], context);
    expect(await output(docker, "run", "--rm", "--entrypoint=gitlab-runner", image)).toBe("from a file\n");
  });
});

/** Runs a shell command in a new container of the manager image, without its entry point. */
const inImage = async (...command: string[]) =>
  output(docker, "run", "--rm", "--entrypoint=/bin/sh", await managerImage(), "-c", ...command);

describe("the manager image", () => {
  imageTest("the manager image has a user without privileges and its directories", async () => {
    expect(await inImage('id; echo "$HOME $PWD $CONFIG_FILE"')).toBe(
      "uid=999(gitlab-runner) gid=999(gitlab-runner) groups=999(gitlab-runner)\n" +
        "/home/gitlab-runner /home/gitlab-runner /etc/gitlab-runner/config.toml\n",
    );
    const stat = 'cd /; stat -c "%a %U:%G %n" "$@"';
    const paths = ["etc/gitlab-runner", ...["", "/metadata", "/fargate"].map((name) => `opt/gitlab-runner${name}`)];
    expect(await inImage(stat, "sh", ...paths, "usr/bin/gitlab-runner", "tmp")).toBe(
      [
        "700 gitlab-runner:gitlab-runner etc/gitlab-runner",
        "755 root:root opt/gitlab-runner",
        "700 gitlab-runner:gitlab-runner opt/gitlab-runner/metadata",
        "755 root:root opt/gitlab-runner/fargate",
        "755 root:root usr/bin/gitlab-runner",
        "1777 root:root tmp",
        "",
      ].join("\n"),
    );
    expect(await inImage("cat /opt/gitlab-runner/THIRD-PARTY-LICENSES")).toBe(
      fs.readFileSync(join(projectRoot, "dist", "THIRD-PARTY-LICENSES"), "utf8"),
    );
    expect(await inImage("sha256sum </opt/gitlab-runner/fargate")).toBe(
      await output("sh", "-c", `sha256sum <'${driver}'`),
    );
  });

  imageTest("the manager image contains no token, host key or package configuration", async () => {
    const names = ["ssh_host_*", "*.pem.key", "id_*", ".npmrc", "config.toml", ".runner_system_id", ".manager-id"];
    const find = `find / -xdev -type f \\( ${names.map((name) => `-name '${name}'`).join(" -o ")} \\)`;
    const found = await inImage(`${find}; ls -A /etc/gitlab-runner /opt/gitlab-runner/metadata /tmp`);
    expect(found).toBe("/etc/gitlab-runner:\n\n/opt/gitlab-runner/metadata:\n\n/tmp:\n");
    // The build's secrets are not in the layers: the files that it mounted them on are empty or absent.
    expect(await inImage("cat /run/secrets/* /root/.npmrc 2>/dev/null; true")).toBe("");
    const history = await output(docker, "history", "--no-trunc", await managerImage());
    wholeRun.look("the history of the manager image", history);
    expect(history).not.toContain("registry=");
  });
});

/** The variables that describe a worker of the stand-in for AWS. */
const worker = {
  CLUSTER: "arn:aws:ecs:us-east-2:123456789012:cluster/test-cluster",
  REGION: "us-east-2",
  SUBNET: "subnet-0a1b2c3d",
  SECURITY_GROUP: "sg-0a1b2c3d",
  TASK_DEFINITION: "arn:aws:ecs:us-east-2:123456789012:task-definition/test-task:1",
};

/** MANAGERS_CONFIGS as the Terraform module writes it, which adds three fields to those of its own input. */
const terraformManager = (name: string, tags: readonly string[]) => ({
  limit: 10,
  manager_name: name,
  tag_list: tags.join(","),
  tags,
  worker_aws_region: worker.REGION,
  worker_cpu: 256,
  worker_docker_image: "123456789012.dkr.ecr.us-east-2.amazonaws.com/worker",
  worker_ecs_cluster_arn: worker.CLUSTER,
  worker_memory: 512,
  worker_security_group_id: worker.SECURITY_GROUP,
  worker_ssh_user: "root",
  worker_subnet_id: worker.SUBNET,
  worker_task_definition_arn: worker.TASK_DEFINITION,
  worker_task_role_arn: "arn:aws:iam::123456789012:role/worker",
});

const REGISTRATION_TOKEN = ["GR1348941", "imagesTestToken12345"].join("");

interface ManagerContainer {
  readonly gitlab: GitLabStandIn;
  readonly world: World;
  readonly container: Started;
  /** Runs a shell command in the container. */
  exec(command: string): Promise<string>;
  /** Waits until the predicate holds for GitLab; rejects if the container ends before. */
  reaches(predicate: () => unknown): Promise<void>;
  /** Ends it as ECS does: TERM, and KILL after 30 s. */
  stop(): Promise<Finished>;
}

/** Starts a container of the manager image. @param variables those that its users set */
async function startManager({
  variables,
  args = [],
  options = [],
}: {
  variables: object;
  args?: string[];
  options?: string[];
}): Promise<ManagerContainer> {
  const image = await managerImage();
  const gitlab = await GitLabStandIn.start({ registrationTokens: [REGISTRATION_TOKEN] });
  closing.push(() => gitlab.close());
  const world = await makeWorld({ hosts });
  closing.push(() => world.close());
  const environment = {
    GITLAB_URL: gitlab.url,
    GITLAB_REGISTRATION_TOKEN: REGISTRATION_TOKEN,
    ...variables,
    // The stand-in's tasks listen on another port than 22. The endpoint and credentials come from the task role on ECS.
    DRIVER_SETTINGS: JSON.stringify({ SSH: { Port: world.sshPort } }),
    ...world.aws.environment,
  };
  const name = `fargate-driver-manager-${process.pid}-${nextNumber()}`;
  const command = [
    ...[docker, "run", "--rm", "--name", name, "--label", OWNER_LABEL, "--network=host"],
    ...["--read-only", "--cap-drop=ALL", "--security-opt=no-new-privileges"],
    // Without values: these would be in the list of processes.
    ...Object.keys(environment).flatMap((key) => ["--env", key]),
    ...[...options, image, ...args],
  ];
  const container = start(command, { env: { ...env, ...environment } });
  closing.push(() => run([docker, "rm", "--force", "--volumes", name]));
  const ended = container.finished.then(({ stderr }) => Promise.reject(new Error(`the container ended: ${stderr}`)));
  ended.catch(() => {});
  return {
    gitlab,
    world,
    container,
    exec: (line) => output(docker, "exec", name, "sh", "-c", line),
    reaches: (predicate) => Promise.race([gitlab.waitFor(predicate, 120_000), ended]),
    async stop() {
      await output(docker, "stop", "--time=30", name);
      return container.finished;
    },
  };
}

/** Searches the output of a container for tokens. */
const searchOutput = ({ stdout, stderr }: Finished, gitlab: GitLabStandIn, tokens: readonly string[]) => {
  wholeRun.look("the output of a manager", stdout.toString() + stderr);
  expect(gitlab.requestsTo("register").length).toBe(tokens.length);
  for (const token of [REGISTRATION_TOKEN, ...tokens]) expect(stdout.toString() + stderr).not.toContain(token);
};

const job = { script: ["echo from the task"], variables: {}, cache: false, artifacts: false, afterScript: [] };

describe("the manager image's entry point", () => {
  imageTest("the manager image runs a job with the variables of the Terraform module", async () => {
    const managers = {
      dev_tool1: terraformManager("dev_tool1", ["dev", "tool1"]),
      dev_tool2_tool3: terraformManager("dev_tool2_tool3", ["dev", "tool2", "tool3"]),
    };
    const manager = await startManager({
      variables: {
        RUNNER_CONCURRENCY: "10",
        RUNNER_NAME_PREFIX: "sample",
        MANAGERS_CONFIGS: JSON.stringify(managers),
      },
      // The command of that image.
      args: ["run", "--user=gitlab-runner", "--working-directory=/home/gitlab-runner"],
    });
    const { gitlab, world, exec, reaches } = manager;
    await reaches(() => gitlab.requestsTo("requestJob").length > 1);
    const { runners } = gitlab;
    const tokens = runners.map(({ token }) => token);
    expect(runners).toMatchObject([
      { description: expect.stringMatching(/^sample_dev_tool1_[0-9a-f]{12}$/), tags: ["dev", "tool1"] },
      { description: expect.stringMatching(/^sample_dev_tool2_tool3_/), tags: ["dev", "tool2", "tool3"] },
    ]);
    const config = parseRunnerConfig(await exec("cat /etc/gitlab-runner/config.toml"));
    expect(config).toMatchObject({
      concurrent: 10,
      shutdown_timeout: 18,
      runners: runners.map(({ description: name, token, id }) => ({ name, token, id, limit: 10, executor: "custom" })),
    });
    expect((await exec('cd /etc/gitlab-runner; stat -c "%a %U %n" *')).trimEnd().split("\n")).toEqual([
      "600 gitlab-runner config.toml",
      "600 gitlab-runner fargate-dev_tool1.toml",
      "600 gitlab-runner fargate-dev_tool2_tool3.toml",
    ]);

    // Only process 1, which ECS gives the token to, has it in its environment; none has a token in its command line.
    const processes = 'for p in /proc/[0-9]*; do tr "\\0" " " <$p/cmdline; done 2>/dev/null; true';
    const commandLines = await exec(processes);
    expect(commandLines).toContain("gitlab-runner run --user=gitlab-runner --working-directory=/home/gitlab-runner");
    for (const token of [REGISTRATION_TOKEN, ...tokens]) expect(commandLines).not.toContain(token);
    const ofRunner = `for p in /proc/[0-9]*; do
      case $(tr "\\0" " " <$p/cmdline) in gitlab-runner*) tr "\\0" "\\n" <$p/environ ;; esac; done 2>/dev/null; true`;
    const environment = await exec(ofRunner);
    expect(environment).toContain("CONFIG_FILE=/etc/gitlab-runner/config.toml\n");
    expect(environment).not.toContain(REGISTRATION_TOKEN);

    const done: QueuedJob = gitlab.queueJob(tokens[0] ?? "", job);
    await reaches(() => done.state === "success" || done.state === "failed");
    expect(done.trace).toContain("from the task\n");
    expect(done.state).toBe("success");

    const unfinished = gitlab.queueJob(tokens[1] ?? "", { ...job, script: ["echo now waiting", "sleep 1000"] });
    await reaches(() => unfinished.trace.includes("now waiting\n"));
    const finished = await manager.stop();
    expect(finished.code).toBe(0);
    expect(gitlab.runners).toEqual([]);
    expect(world.aws.callsTo("RunTask")).toHaveLength(2);
    expect(world.aws.running()).toEqual([]);
    searchOutput(finished, gitlab, tokens);
  });

  imageTest("the manager image starts with the variables of the single-runner image", async () => {
    const fields = Object.entries(worker).map(([name, value]) => [`FARGATE_${name}`, value]);
    const tmpfs = (path: string) => ["--tmpfs", `${path}:uid=999,gid=999,mode=0700`];
    const manager = await startManager({
      variables: { RUNNER_TAG_LIST: "a, b", ...Object.fromEntries(fields) },
      options: [...tmpfs("/etc/gitlab-runner"), ...tmpfs("/opt/gitlab-runner/metadata")],
    });
    const { gitlab, exec, reaches } = manager;
    await reaches(() => gitlab.requestsTo("requestJob").length > 0);
    const { runners } = gitlab;
    expect(runners).toMatchObject([{ tags: ["a", "b"], createdBy: "registration" }]);
    const config = parseRunnerConfig(await exec("cat /etc/gitlab-runner/config.toml"));
    expect(config.runners).toMatchObject([{ name: runners[0]?.description, token: runners[0]?.token }]);
    const tokens = runners.map(({ token }) => token);
    const finished = await manager.stop();
    expect(finished.code).toBe(0);
    expect(gitlab.runners).toEqual([]);
    searchOutput(finished, gitlab, tokens);
  });
});
