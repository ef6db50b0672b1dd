/**
 * The licences of what is compiled in: which packages those are, whether they may be, and the notices that have to go
 * with a copy of the program. What the bundler put into the program decides, not what the lock file installs.
 */
import { existsSync, readdirSync, readFileSync } from "node:fs";
import { dirname, join, resolve, sep } from "node:path";

const root = join(import.meta.dirname, "..");

/** Licences that ask for no more than their notice. Another one is for a person to decide on, not for a build. */
const ALLOWED = ["0BSD", "Apache-2.0", "BSD-2-Clause", "BSD-3-Clause", "ISC", "MIT", "MIT-0", "Unlicense"];

/** A package of which something is compiled in. */
export interface Package {
  readonly name: string;
  readonly version: string;
  /** An SPDX expression, or "" where the package says none. */
  readonly licence: string;
  /** The texts of its licence and notice files, in the order of their names. */
  readonly texts: readonly string[];
}

const readText = (path: string) => readFileSync(path, "utf8").replaceAll("\r\n", "\n").trim();

/** What a package.json says, old spellings too. */
export function licenceOf(manifest: { license?: unknown; licenses?: unknown }): string {
  const type = (value: unknown): string =>
    typeof value === "string" ? value : String((value as { type?: unknown } | null | undefined)?.type ?? "");
  if (Array.isArray(manifest.licenses) && manifest.license === undefined)
    return manifest.licenses.map(type).join(" OR ");
  return type(manifest.license);
}

function readPackage(directory: string): Package {
  const manifest = JSON.parse(readFileSync(join(directory, "package.json"), "utf8"));
  const texts = readdirSync(directory)
    .filter((file) => /^(licen[cs]e|copying|notice)/i.test(file))
    .sort()
    .map((file) => readText(join(directory, file)));
  return { name: manifest.name, version: manifest.version, licence: licenceOf(manifest), texts };
}

/** The packages of a bundle's input files, by name. `inputs` are a metafile's: relative to the working directory. */
export function packagesOf(inputs: readonly string[]): Package[] {
  const directories = new Set<string>();
  for (const input of inputs) {
    if (input.startsWith("none:")) continue;
    const path = resolve(input);
    const own = /^(.*[/\\]node_modules[/\\](?:@[^/\\]+[/\\])?[^/\\]+)[/\\]/.exec(path)?.[1];
    if (own) directories.add(own);
    else if (!existsSync(path) || !path.startsWith(root + sep))
      throw new Error(`whose is ${input}, which is compiled in?`);
  }
  const packages = [...directories].map(readPackage);
  // Not by the locale, which is the machine's.
  const key = ({ name, version }: Package) => `${name}@${version}`;
  return packages.toSorted((a, b) => (key(a) < key(b) ? -1 : 1));
}

/** The licence text that a package goes under: its own, or, where it was left out, that of a sibling with the same. */
function textsOf(one: Package, all: readonly Package[]): readonly string[] {
  if (one.texts.length > 0) return one.texts;
  const scope = /^@[^/]+\//.exec(one.name)?.[0];
  const sibling = all.find(
    ({ name, licence, texts }) => scope && name.startsWith(scope) && licence === one.licence && texts.length > 0,
  );
  return sibling?.texts ?? [];
}

/** Why these packages may not be compiled in; nothing where they may. */
export function licenceFaults(packages: readonly Package[]): string[] {
  return packages.flatMap((one) => {
    const name = `${one.name} ${one.version}`;
    // One licence or a plain choice. What is more involved is in the list as a whole, or it is not allowed.
    const choice = /^\(?([\w.+-]+(?: OR [\w.+-]+)*)\)?$/.exec(one.licence)?.[1]?.split(" OR ") ?? [];
    if (!choice.some((licence) => ALLOWED.includes(licence)))
      return [`${name}: its licence, ${one.licence || "of which it says nothing"}, is not one that may be compiled in`];
    if (textsOf(one, packages).length === 0) return [`${name}: it has no licence text to pass on`];
    return [];
  });
}

/** The runtime: bun's page about its licences, from the package of bun's own documentation, of the same version. */
export interface Runtime {
  readonly version: string;
  readonly licence: string;
  readonly page: string;
  /** What it links: name and licence, in bun's words. */
  readonly parts: readonly (readonly [name: string, licence: string])[];
}

export function readRuntime(version: string): Runtime {
  const read = (...path: string[]) => readText(join(root, "node_modules", ...path));
  const licence = licenceOf(JSON.parse(read("bun", "package.json")));
  for (const name of ["bun", "bun-types"])
    if (JSON.parse(read(name, "package.json")).version !== version) throw new Error(`${name} is not ${version}`);
  const page = read("bun-types", "docs", "project", "license.mdx").replace(/^---\n.*?\n---\n+/s, "");
  const engine = /^Bun statically links JavaScriptCore \(and WebKit\),? which is (\S+) licensed\./m.exec(page)?.[1];
  const linked = /^## Linked libraries\n(.*?)^## /ms.exec(page)?.[1] ?? "";
  const plain = (cell: string) => cell.replace(/\[([^\]]*)\]\([^)]*\)/g, "$1").replaceAll("`", "");
  const rows = [...linked.matchAll(/^\| (.*?) +\| (.*?) +\|$/gm)].slice(2);
  if (!engine || rows.length === 0) throw new Error("bun's page about its licences has changed: read it again");
  const parts = rows.map(([, name = "", own = ""]) => [plain(name), plain(own)] as const);
  return { version, licence, page, parts: [["JavaScriptCore (WebKit)", engine], ...parts] };
}

/** What `npm run licences` prints. */
export function licenceList(packages: readonly Package[], runtime: Runtime): string {
  const rows = [...packages.map(({ name, version, licence }) => [name, version, licence])];
  rows.push(["bun", runtime.version, `${runtime.licence}; it links:`]);
  const width = (column: 0 | 1) => Math.max(...rows.map((row) => row[column]?.length ?? 0));
  const lines = rows.map(([name = "", version = "", licence]) =>
    [name.padEnd(width(0)), version.padEnd(width(1)), licence].join("  "),
  );
  return [...lines, ...runtime.parts.map(([name, licence]) => `  ${name}: ${licence}`)].join("\n");
}

const RELINKING = `The program is bun's runtime with the packages above put behind it as data. bun links JavaScriptCore (WebKit) and tinycc,
which are covered by the GNU Library and Lesser General Public Licenses below; you may change them, and debug such
changes. To use them changed: rebuild bun as its page below says, and then this program, whose source is under the MIT
licence, with that bun: \`bun .ci/build.ts\`.`;

/** The file that goes with every copy of the program. */
export function notices(packages: readonly Package[], runtime: Runtime): string {
  const parts = [`The fargate driver\n\n${readText(join(root, "LICENSE"))}`];
  // Many packages share one text.
  const byText = new Map<string, string[]>();
  for (const one of packages) {
    const text = textsOf(one, packages).join("\n\n");
    byText.set(text, [...(byText.get(text) ?? []), `${one.name} ${one.version} (${one.licence})`]);
  }
  for (const [text, names] of byText) parts.push(`${names.join("\n")}\n\n${text}`);
  parts.push(`bun ${runtime.version} (${runtime.licence})\n\n${RELINKING}\n\n${runtime.page}`);
  for (const file of ["LGPL-2.0.txt", "LGPL-2.1.txt"])
    parts.push(readText(join(dirname(import.meta.filename), "licences", file)));
  return `${parts.join(`\n\n${"=".repeat(80)}\n\n`)}\n`;
}
