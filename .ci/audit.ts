/**
 * Asks the registry for advisories about what is compiled into the program, and fails on high and critical ones:
 * `npm audit --omit=dev`, and bun, which is a development dependency and yet the program's runtime.
 *
 * A registry that has no audit endpoint, or does not answer, is no finding: then this says that it did not check, and
 * passes. Whatever it does not understand fails. "Clean" is only a report that counts packages and counts nothing bad.
 */
import { spawnSync } from "node:child_process";
import { join } from "node:path";
import * as v from "valibot";

const root = join(import.meta.dirname, "..");

/** What an audit came to, and the lines that say so. */
export interface Verdict {
  readonly outcome: "clean" | "found" | "not checked" | "not understood";
  readonly lines: readonly string[];
}

const SEVERITIES = ["info", "low", "moderate", "high", "critical"] as const;
const Severity = v.picklist(SEVERITIES);
const count = v.pipe(v.number(), v.integer(), v.minValue(0));

const ReportSchema = v.object({
  auditReportVersion: v.literal(2),
  vulnerabilities: v.record(
    v.string(),
    v.object({
      name: v.string(),
      severity: Severity,
      range: v.string(),
      // An advisory, or the name of another package of the report through which this one is affected.
      via: v.array(v.union([v.string(), v.object({ title: v.string(), url: v.string(), severity: Severity })])),
    }),
  ),
  metadata: v.object({
    vulnerabilities: v.object({ info: count, low: count, moderate: count, high: count, critical: count, total: count }),
    dependencies: v.object({ prod: count, total: count }),
  }),
});

const ErrorSchema = v.object({ message: v.string(), statusCode: v.optional(v.number()) });

/** The answers of a registry that has no audit endpoint, keeps it from this caller, or cannot serve it now. */
const notServed = (status: number) => [401, 403, 404, 405, 408, 410, 429].includes(status) || status >= 500;
/** npm's own words for a registry that was not reached. Its other errors, a lock file it cannot read, say nothing of it. */
const NOT_REACHED = /^(request to \S+ failed, reason: |network timeout at: |response timeout)/i;

/**
 * Judges what `npm audit --json` wrote to its standard output. `counts` says which packages the question was about.
 * The exit code has no part in it: npm's is 1 for findings of any severity, for no answer, and for its own faults.
 */
export function judgeAudit(output: string, counts: (name: string) => boolean = () => true): Verdict {
  const notUnderstood = (why: string): Verdict => ({
    outcome: "not understood",
    lines: [`npm audit's answer is not understood: ${why}`, output.trim().slice(0, 500) || "(nothing)"],
  });
  let answer: unknown;
  try {
    answer = JSON.parse(output);
  } catch {
    return notUnderstood("no JSON");
  }

  const error = v.safeParse(ErrorSchema, answer);
  if (error.success) {
    const { statusCode, message } = error.output;
    if (statusCode !== undefined && notServed(statusCode)) {
      // "405 Method Not Allowed - POST https://...": the address adds nothing.
      const status = message.split(" - ")[0];
      return { outcome: "not checked", lines: [`not checked: the registry serves no audit (${status})`] };
    }
    if (statusCode === undefined && NOT_REACHED.test(message)) {
      const why = /reason: (.*)$/s.exec(message)?.[1];
      // "connect ECONNREFUSED 10.0.0.1:443": the code says it.
      const reason = why ? (/\bE[A-Z_]{3,}\b/.exec(why)?.[0] ?? why) : "no answer in time";
      return { outcome: "not checked", lines: [`not checked: the registry does not answer (${reason})`] };
    }
    return notUnderstood("an error");
  }

  const report = v.safeParse(ReportSchema, answer);
  if (!report.success) return notUnderstood(report.issues[0].message);
  const { vulnerabilities, metadata } = report.output;
  if (metadata.dependencies.prod === 0) return notUnderstood("it looked at no package");
  const all = Object.values(vulnerabilities);
  for (const severity of SEVERITIES)
    if (all.filter((found) => found.severity === severity).length !== metadata.vulnerabilities[severity])
      return notUnderstood(`its list and its number of ${severity} findings differ`);

  const found = all.filter(({ name }) => counts(name));
  const bad = found.filter(({ severity }) => severity === "high" || severity === "critical");
  const lines = found
    .toSorted((a, b) => SEVERITIES.indexOf(b.severity) - SEVERITIES.indexOf(a.severity))
    .flatMap(({ name, range, severity, via }) =>
      via.map((cause) =>
        typeof cause === "string"
          ? `${severity}: ${name} ${range}: through ${cause}`
          : `${severity}: ${name} ${range}: ${cause.title} (${cause.url})`,
      ),
    );
  if (bad.length > 0) return { outcome: "found", lines };
  return { outcome: "clean", lines: [...lines, "nothing high or critical"] };
}

/** Runs npm's audit of this tree, with npm's own configuration of the registry, and judges its answer. */
function audit(what: string, options: readonly string[], counts?: (name: string) => boolean): boolean {
  // Offline, npm asks nobody and reports that nothing was found; so never offline, whatever the configuration says.
  const args = ["audit", "--json", "--offline=false", "--fetch-retries=1", "--fetch-timeout=30000", ...options];
  const { stdout, error } = spawnSync("npm", args, {
    cwd: root,
    encoding: "utf8",
    stdio: ["ignore", "pipe", "ignore"],
  });
  if (error) throw error;
  const { outcome, lines } = judgeAudit(stdout, counts);
  for (const line of lines) console.log(`${what}: ${line}`);
  return outcome === "clean" || outcome === "not checked";
}

if (import.meta.main) {
  const passed = [
    audit("dependencies", ["--omit=dev"]),
    audit("bun", ["--include=dev"], (name) => name === "bun" || name.startsWith("@oven/")),
  ];
  process.exit(passed.every(Boolean) ? 0 : 1);
}
