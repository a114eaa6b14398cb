// Speech for the avatar: typed text, audio files that are chosen or dropped anywhere on the page, and interrupts.

import { MAX_BUFFERED_BYTES, audio, clearMessage, command, connect, session } from "./connection.js";
import { about, byId, logEvent, showMessage } from "./elements.js";
import { stopSpeaking } from "./microphone.js";
import { choosePicture } from "./portrait.js";

const PIECE_BYTES = 16000; // per message of the data channel
let sendNumber = 0; // changes with each clip and interrupt, which ends a clip that is being sent

byId("text-form").hidden = !about.max_text;
byId("text").maxLength = about.max_text || 0;
byId("text-form").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = byId("text").value.trim();
  if (!text) return;
  stopSpeaking();
  clearMessage();
  command("text", { text });
  byId("text").value = "";
});

function interrupt() {
  if (byId("interrupt").disabled) return;
  sendNumber += 1;
  stopSpeaking();
  command("interrupt");
}

byId("interrupt").addEventListener("click", interrupt);
addEventListener("keydown", (event) => event.key === "Escape" && interrupt());

byId("clip").addEventListener("change", () => {
  const [file] = byId("clip").files;
  byId("clip").value = "";
  if (file) speak(file);
});

for (const [type, isOver] of [["dragenter", true], ["dragover", true], ["dragleave", false], ["drop", false]]) {
  addEventListener(type, (event) => {
    if (!event.dataTransfer?.types.includes("Files")) return;
    event.preventDefault();
    document.body.classList.toggle("over", isOver);
    const [file] = event.dataTransfer.files;
    if (type !== "drop" || !file) return;
    if (file.type.startsWith("image/")) choosePicture(file);
    else speak(file);
  });
}

// Sends an audio file as a turn of its own, in a new session if there is none.
async function speak(file) {
  const number = ++sendNumber;
  clearMessage();
  let samples;
  try {
    samples = await decode(file);
  } catch {
    showMessage(`${file.name} is no audio file that this browser can read. Choose a WAV or an MP3 file.`);
    return;
  }
  if (!session) connect();
  const own = session;
  if (!(await own.isReady) || session !== own || sendNumber !== number) return;
  stopSpeaking();
  audio.name = file.name;
  logEvent(`Speaking ${file.name}, ${(samples.length / about.rate_hz).toFixed(1)} s`);
  const bytes = pcm16(samples);
  for (let start = 0; start < bytes.byteLength; start += PIECE_BYTES) {
    if (own.channel.bufferedAmount > MAX_BUFFERED_BYTES) {
      await new Promise((done) => own.channel.addEventListener("bufferedamountlow", done, { once: true }));
    }
    if (sendNumber !== number || session !== own) return;
    own.channel.send(bytes.slice(start, start + PIECE_BYTES));
  }
  command("end_turn");
}

// Returns a file's audio as mono samples at the server's rate.
async function decode(file) {
  const decoded = await new OfflineAudioContext(1, 1, about.rate_hz).decodeAudioData(await file.arrayBuffer());
  const length = Math.min(decoded.length, about.max_clip_s * about.rate_hz);
  if (length < decoded.length) showMessage(`Only the first ${about.max_clip_s} seconds of ${file.name} are spoken.`);
  const context = new OfflineAudioContext(1, length, about.rate_hz);
  const source = new AudioBufferSourceNode(context, { buffer: decoded });
  source.connect(context.destination);
  source.start();
  return (await context.startRendering()).getChannelData(0);
}

function pcm16(samples) {
  const view = new DataView(new ArrayBuffer(samples.length * 2));
  samples.forEach((each, i) => view.setInt16(2 * i, Math.max(-1, Math.min(1, each)) * 32767, true));
  return view.buffer;
}
