// The page: selects a portrait, connects by WebRTC, sends audio, and plays the returned video.
// Control messages use a data channel; web/browser_session.py lists them.

const byId = (id) => document.getElementById(id);
const screen = byId("screen"), video = byId("video"), still = byId("still"), message = byId("message");
const STATES = {
  off: "Not connected", connecting: "Connecting …", idle: "Listening", speaking: "Speaking", interrupted: "Interrupted",
};
const PIECE_BYTES = 16000; // per message of the data channel
const MAX_BUFFERED_BYTES = 48000; // a second of audio; an interrupt waits behind it
const METRICS_MS = 1000;
const MAX_EVENTS = 50;

const about = await (await fetch("/about")).json();
let session = null; // {peer, channel, sender, microphone}, while connected
let sessionNotice = ""; // about the picture or the machine: shown as long as there is no other message
let sendNumber = 0; // changes with each clip and interrupt, which ends a clip that is being sent

// --- portrait -----------------------------------------------------------------------------------------------------

function addPortraits() {
  byId("portraits").append(...about.portraits.map((name, i) => {
    const label = document.createElement("label");
    const input = Object.assign(document.createElement("input"), { type: "radio", name: "portrait", value: name, checked: i === 0 });
    const image = Object.assign(document.createElement("img"), { src: `/portraits/${name}`, alt: `Person ${i + 1}` });
    input.addEventListener("change", () => choosePortrait(image.src));
    label.append(input, image);
    return label;
  }));
  choosePortrait(`/portraits/${about.portraits[0]}`);
}

function choosePortrait(source) {
  byId("picture").value = "";
  byId("picture-name").textContent = "Upload a picture …";
  showStill(source);
}

function showStill(source) {
  if (still.src.startsWith("blob:")) URL.revokeObjectURL(still.src);
  still.src = source;
  still.hidden = false;
}

byId("picture").addEventListener("change", () => {
  const [file] = byId("picture").files;
  if (!file) return;
  if (file.size > about.max_picture_bytes) {
    byId("picture").value = "";
    showMessage(`This picture is too large: at most ${about.max_picture_bytes >> 20} MB are accepted.`);
    return;
  }
  document.querySelectorAll("[name=portrait]").forEach((each) => { each.checked = false; });
  byId("picture-name").textContent = file.name;
  showStill(URL.createObjectURL(file));
});

// --- the connection -----------------------------------------------------------------------------------------------

byId("connect").addEventListener("click", () => (session ? disconnect() : connect()));

async function connect() {
  showMessage(sessionNotice = "");
  const peer = new RTCPeerConnection();
  const channel = peer.createDataChannel("avatar");
  channel.binaryType = "arraybuffer";
  channel.bufferedAmountLowThreshold = MAX_BUFFERED_BYTES / 3;
  const sender = peer.addTransceiver("audio", { direction: "sendrecv" }).sender;
  peer.addTransceiver("video", { direction: "recvonly" });
  const own = session = { peer, channel, sender, microphone: null };
  setState("connecting");
  peer.addEventListener("track", ({ streams, track }) => { video.srcObject = streams[0] ?? new MediaStream([track]); });
  peer.addEventListener("connectionstatechange", () => {
    if (peer.connectionState === "failed") disconnect("The connection was lost.");
  });
  channel.addEventListener("open", () => { byId("speech-panel").disabled = false; logEvent("Connected"); });
  channel.addEventListener("message", ({ data }) => session === own && handle(JSON.parse(data)));
  channel.addEventListener("close", () => session === own && disconnect("The session has ended."));
  try {
    await peer.setLocalDescription(await peer.createOffer());
    await iceGathered(peer);
    const answer = await offer(peer.localDescription.sdp);
    await peer.setRemoteDescription({ type: "answer", sdp: answer.sdp });
    if (answer.notice) {
      showMessage(sessionNotice = answer.notice);
      logEvent(answer.notice);
    }
    byId("promise").textContent = answer.reaction_s ? `${answer.reaction_s.toFixed(2)} s` : "nothing";
  } catch (error) {
    if (session === own) disconnect(error.message);
  }
}

