// Installs the packages of package-lock.json and bun's executable, unless they are installed already. Plain
// Node.js: it runs before anything else is installed.
import { execFileSync } from "node:child_process";
import { createHash } from "node:crypto";
import { existsSync, readFileSync, writeFileSync } from "node:fs";
import { dirname, join } from "node:path";
import { fileURLToPath } from "node:url";

const root = join(dirname(fileURLToPath(import.meta.url)), "..");
const stamp = join(root, "node_modules", ".installed");
const lock = createHash("sha256")
  .update(readFileSync(join(root, "package-lock.json")))
  .digest("hex");
if (!existsSync(stamp) || readFileSync(stamp, "utf8") !== lock) {
  const inherit = { cwd: root, stdio: "inherit" };
  execFileSync("npm", ["ci", "--ignore-scripts", "--no-audit", "--no-fund", "--loglevel=error"], inherit);
  // npm runs no install scripts, whatever the environment. Only bun's is needed: it installs the executable.
  execFileSync(process.execPath, [join(root, "node_modules", "bun", "install.js")], inherit);
  writeFileSync(stamp, lock);
}
