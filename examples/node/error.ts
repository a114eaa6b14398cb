/**
 * Print what an error of a call says: here of a picture that is none, and of a session that does not exist.
 *
 *     node build/error.js [--target HOST:PORT]
 */

import { parseArgs } from "node:util";

import { AvatarError, call, connect } from "./avatar.js";
import { reportErrors } from "./program.js";

reportErrors();
const { values: flags } = parseArgs({ options: { target: { type: "string", default: "127.0.0.1:7000" } } });
const client = connect(flags.target!, process.env.AVATAR_TOKEN);
for (const attempt of [
  () => call(client.CreateReference.bind(client), { picture: Buffer.from("no picture") }),
  () => call(client.GetSession.bind(client), { session_id: "nobody" }),
]) {
  try {
    await attempt();
  } catch (error) {
    if (!(error instanceof AvatarError)) throw error;
    console.log(`${error.reason || "no reason"}: ${error.message}`);
    for (const { field, description } of error.violations) console.log(`  ${field}: ${description}`);
    if (error.retry_s !== undefined) console.log(`  try again in ${error.retry_s} s`);
  }
}
client.close();