function iceGathered(peer) {
  return new Promise((done) => {
    const check = () => peer.iceGatheringState === "complete" && done();
    peer.addEventListener("icegatheringstatechange", check);
    setTimeout(done, 2000); // continue with the candidates gathered by then
    check();
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
  if (!response.ok) throw new Error(answer.error ?? "The server did not answer.");
  return answer;
}

function disconnect(reason = "") {
  const { peer, microphone } = session;
  session = null;
  sendNumber += 1;
  microphone?.stop();
  peer.close();
  video.srcObject = null;
  byId("speech-panel").disabled = true;
  for (const id of ["reaction", "promise", "rate", "network"]) byId(id).textContent = "–";
  setState("off");
  logEvent(reason || "Disconnected");
  showMessage(reason);
}

addEventListener("pagehide", () => session?.peer.close());

// --- messages from the server -------------------------------------------------------------------------------------

function handle(item) {
  switch (item.type) {
    case "state":
      setState(item.state);
      logEvent(STATES[item.state]);
      if (item.state === "idle") showMessage(sessionNotice);
      break;
    case "reaction":
      byId("reaction").textContent = `${item.seconds.toFixed(2)} s`;
      logEvent(`Reaction after ${item.seconds.toFixed(2)} s`);
      break;
    case "interrupted":
      logEvent(item.was_speaking ? `Interrupted after ${item.position_s.toFixed(1)} s` : "Nobody was speaking");
      break;
    case "notice":
      showMessage(item.text);
      logEvent(item.text);
      break;
    case "ended":
      disconnect(item.text);
      break;
  }
}

function setState(state) {
  screen.dataset.state = state;
  byId("state").textContent = STATES[state];
  const isOn = state !== "off";
  screen.toggleAttribute("data-live", isOn && state !== "connecting");
  byId("connect").textContent = isOn ? "Leave" : "Start";
  byId("connect").classList.toggle("primary", !isOn);
  byId("interrupt").disabled = !isOn || state === "connecting";
  byId("portrait-panel").disabled = isOn;
}

function showMessage(text) {
  message.textContent = text;
}

function logEvent(text) {
  const item = document.createElement("li");
  const time = document.createElement("time");
  time.textContent = new Date().toLocaleTimeString([], { hour12: false });
  item.append(time, text);
  byId("events").prepend(item);
  while (byId("events").children.length > MAX_EVENTS) byId("events").lastChild.remove();
}

const command = (type, fields = {}) => session?.channel.send(JSON.stringify({ type, ...fields }));

// --- speech -------------------------------------------------------------------------------------------------------

const USES = { speak: "Speak through the avatar", talk: "Talk to the avatar" }; // of the microphone

for (const use of Object.keys(USES)) {
  byId(`microphone-${use}`).addEventListener("click", () => (session.microphone?.use === use ? stopMicrophone() : startMicrophone(use)));
}

async function startMicrophone(use) {
  const own = session;
  stopMicrophone();
  try {
    const stream = await navigator.mediaDevices.getUserMedia({ audio: { echoCancellation: true, noiseSuppression: true } });
    const [track] = stream.getAudioTracks();
    if (session !== own) return track.stop();
    await own.sender.replaceTrack(track);
    const context = new AudioContext();
    const analyser = context.createAnalyser();
    context.createMediaStreamSource(stream).connect(analyser);
    own.microphone = { use, stop: () => { track.stop(); context.close(); showMicrophone(); } };
    track.addEventListener("ended", () => own.microphone && stopMicrophone());
    showMicrophone(use);
    command("microphone", { use });
    meter(analyser, own);
  } catch (error) {
    showMessage(error.name === "NotAllowedError" ? "The browser does not allow the microphone." : `The microphone cannot be used: ${error.message}`);
  }
  return undefined;
}

function stopMicrophone() {
  const { microphone, sender } = session;
  if (!microphone) return;
  session.microphone = null;
  command("microphone", { use: "off" });
  microphone.stop();
  sender.replaceTrack(null);
}

// Ends speech from the microphone. What the avatar listens to goes on while it speaks.
function stopSpeaking() {
  if (session.microphone?.use === "speak") stopMicrophone();
}

function showMicrophone(inUse) {
  for (const [use, text] of Object.entries(USES)) {
    byId(`microphone-${use}`).setAttribute("aria-pressed", String(use === inUse));
    byId(`microphone-${use}`).textContent = use === inUse ? "Stop the microphone" : text;
  }
  byId("level").value = 0;
}

function meter(analyser, own) {
  const samples = new Float32Array(analyser.fftSize);
  const check = () => {
    if (!own.microphone || session !== own) return;
    analyser.getFloatTimeDomainData(samples);
    byId("level").value = Math.min(1, 4 * Math.sqrt(samples.reduce((sum, each) => sum + each * each, 0) / samples.length));
    requestAnimationFrame(check);
  };
  check();
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
    if (type === "drop" && session && event.dataTransfer.files.length) speak(event.dataTransfer.files[0]);
  });
}

async function speak(file) {
  stopSpeaking();
  const number = ++sendNumber;
  let samples;
  try {
    samples = await decode(file);
  } catch {
    showMessage(`${file.name} is no audio file that this browser can read.`);
    return;
  }
  logEvent(`Speaking ${file.name}, ${(samples.length / about.rate_hz).toFixed(1)} s`);
  const bytes = pcm16(samples);
  for (let start = 0; start < bytes.byteLength && sendNumber === number; start += PIECE_BYTES) {
    const { channel } = session;
    if (channel.bufferedAmount > MAX_BUFFERED_BYTES) {
      await new Promise((done) => channel.addEventListener("bufferedamountlow", done, { once: true }));
    }
    if (sendNumber === number) channel.send(bytes.slice(start, start + PIECE_BYTES));
  }
  if (sendNumber === number) command("end_turn");
}

// Returns a file's audio as mono samples at the server's rate.
async function decode(file) {
  const audio = await new OfflineAudioContext(1, 1, about.rate_hz).decodeAudioData(await file.arrayBuffer());
  const length = Math.min(audio.length, about.max_clip_s * about.rate_hz);
  if (length < audio.length) showMessage(`Only the first ${about.max_clip_s} seconds of ${file.name} are spoken.`);
  const context = new OfflineAudioContext(1, length, about.rate_hz);
  const source = new AudioBufferSourceNode(context, { buffer: audio });
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
  stopSpeaking();
  logEvent(`Saying “${text}”`);
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
byId("volume").addEventListener("input", () => { video.volume = byId("volume").value / 100; });

// --- measurements -------------------------------------------------------------------------------------------------

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
  if (!session || session.peer.connectionState !== "connected") return;
  byId("rate").textContent = `${rate.toFixed(0)} / s`;
  const stats = [...(await session.peer.getStats()).values()];
  const pair = stats.find((each) => each.type === "candidate-pair" && each.nominated);
  if (pair?.currentRoundTripTime !== undefined) {
    byId("network").textContent = `${(pair.currentRoundTripTime * 1000).toFixed(0)} ms`;
  }
}, METRICS_MS);

addPortraits();
byId("microphone-talk").hidden = !about.listens;
byId("text-form").hidden = !about.max_text;
byId("text").maxLength = about.max_text || 0;
