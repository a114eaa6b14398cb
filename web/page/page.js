// The page: chooses a face, connects by WebRTC, sends sound, and shows what comes back.
// Control messages go over a data channel; web/browser_session.py lists them.

const byId = (id) => document.getElementById(id);
const screen = byId("screen"), video = byId("video"), still = byId("still"), message = byId("message");
const STATES = {
  off: "Not connected", connecting: "Connecting …", idle: "Listening", speaking: "Speaking", interrupted: "Interrupted",
};
const PIECE_BYTES = 16000; // of a data channel's message
const MAX_BUFFERED_BYTES = 48000; // a second of sound; an interrupt has to wait for it
const FIGURES_MS = 1000;
const MAX_EVENTS = 50;

const about = await (await fetch("/about")).json();
let conversation = null; // {peer, channel, sender, microphone, started}, while there is one
let sending = 0; // counts what is sent, so that an interrupt ends a clip that is under way

// --- who speaks ---------------------------------------------------------------------------------------------------

function addPortraits() {
  byId("portraits").append(...about.portraits.map((name, i) => {
    const label = document.createElement("label");
    const input = Object.assign(document.createElement("input"), { type: "radio", name: "portrait", value: name, checked: i === 0 });
    const image = Object.assign(document.createElement("img"), { src: `/portraits/${name}`, alt: `Person ${i + 1}` });
    input.addEventListener("change", () => choose(image.src));
    label.append(input, image);
    return label;
  }));
  choose(`/portraits/${about.portraits[0]}`);
}

function choose(source) {
  byId("picture").value = "";
  byId("picture-name").textContent = "Upload a picture …";
  show(source);
}

function show(source) {
  if (still.src.startsWith("blob:")) URL.revokeObjectURL(still.src);
  still.src = source;
  still.hidden = false;
}

byId("picture").addEventListener("change", () => {
  const [file] = byId("picture").files;
  if (!file) return;
  if (file.size > about.max_picture_bytes) {
    byId("picture").value = "";
    say(`This picture is too large: at most ${about.max_picture_bytes >> 20} MB are taken.`);
    return;
  }
  document.querySelectorAll("[name=portrait]").forEach((each) => { each.checked = false; });
  byId("picture-name").textContent = file.name;
  show(URL.createObjectURL(file));
});

// --- the connection -----------------------------------------------------------------------------------------------

byId("connect").addEventListener("click", () => (conversation ? leave() : connect()));

async function connect() {
  say("");
  const peer = new RTCPeerConnection();
  const channel = peer.createDataChannel("avatar");
  channel.binaryType = "arraybuffer";
  channel.bufferedAmountLowThreshold = MAX_BUFFERED_BYTES / 3;
  const sender = peer.addTransceiver("audio", { direction: "sendrecv" }).sender;
  peer.addTransceiver("video", { direction: "recvonly" });
  const mine = conversation = { peer, channel, sender, microphone: null };
  enter("connecting");
  peer.addEventListener("track", ({ streams, track }) => { video.srcObject = streams[0] ?? new MediaStream([track]); });
  peer.addEventListener("connectionstatechange", () => {
    if (peer.connectionState === "failed") leave("The connection was lost.");
  });
  channel.addEventListener("open", () => { byId("says").disabled = false; note("Connected"); });
  channel.addEventListener("message", ({ data }) => conversation === mine && told(JSON.parse(data)));
  channel.addEventListener("close", () => conversation === mine && leave("The conversation has ended."));
  try {
    await peer.setLocalDescription(await peer.createOffer());
    await gathered(peer);
    const answer = await offer(peer.localDescription.sdp);
    await peer.setRemoteDescription({ type: "answer", sdp: answer.sdp });
    if (answer.notice) say(answer.notice);
    byId("promise").textContent = answer.reaction_s ? `${answer.reaction_s.toFixed(2)} s` : "–";
  } catch (error) {
    if (conversation === mine) leave(error.message);
  }
}

function gathered(peer) {
  return new Promise((done) => {
    const look = () => peer.iceGatheringState === "complete" && done();
    peer.addEventListener("icegatheringstatechange", look);
    setTimeout(done, 2000); // what has been gathered by then must do
    look();
  });
}

