/**
 * Compares the documents with the driver: links, settings, options, messages, numbers and the names of tests. The tables
 * of settings and the included files are generated; `UPDATE_DOCS=true` rewrites them. Needs no container and no
 * compiled driver.
 */
import { spawnSync } from "node:child_process";
import { existsSync, globSync, readFileSync, writeFileSync } from "node:fs";
import { dirname, extname, join, normalize } from "node:path";
import { parse as parseToml, stringify as stringifyToml } from "smol-toml";
import * as v from "valibot";
import { describe, expect, test } from "vitest";
import { TARGETS } from "../.ci/build.ts";
import { ConfigSchema, parseCommandLine, readConfig, startRetryPause } from "../fargate.ts";
import manifest from "../package.json" with { type: "json" };

const root = join(import.meta.dirname, "..");
const read = (path: string) => readFileSync(join(root, path), "utf8");
const driver = read("fargate.ts");

/** Every document, by its path from the root of the repository. */
const documents = globSync(["*.md", "docs/*.md", "examples/**/*.md", "fixtures/*.md", ".gitlab/**/*.md"], {
  cwd: root,
}).sort();
/** Those that describe the driver to its users, and do not name what does not exist yet (as CONTRIBUTING.md does). */
const pages = documents.filter((path) => /^(README\.md$|docs\/)/.test(path));

/** A document without its code blocks. */
const proseOf = (path: string) => read(path).replace(/^( *)(`{3,})[\s\S]*?^\1\2$/gm, "");
const wordsOf = (path: string) => read(path).replace(/\s+/g, " ");

/** The code blocks of a document in a language, without their indentation. */
const blocksOf = (path: string, language: string) =>
  [...read(path).matchAll(new RegExp(`^( *)\`\`\`${language}\\n([\\s\\S]*?)^\\1\`\`\`$`, "gm"))].map(
    ([, indent = "", text = ""]) => text.replaceAll(new RegExp(`^${indent}`, "gm"), ""),
  );
const blocks = (language: string) =>
  pages.flatMap((path) =>
    blocksOf(path, language).map((text, index) => ({ name: `${path}, block ${index + 1}`, text })),
  );

/** The code spans of a document. */
const spansOf = (path: string) => [...proseOf(path).matchAll(/`([^`\n]+)`/g)].map(([, span = ""]) => span);

/** Rewrites what is generated in a document; unless UPDATE_DOCS is set, the document must be so already. */
function expectGenerated(path: string, generate: (text: string) => string): void {
  const text = read(path);
  const generated = generate(text);
  if (process.env.UPDATE_DOCS === "true") {
    if (generated !== text) writeFileSync(join(root, path), generated);
  } else expect(generated, `${path}: regenerate it with UPDATE_DOCS=true npm run test:quick`).toBe(text);
}

test("README.md has at most 150 lines", () => {
  expect(read("README.md").trimEnd().split("\n").length).toBeLessThanOrEqual(150);
});

test("README.md leads to every page", () => {
  for (const path of documents.filter((path) => /^(docs\/.*|examples\/README\.md|[A-Z]+\.md)$/.test(path)))
    if (path !== "README.md") expect(read("README.md")).toContain(`(${path}`);
});

describe("links", () => {
  /** The anchors of a document's headings, as GitLab and GitHub make them. */
  const anchorsOf = (path: string) =>
    [...proseOf(path).matchAll(/^#+ (.*)$/gm)].map(([, heading = ""]) =>
      heading
        .replace(/[`*]|\]\(.*?\)|\[/g, "")
        .toLowerCase()
        .replace(/[^\p{L}\p{N}_ -]/gu, "")
        .replaceAll(" ", "-"),
    );

  test.each(documents)("%s: relative links lead to files and headings", (path) => {
    const targets = [...proseOf(path).matchAll(/\]\(([^)\s]+)\)/g)].map(([, target = ""]) => target);
    for (const target of targets.filter((target) => !/^[a-z]+:/.test(target))) {
      const [file = "", anchor] = target.split("#");
      const linked = file === "" ? path : normalize(join(dirname(path), file));
      expect(existsSync(join(root, linked)), `${path}: ${target}`).toBe(true);
      if (anchor !== undefined) expect(anchorsOf(linked), `${path}: ${target}`).toContain(anchor);
    }
  });

  test("no two headings of a page have the same anchor, nor one on which GitLab and GitHub differ", () => {
    for (const path of documents) {
      const anchors = anchorsOf(path).filter((anchor) => path !== "CHANGELOG.md" || !/^(added|changed)$/.test(anchor));
      expect(anchors, path).toEqual([...new Set(anchors)]);
      for (const anchor of anchors) expect(anchor, path).not.toMatch(/--|^-|-$/);
    }
  });
});

