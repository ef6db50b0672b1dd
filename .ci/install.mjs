// Installs what package-lock.json pins, unless that is already there, and bun's own program. Plain Node.js, because
// nothing else is there yet.
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
  // No install scripts, whatever the environment says against .npmrc. bun's is the only one that is needed: it puts the
  // program in its place.
  execFileSync(process.execPath, [join(root, "node_modules", "bun", "install.js")], inherit);
  writeFileSync(stamp, lock);
}
