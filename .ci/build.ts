/**
 * Compiles fargate.ts, as `bun build --compile` does: dist/fargate for this machine, or with `--all` one program for
 * each target and their SHA256SUMS; and the licences of what is in them. With `--licences` it lists these.
 *
 * The same commit gives the same bytes, wherever it is built: nothing of the machine goes in, see `define` below.
 *
 * The plug-in is why this is not the bare command. ssh2 asks for two optional native add-ons; a `require` that the
 * bundler does not resolve is resolved when the program runs, from the working directory, which may be a stranger's.
 * So both are answered here, with nothing: never in the program, whether or not a compiler was at hand.
 */
import { execFileSync } from "node:child_process";
import { createHash } from "node:crypto";
import { mkdirSync, mkdtempSync, readFileSync, renameSync, rmSync, writeFileSync } from "node:fs";
import { createRequire } from "node:module";
import { tmpdir } from "node:os";
import { join } from "node:path";
import manifest from "../package.json" with { type: "json" };
import { licenceFaults, licenceList, notices, packagesOf, readRuntime } from "./licences.ts";

/** bun's name of each target, and the package of its runtime. */
export const TARGETS = {
  "linux-amd64": ["bun-linux-x64", "@oven/bun-linux-x64"],
  // The same runtime: bun chooses by what the processor has when it starts.
  "linux-amd64-baseline": ["bun-linux-x64-baseline", "@oven/bun-linux-x64"],
  "linux-amd64-musl": ["bun-linux-x64-musl", "@oven/bun-linux-x64-musl"],
  "linux-arm64": ["bun-linux-arm64", "@oven/bun-linux-aarch64"],
  "linux-arm64-musl": ["bun-linux-arm64-musl", "@oven/bun-linux-aarch64-musl"],
  "darwin-arm64": ["bun-darwin-arm64", "@oven/bun-darwin-aarch64"],
} as const;

const root = join(import.meta.dirname, "..");
const dist = join(root, "dist");

/** The commit, with a mark when the tree differs from it; SOURCE_REVISION where there is no git (an image build). */
function revision(): string {
  if (process.env.SOURCE_REVISION) return process.env.SOURCE_REVISION;
  const git = (...args: string[]) => Bun.spawnSync(["git", ...args], { cwd: root, stderr: "ignore" });
  const head = git("rev-parse", "--short=12", "HEAD");
  if (!head.success) return "unknown";
  return head.stdout.toString().trim() + (git("diff", "--quiet", "HEAD").success ? "" : "-dirty");
}

const resolve: Bun.BunPlugin = {
  name: "resolve",
  setup(build) {
    // As CommonJS, the AWS SDKs stay wrapped until a stage loads them. As ES modules they are laid out flat, and every start
    // of the program, `--help` too, would make their thousands of functions: 20 ms instead of 12, measured.
    build.onResolve({ filter: /^@(aws|aws-sdk|smithy)\// }, ({ path, importer }) => ({
      path: createRequire(importer).resolve(path),
    }));
    build.onResolve({ filter: /^cpu-features$|\.node$/ }, ({ path }) => ({ path, namespace: "none" }));
    build.onLoad({ filter: /.*/, namespace: "none" }, () => ({
      contents: 'throw new Error("native add-ons are left out");',
      loader: "js",
    }));
  },
};

/** Writes one program, unless something is in it that must not be, and says which files are. */
async function compile(outfile: string, target?: Bun.Build.CompileTarget, executablePath?: string): Promise<string[]> {
  // A program has its own name in it. Under one name, dist/fargate and what `--all` makes for such a machine are the same.
  const directory = mkdtempSync(join(dist, "build-"));
  try {
    const inputs = await bundle(join(directory, "fargate"), target, executablePath);
    const faults = licenceFaults(packagesOf(inputs));
    if (faults.length > 0) throw new Error(faults.join("\n"));
    renameSync(join(directory, "fargate"), join(dist, outfile));
    console.log(`dist/${outfile}`);
    return inputs;
  } finally {
    rmSync(directory, { recursive: true });
  }
}

async function bundle(outfile: string, target?: Bun.Build.CompileTarget, executablePath?: string): Promise<string[]> {
  const result = await Bun.build({
    entrypoints: [join(root, "fargate.ts")],
    compile: {
      outfile,
      ...(target && { target }),
      ...(executablePath && { executablePath }),
      // Else a .env or bunfig.toml in the working directory could redirect signed requests or run code.
      autoloadDotenv: false,
      autoloadBunfig: false,
      autoloadTsconfig: false,
      autoloadPackageJson: false,
      // Trusts the CAs of the host as well as bun's own; they are read at the first TLS connection.
      execArgv: ["--use-system-ca"],
    },
    // Bytecode, which needs the cjs format, makes start-up several times as fast.
    bytecode: true,
    format: "cjs",
    minify: true,
    metafile: true,
    plugins: [resolve],
    define: {
      BUILD: JSON.stringify(`${manifest.version} (${revision()})`),
      // Of CommonJS modules, which ssh2 is: else the path of the machine that builds. Instead, where bun has a program's files.
      __dirname: '"/$bunfs/root"',
      __filename: '"/$bunfs/root/fargate"',
    },
  });
  for (const log of result.logs) console.warn(String(log));
  if (!result.metafile) throw new Error("the bundler did not say what is in the program");
  return Object.values(result.metafile.outputs).flatMap((output) => Object.keys(output.inputs));
}

/**
 * A runtime as package-lock.json pins it, for machines that this one is not: bun would fetch it from the registry by
 * its name, and what is in the lock file would have no say in it.
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
  if (integrity !== `sha512-${hash}`) throw new Error(`${name} ${version} is not what package-lock.json says it is`);
  execFileSync("tar", ["-xzf", archive, "-C", directory, "package/bin/bun"]);
  rmSync(archive);
  return join(directory, "package", "bin", "bun");
}

/** Writes SHA256SUMS, as `sha256sum -c` reads it in that directory. */
export function writeSums(directory: string, files: readonly string[]): void {
  const sums = files.map((file) => {
    const hash = createHash("sha256").update(readFileSync(join(directory, file)));
    return `${hash.digest("hex")}  ${file}\n`;
  });
  // At once: a list of some of them would say that the others do not belong.
  writeFileSync(join(directory, "SHA256SUMS.new"), sums.join(""));
  renameSync(join(directory, "SHA256SUMS.new"), join(directory, "SHA256SUMS"));
}

const NOTICES = "THIRD-PARTY-LICENSES";

/** Writes the notices beside the programs that have these files in them, and lists them where that is asked for. */
function writeNotices(inputs: readonly string[]): void {
  const packages = packagesOf(inputs);
  const runtime = readRuntime(Bun.version);
  writeFileSync(join(dist, NOTICES), notices(packages, runtime));
  console.log(`dist/${NOTICES}`);
  if (process.argv.includes("--licences")) console.log(`\n${licenceList(packages, runtime)}`);
}

if (import.meta.main) {
  mkdirSync(dist, { recursive: true });
  // It would be about other files than those that are there from now on.
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
