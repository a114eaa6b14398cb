/**
 * Render a WAV file to H.264 (Annex B), as fast as possible.
 *
 *     node build/wav_to_h264.js speech.wav face.png out.h264 [--target HOST:PORT] [--seed N] [--break-at FRAME]
 *
 * --break-at breaks the connection once that frame is there: the stream resumes, and the file has the same bytes.
 */

import { createWriteStream, readFileSync } from "node:fs";
import { parseArgs } from "node:util";

import { call, connect, create, Stream } from "./avatar.js";
import { readWav, reportErrors } from "./program.js";

const PIECES_HZ = 10;

reportErrors();
const { positionals, values: flags } = parseArgs({
  allowPositionals: true,
  options: {
    target: { type: "string", default: "127.0.0.1:7000" },
    seed: { type: "string" },
    "break-at": { type: "string" },
  },
});
const [speech, portrait, out] = positionals;
if (!speech || !portrait || !out) throw new Error("give a WAV file, a picture and the name of the video");
const { samples, rate_hz, num_channels } = readWav(speech);

const client = connect(flags.target!, process.env.AVATAR_TOKEN);
const session = await create(client, readFileSync(portrait), flags.seed);
try {
  const stream = new Stream(client, {
    session_id: session.id,
    audio: { encoding: "SAMPLE_ENCODING_PCM16", rate_hz, num_channels },
    mode: "MODE_OFFLINE",
    output: { encoding: "VIDEO_ENCODING_H264", takes_chunks: true },
  });
  await stream.open();

  const sending = (async () => {
    const pieceBytes = 2 * num_channels * Math.round(rate_hz / PIECES_HZ);
    for (let at = 0; at < samples.length; at += pieceBytes) {
      await stream.send({ audio: { data: samples.subarray(at, at + pieceBytes) } });
    }
    await stream.send({ close: {} });
  })();

  const file = createWriteStream(out);
  let numFrames = 0;
  for await (const { part, frame } of stream) {
    if (part !== "frame") continue;
    file.write(frame!.data);
    numFrames += 1;
    if (frame!.index === flags["break-at"]) stream.breakConnection();
  }
  await sending;
  await new Promise((resolve) => file.end(resolve));
  const { width, height } = session.video!;
  console.log(`${numFrames} frames of ${width} x ${height}, ${stream.numResumes} resumes`);
} finally {
  await call(client.DeleteSession.bind(client), { session_id: session.id });
  client.close();
}
