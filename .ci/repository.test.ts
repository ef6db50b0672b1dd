/**
 * The files around the driver name only what exists: `.gitlab-ci.yml` the commands and programs, `CONTRIBUTING.md` the
 * lines that its worked example replaces.
 */
import { globSync, readFileSync } from "node:fs";
import { join } from "node:path";
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

  test("each stage has a job, and each job a stage", () => {
    expect(new Set([...jobs.values()].map(({ stage }) => stage))).toEqual(new Set(stages));
  });

  test.each([...jobs])(
    "%s depends on jobs of earlier stages, which have artifacts",
    (_, { stage, dependencies = [] }) => {
      for (const name of dependencies) {
        expect(stages.indexOf(jobs.get(name)?.stage ?? "")).toBeLessThan(stages.indexOf(stage));
        expect(jobs.get(name)?.artifacts?.paths).not.toEqual([]);
        expect(jobs.get(name)).toHaveProperty("artifacts");
      }
    },
  );

  test("the commands that jobs run exist", () => {
    const lines = [...jobs.values()].flatMap(({ before_script = [], script }) => [...before_script, ...script]);
    const text = lines.join("\n");
    const scripts = [...text.matchAll(/\bnpm run ([\w:-]+)/g)].map(([, name]) => name);
    expect(scripts).toContain("build:all");
    for (const name of scripts) expect(manifest.scripts).toHaveProperty([name as string]);
    const files = [...text.matchAll(/(?<!\S)\.ci\/[\w.-]+/g)].map(([path]) => path);
    expect(files).toContain(".ci/run");
    for (const path of files) expect(read(path)).not.toBe("");
  });

  test("the release has a link for every file that the build makes", () => {
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

  test("are the changelog's section for the tag", () => {
    expect(releaseNotes(changelog, "v1.1.0", "1.1.0")).toBe("### Added\n\n- A thing.\n");
    expect(releaseNotes(changelog, "v1.0.0", "1.0.0")).toBe("- The first release.\n");
  });

  test("are refused for another version, an absent section and an empty one", () => {
    expect(() => releaseNotes(changelog, "v1.1.0", "1.0.0")).toThrow("the tag is v1.1.0");
    expect(() => releaseNotes(changelog, "1.1.0", "1.1.0")).toThrow("the tag is 1.1.0");
    expect(() => releaseNotes(changelog, "v1.1.1", "1.1.1")).toThrow("has no section [1.1.1]");
    expect(() => releaseNotes(changelog, "v1.1.0+x", "1.1.0+x")).toThrow("has no section");
    const empty = changelog.replace("### Added\n\n- A thing.\n", "");
    expect(() => releaseNotes(empty, "v1.1.0", "1.1.0")).toThrow("has no entries for 1.1.0");
  });

  test("CHANGELOG.md has a section for what is not released yet", () => {
    expect(read("CHANGELOG.md")).toMatch(/^## \[Unreleased\]$/m);
  });
});

describe("CONTRIBUTING.md", () => {
  const text = read("CONTRIBUTING.md");
  const diff = [...text.matchAll(/^```diff\n(.*?)^```$/gms)].map(([, block]) => block).join("");
  const files = diff.split(/^--- a\//m).slice(1);

  test("the example replaces lines that the files have", () => {
    const removed = files.flatMap((file) => {
      const [name = "", ...lines] = file.split("\n");
      const old = lines.filter((line) => line.startsWith("-")).map((line) => line.slice(1));
      return old.map((line) => ({ name, line, exists: read(name).includes(`${line}\n`) }));
    });
    expect(removed.length).toBeGreaterThan(2);
    for (const one of removed) expect(one).toMatchObject({ exists: true });
  });

  test("the tests that the example names exist", () => {
    const tests = globSync("*.test.ts", { cwd: root }).map(read).join("\n");
    const names = [...text.matchAll(/^@@ "(.*)"$/gm)].map(([, name]) => name as string);
    expect(names).toHaveLength(2);
    for (const name of names) expect(tests).toContain(`test("${name}`);
  });
});
