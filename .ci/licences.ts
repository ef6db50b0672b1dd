/**
 * Checks the licences of the packages that are compiled in, and writes the notices that every copy of the
 * program needs. The list of packages comes from the bundler, because the lock file also contains packages
 * that are not compiled in.
 */
import { existsSync, readdirSync, readFileSync } from "node:fs";
import { dirname, join, resolve, sep } from "node:path";

const root = join(import.meta.dirname, "..");

/** Licences that require only their notice. A person has to decide about any other. */
const ALLOWED = ["0BSD", "Apache-2.0", "BSD-2-Clause", "BSD-3-Clause", "ISC", "MIT", "MIT-0", "Unlicense"];

/** A package with files that are compiled in. */
export interface Package {
  readonly name: string;
  readonly version: string;
  /** An SPDX expression, or "" if the package has none. */
  readonly licence: string;
  /** The texts of its licence and notice files, sorted by file name. */
  readonly texts: readonly string[];
}

const readText = (path: string) => readFileSync(path, "utf8").replaceAll("\r\n", "\n").trim();

/** The licence in a package.json, in the current or an obsolete form. */
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

/**
 * The packages of a bundle's input files, sorted by name.
 *
 * @param inputs paths from a metafile: relative to the working directory
 * @throws Error when a file belongs neither to a package nor to this repository
 */
export function packagesOf(inputs: readonly string[]): Package[] {
  const directories = new Set<string>();
  for (const input of inputs) {
    if (input.startsWith("none:")) continue;
    const path = resolve(input);
    const own = /^(.*[/\\]node_modules[/\\](?:@[^/\\]+[/\\])?[^/\\]+)[/\\]/.exec(path)?.[1];
    if (own) directories.add(own);
    else if (!existsSync(path) || !path.startsWith(root + sep))
      throw new Error(`${input} is compiled in, but belongs to no package`);
  }
  const packages = [...directories].map(readPackage);
  // Not localeCompare: its order depends on the machine.
  const key = ({ name, version }: Package) => `${name}@${version}`;
  return packages.toSorted((a, b) => (key(a) < key(b) ? -1 : 1));
}

/** The licence texts of a package, or, if it has none, those of a package with the same scope and licence. */
function textsOf(item: Package, all: readonly Package[]): readonly string[] {
  if (item.texts.length > 0) return item.texts;
  const scope = /^@[^/]+\//.exec(item.name)?.[0];
  const sibling = all.find(
    ({ name, licence, texts }) => scope && name.startsWith(scope) && licence === item.licence && texts.length > 0,
  );
  return sibling?.texts ?? [];
}

/** The reasons why these packages may not be compiled in. */
export function licenceProblems(packages: readonly Package[]): string[] {
  return packages.flatMap((item) => {
    const name = `${item.name} ${item.version}`;
    // Only single licences and simple choices (A OR B) are understood. Other expressions are not allowed.
    const choice = /^\(?([\w.+-]+(?: OR [\w.+-]+)*)\)?$/.exec(item.licence)?.[1]?.split(" OR ") ?? [];
    if (!choice.some((licence) => ALLOWED.includes(licence)))
      return [`${name}: its licence (${item.licence || "none given"}) is not in the list of allowed licences`];
    if (textsOf(item, packages).length === 0) return [`${name}: it has no licence text`];
    return [];
  });
}

/** The licences of bun's runtime, from bun's own documentation of the same version. */
export interface Runtime {
  readonly version: string;
  readonly licence: string;
  readonly page: string;
  /** The libraries that it links, as its documentation names them. */
  readonly parts: readonly (readonly [name: string, licence: string])[];
}

/** @throws Error when the installed packages have another version, or the documentation a new format */
export function readRuntime(version: string): Runtime {
  const read = (...path: string[]) => readText(join(root, "node_modules", ...path));
  const licence = licenceOf(JSON.parse(read("bun", "package.json")));
  for (const name of ["bun", "bun-types"])
    if (JSON.parse(read(name, "package.json")).version !== version)
      throw new Error(`${name} is not of version ${version}`);
  const page = read("bun-types", "docs", "project", "license.mdx").replace(/^---\n.*?\n---\n+/s, "");
  const engine = /^Bun statically links JavaScriptCore \(and WebKit\),? which is (\S+) licensed\./m.exec(page)?.[1];
  const linked = /^## Linked libraries\n(.*?)^## /ms.exec(page)?.[1] ?? "";
  const plain = (cell: string) => cell.replace(/\[([^\]]*)\]\([^)]*\)/g, "$1").replaceAll("`", "");
  const rows = [...linked.matchAll(/^\| (.*?) +\| (.*?) +\|$/gm)].slice(2);
  if (!engine || rows.length === 0) throw new Error("the page with bun's licences has a new format: adapt readRuntime");
  const parts = rows.map(([, name = "", own = ""]) => [plain(name), plain(own)] as const);
  return { version, licence, page, parts: [["JavaScriptCore (WebKit)", engine], ...parts] };
}

/** The output of `npm run licences`. */
export function licenceList(packages: readonly Package[], runtime: Runtime): string {
  const rows = [...packages.map(({ name, version, licence }) => [name, version, licence])];
  rows.push(["bun", runtime.version, `${runtime.licence}; it links:`]);
  const width = (column: 0 | 1) => Math.max(...rows.map((row) => row[column]?.length ?? 0));
  const lines = rows.map(([name = "", version = "", licence]) =>
    [name.padEnd(width(0)), version.padEnd(width(1)), licence].join("  "),
  );
  return [...lines, ...runtime.parts.map(([name, licence]) => `  ${name}: ${licence}`)].join("\n");
}

const RELINKING = `The program is bun's runtime, with the packages above appended as data. bun links JavaScriptCore (WebKit) and
tinycc, which are under the GNU Library and Lesser General Public Licenses below; you may modify them, and debug your
modifications. To use a modified version, rebuild bun as described on its page below, and build this program with it.
The program's source is under the MIT licence; the command is \`bun .ci/build.ts\`.`;

/** The file of licence notices that accompanies every copy of the program. */
export function notices(packages: readonly Package[], runtime: Runtime): string {
  const parts = [`The fargate driver\n\n${readText(join(root, "LICENSE"))}`];
  // Many packages share one text.
  const byText = new Map<string, string[]>();
  for (const item of packages) {
    const text = textsOf(item, packages).join("\n\n");
    byText.set(text, [...(byText.get(text) ?? []), `${item.name} ${item.version} (${item.licence})`]);
  }
  for (const [text, names] of byText) parts.push(`${names.join("\n")}\n\n${text}`);
  parts.push(`bun ${runtime.version} (${runtime.licence})\n\n${RELINKING}\n\n${runtime.page}`);
  for (const file of ["LGPL-2.0.txt", "LGPL-2.1.txt"])
    parts.push(readText(join(dirname(import.meta.filename), "licences", file)));
  return `${parts.join(`\n\n${"=".repeat(80)}\n\n`)}\n`;
}
