/** Shared by the programs: WAV files of 16-bit PCM, and errors in a line. */

import { readFileSync } from "node:fs";

/** Return a file's samples, interleaved, with their rate in Hz and number of channels. */
export function readWav(path: string): { samples: Buffer; rate_hz: number; num_channels: number } {
  const file = readFileSync(path);
  let format: Buffer | undefined;
  for (let at = 12; file.toString("latin1", 0, 4) === "RIFF" && at + 8 <= file.length; ) {
    const name = file.toString("latin1", at, at + 4);
    const chunk = file.subarray(at + 8, at + 8 + file.readUInt32LE(at + 4));
    if (name === "fmt ") format = chunk;
    if (name === "data" && format?.readUInt16LE(0) === 1 && format.readUInt16LE(14) === 16) {
      return { samples: chunk, rate_hz: format.readUInt32LE(4), num_channels: format.readUInt16LE(2) };
    }
    at += 8 + chunk.length + (chunk.length % 2);
  }
  throw new Error(`${path} is no WAV file of 16-bit PCM`);
}

/** Let an error end the program with a line in place of a stack. */
export function reportErrors(): void {
  process.on("uncaughtException", (error) => {
    console.error(`error: ${error.message}`);
    process.exit(1);
  });
}
