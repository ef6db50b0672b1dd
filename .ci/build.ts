/**
 * Compiles fargate.ts, as `bun build --compile` does, and writes the licences of all compiled-in packages.
 *
 * - Without options: dist/fargate for this machine.
 * - `--all`: one program for each target, and SHA256SUMS.
 * - `--licences`: also prints the list of licences.
 *
 * The same commit always gives the same bytes: nothing in the program depends on the machine (see `define`).
 *
 * The plain command is not enough, because of ssh2's two optional native add-ons. If the bundler cannot
 * resolve a `require`, the program resolves it at run time from its working directory, which an attacker may
 * control. The plug-in below replaces both add-ons by a module that throws, whether or not they were built.
 */
import { execFileSync } from "node:child_process";
import { createHash } from "node:crypto";
import { mkdirSync, mkdtempSync, readFileSync, renameSync, rmSync, writeFileSync } from "node:fs";
import { createRequire } from "node:module";
import { tmpdir } from "node:os";
import { join } from "node:path";
import manifest from "../package.json" with { type: "json" };
import { licenceList, licenceProblems, notices, packagesOf, readRuntime } from "./licences.ts";

/** bun's name for each target, and the package of its runtime. */
export const TARGETS = {
  "linux-amd64": ["bun-linux-x64", "@oven/bun-linux-x64"],
  // The same runtime as linux-amd64. At its start, bun checks the processor's features.
  "linux-amd64-baseline": ["bun-linux-x64-baseline", "@oven/bun-linux-x64"],
  "linux-amd64-musl": ["bun-linux-x64-musl", "@oven/bun-linux-x64-musl"],
  "linux-arm64": ["bun-linux-arm64", "@oven/bun-linux-aarch64"],
  "linux-arm64-musl": ["bun-linux-arm64-musl", "@oven/bun-linux-aarch64-musl"],
  "darwin-arm64": ["bun-darwin-arm64", "@oven/bun-darwin-aarch64"],
} as const;

const root = join(import.meta.dirname, "..");
const dist = join(root, "dist");

/** The commit, with `-dirty` if files differ from it; or SOURCE_REVISION, for builds without git history. */
function revision(): string {
  if (process.env.SOURCE_REVISION) return process.env.SOURCE_REVISION;
  const git = (...args: string[]) => Bun.spawnSync(["git", ...args], { cwd: root, stderr: "ignore" });
  const head = git("rev-parse", "--short=12", "HEAD");
  if (!head.success) return "unknown";
  return head.stdout.toString().trim() + (git("diff", "--quiet", "HEAD").success ? "" : "-dirty");
}

/**
 * Modules that ssh2 and commander load when they start, but need only for features that the driver does not use, with
 * their replacements. Loading them would cost every stage time and memory.
 */
const UNUSED: Readonly<Record<string, string>> = {
  net: "{}", // ssh2 gets a connected socket
  dns: "{}",
  zlib: "{ constants: {}, createInflate: () => ({ _handle: {} }) }", // `compress` is "none"
  child_process: "{}", // ssh2's agents, commander's subcommands in programs of their own
  "./agent.js": "{ isAgent: () => false }",
  "./protocol/SFTP.js": "{ SFTP: class {} }",
  "./crypto/poly1305.js": "async () => ({ _malloc() {}, cwrap() {} })", // ChaCha20 is not offered
  "bcrypt-pbkdf": "{}", // for keys with a passphrase
};
/** Leaves the unused modules out of a source file. */
const withoutUnused = (source: string) =>
  source.replace(/\brequire\('(?:node:)?([^']+)'\)/g, (call, name) =>
    Object.hasOwn(UNUSED, name) ? `(${UNUSED[name]})` : call,
  );

/** Determines which files are compiled in for some imports. */
export const resolver: Bun.BunPlugin = {
  name: "resolver",
  setup(build) {
    // CommonJS modules are evaluated when a stage loads them. ES modules are flattened into the program, so
    // every start, even for --help, would create the thousands of functions of the AWS SDKs: 20 ms instead of
    // 12, measured.
    build.onResolve({ filter: /^@(aws|aws-sdk|smithy)\// }, ({ path, importer }) => ({
      path: createRequire(importer).resolve(path),
    }));
    // Only `runners` and `manager` write TOML, and import this package once more. As an ES module, every stage
    // would evaluate it, too.
    build.onResolve({ filter: /^smol-toml$/ }, ({ path, importer, kind }) =>
      kind === "dynamic-import" ? { path: createRequire(importer).resolve(path) } : undefined,
    );
    build.onResolve({ filter: /^cpu-features$|\.node$/ }, ({ path }) => ({ path, namespace: "none" }));
    build.onLoad({ filter: /.*/, namespace: "none" }, () => ({
      contents: 'throw new Error("native add-ons are left out");',
      loader: "js",
    }));
    build.onLoad({ filter: /\/node_modules\/(ssh2|commander)\/.*\.js$/ }, async ({ path }) => ({
      contents: withoutUnused(await Bun.file(path).text()),
      loader: "js",
    }));
  },
};

/**
 * Writes one program and returns its source files.
 *
 * @throws Error when a package may not be compiled in
 */
