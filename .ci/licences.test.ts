/** Tests of the check of licences. */
import { describe, expect, test } from "vitest";
import { setUp } from "../fixtures/test-support.ts";
import { licenceOf, licenceProblems, packagesOf } from "./licences.ts";

setUp();

describe("licences", () => {
  test("licenceProblems reports a licence that is unknown or has no text", () => {
    const made = (name: string, licence: string, texts = ["text"]) => ({ name, version: "1.0.0", licence, texts });
    const fine = [
      made("a", "MIT"),
      made("b", "(GPL-3.0 OR ISC)"),
      made("@c/d", "Apache-2.0"),
      made("@c/e", "Apache-2.0", []),
    ];
    expect(licenceProblems(fine)).toEqual([]);
    for (const licence of [
      "",
      "GPL-3.0-only",
      "LGPL-2.1",
      "MIT AND GPL-2.0",
      "(MIT OR ISC) AND GPL-2.0",
      "SEE LICENSE",
    ])
      expect(licenceProblems([...fine, made("f", licence)])).toEqual([
        expect.stringMatching(/^f 1\.0\.0: its licence \(/),
      ]);
    for (const without of [made("f", "MIT", []), made("@c/f", "MIT", []), made("@g/f", "Apache-2.0", [])])
      expect(licenceProblems([...fine, without])).toEqual([`${without.name} 1.0.0: it has no licence text`]);
    expect(licenceOf({ license: { type: "MIT" } })).toBe("MIT");
    expect(licenceOf({ licenses: [{ type: "MIT" }, { type: "GPL-2.0" }] })).toBe("MIT OR GPL-2.0");
    expect(licenceOf({})).toBe("");
    expect(() => packagesOf(["/etc/passwd"])).toThrow("/etc/passwd is compiled in, but belongs to no package");
  });
});
