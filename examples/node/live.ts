/**
 * Stream a WAV file in real time, like a microphone, interrupt it, and end with a second turn.
 *
 *     node build/live.js speech.wav face.png [--target HOST:PORT] [--interrupt-after SECONDS]
 */

import { readFileSync } from "node:fs";
import { setTimeout as sleep } from "node:timers/promises";
import { parseArgs } from "node:util";

import { call, connect, create, Stream } from "./avatar.js";
import { readWav, reportErrors } from "./program.js";

const PIECE_S = 0.04;

reportErrors();
const { positionals, values: flags } = parseArgs({
  allowPositionals: true,
  options: {
    target: { type: "string", default: "127.0.0.1:7000" },
    "interrupt-after": { type: "string", default: "2" },
  },
});
const [speech, portrait] = positionals;
if (!speech || !portrait) throw new Error("give a WAV file and a picture");
const { samples, rate_hz, num_channels } = readWav(speech);

/** Send the samples in real time until the time is over, in seconds. */
async function speak(stream: Stream, seconds: number): Promise<void> {
  const pieceBytes = 2 * num_channels * Math.round(rate_hz * PIECE_S);
  for (let at = 0; at < Math.min(samples.length, (seconds / PIECE_S) * pieceBytes); at += pieceBytes) {
    await stream.send({ audio: { data: samples.subarray(at, at + pieceBytes) } });
    await sleep(1000 * PIECE_S);
  }
}

const client = connect(flags.target!, process.env.AVATAR_TOKEN);
const session = await create(client, readFileSync(portrait));
try {
  const stream = new Stream(client, {
    session_id: session.id,
    audio: { encoding: "SAMPLE_ENCODING_PCM16", rate_hz, num_channels },
    mode: "MODE_LIVE",
    output: { encoding: "VIDEO_ENCODING_H264", per_latent: true, takes_chunks: true },
    return_audio: true,
  });
  await stream.open();

  const sending = (async () => {
    await speak(stream, Number(flags["interrupt-after"]));
    await stream.send({ interrupt: {} });
    await speak(stream, 1);
    await stream.send({ end_turn: {} });
    await stream.send({ close: {} });
  })();

  let numFrames = 0;
  for await (const { part, frame, audio, event, interrupted } of stream) {
    switch (part) {
      case "frame": // decode frame.data, and show it at frame.pts_us
        numFrames += 1;
        break;
      case "audio": // play audio.data at audio.pts_us
        break;
      case "interrupted": {
        const position_s = Number(interrupted!.position_us) / 1e6;
        console.log(`interrupted at ${position_s} s, speaking: ${interrupted!.was_speaking}`);
        break;
      }
      case "event":
        console.log(event!.kind, JSON.stringify(event![event!.kind!]));
    }
  }
  await sending;
  console.log(`${numFrames} frames`);
} finally {
  await call(client.DeleteSession.bind(client), { session_id: session.id });
  client.close();
}
