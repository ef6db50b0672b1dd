/**
 * Tests that other files of the repository refer only to existing things: `.gitlab-ci.yml` to commands, files
 * and jobs, and `CONTRIBUTING.md` to the lines that its example replaces. The names of all
 * tests follow the rule in `CONTRIBUTING.md`.
 */
import { spawnSync } from "node:child_process";
import { existsSync, globSync, mkdtempSync, readFileSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join, relative } from "node:path";
import { describe, expect, test } from "vitest";
import manifest from "../package.json" with { type: "json" };
import { TARGETS } from "./build.ts";
import { releaseNotes } from "./release-notes.ts";

const root = join(import.meta.dirname, "..");
const read = (name: string) => readFileSync(join(root, name), "utf8");

describe(".gitlab-ci.yml", () => {
  interface Job {
    stage: string;
    before_script?: string[];
    script: string[];
    dependencies?: string[];
    artifacts?: { paths: string[] };
    release?: { assets: { links: { name: string; url: string; filepath: string }[] }; description: string };
  }
  const { stages, ...rest } = Bun.YAML.parse(read(".gitlab-ci.yml")) as { stages: string[]; [name: string]: unknown };
  const isJob = (value: unknown): value is Job => typeof value === "object" && value !== null && "script" in value;
  const jobs = new Map(Object.entries(rest).filter((entry): entry is [string, Job] => isJob(entry[1])));

  test(".gitlab-ci.yml has a job for each stage and a stage for each job", () => {
    expect(new Set([...jobs.values()].map(({ stage }) => stage))).toEqual(new Set(stages));
  });

  test.each([...jobs])(
    ".gitlab-ci.yml lets %s depend only on earlier jobs with artifacts",
    (_, { stage, dependencies = [] }) => {
      for (const name of dependencies) {
        expect(stages.indexOf(jobs.get(name)?.stage ?? "")).toBeLessThan(stages.indexOf(stage));
        expect(jobs.get(name)?.artifacts?.paths).not.toEqual([]);
        expect(jobs.get(name)).toHaveProperty("artifacts");
      }
    },
  );

  test(".gitlab-ci.yml runs only commands that exist", () => {
    const lines = [...jobs.values()].flatMap(({ before_script = [], script }) => [...before_script, ...script]);
    const text = lines.join("\n");
    const scripts = [...text.matchAll(/\bnpm run ([\w:-]+)/g)].map(([, name]) => name);
    expect(scripts).toContain("build:all");
    for (const name of scripts)
      expect(manifest.scripts, ".gitlab-ci.yml runs an npm script that package.json lacks").toHaveProperty([`${name}`]);
    const files = [...text.matchAll(/(?<!\S)\.ci\/[\w.-]+/g)].map(([path]) => path);
    expect(files).toContain(".ci/run");
    for (const path of files) expect(read(path)).not.toBe("");
  });

  test(".gitlab-ci.yml links every file of the build in the release", () => {
    const { release } = jobs.get("release") ?? {};
    const made = [...Object.keys(TARGETS).map((name) => `fargate-${name}`), "THIRD-PARTY-LICENSES", "SHA256SUMS"];
    expect(release?.assets.links).toEqual(
      made.map((name) => expect.objectContaining({ name, url: `$PACKAGE_URL/${name}`, filepath: `/${name}` })),
    );
    expect(jobs.get("build")?.artifacts?.paths.map((path) => path.replace("dist/", ""))).toEqual([
      "fargate-*",
      "THIRD-PARTY-LICENSES",
      "SHA256SUMS",
    ]);
    expect(jobs.get("release-notes")?.artifacts?.paths).toEqual([release?.description]);
  });
});