describe("included files", () => {
  const LANGUAGES: Record<string, string> = { ".toml": "toml", ".json": "json", ".service": "ini", ".timer": "ini" };
  const MARKS = /^<!-- include (\S+) -->\n[\s\S]*?^<!-- end include -->$/gm;

  test.each(pages)("%s shows them as they are", (path) => {
    expectGenerated(path, (text) =>
      text.replace(MARKS, (_, file: string) => {
        const fence = `\`\`\`${LANGUAGES[extname(file)] ?? "text"}`;
        return `<!-- include ${file} -->\n\n${fence}\n${read(file)}\`\`\`\n\n<!-- end include -->`;
      }),
    );
    expect(read(path).match(/<!-- (include .*|end include) -->/g)?.length ?? 0).toBe(
      2 * (read(path).match(MARKS)?.length ?? 0),
    );
  });

  test("docs/permissions.md includes every policy", () => {
    for (const file of globSync("examples/iam/*.json", { cwd: root }))
      expect(read("docs/permissions.md")).toContain(`<!-- include ${file} -->`);
  });
});

// ---------------------------------------------------------------------------------------------------------
// Settings
// ---------------------------------------------------------------------------------------------------------

type Schema = v.GenericSchema;
type Action = { type: string; requirement?: unknown };

const unwrap = (schema: Schema): Schema => ("wrapped" in schema ? (schema.wrapped as Schema) : schema);
/** A schema, or an action of a pipe, with all that it consists of. */
const partsOf = (schema: Schema): (Schema & Action)[] =>
  "pipe" in schema ? (schema.pipe as Schema[]).flatMap(partsOf) : [schema as Schema & Action];
const partOf = (schema: Schema, type: string) => partsOf(schema).find((part) => part.type === type);
const entriesOf = (schema: Schema): Record<string, Schema> => {
  const inner = unwrap(schema);
  const object = partOf(inner, "object");
  if (object && "entries" in object) return object.entries as Record<string, Schema>;
  const list = partOf(inner, "array");
  return list && "item" in list ? entriesOf(list.item as Schema) : {};
};
const isTable = (schema: Schema) => partOf(unwrap(schema), "object") !== undefined;

/** The schema at a path such as `Fargate.CapacityProviderStrategy`. */
const schemaAt = (path: string): Schema =>
  path
    .split(".")
    .filter(Boolean)
    .reduce((schema, key) => entriesOf(schema)[key] as Schema, ConfigSchema as Schema);
/** The settings of a table: those that are not tables themselves. */
const settingsOf = (path: string) => Object.entries(entriesOf(schemaAt(path))).filter(([, schema]) => !isTable(schema));

const TABLES = ["", "Fargate", "Fargate.CapacityProviderStrategy", "TaskMetadata", "SSH"];
const allSettings = TABLES.flatMap((table) => settingsOf(table).map(([key, schema]) => ({ table, key, schema })));
const tableOf = (key: string) => allSettings.find((setting) => setting.key === key)?.table;

const minimal = {
  Fargate: { Cluster: "c", Region: "us-east-2", Subnet: "s", SecurityGroup: "g", TaskDefinition: "t" },
  TaskMetadata: { Directory: "/d" },
  SSH: { Username: "root" },
};
type Settings = Record<string, Record<string, unknown>>;
const minimalToml = stringifyToml(minimal);