async function offer(sdp) {
  const form = new FormData();
  form.set("sdp", sdp);
  const [file] = byId("picture").files;
  if (file) form.set("picture", file);
  else form.set("portrait", document.querySelector("[name=portrait]:checked").value);
  const response = await fetch("/offer", { method: "POST", body: form });
  const answer = await response.json().catch(() => ({}));
  if (!response.ok) throw new Error(answer.error ?? "The server does not answer.");
  return answer;
}

function leave(why = "") {
  const { peer, microphone } = conversation;
  conversation = null;
  sending += 1;
  microphone?.stop();
  peer.close();
  video.srcObject = null;
  byId("says").disabled = true;
  for (const id of ["reaction", "promise", "rate", "network"]) byId(id).textContent = "–";
  enter("off");
  note(why || "Left");
  say(why);
}

addEventListener("pagehide", () => conversation?.peer.close());

// --- what the server tells ----------------------------------------------------------------------------------------

function told(item) {
  switch (item.type) {
    case "state":
      enter(item.state);
      note(STATES[item.state]);
      if (item.state === "idle") say("");
      break;
    case "reaction":
      byId("reaction").textContent = `${item.seconds.toFixed(2)} s`;
      note(`Answered after ${item.seconds.toFixed(2)} s`);
      break;
    case "interrupted":
      note(item.was_speaking ? `Interrupted after ${item.position_s.toFixed(1)} s` : "Nobody was speaking");
      break;
    case "notice":
      say(item.text);
      note(item.text);
      break;
    case "ended":
      leave(item.text);
      break;
  }
}

function enter(state) {
  screen.dataset.state = state;
  byId("state").textContent = STATES[state];
  const isOn = state !== "off";
  screen.toggleAttribute("data-live", isOn && state !== "connecting");
  byId("connect").textContent = isOn ? "Leave" : "Start";
  byId("connect").classList.toggle("primary", !isOn);
  byId("interrupt").disabled = !isOn || state === "connecting";
  byId("faces").disabled = isOn;
}

function say(text) {
  message.textContent = text;
}

function note(text) {
  const item = document.createElement("li");
  const time = document.createElement("time");
  time.textContent = new Date().toLocaleTimeString([], { hour12: false });
  item.append(time, text);
  byId("events").prepend(item);
  while (byId("events").children.length > MAX_EVENTS) byId("events").lastChild.remove();
}

const command = (type, fields = {}) => conversation?.channel.send(JSON.stringify({ type, ...fields }));

// --- what is said -------------------------------------------------------------------------------------------------

byId("microphone").addEventListener("click", () => (conversation.microphone ? stopListening() : listen()));

async function listen() {
  const mine = conversation;
  try {
    const stream = await navigator.mediaDevices.getUserMedia({ audio: { echoCancellation: true, noiseSuppression: true } });
    const [track] = stream.getAudioTracks();
    if (conversation !== mine) return track.stop();
    await mine.sender.replaceTrack(track);
    const context = new AudioContext();
    const analyser = context.createAnalyser();
    context.createMediaStreamSource(stream).connect(analyser);
    mine.microphone = { stop: () => { track.stop(); context.close(); heard(false); } };
    track.addEventListener("ended", () => mine.microphone && stopListening());
    heard(true);
    command("microphone", { is_on: true });
    meter(analyser, mine);
  } catch (error) {
    say(error.name === "NotAllowedError" ? "The browser does not allow the microphone." : `No microphone: ${error.message}`);
  }
  return undefined;
}

function stopListening() {
  const { microphone, sender } = conversation;
  if (!microphone) return;
  conversation.microphone = null;
  command("microphone", { is_on: false });
  microphone.stop();
  sender.replaceTrack(null);
}

function heard(isOn) {
  byId("microphone").setAttribute("aria-pressed", String(isOn));
  byId("microphone").textContent = isOn ? "Stop the microphone" : "Speak into the microphone";
  byId("level").value = 0;
}

