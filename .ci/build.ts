/**
 * Compiles fargate.ts, as `bun build --compile` does: dist/fargate for this machine, or with `--all` one program for
 * each target and their SHA256SUMS.
 *
 * The plug-in is why this is not the bare command. ssh2 asks for two optional native add-ons; a `require` that the
 * bundler does not resolve is resolved when the program runs, from the working directory, which may be a stranger's.
 * So both are answered here, with nothing: never in the program, whether or not a compiler was at hand.
 */
import { createHash } from "node:crypto";
import { mkdirSync, readFileSync, writeFileSync } from "node:fs";
import { createRequire } from "node:module";
import { join } from "node:path";
import manifest from "../package.json" with { type: "json" };

const TARGETS = {
  "linux-amd64": "bun-linux-x64",
  "linux-amd64-baseline": "bun-linux-x64-baseline",
  "linux-amd64-musl": "bun-linux-x64-musl",
  "linux-arm64": "bun-linux-arm64",
  "linux-arm64-musl": "bun-linux-arm64-musl",
  "darwin-arm64": "bun-darwin-arm64",
} as const;

const root = join(import.meta.dir, "..");
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

async function compile(outfile: string, target?: Bun.Build.CompileTarget): Promise<void> {
  const result = await Bun.build({
    entrypoints: [join(root, "fargate.ts")],
    compile: {
      outfile: join(dist, outfile),
      ...(target && { target }),
      // Else a .env or bunfig.toml in the working directory could redirect signed requests or run code.
      autoloadDotenv: false,
      autoloadBunfig: false,
      autoloadTsconfig: false,
      autoloadPackageJson: false,
    },
    // Bytecode, which needs the cjs format, makes start-up several times as fast.
    bytecode: true,
    format: "cjs",
    minify: true,
    plugins: [resolve],
    define: { BUILD: JSON.stringify(`${manifest.version} (${revision()})`) },
  });
  for (const log of result.logs) console.warn(String(log));
  console.log(`dist/${outfile}`);
}

mkdirSync(dist, { recursive: true });
if (process.argv.includes("--all")) {
  const sums: string[] = [];
  for (const [name, target] of Object.entries(TARGETS)) {
    await compile(`fargate-${name}`, target);
    const hash = createHash("sha256").update(readFileSync(join(dist, `fargate-${name}`)));
    sums.push(`${hash.digest("hex")}  fargate-${name}\n`);
  }
  writeFileSync(join(dist, "SHA256SUMS"), sums.join(""));
  console.log("dist/SHA256SUMS");
} else {
  await compile("fargate");
}