const help = (...command: string[]) => {
  const program = [process.execPath, "--no-env-file", "--config=/dev/null", join(root, "fargate.ts")] as const;
  const { status, stdout } = spawnSync(program[0], [...program.slice(1), ...command, "--help"], { encoding: "utf8" });
  expect(status).toBe(0);
  return stdout;
};
const helpTexts = [[], ["custom"], ["custom", "run"], ["sweep"]].map((command) => help(...command));
/** Every option of the driver, with the name of its value if it has one. */
const options = new Map(
  helpTexts.flatMap((text) =>
    [...text.matchAll(/(--[\w-]+)(?: <(\w+)>)?/g)].map(([, name = "", value]) => [name, value]),
  ),
);

/** The options that override a setting, and the variable of a job that does. Both are found by trying. */
function overridesOf(table: string, key: string): string[] {
  const byOption = [...options].flatMap(([name, value]) => {
    if (name === "--help" || name === "--version") return []; // they print
    for (const example of value ? ["debug", "text", "x"] : [undefined])
      try {
        const parsed = parseCommandLine([name, ...(example ? [example] : []), "custom", "prepare"]);
        return parsed?.options[key as keyof typeof parsed.options] === undefined ? [] : [name];
      } catch {}
    return [];
  });
  const variable = `FARGATE_${key.replace(/(?<!^)(?=[A-Z])/g, "_").toUpperCase()}`;
  const { config } = readConfig(minimalToml, "fargate.toml", {}, { [`CUSTOM_ENV_${variable}`]: "from the job" });
  const value = (config as unknown as Settings)[table]?.[key];
  return [...byOption, ...(value === "from the job" ? [variable] : [])];
}

/** The type of a setting's value, with its unit and limits. */
function typeOf(schema: Schema): string {
  const inner = unwrap(schema);
  const limit = (type: string) => partOf(inner, type)?.requirement;
  const words = partOf(inner, "picklist");
  if (words && "options" in words) return (words.options as string[]).map((word) => `\`${word}\``).join(", ");
  const isInSeconds = /\bseconds\b/.test(v.getDescription(inner) ?? "");
  if (partOf(inner, "number"))
    return `${isInSeconds ? "seconds" : "number"}, ${limit("min_value")} to ${limit("max_value")}`;
  if (partOf(inner, "boolean")) return "`true` or `false`";
  if (partOf(inner, "array")) {
    const [min, max] = [limit("min_length"), limit("max_length")];
    return max === undefined ? "list" : `list of ${min ?? 0} to ${max}`;
  }
  if (partOf(inner, "custom")) return `table of at most ${limit("max_entries")}`;
  return "text";
}

/** A setting's description, without what the column for the type has already. */
const meaningOf = (schema: Schema) =>
  (v.getDescription(unwrap(schema)) ?? "")
    .replace(/, a whole number from \d+ to \d+$/, "")
    .replace(/: true or false$/, "")
    .replace(partOf(unwrap(schema), "picklist") ? /: [\w-]+(, [\w-]+)+$/ : /$^/, "")
    .replace(/^a list of \d+ to \d+: /, "");

function defaultOf(schema: Schema): string {
  if (!("wrapped" in schema)) return "required";
  const value = v.getDefault(schema as never) as unknown;
  const isNothing = value === undefined || value === "" || JSON.stringify(value) === "{}";
  return isNothing ? "" : `\`${Array.isArray(value) ? JSON.stringify(value).replaceAll(",", ", ") : value}\``;
}

const cell = (text: string) => text.replaceAll("|", "\\|").replaceAll("*", "\\*");
const row = (...cells: string[]) => `| ${cells.join(" | ")} |`.replaceAll("|  |", "| |");