async function compile(outfile: string, target?: Bun.Build.CompileTarget, executablePath?: string): Promise<string[]> {
  // A program contains its own file name. With one name for all, dist/fargate equals the file of `--all` for
  // this target.
  const directory = mkdtempSync(join(dist, "build-"));
  try {
    const inputs = await bundle(join(directory, "fargate"), join(root, "fargate.ts"), target, executablePath);
    const problems = licenceProblems(packagesOf(inputs));
    if (problems.length > 0) throw new Error(problems.join("\n"));
    renameSync(join(directory, "fargate"), join(dist, outfile));
    console.log(`dist/${outfile}`);
    return inputs;
  } finally {
    rmSync(directory, { recursive: true });
  }
}

/**
 * Compiles the driver, or another program in the same way. Returns the paths of its source files, relative to the
 * working directory.
 */
export async function bundle(
  outfile: string,
  entrypoint: string,
  target?: Bun.Build.CompileTarget,
  executablePath?: string,
): Promise<string[]> {
  const result = await Bun.build({
    entrypoints: [entrypoint],
    compile: {
      outfile,
      ...(target && { target }),
      ...(executablePath && { executablePath }),
      // A .env or bunfig.toml in the working directory could redirect signed requests or run code.
      autoloadDotenv: false,
      autoloadBunfig: false,
      autoloadTsconfig: false,
      autoloadPackageJson: false,
      // Trusts the host's CAs in addition to bun's; they are read at the first TLS connection.
      execArgv: ["--use-system-ca"],
    },
    // Bytecode makes start-up several times faster. It needs the cjs format.
    bytecode: true,
    format: "cjs",
    minify: true,
    metafile: true,
    plugins: [resolver],
    define: {
      BUILD: JSON.stringify(`${manifest.version} (${revision()})`),
      // CommonJS modules such as ssh2 contain these. By default they are paths on the build machine; these
      // are the paths that bun gives to a program's files.
      __dirname: '"/$bunfs/root"',
      __filename: '"/$bunfs/root/fargate"',
    },
  });
  for (const log of result.logs) console.warn(String(log));
  if (!result.metafile) throw new Error("the bundler did not list the files in the program");
  return Object.values(result.metafile.outputs).flatMap((output) => Object.keys(output.inputs));
}

/**
 * Downloads the runtime of another target and checks it against package-lock.json. bun itself would download
 * it without that check.
 *
 * @returns the path of its executable
 */
function runtimeOf(name: string, into: string): string {
  const directory = join(into, name.replace("/", "-"));
  mkdirSync(directory);
  const lock = JSON.parse(readFileSync(join(root, "package-lock.json"), "utf8"));
  const { version, integrity } = lock.packages[`node_modules/${name}`];
  const options = ["--silent", "--prefer-offline", "--ignore-scripts", "--pack-destination", directory];
  const file = execFileSync("npm", ["pack", ...options, `${name}@${version}`], {
    cwd: root,
    encoding: "utf8",
    stdio: ["ignore", "pipe", "inherit"],
  });
  const archive = join(directory, file.trim());
  const hash = createHash("sha512").update(readFileSync(archive)).digest("base64");
  if (integrity !== `sha512-${hash}`)
    throw new Error(`${name} ${version} does not match its integrity in package-lock.json`);
  execFileSync("tar", ["-xzf", archive, "-C", directory, "package/bin/bun"]);
  rmSync(archive);
  return join(directory, "package", "bin", "bun");
}

/** Writes SHA256SUMS, for `sha256sum -c` in that directory. */
export function writeSums(directory: string, files: readonly string[]): void {
  const sums = files.map((file) => {
    const hash = createHash("sha256").update(readFileSync(join(directory, file)));
    return `${hash.digest("hex")}  ${file}\n`;
  });
  // Atomically: an incomplete list would look as if the other files did not belong to the release.
  writeFileSync(join(directory, "SHA256SUMS.new"), sums.join(""));
  renameSync(join(directory, "SHA256SUMS.new"), join(directory, "SHA256SUMS"));
}

const NOTICES = "THIRD-PARTY-LICENSES";

/** Writes the licence notices for programs with these source files. With `--licences`, prints the list. */
function writeNotices(inputs: readonly string[]): void {
  const packages = packagesOf(inputs);
  const runtime = readRuntime(Bun.version);
  writeFileSync(join(dist, NOTICES), notices(packages, runtime));
  console.log(`dist/${NOTICES}`);
  if (process.argv.includes("--licences")) console.log(`\n${licenceList(packages, runtime)}`);
}

if (import.meta.main) {
  mkdirSync(dist, { recursive: true });
  // The old checksums would not match the new files.
  rmSync(join(dist, "SHA256SUMS"), { force: true });
  if (process.argv.includes("--all")) {
    const runtimes = mkdtempSync(join(tmpdir(), "fargate-runtimes-"));
    try {
      const names = [...new Set(Object.values(TARGETS).map(([, name]) => name))];
      const paths = new Map(names.map((name) => [name, runtimeOf(name, runtimes)]));
      const inputs = new Set<string>();
      for (const [name, [target, runtime]] of Object.entries(TARGETS))
        for (const input of await compile(`fargate-${name}`, target, paths.get(runtime))) inputs.add(input);
      writeNotices([...inputs]);
    } finally {
      rmSync(runtimes, { recursive: true });
    }
    writeSums(dist, [...Object.keys(TARGETS).map((name) => `fargate-${name}`), NOTICES]);
    console.log("dist/SHA256SUMS");
  } else {
    writeNotices(await compile("fargate"));
  }
}
