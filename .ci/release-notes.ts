/**
 * Prints the section of CHANGELOG.md for a tag such as v1.0.0, as the description of its release:
 *
 *     bun .ci/release-notes.ts v1.0.0
 */
import { readFileSync } from "node:fs";
import { join } from "node:path";
import manifest from "../package.json" with { type: "json" };

/**
 * Returns the changelog's entries for a tag, without the section's heading.
 * @throws {Error} if the tag is not `v` and this version, or the changelog has no entries for it
 */
export function releaseNotes(changelog: string, tag: string, version: string): string {
  if (tag !== `v${version}`) throw new Error(`the tag is ${tag}, but the version in package.json is ${version}`);
  const sections = changelog.split(/^## /m).slice(1);
  const section = sections.find((section) => section.startsWith(`[${version}] - `));
  if (!section) throw new Error(`CHANGELOG.md has no section [${version}]`);
  const links = /^\[[^\]]+\]: .*$/gm; // of the headings, at the end of the file
  const notes = section.slice(section.indexOf("\n")).replace(links, "").trim();
  if (notes === "") throw new Error(`CHANGELOG.md has no entries for ${version}`);
  return `${notes}\n`;
}

if (import.meta.main) {
  const changelog = readFileSync(join(import.meta.dirname, "..", "CHANGELOG.md"), "utf8");
  process.stdout.write(releaseNotes(changelog, process.argv[2] ?? "", manifest.version));
}