function settingsTable(table: string): string {
  const rows = settingsOf(table).map(([key, schema]) =>
    row(
      `\`${key}\``,
      typeOf(schema),
      defaultOf(schema),
      cell(meaningOf(schema)),
      overridesOf(table, key)
        .map((name) => `\`${name}\``)
        .join(", "),
    ),
  );
  const head = ["setting", "type", "default", "meaning", "overridden by"];
  return [row(...head), row(...head.map(() => "---")), ...rows].join("\n");
}

describe("settings", () => {
  const MARKS = /^<!-- settings ?(\S*) -->\n[\s\S]*?^<!-- end settings -->$/gm;

  test("docs/settings.md has the tables of the schema", () => {
    expectGenerated("docs/settings.md", (text) =>
      text.replace(MARKS, (_, table: string) => {
        const mark = `settings ${table}`.trimEnd();
        return `<!-- ${mark} -->\n\n${settingsTable(table)}\n\n<!-- end settings -->`;
      }),
    );
    expect([...read("docs/settings.md").matchAll(MARKS)].map(([, table]) => table)).toEqual(TABLES);
  });

  test("these tables have every setting", () => {
    const leaves = (schema: Schema): string[] =>
      Object.entries(entriesOf(schema)).flatMap(([key, inner]) => [...(isTable(inner) ? [] : [key]), ...leaves(inner)]);
    expect(new Set(allSettings.map(({ key }) => key))).toEqual(new Set(leaves(ConfigSchema)));
    // One table stands for both lists of capacity providers.
    expect(entriesOf(schemaAt("Fargate.FallbackCapacityProviderStrategy"))).toBe(
      entriesOf(schemaAt("Fargate.CapacityProviderStrategy")),
    );
  });

  test("every setting, and what overrides it, is found", () => {
    expect(allSettings.length).toBeGreaterThan(35);
    for (const { schema } of allSettings) expect(meaningOf(schema)).not.toBe("");
    expect(overridesOf("Fargate", "TaskDefinition")).toEqual(["--task-def", "FARGATE_TASK_DEFINITION"]);
    expect(overridesOf("", "LogLevel")).toEqual(["--debug", "--log-level"]);
    expect(overridesOf("SSH", "Port")).toEqual([]);
  });

  /** Settings, completed with those that are required. */
  const complete = (settings: Settings): string => {
    const whole: Settings = { ...minimal, ...settings };
    for (const table of Object.keys(minimal) as (keyof typeof minimal)[])
      whole[table] = { ...minimal[table], ...settings[table] };
    if (whole.Fargate?.Subnets) delete whole.Fargate.Subnet;
    if (whole.Fargate?.SecurityGroups) delete whole.Fargate.SecurityGroup;
    return stringifyToml(whole);
  };
  const toml = blocks("toml").map(({ name, text }) => ({ name, settings: parseToml(text) as unknown as Settings }));

  test.each(toml.filter(({ settings }) => !("runners" in settings)))("$name is accepted", ({ name, settings }) => {
    expect(readConfig(complete(settings), name, {}, {}).warnings).toEqual([]);
  });

  test("README.md has a whole configuration", () => {
    const [text = ""] = blocksOf("README.md", "toml");
    expect(readConfig(text, "fargate.toml", {}, {}).warnings).toEqual([]);
  });

  test.each(pages)("%s: settings with a value are accepted", (path) => {
    for (const span of spansOf(path)) {
      const [, key = "", value = ""] = /^([A-Z]\w+) = (.+)$/.exec(span) ?? [];
      if (!key || value.includes("...")) continue;
      const table = tableOf(key);
      expect(table, `${path}: ${span}`).toBeDefined();
      const settings = parseToml(table ? `[${table}]\n${span}` : span) as unknown as Settings;
      expect(readConfig(complete(settings), span, {}, {}).warnings).toEqual([]);
    }
  });

  /** Words in the style of settings that are none: of AWS, of OpenSSH, of GitLab. */
  const OTHERS = new Set(["SetEnv"]);

  test.each(pages)("%s: what looks like a setting is one", (path) => {
    for (const span of spansOf(path))
      if (/^[A-Z][a-z]+([A-Z]+[a-z]*)+$/.test(span) && !OTHERS.has(span))
        expect([path, span, tableOf(span)]).not.toContain(undefined);
  });
});

