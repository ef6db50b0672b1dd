/**
 * Asks the registry for advisories about the packages that are compiled into the program, and fails if there
 * is one of severity high or critical. These are the dependencies (`npm audit --omit=dev`) and bun, a
 * development dependency that is also the program's runtime.
 *
 * If the registry has no audit endpoint or does not answer, the audit prints that it did not check, and
 * passes. It fails if it does not understand the answer.
 */
import { spawnSync } from "node:child_process";
import { join } from "node:path";
import * as v from "valibot";

const root = join(import.meta.dirname, "..");

/** The result of an audit, and the lines that report it. */
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
      // Each is an advisory, or the name of another package in the report that affects this one.
      via: v.array(v.union([v.string(), v.object({ title: v.string(), url: v.string(), severity: Severity })])),
    }),
  ),
  metadata: v.object({
    vulnerabilities: v.object({ info: count, low: count, moderate: count, high: count, critical: count, total: count }),
    dependencies: v.object({ prod: count, total: count }),
  }),
});

const ErrorSchema = v.object({ message: v.string(), statusCode: v.optional(v.number()) });

/** HTTP statuses of a registry that has no audit endpoint, does not allow its use, or fails. */
const isNotServed = (status: number) => [401, 403, 404, 405, 408, 410, 429].includes(status) || status >= 500;
/** npm's messages for a registry that it did not reach. Other errors of npm do not match. */
const NOT_REACHED = /^(request to \S+ failed, reason: |network timeout at: |response timeout)/i;

/** The verdict on an error of npm; undefined if the registry did not cause it. */
function judgeError({ statusCode, message }: v.InferOutput<typeof ErrorSchema>): Verdict | undefined {
  if (statusCode !== undefined && isNotServed(statusCode)) {
    // "405 Method Not Allowed - POST https://...": without the URL.
    const status = message.split(" - ")[0];
    return { outcome: "not checked", lines: [`not checked: the registry serves no audit (${status})`] };
  }
  if (statusCode === undefined && NOT_REACHED.test(message)) {
    const reason = /reason: (.*)$/s.exec(message)?.[1];
    // "connect ECONNREFUSED 10.0.0.1:443": only the code.
    const code = reason ? (/\bE[A-Z_]{3,}\b/.exec(reason)?.[0] ?? reason) : "no answer in time";
    return { outcome: "not checked", lines: [`not checked: the registry does not answer (${code})`] };
  }
  return undefined;
}

/**
 * Evaluates the standard output of `npm audit --json`. Its exit code is useless here: 1 stands for findings
 * of any severity, for no answer, and for npm's own errors.
 *
 * @param isRelevant whether to report findings about this package
 */
export function judgeAudit(output: string, isRelevant: (name: string) => boolean = () => true): Verdict {
  const notUnderstood = (reason: string): Verdict => ({
    outcome: "not understood",
    lines: [`npm audit's answer is not understood: ${reason}`, output.trim().slice(0, 500) || "(nothing)"],
  });
  let answer: unknown;
  try {
    answer = JSON.parse(output);
  } catch {
    return notUnderstood("no JSON");
  }

  const error = v.safeParse(ErrorSchema, answer);
  if (error.success) return judgeError(error.output) ?? notUnderstood("an error");

  const report = v.safeParse(ReportSchema, answer);
  if (!report.success) return notUnderstood(report.issues[0].message);
  const { vulnerabilities, metadata } = report.output;
  if (metadata.dependencies.prod === 0) return notUnderstood("it covers no package");
  const all = Object.values(vulnerabilities);
  for (const severity of SEVERITIES)
    if (all.filter((finding) => finding.severity === severity).length !== metadata.vulnerabilities[severity])
      return notUnderstood(`its list and its number of ${severity} findings differ`);

  const relevant = all.filter(({ name }) => isRelevant(name));
  const isSevere = relevant.some(({ severity }) => severity === "high" || severity === "critical");
  const lines = relevant
    .toSorted((a, b) => SEVERITIES.indexOf(b.severity) - SEVERITIES.indexOf(a.severity))
    .flatMap(({ name, range, severity, via }) =>
      via.map((cause) =>
        typeof cause === "string"
          ? `${severity}: ${name} ${range}: through ${cause}`
          : `${severity}: ${name} ${range}: ${cause.title} (${cause.url})`,
      ),
    );
  if (isSevere) return { outcome: "found", lines };
  return { outcome: "clean", lines: [...lines, "nothing high or critical"] };
}

/** Runs npm's audit of this directory with npm's configured registry. Returns whether it passed. */
function audit(title: string, options: readonly string[], isRelevant?: (name: string) => boolean): boolean {
  // In offline mode npm reports no findings without asking the registry, so override that mode.
  const args = ["audit", "--json", "--offline=false", "--fetch-retries=1", "--fetch-timeout=30000", ...options];
  const { stdout, error } = spawnSync("npm", args, {
    cwd: root,
    encoding: "utf8",
    stdio: ["ignore", "pipe", "ignore"],
  });
  if (error) throw error;
  const { outcome, lines } = judgeAudit(stdout, isRelevant);
  for (const line of lines) console.log(`${title}: ${line}`);
  return outcome === "clean" || outcome === "not checked";
}

if (import.meta.main) {
  const passed = [
    audit("dependencies", ["--omit=dev"]),
    audit("bun", ["--include=dev"], (name) => name === "bun" || name.startsWith("@oven/")),
  ];
  process.exit(passed.every(Boolean) ? 0 : 1);
}
