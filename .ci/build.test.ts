/** What goes into a build, and that two builds of one tree are the same bytes. */
import { spawnSync } from "node:child_process";
import * as fs from "node:fs";
import { join } from "node:path";
import { describe, expect, test } from "vitest";
import { fargate, start } from "../fixtures/process.ts";
import { directory, setUp, testProgram } from "../fixtures/test-support.ts";
import { projectRoot } from "../fixtures/world.ts";
import { writeSums } from "./build.ts";

setUp();

describe("supply", () => {
  test("of the packages that want to run a script when they are installed, only bun's does", () => {
    const read = (...path: string[]) => fs.readFileSync(join(projectRoot, ...path), "utf8");
    const lock = JSON.parse(read("package-lock.json")) as { packages: Record<string, { hasInstallScript?: true }> };
    const wanting = Object.keys(lock.packages).filter((path) => lock.packages[path]?.hasInstallScript);
    expect(wanting).toEqual([
      // Puts its program in its place.
      "node_modules/bun",
      // Native add-ons, which the program must not have: it could only load them from beside it.
      "node_modules/cpu-features",
      // For the tests' containers; it warns about how a package.json states versions, and no more.
      "node_modules/protobufjs",
      // As cpu-features: its own JavaScript does the same.
      "node_modules/ssh2",
    ]);
    expect(read(".npmrc").split("\n")).toContain("ignore-scripts=true");
    const install = read(".ci", "install.mjs");
    expect(install).toContain('"npm", ["ci", "--ignore-scripts", ');
    expect([...install.matchAll(/"node_modules", "([^"]+)", "[^"]*\.[cm]?js"/g)].map(([, name]) => name)).toEqual([
      "bun",
    ]);
    // What the others would have left, and what everything here runs without.
    for (const path of ["ssh2/lib/protocol/crypto/build", "cpu-features/build"])
      expect(fs.existsSync(join(projectRoot, "node_modules", path))).toBe(false);

    const manifest = JSON.parse(read("package.json"));
    for (const script of ["preinstall", "install", "postinstall", "prepare"])
      expect(manifest.scripts).not.toHaveProperty(script);
    for (const version of Object.values({ ...manifest.dependencies, ...manifest.devDependencies }))
      expect(version).toMatch(/^\d+\.\d+\.\d+$/);
  });

  test("SHA256SUMS is as sha256sum reads it", () => {
    const made = directory();
    fs.writeFileSync(join(made, "a"), "a");
    fs.writeFileSync(join(made, "b"), "b");
    writeSums(made, ["a", "b"]);
    const check = () => spawnSync("sha256sum", ["-c", "--strict", "SHA256SUMS"], { cwd: made, encoding: "utf8" });
    expect(check()).toMatchObject({ status: 0, stdout: "a: OK\nb: OK\n" });
    fs.writeFileSync(join(made, "b"), "c");
    expect(check()).toMatchObject({ status: 1, stdout: "a: OK\nb: FAILED\n" });
  });

  testProgram("two builds of one tree, in two directories, give the same bytes", async () => {
    // The other one is deeper, has its packages in it, and is as little as an image build has: no git.
    const other = join(directory(), "another", "place");
    fs.mkdirSync(other, { recursive: true });
    for (const name of [".ci", "LICENSE", "fargate.ts", "package.json", "tsconfig.json"])
      fs.cpSync(join(projectRoot, name), join(other, name), { recursive: true });
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
          // Most of it is types, and the same again as ES modules.
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
    // Buffers of 120 MB: expect would print them.
    const same = (name: string) =>
      fs.readFileSync(join(other, "dist", name)).equals(fs.readFileSync(join(projectRoot, "dist", name)));
    expect(same("fargate")).toBe(true);
    expect(same("THIRD-PARTY-LICENSES")).toBe(true);
    expect(fs.readdirSync(join(other, "dist")).sort()).toEqual(["THIRD-PARTY-LICENSES", "fargate"]);

    // What is compiled in, and nothing that is only installed.
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
    for (const notice of ["Copyright Brian White", "Niels Provos", "LIBRARY GENERAL PUBLIC", "LESSER GENERAL PUBLIC"])
      expect(text).toContain(notice);
  });
});