// ---------------------------------------------------------------------------------------------------------
// Commands
// ---------------------------------------------------------------------------------------------------------

describe("commands", () => {
  const scripts = Object.keys(manifest.scripts);

  test("every npm script that a document names exists, and docs/development.md names each", () => {
    for (const path of documents)
      for (const [, name] of read(path).matchAll(/\bnpm run (?:--silent )?([\w:-]+)/g))
        expect(scripts, path).toContain(name);
    const named = [...read("docs/development.md").matchAll(/^\| `npm (?:run )?([\w:-]+)` \|/gm)].map(
      ([, name]) => name,
    );
    expect(named.sort()).toEqual(scripts.sort());
  });

  /** Command lines in the documents that call the driver. */
  const calls = pages.flatMap((path) =>
    [...blocksOf(path, "sh").flatMap((text) => text.split("\n")), ...spansOf(path)].flatMap((line) => {
      const [, words] = /^(?:sudo )?(?:\S*\/)?fargate(?:-linux-amd64)? ([^|>;&:]*)$/.exec(line.trim()) ?? [];
      return words ? [{ path, line: words }] : [];
    }),
  );

  test("every command line that calls the driver is accepted", () => {
    expect(calls.length).toBeGreaterThan(8);
    for (const { path, line } of calls.filter(({ line }) => !/--(help|version)$/.test(line)))
      expect(
        () => parseCommandLine(line.replace(/ ID$/, " 0123456789ab").split(" ")),
        `${path}: ${line}`,
      ).not.toThrow();
  });

  test("docs/settings.md has every command and option, and no other", () => {
    const text = read("docs/settings.md").split("\n## Command line\n")[1]?.split("\n## ")[0] ?? "";
    const named = [...text.matchAll(/^\| `(?:sweep )?(--[\w-]+)(?: [A-Z]+)?` \|/gm)].map(([, name]) => name);
    expect(named.sort()).toEqual([...options.keys()].sort());
    for (const [, command = ""] of text.matchAll(/^\| `fargate ([\w ]+?)(?: SCRIPT STAGE)?` \|/gm)) {
      const operands = command.endsWith("run") ? ["SCRIPT", "STAGE"] : [];
      expect(parseCommandLine([...command.split(" "), ...operands])?.command).toBe(command.split(" ").at(-1));
    }
    for (const [, command = "", short = ""] of text.matchAll(/^\| `fargate custom (\w+)[\w ]*` \| `([\w ]+)` \|/gm)) {
      const operands = command === "run" ? ["SCRIPT", "STAGE"] : [];
      expect(parseCommandLine([...short.split(" "), ...operands])?.command).toBe(command);
    }
  });

  test.each(blocks("sh"))("$name is a shell script", ({ text }) => {
    const { status, stderr } = spawnSync("bash", ["-n"], { input: text, encoding: "utf8" });
    expect({ status, stderr }).toEqual({ status: 0, stderr: "" });
  });

  test.each(blocks("json"))("$name is JSON", ({ text }) => {
    expect(() => JSON.parse(text)).not.toThrow();
  });

  test.each(blocks("yaml"))("$name holds jobs", ({ text }) => {
    for (const job of Object.values(Bun.YAML.parse(text) as Record<string, object>)) {
      expect(job).toHaveProperty("script");
      for (const line of [(job as { script: string | string[] }).script].flat())
        expect(spawnSync("bash", ["-n"], { input: line }).status, line).toBe(0);
    }
  });

  test("docs/installation.md has every file of a release", () => {
    const files = [
      ...read("docs/installation.md").matchAll(/^\| `([\w-]+)` \| (?:Linux|macOS|the same|licences|checks)/gm),
    ];
    const made = Object.keys(TARGETS).map((target) => `fargate-${target}`);
    expect(files.map(([, file]) => file)).toEqual([...made, "THIRD-PARTY-LICENSES", "SHA256SUMS"]);
    for (const [name] of read("README.md").matchAll(/\bfargate-(linux|darwin)[\w-]+/g)) expect(made).toContain(name);
  });
});