describe("release notes", () => {
  const changelog = [
    "# Changelog",
    "",
    "## [Unreleased]",
    "",
    "## [1.1.0] - 2030-01-02",
    "",
    "### Added",
    "",
    "- A thing.",
    "",
    "## [1.0.0] - 2030-01-01",
    "",
    "- The first release.",
    "",
    "[1.0.0]: https://gitlab.example.com/-/tags/v1.0.0",
    "",
  ].join("\n");

  test("releaseNotes returns the changelog's section for the tag", () => {
    expect(releaseNotes(changelog, "v1.1.0", "1.1.0")).toBe("### Added\n\n- A thing.\n");
    expect(releaseNotes(changelog, "v1.0.0", "1.0.0")).toBe("- The first release.\n");
  });

  test("releaseNotes refuses another version and an absent or empty section", () => {
    expect(() => releaseNotes(changelog, "v1.1.0", "1.0.0")).toThrow("the tag is v1.1.0");
    expect(() => releaseNotes(changelog, "1.1.0", "1.1.0")).toThrow("the tag is 1.1.0");
    expect(() => releaseNotes(changelog, "v1.1.1", "1.1.1")).toThrow("has no section [1.1.1]");
    expect(() => releaseNotes(changelog, "v1.1.0+x", "1.1.0+x")).toThrow("has no section");
    const empty = changelog.replace("### Added\n\n- A thing.\n", "");
    expect(() => releaseNotes(empty, "v1.1.0", "1.1.0")).toThrow("has no entries for 1.1.0");
  });

  test("CHANGELOG.md has a section for what is not released yet", () => {
    const missing = 'CHANGELOG.md: add the heading "## [Unreleased]" above the latest release';
    expect(/^## \[Unreleased\]$/m.test(read("CHANGELOG.md")), missing).toBe(true);
  });
});

describe("CONTRIBUTING.md", () => {
  const text = read("CONTRIBUTING.md");
  const diff = [...text.matchAll(/^```diff\n(.*?)^```$/gms)].map(([, block]) => block).join("");
  const files = diff.split(/^--- a\//m).slice(1);

  test("CONTRIBUTING.md replaces only lines that the files have", () => {
    const removed = files.flatMap((file) => {
      const [name = "", ...lines] = file.split("\n");
      const old = lines.filter((line) => line.startsWith("-")).map((line) => line.slice(1));
      return old.map((line) => ({ name, line, exists: read(name).includes(`${line}\n`) }));
    });
    expect(removed.length).toBeGreaterThan(2);
    for (const { name, line, exists } of removed)
      expect(exists, `CONTRIBUTING.md removes a line that ${name} no longer has; give its new text: ${line}`).toBe(
        true,
      );
  });

  test("CONTRIBUTING.md names only tests that exist", () => {
    const tests = globSync("*.test.ts", { cwd: root }).map(read).join("\n");
    const names = [...text.matchAll(/^@@ "(.*)"$/gm)].map(([, name]) => name as string);
    expect(names).toHaveLength(2);
    const renamed = (name: string) => `CONTRIBUTING.md names a test that does not exist; give its new name: ${name}`;
    for (const name of names) expect(tests.includes(`test("${name}`), renamed(name)).toBe(true);
  });
});

describe("test names", () => {
  const COMMANDS = [
    "config",
    "prepare",
    "run",
    "cleanup",
    "sweep",
    "runners",
    "manager",
    "fargate",
    "init",
    "doctor",
    "tasks",
    "shell",
  ];
  const SUBJECTS = ["a job", "the worker image", "the manager image", "docker build", "the AWS stand-in", "npm run"];
  const exportsOf = (path: string) => {
    const text = read(path);
    const [, list = ""] = /^export \{([^}]*)\}/m.exec(text) ?? [];
    const declared = [...text.matchAll(/^export (?:async )?(?:function|class|const) (\w+)/gm)];
    return [...declared.map(([, name]) => name as string), ...(list.match(/\w+/g) ?? [])];
  };
  const functions = ["fargate.ts", "fixtures/debug.ts", "fixtures/secrets.ts", ...globSync(".ci/*.ts", { cwd: root })]
    .filter((path) => !path.endsWith(".test.ts"))
    .flatMap(exportsOf);
  const words = new Set([...COMMANDS, ...functions]);

  /** What is wrong with the name of a test, if anything. */
  const problemOf = (name: string): string | undefined => {
    const [first = ""] = name.split(" ");
    const isFile = /[./]/.test(first) && existsSync(join(root, first));
    if (!isFile && !words.has(first) && !SUBJECTS.some((subject) => name.startsWith(`${subject} `)))
      return "it begins with no command, function or file";
    if (name.length > 80) return `it has ${name.length} characters`;
    return /[;:] /.test(name) ? "it has several clauses" : undefined;
  };
  const listed = (): { name: string; file: string }[] => {
    const scratch = mkdtempSync(join(tmpdir(), "fargate-names-"));
    try {
      const vitest = join(root, "node_modules", "vitest", "vitest.mjs");
      const list = join(scratch, "names.json");
      const { status, stderr } = spawnSync(process.execPath, ["--bun", vitest, "list", `--json=${list}`], {
        cwd: root,
        encoding: "utf8",
        env: { ...process.env, QUICK: undefined, SOAK: "true" }, // with those of the soak tests
      });
      expect({ status, stderr }).toEqual({ status: 0, stderr: "" });
      return JSON.parse(readFileSync(list, "utf8"));
    } finally {
      rmSync(scratch, { recursive: true });
    }
  };

  test("CONTRIBUTING.md gives the rule that all test names follow", () => {
    const tests = listed().map(({ name, file }) => ({ test: `${relative(root, file)}: ${name}`, name }));
    expect(tests.length).toBeGreaterThan(1_000);
    const seen = new Set<string>();
    const problems = tests.flatMap(({ test, name }) => {
      const why = seen.has(test) ? "the file has another test of this name" : problemOf(name.split(" > ").at(-1) ?? "");
      seen.add(test);
      return why ? [`${test}: ${why}`] : [];
    });
    expect(problems).toEqual([]);
  }, 180_000); // as in docs/docs.test.ts: vitest loads all test files
});
