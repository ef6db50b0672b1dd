/** Tests of the build: its packages, checksums and reproducibility. */
import { spawnSync } from "node:child_process";
import * as fs from "node:fs";
import { join } from "node:path";
import { describe, expect, test } from "vitest";
import { fargate, start } from "../fixtures/process.ts";
import { wholeRun } from "../fixtures/secrets.ts";
import { directory, setUp, testProgram } from "../fixtures/test-support.ts";
import { projectRoot } from "../fixtures/world.ts";
import { writeSums } from "./build.ts";

setUp();

describe("build", () => {
  test(".npmrc keeps every install script except bun's from running", () => {
    const read = (...path: string[]) => fs.readFileSync(join(projectRoot, ...path), "utf8");
    const lock = JSON.parse(read("package-lock.json")) as { packages: Record<string, { hasInstallScript?: true }> };
    const wanting = Object.keys(lock.packages).filter((path) => lock.packages[path]?.hasInstallScript);
    expect(wanting).toEqual([
      // Installs bun's executable.
      "node_modules/bun",
      // Builds a native add-on, which the driver would load from outside its executable.
      "node_modules/cpu-features",
      // A dependency of testcontainers. The script only warns about version ranges in package.json.
      "node_modules/protobufjs",
      // Builds a native add-on, like cpu-features. ssh2 has the same functions in JavaScript.
      "node_modules/ssh2",
    ]);
    expect(read(".npmrc").split("\n")).toContain("ignore-scripts=true");
    const install = read(".ci", "install.mjs");
    expect(install).toContain('"npm", ["ci", "--ignore-scripts", ');
    expect([...install.matchAll(/"node_modules", "([^"]+)", "[^"]*\.[cm]?js"/g)].map(([, name]) => name)).toEqual([
      "bun",
    ]);
    // The results of the other scripts, which nothing here needs.
    for (const path of ["ssh2/lib/protocol/crypto/build", "cpu-features/build"])
      expect(fs.existsSync(join(projectRoot, "node_modules", path))).toBe(false);

    const manifest = JSON.parse(read("package.json"));
    for (const script of ["preinstall", "install", "postinstall", "prepare"])
      expect(manifest.scripts).not.toHaveProperty(script);
    for (const version of Object.values({ ...manifest.dependencies, ...manifest.devDependencies }))
      expect(version).toMatch(/^\d+\.\d+\.\d+$/);
  });

  test("writeSums writes what sha256sum reads", () => {
    const made = directory();
    fs.writeFileSync(join(made, "a"), "a");
    fs.writeFileSync(join(made, "b"), "b");
    writeSums(made, ["a", "b"]);
    const check = () => spawnSync("sha256sum", ["-c", "--strict", "SHA256SUMS"], { cwd: made, encoding: "utf8" });
    expect(check()).toMatchObject({ status: 0, stdout: "a: OK\nb: OK\n" });
    fs.writeFileSync(join(made, "b"), "c");
    expect(check()).toMatchObject({ status: 1, stdout: "a: OK\nb: FAILED\n" });
  });

  testProgram("npm run build gives the same bytes in two directories", async () => {
    // The other directory is deeper. It has a copy of the packages and, as in an image build, no git history.
    const other = join(directory(), "another", "place");
    fs.mkdirSync(other, { recursive: true });
    for (const name of [".ci", "LICENSE", "fargate.ts", "package.json", "tsconfig.json"])
      fs.cpSync(join(projectRoot, name), join(other, name), { recursive: true });
    wholeRun.ownFile(join(other, "fargate.ts")); // it encodes keys, and so contains what every key contains
    const modules = fs.realpathSync(join(projectRoot, "node_modules"));
    const lock = JSON.parse(fs.readFileSync(join(projectRoot, "package-lock.json"), "utf8")) as {
      packages: Record<string, { dev?: true }>;
    };
    const copied = Object.keys(lock.packages)
      .filter((path) => path.startsWith("node_modules/") && !lock.packages[path]?.dev)
      .map((path) => path.slice("node_modules/".length));
    const licences = ["bun/package.json", "bun-types/package.json", "bun-types/docs/project/license.mdx"];
    for (const path of [...copied, ...licences])
      if (fs.existsSync(join(modules, path)))
        fs.cpSync(join(modules, path), join(other, "node_modules", path), {
          recursive: true,
          // Types, and copies as ES modules, are most of the size, and the build does not need them.
          filter: (from) => !/\/dist-(types|es)$/.test(from),
        });
    fs.mkdirSync(join(other, "dist"));
    fs.writeFileSync(join(other, "dist", "SHA256SUMS"), "of another build\n");

    const version = (await fargate(["--version"], {})).stdout.toString();
    const build = ["sh", "-c", 'umask 077; exec "$@"', "sh", process.execPath, join(other, ".ci", "build.ts")];
    const env = {
      SOURCE_REVISION: /\((.*)\)/.exec(version)?.[1] ?? "",
      HOME: directory(),
      TMPDIR: directory(),
      TZ: "Asia/Tokyo",
    };
    const finished = await start([...build, "--licences"], { env, cwd: "/" }).finished;
    expect({ code: finished.code, stderr: finished.stderr }).toEqual({ code: 0, stderr: "" });
    // Not with toEqual, which would print the files of 120 MB if they differ.
    const same = (name: string) =>
      fs.readFileSync(join(other, "dist", name)).equals(fs.readFileSync(join(projectRoot, "dist", name)));
    expect(same("fargate")).toBe(true);
    expect(same("THIRD-PARTY-LICENSES")).toBe(true);
    expect(fs.readdirSync(join(other, "dist")).sort()).toEqual(["THIRD-PARTY-LICENSES", "fargate"]);

    // The list has the packages that are compiled in, and none that are only installed.
    const list = finished.stdout.toString();
    for (const line of [
      /^ssh2 +\S+ +MIT$/m,
      /^@aws-sdk\/client-ecs +\S+ +Apache-2\.0$/m,
      /^bun +\S+ +MIT; it links:$/m,
    ])
      expect(list).toMatch(line);
    expect(list).toMatch(/^ {2}JavaScriptCore \(WebKit\): LGPL-2$/m);
    expect(list).not.toMatch(/cpu-features|protobufjs|vitest|typescript/);
    const text = fs.readFileSync(join(other, "dist", "THIRD-PARTY-LICENSES"), "utf8");
    for (const notice of ["Copyright Brian White", "Mark Cavage", "LIBRARY GENERAL PUBLIC", "LESSER GENERAL PUBLIC"])
      expect(text).toContain(notice);
  });
});