// ---------------------------------------------------------------------------------------------------------
// Messages, numbers and tests
// ---------------------------------------------------------------------------------------------------------

describe("claims", () => {
  const faults = read("docs/faults.md");

  test("the messages in docs/troubleshooting.md are the driver's", () => {
    const printed = driver.replace(/\$\{\w+ \? "([^"]*)" : ""\}/g, "$1"); // with what the driver may insert
    const tests = globSync("*.test.ts", { cwd: root }).map(read).join("\n"); // for messages of libraries
    const text = read("docs/troubleshooting.md").split("\n## Messages of the official driver\n")[0] ?? "";
    const cells = [...text.matchAll(/^\| (`.*?) \| /gm)].map(([, first = ""]) => first.split(" (")[0] ?? "");
    const messages = cells.flatMap((first) => [...first.matchAll(/`([^`]+)`/g)].map(([, message = ""]) => message));
    expect(messages.length).toBeGreaterThan(60);
    for (const message of messages)
      for (const part of message
        .split("...")
        .map((part) => part.replace(/^[\s:;,]+|[\s:;,]+$/g, ""))
        .filter((part) => part.length > 4))
        expect(printed.includes(part) || faults.includes(part) || tests.includes(part), `${message}: "${part}"`).toBe(
          true,
        );
  });

  /** Words of the official driver and of its guide, the fault that leads to them, and our words for it. */
  const TROUBLES: [theirs: string, fault: string, ours: string][] = [
    [
      "No Container Instances were found in your cluster",
      "RunTask is refused: no default strategy",
      "ecs:RunTask was refused: InvalidParameterException: No Container Instances were found in your cluster.",
    ],
    [
      "file does not exist",
      "there is no record when a script is to run",
      "there is no task for this job: no finished record",
    ],
    ["connect: connection timed out", "the task's address is silent", "nothing answered for"],
    ["connect: connection timed out", "the connection of a run times out", "nothing answered for"],
    ["connect: connection refused", "the task's address is refusing", "ECONNREFUSED"],
    ["connect: connection refused", "the connection of a run is refused", "ECONNREFUSED"],
    [
      "unable to authenticate, attempted methods [none publickey]",
      "the container refuses the key",
      "the server refused the key",
    ],
    ["unable to connect to ECS", "ECS cannot be reached", "ecs:RunTask got no answer"],
    [
      "unable to connect to worker ECS task via ssh",
      "the task's address is refusing",
      "no login worked within ConnectTimeout",
    ],
    [
      "signature algorithm ssh-rsa not in PubkeyAcceptedAlgorithms",
      "the key is RSA, and the container's sshd refuses SHA-1 signatures",
      "",
    ],
    ["no credentials to access AWS", "a script needs the task role's credentials", ""],
  ];
  test.each(TROUBLES)("docs/troubleshooting.md answers: %s (%s)", (theirs, fault, ours) => {
    const lines = (path: string) => read(path).split("\n");
    expect(lines("docs/troubleshooting.md").filter((line) => line.includes(theirs) && line.includes(ours))).not.toEqual(
      [],
    );
    expect(lines("docs/faults.md").find((line) => line.startsWith(`| ${fault} |`))).toContain(ours);
  });

  test("what the documents quote of the driver's log is in it", () => {
    const quotes: [path: string, quote: string][] = [
      ["docs/jobs.md", "the script may still run in the container"],
      ["docs/jobs.md", "stopped by "],
      ["docs/worker-images.md", "PassEnvironment has no effect"],
      ["README.md", "Ready: logged in to "],
      ["README.md", "Starting a task of "],
      ["docs/moving.md", "Ready: logged in to "],
      ["docs/orphans.md", "fargate sweep: "],
    ];
    for (const [path, quote] of quotes) {
      expect(wordsOf(path), path).toContain(quote);
      expect(driver).toContain(quote);
    }
    const templates = [...driver.matchAll(/log(?:\.info|\[level\])\("([^"]+)"/g)].map(
      ([, template = ""]) => new RegExp(`Z ${template.replace(/[()]/g, "\\$&").replace(/\{\w+\}/g, "\\S+")}$`),
    );
    const logged = read("README.md").match(/^\d{4}-\S+Z .*$/gm) ?? [];
    expect(logged).toHaveLength(3);
    for (const line of logged)
      expect(
        templates.some((template) => template.test(line)),
        line,
      ).toBe(true);
    // The two kinds of lines that a reader of `npm start`'s log is told to expect.
    const job = globSync("fixtures/*.ts", { cwd: root }).map(read).join("\n");
    for (const line of ["Missing gitlab-runner. ", "WARNING: Starting with version 17.0 "])
      expect([job.includes(line), wordsOf("README.md").includes(line)]).toEqual([true, true]);
  });

  /** A constant of the driver, such as `const BEAT = 5_000;` or `const LOCK_EXPIRY_MS = 4 * BEAT;`. */
  const constant = (name: string): number => {
    const [, expression] = new RegExp(`\\bconst ${name} = ([\\w *]+);`).exec(driver) ?? [];
    if (!expression) throw new Error(`the driver has no constant ${name}`);
    return expression.split(/ \* (?!\*)/).reduce((product, factor) => {
      const [base = "", exponent] = factor.replaceAll("_", "").split(" ** ");
      if (/^[A-Z]/.test(factor)) return product * constant(factor);
      return product * Number(base) ** Number(exponent ?? 1);
    }, 1);
  };
  /** A field of a constant that is an object. */
  const field = (name: string, key: string): number => {
    const [, value] = new RegExp(`\\bconst ${name} = \\{[^}]*\\b${key}: ([\\d_]+)`).exec(driver) ?? [];
    if (!value) throw new Error(`the driver's ${name} has no ${key}`);
    return Number(value.replaceAll("_", ""));
  };
  const standard = (path: string) => v.getDefault(schemaAt(path) as never) as unknown;
  const limitOf = (path: string, type: string) => partOf(unwrap(schemaAt(path)), type)?.requirement;

  test("numbers in the documents are those of the driver", () => {
    const grace = standard("SSH.CancelGracePeriod");
    const claims: Record<string, string[]> = {
      "docs/jobs.md": [
        `\`CancelGracePeriod\` seconds later (default ${grace})`,
        `\`CancelGracePeriod\` is at most ${limitOf("SSH.CancelGracePeriod", "max_value")} so that`,
        `stops its task within ${Math.ceil(constant("PREPARE_SHUTDOWN_MS") / 1000)} seconds`,
        `waits up to ${constant("RUN_TASK_GRACE_MS") / 1000} of these seconds for the answer`,
        `notices within ${constant("LOCK_TOUCH_MS") / 1000} seconds that the process that started it has ended`,
        `until the filter ends, at most ${field("DRAIN", "filter") / 1000} seconds`,
        `nothing for ${field("DRAIN", "silence")} ms, at most ${field("DRAIN", "background") / 1000} seconds`,
        `up to ${constant("MAX_BUFFERED") / 2 ** 20} MiB written after the shell has exited`,
        `refusing the key for ${constant("KEY_REFUSAL_MS") / 1000} seconds`,
        `not heard from the task for ${constant("ADDRESS_TRUST_MS") / 1000} seconds`,
        `waits about ${startRetryPause(1, 1) / 1000} seconds between attempts`,
        `up to about ${startRetryPause(100, 1) / 1000} seconds`,
        `(\`KeepAliveInterval\`, default ${standard("SSH.KeepAliveInterval")} seconds)`,
      ],
      "docs/orphans.md": [
        `it does so within ${Math.ceil(constant("PREPARE_SHUTDOWN_MS") / 1000)} seconds`,
        ...(constant("STOP_RETRY_MS") === 60_000 ? ["does not succeed within a minute"] : []),
        `${constant("SWEEP_TASKS_AFTER") / 60} minutes after its start`,
        ...(constant("SWEEP_RECORDS_AFTER") === 3_600 ? ["Records older than an hour"] : []),
        `\`AbandonedAfter\` (default ${standard("Fargate.AbandonedAfter")} seconds)`,
        `The job's timeout counts as ${constant("ASSUMED_JOB_TIMEOUT") / 3600} hours`,
        `touches it every ${constant("LOCK_TOUCH_MS") / 1000} seconds`,
        `counts as dead ${constant("LOCK_EXPIRY_MS") / 1000} seconds after its last touch`,
        `it looks again after ${constant("LOCK_EXPIRY_MS") / 1000} seconds`,
        ...(Number(standard("Fargate.AbandonedAfter")) === 3 * 5 * 60 ? ["`AbandonedAfter` is three times that"] : []),
      ],
      "docs/settings.md": [`has ${/modulusLength: (\d+)/.exec(driver)?.[1]} bits and signs with SHA-2`],
      "docs/troubleshooting.md": [
        `login shell must start within ${Number(/\{ within = ([\d_]+), apart/.exec(driver)?.[1]?.replace("_", "")) / 1000} s`,
        ...[/isThrottling\(failure\) \? (\d+)_000 : (\d+)_000;/.exec(driver)].map(
          (match) => `has failed for more than ${match?.[2]} s (${match?.[1]} s if it is throttled)`,
        ),
      ],
    };
    expect(Object.values(claims).flat()).toHaveLength(26);
    for (const [path, texts] of Object.entries(claims)) for (const text of texts) expect(wordsOf(path)).toContain(text);
  });

  test("prepare warns of limits of the runner that are shorter than docs/jobs.md asks for", () => {
    const [, needed] = /const needed = config\.SSH\.CancelGracePeriod \+ (\d+);/.exec(driver) ?? [];
    const [, graceful] = /graceful_kill_timeout \|\| (\d+)/.exec(driver) ?? [];
    const [, shutdown] = /shutdown_timeout \|\| (\d+)/.exec(driver) ?? [];
    const text = wordsOf("docs/jobs.md");
    expect(text).toContain(
      `| \`graceful_kill_timeout\`, in \`[runners.custom]\` | ${graceful} seconds | at least \`CancelGracePeriod\` + ${needed}.`,
    );
    expect(text).toContain(
      `| \`shutdown_timeout\`, at the top level | ${shutdown} seconds | at least \`CancelGracePeriod\` + ${needed}, so raise it if \`CancelGracePeriod\` is above ${Number(shutdown) - Number(needed)}.`,
    );
  });

  test("the tests that the pages name exist", () => {
    const named = pages.flatMap((path) =>
      [...read(path).matchAll(/^<!-- tested by:\n([\s\S]*?)\n-->$/gm)].flatMap(([, names = ""]) =>
        names.split("\n").map((name) => ({ path, name })),
      ),
    );
    const withClaims = pages.filter((path) => !/^(README|docs\/faults)\.md$/.test(path));
    expect([...new Set(named.map(({ path }) => path))]).toEqual(withClaims);
    const vitest = join(root, "node_modules", "vitest", "vitest.mjs");
    const { stdout } = spawnSync(process.execPath, ["--bun", vitest, "list", "--json"], {
      cwd: root,
      encoding: "utf8",
      env: { ...process.env, QUICK: undefined },
      maxBuffer: 2 ** 26,
    });
    const tests = (JSON.parse(stdout) as { name: string }[]).map(({ name }) => ` > ${name}`);
    expect(tests.length).toBeGreaterThan(500);
    // A fault of the soak tests is no test of its own; it has a row.
    const exists = (name: string) =>
      tests.some((known) => known.endsWith(` > ${name}`)) || faults.includes(`\n| ${name} | `);
    expect(named.filter(({ name }) => !exists(name))).toEqual([]);
  });
});
