/**
 * Compares the documents with the driver: links, settings, options, messages, numbers and the names of tests. The tables
 * of settings and the included files are generated; `UPDATE_DOCS=true` rewrites them. Needs no container and no
 * compiled driver.
 */
import { spawnSync } from "node:child_process";
import {
  existsSync,
  globSync,
  mkdirSync,
  mkdtempSync,
  readFileSync,
  rmSync,
  symlinkSync,
  writeFileSync,
} from "node:fs";
import { tmpdir } from "node:os";
import { dirname, extname, join, normalize } from "node:path";
import * as commander from "commander";
import { parse as parseToml, stringify as stringifyToml } from "smol-toml";
import * as v from "valibot";
import { describe, expect, test } from "vitest";
import { TARGETS } from "../.ci/build.ts";
import {
  COORDINATOR_OVERRIDE,
  ConfigSchema,
  formatSweep,
  formatTasks,
  parseCommandLine,
  readConfig,
  startRetryPause,
} from "../fargate.ts";
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
    blocksOf(path, language).map((text, index): [name: string, text: string] => [`${path} block ${index + 1}`, text]),
  );

/** The simple commands of a shell script, as words without quotes, assignments, redirections and keywords. */
function commandsOf(script: string): string[][] {
  const text = script.replace(/\\\n\s*/g, " ").replace(/<<(\w+)\n[\s\S]*?\n\1$/gm, "\n"); // without here-documents
  const WORD = /(?:\\.|'[^']*'|"(?:\\.|[^"\\])*"|\$\((?:'[^']*'|"[^"]*"|[^()'"])*\)|[^\s'"\\;|&()<>])+/y;
  const PREFIX = /^(\w+=.*|do|then|else|if|while|until|!|[{}]|done|fi|sudo|env)$/s;
  const commands: string[][] = [[]];
  for (let at = 0; at < text.length; ) {
    const rest = text.slice(at);
    const skipped = /^(?:[^\S\n]+|#.*|\d*(?:>>?|<(?!\())&?\s*[^\s;|&()<>]+)/.exec(rest)?.[0];
    WORD.lastIndex = at;
    const word = skipped ? "" : (WORD.exec(text)?.[0] ?? "");
    const substituted = word.replace(/'[^']*'/g, "").matchAll(/\$\(((?:"[^"]*"|[^()"])*)\)/g);
    for (const [, inner = ""] of substituted) commands.unshift(...commandsOf(inner));
    const command = commands.at(-1) ?? [];
    if (word && !(command.length === 0 && PREFIX.test(word)))
      command.push(word.replace(/'([^']*)'|"((?:\\.|[^"\\])*)"|\\(.)/g, "$1$2$3"));
    if (!skipped && !word) commands.push([]);
    at += (skipped || word || " ").length;
  }
  // sudo -u NAME
  const own = commands.map((words) => (words[0] === "-u" ? words.slice(2) : words));
  return own.filter(([program]) => program !== undefined && program !== "for");
}

/** The commands in the shell blocks of a document, and those after the prompt in its console blocks. */
const shellOf = (path: string): string[] => [
  ...blocksOf(path, "sh"),
  ...blocksOf(path, "console").map((text) => (text.match(/^\$ .*$/gm) ?? []).map((line) => line.slice(2)).join("\n")),
];

/** The code spans of a document. */
const spansOf = (path: string) => [...proseOf(path).matchAll(/`([^`\n]+)`/g)].map(([, span = ""]) => span);

const REGENERATE = "UPDATE_DOCS=true npm run test:quick";

/** Rewrites what is generated in a document; unless UPDATE_DOCS is set, the document must be so already. */
function expectGenerated(path: string, generate: (text: string) => string): void {
  const text = read(path);
  const generated = generate(text);
  if (process.env.UPDATE_DOCS === "true") {
    if (generated !== text) writeFileSync(join(root, path), generated);
  } else expect(generated, `${path} is out of date: regenerate it with ${REGENERATE}`).toBe(text);
}

test("README.md has at most 150 lines", () => {
  const lines = read("README.md").trimEnd().split("\n");
  expect(lines.length, "README.md is too long: move details to a page in docs/").toBeLessThanOrEqual(150);
});

test("README.md links to every page", () => {
  for (const path of documents.filter((path) => /^(docs\/.*|examples\/README\.md|[A-Z]+\.md)$/.test(path)))
    if (path !== "README.md")
      expect(read("README.md").includes(`(${path}`), `README.md: add a link to ${path} under "Documents"`).toBe(true);
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

  test.each(documents)("%s links to existing files and headings", (path) => {
    const targets = [...proseOf(path).matchAll(/\]\(([^)\s]+)\)/g)].map(([, target = ""]) => target);
    for (const target of targets.filter((target) => !/^[a-z]+:/.test(target))) {
      const [file = "", anchor] = target.split("#");
      const linked = file === "" ? path : normalize(join(dirname(path), file));
      expect(existsSync(join(root, linked)), `${path} links to ${target}, but there is no such file`).toBe(true);
      if (anchor === undefined) continue;
      const missing = `${path} links to ${target}, but no heading of ${linked} has this anchor`;
      expect(anchorsOf(linked), missing).toContain(anchor);
    }
  });

  // Nor does any heading have an anchor on which GitLab and GitHub differ.
  test("README.md and all other documents have unique anchors", () => {
    for (const path of documents) {
      const anchors = anchorsOf(path).filter((anchor) => path !== "CHANGELOG.md" || !/^(added|changed)$/.test(anchor));
      expect(anchors, `${path}: change a heading, because two have the same anchor`).toEqual([...new Set(anchors)]);
      const unclear = `${path}: reword this heading, because GitLab and GitHub give it different anchors`;
      for (const anchor of anchors) expect(anchor, unclear).not.toMatch(/--|^-|-$/);
    }
  });
});

describe("included files", () => {
  const LANGUAGES: Record<string, string> = { ".toml": "toml", ".json": "json", ".service": "ini", ".timer": "ini" };
  const MARKS = /^<!-- include (\S+) -->\n[\s\S]*?^<!-- end include -->$/gm;

  test.each(pages)("%s shows included files as they are", (path) => {
    expectGenerated(path, (text) =>
      text.replace(MARKS, (_, file: string) => {
        const fence = `\`\`\`${LANGUAGES[extname(file)] ?? "text"}`;
        return `<!-- include ${file} -->\n\n${fence}\n${read(file)}\`\`\`\n\n<!-- end include -->`;
      }),
    );
    const unpaired = `${path}: each "<!-- include FILE -->" needs an "<!-- end include -->", and the other way round`;
    expect(read(path).match(/<!-- (include .*|end include) -->/g)?.length ?? 0, unpaired).toBe(
      2 * (read(path).match(MARKS)?.length ?? 0),
    );
  });

  test("docs/permissions.md includes every policy", () => {
    for (const file of globSync("examples/iam/*.json", { cwd: root }))
      expect(
        read("docs/permissions.md").includes(`<!-- include ${file} -->`),
        `docs/permissions.md: add "<!-- include ${file} -->" and "<!-- end include -->", then run ${REGENERATE}`,
      ).toBe(true);
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

const JOB_IMAGE_TABLES = ["JobImage", "JobImage.TaskDefinitions", "JobImage.PullCredentials"];
const TABLES = ["", "Fargate", "Fargate.CapacityProviderStrategy", "TaskMetadata", "SSH", ...JOB_IMAGE_TABLES];
const allSettings = TABLES.flatMap((table) => settingsOf(table).map(([key, schema]) => ({ table, key, schema })));
const tableOf = (key: string) => allSettings.find((setting) => setting.key === key)?.table;

/** What the documents need of the CloudFormation template. Its functions, such as !Ref, are parsed as their values. */
const stack = Bun.YAML.parse(read("examples/cloudformation/fargate-runner.yaml")) as {
  Parameters: Record<string, { Default?: string | number }>;
  Outputs: Record<string, object>;
};

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
const OPERATOR_COMMANDS = ["init", "doctor", "tasks", "shell", "sweep", "runners", "manager"];
const helpTexts = [[], ["custom"], ["custom", "run"], ...OPERATOR_COMMANDS.map((name) => [name])].map((command) =>
  help(...command),
);
/** Every option of the driver, with the name of its value if it has one. */
const options = new Map(
  helpTexts.flatMap((text) =>
    [...text.matchAll(/^ {2}(?:-\w, )?(--[\w-]+)(?: <(\w+)>)?/gm)].map(([, name = "", value]) => [name, value]),
  ),
);

/** The options that override a setting, and the variable of a job that does. Both are found by trying. */
function overridesOf(table: string, key: string): string[] {
  if (table.includes(".")) return []; // settings of a list, such as the TaskDefinition of a row
  const byOption = [...options].flatMap(([name, value]) => {
    if (name === "--help" || name === "--version") return []; // they print
    for (const example of value ? ["debug", "text", "x"] : [undefined])
      try {
        const parsed = parseCommandLine([name, ...(example ? [example] : []), "custom", "prepare"], commander);
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

/** Settings, completed with those that are required. */
const complete = (settings: Settings): string => {
  const whole: Settings = { ...minimal, ...settings };
  for (const table of Object.keys(minimal) as (keyof typeof minimal)[])
    whole[table] = { ...minimal[table], ...settings[table] };
  if (whole.Fargate?.Subnets) delete whole.Fargate.Subnet;
  if (whole.Fargate?.SecurityGroups) delete whole.Fargate.SecurityGroup;
  return stringifyToml(whole);
};

describe("settings", () => {
  const MARKS = /^<!-- settings ?(\S*) -->\n[\s\S]*?^<!-- end settings -->$/gm;

  test("docs/settings.md has the tables of the schema", () => {
    expectGenerated("docs/settings.md", (text) =>
      text.replace(MARKS, (_, table: string) => {
        const mark = `settings ${table}`.trimEnd();
        return `<!-- ${mark} -->\n\n${settingsTable(table)}\n\n<!-- end settings -->`;
      }),
    );
    const marks =
      'docs/settings.md: "<!-- settings TABLE -->" and "<!-- end settings -->" for each of TABLES, in order';
    expect(
      [...read("docs/settings.md").matchAll(MARKS)].map(([, table]) => table),
      marks,
    ).toEqual(TABLES);
  });

  test("docs/settings.md has every setting", () => {
    const leaves = (schema: Schema): string[] =>
      Object.entries(entriesOf(schema)).flatMap(([key, inner]) => [...(isTable(inner) ? [] : [key]), ...leaves(inner)]);
    const missing = "docs/docs.test.ts: add a new table of the configuration file to TABLES";
    expect(new Set(allSettings.map(({ key }) => key)), missing).toEqual(new Set(leaves(ConfigSchema)));
    // One table stands for both lists of capacity providers.
    expect(entriesOf(schemaAt("Fargate.FallbackCapacityProviderStrategy"))).toBe(
      entriesOf(schemaAt("Fargate.CapacityProviderStrategy")),
    );
  });

  test("docs/settings.md has the meaning and the overrides of every setting", () => {
    expect(allSettings.length).toBeGreaterThan(35);
    for (const { key, schema } of allSettings)
      expect(meaningOf(schema), `fargate.ts: add v.description(...) to the schema of ${key}`).not.toBe("");
    expect(overridesOf("Fargate", "TaskDefinition")).toEqual(["--task-def", "FARGATE_TASK_DEFINITION"]);
    expect(overridesOf("", "LogLevel")).toEqual(["--debug", "--log-level"]);
    expect(overridesOf("SSH", "Port")).toEqual([]);
    expect(overridesOf("JobImage.TaskDefinitions", "TaskDefinition")).toEqual([]);
  });

  const toml = blocks("toml").map(([name, text]) => [name, parseToml(text) as unknown as Settings] as const);

  test.each(toml.filter(([, settings]) => !("runners" in settings)))("%s is accepted", (name, settings) => {
    expect(readConfig(complete(settings), name, {}, {}).warnings).toEqual([]);
  });

  test("README.md has a whole configuration", () => {
    const [text = ""] = blocksOf("README.md", "toml");
    expect(readConfig(text, "fargate.toml", {}, {}).warnings).toEqual([]);
  });

  test.each(pages)("%s gives settings only values that are accepted", (path) => {
    for (const span of spansOf(path)) {
      const [, key = "", value = ""] = /^([A-Z]\w+) = (.+)$/.exec(span) ?? [];
      if (!key || value.includes("...")) continue;
      const table = tableOf(key);
      expect(table, `${path}: \`${span}\` sets ${key}, but there is no such setting`).toBeDefined();
      const settings = parseToml(table ? `[${table}]\n${span}` : span) as unknown as Settings;
      expect(readConfig(complete(settings), span, {}, {}).warnings).toEqual([]);
    }
  });

  /** Words in the style of settings that are none: of AWS, of our template, of OpenSSH, of GitLab. */
  const OTHERS = new Set([
    ...Object.keys({ ...stack.Parameters, ...stack.Outputs }),
    ...["SetEnv", "AllowUsers", "PermitRootLogin", "AmazonECSTaskExecutionRolePolicy"],
    ...["RoleARN", "BucketLocation", "ServerSideEncryption", "ServerSideEncryptionKeyID"],
  ]);

  test.each(pages)("%s names only settings that exist", (path) => {
    for (const span of spansOf(path))
      if (/^[A-Z][a-z]+([A-Z]+[a-z]*)+$/.test(span) && !OTHERS.has(span))
        expect(
          tableOf(span),
          `${path}: \`${span}\` is spelled like a setting, but is none: correct it, or add it to OTHERS in docs/docs.test.ts`,
        ).toBeDefined();
  });
});

// ---------------------------------------------------------------------------------------------------------
// Commands
// ---------------------------------------------------------------------------------------------------------

describe("commands", () => {
  const scripts = Object.keys(manifest.scripts);

  // And no document names another.
  test("docs/development.md names every npm script", () => {
    for (const path of documents)
      for (const [, name] of read(path).matchAll(/\bnpm run (?:--silent )?([\w:-]+)/g))
        expect(scripts, `${path}: there is no npm run ${name}`).toContain(name);
    const named = [...read("docs/development.md").matchAll(/^\| `npm (?:run )?([\w:-]+)` \|/gm)].map(
      ([, name]) => name,
    );
    expect(named.sort(), "docs/development.md: one row under Commands for each script of package.json").toEqual(
      scripts.sort(),
    );
  });

  const commands = documents.flatMap((path) =>
    shellOf(path).flatMap((text) => commandsOf(text).map((words) => ({ path, words, text }))),
  );
  const DRIVER = /^(?:\/opt\/gitlab-runner\/|\.\/)?fargate(?:-linux-amd64)?$/;
  /** Calls of the driver: in blocks, in code spans, and in the examples of its own help. */
  const calls = [
    // docker exec CONTAINER PROGRAM
    ...commands.map(({ path, words }) => ({
      path,
      words: words[1] === "exec" ? words.slice(words.findIndex((word) => DRIVER.test(word))) : words,
    })),
    ...pages.flatMap((path) =>
      spansOf(path)
        .filter((span) => /^(sudo )?(\S*\/)?fargate(-linux-amd64)? [\w-]/.test(span) && !/\.\.\.|: /.test(span))
        .flatMap((span) => commandsOf(span).map((words) => ({ path, words }))),
    ),
    ...helpTexts.flatMap((text) =>
      [...text.matchAll(/^ {2}(fargate (?:.*\\\n)*.*)$/gm)].flatMap(([, line = ""]) =>
        commandsOf(line).map((words) => ({ path: "fargate --help", words })),
      ),
    ),
  ].filter(({ words: [program = ""] }) => DRIVER.test(program));

  test("parseCommandLine accepts every command line in the documents", () => {
    expect(calls.length).toBeGreaterThan(60);
    for (const { path, words } of calls) {
      const line = words.slice(1);
      if (/^--(help|version)$/.test(line.at(-1) ?? "")) continue;
      const given = line.map((word) => ({ ID: "0123456789ab", JOB: "4711" })[word] ?? word);
      const where = `${path}: ${words.join(" ")}`;
      expect(() => parseCommandLine(given, commander), `${where}: the driver refuses this command line`).not.toThrow();
      const file = line[line.indexOf("--config") + 1] ?? "";
      if (line.includes("--config") && file !== "PATH")
        expect(file, where).toMatch(/^(\/etc\/gitlab-runner\/)?fargate(-on-demand|-general)?\.toml$/);
    }
  });

  /** Programs that the reader has, or installs by the steps before. A function of the script counts as one. */
  const PROGRAMS = new Set(
    [
      "[ . cat cd chmod cp curl exec export find git install jq journalctl mv printf read sed sha256sum sleep true",
      "aws bun docker gitlab-runner npm python3 ssh ssh-keygen systemctl terraform ./server",
      "/tmp/infrastructure/bin/pip /tmp/infrastructure/bin/python",
    ].flatMap((names) => names.split(" ")),
  );

  const DOCKER_OPTIONS = [
    ...["--build-arg", "--output", "--platform", "--tag", "--target"],
    ...["--detach", "--env", "--hostname", "--init", "--name", "--rm", "--stop-timeout", "--volume"],
    ...["--password-stdin", "--username"],
  ];

  test.each(documents)("%s calls only programs that exist", (path) => {
    for (const { words, text } of commands.filter((command) => command.path === path)) {
      const [program = "", first = ""] = words;
      const isKnown = PROGRAMS.has(program) || DRIVER.test(program) || text.includes(`\n${program}() {`);
      expect(isKnown, `${path}: is ${program} misspelt? If not, add it to PROGRAMS in docs/docs.test.ts`).toBe(true);
      if (program === "npm") expect(["start", "test", "run"], `${path}: npm ${first}`).toContain(first);
      if (program === "docker" && first !== "exec")
        for (const word of words.filter((word) => word.startsWith("--")))
          expect(DOCKER_OPTIONS, `${path}: docker ${first} ${word}`).toContain(word.split("=")[0]);
      if (program !== "docker" || first !== "build") continue;
      const directory = words.find((word) => existsSync(join(root, word, "Dockerfile"))) ?? "";
      expect(directory, `${path}: ${words.join(" ")}: there is no such directory with a Dockerfile`).not.toBe("");
      const arguments_ = [...read(join(directory, "Dockerfile")).matchAll(/^ARG (\w+)/gm)].map(([, name]) => name);
      for (const [i, word] of words.entries())
        if (word === "--build-arg")
          expect(arguments_, `${path}: ${directory}/Dockerfile`).toContain(words[i + 1]?.split("=")[0]);
    }
  });

  /** Names that look like files of the repository and are not: made by the reader, by a command, or no files. */
  const NOT_IN_CLONE = new Set(
    ["./values", "./server", "./fargate-linux-amd64", "managers.json", "linux/amd64", "fargate/runner-token"], //
  );

  test.each(documents)("%s names only files that exist", (path) => {
    for (const { words } of commands.filter((command) => command.path === path))
      for (const word of words) {
        const name = word.replace(/^file:\/\//, "").replace(/^\$files\//, "");
        const isFile = /^(\.?[\w-][\w.-]*)(\/[\w.-]+)*$/.test(name) || /^\.\/[\w.-]+$/.test(name);
        const hasForm = name.includes("/") || /\.(toml|json|txt|ts|service|timer)$/.test(name);
        const where = `${path}: ${words.join(" ")}: there is no ${name}; correct it, or add it to NOT_IN_CLONE`;
        if (isFile && hasForm && !NOT_IN_CLONE.has(name))
          expect(
            ["", "examples", "examples/systemd"].some((directory) => existsSync(join(root, directory, name))),
            where,
          ).toBe(true);
        // The paths of docs/installation.md.
        if (/^\/(etc|opt)\//.test(name))
          expect(name, where).toMatch(/^\/(etc|opt)\/gitlab-runner(\/|$)|^\/etc\/systemd\/system\/$/);
      }
  });

  test("docs/settings.md has exactly the commands and options that exist", () => {
    const text = read("docs/settings.md").split("\n## Command line\n")[1]?.split("\n## ")[0] ?? "";
    const named = [
      ...text.matchAll(/^\| `(?:(?:sweep|runners|init|doctor|tasks|shell) )?(--[\w-]+)(?: [A-Z=]+)?` \|/gm),
    ].map(([, name]) => name);
    expect(named.sort(), 'docs/settings.md: one row under "Command line" for each option of --help').toEqual(
      [...options.keys()].sort(),
    );
    for (const [, command = ""] of text.matchAll(/^\| `fargate ([\w ]+?)(?: SCRIPT STAGE| JOB)?` \|/gm)) {
      const operands = command.endsWith("run") ? ["SCRIPT", "STAGE"] : command === "shell" ? ["4711"] : [];
      expect(parseCommandLine([...command.split(" "), ...operands], commander)?.command).toBe(
        command.split(" ").at(-1),
      );
    }
    for (const [, command = "", short = ""] of text.matchAll(/^\| `fargate custom (\w+)[\w ]*` \| `([\w ]+)` \|/gm)) {
      const operands = command === "run" ? ["SCRIPT", "STAGE"] : [];
      expect(parseCommandLine([...short.split(" "), ...operands], commander)?.command).toBe(command);
    }
  });

  const shellScripts = documents.flatMap((path) =>
    blocksOf(path, "sh").map((text, index): [string, string] => [`${path} block ${index + 1}`, text]),
  );

  test.each(shellScripts)("%s is a shell script", (_, text) => {
    const { status, stderr } = spawnSync("bash", ["-n"], { input: text, encoding: "utf8" });
    expect({ status, stderr }).toEqual({ status: 0, stderr: "" });
  });

  test.each(blocks("json"))("%s is JSON", (_, text) => {
    expect(() => JSON.parse(text)).not.toThrow();
  });

  test.each(blocks("yaml"))("%s has jobs", (_, text) => {
    const KEYWORDS = ["cache", "image", "retry", "script", "services", "tags", "variables"];
    for (const job of Object.values(Bun.YAML.parse(text) as Record<string, object>)) {
      expect(job).toHaveProperty("script");
      for (const keyword of Object.keys(job)) expect(KEYWORDS, "keywords of GitLab").toContain(keyword);
      for (const line of [(job as { script: string | string[] }).script].flat())
        expect(spawnSync("bash", ["-n"], { input: line }).status, line).toBe(0);
    }
  });

  /** What tests do with the code blocks of a language. `included`: they are files of examples/. */
  const LANGUAGES: Record<string, string> = {
    sh: "parsed, and each of its commands checked; those of a guide also run",
    console: "its commands checked, its output compared",
    toml: "read by readConfig, or as GitLab Runner's configuration",
    json: "parsed",
    yaml: "parsed as jobs",
    hcl: "parsed by .ci/infrastructure, which has a parser for it",
    dockerfile: "compared with the paths of the driver",
    diff: "compared with the files by .ci/repository.test.ts",
    mermaid: "compared with the calls of the driver",
    ini: "included",
    text: "included",
  };
  /** Texts that are no files, with the test that compares them with the driver's output. */
  const OUTPUTS: Record<string, string> = {
    "README.md": "docs/ and README.md quote the driver's log as it is",
    "docs/doctor.md": "docs/doctor.md shows what doctor prints",
  };

  test.each(documents)("%s has only blocks that are tested", (path) => {
    const text = read(path);
    const fences = [...text.matchAll(/^ *`{3,}(.*)$/gm)].map(([, language = ""]) => language);
    const opened = fences.filter((_, i) => i % 2 === 0);
    expect(fences.filter((_, i) => i % 2 === 1).join("")).toBe(""); // each is closed
    const what = `${path}: give each block a language that a test covers, and name it in LANGUAGES in docs/docs.test.ts`;
    expect(Object.keys(LANGUAGES), what).toEqual(expect.arrayContaining(opened));
    const included = [...text.matchAll(/^<!-- include \S+ -->\n\n```(\w+)$/gm)].map(([, language]) => language);
    const ofRunner = blocksOf(path, "toml").filter((block) => /^ *\[\[runners\]\]$/m.test(block));
    const empty = blocksOf(path, "text").filter((block) => block.trim() === "");
    for (const language of ["ini", "text"]) {
      const shown = opened.filter((name) => name === language).length - (language === "text" ? empty.length : 0);
      const rest = shown - included.filter((name) => name === language).length;
      expect(rest, `${path}: a block of ${language} is neither included nor in OUTPUTS`).toBe(
        language === "text" && OUTPUTS[path] ? 1 : 0,
      );
    }
    for (const block of ofRunner) {
      const isCompared = path === "docs/cache.md" || text.includes(`-->\n\n\`\`\`toml\n${block}\`\`\`\n\n<!-- end`);
      expect(isCompared, `${path}: include the configuration of GitLab Runner from examples/`).toBe(true);
    }
  });

  test("docs/operating.md shows what tasks prints", () => {
    const [shown = ""] = blocksOf("docs/operating.md", "console");
    const [, ...lines] = shown.trimEnd().split("\n");
    const [, ...rows] = lines.map((line) => line.split(/ {2,}/));
    expect(rows).toHaveLength(3);
    const SECONDS: Record<string, number> = { h: 3600, m: 60, s: 1 };
    const seconds = (text = "") =>
      [...text.matchAll(/(\d+)([hms])/g)].reduce((sum, [, n, unit = ""]) => sum + Number(n) * (SECONDS[unit] ?? 0), 0);
    const known = (cell = "-") => (cell === "-" ? null : cell);
    const tasks = rows.map(([job, project, task, state, age, deadline, address]) => ({
      job: Number(job),
      project: Number(project),
      taskArn: known(task),
      state: known(state),
      createdAt: 1_000_000 - seconds(age),
      deadline: known(deadline) && 1_000_000 + seconds(deadline),
      address: known(address),
      startedBy: "",
      stages: [],
    }));
    expect(formatTasks(tasks as Parameters<typeof formatTasks>[0], false, 1_000_000)).toBe(`${lines.join("\n")}\n`);
    const [, row = ""] = /\| `--json` \| (.*?) \|/.exec(wordsOf("docs/operating.md")) ?? [];
    const keys = [...row.matchAll(/`(\w+)`/g)].map(([, name]) => name).filter((name) => name !== "null");
    expect(keys).toEqual(Object.keys(tasks[0] ?? {}));
  });

  test("docs/manager.md puts a private CA where the driver looks for it", () => {
    const [, path] = /^const DEFAULT_CA_FILE = "(.*?)"/m.exec(driver) ?? [];
    expect(blocksOf("docs/manager.md", "dockerfile")).toEqual([`FROM fargate-manager\nCOPY ca.crt ${path}\n`]);
    expect(read("docs/manager.md")).toContain("--tag fargate-manager ");
  });

  test("docs/jobs.md draws only stages and calls that exist", () => {
    const [drawn = ""] = blocksOf("docs/jobs.md", "mermaid");
    const stages = [...drawn.matchAll(/R->>F: (custom .*)$/gm)].map(([, stage = ""]) => stage.split(" "));
    expect(stages.map((words) => parseCommandLine(words, commander)?.command)).toEqual(["prepare", "run", "cleanup"]);
    for (const [, call = ""] of drawn.matchAll(/F->>E: (\w+)/g))
      expect(driver).toContain(`.${call[0]?.toLowerCase()}${call.slice(1)}(`);
  });

  // They run in a scratch home directory, with programs in place of AWS, Docker and sudo.
  test("docs/setup.md has commands that fit together", () => {
    const home = mkdtempSync(join(tmpdir(), "fargate-setup-"));
    try {
      const programs = {
        aws: `echo "$*" >>~/calls
          case "$1 $2" in
            "sts get-caller-identity") echo 444455556666 ;;
            "ec2 create-security-group") case $* in *fargate-tasks*) echo sg-1234567890abcdef1 ;; *) echo sg-2 ;; esac ;;
          esac`,
        docker: `while [ $# -gt 0 ]; do [ "$1" != --output ] || touch "$2/fargate" "$2/THIRD-PARTY-LICENSES"; shift; done`,
        // \`install ... SOURCE TARGET\` and \`cp -r SOURCE TARGET\` change the scratch directory; \`init\` writes to it.
        sudo: `case $1:$* in
            install:* | cp:*) target=\${!#}; set -- "\${@:1:$#-1}"; mkdir -p ~/host"\${target%/*}"; "$@" ~/host"$target" ;;
            */fargate:*" init "*) shift; args=(); mkdir -p ~/host/etc/gitlab-runner
              for arg; do case $arg in /etc/*) arg=$HOME/host$arg ;; esac; args+=("$arg"); done
              exec "${process.execPath}" --no-env-file --config=/dev/null "${join(root, "fargate.ts")}" "\${args[@]}" ;;
          esac`,
      };
      mkdirSync(join(home, "bin"));
      for (const [name, text] of Object.entries(programs))
        writeFileSync(join(home, "bin", name), `#!/bin/bash\n${text}\n`, { mode: 0o755 });
      const commands = blocksOf("docs/setup.md", "sh").join("\n");
      // The reader changes to the directory of the copied files before the first command on the manager host, where the
      // variables of the workstation are not set, and back for the last two blocks.
      const [onWorkstation = "", onHost = "", after] = commands.split(
        /^(?=sudo install -D -m 0755 fargate |aws ecs list-tasks )/m,
      );
      const script = `${onWorkstation}\n(cd "$files"; unset vpc subnet_a subnet_b bucket account\n${onHost})\n${after}`;
      const { status, stderr } = spawnSync("bash", ["-euc", script], {
        cwd: root,
        env: { ...process.env, HOME: home, PATH: `${join(home, "bin")}:${process.env.PATH}` },
        input: "glrt-token\n",
        encoding: "utf8",
      });
      expect({ status, stderr }).toEqual({
        status: 0,
        stderr: expect.stringMatching(/^\S+ \S+ written; check it .*\n$/),
      });

      const calls = readFileSync(join(home, "calls"), "utf8");
      const named = [...calls.matchAll(/file:\/\/(\S+)/g)].map(([, path = ""]) => readFileSync(path, "utf8"));
      const definitions = named.map((text) => JSON.parse(text) as { family?: string });
      expect(definitions.flatMap(({ family }) => family ?? [])).toEqual(["test-task", "ci-java"]);
      expect(new Set(named.join("\n").match(/\b\d{12}\b/g))).toEqual(new Set(["444455556666"]));

      const onHosts = (path: string) => readFileSync(join(home, "host", path), "utf8");
      const { config, warnings } = readConfig(onHosts("etc/gitlab-runner/fargate.toml"), "fargate.toml", {}, {});
      expect(warnings).toEqual([]);
      expect(config.Fargate).toMatchObject({
        Subnets: ["subnet-0123456789abcdef0", "subnet-0123456789abcdef1"],
        SecurityGroup: "sg-1234567890abcdef1",
        CapacityProviderStrategy: [{ CapacityProvider: "FARGATE_SPOT" }],
        FallbackCapacityProviderStrategy: [{ CapacityProvider: "FARGATE" }],
      });
      expect(parseToml(onHosts("etc/gitlab-runner/config.toml"))).toMatchObject({
        concurrent: 40,
        runners: [{ token: "glrt-token", cache: { Type: "s3" } }],
      });
      for (const file of ["fargate-sweep.timer", "gitlab-runner.service.d/graceful-stop.conf"])
        expect(onHosts(`etc/systemd/system/${file}`)).toBe(read(`examples/systemd/${file}`));
    } finally {
      rmSync(home, { recursive: true });
    }
  });

  test("docs/private-subnets.md has commands that create every endpoint", () => {
    const [script = ""] = blocksOf("docs/private-subnets.md", "sh");
    const aws = `aws() { case $2 in describe-route-tables) echo "\${TABLES:-}" ;; *) echo "$*" >&2; echo sg-3 ;; esac; }`;
    const env = { vpc: "vpc-1", subnet_a: "s-1", subnet_b: "s-2", manager_group: "sg-1", task_group: "sg-2" };
    const { status, stderr } = spawnSync("bash", ["-euc", `${aws}\n${script}`], {
      env: { PATH: process.env.PATH, ...env, AWS_DEFAULT_REGION: "us-east-2", TABLES: "rtb-1\trtb-2" },
      encoding: "utf8",
    });
    expect(status, stderr).toBe(0);
    const created = [...stderr.matchAll(/create-vpc-endpoint .*--service-name com\.amazonaws\.us-east-2\.(\S+)/g)];
    expect(created.map(([, name]) => name)).toEqual(["ecs", "ecr.api", "ecr.dkr", "logs", "s3"]);
    expect(stderr).toContain("--route-table-ids rtb-1 rtb-2");
    // The page has a row for each endpoint that doctor looks for.
    const [, services = ""] = /^function servicesOf\(([\s\S]*?)^\}/m.exec(driver) ?? [];
    const looked = [...services.matchAll(/\["([\w.", ]+)"\]/g)].flatMap(([, names = ""]) => names.split('", "'));
    expect(looked.length).toBeGreaterThan(5);
    const rows = read("docs/private-subnets.md")
      .split("\n")
      .filter((line) => /^\| `.* \| (interface|gateway) \|/.test(line));
    for (const name of looked)
      expect(
        rows.some((line) => line.includes(`\`${name}\``)),
        name,
      ).toBe(true);
  });

  test("docs/spot.md makes a configuration without Spot", () => {
    const [, script = ""] = blocksOf("docs/spot.md", "sh");
    const [spot = ""] = blocksOf("docs/spot.md", "toml");
    const home = mkdtempSync(join(tmpdir(), "fargate-spot-"));
    try {
      const rest = minimalToml.replace("[Fargate]\n", `${spot.trimEnd()}\n`);
      writeFileSync(join(home, "fargate.toml"), rest);
      const sudo = `sudo() { case $1 in sed | install) "$@" ;; esac; }`;
      const commands = script.replaceAll("/etc/gitlab-runner/", `${home}/`);
      const { status, stderr } = spawnSync("bash", ["-euc", `${sudo}\n${commands}`], { encoding: "utf8" });
      expect({ status, stderr }).toEqual({ status: 0, stderr: "" });
      const capacityIn = (name: string) => {
        const { Fargate } = readConfig(readFileSync(join(home, name), "utf8"), name, {}, {}).config;
        return [Fargate.LaunchType, Fargate.CapacityProviderStrategy?.map(({ CapacityProvider }) => CapacityProvider)];
      };
      expect(capacityIn("fargate.toml")).toEqual([undefined, ["FARGATE_SPOT"]]);
      expect(capacityIn("fargate-on-demand.toml")).toEqual(["FARGATE", undefined]);
    } finally {
      rmSync(home, { recursive: true });
    }
  });

  test("docs/cache.md has the files and commands of the examples", () => {
    const [shown = ""] = blocksOf("docs/cache.md", "toml");
    expect(parseToml(shown)).toEqual(parseToml(`[[runners]]\n${read("examples/cache-s3.toml")}`));
    const [commands = ""] = blocksOf("docs/cache.md", "sh");
    const [, ...lines] = commands.trimEnd().split("\n");
    expect(blocksOf("docs/setup.md", "sh").join("\n")).toContain(lines.join("\n"));
  });

  test("docs/cloudformation.md has the parameters of the template, with their defaults", () => {
    const text = read("docs/cloudformation.md").split("\n## Parameters\n")[1]?.split("\n## ")[0] ?? "";
    const rows = [...text.matchAll(/^\| `(\w+)` \| (.*?) ?\| /gm)].map(([, name, standard]) => [name, standard]);
    const shown = ({ Default }: { Default?: string | number }) =>
      Default === undefined ? "required" : Default === "" ? "" : `\`${Default}\``;
    expect(rows).toEqual(Object.entries(stack.Parameters).map(([name, parameter]) => [name, shown(parameter)]));
  });

  // As for docs/setup.md, in a directory with what the commands need of a clone.
  test("docs/cloudformation.md has commands that fit together", () => {
    const home = mkdtempSync(join(tmpdir(), "fargate-stack-"));
    try {
      const programs = {
        aws: `echo "$*" >>~/calls
          case "$1 $2" in
            "sts get-caller-identity") echo 444455556666 ;;
            "secretsmanager create-secret") cat "\${!##file://}" >~/token; echo arn:of:the:secret ;;
            "secretsmanager put-secret-value") cat "\${!##file://}" >~/new-token ;;
            "cloudformation describe-stacks") echo the-output ;;
            "iam create-service-linked-role") exit 1 ;;
          esac`,
        docker: 'echo "docker $*" >>~/calls',
        fargate: 'test -s fargate.toml && echo "fargate $*" >>~/calls',
      };
      mkdirSync(join(home, "bin"));
      for (const [name, text] of Object.entries(programs))
        writeFileSync(join(home, "bin", name), `#!/bin/bash\n${text}\n`, { mode: 0o755 });
      for (const name of ["examples", "sshd-image"]) symlinkSync(join(root, name), join(home, name));
      const script = blocksOf("docs/cloudformation.md", "sh").join("\n");
      const { status, stderr } = spawnSync("bash", ["-euc", script], {
        cwd: home,
        env: { ...process.env, HOME: home, PATH: `${join(home, "bin")}:${process.env.PATH}` },
        input: "glrt-token\nglrt-new\n",
        encoding: "utf8",
      });
      expect({ status, stderr }).toEqual({ status: 0, stderr: "" });
      expect(readFileSync(join(home, "token"), "utf8")).toBe("glrt-token");
      expect(readFileSync(join(home, "new-token"), "utf8")).toBe("glrt-new");

      const calls = readFileSync(join(home, "calls"), "utf8").split("\n");
      const deployments = calls.filter((call) => call.startsWith("cloudformation deploy "));
      const given = deployments.map((call) => {
        const [, file = "", parameters = ""] = /--template-file (\S+) .*--parameter-overrides (.*)$/.exec(call) ?? [];
        expect(existsSync(join(root, file))).toBe(true);
        return Object.fromEntries(parameters.split(" ").map((word) => word.split("=")));
      });
      for (const name of given.flatMap(Object.keys)) expect(Object.keys(stack.Parameters)).toContain(name);
      const required = Object.entries(stack.Parameters).filter(([, { Default }]) => Default === undefined);
      expect(Object.keys(given[0] ?? {})).toEqual(expect.arrayContaining(required.map(([name]) => name)));
      const built = calls.flatMap((call) => /^docker push (\S+)/.exec(call)?.[1] ?? []);
      expect([given[0]?.ManagerImage, given[0]?.WorkerImage]).toEqual(built);
      expect(given[0]?.RunnerTokenSecretArn).toBe("arn:of:the:secret");
      const outputs = calls.flatMap((call) => /OutputKey=='(\w+)'/.exec(call)?.[1] ?? []);
      for (const name of outputs) expect(Object.keys(stack.Outputs)).toContain(name);
      for (const name of Object.keys(stack.Outputs))
        expect(read("docs/cloudformation.md").includes(`\`${name}\``), `docs/cloudformation.md: ${name}`).toBe(true);
    } finally {
      rmSync(home, { recursive: true });
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

  test("docs/troubleshooting.md lists only messages of the driver", () => {
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
        expect(
          [printed, faults, tests].some((text) => text.includes(part)),
          `docs/troubleshooting.md: "${part}" of the message "${message}" is neither in fargate.ts nor in a test`,
        ).toBe(true);
  });

  // The reader of a message may have only the program. What it names is then a page of the documentation.
  test("fargate.ts names in its messages only pages that exist", () => {
    const code = driver.replace(/^\s*(\*|\/\/).*$/gm, "").replace(/\/\/ .*$/gm, "");
    const named = [...code.matchAll(/[\w./-]+\.md\b/g)].map(([name]) => name);
    expect(named.length).toBeGreaterThan(7);
    for (const name of named) {
      expect(name, "name a page of docs/ instead").toMatch(/^docs\//);
      expect(existsSync(join(root, name)), `fargate.ts names ${name}, which does not exist`).toBe(true);
    }
  });

  /** Words of the official driver and of its guide, the fault that leads to them, and our words for it. */
  const TROUBLES: [trouble: string, theirs: string, fault: string, ours: string][] = [
    [
      "a cluster without container instances",
      "No Container Instances were found in your cluster",
      "prepare fails at once when the cluster has no default strategy",
      "ecs:RunTask was refused: InvalidParameterException: No Container Instances were found in your cluster.",
    ],
    [
      "a missing record",
      "file does not exist",
      "run fails when there is no record",
      "this job has no task: there is no complete record",
    ],
    [
      "a time-out of prepare",
      "connect: connection timed out",
      "prepare fails at ConnectTimeout when the task's address is silent",
      "nothing answered for",
    ],
    [
      "a time-out of run",
      "connect: connection timed out",
      "run fails when its connection times out",
      "nothing answered for",
    ],
    [
      "a connection of prepare that is refused",
      "connect: connection refused",
      "prepare fails at ConnectTimeout when the task's address is refusing",
      "ECONNREFUSED",
    ],
    [
      "a connection of run that is refused",
      "connect: connection refused",
      "run fails when its connection is refused",
      "ECONNREFUSED",
    ],
    [
      "a key that is refused",
      "unable to authenticate, attempted methods [none publickey]",
      "prepare fails when the container refuses the key",
      "the server refused the key",
    ],
    [
      "an unreachable ECS",
      "unable to connect to ECS",
      "prepare fails when ECS cannot be reached",
      "ecs:RunTask got no answer",
    ],
    [
      "an unreachable task",
      "unable to connect to worker ECS task via ssh",
      "prepare fails at ConnectTimeout when the task's address is refusing",
      "no login succeeded within ConnectTimeout",
    ],
    [
      "an RSA key whose signature is refused",
      "signature algorithm ssh-rsa not in PubkeyAcceptedAlgorithms",
      "prepare logs in with an RSA key when sshd refuses SHA-1 signatures",
      "",
    ],
    [
      "missing credentials of a task role",
      "no credentials to access AWS",
      "run gives a script the task role's credentials",
      "",
    ],
  ];
  test.each(TROUBLES)("docs/troubleshooting.md answers %s", (_, theirs, fault, ours) => {
    const lines = (path: string) => read(path).split("\n");
    expect(lines("docs/troubleshooting.md").filter((line) => line.includes(theirs) && line.includes(ours))).not.toEqual(
      [],
    );
    expect(lines("docs/faults.md").find((line) => line.startsWith(`| ${fault} |`))).toContain(ours);
  });

  test("docs/ and README.md quote the driver's log as it is", () => {
    const quotes: [path: string, quote: string][] = [
      ["docs/jobs.md", "the script may still be running in the container"],
      ["docs/jobs.md", "stopped by "],
      ["docs/worker-images.md", "PassEnvironment has no effect"],
      ["README.md", "Ready: logged in to "],
      ["README.md", "Starting a task of "],
      ["docs/moving.md", "Ready: logged in to "],
      ["docs/orphans.md", "fargate sweep: "],
      ["docs/private-subnets.md", "there is none out of the VPC"],
      ["docs/private-subnets.md", ", and no endpoint for "],
      ["docs/private-subnets.md", ": whether tasks reach GitLab and their images is not known"],
    ];
    for (const [path, quote] of quotes) {
      const where = `"${quote}" must be in fargate.ts and in ${path}: change the page, and \`quotes\` in docs/docs.test.ts`;
      expect([driver.includes(quote), wordsOf(path).includes(quote)], where).toEqual([true, true]);
    }
    const templates = [...driver.matchAll(/log(?:\.info|\[level\])\("([^"]+)"/g)].map(
      ([, template = ""]) => new RegExp(`Z ${template.replace(/[()]/g, "\\$&").replace(/\{\w+\}/g, "\\S+")}$`),
    );
    const logged = read("README.md").match(/^\d{4}-\S+Z .*$/gm) ?? [];
    expect(logged).toHaveLength(3);
    for (const line of logged)
      expect(
        templates.some((template) => template.test(line)),
        `README.md: the driver logs no such line, copy it from npm start: ${line}`,
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

  test("docs/ gives the numbers of the driver", () => {
    const grace = standard("SSH.CancelGracePeriod");
    const claims: Record<string, string[]> = {
      "docs/jobs.md": [
        `\`CancelGracePeriod\` seconds later (default ${grace})`,
        `\`CancelGracePeriod\` is at most ${limitOf("SSH.CancelGracePeriod", "max_value")} so that`,
        `stops its task within ${Math.ceil(constant("PREPARE_SHUTDOWN_MS") / 1000)} seconds`,
        `waits up to ${constant("RUN_TASK_GRACE_MS") / 1000} of these seconds for the answer`,
        `notices within ${constant("LOCK_TOUCH_MS") / 1000} seconds that the process that started it has ended`,
        `until the filter ends, at most ${field("DRAIN_MS", "filter") / 1000} seconds`,
        `nothing for ${field("DRAIN_MS", "silence")} ms, at most ${field("DRAIN_MS", "background") / 1000} seconds`,
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
        `registered more than ${constant("DEFINITION_AGE") / 86_400} days ago`,
        `deregisters at most ${constant("MAX_DEREGISTERED")} each time`,
        ...(Number(standard("Fargate.AbandonedAfter")) === 3 * 5 * 60 ? ["`AbandonedAfter` is three times that"] : []),
      ],
      "docs/images.md": [
        `limits all overrides of a task to ${constant("MAX_OVERRIDES").toLocaleString("en")} characters`,
        `keeps ${COORDINATOR_OVERRIDE.ed25519} of these for itself, or ${COORDINATOR_OVERRIDE.rsa.toLocaleString("en")} with an RSA key`,
        `After ${constant("SERVICE_WAIT_MS") / 1000} seconds, counted from the start of the last service`,
        `more than ${constant("DEFINITION_AGE") / 86_400} days old`,
        `at most ${constant("MAX_DEREGISTERED")} each time`,
        `A task has at most ${constant("MAX_CONTAINERS")} containers`,
      ],
      "docs/manager.md": [
        `it has not ended ${constant("RUNNER_EXIT_MS") / 1000} s after that`,
        `at the same time | ${constant("LEAVE_MS") / 1000} s |`,
        `\`CancelGracePeriod\` is ${constant("MANAGER_CANCEL_GRACE")} seconds so that`,
        `repeated for up to ${constant("GITLAB_RETRY_MS") / 1000} seconds`,
      ],
      "docs/doctor.md": [
        `it is less than ${constant("MAX_CLOCK_SKEW")} seconds off AWS's`,
        `${constant("MIN_FREE_DISK") / 2 ** 20} GiB or more is free`,
      ],
      "docs/settings.md": [`has ${/modulusLength: (\d+)/.exec(driver)?.[1]} bits and signs with SHA-2`],
      "docs/troubleshooting.md": [
        `login shell must start within ${Number(/timeoutMs = ([\d_]+), onNewConnection/.exec(driver)?.[1]?.replace("_", "")) / 1000} s`,
        ...[/isThrottling\(failure\) \? (\d+)_000 : (\d+)_000;/.exec(driver)].map(
          (match) => `has failed for more than ${match?.[2]} s (${match?.[1]} s if it is throttled)`,
        ),
      ],
    };
    expect(Object.values(claims).flat()).toHaveLength(40);
    for (const [path, texts] of Object.entries(claims))
      for (const text of texts)
        expect(
          wordsOf(path).includes(text),
          `${path} lacks "${text}", which has a number of fargate.ts: change the page, or \`claims\` in docs/docs.test.ts`,
        ).toBe(true);
  });

  test("docs/spot.md quotes the fault tables", () => {
    const quotes = [...read("docs/spot.md").matchAll(/^\| [^|`]+ \| `([^`]+)` \|/gm)].map(([, quote = ""]) => quote);
    expect(quotes).toHaveLength(3);
    for (const quote of quotes) {
      const parts = quote.split(/ ?\.\.\.;? ?/).filter(Boolean);
      const isIn = (line: string) => parts.every((part) => line.includes(part));
      expect(faults.split("\n").some(isIn), `docs/spot.md: no line of docs/faults.md has ${quote}`).toBe(true);
    }
  });

  test("docs/jobs.md gives the limits of the runner below which prepare warns", () => {
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

  test("docs/settings.md names the runner's variables that the driver reads", () => {
    const [, list = ""] = /sets for a job's stages: ((?:`\w+`,?\s*)+)\./.exec(read("docs/settings.md")) ?? [];
    const [stages = ""] = driver.split("\n// 11. Operator commands ");
    const used = [...stages.matchAll(/\benv\.([A-Z][A-Z_]+)/g)].map(([, name]) => name as string);
    const fromRunner = new Set(used.filter((name) => !/^(AWS|CUSTOM_ENV)_/.test(name)));
    expect(list.match(/\w+/g)?.toSorted(), "docs/settings.md: adapt the list").toEqual([...fromRunner].toSorted());
  });

  test("docs/manager.md has every variable and field of a fleet, with its default", () => {
    const [, rest = ""] = driver.split("\n// 11. Operator commands ");
    const operators = rest.replace(/\n\/\/ 12\. [\s\S]*(?=\n\/\/ 13\. )/, ""); // section 12 is about jobs
    const page = read("docs/manager.md");
    const rowsOf = (heading: string) => {
      const section = page.split(`\n## ${heading}\n`)[1]?.split("\n## ")[0] ?? "";
      const lines = section.split("\n").filter((line) => line.startsWith("| `"));
      return lines.map((line) => line.split("|").map((text) => text.trim()));
    };
    const codesOf = (text = "") => [...text.matchAll(/`([^`]+)`/g)].map(([, code]) => code as string);
    /** The entries of a schema in the source, with their defaults. */
    const entriesIn = (schema: string) => {
      const [, body = ""] = new RegExp(`\nconst ${schema} = .*\\n([^]*?)\n}\\);`).exec(operators) ?? [];
      const entries = body.split(/\n(?= {2}\w)/);
      expect(entries.length, schema).toBeGreaterThan(7);
      return new Map(
        entries.map((entry) => [
          entry.split(":")[0]?.trim() ?? "",
          (/: number\("(\d+)"/.exec(entry) ?? /,\s+"([^"]*)",?\s*\),$/.exec(entry))?.[1],
        ]),
      );
    };

    const rows = rowsOf("Variables");
    const variables = entriesIn("FleetSchema");
    const known = [...operators.matchAll(/\b(?:env|given)\.([A-Z][A-Z_]+)/g)].map(([, name]) => name as string);
    const ofOthers = ["PATH", "TERM", "AWS_REGION", "AWS_DEFAULT_REGION", "FARGATE_MANAGER"]; // shell, init, doctor
    const worker = [...operators.matchAll(/^ {2}\["\w+", "\w+", "worker_\w+", "([A-Z_]+)"\],$/gm)];
    expect(
      new Set(
        rows.flatMap(([, name, other]) => [...codesOf(name), ...codesOf(/^`WORKER_/.test(other ?? "") ? other : "")]),
      ),
    ).toEqual(
      new Set([
        ...variables.keys(),
        ...known.filter((name) => !ofOthers.includes(name)),
        ...worker.flatMap(([, suffix]) => [`FARGATE_${suffix}`, `WORKER_${suffix}`]),
        "GITLAB_RUNNER_TOKEN_<NAME>",
      ]),
    );
    for (const [variable, standard] of variables) {
      const [, , cell] = rows.find(([, name]) => codesOf(name).includes(variable)) ?? [];
      if (standard !== undefined) expect([variable, codesOf(cell)]).toEqual([variable, [standard]]);
    }
    const fields = rowsOf("Managers").flatMap(([, names]) => codesOf(names));
    expect(new Set(fields)).toEqual(new Set(entriesIn("ManagerSchema").keys()));
  });

  test("docs/worker-images.md names the variables that are never passed", () => {
    const [, names = ""] = /const reserved = "([^"]+)"/.exec(driver) ?? [];
    const [, inImage = ""] = /-e '\/\^\(([A-Z|_0-9]+)\)=\/d'\)/.exec(read("sshd-image/entrypoint.sh")) ?? [];
    expect(inImage).toBe(names);
    const [sentence = ""] = /- `SSH_\*`,[^.]*are never passed\./.exec(read("docs/worker-images.md")) ?? [];
    const documented = [...sentence.matchAll(/`([\w*]+)`/g)].map(([, name]) => name);
    expect(documented).toEqual(["SSH_*", "FARGATE_*", "_", "OLDPWD", ...names.split("|")]);
  });

  test("docs/orphans.md has the summary and the JSON keys of sweep", () => {
    const task = { taskArn: "arn", startedBy: "name", createdAt: 1, deadline: 2 };
    const report = { dryRun: false, stopped: [], left: [task, task, task], removedRecords: [], problems: [] };
    const page = wordsOf("docs/orphans.md");
    expect(page).toContain(`\`${formatSweep(report, false).trim()}\``);
    const every = { ...report, stopped: [{ ...task, why: "reason" }], deregistered: [] };
    const all = JSON.parse(formatSweep(every, true));
    const [, row = ""] = /\| `--json` \| (.*?) \|/.exec(page) ?? [];
    const keys = new Set([...row.matchAll(/`(\w+)`/g)].map(([, name]) => name));
    expect(keys).toEqual(new Set([...Object.keys(all), ...Object.keys(all.stopped[0])]));
    expect(wordsOf("docs/installation.md")).toContain("`tasks: 0 would be stopped, ...; problems: 0`");
    expect(formatSweep({ ...report, dryRun: true }, false)).toMatch(/^tasks: 0 would be stopped, .*; problems: 0$/m);
  });

  test("docs/development.md has the number of files that npm test runs at a time", () => {
    const [, workers] = /--maxWorkers=(\d+)/.exec(manifest.scripts.test) ?? [];
    const word = ["no", "one", "two", "three", "four"][Number(workers)];
    expect(wordsOf("docs/development.md")).toContain(`${word} at a time in \`npm test\``);
  });

  // Everything that docs/verifying.md promises of the header. `process.env` is read in the last section only.
  test("fargate.ts names in its header the calls and files that the code has", () => {
    const [header = ""] = /^\/\*\*[\s\S]*?\*\//m.exec(driver) ?? [];
    const code = driver.slice(driver.indexOf(header) + header.length);
    const calls = [...code.matchAll(/\b(?:ecs|ec2|iam|sts)\.([a-z]\w+)\(/g)].map(([, name]) => name as string);
    // doctor's queries of EC2 are in a table.
    const [, kinds = ""] = /^interface Ec2Resources \{\n([\s\S]*?)^\}/m.exec(code) ?? [];
    calls.push(...[...kinds.matchAll(/readonly (\w+):/g)].map(([, kind]) => `describe${kind}`));
    expect(new Set(calls).size).toBe(17);
    for (const call of calls) expect(header).toContain(`${call[0]?.toUpperCase()}${call.slice(1)}`);
    const ofStages = ["JOB_RESPONSE_FILE", "PrivateKeyPath", "AWS_CA_BUNDLE", ".manager-id", "/proc", "LogFile"];
    const onEcs = ["ECS_CONTAINER_METADATA_URI_V4", ".manager-task"];
    const ofImages = [".definition-", ".definition-dates", "/.fargate", "/etc/hosts", "SecretsInServices"];
    const ofFleets = ["CA_CERTIFICATES_PATH", "config.toml", ".runner_system_id", ".fargate-runners.pending"];
    for (const name of [...ofStages, ...onEcs, ...ofImages, ...ofFleets, "/api/v4/runners", "gitlab-runner"]) {
      expect(header).toContain(name);
      expect(code).toContain(name);
    }
    // Every place that calls another server or starts a program. The first fetch is that of the AWS SDK.
    expect(code.match(/\bfetch\([^,]*/g)).toEqual(["fetch(request", "fetch(`${url}/api/v4/runners${path}`"]);
    expect(code.match(/import\("node:(https?|tls|net|child_process)"\)/g)).toEqual([
      'import("node:tls")', // for getCACertificates
      'import("node:http")', // for the metadata endpoint
      'import("node:net")', // for the socket that ssh2 uses
      'import("node:net")', // for doctor's ranges of addresses
    ]);
    expect(code.match(/\bspawn\(\[[^\]]*\]/g)).toEqual([
      'spawn([program, "--version"]', // gitlab-runner
      'spawn(["gitlab-runner", ...args]',
    ]);
    const methods = [...code.matchAll(/askGitLab\(\w+, "(\w+)"/g)].map(([, method]) => method as string);
    expect(methods.length).toBeGreaterThan(2);
    for (const method of methods) expect(header).toContain(method);
    const lastSection = code.lastIndexOf("\n// 13. Command line");
    expect(lastSection).toBeGreaterThan(0);
    const lines = code.slice(0, lastSection).split("\n");
    expect(lines.filter((line) => /\bprocess\.env\b/.test(line) && !/^\s*(\/\/|\*)/.test(line))).toEqual([]);
  });

  test("docs/ names only tests that exist", () => {
    const named = pages.flatMap((path) =>
      [...read(path).matchAll(/^<!-- tested by:\n([\s\S]*?)\n-->$/gm)].flatMap(([, names = ""]) =>
        names.split("\n").map((name) => ({ path, name })),
      ),
    );
    const withClaims = pages.filter((path) => !/^(README|docs\/faults)\.md$/.test(path));
    const unnamed =
      'each page but README.md and docs/faults.md names the tests of its claims in "<!-- tested by:" comments';
    expect([...new Set(named.map(({ path }) => path))], unnamed).toEqual(withClaims);
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
    const gone = 'no test has these names: correct them in the "tested by:" comments';
    expect(
      named.filter(({ name }) => !exists(name)),
      gone,
    ).toEqual([]);
  }, 180_000); // as for SECURITY.md: vitest loads all test files
});
