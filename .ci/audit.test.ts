/** Tests of the audit: its verdict on each answer of npm, and whole audits against a registry on loopback. */
import { createServer } from "node:http";
import { join } from "node:path";
import { describe, expect, onTestFinished, test } from "vitest";
import { type Finished, start } from "../fixtures/process.ts";
import { directory, setUp } from "../fixtures/test-support.ts";
import { projectRoot } from "../fixtures/world.ts";
import { judgeAudit } from "./audit.ts";

setUp();

describe("audit", () => {
  const npmReport = (
    ...found: { name: string; severity: string; range?: string; via?: readonly unknown[] }[]
  ): Record<string, unknown> => ({
    auditReportVersion: 2,
    vulnerabilities: Object.fromEntries(
      found.map(({ name, severity, range = "<2", via }) => [
        name,
        {
          name,
          severity,
          range,
          via: via ?? [{ title: `A hole in ${name}`, url: `https://advisory/${name}`, severity }],
        },
      ]),
    ),
    metadata: {
      vulnerabilities: {
        ...Object.fromEntries(
          ["info", "low", "moderate", "high", "critical"].map((severity) => [
            severity,
            found.filter((one) => one.severity === severity).length,
          ]),
        ),
        total: found.length,
      },
      dependencies: { prod: 38, dev: 281, optional: 77, peer: 0, peerOptional: 0, total: 341 },
    },
  });
  const npmError = (message: string, statusCode?: number) => ({
    message,
    ...(statusCode && { method: "POST", uri: "https://registry/audit", headers: {}, statusCode, body: "" }),
    error: { summary: "", detail: "" },
  });

  test.each<[why: string, answer: unknown, outcome: string, lines: (string | RegExp)[]]>([
    ["a report without findings", npmReport(), "clean", ["nothing high or critical"]],
    [
      "a moderate finding",
      npmReport({ name: "ssh2", severity: "moderate" }),
      "clean",
      ["moderate: ssh2 <2: A hole in ssh2 (https://advisory/ssh2)", "nothing high or critical"],
    ],
    [
      "a high finding and what is affected through it",
      npmReport(
        { name: "bowser", severity: "low" },
        { name: "asn1", severity: "high" },
        { name: "ssh2", severity: "high", range: "*", via: ["asn1"] },
      ),
      "found",
      [
        "high: asn1 <2: A hole in asn1 (https://advisory/asn1)",
        "high: ssh2 *: through asn1",
        "low: bowser <2: A hole in bowser (https://advisory/bowser)",
      ],
    ],
    ["a critical finding", npmReport({ name: "asn1", severity: "critical" }), "found", [/^critical: asn1/]],
    [
      "a registry without the endpoint",
      npmError("405 Method Not Allowed - POST https://registry/audit", 405),
      "not checked",
      ["not checked: the registry serves no audit (405 Method Not Allowed)"],
    ],
    ["an unavailable registry", npmError("503 Service Unavailable - POST x", 503), "not checked", [/503/]],
    [
      "a refused connection",
      npmError("request to https://registry/audit failed, reason: connect ECONNREFUSED 10.0.0.1:443"),
      "not checked",
      ["not checked: the registry does not answer (ECONNREFUSED)"],
    ],
    [
      "an untrusted certificate",
      npmError("request to https://registry/audit failed, reason: self-signed certificate in certificate chain"),
      "not checked",
      ["not checked: the registry does not answer (self-signed certificate in certificate chain)"],
    ],
    [
      "a missing answer",
      npmError("network timeout at: https://registry/audit"),
      "not checked",
      ["not checked: the registry does not answer (no answer in time)"],
    ],
    ["a question that the registry refuses", npmError("400 Bad Request - POST x", 400), "not understood", [/./, /./]],
    ["a page in place of an answer", npmError("invalid json response body at x"), "not understood", [/./, /./]],
    [
      "a lock file that npm cannot use",
      { error: { code: "ENOLOCK", summary: "no lock file" } },
      "not understood",
      [/./, /./],
    ],
    ["an empty object", {}, "not understood", [/./, /./]],
    ["another version of the report", { ...npmReport(), auditReportVersion: 3 }, "not understood", [/./, /./]],
    ["an unknown severity", npmReport({ name: "asn1", severity: "severe" }), "not understood", [/./, /./]],
    [
      "a number of findings that the list lacks",
      { ...npmReport(), metadata: npmReport({ name: "asn1", severity: "high" }).metadata },
      "not understood",
      [/number of high findings/, /./],
    ],
    [
      "a report about nothing",
      { ...npmReport(), metadata: { ...(npmReport().metadata as object), dependencies: { prod: 0, total: 0 } } },
      "not understood",
      [/no package/, /./],
    ],
  ])("judgeAudit judges %s", (_, answer, outcome, lines) => {
    const verdict = judgeAudit(JSON.stringify(answer));
    expect(verdict.outcome).toBe(outcome);
    expect(verdict.lines).toHaveLength(lines.length);
    for (const [at, line] of lines.entries())
      if (typeof line === "string") expect(verdict.lines[at]).toBe(line);
      else expect(verdict.lines[at]).toMatch(line);
  });

  test("judgeAudit refuses output that is not JSON", () => {
    for (const output of ["", "found 0 vulnerabilities\n", "null", "[]", "0"])
      expect(judgeAudit(output).outcome).toBe("not understood");
  });

  test("judgeAudit counts only the runtime of the development dependencies", () => {
    const output = JSON.stringify(
      npmReport({ name: "vitest", severity: "critical" }, { name: "bun", severity: "high" }),
    );
    expect(judgeAudit(output, (name) => name === "bun")).toEqual({
      outcome: "found",
      lines: ["high: bun <2: A hole in bun (https://advisory/bun)"],
    });
  });

  /** Runs the audit against a registry with this answer, or against a closed port without one. */
  async function auditAt(answer?: { status: number; advisories?: Record<string, object[]> }): Promise<Finished> {
    const requests: string[] = [];
    const registry = createServer((request, response) => {
      requests.push(`${request.method} ${request.url}`);
      request.resume().on("end", () => {
        // For a package with an advisory, npm also requests the list of its versions.
        const name = decodeURIComponent(request.url?.slice(1) ?? "");
        const version = { name, version: "0.0.1", dist: {} };
        const body = request.method === "GET" ? { name, versions: { "0.0.1": version } } : (answer?.advisories ?? {});
        response.statusCode = answer?.status ?? 500;
        response.setHeader("Content-Type", "application/json");
        response.end(JSON.stringify(body));
      });
    });
    await new Promise<void>((resolve) => registry.listen(0, "127.0.0.1", resolve));
    onTestFinished(() => void registry.close());
    const { port } = registry.address() as { port: number };
    if (!answer) await new Promise((resolve) => registry.close(resolve));
    const env = {
      PATH: pathWithoutBun,
      HOME: directory(),
      // Empty, because npm caches its conclusions about advisories.
      NPM_CONFIG_CACHE: directory(),
      NPM_CONFIG_REGISTRY: `http://127.0.0.1:${port}/`,
      // In offline mode, npm would report no findings without a request. The audit has to override it.
      NPM_CONFIG_OFFLINE: "true",
    };
    const finished = await start([process.execPath, join(projectRoot, ".ci", "audit.ts")], { env }).finished;
    if (answer) expect(requests.filter((request) => request.startsWith("POST "))).toHaveLength(2);
    return finished;
  }
  // `bun --bun` replaces node by bun, also for child processes. npm needs Node.js.
  const pathWithoutBun = (process.env.PATH ?? "")
    .split(":")
    .filter((entry) => !entry.includes("bun-node"))
    .join(":");

  // It passes, and says so, if the registry has no audit.
  test("npm run audit fails on a high finding", async () => {
    const advisory = (severity: string) => ({
      id: 1,
      url: "https://advisory/1",
      title: "Planted",
      severity,
      vulnerable_versions: "<1000",
      cwe: [],
      cvss: { score: 0, vectorString: null },
    });
    const [high, moderate, runtime, absent, away] = await Promise.all([
      auditAt({ status: 200, advisories: { ssh2: [advisory("high")] } }),
      auditAt({ status: 200, advisories: { ssh2: [advisory("moderate")], vitest: [advisory("critical")] } }),
      auditAt({ status: 200, advisories: { bun: [advisory("critical")] } }),
      auditAt({ status: 405 }),
      auditAt(),
    ]);
    expect(high.stdout.toString()).toMatch(/^dependencies: high: ssh2 .*: Planted \(https:\/\/advisory\/1\)$/m);
    expect(high.code).toBe(1);
    expect(moderate.stdout.toString()).toMatch(/^dependencies: moderate: ssh2 .*: Planted/m);
    expect(moderate.code).toBe(0);
    expect(runtime.stdout.toString()).toMatch(/^bun: critical: bun .*: Planted/m);
    expect(runtime.code).toBe(1);
    expect(absent.stdout.toString().match(/not checked: the registry serves no audit \(405 /g)).toHaveLength(2);
    expect(absent.code).toBe(0);
    expect(away.stdout.toString().match(/not checked: the registry does not answer \(ECONNREFUSED\)/g)).toHaveLength(2);
    expect(away.code).toBe(0);
  });
});