function meter(analyser, mine) {
  const samples = new Float32Array(analyser.fftSize);
  const look = () => {
    if (!mine.microphone || conversation !== mine) return;
    analyser.getFloatTimeDomainData(samples);
    byId("level").value = Math.min(1, 4 * Math.sqrt(samples.reduce((sum, each) => sum + each * each, 0) / samples.length));
    requestAnimationFrame(look);
  };
  look();
}

byId("clip").addEventListener("change", () => {
  const [file] = byId("clip").files;
  byId("clip").value = "";
  if (file) speak(file);
});

for (const [type, isOver] of [["dragenter", true], ["dragover", true], ["dragleave", false], ["drop", false]]) {
  byId("drop").addEventListener(type, (event) => {
    event.preventDefault();
    byId("drop").classList.toggle("over", isOver);
    if (type === "drop" && conversation && event.dataTransfer.files.length) speak(event.dataTransfer.files[0]);
  });
}

async function speak(file) {
  stopListening();
  const mine = ++sending;
  let samples;
  try {
    samples = await decode(file);
  } catch {
    say(`${file.name} is no sound that this browser can read.`);
    return;
  }
  note(`Speaking ${file.name}, ${(samples.length / about.rate_hz).toFixed(1)} s`);
  const bytes = pcm16(samples);
  for (let start = 0; start < bytes.byteLength && sending === mine; start += PIECE_BYTES) {
    const { channel } = conversation;
    if (channel.bufferedAmount > MAX_BUFFERED_BYTES) {
      await new Promise((done) => channel.addEventListener("bufferedamountlow", done, { once: true }));
    }
    if (sending === mine) channel.send(bytes.slice(start, start + PIECE_BYTES));
  }
  if (sending === mine) command("end_turn");
}

// A file of any rate and number of channels as mono samples at the rate that the server takes.
async function decode(file) {
  const sound = await new OfflineAudioContext(1, 1, about.rate_hz).decodeAudioData(await file.arrayBuffer());
  const length = Math.min(sound.length, about.max_clip_s * about.rate_hz);
  if (length < sound.length) say(`Only the first ${about.max_clip_s} seconds of ${file.name} are spoken.`);
  const context = new OfflineAudioContext(1, length, about.rate_hz);
  const source = new AudioBufferSourceNode(context, { buffer: sound });
  source.connect(context.destination);
  source.start();
  return (await context.startRendering()).getChannelData(0);
}

function pcm16(samples) {
  const view = new DataView(new ArrayBuffer(samples.length * 2));
  samples.forEach((each, i) => view.setInt16(2 * i, Math.max(-1, Math.min(1, each)) * 32767, true));
  return view.buffer;
}

byId("text-form").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = byId("text").value.trim();
  if (!text) return;
  stopListening();
  note(`Saying “${text}”`);
  command("text", { text });
  byId("text").value = "";
});

function interrupt() {
  if (byId("interrupt").disabled) return;
  sending += 1;
  stopListening();
  command("interrupt");
}

byId("interrupt").addEventListener("click", interrupt);
addEventListener("keydown", (event) => event.key === "Escape" && interrupt());
byId("volume").addEventListener("input", () => { video.volume = byId("volume").value / 100; });

// --- figures ------------------------------------------------------------------------------------------------------

let shown = 0;
if ("requestVideoFrameCallback" in video) {
  const count = () => { shown += 1; video.requestVideoFrameCallback(count); };
  video.requestVideoFrameCallback(count);
}

let counted = { shown: 0, at: performance.now() };
setInterval(async () => {
  const now = performance.now();
  const rate = (1000 * (shown - counted.shown)) / (now - counted.at);
  counted = { shown, at: now };
  if (!conversation || conversation.peer.connectionState !== "connected") return;
  byId("rate").textContent = `${rate.toFixed(0)} / s`;
  const stats = [...(await conversation.peer.getStats()).values()];
  const pair = stats.find((each) => each.type === "candidate-pair" && each.nominated);
  if (pair?.currentRoundTripTime !== undefined) {
    byId("network").textContent = `${(pair.currentRoundTripTime * 1000).toFixed(0)} ms`;
  }
}, FIGURES_MS);

addPortraits();
byId("text-form").hidden = !about.max_text;
byId("text").maxLength = about.max_text || 0;
